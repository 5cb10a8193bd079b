# SPDX-License-Identifier: Apache-2.0
"""What a parameter table, and the arrays of a state dict, may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.naming import type_name
from nb_sparse_adam._src.remedies import for_table
from nb_sparse_adam.errors import StateError, StateTypeError, TableError, TableTypeError

READ_ONLY = "is read-only, expected a writeable array: it is updated in place"


def check_table(name: str, table: Any) -> NDArray[Any]:
    """Refuse what cannot be updated in place by kernels."""
    where = f"table {name!r}"
    if not isinstance(table, np.ndarray) or isinstance(table, np.ma.MaskedArray):
        raise TableTypeError(
            f"{where} is a {type_name(table)}, expected a numpy.ndarray: it is updated in place"
            + for_table(table)
        )
    if table.dtype.kind != "f" or table.dtype.itemsize not in (4, 8) or not table.dtype.isnative:
        raise TableTypeError(
            f"{where} has dtype {table.dtype}, expected float32 or float64 in native byte order"
        )
    if table.ndim not in (1, 2):
        raise TableError(f"{where} has shape {table.shape}, expected (rows, dim) or (n,)")
    if not table.flags.writeable:
        raise TableError(f"{where} {READ_ONLY}; pass a copy")
    if not table.flags.c_contiguous or not table.flags.aligned:
        raise TableError(
            f"{where} is not C-contiguous (strides {table.strides}) or not aligned; expected rows one after "
            "the other. Pass np.ascontiguousarray(table) and use that array from then on"
        )
    return table


def to_load(what: str, given: Any, live: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """See what was given as an array; a copy, if it would change while others are loaded."""
    try:
        array = np.asarray(given)
    except Exception as error:
        raise StateTypeError(f"{what} cannot be read as an array: {error}") from error
    return array.copy() if any(np.may_share_memory(array, other) for other in live) else array


def refuse_outside(what: str, values: NDArray[Any], most: int | None = None) -> None:
    """Refuse numbers that are negative or too large; NaN is neither, and would hide one from min()."""
    wrong = values < 0 if most is None else (values < 0) | (values > most)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        expected = "no negative values" if values[at] < 0 else "at most 2**62, for counts go on from there"
        raise StateError(f"{what}{list(at)} is {values[at]}, expected {expected}")
