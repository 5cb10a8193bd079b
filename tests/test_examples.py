# SPDX-License-Identifier: Apache-2.0
"""The examples do what they say."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from needs import need

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


@pytest.mark.jit
def test_skip_gram_finds_the_words_of_a_topic(skip_gram):
    names, vectors, losses = skip_gram.main(["--threads", "1"])
    assert losses[-1] < 0.8 * losses[0]
    topics = np.array([name.partition("-")[0] for name in names])
    near = skip_gram.nearest(vectors, 5)
    assert (topics[near] == topics[:, None]).mean() > 0.95


@pytest.mark.jit
def test_skip_gram_reads_a_text(skip_gram, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 20 + "rare words\n", encoding="utf-8")
    names, _, losses = skip_gram.main([str(text), "--epochs", "2", "--dim", "8", "--threads", "1"])
    assert names == ["cat", "mat", "on", "sat", "the"]
    assert losses[1] < losses[0]
    assert "epoch 2" in capsys.readouterr().out


def test_skip_gram_refuses_a_text_without_words(skip_gram, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("one two\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        skip_gram.main([str(text)])
    assert "no word five times" in capsys.readouterr().err


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
    losses, _ = dlrm_cpu.main([*SMALL, "--data", str(file), "--max-rows", "20"])
    assert losses.shape == (3, 5)
    assert np.isfinite(losses).all()
    assert "26 tables of 520 rows in all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "missing.txt"], "--data: there is no file missing.txt"),
        (["--steps", "3"], "got 3 batches of 64, expected at least 4"),
    ],
)
def test_dlrm_says_what_is_wrong(dlrm_cpu, given, message, capsys):
    with pytest.raises(SystemExit):
        dlrm_cpu.main([*SMALL, *given])
    assert message in capsys.readouterr().err


def test_dlrm_refuses_a_file_in_another_format(dlrm_cpu, tmp_path, capsys):
    file = tmp_path / "train.csv"
    file.write_text("1,2,3\n" * 1000, encoding="utf-8")
    with pytest.raises(SystemExit):
        dlrm_cpu.main([*SMALL, "--data", str(file)])
    assert "expected a label, 13 integers and 26 categories" in capsys.readouterr().err
