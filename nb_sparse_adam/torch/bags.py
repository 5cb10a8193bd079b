"""Ids in bags: where each bag starts."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bags_of", "starts_of", "without"]


def starts_of(ids: Tensor, offsets: Tensor | None, include_last: bool) -> tuple[Tensor, Tensor]:
    """Ids in one dimension, and where each bag starts."""
    if offsets is None:
        bags, length = ids.shape
        return ids.reshape(-1), torch.arange(0, bags * length, length, dtype=ids.dtype, device=ids.device)
    return ids, offsets[:-1] if include_last else offsets


def bags_of(ids: Tensor, starts: Tensor) -> Tensor:
    """For each id, which bag it is in; bags may be empty."""
    places = torch.arange(len(ids), dtype=starts.dtype, device=ids.device)
    bags = torch.searchsorted(starts.contiguous(), places, right=True) - 1
    return bags.to(torch.promote_types(ids.dtype, starts.dtype))


def without(
    padding: int, ids: Tensor, starts: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Leave out the ids that only fill up."""
    kept = ids != padding
    if kept.all():
        return ids, starts, weights
    before = starts.new_zeros(len(ids) + 1)
    torch.cumsum(kept, 0, out=before[1:])
    return ids[kept], before[starts], None if weights is None else weights[kept]
