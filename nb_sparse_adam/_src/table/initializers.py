# SPDX-License-Identifier: Apache-2.0
"""What users name as initial values -> what kernels draw."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from nb_sparse_adam._src.table.records import GIVEN, NORMAL, UNIFORM, ZEROS
from nb_sparse_adam.errors import OptionError, OptionTypeError

Initializer = str | Callable[[Any], Any]
_FORM = re.compile(r"\s*(normal|uniform)\s*\(\s*([^,()\s]+)\s*,\s*([^,()\s]+)\s*\)\s*")


def read_initializer(given: Any, dtype: np.dtype[Any]) -> tuple[int, float, float]:
    """Return the kind of initial values, and its two numbers."""
    if callable(given):
        return GIVEN, 0.0, 0.0
    expected = '"zeros", "normal(mean, std)", "uniform(low, high)" or a callable of ids'
    if not isinstance(given, str):
        raise OptionTypeError(f"initializer is {given!r} ({type(given).__name__}), expected {expected}")
    if given.strip() == "zeros":
        return ZEROS, 0.0, 0.0
    found = _FORM.fullmatch(given)
    if found is None:
        raise OptionError(f"initializer is {given!r}, expected {expected}")
    try:
        first, second = float(found[2]), float(found[3])
    except ValueError:
        raise OptionError(f"initializer is {given!r}, expected numbers in it: {expected}") from None
    largest = float(np.finfo(dtype).max)
    if not (math.isfinite(first) and math.isfinite(second)) or max(abs(first), abs(second)) > largest / 16:
        raise OptionError(f"initializer is {given!r}, expected numbers that are finite as {dtype}")
    if found[1] == "normal":
        if second < 0:
            raise OptionError(f"initializer is {given!r}, expected a standard deviation >= 0")
        return NORMAL, first, second
    if second < first:
        raise OptionError(f"initializer is {given!r}, expected low <= high")
    return UNIFORM, first, second
