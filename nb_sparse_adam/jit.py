"""How the library's functions are compiled: one decorator, so that the decision is made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import numba

__all__ = ["jit"]


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
