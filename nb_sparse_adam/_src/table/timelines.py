# SPDX-License-Identifier: Apache-2.0
"""Clocks of several tables that have taken the same steps -> one clock, on which their rows are one table's.

A table's clock advances with each step, and with each time of the day that it notes (`ages`). On the common
clock a moment is the number of steps until then, and of the times that any of the tables had noted by then.
Times that were noted after equally many steps are in the order of the day. So for each table what was later
is not earlier, ages in steps are what they were, and ages in seconds are to the second and by as much too
small as tables were apart in time when they took the same step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.table.ages import thinned

Entries = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]


class Timeline:
    """One clock of several tables.

    Parameters
    ----------
    entries : sequence of (clock, seconds, steps)
        Of each table, what `Ages.entries` has, as arrays.
    """

    def __init__(self, entries: Sequence[Entries]) -> None:
        self._entries = entries
        steps = np.concatenate([each[2] for each in entries])
        # A day's time may have been set back: what a table has noted later is later here, too.
        seconds = np.concatenate([np.maximum.accumulate(each[1]) for each in entries])
        order = np.lexsort((seconds, steps))  # stable: as each table has them
        self._steps = steps[order]
        at = np.empty(len(order), np.int64)
        at[order] = self._steps + 1 + np.arange(len(order))
        ends = np.cumsum([len(each[0]) for each in entries])
        self._at = np.split(at, ends[:-1])  # of each table's, when they are on the common clock
        together = zip(
            np.sort(at).tolist(),
            np.maximum.accumulate(seconds[order]).tolist(),
            self._steps.tolist(),
            strict=True,
        )
        kept = thinned(list(together))
        self.entries: Entries = (
            np.array([each[0] for each in kept], np.int64),
            np.array([each[1] for each in kept], np.float64),
            np.array([each[2] for each in kept], np.int64),
        )

    def at(self, table: int, clocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Say when on the common clock it was what it was on a table's."""
        found: NDArray[np.int64]
        noted, _, steps = self._entries[table]
        k = np.searchsorted(noted, clocks, "right") - 1  # the last that was noted by then
        if not len(noted):
            return np.zeros(len(clocks), np.int64)
        here = np.maximum(k, 0)
        most = np.append(steps[1:], np.iinfo(np.int64).max)[here]  # some may have been forgotten in between
        done = np.minimum(steps[here] + clocks - noted[here], most)
        found = done + np.searchsorted(self._steps, done, "left")
        first = self._at[table][here]
        following = np.append(self._at[table][1:], np.iinfo(np.int64).max)[here]
        found = np.minimum(np.maximum(found, first), following - 1)
        found[clocks == noted[here]] = first[clocks == noted[here]]
        found[k < 0] = 0
        return found
