# SPDX-License-Identifier: Apache-2.0
"""What kernels know of a step: the sole owner of names, order and units.

A step is a few records: for each of its gradients one of the table, one of the gradient, and one of what
preparing has found out; a list of tasks, each a run of one gradient's rows that one thread takes; and, on the
host, one that says where all of these are. Python writes the first two and the last, preparing the third and
the tasks. Kernels on a CPU and on a GPU read the same fields by name, ``record["name"]``: attributes do not
work where kernels run as plain Python.

Addresses are in bytes, and 0 where there is nothing; strides, lengths and offsets count elements of the array
that they are about. Everything is 8 bytes long, so that records are the same for every compiler.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ELEMENT, ROW, GLOBAL = 0, 1, 2  # count rules, as `step_counts` names them
RAISE, SKIP, PROPAGATE = 0, 1, 2  # what becomes of numbers that are not finite
POLICIES = {"raise": RAISE, "skip": SKIP, "propagate": PROPAGATE}  # as `on_nonfinite` names it

# Forms of a gradient, as it was given.
ROWS, BAGS, CSR, CSC, COO = 0, 1, 2, 3, 4

# What preparing has made of it: ids as they are, each once and in order; sorted ids in segments of one row
# each; compressed rows as they are; sorted entries, row * dim + column each, in segments of one entry each.
DISTINCT, SEGMENTS, COMPRESSED, ENTRIES = 0, 1, 2, 3

# Faults, in the order in which they are told.
NO_FAULT, ID, COLUMN, OFFSET, CHANGED, NOT_FINITE, WEIGHT_NOT_FINITE, OVERFLOW = 0, 1, 2, 3, 4, 5, 6, 7
TOO_MANY_BITS = 8  # a row, or an entry, and a position do not fit into 63 bits together


def record(*fields: str, reals: tuple[str, ...] = ()) -> np.dtype[np.void]:
    """Make the dtype of a record: fields of int64, and of float64."""
    numbers = [(name, np.int64) for name in fields]
    return np.dtype([*numbers, *((name, np.float64) for name in reals)], align=True)


TABLE = record(
    # The user's parameters: row r begins at r * param_stride.
    "param", "param_length", "param_stride", "rows", "dim",
    # Of rows that are records of their own: bytes of one, and how many of these lie before its parameters; in
    # which of those the time of the last step is noted, and the address of the clock, int64.
    "row_size", "lead", "noted_at", "clock",
    "spare",  # 1: the last row is none; gradients may name it, and what they have for it is left out
    # Moments: exp_avg of row r begins at r * state_stride, its exp_avg_sq exp_avg_sq_offset behind.
    "state", "state_length", "state_stride", "exp_avg_sq_offset",
    # Counts of active steps: those of row r begin at r * count_stride. One for the table: 0.
    "counts", "counts_length", "count_stride", "count_rule",  # ELEMENT, ROW or GLOBAL
    # Bias corrections, see `corrections.Corrections`: pairs for k = 0..K. Complete: none changes beyond K.
    "corrections", "corrections_length", "complete", "eps_hat",
    "totals",  # address of (2,) int64, the table's: steps that were applied, rows that were skipped
    # Hyper-parameters, rounded to the table's dtype; sign is -1 to maximize.
    reals=("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "lr", "eps", "sign",
           "log_beta1", "log_beta2"),
)  # fmt: skip

GRADIENT = record(
    "form",  # ROWS, BAGS, CSR, CSC or COO
    "on_nonfinite",  # RAISE, SKIP or PROPAGATE
    # Ids of rows, or, of CSR, columns; int32 or int64, and so many bytes each.
    "ids", "ids_length", "ids_bytes",
    "columns", "columns_bytes",  # of COO, as many
    # BAGS: where bags begin, and perhaps the end of the last. CSR and CSC: the pointer of rows, of columns.
    "offsets", "offsets_length", "offsets_bytes",
    # Rows of values, values_stride elements from one to the next: (values_rows, dim), or, of entries, (n, 1).
    "values", "values_rows", "values_stride", "values_dim", "values_bytes",
    "weights",  # BAGS: of each id, or 0
    "mean",  # BAGS: 1 if each row of values is divided by the number of its ids
    "parts",  # into how many parts preparing is cut: 1 if one thread does it all
    "first_part", "first_task",  # the first of its parts, and of its tasks, among those of the step
    "tasks",  # how many tasks there may be
    "scratch",  # address of as many bytes as `scratch.bytes_needed` says
)  # fmt: skip

FOUND = record(
    # The first fault, where it is, what is there and, of an offset, what is before it. Of OVERFLOW: the unit
    # (segment, row or entry), its row, and how many ids it is the sum of.
    "fault", "place", "got", "before",
    "kind",  # DISTINCT, SEGMENTS, COMPRESSED or ENTRIES
    "suspicious",  # 1 if a sum, or its square, might not be finite
    "units",  # how many rows, segments, compressed rows or entries there are
    "present",  # ENTRIES: how many rows these are of
    # Addresses in the gradient's scratch. Lists are int32, or int64 if wide.
    "wide",
    "packed", "row_shift",  # sorted: id << row_shift | payload, int64, ids_length of them
    "starts",  # list: where each segment begins, and the end of the last; of COMPRESSED, where rows do
    "bag_of",  # list: the bag of each position, where weights make the payload a position
    # COMPRESSED, list: the row of each place, with gaps between the parts of several threads; how many places
    # the lists of rows and of their starts have.
    "present_rows", "present_length",
    "row_starts",  # ENTRIES, list: the first entry of each row present, and the end of the last
    "long", "long_length", "long_first",  # int64: segments longer than a block; the first block of each
    "blocks", "block_sums",  # how many, and (blocks, values_dim) sums of them
    "reciprocals",  # BAGS with mean: (values_rows,) one divided by the number of ids
    "longest",  # ids of the longest segment
    reals=("value", "largest"),  # what is not finite; the largest magnitude of a term
)  # fmt: skip

TASK = record("gradient", "part", "parts", "first", "last", "skipped")

STEP = record(
    "tables", "gradients", "found", "length",  # (length,) TABLE, GRADIENT and FOUND
    "parts", "parts_length",  # `stages.PART`, which preparing works with
    "tasks", "tasks_length",  # TASK: those of all gradients, or, to be applied, of first:last alone
    "first", "last",  # the tables that are applied to, which are of one combination of dtypes and count rule
    "counters", "counters_length",  # list: so many of each thread, one thread's after another's
    # Rows of the tables' dtype for sums: how many elements there are, and how many each thread has.
    "scratch", "scratch_length", "scratch_stride",
    "status",  # address of an int64 that is set to 1 when everything has been applied
)  # fmt: skip


def joined(records: Sequence[NDArray[np.void]]) -> NDArray[np.void]:
    """Put arrays of one record side by side; ``np.concatenate`` compares all fields of each (20 µs)."""
    if len(records) == 1:
        return records[0]
    return np.frombuffer(bytearray().join([record.tobytes() for record in records]), records[0].dtype)


def packer(dtype: np.dtype[np.void]) -> struct.Struct:
    """Return what packs the numbers of a record, in its order: NumPy takes several times as long."""
    kinds = [dtype[name].kind for name in dtype.names or ()]
    return struct.Struct("".join("d" if kind == "f" else "q" for kind in kinds))
