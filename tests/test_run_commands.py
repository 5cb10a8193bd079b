# SPDX-License-Identifier: Apache-2.0
"""``nb-sparse-adam recommend``, ``similar``, ``evaluate`` and ``export``, and indexes of other libraries."""

import json
import re
import sys

import numpy as np
import pytest
from needs import need

from nb_sparse_adam.__main__ import main
from nb_sparse_adam._src.recommender import index
from nb_sparse_adam.errors import MissingExtraError, OptionError
from nb_sparse_adam.recommender import MatrixFactorization, generate


@pytest.fixture(scope="module")
def model():
    return MatrixFactorization(dim=8, epochs=3, batch_size=128).fit(generate(120, 60, 9.0))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A run whose ids are strings."""
    folder = tmp_path_factory.mktemp("named")
    MatrixFactorization(dim=4, epochs=1).fit((["ä", "b", "b"], ["x", "x", "y"])).save(folder)
    return str(folder)


def test_recommend_prints_what_the_model_recommends(model, run, capsys):
    assert main(["recommend", run, "--user", "3", "7", "--top", "4", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ids, scores = model.recommend([3, 7], k=4)
    assert [one["user"] for one in lines] == [3, 7]
    assert [[each["item"] for each in one["items"]] for one in lines] == ids.tolist()
    assert [[each["score"] for each in one["items"]] for one in lines] == scores.tolist()
    assert main(["recommend", run, "--user", "3", "--top", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "user 3:"
    assert [line.split()[2] for line in out[1:]] == [str(i) for i in ids[0, :2]]


def test_candidates_and_what_was_seen(model, run, capsys):
    seen = model.item_ids_[model._trained.indices[model._trained.indptr[3]]]
    assert main(["recommend", run, "--user", "3", "--item", str(seen)]) == 0
    assert capsys.readouterr().out == "user 3: nothing is left\n"
    assert main(["recommend", run, "--user", "3", "--item", str(seen), "--include-seen"]) == 0
    assert capsys.readouterr().out.split()[-1] == str(seen)


def test_similar_prints_neighbours(model, run, named, capsys):
    assert main(["similar", run, "--item", str(model.item_ids_[5]), "--json", "--top", "3"]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    ids, cosines = model.similar_items(model.item_ids_[5], k=3)
    assert [each["item"] for each in line["items"]] == ids.tolist()
    assert [each["cosine"] for each in line["items"]] == cosines.tolist()
    assert main(["similar", named, "--item", "x"]) == 0
    assert capsys.readouterr().out.split()[-1] == "y"


@pytest.fixture
def titles(model, tmp_path):
    """Titles of all items but the first."""
    path = tmp_path / "movies.csv"
    lines = (f'{i},"The {i}th, a\nfilm",x\n' for i in model.item_ids_[1:])
    path.write_text("movieId,title,genres\n" + "".join(lines))
    return str(path)


def test_titles_stand_beside_ids(model, run, titles, capsys):
    first, other = model.item_ids_[:2].tolist()

    def title_of(item):
        return None if item == first else f"The {item}th, a\nfilm"

    ask = ["recommend", run, "--user", "3", "--top", "60", "--include-seen", "--titles", titles]
    assert main([*ask, "--json"]) == 0
    items = json.loads(capsys.readouterr().out)["items"]
    assert len(items) == len(model.item_ids_)
    assert [one["title"] for one in items] == [title_of(one["item"]) for one in items]
    assert main(ask) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "user 3:"
    for line, one in zip(lines[1:], items, strict=True):
        shown = "" if one["item"] == first else f"  The {one['item']}th, a film"  # in one line
        assert line.endswith(f"  {one['item']}{shown}")
    for item in (first, other):
        assert main(["similar", run, "--item", str(item), "--top", "2", "--titles", titles, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["item"], answer["title"]) == (item, title_of(item))
        assert [one["title"] for one in answer["items"]] == [title_of(one["item"]) for one in answer["items"]]
        assert main(["similar", run, "--item", str(item), "--top", "2", "--titles", titles]) == 0
        head = capsys.readouterr().out.splitlines()[0]
        assert head == f"item {item}:" if item == first else f"item {item}  The {item}th, a film:"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "movieId,title\nx7,Alien\n",
            "titles of none of the .* items of the run, such as '0'; .* such as 'x7'",
        ),
        ("movieId,title\n", "titles of none of the .*, of which it has none"),
        ("Alien\n", "expected a header, and columns of ids and of titles"),
        (None, "No such file"),
    ],
)
def test_titles_of_something_else_are_refused(content, message, run, tmp_path, capsys):
    path = tmp_path / "titles.csv"
    if content is not None:
        path.write_text(content)
    for ask in (["recommend", run, "--user", "3"], ["similar", run, "--item", "1"]):
        assert main([*ask, "--titles", str(path)]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert str(path) in said.err
        assert re.search(message, said.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recommend", "RUN", "--user", "99999"], "fold_in"),
        (["recommend", "RUN", "--user", "bob"], "ids of this run are integers"),
        (["recommend", "RUN/nowhere", "--user", "1"], "nowhere"),
        (["similar", "RUN", "--item", "-1"], "was trained with"),
    ],
)
def test_what_cannot_be_answered_says_why(run, arguments, message, capsys):
    assert main([each.replace("RUN", run) for each in arguments]) == 1
    assert message in capsys.readouterr().err


def test_evaluate_prints_the_quality(model, run, named, tmp_path, capsys):
    need("polars")
    test = tmp_path / "test.csv"
    test.write_text("user,item\n" + "".join(f"{u},{i}\n" for u in range(50) for i in (1, 2)) + "777,1\n")
    assert main(["evaluate", run, str(test), "--top", "5", "--json"]) == 0
    users = [u for u in range(50) for _ in (1, 2)]
    expected = model.evaluate((users, [1, 2] * 50), k=5)
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected)
    swapped = tmp_path / "swapped.txt"
    swapped.write_text("".join(f"{i}|{u}\n" for u in range(50) for i in (1, 2)))
    read = ["--item-column", "1", "--user-column", "2", "--separator", "|", "--no-header"]
    assert main(["evaluate", run, str(swapped), "--top", "5", "--json", *read]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected)
    assert main(["evaluate", run, str(test)]) == 0
    out = capsys.readouterr().out
    assert "50 of 51 users were there in training" in out
    assert "coverage@20" in out
    assert main(["evaluate", named, str(test)]) == 1
    assert "are integers, those of the run are strings" in capsys.readouterr().err


def test_vectors_are_exported_to_parquet(model, run, tmp_path, capsys):
    pl = need("polars")
    assert main(["export", run, "--to", "parquet", "--out", str(tmp_path)]) == 0
    frame = pl.read_parquet(tmp_path / "items.parquet")
    assert frame["id"].to_list() == model.item_ids_.tolist()
    assert np.array(frame["vector"].to_list(), np.float32).tobytes() == model.item_factors_.tobytes()
    assert "users.parquet: 120 vectors of 8" in capsys.readouterr().out


# --- indexes of other libraries ---------------------------------------------------------------------------


class Nearest:
    """A library whose index searches exactly, by distance."""

    def __init__(self, items):
        self.items = items

    def search(self, queries, k):
        distances = ((queries[:, None] - self.items) ** 2).sum(2)
        return np.argsort(distances, axis=1, kind="stable")[:, :k]


@pytest.fixture
def exact(monkeypatch):
    kind = index._Kind(
        "json", "pip install exact", lambda _, items: Nearest(items.copy()),
        lambda one, queries, k: one.search(queries, k), lambda one, path: np.save(path, one.items),
    )  # fmt: skip
    monkeypatch.setitem(index.KINDS, "exact", kind)
    return kind


def test_the_nearest_of_the_longer_vectors_is_the_highest_inner_product(model, exact):
    made = model.to_index("exact")
    assert made.recall == 1.0
    ids, scores = made.search(model.user_factors_[:9], k=5)
    best, best_scores = model.recommend(model.user_ids_[:9], k=5, exclude_seen=False)
    assert ids.tolist() == best.tolist()
    np.testing.assert_allclose(scores, best_scores, rtol=1e-5)
    assert repr(made) == f"ItemIndex('exact', {len(model.item_ids_)} items, recall@10 1.000)"
    norms = np.linalg.norm(made.index.items, axis=1)
    np.testing.assert_allclose(norms, norms.max(), rtol=1e-5)  # all are of one length now


def test_a_poor_index_says_so(model, exact, monkeypatch):
    poor = exact._replace(search=lambda one, queries, k: np.full((len(queries), k), -1))
    monkeypatch.setitem(index.KINDS, "exact", poor)
    made = model.to_index("exact")
    assert made.recall == 0.0
    ids, scores = made.search(model.user_factors_[:2], k=3)
    assert ids.tolist() == [[-1] * 3] * 2
    assert np.isneginf(scores).all()


def test_an_index_that_cannot_be_made_says_what_helps(model, monkeypatch):
    with pytest.raises(OptionError, match="kind: got 'annoy', expected one of 'hnswlib', 'usearch', 'faiss'"):
        model.to_index("annoy")
    for name, module in (("hnswlib", "hnswlib"), ("usearch", "usearch.index"), ("faiss", "faiss")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=index.KINDS[name].install):
            model.to_index(name)


def test_what_is_searched_for_is_checked(model, exact):
    made = model.to_index("exact")
    with pytest.raises(OptionError, match="vectors: got shape"):
        made.search(np.zeros((2, 3)))
    with pytest.raises(OptionError, match="k: got 0"):
        made.search(model.user_factors_[:2], k=0)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["hnswlib", "usearch", "faiss"])
def test_indexes_of_other_libraries_find_nearly_all(kind, run, tmp_path, capsys):
    need(index.KINDS[kind].module)
    model = MatrixFactorization.load(run)
    made = model.to_index(kind)
    assert made.recall > 0.99
    ids, scores = made.search(model.user_factors_, k=5)
    assert ids.shape == scores.shape == (120, 5)
    assert (np.diff(scores) <= 0).all()
    assert main(["export", run, "--to", kind, "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"items.{kind}").stat().st_size > 0
    assert "recall@10 against exact search" in capsys.readouterr().out


def test_export_says_how_good_an_index_is(run, tmp_path, capsys, monkeypatch):
    kind = index._Kind(
        "json", "", lambda _, items: Nearest(items), lambda one, queries, k: one.search(queries, k),
        lambda one, path: np.savetxt(path, one.items),
    )  # fmt: skip
    monkeypatch.setitem(index.KINDS, "faiss", kind)
    assert main(["export", run, "--to", "faiss", "--out", str(tmp_path)]) == 0
    assert "recall@10 against exact search 1.0000" in capsys.readouterr().out
    assert np.loadtxt(tmp_path / "items.faiss").shape[1] == 9
