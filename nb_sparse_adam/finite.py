"""Is any value too large, or not finite? Answered for almost every gradient by one pass over its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from nb_sparse_adam.jit import jit

__all__ = ["largest_magnitude", "squares_are_finite"]

# Below this many values one thread is done before a second one has started.
PARALLEL_VALUES = 1 << 17


def largest_magnitude(values: NDArray[Any], threads: int) -> float:
    """The largest absolute value of a C-contiguous float array; NaN if it holds one, 0 if it is empty.

    Without its sign bit a floating-point number compares like an integer, infinity above every number and
    NaN above infinity: the maximum of the bits answers both questions, and vectorizes.
    """
    integer = np.int32 if values.itemsize == 4 else np.int64
    bits = values.reshape(-1).view(integer)
    mask = np.iinfo(integer).max
    if threads > 1 and len(bits) >= PARALLEL_VALUES:
        largest = largest_bits_parallel(bits, integer(mask), np.zeros(threads, integer)).max()
    else:
        largest = largest_bits(bits, integer(mask), 0, len(bits))
    return float(np.array([largest], integer).view(values.dtype)[0])


def squares_are_finite(largest: float, terms: int, dtype: np.dtype[Any]) -> bool:
    """Whether a sum of so many terms, none larger, surely has a finite square, rounding included."""
    limits = np.finfo(dtype)
    if not terms * float(limits.eps) < 0.1:  # each addition may round up by half of eps
        return False
    return largest * terms * 1.25 < float(np.sqrt(limits.max))


@jit
def largest_bits(bits: Any, mask: Any, lo: int, hi: int) -> Any:
    largest = mask & 0
    for i in range(lo, hi):
        largest = max(largest, bits[i] & mask)
    return largest


@jit(parallel=True)
def largest_bits_parallel(bits: Any, mask: Any, largest: Any) -> Any:
    chunks = len(largest)
    for t in prange(chunks):
        largest[t] = largest_bits(bits, mask, len(bits) * t // chunks, len(bits) * (t + 1) // chunks)
    return largest
