# SPDX-License-Identifier: Apache-2.0
"""`nb-sparse-adam bench --only recommender`: who is trained on what, and what is made of it. Nothing here
judges a time."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from interaction_files import csv_of
from needs import need

from nb_sparse_adam.__main__ import main
from nb_sparse_adam._src.bench import comparison, curves, recommender_runs, recommenders, text, worker
from nb_sparse_adam._src.bench.interaction_data import DATA, FILE, load_split, save_split
from nb_sparse_adam._src.bench.line import UNTIL
from nb_sparse_adam._src.bench.lines import LINES
from nb_sparse_adam._src.bench.peers import PEERS
from nb_sparse_adam._src.bench.recommender_lines import OPTIONS
from nb_sparse_adam._src.bench.recommender_runs import FailedError, answer, follow, numbers_of, points_of
from nb_sparse_adam._src.bench.recommender_search import SPACES, try_one
from nb_sparse_adam._src.bench.settings import Settings
from nb_sparse_adam._src.recommender.interactions import generate, hold_out
from nb_sparse_adam._src.recommender.ranking import evaluate

LINE = LINES["recommender"]
ALONE = Settings(peers=(), threads=1, quick=True)
BOTH = ALONE._replace(peers=("implicit", "lightfm"))
SPLIT = hold_out(generate(60, 40, 8.0))

IMPLICIT = """
import os
import numpy as np

class Model:
    def __init__(self, factors, iterations, num_threads, use_gpu, random_state, **options):
        assert factors == 64 and not use_gpu and os.environ["OPENBLAS_NUM_THREADS"] == "1"
        self.iterations, self.random = iterations, np.random.default_rng(random_state)

    def fit(self, user_items, show_progress=True, callback=None):
        assert set(user_items.data) == {1}
        for epoch in range(self.iterations):
            self.user_factors, self.item_factors = (
                self.random.random((n, 3), dtype=np.float32) for n in user_items.shape
            )
            if callback:
                callback(epoch, 0.0, 1, 2)

    def recommend(self, users, user_items, N):
        assert len(users) == user_items.shape[0]
        return np.zeros((len(users), N)), np.zeros((len(users), N))

AlternatingLeastSquares = BayesianPersonalizedRanking = Model
"""
LIGHTFM = """
import numpy as np

class LightFM:
    def __init__(self, no_components, random_state, loss, **options):
        assert loss == "warp"

    def fit_partial(self, interactions, epochs, num_threads):
        assert epochs == 1
        self.shape = interactions.shape

    fit = fit_partial

    def _vectors(self, n):
        return np.arange(n, dtype=np.float32), np.full((n, 2), 2, dtype=np.float32)

    def get_user_representations(self):
        return self._vectors(self.shape[0])

    def get_item_representations(self):
        return self._vectors(self.shape[1])
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """implicit and LightFM by name, for this process and for those that it starts."""
    need("scipy")
    folder = tmp_path / "fakes"
    (folder / "implicit").mkdir(parents=True)
    for name, source in (
        ("implicit/__init__.py", ""),
        ("implicit/als.py", IMPLICIT),
        ("implicit/bpr.py", IMPLICIT),
        ("lightfm.py", LIGHTFM),
    ):
        (folder / name).write_text(source)
    for name in ("implicit", "implicit.als", "implicit.bpr", "lightfm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    here = [str(folder), str(Path(comparison.__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, here)))


# --- who is trained on what -------------------------------------------------------------------------------


def test_what_is_generated_is_as_large_as_the_title_says():
    data = DATA["generated"].smaller()
    found = data.read(None)
    assert LINE.titled(True) == f"recommenders, {data.users} users and {data.items} items"
    assert found.pairs.n_users == data.users
    assert 0.8 * data.items < found.pairs.n_items <= data.items
    np.testing.assert_array_equal(found.pairs.indices, data.read(None).pairs.indices)


def test_a_split_is_the_same_in_another_process(tmp_path):
    save_split(SPLIT, tmp_path / "split.npz")
    found = load_split(tmp_path / "split.npz")
    for name in ("train", "test"):
        one, other = getattr(found, name), getattr(SPLIT, name)
        np.testing.assert_array_equal(one.indptr, other.indptr)
        np.testing.assert_array_equal(one.indices, other.indices)
        assert one.n_items == other.n_items


@pytest.mark.jit
@pytest.mark.parametrize("data", OPTIONS)
def test_everybody_takes_the_options_that_were_found(data, fakes, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    line = next(line for line in LINES.values() if line.entries[0].case == data)
    for entry in line.entries:
        recommender = entry.make(SPLIT, 1, 0)
        assert recommender.epochs >= 1
        model = entry.make(SPLIT, 1, 0, epochs=1)
        model.fit(lambda epoch: None)
        users, items = model.vectors()
        assert (len(users), len(items)) == (SPLIT.train.n_users, SPLIT.train.n_items)
        assert users.shape[1] == items.shape[1]


def test_scores_of_lightfm_have_the_biases_of_items(fakes):
    model = recommenders.LightFM(SPLIT, 1, 0, epochs=1, loss="warp")
    model.fit(lambda epoch: None)
    users, items = model.vectors()
    np.testing.assert_array_equal(users @ items.T, 8 + np.arange(len(items)) + np.zeros((len(users), 1)))


@pytest.mark.jit
def test_what_is_recommended_is_what_was_trained():
    model = recommenders.Ours(SPLIT, 1, 0, epochs=2, batch_size=64)
    model.warm()
    model.fit(lambda epoch: None)
    users, items = model.vectors()
    ids, _ = model.recommend(1)
    scores = users @ items.T
    scores[SPLIT.train.users(), SPLIT.train.indices] = -np.inf
    np.testing.assert_array_equal(ids[:, 0], scores.argmax(axis=1))


def test_blas_has_one_thread_beside_those_of_a_library_of_its_own():
    ours, theirs = LINE.entries[0], next(entry for entry in LINE.entries if entry.peer == "implicit")
    assert recommender_runs.environment(ours, 3)["OPENBLAS_NUM_THREADS"] == "3"
    assert recommender_runs.environment(theirs, 3)["OPENBLAS_NUM_THREADS"] == "1"
    assert "OMP_PROC_BIND" not in comparison._environment(LINE).keys() - os.environ.keys()


# --- training ---------------------------------------------------------------------------------------------


def test_the_points_of_a_curve():
    assert points_of(1) == (1,)
    assert points_of(5) == (1, 2, 3, 4, 5)
    for epochs in (30, 100, 1000):
        points = points_of(epochs)
        assert (points[0], points[-1]) == (1, epochs)
        assert 8 < len(points) <= recommender_runs.POINTS


class Slow(recommenders.Recommender):
    """Takes 10 s to set up, a second for each epoch, and 100 s to show its vectors."""

    def __init__(self, epochs):
        super().__init__(SPLIT, 1, 0, epochs)
        self.now = 0.0
        self.users, self.items = np.zeros((60, 2)), np.zeros((SPLIT.train.n_items, 2))

    def warm(self):
        pass

    def fit(self, after):
        self.now += 10
        for epoch in range(1, self.epochs + 1):
            self.now += 1
            self.users += 1
            after(epoch)

    def vectors(self):
        self.now += 100
        return self.users, self.items

    def recommend(self, k):
        pass


def test_the_clock_stands_while_vectors_are_copied(monkeypatch):
    slow = Slow(4)
    monkeypatch.setattr(recommender_runs.time, "perf_counter", lambda: slow.now)
    timeline = follow(slow, (1, 4))
    assert timeline.seconds == [11, 12, 13, 14]
    assert list(timeline.kept) == [1, 4]
    assert [users[0, 0] for users, _ in timeline.kept.values()] == [1, 4]  # copies


def test_recall_is_that_of_the_library_and_of_the_same_users_each_time(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = tuple(rng.normal(size=(n, 3)) for n in (SPLIT.train.n_users, SPLIT.train.n_items))
    timeline = recommender_runs.Timeline([], {1: vectors, 2: vectors})
    whole = recommender_runs.recalls(timeline, SPLIT)
    assert whole == 2 * [evaluate(*vectors, SPLIT, 20).recall]
    seen = []
    monkeypatch.setattr(recommender_runs, "USERS", 12)
    rank = recommender_runs.rank
    monkeypatch.setattr(recommender_runs, "rank", lambda *given: seen.append(given[2]) or rank(*given))
    first, second = recommender_runs.recalls(timeline, SPLIT)
    assert first == second
    assert [np.count_nonzero(split.test.counts()) for split in seen] == [12, 12]
    assert all(split.train is SPLIT.train for split in seen)


# --- numbers ----------------------------------------------------------------------------------------------


def run_of(*recall, epoch=1.0, recommend=None):
    found = {"epoch": epoch, "recall": list(recall), "seconds": [10.0 * (i + 1) for i in range(len(recall))]}
    return found if recommend is None else {**found, "recommend": recommend}


def test_numbers_are_medians_of_times_and_means_of_recall():
    unusable = {}
    numbers = numbers_of(
        {
            "softmax": [run_of(0.1, 0.4, recommend=3.0), run_of(0.3, 0.3, recommend=5.0)],
            "implicit ALS": [run_of(0.2, recommend=2.0), run_of(0.3, recommend=2.0)],
            "BPR on 1 thread": [{"epoch": 2.0}, {"epoch": 3.0}],
        },
        unusable,
    )
    assert numbers == {
        "softmax, an epoch": 1.0,
        "softmax, recall@20": pytest.approx(0.35),
        "softmax, in all": 20.0,
        "softmax, recommend": 4.0,
        f"softmax, {UNTIL}": 15.0,  # 20 s with one seed, 10 s with the other
        "implicit ALS, an epoch": 1.0,
        "implicit ALS, recall@20": 0.25,
        "implicit ALS, in all": 10.0,
        "implicit ALS, recommend": 2.0,
        "BPR on 1 thread, an epoch": 2.5,
    }
    assert unusable == {}


def test_who_does_not_get_there_with_every_seed_has_no_time_for_it():
    unusable = {}
    numbers = numbers_of(
        {"softmax": [run_of(0.4), run_of(0.1)], "implicit ALS": [run_of(0.2), run_of(0.2)]}, unusable
    )
    assert f"softmax, {UNTIL}" not in numbers
    assert unusable == {f"softmax, {UNTIL}": "softmax reached implicit ALS's recall with 1 of 2 seeds"}


def answers(failing=()):
    def run(name, asked):
        if name in failing:
            raise FailedError("no luck")
        assert Path(asked["split"]).exists()
        entry = next(entry for entry in LINE.entries if entry.name == name)
        if entry.threads is not None:
            assert asked["threads"] == 1
            return {"epoch": 1.0}
        return run_of(0.1, 0.2, recommend=1.0)

    return run


def test_one_that_fails_takes_its_figures_only():
    unusable, found = {}, {}
    numbers = recommender_runs.measure(LINE, BOTH, unusable, found, answers(failing=["LightFM WARP"]))
    assert unusable["LightFM WARP"] == "no luck"
    assert set(found) == {
        "BPR", "softmax", "in a hurry", "as by default", "implicit BPR", "implicit ALS"
    }  # fmt: skip
    assert found["BPR"] == {"seconds": [[10.0, 20.0]], "recall": [[0.1, 0.2]]}
    missing = comparison._missing(LINE, numbers, comparison._by_number(LINE, unusable))
    assert missing == {
        "recall@20, softmax / WARP": "no luck",
        "compiling, once": "a quick run does not wait for the compiler",
    }


def test_without_peers_there_are_our_own_figures():
    unusable, found = {}, {}
    ours = LINE._replace(entries=tuple(entry for entry in LINE.entries if entry.peer is None))
    numbers = recommender_runs.measure(ours, ALONE, unusable, found, answers())
    assert [figure["label"] for figure in comparison.figures(LINE, numbers)] == [
        "recall@20, by default / softmax"
    ]
    missing = comparison._missing(LINE, numbers, comparison._left_out(LINE, ALONE))
    assert all(PEERS[name].install in missing[figure] or "left out" in missing[figure] for name, figure in (
        ("implicit", "an epoch, BPR / implicit's"), ("lightfm", "recall@20, softmax / WARP"),
    ))  # fmt: skip


@pytest.mark.jit
def test_a_process_trains_and_answers(tmp_path):
    """In this process: the answer is what another one would print."""
    save_split(SPLIT, tmp_path / "split.npz")
    asked = {"split": str(tmp_path / "split.npz"), "seed": 0, "threads": 1, "quick": True, "compiling": False}
    entries = {entry.name: entry for entry in LINE.entries}
    found = answer(entries["BPR"], asked)
    assert len(found["seconds"]) == len(found["recall"]) == recommender_runs.QUICK_EPOCHS
    assert found["seconds"] == sorted(found["seconds"])
    assert 0 < found["recall"][-1] <= 1
    assert found["epoch"] > 0
    assert found["recommend"] > 0
    assert set(answer(entries["BPR on 1 thread"], asked)) == {"epoch"}
    assert set(answer(entries["BPR"], {**asked, "compiling": True})) == {"compiling"}


def test_a_process_that_ends_is_a_reason(monkeypatch):
    run = recommender_runs.trained_by(lambda *_: [sys.executable, "-c", "raise MemoryError('no luck')"], LINE)
    with pytest.raises(FailedError, match="MemoryError: no luck"):
        run("BPR", {"threads": 1, "compiling": False})


def test_the_compiler_finds_nothing_on_disk(monkeypatch):
    program = "import json, os; print('noise'); print(json.dumps(dict(os.environ)))"
    run = recommender_runs.trained_by(lambda *_: [sys.executable, "-c", program], LINE)
    monkeypatch.setenv("NUMBA_CACHE_DIR", "kept")
    assert run("BPR", {"threads": 1, "compiling": False})["NUMBA_CACHE_DIR"] == "kept"
    assert run("BPR", {"threads": 1, "compiling": True})["NUMBA_CACHE_DIR"] != "kept"


# --- the command ------------------------------------------------------------------------------------------


@pytest.mark.jit
def test_the_whole_line_quickly(tmp_path, capsys, fakes):
    need("matplotlib")
    out = tmp_path / "run"
    arguments = ["--quick", "--only", "recommender", "--peers", "implicit,lightfm", "--threads", "1"]
    assert main(["bench", *arguments, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"bench.json", "recommender.png"}
    line, of_file = json.loads((out / "bench.json").read_text(encoding="utf-8"))["lines"]
    assert (line["key"], line["skipped"]) == ("recommender", None)
    assert of_file["skipped"] == "needs a file: --interactions FILE"
    numbers = {name for entry in LINE.entries for name in LINE.numbers_of(entry)}
    assert set(line["numbers"]) <= numbers
    absent = {name for name in numbers - set(line["numbers"]) if UNTIL not in name}
    assert absent == {
        "BPR, compiling", "softmax, compiling", "in a hurry, compiling", "as by default, compiling",
        "LightFM WARP, recommend"
    }  # fmt: skip
    assert set(line["curves"]) == {entry.name for entry in LINE.entries if entry.threads is None}
    for curve in line["curves"].values():
        assert [len(points) for points in curve["seconds"]] == [len(points) for points in curve["recall"]]
        assert len(curve["recall"]) == 1
    said = capsys.readouterr().out
    assert re_number("BPR, recall@20", said) == pytest.approx(line["numbers"]["BPR, recall@20"], abs=1e-4)


def re_number(name, said):
    return float(" ".join(said.split()).partition(f"{name} ")[2].split(";")[0])


@pytest.mark.jit
def test_a_file_of_yours(tmp_path, capsys):
    path = tmp_path / "mine.csv"
    path.write_text(csv_of(SPLIT.train))
    settings = ALONE._replace(interactions=str(path))
    (line,) = comparison.run([LINES["recommender-file"]], settings)
    assert line["title"] == "recommenders, mine.csv"
    assert line["skipped"] is None
    assert set(line["curves"]) == {"BPR", "softmax", "in a hurry", "as by default"}
    assert next(text.text_lines(line)) == line["title"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--only", "rows-64"], 2, "is for the line recommender-file: add --only recommender-file"),
        ([], 2, "is for the line recommender-file: add --only recommender-file"),
        (["--only", "recommender"], 1, "no_such.csv"),
    ],
)
def test_interactions_are_refused_before_the_work(arguments, status, words, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("something was measured")

    monkeypatch.setattr(comparison, "run", refuse)
    command = ["bench", *arguments, "--interactions", str(tmp_path / "no_such.csv"), "--out", str(tmp_path)]
    try:
        found = main(command)
    except SystemExit as exit_:
        found = exit_.code
    assert found == status
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- the picture ------------------------------------------------------------------------------------------


def test_every_curve_is_drawn():
    need("matplotlib")
    names = [entry.name for entry in LINE.entries if entry.threads is None]
    curve = {"seconds": [[1.0, 2.0], [1.5, 2.5]], "recall": [[0.1, 0.2], [0.1, 0.3]]}
    lines = [
        {"title": title, "key": title, "curves": dict.fromkeys(names, curve), "figures": []}
        for title in ("one", "two")
    ]
    result = {**comparison.describe(BOTH._replace(peers=())), "lines": [*lines, {"key": "rows-64"}]}
    assert curves.there_are(result)
    assert not curves.there_are({"lines": [{"key": "rows-64"}]})
    figure = curves.draw(result)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["one", "two"]
    for ax in figure.axes:
        assert len(ax.lines) == len(names)
        np.testing.assert_allclose(ax.lines[0].get_xydata(), [[1.25, 0.1], [2.25, 0.25]])
    assert len(figure.legends[0].get_texts()) == len(set(names))
    assert set(names) == set(curves._STYLES)


# --- the search -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_everybody_is_searched_with_options_that_it_takes(name, fakes, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    random = np.random.default_rng(0)
    assert set(SPACES) == {entry.name for entry in LINE.entries if entry.name in OPTIONS["generated"]}
    drawn = [SPACES[name].draw(random) for _ in range(3)]
    assert drawn[0] != drawn[1]
    for options in drawn:
        SPACES[name].make(SPLIT, 1, 0, 1, **options)
    known = {*drawn[0], "epochs", "loss", "in_batch"}
    assert set(OPTIONS["generated"][name]) <= known
    assert set(OPTIONS[FILE][name]) <= known


def test_a_search_stops_when_nothing_better_comes(monkeypatch):
    found = iter([0.1, 0.3, 0.2, 0.2, 0.2, 0.9])
    monkeypatch.setattr("nb_sparse_adam._src.bench.recommender_search.recalls", lambda *_: [next(found)])
    space = SPACES["softmax"]._replace(make=lambda *given: Slow(given[3]), epochs=20, every=2)
    assert try_one(space, SPLIT, {}, 1) == {"recall@20": 0.3, "epochs": 4}
    assert next(found) == 0.9


def test_worker_knows_the_line():
    assert LINE.measure == "recommenders"
    assert LINE.measure not in worker._MEASURES
