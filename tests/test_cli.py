# SPDX-License-Identifier: Apache-2.0
"""The command line, as people use it."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from needs import need
from project import pyproject

from nb_sparse_adam import __main__
from nb_sparse_adam.__main__ import main
from nb_sparse_adam._src import extras, info
from nb_sparse_adam._src.engine import compilations
from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.recommender import report, training_command
from nb_sparse_adam._src.recommender.interactions import generate
from nb_sparse_adam._src.warming import WarmUp
from nb_sparse_adam.recommender import BPRModel

ROOT = Path(__file__).parents[1]
FILES = {"embeddings.safetensors", "users.csv", "items.csv", "metrics.json", "history.csv", "training.png"}
FILES |= {
    "recommendations.html",
    "manifest.json",
}  # of a checkpoint; its others are numbered
NUMBERED = re.compile(r"(table-\d-|interactions-)[0-9a-f]{16}\.")


@pytest.fixture
def ratings(tmp_path):
    for package in extras.EXTRAS["train"]:
        need(package)
    pairs = generate(60, 40, 8.0, seed=2).pairs
    path = tmp_path / "ratings.csv"
    lines = [f"{user + 100},i{item},5\n" for user, item in zip(pairs.users(), pairs.indices, strict=True)]
    path.write_text("userId,movieId,rating\n" + "".join(lines))
    return path


def options(out, *more):
    return [
        "--dim",
        "4",
        "--epochs",
        "3",
        "--batch-size",
        "64",
        "--eval-every",
        "2",
        "--out",
        str(out),
        *more,
    ]


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def load_metrics(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((path / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_train(ratings, tmp_path, capsys):
    from safetensors.numpy import load_file

    out = tmp_path / "deep" / "run"
    assert main(["train", str(ratings), *options(out, "--top", "5", "--seed", "7")]) == 0
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir() if not NUMBERED.match(path.name)} == FILES

    tables = load_file(out / "embeddings.safetensors")
    users, items = read_csv(out / "users.csv"), read_csv(out / "items.csv")
    assert tables["user"].shape == (len(users), 4)
    assert tables["item"].shape == (len(items), 4)
    assert tables["user"].dtype == tables["item"].dtype == np.float32
    assert [row["id"] for row in users] == [str(user) for user in range(100, 160)]
    assert [row["id"] for row in items] == sorted(row["id"] for row in items)
    assert [int(row["row"]) for row in items] == list(range(len(items)))

    metrics = load_metrics(out)
    history = read_csv(out / "history.csv")
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    assert [bool(row["recall@5"]) for row in history] == [False, True, True]
    assert metrics["recall@5"] == float(history[-1]["recall@5"])
    assert metrics["ndcg@5"] == float(history[-1]["ndcg@5"])
    assert metrics["loss"] == float(history[-1]["loss"])
    assert metrics["epochs"] == 3
    assert metrics["seconds_per_epoch"] == sorted(float(row["seconds"]) for row in history)[1]
    assert metrics["interrupted"] is False
    assert metrics["options"]["seed"] == 7
    assert metrics["options"]["betas"] == [0.9, 0.999]
    assert metrics["versions"]["numpy"] == np.__version__
    assert metrics["data"]["users"] == 60
    assert 0 < metrics["popularity"]["recall@5"] < 1

    assert f"recall@5 {metrics['recall@5']:.4f}" in said
    assert f"popularity ranking: recall@5 {metrics['popularity']['recall@5']:.4f}" in said
    assert f"{metrics['recall@5'] / metrics['popularity']['recall@5']:.2f}x" in said
    assert str(out) in said
    assert "GENERATED" not in said
    png = (out / "training.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000


def test_same_seed_same_files(ratings, tmp_path, capsys):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["train", str(ratings), *options(tmp_path / name, "--seed", seed)]) == 0
    capsys.readouterr()
    one, same, other = ((tmp_path / name / "embeddings.safetensors").read_bytes() for name in "abc")
    assert one == same
    assert one != other


def test_the_order_of_the_lines_does_not_matter(ratings, tmp_path, capsys):
    header, *lines = ratings.read_text().splitlines()
    turned = tmp_path / "turned.csv"
    turned.write_text("\n".join([header, *reversed(lines)]))
    for name, path in (("a", ratings), ("b", turned)):
        assert main(["train", str(path), *options(tmp_path / name)]) == 0
    capsys.readouterr()
    one, same = ((tmp_path / name / "embeddings.safetensors").read_bytes() for name in "ab")
    assert one == same


def test_a_test_file_and_formats(tmp_path, capsys):
    need("polars")
    (tmp_path / "train.txt").write_text("0 0 1 2\n1 1 2\n2 0 3\n3\n")
    (tmp_path / "test.txt").write_text("0 3\n1 0 3\n2 1\n")
    arguments = ["--test", str(tmp_path / "test.txt"), "--format", "adjacency"]
    assert main(["train", str(tmp_path / "train.txt"), *options(tmp_path / "run", *arguments)]) == 0
    said = capsys.readouterr().out
    assert "7 interactions to train on, 4 to predict" in said
    metrics = load_metrics(tmp_path / "run")
    assert metrics["users_evaluated"] == 3
    assert metrics["recall@20"] == 1  # there are four items


def test_repeated_pairs_and_users_with_every_item_are_reported(tmp_path, capsys):
    need("polars")
    path = tmp_path / "a.csv"
    path.write_text("u,x\nu,x\nv,y\nw,x\nw,y\n")
    given = options(tmp_path / "run", "--test-fraction", "0.1", "--loss", "bpr")
    assert main(["train", str(path), *given]) == 0
    said = capsys.readouterr().out
    assert "1 repeated (user, item) pairs were used once" in said
    assert "2 interactions are not trained on" in said
    assert "unknown: no user has both" in said
    metrics = load_metrics(tmp_path / "run")
    assert metrics["recall@20"] is None
    assert metrics["popularity"]["ndcg@20"] is None
    assert metrics["data"]["trained_on"] == 2


def test_generated_data_are_called_that(tmp_path, capsys, monkeypatch):
    need("safetensors")
    need("matplotlib")
    monkeypatch.setattr(training_command, "generate", lambda seed: generate(50, 30, 6.0, seed=seed))
    monkeypatch.setitem(sys.modules, "polars", None)  # which is not needed for it
    assert main(["train", *options(tmp_path)]) == 0
    assert "GENERATED" in capsys.readouterr().out
    assert load_metrics(tmp_path)["data"]["generated"] is True


# --- what is refused --------------------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "--dim": "0",
    "--epochs": "1.5",
    "--batch-size": "-3",
    "--lr": "0",
    "--reg": "-0.001",
    "--negatives": "0",
    "--init-std": "nan",
    "--seed": "-1",
    "--top": "0",
    "--eval-every": "-1",
    "--eps": "inf",
    "--threads": "none",
    "--test-fraction": "1",
    "--step-counts": "rows",
    "--format": "csv",
}


@pytest.mark.parametrize(("flag", "value"), BAD_ARGUMENTS.items())
def test_bad_arguments(flag, value, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "nothing.csv", flag, value])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {flag}: " in error
    assert repr(value) in error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--betas", "0.9", "1"], "--betas"),
        (["--betas", "0.9"], "--betas"),
        (["a.csv", "--test", "b.csv", "--test-fraction", "0.5"], "not allowed with"),
        (["--test", "b.csv"], "needs INTERACTIONS"),
        (["--format", "parquet"], "needs INTERACTIONS"),
        (["--no-header"], "--header needs INTERACTIONS"),
        (["--min-rating", "nan", "a.csv"], "--min-rating"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_combinations(arguments, word, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *arguments])
    assert caught.value.code == 2
    assert word in capsys.readouterr().err


def test_what_only_the_optimizer_refuses_is_a_usage_error_too(ratings, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", str(ratings), *options(tmp_path / "run", "--eps", "1e-60")])
    assert caught.value.code == 2
    assert "eps" in capsys.readouterr().err


def test_bad_files(tmp_path, capsys, ratings):
    assert main(["train", str(tmp_path / "nothing.csv"), *options(tmp_path / "run")]) == 1
    assert "nothing.csv: cannot be read: No such file" in capsys.readouterr().err
    assert main(["train", str(ratings), *options(ratings)]) == 1  # --out is a file
    assert "ratings.csv" in capsys.readouterr().err
    assert main(["train", str(ratings), *options(tmp_path / "run", "--lr", "1e30")]) == 1
    assert "diverged" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["polars", "safetensors.numpy", "matplotlib.figure"])
def test_a_missing_package_is_named_before_the_work(package, ratings, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["train", str(ratings), *options(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert package.partition(".")[0] in said.err
    assert 'pip install "nb_sparse_adam[train]"' in said.err
    assert "popularity" not in said.out


def test_help_has_the_default_of_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    flags = (
        "--test --test-fraction --dim --epochs --batch-size --lr --reg --negatives --init-std --seed --top "
        "--eval-every --step-counts --eps-hat --betas --eps --threads --out --format"
    ).split()
    places = sorted(
        ([found.start() for found in re.finditer(rf" {flag}[ ,]", text)][-1], flag) for flag in flags
    )
    for (start, flag), (end, _) in zip(places, [*places[1:], (len(text), "")], strict=True):
        assert "(default: " in text[start:end], flag
    assert "None" not in text


# --- Ctrl-C -----------------------------------------------------------------------------------------------


def wait_for(process, word):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError(f"{word!r} was never said: {lines}; {process.stderr.read()}")


@pytest.mark.jit
@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
def test_ctrl_c_saves_what_there_is(ratings, tmp_path):
    from safetensors.numpy import load_file

    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "nb_sparse_adam",
        "train",
        str(ratings),
        *options(out, "--epochs", "1000000"),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        try:
            wait_for(process, "epoch   4 ")
            process.send_signal(signal.SIGINT)
            said, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, error
    assert str(out) in said
    assert "interrupted after" in said
    assert {path.name for path in out.iterdir() if not NUMBERED.match(path.name)} == FILES
    metrics = load_metrics(out)
    assert metrics["interrupted"] is True
    assert 4 <= metrics["epochs"] < 1000000
    assert 0 <= metrics["recall@20"] <= 1
    assert len(read_csv(out / "history.csv")) == metrics["epochs"]
    assert np.isfinite(load_file(out / "embeddings.safetensors")["user"]).all()


def test_an_interrupt_before_the_training_saves_nothing(ratings, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_command, "read_given", interrupt)
    assert main(["train", str(ratings), *options(tmp_path / "run")]) == 130
    assert "nothing was saved" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []


def test_a_second_interrupt_leaves_whole_files(ratings, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert main(["train", str(ratings), *options(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    replace = os.replace

    def interrupt(source, target):
        if Path(target).name == "items.csv":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(report.os, "replace", interrupt)
    assert main(["train", str(ratings), *options(out, "--seed", "9", "--overwrite")]) == 130
    assert "interrupted again" in capsys.readouterr().err
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.keys() == before.keys()  # nothing temporary is left
    assert after["embeddings.safetensors"] != before["embeddings.safetensors"]
    assert after["items.csv"] == before["items.csv"]


# --- compiling ----------------------------------------------------------------------------------------------


@pytest.mark.jit
@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_a_compilation_is_told_on_stderr(ratings, tmp_path, capsys, monkeypatch, on_a_terminal):
    fit = BPRModel.fit

    def compiling(*arguments):
        @jit(entry=True, announced="what is new")
        def new(x):
            return x + 1

        assert new(1) == 2
        return fit(*arguments)

    terminal = Terminal()
    if on_a_terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compilations, "_announced", False)
    monkeypatch.setattr(BPRModel, "fit", compiling)
    before = compilations.LOGGER.level, list(compilations.LOGGER.handlers)
    assert main(["train", str(ratings), *options(tmp_path / "run")]) == 0
    assert (compilations.LOGGER.level, compilations.LOGGER.handlers) == before
    said = terminal.text if on_a_terminal else capsys.readouterr().err
    assert said.count("compiling ") == 1
    assert f"compiling what is new, once on this machine, for it is kept in {tmp_path / 'cache'}" in said


def test_warming_up_is_refused_where_nothing_can_be_kept(capsys, monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 0)
    monkeypatch.setattr(info, "cache_folder", lambda: None)
    assert main(["warm-up"]) == 1
    said = capsys.readouterr()
    assert "NUMBA_CACHE_DIR" in said.err
    assert said.out == ""


def test_a_disk_that_keeps_nothing_is_an_error_of_warming_up(capsys, monkeypatch):
    given = []

    def full(*arguments):
        given.append(arguments)
        return WarmUp(3, 1, 2.0, "somewhere")

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 0)
    monkeypatch.setattr(info, "cache_folder", lambda: "somewhere")
    monkeypatch.setattr(__main__, "warm_up", full)
    assert (
        main(["warm-up", "--dtype", "float64", "--step-counts", "row", "global", "--gradients", "csr"]) == 1
    )
    said = capsys.readouterr()
    assert given == [("float64", "row", ["csr"]), ("float64", "global", ["csr"])]
    assert "float64, row counts: 3 kernels compiled, 2.0 s" in said.out
    assert "4 kernels were compiled, but not written to somewhere" in said.err


@pytest.mark.parametrize(("flag", "value"), [("--dtype", "float16"), ("--step-counts", "rows")])
def test_kinds_that_there_are_not_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["warm-up", flag, value])
    assert caught.value.code == 2
    assert value in capsys.readouterr().err


# --- progress and info ------------------------------------------------------------------------------------


class Terminal:
    """A stderr that says it is a terminal."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("more", [[], ["--no-progress"]])
def test_a_bar_on_a_terminal_only_if_wanted(ratings, tmp_path, capsys, monkeypatch, more):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["train", str(ratings), *options(tmp_path / "run", *more)]) == 0
    assert capsys.readouterr().out.count("epoch   2  loss") == 1
    if more:
        assert terminal.text == ""
    else:
        assert "interactions/s" in terminal.text
        assert re.search(r", loss [0-9]\.\d{4}", terminal.text)


def test_info(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for name, version in info.versions().items():
        assert re.search(rf"^{name} +{re.escape(version)}$", said, re.MULTILINE)
    assert re.search(r"^threading layer +(omp|tbb|workqueue|none)", said, re.MULTILINE)
    assert re.search(r"^kernel cache +\S", said, re.MULTILINE)
    for extra in extras.EXTRAS:
        assert re.search(rf"^extra {extra} +(usable|NOT usable)", said, re.MULTILINE)


def test_info_says_why_an_extra_does_not_work_and_what_mends_it(capsys, monkeypatch):
    def broken(name, *arguments, **more):
        if name.partition(".")[0] == "tqdm":
            raise OSError("libfoo.so is gone")
        return real(name, *arguments, **more)

    real = extras.importlib.import_module
    monkeypatch.setattr(extras.importlib, "import_module", broken)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert re.search(r'^extra train +NOT usable: pip install "nb_sparse_adam\[train\]"$', said, re.MULTILINE)
    assert "tqdm: OSError: libfoo.so is gone" in said
    assert re.search(r"^ +safetensors: .*safetensors", said, re.MULTILINE)


def test_the_registry_of_extras_is_the_projects():
    declared = pyproject()["project"]["optional-dependencies"]

    def packages(extra):
        names = [re.match(r"[\w.-]+(\[[\w,]+\])?", line)[0] for line in declared[extra]]
        nested = [re.search(r"\[(.*)\]", name)[1] for name in names if name.startswith("nb-sparse-adam[")]
        own = {name.partition("[")[0] for name in names if not name.startswith("nb-sparse-adam[")}
        return own.union(*(packages(one) for several in nested for one in several.split(",")))

    for extra, registered in extras.EXTRAS.items():
        assert set(registered) == packages(extra)


def test_importing_the_library_imports_none_of_this():
    program = (
        "import sys, nb_sparse_adam; "
        "late = ('polars', 'safetensors', 'matplotlib', 'tqdm', 'torch', 'nb_sparse_adam.recommender', "
        "'nb_sparse_adam._src.recommender.reading', 'nb_sparse_adam._src.extras'); "
        "print([name for name in late if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_is_no_error(unbuffered):
    read, write = os.pipe()
    os.close(read)  # as `head` does when it has its lines
    done = subprocess.run(
        [sys.executable, "-m", "nb_sparse_adam", "info"],
        stdout=write, stderr=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
