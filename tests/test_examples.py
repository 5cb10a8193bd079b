"""The examples do what they say."""

import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def skip_gram(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "skip_gram", raising=False)
    import skip_gram

    return skip_gram


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
