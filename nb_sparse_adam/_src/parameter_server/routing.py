# SPDX-License-Identifier: Apache-2.0
"""A batch of ids of any number of repeats -> what each shard is sent: each id once, its gradients summed.

An id belongs to a bucket, one of `BUCKETS`: the upper bits of number 0 of splitmix64 with the id as its key.
Buckets are dealt out to shards in order: bucket b is of shard ``b * shards // BUCKETS``. Neither depends on
anything but the id and the number of shards.

What is sent is in the order of shards, and within one in that in which ids first appear. The gradients of an
id are summed in their order, in the blocks that `engine.sums` has: the bits are those of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.addresses import address_of
from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import array_at
from nb_sparse_adam._src.engine.random import splitmix64
from nb_sparse_adam._src.engine.scratch import BLOCK
from nb_sparse_adam._src.engine.screening import largest_bits, magnitude_of_bits, square_root_of_largest

BUCKETS = 1024
_SHIFT = np.uint64(64 - (BUCKETS.bit_length() - 1))
_EMPTY = np.int32(-1)


@jit
def _bucket(number: Any) -> Any:
    return np.int64(splitmix64(np.uint64(number), 0) >> _SHIFT)


@jit(entry=True)
def _buckets(ids: Any, out: Any) -> None:
    for i in range(len(ids)):
        out[i] = _bucket(ids[i])


def buckets_of(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bucket of each id."""
    out = np.empty(len(ids), np.int64)
    with np.errstate(over="ignore"):  # without the JIT, hashes overflow on NumPy's scalars
        _buckets(ids, out)
    return out


def shards_of(ids: NDArray[np.int64], shards: int) -> NDArray[np.int64]:
    """Return the shard of each id."""
    return buckets_of(ids) * shards // BUCKETS


@jit(entry=True)
def _route(
    ids: Any, shards: Any, salt: Any, slots: Any, place: Any, times: Any, shard: Any, starts: Any, packed: Any
) -> None:
    """Number the ids in the order in which they appear, then by shards.

    ``slots`` is a table of open addressing, a power of two of int32. The salt is not known to who chooses
    ids, so that nobody can have them all meet in it.
    """
    mask = np.uint64(len(slots) - 1)
    found = np.int64(0)
    for i in range(len(ids)):
        number = ids[i]
        slot = splitmix64(np.uint64(number), salt) & mask
        while slots[slot] >= 0 and packed[slots[slot]] != number:
            slot = (slot + np.uint64(1)) & mask
        group = np.int64(slots[slot])
        if group < 0:
            group = found
            slots[slot] = group
            packed[group] = number
            own = _bucket(number) * shards // BUCKETS
            shard[group] = own
            starts[own + 1] += 1
            times[group] = 0
            found += 1
        times[group] += 1
        place[i] = group
    for s in range(shards):
        starts[s + 1] += starts[s]


@jit(entry=True)
def _renumber(
    place: Any, shard: Any, starts: Any, following: Any, packed: Any, times: Any, new_ids: Any, new_times: Any
) -> None:
    """Bring the ids into the order of shards."""
    found = starts[len(starts) - 1]
    for s in range(len(following)):
        following[s] = starts[s]
    for group in range(found):
        own = shard[group]
        to = following[own]
        following[own] = to + 1
        new_ids[to], new_times[to] = packed[group], times[group]
        shard[group] = to
    for i in range(len(place)):
        place[i] = shard[place[i]]


@jit(entry=True)
def _sum(
    values: Any, stride: Any, place: Any, times: Any, begun: Any, block: Any, out: Any, dim: Any
) -> None:
    """Sum the rows of ``values`` by places; blocks of more than BLOCK rows are begun in ``block``.

    ``begun`` holds, for each place, how many rows have come. ``block`` has a row for each of the places that
    get more than BLOCK of them; which, ``begun`` says from its second half on.
    """
    found = len(times)
    for i in range(len(place)):
        to, source = place[i], i * stride
        come = begun[to]
        begun[to] = come + 1
        if come < BLOCK:
            into = to * dim
            if come == 0:
                for j in range(dim):
                    out[np.uint64(into + j)] = values[np.uint64(source + j)]
            else:
                for j in range(dim):
                    out[np.uint64(into + j)] += values[np.uint64(source + j)]
            continue
        into = begun[found + to] * dim
        if come % BLOCK == 0:
            for j in range(dim):
                block[np.uint64(into + j)] = values[np.uint64(source + j)]
        else:
            for j in range(dim):
                block[np.uint64(into + j)] += values[np.uint64(source + j)]
        if come % BLOCK == BLOCK - 1 or come + 1 == times[to]:
            for j in range(dim):
                out[np.uint64(to * dim + j)] += block[np.uint64(into + j)]


@jit(entry=True)
def _largest(place: Any, size: Any, rows: Any, dim: Any) -> Any:
    """Return the largest magnitude in a matrix, NaN if there is one."""
    return magnitude_of_bits(largest_bits(place, size, np.int64(0), rows, dim, dim), size)


def is_finite(sums: NDArray[Any]) -> bool:
    """Whether the squares of (n, dim) sums are finite."""
    if not sums.size:
        return True
    largest = _largest(address_of(sums), sums.itemsize, *sums.shape)
    return bool(largest <= square_root_of_largest(sums.dtype))


@jit(entry=True)
def _spread(addresses: Any, place: Any, out: Any, dim: Any) -> None:
    """Copy vectors, which lie at addresses, to where their ids were."""
    for i in range(len(place)):
        source = array_at(addresses[place[i]], dim, out)
        into = i * dim
        for j in range(dim):
            out[np.uint64(into + j)] = source[np.uint64(j)]


class Routed(NamedTuple):
    """A batch of ids, as shards are sent it.

    Attributes
    ----------
    place : (n,) int64
        Of each id of the batch: where it is among ``ids``.
    ids : (u,) int64
        Each once, shard after shard.
    times : (u,) int64
        How often it was in the batch.
    starts : (shards + 1,) int64
        Where each shard's begin.
    """

    place: NDArray[np.int64]
    ids: NDArray[np.int64]
    times: NDArray[np.int64]
    starts: NDArray[np.int64]

    def of_shard(self, shard: int) -> slice:
        """Where a shard's ids are."""
        return slice(int(self.starts[shard]), int(self.starts[shard + 1]))

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum (n, dim) values by ids: (u, dim)."""
        n, dim = values.shape
        found = len(self.ids)
        out = np.empty((found, dim), values.dtype)
        if not n:
            return out
        begun = np.zeros(2 * found, np.int64)
        long = np.flatnonzero(self.times > BLOCK)
        begun[found + long] = np.arange(len(long))
        block = np.empty(len(long) * dim, values.dtype)
        flat = values if values.flags.c_contiguous else np.ascontiguousarray(values)
        _sum(flat.reshape(-1), dim, self.place, self.times, begun, block, out.reshape(-1), dim)
        return out

    def spread(self, parts: Mapping[int, NDArray[Any]], dim: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Give each id of the batch its vector: (n, dim). Each shard that has some has given theirs."""
        addresses = np.empty(len(self.ids), np.int64)
        step = dim * dtype.itemsize
        for shard, part in parts.items():
            own = self.of_shard(shard)
            addresses[own] = address_of(part) + step * np.arange(own.stop - own.start)
        out = np.empty((len(self.place), dim), dtype)
        _spread(addresses, self.place, out.reshape(-1), dim)
        return out


_SALT = int.from_bytes(np.random.default_rng().bytes(7), "little")


def route(ids: NDArray[np.int64], shards: int) -> Routed:
    """Say which shard is sent what of a batch of ids."""
    n = len(ids)
    place, times, shard, packed = (np.empty(n, np.int64) for _ in range(4))
    starts = np.zeros(shards + 1, np.int64)
    slots = np.full(1 << max(2 * n - 1, 1).bit_length(), _EMPTY)
    with np.errstate(over="ignore"):
        _route(ids, shards, _SALT, slots, place, times, shard, starts, packed)
    found = int(starts[-1])
    new_ids, new_times = np.empty(found, np.int64), np.empty(found, np.int64)
    _renumber(place, shard, starts, np.empty(shards, np.int64), packed, times, new_ids, new_times)
    return Routed(place, new_ids, new_times, starts)
