# SPDX-License-Identifier: Apache-2.0
"""Checks of what users pass to an `EmbeddingTable`, but for ids."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam.errors import GradientIndexError, GradientTypeError, OptionError, OptionTypeError


def whole(name: str, given: Any, least: int, most: int) -> int:
    """Check that an option is an integer within bounds."""
    if isinstance(given, (bool, np.bool_)) or not isinstance(given, (int, np.integer)):
        raise OptionTypeError(f"{name} is {given!r} ({type(given).__name__}), expected an int")
    if not least <= given <= most:
        raise OptionError(f"{name} is {given}, expected {least} <= {name} <= {most}")
    return int(given)


def real(name: str, given: Any) -> np.dtype[Any]:
    """Check that an option is float32 or float64."""
    try:
        dtype: np.dtype[Any] = np.dtype(given)
    except TypeError as error:
        raise OptionTypeError(f"{name} is {given!r}, expected float32 or float64") from error
    if dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise OptionError(f"{name} is {dtype}, expected float32 or float64")
    return dtype


def read_reals(
    where: str,
    name: str,
    given: Any,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    errors: tuple[type[Exception], type[Exception]],
) -> NDArray[Any]:
    """Check numbers, and have them C-contiguous; errors are for another shape, and for another dtype."""
    wrong, of_type = errors
    try:
        array = np.asarray(given)
    except Exception as error:
        raise of_type(f"{where}: {name} cannot be read as an array: {error}") from error
    if array.size == 0 and shape[0] == 0 and not isinstance(given, np.ndarray):
        array = np.empty(shape, dtype)  # an empty list has no dtype or shape of its own
    if array.dtype.kind != "f" or array.itemsize not in (4, 8):
        raise of_type(
            f"{where}: {name} has dtype {array.dtype}, expected float32 or float64; convert it first"
        )
    if array.shape != shape:
        raise wrong(f"{where}: {name} has shape {array.shape}, expected {shape}: one for each id")
    with np.errstate(over="ignore"):  # as with gradients: infinity is what is there then
        return np.ascontiguousarray(array, dtype)


def read_offsets(where: str, given: Any, n: int, ends: bool | None) -> NDArray[np.int64]:
    """Check offsets, and have one more than there are bags."""
    try:
        array = np.asarray(given)
    except Exception as error:
        raise GradientTypeError(f"{where}: offsets cannot be read: {error}") from error
    if array.size == 0 and not isinstance(given, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise GradientTypeError(
            f"{where}: offsets are {array.shape} {array.dtype}, expected (bags,) or (bags + 1,) integers"
        )
    array = array.astype(np.int64)
    if array.size == 0 and n:
        raise GradientIndexError(f"{where}: offsets are empty, expected a bag for {n} ids")
    if array.size and array[0] != 0:
        raise GradientIndexError(f"{where}: offsets[0] is {array[0]}, expected 0")
    wrong = np.flatnonzero((array[1:] < array[:-1]) | (array[1:] > n))  # a difference may overflow
    if len(wrong):
        at = int(wrong[0]) + 1
        raise GradientIndexError(
            f"{where}: offsets[{at}] is {array[at]}, expected {array[at - 1]} <= offset <= {n}"
        )
    if ends and (array.size == 0 or array[-1] != n):
        raise GradientIndexError(
            f"{where}: offsets end with {array[-1:].tolist()}, expected {n}, the number of "
            "ids; or pass include_last_offset=False"
        )
    if ends or (ends is None and array.size > 1 and array[-1] == n):
        return array
    return np.append(array, n)
