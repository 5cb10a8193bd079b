# SPDX-License-Identifier: Apache-2.0
"""Threads compute in the calling thread's mode: flush-to-zero gives the same bits on any number of them."""

import subprocess
import sys

import numpy as np
import pytest
from checks import STEP_COUNTS, assert_same_bits, state_bits
from needs import need
from scipy import sparse

from nb_sparse_adam import BagGradient, RowGradient, SparseAdam
from nb_sparse_adam._src.engine.threads import max_threads

torch = need("torch")

pytestmark = [
    pytest.mark.jit,
    pytest.mark.skipif(max_threads() == 1, reason="there is one thread"),
    pytest.mark.skipif(not torch.set_flush_denormal(False), reason="torch cannot set the mode here"),
]

ROWS, DIM, IDS = 3000, 16, 6000


@pytest.fixture(params=[True, False], ids=["flushed", "kept"])
def flushes(request):
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(False)


def tiny_gradients():
    """Of each form: their squares, and sums of the smallest of them, are subnormal."""
    rng = np.random.default_rng(3)
    values = (rng.normal(size=(IDS, DIM)) * 1e-20).astype(np.float32)
    hot = rng.integers(0, ROWS, IDS)
    hot[::2] = 7  # one row with more ids than a block
    return {
        "rows": RowGradient(np.arange(ROWS), values[:ROWS]),
        "segments": RowGradient(hot, values),
        "sums of subnormal numbers": RowGradient(hot, values * np.float32(1e-20)),
        "bags": BagGradient(hot, np.arange(0, IDS, 4), values[: IDS // 4], mode="mean"),
        "csr": sparse.csr_array(values[:ROWS]),
        "tables": {f"t{at}": RowGradient(hot, values) for at in range(5)},
    }


def trained(gradient, num_threads, step_counts):
    names = list(gradient) if isinstance(gradient, dict) else ["table"]
    tables = {name: np.full((ROWS, DIM), 1e-38, np.float32) for name in names}
    opt = SparseAdam(tables, lr=1e-4, eps=1e-30, step_counts=step_counts, num_threads=num_threads)
    for _ in range(2):
        opt.step(gradient if isinstance(gradient, dict) else {"table": gradient})
    return state_bits(opt, tables)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("form", tiny_gradients())
def test_any_number_of_threads_gives_the_bits_of_one_in_the_callers_mode(form, step_counts, flushes):
    gradient = tiny_gradients()[form]
    expected = trained(gradient, 1, step_counts)
    assert_same_bits(trained(gradient, 2, step_counts), expected)


def test_the_mode_makes_a_difference():
    """Or the test above would say nothing."""
    gradient = tiny_gradients()["rows"]
    kept = trained(gradient, 2, "row")
    torch.set_flush_denormal(True)
    try:
        flushed = trained(gradient, 2, "row")
    finally:
        torch.set_flush_denormal(False)
    assert (kept["table", "exp_avg_sq"] != flushed["table", "exp_avg_sq"]).any()


IN_THE_POOL = """
import numpy as np, torch
from numba import njit, prange
from nb_sparse_adam import RowGradient, SparseAdam

@njit(parallel=True)
def halves(values):
    out = np.empty_like(values)
    for i in prange(len(values)):
        out[i] = values[i] * np.float32(0.5)
    return out

tiny = np.full(4096, 1.2e-38, np.float32)
assert halves(tiny).all()
torch.set_flush_denormal(True)
table = np.zeros((3000, 16), np.float32)
SparseAdam(table, num_threads=2).step(RowGradient(np.arange(3000), np.ones((3000, 16), np.float32)))
assert torch.set_flush_denormal(False)
assert halves(tiny).all()  # numba's threads are in the mode that they were in
"""


def test_numbas_threads_are_left_in_their_mode():
    subprocess.run([sys.executable, "-c", IN_THE_POOL], check=True, timeout=200)
