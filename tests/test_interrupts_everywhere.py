# SPDX-License-Identifier: Apache-2.0
"""An exception at every place where a signal handler may raise one leaves things done or not begun."""

import copy
import os
import subprocess
import sys
import threading
from importlib.util import find_spec

import numba
import numpy as np
import pytest
from checks import state_bits
from interrupts import interrupted

from nb_sparse_adam import BagGradient, RowGradient, SparseAdam, apply_row_gradient, checkpoint
from nb_sparse_adam._src.bench import worker
from nb_sparse_adam._src.stepping import step_together

pytestmark = pytest.mark.jit

ROWS = RowGradient(np.array([3, 7, 3]), np.ones((3, 4), np.float32))
DOUBLE = RowGradient(np.array([3, 7, 3]), np.ones((3, 4)))
LARGE = RowGradient(np.arange(2500)[::-1].copy(), np.ones((2500, 4), np.float32))
FAILURES = 3  # are enough


@numba.njit
def pull(table, row):
    apply_row_gradient(table, row, table.param[row] - np.float32(2))


class Step:
    """One table. Of every scenario: what is done, to something new, and what may be changed by it."""

    def __init__(self, folder):
        self.opts = [SparseAdam(np.ones((50, 4), np.float32), step_counts="global")]

    def act(self):
        self.opts[0].step(ROWS)

    def bits(self):
        found = [state_bits(opt, dict(opt.tables)) for opt in self.opts]
        return {(at, *key): bits.tobytes() for at, each in enumerate(found) for key, bits in each.items()}

    def may_be(self, bits, before, after):
        """Whether it is done or not begun."""
        return bits in (before, after)

    def check(self):
        """What else must hold when it has been interrupted."""


class StepOnThreads(Step):
    def __init__(self, folder):
        threads = min(2, numba.get_num_threads())
        self.opts = [SparseAdam(np.ones((2500, 4), np.float32), num_threads=threads)]

    def act(self):
        self.opts[0].step(LARGE)


class StepOfSeveralTables(Step):
    """A batch, and two with kernels of their own."""

    def __init__(self, folder):
        tables = {f"t{at}": np.ones((50, 4), np.float32) for at in range(4)}
        tables |= {"double": np.ones((50, 4)), "bags": np.ones((50, 4), np.float32)}
        self.opts = [SparseAdam(tables, step_counts="global")]
        self.gradients = {**dict.fromkeys(tables, ROWS), "double": DOUBLE}
        self.gradients["bags"] = BagGradient(np.array([1, 2, 3], np.int32), np.array([0, 2]), ROWS.values[:2])

    def act(self):
        self.opts[0].step(self.gradients)


class StepTogether(Step):
    def __init__(self, folder):
        dtypes = [np.float32, np.float64, np.float32]
        self.opts = [SparseAdam(np.ones((50, 4), dtype), step_counts="row") for dtype in dtypes]

    def act(self):
        double = np.dtype(np.float64)
        step_together([(opt, DOUBLE if opt.state["table"].dtype == double else ROWS) for opt in self.opts])


class KernelTable(Step):
    def __init__(self, folder):
        self.opts = [SparseAdam(np.ones((50, 4), np.float32), step_counts="global", on_nonfinite="skip")]

    def act(self):
        with self.opts[0].kernel_table() as table:
            pull(table, 3)

    def may_be(self, bits, before, after):
        """A block that is left is a step of the table, should nothing have been done in it."""
        steps = 0, "table", "steps"
        return bits in (before, after, {**before, steps: after[steps]})


class Rate(Step):
    def __init__(self, folder):
        super().__init__(folder)
        self.opts[0].step(ROWS)

    def act(self):
        self.opts[0].lr = 0.5

    def bits(self):
        return self.opts[0].lr

    def check(self):
        """A step takes the rate that the option says."""
        twin = copy.deepcopy(self.opts[0])
        for opt in (self.opts[0], twin):
            opt.step(ROWS)
        assert (self.opts[0].tables["table"] == twin.tables["table"]).all()


class Save(Step):
    def __init__(self, folder):
        super().__init__(folder)
        self.folder = folder
        checkpoint.save(folder, self.opts[0])
        self.number = 0

    def act(self):
        checkpoint.save(self.folder, self.opts[0], extra=self.number)

    def bits(self):
        self.number = 1
        return checkpoint.load(self.folder)[1]

    def may_be(self, bits, before, after):
        return bits in (None, 0)


if find_spec("torch") is not None:
    import torch

    from nb_sparse_adam.torch import Embedding, EmbeddingBag, accumulate
    from nb_sparse_adam.torch import SparseAdam as TorchAdam

    IDS = torch.tensor([[3, 7, 3]])

    class OfTorch:
        def __init__(self, folder):
            torch.manual_seed(0)
            self.make()

        def bits(self):
            found = {}
            for at, (param, opt) in enumerate(self.trained()):
                state = dict(opt.state.get(param, {}))
                found[at] = param.detach().numpy().tobytes()
                found[at, "step"] = int(state.get("step", 0))
                moments = [state[key].numpy().tobytes() for key in ("exp_avg", "exp_avg_sq") if key in state]
                found[at, "moments"] = moments or 2 * [bytes(param.numel() * 4)]
            return found

        def may_be(self, bits, before, after):
            return bits in (before, after)

        def check(self):
            pass

    class DropIn(OfTorch):
        """torch's optimizer, of two parameters."""

        def make(self):
            self.params = [torch.nn.Parameter(torch.ones(50, 4)) for _ in range(2)]
            self.opt = TorchAdam(self.params, lr=0.1)

        def trained(self):
            return [(param, self.opt) for param in self.params]

        def act(self):
            for param in self.params:
                param.grad = torch.sparse_coo_tensor(IDS, torch.ones(3, 4), (50, 4), check_invariants=True)
            self.opt.step()

    class Fused(OfTorch):
        """A backward pass through two fused layers."""

        def make(self):
            self.layers = torch.nn.ModuleList([Embedding(50, 4), EmbeddingBag(50, 4, mode="sum")])

        def trained(self):
            return [(layer.weight, layer.optimizer) for layer in self.layers]

        def act(self):
            (self.layers[0](IDS).sum() + self.layers[1](IDS).sum()).backward()

    class Accumulate(Fused):
        def act(self):
            with accumulate(self.layers):
                super().act()
                super().act()

    TORCH = [DropIn, Fused, Accumulate]
else:
    TORCH = []


def in_another_thread(work):
    """Do it where a lock that was not let go of keeps it waiting; return what went wrong."""
    said = []

    def guarded():
        try:
            work()
            said.append(None)
        except Exception as error:  # noqa: BLE001 (reported)
            said.append(repr(error))

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(timeout=20)
    return said[0] if said else "it waits"


def test_more_optimizers_than_one_with_statement_takes():
    alone, opts = (
        Step(None),
        [SparseAdam(np.ones((50, 4), np.float32), step_counts="global") for _ in range(19)],
    )
    alone.act()
    step_together([(opt, ROWS) for opt in opts])
    assert in_another_thread(lambda: step_together([(opt, ROWS) for opt in reversed(opts)])) is None
    alone.act()
    step_together([])
    for opt in opts:
        assert (opt.tables["table"] == alone.opts[0].tables["table"]).all()


SCENARIOS = [Step, StepOnThreads, StepOfSeveralTables, StepTogether, KernelTable, Rate, Save, *TORCH]


# Of scenarios with hundreds of places, or thousands: with --long none is passed over.
EVERY = {StepOfSeveralTables: 3, StepTogether: 3, Save: 3, **dict.fromkeys(TORCH, 23)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # generators let go
@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_exception_at_every_place(scenario, tmp_path, request):
    every = request.config.getoption("--long")
    undisturbed = scenario(tmp_path / "undisturbed")
    states = [undisturbed.bits()]
    for _ in range(3):
        undisturbed.act()
        states.append(undisturbed.bits())
    threads = numba.get_num_threads()
    failures = []
    at = 0
    while len(failures) < FAILURES:
        tried = scenario(tmp_path / f"{at}")
        where = interrupted(tried.act, at, every)
        if where is None:
            break
        at += 1 if every else EVERY.get(scenario, 1)
        found = tried.bits()
        if not tried.may_be(found, states[0], states[1]):
            failures.append(f"{where}: neither done nor left")
        if numba.get_num_threads() != threads:
            failures.append(f"{where}: numba's threads are {numba.get_num_threads()}")
            numba.set_num_threads(threads)
        refusal = in_another_thread(tried.act)
        if refusal is not None:
            failures.append(f"{where}: another thread cannot do it: {refusal}")
            continue
        if found in states and tried.bits() != states[states.index(found) + 1]:
            failures.append(f"{where}: what comes next differs")
        try:
            tried.check()
        except AssertionError:
            failures.append(f"{where}: what else must hold does not")
    assert not failures, failures
    assert at > (20 if scenario is Rate else 50)  # or nothing was tried


SOAK = """
import random, signal, sys, traceback
import numba
from test_interrupts_everywhere import StepOfSeveralTables, StepOnThreads, StepTogether, in_another_thread

class Interrupted(BaseException):
    pass

armed = False

def handler(*_):
    global armed
    if armed:
        armed = False
        raise Interrupted

signal.signal(signal.SIGALRM, handler)
random.seed(0)
threads = numba.get_num_threads()
wrong, interrupts, tries = [], 0, 0
for scenario in (StepOfSeveralTables, StepOnThreads, StepTogether):
    tried = scenario(None)
    tried.act()
    start = interrupts
    while interrupts < start + int(sys.argv[1]):
        tries += 1
        before = tried.bits()
        undisturbed = scenario(None)
        for opt, other in zip(undisturbed.opts, tried.opts):
            for name, table in opt.tables.items():
                table[...] = other.tables[name]
            opt.load_state_dict(other.state_dict())
        undisturbed.act()
        after = undisturbed.bits()
        came = False
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 2e-4))
            tried.act()
            armed = False
        except Interrupted as error:
            where = "".join(traceback.format_exception(error)[-3:])
            came = True
            interrupts += 1
        if tried.bits() not in ((before, after) if came else (after,)):
            wrong.append((scenario.__name__, "half done"))
        if numba.get_num_threads() != threads:
            wrong.append((scenario.__name__, "threads"))
        refusal = in_another_thread(tried.act) if came else None
        if refusal is not None:
            wrong.append((scenario.__name__, refusal, where))
            break
print(interrupts, len(wrong), wrong[:3])
"""


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
@pytest.mark.skipif(sys.platform != "linux", reason="numba's wheels have OpenMP on Linux")
def test_real_signals_at_random(layer, request):
    """45 on each layer, or, with ``--long``, 6000: none leaves anything half done, or a lock held."""
    number = 2000 if request.config.getoption("--long") else 15
    env = worker._environment(layer)
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", SOAK, str(number)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{3 * number} 0 []\n"
