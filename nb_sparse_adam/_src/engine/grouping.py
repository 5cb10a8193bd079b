# SPDX-License-Identifier: Apache-2.0
"""Duplicate ids -> sorted ids, each with the place of its values, cut into segments of one row each.

Every id is packed into one int64 with its payload, ``id << row_shift | payload``, and the packed ids are
sorted by a radix sort of the id's bits. The sort is stable, so that ids of one row stay in the order of the
gradient, whatever the number of threads; two buffers of 8 bytes an id are all the memory that it takes.

Ids and offsets may be the user's own arrays, which another thread can change after they were checked. So
what packs them reads each number once, compares it, and says if one cannot be; from then on only what was
packed counts.

``first`` and ``last`` are positions: each function does the part first:last of its work.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.integers import integer
from nb_sparse_adam._src.engine.scratch import BLOCK, DIGIT_BITS

# --- pack -------------------------------------------------------------------------------------------------


@jit(inlined=False)
def pack_positions(ids: Any, first: Any, last: Any, limit: Any, row_shift: Any, packed: Any) -> bool:
    """Pack each id with its position; return whether all are in 0..limit - 1."""
    largest = np.uint64(0)  # a negative number is a large one
    for i in range(np.uint64(first), np.uint64(last)):
        row = integer(ids, i)
        largest = max(largest, np.uint64(row))
        packed[i] = (row << row_shift) | np.int64(i)
    return bool(last <= first or largest < np.uint64(limit))


@jit(inlined=False)
def first_bag(offsets: Any, bags: Any, position: Any) -> Any:
    """The bag that a position is in, by its first offset; any bag if offsets are wrong."""
    lo, hi = np.int64(1), bags
    while lo < hi:
        middle = (lo + hi) // 2
        if integer(offsets, middle) <= position:
            lo = middle + 1
        else:
            hi = middle
    return lo - 1


@jit(inlined=False)
def pack_bags(
    ids: Any, first: Any, last: Any, limit: Any, row_shift: Any, packed: Any, offsets: Any,
    offsets_length: Any, bags: Any, n: Any, scales: Any,
) -> Any:  # fmt: skip
    """Pack each id with its bag, or, of other scales, the key that they make together with the position.

    Parameters
    ----------
    ids : `Integers`, (n,)
    limit : int64
        What ids are less than.
    packed : (n,) int64
    offsets : `Integers`
        Where bags begin, and perhaps the end of the last.
    offsets_length, bags, n : int64
    scales : pair of int64
        (0, 0): the payload is the bag. Else the key is id * scales[0] + bag * scales[1], the payload the
        position.

    Returns
    -------
    in_range, in_bags : bool
        Whether all ids are in 0..limit - 1, and all in a bag.
    """
    largest = np.uint64(0)
    id_scale, bag_scale = scales
    bag = first_bag(offsets, bags, first)
    start = first
    while start < last:
        if bag >= bags:
            return bool(largest < np.uint64(limit)), False
        end = integer(offsets, bag + 1) if bag + 1 < offsets_length else n
        if end < start:
            return bool(largest < np.uint64(limit)), False
        end = min(end, last)
        if id_scale == 0:
            for i in range(np.uint64(start), np.uint64(end)):
                row = integer(ids, i)
                largest = max(largest, np.uint64(row))
                packed[i] = (row << row_shift) | bag
        else:
            for i in range(np.uint64(start), np.uint64(end)):
                row = integer(ids, i)
                largest = max(largest, np.uint64(row))
                row = row if np.uint64(row) < np.uint64(limit) else np.int64(0)
                packed[i] = ((row * id_scale + bag * bag_scale) << row_shift) | np.int64(i)
        start = end
        bag += 1
    return bool(last <= first or largest < np.uint64(limit)), True


@jit(inlined=False)
def write_bags(
    offsets: Any, offsets_length: Any, bags: Any, first: Any, last: Any, n: Any, bag_of: Any
) -> None:
    """Write the bag of each of the positions first:last.

    Offsets have been found right. Should they have been changed since, it is some bag: this is memory of the
    user.
    """
    bag = first_bag(offsets, bags, first)
    i = first
    while i < last:
        end = integer(offsets, bag + 1) if bag + 1 < min(bags, offsets_length) else n
        while i < min(end, last):
            bag_of[np.uint64(i)] = bag
            i += 1
        bag += 1


@jit(inlined=False)
def pack_pairs(
    ids: Any, columns: Any, first: Any, last: Any, rows: Any, dim: Any, row_shift: Any, packed: Any
) -> Any:
    """Pack the key of each entry, id * dim + column, with its position.

    ``ids`` and ``columns`` are `Integers`. Returns whether all ids and all columns are in range.
    """
    rows_fit = columns_fit = True
    for i in range(first, last):
        row, column = integer(ids, i), integer(columns, i)
        if np.uint64(row) >= np.uint64(rows):
            rows_fit, row = False, np.int64(0)
        if np.uint64(column) >= np.uint64(dim):
            columns_fit, column = False, np.int64(0)
        packed[np.uint64(i)] = ((row * dim + column) << row_shift) | np.int64(i)
    return rows_fit, columns_fit


@jit(inlined=False)
def pack_listed_rows(
    columns: Any, rows: Any, starts: Any, first: Any, last: Any, dim: Any, row_shift: Any, packed: Any
) -> bool:
    """Pack the key of each entry of the listed rows first:last; return whether all columns are in range.

    ``columns`` is `Integers`, ``rows`` and ``starts`` are lists.
    """
    fit = True
    for s in range(first, last):
        row = np.int64(rows[np.uint64(s)])
        for i in range(np.int64(starts[np.uint64(s)]), np.int64(starts[np.uint64(s + 1)])):
            column = integer(columns, i)
            if np.uint64(column) >= np.uint64(dim):
                fit, column = False, np.int64(0)
            packed[np.uint64(i)] = ((row * dim + column) << row_shift) | i
    return fit


# --- sort -------------------------------------------------------------------------------------------------


@jit(inlined=False)
def bit_length(number: Any) -> Any:
    """How many bits a number takes."""
    bits = np.int64(0)
    while number > 0:
        number >>= 1
        bits += 1
    return bits


@jit(inlined=False)
def digits_of(id_bits: Any, n: Any, parts: Any) -> Any:
    """Into how many digits ids are cut that n of are sorted by, and of how many bits each is."""
    fewest = max((id_bits + DIGIT_BITS - 1) // DIGIT_BITS, 1)
    best, best_cost = fewest, np.int64(-1)
    for passes in range(fewest, fewest + 4):
        # An id is counted and moved in the time of about three counters, which are zeroed and added up.
        cost = passes * (3 * n + (parts << ((id_bits + passes - 1) // passes)))
        if best_cost < 0 or cost < best_cost:
            best, best_cost = passes, cost
    return best, max((id_bits + best - 1) // best, 1)


@jit(inlined=False)
def sort_few(packed: Any, n: Any) -> None:
    """Sort packed ids by insertion; payloads are in it, and never decrease, so it is a stable sort of ids."""
    for i in range(1, n):
        key = packed[np.uint64(i)]
        place = i
        while place > 0 and packed[np.uint64(place - 1)] > key:
            packed[np.uint64(place)] = packed[np.uint64(place - 1)]
            place -= 1
        packed[np.uint64(place)] = key


@jit(inlined=False)
def count_digits(packed: Any, first: Any, last: Any, shift: Any, counts: Any) -> Any:
    """``counts[digit]`` ← how often each digit occurs; return how many keys are less than the one before.

    ``counts`` is a (1 << bits,) list, a digit so many bits from ``shift`` on.
    """
    for digit in range(len(counts)):
        counts[np.uint64(digit)] = 0
    falls = np.int64(0)
    if last <= first:
        return falls
    mask, one = np.uint64(len(counts) - 1), counts.dtype.type(1)
    before = packed[np.uint64(first)]
    for i in range(np.uint64(first), np.uint64(last)):
        key = packed[i]
        place = np.uint64(key >> shift) & mask
        counts[place] += one
        falls += key < before
        before = key
    return falls


@jit(inlined=False)
def turn_counts_into_places(counts: Any, parts: Any, digits: Any) -> None:
    """``counts[part * digits + digit]`` ← where the first id of that part with that digit goes."""
    total = counts.dtype.type(0)
    for digit in range(digits):
        for part in range(parts):
            place = np.uint64(part * digits + digit)
            count = counts[place]
            counts[place] = total
            total += count


@jit(inlined=False)
def move_by_digit(packed: Any, out: Any, first: Any, last: Any, shift: Any, places: Any) -> None:
    """Move packed ids to their places, by their digits; see `count_digits`."""
    mask, one = np.uint64(len(places) - 1), places.dtype.type(1)
    for i in range(np.uint64(first), np.uint64(last)):
        key = packed[i]
        digit = np.uint64(key >> shift) & mask
        place = places[digit]
        out[np.uint64(place)] = key
        places[digit] = place + one


# --- segments ---------------------------------------------------------------------------------------------


@jit(inlined=False)
def count_heads(packed: Any, first: Any, last: Any, row_shift: Any) -> Any:
    """How many of the sorted ids are the first of theirs."""
    heads = np.int64(0)
    if last <= first:
        return heads
    if first == 0:
        heads, first = np.int64(1), np.int64(1)
    one = np.uint64(1)
    for i in range(np.uint64(first), np.uint64(last)):
        heads += (packed[i] >> row_shift) != (packed[np.uint64(i) - one] >> row_shift)
    return heads


@jit(inlined=False)
def write_starts(packed: Any, first: Any, last: Any, row_shift: Any, starts: Any, s: Any) -> Any:
    """Write where each segment starts, from ``starts[s]`` on; return the place after the last one.

    Nothing is written beyond that place, which may belong to another thread.
    """
    while last > first and last > 1 and (
        (packed[np.uint64(last - 1)] >> row_shift) == (packed[np.uint64(last - 2)] >> row_shift)
    ):  # fmt: skip
        last -= 1  # not the first of its segment
    place = np.uint64(s)
    before = packed[np.uint64(first - 1)] >> row_shift if first > 0 else np.int64(-1)
    for i in range(np.uint64(first), np.uint64(last)):
        row = packed[i] >> row_shift
        # Written always and kept where a row begins: no branch to mispredict.
        starts[place] = i
        place += np.uint64(row != before)
        before = row
    return np.int64(place)


@jit(inlined=False)
def count_row_heads(packed: Any, first: Any, last: Any, row_shift: Any, dim: Any) -> Any:
    """How many of the sorted entries, row * dim + column each, are the first of their row."""
    heads = np.int64(0)
    limit = np.int64(0)  # the first key of another row
    if first > 0 and last > first:
        limit = ((packed[np.uint64(first - 1)] >> row_shift) // dim + 1) * dim
    for i in range(first, last):
        key = packed[np.uint64(i)] >> row_shift
        if key >= limit:
            heads += 1
            limit = (key // dim + 1) * dim
    return heads


@jit(inlined=False)
def write_row_starts(
    packed: Any, first: Any, last: Any, row_shift: Any, dim: Any, starts: Any, row_starts: Any, s: Any, r: Any
) -> None:
    """Write where each segment, and where each row of segments, starts.

    ``starts`` is written from s on, ``row_starts`` from r on.
    """
    before, limit = np.int64(-1), np.int64(0)
    if first > 0 and last > first:
        before = packed[np.uint64(first - 1)] >> row_shift
        limit = (before // dim + 1) * dim
    for i in range(first, last):
        key = packed[np.uint64(i)] >> row_shift
        if key == before:
            continue
        if key >= limit:
            row_starts[np.uint64(r)] = s
            r += 1
            limit = (key // dim + 1) * dim
        starts[np.uint64(s)] = i
        s += 1
        before = key


@jit(inlined=False)
def list_long(starts: Any, first: Any, last: Any, long: Any) -> Any:
    """List the segments first:last that are longer than a block.

    Returns the length of the longest, and how many were listed.
    """
    longest = starts.dtype.type(0)  # of a type that lets the loop be vectorized
    one = np.uint64(1)
    for s in range(np.uint64(first), np.uint64(last)):
        longest = max(longest, starts.dtype.type(starts[np.uint64(s) + one] - starts[s]))
    listed = np.int64(0)
    if longest > BLOCK:
        for s in range(np.uint64(first), np.uint64(last)):
            if starts[np.uint64(s) + one] - starts[s] > BLOCK:
                long[np.uint64(listed)] = s
                listed += 1
    return np.int64(longest), listed


# --- cut --------------------------------------------------------------------------------------------------


@jit(inlined=False)
def cost_before(starts: Any, s: Any, at: Any, row_cost: Any, long: Any, saved: Any) -> Any:
    """What the segments at:s cost: their ids, ``row_cost`` each, and, where they are long, only their blocks.

    Parameters
    ----------
    starts : list
    long : (any,) int64
        The segments that are longer than a block, and have been summed by blocks already.
    saved : (any + 1,) int64
        How many more ids than blocks the long ones before have.
    """
    lo, hi = np.int64(0), np.int64(len(long))
    while lo < hi:
        middle = (lo + hi) // 2
        if long[middle] < s:
            lo = middle + 1
        else:
            hi = middle
    cost = np.int64(starts[np.uint64(s)]) - np.int64(starts[np.uint64(at)]) + row_cost * (s - at)
    return cost - saved[lo] if len(long) > 0 else cost


@jit(inlined=False)
def cut(
    starts: Any,
    at: Any,
    units: Any,
    row_cost: Any,
    long: Any,
    saved: Any,
    tasks: Any,
    first_task: Any,
    count: Any,
) -> None:
    """Cut the segments at:at + units into ``count`` tasks of about equal cost; see `cost_before`."""
    total = cost_before(starts, at + units, at, row_cost, long, saved)
    begin = at
    for k in range(1, count + 1):
        low, high = begin, at + units
        if k == count:
            low = high
        while low < high:
            middle = (low + high) // 2
            if cost_before(starts, middle, at, row_cost, long, saved) * count < k * total:
                low = middle + 1
            else:
                high = middle
        task = tasks[first_task + k - 1]
        task["first"], task["last"] = begin, low
        begin = low
