# SPDX-License-Identifier: Apache-2.0
"""Duplicate ids -> sorted ids and segments, on a GPU: what `engine.grouping` does on a CPU.

A stable radix sort of packed ids, six bits a pass at most, of all gradients of a step that need one. A block
sorts a tile of them in its shared memory: each thread counts the digits of its own ids, in columns of its
own, so that no order depends on scheduling. A tile is of one gradient, and digits are counted for each
gradient by itself: gradients stay where they are, one after the other.

No kernel waits for an answer of the host. Each is given the address of a STEP, and does nothing after it was
refused, or where ids are in order already.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import int32, int64, uint16

from nb_sparse_adam._src.cuda.checks import sum_before
from nb_sparse_adam._src.cuda.device import device_function, gpu, kernel
from nb_sparse_adam._src.cuda.opening import (
    bag_of_id,
    find_packed,
    find_tile,
    ids_of,
    integer,
    lists_of,
    longs_at,
    row_of_entry,
    shorts_at,
    sorted_ids,
    steps_at,
)
from nb_sparse_adam._src.cuda.records import (
    DIGIT_BITS,
    DIGITS,
    SCAN_ITEMS,
    SCAN_THREADS,
    SORT_ITEMS,
    SORT_THREADS,
    TILE,
)
from nb_sparse_adam._src.engine.records import CSR, ROWS

COUNTERS = DIGITS * SORT_THREADS
# Two places are left empty after 64: threads that each read 64 of their own would all ask one bank of memory.
PADDED = COUNTERS + 2 * (COUNTERS >> 6) + 2


@kernel
def pack(at: Any) -> None:
    """Pack each id with its position, or its bag; list the bags where ids have weights and so positions.

    The id of an entry is row * dim + column.
    """
    step = steps_at(at, int64(1))[0]
    if step["refused"] != 0:
        return
    tables, gradients, found, spans = lists_of(step)
    packed, length = longs_at(step["packed"], step["capacity"]), step["length"]
    for u in range(gpu.grid(1), spans[length]["first_packed"], gpu.gridsize(1)):
        i = find_packed(spans, 0, length, u)
        gradient, p = gradients[i], u - spans[i]["first_packed"]
        n = gradient["ids_length"]
        number = integer(ids_of(gradient), p)
        payload = p
        if gradient["form"] == CSR:
            number += row_of_entry(gradient, p) * tables[i]["dim"]
        elif gradient["form"] != ROWS:
            bag = bag_of_id(gradient, p)
            if gradient["weights"] != 0:
                shorts_at(found[i]["bag_of"], n)[p] = bag
            else:
                payload = bag
        packed[u] = (number << found[i]["row_shift"]) | payload


# --- sorting ------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Ids that a block takes at a time, all of one gradient."""

    i: Any  # the gradient
    begin: Any  # where the packed ids of the gradient begin
    first: Any  # where those of the tile do
    size: Any
    shift: Any  # of an id in a packed one
    dim: Any  # how many entries a row may have; of a gradient of rows 0


@device_function
def _tile(step: Any, t: Any) -> Any:
    """Return tile t of a step."""
    tables, gradients, found, spans = lists_of(step)
    tile = int64(t)
    i = find_tile(spans, 0, step["length"], tile)
    begin = spans[i]["first_packed"]
    first = begin + (tile - spans[i]["first_tile"]) * TILE
    size = min(int64(TILE), spans[i + 1]["first_packed"] - first)
    dim = max(tables[i]["dim"], int64(1)) if gradients[i]["form"] == CSR else int64(0)
    return Tile(i, begin, first, size, found[i]["row_shift"], dim)


@device_function
def _digit(key: Any, shift: Any) -> Any:
    return (key >> shift) & (DIGITS - 1)


@device_function
def _padded(place: Any) -> Any:
    """Where a counter is, of counters by digit and then by thread: in the order of places."""
    return place + 2 * (place >> 6)


@device_function
def _source(step: Any, number: Any) -> Any:
    """Address of what the pass of a number reads, and, for the one after it, writes."""
    return step["packed"] if number % 2 == 0 else step["spare"]


@device_function
def _column(spans: Any, i: Any, tile: Any, digit: Any) -> Any:
    """Where the count of a digit in a tile is kept: by gradient, then by digit, then by tile."""
    first = spans[i]["first_tile"]
    return first * DIGITS + digit * (spans[i + 1]["first_tile"] - first) + (tile - first)


@kernel
def radix_count(at: Any, number: Any) -> None:
    """Count how often each digit occurs in each tile, in pass of a number. One block a tile."""
    step = steps_at(at, int64(1))[0]
    if step["refused"] != 0 or step["falls"] == 0:
        return
    counted = gpu.shared.array(DIGITS, int32)
    spans = lists_of(step).spans
    packed = longs_at(_source(step, number), step["capacity"])
    counts = shorts_at(step["digits"], step["tiles_capacity"] * DIGITS)
    thread = gpu.threadIdx.x
    for t in range(gpu.blockIdx.x, spans[step["length"]]["first_tile"], gpu.gridDim.x):
        tile = _tile(step, t)
        i, first, size, shift = tile.i, tile.first, tile.size, tile.shift + number * DIGIT_BITS
        for digit in range(thread, DIGITS, SORT_THREADS):
            counted[digit] = 0
        gpu.syncthreads()
        if spans[i]["falls"] == 0:  # sorted already: it stays as it is
            if thread == 0:
                counted[0] = size
        else:
            for p in range(first + thread, first + size, SORT_THREADS):
                gpu.atomic.add(counted, _digit(packed[p], shift), 1)
        gpu.syncthreads()
        for digit in range(thread, DIGITS, SORT_THREADS):
            counts[_column(spans, i, int64(t), digit)] = counted[digit]
        gpu.syncthreads()


@kernel
def radix_place(at: Any, number: Any) -> None:  # noqa: C901 (the steps of one block, between which it waits for all of its threads)
    """Move the ids of each tile to their places, which the counts have been made into by a scan."""
    step = steps_at(at, int64(1))[0]
    if step["refused"] != 0 or step["falls"] == 0:
        return
    keys = gpu.shared.array(TILE, int64)
    counters = gpu.shared.array(PADDED, uint16)
    sums = gpu.shared.array(SORT_THREADS, int32)
    firsts = gpu.shared.array(DIGITS, int32)
    own = gpu.local.array(SORT_ITEMS, int64)
    spans = lists_of(step).spans
    packed = longs_at(_source(step, number), step["capacity"])
    out = longs_at(_source(step, number + 1), step["capacity"])
    counts = shorts_at(step["digits"], step["tiles_capacity"] * DIGITS)
    thread = gpu.threadIdx.x
    for t in range(gpu.blockIdx.x, spans[step["length"]]["first_tile"], gpu.gridDim.x):
        tile = _tile(step, t)
        i, first, size, shift = tile.i, tile.first, tile.size, tile.shift + number * DIGIT_BITS
        if spans[i]["falls"] == 0:
            for p in range(first + thread, first + size, SORT_THREADS):
                out[p] = packed[p]
            continue
        for p in range(thread, size, SORT_THREADS):
            keys[p] = packed[first + p]
        for place in range(thread, PADDED, SORT_THREADS):
            counters[place] = 0
        gpu.syncthreads()
        # Each thread counts the digits of the ids that it has in a row.
        begin = thread * SORT_ITEMS
        for item in range(SORT_ITEMS):
            if begin + item < size:
                own[item] = keys[begin + item]
                counters[_padded(_digit(own[item], shift) * SORT_THREADS + thread)] += 1
        gpu.syncthreads()
        total = int32(0)
        for digit in range(DIGITS):
            total += int32(counters[_padded(thread * DIGITS + digit)])
        before = sum_before(sums, thread, total, SORT_THREADS)
        for digit in range(DIGITS):
            place = thread * DIGITS + digit
            padded = _padded(place)
            here = int32(counters[padded])
            counters[padded] = before
            if place % SORT_THREADS == 0:
                firsts[place // SORT_THREADS] = before
            before += here
        gpu.syncthreads()
        for item in range(SORT_ITEMS):
            if begin + item < size:
                padded = _padded(_digit(own[item], shift) * SORT_THREADS + thread)
                keys[counters[padded]] = own[item]
                counters[padded] += 1
        gpu.syncthreads()
        for p in range(thread, size, SORT_THREADS):
            digit = _digit(keys[p], shift)
            out[int64(counts[_column(spans, i, int64(t), digit)]) + p - firsts[digit]] = keys[p]
        gpu.syncthreads()


@device_function
def _scan(counts: Any, length: Any) -> Any:
    """``counts[i]`` ← the sum of those before, by one block; returns that of all."""
    sums = gpu.shared.array(SCAN_THREADS, int64)
    carried = gpu.shared.array(1, int64)
    thread = gpu.threadIdx.x
    if thread == 0:
        carried[0] = 0
    gpu.syncthreads()
    for base in range(0, length, SCAN_THREADS * SCAN_ITEMS):
        first = base + thread * SCAN_ITEMS
        own = int64(0)
        for i in range(first, min(first + SCAN_ITEMS, length)):
            own += int64(counts[i])
        before = sum_before(sums, thread, own, SCAN_THREADS) + carried[0]
        for i in range(first, min(first + SCAN_ITEMS, length)):
            here = int64(counts[i])
            counts[i] = before
            before += here
        gpu.syncthreads()
        if thread == SCAN_THREADS - 1:
            carried[0] = before
        gpu.syncthreads()
    return carried[0]


@kernel
def scan_digits(at: Any) -> None:
    """Make counts of digits into places. One block."""
    step = steps_at(at, int64(1))[0]
    if gpu.blockIdx.x != 0 or step["refused"] != 0 or step["falls"] == 0:
        return
    length = lists_of(step).spans[step["length"]]["first_tile"] * DIGITS
    _scan(shorts_at(step["digits"], step["tiles_capacity"] * DIGITS), length)


# --- segments -----------------------------------------------------------------------------------------------


@device_function
def _is_head(packed: Any, tile: Any, dim: Any, p: Any) -> Any:
    """Whether a row of so many ids begins at place p: a segment, of 1; of 0, none does."""
    if dim == 0:
        return int32(0)
    if p == tile.begin or (packed[p] >> tile.shift) // dim != (packed[p - 1] >> tile.shift) // dim:
        return int32(1)
    return int32(0)


@kernel
def count_heads(at: Any) -> None:
    """Count how many segments, and how many rows of entries, begin in each tile. One block a tile."""
    step = steps_at(at, int64(1))[0]
    if step["refused"] != 0:
        return
    counted = gpu.shared.array(2, int32)
    tiles = lists_of(step).spans[step["length"]]["first_tile"]
    packed, thread = longs_at(sorted_ids(step), step["capacity"]), gpu.threadIdx.x
    heads = shorts_at(step["heads"], step["tiles_capacity"] + 1)
    row_heads = shorts_at(step["row_heads"], step["tiles_capacity"] + 1)
    for t in range(gpu.blockIdx.x, tiles, gpu.gridDim.x):
        tile = _tile(step, t)
        end = tile.first + tile.size
        if thread == 0:
            counted[0] = counted[1] = 0
        gpu.syncthreads()
        own, own_rows = int32(0), int32(0)
        for p in range(tile.first + thread, end, SORT_THREADS):
            own += _is_head(packed, tile, 1, p)
            own_rows += _is_head(packed, tile, tile.dim, p)
        gpu.atomic.add(counted, 0, own)
        gpu.atomic.add(counted, 1, own_rows)
        gpu.syncthreads()
        if thread == 0:
            heads[t], row_heads[t] = counted[0], counted[1]


@kernel
def scan_heads(at: Any) -> None:
    """Make these counts into numbers of segments, by one block, and of rows of entries, by another."""
    step = steps_at(at, int64(1))[0]
    if gpu.blockIdx.x > 1 or step["refused"] != 0:
        return
    end = lists_of(step).spans[step["length"]]
    address = step["heads"] if gpu.blockIdx.x == 0 else step["row_heads"]
    counts = shorts_at(address, step["tiles_capacity"] + 1)
    total = _scan(counts, end["first_tile"])
    if gpu.threadIdx.x == 0:
        counts[end["first_tile"]] = total
        if gpu.blockIdx.x == 0:
            shorts_at(step["starts"], step["capacity"] + 1)[total] = end["first_packed"]


@kernel
def write_starts(at: Any) -> None:
    """Write where segments and rows of entries start. One block a tile."""
    step = steps_at(at, int64(1))[0]
    if step["refused"] != 0:
        return
    sums = gpu.shared.array(SORT_THREADS, int32)
    tiles = lists_of(step).spans[step["length"]]["first_tile"]
    packed, thread = longs_at(sorted_ids(step), step["capacity"]), gpu.threadIdx.x
    heads = shorts_at(step["heads"], step["tiles_capacity"] + 1)
    row_heads = shorts_at(step["row_heads"], step["tiles_capacity"] + 1)
    starts = shorts_at(step["starts"], step["capacity"] + 1)
    row_starts = shorts_at(step["row_starts"], step["entries"] + 1)
    if gpu.blockIdx.x == 0 and thread == 0:
        row_starts[row_heads[tiles]] = heads[tiles]
    for t in range(gpu.blockIdx.x, tiles, gpu.gridDim.x):
        tile = _tile(step, t)
        end = tile.first + tile.size
        low = tile.first + thread * SORT_ITEMS
        high = min(low + SORT_ITEMS, end)
        own, own_rows = int32(0), int32(0)
        for p in range(low, high):
            own += _is_head(packed, tile, 1, p)
            own_rows += _is_head(packed, tile, tile.dim, p)
        segment = int64(heads[t]) + sum_before(sums, thread, own, SORT_THREADS)
        gpu.syncthreads()
        row = int64(row_heads[t]) + sum_before(sums, thread, own_rows, SORT_THREADS)
        for p in range(low, high):
            if _is_head(packed, tile, 1, p) != 0:
                starts[segment] = p
                if _is_head(packed, tile, tile.dim, p) != 0:
                    row_starts[row] = segment
                    row += 1
                segment += 1
        gpu.syncthreads()
