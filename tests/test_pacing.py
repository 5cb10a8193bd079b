"""The choice of the number of threads, by a clock that the test sets."""

import numpy as np
import pytest

from nb_sparse_adam.pacing import Pace, choices_up_to

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
