# SPDX-License-Identifier: Apache-2.0
"""One of torch's parameters, and what the engine holds for it; neither is copied."""

from __future__ import annotations

import math
import numbers
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nb_sparse_adam._src.annotations import DeviceChecks, StepCounts
from nb_sparse_adam._src.engine.state import MAX_COUNT
from nb_sparse_adam._src.engine.threads import max_threads, numba_threads
from nb_sparse_adam._src.gradients import RowGradient
from nb_sparse_adam._src.optimizer import SparseAdam, tables_of
from nb_sparse_adam._src.torch import tensors
from nb_sparse_adam.errors import GradientError, GradientIndexError, StateError

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")


def has_state(entry: Any) -> bool:
    """Whether a parameter's entry holds state: it may be None, or have only keys of the user's own."""
    if not isinstance(entry, Mapping):
        return entry is not None
    return any(key in entry for key in STATE_KEYS)


class ParamState:
    """A parameter, seen as a table of rows, with an engine of its own.

    A gradient with `sparse_dim` sparse dimensions names places in the first `sparse_dim` dimensions of the
    parameter: these are the table's rows, and what is left of the shape is a row. Gradients of single entries
    (as many sparse dimensions as the parameter has) thus see rows of dim 1, and nothing is widened.

    Parameters
    ----------
    name : str
        What errors call it.
    param : Tensor
        float32 or float64, on the CPU or a GPU. If it is not contiguous, a contiguous copy is kept, and
        the rows that a gradient names go there and back in every step.
    sparse_dim : int
    step_counts : {"element", "row", "global"}
    after : ParamState, optional
        The one that it takes the place of: the number of skipped rows goes on from there.

    Attributes
    ----------
    together : set of ParamState
        Those that took part in deferred steps of this one, and this one (see `deferred`).
    """

    table: Any

    def __init__(
        self,
        name: str,
        param: Tensor,
        sparse_dim: int,
        step_counts: StepCounts,
        *,
        after: ParamState | None = None,
    ) -> None:
        if step_counts == "row" and sparse_dim > 1:
            raise GradientError(
                f"gradient of parameter {name} has {sparse_dim} sparse dimensions, with step_counts='row' "
                "expected 1: it names entries, not rows; use step_counts='element' or 'global'"
            )
        tensors.check_parameter(name, param)
        tensors.check_memory(name, param)
        self.name, self.sparse_dim, self.step_counts = name, sparse_dim, step_counts
        self.shape = tuple(param.shape)
        self.identity = tensors.identity_of(param)
        data = param.detach()
        self.shadow = None if data.is_contiguous() else data.clone(memory_format=torch.contiguous_format)
        self.rows, self.dim = math.prod(self.shape[:sparse_dim]), math.prod(self.shape[sparse_dim:])
        self.device, self.on_gpu = param.device, tensors.Gpu.has(param)
        self.together: weakref.WeakSet[ParamState] = weakref.WeakSet([self])
        matrix = (data if self.shadow is None else self.shadow).reshape(self.rows, self.dim)
        self.engine = SparseAdam({name: tensors.array_of(matrix, self.on_gpu)}, step_counts=step_counts)
        self.table = tables_of(self.engine)[name]
        self.given: tuple[Any, ...] | None = None  # the options in use, as the group had them
        self._not_launched = 0  # steps of the count on a GPU
        self._entry: MutableMapping[str, Any] | None = None  # where the state has been shown last
        self._shown_step: Any = None  # what is called step there
        self._is_loaded = False  # with a state, which may not have been shown yet
        self._make_views()
        if after is not None:
            self.table.set_skipped_rows(after.table.skipped_rows)

    @property
    def checks(self) -> str | None:
        """The engine's ``device_checks``; None on the CPU."""
        return self.engine.device_checks if self.on_gpu else None

    @torch.inference_mode(False)  # tensors made under it have no version, which says when they change
    def _make_views(self) -> None:
        """Make the tensors that show the state."""
        self._viewed = arrays = self.table.arrays
        words = self._tensor(arrays.words)
        self.exp_avg = self._view(words, arrays.state_stride, 0)
        self.exp_avg_sq = self._view(words, arrays.state_stride, arrays.exp_avg_sq_offset if self.rows else 0)
        self.counts: Tensor | None = None
        if self.step_counts == "element":
            self.counts = self._view(self._tensor(arrays.counts), arrays.count_stride, 0)
        elif self.step_counts == "row":
            counts = self._tensor(arrays.counts)
            self.counts = counts.as_strided((self.rows,), (arrays.count_stride,))
        views = (self.exp_avg, self.exp_avg_sq, self.counts)
        self._view_identities = [None if tensor is None else tensors.identity_of(tensor) for tensor in views]
        self._counts_version = None if self.counts is None else self.counts._version

    def _tensor(self, array: Any) -> Tensor:
        return tensors.Gpu.for_torch(array, self.device) if self.on_gpu else torch.from_numpy(array)

    def _view(self, flat: Tensor, stride: int, offset: int) -> Tensor:
        """A part of every row's record, in the parameter's shape."""
        outer, inner = self.shape[: self.sparse_dim], self.shape[self.sparse_dim :]
        strides = [stride * step for step in tensors.contiguous_strides(outer)]
        return flat.as_strided(self.shape, strides + tensors.contiguous_strides(inner), offset)

    @property
    def step(self) -> int | Tensor:
        """What torch calls step: the count of the table, or the counts of its rows or elements.

        To read a count on a GPU is to wait for it, so launches are counted instead. They differ from steps
        where one is refused after its launch, until that is raised (see `recount`).
        """
        if self.counts is not None:
            return self.counts
        if self.on_gpu:
            return self._not_launched + int(self.table.launched)
        return int(self.table.arrays.counts[0])

    @property
    def is_shown(self) -> bool:
        """Whether an optimizer's state shows it: after a step, or a state that was loaded."""
        return self._entry is not None

    @property
    def has_run(self) -> int:
        """How many steps the engine has taken; on a GPU, launched."""
        return int(self.table.launched if self.on_gpu else self.table.totals[0])

    def _note_count(self, number: int) -> None:
        self._not_launched = number - int(self.table.launched)

    def recount(self) -> None:
        """Ask the GPU for the count, and show it; it waits."""
        if self.on_gpu and self.counts is None:
            number = int(self.table.steps)
            self._note_count(number)
            if self._entry is not None and self._entry.get("step") == self._shown_step:
                self._entry["step"] = self._shown_step = number

    def show(self, entry: MutableMapping[str, Any]) -> None:
        """Show the state in a parameter's entry, as live tensors; the user's own keys there are kept."""
        if self._viewed is not self.table.arrays:  # counts have been widened
            self._make_views()
        step = self.step
        entry.update({"step": step, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq})
        self._entry, self._shown_step = entry, step

    def is_current(self, param: Tensor, sparse_dim: int, entry: Any) -> bool:
        """Whether parameter and state are still those that the engine works on.

        Counts may have been changed, the tensor of counts in place, and the one count by another number: they
        are checked and taken over here.

        Raises
        ------
        StateError
            For a count that is negative, or larger than any number of steps. Nothing has been changed then.
        """
        if sparse_dim != self.sparse_dim or self.identity != tensors.identity_of(param):
            return False
        shown = entry if isinstance(entry, dict) else {}
        exp_avg, exp_avg_sq, step = shown.get("exp_avg"), shown.get("exp_avg_sq"), shown.get("step")
        if exp_avg is not self.exp_avg or exp_avg_sq is not self.exp_avg_sq:
            # Nothing has been shown yet. If it has, and is there no more, the user begins anew.
            return not self.is_shown and not self._is_loaded and not has_state(entry)
        # The same tensors, and their memory has not been exchanged either.
        noted = self._view_identities
        if tensors.identity_of(exp_avg) != noted[0] or tensors.identity_of(exp_avg_sq) != noted[1]:
            return False
        if self.counts is not None:
            if step is not self.counts or tensors.identity_of(step) != noted[2]:
                return False
            if step._version != self._counts_version:
                self._check_counts(step)
            return True
        # Compared with what was shown, not with what the engine has: an interrupt may have kept that back.
        return step is self._shown_step or self._take_step(step)

    def _check_counts(self, counts: Tensor) -> None:
        """Look at counts that have been changed in place."""
        version = counts._version
        if counts.numel():
            lowest, highest = (int(count) for count in torch.aminmax(counts))
            if lowest < 0 or highest > MAX_COUNT:
                place = torch.nonzero((counts < 0) | (counts.long() > MAX_COUNT))[0].tolist()
                raise StateError(
                    f"state of parameter {self.name}: step{place} is {int(counts[tuple(place)])}, expected 0 "
                    f"<= step <= 2**62; set it to 0 for what begins anew, or del optimizer.state[parameter]"
                )
            self.table.counts_have_changed()  # one may be at the end of its type now
        self._counts_version = version

    def _take_step(self, step: Any) -> bool:
        """Go on from another count of the table; False if it is not known how to tell the engine."""
        if type(step) is int and step == self._shown_step:
            return True
        number = _one_count(f"state of parameter {self.name}", step)
        if self.on_gpu:
            return False
        self.table.arrays.counts[0] = number
        if type(step) is int:  # else it may be changed in place
            self._shown_step = step
        return True

    def check_load(self, entry: Any) -> Callable[[], None]:
        """Check a parameter's entry of a state; return what loads it, and cannot fail."""
        where = f"state of parameter {self.name}"
        if not isinstance(entry, Mapping) or any(key not in entry for key in STATE_KEYS):
            got = sorted(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
            raise StateError(f"{where}: got {got}, expected step, exp_avg and exp_avg_sq")
        given: dict[str, Any] = {"skipped_rows": self.table.skipped_rows}
        for key in ("exp_avg", "exp_avg_sq"):
            value = entry[key]
            advice = (
                "; a parameter that has another shape now starts anew after del optimizer.state[parameter]"
            )
            tensors.check_shape(f"{where}: {key}", value, self.shape, advice)
            given[key] = tensors.host_array(value.to(self.exp_avg.dtype)).reshape(self.rows, self.dim)
        given["steps"] = self._given_counts(where, entry["step"])
        load: Callable[[], None] = self.table.check_load(given)

        def load_and_note() -> None:
            self._is_loaded = True
            load()
            if self.on_gpu and self.counts is None:
                self._note_count(int(given["steps"]))

        return load_and_note

    def _given_counts(self, where: str, step: Any) -> Any:
        if isinstance(step, np.ndarray):
            step = torch.as_tensor(step)
        single = not isinstance(step, Tensor) or step.dim() == 0
        if self.step_counts == "global":
            if not single and step.numel() != 1:
                raise StateError(
                    f"{where}: step is a tensor of shape {tuple(step.shape)}, counts of rows or elements; "
                    "with step_counts='global' expected one number: load it into an optimizer with the "
                    "step_counts that it was saved with"
                )
            return np.asarray(_one_count(where, step), np.int64)
        expected = (self.rows,) if self.step_counts == "row" else self.shape
        as_loaded = (self.rows,) if self.step_counts == "row" else (self.rows, self.dim)
        if single and _one_count(where, step) == 0:  # what any of them is before its first step
            return np.broadcast_to(np.int32(0), as_loaded)
        if single or tuple(step.shape) != expected:
            got = f"the one count {float(step):g}" if single else f"a tensor of shape {tuple(step.shape)}"
            raise StateError(
                f"{where}: step is {got}, with step_counts={self.step_counts!r} expected counts of shape "
                f"{expected}: a checkpoint of torch.optim.SparseAdam goes on with step_counts='global'"
            )
        return _whole(where, tensors.host_array(step)).reshape(as_loaded)

    def use(self, options: Mapping[str, Any], device_checks: DeviceChecks) -> None:
        """Set the engine's options."""
        if self.on_gpu and self.checks != device_checks:
            # This one goes with all other options, the old and the new. To leave "deferred" is to wait.
            self.engine.device_checks = "immediate"
        for key, value in options.items():
            setattr(self.engine, key, value)
        if self.on_gpu and self.checks != device_checks:
            self.engine.device_checks = device_checks

    def use_threads(self) -> None:
        """Use no more threads than torch may."""
        if self.on_gpu:
            return
        num_threads = threads_of_torch()
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
        values = values.reshape(len(rows), self.dim)
        return RowGradient(tensors.array_of(rows, self.on_gpu), tensors.array_of(values, self.on_gpu))

    def _flat(self, indices: Tensor) -> Tensor:
        """Number places of several dimensions; one that is out of range must not become another's number."""
        rows = indices.new_zeros(indices.shape[1])
        outer = self.shape[: self.sparse_dim]
        # torch's indexing, which a shadow needs, leaves a GPU unusable when a place is out of range.
        waits = self.checks in (None, "immediate") or self.shadow is not None
        for d, (index, length, stride) in enumerate(
            zip(indices, outer, tensors.contiguous_strides(outer), strict=True)
        ):
            wrong = (index < 0) | (index >= length)
            if waits:
                found = torch.nonzero(wrong)
                if len(found):
                    place = int(found[0])
                    raise GradientIndexError(
                        f"gradient of parameter {self.name}: indices[{d}, {place}] is {int(index[place])}, "
                        f"expected 0 <= index < {length}"
                    )
                rows += index * stride
            else:  # what is negative once stays so, and is found by the engine
                rows = torch.where(wrong | (rows < 0), -1, rows + index * stride)
        return rows

    def has_changed(self, param: Tensor, grad: Tensor | None) -> None:
        """Tell torch that the parameter has been changed in place."""
        if self.shadow is not None and grad is not None:
            places = tuple(grad._indices())
            param.detach()[places] = self.shadow[places]
        else:
            torch.autograd.graph.increment_version(param)


def threads_of_torch() -> int | None:
    """How many threads torch may use, if that limits us.

    Whoever has limited torch's threads has meant ours too: DataLoader does so in its workers.
    """
    allowed = torch.get_num_threads()
    return allowed if allowed == 1 or (allowed < max_threads() and allowed < numba_threads()) else None


def _one_count(where: str, step: Any) -> int:
    """Check a single count, a number of any kind."""
    value: Any = step.item() if isinstance(step, (Tensor, np.generic)) else step
    is_number = isinstance(value, numbers.Real)
    if not (is_number and 0 <= value <= MAX_COUNT and int(value) == value):
        raise StateError(f"{where}: step is {value!r}, expected an integer >= 0 (and <= 2**62)")
    return int(value)


def _whole(where: str, counts: Any) -> Any:
    """Give counts as integers of 32 or 64 bits."""
    if counts.dtype in (np.int32, np.int64):
        return counts
    with np.errstate(invalid="ignore"):
        whole = counts.astype(np.int64) if counts.dtype.kind in "iuf" else None
    if whole is None or not (whole == counts).all():
        raise StateError(f"{where}: step is a tensor of {counts.dtype}, expected whole numbers")
    return whole
