# SPDX-License-Identifier: Apache-2.0
"""The choice of the number of threads, by a clock that the test sets."""

import numba
import numpy as np
import pytest

from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam._src.engine.pacing import PARALLEL_ELEMENTS, Pace, Paces, choices_up_to
from nb_sparse_adam._src.engine.threads import ALONE as ONE_PART
from nb_sparse_adam._src.engine.threads import Partition, max_threads

ALONE = {1: 2.0, 2: 1.2, 4: 0.7}
CROWDED = {1: 2.5, 2: 9.0, 4: 40.0}
HALF_CROWDED = {1: 2.2, 2: 1.5, 4: 30.0}


def drive(pace, seconds, pieces, seed=0):
    """Do pieces of work that take so many seconds on so many threads, more or less; return what was used."""
    rng = np.random.default_rng(seed)
    used = []
    for _ in range(pieces):
        used.append(pace.threads)
        pace.took(seconds[used[-1]] * rng.uniform(0.95, 1.05))
    return used


def total(seconds, used):
    return sum(seconds[threads] for threads in used)


@pytest.mark.parametrize("seconds", [ALONE, CROWDED, HALF_CROWDED])
@pytest.mark.parametrize("choices", [[1, 2], [1, 2, 4]])
def test_it_finds_the_fastest_and_stays_with_it(choices, seconds):
    best = min(choices, key=seconds.__getitem__)
    used = drive(Pace(choices), seconds, 3000)
    assert used[-1000:].count(best) > 980
    assert total(seconds, used) < 1.25 * 3000 * seconds[best]


def test_it_follows_what_other_programs_do():
    pace = Pace([1, 2])
    alone = drive(pace, ALONE, 500)
    crowded = drive(pace, CROWDED, 500)
    alone_again = drive(pace, ALONE, 10_000)
    assert alone[-100:].count(2) > 95
    assert crowded[:50].count(2) < 20  # it does not wait for the next regular attempt
    assert crowded[-100:].count(1) > 95
    assert alone_again[-1000:].count(2) > 980


def test_the_first_use_of_a_number_is_not_judged():
    pace = Pace([1, 2])
    pace.took(100.0)  # compilation
    used = drive(pace, {1: 2.0, 2: 1.2}, 30)
    assert used == [2] * 30


def test_no_choice():
    assert set(drive(Pace([3]), {3: 1.0}, 200)) == {3}
    assert [choices_up_to(most) for most in (1, 2, 3, 4, 16)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 8, 16],
    ]


needs_threads = pytest.mark.skipif(max_threads() == 1, reason="there is one thread to choose from")


@needs_threads
def test_a_number_that_was_asked_for_is_obeyed():
    paces = Paces()
    assert paces.partition_for("Rows", PARALLEL_ELEMENTS, 2) == (Partition(2, 2), None)
    assert paces.partition_for("Rows", PARALLEL_ELEMENTS, 1) == (ONE_PART, None)
    assert paces.partition_for("Rows", PARALLEL_ELEMENTS - 1, 2) == (ONE_PART, None)
    assert paces.partition_for("Rows", PARALLEL_ELEMENTS - 1, None) == (ONE_PART, None)


@needs_threads
def test_steps_of_a_kind_share_a_pace_and_are_cut_alike_however_many_threads_it_asks_for():
    paces = Paces()
    most = numba.get_num_threads()
    partition, pace = paces.partition_for("Rows", 100_000, None)
    assert partition == (most, most)
    assert paces.partition_for("Rows", 110_000, None)[1] is pace
    assert paces.partition_for("Rows", 1_000_000, None)[1] is not pace
    assert paces.partition_for("Compressed", 100_000, None)[1] is not pace
    for _ in range(200):
        partition, pace = paces.partition_for("Rows", 100_000, None)
        assert partition.parts == most
        pace.took(1.0 if partition.threads == 1 else 9.0)
    assert partition == (most, 1)


@needs_threads
@pytest.mark.jit
def test_a_pace_that_changes_from_step_to_step_changes_no_bit(monkeypatch):
    rng = np.random.default_rng(5)
    rows, values = rng.integers(0, 500, 4000), rng.normal(size=(4000, 16)).astype(np.float32)
    told = []

    def train(num_threads):
        table = np.zeros((500, 16), np.float32)
        optimizer = SparseAdam(table, num_threads=num_threads)
        for _ in range(5):
            optimizer.step(RowGradient(rows, values))
        return table

    expected = train(1)
    turns = iter([2, 1, 1, 2, 1])
    monkeypatch.setattr(Pace, "threads", property(lambda _: next(turns)))
    monkeypatch.setattr(Pace, "took", lambda _, seconds: told.append(seconds))
    np.testing.assert_array_equal(train(None), expected)
    assert len(told) == 5
    assert all(0 < seconds < 1e-3 for seconds in told[1:])  # of an element, not of the step
