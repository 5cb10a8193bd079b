# SPDX-License-Identifier: Apache-2.0
"""Updating tables: runs of units that threads take in turn, for gradients that have been prepared.

Kernels are made for each combination of dtype, codec, count dtype and count rule that occurs. Nothing here
validates or allocates: that has been done before the first write. Everything that a call changes, counts of
steps and of skipped rows included, it changes in one native call, which no Python exception can cut in two.

A *job* is a (1,) `records.STEP`; of its tables those in first:last are of this combination, and they and
their tasks are all that is touched.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.engine.codecs import Codec
from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.entries import entries_worker
from nb_sparse_adam._src.engine.formula import is_nonfinite, most_of
from nb_sparse_adam._src.engine.integers import integer
from nb_sparse_adam._src.engine.intrinsics import array_at
from nb_sparse_adam._src.engine.prefetching import (
    PIECE,
    prefetching,
    rows_ahead,
)
from nb_sparse_adam._src.engine.records import DISTINCT, GLOBAL, SEGMENTS, SKIP
from nb_sparse_adam._src.engine.rows import note_time, row_update
from nb_sparse_adam._src.engine.step import open_step
from nb_sparse_adam._src.engine.sums import (
    first_long,
    locate,
    prefetch_values,
    sum_blocks,
    sum_segment,
)
from nb_sparse_adam._src.engine.view import open_gradient, open_table


class Appliers(NamedTuple):
    """The drivers that apply gradients to tables of one combination: ``serial(1, job)`` and so on."""

    rows: Drivers  # DISTINCT and SEGMENTS
    entries: Drivers  # COMPRESSED and ENTRIES


@functools.cache
def apply_for(
    real: np.dtype[Any], codec: Codec, count: np.dtype[Any], count_rule: int, one_record: bool = False
) -> Appliers:
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
    one_record : bool
        Whether all of a row is one piece of memory.
    """
    view = open_table(real, codec.storage(real), count, count_rule, one_record)
    opened = view, open_gradient(real)
    workers = rows_worker(codec, count_rule, one_record), entries_worker(codec, count_rule)
    counts = count.type, count_rule
    return Appliers(*(_drivers(worker, *opened, real.type, *counts, one_record) for worker in workers))


@jit
def advance_clocks(tables: Any, first: Any, last: Any) -> None:
    """Let the clocks of tables advance: a step begins."""
    for i in range(first, last):
        array_at(tables[i]["clock"], 1, np.int64)[0] += 1


@jit
def blocks_of(found: Any, first: Any, last: Any) -> Any:
    """How many blocks of long segments gradients have."""
    blocks = np.int64(0)
    for i in range(first, last):
        blocks += found[i]["blocks"]
    return blocks


def _drivers(
    worker: Any, view: Any, opened: Any, real: Any, count: Any, count_rule: int, one_record: bool
) -> Drivers:
    """Make the driver whose tasks ``worker`` does."""

    @jit(entry=True)
    def begin(phase: Any, job: Any) -> Any:
        """Phase 0 sums blocks of long segments, if there are any; phase 1 updates; then counts settle."""
        tables, _, found, _, tasks = open_step(job)
        first, last = job[0]["first"], job[0]["last"]
        if phase == 0:
            if one_record:
                advance_clocks(tables, first, last)
            return np.int64(len(tasks) if blocks_of(found, first, last) > 0 else 0)
        if phase == 1:
            return np.int64(len(tasks))
        for number in range(len(tasks)):
            task = tasks[number]
            if task["skipped"] > 0:
                array_at(tables[task["gradient"]]["totals"], 2, np.int64)[1] += task["skipped"]
        for i in range(first, last):
            table = tables[i]
            if count_rule == GLOBAL:
                counts = array_at(table["counts"], 1, count)
                counts[0] += counts[0] != most_of(counts)
            array_at(table["totals"], 2, np.int64)[0] += 1
        array_at(job[0]["status"], 1, np.int64)[0] = 1
        return np.int64(-1)

    @jit(entry=True, announced=f"what applies gradients to {np.dtype(real)} tables")
    def work(phase: Any, unit: Any, t: Any, job: Any) -> None:
        """Do a task: in phase 0 its part of the blocks of its gradient, then its run of units."""
        tables, gradients, found, _, tasks = open_step(job)
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
        scratch = array_at(job[0]["scratch"], job[0]["scratch_length"], real)
        own = job[0]["scratch_stride"] * t
        check = gradients[i]["on_nonfinite"] == SKIP and found[i]["suspicious"] != 0
        g = opened(gradients[i], found[i])
        task["skipped"] = worker(view(tables[i]), g, task["first"], task["last"], scratch, own, check)

    return Drivers(begin, work)


@jit
def row_of(g: Any, s: Any) -> Any:
    """The row that unit s of DISTINCT or SEGMENTS is about."""
    if g.kind == DISTINCT:
        return integer(g.ids, s)
    return g.packed[integer(g.starts, s)] >> g.row_shift


@functools.cache
def rows_worker(codec: Codec, count_rule: int, one_record: bool = False) -> Any:
    """Make ``worker(table, g, lo, hi, scratch, own, check)``, which applies rows.

    It updates a `view.View` with the units lo:hi of a `view.Gradient`, which is DISTINCT or SEGMENTS, leaves
    out the rows that are not finite if it is to check, and returns how many these were. ``scratch`` is a 1-D
    array of the table's dtype with room for `rows.SCRATCH_ROWS` rows from ``own`` on.
    """
    apply_row = row_update(codec, count_rule, one_record)
    prefetch_row = prefetching(count_rule, one_record).row

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
            following = row_of(g, s + ahead) if s + ahead < hi else np.int64(-1)
            if dim < PIECE:
                if following >= 0:
                    prefetch_row(table, following)
                following = np.int64(-1)
            source, offset, factor = scratch, own, sign
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
            else:
                row = integer(g.ids, s)
                source, offset = g.values, s * g.values_stride
            if check and is_nonfinite(source, offset, dim, factor):
                skipped += 1 if np.uint64(row) < rows else 0
                continue
            if np.uint64(row) < rows:
                apply_row(table, row, source, offset, factor, scratch, own + dim, following)
                if one_record:
                    note_time(table, row)
        return skipped

    return worker
