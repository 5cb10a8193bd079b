# SPDX-License-Identifier: Apache-2.0
"""What dynamic layers have in common: their `EmbeddingTable`, what cannot be, and their state."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam._src.torch import dynamic_state
from nb_sparse_adam._src.torch.by_ids import ByIds, standing_for
from nb_sparse_adam._src.torch.param_state import threads_of_torch
from nb_sparse_adam._src.torch.table_options import TableOptimizer
from nb_sparse_adam.errors import OptionError, TableError, TableTypeError

_OPTIONS = tuple(name for name in inspect.signature(EmbeddingTable).parameters if name != "dim")


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


class Dynamic(ByIds):
    """What both layers have in common."""

    _table: EmbeddingTable
    optimizer: TableOptimizer

    def _set_up(self, table: Any) -> None:
        name = type(self).__name__
        if not isinstance(table, EmbeddingTable):
            raise TableTypeError(
                f"{name}.from_table: got a {type(table).__name__}, expected an EmbeddingTable; for weights "
                f"whose rows are numbered: {self.instead}.from_pretrained"
            )
        self._table, self.embedding_dim = table, table.dim
        self._set_threads: int | None = None
        self.weight = standing_for(table.dim, table.dtype)
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

    def extra_repr(self) -> str:
        """Say what the table is."""
        return repr(self._table)

    # --- lookups and steps ----------------------------------------------------------------------------------

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

    # --- its state ------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The table, as a part of the module's state dict: a tensor of bytes.

        It is a file of safetensors: ids, values, moments, counts and what else is known of rows, by id.
        """
        return dynamic_state.pack(self._table, self.optimizer)

    def _load_state(self, where: str, state: Any) -> None:
        dynamic_state.check(where, self._table, self.optimizer, state)()
