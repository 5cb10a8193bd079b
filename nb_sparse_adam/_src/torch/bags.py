# SPDX-License-Identifier: Apache-2.0
"""Ids in bags: where each bag starts, and whether that can be.

On the CPU, and with ``device_checks="immediate"``, wrong offsets are refused before anything is read. With
"deferred" the host does not wait for the GPU: `marked` makes each wrong offset one that the step refuses,
wherever the lookup ends up among others, and `within` makes wrong offsets harmless for reading.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nb_sparse_adam.errors import GradientIndexError

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def are_offsets(ids: Tensor, offsets: Tensor | None) -> bool:
    """Whether ids come with offsets whose shape, type and place torch accepts: others it refuses by name."""
    return (
        isinstance(offsets, Tensor)
        and offsets.dim() == ids.dim() == 1
        and offsets.dtype in INTEGERS
        and offsets.device == ids.device
    )


def check_number(name: str, offsets: Tensor, n: int, include_last: bool) -> None:
    """Refuse offsets without a bag for the n ids; the host does not wait for a GPU."""
    if len(offsets) == include_last and n:
        raise GradientIndexError(f"{name}: offsets name no bag, expected one for the {n} ids")


def check_offsets(name: str, offsets: Tensor, n: int, include_last: bool) -> None:
    """Refuse offsets that leave out an id, or point past the last one.

    Parameters
    ----------
    name : str
        The layer's.
    offsets : (bags,) or, with ``include_last``, (bags + 1,) Tensor of integers
        If they are on a GPU, the host waits for it.
    n : int
        How many ids there are.
    include_last : bool
        Whether the last offset is where the last bag ends.
    """
    array = _array(offsets)
    if len(array) and not (
        array[0] == 0
        and (array[-1] == n if include_last else array[-1] <= n)
        and not (array[1:] < array[:-1]).any()
    ):
        raise _error(name, array, n, include_last)


def check_order(name: str, offsets: Tensor, n: int) -> None:
    """Refuse offsets that torch's lookup would follow out of the ids; the first and the last it checks."""
    array = _array(offsets)
    if (array[1:] < array[:-1]).any():  # no kernel: there is nothing else to compile for in evaluation
        raise _error(name, array, n, False)


def _array(offsets: Tensor) -> NDArray[np.int64]:
    return np.ascontiguousarray(offsets.cpu().numpy(), np.int64)


def _wrong(offsets: Any, n: int) -> Any:
    """For each offset, whether it cannot be where a bag of n ids starts."""
    wrong = offsets > n
    wrong[:1] |= offsets[:1] != 0
    wrong[1:] |= offsets[1:] < offsets[:-1]
    return wrong


def _error(name: str, offsets: NDArray[np.int64], n: int, include_last: bool) -> GradientIndexError:
    wrong = _wrong(offsets, n)
    wrong[-1] |= include_last and offsets[-1] != n
    place = int(np.flatnonzero(wrong)[0])
    if place == 0 and offsets[0] != 0:
        why = "expected 0"
    elif place and offsets[place] < offsets[place - 1]:
        why = (
            f"less than offsets[{place - 1}] = {offsets[place - 1]}; expected a sequence that never decreases"
        )
    elif include_last and place == len(offsets) - 1:
        why = f"expected the number of ids, {n}, as include_last_offset=True says"
    else:
        why = f"expected at most {n}, the number of ids"
    return GradientIndexError(f"{name}: offsets[{place}] is {offsets[place]}, {why}")


def marked(offsets: Tensor, n: int, include_last: bool) -> Tensor:
    """Replace each wrong offset by the smallest number: whatever is added to it, it stays wrong.

    The step does not see where the last bag ends. If that is wrong, the first offset is marked.
    """
    if offsets.dtype not in (torch.int32, torch.int64):
        offsets = offsets.long()
    wrong = _wrong(offsets, n)
    if include_last:
        wrong[:1] |= offsets[-1:] != n
    return offsets.masked_fill(wrong, torch.iinfo(offsets.dtype).min)


def within(offsets: Tensor, n: int) -> Tensor:
    """Turn any offsets into ones that stay within the n ids."""
    return offsets.clamp(0, n).cummax(0).values


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
    """Leave out the ids that are padding; `marked` starts stay marked."""
    kept = ids != padding
    if kept.all():
        return ids, starts, weights
    before = starts.new_zeros(len(ids) + 1)
    torch.cumsum(kept, 0, out=before[1:])
    moved = before[starts.clamp(min=0)].where(starts >= 0, starts)
    return ids[kept], moved, None if weights is None else weights[kept]
