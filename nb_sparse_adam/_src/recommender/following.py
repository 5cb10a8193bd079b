# SPDX-License-Identifier: Apache-2.0
"""Following a training: a progress bar, and the best epoch to go back to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.optimizer import SparseAdam
from nb_sparse_adam._src.recommender.training import EpochRecord


class Best:
    """The best epoch so far, with a copy of the vectors and their state.

    Parameters
    ----------
    optimizer : SparseAdam
        What is copied.
    """

    def __init__(self, optimizer: SparseAdam) -> None:
        self._optimizer = optimizer
        self._value = float("-inf")
        self._kept: tuple[dict[str, Any], dict[str, Any]] | None = None
        self.epoch = 0

    def is_over(self, epoch: int, value: float, patience: int | None) -> bool:
        """Note what an epoch has reached; say whether the best one is `patience` epochs ago."""
        if value > self._value:
            self._value, self.epoch = value, epoch
            tables = {name: table.copy() for name, table in self._optimizer.tables.items()}
            self._kept = tables, self._optimizer.state_dict()
        return self.epoch > 0 and patience is not None and epoch - self.epoch >= patience

    def restore(self) -> None:
        """Go back to the best epoch."""
        if self._kept is not None:
            tables, state = self._kept
            for name, table in tables.items():
                self._optimizer.tables[name][...] = table
            self._optimizer.load_state_dict(state)


class _Silent:
    """Shows nothing."""

    def batch(self, interactions: int, loss: float) -> None:
        """Note a batch."""

    def epoch(self, record: EpochRecord, k: int) -> None:
        """Note an epoch."""


class _Bar(_Silent):
    """Shows a bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def batch(self, interactions: int, loss: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update(interactions)

    def epoch(self, record: EpochRecord, k: int) -> None:
        reached = f", recall@{k} {record.quality.recall:.4f}" if record.quality is not None else ""
        self._bar.set_description(f"epoch {record.epoch}{reached}")


@contextmanager
def progress_bar(interactions: int, wanted: bool) -> Iterator[_Silent]:
    """Show a bar on stderr while interactions are trained on, if it is wanted."""
    if not wanted:
        yield _Silent()
        return
    tqdm = require("tqdm", "train", "the progress bar (see progress=False)").tqdm
    with tqdm(total=interactions, unit=" interactions", unit_scale=True, dynamic_ncols=True) as bar:
        yield _Bar(bar)
