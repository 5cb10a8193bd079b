"""The formula on a GPU, and the loops that apply it.

`adam` and `late_correction` are those of `nb_sparse_adam.engine.kernels`, compiled for the device. What is
around them is not: on a CPU a thread walks along a row; here the lanes of a group, ``threadIdx.x``, take the
elements of a row side by side, and groups, ``threadIdx.y``, take rows in turn, each its own. Neither sums nor
updates need atomic operations, and no result depends on scheduling.

A CPU rounds each product and each sum; `product` makes a GPU do so, and sums are made in a CPU's order.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, int64

from nb_sparse_adam.cuda.device import device_function, kernel, load_piece, product, store_piece
from nb_sparse_adam.cuda.layout import (
    AT_SUM,
    BLOCKS_DONE,
    DONE,
    GOT_IDS,
    GOT_ROW,
    NOWHERE,
    PER_ID,
    PER_ROW,
    PRESENT,
    REPEATS,
    SEGMENTS,
    SKIPPED,
    SUSPICIOUS,
)
from nb_sparse_adam.engine.kernels import BLOCK, ELEMENT, GLOBAL, ROW, formula, late_correction

__all__ = ["Kernels", "kernels_for", "settle_sums"]

adam = device_function(formula(product))
late = device_function(getattr(late_correction, "py_func", late_correction))


@device_function
def _in_order(g: Any) -> Any:
    """Whether each id is a segment of its own, as it is."""
    return g.info[REPEATS] == 0 and g.whole == 0


@device_function
def _units(g: Any) -> Any:
    """How many segments there are."""
    return int64(g.ids.shape[0]) if _in_order(g) else g.info[SEGMENTS]


@device_function
def _row(g: Any, s: Any) -> Any:
    """The row of segment s; of entries, row * dim + column."""
    return int64(g.ids[s]) if _in_order(g) else g.packed[g.starts[s]] >> g.row_shift


@device_function
def _slot(start: Any, x: Any) -> Any:
    """Where the sum of the block that begins at place x is kept, of a long segment that begins at ``start``.

    Among `BLOCK` places there begin two blocks at most: one of a segment that has begun before, and the first
    one of another, for segments with blocks are longer than a block.
    """
    window = x // BLOCK
    return 2 * window + (1 if start >= window * BLOCK else 0)


@device_function
def _last_start(starts: Any, segments: Any, place: Any) -> Any:
    """The last segment that begins before a place; −1 if none does."""
    low, high = int64(-1), int64(segments)
    while low + 1 < high:
        middle = (low + high) // 2
        if starts[middle] < place:
            low = middle
        else:
            high = middle
    return low


@kernel
def settle_sums(guard: Any, g: Any, number: Any) -> None:
    """Refuse the step if a sum overflows, and note of which row."""
    if cuda.blockIdx.x != 0 or cuda.threadIdx.x != 0 or guard[0] != 0:
        return
    at = g.info[AT_SUM]
    if at != NOWHERE:
        g.info[GOT_ROW] = _row(g, at)
        g.info[GOT_IDS] = 1 if _in_order(g) else g.starts[at + 1] - g.starts[at]
        guard[0] = number


class Kernels(NamedTuple):
    """The kernels of one kind of table."""

    sum_blocks: Any
    poison_rows: Any
    update_in_order: Any
    update_segments: Any
    poison_entries: Any
    update_entries: Any


@cache
def kernels_for(mode: int, dtype: np.dtype[Any], width: int, complete: bool) -> Kernels:  # noqa: C901 (of all functions in it)
    """Make the kernels of one kind of table.

    Parameters
    ----------
    mode : int
        ELEMENT, ROW or GLOBAL.
    dtype : dtype
        Of the table.
    width : int
        How many elements of a row a lane takes at once: 1, or as many as 16 bytes are where rows lie on
        multiples of 16 bytes.
    complete : bool
        Whether all corrections are tabulated; what computes them takes registers.

    Returns
    -------
    Kernels
    """
    real = np.float32 if dtype.itemsize == 4 else np.float64
    load, store = load_piece(width), store_piece(width)

    @device_function
    def correction(table: Any, k: Any) -> Any:
        """``step_size`` and ``scale`` after k active steps; of a negative k, as a CPU has them."""
        known = table.last if k < 0 else min(k, table.last)
        if complete or k == known:
            at = 2 * known
            return table.corrections[at], table.corrections[at + 1]
        step_size, scale = late(k, table.log_beta1, table.log_beta2, table.eps_hat != 0)
        return real(step_size), real(scale)

    @device_function
    def one_more(table: Any, count: Any) -> Any:
        """Return a count after a step: it stays at the end of its type instead of overflowing."""
        return count + 1 if count < table.most else count

    @device_function
    def row_or_none(table: Any, row: Any) -> Any:
        """Return a row, or −1 if the table has none such: ids may have changed since they were checked."""
        return row if 0 <= row < table.rows else int64(-1)

    @device_function
    def add_term(g: Any, i: Any, j: Any, first: Any, total: Any, piece: Any) -> None:
        """Add to ``total`` what the i-th smallest id brings to elements j, j + 1, ...; or put it there."""
        payload = g.packed[i] & g.payload_mask
        row, coefficient = payload, real(1)
        if g.kind == PER_ID:
            row, coefficient = int64(g.bag_of[payload]), g.coefficients[payload]
        elif g.kind == PER_ROW:
            coefficient = g.coefficients[payload]
        load(g.values, row * g.apart + j, piece)
        for w in range(width):
            term = product(coefficient, piece[w])
            total[w] = term if first else total[w] + term

    @device_function
    def sum_ids(g: Any, low: Any, high: Any, j: Any, total: Any) -> None:
        """``total`` ← the sum over the ids low:high, in their order.

        Four at a time are loaded before they are added: that many are on their way at once.
        """
        a = cuda.local.array(width, real)
        add_term(g, low, j, True, total, a)
        i = low + 1
        while i + 4 <= high:
            a = cuda.local.array(width, real)
            b = cuda.local.array(width, real)
            c = cuda.local.array(width, real)
            d = cuda.local.array(width, real)
            zero = cuda.local.array(width, real)
            add_term(g, i, j, True, a, zero)
            add_term(g, i + 1, j, True, b, zero)
            add_term(g, i + 2, j, True, c, zero)
            add_term(g, i + 3, j, True, d, zero)
            for w in range(width):
                total[w] = total[w] + a[w]
                total[w] = total[w] + b[w]
                total[w] = total[w] + c[w]
                total[w] = total[w] + d[w]
            i += 4
        while i < high:
            add_term(g, i, j, False, total, a)
            i += 1

    @device_function
    def sum_segment(g: Any, dim: Any, s: Any, j: Any, total: Any) -> None:
        """``total`` ← the elements j, j + 1, ... of the sum of segment s."""
        start, end = int64(g.starts[s]), int64(g.starts[s + 1])
        if end - start <= BLOCK:
            sum_ids(g, start, end, j, total)
            return
        load(g.block_sums, _slot(start, start) * dim + j, total)
        a = cuda.local.array(width, real)
        x = start + BLOCK
        while x < end:
            load(g.block_sums, _slot(start, x) * dim + j, a)
            for w in range(width):
                total[w] = total[w] + a[w]
            x += BLOCK

    @device_function
    def gradient(g: Any, dim: Any, s: Any, j: Any, total: Any) -> None:
        """Do the same, or take the values of an id as they are."""
        if _in_order(g):
            load(g.values, s * g.apart + j, total)
        else:
            sum_segment(g, dim, s, j, total)

    @kernel
    def sum_blocks(guard: Any, g: Any, dim: Any) -> None:
        """Sum the blocks of long segments, each by a group of its own."""
        if guard[0] != 0 or _in_order(g):
            return
        total = cuda.local.array(width, real)
        segments = g.info[SEGMENTS]
        slots = g.block_sums.shape[0] // dim
        group = int64(cuda.blockIdx.x) * cuda.blockDim.y + cuda.threadIdx.y
        for slot in range(group, slots, int64(cuda.gridDim.x) * cuda.blockDim.y):
            window = slot // 2
            if slot % 2 == 1:  # the segment that begins last in this window
                s = _last_start(g.starts, segments, (window + 1) * BLOCK)
            else:  # the one that has begun before it
                s = _last_start(g.starts, segments, window * BLOCK)
            if s < 0:
                continue
            start, end = int64(g.starts[s]), int64(g.starts[s + 1])
            if end - start <= BLOCK:
                continue
            if slot % 2 == 1:
                if start < window * BLOCK:
                    continue
                x = start
            else:
                x = start + (window * BLOCK - start + BLOCK - 1) // BLOCK * BLOCK
                if x >= end:
                    continue
            for j in range(cuda.threadIdx.x * width, dim, cuda.blockDim.x * width):
                sum_ids(g, x, min(x + BLOCK, end), j, total)
                store(g.block_sums, slot * dim + j, total)

    @device_function
    def poisons(total: Any) -> Any:
        """Whether a value is not finite, or its square is not."""
        bad = False
        for w in range(width):
            bad = bad or not product(total[w], total[w]) < math.inf
        return bad

    @kernel
    def poison_rows(guard: Any, g: Any, dim: Any, raising: Any) -> None:
        """Find the rows whose sums overflow, or are not finite: the first one, or all to be skipped."""
        if guard[0] != 0 or g.info[SUSPICIOUS] == 0:
            return
        total = cuda.local.array(width, real)
        units = _units(g)
        step = int64(cuda.gridDim.x) * cuda.blockDim.y
        for base in range(int64(cuda.blockIdx.x) * cuda.blockDim.y, units, step):
            s = base + cuda.threadIdx.y
            if s < units and cuda.threadIdx.x == 0:
                g.bad[s] = 0
            cuda.syncthreads()
            if s < units:
                for j in range(cuda.threadIdx.x * width, dim, cuda.blockDim.x * width):
                    gradient(g, dim, s, j, total)
                    if poisons(total):
                        if raising != 0:
                            cuda.atomic.min(g.info, AT_SUM, s)
                        g.bad[s] = 1

    @device_function
    def is_skipped(g: Any, s: Any, skipping: Any) -> Any:
        """Whether row s of the gradient is to be left out; counted by one lane of its group."""
        if skipping == 0 or g.info[SUSPICIOUS] == 0 or g.bad[s] == 0:
            return False
        if cuda.threadIdx.x == 0:
            cuda.atomic.add(g.info, SKIPPED, 1)
        return True

    @device_function
    def finish(table: Any, g: Any, goal: Any) -> None:
        """Let the block that is the last to finish note that the step is done."""
        cuda.syncthreads()
        cuda.threadfence()
        if cuda.threadIdx.x != 0 or cuda.threadIdx.y != 0:
            return
        if cuda.atomic.add(g.info, BLOCKS_DONE, 1) == cuda.gridDim.x - 1:
            if mode == GLOBAL:
                table.counts[0] = one_more(table, int64(table.counts[0]))
            g.info[BLOCKS_DONE] = 0
            g.info[DONE] = goal

    @device_function
    def take_steps(table: Any, row: Any, j: Any, grads: Any, k: Any) -> None:
        """The elements j, j + 1, ... of a row take a step, those that are active; k for all, or their own."""
        p, m, v = (
            cuda.local.array(width, real),
            cuda.local.array(width, real),
            cuda.local.array(width, real),
        )
        p_at = row * table.dim + j
        m_at = 2 * row * table.dim + j
        load(table.param, p_at, p)
        load(table.moments, m_at, m)
        load(table.moments, m_at + table.dim, v)
        if mode == ELEMENT:
            for w in range(width):
                g = table.sign * grads[w]
                if g != 0:
                    count = one_more(table, int64(table.counts[p_at + w]))
                    step_size, scale = correction(table, count)
                    p[w], m[w], v[w] = adam(p[w], m[w], v[w], g, table, table.lr * step_size, scale)
                    table.counts[p_at + w] = count
        else:
            step_size, scale = correction(table, k)
            step_size = table.lr * step_size
            for w in range(width):
                p[w], m[w], v[w] = adam(p[w], m[w], v[w], table.sign * grads[w], table, step_size, scale)
        store(table.param, p_at, p)
        store(table.moments, m_at, m)
        store(table.moments, m_at + table.dim, v)

    @device_function
    def next_count(table: Any, row: Any, k: Any) -> Any:
        """Count a step of a row, where rows have counts, and return its number, else k; −1: no row."""
        if mode == ROW:
            if row >= 0:
                k = one_more(table, int64(table.counts[row]))
            cuda.syncthreads()  # all lanes have read the count before one of them writes it
            if row >= 0 and cuda.threadIdx.x == 0:
                table.counts[row] = k
        return k

    def make_update(in_order: bool) -> Any:
        """Make the kernel for ids that increase, or for segments.

        Two kernels, of which one finds nothing to do: the first needs fewer registers, so that more of its
        blocks run at a time.
        """

        @kernel
        def update_rows(guard: Any, goal: Any, table: Any, g: Any, skipping: Any) -> None:
            """Apply a gradient of rows, once: if it is launched again for the same step, it does nothing."""
            if guard[0] != 0 or g.info[DONE] == goal or _in_order(g) != in_order:
                return
            total = cuda.local.array(width, real)
            units = int64(g.ids.shape[0]) if in_order else g.info[SEGMENTS]
            step = int64(cuda.gridDim.x) * cuda.blockDim.y
            k = int64(0)
            if mode == GLOBAL:
                k = one_more(table, int64(table.counts[0]))
            for base in range(int64(cuda.blockIdx.x) * cuda.blockDim.y, units, step):
                s = base + cuda.threadIdx.y
                row = int64(-1)
                if s < units and not is_skipped(g, s, skipping):
                    row = int64(g.ids[s]) if in_order else g.packed[g.starts[s]] >> g.row_shift
                    row = row_or_none(table, row)
                k = next_count(table, row, k)
                if row >= 0:
                    for j in range(cuda.threadIdx.x * width, table.dim, cuda.blockDim.x * width):
                        if in_order:
                            load(g.values, s * g.apart + j, total)
                        else:
                            sum_segment(g, table.dim, s, j, total)
                        take_steps(table, row, j, total, k)
            finish(table, g, goal)

        return update_rows

    # --- entries: compressed rows, as a table of one element a row --------------------------------------

    @kernel
    def poison_entries(guard: Any, g: Any, raising: Any) -> None:
        """Do what `poison_rows` does, for rows of entries."""
        if guard[0] != 0 or g.info[SUSPICIOUS] == 0:
            return
        total = cuda.local.array(width, real)
        units = g.info[PRESENT]
        step = int64(cuda.gridDim.x) * cuda.blockDim.y
        for base in range(int64(cuda.blockIdx.x) * cuda.blockDim.y, units, step):
            s = base + cuda.threadIdx.y
            if s < units and cuda.threadIdx.x == 0:
                g.bad[s] = 0
            cuda.syncthreads()
            if s < units:
                for e in range(g.row_starts[s] + cuda.threadIdx.x, g.row_starts[s + 1], cuda.blockDim.x):
                    gradient(g, 1, e, 0, total)
                    if poisons(total):
                        if raising != 0:
                            cuda.atomic.min(g.info, AT_SUM, e)
                        g.bad[s] = 1

    @device_function
    def entry_of(g: Any, key: Any, low: Any, high: Any) -> Any:
        """The first of the entries low:high whose key is no smaller; high if there is none."""
        while low < high:
            middle = (low + high) // 2
            if _row(g, middle) < key:
                low = middle + 1
            else:
                high = middle
        return low

    @kernel
    def update_entries(guard: Any, goal: Any, table: Any, g: Any, skipping: Any) -> None:
        """Apply a gradient of entries, once."""
        if guard[0] != 0 or g.info[DONE] == goal:
            return
        total = cuda.local.array(width, real)
        units = g.info[PRESENT]
        step = int64(cuda.gridDim.x) * cuda.blockDim.y
        k = int64(0)
        if mode == GLOBAL:
            k = one_more(table, int64(table.counts[0]))
        for base in range(int64(cuda.blockIdx.x) * cuda.blockDim.y, units, step):
            s = base + cuda.threadIdx.y
            row = int64(-1)
            if s < units and not is_skipped(g, s, skipping):
                row = row_or_none(table, _row(g, int64(g.row_starts[s])) // table.dim)
            k = next_count(table, row, k)
            if row >= 0:
                low, high = int64(g.row_starts[s]), int64(g.row_starts[s + 1])
                if mode == ELEMENT:
                    for e in range(low + cuda.threadIdx.x, high, cuda.blockDim.x):
                        gradient(g, 1, e, 0, total)
                        take_steps(table, row, _row(g, e) - row * table.dim, total, k)
                else:
                    for j in range(cuda.threadIdx.x, table.dim, cuda.blockDim.x):
                        key = row * table.dim + j
                        e = entry_of(g, key, low, high)
                        total[0] = 0
                        if e < high and _row(g, e) == key:
                            gradient(g, 1, e, 0, total)
                        take_steps(table, row, j, total, k)
        finish(table, g, goal)

    return Kernels(
        sum_blocks, poison_rows, make_update(True), make_update(False), poison_entries, update_entries
    )
