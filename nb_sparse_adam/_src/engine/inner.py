# SPDX-License-Identifier: Apache-2.0
"""Functions that compiled code alone calls: compiled once, where they are inlined.

numba makes of every function machine code of its own, with a wrapper for calls from Python, before another
function may call it; that function is then optimized again with all that it calls, and so on upwards. Of a
driver that calls functions that call functions, four fifths of the time of compiling go into code that nobody
ever runs. Here such a function is only a module of LLVM's, which is linked into whoever calls it and
optimized there.

It is done with a pipeline of numba's compiler (``pipeline_class``), whose library leaves out what is not
needed. Where numba is not as this module knows it, functions are compiled as numba would.
"""

from __future__ import annotations

import ctypes
from typing import Any

# What a call from Python comes to, which is an error of the library's: a TypeError.
_refusal = ctypes.cast(ctypes.pythonapi.PyErr_BadArgument, ctypes.c_void_p).value


def _options() -> dict[str, Any]:
    from numba import _dynfunc
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import Compiler

    for name in ("_optimize_final_module", "_finalize_final_module", "_finalize_dynamic_globals"):
        getattr(JITCodeLibrary, name)

    class Library(JITCodeLibrary):  # type: ignore[misc]
        """A module that is linked into others, and never executed by itself."""

        def _optimize_final_module(self) -> None:
            pass

        def _finalize_final_module(self) -> None:
            self._finalize_dynamic_globals()
            self._finalized = True

    def get_executable(library: Any, fndesc: Any, env: Any) -> Any:
        """Make what numba knows the function by."""
        library._ensure_finalized()
        name = fndesc.qualname.split(".")[-1]
        return _dynfunc.make_function(fndesc.lookup_module(), name, "", _refusal, env, (library,))

    class InnerCompiler(Compiler):  # type: ignore[misc]
        """numba's, but for the library that code goes to."""

        def __init__(self, typingctx: Any, targetctx: Any, library: Any, *others: Any) -> None:
            if library is None:
                library = Library(targetctx.codegen(), "inner")
            super().__init__(typingctx, targetctx, library, *others)
            self.state.targetctx = self.state.targetctx.subtarget(get_executable=get_executable)

    return {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": InnerCompiler}


try:
    OPTIONS: dict[str, Any] | None = _options()
except (AttributeError, ImportError):  # another version of numba
    OPTIONS = None
