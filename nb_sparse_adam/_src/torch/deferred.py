# SPDX-License-Identifier: Apache-2.0
"""Deferred steps on a GPU: the reason why one was refused is raised later, for all parameters concerned.

Each parameter has an engine of its own. If one engine refuses a step, all engines that take part in the step
refuse it; but only that one knows the reason, and each refuses all further steps until it has been asked. So
engines that have taken a step together are asked together, even if the next step is of only a few of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from nb_sparse_adam._src.torch.param_state import ParamState
from nb_sparse_adam.errors import GradientError


def raise_what_is_known(param_states: Iterable[ParamState]) -> None:
    """Raise the error of an earlier step, if it is known by now; wait for nothing."""
    concerned = _with_others(param_states)
    if any(each.table.backend.has_refused for each in concerned):
        settle(concerned)


def settle(param_states: Iterable[ParamState]) -> None:
    """Wait for all steps on a GPU, and raise the error of one that was refused; the next starts afresh."""
    found: list[GradientError] = []
    for param_state in _with_others(param_states):
        try:
            param_state.engine.synchronize()
        except GradientError as error:
            found.append(error)
        param_state.recount()
    if found:
        raise found[0]


@contextmanager
def one_step(param_states: list[ParamState], beside_others: bool = False) -> Iterator[None]:
    """Take a step of these parameters in the body; ``beside_others``: of other tables of the host, too."""
    on_gpu = [each for each in param_states if each.on_gpu]
    if all(each.checks != "deferred" for each in on_gpu):
        yield
        return
    _join(on_gpu)
    if beside_others or len(on_gpu) < len(param_states) or any(each.checks == "immediate" for each in on_gpu):
        settle(on_gpu)  # the engine is going to wait, and must find errors of this step only
    try:
        yield
    except GradientError as error:
        try:
            settle(on_gpu)
        except GradientError as earlier:
            raise earlier from error
        raise


def _join(param_states: list[ParamState]) -> None:
    if all(each.together is param_states[0].together for each in param_states):
        return
    together = weakref.WeakSet(_with_others(param_states))
    # Those of this step come last: if an interrupt leaves one out, the next step joins them again.
    for param_state in [*(together - set(param_states)), *param_states]:
        param_state.together = together


def _with_others(param_states: Iterable[ParamState]) -> list[ParamState]:
    """Return those on a GPU, and all that took part in a deferred step with one of them."""
    found = dict.fromkeys(each for each in param_states if each.on_gpu)
    for together in {id(each.together): each.together for each in found}.values():
        found.update(dict.fromkeys(together))
    return list(found)
