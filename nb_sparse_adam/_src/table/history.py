# SPDX-License-Identifier: Apache-2.0
"""Which saves a table is after, and which ids have gone since: what an increment is made of."""

from __future__ import annotations

import secrets
from collections import deque

import numpy as np
from numpy.typing import NDArray

MOST_SAVES = 64  # that an increment may be based on
LEAST_IDS = 1 << 16  # that are kept, however small the table is
_SMALL = 4096  # ids: smaller pieces are joined


class History:
    """The last saves of a table, and the ids whose rows have gone since the first of them.

    What is kept is bounded: when more ids have gone than half of those that have rows, an increment would
    say little that a full save does not, and the oldest saves are forgotten.

    Attributes
    ----------
    table : str
        A random name for the table: that of its checkpoints.
    saves : list of (str, int)
        Their names, and the time of the table's clock. What is touched later has a later time.
    """

    def __init__(self) -> None:
        self.table = secrets.token_hex(8)
        self.saves: list[tuple[str, int]] = []
        self._gone: deque[tuple[int, NDArray[np.int64]]] = deque()  # the clock at the first of them
        self._ids = 0

    def is_saved(self, clock: int) -> bool:
        """Whether the last save was made at this time of the clock."""
        return bool(self.saves) and self.saves[-1][1] == clock

    def note_save(self, save: str, clock: int) -> None:
        """Note a save. Two threads may do so at once, while nobody writes to the table."""
        self.saves.append((save, clock))
        del self.saves[:-MOST_SAVES]

    def note_gone(self, clock: int, ids: NDArray[np.int64], rows: int) -> None:
        """Note that rows go; so many are there."""
        if not self.saves:
            return
        if self._gone and self._gone[-1][0] > self.saves[-1][1] and len(self._gone[-1][1]) < _SMALL:
            first, before = self._gone[-1]
            self._gone[-1] = first, np.concatenate([before, ids])
        else:
            self._gone.append((clock, ids))
        self._ids += len(ids)
        most = max(LEAST_IDS, rows // 2)
        while self._gone and (self._ids > most or not self.saves or self._gone[0][0] <= self.saves[0][1]):
            at, forgotten = self._gone.popleft()
            self._ids -= len(forgotten)
            while self.saves and self.saves[0][1] < at:
                del self.saves[0]

    def clock_of(self, save: str) -> int | None:
        """When a save was made, None if it is not known (any more)."""
        return dict(self.saves).get(save)

    def gone_since(self, clock: int) -> list[NDArray[np.int64]]:
        """Give the ids that have gone since a save was made, some twice; some may have come back."""
        return [ids for at, ids in list(self._gone) if at > clock]
