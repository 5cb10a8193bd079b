"""Deferred steps on a GPU: what one of them was refused for is raised later, for all that it concerns.

Each parameter has an engine of its own. What one engine refuses in a step, all that take part in it refuse;
but only that one can say why, and each refuses all further steps until it has been asked. So those that have
been in a step together are asked together, even if the next step is one of a few of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from nb_sparse_adam.errors import GradientError
from nb_sparse_adam.torch.held import Held

__all__ = ["one_step", "raise_what_is_known", "settle"]


def raise_what_is_known(helds: Iterable[Held]) -> None:
    """Raise what a step of some time ago was refused for, if that is known by now; wait for nothing."""
    concerned = _with_others(helds)
    if any(held.has_refused for held in concerned):
        settle(concerned)


def settle(helds: Iterable[Held]) -> None:
    """Wait for all steps on a GPU, and raise what one was refused for; the next one is a new beginning."""
    found: list[GradientError] = []
    for held in _with_others(helds):
        try:
            held.engine.synchronize()
        except GradientError as error:
            found.append(error)
        held.recount()
    if found:
        raise found[0]


@contextmanager
def one_step(helds: list[Held | None]) -> Iterator[None]:
    """Let the body make a step of these parameters; None stands for those on the CPU."""
    on_gpu = [held for held in helds if held is not None]
    if all(held.checks != "deferred" for held in on_gpu):
        yield
        return
    _join(on_gpu)
    if len(on_gpu) < len(helds) or any(held.checks == "immediate" for held in on_gpu):
        settle(on_gpu)  # the engine is going to wait, and must find errors of this step only
    try:
        yield
    except GradientError as error:
        try:
            settle(on_gpu)
        except GradientError as earlier:
            raise earlier from error
        raise


def _join(helds: list[Held]) -> None:
    if all(held.together is helds[0].together for held in helds):
        return
    together = weakref.WeakSet(_with_others(helds))
    # Those of this step come last: if an interrupt leaves one out, the next step joins them again.
    for held in [*(together - set(helds)), *helds]:
        held.together = together


def _with_others(helds: Iterable[Held]) -> list[Held]:
    """Those on a GPU, and all that were in a deferred step with one of them."""
    found = dict.fromkeys(held for held in helds if held.on_gpu)
    for together in {id(held.together): held.together for held in found}.values():
        found.update(dict.fromkeys(together))
    return list(found)
