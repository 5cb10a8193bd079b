# SPDX-License-Identifier: Apache-2.0
"""Random search of the recommender's options, with early stopping, on a validation split.

J. Bergstra, Y. Bengio 2012, "Random Search for Hyper-Parameter Optimization", JMLR 13. A trial ends when its
own evaluations get no better, or by the median stopping rule (D. Golovin et al. 2017, "Google Vizier: A
Service for Black-Box Optimization", KDD, section 3.2.1): when the best that it has found is below the median
of what the trials before it had found by that epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from statistics import median
from typing import Any, Literal, NamedTuple

import numpy as np

from nb_sparse_adam._src.recommender.interactions import Split, random_stream
from nb_sparse_adam._src.recommender.options import BPROptions
from nb_sparse_adam._src.recommender.progress import Progress
from nb_sparse_adam._src.recommender.ranking import Quality
from nb_sparse_adam._src.recommender.training import BPRModel, EpochRecord
from nb_sparse_adam.errors import NonFiniteGradientError, OptionError

_ENOUGH = 3  # trials that a median is taken of
_KINDS: tuple[dict[str, Any], ...] = (
    {"loss": "bpr", "in_batch": False},
    {"loss": "softmax", "in_batch": False},
    {"loss": "softmax", "in_batch": True},
)

Ending = Literal["patience", "epochs", "median", "diverged"]


class Trial(NamedTuple):
    """One setting, and how far it came.

    Attributes
    ----------
    number : int
        From 1; the first is the defaults, or what was given.
    options : BPROptions
    epoch : int
        The one whose evaluation was best; 0 if there was none.
    recall, ndcg : float
        What it had found; NaN if there was none.
    epochs : int
        How many were trained.
    seconds : float
        Evaluations included.
    ended : {"patience", "epochs", "median", "diverged"}
        By what.
    """

    number: int
    options: BPROptions
    epoch: int
    recall: float
    ndcg: float
    epochs: int
    seconds: float
    ended: Ending


class _HopelessError(Exception):
    """The trial is below the median of the others."""


def draw(random: np.random.Generator, given: Mapping[str, Any]) -> BPROptions:
    """Draw a setting.

    Parameters
    ----------
    random : numpy.random.Generator
    given : mapping
        Options that are not to be searched.

    Returns
    -------
    BPROptions
    """

    def log_uniform(low: float, high: float) -> float:
        return float(f"{math.exp(random.uniform(math.log(low), math.log(high))):.3g}")

    def one_of(*values: Any) -> Any:
        return values[random.integers(len(values))]

    kind = one_of(*[kind for kind in _KINDS if _is_possible({**kind, **given})])
    drawn = {
        **kind,
        "lr": log_uniform(5e-4, 2e-2),
        "reg": log_uniform(1e-3, 1.0),
        "batch_size": one_of(256, 512, 1024, 2048, 4096),
        "init_std": log_uniform(0.01, 0.3),
        "negatives": one_of(1, 2, 5, 10, 20),
        "popularity": one_of(0.0, 0.25, 0.5, 0.75),
        "temperature": log_uniform(0.2, 2.0),
    }
    values = {**drawn, **given}
    if values["in_batch"]:
        drawn |= {"negatives": one_of(31, 63, 127, 255, 511), "popularity": 0.0}
    if values["loss"] == "bpr":
        drawn |= {"temperature": 1.0}
    return BPROptions(**{**drawn, **given})


def _is_possible(values: Mapping[str, Any]) -> bool:
    try:
        BPROptions(**values)
    except OptionError:
        return False
    return True


class Search:
    """Tries settings one after another.

    Parameters
    ----------
    split : Split
        ``test`` is the validation, whose recall@k, k = ``top``, is to be highest.
    given : mapping
        Options that are not to be searched. ``seed`` is of the search, too.
    patience : int
        Evaluations without a better one after which a trial ends.

    Attributes
    ----------
    trials : list of Trial
    best : BPRModel or None
        The model of the best trial, after its best epoch.
    """

    def __init__(self, split: Split, given: Mapping[str, Any], patience: int) -> None:
        self._split, self.given, self._patience = split, given, patience
        self._random = random_stream(BPROptions(**given).seed, "search")
        self._curves: list[dict[int, float]] = []  # epoch -> best recall so far, of each trial
        self.trials: list[Trial] = []
        self.best: BPRModel | None = None
        self._highest = -math.inf

    def next(self, bar: bool, check: Callable[[], None]) -> Trial:
        """Try one setting more.

        Parameters
        ----------
        bar : bool
            Whether to show a bar.
        check : callable
            Called after each batch; an exception of it ends the trial, which is forgotten.
        """
        options = draw(self._random, self.given) if self.trials else BPROptions(**self.given)
        start, model = time.perf_counter(), BPRModel(self._split, options)
        curve: dict[int, float] = {}
        found = Quality(math.nan, math.nan, 0)
        best_epoch = 0
        ended: Ending = "epochs"

        def on_batch(interactions: int, loss: float) -> None:
            shown.on_batch(interactions, loss)
            check()

        def on_epoch(record: EpochRecord) -> None:
            nonlocal found, best_epoch
            shown.on_epoch(record)
            if record.quality is None:
                return
            if not record.quality.recall <= found.recall:
                found, best_epoch = record.quality, record.epoch
            curve[record.epoch] = found.recall
            others = [one[record.epoch] for one in self._curves if record.epoch in one]
            if len(others) >= _ENOUGH and found.recall < median(others):
                raise _HopelessError

        with Progress(model, bar=bar, lines="seldom") as shown:
            try:
                model.fit(on_batch, on_epoch, self._patience)
                if len(model.history) < options.epochs:
                    ended = "patience"
            except _HopelessError:
                ended = "median"
            except NonFiniteGradientError:
                ended = "diverged"
        trial = Trial(
            len(self.trials) + 1, options, best_epoch, found.recall, found.ndcg, len(model.history),
            time.perf_counter() - start, ended,
        )  # fmt: skip
        self.trials.append(trial)
        self._curves.append(curve)
        if ended in ("epochs", "patience") and found.recall > self._highest:
            self.best, self._highest = model, found.recall
        return trial


def searched(given: Mapping[str, Any]) -> list[str]:
    """Return the names of the options that a search varies, given what is not to be searched."""
    names = ("loss", "in_batch", "lr", "reg", "batch_size", "init_std", "negatives", "popularity")
    return [name for name in (*names, "temperature") if name not in given]


def describe_trial(trial: Trial, count: int, names: list[str]) -> str:
    """Return a line on a trial."""
    top = trial.options.top
    reached = (
        f"validation recall@{top} {trial.recall:.4f} after epoch {trial.epoch}" if trial.epoch else "nothing"
    )
    ending = {"median": ", hopeless", "diverged": ", diverged"}.get(trial.ended, "")
    setting = " ".join(f"{name}={getattr(trial.options, name)}" for name in names)
    return (
        f"trial {trial.number:{len(str(count))}}/{count}  {reached}{ending}  {trial.seconds:.1f} s  {setting}"
    )


def table(trials: list[Trial]) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of all trials, best first."""
    top = trials[0].options.top
    names = [option.name for option in fields(BPROptions)]
    header = [
        "trial",
        f"recall@{top}",
        f"ndcg@{top}",
        "best_epoch",
        "epochs_done",
        "seconds",
        "ended",
        *names,
    ]
    ranked = sorted(trials, key=lambda one: (-one.recall if one.epoch else math.inf, one.number))
    rows = []
    for one in ranked:
        quality = [one.recall, one.ndcg] if one.epoch else [None, None]
        given = (getattr(one.options, name) for name in names)
        values = [" ".join(map(str, x)) if isinstance(x, tuple) else x for x in given]
        rows.append([one.number, *quality, one.epoch, one.epochs, round(one.seconds, 3), one.ended, *values])
    return header, rows
