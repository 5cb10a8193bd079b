# SPDX-License-Identifier: Apache-2.0
"""Between two stages of preparing: one thread puts together what the parts of a gradient have found.

It tells the first fault, decides what a gradient becomes and which stage is next, and cuts what is ready into
tasks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.grouping import cut, turn_counts_into_places
from nb_sparse_adam._src.engine.integers import integers
from nb_sparse_adam._src.engine.intrinsics import array_at
from nb_sparse_adam._src.engine.records import (
    BAGS,
    CHANGED,
    COLUMN,
    COMPRESSED,
    COO,
    CSC,
    CSR,
    DISTINCT,
    ENTRIES,
    ID,
    NO_FAULT,
    NOT_FINITE,
    OFFSET,
    PROPAGATE,
    RAISE,
    SEGMENTS,
    TOO_MANY_BITS,
    WEIGHT_NOT_FINITE,
)
from nb_sparse_adam._src.engine.scanning import first_id_out_of_range, first_wrong_offset
from nb_sparse_adam._src.engine.scratch import BLOCK, behind_starts, first_listed, late
from nb_sparse_adam._src.engine.screening import first_not_finite, magnitude_of_bits, surely_finite
from nb_sparse_adam._src.engine.stages import (
    COUNT,
    DONE,
    FEW,
    HEADS,
    MOVE,
    PACK,
    SCAN,
    WRITE,
    places_in,
    pointer_of,
)

ROW_COST = 4  # a row costs as much as so many ids that are added up


@jit
def limit_of_ids(g: Any, table: Any) -> Any:
    """What all of ``ids`` are less than: the rows of the table, or, of CSR, its columns."""
    return table["dim"] if g["form"] == CSR else table["rows"]


@jit(inlined=False)
def settle(step: Any, counters: Any, i: Any) -> None:  # noqa: C901
    """Put together what a stage has found about all parts of gradient i, and decide about the next one."""
    tables, gradients, found, parts, tasks = step
    g, table, f = gradients[i], tables[i], found[i]
    n, count = g["ids_length"], g["parts"]
    first, last = g["first_part"], g["first_part"] + g["parts"]
    lead = parts[first]
    places = places_in(g, table, counters)
    stage, following = lead["stage"], np.int64(DONE)
    few = count == 1 and n <= FEW
    if stage == SCAN:
        clear(f)
        f["wide"] = counters.itemsize == 8
        f["kind"] = kind_of(g, parts, first, last)
        find_fault(g, table, f, parts, first, last)
    sorts = f["kind"] in (SEGMENTS, ENTRIES)
    if f["fault"] == NO_FAULT and stage in (SCAN, PACK) and sorts:
        following = np.int64(HEADS)
        for p in range(first, last):
            if parts[p]["packed"] == 0:
                following = np.int64(PACK)
            if parts[p]["changed"]:
                f["fault"] = CHANGED
            if parts[p]["packed"] < 0:
                f["fault"] = TOO_MANY_BITS
        if following == HEADS and not few:
            following = np.int64(COUNT)
    in_order = False
    if stage == COUNT or (following == COUNT and g["form"] != CSR):  # CSR is packed by rows, counted by ids
        following = np.int64(MOVE)
        if lead["sorted_by"] == 0:
            packed = array_at(g["scratch"], n, np.int64)
            in_order = True
            for p in range(first, last):
                lo = n * (p - first) // count
                in_order &= parts[p]["unsorted"] == 0 and (
                    lo == 0 or lo >= n or packed[np.uint64(lo - 1)] <= packed[np.uint64(lo)]
                )
        if in_order:
            following = np.int64(HEADS)
        else:
            digits = np.int64(1) << lead["digit_bits"]
            turn_counts_into_places(array_at(lead["counters"], count * digits, counters), count, digits)
    elif stage == MOVE:
        lead["sorted_by"] += 1
        lead["half"] = 1 - lead["half"]
        following = np.int64(COUNT if lead["sorted_by"] < lead["digits"] else HEADS)
    elif stage == HEADS:
        heads = row_heads = np.int64(0)
        for p in range(first, last):
            parts[p]["first_head"], parts[p]["first_row_head"] = heads, row_heads
            heads += parts[p]["heads"]
            row_heads += parts[p]["row_heads"]
        following = np.int64(WRITE)
    if following == HEADS and count == 1 and g["form"] < CSR:  # they need not be counted beforehand
        lead["first_head"] = 0
        following = np.int64(WRITE)
    if f["fault"] != NO_FAULT:
        following = np.int64(DONE)
    elif following == DONE:
        finish(g, table, f, parts, tasks, places, counters, i)
    lead["stage"] = following


@jit(inlined=False)
def clear(f: Any) -> None:
    """Begin a record of what was found."""
    f["fault"] = NO_FAULT
    f["place"] = f["got"] = f["before"] = f["suspicious"] = f["units"] = f["present"] = 0
    f["packed"] = f["row_shift"] = f["starts"] = f["bag_of"] = f["present_rows"] = f["row_starts"] = 0
    f["long"] = f["long_length"] = f["long_first"] = f["blocks"] = f["block_sums"] = f["reciprocals"] = 0
    f["longest"] = f["present_length"] = 0
    f["value"] = f["largest"] = 0.0


@jit(inlined=False)
def kind_of(g: Any, parts: Any, first: Any, last: Any) -> Any:
    """What becomes of a gradient: DISTINCT, SEGMENTS, COMPRESSED or ENTRIES."""
    if g["form"] == BAGS:
        return np.int64(SEGMENTS)
    if g["form"] in (COO, CSC):
        return np.int64(ENTRIES)
    n, count = g["ids_length"], g["parts"]
    unordered, before = False, np.int64(-1)
    for p in range(first, last):
        part = parts[p]
        if g["form"] == CSR:
            unordered |= part["columns_fall"] > 0
        elif n * (part["which"] + 1) // count > n * part["which"] // count:
            unordered |= part["falls"] + part["repeats"] > 0 or part["first_id"] <= before
            before = part["last_id"]
    if g["form"] == CSR:
        return np.int64(ENTRIES) if unordered else np.int64(COMPRESSED)
    return np.int64(SEGMENTS) if unordered else np.int64(DISTINCT)


@jit(inlined=False)
def find_fault(g: Any, table: Any, f: Any, parts: Any, first: Any, last: Any) -> None:
    """Find the first fault of a gradient, and the largest of its values."""
    form, n = g["form"], g["ids_length"]
    wrong = columns_wrong = changed = False
    magnitude = weight = np.int64(0)
    offsets_wrong = parts[first]["begin"] != 0
    for p in range(first, last):
        part = parts[p]
        wrong |= part["wrong"] != 0
        columns_wrong |= part["columns_wrong"] != 0
        changed |= part["changed"] != 0
        offsets_wrong |= (
            part["offsets_fall"] != 0 or part["begin"] < 0 or part["end"] > n or part["present"] < 0
        )
        magnitude, weight = max(magnitude, part["magnitude"]), max(weight, part["weight_magnitude"])
        if form == CSR and p > first:
            changed |= part["begin"] != parts[p - 1]["end"]
    bags = pointer_of(g, table)
    closed = g["offsets_length"] > bags
    if form in (BAGS, CSR, CSC):
        offsets_wrong |= closed and parts[last - 1]["end"] != n
    ids = integers(g["ids"], n, g["ids_bytes"])
    pointer = form in (CSR, CSC)
    if form == BAGS and (offsets_wrong or changed):  # not all ids have been looked at
        wrong |= first_id_out_of_range(ids, n, table["rows"])[0] >= 0
    if wrong:
        tell_id(f, ID, ids, n, table["rows"])
    elif columns_wrong and form == COO:
        tell_id(f, COLUMN, integers(g["columns"], n, g["columns_bytes"]), n, table["dim"])
    elif offsets_wrong:
        offsets = integers(g["offsets"], g["offsets_length"], g["offsets_bytes"])
        place, got, before = first_wrong_offset(offsets, g["offsets_length"], n, closed)
        f["fault"] = OFFSET if place >= 0 else CHANGED
        f["place"], f["got"], f["before"] = place, got, before
    elif columns_wrong and pointer:
        tell_id(f, COLUMN, ids, n, limit_of_ids(g, table))
    elif changed:
        f["fault"] = CHANGED
    elif g["on_nonfinite"] != PROPAGATE:
        largest = magnitude_of_bits(magnitude, g["values_bytes"])
        largest_weight = magnitude_of_bits(weight, g["values_bytes"])
        if g["on_nonfinite"] == RAISE:
            if not largest < np.inf:
                tell_value(
                    f, NOT_FINITE, g, g["values"], g["values_rows"], g["values_stride"], g["values_dim"]
                )
            elif not largest_weight < np.inf:
                tell_value(f, WEIGHT_NOT_FINITE, g, g["weights"], n, np.int64(1), np.int64(1))
        f["largest"] = largest * largest_weight if g["weights"] else largest


@jit(inlined=False)
def tell_id(f: Any, fault: Any, ids: Any, n: Any, limit: Any) -> None:
    """Write down which id is out of range, or that none is by now."""
    place, got = first_id_out_of_range(ids, n, limit)
    f["fault"] = fault if place >= 0 else CHANGED
    f["place"], f["got"] = place, got


@jit(inlined=False)
def tell_value(f: Any, fault: Any, g: Any, values: Any, rows: Any, stride: Any, dim: Any) -> None:
    """Write down which value is not finite, or that all are by now."""
    place, value = first_not_finite(values, g["values_bytes"], rows, stride, dim)
    f["fault"] = fault if place >= 0 else CHANGED
    f["place"], f["value"] = place, value


@jit(inlined=False)
def finish(g: Any, table: Any, f: Any, parts: Any, tasks: Any, places: Any, counters: Any, i: Any) -> None:
    """Say where everything is, and cut it into tasks."""
    n, kind, scratch, first_task, count = (
        g["ids_length"],
        f["kind"],
        g["scratch"],
        g["first_task"],
        g["tasks"],
    )
    first, last = g["first_part"], g["first_part"] + g["parts"]
    for k in range(count):
        task = tasks[first_task + k]
        task["gradient"], task["part"], task["parts"] = i, k, count
        task["first"] = task["last"] = task["skipped"] = 0
        if kind == DISTINCT:
            task["first"], task["last"] = n * k // count, n * (k + 1) // count
    f["longest"] = min(n, 1)
    no_long, zero = array_at(scratch, 0, np.int64), np.int64(0)
    if kind == DISTINCT:
        f["units"] = n
    elif kind == COMPRESSED:
        f["starts"], f["present_rows"] = scratch + places.present_starts, scratch + places.present_rows
        f["present_length"] = g["parts"] * places.piece
        starts = array_at(f["starts"], g["parts"] * places.piece, counters)
        begin = first_task
        for p in range(first, last):  # each part has a list of its own, and at least one task
            part, which = parts[p], p - first
            f["units"] += part["present"]
            end = first_task + which + 1
            end += (count - g["parts"]) * part["end"] // max(n, 1) if p < last - 1 else count - g["parts"]
            at, size = which * places.piece, end - begin
            cut(starts, at, part["present"], zero, no_long, no_long, tasks, begin, size)
            begin = end
    else:
        lead = parts[first]
        half = lead["half"]
        f["packed"], f["starts"] = scratch + half * places.other, late(scratch, places, half, zero)
        f["row_shift"] = lead["row_shift"]
        f["bag_of"] = late(scratch, places, half, places.bag_of) if g["weights"] else 0
        f["reciprocals"] = scratch + places.reciprocals if g["mean"] else 0
        starts = array_at(f["starts"], n + 1, counters)
        f["units"] = parts[last - 1]["first_head"] + parts[last - 1]["heads"]
        starts[np.uint64(f["units"])] = n
        behind = behind_starts(scratch, places, half, f["units"], counters.itemsize)
        list_all_long(g, f, parts, starts, behind)
        if kind == ENTRIES:
            row_starts = array_at(scratch + places.row_starts, min(n, table["rows"]) + 1, counters)
            f["row_starts"] = scratch + places.row_starts
            f["present"] = parts[last - 1]["first_row_head"] + parts[last - 1]["row_heads"]
            row_starts[np.uint64(f["present"])] = f["units"]
            f["long_length"] = f["blocks"] = 0
            cut(row_starts, zero, f["present"], zero, no_long, no_long, tasks, first_task, count)
        else:
            long = array_at(f["long"], f["long_length"], np.int64)
            at = f["long_first"] + 8 * (f["long_length"] + 1)
            saved = array_at(at, f["long_length"] + 1, np.int64)
            at += 8 * (f["long_length"] + 1)
            f["block_sums"] = scratch + places.block_sums if places.block_sums else (at + 63) & -64
            cut(starts, zero, f["units"], np.int64(ROW_COST), long, saved, tasks, first_task, count)
    if g["on_nonfinite"] != PROPAGATE:
        f["suspicious"] = not surely_finite(f["largest"], max(f["longest"], 1), g["values_bytes"])


@jit(inlined=False)
def list_all_long(g: Any, f: Any, parts: Any, starts: Any, behind: Any) -> None:
    """List the segments longer than a block of all parts, at ``behind``; parts have listed theirs further on.

    Then come the first block of each, and how many blocks there are; then what is saved before each, and in
    all: how many more ids than blocks they have.
    """
    n, count, first, width = g["ids_length"], g["parts"], g["first_part"], starts.itemsize
    long = array_at(behind, first_listed(n, f["units"], count, width), np.int64)
    listed = longest = np.int64(0)
    for which in range(count):
        part = parts[first + which]
        own = first_listed(n * which // count, part["first_head"], which, width)
        longest = max(longest, part["longest"])
        # The last segment of a part, of which only now it is known where it ends, comes after the others.
        for k in range(part["long"] + (part["heads"] > 0)):
            s = part["first_head"] + part["heads"] - 1
            if k < part["long"]:
                s = long[np.uint64(own + k)]
            length = np.int64(starts[np.uint64(s + 1)]) - np.int64(starts[np.uint64(s)])
            longest = max(longest, length)
            if length > BLOCK:
                long[np.uint64(listed)] = s
                listed += 1
    f["long"], f["long_first"] = behind, behind + 8 * listed
    long_first = array_at(f["long_first"], listed + 1, np.int64)
    saved = array_at(f["long_first"] + 8 * (listed + 1), listed + 1, np.int64)
    long_first[0] = saved[0] = 0
    for k in range(listed):
        s, at, following = long[np.uint64(k)], np.uint64(k), np.uint64(k + 1)
        length = np.int64(starts[np.uint64(s + 1)]) - np.int64(starts[np.uint64(s)])
        blocks = (length + BLOCK - 1) // BLOCK
        long_first[following] = long_first[at] + blocks
        saved[following] = saved[at] + length - blocks
    f["long_length"], f["blocks"], f["longest"] = listed, long_first[np.uint64(listed)], longest
