# SPDX-License-Identifier: Apache-2.0
"""Which rows go: those that were not touched for long, seen rarely, or touched least recently."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.state import MAX_COUNT
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.table.ages import Ages
from nb_sparse_adam._src.table.checks import whole
from nb_sparse_adam._src.table.records import ADMITTED, TOUCHED
from nb_sparse_adam._src.table.store import Store
from nb_sparse_adam.errors import OptionError, OptionTypeError


@public("nb_sparse_adam")
class Eviction(NamedTuple):
    """What an `EmbeddingTable` lets go of by itself.

    Attributes
    ----------
    older_than_steps : int, optional
        Rows go that no step has touched, nor a look-up in training, for at least so many steps.
    older_than_seconds : float, optional
        The same in seconds; to a second.
    seen_fewer_than : int, optional
        Only rows go that look-ups in training have seen fewer times. With an age: a row that is new has
        not been seen often.
    rows_a_step : int, default 4096
        How many rows each step looks at, in turn: what a step takes longer is bounded by it. Where the next
        step goes on is not in checkpoints.
    when_full : bool, default False
        Whether rows that were touched least recently make room for new ones, where a table has ``capacity``.
    """

    older_than_steps: int | None = None
    older_than_seconds: float | None = None
    seen_fewer_than: int | None = None
    rows_a_step: int = 4096
    when_full: bool = False

    @property
    def by_age(self) -> bool:
        """Whether steps look for rows to let go of."""
        return self.older_than_steps is not None or self.older_than_seconds is not None


def check_eviction(given: Any, capacity: int | None) -> Eviction:
    """Check the option of a table."""
    if given is None:
        return Eviction()
    if not isinstance(given, Eviction):
        raise OptionTypeError(
            f"eviction is {given!r} ({type(given).__name__}), expected an nb_sparse_adam.Eviction or None"
        )
    check_ages(given.older_than_steps, given.older_than_seconds, given.seen_fewer_than, "eviction: ")
    if given.seen_fewer_than is not None and not given.by_age:
        raise OptionError(
            "eviction has seen_fewer_than without an age, expected older_than_steps or older_than_seconds "
            "beside it: each row is new at first, and would go at once"
        )
    whole("eviction: rows_a_step", given.rows_a_step, 1, MAX_COUNT)
    if not isinstance(given.when_full, bool):
        raise OptionTypeError(f"eviction: when_full is {given.when_full!r}, expected True or False")
    if given.when_full and capacity is None:
        raise OptionError("eviction has when_full=True, but the table no capacity; pass capacity")
    return given


def check_ages(steps: Any, seconds: Any, seen: Any, where: str = "evict: ") -> None:
    """Check what says which rows go."""
    if steps is not None:
        whole(f"{where}older_than_steps", steps, 0, MAX_COUNT)
    if seconds is not None:
        _check_seconds(f"{where}older_than_seconds", seconds)
    if seen is not None:
        whole(f"{where}seen_fewer_than", seen, 1, MAX_COUNT)


def _check_seconds(what: str, given: Any) -> None:
    if isinstance(given, (bool, np.bool_)) or not isinstance(given, (int, float, np.integer, np.floating)):
        raise OptionTypeError(f"{what} is {given!r} ({type(given).__name__}), expected a number")
    if not 0 <= given < math.inf:
        raise OptionError(f"{what} is {given}, expected 0 <= seconds < inf")


class Evictor:
    """Finds rows of a store that are to go.

    Parameters
    ----------
    store : Store
    ages : Ages
    """

    def __init__(self, store: Store, ages: Ages) -> None:
        self._store, self._ages = store, ages
        self._next = 0  # the row that the next step looks at first
        self._oldest = np.empty(0, np.int64)  # rows, those touched least recently last; see `least_recent`
        self._touched = np.empty(0, np.int64)
        self._admitted = np.empty(0, np.int64)

    def old(
        self, steps: int | None, seconds: float | None, seen: int | None, now: float | None = None,
        budget: int | None = None,
    ) -> NDArray[np.int64]:  # fmt: skip
        """Return the rows that all conditions hold for: of all, or of the next so many in turn."""
        store = self._store
        used, latest = store.used, None
        if steps is not None:
            latest = self._ages.before_steps(store.steps - int(steps))
        if seconds is not None:
            moment = self._ages.entries[-1][1] if now is None else now
            by_time = self._ages.before_seconds(moment - float(seconds))
            latest = by_time if latest is None else min(latest, by_time)
        spans = [(0, used)]
        if budget is not None and budget < used:
            # Beyond the last row it goes on with the first: new rows may come with every step.
            first = self._next % used
            last = first + budget
            spans = [(first, min(last, used)), (0, max(last - used, 0))]
            self._next = last
        found = []
        for first, last in spans:
            goes = store.header(ADMITTED)[first:last] != 0
            if latest is not None:
                goes &= store.header(TOUCHED)[first:last] <= latest
            if seen is not None:
                goes &= store.seen[first:last] < int(seen)
            found.append(np.flatnonzero(goes) + first)
        return np.concatenate(found)

    def least_recent(self, number: int, but: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return so many rows that were touched least recently, in that order; of one moment, the first here.

        To find them all rows are looked at, once for many calls: the oldest 1/32 of them is kept. One that
        was touched since is not among them any more, and all others were touched after those.

        Parameters
        ----------
        number : int
        but : (n,) int64
            Rows that are to stay.
        """
        rows = self._kept(but)
        if len(rows) < number:
            self._look_at_all(number + len(but))
            rows = self._kept(but)
            # What is of this moment is not kept: rows that are touched now would be among it.
            before = np.searchsorted(-self._touched, -self._store.clock, "right")
            self._oldest, self._touched, self._admitted = (
                each[before:] for each in (self._oldest, self._touched, self._admitted)
            )
        return rows[:number]

    def _kept(self, but: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the oldest rows that were not touched since, but for some; the oldest first."""
        rows = self._oldest
        same = self._store.header(TOUCHED)[rows] == self._touched
        same &= self._store.header(ADMITTED)[rows] == self._admitted  # it is still of the same id
        same &= ~np.isin(rows, but)
        return rows[np.flatnonzero(same)[::-1]]

    def _look_at_all(self, least: int) -> None:
        admitted, touched = self._store.header(ADMITTED), self._store.header(TOUCHED)
        rows = np.flatnonzero(admitted)
        wanted = min(max(least, len(rows) // 32), len(rows))
        times = touched[rows]
        if wanted < len(rows):
            latest = np.partition(times, wanted - 1)[wanted - 1]
            rows = rows[times <= latest]
            times = touched[rows]
        order = np.lexsort((admitted[rows], times))[::-1]
        self._oldest, self._touched, self._admitted = rows[order], times[order], admitted[rows[order]]
