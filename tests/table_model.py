# SPDX-License-Identifier: Apache-2.0
"""What an `EmbeddingTable` is to do, in plain Python: a dict of rows, and `SparseAdam` on a dense table.

Each id that gets a row has a row of the dense table, a new one every time; row 0 takes what is dropped.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from nb_sparse_adam import BagGradient, Eviction, RowGradient, SparseAdam

MASK = 2**64 - 1


def splitmix64(key, counter):
    """Number ``counter`` of splitmix64, from the paper's reference implementation."""
    x = (key + counter * 0x9E3779B97F4A7C15) & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def uniform(number, dim, seed, low, high):
    """The initial value of an id, float64."""
    key = splitmix64(splitmix64(seed & MASK, 0) ^ (number & MASK), 1)
    return [low + (high - low) * ((splitmix64(key, j) >> 11) * 2.0**-53) for j in range(dim)]


class NoRoomError(Exception):
    """What a batch is refused with."""


class NoRowError(Exception):
    """What an update with ``missing="raise"`` is refused with."""


@dataclass
class Row:
    """What is known of an id that has a row."""

    slot: int  # of the dense table
    order: int
    touched: int  # time of the clock
    touched_steps: int
    touched_seconds: float
    seen: int = 0


class TableModel:
    """A table with ``initializer="uniform(-1, 1)"``."""

    def __init__(
        self, dim, dtype, seed, step_counts, now, *, capacity=None, admission=None, eviction=None,
        missing="drop", unknown="zeros", most=1 << 17, **options,
    ):  # fmt: skip
        self.dim, self.dtype, self.seed, self.now = dim, np.dtype(dtype), seed, now
        self.capacity, self.admission, self.eviction = capacity, admission, eviction or Eviction()
        self.missing, self.unknown, self.step_counts = missing, unknown, step_counts
        self.dense = np.zeros((most, dim), dtype)
        self.adam = SparseAdam(self.dense, step_counts=step_counts, **options)
        self.rows = {}
        self.slots = 1
        self.clock = self.steps = self.draws = self.admitted = self.evicted = self.dropped = 0
        self.noted = -math.inf
        self.sightings = {}

    # --- what is there

    def value(self, number):
        return self.dense[self.rows[number].slot]

    def initial(self, number):
        return np.array(uniform(number, self.dim, self.seed, -1.0, 1.0)).astype(self.dtype)

    def of_unknown(self, number):
        return self.initial(number) if self.unknown == "initial" else np.zeros(self.dim, self.dtype)

    def in_order(self):
        return sorted(self.rows, key=lambda number: self.rows[number].order)

    def slots_of(self, numbers):
        return np.array([self.rows[number].slot for number in numbers], np.int64)

    # --- time

    def begin(self, always=False):
        if always or self.now() - self.noted >= 1:
            self.clock, self.noted = self.clock + 1, self.now()

    def touch(self, number):
        row = self.rows[number]
        row.touched, row.touched_steps, row.touched_seconds = self.clock, self.steps, self.now()

    # --- rows that come and go

    def admit(self, number, values):
        self.admitted += 1
        self.rows[number] = Row(self.slots, self.admitted, self.clock, self.steps, self.now())
        self.dense[self.slots] = values
        self.slots += 1

    def let_go(self, numbers):
        for number in numbers:
            del self.rows[number]
            self.evicted += 1
        return numbers

    def least_recent(self, count, but=()):
        others = [number for number in self.rows if number not in but]
        others.sort(key=lambda number: (self.rows[number].touched, self.rows[number].order))
        return others[:count]

    def make_room(self, new, there):
        excess = len(self.rows) + len(new) - (math.inf if self.capacity is None else self.capacity)
        if excess <= 0:
            return
        if not self.eviction.when_full or excess > len(self.rows) - len(there):
            raise NoRoomError
        self.let_go(self.least_recent(excess, there))

    def sees(self, number):
        """Count a sighting of an id that has no row; say whether it gets one."""
        if self.admission is None:
            return True
        if isinstance(self.admission, float):
            key = (self.seed & MASK) ^ 0xA5A5A5A55A5A5A5A
            h = splitmix64(splitmix64(key ^ (number & MASK), 0), self.draws)
            self.draws += 1
            return (h >> 11) < int(self.admission * 2**53)
        self.sightings[number] = min(self.sightings.get(number, 0) + 1, 255)
        return self.sightings[number] >= self.admission

    def find(self, numbers, train):
        """The vectors of ids."""
        if not train:
            none = (
                self.initial if self.unknown == "initial" else lambda number: np.zeros(self.dim, self.dtype)
            )
            return [self.value(number) if number in self.rows else none(number) for number in numbers]
        self.begin()
        there = {number for number in numbers if number in self.rows}
        before = dict(self.sightings), self.draws
        seen = [number in there or self.sees(number) for number in numbers]
        new = [number for number, each in zip(numbers, seen, strict=True) if each and number not in there]
        try:
            self.make_room(set(new), there)
        except NoRoomError:
            self.sightings, self.draws = before
            raise
        for number in dict.fromkeys(new):
            self.admit(number, self.initial(number))
        out = []
        for number, each in zip(numbers, seen, strict=True):
            out.append(self.value(number).copy() if each else self.initial(number))
            if each:
                self.rows[number].seen += 1
                self.touch(number)
        return out

    def lookup(self, numbers, train):
        return np.array(self.find(numbers, train), self.dtype).reshape(len(numbers), self.dim)

    def lookup_bags(self, numbers, offsets, weights, mode, train):
        """``offsets`` has one more than there are bags."""
        vectors = self.find(numbers, train)
        real = self.dtype.type
        out = np.zeros((len(offsets) - 1, self.dim), self.dtype)
        for bag, (start, end) in enumerate(itertools.pairwise(offsets)):
            for i in range(start, end):
                out[bag] += (real(1) if weights is None else real(weights[i])) * vectors[i]
            if mode == "mean" and end > start:
                out[bag] *= real(1) / real(end - start)
        return out

    # --- steps

    def update(self, numbers, make):
        """``make(rows)`` is a gradient whose ids are rows of the dense table."""
        self.begin()
        lost = sum(number not in self.rows for number in numbers)
        if lost and self.missing == "raise":
            raise NoRowError
        slots = [self.rows[number].slot if number in self.rows else 0 for number in numbers]
        self.adam.step(make(np.array(slots, np.int64)))
        self.dropped += lost
        self.clock, self.steps = self.clock + 1, self.steps + 1
        for number in numbers:
            if number in self.rows:
                self.touch(number)
        if self.eviction.by_age:
            self.let_go(self.old(*self.eviction[:3]))

    def update_rows(self, numbers, values):
        self.update(numbers, lambda rows: RowGradient(rows, values))

    def update_bags(self, numbers, offsets, grad_output, weights, mode):
        self.update(numbers, lambda rows: BagGradient(rows, offsets, grad_output, weights, mode))

    # --- the rest

    def load(self, numbers, values):
        self.begin()
        self.make_room([n for n in numbers if n not in self.rows], {n for n in numbers if n in self.rows})
        for number, value in zip(numbers, values, strict=True):
            if number not in self.rows:
                self.admit(number, value)
            else:  # another row of the dense table, whose moments are fresh
                self.rows[number].slot = self.slots
                self.dense[self.slots] = value
                self.slots += 1
            self.touch(number)

    def old(self, steps, seconds, seen):
        return [
            number
            for number, row in self.rows.items()
            if (steps is None or self.steps - row.touched_steps >= steps)
            and (seconds is None or self.now() - row.touched_seconds >= seconds)
            and (seen is None or row.seen < seen)
        ]

    def evict(self, steps=None, seconds=None, seen=None, down_to=None):
        self.begin(always=True)
        if down_to is not None:
            return self.let_go(self.least_recent(max(len(self.rows) - down_to, 0)))
        return self.let_go(self.old(steps, seconds, seen))

    # --- the same?

    def assert_same(self, table, others):
        """The table is this one; ``others`` are ids that may be there or not."""
        __tracebackhide__ = True
        numbers = self.in_order()
        assert len(table) == len(numbers)
        assert table.ids().tolist() == numbers
        exported, values = table.export()
        assert exported.tolist() == numbers
        slots = self.slots_of(numbers)
        assert values.tobytes() == self.dense[slots].tobytes()
        expected, got = self.adam.state["table"], table.state(numbers)
        assert got.exp_avg.tobytes() == expected.exp_avg[slots].tobytes()
        assert got.exp_avg_sq.tobytes() == expected.exp_avg_sq[slots].tobytes()
        steps = expected.steps if self.step_counts == "global" else expected.steps[slots]
        np.testing.assert_array_equal(got.steps, steps)
        assert got.seen.tolist() == [self.rows[number].seen for number in numbers]
        others = [*others, *numbers[:5]]
        assert table.contains(others).tolist() == [number in self.rows for number in others]
        stats = table.stats()
        for what in ("steps", "evicted", "dropped"):
            assert stats[what] == getattr(self, what), what
        assert (stats["rows"], stats["admitted"]) == (len(numbers), self.admitted)
