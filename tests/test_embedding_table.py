# SPDX-License-Identifier: Apache-2.0
"""`EmbeddingTable` against a dict of rows, call by call, for hundreds of random sequences of calls."""

import numba
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from table_model import NoRoomError, NoRowError, TableModel

from nb_sparse_adam import EmbeddingTable, Eviction
from nb_sparse_adam._src.table import ages, cells
from nb_sparse_adam.errors import GradientIndexError, TableError

COMPILED = not numba.config.DISABLE_JIT
# An index that is interpreted is made to grow with fewer ids.
BEGINS, ENDS = (cells.BEGINS, cells.ENDS) if COMPILED else (3, 6)
MANY = cells.LAYER_CELLS * BEGINS // 1000 * 21 // 20  # ids with which an index has begun to grow

EXTREME = [0, -1, 1, 7, -(2**63), 2**63 - 1, 2**32, -(2**32), 5 << 40, 6 << 40]
numbers = st.sampled_from(EXTREME) | st.integers(0, 20) | st.integers(-(2**63), 2**63 - 1)
batches = st.lists(numbers, max_size=12)
sixteenths = st.integers(-64, 64).map(lambda n: n / 16)


class Clock:
    """In the place of the module `time`: goes on when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now


class TableMachine(RuleBasedStateMachine):
    """The same calls to a table and to its model."""

    @initialize(data=st.data())
    def make(self, data):
        self.clock = Clock()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(ages, "time", self.clock)
        self.patch.setattr(cells, "BEGINS", BEGINS)
        self.patch.setattr(cells, "ENDS", ENDS)
        draw = data.draw
        capacity = draw(st.none() | st.integers(1, 30), "capacity")
        when_full = capacity is not None and draw(st.booleans(), "when_full")
        eviction = Eviction(when_full=when_full, rows_a_step=1 << 20)  # all in each step, as in the model
        if draw(st.booleans(), "by age"):
            eviction = eviction._replace(
                older_than_steps=draw(st.integers(1, 5), "older_than_steps"),
                seen_fewer_than=draw(st.none() | st.integers(1, 3), "seen_fewer_than"),
            )
        self.dim = draw(st.sampled_from([1, 3]), "dim")
        options = {
            "step_counts": draw(st.sampled_from(["row", "element", "global"]), "step_counts"),
            "capacity": capacity,
            "eviction": eviction,
            "admission": draw(st.sampled_from([None, None, 1, 2, 3, 0.5]), "admission"),
            "missing": draw(st.sampled_from(["drop", "drop", "raise"]), "missing"),
            "unknown": draw(st.sampled_from(["zeros", "initial"]), "unknown"),
            "lr": 0.25,
        }
        seed = draw(st.sampled_from([0, 1, -5, 2**63 + 9]), "seed")
        self.dtype = np.float32
        self.table = EmbeddingTable(
            self.dim, initializer="uniform(-1, 1)", seed=seed, admission_bytes=1 << 22, **options
        )
        self.model = TableModel(self.dim, self.dtype, seed, now=self.clock.time, **options)
        self.asked = set(EXTREME)
        self.has_grown = False

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()

    def both(self, of_model, of_table):
        """Do something to both: what the model refuses, the table is to refuse as well."""
        kinds = {NoRoomError: TableError, NoRowError: GradientIndexError}
        try:
            expected = of_model()
        except tuple(kinds) as error:
            with pytest.raises(kinds[type(error)]):
                of_table()
            return None, None
        return expected, of_table()

    @rule(batch=batches, train=st.booleans())
    def lookup(self, batch, train):
        self.asked.update(batch)
        expected, got = self.both(
            lambda: self.model.lookup(batch, train), lambda: self.table.lookup(batch, train=train)
        )
        if got is not None:
            assert got.dtype == self.dtype
            assert got.shape == expected.shape
            assert got.tobytes() == expected.tobytes()

    @rule(bags=st.lists(batches, max_size=4), train=st.booleans(), how=st.sampled_from("swm"), data=st.data())
    def lookup_bags(self, bags, train, how, data):
        batch, offsets, weights, mode = self.bags_of(bags, how, data)
        expected, got = self.both(
            lambda: self.model.lookup_bags(batch, offsets, weights, mode, train),
            lambda: self.table.lookup_bags(batch, offsets, weights, mode, train, include_last_offset=True),
        )
        if got is not None:
            np.testing.assert_array_equal(got, expected, strict=True)

    def bags_of(self, bags, how, data):
        batch = [number for bag in bags for number in bag]
        self.asked.update(batch)
        offsets = np.cumsum([0, *map(len, bags)])
        weights = None
        if how == "w":
            weights = np.array([data.draw(sixteenths) for _ in batch], self.dtype)
        return batch, offsets, weights, "mean" if how == "m" else "sum"

    def known(self, data, batch):
        """Some ids that have a row, among others that may have none."""
        there = self.model.in_order()
        if there:
            batch = batch + data.draw(st.lists(st.sampled_from(there), max_size=12), "known")
        if self.model.missing == "raise" and data.draw(st.booleans(), "all known"):
            batch = [number for number in batch if number in self.model.rows]
        return data.draw(st.permutations(batch), "order")

    def drawn(self, rows):
        rng = np.random.default_rng(rows + self.model.steps)
        return rng.normal(size=(rows, self.dim)).astype(self.dtype)

    @rule(batch=batches, data=st.data())
    def update(self, batch, data):
        batch = self.known(data, batch)
        values = self.drawn(len(batch))
        self.both(lambda: self.model.update_rows(batch, values), lambda: self.table.update(batch, values))

    @rule(bags=st.lists(batches, max_size=4), how=st.sampled_from("swm"), data=st.data())
    def update_bags(self, bags, how, data):
        bags = [self.known(data, bag) for bag in bags]
        batch, offsets, weights, mode = self.bags_of(bags, how, data)
        given_offsets = offsets if data.draw(st.booleans(), "with the last offset") else offsets[:-1]
        output = self.drawn(len(bags))
        self.both(
            lambda: self.model.update_bags(batch, offsets, output, weights, mode),
            lambda: self.table.update_bags(batch, given_offsets, output, weights, mode),
        )

    @rule(batch=st.lists(numbers, max_size=8, unique=True), data=st.data())
    def load(self, batch, data):
        there = self.model.in_order()
        if there:
            batch = list(dict.fromkeys(batch + data.draw(st.lists(st.sampled_from(there), max_size=4))))
        self.asked.update(batch)
        values = self.drawn(len(batch))
        self.both(lambda: self.model.load(batch, values), lambda: self.table.load(batch, values))

    @rule(
        steps=st.none() | st.integers(0, 6),
        seconds=st.none() | st.sampled_from([5, 15, 25]),
        seen=st.none() | st.integers(1, 4),
    )
    def evict_old(self, steps, seconds, seen):
        if steps is seconds is seen is None:
            seen = 2
        expected = self.model.evict(steps, seconds, seen)
        got = self.table.evict(older_than_steps=steps, older_than_seconds=seconds, seen_fewer_than=seen)
        assert sorted(got.tolist()) == sorted(expected)

    @rule(down_to=st.integers(0, 15))
    def evict_least_recent(self, down_to):
        assert self.table.evict(down_to=down_to).tolist() == self.model.evict(down_to=down_to)

    @rule()
    def let_time_pass(self):
        self.clock.now += 10

    @rule(lr=st.sampled_from([0.25, 0.5]))
    def set_lr(self, lr):
        self.table.lr = self.model.adam.lr = lr

    # Of so many ids some share counters with others, and are admitted too early: a model does not know which.
    @precondition(lambda self: self.model.admission in (None, 1, 0.5))
    @precondition(lambda self: not self.has_grown and self.model.capacity is None)
    @rule(begin=st.integers(-1000, 1000), down_to=st.integers(5, 40))
    def grow(self, begin, down_to):
        self.has_grown = True
        batch = list(range(begin, begin + MANY))
        expected, got = self.both(lambda: self.model.lookup(batch, True), lambda: self.table.lookup(batch))
        assert got.tobytes() == expected.tobytes()
        self.same()
        self.evict_least_recent(down_to)

    @invariant()
    def same(self):
        if hasattr(self, "model"):
            self.model.assert_same(self.table, sorted(self.asked)[:40])


def test_any_calls_find_what_a_dict_of_rows_would_hold():
    given = settings(
        max_examples=settings().max_examples // (2 if COMPILED else 6),
        stateful_step_count=30 if COMPILED else 12,
    )
    run_state_machine_as_test(TableMachine, settings=given)
