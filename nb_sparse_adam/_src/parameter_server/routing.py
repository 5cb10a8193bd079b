# SPDX-License-Identifier: Apache-2.0
"""A batch of ids of any number of repeats -> what each shard is sent: each id once, its gradients summed.

An id belongs to a bucket, one of `BUCKETS`: the upper bits of number 0 of splitmix64 with the id as its key.
Buckets are dealt out to shards in order: bucket b is of shard ``b * shards // BUCKETS``. Neither depends on
anything but the id and the number of shards.

What is sent is in the order of shards, and within one in that in which ids first appear. The gradients of an
id are summed in their order, in the blocks that `engine.sums` has: the bits are those of the engine.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.addresses import address_of
from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.intrinsics import address, array_at, prefetch_line
from nb_sparse_adam._src.engine.prefetching import prefetch
from nb_sparse_adam._src.engine.random import splitmix64
from nb_sparse_adam._src.engine.records import packer, record
from nb_sparse_adam._src.engine.scratch import BLOCK
from nb_sparse_adam._src.engine.screening import largest_bits, magnitude_of_bits, square_root_of_largest
from nb_sparse_adam._src.engine.threads import ALONE, Partition, run, usable_threads
from nb_sparse_adam._src.engine.view import MOST_PREFETCHED

BUCKETS = 1024
_SHIFT = np.uint64(64 - (BUCKETS.bit_length() - 1))
_EMPTY = np.int32(-1)
_AHEAD = 8  # ids between the one at hand and the one that is asked for
_ALONE = 1 << 16  # numbers that one thread copies before another one has started


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
        if i + _AHEAD < len(ids):
            prefetch_line(address(slots, np.int64(splitmix64(np.uint64(ids[i + _AHEAD]), salt) & mask)))
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
def _order(place: Any, firsts: Any, following: Any, order: Any) -> None:
    """Write where the ids of each place are in the batch, place after place, in their order."""
    for p in range(len(following)):
        following[p] = firsts[p]
    for i in range(len(place)):
        p = place[i]
        order[following[p]] = i
        following[p] += 1


# --- sums, and vectors back to their ids ------------------------------------------------------------------

UNIT = 128  # ids that a thread takes at a time: what they get is in its cache when it is looked at
JOB = record(
    "n", "found", "dim", "threads",  # ids of the batch; once each; numbers of a row
    "values", "stride",  # (n, dim) addresses of their gradients, numbers from one to the next
    "place", "order", "firsts",  # int64: (n,), (n,), (found + 1,)
    "out",  # (found, dim), or (n, dim)
    "largest",  # (units,) int64: bits of the largest magnitude of a unit's sums
    "scratch",  # (threads, dim)
    "addresses",  # (found,) int64: of the vector of each id
)  # fmt: skip
_pack_job = packer(JOB).pack_into
_NONE = dict.fromkeys(JOB.names or (), 0)


@jit(entry=True)
def _begin_sums(phase: Any, job: Any) -> Any:
    return (job[0][0]["found"] + UNIT - 1) // UNIT if phase == 0 else np.int64(-1)


@jit(entry=True)
def _begin_spread(phase: Any, job: Any) -> Any:
    return (job[0][0]["n"] + UNIT - 1) // UNIT if phase == 0 else np.int64(-1)


@functools.cache
def _sums_for(dtype: np.dtype[Any]) -> Drivers:
    """Make what sums gradients by ids, in blocks as the engine does."""
    real, size = dtype.type, dtype.itemsize

    @jit
    def add(values: Any, source: Any, into: Any, to: Any, dim: Any, begins: Any) -> None:
        if begins:
            for j in range(dim):
                into[np.uint64(to + j)] = values[np.uint64(source + j)]
        else:
            for j in range(dim):
                into[np.uint64(to + j)] += values[np.uint64(source + j)]

    @jit(entry=True)
    def work(phase: Any, unit: Any, t: Any, job: Any) -> None:  # noqa: ARG001
        given = job[0][0]
        n, found, dim, stride = given["n"], given["found"], given["dim"], given["stride"]
        values = array_at(given["values"], (n - 1) * stride + dim, real)
        order = array_at(given["order"], n, np.int64)
        firsts = array_at(given["firsts"], found + 1, np.int64)
        out = array_at(given["out"], found * dim, real)
        scratch = array_at(given["scratch"], given["threads"] * dim, real)
        first = unit * UNIT
        last = min(first + UNIT, found)
        end = firsts[last]
        for p in range(first, last):
            to, start, stop = p * dim, firsts[p], firsts[p + 1]
            for k in range(start, stop):
                if k + _AHEAD < end:
                    prefetch(values, order[np.uint64(k + _AHEAD)] * stride, min(dim, MOST_PREFETCHED))
                source, come = order[np.uint64(k)] * stride, k - start
                if come < BLOCK:
                    add(values, source, out, to, dim, come == 0)
                    continue
                add(values, source, scratch, t * dim, dim, come % BLOCK == 0)
                if come % BLOCK == BLOCK - 1 or k + 1 == stop:
                    add(scratch, t * dim, out, to, dim, False)
        bits = largest_bits(given["out"], size, first, last, dim, dim)
        array_at(given["largest"], (found + UNIT - 1) // UNIT, np.int64)[unit] = bits

    return Drivers(_begin_sums, work)


@functools.cache
def _spread_for(dtype: np.dtype[Any]) -> Drivers:
    """Make what copies vectors, which lie at addresses, to where their ids were."""
    real = dtype.type

    @jit(entry=True)
    def work(phase: Any, unit: Any, t: Any, job: Any) -> None:  # noqa: ARG001
        given = job[0][0]
        n, dim = given["n"], given["dim"]
        place = array_at(given["place"], n, np.int64)
        addresses = array_at(given["addresses"], given["found"], np.int64)
        out = array_at(given["out"], n * dim, real)
        last = min((unit + 1) * UNIT, n)
        for i in range(unit * UNIT, last):
            if i + _AHEAD < last:
                later = array_at(addresses[place[np.uint64(i + _AHEAD)]], dim, real)
                prefetch(later, np.int64(0), min(dim, MOST_PREFETCHED))
            source = array_at(addresses[place[np.uint64(i)]], dim, real)
            into = i * dim
            for j in range(dim):
                out[np.uint64(into + j)] = source[np.uint64(j)]

    return Drivers(_begin_spread, work)


def _run(drivers: Drivers, elements: int, **fields: Any) -> None:
    """Do a job on as many threads as it is worth."""
    partition = ALONE
    if elements > _ALONE:
        usable = usable_threads(None)
        partition = Partition(usable, usable)
    dtype = fields.pop("dtype")
    scratch = np.empty(partition.threads * fields["dim"], dtype)
    job: Any = np.zeros(1, JOB)
    values = {**_NONE, **fields, "threads": partition.threads, "scratch": scratch}
    given = [address_of(each) if isinstance(each, np.ndarray) else each for each in values.values()]
    _pack_job(job, 0, *given)
    run(drivers, partition, (job,))


@jit(entry=True)
def _magnitude(bits: Any, size: Any) -> Any:
    return magnitude_of_bits(bits, size)


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

    def sum(self, values: NDArray[Any], out: NDArray[Any] | None = None) -> tuple[NDArray[Any], bool]:
        """Sum (n, dim) values by ids: (u, dim); say whether the squares of the sums are finite.

        Parameters
        ----------
        values : (n, dim) array
            Its rows may lie apart.
        out : (u, dim) array, optional
            What they are written to.
        """
        n, dim = values.shape
        found, size = len(self.ids), values.itemsize
        if out is None:
            out = np.empty((found, dim), values.dtype)
        if not out.size:
            return out, True
        if values.strides[1] != size or values.strides[0] < dim * size:
            values = np.ascontiguousarray(values)
        firsts, order = self._in_order()
        largest = np.empty(-(-found // UNIT), np.int64)
        _run(
            _sums_for(values.dtype), values.size, n=n, found=found, dim=dim, values=values,
            stride=values.strides[0] // size, order=order, firsts=firsts, out=out, largest=largest,
            dtype=values.dtype,
        )  # fmt: skip
        magnitude = _magnitude(largest.max(), size)
        return out, bool(magnitude <= square_root_of_largest(values.dtype))

    def _in_order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the ids of each place begin in the second array, which has their places in the batch."""
        firsts = np.zeros(len(self.ids) + 1, np.int64)
        np.cumsum(self.times, out=firsts[1:])
        order = np.empty(len(self.place), np.int64)
        _order(self.place, firsts, np.empty(len(self.ids), np.int64), order)
        return firsts, order

    def spread(self, parts: Mapping[int, NDArray[Any]], dim: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Give each id of the batch its vector: (n, dim). Each shard that has some has given theirs."""
        addresses = np.empty(len(self.ids), np.int64)
        step = dim * dtype.itemsize
        for shard, part in parts.items():
            own = self.of_shard(shard)
            addresses[own] = address_of(part) + step * np.arange(own.stop - own.start)
        n = len(self.place)
        out = np.empty((n, dim), dtype)
        _run(
            _spread_for(dtype), out.size, n=n, found=len(self.ids), dim=dim, place=self.place,
            addresses=addresses, out=out, dtype=dtype,
        )  # fmt: skip
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
