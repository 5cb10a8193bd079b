# SPDX-License-Identifier: Apache-2.0
"""What `train` shows while it trains."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from nb_sparse_adam._src.engine.compilations import LOGGER
from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.recommender.ranking import Quality
from nb_sparse_adam._src.recommender.training import BPRModel, EpochRecord

_QUIET = 10.0  # seconds between lines on epochs that are not evaluated
Lines = Literal["none", "seldom", "evaluations"]
_LARGE = 1e3  # a loss that says that training has diverged: at first it is near ln(1 + negatives)


class Progress:
    """Shows a training: a bar on stderr, and lines on stdout; on stderr, that steps are compiled.

    Parameters
    ----------
    model : BPRModel
        What is trained.
    bar : bool
        Whether to show a bar.
    lines : {"none", "seldom", "evaluations"}
        Lines to print: none; without a bar one at least every ten seconds; also one for each evaluation.
    """

    def __init__(self, model: BPRModel, *, bar: bool, lines: Lines = "none") -> None:
        self._options, self._bar, self._lines = model.options, None, lines
        self._said, self._warned = time.monotonic(), False
        self._handler, self._level = _Handler(self._say), LOGGER.level
        if bar:
            self._bar = require("tqdm", "train", "the progress bar (pass False for none)").tqdm(
                total=model.interactions * (model.options.epochs - model.n_epochs),
                unit=" interactions",
                unit_scale=True,
                desc=self._position(model.n_epochs),
                dynamic_ncols=True,
            )

    def _position(self, done: int) -> str:
        return f"epoch {min(done + 1, self._options.epochs)}/{self._options.epochs}"

    def __enter__(self) -> Progress:
        if self._lines != "none":
            LOGGER.addHandler(self._handler)
            LOGGER.setLevel(logging.INFO)
        return self

    def __exit__(self, *error: object) -> None:
        if self._lines != "none":
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
        reached = "" if record.quality is None else f"  {describe(record.quality, self._options.top)}"
        if self._bar is not None:
            self._bar.set_description(self._position(record.epoch) + reached)
        if self._lines == "none":
            return
        if record.loss > _LARGE and not self._warned:
            self._warned = True
            self._say(f"the loss is {record.loss:.3g}: training has diverged; try a smaller --lr", sys.stderr)
        now = time.monotonic()
        wanted = record.quality is not None and self._lines == "evaluations"
        if not wanted and (self._bar is not None or now - self._said < _QUIET):
            return
        self._said = now
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
