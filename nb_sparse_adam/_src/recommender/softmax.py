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
from nb_sparse_adam._src.recommender.bpr import Pair, dot
from nb_sparse_adam._src.recommender.sampling import BLOCK, kind_of

# --- sampled negatives ------------------------------------------------------------------------------------


@jit
def sampled_worker(
    begin: Any,
    end: Any,
    tables: Any,
    users: Any,
    items: Any,
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
        loss += largest - positive + math.log(total)
        if reg > 0:
            norm = np.float64(dot(user_table, u, user_table, u) + dot(item_table, i, item_table, i))
            loss += 0.5 * reg * (norm + norms / negatives)
        g = dtype(sharpness * (own / total - 1.0) / n)
        for c in range(dim):
            user_grad[t, c] = decay_all * user_table[u, c] + g * item_table[i, c]
            item_grad[t, c] = decay_all * item_table[i, c] + g * user_table[u, c]
        for k in range(negatives):
            j = items[first + k]
            g = dtype(sharpness * (shares[t, k] / total) / n)
            for c in range(dim):
                user_grad[t, c] += g * item_table[j, c]
                item_grad[first + k, c] = decay * item_table[j, c] + g * user_table[u, c]
    return loss


@jit(entry=True)
def _sampled_begin(phase: Any, job: Any) -> Any:
    """How many blocks of interactions there are."""
    return np.int64((len(job[2]) + BLOCK - 1) // BLOCK if phase == 0 else -1)


@jit(entry=True)
def _sampled_work(phase: Any, block: Any, t: Any, job: Any) -> None:  # noqa: ARG001
    """Compute the gradients of one block of interactions."""
    user, item, users, items, log_q, sharpness, reg, user_grad, item_grad, shares, losses = job
    tables, gradients = Pair(user, item), Pair(user_grad, item_grad)
    begin = block * BLOCK
    end = min(begin + BLOCK, len(users))
    losses[block] = sampled_worker(begin, end, tables, users, items, log_q, sharpness, reg, gradients, shares)


# The gradients of the mean loss of a batch with respect to every row that it looks up: job (*tables, users,
# items, log_q, sharpness, reg, *gradients, shares, losses), where tables and gradients are each a `Pair`.
# ``users`` and ``items`` are as `sampling.sample` writes them, and row t of the gradients belongs to their id
# t. ``log_q``, float64 (n_items,), is log Q of each item; ``sharpness`` is 1/τ. ``shares``, float64
# (n, negatives), is scratch. ``losses``, (blocks,), gets the sum of the losses of each block.
sampled = Drivers(_sampled_begin, _sampled_work, kind_of)


# --- negatives of the batch -------------------------------------------------------------------------------


@jit
def groups_of(n: Any, longest: Any) -> Any:
    """How many groups of at most `longest` interactions a batch is cut into."""
    return (n + longest - 1) // longest


@jit
def turn_group(begin: Any, end: Any, item_table: Any, items: Any, turned: Any) -> None:
    """Write the vectors of the items begin:end of a batch into ``turned``, (dim, end - begin or more)."""
    for j in range(begin, end):
        item = items[j]
        for c in range(item_table.shape[1]):
            turned[c, j - begin] = item_table[item, c]


@jit
def shares_worker(
    t: Any,
    begin: Any,
    end: Any,
    tables: Any,
    users: Any,
    items: Any,
    log_q: Any,
    sharpness: Any,
    turned: Any,
    shares: Any,
) -> float:
    """Write what `in_batch` needs of interaction t of the group begin:end: ∂loss/∂score; return the loss."""
    user_table = tables.user
    dtype = user_table.dtype.type
    u, size, own = users[t], end - begin, t - begin
    for j in range(size):
        shares[t, j] = 0
    scale = dtype(sharpness)
    dim = user_table.shape[1]
    for c in range(0, dim - dim % 4, 4):  # four at a time: the sums are read and written a quarter as often
        a, b = scale * user_table[u, c], scale * user_table[u, c + 1]
        d, e = scale * user_table[u, c + 2], scale * user_table[u, c + 3]
        for j in range(size):
            shares[t, j] += (
                a * turned[c, j] + b * turned[c + 1, j] + (d * turned[c + 2, j] + e * turned[c + 3, j])
            )
    for c in range(dim - dim % 4, dim):
        a = scale * user_table[u, c]
        for j in range(size):
            shares[t, j] += a * turned[c, j]
    largest = dtype(-np.inf)
    for j in range(size):
        shares[t, j] -= log_q[items[begin + j]]
        if j != own and items[begin + j] == items[t]:
            shares[t, j] = -np.inf  # the positive itself, once more
        largest = max(largest, shares[t, j])
    positive = shares[t, own]
    total = 0.0
    for j in range(size):
        shares[t, j] = math.exp(shares[t, j] - largest)
        total += np.float64(shares[t, j])
    loss = np.float64(largest) - np.float64(positive) + math.log(total)
    scale = dtype(sharpness / (total * len(users)))
    rest = 0.0
    for j in range(size):
        shares[t, j] *= scale
        if j != own:
            rest += np.float64(shares[t, j])
    shares[t, own] = -rest  # p − 1, but for rounding: without the cancellation
    return loss


@jit
def add_products(
    begin: Any, end: Any, factors: Any, table: Any, rows: Any, first: Any, out: Any, row: Any
) -> None:
    """Add ``factors[k] * table[rows[first + k]]`` to ``out[row]``, for k in begin:end."""
    k = begin
    while k + 4 <= end:
        a, b, d, e = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
        i, j = rows[first + k], rows[first + k + 1]
        m, o = rows[first + k + 2], rows[first + k + 3]
        for c in range(out.shape[1]):
            out[row, c] += a * table[i, c] + b * table[j, c] + (d * table[m, c] + e * table[o, c])
        k += 4
    while k < end:
        for c in range(out.shape[1]):
            out[row, c] += factors[k] * table[rows[first + k], c]
        k += 1


@jit(entry=True)
def _in_batch_begin(phase: Any, job: Any) -> Any:
    """How many groups, or blocks of interactions of groups, a phase has."""
    if phase > 2:
        return np.int64(-1)
    longest = job[7]
    groups = groups_of(len(job[2]), longest)
    return np.int64(groups if phase == 0 else groups * ((longest + BLOCK - 1) // BLOCK))


@jit(entry=True)
def _in_batch_work(phase: Any, unit: Any, t: Any, job: Any) -> None:  # noqa: ARG001
    """Do one group, or one block of interactions of one."""
    user, item, users, items, log_q, sharpness, reg, longest = job[:8]
    user_grad, item_grad, turned, shares, by_item, losses = job[8:]
    n = len(users)
    groups, blocks = groups_of(n, longest), (longest + BLOCK - 1) // BLOCK
    group = unit if phase == 0 else unit // blocks
    begin, end = group * n // groups, (group + 1) * n // groups
    if phase == 0:
        turn_group(begin, end, item, items, turned[group])
        return
    low = min(begin + unit % blocks * BLOCK, end)
    high = min(low + BLOCK, end)
    decay = user.dtype.type(reg / n)
    if phase == 1:
        tables = Pair(user, item)
        loss = 0.0
        for row in range(low, high):
            loss += shares_worker(
                row, begin, end, tables, users, items, log_q, sharpness, turned[group], shares
            )
            u, i = users[row], items[row]
            if reg > 0:
                loss += 0.5 * reg * np.float64(dot(user, u, user, u) + dot(item, i, item, i))
            for c in range(user.shape[1]):
                user_grad[row, c] = decay * user[u, c]
            add_products(0, end - begin, shares[row], item, items, begin, user_grad, row)
        for j in range(end - begin):
            for row in range(low, high):
                by_item[begin + j, row - begin] = shares[row, j]
        losses[unit] = loss
        return
    for row in range(low, high):
        for c in range(item.shape[1]):
            item_grad[row, c] = decay * item[items[row], c]
        add_products(0, end - begin, by_item[row], user, users, begin, item_grad, row)


# The same, where the negatives of an interaction are the items of the others of its group: job (*tables,
# users, items, log_q, sharpness, reg, longest, *gradients, turned, shares, by_item, losses). A batch of n is
# cut into ``ceil(n / longest)`` groups, whose sizes differ by at most one. ``log_q`` is float32 here. Scratch:
# ``turned``, (groups, dim, longest), the items' vectors column by column; ``shares`` and ``by_item``,
# (n, longest), the derivatives of the loss by each score, those of a user side by side, and of an item.
# ``losses``, (groups * ceil(longest / BLOCK),), gets the sums of the losses of blocks.
in_batch = Drivers(_in_batch_begin, _in_batch_work, kind_of)
