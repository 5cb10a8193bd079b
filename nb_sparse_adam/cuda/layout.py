"""What kernels are given: words that they leave for each other, gradients, tables."""

from __future__ import annotations

from typing import Any, NamedTuple

from nb_sparse_adam.cuda.device import SIMULATED

# Of a block. The simulator has a Python thread for each.
THREADS = 4 if SIMULATED else 256
# Of a sort: a block takes a tile of ids, each thread as many of them in a row.
SORT_THREADS = 4 if SIMULATED else 128
SORT_ITEMS = 4 if SIMULATED else 16
TILE = SORT_THREADS * SORT_ITEMS
SCAN_THREADS = 4 if SIMULATED else 1024
SCAN_ITEMS = 4

# Words of a table in one step, int64. What was found out about a gradient:
FALLS, REPEATS, SUSPICIOUS = 0, 1, 2  # an id is less than the one before, or not more; sums may overflow
SEGMENTS, PRESENT = 3, 4  # how many rows or entries it has; of entries, how many rows
# How far the step is, and the table:
BLOCKS_DONE, DONE, SKIPPED = 5, 6, 7
# The first position that is wrong, `NOWHERE` if none is:
AT_OFFSET, AT_ID, AT_VALUE, AT_WEIGHT, AT_SUM = 8, 9, 10, 11, 12
# What is there; for offsets, what is before it; for sums, the row and the number of ids:
GOT_OFFSET, BEFORE_OFFSET, GOT_ID, GOT_ROW, GOT_IDS = 13, 14, 15, 16, 17
FORM, IDS = 18, 19  # what the gradient was, for the message, and how many ids it had
WORDS = 20
NOWHERE = 2**63 - 1

ONE_EACH, PER_ROW, PER_ID = 0, 1, 2  # coefficients: there are none; one a row of values; one an id


class Gradient(NamedTuple):
    """A gradient, as far as kernels need it; compare `nb_sparse_adam.engine.kernels.Segments`.

    Ids that increase are used as they are. Others are packed, ``id << row_shift | payload``, sorted, and cut
    into segments; the payload is the row of ``values``, or the position of the id.
    """

    info: Any  # (WORDS,) int64
    ids: Any  # (n,) int32 or int64
    packed: Any  # (n,) int64, sorted
    starts: Any  # (n + 1,) int32: where segments begin
    values: Any  # 1-D: rows of values, ``apart`` elements from one to the next
    bag_of: Any  # (n,) int32 where coefficients are PER_ID, else (0,)
    coefficients: Any  # (n,), (rows of values,) or (0,)
    block_sums: Any  # 1-D: those of long segments, dim elements each
    bad: Any  # (n,) uint8: rows to be skipped, where sums are suspicious
    row_starts: Any  # entries: (n + 1,) int32, where rows begin among the segments; else (0,)
    row_shift: Any
    payload_mask: Any
    apart: Any
    kind: Any  # of coefficients
    whole: Any  # 1 where ids must be grouped though they increase, as those of bags


class Table(NamedTuple):
    """A table in one step; compare `nb_sparse_adam.engine.kernels.View`."""

    param: Any  # 1-D, as are all
    moments: Any  # exp_avg of row r from 2 * r * dim on, then its exp_avg_sq
    counts: Any
    corrections: Any  # see `corrections.Corrections`
    rows: Any
    dim: Any
    most: Any  # the highest count of its type
    last: Any  # the K of ``corrections``
    eps_hat: Any
    log_beta1: Any
    log_beta2: Any
    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    lr: Any
    eps: Any
    sign: Any
