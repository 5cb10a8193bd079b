# SPDX-License-Identifier: Apache-2.0
"""Early stopping: when to, and the best epoch to go back to."""

from __future__ import annotations

from typing import Any

from nb_sparse_adam._src.optimizer import SparseAdam


class Best:
    """The best evaluation so far, with a copy of the vectors and their state.

    Parameters
    ----------
    optimizer : SparseAdam
        What is copied.
    patience : int
        Evaluations without a better one after which training is over.
    """

    def __init__(self, optimizer: SparseAdam, patience: int) -> None:
        self._optimizer, self._patience = optimizer, patience
        self._value, self._since = float("-inf"), 0
        self._kept: tuple[dict[str, Any], dict[str, Any]] | None = None
        self.epoch = 0  # 0: there is none

    def is_over(self, epoch: int, value: float) -> bool:
        """Note what an evaluation has found after an epoch; say whether training is over."""
        self._since += 1
        if value > self._value:
            self._value, self._since, self.epoch = value, 0, epoch
            tables = {name: table.copy() for name, table in self._optimizer.tables.items()}
            self._kept = tables, self._optimizer.state_dict()
        return self.epoch > 0 and self._since >= self._patience

    def restore(self) -> None:
        """Go back to it."""
        if self._kept is not None:
            tables, state = self._kept
            for name, table in tables.items():
                self._optimizer.tables[name][...] = table
            self._optimizer.load_state_dict(state)
