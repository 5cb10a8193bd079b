# SPDX-License-Identifier: Apache-2.0
"""The recommender: samples, loss, gradients, training."""

import math
from dataclasses import asdict, fields, replace

import numba
import numpy as np
import pytest
from interaction_files import weighted

from nb_sparse_adam._src.recommender import batches, sampling
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, UserItems, generate, hold_out
from nb_sparse_adam._src.recommender.ranking import popularity_quality
from nb_sparse_adam.errors import InteractionsError, NonFiniteGradientError, OptionError
from nb_sparse_adam.recommender import BPRModel, BPROptions, epoch_batches, train

SMALL = hold_out(generate(40, 30, 6.0, seed=1), seed=1)
WEIGHTED = weighted(SMALL)
BPR = {"loss": "bpr", "negatives": 1, "lr": 0.005, "reg": 0.01, "batch_size": 1024, "init_std": 0.1}


def bpr(**options):
    """Options of BPR, whatever the defaults are; other losses have tests of their own."""
    return BPROptions(**{**BPR, **options})


def copies(split, options, epoch=1):
    return [type(batch)(*(array.copy() for array in batch)) for batch in epoch_batches(split, options, epoch)]


def test_arrays_of_other_layouts_are_jobs_of_another_kind():
    """What is compiled for one reads memory of the other as its own."""
    array = np.zeros((4, 3), np.int32)
    frozen = np.zeros(4, np.int32)
    frozen.flags.writeable = False
    arrays = (np.zeros(4, np.int32), np.zeros(4, np.int64), array[:, 0], frozen, array)
    assert len({sampling.kind_of((each, 1)) for each in arrays}) == len(arrays)
    assert sampling.kind_of((np.zeros(4), 1)) == sampling.kind_of((np.zeros(9), 2))


# --- samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_an_epoch_has_every_interaction_once_and_other_items(batch_size, negatives):
    options = bpr(batch_size=batch_size, negatives=negatives, seed=3)
    batches = copies(SMALL, options)
    assert all(len(batch.users) == batch_size for batch in batches[:-1])
    assert 0 < len(batches[-1].users) <= batch_size
    for batch in batches:
        assert batch.negatives.shape == (len(batch.users), negatives)
        np.testing.assert_array_equal(batch.items, np.concatenate([batch.positives, batch.negatives.ravel()]))
    users, positives, sampled = (np.concatenate(arrays) for arrays in list(zip(*batches, strict=True))[:3])
    keys = users.astype(np.int64) * SMALL.train.n_items + positives
    np.testing.assert_array_equal(
        np.sort(keys), SMALL.train.users().astype(np.int64) * SMALL.train.n_items + SMALL.train.indices
    )
    theirs = set(zip(SMALL.train.users().tolist(), SMALL.train.indices.tolist(), strict=True))
    drawn = {
        (user, item) for user, items in zip(users.tolist(), sampled.tolist(), strict=True) for item in items
    }
    assert drawn
    assert not drawn & theirs
    assert sampled.min() >= 0
    assert sampled.max() < SMALL.train.n_items


def test_samples_are_uniform_over_the_other_items():
    user_items = [2, 3, 7]
    interactions = Interactions.from_ids([0] * 3 + [1] * 9, user_items + list(range(9)))
    split = Split(interactions.pairs, interactions.pairs, interactions.user_ids, interactions.item_ids, "")
    options = bpr(negatives=2000)
    sampled = [
        batch.negatives[at]
        for epoch in (1, 2)
        for batch in copies(split, options, epoch)
        for at in np.flatnonzero(batch.users == 0)
    ]
    counts = np.bincount(np.concatenate(sampled), minlength=9)
    assert counts.sum() == 2 * 3 * 2000
    assert counts[user_items].sum() == 0
    others = np.delete(counts, user_items)
    assert abs(others - 2000).max() < 6 * math.sqrt(2000)  # of six items each


def test_the_items_of_a_user_with_all_but_one():
    interactions = Interactions.from_ids([0] * 5 + [1], [0, 1, 3, 4, 5, 2])
    split = Split(interactions.pairs, interactions.pairs, interactions.user_ids, interactions.item_ids, "")
    for batch in copies(split, bpr(negatives=4)):
        assert (batch.negatives[batch.users == 0] == 2).all()


def test_a_user_with_every_item_is_left_out():
    interactions = Interactions.from_ids([0, 0, 0, 1], [0, 1, 2, 1])
    split = Split(interactions.pairs, interactions.pairs, interactions.user_ids, interactions.item_ids, "")
    (batch,) = copies(split, bpr())
    assert batch.users.tolist() == [1]
    assert BPRModel(split, bpr(dim=2)).interactions == 1
    everybody = Interactions.from_ids([0, 0, 1, 1], [0, 1, 0, 1])
    with pytest.raises(InteractionsError, match="nothing to train on"):
        train(Split(everybody.pairs, everybody.pairs, everybody.user_ids, everybody.item_ids, ""), bpr())


def test_epochs_and_seeds_differ_and_repeat():
    options = bpr(seed=1)
    (one,), (same,) = copies(SMALL, options), copies(SMALL, options)
    (other_epoch,), (other_seed,) = copies(SMALL, options, epoch=2), copies(SMALL, replace(options, seed=2))
    np.testing.assert_array_equal(one.items, same.items)
    for other in (other_epoch, other_seed):
        assert not np.array_equal(one.positives, other.positives)
        assert not np.array_equal(np.sort(one.negatives, axis=0), np.sort(other.negatives, axis=0))


def test_the_samples_do_not_depend_on_the_batch_size(monkeypatch):
    all_in_one = copies(SMALL, bpr(batch_size=10_000, negatives=2))
    monkeypatch.setattr(batches, "_CHUNK", 20)  # two batches are sampled at a time
    many = copies(SMALL, bpr(batch_size=9, negatives=2))
    np.testing.assert_array_equal(
        np.concatenate([batch.negatives for batch in many]), all_in_one[0].negatives
    )


# --- loss and gradients -----------------------------------------------------------------------------------


def loss_of(batch, user_table, item_table, reg):
    """The loss, written from its formula."""
    users, positives, negatives, _, weights = batch
    total = 0.0
    for user, positive, others, w in zip(users, positives, negatives, weights.astype(float), strict=True):
        for other in others:
            u, i, j = user_table[user], item_table[positive], item_table[other]
            total += w * np.logaddexp(0, -(u @ i - u @ j)) + reg / 2 * (u @ u + i @ i + j @ j)
    return total / negatives.size


def dense(gradient, shape):
    out = np.zeros(shape)
    np.add.at(out, gradient.rows, gradient.values.astype(np.float64))
    return out


@pytest.mark.parametrize("reg", [0.0, 0.3])
@pytest.mark.parametrize(("negatives", "batch_size", "dim"), [(1, 500, 3), (3, 40, 9)])
@pytest.mark.parametrize("split", [SMALL, WEIGHTED], ids=["without weights", "with weights"])
def test_gradients_are_those_of_the_loss(split, negatives, batch_size, dim, reg):
    model = BPRModel(split, bpr(dim=dim, negatives=negatives, batch_size=batch_size, reg=reg, init_std=1.0))
    batch = copies(split, model.options)[0]
    loss, *gradients = model._loss_and_gradients(batch)
    tables = [model.user_table.astype(np.float64), model.item_table.astype(np.float64)]
    assert loss == pytest.approx(loss_of(batch, *tables, reg), rel=1e-5)
    rng = np.random.default_rng(0)
    for which, gradient in enumerate(gradients):
        analytic = dense(gradient, tables[which].shape)
        assert np.abs(analytic).max() > 1e-3
        for row in rng.choice(len(tables[which]), 8, replace=False):
            for column in range(dim):
                numeric, step = 0.0, 1e-4
                for sign in (1, -1):
                    tables[which][row, column] += sign * step
                    numeric += sign * loss_of(batch, *tables, reg) / (2 * step)
                    tables[which][row, column] -= sign * step
                assert analytic[row, column] == pytest.approx(numeric, rel=1e-3, abs=2e-7)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_scores_far_apart_do_not_overflow(scale):
    model = BPRModel(SMALL, bpr(dim=1, reg=0.0))
    model.user_table[:] = 1
    model.item_table[:] = scale * np.arange(SMALL.train.n_items)[:, None]
    batch = copies(SMALL, model.options)[0]
    loss, user_gradient, item_gradient = model._loss_and_gradients(batch)
    differences = model.item_table[batch.positives, 0] - model.item_table[batch.negatives[:, 0], 0]
    assert loss == pytest.approx(np.maximum(-differences.astype(np.float64), 0).mean(), rel=1e-6)
    assert np.isfinite(user_gradient.values).all()
    assert np.isfinite(item_gradient.values).all()


def test_a_step_lowers_the_loss_of_its_batch():
    model = BPRModel(SMALL, bpr(dim=4, lr=0.05))
    batch = copies(SMALL, model.options)[0]
    losses = [model._train_batch(batch) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


# --- weights ----------------------------------------------------------------------------------------------


def test_the_weights_of_a_batch_are_its_interactions_by_their_mean(monkeypatch):
    monkeypatch.setattr(batches, "_CHUNK", 20)
    train = WEIGHTED.train
    expected = train.weights.astype(float) / train.weights.astype(float).mean()
    theirs = dict(zip(zip(train.users(), train.indices, strict=True), expected, strict=True))
    seen = 0
    for batch in epoch_batches(WEIGHTED, BPROptions(batch_size=9, negatives=2), 1):
        keys = zip(batch.users, batch.positives, strict=True)
        np.testing.assert_allclose(batch.weights, [theirs[key] for key in keys], rtol=1e-6)
        seen += len(batch.weights)
    assert seen == len(train)
    assert all((batch.weights == 1).all() for batch in epoch_batches(SMALL, BPROptions(batch_size=9), 1))


def test_the_mean_is_of_what_is_trained_on():
    interactions = Interactions.from_ids([0, 0, 0, 1, 2], [0, 1, 2, 1, 2], [1e6, 1e6, 1e6, 1, 3])
    split = Split(interactions.pairs, interactions.pairs, interactions.user_ids, interactions.item_ids, "")
    (batch,) = copies(split, bpr())  # which does not train on who has everything
    assert sorted(zip(batch.users, batch.weights, strict=True)) == [(1, 0.5), (2, 1.5)]


# --- training ---------------------------------------------------------------------------------------------


def result(split, **options):
    model = BPRModel(split, bpr(**options))
    model.fit()
    return model


def assert_same(one, other):
    assert one.user_table.tobytes() == other.user_table.tobytes()
    assert one.item_table.tobytes() == other.item_table.tobytes()
    assert [record.loss for record in one.history] == [record.loss for record in other.history]
    assert one.history[-1].quality == other.history[-1].quality


@pytest.mark.jit
@pytest.mark.parametrize("step_counts", ["element", "row", "global"])
def test_same_seed_same_bits_on_any_number_of_threads(step_counts):
    split = hold_out(generate(400, 150, 12.0))
    options = {"dim": 16, "epochs": 2, "batch_size": 512, "step_counts": step_counts, "seed": 4}
    one = result(split, threads=1, **options)
    for threads in [1, *range(2, numba.config.NUMBA_NUM_THREADS + 1), None]:
        assert_same(one, result(split, threads=threads, **options))
    other = result(split, **{**options, "seed": 5})
    assert not np.array_equal(one.user_table, other.user_table)


@pytest.mark.jit
def test_it_learns_what_was_planted():
    split = hold_out(generate(1500, 400, 25.0))
    model = result(split, dim=16, epochs=12, batch_size=256, lr=0.01)
    assert model.history[-1].loss < 0.6 * model.history[0].loss
    popularity = popularity_quality(split)
    assert popularity.recall > 0.02
    assert model.history[-1].quality.recall > 1.5 * popularity.recall


def test_history_and_callbacks():
    seen = []
    model = BPRModel(SMALL, bpr(dim=2, epochs=5, eval_every=2, batch_size=50))
    model.fit(lambda n, loss: seen.append((n, loss)), lambda record: seen.append(record))
    batches = -(-model.interactions // 50)
    assert len(seen) == 5 * (batches + 1)
    assert sum(n for n, _ in seen[:batches]) == model.interactions
    assert seen[batches] is model.history[0]
    triples = sum(n * loss for n, loss in seen[:batches])
    assert model.history[0].loss == pytest.approx(triples / model.interactions)
    assert [record.epoch for record in model.history] == [1, 2, 3, 4, 5]
    assert [record.quality is not None for record in model.history] == [False, True, False, True, True]
    assert model.history[-1].quality == model.evaluate()
    model.fit()
    assert len(model.history) == 5


def test_an_interrupted_training_goes_on_where_it_was():
    options = bpr(dim=2, epochs=4, eval_every=0)
    model, whole = BPRModel(SMALL, options), BPRModel(SMALL, options)

    def stop(record):
        if record.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(on_epoch=stop)
    assert [record.epoch for record in model.history] == [1, 2]
    model.fit()
    whole.fit()
    assert_same(model, whole)


def test_train_takes_interactions_or_a_split():
    interactions = generate(40, 30, 6.0, seed=1)
    options = bpr(dim=2, epochs=1, seed=1)
    assert_same(train(interactions, options), train(hold_out(interactions, 0.2, 1), options))


def test_divergence_is_an_error():
    with pytest.raises(NonFiniteGradientError):
        train(SMALL, bpr(dim=2, lr=1e30, epochs=3))


def test_a_user_without_training_items_keeps_the_initial_vector():
    pairs = UserItems.from_pairs(np.array([0, 0, 2]), np.array([0, 1, 2]), 3, 5)
    split = Split(pairs, pairs.select(np.zeros(3, bool)), np.arange(3), np.arange(5), "")
    model = BPRModel(split, bpr(dim=3, epochs=2, eval_every=0))
    before = model.user_table.copy()
    model.fit()
    np.testing.assert_array_equal(model.user_table[1], before[1])
    assert (model.user_table[[0, 2]] != before[[0, 2]]).all()


BAD_OPTIONS = {
    "dim": [0, -1, 1.5, "2", True],
    "epochs": [0, 2.0],
    "batch_size": [0],
    "lr": [0, -1, math.inf, math.nan, "x"],
    "reg": [-0.1, math.nan],
    "negatives": [0],
    "init_std": [0, math.inf],
    "seed": [-1, 2**31, 0.5],
    "top": [0],
    "eval_every": [-1],
    "step_counts": ["rows"],
    "eps_hat": [1],
    "betas": [(0.9, 1), (-0.1, 0.9), (0.9,), 0.9, (math.nan, 0)],
    "eps": [0, -1e-8],
    "threads": [0, 1.0],
    "loss": ["warp", "", None],
    "temperature": [0, -1.0, math.inf, math.nan, "1", 0.5],
    "popularity": [-0.5, math.inf, math.nan, None],
    "in_batch": [1, "yes", True],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, bad in BAD_OPTIONS.items() for value in bad]
)
def test_bad_options(name, value):
    with pytest.raises(OptionError, match=f"^{name}: expected .*, got "):
        BPROptions(**{"loss": "bpr", name: value})


def test_every_option_has_a_domain():
    assert BAD_OPTIONS.keys() == {option.name for option in fields(BPROptions)}


@pytest.mark.parametrize(
    ("given", "in_batch", "negatives", "reg"),
    [
        ({}, True, 63, 0.15),
        ({"negatives": 9}, True, 9, 0.15),
        ({"in_batch": False}, False, 20, 0.15),
        ({"popularity": 0.5}, False, 20, 0.15),
        ({"loss": "bpr"}, False, 5, 0.03),
        ({"loss": "bpr", "negatives": 2, "popularity": 1.0, "reg": 0}, False, 2, 0),
    ],
)
def test_what_is_not_given_suits_the_loss(given, in_batch, negatives, reg):
    options = BPROptions(**given)
    assert (options.in_batch, options.negatives, options.reg) == (in_batch, negatives, reg)
    assert BPROptions(**asdict(options)) == options
