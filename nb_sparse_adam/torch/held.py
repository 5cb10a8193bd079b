"""One parameter of torch's and what the engine holds for it; neither is copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from nb_sparse_adam.errors import (
    DenseGradientError,
    GradientError,
    GradientIndexError,
    StateError,
    TableError,
    TableTypeError,
)
from nb_sparse_adam.gradients import RowGradient
from nb_sparse_adam.optimizer import SparseAdam
from nb_sparse_adam.threads import max_threads

__all__ = ["Held", "check_parameter", "coo", "entry_copied"]

ENTRIES = ("step", "exp_avg", "exp_avg_sq")


def check_parameter(name: str, param: Tensor) -> None:
    """Refuse a parameter that the engine cannot update in place."""
    if param.dtype not in (torch.float32, torch.float64):
        raise TableTypeError(
            f"parameter {name} has dtype {param.dtype}, expected torch.float32 or torch.float64; convert it "
            "with .float(), or leave it to torch.optim.SparseAdam"
        )
    _check_on_cpu(f"parameter {name}", param)
    if any(step == 0 and length > 1 for step, length in zip(param.stride(), param.shape, strict=True)):
        raise TableError(
            f"parameter {name} has strides {param.stride()}: several elements are one place in memory, "
            "expected one for each; pass parameter.contiguous() as a Parameter of its own"
        )
    if param.is_inference() and not torch.is_inference_mode_enabled():
        raise TableError(
            f"parameter {name} was made under torch.inference_mode, and cannot be changed outside of it; "
            "make it outside, or clone it"
        )


def _check_on_cpu(what: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not in the memory of the CPU."""
    if tensor.device.type != "cpu":
        raise TableError(
            f"{what} is on device {tensor.device}, expected the CPU: keep the embedding there "
            "(module.cpu()) and move its output to the device, or use torch.optim.SparseAdam for it"
        )


def entry_copied(entry: Any) -> Any:
    """Copy a parameter's entry of the state, its tensors as contiguous ones of their own."""
    if not isinstance(entry, dict):
        return entry
    return {
        key: value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
        for key, value in entry.items()
    }


class Held:
    """A parameter, seen as a table of rows, with an engine of its own.

    A gradient with `sparse_dim` sparse dimensions names places in the first `sparse_dim` dimensions of the
    parameter: these are the table's rows, and what is left of the shape is a row. Gradients of single entries
    (as many sparse dimensions as the parameter has) thus see rows of dim 1, and nothing is widened.

    Parameters
    ----------
    name : str
        What errors call it.
    param : Tensor
        Of float32 or float64, on the CPU. If it is not contiguous, a contiguous copy is kept, and the rows
        that a gradient names go there and back in every step.
    sparse_dim : int
    step_counts : {"element", "row", "global"}
    """

    def __init__(self, name: str, param: Tensor, sparse_dim: int, step_counts: str) -> None:
        if step_counts == "row" and sparse_dim > 1:
            raise GradientError(
                f"gradient of parameter {name} has {sparse_dim} sparse dimensions, with step_counts='row' "
                "expected 1: it names entries, not rows; use step_counts='element' or 'global'"
            )
        check_parameter(name, param)
        self.name, self.sparse_dim, self.step_counts = name, sparse_dim, step_counts
        self.shape = tuple(param.shape)
        self.identity = _identity(param)
        data = param.detach()
        self.shadow = None if data.is_contiguous() else data.clone(memory_format=torch.contiguous_format)
        table = (data if self.shadow is None else self.shadow).numpy()
        self.rows, self.dim = math.prod(self.shape[:sparse_dim]), math.prod(self.shape[sparse_dim:])
        self.engine = SparseAdam({name: table.reshape(self.rows, self.dim)}, step_counts=step_counts)
        self.table = self.engine.state[name]
        self.given: tuple[Any, ...] | None = None  # the options in use, as the group had them
        self._show()

    def _show(self) -> None:
        """Make the tensors that show the state."""
        self._shown = arrays = self.table.arrays
        moments = torch.from_numpy(arrays.moments)
        self.exp_avg = self._view(moments, arrays.moment_stride, 0)
        self.exp_avg_sq = self._view(moments, arrays.moment_stride, self.dim if self.rows else 0)
        self.counts: Tensor | None = None
        if self.step_counts == "element":
            self.counts = self._view(torch.from_numpy(arrays.counts), arrays.count_stride, 0)
        elif self.step_counts == "row":
            counts = torch.from_numpy(arrays.counts)
            self.counts = counts.as_strided((self.rows,), (arrays.count_stride,))
        shown = (self.exp_avg, self.exp_avg_sq, self.counts)
        self._shown_at = [None if tensor is None else _identity(tensor) for tensor in shown]

    def _view(self, flat: Tensor, stride: int, offset: int) -> Tensor:
        """A part of every row's record, in the parameter's shape."""
        outer, inner = self.shape[: self.sparse_dim], self.shape[self.sparse_dim :]
        strides = [stride * step for step in _strides(outer)] + _strides(inner)
        return flat.as_strided(self.shape, strides, offset)

    @property
    def step(self) -> int | Tensor:
        """What torch calls step: the count of the table, or the counts of its rows or elements."""
        return int(self.table.arrays.counts[0]) if self.counts is None else self.counts

    @property
    def has_run(self) -> int:
        """How many steps the engine has taken."""
        return int(self.table.totals[0])

    def entry(self) -> dict[str, Any]:
        """The parameter's entry of an optimizer's state; its tensors are the live state."""
        if self._shown is not self.table.arrays:  # counts have been widened
            self._show()
        return {"step": self.step, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def is_current(self, param: Tensor, sparse_dim: int, entry: Mapping[str, Any]) -> bool:
        """Whether parameter and state are still those that the engine works on."""
        if sparse_dim != self.sparse_dim or self.identity != _identity(param) or not entry:
            return False
        step = entry.get("step")
        if self.counts is None and (type(step) is not int or step != self.step):
            return False
        shown = entry.get("exp_avg"), entry.get("exp_avg_sq"), None if self.counts is None else step
        ours = self.exp_avg, self.exp_avg_sq, self.counts
        # The same tensors, and their memory has not been exchanged either.
        return all(
            given is tensor and (given is None or _identity(given) == at)
            for given, tensor, at in zip(shown, ours, self._shown_at, strict=True)
        )

    def check_load(self, entry: Any) -> Callable[[], None]:
        """Check a parameter's entry of a state; return what loads it, and cannot fail."""
        where = f"state of parameter {self.name}"
        if not isinstance(entry, Mapping) or any(key not in entry for key in ENTRIES):
            got = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
            raise StateError(f"{where}: got {got}, expected step, exp_avg and exp_avg_sq")
        given: dict[str, Any] = {"skipped_rows": self.table.skipped_rows}
        for key in ("exp_avg", "exp_avg_sq"):
            value = entry[key]
            if not isinstance(value, Tensor) or tuple(value.shape) != self.shape:
                kind = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise StateError(
                    f"{where}: {key} is {kind}, expected a tensor of shape {self.shape}; a parameter that "
                    "has another shape now starts anew after del optimizer.state[parameter]"
                )
            given[key] = _array(value.to(self.exp_avg.dtype)).reshape(self.rows, self.dim)
        given["steps"] = self._given_counts(where, entry["step"])
        return self.table.check_load(given)

    def _given_counts(self, where: str, step: Any) -> Any:
        single = not isinstance(step, Tensor) or step.dim() == 0
        if self.step_counts == "global":
            if not single and step.numel() != 1:
                raise StateError(
                    f"{where}: step is a tensor of shape {tuple(step.shape)}, counts of rows or elements; "
                    "with step_counts='global' expected one number: load it into an optimizer with the "
                    "step_counts that it was saved with"
                )
            number = float(step)
            if not number.is_integer() or number < 0:
                raise StateError(f"{where}: step is {number:g}, expected an integer >= 0")
            return np.asarray(int(number), np.int64)
        expected = (self.rows,) if self.step_counts == "row" else self.shape
        if single or tuple(step.shape) != expected:
            got = f"the one count {float(step):g}" if single else f"a tensor of shape {tuple(step.shape)}"
            raise StateError(
                f"{where}: step is {got}, with step_counts={self.step_counts!r} expected counts of shape "
                f"{expected}: a checkpoint of torch.optim.SparseAdam goes on with step_counts='global'"
            )
        counts = _array(step)
        return counts.reshape(self.rows, self.dim) if self.step_counts == "element" else counts

    def use(self, options: Mapping[str, Any]) -> None:
        """Set the engine's options."""
        for key, value in options.items():
            setattr(self.engine, key, value)

    def use_threads(self) -> None:
        """Use no more threads than torch may."""
        # Whoever has limited torch's threads has meant ours too: DataLoader does so in its workers.
        allowed = torch.get_num_threads()
        is_limit = allowed == 1 or (allowed < max_threads() and allowed < numba.get_num_threads())
        num_threads = allowed if is_limit else None
        if self.engine.num_threads != num_threads:
            self.engine.num_threads = num_threads

    def gradient(self, param: Tensor, grad: Tensor) -> RowGradient:
        """See a sparse COO gradient of the parameter as rows of the table; no value is copied."""
        if grad.shape != param.shape:
            raise GradientError(
                f"gradient of parameter {self.name} has shape {tuple(grad.shape)}, expected {self.shape}: "
                "the parameter has changed since; compute the gradient anew"
            )
        indices, values = grad._indices(), grad._values()
        if values.dtype not in (torch.float32, torch.float64):  # a parameter's grad_dtype may differ
            values = values.to(param.dtype)
        rows = indices[0] if self.sparse_dim == 1 and self.shadow is None else self._flat(indices)
        if self.shadow is not None:
            places = tuple(indices)
            self.shadow[places] = param.detach()[places]
        return RowGradient(rows.numpy(), values.reshape(len(rows), self.dim).numpy())

    def _flat(self, indices: Tensor) -> Tensor:
        """Number places of several dimensions; one that is out of range must not become another's number."""
        rows = indices.new_zeros(indices.shape[1])
        outer = self.shape[: self.sparse_dim]
        for d, (index, length, stride) in enumerate(zip(indices, outer, _strides(outer), strict=True)):
            wrong = torch.nonzero((index < 0) | (index >= length))
            if len(wrong):
                at = int(wrong[0])
                raise GradientIndexError(
                    f"gradient of parameter {self.name}: indices[{d}, {at}] is {int(index[at])}, expected "
                    f"0 <= index < {length}"
                )
            rows += index * stride
        return rows

    def has_changed(self, param: Tensor, grad: Tensor | None) -> None:
        """Let torch know that the parameter has been changed in place."""
        if self.shadow is not None and grad is not None:
            places = tuple(grad._indices())
            param.detach()[places] = self.shadow[places]
        else:
            torch.autograd.graph.increment_version(param)


def coo(name: str, grad: Tensor) -> Tensor:
    """Refuse a gradient that is not sparse, or elsewhere."""
    if grad.layout is not torch.sparse_coo:
        raise DenseGradientError(
            f"SparseAdam does not support dense gradients, please consider Adam instead: parameter {name} "
            f"has a gradient of layout {grad.layout}, expected torch.sparse_coo, as nn.Embedding and "
            "nn.EmbeddingBag with sparse=True give"
        )
    _check_on_cpu(f"gradient of parameter {name}", grad)
    return grad.detach()


def _identity(param: Tensor) -> tuple[Any, ...]:
    return param.data_ptr(), param.dtype, tuple(param.shape), param.stride(), param.device


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of a contiguous array."""
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()
