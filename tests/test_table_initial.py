# SPDX-License-Identifier: Apache-2.0
"""Initial values of an `EmbeddingTable`: functions of seed and id, distributed as their name says."""

import math
from statistics import NormalDist

import numba
import numpy as np
import pytest
from table_model import splitmix64, uniform

from nb_sparse_adam import EmbeddingTable
from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import bits_of_real8, count_on, equal_in_line, first_bit
from nb_sparse_adam._src.table.initial import logarithm, normal_quantile

COMPILED = not numba.config.DISABLE_JIT
NORMAL = [[-0.008569423579036808, 0.006304045095061162], [-0.0020593558385648934, -0.010074938282765318]]
IDS = np.array([0, -1, 1, 2**62, -(2**63), 12345678901])


# --- what an id has depends on nothing else ---------------------------------------------------------------


@pytest.mark.parametrize("initializer", ["normal(0, 0.01)", "uniform(-1, 1)"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_depends_on_the_seed_and_the_id_alone(initializer, dtype):
    def table(**options):
        return EmbeddingTable(5, initializer=initializer, dtype=dtype, **options)

    one = table(seed=3)
    values = one.lookup(IDS)
    assert len(np.unique(values)) == values.size
    others = np.arange(5000 if COMPILED else 50)
    late = table(seed=3, num_threads=1, capacity=len(others) + 10)
    late.lookup(others)
    late.update(others, np.ones((len(others), 5), dtype))
    late.evict(down_to=2)
    assert late.lookup(IDS[::-1].astype(np.uint64)).tobytes() == values[::-1].tobytes()
    serves = table(seed=3, unknown="initial")
    assert serves.lookup(IDS, train=False).tobytes() == values.tobytes()
    assert serves.lookup_bags(IDS, range(6), train=False).tobytes() == (values + 0).tobytes()
    assert len(serves) == 0
    waits = table(seed=3, admission=200)
    assert waits.lookup(IDS).tobytes() == values.tobytes()
    assert len(waits) == 0
    assert not table(seed=3).lookup(IDS, train=False).any()
    assert table(seed=3 - 2**63).lookup(IDS).tobytes() != values.tobytes()
    assert table(seed=-1).lookup(IDS).tobytes() == table(seed=2**64 - 1).lookup(IDS).tobytes()


def test_values_of_today_are_those_of_tomorrow():
    """Of every machine, with the compiler or without it: a shard that starts anew has the same."""
    expected = {
        ("normal(0, 0.01)", "f4"): NORMAL,
        ("normal(0, 0.01)", "f8"): NORMAL,
        ("uniform(-1, 1)", "f8"): [uniform(int(number), 2, 7, -1.0, 1.0) for number in IDS[:2]],
    }
    for (initializer, dtype), values in expected.items():
        table = EmbeddingTable(2, initializer=initializer, dtype=dtype, seed=7)
        assert table.lookup(IDS[:2]).tobytes() == np.array(values, dtype).tobytes(), (initializer, dtype)


def test_a_normal_distribution_is_drawn_from_its_quantiles():
    table = EmbeddingTable(3, initializer="normal(2, 0.5)", dtype=np.float64, seed=-4)
    got = table.lookup(IDS)
    for number, row in zip(IDS.tolist(), got, strict=True):
        key = splitmix64(splitmix64(-4 % 2**64, 0) ^ (number % 2**64), 1)
        for j, each in enumerate(row):
            p = ((splitmix64(key, j) >> 32) + 0.5) / 2**32
            assert abs(each - NormalDist(2, 0.5).inv_cdf(p)) <= 2e-7 * 0.5 * 6


# --- distributions ----------------------------------------------------------------------------------------


@pytest.mark.jit
def test_a_normal_distribution():
    values = EmbeddingTable(16, initializer="normal(3, 2)", seed=1).lookup(np.arange(60_000)).astype(float)
    n = values.size
    standard = (values.reshape(-1) - 3) / 2
    assert abs(standard.mean()) < 5 / math.sqrt(n)
    assert abs(standard.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs((standard**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((standard**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for z in (-4, -3, -2, -1, -0.3, 0, 0.3, 1, 2, 3, 4):
        p = 0.5 * math.erfc(-z / math.sqrt(2))
        assert abs((standard < z).mean() - p) < 5 * math.sqrt(p * (1 - p) / n), z
    # Neither neighbours in a row nor rows of neighbouring ids go together.
    for a, b in ((values[:, :-1], values[:, 1:]), (values[:-1], values[1:])):
        assert abs(((a - 3) * (b - 3)).mean() / 4) < 5 / math.sqrt(a.size)


@pytest.mark.jit
def test_a_uniform_distribution():
    values = EmbeddingTable(4, initializer="uniform(-2, 6)", seed=1).lookup(np.arange(100_000)).astype(float)
    assert values.min() >= -2
    assert values.max() <= 6
    n = values.size
    for p in (0.001, 0.1, 0.25, 0.5, 0.9, 0.999):
        assert abs((values < -2 + 8 * p).mean() - p) < 5 * math.sqrt(p * (1 - p) / n), p


def test_constants():
    assert (EmbeddingTable(2, initializer="normal(0.5, 0)").lookup([1, 2]) == 0.5).all()
    assert (EmbeddingTable(2, initializer=" uniform( 3 , 3 ) ").lookup([1, 2]) == 3).all()
    assert not EmbeddingTable(2, initializer="zeros").lookup([1, 2]).any()


def test_a_callable_is_given_ids():
    asked = []

    def ids_and_squares(ids):
        assert ids.dtype == np.int64
        asked.append(ids.tolist())
        out = np.stack([ids, ids.astype(float) ** 2], 1)
        ids[:] = 0  # it is a copy
        return out

    table = EmbeddingTable(2, initializer=ids_and_squares, dtype=np.float64, unknown="initial")
    np.testing.assert_array_equal(table.lookup([3, 5, 3]), [[3, 9], [5, 25], [3, 9]])
    np.testing.assert_array_equal(table.lookup([5, 4], train=False), [[5, 25], [4, 16]])
    assert table.ids().tolist() == [3, 5]
    assert asked == [[3, 5, 3], [4]]


# --- accuracy ---------------------------------------------------------------------------------------------


@jit(entry=True)
def logarithms(x, out):
    for i in range(len(x)):
        out[i] = logarithm(x[i])


@jit(entry=True)
def quantiles(p, out):
    for i in range(len(p)):
        out[i] = normal_quantile(p[i])


def test_logarithm():
    rng = np.random.default_rng(0)
    n = 100_000 if COMPILED else 500
    near = 2.0 ** np.arange(-36, 1.0)
    x = np.concatenate(
        [near, near * (1 + 2**-40), near * (1 - 2**-40), [math.sqrt(2), 1e300, 1e-300, 0.5], rng.random(n)]
    )
    out = np.empty(len(x))
    logarithms(x, out)
    assert (np.abs(out - np.log(x)) <= 1e-12 * np.maximum(np.abs(np.log(x)), 1)).all()
    assert out[x == 1] == 0


def test_normal_quantile():
    rng = np.random.default_rng(0)
    smallest = 2.0**-36
    tails = np.exp2(-1 - 35 * rng.random(1500))
    p = np.concatenate([[smallest, 1 - smallest, 0.5, 0.075, 0.925], tails, 1 - tails])
    p = np.concatenate([p, rng.random(3000)])
    out = np.empty(len(p))
    quantiles(p, out)
    expected = np.array([NormalDist().inv_cdf(each) for each in p])
    assert (np.abs(out - expected) <= 1.2e-7 * np.abs(expected)).all()
    assert out[2] == 0
    at = np.sort(np.concatenate([p[:5], rng.random(2000)]))
    quantiles(at, out)
    assert (np.diff(out[: len(at)]) >= -2e-7).all()  # where its branches meet, too


# --- what compiled code is made of ------------------------------------------------------------------------


@jit(entry=True)
def compare(array, at, number):
    return equal_in_line(array, at, number)


@jit(entry=True)
def lowest(bits):
    return first_bit(np.int64(bits))


@jit(entry=True)
def as_bits(real):
    return bits_of_real8(real)


@jit(entry=True)
def count(counts, at, times):
    for _ in range(times):
        count_on(counts, at)


def test_equal_in_line_has_a_bit_of_each_word():
    array = np.array([0, 5, -1, 5, 2**62, -(2**63), 5, 0, 5, 9, 5, 0, 0, 0, 0, 5], np.int64)
    for at in (0, 1, 8):
        for number in (0, 5, -1, 2**62, -(2**63), 77):
            expected = sum(1 << i for i in range(8) if array[at + i] == number)
            assert compare(array, at, number) == expected


def test_first_bit():
    for bit in range(63):
        assert lowest(1 << bit) == bit
        assert lowest((1 << bit) | (1 << 62)) == bit
    assert lowest(-(2**63)) == 63
    assert lowest(-1) == 0


def test_bits_of_real8():
    for real in (0.0, -0.0, 1.0, math.pi, math.inf, -math.inf, 5e-324, math.nan):
        assert as_bits(real) == np.array(real).view(np.int64)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_count_on(dtype):
    counts = np.array([7, 2**31 - 1, 7], dtype)
    count(counts, 1, 3)
    assert counts.tolist() == [7, 2**31 + 2, 7]
    assert counts.dtype == dtype


@jit(parallel=True)
def count_together(counts, times):
    for _ in numba.prange(times):
        count_on(counts, 1)


@pytest.mark.jit
def test_count_on_loses_nothing_among_threads():
    counts = np.zeros(3, np.uint32)
    count_together(counts, 500_000)
    assert counts.tolist() == [0, 500_000, 0]
