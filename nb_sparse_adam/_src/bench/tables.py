# SPDX-License-Identifier: Apache-2.0
"""`EmbeddingTable` in the comparison: who updates rows, and looks them up, that are named by ids.

Row r of a case is named by an id that looks like a random number. Look-ups and updates are apart, as they are
in training: what is timed is one of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam import EmbeddingTable
from nb_sparse_adam._src.bench.cases import Case, Rows
from nb_sparse_adam._src.bench.contenders import HYPER, Contender
from nb_sparse_adam._src.bench.peers import import_peer

AT_ONCE = 1 << 18  # ids that a table is filled with by one call


def names_of(rows: NDArray[Any]) -> NDArray[np.int64]:
    """Return the ids of rows: multiples of an odd number, modulo 2⁶⁴, so that no two are the same."""
    return rows.astype(np.int64) * np.int64(0x9E3779B97F4A7C15 - 2**64)


class _Named(Contender):
    """What takes the gradients of a case in turn, with ids."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        made = [
            (names_of(arrays.rows), arrays.values) for arrays in case.arrays() if isinstance(arrays, Rows)
        ]
        self._turns = itertools.cycle(made)

    def ready(self) -> None:
        """Take the next ids, with their gradients."""
        self._ids, self._values = next(self._turns)


class TableUpdate(_Named):
    """A step of an `EmbeddingTable`.

    Parameters
    ----------
    case : Case
    threads : int
    after_lookup : bool
        Whether its ids have just been looked up, which is not timed: their rows are known then.
    """

    def __init__(self, case: Case, *, threads: int, after_lookup: bool = False) -> None:
        super().__init__(case)
        self._after_lookup = after_lookup
        self.table = filled(case, threads)

    def ready(self) -> None:
        """Take the next ids, and look them up if that is how they are updated."""
        super().ready()
        if self._after_lookup:
            self.table.lookup(self._ids)

    def step(self) -> None:
        """Update their rows."""
        self.table.update(self._ids, self._values)


class TableLookup(_Named):
    """A look-up in an `EmbeddingTable`, in training."""

    def __init__(self, case: Case, *, threads: int) -> None:
        super().__init__(case)
        self._table = filled(case, threads)

    def step(self) -> None:
        """Look them up."""
        self._table.lookup(self._ids)


class Take(Contender):
    """NumPy's look-up in an array, whose rows have numbers."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._turns = itertools.cycle([arrays[0] for arrays in case.arrays()])
        self._table = case.table()

    def ready(self) -> None:
        """Take the next rows."""
        self._rows = next(self._turns)

    def step(self) -> None:
        """Copy them."""
        self._table[self._rows]


class _Dict(_Named):
    """A dict of Python's that says which row of a torch.nn.Embedding an id has."""

    rest = 0.25  # the OpenMP that torch brings may spin for so long

    def __init__(self, case: Case, *, threads: int) -> None:
        super().__init__(case)
        torch = import_peer("torch")
        torch.set_num_threads(threads)
        self._torch = torch
        self._layer = torch.nn.Embedding(
            case.rows, case.dim, sparse=True, _weight=torch.from_numpy(case.table())
        )
        self._optimizer = torch.optim.SparseAdam(self._layer.parameters(), **HYPER)
        self._row_of = {name: row for row, name in enumerate(names_of(np.arange(case.rows)).tolist())}

    def _look_up(self) -> Any:
        row_of = self._row_of
        rows = self._torch.tensor([row_of[each] for each in self._ids.tolist()])
        return self._layer(rows)


class DictLookup(_Dict):
    """The look-up."""

    def step(self) -> None:
        """Look them up."""
        with self._torch.no_grad():
            self._look_up()


class DictUpdate(_Dict):
    """The backward pass, and torch.optim.SparseAdam."""

    def ready(self) -> None:
        """Look up the next ids, which is not timed."""
        super().ready()
        self._optimizer.zero_grad()
        self._output = self._look_up()
        self._grad = self._torch.from_numpy(self._values)

    def step(self) -> None:
        """Update their rows."""
        self._output.backward(self._grad)
        self._optimizer.step()


def filled(case: Case, threads: int) -> EmbeddingTable:
    """Make a table with the rows of a case, all of which have been written to."""
    table = EmbeddingTable(case.dim, num_threads=threads, **HYPER)
    for first in range(0, case.rows, AT_ONCE):
        table.lookup(names_of(np.arange(first, min(first + AT_ONCE, case.rows))))
    return table
