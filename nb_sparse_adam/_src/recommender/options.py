# SPDX-License-Identifier: Apache-2.0
"""Options of the recommender's training, and what each may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from nb_sparse_adam._src.annotations import StepCounts
from nb_sparse_adam._src.options import STEP_COUNTS
from nb_sparse_adam._src.public import public
from nb_sparse_adam.errors import OptionError

LossName: TypeAlias = Literal["bpr", "softmax"]
LOSS_NAMES: tuple[LossName, ...] = get_args(LossName)


def _is_integer(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**31


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


DOMAINS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dim": (lambda x: _is_integer(x, 1), "an integer of at least 1"),
    "epochs": (lambda x: _is_integer(x, 1), "an integer of at least 1"),
    "batch_size": (lambda x: _is_integer(x, 1), "an integer of at least 1"),
    "lr": (lambda x: _is_number(x) and x > 0, "a finite number greater than 0"),
    "reg": (lambda x: _is_number(x) and x >= 0, "a finite number of at least 0"),
    "loss": (lambda x: x in LOSS_NAMES, "'bpr' or 'softmax'"),
    "temperature": (lambda x: _is_number(x) and x > 0, "a finite number greater than 0"),
    "negatives": (lambda x: _is_integer(x, 1), "an integer of at least 1"),
    "popularity": (lambda x: _is_number(x) and x >= 0, "a finite number of at least 0"),
    "in_batch": (lambda x: isinstance(x, bool), "True or False"),
    "init_std": (lambda x: _is_number(x) and x > 0, "a finite number greater than 0"),
    "seed": (lambda x: _is_integer(x, 0), "an integer from 0 to 2147483647"),
    "top": (lambda x: _is_integer(x, 1), "an integer of at least 1"),
    "eval_every": (lambda x: _is_integer(x, 0), "an integer of at least 0"),
    "step_counts": (lambda x: x in STEP_COUNTS, "'element', 'row' or 'global'"),
    "eps_hat": (lambda x: isinstance(x, bool), "True or False"),
    "betas": (
        lambda x: isinstance(x, tuple) and len(x) == 2 and all(_is_number(one) and 0 <= one < 1 for one in x),
        "two numbers from 0 to below 1",
    ),
    "eps": (lambda x: _is_number(x) and x > 0, "a finite number greater than 0"),
    "threads": (lambda x: x is None or _is_integer(x, 1), "an integer of at least 1"),
}
"""Option -> (test of a value, the values that pass it in words)."""

NEGATIVES = {"in_batch": 63, "softmax": 20, "bpr": 5}
"""Kind of loss -> negatives, where none are given."""

REGS = {"softmax": 0.15, "bpr": 0.03}
"""Loss -> weight of the squared norms, where none is given."""


@public("nb_sparse_adam.recommender")
@dataclass(frozen=True)
class BPROptions:
    """Options of the training; each is checked, and refused by name.

    The defaults are the same for all data. They were chosen by a search on three sets, which the page "The
    recommender" describes. They are named after BPR, the first loss that there was.

    Attributes
    ----------
    dim : int
        Length of the vectors.
    epochs : int
        Passes over the training interactions.
    batch_size : int
        Interactions in a batch.
    lr, betas, eps, step_counts, eps_hat
        Of `SparseAdam`.
    reg : float
        Weight of the squared norms in the loss. None stands for what suits the loss: 0.15 with a softmax,
        0.03 with BPR.
    loss : {"softmax", "bpr"}
        The softmax with the correction by log Q, ``in_batch`` (Yi et al. 2019) or over sampled negatives
        (Bengio & Senécal 2008; Jean et al. 2015), or BPR (Rendle et al. 2009). The formulas are on the page
        "The recommender", section "The model".
    temperature : float
        What the softmax loss divides scores by. It spreads them: the vectors grow until differences of scores
        are some multiples of it. Of ``loss="softmax"`` only.
    negatives : int
        Items that each interaction is compared with: sampled among those with which the user has no training
        interaction or, with ``in_batch``, the items of so many other interactions of the batch. None stands
        for what suits the loss: 63 with ``in_batch``, 20 with another softmax, 5 with BPR.
    popularity : float
        Negatives are sampled in proportion to this power of the items' numbers of training interactions; 0:
        uniformly. With another number, an item without training interactions is never sampled.
    in_batch : bool
        Take the items of other interactions of the batch for negatives, and sample none. A batch is cut into
        groups of equal size, at most ``negatives + 1``. Of ``loss="softmax"`` only. None stands for True
        where that can be: with ``loss="softmax"`` and ``popularity=0``.
    init_std : float
        Standard deviation of the initial vectors, which are normal with mean 0.
    seed : int
        Seed of the initial vectors, the order of the interactions and the samples.
    top : int
        k of recall@k and NDCG@k.
    eval_every : int
        Epochs between evaluations; after the last epoch there is always one. 0: only that one.
    threads : int or None
        Threads to use; None for as many, of those that numba would use, as are fastest at the time.

    Raises
    ------
    OptionError
        If a value is out of its domain.
    """

    dim: int = 64
    epochs: int = 28
    batch_size: int = 512
    lr: float = 0.004
    reg: float = None  # type: ignore[assignment]  # __post_init__ makes it a float
    negatives: int = None  # type: ignore[assignment]  # __post_init__ makes it an int
    init_std: float = 0.01
    seed: int = 0
    top: int = 20
    eval_every: int = 5
    step_counts: StepCounts = "row"
    eps_hat: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    threads: int | None = None
    loss: LossName = "softmax"
    temperature: float = 1.0
    popularity: float = 0.0
    in_batch: bool = None  # type: ignore[assignment]  # __post_init__ makes it a bool

    def __post_init__(self) -> None:
        self._fill("in_batch", self.loss == "softmax" and self.popularity == 0)
        self._fill("negatives", NEGATIVES.get("in_batch" if self.in_batch else str(self.loss), 1))
        self._fill("reg", REGS.get(str(self.loss), 0.0))
        for option in fields(self):
            value = getattr(self, option.name)
            passes, domain = DOMAINS[option.name]
            if not passes(value):
                raise OptionError(f"{option.name}: expected {domain}, got {value!r}")
        if self.loss == "bpr" and self.temperature != 1:
            raise OptionError(
                f"temperature: expected 1.0 with loss='bpr', which has none, got {self.temperature!r}; "
                "loss='softmax' has one"
            )
        if self.loss == "bpr" and self.in_batch:
            raise OptionError(
                "in_batch: expected False with loss='bpr', got True; loss='softmax' takes negatives from the "
                "batch"
            )
        if self.in_batch and self.popularity != 0:
            raise OptionError(
                "popularity: expected 0.0 with in_batch=True, where an item is a negative as often as it is "
                f"in the batch, got {self.popularity!r}; with in_batch=False negatives are sampled"
            )

    def _fill(self, name: str, value: Any) -> None:
        """Give an option a value, if it has none."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)
