# SPDX-License-Identifier: Apache-2.0
"""The package as installed and imported: no side effects, nothing heavy, metadata that tells the truth."""

import importlib.metadata
import importlib.resources
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nb_sparse_adam
from nb_sparse_adam._src.extras import EXTRAS

OPTIONAL = ["matplotlib", "polars", "safetensors", "scipy", "torch", "tqdm"]

# What an import could change behind the caller's back. numba and NumPy come first: what they do is theirs.
LOOK_AROUND = """
import gc, json, logging, os, random, signal, sys, threading, warnings
import numba, numpy as np

def look():
    return {
        "environment": dict(os.environ),
        "numba's configuration": {k: repr(v) for k, v in vars(numba.config).items() if k.isupper()},
        "Python threads": threading.active_count(),
        "threads": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None,
        "warning filters": [repr(f) for f in warnings.filters],
        "floating-point errors": np.geterr(),
        "random state": repr(random.getstate()) + repr(np.random.get_state()),
        "signal handlers": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "log handlers": repr(logging.getLogger().handlers),
        "garbage collector": gc.get_threshold(),
        "working folder": os.getcwd(),
        "recursion limit": sys.getrecursionlimit(),
    }

before, modules_before = look(), set(sys.modules)
import nb_sparse_adam
after = look()
changed = {name: [before[name], after[name]] for name in before if before[name] != after[name]}
full_team = numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
modules = sorted(set(sys.modules) - modules_before)  # numba itself imports SciPy where there is one
print(json.dumps({"changed": changed, "full team": full_team, "modules": modules}))
"""


@pytest.fixture(scope="module")
def imported():
    """What a new interpreter saw while it imported the package."""
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOK_AROUND], check=True, text=True, capture_output=True
    )
    assert out.stderr == ""
    return json.loads(out.stdout)


def test_importing_changes_nothing_and_starts_no_thread(imported):
    assert imported["changed"] == {}
    assert imported["full team"]


@pytest.mark.parametrize("module", OPTIONAL)
def test_importing_imports_no_optional_dependency(imported, module):
    assert module not in imported["modules"]


def test_importing_does_not_import_the_recommender(imported):
    names = [name for name in imported["modules"] if name.startswith("nb_sparse_adam")]
    assert "nb_sparse_adam._src.optimizer" in names
    assert not [name for name in names if "recommender" in name]
    assert "nb_sparse_adam.__main__" not in imported["modules"]


def test_importing_does_not_import_the_benchmarks(imported):
    assert not [name for name in imported["modules"] if name.startswith("nb_sparse_adam._src.bench")]


def test_the_command_line_starts_without_optional_dependencies():
    program = (
        "import sys, numba; before = set(sys.modules); import nb_sparse_adam.__main__; "
        "print(*(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", program], check=True, text=True, stdout=subprocess.PIPE)
    assert not set(OPTIONAL) & set(out.stdout.split())


@pytest.fixture(scope="module")
def distribution():
    try:
        return importlib.metadata.distribution("nb-sparse-adam")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip('the package is not installed: pip install -e ".[dev]"')


def test_the_version_is_in_one_place(distribution):
    assert distribution.version == nb_sparse_adam.__version__


def test_types_are_shipped():
    assert (importlib.resources.files("nb_sparse_adam") / "py.typed").is_file()


def test_the_command_is_installed(distribution):
    (command,) = distribution.entry_points.select(group="console_scripts")
    assert command.name == "nb-sparse-adam"
    assert callable(command.load())


def required_by(distribution, extra):
    """Distributions that an extra asks for by name, those of the extras that it includes as well."""
    names = set()
    for requirement in distribution.requires:
        spec, _, marker = requirement.partition(";")
        if re.search(rf"extra == ['\"]{extra}['\"]", marker):
            name, included = re.match(r"\s*([\w.-]+)\s*(?:\[(.*?)\])?", spec).groups()
            if name == "nb-sparse-adam":
                names |= set().union(*(required_by(distribution, other) for other in included.split(",")))
            else:
                names.add(name)
    return names


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_hold_what_messages_say_they_hold(distribution, extra):
    names = {name.replace(".", "-") for name in EXTRAS[extra]}  # as metadata spell them
    assert names <= {name.replace(".", "-") for name in required_by(distribution, extra)}


def test_the_plain_install_is_small(distribution):
    plain = [requirement for requirement in distribution.requires if "extra ==" not in requirement]
    assert sorted(re.match(r"[\w-]+", requirement)[0] for requirement in plain) == ["numba", "numpy"]


def test_the_test_extra_fetches_no_torch(distribution):
    """The README's test command must not pull gigabytes of CUDA."""
    assert "torch" not in required_by(distribution, "test")


def test_a_skip_is_a_failure_in_the_lane_of_ci(tmp_path):
    """`.ci/fail_on_skip.py` catches skips of every kind, and leaves expected failures alone."""
    root = Path(__file__).resolve().parents[1]
    (tmp_path / "test_skips.py").write_text(
        "import pytest\n"
        "@pytest.mark.skipif(True, reason='mark')\n"
        "def test_mark(): pass\n"
        "def test_importorskip(): pytest.importorskip('no_such_module')\n"
        "@pytest.fixture\n"
        "def skipping(): pytest.skip('fixture')\n"
        "def test_fixture(skipping): pass\n"
        "@pytest.mark.xfail(strict=True)\n"
        "def test_xfail(): raise AssertionError\n"
        "def test_pass(): pass\n",
        encoding="utf-8",
    )
    (tmp_path / "test_module.py").write_text(
        "import pytest\npytest.importorskip('no_such_module')\n", encoding="utf-8"
    )
    env = {
        **os.environ,
        "PYTHONPATH": str(root / ".ci"),
        "PYTEST_PLUGINS": "fail_on_skip",
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    out = subprocess.run([*command, "-q", "."], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE)
    assert out.returncode == 1
    assert re.search(r"1 failed, 1 passed, 1 xfailed, 3 errors", out.stdout), out.stdout
