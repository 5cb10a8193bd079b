# SPDX-License-Identifier: Apache-2.0
"""A recommender trained with `SparseAdam`: matrix factorization with the BPR loss.

The score of item i for user u is the inner product of their vectors. Training makes a user's items score
higher than items that the user has nothing to do with. With T triples in a batch, of a user u, an item i of u
and a sampled other item j, the loss of the batch is

    L = 1/T · Σ  softplus(−(⟨U_u, V_i⟩ − ⟨U_u, V_j⟩)) + reg/2 · (‖U_u‖² + ‖V_i‖² + ‖V_j‖²)

after S. Rendle, C. Freudenthaler, Z. Gantner, L. Schmidt-Thieme (2009), "BPR: Bayesian Personalized Ranking
from Implicit Feedback", UAI: −ln σ(x) = softplus(−x). What is regularized is the rows that were looked up.

Everything random is a function of the seed, its purpose, the epoch and the place in it, and every sum has a
fixed order: the same seed gives the same bits with any number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.annotations import StepCounts
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.pacing import Pace, choices_up_to
from nb_sparse_adam._src.engine.threads import Partition, run, usable_threads
from nb_sparse_adam._src.gradients import RowGradient
from nb_sparse_adam._src.optimizer import SparseAdam
from nb_sparse_adam._src.options import STEP_COUNTS
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.recommender import bpr
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, hold_out, random_stream
from nb_sparse_adam._src.recommender.ranking import Quality, evaluate
from nb_sparse_adam.errors import InteractionsError, OptionError


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
    "negatives": (lambda x: _is_integer(x, 1), "an integer of at least 1"),
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


@public("nb_sparse_adam.recommender")
@dataclass(frozen=True)
class BPROptions:
    """Options of the training; each is checked, and refused by name.

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
        Weight of the squared norms in the loss.
    negatives : int
        Items sampled for each interaction, uniformly among those with which the user has no training
        interaction.
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
    epochs: int = 40
    batch_size: int = 1024
    lr: float = 0.005
    reg: float = 0.01
    negatives: int = 1
    init_std: float = 0.1
    seed: int = 0
    top: int = 20
    eval_every: int = 5
    step_counts: StepCounts = "element"
    eps_hat: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    threads: int | None = None

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            passes, domain = DOMAINS[option.name]
            if not passes(value):
                raise OptionError(f"{option.name}: expected {domain}, got {value!r}")


@public("nb_sparse_adam.recommender")
@dataclass(frozen=True)
class EpochRecord:
    """What happened in one epoch.

    Attributes
    ----------
    epoch : int
        Counted from 1.
    loss : float
        Mean loss of its triples, each at the time of its batch.
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


_CHUNK = 1 << 16  # interactions for which items are sampled at a time


@public("nb_sparse_adam.recommender")
class Batch(NamedTuple):
    """One batch, in arrays that the next batch overwrites.

    Attributes
    ----------
    users : int32 array, shape (n,)
        Row of the user of each interaction.
    positives : int32 array, shape (n,)
        Row of its item.
    negatives : int32 array, shape (n, negatives)
        Rows of the items sampled for it.
    items : int32 array, shape (n + n * negatives,)
        `positives` and `negatives` in one: the same memory.
    """

    users: npt.NDArray[np.int32]
    positives: npt.NDArray[np.int32]
    negatives: npt.NDArray[np.int32]
    items: npt.NDArray[np.int32]


def _launch(kernel: Drivers, requested: int | None, interactions: int, *arguments: Any) -> None:
    """Run a kernel of `bpr` on the threads of the options, or on this one alone if there is little to do."""
    threads = 1 if interactions < 4 * bpr.BLOCK else usable_threads(requested)
    run(kernel, Partition(threads, threads), arguments)


def _trainable(split: Split) -> npt.NDArray[np.int64]:
    """Return the places of the interactions to train on: all but those of users who have every item."""
    train = split.train
    return np.flatnonzero(train.counts()[train.users()] < train.n_items)


@public("nb_sparse_adam.recommender")
def epoch_batches(split: Split, options: BPROptions, epoch: int) -> Iterator[Batch]:
    """Yield the batches of an epoch, the very ones that the training uses.

    Parameters
    ----------
    split : Split
        Its ``train`` is used.
    options : BPROptions
        ``seed``, ``batch_size``, ``negatives`` and ``threads`` are used.
    epoch : int
        Counted from 1.

    Yields
    ------
    Batch
        Its arrays are overwritten by the next one: copy what should last.
    """
    train = split.train
    source = bpr.Source(train.users(), train.indptr, train.indices, train.n_items)
    order = _trainable(split)
    random = random_stream(options.seed, "order", epoch)
    random.shuffle(order)
    key = random.integers(2**64, dtype=np.uint64)
    size, width = options.batch_size, 1 + options.negatives
    # Several batches at a time: to start threads takes as long as to sample a thousand items.
    chunk = min(max(_CHUNK // size, 1) * size, len(order))
    users, items = np.empty(chunk, dtype=np.int32), np.empty(chunk * width, dtype=np.int32)
    for first in range(0, len(order), max(chunk, 1)):
        n = min(chunk, len(order) - first)
        with np.errstate(over="ignore"):  # without the JIT, splitmix64 overflows on NumPy's scalars
            _launch(
                bpr.sample, options.threads, n,
                key, first, order[first : first + n], *source, size, users[:n], items[: n * width],
            )  # fmt: skip
        for start in range(0, n, size):
            stop = min(start + size, n)
            of_batch = items[start * width : stop * width]
            positives, negatives = of_batch[: stop - start], of_batch[stop - start :]
            yield Batch(users[start:stop], positives, negatives.reshape(-1, options.negatives), of_batch)


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


@public("nb_sparse_adam.recommender")
class BPRModel:
    """Matrix factorization for the ranking of items, trained with the BPR loss by one `SparseAdam`.

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
        trainable = len(_trainable(split))
        if not trainable:
            raise InteractionsError(
                f"there is nothing to train on: each of the {len(split.train):,} training interactions is of "
                f"a user who has all {split.train.n_items:,} items, so that no other item can be sampled"
            )
        self.interactions = trainable
        self.optimizer = _optimizer(split, options) if optimizer is None else optimizer
        self.user_table, self.item_table = (self.optimizer.tables[name] for name in ("user", "item"))
        threads = options.threads
        self._pace = Pace(choices_up_to(usable_threads(None)) if threads is None else [threads])
        self.history: list[EpochRecord] = []
        size = min(options.batch_size, trainable)
        self._gradients = bpr.Pair(
            np.empty((size, options.dim), dtype=np.float32),
            np.empty((size * (1 + options.negatives), options.dim), dtype=np.float32),
        )
        self._losses = np.empty(-(-size // bpr.BLOCK))

    def fit(
        self,
        on_batch: Callable[[int, float], None] | None = None,
        on_epoch: Callable[[EpochRecord], None] | None = None,
    ) -> None:
        """Train until ``options.epochs`` epochs are in the history.

        An exception, `KeyboardInterrupt` among them, leaves tables and optimizer as they were after some
        batch, and the history without the epoch that was not finished.

        Parameters
        ----------
        on_batch : callable, optional
            Called after each batch with its number of interactions and its loss.
        on_epoch : callable, optional
            Called after each epoch with its record.

        Raises
        ------
        NonFiniteGradientError
            If the training diverges.
        """
        options = self.options
        for epoch in range(len(self.history) + 1, options.epochs + 1):
            start = time.perf_counter()
            loss = self.run_epoch(epoch, on_batch)
            seconds = time.perf_counter() - start
            due = epoch == options.epochs or (options.eval_every > 0 and epoch % options.eval_every == 0)
            quality = self.evaluate() if due else None
            self.history.append(EpochRecord(epoch, loss, seconds, self.interactions, quality))
            if on_epoch is not None:
                on_epoch(self.history[-1])

    def run_epoch(self, epoch: int, on_batch: Callable[[int, float], None] | None = None) -> float:
        """Train on the batches of one epoch, counted from 1, and return the mean loss of its triples."""
        total = 0.0
        for batch in epoch_batches(self.split, self.options, epoch):
            start = time.perf_counter()
            loss = self._train_batch(batch)
            self._pace.took(time.perf_counter() - start)
            total += loss * len(batch.users)
            if on_batch is not None:
                on_batch(len(batch.users), loss)
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

        The values of the gradients, shapes (n, dim) and (n + n * negatives, dim), are overwritten by the next
        call. Ids may repeat; `SparseAdam` adds their rows up.
        """
        n, blocks = len(batch.users), -(-len(batch.users) // bpr.BLOCK)
        gradients = bpr.Pair(self._gradients.user[:n], self._gradients.item[: len(batch.items)])
        _launch(
            bpr.gradients,
            self.optimizer.num_threads,
            n,
            *bpr.Pair(self.user_table, self.item_table),
            batch.users,
            batch.items,
            float(self.options.reg),
            *gradients,
            self._losses,
        )
        loss = float(self._losses[:blocks].sum()) / batch.negatives.size
        return loss, RowGradient(batch.users, gradients.user), RowGradient(batch.items, gradients.item)

    def evaluate(self) -> Quality:
        """Return recall@k and NDCG@k, k = ``options.top``, of the tables as they are."""
        return evaluate(self.user_table, self.item_table, self.split, self.options.top)


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
