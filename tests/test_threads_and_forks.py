# SPDX-License-Identifier: Apache-2.0
"""Python threads, forks and new processes beside steps, on every threading layer that numba has."""

import functools
import os
import subprocess
import sys

import pytest

from nb_sparse_adam._src import info
from nb_sparse_adam._src.bench import worker

pytestmark = pytest.mark.jit

LINUX = sys.platform == "linux"
LAYERS = [
    "workqueue",
    pytest.param(
        "omp", marks=pytest.mark.skipif(not LINUX, reason="numba's wheels have OpenMP on Linux only")
    ),
    pytest.param(
        "tbb", marks=pytest.mark.skipif(not LINUX, reason="needs PyPI's tbb where the loader looks")
    ),
]


@functools.cache
def tbb_loads():
    command = [sys.executable, "-c", "from numba.np.ufunc import tbbpool"]
    return not subprocess.run(command, env=worker._environment("tbb"), capture_output=True).returncode


def run(program, layer, *arguments, folder=None):
    """Run a program with two threads of a layer; it is to end with status 0, and without a signal."""
    env = worker._environment(layer)
    if layer == "tbb" and not tbb_loads():
        pytest.skip("TBB cannot be loaded: pip install tbb")
    command = ["-c", program]
    if folder is not None:  # new processes import the program
        (folder / "program.py").write_text(program, encoding="utf-8")
        command = [str(folder / "program.py")]
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    return done.stdout.split()


THREADS = """
import threading
import numba
import numpy as np
from nb_sparse_adam import RowGradient, SparseAdam

rng = np.random.default_rng(0)
gradient = RowGradient(rng.integers(0, 5000, 8000), rng.normal(size=(8000, 16)).astype(np.float32))
everywhere = RowGradient(np.arange(5000), np.ones((5000, 16), np.float32))

def at_once(count, work):
    failures = []
    def guarded():
        try:
            work()
        except BaseException as error:
            failures.append(error)
    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures

# Optimizers of their own.
results = []
def train():
    table = np.zeros((5000, 16), np.float32)
    opt = SparseAdam(table)
    for _ in range(20):
        opt.step(gradient)
    results.append(table.tobytes())
at_once(8, train)

# One optimizer: no update is lost.
table = np.zeros((5000, 16), np.float32)
opt = SparseAdam(table, lr=0.001, step_counts="row")
at_once(16, lambda: [opt.step(everywhere) for _ in range(5)])
assert (opt.state["table"].steps == 80).all()
alone = np.zeros((5000, 16), np.float32)
other = SparseAdam(alone, lr=0.001, step_counts="row")
for _ in range(80):
    other.step(everywhere)
assert table.tobytes() == alone.tobytes()
print(numba.threading_layer(), len(results), len(set(results)))
"""


@pytest.mark.parametrize("layer", LAYERS)
def test_sixteen_threads_lose_no_update(layer):
    """numba's workqueue ends the process where two threads enter it at once."""
    assert run(THREADS, layer) == [layer, "8", "1"]


CHILDREN = """
import multiprocessing, os, sys, warnings
import numpy as np
from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam.errors import SparseAdamWarning

def trained():
    table = np.zeros((5000, 16), np.float32)
    opt = SparseAdam(table)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        opt.step(RowGradient(rng.integers(0, 5000, 8000), rng.normal(size=(8000, 16)).astype(np.float32)))
    return table.tobytes()

def child(queue, expected):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same = trained() == expected
    queue.put((same, sum(warning.category is SparseAdamWarning for warning in caught)))

if __name__ == "__main__":
    method = sys.argv[1]
    expected = trained()  # on two threads, if that is faster
    if method == "os.fork":
        process = os.fork()
        if process == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                os._exit(0 if trained() == expected else 3)
        _, status = os.waitpid(process, 0)
        print("exit", os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status))
    else:
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=child, args=(queue, expected))
        process.start()
        same, warned = queue.get(timeout=200)
        process.join(100)
        print("exit", process.exitcode, same, warned)
    assert trained() == expected  # and the parent goes on
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", ["os.fork", "fork", "forkserver", "spawn"])
def test_children_step_after_the_parent_did(method, layer, tmp_path):
    """GNU OpenMP kills a forked child at its first parallel kernel: there, steps stay on one thread."""
    said = run(CHILDREN, layer, method, folder=tmp_path)
    if method == "os.fork":
        assert said == ["exit", "0"]
    else:
        warned = "1" if method == "fork" else "0"
        assert said == ["exit", "0", "True", warned]


def test_info_says_which_layers_can_be_loaded():
    layers = info.layers()
    assert set(layers) == {"tbb", "omp", "workqueue"}
    assert layers["workqueue"] is None
    lines = [line for line in info.report_lines() if "layers" in line]
    for name, reason in layers.items():
        assert name in lines[0] or any(name in line and str(reason) in line for line in info.report_lines())
