# SPDX-License-Identifier: Apache-2.0
"""Sums of the gradients of one row, on a GPU, in the order of a CPU's; and which of them are not finite."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import int64, uint64

from nb_sparse_adam._src.cuda.checks import note
from nb_sparse_adam._src.cuda.device import (
    arrays_at,
    device_function,
    gpu,
    kernel,
    load_piece,
    product,
    store_piece,
)
from nb_sparse_adam._src.cuda.opening import (
    bytes_at,
    find_packed,
    last_not_above,
    lists_of,
    longs_at,
    shorts_at,
    sorted_ids,
    steps_at,
    variants_at,
)
from nb_sparse_adam._src.cuda.records import rank_of
from nb_sparse_adam._src.engine.records import OVERFLOW, PROPAGATE, RAISE, SKIP
from nb_sparse_adam._src.engine.scratch import BLOCK

SUM_RANK = rank_of(OVERFLOW)


class Work(NamedTuple):
    """What the gradients of a variant have in common."""

    packed: Any  # (capacity,) int64, sorted
    starts: Any  # (capacity + 1,) int32: where segments begin
    row_starts: Any  # entries: (entries + 1,) int32, the first segment of each row
    first_id: Any  # the first packed id of the variant
    block_sums: Any  # address of (blocks, block_dim)
    blocks: Any
    block_dim: Any


class Terms(NamedTuple):
    """A gradient, as sums are made of it."""

    values: Any  # address of rows of values, ``stride`` elements from one to the next
    values_length: Any
    stride: Any
    values_rows: Any
    weights: Any  # address of (n,), or 0
    reciprocals: Any  # address of (values_rows,), or 0
    bag_of: Any  # address of (n,) int32: the row of values of each id, where there are weights
    n: Any
    dim: Any
    payload_mask: Any


@device_function
def open_work(step: Any, variant: Any, spans: Any) -> Any:
    """Take the records of a variant apart."""
    capacity = step["capacity"]
    return Work(
        longs_at(sorted_ids(step), capacity), shorts_at(step["starts"], capacity + 1),
        shorts_at(step["row_starts"], step["entries"] + 1),
        spans[uint64(variant["first"])]["first_packed"],
        variant["block_sums"], variant["blocks"], variant["block_dim"],
    )  # fmt: skip


def first_head(heads: str) -> Any:
    """Make ``first(step, spans, i)``: the first of gradient i, or the end of the last of the one before.

    The first of what ``step[heads]`` numbers: segments, or rows of entries.
    """

    @device_function
    def first(step: Any, spans: Any, i: Any) -> Any:
        numbers = shorts_at(step[heads], step["tiles_capacity"] + 1)
        return int64(numbers[uint64(spans[uint64(i)]["first_tile"])])

    return first


first_segment, first_row = first_head("heads"), first_head("row_heads")


@device_function
def open_terms(gradient: Any, found: Any) -> Any:
    """Take the records of a gradient apart."""
    rows, stride, dim = gradient["values_rows"], gradient["values_stride"], gradient["values_dim"]
    return Terms(
        gradient["values"], max(rows - 1, int64(0)) * stride + dim, stride, rows,
        gradient["weights"], found["reciprocals"], found["bag_of"], gradient["ids_length"], dim,
        (int64(1) << found["row_shift"]) - 1,
    )  # fmt: skip


@device_function
def ids_in_order(spans: Any, i: Any) -> Any:
    """How many ids the gradients before gradient i have that need no grouping."""
    return spans[uint64(i)]["first_id"] - spans[uint64(i)]["first_packed"]


find_in_order = last_not_above(ids_in_order)


class Unit(NamedTuple):
    """What is updated at once: an id that needs no grouping, a segment, or a row of entries."""

    i: Any  # its gradient
    first: Any  # the place of the id in the gradient; the segment; the first segment of the row
    end: Any  # of a row of entries, the segment behind its last
    number: Any  # in ``step["bad"]``


@device_function
def unit_in_order(spans: Any, variant: Any, u: Any) -> Any:
    """Return the unit that is number u of the ids that need no grouping."""
    i = uint64(find_in_order(spans, variant["first"], variant["last"], u))
    place = u - ids_in_order(spans, i)
    return Unit(i, place, place + 1, spans[i]["first_id"] + place)


@device_function
def key_of(work: Any, found: Any, s: Any) -> Any:
    """The row of segment s; of entries, row * dim + column."""
    return work.packed[uint64(work.starts[uint64(s)])] >> found["row_shift"]


@device_function
def is_skipped(step: Any, gradient: Any, found: Any, unit: Any) -> Any:
    """Whether a unit, numbered as in ``step["bad"]``, is to be left out."""
    if gradient["on_nonfinite"] != SKIP or found["suspicious"] == 0:
        return False
    return bytes_at(step["bad"], 2 * step["capacity"])[uint64(unit)] != 0


@device_function
def _slot(work: Any, start: Any, x: Any) -> Any:
    """Where the sum of the block that begins at place x is kept, of a long segment that begins at ``start``.

    Among `BLOCK` places there begin two blocks at most: one of a segment that has begun before, and the first
    one of another, for segments with blocks are longer than a block.
    """
    window = (x - work.first_id) // BLOCK
    return 2 * window + (1 if start - work.first_id >= window * BLOCK else 0)


@device_function
def _start_of(work: Any, s: Any) -> Any:
    """Where segment s begins."""
    return work.starts[uint64(s)]


_last_start = last_not_above(_start_of)


class Sums(NamedTuple):
    """Functions for gradients of one dtype."""

    sum_segment: Any
    unit_grouped: Any
    first_unit: Any  # `first_segment` or `first_row`
    sum_blocks: Any  # kernel
    find_bad: Any  # kernel


@cache
def sums_for(dtype: np.dtype[Any], width: int, entries: bool) -> Sums:  # noqa: C901 (of all functions in it)
    """Make what sums gradients of one dtype.

    Parameters
    ----------
    dtype : dtype
        Of the values.
    width : int
        How many elements of a row a lane takes at once: 1, or as many as 16 bytes are where rows lie on
        multiples of 16 bytes.
    entries : bool
        Whether they are entries of compressed rows, else rows.
    """
    real = dtype.type
    reals_at, load, store = arrays_at(dtype), load_piece(width), store_piece(width)
    first_unit = first_row if entries else first_segment

    @device_function
    def unit_grouped(step: Any, work: Any, spans: Any, variant: Any, u: Any) -> Any:
        """Return the unit that is segment u, or row u of entries."""
        s, end = int64(u), int64(u) + 1
        if entries:
            s, end = int64(work.row_starts[uint64(s)]), int64(work.row_starts[uint64(end)])
        i = find_packed(spans, variant["first"], variant["last"], work.starts[uint64(s)])
        return Unit(i, s, end, step["capacity"] + u)

    @device_function
    def add_term(work: Any, g: Any, i: Any, j: Any, first: Any, total: Any, piece: Any) -> None:
        """Add to ``total`` what the i-th packed id brings to elements j, j + 1, ...; or put it there."""
        payload = work.packed[uint64(i)] & g.payload_mask
        row, place, coefficient = payload, uint64(payload), real(1)
        if g.weights != 0:
            row, coefficient = int64(shorts_at(g.bag_of, g.n)[place]), reals_at(g.weights, g.n)[place]
        elif g.reciprocals != 0:
            coefficient = reals_at(g.reciprocals, g.values_rows)[place]
        load(reals_at(g.values, g.values_length), row * g.stride + j, piece)
        for w in range(width):
            term = product(coefficient, piece[w])
            total[w] = term if first else total[w] + term

    @device_function
    def sum_ids(work: Any, g: Any, low: Any, high: Any, j: Any, total: Any) -> None:
        """``total`` ← the sum over the packed ids low:high, in their order.

        Four at a time are loaded before they are added: that many are on their way at once.
        """
        piece = gpu.local.array(width, real)
        add_term(work, g, low, j, True, total, piece)
        i = low + 1
        while i + 4 <= high:
            a = gpu.local.array(width, real)
            b = gpu.local.array(width, real)
            c = gpu.local.array(width, real)
            d = gpu.local.array(width, real)
            zero = gpu.local.array(width, real)
            add_term(work, g, i, j, True, a, zero)
            add_term(work, g, i + 1, j, True, b, zero)
            add_term(work, g, i + 2, j, True, c, zero)
            add_term(work, g, i + 3, j, True, d, zero)
            for w in range(width):
                total[w] = total[w] + a[w]
                total[w] = total[w] + b[w]
                total[w] = total[w] + c[w]
                total[w] = total[w] + d[w]
            i += 4
        while i < high:
            add_term(work, g, i, j, False, total, piece)
            i += 1

    @device_function
    def sum_segment(work: Any, g: Any, s: Any, j: Any, total: Any) -> None:
        """``total`` ← the elements j, j + 1, ... of the sum of segment s."""
        start, end = int64(work.starts[uint64(s)]), int64(work.starts[uint64(s + 1)])
        if end - start <= BLOCK:
            sum_ids(work, g, start, end, j, total)
            return
        sums = reals_at(work.block_sums, work.blocks * work.block_dim)
        load(sums, _slot(work, start, start) * work.block_dim + j, total)
        a = gpu.local.array(width, real)
        x = start + BLOCK
        while x < end:
            load(sums, _slot(work, start, x) * work.block_dim + j, a)
            for w in range(width):
                total[w] = total[w] + a[w]
            x += BLOCK

    @kernel
    def sum_blocks(at: Any, v: Any) -> None:
        """Sum the blocks of long segments, each by a group of its own."""
        step = steps_at(at, int64(1))[0]
        if step["refused"] != 0:
            return
        total = gpu.local.array(width, real)
        _, gradients, found, spans = lists_of(step)
        variant = variants_at(step["variants"], v + 1)[v]
        work = open_work(step, variant, spans)
        sums = reals_at(work.block_sums, work.blocks * work.block_dim)
        low = first_segment(step, spans, variant["first"])
        high = first_segment(step, spans, variant["last"])
        group = int64(gpu.blockIdx.x) * gpu.blockDim.y + gpu.threadIdx.y
        for slot in range(group, work.blocks, int64(gpu.gridDim.x) * gpu.blockDim.y):
            begin = work.first_id + slot // 2 * BLOCK  # of a window
            # The segment that begins last in this window, or the one that has begun before it.
            s = _last_start(work, low - 1, high, (begin + BLOCK if slot % 2 == 1 else begin) - 1)
            if s < low:
                continue
            start, end = int64(work.starts[uint64(s)]), int64(work.starts[uint64(s + 1)])
            if end - start <= BLOCK:
                continue
            x = start
            if slot % 2 == 0:
                x += (begin - start + BLOCK - 1) // BLOCK * BLOCK
            elif start < begin:
                continue
            if x >= end:
                continue
            i = find_packed(spans, variant["first"], variant["last"], start)
            g = open_terms(gradients[i], found[i])
            j = int64(gpu.threadIdx.x) * width
            while j < g.dim:
                sum_ids(work, g, x, min(x + BLOCK, end), j, total)
                store(sums, slot * work.block_dim + j, total)
                j += gpu.blockDim.x * width

    @device_function
    def is_nonfinite(total: Any) -> Any:
        """Whether a number is not finite, or its square is not."""
        bad = False
        for w in range(width):
            bad = bad or not product(total[w], total[w]) < math.inf
        return bad

    @device_function
    def note_bad(step: Any, spans: Any, gradient: Any, unit: Any, x: Any, is_grouped: Any) -> None:
        """Note that a unit, or its entry x, is bad: to be told where in the gradient, or to be skipped."""
        if gradient["on_nonfinite"] == RAISE:
            place = unit.first + x if entries else unit.first
            if is_grouped:
                place -= first_segment(step, spans, unit.i)
            note(spans, unit.i, SUM_RANK, place)
        bytes_at(step["bad"], 2 * step["capacity"])[uint64(unit.number)] = 1

    def look_for(in_order: bool) -> Any:
        """Make ``look(step, variant, spans)``: find the bad ones of ids in order, or of grouped ones."""

        @device_function
        def look(step: Any, variant: Any, spans: Any) -> None:
            work = open_work(step, variant, spans)
            if in_order:
                begin, end = ids_in_order(spans, variant["first"]), ids_in_order(spans, variant["last"])
            else:
                begin = first_unit(step, spans, variant["first"])
                end = first_unit(step, spans, variant["last"])
            total = gpu.local.array(width, real)
            base = begin + int64(gpu.blockIdx.x) * gpu.blockDim.y
            while base < end:
                _, gradients, found, spans = lists_of(step)  # again: registers are scarce
                mine = base + gpu.threadIdx.y
                base += int64(gpu.gridDim.x) * gpu.blockDim.y
                u = min(mine, end - 1)  # see `kernels.update`
                if in_order:
                    unit = unit_in_order(spans, variant, u)
                else:
                    unit = unit_grouped(step, work, spans, variant, u)
                i, gradient = unit.i, gradients[unit.i]
                looks = u == mine and gradient["on_nonfinite"] != PROPAGATE and found[i]["suspicious"] != 0
                if looks and gpu.threadIdx.x == 0:
                    bytes_at(step["bad"], 2 * step["capacity"])[uint64(unit.number)] = 0
                gpu.syncthreads()
                if looks:
                    g = open_terms(gradient, found[i])
                    # Lanes take entries of a row of entries, of any other unit its elements.
                    x, stop = int64(gpu.threadIdx.x) * width, g.dim
                    if entries:
                        stop = unit.end - unit.first
                    while x < stop:
                        if entries:
                            sum_segment(work, g, unit.first + x, 0, total)
                        elif in_order:
                            load(reals_at(g.values, g.values_length), unit.first * g.stride + x, total)
                        else:
                            sum_segment(work, g, unit.first, x, total)
                        if is_nonfinite(total):
                            note_bad(step, spans, gradient, unit, x, not in_order)
                        x += gpu.blockDim.x * width

        return look

    look_in_order, look_grouped = look_for(True), look_for(False)

    @kernel
    def find_bad(at: Any, v: Any) -> None:
        """Find the units whose sums overflow, or are not finite: the first one, or all to be skipped.

        Of a row of entries it is the entry that is told.
        """
        step = steps_at(at, int64(1))[0]
        if step["refused"] != 0 or step["suspicious"] == 0:
            return
        spans = lists_of(step).spans
        variant = variants_at(step["variants"], v + 1)[v]
        if not entries:
            look_in_order(step, variant, spans)
        look_grouped(step, variant, spans)

    return Sums(sum_segment, unit_grouped, first_unit, sum_blocks, find_bad)
