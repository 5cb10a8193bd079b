# SPDX-License-Identifier: Apache-2.0
"""The limit: kernels that move the bytes of a step, at the same addresses, and compute next to nothing.

A step reads a gradient and, at places drawn at random from memory, reads and writes parameters, moments and
counts. However clever its arithmetic, it cannot be faster than those reads and writes. For each case the
limit's kernel adds something to each of them: same memory, same rows, same prefetching, same threads. The
figure is *time of the limit / our time*, medians of steps taken in turn: 1 is perfect. The limit of bags is
given its ids grouped, and reads one number of each cache line that a step must add up: it bounds the update,
not the sorting.

With ``on_nonfinite="raise"`` a step must have seen the whole gradient before it writes anything, so its limit
reads the gradient twice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numba import prange
from numpy.typing import NDArray

from nb_sparse_adam._src.annotations import StepCounts
from nb_sparse_adam._src.bench.cases import Arrays, Bag, Case, Rows
from nb_sparse_adam._src.bench.contenders import WithOptimizer
from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import (
    address,
    load_count,
    load_exp_avg,
    load_exp_avg_sq,
    load_gradient,
    load_param,
    prefetch_line,
    store_count,
    store_exp_avg,
    store_exp_avg_sq,
    store_param,
)
from nb_sparse_adam._src.engine.layout import count_offset, exp_avg_offset, exp_avg_sq_offset, param_offset
from nb_sparse_adam._src.engine.prefetching import (
    ENTRIES_AHEAD,
    PIECE,
    prefetch_element,
    prefetching,
    rows_ahead,
)
from nb_sparse_adam._src.engine.prepare import group
from nb_sparse_adam._src.engine.records import ELEMENT, GLOBAL, ROW
from nb_sparse_adam._src.engine.view import open_table
from nb_sparse_adam._src.optimizer import SparseAdam

Function = TypeVar("Function", bound=Callable[..., Any])


# As the library compiles, but not kept on disk: numba's cache does not see changes in other files.
def _jit() -> Callable[[Function], Function]:
    options = {"error_model": "numpy", "nogil": True, "forceinline": True, "_nrt": False}
    return cast("Callable[[Function], Function]", numba.njit(**options))


def _parallel_jit() -> Callable[[Function], Function]:
    return cast("Callable[[Function], Function]", numba.njit(error_model="numpy", nogil=True, parallel=True))


FLOATS_IN_A_LINE = 16


class Kernels(NamedTuple):
    """What touches the memory of a step, of tables of one kind; ``record`` is one of `records.TABLE`."""

    rows: Any
    entries: Any
    segments: Any


@functools.cache
def kernels_for(count_rule: int) -> Kernels:  # noqa: C901 (of all functions in it)
    """Make the kernels for float32 tables with int32 counts, or int64 where there is only one."""
    real = np.dtype(np.float32)
    view = open_table(
        real, real, np.dtype(np.int32 if count_rule in (ELEMENT, ROW) else np.int64), count_rule
    )
    prefetch_row, prefetch_piece, prefetch_rest = prefetching(count_rule)

    @_jit()
    def touch_span(table: Any, r: Any, values: Any, at: Any, start: Any, stop: Any) -> None:
        param, state = table.param, table.state
        p_at, m_at, v_at = param_offset(table, r), exp_avg_offset(table, r), exp_avg_sq_offset(table, r)
        k_at, one = count_offset(table, r), np.int32(table.lr)
        for j in range(start, stop):
            g = table.lr * load_gradient(values, at + j)
            store_param(param, p_at + j, load_param(param, p_at + j) + g)
            store_exp_avg(state, m_at + j, load_exp_avg(state, m_at + j) + g)
            store_exp_avg_sq(state, v_at + j, load_exp_avg_sq(state, v_at + j) + g)
            if count_rule == ELEMENT:
                store_count(table.counts, k_at + j, np.int32(load_count(table.counts, k_at + j) + one))

    @_jit()
    def touch_row(table: Any, r: Any, values: Any, at: Any, following: Any) -> None:
        """Read and write everything that a step of row r reads and writes."""
        start = np.int64(0)
        if following >= 0:
            while start + PIECE <= table.dim:
                prefetch_piece(table, following, start)
                touch_span(table, r, values, at, start, start + PIECE)
                start += PIECE
            prefetch_rest(table, following, start)
        touch_span(table, r, values, at, start, table.dim)
        if count_rule == ROW:
            k_at, one = count_offset(table, r), np.int32(table.lr)
            store_count(table.counts, k_at, np.int32(load_count(table.counts, k_at) + one))

    @_jit()
    def ask_for(table: Any, rows: Any, s: Any, hi: Any) -> Any:
        """Ask for row ``rows[s]`` as a whole, or leave it to `touch_row`: whichever takes less time."""
        following = np.int64(rows[s]) if s < hi else np.int64(-1)
        if following >= 0 and (table.dim < PIECE or count_rule == ELEMENT):
            prefetch_row(table, following)
            following = np.int64(-1)
        return following

    @_jit()
    def rows_worker(record: Any, rows: Any, values: Any, lo: Any, hi: Any) -> None:
        table = view(record)
        ahead = rows_ahead(table.dim)
        for s in range(lo, hi):
            following = ask_for(table, rows, s + ahead, hi)
            touch_row(table, rows[s], values, s * table.dim, following)

    @_parallel_jit()
    def touch_rows(bounds: Any, records: Any, rows: Any, values: Any) -> None:
        for t in prange(len(bounds) - 1):
            rows_worker(records[0], rows, values, bounds[t], bounds[t + 1])

    @_jit()
    def entries_worker(record: Any, rows: Any, columns: Any, data: Any, lo: Any, hi: Any) -> None:
        table = view(record)
        param, state = table.param, table.state
        one = np.int32(table.lr)
        for e in range(lo, hi):
            if e + ENTRIES_AHEAD < hi:
                next_row, next_column = rows[e + ENTRIES_AHEAD], columns[e + ENTRIES_AHEAD]
                prefetch_element(table, np.int64(next_row), np.int64(next_column))
            r, j, g = np.int64(rows[e]), np.int64(columns[e]), table.lr * data[e]
            p_at, k_at = param_offset(table, r) + j, count_offset(table, r) + j
            m_at, v_at = exp_avg_offset(table, r) + j, exp_avg_sq_offset(table, r) + j
            store_param(param, p_at, load_param(param, p_at) + g)
            store_exp_avg(state, m_at, load_exp_avg(state, m_at) + g)
            store_exp_avg_sq(state, v_at, load_exp_avg_sq(state, v_at) + g)
            store_count(table.counts, k_at, np.int32(load_count(table.counts, k_at) + one))

    @_parallel_jit()
    def touch_entries(bounds: Any, records: Any, rows: Any, columns: Any, data: Any) -> None:
        for t in prange(len(bounds) - 1):
            entries_worker(records[0], rows, columns, data, bounds[t], bounds[t + 1])

    @_jit()
    def segments_worker(
        record: Any, segments: Any, values: Any, weights: Any, sums: Any, t: Any, lo: Any, hi: Any
    ) -> None:
        table = view(record)
        rows, starts, source = segments
        ahead = rows_ahead(table.dim)
        for s in range(lo, hi):
            following = ask_for(table, rows, s + ahead, hi)
            total = np.float32(0)
            for i in range(starts[s], starts[s + 1]):
                for j in range(0, table.dim, FLOATS_IN_A_LINE):
                    total += values[source[0, i], j]
                if len(weights) > 0:
                    total += weights[source[1, i]]
            sums[t, 0] = total
            touch_row(table, rows[s], sums, t * sums.shape[1], following)

    @_parallel_jit()
    def touch_segments(
        bounds: Any, records: Any, segments: Any, values: Any, weights: Any, sums: Any
    ) -> None:
        for t in prange(len(bounds) - 1):
            segments_worker(records[0], segments, values, weights, sums, t, bounds[t], bounds[t + 1])

    return Kernels(touch_rows, touch_entries, touch_segments)


@_jit()
def _read_worker(values: Any, lo: Any, hi: Any) -> Any:
    largest = np.int32(0)
    for i in range(np.uint64(lo), np.uint64(hi)):  # unsigned, or it is not vectorized
        largest = max(largest, values[i])
    return largest


@_parallel_jit()
def _read(values: Any, out: Any) -> None:
    chunks = len(out)
    for t in prange(chunks):
        out[t] = _read_worker(values, len(values) * t // chunks, len(values) * (t + 1) // chunks)


class Limit(WithOptimizer):
    """A contender that moves the bytes of a case's steps and does nothing else.

    What it adds is multiplied with the optimizer's learning rate, which is 0: it writes what it has read.

    Parameters
    ----------
    case : Case
        Rows, unique and in order; bags; or CSR.
    step_counts : {"element", "row", "global"}
    threads : int
    reads : int
        How often the gradient is read: 2 if it has to be seen as a whole before the first write. The row
        pointer of a CSR gradient is read as a whole in any case.
    """

    def __init__(self, case: Case, *, step_counts: StepCounts, threads: int, reads: int = 1) -> None:
        super().__init__(case, SparseAdam(case.table(), step_counts=step_counts, on_nonfinite="propagate"))
        self.optimizer.lr = 0
        self._rows, self._threads, self._reads = case.rows, threads, reads
        self._touch = kernels_for({"element": ELEMENT, "row": ROW, "global": GLOBAL}[step_counts])
        self._turns = itertools.cycle([self._arguments(arrays) for arrays in case.arrays()])
        self._out = np.empty(threads, np.int32)
        self._table: Any = None

    def use_memory_of(self, other: WithOptimizer) -> None:
        """Go on with the table and the state of another contender."""
        super().use_memory_of(other)
        self._table = None

    def _arguments(self, arrays: Arrays) -> tuple[Callable[..., None], list[NDArray[Any]], tuple[Any, ...]]:
        """A kernel, what is read before it runs, and its arguments but for the table."""
        touch = self._touch
        if isinstance(arrays, Rows):
            bounds = np.arange(self._threads + 1) * len(arrays.rows) // self._threads
            return touch.rows, [arrays.values][: self._reads - 1], (bounds, *arrays)
        if isinstance(arrays, Bag):
            return touch.segments, [arrays.grad_output][: self._reads - 1], self._grouped(arrays)
        rows = np.repeat(np.arange(len(arrays.indptr) - 1, dtype=np.int32), np.diff(arrays.indptr))
        bounds = np.arange(self._threads + 1) * len(rows) // self._threads
        first = [arrays.indptr, arrays.data][: self._reads]
        return touch.entries, first, (bounds, rows, arrays.indices, arrays.data)

    def _grouped(self, bag: Bag) -> tuple[Any, ...]:
        """Sort the ids by row, and find for each its bag and its weight's place."""
        packed, row_shift, starts = group(bag.indices, self._rows - 1)
        position = packed & ((1 << row_shift) - 1)
        bag_of = np.repeat(np.arange(len(bag.offsets) - 1), np.diff(bag.offsets))[position]
        source = np.stack([bag_of, position]).astype(np.int32)
        rows = (packed >> row_shift)[starts[:-1]]
        ids = np.arange(self._threads + 1) * len(bag.indices) // self._threads
        bounds = np.searchsorted(starts, ids)  # about as many ids each
        bounds[-1] = len(rows)
        dim = bag.grad_output.shape[1]
        sums = np.zeros((self._threads, max(dim, 64)), np.float32)  # no shared cache lines
        weights = np.empty(0, np.float32) if bag.weights is None else bag.weights
        segments = rows, starts.copy(), source
        return bounds, segments, bag.grad_output, weights, sums

    def ready(self) -> None:
        """Take the next gradient."""
        self._kernel, self._first, self._given = next(self._turns)
        if self._table is None:
            with self.optimizer.kernel_table() as table:
                self._table = table

    def step(self) -> None:
        """Move its bytes."""
        before = numba.get_num_threads()
        numba.set_num_threads(self._threads)
        try:
            for array in self._first:
                _read(array.reshape(-1).view(np.int32), self._out)
            bounds, *others = self._given
            self._kernel(bounds, self._table.settings, *others)
        finally:
            numba.set_num_threads(before)


_LINES_AHEAD = 32


@jit(entry=True)
def read_lines(words: Any, lines: Any, out: Any) -> None:
    """Read a word of each of some cache lines, asking for each some time before."""
    total = np.int64(0)
    for i in range(len(lines)):
        if i + _LINES_AHEAD < len(lines):
            prefetch_line(address(words, lines[np.uint64(i + _LINES_AHEAD)] * 8))
        total += words[np.uint64(lines[np.uint64(i)] * 8)]
    out[0] = total
