# SPDX-License-Identifier: Apache-2.0
"""Rows of a parameter that come, go and change places, and its state with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nb_sparse_adam._src.engine.rearranging import checked_source
from nb_sparse_adam._src.torch.param_state import STATE_KEYS
from nb_sparse_adam._src.torch.tensors import check_parameter, check_shape
from nb_sparse_adam.errors import StateError, TableError, TableTypeError


def check_replacement(name: str, old: Tensor, new: Any) -> None:
    """Refuse what cannot take a parameter's place, whatever rows it has."""
    what = f"rearrange of parameter {name}: the new one"
    if not isinstance(new, Tensor):
        raise TableTypeError(f"{what} is a {type(new).__name__}, expected a Parameter")
    if new.layout is not torch.strided or not new.is_leaf or new.dtype != old.dtype:
        computed = "" if new.is_leaf else " and computed from others"
        expected = f"expected a dense Parameter of {old.dtype}"
        raise TableError(f"{what} is of {new.dtype} and {new.layout}{computed}, {expected}")
    if new.dim() == 0 or new.shape[1:] != old.shape[1:]:
        expected = f"expected {('rows', *old.shape[1:])}, rows as those of the old one"
        raise TableError(f"{what} has shape {tuple(new.shape)}, {expected}")
    check_parameter(name, new)


def source_of(name: str, given: Any, length: int, rows: int) -> NDArray[np.int64]:
    """Check what says from which old row each new one comes."""
    given = given.detach().cpu().numpy() if isinstance(given, Tensor) else given
    return checked_source(f"rearrange of parameter {name}", given, length, rows)


def rearranged(name: str, entry: Any, source: Any, new: Tensor, step_counts: str) -> dict[str, Any]:
    """Make the state that a parameter is to go on with; it is for `ParamState.check_load` to check.

    Parameters
    ----------
    name : str
    entry : mapping
        The old parameter's, as it is now: what a user has put there is what is rearranged.
    source : (rows,) integers
    new : Tensor
        The new parameter.
    step_counts : {"element", "row", "global"}
    """
    where = f"state of parameter {name}"
    given = {key: entry.get(key) if isinstance(entry, Mapping) else None for key in STATE_KEYS}
    rows = None
    for key in ("exp_avg", "exp_avg_sq"):
        moment = given[key]
        rows = len(moment) if rows is None and isinstance(moment, Tensor) and moment.dim() else rows
        expected = ("rows" if rows is None else rows, *new.shape[1:])
        advice = ", to be rearranged; to begin anew, del optimizer.state[parameter] before"
        check_shape(f"{where}: {key}", moment, expected, advice)
    assert rows is not None
    places = torch.from_numpy(source_of(name, source, len(new), rows))
    taken = places >= 0
    origins = places[taken]

    def arranged(key: str) -> Any:
        values = given[key]
        if not isinstance(values, Tensor) or values.dim() == 0 or (key == "step" and step_counts == "global"):
            return values  # one number
        if len(values) != rows:
            raise StateError(f"{where}: {key} has {len(values)} rows, expected {rows}, as exp_avg has")
        made = values.new_zeros((len(places), *values.shape[1:]))
        made[taken.to(values.device)] = values.detach()[origins.to(values.device)]
        return made

    return {key: arranged(key) for key in given}
