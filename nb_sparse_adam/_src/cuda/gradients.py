# SPDX-License-Identifier: Apache-2.0
"""What a user passed as a gradient of a table on a GPU -> arrays there.

Shapes, dtypes and options are checked by `gradients`, which asks `DeviceReader` for arrays.
What these hold is looked at by kernels (`steps`), for the host does not see it.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.cuda import copies
from nb_sparse_adam._src.cuda.device import (
    Stream,
    array_from,
    as_one_row,
    blocks_for,
    empty,
    is_aligned,
    launch,
    ordinal_of,
)
from nb_sparse_adam._src.cuda.records import THREADS
from nb_sparse_adam._src.cuda.table import extent
from nb_sparse_adam._src.faults import shares_memory
from nb_sparse_adam._src.gradients import Given, Target, on_gpu, read
from nb_sparse_adam._src.naming import type_name
from nb_sparse_adam.errors import GradientError, GradientTypeError


class Matrix(NamedTuple):
    """Rows that are contiguous, and follow each other at a distance."""

    flat: Any  # 1-D
    rows: int
    columns: int
    stride: int  # elements from one row to the next

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns


class DeviceReader:
    """Reads a gradient's arrays, which are on a GPU.

    Parameters
    ----------
    taken : (list of int, list of int)
        Where the memory that no gradient may share begins, and where it ends, in order.
    ordinal : int
        The table's GPU.
    stream : Stream
        On which copies are made.
    """

    forms = "a RowGradient, a BagGradient, a CSRGradient or a CSR matrix on the GPU, as CuPy has them"
    layouts: tuple[str, ...] = ("csr",)

    def __init__(self, taken: tuple[list[int], list[int]], ordinal: int, stream: Stream) -> None:
        self._taken, self._ordinal, self._stream = taken, ordinal, stream

    def read(self, what: str, given: Any, target: Target) -> Any:
        """See what was given as a device array; nothing is copied."""
        if not on_gpu(given):
            raise target.refuse(
                GradientTypeError,
                f"{what} is a {type_name(given)} in the memory of the host, expected it on the GPU, "
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
        starts, ends = self._taken
        behind = bisect_right(ends, start)  # the first that ends behind its start
        if start < end and behind < len(starts) and starts[behind] < end:
            raise shares_memory(what, target)
        return array

    def as_column(self, array: Any) -> Any:
        """See (n,) as (n, 1)."""
        if array.shape[0] and array.strides[0] != array.dtype.itemsize:
            array = self._converted(array, array.dtype)
        return array.reshape(array.shape[0], 1)

    def stored(self, pointer: Any) -> int | None:  # noqa: ARG002
        """Return None: to read how many entries a row pointer says are stored would be to wait."""
        return None

    def ready(
        self,
        what: str,  # noqa: ARG002
        array: Any,
        dtype: np.dtype[Any],
        target: Target,  # noqa: ARG002
        matrix: bool,
    ) -> Any:
        """Give a contiguous vector of a dtype; or, of a matrix, a `Matrix`."""
        if not matrix:
            if array.dtype == np.uint64:  # what does not fit is negative, and refused as an id
                array = array.view(np.int64)
            if array.dtype == dtype and (array.size == 0 or array.strides[0] == array.dtype.itemsize):
                return array
            return self._converted(array, dtype)
        rows, columns = array.shape
        size = array.dtype.itemsize
        if array.dtype == dtype and array.size:
            stride, within = (columns * size if rows == 1 else array.strides[0]), array.strides[1]
            if (within == size or columns == 1) and stride > 0 and stride % size == 0:
                flat = as_one_row(array, (rows - 1) * (stride // size) + columns)
                return Matrix(flat, rows, columns, stride // size)
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


def check(gradient: object, target: Target) -> Given:
    """Turn what a user passed into arrays on the GPU, values into a `Matrix`; or raise a `GradientError`."""
    given = read(gradient, target)
    if given.entries:
        return given._replace(values=Matrix(given.values, int(given.ids.shape[0]), 1, 1))
    return given
