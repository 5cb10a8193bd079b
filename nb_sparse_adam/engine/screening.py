"""Is any value too large, or not finite? Answered for almost every gradient by one pass over its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from nb_sparse_adam.engine.compile import jit
from nb_sparse_adam.engine.parallel import swap_threads
from nb_sparse_adam.engine.threads import ALONE, Crew, run

__all__ = ["SAFE_SHARE", "largest_magnitude", "square_root_of_largest", "squares_are_finite"]

# Below this many values one thread is done before a second one has started.
PARALLEL_VALUES = 1 << 17

FEW_VALUES = 1 << 10  # for fewer, what surrounds the fast loop takes longer than a plain one

SAFE_SHARE = 1.25  # what rounding may add to a sum, generously

BLOCK = 4096  # values; enough for the processor's own prefetching

# By the size of a float: integers of that size, and all of their bits but the sign; rounding unit, and root
# of the maximum.
_INTEGERS: dict[int, tuple[Any, Any]] = {
    4: (np.int32, np.int32(2**31 - 1)),
    8: (np.int64, np.int64(2**63 - 1)),
}
_LIMITS = {
    dtype.itemsize: (float(np.finfo(dtype).eps), float(np.sqrt(np.finfo(dtype).max)))
    for dtype in (np.dtype(np.float32), np.dtype(np.float64))
}


def largest_magnitude(values: NDArray[Any], crew: Crew) -> float:
    """The largest absolute value of a C-contiguous float array; NaN if it holds one, 0 if it is empty.

    Without its sign bit a floating-point number compares like an integer, infinity above every number and
    NaN above infinity: the maximum of the bits answers both questions, and vectorizes.
    """
    if values.size < FEW_VALUES:
        return float(largest_of_few(values.reshape(-1)))
    integer, mask = _INTEGERS[values.itemsize]
    bits = values.reshape(-1).view(integer)
    if len(bits) < PARALLEL_VALUES:
        crew = ALONE
    largest = np.zeros(crew.parts, integer)
    run((largest_bits_serial, largest_bits_parallel), crew, bits, mask, largest)
    return float(largest.max().view(values.dtype))


def squares_are_finite(largest: float, terms: int, dtype: np.dtype[Any]) -> bool:
    """Whether a sum of so many terms, none larger, surely has a finite square, rounding included."""
    eps, largest_square_root = _LIMITS[dtype.itemsize]
    if not terms * eps < 0.1:  # each addition may round up by half of eps
        return False
    return largest * terms * SAFE_SHARE < largest_square_root


def square_root_of_largest(dtype: np.dtype[Any]) -> float:
    """Return what no number may exceed if its square is to be finite."""
    return _LIMITS[dtype.itemsize][1]


@jit
def largest_of_few(values: Any) -> Any:
    """Return the largest absolute value, or NaN if there is one."""
    largest = values.dtype.type(0)
    for i in range(len(values)):
        magnitude = abs(values[i])
        if magnitude > largest or magnitude != magnitude:
            largest = magnitude
    return largest


@jit
def largest_bits_worker(bits: Any, mask: Any, lo: Any, hi: Any) -> Any:
    """Return the maximum of ``bits[lo:hi] & mask``.

    From the end to the start, block by block: what was read last, and is still in the cache, is what the
    step reads first.
    """
    integer = bits.dtype.type  # numba widens what & gives to 64 bits, of which fewer fit into a register
    largest = integer(0)
    end = hi
    while end > lo:
        start = max(end - BLOCK, lo)
        for i in range(np.uint64(start), np.uint64(end)):  # unsigned: an index that cannot wrap around
            largest = max(largest, integer(bits[i] & mask))
        end = start
    return largest


@jit
def largest_bits_serial(bits: Any, mask: Any, largest: Any) -> None:
    """``largest[0]`` ← the maximum of ``bits & mask``."""
    largest[0] = largest_bits_worker(bits, mask, 0, len(bits))


@jit(parallel=True)
def largest_bits_parallel(threads: Any, bits: Any, mask: Any, largest: Any) -> None:
    """``largest[t]`` ← the maximum over the t-th part of the bits."""
    before = swap_threads(threads)
    chunks = len(largest)
    for t in prange(chunks):
        largest[t] = largest_bits_worker(bits, mask, len(bits) * t // chunks, len(bits) * (t + 1) // chunks)
    swap_threads(before)
