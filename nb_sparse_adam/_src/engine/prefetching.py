# SPDX-License-Identifier: Apache-2.0
"""Asking for rows before they are needed: hints only, which read nothing and cannot fault.

A processor that asks for a whole row at once cannot calculate until all of that is on its way: rows are asked
for piece by piece, between other arithmetic, where they are as long as a piece.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import CACHE_LINE, address, prefetch_line
from nb_sparse_adam._src.engine.layout import count_offset, exp_avg_offset, exp_avg_sq_offset, param_offset
from nb_sparse_adam._src.engine.records import ELEMENT, ROW

# How far ahead rows are prefetched: enough to cover the latency of memory, not so much that the processor's
# queue of misses overflows. Measured on two Zen 5 cores: at dim 16, 12 rows take a tenth less time than 8;
# from dim 64 on it is flat.
PREFETCH_ELEMENTS = 512
MIN_ROWS_AHEAD, MAX_ROWS_AHEAD = 4, 12
ENTRIES_AHEAD = 16  # of rows of entries, each of which is a place in memory of its own
PIECE = 16  # elements of a row that are asked for at once, between other arithmetic
MOST_OF_A_RECORD = 4096  # bytes


class Prefetching(NamedTuple):
    """What asks for a row under one count rule; ``table`` is a `view.View`, r and start are int64."""

    row: Any  # (table, r): all of row r
    piece: Any  # (table, r, start): the lines in which its elements start:start + PIECE begin
    rest: Any  # (table, r, start): what the pieces before start have left out


@jit
def rows_ahead(dim: Any) -> Any:
    """How many rows ahead of the one being updated are prefetched."""
    return min(max(PREFETCH_ELEMENTS // max(dim, 1), MIN_ROWS_AHEAD), MAX_ROWS_AHEAD)


@jit
def prefetch(array: Any, offset: Any, length: Any) -> None:
    """Ask for each cache line of ``length`` elements of an array, once."""
    first = address(array, offset) & -CACHE_LINE
    for line in range(first, address(array, offset + length - 1) + 1, CACHE_LINE):
        prefetch_line(line)


@jit
def prefetch_element(table: Any, r: Any, j: Any) -> None:
    """Ask for the cache lines of element j of row r, of a table that counts by elements."""
    prefetch_line(address(table.param, param_offset(table, r) + j))
    prefetch_line(address(table.state, exp_avg_offset(table, r) + j))
    prefetch_line(address(table.state, exp_avg_sq_offset(table, r) + j))
    prefetch_line(address(table.counts, count_offset(table, r) + j))


@jit
def _lines(table: Any, r: Any, first: Any, last: Any) -> None:
    """Ask for the lines that begin in the bytes first:last of a record, and for the one that it begins in."""
    start = address(table.param, param_offset(table, r)) - table.count_span
    line = (start + first + CACHE_LINE - 1) & -CACHE_LINE if first > 0 else start & -CACHE_LINE
    while line < start + last:
        prefetch_line(line)
        line += CACHE_LINE


@jit
def _record(table: Any, r: Any) -> None:
    """Ask for the record of row r; the hardware follows a wide one by itself."""
    _lines(table, r, np.int64(0), min(table.state_span, MOST_OF_A_RECORD))


@jit
def _piece_of_record(table: Any, r: Any, start: Any) -> None:
    """Ask for as much of row r as PIECE elements from ``start`` on are of its elements."""
    first = start // PIECE * table.param_span
    _lines(table, r, first, first + table.param_span)


@jit
def _rest_of_record(table: Any, r: Any, start: Any) -> None:
    """Ask for what the pieces of row r before ``start`` have left out."""
    _lines(table, r, start // PIECE * table.param_span, table.state_span)


@functools.cache
def prefetching(count_rule: int, one_record: bool = False) -> Prefetching:
    """Make what asks for rows under a count rule: ELEMENT, ROW or GLOBAL.

    ``one_record``: a row is one piece of memory, each line of which is asked for once.
    """
    if one_record:
        return Prefetching(_record, _piece_of_record, _rest_of_record)

    @jit
    def prefetch_row(table: Any, r: Any) -> None:
        """Ask for the cache lines of row r."""
        prefetch(table.param, param_offset(table, r), table.param_span)
        prefetch(table.state, exp_avg_offset(table, r), table.state_span)
        if table.param_span < table.dim:  # a wide row: the moments have not been asked for as one piece
            prefetch(table.state, exp_avg_sq_offset(table, r), table.param_span)
        if table.count_span > 0:
            prefetch(table.counts, count_offset(table, r), table.count_span)

    @jit
    def prefetch_piece(table: Any, r: Any, start: Any) -> None:
        """Ask for the lines in which the elements start:start + PIECE of row r begin."""
        p, m = param_offset(table, r) + start, exp_avg_offset(table, r) + start
        v = exp_avg_sq_offset(table, r) + start
        middle = PIECE // 2  # a second line begins there where numbers have 8 bytes
        prefetch_line(address(table.param, p))
        prefetch_line(address(table.state, m))
        prefetch_line(address(table.state, v))
        if table.param.itemsize == 8:
            prefetch_line(address(table.param, p + middle))
        if table.state.itemsize == 8:
            prefetch_line(address(table.state, m + middle))
            prefetch_line(address(table.state, v + middle))
        if count_rule == ELEMENT:
            prefetch_line(address(table.counts, count_offset(table, r) + start))

    @jit
    def prefetch_rest(table: Any, r: Any, start: Any) -> None:
        """Ask for what the pieces of row r before ``start`` have left out: what follows, and a last line."""
        p = param_offset(table, r)
        last = address(table.param, p + table.dim - 1)
        if last & -CACHE_LINE > address(table.param, p + start - PIECE // 2):
            prefetch_line(last)
        if start < table.dim:
            left = table.dim - start
            prefetch_line(address(table.param, p + start))
            prefetch(table.state, exp_avg_offset(table, r) + start, left)
            prefetch(table.state, exp_avg_sq_offset(table, r) + start, left)
            if count_rule == ELEMENT:
                prefetch(table.counts, count_offset(table, r) + start, left)
        if count_rule == ROW and table.count_span > 0:
            prefetch_line(address(table.counts, count_offset(table, r)))

    return Prefetching(prefetch_row, prefetch_piece, prefetch_rest)
