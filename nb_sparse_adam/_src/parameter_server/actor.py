# SPDX-License-Identifier: Apache-2.0
"""Shards and the coordinator as actors of Ray: named, detached, started again whenever they die.

A method of theirs is called at most once for each call of a client (``max_task_retries=0``): it is the client
who calls again, with the number that its push has.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.parameter_server.calls import CannotStartError
from nb_sparse_adam._src.parameter_server.coordinator import Coordinator
from nb_sparse_adam._src.parameter_server.events import log_of_events
from nb_sparse_adam._src.parameter_server.folders import COORDINATOR, shard_folder
from nb_sparse_adam._src.parameter_server.holding import HeldError, Hold
from nb_sparse_adam._src.parameter_server.rooms import Rooms
from nb_sparse_adam._src.parameter_server.shard import Shard
from nb_sparse_adam._src.parameter_server.spec import Config
from nb_sparse_adam._src.parameter_server.steps import summed
from nb_sparse_adam.errors import ServerError, SparseAdamError

NAMESPACE = "nb_sparse_adam"
_CALLS = 32  # of a shard at once; most of them wait for its lock, or for the disk
_VECTORS, _CALLS_FOR_VECTORS = "vectors", 8  # few: each thread keeps the memory of its largest batch
_CALLS_OF_COORDINATOR = 1000  # each worker may wait for a step there

_COUNTERS = {
    "pushes": "Pushes that were applied",
    "pulls": "Pulls",
    "duplicates": "Pushes that came again, and were not applied again",
    "refused": "Pushes that were refused",
    "lost_pushes": "Pushes that were acknowledged, and lost when the shard died, at most",
}
_GAUGES = {  # number of `Shard.stats` -> name and text of a metric
    "rows": ("rows", "Rows of all tables"),
    "bytes": ("table_bytes", "Bytes of rows and index"),
    "unsaved_changes": ("unsaved_changes", "Changes since the last snapshot"),
    "seconds_since_snapshot": ("snapshot_age_seconds", "Seconds since the last snapshot"),
}
_QUANTILES = {  # and what its unit is, of the metric's
    "pull_ms": ("pull_seconds", "Seconds of a pull in the shard, of the last 4096", 1e-3),
    "push_ms": ("push_seconds", "Seconds of a push in the shard, of the last 4096", 1e-3),
    "staleness": ("staleness_pushes", "Pushes between a client's pull and its push, of the last 4096", 1.0),
}


def _cannot_start(what: str, server: str, error: Exception) -> CannotStartError:
    told = CannotStartError(
        f"{what} of server {server!r} cannot be started: {type(error).__name__}: {error}. It tries again at "
        "the next call"
    )
    told.passes = isinstance(error, HeldError) or not isinstance(error, SparseAdamError)
    return told


class ShardActor:
    """A shard in a process of its own."""

    def __init__(self, folder: str, config: dict[str, Any], number: int) -> None:
        _show_events()
        self._folder, self._config, self._number = Path(folder), Config.from_json(config), number
        self._stop = threading.Event()
        self._starting = threading.Lock()
        self._rooms = Rooms()
        self._started: Shard | None = None
        _warm_up(self._config)
        # An actor whose constructor fails is never started again; what has failed may be mended. Who calls is
        # told.
        with suppress(ServerError):
            _ = self._shard

    @property
    def _shard(self) -> Shard:
        """The shard, which is started if it has not been."""
        with self._starting:
            if self._started is None:
                self._started = self._start()
            return self._started

    def _start(self) -> Shard:
        try:
            shard = Shard(self._folder, self._config, self._number)
        except Exception as error:
            raise _cannot_start(f"shard {self._number}", self._config.name, error) from error
        metrics = _Metrics(self._config.name, self._number, shard.stats())
        threading.Thread(target=shard.keep, args=(self._stop, metrics.set), daemon=True).start()
        return shard

    def pull(self, ids: dict[str, Any], train: bool) -> Any:
        return self._shard.pull(ids, train, self._rooms)  # Ray copies it before this thread is called again

    def push(self, client: int, sequence: int, payload: Any, version: int | None) -> int:
        return self._shard.push(client, sequence, payload, version)

    def push_pull(
        self, client: int, sequence: int, payload: Any, version: int | None, ids: dict[str, Any]
    ) -> Any:
        self._shard.push(client, sequence, payload, version)
        return self._shard.pull(ids, True, self._rooms)

    def stage(self, step: int, rank: int, client: int, payload: Any) -> int:
        return self._shard.stage(step, rank, client, payload)

    def commit(self, step: int, parts: dict[int, int]) -> list[int]:
        return self._shard.commit(step, parts)

    def evict(self, name: str, conditions: dict[str, Any]) -> Any:
        return self._shard.evict(name, conditions)

    def snapshot(self) -> bool:
        return self._shard.snapshot()

    def stats(self) -> dict[str, Any]:
        util = require("ray.util", "ray", "the parameter server")
        return {**self._shard.stats(), "address": util.get_node_ip_address()}

    def forget_latencies(self) -> None:
        self._shard.forget_latencies()

    def export(self, name: str) -> Any:
        return self._shard.export(name)

    def close(self) -> None:
        self._shard.close()
        self._stop.set()


class CoordinatorActor:
    """The coordinator in a process of its own; it knows what the server is made of."""

    def __init__(self, folder: str, config: dict[str, Any]) -> None:
        self._config = config
        self._folder = folder
        self._starting = threading.Lock()
        self._started: Coordinator | None = None
        self._hold: Hold | None = (
            None  # kept when a start fails: a second one of this process would wait for it
        )
        with suppress(ServerError):  # as of a shard
            _ = self._coordinator

    @property
    def _coordinator(self) -> Coordinator:
        """The coordinator, which is started if it has not been."""
        with self._starting:
            if self._started is None:
                own = Path(self._folder) / COORDINATOR
                try:
                    own.mkdir(parents=True, exist_ok=True)
                    self._hold = self._hold or Hold(own)
                    self._started = Coordinator(own, Config.from_json(self._config))
                except Exception as error:
                    raise _cannot_start("the coordinator", self._config["name"], error) from error
            return self._started

    def made_of(self) -> tuple[str, dict[str, Any]]:
        return self._folder, self._config

    def join(self, rank: int | None) -> dict[str, Any]:
        return self._coordinator.join(rank)

    def arrive(self, rank: int, client: int, step: int) -> dict[str, Any]:
        return self._coordinator.arrive(rank, client, step)

    def advance(self, client: int, pushes: int) -> None:
        self._coordinator.advance(client, pushes)

    def leave(self, client: int) -> None:
        self._coordinator.leave(client)


def _warm_up(config: Config) -> None:
    """Compile, or find on the disk, what pushes and pulls need: the first one does not wait for it."""
    one = np.ones(1, np.int64)
    for name, spec in config.tables.items():
        table = spec.make(name, config.threads)
        grads = np.ones((1, table.dim), table.dtype)
        table._see(*summed(one, one, grads)[:2])
        table.update(one, grads)
        table._peek(one, True)
        table.load(one, grads)


def _show_events() -> None:
    """Have this process write its events to its stderr, which Ray keeps in a file of its log folder."""
    if not log_of_events.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))  # a line of JSON, and nothing else
        log_of_events.addHandler(handler)
    log_of_events.setLevel(logging.INFO)
    log_of_events.propagate = False


class _Metrics:
    """Numbers of a shard, as Ray shows them to Prometheus.

    Counters count from the start of the process, as Prometheus expects it: what the shard has read from its
    disk was counted by the process before.
    """

    def __init__(self, server: str, shard: int, stats: dict[str, Any]) -> None:
        metrics = require("ray.util.metrics", "ray", "the parameter server")
        self._tags = {"server": server, "shard": str(shard)}

        def made(kind: Any, name: str, text: str, *keys: str) -> Any:
            return kind(f"nb_sparse_adam_{name}", text, tag_keys=("server", "shard", *keys))

        self._counted = {name: stats[name] for name in _COUNTERS}
        self._counters = {
            name: made(metrics.Counter, f"{name}_total", text) for name, text in _COUNTERS.items()
        }
        self._gauges = {source: made(metrics.Gauge, name, text) for source, (name, text) in _GAUGES.items()}
        self._quantiles = {
            source: (made(metrics.Gauge, name, text, "quantile"), unit)
            for source, (name, text, unit) in _QUANTILES.items()
        }

    def set(self, stats: dict[str, Any]) -> None:
        for name, counter in self._counters.items():
            more, self._counted[name] = stats[name] - self._counted[name], stats[name]
            if more > 0:  # Ray takes no increment of 0
                counter.inc(more, self._tags)
        for name, gauge in self._gauges.items():
            gauge.set(stats[name], self._tags)
        for name, (gauge, unit) in self._quantiles.items():
            for quantile, key in (("0.5", "p50"), ("0.99", "p99")):
                if key in stats[name]:
                    gauge.set(stats[name][key] * unit, {**self._tags, "quantile": quantile})


def shard_name(server: str, shard: int) -> str:
    """Return the name of a shard's actor."""
    return f"{server}/shard-{shard}"


def coordinator_name(server: str) -> str:
    """Return the name of the coordinator's actor."""
    return f"{server}/coordinator"


def start_shard(ray: Any, folder: Path, config: Config, number: int) -> Any:
    """Start a shard, which may already be running."""
    options = _options(shard_name(config.name, number), _CALLS, config.cpus_per_shard)
    for method in (ShardActor.pull, ShardActor.push_pull):
        ray.method(concurrency_group=_VECTORS)(method)
    made = ray.remote(concurrency_groups={_VECTORS: _CALLS_FOR_VECTORS})(ShardActor).options(**options)
    return made.remote(str(shard_folder(folder, number)), config.to_json(), number)


def start_coordinator(ray: Any, folder: Path, config: Config) -> Any:
    """Start the coordinator, which may already be running."""
    options = _options(coordinator_name(config.name), _CALLS_OF_COORDINATOR, 0)
    return ray.remote(CoordinatorActor).options(**options).remote(str(folder), config.to_json())


def _options(name: str, calls: int, cpus: float) -> dict[str, Any]:
    return {
        "name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True,
        "max_restarts": -1, "max_task_retries": 0, "max_concurrency": calls, "num_cpus": cpus,
        "scheduling_strategy": "SPREAD",
    }  # fmt: skip
