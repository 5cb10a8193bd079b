# SPDX-License-Identifier: Apache-2.0
"""What users pass as ids -> int64."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam.errors import GradientError, GradientIndexError, GradientTypeError


def hash_of_string(string: str) -> int:
    """Return the id of a string: blake2b of its UTF-8 with a digest of 8 bytes, a little-endian int64."""
    return int.from_bytes(blake2b(string.encode(), digest_size=8).digest(), "little", signed=True)


def read_ids(where: str, given: Any, name: str = "ids") -> NDArray[np.int64]:
    """Read ids: integers of any width, unsigned ones with the bits that they have, or strings.

    Parameters
    ----------
    where : str
        What errors begin with.
    given : (n,) array of integers or strings, or sequence of them
    name : str
        What it is called.

    Returns
    -------
    (n,) int64 array
        C-contiguous; the given one, if it is like that.
    """
    if type(given) is np.ndarray and given.dtype == np.int64 and given.ndim == 1 and given.flags.c_contiguous:
        return given
    if isinstance(given, str):
        raise GradientTypeError(f"{where}: {name} is a string, expected an array of ids; pass [{given!r}]")
    if isinstance(given, np.ma.MaskedArray):
        raise GradientTypeError(f"{where}: {name} is a masked array, expected one without a mask")
    try:
        array = np.asarray(given)
    except Exception as error:
        raise GradientTypeError(f"{where}: {name} cannot be read as an array: {error}") from error
    if array.ndim != 1:
        raise GradientError(
            f"{where}: {name} has shape {array.shape}, expected (n,); pass {name}.reshape(-1) and give the "
            "result its shape"
        )
    if array.size == 0 and not isinstance(given, np.ndarray):
        return np.empty(0, np.int64)  # an empty list has no dtype of its own
    if array.dtype.kind in "iu":
        wide = array.astype(f"{array.dtype.kind}8", copy=False)
        return np.ascontiguousarray(wide).astype(wide.dtype.newbyteorder("="), copy=False).view(np.int64)
    if array.dtype.kind in "fU" and not hasattr(given, "dtype"):
        # What NumPy makes of 2**63 beside others, and of integers beside strings.
        array = np.asarray(given, object)
    if array.dtype.kind in "UTO":
        return _of_objects(where, array, name)
    raise GradientTypeError(
        f"{where}: {name} has dtype {array.dtype}, expected integers, or strings; "
        + ("use np.flatnonzero(mask)" if array.dtype.kind == "b" else "convert with .astype(np.int64)")
    )


def _of_objects(where: str, array: NDArray[Any], name: str) -> NDArray[np.int64]:
    """Read strings, or integers of Python's that NumPy made objects of."""
    out = np.empty(array.shape[0], np.int64)
    for at, each in enumerate(array.tolist()):
        if isinstance(each, str):
            try:
                out[at] = hash_of_string(each)
            except UnicodeEncodeError as error:
                raise GradientError(
                    f"{where}: {name}[{at}] is {each!r}, which has no UTF-8 ({error.reason}), expected a "
                    "string that has"
                ) from error
        elif isinstance(each, (int, np.integer)) and not isinstance(each, bool):
            if not -(2**63) <= each < 2**64:
                raise GradientIndexError(
                    f"{where}: {name}[{at}] is {each}, which has more than 64 bits; hash it to fewer"
                )
            out[at] = int(each) - 2**64 if each >= 2**63 else each
        else:
            raise GradientTypeError(
                f"{where}: {name}[{at}] is {each!r} ({type(each).__name__}), expected an integer or a string"
            )
    return out
