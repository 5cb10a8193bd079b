"""Compiled kernels are kept on disk where a folder can be written, and compiled anew where none can."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nb_sparse_adam

pytestmark = pytest.mark.jit

# One step of each form; what the kernels' dispatchers say about the disk cache, and the table.
STEPS = """
import json, numpy as np
from numba.core.dispatcher import Dispatcher
import nb_sparse_adam
from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam, grouping, kernels

table = np.zeros((6, 2), dtype=np.float32)
optimizer = SparseAdam(table, lr=0.5)
optimizer.step(RowGradient(np.array([1, 4]), np.ones((2, 2), dtype=np.float32)))
optimizer.step(BagGradient(np.array([5, 1, 5]), np.array([0, 2, 3]), np.ones((2, 2), dtype=np.float32)))
optimizer.step(CSRGradient(np.array([0, 1, 1, 1, 1, 1, 2]), np.array([0, 1]), np.ones(2, dtype=np.float32)))

stats = [
    dispatcher.stats
    for module in (grouping, kernels)
    for dispatcher in vars(module).values()
    if isinstance(dispatcher, Dispatcher)
]
print(json.dumps({
    "file": nb_sparse_adam.__file__,
    "hits": sum(sum(s.cache_hits.values()) for s in stats),
    "misses": sum(sum(s.cache_misses.values()) for s in stats),
    "folders": sorted({str(s.cache_path) for s in stats}),
    "table": table.tolist(),
}))
"""


def run_steps(folder, **env):
    """Take the steps in an interpreter that finds the package in `folder` only."""
    drop = {"NUMBA_CACHE_DIR", "PYTHONPATH", "XDG_CACHE_HOME"}
    env = {
        **{name: value for name, value in os.environ.items() if name not in drop},
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        **env,
    }
    command = [sys.executable, "-W", "error", "-c", STEPS]
    out = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    result = json.loads(out.stdout)
    assert Path(result["file"]).parent == folder / "nb_sparse_adam"
    return result


def copy_package(folder):
    """Install a copy of the package without anything compiled into `folder`."""
    source = Path(nb_sparse_adam.__file__).parent
    shutil.copytree(source, folder / "nb_sparse_adam", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """An install whose kernels have been compiled, and what the steps gave there."""
    folder = copy_package(tmp_path_factory.mktemp("used").resolve() / "install")
    return folder, run_steps(folder)


@pytest.fixture
def read_only(tmp_path):
    """An install in which no ``__pycache__`` can be made, even by root, who may write anywhere."""
    folder = copy_package(tmp_path.resolve() / "install")
    (folder / "nb_sparse_adam" / "__pycache__").write_text("a file, where a folder cannot be made")
    return folder


def test_kernels_are_read_from_disk_in_the_next_process(used):
    folder, first = used
    assert first["folders"] == [str(folder / "nb_sparse_adam" / "__pycache__")]
    assert first["misses"] > 0
    second = run_steps(folder)
    assert second["misses"] == 0
    assert second["hits"] > 0
    assert second["table"] == first["table"]


def test_an_edited_kernel_is_compiled_anew(used, tmp_path):
    folder, before = used
    edited = tmp_path.resolve() / "edited"
    shutil.copytree(folder, edited)
    kernels = edited / "nb_sparse_adam" / "kernels.py"
    text = kernels.read_text(encoding="utf-8")
    formula = "return p - step_size *"
    assert text.count(formula) == 1
    kernels.write_text(text.replace(formula, "return p + step_size *"), encoding="utf-8")
    after = run_steps(edited)
    assert after["table"] == [[-x for x in row] for row in before["table"]]


def test_a_read_only_install_keeps_its_kernels_in_the_users_cache_folder(read_only, used, tmp_path):
    env = {"HOME": str(tmp_path.resolve()), "XDG_CACHE_HOME": str(tmp_path.resolve() / "cache")}
    first = run_steps(read_only, **env)
    assert all(folder.startswith(str(tmp_path.resolve())) for folder in first["folders"])
    assert first["table"] == used[1]["table"]
    assert run_steps(read_only, **env)["misses"] == 0


def test_a_read_only_install_without_a_home_compiles_in_memory(read_only, used):
    nowhere = os.devnull + "/nowhere"
    result = run_steps(read_only, HOME=nowhere, XDG_CACHE_HOME=nowhere, NUMBA_CACHE_DIR=nowhere)
    assert result["hits"] == 0
    assert result["table"] == used[1]["table"]
