# SPDX-License-Identifier: Apache-2.0
"""The oracle itself, held to closed forms, to SciPy's arithmetic and to torch."""

import math

import numpy as np
import pytest
from needs import need
from oracle import TOLERANCES, OracleSparseAdam, Sums, bias_correction

LR, BETAS, EPS = 0.05, (0.9, 0.99), 1e-6


def dense(gradient):
    """A dense gradient as ``Sums``: every row present."""
    rows = {row: [float(g) for g in values] for row, values in enumerate(gradient)}
    return Sums(rows, {row: [abs(g) for g in values] for row, values in rows.items()})


def table_and_gradients(seed=0, shape=(5, 3), steps=20, zeros=0.0):
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(steps, *shape))
    gradients[rng.random(gradients.shape) < zeros] = 0.0
    return rng.normal(size=shape), gradients


def test_first_step_of_any_gradient_moves_by_lr():
    # At k = 1 the corrected moments are g and g squared: the update is lr * g / (|g| + eps).
    oracle = OracleSparseAdam(np.zeros((1, 3)), lr=LR, eps=EPS)
    g = np.array([[2.0, -0.25, 1e-6]])
    oracle.step(dense(g))
    np.testing.assert_allclose(oracle.tables["table"].param, -LR * g / (np.abs(g) + EPS), rtol=1e-14)


def test_first_step_with_eps_hat_has_eps_before_the_correction():
    # lr * sqrt(1 - b2) / (1 - b1) * (1 - b1) g / (sqrt(1 - b2) |g| + eps)
    oracle = OracleSparseAdam(np.zeros((1, 3)), lr=LR, betas=BETAS, eps=EPS, eps_hat=True)
    g = np.array([[2.0, -0.25, 1e-6]])
    oracle.step(dense(g))
    expected = -LR * g / (np.abs(g) + EPS / math.sqrt(1 - BETAS[1]))
    np.testing.assert_allclose(oracle.tables["table"].param, expected, rtol=1e-13)


@pytest.mark.parametrize("step_counts", ["element", "row", "global"])
def test_a_constant_gradient_has_closed_form_moments(step_counts):
    # m = (1 - b1**k) g and v = (1 - b2**k) g**2, so that every step moves by lr * g / (|g| + eps).
    oracle = OracleSparseAdam(np.ones((2, 2)), lr=LR, betas=BETAS, eps=EPS, step_counts=step_counts)
    g = np.array([[0.5, -3.0], [4.0, 1e-3]])
    for _ in range(30):
        oracle.step(dense(g))
    table = oracle.tables["table"]
    np.testing.assert_allclose(table.exp_avg, (1 - 0.9**30) * g, rtol=1e-13)
    np.testing.assert_allclose(table.exp_avg_sq, (1 - 0.99**30) * g * g, rtol=1e-13)
    np.testing.assert_allclose(table.param, 1 - 30 * LR * g / (np.abs(g) + EPS), rtol=1e-12)
    assert (table.steps == 30).all()


def test_counts_say_what_each_mode_counts():
    steps = {}
    for step_counts in ("element", "row", "global"):
        oracle = OracleSparseAdam(np.zeros((3, 2)), step_counts=step_counts)
        oracle.step(oracle.sums("csr", ([0, 1, 2, 2], [0, 1], [0.0, 2.0])))
        oracle.step(oracle.sums("rows", ([1, 1], [[1.0, 1.0], [-1.0, 1.0]])))
        oracle.step(oracle.sums("rows", ([], np.zeros((0, 2)))))
        steps[step_counts] = oracle.tables["table"].steps.tolist()
    assert steps == {"element": [[0, 0], [0, 2], [0, 0]], "row": [1, 2, 0], "global": 3}


def test_an_element_without_gradient_decays_in_row_mode_and_rests_in_element_mode():
    first, second = dense([[1.0, 1.0]]), dense([[1.0, 0.0]])
    for step_counts, expected in (("row", 0.09), ("global", 0.09), ("element", 0.1)):
        oracle = OracleSparseAdam(np.zeros((1, 2)), step_counts=step_counts)
        oracle.step(first)
        written = oracle.step(second)["table"]
        assert oracle.tables["table"].exp_avg[0, 1] == pytest.approx(expected, rel=1e-14)
        assert written.tolist() == [[True, step_counts != "element"]]


def test_bias_correction_is_accurate_where_the_direct_form_is_not():
    mpmath = need("mpmath")
    with mpmath.workdps(50):
        for beta in (0.0, 0.5, 0.9, 0.999, 1 - 1e-9, 1 - 2**-53):
            for k in (1, 2, 1000, 2**31 - 1):
                exact = 1 - mpmath.mpf(beta) ** k
                assert abs(bias_correction(beta, k) / exact - 1) < 1e-15


@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
def test_bag_gradients_are_a_transposed_matrix_product(mode):
    sparse = need("scipy.sparse")
    rng = np.random.default_rng(1)
    offsets = np.array([0, 3, 3, 4, 9])
    indices = rng.integers(0, 6, 9)
    grad_output = rng.normal(size=(4, 2))
    weights = rng.normal(size=9)
    lengths = np.repeat(np.diff(offsets), np.diff(offsets))
    matrix = {"sum": np.ones(9), "mean": 1.0 / lengths, "weighted": weights}[mode]
    expected = sparse.csr_array((matrix, indices, offsets), shape=(4, 6)).T @ grad_output
    arguments = {"sum": (), "mean": (None, "mean"), "weighted": (weights,)}[mode]
    oracle = OracleSparseAdam(np.zeros((6, 2)))
    for some_offsets in (offsets, offsets[:-1]):
        sums = oracle.sums("bags", (indices, some_offsets, grad_output, *arguments))
        assert set(sums.values) == set(indices)
        for row, values in sums.values.items():
            np.testing.assert_allclose(values, expected[row], rtol=1e-14)


def test_csr_gradients_sum_duplicates_and_have_the_rows_that_store_something():
    sparse = need("scipy.sparse")
    indptr, indices, data = [0, 3, 3, 4, 6], [2, 0, 2, 1, 1, 0], [1.0, 2.0, 4.0, 0.0, 3.0, -1.0]
    expected = sparse.csr_array((data, indices, indptr), shape=(4, 3)).toarray()
    sums = OracleSparseAdam(np.zeros((4, 3))).sums("csr", (indptr, indices, data))
    assert sums.values == {row: expected[row].tolist() for row in (0, 2, 3)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e20])
def test_bad_rows_are_those_beyond_the_dtype(value):
    sums = OracleSparseAdam(np.zeros((4, 1), np.float32)).sums("rows", ([0, 3, 3], [[1.0], [value], [value]]))
    assert sums.bad == {3}
    if np.isfinite(value):
        assert not OracleSparseAdam(np.zeros((4, 1))).sums("rows", ([3, 3], [[value], [value]])).bad


def test_skip_leaves_bad_rows_and_counts_them_and_raise_changes_nothing():
    gradient = ("rows", ([0, 1, 1], [[1.0], [np.nan], [2.0]]))
    for on_nonfinite in ("skip", "raise"):
        oracle = OracleSparseAdam(np.zeros((2, 1)), step_counts="row", on_nonfinite=on_nonfinite)
        table = oracle.tables["table"]
        if on_nonfinite == "skip":
            oracle.step(oracle.sums(*gradient))
            assert (table.steps.tolist(), table.skipped_rows, table.param[1, 0]) == ([1, 0], 1, 0.0)
        else:
            with pytest.raises(FloatingPointError):
                oracle.step(oracle.sums(*gradient))
            assert (table.steps.tolist(), table.skipped_rows) == ([0, 0], 0)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("step_counts", ["element", "row", "global"])
def test_dense_gradients_are_torch_adam(step_counts, maximize):
    torch = need("torch")
    param, gradients = table_and_gradients()
    theirs = torch.tensor(param, requires_grad=True)
    adam = torch.optim.Adam([theirs], lr=LR, betas=BETAS, eps=EPS, maximize=maximize)
    oracle = OracleSparseAdam(param, lr=LR, betas=BETAS, eps=EPS, maximize=maximize, step_counts=step_counts)
    for gradient in gradients:
        theirs.grad = torch.from_numpy(gradient)
        adam.step()
        oracle.step(dense(gradient))
    table, state = oracle.tables["table"], adam.state[theirs]
    np.testing.assert_allclose(table.param, theirs.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(table.exp_avg, state["exp_avg"].numpy(), rtol=1e-11)
    np.testing.assert_allclose(table.exp_avg_sq, state["exp_avg_sq"].numpy(), rtol=1e-11)


@pytest.mark.parametrize("maximize", [False, True])
def test_global_counts_with_eps_hat_are_torch_sparse_adam(maximize):
    torch = need("torch")
    rng = np.random.default_rng(2)
    param = rng.normal(size=(7, 3))
    theirs = torch.tensor(param, requires_grad=True)
    adam = torch.optim.SparseAdam([theirs], lr=LR, betas=BETAS, eps=EPS, maximize=maximize)
    oracle = OracleSparseAdam(
        param, lr=LR, betas=BETAS, eps=EPS, maximize=maximize, step_counts="global", eps_hat=True
    )
    for n in (4, 0, 1, 7, 3, 12, 5, 2, 9, 4):
        rows, values = rng.integers(0, 7, n), rng.normal(size=(n, 3))
        theirs.grad = torch.sparse_coo_tensor(
            rows[None], torch.from_numpy(values), (7, 3), check_invariants=True
        )
        adam.step()
        oracle.step(oracle.sums("rows", (rows, values)))
    table, state = oracle.tables["table"], adam.state[theirs]
    np.testing.assert_allclose(table.param, theirs.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(table.exp_avg, state["exp_avg"].numpy(), rtol=1e-11)
    np.testing.assert_allclose(table.exp_avg_sq, state["exp_avg_sq"].numpy(), rtol=1e-11)


def test_tolerance_accepts_rounding_and_catches_more():
    for dtype, tolerance in TOLERANCES.items():
        ones, eps = np.ones(3), np.finfo(dtype).eps
        tolerance.assert_close(ones + 4 * eps, ones, ones)
        for wrong in (1 + 100 * eps, np.nan, np.inf):
            with pytest.raises(AssertionError):
                tolerance.assert_close(np.array([1.0, wrong, 1.0]), ones, ones)
