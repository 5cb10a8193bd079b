# SPDX-License-Identifier: Apache-2.0
"""All gradients of a step: checked, screened, sorted and cut into tasks, by one native call.

A large gradient is cut into parts, which threads take; between two stages (`stages`) all of them meet, and
one thread puts together what the parts have found (`settling`). A small gradient is one part, and its thread
does all its stages without waiting for anybody. What is found does not depend on parts or threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.addresses import address_of
from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.grouping import (
    count_digits,
    count_heads,
    count_row_heads,
    move_by_digit,
    sort_few,
)
from nb_sparse_adam._src.engine.intrinsics import address, array_at
from nb_sparse_adam._src.engine.records import (
    CSR,
    FOUND,
    GRADIENT,
    NO_FAULT,
    PROPAGATE,
    RAISE,
    ROWS,
    SEGMENTS,
    STEP,
    TABLE,
    TASK,
)
from nb_sparse_adam._src.engine.scratch import DIGIT_BITS, bytes_needed, is_wide, late
from nb_sparse_adam._src.engine.settling import settle
from nb_sparse_adam._src.engine.stages import (
    COUNT,
    DONE,
    FEW,
    HEADS,
    MOVE,
    PACK,
    PART,
    SCAN,
    WRITE,
    choose_bits,
    must_sort,
    pack,
    places_in,
    scan,
    screen,
    write,
)
from nb_sparse_adam._src.engine.step import open_step
from nb_sparse_adam._src.engine.threads import threading_layer


@jit
def begin_stage(step: Any, counters: Any, phase: Any) -> Any:
    """Decide which parts have a stage to do, and return how many these are.

    Or -1 if there is nothing more to be done; -2 if a gradient has a fault; -3 if none has, but sums that are
    not let through may overflow.
    """
    gradients, found, parts = step.gradients, step.found, step.parts
    units = np.int64(0)
    faulty = suspicious = False
    for i in range(len(gradients)):
        first, count = gradients[i]["first_part"], gradients[i]["parts"]
        lead = parts[first]
        if phase == 0:
            lead["stage"] = SCAN
            lead["half"] = lead["sorted_by"] = 0
            for which in range(count):
                parts[first + which]["gradient"], parts[first + which]["which"] = i, which
        elif lead["stage"] != DONE:
            settle(step, counters, i)
        if phase > 0:
            faulty |= found[i]["fault"] != NO_FAULT
            suspicious |= found[i]["suspicious"] != 0 and gradients[i]["on_nonfinite"] == RAISE
        if lead["stage"] != DONE:
            for which in range(count):
                parts[units]["turn"] = first + which
                units += 1
    if faulty:
        return np.int64(-2)
    if units == 0 and phase > 0:
        return np.int64(-3 if suspicious else -1)
    return units


@jit
def do_stage(step: Any, counters: Any, unit: Any, t: Any) -> None:
    """Do the next stage of a part, or all stages of a gradient that is one part."""
    all_parts = step.parts
    part = all_parts[all_parts[unit]["turn"]]
    i = part["gradient"]
    g, table = step.gradients[i], step.tables[i]
    lead = all_parts[g["first_part"]]
    n, which, parts, scratch = g["ids_length"], part["which"], g["parts"], g["scratch"]
    lo, hi = n * which // parts, n * (which + 1) // parts
    places = places_in(g, table, counters)
    if lead["stage"] == SCAN:
        choose_bits(g, table, part)
        scan(g, table, places, counters, part, lo, hi)
        screen(g, part)
    shift, bits = part["row_shift"], part["digit_bits"]
    own = scratch + places.counters + (which * counters.itemsize << bits)
    if parts == 1:
        own = address(counters, t << DIGIT_BITS)
    counts = array_at(own, np.int64(1) << bits, counters)
    while True:
        stage = lead["stage"]
        packed = array_at(scratch + lead["half"] * places.other, n, np.int64)
        digit_shift = shift + lead["sorted_by"] * bits
        count = stage == COUNT
        if (stage == SCAN and must_sort(g, part)) or (stage == PACK and part["packed"] == 0):
            part["packed"] = 1
            pack(g, table, places, counters, part, lo, hi, packed)
            count = True
            if parts == 1 and n <= FEW:
                sort_few(packed, n)
                count = False
        if count:
            if which == 0:
                lead["counters"] = own
            part["unsorted"] = count_digits(packed, lo, hi, digit_shift, counts)
        elif stage == MOVE:
            other = array_at(late(scratch, places, lead["half"], np.int64(0)), n, np.int64)
            move_by_digit(packed, other, lo, hi, digit_shift, counts)
        elif stage == HEADS:
            part["heads"] = count_heads(packed, lo, hi, shift)
            if g["form"] >= CSR:
                part["row_heads"] = count_row_heads(packed, lo, hi, shift, table["dim"])
        elif stage == WRITE:
            last_part = all_parts[g["first_part"] + parts - 1]
            write(g, table, places, counters, part, last_part, lo, hi, packed, lead["half"])
        if parts > 1:
            break
        settle(step, counters, i)
        if lead["stage"] == DONE:
            break


def _preparing(list_type: Any) -> Drivers:
    """Make the driver that prepares a step, a (1,) `records.STEP`, with lists of a type.

    Of its tables and gradients nothing is changed; it writes what was found, and tasks, and uses scratch. If
    any gradient has a fault, nothing of what was found is to be used but the faults.

    A CSR gradient has at least as many tasks as parts. Counters are ``1 << DIGIT_BITS`` of each thread, of
    int32, or int64 if `scratch.is_wide` for one of the gradients.
    """

    @jit(entry=True, announced="what prepares gradients")
    def begin(phase: Any, job: Any) -> Any:
        counters = array_at(job[0]["counters"], job[0]["counters_length"], list_type)
        return begin_stage(open_step(job), counters, phase)

    @jit(entry=True, announced="what prepares gradients")
    def work(phase: Any, unit: Any, t: Any, job: Any) -> None:  # noqa: ARG001
        counters = array_at(job[0]["counters"], job[0]["counters_length"], list_type)
        do_stage(open_step(job), counters, unit, t)

    return Drivers(begin, work)


PREPARE, PREPARE_WIDE = _preparing(np.int32), _preparing(np.int64)


def group(
    ids: NDArray[Any], highest: int, threads: int = 1, memory: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], int, NDArray[Any]]:
    """Sort ids and cut them into segments, as for a `RowGradient`: to be timed and to be looked at.

    Parameters
    ----------
    ids : (n,) contiguous int32 or int64
        In 0..highest.
    highest : int
        What no id is above: the number of bits to sort by.
    threads : int, default 1
    memory : int64 array, optional
        To sort in; the result is a part of it. Without it, or if it is too small, there is a new one.

    Returns
    -------
    packed : (n,) int64
        Sorted: ``id << row_shift | position``.
    row_shift : int
    starts : (segments + 1,) int32, or int64 for 2**31 ids and more
        Where each segment begins, and the end of the last.
    """
    n, rows = len(ids), highest + 1
    wide = is_wide(n, rows, n)
    needed = -(-bytes_needed(ROWS, n, rows, 1, n, 4, threads, False, False, wide) // 8)
    if memory is None or len(memory) < needed:
        memory = np.empty(needed, np.int64)
    tables, gradients, found = np.zeros(1, TABLE), np.zeros(1, GRADIENT), np.zeros(1, FOUND)
    tables["rows"], tables["dim"] = rows, 1
    given = {
        "form": ROWS, "on_nonfinite": PROPAGATE, "ids": ids.ctypes.data, "ids_length": n,
        "ids_bytes": ids.itemsize, "values_rows": n, "values_stride": 1, "values_dim": 1, "values_bytes": 4,
        "parts": threads, "tasks": threads, "scratch": memory.ctypes.data,
    }  # fmt: skip
    for name, value in given.items():
        gradients[name] = value
    parts, tasks = np.empty(threads, PART), np.empty(threads, TASK)
    counters = np.empty(threads << DIGIT_BITS, np.int64 if wide else np.int32)
    step = np.zeros(1, STEP)
    step["length"], step["counters_length"] = 1, len(counters)
    step["parts_length"] = step["tasks_length"] = threads
    arrays = {"tables": tables, "gradients": gradients, "found": found, "parts": parts, "tasks": tasks}
    for name, array in (*arrays.items(), ("counters", counters)):
        step[name] = address_of(array)
    if threads > 1:
        threading_layer()  # starts numba's threads
    drivers = PREPARE_WIDE if wide else PREPARE
    driver = drivers.parallel if threads > 1 else drivers.serial
    driver(threads, step)
    assert found["fault"][0] == NO_FAULT
    if found["kind"][0] != SEGMENTS:  # in order, each once: nothing was sorted
        shift = max(n - 1, 0).bit_length()
        return (ids.astype(np.int64) << shift) | np.arange(n), shift, np.arange(n + 1, dtype=counters.dtype)
    at_packed, at_starts = (int(found[name][0]) - memory.ctypes.data for name in ("packed", "starts"))
    starts = memory[at_starts // 8 :].view(counters.dtype)[: int(found["units"][0]) + 1]
    return memory[at_packed // 8 :][:n], int(found["row_shift"][0]), starts
