# SPDX-License-Identifier: Apache-2.0
"""asv's tracking set: what it counts without noise stays within limits, and its files fit the project."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numba
import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


def load(name):
    """A module of the suite, which is not installed; one that imports no other of them."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


counts = load("counts")


@pytest.fixture(scope="module")
def counted():
    # Not by this lane's processor, flags and number of threads.
    env = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    done = subprocess.run([sys.executable, counts.__file__], env=env, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


@pytest.mark.jit
@pytest.mark.skipif(bool(numba.config.BOUNDSCHECK), reason="counts what runs without checks")
@pytest.mark.parametrize("what", counts.LIMITS)
def test_what_a_step_costs(counted, what):
    assert set(counted["numbers"]) == set(counts.LIMITS)
    number = counted["numbers"][what]
    assert number is not None, "no vectorized loop was found"
    assert number > 0
    if what == counts.INSTRUCTIONS and counted["processor"] is None:
        return  # code for another processor has other instructions: that there are packed ones is all
    assert number <= counts.LIMITS[what], "benchmarks/counts.py says what to do"


def test_loops_are_found():
    code = """
f:
.LBB0_1:
    nop
.LBB0_2:                # a loop in a loop
    vmovups	(%rdi), %ymm0
    vsqrtps	%ymm0, %ymm0
    jne	.LBB0_2
    vsqrtss	%xmm0, %xmm0
    jne	.LBB0_1
    jmp	.LBB0_3
.LBB0_3:
    retq
"""
    (loop,) = counts.innermost_loops(code)
    assert [text.split()[0] for text in loop] == ["vmovups", "vsqrtps", "jne"]


def configuration():
    return json.loads((ROOT / "asv.conf.json").read_text(encoding="utf-8"))


def test_the_oldest_versions_that_are_tracked_are_the_oldest_that_are_supported():
    required = configuration()["matrix"]["req"]
    minimum = (ROOT / ".ci" / "minimum.txt").read_text(encoding="utf-8")
    for name in ("numba", "numpy"):
        assert required[name][0] == re.search(rf"^{name}==(\S+)", minimum, re.MULTILINE)[1]


def test_the_thresholds_are_of_benchmarks_that_there_are():
    classes = re.compile(r"^class (\w+)", re.MULTILINE)
    names = [
        f"{path.stem}.{name}."
        for path in BENCHMARKS.glob("*.py")
        for name in classes.findall(path.read_text(encoding="utf-8"))
    ]
    for pattern in configuration()["regressions_thresholds"]:
        assert any(re.match(pattern, name) for name in names), pattern


def test_results_can_be_published():
    """asv shows no results without the machine.json beside them. A clone has what git has: git is asked."""
    results = BENCHMARKS / "results"
    for folder in {path.parent for path in results.glob("*/*.json")}:
        assert (folder / "machine.json").exists(), folder
    ignored = subprocess.run(
        ["git", "check-ignore", *results.glob("*/*.json")],
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
    )
    assert ignored.stdout == "", ignored.stdout
