# SPDX-License-Identifier: Apache-2.0
"""Giving rows to ids that have none, and taking them away.

The job is that of `lookups`. Ids get rows in the order in which they appear in a call, whatever threads do:

* A piece of the ids at a time, so that what is worked in fits into a cache. Threads take units of the index,
  and have them grow as far as the piece needs it (GROWING). Then one thread sorts the places of the ids by
  units.
* Threads take units: each id goes into its cell, marked as new with its place in the piece. One that is there
  by now has come before in this call: the order within a unit is that of the ids (PUTTING).
* One thread goes through the piece in order, and gives rows to those that are new.
* Threads write these rows into the cells, and make their records (WRITING).

All of it is one native call, which no interrupt cuts in two.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.intrinsics import address, array_at, prefetch_line, select
from nb_sparse_adam._src.engine.rearranging import reset_row
from nb_sparse_adam._src.table.cells import (
    ELSEWHERE,
    SEGMENT_WORDS,
    UNITS,
    ask_for,
    begins_to_grow,
    bucket_of,
    empty_segments,
    hash_of,
    next_bucket,
    open_cells,
    put_at_home,
    put_elsewhere,
    take_out,
    unit_of,
)
from nb_sparse_adam._src.table.initial import fill_initial
from nb_sparse_adam._src.table.records import ADMITTED, GIVEN, ID, TOUCHED, open_rows, param_of, word_of

PIECE = 1 << 16  # ids
_AHEAD = 12
_NEW = 1 << 31  # a cell whose row is not known yet has this, and the place in the piece
_LATER = 1 << 40  # added to rows that ids of an earlier piece got

_GROWING, _PUTTING, _WRITING = 1, 2, 3

# What is worked in, int64 each: where units begin, places in order of units, cells, a segment of each unit.
_STARTS, _ORDER, _PLACES = 0, UNITS + 1, UNITS + 1 + PIECE
_SEGMENTS = UNITS + 1 + 2 * PIECE
SCRATCH = _SEGMENTS + UNITS * SEGMENT_WORDS


@jit
def _sort_by_units(index: Any, ids: Any, first: Any, last: Any, scratch: Any) -> None:
    """Write where each unit's places begin, and the places in the order of units."""
    cells = open_cells(index)
    for unit in range(UNITS + 1):
        scratch[_STARTS + unit] = 0
    for i in range(first, last):
        own = np.int64(unit_of(hash_of(cells, ids[np.uint64(i)])))
        scratch[np.uint64(_PLACES + i - first)] = own
        scratch[np.uint64(_STARTS + own + 1)] += 1
    for unit in range(UNITS):
        scratch[_STARTS + unit + 1] += scratch[_STARTS + unit]
    for i in range(last - first):
        unit = scratch[np.uint64(_PLACES + i)]
        at = scratch[np.uint64(_STARTS + unit)]
        scratch[np.uint64(_STARTS + unit)] = at + 1
        scratch[np.uint64(_ORDER + at)] = i
    for unit in range(UNITS, 0, -1):
        scratch[_STARTS + unit] = scratch[_STARTS + unit - 1]
    scratch[_STARTS] = 0


@jit
def _in_one_unit(length: Any, scratch: Any) -> None:
    """Do what `_sort_by_units` does where there is one thread: all places belong to the first unit."""
    for i in range(length):
        scratch[np.uint64(_ORDER + i)] = i
    scratch[_STARTS] = 0
    for unit in range(UNITS):
        scratch[_STARTS + unit + 1] = length


@jit
def _put_unit(index: Any, ids: Any, first: Any, scratch: Any, unit: Any) -> None:
    """Put the ids of a unit into their cells; note where, or who has come before.

    One whose bucket is full, or has been gone past, is put off until the others are there, as in
    `cells.find_all`. So are those after it that are the same, for the same reason: they stay in order.
    """
    cells = open_cells(index)
    start, end = scratch[_STARTS + unit], scratch[_STARTS + unit + 1]
    put_off = start
    for k in range(start, end):
        if k + _AHEAD < end:
            number = ids[np.uint64(first + scratch[np.uint64(_ORDER + k + _AHEAD)])]
            ask_for(cells, bucket_of(cells, hash_of(cells, number)))
        place = scratch[np.uint64(_ORDER + k)]
        number = ids[np.uint64(first + place)]
        found = put_at_home(cells, hash_of(cells, number), number, place + _NEW)
        scratch[np.uint64(_PLACES + place)] = _cell_or_before(found)
        scratch[np.uint64(_ORDER + put_off)] = place
        put_off += np.int64(found == ELSEWHERE)
    for k in range(start, put_off):
        if k + _AHEAD < put_off:
            number = ids[np.uint64(first + scratch[np.uint64(_ORDER + k + _AHEAD)])]
            h = hash_of(cells, number)
            ask_for(cells, next_bucket(bucket_of(cells, h), h))
        place = scratch[np.uint64(_ORDER + k)]
        number = ids[np.uint64(first + place)]
        found = put_elsewhere(cells, hash_of(cells, number), number, place + _NEW)
        scratch[np.uint64(_PLACES + place)] = _cell_or_before(found)


@jit
def _cell_or_before(found: Any) -> Any:
    """Return the cell that was written, or, as -1 - place or -1 - row - _LATER, who has come before."""
    mark = -found
    before = select(mark >= _NEW, mark - _NEW, mark - 1 + _LATER)
    return select(found < 0, -1 - before, found)


@jit
def _give_rows(index: Any, store: Any, call: Any, first: Any, last: Any, scratch: Any) -> None:
    """Give rows to the ids of a piece that are new, in their order."""
    free = array_at(store["free"], store["free_length"], np.int64)
    rows = array_at(call["rows"], call["length"], np.int64)
    left, used = store["free_length"], store["used"]
    new = np.int64(0)
    for i in range(last - first):
        if scratch[np.uint64(_PLACES + i)] >= 0:
            if left > 0:
                left -= 1
                rows[np.uint64(first + i)] = free[np.uint64(left)]
            else:
                rows[np.uint64(first + i)] = used
                used += 1
            new += 1
    store["free_length"], store["used"] = left, used
    index["ids"] += new


@jit
def _write_rows(
    index: Any, store: Any, call: Any, rows: Any, first: Any, last: Any, scratch: Any, unit: Any
) -> None:
    """Write the rows of a share of a piece into their cells, and make their records."""
    halves = array_at(index["cells"], 2 * index["cells_length"], np.uint32)
    ids = array_at(call["ids"], call["length"], np.int64)
    found = array_at(call["rows"], call["length"], np.int64)
    others = array_at(call["others"], call["others_length"], rows.reals)
    dim, length = rows.dim, last - first
    end = length * (unit + 1) // UNITS
    for i in range(length * unit // UNITS, end):
        if i + _AHEAD < end:  # of one that has come before it is nowhere, which does no harm
            prefetch_line(address(halves, scratch[np.uint64(_PLACES + i + _AHEAD)]))
        cell = scratch[np.uint64(_PLACES + i)]
        if cell < 0:  # it has come before
            before = -1 - cell
            row = before - _LATER if before >= _LATER else found[np.uint64(first + before)]
            found[np.uint64(first + i)] = row
            continue
        r = found[np.uint64(first + i)]
        halves[np.uint64(cell)] = np.uint32(r + 1)
        number = ids[np.uint64(first + i)]
        rows.words[word_of(rows, r, ID)] = number
        rows.words[word_of(rows, r, TOUCHED)] = store["clock"]
        rows.words[word_of(rows, r, ADMITTED)] = call["first"] + first + i
        at = param_of(rows, r)
        if store["initializer"] == GIVEN:
            source = (first + i) * dim
            for j in range(dim):
                rows.reals[np.uint64(at + j)] = others[np.uint64(source + j)]
        else:
            fill_initial(store, number, rows.reals, at, dim)


@functools.cache
def insert_for(dtype: np.dtype[Any]) -> Drivers:
    """Make what gives rows to the ids of a call, none of which has one; ``rows`` says which."""
    real, size = dtype.type, dtype.itemsize

    @jit(entry=True)
    def begin(phase: Any, job: Any) -> Any:  # noqa: ARG001
        index, store, call = job[0][0], job[1][0], job[2][0]
        n = call["length"]
        scratch = array_at(call["scratch"], call["scratch_length"], np.int64)
        if call["stage"] == _WRITING:
            call["piece"] += 1
        first = call["piece"] * PIECE
        last = min(first + PIECE, n)
        if call["stage"] == _PUTTING:
            _give_rows(index, store, call, first, last, scratch)
            call["stage"] = _WRITING
            return np.int64(UNITS)
        if first >= n:
            store["admitted"] += n
            return np.int64(-1)
        call["first"] = store["admitted"] + 1
        if begins_to_grow(index, last - first):
            call["stage"] = _GROWING
            return np.int64(UNITS)
        if call["threads"] == 1:
            _in_one_unit(last - first, scratch)
        else:
            _sort_by_units(index, array_at(call["ids"], n, np.int64), first, last, scratch)
        call["stage"] = _PUTTING
        return np.int64(UNITS)

    @jit(entry=True, announced="what makes rows of new ids")
    def work(phase: Any, unit: Any, t: Any, job: Any) -> None:  # noqa: ARG001
        index, store, call = job[0][0], job[1][0], job[2][0]
        n = call["length"]
        ids = array_at(call["ids"], n, np.int64)
        scratch = array_at(call["scratch"], call["scratch_length"], np.int64)
        first = call["piece"] * PIECE
        last = min(first + PIECE, n)
        if call["stage"] == _GROWING:
            at = call["scratch"] + 8 * (_SEGMENTS + unit * SEGMENT_WORDS)
            empty_segments(index, unit, array_at(at, SEGMENT_WORDS, np.int64))
            return
        if call["stage"] == _PUTTING:
            _put_unit(index, ids, first, scratch, unit)
            return
        rows = open_rows(store, real, size)
        _write_rows(index, store, call, rows, first, last, scratch, unit)

    return Drivers(begin, work)


@jit(entry=True)
def _begin_remove(phase: Any, job: Any) -> Any:  # noqa: ARG001
    """Take ids out, in their order, and leave their records as if they had never been anybody's."""
    index, store, call = job[0][0], job[1][0], job[2][0]
    n, stride = call["length"], store["stride"]
    ids = array_at(call["ids"], n, np.int64)
    words = array_at(store["rows"], store["rows_length"], np.int64)
    free = array_at(store["free"], store["free_length"] + n, np.int64)
    counts, columns = array_at(call["wide"], call["wide_length"], np.int64), call["columns"]
    cells = open_cells(index)
    left = store["free_length"]
    for i in range(n):
        if i + _AHEAD < n:
            ask_for(cells, bucket_of(cells, hash_of(cells, ids[np.uint64(i + _AHEAD)])))
        r = take_out(cells, ids[np.uint64(i)])
        if r >= 0:
            reset_row(words, r * stride, stride)
            reset_row(counts, r * columns, columns)
            free[np.uint64(left)] = r
            left += 1
    index["ids"] -= left - store["free_length"]
    store["evicted"] += left - store["free_length"]
    store["free_length"] = left
    return np.int64(-1)


@jit(entry=True)
def _no_work(phase: Any, unit: Any, t: Any, job: Any) -> None:
    """Nothing: what there is to do, one thread does."""


REMOVE = Drivers(_begin_remove, _no_work)
