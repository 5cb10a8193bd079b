# SPDX-License-Identifier: Apache-2.0
"""The examples do what they say."""

import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import need

from nb_sparse_adam import EmbeddingTable, RowGradient
from nb_sparse_adam.recommender import BPROptions, generate, hold_out

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def skip_gram(monkeypatch):
    return example("skip_gram", monkeypatch)


@pytest.fixture
def dlrm_cpu(monkeypatch):
    torch = need("torch")
    threads = torch.get_num_threads()
    yield example("dlrm_cpu", monkeypatch)
    torch.set_num_threads(threads)


@pytest.fixture
def machine(monkeypatch):
    need("polars")
    return example("factorization_machine", monkeypatch)


@pytest.fixture
def online(monkeypatch):
    return example("online_recommender", monkeypatch)


@pytest.fixture
def on_a_server(monkeypatch):
    need("ray")
    return example("parameter_server_bpr", monkeypatch)


@pytest.mark.jit
def test_skip_gram_finds_the_words_of_a_topic(skip_gram):
    names, vectors, losses = skip_gram.main(["--threads", "1"])
    assert losses[-1] < 0.8 * losses[0]
    topics = np.array([name.partition("-")[0] for name in names])
    near = skip_gram.nearest(vectors, range(len(names)), 5)
    assert (topics[near] == topics[:, None]).mean() > 0.95


@pytest.mark.jit
def test_skip_gram_reads_a_text(skip_gram, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 20 + "rare words\n", encoding="utf-8")
    names, _, losses = skip_gram.main([str(text), "--epochs", "2", "--dim", "8", "--threads", "1"])
    assert names == ["cat", "mat", "on", "sat", "the"]
    assert losses[1] < losses[0]
    assert "epoch 2" in capsys.readouterr().out


@settings(max_examples=60)
@given(
    st.lists(st.text("ab Σé.\n", max_size=40), max_size=6).map("".join),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_skip_gram_reads_in_pieces_what_is_there(text, piece, longest):
    # Of lines at once, and word by word: what the pieces are to be put together to.
    sentences = [[w.lower() for w in re.findall(r"\w+", line)] for line in text.split("\n")]
    words = [w for sentence in sentences for w in sentence]
    kept = [[w for w in sentence if words.count(w) >= 5] for sentence in sentences]
    short = [s[i : i + longest] for s in kept for i in range(0, len(s), longest)]
    with pytest.MonkeyPatch.context() as monkeypatch, TemporaryDirectory() as folder:
        skip_gram = example("skip_gram", monkeypatch)
        monkeypatch.setattr(skip_gram, "PIECE", piece)
        monkeypatch.setattr(skip_gram, "LONGEST", longest)
        file = Path(folder) / "text"
        file.write_text(text, encoding="utf-8")
        ids, ends, names = skip_gram.read(file)
    assert names == sorted({w for w in words if words.count(w) >= 5})
    read = [[names[i] for i in part] for part in np.split(ids, ends)]
    assert read == [*short, []]


def test_skip_gram_shares_one_long_line_among_threads(skip_gram, tmp_path):
    text = tmp_path / "text8"
    text.write_text(" anarchism originated as a term" * 2500, encoding="utf-8")
    ids, ends, _ = skip_gram.read(text)
    assert len(ids) == 12_500
    np.testing.assert_array_equal(ends, [*range(1000, 12_500, 1000), 12_500])


@pytest.mark.jit
def test_skip_gram_saves_vectors_and_answers_from_them(skip_gram, tmp_path, capsys):
    file = str(tmp_path / "vectors.safetensors")
    asked = ["--similar", "topic3-word7", "--similar", "topic9-word0", "--top", "6"]
    names, vectors, _ = skip_gram.main(["--epochs", "1", "--threads", "1", "--save", file, *asked])
    answers = [line for line in capsys.readouterr().out.splitlines() if line.startswith("topic")]
    assert [line.partition(":")[0] for line in answers] == asked[1:4:2]
    assert all(line.count(", ") == 5 for line in answers)
    loaded_names, loaded, losses = skip_gram.main(["--load", file, *asked])
    assert capsys.readouterr().out.splitlines() == answers
    assert (loaded_names, losses) == (names, [])
    np.testing.assert_array_equal(loaded, vectors)


def test_skip_gram_asks_for_neighbours_in_little_memory(skip_gram):
    vectors = np.random.default_rng(0).normal(size=(20_000, 8)).astype(np.float32)
    tracemalloc.start()
    try:
        near = skip_gram.nearest(vectors, [0, 19_999, 7], 10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * vectors.nbytes  # all cosines together would be 1.6 GB
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for word, found in zip([0, 19_999, 7], near, strict=True):
        cosine = unit @ unit[word]
        assert word not in found
        np.testing.assert_allclose(cosine[found], np.sort(cosine)[-2:-12:-1], rtol=1e-6)


def test_skip_gram_has_fewer_neighbours_where_words_are_few(skip_gram):
    vectors = np.eye(3, dtype=np.float32)
    assert skip_gram.nearest(vectors, [1], 5).shape == (1, 2)
    assert skip_gram.nearest(vectors[:1], [0], 5).shape == (1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text.txt"], "no word five times"),
        (["missing.txt"], "missing.txt: expected a text in UTF-8"),
        (["--similar", "topic3-wort7"], "there is no word 'topic3-wort7', but topic3-word7"),
        (["--load", "text.txt", "--similar", "one"], "expected a file that --save wrote"),
        (["--load", "text.txt"], "--load without --similar"),
        (["--load", "text.txt", "--save", "other"], "neither a text nor --save"),
        (["--save", "no/vectors"], "--save: there is no folder no"),
        (["--top", "0"], "--top is 0, expected at least 1"),
    ],
)
def test_skip_gram_says_what_is_wrong_before_it_trains(
    skip_gram, arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(skip_gram, "train", None)
    Path("text.txt").write_text("one two\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        skip_gram.main(arguments)
    assert message in capsys.readouterr().err


SMALL = ["--batch", "64", "--dim", "8", "--hidden", "16", "--max-rows", "1000", "--lr", "0.02"]


@pytest.mark.jit
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dlrm_learns_the_same_in_all_three_ways(dlrm_cpu, dtype, capsys):
    losses, seconds = dlrm_cpu.main([*SMALL, "--steps", "200", "--lookups", "3", "--dtype", dtype])
    assert losses.shape == (3, 200)
    assert seconds.shape == (3, 197, 4)
    assert losses[:, -20:].mean() < 0.95 * losses[:, :20].mean()
    rtol = 1e-6 if dtype == "float64" else 1e-3  # rounding, which 200 steps have made larger
    np.testing.assert_allclose(losses[1:], losses[[0, 0]], rtol=rtol)
    said = capsys.readouterr().out
    for part in ("forward", "backward", "sparse update", "dense update", "whole step"):
        assert part in said
    assert re.search(r"fused: \d+\.\d\d times as fast as torch.optim.SparseAdam", said)


@pytest.mark.jit
def test_dlrm_reads_criteos_format(dlrm_cpu, tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(64 * 5 + 7):
        numbers = [str(n) if n > -2 else "" for n in rng.integers(-3, 100, 13)]
        categories = [f"{n:08x}" if n else "" for n in rng.integers(0, 50, 26)]
        lines.append("\t".join([str(rng.integers(2)), *numbers, *categories]))
    file = tmp_path / "train[0].txt"  # a name, not a pattern
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "train0.txt").write_text("of another program\n", encoding="utf-8")
    losses, _ = dlrm_cpu.main([*SMALL, "--data", str(file), "--max-rows", "20", "--steps", "5"])
    assert losses.shape == (3, 5)
    assert np.isfinite(losses).all()
    said = capsys.readouterr().out
    assert "26 tables of 520 rows in all" in said
    assert "294 samples, 33 held out; batches of 64" in said


def avazu(dlrm_cpu, samples, *without):
    """A file like Avazu's whose clicks depend on the site; columns in another order, one of them unknown."""
    rng = np.random.default_rng(0)
    site = rng.integers(0, 4, samples)
    columns = {name: [f"{n:x}" for n in rng.integers(0, 30, samples)] for name in dlrm_cpu.AVAZU}
    columns["site_id"] = [f"site{n}" for n in site]
    columns["hour"] = [f"141021{n:02}" for n in rng.integers(0, 24, samples)]
    columns["click"] = (rng.random(samples) < np.array([0.05, 0.9, 0.1, 0.8])[site]).astype(int)
    columns["id"] = ["10000009418151094273"] * samples  # more than int64 holds
    names = [name for name in rng.permutation(list(columns)) if name not in without]
    lines = [",".join(map(str, line)) for line in zip(*(columns[name] for name in names), strict=True)]
    return "\n".join([",".join(names), *lines]) + "\n"


def areas_printed(said):
    return [float(area) for area in re.findall(r"^\S+ +(0\.\d{4}|nan)$", said, re.MULTILINE)]


@pytest.mark.jit
def test_dlrm_reads_avazus_columns_by_their_names_and_holds_out(dlrm_cpu, tmp_path, capsys):
    file = tmp_path / "train.csv"
    file.write_text(avazu(dlrm_cpu, 2000), encoding="utf-8")
    losses, _ = dlrm_cpu.main([*SMALL, "--data", str(file), "--steps", "120"])
    assert losses[:, -20:].mean() < 0.9 * losses[:, :20].mean()
    said = capsys.readouterr().out
    # hour is two numbers; 120 batches of 64 are more than there is, which is gone through several times
    assert "21 tables of 604 rows in all" in said
    assert "1,800 samples, 200 held out; batches of 64, 1 ids in a bag; 120 steps, 4.27 passes" in said
    areas = areas_printed(said)
    assert len(areas) == 3
    assert min(areas) > 0.75
    assert max(areas) < min(areas) + 0.01


@pytest.mark.jit
@pytest.mark.parametrize(("samples", "area"), [(2, 0), (25, 3)])
def test_dlrm_takes_a_small_sample(dlrm_cpu, samples, area, tmp_path, capsys):
    file = tmp_path / "sample.csv"
    file.write_text(avazu(dlrm_cpu, samples), encoding="utf-8")
    losses, _ = dlrm_cpu.main(["--data", str(file), "--dim", "4", "--steps", "5"])
    assert losses.shape == (3, 5)
    assert np.isfinite(losses).all()
    said = capsys.readouterr().out
    assert f"batches of {samples - math.ceil(samples / 10)}," in said
    assert np.count_nonzero(np.isfinite(areas_printed(said))) == area


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=12))
def test_the_area_under_the_curve_is_that_of_its_definition(drawn):
    need("torch")
    with pytest.MonkeyPatch.context() as monkeypatch:
        dlrm_cpu = example("dlrm_cpu", monkeypatch)
    labels, scores = np.array([[*pair] for pair in drawn], np.float32).reshape(-1, 2).T
    pairs = [(s > t) + (s == t) / 2 for s in scores[labels == 1] for t in scores[labels == 0]]
    expected = np.mean(pairs) if pairs else np.nan
    np.testing.assert_allclose(dlrm_cpu.area_under_curve(labels, scores), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.txt"], "--data: there is no file missing.txt"),
        (["--steps", "3"], "--steps is 3, expected at least 4"),
        (["--hold-out", "1"], "--hold-out is 1.0, expected 0 <= share < 1"),
    ],
)
def test_dlrm_says_what_is_wrong(dlrm_cpu, arguments, message, capsys):
    with pytest.raises(SystemExit):
        dlrm_cpu.main([*SMALL, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3\n" * 1000, "expected a label, 13 integers and 26 categories"),
        ("", "expected a label, 13 integers and 26 categories"),
        ("1" + "\t" * 39 + "\n", "holds 1 samples, expected at least 2"),
    ],
)
def test_dlrm_refuses_a_file_in_another_format(dlrm_cpu, text, message, tmp_path, capsys):
    file = tmp_path / "train.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        dlrm_cpu.main([*SMALL, "--data", str(file)])
    assert message in capsys.readouterr().err


def test_dlrm_names_a_column_that_avazus_data_lack(dlrm_cpu, tmp_path, capsys):
    file = tmp_path / "train.csv"
    file.write_text(avazu(dlrm_cpu, 50, "device_ip"), encoding="utf-8")
    with pytest.raises(SystemExit):
        dlrm_cpu.main([*SMALL, "--data", str(file)])
    assert "device_ip" in capsys.readouterr().err


def some_samples(machine, rng, features=7):
    """Samples of one to four features, which may repeat."""
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 5, 6))])
    ids, x = rng.integers(0, features, offsets[-1]), rng.normal(size=offsets[-1])
    model = machine.FactorizationMachine(features, 3, lr=0.1, reg=0.3, dtype=np.float64)
    for parameters in (model.bias, model.linear, model.factors):
        parameters[...] = rng.normal(size=parameters.shape)
    return model, machine.Samples(offsets, ids, x, rng.normal(size=6))


def predicted(model, samples):
    """Rendle's equation 1, pair by pair."""
    predictions = []
    for first, last in zip(samples.offsets[:-1], samples.offsets[1:], strict=True):
        ids, x = samples.ids[first:last], samples.x[first:last]
        pairs = [(i, j) for i in range(len(ids)) for j in range(i + 1, len(ids))]
        predictions.append(
            model.bias[0]
            + sum(model.linear[ids] * x)
            + sum(model.factors[ids[i]] @ model.factors[ids[j]] * x[i] * x[j] for i, j in pairs)
        )
    return np.array(predictions)


def test_the_factorization_machine_predicts_what_its_equation_says(machine):
    model, samples = some_samples(machine, np.random.default_rng(0))
    np.testing.assert_allclose(model.sums(samples)[1], predicted(model, samples), rtol=1e-12)


def dense(gradient, table):
    """A gradient as an array of its table's shape."""
    out = np.zeros_like(table)
    for each in gradient if isinstance(gradient, list) else [gradient]:
        if isinstance(each, RowGradient):
            np.add.at(out, each.rows, each.values)
        else:
            weights = each.weights.reshape(-1, *[1] * (table.ndim - 1))
            np.add.at(out, each.indices, np.repeat(each.grad_output, np.diff(each.offsets), 0) * weights)
    return out


def test_the_factorization_machines_gradients_are_the_differences_of_its_loss(machine):
    model, samples = some_samples(machine, np.random.default_rng(1))

    def loss():
        rows, weights = model.factors[samples.ids], model.linear[samples.ids]
        decay = model.reg * (np.sum(rows**2) + np.sum(weights**2))
        return (np.sum((predicted(model, samples) - samples.y) ** 2) + decay) / 2 / len(samples.y)

    gradients, errors = model.gradients(samples)
    np.testing.assert_allclose(errors, predicted(model, samples) - samples.y, rtol=1e-12)
    for name, gradient in gradients.items():
        table, differences = getattr(model, name), []
        for at in np.ndindex(table.shape):
            before, sides = table[at], []
            for side in (1e-5, -1e-5):
                table[at] = before + side
                sides.append(loss())
            table[at] = before
            differences.append((sides[0] - sides[1]) / 2e-5)
        np.testing.assert_allclose(dense(gradient, table).ravel(), differences, rtol=1e-7, atol=1e-8)


@pytest.mark.jit
def test_the_factorization_machine_finds_another_one(machine, capsys):
    errors = machine.main(["--epochs", "4", "--lr", "0.02", "--factors", "4"])
    assert errors.shape == (4, 2)
    said = capsys.readouterr().out
    assert "18,000 samples, 2,000 held out" in said
    constant = float(re.search(r"the mean's error (\S+)", said)[1])
    assert errors[-1, 1] < 0.2 * constant  # the noise alone is 0.04 of it


RATINGS = """userId,movieId,rating,timestamp
7,30,4.0,12
5,10,3.5,10
7,20,1.0,11
7,10,5.0,15
5,30,2.0,14
7,40,3.0,16
7,50,3.0,17
"""


@pytest.mark.jit
def test_the_factorization_machine_reads_ratings_in_the_order_of_time(machine, tmp_path, capsys):
    file = tmp_path / "ratings.csv"
    file.write_text(RATINGS, encoding="utf-8")
    samples, features = machine.read_ratings(str(file))
    # Users 5 and 7 are features 0 and 1, items 10 to 50 are 2 to 6, and 7 to 11 as those rated before.
    assert features == 12
    assert samples.y.tolist() == [3.5, 1.0, 4.0, 2.0, 5.0, 3.0, 3.0]
    bags = np.split(samples.ids, samples.offsets[1:-1])
    assert [bag.tolist() for bag in bags] == [
        [0, 2], [1, 3], [1, 4, 8], [0, 4, 7], [1, 2, 9, 8], [1, 5, 7, 9, 8], [1, 6, 10, 7, 9],
    ]  # fmt: skip
    third = 1 / np.float32(3)
    assert samples.x[-5:].tolist() == pytest.approx([1, 1, third, third, third])
    errors = machine.main([str(file), "--epochs", "2", "--hold-out", "0.3"])
    assert np.isfinite(errors).all()
    assert "4 samples, 3 held out, 12 features" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.csv"], "missing.csv: expected a header, and users, items, ratings and times"),
        (["words.csv"], "words.csv: expected a header, and users, items, ratings and times"),
        (["one.csv"], "got 1 samples"),
        (["--hold-out", "1.5"], "--hold-out 1.5, expected some to learn"),
    ],
)
def test_the_factorization_machine_says_what_is_wrong(
    machine, arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("words.csv").write_text("a,b,c,d\n1,2,good,3\n", encoding="utf-8")
    Path("one.csv").write_text("a,b,c,d\n1,2,3,4\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        machine.main(arguments)
    assert message in capsys.readouterr().err


A_FEW_DAYS = ["--days", "11", "--events", "2500", "--dim", "8", "--vocabulary", "3", "--keep", "4"]
FEWER = ["--days", "6", "--events", "300", "--dim", "4"]


@pytest.mark.jit
def test_the_online_recommender_forgets_and_still_knows_what_comes_next(online, tmp_path, capsys):
    need("matplotlib")
    history = online.main([*A_FEW_DAYS, "--out", str(tmp_path)])
    assert [each["day"] for each in history] == list(range(1, 11))
    last = {name: [each["models"][name] for each in history] for name in online.MODELS}
    rows = {name: [each["rows"] for each in of] for name, of in last.items()}
    assert np.all(np.less(rows["forgets"], rows["never forgets"]))
    assert rows["forgets"][-1] < 0.5 * rows["never forgets"][-1]
    assert np.all(np.diff(rows["never forgets"]) > 0)
    assert rows["fixed vocabulary"][2:] == [rows["never forgets"][2]] * 8
    recall = {name: np.mean([each["recall"] for each in of[-4:]]) for name, of in last.items()}
    popular = np.mean([each["popular"] for each in history[-4:]])
    assert min(recall["forgets"], recall["never forgets"]) > 1.1 * popular
    assert recall["fixed vocabulary"] < 0.9 * popular
    assert last["fixed vocabulary"][2] == last["never forgets"][2]  # the same till then
    said = capsys.readouterr().out
    assert said.endswith(f"{tmp_path / 'recall.png'}\n")
    assert len(re.findall(r"^ +\d+ +0\.\d{4} ", said, re.MULTILINE)) == 10
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.jit
def test_the_online_recommender_goes_on_after_a_kill_9(online, tmp_path, monkeypatch, capsys):
    program = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import online_recommender as online; "
        "online.FULL_EVERY = 2; online.main(sys.argv[1:])"
    )
    out = ["--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *FEWER, *out], stdout=subprocess.PIPE, text=True
    )
    with process:
        for line in process.stdout:
            if line.split()[0] == "4":  # the checkpoint of this day is written now
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL

    monkeypatch.setattr(online, "FULL_EVERY", 2)
    monkeypatch.setattr(online, "draw", lambda *_: None)
    through = online.main(FEWER)
    expected = capsys.readouterr().out
    assert online.main([*FEWER, *out]) == through
    first, _, rest = capsys.readouterr().out.partition("\n")
    assert re.match("goes on after day [34] of ", first)
    assert rest == expected
    with pytest.raises(SystemExit):
        online.main([*FEWER, *out, "--lr", "0.01"])
    assert "expected" in capsys.readouterr().err


def test_the_online_recommenders_gradients_are_the_differences_of_its_loss(online):
    rng = np.random.default_rng(0)
    x, y, often = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), rng.normal(size=5)
    ids = np.array([1, 2, 1, 3, 4])

    def loss(scores):
        total = 0.0
        for i, own in enumerate(scores):
            others = [np.exp(own[j] - often[j]) for j in range(5) if j == i or ids[j] != ids[i]]
            total -= own[i] - often[i] - np.log(np.sum(others))
        return total / 5

    differences = np.empty((5, 5))
    for at in np.ndindex(5, 5):
        change = np.zeros((5, 5))
        change[at] = 1e-5
        differences[at] = (loss(x @ y.T + change) - loss(x @ y.T - change)) / 2e-5
    np.testing.assert_allclose(online.softmax_errors(x, y, ids, often), differences, atol=1e-9)


@pytest.mark.jit
def test_the_online_recommenders_recall_is_that_of_its_definition(online):
    rng = np.random.default_rng(0)
    users, items = EmbeddingTable(3), EmbeddingTable(4)
    users.load(np.arange(10), rng.normal(size=(10, 3)).astype(np.float32))
    items.load(np.arange(60)[::-1], rng.normal(size=(60, 4)).astype(np.float32))
    asked = np.stack([rng.integers(12, size=200), rng.integers(70, size=200)], axis=1)  # some have no row
    y, hits = items.lookup(np.arange(60), train=False), 0
    for user, item in asked:
        x = np.append(users.lookup([user], train=False), np.float32(1))
        hits += item in np.argsort(-(y @ x))[:20]
    assert 0 < hits < 200
    assert online.recall(users, items, asked) == hits / 200
    assert online.recall(users, EmbeddingTable(4), asked) == 0


@pytest.mark.jit
def test_the_online_recommender_reads_ratings_in_the_order_of_time(online, tmp_path, capsys):
    file = tmp_path / "ratings.csv"
    file.write_text(RATINGS, encoding="utf-8")
    days = online.read_ratings(str(file), 3)
    assert [day.tolist() for day in days] == [
        [[5, 10], [7, 20], [7, 30]],
        [[5, 30], [7, 10]],
        [[7, 40], [7, 50]],
    ]
    history = online.main(["--data", str(file), "--days", "3", "--dim", "2"])
    assert [each["models"]["never forgets"]["rows"] for each in history] == [5, 5]
    assert "popular" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.csv"], "missing.csv: expected a header, and users, items, ratings and times"),
        (["--data", "words.csv"], "words.csv: expected a header, and users, items, ratings and times"),
        (["--data", "one.csv"], "one.csv holds 1 ratings, expected one for each day"),
        (["--data", "none.csv"], "none.csv holds 0 ratings"),
        (["--days", "1"], "--days is 1, expected at least 2"),
        (["--admission", "0"], "admission is 0, expected"),
        (["--lr", "-1"], "lr"),
    ],
)
def test_the_online_recommender_says_what_is_wrong(online, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("words", "1,2,good,then\n"), ("one", "1,2,3,4\n"), ("none", "")):
        Path(f"{name}.csv").write_text(f"a,b,c,d\n{text}", encoding="utf-8")
    with pytest.raises(SystemExit):
        online.main([*FEWER, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.jit
def test_a_shard_that_is_killed_leaves_no_dent_in_the_recall_on_a_server(tmp_path):
    for package in ("ray", "polars", "matplotlib"):
        need(package)
    pairs = generate(300, 150, 25).pairs
    file, out = tmp_path / "pairs.csv", tmp_path / "out"
    lines = [f"{user},{item}\n" for user, item in zip(pairs.users(), pairs.indices, strict=True)]
    file.write_text("user,item\n" + "".join(lines), encoding="utf-8")
    # With "sync" a step is the sum of both workers' parts, so that the numbers are those in process.
    options = ["--epochs", "5", "--dim", "8", "--seeds", "2", "--consistency", "sync", "--chaos"]
    said = subprocess.run(
        [sys.executable, EXAMPLES / "parameter_server_bpr.py", "--data", file, "--out", out, *options],
        env={**os.environ, "RAY_ADDRESS": "local"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    run = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert run["restarts"] == 1
    assert 2 < run["kill"]["epoch"] <= 5
    assert run["pushes"] == [run["steps"]] * 2
    assert len(run["server"]) == 5
    np.testing.assert_allclose(run["server"], run["in process"][0], atol=0.01)
    assert run["kill"]["after"] > 0.9 * run["kill"]["before"]  # with one shard empty, it is 0.6 of it
    assert run["server"][-1] > 2.5 * 20 / 150  # what chance would find
    assert "kill -9 of shard 1: recall" in said.stdout
    assert [each.name for each in sorted(out.iterdir())] == ["recall.png", "results.json"]
    assert (out / "recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("workers", [1, 3])
def test_the_gradients_that_workers_push_are_the_differences_of_the_loss(on_a_server, workers):
    split = hold_out(generate(12, 9, 4))
    options = BPROptions(loss="bpr", batch_size=7, dim=3, negatives=2, reg=0.3, threads=1)
    rng = np.random.default_rng(0)
    tables = {"user": rng.normal(size=(12, 3)), "item": rng.normal(size=(9, 3))}
    parts = [list(on_a_server.batches(split, options, 1, each, workers, True)) for each in range(workers)]
    steps = list(on_a_server.batches(split, options, 1))
    alone = [list(on_a_server.batches(split, options, 1, each, workers)) for each in range(workers)]
    assert sum(map(len, alone)) == len(steps) == len(parts[0])
    for k, batch in enumerate(steps):
        np.testing.assert_equal(alone[k % workers][k // workers], batch)

    def loss():
        users, items = (tables[name][batch.ids[name]] for name in ("user", "item"))
        own, others = items[: len(users)], items[len(users) :].reshape(len(users), 2, 3)
        total = 0.0
        for user, item, each in zip(users, own, others, strict=True):
            for other in each:
                total += np.logaddexp(0, user @ other - user @ item)
                total += 0.3 / 2 * (user @ user + item @ item + other @ other)
        return total / (2 * len(users))

    batch = steps[0]
    for name, table in tables.items():
        found, differences = np.zeros_like(table), np.zeros_like(table)
        for part in (each[0] for each in parts):  # what the workers push adds up to the step's
            vectors = {each: tables[each][part.ids[each]] for each in tables}
            np.add.at(found, *on_a_server.gradients(vectors, part, options)[name])
        for at in np.ndindex(table.shape):
            before, sides = table[at], []
            for side in (1e-5, -1e-5):
                table[at] = before + side
                sides.append(loss())
            table[at] = before
            differences[at] = (sides[0] - sides[1]) / 2e-5
        np.testing.assert_allclose(found, differences, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.csv"], "missing.csv"),
        (["--workers", "0"], "--workers is 0, expected at least 1"),
        (["--consistency", "-2"], "expected async, sync, or by how many steps one may be ahead"),
        (["--dim", "0"], "dim: expected an integer of at least 1"),
    ],
)
def test_the_recommender_on_a_server_says_what_is_wrong(on_a_server, arguments, message, capsys):
    with pytest.raises(SystemExit):
        on_a_server.main(arguments)
    assert message in capsys.readouterr().err
