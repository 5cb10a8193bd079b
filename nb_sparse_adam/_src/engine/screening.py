# SPDX-License-Identifier: Apache-2.0
"""Is any value too large, or not finite? Answered for almost every gradient by one pass over its bits.

Without its sign bit a floating-point number compares like an integer, infinity above every number and NaN
above infinity: the maximum of the bits answers both questions, and vectorizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import array_at, real_of_bits4, real_of_bits8

SAFE_SHARE = 1.25  # what rounding may add to a sum, generously

BLOCK = 4096  # values; enough for the processor's own prefetching

_EPS4, _EPS8 = float(np.finfo(np.float32).eps), float(np.finfo(np.float64).eps)
_ROOT4, _ROOT8 = float(np.sqrt(np.finfo(np.float32).max)), float(np.sqrt(np.finfo(np.float64).max))
_ALL_BUT_SIGN4, _ALL_BUT_SIGN8 = np.int32(2**31 - 1), np.int64(2**63 - 1)


@jit(inlined=False)
def largest_bits(place: Any, size: Any, first: Any, last: Any, stride: Any, dim: Any) -> Any:
    """The largest of the bits, without signs, of the rows first:last of a matrix of floats.

    Parameters
    ----------
    place : int64
        Address of the matrix.
    size : int64
        Bytes of a float, 4 or 8.
    first, last : int64
        Rows.
    stride : int64
        Floats from one row to the next.
    dim : int64
        Floats in a row.

    Returns
    -------
    int64
        To be read by `magnitude_of_bits`; 0 if there are no floats.
    """
    if last <= first or dim == 0:
        return np.int64(0)
    length = (last - 1) * stride + dim
    if size == 4:
        bits4 = array_at(place, length, np.int32)
        return np.int64(_largest_bits(bits4, _ALL_BUT_SIGN4, first, last, stride, dim))
    bits8 = array_at(place, length, np.int64)
    return np.int64(_largest_bits(bits8, _ALL_BUT_SIGN8, first, last, stride, dim))


@jit(inlined=False)
def _largest_bits(bits: Any, mask: Any, first: Any, last: Any, stride: Any, dim: Any) -> Any:
    """The same, of an array of integers.

    From the end to the start, block by block: what was read last, and is still in the cache, is what the
    step reads first.
    """
    integer = bits.dtype.type  # numba widens what & gives to 64 bits, of which fewer fit into a register
    largest = integer(0)
    runs, run = last - first, dim
    if stride == dim:
        runs, run = np.int64(1), (last - first) * dim
    for k in range(runs - 1, -1, -1):
        lo = (first + k) * stride
        end = lo + run
        while end > lo:
            start = max(end - BLOCK, lo)
            for i in range(np.uint64(start), np.uint64(end)):  # unsigned: an index that cannot wrap around
                largest = max(largest, integer(bits[i] & mask))
            end = start
    return largest


@jit(inlined=False)
def magnitude_of_bits(bits: Any, size: Any) -> Any:
    """The float64 that a float of so many bytes with these bits is."""
    if size == 4:
        return float(real_of_bits4(bits))
    return float(real_of_bits8(bits))


@jit(inlined=False)
def surely_finite(largest: Any, terms: Any, size: Any) -> Any:
    """Whether a sum of so many terms, none larger, surely has a finite square, rounding included.

    ``size`` is that of the float that it is computed in, in bytes.
    """
    if not terms * (_EPS4 if size == 4 else _EPS8) < 0.1:  # each addition may round up by half of eps
        return False
    return bool(float(largest) * terms * SAFE_SHARE < (_ROOT4 if size == 4 else _ROOT8))


@jit(inlined=False)
def first_not_finite(place: Any, size: Any, rows: Any, stride: Any, dim: Any) -> Any:
    """Place (row * dim + column) and value of a matrix's first float that is not finite; -1 if all are."""
    length = (rows - 1) * stride + dim if rows > 0 else 0
    narrow = array_at(place, length if size == 4 else 0, np.float32)
    wide = array_at(place, length if size == 8 else 0, np.float64)
    for r in range(rows):
        for j in range(dim):
            i = np.uint64(r * stride + j)
            value = np.float64(narrow[i]) if size == 4 else wide[i]
            if not abs(value) < np.inf:
                return np.int64(r * dim + j), value
    return np.int64(-1), 0.0


def square_root_of_largest(dtype: np.dtype[Any]) -> float:
    """Return what no number may exceed if its square is to be finite."""
    return _ROOT4 if dtype.itemsize == 4 else _ROOT8
