# SPDX-License-Identifier: Apache-2.0
"""What is compiled ahead is all that steps need, whichever of them, in whichever process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nb_sparse_adam
from nb_sparse_adam._src.warming import WarmUp, warm_up
from nb_sparse_adam.errors import OptionError, OptionTypeError

ROOT = Path(nb_sparse_adam.__file__).parents[1]

# Small and large steps, of one table and of several, and one that may overflow.
STEPS = """
import numpy as np
from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam.errors import NonFiniteGradientError
from nb_sparse_adam._src.engine import threads

def take_steps(dtype, step_counts, forms):
    tables = {name: np.zeros((256, 64), dtype) for name in ("one", "other")}
    optimizer = SparseAdam(tables, step_counts=step_counts, num_threads=threads.max_threads())
    for n in (3, 256):
        ids, values = np.arange(n)[::-1].copy(), np.ones((n, 64), dtype)
        indptr = np.minimum(np.arange(257), n) * 64
        gradients = {
            "rows": RowGradient(ids, values),
            "bags": BagGradient(ids % 2, np.arange(n), values),
            "csr": CSRGradient(indptr, np.tile(np.arange(64), n), values.ravel()),
        }
        for form in forms:
            optimizer.step({"one": gradients[form]})
            optimizer.step(dict.fromkeys(tables, gradients[form]))
    huge = RowGradient(ids, values * np.finfo(dtype).max)
    try:
        optimizer.step({"one": huge})
    except NonFiniteGradientError:
        return float(tables["one"].sum())
"""


def run(program, cache=None, **env):
    """Run a program that prints JSON, in an interpreter of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    if cache is not None:
        env["NUMBA_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout, done.stderr


# The command, in a process of one thread, and with a log whose reader takes a step while it is written.
COLD = """
import json, logging, time
import numpy as np
from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam.__main__ import main
from nb_sparse_adam._src.engine.compilations import counts

class Handler(logging.Handler):
    def emit(self, record):
        told.append([record.getMessage(), time.perf_counter() - start, *counts()])
        table = np.zeros((2, 1), np.float32)
        SparseAdam(table, lr=0.5).step(RowGradient(np.array([1]), np.ones((1, 1), np.float32)))
        told.append(table.tolist())
        raise RuntimeError

told = []
logging.getLogger("nb_sparse_adam").addHandler(Handler())
logging.getLogger("nb_sparse_adam").setLevel(logging.INFO)
start = time.perf_counter()
status = main("warm-up --step-counts element --gradients rows".split())
seconds = time.perf_counter() - start
print(json.dumps({"status": status, "told": told, "seconds": seconds, "counts": counts()}))
"""


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """A folder that one run of ``warm-up`` has filled, and what that run said."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, *run(COLD, cache, NUMBA_NUM_THREADS="1")


@pytest.mark.jit
def test_steps_of_other_processes_compile_nothing(cold):
    cache, result, *_ = cold
    compiled, kept = result["counts"]
    assert result["status"] == 0
    assert compiled == kept > 5
    program = f"""{STEPS}
import json
from nb_sparse_adam._src.engine.compilations import counts
moved = take_steps("float32", "element", ["rows", "bags"])
print(json.dumps([moved, threads.threading_layer(), counts().compiled]))
"""
    (moved, layer, compiled), *_ = run(program, cache, NUMBA_NUM_THREADS="2")
    assert moved < 0
    assert layer
    assert compiled == 0


@pytest.mark.jit
def test_the_command_says_what_it_has_done(cold):
    cache, _, said, _ = cold
    first, last = said.splitlines()[:2]
    assert first.startswith("float32, element counts: ")
    assert " kernels compiled, " in first
    assert last.startswith(f"kept in {cache}")
    again = [
        sys.executable,
        "-m",
        "nb_sparse_adam",
        "warm-up",
        "--gradients",
        "rows",
        "--step-counts",
        "element",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(cache)}
    out = subprocess.run(again, env=env, check=True, text=True, capture_output=True)
    assert "float32, element counts: all found on disk, " in out.stdout
    assert out.stderr == ""


@pytest.mark.jit
def test_who_waits_is_told_at_the_beginning_and_may_step_meanwhile(cold):
    _, result, *_ = cold
    (message, seconds, compiled, kept), table = result["told"]
    assert message.startswith("compiling what prepares gradients, once on this machine")
    assert (compiled, kept) == (1, 0)
    assert seconds < result["seconds"] / 4
    assert table == [[0], [pytest.approx(-0.5)]]


# Which kernels are looked for, of which those of `cold` are some: in a folder that other tests fill, too.
EVERY = f"""{STEPS}
import json
from nb_sparse_adam import warm_up
from nb_sparse_adam._src.engine import kernel_cache

load = kernel_cache._Cache.load_overload
def noted(self, *arguments):
    looked_for.append(str(self._cache_path))
    return load(self, *arguments)
kernel_cache._Cache.load_overload = noted

looked_for = []
warm_up(parallel=False, step_counts="element")
started = threads._layer_is_running()
done = warm_up(["float32", np.float64])
warm = len(looked_for)
moved = [
    take_steps(dtype, counts, ["rows", "bags", "csr"])
    for dtype in ("float32", "float64") for counts in ("element", "row", "global")
]
print(json.dumps([started, moved, warm, looked_for[warm:], done.seconds, done.folder]))
"""


@pytest.mark.jit
def test_steps_of_every_kind_find_all_that_they_need():
    (started, moved, warm, missed, seconds, folder), *_ = run(EVERY, NUMBA_NUM_THREADS="2")
    assert not started
    assert all(each < 0 for each in moved)
    assert warm > 20
    assert missed == []
    assert seconds > 0
    assert Path(folder).is_dir()


def test_without_the_compiler_there_is_nothing_to_do():
    program = """
import json, logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from nb_sparse_adam import warm_up
from nb_sparse_adam.__main__ import main
print(json.dumps([main(["warm-up"]), warm_up()]))
"""
    result, said, log = run(program, NUMBA_DISABLE_JIT="1")
    assert result == [0, list(WarmUp(0, 0, 0.0, None))]
    assert said.startswith("NUMBA_DISABLE_JIT is set")
    assert "NUMBA_DISABLE_JIT is set: there is nothing to compile" in log


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dtypes": "float16"}, OptionError, "dtypes is 'float16'"),
        ({"dtypes": ["float32", np.int32]}, OptionError, "dtypes is 'int32'"),
        ({"dtypes": "doubles"}, OptionTypeError, "'doubles'"),
        ({"dtypes": ">f4"}, OptionError, "dtypes is '>f4'"),
        ({"dtypes": None}, OptionTypeError, "None"),
        ({"dtypes": []}, OptionError, "dtypes is empty"),
        ({"step_counts": "rows"}, OptionError, "step_counts is 'rows'"),
        ({"step_counts": ["row", 3]}, OptionTypeError, "step_counts is 3"),
        ({"gradients": "coo"}, OptionError, r"gradients is 'coo', expected one of \('rows', 'bags', 'csr'\)"),
        ({"gradients": ()}, OptionError, "gradients is empty"),
        ({"parallel": 2}, OptionTypeError, "parallel is 2"),
    ],
)
def test_what_there_is_not_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        warm_up(**arguments)
