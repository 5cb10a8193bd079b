# SPDX-License-Identifier: Apache-2.0
"""What dynamic layers have in common: their `EmbeddingTable`, what cannot be, and their state."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam._src.torch import dynamic_state
from nb_sparse_adam._src.torch.bags import INTEGERS
from nb_sparse_adam._src.torch.layer import Layer
from nb_sparse_adam._src.torch.param_state import threads_of_torch
from nb_sparse_adam._src.torch.table_options import TableOptimizer
from nb_sparse_adam.errors import GradientError, GradientTypeError, OptionError, TableError, TableTypeError

_OPTIONS = tuple(name for name in inspect.signature(EmbeddingTable).parameters if name != "dim")
_IDS = (*INTEGERS, torch.uint16, torch.uint32, torch.uint64)

L = TypeVar("L", bound="Dynamic")


def made_table(name: str, dim: int, options: dict[str, Any]) -> EmbeddingTable:
    """Make the table of a layer."""
    unknown = [key for key in options if key not in _OPTIONS]
    if unknown:
        raise OptionError(
            f"{name}: got {unknown[0]!r}, expected options of EmbeddingTable, some of {', '.join(_OPTIONS)}"
        )
    for key in ("dtype", "state_dtype"):
        if isinstance(options.get(key), torch.dtype):
            options = {**options, key: str(options[key]).removeprefix("torch.")}
            if options[key] == "bfloat16":  # which NumPy does not have
                raise OptionError(f"{name}: {key} is torch.bfloat16, expected float32 or float64")
    return EmbeddingTable(dim, **options)


class Dynamic(Layer, torch.nn.Module):
    """What both layers have in common."""

    _table: EmbeddingTable
    optimizer: TableOptimizer
    padding_idx = None

    def _set_up(self, table: Any) -> None:
        name = type(self).__name__
        if not isinstance(table, EmbeddingTable):
            raise TableTypeError(
                f"{name}.from_table: got a {type(table).__name__}, expected an EmbeddingTable; for weights "
                f"whose rows are numbered: {self.instead}.from_pretrained"
            )
        self._table, self.embedding_dim = table, table.dim
        self._set_threads: int | None = None
        with torch.device("cpu"):
            self.weight = torch.nn.Parameter(torch.empty(0, table.dim, dtype=_torch_dtype(table)))
        self.optimizer = TableOptimizer(table, self.weight)
        self._set_up_passes()

    @property
    def table(self) -> EmbeddingTable:
        """The table: `lookup`, `evict`, `stats` and all else of it may be called between passes."""
        return self._table

    @property
    def lr(self) -> float:
        """Learning rate, that of the table, settable."""
        return self._table.lr

    @lr.setter
    def lr(self, value: float | Tensor) -> None:
        self.optimizer.param_groups[0]["lr"] = value

    @property
    def instead(self) -> str:
        """Which of torch's layers does what this one does not."""
        return f"torch.nn.{'EmbeddingBag' if hasattr(self, 'mode') else 'Embedding'}"

    def extra_repr(self) -> str:
        """Say what the table is."""
        return repr(self._table)

    # --- lookups ------------------------------------------------------------------------------------------

    def ids_of(self, given: Any) -> Tensor:
        """Give what a lookup was given as int64 ids in memory, or refuse it."""
        name = type(self).__name__
        if getattr(self, "_is_replica", False):
            raise TableError(
                f"{name} in DataParallel: its table is in the memory of the host, and has no replicas on "
                "GPUs. Look up outside of the module that is wrapped"
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
                f"{name}: input is on device {where}, expected the CPU, where the table is: pass "
                "input.cpu(), and move what comes out to the device"
            )
        if given.dtype not in _IDS:
            raise GradientTypeError(f"{name}: input has dtype {given.dtype}, expected integers: ids")
        ids = given.detach()
        return ids.view(torch.int64) if ids.dtype == torch.uint64 else ids.long()

    def look_up(self, weight: Tensor, ids: Tensor) -> Tensor:  # noqa: ARG002 (it has no numbers)
        """Look up in training."""
        return self._vectors(ids, train=True)

    def _vectors(self, ids: Tensor, train: bool) -> Tensor:
        self._use_threads()
        found = self._table.lookup(ids.reshape(-1).numpy(), train)
        return torch.from_numpy(found).reshape(*ids.shape, self.embedding_dim)

    def _use_threads(self) -> None:
        """Use no more threads than torch may, where the table has no setting of its own."""
        table, allowed = self._table, threads_of_torch()
        if table.num_threads != allowed and table.num_threads in (None, self._set_threads):
            table.num_threads = self._set_threads = allowed

    def _check_weight(self) -> None:
        if self.optimizer.param_groups[0]["params"][0] is not self.weight:
            raise TableError(
                f"{type(self).__name__}.weight has been exchanged, expected the Parameter that the layer was "
                "made with: it has no numbers, and stands for the table; make a layer with from_table"
            )

    def before_step(self) -> None:
        """Get ready for a step of the table, or refuse it."""
        self.check_grad()
        self._use_threads()
        self.optimizer._opt_called = True  # type: ignore[attr-defined] # so that schedulers know of the step

    def _without_script(self) -> str:
        return "Look up outside of what is scripted, and pass the vectors in"

    # --- what torch does to modules -----------------------------------------------------------------------

    def _apply(self: L, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> L:  # noqa: ARG002
        """Refuse what would move or convert the table; torch's `to`, `double`, `share_memory` call this."""
        before = torch.zeros(1, dtype=self.weight.dtype)
        with torch.no_grad():
            after = fn(before)
        name = type(self).__name__
        if after.device != before.device:
            raise TableError(
                f"{name} to device {after.device}, expected cpu: its table is in the memory of the host. "
                "Move the other parts of the model, and what comes out of this one"
            )
        if after.dtype != before.dtype:
            raise TableError(
                f"{name} to {after.dtype}, expected {before.dtype}, which its table was made with and keeps: "
                "make it with dtype=, and convert the other parts of the model, and what comes out of it"
            )
        if after.is_shared():  # type: ignore[no-untyped-call]
            raise TableError(
                f"{name} to shared memory: its table cannot be there, for each process would have an index "
                "of its own. Look up in one process, or give each a copy"
            )
        return self

    def get_extra_state(self) -> Tensor:
        """The table, as a part of the module's state dict: a tensor of bytes.

        It is a file of safetensors: ids, values, moments, counts and what else is known of rows, by id.
        """
        return dynamic_state.pack(self._table, self.optimizer)

    def set_extra_state(self, state: Any) -> None:
        """Take over what `get_extra_state` gave, in the place of all that the table holds."""
        self._load_state(f"state of {type(self).__name__}", state)

    def _load_state(self, where: str, state: Any) -> None:
        dynamic_state.check(where, self._table, self.optimizer, state)()

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


def _torch_dtype(table: EmbeddingTable) -> torch.dtype:
    found: torch.dtype = getattr(torch, table.dtype.name)
    return found


def check_offsets_given(name: str, ids: Tensor, offsets: Any) -> None:
    """Refuse ids and offsets whose shapes or types do not go together."""
    if ids.dim() == 2:
        if offsets is not None:
            raise GradientError(
                f"{name}: got offsets with an input of shape {tuple(ids.shape)}, expected none: each row of "
                "a two-dimensional input is a bag"
            )
        return
    if ids.dim() != 1:
        raise GradientError(
            f"{name}: input has shape {tuple(ids.shape)}, expected (n,) with offsets, or (bags, length)"
        )
    if not isinstance(offsets, Tensor) or offsets.dim() != 1 or offsets.dtype not in INTEGERS:
        got = (
            f"of shape {tuple(offsets.shape)} and {offsets.dtype}"
            if isinstance(offsets, Tensor)
            else f"a {type(offsets).__name__}"
        )
        raise GradientTypeError(
            f"{name}: offsets are {got}, expected a Tensor of integers, (bags,), with an input of shape (n,)"
        )
    if offsets.device.type != "cpu":
        raise TableError(f"{name}: offsets are on device {offsets.device}, expected the CPU: offsets.cpu()")
