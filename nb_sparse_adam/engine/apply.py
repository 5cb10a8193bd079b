"""Updating tables: runs of units that threads take in turn, for gradients that have been prepared.

Kernels are made for each combination of dtype, codec, count dtype and count rule that occurs. Nothing here
validates or allocates: that has been done before the first write. Everything that a call changes, counts of
steps and of skipped rows included, it changes in one native call, which no Python exception can cut in two.

A *job* is the tuple ``(tables, gradients, found, tasks, first, last, scratch, status)``:

* tables, gradients, found : (T,) records of `records.TABLE`, `records.GRADIENT` and `records.FOUND`; those in
  first:last are of this combination, and are all that is touched
* tasks : records of `records.TASK`, of these gradients alone
* scratch : (threads * SCRATCH_ROWS, largest dim or more) of the tables' dtype
* status : (1,) int64; set to 1 when everything is done
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from nb_sparse_adam.engine.codecs import Codec
from nb_sparse_adam.engine.compile import jit
from nb_sparse_adam.engine.driver import Drivers
from nb_sparse_adam.engine.formula import is_nonfinite, most_of
from nb_sparse_adam.engine.intrinsics import address, array_at, store_sum
from nb_sparse_adam.engine.prefetching import (
    ENTRIES_AHEAD,
    PIECE,
    prefetch_element,
    prefetching,
    rows_ahead,
)
from nb_sparse_adam.engine.records import COMPRESSED, DISTINCT, ELEMENT, ENTRIES, GLOBAL, SEGMENTS, SKIP
from nb_sparse_adam.engine.rows import SCRATCH_ROWS, row_update, updates
from nb_sparse_adam.engine.sums import (
    first_long,
    locate,
    prefetch_values,
    sum_blocks,
    sum_entry,
    sum_segment,
)
from nb_sparse_adam.engine.view import integer, open_gradient, open_table

__all__ = ["apply_for"]


@jit
def row_of(g: Any, s: Any, dim: Any) -> Any:
    """The row that unit s of a `view.Gradient` is about; dim is the table's."""
    if g.kind == DISTINCT:
        return integer(g.ids, s)
    if g.kind == COMPRESSED:
        return integer(g.rows, s)
    if g.kind == ENTRIES:
        return (g.packed[integer(g.starts, integer(g.row_starts, s))] >> g.row_shift) // dim
    return g.packed[integer(g.starts, s)] >> g.row_shift


@jit
def entries_of(g: Any, s: Any) -> Any:
    """The first entry of unit s of COMPRESSED or ENTRIES, and the end of its last one."""
    if g.kind == COMPRESSED:
        return integer(g.starts, s), integer(g.starts, s + 1)
    return integer(g.row_starts, s), integer(g.row_starts, s + 1)


@jit
def entry(g: Any, e: Any, dim: Any) -> Any:
    """Column and value of entry e of COMPRESSED or ENTRIES."""
    if g.kind == COMPRESSED:
        return integer(g.ids, e), g.values[e * g.values_stride]
    return (g.packed[integer(g.starts, e)] >> g.row_shift) % dim, sum_entry(g, e)


@jit
def entries_are_nonfinite(g: Any, start: Any, end: Any) -> bool:
    """Whether one of the entries start:end is not finite, or its square is not."""
    bad = 0
    for e in range(start, end):
        _, value = entry(g, e, np.int64(1))
        bad += not (value * value < np.inf)
    return bad > 0


@jit
def prefetch_entries(table: Any, g: Any, s: Any, start: Any, end: Any) -> Any:
    """Prefetch the entries start:end, the first of them in unit s or later; return the unit of the last."""
    for e in range(start, end):
        if g.kind == COMPRESSED:
            while integer(g.starts, s + 1) <= e:
                s += 1
            prefetch_element(table, integer(g.rows, s), integer(g.ids, e))
        else:
            key = g.packed[integer(g.starts, e)] >> g.row_shift
            prefetch_element(table, key // table.dim, key % table.dim)
    return s


@jit
def fill_row(g: Any, start: Any, end: Any, dim: Any, out: Any, to: Any) -> None:
    """Spread the entries start:end of one row out over a row of ``out``, from ``to`` on."""
    for j in range(dim):
        store_sum(out, to + j, out.dtype.type(0))
    for e in range(start, end):
        column, value = entry(g, e, dim)
        if np.uint64(column) < np.uint64(dim):
            store_sum(out, to + column, value)


@functools.cache
def apply_for(real: np.dtype[Any], codec: Codec, count: np.dtype[Any], count_rule: int) -> Drivers:
    """Make the kernels that update tables of one combination.

    Parameters
    ----------
    real : dtype
        Of the tables and of their gradients, float32 or float64.
    codec : Codec
        Of their moments.
    count : dtype
        Of their counts, int32 or int64.
    count_rule : int
        ELEMENT, ROW or GLOBAL.

    Returns
    -------
    Drivers
        ``serial(1, job)`` and ``parallel(threads, job)``.
    """
    view, opened = open_table(real, codec.storage(real), count, count_rule), open_gradient(real)
    worker = _by_element(codec) if count_rule == ELEMENT else _worker(codec, count_rule)
    real_type, count_type = real.type, count.type

    @jit(entry=True)
    def begin(phase: Any, job: Any) -> Any:
        """Phase 0 sums blocks of long segments, if there are any; phase 1 updates; then counts settle."""
        tables, _, found, tasks, first, last, _, status = job
        if phase == 0:
            for i in range(first, last):
                if found[i]["blocks"] > 0:
                    return np.int64(len(tasks))
            return np.int64(0)
        if phase == 1:
            return np.int64(len(tasks))
        for number in range(len(tasks)):
            task = tasks[number]
            if task["skipped"] > 0:
                array_at(tables[task["gradient"]]["totals"], 2, np.int64)[1] += task["skipped"]
        for i in range(first, last):
            table = tables[i]
            if count_rule == GLOBAL:
                counts = array_at(table["counts"], 1, count_type)
                counts[0] += counts[0] != most_of(counts)
            array_at(table["totals"], 2, np.int64)[0] += 1
        status[0] = 1
        return np.int64(-1)

    @jit(entry=True)
    def work(phase: Any, unit: Any, t: Any, job: Any) -> None:
        """Do a task: in phase 0 its part of the blocks of its gradient, then its run of units."""
        tables, gradients, found, tasks, _, _, scratch, _ = job
        task = tasks[unit]
        i = task["gradient"]
        if phase == 0:
            blocks = found[i]["blocks"]
            if blocks > 0 and found[i]["kind"] == SEGMENTS:
                lo, hi = blocks * task["part"] // task["parts"], blocks * (task["part"] + 1) // task["parts"]
                sum_blocks(opened(gradients[i], found[i]), lo, hi)
            return
        task["skipped"] = 0
        if task["first"] >= task["last"]:
            return
        flat = array_at(address(scratch, 0), scratch.size, real_type)
        own = SCRATCH_ROWS * scratch.shape[1] * t
        check = gradients[i]["on_nonfinite"] == SKIP and found[i]["suspicious"] != 0
        g = opened(gradients[i], found[i])
        task["skipped"] = worker(view(tables[i]), g, task["first"], task["last"], flat, own, check)

    return Drivers(begin, work)


@functools.cache
def _by_element(codec: Codec) -> Any:
    """Make what `_worker` makes, for counts of elements: of entries each takes a step of its own."""
    whole, update_element = _worker(codec, ELEMENT), updates(codec).element

    @jit
    def apply_entries(table: Any, g: Any, lo: Any, hi: Any, check: Any) -> Any:
        """Apply the rows of entries lo:hi, entry by entry."""
        skipped = 0
        sign = table.sign
        first, last = entries_of(g, lo)[0], entries_of(g, hi - 1)[1]
        next_unit, next_entry = lo, first  # to be prefetched
        for s in range(lo, hi):
            start, end = entries_of(g, s)
            reach = min(end + ENTRIES_AHEAD, last)
            next_unit = prefetch_entries(table, g, next_unit, next_entry, reach)
            next_entry = max(next_entry, reach)
            if check and entries_are_nonfinite(g, start, end):
                skipped += 1
                continue
            r = row_of(g, s, table.dim)
            if np.uint64(r) >= np.uint64(table.rows):
                continue
            for e in range(start, end):
                column, value = entry(g, e, table.dim)
                if value != 0 and np.uint64(column) < np.uint64(table.dim):
                    update_element(table, r, column, sign * value)
        return skipped

    @jit
    def worker(table: Any, g: Any, lo: Any, hi: Any, scratch: Any, own: Any, check: Any) -> Any:
        if g.kind == COMPRESSED or g.kind == ENTRIES:
            return apply_entries(table, g, lo, hi, check)
        return whole(table, g, lo, hi, scratch, own, check)

    return worker


@functools.cache
def _worker(codec: Codec, count_rule: int) -> Any:
    """Make ``worker(table, g, lo, hi, scratch, own, check)``, which updates rows.

    It updates a `view.View` with the units lo:hi of a `view.Gradient`, leaves out the rows that are not
    finite if it is to check, and returns how many these were. ``scratch`` is a 1-D array of the table's dtype
    with room for SCRATCH_ROWS rows from ``own`` on.
    """
    apply_row, prefetch_row = row_update(codec, count_rule), prefetching(count_rule).row
    dense = count_rule != ELEMENT

    @jit
    def worker(table: Any, g: Any, lo: Any, hi: Any, scratch: Any, own: Any, check: Any) -> Any:
        """Apply the units lo:hi, each a row with its gradient; return how many were skipped.

        Ids and columns may be the user's memory, and another thread may have changed them since they were
        checked: each is read once where it decides where to write, and left out if there is none such.
        """
        dim, sign, rows = table.dim, table.sign, np.uint64(table.rows)
        ahead = rows_ahead(dim)
        which = first_long(g, lo)
        skipped = 0
        for s in range(lo, hi):
            following = row_of(g, s + ahead, dim) if s + ahead < hi else np.int64(-1)
            if dim < PIECE:
                if following >= 0:
                    prefetch_row(table, following)
                following = np.int64(-1)
            source, offset, factor = scratch, own, sign
            row = np.int64(0)
            if g.kind == SEGMENTS:
                start, end = integer(g.starts, s), integer(g.starts, s + 1)
                row = g.packed[start] >> g.row_shift
                if end - start == 1:  # nothing to sum: no copy
                    prefetch_values(g, start)
                    offset, coefficient = locate(g, start)
                    factor = coefficient * sign
                    source = g.values
                else:
                    which = sum_segment(g, start, end, which, scratch, own)
            elif g.kind == DISTINCT:
                row = integer(g.ids, s)
                source, offset = g.values, s * g.values_stride
            elif dense:
                row = row_of(g, s, dim)
                start, end = entries_of(g, s)
                fill_row(g, start, end, dim, scratch, own)
            if check and is_nonfinite(source, offset, dim, factor):
                skipped += 1
                continue
            if np.uint64(row) < rows:
                apply_row(table, row, source, offset, factor, scratch, own + dim, following)
        return skipped

    return worker
