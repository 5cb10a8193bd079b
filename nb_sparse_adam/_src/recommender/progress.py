# SPDX-License-Identifier: Apache-2.0
"""What `train` shows while it trains."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from nb_sparse_adam._src.engine.compilations import LOGGER
from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.recommender.ranking import Quality
from nb_sparse_adam._src.recommender.training import BPRModel, EpochRecord

_QUIET = 10.0  # seconds between lines on epochs that are not evaluated
_LARGE = 1e3  # a loss that says that training has diverged: at first it is near ln(1 + negatives)


class Progress:
    """A bar on a terminal; a line on stdout for each evaluation, and on stderr when steps are compiled."""

    def __init__(self, model: BPRModel, wanted: bool) -> None:
        self._options, self._bar = model.options, None
        self._said, self._warned = time.monotonic(), False
        self._handler, self._level = _Handler(self._say), LOGGER.level
        if wanted and sys.stderr.isatty():
            self._bar = require("tqdm", "train", "the progress bar (see --no-progress)").tqdm(
                total=model.interactions * model.options.epochs,
                unit=" interactions",
                unit_scale=True,
                desc=f"epoch 1/{model.options.epochs}",
                dynamic_ncols=True,
            )

    def __enter__(self) -> Progress:
        LOGGER.addHandler(self._handler)
        LOGGER.setLevel(logging.INFO)
        return self

    def __exit__(self, *error: object) -> None:
        LOGGER.setLevel(self._level)
        LOGGER.removeHandler(self._handler)
        if self._bar is not None:
            self._bar.close()

    def _say(self, line: str, file: Any) -> None:
        if self._bar is None:
            print(line, file=file, flush=True)
        else:
            self._bar.write(line, file=file)

    def on_batch(self, interactions: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update(interactions)

    def on_epoch(self, record: EpochRecord) -> None:
        if self._bar is not None:
            self._bar.set_description(
                f"epoch {min(record.epoch + 1, self._options.epochs)}/{self._options.epochs}"
            )
        if record.loss > _LARGE and not self._warned:
            self._warned = True
            self._say(f"the loss is {record.loss:.3g}: training has diverged; try a smaller --lr", sys.stderr)
        now = time.monotonic()
        if record.quality is None and (self._bar is not None or now - self._said < _QUIET):
            return
        self._said = now
        reached = "" if record.quality is None else f"  {describe(record.quality, self._options.top)}"
        line = (
            f"epoch {record.epoch:3}  loss {record.loss:.4f}{reached}"
            f"  {record.interactions / record.seconds:,.0f} interactions/s"
        )
        self._say(line, sys.stdout)


class _Handler(logging.Handler):
    """Says what the library logs on stderr."""

    def __init__(self, say: Callable[[str, Any], None]) -> None:
        super().__init__(logging.INFO)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Say it in a line."""
        self._say(record.getMessage(), sys.stderr)


def describe(quality: Quality, top: int) -> str:
    """Return a quality in words."""
    if not quality.users:
        return f"recall@{top} unknown: no user has both training and held-out items"
    return f"recall@{top} {quality.recall:.4f}  ndcg@{top} {quality.ndcg:.4f}"
