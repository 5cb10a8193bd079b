# SPDX-License-Identifier: Apache-2.0
"""The index of an `EmbeddingTable`: finds what is there whatever comes, goes, and grows, and no id is bad."""

import numba
import numpy as np
import pytest

from nb_sparse_adam import EmbeddingTable
from nb_sparse_adam._src.table import cells
from nb_sparse_adam._src.table.cells import (
    BUCKETS,
    CELLS,
    LAYER_CELLS,
    LAYER_WORDS,
    PASSED,
    ROWS_AT,
    SEGMENT_CELLS,
    TALLY_AT,
    WORDS,
)

COMPILED = not numba.config.DISABLE_JIT
FIRST = LAYER_CELLS * cells.BEGINS // 1000  # ids with which an index begins to grow


@pytest.fixture
def growing_from(monkeypatch):
    """With how many ids an index begins to grow: few where it is interpreted."""
    if not COMPILED:
        monkeypatch.setattr(cells, "BEGINS", 3)
        monkeypatch.setattr(cells, "ENDS", 6)
    return LAYER_CELLS * cells.BEGINS // 1000


def new(**options):
    return EmbeddingTable(1, initializer="zeros", **options)


def buckets(table):
    """(buckets, 5) ids, (buckets, 5) rows + 1, and how many ids went past each."""
    index = table._store.index[0]
    words = table._store._cells[: int(index["following"]) * LAYER_WORDS].reshape(-1, WORDS)
    halves = words.view(np.uint32)
    rows, tally = halves[:, ROWS_AT:TALLY_AT], halves[:, TALLY_AT].astype(np.int64)
    assert np.array_equal((rows > 0).sum(1), tally % PASSED)
    return words[:, :CELLS], rows, tally // PASSED


def assert_whole(table, ids):
    """Each id is there once, at its row, and nobody else."""
    __tracebackhide__ = True
    numbers, rows, _ = buckets(table)
    taken = rows > 0
    assert taken.sum() == len(ids) == len(table)
    assert not numbers[~taken].any()
    assert np.array_equal(np.sort(numbers[taken]), np.sort(ids))
    found, missing = table._store.find(np.ascontiguousarray(ids), 1)
    assert missing == 0
    assert np.array_equal(table.ids(), ids)
    where = dict(zip(numbers[taken].tolist(), (rows[taken] - 1).tolist(), strict=True))
    assert [where[number] for number in np.asarray(ids).tolist()] == found.tolist()


def kinds_of_ids(n):
    """What people and enemies number things by."""
    at = np.arange(n)
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        yield "random", rng.integers(-(2**63), 2**63 - 1, n)
        yield "sequential", at
        yield "from the end", -1 - at
        for k in (10, 16, 20, 32, 40, 46):
            yield f"equal modulo 2**{k}", (at << k) + 12345
        for factor in (0x9E3779B97F4A7C15 - 2**64, 10**15, 2**53 + 1, 3**39, 1000003, SEGMENT_CELLS, BUCKETS):
            yield f"multiples of {factor}", at * np.int64(factor)
        yield "two halves", (at % 300 << 32) | (at // 300)
        yield "bits of reals", np.sqrt(at + 1.0).view(np.int64)
        yield "few bits set", np.unique((1 << rng.integers(0, 63, (4 * n, 4))).sum(1))[:n]


@pytest.mark.jit
def test_no_kind_of_ids_is_worse_than_random_ones():
    """Counted: ids that are not in their bucket, and the most buckets that one went past."""
    n = 4 * FIRST
    went_past = {}
    for kind, ids in kinds_of_ids(n):
        table = new()
        table.lookup(ids)
        assert len(table) == len(ids) == n, kind
        _, rows, past = buckets(table)
        fullness = (rows > 0).reshape(-1, SEGMENT_CELLS).mean(1)
        assert fullness.max() < 0.9, kind
        went_past[kind] = past.sum() / n, past.max()
    total, most = went_past["random"]
    assert 0.01 < total < 0.5
    for kind, (fraction, worst) in went_past.items():
        assert fraction < 1.5 * total + 0.05, (kind, went_past)
        assert worst < 3 * most + 5, (kind, went_past)


@pytest.mark.parametrize("threads", [1, pytest.param(None, marks=pytest.mark.jit)])
def test_everything_is_found_while_it_grows(threads, growing_from):
    table = new(num_threads=threads)
    rng = np.random.default_rng(1)
    many = growing_from * (4 if COMPILED else 3)
    part = 4997 if COMPILED else growing_from // 3
    ids = rng.permutation(np.concatenate([rng.integers(-(2**63), 2**63 - 1, many - 100), np.arange(100)]))
    other = ids + 1
    other = other[~np.isin(other, ids)][:300]
    while_growing = 0
    for end in range(0, many + part, part):
        table.lookup(ids[max(end - part, 0) : end])
        while_growing += int(table._store.index["left"][0]) > 0
        assert table.contains(ids[:end][-5000 if COMPILED else -300 :]).all()
        assert not table.contains(ids[end:][:300]).any()
        assert not table.contains(other).any()
        if end % 5 == 0:
            assert_whole(table, ids[:end])
    assert while_growing > (2 if COMPILED else 0)
    assert_whole(table, ids)


@pytest.mark.jit
def test_an_index_grows_more_than_once_in_one_call():
    table = new()
    ids = np.random.default_rng(5).integers(-(2**63), 2**63 - 1, 9 * FIRST)
    table.lookup(ids[:100])
    table.lookup(ids)
    assert_whole(table, ids)


@pytest.mark.jit
def test_it_takes_24_bytes_an_id_at_most():
    """Counted whenever ids have come, with the index growing and grown."""
    table, worst = new(), 0
    for part in np.array_split(np.random.default_rng(6).integers(-(2**63), 2**63 - 1, 3_000_000), 200):
        table.lookup(part)
        if len(table) > 1_000_000:
            worst = max(worst, table.stats()["bytes_of_index"] / len(table))
    assert 20 < worst <= 24


def test_ids_are_taken_out_without_a_trace():
    table = new()
    rng = np.random.default_rng(2)
    n = int(1.02 * FIRST) if COMPILED else 500
    ids = rng.integers(-(2**63), 2**63 - 1, n)
    ids[:3] = 0, -1, 1
    for _ in range(2):
        table.lookup(ids)
        assert_whole(table, ids)
        order = rng.permutation(n)
        for part in np.array_split(order, 6):
            table._let_go(table._store.find(ids[part], 1)[0])
            assert not table.contains(ids[part]).any()
            _, rows, _ = buckets(table)
            assert (rows > 0).sum() == len(table)
        assert len(table) == 0
        for each in buckets(table):
            assert not each.any()  # nothing went past anything


@pytest.mark.jit
def test_an_index_that_ids_come_to_and_leave_stays_as_it_is():
    table = new(capacity=3000)
    rng = np.random.default_rng(3)
    for _ in range(200):
        table.lookup(rng.integers(0, 2**62, 1000))
        table.evict(down_to=1500)
    assert table._store.index["following"][0] == 1
    assert_whole(table, table.ids())
    _, _, past = buckets(table)
    assert past.max() < 10
    assert table._store.used <= 3000


def meeting_in_one_bucket():
    """A table whose ids that are multiples of 2**20 have one bucket, and the same ones after it."""
    table = new()
    index = table._store.index
    index["salt"], index["first_factor"], index["second_factor"] = 0, 1, 1
    return table


def test_full_buckets_are_gone_past():
    """As if all ids were chosen against the hash: they meet in one bucket, and are found all the same."""
    table = meeting_in_one_bucket()
    n = 60
    ids = np.arange(n) << 20
    table.lookup(ids)
    assert_whole(table, ids)
    _, _, past = buckets(table)
    assert past.max() >= n - CELLS
    table._let_go(table._store.find(ids[::2].copy(), 1)[0])
    assert_whole(table, ids[1::2])
    assert not table.contains(ids[::2]).any()
    table.lookup(ids[::2])
    table._let_go(table._store.find(ids, 1)[0])
    assert not any(each.any() for each in buckets(table))


def test_where_a_row_is_does_not_depend_on_the_salt():
    ids = np.random.default_rng(4).integers(-(2**63), 2**63 - 1, 300)
    rows = []
    for _ in range(2):
        table = new()
        table.lookup(ids)
        table.evict(down_to=100)
        table.lookup(ids[:150])
        rows.append(table._store.find(ids[:150], 1)[0].tolist())
    assert rows[0] == rows[1]


def test_an_id_that_comes_twice_in_a_call_where_others_have_left():
    """Its bucket has room, and has been gone past: it is put off, and is there once when it comes again."""
    table = meeting_in_one_bucket()
    ids = np.arange(14) << 20
    table.lookup(ids[:12])
    table._let_go(table._store.find(ids[:2].copy(), 1)[0])
    table.lookup([*ids[12:], *ids[12:], *ids[:2], *ids[:2]])
    assert_whole(table, np.concatenate([ids[2:], ids[:2]]))
