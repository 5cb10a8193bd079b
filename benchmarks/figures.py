"""asv: the figures of `nb-sparse-adam bench`, each of medians of steps that two contenders took in turn.

Whatever else the machine did met both, so that these can be compared where times cannot. asv takes the
smaller of two numbers for the better one. So our time is always above the line: the share of the limit, the
roofline fraction, is tracked as *our time / the limit's*, 1.05 where `bench` says 0.95, and the ratio to
torch as *our time / torch's*, 0.1 where `bench` says 10.

A parameter is ``"key of the line: label of the figure"``, as in ``bench.json``.
"""

from __future__ import annotations

from nb_sparse_adam.bench.comparison import reason_to_skip
from nb_sparse_adam.bench.lines import LINES
from nb_sparse_adam.bench.peers import PEERS
from nb_sparse_adam.bench.worker import CannotMeasureError, Settings, measure

THREADS = [1, 2]


def labelled(*beginnings: str) -> list[str]:
    """Return all figures whose labels begin so; not those that need a fixed number of threads or 16 GB."""
    return [
        f"{key}: {figure.label}"
        for key, line in LINES.items()
        for figure in line.figures
        if figure.label.startswith(beginnings)
    ]


class _Figure:
    timeout = 300
    param_names = ["figure", "threads"]

    def setup(self, figure: str, threads: int = 2) -> None:
        """Measure: asv takes NotImplementedError for "skip this" in a setup only.

        Contenders are made anew, and warmed, in every process.
        """
        key, _, label = figure.partition(": ")
        line = LINES[key].only(label)
        settings = Settings(("torch",) if PEERS["torch"].installed else (), threads, quick=False)
        reason = reason_to_skip(line, settings)
        if reason is not None:
            raise NotImplementedError(reason)
        try:
            value = line.figures[0].value(measure(line, settings))
        except CannotMeasureError as error:
            raise NotImplementedError(str(error)) from error
        assert value is not None
        self.value = value


class OverTheLimit(_Figure):
    """Our time over that of a kernel that moves the same bytes: the inverse of the share of the limit."""

    unit = "times the limit's time"
    params = [labelled("of the limit"), THREADS]

    def track_time(self, figure: str, threads: int) -> float:
        return 1 / self.value


class OverTorch(_Figure):
    """Our time over torch's."""

    unit = "of torch's time"
    params = [labelled("torch /"), THREADS]

    def track_time(self, figure: str, threads: int) -> float:
        return 1 / self.value


class OverNumpyUnique(_Figure):
    """Grouping, on one thread, over numpy.unique."""

    unit = "of numpy.unique's time"
    param_names = ["figure"]
    params = [labelled("numpy.unique /")]

    def track_time(self, figure: str) -> float:
        return 1 / self.value


class TimesAsLong(_Figure):
    """One hot row over the batch without it; element counts over row counts; grouping over the whole step."""

    unit = "times as long"
    params = [
        labelled("times as long as without it", "times as long as row counts", "of it grouping"),
        THREADS,
    ]

    def track_time(self, figure: str, threads: int) -> float:
        return self.value


class TwoThreads(_Figure):
    """Two threads over one: 0.5 is perfect."""

    unit = "of one thread's time"
    param_names = ["figure"]
    params = [labelled("times faster")]

    def track_time(self, figure: str) -> float:
        return 1 / self.value


class TwoProcesses(_Figure):
    """A step beside another process on the same two cores, over one that is alone; numba's layers."""

    unit = "times as long"
    param_names = ["figure"]
    params = [labelled("times as long as alone")]

    def track_time(self, figure: str) -> float:
        return self.value


class Scratch(_Figure):
    """Memory that a step takes, and gives back, for each id of the gradient."""

    unit = "bytes an id"
    params = [labelled("bytes an id"), THREADS]

    def track_bytes(self, figure: str, threads: int) -> float:
        return self.value


class LessMemoryThanTorch(_Figure):
    """What the fused backward pass saves of torch's peak memory, in gradients of a row an id; negative."""

    unit = "gradients"
    params = [labelled("torch - "), THREADS]

    def track_memory(self, figure: str, threads: int) -> float:
        return -self.value
