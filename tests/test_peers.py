# SPDX-License-Identifier: Apache-2.0
"""The libraries that `nb-sparse-adam bench` compares with are given the same work: run with ``-m peers``."""

import numpy as np
import pytest
from needs import need

from nb_sparse_adam._src.bench.cases import Bag, Case, Rows
from nb_sparse_adam._src.bench.contenders import HYPER
from nb_sparse_adam._src.bench.peers import FbgemmBag, PaddleRows
from nb_sparse_adam._src.bench.recommender_lines import entries
from nb_sparse_adam._src.bench.recommender_runs import follow
from nb_sparse_adam._src.recommender.interactions import generate, hold_out
from nb_sparse_adam._src.recommender.topk import rank_rows

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


@pytest.fixture
def trained(monkeypatch):
    """Train a recommender of the comparison on a little; return it, its vectors and its split."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    split = hold_out(generate(200, 120, 12.0))

    def train(name):
        entry = next(entry for entry in entries("generated") if entry.name == name)
        recommender = entry.make(split, 1, 0, epochs=3)
        recommender.warm()
        timeline = follow(recommender, (1, 3))
        assert len(timeline.seconds) == 3
        first, last = timeline.kept.values()
        assert not np.array_equal(first[0], last[0])
        return recommender, last, split

    return train


@pytest.mark.filterwarnings("ignore")  # of what the environment of this process has for BLAS
@pytest.mark.parametrize("name", ["implicit ALS", "implicit BPR"])
def test_implicit_recommends_what_its_vectors_say(name, trained):
    need("implicit")
    recommender, (users, items), split = trained(name)
    ids, _ = recommender.recommend(5)
    everybody, seen = np.arange(len(users)), split.train
    expected, _ = rank_rows(users @ items.T, everybody, seen.indptr, seen.indices, 5)
    assert (ids == expected).mean() > 0.99  # where scores are equal, the order is open


def test_lightfm_scores_as_its_vectors_say(trained):
    need("lightfm")
    recommender, (users, items), _ = trained("LightFM WARP")
    who, what = np.repeat(np.arange(len(users)), len(items)), np.tile(np.arange(len(items)), len(users))
    theirs = recommender._model.predict(who, what).reshape(len(users), len(items))
    ours = users @ items.T
    shifts = theirs - ours  # LightFM adds a bias of the user
    np.testing.assert_allclose(shifts, np.broadcast_to(shifts[:, :1], shifts.shape), atol=1e-4)
