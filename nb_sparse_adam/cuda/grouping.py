"""Duplicate ids -> sorted ids and segments, on a GPU: what `nb_sparse_adam.engine.grouping` does on a CPU.

A stable radix sort of packed ids, six bits a pass at most. A block sorts a tile of them in its shared memory:
each thread counts the digits of its own ids, in columns of its own, so that no order depends on scheduling.

No kernel waits for an answer of the host. Each looks at the words of `layout` itself, and does nothing after
a gradient was refused, or where ids are in order already.
"""

from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint16

from nb_sparse_adam.cuda.device import device_function, kernel
from nb_sparse_adam.cuda.layout import (
    FALLS,
    PER_ID,
    PRESENT,
    REPEATS,
    SCAN_ITEMS,
    SCAN_THREADS,
    SEGMENTS,
    SORT_ITEMS,
    SORT_THREADS,
    TILE,
)

__all__ = [
    "DIGITS",
    "DIGIT_BITS",
    "count_heads",
    "expand_rows",
    "mean_coefficients",
    "pack_bags",
    "pack_positions",
    "radix_count",
    "radix_place",
    "scan",
    "write_starts",
]

DIGIT_BITS = 6
DIGITS = 1 << DIGIT_BITS
COUNTERS = DIGITS * SORT_THREADS
# Two places are left empty after 64: threads that each read 64 of their own would all ask one bank of memory.
PADDED = COUNTERS + 2 * (COUNTERS >> 6) + 2


@device_function
def _in_order(info: Any, whole: Any) -> Any:
    """Whether ids need no grouping at all."""
    return info[REPEATS] == 0 and whole == 0


# --- packing ----------------------------------------------------------------------------------------------


@device_function
def _bag_at(offsets: Any, bags: Any, i: Any) -> Any:
    """The bag of position i: the last one that begins there or before."""
    low, high = int64(0), int64(bags)
    while low + 1 < high:
        middle = (low + high) // 2
        if offsets[middle] <= i:
            low = middle
        else:
            high = middle
    return low


@kernel
def pack_positions(guard: Any, info: Any, ids: Any, row_shift: Any, packed: Any) -> None:
    """Pack each id with its position."""
    if guard[0] != 0 or _in_order(info, 0):
        return
    start = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    for i in range(start, ids.shape[0], int64(cuda.gridDim.x) * cuda.blockDim.x):
        packed[i] = (int64(ids[i]) << row_shift) | i


@kernel
def pack_bags(
    guard: Any, ids: Any, offsets: Any, bags: Any, row_shift: Any, kind: Any, packed: Any, bag_of: Any
) -> None:
    """Pack each id with its bag, or with its position, and list the bags."""
    if guard[0] != 0:
        return
    start = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    for i in range(start, ids.shape[0], int64(cuda.gridDim.x) * cuda.blockDim.x):
        bag = _bag_at(offsets, bags, i)
        if kind == PER_ID:
            bag_of[i] = bag
            packed[i] = (int64(ids[i]) << row_shift) | i
        else:
            packed[i] = (int64(ids[i]) << row_shift) | bag


@kernel
def mean_coefficients(guard: Any, offsets: Any, n: Any, out: Any) -> None:
    """``out[bag]`` ← one divided by the number of its ids."""
    if guard[0] != 0:
        return
    bags = out.shape[0]
    start = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    for bag in range(start, bags, int64(cuda.gridDim.x) * cuda.blockDim.x):
        end = int64(offsets[bag + 1]) if bag + 1 < offsets.shape[0] else int64(n)
        out[bag] = 1
        out[bag] = out[bag] / max(end - int64(offsets[bag]), int64(1))


@kernel
def expand_rows(guard: Any, indptr: Any, columns: Any, dim: Any, keys: Any) -> None:
    """``keys[e]`` ← row * dim + column of entry e of compressed rows."""
    if guard[0] != 0:
        return
    start = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    for e in range(start, columns.shape[0], int64(cuda.gridDim.x) * cuda.blockDim.x):
        keys[e] = _bag_at(indptr, indptr.shape[0] - 1, e) * dim + int64(columns[e])


# --- sorting ----------------------------------------------------------------------------------------------


@kernel
def radix_count(guard: Any, info: Any, whole: Any, packed: Any, shift: Any, counts: Any) -> None:
    """``counts[digit * tiles + tile]`` ← how often a digit occurs in a tile. One block a tile."""
    if guard[0] != 0 or info[FALLS] == 0 or _in_order(info, whole):
        return
    found = cuda.shared.array(DIGITS, int32)
    thread = cuda.threadIdx.x
    n = packed.shape[0]
    tiles = (n + TILE - 1) // TILE
    for tile in range(cuda.blockIdx.x, tiles, cuda.gridDim.x):
        for digit in range(thread, DIGITS, SORT_THREADS):
            found[digit] = 0
        cuda.syncthreads()
        first = int64(tile) * TILE
        for i in range(first + thread, min(first + TILE, n), SORT_THREADS):
            cuda.atomic.add(found, (packed[i] >> shift) & (DIGITS - 1), 1)
        cuda.syncthreads()
        for digit in range(thread, DIGITS, SORT_THREADS):
            counts[digit * tiles + tile] = found[digit]


@kernel
def radix_place(  # noqa: C901 (the steps of one block, between which it waits for all of its threads)
    guard: Any, info: Any, whole: Any, packed: Any, shift: Any, counts: Any, out: Any
) -> None:
    """Move the ids of each tile to their places, which `counts` has been made into by a scan."""
    if guard[0] != 0 or _in_order(info, whole):
        return
    keys = cuda.shared.array(TILE, int64)
    counters = cuda.shared.array(PADDED, uint16)
    sums = cuda.shared.array(SORT_THREADS, int32)
    firsts = cuda.shared.array(DIGITS, int32)
    own = cuda.local.array(SORT_ITEMS, int64)
    thread = cuda.threadIdx.x
    n = packed.shape[0]
    tiles = (n + TILE - 1) // TILE
    for tile in range(cuda.blockIdx.x, tiles, cuda.gridDim.x):
        first = int64(tile) * TILE
        size = min(int64(TILE), n - first)
        if info[FALLS] == 0:  # sorted already, by whoever made the gradient
            for i in range(thread, size, SORT_THREADS):
                out[first + i] = packed[first + i]
            continue
        for i in range(thread, size, SORT_THREADS):
            keys[i] = packed[first + i]
        for at in range(thread, PADDED, SORT_THREADS):
            counters[at] = 0
        cuda.syncthreads()
        # Each thread counts the digits of the ids that it has in a row. Counters are ordered by digit, then
        # by thread, which is the order of places.
        begin = thread * SORT_ITEMS
        for item in range(SORT_ITEMS):
            if begin + item < size:
                own[item] = keys[begin + item]
                at = ((own[item] >> shift) & (DIGITS - 1)) * SORT_THREADS + thread
                counters[at + 2 * (at >> 6)] += 1
        cuda.syncthreads()
        total = int32(0)
        for i in range(DIGITS):
            at = thread * DIGITS + i
            total += int32(counters[at + 2 * (at >> 6)])
        before = _sum_before(sums, thread, total, SORT_THREADS)
        for i in range(DIGITS):
            at = thread * DIGITS + i
            place = at + 2 * (at >> 6)
            here = int32(counters[place])
            counters[place] = before
            if at % SORT_THREADS == 0:
                firsts[at // SORT_THREADS] = before
            before += here
        cuda.syncthreads()
        for item in range(SORT_ITEMS):
            if begin + item < size:
                at = ((own[item] >> shift) & (DIGITS - 1)) * SORT_THREADS + thread
                place = at + 2 * (at >> 6)
                keys[counters[place]] = own[item]
                counters[place] += 1
        cuda.syncthreads()
        for i in range(thread, size, SORT_THREADS):
            key = keys[i]
            digit = (key >> shift) & (DIGITS - 1)
            out[int64(counts[digit * tiles + tile]) + i - firsts[digit]] = key
        cuda.syncthreads()


@device_function
def _sum_before(sums: Any, thread: Any, own: Any, threads: Any) -> Any:
    """Sum of what the threads before this one have; ``sums`` is shared memory, one place a thread."""
    sums[thread] = own
    cuda.syncthreads()
    reach = 1
    while reach < threads:
        other = sums[thread - reach] if thread >= reach else sums[thread] * 0
        cuda.syncthreads()
        sums[thread] += other
        cuda.syncthreads()
        reach *= 2
    return sums[thread] - own


@kernel
def scan(guard: Any, info: Any, whole: Any, n: Any, purpose: Any, counts: Any, starts: Any) -> None:
    """``counts[i]`` ← the sum of those before, by one block.

    ``purpose``: DIGITS for a pass of the sort; SEGMENTS or PRESENT for these, whose number goes to a word of
    that name, and what ends the last one to ``starts``; n is the number of ids.
    """
    if cuda.blockIdx.x != 0 or guard[0] != 0 or (purpose != PRESENT and _in_order(info, whole)):
        return
    if purpose == DIGITS and info[FALLS] == 0:
        return
    length = counts.shape[0]
    sums = cuda.shared.array(SCAN_THREADS, int64)
    carried = cuda.shared.array(1, int64)
    thread = cuda.threadIdx.x
    if thread == 0:
        carried[0] = 0
    cuda.syncthreads()
    for base in range(0, length, SCAN_THREADS * SCAN_ITEMS):
        first = base + thread * SCAN_ITEMS
        own = int64(0)
        for i in range(first, min(first + SCAN_ITEMS, length)):
            own += int64(counts[i])
        before = _sum_before(sums, thread, own, SCAN_THREADS) + carried[0]
        for i in range(first, min(first + SCAN_ITEMS, length)):
            here = int64(counts[i])
            counts[i] = before
            before += here
        cuda.syncthreads()
        if thread == SCAN_THREADS - 1:
            carried[0] = before
        cuda.syncthreads()
    if thread == 0 and purpose != DIGITS:
        info[purpose] = carried[0]
        starts[carried[0]] = _units(info, whole, n, purpose)


# --- segments ---------------------------------------------------------------------------------------------


@device_function
def _units(info: Any, whole: Any, n: Any, purpose: Any) -> Any:
    """How many things are cut: ids into segments, or segments into rows."""
    if purpose == SEGMENTS or _in_order(info, whole):
        return int64(n)
    return info[SEGMENTS]


@device_function
def _label(in_order: Any, ids: Any, packed: Any, segments: Any, shift: Any, dim: Any, i: Any) -> Any:
    """What those that belong together have in common: a row, or, of segments with dim > 0, its table row."""
    if dim == 0:
        return packed[i] >> shift
    if in_order:
        return int64(ids[i]) // dim
    return (packed[segments[i]] >> shift) // dim


@device_function
def _is_head(in_order: Any, ids: Any, packed: Any, segments: Any, shift: Any, dim: Any, i: Any) -> Any:
    if i == 0:
        return int32(1)
    here = _label(in_order, ids, packed, segments, shift, dim, i)
    before = _label(in_order, ids, packed, segments, shift, dim, i - 1)
    return int32(1) if here != before else int32(0)


@kernel
def count_heads(
    guard: Any, info: Any, whole: Any, ids: Any, packed: Any, segments: Any, shift: Any, dim: Any, counts: Any
) -> None:
    """``counts[tile]`` ← how many segments begin in a tile; or, with dim > 0, rows of the table."""
    in_order = _in_order(info, whole)
    if guard[0] != 0 or (dim == 0 and in_order):
        return
    purpose = SEGMENTS if dim == 0 else PRESENT
    found = cuda.shared.array(1, int32)
    thread = cuda.threadIdx.x
    n = _units(info, whole, ids.shape[0], purpose)
    tiles = (ids.shape[0] + TILE - 1) // TILE  # as many as there might be
    for tile in range(cuda.blockIdx.x, tiles, cuda.gridDim.x):
        if thread == 0:
            found[0] = 0
        cuda.syncthreads()
        first = int64(tile) * TILE
        own = int32(0)
        for i in range(first + thread, min(first + TILE, n), SORT_THREADS):
            own += _is_head(in_order, ids, packed, segments, shift, dim, i)
        cuda.atomic.add(found, 0, own)
        cuda.syncthreads()
        if thread == 0:
            counts[tile] = found[0]


@kernel
def write_starts(
    guard: Any,
    info: Any,
    whole: Any,
    ids: Any,
    packed: Any,
    segments: Any,
    shift: Any,
    dim: Any,
    counts: Any,
    starts: Any,
) -> None:
    """Write where they start; `counts` has been made into places by a scan."""
    in_order = _in_order(info, whole)
    if guard[0] != 0 or (dim == 0 and in_order):
        return
    purpose = SEGMENTS if dim == 0 else PRESENT
    sums = cuda.shared.array(SORT_THREADS, int32)
    thread = cuda.threadIdx.x
    n = _units(info, whole, ids.shape[0], purpose)
    tiles = (ids.shape[0] + TILE - 1) // TILE
    for tile in range(cuda.blockIdx.x, tiles, cuda.gridDim.x):
        begin = int64(tile) * TILE + thread * SORT_ITEMS
        own = int32(0)
        for i in range(begin, min(begin + SORT_ITEMS, n)):
            own += _is_head(in_order, ids, packed, segments, shift, dim, i)
        place = int64(counts[tile]) + _sum_before(sums, thread, own, SORT_THREADS)
        for i in range(begin, min(begin + SORT_ITEMS, n)):
            if _is_head(in_order, ids, packed, segments, shift, dim, i) != 0:
                starts[place] = i
                place += 1
        cuda.syncthreads()
