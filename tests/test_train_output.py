# SPDX-License-Identifier: Apache-2.0
"""What ``nb-sparse-adam train`` writes: whose files it replaces, and names and ids that are odd."""

import csv
import io
import json
import os
import re
import sys

import pytest
from needs import need

from nb_sparse_adam.__main__ import main
from nb_sparse_adam._src import extras
from nb_sparse_adam._src.recommender import training_command

for _package in extras.EXTRAS["train"]:
    need(_package)

NAMES = ["embeddings.safetensors", "users.csv", "items.csv", "metrics.json", "history.csv", "training.png"]
NAMES += [
    "recommendations.html",
    "manifest.json",
]  # of a checkpoint; its others are numbered
NUMBERED = re.compile(r"(table-\d-|interactions-)[0-9a-f]{16}\.")


@pytest.fixture
def train(tmp_path):
    def train(*more, source="ratings.csv", out="run"):
        (tmp_path / source).write_bytes(b"".join(b"=%d,@%d\n" % (at % 7, at % 11) for at in range(60)))
        quick = ["--dim", "2", "--epochs", "1", "--no-progress", "--out", str(tmp_path / out)]
        return main(["train", str(tmp_path / source), *quick, *more])

    return train


# --- whose files ------------------------------------------------------------------------------------------

OTHERS = {
    "embeddings.safetensors": b'@\0\0\0\0\0\0\0{"weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    "users.csv": b"id,name\n1,Zoe\n",
    "items.csv": b"row;id\n",
    "metrics.json": b'{"accuracy": 0.9}\n',
    "manifest.json": b'{"name": "an app"}\n',
    "recommendations.html": b"<html><body>a page of mine",
    "history.csv": b"epoch,loss\n1,0.5\n",
    "training.png": b"\x89PNG\r\n\x1a\n of another program",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_somebody_else_is_not_written_over(name, train, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_bytes(OTHERS[name])
    (run / "notes.txt").write_bytes(b"mine")
    assert train() == 1
    said = capsys.readouterr()
    assert said.out == ""  # before the work
    assert said.err.startswith(f"error: {run / name}: is in the way")
    assert said.err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in run.iterdir()} == {
        name: OTHERS[name],
        "notes.txt": b"mine",
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_not_written_over(name, train, tmp_path, capsys):
    (tmp_path / "run" / name).mkdir(parents=True)
    assert train() == 1
    assert f"{name}: is in the way" in capsys.readouterr().err


def test_an_earlier_run_is_replaced_even_if_it_is_not_complete(train, tmp_path, capsys):
    run = tmp_path / "run"
    for missing in ([], NAMES[3:], NAMES[1:]):
        assert train("--seed", "1", "--overwrite") == 0
        for name in missing:
            (run / name).unlink()
        (run / "notes.txt").write_bytes(b"mine")
        assert train("--seed", "2", "--overwrite") == 0, capsys.readouterr().err
        names = [path.name for path in run.iterdir() if not NUMBERED.match(path.name)]
        assert sorted(names) == sorted([*NAMES, "notes.txt"])
        assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["options"]["seed"] == 2
    (run / "users.csv").write_bytes(b"")
    assert train("--overwrite") == 0


@pytest.mark.parametrize("name", ["bench.json", "bench.png"])
def test_bench_does_not_write_over_files_of_somebody_else_either(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"{}")
    assert main(["bench", "--peers", "none", "--quick", "--out", str(tmp_path)]) == 1
    assert f"{name}: is in the way" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == b"{}"


# --- names and ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_cannot_show_a_name(encoding, train, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert train(source="données.csv", out="ordner-ü") == 0
    terminal.flush()
    said = terminal.buffer.getvalue().decode(encoding)
    assert ("donn\\xe9es.csv" if encoding == "ascii" else "données") in said
    assert "metrics.json" in said
    assert terminal.errors == "strict"  # as it was
    metrics = json.loads((tmp_path / "ordner-ü" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["data"]["description"].startswith("données.csv, ")


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere take UTF-8 names only")
def test_a_name_that_is_not_utf_8(train, tmp_path, capsys):
    name = os.fsdecode(b"\xe9\n.csv")
    assert train(source=name) == 0
    assert "'\\udce9\\n.csv', delimited text" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["data"]["description"].startswith("'\\udce9\\n.csv', ")


def test_a_name_with_dollars_is_no_formula(train, tmp_path):
    assert train(source=r"$\no$.csv") == 0
    assert (tmp_path / "run" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_ids_are_written_as_they_came(train, tmp_path):
    assert train() == 0
    for name, mark, n in (("users.csv", "=", 7), ("items.csv", "@", 11)):
        with (tmp_path / "run" / name).open(newline="", encoding="utf-8") as file:
            ids = [row["id"] for row in csv.DictReader(file)]
        assert ids == sorted(f"{mark}{at}" for at in range(n))


# --- what goes wrong --------------------------------------------------------------------------------------


def test_too_little_memory_is_an_error_in_one_line(train, capsys, monkeypatch):
    def too_large(*_):
        raise MemoryError("Unable to allocate 7 TiB")

    monkeypatch.setattr(training_command, "BPRModel", too_large)
    assert train() == 1
    assert capsys.readouterr().err == (
        "error: there is not enough memory: Unable to allocate 7 TiB; a smaller --dim takes less\n"
    )


def test_a_bad_file_is_an_error_in_one_line(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_bytes(b'1,2\n3,"4\n5,6\n')
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == (
        f"error: {path}, line 2: a quote opens that is not closed as it should be (line 3: unexpected end of "
        f"data); expected quotes around a whole field, and those within it twice\n"
    )
