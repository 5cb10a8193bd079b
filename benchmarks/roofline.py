"""The limit: kernels that move the bytes of a step, at the same addresses, and compute next to nothing.

    python -m benchmarks.roofline [--repeats N] [--threads N] [--case NAME ...] [--json FILE]

A step reads a gradient and, at places drawn at random from memory, reads and writes parameters, moments and
counts. However clever its arithmetic, it cannot be faster than those reads and writes. For each case the
limit's kernel adds the gradient's value to each of them: same rows, same prefetching, same threads. The
figure is *time of the limit / our time*, medians of steps taken in turn: 1 is perfect.

With ``on_nonfinite="raise"`` a step must have seen the whole gradient before it writes anything, so its limit
reads the gradient twice.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import prange

from nb_sparse_adam.kernels import ELEMENT, ROW, prefetch_element, prefetch_row, rows_ahead
from nb_sparse_adam.table_state import TableState
from nb_sparse_adam.threads import team

from .cases import CASES, CSR, Arrays, Case, Rows
from .contenders import Contender, Ours
from .timing import alternate

# As the library compiles, but not kept on disk: numba's cache does not see changes in other files.
_jit = functools.partial(numba.njit, error_model="numpy", nogil=True, forceinline=True, _nrt=False)
_parallel_jit = functools.partial(numba.njit, error_model="numpy", nogil=True, parallel=True)


@_jit()
def _touch_row(param, moments, counts, r, values, s, mode):
    """Read and write everything that a step of row r reads and writes."""
    for j in range(param.shape[1]):
        g = values[s, j]
        param[r, j] += g
        moments[r, 0, j] += g
        moments[r, 1, j] += g
    if mode == ELEMENT:
        for j in range(param.shape[1]):
            counts[r, j] = np.int32(counts[r, j] + np.int32(1))  # not widened: vectorized as ours are
    elif mode == ROW:
        counts[r, 0] += 1


@_jit()
def _touch_rows_worker(table, mode, rows, values, lo, hi):
    ahead = rows_ahead(values.shape[1])
    for s in range(lo, hi):
        if s + ahead < hi:
            prefetch_row(table, mode, rows[s + ahead])
        _touch_row(table.param, table.moments, table.counts, rows[s], values, s, mode)


@_parallel_jit()
def _touch_rows(bounds, table, mode, rows, values):
    for t in prange(len(bounds) - 1):
        _touch_rows_worker(table, mode, rows, values, bounds[t], bounds[t + 1])


@_jit()
def _touch_entries_worker(table, rows, columns, data, lo, hi):
    ahead = 16
    for e in range(lo, hi):
        if e + ahead < hi:
            prefetch_element(table, rows[e + ahead], columns[e + ahead])
        r, j, g = rows[e], columns[e], data[e]
        table.param[r, j] += g
        table.moments[r, 0, j] += g
        table.moments[r, 1, j] += g
        table.counts[r, j] += 1


@_parallel_jit()
def _touch_entries(bounds, table, rows, columns, data):
    for t in prange(len(bounds) - 1):
        _touch_entries_worker(table, rows, columns, data, bounds[t], bounds[t + 1])


@_jit()
def _read_worker(values, lo, hi):
    largest = np.int32(0)
    for i in range(np.uint64(lo), np.uint64(hi)):  # unsigned, or it is not vectorized
        largest = max(largest, values[i])
    return largest


@_parallel_jit()
def _read(values, out):
    chunks = len(out)
    for t in prange(chunks):
        out[t] = _read_worker(values, len(values) * t // chunks, len(values) * (t + 1) // chunks)


class Limit(Contender):
    """A contender that moves the bytes of a case's steps and does nothing else.

    Parameters
    ----------
    case : Case
        Rows, unique and in order, or CSR.
    step_counts : {"element", "row", "global"}
    threads : int
    reads : int
        How often the gradient is read: 2 if it has to be seen as a whole before the first write.
    """

    def __init__(self, case: Case, *, step_counts: str, threads: int, reads: int = 1) -> None:
        super().__init__(case)
        state = TableState("limit", case.table(), step_counts)
        state.arrays.moments[...] = 0.1
        state.arrays.counts[...] = 0
        self._table, self._mode, self._threads, self._reads = state.arrays, state.mode, threads, reads
        self._turns = itertools.cycle([self._arguments(arrays) for arrays in case.arrays()])
        self._out = np.empty(threads, np.int32)

    def _arguments(self, arrays: Arrays) -> tuple[Callable[..., None], np.ndarray, tuple[Any, ...]]:
        if isinstance(arrays, Rows):
            bounds = np.arange(self._threads + 1) * len(arrays.rows) // self._threads
            return _touch_rows, arrays.values, (bounds, self._table, self._mode, *arrays)
        assert isinstance(arrays, CSR)
        rows = np.repeat(np.arange(len(arrays.indptr) - 1, dtype=np.int32), np.diff(arrays.indptr))
        bounds = np.arange(self._threads + 1) * len(rows) // self._threads
        return _touch_entries, arrays.data, (bounds, self._table, rows, arrays.indices, arrays.data)

    def ready(self) -> None:
        """Take the next gradient."""
        self._kernel, self._values, self._given = next(self._turns)

    def step(self) -> None:
        """Move its bytes."""
        with team(self._threads):
            if self._reads == 2:
                _read(self._values.reshape(-1).view(np.int32), self._out)
            self._kernel(*self._given)


# case, step_counts, on_nonfinite
LINES = [
    *[
        (name, "row", on_nonfinite)
        for name in ("rows-6Mx16", "rows-3Mx32", "rows-2Mx64", "rows-1Mx128")
        for on_nonfinite in ("propagate", "raise")
    ],
    *[
        (name, "element", "propagate")
        for name in ("rows-6Mx16", "rows-2Mx64", "rows-2Mx64-half", "csr-400kx1024")
    ],
]


def fraction(name: str, step_counts: str, on_nonfinite: str, threads: int, repeats: int) -> dict[str, float]:
    """Time a case and its limit in turn; return the medians in seconds, and the fraction."""
    case = CASES[name]
    reads = 2 if on_nonfinite == "raise" else 1
    contenders: dict[str, Contender] = {
        "limit": Limit(case, step_counts=step_counts, threads=threads, reads=reads),
        "ours": Ours(case, step_counts=step_counts, threads=threads, on_nonfinite=on_nonfinite),
    }
    seconds = alternate(contenders, repeats)
    medians = {who: statistics.median(times) for who, times in seconds.items()}
    return {**medians, "fraction": medians["limit"] / medians["ours"]}


def main() -> int:
    """Measure, print, and write a JSON file if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each contender (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--case", nargs="*", help="only these cases")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    figures = []
    print(f"{'case':<18}{'counts':<9}{'non-finite':<11}{'limit ms':>9}{'ours ms':>9}{'fraction':>10}")
    for name, step_counts, on_nonfinite in LINES:
        if args.case and name not in args.case:
            continue
        figure = fraction(name, step_counts, on_nonfinite, args.threads, args.repeats)
        print(
            f"{name:<18}{step_counts:<9}{on_nonfinite:<11}{figure['limit'] * 1e3:9.2f}"
            f"{figure['ours'] * 1e3:9.2f}{figure['fraction']:10.3f}",
            flush=True,
        )
        figures.append({"case": name, "step_counts": step_counts, "on_nonfinite": on_nonfinite, **figure})
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
