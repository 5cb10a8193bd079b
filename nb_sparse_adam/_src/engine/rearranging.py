# SPDX-License-Identifier: Apache-2.0
"""Rows of a table that come, go and change places: from where they come, and their state, copied."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import load_gradient, store_param
from nb_sparse_adam.errors import StateError, StateTypeError

FRESH = -1  # a row that comes from none


def checked_source(where: str, given: Any, length: int, rows: int) -> NDArray[np.int64]:
    """Copy what says from which old row each new one comes, and check the copy: nobody else can change it.

    Parameters
    ----------
    where : str
        What errors begin with.
    given : (length,) integer array, or what NumPy makes one of
    length, rows : int
        How many rows there will be, and how many there are.
    """
    try:
        array = np.array(given)
    except Exception as error:
        raise StateTypeError(f"{where}: source cannot be read as an array: {error}") from error
    if isinstance(given, np.ma.MaskedArray):
        raise StateTypeError(
            f"{where}: source is a masked array, expected one without a mask; pass .filled({FRESH}) where "
            "masked rows are fresh"
        )
    if array.size == 0 and not hasattr(given, "dtype"):
        array = array.astype(np.int64)  # an empty list has no dtype of its own
    if array.dtype.kind not in "iu":
        raise StateTypeError(
            f"{where}: source has dtype {array.dtype}, expected integers (int64), the old row of each new "
            "one; "
            + ("use np.flatnonzero(mask)" if array.dtype.kind == "b" else "convert with .astype(np.int64)")
        )
    if array.shape != (length,):
        raise StateError(
            f"{where}: source has shape {array.shape}, expected ({length},): one old row for each of the new "
            "table's"
        )
    wrong = np.flatnonzero((array < FRESH) | (array >= rows))
    if len(wrong):
        at = int(wrong[0])
        raise StateError(
            f"{where}: source[{at}] is {array[at]}, expected 0 <= row < {rows}, the rows that there were, or "
            f"{FRESH} for a fresh one"
        )
    return array.astype(np.int64, copy=False)


@jit
def copy_row(old: Any, first: Any, new: Any, into: Any, columns: Any) -> None:
    """Copy so many words of a row of state."""
    for j in range(columns):
        store_param(new, into + j, load_gradient(old, first + j))


@jit
def reset_row(words: Any, first: Any, columns: Any) -> None:
    """Make a row of state that of one that took no step."""
    for j in range(columns):
        store_param(words, first + j, words.dtype.type(0))


@jit(entry=True)
def take_rows(source: Any, old: Any, columns: Any, new: Any) -> None:
    """Copy rows of state, as bits; what is all zeros is not written: fresh memory costs nothing until it is.

    Parameters
    ----------
    source : (n,) int64
        The row of ``old`` that each of ``new`` takes; none if negative.
    old : (rows * columns,) unsigned integers
    columns : int
        At least 1.
    new : (n * columns,) of the same dtype
        Zeros.
    """
    for i in range(len(source)):
        if source[i] < 0:
            continue
        first, into = source[i] * columns, i * columns
        used = load_gradient(old, first)
        for j in range(1, columns):
            used |= load_gradient(old, first + j)
        if used != 0:
            copy_row(old, first, new, into, columns)
