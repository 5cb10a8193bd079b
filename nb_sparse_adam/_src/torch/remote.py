# SPDX-License-Identifier: Apache-2.0
"""`RemoteEmbeddingBag`: bags of ids whose rows a parameter server has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nb_sparse_adam._src.annotations import BagMode
from nb_sparse_adam._src.naming import type_name
from nb_sparse_adam._src.options import flag
from nb_sparse_adam._src.parameter_server.payloads import find_table
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.torch import bags, pushes
from nb_sparse_adam._src.torch.bags_by_ids import BagsByIds
from nb_sparse_adam._src.torch.by_ids import standing_for
from nb_sparse_adam._src.torch.param_state import threads_of_torch
from nb_sparse_adam._src.torch.prefetched import Prefetched
from nb_sparse_adam.errors import OptionTypeError, StateError

if TYPE_CHECKING:
    from nb_sparse_adam._src.parameter_server.client import Client

_FORMAT = "nb_sparse_adam.torch remote, version 1"


@public("nb_sparse_adam.torch")
class RemoteEmbeddingBag(BagsByIds):
    """Bags of ids, pooled, whose rows a parameter server has: lookups pull, the backward pass pushes.

    Parameters
    ----------
    client : nb_sparse_adam.parameter_server.Client
        Of this worker. All layers of a model are to have the same one.
    table : str
        Which of the server's tables.
    mode : {"mean", "sum"}, default "mean"
        What is made of the vectors of a bag; one without ids gives zeros.
    include_last_offset : bool, default False
        Whether offsets end with the number of ids, as ``torch.nn.EmbeddingBag`` has it.
    background : bool, default False
        Whether the push goes on in a thread after ``backward()`` has returned. The next lookup of a layer
        with this client, the next push, or `wait`, waits for it, and raises its error. Where several layers
        share a push, all of them have to want it.

    Attributes
    ----------
    client : nb_sparse_adam.parameter_server.Client
    grad_scaler : torch.amp.GradScaler or float, optional
        What the loss is scaled with. Gradients are divided by it before they are pushed.
    weight : Parameter, (0, dim)
        Stands for the table where torch asks for parameters; it has no numbers. With
        ``weight.requires_grad_(False)``, as with ``module.requires_grad_(False)``, nothing is pushed.

    Raises
    ------
    TableError
        If the server has no such table.

    Notes
    -----
    A lookup in training is ``client.pull``: ids that have no row give their initial values. They get rows,
    and are counted as seen, when their gradients are pushed, and not, as in `DynamicEmbeddingBag`, by the
    lookup. In evaluation mode (`eval`), under ``torch.no_grad`` and with ``weight.requires_grad_(False)`` it
    is ``client.pull(train=False)``: unknown ids give what `unknown` of the table says.

    At the end of a backward pass, or of `accumulate`, the gradients of all layers with one client are
    pushed at once: one step, of all their tables. Fused layers of the same pass, whose tables are here, take
    their steps after the push if it was not refused; should their own be refused, the push has been made. In
    the background it is the other way round. Where steps are of all workers (``consistency="sync"``) the push
    waits for theirs, so each worker has to make as many passes; a pass without a lookup of any of these
    layers pushes nothing, and so does one that a GradScaler skips. Gradients are then summed over workers:
    divide the loss by their number for a mean.

    *Prefetched vectors are stale*: `prefetch` asks for them at once, and what is pushed after that, by this
    worker or others, is not in them. If the next batch is prefetched before the backward pass of this one,
    they lack this one's push. Call it after ``backward()`` (with ``background=True``: after `wait`) for
    vectors that lack no push of this worker.

    The layer's state dict has no rows, only a tensor of bytes, "_extra_state", which says which table they
    are in. The rows are saved by the server, in its ``checkpoint_dir``. The learning rate is the server's,
    too: there is no ``optimizer``.

    Ids are taken from the CPU, and vectors given there: `to` another device, `double`, `half` and
    `share_memory` are refused, also as part of a model. In a model that `DistributedDataParallel` wraps, keep
    the layer outside of what is wrapped. A copy (``copy.deepcopy``) has the same client; one that was
    pickled has another client of the same server.
    """

    _where = "with a parameter server"
    _not_shared = "its client is of one process. Make a layer in each, with a client of its own"
    _not_distributed = (
        "its gradients are pushed to a parameter server, and there are none to exchange. Keep it outside of "
        "the module that is wrapped; each process pushes its own"
    )

    def __init__(
        self, client: Client, table: str, *, mode: BagMode = "mean", include_last_offset: bool = False,
        background: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._set_bags(mode, include_last_offset)
        tables = getattr(client, "tables", None)
        if not isinstance(tables, Mapping):
            raise OptionTypeError(
                f"RemoteEmbeddingBag: client is {type_name(client)}, expected a Client of a parameter server"
            )
        self._client, self.table_name = client, table
        self._empty = find_table(tables, table).make(table)  # it pools vectors as a table here would
        self.background = flag("background", background)
        self.embedding_dim = self._empty.dim
        self.weight = standing_for(self._empty.dim, self._empty.dtype)
        self._prefetched = Prefetched(client, table)
        self._set_up_passes()

    @property
    def client(self) -> Client:
        """The client that the layer pulls and pushes with."""
        found: Client = self._client
        return found

    def extra_repr(self) -> str:
        """Say where the rows are."""
        return f"{self._client!r}, {self.table_name!r}, dim={self.embedding_dim}, mode={self.mode!r}"

    # --- lookups ------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def prefetch(self, input: Tensor) -> None:  # noqa: A002 (torch's name)
        """Begin to pull the vectors of a batch that is to come; wait for nothing.

        The lookup of these ids takes them. Lookups in training are expected in the order in which they were
        prefetched in training, and other ones in that of theirs: one with other ids gives up what was
        prefetched before its own, or all of it, and pulls afresh. See `stats`.

        Parameters
        ----------
        input : integer Tensor of any shape
            Ids, as they will be looked up.
        """
        self._prefetched.begin(self.ids_of(input).reshape(-1), self._is_training())

    def wait(self) -> None:
        """Wait for the push in the background, if there is one of this client, and raise its error."""
        pushes.wait(self._client)

    def stats(self) -> dict[str, int]:
        """Return how lookups went.

        Returns
        -------
        dict of str to int
            "prefetched": lookups whose vectors had been asked for ahead; "pulls": those that asked for them
            themselves; "unused": batches that were asked for ahead, and given up; "failed": lookups that
            asked again, for the server had not answered in time.
        """
        return dict(self._prefetched.counts)

    def _pull(self, ids: Tensor, train: bool) -> Any:
        self.wait()
        return self._prefetched.pull(ids.reshape(-1), train)

    def _vectors(self, ids: Tensor, train: bool) -> Tensor:
        return torch.from_numpy(self._pull(ids, train)).reshape(*ids.shape, self.embedding_dim)

    def _pooled(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, train: bool) -> Tensor:
        flat, starts = bags.starts_of(ids, offsets, self.include_last_offset)
        vectors = self._pull(flat, train)
        bounds = np.append(starts.numpy(), len(flat)).astype(np.int64)
        factors = None
        if weights is not None:
            given = weights.detach().resolve_neg().reshape(-1).to(self.weight.dtype)
            factors = given.contiguous().numpy()
        rows = -1 - np.arange(len(flat))  # none: these are the places among vectors of ids without a row
        pooled = self._empty._store.pool(
            rows, vectors.reshape(-1), False, threads_of_torch(), bounds, factors, self.mode == "mean"
        )
        return torch.from_numpy(pooled)

    def _check_weight(self) -> None:
        pass  # nothing is written to it, and nothing read

    def before_step(self) -> None:
        """Get ready for a push, or refuse it."""
        self.check_grad()

    # --- its state ----------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Where the rows are, as a part of the module's state dict: JSON, as a tensor of bytes."""
        said = {
            "format": _FORMAT,
            "rows": "are not here: the parameter server has them, and saves them in its checkpoint_dir",
            "server": self._client.server,
            **self._made_with(),
        }
        return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)

    def _made_with(self) -> dict[str, Any]:
        return {"table": self.table_name, "dim": self.embedding_dim, "dtype": self._empty.dtype.name}

    def _load_state(self, where: str, state: Any) -> None:
        expected = self._made_with()
        try:
            said = json.loads(bytes(state.cpu().numpy()))
            is_ours = said["format"] == _FORMAT
            found = {name: said[name] for name in expected}
        except (AttributeError, KeyError, TypeError, ValueError):
            is_ours = False
        if not is_ours:
            raise StateError(
                f"{where} is not what a RemoteEmbeddingBag has saved, expected where its rows are; rows of "
                "other layers are not loaded, for the parameter server has those of this one"
            )
        if found != expected:
            raise StateError(f"{where} is of {found}, expected {expected}, which this layer was made with")

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteEmbeddingBag:
        """Copy the layer; the client goes on to be shared, for another one would be another worker."""
        memo.setdefault(id(self._client), self._client)
        copied: RemoteEmbeddingBag = super().__deepcopy__(memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prefetched": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prefetched = Prefetched(self._client, self.table_name)
