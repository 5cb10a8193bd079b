# SPDX-License-Identifier: Apache-2.0
"""What a gradient's ids, offsets and row pointers say, read from the memory of the user.

Another thread can change that memory at any moment. What is found here decides how a gradient is prepared;
where anything is written is decided by numbers that are read once and compared (`grouping`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.integers import integer
from nb_sparse_adam._src.engine.scratch import SPARE


@jit(inlined=False)
def scan_ids_of_part(ids: Any, first: Any, last: Any) -> Any:
    """Smallest and largest of the ids first:last, at least one, and how often they fall, and repeat."""
    smallest = largest = integer(ids, first)
    falls = repeats = np.int64(0)
    one = np.uint64(1)
    for i in range(np.uint64(first + 1), np.uint64(last)):
        here, before = integer(ids, i), integer(ids, np.uint64(i) - one)
        smallest, largest = min(smallest, here), max(largest, here)
        falls += here < before
        repeats += here == before
    return smallest, largest, falls, repeats


@jit(inlined=False)
def count_falls(offsets: Any, first: Any, last: Any) -> Any:
    """How many of the offsets first:last are less than the one before; first > 0."""
    falls = np.int64(0)
    one = np.uint64(1)
    for i in range(np.uint64(first), np.uint64(last)):
        falls += integer(offsets, i) < integer(offsets, np.uint64(i) - one)
    return falls


@jit(inlined=False)
def list_present(pointer: Any, first: Any, last: Any, rows: Any, starts: Any, at: Any, room: Any) -> Any:
    """List those of the rows first:last that store entries, and where each one's start, then their end.

    Parameters
    ----------
    pointer : `Integers`, (all rows + 1,)
        The user's: each number is read once.
    first, last : int64
        Rows.
    rows, starts : lists
        Written from ``at`` on.
    room : int64
        Places there, of which the last `SPARE` and one more are to remain free.

    Returns
    -------
    present : int64
        Rows listed, -1 if there are too many.
    falls : int64
        How often the pointer decreases.
    begin, end : int64
        Its first and its last number.
    """
    one = np.uint64(1)
    place, limit = np.uint64(at), np.uint64(at + room - SPARE - 1)
    fitting = np.int64(2**31 - 1 if starts.itemsize == 4 else 2**63 - 1)  # bits, whatever a wild start has
    begin = start = integer(pointer, first)
    falls = np.int64(0)
    for block in range(first, last, SPARE):
        if place > limit:
            break
        for r in range(np.uint64(block), np.uint64(min(block + SPARE, last))):
            # Written always and kept where there are entries: no branch to mispredict.
            rows[place] = r
            starts[place] = start & fitting
            end = integer(pointer, np.uint64(r) + one)
            place += np.uint64(end > start)
            falls += end < start
            start = end
    if place > limit:
        return np.int64(-1), falls, begin, start
    starts[place] = start & fitting
    return np.int64(place - np.uint64(at)), falls, begin, start


@jit(inlined=False)
def scan_columns(columns: Any, first: Any, last: Any, starts: Any, at: Any, present: Any) -> Any:
    """Smallest and largest of the columns first:last, and how often they do not increase within a row.

    The rows' entries begin at ``starts[at]``, ``starts[at + 1]`` and so on, ``present`` of them, and are
    first:last together.
    """
    lowest = highest = integer(columns, first) if last > first else np.int64(0)
    falls = np.int64(0)
    one = np.uint64(1)
    for e in range(np.uint64(first + 1), np.uint64(last)):  # row after row: that is vectorized
        here, before = integer(columns, e), integer(columns, np.uint64(e) - one)
        lowest, highest = min(lowest, here), max(highest, here)
        falls += here <= before
    for s in range(np.uint64(at + 1), np.uint64(at + present)):  # where a row begins, one may be smaller
        start = np.int64(starts[s])
        falls -= integer(columns, start) <= integer(columns, start - 1)
    return lowest, highest, falls


@jit(inlined=False)
def first_id_out_of_range(ids: Any, n: Any, limit: Any) -> Any:
    """Place and value of the first id that is not in 0..limit - 1; -1 if all are."""
    for i in range(n):
        value = integer(ids, i)
        if value < 0 or value >= limit:
            return np.int64(i), value
    return np.int64(-1), np.int64(0)


@jit(inlined=False)
def first_wrong_offset(offsets: Any, length: Any, n: Any, closed: Any) -> Any:
    """Place and value of the first offset that cannot be, and the one before; -1 if all can.

    They start at 0, never decrease and do not pass n; ``closed``: the last one is n.
    """
    before = np.int64(0)
    for i in range(length):
        value = integer(offsets, i)
        wrong = value > n or value < before or (i == 0 and value != 0)
        if wrong or (closed and i == length - 1 and value != n):
            return np.int64(i), value, before
        before = value
    return np.int64(-1), np.int64(0), np.int64(0)
