# SPDX-License-Identifier: Apache-2.0
"""What `read_interactions`, `read_split` and `train` are told about a file; whatever is in it."""

import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interaction_files import INTEGERS, TEXT, lines_of, pairs_of
from needs import need

from nb_sparse_adam import __version__
from nb_sparse_adam.__main__ import main
from nb_sparse_adam._src.recommender.reading import read_interactions, read_split
from nb_sparse_adam.errors import InteractionsError, OptionError, OptionTypeError

pl = need("polars")

ROOT = Path(__file__).parents[1]


# --- options ----------------------------------------------------------------------------------------------

ROWS = [("time", "what", "who", "stars"), (9, 10, 1, 5), (8, 30, 1, 2), (7, 10, 2, 3.5), (6, 7, 12, 4)]
TURNED = [(10, 1), (10, 2), (7, 12), (30, 1)]


def in_format(kind, path):
    """Write the rows in one of the formats, and give the path."""
    names, *rows = ROWS
    if kind == "parquet":
        pl.DataFrame([dict(zip(names, row, strict=True)) for row in rows]).write_parquet(path)
    elif kind == "json":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        path.write_text(lines_of(ROWS if kind == "header" else rows))
    return path


@pytest.mark.parametrize("kind", ["header", "no header", "parquet", "json"])
@pytest.mark.parametrize("by", ["name", "number", "number as text"])
def test_columns_are_taken_as_told(kind, by, tmp_path):
    columns = {"name": ("who", "what"), "number": (3, 2), "number as text": ("3", "2")}[by]
    path = in_format(kind, tmp_path / "x")
    fits = {"no header": by != "name", "json": by == "name"}.get(kind, True)
    if not fits:
        with pytest.raises(OptionError, match=r"^user_column: .*x.* but not ('who'|3|'3')"):
            read_interactions(path, user_column=columns[0], item_column=columns[1])
        return
    got = read_interactions(path, user_column=columns[0], item_column=columns[1])
    assert pairs_of(got) == INTEGERS
    taken = ("column 3", "column 2") if kind == "no header" else ("'who'", "'what'")
    assert f"users in {taken[0]}, items in {taken[1]}" in got.description
    turned = read_interactions(path, user_column=columns[1], item_column=columns[0])
    assert pairs_of(turned) == sorted(TURNED)


def test_one_column_told_and_the_other_found(write):
    path = write("sku,when,who\n10,x,1\n30,x,1\n10,x,2\n7,x,12\n")
    assert pairs_of(read_interactions(path, user_column="WHO")) == INTEGERS
    assert pairs_of(read_interactions(write("1,10,x\n1,30,x\n2,10,x\n12,7,x\n"), item_column=2)) == INTEGERS
    assert pairs_of(read_interactions(write("10,1\n30,1\n10,2\n7,12\n"), user_column=2)) == INTEGERS
    with pytest.raises(InteractionsError, match=r"3 columns; cannot tell .* --item-column"):
        read_interactions(write("1,2,3\n4,5,6\n"), user_column=3)
    path = write("sku,when,who\n10,x,1\n", "y")
    with pytest.raises(OptionError, match="same column"):
        read_interactions(path, user_column="who", item_column=3)


@pytest.mark.parametrize(
    ("separator", "character"),
    [("comma", ","), ("tab", "\t"), (r"\t", "\t"), ("space", " "), ("pipe", "|"), ("||", "||"), ("::", "::")],
)
def test_a_separator_is_obeyed(separator, character, write):
    got = read_interactions(write(lines_of(INTEGERS, character)), separator=separator)
    assert pairs_of(got) == INTEGERS
    # Whatever else stands there.
    rows = [(f"{user};x", f"{item};y") for user, item in INTEGERS]
    got = read_interactions(write(lines_of(rows, character)), separator=separator)
    assert pairs_of(got) == sorted(rows)


@pytest.mark.parametrize("kind", ["header", "no header", "parquet", "json"])
def test_low_ratings_are_left_out(kind, tmp_path):
    path = in_format(kind, tmp_path / "x")
    columns = {"user_column": "who", "item_column": "what"}
    if kind == "no header":
        columns = {"user_column": 3, "item_column": 2}
        with pytest.raises(OptionError, match=r"min_rating: .*x has 4 columns, none .* --rating-column"):
            read_interactions(path, **columns, min_rating=3.5)
        columns["rating_column"] = 4
    got = read_interactions(path, **columns, min_rating=3.5)
    assert pairs_of(got) == [(1, 10), (2, 10), (12, 7)]
    assert "1 interactions left out: rated below 3.5" in got.description
    assert got.repeated == 0
    assert len(read_interactions(path, **columns, min_rating=-1).pairs) == 4
    with pytest.raises(InteractionsError, match="has no interactions left: all are rated too low"):
        read_interactions(path, **columns, min_rating=6)


@pytest.mark.parametrize(("rating", "far"), [("", 0), ("x", 0), ("nan", 0), ("4,5", 0), ("x", 200_000)])
def test_a_rating_that_is_no_number_is_refused_with_its_line(rating, far, write):
    text = "user;item;rating\n" + "1;2;3\n" * far + f"1;2;{rating}\n3;4;5\n"
    with pytest.raises(InteractionsError, match=f"line {far + 2}: expected a number as rating"):
        read_interactions(write(text), min_rating=1)
    assert len(read_interactions(write(text)).pairs) == 2  # nobody needs it


def test_ratings_that_are_no_numbers_elsewhere(tmp_path, write):
    for values, words in (([1.0, None], "row 1: has no number"), (["a", "b"], "ratings must be numbers")):
        pl.DataFrame({"user": [1, 2], "item": [1, 2], "rating": values}).write_parquet(tmp_path / "x")
        with pytest.raises(InteractionsError, match=words):
            read_interactions(tmp_path / "x", min_rating=1)
    for value in ("null", "true", "[1]", '"x"', "NaN"):
        path = write('{"user":1,"item":2,"rating":1}\n{"user":1,"item":2,"rating":' + value + "}\n")
        with pytest.raises(InteractionsError, match="line 2: "):
            read_interactions(path, min_rating=1)


REFUSED = [
    ("json", b'{"user":1,"item":2}\n', {"separator": ","}, "separator: JSON lines have none"),
    ("json", b'{"user":1,"item":2}\n', {"header": True}, "header: JSON lines have none"),
    ("json", b'{"user":1,"item":2}\n', {"min_rating": 1}, "min_rating: .*none of them"),
    ("adjacency", b"1 2 3\n2 3\n", {"user_column": 1}, "user_column: adjacency lines have none"),
    ("adjacency", b"1 2 3\n2 3\n", {"item_column": 1}, "item_column: adjacency lines have none"),
    ("adjacency", b"1 2 3\n2 3\n", {"min_rating": 1}, "min_rating: adjacency lines have none"),
    ("adjacency", b"1 2 3\n2 3\n", {"header": False}, "header: adjacency lines have none"),
    ("adjacency", b"1 2 3\n2 3\n", {"sample_weights": True}, "sample_weights: adjacency lines have none"),
    ("adjacency", b"1 2 3\n2 3\n", {"separator": " "}, "separator: adjacency lines have none"),
    ("parquet", None, {"separator": ","}, "separator: Parquet has none"),
    ("parquet", None, {"header": False}, "header: Parquet has none"),
    ("parquet", None, {"min_rating": 1}, "min_rating: .*none of them"),
    ("delimited", b"1,2\n3,4\n", {"separator": "|"}, "separator: .*has no '|'"),
    ("delimited", b"1,2\n3,4\n", {"user_column": 3}, "user_column: .*has 2 columns, but not 3"),
    ("delimited", b"user,item\n3,4\n", {"user_column": "x"}, "columns 'user', 'item', but not 'x'"),
    ("delimited", b"1,2,3\n3,4,5\n", {"rating_column": 3}, "rating_column: .*give min_rating"),
    (
        "delimited",
        b"1,2,3\n3,4,5\n",
        {"rating_column": 2, "min_rating": 1},
        "rating_column has users or items",
    ),
]


@pytest.mark.parametrize("detect", [True, False])
@pytest.mark.parametrize(("kind", "content", "options", "words"), REFUSED)
def test_an_option_that_cannot_work_is_refused(kind, content, options, words, detect, write, tmp_path):
    path = tmp_path / "x"
    if content is None:
        pl.DataFrame({"user": [1], "item": [2]}).write_parquet(path)
    else:
        path.write_bytes(content)
    if detect and kind == "adjacency":  # what has columns is no adjacency
        with pytest.raises((OptionError, InteractionsError)):
            read_interactions(path, **{**options, "user_column": "nowhere"})
        return
    with pytest.raises(OptionError, match=words):
        read_interactions(path, "auto" if detect else kind, **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"user_column": 0}, OptionError), ({"user_column": True}, OptionTypeError),
        ({"item_column": 1.5}, OptionTypeError), ({"separator": ""}, OptionError),
        ({"separator": "a"}, OptionError), ({"separator": '"'}, OptionError),
        ({"separator": "\n"}, OptionError), ({"separator": 3}, OptionTypeError),
        ({"header": "yes"}, OptionTypeError), ({"header": 1}, OptionTypeError),
        ({"min_rating": float("nan")}, OptionError), ({"min_rating": float("inf")}, OptionError),
        ({"min_rating": "x"}, OptionTypeError), ({"file_format": "csv"}, OptionError),
    ],
)  # fmt: skip
def test_options_out_of_their_domain(options, error, write):
    with pytest.raises(error, match=next(iter(options))):
        read_interactions(write(TEXT), **options)


def test_options_of_a_split(write):
    train, test = write("a|b|5\nc|d|1\na|d|3\n", "train"), write("a|b|5\nc|b|4\na|e|1\na|f|5\n", "test")
    split = read_split(
        [train],
        test,
        separator="|",
        header=False,
        min_rating=2,
        rating_column=3,
        user_column=1,
        item_column=2,
    )
    assert (len(split.train), len(split.test)) == (2, 1)
    assert "test interactions left out: they are in the training file" in split.notes[0]


PIECES = [
    *b"1 2 a user sku rating , ; :: | { } [ null 1:1 0 PAR1 4.5 %%MatrixMarket nan -".split(),
    *(
        b"\t",
        b" ",
        b"\n",
        b"\n",
        b"\r",
        b'"',
        b"# ",
        b"\xff",
        b"\0",
        "ä".encode(),
        b"\x1f\x8b",
        b"\x28\xb5\x2f\xfd",
    ),
    *(b'"user":', b'"item":', b'{"user":1,"item":2}\n'),
]
OPTIONS = {
    "file_format": st.sampled_from(["auto", "delimited", "adjacency", "json", "parquet"]),
    "user_column": st.sampled_from([1, 2, 9, "2", "user", "a"]),
    "item_column": st.sampled_from([1, 2, 9, "1", "sku", "item"]),
    "separator": st.sampled_from([",", "tab", "|", " "]),
    "header": st.booleans(),
    "min_rating": st.sampled_from([0, 2.5]),
    "rating_column": st.sampled_from([1, 3, "rating"]),
    "sample_weights": st.booleans(),
}


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40), st.fixed_dictionaries({}, optional=OPTIONS))
def test_whatever_a_file_has_in_it_and_whatever_is_told(pieces, options):
    """It is read, or is an error of ours that names the file or the option."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "interactions"
        path.write_bytes(b"".join(pieces))
        said = None
        try:
            got = read_interactions(path, **options)
        except (InteractionsError, OptionError) as error:
            said = str(error)
    if said is None:
        assert len(got.pairs) > 0
        assert re.search(r"adjacency lines|users in .*, items in ", got.description)
    else:
        assert any(name in said for name in [str(path), *options])


# --- the command ------------------------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"nb-sparse-adam {__version__}\n"


def train(*arguments, out):
    quick = ["--dim", "2", "--epochs", "1", "--no-progress", "--overwrite", "--out", str(out)]
    return main(["train", *map(str, arguments), *quick])


def test_train_reads_as_told_and_says_how(write, tmp_path, capsys):
    pairs = [(user, item) for user in range(8) for item in range(9) if (user + item) % 3]
    one = write("".join(f"{item}|{user}|4\n" for user, item in pairs[:20]) + "99|99|1\n", "one")
    other = write("".join(f"{item}|{user}|4\n" for user, item in pairs[20:]), "other")
    told = [
        "--user-column",
        "2",
        "--item-column",
        "1",
        "--separator",
        "pipe",
        "--no-header",
        "--min-rating",
        "3",
    ]
    assert train(one, other, *told, "--rating-column", "3", out=tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert f"{len(pairs)} interactions, 8 users, 9 items" in said
    assert "users in column 2, items in column 1, ratings in column 3" in said
    assert "1 interactions left out: rated below 3" in said
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())["data"]
    assert written["description"] in said
    assert written["generated"] is False
    test = write("0|0\n6|0\n", "test")  # 0 has neither in the first file
    assert train(one, "--test", test, *told[:6], "--no-header", out=tmp_path / "run") == 0
    assert capsys.readouterr().out.count("users in column 2, items in column 1") == 2


def test_train_asks_for_a_header_that_it_cannot_tell(write, tmp_path, capsys):
    path = write("foo,bar\nzoe,tea\nbob,ham\nzoe,ham\n")
    assert train(path, out=tmp_path / "run") == 1
    assert "say it with --header or --no-header" in capsys.readouterr().err
    for flag, words in (
        ("--header", "users in 'foo', items in 'bar'"),
        ("--no-header", "no header; users in"),
    ):
        assert train(path, flag, out=tmp_path / "run") == 0
        assert words in capsys.readouterr().out


def test_a_wrong_column_is_a_usage_error(write, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        train(write("user,item\n1,2\n"), "--user-column", "nobody", out=tmp_path / "run")
    assert caught.value.code == 2
    assert "'user', 'item', but not 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["first", "last", "between"])
def test_files_may_stand_before_and_after_options(order, write, tmp_path, capsys):
    path = str(write(lines_of((user, item) for user in range(5) for item in range(6) if user != item)))
    rest = ["--dim", "2", "--epochs", "1", "--out", str(tmp_path / "run")]
    arguments = {"first": [path, *rest], "last": [*rest, path], "between": [*rest[:2], path, *rest[2:]]}
    assert main(["train", *arguments[order]]) == 0
    assert "25 interactions, 5 users" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["user-column", "item-column", "rating-column", "separator", "min-rating"])
def test_options_of_reading_need_something_to_read(option, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", f"--{option}", "1"])
    assert caught.value.code == 2
    assert f"--{option} needs INTERACTIONS" in capsys.readouterr().err
