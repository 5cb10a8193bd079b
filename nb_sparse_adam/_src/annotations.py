# SPDX-License-Identifier: Apache-2.0
"""What annotations are made of: the choices of options, and arrays and matrices known by what they have.

`nb_sparse_adam.typing` shows these to users. The checks of options take their choices from here.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

StepCounts = Literal["element", "row", "global"]
OnNonfinite = Literal["raise", "skip", "propagate"]
DeviceChecks = Literal["immediate", "deferred", "off"]
BagMode = Literal["sum", "mean"]
GradientForm = Literal["rows", "bags", "csr"]


class DeviceArray(Protocol):
    """An array on a GPU: numba's, CuPy's, a torch tensor on device cuda, and what else has the interface."""

    @property
    def __cuda_array_interface__(self) -> Any:
        """See numba's documentation, "CUDA Array Interface"."""


class _Matrix(Protocol):
    @property
    def format(self) -> str:
        """The name of the layout: "csr", "csc" or "coo"."""

    @property
    def shape(self) -> Any:
        """(rows, columns)."""

    @property
    def data(self) -> Any:
        """(nnz,) values of the entries that are stored."""


class CompressedMatrix(_Matrix, Protocol):
    """A CSR or CSC array or matrix of scipy.sparse, or, of CSR, of CuPy."""

    @property
    def indptr(self) -> Any:
        """(rows + 1,) or (columns + 1,) integers."""

    @property
    def indices(self) -> Any:
        """(nnz,) integers."""


class CoordinateMatrix(_Matrix, Protocol):
    """A COO array or matrix of scipy.sparse."""

    @property
    def row(self) -> Any:
        """(nnz,) integers."""

    @property
    def col(self) -> Any:
        """(nnz,) integers."""


class IndexedSlices(Protocol):
    """What TensorFlow gives as the gradient of a table that rows were gathered from, ``tf.IndexedSlices``."""

    @property
    def values(self) -> Any:
        """(n, dim) values of the rows."""

    @property
    def indices(self) -> Any:
        """(n,) integers: the rows."""

    @property
    def dense_shape(self) -> Any:
        """The table's shape, or None."""


class BatchedCoordinates(Protocol):
    """A sparse array of JAX, ``jax.experimental.sparse.BCOO``."""

    @property
    def data(self) -> Any:
        """(nse, ...) values."""

    @property
    def indices(self) -> Any:
        """(nse, n_sparse) integers."""

    @property
    def shape(self) -> Any:
        """The table's shape."""

    @property
    def n_batch(self) -> int:
        """How many dimensions are of a batch: 0."""

    @property
    def n_sparse(self) -> int:
        """How many dimensions are sparse."""

    @property
    def n_dense(self) -> int:
        """How many are dense."""


Array: TypeAlias = ArrayLike | DeviceArray
"""What a gradient is made of: anything that NumPy makes an array of, or an array on a GPU."""

Table: TypeAlias = NDArray[np.floating[Any]] | DeviceArray
"""A parameter table: float32 or float64, updated in place."""
