# SPDX-License-Identifier: Apache-2.0
"""Options for the recommenders of `nb-sparse-adam bench --only recommender`, by an equal search for each.

    python -m nb_sparse_adam._src.bench.recommender_search CONTENDER [--interactions FILE] [--trials 20]

Draws settings at random, trains each on four fifths of what seed 0 of the comparison trains on, and stops
when recall@20 of the other fifth has not risen for three evaluations. Prints each as a line of JSON, and the
best at the end. The test is not looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.bench.interaction_data import DATA, FILE
from nb_sparse_adam._src.bench.line import TOP
from nb_sparse_adam._src.bench.recommender_runs import Timeline, recalls
from nb_sparse_adam._src.bench.recommenders import Implicit, LightFM, Ours, Recommender
from nb_sparse_adam._src.engine.threads import max_threads
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, hold_out

PATIENCE = 3


class Space(NamedTuple):
    """What is searched for a contender.

    Attributes
    ----------
    make : callable
        Gives the contender, as `line.Trained` has it.
    epochs : int
        At most.
    every : int
        Epochs between evaluations.
    draw : callable
        Draws options.
    """

    make: Callable[..., Recommender]
    epochs: int
    every: int
    draw: Callable[[np.random.Generator], dict[str, Any]]


def _log(random: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform; two digits of it."""
    return float(f"{np.exp(random.uniform(np.log(low), np.log(high))):.2g}")


def _softmax(random: np.random.Generator) -> dict[str, Any]:
    return {
        "lr": _log(random, 5e-4, 1e-2),
        "reg": _log(random, 0.02, 0.5),
        "negatives": int(random.choice([63, 127, 255])),
        "batch_size": int(random.choice([256, 512, 1024, 2048, 4096])),
    }


def _als(random: np.random.Generator) -> dict[str, Any]:
    return {"regularization": _log(random, 1e-3, 300), "alpha": _log(random, 0.5, 100)}


def _implicit_bpr(random: np.random.Generator) -> dict[str, Any]:
    return {"learning_rate": _log(random, 0.005, 0.3), "regularization": _log(random, 1e-4, 0.1)}


def _warp(random: np.random.Generator) -> dict[str, Any]:
    alpha = _log(random, 1e-8, 1e-3)
    return {
        "learning_rate": _log(random, 0.01, 0.2),
        "user_alpha": alpha,
        "item_alpha": alpha,
        "max_sampled": int(random.choice([10, 30])),
    }


SPACES = {
    "softmax": Space(functools.partial(Ours, loss="softmax", in_batch=True), 60, 3, _softmax),
    "implicit ALS": Space(functools.partial(Implicit, model="als.AlternatingLeastSquares"), 40, 2, _als),
    "implicit BPR": Space(
        functools.partial(Implicit, model="bpr.BayesianPersonalizedRanking"), 300, 15, _implicit_bpr
    ),
    "LightFM WARP": Space(functools.partial(LightFM, loss="warp"), 60, 3, _warp),
}
"""Contender -> what is searched."""


class _EnoughError(Exception):
    """Training need not go on."""


def try_one(space: Space, split: Split, options: dict[str, Any], threads: int) -> dict[str, Any]:
    """Train with some options until that brings nothing more; return the best recall and its epoch."""
    recommender = space.make(split, threads, 0, space.epochs, **options)
    best, best_epoch = 0.0, 0

    def after(epoch: int) -> None:
        nonlocal best, best_epoch
        if epoch % space.every:
            return
        recall = recalls(Timeline([], {epoch: recommender.vectors()}), split)[0]
        if recall > best:
            best, best_epoch = recall, epoch
        elif epoch - best_epoch >= PATIENCE * space.every:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        recommender.fit(after)
    return {f"recall@{TOP}": round(best, 5), "epochs": best_epoch, **options}


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m nb_sparse_adam._src.bench.recommender_search",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("contender", choices=SPACES)
    parser.add_argument("--interactions", metavar="FILE", help="instead of the generated set")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the settings that are drawn")
    given = parser.parse_args(argv)
    data = DATA["generated" if given.interactions is None else FILE].read(given.interactions)
    train = hold_out(data, seed=0)
    rest = Interactions(train.train, train.user_ids, train.item_ids)
    split, random = hold_out(rest, seed=1), np.random.default_rng(given.seed)
    space, tried = SPACES[given.contender], []
    for _ in range(given.trials):
        tried.append(try_one(space, split, space.draw(random), max_threads()))
        print(json.dumps(tried[-1]), flush=True)
    print("best:", json.dumps(max(tried, key=lambda one: one[f"recall@{TOP}"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
