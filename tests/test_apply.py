# SPDX-License-Identifier: Apache-2.0
"""The kernels that update tables, given records made by hand; what steps do is in other tests."""

import numpy as np
import pytest
from records import Table, compressed, distinct, entries, run, segments, step_of

from nb_sparse_adam._src.engine.apply import apply_for
from nb_sparse_adam._src.engine.audit import audit_for
from nb_sparse_adam._src.engine.codecs import PLAIN
from nb_sparse_adam._src.engine.records import ELEMENT, GLOBAL, NO_FAULT, OVERFLOW, PROPAGATE, ROW, SKIP

ROWS, DIM = 9, 5
RULES = {"element": ELEMENT, "row": ROW, "global": GLOBAL}


def appliers_of(table):
    return apply_for(table.param.dtype, table.codec, table.state.counts.dtype, table.state.count_rule)


def bits(table):
    state = table.state
    return [array.tobytes() for array in (table.param, state.exp_avg, state.exp_avg_sq, state.steps)]


def gradients(values, columns=(0, 3), **fields):
    """The same three rows as ids in order, in segments, compressed, and as entries of two columns."""
    ids, columns = np.array([1, 4, 7]), np.array(columns)
    two = values[:, columns].reshape(-1)
    indptr = np.cumsum([0, 0, 2, 0, 0, 2, 0, 0, 2, 0])
    order = np.array([3, 0, 5, 4, 1, 2])
    return {
        "distinct": distinct(ids, values, **fields),
        "segments": segments(ids[[2, 0, 1]], values[[2, 0, 1]].copy(), **fields),
        "compressed": compressed(indptr, np.tile(columns, 3), two, **fields),
        "entries": entries(ids.repeat(2)[order], np.tile(columns, 3)[order], two[order], DIM, **fields),
    }


@pytest.mark.parametrize("kind", ["distinct", "segments", "compressed", "entries"])
@pytest.mark.parametrize("rule", RULES)
def test_a_row_that_is_not_finite_is_skipped_whole_and_counted(rule, kind):
    values = np.ones((3, DIM), np.float32)
    values[1, 3] = 1e30  # whose square is infinite
    one, other = (Table(np.zeros((ROWS, DIM), np.float32), RULES[rule]) for _ in range(2))
    tasks = run(appliers_of(one), [one], [gradients(values, on_nonfinite=SKIP, suspicious=1)[kind]], tasks=2)
    assert tasks["skipped"].sum() == 1
    assert one.totals.tolist() == [1, 1]
    assert not one.param[4].any()
    assert one.param[1].any()
    assert one.param[7].any()
    run(appliers_of(other), [other], [gradients(values, on_nonfinite=SKIP)[kind]])  # nobody suspects it
    assert other.totals.tolist() == [1, 0]
    assert np.isinf(other.state.exp_avg_sq[4]).any()


@pytest.mark.parametrize("kind", ["distinct", "segments", "compressed", "entries"])
def test_an_audit_finds_the_first_sum_that_is_not_finite(kind):
    table = Table(np.zeros((ROWS, DIM), np.float32), ROW)
    audit = audit_for(np.dtype(np.float32))
    for bad in (None, 1, 2):
        values = np.ones((3, DIM), np.float32)
        if bad is not None:
            values[bad:, 3] = 1e30
        given = gradients(values)[kind]
        arrays = step_of([table], [given]).arrays
        found = arrays["found"]
        audit(arrays["tables"], arrays["gradients"], found, 0, arrays["scratch"])
        if bad is None:
            assert found[0]["fault"] == NO_FAULT
            continue
        unit = 2 * bad + 1 if kind in ("compressed", "entries") else bad
        got = [int(found[0][name]) for name in ("fault", "place", "got", "before")]
        assert got == [OVERFLOW, unit, [1, 4, 7][bad], 1]


def test_an_audit_of_a_sum_of_many_ids():
    ids, values = np.array([3] * 1300 + [2]), np.full((1301, DIM), 1e17, np.float32)
    table = Table(np.zeros((ROWS, DIM), np.float32), ROW)
    given = segments(ids, values)
    arrays = step_of([table], [given]).arrays
    found = arrays["found"]
    audit_for(np.dtype(np.float32))(arrays["tables"], arrays["gradients"], found, 0, arrays["scratch"])
    assert [int(found[0][name]) for name in ("fault", "place", "got", "before")] == [OVERFLOW, 1, 3, 1300]


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_several_tables_in_one_call(threads):
    rng = np.random.default_rng(2)
    tables, gradients, expected = [], [], []
    for rows, dim in ((4, 3), (200, 16), (50, 33)):
        start = rng.normal(size=(rows, dim)).astype(np.float32)
        ids = rng.integers(0, rows, 3000)
        given = segments(ids, rng.normal(size=(3000, dim)).astype(np.float32))
        alone = Table(start.copy(), ROW)
        run(appliers_of(alone), [alone], [given])
        expected.append(bits(alone))
        tables.append(Table(start.copy(), ROW))
        gradients.append(given)
    run(appliers_of(tables[0]), tables, gradients, threads=threads, tasks=4)
    assert [bits(table) for table in tables] == expected
    assert [table.totals.tolist() for table in tables] == [[1, 0]] * 3


@pytest.mark.parametrize("wild", [ROWS, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("rule", RULES)
def test_ids_and_columns_that_are_none_by_now_are_left_out(rule, wild):
    values = np.ones((3, DIM), np.float32)
    one, other = (Table(np.zeros((ROWS, DIM), np.float32), RULES[rule]) for _ in range(2))
    given = gradients(values)["compressed"]
    given.kept[1]["ids"][3] = wild
    run(appliers_of(one), [one], [given])
    values[1, 3] = 0
    run(appliers_of(other), [other], [gradients(values)["compressed"]])
    assert bits(one) == bits(other)
    ids = np.array([1, 4, wild])
    run(appliers_of(one), [one], [distinct(ids, np.ones((3, DIM), np.float32))])
    run(appliers_of(other), [other], [distinct(np.array([1, 4]), np.ones((2, DIM), np.float32))])
    assert bits(one) == bits(other)


def test_rows_of_values_may_lie_apart():
    values = np.arange(60, dtype=np.float32).reshape(6, 10)
    one, other = (Table(np.zeros((ROWS, DIM), np.float32), ROW) for _ in range(2))
    for make, ids in ((distinct, np.arange(6)), (segments, np.array([3, 3, 1, 0, 1, 3]))):
        run(appliers_of(one), [one], [make(ids, values[:, 2 : 2 + DIM])])
        run(appliers_of(other), [other], [make(ids, values[:, 2 : 2 + DIM].copy())])
    assert bits(one) == bits(other)


@pytest.mark.parametrize("wide", [False, True])
def test_weights_and_means(wide):
    rng = np.random.default_rng(4)
    ids, bag_of = rng.integers(0, ROWS, 1500), np.sort(rng.integers(0, 7, 1500))
    values = rng.normal(size=(7, DIM))
    weights = rng.normal(size=1500)
    one, other = (Table(np.zeros((ROWS, DIM)), ELEMENT) for _ in range(2))
    run(appliers_of(one), [one], [segments(ids, values, bag_of=bag_of, weights=weights, wide=wide)])
    run(appliers_of(other), [other], [segments(ids, values[bag_of] * weights[:, None])])
    assert bits(one) == bits(other)
    shares = 1 / np.bincount(bag_of, minlength=7)
    run(appliers_of(one), [one], [segments(ids, values, bag_of=bag_of, reciprocals=shares, wide=wide)])
    run(appliers_of(other), [other], [segments(ids, values[bag_of] * shares[bag_of, None])])
    assert bits(one) == bits(other)


def test_no_tasks_and_empty_tasks_change_nothing_but_counts_of_steps():
    table = Table(np.zeros((ROWS, DIM), np.float32), GLOBAL)
    given = gradients(np.ones((3, DIM), np.float32), on_nonfinite=PROPAGATE)["distinct"]
    before = bits(table)[:3]
    given.units = 0
    run(appliers_of(table), [table], [given], tasks=3)
    assert bits(table)[:3] == before
    assert table.totals.tolist() == [1, 0]
    assert table.state.steps.tolist() == [[1]]


def test_variants_are_made_once():
    real = np.dtype(np.float32)
    assert apply_for(real, PLAIN, np.dtype(np.int32), ROW) is apply_for(real, PLAIN, np.dtype(np.int32), ROW)
