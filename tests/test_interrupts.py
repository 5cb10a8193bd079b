"""A step is done or not begun, whatever interrupts it: signal handlers, forks, other threads."""

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading

import numba
import numpy as np
import pytest
from checks import assert_same_bits, state_bits

from nb_sparse_adam import RowGradient, SparseAdam, runs
from nb_sparse_adam.errors import SparseAdamWarning


def two_tables(**options):
    tables = {"user": np.ones((50, 4), np.float32), "item": np.ones((30, 4))}
    return SparseAdam(tables, lr=0.1, **options), tables


GRADIENTS = {
    "user": RowGradient(np.array([3, 7, 3]), np.ones((3, 4), np.float32)),
    "item": RowGradient(np.array([2, 9]), np.ones((2, 4), np.float32)),
}


class Interrupting:
    """Stands for a run's work, and raises before or after its kernel, as a signal handler would."""

    calls = 0

    def __init__(self, work, places):
        self._work, self._places = work, places

    def __getattr__(self, name):
        return getattr(self._work, name)  # rehearsals are not disturbed

    def run(self, table):
        Interrupting.calls += 1
        call = Interrupting.calls
        if (call, "before") in self._places:
            raise KeyboardInterrupt
        self._work.run(table)
        if (call, "after") in self._places:
            raise KeyboardInterrupt


def step_interrupted(opt, places):
    """Step with an interrupt at each of the places: (number of the kernel's call, "before" or "after" it)."""
    Interrupting.calls = 0
    prepared = runs.prepare(opt._parts(GRADIENTS))
    assert len(prepared) == 2
    for run in prepared:
        run.work = Interrupting(run.work, places)
    with pytest.raises(KeyboardInterrupt):
        runs.run_all(prepared)


@pytest.mark.parametrize(
    "places",
    [{(1, "after")}, {(2, "before")}, {(2, "after")}, {(1, "after"), (2, "before"), (3, "before")}],
)
def test_an_interrupt_after_the_first_write_is_raised_when_every_table_is_done(places):
    undisturbed, its_tables = two_tables()
    undisturbed.step(GRADIENTS)
    opt, tables = two_tables()
    step_interrupted(opt, places)
    assert_same_bits(state_bits(opt, tables), state_bits(undisturbed, its_tables))


@pytest.mark.parametrize(("when", "steps"), [("before", 0), ("after", 1)])
def test_a_batch_of_tables_is_one_native_call(when, steps):
    tables = {f"t{i}": np.ones((50, 4), np.float32) for i in range(5)}
    opt = SparseAdam(tables, num_threads=1)
    prepared = runs.prepare(opt._parts(dict.fromkeys(tables, GRADIENTS["user"])))
    assert len(prepared) == 1
    Interrupting.calls = 0
    prepared[0].work = Interrupting(prepared[0].work, {(1, when)})
    with pytest.raises(KeyboardInterrupt):
        runs.run_all(prepared)
    for state in opt.state.values():
        assert state.steps.max() == steps


def test_an_interrupt_before_the_first_write_changes_nothing():
    opt, tables = two_tables()
    before = state_bits(opt, tables)
    step_interrupted(opt, {(1, "before")})
    assert_same_bits(state_bits(opt, tables), before)
    opt.step(GRADIENTS)
    undisturbed, its_tables = two_tables()
    undisturbed.step(GRADIENTS)
    assert_same_bits(state_bits(opt, tables), state_bits(undisturbed, its_tables))


def large_gradient(seed):
    rng = np.random.default_rng(seed)
    return RowGradient(rng.integers(0, 5000, 8000), rng.normal(size=(8000, 16)).astype(np.float32))


@pytest.mark.jit
def test_steps_of_one_optimizer_from_many_threads_are_all_applied():
    table = np.zeros((5000, 16), np.float32)
    opt = SparseAdam(table, step_counts="row")
    gradient = RowGradient(np.arange(5000), np.ones((5000, 16), np.float32))
    threads = [threading.Thread(target=lambda: [opt.step(gradient) for _ in range(5)]) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (opt.state["table"].steps == 80).all()


PROGRAM = """
    import sys, threading
    import numpy as np
    from nb_sparse_adam import RowGradient, SparseAdam

    rng = np.random.default_rng(0)
    gradient = RowGradient(rng.integers(0, 5000, 8000), rng.normal(size=(8000, 16)).astype(np.float32))

    def train(out):
        table = np.zeros((5000, 16), np.float32)
        opt = SparseAdam(table)
        for _ in range(20):
            opt.step(gradient)
        out.append(table.tobytes())

    results = []
    threads = [threading.Thread(target=train, args=(results,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    import numba
    print(numba.threading_layer(), len(results), len(set(results)))
"""


@pytest.mark.jit
@pytest.mark.parametrize(
    "layer",
    [
        "workqueue",
        pytest.param(
            "omp",
            marks=pytest.mark.skipif(
                sys.platform != "linux", reason="numba's wheels have OpenMP on Linux only"
            ),
        ),
    ],
)
def test_different_optimizers_step_from_many_threads_on_every_layer(layer):
    """numba's workqueue ends the process where two threads enter it at once."""
    env = {**os.environ, "NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (run.returncode, run.stdout.split()) == (0, [layer, "8", "1"]), run.stderr


def _step_in_child(queue):
    import warnings

    table = np.zeros((5000, 16), np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt = SparseAdam(table)
        for seed in range(3):
            opt.step(large_gradient(seed))
    queue.put((table.tobytes(), [warning.category for warning in caught]))


@pytest.mark.jit
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_child_forked_after_parallel_steps_steps_on_one_thread_and_says_so_once():
    """GNU OpenMP kills a forked child at its first parallel kernel."""
    table = np.zeros((5000, 16), np.float32)
    opt = SparseAdam(table)
    for seed in range(3):
        opt.step(large_gradient(seed))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_step_in_child, args=(queue,))
    child.start()
    bits, warned = queue.get(timeout=120)
    child.join(120)
    assert child.exitcode == 0
    assert bits == table.tobytes()
    expected = [SparseAdamWarning] if numba.config.NUMBA_NUM_THREADS > 1 else []
    assert [category for category in warned if category is SparseAdamWarning] == expected
