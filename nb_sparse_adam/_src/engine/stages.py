# SPDX-License-Identifier: Apache-2.0
"""What preparing does to a part of a gradient: in stages, at the end of which the parts have to meet.

=======  ===================================================================================================
stage    what is done to a part
=======  ===================================================================================================
SCAN     ids in range? in order? offsets? rows present of a row pointer; the largest value; ids packed as
         soon as it is sure that they must be sorted
PACK     ids packed, where that was not sure
MOVE     one digit of a radix sort: packed ids moved to their places
COUNT    how often each digit occurs, for the next MOVE
HEADS    how many segments begin in the part
WRITE    where they begin
DONE
=======  ===================================================================================================

A part of ids is ``n * which // parts`` up to the same of ``which + 1``; so are parts of rows of values and of
a row pointer's rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.grouping import (
    bit_length,
    digits_of,
    list_long,
    pack_bags,
    pack_listed_rows,
    pack_pairs,
    pack_positions,
    write_bags,
    write_row_starts,
    write_starts,
)
from nb_sparse_adam._src.engine.integers import integer, integers
from nb_sparse_adam._src.engine.intrinsics import array_at
from nb_sparse_adam._src.engine.records import BAGS, COO, CSC, CSR, PROPAGATE, ROWS
from nb_sparse_adam._src.engine.scanning import (
    count_falls,
    list_present,
    scan_columns,
    scan_ids_of_part,
)
from nb_sparse_adam._src.engine.scratch import BLOCK, behind_starts, first_listed, late, places_of
from nb_sparse_adam._src.engine.screening import largest_bits

SCAN, PACK, MOVE, COUNT, HEADS, WRITE, DONE = 0, 1, 2, 3, 4, 5, 6

FEW = 48  # ids of one part that are sorted by insertion: zeroing counters would take longer

PART = np.dtype(
    [
        (name, np.int64)
        for name in (
            "gradient", "which",  # the which-th part of that gradient
            "turn",  # of the k-th record: the part that is the k-th unit of the phase
            # Of the first part only, about the gradient: what comes next; in which of both buffers packed
            # ids are; how many digits they are sorted by already; address of its counters.
            "stage", "half", "sorted_by", "counters",
            "row_shift", "digits", "digit_bits",
            # What was found; ids, columns and offsets each as they were read.
            "wrong", "columns_wrong", "changed",
            "falls", "repeats", "first_id", "last_id",
            "columns_fall", "offsets_fall", "begin", "end", "present",
            "magnitude", "weight_magnitude",
            "packed", "unsorted",
            "heads", "row_heads", "first_head", "first_row_head", "long", "longest",
        )
    ],
    align=True,
)  # fmt: skip
"""What preparing knows of a part of a gradient. Nothing of it need be set."""


@jit
def places_in(g: Any, table: Any, counters: Any) -> Any:
    """Return the `scratch.Places` of a gradient."""
    return places_of(
        g["form"], g["ids_length"], table["rows"], table["dim"], g["values_rows"], g["values_bytes"],
        g["parts"], g["mean"] != 0, g["weights"] != 0, counters.itemsize == 8,
    )  # fmt: skip


@jit
def pointer_of(g: Any, table: Any) -> Any:
    """How many bags, rows or columns offsets are about; 0 of gradients without."""
    if g["form"] == BAGS:
        return g["values_rows"]
    if g["form"] == CSR:
        return table["rows"]
    return table["dim"] if g["form"] == CSC else np.int64(0)


@jit(inlined=False)
def choose_bits(g: Any, table: Any, part: Any) -> None:
    """Decide how ids are packed, and by which digits they are sorted."""
    n, form = g["ids_length"], g["form"]
    keys, payloads = table["rows"], n
    if form == BAGS:
        payloads = g["values_rows"] if g["weights"] == 0 else n
    elif form != ROWS:
        keys *= table["dim"]
    id_bits = bit_length(keys - 1)
    part["row_shift"] = bit_length(payloads - 1)
    part["digits"], part["digit_bits"] = digits_of(id_bits, n, g["parts"])
    part["changed"] = 0
    part["packed"] = -1 if id_bits + part["row_shift"] > 63 else 0  # -1: cannot be


@jit(inlined=False)
def scan(g: Any, table: Any, places: Any, counters: Any, part: Any, lo: Any, hi: Any) -> None:
    """See what is in a part; set ``part["wrong"]`` and so on."""
    form, n, which, parts = g["form"], g["ids_length"], part["which"], g["parts"]
    ids = integers(g["ids"], n, g["ids_bytes"])
    part["wrong"] = part["columns_wrong"] = part["falls"] = part["repeats"] = 0
    part["columns_fall"] = part["offsets_fall"] = part["begin"] = part["end"] = part["present"] = 0
    if form == ROWS and hi > lo:
        smallest, largest, part["falls"], part["repeats"] = scan_ids_of_part(ids, lo, hi)
        part["wrong"] = smallest < 0 or largest >= table["rows"]
        part["first_id"], part["last_id"] = integer(ids, lo), integer(ids, hi - 1)
    if form in (ROWS, COO):
        return
    offsets = integers(g["offsets"], g["offsets_length"], g["offsets_bytes"])
    count = pointer_of(g, table)
    first, last = count * which // parts, count * (which + 1) // parts
    if form == CSR:
        length, at = parts * places.piece, which * places.piece
        rows = array_at(g["scratch"] + places.present_rows, length, counters)
        starts = array_at(g["scratch"] + places.present_starts, length, counters)
        present, falls, begin, end = list_present(offsets, first, last, rows, starts, at, places.piece)
        part["present"], part["offsets_fall"], part["begin"], part["end"] = present, falls, begin, end
        if present > 0 and falls == 0 and begin >= 0 and end <= n:
            lowest, highest, part["columns_fall"] = scan_columns(ids, begin, end, starts, at, present)
            part["columns_wrong"] = lowest < 0 or highest >= table["dim"]
        return
    length = g["offsets_length"]
    if length > 0:
        part["begin"] = integer(offsets, 0) if which == 0 else 0
        part["end"] = integer(offsets, length - 1) if which == parts - 1 else 0
        part["offsets_fall"] = count_falls(offsets, max(first, 1), min(last + 1, length))
    if g["mean"]:
        divide_by_sizes(g, places, first, last, offsets)


@jit(inlined=False)
def divide_by_sizes(g: Any, places: Any, first: Any, last: Any, offsets: Any) -> None:
    """``reciprocals[bag]`` ← one divided by the number of its ids, for the bags first:last."""
    place, bags, narrow = g["scratch"] + places.reciprocals, g["values_rows"], g["values_bytes"] == 4
    reciprocals4 = array_at(place, bags if narrow else 0, np.float32)
    reciprocals8 = array_at(place, 0 if narrow else bags, np.float64)
    start = integer(offsets, first) if last > first else np.int64(0)
    for bag in range(first, last):
        end = integer(offsets, bag + 1) if bag + 1 < g["offsets_length"] else g["ids_length"]
        size = end - start if 0 <= start < end else np.int64(1)  # whatever it is, it must not overflow
        if narrow:
            reciprocals4[np.uint64(bag)] = np.float32(1) / np.float32(size)
        else:
            reciprocals8[np.uint64(bag)] = np.float64(1) / np.float64(size)
        start = end


@jit(inlined=False)
def screen(g: Any, part: Any) -> None:
    """Find the largest value, and weight, of a part."""
    part["magnitude"] = part["weight_magnitude"] = 0
    if g["on_nonfinite"] == PROPAGATE:
        return
    which, parts, size, one = part["which"], g["parts"], g["values_bytes"], np.int64(1)
    rows, n = g["values_rows"], g["ids_length"]
    first, last = rows * which // parts, rows * (which + 1) // parts
    part["magnitude"] = largest_bits(g["values"], size, first, last, g["values_stride"], g["values_dim"])
    if g["weights"]:
        first, last = n * which // parts, n * (which + 1) // parts
        part["weight_magnitude"] = largest_bits(g["weights"], size, first, last, one, one)


@jit(inlined=False)
def pack(g: Any, table: Any, places: Any, counters: Any, part: Any, lo: Any, hi: Any, packed: Any) -> None:
    """Pack the ids of a part, each read once, with what they need."""
    form, n, shift, rows, dim = g["form"], g["ids_length"], part["row_shift"], table["rows"], table["dim"]
    ids = integers(g["ids"], n, g["ids_bytes"])
    if form == ROWS:
        part["changed"] |= not pack_positions(ids, lo, hi, rows, shift, packed)
    elif form == COO:
        columns = integers(g["columns"], n, g["columns_bytes"])
        rows_fit, columns_fit = pack_pairs(ids, columns, lo, hi, rows, dim, shift, packed)
        part["wrong"], part["columns_wrong"] = not rows_fit, not columns_fit
    elif form == CSR:
        length, at = g["parts"] * places.piece, part["which"] * places.piece
        present = array_at(g["scratch"] + places.present_rows, length, counters)
        starts = array_at(g["scratch"] + places.present_starts, length, counters)
        fit = pack_listed_rows(ids, present, starts, at, at + part["present"], dim, shift, packed)
        part["changed"] |= not fit
    else:
        offsets = integers(g["offsets"], g["offsets_length"], g["offsets_bytes"])
        weighted = form == BAGS and g["weights"] != 0
        scales = np.int64(1 if weighted else 0), np.int64(0)
        if form == CSC:
            scales = dim, np.int64(1)
        bags, length = pointer_of(g, table), g["offsets_length"]
        fit, in_bags = pack_bags(ids, lo, hi, rows, shift, packed, offsets, length, bags, n, scales)
        part["wrong"], part["columns_wrong"] = form == BAGS and not fit, form == CSC and not fit
        part["changed"] |= not in_bags


@jit
def must_sort(g: Any, part: Any) -> Any:
    """Whether it is sure already, from one part, that a gradient's ids must be packed."""
    if part["packed"] < 0 or part["wrong"] or part["columns_wrong"] or part["offsets_fall"]:
        return False
    if g["form"] == ROWS:
        return part["falls"] + part["repeats"] > 0
    return g["form"] != CSR


@jit(inlined=False)
def write(
    g: Any, table: Any, places: Any, counters: Any, part: Any, last_part: Any, lo: Any, hi: Any, packed: Any,
    half: Any,
) -> None:  # fmt: skip
    """Write where the segments of a part start, and list the long ones that begin and end in it.

    And the bags of weighted ids, at the positions of the part.
    """
    n, shift, first = g["ids_length"], part["row_shift"], part["first_head"]
    starts = array_at(late(g["scratch"], places, half, np.int64(0)), n + 1, counters)
    if g["form"] >= CSR:
        row_starts = array_at(g["scratch"] + places.row_starts, min(n, table["rows"]) + 1, counters)
        first_row = part["first_row_head"]
        write_row_starts(packed, lo, hi, shift, table["dim"], starts, row_starts, first, first_row)
    else:
        part["heads"] = write_starts(packed, lo, hi, shift, starts, first) - first
    if g["weights"] != 0:
        bag_of = array_at(late(g["scratch"], places, half, places.bag_of), n, counters)
        offsets = integers(g["offsets"], g["offsets_length"], g["offsets_bytes"])
        write_bags(offsets, g["offsets_length"], g["values_rows"], lo, hi, n, bag_of)
    # Of several parts HEADS has counted them: the thread that has the last one writes the same number again.
    segments, width = last_part["first_head"] + last_part["heads"], counters.itemsize
    at = behind_starts(g["scratch"], places, half, segments, width)
    at += 8 * first_listed(lo, first, part["which"], width)
    last = first + max(part["heads"], 1) - 1  # where the last one ends is not known yet
    part["longest"], part["long"] = list_long(starts, first, last, array_at(at, (hi - lo) // BLOCK, np.int64))
