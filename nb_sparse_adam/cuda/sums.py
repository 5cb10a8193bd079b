"""Sums of the gradients of one row, on a GPU, in the order of a CPU's; and which of them are not finite."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import int64, uint64

from nb_sparse_adam.cuda.checks import note
from nb_sparse_adam.cuda.device import (
    arrays_at,
    device_function,
    gpu,
    kernel,
    load_piece,
    product,
    store_piece,
)
from nb_sparse_adam.cuda.opening import (
    bytes_at,
    find_packed,
    lists_of,
    longs_at,
    shorts_at,
    sorted_ids,
    steps_at,
    variants_at,
)
from nb_sparse_adam.cuda.records import rank_of
from nb_sparse_adam.engine.records import OVERFLOW, PROPAGATE, RAISE, SKIP
from nb_sparse_adam.engine.scratch import BLOCK

__all__ = [
    "Sums",
    "Terms",
    "Work",
    "find_in_order",
    "first_row",
    "first_segment",
    "ids_in_order",
    "is_skipped",
    "key_of",
    "open_terms",
    "open_work",
    "sums_for",
]  # fmt: skip

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


@device_function
def first_segment(step: Any, spans: Any, i: Any) -> Any:
    """The first segment of gradient i, or the end of the last of the one before."""
    heads = shorts_at(step["heads"], step["tiles_capacity"] + 1)
    return int64(heads[uint64(spans[uint64(i)]["first_tile"])])


@device_function
def first_row(step: Any, spans: Any, i: Any) -> Any:
    """The first row of entries of gradient i, or the end of the last of the one before."""
    heads = shorts_at(step["row_heads"], step["tiles_capacity"] + 1)
    return int64(heads[uint64(spans[uint64(i)]["first_tile"])])


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


@device_function
def find_in_order(spans: Any, low: Any, high: Any, number: Any) -> Any:
    """Which of the gradients low:high has that number of the ids that need no grouping."""
    low, high = int64(low), int64(high)
    while low + 1 < high:
        middle = (low + high) // 2
        if ids_in_order(spans, middle) <= number:
            low = middle
        else:
            high = middle
    return uint64(low)


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
def _last_start(work: Any, low: Any, high: Any, place: Any) -> Any:
    """The last of the segments low:high that begins before a place; low - 1 if none does."""
    low -= 1
    while low + 1 < high:
        middle = (low + high) // 2
        if work.starts[uint64(middle)] < place:
            low = middle
        else:
            high = middle
    return low


class Sums(NamedTuple):
    """Functions for gradients of one dtype."""

    sum_segment: Any
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
        a = gpu.local.array(width, real)
        add_term(work, g, low, j, True, total, a)
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
            add_term(work, g, i, j, False, total, a)
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
            s = _last_start(work, low, high, begin + BLOCK if slot % 2 == 1 else begin)
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
    def note_bad(step: Any, spans: Any, gradient: Any, i: Any, unit: Any, place: Any) -> None:
        """Note that a unit is bad: to be told at its place in the gradient, or to be skipped."""
        if gradient["on_nonfinite"] == RAISE:
            note(spans, i, SUM_RANK, place)
        bytes_at(step["bad"], 2 * step["capacity"])[uint64(unit)] = 1

    @kernel
    def find_bad_rows(at: Any, v: Any) -> None:
        """Find the rows whose sums overflow, or are not finite: the first one, or all to be skipped."""
        step = steps_at(at, int64(1))[0]
        if step["refused"] != 0 or step["suspicious"] == 0:
            return
        total = gpu.local.array(width, real)
        _, gradients, found, spans = lists_of(step)
        variant = variants_at(step["variants"], v + 1)[v]
        first, last = variant["first"], variant["last"]
        work = open_work(step, variant, spans)
        begin = ids_in_order(spans, first)
        in_order = ids_in_order(spans, last) - begin
        segment = first_segment(step, spans, first)
        units = in_order + first_segment(step, spans, last) - segment
        stride = int64(gpu.gridDim.x) * gpu.blockDim.y
        base = int64(gpu.blockIdx.x) * gpu.blockDim.y
        while base < units:
            u = base + gpu.threadIdx.y
            base += stride
            i, s, unit, place = uint64(first), int64(0), int64(0), int64(0)
            if u < in_order:
                i = find_in_order(spans, first, last, begin + u)
                place = begin + u - ids_in_order(spans, i)
                unit = spans[i]["first_id"] + place
            elif u < units:
                s = segment + u - in_order
                i = find_packed(spans, first, last, work.starts[uint64(s)])
                place = s - first_segment(step, spans, i)
                unit = step["capacity"] + s
            gradient = gradients[i]
            looks = u < units and gradient["on_nonfinite"] != PROPAGATE and found[i]["suspicious"] != 0
            if looks and gpu.threadIdx.x == 0:
                bytes_at(step["bad"], 2 * step["capacity"])[uint64(unit)] = 0
            gpu.syncthreads()
            if looks:
                g = open_terms(gradient, found[i])
                j = int64(gpu.threadIdx.x) * width
                while j < g.dim:
                    if u < in_order:
                        load(reals_at(g.values, g.values_length), place * g.stride + j, total)
                    else:
                        sum_segment(work, g, s, j, total)
                    if is_nonfinite(total):
                        note_bad(step, spans, gradient, i, unit, place)
                    j += gpu.blockDim.x * width

    @kernel
    def find_bad_entries(at: Any, v: Any) -> None:
        """Do the same for rows of entries; it is the entry that is told."""
        step = steps_at(at, int64(1))[0]
        if step["refused"] != 0 or step["suspicious"] == 0:
            return
        total = gpu.local.array(width, real)
        _, gradients, found, spans = lists_of(step)
        variant = variants_at(step["variants"], v + 1)[v]
        work = open_work(step, variant, spans)
        end = first_row(step, spans, variant["last"])
        stride = int64(gpu.gridDim.x) * gpu.blockDim.y
        base = first_row(step, spans, variant["first"]) + int64(gpu.blockIdx.x) * gpu.blockDim.y
        while base < end:
            row = base + gpu.threadIdx.y
            base += stride
            low, i, looks = int64(0), uint64(variant["first"]), False
            if row < end:
                low = int64(work.row_starts[uint64(row)])
                i = find_packed(spans, variant["first"], variant["last"], work.starts[uint64(low)])
                looks = gradients[i]["on_nonfinite"] != PROPAGATE and found[i]["suspicious"] != 0
            unit = step["capacity"] + row
            if looks and gpu.threadIdx.x == 0:
                bytes_at(step["bad"], 2 * step["capacity"])[uint64(unit)] = 0
            gpu.syncthreads()
            if looks:
                g, first = open_terms(gradients[i], found[i]), first_segment(step, spans, i)
                e, high = low + gpu.threadIdx.x, int64(work.row_starts[uint64(row + 1)])
                while e < high:
                    sum_segment(work, g, e, 0, total)
                    if is_nonfinite(total):
                        note_bad(step, spans, gradients[i], i, unit, e - first)
                    e += gpu.blockDim.x

    return Sums(sum_segment, sum_blocks, find_bad_entries if entries else find_bad_rows)
