# SPDX-License-Identifier: Apache-2.0
"""A forked child waits for no lock of its parent's threads, and steps, reads and saves what is whole."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from needs import missing

pytestmark = [
    pytest.mark.jit,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system"),
]

START = """
import os, signal, sys, threading, time, traceback, warnings
import numpy as np
from nb_sparse_adam import RowGradient, SparseAdam, checkpoint
from nb_sparse_adam._src.stepping import step_together
from nb_sparse_adam.errors import StateError
warnings.simplefilter("ignore")

rng = np.random.default_rng(0)
gradient = RowGradient(rng.integers(0, 5000, 8000), rng.normal(size=(8000, 16)).astype(np.float32))

def make():
    table = np.zeros((5000, 16), np.float32)
    return SparseAdam(table, step_counts="global"), table

def in_child(work):
    '''Do it in a forked child; return what it gives: "0" to "9", or a word.'''
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, str(work()).encode())
        except StateError as error:
            assert "forked" in str(error) and ("restore" in str(error) or "state_dir" in str(error)), error
            os.write(write, b"StateError")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    end = time.monotonic() + 150
    while not os.waitpid(child, os.WNOHANG)[0]:
        assert time.monotonic() < end, os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    with open(read) as pipe:
        return pipe.read()

def beside(work, body):
    '''Run the body while another thread works over and over.'''
    ended, errors = threading.Event(), []
    def loop():
        try:
            while not ended.is_set():
                work()
        except BaseException as error:
            errors.append(error)
    thread = threading.Thread(target=loop)
    thread.start()
    try:
        body()
    finally:
        ended.set()
        thread.join()
    assert not errors, errors
"""


def run(program, *arguments, timeout=240):
    done = subprocess.run(
        [sys.executable, "-c", START + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    assert done.stderr == ""
    return done.stdout.split()


SNAPSHOTS = """
opt, table = make()
for _ in range(3):
    opt.step(gradient)
states = {}  # what each count has for its table
other, others = make()
for k in range(400):
    other.step(gradient)
    states[k + 1] = hash(others.tobytes())

def snapshot():
    state = opt.state_dict()
    k = int(state["tables"]["table"]["steps"])
    opt.lr = opt.lr
    assert hash(table.tobytes()) == states[k], "half a step"
    checkpoint.save(sys.argv[1] + f"/{os.getpid()}", opt)
    opt.step(gradient)
    assert hash(table.tobytes()) == states[k + 1]
    return "whole"

count = [0]
def work():
    if count[0] < 300:
        count[0] += 1
        opt.step(gradient)
    time.sleep(0.001)

said = []
beside(work, lambda: said.extend(in_child(snapshot) for _ in range(12)))
assert set(said) <= {"whole", "StateError"}, said
print(said.count("whole") > 0)
"""


def test_forks_while_another_thread_steps_are_snapshots(tmp_path):
    assert run(SNAPSHOTS, tmp_path) == ["True"]


HELD = """
opt, table = make()
free, its_table = make()
opt.step(gradient)
free.step(gradient)
checkpoint.save(sys.argv[1], opt)
entered, leave = threading.Event(), threading.Event()
opt.on_nonfinite = "skip"

def hold():
    with opt.kernel_table():
        entered.set()
        leave.wait()

holder = threading.Thread(target=hold)
holder.start()
entered.wait()

def lr():
    opt.lr = 0.5

def restored():
    checkpoint.restore(sys.argv[1], opt)
    opt.step(gradient)
    assert int(opt.state["table"].steps) == 2
    return "restored"

def stepped():
    free.step(gradient)
    return int(free.state["table"].steps)

def twice():
    return in_child(lambda: opt.step(gradient))

def restored_in_vain():
    table.flags.writeable = False
    try:
        checkpoint.restore(sys.argv[1], opt)
    except ValueError:
        table.flags.writeable = True
        opt.step(gradient)

for work in (
    lambda: opt.step(gradient), lambda: step_together([(free, gradient), (opt, gradient)]), lr,
    opt.state_dict, lambda: opt.load_state_dict(free.state_dict()), opt.flush, opt.synchronize,
    lambda: checkpoint.save(sys.argv[1], opt), lambda: opt.kernel_table().__enter__(), twice,
    restored_in_vain,
):
    assert in_child(work) == "StateError", work
print(in_child(restored), in_child(stepped))
leave.set()
holder.join()
opt.step(gradient)
print(in_child(lambda: (opt.step(gradient), int(opt.state["table"].steps))[1]))
"""


def test_an_optimizer_in_the_middle_of_something_says_so_until_a_checkpoint_is_restored(tmp_path):
    assert run(HELD, tmp_path / "checkpoint") == ["restored", "2", "4"]  # the block was a step


WITHIN = """
opt, table = make()
opt.on_nonfinite = "skip"
with opt.kernel_table():
    said = in_child(lambda: (opt.step(gradient), 1)[1])
print(said, in_child(lambda: (opt.step(gradient), int(opt.state["table"].steps))[1]))
"""


def test_the_thread_that_forks_may_hold_the_lock():
    assert run(WITHIN) == ["1", "2"]


COMPILING = """
from numba import njit
gradient = RowGradient([3], np.ones((1, 16), np.float32))
opt, table = make()
started = threading.Event()

def compile_and_step():
    started.set()
    opt.step(gradient)

thread = threading.Thread(target=compile_and_step)
thread.start()
started.wait()
time.sleep(0.3)

def child():
    assert njit(lambda x: x + 1)(1) == 2  # numba's own lock
    other, _ = make()
    other.step(gradient)
    opt.step(gradient)
    return "stepped"

print(in_child(child))
thread.join()
"""


def test_a_fork_while_another_thread_compiles(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))  # nothing is compiled yet
    assert run(COMPILING)[0] in ("stepped", "StateError")


MAKING = """
def work():
    for _ in range(20):
        make()

def child():
    opt, _ = make()
    opt.step(gradient)
    return "stepped"

opt, _ = make()
opt.step(gradient)
said = []
beside(work, lambda: said.extend(in_child(child) for _ in range(20)))
print(*set(said))
"""


def test_optimizers_that_are_made_and_let_go_meanwhile():
    assert run(MAKING) == ["stepped"]


TORCH = """
import torch
from nb_sparse_adam.torch import Embedding, SparseAdam as TorchAdam
torch.set_num_threads(1)
layer = Embedding(5000, 16)
ids = torch.arange(4000)
param = torch.nn.Parameter(torch.zeros(5000, 16))
param.grad = torch.sparse_coo_tensor(ids[None], torch.ones(4000, 16), (5000, 16), check_invariants=True)
adam = TorchAdam([param])

def work():
    layer(ids).sum().backward()
    adam.step()

def child():
    work()
    adam.state_dict()
    layer.state_dict()
    return "stepped"

work()
said = []
beside(work, lambda: said.extend(in_child(child) for _ in range(8)))
assert set(said) <= {"stepped", "StateError"}, said
print(said.count("stepped") > 0)
"""


@pytest.mark.skipif(find_spec("torch") is None, reason=missing("torch"))
def test_forks_while_another_thread_steps_with_torch():
    assert run(TORCH) == ["True"]


WITHIN_A_FORK = """
import signal

with_less = sorted((make()[0], make()[0]), key=id)
first, last = with_less  # in the order in which locks are taken

def use():
    with last._lock:  # as a step that takes long
        entered.set()
        leave.wait()

entered, leave = threading.Event(), threading.Event()
user = threading.Thread(target=use)
user.start()
entered.wait()

def fork_too(*_):
    in_child(lambda: None)
    leave.set()

signal.signal(signal.SIGALRM, fork_too)
signal.setitimer(signal.ITIMER_REAL, 0.1)  # while the fork waits for the one that is in use
in_child(lambda: None)
user.join()
done = []

def lr():
    first.lr = 0.5
    done.append(1)

other = threading.Thread(target=lr, daemon=True)
other.start()
other.join(30)
print(len(done))
"""


def test_a_signal_handler_that_forks_within_a_fork_leaves_no_lock_held(tmp_path):
    assert run(WITHIN_A_FORK, tmp_path) == ["1"]


MAPPED = """
opt = SparseAdam(np.zeros((4, 2), np.float32), state_dir=sys.argv[1] + "/state", on_nonfinite="skip")
gradient = RowGradient([1], np.ones((1, 2), np.float32))
checkpoint.save(sys.argv[1] + "/checkpoint", opt)
given = opt.state_dict()
opt.step(gradient)
before = opt.state_dict()["tables"]["table"]
for work in (
    lambda: checkpoint.restore(sys.argv[1] + "/checkpoint", opt), lambda: opt.load_state_dict(given),
    lambda: opt.kernel_table().__enter__(), lambda: opt.step(gradient),
):
    assert in_child(work) == "StateError", work
after = opt.state_dict()["tables"]["table"]
print(all((before[key] == after[key]).all() for key in ("exp_avg", "exp_avg_sq", "steps")))
"""


def test_a_child_changes_no_state_that_its_parent_has_mapped(tmp_path):
    assert run(MAPPED, tmp_path) == ["True"]
