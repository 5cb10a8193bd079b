# SPDX-License-Identifier: Apache-2.0
"""`Embedding` and `EmbeddingBag`: their backward pass updates the table, and forms no gradient of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from nb_sparse_adam._src.annotations import BagMode
from nb_sparse_adam._src.options import BAG_MODES
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.torch import bags
from nb_sparse_adam._src.torch.backward import Accumulating
from nb_sparse_adam._src.torch.functions import Bags, Rows
from nb_sparse_adam._src.torch.fused import Fused
from nb_sparse_adam._src.torch.layer import Layer
from nb_sparse_adam._src.torch.tensors import Gpu
from nb_sparse_adam.errors import OptionError, TableError


@public("nb_sparse_adam.torch")
class Embedding(Fused, torch.nn.Embedding):
    """``torch.nn.Embedding`` whose backward pass updates the table; ``weight.grad`` stays None.

    Parameters
    ----------
    num_embeddings, embedding_dim, padding_idx, sparse, device, dtype
        As of ``torch.nn.Embedding``. ``sparse`` makes no difference: there is no gradient of the table.
    max_norm, norm_type, scale_grad_by_freq
        Refused.
    optimizer : dict, optional
        Options of `SparseAdam`: lr, betas, eps, maximize, step_counts, eps_hat, on_nonfinite, device_checks;
        its defaults.

    Attributes
    ----------
    optimizer : SparseAdam
        The optimizer of this table, for its ``state`` and for schedulers. Do not call its ``step``.
    lr : float
        Learning rate, settable.
    grad_scaler : torch.amp.GradScaler or float, optional
        What the loss is scaled with. Gradients are divided by it before they are applied.

    Notes
    -----
    All lookups of one backward pass make one step, applied at its end; a backward pass that raises changes
    no table. For several backward passes in one step see `accumulate`. Nothing is updated by lookups under
    ``torch.no_grad``, in evaluation mode (`eval`), or with ``weight.requires_grad_(False)``.

    The module's state dict holds, beside "weight", the state and options of the optimizer as one tensor of
    bytes, "_extra_state". It is loaded before the weight, or refused with it. Weights of torch's own layer
    load without one, and the optimizer goes on as it is; into torch's layer go the keys that do not end in
    "_extra_state" (or all, with ``strict=False``). Averages of weights are to leave it alone, as they do with
    all that is not floating.

    The layer may be on the CPU or a GPU, and be moved (`to`). A step on a GPU is launched on the stream that
    is current where ``backward`` is called. With ``padding_idx`` or `grad_scaler` the host waits for the GPU.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        optimizer: Mapping[str, Any] | None = None,
    ) -> None:
        _refuse("Embedding", max_norm, scale_grad_by_freq)
        torch.nn.Embedding.__init__(
            self, num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            _weight, _freeze, device, dtype,
        )  # fmt: skip
        self._set_up(optimizer)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        optimizer: Mapping[str, Any] | None = None,
    ) -> Embedding:
        """Make a layer of a table, which is not copied.

        Parameters
        ----------
        embeddings : Tensor, (rows, dim)
            Becomes the layer's weight.
        freeze : bool, default True
            Whether the table stays as it is; False to train it.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, optimizer
            As of the class.
        """
        rows, dim = _shape_of(embeddings)
        return cls(
            rows, dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, embeddings, freeze,
            optimizer=optimizer,
        )  # fmt: skip

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...  # noqa: A002 (torch's name)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Look up ids.

        Parameters
        ----------
        input : integer Tensor of any shape

        Returns
        -------
        Tensor
            The rows, of the shape of `input` and (dim,) after it.
        """
        if self._is_training():
            return self._train(Rows, self, input)
        return self.look_up(self.weight.detach(), input)

    def look_up(self, weight: Tensor, ids: Tensor) -> Tensor:
        """Look up in a tensor of the table's shape, with the options of this layer."""
        return functional.embedding(ids, weight, self.padding_idx)


@public("nb_sparse_adam.torch")
class EmbeddingBag(Fused, torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` whose backward pass updates the table; ``weight.grad`` stays None.

    Parameters
    ----------
    num_embeddings, embedding_dim, mode, sparse, include_last_offset, padding_idx, device, dtype
        As of ``torch.nn.EmbeddingBag``. ``sparse`` makes no difference: there is no gradient of the table.
    max_norm, norm_type, scale_grad_by_freq
        Refused, as is ``mode="max"``.
    optimizer : dict, optional
        Options of `SparseAdam`: lr, betas, eps, maximize, step_counts, eps_hat, on_nonfinite, device_checks;
        its defaults.

    Attributes
    ----------
    optimizer, lr, grad_scaler
        As of `Embedding`.

    Notes
    -----
    As for `Embedding`. ``per_sample_weights`` get their gradient, from the table as it was in the forward
    pass: if it has changed since, backward raises.

    Examples
    --------
    >>> layer = EmbeddingBag(1000, 8, mode="sum", optimizer=dict(lr=0.01, step_counts="row"))
    >>> layer(torch.tensor([[3, 17], [4, 3]])).sum().backward()
    >>> layer.optimizer.state[layer.weight]["step"][[3, 4, 5]]
    tensor([1, 1, 0], dtype=torch.int32)
    """

    mode: BagMode

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: BagMode = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        optimizer: Mapping[str, Any] | None = None,
    ) -> None:
        _refuse("EmbeddingBag", max_norm, scale_grad_by_freq)
        if mode not in BAG_MODES:
            raise OptionError(f"EmbeddingBag: mode is {mode!r}, expected one of {BAG_MODES}")
        torch.nn.EmbeddingBag.__init__(
            self, num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse,
            _weight, include_last_offset, padding_idx, device, dtype,
        )  # fmt: skip
        self._set_up(optimizer)

    @classmethod
    def from_pretrained(  # type: ignore[override] # two of torch's modes
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: BagMode = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        optimizer: Mapping[str, Any] | None = None,
    ) -> EmbeddingBag:
        """Make a layer of a table, which is not copied.

        Parameters
        ----------
        embeddings : Tensor, (rows, dim)
            Becomes the layer's weight.
        freeze : bool, default True
            Whether the table stays as it is; False to train it.
        max_norm, norm_type, scale_grad_by_freq, mode, sparse, include_last_offset, padding_idx, optimizer
            As of the class.
        """
        rows, dim = _shape_of(embeddings)
        layer = cls(
            rows, dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse, embeddings, include_last_offset,
            padding_idx, optimizer=optimizer,
        )  # fmt: skip
        layer.weight.requires_grad_(not freeze)
        return layer

    if TYPE_CHECKING:

        def __call__(
            self,
            input: Tensor,  # noqa: A002 (torch's name)
            offsets: Tensor | None = None,
            per_sample_weights: Tensor | None = None,
        ) -> Tensor: ...

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
            If offsets are malformed (also a ValueError).
        """
        if self._is_training():
            return self._train(Bags, per_sample_weights, self, input, offsets)
        if _is_there(offsets) and bags.are_offsets(input, offsets):
            bags.check_order("EmbeddingBag", offsets, len(input))
        return self.pool(self.weight.detach(), input, offsets, per_sample_weights)

    def checked(self, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Give offsets as the step is to see them, and such as can be read with, or refuse them."""
        n, last, checks = len(ids), self.include_last_offset, self.optimizer.device_checks
        bags.check_number("EmbeddingBag", offsets, n, last)
        if checks == "immediate" or not Gpu.has(self.weight):
            bags.check_offsets("EmbeddingBag", offsets, n, last)
        elif checks == "deferred":
            offsets = bags.marked(offsets, n, last)
            return offsets, bags.within(offsets, n)
        return offsets, offsets

    def pool(
        self, weight: Tensor, ids: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
    ) -> Tensor:
        """Look up in a tensor of the table's shape, with the options of this layer."""
        return functional.embedding_bag(
            ids, weight, offsets, mode=self.mode, per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset, padding_idx=self.padding_idx,
        )  # fmt: skip

    def grad_of_weights(
        self, ctx: Any, grad_output: Tensor, ids: Tensor, starts: Tensor, weights: Tensor
    ) -> Tensor:
        """Return the gradient of `per_sample_weights`, from the table as it was in the forward pass."""
        if ctx.weight._version != ctx.version:
            raise RuntimeError(
                "backward of EmbeddingBag: its table has been changed in place since the forward pass "
                f"(version {ctx.weight._version}, expected {ctx.version}), by a step or by hand: the "
                "gradient of per_sample_weights needs it as it was. Call backward before the table "
                "changes, or pass per_sample_weights.detach()"
            )
        padding = -1 if self.padding_idx is None else self.padding_idx
        # On the CPU torch finds the ids' bags itself, on a GPU it reads whatever it is given.
        if Gpu.has(ctx.weight):
            bag_of = bags.bags_of(ids, bags.within(starts, len(ids)))
        else:
            bag_of = starts.new_empty(0)
        weights_grad: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_output, ctx.weight.detach(), ids, starts, bag_of, 0, padding
        ).reshape(weights.shape)
        return weights_grad


@public("nb_sparse_adam.torch")
def accumulate(module: torch.nn.Module) -> AbstractContextManager[None]:
    """Make all backward passes inside a ``with`` block one step, applied at its end.

    Parameters
    ----------
    module : torch.nn.Module
        Whose fused layers wait. Their outputs' gradients are kept until then; if the block raises, they are
        dropped, and no table has been changed.

    Raises
    ------
    RuntimeError
        If a layer of the module is waiting already.

    Examples
    --------
    >>> model = torch.nn.Sequential(EmbeddingBag(1000, 8), torch.nn.Linear(8, 1))
    >>> with accumulate(model):
    ...     for ids in torch.arange(24).reshape(3, 4, 2):
    ...         model(ids).sum().backward()
    >>> model[0].optimizer.state[model[0].weight]["step"]
    1
    """
    return Accumulating([layer for layer in module.modules() if isinstance(layer, Layer)])


def _is_there(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether Python can look at a tensor's numbers: they are in memory, and no operation is traced."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def _refuse(name: str, max_norm: float | None, scale_grad_by_freq: bool) -> None:
    for option, given, default in (
        ("max_norm", max_norm, None),
        ("scale_grad_by_freq", scale_grad_by_freq, False),
    ):
        if given is not default:
            raise OptionError(
                f"{name}: {option} is {given!r}, expected {default}: a fused embedding does not have it; use "
                f"torch.nn.{name}(sparse=True) with nb_sparse_adam.torch.SparseAdam"
            )


def _shape_of(embeddings: Tensor) -> tuple[int, int]:
    if embeddings.dim() != 2:
        raise TableError(f"from_pretrained got shape {tuple(embeddings.shape)}, expected (rows, dim)")
    return embeddings.shape[0], embeddings.shape[1]
