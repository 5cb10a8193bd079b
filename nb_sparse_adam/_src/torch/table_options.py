# SPDX-License-Identifier: Apache-2.0
"""The options of an `EmbeddingTable` as a torch optimizer's group, where schedulers set them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam._src.torch import groups
from nb_sparse_adam._src.torch.plain import plain_copy
from nb_sparse_adam.errors import OptionError


class TableGroup(dict[str, Any]):
    """A group whose options are those that the table has: what is set is set there, checked as it is."""

    def __init__(self, table: EmbeddingTable, weight: Tensor) -> None:
        super().__init__(params=[weight], step_counts=table.step_counts)
        self._table = table
        self._look()

    def _look(self) -> None:
        """Look at the options that the table has now."""
        super().update({name: getattr(self._table, name) for name in groups.USED})

    def __getitem__(self, key: str) -> Any:
        self._look()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        self._look()
        return super().get(key, default)

    def items(self) -> Any:
        """As of a dict."""
        self._look()
        return super().items()

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "step_counts" and value != self._table.step_counts:
            raise OptionError(
                f"step_counts is {value!r}, expected {self._table.step_counts!r}, which the table was made "
                "with and cannot change"
            )
        if key in groups.USED:
            value = groups.options_of({**dict(self.items()), key: value})[key]
            setattr(self._table, key, value)
        super().__setitem__(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As of a dict."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value


class TableOptimizer(torch.optim.Optimizer):
    """The options of a dynamic layer's table, for schedulers; the layer steps it in the backward pass."""

    def __init__(self, table: EmbeddingTable, weight: Tensor) -> None:
        # Schedulers look into the defaults, too, for what an optimizer knows.
        super().__init__([TableGroup(table, weight)], {name: getattr(table, name) for name in groups.USED})
        self._table = table

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do nothing: the layer's step is taken at the end of the backward pass."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: there is one table."""
        if self.__dict__.get("param_groups"):
            raise _refused("add_param_group", "a layer has one table, expected another layer for another one")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Any) -> None:  # noqa: ARG002 (torch's name)
        """Refused: the layer's state dict has it."""
        raise _refused(
            "load_state_dict", "the layer's own state dict has the table and its options: use that"
        )

    def register_step_pre_hook(self, hook: Any) -> Any:  # noqa: ARG002
        """Refused: it would never be called."""
        raise _refused("register_step_pre_hook", "it would never be called; do it after loss.backward()")

    def register_step_post_hook(self, hook: Any) -> Any:  # noqa: ARG002
        """Refused: it would never be called."""
        raise _refused("register_step_post_hook", "it would never be called; do it after loss.backward()")

    def further(self) -> dict[str, Any]:
        """What others have put into the group, as schedulers do."""
        known = ("params", "step_counts", *groups.USED)
        return {key: plain_copy(each) for key, each in self.param_groups[0].items() if key not in known}

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles: the optimizer of the table's copy."""
        return _rebuilt, (self._table, self.param_groups[0]["params"][0], self.further())


def _rebuilt(table: EmbeddingTable, weight: Tensor, further: dict[str, Any]) -> TableOptimizer:
    made = TableOptimizer(table, weight)
    made.param_groups[0].update(further)
    return made


def _refused(what: str, why: str) -> OptionError:
    return OptionError(f"layer.optimizer.{what}: {why}")
