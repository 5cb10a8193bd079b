"""A step is done or not begun, whatever signal handler interrupts it."""

import numpy as np
import pytest
from checks import assert_same_bits, state_bits

from nb_sparse_adam import RowGradient, SparseAdam, runs


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
