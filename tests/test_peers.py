# SPDX-License-Identifier: Apache-2.0
"""The libraries that `nb-sparse-adam bench` compares with are given the same work: run with ``-m peers``."""

import numpy as np
import pytest
from needs import need

from nb_sparse_adam._src.bench.cases import Bag, Case, Rows
from nb_sparse_adam._src.bench.contenders import HYPER
from nb_sparse_adam._src.bench.peers import FbgemmBag, PaddleRows

pytestmark = pytest.mark.peers

STEPS = 3


def bags(case, rng):
    lookups = rng.integers(case.rows, size=5 * 6)
    lookups[::4] = 7  # an id that bags share
    return Bag(lookups, np.arange(6) * 6, rng.normal(size=(5, case.dim)).astype(np.float32))


def rows(case, rng):
    ids = rng.choice(case.rows, size=17, replace=False)
    return Rows(ids, rng.normal(size=(17, case.dim)).astype(np.float32))


def case(make):
    return Case(make.__name__, 60, 16, STEPS, make)


def run(contender):
    for _ in range(STEPS):
        contender.ready()
        contender.step()


def dense(bag, shape):
    """The gradient of the table that bags were summed from."""
    gradient = np.zeros(shape)
    np.add.at(gradient, bag.indices, np.repeat(bag.grad_output, np.diff(bag.offsets), axis=0))
    return gradient


@pytest.fixture
def one_thread_of_torch():
    torch = need("torch")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of operators that its import does not find
@pytest.mark.parametrize("optimizer", ["EXACT_SGD", "EXACT_ADAGRAD"])
def test_fbgemm(optimizer, one_thread_of_torch):
    need("fbgemm_gpu")
    work = case(bags)
    theirs = FbgemmBag(work, threads=1, optimizer=optimizer)
    run(theirs)
    expected, squares = work.table().astype(np.float64), np.zeros((work.rows, work.dim))
    for bag in work.arrays():
        gradient = dense(bag, expected.shape)
        squares += gradient**2
        adagrad = gradient / (np.sqrt(squares) + HYPER["eps"])
        expected -= HYPER["lr"] * (gradient if optimizer == "EXACT_SGD" else adagrad)
    got = theirs._layer.weights_host.detach().numpy().reshape(expected.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert (got != np.float32(0.1)).any()


def test_paddle():
    """Only rows that are looked up change; Paddle 3.3 corrects their moments as if for one step more."""
    paddle = need("paddle")
    work = case(rows)
    theirs = PaddleRows(work, threads=1)
    run(theirs)
    assert paddle.get_device() == "cpu"
    (beta1, beta2), expected = HYPER["betas"], work.table().astype(np.float64)
    exp_avg, exp_avg_sq = np.zeros_like(expected), np.zeros_like(expected)
    for step, (ids, values) in enumerate(work.arrays(), 2):
        exp_avg[ids] = beta1 * exp_avg[ids] + (1 - beta1) * values
        exp_avg_sq[ids] = beta2 * exp_avg_sq[ids] + (1 - beta2) * values.astype(np.float64) ** 2
        root = np.sqrt(exp_avg_sq[ids] / (1 - beta2**step)) + HYPER["eps"]
        expected[ids] -= HYPER["lr"] * exp_avg[ids] / (1 - beta1**step) / root
    got = theirs._layer.weight.numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert (got != np.float32(0.1)).any()
