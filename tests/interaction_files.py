# SPDX-License-Identifier: Apache-2.0
"""Interactions and files of them for tests; the fixture `write` is in conftest.py."""

from dataclasses import replace

import numpy as np

INTEGERS = [(1, 10), (1, 30), (2, 10), (12, 7)]
TEXT = b"1,10\n1,30\n2,10\n12,7\n"


def pairs_of(interactions):
    """The interactions as a sorted list of (user id, item id)."""
    users = interactions.user_ids[interactions.pairs.users()].tolist()
    return sorted(zip(users, interactions.item_ids[interactions.pairs.indices].tolist(), strict=True))


def lines_of(pairs, separator=","):
    return "".join(f"{separator.join(map(str, pair))}\n" for pair in pairs)


def csv_of(pairs):
    """The rows of users and items as a file with a header."""
    return "user,item\n" + lines_of(zip(pairs.users(), pairs.indices, strict=True))


def weighted(split, weights=None):
    """The same split, whose training interactions have weights: these, or some from 0.05 to 20."""
    train = split.train
    if weights is None:
        weights = 10 ** np.random.default_rng(7).uniform(-1.3, 1.3, len(train))
    weights = np.broadcast_to(np.asarray(weights, np.float32), len(train))
    return replace(split, train=replace(train, weights=weights))
