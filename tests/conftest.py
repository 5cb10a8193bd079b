"""Hypothesis profiles, readable assertions in the helper modules, and what every test must leave alone."""

import os

import numba
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("checks", "oracle")

# The first example of a test compiles kernels for seconds: no deadline, and slowness says nothing.
shared = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", shared, max_examples=50)
settings.register_profile("ci", shared, max_examples=50, derandomize=True, database=None, print_blob=True)
settings.register_profile("thorough", shared, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

if numba.config.DISABLE_JIT:
    # Interpreted kernels compute with NumPy's scalars, which warn where compiled code is silent.
    np.seterr(over="ignore", invalid="ignore", divide="ignore")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="repeat what is tried at random much more often")


@pytest.fixture(autouse=True)
def _numbas_threads_are_left_alone():
    """A promise of the library; and what a test leaves behind here is what the next one starts with."""
    before = numba.get_num_threads()
    yield
    after = numba.get_num_threads()
    numba.set_num_threads(before)
    assert after == before
