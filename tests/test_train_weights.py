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

pl = need("polars")
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


# --- the latest for validation ----------------------------------------------------------------------------


def in_format(kind, path, rows):
    """Write users, items, weights and times, with times as integers or as dates."""
    names = ("user", "item", "rating", "timestamp")
    columns = [column.tolist() for column in rows]
    if kind.endswith("dates"):
        columns[3] = [str(np.datetime64("2024-01-01") + int(t)) for t in columns[3]]
    if kind.startswith("parquet"):
        pl.DataFrame(dict(zip(names, columns, strict=True))).write_parquet(path)
        return
    every = list(zip(*columns, strict=True))
    if kind.startswith("json"):
        path.write_text("".join(json.dumps(dict(zip(names, one, strict=True))) + "\n" for one in every))
    else:
        path.write_text("".join(",".join(map(str, one)) + "\n" for one in [names, *every]))


@pytest.mark.parametrize("kind", ["text", "text, dates", "json", "json, dates", "parquet", "parquet, dates"])
def test_the_latest_tenth_is_held_out_as_fit_does(kind, train, rows, tmp_path):
    in_format(kind, tmp_path / "data", rows)
    status, said = train("--validation", "latest", source=(str(tmp_path / "data"),))
    assert status == 0, said.err
    assert "times in 'timestamp'" in said.out
    assert "are for validation: the latest tenth of every user's items" in said.out
    run = MatrixFactorization.load(tmp_path / "run")
    latest = {}
    for user, item, _, when in zip(*(column.tolist() for column in rows), strict=True):
        latest[user, item] = max(when, latest.get((user, item), -1))
    test = hold_out(Interactions.from_ids(*rows[:2])).test
    assert run._test.indices.tobytes() == test.indices.tobytes()
    left = Interactions.from_ids(*rows[:2]).pairs
    users, items = (column[~test.contains(left)] for column in (left.users(), left.indices))
    ids = run.user_ids_[users].tolist(), run.item_ids_[items].tolist()
    times = [latest[pair] for pair in zip(*ids, strict=True)]
    model = MatrixFactorization(**OPTIONS, epochs=3).fit((*ids, times), validation="latest")
    held = model._held_out
    assert [run.user_ids_[u] for u in run._held_out.users()] == [model.user_ids_[u] for u in held.users()]
    assert [run.item_ids_[i] for i in run._held_out.indices] == [model.item_ids_[i] for i in held.indices]


def test_the_latest_of_what_is_trained_on_beside_a_file_to_predict(train, write, tmp_path):
    train_file = write(
        "who,what,when\n" + "".join(f"{u},{i},{(i * 7) % 10}\n" for u in range(9) for i in range(10)), "a"
    )
    test_file = write("who,what\n" + "".join(f"{u},{u + 10}\n" for u in range(9)), "b")
    told = ["--user-column", "who", "--item-column", "what", "--test", str(test_file)]
    status, said = train("--validation", "latest", "--time-column", "when", *told, source=(str(train_file),))
    assert status == 0, said.err
    run = MatrixFactorization.load(tmp_path / "run")
    assert run.item_ids_[run._held_out.indices].tolist() == [7] * 9  # the item of time 9
    assert len(run._test) == 9
    status, said = train("--resume", str(tmp_path / "run"), "--epochs", "4", source=())
    assert status == 0, said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FILE", "--time-column", "timestamp"], "--time-column needs --validation latest"),
        (
            ["FILE", "--time-column", "timestamp", "--validation", "0.1"],
            "--time-column needs --validation latest",
        ),
        (["--validation", "latest"], "--validation latest needs INTERACTIONS"),
        (["--time-column", "3", "--validation", "latest"], "needs INTERACTIONS"),
        (["FILE", "--validation", "last"], "expected latest, or a number between 0 and 1"),
        (["FILE", "--test-fraction", "latest"], "expected a number between 0 and 1"),
        (["FILE", "--validation", "latest", "--time-column", "when"], "time_column: .* but not 'when'"),
        (["FILE", "--validation", "latest", "--format", "adjacency"], "times: adjacency lines have none"),
        (["--resume", "RUN", "--validation", "latest"], "leave out INTERACTIONS and --validation"),
    ],
)
def test_what_has_no_times_is_refused_by_name(arguments, message, rated, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "train",
                *(str(rated) if one == "FILE" else one for one in arguments),
                "--out",
                str(tmp_path / "x"),
            ]
        )
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_files_without_times_say_how_to_name_them(train, write, capsys):
    with pytest.raises(SystemExit):
        train("--validation", "latest", source=(str(write("user,item\n1,2\n")),))
    assert re.search(
        "times: .*none of them named as times are; name one with --time-column", capsys.readouterr().err
    )
    status, said = train("--validation", "latest", source=(str(write("user,item,time\n1,2,3\n1,3,noon\n")),))
    assert status == 1
    assert "line 3: expected a number as time, got 'noon'" in said.err
