# SPDX-License-Identifier: Apache-2.0
"""asv: the time of a step, of ours, by itself and in torch, and of torch's, and of grouping.

Each sample is one step, or a hundred small ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from benchmarks import need_memory
from nb_sparse_adam._src.bench.cases import CASES
from nb_sparse_adam._src.bench.contenders import Contender, Grouping, NumpyUnique, Ours
from nb_sparse_adam._src.bench.in_torch import DropInRows, FusedBag
from nb_sparse_adam._src.bench.peers import TorchBag, TorchEntries, TorchRows

STEP_COUNTS = ["element", "row", "global"]
THREADS = [1, 2]
SMALL = ["small-1x16", "small-32x16"]
LARGE = ["rows-10Mx16", "rows-80Mx16"]  # 16 GB: of `nb-sparse-adam bench` only


@functools.cache
def _warm(make: Callable[..., Contender], case: str, options: tuple[tuple[str, object], ...]) -> Contender:
    """Make a contender once in a process, compiled, with the pages of its table and its state written to.

    asv calls `setup` before each sample, and making a contender takes seconds. So the tables are not fresh:
    they go on from sample to sample. That changes no time, for a step does the same work whatever the state
    holds.
    """
    need_memory(4)
    try:
        contender = make(CASES[case], **dict(options))
    except ImportError as error:
        raise NotImplementedError(f"not at this commit: {error}") from error
    contender.warm()
    return contender


class _Steps:
    number = 1
    repeat = (8, 40, 4.0)
    rounds = 1
    warmup_time = 0.0
    timeout = 300

    def take(self, make: Callable[..., Contender], case: str, **options: object) -> None:
        self.contender = _warm(make, case, tuple(options.items()))
        self.contender.ready()


class Steps(_Steps):
    """Every case: rows, bags, CSR."""

    param_names = ["case", "step_counts", "threads"]
    params = [[name for name in CASES if name not in SMALL + LARGE], STEP_COUNTS, THREADS]

    def setup(self, case: str, step_counts: str, threads: int) -> None:
        self.take(Ours, case, step_counts=step_counts, threads=threads)

    def time_step(self, case: str, step_counts: str, threads: int) -> None:
        self.contender.step()


class SmallSteps(_Steps):
    """What a call costs when there is next to nothing to do."""

    param_names = ["case", "step_counts", "threads"]
    params = [SMALL, STEP_COUNTS, THREADS]

    def setup(self, case: str, step_counts: str, threads: int) -> None:
        self.take(Ours, case, step_counts=step_counts, threads=threads)

    def time_100_steps(self, case: str, step_counts: str, threads: int) -> None:
        for _ in range(100):
            self.contender.ready()
            self.contender.step()


class NonFinite(_Steps):
    """What looking for NaN and infinity costs: "propagate" does not look."""

    param_names = ["on_nonfinite", "threads"]
    params = [["raise", "skip", "propagate"], THREADS]

    def setup(self, on_nonfinite: str, threads: int) -> None:
        self.take(Ours, "rows-2Mx64", step_counts="row", threads=threads, on_nonfinite=on_nonfinite)

    def time_step(self, on_nonfinite: str, threads: int) -> None:
        self.contender.step()


class TorchRowSteps(_Steps):
    """Rows in torch.optim.SparseAdam; coalesced, it is told that they are unique and in order."""

    param_names = ["case", "coalesced", "threads"]
    params = [["rows-2Mx64", "rows-6Mx16", "rows-uniform", "rows-zipf"], [True, False], THREADS]

    def setup(self, case: str, coalesced: bool, threads: int) -> None:
        if coalesced and case in ("rows-uniform", "rows-zipf"):
            raise NotImplementedError("its ids are neither unique nor in order")
        self.take(TorchRows, case, coalesced=coalesced, threads=threads)

    def time_step(self, case: str, coalesced: bool, threads: int) -> None:
        self.contender.step()


class OtherSteps(_Steps):
    """Ours in torch, torch's, and grouping; of bags in torch with the backward pass, which comes before."""

    what = {
        "torch, bags": (TorchBag, "bag-uniform", {}),
        "torch, bags of long-tailed ids": (TorchBag, "bag-zipf", {}),
        "torch, linear model": (TorchBag, "linear", {}),
        "torch, single entries": (TorchEntries, "csr-400kx1024", {"coalesced": True}),
        "its optimizer replaced, rows": (DropInRows, "rows-uniform", {"coalesced": False}),
        "its optimizer replaced, long-tailed ids": (DropInRows, "rows-zipf", {"coalesced": False}),
        "its layer replaced, bags": (FusedBag, "bag-uniform", {}),
        "its layer replaced, bags of long-tailed ids": (FusedBag, "bag-zipf", {}),
        "its layer replaced, linear model": (FusedBag, "linear", {}),
        "82k long-tailed ids, sorted and cut": (Grouping, "rows-zipf", {}),
    }
    param_names = ["work", "threads"]
    params = [list(what), THREADS]

    def setup(self, work: str, threads: int) -> None:
        make, case, options = self.what[work]
        self.take(make, case, threads=threads, **options)

    def time_step(self, work: str, threads: int) -> None:
        self.contender.step()


class NumpyGroupings(_Steps):
    """NumPy's way to do it: numpy.unique."""

    def setup(self) -> None:
        self.take(NumpyUnique, "rows-zipf")

    def time_unique(self) -> None:
        self.contender.step()
