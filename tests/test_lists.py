# SPDX-License-Identifier: Apache-2.0
"""A list of gradients of one table is their sum, taken as one gradient."""

from types import SimpleNamespace

import numpy as np
import pytest
from backends import CUDA
from checks import STEP_COUNTS, assert_same_bits, refused, state_bits, step_beside_oracle
from hypothesis import given
from hypothesis import strategies as st
from oracle import OracleSparseAdam
from scipy import sparse
from strategies import Gradient, hyper_parameters, joined, lists_of_gradients, shapes, tables

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam._src.stepping import step_together
from nb_sparse_adam.errors import (
    GradientError,
    GradientIndexError,
    GradientTypeError,
    NonFiniteGradientError,
)

ROWS, DIM = 6, 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@given(data=st.data())
def test_lists_of_any_forms_follow_the_oracle(step_counts, dtype, data):
    shape = data.draw(shapes(), "shape")
    table = data.draw(tables(dtype, shape), "table")
    options = data.draw(hyper_parameters(), "options")
    opt = SparseAdam(table, step_counts=step_counts, **options)
    oracle = OracleSparseAdam(table, step_counts=step_counts, **options)
    for gradient in data.draw(st.lists(lists_of_gradients(shape), min_size=1, max_size=3), "lists"):
        step_beside_oracle(opt, table, oracle, {"table": gradient})


def with_bad_numbers(rng, form):
    """A gradient of some exact numbers of which few are not finite, or have a square that overflows."""

    def some(*shape):
        values = np.round(rng.normal(size=shape) * 4) / 4
        values[rng.random(shape) < 0.02] = rng.choice([np.nan, np.inf, -np.inf, 1e30])
        return values

    lengths = rng.choice([0, 1, 2, 4], 4)  # whose means are exact
    n = int(lengths.sum())
    ids = rng.integers(0, ROWS, n)
    if form == "rows":
        arguments = (ids, some(n, DIM))
        return Gradient(RowGradient(*arguments), form, arguments, arguments)
    if form == "csr":
        indptr = np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=ROWS))])
        arguments = (indptr, rng.integers(0, DIM, n), some(n))
        return Gradient(CSRGradient(*arguments), form, arguments, arguments)
    arrays = (ids, np.concatenate([[0], np.cumsum(lengths)]), some(4, DIM))
    if form == "bags":
        weights = np.ones(n) if rng.random() < 0.5 else some(n)
        return Gradient(BagGradient(*arrays, weights=weights), form, (*arrays, weights), (*arrays, weights))
    arguments = (*arrays, None, "mean")
    return Gradient(BagGradient(*arrays, mode="mean"), "bags", arguments, arrays)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip", "propagate"])
@given(
    seed=st.integers(0, 2**32 - 1),
    forms=st.lists(st.sampled_from(["rows", "csr", "bags", "mean"]), min_size=2, max_size=3),
)
def test_what_is_not_finite_in_a_list_is_treated_as_in_one_gradient(step_counts, on_nonfinite, seed, forms):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    options = {"step_counts": step_counts, "on_nonfinite": on_nonfinite}
    opt, oracle = SparseAdam(table, **options), OracleSparseAdam(table, **options)
    for _ in range(2):
        gradient = joined([with_bad_numbers(rng, form) for form in forms])
        sums = oracle.sums(gradient.form, gradient.arguments)
        if on_nonfinite == "propagate" and sums.bad:
            return  # whose bits nobody promises
        loose = any(not np.isfinite(array).all() for array in gradient.arrays)
        if on_nonfinite == "raise" and (sums.bad or loose):  # loose: of an empty bag, which no row receives
            with pytest.raises(NonFiniteGradientError):
                opt.step(gradient.given)
            continue
        step_beside_oracle(opt, table, oracle, {"table": gradient})


def arrays(rng, n, bags=None):
    """Ids of a table of `LARGE` rows, values of `WIDE` for each or for each bag, and weights."""
    values = rng.normal(size=(n if bags is None else bags, WIDE)).astype(np.float32)
    return rng.zipf(1.3, n) % LARGE, values, rng.normal(size=n).astype(np.float32)


LARGE, WIDE, N = 500, 8, 20_000  # enough ids of one row to be summed in blocks, and by several threads


def stepped(gradient, step_counts="element", num_threads=None):
    table = np.ones((LARGE, WIDE), np.float32)
    opt = SparseAdam(table, step_counts=step_counts, num_threads=num_threads)
    for _ in range(2):
        opt.step(gradient)
    return state_bits(opt, table)


def offsets_of(rng, n, bags):
    return np.concatenate([[0], np.sort(rng.integers(0, n + 1, bags - 1)), [n]])


def rows_and_rows(rng):
    (a, x, _), (b, y, _) = arrays(rng, N), arrays(rng, N // 3)
    return [RowGradient(a, x), RowGradient(b, y)], RowGradient(np.append(a, b), np.append(x, y, 0))


def bags_and_bags(rng):
    (a, x, v), (b, y, _) = arrays(rng, N, 700), arrays(rng, N // 2, 300)
    p, q = offsets_of(rng, N, 700), offsets_of(rng, N // 2, 300)
    one = BagGradient(
        np.append(a, b),
        np.append(p[:-1], q + N),
        np.append(x, y, 0),
        np.append(v, np.repeat(np.float32(1) / np.maximum(np.diff(q), 1).astype(np.float32), np.diff(q))),
    )
    return [BagGradient(a, p[:-1], x, v), BagGradient(b, q, y, mode="mean")], one


def bags_without_weights(rng):
    (a, x, _), (b, y, _) = arrays(rng, N, 700), arrays(rng, N // 2, 300)
    p, q = offsets_of(rng, N, 700), offsets_of(rng, N // 2, 300)
    one = BagGradient(np.append(a, b), np.append(p[:-1], q + N), np.append(x, y, 0))
    return (BagGradient(a, p, x), BagGradient(b, q[:-1], y)), one


def bags_and_rows(rng):
    (a, x, v), (b, y, w) = arrays(rng, N, 700), arrays(rng, N // 2)
    p = offsets_of(rng, N, 700)
    one = BagGradient(
        np.append(a, b),
        np.append(p, N + 1 + np.arange(N // 2)),
        np.append(x, y, 0),
        np.append(v, np.ones_like(w)),
    )
    return [BagGradient(a, p, x, v), RowGradient(b, y)], one


def matrices(rng):
    (a, _, v), (b, _, w) = arrays(rng, N), arrays(rng, N // 2)
    c, d = rng.integers(0, WIDE, N), rng.integers(0, WIDE, N // 2)
    order = np.argsort(b, kind="stable")
    b, d, w = b[order], d[order], w[order]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(b, minlength=LARGE))])
    shape = (LARGE, WIDE)
    one = sparse.coo_array((np.append(v, w), (np.append(a, b), np.append(c, d))), shape)
    return [sparse.coo_array((v, (a, c)), shape), CSRGradient(indptr, d, w)], one


def a_matrix_and_rows(rng):
    (a, _, v), (b, y, _) = arrays(rng, N // 4), arrays(rng, N // 4)
    c = rng.integers(0, WIDE, N // 4)
    dense = np.zeros((N // 4, WIDE), np.float32)
    dense[np.arange(N // 4), c] = v
    matrix = sparse.coo_array((v, (a, c)), (LARGE, WIDE))
    return [matrix, RowGradient(b, y)], RowGradient(np.append(a, b), np.append(dense, y, 0))


def one_alone(rng):
    a, x, v = arrays(rng, N, 700)
    one = BagGradient(a, offsets_of(rng, N, 700), x, v)
    return [one], one


@pytest.mark.jit
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize(
    "make",
    [
        rows_and_rows,
        bags_and_bags,
        bags_without_weights,
        bags_and_rows,
        matrices,
        a_matrix_and_rows,
        one_alone,
    ],
)
def test_a_list_has_the_bits_of_one_gradient_whose_arrays_are_joined(make, step_counts):
    several, one = make(np.random.default_rng(5))
    expected = stepped(one, step_counts)
    for num_threads in (None, 1):
        assert_same_bits(stepped(several, step_counts, num_threads), expected)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_total_of_zero_is_not_active_and_a_step_counts_once(step_counts):
    table = np.ones((4, 2), np.float32)
    opt = SparseAdam(table, step_counts=step_counts)
    bags = BagGradient([1, 2], [0], np.array([[1.5, 1.0]]))
    opt.step([bags, RowGradient([1], np.array([[-1.5, 1.0]]))])
    expected = {"element": [[0, 0], [0, 1], [1, 1], [0, 0]], "row": [0, 1, 1, 0], "global": 1}[step_counts]
    assert opt.state["table"].steps.tolist() == expected
    assert opt.state["table"].exp_avg[1].tolist() == pytest.approx([0.0, 0.2])


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0,), (4, 2)])
def test_lists_of_nothing_are_a_step(shape, step_counts):
    table = np.ones(shape, np.float32)
    opt = SparseAdam(table, step_counts=step_counts)
    no_ids, dims = np.zeros(0, np.int64), shape[1:]
    nothing = [
        RowGradient(no_ids, np.zeros((0, *dims))),
        BagGradient(no_ids, [0], np.zeros((0, *dims)), mode="mean"),
        BagGradient(no_ids, [0, 0, 0], np.zeros((2, *dims)), weights=np.zeros(0)),
        CSRGradient(np.zeros(shape[0] + 1, int), no_ids, np.zeros(0)),
    ]
    for several in (nothing, nothing[:1] * 2, nothing[1:2] * 2, nothing[3:] * 2):
        opt.step(several)
    assert (opt.state["table"].steps == (4 if step_counts == "global" else 0)).all()
    assert (table == 1).all()


def test_lists_stand_beside_gradients_of_other_tables_and_optimizers():
    def at_once_and_by_one(lists):
        several = {"user": np.ones((4, 2)), "item": np.ones((5, 3))}
        opt, other = SparseAdam(several), np.ones((4, 2))
        opt.step({"user": lists(1), "item": RowGradient([4], np.ones((1, 3)))})
        opt.step({"user": lists(2)})
        step_together([(opt, {"user": lists(3)}), (SparseAdam(other), lists(4))])
        return state_bits(opt, several) | {"other": other}

    def listed(n):
        return [RowGradient([n % 3], np.full((1, 2), float(n))), RowGradient([1, 3], np.ones((2, 2)))]

    def one(n):
        return RowGradient([n % 3, 1, 3], np.array([[n, n], [1, 1], [1, 1.0]]))

    assert_same_bits(at_once_and_by_one(listed), at_once_and_by_one(one))


RIGHT = RowGradient([0, 1], np.ones((2, DIM)))
NAN = np.array([[1.0, 1.0, 1.0], [1.0, np.nan, 1.0]])
COO = sparse.coo_array(([1.0, 2.0], ([0, 3], [2, 1])), (ROWS, DIM))
CSC = sparse.csc_array(COO)


def damaged(matrix, name, at, value):
    """A copy of one of scipy's with another number in it, which scipy would not make."""
    matrix = matrix.copy()
    numbers = getattr(matrix, name)
    numbers[at] = value
    return matrix


BAGS_OF_NAN = BagGradient([1, 2, 5], [0, 1, 3], NAN)
WRONG = [
    ([RIGHT, RowGradient([0, 9], NAN)], GradientIndexError, "gradient[1]", "RowGradient.rows[1] is 9"),
    (
        [RIGHT, RowGradient([0, 1], NAN)],
        NonFiniteGradientError,
        "gradient[1]",
        "RowGradient.values[1, 1] is nan",
    ),
    (
        [RowGradient([0, 1], NAN), RIGHT],
        NonFiniteGradientError,
        "gradient[0]",
        "RowGradient.values[1, 1] is nan",
    ),
    ([RIGHT, RowGradient([0], NAN)], GradientError, "gradient[1]", "RowGradient.values has shape (2, 3)"),
    ([RIGHT, BAGS_OF_NAN], NonFiniteGradientError, "gradient[1]", "BagGradient.grad_output[1, 1] is nan"),
    (
        [RIGHT, RIGHT, BagGradient([1, 2, -5], [0, 1, 3], np.ones((2, DIM)))],
        GradientIndexError,
        "gradient[2]",
        "BagGradient.indices[2] is -5",
    ),
    (
        [RIGHT, BagGradient([1, 2], [0, 1], np.ones((2, DIM)), [1.0, np.inf])],
        NonFiniteGradientError,
        "gradient[1]",
        "BagGradient.weights[1] is inf",
    ),
    (
        [BagGradient([1, 2], [0, 1, 3], np.ones((2, DIM))), RIGHT],  # which joined would end where it says
        GradientIndexError,
        "gradient[0]",
        "BagGradient.offsets[2] is 3, expected at most 2",
    ),
    (
        [RIGHT, BagGradient([1, 2], [1, 2], np.ones((2, DIM)))],
        GradientIndexError,
        "gradient[1]",
        "BagGradient.offsets[0] is 1, expected 0",
    ),
    (
        [RIGHT, BagGradient([1, 2], [0, 2, 1], np.ones((3, DIM)))],
        GradientIndexError,
        "gradient[1]",
        "BagGradient.offsets[2] is 1, less than BagGradient.offsets[1] = 2",
    ),
    (
        [COO, CSRGradient([0, 1, 2, 2, 2, 2, 2], [0, 3], [1.0, 1.0])],
        GradientIndexError,
        "gradient[1]",
        "CSRGradient.indices[1] is 3, expected 0 <= column < 3",
    ),
    (
        [COO, CSRGradient([0, 1, 1, 1, 1, 1, 1], [0, 2], [1.0, 1.0])],
        GradientError,
        "gradient[1]",
        "CSRGradient.indptr[6] is 1, expected len(indices) = 2",
    ),
    (
        [RIGHT, CSRGradient([0, 1, 2, 2, 2, 2, 2], [0, -1], [1.0, 1.0])],
        GradientIndexError,
        "gradient[1]",
        "CSRGradient.indices[1] is -1, expected 0 <= column < 3",
    ),
    (
        [CSC, damaged(COO, "col", 1, 7)],
        GradientIndexError,
        "gradient[1]",
        "scipy.sparse COO col[1] is 7, expected 0 <= column < 3",
    ),
    (
        [RIGHT, damaged(COO, "col", 1, 7)],
        GradientIndexError,
        "gradient[1]",
        "scipy.sparse COO col[1] is 7, expected 0 <= column < 3",
    ),
    (
        [RIGHT, damaged(COO, "row", 1, 7)],
        GradientIndexError,
        "gradient[1]",
        "scipy.sparse COO row[1] is 7, expected 0 <= row < 6",
    ),
    (
        [COO, damaged(CSC, "indices", 1, 6)],
        GradientIndexError,
        "gradient[1]",
        "scipy.sparse CSC indices[1] is 6",
    ),
    (
        [COO, damaged(CSC, "data", 1, np.nan)],
        NonFiniteGradientError,
        "gradient[1]",
        "scipy.sparse CSC data[1] is nan",
    ),
    (
        [RIGHT, damaged(CSC, "data", 1, np.nan)],
        NonFiniteGradientError,
        "gradient[1]",
        "scipy.sparse CSC data[1] is nan",
    ),
    (
        [RowGradient([3], np.full((1, DIM), 3e38)), RowGradient([3], np.full((1, DIM), 3e38))],
        NonFiniteGradientError,
        "gradient of",
        "row 3, a sum over 2 ids",
    ),
    ([RIGHT, None], GradientTypeError, "gradient[1]", "got NoneType, expected a RowGradient"),
    ([RIGHT, [RIGHT]], GradientTypeError, "gradient[1]", "got list", "join them to one list"),
    ([], GradientTypeError, "gradient of", "got list, expected a RowGradient"),
]


@pytest.mark.parametrize(("given", "error", "words"), [(each[0], each[1], each[2:]) for each in WRONG])
def test_what_is_wrong_is_told_with_its_place_in_the_list(given, error, words):
    table = np.ones((ROWS, DIM), np.float32)
    opt = SparseAdam(table)
    opt.step(RIGHT)
    builtin = {GradientTypeError: TypeError, GradientIndexError: IndexError}.get(error, ValueError)
    with refused(error, builtin, "of table 'table': ", *words, opt=opt, tables=table):
        opt.step(given)


def test_where_padding_was_left_out_places_are_those_of_the_caller():
    bcoo = SimpleNamespace(
        data=np.array([[1.0] * DIM, [2.0] * DIM, [np.nan] * DIM]),
        indices=np.array([[1], [ROWS], [2]]),  # the second is padding
        shape=(ROWS, DIM),
        n_batch=0,
        n_sparse=1,
        n_dense=1,
    )
    opt = SparseAdam(np.ones((ROWS, DIM), np.float32))
    with refused(NonFiniteGradientError, ValueError, "gradient[1] of", "data[2, 0] is nan"):
        opt.step([RIGHT, bcoo])


def test_a_list_that_shares_memory_with_the_table_is_refused():
    table = np.ones((ROWS, DIM))
    opt = SparseAdam(table)
    with refused(GradientError, ValueError, "gradient[1] of table", "shares memory", opt=opt, tables=table):
        opt.step([RIGHT, RowGradient([1], table[2:3])])


@pytest.mark.gpu
def test_a_list_is_refused_by_name_on_a_gpu():
    table = CUDA.table(np.ones((ROWS, DIM), np.float32))
    opt = SparseAdam(table)
    listed = [CUDA.gradient(RowGradient(np.arange(2), np.ones((2, DIM), np.float32)))] * 2
    words = ("got list", "a list of gradients is not offered on a GPU: join their arrays")
    with refused(GradientTypeError, TypeError, *words, opt=opt, tables=table):
        opt.step(listed)
