# SPDX-License-Identifier: Apache-2.0
"""Files of interactions, whatever they look like; id maps; the hold-out; generated data."""

import collections
import gzip

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from needs import need

from nb_sparse_adam._src.recommender.interactions import Interactions, UserItems, generate, hold_out
from nb_sparse_adam._src.recommender.reading import read_interactions, read_split
from nb_sparse_adam.errors import InteractionsError, OptionError


def pairs_of(interactions):
    """The interactions as a sorted list of (user id, item id)."""
    users = interactions.user_ids[interactions.pairs.users()].tolist()
    return sorted(zip(users, interactions.item_ids[interactions.pairs.indices].tolist(), strict=True))


@pytest.fixture
def write(tmp_path):
    need("polars")

    def write(content, name="interactions.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


INTEGERS = [(1, 10), (1, 30), (2, 10), (12, 7)]


@pytest.mark.parametrize("header", ["", "userId,movieId,rating\n", "a,b,c\n", '"user_id","item","x"\n'])
@pytest.mark.parametrize("separator", [",", "\t", ";", " ", "::"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimited(write, separator, header, end):
    text = header + "".join(f"{user},{item},4.5\n" for user, item in [INTEGERS[i] for i in (2, 0, 3, 1)])
    got = read_interactions(write(text.replace(",", separator).replace("\n", end)))
    assert pairs_of(got) == INTEGERS
    assert got.user_ids.dtype == got.item_ids.dtype == np.int64
    assert got.user_ids.tolist() == [1, 2, 12]  # as numbers, not as text
    assert got.item_ids.tolist() == [7, 10, 30]
    assert got.repeated == 0


ODD_DELIMITED = {
    "byte order mark": ("\ufeff1,10\n1,30\n2,10\n12,7\n", INTEGERS),
    "blank lines": ("\n\n1,10\n\n1,30\n2,10\n   \n12,7\n\n", INTEGERS),
    "no newline at the end": ("1,10\n1,30\n2,10\n12,7", INTEGERS),
    "blanks around ids": (" 1 , 10\n1,30 \n2,10\n12,7\n", INTEGERS),
    "runs of spaces": ("1   10\n 1 30  \n2 10\n12 7\n", INTEGERS),
    "ragged after the second column": ("1,10\n1,30,x\n2,10,y,z\n12,7\n", INTEGERS),
    "one line": ("5,6\n", [(5, 6)]),
    "unicode": ("zoë,日本\nzoë,a b\nÅ,日本\n", [("zoë", "a b"), ("zoë", "日本"), ("Å", "日本")]),
    "quotes": ('"a,b",x\n"say ""hi""",y\n', [("a,b", "x"), ('say "hi"', "y")]),
    "a quote in tabbed text": ('5" disk\tx\nb\ty\n', [('5" disk', "x"), ("b", "y")]),
    "tabs before commas": ("a,b\tx\nc\ty\n", [("a,b", "x"), ("c", "y")]),
    "leading zeros are no numbers": ("007,1\n7,1\n", [("007", 1), ("7", 1)]),
    "too long for int64": ("99999999999999999999,1\n1,1\n", [("1", 1), ("99999999999999999999", 1)]),
    "negative ids": ("-3,1\n2,1\n", [(-3, 1), (2, 1)]),
    "columns by their names": ("rating,movieId,userId\n4,10,1\n4,30,1\n4,10,2\n4,7,12\n", INTEGERS),
    "RecBole header": ("user_id:token\titem_id:token\n1\t10\n1\t30\n2\t10\n12\t7\n", INTEGERS),
    "header over one column of words": ("who,what\n1,a\n2,b\n", [(1, "a"), (2, "b")]),
}


@pytest.mark.parametrize(("text", "expected"), ODD_DELIMITED.values(), ids=ODD_DELIMITED.keys())
def test_odd_delimited(write, text, expected):
    # Of strings that come once, nobody can tell which are a header.
    header = False if text.startswith(('"a,b"', '5"', "a,b\t")) else None
    assert pairs_of(read_interactions(write(text), header=header)) == sorted(expected)


def test_adjacency(write):
    text = "1 10 30\n2 10\n3\n12 7\n"
    got = read_interactions(write(text))
    assert "adjacency" in got.description
    assert pairs_of(got) == INTEGERS
    assert 3 not in got.user_ids  # nothing is known of a user without items
    spaced = read_interactions(write("1  10\t30 \n\n2 10\n12 7"), "adjacency")
    assert pairs_of(spaced) == INTEGERS


def test_lines_of_equal_length_are_ambiguous(write):
    path = write("1 2 3\n4 5 6\n")
    assert pairs_of(read_interactions(path)) == [(1, 2), (4, 5)]
    assert pairs_of(read_interactions(path, "adjacency")) == [(1, 2), (1, 3), (4, 5), (4, 6)]


def test_a_ragged_file_with_repeated_users_is_not_adjacency(write):
    path = write("1 2 3\n1 5\n")
    assert pairs_of(read_interactions(path)) == [(1, 2), (1, 5)]


def test_gzip(write):
    assert (
        pairs_of(read_interactions(write(gzip.compress(b"1,10\n1,30\n2,10\n12,7\n"), "a.csv.gz"))) == INTEGERS
    )
    assert pairs_of(read_interactions(write(gzip.compress(b"1 10 30\n2 10\n12 7\n")))) == INTEGERS


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"u": [1, 1, 2, 12], "i": [10, 30, 10, 7], "x": [0.5] * 4}, INTEGERS),
        ({"item_id": [10, 30, 10, 7], "x": [0.5] * 4, "user_id": [1, 1, 2, 12]}, INTEGERS),
        ({"user": ["b", "a"], "item": [2**63, 1]}, [("a", "1"), ("b", str(2**63))]),
        ({"user": ["7", "3"], "item": [1, 2]}, [(3, 2), (7, 1)]),
    ],
)
def test_parquet(tmp_path, columns, expected):
    polars = need("polars")
    path = tmp_path / "no-suffix"
    polars.DataFrame(columns, strict=False).write_parquet(path)
    assert pairs_of(read_interactions(path)) == expected


def test_parquet_categories_and_small_integers(tmp_path):
    pl = need("polars")
    path = tmp_path / "a.parquet"
    frame = pl.DataFrame(
        {"user": pl.Series(["b", "a"], dtype=pl.Categorical), "item": pl.Series([3, 4], dtype=pl.UInt8)}
    )
    frame.write_parquet(path)
    assert pairs_of(read_interactions(path)) == [("a", 4), ("b", 3)]


def test_repeated_pairs_are_used_once(write):
    got = read_interactions(write("1,2\n1,3\n1,2\n1,2\n"))
    assert pairs_of(got) == [(1, 2), (1, 3)]
    assert got.repeated == 2


def test_the_order_of_the_file_does_not_matter(write):
    one = read_interactions(write("a,x\nb,y\na,z\n", "one"))
    other = read_interactions(write("a,z\na,x\nb,y\n", "other"))
    np.testing.assert_array_equal(one.user_ids, other.user_ids)
    np.testing.assert_array_equal(one.item_ids, other.item_ids)
    np.testing.assert_array_equal(one.pairs.indptr, other.pairs.indptr)
    np.testing.assert_array_equal(one.pairs.indices, other.pairs.indices)


BAD_FILES = {
    "empty": (b"", ["is empty"]),
    "blank": (b"\n \n", ["is empty"]),
    "header only": (b"userId,movieId\n", ["no interactions"]),
    "one column": (b"1\n2\n3\n", ["one column only", "'1'", "comma"]),
    "one column in a line": (b"1,2\n\n3\n4,5\n", ["line 3", "'3'", "comma"]),
    "an empty field": (b"u,v\n1,2\n,7\n4,5\n", ["line 3", "',7'"]),
    "an empty field between ::": (b"1::2\n3::\n", ["line 2", "'3::'"]),
    "one word in a line": (b"1 2\n1 3\n4\n", ["line 3", "'4'"]),
    "binary": (b"\x00\x01\x02\xff" * 50, ["binary"]),
    "latin-1": ("1,2\n3,\xe9t\xe9\n".encode("latin-1"), ["line 2", "UTF-8", "iconv"]),
    "an open quote": (b'1,2\n3,"4\n5,6\n', ["line 2", "quote", "line 3"]),
    "a cut gzip file": (gzip.compress(b"1,2\n3,4\n" * 1000)[:40], ["cannot be read"]),
    "broken parquet": (b"PAR1 and nothing else", ["polars"]),
}


@pytest.mark.parametrize(("content", "words"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files(write, content, words):
    path = write(content)
    with pytest.raises(InteractionsError) as caught:
        read_interactions(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_late_latin_1_is_refused_too(write):
    path = write(b"1,2\n" * 400_000 + "3,\xe9\n".encode("latin-1"))  # behind what is looked at first
    with pytest.raises(InteractionsError, match=r"(?i)utf-8"):
        read_interactions(path)


def test_no_file_and_a_folder(tmp_path):
    need("polars")
    with pytest.raises(InteractionsError, match="No such file"):
        read_interactions(tmp_path / "nothing.csv")
    with pytest.raises(InteractionsError, match="is a directory"):
        read_interactions(tmp_path)
    with pytest.raises(OptionError, match="'csv'"):
        read_interactions(tmp_path / "nothing.csv", "csv")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"user": [1.5, 2], "item": [1, 2]}, ["'user'", "Float64"]),
        ({"user": [1, 2], "item": [1, None]}, ["row 1", "'item'"]),
        ({"user": [1]}, ["['user']"]),
        ({"user": [], "item": []}, ["no rows"]),
    ],
)
def test_bad_parquet(tmp_path, columns, words):
    polars = need("polars")
    path = tmp_path / "a.parquet"
    polars.DataFrame(columns).write_parquet(path)
    with pytest.raises(InteractionsError) as caught:
        read_interactions(path)
    for word in words:
        assert word in str(caught.value)


def test_a_test_file_shares_the_rows_of_the_training_file(write):
    split = read_split(write("1,a\n1,b\n2,a\n3,c\n", "train"), write("1,c\n2,a\n2,new\n9,a\n1,c\n", "test"))
    assert split.user_ids.tolist() == [1, 2, 3, 9]
    assert split.item_ids.tolist() == ["a", "b", "c", "new"]
    train = Interactions(split.train, split.user_ids, split.item_ids)
    test = Interactions(split.test, split.user_ids, split.item_ids)
    assert pairs_of(train) == [(1, "a"), (1, "b"), (2, "a"), (3, "c")]
    assert pairs_of(test) == [(1, "c"), (2, "new")]
    notes = "\n".join(split.notes)
    assert "1 repeated pairs of the test file" in notes
    assert "1 test interactions left out: they are in the training file" in notes
    assert "1 test interactions left out: their user is not in the training file" in notes


def test_a_test_file_of_which_nothing_remains(write):
    with pytest.raises(InteractionsError, match="none of its 2 interactions"):
        read_split(write("1,2\n1,3\n", "train"), write("1,2\n7,2\n", "test"))


def test_ids_of_another_kind_in_the_test_file(write):
    split = read_split(write("1,2\n10,3\n", "train"), write("1,3\nx,3\n10,2\n", "test"))
    assert split.user_ids.tolist() == ["1", "10", "x"]
    assert split.item_ids.tolist() == [2, 3]
    assert len(split.test) == 2


def test_arrays():
    got = Interactions.from_ids(["b", "a", "b", "b"], np.array([5, 5, -1, 5], dtype=np.int16))
    assert pairs_of(got) == [("a", 5), ("b", -1), ("b", 5)]
    assert got.repeated == 1
    for users, items, word in [
        ([1, 2], [1], "2 users and 1 items"),
        ([], [], "no|dtype"),
        ([1.0], [1], "float64"),
        ([[1]], [1], "one-dimensional"),
        (np.array([2**63], dtype=np.uint64), [1], "int64"),
    ]:
        with pytest.raises(InteractionsError, match=word):
            Interactions.from_ids(users, items)


def test_csr_of_pairs():
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 9, 60), rng.integers(0, 7, 60)
    csr = UserItems.from_pairs(users, items, 10, 8)
    for user in range(10):
        mine = csr.indices[csr.indptr[user] : csr.indptr[user + 1]]
        np.testing.assert_array_equal(mine, np.unique(items[users == user]))
    half = csr.select(np.arange(len(csr)) % 2 == 0)
    np.testing.assert_array_equal(half.indices, csr.indices[::2])
    np.testing.assert_array_equal(half.users(), csr.users()[::2])
    np.testing.assert_array_equal(csr.contains(half), np.ones(len(half), bool))
    np.testing.assert_array_equal(half.contains(csr), np.arange(len(csr)) % 2 == 0)


rows = st.integers(0, 4)
some_pairs = st.lists(st.tuples(rows, rows, st.floats(2**-7, 2**20, width=32)), max_size=30)


def as_dict(csr, weights=True):
    of_each = csr.weights if weights else np.ones(len(csr))
    return dict(zip(zip(csr.users().tolist(), csr.indices.tolist(), strict=True), of_each, strict=True))


def made(pairs, weights=True):
    users, items, of_each = (
        (np.array(column) for column in zip(*pairs, strict=True)) if pairs else [np.zeros(0)] * 3
    )
    return UserItems.from_pairs(users, items, 5, 5, of_each.astype(np.float32) if weights else None)


@hypothesis.settings(deadline=None)
@hypothesis.given(some_pairs, some_pairs, st.booleans(), st.booleans(), st.randoms())
def test_weights_of_a_pair_are_added_and_carried(one, other, first, second, random):
    csr, more = made(one, first), made(other, second)
    expected = collections.Counter()
    for user, item, weight in one:
        expected[user, item] = expected[user, item] + weight if first else 1.0
    if first:
        assert as_dict(csr) == pytest.approx(expected, rel=1e-6)
        shuffled = random.sample(one, len(one))
        assert made(shuffled).weights.tobytes() == csr.weights.tobytes()  # whatever the order of a file
        mask = np.arange(len(csr)) % 3 > 0
        np.testing.assert_array_equal(csr.select(mask).weights, csr.weights[mask])
        assert as_dict(csr.resized(7, 6)) == as_dict(csr)
    else:
        assert csr.weights is None
    both = csr.union(more)
    if not first and not second:
        assert both.weights is None
        return
    for pair, weight in as_dict(more, second).items():
        expected[pair] += weight
    assert as_dict(both) == pytest.approx(expected, rel=1e-6)


BAD_WEIGHTS = [0, -1.5, np.nan, np.inf, -np.inf, 1e-60, 1e60]


@pytest.mark.parametrize("bad", BAD_WEIGHTS)
def test_what_can_be_no_weight_is_refused_with_its_place(bad):
    with pytest.raises(
        InteractionsError, match=r"weights\[1\] is .*: expected a finite number greater than 0"
    ):
        Interactions.from_ids([1, 2], [3, 4], [1, bad])
    with np.errstate(all="ignore"):
        weights = np.array([1, bad]).astype(np.float32)
    with pytest.raises(OptionError, match=r"UserItems.weights: expected finite numbers .* interaction 1"):
        UserItems(np.array([0, 2]), np.array([0, 1], np.int32), 2, weights)


def test_weights_of_another_form_are_refused():
    for weights in ([1.0], [[1.0, 1.0]], ["1", "2"], 1.0):
        with pytest.raises(InteractionsError, match=r"^weights: got .*, expected numbers of shape \(2,\)"):
            Interactions.from_ids([1, 2], [3, 4], weights)
    for weights in (np.ones(1, np.float32), np.ones(2)):
        with pytest.raises(OptionError, match=r"UserItems.weights: got .*, expected float32 of shape \(2,\)"):
            UserItems(np.array([0, 2]), np.array([0, 1], np.int32), 2, weights)
    got = Interactions.from_ids([2, 1, 2], [4, 4, 4], np.array([1, 2, 3], np.uint8))
    assert got.pairs.weights.tolist() == [2, 4]
    assert got.repeated == 1


def test_hold_out():
    interactions = generate(300, 80, 8.0, seed=1)
    split = hold_out(interactions, 0.3, seed=5)
    counts = interactions.pairs.counts()
    np.testing.assert_array_equal(split.test.counts(), np.floor(0.3 * counts + 0.5))
    np.testing.assert_array_equal(split.train.counts() + split.test.counts(), counts)
    assert not split.train.contains(split.test).any()
    assert interactions.pairs.contains(split.test).all()
    again, other = hold_out(interactions, 0.3, seed=5), hold_out(interactions, 0.3, seed=6)
    np.testing.assert_array_equal(split.test.indices, again.test.indices)
    assert not np.array_equal(split.test.indices, other.test.indices)


def test_hold_out_takes_any_of_a_users_items():
    one_user = Interactions.from_ids(np.zeros(10, int), np.arange(10))
    held = [hold_out(one_user, 0.2, seed).test.indices.tolist() for seed in range(40)]
    assert {item for items in held for item in items} == set(range(10))


def test_hold_out_leaves_something_to_train_on():
    split = hold_out(Interactions.from_ids([1, 2, 2], [7, 7, 8]), 0.99)
    assert split.train.counts().tolist() == [1, 1]
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(OptionError, match="fraction"):
            hold_out(Interactions.from_ids([1], [1]), fraction)


def test_generated_data_are_long_tailed_and_seeded():
    data = generate(2000, 500, 20.0, seed=3)
    popularity = np.sort(np.bincount(data.pairs.indices))[::-1]
    assert popularity[-1] >= 1
    assert popularity[:50].sum() > 0.25 * len(data.pairs)  # a tenth of the items
    assert data.pairs.counts().min() >= 5
    assert data.pairs.counts().max() > 4 * np.median(data.pairs.counts())
    assert "GENERATED" in data.description
    for user in (0, 999, 1999):
        mine = data.pairs.indices[data.pairs.indptr[user] : data.pairs.indptr[user + 1]]
        assert (np.diff(mine) > 0).all()
    again = generate(2000, 500, 20.0, seed=3)
    np.testing.assert_array_equal(data.pairs.indices, again.pairs.indices)
    assert len(generate(2000, 500, 20.0, seed=4).pairs) != len(data.pairs)
    assert len(generate(3, 2, 50.0).pairs) > 0
    with pytest.raises(OptionError, match="n_items"):
        generate(3, 0)
