# SPDX-License-Identifier: Apache-2.0
"""A step: of one optimizer or several, on any backends, all or nothing, and each table exactly once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from nb_sparse_adam._src.backend import Request, Run
from nb_sparse_adam._src.engine import locks
from nb_sparse_adam.errors import OptionError

if TYPE_CHECKING:
    from nb_sparse_adam._src.optimizer import SparseAdam


def step_together(
    steps: Sequence[tuple[SparseAdam, Any]], others: Sequence[Callable[[], Request]] = ()
) -> None:
    """Step several optimizers as one: everything is checked before anything is written.

    Parameters
    ----------
    steps : sequence of (SparseAdam, gradient)
        Each optimizer once, with what its `SparseAdam.step` takes.
    others : sequence of callable
        For tables of no optimizer, which the caller keeps others from stepping: each gives a request.

    Raises
    ------
    GradientError, TableError
        As `SparseAdam.step`; nothing has been changed then, in any table of any optimizer.
    """
    if len({id(optimizer) for optimizer, _ in steps}) != len(steps):
        raise OptionError("step_together got an optimizer twice, expected each of them once")
    step_alone([(optimizer, gradient, None) for optimizer, gradient in steps], others)


def step_alone(
    steps: Sequence[tuple[SparseAdam, Any, Any]], others: Sequence[Callable[[], Request]] = ()
) -> None:
    """Step optimizers while no other Python thread steps one of them."""

    def work() -> None:
        requests = [each for optimizer, *given in steps for each in optimizer._requests(*given)]
        finish(prepare([*requests, *(other() for other in others)]))

    alone: Callable[[], None] = work
    for backend in dict.fromkeys(each for optimizer, *_ in steps for each in optimizer._backends()):
        if backend.has_streams:
            alone = partial(backend.step_alone, alone)
    ordered = sorted((optimizer for optimizer, *_ in steps), key=id)  # one order: no deadlock
    locks.hold([optimizer._lock for optimizer in ordered], alone)


def prepare(requests: Sequence[Request]) -> Sequence[Run]:
    """Make a step ready, whatever backends its tables are on, up to the first write."""
    by_kind: dict[str, list[Request]] = {}
    for request in requests:
        by_kind.setdefault(request.table.backend.kind, []).append(request)
    groups = sorted(by_kind.values(), key=lambda group: group[0].table.backend.has_streams)  # the host first
    waits = len(groups) > 1
    return [run for group in groups for run in group[0].table.backend.prepare(group, waits)]


def finish(runs: Sequence[Run]) -> None:
    """Do what has been prepared: each run exactly once, whatever Python exception comes in between.

    A run is one native call that says that it is done as its last act, so that a signal handler's exception
    (KeyboardInterrupt) finds it either done or not begun; on a GPU, one that does nothing if it is repeated.
    An interrupt that comes after the first write is raised when everything has been written.
    """
    if len(runs) > 1:
        for run in runs:
            run.rehearse()  # a failure to compile must come before the first write
    try:
        run_all(runs)
    except BaseException:
        for run in runs:
            if run.may_have_run:
                run.close()
        raise
    for run in runs:
        run.close()


def run_all(works: Sequence[Any]) -> None:
    """Call everything until it is done, again if an exception comes in between, which is raised then.

    Parameters
    ----------
    works : sequence of Run, or of callable
        A callable without ``done`` may be called again from the beginning.
    """
    try:
        for work in works:
            work()
        return
    except BaseException as error:
        if not any(getattr(work, "may_have_run", True) for work in works):
            raise
        interrupt = error
    for _ in range(100):  # an exception that comes back every time is not an interrupt
        try:
            for work in works:
                if not getattr(work, "done", False):
                    work()
            break
        except BaseException as error:  # noqa: BLE001 (raised below)
            interrupt = error
    raise interrupt
