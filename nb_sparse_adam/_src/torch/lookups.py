# SPDX-License-Identifier: Apache-2.0
"""Lookups that a backward pass has met, and what gradient of the table they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nb_sparse_adam._src.annotations import BagMode
from nb_sparse_adam._src.gradients import BagGradient, RowGradient
from nb_sparse_adam._src.torch import bags
from nb_sparse_adam._src.torch.tensors import Gpu, array_of


class Lookup(NamedTuple):
    """Ids that were looked up, one by one or, with ``starts``, pooled."""

    weight: Tensor  # the table, or what stands for it
    ids: Tensor  # (n,)
    grad_output: Tensor  # (n, dim) or (bags, dim)
    starts: Tensor | None = None  # (bags,)
    weights: Tensor | None = None  # (n,), a copy: it may be trained, and change before the pass ends
    mode: BagMode = "sum"
    stream: Any = None  # of a GPU, on which all of this is ready

    def copied(self) -> Lookup:
        """Return one that nobody else can change."""
        starts = None if self.starts is None else self.starts.clone()
        return self._replace(ids=self.ids.clone(), grad_output=self.grad_output.clone(), starts=starts)


def gradient_of(lookups: list[Lookup]) -> RowGradient | BagGradient:
    """Make the lookups in one table one gradient; a single one is not copied."""
    if len({(lookup.starts is None, lookup.mode) for lookup in lookups}) > 1:
        lookups = [_as_sums(lookup) for lookup in lookups]
    first = lookups[0]
    on_gpu = Gpu.has(first.weight)

    def joined(parts: list[Tensor]) -> Any:
        return array_of(parts[0] if len(parts) == 1 else torch.cat(parts), on_gpu)

    ids = joined([lookup.ids for lookup in lookups])
    grad_output = joined([lookup.grad_output for lookup in lookups])
    if first.starts is None:
        return RowGradient(ids, grad_output)
    before, starts = 0, []
    for lookup in lookups:
        assert lookup.starts is not None
        starts.append(lookup.starts + before if before else lookup.starts)
        before += len(lookup.ids)
    weights = None
    if any(lookup.weights is not None for lookup in lookups):
        weights = joined(
            [
                lookup.grad_output.new_ones(len(lookup.ids)) if lookup.weights is None else lookup.weights
                for lookup in lookups
            ]
        )
    return BagGradient(ids, joined(starts), grad_output, weights, first.mode)


def _as_sums(lookup: Lookup) -> Lookup:
    """Give lookups of different layers, which share a table, one form: that of weighted sums."""
    if lookup.starts is None:
        return lookup._replace(starts=torch.arange(len(lookup.ids)))
    if lookup.mode == "sum":
        return lookup
    in_bag = bags.bags_of(lookup.ids, lookup.starts)
    lengths = torch.bincount(in_bag, minlength=len(lookup.starts))
    return lookup._replace(weights=(1 / lengths.to(lookup.grad_output.dtype))[in_bag], mode="sum")


def rows_of(lookups: list[Lookup], copy: bool) -> tuple[Tensor, Tensor]:
    """Make of lookups in one table ids, and a gradient for each of them; nobody else can change a copy."""
    parts = [_as_rows(lookup) for lookup in lookups]
    if len(parts) == 1 and not copy:
        return parts[0]
    return torch.cat([ids for ids, _ in parts]), torch.cat([grads for _, grads in parts])


def _as_rows(lookup: Lookup) -> tuple[Tensor, Tensor]:
    if lookup.starts is None:
        return lookup.ids, lookup.grad_output
    lookup = _as_sums(lookup)
    assert lookup.starts is not None
    grads = lookup.grad_output[bags.bags_of(lookup.ids, lookup.starts)]
    if lookup.weights is not None:
        grads *= lookup.weights.to(grads.dtype).unsqueeze(1)
    return lookup.ids, grads
