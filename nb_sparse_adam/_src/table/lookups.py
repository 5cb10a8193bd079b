# SPDX-License-Identifier: Apache-2.0
"""Looking up: ids -> rows -> vectors, or sums of vectors.

A *job* is three records, (1,) each: `cells.INDEX`, `records.STORE` and `records.CALL`. Nothing is validated
or allocated here.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.intrinsics import address, array_at, count_on, prefetch_line
from nb_sparse_adam._src.engine.prefetching import prefetch
from nb_sparse_adam._src.table.cells import find_all, open_cells
from nb_sparse_adam._src.table.initial import fill_initial
from nb_sparse_adam._src.table.records import SEEN, TOUCHED, half_of, open_rows, param_of, word_of

UNIT = 2048  # ids that a thread takes at a time
_AHEAD = 8  # rows between the one that is copied and the one that is asked for
_MOST_SEEN = 0xFFFFFFFF
_NOTHING = np.int64(0)


@jit
def units_of(length: Any) -> Any:
    """Into how many units so many ids are cut."""
    return (length + UNIT - 1) // UNIT


@jit(entry=True)
def _begin_units(phase: Any, job: Any) -> Any:
    """One phase, of all ids."""
    return units_of(job[2][0]["length"]) if phase == 0 else np.int64(-1)


# --- ids -> rows ------------------------------------------------------------------------------------------


@jit(entry=True)
def _begin_find(phase: Any, job: Any) -> Any:
    call = job[2][0]
    units = units_of(call["length"])
    if phase == 0:
        return units
    counts = array_at(call["counts"], call["counts_length"], np.int64)
    missing = _NOTHING
    for unit in range(units):
        missing += counts[unit]
    call["missing"] = missing
    return np.int64(-1)


@jit(entry=True)
def _find(phase: Any, unit: Any, t: Any, job: Any) -> None:  # noqa: ARG001
    call = job[2][0]
    n = call["length"]
    first = unit * UNIT
    last = min(first + UNIT, n)
    rows = array_at(call["rows"], n, np.int64)
    later = array_at(call["later"] + 8 * first, last - first, np.int64)
    find_all(open_cells(job[0][0]), array_at(call["ids"], n, np.int64), first, last, rows, later)
    missing = _NOTHING
    for i in range(first, last):
        missing += np.int64(rows[np.uint64(i)] < 0)
    array_at(call["counts"], call["counts_length"], np.int64)[unit] = missing


FIND = Drivers(_begin_find, _find)


# --- rows -> vectors --------------------------------------------------------------------------------------


@jit
def mark(rows: Any, r: Any, clock: Any, threads: Any) -> None:
    """Count that a row was seen, and note when."""
    rows.words[word_of(rows, r, TOUCHED)] = clock
    at = half_of(rows, r, SEEN)
    seen = rows.halves[at]
    if seen < _MOST_SEEN - 2**20:  # no more than so many at a time are near it
        if threads > 1:
            count_on(rows.halves, at)
        else:
            rows.halves[at] = seen + np.uint32(1)


@jit(entry=True)
def _mark_often(phase: Any, unit: Any, t: Any, job: Any) -> None:  # noqa: ARG001
    """Count that rows were seen, as often as ``counts`` says; no row is there twice."""
    store, call = job[1][0], job[2][0]
    n, clock = call["length"], store["clock"]
    rows = open_rows(store, np.float64, 8)
    found = array_at(call["rows"], n, np.int64)
    times = array_at(call["counts"], n, np.int64)
    first = unit * UNIT
    last = min(first + UNIT, n)
    for i in range(first, last):
        if i + _AHEAD < last and found[np.uint64(i + _AHEAD)] >= 0:
            prefetch_line(address(rows.words, found[np.uint64(i + _AHEAD)] * rows.stride))
        r = found[np.uint64(i)]
        if r >= 0:
            rows.words[word_of(rows, r, TOUCHED)] = clock
            at = half_of(rows, r, SEEN)
            seen = min(np.int64(rows.halves[at]) + times[np.uint64(i)], np.int64(_MOST_SEEN - 2**20))
            rows.halves[at] = np.uint32(seen)


MARK_OFTEN = Drivers(_begin_units, _mark_often)


@jit
def ask_for_row(rows: Any, r: Any) -> None:
    """Have the header and the parameters of a row fetched from memory."""
    prefetch_line(address(rows.words, r * rows.stride))
    prefetch(rows.reals, param_of(rows, r), min(rows.dim, 256))


@functools.cache
def gather_for(dtype: np.dtype[Any]) -> Drivers:
    """Make what copies the vectors of rows into ``out``, marking rows where the call says so."""
    real, size = dtype.type, dtype.itemsize

    @jit(entry=True, announced="what looks up rows by ids")
    def work(phase: Any, unit: Any, t: Any, job: Any) -> None:  # noqa: ARG001
        store, call = job[1][0], job[2][0]
        rows, dim, n = open_rows(store, real, size), store["dim"], call["length"]
        first = unit * UNIT
        last = min(first + UNIT, n)
        found = array_at(call["rows"], n, np.int64)
        out = array_at(call["out"], call["out_length"], real)
        others = array_at(call["others"], call["others_length"], real)
        clock, trains, threads = store["clock"], call["trains"] != 0, call["threads"]
        for i in range(first, last):
            if i + _AHEAD < last and found[np.uint64(i + _AHEAD)] >= 0:
                ask_for_row(rows, found[np.uint64(i + _AHEAD)])
            r = found[np.uint64(i)]
            into = i * dim
            if r >= 0:
                source = param_of(rows, r)
                for j in range(dim):
                    out[np.uint64(into + j)] = rows.reals[np.uint64(source + j)]
                if trains:
                    mark(rows, r, clock, threads)
            elif len(others) > 0:
                source = (-1 - r) * dim
                for j in range(dim):
                    out[np.uint64(into + j)] = others[np.uint64(source + j)]
            else:
                for j in range(dim):
                    out[np.uint64(into + j)] = real(0)

    return Drivers(_begin_units, work)


# --- rows -> sums of vectors ------------------------------------------------------------------------------

BAGS = 64  # bags that a thread takes at a time


@functools.cache
def pool_for(dtype: np.dtype[Any]) -> Drivers:
    """Make what sums the vectors of bags of rows into ``out``, in the order of the ids."""
    real, size = dtype.type, dtype.itemsize

    @jit(entry=True)
    def begin(phase: Any, job: Any) -> Any:
        bags = job[2][0]["offsets_length"] - 1
        return (bags + BAGS - 1) // BAGS if phase == 0 else np.int64(-1)

    @jit(entry=True, announced="what sums bags of rows")
    def work(phase: Any, unit: Any, t: Any, job: Any) -> None:  # noqa: ARG001
        store, call = job[1][0], job[2][0]
        rows, dim, n = open_rows(store, real, size), store["dim"], call["length"]
        offsets = array_at(call["offsets"], call["offsets_length"], np.int64)
        found = array_at(call["rows"], n, np.int64)
        out = array_at(call["out"], call["out_length"], real)
        others = array_at(call["others"], call["others_length"], real)
        weighted = call["weights"] != 0
        weights = array_at(call["weights"], n if weighted else _NOTHING, real)
        clock, trains, threads = store["clock"], call["trains"] != 0, call["threads"]
        last_bag = min((unit + 1) * BAGS, call["offsets_length"] - 1)
        last = offsets[last_bag]
        for bag in range(unit * BAGS, last_bag):
            into = bag * dim
            for j in range(dim):
                out[np.uint64(into + j)] = real(0)
            start, end = offsets[bag], offsets[bag + 1]
            for i in range(start, end):
                if i + _AHEAD < last and found[np.uint64(i + _AHEAD)] >= 0:
                    ask_for_row(rows, found[np.uint64(i + _AHEAD)])
                r = found[np.uint64(i)]
                weight = weights[np.uint64(i)] if weighted else real(1)
                if r >= 0:
                    source = param_of(rows, r)
                    for j in range(dim):
                        out[np.uint64(into + j)] += weight * rows.reals[np.uint64(source + j)]
                    if trains:
                        mark(rows, r, clock, threads)
                elif len(others) > 0:
                    source = (-1 - r) * dim
                    for j in range(dim):
                        out[np.uint64(into + j)] += weight * others[np.uint64(source + j)]
            if call["mean"] != 0 and end > start:
                factor = real(1) / real(end - start)
                for j in range(dim):
                    out[np.uint64(into + j)] *= factor

    return Drivers(begin, work)


# --- ids that have no row ---------------------------------------------------------------------------------


@functools.cache
def initial_for(dtype: np.dtype[Any]) -> Drivers:
    """Make what writes the initial values of the ids of a call into ``others``."""
    real = dtype.type

    @jit(entry=True)
    def work(phase: Any, unit: Any, t: Any, job: Any) -> None:  # noqa: ARG001
        store, call = job[1][0], job[2][0]
        dim, n = store["dim"], call["length"]
        ids = array_at(call["ids"], n, np.int64)
        others = array_at(call["others"], call["others_length"], real)
        for i in range(unit * UNIT, min((unit + 1) * UNIT, n)):
            fill_initial(store, ids[np.uint64(i)], others, i * dim, dim)

    return Drivers(_begin_units, work)
