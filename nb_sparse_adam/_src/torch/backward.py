# SPDX-License-Identifier: Apache-2.0
"""From the backward pass of a lookup to a step: a pass collects its lookups, and applies them at its end.

All lookups of one pass make one step, as with ``loss.backward(); optimizer.step()``: a table that was looked
up twice gets one step with the sum, no table is changed while the pass still needs it, and all tables are
updated or none.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from contextlib import ContextDecorator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from nb_sparse_adam._src.table.updates import Updates
from nb_sparse_adam._src.torch import deferred, pushes, sharing
from nb_sparse_adam._src.torch.lookups import Lookup, gradient_of
from nb_sparse_adam._src.torch.steps import in_turn, step_jobs
from nb_sparse_adam.errors import GradientError

if TYPE_CHECKING:
    from nb_sparse_adam._src.torch.layer import Layer


Found: TypeAlias = "dict[Layer, list[Lookup]]"  # the lookups of each layer


class _Pass:
    """One backward pass: the lookups that it has met, by layer.

    Its callback alone holds it. Should the pass fail, torch lets go of the callback, and all is forgotten.
    """

    def __init__(self) -> None:
        self.lookups: Found = {}

    def __call__(self) -> None:
        now: Found = {}
        later: dict[int, tuple[Accumulating, Found]] = {}
        for layer, lookups in self.lookups.items():
            block = _open_block(layer)
            if block is None:
                now[layer] = lookups
            else:
                later.setdefault(id(block), (block, {}))[1][layer] = lookups
        self.lookups = {}
        _step(now)  # if it is refused, the pass has failed, and is no part of a block
        for block, found in later.values():
            block.passes.append(found)


_passes: dict[int, weakref.ref[_Pass]] = {}


def _pass_of(number: int) -> _Pass:
    """Find what a backward pass has met so far; the first time it is made, and queued for the pass's end.

    A pass through several devices has a thread for each: `dict.setdefault` lets one of them be the first.
    """
    known = _passes.get(number)
    current = None if known is None else known()
    if current is None:
        for old, reference in list(_passes.items()):  # not by callbacks, which would swallow an interrupt
            if reference() is None:
                _passes.pop(old, None)
        made = _Pass()
        current = _passes.setdefault(number, weakref.ref(made))()
        assert current is not None
        if current is made:
            torch.autograd.Variable._execution_engine.queue_callback(made)
    return current


def this_pass() -> int:
    """Number of the backward pass that is going on in this thread; -1 if there is none."""
    return int(torch._C._current_graph_task_id())


def check_pass(seen_in: int) -> None:
    """Refuse what cannot be right, before anything is collected.

    Parameters
    ----------
    seen_in : int
        `this_pass` at the time of the lookup.
    """
    if torch.compiler.is_compiling():
        _refuse_compiled()
    if torch.is_grad_enabled():
        raise GradientError(
            "backward through a fused embedding with create_graph=True: the table is updated in the backward "
            "pass, which cannot be differentiated again. Use torch.nn.EmbeddingBag(sparse=True) with "
            "nb_sparse_adam.torch.SparseAdam for double backward"
        )
    if seen_in not in (-1, this_pass()):
        raise GradientError(
            "a fused embedding was looked up within another backward pass, as torch.utils.checkpoint with "
            "use_reentrant=True does it, or a hook: the table would be updated before that pass is over. "
            "Pass use_reentrant=False, or look up outside of hooks"
        )


@torch._disable_dynamo  # type: ignore[attr-defined]
def _refuse_compiled() -> None:
    raise GradientError(
        "backward through a fused embedding with compiled autograd: the table is updated at the end of the "
        "pass, by Python. Call backward without it (torch._dynamo.config.compiled_autograd = False), or use "
        "torch.nn.EmbeddingBag(sparse=True) with nb_sparse_adam.torch.SparseAdam"
    )


def collect(layer: Layer, lookup: Lookup) -> None:
    """Keep a lookup until the end of the backward pass that is going on."""
    current = _pass_of(this_pass())
    if _open_block(layer) is not None:
        lookup = lookup.copied()  # buffers of ids are used again, and outputs' gradients added to
    if lookup.weight.device.type == "cuda":
        lookup = lookup._replace(stream=torch.cuda.current_stream(lookup.weight.device))
    current.lookups.setdefault(layer, []).append(lookup)


def _open_block(layer: Layer) -> Accumulating | None:
    """The block that a layer's lookups wait for the end of."""
    block = None if layer.accumulated is None else layer.accumulated()
    return block if block is not None and block.is_open else None


def is_pending(layer: Layer) -> bool:
    """Whether lookups of a layer have been met by a backward pass, and wait for a step."""
    passes = [reference() for reference in list(_passes.values())]
    return _open_block(layer) is not None or any(each and layer in each.lookups for each in passes)


class Accumulating(ContextDecorator):
    """Lets the backward passes of the body be one step, at its end; none if it raises.

    It alone holds what they have met, layers only refer to it: whatever interrupts its beginning or its end,
    no layer waits for a block that is gone.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers, self.is_open = layers, False
        self.passes: list[Found] = []

    def _recreate_cm(self) -> Accumulating:
        return Accumulating(self._layers)  # one for each call of a function that is decorated

    def __enter__(self) -> None:
        if any(_open_block(layer) is not None for layer in self._layers):
            raise RuntimeError("accumulate: already accumulating for a layer of this module")
        self.is_open, self.passes = True, []
        for layer in self._layers:
            layer.accumulated = weakref.ref(self)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.is_open = False
        passes, self.passes = self.passes, []
        if kind is None:
            lookups: Found = {}
            for found in passes:
                for layer, met in found.items():
                    lookups.setdefault(layer, []).extend(met)
            _step(lookups)


def _step(lookups: Found) -> None:
    for layer, found in lookups.items():
        _refuse_other_weights(layer, found)
    for lookup in itertools.chain(*lookups.values()):
        _wait_for(lookup)
    if not lookups or _scaler_will_skip(lookups):
        return
    of_weights: dict[Any, list[Lookup]] = {}
    of_tables: dict[Updates, list[Lookup]] = {}  # of layers that share one: its gradients are summed
    of_servers: dict[Any, list[Lookup]] = {}
    for layer, found in lookups.items():
        if layer._client is not None:
            layer.before_step()
            of_servers[layer] = found
        elif layer._table is None:
            of_weights[layer] = found
        else:
            layer.before_step()
            of_tables.setdefault(layer._table, []).extend(found)
    later = pushes.push(of_servers)  # before the steps here: more can go wrong, and they wait for nothing
    if of_weights or of_tables:
        in_turn((layer.optimizer for layer in of_weights), lambda: _step_in_turn(of_weights, of_tables))
    pushes.begin(later)  # after them: if they are refused, there is none


def _step_in_turn(of_weights: dict[Any, list[Lookup]], of_tables: dict[Updates, list[Lookup]]) -> None:
    deferred.raise_what_is_known(each for layer in of_weights for each in layer.optimizer.param_states)
    jobs = [layer.job(gradient_of(found)) for layer, found in of_weights.items()]
    sharing.refuse(list(of_weights), [job.param_state for job in jobs])
    step_jobs(jobs, {table: gradient_of(found) for table, found in of_tables.items()})


def _refuse_other_weights(layer: Layer, found: list[Lookup]) -> None:
    weight = layer.weight
    for lookup in found:
        if lookup.weight is not weight:
            name = type(layer).__name__
            raise GradientError(
                f"{name}.weight is not the Parameter that was looked up, which was exchanged since (by hand, "
                "or by torch.func.functional_call): the layer's optimizer is that of its own weight. Call "
                f"backward before, or use {layer.instead}(sparse=True)"
            )


def _wait_for(lookup: Lookup) -> None:
    """Make the stream of the step wait for the one on which a lookup was collected.

    Autograd runs a node on the stream of its forward pass. What was queued for the end of the pass it runs
    on the streams that are current where `backward` was called, when it has made these wait for the leaves'
    streams. So the current stream is the right one: the step comes before whatever the caller does next.
    But the leaf of our node is the table, which is given no gradient: where lookups were made on several
    streams, nothing makes the leaf's wait for the node's. And `accumulate` ends on a stream of its own.
    """
    if lookup.stream is None:
        return
    current = torch.cuda.current_stream(lookup.weight.device)
    if lookup.stream != current:
        current.wait_stream(lookup.stream)
        for tensor in lookup[1:]:
            if isinstance(tensor, Tensor):
                tensor.record_stream(current)  # its memory is not used again before the step is over


def _scaler_will_skip(lookups: Found) -> bool:
    """Whether a GradScaler has scaled too much: it leaves out the step of the dense part, and so do we."""
    return any(
        hasattr(layer.grad_scaler, "get_scale")
        and layer.grad_scaler.is_enabled()
        and not all(each.grad_output.isfinite().all() for each in found)
        for layer, found in lookups.items()
    )
