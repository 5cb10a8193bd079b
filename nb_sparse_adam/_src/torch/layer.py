# SPDX-License-Identifier: Apache-2.0
"""What layers have in common that are updated in the backward pass, whatever table they look up in."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nb_sparse_adam._src.table.updates import Updates
from nb_sparse_adam._src.torch.backward import Accumulating
from nb_sparse_adam.errors import GradientError, OptionError, SparseAdamWarning, TableError

if TYPE_CHECKING:
    _Module = torch.nn.Module
else:
    _Module = object


class Layer(_Module):
    """A layer whose lookups update its table when the backward pass comes to them."""

    weight: Tensor  # the table, or what stands for it
    embedding_dim: int
    padding_idx: int | None
    optimizer: torch.optim.Optimizer
    accumulated: weakref.ref[Accumulating] | None
    grad_scaler: Any
    # Where the rows are: an `EmbeddingTable`, or a parameter server. With neither, the weight is the table.
    _table: Updates | None = None
    _client: Any = None

    def look_up(self, weight: Tensor, ids: Tensor) -> Tensor:
        """Return the vectors of ids of any shape."""
        raise NotImplementedError

    @property
    def instead(self) -> str:
        """Which of torch's layers does what this one does not."""
        return f"torch.nn.{type(self).__name__}"

    @property
    def _not_distributed(self) -> str:
        return (
            "its table is updated in the backward pass, from the process's own batch, and the processes' "
            "tables would drift apart. Keep it outside of the module that is wrapped, or use "
            "nn.EmbeddingBag(sparse=True) there"
        )

    def _set_up_passes(self) -> None:
        self.accumulated = None
        self.grad_scaler = None

    def _is_training(self) -> bool:
        """Whether a lookup is to update the table when the backward pass comes to it."""
        return self.training and torch.is_grad_enabled() and self.weight.requires_grad

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _train(self, function: Any, *args: Any) -> Tensor:
        """Look up by an autograd function, which updates the table when the backward pass comes to it."""
        self._check_training()
        out: Tensor = function.apply(self.weight, *args)
        return out

    def _check_training(self) -> None:
        """Refuse what cannot be trained."""
        name, weight = type(self).__name__, self.weight
        if torch._C._are_functorch_transforms_active():
            raise GradientError(
                f"a training {name} was looked up under torch.func (grad, vmap, jacrev, ...): its table is "
                "updated at the end of a backward pass, which these transforms do not have. Call layer.eval()"
                f" before, if the table is not to be updated, or use {self.instead}"
            )
        self._check_weight()
        if not weight.is_leaf or "weight" not in self._parameters:
            raise TableError(
                f"{name}.weight is computed from other parameters (by parametrize, weight_norm or prune), "
                "expected a Parameter: the table is updated in place, and has no gradient to give to them. "
                f"Use {self.instead}(sparse=True)"
            )
        if DistributedDataParallel._active_ddp_module is not None:
            raise TableError(f"{name} in DistributedDataParallel: {self._not_distributed}")
        if self.grad_scaler is None and any(
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
            for device in ("cpu", "cuda", "xpu", "mps")
        ):
            raise OptionError(
                f"{name} under float16 autocast: it cannot know how a GradScaler has scaled the loss. Set "
                "layer.grad_scaler = scaler, or, if there is none, layer.grad_scaler = 1.0; bfloat16 needs "
                "no scaler"
            )
        if weight._backward_hooks:
            warnings.warn(
                f"{name}.weight has a hook, which is called with None: the table has no gradient. Remove it, "
                f"put it on the output of the layer, or use {self.instead}(sparse=True)",
                SparseAdamWarning,
                stacklevel=2,
            )

    def _check_weight(self) -> None:
        """Refuse a table that cannot be updated."""
        raise NotImplementedError

    def check_grad(self) -> None:
        """Refuse a step of a table that something besides lookups uses."""
        if self.weight.grad is not None:
            raise GradientError(
                f"{type(self).__name__}.weight has a .grad too: something besides lookups uses the table "
                "(tied weights, a penalty), and there is no optimizer for it. Use "
                f"{self.instead}(sparse=True), or look the rows up; if it is an old one, set weight.grad = "
                "None"
            )

    def before_step(self) -> None:
        """Get ready for a step of an `EmbeddingTable`, or refuse it."""
        raise NotImplementedError

    def unscaled(self, grad_output: Tensor) -> Tensor:
        """Divide the gradient of an output by what the loss has been scaled with."""
        grad_output = grad_output.resolve_neg()
        if self.grad_scaler is None:
            return grad_output
        scale = self.grad_scaler.get_scale() if hasattr(self.grad_scaler, "get_scale") else self.grad_scaler
        return grad_output if scale == 1 else grad_output / scale

    def __prepare_scriptable__(self) -> Any:
        """Refuse torch.jit.script, which asks for this."""
        raise TableError(
            f"torch.jit.script of a fused {type(self).__name__}: how it updates its table cannot be "
            f"scripted. {self._without_script()}"
        )

    def _without_script(self) -> str:
        """Say what to do without torch.jit.script."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the layer with its optimizer; a GradScaler goes on to be shared, for it scales one loss."""
        if hasattr(self.grad_scaler, "get_scale"):
            memo.setdefault(id(self.grad_scaler), self.grad_scaler)
        copied = memo[id(self)] = type(self).__new__(type(self))
        # The class that parametrize makes has a __getstate__ that raises.
        is_parametrized = torch.nn.utils.parametrize.is_parametrized(self)
        state = Layer.__getstate__(self) if is_parametrized else self.__getstate__()
        copied.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "accumulated": None}  # a copy is in nobody's `accumulate`
