# SPDX-License-Identifier: Apache-2.0
"""The loops that apply the formula on a GPU, for each kind of table.

`adam` and `late_correction` are those of `engine.formula`, compiled for the device, as are the
offsets of `engine.layout`. What is around them is not: on a CPU a thread walks along a row;
here the lanes of a group, ``threadIdx.x``, take the elements of a row side by side, and groups,
``threadIdx.y``, take rows in turn, each its own. Neither sums nor updates need atomic operations, and no
result depends on scheduling.

A CPU rounds each product and each sum; `product` makes a GPU do so, and sums are made in a CPU's order.

Kernels have two arguments, the address of a STEP and the number of a VARIANT.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import int32, int64, uint64

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
    ids_of,
    integer,
    last_not_above,
    lists_of,
    longs_at,
    steps_at,
    variants_at,
)
from nb_sparse_adam._src.cuda.sums import (
    ids_in_order,
    is_skipped,
    key_of,
    open_terms,
    open_work,
    sums_for,
    unit_in_order,
)
from nb_sparse_adam._src.engine.codecs import Codec
from nb_sparse_adam._src.engine.formula import after, formula, late_correction
from nb_sparse_adam._src.engine.layout import count_offset, exp_avg_offset, exp_avg_sq_offset, param_offset
from nb_sparse_adam._src.engine.records import DISTINCT, ELEMENT, GLOBAL, ROW

adam = device_function(formula(product))
late, one_more = device_function(late_correction), device_function(after)
param_start, count_start = device_function(param_offset), device_function(count_offset)
exp_avg_start, exp_avg_sq_start = device_function(exp_avg_offset), device_function(exp_avg_sq_offset)


class Variant(NamedTuple):
    """A kind of table and gradient that kernels are made for."""

    dtype: np.dtype[Any]  # of parameters and values
    codec: Codec  # of the state
    count_dtype: np.dtype[Any]
    count_rule: int  # ELEMENT, ROW or GLOBAL
    width: int  # elements of a row that a lane takes at once: 1, or as many as 16 bytes are
    complete: bool  # whether all corrections are tabulated; what computes them takes registers
    entries: bool  # whether the gradient is one of entries, else of rows


class Kernels(NamedTuple):
    """The kernels of a variant."""

    sum_blocks: Any
    find_bad: Any
    update_in_order: Any  # of entries: None
    update_grouped: Any


class View(NamedTuple):
    """A table in a step, from one row to the next; compare `engine.view.View`."""

    # Where rows lie: for `layout` alone.
    param_stride: Any
    state_stride: Any
    exp_avg_sq_offset: Any
    count_stride: Any
    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    lr: Any
    eps: Any
    sign: Any


@device_function
def count_skipped(table: Any) -> None:
    """Count a row that is left out, by one lane of its group."""
    if gpu.threadIdx.x == 0:
        gpu.atomic.add(longs_at(table["totals"], int64(2)), 1, 1)


@cache
def kernels_for(variant: Variant) -> Kernels:  # noqa: C901 (of all functions in it)
    """Make the kernels of a variant."""
    dtype, codec, count_dtype, rule, width, complete, entries = variant
    real, word = dtype.type, codec.storage(dtype).type
    reals_at, words_at, counts_at = arrays_at(dtype), arrays_at(codec.storage(dtype)), arrays_at(count_dtype)
    load_word, store_word = device_function(codec.load), device_function(codec.store)
    load, store = load_piece(width), store_piece(width)
    most = int(np.iinfo(count_dtype).max)
    sums = sums_for(dtype, width, entries)
    sum_segment = sums.sum_segment

    @device_function
    def open_table(table: Any) -> Any:
        """Take the record of a table apart.

        Kernels do so for each row: numbers that are kept from one to the next would take registers.
        """
        return View(
            table["param_stride"], table["state_stride"], table["exp_avg_sq_offset"], table["count_stride"],
            real(table["beta1"]), real(table["one_minus_beta1"]),
            real(table["beta2"]), real(table["one_minus_beta2"]),
            real(table["lr"]), real(table["eps"]), real(table["sign"]),
        )  # fmt: skip

    @device_function
    def correction(record: Any, k: Any) -> Any:
        """``step_size`` and ``scale`` after k active steps; of a negative k, as a CPU has them."""
        last = record["corrections_length"] // 2 - 1
        known = last if k < 0 else min(k, last)
        if complete or k == known:
            pairs = reals_at(record["corrections"], record["corrections_length"])
            return pairs[uint64(2 * known)], pairs[uint64(2 * known + 1)]
        step_size, scale = late(k, record["log_beta1"], record["log_beta2"], record["eps_hat"] != 0)
        return real(step_size), real(scale)

    @device_function
    def next_count(record: Any, row: Any) -> Any:
        """Count a step of a row, where rows have counts, and return its number; −1: no row."""
        k, place = int64(0), int64(0)
        if rule == ROW:
            place = row * record["count_stride"]
        counts = counts_at(record["counts"], record["counts_length"])
        if rule != ELEMENT and row >= 0:
            k = one_more(counts[uint64(place)], most)
        if rule == ROW:
            gpu.syncthreads()  # all lanes have read the count before one of them writes it
            if row >= 0 and gpu.threadIdx.x == 0:
                counts[uint64(place)] = k
        return k

    @device_function
    def take_steps(record: Any, table: Any, row: Any, j: Any, grads: Any, k: Any) -> None:
        """The elements j, j + 1, ... of a row take a step, those that are active; k for all, or their own."""
        p = gpu.local.array(width, real)
        m = gpu.local.array(width, word)
        v = gpu.local.array(width, word)
        params = reals_at(record["param"], record["param_length"])
        words = words_at(record["state"], record["state_length"])
        p_start = param_start(table, row) + j
        m_start, v_start = exp_avg_start(table, row) + j, exp_avg_sq_start(table, row) + j
        load(params, p_start, p)
        load(words, m_start, m)
        load(words, v_start, v)
        step_size, scale = real(0), real(0)
        if rule != ELEMENT:
            step_size, scale = correction(record, k)
            step_size = table.lr * step_size
        for w in range(width):
            g = table.sign * grads[w]
            if rule == ELEMENT:
                if g == 0:
                    continue
                counts = counts_at(record["counts"], record["counts_length"])
                place = uint64(count_start(table, row) + j + w)
                count = one_more(counts[place], most)
                counts[place] = count
                step_size, scale = correction(record, count)
                step_size = table.lr * step_size
            old_m, old_v = real(load_word(m[w])), real(load_word(v[w]))
            p[w], new_m, new_v = adam(p[w], old_m, old_v, g, table, step_size, scale)
            m[w], v[w] = word(store_word(new_m)), word(store_word(new_v))
        store(params, p_start, p)
        store(words, m_start, m)
        store(words, v_start, v)

    @device_function
    def key_in_row(row: Any, e: Any) -> Any:
        """The key of entry e; ``row`` is a `Work` and the record of what has been found."""
        return key_of(row[0], row[1], e)

    last_key = last_not_above(key_in_row)

    def update_for(in_order: bool) -> Any:  # noqa: C901 (of all functions in it)
        """Make the kernel for ids that increase, or for segments and rows of entries.

        The former needs fewer registers, so that more of its blocks run at a time.
        """
        blocks, done = "blocks_grouped", "done_grouped"
        if in_order:
            blocks, done = "blocks_in_order", "done_in_order"
        first_unit, unit_grouped = sums.first_unit, sums.unit_grouped

        @device_function
        def finish(step: Any, v: Any) -> None:
            """Let the block that is the last to finish note that its gradients have been applied."""
            is_last = gpu.shared.array(1, int32)
            variants = variants_at(step["variants"], v + 1)
            thread = gpu.threadIdx.y * gpu.blockDim.x + gpu.threadIdx.x
            gpu.syncthreads()
            gpu.threadfence()
            if thread == 0:
                before = gpu.atomic.add(variants[blocks], v, 1)
                is_last[0] = 1 if before == gpu.gridDim.x - 1 else 0
            gpu.syncthreads()
            if is_last[0] == 0:
                return
            if rule == GLOBAL:
                tables, _, found, _ = lists_of(step)
                first, last = variants[v]["first"], variants[v]["last"]
                for i in range(first + thread, last, gpu.blockDim.x * gpu.blockDim.y):
                    if (found[i]["kind"] == DISTINCT) == in_order:
                        counts = counts_at(tables[i]["counts"], int64(1))
                        counts[0] = one_more(counts[0], most)
            gpu.syncthreads()
            if thread == 0:
                variants[v][done] = 1

        @device_function
        def row_of(work: Any, gradient: Any, found: Any, table: Any, unit: Any) -> Any:
            """The row that a unit is of, or −1 if the table has none such: ids may have changed since."""
            if in_order:
                row = integer(ids_of(gradient), unit.first)
            else:
                row = key_of(work, found, unit.first)
            if entries:
                row //= table["dim"]
            return row if 0 <= row < table["rows"] else int64(-1)

        @device_function
        def load_gradient(work: Any, g: Any, found: Any, unit: Any, key: Any, j: Any, total: Any) -> None:
            """``total`` ← the elements j, j + 1, ... of a unit's gradient; of entries, what has that key."""
            if in_order:
                load(reals_at(g.values, g.values_length), unit.first * g.stride + j, total)
            elif not entries:
                sum_segment(work, g, unit.first, j, total)
            else:
                e = last_key((work, found), unit.first - 1, unit.end, key)
                total[0] = 0
                if e >= unit.first and key_of(work, found, e) == key:
                    sum_segment(work, g, e, 0, total)

        @kernel
        def update(at: Any, v: Any) -> None:
            """Apply gradients, once: if it is launched again for a step, it does nothing."""
            step = steps_at(at, int64(1))[0]
            if step["refused"] != 0:
                return
            variant = variants_at(step["variants"], v + 1)[v]
            if variant[done] != 0:
                return
            total = gpu.local.array(width, real)
            spans = lists_of(step).spans
            if in_order:
                begin = int32(ids_in_order(spans, variant["first"]))
                end = int32(ids_in_order(spans, variant["last"]))
            else:
                begin = int32(first_unit(step, spans, variant["first"]))
                end = int32(first_unit(step, spans, variant["last"]))
            base = int32(begin + gpu.blockIdx.x * gpu.blockDim.y)
            while base < end:
                tables, gradients, found, spans = lists_of(step)  # again: registers are scarce
                work = open_work(step, variant, spans)
                mine, row = int32(base + gpu.threadIdx.y), int64(-1)
                base = int32(base + gpu.gridDim.x * gpu.blockDim.y)
                # Groups for which there is none look at the last one: NVVM before 13.1 never finishes to
                # compile a unit that is there in one branch only.
                u = min(mine, int32(end - 1))
                if in_order:
                    unit = unit_in_order(spans, variant, u)
                else:
                    unit = unit_grouped(step, work, spans, variant, u)
                if u == mine:
                    if is_skipped(step, gradients[unit.i], found[unit.i], unit.number):
                        count_skipped(tables[unit.i])
                    else:
                        row = row_of(work, gradients[unit.i], found[unit.i], tables[unit.i], unit)
                i = unit.i
                k = next_count(tables[i], row)
                if row < 0:
                    continue
                table, g = open_table(tables[i]), open_terms(gradients[i], found[i])
                if entries and rule == ELEMENT:  # lanes take entries
                    e = unit.first + gpu.threadIdx.x
                    while e < unit.end:
                        sum_segment(work, g, e, 0, total)
                        j = key_of(work, found[i], e) - row * tables[i]["dim"]
                        take_steps(tables[i], table, row, j, total, k)
                        e += gpu.blockDim.x
                else:
                    j = int64(gpu.threadIdx.x) * width
                    while j < tables[i]["dim"]:
                        key = row * tables[i]["dim"] + j
                        load_gradient(work, g, found[i], unit, key, j, total)
                        take_steps(tables[i], table, row, j, total, k)
                        j += gpu.blockDim.x * width
            finish(step, v)

        return update

    return Kernels(sums.sum_blocks, sums.find_bad, None if entries else update_for(True), update_for(False))
