"""When a kernel runs on several threads, on how many, and what keeps that from taking the process down.

* numba's ``workqueue`` layer aborts the process if two Python threads enter parallel kernels at once: on it,
  and as long as the layer is not known, they take turns. ``omp`` and ``tbb`` are entered concurrently.
* GNU OpenMP kills a forked child at its first parallel kernel if the parent has run one. A child that was
  forked after threads were started stays on one thread, and says so once.
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import NamedTuple

import numba

from nb_sparse_adam.errors import SparseAdamWarning

__all__ = ["ALONE", "Crew", "max_threads", "team", "usable_threads"]

_imported_in = os.getpid()
_launched_in: int | None = None  # the process in which a parallel kernel is known to work
_warned_in: int | None = None
_turn = threading.RLock()


class Crew(NamedTuple):
    """Into how many parts work is cut, and how many threads take them at once.

    Work of one part is for the serial kernels and starts no thread. A crew with more parts than threads runs
    the same compiled kernel as one with as many of both: `pacing` tries fewer threads without compiling.
    """

    parts: int
    threads: int


ALONE = Crew(1, 1)


def max_threads() -> int:
    """The largest number of threads that numba can be asked for in this process."""
    return int(numba.config.NUMBA_NUM_THREADS)


def layer_is_running() -> bool:
    """Whether numba's threads were started, here or in the process that this one was forked from."""
    try:
        numba.threading_layer()
    except ValueError:
        return False
    return True


def usable_threads(requested: int | None) -> int:
    """How many threads a parallel kernel may use now; 1 in a forked child whose parent had started threads.

    Parameters
    ----------
    requested : int or None
        None: as many as `numba.get_num_threads` says.
    """
    if requested == 1 or max_threads() == 1:
        return 1
    if _launched_in != os.getpid() and os.getpid() != _imported_in and layer_is_running():
        _warn_of_fork()
        return 1
    return numba.get_num_threads() if requested is None else requested


def _warn_of_fork() -> None:
    global _warned_in
    if _warned_in != os.getpid():
        _warned_in = os.getpid()
        warnings.warn(
            "this process was forked after numba's threads were started, and they do not survive a fork: "
            "SparseAdam runs on one thread here. Start workers with the 'spawn' or 'forkserver' method, or "
            "set num_threads=1 to silence this warning",
            SparseAdamWarning,
            stacklevel=2,
        )


class team:  # noqa: N801 (used like a function; a generator's context manager costs twice as much)
    """Run kernels in the body on a crew's threads: ``with team(crew): ...``. numba's setting is restored.

    A crew of one part starts no thread, and takes no turn: its kernels must be serial ones.
    """

    __slots__ = ("before", "crew", "takes_turn")

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.takes_turn = False
        self.before = crew.threads

    def __enter__(self) -> None:
        global _launched_in
        if self.crew.parts == 1:
            return
        self.takes_turn = not layer_is_running() or numba.threading_layer() == "workqueue"
        if self.takes_turn:
            _turn.acquire()
        try:
            self.before = numba.get_num_threads()
            if self.before != self.crew.threads:
                numba.set_num_threads(self.crew.threads)
            _launched_in = os.getpid()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        if self.before != self.crew.threads:
            numba.set_num_threads(self.before)
        if self.takes_turn:
            _turn.release()
