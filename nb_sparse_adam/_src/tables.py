# SPDX-License-Identifier: Apache-2.0
"""The tables of `SparseAdam` and their state: what is shown, lent, saved, loaded and rearranged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import numpy as np

from nb_sparse_adam._src import options
from nb_sparse_adam._src.annotations import StepCounts, Table
from nb_sparse_adam._src.engine.mapped import StateFolder
from nb_sparse_adam._src.engine.records import GLOBAL
from nb_sparse_adam._src.engine.state import MAX_INT64, STATE_VERSION, TableState
from nb_sparse_adam._src.hyperparameters import DeviceOptions
from nb_sparse_adam._src.kernels import LentTable
from nb_sparse_adam._src.state_dicts import check_state_dict
from nb_sparse_adam._src.stepping import run_all
from nb_sparse_adam._src.views import States, StateView
from nb_sparse_adam.errors import OptionError, StateError, TableError


class Tables(DeviceOptions):
    """The part of `SparseAdam` that is about its tables between steps."""

    __slots__ = ("_folder", "_step_counts", "_unfinished")
    _folder: StateFolder | None
    _step_counts: StepCounts
    _unfinished: str | None  # why tables and state are not of one moment

    @property
    def step_counts(self) -> StepCounts:
        """What k counts: "element", "row" or "global"; fixed."""
        return self._step_counts

    def _saved(self) -> dict[str, Any]:
        """Return the options that a state dict holds."""
        return {name: getattr(self, name) for name in options.SAVED}

    def _check_whole(self) -> None:
        """Refuse to go on from tables and state that are not of one moment."""
        if self._unfinished is not None:
            raise StateError(self._unfinished)

    def _table_named(self, request: str, name: str | None) -> TableState:
        if name is None and len(self._tables) == 1:
            return next(iter(self._tables.values()))
        if name not in self._tables:
            names = ", ".join(map(repr, self._tables))
            raise TableError(f"{request} {name!r}, expected one of {names}")
        return self._tables[name]

    @property
    def tables(self) -> Mapping[str, Any]:
        """The parameter tables by name: the arrays that were given."""
        return MappingProxyType({name: table.given for name, table in self._tables.items()})

    @property
    def state(self) -> Mapping[str, StateView]:
        """State of each table: ``exp_avg``, ``exp_avg_sq`` and ``steps``, read-only live views."""
        return States(self._tables)

    @property
    def skipped_rows(self) -> Mapping[str, int]:
        """For each table, how often a row was left out of a step by ``on_nonfinite="skip"``."""
        return MappingProxyType({name: table.skipped_rows for name, table in self._tables.items()})

    def flush(self) -> None:
        """Write to their files what steps have changed in `state_dir`, and in tables that are ``np.memmap``.

        The system does so by itself, sooner or later, in an order of its own: between two calls the files are
        no state of any moment. What survives a crash is a checkpoint.
        """
        with self._lock:
            if self._folder is not None:
                self._folder.flush()
            for table in self._tables.values():
                if isinstance(table.param, np.memmap):
                    table.param.flush()

    def state_dict(self) -> dict[str, Any]:
        """Copy the state and the hyper-parameters, without the tables.

        Returns
        -------
        dict
            ``{"version": 1, "options": {...}, "tables": {name: {"exp_avg", "exp_avg_sq", "steps",
            "skipped_rows"}}}``: arrays of the shapes of `state`, copied.

        Raises
        ------
        StateError
            If a checkpoint was restored in part.
        """
        with self._lock:
            self._check_whole()
            self.synchronize()
            return {
                "version": STATE_VERSION,
                "options": self._saved(),
                "tables": {name: table.copy() for name, table in self._tables.items()},
            }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave: training goes on with the same bits.

        Parameters
        ----------
        state_dict : mapping
            From an optimizer with the same table names, shapes, dtypes and ``step_counts``.

        Raises
        ------
        StateError
            If something is missing, unknown, or does not fit; nothing has been changed then.

        Notes
        -----
        Arrays may be views of this very state. An interrupt that comes after the first write is raised when
        everything has been loaded.
        """
        given_options, given_tables = check_state_dict(state_dict, self._tables)
        values = options.check_saved(given_options, self._dtypes(), self._step_counts, self.device_checks)
        with self._lock:
            for backend in self._backends():
                backend.before_step(self._options, self._tables)
            self.synchronize()
            live = [array for table in self._tables.values() for array in table.live_arrays()]
            with nullcontext() if self._folder is None else self._folder.removed_on_error():
                loads = [table.check_load(given_tables[name], live) for name, table in self._tables.items()]
            run_all([*loads, lambda: self._set(**values)])

    def rearrange(self, table: Table, source: Any, name: str | None = None) -> None:
        """Go on with another array for a table, whose rows take moments and counts of rows of the old one.

        For rows that come, go or change places: a vocabulary that grows, users that are dropped, Gaussians
        that are split and pruned. To append, prune, reorder and reset rows are all this one thing.

        Parameters
        ----------
        table : (rows, dim) or (n,) array
            Takes the place of the old one; its values are yours, and are not touched. Of the old one's dtype
            and dim, with any number of rows. It may share memory with the old one, or be the same array.
        source : (rows,) integer array
            For each row of `table` the row of the old one whose moments and counts it takes, -1 for a fresh
            row: moments and counts are 0. A row that is named more than once is copied for each.
        name : str, optional
            Which table; not needed if there is only one.

        Raises
        ------
        TableError
            If `table` cannot be updated in place, is of another dtype or dim, or shares memory with another
            table; if no table has that name; if the table is on a GPU, or lent by `kernel_table`. Nothing has
            been changed then, nor if memory, or room in `state_dir`, does not suffice.
        StateError
            If `source` is malformed, or names a row that is not there.

        Notes
        -----
        The count of ``step_counts="global"`` and `skipped_rows` are of the whole table, and stay. State is
        allocated once more, and the old one is let go, as is the old array: arrays, and a table's state, that
        were read before still show the old ones. Not to be called from a signal handler, which may come in
        the middle of a step: it would go on with the old array.

        Examples
        --------
        >>> optimizer = SparseAdam(np.zeros((3, 2), np.float32), step_counts="row")
        >>> optimizer.step(RowGradient([0, 2, 2], np.ones((3, 2), np.float32)))
        >>> kept = np.array([2, 0])  # row 1 goes, the others change places, and one is new
        >>> table = np.concatenate([optimizer.tables["table"][kept], np.ones((1, 2), np.float32)])
        >>> optimizer.rearrange(table, np.append(kept, -1))
        >>> optimizer.state["table"].steps
        array([1, 1, 0], dtype=int32)
        """
        with self._lock:
            old = self._table_named("rearrange got", name)
            old.check_replacement(table)
            self._check_whole()
            old.backend.before_step(self._options, self._tables)
            with nullcontext() if self._folder is None else self._folder.removed_on_error():
                new = old.rearranged(table, source)
                refuse_overlap({**self._tables, old.name: new})
            old.backend.memory_changed(gone=True)  # first: whatever interrupts, the next step looks again
            self._tables[old.name] = new  # whatever interrupts leaves the old one or the new
            old.backend.memory_changed(gone=True)
            if self._folder is not None:
                self._folder.keep([each for table in self._tables.values() for each in table.memory[1:]])

    @contextmanager
    def kernel_table(self, name: str | None = None) -> Iterator[LentTable]:
        """Lend a table to a user's own ``@njit`` function, which updates it with `apply_row_gradient`.

        For trainers whose loop goes from sample to sample: skip-gram, matrix factorization, Hogwild.

        Parameters
        ----------
        name : str, optional
            Which table; not needed if there is only one.

        Yields
        ------
        tuple
            To be passed to compiled functions, its first member, ``param``, being the (rows, dim)
            parameters. Use it inside the ``with`` block only: other steps of this optimizer wait until
            the block is left. With ``step_counts="global"`` the block is one step of the table.

        Raises
        ------
        TableError
            If no table has that name, or several could be meant, or the table has been changed in place.
        OptionError
            With ``on_nonfinite="raise"``: a loop that has begun to write cannot refuse a whole step.

        Notes
        -----
        After the block, the next step reads all counts of the table once, to see that there is room.

        A function with ``@njit(cache=True)`` is compiled anew after an upgrade of this package: the tuple's
        type is another one in every version of the kernels.

        Examples
        --------
        >>> from numba import njit
        >>> from nb_sparse_adam import apply_row_gradient
        >>> @njit
        ... def pull(table, row, target):
        ...     apply_row_gradient(table, row, table.param[row] - target)
        >>> optimizer = SparseAdam(np.zeros((4, 2), np.float32), lr=0.1, on_nonfinite="skip")
        >>> with optimizer.kernel_table() as table:
        ...     pull(table, 2, np.ones(2, np.float32))
        >>> optimizer.tables["table"][2]
        array([0.1, 0.1], dtype=float32)
        """
        with self._lock:
            table = self._table_named("kernel_table got", name)
            table.check_lendable()
            if self.on_nonfinite == "raise":
                raise OptionError(
                    "kernel_table with on_nonfinite='raise': a loop that has begun to write cannot refuse a "
                    "whole step; set optimizer.on_nonfinite = 'skip' (apply_row_gradient then leaves such a "
                    "row out and returns False) or 'propagate'"
                )
            self._check_whole()
            table.backend.before_step(self._options, self._tables)
            table.check_writeable()
            table.make_room_for_a_step()
            was_lent = table.is_lent  # by a block around this one
            try:
                table.is_lent = True
                yield table.lent(self._options)
            finally:
                if table.mode == GLOBAL:  # before any call, after which an interrupt may come
                    table.arrays.counts[0] += table.arrays.counts[0] < MAX_INT64
                table.is_lent = was_lent
                table.counts_have_changed()


def refuse_overlap(tables: Mapping[str, TableState]) -> None:
    """Refuse tables that share memory."""
    last, reach = None, -1
    for table in sorted(tables.values(), key=lambda table: (table.backend.kind, table.extent)):
        start, end = table.extent
        if last is not None and start < reach and start < end and last.backend.kind == table.backend.kind:
            first, second = (name for name, each in tables.items() if each is last or each is table)
            raise TableError(
                f"tables {first!r} and {second!r} share memory, expected separate arrays: each would undo "
                "the other's update. Give every table once"
            )
        if start < end:
            last, reach = table, end
