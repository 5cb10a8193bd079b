# SPDX-License-Identifier: Apache-2.0
"""Records as a GPU's kernels use them: arrays at addresses, and whose gradient a number is of.

Functions of a GPU cannot return arrays, and of a record they return a copy: kernels make arrays themselves,
of an address and a length, or get them in a tuple, and take records out of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import int64, uint64

from nb_sparse_adam._src.cuda import records
from nb_sparse_adam._src.cuda.device import arrays_at, device_function
from nb_sparse_adam._src.engine.records import FOUND, GRADIENT, TABLE

bytes_at, shorts_at, longs_at = arrays_at(np.uint8), arrays_at(np.int32), arrays_at(np.int64)
singles_at, doubles_at = arrays_at(np.float32), arrays_at(np.float64)
steps_at, tables_at, gradients_at = arrays_at(records.STEP), arrays_at(TABLE), arrays_at(GRADIENT)
found_at, spans_at, variants_at = arrays_at(FOUND), arrays_at(records.SPAN), arrays_at(records.VARIANT)
refusals_at = arrays_at(records.REFUSAL)


class Lists(NamedTuple):
    """The records of a step's gradients, see `records.STEP`."""

    tables: Any
    gradients: Any
    found: Any
    spans: Any


@device_function
def lists_of(step: Any) -> Any:
    """Return the lists of a step; a tuple may hold arrays."""
    length = step["length"]
    return Lists(
        tables_at(step["tables"], length), gradients_at(step["gradients"], length),
        found_at(step["found"], length), spans_at(step["spans"], length + 1),
    )  # fmt: skip


# --- whose a number is --------------------------------------------------------------------------------------


def last_not_above(value_of: Any) -> Any:
    """Make ``find(given, low, high, number)``: the last i in low:high whose value is not above a number.

    ``value_of(given, i)`` is a function that kernels call, and never falls; ``given`` is what it needs. It is
    not asked about the first, ``low``, which is found where all others are above.
    """

    @device_function
    def find(given: Any, low: Any, high: Any, number: Any) -> Any:
        low, high = int64(low), int64(high)
        while low + 1 < high:
            middle = (low + high) // 2
            if value_of(given, middle) <= number:
                low = middle
            else:
                high = middle
        return low

    return find


def finder(field: str) -> Any:
    """Make ``find(spans, low, high, number)``: which of the gradients low:high a number is of.

    A gradient begins at ``spans[i][field]``; of those that begin at one number all but the last are empty.
    Indices are unsigned, as this one is: they cannot count from the end, which would take registers.
    """

    @device_function
    def begin_of(spans: Any, i: Any) -> Any:
        return spans[uint64(i)][field]

    last = last_not_above(begin_of)

    @device_function
    def find(spans: Any, low: Any, high: Any, number: Any) -> Any:
        return uint64(last(spans, low, high, number))

    return find


find_id, find_offset, find_row = finder("first_id"), finder("first_offset"), finder("first_row")
find_packed, find_tile = finder("first_packed"), finder("first_tile")


# --- integers of 4 or 8 bytes -------------------------------------------------------------------------------


class Integers(NamedTuple):
    """int32 or int64, as a gradient has them."""

    address: Any
    length: Any
    bytes: Any


@device_function
def ids_of(gradient: Any) -> Any:
    """Return the ids of a gradient, or the columns of its entries."""
    return Integers(gradient["ids"], gradient["ids_length"], gradient["ids_bytes"])


@device_function
def offsets_of(gradient: Any) -> Any:
    """Return the offsets of bags, or the row pointer."""
    return Integers(gradient["offsets"], gradient["offsets_length"], gradient["offsets_bytes"])


@device_function
def integer(integers: Any, i: Any) -> Any:
    """Return the i-th of them as int64."""
    if integers.bytes == 4:
        return int64(shorts_at(integers.address, integers.length)[uint64(i)])
    return longs_at(integers.address, integers.length)[uint64(i)]


find_place = last_not_above(integer)


@device_function
def bag_of_id(gradient: Any, p: Any) -> Any:
    """Return the bag of an id, whatever the offsets hold."""
    return find_place(offsets_of(gradient), 0, gradient["values_rows"], p)


@device_function
def row_of_entry(gradient: Any, e: Any) -> Any:
    """Return the row of an entry of compressed rows, whatever the row pointer holds."""
    return find_place(offsets_of(gradient), 0, gradient["offsets_length"] - 1, e)


# --- sorted ids ---------------------------------------------------------------------------------------------


@device_function
def sorted_ids(step: Any) -> Any:
    """Address of the packed ids when the sort is done."""
    return step["spare"] if step["falls"] != 0 and step["passes"] % 2 == 1 else step["packed"]
