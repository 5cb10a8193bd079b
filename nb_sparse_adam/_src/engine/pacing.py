# SPDX-License-Identifier: Apache-2.0
"""How many threads to use, where the results do not depend on it: ask the clock, again and again.

A parallel loop ends when its last thread does. If another program has the core that this one waits for, a
loop of 100 µs takes the milliseconds of a time slice: beside other programs, training on two threads was up
to 20 times slower than on one (two Zen 4 cores, GNU OpenMP). Other programs come and go: the answer changes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import fmean

from nb_sparse_adam._src.engine.threads import ALONE, Partition, usable_threads

# Elements that a step must touch before a second thread pays: starting a team costs about as much as updating
# this many (5 µs; measured on two Zen 4 cores, omp).
PARALLEL_ELEMENTS = 1 << 13

_RECENT = 8  # pieces of work that "lately" means
_TRIES = 3  # pieces of work for which an alternative is tried
_FIRST_WAIT, _LONGEST_WAIT = 32, 4096  # pieces of work between attempts; doubled by each that fails
_GAIN = 0.9  # an alternative must take less than this share of the time
_SURPRISE = 2.0  # slower than before by this factor: time to try fewer threads


def choices_up_to(most: int) -> list[int]:
    """Return the numbers of threads that are worth a try: one, half of the most, and the most."""
    return sorted({1, (most + 1) // 2, most})


class Pace:
    """Find the number of threads with which equal pieces of work take the least time.

    For each piece of work: use `threads` threads, then tell `took` the time.

    Parameters
    ----------
    choices : sequence of int
        Numbers of threads to choose from, ascending; begins with the last. `choices_up_to` gives some.
    """

    def __init__(self, choices: Sequence[int]) -> None:
        self._choices = list(choices)
        self._favourite = self._current = len(self._choices) - 1
        self._fresh = set(range(len(self._choices)))  # not used yet: its first time has the compilation in it
        self._times: list[float] = []
        self._expected = float("inf")
        self._wait = self._left = _FIRST_WAIT
        self._direction = -1

    @property
    def threads(self) -> int:
        """Threads to use for the next piece of work."""
        return self._choices[self._current]

    def took(self, seconds: float) -> None:
        """Take note of how long the piece of work took for which `threads` was asked."""
        if len(self._choices) == 1:
            return
        if self._current in self._fresh:
            self._fresh.remove(self._current)
            return
        self._times.append(seconds)
        if self._current != self._favourite:
            self._judge_trial()
            return
        del self._times[:-_RECENT]
        self._left -= 1
        if len(self._times) == _RECENT:
            lately = fmean(self._times)
            if lately > _SURPRISE * self._expected and self._favourite > 0:
                self._wait, self._left, self._direction = _FIRST_WAIT, 0, -1
            if self._left <= 0:
                self._expected = lately
                self._start_trial()

    def _start_trial(self) -> None:
        if not 0 <= self._favourite + self._direction < len(self._choices):
            self._direction = -self._direction
        self._current = self._favourite + self._direction
        self._times = []

    def _judge_trial(self) -> None:
        if len(self._times) < _TRIES and self._times[-1] < _SURPRISE * self._expected:
            return
        mean = fmean(self._times)
        if len(self._times) == _TRIES and mean < _GAIN * self._expected:
            self._favourite, self._expected, self._wait = self._current, mean, _FIRST_WAIT
        else:
            self._current, self._direction = self._favourite, -self._direction
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
        self._left = self._wait
        self._times = []


class Paces:
    """The paces of one table: steps of one form and about one size are equal pieces of work."""

    def __init__(self) -> None:
        self._paces: dict[tuple[Hashable, int, int], Pace] = {}

    def partition_for(
        self, form: Hashable, size: int, num_threads: int | None
    ) -> tuple[Partition, Pace | None]:
        """Choose the threads of a step.

        Parameters
        ----------
        form : hashable
            What kind of work it is.
        size : int
            Elements that it touches: one thread below `PARALLEL_ELEMENTS`.
        num_threads : int or None
            As `SparseAdam` takes it. A number is obeyed; with None the clock decides, and is to be told.

        Returns
        -------
        partition : Partition
        pace : Pace or None
            To be told the time that the step took for each of its elements.
        """
        if size < PARALLEL_ELEMENTS:
            return ALONE, None
        most = usable_threads(num_threads)
        if most == 1 or num_threads is not None:
            return Partition(most, most), None
        key = (form, size.bit_length(), most)
        pace = self._paces.get(key)
        if pace is None:
            pace = self._paces[key] = Pace(choices_up_to(most))
        return Partition(most, pace.threads), pace
