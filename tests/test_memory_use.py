# SPDX-License-Identifier: Apache-2.0
"""What the state takes, and what a step takes besides: counted where NumPy asks for memory."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from checks import STEP_COUNTS

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam._src.engine.threads import max_threads
from nb_sparse_adam._src.optimizer import tables_of

pytestmark = pytest.mark.jit

ROWS, DIM = 40_000, 16
THREADS = sorted({1, max_threads()})
ONCE = 100_000  # bytes that do not depend on the gradient: the sort's counters, a row or two for each thread
OBJECTS = (
    10_000  # bytes of the interpreter's own objects, which come and go; less than one bit an id, or a row
)


def gradient(form, ids, dim=DIM):
    rng = np.random.default_rng(1)
    bags = len(ids) // 20
    offsets = np.arange(bags + 1) * 20
    pooled = rng.normal(size=(bags, dim)).astype(np.float32)
    if form == "rows":
        return RowGradient(ids, rng.normal(size=(len(ids), dim)).astype(np.float32))
    if form == "bags":
        return BagGradient(ids, offsets, pooled)
    return BagGradient(ids, offsets, pooled, weights=rng.normal(size=len(ids)).astype(np.float32))


def peak_of_a_step(given, num_threads, rows=ROWS, dim=DIM, step_counts="element"):
    def fresh():
        return SparseAdam(np.zeros((rows, dim), np.float32), step_counts=step_counts, num_threads=num_threads)

    def peak():
        optimizer = fresh()
        tracemalloc.start()
        try:
            optimizer.step(given)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    fresh().step(given)  # compiles
    with ThreadPoolExecutor(1) as another:  # this one keeps what it works in from step to step
        return another.submit(peak).result()


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("form", ["rows", "bags", "weighted bags"])
@pytest.mark.parametrize("dim", [DIM, 64])
def test_a_step_takes_sixteen_bytes_an_id(dim, form, num_threads):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, ROWS, 300_000)
    ids[::2] = 1234  # so that there are blocks to be summed first
    half, whole = (
        peak_of_a_step(gradient(form, ids[:n], dim), num_threads, dim=dim) for n in (150_000, 300_000)
    )
    assert whole >= 15 * len(ids)  # it is what has been counted
    assert whole <= 16 * len(ids) + ONCE
    assert whole - half <= 16 * 150_000 + OBJECTS


@pytest.mark.parametrize("form", ["rows", "csr"])
def test_nothing_that_a_step_takes_grows_with_the_table(form):
    ids = np.sort(np.random.default_rng(0).choice(ROWS, 5000, replace=False))

    def given(rows):
        if form == "rows":
            return gradient(form, ids)
        indptr = np.searchsorted(ids, np.arange(rows + 1))
        return CSRGradient(indptr, np.zeros(len(ids), np.int64), np.ones(len(ids), np.float32))

    small, large = (peak_of_a_step(given(rows), 1, rows) for rows in (ROWS, 10 * ROWS))
    assert large < small + OBJECTS


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [1, 3, 8, 16])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_the_state_is_two_moments_and_counts(step_counts, dim, dtype):
    rows = 1000
    optimizer = SparseAdam(np.zeros((rows, dim), dtype), step_counts=step_counts)
    (state,) = tables_of(optimizer).values()
    counts = {"element": 4 * rows * dim, "row": 4 * rows, "global": 8}[step_counts]
    arrays = [array for array in state.memory if array is not optimizer.tables["table"]]
    taken = sum(array.nbytes for array in arrays if not np.shares_memory(array, optimizer.tables["table"]))
    assert taken == 2 * rows * dim * np.dtype(dtype).itemsize + counts
