# SPDX-License-Identifier: Apache-2.0
"""A parameter server on this machine, beside bare Ray actors that move the same arrays.

    python -m benchmarks.parameter_server [--quick] [--json FILE]

* *Moves*: pulls and pushes of 1k, 10k and 100k rows of 64 float32. In turn with each, bare actors, as many
  as there are shards, are given the same arrays and give the same back. Beside both what the shards
  themselves took, by their own clocks: the limit is 1.3 times the bare actors, plus that.
* *In process*: the same look-ups and updates of an `EmbeddingTable` here.
* *Log*: pushes with ``durability="log"``, in turn with a server without.
* *Scaling*: rows a second, and p50 and p99, for shards and workers.
* *Recovery*: how long a shard takes to come back, from a snapshot and from its log.
* *Pauses*: how long a snapshot keeps pushes out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# What only this needs is imported where it is used: asv imports this file with the package of older commits.

DIM = 64
ROWS = (1_000, 10_000, 100_000)
LIMIT = 1.3


def milliseconds(work: Callable[[], Any]) -> float:
    """Time a call."""
    begun = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begun)


def in_turn(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time several things in turn, after a first round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            taken = milliseconds(work)
            if turn:
                found[name].append(taken)
    return found


class Servers:
    """Servers in folders that go with this object."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nb-sparse-adam-"))
        self._made: list[Any] = []

    def make(self, shards: int, durability: str = "snapshot", **options: Any) -> Any:
        """Make a server of one table."""
        from nb_sparse_adam.parameter_server import ParameterServer, TableSpec

        name = f"bench-{len(self._made)}"
        options = {"snapshot_interval": 1e6, **options}
        server = ParameterServer.create(
            name, {"table": TableSpec(DIM)}, shards=shards, durability=durability,
            checkpoint_dir=self.folder / name, **options,
        )  # fmt: skip
        self._made.append(server)
        return server

    def end(self, server: Any) -> None:
        """End a server, and let go of what it has on the disk."""
        server.shutdown()
        shutil.rmtree(self.folder / server.name, ignore_errors=True)

    def close(self) -> None:
        """Let go of all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def fill(client: Any, rows: int, at_once: int = 100_000) -> None:
    """Give ids 0 to rows - 1 a row each."""
    for first in range(0, rows, at_once):
        ids = np.arange(first, min(first + at_once, rows))
        client.push({"table": (ids, np.ones((len(ids), DIM), np.float32))})


def bare_actors(number: int) -> list[Any]:
    """Start actors that give back and take arrays, and do nothing else."""
    import ray

    @ray.remote(num_cpus=0)
    class Bare:
        def __init__(self) -> None:
            self._vectors = np.ones((max(ROWS), DIM), np.float32)

        def pull(self, ids: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            return 0, {"table": self._vectors[: len(ids["table"])]}

        def push(self, client: int, sequence: int, payload: Any, version: int) -> int:
            return client + sequence + version + len(payload)

    return [Bare.remote() for _ in range(number)]


def moves(servers: Servers, shards: int, table_rows: int, repeats: int) -> list[dict[str, Any]]:
    """Time pulls and pushes beside bare actors, and beside a table in this process."""
    import ray

    from nb_sparse_adam import EmbeddingTable
    from nb_sparse_adam._src.parameter_server.routing import route

    server = servers.make(shards)
    client = server.client()
    fill(client, table_rows)
    here = EmbeddingTable(DIM, num_threads=1)
    for first in range(0, table_rows, 100_000):
        here.lookup(np.arange(first, min(first + 100_000, table_rows)))
    bare = bare_actors(shards)
    rng, found = np.random.default_rng(0), []
    for rows in ROWS:
        ids = rng.choice(table_rows, rows, replace=False)
        grads = rng.normal(size=(rows, DIM)).astype(np.float32)
        routed = route(ids, shards)
        sums, _ = routed.sum(grads)
        parts = [routed.of_shard(shard) for shard in range(shards)]
        own = [{"table": routed.ids[part]} for part in parts]
        sent = [{"table": (routed.ids[part], routed.times[part], sums[part])} for part in parts]

        def bare_pull(own: Any = own) -> Any:
            return ray.get([each.pull.remote(ids) for each, ids in zip(bare, own, strict=True)])

        def bare_push(sent: Any = sent) -> Any:
            return ray.get([each.push.remote(1, 1, given, 1) for each, given in zip(bare, sent, strict=True)])

        works: dict[str, dict[str, Callable[[], Any]]] = {
            "pull": {
                "server": lambda ids=ids: client.pull({"table": ids}),
                "bare": bare_pull,
                "in process": lambda ids=ids: here.lookup(ids, train=False),
            },
            "push": {
                "server": lambda ids=ids, grads=grads: client.push({"table": (ids, grads)}),
                "bare": bare_push,
                "in process": lambda ids=ids, grads=grads: here.update(ids, grads),
            },
        }
        for what, each in works.items():
            server._of_all("stats", "forget_latencies")
            times = in_turn(each, repeats)
            inside = [shard[f"{what}_ms"]["p50"] for shard in server.stats()["shards"]]
            medians = {name: float(np.median(taken)) for name, taken in times.items()}
            found.append(
                {
                    "what": what, "rows": rows, "shards": shards, "milliseconds": medians,
                    "p99": {name: float(np.percentile(taken, 99)) for name, taken in times.items()},
                    "in the shard": max(inside),
                    "of the bare actors, less the shard": (medians["server"] - max(inside)) / medians["bare"],
                }
            )  # fmt: skip
            print(found[-1], file=sys.stderr)
    servers.end(server)
    for actor in bare:
        ray.kill(actor)
    return found


def log(servers: Servers, shards: int, repeats: int) -> list[dict[str, Any]]:
    """Time pushes with a log and without, in turn."""
    made = {durability: servers.make(shards, durability) for durability in ("snapshot", "log")}
    clients = {durability: server.client() for durability, server in made.items()}
    rng, found = np.random.default_rng(0), []
    for rows in ROWS:
        grads = rng.normal(size=(rows, DIM)).astype(np.float32)
        given = {"table": (np.arange(rows), grads)}
        times = in_turn({name: partial(client.push, given) for name, client in clients.items()}, repeats)
        found.append(
            {
                "rows": rows, "shards": shards,
                "milliseconds": {name: float(np.median(taken)) for name, taken in times.items()},
                "p99": {name: float(np.percentile(taken, 99)) for name, taken in times.items()},
            }
        )  # fmt: skip
        print(found[-1], file=sys.stderr)
    for server in made.values():
        servers.end(server)
    return found


def scaling(servers: Servers, most: int, seconds: float, rows: int = 10_000) -> list[dict[str, Any]]:
    """Count the rows a second that workers pull and push, for several numbers of shards and workers."""
    import ray

    @ray.remote(num_cpus=0)
    def work(name: str, seed: int, seconds: float) -> list[float]:
        from nb_sparse_adam.parameter_server import ParameterServer

        client = ParameterServer.attach(name).client()
        rng = np.random.default_rng(seed)
        grads = rng.normal(size=(rows, DIM)).astype(np.float32)
        taken: list[float] = []
        ids = rng.integers(0, 1_000_000, rows)
        client.pull({"table": ids})
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            following = rng.integers(0, 1_000_000, rows)
            gradients = {"table": (ids, grads)}
            begun = time.perf_counter()
            client.push_pull(gradients, {"table": following})
            taken.append(1e3 * (time.perf_counter() - begun))
            ids = following
        return taken

    found = []
    for shards in (1, 2, 4)[: most.bit_length()]:
        server = servers.make(shards)
        fill(server.client(), 1_000_000)
        for workers in (1, 2, 4):
            taken = ray.get([work.remote(server.name, seed, seconds) for seed in range(workers)])
            every = np.concatenate([np.array(each) for each in taken])
            found.append(
                {
                    "shards": shards, "workers": workers, "rows": rows,
                    "million rows a second": sum(len(each) * rows / sum(each) for each in taken) / 1e3,
                    "p50": float(np.percentile(every, 50)), "p99": float(np.percentile(every, 99)),
                }
            )  # fmt: skip
            print(found[-1], file=sys.stderr)
        servers.end(server)
    return found


def recovery(servers: Servers, rows: int) -> list[dict[str, Any]]:
    """Time how long a shard takes to be there again after `kill -9`, and what a snapshot holds up."""
    import os
    import signal

    found = []
    for durability in ("snapshot", "log"):
        server = servers.make(1, durability)
        client = server.client()
        fill(client, rows)
        snapshot = 0.0
        if durability == "snapshot":
            snapshot = milliseconds(server.snapshot)
        before = server.stats()["shards"][0]
        os.kill(before["pid"], signal.SIGKILL)
        taken = milliseconds(lambda client=client: client.pull({"table": [0]}))
        after = server.stats()["shards"][0]
        assert after["rows"] == rows
        found.append(
            {
                "from": durability, "rows": rows, "seconds": taken / 1e3,
                "seconds for the snapshot": snapshot / 1e3,
                "milliseconds without pushes": before["snapshot_pause_ms"].get("max", 0.0),
            }
        )  # fmt: skip
        print(found[-1], file=sys.stderr)
        servers.end(server)
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure, and write what was found."""
    from nb_sparse_adam._src.bench.comparison import describe
    from nb_sparse_adam._src.bench.settings import Settings
    from nb_sparse_adam._src.engine.threads import max_threads
    from nb_sparse_adam._src.parameter_server.server import connect

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small and few: to see that it works")
    parser.add_argument("--json", type=Path, default=Path("parameter-server.json"))
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    ray = connect(None)
    servers = Servers()
    try:
        table_rows, repeats = (100_000, 3) if quick else (1_000_000, 25)
        shards = (2,) if quick else (1, 2)
        result = {
            **describe(Settings(peers=(), threads=max_threads(), quick=quick)),
            "limit": LIMIT,
            "moves": [each for number in shards for each in moves(servers, number, table_rows, repeats)],
            "log": log(servers, 2, repeats),
            "scaling": scaling(servers, 1 if quick else 4, 0.5 if quick else 5.0),
            "recovery": recovery(servers, 20_000 if quick else 1_000_000),
        }
    finally:
        servers.close()
        ray.shutdown()
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
