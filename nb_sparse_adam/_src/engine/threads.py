# SPDX-License-Identifier: Apache-2.0
"""When a driver runs on several threads, on how many, and what keeps that from taking the process down.

* numba's ``workqueue`` layer aborts the process if two threads enter parallel kernels at once, ours or a
  user's: on it, kernels run on one thread while other Python threads are alive. ``omp`` and ``tbb`` are
  entered concurrently.
* GNU OpenMP kills a forked child at its first parallel kernel if the parent has run one. A child that was
  forked after threads were started stays on one thread, and says so once.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from typing import Any, NamedTuple

import numba

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.cpu_limits import most_threads
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.parallel import get_threads
from nb_sparse_adam.errors import SparseAdamWarning

_lost_threads = False  # threads were started before this process was forked, and are not here
_has_warned = False


class Partition(NamedTuple):
    """Into how many parts work is cut, and how many threads take them at once.

    Work of one part is for serial drivers and starts no thread. A partition with more parts than threads runs
    the same compiled driver as one with as many of both: `pacing` tries fewer threads without compiling.
    """

    parts: int
    threads: int


ALONE = Partition(1, 1)


def max_threads() -> int:
    """The largest number of threads that numba can be asked for in this process."""
    return int(numba.config.NUMBA_NUM_THREADS)


def _layer_is_running() -> bool:
    try:
        numba.threading_layer()
    except ValueError:
        return False
    return True


@functools.cache
def threading_layer() -> str:
    """Numba's threading layer; its threads are started, here or in the process that this was forked from.

    Raises
    ------
    ValueError
        If NUMBA_THREADING_LAYER asks for one that cannot be loaded.
    """
    numba.get_num_threads()
    return str(numba.threading_layer())


@jit(entry=True)
def _threads_now() -> Any:
    return get_threads()


def numba_threads() -> int:
    """What `numba.get_num_threads` says to this thread.

    That function takes a lock of numba's at every call, by lines of Python between which an interrupt would
    leave it held: all other threads that ask would then wait for ever.
    """
    threading_layer()  # numba's functions are there when its threads have been started
    return int(_threads_now())


def usable_threads(requested: int | None) -> int:
    """How many threads a parallel kernel may use now; 1 in a forked child whose parent had started threads.

    Parameters
    ----------
    requested : int or None
        None: as many as `numba.get_num_threads` says, OMP_NUM_THREADS and the process's share of the cores
        allow (see `cpu_limits`).
    """
    if requested == 1 or max_threads() == 1:
        return 1
    if _lost_threads:
        _warn_of_fork()
        return 1
    return min(numba_threads(), most_threads()) if requested is None else requested


def run(drivers: Drivers, partition: Partition, job: Any, after: Drivers | None = None) -> Any:
    """Do a job on the threads of a partition, and return the number that it has ended with.

    Parameters
    ----------
    drivers : Drivers
        Of one part: the serial one is run, and no thread is started.
    partition : Partition
    job : record
    after : Drivers, optional
        What is done with the job as well, if the number is -1.
    """
    # At the last moment: if no other Python thread is there now, none can begin before the kernel has ended.
    if partition.parts == 1 or _lost_threads or (threading_layer() == "workqueue" and _has_company()):
        return drivers.serial(1, job, after)
    return drivers.parallel(partition.threads, job, after)


def _has_company() -> bool:
    """Whether another Python thread may call a parallel kernel.

    ``threading`` knows of threads that are just being started, the interpreter of those that C code has made,
    once they have come to Python. A thread that calls compiled code without it is seen by neither. The
    monitor of tqdm's bars, which any bar starts, calls no kernel.
    """
    if threading.active_count() == 1 and len(sys._current_frames()) == 1:
        return False
    monitors = {t.ident for t in threading.enumerate() if type(t).__module__ == "tqdm._monitor"}
    others = {t.ident for t in threading.enumerate()}.union(sys._current_frames()) - monitors
    return others != {threading.get_ident()}


def _warn_of_fork() -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            "this process was forked after numba's threads were started, and they do not survive a fork: "
            "SparseAdam runs on one thread here. Start workers with the 'spawn' or 'forkserver' method, or "
            "set num_threads=1 to silence this warning",
            SparseAdamWarning,
            stacklevel=2,
        )


def _forked() -> None:
    global _lost_threads, _has_warned
    _lost_threads, _has_warned = _layer_is_running(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
