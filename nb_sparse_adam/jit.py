"""How the library's functions are compiled: one decorator, so that the decision is made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = ["jit", "prefetch"]


Function = TypeVar("Function", bound=Callable[..., Any])


@overload
def jit(function: Function) -> Function: ...


@overload
def jit(*, parallel: bool = ..., allocates: bool = ...) -> Callable[[Function], Function]: ...


def jit(
    function: Callable[..., Any] | None = None, *, parallel: bool = False, allocates: bool = False
) -> Any:
    """Compile a kernel at its first call, and keep the machine code on disk where that works.

    * ``error_model="numpy"``: a division by zero gives what IEEE 754 says. Python's model raises, and
      the branch for it keeps a loop from being vectorized.
    * No fastmath at all: the compiler may neither reorder nor fuse, so that a loop gives the same bits
      however it is vectorized and on however many threads, and NaN and infinity keep their meaning.
    * No reference counts (``_nrt``) in functions that one thread runs: a count for each array that is taken
      out of a tuple made a row of dim 16 take 117 ns instead of 68, in cache. Such functions cannot allocate;
      ``allocates=True`` is for the ones that must.
    * Everything that one thread runs is inlined: a call passes each member of a tuple of arrays, some sixty
      words, through memory (66 ns a row of dim 16 in cache with calls, 17 without).
    * ``nogil=True``: other Python threads run while a kernel does.
    * ``cache=True`` unless no folder can be written (a read-only install without a home): then the code is
      compiled again in every process. numba's cache sees an edit of the function's own file only, so a
      function compiled here calls compiled functions of its own file alone (a test holds us to it).

    Parameters
    ----------
    function : callable, optional
        The function to compile; without it a decorator is returned.
    parallel : bool, default False
        Whether ``prange`` loops are shared out to threads.
    allocates : bool, default False
        Whether the function makes arrays.
    """
    if function is None:
        return lambda function: _compile_lazily(function, parallel, parallel or allocates)
    return _compile_lazily(function, parallel, parallel or allocates)


def _compile_lazily(function: Callable[..., Any], parallel: bool, references: bool) -> Any:
    options: dict[str, Any] = {
        "error_model": "numpy",
        "nogil": True,
        "parallel": parallel,
        "_nrt": references,
        "forceinline": not parallel,
    }
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:  # "cannot cache function ...: no locator available"
        if "cache" not in str(error):
            raise
        return numba.njit(**options)(function)


if numba.config.DISABLE_JIT:

    def prefetch(array: Any, offset: Any) -> None:
        """Do nothing: without the compiler there is nothing to hint at."""

else:

    @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
    def prefetch(typingctx: Any, array: Any, offset: Any) -> Any:  # noqa: ARG001 (numba fixes the signature)
        """Ask the processor for the cache line of ``array.data[offset]``, to be written soon.

        ``offset`` counts elements from the start of a contiguous array. A hint only: it reads nothing and
        cannot fault. Rows drawn at random from a table are cache misses that the hardware cannot foresee;
        asking a few rows ahead hides them (a row step on 2M×64: 24 ms without, 12 ms with; measured on two
        Zen 4 cores).
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            address = builder.bitcast(builder.gep(data, [args[1]]), cgutils.voidptr_t)
            i32 = ir.IntType(32)
            hint = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32]),
                "llvm.prefetch.p0",
            )
            write, keep_in_all_caches, data_not_code = i32(1), i32(3), i32(1)
            builder.call(hint, [address, write, keep_in_all_caches, data_not_code])
            return context.get_dummy_value()

        return types.void(array, types.intp), codegen
