# SPDX-License-Identifier: Apache-2.0
"""TensorFlow's IndexedSlices and JAX's BCOO are gradients, known by their attributes.

With stand-ins that have these attributes and nothing else; and, marked `peers`, with JAX and TensorFlow.
"""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checks import STEP_COUNTS, assert_same_bits, refused, state_bits
from needs import need
from scipy import sparse

import nb_sparse_adam
from nb_sparse_adam import BagGradient, RowGradient, SparseAdam
from nb_sparse_adam._src.gradients import read
from nb_sparse_adam.errors import (
    GradientError,
    GradientIndexError,
    GradientTypeError,
    NonFiniteGradientError,
)

ROWS, DIM = 7, 5
SHAPE = (ROWS, DIM)


class Tensor:
    """An array of another library: NumPy may look at its memory, and not write to it."""

    def __init__(self, array):
        self.memory = np.array(array)
        self.memory.flags.writeable = False
        self.dtype, self.shape = self.memory.dtype, self.memory.shape

    def __array__(self, dtype=None, copy=None):
        assert not copy
        assert dtype in (None, self.dtype)
        return self.memory


class IndexedSlices:
    def __init__(self, values, indices, dense_shape=None):
        self.values, self.indices = Tensor(values), Tensor(indices)
        self.dense_shape = None if dense_shape is None else Tensor(np.array(dense_shape, np.int32))


class BCOO:
    """As JAX has it, whose ``shape`` and layout are Python's numbers; what it says of itself may be wrong."""

    indices_sorted = unique_indices = True

    def __init__(self, data, indices, shape, n_batch=0):
        self.data, self.indices, self.shape = Tensor(data), Tensor(indices), tuple(shape)
        self.n_batch, self.n_sparse = n_batch, self.indices.shape[-1]
        self.n_dense = len(self.shape) - n_batch - self.n_sparse


def stepped(gradient, step_counts="element", shape=SHAPE, dtype=np.float32, steps=2):
    """Bits of everything after some steps from ones."""
    table = np.ones(shape, dtype)
    opt = SparseAdam(table, lr=0.1, step_counts=step_counts)
    for _ in range(steps):
        opt.step(gradient)
    return state_bits(opt, table)


def rows_and_values(n=12, shape=SHAPE, seed=0, dtype=np.float32):
    """Rows of which some come twice, and gradients of which some are zero."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, *shape[1:])) * rng.integers(0, 2, size=(n, *shape[1:]))
    return rng.integers(shape[0], size=n).astype(np.int32), values.astype(dtype)


def entries(n=20, shape=SHAPE, seed=0, dtype=np.float32):
    """Indices (n, 2) of which some come twice, and a value for each."""
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.integers(shape[0], size=n), rng.integers(shape[1], size=n)], axis=1)
    return indices.astype(np.int32), rng.normal(size=n).astype(dtype)


def padded(indices, data, at, shape):
    """Put padding in front of the places ``at``: indices that are the shape, data that is no number."""
    nothing = np.full(data.shape[1:], np.nan)
    return np.insert(indices, at, shape[: indices.shape[1]], axis=0), np.insert(data, at, nothing, axis=0)


# --- with stand-ins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_indexed_slices_are_a_row_gradient(step_counts, dtype):
    rows, values = rows_and_values(dtype=dtype)
    expected = stepped(RowGradient(rows, values), step_counts)
    for dense_shape in (None, SHAPE):
        for ids in (rows, rows.astype(np.int64)):
            assert_same_bits(stepped(IndexedSlices(values, ids, dense_shape), step_counts), expected)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_bcoo_of_rows_is_a_row_gradient(step_counts, dtype):
    rows, values = rows_and_values(dtype=dtype)
    got = stepped(BCOO(values, rows[:, None], SHAPE), step_counts)
    assert_same_bits(got, stepped(RowGradient(rows, values), step_counts))


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_bcoo_of_entries_is_a_coo_array(step_counts, dtype):
    indices, data = entries(dtype=dtype)
    coo = sparse.coo_array((data, tuple(indices.T)), shape=SHAPE)
    assert_same_bits(stepped(BCOO(data, indices, SHAPE), step_counts), stepped(coo, step_counts))


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_they_are_gradients_of_tables_of_one_dimension(step_counts):
    rows, values = rows_and_values(shape=(ROWS,))
    expected = stepped(RowGradient(rows, values), step_counts, (ROWS,))
    columns = np.zeros_like(rows)
    for gradient in (
        IndexedSlices(values, rows, (ROWS,)),
        IndexedSlices(values, rows),
        IndexedSlices(values[:, None], rows, (ROWS, 1)),
        BCOO(values, rows[:, None], (ROWS,)),
        BCOO(values[:, None], rows[:, None], (ROWS, 1)),
        BCOO(values, np.stack([rows, columns], axis=1), (ROWS, 1)),
    ):
        assert_same_bits(stepped(gradient, step_counts, (ROWS,)), expected)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("at", [[12, 12, 12], [0], [0, 0, 5, 12]], ids=["at the end", "first", "anywhere"])
def test_padding_is_left_out(at, step_counts):
    rows, values = rows_and_values()
    indices, data = padded(rows[:, None], values, at, SHAPE)
    got = stepped(BCOO(data, indices, SHAPE), step_counts)
    assert_same_bits(got, stepped(BCOO(values, rows[:, None], SHAPE), step_counts))

    indices, data = entries(12)
    more = padded(indices, data, at, SHAPE)
    got = stepped(BCOO(*more[::-1], SHAPE), step_counts)
    assert_same_bits(got, stepped(BCOO(data, indices, SHAPE), step_counts))


@pytest.mark.parametrize("index", [(ROWS, 0), (0, DIM)])
def test_an_entry_is_padding_if_one_of_its_indices_is(index):
    indices, data = entries()
    more = BCOO(np.append(data, np.float32(np.nan)), np.append(indices, [index], axis=0), SHAPE)
    assert_same_bits(stepped(more), stepped(BCOO(data, indices, SHAPE)))


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_nothing_but_padding_is_an_empty_gradient(step_counts):
    empty = stepped(RowGradient(np.zeros(0, np.int64), np.zeros((0, DIM))), step_counts)
    for n in (0, 3):
        rows = np.full((n, 1), ROWS, np.int32)
        assert_same_bits(stepped(BCOO(np.full((n, DIM), np.nan), rows, SHAPE), step_counts), empty)
        both = np.full((n, 2), SHAPE, np.int32)
        assert_same_bits(stepped(BCOO(np.full(n, np.nan), both, SHAPE), step_counts), empty)


def test_several_tables_may_have_a_form_each():
    rows, values = rows_and_values()
    got, expected = ({name: np.ones(SHAPE, np.float32) for name in "abc"} for _ in range(2))
    SparseAdam(got).step(
        {
            "a": IndexedSlices(values, rows, SHAPE),
            "b": BCOO(values, rows[:, None], SHAPE),
            "c": RowGradient(rows, values),
        }
    )
    SparseAdam(expected).step({name: RowGradient(rows, values) for name in "abc"})
    for name in "abc":
        np.testing.assert_array_equal(got[name], expected[name])
        assert (got[name] != 1).any()


def test_every_array_of_a_gradient_may_be_another_librarys():
    rows, values = rows_and_values()
    assert_same_bits(stepped(RowGradient(Tensor(rows), Tensor(values))), stepped(RowGradient(rows, values)))
    offsets = np.array([0, 3, 12])
    bags = BagGradient(Tensor(rows), Tensor(offsets), Tensor(values[:2]))
    assert_same_bits(stepped(bags), stepped(BagGradient(rows, offsets, values[:2])))


def target():
    from nb_sparse_adam._src.optimizer import tables_of

    return tables_of(SparseAdam(np.ones(SHAPE, np.float32)))["table"].target


@pytest.mark.parametrize("at", [None, [12, 12]], ids=["no padding", "padding at the end"])
def test_arrays_are_read_where_they_are(at):
    rows, values = rows_and_values()
    indices, data = rows[:, None], values
    if at is not None:
        indices, data = padded(indices, data, at, SHAPE)
    for gradient, mine in (
        (IndexedSlices(values, rows), ("indices", "values")),
        (BCOO(data, indices, SHAPE), ("indices", "data")),
        (RowGradient(Tensor(rows), Tensor(values)), ("rows", "values")),
    ):
        given = read(gradient, target())
        for array, name in zip((given.ids, given.values), mine, strict=True):
            memory = getattr(gradient, name).memory
            assert array.__array_interface__["data"][0] == memory.__array_interface__["data"][0]


@pytest.mark.jit
def test_nothing_is_compiled_for_arrays_that_cannot_be_written_to():
    from numba.core import event

    rows, values = rows_and_values()
    indices, data = entries()
    coo = sparse.coo_array((data, tuple(indices.T)), shape=SHAPE)
    table = np.ones(SHAPE, np.float32)
    opt = SparseAdam(table)
    opt.step(RowGradient(rows, values))
    opt.step(coo)
    with event.install_recorder("numba:compile") as compiled:
        opt.step(IndexedSlices(values, rows))
        opt.step(BCOO(values, rows[:, None], SHAPE))
        opt.step(BCOO(data, indices, SHAPE))
    assert compiled.buffer == []


def with_index(array, place, index):
    array = array.copy()
    array[place] = index
    return array


def slices(**changed):
    rows, values = rows_and_values()
    return IndexedSlices(**{"values": values, "indices": rows, "dense_shape": SHAPE} | changed)


def rows_of_bcoo(at=(), **changed):
    rows, values = rows_and_values()
    indices, data = padded(rows[:, None], values, list(at), SHAPE)
    return BCOO(**{"data": data, "indices": indices, "shape": SHAPE} | changed)


def entries_of_bcoo(**changed):
    indices, data = entries()
    return BCOO(**{"data": data, "indices": indices, "shape": SHAPE} | changed)


def unfit(gradient, **changed):
    """One whose attributes do not fit together, as no library makes them."""
    gradient.__dict__.update(changed)
    return gradient


def padded_values(at=(0, 3)):
    rows, values = rows_and_values()
    return padded(rows[:, None], values, list(at), SHAPE)[1]


_rows, _values = rows_and_values()
_indices, _data = entries()

BAD = {
    "slices of another table": (
        lambda: slices(dense_shape=(ROWS, 3)),
        GradientError,
        ["IndexedSlices has shape (7, 3), expected (7, 5)"],
    ),
    "slices of values of another dim": (
        lambda: slices(values=_values[:, :3], dense_shape=None),
        GradientError,
        ["IndexedSlices.values has shape (12, 3), expected (12, 5)"],
    ),
    "slices with fewer values than ids": (
        lambda: slices(values=_values[:5]),
        GradientError,
        ["(5, 5)", "expected (12, 5)", "for each of IndexedSlices.indices"],
    ),
    "slices of an id too large": (
        lambda: slices(indices=with_index(_rows, 3, ROWS)),
        GradientIndexError,
        ["IndexedSlices.indices[3] is 7, expected 0 <= row < 7"],
    ),
    "slices of a negative id": (
        lambda: slices(indices=with_index(_rows, 3, -1)),
        GradientIndexError,
        ["IndexedSlices.indices[3] is -1"],
    ),
    "slices with float ids": (
        lambda: slices(indices=_rows.astype(np.float32)),
        GradientTypeError,
        ["IndexedSlices.indices has dtype float32, expected integers"],
    ),
    "slices of float16": (
        lambda: slices(values=_values.astype(np.float16)),
        GradientTypeError,
        ["IndexedSlices.values has dtype float16, expected float32 or float64; convert it first"],
    ),
    "slices that are not finite": (
        lambda: slices(values=with_index(_values, (4, 2), np.nan)),
        NonFiniteGradientError,
        ["IndexedSlices.values[4, 2] is nan"],
    ),
    "indices of entries instead of rows": (
        lambda: slices(indices=_indices),
        GradientError,
        ["IndexedSlices.indices has shape (20, 2), expected (n,)", "scipy.sparse.coo_array"],
    ),
    "BCOO of another table": (
        lambda: rows_of_bcoo(shape=(ROWS + 1, DIM)),
        GradientError,
        ["BCOO has shape (8, 5), expected (7, 5)"],
    ),
    "BCOO with batches": (
        lambda: BCOO(np.ones((ROWS, 2)), np.zeros((ROWS, 2, 1), np.int32), SHAPE, n_batch=1),
        GradientError,
        ["n_batch=1, n_sparse=1, n_dense=0", "expected n_batch=0", ".update_layout(n_batch=0)"],
    ),
    "BCOO that is dense": (
        lambda: BCOO(np.ones((1, *SHAPE)), np.zeros((1, 0), np.int32), SHAPE),
        GradientError,
        ["n_batch=0, n_sparse=0, n_dense=2", "n_sparse=1 (rows) or 2 (entries)", "(n_dense=1)"],
    ),
    "BCOO beyond padding": (
        lambda: rows_of_bcoo(indices=with_index(_rows, 3, ROWS + 1)[:, None]),
        GradientIndexError,
        ["BCOO.indices[3] is 8, expected 0 <= row < 7"],
    ),
    "BCOO beyond padding, after padding": (
        lambda: rows_of_bcoo(indices=np.array([[ROWS], [2], [9]]), data=np.ones((3, DIM))),
        GradientIndexError,
        ["BCOO.indices[2] is 9"],
    ),
    "BCOO that is not finite after padding": (
        lambda: rows_of_bcoo(at=[0, 3], data=with_index(padded_values(), (6, 2), np.nan)),
        NonFiniteGradientError,
        ["BCOO.data[6, 2] is nan"],
    ),
    "BCOO of entries that are not finite after padding": (
        lambda: BCOO(np.array([7, 1, np.nan]), np.array([[ROWS, 2], [1, 0], [2, 1]]), SHAPE),
        NonFiniteGradientError,
        ["BCOO.data[2] is nan"],
    ),
    "BCOO of a column too large after padding": (
        lambda: BCOO(np.ones(3), np.array([[ROWS, 2], [1, 0], [2, DIM + 1]]), SHAPE),
        GradientIndexError,
        ["BCOO.indices[:, 1][2] is 6"],
    ),
    "BCOO without a shape": (
        lambda: unfit(rows_of_bcoo(), shape=None),
        GradientTypeError,
        ["BCOO whose shape, n_batch, n_sparse, n_dense are not all integers"],
    ),
    "BCOO of half a dimension": (
        lambda: unfit(rows_of_bcoo(), n_dense=0.5),
        GradientTypeError,
        ["are not all integers"],
    ),
    "BCOO of several numbers of dimensions": (
        lambda: unfit(rows_of_bcoo(), n_sparse=np.array([2, 2])),
        GradientTypeError,
        ["are not all integers"],
    ),
    "BCSR": (
        lambda: unfit(rows_of_bcoo(), indptr=np.zeros(ROWS + 1)),
        GradientTypeError,
        ["CSRGradient(g.indptr, g.indices, g.data)"],
    ),
    "BCOO of a negative row": (
        lambda: rows_of_bcoo(indices=with_index(_rows, 3, -2)[:, None]),
        GradientIndexError,
        ["BCOO.indices[3] is -2"],
    ),
    "BCOO of a column too large": (
        lambda: entries_of_bcoo(indices=with_index(_indices, (3, 1), DIM + 1)),
        GradientIndexError,
        ["BCOO.indices[:, 1][3] is 6, expected 0 <= column < 5"],
    ),
    "BCOO of a row too large": (
        lambda: entries_of_bcoo(indices=with_index(_indices, (3, 0), ROWS + 1)),
        GradientIndexError,
        ["BCOO.indices[:, 0][3] is 8, expected 0 <= row < 7"],
    ),
    "BCOO of integers": (
        lambda: rows_of_bcoo(data=_values.astype(np.int32)),
        GradientTypeError,
        ["BCOO.data has dtype int32, expected float32 or float64"],
    ),
    "BCOO that is not finite": (
        lambda: rows_of_bcoo(data=with_index(_values, (4, 2), np.inf)),
        NonFiniteGradientError,
        ["BCOO.data[4, 2] is inf"],
    ),
    "BCOO with fewer data than indices": (
        lambda: rows_of_bcoo(data=_values[:5]),
        GradientError,
        ["BCOO.indices has shape (12, 1) and BCOO.data (5, 5), expected (n, 1) and n rows or values"],
    ),
    "BCOO whose indices have another layout": (
        lambda: unfit(entries_of_bcoo(), n_sparse=1, n_dense=1),
        GradientError,
        ["BCOO.indices has shape (20, 2)", "expected (n, 1)"],
    ),
    "BCOO whose layout does not fit its shape": (
        lambda: unfit(rows_of_bcoo(), n_dense=0),
        GradientError,
        ["n_sparse=1, n_dense=0"],
    ),
    "BCOO on a GPU": (
        lambda: unfit(rows_of_bcoo(), data=SimpleNamespace(__cuda_array_interface__={}, shape=(12, DIM))),
        GradientTypeError,
        ["BCOO.data is on a GPU", "in the memory of the host"],
    ),
}


@pytest.mark.parametrize(("make", "error", "words"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_in_words(make, error, words):
    table = np.linspace(-1, 1, ROWS * DIM, dtype=np.float32).reshape(SHAPE)
    opt = SparseAdam(table)
    opt.step(RowGradient(np.arange(ROWS), np.ones(SHAPE)))
    builtin = next(base for base in (IndexError, TypeError, ValueError) if issubclass(error, base))
    with refused(error, builtin, "gradient of table 'table'", *words, opt=opt, tables=table):
        opt.step(make())


def test_a_gradient_that_is_the_tables_memory_is_refused():
    table = np.ones(SHAPE, np.float32)
    opt = SparseAdam(table)
    gradient = slices(values=np.ones(SHAPE), indices=np.arange(ROWS))
    gradient.values.memory = table
    with refused(GradientError, ValueError, "IndexedSlices.values shares memory", opt=opt, tables=table):
        opt.step(gradient)


@pytest.mark.parametrize("padding", [[], [0], [3], [0, 3]])
def test_a_bcoo_that_is_the_tables_memory_is_refused_wherever_its_padding_is(padding):
    table = np.ones(SHAPE, np.float32)
    opt = SparseAdam(table)
    indices = np.arange(ROWS)[:, None]
    indices[padding] = ROWS
    gradient = BCOO(np.ones(SHAPE), indices, SHAPE)
    gradient.data.memory = table
    with refused(GradientError, ValueError, "BCOO.data shares memory", opt=opt, tables=table):
        opt.step(gradient)


@pytest.mark.gpu
def test_on_a_gpu_they_are_refused_by_name():
    need("numba_cuda")
    from numba import cuda

    opt = SparseAdam(cuda.to_device(np.ones(SHAPE, np.float32)))
    for gradient, name in ((slices(), "IndexedSlices"), (rows_of_bcoo(), "BCOO")):
        with pytest.raises(GradientTypeError, match=f"{name}, which is not offered on a GPU.*RowGradient"):
            opt.step(gradient)


def test_neither_library_is_imported():
    package = Path(nb_sparse_adam.__file__).parent
    imported = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    assert "numpy" in imported
    assert not imported & {"jax", "jaxlib", "tensorflow", "keras"}


# --- with JAX ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jax():
    need("jax")
    import jax

    return jax


@pytest.fixture(scope="module")
def jax_sparse(jax):
    from jax.experimental import sparse

    return sparse


@pytest.mark.peers
def test_gradients_of_gathered_rows_in_jax(jax):
    rows, _ = rows_and_values()
    table = np.linspace(-1, 1, ROWS * DIM, dtype=np.float32).reshape(SHAPE)
    again = table.copy()
    ours, numpys = SparseAdam(table, lr=0.1), SparseAdam(again, lr=0.1)
    loss = jax.jit(jax.value_and_grad(lambda gathered: (gathered**2).sum()))
    ids = jax.numpy.asarray(rows)
    losses = []
    for _ in range(20):
        value, gradient = loss(table[rows])
        losses.append(float(value))
        ours.step(RowGradient(ids, gradient))
        numpys.step(RowGradient(rows, 2 * again[rows]))
    assert_same_bits(state_bits(ours, table), state_bits(numpys, again))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.peers
def test_arrays_of_jax_are_read_where_they_are(jax):
    rows, values = rows_and_values()
    ids, gradient = jax.numpy.array(rows), jax.numpy.array(values)
    given = read(RowGradient(ids, gradient), target())
    assert given.ids.__array_interface__["data"][0] == ids.unsafe_buffer_pointer()
    assert given.values.__array_interface__["data"][0] == gradient.unsafe_buffer_pointer()


@pytest.mark.peers
@pytest.mark.parametrize("seed", range(10))
def test_bcoo_in_every_layout_is_what_it_is_as_a_dense_array(jax_sparse, seed):
    make = jax_sparse.BCOO
    rng = np.random.default_rng(seed)
    dense = (rng.normal(size=SHAPE) * (rng.random(SHAPE) < 0.4)).astype(np.float32)
    dense[rng.integers(ROWS)] = 0
    more = int(rng.integers(40, 60))  # than it stores
    with_twins = make((np.tile(_data, 2), np.tile(_indices, (2, 1))), shape=SHAPE)
    for gradient, n_dense in (
        (make.fromdense(dense), 0),
        (make.fromdense(dense, nse=more), 0),
        (make.fromdense(dense, n_dense=1), 1),
        (make.fromdense(dense, n_dense=1, nse=more), 1),
        (make.fromdense(dense, n_batch=1).update_layout(n_batch=0), 0),
        (make.fromdense(dense, nse=more).sum_duplicates(nse=more), 0),
        (make.fromdense(dense.T, nse=more).T, 0),
        (with_twins.sum_duplicates(nse=more), 0),
    ):
        assert (gradient.n_batch, gradient.n_dense) == (0, n_dense)
        whole = np.asarray(gradient.todense())
        present = np.flatnonzero(whole.any(axis=1))
        for step_counts in STEP_COUNTS:
            expected = stepped(RowGradient(present, whole[present]), step_counts)
            assert_same_bits(stepped(gradient, step_counts), expected)
    coo = sparse.coo_array((np.tile(_data, 2), np.tile(_indices.T, 2)), shape=SHAPE)
    assert_same_bits(stepped(with_twins), stepped(coo))  # summed in our order, which is not JAX's


@pytest.mark.peers
def test_the_sparse_gradient_of_a_bcoo_in_jax(jax_sparse):
    stored = jax_sparse.BCOO((_data, _indices), shape=SHAPE)
    gradient = jax_sparse.grad(lambda table: (table @ np.ones((DIM, 2), np.float32)).sum())(stored)
    assert isinstance(gradient, jax_sparse.BCOO)
    coo = sparse.coo_array((np.asarray(gradient.data), tuple(_indices.T)), shape=SHAPE)
    assert_same_bits(stepped(gradient), stepped(coo))


@pytest.mark.peers
def test_what_jax_has_and_we_have_not_is_refused_in_words(jax):
    jnp = jax.numpy
    table = np.ones(SHAPE, np.float32)
    opt = SparseAdam(table)
    halves = RowGradient(jnp.array([1]), jnp.ones((1, DIM), jnp.bfloat16))
    with refused(GradientTypeError, TypeError, "dtype bfloat16, expected float32", opt=opt, tables=table):
        opt.step(halves)

    def traced(rows):
        opt.step(RowGradient([1], rows))
        return rows.sum()

    with refused(GradientTypeError, TypeError, "cannot be read as an array", opt=opt, tables=table):
        jax.jit(traced)(jnp.ones((1, DIM)))


@pytest.mark.peers
@pytest.mark.parametrize("layout", [(1, 0), (1, 1), (2, 0), (0, 2)], ids=str)
def test_what_is_said_of_other_layouts_of_a_bcoo_makes_them_gradients(jax_sparse, layout):
    n_batch, n_dense = layout
    gradient = jax_sparse.BCOO.fromdense(np.ones(SHAPE, np.float32), n_batch=n_batch, n_dense=n_dense)
    table = np.ones(SHAPE, np.float32)
    opt = SparseAdam(table)
    with refused(GradientError, ValueError, f"n_batch={n_batch}", opt=opt, tables=table) as caught:
        opt.step(gradient)
    name, value = re.search(r"convert it with \.update_layout\((\w+)=(\d)\)", str(caught.value)).groups()
    opt.step(gradient.update_layout(**{name: int(value)}))
    assert (table != 1).all()


# --- with TensorFlow --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tf():
    return need("tensorflow")


@pytest.mark.peers
@pytest.mark.parametrize("shape", [SHAPE, (ROWS,)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_gradients_of_gathered_rows_in_tensorflow(tf, step_counts, compiled, shape):
    rows, _ = rows_and_values(shape=shape)
    variable = tf.Variable(np.linspace(-1, 1, np.prod(shape), dtype=np.float32).reshape(shape))

    def gradient_of(ids):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(variable, ids) ** 2)
        return tape.gradient(loss, variable)

    gradient = (tf.function(gradient_of) if compiled else gradient_of)(tf.constant(rows.reshape(3, 4)))
    assert isinstance(gradient, tf.IndexedSlices)
    expected = RowGradient(rows, 2 * variable.numpy()[rows])
    got = stepped(gradient, step_counts, shape)
    assert_same_bits(got, stepped(expected, step_counts, shape))


@pytest.mark.peers
def test_several_lookups_in_one_variable_in_tensorflow(tf):
    variable = tf.Variable(np.ones(SHAPE, np.float32))
    with tf.GradientTape() as tape:
        first, second = tf.nn.embedding_lookup(variable, [1, 3]), tf.gather(variable, [3])
        loss = tf.reduce_sum(first) + tf.reduce_sum(5 * second)
    gradient = tape.gradient(loss, variable)
    assert isinstance(gradient, tf.IndexedSlices)
    values = np.repeat([[1.0], [1.0], [5.0]], DIM, axis=1)
    assert_same_bits(stepped(gradient), stepped(RowGradient([1, 3, 3], values)))


@pytest.mark.peers
def test_tensors_of_tensorflow_are_read_where_they_are(tf):
    rows, values = rows_and_values()
    gradient = tf.IndexedSlices(tf.constant(values), tf.constant(rows))
    first, second = (read(gradient, target()) for _ in range(2))
    assert np.shares_memory(first.ids, second.ids)
    assert np.shares_memory(first.values, second.values)


@pytest.mark.peers
def test_what_tensorflow_has_and_we_have_not_is_refused_in_words(tf):
    table = np.ones(SHAPE, np.float32)
    opt = SparseAdam(table)
    halves = tf.IndexedSlices(tf.ones((1, DIM), tf.bfloat16), tf.constant([1]))
    with refused(GradientTypeError, TypeError, "dtype bfloat16, expected float32", opt=opt, tables=table):
        opt.step(halves)
    other = tf.IndexedSlices(tf.ones((1, DIM)), tf.constant([1]), tf.constant([ROWS, DIM + 1]))
    with refused(GradientError, ValueError, "(7, 6), expected (7, 5)", opt=opt, tables=table):
        opt.step(other)

    @tf.function(autograph=False)  # which else wraps the error in one of its own
    def traced():
        opt.step(tf.IndexedSlices(tf.ones((1, DIM)), tf.constant([1])))

    with refused(GradientTypeError, TypeError, "cannot be read as an array", opt=opt, tables=table):
        traced()
