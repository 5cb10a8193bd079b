# SPDX-License-Identifier: Apache-2.0
"""The batches of an epoch: the interactions in a random order, each with sampled items."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.recommender import sampling
from nb_sparse_adam._src.recommender.interactions import Split, random_stream
from nb_sparse_adam._src.recommender.options import BPROptions

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
        Rows of the items sampled for it; (n, 0) if none are, with ``in_batch``.
    items : int32 array, shape (n + n * negatives,)
        `positives` and `negatives` in one: the same memory.
    weights : float32 array, shape (n,)
        What multiplies the loss of each interaction: its weight by the mean of all that are trained on. 1, if
        the interactions have no weights.
    """

    users: npt.NDArray[np.int32]
    positives: npt.NDArray[np.int32]
    negatives: npt.NDArray[np.int32]
    items: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


class Batches:
    """Makes the batches of any epoch.

    Parameters
    ----------
    split : Split
        Its ``train`` is used.
    options : BPROptions

    Attributes
    ----------
    interactions : int64 array, shape (n,)
        Places of the interactions that are trained on: all but those of users to whom nothing else could be
        sampled.
    popularity : int64 array, shape (n_items,)
        Training interactions of each item.
    """

    def __init__(self, split: Split, options: BPROptions) -> None:
        train = split.train
        self.split, self.options = split, options
        self.popularity = np.bincount(train.indices, minlength=train.n_items)
        self.source = sampling.Source(train.users(), train.indptr, train.indices, train.n_items)
        self.negatives = 0 if options.in_batch else options.negatives
        self._kernel = sampling.sample
        self._masses: tuple[()] | sampling.Masses = ()
        others = np.int64(train.n_items)  # items that can be sampled at all
        if self.negatives and options.popularity > 0:
            masses = sampling.masses_of(self.popularity, options.popularity, self.source)
            self._kernel, self._masses = sampling.sample_by_mass, masses
            others = np.count_nonzero(self.popularity)
        if self.negatives:
            self.interactions = np.flatnonzero(train.counts()[self.source.users] < others)
        else:
            self.interactions = np.arange(len(train))
        self._ones = np.ones(min(options.batch_size, len(train)), dtype=np.float32)
        self._weights: npt.NDArray[np.float32] | None = None
        if train.weights is not None and len(self.interactions):
            mean = train.weights[self.interactions].mean(dtype=np.float64)
            self._weights = (train.weights / mean).astype(np.float32)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, counted from 1, in arrays that the next batch overwrites."""
        options, negatives = self.options, self.negatives
        order = self.interactions.copy()
        random = random_stream(options.seed, "order", epoch)
        random.shuffle(order)
        key = random.integers(2**64, dtype=np.uint64)
        size, width = options.batch_size, 1 + negatives
        # Several batches at a time: to start threads takes as long as to sample a thousand items.
        chunk = min(max(_CHUNK // size, 1) * size, len(order))
        users, items = np.empty(chunk, dtype=np.int32), np.empty(chunk * width, dtype=np.int32)
        for first in range(0, len(order), max(chunk, 1)):
            n = min(chunk, len(order) - first)
            with np.errstate(over="ignore"):  # without the JIT, splitmix64 overflows on NumPy's scalars
                sampling.launch(
                    self._kernel, options.threads, n,
                    key, first, order[first : first + n], *self.source, *self._masses, size, users[:n],
                    items[: n * width],
                )  # fmt: skip
            weights = None if self._weights is None else self._weights[order[first : first + n]]
            for start in range(0, n, size):
                stop = min(start + size, n)
                of_batch = items[start * width : stop * width]
                positives, others = of_batch[: stop - start], of_batch[stop - start :]
                of_each = self._ones[: stop - start] if weights is None else weights[start:stop]
                others = others.reshape(stop - start, negatives)
                yield Batch(users[start:stop], positives, others, of_batch, of_each)


@public("nb_sparse_adam.recommender")
def epoch_batches(split: Split, options: BPROptions, epoch: int) -> Iterator[Batch]:
    """Yield the batches of an epoch, the very ones that the training uses.

    Parameters
    ----------
    split : Split
        Its ``train`` is used.
    options : BPROptions
        ``seed``, ``batch_size``, ``negatives``, ``popularity``, ``in_batch`` and ``threads`` are used.
    epoch : int
        Counted from 1.

    Yields
    ------
    Batch
        Its arrays are overwritten by the next one: copy what should last.
    """
    yield from Batches(split, options).epoch(epoch)
