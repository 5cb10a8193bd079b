"""Copies of what a state dict holds, in types that ``torch.load(..., weights_only=True)`` reads."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["plain_copy"]


def plain_copy(value: Any) -> Any:
    """Copy a value, so that it shares no tensor; NumPy's scalars become Python's numbers.

    Dictionaries, lists and tuples are copied with all that they hold; what is of another type is shared.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return value.detach().clone()
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, np.generic):
        number = value.item()
        return float(number) if isinstance(number, np.floating) else number  # longdouble has no own
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        made = copy.copy(value)
        for key in made:
            made[key] = plain_copy(made[key])
        return made
    if type(value) in (list, tuple):
        return type(value)(map(plain_copy, value))
    return value
