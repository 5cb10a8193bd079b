# SPDX-License-Identifier: Apache-2.0
"""Forms of gradients and their conversions: each way of saying the same gradient does the same."""

import numpy as np
import pytest
import scipy
from backends import CPU, host
from checks import STEP_COUNTS, assert_same_bits, bits, state_bits
from scipy import sparse
from strategies import HAS_1D_SPARSE, ID_DTYPES, sparse_container

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam

SHAPE = (7, 5)
# Unsorted columns, duplicates (one pair cancels), stored zeros, empty first and last rows.
CSR = (
    np.array([0, 0, 3, 3, 6, 8, 9, 9]),
    np.array([4, 0, 4, 2, 2, 1, 3, 3, 0]),
    np.array([1.0, -2.0, 0.5, 3.0, -3.0, 0.25, 0.0, 0.0, 1.5]),
)
CONTAINERS = ["csr_matrix", "csr_array", "csc_matrix", "csc_array", "coo_matrix", "coo_array"]


def stepped(gradient, step_counts="element", shape=SHAPE, dtype=np.float32, steps=2, backend=CPU):
    """Bits of everything after some steps from ones."""
    table = backend.table(np.ones(shape, dtype))
    opt = SparseAdam(table, lr=0.1, step_counts=step_counts)
    gradient = backend.gradient(gradient)
    for _ in range(steps):
        opt.step(gradient)
    return state_bits(opt, table)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_scipy_containers_are_the_csr_gradient(container, step_counts):
    expected = stepped(CSRGradient(*CSR), step_counts)
    for id_dtype in (np.int32, np.int64):
        assert_same_bits(stepped(sparse_container(container, CSR, SHAPE, id_dtype), step_counts), expected)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_csr_gradient_is_the_dense_rows_that_it_stores(step_counts, backend):
    matrix = sparse_container("csr_array", CSR, SHAPE)
    present = np.flatnonzero(np.diff(CSR[0]))
    rows = RowGradient(present, matrix.toarray()[present])
    expected = stepped(rows, step_counts)
    for gradient in (CSRGradient(*CSR), sparse_container("csr_matrix", CSR, SHAPE)):
        assert_same_bits(stepped(gradient, step_counts, backend=backend), expected)


@pytest.mark.parametrize("container", CONTAINERS)
def test_scipy_objects_are_not_modified(container):
    matrix = sparse_container(container, CSR, SHAPE)
    names = ("row", "col", "data") if container.startswith("coo") else ("indptr", "indices", "data")
    before = {name: (getattr(matrix, name), bits(getattr(matrix, name))) for name in names}
    flags = {name: matrix.__dict__.get(name) for name in ("_has_sorted_indices", "_has_canonical_format")}
    stepped(matrix)
    for name, (array, array_bits) in before.items():
        assert getattr(matrix, name) is array
        np.testing.assert_array_equal(bits(array), array_bits)
    assert {name: matrix.__dict__.get(name) for name in flags} == flags
    assert matrix.nnz == len(CSR[1])


@pytest.mark.parametrize("container", ["csr_array", "coo_array"])
def test_float64_matrices_serve_float32_tables_and_the_other_way_round(container):
    expected = {dtype: stepped(CSRGradient(*CSR), dtype=dtype) for dtype in (np.float32, np.float64)}
    for data_dtype in (np.float32, np.float64):
        matrix = sparse_container(container, (*CSR[:2], CSR[2].astype(data_dtype)), SHAPE)
        for dtype in (np.float32, np.float64):
            assert_same_bits(stepped(matrix, dtype=dtype), expected[dtype])


@pytest.mark.parametrize("id_dtype", ID_DTYPES)
def test_ids_of_every_integer_dtype_are_the_same_ids(id_dtype, backend):
    rows, values = np.array([6, 0, 6, 3]), np.arange(20.0).reshape(4, 5)
    for plain, given in (
        (RowGradient(rows, values), RowGradient(rows.astype(id_dtype), values)),
        (
            BagGradient(rows, np.array([0, 1, 4]), values[:2]),
            BagGradient(rows.astype(id_dtype), np.array([0, 1, 4], id_dtype), values[:2]),
        ),
        (CSRGradient(*CSR), CSRGradient(CSR[0].astype(id_dtype), CSR[1].astype(id_dtype), CSR[2])),
    ):
        assert_same_bits(stepped(given, backend=backend), stepped(plain))


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_table_of_one_dimension_takes_every_form(step_counts, backend):
    rows, values = np.array([4, 0, 4]), np.array([1.0, -2.0, 0.5])
    expected = stepped(RowGradient(rows, values), step_counts, (5,))
    column = sparse.coo_array((values, (rows, np.zeros(3, np.int32))), shape=(5, 1))
    same = [
        RowGradient(rows, values),
        RowGradient(rows, values[:, None]),
        CSRGradient(np.array([0, 1, 1, 1, 1, 3]), np.zeros(3, np.int32), np.array([-2.0, 1.0, 0.5])),
        column.tocsr(),
        BagGradient(rows, np.arange(4), values),
        BagGradient(rows, np.arange(3), values[:, None]),
    ]
    if backend is CPU:
        same += [column, column.tocsc()]
    for gradient in same:
        assert_same_bits(stepped(gradient, step_counts, (5,), backend=backend), expected)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.skipif(not HAS_1D_SPARSE, reason=f"scipy {scipy.__version__} has no 1-D sparse arrays")
def test_a_table_of_one_dimension_takes_1d_sparse_arrays(step_counts):
    rows, values = np.array([4, 0, 4]), np.array([1.0, -2.0, 0.5])
    csr = np.array([0, 1, 1, 1, 1, 3]), np.zeros(3, np.int32), np.array([-2.0, 1.0, 0.5])
    expected = stepped(RowGradient(rows, values), step_counts, (5,))
    for container in ("coo_1d", "csr_1d"):
        vector = sparse_container(container, csr, (5, 1))
        assert vector.shape == (5,)
        assert_same_bits(stepped(vector, step_counts, (5,)), expected)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_bags_of_one_id_are_row_gradients(step_counts, backend):
    rows, values = np.array([4, 0, 4, 6]), np.arange(-3.0, 17.0).reshape(4, 5)
    expected = stepped(RowGradient(rows, values), step_counts)
    for offsets in (np.arange(5), np.arange(4)):
        for options in ({}, {"mode": "mean"}, {"weights": np.ones(4)}):
            bags = BagGradient(rows, offsets, values, **options)
            assert_same_bits(stepped(bags, step_counts, backend=backend), expected)


def test_mean_of_a_bag_is_its_sum_with_weights_of_one_over_the_length(backend):
    # 3 and 7 ids: not powers of two, so that this rounds; at most one id of a bag falls on each row.
    rng = np.random.default_rng(0)
    indices, offsets = np.concatenate([rng.permutation(7)[:3], rng.permutation(7)]), np.array([0, 3, 10])
    grad_output = rng.normal(size=(2, 5))
    steps = []
    for gradient in (
        BagGradient(indices, offsets, grad_output, mode="mean"),
        BagGradient(indices, offsets, grad_output, weights=np.repeat([1 / 3, 1 / 7], [3, 7])),
    ):
        table = backend.table(np.ones(SHAPE))
        opt = SparseAdam(table, lr=0.1)
        opt.step(backend.gradient(gradient))
        steps.append((host(table), host(opt.state["table"].exp_avg)))
    np.testing.assert_allclose(steps[0][0], steps[1][0], rtol=1e-14)
    np.testing.assert_allclose(steps[0][1], steps[1][1], rtol=1e-13)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_an_id_of_weight_zero_is_present(step_counts, backend):
    table = backend.table(np.ones((3, 2)))
    opt = SparseAdam(table, step_counts=step_counts)
    bags = BagGradient(np.array([2, 1]), np.array([0]), np.ones((1, 2)), weights=np.array([0.0, 1.0]))
    opt.step(backend.gradient(bags))
    expected = {"element": [[0, 0], [1, 1], [0, 0]], "row": [0, 1, 1], "global": 1}
    assert host(opt.state["table"].steps).tolist() == expected[step_counts]


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_bags_without_ids_contribute_nothing(step_counts, backend):
    indices, around_empty = np.array([1, 3]), np.array([0, 0, 2, 2])
    full = BagGradient(indices, np.array([0, 2]), np.full((1, 5), 2.0))
    around = BagGradient(indices, around_empty, np.array([[9.0] * 5, [2.0] * 5, [7.0] * 5]))
    mean = BagGradient(indices, around_empty, np.array([[9.0] * 5, [4.0] * 5, [7.0] * 5]), mode="mean")
    expected = stepped(full, step_counts)
    assert_same_bits(stepped(around, step_counts, backend=backend), expected)
    assert_same_bits(stepped(mean, step_counts, backend=backend), expected)
    nothing = BagGradient(np.zeros(0, np.int64), np.zeros(4, np.int64), np.ones((3, 5)))
    no_bags = BagGradient(np.zeros(0, np.int64), np.zeros(1, np.int64), np.ones((0, 5)))
    no_offsets = BagGradient(np.zeros(0, np.int64), np.zeros(0, np.int64), np.ones((0, 5)))
    for empty in (nothing, no_bags, no_offsets):
        after = stepped(empty, step_counts, backend=backend)
        assert not after["table", "exp_avg"].any()
        assert after["table", "steps"].max(initial=0) == (2 if step_counts == "global" else 0)


def test_grad_output_may_be_a_broadcast(backend):
    indices, offsets = np.array([1, 3, 1]), np.array([0, 2, 3])
    broadcast = BagGradient(indices, offsets, np.broadcast_to(np.float32(0.5), (2, 5)))
    expected = stepped(BagGradient(indices, offsets, np.full((2, 5), 0.5)))
    assert_same_bits(stepped(broadcast, backend=backend), expected)


def test_ids_that_live_in_readonly_memory_are_read(backend):
    rows, values = np.frombuffer(np.array([6, 1]).tobytes(), np.int64), np.frombuffer(np.ones(10).tobytes())
    gradient = RowGradient(rows, values.reshape(2, 5))
    expected = stepped(RowGradient(np.array([6, 1]), np.ones((2, 5))))
    assert_same_bits(stepped(gradient, backend=backend), expected)


def test_arrays_of_the_other_byte_order_and_unaligned_ones_are_converted():
    rows, values = np.array([6, 1, 6]), np.arange(15.0).reshape(3, 5)
    expected = stepped(RowGradient(rows, values))
    swapped = RowGradient(
        rows.astype(rows.dtype.newbyteorder()), values.astype(np.dtype(np.float32).newbyteorder())
    )
    assert_same_bits(stepped(swapped), expected)
    unaligned = np.frombuffer(b"\0" + rows.tobytes(), np.uint8)[1:].view(np.int64)
    assert not unaligned.flags.aligned
    assert_same_bits(stepped(RowGradient(unaligned, values)), expected)


def test_scipy_matrices_may_have_room_for_more_entries_than_they_store():
    matrix = sparse_container("csr_array", CSR, SHAPE)
    matrix.indices = np.append(matrix.indices, 977).astype(np.int32)
    matrix.data = np.append(matrix.data, np.nan)
    assert_same_bits(stepped(matrix), stepped(CSRGradient(*CSR)))


def test_a_gradient_can_be_used_again_and_is_what_it_was(backend):
    rows, values = np.array([6, 1, 6]), np.arange(15.0).reshape(3, 5)
    gradient = backend.gradient(RowGradient(rows, values))
    table = backend.table(np.ones(SHAPE, np.float32))
    opt = SparseAdam(table, lr=0.1)
    for _ in range(2):
        opt.step(gradient)
    assert_same_bits(state_bits(opt, table), stepped(RowGradient(rows, values)))
    assert host(gradient.rows).tolist() == [6, 1, 6]
    assert host(gradient.values).ravel().tolist() == list(range(15))
