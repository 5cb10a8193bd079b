# SPDX-License-Identifier: Apache-2.0
"""`Client`: what a worker uses of a parameter server."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nb_sparse_adam._src.gradients import RowGradient, read_named
from nb_sparse_adam._src.naming import type_name
from nb_sparse_adam._src.options import flag
from nb_sparse_adam._src.parameter_server.calls import Calls
from nb_sparse_adam._src.parameter_server.payloads import Payload, find_table, refuse_as_here
from nb_sparse_adam._src.parameter_server.rooms import Rooms
from nb_sparse_adam._src.parameter_server.routing import Routed, route
from nb_sparse_adam._src.parameter_server.spec import Config, TableSpec
from nb_sparse_adam._src.parameter_server.windows import WINDOW
from nb_sparse_adam._src.public import public
from nb_sparse_adam.errors import GradientTypeError, ServerError, ServerTimeout, StepTimeout

Ids = Mapping[str, ArrayLike]
Gradients = Mapping[str, Any]
_FOR_OTHERS = 5.0  # seconds that a worker waits for others to send again what a shard has lost
_Decided: TypeAlias = tuple[int, dict[int, int], list[Payload] | None]  # a step, its parts, what was sent


class Pulling:
    """A pull that is on its way, of the shards that have some of the ids."""

    def __init__(self, client: Client, ids: Ids, train: bool) -> None:
        self._client = client
        self._routed = client._route(ids)
        self._shards = [
            shard
            for shard in range(client._config.shards)
            if any(each.starts[shard] < each.starts[shard + 1] for each in self._routed.values())
        ]
        begin = [
            partial(client._shards[shard].pull.remote, _of_shard(self._routed, shard), train)
            for shard in self._shards
        ]
        self._calls = client._calls("pull", begin)

    def result(self) -> dict[str, NDArray[Any]]:
        """Wait for the vectors."""
        replies = dict(zip(self._shards, self._calls.results(), strict=True))
        return self._client._spread(self._routed, replies)


def _of_shard(routed: Mapping[str, Routed], shard: int) -> dict[str, NDArray[np.int64]]:
    return {name: each.ids[each.of_shard(shard)] for name, each in routed.items()}


@public("nb_sparse_adam.parameter_server")
class Client:
    """A worker of a parameter server; made by `ParameterServer.client`.

    Its methods may be called from several threads. A push is applied once on each shard, however often it has
    to be sent. A client that is pickled becomes another one where it is unpickled, of the same rank.

    Attributes
    ----------
    rank : int or None
    timeout : float
        Seconds for a call until `ServerTimeout`. Shards that die are waited for, and called again.
    """

    def __init__(
        self, ray: Any, config: Config, coordinator: Any, shards: list[Any], rank: int | None, timeout: float
    ) -> None:
        self._ray, self._config = ray, config
        self._coordinator, self._shards = coordinator, shards
        self.rank, self.timeout = rank, timeout
        self._models = {name: spec.make(name) for name, spec in config.tables.items()}
        self._lock = threading.Lock()  # of what follows
        self._sequence = 0
        self._open: set[int] = set()  # sequences on their way
        self._versions: list[int | None] = [None] * config.shards
        self._routes: dict[str, tuple[NDArray[np.int64], Routed]] = {}  # the last one of each table
        self._rooms = Rooms()  # all that is sent is copied when a call begins, or begins again
        self._of_steps = threading.Lock()  # one step at a time
        self._pid, self._is_closed = os.getpid(), False
        self._unapplied: _Decided | None = None
        self._is_undecided = False  # whether a step was staged of which no decision is known
        self._join()

    def __repr__(self) -> str:
        return f"Client(server={self._config.name!r}, rank={self.rank}, incarnation={self._client})"

    def __reduce__(self) -> tuple[Any, ...]:
        from nb_sparse_adam._src.parameter_server.server import client_of

        return client_of, (self._config.name, self.rank, self.timeout)

    @property
    def server(self) -> str:
        """The name of the server."""
        return self._config.name

    @property
    def tables(self) -> dict[str, TableSpec]:
        """What its tables are made of."""
        return dict(self._config.tables)

    @property
    def incarnation(self) -> int:
        """The number that this client has, larger than those of all before it."""
        return self._client

    def close(self) -> None:
        """Leave the server: with ("bounded", k), others do not wait for this worker any more.

        A ``with`` statement does so at its end.
        """
        if not self._is_closed and isinstance(self._config.consistency, int):
            self._ask("close", partial(self._coordinator.leave.remote, self._client))
        self._is_closed = True

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _join(self) -> None:
        joined = self._ask("join", partial(self._coordinator.join.remote, self.rank))
        self._client: int = joined["client"]
        self._step: int = joined["step"]
        # Which a shard may not have been told, when the worker that knew it is gone.
        decided = joined["decided"]
        if decided is not None and (self._unapplied is None or self._unapplied[0] < decided[0]):
            self._unapplied = (*decided, None)
        self._is_undecided = False
        self._base: int = joined["pushes"]  # of others, when this one comes: it is one of the slowest
        self._sequence = 0

    # --- pulls --------------------------------------------------------------------------------------------

    def pull(self, ids: Ids, train: bool = True) -> dict[str, NDArray[Any]]:
        """Return the vectors of ids.

        Parameters
        ----------
        ids : mapping of str to (n,) integers or strings
            Of each table.
        train : bool, default True
            Whether ids that have no row give their initial values, or what ``unknown`` of the table says.
            They get a row when they are pushed.

        Returns
        -------
        dict of str to (n, dim) array

        Raises
        ------
        ServerTimeout
            If a shard has not answered within ``timeout``.
        TableError
            If there is no such table.
        """
        return self.begin_pull(ids, train).result()

    def begin_pull(self, ids: Ids, train: bool = True) -> Pulling:
        """Ask for the vectors of ids, and wait for nothing.

        Parameters
        ----------
        ids, train
            As `pull`.

        Returns
        -------
        object
            Whose method ``result()`` waits, and returns what `pull` does. ``timeout`` counts from now on.
        """
        return Pulling(self, ids, flag("train", train))

    def _route(self, ids: Ids) -> dict[str, Routed]:
        if not isinstance(ids, Mapping):
            raise GradientTypeError(f"pull got {type_name(ids)}, expected a mapping of tables to ids")
        self._check_process()
        found = {}
        for name, each in ids.items():
            model = find_table(self._models, name)
            found[name] = self._routed(name, model._ids("pull", each))
        return found

    def _routed(self, name: str, ids: NDArray[np.int64]) -> Routed:
        """Say which shard is sent what; at once, if these are the last ids: what is pulled is pushed next."""
        known = self._routes.get(name)
        if known is None or not np.array_equal(known[0], ids):
            known = self._routes[name] = ids.copy(), route(ids, self._config.shards)
        return known[1]

    def _spread(self, routed: Mapping[str, Routed], replies: Mapping[int, Any]) -> dict[str, NDArray[Any]]:
        for shard, (version, _) in replies.items():
            self._versions[shard] = version
        vectors = {}
        for name, each in routed.items():
            model = self._models[name]
            parts = {shard: found[name] for shard, (_, found) in replies.items()}
            vectors[name] = each.spread(parts, model.dim, model.dtype)
        return vectors

    # --- pushes -------------------------------------------------------------------------------------------

    def push(self, gradients: Gradients) -> None:
        """Take a step of Adam with gradients of the rows of ids; return when all shards have taken it.

        Parameters
        ----------
        gradients : mapping of str to (ids, grads) or RowGradient
            Of each table: ids, (n,) integers or strings, and (n, dim) float32 or float64. Repeated ids are
            summed. Each occurrence counts as a sighting, as those of a look-up in training do in
            `EmbeddingTable`: an id that has no row gets one if ``admission`` lets it, and its gradient is
            left out if not. A table whose ids are empty takes part in the step.

        Raises
        ------
        GradientError
            As `EmbeddingTable.update`; nothing has been changed then, on any shard.
        TableError
            If there is no such table, or a shard has no room for new ids: that one has changed nothing.
        ServerTimeout
            If a shard has not answered within ``timeout``. The same call of the same client may not be
            repeated: it would be another push.
        StepTimeout
            If steps are of all workers, and one of them has not pushed in time: nothing has been changed
            then, on any shard. The next push belongs to another step.
        StaleClientError
            If another client has come with this rank, or this one has been forgotten.
        """
        payloads = self._read(gradients)
        self._push(payloads, None)

    def push_pull(self, gradients: Gradients, next_ids: Ids) -> dict[str, NDArray[Any]]:
        """Push, and pull what comes next, in one round trip.

        Parameters
        ----------
        gradients
            As `push`.
        next_ids
            As `pull`.

        Returns
        -------
        dict of str to (n, dim) array

        Raises
        ------
        SparseAdamError
            As `push`.
        """
        payloads = self._read(gradients)  # first: its ids are those of the last pull, as a rule
        routed = self._route(next_ids)
        if self._config.consistency != "async":  # what is pulled comes after what others are waited for
            self._push(payloads, None)
            return Pulling(self, next_ids, True).result()
        return self._spread(routed, dict(enumerate(self._push(payloads, routed))))

    def _read(self, gradients: Gradients) -> list[Payload]:
        """Check gradients, sum them by ids, and say what each shard is sent."""
        if not isinstance(gradients, Mapping):
            raise GradientTypeError(
                f"push got {type_name(gradients)}, expected a mapping of tables to (ids, grads)"
            )
        self._check_process()
        payloads: list[Payload] = [{} for _ in self._shards]
        for name, given in gradients.items():
            model = find_table(self._models, name)
            if isinstance(given, RowGradient):
                ids, grads = given.rows, given.values
            elif isinstance(given, tuple) and len(given) == 2:
                ids, grads = given
            else:
                raise GradientTypeError(
                    f"push to table {name!r}: got {type_name(given)}, expected (ids, grads) or a RowGradient"
                )
            numbers = model._ids("push", ids)
            read = read_named(RowGradient(ids, grads), numbers, ("ids", "grads"), model._store.table.target)
            routed = self._routed(name, numbers)
            sums, is_finite = routed.sum(
                read.values, self._rooms.room(name, len(routed.ids), model.dim, model.dtype)
            )
            if model.on_nonfinite == "raise" and not is_finite:
                refuse_as_here(self._config.tables[name], name, numbers, read.values)
            for shard, payload in enumerate(payloads):
                own = routed.of_shard(shard)
                payload[name] = routed.ids[own], routed.times[own], sums[own]
        return payloads

    def _push(self, payloads: list[Payload], routed: Mapping[str, Routed] | None) -> list[Any]:
        consistency = self._config.consistency
        if consistency == "sync":
            with self._of_steps:
                self._push_step(payloads)
            return []
        with self._lock:
            if self._open and self._sequence + 1 - min(self._open) >= WINDOW:
                raise ServerError(
                    f"{len(self._open)} pushes of this client are on their way, expected fewer than {WINDOW}"
                )
            self._sequence += 1
            sequence, client = self._sequence, self._client
            self._open.add(sequence)
        try:
            begin = [
                self._begin_push(shard, client, sequence, payload, routed)
                for shard, payload in enumerate(payloads)
            ]
            results = self._calls("push", begin).results()
        finally:
            self._open.discard(sequence)
        if consistency != "async":
            # Its sequence is the number of pushes that were begun: one that has failed counts as a step, too.
            advance = partial(self._coordinator.advance.remote, client, self._base + sequence)
            self._ask("push", advance, self._config.step_timeout)
        return results

    def _begin_push(
        self, shard: int, client: int, sequence: int, payload: Payload, routed: Mapping[str, Routed] | None
    ) -> Callable[[], Any]:
        handle, version = self._shards[shard], self._versions[shard]
        if routed is None:
            return partial(handle.push.remote, client, sequence, payload, version)
        return partial(handle.push_pull.remote, client, sequence, payload, version, _of_shard(routed, shard))

    # --- steps of all workers -----------------------------------------------------------------------------

    def _push_step(self, payloads: list[Payload]) -> None:
        if self._is_undecided:  # nobody here knows what became of the push before: another worker begins
            self._join()
        self._finish()
        rank, client, step = self.rank, self._client, self._step
        self._is_undecided = True
        self._stage(payloads, step, range(len(payloads)))
        arrive = partial(self._coordinator.arrive.remote, rank, client, step)
        decision = self._ask("push", arrive, self._config.step_timeout)
        self._step, self._is_undecided = decision["step"], False
        if decision["parts"] is None:
            late = decision["late"]
            if late:
                self._join()
            raise StepTimeout(
                f"step {step} was given up: "
                + (f"this worker, of rank {rank}, has not pushed" if late else "not all workers have pushed")
                + f" within {self._config.step_timeout} s after the first one. No shard has applied any of "
                "it; the next push belongs to the next step"
            )
        try:
            self._apply_step(payloads, step, decision["parts"])
        except BaseException:
            # It is decided: what comes next comes after it. What was sent is kept: a shard may ask for it.
            self._unapplied = step, decision["parts"], copy.deepcopy(payloads)
            raise

    def _finish(self) -> None:
        """Have shards apply the last step that was decided, as far as one of them has not."""
        if self._unapplied is not None:
            step, parts, payloads = self._unapplied
            self._apply_step(payloads, step, parts)
            self._unapplied = None

    def _stage(self, payloads: list[Payload], step: int, shards: Iterable[int]) -> None:
        begin = [
            partial(self._shards[shard].stage.remote, step, self.rank, self._client, payloads[shard])
            for shard in shards
        ]
        self._calls("push", begin).results()

    def _apply_step(self, payloads: list[Payload] | None, step: int, parts: dict[int, int]) -> None:
        """Have all shards apply a step; one that has lost parts since gets ours again.

        Without payloads, as they are of a client that is gone, what is lost stays lost: there is no log. So
        does what other workers have pushed, who may be further already.
        """
        end, pause = time.monotonic() + self.timeout, 0.02
        if self._config.durability == "snapshot":
            end = time.monotonic() + min(self.timeout, _FOR_OTHERS)
        left = list(range(len(self._shards)))
        while True:
            begin = [partial(self._shards[shard].commit.remote, step, parts) for shard in left]
            missing = dict(zip(left, self._calls("push", begin).results(), strict=True))
            left = [shard for shard, ranks in missing.items() if ranks]
            if not left or payloads is None:
                return
            ours = [shard for shard in left if self.rank in missing[shard]]
            if ours:
                self._stage(payloads, step, ours)
            if time.monotonic() > end:
                if self._config.durability == "snapshot":
                    return
                raise ServerTimeout(
                    f"push: step {step} is decided, but shards {left} wait for the parts of ranks "
                    f"{sorted(set().union(*missing.values()))}, which they have lost"
                )
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    # --- calls --------------------------------------------------------------------------------------------

    def _calls(self, what: str, begin: Sequence[Callable[[], Any]]) -> Calls:
        return Calls(self._ray, f"{what} of {self!r}", begin, time.monotonic() + self.timeout, waits=True)

    def _ask(self, what: str, begin: Callable[[], Any], more: float = 0.0) -> Any:
        end = time.monotonic() + self.timeout + more
        what = f"{what}: the coordinator of {self._config.name!r}"
        return Calls(self._ray, what, [begin], end, waits=True).results()[0]

    def _check_process(self) -> None:
        if self._is_closed:
            raise ServerError("this client was closed; make another one: server.client()")
        if os.getpid() != self._pid:
            raise ServerError(
                "this process was forked from the one that made this client, and has no connection of its "
                "own; start processes by spawn, and make a client in each"
            )
