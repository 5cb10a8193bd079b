# SPDX-License-Identifier: Apache-2.0
"""A step is done or not begun, whatever signal handler interrupts it."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from checks import assert_same_bits, state_bits

from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam._src import stepping


def two_tables(**options):
    tables = {"user": np.ones((50, 4), np.float32), "item": np.ones((30, 4))}
    return SparseAdam(tables, lr=0.1, **options), tables


GRADIENTS = {
    "user": RowGradient(np.array([3, 7, 3]), np.ones((3, 4), np.float32)),
    "item": RowGradient(np.array([2, 9]), np.ones((2, 4), np.float32)),
}


class Interrupting:
    """Stands for a run, and raises before or after its kernel, as a signal handler would."""

    calls = 0

    def __init__(self, run, places):
        self._run, self._places = run, places

    def __getattr__(self, name):
        return getattr(self._run, name)  # rehearsals are not disturbed

    def __call__(self):
        Interrupting.calls += 1
        call = Interrupting.calls
        if (call, "before") in self._places:
            raise KeyboardInterrupt
        self._run()
        if (call, "after") in self._places:
            raise KeyboardInterrupt


def step_interrupted(opt, places):
    """Step with an interrupt at each of the places: (number of the kernel's call, "before" or "after" it)."""
    Interrupting.calls = 0
    prepared = stepping.prepare(opt._requests(GRADIENTS))
    assert len(prepared) == 2
    with pytest.raises(KeyboardInterrupt):
        stepping.run_all([Interrupting(run, places) for run in prepared])


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
    prepared = stepping.prepare(opt._requests(dict.fromkeys(tables, GRADIENTS["user"])))
    assert len(prepared) == 1
    Interrupting.calls = 0
    with pytest.raises(KeyboardInterrupt):
        stepping.run_all([Interrupting(prepared[0], {(1, when)})])
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


CTRL_C = """
import signal, time
import numpy as np
from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam._src import stepping

armed = [False]

def interrupt(*_):
    if armed[0]:
        armed[0] = False
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)

def make():
    tables = {f"t{i}": np.ones((500, 8), np.float32) for i in range(4)} | {"large": np.ones((3000, 16))}
    return SparseAdam(tables, lr=0.1, step_counts="global"), tables

def gradients(k):
    rng = np.random.default_rng(k)
    return {name: RowGradient(rng.integers(0, len(table), 800), rng.normal(size=(800, table.shape[1])))
            for name, table in made[1].items()}

made = make()
opt, tables = made
opt.step(gradients(0))
print("ready", flush=True)
k = 1
interrupts = 0
end = time.monotonic() + 60
while interrupts < 30 and time.monotonic() < end:
    given = gradients(k)
    try:
        armed[0] = True
        opt.step(given)
        armed[0] = False
    except KeyboardInterrupt:
        interrupts += 1
    done = {int(state.steps) for state in opt.state.values()}
    assert done in ({k}, {k + 1}), (k, done)  # of all tables, or of none
    k, = done
other, others = make()
for step in range(k):
    other.step(gradients(step))
assert all((tables[name] == others[name]).all() for name in tables)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python, when it ends, would let the next one end it
print(interrupts)
"""


@pytest.mark.jit
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_ctrl_c_at_any_moment_finds_all_tables_stepped_or_none():
    process = subprocess.Popen(
        [sys.executable, "-c", CTRL_C], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        rng = np.random.default_rng(0)
        while process.poll() is None:
            time.sleep(rng.uniform(0.0005, 0.003))
            process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "30\n"), err
