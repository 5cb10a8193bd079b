# SPDX-License-Identifier: Apache-2.0
"""A step of parameters of one optimizer or several: all of them are updated, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from nb_sparse_adam._src.engine import locks
from nb_sparse_adam._src.gradients import BagGradient, RowGradient
from nb_sparse_adam._src.table.updates import Updates, step_tables
from nb_sparse_adam._src.torch import deferred
from nb_sparse_adam._src.torch.param_state import ParamState
from nb_sparse_adam.errors import TableError

if TYPE_CHECKING:
    from nb_sparse_adam._src.torch.optimizer import SparseAdam


class Job(NamedTuple):
    """A parameter's part of a step."""

    optimizer: SparseAdam
    param: Tensor
    param_state: ParamState
    gradient: RowGradient | BagGradient
    grad: Tensor | None = None  # torch's, where there is one


def in_turn(optimizers: Iterable[SparseAdam], work: Callable[[], None]) -> None:
    """Call `work`, which makes jobs and steps, while no other Python thread steps these optimizers."""
    turns = [optimizer.turn for optimizer in sorted(optimizers, key=id)]  # one order: no deadlock
    locks.hold(turns, work)


# What messages call the arrays of a gradient of an `EmbeddingTable`: what they were in the lookup.
_NAMES = ("input", "grad_output", "offsets", "per_sample_weights")


def step_jobs(jobs: Sequence[Job], tables: Mapping[Updates, RowGradient | BagGradient] | None = None) -> None:
    """Update parameters of one optimizer or several, all or none of them; the caller has their turn.

    So are ``tables``, with the gradient of each `EmbeddingTable`.
    """
    tables = {} if tables is None else tables
    param_states = [job.param_state for job in jobs]
    _refuse_several_gpus([each for each in param_states if each.on_gpu])
    shown = [each.has_run for each in param_states]
    try:
        try:
            with deferred.one_step(param_states, beside_others=bool(tables)):
                steps = [(job.param_state.engine, {job.param_state.name: job.gradient}) for job in jobs]
                step_tables(tables, _NAMES, steps)
        finally:  # an interrupt is raised when everything has been written
            _show(jobs, shown)
    finally:  # and shown: one that came just now has left the rest to this
        _show(jobs, shown)


def _show(jobs: Sequence[Job], shown: list[int]) -> None:
    """Show what steps have changed since; ``shown``, the steps that each engine had taken, is updated."""
    for i, job in enumerate(jobs):
        has_run = job.param_state.has_run
        if has_run != shown[i]:
            job.param_state.has_changed(job.param, job.grad)
            job.optimizer.has_stepped(job.param, job.param_state)
            shown[i] = has_run


def _refuse_several_gpus(param_states: Sequence[ParamState]) -> None:
    for other in param_states[1:]:
        first = param_states[0]
        if other.device != first.device:
            raise TableError(
                f"a step of parameters {first.name} on {first.device} and {other.name} on "
                f"{other.device}, expected one GPU: make an optimizer, or a backward pass, for each"
            )
