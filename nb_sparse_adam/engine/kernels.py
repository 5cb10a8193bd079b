"""The formula, once, and the loops that apply it.

Three layers. `adam` updates one element. *Workers* (one thread) take a range of the work and call it for
each element of each row. *Drivers* share the ranges out to threads (``*_parallel``) or take them one after
the other (``*_serial``); both run the same worker, in the calling thread's mode, so the bits are the same.

Nothing here validates or allocates: callers do, before the first write. Everything that a driver changes,
counts of steps and of skipped rows included, it changes in one native call, which no Python exception can
cut in two.

Three habits below are there for speed, and were measured. A row is passed as an array and the place where it
begins, never as a slice, which would carry a reference count. Elements are read and written by the functions
of `memory`, which tell the compiler what does not overlap. And a worker takes everything it needs of its
table into a `View` first, so that it stays in registers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numpy.typing import NDArray

from nb_sparse_adam.engine.compile import jit
from nb_sparse_adam.engine.intrinsics import (
    CACHE_LINE,
    address,
    array_at,
    copy_correction,
    load_correction,
    load_count,
    load_exp_avg,
    load_exp_avg_sq,
    load_gradient,
    load_param,
    load_row_correction,
    load_sum,
    load_value,
    matrix_at,
    prefetch_line,
    store_count,
    store_exp_avg,
    store_exp_avg_sq,
    store_param,
    store_row_correction,
    store_sum,
    take_turn,
)
from nb_sparse_adam.engine.kernel_cache import STAMP
from nb_sparse_adam.engine.parallel import float_mode, swap_float_mode, swap_threads

__all__ = [
    "BLOCK",
    "ELEMENT",
    "GLOBAL",
    "ROW",
    "SCRATCH_ROWS",
    "Compressed",
    "Hyperparameters",
    "LentTable",
    "Segments",
    "Settings",
    "Table",
    "TableArrays",
    "TableBatch",
    "apply_row_gradient",
    "block_sums_parallel",
    "block_sums_serial",
    "csr_parallel",
    "csr_serial",
    "first_poisoned_row",
    "first_poisoned_segment",
    "formula",
    "late_correction",
    "lent",
    "prefetch_element",
    "prefetch_row",
    "rows_ahead",
    "rows_parallel",
    "rows_serial",
    "segments_parallel",
    "segments_serial",
    "sum_segments",
    "tables_parallel",
    "tables_serial",
    "view",
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
IDS_AHEAD = 16  # whose values are prefetched: after sorting they come in any order
VALUES_PREFETCHED = 1 << 19  # gradients of fewer elements are in the second-level cache, more or less
MAX_ELEMENTS_PREFETCHED = 256  # of a wide row; the hardware follows the rest by itself
PIECE = 16  # elements of a row that are asked for at once, between other arithmetic


class TableArrays(NamedTuple):
    """The memory of one table. `table_state` decides how it is laid out, kernels follow the strides."""

    param: NDArray[Any]  # (rows, dim) float32 or float64
    moments: NDArray[Any]  # 1-D, the same: exp_avg of row r from r * moment_stride on, then its exp_avg_sq
    counts: NDArray[Any]  # 1-D, int32 or int64: those of row r from r * count_stride on
    moment_stride: int
    count_stride: int  # 0: one count for the table


class Hyperparameters(NamedTuple):
    """Adam's constants, in the table's dtype."""

    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    lr: Any
    eps: Any
    sign: Any  # −1 to maximize


class Settings(NamedTuple):
    """What kernels need to know of a table besides its numbers."""

    moment_stride: int
    count_stride: int
    mode: int  # ELEMENT, ROW or GLOBAL
    eps_hat: int
    complete: int  # see `corrections.Corrections`
    check: int  # skip rows that would poison their state


class Table(NamedTuple):
    """One table in one step: what kernels need besides its gradient.

    Arrays only, and few of them: numba unpacks each member of a tuple at every call, and a scalar takes it
    longer than an array.
    """

    param: Any  # these three as in `TableArrays`
    moments: Any
    counts: Any
    corrections: Any  # (2 * (K + 1),): step size and scale after k steps, k = 0..K; see `Corrections`
    log_betas: Any  # (2,) float64
    hyperparameters: Any  # `Hyperparameters` as an array
    settings: Any  # `Settings` as an array
    totals: Any  # (2,) int64, the table's: drivers that have finished, rows that were skipped


class LentTable(NamedTuple):
    """A `Table` for a user's functions, of a type that no other version of the kernels has.

    What numba has compiled of such a function holds this version's layout, and numba's own cache knows the
    function by its file and by the types of its arguments: so one of these types has to change.
    """

    param: Any
    moments: Any
    counts: Any
    corrections: Any
    log_betas: Any
    hyperparameters: Any
    settings: Any
    totals: Any
    version: Any = np.empty(0, [(f"kernels {STAMP}", np.int8)])


def lent(table: Table) -> LentTable:
    """Return a table for a user's own function, which cannot change the numbers that say where things are."""
    return LentTable(*table._replace(settings=np.frombuffer(table.settings.tobytes(), np.int64)))


class View(NamedTuple):
    """A `Table` as workers use it, each number a local variable of its own."""

    param: Any
    moments: Any
    counts: Any
    corrections: Any
    last: Any  # the K of ``corrections``
    most: Any  # the highest count of its type
    log_beta1: Any
    log_beta2: Any
    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    lr: Any
    eps: Any
    sign: Any
    dim: Any
    moment_stride: Any
    count_stride: Any
    mode: Any
    eps_hat: Any
    complete: Any
    check: Any
    global_step: Any  # GLOBAL: the count of this step
    param_span: Any  # how many elements of a row to prefetch, in each of its arrays
    moment_span: Any
    count_span: Any  # 0 where counts lie behind the moments of their row, or there is one for the table


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
    values: NDArray[
        Any
    ]  # (rows of values, dim); in a batch rows may lie apart: (rows, elements between them)
    source: NDArray[Any]  # (n,) where per_id, else (0,)
    coefficients: NDArray[Any]  # per_id: (n,); else one a row of values, or (0,) for "all are 1"
    per_id: bool
    long: NDArray[Any]  # segments longer than BLOCK, ascending
    long_first: NDArray[Any]  # (len(long) + 1,): the first block of each in ``block_sums``
    block_sums: NDArray[Any]  # (blocks, dim)


class TableBatch(NamedTuple):
    """Several tables with their gradients: element i of each array is about table i.

    A `Table` and what of `Segments` is not in a `grouping.IdBatch`. Addresses stand for arrays, for compiled
    code cannot be given any number of those; whoever makes a batch keeps them.
    """

    param: NDArray[np.int64]  # address
    rows: NDArray[np.int64]
    dim: NDArray[np.int64]
    moments: NDArray[np.int64]  # address, as are all that have a length or a fixed one
    moments_length: NDArray[np.int64]
    counts: NDArray[np.int64]
    counts_length: NDArray[np.int64]
    corrections: NDArray[np.int64]
    corrections_length: NDArray[np.int64]
    log_betas: NDArray[np.int64]
    hyperparameters: NDArray[np.int64]
    settings: NDArray[np.int64]
    totals: NDArray[np.int64]
    values: NDArray[np.int64]
    values_rows: NDArray[np.int64]
    values_apart: NDArray[np.int64]  # elements from one row to the next
    coefficients: NDArray[np.int64]
    coefficients_length: NDArray[np.int64]
    block_sums: NDArray[np.int64]


class Compressed(NamedTuple):
    """A gradient in compressed sparse rows, of which none is empty and none holds a column twice."""

    rows: NDArray[Any]  # (rows present,) ascending, int32 or int64, as are indptr and indices
    indptr: NDArray[Any]  # (rows present + 1,)
    indices: NDArray[Any]  # (stored entries,) columns
    data: NDArray[Any]  # (stored entries,) the table's dtype


# --- the formula ------------------------------------------------------------------------------------------


def formula(product: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Make `adam` of a multiplication: a CPU's, or one that a GPU does not fuse with the sum next to it."""

    def adam(p: Any, m: Any, v: Any, g: Any, table: Any, step_size: Any, scale: Any) -> Any:
        """One active step of one element: the new parameter and moments (Kingma & Ba 2015, Algorithm 1).

        ``step_size`` and ``scale`` hold the bias corrections (`Corrections`), and ``step_size`` the learning
        rate, so that one expression serves both places where ε may stand.
        """
        m = product(table.beta1, m) + product(table.one_minus_beta1, g)
        v = product(table.beta2, v) + product(table.one_minus_beta2, product(g, g))
        return p - product(step_size, m / (product(math.sqrt(v), scale) + table.eps)), m, v

    return adam


adam = jit(formula(operator.mul))


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
    """``step_size`` and ``scale`` after k active steps.

    A count is memory that a user can reach, and may hold anything. Compared without its sign, a negative
    number is beyond the table too.
    """
    known = np.int64(min(np.uint64(k), np.uint64(table.last)))
    if known == k or table.complete:
        at = 2 * known
        return load_correction(table.corrections, at), load_correction(table.corrections, at + 1)
    step_size, scale = late_correction(k, table.log_beta1, table.log_beta2, table.eps_hat)
    dtype = table.corrections.dtype.type
    return dtype(step_size), dtype(scale)


@jit
def after(count: Any, most: Any) -> Any:
    """Return the number of the step that follows a count of steps."""
    return np.int64(count) + np.int64(count != most)


@jit
def one_more(table: Any, count: Any, active: Any) -> Any:
    """Return a count after a step, if it is active; it stays at the end of its type."""
    dtype = table.counts.dtype.type
    return dtype(count + dtype(active & (count != table.most)))


@jit
def view(table: Any) -> Any:
    """Take a `Table` apart."""
    count_type = table.counts.dtype.type
    most = count_type(2**31 - 1) if table.counts.itemsize == 4 else count_type(2**63 - 1)
    constants, settings = table.hyperparameters, table.settings
    dim = np.int64(table.param.shape[1])
    moment_stride, count_stride, mode = settings[0], settings[1], settings[2]
    span = min(dim, MAX_ELEMENTS_PREFETCHED)
    together = dim == span and count_stride * table.counts.itemsize == moment_stride * table.moments.itemsize
    # In the order of its fields: numba cannot read a call with so many names.
    return View(
        table.param,
        table.moments,
        table.counts,
        table.corrections,
        np.int64(len(table.corrections) // 2 - 1),
        most,
        table.log_betas[0],
        table.log_betas[1],
        constants[0],
        constants[1],
        constants[2],
        constants[3],
        constants[4],
        constants[5],
        constants[6],
        dim,
        moment_stride,
        count_stride,
        mode,
        settings[3] != 0,
        settings[4] != 0,
        settings[5] != 0,
        after(table.counts[0], most) if mode == GLOBAL else np.int64(0),
        span,
        moment_stride if dim == span else span,
        np.int64(0) if together or mode == GLOBAL else (span if mode == ELEMENT else np.int64(1)),
    )


# --- one row ----------------------------------------------------------------------------------------------


@jit
def counts_agree(table: Any, r: Any) -> bool:
    """Whether all elements of row r have the same count, as they do where gradients are dense; dim > 0."""
    k_at = r * table.count_stride
    k = load_count(table.counts, k_at)
    differing = k ^ k
    for j in range(table.dim):
        differing |= load_count(table.counts, k_at + j) ^ k
    return bool(differing == 0)


@jit
def highest_count(table: Any, r: Any) -> Any:
    """Of the elements of row r, where a negative one is as good as the highest there is; dim > 0."""
    k_at = r * table.count_stride
    highest = load_count(table.counts, k_at)
    signs = highest
    for j in range(table.dim):
        count = load_count(table.counts, k_at + j)
        highest = max(highest, count)
        signs |= count
    return table.most if signs < 0 else highest


@jit
def look_up_corrections(
    table: Any, r: Any, tabulated: Any, scratch: Any, to: Any, start: Any, stop: Any
) -> None:
    """Put step sizes and scales for the next steps of elements start:stop of row r into ``scratch``.

    Those of element j go to ``to + 2 * j``. ``tabulated``: no count was beyond the table of corrections. One
    that has changed since gets the last ones: `correction` says why.
    A loop of its own: gathers inside the one that updates take longer than this (12.5 ms against 11.9 for
    100k rows of dim 64 on two Zen 4 cores).
    """
    k_at = r * table.count_stride
    if tabulated:
        for j in range(start, stop):
            count = load_count(table.counts, k_at + j)
            known = np.int64(min(np.uint64(count), np.uint64(table.last - 1)))
            copy_correction(table.corrections, 2 * known + 2, scratch, to + 2 * j)
        return
    for j in range(start, stop):
        k = one_more(table, load_count(table.counts, k_at + j), True)
        step_size, scale = correction(table, np.int64(k))
        store_row_correction(scratch, to + 2 * j, step_size)
        store_row_correction(scratch, to + 2 * j + 1, scale)


@jit
def update_all(
    table: Any, r: Any, g: Any, at: Any, factor: Any, step_size: Any, scale: Any, start: Any, stop: Any
) -> None:
    """Elements start:stop of row r take a step with ``factor * g``, a row that begins at ``at``."""
    param, moments = table.param, table.moments
    p_at, m_at = r * table.dim, r * table.moment_stride
    v_at = m_at + table.dim
    for j in range(start, stop):
        p, m, v = adam(
            load_param(param, p_at + j),
            load_exp_avg(moments, m_at + j),
            load_exp_avg_sq(moments, v_at + j),
            factor * load_gradient(g, at + j),
            table,
            step_size,
            scale,
        )
        store_param(param, p_at + j, p)
        store_exp_avg(moments, m_at + j, m)
        store_exp_avg_sq(moments, v_at + j, v)


@jit
def update_active(
    table: Any,
    r: Any,
    g: Any,
    at: Any,
    factor: Any,
    k: Any,
    step_size: Any,
    scale: Any,
    start: Any,
    stop: Any,
) -> None:
    """Of the elements start:stop of row r, which all have the count k, those with a gradient take a step.

    Selects instead of branches: an inactive element is written back with the bits that it had, and the loop
    stays vectorized.
    """
    param, moments, counts = table.param, table.moments, table.counts
    p_at, m_at, k_at = r * table.dim, r * table.moment_stride, r * table.count_stride
    v_at = m_at + table.dim
    for j in range(start, stop):
        gradient = factor * load_gradient(g, at + j)
        active = gradient != 0
        p = load_param(param, p_at + j)
        m, v = load_exp_avg(moments, m_at + j), load_exp_avg_sq(moments, v_at + j)
        next_p, next_m, next_v = adam(p, m, v, gradient, table, step_size, scale)
        store_param(param, p_at + j, next_p if active else p)
        store_exp_avg(moments, m_at + j, next_m if active else m)
        store_exp_avg_sq(moments, v_at + j, next_v if active else v)
        store_count(counts, k_at + j, one_more(table, k, active))


@jit
def update_active_each(
    table: Any, r: Any, g: Any, at: Any, factor: Any, scratch: Any, own: Any, start: Any, stop: Any
) -> None:
    """Do what `update_active` does, each element with its own count; see `look_up_corrections`."""
    param, moments, counts = table.param, table.moments, table.counts
    p_at, m_at, k_at = r * table.dim, r * table.moment_stride, r * table.count_stride
    v_at = m_at + table.dim
    for j in range(start, stop):
        gradient = factor * load_gradient(g, at + j)
        active = gradient != 0
        p, k = load_param(param, p_at + j), load_count(counts, k_at + j)
        m, v = load_exp_avg(moments, m_at + j), load_exp_avg_sq(moments, v_at + j)
        step_size = table.lr * load_row_correction(scratch, own + 2 * j)
        scale = load_row_correction(scratch, own + 2 * j + 1)
        next_p, next_m, next_v = adam(p, m, v, gradient, table, step_size, scale)
        store_param(param, p_at + j, next_p if active else p)
        store_exp_avg(moments, m_at + j, next_m if active else m)
        store_exp_avg_sq(moments, v_at + j, next_v if active else v)
        store_count(counts, k_at + j, one_more(table, k, active))


# The three ways to walk along a row, piece by piece, asking for the row ``following`` meanwhile if it is not
# −1: a processor that asks for a whole row at once cannot calculate until all of that is on its way. Three
# loops and not one with branches in it, which took a tenth longer. Of a piece, whose length is known, no loop
# is left.


@jit
def walk_all(table: Any, r: Any, g: Any, at: Any, factor: Any, k: Any, following: Any) -> None:
    """Every element of row r takes its step k."""
    step_size, scale = correction(table, k)
    step_size *= table.lr
    start = np.int64(0)
    if following >= 0:
        while start + PIECE <= table.dim:
            prefetch_piece(table, following, start)
            update_all(table, r, g, at, factor, step_size, scale, start, start + PIECE)
            start += PIECE
        prefetch_rest(table, following, start)
    update_all(table, r, g, at, factor, step_size, scale, start, table.dim)


@jit
def walk_active(table: Any, r: Any, g: Any, at: Any, factor: Any, following: Any) -> None:
    """Every element of row r with a gradient takes a step; all have the count of the first."""
    k = load_count(table.counts, r * table.count_stride)
    step_size, scale = correction(table, np.int64(one_more(table, k, True)))
    step_size *= table.lr
    start = np.int64(0)
    if following >= 0:
        while start + PIECE <= table.dim:
            prefetch_piece(table, following, start)
            update_active(table, r, g, at, factor, k, step_size, scale, start, start + PIECE)
            start += PIECE
        prefetch_rest(table, following, start)
    update_active(table, r, g, at, factor, k, step_size, scale, start, table.dim)


@jit
def walk_active_each(
    table: Any, r: Any, g: Any, at: Any, factor: Any, scratch: Any, own: Any, following: Any
) -> None:
    """Every element of row r with a gradient takes a step of its own count.

    Corrections are looked up a piece ahead: what is written number by number cannot be read as a vector at
    once.
    """
    tabulated = highest_count(table, r) < table.last
    start = np.int64(0)
    if following >= 0 and table.dim >= PIECE:
        look_up_corrections(table, r, tabulated, scratch, own, 0, PIECE)
        while start + PIECE <= table.dim:
            stop = start + PIECE
            prefetch_piece(table, following, start)
            if stop + PIECE <= table.dim:
                look_up_corrections(table, r, tabulated, scratch, own, stop, stop + PIECE)
            else:
                look_up_corrections(table, r, tabulated, scratch, own, stop, table.dim)
            update_active_each(table, r, g, at, factor, scratch, own, start, stop)
            start = stop
        prefetch_rest(table, following, start)
    else:
        look_up_corrections(table, r, tabulated, scratch, own, 0, table.dim)
    update_active_each(table, r, g, at, factor, scratch, own, start, table.dim)


@jit
def update_element(table: Any, r: Any, j: Any, gradient: Any) -> None:
    """One element takes a step of its own count; its gradient is not zero."""
    p_at, k_at = r * table.dim + j, r * table.count_stride + j
    m_at = r * table.moment_stride + j
    v_at = m_at + table.dim
    k = one_more(table, load_count(table.counts, k_at), True)
    step_size, scale = correction(table, np.int64(k))
    p, m, v = adam(
        load_param(table.param, p_at),
        load_exp_avg(table.moments, m_at),
        load_exp_avg_sq(table.moments, v_at),
        gradient,
        table,
        table.lr * step_size,
        scale,
    )
    store_param(table.param, p_at, p)
    store_exp_avg(table.moments, m_at, m)
    store_exp_avg_sq(table.moments, v_at, v)
    store_count(table.counts, k_at, k)


@jit
def apply_row(
    table: Any, r: Any, g: Any, at: Any, factor: Any, scratch: Any, own: Any, following: Any
) -> None:
    """Row r is present in the gradient with ``factor * g``: update what ``step_counts`` calls active.

    ``scratch`` has room for two rows from ``own`` on. The row ``following`` is prefetched, if it is not −1.
    """
    if table.mode == ELEMENT:
        if table.dim == 0:
            return
        if counts_agree(table, r):
            walk_active(table, r, g, at, factor, following)
        else:
            walk_active_each(table, r, g, at, factor, scratch, own, following)
        return
    k = table.global_step
    if table.mode == ROW:
        k_at = r * table.count_stride
        count = one_more(table, load_count(table.counts, k_at), True)
        store_count(table.counts, k_at, count)
        k = np.int64(count)
    walk_all(table, r, g, at, factor, k, following)


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
        Contiguous, of the table's dtype; (1,) for a 1-D table. Not a part of ``table.param`` itself, which
        is written to while this is read: compute it into an array of your own. Duplicates are the caller's:
        each call is a step of the row.

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
        If the gradient has another length than a row, or its elements lie apart.

    Notes
    -----
    The formula, the order of operations and so the bits are those of `SparseAdam.step`: Kingma & Ba 2015,
    Algorithm 1. Nothing is locked: threads that update one row at the same time lose updates, as Hogwild
    accepts (Niu et al. 2011); with rows of their own they are exact. A count stays at the end of its type
    (2³¹ − 1 for int32) instead of overflowing: the corrections have long been 1 there.
    """
    if not 0 <= row < table.param.shape[0]:  # a NaN is no row either
        raise IndexError("apply_row_gradient: no such row, expected 0 <= row < len(table)")
    if len(gradient) != table.param.shape[1]:
        raise ValueError("apply_row_gradient: expected a gradient as long as a row")
    if len(gradient) > 1 and gradient.strides[0] != gradient.itemsize:
        raise ValueError("apply_row_gradient: expected a contiguous gradient, pass .copy() of it")
    r = np.int64(row)
    own = view(table)
    if own.check and poisons(gradient, 0, own.dim, own.sign):
        return False
    if own.mode == ELEMENT:
        if own.dim > 0 and counts_agree(own, r):
            k = load_count(own.counts, r * own.count_stride)
            step_size, scale = correction(own, np.int64(one_more(own, k, True)))
            update_active(own, r, gradient, 0, own.sign, k, own.lr * step_size, scale, 0, own.dim)
            return True
        # Without scratch memory for the corrections of each element: one after the other. `apply_row` would
        # need it, if another thread were to change a count after we have looked.
        for j in range(own.dim):
            if gradient[j] != 0:
                update_element(own, r, j, own.sign * gradient[j])
        return True
    apply_row(own, r, gradient, 0, own.sign, gradient, 0, -1)
    return True


@jit
def poisons(g: Any, at: Any, dim: Any, factor: Any) -> bool:
    """Whether a row ``factor * g``, from ``at`` on, holds a value that is not finite, or whose square is not.

    A square of infinity would stay in exp_avg_sq for ever, and its element would never move again.
    """
    bad = 0
    for j in range(dim):
        gradient = factor * load_gradient(g, at + j)
        bad += not (gradient * gradient < np.inf)
    return bad > 0


@jit
def prefetch(array: Any, at: Any, length: Any) -> None:
    """Ask for each cache line of ``length`` elements, once."""
    first = address(array, at) & -CACHE_LINE
    for line in range(first, address(array, at + length - 1) + 1, CACHE_LINE):
        prefetch_line(line)


@jit
def prefetch_row(table: Any, r: Any) -> None:
    """Ask for the cache lines of row r."""
    m_at = r * table.moment_stride
    prefetch(table.param, r * table.dim, table.param_span)
    prefetch(table.moments, m_at, table.moment_span)
    if table.param_span < table.dim:  # a wide row: the moments have not been asked for as one piece
        prefetch(table.moments, m_at + table.dim, table.param_span)
    if table.count_span > 0:
        prefetch(table.counts, r * table.count_stride, table.count_span)


@jit
def prefetch_piece(table: Any, r: Any, start: Any) -> None:
    """Ask for the lines in which `PIECE` elements of row r begin."""
    p_at, m_at = r * table.dim + start, r * table.moment_stride + start
    k_at = r * table.count_stride + start
    prefetch_line(address(table.param, p_at))
    prefetch_line(address(table.moments, m_at))
    prefetch_line(address(table.moments, m_at + table.dim))
    if table.param.itemsize == 8:
        middle = PIECE // 2
        prefetch_line(address(table.param, p_at + middle))
        prefetch_line(address(table.moments, m_at + middle))
        prefetch_line(address(table.moments, m_at + middle + table.dim))
    if table.mode == ELEMENT:
        prefetch_line(address(table.counts, k_at))


@jit
def prefetch_rest(table: Any, r: Any, start: Any) -> None:
    """Ask for what the pieces of row r before ``start`` have left out: what follows, and a last line."""
    p_at = r * table.dim
    last = address(table.param, p_at + table.dim - 1)
    if last & -CACHE_LINE > address(table.param, p_at + start - PIECE // 2):
        prefetch_line(last)
    if start < table.dim:
        m_at, left = r * table.moment_stride + start, table.dim - start
        prefetch_line(address(table.param, p_at + start))
        prefetch(table.moments, m_at, left)
        prefetch(table.moments, m_at + table.dim, left)
        if table.mode == ELEMENT:
            prefetch(table.counts, r * table.count_stride + start, left)
    if table.mode == ROW and table.count_span > 0:
        prefetch_line(address(table.counts, r * table.count_stride))


@jit
def rows_ahead(dim: Any) -> Any:
    """How many rows ahead of the one being updated are prefetched."""
    return min(max(PREFETCH_ELEMENTS // max(dim, 1), MIN_ROWS_AHEAD), MAX_ROWS_AHEAD)


# --- rows given once each ---------------------------------------------------------------------------------


@jit
def rows_worker(arrays: Any, rows: Any, values: Any, scratch: Any, t: Any, lo: Any, hi: Any) -> Any:
    """Apply ``values[s]`` to row ``rows[s]`` for s in lo:hi; return how many were skipped.

    ``rows`` is the user's memory, and another thread may have changed it since it was checked: each row is
    read once, and left out if the table has none such.
    """
    table = view(arrays)
    dim, most = table.dim, np.uint64(table.param.shape[0])
    own = SCRATCH_ROWS * t * dim
    ahead = rows_ahead(dim)
    skipped = 0
    for s in range(lo, hi):
        following = np.int64(rows[s + ahead]) if s + ahead < hi else np.int64(-1)
        if following >= 0 and dim < PIECE:
            prefetch_row(table, following)
            following = np.int64(-1)
        if table.check and poisons(values, s * dim, dim, table.sign):
            skipped += 1
            continue
        row = np.int64(rows[s])
        if np.uint64(row) < most:
            apply_row(table, row, values, s * dim, table.sign, scratch, own + dim, following)
    return skipped


@jit
def finish(table: Any, skipped: Any) -> None:
    """Settle the counts of a step that has been applied."""
    if table.settings[2] == GLOBAL:
        table.counts[0] += table.counts[0] != table.counts.dtype.type(2**63 - 1)
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
def rows_parallel(
    threads: Any, bounds: Any, skipped: Any, table: Any, rows: Any, values: Any, scratch: Any
) -> None:
    """Apply chunk t, ``bounds[t]:bounds[t + 1]``, for every t, on so many threads."""
    before, mode = swap_threads(threads), float_mode()
    for t in prange(len(bounds) - 1):
        own = swap_float_mode(mode)
        skipped[t] = rows_worker(table, rows, values, scratch, t, bounds[t], bounds[t + 1])
        swap_float_mode(own)
    swap_threads(before)
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
def prefetch_values(g: Any, i: Any) -> None:
    """Ask for the values of an id a few places behind the i-th smallest."""
    later = i + IDS_AHEAD
    if later >= len(g.packed):
        return
    if g.per_id:
        payload = g.packed[later] & g.payload_mask
        prefetch_line(address(g.source, payload))
        prefetch_line(address(g.coefficients, payload))
    if g.values.size >= VALUES_PREFETCHED:
        at, _ = locate(g, later)
        dim = g.block_sums.shape[1]
        prefetch(g.values, at * g.values.shape[1], min(dim, MAX_ELEMENTS_PREFETCHED))


@jit
def sum_ids(g: Any, lo: Any, hi: Any, out: Any, to: Any) -> None:
    """Put the sum over the ids lo:hi, in their order, into a row of ``out``, from ``to`` on.

    Four ids at a time, added one after the other: the sum so far goes through memory a quarter as often. The
    values of the ids that follow, behind hi too, are prefetched meanwhile.
    """
    values = g.values
    dim, apart = g.block_sums.shape[1], values.shape[1]
    prefetch_values(g, lo)
    row, coefficient = locate(g, lo)
    for j in range(dim):
        store_sum(out, to + j, coefficient * load_value(values, row * apart + j))
    i = lo + 1
    while i + 4 <= hi:
        for k in range(i, i + 4):
            prefetch_values(g, k)
        (a, x), (b, y), (c, z), (d, w) = locate(g, i), locate(g, i + 1), locate(g, i + 2), locate(g, i + 3)
        a, b, c, d = a * apart, b * apart, c * apart, d * apart
        for j in range(dim):
            total = load_sum(out, to + j) + x * load_value(values, a + j)
            total = total + y * load_value(values, b + j)
            total = total + z * load_value(values, c + j)
            store_sum(out, to + j, total + w * load_value(values, d + j))
        i += 4
    while i < hi:
        prefetch_values(g, i)
        row, coefficient = locate(g, i)
        for j in range(dim):
            store_sum(out, to + j, load_sum(out, to + j) + coefficient * load_value(values, row * apart + j))
        i += 1


@jit
def block_sums_worker(g: Any, lo: Any, hi: Any) -> None:
    """Sum blocks lo:hi of the long segments into ``g.block_sums``."""
    which = 0
    for b in range(lo, hi):
        while g.long_first[which + 1] <= b:
            which += 1
        s = g.long[which]
        start = np.int64(g.starts[s]) + (b - g.long_first[which]) * BLOCK
        end = min(start + BLOCK, np.int64(g.starts[s + 1]))
        sum_ids(g, start, end, g.block_sums, b * g.block_sums.shape[1])


@jit
def block_sums_serial(bounds: Any, g: Any) -> None:
    """Run `block_sums_worker` chunk by chunk."""
    for t in range(len(bounds) - 1):
        block_sums_worker(g, bounds[t], bounds[t + 1])


@jit(parallel=True)
def block_sums_parallel(threads: Any, bounds: Any, g: Any) -> None:
    """Run `block_sums_worker` on several threads."""
    before, mode = swap_threads(threads), float_mode()
    for t in prange(len(bounds) - 1):
        own = swap_float_mode(mode)
        block_sums_worker(g, bounds[t], bounds[t + 1])
        swap_float_mode(own)
    swap_threads(before)


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
def sum_segment(g: Any, s: Any, which: Any, out: Any, to: Any) -> Any:
    """Put the sum of segment s into ``out``, from ``to`` on.

    ``which`` counts the long segments met, and is returned. The sum of a long segment is that of its blocks'
    sums, in order.
    """
    start, end = np.int64(g.starts[s]), np.int64(g.starts[s + 1])
    if end - start <= BLOCK:
        sum_ids(g, start, end, out, to)
        return which
    sums = g.block_sums
    dim = sums.shape[1]
    first = g.long_first[which]
    for j in range(dim):
        store_sum(out, to + j, sums[first, j])
    for b in range(first + 1, g.long_first[which + 1]):
        for j in range(dim):
            store_sum(out, to + j, load_sum(out, to + j) + load_value(sums, b * dim + j))
    return which + 1


@jit
def segments_worker(arrays: Any, g: Any, scratch: Any, t: Any, lo: Any, hi: Any) -> Any:
    """Apply the segments lo:hi, each row with the sum of its ids; return how many were skipped."""
    table = view(arrays)
    dim, sign = table.dim, table.sign
    own = SCRATCH_ROWS * t * dim
    ahead = rows_ahead(dim)
    skipped = 0
    which = first_long(g, lo)
    for s in range(lo, hi):
        following = np.int64(-1)
        if s + ahead < hi:
            first = np.int64(g.starts[s + ahead])
            following = g.packed[first] >> g.row_shift
            if dim < PIECE:
                prefetch_row(table, following)
                following = np.int64(-1)
        start = np.int64(g.starts[s])
        row = g.packed[start] >> g.row_shift
        if g.starts[s + 1] - start == 1:  # nothing to sum: no copy
            prefetch_values(g, start)
            at, coefficient = locate(g, start)
            at = at * g.values.shape[1]
            if table.check and poisons(g.values, at, dim, coefficient * sign):
                skipped += 1
                continue
            apply_row(table, row, g.values, at, coefficient * sign, scratch, own + dim, following)
            continue
        which = sum_segment(g, s, which, scratch, own)
        if table.check and poisons(scratch, own, dim, sign):
            skipped += 1
            continue
        apply_row(table, row, scratch, own, sign, scratch, own + dim, following)
    return skipped


@jit
def segments_serial(bounds: Any, skipped: Any, table: Any, g: Any, scratch: Any) -> None:
    """Run `segments_worker` chunk by chunk."""
    for t in range(len(bounds) - 1):
        skipped[t] = segments_worker(table, g, scratch, t, bounds[t], bounds[t + 1])
    finish(table, skipped)


@jit(parallel=True)
def segments_parallel(threads: Any, bounds: Any, skipped: Any, table: Any, g: Any, scratch: Any) -> None:
    """Run `segments_worker` on several threads."""
    before, mode = swap_threads(threads), float_mode()
    for t in prange(len(bounds) - 1):
        own = swap_float_mode(mode)
        skipped[t] = segments_worker(table, g, scratch, t, bounds[t], bounds[t + 1])
        swap_float_mode(own)
    swap_threads(before)
    finish(table, skipped)


@jit
def sum_segments(g: Any, out: Any) -> None:
    """``out[s]`` ← the sum of segment s, for every segment."""
    which = 0
    for s in range(len(g.starts) - 1):
        which = sum_segment(g, s, which, out, s * out.shape[1])


@jit
def first_poisoned_row(values: Any) -> Any:
    """The first row with a value that is not finite, or whose square is not; −1 if there is none."""
    for s in range(len(values)):
        if poisons(values, s * values.shape[1], values.shape[1], values.dtype.type(1)):
            return s
    return -1


@jit
def first_poisoned_segment(g: Any, scratch: Any) -> Any:
    """The first segment whose sum, or its square, is not finite; −1 if none is."""
    which = 0
    for s in range(len(g.starts) - 1):
        which = sum_segment(g, s, which, scratch, 0)
        if poisons(scratch, 0, scratch.shape[1], scratch.dtype.type(1)):
            return s
    return -1


# --- compressed sparse rows -------------------------------------------------------------------------------


@jit
def prefetch_element(table: Any, r: Any, j: Any) -> None:
    """Ask for the cache lines of one element."""
    m_at = r * table.moment_stride + j
    prefetch_line(address(table.param, r * table.dim + j))
    prefetch_line(address(table.moments, m_at))
    prefetch_line(address(table.moments, m_at + table.dim))
    prefetch_line(address(table.counts, r * table.count_stride + j))


@jit
def prefetch_entries(table: Any, g: Any, s: Any, start: Any, end: Any) -> Any:
    """Prefetch the entries start:end, the first of them in row s or later; return the last one's row."""
    for e in range(start, end):
        while g.indptr[s + 1] <= e:
            s += 1
        prefetch_element(table, np.int64(g.rows[s]), np.int64(g.indices[e]))
    return s


@jit
def csr_worker(arrays: Any, g: Any, scratch: Any, t: Any, lo: Any, hi: Any) -> Any:
    """Apply the rows lo:hi of a compressed gradient; return how many were skipped.

    ``g.indices`` is the user's memory, and another thread may have changed it since it was checked: each
    column is read once, and left out if the table has none such.
    """
    table = view(arrays)
    indptr, indices, data = g.indptr, g.indices, g.data
    dim, sign, one = table.dim, table.sign, g.data.dtype.type(1)
    own = SCRATCH_ROWS * t * dim
    ahead = rows_ahead(dim)
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
            prefetch_row(table, np.int64(g.rows[s + ahead]))
        if table.check and poisons(data, start, end - start, one):
            skipped += 1
            continue
        r = np.int64(g.rows[s])
        if table.mode == ELEMENT:
            for e in range(start, end):
                column, value = np.int64(indices[e]), data[e]
                if value != 0 and np.uint64(column) < np.uint64(dim):
                    update_element(table, r, column, sign * value)
            continue
        for j in range(dim):
            store_sum(scratch, own + j, scratch.dtype.type(0))
        for e in range(start, end):
            column = np.int64(indices[e])
            if np.uint64(column) < np.uint64(dim):
                store_sum(scratch, own + column, data[e])
        apply_row(table, r, scratch, own, sign, scratch, own + dim, -1)
    return skipped


@jit
def csr_serial(bounds: Any, skipped: Any, table: Any, g: Any, scratch: Any) -> None:
    """Run `csr_worker` chunk by chunk."""
    for t in range(len(bounds) - 1):
        skipped[t] = csr_worker(table, g, scratch, t, bounds[t], bounds[t + 1])
    finish(table, skipped)


@jit(parallel=True)
def csr_parallel(threads: Any, bounds: Any, skipped: Any, table: Any, g: Any, scratch: Any) -> None:
    """Run `csr_worker` on several threads."""
    before, mode = swap_threads(threads), float_mode()
    for t in prange(len(bounds) - 1):
        own = swap_float_mode(mode)
        skipped[t] = csr_worker(table, g, scratch, t, bounds[t], bounds[t + 1])
        swap_float_mode(own)
    swap_threads(before)
    finish(table, skipped)


# --- several tables at once -------------------------------------------------------------------------------


@jit
def table_of(batch: Any, i: Any, like: Any) -> Any:
    """Return table i of a batch; ``like`` is a `Table` with the same dtypes."""
    return Table(
        matrix_at(batch.param[i], batch.rows[i], batch.dim[i], like.param),
        array_at(batch.moments[i], batch.moments_length[i], like.moments),
        array_at(batch.counts[i], batch.counts_length[i], like.counts),
        array_at(batch.corrections[i], batch.corrections_length[i], like.corrections),
        array_at(batch.log_betas[i], 2, like.log_betas),
        array_at(batch.hyperparameters[i], len(like.hyperparameters), like.hyperparameters),
        array_at(batch.settings[i], len(like.settings), like.settings),
        array_at(batch.totals[i], 2, like.totals),
    )


@jit
def segments_of(
    batch: Any, ids: Any, i: Any, memory: Any, long: Any, long_first: Any, starts: Any, values: Any
) -> Any:
    """Return the grouped gradient of table i of a batch; ``starts`` and ``values`` are of the dtypes."""
    n, places, dim = ids.n[i], memory.shape[1], batch.dim[i]
    packed = address(memory, ids.half[i] * places + ids.first[i])
    other = address(memory, (1 - ids.half[i]) * places + ids.first[i])
    return Segments(
        array_at(packed, n, memory),
        array_at(other, ids.segments[i] + 1, starts),
        ids.row_shift[i],
        (1 << ids.row_shift[i]) - 1,
        matrix_at(batch.values[i], batch.values_rows[i], batch.values_apart[i], values),
        array_at(other + 4 * (n + 1), n if ids.per_id[i] else 0, starts),
        array_at(batch.coefficients[i], batch.coefficients_length[i], values),
        ids.per_id[i] != 0,
        array_at(address(long, ids.first_long[i]), ids.long[i], long),
        array_at(address(long_first, ids.first_long[i] + i), ids.long[i] + 1, long_first),
        matrix_at(batch.block_sums[i], ids.blocks[i], dim, values),
    )


@jit
def tables_worker(
    turns: Any, order: Any, batch: Any, ids: Any, memory: Any, long: Any, long_first: Any, scratch: Any,
    nothing: Any, t: Any, starts: Any, like: Any,
) -> None:  # fmt: skip
    """Update tables, in turn with the other threads, until there are none left; skip no row."""
    turn = take_turn(turns)
    while turn < len(order):
        i = order[turn]
        table = table_of(batch, i, like)
        g = segments_of(batch, ids, i, memory, long, long_first, starts, like.param)
        block_sums_worker(g, 0, ids.blocks[i])
        segments_worker(table, g, scratch, t, 0, ids.segments[i])
        finish(table, nothing)
        turn = take_turn(turns)


@jit
def tables_serial(
    turns: Any, order: Any, batch: Any, ids: Any, memory: Any, long: Any, long_first: Any, scratch: Any,
    nothing: Any, starts: Any, like: Any,
) -> None:  # fmt: skip
    """Run `tables_worker` on one thread."""
    tables_worker(turns, order, batch, ids, memory, long, long_first, scratch, nothing, 0, starts, like)


@jit(parallel=True)
def tables_parallel(
    threads: Any, turns: Any, order: Any, batch: Any, ids: Any, memory: Any, long: Any, long_first: Any,
    scratch: Any, nothing: Any, starts: Any, like: Any,
) -> None:  # fmt: skip
    """Run `tables_worker` on so many threads; each of them has its part of ``scratch``."""
    before, mode = swap_threads(threads), float_mode()
    for t in prange(len(scratch) // SCRATCH_ROWS):
        own = swap_float_mode(mode)
        tables_worker(turns, order, batch, ids, memory, long, long_first, scratch, nothing, t, starts, like)
        swap_float_mode(own)
    swap_threads(before)
