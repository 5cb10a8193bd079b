# SPDX-License-Identifier: Apache-2.0
"""Lookups as autograd sees them: backward hands ids and output gradient to `backward`, and forms nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nb_sparse_adam._src.torch import bags
from nb_sparse_adam._src.torch.backward import check_pass, collect, this_pass
from nb_sparse_adam._src.torch.layer import Layer
from nb_sparse_adam._src.torch.lookups import Lookup
from nb_sparse_adam.errors import GradientError


class Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, layer: Layer, ids: Tensor) -> Tensor:
        ctx.layer, ctx.weight, ctx.seen_in = layer, weight, this_pass()
        ctx.save_for_backward(ids)
        return layer.look_up(weight, ids)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        check_pass(ctx.seen_in)
        if _is_wanted(ctx):
            (ids,) = ctx.saved_tensors
            layer = ctx.layer
            ids = ids.reshape(-1)
            grads = layer.unscaled(grad_output).reshape(len(ids), layer.embedding_dim)
            if layer.padding_idx is not None:
                kept = ids != layer.padding_idx
                if not kept.all():
                    ids, grads = ids[kept], grads[kept]
            collect(layer, Lookup(ctx.weight, ids, grads))
        return None, None, None


class Bags(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        per_sample_weights: Tensor | None,
        layer: Any,
        ids: Tensor,
        offsets: Tensor | None,
    ) -> Tensor:
        ctx.layer, ctx.seen_in = layer, this_pass()
        ctx.weight, ctx.version = weight, weight._version
        read = offsets
        if offsets is not None and bags.are_offsets(ids, offsets):
            offsets, read = layer.checked(ids, offsets)
        ctx.save_for_backward(ids, offsets, per_sample_weights)
        out: Tensor = layer.pool(weight, ids, read, per_sample_weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        check_pass(ctx.seen_in)
        ids, offsets, weights = ctx.saved_tensors
        layer = ctx.layer
        ids, starts = bags.starts_of(ids, offsets, layer.include_last_offset)
        weights_grad = None
        if weights is not None and ctx.needs_input_grad[1]:
            weights_grad = layer.grad_of_weights(ctx, grad_output, ids, starts, weights)
        if _is_wanted(ctx):
            weights = None if weights is None else weights.detach().resolve_neg().reshape(-1).clone()
            grads = layer.unscaled(grad_output)
            if layer.padding_idx is not None:
                ids, starts, weights = bags.without(layer.padding_idx, ids, starts, weights)
            collect(layer, Lookup(ctx.weight, ids, grads, starts, weights, layer.mode))
        return None, weights_grad, None, None, None


def _is_wanted(ctx: Any) -> bool:
    """Whether the pass that is going on wants a gradient of the table, or only of other things."""
    accumulate_grad = ctx.next_functions[0][0]  # the table is the first argument
    try:
        return bool(torch._C._will_engine_execute_node(accumulate_grad))
    except RuntimeError as error:  # torch.autograd.grad(..., [weight])
        raise GradientError(
            "the gradient of a fused embedding's weight was asked for, and is never made. Use "
            "torch.nn.EmbeddingBag(sparse=True)"
        ) from error
