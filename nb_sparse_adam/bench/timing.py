"""Contenders take turns in one process, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import numba

from nb_sparse_adam.bench.contenders import Contender

__all__ = ["alternate"]

ROUNDS_OF_WORK = 2_000_000  # about 2 ms


@numba.njit(nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _work(rounds: Any) -> Any:
    x = 1.0
    for _ in range(rounds):
        x = x * 0.999999 + 1e-6
    return x


def wake_up(cores: int) -> None:
    """Keep cores busy for some milliseconds, as a training step's forward pass does before an update.

    A core that has slept takes up to a millisecond to come back, on a virtual machine more than elsewhere.
    Python threads do it, which leave nothing behind: OpenMP's would go on spinning.
    """
    threads = [threading.Thread(target=_work, args=(ROUNDS_OF_WORK,)) for _ in range(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def alternate(contenders: Mapping[str, Contender], repeats: int, loop: int = 1) -> dict[str, list[float]]:
    """Time the contenders one after the other, `repeats` times over, all of them warm.

    The ratio of their medians can be trusted where the times themselves cannot. Before each timed step the
    machine rests until the threads of the one before are asleep (`Contender.rest`), and is woken up again.

    Parameters
    ----------
    contenders : mapping of str to Contender
        By name.
    repeats : int
        How often each is timed.
    loop : int
        Steps that are timed together, gradients taken included: for steps that are short.

    Returns
    -------
    dict of str to list of float
        The seconds of a step, `repeats` times.
    """
    for contender in contenders.values():
        contender.warm()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    rest = max(contender.rest for contender in contenders.values())
    for _ in range(repeats):
        for name, contender in contenders.items():
            time.sleep(rest)
            wake_up(numba.config.NUMBA_NUM_THREADS)
            contender.ready()
            start = time.perf_counter()
            contender.step()
            for _ in range(loop - 1):
                contender.ready()
                contender.step()
            seconds[name].append((time.perf_counter() - start) / loop)
            rest = contender.rest
    return seconds
