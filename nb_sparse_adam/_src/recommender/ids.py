# SPDX-License-Identifier: Apache-2.0
"""Ids of users and items, and the rows that they have."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nb_sparse_adam.errors import InteractionsError, UnknownIdError

Rows = npt.NDArray[np.int64]


class Ids:
    """The ids of the rows of a table, in any order, each there once.

    Parameters
    ----------
    ids : int64 or object array, shape (rows,)
        Integers or strings.
    """

    def __init__(self, ids: npt.NDArray[Any]) -> None:
        self.ids = ids
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: npt.ArrayLike, what: str) -> Rows:
        """Return the row of each id, -1 for those that have none.

        Parameters
        ----------
        ids : array_like, shape (n,)
            Of the kind of these: integers or strings.
        what : str
            What they are, for messages.

        Raises
        ------
        InteractionsError
            If they are of another kind or shape.
        """
        array = np.asarray(ids)
        integers = self.ids.dtype.kind == "i"
        if array.size == 0:
            array = array.astype(self.ids.dtype)
        kinds, expected = ("iu", "integers") if integers else ("UO", "strings")
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise InteractionsError(
                f"{what}: got {array.ndim}-D {array.dtype}, expected a 1-D array of {expected}, as the ids "
                f"of the training are"
            )
        if not integers:
            array = array.astype(object)
            others = [one for one in array if not isinstance(one, str)]
            if others:
                raise InteractionsError(
                    f"{what}: got {others[0]!r}, expected strings, as the ids in training"
                )
        too_large = np.zeros(len(array), dtype=np.bool_)
        if array.dtype.kind == "u":  # which NumPy would compare with int64 as float64
            too_large, array = array > np.iinfo(np.int64).max, array.astype(np.int64)
        if not len(self.ids):
            return np.full(len(array), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._sorted, array), len(self.ids) - 1)
        found = (self._sorted[places] == array) & ~too_large
        return np.where(found, self._order[places], -1).astype(np.int64)

    def rows(self, ids: npt.ArrayLike, what: str, remedy: str) -> Rows:
        """Return the row of each id.

        Parameters
        ----------
        ids, what
            As for `find`.
        remedy : str
            What to do about an id that has none.

        Raises
        ------
        InteractionsError
            As for `find`.
        UnknownIdError
            If an id has no row; it names the first, and its place.
        """
        found = self.find(ids, what)
        unknown = np.flatnonzero(found < 0)
        if len(unknown):
            place = int(unknown[0])
            got = np.asarray(ids)[place : place + 1].tolist()[0]
            more = f", and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
            raise UnknownIdError(
                f"{what}[{place}] is {got!r}{more}: not among the {len(self):,} that the model was trained "
                f"with; {remedy}"
            )
        return found

    def with_new(self, ids: npt.NDArray[Any]) -> Ids:
        """Return these ids, and behind them those of ``ids`` that are not among them, ascending."""
        new = np.unique(ids[self.find(ids, "ids") < 0]) if len(ids) else ids
        return Ids(np.concatenate([self.ids, new.astype(self.ids.dtype)]))
