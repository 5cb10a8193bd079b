# SPDX-License-Identifier: Apache-2.0
"""Shards and the coordinator as actors of Ray: named, detached, started again whenever they die.

A method of theirs is called at most once for each call of a client (``max_task_retries=0``): it is the client
who calls again, with the number that its push has.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.parameter_server.coordinator import Coordinator
from nb_sparse_adam._src.parameter_server.folders import COORDINATOR, shard_folder
from nb_sparse_adam._src.parameter_server.holding import Hold
from nb_sparse_adam._src.parameter_server.shard import Shard, warm_up
from nb_sparse_adam._src.parameter_server.spec import Config

NAMESPACE = "nb_sparse_adam"
_CALLS = 32  # of a shard at once; most of them wait for its lock, or for the disk
_CALLS_OF_COORDINATOR = 1000  # each worker may wait for a step there


class ShardActor:
    """A shard in a process of its own."""

    def __init__(self, folder: str, config: dict[str, Any], number: int) -> None:
        made = Config.from_json(config)
        warm_up(made)
        self._shard = Shard(Path(folder), made, number)
        self._stop = threading.Event()
        metrics = _Metrics(made.name, number)
        keep = threading.Thread(target=self._shard.keep, args=(self._stop, metrics.set), daemon=True)
        keep.start()

    def pull(self, ids: dict[str, Any], train: bool) -> Any:
        return self._shard.pull(ids, train)

    def push(self, client: int, sequence: int, payload: Any, version: int | None) -> int:
        return self._shard.push(client, sequence, payload, version)

    def push_pull(
        self, client: int, sequence: int, payload: Any, version: int | None, ids: dict[str, Any]
    ) -> Any:
        self._shard.push(client, sequence, payload, version)
        return self._shard.pull(ids, True)

    def stage(self, step: int, rank: int, client: int, payload: Any) -> int:
        return self._shard.stage(step, rank, client, payload)

    def commit(self, step: int, parts: dict[int, int]) -> list[int]:
        return self._shard.commit(step, parts)

    def evict(self, name: str, conditions: dict[str, Any]) -> Any:
        return self._shard.evict(name, conditions)

    def snapshot(self) -> bool:
        return self._shard.snapshot()

    def stats(self) -> dict[str, Any]:
        return self._shard.stats()

    def export(self, name: str) -> Any:
        return self._shard.export(name)

    def close(self) -> None:
        self._stop.set()
        self._shard.close()


class CoordinatorActor:
    """The coordinator in a process of its own; it knows what the server is made of."""

    def __init__(self, folder: str, config: dict[str, Any]) -> None:
        self._config = config
        self._folder = folder
        own = Path(folder) / COORDINATOR
        own.mkdir(parents=True, exist_ok=True)
        self._hold = Hold(own)  # as a shard does
        self._coordinator = Coordinator(own, Config.from_json(config))

    def made_of(self) -> tuple[str, dict[str, Any]]:
        return self._folder, self._config

    def join(self, rank: int | None) -> dict[str, Any]:
        return self._coordinator.join(rank)

    def arrive(self, rank: int, client: int, step: int) -> dict[str, Any]:
        return self._coordinator.arrive(rank, client, step)

    def advance(self, client: int, pushes: int) -> None:
        self._coordinator.advance(client, pushes)


class _Metrics:
    """Numbers of a shard, as Ray shows them to Prometheus."""

    def __init__(self, server: str, shard: int) -> None:
        metrics = require("ray.util.metrics", "ray", "the parameter server")
        tags = {"server": server, "shard": str(shard)}
        self._gauges = {}
        for name, text in (
            ("rows", "Rows of all tables"),
            ("bytes", "Bytes of rows and index"),
            ("pushes", "Pushes that were applied"),
            ("pulls", "Pulls"),
            ("duplicates", "Pushes that came again, and were not applied again"),
            ("refused", "Pushes that were refused"),
            ("unsaved_changes", "Changes since the last snapshot"),
            ("push_ms", "Milliseconds of a push, 99th percentile of the last 4096"),
            ("pull_ms", "Milliseconds of a pull, 99th percentile of the last 4096"),
        ):
            gauge = metrics.Gauge(f"nb_sparse_adam_{name}", description=text, tag_keys=("server", "shard"))
            gauge.set_default_tags(tags)
            self._gauges[name] = gauge

    def set(self, stats: dict[str, Any]) -> None:
        for name, gauge in self._gauges.items():
            value = stats[name]
            gauge.set(value.get("p99", 0.0) if isinstance(value, dict) else value)


def shard_name(server: str, shard: int) -> str:
    """Return the name of a shard's actor."""
    return f"{server}/shard-{shard}"


def coordinator_name(server: str) -> str:
    """Return the name of the coordinator's actor."""
    return f"{server}/coordinator"


def start_shard(ray: Any, folder: Path, config: Config, number: int) -> Any:
    """Start a shard, which may already be running."""
    options = _options(shard_name(config.name, number), _CALLS, config.cpus_per_shard)
    made = ray.remote(ShardActor).options(**options)
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
