# SPDX-License-Identifier: Apache-2.0
"""Updating tables from gradients of single entries: compressed rows, and entries that had to be sorted."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.codecs import Codec
from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.formula import is_nonfinite
from nb_sparse_adam._src.engine.integers import integer
from nb_sparse_adam._src.engine.intrinsics import store_sum
from nb_sparse_adam._src.engine.prefetching import (
    ENTRIES_AHEAD,
    PIECE,
    prefetch_element,
    prefetching,
    rows_ahead,
)
from nb_sparse_adam._src.engine.records import COMPRESSED, ELEMENT
from nb_sparse_adam._src.engine.rows import row_update, updates
from nb_sparse_adam._src.engine.sums import sum_entry


@jit
def row_of(g: Any, s: Any, dim: Any) -> Any:
    """The row that unit s of COMPRESSED or ENTRIES is about; dim is the table's."""
    if g.kind == COMPRESSED:
        return integer(g.rows, s)
    return (g.packed[integer(g.starts, integer(g.row_starts, s))] >> g.row_shift) // dim


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
def entries_worker(codec: Codec, count_rule: int) -> Any:
    """Make ``worker(table, g, lo, hi, scratch, own, check)``, which applies rows of entries.

    Parameters as of `apply.rows_worker`'s; g is COMPRESSED or ENTRIES, its units are rows.
    """
    apply_row, prefetch_row = row_update(codec, count_rule), prefetching(count_rule).row
    update_element = updates(codec).element if count_rule == ELEMENT else None

    @jit
    def by_element(table: Any, g: Any, lo: Any, hi: Any, scratch: Any, own: Any, check: Any) -> Any:  # noqa: ARG001
        """For counts of elements: each entry takes a step of its own."""
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
                    update_element(table, r, column, sign * value)  # type: ignore[misc]
        return skipped

    @jit
    def by_row(table: Any, g: Any, lo: Any, hi: Any, scratch: Any, own: Any, check: Any) -> Any:
        """For other counts: every element of a row that is present takes one, most with a gradient of 0."""
        dim, sign, rows = table.dim, table.sign, np.uint64(table.rows)
        ahead = rows_ahead(dim)
        skipped = 0
        for s in range(lo, hi):
            following = row_of(g, s + ahead, dim) if s + ahead < hi else np.int64(-1)
            if dim < PIECE:
                if following >= 0:
                    prefetch_row(table, following)
                following = np.int64(-1)
            row = row_of(g, s, dim)
            start, end = entries_of(g, s)
            fill_row(g, start, end, dim, scratch, own)
            if check and is_nonfinite(scratch, own, dim, sign):
                skipped += 1
                continue
            if np.uint64(row) < rows:
                apply_row(table, row, scratch, own, sign, scratch, own + dim, following)
        return skipped

    return by_element if count_rule == ELEMENT else by_row
