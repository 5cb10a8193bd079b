# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.gpu`: that it runs, and finds the bits of a CPU. The times are a simulator's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need

need("numba_cuda")

pytestmark = [pytest.mark.gpu, pytest.mark.jit]

SECTIONS = ["machine", "checks", "large_checks", "copy", "rows", "torch_rows", "bags", "forms"]
# As `python -m benchmarks.gpu`, on a simulator that is repaired.
PROGRAM = """
import runpy, warnings, simulator
simulator.repair()
warnings.filterwarnings("ignore", ".*encountered in", RuntimeWarning)
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def run(arguments, simulated, out):
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "NUMBA_ENABLE_CUDASIM": str(int(simulated)), "PYTHONPATH": path}
    command = [sys.executable, *arguments, "--out", str(out)]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=300, cwd=out.parent
    )


def test_all_sections_run_in_the_simulator_and_all_bits_are_a_cpus(tmp_path):
    out = tmp_path / "found.json"
    done = run(["-c", PROGRAM, "--quick"], True, out)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(out.read_text(encoding="utf-8"))
    assert list(report) == SECTIONS
    assert [name for name in SECTIONS if "error" in report[name]] == []
    assert report["machine"]["gpu"] == "simulator"
    for name in ("checks", "large_checks"):
        assert report[name]["unequal"] == []
        assert report[name]["equal"] == report[name]["cases"] > 8
    for name in ("torch_rows", "bags"):
        assert report[name]["left_out"] in ("torch has no CUDA", "torch is not installed")
    for mode in ("row", "global", "element"):
        assert f"rows.{mode}.share_of_copy " in done.stdout
    for figures in (report["rows"]["row"], report["bags"]["zipf"], report["forms"]["entries"]):
        assert all(value > 0 for key, value in figures.items() if key.endswith(("_ms", "_per_s")))


def test_without_a_gpu_it_says_so(tmp_path):
    out = tmp_path / "found.json"
    done = run(["-m", "benchmarks.gpu", "--only", "machine"], False, out)
    if done.returncode == 0:  # there is one
        assert json.loads(out.read_text(encoding="utf-8"))["machine"]["gpu"] != "simulator"
        return
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("There is no GPU to measure, ")
    assert len(done.stderr.splitlines()) == 1
    assert not out.exists()


def test_the_simulator_is_not_asked_to_do_all_of_it(tmp_path):
    done = run(["-m", "benchmarks.gpu"], True, tmp_path / "found.json")
    assert done.returncode == 2
    assert "--quick" in done.stderr
