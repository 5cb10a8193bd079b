# SPDX-License-Identifier: Apache-2.0
"""How many threads this process is meant to use at once, by what its environment and the system say.

numba starts a thread for each core that it finds; it neither reads OMP_NUM_THREADS nor knows of a
container's quota. When a quota is used up, all threads are stopped for the rest of the period (100 ms): a
step that took one thread 7.6 ms took two 10.3 ms under a quota of one core.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 30


@functools.cache
def most_threads() -> int:
    """Threads to use where nobody has asked for a number; read once in a process.

    The lesser of OMP_NUM_THREADS, if that is set, and the quota of cores, rounded up. NUMBA_NUM_THREADS says
    the same thing to numba alone: where it is set, numba has obeyed, and there is no other limit.
    """
    if os.environ.get("NUMBA_NUM_THREADS"):
        return _UNLIMITED
    quota = cpu_quota()
    return min(_openmp_threads(), _UNLIMITED if quota is None else max(1, math.ceil(quota)))


def _openmp_threads() -> int:
    """OMP_NUM_THREADS: a number, or one for each level of nesting, of which we have one."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else _UNLIMITED


def cpu_quota() -> float | None:
    """How many cores the control groups of this process may use at a time; None: there is no limit.

    A group is held to its own limit and to those of all groups around it. A container may see the path of
    its group as the system knows it, but only the files from there on: what cannot be read limits nobody.
    """
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except (OSError, ValueError):
        return None
    quotas = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/"):
            continue
        if controllers == "":
            mounts, read = [CGROUPS, CGROUPS / "unified"], _quota_of_version_2
        elif "cpu" in controllers.split(","):
            mounts, read = [CGROUPS / controllers, CGROUPS / "cpu"], _quota_of_version_1
        else:
            continue
        for mount in mounts:
            group = mount / path.strip("/")
            quotas += [read(folder) for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of_version_2(folder: Path) -> float | None:
    return _ratio(_words(folder / "cpu.max"))  # "max 100000", or "150000 100000"


def _quota_of_version_1(folder: Path) -> float | None:
    return _ratio(_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))  # -1: no limit


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except (OSError, ValueError):
        return []


def _ratio(words: list[str]) -> float | None:
    if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]) > 0:
        return int(words[0]) / int(words[1])
    return None
