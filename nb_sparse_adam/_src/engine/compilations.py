# SPDX-License-Identifier: Apache-2.0
"""What this process compiles is counted, and, the first time that it takes long, told to whoever waits.

It is told when the disk cache has looked for a kernel in vain: before the compilation, and before numba has
begun anything that a handler of the user's could disturb, even if it takes a step itself. It is logged, at
INFO, which Python shows nobody who has not asked for it.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import NamedTuple

LOGGER = logging.getLogger("nb_sparse_adam")
WARM_UP = (
    "The first step of a kind waits some 5 to 15 seconds for it; nb_sparse_adam.warm_up(), or the command "
    "nb-sparse-adam warm-up, compiles ahead. "
)


class Announcement(NamedTuple):
    """What is told of a kernel that takes about a second to compile, or longer."""

    what: str = ""  # is compiled; nothing is told of others
    hint: str = ""  # how long it takes, and what spares the next one the wait: a sentence and a space


class Counts(NamedTuple):
    """How many kernels have been compiled, and how many of these were written to the disk."""

    compiled: int
    kept: int


_counts = Counts(0, 0)
_announced = False


def counts() -> Counts:
    """Return how many kernels this process has compiled so far."""
    return _counts


def kept() -> None:
    """Take note that a kernel was written to the disk."""
    global _counts
    _counts = _counts._replace(kept=_counts.kept + 1)


def begun(announcement: Announcement, folder: str | None) -> None:
    """Take note that a kernel is about to be compiled, and log it if it is the first one to be announced.

    Parameters
    ----------
    announcement : Announcement
        Of the kernel.
    folder : str or None
        Where it will be kept. None: nowhere.
    """
    global _counts, _announced
    _counts = _counts._replace(compiled=_counts.compiled + 1)
    if _announced or not announcement.what or not LOGGER.isEnabledFor(logging.INFO):
        return
    _announced = True
    where = (
        "in every process, for no folder can be written to: set NUMBA_CACHE_DIR to one that can"
        if folder is None
        else f"once on this machine, for it is kept in {folder}"
    )
    with suppress(Exception):  # a handler that fails is not a step that does
        LOGGER.info("compiling %s, %s. %sSaid once", announcement.what, where, announcement.hint)
