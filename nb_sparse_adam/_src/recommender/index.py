# SPDX-License-Identifier: Apache-2.0
"""Items in an index of another library, for approximate search where exact search takes too long.

These indexes search for the nearest by distance. One dimension more turns the greatest inner product into the
nearest: with M the greatest norm of any item, items get ``sqrt(M² - ‖v‖²)`` there and queries 0, and then
``‖q - v‖² = ‖q‖² + M² - 2⟨q, v⟩`` (Bachrach et al. 2014, "Speeding Up the Xbox Recommender System Using a
Euclidean Transformation for Inner-Product Spaces", RecSys).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.recommender.topk import best_items
from nb_sparse_adam.errors import MissingExtraError, OptionError

_NEIGHBOURS, _BUILD, _SEARCH = 16, 200, 128  # of a graph's node; looked at while building, and searching
_SAMPLE, _K = 1000, 10  # users, and items of each, of which recall is measured

Array = npt.NDArray[Any]


class _Kind(NamedTuple):
    """How to talk to a library."""

    module: str
    install: str
    build: Callable[[Any, Array], Any]
    search: Callable[[Any, Array, int], Array]
    save: Callable[[Any, str], Any]


def _hnswlib(module: Any, items: Array) -> Any:
    index = module.Index(space="l2", dim=items.shape[1])
    index.init_index(len(items), M=_NEIGHBOURS, ef_construction=_BUILD, random_seed=0)
    index.add_items(items, np.arange(len(items)))
    index.set_ef(_SEARCH)
    return index


def _hnswlib_search(index: Any, queries: Array, k: int) -> Array:
    index.set_ef(max(_SEARCH, k))  # or hnswlib raises
    return np.asarray(index.knn_query(queries, k=k)[0])


def _hnswlib_save(index: Any, path: str) -> None:
    index.save_index(path)


def _usearch(module: Any, items: Array) -> Any:
    index = module.Index(
        ndim=items.shape[1], metric="l2sq", dtype="f32", connectivity=_NEIGHBOURS, expansion_add=_BUILD,
        expansion_search=_SEARCH,
    )  # fmt: skip
    index.add(np.arange(len(items)), items)
    return index


def _usearch_search(index: Any, queries: Array, k: int) -> Array:
    found = index.search(queries, k)
    counts = np.asarray(getattr(found, "counts", np.full(len(queries), k)))
    keys = np.asarray(found.keys).astype(np.int64)
    return np.where(np.arange(keys.shape[1]) < counts[:, None], keys, -1)


def _usearch_save(index: Any, path: str) -> None:
    index.save(path)


def _faiss(module: Any, items: Array) -> Any:
    index = module.IndexHNSWFlat(items.shape[1], _NEIGHBOURS)
    index.hnsw.efConstruction, index.hnsw.efSearch = _BUILD, _SEARCH
    index.add(items)
    return index


def _faiss_search(index: Any, queries: Array, k: int) -> Array:
    return np.asarray(index.search(queries, k)[1])


def _faiss_save(index: Any, path: str) -> None:
    importlib.import_module("faiss").write_index(index, path)


KINDS = {
    "hnswlib": _Kind("hnswlib", "pip install hnswlib", _hnswlib, _hnswlib_search, _hnswlib_save),
    "usearch": _Kind("usearch.index", "pip install usearch", _usearch, _usearch_search, _usearch_save),
    "faiss": _Kind("faiss", "pip install faiss-cpu", _faiss, _faiss_search, _faiss_save),
}
"""The libraries, by the names that `MatrixFactorization.to_index` knows."""


@public("nb_sparse_adam.recommender")
class ItemIndex:
    """Items in another library's index; made by `MatrixFactorization.to_index`.

    Attributes
    ----------
    index
        The library's own, over rows of items, of dim + 1 numbers each.
    kind : str
        Which library.
    recall : float
        Part of the exact 10 best items of up to 1000 users that it finds, without leaving out what they had.
    item_ids : array, shape (n_items,)
        The id of each row.
    """

    def __init__(self, kind: str, items: Array, users: Array, item_ids: Array) -> None:
        if kind not in KINDS:
            raise OptionError(f"kind: got {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
        self.kind, self.item_ids, self._library = kind, item_ids, KINDS[kind]
        try:
            module = importlib.import_module(self._library.module)
        except ImportError as error:
            raise MissingExtraError(
                f"an index of {kind} needs {kind}, which cannot be imported ({error}): "
                f"{self._library.install}"
            ) from error
        self._items = np.array(items, dtype=np.float32)  # of now: the model may be trained on
        norms = np.einsum("ij,ij->i", self._items, self._items, dtype=np.float64)
        rest = np.sqrt(np.maximum(norms.max() - norms, 0)).astype(np.float32)
        self.index = self._library.build(module, np.ascontiguousarray(np.c_[self._items, rest]))
        k = min(_K, len(items))
        sample = users[np.linspace(0, len(users) - 1, min(_SAMPLE, len(users))).astype(np.int64)]
        nobody = np.full(len(sample), -1, dtype=np.int64)
        exact, _ = best_items(sample, self._items, nobody, np.zeros(1, np.int64), np.zeros(0, np.int32), k)
        got = self._rows(sample, k)
        self.recall = float(np.mean([np.isin(e, g).mean() for e, g in zip(exact, got, strict=True)]))

    def __repr__(self) -> str:
        """Say what it is, and how good."""
        return f"ItemIndex({self.kind!r}, {len(self._items):,} items, recall@{_K} {self.recall:.3f})"

    def _rows(self, vectors: Array, k: int) -> Array:
        queries = np.c_[vectors, np.zeros(len(vectors), np.float32)].astype(np.float32)
        return self._library.search(self.index, np.ascontiguousarray(queries), k)

    def search(self, vectors: npt.ArrayLike, k: int = 10) -> tuple[Array, Array]:
        """Return about the best items for vectors of users.

        Parameters
        ----------
        vectors : float array, shape (n, dim)
        k : int, default 10
            At most as many as there are items.

        Returns
        -------
        ids : array, shape (n, k)
            Padded with -1, or None for strings, where it finds fewer.
        scores : float32 array, shape (n, k)
            Inner products, falling; padded with -inf.
        """
        queries = np.asarray(vectors, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self._items.shape[1]:
            raise OptionError(f"vectors: got shape {queries.shape}, expected (n, {self._items.shape[1]})")
        if not 1 <= k <= len(self._items):
            raise OptionError(f"k: got {k}, expected 1 to {len(self._items)}, the number of items")
        rows = self._rows(queries, k)
        scores = np.einsum("nd,nkd->nk", queries, self._items[rows])
        scores[rows < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")
        rows, scores = (np.take_along_axis(one, order, 1) for one in (rows, scores))
        ids: Array = self.item_ids[rows]
        ids[rows < 0] = -1 if ids.dtype.kind == "i" else None
        return ids, scores

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the library's own file. Its keys are rows; row r of the items has the id ``item_ids[r]``."""
        self._library.save(self.index, os.fspath(path))
