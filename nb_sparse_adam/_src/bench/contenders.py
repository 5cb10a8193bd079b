# SPDX-License-Identifier: Apache-2.0
"""Who applies a case. Each contender gives the same three calls.

``ready()`` does what is not timed, ``step()`` is what is timed, ``warm()`` steps often enough that everything
is compiled and every page that a later step touches has been written to (NumPy's and torch's zeros are given
their memory at the first write, and that costs more than the step itself).

What is not public is imported where it is used: asv's tracking set measures older commits with these files.
"""

from __future__ import annotations

import abc
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam._src.bench.cases import CSR, Arrays, Bag, Case, Rows

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}


def gradient(arrays: Arrays) -> RowGradient | BagGradient | CSRGradient:
    """Give the arrays of a case as this library's gradient."""
    if isinstance(arrays, Rows):
        return RowGradient(*arrays)
    return BagGradient(*arrays) if isinstance(arrays, Bag) else CSRGradient(*arrays)


class Contender(abc.ABC):
    """Who steps through the gradients of a case.

    Attributes
    ----------
    rest : float
        Seconds that its threads may go on spinning after a step, on the cores that the next contender needs.
    """

    rest = 0.02  # GNU OpenMP's, which numba runs on, stop after some milliseconds

    def __init__(self, case: Case) -> None:
        self._steps_to_warm = 2 * case.gradients

    @abc.abstractmethod
    def ready(self) -> None:
        """Do what is not timed: take the next gradient."""

    @abc.abstractmethod
    def step(self) -> None:
        """Do what is timed: apply it."""

    def warm(self) -> None:
        """Step twice through all gradients."""
        for _ in range(self._steps_to_warm):
            self.ready()
            self.step()


class WithOptimizer(Contender):
    """A contender that has an optimizer of ours.

    Parameters
    ----------
    case : Case
    optimizer : SparseAdam
        Of one table.
    """

    def __init__(self, case: Case, optimizer: SparseAdam) -> None:
        super().__init__(case)
        self.case = case
        self.optimizer = optimizer

    def use_memory_of(self, other: WithOptimizer) -> None:
        """Go on with the table and the state of another contender, with the same case and counts.

        Where the system has put a table is worth up to a third of a step's time: a limit at other addresses
        would be none.
        """
        from nb_sparse_adam._src.optimizer import tables_of

        (mine,), (theirs,) = tables_of(self.optimizer).values(), tables_of(other.optimizer).values()
        mine.use_memory_of(theirs)


class Ours(WithOptimizer):
    """Our optimizer, stepping through the gradients of a case.

    Parameters
    ----------
    case : Case
    step_counts : {"element", "row", "global"}
    threads : int or None
        As `SparseAdam` takes it.
    **options
        Further options of `SparseAdam`.
    """

    def __init__(self, case: Case, *, step_counts: str, threads: int | None, **options: Any) -> None:
        if threads is not None and threads > (os.cpu_count() or 1):
            raise NotImplementedError(f"{threads} threads on {os.cpu_count()} cores")
        options = {**HYPER, "step_counts": step_counts, "num_threads": threads, **options}
        super().__init__(case, SparseAdam(case.table(), **options))
        self._turns = itertools.cycle([gradient(arrays) for arrays in case.arrays()])
        self._given = next(self._turns)

    def ready(self) -> None:
        """Take the next gradient."""
        self._given = next(self._turns)

    def step(self) -> None:
        """Apply it."""
        self.optimizer.step(self._given)


class _OfIds(Contender):
    """What is done with the ids of a case alone."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._highest = case.rows - 1
        self._turns: Iterator[NDArray[Any]] = itertools.cycle([self._ids(arrays) for arrays in case.arrays()])

    @staticmethod
    def _ids(arrays: Arrays) -> NDArray[Any]:
        assert not isinstance(arrays, CSR)
        return arrays.rows if isinstance(arrays, Rows) else arrays.indices

    def ready(self) -> None:
        """Take the next ids."""
        self._given = next(self._turns)


class Grouping(_OfIds):
    """Our sort of a case's ids, and its cut into segments of one row each, in memory that is kept."""

    def __init__(self, case: Case, *, threads: int) -> None:
        from nb_sparse_adam._src.engine.prepare import group

        super().__init__(case)
        self._group = group
        self._threads = threads
        longest = max(len(self._ids(arrays)) for arrays in case.arrays())
        self._memory = np.empty(4 * longest + (threads << 16), np.int64)

    def step(self) -> None:
        """Group them."""
        self._group(self._given, self._highest, self._threads, self._memory)


class NumpyUnique(_OfIds):
    """NumPy's way to group ids."""

    def step(self) -> None:
        """Group them."""
        np.unique(self._given, return_inverse=True)
