# SPDX-License-Identifier: Apache-2.0
"""Preparing a step: whatever the form, dtypes, faults, parts and threads, it is what a slow look finds."""

import dataclasses

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import Given, Prepared, expected

from nb_sparse_adam._src.engine import records
from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.prepare import PREPARE
from nb_sparse_adam._src.engine.records import (
    BAGS,
    COO,
    CSC,
    CSR,
    DISTINCT,
    ENTRIES,
    PROPAGATE,
    RAISE,
    ROWS,
    SKIP,
)
from nb_sparse_adam._src.engine.scratch import BLOCK
from nb_sparse_adam._src.engine.threads import max_threads

THREADS = min(2, max_threads())
ID_DTYPES = st.sampled_from([np.int32, np.int64])


def agree(got, want):
    """Whether two results are the same, NaN included."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_equal(got[name], value, err_msg=name)


def check(step, threads=1, **options):
    """Prepare a step, and hold it to a slow look."""
    prepared = Prepared(step, threads, **options)
    wanted = [expected(given) for given in step]
    for i, want in enumerate(wanted):
        if want["fault"] or not any(other["fault"] for other in wanted):
            agree(prepared.result(i), want)
        else:
            assert prepared.found[i]["fault"] == 0
    return prepared


# --- any gradient -----------------------------------------------------------------------------------------


@st.composite
def numbers(draw, shape):
    """Values; now and then one that is not finite, or very large."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    values = rng.normal(size=shape).astype(dtype)
    for value in draw(st.sampled_from([[], [], [], [np.inf], [-np.inf, np.nan], [1e20], [np.nan]])):
        if values.size:
            values.reshape(-1)[draw(st.integers(0, values.size - 1))] = value
    return values


@st.composite
def whole(draw, n, limit):
    """Integers in 0..limit - 1, in any order, often ascending; now and then one that is not."""
    dtype = draw(ID_DTYPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = rng.integers(0, max(limit, 1), n).astype(dtype)
    order = draw(st.sampled_from(["any", "ascending", "increasing"]))
    if order == "ascending":
        ids.sort()
    elif order == "increasing" and n <= limit:
        ids = np.sort(rng.permutation(limit)[:n]).astype(dtype)
    if n and draw(st.integers(0, 5)) == 0:
        bad = st.sampled_from([-1, limit, np.iinfo(dtype).min, np.iinfo(dtype).max])
        ids[draw(st.integers(0, n - 1))] = draw(bad)
    return ids


@st.composite
def offsets(draw, lengths, last=True):
    """Where each begins, and the end of the last; now and then with one that cannot be."""
    dtype = draw(ID_DTYPES)
    made = np.append(0, np.cumsum(lengths)).astype(dtype)[: None if last else -1]
    if len(made) and draw(st.integers(0, 5)) == 0:
        bad = st.sampled_from([-1, 1, 3, int(sum(lengths)) + 1, np.iinfo(dtype).min, np.iinfo(dtype).max])
        made[draw(st.integers(0, len(made) - 1))] = draw(bad)
    return made


@st.composite
def gradients(draw):
    form = draw(st.sampled_from([ROWS, BAGS, CSR, CSC, COO]))
    rows, dim = draw(st.sampled_from([0, 1, 5, 40, 3_000_000])), draw(st.sampled_from([0, 1, 3, 8]))
    if form in (CSR, CSC):
        rows = draw(st.integers(0, 30))
    parts = draw(st.integers(1, 4))
    options = {
        "on_nonfinite": draw(st.sampled_from([RAISE, SKIP, PROPAGATE])),
        "parts": parts,
        "tasks": parts + draw(st.integers(0, 3)),
    }
    lengths = st.lists(st.sampled_from([0, 0, 1, 2, 5, 12]), max_size=12)
    most = 100 if rows else 0
    if form == ROWS:
        ids = draw(whole(draw(st.integers(0, most)), rows))
        values = draw(numbers((len(ids), dim)))
        if draw(st.booleans()):  # rows with a gap between them
            values = np.repeat(values, 2, axis=1)[:, :dim]
        return Given(form, rows, dim, ids, values, **options)
    if form == BAGS:
        sizes = draw(lengths) if rows else []
        ids = draw(whole(sum(sizes), rows))
        given = Given(form, rows, dim, ids, draw(numbers((len(sizes), dim))), **options)
        last = draw(st.booleans()) or not sizes
        given.offsets = draw(offsets(sizes, last))
        kind = draw(st.sampled_from(["sum", "mean", "weighted"]))
        given.mean = kind == "mean"
        if kind == "weighted":
            given.weights = draw(numbers(len(ids))).astype(given.values.dtype)
        return given
    if form == COO:
        n = draw(st.integers(0, most if dim else 0))
        ids, columns = draw(whole(n, rows)), draw(whole(n, dim))
        return Given(form, rows, dim, ids, draw(numbers((n, 1))), columns=columns, **options)
    count, limit = (rows, dim) if form == CSR else (dim, rows)
    sizes = [draw(st.sampled_from([0, 0, 0, 1, 2, 3])) if limit else 0 for _ in range(count)]
    if draw(st.booleans()):  # as most are: columns that increase
        sizes = [min(size, limit) for size in sizes]
        ids = [np.sort(np.random.default_rng(0).permutation(limit)[:size]) for size in sizes]
        ids = np.concatenate([np.zeros(0, int), *ids]).astype(draw(ID_DTYPES))
    else:
        ids = draw(whole(sum(sizes), limit))
    return Given(form, rows, dim, ids, draw(numbers((len(ids), 1))), offsets=draw(offsets(sizes)), **options)


@given(st.lists(gradients(), min_size=1, max_size=3), st.integers(1, THREADS))
def test_any_step_is_what_a_slow_look_finds(step, threads):
    check(step, threads)


@pytest.mark.jit
@given(gradients())
def test_with_lists_of_int64(gradient):
    check([gradient], wide=True)


@pytest.mark.jit
@given(gradients())
def test_neither_parts_nor_threads_nor_the_driver_change_anything(gradient):
    alone = dataclasses.replace(gradient, parts=1)
    want = Prepared([alone]).result()
    for parts in (1, 3):
        for parallel in (False, True):
            again = dataclasses.replace(gradient, parts=parts, tasks=parts)
            agree(Prepared([again], THREADS if parallel else 1, parallel).result(), want)


def test_no_gradients():
    assert len(Prepared([]).found) == 0


# --- large ones -------------------------------------------------------------------------------------------


def zipf(n, rows, seed=0):
    drawn = np.random.default_rng(seed).zipf(1.2, n).astype(np.uint64)
    return ((drawn * np.uint64(2654435761)) % np.uint64(rows)).astype(np.int64)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("form", [ROWS, BAGS, COO])
def test_long_segments(form, parts):
    n, rng = 4000, np.random.default_rng(1)
    ids = zipf(n, 2_000_000)
    assert np.unique(ids, return_counts=True)[1].max() > BLOCK
    given = Given(form, 2_000_000, 2, ids, rng.normal(size=(n, 2)).astype(np.float32), parts=parts, tasks=5)
    if form == BAGS:
        given.offsets = np.arange(0, n + 1, 4, dtype=np.int32)
        given.values = given.values[: n // 4]
    elif form == COO:
        given.columns, given.values = np.zeros(n, np.int32), given.values[:, :1].copy()
    check([given], min(parts, THREADS))


@pytest.mark.jit
@given(
    st.lists(
        st.sampled_from([1, 2, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 3000]), min_size=1, max_size=12
    ),
    st.sampled_from([1, 7, 126, 127, 252, 253, 254, 600]),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from(["rows", "bags", "weighted bags", "wide", "weighted and wide"]),
    st.integers(1, 9),
)
def test_what_long_segments_need_fits_beside_everything_else(lengths, dim, dtype, form, parts):
    # Longer by one than a block is where it is tightest: two sums for one id too many.
    ids = np.repeat(np.arange(len(lengths)), lengths)
    np.random.default_rng(0).shuffle(ids)
    n = len(ids)
    given = Given(ROWS, 20, dim, ids, np.ones((n, dim), dtype), parts=parts, tasks=parts)
    if "bags" in form or "weighted" in form:
        given.form, given.offsets = BAGS, np.arange(n + 1)
    if "weighted" in form:
        given.weights = np.ones(n, dtype)
    check([given], min(parts, THREADS), wide="wide" in form)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_one_segment_across_all_parts(parts):
    ids = np.array([1] * 3 + [7] * 1500 + [9, 9])
    values = np.ones((len(ids), 1))
    prepared = check([Given(ROWS, 10, 1, ids, values, parts=parts, tasks=parts)])
    assert prepared.found[0]["longest"] == 1500


def test_tasks_cost_about_the_same():
    n = 3000
    given = Given(ROWS, 2_000_000, 1, zipf(n, 2_000_000), np.ones((n, 1)), tasks=8)
    prepared = check([given])
    starts = np.array(prepared.result()["starts"])
    lengths = np.diff(starts)
    cost = 4 + np.where(lengths > BLOCK, -(-lengths // BLOCK), lengths)
    costs = [cost[t["first"] : t["last"]].sum() for t in prepared.tasks]
    assert max(costs) <= cost.sum() / 8 + 2 * cost.max()


def test_rows_of_a_pointer_are_cut_by_their_entries():
    sizes = [0] * 50 + [3] * 50
    given = Given(
        CSR, 100, 3, np.tile(np.arange(3), 50), np.ones((150, 1)), offsets=np.append(0, np.cumsum(sizes)),
        parts=2, tasks=8,
    )  # fmt: skip
    prepared = check([given])
    counts = [int(t["last"] - t["first"]) for t in prepared.tasks]
    assert max(counts) <= 50 // 7 + 1


@pytest.mark.jit
def test_many_tables_and_a_large_one():
    rng = np.random.default_rng(3)
    step = [
        Given(ROWS, 500, 4, rng.integers(0, 500, n), rng.normal(size=(n, 4))) for n in rng.integers(0, 90, 60)
    ]
    step[20].parts, step[20].tasks = 3, 3
    step[21].parts, step[21].tasks = 2, 4
    large = Given(ROWS, 10**6, 1, zipf(20_000, 10**6), np.ones((20_000, 1)), parts=4, tasks=4)
    check([*step, large], THREADS)


@pytest.mark.parametrize("n", [1, 47, 48, 49, 300])
@pytest.mark.parametrize("rows", [1, 2, 50, 2**40])
def test_few_and_many_ids_and_bits(n, rows):
    ids = np.random.default_rng(n).integers(0, rows, n)
    check([Given(ROWS, rows, 1, ids, np.ones((n, 1)))])


# --- faults -----------------------------------------------------------------------------------------------


def bits_of(form, n, rows, dim, values_rows, weighted):
    """How many bits an id, or entry, and its payload take together; more than 63 cannot be grouped."""
    keys = rows if form in (ROWS, BAGS) else rows * dim
    payloads = values_rows if form == BAGS and not weighted else n
    return max(keys - 1, 0).bit_length() + max(payloads - 1, 0).bit_length()


def test_an_id_and_a_position_of_more_than_63_bits_are_told():
    ids = np.array([5, 5, 1, 2**62 - 1])
    given = Given(ROWS, 2**62, 1, ids, np.ones((4, 1)))
    assert bits_of(ROWS, 4, 2**62, 1, 4, False) == 64
    assert Prepared([given]).found[0]["fault"] == records.TOO_MANY_BITS
    increasing = dataclasses.replace(given, ids=np.array([0, 1, 5, 2**62 - 1]))
    assert Prepared([increasing]).result()["kind"] == DISTINCT


def test_the_first_fault_of_each_gradient_is_told():
    values, ids = np.ones((4, 1)), np.array([1, 9, 2, -1])
    values[1] = np.nan
    offsets = np.array([0, 3, 2, 4])
    for form, kind in ((BAGS, records.ID), (CSR, records.OFFSET), (CSC, records.OFFSET)):
        shape = (3, 5) if form == CSR else (5, 3)
        given = Given(form, *shape, ids, values[:3] if form == BAGS else values, offsets=offsets)
        if form == BAGS:
            given.rows, given.dim = 5, 1
        assert check([given]).found[0]["fault"] == kind


begin, work = PREPARE.begin, PREPARE.work


@jit(entry=True)
def meddling_begin(phase, job):
    """Change the memory of the user after the first phase."""
    if phase == 1:
        for i in range(len(job[1])):
            job[1][i] = job[2][i]
    return begin(phase, job[0])


@jit(entry=True)
def meddling_work(phase, unit, t, job):
    work(phase, unit, t, job[0])


MEDDLING = Drivers(meddling_begin, meddling_work)


def meddle(given, array, later):
    """Prepare a gradient whose array has other numbers once it was scanned."""
    prepared = Prepared([given], run=False)
    prepared.driver = MEDDLING.serial
    later = np.ascontiguousarray(later, array.dtype).reshape(-1).view(np.int64)
    prepared.job = (prepared.job, array.reshape(-1).view(np.int64), later)
    prepared.run()
    return prepared


@pytest.mark.parametrize("wild", [-1, 10, np.iinfo(np.int64).min, np.iinfo(np.int64).max])
def test_ids_that_change_after_they_were_checked(wild):
    ids = np.array([0, 2, 4, 1, 3, 5])  # each part increases: not packed before the parts have met
    given = Given(ROWS, 10, 1, ids, np.ones((6, 1)), parts=2, tasks=2)
    later = ids.copy()
    later[4] = wild
    assert meddle(given, ids, later).found[0]["fault"] == records.CHANGED


@pytest.mark.parametrize("wild", [-1, 3, np.iinfo(np.int64).max])
def test_columns_that_change_after_they_were_checked(wild):
    ids, offsets = np.array([2, 1, 0, 1, 2, 2]), np.array([0, 2, 4, 4, 6])
    given = Given(CSR, 4, 3, ids, np.ones((6, 1)), offsets=offsets, parts=2, tasks=2)
    assert check([given]).found[0]["kind"] == ENTRIES
    later = ids.copy()
    later[5] = wild
    assert meddle(given, ids, later).found[0]["fault"] == records.CHANGED


@pytest.mark.parametrize(
    ("which", "form"),
    [
        *(("ids", form) for form in (ROWS, BAGS, CSR, CSC, COO)),
        ("columns", COO),
        *(("offsets", form) for form in (BAGS, CSR, CSC)),
        *(("values", form) for form in (ROWS, BAGS, CSR, CSC, COO)),
        ("weights", BAGS),
    ],
)
def test_what_was_wrong_and_is_not_any_more(form, which):
    """There is no place to tell of."""
    good = {
        "ids": np.array([1, 0, 2, 0]),
        "columns": np.array([0, 1, 0, 1]) if form == COO else None,
        "offsets": np.array([0, 1, 3, 4]) if form in (BAGS, CSR, CSC) else None,
        "values": np.ones((3 if form == BAGS else 4, 2 if form in (ROWS, BAGS) else 1)),
        "weights": np.ones(4) if form == BAGS else None,
    }
    bad = good[which].copy()
    bad.reshape(-1)[2] = {"offsets": 0, "values": np.nan, "weights": np.inf}.get(which, 17)
    shape = {CSR: (3, 5), CSC: (5, 3)}.get(form, (5, 2))
    given = Given(form, *shape, **{**good, which: bad}, parts=2, tasks=2)
    assert check([given]).found[0]["fault"] not in (0, records.CHANGED)
    assert meddle(given, bad, good[which]).found[0]["fault"] == records.CHANGED


def test_sorted_ids_are_what_was_packed_whatever_becomes_of_the_users():
    ids = np.random.default_rng(5).integers(0, 1000, 200)
    given = Given(ROWS, 1000, 1, ids, np.ones((200, 1)), parts=2, tasks=2)
    want = expected(given)
    agree(meddle(given, ids, np.full(200, -(2**60))).result(), want)


if numba.config.BOUNDSCHECK or numba.config.DISABLE_JIT:

    @pytest.mark.parametrize("parts", [1, 2])
    def test_where_bounds_are_checked_a_wrong_record_is_seen(parts):
        ids = np.random.default_rng(0).integers(0, 1000, 200)
        prepared = Prepared([Given(ROWS, 1000, 1, ids, np.ones((200, 1)), parts=parts)], run=False)
        prepared.gradients["tasks"] = 2  # there is room for one
        with pytest.raises(IndexError):
            prepared.run()
