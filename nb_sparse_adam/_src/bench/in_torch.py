# SPDX-License-Identifier: Apache-2.0
"""Our engine inside torch: what `peers` has of torch, with `nb_sparse_adam.torch` in its place."""

from __future__ import annotations

from typing import Any

from nb_sparse_adam._src.bench.contenders import HYPER
from nb_sparse_adam._src.bench.peers import TorchBag, TorchRows


class DropInRows(TorchRows):
    """`nb_sparse_adam.torch.SparseAdam` on rows, with its defaults."""

    @staticmethod
    def _make_optimizer(parameters: Any) -> Any:
        from nb_sparse_adam.torch import SparseAdam

        return SparseAdam(parameters, **HYPER)


class FusedBag(TorchBag):
    """`nb_sparse_adam.torch.EmbeddingBag`, with its defaults: the backward pass updates the table."""

    def _make_layer(self, *args: Any, **options: Any) -> None:
        from nb_sparse_adam.torch import EmbeddingBag

        self._layer = EmbeddingBag(*args, **options, optimizer=HYPER)
        self._optimizer = self._layer.optimizer

    def step(self) -> None:
        """Go back through the lookup, which updates the table."""
        self._output.backward(self._grad_output)
