# SPDX-License-Identifier: Apache-2.0
"""State dicts that are refused in their last entry, that share memory with the state, or are interrupted."""

import itertools

import numpy as np
import pytest
from checks import STEP_COUNTS, assert_same_bits, options_of, refused, state_bits
from interrupts import interrupted

from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam.errors import StateError, StateTypeError


def optimizer(step_counts="row", seed=0, **options):
    """Two tables, of which the second has the last word."""
    tables = {"a": np.ones((4, 3), np.float32), "b": np.ones((4, 3), np.float32)}
    opt = SparseAdam(tables, step_counts=step_counts, on_nonfinite="skip", **options)
    step(opt, seed)
    return opt, tables


def step(opt, seed):
    rng = np.random.default_rng(seed)
    for _ in range(2):
        opt.step({name: RowGradient(rng.integers(0, 4, 6), rng.normal(size=(6, 3))) for name in opt.tables})


def set_last(state, key, value):
    state["tables"]["b"][key] = value(state["tables"]["b"][key]) if callable(value) else value


WRONG = [
    *(("skipped_rows", number) for number in (2**63, 2**64, 10**30, np.uint64(2**63), -1, np.int8(-1))),
    *(("skipped_rows", other) for other in (True, np.True_, 1.0, "5", None, np.zeros(1, np.int64))),
    ("steps", lambda steps: np.full(steps.shape, 2**63 - 1)),
    ("steps", lambda steps: np.full(steps.shape, 2**62 + 1)),
    ("steps", lambda steps: np.full(steps.shape, -(2**63))),
    ("steps", lambda steps: steps.astype(np.uint64)),
    ("steps", lambda steps: steps.astype(object)),
    ("steps", lambda steps: steps.astype(steps.dtype.newbyteorder())),
    ("steps", [1, [2, 3]]),
    ("exp_avg", [[1.0], [2.0, 3.0]]),
    ("exp_avg", None),
    ("exp_avg", lambda array: array.astype(object)),
    ("exp_avg", lambda array: array.astype(array.dtype.newbyteorder())),
    ("exp_avg_sq", lambda array: array[:, :2]),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_what_is_wrong_in_the_last_table_has_changed_nothing_in_the_first(step_counts, key, value):
    opt, tables = optimizer(step_counts)
    state = optimizer(step_counts, seed=1)[0].state_dict()
    set_last(state, key, value)
    with refused_somehow("'b'", key, opt=opt, tables=tables):
        opt.load_state_dict(state)


def refused_somehow(*words, opt, tables):
    class Refused:
        def __enter__(self):
            self.before = state_bits(opt, tables), options_of(opt)

        def __exit__(self, kind, error, _):
            assert kind in (StateError, StateTypeError), error
            assert all(word in str(error) for word in words), error
            assert_same_bits(state_bits(opt, tables), self.before[0])
            assert options_of(opt) == self.before[1]
            return True

    return Refused()


def test_versions_and_options_of_odd_types_are_refused():
    opt, tables = optimizer()
    for key, value in [
        *(("version", odd) for odd in (True, np.ones(2), [1], [1, [2]], "1", None, 2**70)),
        *(
            ("options", opt.state_dict()["options"] | {"step_counts": odd})
            for odd in (["row"], None, np.ones(2))
        ),
        ("options", opt.state_dict()["options"] | {"lr": 10**400}),
        ("options", opt.state_dict()["options"] | {"betas": itertools.count()}),
    ]:
        state = opt.state_dict() | {key: value}
        with refused(StateError, ValueError, "state dict", opt=opt, tables=tables):
            opt.load_state_dict(state)
    for version in (1.0, np.int64(1), np.array(1)):
        opt.load_state_dict(opt.state_dict() | {"version": version})


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_the_largest_count_that_is_loaded_goes_on(step_counts):
    opt, tables = optimizer(step_counts)
    state = opt.state_dict()
    for saved in state["tables"].values():
        saved["steps"] = np.full(saved["steps"].shape, 2**62)
        saved["skipped_rows"] = 2**62
    opt.load_state_dict(state)
    opt.step({"b": RowGradient([1], np.full((1, 3), np.nan))})
    opt.step({"b": RowGradient([1], np.ones((1, 3)))})
    assert opt.state["b"].steps.max() == 2**62 + (2 if step_counts == "global" else 1)
    assert opt.skipped_rows["b"] == 2**62 + 1
    assert all(np.isfinite(table).all() for table in tables.values())


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_arrays_may_be_views_of_the_state_that_they_are_loaded_into(step_counts):
    opt, tables = optimizer(step_counts)
    before = opt.state_dict()["tables"]
    given = opt.state_dict()
    live = opt.state
    given["tables"]["a"] |= {"exp_avg": live["b"].exp_avg_sq, "steps": live["b"].steps}
    given["tables"]["b"] |= {"exp_avg": live["b"].exp_avg[::-1], "exp_avg_sq": live["a"].exp_avg_sq}
    given["tables"]["b"] |= {"steps": live["a"].steps}
    opt.load_state_dict(given)
    after = opt.state_dict()["tables"]
    for got, right in [
        (after["a"]["exp_avg"], before["b"]["exp_avg_sq"]),
        (after["a"]["exp_avg_sq"], before["a"]["exp_avg_sq"]),
        (after["a"]["steps"], before["b"]["steps"]),
        (after["b"]["exp_avg"], before["b"]["exp_avg"][::-1]),
        (after["b"]["exp_avg_sq"], before["a"]["exp_avg_sq"]),
        (after["b"]["steps"], before["a"]["steps"]),
    ]:
        np.testing.assert_array_equal(got, right, strict=True)
    assert before["a"]["exp_avg_sq"].any()
    bits = state_bits(opt, tables)
    opt.load_state_dict(opt.state_dict() | {"tables": {name: as_given(live[name]) for name in tables}})
    assert_same_bits(state_bits(opt, tables), bits)


def as_given(state):
    arrays = {key: getattr(state, key) for key in ("exp_avg", "exp_avg_sq", "steps")}
    return {**arrays, "skipped_rows": state.skipped_rows}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # generators let go
def test_an_interrupt_between_any_two_bytecodes_leaves_the_old_state_or_the_new():
    given = optimizer(seed=1, lr=0.5, betas=(0.5, 0.75), eps_hat=True)[0].state_dict()
    given["tables"]["a"]["steps"] = given["tables"]["a"]["steps"].astype(np.int64) + 2**31  # to be widened
    opt, tables = optimizer()
    old = state_bits(opt, tables), options_of(opt)
    opt.load_state_dict(given)
    new = state_bits(opt, tables), options_of(opt)
    found = set()
    for number in itertools.count():
        opt, tables = optimizer()
        stopped = interrupted(lambda opt=opt: opt.load_state_dict(given), number, every=True) is not None
        got = state_bits(opt, tables), options_of(opt)
        is_new = got[1] == new[1]
        assert_same_bits(got[0], (new if is_new else old)[0])
        assert got[1] == (new if is_new else old)[1]
        found.add((stopped, is_new))
        if not stopped:
            break
    assert found == {(True, False), (True, True), (False, True)}


def test_counts_of_64_bits_are_loaded_into_a_file(tmp_path):
    opt, tables = optimizer(state_dir=tmp_path)
    state = opt.state_dict()
    state["tables"]["a"]["steps"] = np.full(4, 2**40)
    files = set(tmp_path.iterdir())
    set_last(state, "skipped_rows", -1)
    with refused(StateError, ValueError, "skipped_rows", opt=opt, tables=tables):
        opt.load_state_dict(state)
    assert set(tmp_path.iterdir()) == files
    set_last(state, "skipped_rows", 0)
    opt.load_state_dict(state)
    assert [file.suffix for file in set(tmp_path.iterdir()) - files] == [".int64"]
    step(opt, 3)
    assert opt.state["a"].steps.min() >= 2**40
