"""Grouping: sorted ids, segments, fair cuts, and the memory that is kept for it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nb_sparse_adam.engine.grouping import Buffers, cut_evenly, group_ids
from nb_sparse_adam.engine.threads import Crew, max_threads


@given(
    ids=st.lists(st.integers(0, 300), min_size=1, max_size=200), threads=st.integers(1, min(2, max_threads()))
)
def test_groups_are_those_of_a_stable_sort(ids, threads):
    ids = np.array(ids)
    memory = np.full((2, len(ids) + 5), -1)
    got = group_ids(ids, 300, False, crew=Crew(threads, threads), memory=memory)
    order = np.argsort(ids, kind="stable")
    np.testing.assert_array_equal(got.packed >> got.row_shift, ids[order])
    np.testing.assert_array_equal(got.packed & got.payload_mask, order)
    _, first = np.unique(ids[order], return_index=True)
    np.testing.assert_array_equal(got.starts, [*first, len(ids)])


@pytest.mark.parametrize("any_long", [False, True])
@given(
    lengths=st.lists(st.integers(1, 40), max_size=60),
    chunks=st.integers(1, 5),
    row_cost=st.integers(0, 9),
)
def test_cuts_cover_everything_once_and_are_even(any_long, lengths, chunks, row_cost):
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    bounds = np.full(chunks + 1, -1)
    cut_evenly(starts, row_cost, 40, any_long, bounds)
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    assert (np.diff(bounds) >= 0).all()
    cost = np.array(lengths, int) + row_cost
    share = cost.sum() / chunks
    for lo, hi in itertools.pairwise(bounds):
        assert cost[lo:hi].sum() <= share + 2 * max(cost, default=0)


def test_memory_is_lent_to_one_at_a_time():
    buffers = Buffers()
    first = buffers.take(10)
    second = buffers.take(10)
    assert not np.shares_memory(first, second)
    buffers.give_back(first)
    assert buffers.take(7) is first
    buffers.give_back(first)
    assert buffers.take(11).shape == (2, 11)


def test_memory_that_is_far_too_large_is_given_up():
    buffers = Buffers()
    large = buffers.take(1_000_000)
    buffers.give_back(large)
    assert buffers.take(100_000) is large
    buffers.give_back(large)
    assert buffers.take(10) is not large
