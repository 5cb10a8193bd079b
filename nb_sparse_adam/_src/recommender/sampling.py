# SPDX-License-Identifier: Apache-2.0
"""Kernels that sample negatives: uniformly, or by the popularity of the items.

Both draw among the items that the user does not have, without ever rejecting a draw. A random number is a
function of a key and of the place in the epoch; a draw is arithmetic on integers, so that the samples are the
same on any number of threads. Nothing is validated here, and nothing allocated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.intrinsics import address, prefetch_line
from nb_sparse_adam._src.engine.random import random_bits, splitmix64
from nb_sparse_adam._src.engine.threads import Partition, run, usable_threads

BLOCK = 64  # interactions that a thread takes at a time; the losses of each block are summed on their own

_AHEAD = 8  # interactions between the one that is looked up and the one that is prefetched
_MASS = 0.99 * 2**52  # of all items, about; below 2⁵², so that float64 holds every mass
_PER_BIT = 2.0**-53


class Source(NamedTuple):
    """The training interactions."""

    users: NDArray[np.int32]  # (interactions,)
    indptr: NDArray[np.int64]  # (n_users + 1,)
    indices: NDArray[np.int32]  # (interactions,) items, ascending within a user
    n_items: int


class Masses(NamedTuple):
    """Items by popularity: each has a mass, an integer, and is drawn with its share of the masses.

    The masses lie side by side on a line, in the order of the items. What a user has is cut out of the line.
    """

    ends: NDArray[np.int64]  # (n_items,) where the mass of each item ends
    guide: NDArray[np.int32]  # (buckets + 1,) the first item that ends after ``bucket << shift``
    shift: int
    taken: NDArray[np.int64]  # (interactions,) mass of the user's items up to this one
    before: NDArray[np.int64]  # (interactions,) mass before this item of what the user does not have


def masses_of(popularity: NDArray[np.int64], power: float, source: Source) -> Masses:
    """Give each item a mass that is proportional to its popularity to some power.

    Parameters
    ----------
    popularity : int64 array, shape (n_items,)
        Interactions of each item. An item without any has no mass, and is never drawn.
    power : float
    source : Source

    Returns
    -------
    Masses
    """
    known = popularity > 0
    weights = np.where(known, popularity / max(int(popularity.max(initial=1)), 1), 0.0) ** power * known
    scale = _MASS / max(float(weights.sum()), 1.0)
    mass = np.maximum(np.rint(weights * scale).astype(np.int64), known)
    ends = np.cumsum(mass)
    buckets = 1 << max(source.n_items - 1, 1).bit_length()
    total = int(ends[-1])
    shift = max(total.bit_length() - (buckets.bit_length() - 1), 0)
    starts = np.arange(buckets + 1, dtype=np.int64) << shift
    guide = np.minimum(np.searchsorted(ends, starts, side="right"), source.n_items - 1).astype(np.int32)
    of_users = mass[source.indices]
    counts = np.diff(source.indptr)
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(of_users)])  # differences survive an overflow
    taken = sums[1:] - np.repeat(sums[source.indptr[:-1]], counts)
    return Masses(ends, guide, shift, taken, ends[source.indices] - taken)


def launch(kernel: Drivers, requested: int | None, interactions: int, *arguments: Any) -> None:
    """Run a kernel on the threads of the options, or on this one alone if there is little to do."""
    threads = 1 if interactions < 4 * BLOCK else usable_threads(requested)
    run(kernel, Partition(threads, threads), arguments)


@jit
def absent(indices: Any, low: Any, high: Any, rank: Any) -> Any:
    """Return the item that comes at `rank`, from 0, among those not in the ascending ``indices[low:high]``.

    Before the k-th item of a user's list stand ``indices[low + k] - k`` items that are not in the list, an
    ascending sequence. So one binary search finds the item, and no draw is ever rejected, however many items
    the user has.
    """
    start = low
    while low < high:
        middle = (low + high) // 2
        if indices[middle] - (middle - start) <= rank:
            low = middle + 1
        else:
            high = middle
    return rank + (low - start)


@jit
def place_interaction(
    t: Any, order: Any, source: Any, size: Any, negatives: Any, users: Any, items: Any
) -> Any:
    """Write user and item of interaction t of ``order``; return the user and the place of its samples."""
    n = len(order)
    if t + _AHEAD < n:
        prefetch_line(address(source.users, order[t + _AHEAD]))
        prefetch_line(address(source.indices, order[t + _AHEAD]))
    interaction = order[t]
    user = source.users[interaction]
    batch = t // size * size  # the place of the batch's first interaction
    n_batch = min(size, n - batch)
    place = batch * (1 + negatives) + (t - batch)
    users[t] = user
    items[place] = source.indices[interaction]
    return user, place + n_batch + (t - batch) * (negatives - 1)


@jit
def sample_worker(
    begin: Any, end: Any, key: Any, first: Any, order: Any, source: Any, size: Any, users: Any, items: Any
) -> None:
    """Do what `sample` does, for the interactions begin:end of ``order``."""
    negatives = len(items) // len(order) - 1
    for t in range(begin, end):
        user, place = place_interaction(t, order, source, size, negatives, users, items)
        low, high = source.indptr[user], source.indptr[user + 1]
        free = np.uint64(source.n_items - (high - low))
        for k in range(negatives):
            # bits · free / 2³² is below free, and uniform but for free / 2³².
            bits = random_bits(key, (first + t) * negatives + k)
            rank = np.int64((bits * free) >> np.uint64(32))
            items[place + k] = absent(source.indices, low, high, rank)


@jit
def absent_by_mass(masses: Any, low: Any, high: Any, rank: Any) -> Any:
    """Return the item whose mass holds `rank`, from 0, on the line without the masses of ``low:high``.

    One binary search says how many of the user's items come before it. On the whole line a guide table (Chen
    & Asau 1974) leaves one item or two to choose from, on average, and a binary search of them.
    """
    start = low
    while low < high:
        middle = (low + high) // 2
        if masses.before[middle] <= rank:
            low = middle + 1
        else:
            high = middle
    if low > start:
        rank += masses.taken[low - 1]
    bucket = rank >> masses.shift
    low, high = np.int64(masses.guide[bucket]), np.int64(masses.guide[bucket + 1])
    while low < high:
        middle = (low + high) // 2
        if masses.ends[middle] <= rank:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def sample_by_mass_worker(
    begin: Any,
    end: Any,
    key: Any,
    first: Any,
    order: Any,
    source: Any,
    masses: Any,
    size: Any,
    users: Any,
    items: Any,
) -> None:
    """Do what `sample_by_mass` does, for the interactions begin:end of ``order``."""
    negatives = len(items) // len(order) - 1
    total = masses.ends[len(masses.ends) - 1]
    for t in range(begin, end):
        user, place = place_interaction(t, order, source, size, negatives, users, items)
        low, high = source.indptr[user], source.indptr[user + 1]
        free = total - (masses.taken[high - 1] if high > low else 0)
        for k in range(negatives):
            bits = splitmix64(key, (first + t) * negatives + k) >> np.uint64(11)
            rank = min(np.int64(np.float64(bits) * _PER_BIT * np.float64(free)), free - 1)
            items[place + k] = absent_by_mass(masses, low, high, rank)


def kind_of(job: tuple[Any, ...]) -> tuple[Any, ...]:
    """Say what numba's types of a job's arrays depend on: dtype, layout, whether it may be written to."""
    arrays = [each if isinstance(each, np.ndarray) else None for each in job]
    return tuple(None if a is None else (a.dtype, a.ndim, a.flags.num) for a in arrays)


@jit(entry=True)
def _sample_begin(phase: Any, job: Any) -> Any:
    """How many blocks of interactions there are."""
    return np.int64((len(job[2]) + BLOCK - 1) // BLOCK if phase == 0 else -1)


@jit(entry=True)
def _sample_work(phase: Any, block: Any, t: Any, job: Any) -> None:  # noqa: ARG001
    """Sample for one block of interactions."""
    key, first, order, user_of, indptr, indices, n_items, size, users, items = job
    source = Source(user_of, indptr, indices, n_items)
    begin = block * BLOCK
    sample_worker(begin, min(begin + BLOCK, len(order)), key, first, order, source, size, users, items)


# Look up the interactions of some batches, and sample other items for each: job (key, first, order, *source,
# size, users, items), with a `Source`. The random numbers are a function of ``key`` (uint64) and of the
# interaction's place in the epoch, which is ``first`` for the first of the interactions that ``order``, (n,),
# names. Each ``size`` of them are a batch. ``users``, (n,), gets their users, and ``items``,
# (n + n * negatives,), batch by batch, their items followed by those that are sampled for the first of the
# batch, for the second, and so on.
sample = Drivers(_sample_begin, _sample_work, kind_of)


@jit(entry=True)
def _by_mass_work(phase: Any, block: Any, t: Any, job: Any) -> None:  # noqa: ARG001
    """Sample for one block of interactions."""
    key, first, order, user_of, indptr, indices, n_items = job[:7]
    ends, guide, shift, taken, before, size, users, items = job[7:]
    source, masses = Source(user_of, indptr, indices, n_items), Masses(ends, guide, shift, taken, before)
    begin = block * BLOCK
    end = min(begin + BLOCK, len(order))
    sample_by_mass_worker(begin, end, key, first, order, source, masses, size, users, items)


# The same by popularity: job (key, first, order, *source, *masses, size, users, items), with `Masses`.
sample_by_mass = Drivers(_sample_begin, _by_mass_work, kind_of)
