# SPDX-License-Identifier: Apache-2.0
"""An `EmbeddingTable` at its edges: batches and ids of all kinds, capacity, rows that are used again."""

from hashlib import blake2b
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from checks import STEP_COUNTS, refused

from nb_sparse_adam import EmbeddingTable, Eviction, RowGradient
from nb_sparse_adam._src.table import ages
from nb_sparse_adam._src.table.records import COUNT
from nb_sparse_adam.errors import (
    GradientIndexError,
    NonFiniteGradientError,
    OptionError,
    TableError,
)

COMPILED = not numba.config.DISABLE_JIT
MILLION = 1_000_000 if COMPILED else 1000


def zeros(dim=2, **options):
    return EmbeddingTable(dim, initializer="zeros", **{"lr": 0.1, **options})


def everything(table):
    """All that a table holds, as bytes; the filter of ids as well."""
    kept, state = table._admission, table.state(table.ids())
    arrays = (*table.export(), *state, kept.counters, kept.taken)
    return [np.asarray(each).tobytes() for each in arrays], table.stats(), kept.draws


# --- batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [[], np.empty(0, np.int64), np.empty(0, np.uint8), (), range(0)])
def test_nothing_is_legal_everywhere(empty):
    table = zeros(3)
    none = np.empty((0, 3), np.float32)
    for train in (True, False):
        assert table.lookup(empty, train=train).shape == (0, 3)
        assert table.lookup_bags(empty, [], train=train).shape == (0, 3)
        assert not table.lookup_bags(empty, [0, 0, 0], train=train).any()
    table.update(empty, none)
    table.update_bags(empty, [], none)
    table.update_bags(empty, [0, 0], np.ones((2, 3), np.float32))
    table.load(empty, none)
    table.load([], [])
    assert table.contains(empty).shape == (0,)
    assert table.state(empty).exp_avg.shape == (0, 3)
    assert table.ids().shape == (0,)
    assert [each.shape for each in table.export()] == [(0,), (0, 3)]
    assert table.evict(down_to=0).shape == (0,)
    assert len(table) == 0
    assert bool(table)
    assert table.stats()["steps"] == 3
    EmbeddingTable.update_together({})


@pytest.mark.parametrize("capacity", [None, 10])
def test_one_id_a_million_times(capacity):
    """The index grows for what gets a row, not for what is asked for: its memory is that of the capacity."""
    table = zeros(1, capacity=capacity)
    ids = np.full(MILLION, 7)
    assert table.lookup(ids).shape == (MILLION, 1)
    assert len(table) == 1
    assert table.state([7]).seen == MILLION
    table.update(ids, np.full((MILLION, 1), 1e-6, np.float32))
    assert table.state([7]).steps == 1
    np.testing.assert_allclose(table.state([7]).exp_avg, [[0.1e-6 * MILLION]], rtol=1e-4)
    pooled = table.lookup_bags(ids, [0])
    np.testing.assert_allclose(pooled, MILLION * table.lookup([7]), rtol=0.02)  # summed in float32


def test_a_capacity_is_filled_to_the_last_row():
    n = 40_000 if COMPILED else 3700
    table = zeros(1, capacity=n)
    ids = np.random.default_rng(0).permutation(n)
    for part in np.array_split(ids, 7):
        table.lookup(np.repeat(part, 2))
    assert len(table) == n
    with pytest.raises(TableError):
        table.lookup([n])
    assert np.array_equal(table.ids(), ids)
    table.update(ids, np.ones((n, 1), np.float32))
    assert (table.export()[1] == np.float32(-0.1)).all()


# --- capacity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("admission", [None, 2, 0.9])
@pytest.mark.parametrize("when_full", [False, True])
def test_a_batch_larger_than_the_capacity_is_refused_before_anything_changes(when_full, admission):
    table = zeros(capacity=5, admission=admission, eviction=Eviction(when_full=when_full), seed=1)
    table.lookup([1, 1, 1, 2, 2, 2, 8, 9])
    table.update([1, 2], np.ones((2, 2), np.float32))
    before = everything(table)
    many = np.repeat(np.arange(100, 120), 9)
    words = ("20 ids are new", "5 rows", "nothing was changed", "capacity")
    for ask in (table.lookup, lambda ids: table.lookup_bags(ids, [0])):
        with refused(TableError, Exception, *(words if admission != 0.9 else words[2:])):
            ask(many)
        assert everything(table) == before
    with refused(TableError, Exception, *words):
        table.load(np.arange(100, 120), np.zeros((20, 2), np.float32))
    assert everything(table) == before


def test_rows_of_the_same_batch_do_not_make_room():
    table = zeros(capacity=3, eviction=Eviction(when_full=True))
    table.lookup([1, 2, 3])
    with refused(TableError, Exception, "2 ids are new", "smaller batches"):
        table.lookup([1, 2, 4, 5])
    table.lookup([2, 4, 5])  # 1 and 3 go
    assert table.ids().tolist() == [2, 4, 5]
    table.lookup([6])  # 2 came first
    assert table.ids().tolist() == [4, 5, 6]
    table.update([4], np.ones((1, 2), np.float32))
    table.lookup([7])
    assert table.ids().tolist() == [4, 6, 7]
    assert table.stats()["evicted"] == 4


def test_what_came_last_does_not_go_first():
    """Though its record was that of a row that was remembered as an old one."""
    table = zeros(1, capacity=100, eviction=Eviction(when_full=True))
    table.lookup(range(100))
    for new in range(100, 250):
        table.lookup([new])
        assert table.ids().tolist() == list(range(new - 99, new + 1))


def test_as_many_rows_go_as_are_to():
    """Those that were remembered, and those found anew, are other rows."""
    table = zeros(1, capacity=3000, eviction=Eviction(when_full=True))
    table.lookup(range(3000))
    for _ in range(3):
        table.update([0], np.ones((1, 1), np.float32))  # the clock goes on
    table.lookup([3000])
    table.lookup(range(5, 60))
    for first, count in ((4000, 2), (4100, 93), (4300, 150)):
        before = set(table.ids().tolist())
        table.lookup(range(first, first + count))
        assert len(table) == 3000
        gone = before - set(table.ids().tolist())
        assert len(gone) == count
        assert not gone & {0, *range(5, 60)}


# --- ids --------------------------------------------------------------------------------------------------


EXTREME = [0, -1, 1, 2**63 - 1, -(2**63), 7]


def test_all_ids_are_legal():
    table = EmbeddingTable(2, initializer="normal(0, 1)")
    values = table.lookup(EXTREME)
    assert len(np.unique(values[:, 0])) == len(EXTREME)
    assert table.ids().tolist() == EXTREME
    as_unsigned = np.array([number % 2**64 for number in EXTREME], np.uint64)
    for given in (as_unsigned, as_unsigned.tolist(), tuple(EXTREME), np.array(EXTREME, ">i8"), EXTREME):
        assert table.lookup(given, train=False).tobytes() == values.tobytes()
    backwards = np.array(EXTREME)[::-1]
    assert table.lookup(backwards).tobytes() == values[::-1].tobytes()
    assert not table.contains([2, -2, 2**62, 2**64 - 3]).any()
    table.update([0], np.ones((1, 2), np.float32))
    assert table.state([0, -1]).steps.tolist() == [1, 0]
    table.evict(down_to=1)
    assert table.ids().tolist() == [0]
    table.lookup([0, -1])
    assert table.ids().tolist() == [0, -1]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_ids_of_any_width(dtype):
    numbers = [number for number in (0, 5, 100, -3) if number >= np.iinfo(dtype).min]
    ids = np.array(numbers, dtype)
    table, same = (EmbeddingTable(2) for _ in range(2))
    assert table.lookup(ids).tobytes() == same.lookup(numbers).tobytes()
    assert table.ids().tolist() == numbers
    assert table.contains(np.repeat(ids, 2)[::2]).all()


def test_lists_that_numpy_reads_as_something_else():
    table = zeros()
    table.lookup([2**63, 7])
    assert table.ids().tolist() == [-(2**63), 7]
    assert table.contains([2**63, -(2**63), 7, 2**64 - 1, -1]).tolist() == [True, True, True, False, False]
    assert table.contains([np.uint64(2**63), np.int64(7), np.int8(3)]).tolist() == [True, True, False]
    assert table.contains(["a", 7]).tolist() == [False, True]  # not the string "7"


def test_strings_are_named_by_their_hash():
    table = zeros()
    words = ["user:1", "", "über", "x\0", "x", "item " * 50, "5"]
    table.lookup(words)
    expected = [
        int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little", signed=True)
        for word in words
    ]
    assert table.ids().tolist() == expected
    assert table.contains(expected).all()
    assert table.contains(np.array(["über", "item " * 50])).all()
    assert table.contains(np.array(words, object)).all()
    assert not table.contains([5, 1]).any()
    assert expected[0] == 1304368944307141588  # what is saved today is found tomorrow


# --- rows that are used again -----------------------------------------------------------------------------


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("initializer", ["zeros", "normal(0, 1)", lambda ids: np.ones((len(ids), 3))])
def test_a_row_that_is_used_again_is_like_a_new_one(initializer, step_counts):
    options = {"initializer": initializer, "step_counts": step_counts, "lr": 0.1, "capacity": 4}
    used, new = (EmbeddingTable(3, **options) for _ in range(2))
    used.lookup([1, 2, 2, 2, 3, 4])
    for _ in range(3):
        used.update([1, 2, 3, 4], np.ones((4, 3), np.float32))
        new.update([], np.empty((0, 3), np.float32))
    evicted = used.evict(down_to=0)
    assert evicted.tolist() == [1, 2, 3, 4]
    words = used._store._words
    assert not words[: 5 * used._store.record // 8].any()
    for table in (used, new):
        table.lookup([9, 8])
    assert used.export()[1].tobytes() == new.export()[1].tobytes()
    assert [each.tobytes() for each in used.state([9, 8])] == [each.tobytes() for each in new.state([9, 8])]
    for table in (used, new):
        table.update([9, 8], np.ones((2, 3), np.float32))
    assert used.export()[1].tobytes() == new.export()[1].tobytes()


def test_a_filter_remembers_ids_whose_row_has_gone():
    table = zeros(admission=3)
    for expected in (0, 0, 1):
        table.lookup([5])
        assert len(table) == expected
    table.evict(down_to=0)
    table.lookup([5])
    assert len(table) == 1
    assert table.state([5]).seen == 1


# --- counts near their end --------------------------------------------------------------------------------


# Compiled, only those that have several columns: counts that have moved out of records are alike otherwise.
@pytest.mark.parametrize("step_counts", ["element"] if COMPILED else ["element", "row"])
def test_counts_beyond_32_bits(step_counts):
    table = zeros(2, step_counts=step_counts, capacity=5000)
    n = 1100  # more than the rows that the engine's table shows at first
    table.lookup([1, 2, 3])
    of_engine = table._store.table
    if step_counts == "row":
        table._store._words.view(np.int32)[COUNT :: table._store.record // 4][:3] = 2**31 - 3
    else:
        of_engine.arrays.steps[:3] = 2**31 - 3
    of_engine.counts_have_changed()
    for _ in range(4):
        table.update([1, 3], np.ones((2, 2), np.float32))
    counts = table.state([1, 2, 3]).steps
    assert counts.reshape(3, -1)[:, -1].tolist() == [2**31 + 1, 2**31 - 3, 2**31 + 1]
    table.lookup(range(10, 10 + n))
    assert np.array_equal(table.state([1, 2, 3]).steps, counts)
    assert not table.state(range(10, 10 + n)).steps.any()
    assert table.evict(down_to=n + 2).tolist() == [2]
    table.evict(down_to=0)
    table.lookup(range(3000, 3003 + n))
    assert not table.state(range(3000, 3003 + n)).steps.any()
    table.update([3002], np.ones((1, 2), np.float32))
    assert (table.export()[1][2] == np.float32(-0.1)).all()
    table.load([3002], np.zeros((1, 2), np.float32))
    assert not table.state([3002]).steps.any()


# --- eviction ---------------------------------------------------------------------------------------------


def test_ages_in_seconds(monkeypatch):
    class Clock:
        now = 1000.0

        def time(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(ages, "time", clock)
    table = zeros(eviction=Eviction(older_than_seconds=60))
    for number in range(5):
        table.lookup([number])
        clock.now += 30
    table.lookup([2])  # 90 s after it came
    assert sorted(table.evict().tolist()) == [0, 1]
    clock.now -= 1000  # a clock that is set back makes nothing older
    assert table.evict().tolist() == []
    clock.now += 1100
    table.update([4], np.ones((1, 2), np.float32))  # a step lets go of the others, as a part of it
    assert table.ids().tolist() == [4]


def test_steps_look_at_all_rows_in_turn():
    """Though each of them comes with new rows, and looks at few."""
    table = zeros(1, eviction=Eviction(older_than_steps=10, rows_a_step=50))
    for step in range(60):
        ids = np.arange(20 * step, 20 * step + 20)
        table.lookup(ids)
        before = len(table)
        table.update(ids, np.ones((20, 1), np.float32))
        assert before - len(table) <= 50
    assert len(table) < 600


def test_seen_fewer_than():
    table = zeros()
    table.lookup([1, 1, 2, 2, 2, 3])
    table.lookup([3, 3], train=False)
    assert table.evict(seen_fewer_than=3, older_than_steps=1).tolist() == []
    assert sorted(table.evict(seen_fewer_than=3).tolist()) == [1, 3]
    assert table.evict(older_than_steps=0).tolist() == [2]


# --- steps that are refused -------------------------------------------------------------------------------


def test_all_or_nothing_over_tables():
    tables = [zeros(name=f"t{at}") for at in range(3)]
    for table in tables:
        table.lookup([1, 2])
        table.update([1], np.ones((1, 2), np.float32))
    before = [everything(table) for table in tables]
    good = ones([1, 77, 2])
    bad = ones([1, 2])
    bad.values[1, 1] = np.inf
    for at in range(3):
        gradients = {table: bad if at == which else good for which, table in enumerate(tables)}
        with refused(NonFiniteGradientError, ValueError, f"'t{at}'", "RowGradient.values[1, 1]"):
            EmbeddingTable.update_together(gradients)
        assert [everything(table) for table in tables] == before
    EmbeddingTable.update_together(dict.fromkeys(tables, good))
    assert [table.stats()["dropped"] for table in tables] == [1, 1, 1]


def ones(ids):
    return RowGradient(ids, np.ones((len(ids), 2), np.float32))


def test_missing_rows_can_be_refused():
    table = zeros(missing="raise")
    table.lookup([1, 2])
    before = everything(table)
    with refused(GradientIndexError, IndexError, "ids[1] is 9", "contains"):
        table.update([1, 9], np.ones((2, 2), np.float32))
    with refused(GradientIndexError, IndexError, "ids[2] is 9"):
        table.update_bags([1, 1, 9], [0], np.ones((1, 2), np.float32))
    assert everything(table) == before
    with refused(GradientIndexError, IndexError, "ids[0] is 3"):
        table.state([3])


@pytest.mark.parametrize("form", ["rows", "bags"])
def test_what_is_dropped_cannot_refuse_a_step(form):
    """Its sum may overflow; it is nobody's."""
    table = zeros()
    table.lookup([1])
    ids = [1, *range(50, 90)]
    values = np.full((41, 2), 1e18, np.float32)
    values[0] = 1
    for on_nonfinite in ("raise", "skip", "propagate"):
        table.on_nonfinite = on_nonfinite
        if form == "rows":
            table.update(ids, values)
        else:
            table.update_bags(ids, range(41), values)
    assert table.state([1]).steps == 3
    assert table.stats() == {**table.stats(), "skipped": 0, "dropped": 120}


def test_numbers_that_are_not_finite():
    table = zeros()
    table.lookup([1, 2])
    values = np.array([[1, 1], [np.nan, 1]], np.float32)
    before = everything(table)
    for ids in ([1, 2], [1, 77]):  # whoever it is for: what is passed is wrong
        with refused(NonFiniteGradientError, ValueError, "grads[1, 0] is nan"):
            table.update(ids, values)
    with refused(NonFiniteGradientError, ValueError, "the gradient of id 2", "overflows"):
        table.update([1, 2], np.array([[1, 1], [1, 1e30]], np.float32))
    assert everything(table) == before
    table.on_nonfinite = "skip"
    table.update([1, 2], values)
    table.update([1, 77], values)
    assert table.state([1, 2]).steps.tolist() == [2, 0]
    assert table.stats() == {**table.stats(), "skipped": 1, "dropped": 1}


def test_an_initializer_that_fails_changes_no_row():
    def fails(ids):
        if 13 in ids:
            raise OptionError("unlucky")
        return np.ones((len(ids), 2))

    table = EmbeddingTable(2, initializer=fails, capacity=2, eviction=Eviction(when_full=True))
    table.lookup([1, 2])
    before = everything(table)
    with pytest.raises(OptionError, match="unlucky"):
        table.lookup([13, 14])
    assert everything(table) == before


def test_of_rows_of_one_moment_those_that_came_first_go_first(monkeypatch):
    """Whatever the table remembers of which rows are old: here 1 is, until it is touched again."""
    monkeypatch.setattr(ages, "time", SimpleNamespace(time=lambda: 1e9))
    table = zeros(1, capacity=3, eviction=Eviction(when_full=True))
    table.lookup([1, 2, 3])
    table.update([2, 3], np.ones((2, 1), np.float32))
    table.lookup([1, 4])
    assert table.ids().tolist() == [1, 3, 4]
    table.lookup([5])
    assert table.ids().tolist() == [3, 4, 5]
