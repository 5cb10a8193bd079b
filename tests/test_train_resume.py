# SPDX-License-Identifier: Apache-2.0
"""``nb-sparse-adam train``: runs that are asked, replaced, gone on with, interrupted, and stopped in time."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from interaction_files import csv_of
from needs import need

from nb_sparse_adam.__main__ import main
from nb_sparse_adam._src import extras
from nb_sparse_adam._src.recommender import training_command
from nb_sparse_adam.recommender import BPRModel, BPROptions, MatrixFactorization, generate, hold_out

for _package in extras.EXTRAS["train"]:
    need(_package)


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "ratings.csv"
    path.write_text(csv_of(generate(80, 50, 9.0).pairs))
    return path


@pytest.fixture
def train(ratings, tmp_path, capsys):
    def train(*more, out="run", source=(str(ratings),), epochs=4):
        quick = ["--dim", "4", "--batch-size", "64", "--eval-every", "1", "--no-progress"]
        quick = quick if source else ["--no-progress"]
        quick += ["--epochs", str(epochs)] if epochs else []
        quick += ["--out", str(tmp_path / out)] if out else []
        status = main(["train", *source, *quick, *more])
        return status, capsys.readouterr()

    return train


def state_of(folder):
    model = MatrixFactorization.load(folder)
    state = [model.optimizer_.state[name] for name in ("user", "item")]
    arrays = [model.user_factors_, model.item_factors_]
    arrays += [array for one in state for array in (one.exp_avg, one.exp_avg_sq, one.steps)]
    losses = [record.loss for record in model.history_]
    return [np.asarray(array).tobytes() for array in arrays], losses, model.n_epochs_


def test_from_a_file_to_what_a_user_should_see(train, tmp_path, capsys):
    assert train()[0] == 0
    assert main(["recommend", str(tmp_path / "run"), "--user", "42", "--top", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["user"] == 42
    assert len(answer["items"]) == 3
    model = MatrixFactorization.load(tmp_path / "run")
    given = [one for one in (model._trained, model._held_out, model._test) if one is not None]
    row = model.user_ids_.tolist().index(42)
    had = {int(i) for one in given for i in one.indices[one.indptr[row] : one.indptr[row + 1]]}
    assert len(had) == sum(one.counts()[row] for one in given)
    assert not {each["item"] for each in answer["items"]} & set(model.item_ids_[sorted(had)].tolist())


def test_a_run_is_replaced_only_if_that_is_said(train, tmp_path):
    assert train()[0] == 0
    before = state_of(tmp_path / "run")
    status, said = train("--seed", "3")
    assert status == 1
    assert re.search("holds a run already; --overwrite replaces it, --resume .* --out DIR", said.err)
    assert said.out == ""
    assert state_of(tmp_path / "run") == before
    assert train("--seed", "3", "--overwrite")[0] == 0
    assert state_of(tmp_path / "run") != before
    assert len(list((tmp_path / "run").glob("interactions-*"))) == 1


@pytest.mark.parametrize("more", [[], ["--validation", "0.2"]])
def test_a_run_goes_on_as_if_it_had_never_stopped(train, tmp_path, more):
    assert train(*more, epochs=5)[0] == 0
    assert train(*more, epochs=2, out="short")[0] == 0
    status, said = train(
        "--resume", str(tmp_path / "short"), "--epochs", "5", source=(), epochs=None, out=None
    )
    assert status == 0, said.err
    assert "going on after epoch 2 of 5" in said.out
    assert state_of(tmp_path / "short") == state_of(tmp_path / "run")
    metrics = [json.loads((tmp_path / one / "metrics.json").read_text()) for one in ("run", "short")]
    assert [metrics[0][f"{name}@20"] for name in ("recall", "ndcg")] == [
        metrics[1][f"{name}@20"] for name in ("recall", "ndcg")
    ]


def test_an_interrupt_within_an_epoch_is_no_difference(train, tmp_path, monkeypatch):
    assert train()[0] == 0
    batches, check = [], training_command.Signals.check

    def interrupt(signals):
        batches.append(1)
        if len(batches) == 12:  # in the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        check(signals)

    monkeypatch.setattr(training_command.Signals, "check", interrupt)
    status, said = train(out="short")
    assert status == 130
    assert re.search("interrupted after [12] of 4 epochs: saving what there is; --resume", said.out)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    status, said = train("--resume", str(tmp_path / "short"), source=(), epochs=None, out=None)
    assert status == 0, said.err
    assert state_of(tmp_path / "short") == state_of(tmp_path / "run")


def test_batches_are_counted_where_training_was_left(ratings):
    """Of the model beneath: an exception of `on_batch` comes between two batches."""
    split = hold_out(generate(80, 50, 9.0))
    options = BPROptions(dim=4, batch_size=64, epochs=3)
    whole = BPRModel(split, options)
    whole.fit()
    parts, seen = BPRModel(split, options), []

    def stop(interactions, loss):
        seen.append(loss)
        if len(seen) % 5 == 0:
            raise RuntimeError

    while len(parts.history) < 3:
        try:
            parts.fit(stop)
        except RuntimeError:
            assert parts.unfinished.batches > 0
    assert parts.user_table.tobytes() == whole.user_table.tobytes()
    assert [one.loss for one in parts.history] == [one.loss for one in whole.history]


def test_sigterm_saves_as_ctrl_c_does(ratings, tmp_path):
    command = [sys.executable, "-m", "nb_sparse_adam", "train", str(ratings), "--dim", "4", "--no-progress"]
    command += ["--epochs", "1000000", "--eval-every", "1", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("epoch   2"):
                break
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "saving what there is" in out
    assert MatrixFactorization.load(tmp_path / "run").n_epochs_ >= 2


def test_training_stops_when_the_validation_gets_no_better(train, tmp_path):
    status, said = train("--validation", "0.2", "--patience", "2", "--lr", "0.1", epochs=80)
    assert status == 0, said.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    model = MatrixFactorization.load(tmp_path / "run")
    assert f"the best evaluation was after epoch {model.n_epochs_}: back to it" in said.out
    lines = (tmp_path / "run" / "history.csv").read_text().splitlines()[1:]
    recalls = [float(line.split(",")[4]) for line in lines]
    assert len(recalls) == model.n_epochs_ + 2 < 80
    assert int(np.argmax(recalls)) + 1 == model.n_epochs_
    assert metrics["data"]["validation"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--patience", "2"], "--patience needs --validation"),
        (["--resume", "RUN"], "leave out INTERACTIONS"),
        (["--resume", "RUN", "--lr", "0.3"], "--lr is the run's own"),
        (["--resume", "RUN", "--seed", "0"], "--seed is the run's own"),  # though it may be what the run has
        (["--resume", "RUN", "--validation", "0.1"], "leave out INTERACTIONS and --validation"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(train, ratings, tmp_path, more, message, capsys):
    source = (str(ratings),) if message.startswith(("leave out INTERACTIONS", "--patience")) else ()
    with pytest.raises(SystemExit) as caught:
        train(*[each.replace("RUN", str(tmp_path)) for each in more], source=source, epochs=None)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_only_runs_of_train_are_gone_on_with(train, tmp_path):
    MatrixFactorization(dim=4, epochs=1).fit(generate(30, 20, 5.0)).save(tmp_path / "other")
    status, said = train("--resume", str(tmp_path / "other"), source=(), epochs=None, out=None)
    assert status == 1
    assert "is no run of train" in said.err


def test_a_loss_that_explodes_is_told(train):
    status, said = train("--lr", "1e9", "--reg", "0")
    assert status == 0 or "diverged" in said.err
    assert said.err.count("diverged; try a smaller --lr") == 1


def test_without_a_terminal_there_is_a_line_now_and_then(train, monkeypatch):
    clock = iter(range(0, 10**6, 4))
    from nb_sparse_adam._src.recommender import progress

    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    _, said = train("--eval-every", "0", epochs=9)
    lines = [line for line in said.out.splitlines() if line.startswith("epoch")]
    assert [int(line.split()[1]) for line in lines] == [3, 6, 9]


def test_a_page_shows_what_users_had_and_would_see_next(train, tmp_path):
    titles = tmp_path / "titles.csv"
    titles.write_text("movieId,title,genres\n" + "".join(f'{i},"<b>Film, {i}</b>",x\n' for i in range(60)))
    assert train("--titles", str(titles))[0] == 0
    page = (tmp_path / "run" / "recommendations.html").read_text(encoding="utf-8")
    model = MatrixFactorization.load(tmp_path / "run")
    users = [int(user) for user in re.findall(r"<h2>User (\d+)</h2>", page)]
    assert len(users) == 6
    counts = model._trained.counts()
    rows = [model.user_ids_.tolist().index(user) for user in users]
    assert counts[rows[0]] == counts.max()
    assert counts[rows[-1]] == counts[counts > 0].min()
    ids, _ = model.recommend(users, k=10)
    for part, found in zip(page.split("<section>")[1:], ids, strict=True):
        listed = re.findall(r"&lt;b&gt;Film, (\d+)&lt;/b&gt;", part.partition("would see next")[2])
        assert [int(i) for i in listed] == [i for i in found if i >= 0]
    assert "<b>" not in page
    titles.write_text("only one column\n")
    status, said = train("--titles", str(titles), "--overwrite")
    assert status == 1
    assert "expected a header, and columns of ids and of titles" in said.err
    titles.write_text("movieId,title\nx7,Alien\n")
    status, said = train("--titles", str(titles), "--overwrite")
    assert status == 1
    assert "has titles of none of the" in said.err
    assert "epoch" not in said.out  # it is not trained first


@pytest.mark.parametrize("header", ["movieId,title", "name,item_id", "a,b"])
def test_titles_are_found_by_the_names_of_columns(header, tmp_path):
    from nb_sparse_adam._src.recommender.page import read_titles

    row = "Alien,7" if header.startswith("name") else "7,Alien"
    path = tmp_path / "titles.csv"
    path.write_text(f"\ufeff{header}\n{row}\nshort\n", encoding="utf-8")
    assert read_titles(path) == {"7": "Alien"}


def test_the_chart_of_one_epoch_has_one_tick(ratings, monkeypatch):
    from matplotlib.figure import Figure

    from nb_sparse_adam._src.recommender import report
    from nb_sparse_adam._src.recommender.ranking import popularity_quality

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    for epochs, stopped in ((1, False), (3, False), (2, True)):
        split = hold_out(generate(80, 50, 9.0))
        model = BPRModel(split, BPROptions(dim=4, batch_size=64, epochs=epochs, eval_every=1))
        model.fit()
        if stopped:
            model.unfinished = model.unfinished._replace(batches=3)
        quality = model.evaluate()
        report._chart(model, popularity_quality(split), {}, quality if stopped else None)
        below = drawn[-1].axes[1]
        ticks = [tick for tick in below.get_xticks() if below.get_xlim()[0] <= tick <= below.get_xlim()[1]]
        assert ticks == ([1] if epochs == 1 else ticks)
        assert all(float(tick).is_integer() for tick in ticks)
        x, y = below.lines[0].get_data()
        assert (2 < x[-1] < 3) if stopped else (x[-1] == epochs)
        assert y[-1] == quality.recall
