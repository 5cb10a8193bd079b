"""Duplicate ids -> sorted ids and segments, on a GPU: what `nb_sparse_adam.engine.grouping` does on a CPU.

A stable radix sort of packed ids, six bits a pass at most, of all gradients of a step that need one. A block
sorts a tile of them in its shared memory: each thread counts the digits of its own ids, in columns of its
own, so that no order depends on scheduling. A tile is of one gradient, and digits are counted for each
gradient by itself: gradients stay where they are, one after the other.

No kernel waits for an answer of the host. Each is given the address of a STEP, and does nothing after it was
refused, or where ids are in order already.
"""

from __future__ import annotations

from typing import Any

from numba import int32, int64, uint16

from nb_sparse_adam.cuda.checks import sum_before
from nb_sparse_adam.cuda.device import device_function, gpu, kernel
from nb_sparse_adam.cuda.opening import (
    find_packed,
    find_tile,
    ids_of,
    integer,
    last_not_above,
    lists_of,
    longs_at,
    offsets_of,
    row_of_entry,
    shorts_at,
    sorted_ids,
    steps_at,
)
from nb_sparse_adam.cuda.records import (
    DIGIT_BITS,
    DIGITS,
    SCAN_ITEMS,
    SCAN_THREADS,
    SORT_ITEMS,
    SORT_THREADS,
    TILE,
)
from nb_sparse_adam.engine.records import CSR, ROWS

__all__ = ["count_heads", "pack", "radix_count", "radix_place", "scan_digits", "scan_heads", "write_starts"]

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
    start = int64(gpu.blockIdx.x) * gpu.blockDim.x + gpu.threadIdx.x
    for u in range(start, spans[length]["first_packed"], int64(gpu.gridDim.x) * gpu.blockDim.x):
        i = find_packed(spans, 0, length, u)
        gradient, p = gradients[i], u - spans[i]["first_packed"]
        n = gradient["ids_length"]
        number = integer(ids_of(gradient), p)
        payload = p
        if gradient["form"] == CSR:
            number += row_of_entry(gradient, p) * tables[i]["dim"]
        elif gradient["form"] != ROWS:
            bag = last_not_above(offsets_of(gradient), gradient["values_rows"], p)
            if gradient["weights"] != 0:
                shorts_at(found[i]["bag_of"], n)[p] = bag
            else:
                payload = bag
        packed[u] = (number << found[i]["row_shift"]) | payload


# --- sorting ------------------------------------------------------------------------------------------------


@device_function
def _digit(key: Any, shift: Any) -> Any:
    return (key >> shift) & (DIGITS - 1)


@device_function
def _source(step: Any, number: Any) -> Any:
    """Address of what the pass of a number reads, and, for the one after it, writes."""
    return step["packed"] if number % 2 == 0 else step["spare"]


@device_function
def _column(spans: Any, i: Any, tile: Any, digit: Any) -> Any:
    """Where the count of a digit in a tile is kept: by gradient, then by digit, then by tile."""
    first = spans[i]["first_tile"]
    return first * DIGITS + digit * (spans[i + 1]["first_tile"] - first) + (tile - first)


@device_function
def _tile_of(spans: Any, i: Any, tile: Any) -> Any:
    """Where the ids of a tile begin, and how many they are."""
    first = spans[i]["first_packed"] + (tile - spans[i]["first_tile"]) * TILE
    return first, min(int64(TILE), spans[i + 1]["first_packed"] - first)


@kernel
def radix_count(at: Any, number: Any) -> None:
    """Count how often each digit occurs in each tile, in pass of a number. One block a tile."""
    step = steps_at(at, int64(1))[0]
    if step["refused"] != 0 or step["falls"] == 0:
        return
    counted = gpu.shared.array(DIGITS, int32)
    _, _, found, spans = lists_of(step)
    length = step["length"]
    packed = longs_at(_source(step, number), step["capacity"])
    counts = shorts_at(step["digits"], step["tiles_capacity"] * DIGITS)
    thread = gpu.threadIdx.x
    for t in range(gpu.blockIdx.x, spans[length]["first_tile"], gpu.gridDim.x):
        tile = int64(t)
        i = find_tile(spans, 0, length, tile)
        first, size = _tile_of(spans, i, tile)
        shift = found[i]["row_shift"] + number * DIGIT_BITS
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
            counts[_column(spans, i, tile, digit)] = counted[digit]
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
    _, _, found, spans = lists_of(step)
    length = step["length"]
    packed, out = (
        longs_at(_source(step, number), step["capacity"]),
        longs_at(_source(step, number + 1), step["capacity"]),
    )
    counts = shorts_at(step["digits"], step["tiles_capacity"] * DIGITS)
    thread = gpu.threadIdx.x
    for t in range(gpu.blockIdx.x, spans[length]["first_tile"], gpu.gridDim.x):
        tile = int64(t)
        i = find_tile(spans, 0, length, tile)
        first, size = _tile_of(spans, i, tile)
        if spans[i]["falls"] == 0:
            for p in range(first + thread, first + size, SORT_THREADS):
                out[p] = packed[p]
            continue
        shift = found[i]["row_shift"] + number * DIGIT_BITS
        for p in range(thread, size, SORT_THREADS):
            keys[p] = packed[first + p]
        for place in range(thread, PADDED, SORT_THREADS):
            counters[place] = 0
        gpu.syncthreads()
        # Each thread counts the digits of the ids that it has in a row. Counters are ordered by digit, then
        # by thread, which is the order of places.
        begin = thread * SORT_ITEMS
        for item in range(SORT_ITEMS):
            if begin + item < size:
                own[item] = keys[begin + item]
                place = _digit(own[item], shift) * SORT_THREADS + thread
                counters[place + 2 * (place >> 6)] += 1
        gpu.syncthreads()
        total = int32(0)
        for digit in range(DIGITS):
            place = thread * DIGITS + digit
            total += int32(counters[place + 2 * (place >> 6)])
        before = sum_before(sums, thread, total, SORT_THREADS)
        for digit in range(DIGITS):
            place = thread * DIGITS + digit
            padded = place + 2 * (place >> 6)
            here = int32(counters[padded])
            counters[padded] = before
            if place % SORT_THREADS == 0:
                firsts[place // SORT_THREADS] = before
            before += here
        gpu.syncthreads()
        for item in range(SORT_ITEMS):
            if begin + item < size:
                place = _digit(own[item], shift) * SORT_THREADS + thread
                padded = place + 2 * (place >> 6)
                keys[counters[padded]] = own[item]
                counters[padded] += 1
        gpu.syncthreads()
        for p in range(thread, size, SORT_THREADS):
            digit = _digit(keys[p], shift)
            out[int64(counts[_column(spans, i, tile, digit)]) + p - firsts[digit]] = keys[p]
        gpu.syncthreads()


@device_function
def _scan(counts: Any, length: Any, sums: Any, carried: Any) -> Any:
    """``counts[i]`` ← the sum of those before, by one block; returns that of all.

    ``sums`` and ``carried`` are shared memory, (SCAN_THREADS,) and (1,) int64.
    """
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
    sums = gpu.shared.array(SCAN_THREADS, int64)
    carried = gpu.shared.array(1, int64)
    length = lists_of(step).spans[step["length"]]["first_tile"] * DIGITS
    _scan(shorts_at(step["digits"], step["tiles_capacity"] * DIGITS), length, sums, carried)


# --- segments -----------------------------------------------------------------------------------------------


@device_function
def _is_head(packed: Any, first: Any, shift: Any, p: Any) -> Any:
    """Whether a segment begins at place p, of a gradient whose ids begin at ``first``."""
    return int32(1) if p == first or packed[p] >> shift != packed[p - 1] >> shift else int32(0)


@device_function
def _is_row_head(packed: Any, first: Any, shift: Any, dim: Any, p: Any) -> Any:
    """Whether a row of entries does; where there are none, ``dim`` is 0."""
    if dim == 0:
        return int32(0)
    if p == first or (packed[p] >> shift) // dim != (packed[p - 1] >> shift) // dim:
        return int32(1)
    return int32(0)


@device_function
def _dim_of_entries(gradient: Any, table: Any) -> Any:
    return max(table["dim"], int64(1)) if gradient["form"] == CSR else int64(0)


@kernel
def count_heads(at: Any) -> None:
    """Count how many segments, and how many rows of entries, begin in each tile. One block a tile."""
    step = steps_at(at, int64(1))[0]
    if step["refused"] != 0:
        return
    counted = gpu.shared.array(2, int32)
    tables, gradients, found, spans = lists_of(step)
    packed, length, thread = longs_at(sorted_ids(step), step["capacity"]), step["length"], gpu.threadIdx.x
    heads = shorts_at(step["heads"], step["tiles_capacity"] + 1)
    row_heads = shorts_at(step["row_heads"], step["tiles_capacity"] + 1)
    for t in range(gpu.blockIdx.x, spans[length]["first_tile"], gpu.gridDim.x):
        tile = int64(t)
        i = find_tile(spans, 0, length, tile)
        first, size = _tile_of(spans, i, tile)
        begin, shift, dim = (
            spans[i]["first_packed"],
            found[i]["row_shift"],
            _dim_of_entries(gradients[i], tables[i]),
        )
        if thread == 0:
            counted[0] = counted[1] = 0
        gpu.syncthreads()
        own, own_rows = int32(0), int32(0)
        for p in range(first + thread, first + size, SORT_THREADS):
            own += _is_head(packed, begin, shift, p)
            own_rows += _is_row_head(packed, begin, shift, dim, p)
        gpu.atomic.add(counted, 0, own)
        gpu.atomic.add(counted, 1, own_rows)
        gpu.syncthreads()
        if thread == 0:
            heads[tile], row_heads[tile] = counted[0], counted[1]


@kernel
def scan_heads(at: Any) -> None:
    """Make these counts into numbers of segments, by one block, and of rows of entries, by another."""
    step = steps_at(at, int64(1))[0]
    if gpu.blockIdx.x > 1 or step["refused"] != 0:
        return
    sums = gpu.shared.array(SCAN_THREADS, int64)
    carried = gpu.shared.array(1, int64)
    end = lists_of(step).spans[step["length"]]
    address = step["heads"] if gpu.blockIdx.x == 0 else step["row_heads"]
    counts = shorts_at(address, step["tiles_capacity"] + 1)
    total = _scan(counts, end["first_tile"], sums, carried)
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
    tables, gradients, found, spans = lists_of(step)
    packed, length, thread = longs_at(sorted_ids(step), step["capacity"]), step["length"], gpu.threadIdx.x
    heads = shorts_at(step["heads"], step["tiles_capacity"] + 1)
    row_heads = shorts_at(step["row_heads"], step["tiles_capacity"] + 1)
    starts = shorts_at(step["starts"], step["capacity"] + 1)
    row_starts = shorts_at(step["row_starts"], step["entries"] + 1)
    tiles = spans[length]["first_tile"]
    if gpu.blockIdx.x == 0 and thread == 0:
        row_starts[row_heads[tiles]] = heads[tiles]
    for t in range(gpu.blockIdx.x, tiles, gpu.gridDim.x):
        tile = int64(t)
        i = find_tile(spans, 0, length, tile)
        first, size = _tile_of(spans, i, tile)
        begin, shift, dim = (
            spans[i]["first_packed"],
            found[i]["row_shift"],
            _dim_of_entries(gradients[i], tables[i]),
        )
        low = first + thread * SORT_ITEMS
        high = min(low + SORT_ITEMS, first + size)
        own, own_rows = int32(0), int32(0)
        for p in range(low, high):
            own += _is_head(packed, begin, shift, p)
            own_rows += _is_row_head(packed, begin, shift, dim, p)
        segment = int64(heads[tile]) + sum_before(sums, thread, own, SORT_THREADS)
        gpu.syncthreads()
        row = int64(row_heads[tile]) + sum_before(sums, thread, own_rows, SORT_THREADS)
        for p in range(low, high):
            if _is_head(packed, begin, shift, p) != 0:
                starts[segment] = p
                if _is_row_head(packed, begin, shift, dim, p) != 0:
                    row_starts[row] = segment
                    row += 1
                segment += 1
        gpu.syncthreads()
