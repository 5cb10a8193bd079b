# SPDX-License-Identifier: Apache-2.0
"""Copies of what a state dict holds, in types that ``torch.load(..., weights_only=True)`` reads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


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


def copy_state(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Give a state dict values of its own: the live ones change with every step, and with schedulers."""
    state_dict["state"] = {key: plain_copy(entry) for key, entry in state_dict["state"].items()}
    groups = state_dict["param_groups"] = plain_copy(state_dict["param_groups"])
    for group in groups:
        if isinstance(group.get("betas"), np.ndarray):
            group["betas"] = tuple(group["betas"].tolist())


@torch.no_grad()
def set_values(values: Mapping[Tensor, Tensor]) -> None:
    """Give parameters the values that they had when their state was copied."""
    for param, value in values.items():
        if param is not value and (param.shape, param.dtype) == (value.shape, value.dtype):
            param.copy_(value)
