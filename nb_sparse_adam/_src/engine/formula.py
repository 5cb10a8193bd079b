# SPDX-License-Identifier: Apache-2.0
"""Adam of one element, its bias corrections, and what a count of steps means.

The formula is written once, for a CPU and for a GPU. `View` (in `view`) is what it is given of a table.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import load_correction, load_count, load_gradient
from nb_sparse_adam._src.engine.layout import count_offset


def formula(product: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Make `adam` of a multiplication: a CPU's, or one that a GPU does not fuse with the sum next to it."""

    def adam(p: Any, m: Any, v: Any, g: Any, table: Any, step_size: Any, scale: Any) -> Any:
        """One active step of one element: the new parameter and moments (Kingma & Ba 2015, Algorithm 1).

        All are numbers of the table's dtype. ``step_size`` and ``scale`` hold the bias corrections
        (`Corrections`), and ``step_size`` the learning rate, so that one expression serves both places where
        ε may stand.
        """
        m = product(table.beta1, m) + product(table.one_minus_beta1, g)
        v = product(table.beta2, v) + product(table.one_minus_beta2, product(g, g))
        return p - product(step_size, m / (product(math.sqrt(v), scale) + table.eps)), m, v

    return adam


adam = jit(formula(operator.mul))


@jit
def is_nonfinite(g: Any, offset: Any, length: Any, factor: Any) -> bool:
    """Whether ``factor * g``, so many elements from an offset on, holds a number that is not finite.

    Or one whose square is not: a square of infinity would stay in exp_avg_sq for ever, and its element would
    never move again. ``g`` is a contiguous array of the table's dtype, ``factor`` a number of it.
    """
    bad = 0
    for j in range(length):
        gradient = factor * load_gradient(g, offset + j)
        bad += not (gradient * gradient < np.inf)
    return bad > 0


# --- bias corrections -------------------------------------------------------------------------------------


@jit
def late_correction(k: Any, log_beta1: Any, log_beta2: Any, eps_hat: Any) -> Any:
    """``step_size`` and ``scale`` after k active steps, as float64, where k is beyond the table of them.

    A negative k, which somebody has written into a count, is the highest number that there is.
    """
    k = k if k >= 0 else np.int64(2**63 - 1)
    c1 = -math.expm1(k * log_beta1)
    c2 = -math.expm1(k * log_beta2)
    if eps_hat:
        return math.sqrt(c2) / c1, 1.0
    return 1.0 / c1, 1.0 / math.sqrt(c2)


@jit
def correction(table: Any, k: Any) -> Any:
    """``step_size`` and ``scale`` after k active steps; k is int64.

    A count is memory that a user can reach, and may hold anything. Compared without its sign, a negative
    number is beyond the table too.
    """
    known = np.int64(min(np.uint64(k), np.uint64(table.last)))
    if known == k or table.complete:
        offset = 2 * known
        return load_correction(table.corrections, offset), load_correction(table.corrections, offset + 1)
    step_size, scale = late_correction(k, table.log_beta1, table.log_beta2, table.eps_hat)
    dtype = table.corrections.dtype.type
    return dtype(step_size), dtype(scale)


# --- counts of active steps -------------------------------------------------------------------------------


@jit
def most_of(counts: Any) -> Any:
    """Return the highest count that an array of int32 or int64 can hold."""
    dtype = counts.dtype.type
    return dtype(2**31 - 1) if counts.itemsize == 4 else dtype(2**63 - 1)


@jit
def after(count: Any, most: Any) -> Any:
    """Return the number of the step that follows a count of steps, as int64."""
    return np.int64(count) + np.int64(count != most)


@jit
def one_more(table: Any, count: Any, active: Any) -> Any:
    """Return a count after a step, if it is active; it stays at the end of its type."""
    dtype = table.counts.dtype.type
    return dtype(count + dtype(active & (count != table.most)))


@jit
def counts_agree(table: Any, r: Any) -> bool:
    """Whether all elements of row r have the same count, as they do where gradients are dense; dim > 0."""
    offset = count_offset(table, r)
    k = load_count(table.counts, offset)
    differing = k ^ k
    for j in range(table.dim):
        differing |= load_count(table.counts, offset + j) ^ k
    return bool(differing == 0)


@jit
def highest_count(table: Any, r: Any) -> Any:
    """Of the elements of row r, where a negative one is as good as the highest there is; dim > 0."""
    offset = count_offset(table, r)
    highest = load_count(table.counts, offset)
    signs = highest
    for j in range(table.dim):
        count = load_count(table.counts, offset + j)
        highest = max(highest, count)
        signs |= count
    return table.most if signs < 0 else highest
