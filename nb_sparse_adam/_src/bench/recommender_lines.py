# SPDX-License-Identifier: Apache-2.0
"""The lines of the comparison in which recommenders are trained, with the options that each was given.

Found by `recommender_search`: for each contender settings drawn at random, trained on four fifths of what
seed 0 trains on, and the one taken that has the highest recall@20 on the other fifth, with the number of
epochs at which it was reached. There were 20 settings each on MovieLens' small set; on the generated one 10
for implicit's ALS and 9 for the softmax. implicit's BPR and LightFM have their own defaults there.
"In a hurry" is the default with options that reached ALS's recall soonest on that other fifth, of nine that
were tried on MovieLens' set and three on the generated one. "As by default" and "BPR" are not searched: the
first is what a person gets who gives no option, and the second has one negative for each interaction, as
implicit's.
"""

from __future__ import annotations

import functools
from typing import Any

from nb_sparse_adam._src.bench.line import Figure, Line, Trained
from nb_sparse_adam._src.bench.recommenders import Implicit, LightFM, Ours
from nb_sparse_adam._src.recommender.options import BPROptions

_BPR, _ALS = "bpr.BayesianPersonalizedRanking", "als.AlternatingLeastSquares"

BPR: dict[str, Any] = {
    "epochs": 40, "loss": "bpr", "negatives": 1, "reg": 0.01, "lr": 0.005, "init_std": 0.1,
    "batch_size": 1024,
}  # fmt: skip

IN_A_HURRY: dict[str, Any] = {"epochs": 12, "lr": 0.016, "negatives": 31, "batch_size": 1024}

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "generated": {
        "softmax": {
            "epochs": 42, "loss": "softmax", "in_batch": True, "negatives": 127, "reg": 0.21, "lr": 3.1e-3,
            "batch_size": 1024,
        },
        "implicit ALS": {"epochs": 40, "regularization": 2.1, "alpha": 24.0},
        "implicit BPR": {"epochs": 100},
        "LightFM WARP": {"epochs": 30},
    },
    "file": {
        "softmax": {
            "epochs": 33, "loss": "softmax", "in_batch": True, "negatives": 255, "reg": 0.18, "lr": 9.4e-3,
            "batch_size": 2048,
        },
        "implicit ALS": {"epochs": 10, "regularization": 5.9, "alpha": 3.9},
        "implicit BPR": {"epochs": 90, "learning_rate": 0.0059, "regularization": 1.1e-4},
        "LightFM WARP": {
            "epochs": 60, "learning_rate": 0.029, "item_alpha": 4.7e-4, "user_alpha": 4.7e-4,
            "max_sampled": 30,
        },
    },
}  # fmt: skip
"""Data -> contender -> its options: of a file those that were found on MovieLens' small set."""

_SECTION = "Recommenders"


def entries(data: str) -> tuple[Trained, ...]:
    """Return who is trained on data, with the options that were found there."""
    found = OPTIONS[data]
    implicit_bpr = functools.partial(Implicit, model=_BPR, **found["implicit BPR"])
    lightfm = functools.partial(LightFM, loss="warp", **found["LightFM WARP"])
    return (
        Trained("softmax", data, functools.partial(Ours, **found["softmax"])),
        Trained("in a hurry", data, functools.partial(Ours, **IN_A_HURRY)),
        Trained("as by default", data, functools.partial(Ours, epochs=BPROptions().epochs)),
        Trained("BPR", data, functools.partial(Ours, **BPR)),
        Trained("implicit BPR", data, implicit_bpr, "implicit"),
        Trained(
            "implicit ALS", data, functools.partial(Implicit, model=_ALS, **found["implicit ALS"]), "implicit"
        ),
        Trained("LightFM WARP", data, lightfm, "lightfm"),
        Trained("BPR on 1 thread", data, functools.partial(Ours, **BPR), threads=1),
        Trained("implicit BPR on 1 thread", data, implicit_bpr, "implicit", threads=1),
    )


def _line(key: str, data: str, title: str) -> Line:
    return Line(
        key,
        title,
        _SECTION,
        entries(data),
        (
            Figure("an epoch, BPR / implicit's", "BPR, an epoch", "implicit BPR, an epoch", at_most=3),
            Figure("the same on 1 thread", "BPR on 1 thread, an epoch", "implicit BPR on 1 thread, an epoch"),
            Figure(
                "recall@20, softmax / ALS", "softmax, recall@20", "implicit ALS, recall@20", at_least=1.05
            ),
            Figure(
                "until ALS's, in a hurry / ALS",
                "in a hurry, until ALS's recall",
                "implicit ALS, in all",
                at_most=4,
            ),
            Figure(
                "recommend, ours / implicit's", "softmax, recommend", "implicit ALS, recommend", at_most=1.5
            ),
            Figure("recall@20, BPR / implicit's", "BPR, recall@20", "implicit BPR, recall@20"),
            Figure("recall@20, softmax / WARP", "softmax, recall@20", "LightFM WARP, recall@20"),
            Figure("recall@20, by default / softmax", "as by default, recall@20", "softmax, recall@20"),
            Figure("compiling, once", "as by default, compiling", unit="s"),
        ),
        measure="recommenders",
        by_name=True,
    )


RECOMMENDER_LINES = [
    _line("recommender", "generated", "recommenders, {users} users and {items} items"),
    _line("recommender-file", "file", "recommenders, {file}"),
]
