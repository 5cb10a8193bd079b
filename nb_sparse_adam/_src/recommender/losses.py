# SPDX-License-Identifier: Apache-2.0
"""The losses of the recommender, and which one the options name.

The score of item i for user u is s(u, i) = ⟨U_u, V_i⟩. A batch has n interactions (u, i), each with negatives
j. What is regularized is the rows that were looked up. w is the weight of an interaction by the mean of the
weights of all that are trained on, and 1 where there are none: it weighs what the interaction asks for, not
the regularization.

**BPR** (S. Rendle, C. Freudenthaler, Z. Gantner, L. Schmidt-Thieme 2009, "BPR: Bayesian Personalized Ranking
from Implicit Feedback", UAI), with T = n · negatives triples:

    L = 1/T · Σ  w · softplus(−(s(u, i) − s(u, j))) + reg/2 · (‖U_u‖² + ‖V_i‖² + ‖V_j‖²)

for −ln σ(x) = softplus(−x).

**Sampled softmax** (Y. Bengio, J.-S. Senécal 2008, "Adaptive Importance Sampling to Accelerate Training of a
Neural Probabilistic Language Model", IEEE Transactions on Neural Networks 19; S. Jean, K. Cho, R. Memisevic,
Y. Bengio 2015, "On Using Very Large Target Vocabulary for Neural Machine Translation", ACL, section 3), with
C the interaction's own item i and its negatives, and temperature τ:

    z(j) = s(u, j) / τ − ln Q(j)
    L = 1/n · Σ  w · (−z(i) + ln Σ_{j ∈ C} exp(z(j))) + reg/2 · (‖U_u‖² + ‖V_i‖² + mean_j ‖V_j‖²)

Q(j) is the probability that j is drawn. It is proportional to popularity^α: a factor that all of C share (of
a user's own items, which are not drawn) cancels. With α = 0, so does all of it.

**In-batch softmax** (X. Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
Recommendations", RecSys): C is the items of a group of the batch. Q(j) is the item's share of the training
interactions, and an item that is in C twice counts once for whom it is the positive. No mean_j ‖V_j‖² is
added: every row of C is the positive of its own interaction.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from nb_sparse_adam._src.recommender import bpr, softmax
from nb_sparse_adam._src.recommender.batches import Batch, Batches
from nb_sparse_adam._src.recommender.options import BPROptions
from nb_sparse_adam._src.recommender.products import padded
from nb_sparse_adam._src.recommender.sampling import BLOCK, launch


class Loss(Protocol):
    """A loss: made with what the batches are made by, and the size of the largest."""

    def __init__(self, batches: Batches, size: int) -> None: ...

    def __call__(self, tables: bpr.Pair, batch: Batch, gradients: bpr.Pair, threads: int | None) -> float:
        """Write the gradients of a batch's rows, (n, dim) and (len(batch.items), dim); return its loss."""
        ...


def _log_shares(batches: Batches, power: float) -> np.ndarray:
    """Return log Q of each item, where Q is proportional to popularity^power; 0 where Q is."""
    logs = power * np.log(np.maximum(batches.popularity, 1))
    total = np.log(np.sum(np.exp(logs - logs.max()), where=batches.popularity > 0)) + logs.max()
    return np.where(batches.popularity > 0, logs - total, 0.0)


class BPR:
    """The loss of Rendle et al. (2009)."""

    def __init__(self, batches: Batches, size: int) -> None:
        self._reg = float(batches.options.reg)
        self._losses = np.empty(-(-size // BLOCK))

    def __call__(self, tables: bpr.Pair, batch: Batch, gradients: bpr.Pair, threads: int | None) -> float:
        n = len(batch.users)
        launch(
            bpr.gradients, threads, n,
            *tables, batch.users, batch.items, batch.weights, self._reg, *gradients, self._losses,
        )  # fmt: skip
        return float(self._losses[: -(-n // BLOCK)].sum()) / batch.negatives.size


class SampledSoftmax:
    """The softmax of an interaction's item and the negatives that were sampled for it."""

    def __init__(self, batches: Batches, size: int) -> None:
        options = batches.options
        self._reg, self._sharpness = float(options.reg), 1.0 / options.temperature
        self._losses = np.empty(-(-size // BLOCK))
        self._log_q = np.zeros(len(batches.popularity))
        if options.popularity > 0:
            self._log_q = _log_shares(batches, options.popularity)
        self._shares = np.empty((size, options.negatives))

    def __call__(self, tables: bpr.Pair, batch: Batch, gradients: bpr.Pair, threads: int | None) -> float:
        n = len(batch.users)
        launch(
            softmax.sampled, threads, n,
            *tables, batch.users, batch.items, batch.weights, self._log_q, self._sharpness, self._reg,
            *gradients, self._shares, self._losses,
        )  # fmt: skip
        return float(self._losses[: -(-n // BLOCK)].sum()) / n


class InBatchSoftmax:
    """The softmax of an interaction's item and the items of the others of its group."""

    def __init__(self, batches: Batches, size: int) -> None:
        options = batches.options
        self._reg, self._sharpness = float(options.reg), 1.0 / options.temperature
        self._longest = longest = min(options.negatives + 1, size)
        groups = -(-size // longest)
        self._log_q = _log_shares(batches, 1.0).astype(np.float32)
        wide, across = padded(options.dim), padded(longest)
        # Zeros: what pads a row is multiplied, too, and numbers that are not normal take time.
        self._user_rows, self._item_rows, self._sums = np.zeros((3, size, wide), np.float32)
        self._turned = np.zeros((groups, options.dim, across), np.float32)
        self._corrections = np.empty(size, np.float32)
        self._shares = np.zeros((size, across), np.float32)
        self._losses = np.empty(groups * -(-longest // BLOCK))

    def __call__(self, tables: bpr.Pair, batch: Batch, gradients: bpr.Pair, threads: int | None) -> float:
        n = len(batch.users)
        launch(
            softmax.in_batch, threads, n,
            *tables, batch.users, batch.items, batch.weights, self._log_q, self._sharpness, self._reg,
            self._longest, *gradients, self._user_rows, self._item_rows, self._turned, self._corrections,
            self._shares, self._sums, self._losses,
        )  # fmt: skip
        units = -(-n // self._longest) * -(-self._longest // BLOCK)
        return float(self._losses[:units].sum()) / n


LOSSES: dict[tuple[str, bool], type[Loss]] = {
    ("bpr", False): BPR,
    ("softmax", False): SampledSoftmax,
    ("softmax", True): InBatchSoftmax,
}
"""(loss, in_batch) of the options -> the loss."""


def loss_of(batches: Batches, size: int) -> Loss:
    """Make the loss that the options name, for batches of at most `size` interactions."""
    options: BPROptions = batches.options
    return LOSSES[options.loss, options.in_batch](batches, size)
