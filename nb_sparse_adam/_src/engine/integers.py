# SPDX-License-Identifier: Apache-2.0
"""Arrays of integers that are int32 or int64, which is known at run time only."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import array_at


class Integers(NamedTuple):
    """An array of int32, or of int64 if it is wide; the other one is empty."""

    narrow: Any
    wide: Any
    is_wide: Any


@jit
def integers(address: Any, length: Any, size: Any) -> Any:
    """Return the (length,) integers of 4 or 8 bytes at an address."""
    narrow = array_at(address, length if size == 4 else 0, np.int32)
    return Integers(narrow, array_at(address, length if size == 8 else 0, np.int64), size == 8)


@jit
def integer(numbers: Any, i: Any) -> Any:
    """Return the i-th number of `Integers`, as int64.

    It asks for the same thing each time, so that the compiler asks once, before a loop.
    """
    if numbers.is_wide:
        return np.int64(numbers.wide[np.uint64(i)])
    return np.int64(numbers.narrow[np.uint64(i)])
