# SPDX-License-Identifier: Apache-2.0
"""Locks that no interrupt leaves held, and for which no forked child waits: who held them is not there.

Before a fork the locks of all optimizers are taken, and numba's, as far as they can be had soon: an
optimizer is then between two steps, and the child may step it, save it or read it. One that another thread
does not let go of in time may be in the middle of a step, which nobody will end in the child: there, it
refuses to be used.
"""

from __future__ import annotations

import itertools
import operator
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from numba.core import compiler_lock
from numba.np.ufunc import parallel

from nb_sparse_adam.errors import StateError

# Seconds that a fork waits. For the optimizers: longer than a step takes, but a save may take minutes, and a
# loader that starts workers meanwhile is not to be held up. For numba: a compilation takes some seconds, and
# in a child that was forked in the midst of one nothing could be compiled.
_PATIENCE, _PATIENCE_WITH_NUMBA = 0.5, 60.0

_owners: dict[int, tuple[weakref.ref[Any], str, bool]] = {}
_numbers, _room = (
    itertools.count(),
    [64],
)  # of owners; how many there may be before those that are gone are let go
_taken: dict[int, list[list[Any]]] = {}  # by a thread, for each of the forks that it is in just now

LOST = (
    "this process was forked while another thread was using this optimizer, perhaps in the middle of a step: "
    "its tables and state may be those of no step. Restore a checkpoint into it "
    "(nb_sparse_adam.checkpoint.restore), or, where it is one of torch or has a state_dir, make a new one, "
    "which loads a state dict; or fork while no other thread steps"
)


class _Lost:
    """In the place of a lock that a thread of the parent's held."""

    def __enter__(self) -> None:
        raise StateError(LOST)

    def __exit__(self, *exception: object) -> None:
        raise AssertionError


def new_lock(owner: Any, attribute: str, outer: bool = False) -> Any:
    """Make a re-entrant lock for an attribute of an object, that is a free one in forked children.

    Parameters
    ----------
    owner : object
        Of a class that has weak references. It is not kept alive.
    attribute : str
        Which the caller sets to the lock.
    outer : bool, default False
        Whether a thread that holds it takes other locks then.
    """
    if len(_owners) >= _room[0]:  # not by callbacks of weak references, which would swallow an interrupt
        for number, (reference, *_) in list(_owners.items()):
            if reference() is None:
                _owners.pop(number, None)
        _room[0] = 2 * len(_owners) + 64
    _owners[next(_numbers)] = weakref.ref(owner), attribute, outer
    return threading.RLock()


def hold(locks: Sequence[Any], work: Callable[[], None]) -> None:
    """Do the work while all of these re-entrant locks are held.

    No signal handler comes between a lock and the ``with`` statement that lets go of it. It does come between
    two lines of `contextlib.ExitStack`, which is written in Python.
    """
    if len(locks) == 1:
        with locks[0]:
            work()
    elif locks:
        a, b, c, d, e, f, g, h = (*locks[:8], *[locks[0]] * (8 - len(locks)))
        with a, b, c, d, e, f, g, h:
            hold(locks[8:], work)
    else:
        work()


def is_lost(lock: Any) -> bool:
    """Whether a thread that is gone held it, whatever stands in its place."""
    return isinstance(lock, _Lost)


def renew(owner: Any, attribute: str) -> None:
    """Have an owner's lock be used again, though a thread that is gone held it: all is to be written anew."""
    setattr(owner, attribute, threading.RLock())


def _locks() -> list[tuple[Any, str, Any]]:
    """Owners with their attributes and locks, in the order in which steps take them."""
    known = list(_owners.values())  # in one piece: other threads make owners, and let them go
    found = [(not outer, id(reference()), reference(), attribute) for reference, attribute, outer in known]
    found.sort(key=lambda each: each[:2])
    return [(owner, at, getattr(owner, at)) for *_, owner, at in found if hasattr(owner, at)]


def _numbas_locks() -> list[Any]:
    """Those of numba that a first step takes, as far as this version has them."""
    compiling = getattr(compiler_lock.global_compiler_lock, "_lock", None)
    starting = getattr(parallel, "_backend_init_thread_lock", None)
    return [lock for lock in (compiling, starting) if hasattr(lock, "acquire")]


def _before() -> None:
    taken: list[Any] = []
    _taken.setdefault(threading.get_ident(), []).append(taken)  # a signal handler may fork within a fork
    for patience, locks in (
        (_PATIENCE, [lock for *_, lock in _locks() if not is_lost(lock)]),
        (_PATIENCE_WITH_NUMBA, _numbas_locks()),
    ):
        end = time.monotonic() + patience
        for lock in locks:
            acquire = operator.methodcaller("acquire", timeout=max(end - time.monotonic(), 0))
            taken.extend(filter(acquire, [lock]))  # one call of C: no interrupt between the two


def _in_parent() -> None:
    for lock in reversed((_taken.get(threading.get_ident()) or [[]]).pop()):
        lock.release()


def _in_child() -> None:
    forks = _taken.get(threading.get_ident()) or [[]]
    taken = forks.pop()
    _taken.clear()
    _taken[threading.get_ident()] = forks
    known = set(map(id, taken))
    for owner, attribute, lock in _locks():
        if is_lost(lock):
            continue
        # One that was made after locks were taken may be free as well.
        is_free = id(lock) in known or lock.acquire(blocking=False)
        setattr(owner, attribute, threading.RLock() if is_free else _Lost())
    for lock in reversed(taken):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
