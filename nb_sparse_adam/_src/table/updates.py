# SPDX-License-Identifier: Apache-2.0
"""Steps of an `EmbeddingTable`: ids -> rows, which the engine updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from nb_sparse_adam._src.annotations import BagMode
from nb_sparse_adam._src.backend import Request
from nb_sparse_adam._src.gradients import BagGradient, RowGradient, read_named
from nb_sparse_adam._src.naming import type_name
from nb_sparse_adam._src.stepping import step_together
from nb_sparse_adam._src.table.contents import Contents
from nb_sparse_adam._src.table.locking import write_together
from nb_sparse_adam.errors import GradientTypeError

Missing = Literal["drop", "raise"]


class Updates(Contents):
    """The part of `EmbeddingTable` that takes steps."""

    __slots__ = ("_missing",)
    _missing: Missing

    def update(self, ids: ArrayLike, grads: ArrayLike) -> None:
        """Take a step of Adam with gradients of the rows of ids.

        Parameters
        ----------
        ids : (n,) integers or strings
            Repeated ones are summed. What those get that have no row is dropped, or refused: see `missing`.
        grads : (n, dim) array of float32 or float64

        Raises
        ------
        GradientError
            As `SparseAdam.step`; nothing has been changed then.
        """
        step_tables({self: RowGradient(ids, grads)}, ("ids", "grads"))

    def update_bags(
        self,
        ids: ArrayLike,
        offsets: ArrayLike,
        grad_output: ArrayLike,
        weights: ArrayLike | None = None,
        mode: BagMode = "sum",
    ) -> None:
        """Take a step of Adam with the gradients of what `lookup_bags` gave.

        Parameters
        ----------
        ids, offsets
            What `lookup_bags` was given.
        grad_output : (bags, dim) array of float32 or float64
            Gradient of its result.
        weights, mode
            What `lookup_bags` was given.

        Raises
        ------
        GradientError
            As `SparseAdam.step`; nothing has been changed then.
        """
        given = BagGradient(ids, offsets, grad_output, weights, mode)
        step_tables({self: given}, ("ids", "grad_output", "offsets", "weights"))

    @staticmethod
    def update_together(gradients: Mapping[Any, RowGradient | BagGradient]) -> None:
        """Take a step of several tables, all or nothing.

        Parameters
        ----------
        gradients : mapping of EmbeddingTable to RowGradient or BagGradient
            Whose rows, or indices, are ids.

        Raises
        ------
        GradientError
            As `SparseAdam.step`; nothing has been changed then, in any table.
        """
        given: object = gradients
        expected = "expected a mapping of EmbeddingTables to their gradients"
        if not isinstance(given, Mapping):
            raise GradientTypeError(f"update_together got {type_name(given)}, {expected}")
        for each in given:
            if not isinstance(each, Updates):
                raise GradientTypeError(f"update_together got one for {type_name(each)}, {expected}")
        step_tables(gradients, None)

    def _request(self, gradient: Any, names: tuple[str, ...] | None) -> tuple[Request, int]:
        """Find the rows that a gradient is for; say how many of its ids have none."""
        self._begin_change()
        if not isinstance(gradient, (RowGradient, BagGradient)):
            raise GradientTypeError(
                f"{self._where('update')}: got {type_name(gradient)}, expected a RowGradient or a BagGradient"
            )
        is_rows = isinstance(gradient, RowGradient)
        ids: Any = gradient.rows if isinstance(gradient, RowGradient) else gradient.indices
        if names is None:
            of = "RowGradient." if is_rows else "BagGradient."
            fields = ("rows", "values") if is_rows else ("indices", "grad_output", "offsets", "weights")
            names = tuple(of + each for each in fields)
        numbers = self._ids("update", ids, names[0])
        store, table = self._store, self._store.table
        rows, missing = store.find_again(numbers, self.num_threads)
        if missing:
            if self._missing == "raise":
                raise self._no_row("update", names[0], numbers, rows)
            found = np.where(rows < 0, table.rows - 1, rows)
        else:
            found = rows
        given = read_named(gradient, found, names, table.target)
        table.backend.before_step(self._options, self._tables)
        store.keep_aside(rows)
        return Request(table, given, self._options, None), missing

    def _let_old_rows_go(self) -> None:
        """Look at some rows, as part of a step."""
        if self._eviction.by_age:
            self._let_go(self._evictor.old(*self._eviction[:3], budget=self._eviction.rows_a_step))


def step_tables(
    gradients: Mapping[Updates, Any],
    names: tuple[str, ...] | None,
    optimizers: Sequence[tuple[Any, Any]] = (),
) -> None:
    """Take a step of tables, and of optimizers with it, all or nothing.

    Parameters
    ----------
    gradients : mapping of EmbeddingTable to RowGradient or BagGradient
    names : tuple of str or None
        What messages call the arrays of a gradient; None: what its class calls them.
    optimizers : sequence of (SparseAdam, gradient)
        As of `stepping.step_together`.
    """
    dropped: dict[Updates, int] = {}

    def request(table: Updates) -> Request:
        found, dropped[table] = table._request(gradients[table], names)
        return found

    def work() -> None:
        requests = [partial(request, table) for table in gradients]
        if len(requests) == 1 and not optimizers:
            (alone,) = [each() for each in requests]
            alone.table.backend.step(alone)
        else:
            step_together(optimizers, requests)
        for table in gradients:
            table._store.store["dropped"] += dropped[table]
            table._let_old_rows_go()

    shared = sorted((table._shared for table in gradients), key=id)  # in the order of forks: no deadlock
    write_together(shared, work)
