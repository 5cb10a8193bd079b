# SPDX-License-Identifier: Apache-2.0
"""Memory on a GPU: filled, converted, copied between rows that lie apart and rows that do not."""

from __future__ import annotations

from typing import Any

from numba import cuda, int64

from nb_sparse_adam._src.cuda.device import kernel


@kernel
def fill(array: Any, value: Any) -> None:
    """``array[:]`` ← value."""
    for i in range(cuda.grid(1), array.shape[0], cuda.gridsize(1)):
        array[i] = value


@kernel
def convert_vector(given: Any, out: Any) -> None:
    """``out[:]`` ← the elements of a 1-D array, in the dtype of ``out``."""
    for i in range(cuda.grid(1), out.shape[0], cuda.gridsize(1)):
        out[i] = given[i]


@kernel
def convert_matrix(given: Any, out: Any) -> None:
    """``out[:]`` ← the elements of a 2-D array, row after row, in the dtype of ``out``."""
    rows, columns = given.shape
    group = int64(cuda.blockIdx.x) * cuda.blockDim.y + cuda.threadIdx.y
    for row in range(group, rows, int64(cuda.gridDim.x) * cuda.blockDim.y):
        for j in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
            out[row * columns + j] = given[row, j]


@kernel
def gather_rows(flat: Any, first: Any, row_stride: Any, columns: Any, out: Any) -> None:
    """``out`` ← rows of ``columns`` elements, ``row_stride`` from one to the next, from ``first`` on."""
    for i in range(cuda.grid(1), out.shape[0], cuda.gridsize(1)):
        row = i // columns
        out[i] = flat[first + row * row_stride + (i - row * columns)]


@kernel
def scatter_rows(flat: Any, first: Any, row_stride: Any, columns: Any, given: Any) -> None:
    """Do the opposite of `gather_rows`."""
    for i in range(cuda.grid(1), given.shape[0], cuda.gridsize(1)):
        row = i // columns
        flat[first + row * row_stride + (i - row * columns)] = given[i]
