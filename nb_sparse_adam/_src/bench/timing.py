# SPDX-License-Identifier: Apache-2.0
"""Contenders take turns in one process, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from nb_sparse_adam._src.bench.contenders import Contender


def alternate(
    contenders: Mapping[str, Contender], repeats: int, loop: int = 1, longest_rest: float = math.inf
) -> dict[str, list[float]]:
    """Time the contenders one after the other, `repeats` times over, all of them warm.

    The ratio of their medians can be trusted where the times themselves cannot. Before each timed step the
    machine rests until the threads of the one before are asleep (`Contender.rest`), and then takes a step
    that is not timed: to wake up threads is no part of a step in training, where there is no rest.

    Parameters
    ----------
    contenders : mapping of str to Contender
        By name.
    repeats : int
        How often each is timed.
    loop : int
        Steps that are timed together, gradients taken included: for steps that are short.
    longest_rest : float
        Seconds that the machine rests at most: less than contenders ask for, where times do not matter.

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
            time.sleep(min(rest, longest_rest))
            contender.ready()
            contender.step()
            contender.ready()
            start = time.perf_counter()
            contender.step()
            for _ in range(loop - 1):
                contender.ready()
                contender.step()
            seconds[name].append((time.perf_counter() - start) / loop)
            rest = contender.rest
    return seconds
