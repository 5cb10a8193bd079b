# SPDX-License-Identifier: Apache-2.0
"""The limit of the tracking set: it moves the bytes of a step, and is the same for every commit.

As `nb_sparse_adam._src.bench.limits`, which `nb-sparse-adam bench` has, but made of nothing that is not
public, so that it can stand beside an optimizer of any commit: it finds the table and the state by the arrays
that users see. It adds nothing to what a step changes, line by line, and asks for rows some ahead.
"""

from __future__ import annotations

import itertools
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from nb_sparse_adam._src.bench.cases import CSR, Rows
from nb_sparse_adam._src.bench.contenders import Contender, Ours

__all__ = ["Limit"]

LINE = 64  # bytes
ROWS_AHEAD, ENTRIES_AHEAD = 8, 16

_worker = numba.njit(error_model="numpy", nogil=True, forceinline=True, _nrt=False)
_shared_out = numba.njit(error_model="numpy", nogil=True, parallel=True)


@intrinsic
def _ask_for(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address, into the second-level cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(hint, [builder.inttoptr(args[0], cgutils.voidptr_t), i32(0), i32(2), i32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _vector(builder: Any, address: Any, number: int) -> tuple[Any, Any]:
    """Read so many int32 at an address; return where they are, and what they are."""
    kind = ir.VectorType(ir.IntType(32), number) if number > 1 else ir.IntType(32)
    pointer = builder.inttoptr(address, kind.as_pointer())
    return pointer, builder.load(pointer, align=4)


def _touching(number: int) -> Any:
    @intrinsic
    def touch(typingctx: Any, address: Any, gradient: Any, nothing: Any) -> Any:
        """Read int32 at two addresses, as many as there are, and write the former ones as they are."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer, numbers = _vector(builder, args[0], number)
            _, read = _vector(builder, args[1], number)
            zeros = args[2]
            if number > 1:
                zeros = ir.Constant(read.type, ir.Undefined)
                for i in range(number):
                    zeros = builder.insert_element(zeros, args[2], ir.IntType(32)(i))
            builder.store(builder.add(numbers, builder.and_(read, zeros)), pointer, align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int32), codegen

    return touch


_touch, _touch_line = _touching(1), _touching(LINE // 4)


@_worker
def _begin(places: Any, i: Any, r: Any, later: Any) -> Any:
    """Give the address of row r of array i, and how far on a later row is, whose last line is asked for."""
    at, ahead = places[i, 0] + r * places[i, 1], (later - r) * places[i, 1]
    if at & (LINE - 1):  # lines are not as elements are
        _ask_for(at + ahead + places[i, 2] - 1)
    return at, ahead


@_worker
def _move_line(at: Any, ahead: Any, gradient: Any, nothing: Any) -> None:
    _ask_for(at + ahead)
    _touch_line(at, gradient, nothing)


@_shared_out
def _touch_rows(bounds: Any, places: Any, values: Any, rows: Any, nothing: Any) -> None:
    row, by_element = places[0, 2], places[3, 2] > 4
    for t in prange(len(bounds) - 1):
        for s in range(bounds[t], bounds[t + 1]):
            r, later, gradient = rows[s], rows[min(s + ROWS_AHEAD, bounds[t + 1] - 1)], values + s * row
            param, param_ahead = _begin(places, 0, r, later)
            m, m_ahead = _begin(places, 1, r, later)
            v, v_ahead = _begin(places, 2, r, later)
            count, count_ahead = _begin(places, 3, r, later)
            if not by_element:
                _ask_for(count + count_ahead)
                _touch(count, gradient, nothing)
            # Piece by piece: a core that has asked for a whole row does nothing until all of it is accepted.
            for j in range(0, row, LINE):
                _move_line(param + j, param_ahead, gradient + j, nothing)
                _move_line(m + j, m_ahead, gradient + j, nothing)
                _move_line(v + j, v_ahead, gradient + j, nothing)
                if by_element:
                    _move_line(count + j, count_ahead, gradient + j, nothing)


@_worker
def _sum(starts: Any, lo: Any, hi: Any) -> Any:
    total = np.int64(0)
    for i in range(np.uint64(lo), np.uint64(hi)):  # unsigned, or it is not vectorized
        total += starts[i]
    return total


@_shared_out
def _touch_entries(
    bounds: Any, places: Any, starts: Any, rows: Any, columns: Any, data: Any, nothing: Any
) -> None:
    threads = len(bounds) - 1
    for t in prange(threads):
        # A step has to read the row pointer as a whole: what comes of it is nothing, too.
        total = _sum(starts, len(starts) * t // threads, len(starts) * (t + 1) // threads)
        zero = np.int32(nothing & total)
        for e in range(bounds[t], bounds[t + 1]):
            later = min(e + ENTRIES_AHEAD, bounds[t + 1] - 1)
            for i in range(4):
                _ask_for(places[i, 0] + rows[later] * places[i, 1] + columns[later] * 4)
                _touch(places[i, 0] + rows[e] * places[i, 1] + columns[e] * 4, data + 4 * e, zero)


def _place(array: NDArray[Any]) -> tuple[int, int, int]:
    """Give an array's address, and the stride and the length of a row, in bytes."""
    assert array.itemsize == 4
    assert array.ndim == 1 or array.strides[1] == 4
    return array.ctypes.data, array.strides[0], 4 * (array.shape[1] if array.ndim == 2 else 1)


class Limit(Contender):
    """Move the bytes of the steps that another contender takes, in the memory that it has.

    Parameters
    ----------
    ours : Ours
        Whose case is rows of a multiple of 16 elements, unique and in order, or CSR. Not with "global".
    threads : int
    """

    def __init__(self, ours: Ours, threads: int) -> None:
        super().__init__(ours.case)
        assert 4 * ours.case.dim % LINE == 0
        self._threads = threads
        (table,), (state,) = ours.optimizer.tables.values(), ours.optimizer.state.values()
        self._places = np.array([_place(a) for a in (table, state.exp_avg, state.exp_avg_sq, state.steps)])
        self._ours = ours  # which keeps the memory
        self._arrays = ours.case.arrays()
        self._turns = itertools.cycle([self._arguments(arrays) for arrays in self._arrays])

    def _arguments(self, arrays: Any) -> tuple[Any, ...]:
        if isinstance(arrays, Rows):
            bounds = self._bounds(len(arrays.rows))
            return _touch_rows, bounds, self._places, arrays.values.ctypes.data, arrays.rows
        assert isinstance(arrays, CSR)
        rows = np.repeat(np.arange(len(arrays.indptr) - 1), np.diff(arrays.indptr))
        bounds, data = self._bounds(len(rows)), arrays.data.ctypes.data
        return _touch_entries, bounds, self._places, arrays.indptr, rows, arrays.indices, data

    def _bounds(self, n: int) -> NDArray[np.int64]:
        return np.arange(self._threads + 1) * n // self._threads

    def ready(self) -> None:
        """Take the next gradient."""
        self._kernel, *self._given = next(self._turns)

    def step(self) -> None:
        """Move its bytes."""
        before = numba.get_num_threads()
        numba.set_num_threads(self._threads)
        try:
            self._kernel(*self._given, np.int32(0))
        finally:
            numba.set_num_threads(before)
