# SPDX-License-Identifier: Apache-2.0
"""asv's tracking set: some ratios, and counts, that are worth a line through all commits.

Public API of the commit that is measured, beside torch, beside a limit that is the same for all commits, or
beside a kernel that one would write by oneself: in turn, in one process, so that ratios can be compared where
times cannot. asv takes the smaller of two numbers for the better one: our time is always above the line.
`version` is for asv, which begins another line when it changes: raise it when something else is measured.
"""

from __future__ import annotations

import json
import operator
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import counts, need_memory
from benchmarks.limit import Limit
from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam._src.bench.cases import CASES
from nb_sparse_adam._src.bench.contenders import Contender, Ours
from nb_sparse_adam._src.bench.in_torch import DropInRows, FusedBag
from nb_sparse_adam._src.bench.peers import TorchBag, TorchRows
from nb_sparse_adam._src.bench.timing import alternate

THREADS, REPEATS = 2, 31


def _make(contender: Callable[..., Any], case: str, threads: int = THREADS, **options: Any) -> Any:
    return contender(CASES[case], threads=threads, **options)


def _beside_the_limit(case: str, step_counts: str) -> tuple[Contender, Contender]:
    ours = _make(Ours, case, step_counts=step_counts, on_nonfinite="propagate")
    return ours, Limit(ours, THREADS)


def _beside_torch(
    case: str, other: Callable[..., Any], threads: int = THREADS, **options: Any
) -> tuple[Contender, Contender]:
    return _make(Ours, case, threads, step_counts="element"), _make(other, case, threads, **options)


class _Ratio:
    """Our time over another contender's: the median over pairs of steps, one taken right after the other."""

    version = 1
    timeout = 300
    loop = 1  # steps that are timed together
    param_names = ["work"]
    pairs: dict[str, Callable[[], tuple[Contender, Contender]]] = {}

    def setup(self, work: str) -> None:
        """Measure: a setup is where asv takes NotImplementedError for n/a."""
        need_memory(6)
        ours, other = self.pairs[work]()
        seconds = alternate({"ours": ours, "other": other}, REPEATS, self.loop)
        self.ratio = statistics.median(map(operator.truediv, seconds["ours"], seconds["other"]))

    def track_time(self, work: str) -> float:
        return self.ratio


class OverTheLimit(_Ratio):
    """A step over what moves its bytes, in its memory, and computes nothing."""

    unit = "of the limit's time"
    loop = 4
    pairs = {
        "rows, counts by row": lambda: _beside_the_limit("rows-2Mx64", "row"),
        "rows, counts by element": lambda: _beside_the_limit("rows-2Mx64", "element"),
        "CSR": lambda: _beside_the_limit("csr-2Mx64", "element"),
    }
    params = [list(pairs)]


class OverTorch(_Ratio):
    """A step over torch's: of gradients as they are, and inside torch."""

    unit = "of torch's time"
    pairs = {
        "sorted rows": lambda: _beside_torch("rows-2Mx64", TorchRows, coalesced=True),
        "bags of long-tailed ids": lambda: _beside_torch("bag-zipf", TorchBag),
        "its optimizer replaced": lambda: (
            _make(DropInRows, "rows-zipf", coalesced=False),
            _make(TorchRows, "rows-zipf", coalesced=False),
        ),
        "its EmbeddingBag replaced": lambda: (_make(FusedBag, "bag-uniform"), _make(TorchBag, "bag-uniform")),
    }
    params = [list(pairs)]


class SmallOverTorch(_Ratio):
    """A step that has next to nothing to do, over torch's, on one thread: what a call costs."""

    unit = "of torch's time"
    loop = 200
    pairs = {
        "1 row of 16": lambda: _beside_torch("small-1x16", TorchRows, 1, coalesced=True),
        "32 rows of 16": lambda: _beside_torch("small-32x16", TorchRows, 1, coalesced=True),
    }
    params = [list(pairs)]


def _table_and_fixed(case: str, after_lookup: bool) -> tuple[Contender, Contender]:
    try:
        from nb_sparse_adam._src.bench.tables import TableUpdate
    except ImportError as error:
        raise NotImplementedError("this commit has no EmbeddingTable") from error
    fixed = _make(Ours, case, step_counts="row")
    return _make(TableUpdate, case, after_lookup=after_lookup), fixed


class TableOverFixed(_Ratio):
    """A step of a table whose rows are named by ids, over one of a table whose rows are numbered."""

    unit = "of a fixed table's time"
    pairs = {
        "long-tailed ids, just looked up": lambda: _table_and_fixed("rows-zipf", True),
        "long-tailed ids": lambda: _table_and_fixed("rows-zipf", False),
        "uniform ids of rows of 16": lambda: _table_and_fixed("rows-2Mx16-shuffled", False),
    }
    params = [list(pairs)]


class TwoThreads(_Ratio):
    """A step on two threads over one on one thread: 0.5 is perfect."""

    unit = "of one thread's time"
    loop = 4
    pairs = {
        "sorted rows": lambda: (
            _make(Ours, "rows-2Mx64", 2, step_counts="element"),
            _make(Ours, "rows-2Mx64", 1, step_counts="element"),
        )
    }
    params = [list(pairs)]


class Memory:
    """What the process grows by in a first step over all rows, over the size of the table."""

    version = 1
    unit = "of the table"
    param_names = ["step_counts"]
    params = [["element", "row", "global"]]

    def setup(self, step_counts: str) -> None:
        need_memory(2)
        clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
        if not clear.exists():
            raise NotImplementedError("needs Linux's /proc")

        def kilobytes(what: str) -> int:
            return int(re.findall(rf"^{what}:\s*(\d+) kB", status.read_text(), re.MULTILINE)[0])

        def step(rows: int) -> None:
            values = np.ones((rows, 64), np.float32)
            gradient, table = RowGradient(np.arange(rows), values), values.copy()
            clear.write_text("5")  # the peak is what there is now
            before = kilobytes("VmRSS")
            SparseAdam(table, step_counts=step_counts).step(gradient)
            self.growth = 1024 * (kilobytes("VmHWM") - before) / table.nbytes

        step(100)  # compiles
        step(500_000)

    def track_growth(self, step_counts: str) -> float:
        return self.growth


class Import:
    """``import nb_sparse_adam`` over the import of numba before it, in new interpreters."""

    version = 1
    unit = "of numba's time"
    program = """
import time
start = time.perf_counter()
import numba, numpy
between = time.perf_counter()
import nb_sparse_adam
print((time.perf_counter() - between) / (between - start))
"""

    def track_time(self) -> float:
        command = [sys.executable, "-c", self.program]
        # Without byte code on the disk half of the time would be Python's compiler.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return statistics.median(float(subprocess.check_output(command, env=env)) for _ in range(7))


class _Counted:
    """What `counts.py` says: the first time, and when it finds its kernels on the disk."""

    version = 1
    timeout = 300

    def setup_cache(self) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, counts.__file__, folder]
            return [json.loads(subprocess.check_output(command)) for _ in range(2)]


class FirstStep(_Counted):
    """The first step of a process over the compilation of a kernel that one would write by oneself."""

    version = 2  # of three compilations the median
    unit = "of a plain kernel's time"
    param_names = ["gradient", "kernels"]
    params = [["rows", "CSR after rows"], ["compiled", "found on disk"]]

    def track_time(self, cache: list[dict[str, Any]], gradient: str, kernels: str) -> float:
        seconds = cache[kernels == "found on disk"]["seconds"]
        return float(seconds[gradient] / seconds["a plain kernel"])


class Counts(_Counted):
    """What has no noise; tests hold it to `counts.LIMITS`."""

    unit = ""
    param_names = ["what"]
    params = [list(counts.LIMITS)]

    def setup(self, cache: list[dict[str, Any]], what: str) -> None:
        if cache[0]["numbers"][what] is None:
            raise NotImplementedError("no loop with square roots of vectors was found")

    def track_count(self, cache: list[dict[str, Any]], what: str) -> float:
        return float(cache[0]["numbers"][what])
