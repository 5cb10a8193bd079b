"""The formula, once, and the loops that apply it.

Three layers. `adam` updates one element. *Workers* (one thread) take a range of the work and call it for
each element of each row. *Drivers* share the ranges out to threads (``*_parallel``) or take them one after
the other (``*_serial``); both run the same worker, so the bits are the same.

Nothing here validates or allocates: callers do, before the first write. Everything that a driver changes,
counts of steps and of skipped rows included, it changes in one native call, which no Python exception can
cut in two.

Two habits below are there for speed, and were measured: a row is passed as (array, row number), never as a
slice, which would carry a reference count; and loops index the last axis from 0, because an offset that
could be negative (Python's wrap-around) keeps the loop from being vectorized.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numpy.typing import NDArray

from nb_sparse_adam.jit import jit, prefetch

__all__ = [
    "BLOCK",
    "ELEMENT",
    "GLOBAL",
    "ROW",
    "SCRATCH_ROWS",
    "Compressed",
    "Hyperparameters",
    "Segments",
    "Table",
    "TableArrays",
    "apply_row_gradient",
    "block_sums_parallel",
    "block_sums_serial",
    "csr_parallel",
    "csr_serial",
    "first_poisoned_row",
    "first_poisoned_segment",
    "rows_parallel",
    "rows_serial",
    "segments_parallel",
    "segments_serial",
    "sum_segments",
]

ELEMENT, ROW, GLOBAL = 0, 1, 2  # step_counts

# The ids of one row are summed in blocks of this many, and the blocks' sums are added in order. Fixed, for
# the bits depend on it: a row that takes half of a batch can then be summed by many threads.
BLOCK = 512

# Rows of scratch memory for each chunk: the sum of a row's gradients, and its step sizes and scales.
SCRATCH_ROWS = 3

# How far ahead rows are prefetched: enough to cover the latency of memory, not so much that the processor's
# queue of misses overflows. Measured on two Zen 5 cores: at dim 16, 12 rows take a tenth less time than 8;
# from dim 64 on it is flat.
PREFETCH_ELEMENTS = 512
MIN_ROWS_AHEAD, MAX_ROWS_AHEAD = 4, 12
ENTRIES_AHEAD = 16  # of a CSR gradient, each of which is a place in memory of its own
VALUES_PREFETCHED = 1 << 19  # gradients of fewer elements are in the second-level cache, more or less
MAX_ELEMENTS_PREFETCHED = 256  # of a wide row; the hardware follows the rest by itself


class TableArrays(NamedTuple):
    """The memory of one table."""

    param: NDArray[Any]  # (rows, dim) float32 or float64
    moments: NDArray[Any]  # (rows, 2, dim), the same: exp_avg and exp_avg_sq of a row side by side
    counts: NDArray[Any]  # int32 or int64: ELEMENT (rows, dim), ROW (rows, 1), GLOBAL (1, 1)


class Hyperparameters(NamedTuple):
    """Adam's constants, in the table's dtype."""

    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    lr: Any
    eps: Any
    sign: Any  # −1 to maximize


class Table(NamedTuple):
    """One table in one step: what kernels need besides its gradient.

    The fields of `TableArrays`, `Hyperparameters` and `corrections.Corrections` in a row, for a tuple within
    a tuple cannot enter a parallel loop.
    """

    param: Any
    moments: Any
    counts: Any
    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    lr: Any
    eps: Any
    sign: Any
    step_size: Any
    scale: Any
    log_beta1: Any
    log_beta2: Any
    eps_hat: Any
    complete: Any
    mode: int  # ELEMENT, ROW or GLOBAL
    global_step: int  # GLOBAL: the count of this step
    check: bool  # skip rows that would poison their state
    totals: Any  # (2,) int64, the table's: drivers that have finished, rows that were skipped


class Segments(NamedTuple):
    """A gradient whose ids were grouped: sorted ids, each with the place of its values.

    ``packed[i] >> row_shift`` is the row, ``(packed[i] & payload_mask)`` the payload of the i-th smallest
    id; entries of one row keep the order of the gradient. Segment s is ``starts[s]:starts[s + 1]``.
    The payload is the row of ``values``, unless there is one coefficient an id (``per_id``): then it is the
    position of the id, and ``source[payload]`` the row of ``values``.
    """

    packed: NDArray[Any]  # (n,) int64
    starts: NDArray[Any]  # (segments + 1,) int32 or int64
    row_shift: int
    payload_mask: int
    values: NDArray[Any]  # (rows of values, dim)
    source: NDArray[Any]  # (n,) where per_id, else (0,)
    coefficients: NDArray[Any]  # per_id: (n,); else one a row of values, or (0,) for "all are 1"
    per_id: bool
    long: NDArray[Any]  # segments longer than BLOCK, ascending
    long_first: NDArray[Any]  # (len(long) + 1,): the first block of each in ``block_sums``
    block_sums: NDArray[Any]  # (blocks, dim)


class Compressed(NamedTuple):
    """A gradient in compressed sparse rows, of which none is empty and none holds a column twice."""

    rows: NDArray[Any]  # (rows present,) ascending, int32 or int64, as are indptr and indices
    indptr: NDArray[Any]  # (rows present + 1,)
    indices: NDArray[Any]  # (stored entries,) columns
    data: NDArray[Any]  # (stored entries,) the table's dtype


# --- the formula ------------------------------------------------------------------------------------------


@jit
def adam(p: Any, m: Any, v: Any, g: Any, table: Any, step_size: Any, scale: Any) -> Any:
    """One active step of one element: the new parameter and moments (Kingma & Ba 2015, Algorithm 1).

    ``step_size`` and ``scale`` hold the bias corrections (`Corrections`), and ``step_size`` the learning
    rate, so that one expression serves both places where ε may stand.
    """
    m = table.beta1 * m + table.one_minus_beta1 * g
    v = table.beta2 * v + table.one_minus_beta2 * (g * g)
    return p - step_size * (m / (math.sqrt(v) * scale + table.eps)), m, v


@jit
def correction(table: Any, k: Any) -> Any:
    """``step_size`` and ``scale`` after k active steps."""
    last = len(table.step_size) - 1
    if k <= last or table.complete:
        i = min(k, last)
        return table.step_size[i], table.scale[i]
    c1 = -math.expm1(k * table.log_beta1)
    c2 = -math.expm1(k * table.log_beta2)
    dtype = table.step_size.dtype.type
    if table.eps_hat:
        return dtype(math.sqrt(c2) / c1), dtype(1.0)
    return dtype(1.0 / c1), dtype(1.0 / math.sqrt(c2))


# --- one row ----------------------------------------------------------------------------------------------


@jit
def update_row(table: Any, r: Any, g: Any, i: Any, factor: Any, step_size: Any, scale: Any) -> None:
    """Every element of row r takes a step with the gradient ``factor * g[i]``."""
    param, moments = table.param, table.moments
    for j in range(param.shape[1]):
        p, m, v = adam(
            param[r, j], moments[r, 0, j], moments[r, 1, j], factor * g[i, j], table, step_size, scale
        )
        param[r, j] = p
        moments[r, 0, j] = m
        moments[r, 1, j] = v


@jit
def counts_agree(counts: Any, r: Any) -> bool:
    """Whether all elements of row r have the same count, as they do where gradients are dense."""
    k = counts[r, 0]
    differing = 0
    for j in range(counts.shape[1]):
        differing += counts[r, j] != k
    return differing == 0


@jit
def look_up_corrections(table: Any, r: Any, scratch: Any, t: Any) -> None:
    """``scratch[t]``, ``scratch[t + 1]`` ← step sizes and scales for the next step of each element of row r.

    A loop of its own: with a look-up in it, the one that updates would not be vectorized, for the compiler
    cannot tell the tables of corrections from the arrays that it writes.
    """
    counts = table.counts
    last = len(table.step_size) - 1
    for j in range(counts.shape[1]):
        k = counts[r, j]
        if k < last or table.complete:
            at = min(np.int64(k) + 1, last)
            scratch[t, j] = table.lr * table.step_size[at]
            scratch[t + 1, j] = table.scale[at]
        else:
            step_size, scale = correction(table, np.int64(k) + 1)
            scratch[t, j] = table.lr * step_size
            scratch[t + 1, j] = scale


@jit
def update_elements_alike(table: Any, r: Any, g: Any, i: Any, factor: Any) -> None:
    """Do what `update_elements` does, for a row whose elements have one count: that of the first."""
    param, moments, counts = table.param, table.moments, table.counts
    one = counts.dtype.type(1)
    step_size, scale = correction(table, np.int64(counts[r, 0]) + 1)
    step_size *= table.lr
    for j in range(param.shape[1]):
        gradient = factor * g[i, j]
        active = gradient != 0
        p, m, v, k = param[r, j], moments[r, 0, j], moments[r, 1, j], counts[r, j]
        next_p, next_m, next_v = adam(p, m, v, gradient, table, step_size, scale)
        param[r, j] = next_p if active else p
        moments[r, 0, j] = next_m if active else m
        moments[r, 1, j] = next_v if active else v
        counts[r, j] = counts.dtype.type(k + one) if active else k


@jit
def update_elements(table: Any, r: Any, g: Any, i: Any, factor: Any, scratch: Any, t: Any) -> None:
    """Every element of row r whose gradient ``factor * g[i]`` is not zero takes a step of its own count.

    Selects instead of branches: an inactive element is written back with the bits that it had, and the loops
    stay vectorized. There are two, for a row with one count needs no look-ups.
    """
    param, moments, counts = table.param, table.moments, table.counts
    if param.shape[1] == 0:
        return
    one = counts.dtype.type(1)
    if counts_agree(counts, r):
        update_elements_alike(table, r, g, i, factor)
        return
    look_up_corrections(table, r, scratch, t)
    for j in range(param.shape[1]):
        gradient = factor * g[i, j]
        active = gradient != 0
        p, m, v, k = param[r, j], moments[r, 0, j], moments[r, 1, j], counts[r, j]
        next_p, next_m, next_v = adam(p, m, v, gradient, table, scratch[t, j], scratch[t + 1, j])
        param[r, j] = next_p if active else p
        moments[r, 0, j] = next_m if active else m
        moments[r, 1, j] = next_v if active else v
        counts[r, j] = counts.dtype.type(k + one) if active else k


@jit
def update_element(table: Any, r: Any, j: Any, gradient: Any) -> None:
    """One element takes a step of its own count; its gradient is not zero."""
    k = table.counts[r, j] + 1
    step_size, scale = correction(table, k)
    p, m, v = adam(
        table.param[r, j],
        table.moments[r, 0, j],
        table.moments[r, 1, j],
        gradient,
        table,
        table.lr * step_size,
        scale,
    )
    table.param[r, j] = p
    table.moments[r, 0, j] = m
    table.moments[r, 1, j] = v
    table.counts[r, j] = k


@jit
def apply_row(
    table: Any,
    r: Any,
    g: Any,
    i: Any,
    factor: Any,
    scratch: Any,
    t: Any,
) -> None:
    """Row r is present in the gradient with ``factor * g[i]``: update what ``step_counts`` calls active."""
    if table.mode == ELEMENT:
        update_elements(table, r, g, i, factor, scratch, SCRATCH_ROWS * t + 1)
        return
    if table.mode == ROW:
        k = np.int64(table.counts[r, 0]) + 1
        table.counts[r, 0] = k
    else:
        k = table.global_step
    step_size, scale = correction(table, k)
    update_row(table, r, g, i, factor, table.lr * step_size, scale)


@jit
def apply_row_gradient(table: Any, row: Any, gradient: Any) -> bool:
    """Apply the gradient of one row, from inside a user's own ``@njit`` function.

    Parameters
    ----------
    table : tuple
        What `SparseAdam.kernel_table` gives.
    row : int
        In 0..rows - 1.
    gradient : (dim,) array
        C-contiguous, of the table's dtype; (1,) for a 1-D table. Duplicates are the caller's: each call is
        a step of the row.

    Returns
    -------
    bool
        False if the row was left out, because ``on_nonfinite="skip"`` and the gradient, or its square, is
        not finite. `SparseAdam.skipped_rows` does not count it.

    Raises
    ------
    IndexError
        If there is no such row.
    ValueError
        If the gradient has another length than a row.

    Notes
    -----
    The formula, the order of operations and so the bits are those of `SparseAdam.step`: Kingma & Ba 2015,
    Algorithm 1. Nothing is locked: threads that update one row at the same time lose updates, as Hogwild
    accepts (Niu et al. 2011); with rows of their own they are exact. A count stays at the end of its type
    (2³¹ − 1 for int32) instead of overflowing: the corrections have long been 1 there.
    """
    if row < 0 or row >= table.param.shape[0]:
        raise IndexError("apply_row_gradient: no such row, expected 0 <= row < len(table)")
    if len(gradient) != table.param.shape[1]:
        raise ValueError("apply_row_gradient: expected a gradient as long as a row")
    r = np.int64(row)
    g = gradient.reshape((1, -1))
    if table.check and poisons(g, 0, table.sign):
        return False
    counts = table.counts
    if table.mode != GLOBAL:
        most = np.int64(2**31 - 1) if counts.itemsize == 4 else np.int64(2**63 - 1)
        for j in range(counts.shape[1]):
            if counts[r, j] == most and (table.mode == ROW or g[0, j] != 0):
                counts[r, j] = counts.dtype.type(most - 1)
    if table.mode == ELEMENT:
        if counts.shape[1] > 0 and counts_agree(counts, r):
            update_elements_alike(table, r, g, 0, table.sign)
            return True
        # Without scratch memory for the corrections of each element: one after the other. `update_elements`
        # would need it, if another thread were to change a count after we have looked.
        for j in range(counts.shape[1]):
            if g[0, j] != 0:
                update_element(table, r, j, table.sign * g[0, j])
        return True
    apply_row(table, r, g, 0, table.sign, g, 0)
    return True


@jit
def poisons(g: Any, i: Any, factor: Any) -> bool:
    """Whether the row ``factor * g[i]`` holds a value that is not finite, or whose square is not.

    A square of infinity would stay in exp_avg_sq for ever, and its element would never move again.
    """
    bad = 0
    for j in range(g.shape[1]):
        gradient = factor * g[i, j]
        bad += not (gradient * gradient < np.inf)
    return bad > 0


@jit
def prefetch_row(table: Any, mode: Any, r: Any) -> None:
    """Ask for the cache lines of row r."""
    dim = table.param.shape[1]
    per_line = 64 // table.param.itemsize
    end = min(dim, MAX_ELEMENTS_PREFETCHED)
    for j in range(0, end, per_line):
        prefetch(table.param, r * dim + j)
        prefetch(table.moments, 2 * r * dim + j)
        prefetch(table.moments, (2 * r + 1) * dim + j)
    prefetch(table.param, r * dim + end - 1)  # the user's rows need not begin at a cache line
    if mode == ELEMENT:
        for j in range(0, end, 16):
            prefetch(table.counts, r * dim + j)
    elif mode == ROW:
        prefetch(table.counts, r)


@jit
def rows_ahead(dim: int) -> Any:
    """How many rows ahead of the one being updated are prefetched."""
    return min(max(PREFETCH_ELEMENTS // max(dim, 1), MIN_ROWS_AHEAD), MAX_ROWS_AHEAD)


# --- rows given once each ---------------------------------------------------------------------------------


@jit
def rows_worker(table: Any, rows: Any, values: Any, scratch: Any, t: Any, lo: Any, hi: Any) -> Any:
    """Apply ``values[s]`` to row ``rows[s]`` for s in lo:hi; return how many were skipped."""
    ahead = rows_ahead(values.shape[1])
    skipped = 0
    for s in range(lo, hi):
        if s + ahead < hi:
            prefetch_row(table, table.mode, np.int64(rows[s + ahead]))
        if table.check and poisons(values, s, table.sign):
            skipped += 1
            continue
        apply_row(table, np.int64(rows[s]), values, s, table.sign, scratch, t)
    return skipped


@jit
def finish(table: Any, skipped: Any) -> None:
    """Settle the counts of a step that has been applied."""
    if table.mode == GLOBAL:
        table.counts[0, 0] = table.global_step
    for t in range(len(skipped)):
        table.totals[1] += skipped[t]
    table.totals[0] += 1


@jit
def rows_serial(bounds: Any, skipped: Any, table: Any, rows: Any, values: Any, scratch: Any) -> None:
    """Apply chunk t, ``bounds[t]:bounds[t + 1]``, for every t, one after the other.

    ``skipped[t]`` gets the number of rows that chunk t skipped. It is an argument of its own: numba takes
    what a parallel loop itself writes to a member of a tuple for dead code.
    """
    for t in range(len(bounds) - 1):
        skipped[t] = rows_worker(table, rows, values, scratch, t, bounds[t], bounds[t + 1])
    finish(table, skipped)


@jit(parallel=True)
def rows_parallel(bounds: Any, skipped: Any, table: Any, rows: Any, values: Any, scratch: Any) -> None:
    """Apply chunk t, ``bounds[t]:bounds[t + 1]``, for every t, on as many threads as there are."""
    for t in prange(len(bounds) - 1):
        skipped[t] = rows_worker(table, rows, values, scratch, t, bounds[t], bounds[t + 1])
    finish(table, skipped)


# --- rows summed from several ids -------------------------------------------------------------------------


@jit
def locate(g: Any, i: Any) -> Any:
    """Row of ``g.values`` and coefficient of the i-th smallest id."""
    payload = g.packed[i] & g.payload_mask
    if g.per_id:
        return np.int64(g.source[payload]), g.coefficients[payload]
    if len(g.coefficients) > 0:
        return payload, g.coefficients[payload]
    return payload, g.values.dtype.type(1)


@jit
def sum_ids(g: Any, lo: Any, hi: Any, out: Any, t: Any) -> None:
    """``out[t]`` ← the sum over the ids lo:hi, in their order."""
    values = g.values
    dim = values.shape[1]
    at, coefficient = locate(g, lo)
    for j in range(dim):
        out[t, j] = coefficient * values[at, j]
    for i in range(lo + 1, hi):
        at, coefficient = locate(g, i)
        for j in range(dim):
            out[t, j] += coefficient * values[at, j]


@jit
def block_sums_worker(g: Any, lo: Any, hi: Any) -> None:
    """Sum blocks lo:hi of the long segments into ``g.block_sums``."""
    which = 0
    for b in range(lo, hi):
        while g.long_first[which + 1] <= b:
            which += 1
        s = g.long[which]
        start = np.int64(g.starts[s]) + (b - g.long_first[which]) * BLOCK
        sum_ids(g, start, min(start + BLOCK, np.int64(g.starts[s + 1])), g.block_sums, b)


@jit
def block_sums_serial(bounds: Any, g: Any) -> None:
    """Run `block_sums_worker` chunk by chunk."""
    for t in range(len(bounds) - 1):
        block_sums_worker(g, bounds[t], bounds[t + 1])


@jit(parallel=True)
def block_sums_parallel(bounds: Any, g: Any) -> None:
    """Run `block_sums_worker` on several threads."""
    for t in prange(len(bounds) - 1):
        block_sums_worker(g, bounds[t], bounds[t + 1])


@jit
def first_long(g: Any, s: Any) -> Any:
    """Index in ``g.long`` of the first long segment that is s or later."""
    lo, hi = 0, len(g.long)
    while lo < hi:
        middle = (lo + hi) // 2
        if g.long[middle] < s:
            lo = middle + 1
        else:
            hi = middle
    return lo


@jit
def sum_segment(g: Any, s: Any, which: Any, out: Any, t: Any) -> Any:
    """``out[t]`` ← the sum of segment s; ``which`` counts the long segments met, and is returned.

    The sum of a long segment is that of its blocks' sums, in order.
    """
    start, end = np.int64(g.starts[s]), np.int64(g.starts[s + 1])
    if end - start <= BLOCK:
        sum_ids(g, start, end, out, t)
        return which
    sums = g.block_sums
    first = g.long_first[which]
    for j in range(sums.shape[1]):
        out[t, j] = sums[first, j]
    for b in range(first + 1, g.long_first[which + 1]):
        for j in range(sums.shape[1]):
            out[t, j] += sums[b, j]
    return which + 1


@jit
def prefetch_values(g: Any, i: Any) -> None:
    """Ask for the values of the i-th smallest id: after sorting they come in any order."""
    dim = g.values.shape[1]
    if g.per_id:
        prefetch(g.coefficients, g.packed[i] & g.payload_mask)
    if g.values.size < VALUES_PREFETCHED:
        return
    at, _ = locate(g, i)
    for j in range(0, min(dim, MAX_ELEMENTS_PREFETCHED), 64 // g.values.itemsize):
        prefetch(g.values, at * dim + j)


@jit
def segments_worker(table: Any, g: Any, scratch: Any, t: Any, lo: Any, hi: Any) -> Any:
    """Apply the segments lo:hi, each row with the sum of its ids; return how many were skipped."""
    ahead = rows_ahead(g.values.shape[1])
    sign = table.sign
    far = g.per_id or g.values.size >= VALUES_PREFETCHED
    skipped = 0
    which = first_long(g, lo)
    for s in range(lo, hi):
        if s + ahead < hi:
            first = np.int64(g.starts[s + ahead])
            prefetch_row(table, table.mode, g.packed[first] >> g.row_shift)
            if far:
                prefetch_values(g, first)
        start = np.int64(g.starts[s])
        row = g.packed[start] >> g.row_shift
        if g.starts[s + 1] - start == 1:  # nothing to sum: no copy
            at, coefficient = locate(g, start)
            if table.check and poisons(g.values, at, coefficient * sign):
                skipped += 1
                continue
            apply_row(table, row, g.values, at, coefficient * sign, scratch, t)
            continue
        which = sum_segment(g, s, which, scratch, SCRATCH_ROWS * t)
        if table.check and poisons(scratch, SCRATCH_ROWS * t, sign):
            skipped += 1
            continue
        apply_row(table, row, scratch, SCRATCH_ROWS * t, sign, scratch, t)
    return skipped


@jit
def segments_serial(bounds: Any, skipped: Any, table: Any, g: Any, scratch: Any) -> None:
    """Run `segments_worker` chunk by chunk."""
    for t in range(len(bounds) - 1):
        skipped[t] = segments_worker(table, g, scratch, t, bounds[t], bounds[t + 1])
    finish(table, skipped)


@jit(parallel=True)
def segments_parallel(bounds: Any, skipped: Any, table: Any, g: Any, scratch: Any) -> None:
    """Run `segments_worker` on several threads."""
    for t in prange(len(bounds) - 1):
        skipped[t] = segments_worker(table, g, scratch, t, bounds[t], bounds[t + 1])
    finish(table, skipped)


@jit
def sum_segments(g: Any, out: Any) -> None:
    """``out[s]`` ← the sum of segment s, for every segment."""
    which = 0
    for s in range(len(g.starts) - 1):
        which = sum_segment(g, s, which, out, s)


@jit
def first_poisoned_row(values: Any) -> Any:
    """The first row with a value that is not finite, or whose square is not; −1 if there is none."""
    for s in range(len(values)):
        if poisons(values, s, values.dtype.type(1)):
            return s
    return -1


@jit
def first_poisoned_segment(g: Any, scratch: Any) -> Any:
    """The first segment whose sum, or its square, is not finite; −1 if none is."""
    which = 0
    for s in range(len(g.starts) - 1):
        which = sum_segment(g, s, which, scratch, 0)
        if poisons(scratch, 0, scratch.dtype.type(1)):
            return s
    return -1


# --- compressed sparse rows -------------------------------------------------------------------------------


@jit
def prefetch_element(table: Any, r: Any, j: Any) -> None:
    """Ask for the cache lines of one element."""
    dim = table.param.shape[1]
    prefetch(table.param, r * dim + j)
    prefetch(table.moments, 2 * r * dim + j)
    prefetch(table.moments, (2 * r + 1) * dim + j)
    prefetch(table.counts, r * dim + j)


@jit
def prefetch_entries(table: Any, g: Any, s: Any, start: Any, end: Any) -> Any:
    """Prefetch the entries start:end, the first of them in row s or later; return the last one's row."""
    for e in range(start, end):
        while g.indptr[s + 1] <= e:
            s += 1
        prefetch_element(table, np.int64(g.rows[s]), np.int64(g.indices[e]))
    return s


@jit
def csr_worker(table: Any, g: Any, scratch: Any, t: Any, lo: Any, hi: Any) -> Any:
    """Apply the rows lo:hi of a compressed gradient; return how many were skipped."""
    indptr, indices = g.indptr, g.indices
    data = g.data.reshape((-1, 1))
    one = g.data.dtype.type(1)
    at = SCRATCH_ROWS * t
    ahead = rows_ahead(table.param.shape[1])
    last = np.int64(indptr[hi])
    next_row, next_entry = np.int64(lo), np.int64(indptr[lo])  # to be prefetched
    skipped = 0
    for s in range(lo, hi):
        start, end = np.int64(indptr[s]), np.int64(indptr[s + 1])
        if table.mode == ELEMENT:
            reach = min(end + ENTRIES_AHEAD, last)
            next_row = prefetch_entries(table, g, next_row, next_entry, reach)
            next_entry = reach
        elif s + ahead < hi:
            prefetch_row(table, table.mode, np.int64(g.rows[s + ahead]))
        if table.check:
            bad = False
            for e in range(start, end):
                bad = bad or poisons(data, e, one)
            if bad:
                skipped += 1
                continue
        r = np.int64(g.rows[s])
        if table.mode == ELEMENT:
            for e in range(start, end):
                if data[e, 0] != 0:
                    update_element(table, r, np.int64(indices[e]), table.sign * data[e, 0])
            continue
        for j in range(table.param.shape[1]):
            scratch[at, j] = 0
        for e in range(start, end):
            scratch[at, np.int64(indices[e])] = data[e, 0]
        apply_row(table, r, scratch, at, table.sign, scratch, t)
    return skipped


@jit
def csr_serial(bounds: Any, skipped: Any, table: Any, g: Any, scratch: Any) -> None:
    """Run `csr_worker` chunk by chunk."""
    for t in range(len(bounds) - 1):
        skipped[t] = csr_worker(table, g, scratch, t, bounds[t], bounds[t + 1])
    finish(table, skipped)


@jit(parallel=True)
def csr_parallel(bounds: Any, skipped: Any, table: Any, g: Any, scratch: Any) -> None:
    """Run `csr_worker` on several threads."""
    for t in prange(len(bounds) - 1):
        skipped[t] = csr_worker(table, g, scratch, t, bounds[t], bounds[t + 1])
    finish(table, skipped)
