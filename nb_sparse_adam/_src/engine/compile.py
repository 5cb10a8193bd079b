# SPDX-License-Identifier: Apache-2.0
"""How the library's functions are compiled: one decorator, so that the decision is made once."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, TypeVar, overload

import numba

from nb_sparse_adam._src.engine import inner
from nb_sparse_adam._src.engine.compilations import WARM_UP, Announcement
from nb_sparse_adam._src.engine.kernel_cache import keep_on_disk

Function = TypeVar("Function", bound=Callable[..., Any])


@overload
def jit(function: Function) -> Function: ...


@overload
def jit(
    *,
    entry: bool = ...,
    parallel: bool = ...,
    allocates: bool = ...,
    inlined: bool = ...,
    announced: str = ...,
) -> Callable[[Function], Function]: ...


def jit(
    function: Callable[..., Any] | None = None,
    *,
    entry: bool = False,
    parallel: bool = False,
    allocates: bool = False,
    inlined: bool = True,
    announced: str = "",
) -> Any:
    """Compile a function for other compiled functions, or for Python, at its first call.

    * ``error_model="numpy"``: a division by zero gives what IEEE 754 says. Python's model raises, and
      the branch for it keeps a loop from being vectorized.
    * No fastmath at all: the compiler may neither reorder nor fuse, so that a loop gives the same bits
      however it is vectorized and on however many threads, and NaN and infinity keep their meaning.
    * No reference counts (``_nrt``) in functions that one thread runs: a count for each array that is taken
      out of a tuple made a row of dim 16 take 117 ns instead of 68, in cache. Such functions cannot allocate;
      ``allocates=True`` is for the ones that must.
    * Everything that one thread runs is inlined: a call passes each member of a tuple of arrays, some sixty
      words, through memory (66 ns a row of dim 16 in cache with calls, 17 without). It is optimized where it
      is inlined, and only there (`inner`).
    * ``nogil=True``: other Python threads run while a kernel does.
    * What Python calls is kept on disk in a cache that sees edits of every file that kernels are made of
      (`kernel_cache`), unless no folder can be written (a read-only install without a home): then the code is
      compiled again in every process. What a factory makes is found there too, by what its closure holds:
      functions that it calls must then be compiled here as well, for each gets a name of its own for the
      linker.

    Parameters
    ----------
    function : callable, optional
        The function to compile; without it a decorator is returned.
    entry : bool, default False
        Whether Python calls the function.
    parallel : bool, default False
        Whether ``prange`` loops are shared out to threads; Python calls such functions alone.
    allocates : bool, default False
        Whether the function makes arrays.
    inlined : bool, default True
        False: where it is called, it is the compiler's choice. For what runs once in a while and is long.
    announced : str, optional
        Of what Python calls and takes about a second to compile, or longer: which kernels they are, for
        whoever waits (`compilations`).
    """
    options = entry or parallel, parallel, allocates, inlined, announced
    if function is None:
        return lambda function: _compile_lazily(function, *options)
    return _compile_lazily(function, *options)


def _compile_lazily(
    function: Callable[..., Any], entry: bool, parallel: bool, allocates: bool, inlined: bool, announced: str
) -> Any:
    options: dict[str, Any] = {
        "error_model": "numpy",
        "nogil": True,
        "parallel": parallel,
        "_nrt": parallel or allocates,
        "forceinline": inlined and not parallel,
    }
    kept = entry or inner.OPTIONS is None
    if not kept:
        options.update(inner.OPTIONS or {})
        if function.__closure__:
            # Symbols are made of a function's name. Two that a factory made, one of them in code from the
            # disk, would have the same, and LLVM would take one for both.
            function.__qualname__ = function.__name__ + uuid.uuid4().hex
    compiled = numba.njit(**options)(function)
    if kept and compiled is not function:  # as it is with NUMBA_DISABLE_JIT=1
        announcement = Announcement(announced, WARM_UP)
        keep_on_disk(compiled, "numba.core.caching.FunctionCache", announcement=announcement)
    return compiled
