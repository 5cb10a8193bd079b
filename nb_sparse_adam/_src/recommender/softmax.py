# SPDX-License-Identifier: Apache-2.0
"""Kernels of the sampled softmax loss and its gradients, with negatives of each interaction or of the batch.

The formulas are in the docstring of `losses`. As in `bpr`, threads share out blocks of a fixed size, so that
every sum has the same order on any number of them, nothing is validated, and nothing allocated.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.intrinsics import load_sum, load_value, store_sum
from nb_sparse_adam._src.engine.prefetching import prefetch
from nb_sparse_adam._src.recommender.bpr import Pair, dot
from nb_sparse_adam._src.recommender.products import multiply
from nb_sparse_adam._src.recommender.sampling import BLOCK, kind_of

_LOWEST = np.float32(-87.0)
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_EXP_5, _EXP_4 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3)
_EXP_3, _EXP_2 = np.float32(8.3334519073e-3), np.float32(4.1665795894e-2)
_EXP_1, _HALF, _ONE = np.float32(1.6666665459e-1), np.float32(0.5), np.float32(1.0)

# --- sampled negatives ------------------------------------------------------------------------------------


@jit
def sampled_worker(
    begin: Any,
    end: Any,
    tables: Any,
    users: Any,
    items: Any,
    weights: Any,
    log_q: Any,
    sharpness: Any,
    reg: Any,
    gradients: Any,
    shares: Any,
) -> float:
    """Do what `sampled` does, for the interactions begin:end; return the sum of their losses."""
    user_table, item_table = tables.user, tables.item
    user_grad, item_grad = gradients.user, gradients.item
    n = len(users)
    negatives = len(items) // n - 1
    dim = user_table.shape[1]
    dtype = user_table.dtype.type
    decay = dtype(reg / (n * negatives))
    decay_all = dtype(reg / n)
    loss = 0.0
    for t in range(begin, end):
        u, i = users[t], items[t]
        first = n + t * negatives
        u_at, i_at, t_at = np.int64(u) * dim, np.int64(i) * dim, t * dim
        if t + 1 < end:
            prefetch(user_table, np.int64(users[t + 1]) * dim, dim)
            prefetch(item_table, np.int64(items[t + 1]) * dim, dim)
            for k in range(first + negatives, first + 2 * negatives):
                prefetch(item_table, np.int64(items[k]) * dim, dim)
        weight = np.float64(weights[t])
        scale = weight * sharpness
        positive = sharpness * np.float64(dot(user_table, u, item_table, i)) - log_q[i]
        largest = positive
        norms = 0.0
        for k in range(negatives):
            j = items[first + k]
            shares[t, k] = sharpness * np.float64(dot(user_table, u, item_table, j)) - log_q[j]
            largest = max(largest, shares[t, k])
            if reg > 0:
                norms += np.float64(dot(item_table, j, item_table, j))
        own = math.exp(positive - largest)
        total = own
        for k in range(negatives):
            shares[t, k] = math.exp(shares[t, k] - largest)
            total += shares[t, k]
        loss += weight * (largest - positive + math.log(total))
        if reg > 0:
            norm = np.float64(dot(user_table, u, user_table, u) + dot(item_table, i, item_table, i))
            loss += 0.5 * reg * (norm + norms / negatives)
        g = dtype(scale * (own / total - 1.0) / n)
        for c in range(dim):
            of_user, of_item = load_value(user_table, u_at + c), load_value(item_table, i_at + c)
            store_sum(user_grad, t_at + c, decay_all * of_user + g * of_item)
            store_sum(item_grad, t_at + c, decay_all * of_item + g * of_user)
        for k in range(negatives):
            j_at, k_at = np.int64(items[first + k]) * dim, (first + k) * dim
            g = dtype(scale * (shares[t, k] / total) / n)
            for c in range(dim):
                of_user, other = load_value(user_table, u_at + c), load_value(item_table, j_at + c)
                store_sum(user_grad, t_at + c, load_sum(user_grad, t_at + c) + g * other)
                store_sum(item_grad, k_at + c, decay * other + g * of_user)
    return loss


@jit(entry=True)
def _sampled_begin(phase: Any, job: Any) -> Any:
    """How many blocks of interactions there are."""
    return np.int64((len(job[2]) + BLOCK - 1) // BLOCK if phase == 0 else -1)


@jit(entry=True)
def _sampled_work(phase: Any, block: Any, t: Any, job: Any) -> None:  # noqa: ARG001
    """Compute the gradients of one block of interactions."""
    user, item, users, items, weights, log_q, sharpness, reg, user_grad, item_grad, shares, losses = job
    tables, gradients = Pair(user, item), Pair(user_grad, item_grad)
    begin = block * BLOCK
    end = min(begin + BLOCK, len(users))
    losses[block] = sampled_worker(
        begin, end, tables, users, items, weights, log_q, sharpness, reg, gradients, shares
    )


# The gradients of the mean loss of a batch with respect to every row that it looks up: job (*tables, users,
# items, weights, log_q, sharpness, reg, *gradients, shares, losses), where tables and gradients are each a
# `Pair`. ``users`` and ``items`` are as `sampling.sample` writes them, and row t of the gradients belongs to
# their id t. ``weights``, float32 (n,), multiply the losses of the interactions. ``log_q``, float64
# (n_items,), is log Q of each item; ``sharpness`` is 1/τ. ``shares``, float64 (n, negatives), is scratch.
# ``losses``, (blocks,), gets the sum of the losses of each block.
sampled = Drivers(_sampled_begin, _sampled_work, kind_of)


# --- negatives of the batch -------------------------------------------------------------------------------


@jit
def groups_of(n: Any, longest: Any) -> Any:
    """How many groups of at most `longest` interactions a batch is cut into."""
    return (n + longest - 1) // longest


@jit
def gather_group(
    begin: Any,
    end: Any,
    tables: Any,
    users: Any,
    items: Any,
    log_q: Any,
    user_rows: Any,
    item_rows: Any,
    turned: Any,
    corrections: Any,
) -> None:
    """Copy what `in_batch` needs of the interactions begin:end: their vectors, side by side, and log Q."""
    for j in range(begin, end):
        user, item = users[j], items[j]
        corrections[j] = log_q[item]
        for c in range(tables.user.shape[1]):
            user_rows[j, c] = tables.user[user, c]
        for c in range(tables.item.shape[1]):
            value = tables.item[item, c]
            item_rows[j, c] = value
            turned[c, j - begin] = value


@jit
def exp_of_negative(x: Any) -> Any:
    """Return exp(x) of a float32 x <= 0 within a unit in the last place; exp(-87) = 2e-38 below -87.

    x = k ln 2 + r, and the polynomial of Cephes' ``expf`` (S. L. Moshier) for exp(r): without a call, so that
    a loop over it is vectorized.
    """
    x = _LOWEST if x < _LOWEST else x  # NaN stays what it is
    k = np.int32(x * _LOG2_E - _HALF if x == x else -_HALF)
    n = np.float32(k)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = _EXP_5 * r + _EXP_4
    p = p * r + _EXP_3
    p = p * r + _EXP_2
    p = p * r + _EXP_1
    p = p * r + _HALF
    p = (p * r) * r + r + _ONE
    return p * np.int32((k + np.int32(127)) << np.int32(23)).view(np.float32)


@jit
def sum_of(row: Any, n: Any) -> Any:
    """Return the sum of the first n elements, in float64: four sums, of which none waits for another."""
    a = b = c = d = 0.0
    j = 0
    while j + 4 <= n:
        a += np.float64(row[j])
        b += np.float64(row[j + 1])
        c += np.float64(row[j + 2])
        d += np.float64(row[j + 3])
        j += 4
    while j < n:
        a += np.float64(row[j])
        j += 1
    return (a + b) + (c + d)


@jit
def largest_of(row: Any, n: Any) -> Any:
    """Return the largest of the first n elements; four at a time, as in `sum_of`."""
    a = b = c = d = row[0]
    j = 0
    while j + 4 <= n:
        a, b = max(a, row[j]), max(b, row[j + 1])
        c, d = max(c, row[j + 2]), max(d, row[j + 3])
        j += 4
    while j < n:
        a = max(a, row[j])
        j += 1
    return max(max(a, b), max(c, d))


@jit
def shares_worker(
    t: Any, begin: Any, end: Any, items: Any, weights: Any, corrections: Any, sharpness: Any, row: Any
) -> float:
    """Turn the scores of interaction t of the group begin:end, `row`, into ∂loss/∂score; return the loss."""
    dtype = row.dtype.type
    size, own = end - begin, t - begin
    scale = dtype(sharpness)
    item, nothing = items[t], dtype(-np.inf)
    positive = scale * row[own] - corrections[t]
    for j in range(size):
        # The positive itself, once more, is left out.
        row[j] = nothing if items[begin + j] == item else scale * row[j] - corrections[begin + j]
    row[own] = positive
    largest = largest_of(row, size)
    for j in range(size):
        row[j] = exp_of_negative(row[j] - largest)
    total = sum_of(row, size)
    weight = np.float64(weights[t])
    loss = weight * (np.float64(largest) - np.float64(positive) + math.log(total))
    scale = dtype(weight * sharpness / (total * len(items)))
    for j in range(size):
        row[j] *= scale
    row[own] = 0  # to be p − 1, as a sum: without the cancellation
    row[own] = -sum_of(row, size)
    return loss


@jit(entry=True)
def _in_batch_begin(phase: Any, job: Any) -> Any:
    """How many groups, or blocks of interactions of groups, a phase has."""
    if phase > 2:
        return np.int64(-1)
    longest = job[8]
    groups = groups_of(len(job[2]), longest)
    return np.int64(groups if phase == 0 else groups * ((longest + BLOCK - 1) // BLOCK))


@jit(entry=True)
def _in_batch_work(phase: Any, unit: Any, t: Any, job: Any) -> None:  # noqa: ARG001
    """Do one group, or one block of interactions of one."""
    user, item, users, items, weights, log_q, sharpness, reg, longest = job[:9]
    user_grad, item_grad, user_rows, item_rows, turned, corrections, shares, sums, losses = job[9:]
    n = len(users)
    groups, blocks = groups_of(n, longest), (longest + BLOCK - 1) // BLOCK
    group = unit if phase == 0 else unit // blocks
    begin, end = group * n // groups, (group + 1) * n // groups
    if phase == 0:
        gather_group(
            begin,
            end,
            Pair(user, item),
            users,
            items,
            log_q,
            user_rows,
            item_rows,
            turned[group],
            corrections,
        )
        return
    low = min(begin + unit % blocks * BLOCK, end)
    rows, size = min(low + BLOCK, end) - low, end - begin
    decay, dim = user.dtype.type(reg / n), user.shape[1]
    wide, across = np.int64(sums.shape[1]), np.int64(shares.shape[1])
    if phase == 1:
        multiply(
            rows, across, dim, user_rows, low * wide, wide, 1, turned, group * dim * across, across,
            shares, low * across, across,
        )  # fmt: skip
        loss = 0.0
        for row in range(low, low + rows):
            loss += shares_worker(row, begin, end, items, weights, corrections, sharpness, shares[row])
            u, i = users[row], items[row]
            if reg > 0:
                loss += 0.5 * reg * np.float64(dot(user, u, user, u) + dot(item, i, item, i))
        losses[unit] = loss
        multiply(
            rows, wide, size, shares, low * across, across, 1, item_rows, begin * wide, wide,
            sums, low * wide, wide,
        )  # fmt: skip
        for row in range(low, low + rows):
            for c in range(dim):
                user_grad[row, c] = decay * user_rows[row, c] + sums[row, c]
        return
    multiply(
        rows, wide, size, shares, begin * across + (low - begin), 1, across, user_rows, begin * wide, wide,
        sums, low * wide, wide,
    )  # fmt: skip
    for row in range(low, low + rows):
        for c in range(dim):
            item_grad[row, c] = decay * item_rows[row, c] + sums[row, c]


# The same, where the negatives of an interaction are the items of the others of its group: job (*tables,
# users, items, weights, log_q, sharpness, reg, longest, *gradients, user_rows, item_rows, turned,
# corrections, shares, sums, losses). A batch of n is cut into ``ceil(n / longest)`` groups whose sizes differ
# by at most one. ``log_q`` is float32 here. Scratch, whose last lengths are `products.padded`: ``user_rows``
# and ``item_rows``, (n, dim), the vectors; ``turned``, (groups, dim, longest), those of items column by
# column; ``corrections``, (n,), their log Q; ``shares``, (n, longest), the scores, and then the derivatives
# of the loss by them; ``sums``, (n, dim), products of these and vectors. ``losses``, (groups * ceil(longest /
# BLOCK),), gets the sums of the losses of blocks.
in_batch = Drivers(_in_batch_begin, _in_batch_work, kind_of)
