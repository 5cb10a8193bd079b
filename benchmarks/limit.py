# SPDX-License-Identifier: Apache-2.0
"""The limit of the tracking set: it moves the bytes of a step, and is the same for every commit.

As `nb_sparse_adam._src.bench.limits`, which `nb-sparse-adam bench` has, but made of nothing that is not
public, so that it can stand beside an optimizer of any commit: it finds the table and the state by the arrays
that users see. Memory is moved by lines: it reads and writes one element of each, once, and asks for rows
some ahead.
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

LINE, IN_A_LINE = 64, 16  # bytes of a cache line, and elements
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


@_worker
def _place(places: Any, i: Any) -> Any:
    return places[i, 0], places[i, 1], places[i, 2]


@_worker
def _touch(memory: Any, place: Any, r: Any, j: Any, before: Any, following: Any, nothing: Any) -> None:
    """Add nothing to element j of row r, if it begins another line than `before`, and ask for a later row."""
    address = place[0] + (r * place[1] + j) * 4
    if address & -LINE != (address - (j - before) * 4) & -LINE:
        _ask_for(place[0] + (following * place[1] + j) * 4)
        memory[r * place[1] + j] += nothing


@_worker
def _rows_worker(
    param: Any,
    m: Any,
    v: Any,
    counts: Any,
    places: Any,
    rows: Any,
    values: Any,
    nothing: Any,
    lo: Any,
    hi: Any,
) -> None:
    of_param, of_m, of_v = _place(places, 0), _place(places, 1), _place(places, 2)
    of_counts, dim, none = _place(places, 3), places[0, 2], np.int32(nothing)
    for s in range(lo, hi):
        r, following = rows[s], rows[min(s + ROWS_AHEAD, hi - 1)]
        for start in range(0, dim + IN_A_LINE - 1, IN_A_LINE):
            j = min(start, dim - 1)  # and the last one, where lines are not as elements are
            g = nothing * values[s * dim + j]
            _touch(param, of_param, r, j, start - IN_A_LINE, following, g)
            _touch(m, of_m, r, j, start - IN_A_LINE, following, g)
            _touch(v, of_v, r, j, start - IN_A_LINE, following, g)
            if j < of_counts[2]:
                _touch(counts, of_counts, r, j, start - IN_A_LINE, following, none)


@_shared_out
def _touch_rows(
    bounds: Any, param: Any, m: Any, v: Any, counts: Any, places: Any, rows: Any, values: Any, nothing: Any
) -> None:
    for t in prange(len(bounds) - 1):
        _rows_worker(param, m, v, counts, places, rows, values, nothing, bounds[t], bounds[t + 1])


@_worker
def _entries_worker(
    param: Any, m: Any, v: Any, counts: Any, places: Any, rows: Any, columns: Any, data: Any, nothing: Any,
    lo: Any, hi: Any,
) -> None:  # fmt: skip
    of_param, of_m, of_v = _place(places, 0), _place(places, 1), _place(places, 2)
    of_counts, none = _place(places, 3), np.int32(nothing)
    for e in range(lo, hi):
        later = min(e + ENTRIES_AHEAD, hi - 1)
        for place in (of_param, of_m, of_v, of_counts):
            _ask_for(place[0] + (rows[later] * place[1] + columns[later]) * 4)
        r, j, g = rows[e], columns[e], nothing * data[e]
        param[r * of_param[1] + j] += g
        m[r * of_m[1] + j] += g
        v[r * of_v[1] + j] += g
        counts[r * of_counts[1] + j] += none


@_worker
def _sum(starts: Any, lo: Any, hi: Any) -> Any:
    total = np.int64(0)
    for i in range(np.uint64(lo), np.uint64(hi)):  # unsigned, or it is not vectorized
        total += starts[i]
    return total


@_shared_out
def _touch_entries(
    bounds: Any, param: Any, m: Any, v: Any, counts: Any, places: Any, starts: Any, rows: Any, columns: Any,
    data: Any, nothing: Any,
) -> None:  # fmt: skip
    threads = len(bounds) - 1
    for t in prange(threads):
        # A step has to read the row pointer as a whole. Of it nothing comes, too, but it has to be looked at.
        seen = _sum(starts, len(starts) * t // threads, len(starts) * (t + 1) // threads)
        _entries_worker(
            param,
            m,
            v,
            counts,
            places,
            rows,
            columns,
            data,
            nothing * np.float32(seen),
            bounds[t],
            bounds[t + 1],
        )


class _Memory:
    """The memory of an array, from its first element to its last: 1-D, and writeable."""

    def __init__(self, array: NDArray[Any]) -> None:
        items = 1 + sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) // 4
        self.__array_interface__ = {
            "version": 3,
            "typestr": array.dtype.str,
            "shape": (items,),
            "data": (array.ctypes.data, False),
        }


def _place_of(array: NDArray[Any]) -> tuple[int, int, int]:
    """Give an array's address, and the stride and the length of a row, in elements of 4 bytes."""
    assert array.itemsize == 4
    assert array.ndim == 1 or array.strides[1] == 4
    return array.ctypes.data, array.strides[0] // 4, array.shape[1] if array.ndim == 2 else 1


class Limit(Contender):
    """Move the bytes of the steps that another contender takes, in the memory that it has.

    Parameters
    ----------
    ours : Ours
        Whose case is rows, unique and in order, or CSR; counts by row or by element.
    threads : int
    """

    def __init__(self, ours: Ours, threads: int) -> None:
        super().__init__(ours.case)
        self._threads = threads
        (table,), (state,) = ours.optimizer.tables.values(), ours.optimizer.state.values()
        arrays = table, state.exp_avg, state.exp_avg_sq, state.steps
        self._memory = (
            *(np.asarray(_Memory(array)) for array in arrays),
            np.array([_place_of(array) for array in arrays]),
        )
        self._ours = ours  # which keeps the memory
        self._turns = itertools.cycle([self._arguments(arrays) for arrays in ours.case.arrays()])

    def _arguments(self, arrays: Any) -> tuple[Any, ...]:
        if isinstance(arrays, Rows):
            return _touch_rows, self._bounds(len(arrays.rows)), arrays.rows, arrays.values.reshape(-1)
        assert isinstance(arrays, CSR)
        rows = np.repeat(np.arange(len(arrays.indptr) - 1), np.diff(arrays.indptr))
        return _touch_entries, self._bounds(len(rows)), arrays.indptr, rows, arrays.indices, arrays.data

    def _bounds(self, n: int) -> NDArray[np.int64]:
        return np.arange(self._threads + 1) * n // self._threads

    def ready(self) -> None:
        """Take the next gradient."""
        self._kernel, self._shares, *self._given = next(self._turns)

    def step(self) -> None:
        """Move its bytes."""
        before = numba.get_num_threads()
        numba.set_num_threads(self._threads)
        try:
            self._kernel(self._shares, *self._memory, *self._given, np.float32(0))
        finally:
            numba.set_num_threads(before)
