# SPDX-License-Identifier: Apache-2.0
"""What a GPU's kernels know of a step besides the records that they share with a CPU's.

A step is laid out once, in one piece of memory that is copied to the GPU: a STEP, and lists of the records of
its gradients, in the order of their variants, those of rows before those of entries: TABLE, GRADIENT and
FOUND of `engine.records`, and SPAN. Kernels are given the address of the STEP. Addresses,
strides and lengths are as there.

All gradients of a step are looked at, sorted and cut by the same launches. Ids, offsets and rows of values
are numbered through from the first gradient to the last, and a thread finds the gradient of a number by the
number that each begins with (`SPAN`). Ids that must be grouped are packed one after the other, tile by tile;
no tile has ids of two gradients, so that a sort of digits, counted for each gradient by itself, is a sort by
(gradient, id).
"""

from __future__ import annotations

from nb_sparse_adam._src.cuda.device import SIMULATED
from nb_sparse_adam._src.engine.records import COLUMN, OFFSET, record

# Of a block. The simulator has a Python thread for each.
THREADS = 4 if SIMULATED else 256
# Of a sort: a block takes a tile of ids, each thread as many of them in a row.
SORT_THREADS = 4 if SIMULATED else 128
SORT_ITEMS = 4 if SIMULATED else 16
TILE = SORT_THREADS * SORT_ITEMS
SCAN_THREADS = 4 if SIMULATED else 1024
SCAN_ITEMS = 4
DIGIT_BITS = 6
DIGITS = 1 << DIGIT_BITS

NOWHERE = 2**63 - 1  # the worst of a gradient with which nothing is wrong
PLACE_BITS = 56
PLACE_MASK = (1 << PLACE_BITS) - 1


def rank_of(fault: int) -> int:
    """Return a number that is less the earlier a fault is told: of entries, offsets before columns."""
    return 2 * OFFSET + 1 if fault == COLUMN else 2 * fault


STEP = record(
    "refused",  # 1: nothing is written to any table
    "suspicious",  # 1 if a sum of any gradient, or its square, might not be finite
    # Addresses: of the lists, (length,) each, and (length + 1,) spans; of the guards' REFUSALs.
    "length", "tables", "gradients", "found", "spans", "variants",
    "guards", "guards_length",
    # Packed ids: (capacity,) int64 twice. They are packed into the first, and each pass of the sort moves
    # them from one to the other, unless they are in order.
    "capacity", "packed", "spare", "passes", "falls",
    # (tiles_capacity * DIGITS,) int32, and (tiles_capacity + 1,) each: how many segments, and rows of
    # entries, begin before a tile.
    "tiles_capacity", "digits", "heads", "row_heads",
    "starts",  # (capacity + 1,) int32: where segments begin, and the end of the last
    "entries", "row_starts",  # (entries + 1,) int32: the first segment of each row of entries, and the end
    "bad",  # (2 * capacity,) uint8: units to be skipped, by id; then those of segments or rows of entries
)  # fmt: skip

# A gradient's part of what is numbered through; behind that of the last gradient stands where all ends.
SPAN = record(
    "first_id", "first_offset", "first_row",
    "order",  # its place in the step, as it was given
    "checked",  # 0: what is wrong is not told
    "guard", "number",  # the optimizer's place among the guards, and from 1 on the table's in the optimizer
    "kind",  # of `guard.KINDS`
    # Found out on the GPU: rank << PLACE_BITS | place of the first fault, or NOWHERE; whether an id is less
    # than the one before, or not more; where the ids that must be grouped are, and in which tiles.
    "worst", "falls", "repeats", "first_packed", "first_tile",
    reals=("limit",),  # the magnitude from which on a sum might not have a finite square
)  # fmt: skip

# Gradients that one set of kernels updates: first:last, and how far it is.
VARIANT = record(
    "first", "last",
    "block_sums", "blocks", "block_dim",  # address, how many rows, and their length
    "blocks_in_order", "blocks_grouped",  # of the update's grids, that have finished
    "done_in_order", "done_grouped",  # 1: a kernel that is launched again does nothing
)  # fmt: skip

# What an optimizer has refused. Fields of FOUND have its names.
REFUSAL = record(
    "number",  # of the table, from 1 on; -1: it was another optimizer's; 0: nothing is refused
    "order", "kind", "ids",  # as in SPAN; how many ids there were
    "fault", "place", "got", "before",
    reals=("value",),
)  # fmt: skip
