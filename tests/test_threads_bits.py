# SPDX-License-Identifier: Apache-2.0
"""The same inputs give the same bits: for any number of threads, run after run, and among other threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from checks import STEP_COUNTS, assert_same_bits, state_bits
from scipy import sparse

from nb_sparse_adam import BagGradient, RowGradient, SparseAdam
from nb_sparse_adam.errors import GradientIndexError, OptionError

pytestmark = pytest.mark.jit  # gradients large enough for threads are slow without compiled kernels

ROWS, DIM, IDS, HOT = 3000, 16, 20_000, 1234


def hot_ids(rng):
    """Ids with many duplicates; every second one is the same."""
    ids = rng.integers(0, ROWS, IDS)
    ids[::2] = HOT
    return ids


def large_gradients(seed=0):
    """One of each form, large enough to be run in parallel."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(IDS, DIM)).astype(np.float32)
    pooled = rng.normal(size=(1000, DIM)).astype(np.float32)
    offsets = np.sort(rng.integers(0, IDS, 1000))
    offsets[0] = 0
    columns = rng.integers(0, DIM, 16 * IDS)
    rows = np.sort(np.tile(hot_ids(rng), 16))
    data = rng.normal(size=len(rows)).astype(np.float32)
    matrix = sparse.coo_array((data, (rows, columns)), shape=(ROWS, DIM))
    indptr = np.searchsorted(rows, np.arange(ROWS + 1))
    return {
        "rows": RowGradient(hot_ids(rng), values),
        "unique rows": RowGradient(rng.permutation(ROWS), values[:ROWS]),
        "bags": BagGradient(hot_ids(rng), offsets, pooled),
        "mean bags": BagGradient(hot_ids(rng), offsets, pooled, mode="mean"),
        "weighted bags": BagGradient(
            hot_ids(rng), offsets, pooled, weights=rng.normal(size=IDS).astype(np.float32)
        ),
        "csr": sparse.csr_array((data, columns, indptr), shape=(ROWS, DIM)),
        "coo": matrix,
        "csc": sparse.csc_array(matrix),
    }


def trained(gradient, num_threads, step_counts="element", dtype=np.float32, steps=2):
    table = np.linspace(-1, 1, ROWS * DIM).reshape(ROWS, DIM).astype(dtype)
    opt = SparseAdam(table, lr=0.1, step_counts=step_counts, num_threads=num_threads)
    for _ in range(steps):
        opt.step(gradient)
    return state_bits(opt, table)


@pytest.mark.parametrize("form", large_gradients())
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_any_number_of_threads_gives_the_same_bits(step_counts, form):
    gradient = large_gradients()[form]
    expected = trained(gradient, 1, step_counts)
    assert expected["table", "exp_avg"].any()
    for num_threads in [*range(2, numba.config.NUMBA_NUM_THREADS + 1), None, 1]:
        assert_same_bits(trained(gradient, num_threads, step_counts), expected)


def test_float64_gives_the_same_bits_too():
    for gradient in large_gradients().values():
        expected = trained(gradient, 1, dtype=np.float64)
        assert_same_bits(trained(gradient, None, dtype=np.float64), expected)


DIGESTS = """
import hashlib
import sys
from checks import STEP_COUNTS
from test_threads_bits import large_gradients, trained
for form, gradient in large_gradients().items():
    for step_counts in STEP_COUNTS:
        bits = b"".join(array.tobytes() for array in trained(gradient, None, step_counts).values())
        print(form, step_counts, hashlib.sha256(bits).hexdigest())
"""


def test_another_process_with_more_threads_than_cores_gives_the_same_bits():
    def digests(threads):
        environment = os.environ | {"NUMBA_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-c", DIGESTS]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    one = digests(1)
    assert digests(4) == one
    assert digests(5) == one
    assert one.count("\n") == len(large_gradients()) * len(STEP_COUNTS)


def test_small_and_large_gradients_of_one_row_agree_bit_for_bit():
    # The first rows of a large gradient, alone: another kernel, another grouping, the same numbers.
    rng = np.random.default_rng(1)
    rows, values = rng.permutation(ROWS), rng.normal(size=(ROWS, DIM)).astype(np.float32)
    large = trained(RowGradient(rows, values), None)
    small = trained(RowGradient(rows[:5], values[:5]), None)
    for what in ("param", "exp_avg", "exp_avg_sq", "steps"):
        np.testing.assert_array_equal(small["table", what][rows[:5]], large["table", what][rows[:5]])


def test_optimizers_that_step_in_many_python_threads_at_once_give_the_bits_of_one_after_the_other():
    gradients = list(large_gradients().values())
    expected = [trained(gradient, None) for gradient in gradients]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for got, alone in zip(
                pool.map(lambda gradient: trained(gradient, None), gradients), expected, strict=True
            ):
                assert_same_bits(got, alone)


def test_the_thread_count_of_the_process_is_left_alone():
    before = numba.get_num_threads()
    try:
        for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(threads)
            for num_threads in (None, 1, numba.config.NUMBA_NUM_THREADS):
                trained(large_gradients()["rows"], num_threads)
                assert numba.get_num_threads() == threads
                with pytest.raises(GradientIndexError):
                    trained(RowGradient(np.array([ROWS]), np.ones((1, DIM))), num_threads)
                assert numba.get_num_threads() == threads
    finally:
        numba.set_num_threads(before)


def test_more_threads_than_numba_has_are_refused():
    with pytest.raises(OptionError, match=str(numba.config.NUMBA_NUM_THREADS)):
        SparseAdam(np.ones((3, 2)), num_threads=numba.config.NUMBA_NUM_THREADS + 1)
