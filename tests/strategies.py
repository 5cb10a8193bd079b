# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: tables, options and gradients in every form that the optimizer accepts.

Gradients hold numbers of one of two kinds. *Exact* ones are small multiples of 1/16, so that sums of
them are exact in float32 in any order, and "sums to exactly zero" has one meaning. *Wide* ones span 12
orders of magnitude and have one sign, so that no sum of them cancels.
"""

from dataclasses import dataclass

import hypothesis.extra.numpy as hnp
import numpy as np
import scipy
from hypothesis import strategies as st
from scipy import sparse

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient

ID_DTYPES = [np.int32, np.int64, np.int8, np.int16, np.uint8, np.uint16, np.uint32, np.uint64]
FLOAT_DTYPES = [np.float32, np.float64]
HAS_1D_SPARSE = tuple(int(part) for part in scipy.__version__.split(".")[:2]) >= (1, 15)


@dataclass(frozen=True)
class Gradient:
    """A gradient twice: ``given`` to the optimizer, and as ``form`` and ``arguments`` for the oracle.

    ``arrays`` are those that ``given`` holds, to see that they are not written to.
    """

    given: object
    form: str
    arguments: tuple
    arrays: tuple


@st.composite
def laid_out(draw, array):
    """The same array with another memory layout, or read-only."""
    layout = draw(st.sampled_from(["plain", "read-only", "strided", "reversed", "fortran"]))
    if layout == "strided":
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    elif layout == "reversed":
        array = array[::-1].copy()[::-1]
    elif layout == "fortran":
        array = np.asfortranarray(array)
    if layout == "read-only":
        array = array.copy()
        array.flags.writeable = False
    return array


def ids(rows, size):
    """Row ids with both ends, and many duplicates, in any integer dtype."""
    return st.tuples(
        hnp.arrays(np.int64, size, elements=st.sampled_from([0, rows - 1]) | st.integers(0, rows - 1)),
        st.sampled_from(ID_DTYPES),
    ).map(lambda drawn: drawn[0].astype(drawn[1]))


@st.composite
def numbers(draw, shape, exact=None):
    """Gradient values or weights, exact or wide, float32 or float64."""
    if draw(st.booleans()) if exact is None else exact:
        values = draw(hnp.arrays(np.int8, shape, elements=st.integers(-64, 64))) / 16
        values[values == 0] = draw(st.sampled_from([0.0, -0.0]))
    else:
        values = draw(hnp.arrays(np.float64, shape, elements=st.floats(1e-6, 1e6))) * draw(
            st.sampled_from([1, -1])
        )
    return values.astype(draw(st.sampled_from(FLOAT_DTYPES)))


@st.composite
def row_gradients(draw, shape, exact=None):
    rows, dim = shape[0], shape[1:]
    if draw(st.booleans()):
        size = draw(st.integers(0, 2 * rows))
        row_ids = draw(ids(rows, size))
    else:  # every row, in any order
        row_ids = np.array(draw(st.permutations(range(rows))), dtype=draw(st.sampled_from(ID_DTYPES)))
    row_ids = draw(laid_out(row_ids))
    value_shapes = [(len(row_ids), *dim)] if dim else [(len(row_ids),), (len(row_ids), 1)]
    values = draw(laid_out(draw(numbers(draw(st.sampled_from(value_shapes)), exact))))
    return Gradient(RowGradient(row_ids, values), "rows", (row_ids, values), (row_ids, values))


@st.composite
def bag_gradients(draw, shape, exact=None):
    mode = draw(st.sampled_from(["sum", "mean", "weighted"]))
    # The mean of 1, 2 or 4 keeps exact numbers exact.
    length = st.sampled_from([0, 1, 2, 4]) if mode == "mean" else st.integers(0, 4)
    lengths = draw(st.lists(length, max_size=5))
    indices = draw(laid_out(draw(ids(shape[0], sum(lengths)))))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(draw(st.sampled_from(ID_DTYPES)))
    offsets = draw(laid_out(offsets[:-1] if draw(st.booleans()) else offsets))
    bags = len(lengths)
    pooled_shapes = [(bags, shape[1])] if len(shape) == 2 else [(bags,), (bags, 1)]
    if exact is None:
        exact = draw(st.booleans())  # both or neither: products of the two kinds would be neither
    grad_output = draw(laid_out(draw(numbers(draw(st.sampled_from(pooled_shapes)), exact))))
    arrays, options = [indices, offsets, grad_output], {}
    if mode == "weighted":
        arrays.append(draw(laid_out(draw(numbers(len(indices), exact)))))
        options["weights"] = arrays[-1]
    elif mode == "mean":
        options["mode"] = "mean"
    given = BagGradient(indices, offsets, grad_output, **options)
    arguments = (indices, offsets, grad_output, options.get("weights"), options.get("mode", "sum"))
    return Gradient(given, "bags", arguments, tuple(arrays))


@st.composite
def csr_gradients(draw, shape, exact=None):
    """Entries in any order within a row, duplicates and stored zeros included; with and without scipy."""
    rows, dim = shape[0], (*shape, 1)[1]
    lengths = draw(st.lists(st.integers(0, 2 * dim), min_size=rows, max_size=rows))
    stored = sum(lengths)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    indices = draw(hnp.arrays(np.int64, stored, elements=st.integers(0, dim - 1)))
    data = draw(numbers(stored, exact))
    arguments = (indptr, indices, data)
    containers = ["plain", "csr_matrix", "csr_array", "csc_matrix", "csc_array", "coo_matrix", "coo_array"]
    if HAS_1D_SPARSE and len(shape) == 1:
        containers += ["coo_1d", "csr_1d"]
    container = draw(st.sampled_from(containers))
    if container == "plain":
        fit = [dtype for dtype in ID_DTYPES if stored <= np.iinfo(dtype).max]
        indptr = indptr.astype(draw(st.sampled_from(fit)))
        indices = indices.astype(draw(st.sampled_from(ID_DTYPES)))
        arrays = tuple(draw(laid_out(array)) for array in (indptr, indices, data))
        return Gradient(CSRGradient(*arrays), "csr", arguments, arrays)
    given = sparse_container(container, arguments, (rows, dim), draw(st.sampled_from([np.int32, np.int64])))
    fields = {"coo": ("row", "col", "data")}.get(container[:3], ("indptr", "indices", "data"))
    if container.endswith("1d"):
        arrays = (given.data, given.coords[0] if container == "coo_1d" else given.indices)
    else:
        arrays = tuple(getattr(given, name) for name in fields)
    return Gradient(given, "csr", arguments, arrays)


def sparse_container(container, csr, shape, id_dtype=np.int32):
    """A CSR gradient as one of scipy's containers, entry by entry: nothing is summed or sorted."""
    indptr, indices, data = csr
    row_of = np.repeat(np.arange(shape[0]), np.diff(indptr))
    if container == "coo_1d":
        return sparse.coo_array((data, (row_of.astype(id_dtype),)), shape=shape[:1])
    if container == "csr_1d":  # one row of pointers; COO's tocsr would sum duplicates into the COO's own data
        return sparse.csr_array(
            (data, row_of.astype(id_dtype), np.array([0, len(data)], id_dtype)), shape=shape[:1]
        )
    make = getattr(sparse, container)
    if container.startswith("coo"):
        return make((data, (row_of.astype(id_dtype), indices.astype(id_dtype))), shape=shape)
    if container.startswith("csr"):
        return make((data, indices.astype(id_dtype), indptr.astype(id_dtype)), shape=shape)
    order = np.argsort(indices, kind="stable")
    counts = np.bincount(indices, minlength=shape[1])
    return make(
        (data[order], row_of[order].astype(id_dtype), np.append(0, np.cumsum(counts)).astype(id_dtype)),
        shape=shape,
    )


def gradients(shape, exact=None):
    return csr_gradients(shape, exact) | row_gradients(shape, exact) | bag_gradients(shape, exact)


def joined(drawn):
    """Gradients of one table as a list of them: of exact numbers, or what is zero depends on order."""
    return Gradient(
        [gradient.given for gradient in drawn],
        "list",
        tuple((gradient.form, gradient.arguments) for gradient in drawn),
        tuple(array for gradient in drawn for array in gradient.arrays),
    )


def lists_of_gradients(shape):
    return st.lists(gradients(shape, exact=True), min_size=1, max_size=4).map(joined)


def shapes():
    """Of tables: 1-D, narrow, and wider than a vector register."""
    rows = st.integers(1, 6)
    return st.tuples(rows) | st.tuples(rows, st.sampled_from([1, 2, 3, 8, 17]))


@st.composite
def tables(draw, dtype, shape):
    """A parameter table, filled at random."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.normal(size=shape).astype(dtype)


def hyper_parameters():
    """Those that can be set between steps."""
    return st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-3, 0.1, 2.0]),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.5, 0.0), (0.0, 0.9), (0.99, 1 - 1e-7)]),
            "eps": st.sampled_from([1e-8, 1e-3, 1.0]),
            "eps_hat": st.booleans(),
            "maximize": st.booleans(),
        }
    )
