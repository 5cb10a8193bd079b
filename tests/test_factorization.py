# SPDX-License-Identifier: Apache-2.0
"""`MatrixFactorization`: trained, asked, gone on with, saved; held to slow and obvious counterparts."""

import math
import pickle
import types
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from needs import need

from nb_sparse_adam import checkpoint
from nb_sparse_adam._src.recommender import topk
from nb_sparse_adam._src.recommender.given import Columns, given, validation_split
from nb_sparse_adam.errors import (
    CheckpointError,
    InteractionsError,
    NotFittedError,
    OptionError,
    UnknownIdError,
)
from nb_sparse_adam.recommender import BPRModel, BPROptions, MatrixFactorization, generate, hold_out

SMALL = {"dim": 8, "epochs": 3, "batch_size": 128}


@pytest.fixture(scope="module")
def interactions():
    return generate(120, 60, 9.0)


@pytest.fixture(scope="module")
def trained(interactions):
    return MatrixFactorization(**SMALL).fit(interactions)


def bits(model):
    state = [model.optimizer_.state[name] for name in ("user", "item")]
    arrays = [model.user_factors_, model.item_factors_]
    arrays += [array for one in state for array in (one.exp_avg, one.exp_avg_sq, one.steps)]
    return [np.asarray(array).tobytes() for array in arrays]


def slow_best(scores, seen, k, candidates):
    """Places sorted by score, the lower first among equals."""
    left = [i for i in candidates if i not in seen]
    left.sort(key=lambda i: (-scores[i], i))
    return left[:k]


# --- training ---------------------------------------------------------------------------------------------


def test_it_is_trained_as_the_model_beneath_it(interactions, trained):
    split = hold_out(interactions, 1e-9)
    below = BPRModel(split, BPROptions(**SMALL))
    below.fit()
    assert below.user_table.tobytes() == trained.user_factors_.tobytes()
    assert below.item_table.tobytes() == trained.item_factors_.tobytes()
    assert trained.n_epochs_ == len(trained.history_) == 3
    assert [one.quality for one in trained.history_] == [None] * 3


def test_parameters_are_as_scikit_learn_has_them():
    model = MatrixFactorization(16, lr=0.1)
    assert model.get_params()["dim"] == 16
    assert model.set_params(lr=0.2, reg=0.0) is model
    assert (model.lr, model.reg) == (0.2, 0.0)
    assert repr(model) == "MatrixFactorization(dim=16, lr=0.2, reg=0.0)"
    params = model.get_params()
    assert MatrixFactorization(**params).get_params() == params
    with pytest.raises(OptionError, match="no parameter 'learning_rate'"):
        model.set_params(learning_rate=1.0)
    assert set(params) - {"threads"} <= set(BPROptions.__dataclass_fields__)
    assert MatrixFactorization()._options(BPROptions().epochs) == BPROptions()
    defaults = {one.name: one.default for one in fields(BPROptions)}
    assert all(value == defaults[n] for n, value in MatrixFactorization().get_params().items())


def test_scikit_learn_can_clone_it(trained):
    """`sklearn.base.clone` makes one of the parameters, and wants back the very objects that it gave."""
    params = trained.get_params(deep=False)
    cloned = type(trained)(**params)
    assert all(cloned.get_params(deep=False)[name] is value for name, value in params.items())
    assert not hasattr(cloned, "optimizer_")


@pytest.mark.parametrize("what", "recommend similar_items similar_users fold_in evaluate save".split())
def test_what_is_not_trained_says_so(what):
    model = MatrixFactorization()
    with pytest.raises(NotFittedError, match=f"{what}: this MatrixFactorization is not trained; call fit"):
        getattr(model, what)([1])
    assert not hasattr(model, "user_factors_")
    assert issubclass(NotFittedError, ValueError | AttributeError)


def test_parameters_are_checked_before_anything_changes(interactions, trained):
    model = pickle.loads(pickle.dumps(trained))
    before = bits(model)
    with pytest.raises(OptionError, match="lr: expected"):
        model.set_params(lr=-1.0).fit(interactions)
    with pytest.raises(OptionError, match="patience: needs validation"):
        model.set_params(lr=0.1).fit(interactions, patience=1)
    with pytest.raises(OptionError, match="validation: got 'last'"):
        model.fit(interactions, validation="last")
    with pytest.raises(OptionError, match="dim: got 4, but the vectors have 8"):
        model.set_params(dim=4).partial_fit(interactions)
    assert bits(model) == before


def test_early_stopping_goes_back_to_the_best_epoch(interactions):
    params = {**SMALL, "epochs": 60, "lr": 0.1}
    model = MatrixFactorization(**params).fit(interactions, validation=0.2, patience=2)
    recalls = [one.quality.recall for one in model.history_]
    best = int(np.argmax(recalls)) + 1
    assert model.n_epochs_ == best == len(recalls) - 2 < 58
    again = MatrixFactorization(**{**params, "epochs": best}).fit(interactions, validation=0.2)
    assert bits(again) == bits(model)


def test_validation_is_held_out_by_time():
    rng = np.random.default_rng(0)
    users, items = rng.integers(20, size=400), rng.integers(30, size=400)
    times = rng.permutation(400)
    data = given((users, items, times), needs_times=True)
    latest = {}
    for user, item, when in zip(users, items, times, strict=True):
        latest[user, item] = max(when, latest.get((user, item), -1))
    split = validation_split(data, "latest", 0)
    for u, user in enumerate(data.interactions.user_ids):
        had = sorted((when, item) for (who, item), when in latest.items() if who == user)
        n = max(1, math.floor(0.1 * len(had) + 0.5))
        held = data.interactions.item_ids[split.test.indices[slice(*split.test.indptr[u : u + 2])]]
        assert sorted(held) == sorted(item for _, item in had[-n:])
    assert len(split.train) + len(split.test) == len(latest)


# --- what interactions may be -----------------------------------------------------------------------------


def frames():
    polars = need("polars")
    data = {"item_id": [5, 7, 5, 9], "user_id": [1, 1, 2, 3], "timestamp": [4, 3, 2, 1]}
    yield polars.DataFrame(data)
    yield PandasLike(data)
    yield ArrowStream(polars.DataFrame(data))


class PandasLike:
    """What pandas' frames have of themselves: Arrow's interface needs pyarrow beside them."""

    def __init__(self, data):
        self.columns = list(data)
        self._data = data

    def __getitem__(self, name):
        return types.SimpleNamespace(to_numpy=lambda: np.array(self._data[name]))


class ArrowStream:
    """What has nothing but Arrow's PyCapsule interface."""

    def __init__(self, frame):
        self._frame = frame

    def __arrow_c_stream__(self, requested_schema=None):
        return self._frame.__arrow_c_stream__(requested_schema)


def test_frames_are_read_by_the_names_of_columns():
    for frame in frames():
        data = given(frame, needs_times=True)
        assert data.interactions.user_ids.tolist() == [1, 2, 3]
        assert data.interactions.item_ids.tolist() == [5, 7, 9]
        assert data.interactions.pairs.indices.tolist() == [0, 1, 0, 2]
        assert data.times.tolist() == [4, 3, 2, 1]
        swapped = given(frame, Columns("item_id", "user_id"))
        assert swapped.interactions.user_ids.tolist() == [5, 7, 9]
        with pytest.raises(InteractionsError, match="no column 'buyer'; the frame has"):
            given(frame, Columns("buyer", "item_id"))


def test_a_matrix_has_its_rows_and_columns_as_ids():
    sparse = need("scipy.sparse")
    dense = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32)
    for make in (sparse.csr_array, sparse.csc_matrix, sparse.coo_array):
        data = given(make(dense))
        assert data.interactions.user_ids.tolist() == [0, 1, 2]
        assert data.interactions.pairs.indptr.tolist() == [0, 2, 2, 3]
        assert data.interactions.pairs.indices.tolist() == [0, 2, 1]
        assert data.interactions.pairs.weights is None
    data = given(sparse.csr_array(dense.astype(bool)))
    assert data.interactions.pairs.weights is None


def test_what_a_matrix_holds_are_weights():
    sparse = need("scipy.sparse")
    dense = np.array([[2.5, 0, 1], [0, 0, 0], [0, 7, 0]])
    for dtype, expected in ((np.float64, [2.5, 1, 7]), (np.float32, [2.5, 1, 7]), (np.uint8, [2, 1, 7])):
        matrix = sparse.csr_array(dense.astype(dtype))
        assert given(matrix).interactions.pairs.weights.tolist() == expected
        matrix.data[1] = 0  # is stored, and no interaction
        pairs = given(matrix).interactions.pairs
        assert pairs.weights.tolist() == [expected[0], 7]
        assert pairs.indices.tolist() == [0, 1]
    again = sparse.csr_array((np.ones(3), [0, 0, 2], [0, 2, 3]), shape=(2, 3))  # (0, 0) is there twice
    assert given(again).interactions.pairs.weights.tolist() == [2, 1]
    for bad in (-1.0, np.nan, np.inf, 1e-60):
        matrix = sparse.csr_array(dense)
        matrix.data[2] = bad
        message = "holds .* for user 2 and item 1; .* greater than 0 .*; give"
        with pytest.raises(InteractionsError, match=message):
            given(matrix)
    with pytest.raises(InteractionsError, match=r"holds \(?2"):
        given(sparse.csr_array(dense.astype(complex)))


def test_weights_come_with_columns_and_arrays(interactions):
    for frame in frames():
        with pytest.raises(OptionError, match=r"sample_weight: .*weight_column="):
            given(frame, sample_weight=[1, 2, 3, 4])
        data = given(frame, Columns(weight="timestamp"))
        assert data.interactions.pairs.weights.tolist() == [4, 3, 2, 1]
        assert "weights in 'timestamp'" in data.interactions.description
        with pytest.raises(InteractionsError, match="no column 'plays'"):
            given(frame, Columns(weight="plays"))
    arrays = ([1, 1, 2, 3], [5, 7, 5, 9])
    assert given(arrays).interactions.pairs.weights is None
    assert given(arrays, sample_weight=[4, 3, 2, 1]).interactions.pairs.weights.tolist() == [4, 3, 2, 1]
    timed = given((*arrays, [9, 8, 7, 6]), needs_times=True, sample_weight=[4, 3, 2, 1])
    assert timed.interactions.pairs.weights.tolist() == [4, 3, 2, 1]
    assert timed.times.tolist() == [9, 8, 7, 6]
    for wrong, message in (
        ([1, 2, 0, 1], r"^sample_weight\[2\] is 0: .* leave"),
        ([1], "^sample_weight: got"),
    ):
        with pytest.raises(InteractionsError, match=message):
            given(arrays, sample_weight=wrong)
    matrix = need("scipy.sparse").csr_array(np.eye(3))
    for data, message in (
        (matrix, "what a matrix holds are the weights"),
        (interactions, "give them to Interactions.from_ids"),
        (3, "leave it out"),
    ):
        with pytest.raises(OptionError, match=f"^sample_weight: .*; {message}"):
            given(data, sample_weight=[1])
    with pytest.raises(OptionError, match="weight_column: got"):
        given(arrays, Columns(weight="plays"))
    polars = need("polars")
    frame = polars.DataFrame({"user": [1, 2], "item": [3, 4], "plays": [1, None]})
    with pytest.raises(InteractionsError, match=r"^weight_column='plays'\[1\] is nan"):
        given(frame, Columns(weight="plays"))


def test_what_is_not_understood_is_refused_by_name(interactions):
    for wrong, message in (
        (5, "got int, expected"),
        (hold_out(interactions), "got a Split"),
        (([1], [2], [np.nan]), "finite numbers"),
        (([1], [2], [1, 2]), "got shape"),
    ):
        with pytest.raises(InteractionsError, match=message):
            given(wrong)
    with pytest.raises(OptionError, match="has no columns with names"):
        given(([1], [2]), Columns("user"))
    with pytest.raises(InteractionsError, match="have no times"):
        MatrixFactorization(**SMALL).fit(([1, 1], [2, 3]), validation="latest")


# --- recommendations --------------------------------------------------------------------------------------


def seen_of(interactions, u):
    pairs = interactions.pairs
    return set(pairs.indices[pairs.indptr[u] : pairs.indptr[u + 1]].tolist())


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("k", [1, 7, 200])
def test_recommendations_are_the_best_scores(interactions, trained, k, exclude_seen):
    users = [3, 5, 3, 119]
    ids, scores = trained.recommend(users, k=k, exclude_seen=exclude_seen)
    assert ids.shape == scores.shape == (4, k)
    for row, user in enumerate(users):
        every = trained.item_factors_ @ trained.user_factors_[user]
        seen = seen_of(interactions, user) if exclude_seen else set()
        best = slow_best(every, seen, k, range(len(every)))
        got = np.searchsorted(trained.item_ids_, ids[row, : len(best)])
        np.testing.assert_allclose(every[got], every[best], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(scores[row, : len(best)], every[best], rtol=1e-5, atol=1e-7)
        assert len(set(got.tolist()) - seen) == len(best)
        assert (ids[row, len(best) :] == -1).all()
        assert np.isneginf(scores[row, len(best) :]).all()


def test_where_items_run_out_there_is_padding(trained):
    ids, scores = trained.recommend(0, k=3, items=trained.item_ids_[:2], exclude_seen=False)
    assert ids.shape == (3,)
    assert ids[2] == -1
    assert np.isneginf(scores[2])
    assert np.isfinite(scores[:2]).all()
    assert set(ids[:2]) == set(trained.item_ids_[:2])


def test_recommendations_come_as_a_frame(trained):
    need("polars")
    ids, scores = trained.recommend([3, 5], k=4)
    frame = trained.recommend([3, 5], k=4, frame=True)
    assert frame.columns == ["user", "place", "item", "score"]
    assert frame["user"].to_list() == [3] * 4 + [5] * 4
    assert frame["place"].to_list() == [1, 2, 3, 4] * 2
    assert frame["item"].to_list() == ids.ravel().tolist()
    assert frame["score"].to_list() == scores.ravel().tolist()
    few = trained.recommend(3, k=4, items=trained.item_ids_[:2], exclude_seen=False, frame=True)
    assert len(few) == 2
    assert trained.recommend(vectors=trained.user_factors_[:2], k=1, frame=True)["vector"].to_list() == [0, 1]


def test_ids_of_strings_are_padded_with_none():
    model = MatrixFactorization(**SMALL).fit((["ä", "b", "b"], ["x", "x", "y"]))
    ids, _ = model.recommend(["b", "ä"], k=2)
    assert ids.tolist() == [[None, None], ["y", None]]
    with pytest.raises(InteractionsError, match="expected a 1-D array of strings"):
        model.recommend([1])


def test_an_unknown_user_is_a_key_error_that_names_fold_in(trained):
    with pytest.raises(KeyError, match=r"user_ids\[1\] is 12345, and 1 more: .* fold_in") as caught:
        trained.recommend([0, 12345, 777])
    assert isinstance(caught.value, UnknownIdError)
    assert not str(caught.value).startswith(("'", '"'))
    with pytest.raises(KeyError, match=r"items\[0\] is -4"):
        trained.recommend([0], items=[-4])
    with pytest.raises(OptionError, match="k: got 0"):
        trained.recommend([0], k=0)
    with pytest.raises(OptionError, match="either user_ids or vectors"):
        trained.recommend()


def test_the_same_users_in_blocks_and_on_any_number_of_threads(trained, monkeypatch):
    every = trained.recommend(np.arange(120), k=5)
    monkeypatch.setattr(topk, "BLOCK_BYTES", 4 * 60 * 7)
    some = trained.recommend(np.arange(120), k=5)
    assert every[0].tolist() == some[0].tolist()
    np.testing.assert_allclose(every[1], some[1], rtol=1e-5)


@settings(max_examples=30, deadline=None)
@drawn(st.data())
def test_the_best_of_rows_are_those_of_sorting(data):
    n, items, top = (data.draw(st.integers(1, most)) for most in (20, 30, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    scores = rng.integers(5, size=(n, items)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = np.nan
    owners = rng.integers(-1, 3, size=n)
    taken = [np.flatnonzero(rng.random(items) < 0.3) for _ in range(3)]
    indptr = np.concatenate([[0], np.cumsum([len(one) for one in taken])])
    indices = np.concatenate(taken).astype(np.int32)
    threads = data.draw(st.integers(1, 3))
    best, best_scores = topk.rank_rows(scores.copy(), owners, indptr, indices, top, threads)
    for row in range(n):
        left = set(taken[owners[row]].tolist()) if owners[row] >= 0 else set()
        known = [i for i in range(items) if not np.isnan(scores[row, i])]
        expected = slow_best(scores[row], left, top, known)
        assert best[row].tolist() == expected + [-1] * (top - len(expected))
        assert best_scores[row, : len(expected)].tolist() == scores[row, expected].tolist()


def test_neighbours_are_by_cosine_without_itself(trained):
    for ask, factors, ids in (
        (trained.similar_items, trained.item_factors_, trained.item_ids_),
        (trained.similar_users, trained.user_factors_, trained.user_ids_),
    ):
        found, cosines = ask(ids[[4, 9]], k=6)
        unit = factors / np.linalg.norm(factors, axis=1, keepdims=True)
        for row, at in enumerate((4, 9)):
            near = unit @ unit[at]
            near[at] = -np.inf
            order = np.argsort(-near, kind="stable")[:6]
            np.testing.assert_allclose(cosines[row], near[order], rtol=1e-4, atol=1e-6)
            assert ids[at] not in found[row]
        assert ask(ids[4], k=6)[0].tolist() == found[0].tolist()


@pytest.mark.parametrize("options", [{"loss": "bpr"}, {"temperature": 0.5}])
def test_someone_new_gets_the_vector_of_least_loss(interactions, options):
    model = MatrixFactorization(**SMALL, **options).fit(interactions)
    items = model.item_ids_[[1, 4, 8]]
    x = model.fold_in([*items, items[0]])
    assert x.dtype == np.float32
    assert x.tobytes() == model.fold_in(items[::-1]).tobytes()
    vectors, reg = model.item_factors_.astype(np.float64), BPROptions(loss=model.loss).reg
    had, others = vectors[[1, 4, 8]], np.delete(vectors, [1, 4, 8], 0)

    def loss(at):
        if model.loss == "softmax":
            z, rest = had @ at / 0.5, np.exp(others @ at / 0.5).sum()
            first = np.mean(np.log(np.exp(z) + rest) - z)
        else:
            first = np.mean([np.log1p(np.exp(-(v - other) @ at)) for v in had for other in others])
        return first + 0.5 * reg * at @ at

    rng = np.random.default_rng(0)
    least = loss(x.astype(np.float64))
    assert all(least <= loss(x + rng.normal(size=8) * 10.0**-e) + 1e-9 for e in range(4) for _ in range(50))
    ids, _ = model.recommend(vectors=x, k=5, exclude=items)
    assert not set(ids) & set(items)
    with pytest.raises(InteractionsError, match="got 0 different items"):
        model.fold_in([])
    with pytest.raises(UnknownIdError, match="partial_fit"):
        model.fold_in([10**9])
    with pytest.raises(OptionError, match="vectors: got shape"):
        model.recommend(vectors=np.zeros(3))


def test_of_many_items_a_sample_says_nearly_the_same(monkeypatch):
    from nb_sparse_adam._src.recommender import folding

    rng = np.random.default_rng(0)
    items, had = rng.normal(size=(5000, 4)).astype(np.float32), np.array([3, 17, 99])
    for options in (BPROptions(reg=0.1, loss="bpr"), BPROptions(reg=0.1, loss="softmax")):
        sampled = folding.fold_in(items, had, options, np.random.default_rng(1))
        with monkeypatch.context() as patch:
            for limit in ("_PAIRS", "_MOST", "_OTHERS"):
                patch.setattr(folding, limit, 10**6)
            whole = folding.fold_in(items, had, options, np.random.default_rng(1))
            patch.setattr(folding, "_OTHERS", 2000)
            part = folding.fold_in(items, had, options, np.random.default_rng(1))
        for one in (sampled, part):
            assert np.linalg.norm(one - whole) < 0.1 * np.linalg.norm(whole)


def test_quality_is_that_of_slow_rankings(interactions):
    split = hold_out(interactions, 0.3, seed=4)
    ids = split.user_ids, split.item_ids
    train, test = ((ids[0][one.users()], ids[1][one.indices]) for one in (split.train, split.test))
    model = MatrixFactorization(**SMALL).fit(train)
    k, found, shown = 5, {"recall": [], "ndcg": [], "map": []}, set()
    for user in np.unique(test[0]):
        if user not in model.user_ids_:
            continue
        wanted = set(test[1][test[0] == user]) & set(model.item_ids_)
        if not wanted:
            continue
        best = model.recommend(user, k=k)[0].tolist()
        shown |= set(best) - {-1}
        hits = [item in wanted for item in best]
        found["recall"].append(sum(hits) / len(wanted))
        ideal = sum(1 / math.log2(r + 2) for r in range(min(k, len(wanted))))
        found["ndcg"].append(sum(h / math.log2(r + 2) for r, h in enumerate(hits)) / ideal)
        precise = sum(h * sum(hits[: r + 1]) / (r + 1) for r, h in enumerate(hits))
        found["map"].append(precise / min(k, len(wanted)))
    got = model.evaluate((*test,), k=k)
    assert got == pytest.approx(
        {f"{name}@5": np.mean(values) for name, values in found.items()}
        | {"coverage@5": len(shown) / len(model.item_ids_), "users": len(found["map"])}
    )
    assert math.isnan(model.evaluate(train)["recall@20"])  # all of it was trained on
    assert model.evaluate(([10**6], [10**6]))["users"] == 0


# --- going on ---------------------------------------------------------------------------------------------


def test_more_interactions_bring_rows_and_the_others_stay(interactions, trained):
    model = pickle.loads(pickle.dumps(trained))
    before = np.array(model.optimizer_.state["user"].steps)
    new = [0, 500, 500, 3], [0, 0, 900, 901]
    model.partial_fit(new, epochs=2)
    assert model.user_ids_.tolist() == [*trained.user_ids_, 500]
    assert model.item_ids_.tolist() == [*trained.item_ids_, 900, 901]
    assert model.n_epochs_ == 5
    assert [one.epoch for one in model.history_] == [1, 2, 3, 4, 5]
    after = np.array(model.optimizer_.state["user"].steps)
    assert len(after) == 121
    assert (after[:120] >= before).all()
    assert after[:120].sum() > before.sum()
    ids, _ = model.recommend([500], k=70)
    assert not {0, 900} & set(ids[0])
    assert 901 in ids[0]


def test_going_on_is_training_that_never_stopped(interactions, trained):
    """With nothing new, epochs 4 and 5 are those of a longer training."""
    model = pickle.loads(pickle.dumps(trained)).partial_fit(interactions, epochs=2)
    whole = MatrixFactorization(**{**SMALL, "epochs": 5}).fit(interactions)
    assert bits(model) == bits(whole)


def test_partial_fit_of_what_is_not_trained_trains(interactions, trained):
    model = MatrixFactorization(**SMALL).partial_fit(interactions, epochs=3)
    assert bits(model) == bits(trained)


def weights_of(model):
    pairs = model._trained
    names = model.user_ids_[pairs.users()].tolist(), model.item_ids_[pairs.indices].tolist()
    return dict(zip(zip(*names, strict=True), pairs.weights.tolist(), strict=True))


def test_weights_of_what_comes_later_are_added():
    model = MatrixFactorization(**SMALL).fit(([0, 0, 1], [0, 1, 1]), sample_weight=[2.0, 3.0, 1.0])
    assert weights_of(model) == {(0, 0): 2, (0, 1): 3, (1, 1): 1}
    model.partial_fit(([1, 2, 2, 0], [1, 0, 0, 0]), sample_weight=[4.0, 1.0, 0.5, 0.25])
    assert weights_of(model) == {(0, 0): 2.25, (0, 1): 3, (1, 1): 5, (2, 0): 1.5}
    model.partial_fit(([1, 3, 3], [1, 1, 1]))  # without weights: 1 each
    assert weights_of(model) == {(0, 0): 2.25, (0, 1): 3, (1, 1): 6, (2, 0): 1.5, (3, 1): 1}
    model = MatrixFactorization(**SMALL).fit(([0, 1], [0, 1]))
    model.partial_fit(([0], [1]), sample_weight=[3.0])
    assert weights_of(model) == {(0, 0): 1, (1, 1): 1, (0, 1): 3}


def test_going_on_with_weights_is_training_that_never_stopped(interactions):
    pairs = interactions.pairs
    weights = np.random.default_rng(0).uniform(0.5, 5, len(pairs))
    arrays = pairs.users(), pairs.indices
    model = MatrixFactorization(**SMALL).partial_fit(arrays, epochs=3, sample_weight=weights)
    model.partial_fit(arrays, epochs=2, sample_weight=weights)  # all weigh twice as much
    whole = MatrixFactorization(**{**SMALL, "epochs": 5}).fit(arrays, sample_weight=weights)
    assert bits(model) == bits(whole)
    assert bits(whole) != bits(MatrixFactorization(**{**SMALL, "epochs": 5}).fit(arrays))


# --- keeping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("names", ["integers", "strings"])
def test_a_saved_model_goes_on_with_the_same_bits(interactions, tmp_path, names, weighted):
    pairs = interactions.pairs
    weights = np.random.default_rng(0).uniform(0.5, 5, len(pairs)) if weighted else None
    users, items = pairs.users(), pairs.indices
    if names == "strings":
        users, items = [f"ü{u}" for u in users], [f"{i}\0\n" for i in items]
    model = MatrixFactorization(**SMALL, betas=(0.8, 0.99))
    model.fit((users, items), validation=0.1, sample_weight=weights)
    model.save(tmp_path)
    model.save(tmp_path)  # in the place of the first
    loaded = MatrixFactorization.load(tmp_path)
    assert loaded.get_params() == model.get_params()
    assert loaded.history_ == model.history_
    assert loaded.user_ids_.tolist() == model.user_ids_.tolist()
    asked = model.user_ids_[[3, 1]]
    assert loaded.recommend(asked)[0].tolist() == model.recommend(asked)[0].tolist()
    if weighted:
        assert loaded._trained.weights.tobytes() == model._trained.weights.tobytes()
    for one in (model, loaded):
        one.partial_fit((users[:5], items[:5]), epochs=2)
    assert bits(loaded) == bits(model)
    optimizer, extra = checkpoint.load(tmp_path)  # a run is a checkpoint
    assert set(optimizer.tables) == {"user", "item"}
    assert extra["epochs"] == 3
    assert len(list(tmp_path.glob("interactions-*"))) == 1


def test_interactions_may_be_left_out(trained, interactions, tmp_path):
    trained.save(tmp_path, interactions=False)
    loaded = MatrixFactorization.load(tmp_path)
    with pytest.raises(OptionError, match="exclude_seen: the interactions were not saved"):
        loaded.recommend([0])
    assert loaded.recommend([0], exclude_seen=False)[0].shape == (1, 10)
    for ask in (loaded.evaluate, loaded.partial_fit):
        with pytest.raises(OptionError, match="not saved with this model"):
            ask(interactions)


def test_what_is_damaged_or_something_else_is_named(trained, tmp_path):
    trained.save(tmp_path / "a")
    (file,) = (tmp_path / "a").glob("interactions-*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        MatrixFactorization.load(tmp_path / "a")
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        MatrixFactorization.load(tmp_path / "a")
    checkpoint.save(tmp_path / "b", trained.optimizer_)
    with pytest.raises(CheckpointError, match="not of a MatrixFactorization"):
        MatrixFactorization.load(tmp_path / "b")


def test_a_save_that_fails_leaves_the_model_that_was_there(trained, interactions, tmp_path, monkeypatch):
    from nb_sparse_adam._src.recommender import saved

    trained.save(tmp_path)
    other = MatrixFactorization(**{**SMALL, "seed": 7}).fit(interactions)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        other.save(tmp_path)
    assert bits(MatrixFactorization.load(tmp_path)) == bits(trained)
    assert len(list(tmp_path.glob("interactions-*"))) == 1


def test_what_does_not_fit_together_is_refused(trained, interactions, tmp_path):
    """Kernels take it that there is a row for each id."""
    from nb_sparse_adam import SparseAdam
    from nb_sparse_adam._src.recommender.saved import Saved, write_model

    optimizer = SparseAdam({"user": np.zeros((5, 8), np.float32), "item": np.zeros((60, 8), np.float32)})
    split = hold_out(interactions)
    with pytest.raises(OptionError, match=r"got \(5, 8\) float32 for table 'user', expected \(120, 8\)"):
        BPRModel(split, BPROptions(**SMALL), optimizer)
    users, items = trained.user_ids_, trained.item_ids_
    for number, (one, names, pairs) in enumerate(
        [(optimizer, users, trained._trained), (trained.optimizer_, users[1:], trained._trained),
         (trained.optimizer_, users, generate(7, 60, 9.0).pairs)]
    ):  # fmt: skip
        folder = tmp_path / str(number)
        write_model(folder, Saved(one, trained.get_params(), [], 0, names, items, pairs, None))
        with pytest.raises(CheckpointError, match="not fit"):
            MatrixFactorization.load(folder)


def test_ids_beyond_int64_are_unknown_and_large_ones_exact():
    big = 2**62 + 1
    model = MatrixFactorization(**SMALL).fit(([big, big - 1, 3], [1, 2, 2]))
    assert model.recommend(np.array([big], np.uint64), k=1, exclude_seen=False)[0].shape == (1, 1)
    found = model._users.find(np.array([big, big - 1, big + 1, 2**64 - 1, 2**63], np.uint64), "users")
    assert found.tolist() == [2, 1, -1, -1, -1]
