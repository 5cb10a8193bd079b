# SPDX-License-Identifier: Apache-2.0
"""What the gradients of a step hold is looked at on the GPU; what is wrong is left in their records.

Kernels here have one argument, the address of a STEP.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float32, float64, int32, int64

from nb_sparse_adam._src.cuda.device import device_function, gpu, kernel
from nb_sparse_adam._src.cuda.opening import (
    doubles_at,
    find_id,
    find_offset,
    find_row,
    ids_of,
    integer,
    lists_of,
    longs_at,
    offsets_of,
    refusals_at,
    row_of_entry,
    shorts_at,
    singles_at,
    sorted_ids,
    steps_at,
)
from nb_sparse_adam._src.cuda.records import NOWHERE, PLACE_BITS, PLACE_MASK, SCAN_THREADS, TILE, rank_of
from nb_sparse_adam._src.engine.records import (
    COLUMN,
    CSR,
    DISTINCT,
    ENTRIES,
    ID,
    NO_FAULT,
    NOT_FINITE,
    OFFSET,
    OVERFLOW,
    PROPAGATE,
    RAISE,
    ROWS,
    SEGMENTS,
    WEIGHT_NOT_FINITE,
)

# Of each fault, what is told first; see `records.rank_of`.
ID_RANK, COLUMN_RANK, OFFSET_RANK = rank_of(ID), rank_of(COLUMN), rank_of(OFFSET)
VALUE_RANK, WEIGHT_RANK, SUM_RANK = rank_of(NOT_FINITE), rank_of(WEIGHT_NOT_FINITE), rank_of(OVERFLOW)


@device_function
def note(spans: Any, i: Any, rank: Any, place: Any) -> None:
    """Note that something is wrong with gradient i; what is told first stays."""
    worst = (int64(rank) << PLACE_BITS) | place
    if spans[i]["checked"] != 0 and worst < spans[i]["worst"]:
        gpu.atomic.min(spans["worst"], i, worst)


# --- ids, offsets, values -----------------------------------------------------------------------------------


@device_function
def _is_large(value: Any, limit: Any) -> Any:
    return not abs(value) < limit


@device_function
def _real(gradient: Any, address: Any, place: Any) -> Any:
    """Return a value or a weight of a gradient, as float64."""
    if gradient["values_bytes"] == 4:
        return float64(singles_at(address, place + 1)[place])
    return doubles_at(address, place + 1)[place]


@kernel
def check_ids(at: Any) -> None:
    """Find ids and columns that are out of range, weights that are not finite, and ids that fall or repeat.

    Of entries it is row * dim + column that falls or repeats. Each thread takes one id at a time.
    """
    step = steps_at(at, int64(1))[0]
    tables, gradients, found, spans = lists_of(step)
    length = step["length"]
    for u in range(gpu.grid(1), spans[length]["first_id"], gpu.gridsize(1)):
        i = find_id(spans, 0, length, u)
        gradient = gradients[i]
        p = u - spans[i]["first_id"]
        ids = ids_of(gradient)
        here = integer(ids, p)
        before = integer(ids, max(p - 1, int64(0)))
        if gradient["form"] == CSR:
            dim = tables[i]["dim"]
            if here < 0 or here >= dim:
                note(spans, i, COLUMN_RANK, p)
            here += row_of_entry(gradient, p) * dim
            before += row_of_entry(gradient, max(p - 1, int64(0))) * dim
        elif here < 0 or here >= tables[i]["rows"]:
            note(spans, i, ID_RANK, p)
        if p > 0 and here <= before:
            # Many threads write the same: they look first.
            if spans[i]["repeats"] == 0:
                spans[i]["repeats"] = 1
            if here < before and spans[i]["falls"] == 0:
                spans[i]["falls"] = 1
        if gradient["weights"] != 0 and gradient["on_nonfinite"] != PROPAGATE:
            value = _real(gradient, gradient["weights"], p)
            if _is_large(value, spans[i]["limit"]):
                if found[i]["suspicious"] == 0:
                    found[i]["suspicious"] = 1
                if gradient["on_nonfinite"] == RAISE and _is_large(value, math.inf):
                    note(spans, i, WEIGHT_RANK, p)


@kernel
def check_offsets(at: Any) -> None:
    """Find offsets that cannot be; they begin at 0, never fall, and end at n. And invert the sizes of bags.

    The last one is n itself if it is there: of rows always. Each thread takes one offset at a time.
    """
    step = steps_at(at, int64(1))[0]
    _, gradients, found, spans = lists_of(step)
    length = step["length"]
    for u in range(gpu.grid(1), spans[length]["first_offset"], gpu.gridsize(1)):
        i = find_offset(spans, 0, length, u)
        gradient = gradients[i]
        p = u - spans[i]["first_offset"]
        offsets, n, bags = offsets_of(gradient), gradient["ids_length"], gradient["values_rows"]
        here = integer(offsets, p)
        wrong = here > n
        if p == 0:
            wrong = wrong or here != 0
        else:
            wrong = wrong or here < integer(offsets, p - 1)
        if p == offsets.length - 1 and (gradient["form"] == CSR or offsets.length > bags):
            wrong = wrong or here != n
        if wrong:
            note(spans, i, OFFSET_RANK, p)
        if gradient["mean"] != 0 and p < bags:
            end = integer(offsets, p + 1) if p + 1 < offsets.length else n
            size = max(end - here, int64(1))
            if gradient["values_bytes"] == 4:
                singles_at(found[i]["reciprocals"], bags)[p] = float32(1) / float32(size)
            else:
                doubles_at(found[i]["reciprocals"], bags)[p] = float64(1) / float64(size)


@device_function
def _check_row(found: Any, spans: Any, gradient: Any, i: Any, values: Any, row: Any, limit: Any) -> None:
    columns, first = gradient["values_dim"], row * gradient["values_stride"]
    wrong, suspicious = int64(NOWHERE), int32(0)
    for j in range(gpu.threadIdx.x, columns, gpu.blockDim.x):
        value = values[first + j]
        if _is_large(value, limit):
            suspicious = int32(1)
            if _is_large(value, math.inf):
                wrong = min(wrong, row * columns + j)
    if suspicious != 0 and found[i]["suspicious"] == 0:
        found[i]["suspicious"] = 1
    if wrong != NOWHERE and gradient["on_nonfinite"] == RAISE:
        note(spans, i, VALUE_RANK, wrong)


@kernel
def check_values(at: Any) -> None:
    """Find values that are not finite, and whether all are smaller than a limit.

    The lanes of a group, ``threadIdx.x``, go along a row of values; groups, ``threadIdx.y``, take rows.
    """
    step = steps_at(at, int64(1))[0]
    _, gradients, found, spans = lists_of(step)
    length = step["length"]
    group = int64(gpu.blockIdx.x) * gpu.blockDim.y + gpu.threadIdx.y
    for u in range(group, spans[length]["first_row"], int64(gpu.gridDim.x) * gpu.blockDim.y):
        i = find_row(spans, 0, length, u)
        gradient = gradients[i]
        if gradient["on_nonfinite"] == PROPAGATE:
            continue
        row, limit = u - spans[i]["first_row"], spans[i]["limit"]
        size = (gradient["values_rows"] - 1) * gradient["values_stride"] + gradient["values_dim"]
        if gradient["values_bytes"] == 4:
            singles = singles_at(gradient["values"], size)
            _check_row(found, spans, gradient, i, singles, row, float32(limit))
        else:
            _check_row(found, spans, gradient, i, doubles_at(gradient["values"], size), row, limit)


# --- what becomes of the step -------------------------------------------------------------------------------


@device_function
def sum_before(sums: Any, thread: Any, own: Any, threads: Any) -> Any:
    """Sum of what the threads before this one have; ``sums`` is shared memory, one place a thread."""
    sums[thread] = own
    gpu.syncthreads()
    reach = 1
    while reach < threads:
        other = sums[thread - reach] if thread >= reach else sums[thread] * 0
        gpu.syncthreads()
        sums[thread] += other
        gpu.syncthreads()
        reach *= 2
    return sums[thread] - own


@device_function
def _refuse(step: Any, wrong: Any) -> None:
    """Have the step do nothing if something is wrong, or was in one that an optimizer of it took before.

    What an optimizer refused first is kept until it has been told. The others refuse the step, too: a step of
    several is all or nothing. Called by one thread.
    """
    _, gradients, found, spans = lists_of(step)
    guards = longs_at(step["guards"], step["guards_length"])
    before = False
    for j in range(step["guards_length"]):
        before = before or refusals_at(guards[j], int64(1))[0]["number"] != 0
    if not before and not wrong:
        return
    step["refused"] = 1
    if not before:
        for i in range(step["length"]):
            if found[i]["fault"] == NO_FAULT:
                continue
            refusal = refusals_at(guards[spans[i]["guard"]], int64(1))[0]
            if refusal["number"] == 0 or spans[i]["order"] < refusal["order"]:
                refusal["number"], refusal["order"] = spans[i]["number"], spans[i]["order"]
                refusal["kind"], refusal["ids"] = spans[i]["kind"], gradients[i]["ids_length"]
                refusal["fault"], refusal["place"] = found[i]["fault"], found[i]["place"]
                refusal["got"], refusal["before"] = found[i]["got"], found[i]["before"]
                refusal["value"] = found[i]["value"]
    for j in range(step["guards_length"]):
        refusal = refusals_at(guards[j], int64(1))[0]
        if refusal["number"] == 0:
            refusal["number"] = -1


@device_function
def _write_fault(gradient: Any, one: Any, worst: Any) -> None:
    """Write what is wrong and what is there: arrays may be gone when it is told."""
    rank, place = worst >> PLACE_BITS, worst & PLACE_MASK
    one["fault"] = COLUMN if rank == COLUMN_RANK else rank // 2
    one["place"] = place
    if rank == OFFSET_RANK:
        offsets = offsets_of(gradient)
        one["got"] = integer(offsets, place)
        one["before"] = integer(offsets, place - 1) if place > 0 else int64(0)
    elif rank == VALUE_RANK:
        columns = gradient["values_dim"]
        offset = (place // columns) * gradient["values_stride"] + place % columns
        one["value"] = _real(gradient, gradient["values"], offset)
    elif rank == WEIGHT_RANK:
        one["value"] = _real(gradient, gradient["weights"], place)
    else:
        one["got"] = integer(ids_of(gradient), place)


@kernel
def settle(at: Any) -> None:
    """Refuse the step if something is wrong; and share out what must be grouped. One block."""
    if gpu.blockIdx.x != 0:
        return
    sums = gpu.shared.array(SCAN_THREADS, int64)
    carried = gpu.shared.array(2, int64)  # ids and tiles so far
    flags = gpu.shared.array(3, int32)  # something is wrong, suspicious, falls
    step = steps_at(at, int64(1))[0]
    _, gradients, found, spans = lists_of(step)
    length, thread = step["length"], gpu.threadIdx.x
    if thread == 0:
        carried[0] = carried[1] = 0
        flags[0] = flags[1] = flags[2] = 0
    gpu.syncthreads()
    for base in range(0, length, SCAN_THREADS):
        i = base + thread
        ids, tiles = int64(0), int64(0)
        if i < length:
            if spans[i]["worst"] != NOWHERE:
                _write_fault(gradients[i], found[i], spans[i]["worst"])
                flags[0] = 1
            if found[i]["suspicious"] != 0:
                flags[1] = 1
            form = gradients[i]["form"]
            if form == ROWS and spans[i]["repeats"] == 0:
                found[i]["kind"] = DISTINCT
            else:
                found[i]["kind"] = ENTRIES if form == CSR else SEGMENTS
                ids = gradients[i]["ids_length"]
                tiles = (ids + TILE - 1) // TILE
                if spans[i]["falls"] != 0:
                    flags[2] = 1
        first_id = carried[0] + sum_before(sums, thread, ids, SCAN_THREADS)
        gpu.syncthreads()
        first_tile = carried[1] + sum_before(sums, thread, tiles, SCAN_THREADS)
        gpu.syncthreads()
        if i < length:
            spans[i]["first_packed"], spans[i]["first_tile"] = first_id, first_tile
        if thread == SCAN_THREADS - 1:
            carried[0], carried[1] = first_id + ids, first_tile + tiles
        gpu.syncthreads()
    if thread == 0:
        spans[length]["first_packed"], spans[length]["first_tile"] = carried[0], carried[1]
        step["suspicious"], step["falls"] = flags[1], flags[2]
        _refuse(step, flags[0] != 0)


@kernel
def join(at: Any) -> None:
    """Refuse the step if another batch of it was refused. One thread."""
    if gpu.blockIdx.x == 0 and gpu.threadIdx.x == 0:
        step = steps_at(at, int64(1))[0]
        if step["refused"] == 0:
            _refuse(step, False)


@kernel
def settle_sums(at: Any) -> None:
    """Refuse the step if a sum overflows, and note of which row. One thread."""
    if gpu.blockIdx.x != 0 or gpu.threadIdx.x != 0:
        return
    step = steps_at(at, int64(1))[0]
    if step["refused"] != 0 or step["suspicious"] == 0:
        return
    tables, gradients, found, spans = lists_of(step)
    packed = longs_at(sorted_ids(step), step["capacity"])
    starts = shorts_at(step["starts"], step["capacity"] + 1)
    heads = shorts_at(step["heads"], step["tiles_capacity"] + 1)
    wrong = False
    for i in range(step["length"]):
        if spans[i]["worst"] == NOWHERE:
            continue
        wrong = True
        one, gradient = found[i], gradients[i]
        place = spans[i]["worst"] & PLACE_MASK
        one["fault"], one["place"], one["before"] = OVERFLOW, place, 1
        if one["kind"] == DISTINCT:
            one["got"] = integer(ids_of(gradient), place)
            continue
        segment = int64(heads[spans[i]["first_tile"]]) + place
        one["got"] = packed[starts[segment]] >> one["row_shift"]
        if one["kind"] == ENTRIES:
            one["got"] //= tables[i]["dim"]
        else:
            one["before"] = int64(starts[segment + 1]) - int64(starts[segment])
    _refuse(step, wrong)
