# SPDX-License-Identifier: Apache-2.0
"""What a table's clock said when: ages of rows in steps and in seconds.

A row notes the time of the table's clock, an integer. It advances with every step, and at most once a second
otherwise; here is kept which time of the day that was, and which step.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from operator import itemgetter

_ANY = 2**63 - 1  # no clock is later
_MOST = 1 << 16  # entries: above, every other one of the older half is forgotten


class Ages:
    """Times of a table's clock.

    Attributes
    ----------
    entries : list of (int, float, int)
        Clock, seconds since 1970, steps; ascending.
    now : callable
        Says what time it is. A server that does again what it has logged says what time it was.
    """

    def __init__(self) -> None:
        self.now: Callable[[], float] = time.time
        self.entries: list[tuple[int, float, int]] = []

    def note(self, clock: int, steps: int, always: bool = False) -> bool:
        """Note what time it is, if that has not been done for a second; return whether it was."""
        now = self.now()
        if self.entries and not always and 0 <= now - self.entries[-1][1] < 1:
            return False
        self.entries.append((clock, now, steps))
        thinned(self.entries)
        return True

    def before_steps(self, steps: int) -> int:
        """The last time of the clock at which so few steps had been done, -1 if there was none."""
        at = bisect_right(self.entries, steps, key=itemgetter(2)) - 1
        if at < 0:
            return -1
        clock, _, done = self.entries[at]
        following = self.entries[at + 1][0] - 1 if at + 1 < len(self.entries) else clock + steps - done
        return min(clock + steps - done, following)

    def before_seconds(self, moment: float) -> int:
        """The last time of the clock that was over at a moment, -1 if there was none.

        What is touched later than a second after an entry has another one.
        """
        at = bisect_right(self.entries, moment - 1, key=itemgetter(1)) - 1
        if at < 0:
            return -1
        # After the last one, all until now was within its second: what comes later is noted first.
        return self.entries[at + 1][0] - 1 if at + 1 < len(self.entries) else _ANY


def thinned(entries: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """Have a list of entries forget some, while it is too long."""
    while len(entries) > _MOST:
        half = len(entries) // 2
        entries[:half] = entries[:half:2]
    return entries
