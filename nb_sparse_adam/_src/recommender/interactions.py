# SPDX-License-Identifier: Apache-2.0
"""Interactions of users with items: who did what, as rows of two tables, split into training and test.

Files are read in `reading`; what leaves here is CSR, the items of a user sorted and each of them there once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nb_sparse_adam.errors import InteractionsError, OptionError

_PURPOSES = ("hold-out", "data", "init", "order", "fold-in", "search")


def random_stream(seed: int, purpose: str, epoch: int = 0) -> np.random.Generator:
    """Return the random numbers for one purpose, independent of those for every other.

    Parameters
    ----------
    seed : int
        Not negative.
    purpose : {"hold-out", "data", "init", "order", "fold-in", "search"}
    epoch : int
        Which epoch of training, for ``"order"``.

    Returns
    -------
    numpy.random.Generator
        PCG64, by name: what `numpy.random.default_rng` stands for may change.
    """
    return np.random.Generator(np.random.PCG64([seed, _PURPOSES.index(purpose), epoch]))


def sorted_distinct(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the keys once each, sorted: `numpy.unique`, which hashes, takes 20 times longer in NumPy 2.4."""
    keys = np.sort(keys)
    first = np.ones(len(keys), dtype=np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    return keys[first]


def grouped(
    keys: npt.NDArray[np.int64], *within: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Sort what has a key, and find where each key begins: what `numpy.ufunc.reduceat` goes by.

    Parameters
    ----------
    keys : int64 array, shape (n,)
    *within : arrays, shape (n,)
        What those of one key are sorted by, the first before the others.

    Returns
    -------
    distinct : int64 array, shape (m,)
        The keys once each, ascending.
    order : array, shape (n,)
        Places in `keys`, sorted.
    begins : array, shape (m,)
        Place in `order` at which each distinct key begins.
    """
    order = np.lexsort((*within[::-1], keys))
    keys = keys[order]
    first = np.ones(len(keys), dtype=np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    return keys[first], order, np.flatnonzero(first)


def checked_weights(name: str, weights: npt.ArrayLike, n: int, remedy: str) -> npt.NDArray[np.float32]:
    """Return the weights of n interactions in float32.

    Parameters
    ----------
    name : str
        What they are called, for messages.
    weights : array_like, shape (n,)
        Positive and finite.
    n : int
    remedy : str
        What to do about a weight that is not.

    Raises
    ------
    InteractionsError
        If a weight is out of its domain, in float32 too; it names the first.
    """
    array = np.asarray(weights)
    if array.shape != (n,) or array.dtype.kind not in "biuf":
        raise InteractionsError(
            f"{name}: got {array.dtype} of shape {array.shape}, expected numbers of shape ({n},), one an "
            f"interaction"
        )
    with np.errstate(over="ignore", under="ignore"):
        made = array.astype(np.float32)
    bad = np.flatnonzero(~is_weight(made))
    if len(bad):
        raise InteractionsError(
            f"{name}[{bad[0]}] is {array[bad[0]]}: expected a finite number greater than 0, in float32; "
            f"{remedy}"
        )
    return made


def is_weight(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Say of each number whether it may be a weight: NaN and infinity may not."""
    passes: npt.NDArray[np.bool_] = (values > 0) & (values < np.inf)
    return passes


@dataclass(frozen=True, eq=False)
class UserItems:
    """The items of every user, in CSR form.

    Attributes
    ----------
    indptr : int64 array, shape (n_users + 1,)
        The items of user ``u`` are ``indices[indptr[u]:indptr[u + 1]]``.
    indices : int32 array, shape (n,)
        Item rows, ascending and without repetition within a user.
    n_items : int
        Number of items there are; some may be nobody's.
    weights : float32 array, shape (n,), optional
        How much each interaction counts in training, parallel to `indices`: positive and finite. None: all
        count the same.

    Raises
    ------
    OptionError
        If these are not the arrays of a CSR matrix with so many columns. Kernels take them to be.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    n_items: int
    weights: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        indptr: npt.NDArray[Any] = np.ascontiguousarray(self.indptr)
        indices: npt.NDArray[Any] = np.ascontiguousarray(self.indices)
        for name, array, dtype in (("indptr", indptr, np.int64), ("indices", indices, np.int32)):
            if array.ndim != 1 or array.dtype != dtype:
                got = f"{array.ndim}-D {array.dtype}"
                raise OptionError(f"UserItems.{name}: got {got}, expected 1-D {np.dtype(dtype)}")
        n = len(indices)
        if len(indptr) == 0 or indptr[0] != 0 or indptr[-1] != n or (indptr[1:] < indptr[:-1]).any():
            raise OptionError(
                f"UserItems.indptr: expected numbers from 0 to {n}, as many as indices, that never decrease"
            )
        if n and not 0 <= indices.min() <= indices.max() < self.n_items:
            raise OptionError(
                f"UserItems.indices: got items {indices.min()} to {indices.max()}, expected 0 <= item < "
                f"n_items = {self.n_items}"
            )
        object.__setattr__(self, "indptr", indptr)
        object.__setattr__(self, "indices", indices)
        if self.weights is not None:
            weights: npt.NDArray[Any] = np.ascontiguousarray(self.weights)
            if weights.shape != indices.shape or weights.dtype != np.float32:
                raise OptionError(
                    f"UserItems.weights: got {weights.dtype} of shape {weights.shape}, expected float32 of "
                    f"shape {indices.shape}"
                )
            bad = np.flatnonzero(~is_weight(weights))
            if len(bad):
                raise OptionError(
                    f"UserItems.weights: expected finite numbers greater than 0, got {weights[bad[0]]} for "
                    f"interaction {bad[0]}"
                )
            object.__setattr__(self, "weights", weights)

    @classmethod
    def from_pairs(
        cls,
        users: npt.NDArray[Any],
        items: npt.NDArray[Any],
        n_users: int,
        n_items: int,
        weights: npt.NDArray[np.float32] | None = None,
    ) -> UserItems:
        """Build from parallel arrays of rows, shapes (n,).

        Repeated pairs are kept once, with the sum of their weights, shape (n,), if there are any.
        """
        keys = users.astype(np.int64) * n_items + items.astype(np.int64)
        if weights is None:
            return cls._from_keys(sorted_distinct(keys), n_users, n_items)
        keys, order, begins = grouped(keys, weights)  # sorted, a sum does not depend on the order of a file
        sums = np.add.reduceat(weights[order], begins, dtype=np.float64)
        with np.errstate(over="ignore"):  # infinity is refused
            return cls._from_keys(keys, n_users, n_items, sums.astype(np.float32))

    @classmethod
    def _from_keys(
        cls,
        keys: npt.NDArray[np.int64],
        n_users: int,
        n_items: int,
        weights: npt.NDArray[np.float32] | None = None,
    ) -> UserItems:
        """Build from ascending ``user * n_items + item``."""
        indptr = np.searchsorted(keys, np.arange(n_users + 1, dtype=np.int64) * n_items).astype(np.int64)
        return cls(indptr, (keys % max(n_items, 1)).astype(np.int32), n_items, weights)

    @property
    def n_users(self) -> int:
        """Number of users, those without items included."""
        return len(self.indptr) - 1

    def __len__(self) -> int:
        """Number of interactions."""
        return len(self.indices)

    def counts(self) -> npt.NDArray[np.int64]:
        """Return the number of items of each user, shape (n_users,)."""
        return np.diff(self.indptr)

    def users(self) -> npt.NDArray[np.int32]:
        """Return the user of each interaction, shape (n,), parallel to `indices`."""
        return np.repeat(np.arange(self.n_users, dtype=np.int32), self.counts())

    def select(self, mask: npt.NDArray[np.bool_]) -> UserItems:
        """Return the interactions for which `mask`, shape (n,), is true; users and items keep their rows."""
        kept = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        weights = None if self.weights is None else self.weights[mask]
        return UserItems(kept[self.indptr], self.indices[mask], self.n_items, weights)

    def resized(self, n_users: int, n_items: int) -> UserItems:
        """Return the same interactions among more users and items, whose rows come behind the others."""
        return UserItems.from_pairs(self.users(), self.indices, n_users, n_items, self.weights)

    def union(self, other: UserItems) -> UserItems:
        """Return the interactions of these and of `other`, which has as many users and items.

        If either has weights, those of an interaction that is in both are added, and one that has none
        counts 1.
        """
        users = np.concatenate([self.users(), other.users()])
        items = np.concatenate([self.indices, other.indices])
        weights = None
        if self.weights is not None or other.weights is not None:
            weights = np.concatenate(
                [
                    np.ones(len(one), np.float32) if one.weights is None else one.weights
                    for one in (self, other)
                ]
            )
        return UserItems.from_pairs(users, items, self.n_users, self.n_items, weights)

    def contains(self, other: UserItems) -> npt.NDArray[np.bool_]:
        """Say for each interaction of `other` whether it is one of these too, shape (len(other),)."""
        return np.isin(other._keys(), self._keys(), assume_unique=True)

    def _keys(self) -> npt.NDArray[np.int64]:
        return self.users().astype(np.int64) * self.n_items + self.indices


@dataclass(frozen=True, eq=False)
class Interactions:
    """Interactions together with the ids that their users and items came with.

    Attributes
    ----------
    pairs : UserItems
        Who interacted with what, as rows.
    user_ids, item_ids : array, shapes (n_users,) and (n_items,)
        Id of each row: int64, ascending, if all ids are integers; else strings (dtype object), sorted by
        code point. The order depends on the set of ids only, never on the order of a file.
    repeated : int
        How many repetitions of a (user, item) pair were dropped, or had their weights added.
    description : str
        Where the data came from and how it was read, for people.
    """

    pairs: UserItems
    user_ids: npt.NDArray[Any]
    item_ids: npt.NDArray[Any]
    repeated: int = 0
    description: str = "arrays"

    @classmethod
    def from_ids(
        cls, users: npt.ArrayLike, items: npt.ArrayLike, weights: npt.ArrayLike | None = None
    ) -> Interactions:
        """Build from parallel arrays of ids.

        Parameters
        ----------
        users, items : array_like, shape (n,)
            Integers or strings, one pair an interaction.
        weights : array_like, shape (n,), optional
            How much each interaction counts in training: finite numbers greater than 0. Those of repeated
            pairs are added. None: a pair counts the same however often it comes.

        Returns
        -------
        Interactions

        Raises
        ------
        InteractionsError
            If the shapes differ, there are no pairs, ids are neither integers nor strings, or a weight is out
            of its domain.
        """
        (user_ids, user_rows), (item_ids, item_rows) = _index_ids("users", users), _index_ids("items", items)
        if len(user_rows) != len(item_rows):
            raise InteractionsError(
                f"users and items must be parallel, got {len(user_rows)} users and {len(item_rows)} items"
            )
        if not len(user_rows):
            raise InteractionsError("there are no interactions")
        if weights is not None:
            weights = checked_weights("weights", weights, len(user_rows), "leave such interactions out")
        pairs = UserItems.from_pairs(user_rows, item_rows, len(user_ids), len(item_ids), weights)
        return cls(pairs, user_ids, item_ids, repeated=len(user_rows) - len(pairs))


def _index_ids(name: str, ids: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[np.intp]]:
    array = np.asarray(ids)
    if array.ndim != 1:
        raise InteractionsError(f"{name}: expected a one-dimensional array of ids, got shape {array.shape}")
    if array.dtype.kind in "iu":
        unique, rows = np.unique(array, return_inverse=True)
        if len(unique) and int(unique[-1]) > np.iinfo(np.int64).max:
            raise InteractionsError(f"{name}: the id {unique[-1]} does not fit int64; pass strings instead")
        return unique.astype(np.int64), rows
    if array.dtype.kind == "U" or (array.dtype.kind == "O" and all(isinstance(one, str) for one in array)):
        unique, rows = np.unique(array, return_inverse=True)
        return unique.astype(object), rows
    raise InteractionsError(f"{name}: expected integer or string ids, got an array of dtype {array.dtype}")


@dataclass(frozen=True, eq=False)
class Split:
    """Interactions to train on and interactions to predict, over the same rows.

    Attributes
    ----------
    train, test : UserItems
        Disjoint.
    user_ids, item_ids : array, shapes (n_users,) and (n_items,)
        As in `Interactions`.
    description : str
        How the two were told apart, for people.
    notes : list of str
        What was left out on the way, and why.
    """

    train: UserItems
    test: UserItems
    user_ids: npt.NDArray[Any]
    item_ids: npt.NDArray[Any]
    description: str
    notes: list[str] = field(default_factory=list)


def hold_out(interactions: Interactions, fraction: float = 0.2, seed: int = 0) -> Split:
    """Put a random part of every user's items aside for the test.

    A user with n items gives ``floor(fraction * n + 1/2)`` of them, and always keeps at least one.

    Parameters
    ----------
    interactions : Interactions
        What to split.
    fraction : float, default 0.2
        Part to hold out, 0 < fraction < 1.
    seed : int, default 0
        Same seed, same split, whatever the order of the file.

    Returns
    -------
    Split

    Raises
    ------
    OptionError
        If `fraction` is out of its domain.
    """
    if not 0 < fraction < 1:
        raise OptionError(f"fraction: expected 0 < fraction < 1, got {fraction}")
    pairs = interactions.pairs
    users, counts = pairs.users(), pairs.counts()
    order = np.lexsort((random_stream(seed, "hold-out").random(len(pairs)), users))
    held = np.minimum((fraction * counts + 0.5).astype(np.int64), np.maximum(counts - 1, 0))
    is_test = np.empty(len(pairs), dtype=np.bool_)
    is_test[order] = np.arange(len(pairs)) - pairs.indptr[users] < held[users]
    return Split(
        pairs.select(~is_test),
        pairs.select(is_test),
        interactions.user_ids,
        interactions.item_ids,
        f"{fraction:.0%} of every user's items held out at random (seed {seed})",
    )


def generate(
    n_users: int = 20_000, n_items: int = 8_000, mean_items: float = 50.0, seed: int = 0
) -> Interactions:
    """Generate long-tailed interactions with planted preferences.

    Item popularity follows Zipf's law, the activity of users is log-normal. User u takes its n_u items
    without replacement with weights ``popularity_i * exp(strength * <p_u, q_i>)``, where p and q are random
    factors of rank 8: some of what a user takes is what everybody takes, the rest can be learned from others.

    Parameters
    ----------
    n_users, n_items : int
        Size of the two tables.
    mean_items : float
        Expected items of a user, about. The default sizes give about one million interactions.
    seed : int
        Same seed, same data on the same machine.

    Returns
    -------
    Interactions
        Ids are integers from 0; every user has at least 5 items (or all, if there are fewer).

    Raises
    ------
    OptionError
        If a size is not positive.
    """
    if min(n_users, n_items) < 1 or not 0 < mean_items < math.inf:
        raise OptionError(f"sizes must be positive, got {n_users=}, {n_items=}, {mean_items=}")
    rng = random_stream(seed, "data")
    rank, strength, spread = 8, 2.5, 0.9
    popularity = -0.9 * np.log(rng.permutation(n_items) + 10.0)
    popularity = popularity.astype(np.float32)
    user_factors = rng.standard_normal((n_users, rank), dtype=np.float32) * np.float32(strength / rank**0.5)
    item_factors = rng.standard_normal((n_items, rank), dtype=np.float32)
    activity = np.exp(spread * rng.standard_normal(n_users) - spread**2 / 2) * mean_items
    counts = np.clip(activity, min(5, n_items), max(1, n_items // 2)).astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    items = np.empty(indptr[-1], dtype=np.int32)
    block = max(1, 2_000_000 // n_items)  # 8 MB of float32 scores at a time
    for start in range(0, n_users, block):
        stop = min(start + block, n_users)
        logits = popularity + (user_factors[start:stop] @ item_factors.T)
        # Exponential races (Efraimidis & Spirakis 2006): the n_u smallest E / w are a draw without
        # replacement with weights w; in logarithms, so that no weight can overflow.
        races = rng.standard_exponential(logits.shape, dtype=np.float32)
        np.log(races + np.float32(1e-30), out=races)
        races -= logits
        for user in range(start, stop):
            n = counts[user]
            items[indptr[user] : indptr[user + 1]] = np.sort(np.argpartition(races[user - start], n - 1)[:n])
    pairs = UserItems(indptr, items, n_items)
    taken = np.bincount(items, minlength=n_items) > 0  # an item that nobody took is in no data set
    rows = np.cumsum(taken, dtype=np.int32) - 1
    pairs = UserItems(indptr, rows[items].astype(np.int32), int(taken.sum()))
    return Interactions(
        pairs,
        np.arange(n_users, dtype=np.int64),
        np.flatnonzero(taken).astype(np.int64),
        description=f"GENERATED data (seed {seed}): Zipf-like popularity, planted preferences of rank {rank}",
    )
