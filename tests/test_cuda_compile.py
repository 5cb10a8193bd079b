# SPDX-License-Identifier: Apache-2.0
"""Every kernel is compiled and assembled for real GPUs, which the simulator knows nothing of."""

import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need

need("numba_cuda")
need("cuda.bindings.nvvm")

pytestmark = pytest.mark.jit


def start(*arguments, **more):
    """Start compiling, with more in the environment."""
    program = Path(__file__).with_name("compile_for_gpus.py")
    env = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0", **more}
    command = [sys.executable, program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def reports(*running, limit=None):
    """Wait for processes; what they report, joined."""
    report = []
    try:
        for one in running:
            out, err = one.communicate(timeout=limit)
            assert one.returncode == 0, err
            report += json.loads(out)
    finally:
        for one in running:
            one.kill()
    return report


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What NVVM is given for each kernel; see `compile_for_gpus`."""
    return tmp_path_factory.mktemp("kernels") / "modules"


@pytest.fixture(scope="module")
def compiled(saved):
    return reports(start(8, 0, "--save", saved)) + reports(start(9, 0, "--load", saved))


def test_every_kernel_is_compiled_for_both_generations(compiled):
    from nb_sparse_adam._src.cuda import checks, copies, grouping, kernels, sums

    written = set()
    for module in (checks, copies, grouping, kernels, sums):
        source = map(str.strip, inspect.getsource(module).splitlines())
        for decorator, function in itertools.pairwise(source):
            if decorator == "@kernel":
                written.add(function.removeprefix("def ").partition("(")[0])
    assert len(written) > 20
    for capability in ([8, 0], [9, 0]):
        found = {one["kernel"] for one in compiled if one["capability"] == capability}
        assert found == written
    assert all(one["size"] > 1000 for one in compiled)


def test_products_and_sums_are_rounded_one_by_one_as_a_cpu_does(compiled):
    assert [one["kernel"] for one in compiled if one["fused"]] == []


def test_no_registers_are_spilled(compiled):
    assert all(one["bytes spill stores"] == 0 for one in compiled)
    # Of 64k registers a block of 1024 threads has 64 for each, one of 256 has 255.
    large = {"settle", "scan_digits", "scan_heads"}
    assert all(one["registers"] <= (64 if one["kernel"] in large else 168) for one in compiled)


def test_records_are_read_number_by_number(compiled):
    """Not byte by byte, as those that are not known to be aligned."""
    records = [one for one in compiled if not one["kernel"].startswith("convert")]
    assert all(one["bytes_loaded"] < 8 for one in records)


def test_rows_of_whole_16_bytes_are_moved_16_bytes_at_a_time(compiled):
    wide = [one for one in compiled if one["kernel"] == "update" and one["vector_stores"]]
    assert len(wide) >= 12
    for one in wide:
        assert one["vector_loads"] >= 4  # gradient, parameters, two moments
        assert one["vector_stores"] % 3 == 0  # of an unrolled loop, several times as many


def test_older_compilers_finish(compiled, saved):
    """NVVM of CUDA 12.9 and 13.0 never came back from loops that newer ones compile in a second.

    OLD_NVVM names such libraries, separated by colons; the one that is loaded first is used.
    """
    libraries = os.environ.get("OLD_NVVM")
    if not libraries:
        pytest.skip("needs OLD_NVVM, paths of libnvvm of CUDA 12.9 and 13.0")
    running = [
        start(9, 0, "--load", saved, LD_PRELOAD=library, NUMBA_CACHE_DIR=os.devnull)
        for library in libraries.split(":")
    ]
    report = reports(*running, limit=600)
    assert len(report) == len(compiled)
    assert {one["kernel"] for one in report} == {one["kernel"] for one in compiled}
