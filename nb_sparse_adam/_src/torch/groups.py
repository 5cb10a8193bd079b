# SPDX-License-Identifier: Apache-2.0
"""Groups of parameters: what one holds is checked, and given as the engine takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nb_sparse_adam._src import options
from nb_sparse_adam._src.torch.tensors import check_parameter
from nb_sparse_adam.errors import OptionError, StateError, TableError

# The options that a step looks at.
USED = ("lr", "betas", "eps", "maximize", "eps_hat", "on_nonfinite")
# Those that torch's optimizer does not have: a state dict of its lacks them.
OWN = {"step_counts": "global", "eps_hat": True, "on_nonfinite": "propagate"}


def check_defaults(lr: float | Tensor, betas: tuple[float, float], eps: float) -> None:
    """Refuse what torch's optimizer refuses when it is made, in its words and in its order."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise OptionError(f"Tensor lr must be 1-element, got one of shape {tuple(lr.shape)}")
    if not lr > 0:
        raise OptionError(f"Invalid learning rate: {lr}, expected 0 < lr < inf")
    if not eps > 0:
        raise OptionError(f"Invalid epsilon value: {eps}, expected 0 < eps < inf")
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise OptionError(f"Invalid beta parameter at index {i}: {beta}, expected 0 <= beta < 1")


def name_of(group: Mapping[str, Any], g: int, i: int) -> str:
    """What errors call the i-th parameter of group g."""
    names = group.get("param_names")
    return names[i] if names is not None else f"param_groups[{g}]['params'][{i}]"


def check_group(group: Mapping[str, Any], g: int) -> None:
    """Refuse parameters that the engine cannot update, and options outside their domain."""
    params = group["params"]
    for what, is_one, refusal in (
        ("Sparse", attrgetter("is_sparse"), "requires dense parameter tensors"),
        ("Complex", torch.is_complex, "does not support complex parameters"),
    ):
        found = [[g, i] for i, p in enumerate(params) if is_one(p)]
        if found:
            raise TableError(f"{what} params at indices {found}: SparseAdam {refusal}")
    for i, p in enumerate(params):
        check_parameter(name_of(group, g, i), p)
    if len(set(params)) != len(params):
        raise TableError(f"param_groups[{g}] has a parameter twice, expected each of them once")
    options_of(group)


def complete(group: dict[str, Any], g: int, before: Mapping[str, Any] | None) -> None:
    """Check a group of a state dict, and give it the options that it lacks, if it is of torch's optimizer.

    Parameters
    ----------
    group : dict
        The g-th one.
    g : int
    before : mapping, optional
        The group that it takes the place of; None if there is no optimizer yet.
    """
    own = OWN if before is None else before
    for key in OWN:
        group.setdefault(key, own[key])
    if before is not None and group["step_counts"] != before["step_counts"]:
        raise StateError(
            f"state dict has step_counts {group['step_counts']!r} in group {g}, expected "
            f"{before['step_counts']!r}, which this optimizer was made with and cannot change"
        )
    options_of(group)


def place_of(groups: Sequence[Mapping[str, Any]], old_param: Tensor, new_param: Tensor) -> tuple[int, int]:
    """Find the group and the place of a parameter in groups that must not have the new one."""
    found = None
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            if param is old_param:
                found = g, i
            elif param is new_param:
                raise TableError(
                    f"rearrange: the new parameter is {name_of(group, g, i)} of this optimizer, expected "
                    "one that has no place in it yet"
                )
    if found is None:
        raise TableError(
            "rearrange: the old parameter is in none of this optimizer's groups, expected one of theirs: "
            "the very Parameter, for it may be another one after a call of rearrange"
        )
    return found


def used_options(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Give the options that a step looks at, in a form to compare with those of the step before."""
    return tuple([_frozen(group.get(key)) for key in USED])


def _frozen(value: Any) -> Any:
    """Give an option as a value that does not change: a list, an array or a tensor may change in place."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_number, value))
    if isinstance(value, np.ndarray) or (isinstance(value, Tensor) and value.numel() != 1):
        return str(value.tolist())
    return _number(value)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Check a group's options, and give them as the engine takes them."""
    dtypes = {np.dtype(str(p.dtype).removeprefix("torch.")) for p in group["params"]}
    options.choice("step_counts", group["step_counts"], options.STEP_COUNTS)
    beta1, beta2 = group["betas"]
    lr = _number(group["lr"])
    if isinstance(lr, float) and 0 < lr < 1 and any(dtype.type(lr) == 0 for dtype in dtypes):
        lr = 0.0  # where a scheduler that halves it ends
    numbers = {"lr": lr, "betas": (_number(beta1), _number(beta2)), "eps": _number(group["eps"])}
    return options.checked({"maximize": False, **group, **numbers}, dtypes)
