# SPDX-License-Identifier: Apache-2.0
"""Recommenders of the comparison: this library's, and implicit's and LightFM's where they are installed.

All have vectors of `DIM` numbers. Each is given the options that were found for it: see `recommender_lines`.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.bench.peers import import_peer
from nb_sparse_adam._src.engine.threads import max_threads
from nb_sparse_adam._src.recommender.interactions import Interactions, Split
from nb_sparse_adam.recommender import BPRModel, BPROptions, MatrixFactorization

DIM = 64

Vectors = tuple[NDArray[np.float32], NDArray[np.float32]]  # (n_users, d) and (n_items, d)
After = Callable[[int], None]


class Recommender(abc.ABC):
    """A recommender that trains on a split, the same on every run, but for what threads do to each other.

    Parameters
    ----------
    split : Split
        Its ``train`` is trained on.
    threads : int
        At most. This library takes fewer where they are faster, if these are as many as it may use.
    seed : int
    epochs : int
        Passes over the interactions (for ALS: over users and items).
    """

    serves_all = True  # whether `recommend` can be timed

    def __init__(self, split: Split, threads: int, seed: int, epochs: int) -> None:
        self.split, self.threads, self.seed, self.epochs = split, threads, seed, epochs

    @abc.abstractmethod
    def warm(self) -> None:
        """Train another model for one epoch: compiles kernels, starts threads, imports."""

    @abc.abstractmethod
    def fit(self, after: After) -> None:
        """Train from the beginning; call `after` with the number of each epoch, from 1, when it is done."""

    @abc.abstractmethod
    def vectors(self) -> Vectors:
        """Return vectors whose inner products are the scores, as they are now, in memory that may change."""

    @abc.abstractmethod
    def recommend(self, k: int) -> Any:
        """Recommend k items to every user, without those that they have."""


class Ours(Recommender):
    """A model of this library.

    Parameters
    ----------
    split, threads, seed, epochs
        As for `Recommender`.
    **options
        Of `BPROptions`; its defaults, if they are not given.
    """

    def __init__(self, split: Split, threads: int, seed: int, epochs: int, **options: Any) -> None:
        super().__init__(split, threads, seed, epochs)
        chosen = None if threads == max_threads() else threads
        self._options = BPROptions(dim=DIM, epochs=epochs, seed=seed, threads=chosen, **options)

    def warm(self) -> None:
        """Compile, by an epoch of the model that `recommend` asks."""
        names = MatrixFactorization().get_params()
        chosen = {name: getattr(self._options, name) for name in names}
        self._served = MatrixFactorization(**{**chosen, "epochs": 1})
        self._served.fit(Interactions(self.split.train, self.split.user_ids, self.split.item_ids))

    def fit(self, after: After) -> None:
        """Train."""
        self._model = BPRModel(self.split, self._options)
        for epoch in range(1, self.epochs + 1):
            self._model.run_epoch(epoch)
            after(epoch)

    def vectors(self) -> Vectors:
        """Return the tables."""
        return self._model.user_table, self._model.item_table

    def recommend(self, k: int) -> Any:
        """Ask `MatrixFactorization`."""
        for name, vectors in zip(("user", "item"), self.vectors(), strict=True):
            self._served.optimizer_.tables[name][:] = vectors  # some milliseconds
        return self._served.recommend(self.split.user_ids, k)


def matrix_of(split: Split) -> Any:
    """Return what is trained on as a SciPy CSR matrix of ones, float32, shape (n_users, n_items)."""
    sparse = importlib.import_module("scipy.sparse")  # the peers bring it
    pairs = split.train
    ones = np.ones(len(pairs), dtype=np.float32)
    return sparse.csr_matrix((ones, pairs.indices, pairs.indptr), shape=(pairs.n_users, pairs.n_items))


class Implicit(Recommender):
    """A model of implicit.

    Parameters
    ----------
    split, threads, seed, epochs
        As for `Recommender`.
    model : str
        Module and factory: ``"bpr.BayesianPersonalizedRanking"``.
    **options
        Of the factory.
    """

    def __init__(
        self, split: Split, threads: int, seed: int, epochs: int, *, model: str, **options: Any
    ) -> None:
        super().__init__(split, threads, seed, epochs)
        import_peer("implicit")
        module, _, factory = model.partition(".")
        self._make = getattr(importlib.import_module(f"implicit.{module}"), factory)
        self._options = {"factors": DIM, "num_threads": threads, "use_gpu": False, **options}
        self._matrix = matrix_of(split)

    def warm(self) -> None:
        """Train another one."""
        self._make(iterations=1, random_state=self.seed, **self._options).fit(
            self._matrix, show_progress=False
        )

    def fit(self, after: After) -> None:
        """Train."""
        self._model = self._make(iterations=self.epochs, random_state=self.seed, **self._options)
        self._model.fit(self._matrix, show_progress=False, callback=lambda epoch, *_: after(epoch + 1))

    def vectors(self) -> Vectors:
        """Return its factors; a bias is one of them."""
        return self._model.user_factors, self._model.item_factors

    def recommend(self, k: int) -> Any:
        """Ask it for all users at once."""
        return self._model.recommend(np.arange(self.split.train.n_users), self._matrix, N=k)


class LightFM(Recommender):
    """LightFM without features; it has no recommendations for many users at once.

    Parameters
    ----------
    split, threads, seed, epochs
        As for `Recommender`.
    **options
        Of ``lightfm.LightFM``.
    """

    serves_all = False

    def __init__(self, split: Split, threads: int, seed: int, epochs: int, **options: Any) -> None:
        super().__init__(split, threads, seed, epochs)
        self._lightfm = import_peer("lightfm")
        self._options = {"no_components": DIM, "random_state": seed, **options}
        self._matrix = matrix_of(split).tocoo()

    def warm(self) -> None:
        """Train another one."""
        self._lightfm.LightFM(**self._options).fit(self._matrix, epochs=1, num_threads=self.threads)

    def fit(self, after: After) -> None:
        """Train; it says nothing between epochs, so that each of them is a call."""
        self._model = self._lightfm.LightFM(**self._options)
        for epoch in range(1, self.epochs + 1):
            self._model.fit_partial(self._matrix, epochs=1, num_threads=self.threads)
            after(epoch)

    def vectors(self) -> Vectors:
        """Return its embeddings, with the items' biases in a column of their own."""
        (_, users), (biases, items) = (
            self._model.get_user_representations(),
            self._model.get_item_representations(),
        )
        ones = np.ones((len(users), 1), dtype=np.float32)
        return np.hstack([users, ones]), np.hstack([items, biases[:, None]]).astype(np.float32)

    def recommend(self, k: int) -> Any:
        """Raise: there is nothing to ask."""
        raise NotImplementedError(k)
