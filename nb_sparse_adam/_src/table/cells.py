# SPDX-License-Identifier: Apache-2.0
"""The cells of an index: ids of 64 bits, and at which row each is.

A *bucket* is a cache line: five ids, five rows, and a *tally*: how many of the cells are taken, which are
the first ones, and how many ids had to go past because all were. An id whose bucket is full goes to another
one; a look-up ends at the first bucket that nothing went past. To take an id out is to count back the buckets
that it went past: nothing has to be marked, and no cell is lost.

A *segment* is 1024 buckets, and an id never leaves the segment that its hash says. The first bits of the hash
say which of 16 *units* an id belongs to: threads own units. The next 32 bits say in which of the unit's
segments it is, as a fraction of their number, so that ids lie in the order of those bits. So the number can
grow where the cells are: from the last segment of a unit downwards, each is emptied into the segments that
its ids belong to now, which are that one or later ones, and those have been emptied before. A look-up
compares with the segment that is next, and finds each id where it is at this moment. All units have as many
segments as each other: the first ones lie side by side, then the second ones.

Ids are mixed by two multiplications whose factors are drawn when the index is made: whoever does not know
them cannot make ids that meet. Where a row is does not depend on them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import (
    address,
    array_at,
    equal_in_line,
    first_bit,
    prefetch_line,
    select,
)
from nb_sparse_adam._src.engine.records import record

INDEX = record(
    "cells", "cells_length",  # address; of int64
    "segments", "following",  # of a unit: how many it has, and will have; the same unless it grows
    "left", "left_before",  # the segments of a unit that have not been emptied yet; before it grew last
    "ids",  # how many are there
    "most",  # how many there may be: there is memory for their cells
    "salt", "first_factor", "second_factor",
)  # fmt: skip

CELLS = 5  # of a bucket
BUCKETS = 1024  # of a segment
UNITS = 16
WORDS = 8  # int64 of a bucket: ids, then, of half the size, rows + 1 and the tally
ROWS_AT, TALLY_AT = 10, 15  # in halves of words
PASSED = 8  # of a tally: what an id that went past adds; the rest is the number of cells that are taken
SEGMENT_WORDS = WORDS * BUCKETS
SEGMENT_CELLS = CELLS * BUCKETS
LAYER_WORDS, LAYER_CELLS = UNITS * SEGMENT_WORDS, UNITS * SEGMENT_CELLS  # of one segment of each unit
AHEAD = 16  # ids between the one that is looked up and the one whose bucket is asked for

_HALF = np.uint64(32)
_UNIT_SHIFT = np.uint64(64 - 4)  # bits of a hash, of which four say the unit
_FRACTION_SHIFT = np.uint64(64 - 4 - 32)
_FRACTION = np.uint64(0xFFFFFFFF)
_IN_SEGMENT = np.uint64(BUCKETS - 1)


class Cells(NamedTuple):
    """An index as kernels use it."""

    words: Any  # (n,) int64
    halves: Any  # (2 n,) uint32, the same memory
    segments: Any  # uint64
    following: Any
    left: Any
    salt: Any
    first_factor: Any
    second_factor: Any


@jit
def open_cells(index: Any) -> Any:
    """Return the `Cells` of a record of `INDEX`."""
    length = index["cells_length"]
    return Cells(
        array_at(index["cells"], length, np.int64),
        array_at(index["cells"], 2 * length, np.uint32),
        np.uint64(index["segments"]),
        np.uint64(index["following"]),
        np.uint64(index["left"]),
        np.uint64(index["salt"]),
        np.uint64(index["first_factor"]),
        np.uint64(index["second_factor"]),
    )


@jit
def hash_of(cells: Any, number: Any) -> Any:
    """Mix an id to 64 bits, uint64."""
    h = (np.uint64(number) ^ cells.salt) * cells.first_factor
    h = (h ^ (h >> _HALF)) * cells.second_factor
    return h ^ (h >> np.uint64(47))


@jit
def unit_of(h: Any) -> Any:
    """Return the unit that the id of a hash belongs to, as uint64."""
    return h >> _UNIT_SHIFT


@jit
def bucket_of(cells: Any, h: Any) -> Any:
    """Return the bucket that the id of a hash belongs to, as int64."""
    fraction = (h >> _FRACTION_SHIFT) & _FRACTION
    segment = (fraction * cells.segments) >> _HALF
    segment = select(segment >= cells.left, (fraction * cells.following) >> _HALF, segment)
    return np.int64((segment * np.uint64(UNITS) + unit_of(h)) * np.uint64(BUCKETS) + (h & _IN_SEGMENT))


@jit
def next_bucket(bucket: Any, h: Any) -> Any:
    """Return the bucket of the same segment that an id goes to from one that is full.

    By steps of its own: the next bucket in memory is full as well more often than another one.
    """
    step = np.int64((h >> np.uint64(10)) & _IN_SEGMENT) | 1
    return (bucket & ~np.int64(BUCKETS - 1)) | ((bucket + step) & np.int64(BUCKETS - 1))


@jit
def tally_of(bucket: Any) -> Any:
    """Where the tally of a bucket is, in ``cells.halves``."""
    return np.uint64(bucket * (2 * WORDS) + TALLY_AT)


@jit
def look_into(cells: Any, bucket: Any, number: Any) -> Any:
    """Return the row + 1 of an id in a bucket, or, if it is not there, minus how many ids went past.

    Without branches: which it is nobody can foresee. The tally follows the rows, as if it were that of a
    sixth cell.
    """
    taken = np.int64(cells.halves[tally_of(bucket)]) & np.int64(PASSED - 1)
    equal = equal_in_line(cells.words, bucket * WORDS, number) & ((np.int64(1) << taken) - 1)
    half = np.uint64(bucket * (2 * WORDS) + ROWS_AT)
    found = np.int64(cells.halves[half + np.uint64(first_bit(equal | np.int64(1 << CELLS)))])
    return select(equal != 0, found, -(found // PASSED))


@jit
def find_from(cells: Any, bucket: Any, h: Any, number: Any) -> Any:
    """Return the row of an id with a hash, looking into a bucket and those after it; -1 if it has none."""
    found = look_into(cells, bucket, number)
    looked_at = 0
    while found < 0 and looked_at < BUCKETS:
        bucket = next_bucket(bucket, h)
        found = look_into(cells, bucket, number)
        looked_at += 1
    return max(found, np.int64(0)) - 1


@jit
def ask_for(cells: Any, bucket: Any) -> None:
    """Have a bucket fetched from memory."""
    prefetch_line(address(cells.words, bucket * WORDS))


@jit
def find_all(cells: Any, ids: Any, first: Any, last: Any, rows: Any, later: Any) -> None:
    """Write the rows of ``ids[first:last]`` into the same places of ``rows``, -1 for those that have none.

    While an id is looked up, the buckets of the next ones are on their way; which those are is kept where
    their rows will be. An id that went past its bucket, one in ten, is put off until all others have been
    looked at: nobody can foresee which they are, and to wait for another line from memory takes as long as to
    look up five ids. ``later`` has room for as many numbers as there are ids.
    """
    for i in range(first, min(first + AHEAD, last)):
        bucket = bucket_of(cells, hash_of(cells, ids[np.uint64(i)]))
        rows[np.uint64(i)] = bucket
        ask_for(cells, bucket)
    for i in range(first, last):
        if i + AHEAD < last:
            bucket = bucket_of(cells, hash_of(cells, ids[np.uint64(i + AHEAD)]))
            rows[np.uint64(i + AHEAD)] = bucket
            ask_for(cells, bucket)
        rows[np.uint64(i)] = look_into(cells, rows[np.uint64(i)], ids[np.uint64(i)]) - 1
    put_off = np.int64(0)
    for i in range(first, last):
        later[np.uint64(put_off)] = i
        put_off += np.int64(rows[np.uint64(i)] < -1)
    for k in range(put_off):
        at = np.uint64(later[np.uint64(k)])
        h = hash_of(cells, ids[at])
        rows[at] = next_bucket(bucket_of(cells, h), h)
        ask_for(cells, rows[at])
    for k in range(put_off):
        at = np.uint64(later[np.uint64(k)])
        rows[at] = find_from(cells, rows[at], hash_of(cells, ids[at]), ids[at])


@jit
def _write(cells: Any, bucket: Any, taken: Any, number: Any, mark: Any) -> Any:
    """Write an id, and its row + 1, to the first cell of a bucket that is not taken; return where."""
    half = bucket * (2 * WORDS) + ROWS_AT + taken
    cells.words[np.uint64(bucket * WORDS + taken)] = number
    cells.halves[np.uint64(half)] = np.uint32(mark)
    cells.halves[tally_of(bucket)] += np.uint32(1)
    return half


@jit
def put(cells: Any, h: Any, number: Any, mark: Any) -> Any:
    """Write an id that is not there, with its row + 1; return where, in ``cells.halves``; -1: no room."""
    bucket = bucket_of(cells, h)
    for _ in range(BUCKETS):
        at = tally_of(bucket)
        taken = np.int64(cells.halves[at]) & np.int64(PASSED - 1)
        if taken < CELLS:
            return _write(cells, bucket, taken, number, mark)
        cells.halves[at] += np.uint32(PASSED)
        bucket = next_bucket(bucket, h)
    return np.int64(-1)


ELSEWHERE = -(1 << 62)


@jit
def put_at_home(cells: Any, h: Any, number: Any, mark: Any) -> Any:
    """Write an id to the bucket it belongs to, and return where.

    If it is there, -1 - row; `ELSEWHERE`, if it may be in another bucket, or has no room here.
    """
    bucket = bucket_of(cells, h)
    found = look_into(cells, bucket, number)
    taken = np.int64(cells.halves[tally_of(bucket)]) & np.int64(PASSED - 1)
    if found == 0 and taken < CELLS:
        return _write(cells, bucket, taken, number, mark)
    return -found if found > 0 else np.int64(ELSEWHERE)


@jit
def put_elsewhere(cells: Any, h: Any, number: Any, mark: Any) -> Any:
    """Do what `put_at_home` does for an id that it has put off.

    It may be at home by now: where ids have gone past, and others have been taken out, there is room.
    """
    row = find_from(cells, bucket_of(cells, h), h, number)
    return -1 - row if row >= 0 else put(cells, h, number, mark)


@jit
def take_out(cells: Any, number: Any) -> Any:
    """Take an id out; return the row that it had, -1 if it was not there. The last one goes to its cell."""
    h = hash_of(cells, number)
    home = bucket_of(cells, h)
    bucket, row = home, look_into(cells, home, number)
    looked_at = 0
    while row < 0 and looked_at < BUCKETS:
        bucket = next_bucket(bucket, h)
        row = look_into(cells, bucket, number)
        looked_at += 1
    if row <= 0:
        return np.int64(-1)
    word, half = bucket * WORDS, bucket * (2 * WORDS) + ROWS_AT
    last = (np.int64(cells.halves[tally_of(bucket)]) & np.int64(PASSED - 1)) - 1
    for cell in range(CELLS):
        if cell <= last and cells.words[np.uint64(word + cell)] == number:
            cells.words[np.uint64(word + cell)] = cells.words[np.uint64(word + last)]
            cells.halves[np.uint64(half + cell)] = cells.halves[np.uint64(half + last)]
            break
    cells.words[np.uint64(word + last)] = 0
    cells.halves[np.uint64(half + last)] = 0
    cells.halves[tally_of(bucket)] -= np.uint32(1)
    while home != bucket:
        cells.halves[tally_of(home)] -= np.uint32(PASSED)
        home = next_bucket(home, h)
    return row - 1


# --- growth -----------------------------------------------------------------------------------------------

# In thousandths of the cells: when the index begins to grow, and when it must have grown, to seven fifths of
# what it was: to 21 bytes an id then, and never more than 24. A segment has about as many ids as the others:
# the square root of 4400 more or less, and ten times that until it is full.
BEGINS, ENDS = 740, 860
_BUCKETS_AHEAD = 3  # of a segment that is emptied: whose ids' new buckets are asked for


@jit
def larger(segments: Any) -> Any:
    """Return how many segments a unit will have that has so many."""
    return max(segments + 1, segments * 7 // 5)


@jit
def empty_segments(index: Any, unit: Any, scratch: Any) -> None:
    """Empty those segments of a unit that `begins_to_grow` has said.

    ``scratch`` has room for a segment, and is nobody else's.
    """
    cells = open_cells(index)
    for segment in range(index["left_before"] - 1, index["left"] - 1, -1):
        _empty(cells, segment * UNITS + unit, scratch)


@jit
def _empty(cells: Any, segment: Any, scratch: Any) -> None:
    """Move the ids of a segment to where they belong in the index that has grown."""
    first = np.uint64(segment * SEGMENT_WORDS)
    for i in range(SEGMENT_WORDS):
        scratch[np.uint64(i)] = cells.words[first + np.uint64(i)]
        cells.words[first + np.uint64(i)] = 0
    for bucket in range(BUCKETS):
        if bucket + _BUCKETS_AHEAD < BUCKETS:
            for cell in range(CELLS):  # of those that are not taken, too: it does no harm
                number = scratch[np.uint64((bucket + _BUCKETS_AHEAD) * WORDS + cell)]
                ask_for(cells, bucket_of(cells, hash_of(cells, number)))
        taken = (scratch[np.uint64((bucket + 1) * WORDS - 1)] >> np.int64(32)) & np.int64(PASSED - 1)
        for cell in range(taken):
            number = scratch[np.uint64(bucket * WORDS + cell)]
            rows = scratch[np.uint64(bucket * WORDS + CELLS + cell // 2)]
            row = (rows >> np.int64(32 * (cell & 1))) & np.int64(0xFFFFFFFF)
            put(cells, hash_of(cells, number), number, row)


@jit
def begins_to_grow(index: Any, more: Any) -> Any:
    """Say whether segments must be emptied before so many more ids come, and which.

    Those of a call may repeat: there are more of them, perhaps, than ever get a cell.
    """
    ids = min(index["ids"] + more, index["most"])
    if index["left"] == 0:
        index["segments"] = index["following"]
    capacity = index["segments"] * LAYER_CELLS
    if index["left"] == 0 and ids * 1000 > capacity * BEGINS:
        index["following"] = larger(index["segments"])
        index["left"] = index["segments"]
    # What may be left once so many ids are there: all of it at BEGINS, nothing at ENDS.
    may_be_left = index["segments"] * (capacity * ENDS - ids * 1000) // (capacity * (ENDS - BEGINS))
    if index["left"] <= max(may_be_left, 0):
        return False
    index["left_before"] = index["left"]
    index["left"] = max(may_be_left, 0)
    return True
