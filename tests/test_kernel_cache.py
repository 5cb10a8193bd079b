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

# A step of each form that is asked for; what the dispatchers say about the disk cache, and the table.
STEPS = """
import json, sys, numpy as np
from numba.core.dispatcher import Dispatcher
import nb_sparse_adam
from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam, grouping, kernels

table = np.zeros((6, 2), dtype=np.float32)
optimizer = SparseAdam(table, lr=0.5)
ones = np.ones((2, 2), dtype=np.float32)
gradients = {
    "rows": RowGradient(np.array([1, 4]), ones),
    "bag": BagGradient(np.array([5, 1, 5]), np.array([0, 2, 3]), ones),
    "csr": CSRGradient(np.array([0, 1, 1, 1, 1, 1, 2]), np.array([0, 1]), ones[0]),
}
for form in sys.argv[1:]:
    optimizer.step(gradients[form])

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


def run_steps(folder, *forms, **env):
    """Take the steps in an interpreter that finds the package in `folder` only."""
    drop = {"NUMBA_CACHE_DIR", "PYTHONPATH", "XDG_CACHE_HOME"}
    env = {
        **{name: value for name, value in os.environ.items() if name not in drop},
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        **env,
    }
    command = [sys.executable, "-W", "error", "-c", STEPS, *(forms or ["rows"])]
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


@pytest.fixture
def install(tmp_path):
    return copy_package(tmp_path.resolve() / "install")


@pytest.fixture
def read_only(install):
    """An install in which no ``__pycache__`` can be made, even by root, who may write anywhere."""
    (install / "nb_sparse_adam" / "__pycache__").write_text("a file, where a folder cannot be made")
    return install


def test_kernels_are_read_from_disk_until_they_are_edited(install):
    forms = ["rows", "bag", "csr"]
    first = run_steps(install, *forms)
    assert first["folders"] == [str(install / "nb_sparse_adam" / "__pycache__")]
    assert first["misses"] > 0

    second = run_steps(install, *forms)
    assert second["misses"] == 0
    assert second["hits"] > 0
    assert second["table"] == first["table"]

    before = run_steps(install)
    kernels = install / "nb_sparse_adam" / "kernels.py"
    text = kernels.read_text(encoding="utf-8")
    formula = "return p - product(step_size,"
    assert text.count(formula) == 1
    kernels.write_text(text.replace(formula, "return p + product(step_size,"), encoding="utf-8")
    after = run_steps(install)
    assert after["misses"] > 0
    assert after["table"] == [[-x for x in row] for row in before["table"]]


def test_a_read_only_install_keeps_its_kernels_in_the_users_cache_folder(read_only, tmp_path):
    home = tmp_path.resolve()
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    first = run_steps(read_only, **env)
    second = run_steps(read_only, **env)
    assert all(folder.startswith(str(home)) for folder in first["folders"])
    assert first["misses"] > 0
    assert second["misses"] == 0
    assert second["table"] == first["table"]


def test_a_read_only_install_without_a_home_compiles_in_memory(read_only):
    nowhere = os.devnull + "/nowhere"
    result = run_steps(read_only, HOME=nowhere, XDG_CACHE_HOME=nowhere, NUMBA_CACHE_DIR=nowhere)
    assert result["hits"] == 0
    assert result["folders"] == ["None"]
    assert [row[0] for row in result["table"]] == pytest.approx([0, -0.5, 0, 0, -0.5, 0])
