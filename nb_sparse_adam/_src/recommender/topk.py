# SPDX-License-Identifier: Apache-2.0
"""The best items by inner product, exactly: a block of users at a time, on all threads.

Scores of a block come from BLAS; the best of each row are picked by a kernel whose threads take rows in turn.
There are never more scores than a block's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.threads import Partition, run, usable_threads
from nb_sparse_adam._src.recommender.sampling import kind_of

BLOCK_BYTES = 1 << 25  # scores held at a time: 32 MB, or one user's if that is more
_ROWS = 8  # that a thread takes at a time


@jit
def _rank_row(scores: Any, row: Any, low: Any, high: Any, indices: Any, best: Any, best_scores: Any) -> None:
    """Write the best of a row of scores, without the places ``indices[low:high]``, into best (full of -1)."""
    top = best.shape[1]
    for k in range(low, high):
        scores[row, indices[k]] = -np.inf
    found = 0
    for item in range(scores.shape[1]):
        score = scores[row, item]
        # Items come in ascending order, so a strict comparison keeps the lower one of equals first.
        if not score > -np.inf or (found == top and not score > best_scores[row, top - 1]):
            continue
        place = min(found, top - 1)
        while place > 0 and score > best_scores[row, place - 1]:
            best_scores[row, place] = best_scores[row, place - 1]
            best[row, place] = best[row, place - 1]
            place -= 1
        best_scores[row, place] = score
        best[row, place] = item
        found = min(found + 1, top)


@jit(entry=True)
def _begin(phase: Any, job: Any) -> Any:
    """How many blocks of rows there are."""
    return np.int64((job[0].shape[0] + _ROWS - 1) // _ROWS if phase == 0 else -1)


@jit(entry=True)
def _work(phase: Any, block: Any, t: Any, job: Any) -> None:  # noqa: ARG001
    """Rank some rows."""
    scores, owners, indptr, indices, best, best_scores = job
    for row in range(block * _ROWS, min((block + 1) * _ROWS, scores.shape[0])):
        owner = owners[row]
        low, high = np.int64(0), np.int64(0)
        if owner >= 0:
            low, high = indptr[owner], indptr[owner + 1]
        _rank_row(scores, row, low, high, indices, best, best_scores)


# Pick the best of each row: job (scores, owners, indptr, indices, best, best_scores). ``scores``, (n, items),
# is overwritten with -inf at the places ``indices[indptr[o]:indptr[o + 1]]`` of row r, o = ``owners[r]``,
# (n,) int64, or -1 for none. ``best``, (n, top) int32, is full of -1, ``best_scores`` of -inf.
_rank = Drivers(_begin, _work, kind_of)


def rank_rows(
    scores: npt.NDArray[Any],
    owners: npt.NDArray[np.int64],
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[np.int32],
    top: int,
    threads: int | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """Return the places of the best scores of each row, and these scores.

    Parameters
    ----------
    scores : float array, shape (n, items)
        Overwritten with -inf where they are left out.
    owners : int64 array, shape (n,)
        Whose ``indices[indptr[o]:indptr[o + 1]]`` are left out; -1: nothing is.
    indptr, indices
        A CSR matrix. Its indices and owners are in range: they are not checked.
    top : int
        How many.
    threads : int, optional
        None for all that numba would use.

    Returns
    -------
    best : int32 array, shape (n, top)
        Best first; of equal scores the lower place. -1 where there is none: NaN and -inf are none.
    best_scores : float array, shape (n, top)
        -inf where there is none.
    """
    best = np.full((len(scores), top), -1, dtype=np.int32)
    best_scores = np.full(best.shape, -np.inf, dtype=scores.dtype)
    number = usable_threads(threads) if scores.size > 1 << 16 else 1
    run(_rank, Partition(number, number), (scores, owners, indptr, indices, best, best_scores))
    return best, best_scores


def best_items(
    vectors: npt.NDArray[Any],
    items: npt.NDArray[Any],
    owners: npt.NDArray[np.int64],
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[np.int32],
    top: int,
    threads: int | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """Return for each vector the items with the greatest inner products, and these.

    Parameters
    ----------
    vectors : float array, shape (n, dim)
    items : float array, shape (n_items, dim)
    owners, indptr, indices, top, threads
        As for `rank_rows`.

    Returns
    -------
    best, best_scores
        As from `rank_rows`.
    """
    columns = np.ascontiguousarray(items.T)
    best = np.empty((len(vectors), top), dtype=np.int32)
    best_scores = np.empty(best.shape, dtype=np.result_type(vectors, items))
    block = max(1, BLOCK_BYTES // (best_scores.itemsize * max(1, len(items))))
    for start in range(0, len(vectors), block):
        some = slice(start, start + block)
        scores = vectors[some] @ columns
        best[some], best_scores[some] = rank_rows(scores, owners[some], indptr, indices, top, threads)
    return best, best_scores
