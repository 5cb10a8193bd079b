# SPDX-License-Identifier: Apache-2.0
"""Full ranking, held to a slow and obvious one."""

import math

import numpy as np
import pytest

from nb_sparse_adam._src.recommender import topk
from nb_sparse_adam._src.recommender.interactions import Interactions, UserItems, generate, hold_out
from nb_sparse_adam._src.recommender.ranking import evaluate, popularity_quality
from nb_sparse_adam.errors import OptionError


def items_of(csr, user):
    return set(csr.indices[csr.indptr[user] : csr.indptr[user + 1]].tolist())


def naive_ranking(scores, seen, top):
    """All items that were not seen, by score and then by row; scores that are NaN are no scores."""
    able = [item for item in range(len(scores)) if item not in seen and scores[item] > -math.inf]
    return sorted(able, key=lambda item: (-scores[item], item))[:top]


def naive_quality(all_scores, split, top):
    recalls, ndcgs = [], []
    for user in range(split.train.n_users):
        seen, wanted = items_of(split.train, user), items_of(split.test, user)
        if not seen or not wanted:
            continue
        hits = [item in wanted for item in naive_ranking(all_scores[user], seen, top)]
        recalls.append(sum(hits) / len(wanted))
        dcg = sum(1 / math.log2(place + 2) for place, hit in enumerate(hits) if hit)
        ndcgs.append(dcg / sum(1 / math.log2(place + 2) for place in range(min(top, len(wanted)))))
    return np.mean(recalls), np.mean(ndcgs), len(recalls)


def small_split(seed):
    return hold_out(generate(60, 40, 9.0, seed=seed), 0.3, seed)


@pytest.mark.parametrize("top", [1, 3, 20, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_quality_is_the_naive_one(monkeypatch, seed, top):
    monkeypatch.setattr(topk, "BLOCK_BYTES", 4 * 40 * 7)  # users in blocks of 7: many, and a part of one
    split = small_split(seed)
    rng = np.random.default_rng(seed)
    # Small integers: scores are exact, and many are equal.
    user_table = rng.integers(-2, 3, (split.train.n_users, 3)).astype(np.float32)
    item_table = rng.integers(-2, 3, (split.train.n_items, 3)).astype(np.float32)
    got = evaluate(user_table, item_table, split, top)
    recall, ndcg, users = naive_quality(user_table @ item_table.T, split, top)
    assert got.recall == pytest.approx(recall, rel=1e-12)
    assert got.ndcg == pytest.approx(ndcg, rel=1e-12)
    assert got.users == users


@pytest.mark.parametrize("top", [1, 5, 100])
def test_popularity_is_the_naive_one(top):
    split = small_split(2)
    popularity = np.bincount(split.train.indices, minlength=split.train.n_items)
    got = popularity_quality(split, top)
    recall, ndcg, _ = naive_quality(np.tile(popularity, (split.train.n_users, 1)), split, top)
    assert got.recall == pytest.approx(recall, rel=1e-12)
    assert got.ndcg == pytest.approx(ndcg, rel=1e-12)


def rank(scores, users, seen, top):
    return topk.rank_rows(scores, users.astype(np.int64), seen.indptr, seen.indices, top)[0]


def test_rank_rows_breaks_ties_by_row_and_leaves_out_what_has_no_score():
    train = UserItems.from_pairs(np.array([1, 1]), np.array([0, 5]), 2, 6)
    scores = np.array([[9, 1, 3, 3, np.nan, 3], [9, -np.inf, 2, 2, 2, 9]], dtype=np.float32)
    best = rank(scores, np.array([0, 1]), train, 6)
    assert best.tolist() == [[0, 2, 3, 5, 1, -1], [2, 3, 4, -1, -1, -1]]


@pytest.mark.parametrize("seed", range(5))
def test_rank_rows_is_the_naive_ranking(seed):
    split = small_split(seed)
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 9, (split.train.n_users, split.train.n_items)).astype(np.float64)
    users = rng.permutation(split.train.n_users)[:25]
    expected = [naive_ranking(scores[user], items_of(split.train, user), 8) for user in users]
    got = rank(scores[users], users, split.train, 8)
    assert [[item for item in row if item >= 0] for row in got.tolist()] == expected


def test_perfect_and_useless_rankings():
    split = small_split(3)
    n_users, n_items = split.train.n_users, split.train.n_items
    wanted = np.zeros((n_users, n_items), dtype=np.float32)
    wanted[split.test.users(), split.test.indices] = 1
    perfect = evaluate(wanted, np.eye(n_items, dtype=np.float32), split, n_items)
    assert (perfect.recall, perfect.ndcg) == (1, pytest.approx(1))
    at_one = evaluate(wanted, np.eye(n_items, dtype=np.float32), split, 1)
    assert at_one.ndcg == 1
    assert at_one.recall == pytest.approx(np.mean([1 / n for n in split.test.counts() if n]))
    useless = evaluate(-wanted, np.eye(n_items, dtype=np.float32), split, 3)
    assert useless.recall < 0.2


def test_nobody_to_evaluate():
    interactions = Interactions.from_ids([1, 2], [1, 2])
    quality = popularity_quality(hold_out(interactions))
    assert quality.users == 0
    assert math.isnan(quality.recall)
    assert math.isnan(quality.ndcg)


def test_bad_arguments():
    split = small_split(0)
    users, items = np.zeros((split.train.n_users, 2)), np.zeros((split.train.n_items, 2))
    with pytest.raises(OptionError, match="top"):
        evaluate(users, items, split, 0)
    with pytest.raises(OptionError, match="shapes"):
        evaluate(users[1:], items, split)
    with pytest.raises(OptionError, match="shapes"):
        evaluate(users, items[:, :1], split)


INDPTR, INDICES = np.array([0, 2, 3]), np.array([0, 4, 1], np.int32)

NO_ITEMS = {
    "ends late": (np.array([0, 2, 4]), INDICES, 5, "from 0 to 3"),
    "begins late": (np.array([1, 2, 3]), INDICES, 5, "from 0 to 3"),
    "falls": (np.array([0, 4, 3]), INDICES, 5, "never decrease"),
    "empty": (INDPTR[:0], INDICES[:0], 5, "from 0 to 0"),
    "too few items": (INDPTR, INDICES, 4, "items 0 to 4, expected 0 <= item < n_items = 4"),
    "a negative item": (INDPTR, INDICES - 1, 5, "items -1 to 3"),
    "other integers": (INDPTR, INDICES.astype(np.int64), 5, "1-D int64, expected 1-D int32"),
    "a matrix": (INDPTR, INDICES[:, None], 5, "2-D int32"),
}


@pytest.mark.parametrize("kind", NO_ITEMS)
def test_items_of_users_that_cannot_be(kind):
    *arrays, message = NO_ITEMS[kind]
    with pytest.raises(OptionError, match=message):
        UserItems(*arrays)


def test_items_that_lie_apart_are_copied():
    """A kernel that was compiled for contiguous arrays would read what is between them."""
    apart = np.full((3, 3), 777, np.int32)
    apart[:, 1] = INDICES
    items = UserItems(INDPTR, apart[:, 1], 5)
    assert items.indices.flags.c_contiguous
    assert items.indices.tolist() == INDICES.tolist()
