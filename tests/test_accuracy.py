# SPDX-License-Identifier: Apache-2.0
"""How far rounding has taken the numbers from the oracle's after ten thousand steps."""

import numpy as np
import pytest
from checks import STEP_COUNTS
from oracle import OracleSparseAdam

from nb_sparse_adam import RowGradient, SparseAdam

STEPS, ROWS, DIM = 10_000, 4, 3

# In units of rounding (eps of the dtype). Moments forget, and with them what has been rounded; but a beta is
# rounded itself, by up to eps / 2, and 1 - beta in the long run is what the moment is proportional to. A
# parameter is rounded once in each step, which adds up like a random walk, relative to its size and to all
# that it has moved.
ROUNDING = 32


def of_beta(beta):
    return 0.5 / (1 - beta)


@pytest.mark.jit
@pytest.mark.parametrize(("dtype", "eps_hat"), [(np.float32, False), (np.float64, True)])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_ten_thousand_steps(step_counts, dtype, eps_hat):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(ROWS, DIM)).astype(dtype)
    options = {"lr": 1e-3, "step_counts": step_counts, "eps_hat": eps_hat}
    oracle, opt = OracleSparseAdam(table, **options), SparseAdam(table, **options, num_threads=1)
    for _ in range(STEPS):
        n = int(rng.integers(1, 4))
        rows, values = rng.integers(0, ROWS, n), rng.normal(size=(n, DIM)).astype(dtype)
        values[rng.random((n, DIM)) < 0.3] = 0
        opt.step(RowGradient(rows, values))
        oracle.step(oracle.sums("rows", (rows, values)))
    state, expected = opt.state["table"], oracle.tables["table"]
    np.testing.assert_array_equal(state.steps, expected.steps)
    eps = np.finfo(dtype).eps

    def units(got, wanted, magnitude):
        return np.max(np.abs(got - wanted) / magnitude) / eps

    beta1, beta2 = opt.betas
    first = units(state.exp_avg, expected.exp_avg, expected.exp_avg_magnitude)
    second = units(state.exp_avg_sq, expected.exp_avg_sq, expected.exp_avg_sq)
    moved = units(table, expected.param, expected.param_magnitude)
    assert first < ROUNDING + of_beta(beta1)
    assert second < ROUNDING + of_beta(beta2)
    assert moved < ROUNDING + of_beta(beta1) + of_beta(beta2) / 2  # of the root of the second moment
