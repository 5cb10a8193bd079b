"""A step, from checked gradients to native calls, each of which runs exactly once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from nb_sparse_adam.engine import kernels
from nb_sparse_adam.engine.batching import BatchWork, Part, choose, plan_batch
from nb_sparse_adam.engine.grouping import Buffers
from nb_sparse_adam.engine.pacing import Pace, Paces
from nb_sparse_adam.engine.planning import Work, plan

__all__ = ["Run", "finish", "prepare"]


class Run:
    """The work of one table in a step, or of a batch of them, and whether it has been done."""

    def __init__(
        self, work: Work | BatchWork, table: kernels.Table, size: int, pace: Pace | None, buffers: Buffers
    ) -> None:
        self.work, self.table, self.size, self.pace, self.buffers = work, table, size, pace, buffers
        self.goal: int | None = None  # what `totals` says when its kernel has run
        self.seconds = 0.0  # that it has taken so far

    @property
    def done(self) -> bool:
        """Whether its kernel has run: all of it, or nothing."""
        return self.goal is not None and int(self.table.totals[0]) >= self.goal

    @property
    def may_have_run(self) -> bool:
        """Whether it cannot be said that nothing has been written."""
        return self.done

    def __call__(self) -> None:
        """Run its kernel."""
        start = time.perf_counter()
        self.goal = int(self.table.totals[0]) + 1
        self.work.run(self.table)
        self.seconds += time.perf_counter() - start

    def close(self) -> None:
        """Give back the memory it worked in, and report how long it took, for the next step's threads."""
        if self.work.memory is not None:
            self.buffers.give_back(self.work.memory)
        if self.pace is not None:
            self.pace.took(self.seconds / self.size)


class _OfBatches(threading.local):
    """What batches keep from step to step: their tables have it each for themselves, and would in vain."""

    def __init__(self) -> None:
        self.buffers, self.paces = Buffers(), Paces()


_of_batches = _OfBatches()  # of each Python thread


def prepare(parts: Sequence[Any]) -> list[Any]:
    """Prepare a step of one table or several, up to the first write.

    Parameters
    ----------
    parts : sequence of Part or DevicePart

    Raises
    ------
    GradientError
        As `SparseAdam.step`; nothing has been written then.
    """
    if len(parts) == 1 and not parts[0].table.on_gpu:
        return [_prepare_one(parts[0])]
    on_gpu = [part for part in parts if part.table.on_gpu]
    if not on_gpu:
        return _prepare_on_host(parts)
    from nb_sparse_adam.cuda import steps

    on_host = [part for part in parts if not part.table.on_gpu]
    return [*_prepare_on_host(on_host), *steps.prepare(on_gpu, waits=bool(on_host))]


def _prepare_on_host(parts: Sequence[Part]) -> list[Any]:
    if len(parts) == 1:
        return [_prepare_one(parts[0])]
    for part in parts:  # before batches are chosen by the dtypes of their counts
        part.table.make_room_for_a_step()
    batches = choose(parts)
    batched = {at for batch in batches for at in batch}
    return [
        *(_prepare_batch([parts[at] for at in batch]) for batch in batches),
        *(_prepare_one(part, has_room=True) for at, part in enumerate(parts) if at not in batched),
    ]


def _prepare_one(part: Part, has_room: bool = False) -> Run:
    start = time.perf_counter()
    table = part.table
    crew, pace = table.paces.crew_for(type(part.checked).__name__, part.size, part.num_threads)
    work = plan(part.checked, part.target, part.on_nonfinite, crew, table.buffers)
    if not has_room:
        table.make_room_for_a_step()
    run = Run(work, part.for_kernels(table, work.check), part.size, pace, table.buffers)
    run.seconds = part.seconds + time.perf_counter() - start
    return run


def _prepare_batch(parts: Sequence[Part]) -> Run:
    start = time.perf_counter()
    size = sum(part.size for part in parts)
    crew, pace = _of_batches.paces.crew_for("batch", size, parts[0].num_threads)
    tables = [part.for_kernels(part.table, False) for part in parts]
    work = plan_batch(parts, tables, crew, _of_batches.buffers)
    run = Run(work, tables[0], size, pace, _of_batches.buffers)
    run.seconds = sum(part.seconds for part in parts) + time.perf_counter() - start
    return run


def finish(runs: Sequence[Any]) -> None:
    """Do the work of a step that has been prepared."""
    try:
        run_all(runs)
    except BaseException:  # an interrupt is raised when everything has been written
        for run in runs:
            if run.may_have_run:
                run.close()
        raise
    for run in runs:
        run.close()


def run_all(runs: Sequence[Any]) -> None:
    """Run every kernel exactly once, whatever Python exception comes in between.

    A kernel is one native call that counts itself as done before it returns, so that a signal handler's
    exception (KeyboardInterrupt) finds it either done or not begun.
    """
    if len(runs) > 1:
        for run in runs:
            run.work.rehearse(run.table)  # a failure to compile must come before the first write
    interrupt: BaseException | None = None
    for _ in range(100):  # an exception that comes back every time is not an interrupt
        try:
            for run in runs:
                if not run.done:
                    run()
            break
        except BaseException as error:
            interrupt = error
            if not any(run.may_have_run for run in runs):
                raise
    if interrupt is not None:
        raise interrupt
