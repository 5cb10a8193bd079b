# SPDX-License-Identifier: Apache-2.0
"""Which columns and which lines of a file are interactions: found out, told, or asked for."""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import need

from nb_sparse_adam import __version__
from nb_sparse_adam.__main__ import main
from nb_sparse_adam._src.recommender.columns import role
from nb_sparse_adam._src.recommender.reading import read_interactions, read_split
from nb_sparse_adam.errors import InteractionsError, OptionError, OptionTypeError

pl = need("polars")
zstandard = need("zstandard")

ROOT = Path(__file__).parents[1]
INTEGERS = [(1, 10), (1, 30), (2, 10), (12, 7)]
TEXT = b"1,10\n1,30\n2,10\n12,7\n"


def pairs_of(interactions):
    """The interactions as a sorted list of (user id, item id)."""
    users = interactions.user_ids[interactions.pairs.users()].tolist()
    return sorted(zip(users, interactions.item_ids[interactions.pairs.indices].tolist(), strict=True))


@pytest.fixture
def write(tmp_path):
    def write(content, name="interactions.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def lines_of(pairs, separator=","):
    return "".join(f"{separator.join(map(str, pair))}\n" for pair in pairs)


def strings(n_users=30, n_items=20, seed=0):
    """Pairs of words without digits, in which every id comes several times."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(letters[at] for at in divmod(n, 26)) for n in range(n_users)]
    rng = np.random.default_rng(seed)
    return [
        (f"u{word}", f"i{words[item % n_users]}")
        for word in words
        for item in rng.choice(n_items, 8, replace=False)
    ]


# --- names of columns -------------------------------------------------------------------------------------

USERS = (
    "user userId USER_ID visitorid buyer customer_id Client member reviewerID käufer Kaeufer Kundennummer "
    "usuario utilisateur 用户ID пользователь user_id:token uid shopper.id listener username"
).split()
ITEMS = (
    "item itemId ITEM_ID sku Produkt product_id asin parent_asin ISBN track song_id movieId item_id:token "
    "articulo artículo Artikelnummer 商品 товар product_sku business_id iid movie_title"
).split()


@pytest.mark.parametrize("name", USERS)
def test_names_of_users(name):
    assert role(name) == "user"


@pytest.mark.parametrize("name", ITEMS)
def test_names_of_items(name):
    assert role(name) == "item"


@pytest.mark.parametrize(
    "name", ["user1", "u17", "B00X", "client2", "alice", "useritem", "10", "使", "products1"]
)
def test_ids_are_no_names(name):
    assert role(name) is None


@pytest.mark.parametrize("kind", ["integers", "words"])
@pytest.mark.parametrize(("user", "item"), list(zip(USERS, ITEMS, strict=False)))
def test_a_header_of_usual_names_is_obeyed_in_either_order(user, item, kind, write):
    pairs = INTEGERS if kind == "integers" else [("zoe", "tea"), ("bob", "ham")]
    got = read_interactions(write(f"{item},when,{user}\n" + lines_of((i, "x", u) for u, i in pairs)))
    assert pairs_of(got) == sorted(pairs)
    assert "with header" in got.description
    assert f"users in {user!r}, items in {item!r}" in got.description


def test_ids_like_user1_are_no_header(write):
    got = read_interactions(write("user1,item1\nuser2,item2\n"))
    assert pairs_of(got) == [("user1", "item1"), ("user2", "item2")]
    assert "no header; users in column 1, items in column 2" in got.description


HALF_NAMED = {
    "user_id,thing": (0, 1), "thing,user_id": (1, 0), "sku,who": (1, 0), "who,sku": (0, 1),
    "user_id,thing,x": (0, 1), "who,item,x": (0, 1), "timestamp,user,thing": (1, 2), ",who,what": (1, 2),
    "rating,item,who": (2, 1), "time,event,who,what": (2, 3), "user_id,timestamp,thing": (0, 2),
}  # fmt: skip


@pytest.mark.parametrize(("header", "taken"), HALF_NAMED.items())
def test_a_header_that_names_half(header, taken, write):
    rows = [[str(100 * column + row % 3) for column in range(header.count(",") + 1)] for row in range(5)]
    got = read_interactions(write(header + "\n" + lines_of(rows)))
    assert pairs_of(got) == sorted({tuple(int(row[column]) for column in taken) for row in rows})


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("foo,user,bar", ["the items", "--item-column", "'foo'"]),
        ("foo,bar,item", ["the users", "--user-column"]),
        ("foo,time,bar,baz", ["the users and which the items", "--user-column and --item-column"]),
    ],
)
def test_a_header_that_does_not_say_enough_is_asked_about(header, words, write):
    path = write(header + "\n" + "1,2,3,4\n"[: 2 * header.count(",") + 1] + "\n")
    with pytest.raises(InteractionsError) as caught:
        read_interactions(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


# --- a header by what is below it -------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["V1,V2", "a,b", "foo bar,#x", "ﬁ,№"])
@pytest.mark.parametrize("rows", [INTEGERS, [("x", 1), ("y", 2)], [("x", "y", 4.5), ("p", "q", 3)]])
def test_what_is_no_number_above_numbers_is_a_header(header, rows, write):
    wide = header + ",z" * (len(rows[0]) - 2)
    got = read_interactions(write(wide + "\n" + lines_of(rows)))
    assert len(got.pairs) == len(rows)
    assert "with header" in got.description


def test_dates_are_like_numbers(write):
    got = read_interactions(write("wer,was,wann\nzoe,tea,2020-01-31\nbob,ham,2020-02-01T10:00\n"))
    assert pairs_of(got) == [("bob", "ham"), ("zoe", "tea")]


@pytest.mark.parametrize("first", ["zoe,tea,NA", "zoe,tea,", "zoe,tea,3", "zoe,tea,2020-01-31", "7,tea,x"])
def test_values_are_no_header(first, write):
    got = read_interactions(write(f"{first}\nbob,tea,4\nada,ham,5\nzoe,ham,5\n"))
    assert len(got.pairs) == 4
    assert "no header" in got.description


@pytest.mark.parametrize("turn", [1, -1])
def test_words_above_ids_that_repeat_are_a_header(turn, write):
    pairs = strings()[::turn]
    got = read_interactions(write("foo,bar\n" + lines_of(pairs)))
    assert pairs_of(got) == sorted(pairs)
    assert "with header; users in 'foo', items in 'bar'" in got.description
    for split in (",", "\t", ";", "::"):
        got = read_interactions(write(lines_of(pairs, split)))
        assert pairs_of(got) == sorted(pairs)  # the first line among them
        assert "no header" in got.description
        assert got.repeated == 0


def test_the_whole_file_is_looked_at_for_repetition(write):
    pairs = strings(600, 500) * 40
    text = lines_of((*pair, "x" * 30) for pair in pairs)
    assert len(text) > 3 << 20
    last = "foo,ham,x\n"
    assert "with header" in read_interactions(write("foo,bar,x\n" + text)).description
    got = read_interactions(write("foo,bar,x\n" + text + last))
    assert "no header" in got.description
    assert {("foo", "bar"), ("foo", "ham")} <= set(pairs_of(got))


def test_words_above_ids_with_digits(write):
    got = read_interactions(write("foo,bar\nu-7,x1\nu-8,x2\n"))
    assert pairs_of(got) == [("u-7", "x1"), ("u-8", "x2")]
    assert len(read_interactions(write("u-1,x\nu-7,x1\nu-8,x2\n")).pairs) == 3


UNKNOWN = [
    "foo,bar\nzoe,tea\nbob,ham\n",
    "foo,bar\n",
    "foo\tbar\tgood\nzoe\ttea\tbad\n",
    "zoe,tea\nbob,ham\n",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_cannot_be_told_is_asked_for(text, write):
    path = write(text)
    with pytest.raises(InteractionsError, match=r"line 1: cannot tell .*--header or --no-header"):
        read_interactions(path)
    n = text.count("\n")
    assert len(read_interactions(path, header=False).pairs) == n
    if n > 1:
        assert len(read_interactions(path, header=True).pairs) == n - 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_interaction_is_taken_for_a_header_nor_the_other_way_round(data):
    """Whatever the ids are: files whose every id repeats are read whole, with and without a header."""
    alphabet = st.sampled_from(["digits", "letters", "both"])
    kinds = {"digits": "0123456789", "letters": "kqwxyzßΩ", "both": "kq01Ω"}
    users, items = (
        data.draw(st.lists(text, min_size=5, max_size=9, unique=True))
        for text in (st.text(kinds[data.draw(alphabet)], min_size=3, max_size=6) for _ in range(2))
    )
    pairs = data.draw(st.permutations(list(itertools.product(users, items))))
    header = data.draw(st.sampled_from(["", "wer,was\n", "buyer,sku\n", "käufer,Produkt\n"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "interactions"
        path.write_text(header + lines_of(pairs), encoding="utf-8")
        got = read_interactions(path)
    assert len(got.pairs) == len(pairs)
    assert ("with header" if header else "no header") in got.description


def test_ids_that_were_met_before_are_no_header(write):
    train = write("foo,bar\n" + lines_of(strings()), "train")
    for test in ("uaa,new\n", "uaa,old\nuab,new\n", "new,iaa\nuab,new\n"):
        split = read_split(train, write(test, "test"))
        assert "tested on test, delimited text (comma, no header" in split.description
    with pytest.raises(InteractionsError, match="test, line 1: cannot tell"):
        read_split(train, write("foo,bar\nuaa,iaa\n", "test"))


def test_headers_of_files_one_below_the_other(write):
    got = read_interactions(write("user,item\n1,10\n1,30\nuser,item\n2,10\n12,7\nuser,item\n"))
    assert pairs_of(got) == INTEGERS
    assert "the header came again 2 times" in got.description


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


@pytest.mark.parametrize("rating", ["", "x", "nan", "4,5"])
@pytest.mark.parametrize("far", [0, 200_000])
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


# --- JSON lines -------------------------------------------------------------------------------------------

JSON_LINES = {
    "names": b'{"user_id": 1, "item_id": 10}\n{"item_id": 30, "user_id": 1}\n{"user_id":2,"item_id":10}\n'
    b'{"user_id":12,"item_id":7}',
    "nested values that nobody needs": b'{"x": [{"user": 5}], "visitorid": 1, "sku": 10}\n\n'
    b'{"visitorid": 1, "sku": 30, "x": {}}\n  {"visitorid":2,"sku":10}\n{"visitorid":"12","sku":" 7 "}\n',
    "Windows": b'\xef\xbb\xbf{"user":1,"item":10}\r\n{"user":1,"item":30}\r\n{"user":2,"item":10}\r\n'
    b'{"user":12,"item":7}\r\n',
    "escapes": b'{"us\\u0065r":"\\u0031","item":10}\n{"user":1,"item":30}\n{"user":2,"item":10}\n'
    b'{"user":12,"item":7}\n',
}  # fmt: skip


@pytest.mark.parametrize("content", JSON_LINES.values(), ids=JSON_LINES.keys())
@pytest.mark.parametrize("file_format", ["auto", "json"])
def test_json_lines(content, file_format, write):
    got = read_interactions(write(content), file_format)
    assert pairs_of(got) == INTEGERS
    assert "JSON lines (users in" in got.description
    assert pairs_of(read_interactions(write(gzip.compress(content)), file_format)) == INTEGERS


GOOD = '{"user": 1, "item": 2}\n'
BAD_JSON_LINES = {
    "a missing key": ('{"user": 1}', "has no key 'item'"),
    "null": ('{"user": null, "item": 1}', "has null for key 'user'"),
    "a list": ('{"user": [1], "item": 1}', "'user' is a nested value"),
    "an object": ('{"user": 1, "item": {"id": 1}}', "'item' is a nested value"),
    "a float": ('{"user": 1.5, "item": 1}', "'user' is 1.5; expected an integer or a string"),
    "a truth": ('{"user": true, "item": 1}', "'user' is true"),
    "a blank": ('{"user": " ", "item": 1}', "'user' is"),
    "a line end": (r'{"user": "a\nb", "item": 1}', "'user' is"),
    "a NUL": (r'{"user": "a\u0000b", "item": 1}', "'user' is"),
    "half a pair": (r'{"user": "\ud800", "item": 1}', "'user' is"),
    "no object": ("[1, 2]", "expected a JSON object"),
    "a number": ("5", "expected a JSON object"),
    "no JSON": ("1,2", "is no JSON"),
    "cut off": ('{"user": 1, "it', "is no JSON"),
    "two": ('{"user": 1, "item": 2} {"user": 1, "item": 2}', "is no JSON"),
    "deep": ('{"user": ' + "[" * 200_000, "is no JSON"),
    "a long number": ('{"user": ' + "9" * 5000 + ', "item": 1}', "is no JSON"),
    "a raw control character": ('{"user": "a\tb", "item": 1}', "is no JSON"),
}


@pytest.mark.parametrize("far", [1, 100_000])
@pytest.mark.parametrize(("line", "words"), BAD_JSON_LINES.values(), ids=BAD_JSON_LINES.keys())
def test_bad_json_lines(line, words, far, write):
    path = write(GOOD * far + line + "\n" + GOOD)
    with pytest.raises(InteractionsError) as caught:
        read_interactions(path)
    assert f"{path}, line {far + 1}: {words}" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_keys_that_are_not_found_are_asked_for(write):
    path = write('{"who": "a", "what": "b"}\n')
    with pytest.raises(InteractionsError, match=r"columns 'who', 'what'; cannot tell .*--user-column"):
        read_interactions(path)
    assert pairs_of(read_interactions(path, user_column="who", item_column="what")) == [("a", "b")]
    assert pairs_of(read_interactions(path, user_column="who")) == [("a", "b")]  # there is one other


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.text(min_size=1, max_size=5)), min_size=1))
def test_what_json_writes_is_read(pairs):
    pairs = [(user, item.strip()) for user, item in pairs if item.isprintable() and item.strip()]
    if not pairs:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_text("".join(json.dumps({"user": user, "item": item}) + "\n" for user, item in pairs))
        got = read_interactions(path)
    assert {(user, str(item)) for user, item in pairs_of(got)} == set(pairs)


# --- where it comes from ----------------------------------------------------------------------------------


def frames(content):
    """The content in two frames, one of which says its size and one does not."""
    one = zstandard.ZstdCompressor().compress(content[: len(content) // 2])
    other = zstandard.ZstdCompressor().compressobj()
    return one + other.compress(content[len(content) // 2 :]) + other.flush()


def test_zstandard(write):
    assert pairs_of(read_interactions(write(frames(TEXT), "a.csv.zst"))) == INTEGERS
    text = lines_of((at % 1000, at % 777) for at in range(400_000)).encode()
    assert len(read_interactions(write(frames(text))).pairs) == len(read_interactions(write(text, "y")).pairs)


def test_damaged_zstandard(write):
    packed = frames(lines_of((at * 7919 % 99991, at) for at in range(3000)).encode())
    for end in (5, 100, len(packed) // 3, len(packed) - 1):
        with pytest.raises(
            InteractionsError, match=r"interactions.txt(: cannot be read: |: is empty|, line)"
        ):
            read_interactions(write(packed[:end]))
    for at in (6, len(packed) // 4):
        damaged = packed[:at] + bytes([packed[at] ^ 255]) + packed[at + 1 :]
        with pytest.raises(InteractionsError, match=r"interactions.txt(: cannot be read: |, line \d+: )"):
            read_interactions(write(damaged))
    with pytest.raises(InteractionsError, match="cannot be read"):
        read_interactions(write(frames(TEXT) + b"rubbish"))


def test_a_line_of_zstandard_without_end_is_refused(write):
    with pytest.raises(InteractionsError, match="line 2: is longer than 16,777,216 characters"):
        read_interactions(write(zstandard.compress(b"1,2\n" + b"3" * (100 << 20))))


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB there")
@pytest.mark.parametrize("kind", ["delimited", "json"])
def test_memory_follows_what_is_distinct(kind, write, tmp_path):
    line = {"delimited": "a{},b{},{}\n", "json": '{{"user":"a{}","item":"b{}","x":"{}"}}\n'}[kind]
    block = "".join(line.format(at % 100, at % 70, "x" * 5000) for at in range(700)).encode()
    write(block, "small")
    packer = zstandard.ZstdCompressor().compressobj()
    with open(tmp_path / "large", "wb") as file:
        for _ in range(30):
            file.write(packer.compress(block))  # 105 MB in all
        file.write(packer.flush())
    program = (
        "import resource; from nb_sparse_adam._src.recommender.reading import read_interactions as read; "
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; import zstandard; "
        "read('small'); before = used(); large = read('large'); "
        "print(len(large.pairs), large.repeated, used() - before)"
    )
    done = child([sys.executable, "-c", program], cwd=tmp_path)
    distinct, repeated, kilobytes = map(int, done.stdout.split())
    assert (distinct, repeated) == (700, 29 * 700)
    assert kilobytes < 50_000


def test_zstandard_without_its_package(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = write(frames(TEXT))
    with pytest.raises(ImportError, match=r'zstandard.*pip install "nb_sparse_adam\[train\]"'):
        read_interactions(path)
    assert pairs_of(read_interactions(write(TEXT))) == INTEGERS


PROGRAM = (
    "import sys; from nb_sparse_adam._src.recommender.reading import read_interactions; "
    "read = read_interactions(sys.argv[1:]); print(len(read.pairs), read.description)"
)


def child(arguments, **more):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(arguments, env=environment, capture_output=True, timeout=120, check=False, **more)


@pytest.mark.parametrize("kind", ["text", "gzip", "zstandard", "json", "parquet"])
def test_standard_input_is_named_by_a_hyphen(kind, tmp_path):
    if kind == "parquet":
        pl.DataFrame({"user": [1, 1, 2, 12], "item": [10, 30, 10, 7]}).write_parquet(tmp_path / "x")
        content = (tmp_path / "x").read_bytes()
    else:
        content = {
            "text": TEXT, "gzip": gzip.compress(TEXT), "zstandard": frames(TEXT), "json": JSON_LINES["names"],
        }[kind]  # fmt: skip
    done = child([sys.executable, "-c", PROGRAM, "-"], input=content)
    assert done.stdout.startswith(b"4 standard input, "), done.stderr


def test_standard_input_and_files_together(write):
    done = child([sys.executable, "-c", PROGRAM, str(write(b"8,9\n1,10\n")), "-"], input=TEXT)
    assert done.stdout.startswith(b"5 interactions.txt, "), done.stderr
    assert b"; standard input, " in done.stdout
    done = child([sys.executable, "-c", PROGRAM + "; print(sys.stdin.buffer.read())", "-"], input=TEXT)
    assert done.stdout.endswith(b"\nb''\n"), done.stderr  # it was read, and is not closed
    for files in (["-", "-"], ["-", write(TEXT), "-"]):
        with pytest.raises(OptionError, match="can be read once"):
            read_interactions(files)
    with pytest.raises(OptionError, match="can be read once"):
        read_split("-", "-")


def test_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InteractionsError, match="standard input is closed"):
        read_interactions("-")


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="process substitution")
def test_process_substitution(write):
    path = write(gzip.compress(TEXT))
    command = f"'{sys.executable}' -c '{PROGRAM}' <(gzip -dc '{path}') <(echo 5,6) <(cat '{path}')"
    done = child(["bash", "-c", command])
    assert done.stdout.startswith(b"5 "), done.stderr


@pytest.mark.parametrize(
    "address", ["http://host/a.csv", "https://host/a", "s3://b/a.csv", "hf://x/y", "gs://b/a"]
)
def test_an_address_is_not_fetched(address):
    for one in (address, Path(address)):
        with pytest.raises(InteractionsError, match="is a URL, which is not fetched: download it first"):
            read_interactions(one)
    with pytest.raises(InteractionsError, match="is a URL: give the path alone"):
        read_interactions("file:///nowhere/a.csv")
    with pytest.raises(InteractionsError) as caught:
        read_interactions("nowhere/a.csv")
    assert "URL" not in str(caught.value)


def test_several_files_of_several_kinds(write, tmp_path):
    pl.DataFrame({"item": [7], "user": [12]}).write_parquet(tmp_path / "p")
    files = [write("user,item\n1,10\n", "a"), write(gzip.compress(b"1\t30\n1\t10\n"), "b"), tmp_path / "p",
             write('{"user":2,"item":10}\n', "c")]  # fmt: skip
    got = read_interactions(files)
    assert pairs_of(got) == INTEGERS
    assert got.repeated == 1
    assert [part.partition(",")[0] for part in got.description.split("; ") if "," in part][:1] == ["a"]
    for name in "abpc":
        assert f"{name}, " in got.description
    turned = read_interactions(tuple(reversed(files)))
    np.testing.assert_array_equal(turned.pairs.indices, got.pairs.indices)
    with pytest.raises(InteractionsError, match="b, line 2"):
        read_interactions([files[0], write("1,2\n3\n", "b")])
    with pytest.raises(OptionError, match="empty"):
        read_interactions([])


# --- what is no list of interactions ----------------------------------------------------------------------

LIBFM = [
    "1 3:1 10:1\n0 2:1 11:1\n",
    "5 3:1\n4 2:1\n",
    "1 0:3:1 1:10:0.5\n-1 0:2:1 1:11:1e-3 2:7:1\n",
    "+1 1:0.5\n-1\n",
]


@pytest.mark.parametrize("text", LIBFM)
def test_libfm_is_noticed(text, write):
    path = write(text)
    with pytest.raises(
        InteractionsError, match=r"line 1: is in the format of libfm or libsvm.*user and an item"
    ):
        read_interactions(path)
    if "\n-1\n" not in text:
        assert len(read_interactions(path, "delimited").pairs) == 2  # who says so gets it


def matrix(kind, shape=(30, 12), seed=0):
    rng = np.random.default_rng(seed)
    stars = rng.integers(1, 6, shape) * (rng.random(shape) < (1 if kind == "full" else 0.3))
    counts = rng.integers(1, 10**6, shape) * (rng.random(shape) < 0.3)
    cells = {"counts": counts, "clicks": stars > 0, "halves": stars / 2}.get(kind, stars)
    cells = cells.astype(int) if kind != "halves" else cells
    return [["" if kind == "blanks" and not cell else cell for cell in row] for row in cells.tolist()]


@pytest.mark.parametrize("kind", ["full", "zeros", "blanks", "counts", "clicks", "halves"])
@pytest.mark.parametrize("labels", ["none", "users", "users and items", "names"])
@pytest.mark.parametrize("separator", [",", "\t", ";", " "])
def test_a_matrix_of_ratings_is_noticed(kind, labels, separator, write):
    if separator == " " and kind == "blanks":
        return  # nobody can write it so
    rows = matrix(kind)
    if labels != "none":
        rows = [[at + 1, *row] for at, row in enumerate(rows)]
    if labels == "users and items":
        rows = [["user" if separator == " " else "", *range(1, 13)], *rows]
    if labels == "names":
        rows = [["user", *(f"Film{at}" for at in range(12))], *rows]
    with pytest.raises(
        InteractionsError, match=r"looks like a matrix of ratings.*a user and an item on each line"
    ):
        read_interactions(write(lines_of(rows, separator)))


def test_what_has_many_columns_is_no_matrix(write):
    rng = np.random.default_rng(0)
    rows = [
        [at // 5, rng.integers(500), rng.integers(1, 6), 10**9 + at, *rng.integers(0, 2, 12)]
        for at in range(200)
    ]
    got = read_interactions(write(lines_of(rows)))
    assert len(got.pairs) > 190
    named = write("user,item," + ",".join(f"f{at}" for at in range(14)) + "\n" + lines_of(rows), "y")
    assert len(read_interactions(named).pairs) == len(got.pairs)
    told = read_interactions(write(lines_of(matrix("zeros"))), user_column=1, item_column=2)
    assert "users in column 1, items in column 2" in told.description


def test_matrix_market_is_noticed(write):
    with pytest.raises(InteractionsError, match=r"line 1: is a Matrix Market file.*scipy\.io\.mmread"):
        read_interactions(write("%%MatrixMarket matrix coordinate real general\n% x\n3 3 1\n1 1 5\n"))


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
    return main(
        ["train", *map(str, arguments), "--dim", "2", "--epochs", "1", "--no-progress", "--out", str(out)]
    )


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
