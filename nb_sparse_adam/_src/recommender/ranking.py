# SPDX-License-Identifier: Apache-2.0
"""How good a recommender is: every item ranked for every user, recall@k and NDCG@k.

With T the held-out items of a user and r = 1, 2, ... the places of the ranking of all items that the user has
no training interaction with,

    recall@k = |T among the first k| / |T|
    NDCG@k   = sum over hits at place r <= k of 1 / log2(r + 1)  /  sum_{r=1}^{min(k, |T|)} 1 / log2(r + 1)

averaged over the users with at least one held-out and one training item. These are the definitions of
LightGCN (He et al. 2020, SIGIR, and its code) and of most that was published since.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.recommender.interactions import Split
from nb_sparse_adam._src.recommender.topk import best_items
from nb_sparse_adam.errors import OptionError


@dataclass(frozen=True)
class Quality:
    """Quality of a ranking, averaged over users.

    Attributes
    ----------
    recall, ndcg : float
        In [0, 1]; NaN if there is no user to average over.
    users : int
        Number of users averaged over.
    """

    recall: float
    ndcg: float
    users: int


def evaluate(
    user_table: npt.NDArray[Any], item_table: npt.NDArray[Any], split: Split, top: int = 20
) -> Quality:
    """Rank all items by the inner product of user and item vectors and compare with the held-out ones.

    Parameters
    ----------
    user_table : float array, shape (n_users, dim)
    item_table : float array, shape (n_items, dim)
    split : Split
        Items of ``split.train`` are masked, those of ``split.test`` are the ones to find.
    top : int, default 20
        k, the length of the list that is looked at.

    Returns
    -------
    Quality

    Raises
    ------
    OptionError
        If ``top < 1`` or the shapes of the tables do not fit the split.
    """
    expected = (split.train.n_users, split.train.n_items)
    if (len(user_table), len(item_table)) != expected or user_table.shape[1:] != item_table.shape[1:]:
        raise OptionError(
            f"expected tables of the shapes ({expected[0]}, dim) and ({expected[1]}, dim), "
            f"got shapes {user_table.shape} and {item_table.shape}"
        )
    return measure(user_table, item_table, split, top).quality


class Measured(NamedTuple):
    """Quality, and two figures more.

    Attributes
    ----------
    quality : Quality
    map : float
        Mean over users of ``1 / min(k, |T|) · sum over hits at place r <= k of hits up to r / r``.
    coverage : float
        Part of all items that is among the first k of any user.
    """

    quality: Quality
    map: float
    coverage: float


def measure(
    user_table: npt.NDArray[Any],
    item_table: npt.NDArray[Any],
    split: Split,
    top: int,
    threads: int | None = None,
) -> Measured:
    """Do what `evaluate` does, and compute MAP@k and coverage@k; shapes are not checked.

    Parameters
    ----------
    user_table, item_table, split, top
        As for `evaluate`.
    threads : int, optional
        None for all that numba would use.

    Raises
    ------
    OptionError
        If ``top < 1``.
    """
    if top < 1:
        raise OptionError(f"top: expected an integer of at least 1, got {top}")
    train, test = split.train, split.test
    users = np.flatnonzero((test.counts() > 0) & (train.counts() > 0))
    if not len(users):
        return Measured(Quality(math.nan, math.nan, 0), math.nan, math.nan)
    best, _ = best_items(user_table[users], item_table, users, train.indptr, train.indices, top, threads)
    found = _hits(best, users, test.indptr, test.indices)
    wanted = test.counts()[users]
    discounts = np.array([1 / math.log2(place + 1) for place in range(1, top + 1)])
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])
    precision = np.cumsum(found, axis=1) / np.arange(1, top + 1)
    most = np.minimum(wanted, top)
    return Measured(
        Quality(
            float((found.sum(axis=1) / wanted).mean()),
            float((found @ discounts / ideal[most]).mean()),
            len(users),
        ),
        float(((precision * found).sum(axis=1) / most).mean()),
        len(np.unique(best[best >= 0])) / train.n_items,
    )


def popularity_quality(split: Split, top: int = 20) -> Quality:
    """Rank the items, for everybody alike, by how many users have them in ``split.train``.

    Parameters and errors are those of `evaluate`; equally popular items come in the order of their rows.
    """
    popularity = np.bincount(split.train.indices, minlength=split.train.n_items).astype(np.float32)
    alike = np.ones(
        (split.train.n_users, 1), dtype=np.float32
    )  # vectors of dim 1: scores are what items have
    return measure(alike, popularity[:, None], split, top).quality


@jit(entry=True, allocates=True)
def _hits(best: Any, users: Any, indptr: Any, indices: Any) -> Any:
    """Return 1.0 where a ranked item is one of the user's in the CSR (sorted), else 0.0; shape of best."""
    hits = np.zeros(best.shape)
    for row in range(len(users)):
        start, stop = indptr[users[row]], indptr[users[row] + 1]
        for place in range(best.shape[1]):
            low, high = start, stop
            while low < high:
                middle = (low + high) // 2
                if indices[middle] < best[row, place]:
                    low = middle + 1
                else:
                    high = middle
            if low < stop and indices[low] == best[row, place]:
                hits[row, place] = 1.0
    return hits
