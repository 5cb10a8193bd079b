# SPDX-License-Identifier: Apache-2.0
"""Reads the arrays of gradients that are in the memory of the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.addresses import address_of
from nb_sparse_adam._src.faults import shares_memory
from nb_sparse_adam._src.gradients import Target, on_gpu
from nb_sparse_adam.errors import GradientTypeError

if TYPE_CHECKING:
    from nb_sparse_adam._src.engine.host import HostBackend


class HostReader:
    """Reads a gradient's arrays, which are in the memory of the host."""

    forms = (
        "a RowGradient, a BagGradient, a CSRGradient, a scipy.sparse CSR, CSC or COO array, TensorFlow's "
        "IndexedSlices or JAX's BCOO"
    )
    layouts: tuple[str, ...] = ("csr", "csc", "coo")

    def __init__(self, backend: HostBackend) -> None:
        self._backend = backend

    def read(self, what: str, given: Any, target: Target) -> NDArray[Any]:
        """See what was given as an array; nothing is copied if it is one."""
        if type(given) is np.ndarray:
            return given
        if isinstance(given, np.ma.MaskedArray):
            raise target.refuse(
                GradientTypeError,
                f"{what} is a masked array, expected one without a mask; pass .filled(0), or leave out the "
                "masked entries",
            )
        if on_gpu(given):
            raise target.refuse(
                GradientTypeError,
                f"{what} is on a GPU, expected it where the table is, in the memory of the host: copy it "
                "there, or keep the table on the GPU",
            )
        try:
            return np.asarray(given)
        except Exception as error:
            raise target.refuse(
                GradientTypeError, f"{what} cannot be read as an array: {error}; pass a NumPy array"
            ) from error

    def as_column(self, array: NDArray[Any]) -> NDArray[Any]:
        """See (n,) as (n, 1)."""
        return array[:, None]

    def ready(
        self, what: str, array: NDArray[Any], dtype: np.dtype[Any], target: Target, matrix: bool
    ) -> NDArray[Any]:
        """Give the array, or a copy: native, aligned, of a dtype, C-contiguous, if only within rows."""
        memory, flags = self._backend.memory, array.flags
        if array.dtype is dtype and flags.carray:  # as almost always: nothing to be done, and quickly seen
            start = address_of(array)
            if start < memory.last and start + array.nbytes > memory.first and memory.overlaps(array):
                raise shares_memory(what, target)
            return array
        if memory.overlaps(array):
            raise shares_memory(what, target)
        if array.dtype != dtype:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found as infinity, by name
                return array.astype(dtype, order="C")
        if not flags.aligned or not (flags.c_contiguous or (matrix and _has_rows_apart(array))):
            return array.copy(order="C")
        return array

    def stored(self, pointer: NDArray[Any]) -> int | None:
        """How many entries a row pointer says are stored."""
        return int(pointer[-1])


def _has_rows_apart(array: NDArray[Any]) -> bool:
    """Whether rows are contiguous and follow each other at a distance, as slices of a larger array do."""
    row_stride, within = array.strides
    return within == array.itemsize and row_stride > 0 and row_stride % array.itemsize == 0
