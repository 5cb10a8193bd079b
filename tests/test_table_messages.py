# SPDX-License-Identifier: Apache-2.0
"""What an `EmbeddingTable` says of wrong arguments: what was got, what was expected, and where."""

import numpy as np
import pytest
from checks import refused

from nb_sparse_adam import BagGradient, EmbeddingTable, Eviction, RowGradient
from nb_sparse_adam.errors import (
    GradientError,
    GradientIndexError,
    GradientTypeError,
    OptionError,
    OptionTypeError,
    StateError,
    StateTypeError,
)

ONES = np.ones((2, 3), np.float32)
IDS = {
    "a string": ("user", GradientTypeError, TypeError, "is a string", "['user']"),
    "reals": ([1.0, 2.5], GradientTypeError, TypeError, "ids[0] is 1.0 (float)"),
    "an array of reals": (np.ones(2), GradientTypeError, TypeError, "float64", ".astype(np.int64)"),
    "a mask": (np.ones(2, bool), GradientTypeError, TypeError, "bool", "np.flatnonzero(mask)"),
    "booleans": ([1, "x", True], GradientTypeError, TypeError, "ids[2] is True (bool)"),
    "none": ([1, None], GradientTypeError, TypeError, "ids[1] is None"),
    "too large": ([1, 2**64], GradientIndexError, IndexError, "ids[1] is 18446744073709551616", "64 bits"),
    "a matrix": (np.ones((2, 2), int), GradientError, ValueError, "shape (2, 2)", ".reshape(-1)"),
    "a number": (5, GradientError, ValueError, "shape ()"),
    "ragged": ([[1], [2, 3]], GradientTypeError, TypeError, "cannot be read as an array"),
    "no UTF-8": (["a", "\ud800"], GradientError, ValueError, "ids[1] is", "UTF-8"),
    "bytes": (np.array([b"a"]), GradientTypeError, TypeError, "|S1"),
    "masked": (np.ma.array([1, 2]), GradientTypeError, TypeError, "masked"),
}


@pytest.fixture
def table():
    table = EmbeddingTable(3, initializer="zeros", name="words")
    table.lookup([1, 2])
    return table


@pytest.mark.parametrize("kind", IDS)
def test_wrong_ids(table, kind):
    given, error, builtin, *words = IDS[kind]
    for request, ask in {
        "lookup": table.lookup,
        "lookup_bags": lambda ids: table.lookup_bags(ids, [0]),
        "contains": table.contains,
        "state": table.state,
        "update": lambda ids: table.update(ids, ONES),
        "load": lambda ids: table.load(ids, ONES),
    }.items():
        with refused(error, builtin, f"{request} of table 'words'", *words):
            ask(given)
    assert table.ids().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([1], ("offsets[0] is 1", "expected 0")),
        ([0, 3], ("offsets[1] is 3", "<= 2")),
        ([0, 2, 1], ("offsets[2] is 1", "2 <= offset")),
        ([0, 1, -(2**63)], ("offsets[2] is -9223372036854775808",)),  # the difference overflows
        (np.array([0, 1, 2**63], np.uint64), ("offsets[2] is",)),
        ([], ("offsets are empty", "2 ids")),
        ([[0]], ("(1, 1)",)),
        ([0.0], ("float64", "integers")),
    ],
)
def test_wrong_offsets(table, offsets, words):
    kinds = (GradientIndexError, GradientTypeError)
    for train in (True, False):
        with pytest.raises(kinds) as caught:
            table.lookup_bags([1, 2], offsets, train=train)
        assert all(word in str(caught.value) for word in ("lookup_bags of table 'words'", *words))


def test_the_last_offset_may_be_there_or_not(table):
    table.load([1, 2], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert table.lookup_bags([1, 2], [0, 1]).shape == table.lookup_bags([1, 2], [0, 1, 2]).shape == (2, 3)
    assert table.lookup_bags([1, 2], [0, 2]).shape == (1, 3)
    assert table.lookup_bags([1, 2], [0, 2], include_last_offset=False).tolist() == [[3, 5, 7], [0, 0, 0]]
    with refused(GradientIndexError, IndexError, "end with [1]", "include_last_offset=False"):
        table.lookup_bags([1, 2], [0, 1], include_last_offset=True)


def test_wrong_weights_and_modes(table):
    for weights, error, words in (
        ([1, 2], GradientTypeError, ("int64", "float32 or float64")),
        ([1.0], GradientError, ("shape (1,)", "(2,)")),
        (["a", "b"], GradientTypeError, ("<U1",)),
    ):
        with refused(error, Exception, "weights", *words):
            table.lookup_bags([1, 2], [0], weights)
    with refused(GradientError, ValueError, "mode 'mean' with weights"):
        table.lookup_bags([1, 2], [0], [1.0, 2.0], "mean")
    with refused(OptionError, ValueError, "mode is 'max'"):
        table.lookup_bags([1, 2], [0], mode="max")
    with refused(OptionTypeError, TypeError, "train is 2"):
        table.lookup([1], train=2)


def test_wrong_gradients(table):
    for grads, error, words in (
        (np.ones((2, 2), np.float32), GradientError, ("grads has shape (2, 2)", "(2, 3)")),
        (np.ones((1, 3), np.float32), GradientError, ("(1, 3)", "(2, 3)")),
        (np.ones((2, 3), int), GradientTypeError, ("grads has dtype int64",)),
        ("x", GradientTypeError, ("grads",)),
    ):
        with refused(error, Exception, "table 'words'", *words):
            table.update([1, 2], grads)
    with refused(GradientIndexError, IndexError, "offsets[1] is 5"):
        table.update_bags([1, 2], [0, 5], ONES)
    with refused(GradientError, ValueError, "offsets has 1 entries"):
        table.update_bags([1, 2], [0], ONES)
    with refused(GradientError, ValueError, "weights"):
        table.update_bags([1, 2], [0, 1], ONES, np.ones(3))
    for given, words in (
        ([table], ("got list",)),
        ({1: RowGradient([1], ONES[:1])}, ("one for int", "EmbeddingTables")),
        ({table: ONES}, ("ndarray", "RowGradient or a BagGradient")),
    ):
        with refused(GradientTypeError, TypeError, *words):
            EmbeddingTable.update_together(given)
    with refused(GradientError, ValueError, "BagGradient.offsets has 1 entries"):
        EmbeddingTable.update_together({table: BagGradient([1, 2], [0], ONES)})
    assert table.stats()["steps"] == 0


def test_wrong_values(table):
    for ids, values, error, words in (
        ([1, 2], ONES[:1], StateError, ("(1, 3)", "(2, 3)")),
        ([1, 1], ONES, StateError, ("ids[1] is 1 again",)),
        ([1, 2], ONES.astype(int), StateTypeError, ("int64",)),
        ([1, 2], [[1.0], [1.0, 2.0]], StateTypeError, ("cannot be read",)),
    ):
        with refused(error, Exception, "load of table 'words'", *words):
            table.load(ids, values)
    assert not table.export()[1].any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ("no eviction by age",)),
        ({"down_to": -1}, ("down_to is -1",)),
        ({"down_to": 1.5}, ("down_to is 1.5 (float)",)),
        ({"down_to": 1, "seen_fewer_than": 2}, ("down_to and conditions",)),
        ({"older_than_steps": -1}, ("older_than_steps is -1",)),
        ({"older_than_steps": True}, ("True (bool)",)),
        ({"older_than_seconds": float("nan")}, ("nan",)),
        ({"seen_fewer_than": 0}, ("seen_fewer_than is 0", "1 <= ")),
    ],
)
def test_wrong_evictions(table, arguments, words):
    with pytest.raises(OptionError) as caught:
        table.evict(**arguments)
    assert all(word in str(caught.value) for word in words)
    assert len(table) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, ("dim is 0",)),
        ({"dim": True}, ("dim is True (bool)",)),
        ({"initializer": "ones"}, ("'ones'", "zeros", "normal(mean, std)")),
        ({"initializer": "normal(0)"}, ("'normal(0)'",)),
        ({"initializer": "normal(0, -1)"}, ("standard deviation",)),
        ({"initializer": "normal(0, 1e38)"}, ("finite as float32",)),
        ({"initializer": "uniform(1, 0)"}, ("low <= high",)),
        ({"initializer": 3}, ("3 (int)",)),
        ({"seed": 2**64}, ("seed is",)),
        ({"capacity": 0}, ("capacity is 0",)),
        ({"admission": 0}, ("admission is 0",)),
        ({"admission": 1.0}, ("admission is 1.0",)),
        ({"admission": 256}, ("255",)),
        ({"admission": True}, ("True (bool)",)),
        ({"admission_bytes": 10}, ("admission_bytes is 10", "64 <= ")),
        ({"eviction": Eviction(older_than_seconds=-1)}, ("older_than_seconds is -1", "0 <= seconds")),
        ({"eviction": Eviction(older_than_steps=1.5)}, ("older_than_steps is 1.5 (float)",)),
        ({"eviction": 5}, ("5 (int)", "Eviction")),
        ({"eviction": Eviction(seen_fewer_than=2)}, ("without an age",)),
        ({"eviction": Eviction(when_full=True)}, ("no capacity",)),
        ({"eviction": Eviction(older_than_steps=1, rows_a_step=0)}, ("rows_a_step is 0",)),
        ({"missing": "ignore"}, ("'drop', 'raise'",)),
        ({"unknown": "raise"}, ("'zeros', 'initial'",)),
        ({"state_dir": "x"}, ("state_dir without capacity",)),
        ({"dtype": "f2"}, ("float16",)),
        ({"dtype": "nothing"}, ("'nothing'",)),
        ({"state_dtype": "f8"}, ("state_dtype is float64",)),
        ({"step_counts": "column"}, ("step_counts",)),
        ({"name": 5}, ("name is 5",)),
        ({"lr": 0}, ("lr is 0",)),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(OptionError) as caught:
        EmbeddingTable(**{"dim": 3, **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_misspelt_option_is_an_error(table):
    with pytest.raises(AttributeError):
        table.learning_rate = 1
    with refused(OptionError, ValueError, "lr"):
        table.lr = -1
    assert table.lr == 1e-3
    assert "EmbeddingTable(3, name='words'" in repr(table)
    assert "2 rows" in repr(table)
