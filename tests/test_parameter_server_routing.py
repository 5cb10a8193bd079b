# SPDX-License-Identifier: Apache-2.0
"""What each shard is sent: each id once, to the shard that has it, with the sums that the engine makes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nb_sparse_adam import EmbeddingTable
from nb_sparse_adam._src.parameter_server.routing import BUCKETS, buckets_of, is_finite, route, shards_of
from nb_sparse_adam._src.parameter_server.windows import WINDOW, Windows
from nb_sparse_adam.errors import StaleClientError

MASK = 2**64 - 1


def splitmix64(key):
    """By its definition, with Python's integers."""
    x = key & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


IDS = st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 5)), max_size=40)


@given(IDS, st.integers(1, 9))
def test_each_id_goes_once_to_its_shard_in_the_order_in_which_it_came(ids, shards):
    array = np.array(ids, np.int64)
    routed = route(array, shards)
    expected = [
        each
        for shard in range(shards)
        for each in dict.fromkeys(ids)
        if (splitmix64(each) >> 54) * shards // BUCKETS == shard
    ]
    assert routed.ids.tolist() == expected
    assert routed.ids[routed.place].tolist() == ids
    assert routed.times.tolist() == [ids.count(each) for each in expected]
    assert (
        np.diff(routed.starts).tolist()
        == np.bincount(shards_of(routed.ids, shards), minlength=shards).tolist()
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("most", [1, 3, 700])
def test_sums_have_the_bits_of_the_engine(dtype, most):
    """Up to 700 ids of one row, which the engine sums in blocks."""
    rng = np.random.default_rng(most)
    n, dim = 2000, 5
    ids = rng.integers(0, max(n // most, 1), n) * 7919
    grads = rng.normal(size=(n, dim)).astype(dtype)
    whole, summed = (EmbeddingTable(dim, lr=0.1, dtype=dtype) for _ in range(2))
    whole.lookup(ids)
    whole.update(ids, grads)
    routed = route(ids, 3)
    summed.lookup(ids)
    summed.update(routed.ids, routed.sum(grads)[0])
    assert whole.export()[1].tobytes() == summed.export()[1].tobytes()
    strided = np.repeat(grads, 2, axis=1)[:, ::2]
    assert routed.sum(strided)[0].tobytes() == routed.sum(grads)[0].tobytes()


def test_vectors_come_back_to_where_their_ids_were():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, 300)
    routed = route(ids, 4)
    values = np.repeat(routed.ids[:, None], 3, axis=1).astype(np.float32)
    parts = {shard: values[routed.of_shard(shard)] for shard in range(4)}
    for part in parts.values():
        part.flags.writeable = False  # as those are that come from another process
    assert (routed.spread(parts, 3, np.dtype(np.float32)) == ids[:, None]).all()


@pytest.mark.parametrize("ids", [np.arange(5000), np.arange(5000) << 32, np.arange(5000) * 1024])
def test_buckets_are_even_for_ids_that_are_not(ids):
    assert np.bincount(buckets_of(ids), minlength=BUCKETS).max() < 25


@pytest.mark.parametrize(("dtype", "largest"), [(np.float32, 1.8e19), (np.float64, 1.3e154)])
def test_what_is_finite(dtype, largest):
    sums = np.zeros((3, 4), dtype)
    assert is_finite(sums)
    for value, finite in ((largest, True), (2 * largest, False), (np.nan, False), (-np.inf, False)):
        sums[1, 2] = value
        assert is_finite(sums) == finite
    assert is_finite(sums[:0])


# --- windows ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), max_size=60))
def test_a_push_is_known_once_it_was_noted(sequences):
    windows, noted = Windows(), set()
    for sequence in sequences:
        assert windows.has(7, sequence) == (sequence in noted)
        if sequence not in noted:
            windows.note(7, sequence)
            noted.add(sequence)
        windows = Windows.from_json(windows.to_json())


def test_a_push_that_is_too_old_is_refused():
    windows = Windows()
    for sequence in (1, 5, WINDOW + 4):
        windows.note(3, sequence)
    assert windows.has(3, 5)
    assert not windows.has(3, 6)
    with pytest.raises(StaleClientError, match="push 4 of client 3 is refused"):
        windows.has(3, 4)
    windows.note(3, 10 * WINDOW)
    assert windows.highest(3) == 10 * WINDOW
    assert not windows.has(3, 10 * WINDOW - 1)


def test_memory_is_bounded_and_what_was_forgotten_is_refused():
    windows = Windows(most=3)
    for client in (1, 2, 3):
        windows.note(client, 1)
    windows.note(1, 2)
    windows.note(4, 1)  # the second has not pushed for longest
    assert len(windows) == 3
    assert windows.has(1, 1)
    with pytest.raises(StaleClientError, match="client 2 is refused"):
        windows.has(2, 1)
    assert not windows.has(5, 1)  # younger than all that were forgotten
    windows.forget_all(9)
    with pytest.raises(StaleClientError):
        windows.has(9, 1)
    assert not windows.has(10, 1)
