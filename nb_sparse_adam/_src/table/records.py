# SPDX-License-Identifier: Apache-2.0
"""What kernels know of an `EmbeddingTable`: the sole owner of where things lie in a row's record.

A row is one record: what is known of it, its parameters, both moments and, by elements, counts, side by side.
A step finds all of it in one place of memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import array_at
from nb_sparse_adam._src.engine.records import ELEMENT, ROW, record

# Words of 8 bytes at the beginning of a record, and in halves of them how often the id was seen, and, by
# rows, the count of steps. A record that is nobody's is zero, ``ADMITTED`` too: from 1 on, the order in which
# ids have come.
ID, TOUCHED, ADMITTED = 0, 1, 2
SEEN, COUNT = 6, 7
HEADER = 32  # bytes

ZEROS, NORMAL, UNIFORM, GIVEN = 0, 1, 2, 3  # initial values; given by the caller

STORE = record(
    "rows", "rows_length",  # address; of words of 8 bytes
    "stride",  # words of a record
    "dim",
    "used",  # records from here on have never been anybody's
    "free", "free_length",  # address of int64: records that are nobody's again; the last one goes first
    "clock",  # advances with every step, and with what `ages.Ages` notes
    "admitted",  # ids that have ever come
    "evicted",  # rows that have ever gone
    "dropped",  # ids of updates that had no row
    "initializer", "seed",  # ZEROS, NORMAL, UNIFORM or GIVEN
    reals=("first", "second"),  # mean and standard deviation, or both ends
)  # fmt: skip

CALL = record(
    "ids", "length",  # int64
    "rows",  # of each id, int64: -1 - k if it is not there, where k is the row of ``others`` in its place
    "later",  # (length,) int64 to work in
    "others", "others_length",  # (k, dim) vectors; 0 where they are zeros
    "out", "out_length",  # (n, dim)
    "trains",  # whether rows are marked as seen
    "threads",
    "missing",  # how many ids have no row: found by `lookups.FIND`, one number for each unit at first
    "counts", "counts_length",  # int64, one for each unit
    "offsets", "offsets_length", "weights", "mean",  # of bags
    "first",  # of the order in which ids come: the number of the first one
    "scratch", "scratch_length",  # int64
    "stage", "piece",  # of `inserting`: what has been done last, of which piece
    "wide", "wide_length", "columns",  # counts that have moved out of the records, int64; so many a row
)  # fmt: skip


class Rows(NamedTuple):
    """Records as kernels use them, all of them the same memory."""

    words: Any  # int64
    halves: Any  # uint32
    reals: Any  # of the table's dtype
    stride: Any  # words of a record
    dim: Any


def bytes_of_record(dim: int, itemsize: int, count_rule: int) -> int:
    """How many bytes a record takes: a multiple of 8."""
    size = HEADER + 3 * dim * itemsize + (4 * dim if count_rule == ELEMENT else 0)
    return -(-size // 8) * 8


def fields_of(
    records: NDArray[np.int64], dim: int, dtype: np.dtype[Any], count_rule: int
) -> dict[str, NDArray[Any]]:
    """See what records hold, by name, (rows,) or (rows, dim); they are rows of words, without gaps."""
    reals, halves = records.view(dtype), records.view(np.int32)
    found: dict[str, NDArray[Any]] = {
        "ids": records[:, ID], "admitted": records[:, ADMITTED], "touched": records[:, TOUCHED],
        "seen": records.view(np.uint32)[:, SEEN],
    }  # fmt: skip
    for k, name in enumerate(("param", "exp_avg", "exp_avg_sq")):
        first = HEADER // dtype.itemsize + k * dim
        found[name] = reals[:, first : first + dim]
    if count_rule == ROW:
        found["steps"] = halves[:, COUNT]
    elif count_rule == ELEMENT:
        first = (HEADER + 3 * dim * dtype.itemsize) // 4
        found["steps"] = halves[:, first : first + dim]
    return found


@jit
def open_rows(store: Any, real: Any, size: Any) -> Any:
    """Return the `Rows` of a record of `STORE`, of a dtype whose numbers have so many bytes."""
    place, length = store["rows"], store["rows_length"]
    reals = array_at(place, length * 8 // size, real)
    return Rows(
        array_at(place, length, np.int64), array_at(place, 2 * length, np.uint32), reals, store["stride"],
        store["dim"],
    )  # fmt: skip


@jit
def word_of(rows: Any, r: Any, word: Any) -> Any:
    """Where a word of the header of row r is."""
    return np.uint64(r * rows.stride + word)


@jit
def half_of(rows: Any, r: Any, half: Any) -> Any:
    """Where a half word of the header of row r is."""
    return np.uint64(2 * r * rows.stride + half)


@jit
def param_of(rows: Any, r: Any) -> Any:
    """Where the parameters of row r begin, in ``rows.reals``."""
    per_word = 8 // rows.reals.itemsize
    return r * rows.stride * per_word + HEADER // rows.reals.itemsize
