# SPDX-License-Identifier: Apache-2.0
"""Which fused layers share memory: each has an optimizer of its own, and two would update one table.

A layer that has a state for its table has stepped it, or continues one that has. When another layer is about
to step a table in the same memory, it is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nb_sparse_adam._src.torch.param_state import ParamState, has_state
from nb_sparse_adam.errors import GradientError

_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
# States whose table shares its memory with no other layer's. If the memory changes, the state is made anew.
_known: weakref.WeakSet[ParamState] = weakref.WeakSet()


def register(layer: Any) -> None:
    """Make a layer known to the others."""
    _layers[id(layer)] = layer


def refuse(layers: Sequence[Any], param_states: Sequence[ParamState]) -> None:
    """Refuse a step of layers if one shares its table with another of them, or with one that has stepped.

    Parameters
    ----------
    layers : sequence of layer
    param_states : sequence of ParamState
        What the engine holds for each one's table.
    """
    if len(param_states) > 1:
        seen = dict(zip(map(id, param_states), layers, strict=True))
        if len(seen) < len(param_states):  # copies that share an optimizer
            i = next(i for i, each in enumerate(param_states) if seen[id(each)] is not layers[i])
            raise _error(layers[i], seen[id(param_states[i])])
    if all(each in _known for each in param_states):
        return
    registered = (reference() for reference in _layers.valuerefs())
    others = [*layers, *(other for other in registered if other is not None and _has_stepped(other))]
    weights = [other._parameters["weight"] for other in others]
    begins, ends = np.array([_span(weight) for weight in weights], np.int64).T
    for layer, param_state in zip(layers, param_states, strict=True):
        if param_state in _known:
            continue
        begin, end = _span(layer.weight)
        for found in np.flatnonzero((begins < end) & (ends > begin)):
            other = others[found]
            if (
                other is not layer
                and (found < len(layers) or other.optimizer is not layer.optimizer)
                and layer.weight.device == weights[found].device
            ):
                raise _error(layer, other)
        if param_state.is_shown:  # from now on others find that it has a state
            _known.add(param_state)


def _has_stepped(layer: Any) -> bool:
    """Whether a layer has a state of its own for the table that it has now."""
    optimizer, weight = layer.__dict__.get("optimizer"), layer._parameters.get("weight")
    return optimizer is not None and weight is not None and has_state(optimizer.state.get(weight))


def _span(weight: Tensor) -> tuple[int, int]:
    """Where the memory of a contiguous tensor begins and ends."""
    begin = weight.data_ptr()
    return begin, begin + weight.numel() * weight.element_size()


def _error(layer: Any, other: Any) -> GradientError:
    a, b = (type(each).__name__ for each in (layer, other))
    weight, its_weight = layer.weight, other.weight
    have = f"one table, of shape {tuple(weight.shape)}"
    if weight.data_ptr() != its_weight.data_ptr() or weight.shape != its_weight.shape:
        have = f"tables that share memory, of shapes {tuple(weight.shape)} and {tuple(its_weight.shape)}"
    return GradientError(
        f"two fused layers ({a} and {b}) have {have}, and moments and counts each: it would be updated as if "
        f"it were two. Use one layer for both lookups, or torch.nn.{a}(sparse=True) with "
        "nb_sparse_adam.torch.SparseAdam; if the other one is no longer in use, let go of it, and of what it "
        "has computed"
    )
