# SPDX-License-Identifier: Apache-2.0
"""What layers have in common whose weight is the table: their optimizer, and their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nb_sparse_adam._src.gradients import BagGradient, RowGradient
from nb_sparse_adam._src.torch import layer_state, sharing
from nb_sparse_adam._src.torch.backward import is_pending
from nb_sparse_adam._src.torch.layer import Layer
from nb_sparse_adam._src.torch.optimizer import SparseAdam
from nb_sparse_adam._src.torch.param_state import has_state
from nb_sparse_adam._src.torch.steps import Job
from nb_sparse_adam._src.torch.tensors import check_parameter
from nb_sparse_adam.errors import (
    OptionError,
    OptionTypeError,
    SparseAdamError,
    StateError,
    TableError,
    TableTypeError,
)

OPTIONS = ("lr", "betas", "eps", "maximize", "step_counts", "eps_hat", "on_nonfinite", "device_checks")


class LayerOptimizer(SparseAdam):
    """The optimizer of a layer, which steps it in the backward pass: `step` is not called."""

    def register_step_pre_hook(self, hook: Any) -> Any:  # noqa: ARG002 (torch's names)
        """Refused: it would never be called."""
        raise _never_called("register_step_pre_hook")

    def register_step_post_hook(self, hook: Any) -> Any:  # noqa: ARG002
        """Refused: it would never be called."""
        raise _never_called("register_step_post_hook")

    def rearrange(self, old_param: Tensor, new_param: Tensor, source: Any) -> None:  # noqa: ARG002
        """Refused: the layer has to know."""
        raise OptionError(
            "layer.optimizer.rearrange: the layer would go on with its old weight, expected "
            "layer.rearrange(new_weight, source)"
        )


def _never_called(what: str) -> OptionError:
    return OptionError(
        f"layer.optimizer.{what}: the hook would never be called, as a fused layer's step is taken at the "
        "end of the backward pass, not by the optimizer's step. Do it after loss.backward(), or use "
        "torch.nn.EmbeddingBag(sparse=True) with nb_sparse_adam.torch.SparseAdam"
    )


class Fused(Layer):
    """What both layers have in common."""

    num_embeddings: int
    optimizer: SparseAdam

    def _set_up(self, given: Mapping[str, Any] | None) -> None:
        given = {} if given is None else given
        name = type(self).__name__
        if not isinstance(given, Mapping):
            raise OptionTypeError(
                f"{name}: optimizer is a {type(given).__name__}, expected a dict of options: "
                "optimizer=dict(lr=0.01)"
            )
        unknown = [key for key in given if key not in OPTIONS]
        if unknown:
            raise OptionError(f"{name}: optimizer has {unknown[0]!r}, expected some of {', '.join(OPTIONS)}")
        _refuse_meta(name, self.weight)
        _refuse_strides(name, self.weight)
        given = dict(given)
        device_checks = given.pop("device_checks", "immediate")
        self.optimizer = LayerOptimizer([(f"{name}.weight", self.weight)], **given)
        self.optimizer.set_device_checks(device_checks)  # layers are moved to a GPU when they have been made
        self._set_up_passes()
        sharing.register(self)

    @property
    def lr(self) -> float | Tensor:
        """Learning rate, that of ``optimizer.param_groups[0]``, where torch's schedulers set it."""
        lr: float | Tensor = self.optimizer.param_groups[0]["lr"]
        return lr

    @lr.setter
    def lr(self, value: float | Tensor) -> None:
        self.optimizer.param_groups[0]["lr"] = value

    def _check_weight(self) -> None:
        name, weight = type(self).__name__, self.weight
        _refuse_meta(name, weight)
        check_parameter(f"{name}.weight", weight)
        _refuse_strides(name, weight)
        if self.optimizer.device_checks != "immediate":
            self._group()
            self.optimizer.check_device_checks(self.optimizer.device_checks)

    def job(self, gradient: RowGradient | BagGradient) -> Job:
        """Make a gradient of the table a part of a step."""
        name, weight = f"{type(self).__name__}.weight", self.weight
        self.check_grad()
        _refuse_strides(type(self).__name__, weight)
        param_state = self.optimizer.ready(weight, self._group(), name, 1)
        self.optimizer._opt_called = True  # type: ignore[attr-defined] # so that schedulers know of the step
        return Job(self.optimizer, weight, param_state, gradient)

    def _group(self) -> dict[str, Any]:
        """The optimizer's group, with the Parameter that is there now; another one takes over the state."""
        group: dict[str, Any] = self.optimizer.param_groups[0]
        was = group["params"][0]
        if was is not self.weight:
            group["params"][0] = self.weight
            if was in self.optimizer.state:
                self.optimizer.state[self.weight] = self.optimizer.state.pop(was)
        return group

    def rearrange(self, new_weight: Tensor, source: Any) -> None:
        """Go on with another weight, whose rows take moments and counts of rows of the old one.

        For a vocabulary that grows, or users that are dropped. To append, prune, reorder and reset rows are
        all this one thing. ``num_embeddings`` becomes the number of rows.

        Parameters
        ----------
        new_weight : Tensor
            (rows, dim), of the old one's dtype and dim; its values are yours, and are not touched. What is no
            Parameter becomes one, and may be trained if the old one may.
        source : (rows,) integer Tensor or array
            For each row the old one whose moments and counts it takes, -1 for a fresh row: they are 0. A row
            that is named more than once is copied for each.

        Raises
        ------
        TableError
            If `new_weight` cannot take the place; if ``padding_idx``, which stays, is not one of its rows; if
            a backward pass, or `accumulate`, is going on. Nothing has been changed then.
        StateError
            If `source` is malformed, or names a row that is not there. Nothing has been changed then.

        Notes
        -----
        Lookups in the old weight cannot go backward any more: `backward` refuses them. An optimizer of other
        parameters that was given the old one has to be told.

        Examples
        --------
        >>> from nb_sparse_adam.torch import Embedding
        >>> layer = Embedding(3, 2, optimizer=dict(step_counts="row"))
        >>> layer(torch.tensor([0, 2, 2])).sum().backward()
        >>> kept = torch.tensor([2, 0])  # row 1 goes, the others change places, and one is new
        >>> weight = torch.cat([layer.weight.detach()[kept], torch.zeros(1, 2)])
        >>> layer.rearrange(weight, torch.tensor([2, 0, -1]))
        >>> layer.optimizer.state[layer.weight]["step"]
        tensor([1, 1, 0], dtype=torch.int32)
        """
        name = f"{type(self).__name__}.rearrange"
        with self.optimizer.turn:
            old = self._parameters.get("weight")
            if old is None or not old.is_leaf:
                raise TableError(f"{name}: the layer's weight is computed from others, expected a Parameter")
            if is_pending(self):
                raise TableError(
                    f"{name} while a backward pass or an accumulate block, which has met lookups of the old "
                    "weight, is going on: rearrange after it"
                )
            _refuse_shape(name, new_weight)
            rows, padding = len(new_weight), self.padding_idx
            if padding is not None and padding >= rows:
                raise TableError(
                    f"{name}: padding_idx is {padding}, expected one of the {rows} rows of the new weight: "
                    "set layer.padding_idx before, to None or to the row that stays out of training"
                )
            _refuse_meta(name, new_weight)
            _refuse_strides(name, new_weight)
            new = new_weight
            if not isinstance(new, torch.nn.Parameter):
                new = torch.nn.Parameter(new.detach(), requires_grad=old.requires_grad)
            group = self._group()

            def exchange() -> None:
                if group["params"][0] is new:
                    self._parameters["weight"], self.num_embeddings = new, rows

            try:
                try:
                    SparseAdam.rearrange(self.optimizer, old, new, source)
                finally:
                    exchange()
            finally:  # an interrupt that came in between is raised when all has been exchanged
                exchange()

    def _without_script(self) -> str:
        return (
            "For evaluation use torch.jit.trace, torch.compile or torch.export after eval(), or script a "
            f"{self.instead} that has its weight: load_state_dict(layer.state_dict(), strict=False)"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        sharing.register(self)

    def get_extra_state(self) -> Tensor:
        """State and options of the optimizer, as a part of the module's state dict: a tensor of bytes.

        It is a file of safetensors, with "exp_avg", "exp_avg_sq" and, if there are several counts, "step".
        """
        with self.optimizer.turn:
            self.optimizer.synchronize()
            group = self.optimizer.param_groups[0]
            entry = self.optimizer.state.get(group["params"][0])
            if has_state(entry):
                return layer_state.pack(group, entry, {})
            return layer_state.pack(group, None, self._unused_state())

    def _unused_state(self) -> dict[str, Tensor]:
        """Tensors like those of the state after the first step, if there may be one."""
        weight = self.weight
        if not weight.requires_grad:
            return {}
        unused = dict.fromkeys(("exp_avg", "exp_avg_sq"), weight.new_zeros(()).expand(weight.shape))
        step_counts = self.optimizer.param_groups[0]["step_counts"]
        if step_counts != "global":
            shape = weight.shape[:1] if step_counts == "row" else weight.shape
            unused["step"] = weight.new_zeros((), dtype=torch.int32).expand(shape)
        return unused

    def set_extra_state(self, state: Any) -> None:
        """Take over what `get_extra_state` gave, or, in older versions, a state dict of the optimizer."""
        self._load_state(f"state of {type(self).__name__}", state)

    def _load_state(self, where: str, given: Any) -> None:
        if isinstance(given, Tensor):
            given = layer_state.unpack(where, given)
            if given is None:
                return
        state = layer_state.check_state_dict(where, given)
        self._group()
        try:
            self.optimizer.load_state_dict(state)
        except (SparseAdamError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"{where} does not fit: {error}") from error

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        key, where = prefix + "_extra_state", f"{prefix}_extra_state of the state dict"
        was, later = self._parameters.get("weight"), list[Any]()
        assign = local_metadata.get("assign_to_params_buffers", False)

        def load_state_first(given: dict[str, Any], *_: Any) -> None:
            weight = given.get(prefix + "weight")
            if isinstance(weight, Tensor):
                fits = weight.shape == self.weight.shape
            else:
                fits = not strict and prefix + "weight" not in given
            if key in given:
                state = given.pop(key)
                if fits and assign:
                    later.append(state)
                elif fits:  # else torch complains about the weight
                    self._load_state(where, state)

        # The last of the hooks before weights are copied: what is refused has changed nothing.
        hook = self._register_load_state_dict_pre_hook(load_state_first)  # type: ignore[no-untyped-call]
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
            for state in later:
                self._load_state(where, state)
        except StateError:
            if was is not None:
                self._parameters["weight"] = was
                self._group()
            raise
        finally:
            hook.remove()
        if key in missing_keys:  # the weights of a layer of torch's: the optimizer goes on as it is
            missing_keys.remove(key)


def _refuse_shape(name: str, weight: Any) -> None:
    expected = "expected a Tensor (rows, dim)"
    if not isinstance(weight, Tensor):
        raise TableTypeError(f"{name}: the new weight is a {type(weight).__name__}, {expected}")
    if weight.dim() != 2:
        raise TableError(f"{name}: the new weight has shape {tuple(weight.shape)}, {expected}")


def _refuse_meta(name: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise TableError(
            f"{name}.weight is on device meta, which has no memory, expected the CPU or cuda. Make the layer "
            "there, without torch.nn.utils.skip_init; to leave out the initialization: "
            f"{name}.from_pretrained(torch.empty{tuple(weight.shape)}, freeze=False)"
        )


def _refuse_strides(name: str, weight: Tensor) -> None:
    if not weight.is_contiguous():
        raise TableError(
            f"{name}: weight has strides {weight.stride()}, expected it contiguous: it is updated in place; "
            "pass weight.contiguous()"
        )
