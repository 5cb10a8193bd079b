# SPDX-License-Identifier: Apache-2.0
"""Sums of the values of one row's ids, in an order that the gradient alone decides.

Ids are summed in the order of the gradient, in blocks of `BLOCK`, and the sums of the blocks are added in
order: a row that takes half of a batch can be summed by many threads, and the bits do not depend on them.
``g`` is a `view.Gradient`; ``out`` a 1-D array of its dtype; i, lo, hi, s and offsets are int64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.integers import integer
from nb_sparse_adam._src.engine.intrinsics import address, load_sum, load_value, prefetch_line, store_sum
from nb_sparse_adam._src.engine.prefetching import prefetch
from nb_sparse_adam._src.engine.scratch import BLOCK
from nb_sparse_adam._src.engine.view import MOST_PREFETCHED

IDS_AHEAD = 16  # whose values are prefetched: after sorting they come in any order
VALUES_PREFETCHED = 1 << 19  # gradients of fewer elements are in the second-level cache, more or less


@jit
def locate(g: Any, i: Any) -> Any:
    """Where the values of the i-th smallest id begin, and its coefficient."""
    payload = g.packed[i] & g.payload_mask
    if g.weighted:
        return integer(g.bag_of, payload) * g.values_stride, g.coefficients[payload]
    if len(g.coefficients) > 0:
        return payload * g.values_stride, g.coefficients[payload]
    return payload * g.values_stride, g.values.dtype.type(1)


@jit
def prefetch_values(g: Any, i: Any) -> None:
    """Ask for the values of an id a few places after the i-th smallest."""
    later = i + IDS_AHEAD
    if later >= len(g.packed):
        return
    if g.weighted:
        payload = g.packed[later] & g.payload_mask
        if g.bag_of.is_wide:
            prefetch_line(address(g.bag_of.wide, payload))
        else:
            prefetch_line(address(g.bag_of.narrow, payload))
        prefetch_line(address(g.coefficients, payload))
    if g.values.size >= VALUES_PREFETCHED:
        offset, _ = locate(g, later)
        prefetch(g.values, offset, min(g.dim, MOST_PREFETCHED))


@jit
def sum_ids(g: Any, lo: Any, hi: Any, out: Any, to: Any) -> None:
    """Put the sum over the ids lo:hi, in their order, into ``out``, from ``to`` on.

    Four ids at a time, added one after the other: the sum so far goes through memory a quarter as often. The
    values of the ids that follow, those after hi too, are prefetched meanwhile.
    """
    values, dim = g.values, g.dim
    prefetch_values(g, lo)
    offset, coefficient = locate(g, lo)
    for j in range(dim):
        store_sum(out, to + j, coefficient * load_value(values, offset + j))
    i = lo + 1
    while i + 4 <= hi:
        for k in range(i, i + 4):
            prefetch_values(g, k)
        (a, x), (b, y), (c, z), (d, w) = locate(g, i), locate(g, i + 1), locate(g, i + 2), locate(g, i + 3)
        for j in range(dim):
            total = load_sum(out, to + j) + x * load_value(values, a + j)
            total = total + y * load_value(values, b + j)
            total = total + z * load_value(values, c + j)
            store_sum(out, to + j, total + w * load_value(values, d + j))
        i += 4
    while i < hi:
        prefetch_values(g, i)
        offset, coefficient = locate(g, i)
        for j in range(dim):
            store_sum(out, to + j, load_sum(out, to + j) + coefficient * load_value(values, offset + j))
        i += 1


@jit
def sum_blocks(g: Any, lo: Any, hi: Any) -> None:
    """Sum the blocks lo:hi of the long segments into ``g.block_sums``."""
    which = 0
    for b in range(lo, hi):
        while g.long_first[which + 1] <= b:
            which += 1
        s = g.long[which]
        start = integer(g.starts, s) + (b - g.long_first[which]) * BLOCK
        end = min(start + BLOCK, integer(g.starts, s + 1))
        sum_ids(g, start, end, g.block_sums, b * g.dim)


@jit
def first_long(g: Any, s: Any) -> Any:
    """Index in ``g.long`` of the first long segment that is s or later."""
    lo, hi = np.int64(0), np.int64(len(g.long))
    while lo < hi:
        middle = (lo + hi) // 2
        if g.long[middle] < s:
            lo = middle + 1
        else:
            hi = middle
    return lo


@jit
def sum_segment(g: Any, start: Any, end: Any, which: Any, out: Any, to: Any) -> Any:
    """Put the sum of the segment start:end into ``out``, from ``to`` on.

    ``which`` counts the long segments met, and is returned. The sum of a long segment is that of its blocks'
    sums, in order; those have been made before.
    """
    if end - start <= BLOCK:
        sum_ids(g, start, end, out, to)
        return which
    sums, dim = g.block_sums, g.dim
    offset = g.long_first[which] * dim
    for j in range(dim):  # plain loads of what `store_sum` has written, maybe by this thread and just now
        store_sum(out, to + j, sums[offset + j])
    for b in range(g.long_first[which] + 1, g.long_first[which + 1]):
        for j in range(dim):
            store_sum(out, to + j, load_sum(out, to + j) + sums[b * dim + j])
    return which + 1


@jit
def sum_entry(g: Any, e: Any) -> Any:
    """Return the sum of entry e of `ENTRIES`, made of one number each; in the same order as other sums."""
    start, end = integer(g.starts, e), integer(g.starts, e + 1)
    offset, _ = locate(g, start)
    total = g.values[offset]
    stop = min(start + BLOCK, end)
    for i in range(start + 1, stop):
        offset, _ = locate(g, i)
        total = total + g.values[offset]
    while stop < end:
        start, stop = stop, min(stop + BLOCK, end)
        offset, _ = locate(g, start)
        block = g.values[offset]
        for i in range(start + 1, stop):
            offset, _ = locate(g, i)
            block = block + g.values[offset]
        total = total + block
    return total
