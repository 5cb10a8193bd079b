# SPDX-License-Identifier: Apache-2.0
"""Pickled and copied optimizers: of one moment, of the same tables, and on machines of fewer cores."""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from checks import STEP_COUNTS, assert_same_bits, options_of, state_bits

from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam.errors import SparseAdamError, StateError, StateTypeError, TableError


def pickled(given):
    return pickle.loads(pickle.dumps(given))


DUPLICATES = [pickled, copy.deepcopy]


def optimizer(step_counts="global"):
    tables = {"a": np.ones((6, 3), np.float32), "b": np.ones(5)}
    opt = SparseAdam(tables, step_counts=step_counts, lr=0.25, betas=(0.5, 0.75), eps_hat=True)
    opt.step(gradients(0))
    return opt, tables


def gradients(seed):
    rng = np.random.default_rng(seed)
    return {
        "a": RowGradient(rng.integers(0, 6, 4), rng.normal(size=(4, 3))),
        "b": RowGradient(rng.integers(0, 5, 4), rng.normal(size=4)),
    }


def everything(opt):
    return state_bits(opt, dict(opt.tables))


@pytest.mark.parametrize("duplicate", DUPLICATES)
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_duplicate_steps_on_with_the_same_bits_and_tables_of_its_own(duplicate, step_counts):
    opt, tables = optimizer(step_counts)
    opt.lr = 0.0
    again = duplicate(opt)
    assert options_of(again) == options_of(opt)
    before = everything(opt)
    assert_same_bits(everything(again), before)
    opt.lr = again.lr = 0.125
    again.step(gradients(1))
    assert_same_bits(everything(opt), before)
    opt.step(gradients(1))
    assert_same_bits(everything(again), everything(opt))
    assert all(opt.tables[name] is table for name, table in tables.items())


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_tables_are_the_same_ones_as_elsewhere_in_what_is_duplicated(duplicate):
    opt, tables = optimizer()
    for given in ({"first": opt, "then": tables}, {"first": tables, "then": opt}):
        made = list(duplicate(given).values())
        again, arrays = made if isinstance(made[0], SparseAdam) else made[::-1]
        for name, table in tables.items():
            assert again.tables[name] is arrays[name]
            assert arrays[name] is not table
            np.testing.assert_array_equal(arrays[name], table)


def test_a_shallow_copy_has_the_same_tables_and_state_of_its_own():
    opt, tables = optimizer()
    again = copy.copy(opt)
    assert all(again.tables[name] is table for name, table in tables.items())
    before = opt.state_dict()["tables"]["a"]["exp_avg"]
    again.step(gradients(1))
    np.testing.assert_array_equal(opt.state["a"].exp_avg, before)


@pytest.mark.parametrize("duplicate", [*DUPLICATES, copy.copy])
def test_the_state_of_a_table_can_be_kept_as_a_copy(duplicate):
    opt, _ = optimizer("row")
    kept, before = duplicate(opt.state["a"]), opt.state_dict()["tables"]["a"]
    if duplicate is not copy.copy:
        opt.step(gradients(1))
        opt.rearrange(opt.tables["a"][:2].copy(), [0, 1], "a")
    for key in ("exp_avg", "exp_avg_sq", "steps"):
        np.testing.assert_array_equal(getattr(kept, key), before[key])


class Interleaved(pickle.Pickler):
    """A pickler during which somebody else steps, whenever it comes to an array."""

    def __init__(self, file, opt):
        super().__init__(file)
        self.opt = opt
        self.moments = [everything(opt)]

    def reducer_override(self, given):
        if isinstance(given, np.ndarray):
            self.opt.step(gradients(len(self.moments)))
            self.moments.append(everything(self.opt))
        return NotImplemented


def is_one_of(moments, opt):
    got = everything(opt)
    return any(all(np.array_equal(got[key], moment[key]) for key in moment) for moment in moments)


@pytest.mark.parametrize("tables_first", [False, True])
def test_a_pickle_is_of_one_moment_whoever_steps_meanwhile(tables_first):
    opt, tables = optimizer()
    file = io.BytesIO()
    pickler = Interleaved(file, opt)
    pickler.dump([tables, opt] if tables_first else [opt, tables])
    assert len(pickler.moments) > 5
    again = next(made for made in pickle.loads(file.getvalue()) if isinstance(made, SparseAdam))
    assert is_one_of(pickler.moments, again)


class Watched(np.ndarray):
    """An array during whose copying somebody steps."""

    step = None

    def __deepcopy__(self, memo):
        copied = np.array(self)
        Watched.step()
        return copied


@pytest.mark.parametrize("tables_first", [False, True])
def test_a_deep_copy_is_of_one_moment_whoever_steps_meanwhile(tables_first):
    tables = {"a": np.ones((6, 3), np.float32).view(Watched), "b": np.ones(5).view(Watched)}
    opt = SparseAdam(tables, step_counts="global")
    moments = [everything(opt)]

    def step():
        opt.step(gradients(len(moments)))
        moments.append(everything(opt))

    Watched.step = step
    given = [tables, opt] if tables_first else [opt, tables]
    again = next(made for made in copy.deepcopy(given) if isinstance(made, SparseAdam))
    assert len(moments) > 2
    assert is_one_of(moments, again)


@pytest.mark.jit
@pytest.mark.parametrize("duplicate", [*DUPLICATES, copy.copy])
def test_duplicates_beside_a_thread_that_steps(duplicate):
    opt, _ = optimizer()
    stop = threading.Event()

    def train():
        for step in range(1, 3000):
            if stop.is_set():
                return
            opt.step(gradients(step))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        made = [duplicate(opt).state_dict() if duplicate is copy.copy else duplicate(opt) for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    if duplicate is copy.copy:  # of live tables: the state is of one moment
        counts = [{int(saved["steps"]) for saved in state["tables"].values()} for state in made]
        assert all(len(each) == 1 for each in counts)
        return
    expected, _ = optimizer()
    made = {int(each.state["a"].steps): everything(each) for each in made}
    for step in range(1, max(made) + 1):
        if step in made:
            assert_same_bits(made[step], everything(expected))
        expected.step(gradients(step))


def in_python(code, threads, *args):
    environment = {**os.environ, "NUMBA_NUM_THREADS": str(threads)}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_more_threads_than_there_are_fall_back_with_a_warning(tmp_path):
    file = tmp_path / "pickled"
    dump = (
        "import pathlib, pickle, sys, numpy, nb_sparse_adam as n\n"
        "opt = n.SparseAdam(numpy.ones((4, 2)), num_threads=2)\n"
        "pathlib.Path(sys.argv[1]).write_bytes(pickle.dumps(opt))"
    )
    load = (
        "import pathlib, pickle, sys, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    opt = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "print(opt.num_threads, *[(each.category.__name__, str(each.message)) for each in caught])"
    )
    made = in_python(dump, 2, file)
    assert made.returncode == 0, made.stderr
    loaded = in_python(load, 1, file)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("1 ('SparseAdamWarning', 'an optimizer with num_threads=2")
    loaded = in_python(load, 2, file)
    assert loaded.stdout == "2\n", loaded.stderr


def test_pickles_of_before_are_read():
    """They had no values beside the tables."""
    opt, _ = optimizer()
    make, arguments = opt.__reduce__()
    assert_same_bits(everything(make(*arguments[:4])), everything(opt))


def broken(at, value):
    def change(arguments):
        arguments[at] = value(arguments[at]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (broken(0, lambda tables: {"a": tables["a"]}), StateError),
        (broken(0, lambda tables: {name: table.tolist() for name, table in tables.items()}), TableError),
        (broken(1, None), StateError),
        (broken(1, {}), StateError),
        (broken(1, {"step_counts": "row"}), StateError),
        (broken(1, {"step_counts": ["row"]}), SparseAdamError),
        (broken(2, "2"), SparseAdamError),
        (broken(2, 0), SparseAdamError),
        (broken(3, None), StateTypeError),
        (broken(4, lambda values: {"a": values["a"]}), StateError),
        (broken(4, lambda values: values | {"b": values["a"]}), StateError),
        (broken(4, lambda values: values | {"b": None}), StateError),
        (broken(4, 7), StateError),
    ],
)
def test_a_pickle_that_was_changed_is_refused(change, error):
    opt, _ = optimizer()
    make, arguments = opt.__reduce__()
    arguments = list(arguments)
    arguments[0] = {name: table.copy() for name, table in arguments[0].items()}
    change(arguments)
    with pytest.raises(error):
        make(*arguments)
