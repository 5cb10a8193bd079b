"""asv: what a step takes, and how that compares with torch in the same process."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import cast

import numpy as np

from nb_sparse_adam.grouping import group_ids

from .cases import CASES, Rows
from .contenders import Contender, Ours, TorchBag, TorchRows
from .roofline import LINES, fraction
from .timing import alternate

STEP_COUNTS = ["element", "row", "global"]
THREADS = [1, 2]


@functools.cache
def _warm(make: Callable[..., Contender], case: str, options: tuple[tuple[str, object], ...]) -> Contender:
    """Make a contender once in a process: asv calls `setup` before each sample, and making one takes seconds.

    Its state goes on from sample to sample. That changes no time: a step does the same work whatever the
    state holds.
    """
    contender = make(CASES[case], **dict(options))
    contender.warm()
    return contender


class _Steps:
    number = 1
    repeat = (8, 40, 4.0)
    rounds = 1
    warmup_time = 0.0
    timeout = 180

    def take(self, make: Callable[..., Contender], case: str, **options: object) -> None:
        self.contender = _warm(make, case, tuple(options.items()))
        self.contender.ready()


class RowSteps(_Steps):
    """Unique rows of a table that is several times larger than the cache."""

    param_names = ["case", "step_counts", "threads"]
    params = [
        ["rows-6Mx16", "rows-2Mx64", "rows-2Mx64-shuffled", "rows-2Mx64-half", "rows-1Mx128", "rows-zipf"],
        STEP_COUNTS,
        THREADS,
    ]

    def setup(self, case: str, step_counts: str, threads: int) -> None:
        self.take(Ours, case, step_counts=step_counts, threads=threads)

    def time_step(self, case: str, step_counts: str, threads: int) -> None:
        self.contender.step()


class TorchRowSteps(_Steps):
    """The same rows in torch.optim.SparseAdam, whose step counts are "global"."""

    param_names = ["case", "coalesced", "threads"]
    params = [["rows-2Mx64", "rows-6Mx16"], [True, False], THREADS]

    def setup(self, case: str, coalesced: bool, threads: int) -> None:
        self.take(TorchRows, case, coalesced=coalesced, threads=threads)

    def time_step(self, case: str, coalesced: bool, threads: int) -> None:
        self.contender.step()


class BagSteps(_Steps):
    """4096 bags of 20 lookups: grouping, summing and the step."""

    param_names = ["case", "step_counts", "threads"]
    params = [["bag-uniform", "bag-zipf", "bag-hot", "bag-hot-without", "linear"], STEP_COUNTS, THREADS]

    def setup(self, case: str, step_counts: str, threads: int) -> None:
        self.take(Ours, case, step_counts=step_counts, threads=threads)

    def time_step(self, case: str, step_counts: str, threads: int) -> None:
        self.contender.step()


class TorchBagSteps(_Steps):
    """The same bags in torch: the backward pass of EmbeddingBag and the step."""

    param_names = ["case", "threads"]
    params = [["bag-uniform", "bag-zipf", "linear"], THREADS]

    def setup(self, case: str, threads: int) -> None:
        self.take(TorchBag, case, threads=threads)

    def time_backward_and_step(self, case: str, threads: int) -> None:
        self.contender.step()


class CSRSteps(_Steps):
    """CSR: 16 of 64 elements in 100k of 2M rows; 1 % of the columns in 20k of 400k rows of 1024."""

    param_names = ["case", "threads"]
    params = [["csr-2Mx64", "csr-400kx1024"], THREADS]

    def setup(self, case: str, threads: int) -> None:
        self.take(Ours, case, step_counts="element", threads=threads)

    def time_step(self, case: str, threads: int) -> None:
        self.contender.step()


class Grouping:
    """Sorting 82k long-tailed ids and cutting them into segments, and NumPy's way to do it."""

    number = 1
    repeat = (8, 40, 4.0)
    rounds = 1
    param_names = ["threads"]
    params = [THREADS]

    def setup(self, threads: int) -> None:
        self.ids = cast("Rows", CASES["rows-zipf"].arrays()[0]).rows
        group_ids(self.ids, 2_000_000 - 1, False, threads=threads)

    def time_group(self, threads: int) -> None:
        group_ids(self.ids, 2_000_000 - 1, False, threads=threads)

    def time_numpy_unique(self, threads: int) -> None:
        np.unique(self.ids, return_inverse=True)


class Roofline:
    """The time of a kernel that moves the same bytes over ours, timed in turn: 1 is perfect."""

    unit = "of the limit"
    timeout = 300
    param_names = ["line"]
    params = [[" ".join(line) for line in LINES]]

    def track_fraction(self, line: str) -> float:
        name, step_counts, on_nonfinite = line.split()
        return fraction(name, step_counts, on_nonfinite, threads=2, repeats=15)["fraction"]


class SmallSteps(_Steps):
    """What a call costs when there is next to nothing to do."""

    number = 100
    param_names = ["case"]
    params = [["small-1x16", "small-32x16"]]

    def setup(self, case: str) -> None:
        self.take(Ours, case, step_counts="element", threads=1)

    def time_step(self, case: str) -> None:
        self.contender.step()


class NonFinite(_Steps):
    """What looking for NaN and infinity costs: "propagate" does not look."""

    param_names = ["on_nonfinite"]
    params = [["raise", "skip", "propagate"]]

    def setup(self, on_nonfinite: str) -> None:
        self.take(Ours, "rows-2Mx64", step_counts="row", threads=2, on_nonfinite=on_nonfinite)

    def time_step(self, on_nonfinite: str) -> None:
        self.contender.step()


class TimesFasterThanTorch:
    """torch's median over ours, timed in turn: such a ratio carries over to other machines, times do not."""

    unit = "times faster"
    timeout = 300
    param_names = ["step_counts", "threads"]
    params = [STEP_COUNTS, THREADS]

    def _ratio(
        self,
        torch: Callable[..., Contender],
        case_name: str,
        step_counts: str,
        threads: int,
        **options: object,
    ) -> float:
        case = CASES[case_name]
        contenders: dict[str, Contender] = {
            "torch": torch(case, threads=threads, **options),
            "ours": Ours(case, step_counts=step_counts, threads=threads),
        }
        seconds = alternate(contenders, repeats=15)
        return statistics.median(seconds["torch"]) / statistics.median(seconds["ours"])

    def track_coalesced_rows(self, step_counts: str, threads: int) -> float:
        return self._ratio(TorchRows, "rows-2Mx64", step_counts, threads, coalesced=True)

    def track_uncoalesced_rows(self, step_counts: str, threads: int) -> float:
        return self._ratio(TorchRows, "rows-2Mx64-shuffled", step_counts, threads, coalesced=False)

    def track_zipf_rows(self, step_counts: str, threads: int) -> float:
        return self._ratio(TorchRows, "rows-zipf", step_counts, threads, coalesced=False)

    def track_linear_model(self, step_counts: str, threads: int) -> float:
        return self._ratio(TorchBag, "linear", step_counts, threads)

    def track_zipf_bags(self, step_counts: str, threads: int) -> float:
        return self._ratio(TorchBag, "bag-zipf", step_counts, threads)


class Memory:
    """Peak memory of the process: the difference of the two is what one step of 100k rows of 2M takes."""

    timeout = 180
    param_names = ["step_counts"]
    params = [STEP_COUNTS]

    def peakmem_ready(self, step_counts: str) -> None:
        Ours(CASES["rows-2Mx64"], step_counts=step_counts, threads=2)

    def peakmem_one_step(self, step_counts: str) -> None:
        Ours(CASES["rows-2Mx64"], step_counts=step_counts, threads=2).step()
