# SPDX-License-Identifier: Apache-2.0
"""What layers have in common that pool bags of ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from nb_sparse_adam._src.annotations import BagMode
from nb_sparse_adam._src.options import BAG_MODES
from nb_sparse_adam._src.torch import bags
from nb_sparse_adam._src.torch.by_ids import ByIds
from nb_sparse_adam._src.torch.functions import Bags, Rows
from nb_sparse_adam.errors import GradientError, GradientTypeError, OptionError, TableError


class BagsByIds(ByIds):
    """A layer that is asked for bags of ids, whichever there are."""

    mode: BagMode
    include_last_offset: bool

    def _set_bags(self, mode: BagMode, include_last_offset: bool) -> None:
        if mode not in BAG_MODES:
            raise OptionError(f"{type(self).__name__}: mode is {mode!r}, expected one of {BAG_MODES}")
        self.mode, self.include_last_offset = mode, include_last_offset

    if TYPE_CHECKING:

        def __call__(
            self,
            input: Tensor,  # noqa: A002 (torch's name)
            offsets: Tensor | None = None,
            per_sample_weights: Tensor | None = None,
        ) -> Tensor: ...

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def forward(
        self,
        input: Tensor,  # noqa: A002
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Look up bags of ids, and pool each.

        Parameters
        ----------
        input : integer Tensor, (n,) with `offsets`, or (bags, length)
            The ids.
        offsets : integer Tensor, (bags,), or (bags + 1,) with ``include_last_offset=True``
            Where each bag begins in a one-dimensional `input`.
        per_sample_weights : Tensor, of the shape of `input`, optional
            One weight an id, with ``mode="sum"``.

        Returns
        -------
        Tensor
            (bags, dim).

        Raises
        ------
        GradientError
            If offsets or weights do not fit the ids (also a ValueError).
        TableError
            If more ids are new than there is room for.
        """
        name, ids = type(self).__name__, self.ids_of(input)
        check_offsets_given(name, ids, offsets)
        if offsets is not None:
            bags.check_number(name, offsets, len(ids), self.include_last_offset)
            bags.check_offsets(name, offsets, len(ids), self.include_last_offset)
        self._check_weights(ids, per_sample_weights)
        trains = self._is_training()
        if per_sample_weights is not None and per_sample_weights.requires_grad and torch.is_grad_enabled():
            return self._pool_by_torch(ids, offsets, per_sample_weights, trains)
        if trains:
            return self._train(Bags, per_sample_weights, self, ids, offsets)
        return self._pooled(ids, offsets, per_sample_weights, train=False)

    def _check_weights(self, ids: Tensor, weights: Tensor | None) -> None:
        if weights is None:
            return
        if self.mode != "sum":
            raise GradientError(
                f"{type(self).__name__}: got per_sample_weights with mode={self.mode!r}, expected mode='sum'"
            )
        if weights.shape != ids.shape or not weights.is_floating_point() or weights.device.type != "cpu":
            raise GradientError(
                f"{type(self).__name__}: per_sample_weights are of shape {tuple(weights.shape)}, "
                f"{weights.dtype}, on {weights.device}, expected {tuple(ids.shape)} as input has, of "
                "floating-point numbers on the CPU"
            )

    def checked(self, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Give offsets as the step is to see them, and to read with: they have been checked."""
        return offsets, offsets

    def pool(self, weight: Tensor, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:  # noqa: ARG002
        """Look up in training."""
        return self._pooled(ids, offsets, weights, train=True)

    def _pooled(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, train: bool) -> Tensor:
        """Look up, and pool."""
        raise NotImplementedError

    def _pool_by_torch(self, ids: Tensor, offsets: Tensor | None, weights: Tensor, trains: bool) -> Tensor:
        """Pool vectors by torch, whose backward pass then has them for the gradient of the weights."""
        flat, starts = bags.starts_of(ids, offsets, self.include_last_offset)
        vectors = self._train(Rows, self, flat) if trains else self._vectors(flat, train=False)
        return functional.embedding_bag(
            torch.arange(len(flat)), vectors, starts, mode="sum",
            per_sample_weights=weights.reshape(-1).to(vectors.dtype),
        )  # fmt: skip


def check_offsets_given(name: str, ids: Tensor, offsets: Any) -> None:
    """Refuse ids and offsets whose shapes or types do not go together."""
    if ids.dim() == 2:
        if offsets is not None:
            raise GradientError(
                f"{name}: got offsets with an input of shape {tuple(ids.shape)}, expected none: each row of "
                "a two-dimensional input is a bag"
            )
        return
    if ids.dim() != 1:
        raise GradientError(
            f"{name}: input has shape {tuple(ids.shape)}, expected (n,) with offsets, or (bags, length)"
        )
    if not isinstance(offsets, Tensor) or offsets.dim() != 1 or offsets.dtype not in bags.INTEGERS:
        got = (
            f"of shape {tuple(offsets.shape)} and {offsets.dtype}"
            if isinstance(offsets, Tensor)
            else f"a {type(offsets).__name__}"
        )
        raise GradientTypeError(
            f"{name}: offsets are {got}, expected a Tensor of integers, (bags,), with an input of shape (n,)"
        )
    if offsets.device.type != "cpu":
        raise TableError(f"{name}: offsets are on device {offsets.device}, expected the CPU: offsets.cpu()")
