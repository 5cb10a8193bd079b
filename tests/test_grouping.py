# SPDX-License-Identifier: Apache-2.0
"""Grouping: its pieces, where the whole (`test_prepare`) would not show a difference."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import Given, Prepared

from nb_sparse_adam._src.engine.grouping import digits_of
from nb_sparse_adam._src.engine.prepare import group
from nb_sparse_adam._src.engine.records import ROWS
from nb_sparse_adam._src.engine.scratch import BLOCK, DIGIT_BITS
from nb_sparse_adam._src.engine.threads import max_threads

plain_digits_of = getattr(digits_of, "py_func", digits_of)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), long=st.booleans(), tasks=st.integers(1, 5)
)
def test_cuts_cover_everything_once_and_are_even(lengths, long, tasks):
    lengths = np.array([*lengths, BLOCK + 40] if long else lengths)
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(lengths)), lengths))
    prepared = Prepared([Given(ROWS, len(lengths), 1, ids, np.ones((len(ids), 1)), tasks=tasks)])
    if (lengths == 1).all() and (np.diff(ids) > 0).all():
        return  # nothing is summed: rows are cut evenly
    bounds = [0, *prepared.tasks["last"].tolist()]
    assert prepared.tasks["first"].tolist() == bounds[:-1]
    assert bounds[-1] == len(lengths)
    assert (np.diff(bounds) >= 0).all()
    cost = 4 + np.where(lengths > BLOCK, -(-lengths // BLOCK), lengths)
    for lo, hi in itertools.pairwise(bounds):
        assert cost[lo:hi].sum() <= cost.sum() / tasks + 2 * cost.max()


@pytest.mark.parametrize("bits", [0, 1, 8, 12, 13, 21, 24, 40, 62])
@pytest.mark.parametrize("n", [1, 50, 2048, 100_000])
@pytest.mark.parametrize("parts", [1, 4])
def test_digits_cover_all_bits_and_fit_into_the_counters(bits, n, parts):
    digits, digit_bits = plain_digits_of(np.int64(bits), np.int64(n), np.int64(parts))
    assert digits * digit_bits >= bits
    assert 1 <= digit_bits <= DIGIT_BITS
    assert (digits - 1) * digit_bits < max(bits, 1)


def test_few_ids_are_sorted_by_short_digits():
    assert plain_digits_of(np.int64(21), np.int64(100_000), np.int64(1)) == (2, 11)
    _, bits = plain_digits_of(np.int64(21), np.int64(100), np.int64(1))
    assert bits < 9


def test_memory_that_is_too_small_is_not_used():
    ids = np.array([5, 1, 5])
    memory = np.full(4, -1)
    packed, _, _ = group(ids, 9, min(2, max_threads()), memory)
    assert not np.shares_memory(packed, memory)
    assert (memory == -1).all()
