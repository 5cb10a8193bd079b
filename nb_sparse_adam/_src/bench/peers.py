# SPDX-License-Identifier: Apache-2.0
"""Other libraries, where they are installed. Nothing here imports one before it is asked to step."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.bench.cases import CSR, Bag, Case, Rows
from nb_sparse_adam._src.bench.contenders import HYPER, Contender

_SPINNING = 0.25
"""Seconds. The OpenMP that Paddle and MKL bring lets threads spin for 0.2 s after their work (KMP_BLOCKTIME),
on the cores that the next contender needs."""


class Peer(NamedTuple):
    """A library to compare with."""

    module: str
    distribution: str
    install: str
    what: str

    @property
    def installed(self) -> bool:
        """Whether there is such a module; it has not been imported."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str:
        """The installed version."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "of unknown version"


_CPU = "--index-url https://download.pytorch.org/whl/cpu"
PEERS = {
    "torch": Peer("torch", "torch", f"pip install torch {_CPU}", "torch.optim.SparseAdam"),
    "fbgemm": Peer(
        "fbgemm_gpu",
        "fbgemm-gpu-cpu",
        f"pip install fbgemm-gpu-cpu {_CPU}",
        "FBGEMM's table-batched embeddings",
    ),
    "paddle": Peer(
        "paddle", "paddlepaddle", "pip install paddlepaddle", "paddle.optimizer.Adam(lazy_mode=True)"
    ),
    "implicit": Peer("implicit", "implicit", "pip install implicit", "implicit's BPR and ALS"),
    # LightFM's own package, 1.17, cannot be built by a pip of today.
    "lightfm": Peer("lightfm", "rectools-lightfm", "pip install rectools-lightfm", "LightFM's WARP"),
}
"""What ``--peers`` takes -> the library."""


def import_peer(name: str) -> Any:
    """Import a peer's module, or raise what asv takes as "skip this"."""
    peer = PEERS[name]
    try:
        return importlib.import_module(peer.module)
    except Exception as error:
        reason = f"{name} cannot be imported ({type(error).__name__}: {error}): {peer.install}"
        raise NotImplementedError(reason) from error


def _torch(threads: int) -> Any:
    torch = import_peer("torch")
    torch.set_num_threads(threads)
    return torch


class _Torch(Contender):
    """torch.optim.SparseAdam, given sparse gradients.

    ``coalesced=True`` tells torch that the ids are unique and in order, as the case must have them: it then
    skips the sorting and summing that it does in every step otherwise.
    """

    rest = _SPINNING

    def __init__(self, case: Case, *, threads: int, coalesced: bool) -> None:
        super().__init__(case)
        torch = _torch(threads)
        self._parameter = torch.nn.Parameter(torch.from_numpy(case.table()))
        self._optimizer = self._make_optimizer([self._parameter])
        gradients = [
            torch.sparse_coo_tensor(
                *(torch.from_numpy(array) for array in self._coo(arrays)),
                (case.rows, case.dim),
                is_coalesced=coalesced,
                check_invariants=False,
            )
            for arrays in case.arrays()
        ]
        self._turns = itertools.cycle(gradients)

    @staticmethod
    def _coo(arrays: Any) -> Sequence[Any]:
        """Give indices, (sparse dimensions, n), and values."""
        raise NotImplementedError

    @staticmethod
    def _make_optimizer(parameters: Any) -> Any:
        return import_peer("torch").optim.SparseAdam(parameters, **HYPER)

    def ready(self) -> None:
        """Take the next gradient."""
        self._parameter.grad = next(self._turns)

    def step(self) -> None:
        """Apply it."""
        self._optimizer.step()


class TorchRows(_Torch):
    """torch.optim.SparseAdam on rows."""

    @staticmethod
    def _coo(arrays: Any) -> Sequence[Any]:
        assert isinstance(arrays, Rows)
        return arrays.rows[None], arrays.values


class TorchEntries(_Torch):
    """torch.optim.SparseAdam on single entries (two sparse dimensions)."""

    @staticmethod
    def _coo(arrays: Any) -> Sequence[Any]:
        assert isinstance(arrays, CSR)
        rows = np.repeat(np.arange(len(arrays.indptr) - 1), np.diff(arrays.indptr))
        return np.stack([rows, arrays.indices]), arrays.data


class TorchBag(Contender):
    """torch's EmbeddingBag(sparse=True) and SparseAdam: the backward pass and the step are timed."""

    rest = _SPINNING

    def __init__(self, case: Case, *, threads: int) -> None:
        super().__init__(case)
        torch = _torch(threads)
        self._make_layer(
            case.rows, case.dim, mode="sum", sparse=True, include_last_offset=True,
            _weight=torch.from_numpy(case.table()),
        )  # fmt: skip
        self._turns = itertools.cycle(
            [
                tuple(None if array is None else torch.from_numpy(array) for array in arrays)
                for arrays in case.arrays()
            ]
        )

    def _make_layer(self, *args: Any, **options: Any) -> None:
        torch = import_peer("torch")
        self._layer = torch.nn.EmbeddingBag(*args, **options)
        self._optimizer = torch.optim.SparseAdam(self._layer.parameters(), **HYPER)

    def ready(self) -> None:
        """Look up the next bags, which is not timed."""
        indices, offsets, self._grad_output, weights = next(self._turns)
        self._layer.weight.grad = None
        self._output = self._layer(indices, offsets, per_sample_weights=weights)

    def step(self) -> None:
        """Go back through the lookup, and apply the gradient."""
        self._output.backward(self._grad_output)
        self._optimizer.step()


class FbgemmBag(Contender):
    """FBGEMM's embedding bag on the CPU: the backward pass, in which it updates the table, is timed.

    Parameters
    ----------
    case : Case
        A case of bags.
    threads : int
    optimizer : {"EXACT_SGD", "EXACT_ADAGRAD"}
        On the CPU it has no Adam.
    """

    rest = _SPINNING

    def __init__(self, case: Case, *, threads: int, optimizer: str) -> None:
        super().__init__(case)
        torch = _torch(threads)
        import_peer("fbgemm")
        from fbgemm_gpu import split_embedding_configs as configs
        from fbgemm_gpu import split_table_batched_embeddings_ops_training as training

        table = (case.rows, case.dim, training.EmbeddingLocation.HOST, training.ComputeDevice.CPU)
        self._layer = training.SplitTableBatchedEmbeddingBagsCodegen(
            [table],
            optimizer=configs.EmbOptimType[optimizer],
            learning_rate=HYPER["lr"],
            eps=HYPER["eps"],
            weights_precision=configs.SparseType.FP32,
            pooling_mode=training.PoolingMode.SUM,
        )
        self._layer.weights_host.data.copy_(torch.from_numpy(case.table()).reshape(-1))
        self._turns = itertools.cycle([self._tensors(arrays, torch) for arrays in case.arrays()])

    @staticmethod
    def _tensors(arrays: Any, torch: Any) -> tuple[Any, Any, Any]:
        assert isinstance(arrays, Bag)
        assert arrays.weights is None
        indices, offsets, grad_output = (torch.from_numpy(array) for array in arrays[:3])
        return indices, offsets, grad_output

    def ready(self) -> None:
        """Look up the next bags, which is not timed."""
        indices, offsets, self._grad_output = next(self._turns)
        self._output = self._layer(indices, offsets)

    def step(self) -> None:
        """Go back through the lookup, which updates the table."""
        self._output.backward(self._grad_output)


class PaddleRows(Contender):
    """Paddle's Adam(lazy_mode=True) on the gradient of an embedding lookup; the step is timed."""

    rest = _SPINNING

    def __init__(self, case: Case, *, threads: int) -> None:
        super().__init__(case)
        paddle = import_peer("paddle")
        paddle.set_device("cpu")
        paddle.base.core.set_num_threads(threads)
        self._layer = paddle.nn.Embedding(case.rows, case.dim, sparse=True)
        self._layer.weight.set_value(case.table())
        self._optimizer = paddle.optimizer.Adam(
            learning_rate=HYPER["lr"],
            beta1=HYPER["betas"][0],
            beta2=HYPER["betas"][1],
            epsilon=HYPER["eps"],
            parameters=self._layer.parameters(),
            lazy_mode=True,
        )
        self._turns = itertools.cycle(
            [[paddle.to_tensor(array) for array in arrays if array is not None] for arrays in case.arrays()]
        )

    def ready(self) -> None:
        """Go forward and backward through the lookup, which is not timed."""
        rows, values = next(self._turns)
        self._optimizer.clear_grad()
        self._layer(rows).backward(values)

    def step(self) -> None:
        """Apply the gradient."""
        self._optimizer.step()
