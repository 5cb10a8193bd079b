# SPDX-License-Identifier: Apache-2.0
"""The recommender's losses against their formulas, and its ways to sample negatives."""

import math

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interaction_files import weighted
from needs import need

from nb_sparse_adam._src.recommender import sampling, softmax
from nb_sparse_adam._src.recommender.batches import Batches
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, UserItems, generate, hold_out
from nb_sparse_adam.errors import InteractionsError, NonFiniteGradientError, OptionError
from nb_sparse_adam.recommender import BPRModel, BPROptions, epoch_batches, train

SMALL = hold_out(generate(40, 30, 6.0, seed=1), seed=1)
WEIGHTED = weighted(SMALL)


def copies(split, options, epoch=1):
    return [type(batch)(*(array.copy() for array in batch)) for batch in epoch_batches(split, options, epoch)]


def split_of(users, items):
    interactions = Interactions.from_ids(users, items)
    return Split(interactions.pairs, interactions.pairs, interactions.user_ids, interactions.item_ids, "")


def dense(gradient, shape):
    out = np.zeros(shape)
    np.add.at(out, gradient.rows, gradient.values.astype(np.float64))
    return out


# --- the formulas, interaction by interaction ---------------------------------------------------------------


def sampled_loss(batch, user_table, item_table, popularity, options):
    """Sampled softmax, written from its formula."""
    weights = np.where(popularity > 0, popularity.astype(float), np.nan) ** options.popularity
    if options.popularity == 0:
        weights = np.ones(len(popularity))
    q = weights / np.nansum(weights)
    total = 0.0
    of_each = zip(batch.users, batch.positives, batch.negatives, batch.weights.astype(float), strict=True)
    for user, own, others, w in of_each:
        candidates = np.array([own, *others])
        z = item_table[candidates] @ user_table[user] / options.temperature - np.log(q[candidates])
        norms = user_table[user] @ user_table[user] + item_table[own] @ item_table[own]
        norms += np.mean([item_table[j] @ item_table[j] for j in others])
        total += w * (-z[0] + np.log(np.exp(z).sum())) + options.reg / 2 * norms
    return total / len(batch.users)


def in_batch_loss(batch, user_table, item_table, popularity, options):
    """The same with the items of the batch, in groups."""
    n = len(batch.users)
    groups = math.ceil(n / (options.negatives + 1))
    total = 0.0
    for group in range(groups):
        places = range(group * n // groups, (group + 1) * n // groups)
        for t in places:
            own, user = batch.positives[t], user_table[batch.users[t]]
            candidates = [own] + [batch.positives[s] for s in places if batch.positives[s] != own]
            z = item_table[candidates] @ user / options.temperature
            z -= np.log(popularity[candidates] / popularity.sum())
            norms = user @ user + item_table[own] @ item_table[own]
            w = float(batch.weights[t])
            total += w * (-z[0] + np.log(np.exp(z).sum())) + options.reg / 2 * norms
    return total / n


@pytest.mark.parametrize("reg", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize(
    ("formula", "options"),
    [
        (sampled_loss, {"negatives": 1, "batch_size": 500, "dim": 3, "in_batch": False}),
        (sampled_loss, {"negatives": 4, "batch_size": 40, "dim": 9, "popularity": 0.7}),
        (in_batch_loss, {"negatives": 500, "batch_size": 90, "dim": 3, "in_batch": True}),
        (in_batch_loss, {"negatives": 12, "batch_size": 61, "dim": 9, "in_batch": True}),
        (in_batch_loss, {"negatives": 69, "batch_size": 500, "dim": 16, "in_batch": True}),
    ],
)
@pytest.mark.parametrize("split", [SMALL, WEIGHTED], ids=["without weights", "with weights"])
def test_gradients_are_those_of_the_loss(split, formula, options, temperature, reg):
    model = BPRModel(
        split, BPROptions(loss="softmax", temperature=temperature, reg=reg, init_std=0.7, **options)
    )
    batch = copies(split, model.options)[0]
    loss, *gradients = model._loss_and_gradients(batch)
    tables = [model.user_table.astype(np.float64), model.item_table.astype(np.float64)]
    popularity = np.bincount(SMALL.train.indices, minlength=SMALL.train.n_items)

    def expected():
        return formula(batch, *tables, popularity, model.options)

    assert loss == pytest.approx(expected(), rel=1e-5)
    rng = np.random.default_rng(0)
    for table, gradient in zip(tables, gradients, strict=True):
        analytic = dense(gradient, table.shape)
        assert np.abs(analytic).max() > 1e-3
        for row in rng.choice(len(table), 6, replace=False):
            for column in rng.choice(table.shape[1], 3, replace=False):
                numeric, step = 0.0, 1e-4
                for sign in (1, -1):
                    table[row, column] += sign * step
                    numeric += sign * expected() / (2 * step)
                    table[row, column] -= sign * step
                assert analytic[row, column] == pytest.approx(numeric, rel=1e-3, abs=1e-6)


@pytest.mark.jit
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize(
    "weighting", [lambda split: split, weighted], ids=["without weights", "with weights"]
)
def test_gradients_are_torchs(in_batch, weighting):
    torch = need("torch")
    split = weighting(hold_out(generate(300, 200, 15.0)))
    options = BPROptions(
        dim=20, batch_size=200, negatives=199, loss="softmax", in_batch=in_batch, temperature=0.5, reg=0.0
    )
    model = BPRModel(split, options)
    batch = copies(split, options)[0]
    loss, *gradients = model._loss_and_gradients(batch)
    user, item = (
        torch.tensor(table, dtype=torch.float64, requires_grad=True)
        for table in (model.user_table, model.item_table)
    )
    users, positives = torch.tensor(batch.users).long(), torch.tensor(batch.positives).long()
    if in_batch:
        popularity = torch.tensor(np.bincount(split.train.indices, minlength=split.train.n_items)).double()
        scores = user[users] @ item[positives].T / options.temperature - popularity[positives].log()
        again = (positives[:, None] == positives) & ~torch.eye(len(users), dtype=torch.bool)
        scores, wanted = scores.masked_fill(again, -torch.inf), torch.arange(len(users))
    else:
        candidates = torch.cat([positives[:, None], torch.tensor(batch.negatives).long()], 1)
        scores = (user[users][:, None] * item[candidates]).sum(2) / options.temperature
        wanted = torch.zeros(len(users), dtype=torch.int64)
    of_each = torch.nn.functional.cross_entropy(scores, wanted, reduction="none")
    theirs = (of_each * torch.tensor(batch.weights)).mean()
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-6)
    for table, gradient in zip((user, item), gradients, strict=True):
        np.testing.assert_allclose(dense(gradient, table.shape), table.grad.numpy(), rtol=1e-4, atol=1e-8)


@numba.njit  # what compiled code alone calls is called by compiled code
def exponentials(x, out):
    for i in range(len(x)):
        out[i] = softmax.exp_of_negative(x[i])


@given(st.lists(st.floats(-300, 0, width=32), min_size=1, max_size=40))
@settings(deadline=None)
def test_the_exponential(numbers):
    x = np.array([*numbers, 0.0, -0.0, -87.0, -1e30, -np.inf], np.float32)
    got = np.empty_like(x)
    exponentials(x, got)
    expected = np.exp(np.maximum(x.astype(np.float64), -87))
    np.testing.assert_allclose(got, expected, rtol=2.5e-7)
    x[::2] = np.nan
    exponentials(x, got)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))


# --- in training ------------------------------------------------------------------------------------------

LOSSES = [
    {"loss": "bpr", "negatives": 1, "popularity": 0.75},
    {"loss": "softmax", "negatives": 7, "popularity": 0.5},
    {"loss": "softmax", "negatives": 100, "in_batch": True, "temperature": 0.5},
    {"loss": "softmax", "negatives": 1000, "in_batch": True},
]


@pytest.mark.jit
@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize(
    "weighting", [lambda split: split, weighted], ids=["without weights", "with weights"]
)
def test_same_seed_same_bits_on_any_number_of_threads(options, weighting):
    split = weighting(hold_out(generate(400, 150, 12.0)))
    options = {"dim": 16, "epochs": 2, "batch_size": 512, "lr": 0.005, "reg": 0.01, "seed": 4, **options}

    def trained(threads):
        return train(split, BPROptions(threads=threads, **options))

    one = trained(1)
    assert one.history[1].loss < one.history[0].loss
    for threads in [1, *range(2, numba.config.NUMBA_NUM_THREADS + 1), None]:
        other = trained(threads)
        assert one.user_table.tobytes() == other.user_table.tobytes()
        assert one.item_table.tobytes() == other.item_table.tobytes()
        assert [record.loss for record in one.history] == [record.loss for record in other.history]


@pytest.mark.jit
@pytest.mark.parametrize("options", [{}, *LOSSES])
@pytest.mark.parametrize("weight", [1.0, 0.1, 3.0, 1e-30])
def test_weights_that_are_all_the_same_are_no_difference(options, weight):
    """To a bit: they are divided by their mean."""
    options = BPROptions(dim=8, epochs=2, batch_size=50, **options)
    one, other = train(SMALL, options), train(weighted(SMALL, weight), options)
    assert one.user_table.tobytes() == other.user_table.tobytes()
    assert one.item_table.tobytes() == other.item_table.tobytes()
    assert one.history[-1].loss == other.history[-1].loss
    assert one.user_table.tobytes() != train(WEIGHTED, options).user_table.tobytes()


@pytest.mark.jit
@pytest.mark.parametrize("options", [{}, *LOSSES])
def test_what_weighs_more_is_learned_first(options):
    rng = np.random.default_rng(0)
    heavy = rng.random(len(SMALL.train)) < 0.3
    options = BPROptions(dim=4, epochs=8, batch_size=50, lr=0.02, reg=0.0, **options)
    scores = []
    for split in (SMALL, weighted(SMALL, np.where(heavy, 30, 1))):
        model = train(split, options)
        users, items = split.train.users(), split.train.indices
        score = (model.user_table[users] * model.item_table[items]).sum(1)
        scores.append(score[heavy].mean() - score[~heavy].mean())
    assert scores[1] > scores[0] + 0.1


def test_negatives_are_sampled_by_the_number_of_interactions_whatever_they_weigh():
    options = BPROptions(popularity=1.0, negatives=5)
    for one, other in zip(copies(SMALL, options), copies(WEIGHTED, options), strict=True):
        np.testing.assert_array_equal(one.items, other.items)


@pytest.mark.jit
@pytest.mark.parametrize("options", LOSSES)
def test_a_step_lowers_the_loss_of_its_batch(options):
    model = BPRModel(SMALL, BPROptions(dim=4, lr=0.05, reg=0.0, **options))
    batch = copies(SMALL, model.options)[0]
    losses = [model._train_batch(batch) for _ in range(30)]
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize("options", LOSSES)
def test_divergence_is_an_error(options):
    with pytest.raises(NonFiniteGradientError):
        train(SMALL, BPROptions(dim=2, lr=1e30, epochs=4, **options))


@pytest.mark.parametrize("options", LOSSES[1:])
def test_scores_far_apart_do_not_overflow(options):
    model = BPRModel(SMALL, BPROptions(dim=1, reg=0.0, **options))
    model.user_table[:] = 1
    model.item_table[:] = 1e4 * np.arange(SMALL.train.n_items)[:, None]
    loss, *gradients = model._loss_and_gradients(copies(SMALL, model.options)[0])
    assert 1e3 < loss < 1e6
    assert all(np.isfinite(gradient.values).all() for gradient in gradients)


def test_a_batch_of_one_has_nothing_to_be_compared_with():
    model = BPRModel(
        SMALL, BPROptions(dim=3, batch_size=1, loss="softmax", in_batch=True, negatives=9, reg=0.0)
    )
    loss, *gradients = model._loss_and_gradients(copies(SMALL, model.options)[0])
    assert loss == 0
    assert not any(gradient.values.any() for gradient in gradients)


# --- samples by popularity --------------------------------------------------------------------------------


def test_with_more_popularity_the_rest_of_an_epoch_stays_the_same():
    uniform, popular = (
        copies(SMALL, BPROptions(loss="bpr", popularity=power, negatives=2))[0] for power in (0.0, 1.0)
    )
    np.testing.assert_array_equal(uniform.users, popular.users)
    np.testing.assert_array_equal(uniform.positives, popular.positives)
    assert not np.array_equal(uniform.negatives, popular.negatives)


@pytest.mark.jit
@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_samples_are_by_popularity_among_what_the_user_does_not_have(power):
    rng = np.random.default_rng(0)
    users = [0, 0, 0, *rng.integers(1, 60, 900)]
    items = [1, 4, 11, *np.minimum(rng.geometric(0.2, 900), 12) - 1]
    split = split_of(users, items)
    popularity = np.bincount(split.train.indices, minlength=split.train.n_items)
    sampled = [
        batch.negatives[at]
        for batch in copies(split, BPROptions(loss="bpr", negatives=20_000, popularity=power, batch_size=64))
        for at in np.flatnonzero(batch.users == 0)
    ]
    counts = np.bincount(np.concatenate(sampled), minlength=split.train.n_items)
    own = split.train.indices[: split.train.indptr[1]]
    assert len(own) == 3
    assert not counts[own].any()
    weights = popularity.astype(float) ** power
    weights[own] = 0
    expected = 60_000 * weights / weights.sum()
    others = expected > 0
    chi_square = ((counts - expected)[others] ** 2 / expected[others]).sum()
    assert chi_square < 33  # of 8 degrees of freedom: once in 16,000 seeds


@numba.njit
def item_at(masses, n_own, rank):
    return sampling.absent_by_mass(masses, 0, n_own, rank)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_every_rank_finds_its_item(data):
    """Walk over the line of masses item by item."""
    n_items = data.draw(st.integers(1, 40))
    popularity = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n_items, max_size=n_items)))
    popularity[data.draw(st.integers(0, n_items - 1))] += 1
    known = np.flatnonzero(popularity)
    own = np.sort(data.draw(st.lists(st.sampled_from(known.tolist()), unique=True)))
    source = sampling.Source(
        np.zeros(len(own), np.int32), np.array([0, len(own)]), np.array(own, np.int32), n_items
    )
    masses = sampling.masses_of(popularity, data.draw(st.sampled_from([0.3, 1.0, 40.0])), source)
    mass = np.diff(masses.ends, prepend=0)
    assert ((mass > 0) == (popularity > 0)).all()
    assert masses.ends[-1] < 2**52
    begin = 0
    for item in range(n_items):
        if item in own or mass[item] == 0:
            continue
        end = begin + mass[item]
        for rank in {begin, begin + mass[item] // 2, end - 1}:
            assert item_at(masses, len(own), rank) == item
        begin = end


def test_items_that_nobody_has_are_not_sampled_by_popularity():
    pairs = UserItems.from_pairs(np.array([0, 0, 1]), np.array([0, 2, 4]), 2, 6)
    split = Split(pairs, pairs.select(np.zeros(3, bool)), np.arange(2), np.arange(6), "")
    for batch in copies(split, BPROptions(loss="bpr", negatives=50, popularity=0.1)):
        assert set(batch.negatives[batch.users == 0].ravel()) == {4}
        assert set(batch.negatives[batch.users == 1].ravel()) == {0, 2}


def test_who_is_trained_on_depends_on_what_can_be_sampled():
    pairs = UserItems.from_pairs(np.array([0, 0, 1]), np.array([0, 2, 2]), 2, 6)  # user 0 has all that is had
    split = Split(pairs, pairs.select(np.zeros(3, bool)), np.arange(2), np.arange(6), "")
    assert len(Batches(split, BPROptions(loss="bpr")).interactions) == 3
    assert Batches(split, BPROptions(loss="bpr", popularity=1.0)).interactions.tolist() == [2]
    assert len(Batches(split, BPROptions(loss="softmax", in_batch=True)).interactions) == 3
    everything = split_of([0, 0], [0, 1])
    with pytest.raises(InteractionsError, match="nothing to train on"):
        BPRModel(everything, BPROptions(loss="bpr", popularity=1.0))


# --- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": "bpr", "temperature": 0.5},
            r"^temperature: expected 1\.0 with loss='bpr'.* got 0\.5; .*softmax",
        ),
        ({"loss": "bpr", "in_batch": True}, "^in_batch: expected False with loss='bpr', got True; .*softmax"),
        ({"loss": "softmax", "in_batch": True, "popularity": 0.5}, "^popularity: expected 0.0 with in_batch"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        BPROptions(**options)
