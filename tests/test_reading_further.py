# SPDX-License-Identifier: Apache-2.0
"""Further columns of files of interactions: ratings that are weights, and times."""

import json
import tempfile
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interaction_files import lines_of
from needs import need

from nb_sparse_adam._src.recommender import codes, lines
from nb_sparse_adam._src.recommender.columns import ReadOptions
from nb_sparse_adam._src.recommender.reading import (
    read_given,
    read_given_split,
    read_interactions,
    read_split,
)
from nb_sparse_adam.errors import InteractionsError, OptionError, OptionTypeError

pl = need("polars")

NAMES = ("user", "item", "rating", "timestamp")
ROWS = [(1, 10, 4.5, 300), (1, 30, 2.0, 100), (2, 10, 1.0, 50), (1, 10, 0.5, 200), (12, 7, 3.0, 70)]
WEIGHTS = {(1, 10): 5.0, (1, 30): 2.0, (2, 10): 1.0, (12, 7): 3.0}
TIMES = {(1, 10): 300, (1, 30): 100, (2, 10): 50, (12, 7): 70}
KINDS = ["header", "no header", "quoted", "parquet", "json"]


def in_format(kind, path, rows=ROWS):
    """Write rows in one of the formats, and give what is to be told about it."""
    if kind == "parquet":
        pl.DataFrame([dict(zip(NAMES, row, strict=True)) for row in rows]).write_parquet(path)
    elif kind == "json":
        objects = (dict(zip(NAMES, row, strict=True)) for row in rows)
        path.write_text("".join(json.dumps(one, default=str) + "\n" for one in objects))
    elif kind == "quoted":
        path.write_text(lines_of([NAMES, *([f'"{field}"' for field in row] for row in rows)]))
    else:
        path.write_text(lines_of([NAMES, *rows] if kind == "header" else rows))
    return {"rating_column": 3, "time_column": 4} if kind == "no header" else {}


def as_dict(interactions, values):
    users = interactions.user_ids[interactions.pairs.users()].tolist()
    items = interactions.item_ids[interactions.pairs.indices].tolist()
    return dict(zip(zip(users, items, strict=True), values.tolist(), strict=True))


def read(path, rating_column=None, time_column=None, **options):
    if not options.get("times"):
        time_column = None
    if not options.get("sample_weights") and options.get("min_rating") is None:
        rating_column = None
    return read_given(path, ReadOptions(rating_column=rating_column, time_column=time_column, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_ratings_are_weights_if_that_is_said(kind, tmp_path):
    told = in_format(kind, tmp_path / "x")
    got = read(tmp_path / "x", sample_weights=True, **told)
    assert got.times is None
    assert as_dict(got.interactions, got.interactions.pairs.weights) == WEIGHTS
    assert got.interactions.repeated == 1
    described = got.interactions.description
    assert "ratings in " + ("column 3" if kind == "no header" else "'rating'") in described
    assert described.endswith(", weighted by their ratings")
    same = read_interactions(tmp_path / "x", sample_weights=True, rating_column=told.get("rating_column"))
    assert same.pairs.weights.tobytes() == got.interactions.pairs.weights.tobytes()
    assert read_interactions(tmp_path / "x").pairs.weights is None
    low = read(tmp_path / "x", sample_weights=True, min_rating=2, **told).interactions
    assert as_dict(low, low.pairs.weights) == {(1, 10): 4.5, (1, 30): 2.0, (12, 7): 3.0}
    assert "2 interactions left out: rated below 2, weighted by their ratings" in low.description


@pytest.mark.parametrize("kind", KINDS)
def test_the_latest_time_of_each_interaction_is_read(kind, tmp_path):
    told = in_format(kind, tmp_path / "x")
    got = read(tmp_path / "x", times=True, **told)
    assert got.times.dtype == np.int64
    assert as_dict(got.interactions, got.times) == TIMES
    assert (
        "times in " + ("column 4" if kind == "no header" else "'timestamp'") in got.interactions.description
    )
    every = read(tmp_path / "x", times=True, sample_weights=True, min_rating=1.5, **told)
    assert as_dict(every.interactions, every.times) == {(1, 10): 300, (1, 30): 100, (12, 7): 70}
    assert every.interactions.pairs.weights.tolist() == [4.5, 2.0, 3.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, -2.5])
def test_a_rating_that_can_be_no_weight_is_refused_with_its_line(kind, value, tmp_path):
    rows = [*ROWS[:3], (5, 6, value, 1), (5, 7, -9.0, 1)]
    path = tmp_path / "x"
    told = in_format(kind, path, rows)
    where = {"header": "line 5", "quoted": "line 5", "parquet": "row 3"}.get(kind, "line 4")
    with pytest.raises(
        InteractionsError, match=f"{where}: the rating {value} can be no weight.*--min-rating"
    ):
        read(path, sample_weights=True, **told)
    assert len(read(path, sample_weights=True, min_rating=0.5, **told).interactions.pairs) == 3
    assert len(read(path, min_rating=-3, **told).interactions.pairs) == 4


@pytest.mark.parametrize("bad", ["nan", "inf", "x", "", "1e60", "1e-60"])
@pytest.mark.parametrize("far", [0, 200_000])
def test_no_number_is_no_weight(bad, far, write):
    path = write("user,item,rating\n" + "1,2,3\n" * far + f"1,2,3\n3,4,{bad}\n")
    with pytest.raises(InteractionsError, match=f"line {far + 3}: "):
        read(path, sample_weights=True)


def test_weights_of_several_files_are_added(write):
    one = write("user,item,plays,rating\n1,2,9,3\n1,3,9,1\n", "one")
    other = write('{"user":1,"item":2,"rating":0.5}\n{"user":2,"item":2,"rating":4}\n', "other")
    got = read_interactions([one, other], sample_weights=True)
    assert as_dict(got, got.pairs.weights) == {(1, 2): 3.5, (1, 3): 1.0, (2, 2): 4.0}
    assert got.repeated == 1
    with pytest.raises(
        InteractionsError, match="sample_weights of repeated pairs add up to more than float32"
    ):
        read_interactions(write("user,item,rating\n" + "1,2,3e38\n" * 2), sample_weights=True)


def test_the_file_to_predict_needs_no_weights(write):
    train, test = write("1,2,5\n1,2,1\n3,4,1\n1,6,2\n", "train"), write("3,2\n1,4\n", "test")
    split = read_split(train, test, header=False, rating_column=3, sample_weights=True)
    assert split.train.weights.tolist() == [6, 2, 1]
    assert split.test.weights is None
    assert "1 repeated pairs of the training file had their weights added" in split.notes
    options = ReadOptions(header=False, times=True, time_column=3)
    split, times = read_given_split(train, test, options)
    assert times.tolist() == [5, 2, 1]
    assert split.train.weights is None


# --- times ------------------------------------------------------------------------------------------------

MOMENTS = {
    "integers": [(1_700_000_000, 1_700_000_000), (-5, -5), (2**62 + 1, 2**62 + 1)],
    "numbers": [("1.5e9", 1.5e9), ("3", 3.0), ("-0.25", -0.25)],
    "dates": [("2024-02-29", datetime(2024, 2, 29)), ("1969-12-31", datetime(1969, 12, 31))],
    "moments": [
        ("2024-02-29T10:00:00", datetime(2024, 2, 29, 10)),
        ("2024-02-29 10:00:00.250000", datetime(2024, 2, 29, 10, 0, 0, 250_000)),
        ("2024-02-29T10:00:00Z", datetime(2024, 2, 29, 10)),
        ("2024-02-29T10:00:00+02:00", datetime(2024, 2, 29, 8)),
        ("2019-10-01 00:00:00 UTC", datetime(2019, 10, 1)),
        ("0001-01-01", datetime(1, 1, 1)),
    ],
}


@pytest.mark.parametrize("kind", ["header", "json", "parquet"])
@pytest.mark.parametrize("moments", MOMENTS.values(), ids=MOMENTS.keys())
def test_times_are_numbers_or_dates(kind, moments, tmp_path):
    in_format(kind, tmp_path / "x", [(1, item, 1.0, text) for item, (text, _) in enumerate(moments)])
    got = read(tmp_path / "x", times=True)
    expected = [when for _, when in moments]
    if isinstance(expected[0], datetime):
        assert got.times.dtype == "M8[us]"
    assert got.times.tolist() == expected


def test_times_of_parquet_have_types(tmp_path):
    when = [date(2024, 2, 29), date(1950, 1, 1), date(2030, 12, 31)]
    instants = [datetime(one.year, one.month, one.day) for one in when]
    for values, expected in (
        (pl.Series(when), instants),
        (pl.Series(instants), instants),
        (pl.Series(instants).cast(pl.Datetime("ns")), instants),
        (pl.Series(instants).dt.replace_time_zone("UTC"), instants),
        (pl.Series([1, 2, 3], dtype=pl.UInt8), [1, 2, 3]),
        (pl.Series([0.5, 2, -3.25]), [0.5, 2, -3.25]),
    ):
        frame = pl.DataFrame({"user": [1, 1, 1], "item": [1, 2, 3], "timestamp": values})
        frame.write_parquet(tmp_path / "x")
        assert read(tmp_path / "x", times=True).times.tolist() == expected
    for values, message in (
        (pl.Series([1, None, 3]), "row 1: has no .* in column 'timestamp'"),
        (pl.Series([1.0, 2.0, float("nan")]), "row 2: has no"),
        (pl.Series([True, False, True]), "has the type Boolean; times must be"),
        (pl.Series(["1", "2", "x"]), "row 2: expected a number as time, got 'x'"),
        (pl.Series([timedelta(1)] * 3), "has the type Duration"),
    ):
        frame = pl.DataFrame({"user": [1, 1, 1], "item": [1, 2, 3], "timestamp": values})
        frame.write_parquet(tmp_path / "x")
        with pytest.raises(InteractionsError, match=message):
            read(tmp_path / "x", times=True)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (["5", "2024-01-01"], "line 3: expected a number as time, got '2024-01-01'"),
        (["5", ""], "line 3: expected a number as time, got ''"),
        (["5", "nan"], "line 3: expected a number as time"),
        (["5", "inf"], "line 3: expected a number as time"),
        (["2024-01-01", "5"], "line 3: expected a number or a date like .* as time, got '5'"),
        (["2024-01-01", "2024-13-01"], "line 3: expected a number or a date like"),
        (["yesterday", "2024-12-01"], "line 2: expected a number or a date like .*, got 'yesterday'"),
        (["", "2024-12-01"], "line 2: expected a number or a date like"),
    ],
)
@pytest.mark.parametrize("far", [0, 200_000])
def test_what_is_no_time_is_refused_with_its_line(times, message, far, write):
    first, second = times
    filler = f"1,2,{first}\n" * far
    if far and message.startswith("line 3"):
        message = message.replace("line 3", f"line {far + 3}")
    path = write("user,item,time\n" + filler + f"1,2,{first}\n1,3,{second}\n")
    with pytest.raises(InteractionsError, match=message):
        read(path, times=True)


def test_times_of_several_files_are_of_one_kind(write):
    one, other = write("user,item,time\n1,2,5\n", "one"), write("user,item,time\n1,3,2024-01-01\n", "other")
    both = read([one, write("user,item,time\n1,2,7.5\n1,4,1\n", "more")], times=True)
    assert both.times.tolist() == [7.5, 1]
    with pytest.raises(InteractionsError, match=r"other has dates and .*one has numbers as times"):
        read([one, other], times=True)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("1,2,3\n4,5,6\n", {"sample_weights": True}, "^sample_weights: .*3 columns, none .* --rating-column"),
        ("user,item,rating,score\n1,2,3,4\n", {"sample_weights": True}, "^sample_weights: .*several"),
        ("1 2 3\n2 3\n", {"sample_weights": True}, "^sample_weights: adjacency lines have none"),
        ("1 2 3\n2 3\n", {"times": True}, "^times: adjacency lines have none .*--validation X instead"),
        ("1,2,3\n4,5,6\n", {"times": True}, "^times: .*3 columns, none of them .* --time-column"),
        ("user,item,time\n1,2,3\n", {"times": True, "time_column": "item"}, "time_column has users or items"),
        ("user,item,time\n1,2,3\n", {"times": True, "time_column": "when"}, "time_column: .* not 'when'"),
        (
            "1,2,3\n4,5,6\n",
            {"times": True, "time_column": 3, "sample_weights": True, "rating_column": 3},
            "rating_column and time_column are the same",
        ),
    ],
)
def test_what_a_file_does_not_have_is_refused_by_name(content, options, message, write):
    with pytest.raises(OptionError, match=message):
        read_given(write(content), ReadOptions(**options))
    with pytest.raises(OptionTypeError, match="sample_weights: expected True or False, got 1"):
        ReadOptions(sample_weights=1)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_all_formats_say_the_same(data):
    """Against a dict: weights of a pair are added, its latest time counts, low ratings are left out."""
    ids = st.integers(0, 5)
    weights = st.sampled_from([0.5, 1.0, 2.0, 3.5, 4096.0])
    times = data.draw(
        st.sampled_from([st.integers(-9, 9), st.sampled_from([f"2024-01-0{d}" for d in range(1, 9)])])
    )
    rows = data.draw(st.lists(st.tuples(ids, ids, weights, times), min_size=1, max_size=40))
    least = data.draw(st.sampled_from([None, 0.75, 2.0]))
    expected = {}
    for user, item, weight, when in rows:
        if least is None or weight >= least:
            sum_, latest = expected.get((user, item), (0, when))
            expected[user, item] = sum_ + weight, max(latest, when)
    kind = data.draw(st.sampled_from(KINDS))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "_FRESH", 3)  # pairs are merged now and then
        patch.setattr(lines, "_BLOCK", data.draw(st.sampled_from([16, 1 << 20])))
        path = Path(folder) / "x"
        told = in_format(kind, path, rows)
        if not expected:
            with pytest.raises(InteractionsError, match="all are rated too low"):
                read(path, sample_weights=True, times=True, min_rating=least, **told)
            return
        got = read(path, sample_weights=True, times=True, min_rating=least, **told)
    found = as_dict(got.interactions, got.interactions.pairs.weights)
    assert found == {pair: sum_ for pair, (sum_, _) in expected.items()}
    when = got.times.astype("M8[D]").astype(str) if got.times.dtype.kind == "M" else got.times
    assert as_dict(got.interactions, when) == {pair: latest for pair, (_, latest) in expected.items()}
    read_rows = sum(least is None or row[2] >= least for row in rows)
    assert got.interactions.repeated == read_rows - len(expected)


def test_a_first_line_that_may_be_a_header_has_its_weight_and_time(write):
    rows = [(f"u{i % 20}", f"i{i % 30}", 2, "2024-01-01") for i in range(600)]
    path = write(lines_of([("u5", "i6", 9, "2025-01-01"), *rows]))
    got = read(path, times=True, sample_weights=True, rating_column=3, time_column=4)
    pairs = as_dict(got.interactions, got.interactions.pairs.weights)
    assert "no header" in got.interactions.description
    assert pairs["u5", "i6"] == 9
    assert as_dict(got.interactions, got.times)["u5", "i6"] == datetime(2025, 1, 1)
