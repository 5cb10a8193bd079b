"""`python -m benchmarks.gpu`, with tiny tables on the simulator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.gpu, pytest.mark.jit]
pytest.importorskip("numba_cuda", reason='no numba-cuda: pip install "nb-sparse-adam[test,cuda]"')


def run(*arguments, simulated, cwd):
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = {**os.environ, "NUMBA_ENABLE_CUDASIM": str(int(simulated)), "PYTHONPATH": path}
    program = "import sys; from benchmarks.gpu import main; sys.exit(main())"
    if simulated:  # a barrier takes some switches of each of the threads that simulate a block
        program = f"import sys, simulator; simulator.repair(); sys.setswitchinterval(1e-4); {program}"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=cwd, env=env, check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_every_section_runs_and_the_bits_are_those_of_the_cpu(tmp_path):
    done = run("--quick", "--out", "found.json", simulated=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert list(report) == ["machine", "checks", "copy", "rows", "rows_in_torch", "bags", "other_steps"]
    assert all("error" not in section for section in report.values())
    assert report["machine"]["gpu"] == "simulator"
    assert report["checks"]["right"]
    assert report["checks"]["equal"] == 21
    assert report["rows"]["row"]["bytes"] == 12 * 8 * 4 * 7 + 12 * 8 + 12 * 8


def test_without_a_gpu_it_says_so(tmp_path):
    from numba import cuda

    done = run("--out", "found.json", simulated=False, cwd=tmp_path)
    if done.returncode == 2:
        assert done.stderr.strip() == (
            "benchmarks.gpu: there is no GPU here that CUDA can use; nothing was measured."
        )
        assert not (tmp_path / "found.json").exists()
    else:  # a machine that has one
        assert cuda.is_available()
