# SPDX-License-Identifier: Apache-2.0
"""``nb-sparse-adam train`` with weights of interactions, and with their times."""

import json
import re

import numpy as np
import pytest
from needs import need

from nb_sparse_adam.__main__ import main
from nb_sparse_adam._src import extras
from nb_sparse_adam._src.recommender import training
from nb_sparse_adam.recommender import BPROptions, Interactions, MatrixFactorization, generate, hold_out

for _package in extras.EXTRAS["train"]:
    need(_package)


@pytest.fixture(scope="module")
def rows():
    """Users, items, weights and times, with repeated pairs."""
    pairs = generate(80, 50, 9.0).pairs
    rng = np.random.default_rng(0)
    users, items = pairs.users(), pairs.indices
    again = rng.choice(len(users), 60)
    users, items = np.append(users, users[again]), np.append(items, items[again])
    return users, items, rng.choice([0.5, 1, 2, 5], len(users)), rng.permutation(len(users))


@pytest.fixture(scope="module")
def rated(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "ratings.csv"
    lines = (f"{u},{i},{w},{t}\n" for u, i, w, t in zip(*rows, strict=True))
    path.write_text("user,item,rating,timestamp\n" + "".join(lines))
    return path


QUICK = ["--dim", "4", "--batch-size", "64", "--eval-every", "1", "--no-progress"]
OPTIONS = {"dim": 4, "batch_size": 64}


@pytest.fixture
def train(rated, tmp_path, capsys):
    def train(*more, source=(str(rated),), out="run", epochs=3):
        quick = [*QUICK, "--epochs", str(epochs)] if source else ["--no-progress"]
        status = main(["train", *source, *quick, "--out", str(tmp_path / out), *more])
        return status, capsys.readouterr()

    return train


def vectors(folder):
    model = MatrixFactorization.load(folder)
    return model.user_factors_.tobytes(), model.item_factors_.tobytes()


def test_ratings_weigh_as_they_do_in_python(train, rows, tmp_path):
    users, items, weights, _ = rows
    status, said = train("--sample-weights")
    assert status == 0, said.err
    assert "ratings in 'rating'), weighted by their ratings" in said.out
    assert "60 repeated (user, item) pairs had their weights added" in said.out
    split = hold_out(Interactions.from_ids(users, items, weights))
    model = training.train(split, BPROptions(**OPTIONS, epochs=3))
    assert vectors(tmp_path / "run") == (model.user_table.tobytes(), model.item_table.tobytes())
    kept = MatrixFactorization.load(tmp_path / "run")._trained
    assert kept.weights.tobytes() == split.train.weights.tobytes()
    assert train(out="plain")[0] == 0
    assert vectors(tmp_path / "plain") != vectors(tmp_path / "run")


@pytest.mark.parametrize("more", [[], ["--validation", "0.2"]])
def test_a_run_with_weights_goes_on_as_if_it_had_never_stopped(train, tmp_path, more):
    assert train("--sample-weights", *more, epochs=5)[0] == 0
    assert train("--sample-weights", *more, out="short", epochs=2)[0] == 0
    status, said = train("--resume", str(tmp_path / "short"), "--epochs", "5", source=(), out="short")
    assert status == 0, said.err
    assert vectors(tmp_path / "short") == vectors(tmp_path / "run")
    quality = [
        json.loads((tmp_path / one / "metrics.json").read_text())["recall@20"] for one in ("run", "short")
    ]
    assert quality[0] == quality[1]


def test_weights_are_refused_where_there_are_none(train, write, capsys):
    status, said = train("--sample-weights", source=(str(write("user,item,rating\n1,2,3\n1,3,0\n", "zero")),))
    assert status == 1
    assert "zero, line 3: the rating 0 can be no weight" in said.err
    assert "--min-rating leaves low ones out" in said.err
    for content, message in (
        ("1 2 3 4\n2 3\n", "sample_weights: adjacency lines have none"),
        ("user,item\n1,2\n", "sample_weights: .* none of them named as ratings"),
    ):
        with pytest.raises(SystemExit) as caught:
            train("--sample-weights", source=(str(write(content)),))
        assert caught.value.code == 2
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main(["train", "--sample-weights"])
    assert "--sample-weights needs INTERACTIONS" in capsys.readouterr().err
