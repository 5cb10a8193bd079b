# SPDX-License-Identifier: Apache-2.0
"""Random search of the recommender's options: what is drawn, what ends a trial, and the run that remains."""

import csv
import json
import signal
from dataclasses import asdict
from statistics import median

import numpy as np
import pytest
from interaction_files import csv_of
from needs import need

from nb_sparse_adam.__main__ import main
from nb_sparse_adam._src import extras
from nb_sparse_adam._src.recommender.search import Search, draw, searched, table
from nb_sparse_adam.recommender import BPROptions, MatrixFactorization, generate, hold_out

pytestmark = pytest.mark.jit
for _package in extras.EXTRAS["train"]:
    need(_package)

SMALL = {"dim": 4, "epochs": 6, "eval_every": 1, "top": 10}


def nothing():
    pass


@pytest.fixture(scope="module")
def split():
    return hold_out(generate(120, 60, 12.0), 0.1)


@pytest.fixture(scope="module")
def done(split):
    search = Search(split, SMALL, 3)
    for _ in range(10):
        search.next(False, nothing)
    return search


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"loss": "bpr"},
        {"loss": "softmax"},
        {"loss": "softmax", "in_batch": True},
        {"loss": "softmax", "temperature": 0.5},
        {"popularity": 0.5},
        {"lr": 0.5, "negatives": 3, "batch_size": 7},
    ],
)
def test_what_is_given_is_not_searched(given):
    random = np.random.default_rng(0)
    drawn = [asdict(draw(random, given)) for _ in range(60)]
    for one in drawn:
        assert {name: one[name] for name in given} == given
    names = searched(given)
    assert not set(names) & set(given)
    default = asdict(BPROptions(**given))
    for name in default:  # all else stays
        if name not in names:
            assert {one[name] for one in drawn} == {default[name]}
    for name in ("reg", "init_std"):
        assert len({one[name] for one in drawn}) > 20
    if "loss" not in given and "temperature" not in given:
        assert {(one["loss"], one["in_batch"]) for one in drawn} >= {("bpr", False), ("softmax", False)}


def test_the_first_trial_is_the_defaults(done):
    assert done.trials[0].options == BPROptions(**SMALL)
    assert [one.number for one in done.trials] == list(range(1, 11))
    assert len({one.options for one in done.trials}) == 10


def test_the_best_model_is_that_of_the_best_trial(done):
    ended = [one for one in done.trials if one.ended in ("epochs", "patience")]
    best = max(ended, key=lambda one: one.recall)
    assert best.recall == max(one.recall for one in done.trials)
    assert done.best.options == best.options
    assert done.best.n_epochs == best.epoch
    quality = done.best.evaluate()
    assert (quality.recall, quality.ndcg) == (best.recall, best.ndcg)


def test_a_trial_below_the_median_of_the_others_ends(done):
    curves = done._curves
    hopeless = [one for one in done.trials if one.ended == "median"]
    assert hopeless
    for trial in done.trials:
        before = curves[: trial.number - 1]
        below = [
            epoch
            for epoch, recall in curves[trial.number - 1].items()
            if len(others := [one[epoch] for one in before if epoch in one]) >= 3 and recall < median(others)
        ]
        assert below == ([trial.epochs] if trial.ended == "median" else [])


def test_the_same_seed_finds_the_same(split, done):
    again = Search(split, SMALL, 3)
    for one in done.trials[:4]:
        assert again.next(False, nothing)._replace(seconds=0) == one._replace(seconds=0)


def test_a_setting_that_diverges_is_a_trial_without_a_result(split):
    search = Search(split, {**SMALL, "lr": 1e30}, 2)
    trial = search.next(False, nothing)
    assert trial.ended == "diverged"
    assert search.best is None
    header, rows = table(search.trials)
    assert rows[0][header.index("ended")] == "diverged"


def test_an_interrupt_leaves_what_was_found(split):
    search = Search(split, SMALL, 2)
    search.next(False, nothing)
    best = search.best

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search.next(False, interrupt)
    assert search.best is best
    assert len(search.trials) == 1


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "ratings.csv"
    path.write_text(csv_of(generate(80, 50, 9.0).pairs))
    return str(path)


QUICK = ["--dim", "4", "--epochs", "5", "--eval-every", "1", "--no-progress"]


def train(ratings, folder, *more):
    return main(["train", ratings, *QUICK, "--out", str(folder), *more])


def vectors(folder):
    model = MatrixFactorization.load(folder)
    return model.user_factors_.tobytes(), model.item_factors_.tobytes(), model.n_epochs_


def test_train_search(ratings, tmp_path, capsys):
    assert train(ratings, tmp_path / "run", "--search", "6", "--lr", "0.01") == 0
    said = capsys.readouterr().out
    assert [f"trial {n}/6  " in said for n in range(1, 8)] == [True] * 6 + [False]
    assert "lr=" not in said  # it was given
    assert "search.csv" in said
    with (tmp_path / "run" / "search.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["trial"]) for row in rows) == list(range(1, 7))
    recalls = [float(row["recall@20"]) for row in rows]
    assert recalls == sorted(recalls, reverse=True)
    best, options = rows[0], json.loads((tmp_path / "run" / "metrics.json").read_text())["options"]
    assert {float(row["lr"]) for row in rows} == {0.01}
    for name in (
        "loss",
        "reg",
        "negatives",
        "batch_size",
        "init_std",
        "temperature",
        "popularity",
        "in_batch",
    ):
        assert str(options[name]) == best[name]

    # It is the run that these options give by themselves.
    given = [
        x
        for name in ("loss", "lr", "reg", "negatives", "batch_size", "init_std", "temperature", "popularity")
        for x in (f"--{name.replace('_', '-')}", best[name])
    ]
    given.append("--in-batch" if best["in_batch"] == "True" else "--no-in-batch")
    assert train(ratings, tmp_path / "again", *given, "--validation", "0.1", "--patience", "3") == 0
    assert vectors(tmp_path / "again") == vectors(tmp_path / "run")
    assert not (tmp_path / "again" / "search.csv").exists()
    # A run that takes the place of one that was searched for does not keep its table.
    assert train(ratings, tmp_path / "run", "--overwrite") == 0
    assert not (tmp_path / "run" / "search.csv").exists()


def test_search_is_refused_where_it_means_nothing(ratings, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(tmp_path), "--search", "3"])
    assert "--search begins anew: leave out --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(ratings, tmp_path / "run", "--search", "0")
    assert "expected an integer of at least 1, got '0'" in capsys.readouterr().err


def test_ctrl_c_in_a_search_saves_the_best(ratings, tmp_path, capsys, monkeypatch):
    real = Search.next

    def next_(search, bar, check):
        if len(search.trials) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(search, bar, check)

    monkeypatch.setattr(Search, "next", next_)
    assert train(ratings, tmp_path / "run", "--search", "5") == 130
    assert "interrupted after 2 of 5 trials: saving what there is\n" in capsys.readouterr().out
    assert MatrixFactorization.load(tmp_path / "run").n_epochs_ > 0
    assert len((tmp_path / "run" / "search.csv").read_text().splitlines()) == 3


def test_ctrl_c_in_the_first_trial_saves_nothing(ratings, tmp_path, capsys, monkeypatch):
    real = Search.next

    def next_(search, bar, check):
        signal.raise_signal(signal.SIGINT)
        return real(search, bar, check)

    monkeypatch.setattr(Search, "next", next_)
    assert train(ratings, tmp_path / "run", "--search", "5") == 130
    assert "there is nothing to save" in capsys.readouterr().out
    assert not list((tmp_path / "run").iterdir())
