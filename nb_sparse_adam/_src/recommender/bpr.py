# SPDX-License-Identifier: Apache-2.0
"""Kernels of the BPR loss and its gradients.

The formulas are in the docstring of `losses`. A driver (``*_serial``, ``*_parallel``) goes over blocks
of a fixed size and calls a worker for each, so that every sum has the same order on any number of threads.
Nothing is validated here, and nothing allocated.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.intrinsics import load_sum, load_value, store_sum
from nb_sparse_adam._src.engine.prefetching import prefetch
from nb_sparse_adam._src.recommender.sampling import BLOCK, kind_of

AHEAD = 4  # interactions between the one that is worked on and the one whose vectors are prefetched


class Pair(NamedTuple):
    """Two arrays of vectors: the tables, or the gradients of the rows of a batch."""

    user: NDArray[np.float32]  # (n_users, dim), or (n, dim)
    item: NDArray[np.float32]  # (n_items, dim), or (n + n * negatives, dim)


# The one sum that the compiler may reorder ("reassoc"): otherwise it is not vectorized, and the kernel takes
# 2.5 times as long (350 against 140 µs for 1024 triples of dim 64 on one Zen 4 core). The order is fixed when
# the code is compiled, and the same on every thread.
@numba.njit(fastmath={"reassoc", "nsz"}, error_model="numpy", nogil=True)  # type: ignore[untyped-decorator]
def dot(a: Any, i: Any, b: Any, j: Any) -> Any:
    """Return the inner product of ``a[i]`` and ``b[j]``."""
    total = a.dtype.type(0)
    for c in range(a.shape[1]):
        total += a[i, c] * b[j, c]
    return total


@jit
def gradients_worker(
    begin: Any, end: Any, tables: Any, users: Any, items: Any, weights: Any, reg: Any, gradients: Any
) -> float:
    """Do what `gradients` does, for the interactions begin:end; return the sum of their losses."""
    user_table, item_table = tables.user, tables.item
    user_grad, item_grad = gradients.user, gradients.item
    n = len(users)
    negatives = len(items) // n - 1
    dim = user_table.shape[1]
    dtype = user_table.dtype.type
    share = 1.0 / (n * negatives)
    decay = dtype(reg * share)
    decay_all = dtype(reg / n)
    loss = 0.0
    for t in range(begin, end):
        if t + AHEAD < end:
            prefetch(user_table, np.int64(users[t + AHEAD]) * dim, dim)
            prefetch(item_table, np.int64(items[t + AHEAD]) * dim, dim)
            for k in range(n + (t + AHEAD) * negatives, n + (t + AHEAD + 1) * negatives):
                prefetch(item_table, np.int64(items[k]) * dim, dim)
        u, i = users[t], items[t]
        u_at, i_at, t_at = np.int64(u) * dim, np.int64(i) * dim, t * dim
        weight = np.float64(weights[t])
        positive = dot(user_table, u, item_table, i)
        norm = 0.0
        if reg > 0:
            norm = np.float64(dot(user_table, u, user_table, u) + dot(item_table, i, item_table, i))
        first = n + t * negatives
        for k in range(first, first + negatives):
            j = items[k]
            j_at, k_at = np.int64(j) * dim, k * dim
            difference = np.float64(positive - dot(user_table, u, item_table, j))
            # softplus(−d) and its derivative −1 / (1 + exp(d)), with exp() of what is not positive only.
            small = math.exp(-abs(difference))
            loss += weight * (math.log1p(small) + max(-difference, 0.0))
            slope = -(small if difference > 0 else 1.0) / (1.0 + small)
            if reg > 0:
                loss += 0.5 * reg * (norm + dot(item_table, j, item_table, j))
            g = dtype(slope * (weight * share))
            if k == first:
                for c in range(dim):
                    of_user, of_item = load_value(user_table, u_at + c), load_value(item_table, i_at + c)
                    other = load_value(item_table, j_at + c)
                    store_sum(user_grad, t_at + c, decay_all * of_user + g * (of_item - other))
                    store_sum(item_grad, t_at + c, decay_all * of_item + g * of_user)
                    store_sum(item_grad, k_at + c, decay * other - g * of_user)
            else:
                for c in range(dim):
                    of_user, of_item = load_value(user_table, u_at + c), load_value(item_table, i_at + c)
                    other = load_value(item_table, j_at + c)
                    store_sum(user_grad, t_at + c, load_sum(user_grad, t_at + c) + g * (of_item - other))
                    store_sum(item_grad, t_at + c, load_sum(item_grad, t_at + c) + g * of_user)
                    store_sum(item_grad, k_at + c, decay * other - g * of_user)
    return loss


@jit(entry=True)
def _gradients_begin(phase: Any, job: Any) -> Any:
    """How many blocks of interactions there are."""
    return np.int64((len(job[2]) + BLOCK - 1) // BLOCK if phase == 0 else -1)


@jit(entry=True)
def _gradients_work(phase: Any, block: Any, t: Any, job: Any) -> None:  # noqa: ARG001
    """Compute the gradients of one block of interactions."""
    user, item, users, items, weights, reg, user_grad, item_grad, losses = job
    tables, gradients = Pair(user, item), Pair(user_grad, item_grad)
    begin = block * BLOCK
    end = min(begin + BLOCK, len(users))
    losses[block] = gradients_worker(begin, end, tables, users, items, weights, reg, gradients)


# The gradients of the mean loss of a batch with respect to every row that it looks up: job (*tables, users,
# items, weights, reg, *gradients, losses), where tables and gradients are each a `Pair`. ``users`` and
# ``items`` are as `sample` writes them, and row t of the gradients belongs to their id t. ``weights``,
# float32 (n,), multiply the losses of the interactions. ``losses``, (blocks,), gets the sum of the losses of
# the triples of each block.
gradients = Drivers(_gradients_begin, _gradients_work, kind_of)
