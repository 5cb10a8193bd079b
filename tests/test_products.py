# SPDX-License-Identifier: Apache-2.0
"""Products of small matrices in tiles: held to float64, whatever their sizes, places and strides."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.recommender.products import COLUMNS, multiply, padded


@jit(entry=True)
def product(rows, columns, n, a, at, row, step, b, b_at, b_step, out, to, to_row):
    multiply(rows, columns, n, a, at, row, step, b, b_at, b_step, out, to, to_row)


def test_padded():
    assert [padded(n) for n in (1, 15, 16, 17, 64)] == [16, 16, 16, 32, 64]


@given(
    rows=st.integers(0, 15),
    tiles=st.integers(1, 3),
    n=st.integers(0, 40),
    turned=st.booleans(),
    at=st.integers(0, 5),
    gap=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_product_is_that_of_float64(rows, tiles, n, turned, at, gap, seed):
    rng = np.random.default_rng(seed)
    columns = tiles * COLUMNS
    # What lies around the matrices is NaN, and stays.
    left = np.full(at + (max(rows, n) + gap) * (max(rows, n) + gap) + 8, np.nan, np.float32)
    row, step = (1, rows + gap) if turned else (n + gap, 1)
    a = np.lib.stride_tricks.as_strided(left[at:], (rows, n), (4 * row, 4 * step))
    a[...] = rng.normal(size=a.shape)
    b = np.full((n + 1, columns + gap), np.nan, np.float32)
    b[:n, :columns] = rng.normal(size=(n, columns))
    out = np.full((rows + 2, columns + gap), np.nan, np.float32)
    product(rows, columns, n, left, at, row, step, b, 0, columns + gap, out, columns + gap, columns + gap)
    exact = a.astype(np.float64) @ b[:n, :columns].astype(np.float64)
    size = np.abs(a).astype(np.float64) @ np.abs(b[:n, :columns])
    got = out[1 : rows + 1, :columns]
    assert (np.abs(got - exact) <= (n + 1) * 2.0**-24 * size).all()
    assert np.isnan(out[0]).all()
    assert np.isnan(out[rows + 1 :]).all()
    assert np.isnan(out[:, columns:]).all()


@pytest.mark.parametrize("rows", [1, 5, 6, 13])
def test_bits_do_not_depend_on_the_tile(rows):
    """Threads take blocks whose last rows are in other tiles than they would be in a larger block."""
    rng = np.random.default_rng(rows)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, 50), (50, 32)))
    whole, one = np.empty((rows, 32), np.float32), np.empty((rows, 32), np.float32)
    product(rows, 32, 50, a, 0, 50, 1, b, 0, 32, whole, 0, 32)
    for r in range(rows):
        product(1, 32, 50, a, r * 50, 50, 1, b, 0, 32, one, r * 32, 32)
    assert one.tobytes() == whole.tobytes()
