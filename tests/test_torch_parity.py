# SPDX-License-Identifier: Apache-2.0
"""torch's optimizers, number for number: dense ``Adam``, and ``SparseAdam`` on its own terms."""

import numpy as np
import pytest
from checks import STEP_COUNTS
from needs import need
from scipy import sparse

from nb_sparse_adam import BagGradient, RowGradient, SparseAdam

torch = need("torch")

OPTIONS = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6}
STEPS = 40
# torch rounds in its own places: tens of units in the last place after tens of steps.
RTOL = {np.float32: 2e-5, np.float64: 1e-12}


def assert_parity(table, state, theirs, adam, dtype):
    assert np.abs(theirs.detach().numpy()).min() < 1  # it moved from ones
    for ours, other in (
        (table, theirs.detach()),
        (state.exp_avg, adam.state[theirs]["exp_avg"]),
        (state.exp_avg_sq, adam.state[theirs]["exp_avg_sq"]),
    ):
        np.testing.assert_allclose(ours, other.numpy(), rtol=RTOL[dtype], atol=RTOL[dtype] / 10)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_gradients_without_zeros_are_adam(step_counts, dtype, maximize):
    rng = np.random.default_rng(0)
    table = np.ones((9, 5), dtype)
    theirs = torch.ones((9, 5), dtype=torch.from_numpy(table).dtype, requires_grad=True)
    opt = SparseAdam(table, step_counts=step_counts, maximize=maximize, **OPTIONS)
    adam = torch.optim.Adam([theirs], maximize=maximize, **OPTIONS)
    for step in range(STEPS):
        gradient = rng.normal(size=(9, 5)).astype(dtype)
        opt.step(RowGradient(np.arange(9), gradient) if step % 2 else sparse.csr_array(gradient))
        theirs.grad = torch.from_numpy(gradient)
        adam.step()
    assert_parity(table, opt.state["table"], theirs, adam, dtype)


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_global_counts_with_eps_hat_are_sparse_adam(dtype, maximize, coalesced):
    rng = np.random.default_rng(1)
    table = np.ones((30, 4), dtype)
    theirs = torch.ones((30, 4), dtype=torch.from_numpy(table).dtype, requires_grad=True)
    opt = SparseAdam(table, step_counts="global", eps_hat=True, maximize=maximize, **OPTIONS)
    adam = torch.optim.SparseAdam([theirs], maximize=maximize, **OPTIONS)
    for step in range(STEPS):
        n = 0 if step == 7 else int(rng.integers(1, 40))  # an empty gradient counts too
        rows, values = rng.integers(0, 30, n), rng.normal(size=(n, 4)).astype(dtype)
        gradient = torch.sparse_coo_tensor(
            rows[None], torch.from_numpy(values), (30, 4), check_invariants=True
        )
        if coalesced:
            gradient = gradient.coalesce()
            rows, values = gradient.indices()[0].numpy(), gradient.values().numpy()
        theirs.grad = gradient
        adam.step()
        opt.step(RowGradient(rows, values))
    assert opt.state["table"].steps == STEPS
    assert_parity(table, opt.state["table"], theirs, adam, dtype)


@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
def test_a_bag_gradient_is_the_backward_of_embedding_bag(mode):
    rng = np.random.default_rng(2)
    table = np.ones((20, 4))
    theirs = torch.ones((20, 4), dtype=torch.float64, requires_grad=True)
    opt = SparseAdam(table, step_counts="global", eps_hat=True, **OPTIONS)
    adam = torch.optim.SparseAdam([theirs], **OPTIONS)
    for _ in range(10):
        lengths = rng.integers(0, 6, 8)
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        indices, grad_output = rng.integers(0, 20, lengths.sum()), rng.normal(size=(8, 4))
        weights = rng.normal(size=len(indices)) if mode == "weighted" else None
        pooled = torch.nn.functional.embedding_bag(
            torch.from_numpy(indices),
            theirs,
            torch.from_numpy(offsets),
            mode="mean" if mode == "mean" else "sum",
            sparse=True,
            per_sample_weights=None if weights is None else torch.from_numpy(weights),
        )
        adam.zero_grad()
        pooled.backward(torch.from_numpy(grad_output))
        adam.step()
        options = {"mean": {"mode": "mean"}, "weighted": {"weights": weights}}.get(mode, {})
        opt.step(BagGradient(indices, offsets, grad_output, **options))
    assert_parity(table, opt.state["table"], theirs, adam, np.float64)
