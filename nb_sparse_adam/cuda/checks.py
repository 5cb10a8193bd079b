"""What a gradient on a GPU holds is looked at there; what is wrong with it is left in the table's words."""

from __future__ import annotations

import math
from typing import Any

from numba import cuda, int32, int64

from nb_sparse_adam.cuda.device import kernel
from nb_sparse_adam.cuda.layout import (
    AT_ID,
    AT_OFFSET,
    AT_SUM,
    AT_VALUE,
    AT_WEIGHT,
    BEFORE_OFFSET,
    BLOCKS_DONE,
    FALLS,
    FORM,
    GOT_ID,
    GOT_OFFSET,
    IDS,
    NOWHERE,
    REPEATS,
    SUSPICIOUS,
)

__all__ = ["begin", "check_ids", "check_offsets", "check_values", "join", "settle"]


@kernel
def begin(guard: Any, info: Any) -> None:
    """Forget the gradient before. What was wrong with one that has been refused is kept, to be reported."""
    if cuda.blockIdx.x != 0 or cuda.threadIdx.x != 0 or guard[0] != 0:
        return
    for word in range(FALLS, BLOCKS_DONE + 1):
        info[word] = 0
    for word in range(AT_OFFSET, AT_SUM + 1):
        info[word] = NOWHERE


@kernel
def check_ids(guard: Any, info: Any, ids: Any, upper: Any, watch_order: Any) -> None:
    """Find the first id that is not in 0..upper - 1; and whether ids fall, or do not rise, anywhere."""
    if guard[0] != 0:
        return
    wrong, falls, repeats = int64(NOWHERE), int32(0), int32(0)
    start = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    for i in range(start, ids.shape[0], int64(cuda.gridDim.x) * cuda.blockDim.x):
        row = int64(ids[i])
        if row < 0 or row >= upper:
            wrong = min(wrong, i)
        if watch_order != 0 and i > 0:
            before = int64(ids[i - 1])
            if row <= before:
                repeats = int32(1)
            if row < before:
                falls = int32(1)
    if wrong != NOWHERE:
        cuda.atomic.min(info, AT_ID, wrong)
    if repeats != 0:
        info[REPEATS] = 1
    if falls != 0:
        info[FALLS] = 1


@kernel
def check_offsets(guard: Any, info: Any, offsets: Any, n: Any, closed: Any) -> None:
    """Find the first offset that cannot be: they begin at 0, never fall, and end at n, at most or exactly."""
    if guard[0] != 0:
        return
    length = offsets.shape[0]
    start = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    for i in range(start, length, int64(cuda.gridDim.x) * cuda.blockDim.x):
        here = int64(offsets[i])
        wrong = here > n or (closed != 0 and i == length - 1 and here != n)
        if i == 0:
            wrong = wrong or here != 0
        else:
            wrong = wrong or here < int64(offsets[i - 1])
        if wrong:
            cuda.atomic.min(info, AT_OFFSET, i)


@kernel
def check_values(
    guard: Any, info: Any, word: Any, values: Any, rows: Any, columns: Any, apart: Any, limit: Any
) -> None:
    """Find the first value that is not finite, and whether all are smaller than a limit."""
    if guard[0] != 0:
        return
    wrong, suspicious = int64(NOWHERE), int32(0)
    group = int64(cuda.blockIdx.x) * cuda.blockDim.y + cuda.threadIdx.y
    for row in range(group, rows, int64(cuda.gridDim.x) * cuda.blockDim.y):
        for j in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
            magnitude = abs(values[row * apart + j])
            if not magnitude < limit:
                suspicious = int32(1)
                if not magnitude < math.inf:
                    wrong = min(wrong, row * columns + j)
    if wrong != NOWHERE:
        cuda.atomic.min(info, word, wrong)
    if suspicious != 0:
        info[SUSPICIOUS] = 1


@kernel
def settle(
    guard: Any, info: Any, got: Any, ids: Any, offsets: Any, values: Any, columns: Any, apart: Any,
    weights: Any, raising: Any, form: Any, number: Any,
) -> None:  # fmt: skip
    """Refuse the step if something is wrong, and note what is there: arrays may be gone when it is told."""
    if cuda.blockIdx.x != 0 or cuda.threadIdx.x != 0 or guard[0] != 0:
        return
    refused = int64(0)
    info[FORM] = form
    info[IDS] = ids.shape[0]
    at = info[AT_OFFSET]
    if at != NOWHERE:
        refused = int64(1)
        info[GOT_OFFSET] = offsets[at]
        info[BEFORE_OFFSET] = offsets[at - 1] if at > 0 else 0
    at = info[AT_ID]
    if at != NOWHERE:
        refused = int64(1)
        info[GOT_ID] = ids[at]
    if raising != 0 and refused == 0:
        at = info[AT_WEIGHT]
        if at != NOWHERE:
            refused = int64(1)
            got[1] = weights[at]
        at = info[AT_VALUE]
        if at != NOWHERE:
            refused = int64(1)
            got[0] = values[(at // columns) * apart + at % columns]
    guard[0] = number if refused != 0 else 0


@kernel
def join(one: Any, other: Any) -> None:
    """Refuse what one optimizer has refused for another one, too: a step of both is all or nothing."""
    if cuda.blockIdx.x == 0 and cuda.threadIdx.x == 0 and other[0] != 0 and one[0] == 0:
        one[0] = -1
