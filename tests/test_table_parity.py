# SPDX-License-Identifier: Apache-2.0
"""Steps of an `EmbeddingTable` have the bits of `SparseAdam` on a dense table, on any number of threads."""

import numba
import numpy as np
import pytest
from checks import STEP_COUNTS
from oracle import OracleSparseAdam

from nb_sparse_adam import BagGradient, EmbeddingTable, Eviction, RowGradient, SparseAdam
from nb_sparse_adam._src.engine.threads import max_threads

COMPILED = not numba.config.DISABLE_JIT
THREADS = sorted({1, 2, max_threads()} & set(range(1, max_threads() + 1)))
IDS = 3000 if COMPILED else 30
RNG = np.random.default_rng(5)
KNOWN = np.unique(RNG.integers(-(2**63), 2**63 - 1, IDS))
RNG.shuffle(KNOWN)
OPTIONS = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6}


def table_and_dense(dim, dtype, step_counts, num_threads=1, **options):
    """The same rows twice; the dense table has one row more, for what is dropped."""
    table = EmbeddingTable(
        dim, initializer="normal(0, 0.1)", dtype=dtype, step_counts=step_counts, num_threads=num_threads,
        **OPTIONS, **options,
    )  # fmt: skip
    dense = np.concatenate([table.lookup(KNOWN), np.zeros((1, dim), dtype)])
    return table, dense, SparseAdam(dense, step_counts=step_counts, num_threads=num_threads, **OPTIONS)


def batch(n, missing=0.2):
    """Ids, with many repeated and some that have no row, and the rows of the dense table that they have."""
    rng = np.random.default_rng(n)
    rows = rng.integers(0, len(KNOWN), n)
    rows[rng.random(n) < 0.3] = rows[0]
    ids = KNOWN[rows]
    lost = rng.random(n) < missing
    ids[lost] += rng.integers(1, 5, lost.sum())
    rows[~np.isin(ids, KNOWN)] = len(KNOWN)
    return ids, rows


def assert_same(table, dense, adam):
    __tracebackhide__ = True
    ids, values = table.export()
    assert ids.tolist() == KNOWN.tolist()
    assert values.tobytes() == dense[:-1].tobytes()
    state, expected = table.state(KNOWN), adam.state["table"]
    assert state.exp_avg.tobytes() == expected.exp_avg[:-1].tobytes()
    assert state.exp_avg_sq.tobytes() == expected.exp_avg_sq[:-1].tobytes()
    steps = expected.steps if table.step_counts == "global" else expected.steps[:-1]
    np.testing.assert_array_equal(state.steps, steps)


# How counts are kept does not depend on the dtype: each kernel more is compiled for seconds in every lane.
@pytest.mark.parametrize(
    ("step_counts", "dtype", "dim"),
    [
        *((step_counts, np.float32, dim) for step_counts in STEP_COUNTS for dim in (1, 3, 64)),
        *(("row", np.float64, dim) for dim in (1, 16)),
    ],
)
def test_steps_have_the_bits_of_a_dense_table(step_counts, dtype, dim):
    table, dense, adam = table_and_dense(dim, dtype, step_counts, max_threads())
    for n in (1, IDS // 3, 2 * IDS):
        ids, rows = batch(n)
        rng = np.random.default_rng(n)
        values = rng.normal(size=(n, dim)).astype(dtype)
        values[rng.random(values.shape) < 0.2] = 0  # "element" counts what is not 0
        table.update(ids, values)
        adam.step(RowGradient(rows, values))
        bags = max(n // 5, 1)
        offsets = np.sort(rng.integers(0, n + 1, bags + 1))
        offsets[0], offsets[-1] = 0, n
        output = rng.normal(size=(bags, dim)).astype(dtype)
        weights = rng.normal(size=n).astype(dtype)
        for how in ({"mode": "sum"}, {"mode": "mean"}, {"weights": weights}):
            table.update_bags(ids, offsets, output, **how)
            adam.step(BagGradient(rows, offsets, output, **how))
    # Rows that increase are read as they are: another path.
    at = np.arange(0, len(KNOWN), 2)
    values = np.ones((len(at), dim), dtype)
    table.update(KNOWN[at], values)
    adam.step(RowGradient(at, values))
    assert_same(table, dense, adam)
    assert table.stats()["dropped"] > 0


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_options_of_adam_mean_the_same(step_counts):
    table, dense, adam = table_and_dense(3, np.float32, step_counts)
    ids, rows = batch(40)
    values = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    for options in ({"eps_hat": True}, {"maximize": True}, {"betas": (0.5, 0.9)}, {"lr": 1.0}, {"eps": 0.1}):
        for name, value in options.items():
            setattr(table, name, value)
            setattr(adam, name, value)
        table.update(ids, values)
        adam.step(RowGradient(rows, values))
    assert_same(table, dense, adam)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_the_oracle_agrees(step_counts):
    table = EmbeddingTable(2, initializer="normal(0, 1)", step_counts=step_counts, **OPTIONS)
    known = KNOWN[:20]
    oracle = OracleSparseAdam(table.lookup(known), step_counts=step_counts, **OPTIONS)
    rng = np.random.default_rng(3)
    for _ in range(3):
        rows = rng.integers(0, 20, 30)
        values = np.abs(rng.normal(size=(30, 2))).astype(np.float32)
        mixed = np.insert(known[rows], [0, 7, 30], KNOWN[25:28])  # these have no row
        with_others = np.insert(values, [0, 7, 30], 1e9, axis=0)
        table.update(mixed, with_others)
        oracle.step(oracle.sums("rows", (rows, values)))
    state = table.state(known)
    oracle.tables["table"].assert_close(table.export()[1], state.exp_avg, state.exp_avg_sq)
    np.testing.assert_array_equal(state.steps, oracle.tables["table"].steps)
    assert table.stats()["dropped"] == 9


def test_a_mean_divides_by_all_ids_of_the_bag():
    table = EmbeddingTable(1, initializer="zeros", lr=0.1)
    table.lookup([1])
    table.update_bags([1, 2, 3, 4], [0], np.ones((1, 1), np.float32), mode="mean")  # 2 to 4 have no row
    assert table.state([1]).exp_avg[0, 0] == np.float32(0.1) * np.float32(0.25)


@pytest.mark.parametrize("order", ["first", "middle", "last", "all"])
def test_what_ids_without_a_row_get_goes_to_no_other(order):
    table = EmbeddingTable(2, initializer="zeros", lr=0.1)
    table.lookup([10, 20, 30])
    ids = {"first": [99, 10, 20], "middle": [10, 99, 20], "last": [10, 20, 99], "all": [97, 98, 99]}[order]
    values = np.array([[id_, -id_] for id_ in ids], np.float32)
    table.update(ids, values)
    for number in (10, 20, 30):
        there = number in ids
        got = table.state([number])
        assert got.steps[0] == there
        assert (got.exp_avg[0, 0] > 0) == there
        if there:
            np.testing.assert_allclose(got.exp_avg[0], [0.1 * number, -0.1 * number], rtol=1e-6)
    assert table.stats()["dropped"] == (3 if order == "all" else 1)
    assert table.stats()["steps"] == 1


def everything(num_threads, dtype=np.float32):
    """All bytes of a table that has been through everything, on so many threads."""
    n = 20_000
    table = EmbeddingTable(
        3, initializer="normal(0, 1)", num_threads=num_threads, dtype=dtype, capacity=n,
        eviction=Eviction(when_full=True), admission=2,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    seen = []
    for step in range(6):
        ids = rng.integers(0, 3 * n, n)
        ids[: n // 4] = ids[0]
        seen.append(table.lookup(ids).tobytes())
        seen.append(table.lookup_bags(ids, np.arange(0, n + 1, 4)).tobytes())
        table.update(ids, rng.normal(size=(n, 3)).astype(dtype))
        if step % 2:
            seen.append(table.evict(seen_fewer_than=2, older_than_steps=2).tobytes())
    return [*seen, *(each.tobytes() for each in (*table.export(), *table.state(table.ids()))), table.stats()]


@pytest.mark.jit
def test_any_number_of_threads_gives_the_same_bits_and_the_same_order():
    one = everything(1)
    assert one[-1]["evicted"] > 0
    for num_threads in THREADS:
        assert everything(num_threads) == one
    assert everything(1) == one  # though the index was seeded anew


def test_step_together_over_tables_of_one_name():
    tables = [EmbeddingTable(2, initializer="zeros", name="same", lr=0.1) for _ in range(2)]
    dense = [np.zeros((2, 2), np.float32) for _ in tables]
    adams = [SparseAdam(each, step_counts="row", lr=0.1) for each in dense]
    for table in tables:
        table.lookup([5, 6])
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    for _ in range(2):
        EmbeddingTable.update_together(
            {tables[0]: RowGradient([5, 6, 5], values), tables[1]: BagGradient([6, 5], [0, 1], values[:2])}
        )
        adams[0].step(RowGradient([0, 1, 0], values))
        adams[1].step(BagGradient([1, 0], [0, 1], values[:2]))
    for table, each in zip(tables, dense, strict=True):
        assert table.export()[1].tobytes() == each.tobytes()
