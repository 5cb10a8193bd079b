"""Who applies a case: this library, and torch where it is installed. Each gives the same three calls.

``ready()`` does what is not timed, ``step()`` is what is timed, ``warm()`` steps often enough that everything
is compiled and every page that a later step touches has been written to (NumPy's and torch's zeros are given
their memory at the first write, and that costs more than the step itself).
"""

from __future__ import annotations

import abc
import itertools
import os
from types import ModuleType
from typing import Any

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam

from .cases import Arrays, Bag, Case, Rows

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}


def gradient(arrays: Arrays) -> RowGradient | BagGradient | CSRGradient:
    """Give the arrays of a case as this library's gradient."""
    if isinstance(arrays, Rows):
        return RowGradient(*arrays)
    return BagGradient(*arrays) if isinstance(arrays, Bag) else CSRGradient(*arrays)


class Contender(abc.ABC):
    """Who steps through the gradients of a case."""

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


class Ours(Contender):
    """Our optimizer, stepping through the gradients of a case."""

    def __init__(self, case: Case, *, step_counts: str, threads: int, **options: Any) -> None:
        super().__init__(case)
        if threads > (os.cpu_count() or 1):
            raise NotImplementedError(f"{threads} threads on {os.cpu_count()} cores")
        self.optimizer = SparseAdam(
            case.table(), **HYPER, step_counts=step_counts, num_threads=threads, **options
        )
        self._turns = itertools.cycle([gradient(arrays) for arrays in case.arrays()])
        self._gradient = next(self._turns)

    def ready(self) -> None:
        """Take the next gradient."""
        self._gradient = next(self._turns)

    def step(self) -> None:
        """Apply it."""
        self.optimizer.step(self._gradient)


def import_torch(threads: int) -> ModuleType:
    """Import torch with that many threads, or raise what asv takes as "skip this"."""
    try:
        import torch
    except ImportError as error:
        raise NotImplementedError(f"torch cannot be imported: {error}") from error
    torch.set_num_threads(threads)
    return torch


class TorchRows(Contender):
    """torch.optim.SparseAdam, given sparse gradients.

    ``coalesced=True`` tells torch that the ids are unique and in order, as the case must have them: it then
    skips the sorting and summing that it does in every step otherwise.
    """

    def __init__(self, case: Case, *, threads: int, coalesced: bool) -> None:
        super().__init__(case)
        torch = import_torch(threads)
        self._parameter = torch.nn.Parameter(torch.from_numpy(case.table()))
        self._optimizer = torch.optim.SparseAdam([self._parameter], **HYPER)
        gradients = []
        for arrays in case.arrays():
            assert isinstance(arrays, Rows)
            rows, values = (torch.from_numpy(array) for array in arrays)
            gradients.append(
                torch.sparse_coo_tensor(
                    rows[None], values, (case.rows, case.dim), is_coalesced=coalesced, check_invariants=False
                )
            )
        self._turns = itertools.cycle(gradients)

    def ready(self) -> None:
        """Take the next gradient."""
        self._parameter.grad = next(self._turns)

    def step(self) -> None:
        """Apply it."""
        self._optimizer.step()


class TorchBag(Contender):
    """torch's EmbeddingBag(sparse=True) and SparseAdam: the backward pass and the step are timed."""

    def __init__(self, case: Case, *, threads: int) -> None:
        super().__init__(case)
        torch = import_torch(threads)
        self._layer = torch.nn.EmbeddingBag(
            case.rows, case.dim, mode="sum", sparse=True, include_last_offset=True,
            _weight=torch.from_numpy(case.table()),
        )  # fmt: skip
        self._optimizer = torch.optim.SparseAdam(self._layer.parameters(), **HYPER)
        self._turns = itertools.cycle(
            [
                tuple(None if array is None else torch.from_numpy(array) for array in arrays)
                for arrays in case.arrays()
            ]
        )

    def ready(self) -> None:
        """Look up the next bags, which is not timed."""
        indices, offsets, self._grad_output, weights = next(self._turns)
        self._optimizer.zero_grad()
        self._output = self._layer(indices, offsets, per_sample_weights=weights)

    def step(self) -> None:
        """Go back through the lookup, and apply the gradient."""
        self._output.backward(self._grad_output)
        self._optimizer.step()
