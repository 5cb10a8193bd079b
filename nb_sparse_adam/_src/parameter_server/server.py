# SPDX-License-Identifier: Apache-2.0
"""`ParameterServer`: made, attached to, looked at and ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.parameter_server import actor, folders
from nb_sparse_adam._src.parameter_server.calls import Calls, import_ray
from nb_sparse_adam._src.parameter_server.client import Client
from nb_sparse_adam._src.parameter_server.folders import Place
from nb_sparse_adam._src.parameter_server.payloads import find_table
from nb_sparse_adam._src.parameter_server.resharding import reshard
from nb_sparse_adam._src.parameter_server.shard import CONDITIONS
from nb_sparse_adam._src.parameter_server.spec import Config, TableSpec, check_config
from nb_sparse_adam._src.public import public
from nb_sparse_adam.errors import OptionError, OptionTypeError, ServerError

_PATIENCE = 120.0  # seconds, for what is neither pull nor push
_PATIENCE_TO_START = 600.0  # where kernels are not on the disk, all shards of a machine compile them at once


@public("nb_sparse_adam.parameter_server")
class ParameterServer:
    """Tables whose rows are dealt out to shards, which are processes on one machine or many.

    Made by `create` or `restore`, or found by `attach`. It lives until `shutdown`, whoever made it.
    """

    def __init__(self, ray: Any, folder: Path, config: Config, coordinator: Any, shards: list[Any]) -> None:
        self._ray, self._folder, self._config = ray, folder, config
        self._coordinator, self._shards = coordinator, shards

    def __repr__(self) -> str:
        config = self._config
        return (
            f"ParameterServer({config.name!r}, tables={list(config.tables)}, shards={config.shards}, "
            f"durability={config.durability!r}, consistency={config.consistency!r})"
        )

    # --- made and found -----------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        name: str,
        tables: Mapping[str, TableSpec],
        *,
        checkpoint_dir: Place,
        shards: int = 1,
        durability: str = "snapshot",
        consistency: Any = "async",
        workers: int | None = None,
        snapshot_interval: float = 60.0,
        step_timeout: float = 60.0,
        cpus_per_shard: float = 0,
        address: str | None = None,
    ) -> ParameterServer:
        """Start a server.

        What has been started when this fails, or is interrupted, stays: `attach` goes on with it, and
        `shutdown` ends it.

        Parameters
        ----------
        name : str
            By which it is found; of letters, digits, ".", "_" and "-".
        tables : mapping of str to TableSpec
        checkpoint_dir : path
            A folder that no server has used, which all machines of the cluster can reach.
        shards : int, default 1
        durability : {"snapshot", "log"}, default "snapshot"
            Whether a push that is acknowledged may be lost if a shard dies, as far as no snapshot has been
            written since; or is in a log on the disk before it is acknowledged.
        consistency : {"async", "sync"} or ("bounded", k), default "async"
            Whether each push is applied when it comes; or a step is the sum over all workers, in the order of
            their ranks, applied when all have pushed; or as with "async", but no worker is more than k steps
            ahead of the slowest that is alive.
        workers : int, optional
            How many there are, with "sync". With ("bounded", k), clients have ranks if it is given.
        snapshot_interval : float, default 60
            Seconds between snapshots.
        step_timeout : float, default 60
            Seconds in which all workers push, after the first of them, with "sync"; and after which a worker
            that is silent is not waited for, with ("bounded", k).
        cpus_per_shard : float, default 0
            What Ray sets aside for a shard, which uses as many threads, at least one.
        address : str, optional
            Of a Ray cluster, as ``ray.init`` takes it. By default the one that this process is connected to,
            or the one of this machine; if there is none, one is started, which ends with this process.

        Raises
        ------
        OptionError
            For an option outside its domain.
        ServerError
            If there is a server of that name, or `checkpoint_dir` has been used.
        """
        config = check_config(
            name, tables, shards, durability, snapshot_interval, consistency, workers, step_timeout,
            cpus_per_shard,
        )  # fmt: skip
        folder = folders.path_of("checkpoint_dir", checkpoint_dir)
        ray = connect(address)
        _check_cpus(ray, config)
        _check_name(ray, name)
        folders.check_new(folder)
        folders.write_config(folder, config)
        return cls._start(ray, folder, config)

    @classmethod
    def attach(
        cls, name: str, *, checkpoint_dir: Place | None = None, address: str | None = None
    ) -> ParameterServer:
        """Find a server, and start those of its processes that are gone.

        Parameters
        ----------
        name : str
        checkpoint_dir : path, optional
            Where it was created: needed if none of its processes is left, as on a new cluster.
        address : str, optional
            As in `create`.

        Raises
        ------
        ServerError
            If there is no such server, or a shard cannot be started; what is in its folder may be damaged.
        """
        ray = connect(address)
        coordinator = _find(ray, actor.coordinator_name(name))
        if coordinator is not None:
            found = Calls(ray, f"attach to {name!r}", [coordinator.made_of.remote], _end()).results()[0]
            return cls._start(ray, Path(found[0]), Config.from_json(found[1]))
        if checkpoint_dir is None:
            raise ServerError(
                f"there is no server {name!r} on this cluster; pass the checkpoint_dir of one that is to "
                "go on, or create it"
            )
        folder = folders.path_of("checkpoint_dir", checkpoint_dir)
        config = folders.read_config(folder)
        if config.name != name:
            raise ServerError(f"{folder} is of server {config.name!r}, expected {name!r}")
        return cls._start(ray, folder, config)

    @classmethod
    def _running(cls, ray: Any, name: str) -> ParameterServer:
        """Find a server all of whose processes are there, and start nothing."""
        coordinator = _find(ray, actor.coordinator_name(name))
        if coordinator is None:
            raise ServerError(
                f"there is no server {name!r} on this cluster: it was never made, was shut down, or its "
                "processes are gone; ParameterServer.attach, with its checkpoint_dir, starts them again"
            )
        made_of = Calls(ray, f"look at {name!r}", [coordinator.made_of.remote], _end()).results()[0]
        folder, config = Path(made_of[0]), Config.from_json(made_of[1])
        shards = [_find(ray, actor.shard_name(name, number)) for number in range(config.shards)]
        gone = [number for number, handle in enumerate(shards) if handle is None]
        if gone:
            raise ServerError(
                f"of {config.shards} shards of server {name!r} on this cluster, {gone} are gone; "
                f"ParameterServer.attach({name!r}) starts them again"
            )
        return cls(ray, folder, config, coordinator, shards)

    @classmethod
    def restore(
        cls,
        name: str,
        source: Place,
        *,
        checkpoint_dir: Place,
        shards: int | None = None,
        durability: str | None = None,
        consistency: Any = None,
        workers: int | None = None,
        snapshot_interval: float | None = None,
        step_timeout: float | None = None,
        cpus_per_shard: float | None = None,
        address: str | None = None,
    ) -> ParameterServer:
        """Start a server, of any number of shards, that goes on with the rows of one that is not running.

        All that a row has comes over byte for byte, and the order in which ids have come, ages, filters and
        counts go on (see Notes). This process reads one old shard after the other, and has in memory one of
        them, the rows of a new one, and one array of these once more.

        Parameters
        ----------
        name : str
            Of the new server; it may be that of the old one.
        source : path
            The checkpoint_dir of a server that is not running, however it has ended. It is only read.
        checkpoint_dir : path
            A folder that no server has used, which all machines of the cluster can reach. It becomes that of
            a server as the last thing: what is left of a restore that was killed is none.
        shards : int, optional
            By default as many as there were.
        durability, consistency, workers, snapshot_interval, step_timeout, cpus_per_shard : optional
            As in `create`; by default what the old server was made with. With another consistency, workers
            are those that are given.
        address : str, optional
            As in `create`.

        Raises
        ------
        OptionError
            For an option outside its domain.
        ServerError
            If there is a server of that name, `checkpoint_dir` has been used, or `source` is not complete.
        LogError
            If the old server is running, or its log is damaged.
        CheckpointError
            If a snapshot is damaged, or a new shard would have more rows than ``capacity``.

        Notes
        -----
        Rows of several old shards in a new one: their ids have come in the order of their places in the old
        shards' orders. Times are on one clock, so that ages in steps are what they were, and those in seconds
        too small by as much as shards were apart in time. Counters of sightings are the largest ones, so that
        no id is admitted later than it would have been; by ``admission`` with a probability, other ones may
        be. What an old shard has dropped, evicted and skipped is counted by the first new one with its rows.

        A step of all workers that was committed is applied. Clients of the old server are refused by the new
        one. Where shards have lost pushes (``durability="snapshot"``), the largest count of steps counts.
        """
        old_folder = folders.path_of("source", source)
        folder = folders.path_of("checkpoint_dir", checkpoint_dir)
        old = folders.read_config(old_folder)
        of_old = ("bounded", old.consistency) if isinstance(old.consistency, int) else old.consistency

        def chosen(given: Any, otherwise: Any) -> Any:
            return otherwise if given is None else given

        config = check_config(
            name, old.tables, chosen(shards, old.shards), chosen(durability, old.durability),
            chosen(snapshot_interval, old.interval), chosen(consistency, of_old),
            chosen(workers, old.workers if consistency is None else None),
            chosen(step_timeout, old.step_timeout), chosen(cpus_per_shard, old.cpus_per_shard),
        )  # fmt: skip
        ray = connect(address)
        _check_cpus(ray, config)
        _check_name(ray, name)
        reshard(old_folder, old, folder, config)
        return cls._start(ray, folder, config)

    @classmethod
    def _start(cls, ray: Any, folder: Path, config: Config) -> ParameterServer:
        coordinator = actor.start_coordinator(ray, folder, config)
        shards = [actor.start_shard(ray, folder, config, number) for number in range(config.shards)]
        made = cls(ray, folder, config, coordinator, shards)
        Calls(
            ray, f"starting {config.name!r}", [coordinator.made_of.remote], _end(_PATIENCE_TO_START)
        ).results()
        made._of_all("starting", "stats", patience=_PATIENCE_TO_START)
        return made

    # --- used ---------------------------------------------------------------------------------------------

    def client(self, rank: int | None = None, timeout: float = 60.0) -> Client:
        """Make a client.

        Parameters
        ----------
        rank : int, optional
            Of 0 to ``workers - 1``, where the server has `workers`. A client that comes with the rank of
            another one takes its place.
        timeout : float, default 60
            Seconds for each call.

        Raises
        ------
        ServerError
            If there is no such rank.
        """
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, np.integer))):
            raise OptionTypeError(f"rank is {rank!r} ({type(rank).__name__}), expected an int or None")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise OptionTypeError(f"timeout is {timeout!r}, expected seconds")
        if not timeout > 0:
            raise OptionError(f"timeout is {timeout}, expected seconds > 0")
        rank = None if rank is None else int(rank)
        return Client(self._ray, self._config, self._coordinator, self._shards, rank, float(timeout))

    @property
    def name(self) -> str:
        """By which it is found."""
        return self._config.name

    @property
    def tables(self) -> dict[str, TableSpec]:
        """What its tables are made of."""
        return dict(self._config.tables)

    def evict(self, table: str, **conditions: Any) -> NDArray[np.int64]:
        """Let rows of a table go.

        Parameters
        ----------
        table : str
        **conditions
            As in `EmbeddingTable.evict`; ``down_to`` is that of each shard.

        Returns
        -------
        (n,) int64 array
            The ids whose rows have gone.
        """
        find_table(self._config.tables, table)
        unknown = sorted(set(conditions) - set(CONDITIONS))
        if unknown:
            raise OptionError(f"evict got {unknown}, expected some of {', '.join(CONDITIONS)}")
        return np.concatenate(self._of_all("evict", "evict", table, conditions))

    def export(self, table: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Return ids, (rows,) int64, ascending, and values, (rows, dim), of a table.

        Each shard's are of one moment. All of it comes into the memory of this process.
        """
        find_table(self._config.tables, table)
        parts = self._of_all("export", "export", table)
        ids = np.concatenate([part[0] for part in parts])
        order = np.argsort(ids)
        return ids[order], np.concatenate([part[1] for part in parts])[order]

    def snapshot(self) -> None:
        """Have all shards write a snapshot now; return when it is on the disk."""
        self._of_all("snapshot", "snapshot")

    def stats(self) -> dict[str, Any]:
        """Return numbers about the server.

        Returns
        -------
        dict
            ``name``; ``rows``, ``bytes`` and ``pushes`` of all shards; ``imbalance``, rows of the largest
            shard over the mean; ``shards``, a dict for each: ``pid``, and ``address`` of its machine;
            ``rows``; ``bytes``; ``pushes`` that were applied, ``pulls``; ``duplicates``, pushes that came
            again; ``refused``; ``lost_pushes``, which were acknowledged, and lost when the shard died, at
            most ("snapshot"); ``clients`` whose pushes are known; ``unsaved_changes`` and
            ``seconds_since_snapshot``; ``staleness``, pushes between the pull and the push of a client;
            ``pull_ms``, ``push_ms`` and ``snapshot_pause_ms``, milliseconds in the shard, as percentiles of
            the last 4,096; ``tables``, `EmbeddingTable.stats`.
        """
        shards = self._of_all("stats", "stats")
        rows = [each["rows"] for each in shards]
        return {
            "name": self.name,
            "rows": sum(rows),
            "bytes": sum(each["bytes"] for each in shards),
            "pushes": sum(each["pushes"] for each in shards),
            "imbalance": max(rows) * len(rows) / sum(rows) if sum(rows) else 1.0,
            "shards": shards,
        }

    def shutdown(self) -> None:
        """End the server; what it has is on the disk, and `attach` goes on with it."""
        self._of_all("shutdown", "close")
        for handle in (*self._shards, self._coordinator):
            self._ray.kill(handle, no_restart=True)

    def _of_all(self, what: str, method: str, *arguments: Any, patience: float = _PATIENCE) -> list[Any]:
        begin = [partial(getattr(handle, method).remote, *arguments) for handle in self._shards]
        return Calls(self._ray, f"{what} of server {self.name!r}", begin, _end(patience)).results()


def client_of(name: str, rank: int | None, timeout: float) -> Client:
    """Make a client of a server that is running, in a process of the cluster."""
    return ParameterServer.attach(name).client(rank, timeout)


def connect(address: str | None, **more: Any) -> Any:
    """Connect to Ray, or start it; `more` is for ``ray.init``."""
    ray = import_ray()
    if not ray.is_initialized():
        own = {
            "namespace": actor.NAMESPACE, "include_dashboard": False, "log_to_driver": False,
            "logging_level": logging.WARNING,
        }  # fmt: skip
        try:
            ray.init(address=address, **{**own, **more})
        except ConnectionError as error:
            where = f"at {address}" if address else "that RAY_ADDRESS or this machine names"
            raise ServerError(
                f"the Ray cluster {where} cannot be reached: {error}. If it runs, it may ask for a token: by "
                "default one that `ray.init` started does, and a process that names its address sends "
                "one only with RAY_AUTH_MODE=token in its environment"
            ) from error
    return ray


def folder_of(ray: Any, name: str) -> Path | None:
    """Return the folder of a server of which the coordinator runs."""
    coordinator = _find(ray, actor.coordinator_name(name))
    if coordinator is None:
        return None
    return Path(Calls(ray, f"look at {name!r}", [coordinator.made_of.remote], _end()).results()[0][0])


def _end(patience: float = _PATIENCE) -> float:
    return time.monotonic() + patience


def _find(ray: Any, name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=actor.NAMESPACE)
    except ValueError:
        return None


def _check_name(ray: Any, name: str) -> None:
    if _find(ray, actor.coordinator_name(name)) is not None:
        raise ServerError(
            f"there is a server {name!r} already; use ParameterServer.attach({name!r}), or another name"
        )


def _check_cpus(ray: Any, config: Config) -> None:
    """Refuse what Ray would wait for without end."""
    wanted, there = config.cpus_per_shard * config.shards, ray.cluster_resources().get("CPU", 0.0)
    if wanted > there:
        raise OptionError(
            f"cpus_per_shard is {config.cpus_per_shard} with {config.shards} shards, expected at most "
            f"{there} CPUs in all: the cluster has no more"
        )
