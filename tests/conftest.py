# SPDX-License-Identifier: Apache-2.0
"""Hypothesis profiles, readable assertions in the helper modules, and what every test must leave alone.

Tests marked `gpu` are of tables on a GPU. They run on numba's simulator of one, wherever numba-cuda is; with
``-m gpu`` on a real one. Tests marked `docs`, `browser`, `hosts` or `peers` run only where ``-m`` names the
marker.
"""

import os
import re
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite(
    "backends", "checks", "dynamic_layers", "kills", "oracle", "preparing", "table_model", "table_saves"
)

# The first example of a test compiles kernels for seconds: no deadline, and slowness says nothing.
shared = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", shared, max_examples=50)
settings.register_profile("ci", shared, max_examples=50, derandomize=True, database=None, print_blob=True)
settings.register_profile("thorough", shared, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# A thread of the simulated GPU computes with NumPy's scalars, under the error state that contexts start with.
SIMULATED_WARNINGS = "ignore:.* encountered in (scalar|cast):RuntimeWarning"

ONLY_WHEN_NAMED = {"docs", "browser", "hosts", "peers"}
"""Markers of tests that need what most machines have not. Lanes of `.ci/run` and `.ci/extra` name them."""


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="repeat what is tried at random much more often")


def missing_of_gpu():
    """Packages that tests marked `gpu` need and that are not there."""
    return [package for package in ("numba_cuda", "greenlet") if find_spec(package) is None]


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")
    import numba  # reads the variable when it is imported

    if numba.config.ENABLE_CUDASIM and not missing_of_gpu():
        import simulator

        simulator.repair()
    if numba.config.DISABLE_JIT:
        # Interpreted kernels compute with NumPy's scalars, which warn where compiled code is silent.
        np.seterr(over="ignore", invalid="ignore", divide="ignore")


def leave_out(items, config):
    """Deselect tests with a marker of `ONLY_WHEN_NAMED` that the expression of ``-m`` does not name."""
    unnamed = ONLY_WHEN_NAMED.difference(re.findall(r"\w+", config.option.markexpr))
    kept, left_out = [], []
    for item in items:
        marked = any(mark.name in unnamed for mark in item.iter_markers())
        (left_out if marked else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_modifyitems(items, config):
    import numba

    leave_out(items, config)
    if numba.config.ENABLE_CUDASIM:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.filterwarnings(SIMULATED_WARNINGS))


@pytest.fixture(autouse=True)
def _a_gpu_or_its_simulator(request):
    """What tests marked `gpu` need."""
    if request.node.get_closest_marker("gpu") is None:
        return
    import numba
    from needs import missing

    for package in missing_of_gpu():
        pytest.skip(missing(package))
    if not numba.config.ENABLE_CUDASIM and request.config.option.markexpr != "gpu":
        pytest.skip(
            "NUMBA_ENABLE_CUDASIM=0: tests of the extra `cuda` run on the simulator, or with -m gpu on a GPU"
        )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request, _a_gpu_or_its_simulator):
    """Where tables are: one of `backends`."""
    import backends

    return backends.BACKENDS[request.param]


@pytest.fixture(autouse=True)
def _numbas_threads_are_left_alone():
    """A promise of the library; and what a test leaves behind here is what the next one starts with."""
    import numba

    before = numba.get_num_threads()
    yield
    after = numba.get_num_threads()
    numba.set_num_threads(before)
    assert after == before


@pytest.fixture
def write(tmp_path):
    """Write a file of interactions."""

    def write(content, name="interactions.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def no_fsync(monkeypatch):
    """Do not wait for the disk: what is written is there, but for a crash of the machine."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
