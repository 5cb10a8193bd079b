# SPDX-License-Identifier: Apache-2.0
"""A recommender trained with `SparseAdam`: matrix factorization with a loss of `losses`.

The score of item i for user u is the inner product of their vectors. Training makes a user's items score
higher than items that the user has nothing to do with.

Everything random is a function of the seed, its purpose, the epoch and the place in it, and every sum has a
fixed order: the same seed gives the same bits with any number of threads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.engine.pacing import Pace, choices_up_to
from nb_sparse_adam._src.engine.threads import usable_threads
from nb_sparse_adam._src.gradients import RowGradient
from nb_sparse_adam._src.optimizer import SparseAdam
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.recommender import bpr
from nb_sparse_adam._src.recommender.batches import Batch, Batches
from nb_sparse_adam._src.recommender.early_stopping import Best
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, hold_out, random_stream
from nb_sparse_adam._src.recommender.losses import loss_of
from nb_sparse_adam._src.recommender.options import BPROptions
from nb_sparse_adam._src.recommender.ranking import Quality, measure
from nb_sparse_adam.errors import InteractionsError, OptionError


@public("nb_sparse_adam.recommender")
@dataclass(frozen=True)
class EpochRecord:
    """What happened in one epoch.

    Attributes
    ----------
    epoch : int
        Counted from 1.
    loss : float
        Mean loss of its triples (BPR) or interactions (softmax), each at the time of its batch.
    seconds : float
        Time of the training alone, evaluation not included.
    interactions : int
        Interactions trained on.
    quality : Quality or None
        Quality of the ranking after the epoch, if it was evaluated.
    """

    epoch: int
    loss: float
    seconds: float
    interactions: int
    quality: Quality | None


class Unfinished(NamedTuple):
    """How far an epoch is: batches done, and the sum of their losses, each times its interactions."""

    batches: int
    loss: float


def initial_vectors(random: np.random.Generator, rows: int, options: BPROptions) -> npt.NDArray[np.float32]:
    """Draw the vectors that training begins with, shape (rows, dim)."""
    return random.standard_normal((rows, options.dim), dtype=np.float32) * np.float32(options.init_std)


def _optimizer(split: Split, options: BPROptions) -> SparseAdam:
    random, train = random_stream(options.seed, "init"), split.train
    return SparseAdam(
        {
            "user": initial_vectors(random, train.n_users, options),
            "item": initial_vectors(random, train.n_items, options),
        },
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        step_counts=options.step_counts,
        eps_hat=options.eps_hat,
        num_threads=options.threads,
    )


def _checked(optimizer: SparseAdam, name: str, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Return a table of an optimizer, of which kernels take it that it has this shape."""
    table = optimizer.tables.get(name)
    if table is None or table.shape != shape or table.dtype != np.float32:
        got = "none" if table is None else f"{table.shape} {table.dtype}"
        raise OptionError(f"optimizer: got {got} for table {name!r}, expected {shape} float32")
    fitting: npt.NDArray[np.float32] = table
    return fitting


@public("nb_sparse_adam.recommender")
class BPRModel:
    """Matrix factorization for the ranking of items, trained by one `SparseAdam`.

    The loss is a softmax or BPR's, as the options say; BPR's was the first, and gave the name.

    Parameters
    ----------
    split : Split
        What to train on, and what to predict.
    options : BPROptions, optional
        The defaults, if None.
    optimizer : SparseAdam, optional
        To go on with: its tables ``"user"`` and ``"item"`` have a row for each user and item of the split.

    Attributes
    ----------
    user_table : float32 array, shape (n_users, dim)
    item_table : float32 array, shape (n_items, dim)
        The vectors; the score of item i for user u is ``user_table[u] @ item_table[i]``. A user or an item
        without training interactions keeps the initial vector, unless it is sampled.
    optimizer : SparseAdam
        It has the tables ``"user"`` and ``"item"``.
    history : list of EpochRecord
        One of each epoch that was finished.
    n_epochs : int
        Epochs whose work the tables hold: those of the history or, after early stopping, those up to the
        best one.
    unfinished : Unfinished
        How far the epoch after those is.

    Raises
    ------
    InteractionsError
        If there is nothing to train on.
    OptionError
        If `SparseAdam` refuses an option.

    Examples
    --------
    >>> from nb_sparse_adam.recommender import generate, hold_out
    >>> model = BPRModel(hold_out(generate(200, 50, 10.0)), BPROptions(dim=8, epochs=2))
    >>> model.fit()
    >>> [record.epoch for record in model.history]
    [1, 2]
    """

    def __init__(
        self, split: Split, options: BPROptions | None = None, optimizer: SparseAdam | None = None
    ) -> None:
        self.split = split
        self.options = options = BPROptions() if options is None else options
        self._batches = Batches(split, options)
        trainable = len(self._batches.interactions)
        if not trainable:
            raise InteractionsError(
                f"there is nothing to train on: each of the {len(split.train):,} training interactions is of "
                f"a user who has all {split.train.n_items:,} items, so that no other item can be sampled"
            )
        self.interactions = trainable
        self.optimizer = _optimizer(split, options) if optimizer is None else optimizer
        self.user_table, self.item_table = (
            _checked(self.optimizer, name, (rows, options.dim))
            for name, rows in (("user", split.train.n_users), ("item", split.train.n_items))
        )
        threads = options.threads
        self._pace = Pace(choices_up_to(usable_threads(None)) if threads is None else [threads])
        self.history: list[EpochRecord] = []
        self.n_epochs = 0
        self.unfinished = Unfinished(0, 0.0)
        size = min(options.batch_size, trainable)
        self._gradients = bpr.Pair(
            np.empty((size, options.dim), dtype=np.float32),
            np.empty((size * (1 + self._batches.negatives), options.dim), dtype=np.float32),
        )
        self._loss = loss_of(self._batches, size)

    def fit(
        self,
        on_batch: Callable[[int, float], None] | None = None,
        on_epoch: Callable[[EpochRecord], None] | None = None,
        patience: int | None = None,
    ) -> None:
        """Train until ``options.epochs`` epochs are done.

        An exception, `KeyboardInterrupt` among them, leaves tables and optimizer as they were after some
        batch, and the history without the epoch that was not finished. If it came from `on_batch`, the next
        call goes on with the next batch.

        Parameters
        ----------
        on_batch : callable, optional
            Called after each batch with its number of interactions and its loss.
        on_epoch : callable, optional
            Called after each epoch with its record.
        patience : int, optional
            Stop when so many evaluations have found no better recall, and go back to the best one, whether
            or not it came to that. It takes memory for one more copy of vectors and state.

        Raises
        ------
        NonFiniteGradientError
            If the training diverges.
        """
        options, best = self.options, None if patience is None else Best(self.optimizer, patience)
        del self.history[self.n_epochs :]
        for epoch in range(self.n_epochs + 1, options.epochs + 1):
            start = time.perf_counter()
            loss = self.run_epoch(epoch, on_batch)
            seconds = time.perf_counter() - start
            due = epoch == options.epochs or (options.eval_every > 0 and epoch % options.eval_every == 0)
            quality = self.evaluate() if due and len(self.split.test) else None
            record = EpochRecord(epoch, loss, seconds, self.interactions, quality)
            self.history.append(record)
            self.n_epochs = epoch
            if on_epoch is not None:
                on_epoch(record)
            if best is not None and quality is not None and best.is_over(epoch, quality.recall):
                break
        if best is not None and best.epoch:
            best.restore()
            self.n_epochs = best.epoch

    def run_epoch(self, epoch: int, on_batch: Callable[[int, float], None] | None = None) -> float:
        """Train on the batches of one epoch, counted from 1, and return its loss, as in `EpochRecord`.

        Those that `unfinished` counts are left out.
        """
        done, total = self.unfinished
        for batch in itertools.islice(self._batches.epoch(epoch), done, None):
            start = time.perf_counter()
            loss = self._train_batch(batch)
            self._pace.took(time.perf_counter() - start)
            done, total = done + 1, total + loss * len(batch.users)
            self.unfinished = Unfinished(done, total)
            if on_batch is not None:
                on_batch(len(batch.users), loss)
        self.unfinished = Unfinished(0, 0.0)
        return total / self.interactions

    def _train_batch(self, batch: Batch) -> float:
        """Take one optimizer step on a batch, and return the loss before it."""
        if self.optimizer.num_threads != self._pace.threads:
            self.optimizer.num_threads = self._pace.threads
        loss, user_gradient, item_gradient = self._loss_and_gradients(batch)
        self.optimizer.step({"user": user_gradient, "item": item_gradient})
        return loss

    def _loss_and_gradients(self, batch: Batch) -> tuple[float, RowGradient, RowGradient]:
        """Return the loss of a batch and its gradients with respect to the user and the item table.

        The values of the gradients, shapes (n, dim) and (len(batch.items), dim), are overwritten by the next
        call. Ids may repeat; `SparseAdam` adds their rows up.
        """
        gradients = bpr.Pair(
            self._gradients.user[: len(batch.users)], self._gradients.item[: len(batch.items)]
        )
        tables = bpr.Pair(self.user_table, self.item_table)
        loss = self._loss(tables, batch, gradients, self.optimizer.num_threads)
        return loss, RowGradient(batch.users, gradients.user), RowGradient(batch.items, gradients.item)

    def evaluate(self) -> Quality:
        """Return recall@k and NDCG@k, k = ``options.top``, of the tables as they are."""
        options = self.options
        return measure(self.user_table, self.item_table, self.split, options.top, options.threads).quality


@public("nb_sparse_adam.recommender")
def train(data: Interactions | Split, options: BPROptions | None = None) -> BPRModel:
    """Train a recommender.

    Parameters
    ----------
    data : Interactions or Split
        If it is interactions, a fifth of every user's items is held out, with the seed of the options.
    options : BPROptions, optional
        The defaults, if None.

    Returns
    -------
    BPRModel
        With its tables and its history, whose last record has the quality of the ranking.

    Raises
    ------
    InteractionsError, OptionError, NonFiniteGradientError
        As `BPRModel` and its `BPRModel.fit` do.
    """
    options = BPROptions() if options is None else options
    split = data if isinstance(data, Split) else hold_out(data, seed=options.seed)
    model = BPRModel(split, options)
    model.fit()
    return model
