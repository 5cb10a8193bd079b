# SPDX-License-Identifier: Apache-2.0
"""Gradients as TensorFlow and JAX store them, known by their attributes: neither is imported.

What is read here is which arrays say where the gradient is, and which say what it is there. Their dtypes and
shapes are checked by `gradients`, as those of any other gradient.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam.errors import GradientError, GradientTypeError

if TYPE_CHECKING:
    from nb_sparse_adam._src.gradients import Target

_INDEXED_SLICES = ("values", "indices", "dense_shape")
_BCOO = ("data", "indices", "shape", "n_batch", "n_sparse", "n_dense")


class Located(NamedTuple):
    """Values, and the rows that they belong to; with columns, the elements."""

    ids: Any  # (n,)
    values: Any  # (n, dim); of elements (n,)
    columns: Any  # (n,), or None
    ids_name: str  # what errors call them
    values_name: str
    columns_name: str = ""
    kept: NDArray[np.intp] | slice | None = None  # which of these there are; None: all


def is_of_framework(given: Any) -> bool:
    """Whether something has the attributes of a gradient of TensorFlow's or JAX's."""
    return any(all(hasattr(given, name) for name in names) for names in (_INDEXED_SLICES, _BCOO))


def located(gradient: Any, target: Target) -> Located | None:
    """Read a gradient of TensorFlow's or JAX's; None if it is none."""
    if all(hasattr(gradient, name) for name in _INDEXED_SLICES):
        read = _read_indexed_slices
    elif all(hasattr(gradient, name) for name in _BCOO):
        read = _read_bcoo
    else:
        return None
    what = type(gradient).__name__
    if "coo" not in target.reader.layouts:
        raise target.refuse(
            GradientTypeError,
            f"got a {what}, which is not offered on a GPU, expected {target.reader.forms}; pass its arrays "
            "there as RowGradient(rows, values)",
        )
    return read(what, gradient, target)


def _read_indexed_slices(what: str, gradient: Any, target: Target) -> Located:
    """Read ``values`` of shape (n, dim) and ``indices`` (n,), which may repeat."""
    if gradient.dense_shape is not None:
        shape = target.reader.read(f"{what}.dense_shape", gradient.dense_shape, target)
        target.check_shape(what, shape.ravel().tolist())
    indices = target.reader.read(f"{what}.indices", gradient.indices, target)
    if indices.ndim != 1:  # a SparseTensor has the same attributes
        raise target.refuse(
            GradientError,
            f"{what}.indices has shape {indices.shape}, expected (n,), a row for each of values; pass single "
            "entries as a scipy.sparse.coo_array",
        )
    return Located(indices, gradient.values, None, f"{what}.indices", f"{what}.values")


def _read_bcoo(what: str, gradient: Any, target: Target) -> Located:
    """Read ``data`` of shape (nse, dim) or (nse,) and ``indices`` (nse, n_sparse).

    ``indices_sorted`` and ``unique_indices`` are promises of whoever made it, and not relied on.
    """
    if hasattr(gradient, "indptr"):
        raise target.refuse(
            GradientTypeError,
            f"got a {what}, expected {target.reader.forms}; pass CSRGradient(g.indptr, g.indices, g.data)",
        )
    try:
        shape = tuple(map(operator.index, gradient.shape))
        n_batch, n_sparse, n_dense = (operator.index(getattr(gradient, name)) for name in _BCOO[3:])
    except TypeError:
        raise target.refuse(
            GradientTypeError,
            f"got a {what} whose {', '.join(_BCOO[2:])} are not all integers, expected {target.reader.forms}",
        ) from None
    target.check_shape(what, shape)
    if n_batch != 0 or n_sparse not in (1, 2) or n_sparse + n_dense != len(shape):
        layout = "n_batch=0" if n_batch else f"n_dense={len(shape) - 1}"
        raise target.refuse(
            GradientError,
            f"{what} has n_batch={n_batch}, n_sparse={n_sparse}, n_dense={n_dense}, expected n_batch=0 and "
            f"n_sparse=1 (rows) or 2 (entries); convert it with .update_layout({layout})",
        )
    ids_name, data_name = f"{what}.indices", f"{what}.data"
    indices = target.reader.read(ids_name, gradient.indices, target)
    data = target.reader.read(data_name, gradient.data, target)
    if indices.ndim != 2 or indices.shape[1] != n_sparse or data.shape[:1] != indices.shape[:1]:
        raise target.refuse(
            GradientError,
            f"{ids_name} has shape {indices.shape} and {data_name} {data.shape}, expected (n, {n_sparse}) "
            "and n rows or values",
        )
    kept = _stored(indices, shape)
    if n_sparse == 1:
        return Located(indices[:, 0], data, None, ids_name, data_name, kept=kept)
    names = f"{ids_name}[:, 0]", data_name, f"{ids_name}[:, 1]"
    return Located(indices[:, 0], data, indices[:, 1], *names, kept)


def _stored(indices: NDArray[Any], shape: tuple[int, ...]) -> slice | NDArray[np.intp] | None:
    """Which entries of a BCOO are no padding.

    Where its arrays are longer than what they store, JAX fills up with indices that are equal to the shape,
    one past the last, and the data there means nothing (jax-ml/jax#8225). After ``update_layout`` it may be
    only one of two that is. Numbers beyond that are nobody's padding, and refused like any other.
    """
    padding = indices[:, 0] == shape[0]
    for dimension in range(1, indices.shape[1]):
        padding |= indices[:, dimension] == shape[dimension]
    if not padding.any():
        return None
    kept = np.flatnonzero(~padding)
    n = len(kept)
    return slice(n) if n == 0 or kept[-1] == n - 1 else kept  # at the end, mostly: nothing is copied
