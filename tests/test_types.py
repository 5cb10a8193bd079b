# SPDX-License-Identifier: Apache-2.0
"""Type checkers accept right uses and find the wrong ones: mypy and basedpyright, a pyright by pip."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from needs import need

import nb_sparse_adam
from nb_sparse_adam._src import annotations, options

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def files():
    names = ["typed_uses.py", "typed_torch_uses.py"]
    return [TESTS / name for name in names[: 1 if importlib.util.find_spec("torch") is None else 2]]


def wrong_lines():
    return {
        (file.name, number)
        for file in files()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"  # wrong( |$)", line)
    }


def run(module, *arguments, folder):
    command = [sys.executable, "-m", module, *arguments]
    out = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
    assert out.returncode == 1, out.stdout + out.stderr
    return out.stdout


def errors_of_mypy(_):
    """As in pyproject.toml: strict, over the package too, whose errors are errors of the test."""
    said = run("mypy", "--no-error-summary", "--no-pretty", *map(str, files()), folder=ROOT)
    lines = [re.match(r"(?:.*/)?(\w+\.py):(\d+): (\w+): (.*)", line).groups() for line in said.splitlines()]
    return {(file, int(line)): message for file, line, kind, message in lines if kind == "error"}


def errors_of_basedpyright(folder):
    project = {"include": list(map(str, files())), "extraPaths": [str(ROOT)], "typeCheckingMode": "strict"}
    (folder / "pyrightconfig.json").write_text(json.dumps(project))
    options = ("--outputjson", "--project", str(folder), "--pythonpath", sys.executable)
    said = json.loads(run("basedpyright", *options, folder=folder))
    assert said["summary"]["filesAnalyzed"] == len(files())
    return {
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1): each["message"]
        for each in said["generalDiagnostics"]
    }


@pytest.mark.jit
@pytest.mark.parametrize("checker", [errors_of_mypy, errors_of_basedpyright])
def test_exactly_the_wrong_uses_are_found(checker, tmp_path):
    """Lines of `typed_uses.py`, and, where there is PyTorch, of `typed_torch_uses.py`."""
    package = checker.__name__.rpartition("_")[2]
    need(package)
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip("needs the types of NumPy 2: pip install numpy>=2")
    found, wrong = checker(tmp_path), wrong_lines()
    assert {place: message for place, message in found.items() if place not in wrong} == {}
    assert sorted(wrong - found.keys()) == []


def test_the_types_of_options_are_what_is_checked():
    """The one place for the choices is the annotation: what it has passes, and nothing else."""
    choices = {
        "step_counts": (annotations.StepCounts, options.STEP_COUNTS),
        "on_nonfinite": (annotations.OnNonfinite, options.ON_NONFINITE),
        "device_checks": (annotations.DeviceChecks, options.DEVICE_CHECKS),
        "mode": (annotations.BagMode, options.BAG_MODES),
    }
    for annotation, allowed in choices.values():
        assert annotation.__args__ == allowed
    assert all(hasattr(nb_sparse_adam.typing, name) for name in nb_sparse_adam.typing.__all__)
