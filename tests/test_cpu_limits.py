# SPDX-License-Identifier: Apache-2.0
"""How many threads a step takes where nobody has asked for a number: OMP_NUM_THREADS and control groups."""

import os
import subprocess
import sys

import pytest

from nb_sparse_adam._src.engine import cpu_limits
from nb_sparse_adam._src.info import usable_cores

needs_cores = pytest.mark.skipif(usable_cores() == 1, reason="numba starts one thread on one core")

PROGRAM = """
import sys
from pathlib import Path
from nb_sparse_adam._src.engine import cpu_limits
from nb_sparse_adam._src.engine.pacing import Paces
if len(sys.argv) > 1:
    cpu_limits.CGROUPS, cpu_limits.OWN_CGROUPS = Path(sys.argv[1], "mount"), Path(sys.argv[1], "own")
partition, _ = Paces().partition_for("Rows", 1 << 20, None)
asked_for, _ = Paces().partition_for("Rows", 1 << 20, 2)
print(partition.parts, asked_for.parts)
"""


def threads_of_a_step(*arguments, **env):
    """By default, and with ``num_threads=2``, in a process with an environment."""
    drop = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
    env = {**{key: value for key, value in os.environ.items() if key not in drop}, **env}
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert out.returncode == 0, out.stderr
    by_default, asked_for = map(int, out.stdout.split())
    return by_default, asked_for


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@needs_cores
@pytest.mark.parametrize("value", ["1", "1,4"])
def test_omp_num_threads_is_obeyed_and_a_number_that_was_asked_for_too(value):
    assert threads_of_a_step(OMP_NUM_THREADS=value) == (1, 2)


@needs_cores
@pytest.mark.parametrize("value", ["0", "many", "1000"])
def test_an_omp_num_threads_that_is_no_limit_is_none(value):
    assert threads_of_a_step(OMP_NUM_THREADS=value)[0] == min(usable_cores(), 1000)


def test_numbas_own_variable_comes_first():
    assert threads_of_a_step(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="2") == (2, 2)


@needs_cores
@pytest.mark.parametrize("quota", ["100000 100000", "50000 100000"])
def test_a_quota_of_one_core_is_one_thread(quota, tmp_path):
    write(tmp_path / "own", "0::/pod/container\n")
    write(tmp_path / "mount" / "pod" / "container" / "cpu.max", f"{quota}\n")
    assert threads_of_a_step(tmp_path) == (1, 2)


QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"
V1_OWN = "9:name=systemd:/\n4:memory:/a\n3:cpu,cpuacct:/a/b\n2:cpuset:/\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        # Groups around it limit it too.
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "200000 100000\n"}, 2),
        # In a container: the path is the system's, the files begin at the container.
        ("0::/system/docker-1\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/../other\n", {"cpu.max": "400000 100000\n"}, 4),
        # Version 1, alone or beside version 2.
        (V1_OWN, {f"cpu,cpuacct/a/{QUOTA}": "250000", f"cpu,cpuacct/a/{PERIOD}": "100000"}, 2.5),
        (V1_OWN, {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        (V1_OWN, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (V1_OWN, {"cpu/cpu.cfs_quota_us": "50000"}, None),
        ("0::/a\n", {"unified/a/cpu.max": "700000 100000\n"}, 7),
        # What is not understood limits nobody.
        ("0::/\n", {"cpu.max": "150000\n"}, None),
        ("0::/\n", {"cpu.max": "a b\n"}, None),
        ("0::/\n", {"cpu.max": "100000 0\n"}, None),
        ("", {"cpu.max": "150000 100000\n"}, None),
        ("what\n", {"cpu.max": "150000 100000\n"}, None),
    ],
)
def test_quotas_of_both_versions_of_control_groups(own, files, expected, tmp_path, monkeypatch):
    write(tmp_path / "own", own)
    for name, text in files.items():
        write(tmp_path / "mount" / name, text)
    monkeypatch.setattr(cpu_limits, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(cpu_limits, "CGROUPS", tmp_path / "mount")
    assert cpu_limits.cpu_quota() == expected


def test_a_system_without_control_groups_has_no_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_limits, "OWN_CGROUPS", tmp_path / "missing")
    assert cpu_limits.cpu_quota() is None
