# SPDX-License-Identifier: Apache-2.0
"""What layers have in common that look up by ids, and whose weight has no rows but stands for a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nb_sparse_adam._src.torch.bags import INTEGERS
from nb_sparse_adam._src.torch.layer import Layer
from nb_sparse_adam.errors import GradientTypeError, TableError

_IDS = (*INTEGERS, torch.uint16, torch.uint32, torch.uint64)

L = TypeVar("L", bound="ByIds")


def standing_for(dim: int, dtype: np.dtype[Any]) -> torch.nn.Parameter:
    """Make what stands for a table where torch asks for parameters."""
    with torch.device("cpu"):
        return torch.nn.Parameter(torch.empty(0, dim, dtype=getattr(torch, dtype.name)))


class ByIds(Layer, torch.nn.Module):
    """A layer that is asked for ids, any of the 2⁶⁴."""

    padding_idx = None
    # What messages say of the table.
    _where = "in the memory of the host"
    _not_shared = (
        "its table cannot be there, for each process would have an index of its own. Look up in one process, "
        "or give each a copy"
    )

    @property
    def instead(self) -> str:
        """Which of torch's layers does what this one does not."""
        return f"torch.nn.{'EmbeddingBag' if hasattr(self, 'mode') else 'Embedding'}"

    def _without_script(self) -> str:
        return "Look up outside of what is scripted, and pass the vectors in"

    def ids_of(self, given: Any) -> Tensor:
        """Give what a lookup was given as int64 ids in memory, or refuse it."""
        name = type(self).__name__
        if getattr(self, "_is_replica", False):
            raise TableError(
                f"{name} in DataParallel: its table is {self._where}, and has no replicas on GPUs. "
                "Look up outside of the module that is wrapped"
            )
        if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
            raise TableError(
                f"{name} under torch.jit.trace or torch.func: its rows are found by Python, which these do "
                "not see. Look up outside of what is traced or transformed, and pass the vectors in"
            )
        if not isinstance(given, Tensor):
            raise GradientTypeError(
                f"{name}: input is a {type(given).__name__}, expected a Tensor of integers"
            )
        if given.device.type != "cpu" or isinstance(given, torch._subclasses.FakeTensor):
            where = "none (torch.export)" if given.device.type == "cpu" else given.device
            raise TableError(
                f"{name}: input is on device {where}, expected the CPU: its table is "
                f"{self._where}. Pass input.cpu(), and move what comes out to the device"
            )
        if given.dtype not in _IDS:
            raise GradientTypeError(f"{name}: input has dtype {given.dtype}, expected integers: ids")
        ids = given.detach()
        return ids.view(torch.int64) if ids.dtype == torch.uint64 else ids.long()

    def look_up(self, weight: Tensor, ids: Tensor) -> Tensor:  # noqa: ARG002 (it has no numbers)
        """Look up in training."""
        return self._vectors(ids, train=True)

    def _vectors(self, ids: Tensor, train: bool) -> Tensor:
        """Look up."""
        raise NotImplementedError

    # --- what torch does to modules -----------------------------------------------------------------------

    def _apply(self: L, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> L:  # noqa: ARG002
        """Refuse what would move or convert the table; torch's `to`, `double`, `share_memory` call this."""
        before = torch.zeros(1, dtype=self.weight.dtype)
        with torch.no_grad():
            after = fn(before)
        name = type(self).__name__
        if after.device != before.device:
            raise TableError(
                f"{name} to device {after.device}, expected cpu: its table is {self._where}. "
                "Move the other parts of the model, and what comes out of this one"
            )
        if after.dtype != before.dtype:
            raise TableError(
                f"{name} to {after.dtype}, expected {before.dtype}, which its table was made with and keeps: "
                "make it with dtype=, and convert the other parts of the model, and what comes out of it"
            )
        if after.is_shared():  # type: ignore[no-untyped-call]
            raise TableError(f"{name} to shared memory: {self._not_shared}")
        return self

    def set_extra_state(self, state: Any) -> None:
        """Take over what `get_extra_state` gave, in the place of all that the table holds."""
        self._load_state(f"state of {type(self).__name__}", state)

    def _load_state(self, where: str, state: Any) -> None:
        """Take over a state, or refuse it."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]  # which has no numbers

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        weight, key = prefix + "weight", prefix + "_extra_state"
        is_there = False

        def take(given: dict[str, Any], *_: Any) -> None:
            nonlocal is_there
            if given.pop(weight, None) is not None:
                error_msgs.append(
                    f"{weight} is of a layer whose rows are numbered, expected {key}, the table of a dynamic "
                    "layer; layer.table.load(ids, weight.numpy()) gives its rows to ids"
                )
            is_there = key in given
            state = given.pop(key, None)
            if is_there and not error_msgs:  # else torch is about to raise
                self._load_state(f"{key} of the state dict", state)

        hook = self._register_load_state_dict_pre_hook(take)  # type: ignore[no-untyped-call] # the last one
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            hook.remove()
        for expected in (weight, key) if is_there else (weight,):
            if expected in missing_keys:
                missing_keys.remove(expected)
