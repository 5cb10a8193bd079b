# SPDX-License-Identifier: Apache-2.0
"""Which columns and which lines of a file are interactions: found out, told, or asked for."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interaction_files import INTEGERS, lines_of, pairs_of
from needs import need

from nb_sparse_adam._src.recommender.columns import role
from nb_sparse_adam._src.recommender.reading import read_interactions, read_split
from nb_sparse_adam.errors import InteractionsError

pl = need("polars")

ROOT = Path(__file__).parents[1]


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
