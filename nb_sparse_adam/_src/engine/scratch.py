# SPDX-License-Identifier: Apache-2.0
"""The memory that preparing a gradient works in: how much it is, and what lies where in it.

All of it is bounded by what is known beforehand, so that Python makes it, once, and no kernel allocates.
Python asks `bytes_needed`, kernels ask `places_of`: both are the same lines.

Once ids are sorted, the half of the memory that they are not in is free. The starts of segments are written
to its begin, and what follows lies behind them, if it fits. Only segments longer than a block need lists and
sums of blocks there; with one start for its many ids, each leaves more room than they take, up to some 250
columns.

Lists of places, and counters of them, are int32, or int64 in a step with a gradient that needs that: kernels
are compiled for either, and take them to be of the dtype of the step's `counters`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.records import BAGS, CSR, ROWS

# The ids of one row are summed in blocks of this many, and the blocks' sums are added in order. Fixed, for
# the bits depend on it: a row that takes half of a batch can then be summed by many threads.
BLOCK = 512

# 4 096 counters of 8 bytes fill the first-level cache; a pass more costs more than its misses (24 bits in two
# passes instead of three).
DIGIT_BITS = 12

FEW = 256  # ids, for which the bytes are not counted

SPARE = 64  # places of a list of rows: what may be written before it is seen that there are too many

_INT32_PLACES = 2**31 - 1


class Places(NamedTuple):
    """Where each array begins in the scratch of one gradient, in bytes, and the end of the last."""

    packed: Any  # (n + 1,) int64
    other: Any  # (n + 1,) int64: what packed ids are moved to, then (segments + 1,) starts
    bag_of: Any  # `late`: list, (n,)
    reciprocals: Any  # (values_rows,) of the values' dtype
    block_sums: (
        Any  # (2n // BLOCK, dim) of the values' dtype; 0 if they lie behind the lists of long segments
    )
    counters: Any  # list, (parts, 1 << DIGIT_BITS), if there are several parts
    row_starts: Any  # list, (min(n, rows) + 1,)
    present_rows: Any  # list, (parts, piece)
    present_starts: Any  # the same
    piece: Any  # how many places a part has there, no bytes
    end: Any


def is_wide(n: int, rows: int, values_rows: int) -> bool:
    """Whether a gradient needs lists of int64; parameters as of `bytes_needed`."""
    return n >= _INT32_PLACES or rows >= _INT32_PLACES or values_rows >= _INT32_PLACES


def _places(
    form: Any, n: Any, rows: Any, dim: Any, values_rows: Any, values_bytes: Any, parts: Any, mean: Any,
    weighted: Any, wide: Any,
) -> Any:  # fmt: skip
    width = 8 if wide else 4
    entries = form != ROWS and form != BAGS
    rest, lines = 63, -64  # sizes are rounded up to whole cache lines: no two arrays share one
    other = (8 * (n + 1) + 8 * parts + 4 * 64 + rest) & lines  # with what rounding takes behind the starts
    bags = width * n if weighted else 0
    bags_fit = not wide
    reciprocals = 2 * other + (0 if bags_fit else (bags + rest) & lines)
    block_sums = reciprocals + (((values_bytes * values_rows if mean else 0) + rest) & lines)
    # A segment longer than a block leaves so many bytes for each block of BLOCK ids, and needs at most two
    # sums for it (it has BLOCK + 1 ids or more), and three numbers in lists.
    left = BLOCK * (width if weighted and bags_fit else 8)
    sums_fit = entries or 2 * dim * values_bytes + 3 * 8 <= left
    sums = 0 if sums_fit else (2 * n // BLOCK) * dim * values_bytes
    counters = block_sums + ((sums + rest) & lines)
    row_starts = counters + ((width * parts << DIGIT_BITS) if parts > 1 else 0)
    present_rows = row_starts + (((width * (min(n, rows) + 1) if entries else 0) + rest) & lines)
    piece = min((rows + parts - 1) // parts, n) + 1 + SPARE if form == CSR else 0
    pieces = (width * piece * parts + rest) & lines
    return Places(
        0, other, (other - bags) & lines if bags_fit else 2 * other, reciprocals,
        0 if sums_fit else block_sums, counters, row_starts, present_rows, present_rows + pieces, piece,
        present_rows + 2 * pieces,
    )  # fmt: skip


places_of = jit(inlined=False)(_places)
"""Return the `Places` of a gradient; parameters as of `bytes_needed`, and whether lists are wide."""


@jit
def late(scratch: Any, places: Any, half: Any, place: Any) -> Any:
    """Return the address of a place in the half that packed ids, now in ``half``, are not in; or behind both.

    Ids are moved there by a digit. Once they are sorted, starts are written there, and what follows.
    """
    return scratch + place + ((1 - half) * places.other if place < places.other else 0)


@jit
def behind_starts(scratch: Any, places: Any, half: Any, segments: Any, width: Any) -> Any:
    """Return the address of what lies behind the starts of so many segments, and the end of the last."""
    return late(scratch, places, half, 0) + ((width * (segments + 1) + 7) & -8)


@jit
def first_listed(lo: Any, first_head: Any, which: Any, width: Any) -> Any:
    """Return the place of the first long segment that a part lists, of int64 from `behind_starts` on.

    ``lo`` is the part's first id, and ``first_head`` the first segment that begins there. The long segments
    before have left that room, but for one that goes on into the next part.
    """
    return ((lo - first_head) * width >> 3) + which


def bytes_needed(
    form: int,
    n: int,
    rows: int,
    dim: int,
    values_rows: int,
    values_bytes: int,
    parts: int,
    mean: bool,
    weighted: bool,
    wide: bool = False,
) -> int:
    """How many bytes of scratch a gradient needs; the first one's address is a multiple of 8, better of 64.

    Parameters
    ----------
    form : int
        Of `records`: ROWS, BAGS, CSR, CSC or COO.
    n : int
        Ids, or entries.
    rows, dim : int
        Of the table.
    values_rows, values_bytes : int
        Rows of values, and the size of a value.
    parts : int
        Into how many parts preparing is cut.
    mean, weighted : bool
        Of bags: whether they are divided by the number of their ids; whether each id has a weight.
    wide : bool
        Whether lists are of int64, for which it is enough that one gradient of the step needs that.
    """
    if form == ROWS and n < FEW and parts == 1:  # no blocks
        return 16 * FEW + 512
    places = _places(form, n, rows, dim, values_rows, values_bytes, parts, mean, weighted, wide)
    return int(places.end)
