"""What a user passed as a gradient of a table on a GPU -> arrays there.

The checks of shapes, dtypes and options are those of `nb_sparse_adam.gradients`. What the arrays hold is
looked at by kernels (`steps`), for the host does not see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam.cuda import copies
from nb_sparse_adam.cuda.device import (
    Stream,
    array_from,
    as_one_row,
    blocks_for,
    empty,
    is_aligned,
    launch,
    ordinal_of,
)
from nb_sparse_adam.cuda.layout import THREADS
from nb_sparse_adam.cuda.table import extent
from nb_sparse_adam.errors import GradientError, GradientTypeError
from nb_sparse_adam.gradients import (
    BagGradient,
    CSRGradient,
    RowGradient,
    Target,
    check_mode,
    integers_of,
    offsets_of,
    on_gpu,
    shares_memory,
    values_of,
)

__all__ = ["DeviceArrays", "Form", "Given", "Matrix", "arrays_of", "check"]

FORMS = "a RowGradient, a BagGradient, a CSRGradient or a CSR matrix on the GPU, as CuPy has them"


class Form(NamedTuple):
    """What errors call the parts of a gradient."""

    ids: str
    values: str
    offsets: str = ""
    weights: str = ""
    of: str = "row"


ROWS = Form("RowGradient.rows", "RowGradient.values")
BAGS = Form("BagGradient.indices", "BagGradient.grad_output", "BagGradient.offsets", "BagGradient.weights")


class Matrix(NamedTuple):
    """Rows that are contiguous, and follow each other at a distance."""

    flat: Any  # 1-D
    rows: int
    columns: int
    apart: int


class Given(NamedTuple):
    """A gradient whose shapes and dtypes have been checked."""

    form: Form
    ids: Any  # (n,) int32 or int64; of entries, their columns
    values: Matrix
    offsets: Any = None  # (bags,) or (bags + 1,); of entries, the row pointer
    closed: bool = False  # whether the last offset must be n
    weights: Any = None
    mean: bool = False
    entries: bool = False


class DeviceArrays:
    """Reads a gradient's arrays, which are on a GPU.

    Parameters
    ----------
    memory : sequence of array
        What no gradient may share memory with.
    ordinal : int
        The table's GPU.
    stream : Stream
        On which copies are made.
    """

    def __init__(self, memory: Sequence[Any], ordinal: int, stream: Stream) -> None:
        self._taken, self._ordinal, self._stream = list(map(extent, memory)), ordinal, stream

    def read(self, what: str, given: Any, target: Target) -> Any:
        """See what was given as a device array; nothing is copied."""
        if not on_gpu(given):
            raise target.refuse(
                GradientTypeError,
                f"{what} is a {type(given).__name__} in the memory of the host, expected it on the GPU, "
                "where the table is: numba.cuda.to_device(array), cupy.asarray(array) or tensor.cuda()",
            )
        try:
            array = array_from(given)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise target.refuse(
                GradientTypeError, f"{what} cannot be seen as a device array: {error}"
            ) from error
        if array.size and ordinal_of(array) != self._ordinal:
            raise target.refuse(
                GradientError,
                f"{what} is on GPU {ordinal_of(array)}, expected GPU {self._ordinal}, where the table is",
            )
        if not is_aligned(array):
            raise target.refuse(
                GradientError, f"{what} is not aligned, expected elements at multiples of their size"
            )
        start, end = extent(array)
        if any(start < stop and begin < end for begin, stop in self._taken):
            raise shares_memory(what, target)
        return array

    def as_column(self, array: Any) -> Any:
        """See (n,) as (n, 1)."""
        if array.shape[0] and array.strides[0] != array.dtype.itemsize:
            array = self._converted(array, array.dtype)
        return array.reshape(array.shape[0], 1)

    def ready(self, array: Any, dtype: np.dtype[Any], rows_apart: bool = False) -> Any:
        """Give a contiguous vector of a dtype; or, with ``rows_apart``, a `Matrix`."""
        if not rows_apart:
            if array.dtype == np.uint64:  # what does not fit is negative, and refused as an id
                array = array.view(np.int64)
            if array.dtype == dtype and (array.size == 0 or array.strides[0] == array.dtype.itemsize):
                return array
            return self._converted(array, dtype)
        rows, columns = array.shape
        size = array.dtype.itemsize
        if array.dtype == dtype and array.size:
            apart, within = (columns * size if rows == 1 else array.strides[0]), array.strides[1]
            if (within == size or columns == 1) and apart > 0 and apart % size == 0:
                flat = as_one_row(array, (rows - 1) * (apart // size) + columns)
                return Matrix(flat, rows, columns, apart // size)
        out = empty(rows * columns, dtype)
        if array.size:
            shape = (1, THREADS) if columns == 1 else (min(THREADS, 32), max(THREADS // 32, 1))
            launch(copies.convert_matrix, blocks_for(rows, shape[1]), shape, self._stream, array, out)
        return Matrix(out, rows, columns, columns)

    def _converted(self, array: Any, dtype: np.dtype[Any]) -> Any:
        out = empty(array.shape[0], dtype)
        if array.size:
            launch(copies.convert_vector, blocks_for(array.size, THREADS), THREADS, self._stream, array, out)
        return out


def arrays_of(gradient: object) -> list[Any]:
    """Give what a gradient is made of, as the caller gave it; nothing is checked."""
    names: Sequence[str] = ("rows", "values")
    if not isinstance(gradient, RowGradient):
        names = ("indices", "offsets", "grad_output", "weights", "indptr", "data")
    found = [getattr(gradient, name, None) for name in names]
    return [array for array in found if array is not None and on_gpu(array)]


def check(gradient: object, target: Target) -> Given:
    """Turn what a user passed into arrays on the GPU, or raise a `GradientError`."""
    if isinstance(gradient, RowGradient):
        ids = integers_of(ROWS.ids, gradient.rows, target)
        values = values_of(ROWS.values, gradient.values, target, len(ids), "for each of RowGradient.rows")
        return Given(ROWS, ids, _matrix(values))
    if isinstance(gradient, BagGradient):
        return _check_bags(gradient, target)
    if isinstance(gradient, CSRGradient):
        return _check_csr("CSRGradient.", gradient, target)
    layout = getattr(gradient, "format", None)
    if isinstance(layout, str) and hasattr(gradient, "shape"):
        what = f"sparse {layout.upper()}"
        if layout != "csr":
            raise target.refuse(
                GradientTypeError,
                f"got a {what} matrix, which is not offered on a GPU, expected CSR; convert it with .tocsr()",
            )
        for attribute in ("indptr", "indices", "data"):
            if getattr(gradient, attribute, None) is None:
                raise target.refuse(
                    GradientTypeError,
                    f"got a {type(gradient).__name__} that calls itself {layout!r} but has no {attribute}, "
                    f"expected {FORMS}",
                )
        shape: Any = gradient.shape
        if tuple(shape) != (target.rows, target.dim):
            raise target.refuse(
                GradientError, f"{what} has shape {tuple(shape)}, expected {(target.rows, target.dim)}"
            )
        return _check_csr(what + " ", gradient, target)
    if on_gpu(gradient):
        raise target.refuse(
            GradientTypeError,
            f"got a dense {type(gradient).__name__}, expected {FORMS}; for a dense gradient g pass "
            "RowGradient with the rows 0..len(g) - 1",
        )
    raise target.refuse(GradientTypeError, f"got {type(gradient).__name__}, expected {FORMS}")


def _matrix(values: Any) -> Matrix:
    assert isinstance(values, Matrix)
    return values


def _check_bags(gradient: BagGradient, target: Target) -> Given:
    check_mode(gradient, target)
    ids = integers_of(BAGS.ids, gradient.indices, target)
    values = _matrix(values_of(BAGS.values, gradient.grad_output, target, None, "for each bag"))
    offsets = offsets_of(gradient, target, values.rows, len(ids))
    weights = None
    if gradient.weights is not None:
        weights = values_of(
            BAGS.weights, gradient.weights, target, len(ids), "for each of indices", matrix=False
        )
    closed = len(offsets) == values.rows + 1
    return Given(BAGS, ids, values, offsets, closed, weights, gradient.mode == "mean")


def _check_csr(what: str, gradient: Any, target: Target) -> Given:
    form = Form(f"{what}indices", f"{what}data", f"{what}indptr", of="column")
    indptr = integers_of(form.offsets, gradient.indptr, target, target.rows + 1)
    indices = integers_of(form.ids, gradient.indices, target)
    data = values_of(form.values, gradient.data, target, None, "for each entry", matrix=False)
    n = len(indices)
    if len(data) != n:
        raise target.refuse(
            GradientError, f"{form.values} has {len(data)} entries, expected {n}, one for each of indices"
        )
    return Given(form, indices, Matrix(data, n, 1, 1), indptr, closed=True, entries=True)
