# SPDX-License-Identifier: Apache-2.0
"""NaN, infinities and overflow: refused, skipped by row, or let through, as ``on_nonfinite`` says."""

import numpy as np
import pytest
from backends import CPU, host
from checks import STEP_COUNTS, assert_same_bits, bits, refused, state_bits
from oracle import OracleSparseAdam
from scipy import sparse

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam.errors import NonFiniteGradientError

ROWS, DIM, BAD = 6, 3, 4  # the bad row is row 4

# What makes row 4 of a float32 table bad: two contributions to one element of it.
CONTRIBUTIONS = {
    "nan": (np.nan, 1.0),
    "inf": (1.0, np.inf),
    "-inf": (-np.inf, 1.0),
    "inf and -inf": (np.inf, -np.inf),
    "a sum that overflows": (3e38, 3e38),
    "a sum whose square overflows": (1e30, 0.0),
    "a sum whose square just overflows": (2.0**63, 2.0**63),
    "a negative sum whose square overflows": (-1.5e19, -1.5e19),
    "float64 beyond float32": (1e39, 1.0),
}
FORMS = ("csr", "rows", "bags", "weighted bags")


def gradient(form, first, second, *, bad_row=True):
    """Rows 0, 2 and 5 receive ordinary numbers, row 4 ``first`` and ``second`` in its last element.

    Returns the gradient and the oracle's form and arguments.
    """
    rows = np.array([5, 4, 0, 2, 4, 5])
    values = np.arange(1.0, 19.0).reshape(6, DIM)
    values[1, 2], values[4, 2] = first, second
    if not bad_row:
        rows, values = np.delete(rows, [1, 4]), np.delete(values, [1, 4], axis=0)
    if form == "rows":
        return RowGradient(rows, values), "rows", (rows, values)
    if form == "csr":
        order = np.argsort(rows, kind="stable")
        indptr = np.concatenate([[0], np.cumsum(DIM * np.bincount(rows, minlength=ROWS))])
        arguments = (indptr, np.tile(np.arange(DIM), len(rows)), values[order].ravel())
        return CSRGradient(*arguments), "csr", arguments
    offsets = np.arange(len(rows) + 1)
    weights = np.ones(len(rows)) if form == "weighted bags" else None
    arguments = (rows, offsets, values, weights)
    return BagGradient(rows, offsets, values, weights=weights), "bags", arguments


def place(form, first, second):
    """Where ``gradient`` has its first number that is not finite in float32; of a sum, its row."""
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.array([first, second]).astype(np.float32))
    if finite.all():
        return f"row {BAD}"
    first_or_second = int(finite[0])
    if form == "csr":
        return f"data[{(8, 11)[first_or_second]}]"
    return f"{'values' if form == 'rows' else 'grad_output'}[{(1, 4)[first_or_second]}, 2]"


def trained(on_nonfinite, step_counts="element", dtype=np.float32, backend=CPU):
    """A table, its optimizer and its oracle, one step from the start."""
    parameters = np.linspace(-1, 1, ROWS * DIM).reshape(ROWS, DIM).astype(dtype)
    table = backend.table(parameters)
    opt = SparseAdam(table, lr=0.1, step_counts=step_counts, on_nonfinite=on_nonfinite)
    oracle = OracleSparseAdam(parameters, lr=0.1, step_counts=step_counts, on_nonfinite=on_nonfinite)
    rows, values = np.arange(ROWS), np.full((ROWS, DIM), 0.5)
    opt.step(backend.gradient(RowGradient(rows, values)))
    oracle.step(oracle.sums("rows", (rows, values)))
    return table, opt, oracle


@pytest.mark.parametrize("contributions", CONTRIBUTIONS.values(), ids=CONTRIBUTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_raise_refuses_before_anything_is_written(form, contributions, backend):
    for step_counts in backend.step_counts:
        table, opt, _ = trained("raise", step_counts, backend=backend)
        bad, *_ = gradient(form, *contributions)
        with refused(
            NonFiniteGradientError,
            ValueError,
            place(form, *contributions),
            "on_nonfinite",
            opt=opt,
            tables=table,
        ) as caught:
            opt.step(backend.gradient(bad))
        _, of_cpu, _ = trained("raise", step_counts)
        with pytest.raises(NonFiniteGradientError) as the_same:
            of_cpu.step(bad)
        assert str(caught.value) == str(the_same.value)


@pytest.mark.parametrize("contributions", CONTRIBUTIONS.values(), ids=CONTRIBUTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_skip_keeps_the_bits_of_bad_rows_and_steps_the_others_as_if_alone(
    step_counts, form, contributions, backend
):
    table, opt, oracle = trained("skip", step_counts, backend=backend)
    bad, *arguments = gradient(form, *contributions)
    before = state_bits(opt, table)
    opt.step(backend.gradient(bad))
    oracle.step(oracle.sums(*arguments))
    state, expected = opt.state["table"], oracle.tables["table"]
    expected.assert_close(host(table), host(state.exp_avg), host(state.exp_avg_sq))
    np.testing.assert_array_equal(host(state.steps), expected.steps)
    assert opt.skipped_rows["table"] == 1

    after = state_bits(opt, table)
    for what in ("param", "exp_avg", "exp_avg_sq") + (("steps",) if step_counts != "global" else ()):
        np.testing.assert_array_equal(after["table", what][BAD], before["table", what][BAD])

    # The other rows: the very bits of a step without the bad row.
    other, opt_other, _ = trained("skip", step_counts, backend=backend)
    opt_other.step(backend.gradient(gradient(form, *contributions, bad_row=False)[0]))
    alone = state_bits(opt_other, other)
    assert alone.pop(("table", "skipped_rows")) == 0
    assert after.pop(("table", "skipped_rows")) == 1
    assert_same_bits(after, alone)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_propagate_follows_ieee_arithmetic(step_counts, form, backend):
    for contributions in ((np.nan, 1.0), (np.inf, 1.0), (1.0, -np.inf), (np.inf, -np.inf)):
        table, opt, oracle = trained("propagate", step_counts, backend=backend)
        for _ in range(2):  # the second step starts from moments that are not finite
            bad, *arguments = gradient(form, *contributions)
            opt.step(backend.gradient(bad))
            oracle.step(oracle.sums(*arguments))
        state, expected = opt.state["table"], oracle.tables["table"]
        got = host(table)
        expected.assert_close(got, host(state.exp_avg), host(state.exp_avg_sq))
        np.testing.assert_array_equal(host(state.steps), expected.steps)
        assert np.isnan(got[BAD, 2])
        assert np.isfinite(np.delete(got, BAD, axis=0)).all()
        assert opt.skipped_rows["table"] == 0


def test_nan_is_not_zero_so_it_is_active(backend):
    table, opt, _ = trained("propagate", "element", backend=backend)
    opt.step(backend.gradient(RowGradient(np.array([BAD]), np.array([[0.0, np.nan, 0.0]]))))
    assert host(opt.state["table"].steps)[BAD].tolist() == [1, 2, 1]
    assert np.isnan(host(table)[BAD]).tolist() == [False, True, False]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("grad_output", [0.0, 1.0])
def test_weights_that_are_not_finite_are_refused_or_skipped(value, grad_output, backend):
    indices, offsets = np.array([1, BAD, 0]), np.array([0, 2])
    given = BagGradient(indices, offsets, np.full((2, DIM), grad_output), weights=np.array([1.0, value, 1.0]))
    given = backend.gradient(given)
    for step_counts in STEP_COUNTS:
        table, opt, _ = trained("raise", step_counts, backend=backend)
        with refused(NonFiniteGradientError, ValueError, opt=opt, tables=table):
            opt.step(given)
        table, opt, _ = trained("skip", step_counts, backend=backend)
        before = bits(table)
        opt.step(given)
        assert opt.skipped_rows["table"] == 1
        np.testing.assert_array_equal(bits(table)[BAD], before[BAD])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_pooled_gradient_reaches_every_id_of_its_bag_even_with_weight_zero(value, backend):
    grad_output = np.ones((2, DIM))
    grad_output[1, 0] = value
    given = BagGradient(
        np.array([0, 2, 5, 3]), np.array([0, 1]), grad_output, weights=np.array([1.0, 0.0, 1.0, 1.0])
    )
    table, opt, _ = trained("skip", backend=backend)
    before = bits(table)
    opt.step(backend.gradient(given))
    assert opt.skipped_rows["table"] == 3
    assert (bits(table) != before).any(axis=1).tolist() == [True, False, False, False, False, False]


def test_products_of_finite_numbers_that_overflow_are_bad(backend):
    given = BagGradient(np.array([BAD]), np.array([0]), np.full((1, DIM), 1e30), weights=np.array([1e30]))
    table, opt, _ = trained("raise", backend=backend)
    with refused(NonFiniteGradientError, ValueError, opt=opt, tables=table):
        opt.step(backend.gradient(given))


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_every_bad_row_is_counted_once_a_step_and_counts_add_up(step_counts, backend):
    table, opt, _ = trained("skip", step_counts, backend=backend)
    bad = np.full((5, DIM), np.nan)
    for step in (1, 2):
        before = state_bits(opt, table)
        opt.step(backend.gradient(RowGradient(np.array([1, 3, 1, 1, 5]), bad)))
        assert opt.skipped_rows["table"] == 3 * step
        after = state_bits(opt, table)
        np.testing.assert_array_equal(after["table", "param"], before["table", "param"])
        advanced = after["table", "steps"].astype(np.int64) - before["table", "steps"]
        assert (advanced == (step_counts == "global")).all()  # the call counts, the rows do not


def test_the_largest_number_whose_square_is_finite_is_taken(backend):
    for dtype, largest in ((np.float32, 1.8e19), (np.float64, 1.3e154)):
        table, opt, _ = trained("raise", dtype=dtype, backend=backend)
        opt.step(backend.gradient(RowGradient(np.array([BAD]), np.full((1, DIM), largest))))
        assert np.isfinite(host(table)).all()
        assert np.isfinite(host(opt.state["table"].exp_avg_sq)).all()
        with refused(NonFiniteGradientError, ValueError, opt=opt, tables=table):
            opt.step(backend.gradient(RowGradient(np.array([BAD]), np.full((1, DIM), 1.1 * largest))))


def test_one_bad_table_refuses_the_whole_step(backend):
    user, item = np.ones((3, 2), np.float32), np.ones((3, 2), np.float32)
    tables = backend.table({"user": user, "item": item})
    opt = SparseAdam(tables, step_counts="global")
    good = RowGradient(np.array([1]), np.ones((1, 2)))
    bad = RowGradient(np.array([1]), np.full((1, 2), np.nan))
    for gradients in ({"user": good, "item": bad}, {"item": bad, "user": good}):
        with refused(NonFiniteGradientError, ValueError, "item", opt=opt, tables=tables):
            opt.step(backend.gradient(gradients))


def test_the_message_says_what_was_got_and_the_first_place(backend):
    table, opt, _ = trained("raise", backend=backend)
    values = np.ones((40, DIM))
    values[23, 1], values[31, 0] = -np.inf, np.nan
    with refused(NonFiniteGradientError, ValueError, "values[23, 1]", "-inf", opt=opt, tables=table):
        opt.step(backend.gradient(RowGradient(np.arange(40) % ROWS, values)))
    weights = np.ones(40)
    weights[23:25] = np.nan
    with refused(NonFiniteGradientError, ValueError, "weights[23]", "nan", opt=opt, tables=table):
        given = BagGradient(np.arange(40) % ROWS, np.array([0]), values[:1], weights=weights)
        opt.step(backend.gradient(given))


def test_places_in_scipy_matrices_are_those_of_their_own_data():
    rows, columns, data = np.array([5, 4, 0, 4]), np.array([0, 2, 1, 2]), np.array([1.0, 1.0, 2.0, np.inf])
    matrix = sparse.coo_array((data, (rows, columns)), shape=(ROWS, DIM))
    table, opt, _ = trained("raise")
    with refused(NonFiniteGradientError, ValueError, "data[3]", "inf", opt=opt, tables=table):
        opt.step(matrix)
    with refused(NonFiniteGradientError, ValueError, "data[3]", "inf", opt=opt, tables=table):
        opt.step(sparse.csc_array((data, rows[[2, 1, 3, 0]], np.array([0, 1, 2, 4])), shape=(ROWS, DIM)))


@pytest.mark.jit
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_the_check_holds_in_gradients_large_enough_for_threads(step_counts):
    rng = np.random.default_rng(6)
    rows, values = rng.integers(0, 4000, 20_000), rng.normal(size=(20_000, 16)).astype(np.float32)
    for place in (0, 10_007, 19_999):
        poisoned = values.copy()
        poisoned[place, 15] = np.nan
        table = rng.normal(size=(4000, 16)).astype(np.float32)
        opt = SparseAdam(table, step_counts=step_counts)
        with refused(NonFiniteGradientError, ValueError, "nan", opt=opt, tables=table):
            opt.step(RowGradient(rows, poisoned))
        opt.on_nonfinite = "skip"
        before = bits(table)
        opt.step(RowGradient(rows, poisoned))
        assert opt.skipped_rows["table"] == 1
        kept = (bits(table) == before).all(axis=1)
        np.testing.assert_array_equal(
            np.flatnonzero(kept[np.unique(rows)]), [np.searchsorted(np.unique(rows), rows[place])]
        )
