# SPDX-License-Identifier: Apache-2.0
"""`apply_row_gradient` inside a user's own kernel: the same bits as `SparseAdam.step`."""

import threading

import numpy as np
import pytest
from checks import STEP_COUNTS, assert_same_bits, refused, state_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit, prange

from nb_sparse_adam import RowGradient, SparseAdam, apply_row_gradient
from nb_sparse_adam.errors import OptionError, TableError

ROWS, DIM = 9, 5


@njit
def apply_all(table, rows, values):
    applied = 0
    for s in range(len(rows)):
        applied += apply_row_gradient(table, rows[s], values[s])
    return applied


@njit(parallel=True)
def apply_all_parallel(table, rows, values):
    for s in prange(len(rows)):
        apply_row_gradient(table, rows[s], values[s])


def pair(step_counts, dtype=np.float32, rows=ROWS, dim=DIM, **options):
    """Two optimizers alike, one for steps and one for a kernel of our own."""
    options = {"on_nonfinite": "propagate", **options}
    start = np.random.default_rng(1).normal(size=(rows, dim)).astype(dtype)
    return [SparseAdam(start.copy(), step_counts=step_counts, **options) for _ in range(2)]


def same(one, other):
    assert_same_bits(state_bits(one, dict(one.tables)), state_bits(other, dict(other.tables)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), eps_hat=st.booleans(), maximize=st.booleans())
def test_the_bits_are_those_of_step(step_counts, dtype, seed, eps_hat, maximize):
    rng = np.random.default_rng(seed)
    steps, mine = pair(step_counts, dtype, lr=0.1, eps_hat=eps_hat, maximize=maximize)
    for _ in range(4):
        rows = np.sort(rng.choice(ROWS, size=4, replace=False))
        values = rng.normal(size=(4, DIM)).astype(dtype)
        values[rng.random(values.shape) < 0.4] = 0
        steps.step(RowGradient(rows, values))
        with mine.kernel_table() as table:
            assert apply_all(table, rows, values) == 4
    same(steps, mine)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_threads_with_rows_of_their_own_are_exact(step_counts):
    rng = np.random.default_rng(3)
    steps, mine = pair(step_counts, rows=500, dim=16)
    for _ in range(3):
        rows, values = np.arange(500), rng.normal(size=(500, 16)).astype(np.float32)
        steps.step(RowGradient(rows, values))
        with mine.kernel_table() as table:
            apply_all_parallel(table, rows, values)
    same(steps, mine)


@njit(parallel=True)
def race(table, rows, values, repeats):
    """Two threads, the same rows: Hogwild."""
    for t in prange(2):
        for _ in range(repeats):
            for s in range(len(rows)):
                apply_row_gradient(table, rows[s], values[t, s])


@pytest.mark.jit
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_threads_that_race_write_nowhere_else(step_counts):
    """Counts change between two looks at them: no look may decide where something is written."""
    rng = np.random.default_rng(5)
    optimizer = SparseAdam(np.zeros((4, 32), np.float32), step_counts=step_counts, on_nonfinite="skip")
    memory = rng.normal(size=(2 * 3, 4, 32)).astype(np.float32)
    memory[rng.random(memory.shape) < 0.1] = 0
    before = memory.copy()
    with optimizer.kernel_table() as table:
        race(table, np.array([0, 1, 2]), memory[2:4], 20_000)
    np.testing.assert_array_equal(memory, before)
    assert np.isfinite(optimizer.tables["table"]).all()
    assert not optimizer.tables["table"][3].any()


def test_a_1d_table_has_rows_of_one():
    steps = SparseAdam(np.zeros(5), on_nonfinite="skip")
    mine = SparseAdam(np.zeros(5), on_nonfinite="skip")
    steps.step(RowGradient([1, 3], np.array([1.0, 2.0])))
    with mine.kernel_table("table") as table:
        apply_all(table, np.array([1, 3]), np.array([[1.0], [2.0]]))
    same(steps, mine)


def test_skip_leaves_a_poisoned_row_out_and_says_so():
    mine = SparseAdam(np.zeros((3, 2), np.float32), on_nonfinite="skip")
    values = np.array([[1, np.nan], [1e30, 1], [1, 1]], np.float32)
    with mine.kernel_table() as table:
        assert apply_all(table, np.arange(3), values) == 1
    assert not mine.tables["table"][:2].any()
    assert mine.state["table"].steps.tolist() == [[0, 0], [0, 0], [1, 1]]


def test_raise_is_refused_before_anything_is_written():
    mine = SparseAdam(np.zeros((3, 2), np.float32))
    words = ("on_nonfinite", "'skip'", "'propagate'")
    with (
        refused(OptionError, ValueError, *words, opt=mine, tables=dict(mine.tables)),
        mine.kernel_table(),
    ):
        pass


def test_the_table_must_be_named_where_there_are_several():
    mine = SparseAdam({"a": np.zeros((3, 2)), "b": np.zeros((3, 2))}, on_nonfinite="skip")
    for name in (None, "c"):
        with refused(TableError, ValueError, "'a'", "'b'", repr(name)), mine.kernel_table(name):
            pass


@pytest.mark.parametrize("row", [-1, ROWS, 2**62, -(2**62)])
def test_a_wild_row_is_an_error_and_not_a_write(row):
    _, mine = pair("element")
    before = state_bits(mine, dict(mine.tables))
    with pytest.raises(IndexError, match="no such row"), mine.kernel_table() as table:
        apply_all(table, np.array([row]), np.ones((1, DIM), np.float32))
    assert_same_bits(state_bits(mine, dict(mine.tables)), before)


def test_a_gradient_of_another_length_is_refused():
    _, mine = pair("row")
    with pytest.raises(ValueError, match="as long as a row"), mine.kernel_table() as table:
        apply_all(table, np.array([1]), np.ones((1, DIM + 1), np.float32))
    assert not mine.state["table"].steps.any()


@pytest.mark.parametrize("step_counts", ["element", "row"])
def test_a_count_stays_at_the_end_of_its_type_and_the_next_step_widens_it(step_counts):
    _, mine = pair(step_counts)
    state = mine.state_dict()
    most = 2**31 - 1
    state["tables"]["table"]["steps"][2] = most - 1
    mine.load_state_dict(state)
    values = np.ones((1, DIM), np.float32)
    values[0, 1] = 0
    with mine.kernel_table() as table:
        for _ in range(3):
            apply_all(table, np.array([2]), values)
    expected = most if step_counts == "row" else [most, most - 1, most, most, most]
    np.testing.assert_array_equal(mine.state["table"].steps[2], expected)
    mine.step(RowGradient([2], values))
    assert mine.state["table"].steps.dtype == np.int64
    expected = most + 1 if step_counts == "row" else [most + 1, most - 1, most + 1, most + 1, most + 1]
    np.testing.assert_array_equal(mine.state["table"].steps[2], expected)


def test_steps_of_other_threads_wait_for_the_block():
    _, mine = pair("row")
    stepped = threading.Event()

    def step():
        mine.step(RowGradient([0], np.ones((1, DIM), np.float32)))
        stepped.set()

    thread = threading.Thread(target=step)
    with mine.kernel_table() as table:
        thread.start()
        assert not stepped.wait(0.2)
        apply_all(table, np.array([0]), np.ones((1, DIM), np.float32))
    thread.join()
    assert mine.state["table"].steps[0] == 2
