# SPDX-License-Identifier: Apache-2.0
"""Numbers at the edges of their types, against the oracle."""

import numpy as np
import pytest
from checks import STEP_COUNTS
from oracle import OracleSparseAdam

from nb_sparse_adam import RowGradient, SparseAdam

ROWS, DIM = 6, 4


def follow(table, gradients, **options):
    """Steps of both, compared."""
    oracle, opt = OracleSparseAdam(table, **options), SparseAdam(table, **options, num_threads=1)
    for rows, values in gradients:
        opt.step(RowGradient(rows, values))
        oracle.step(oracle.sums("rows", (rows, values)))
        state, expected = opt.state["table"], oracle.tables["table"]
        expected.assert_close(table, state.exp_avg, state.exp_avg_sq)
        np.testing.assert_array_equal(state.steps, expected.steps)
    return opt


def drawn(dtype, scale, steps=6):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield rng.integers(0, ROWS, 5), (rng.normal(size=(5, DIM)) * scale).astype(dtype)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.999), (0.9, 0.0)])
@pytest.mark.parametrize("eps_hat", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_beta_of_zero_forgets_at_once(step_counts, dtype, eps_hat, betas):
    options = {"betas": betas, "eps_hat": eps_hat, "step_counts": step_counts, "lr": 0.1}
    # Without memory of g², where a sum cancels the ratio of two roundings is left: gradients of one sign.
    gradients = [(rows, np.abs(values)) for rows, values in drawn(dtype, 1)]
    follow(np.ones((ROWS, DIM), dtype), gradients, **options)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_and_parameters_that_are_subnormal(dtype, step_counts):
    tiny = np.finfo(dtype).smallest_subnormal
    table = np.full((ROWS, DIM), 3 * tiny)
    opt = follow(table, drawn(dtype, 1000 * float(tiny)), step_counts=step_counts, lr=1e-3)
    assert np.abs(opt.state["table"].exp_avg).max() > 0  # subnormal numbers are not taken for zero
    assert opt.state["table"].exp_avg_sq.max() == 0  # their squares are


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_whose_squares_are_about_the_largest_number(dtype, step_counts):
    largest = float(np.sqrt(np.finfo(dtype).max)) / 8  # of normal deviates, and sums of some of them
    opt = follow(np.ones((ROWS, DIM), dtype), drawn(dtype, largest), step_counts=step_counts, lr=0.1)
    assert np.isfinite(opt.tables["table"]).all()


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_square_that_overflows_is_refused_skipped_or_infinite(step_counts):
    gradient = RowGradient([1, 2], np.array([[1e30] * DIM, [1.0] * DIM], np.float32))
    for on_nonfinite in ("raise", "skip", "propagate"):
        table = np.ones((ROWS, DIM), np.float32)
        opt = SparseAdam(table, step_counts=step_counts, on_nonfinite=on_nonfinite, lr=0.1, num_threads=1)
        if on_nonfinite == "raise":
            with pytest.raises(ValueError, match="overflows float32"):
                opt.step(gradient)
            assert (table == 1).all()
            continue
        opt.step(gradient)
        np.testing.assert_allclose(table[2], 0.9, rtol=1e-5)
        assert (table[1] == 1).all()  # skipped, or divided by infinity
        assert np.isinf(opt.state["table"].exp_avg_sq[1]).all() == (on_nonfinite == "propagate")
