# SPDX-License-Identifier: Apache-2.0
"""`DynamicEmbedding` and `DynamicEmbeddingBag`: fused embeddings of ids that nobody knew before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nb_sparse_adam._src.annotations import BagMode
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam._src.torch import bags
from nb_sparse_adam._src.torch.bags_by_ids import BagsByIds
from nb_sparse_adam._src.torch.dynamic import Dynamic, made_table
from nb_sparse_adam._src.torch.functions import Rows


@public("nb_sparse_adam.torch")
class DynamicEmbedding(Dynamic):
    """An embedding of ids, whichever there are: an `EmbeddingTable` that the backward pass updates.

    Parameters
    ----------
    dim : int
        Numbers of a row.
    **options
        Those of `nb_sparse_adam.EmbeddingTable`: initializer, lr, admission, eviction, ...

    Attributes
    ----------
    table : EmbeddingTable
        The rows. Its methods may be called between passes.
    lr : float
        Learning rate, that of the table, settable.
    optimizer : torch.optim.Optimizer
        The options of the table as its one group, for schedulers. Its ``step`` does nothing.
    grad_scaler : torch.amp.GradScaler or float, optional
        What the loss is scaled with. Gradients are divided by it before they are applied.
    weight : Parameter, (0, dim)
        Stands for the table where torch asks for parameters; it has no numbers.
        ``weight.requires_grad_(False)`` keeps the table as it is, as does ``module.requires_grad_(False)``.

    Notes
    -----
    A lookup in training is ``table.lookup(ids)``: ids are counted as seen, and unknown ones get rows, as
    `admission` says. In evaluation mode (`eval`), under ``torch.no_grad`` and with
    ``weight.requires_grad_(False)`` it is ``table.lookup(ids, train=False)``: nothing is changed, and unknown
    ids give what `unknown` says.

    Steps are taken as those of `Embedding`: one at the end of a backward pass, or of `accumulate`, for all
    fused layers in it, or, if one gradient is refused, none. Layers that share a table get one step with the
    sum. What an id gets that has no row by then, because it was not admitted or has been evicted, is left
    out, or refused: see the table's `missing`.

    The module's state dict holds the table, with moments, counts and options, as one tensor of bytes,
    "_extra_state"; it takes the place of all rows when it is loaded, or is refused. A state dict takes
    several times the memory of the rows while it is made or loaded.

    The table is in the memory of the host: `to` another device, `double`, `half` and `share_memory` are
    refused, also as part of a model. Ids are taken from the CPU, and vectors given there.
    """

    def __init__(self, dim: int, **options: Any) -> None:
        torch.nn.Module.__init__(self)
        self._set_up(made_table("DynamicEmbedding", dim, options))

    @classmethod
    def from_table(cls, table: EmbeddingTable) -> DynamicEmbedding:
        """Make a layer of a table, which is not copied; other layers may have it, too.

        Parameters
        ----------
        table : EmbeddingTable
        """
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer._set_up(table)
        return layer

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...  # noqa: A002 (torch's name)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Look up ids.

        Parameters
        ----------
        input : integer Tensor of any shape
            Ids, any of the 2⁶⁴.

        Returns
        -------
        Tensor
            The rows, of the shape of `input` and (dim,) after it.

        Raises
        ------
        TableError
            If more ids are new than there is room for.
        """
        ids = self.ids_of(input)
        if self._is_training():
            return self._train(Rows, self, ids)
        return self._vectors(ids, train=False)


@public("nb_sparse_adam.torch")
class DynamicEmbeddingBag(Dynamic, BagsByIds):
    """Bags of ids, whichever there are, pooled: an `EmbeddingTable` that the backward pass updates.

    Parameters
    ----------
    dim : int
        Numbers of a row.
    mode : {"mean", "sum"}, default "mean"
        What is made of the vectors of a bag; one without ids gives zeros.
    include_last_offset : bool, default False
        Whether offsets end with the number of ids, as ``torch.nn.EmbeddingBag`` has it.
    **options
        Those of `nb_sparse_adam.EmbeddingTable`.

    Attributes
    ----------
    table, lr, optimizer, grad_scaler, weight
        As of `DynamicEmbedding`.

    Notes
    -----
    As for `DynamicEmbedding`. ``per_sample_weights`` get their gradient, from the vectors that were looked
    up: these are kept for it, a row for each id.

    Examples
    --------
    >>> layer = DynamicEmbeddingBag(8, mode="sum", lr=0.01)
    >>> layer(torch.tensor([[2**40, 17], [4, 2**40]])).sum().backward()
    >>> layer.table.ids()
    array([1099511627776,            17,             4])
    >>> layer.table.state([4, 2**40]).steps
    array([1, 1], dtype=int32)
    """

    def __init__(
        self, dim: int, *, mode: BagMode = "mean", include_last_offset: bool = False, **options: Any
    ) -> None:
        torch.nn.Module.__init__(self)
        self._set_bags(mode, include_last_offset)
        self._set_up(made_table("DynamicEmbeddingBag", dim, options))

    @classmethod
    def from_table(
        cls, table: EmbeddingTable, *, mode: BagMode = "mean", include_last_offset: bool = False
    ) -> DynamicEmbeddingBag:
        """Make a layer of a table, which is not copied; other layers may have it, too.

        Parameters
        ----------
        table : EmbeddingTable
        mode, include_last_offset
            As of the class.
        """
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer._set_bags(mode, include_last_offset)
        layer._set_up(table)
        return layer

    def _pooled(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, train: bool) -> Tensor:
        flat, starts = bags.starts_of(ids, offsets, self.include_last_offset)
        self._use_threads()
        factors = None if weights is None else weights.detach().reshape(-1).to(self.weight.dtype).numpy()
        pooled = self._table.lookup_bags(
            flat.numpy(), starts.numpy(), factors, self.mode, train=train, include_last_offset=False
        )
        return torch.from_numpy(pooled)
