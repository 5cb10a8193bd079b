"""Duplicate ids -> sorted ids, each with the place of its values, cut into segments of one row each.

Every id is packed into one int64 with its payload, ``id << row_shift | payload``, and the packed ids are
sorted by a radix sort of the id's bits. The sort is stable, so that ids of one row stay in the order of the
gradient, whatever the number of threads; two buffers of 8 bytes an id are all the memory that it takes.

Ids and offsets may be the user's own arrays, which another thread can change after they were checked. So
what packs them reads each number once, compares it, and says if one cannot be; from then on only what was
packed counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numpy.typing import NDArray

from nb_sparse_adam.engine.compile import jit
from nb_sparse_adam.engine.intrinsics import address, array_at, matrix_at, take_turn
from nb_sparse_adam.engine.parallel import swap_threads
from nb_sparse_adam.engine.threads import ALONE, Crew, run

__all__ = [
    "DIGIT_BITS",
    "Buffers",
    "ChangedError",
    "Grouping",
    "IdBatch",
    "bits_of",
    "count_long",
    "cut_evenly",
    "fill_bags",
    "fill_long",
    "group_ids",
    "group_tables_parallel",
    "group_tables_serial",
    "scan_ids",
]

# 4 096 counters of 8 bytes fill the first-level cache; a pass more costs more than its misses (24 bits in two
# passes instead of three).
DIGIT_BITS = 12


class ChangedError(Exception):
    """Ids or offsets are not what they were when they were checked."""


class Grouping(NamedTuple):
    """Sorted ids and their segments; see `kernels.Segments`."""

    packed: NDArray[np.int64]  # (n,)
    starts: NDArray[Any]  # (segments + 1,) int32, or int64 for 2**31 ids and more
    row_shift: int
    payload_mask: int
    spare: NDArray[Any]  # (n,) of starts' dtype: memory that the sort no longer needs
    rest: NDArray[Any]  # (n - segments,), the same: behind starts; long where segments are


class IdBatch(NamedTuple):
    """The ids of several tables' gradients: element i of each array is about table i.

    What would be arguments and results of `group_ids`. Addresses stand for arrays, for compiled code cannot
    be given any number of those; whoever makes a batch keeps them.
    """

    ids: NDArray[np.int64]  # address
    highest: NDArray[np.int64]
    n: NDArray[np.int64]  # > 0, < 2**31 - 1
    nondecreasing: NDArray[np.int64]
    offsets: NDArray[np.int64]  # address of (bags + 1,) int64; 0: there are none
    bags: NDArray[np.int64]
    per_id: NDArray[np.int64]  # payloads are positions, and bags of positions are wanted
    id_bits: NDArray[np.int64]
    row_shift: NDArray[np.int64]
    first: NDArray[np.int64]  # where its n + 1 places begin, in each half of the memory
    first_long: NDArray[np.int64]  # the same, among long segments
    # Answers.
    changed: NDArray[np.int64]  # 1: see `ChangedError`; there are no other answers then
    half: NDArray[np.int64]  # 0 or 1: where packed ids are; `starts` and `spare` are in the other one
    segments: NDArray[np.int64]
    long: NDArray[np.int64]  # how many segments are longer than a block
    blocks: NDArray[np.int64]  # how many these have


class Buffers:
    """The two arrays that ids are sorted in, kept from step to step.

    Memory that is fresh from the system costs a page fault for every 4 kB, which took longer than the sort.
    They are lent: whoever takes them is alone with them until they are given back, and a step that begins
    within another one (in a signal handler) finds none and makes its own.
    """

    _TOO_LARGE = 16  # times what is needed: given up

    def __init__(self) -> None:
        self._kept: NDArray[np.int64] | None = None

    def take(self, n: int) -> NDArray[np.int64]:
        """Return an (2, n or more) array of any content."""
        kept, self._kept = self._kept, None
        if kept is None or not n <= kept.shape[1] <= self._TOO_LARGE * max(n, 1 << 12):
            return np.empty((2, n), np.int64)
        return kept

    def give_back(self, memory: NDArray[np.int64]) -> None:
        """Keep the memory for the next step; nobody uses it any more."""
        self._kept = memory


def bits_of(highest: int, n: int, offsets: NDArray[Any] | None) -> tuple[int, int]:
    """How many bits an id takes, and how many its payload; parameters as of `group_ids`, for n ids."""
    payloads = n if offsets is None else len(offsets) - 1
    return highest.bit_length(), max(payloads - 1, 0).bit_length()


def group_ids(
    ids: NDArray[Any],
    highest: int,
    nondecreasing: bool,
    offsets: NDArray[Any] | None = None,
    crew: Crew = ALONE,
    memory: NDArray[np.int64] | None = None,
) -> Grouping | None:
    """Sort ids and cut them into segments.

    Parameters
    ----------
    ids : (n,) integer array
        In 0..highest, n > 0.
    highest : int
        The largest id, or any bound above it: the number of bits to sort by.
    nondecreasing : bool
        Whether the ids are in order already.
    offsets : (bags + 1,) integer array, optional
        With it, the payload of an id is its bag; without it, its position.
    crew : Crew, default `ALONE`
        Threads to sort with; the result does not depend on them, for a stable sort has only one.
    memory : (2, n + 1 or more) int64 array, optional
        To sort in; the result is a part of it.

    Returns
    -------
    Grouping or None
        None if an id and its payload do not fit into 63 bits together.

    Raises
    ------
    ChangedError
        For an id or an offset that is not what the parameters say.
    """
    n = len(ids)
    id_bits, row_shift = bits_of(highest, n, offsets)
    if id_bits + row_shift > 63:
        return None
    packed, other = np.empty((2, n + 1), np.int64) if memory is None else memory[:, : n + 1]
    if offsets is None:
        fits = pack_positions(ids, highest, row_shift, packed)
    else:
        fits = pack_bags(ids, highest, offsets, row_shift, packed)
    if not fits:
        raise ChangedError
    if not nondecreasing and id_bits:
        passes = -(-id_bits // DIGIT_BITS)
        digit_bits = -(-id_bits // passes)
        ends = np.empty((crew.parts, 1 << digit_bits), np.int64)
        for number in range(passes):
            run(_RADIX_PASS, crew, packed[:n], other[:n], row_shift + number * digit_bits, ends)
            packed, other = other, packed
    halves = other.view(np.int32) if n < 2**31 - 1 else np.empty(2 * (n + 1), np.int64)
    segments = find_segments(packed[:n], row_shift, halves)
    return Grouping(
        packed=packed[:n],
        starts=halves[: segments + 1],
        row_shift=row_shift,
        payload_mask=(1 << row_shift) - 1,
        spare=halves[n + 1 : 2 * n + 1],
        rest=halves[segments + 1 : n + 1],
    )


@jit
def scan_ids(ids: Any) -> Any:
    """Smallest and largest id, and whether the ids never decrease and always increase; n > 0."""
    smallest = largest = ids[0]
    falls = 0
    repeats = 0
    for i in range(1, len(ids)):
        smallest = min(smallest, ids[i])
        largest = max(largest, ids[i])
        falls += ids[i] < ids[i - 1]
        repeats += ids[i] == ids[i - 1]
    return smallest, largest, falls == 0, falls + repeats == 0


@jit
def pack_positions(ids: Any, highest: Any, row_shift: Any, packed: Any) -> bool:
    """Pack each id with its position; return whether all are in 0..highest."""
    largest = np.uint64(0)  # a negative number is a large one
    for i in range(len(ids)):
        row = np.int64(ids[i])
        largest = max(largest, np.uint64(row))
        packed[i] = (row << row_shift) | i
    return bool(largest <= np.uint64(highest))


@jit
def pack_bags(ids: Any, highest: Any, offsets: Any, row_shift: Any, packed: Any) -> bool:
    """Pack each id with its bag; return whether all are in 0..highest, and in a bag."""
    largest = np.uint64(0)
    start, n = np.int64(0), np.int64(len(ids))
    for bag in range(len(offsets) - 1):
        end = np.int64(offsets[bag + 1])
        if end < start or end > n:
            return False
        for i in range(start, end):
            row = np.int64(ids[i])
            largest = max(largest, np.uint64(row))
            packed[i] = (row << row_shift) | bag
        start = end
    return bool(start == n and largest <= np.uint64(highest))


@jit
def count_digits(packed: Any, shift: Any, ends: Any, t: Any) -> None:
    """``ends[t]`` ← how often each digit occurs in the t-th part of the ids."""
    chunks, digits = ends.shape
    for digit in range(digits):
        ends[t, digit] = 0
    for i in range(len(packed) * t // chunks, len(packed) * (t + 1) // chunks):
        ends[t, (packed[i] >> shift) & (digits - 1)] += 1


@jit
def turn_counts_into_places(ends: Any) -> None:
    """``ends[t, digit]`` ← where the first id of the t-th part with that digit goes."""
    total = 0
    for digit in range(ends.shape[1]):
        for t in range(ends.shape[0]):
            count = ends[t, digit]
            ends[t, digit] = total
            total += count


@jit
def move_by_digit(packed: Any, out: Any, shift: Any, ends: Any, t: Any) -> None:
    """Move the t-th part of the ids to their places."""
    chunks, digits = ends.shape
    for i in range(len(packed) * t // chunks, len(packed) * (t + 1) // chunks):
        digit = (packed[i] >> shift) & (digits - 1)
        out[ends[t, digit]] = packed[i]
        ends[t, digit] += 1


@jit
def radix_pass_serial(packed: Any, out: Any, shift: Any, ends: Any) -> None:
    """One stable pass of a radix sort: by the bits from ``shift`` on that index an axis of ``ends``."""
    for t in range(len(ends)):
        count_digits(packed, shift, ends, t)
    turn_counts_into_places(ends)
    for t in range(len(ends)):
        move_by_digit(packed, out, shift, ends, t)


@jit(parallel=True)
def radix_pass_parallel(threads: Any, packed: Any, out: Any, shift: Any, ends: Any) -> None:
    """Do what `radix_pass_serial` does, on several threads."""
    before = swap_threads(threads)
    for t in prange(len(ends)):
        count_digits(packed, shift, ends, t)
    turn_counts_into_places(ends)
    for t in prange(len(ends)):
        move_by_digit(packed, out, shift, ends, t)
    swap_threads(before)


_RADIX_PASS = radix_pass_serial, radix_pass_parallel


@jit
def find_segments(packed: Any, row_shift: Any, starts: Any) -> Any:
    """Write where each segment starts, then the number of ids; return the number of segments."""
    segments = 0
    previous = np.int64(-1)
    for i in range(len(packed)):
        row = packed[i] >> row_shift
        # Written always and kept where a row begins: no branch to mispredict.
        starts[segments] = i
        segments += row != previous
        previous = row
    starts[segments] = len(packed)
    return segments


@jit
def fill_bags(offsets: Any, n: Any, bag_of: Any) -> bool:
    """``bag_of[i]`` ← the bag of position i; return whether each of n positions has one."""
    start = np.int64(0)
    for bag in range(len(offsets) - 1):
        end = np.int64(offsets[bag + 1])
        if end < start or end > n:
            return False
        for i in range(start, end):
            bag_of[i] = bag
        start = end
    return bool(start == n)


@jit
def count_long(starts: Any, block: Any) -> Any:
    """Length of the longest segment, number of segments longer than a block, and of blocks in these."""
    longest = starts[0]  # of a type that lets the loop be vectorized
    for s in range(len(starts) - 1):
        longest = max(longest, starts.dtype.type(starts[s + 1] - starts[s]))
    segments = 0
    blocks = 0
    if longest > block:
        for s in range(len(starts) - 1):
            length = np.int64(starts[s + 1]) - np.int64(starts[s])
            if length > block:
                segments += 1
                blocks += (length + block - 1) // block
    return longest, segments, blocks


@jit
def fill_long(starts: Any, block: Any, long: Any, long_first: Any) -> None:
    """List the segments longer than a block, and the first of each one's blocks."""
    which = 0
    long_first[0] = 0
    for s in range(len(starts) - 1):
        length = np.int64(starts[s + 1]) - np.int64(starts[s])
        if length > block:
            long[which] = s
            which += 1
            long_first[which] = long_first[which - 1] + (length + block - 1) // block


@jit
def cut_evenly(starts: Any, row_cost: Any, block: Any, any_long: Any, bounds: Any) -> None:
    """Cut segments into ``len(bounds) - 1`` runs of about equal cost.

    A segment costs its ids plus ``row_cost``; one longer than a block costs one id a block, for its blocks
    have been summed already.
    """
    segments = len(starts) - 1
    chunks = len(bounds) - 1
    bounds[0] = 0
    if not any_long:  # what the first s segments cost is known without a sum: search for the places
        total = np.int64(starts[segments]) + row_cost * segments
        for at in range(1, chunks):
            low, high = bounds[at - 1], np.int64(segments)
            while low < high:
                middle = (low + high) // 2
                if (np.int64(starts[middle]) + row_cost * middle) * chunks < at * total:
                    low = middle + 1
                else:
                    high = middle
            bounds[at] = low
        bounds[chunks] = segments
        return
    total = 0
    for s in range(segments):
        total += segment_cost(starts, s, row_cost, block)
    at = 1
    cost = 0
    for s in range(segments):
        while at < chunks and cost * chunks >= at * total:
            bounds[at] = s
            at += 1
        cost += segment_cost(starts, s, row_cost, block)
    for rest in range(at, chunks + 1):
        bounds[rest] = segments


@jit
def segment_cost(starts: Any, s: Any, row_cost: Any, block: Any) -> Any:
    length = np.int64(starts[s + 1]) - np.int64(starts[s])
    return row_cost + (length if length <= block else (length + block - 1) // block)


# --- several tables at once -------------------------------------------------------------------------------


@jit
def group_table(
    batch: Any, i: Any, memory: Any, long: Any, long_first: Any, ends: Any, t: Any, block: Any, like: Any
) -> None:
    """Group the ids of table i of a batch, in thread t; as `group_ids`, `count_long` and `fill_long` do."""
    n, row_shift, id_bits = batch.n[i], batch.row_shift[i], batch.id_bits[i]
    ids, starts_like, offsets_like = like
    given = array_at(batch.ids[i], n, ids)
    offsets = array_at(batch.offsets[i], batch.bags[i] + 1 if batch.offsets[i] else 0, offsets_like)
    places = memory.shape[1]
    half = 0
    packed = array_at(address(memory, batch.first[i]), n, memory)
    other = array_at(address(memory, places + batch.first[i]), n, memory)
    highest = batch.highest[i]
    if len(offsets) and not batch.per_id[i]:
        fits = pack_bags(given, highest, offsets, row_shift, packed)
    else:
        fits = pack_positions(given, highest, row_shift, packed)
    if not fits:
        batch.changed[i] = 1
        return
    if not batch.nondecreasing[i] and id_bits:
        passes = (id_bits + DIGIT_BITS - 1) // DIGIT_BITS
        digit_bits = (id_bits + passes - 1) // passes
        counters = matrix_at(address(ends, t << DIGIT_BITS), 1, 1 << digit_bits, ends)
        for number in range(passes):
            radix_pass_serial(packed, other, row_shift + number * digit_bits, counters)
            packed, other = other, packed
            half = 1 - half
    other_at = (1 - half) * places + batch.first[i]
    segments = find_segments(packed, row_shift, array_at(address(memory, other_at), n + 1, starts_like))
    starts = array_at(address(memory, other_at), segments + 1, starts_like)
    if batch.per_id[i]:
        bag_of = array_at(address(memory, other_at) + 4 * (n + 1), n, starts_like)
        if not fill_bags(offsets, n, bag_of):
            batch.changed[i] = 1
            return
    _, long_segments, blocks = count_long(starts, block)
    if long_segments:
        fill_long(
            starts,
            block,
            array_at(address(long, batch.first_long[i]), long_segments, long),
            array_at(address(long_first, batch.first_long[i] + i), long_segments + 1, long_first),
        )
    batch.half[i], batch.segments[i] = half, segments
    batch.long[i], batch.blocks[i] = long_segments, blocks


@jit
def group_tables_worker(
    turns: Any, order: Any, batch: Any, memory: Any, long: Any, long_first: Any, ends: Any, t: Any,
    block: Any, like: Any,
) -> None:  # fmt: skip
    """Take tables in turn with the other threads, until there are none left."""
    turn = take_turn(turns)
    while turn < len(order):
        group_table(batch, order[turn], memory, long, long_first, ends, t, block, like)
        turn = take_turn(turns)


@jit
def group_tables_serial(
    turns: Any, order: Any, batch: Any, memory: Any, long: Any, long_first: Any, ends: Any, block: Any,
    like: Any,
) -> None:  # fmt: skip
    """Group the ids of every table of a batch; ``like`` has an array of each dtype: ids, int32, int64."""
    group_tables_worker(turns, order, batch, memory, long, long_first, ends, 0, block, like)


@jit(parallel=True)
def group_tables_parallel(
    threads: Any, turns: Any, order: Any, batch: Any, memory: Any, long: Any, long_first: Any, ends: Any,
    block: Any, like: Any,
) -> None:  # fmt: skip
    """Do what `group_tables_serial` does on several threads, each with a row of ``ends``."""
    before = swap_threads(threads)
    for t in prange(len(ends)):
        group_tables_worker(turns, order, batch, memory, long, long_first, ends, t, block, like)
    swap_threads(before)
