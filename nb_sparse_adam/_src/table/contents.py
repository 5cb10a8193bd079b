# SPDX-License-Identifier: Apache-2.0
"""What is in an `EmbeddingTable`, what comes into it, and what goes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nb_sparse_adam._src.annotations import StepCounts
from nb_sparse_adam._src.hyperparameters import HyperParameters
from nb_sparse_adam._src.stepping import run_all
from nb_sparse_adam._src.table.ages import Ages
from nb_sparse_adam._src.table.checks import read_reals, whole
from nb_sparse_adam._src.table.eviction import Eviction, Evictor, check_ages
from nb_sparse_adam._src.table.history import History
from nb_sparse_adam._src.table.ids import read_ids
from nb_sparse_adam._src.table.locking import SharedLock
from nb_sparse_adam._src.table.records import ID
from nb_sparse_adam._src.table.store import MOST_ROWS, Store
from nb_sparse_adam._src.views import RowState
from nb_sparse_adam.errors import (
    GradientError,
    GradientIndexError,
    OptionError,
    StateError,
    StateTypeError,
    TableError,
)


class Contents(HyperParameters):
    """The part of `EmbeddingTable` that is about its rows, whoever steps."""

    __slots__ = (
        "_ages", "_capacity", "_eviction", "_evictor", "_history", "_name", "_shared",
        "_step_counts", "_store", "_values_of",
    )  # fmt: skip
    _ages: Ages
    _capacity: int | None
    _eviction: Eviction
    _evictor: Evictor
    _history: History
    _name: str
    _shared: SharedLock
    _step_counts: StepCounts
    _store: Store
    _values_of: Any  # the user's function of ids, or None

    @property
    def _lock(self) -> Any:
        """What options are set under; in a forked child it may be another one."""
        return self._shared.writing

    @property
    def dim(self) -> int:
        """Numbers of a row."""
        return self._store.dim

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of values and moments."""
        return self._store.dtype

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    @property
    def capacity(self) -> int | None:
        """The most rows there may be, None where that is the machine's memory."""
        return self._capacity

    @property
    def step_counts(self) -> StepCounts:
        """What k counts: "element", "row" or "global"; fixed."""
        return self._step_counts

    def __len__(self) -> int:
        """How many ids have a row."""
        return len(self._store)

    def __bool__(self) -> bool:
        """True: an empty table is a table."""
        return True

    def contains(self, ids: ArrayLike) -> NDArray[np.bool_]:
        """Say of each id whether it has a row.

        Parameters
        ----------
        ids : (n,) integers or strings

        Returns
        -------
        (n,) bool array
        """
        numbers = self._ids("contains", ids)
        return self._shared.read(lambda: self._store.find(numbers, self.num_threads)[0] >= 0)

    def ids(self) -> NDArray[np.int64]:
        """Return the ids that have a row, (rows,) int64, in the order in which they have come."""
        return self._shared.read(lambda: self._store.header(ID)[self._store.live])

    def export(self) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Return ids, (rows,) int64, in the order in which they have come, and their values, (rows, dim)."""

        def work() -> tuple[NDArray[np.int64], NDArray[Any]]:
            rows = self._store.live
            return self._store.header(ID)[rows], self._store.table.param[rows]

        return self._shared.read(work)

    def state(self, ids: ArrayLike) -> RowState:
        """Copy moments and counts of rows.

        Parameters
        ----------
        ids : (n,) integers or strings
            Each of them has a row.

        Returns
        -------
        RowState

        Raises
        ------
        GradientIndexError
            If one has no row (also an IndexError).
        """
        numbers = self._ids("state", ids)

        def work() -> RowState:
            rows, missing = self._store.find(numbers, self.num_threads)
            if missing:
                raise self._no_row("state", "ids", numbers, rows)
            table = self._store.table
            steps = table.steps.copy() if self._step_counts == "global" else table.steps[rows]
            return RowState(table.exp_avg[rows], table.exp_avg_sq[rows], steps, self._store.seen[rows])

        return self._shared.read(work)

    def stats(self) -> dict[str, int]:
        """Return numbers about the table.

        Returns
        -------
        dict
            ``rows``; ``steps`` so far; ``admitted`` and ``evicted``, ids that got a row, and rows that went;
            ``dropped``, gradients of ids without a row that were left out; ``skipped``, rows that were left
            out for a gradient that is not finite; ``bytes_of_rows`` and ``bytes_of_index``, memory in use.
        """

        def work() -> dict[str, int]:
            store = self._store
            evicted = int(store.store["evicted"][0])
            return {
                "rows": len(store),
                "steps": store.steps,
                "admitted": len(store) + evicted,
                "evicted": evicted,
                "dropped": int(store.store["dropped"][0]),
                "skipped": store.table.skipped_rows,
                "bytes_of_rows": store.used * store.record,
                "bytes_of_index": store.bytes_of_index,
            }

        return self._shared.read(work)

    # --- rows that come and go ----------------------------------------------------------------------------

    def load(self, ids: ArrayLike, values: ArrayLike) -> None:
        """Set the values of rows, which come to be where they are not there yet.

        Parameters
        ----------
        ids : (n,) integers or strings
            Each of them once. They get rows whatever `admission` says.
        values : (n, dim) array of float32 or float64
            Moments and counts of these rows are fresh.

        Raises
        ------
        StateError
            If ids repeat, or values have another shape.
        StateTypeError
            If values are not float32 or float64 (also a TypeError).
        TableError
            If there is no room for them; nothing has been changed then.
        """
        numbers = self._ids("load", ids).copy()
        shape, errors = (len(numbers), self.dim), (StateError, StateTypeError)
        array = read_reals(self._where("load"), "values", values, shape, self.dtype, errors)
        ordered, first = np.unique(numbers, return_index=True)
        if len(ordered) != len(numbers):
            at = int(np.setdiff1d(np.arange(len(numbers)), first)[0])
            raise StateError(
                f"{self._where('load')}: ids[{at}] is {numbers[at]} again, expected each id once"
            )
        self._shared.write(lambda: self._load(numbers, array))

    def _load(self, numbers: NDArray[np.int64], values: NDArray[Any]) -> None:
        store = self._store
        self._begin_change()
        rows, missing = store.find(numbers, self.num_threads)
        if missing > store.room:
            self._make_room("load", numbers[rows < 0], rows[rows >= 0])
        self._reserve(missing)
        store.keep_aside(rows)

        def fill() -> None:
            rows, missing = store.find(numbers, self.num_threads)
            if missing:
                new = numbers[rows < 0]
                none = np.zeros((len(new), self.dim), self.dtype)
                store.insert(new, none if self._values_of is not None else None, self.num_threads)
                rows, _ = store.find(numbers, self.num_threads)
            store.set_rows(rows, values)

        run_all([fill])

    def evict(
        self,
        *,
        older_than_steps: int | None = None,
        older_than_seconds: float | None = None,
        seen_fewer_than: int | None = None,
        down_to: int | None = None,
    ) -> NDArray[np.int64]:
        """Let rows go.

        Without arguments those that `eviction` says, by age.

        Parameters
        ----------
        older_than_steps, older_than_seconds, seen_fewer_than
            As in `Eviction`: rows go for which all that are given hold.
        down_to : int, optional
            Rows that were touched least recently go, as many as are more than this. Not with the others.

        Returns
        -------
        (n,) int64 array
            The ids whose rows have gone.
        """
        conditions = self._conditions(older_than_steps, older_than_seconds, seen_fewer_than, down_to)

        def work() -> NDArray[np.int64]:
            self._begin_change(always=True)
            return self._let_go(self._rows_to_go(*conditions))

        return self._shared.write(work)

    def _conditions(self, steps: Any, seconds: Any, seen: Any, down_to: Any) -> tuple[Any, ...]:
        """Check the arguments of `evict`; without any, those of `eviction`."""
        check_ages(steps, seconds, seen)
        none = steps is None and seconds is None and seen is None
        if down_to is not None:
            if not none:
                raise OptionError("evict got down_to and conditions, expected one of them; call it twice")
            return None, None, None, whole("down_to", down_to, 0, MOST_ROWS)
        if none:
            if not self._eviction.by_age:
                raise OptionError(
                    "evict got nothing, and the table has no eviction by age; pass older_than_steps, "
                    "older_than_seconds, seen_fewer_than or down_to"
                )
            return *self._eviction[:3], None
        return steps, seconds, seen, None

    def _rows_to_go(
        self, steps: Any, seconds: Any, seen: Any, down_to: Any, *, now: float | None = None,
        budget: int | None = None,
    ) -> NDArray[np.int64]:  # fmt: skip
        """Return the rows that go; of those conditions hold for, that are among the next so many.

        Without ``now`` it is the moment that was noted last.
        """
        if down_to is not None:
            return self._evictor.least_recent(max(len(self) - down_to, 0), np.empty(0, np.int64))
        return self._evictor.old(steps, seconds, seen, now, budget)

    def _ids_to_go(
        self, conditions: tuple[Any, ...], now: float | None = None, budget: int | None = None
    ) -> NDArray[np.int64]:
        """Return the ids whose rows go; see `_rows_to_go`. Nothing is changed."""
        return self._shared.write(
            lambda: self._store.header(ID)[self._rows_to_go(*conditions, now=now, budget=budget)]
        )

    def _let_ids_go(self, ids: NDArray[np.int64]) -> None:
        """Take away the rows of ids that have one."""

        def work() -> None:
            self._begin_change(always=True)
            rows, _ = self._store.find(ids, self.num_threads)
            self._let_go(rows[rows >= 0])

        self._shared.write(work)

    def _let_go(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Take rows away; return the ids that they had."""
        ids = self._store.header(ID)[rows]
        if len(ids):
            self._store.keep_aside(rows)
            self._history.note_gone(self._store.clock, ids, len(self))  # first: an interrupt may come between
            self._store.remove(ids)
        return ids

    def _begin_change(self, always: bool = False) -> None:
        """Refuse to change rows that a parent process has mapped; let the clock advance.

        It does if a second has passed, or the table was saved: what comes now is later.
        """
        store = self._store
        store.check_process()
        if self._ages.note(store.clock + 1, store.steps, always or self._history.is_saved(store.clock)):
            store.clock = store.clock + 1

    def _reserve(self, rows: int) -> None:
        """Have the engine's table show so many more rows before there are: whatever interrupts, it does."""
        self._store.table.room_for(min(self._store.used + rows, self._store.most_rows))

    def _make_room(self, request: str, chosen: NDArray[np.int64], there: NDArray[np.int64]) -> None:
        """Let rows go, where they may, so that ids have room; refuse what does not fit."""
        wanted = len(np.unique(chosen))
        excess = wanted - self._store.room
        if excess <= 0:
            return
        stay = np.unique(there)
        if self._eviction.when_full and excess <= len(self._store) - len(stay):
            self._let_go(self._evictor.least_recent(excess, stay))
            return
        most = self._store.most_rows
        remedy = (
            "use smaller batches, or a larger capacity"
            if self._eviction.when_full
            else "call evict, pass eviction=Eviction(when_full=True), or a larger capacity"
        )
        raise TableError(
            f"{self._where(request)}: {wanted:,} ids are new, expected at most {self._store.room:,}, for "
            f"there is room for {most:,} rows, and {len(self._store):,} are there; nothing was "
            f"changed: {remedy}"
        )

    def _initial(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """Return the initial values of ids."""
        if self._values_of is None:
            return self._store.initial(numbers, self.num_threads)
        shown = numbers.copy()
        try:
            values = np.ascontiguousarray(self._values_of(shown), self.dtype)
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"table {self._name!r}: initializer returned no array of numbers: {error}"
            ) from error
        if values.shape != (len(numbers), self.dim):
            raise OptionError(
                f"table {self._name!r}: initializer returned an array of shape {values.shape} for "
                f"{len(numbers)} ids, expected {(len(numbers), self.dim)}"
            )
        return values

    # --- what users pass ----------------------------------------------------------------------------------

    def _where(self, request: str) -> str:
        return f"{request} of table {self._name!r}"

    def _ids(self, request: str, given: Any, name: str = "ids") -> NDArray[np.int64]:
        return read_ids(self._where(request), given, name)

    def _no_row(
        self, request: str, name: str, numbers: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> GradientError:
        at = int(np.flatnonzero(rows < 0)[0])
        return GradientIndexError(
            f"{self._where(request)}: {name}[{at}] is {numbers[at]}, which has no row, expected ids that were"
            " looked up in training or loaded, and not evicted since; contains(ids) says which have one"
        )
