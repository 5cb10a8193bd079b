# SPDX-License-Identifier: Apache-2.0
"""What a trained recommender is asked for: recommendations, neighbours, vectors of new people, quality."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.optimizer import SparseAdam
from nb_sparse_adam._src.recommender.folding import fold_in
from nb_sparse_adam._src.recommender.given import Columns, given
from nb_sparse_adam._src.recommender.ids import Ids
from nb_sparse_adam._src.recommender.index import ItemIndex
from nb_sparse_adam._src.recommender.interactions import Split, UserItems, random_stream
from nb_sparse_adam._src.recommender.options import BPROptions
from nb_sparse_adam._src.recommender.ranking import measure
from nb_sparse_adam._src.recommender.topk import best_items
from nb_sparse_adam.errors import InteractionsError, NotFittedError, OptionError

Array = npt.NDArray[Any]
_TRAINED = "train again with it, or add it by partial_fit"


class Serving(ABC):
    """What `MatrixFactorization` does once it is trained."""

    # Of the estimator:
    seed: int
    threads: int | None
    optimizer_: SparseAdam
    # Who and what its rows are, and what was trained on and held out; None: not saved with the model.
    _users: Ids
    _items: Ids
    _trained: UserItems | None
    _held_out: UserItems | None
    _test: UserItems | None

    @abstractmethod
    def _options(self, epochs: int) -> BPROptions:
        """Check the parameters."""

    def _check_fitted(self, what: str) -> None:
        if not hasattr(self, "optimizer_"):
            raise NotFittedError(f"{what}: this {type(self).__name__} is not trained; call fit, or load one")

    @property
    def user_factors_(self) -> Array:
        """The vectors of users, read-only."""
        return self._factors("user")

    @property
    def item_factors_(self) -> Array:
        """The vectors of items, read-only."""
        return self._factors("item")

    def _factors(self, name: str) -> Array:
        self._check_fitted(f"{name}_factors_")
        view: Array = self.optimizer_.tables[name].view()
        view.flags.writeable = False
        return view

    @property
    def user_ids_(self) -> Array:
        """The id of each row of users."""
        self._check_fitted("user_ids_")
        return self._users.ids

    @property
    def item_ids_(self) -> Array:
        """The id of each row of items."""
        self._check_fitted("item_ids_")
        return self._items.ids

    # --- what it is for ------------------------------------------------------------------------------------

    def recommend(
        self,
        user_ids: Any = None,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        items: Any = None,
        vectors: Any = None,
        exclude: Any = (),
        frame: bool = False,
    ) -> Any:
        """Return the items with the highest scores for each user.

        Parameters
        ----------
        user_ids : array_like, shape (n,), or one id
            Users of the training.
        k : int, default 10
            How many items.
        exclude_seen : bool, default True
            Leave out what the user had in the interactions that were given, those for validation included.
        items : array_like of ids, optional
            The candidates; all items, if None.
        vectors : float array, shape (n, dim) or (dim,), optional
            Instead of users: what `fold_in` returned.
        exclude : array_like of ids, optional
            Items to leave out, for everybody.
        frame : bool, default False
            Return a polars frame instead, with the columns user (or, of vectors, the row: vector), place
            (from 1), item and score, without padding.

        Returns
        -------
        ids : array, shape (n, k), or (k,) for one user
            Best first; where there are fewer items, padded with -1, ids of strings with None.
        scores : float32 array of the same shape
            Inner products, padded with -inf.

        Raises
        ------
        NotFittedError
            If the model is not trained.
        UnknownIdError
            A KeyError, if a user or a candidate was not there in training.
        OptionError
            If `k` is less than 1, both or none of `user_ids` and `vectors` are given, or what a user had was
            not saved with the model.
        """
        self._check_fitted("recommend")
        check_k(k)
        if (user_ids is None) == (vectors is None):
            raise OptionError("recommend: expected either user_ids or vectors")
        if vectors is not None:
            found = np.asarray(vectors, dtype=np.float32)
            single, found = found.ndim == 1, np.atleast_2d(found)
            if found.ndim != 2 or found.shape[1] != self.user_factors_.shape[1]:
                dim = self.user_factors_.shape[1]
                raise OptionError(f"vectors: got shape {np.shape(vectors)}, expected (n, {dim}) or ({dim},)")
            users = np.full(len(found), -1, dtype=np.int64)
        else:
            single = np.ndim(user_ids) == 0
            users = self._users.rows(
                np.atleast_1d(np.asarray(user_ids)),
                "user_ids",
                "fold_in makes a vector of the items of someone new",
            )
            found = self.user_factors_[users]
            if exclude_seen and self._trained is None:
                raise OptionError("exclude_seen: the interactions were not saved with this model; pass False")
        candidates = self._candidates(items, exclude)
        taken = self._taken(users if exclude_seen else np.full_like(users, -1), candidates)
        chosen = self.item_factors_ if len(candidates) == len(self._items) else self.item_factors_[candidates]
        best, scores = best_items(found, chosen, *taken, k, self.threads)
        named = self._named(self._items, np.where(best < 0, -1, candidates[best] if len(candidates) else -1))
        if frame:
            who = np.arange(len(found)) if vectors is not None else self._users.ids[users]
            return _frame("user" if vectors is None else "vector", who, named, scores)
        return (named[0], scores[0]) if single else (named, scores)

    def similar_items(self, item_ids: Any, k: int = 10) -> tuple[Array, Array]:
        """Return the items nearest to each item, itself left out, by the cosine of their vectors.

        Parameters
        ----------
        item_ids : array_like, shape (n,), or one id
        k : int, default 10

        Returns
        -------
        ids, cosines : array, shape (n, k), or (k,) for one item
            Nearest first, padded as by `recommend`.

        Raises
        ------
        NotFittedError, UnknownIdError, OptionError
            As `recommend` does.
        """
        self._check_fitted("similar_items")
        return self._similar(self._items, self.item_factors_, item_ids, k, "item_ids")

    def similar_users(self, user_ids: Any, k: int = 10) -> tuple[Array, Array]:
        """Return the users nearest to each user; see `similar_items`."""
        self._check_fitted("similar_users")
        return self._similar(self._users, self.user_factors_, user_ids, k, "user_ids")

    def fold_in(self, items: Any) -> npt.NDArray[np.float32]:
        """Make a vector for someone who was not there in training, of the items that they had.

        It is the vector at which the loss of the training, with the items' vectors as they are, is least: a
        convex problem in `dim` numbers, solved by Newton's method over sampled other items.

        Parameters
        ----------
        items : array_like of ids, shape (n,)
            At least one; order and repetition do not matter.

        Returns
        -------
        float32 array, shape (dim,)
            For ``recommend(vectors=..., exclude=items)``.

        Raises
        ------
        NotFittedError, UnknownIdError
            As `recommend` does.
        InteractionsError
            If there are no items, or there is no other item.
        """
        self._check_fitted("fold_in")
        rows = np.unique(self._items.rows(np.atleast_1d(np.asarray(items)), "items", _TRAINED))
        if not 0 < len(rows) < len(self._items):
            raise InteractionsError(
                f"fold_in: got {len(rows)} different items of {len(self._items)}, expected some, not all"
            )
        return fold_in(self.item_factors_, rows, self._options(1), random_stream(self.seed, "fold-in"))

    def evaluate(
        self, test: Any, k: int = 20, *, user_column: str | None = None, item_column: str | None = None
    ) -> dict[str, float]:
        """Rank all items that a user has not had, and compare with what they had later.

        Parameters
        ----------
        test : as the interactions of `fit`
            Users and items that were not there in training, and what was trained on, are left out.
        k : int, default 20
            How many items are looked at.
        user_column, item_column : str, optional
            As for `fit`.

        Returns
        -------
        dict
            ``"recall@k"``, ``"ndcg@k"`` and ``"map@k"`` averaged over ``"users"``, and ``"coverage@k"``, the
            part of all items that is recommended to anyone of them. NaN if there is no user.

        Raises
        ------
        NotFittedError, InteractionsError, OptionError
            As `fit` and `recommend` do.
        """
        self._check_fitted("evaluate")
        check_k(k)
        if self._trained is None:
            raise OptionError(
                "evaluate: what users had was not saved with this model; save it with interactions"
            )
        new = given(test, Columns(user_column, item_column))
        users = self._users.find(new.interactions.user_ids, "users")[new.interactions.pairs.users()]
        items = self._items.find(new.interactions.item_ids, "items")[new.interactions.pairs.indices]
        known = (users >= 0) & (items >= 0)
        wanted = UserItems.from_pairs(users[known], items[known], len(self._users), len(self._items))
        wanted = wanted.select(~self._trained.contains(wanted))
        split = Split(self._trained, wanted, self._users.ids, self._items.ids, "test")
        found = measure(self.user_factors_, self.item_factors_, split, k, self.threads)
        return {
            f"recall@{k}": found.quality.recall,
            f"ndcg@{k}": found.quality.ndcg,
            f"map@{k}": found.map,
            f"coverage@{k}": found.coverage,
            "users": found.quality.users,
        }

    def to_index(self, kind: str) -> ItemIndex:
        """Build an index of another library over the items, for approximate search.

        Parameters
        ----------
        kind : {"hnswlib", "usearch", "faiss"}
            Each is a package of its own.

        Returns
        -------
        ItemIndex
            Its ``recall`` says how much of exact search it finds.

        Raises
        ------
        NotFittedError
            If the model is not trained.
        MissingExtraError
            If the library is not installed; the message has the command.
        OptionError
            If there is no such kind.
        """
        self._check_fitted("to_index")
        return ItemIndex(kind, self.item_factors_, self.user_factors_, self._items.ids)

    # --- rows and ids --------------------------------------------------------------------------------------

    def _candidates(self, items: Any, exclude: Any) -> npt.NDArray[np.int64]:
        """Return the rows of candidates, ascending."""
        if items is None:
            rows = np.arange(len(self._items))
        else:
            rows = np.unique(self._items.rows(np.atleast_1d(np.asarray(items)), "items", _TRAINED))
        left_out = self._items.rows(np.atleast_1d(np.asarray(exclude)), "exclude", "leave it out there")
        return np.setdiff1d(rows, left_out, assume_unique=False) if len(left_out) else rows

    def _taken(
        self, users: npt.NDArray[np.int64], candidates: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Return (owners, indptr, indices): the places among the candidates that each user has had."""
        owners = np.where(users < 0, -1, np.arange(len(users)))
        pairs: list[tuple[Array, Array]] = []
        place = np.full(len(self._items), -1, dtype=np.int64)
        place[candidates] = np.arange(len(candidates))
        asked = np.flatnonzero(users >= 0)
        for seen in (self._trained, self._held_out, self._test):
            if seen is None or not len(asked) or not len(seen):
                continue
            lengths = seen.counts()[users[asked]]
            starts = np.repeat(seen.indptr[users[asked]] - np.cumsum(lengths) + lengths, lengths)
            had = place[seen.indices[starts + np.arange(lengths.sum())]]
            pairs.append((np.repeat(asked, lengths)[had >= 0], had[had >= 0]))
        who, what = (np.concatenate([pair[i] for pair in pairs] or [np.zeros(0, np.int64)]) for i in (0, 1))
        order = np.argsort(who, kind="stable")
        indptr = np.zeros(len(users) + 1, dtype=np.int64)
        np.cumsum(np.bincount(who, minlength=len(users)), out=indptr[1:])
        return owners.astype(np.int64), indptr, what[order].astype(np.int32)

    def _similar(self, ids: Ids, factors: Array, asked: Any, k: int, what: str) -> tuple[Array, Array]:
        check_k(k)
        single = np.ndim(asked) == 0
        rows = ids.rows(np.atleast_1d(np.asarray(asked)), what, _TRAINED)
        norms = np.linalg.norm(factors, axis=1, keepdims=True)
        directions = factors / np.where(norms == 0, 1, norms)
        indptr, itself = np.arange(len(rows) + 1, dtype=np.int64), rows.astype(np.int32)
        best, cosines = best_items(
            directions[rows], directions, indptr[:-1].copy(), indptr, itself, k, self.threads
        )
        named = self._named(ids, best)
        return (named[0], cosines[0]) if single else (named, cosines)

    @staticmethod
    def _named(ids: Ids, rows: Array) -> Array:
        """Return the ids of rows, -1 or None where there is no row."""
        named: Array = ids.ids[rows]
        named[rows < 0] = -1 if ids.ids.dtype.kind == "i" else None
        return named


def _frame(name: str, who: Array, named: Array, scores: Array) -> Any:
    """Return a polars frame of lists of items, one row an item."""
    polars = require("polars", "train", "a frame of recommendations")
    row, place = np.nonzero(scores > -np.inf)
    columns = {name: who[row], "place": place + 1, "item": named[row, place], "score": scores[row, place]}
    return polars.DataFrame({key: column.tolist() for key, column in columns.items()})


def check_k(k: object) -> None:
    """Refuse what is no length of a list."""
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
        raise OptionError(f"k: got {k!r}, expected an integer of at least 1")
