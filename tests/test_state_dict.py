# SPDX-License-Identifier: Apache-2.0
"""State dicts: copies that continue training with the same bits, checked whole before they are loaded."""

import copy
import pickle

import numpy as np
import pytest
from backends import CPU, CUDA, host
from checks import STEP_COUNTS, assert_same_bits, bits, refused, state_bits

from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam.errors import StateError, StateTypeError

OPTIONS = {
    "lr": 0.25,
    "betas": (0.5, 0.75),
    "eps": 1e-4,
    "eps_hat": True,
    "maximize": True,
    "on_nonfinite": "skip",
}


def fresh_tables(backend=CPU):
    return backend.table({"user": np.ones((6, 3), np.float32), "bias": np.ones(5, np.float64)})


def train(opt, steps, seed=0, backend=CPU):
    """Some steps, one row of each of which is skipped."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        values = rng.normal(size=(8, 3))
        values[rng.integers(8), 0] = np.nan
        gradients = {
            "user": RowGradient(rng.integers(0, 6, 8), values),
            "bias": RowGradient(rng.integers(0, 5, 4), rng.normal(size=4)),
        }
        opt.step(backend.gradient(gradients))


def trained(step_counts="element", backend=CPU):
    tables = fresh_tables(backend)
    opt = SparseAdam(tables, step_counts=step_counts, **OPTIONS)
    train(opt, 3, backend=backend)
    return opt, tables


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_state_dict_is_the_whole_state(step_counts, backend):
    opt, _ = trained(step_counts, backend)
    state = opt.state_dict()
    assert state.keys() == {"version", "options", "tables"}
    assert state["version"] == 1
    assert state["options"] == OPTIONS | {"step_counts": step_counts}
    assert list(state["tables"]) == ["user", "bias"]
    for name, saved in state["tables"].items():
        assert saved.keys() == {"exp_avg", "exp_avg_sq", "steps", "skipped_rows"}
        assert type(saved["skipped_rows"]) is int
        assert saved["skipped_rows"] == opt.skipped_rows[name]
        live = opt.state[name]
        for what in ("exp_avg", "exp_avg_sq", "steps"):
            assert type(saved[what]) is np.ndarray
            assert saved[what].dtype == getattr(live, what).dtype
            np.testing.assert_array_equal(saved[what], host(getattr(live, what)), strict=True)
        assert saved["exp_avg"].any()
    assert state["tables"]["user"]["skipped_rows"] > 0


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_state_dict_is_a_copy_both_ways(step_counts, backend):
    opt, tables = trained(step_counts, backend)
    state = opt.state_dict()
    kept = copy.deepcopy(state)
    train(opt, 1, seed=1, backend=backend)
    assert_same_state(state, kept)  # steps do not reach it
    opt.load_state_dict(state)
    before = state_bits(opt, tables)
    for saved in state["tables"].values():  # nor does it reach the optimizer
        saved["exp_avg"][...] = 7
        saved["steps"][...] = 7
    assert_same_bits(state_bits(opt, tables), before)
    train(opt, 1, seed=1, backend=backend)
    assert (state["tables"]["user"]["exp_avg"] == 7).all()


def assert_same_state(got, expected):
    assert got["options"] == expected["options"]
    for name, saved in expected["tables"].items():
        assert got["tables"][name]["skipped_rows"] == saved["skipped_rows"]
        for what in ("exp_avg", "exp_avg_sq", "steps"):
            np.testing.assert_array_equal(bits(got["tables"][name][what]), bits(saved[what]))


def from_one_to_the_other():
    """Each pair of backends; a state dict is no one's."""
    gpu = pytest.mark.gpu
    return pytest.mark.parametrize(
        ("backend", "of_again"),
        [
            (CPU, CPU),
            pytest.param(CPU, CUDA, marks=gpu),
            pytest.param(CUDA, CPU, marks=gpu),
            pytest.param(CUDA, CUDA, marks=gpu),
        ],
        ids=lambda backend: backend.name,
    )


@from_one_to_the_other()
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_training_continues_with_the_bits_of_an_uninterrupted_run(step_counts, backend, of_again):
    opt, tables = trained(step_counts, backend)
    state = pickle.loads(pickle.dumps(opt.state_dict()))
    restored = of_again.table({name: host(table).copy() for name, table in tables.items()})
    again = SparseAdam(restored, step_counts=step_counts)  # other options: those of the state win
    again.load_state_dict(state)
    for name, value in OPTIONS.items():
        assert getattr(again, name) == value
    assert_same_bits(state_bits(again, restored), state_bits(opt, tables))
    train(opt, 3, seed=2, backend=backend)
    train(again, 3, seed=2, backend=of_again)
    assert_same_bits(state_bits(again, restored), state_bits(opt, tables))


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_views_taken_before_a_load_stay_live(step_counts, backend):
    opt, _ = trained(step_counts, backend)
    state = opt.state_dict()
    fresh = SparseAdam(fresh_tables(backend), step_counts=step_counts)
    view = fresh.state["user"]
    fresh.load_state_dict(state)
    np.testing.assert_array_equal(host(view.exp_avg), state["tables"]["user"]["exp_avg"])
    np.testing.assert_array_equal(host(view.steps), state["tables"]["user"]["steps"])


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


def change(*path, to):
    """An edit of a state dict: the entry at ``path`` becomes ``to``, or ``to(entry)``."""

    def edit(state):
        *parents, last = path
        for key in parents:
            state = state[key]
        state[last] = to(state[last]) if callable(to) else to

    return edit


USER = ("tables", "user")
BROKEN = {
    "no version": (lambda s: s.pop("version"), StateError, ["version"]),
    "version 2": (change("version", to=2), StateError, ["version", "2"]),
    "no options": (lambda s: s.pop("options"), StateError, ["options"]),
    "no tables": (lambda s: s.pop("tables"), StateError, ["tables"]),
    "an extra entry": (lambda s: s.update(surplus=1), StateError, ["surplus"]),
    "a missing table": (change("tables", to=lambda t: without(t, "bias")), StateError, ["bias"]),
    "an extra table": (lambda s: s["tables"].update(surplus=s["tables"]["bias"]), StateError, ["surplus"]),
    "a table without steps": (change(*USER, to=lambda t: without(t, "steps")), StateError, ["user", "steps"]),
    "a table with more": (lambda s: s["tables"]["user"].update(surplus=1), StateError, ["user", "surplus"]),
    "another shape": (
        change(*USER, "exp_avg", to=lambda a: a[:5]),
        StateError,
        ["user", "exp_avg", "(5, 3)", "(6, 3)"],
    ),
    "another dtype": (
        change(*USER, "exp_avg_sq", to=lambda a: a.astype(np.float64)),
        StateError,
        ["user", "exp_avg_sq", "float64", "float32"],
    ),
    "no array": (
        change(*USER, "exp_avg", to=lambda a: a.tolist()),
        StateError,
        ["user", "exp_avg", "float64"],
    ),
    "steps of a float dtype": (
        change(*USER, "steps", to=lambda a: a.astype(np.float32)),
        StateError,
        ["user", "steps", "float32"],
    ),
    "steps of another shape": (
        change(*USER, "steps", to=np.zeros((2, 3, 4), np.int32)),
        StateError,
        ["steps", "(2, 3, 4)"],
    ),
    "negative steps": (
        change(*USER, "steps", to=lambda a: a - np.int32(90)),
        StateError,
        ["user", "steps", "-"],
    ),
    "negative exp_avg_sq": (change(*USER, "exp_avg_sq", to=lambda a: -a), StateError, ["user", "exp_avg_sq"]),
    "negative skipped rows": (
        change(*USER, "skipped_rows", to=-5),
        StateError,
        ["user", "skipped_rows", "-5"],
    ),
    "skipped rows of a wrong type": (
        change(*USER, "skipped_rows", to="5"),
        StateError,
        ["user", "skipped_rows", "'5'"],
    ),
    "a missing option": (lambda s: s["options"].pop("lr"), StateError, ["lr"]),
    "an extra option": (lambda s: s["options"].update(surplus=1), StateError, ["surplus"]),
    "a wrong option": (change("options", "lr", to=-0.5), StateError, ["lr", "-0.5"]),
    "another wrong option": (change("options", "betas", to=(0.9, 1.0)), StateError, ["betas", "1.0"]),
    "other counts": (change("options", "step_counts", to="nothing"), StateError, ["step_counts", "nothing"]),
    "an option of a wrong type": (change("options", "on_nonfinite", to=3), StateError, ["on_nonfinite", "3"]),
    "tables of a wrong type": (change("tables", to=[1, 2]), StateTypeError, ["tables", "list"]),
    "a table of a wrong type": (change(*USER, to=7), StateTypeError, ["user", "int"]),
    "options of a wrong type": (change("options", to=None), StateTypeError, ["options", "None"]),
}


@pytest.mark.parametrize(("edit", "error", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_state_dict_is_refused_before_anything_is_written(edit, error, words, backend):
    for step_counts in backend.step_counts:
        opt, tables = trained(step_counts, backend)
        state = copy.deepcopy(opt.state_dict())
        train(opt, 1, seed=3, backend=backend)  # so that a partial load would be seen
        opt.lr = 0.125
        edit(state)
        builtin = TypeError if error is StateTypeError else ValueError
        with refused(error, builtin, *words, opt=opt, tables=tables):
            opt.load_state_dict(state)


@pytest.mark.parametrize("state", [None, 3, [], "state"])
def test_a_state_dict_of_a_wrong_type_is_refused(state, backend):
    opt, tables = trained(backend=backend)
    with refused(StateTypeError, TypeError, type(state).__name__, opt=opt, tables=tables):
        opt.load_state_dict(state)


@pytest.mark.parametrize("of_state", STEP_COUNTS)
@pytest.mark.parametrize("of_optimizer", STEP_COUNTS)
def test_state_of_other_step_counts_is_refused(of_optimizer, of_state, backend):
    state = trained(of_state, backend)[0].state_dict()
    opt, tables = trained(of_optimizer, backend)
    if of_optimizer == of_state:
        opt.load_state_dict(state)
        assert_same_state(opt.state_dict(), state)
    else:
        with refused(StateError, ValueError, "step_counts", of_state, of_optimizer, opt=opt, tables=tables):
            opt.load_state_dict(state)


def test_state_of_one_table_is_refused_for_several(backend):
    table = backend.table(np.ones((6, 3), np.float32))
    state = SparseAdam(table).state_dict()
    opt, tables = trained(backend=backend)
    with refused(StateError, ValueError, "user", opt=opt, tables=tables):
        opt.load_state_dict(state)
