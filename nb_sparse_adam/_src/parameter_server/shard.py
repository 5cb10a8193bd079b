# SPDX-License-Identifier: Apache-2.0
"""A shard: some rows of each of a server's tables, in a process that may die at any moment.

Nothing here knows of Ray: `actor` makes a process of it. What changes a shard is a *record*, plain values and
arrays, and what is done then follows from the record and the shard alone, the time included. So a shard that
starts again reads its last snapshot, does again what its log says came after it, and has the bytes that it
had.

::

    push ── checked ──► log ──► applied ──► (wait for the disk) ──► acknowledged
              │          └─ the same lock: the order of the log is that in which pushes are applied
              └─ what is refused has changed nothing, and is not in the log
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.gradients import RowGradient
from nb_sparse_adam._src.parameter_server.events import tell_event
from nb_sparse_adam._src.parameter_server.frames import decode, encode
from nb_sparse_adam._src.parameter_server.holding import Hold
from nb_sparse_adam._src.parameter_server.log import Log, records
from nb_sparse_adam._src.parameter_server.payloads import (
    Payload,
    arrays_in,
    check_payload,
    find_table,
    payload_of,
)
from nb_sparse_adam._src.parameter_server.rooms import Rooms
from nb_sparse_adam._src.parameter_server.snapshots import Snapshots
from nb_sparse_adam._src.parameter_server.spec import Config
from nb_sparse_adam._src.parameter_server.steps import Staged
from nb_sparse_adam._src.parameter_server.windows import MOST, Windows
from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam.errors import LogError, SparseAdamError

POINTS = (
    "doing again", "before the log", "logged", "within the tables", "applied", "before the acknowledgement",
)  # fmt: skip
CONDITIONS = ("older_than_steps", "older_than_seconds", "seen_fewer_than", "down_to")
_LATENCIES = 4096  # that percentiles are made of
_ROWS_AT_ONCE = 1 << 20  # that are looked at for their age, under the lock


def _reached(point: str) -> None:
    """Do nothing: tests replace it by something that ends the process here."""


class Shard:
    """One shard of a server.

    Parameters
    ----------
    folder : Path
        Its own. Made if need be; what is there is gone on with.
    config : Config
    number : int
        Which of the shards.
    reads : bool, default False
        Whether to write nothing: what the shard has is read into memory, and stays there. Who asks for it
        holds the folder.

    Raises
    ------
    CheckpointError
        If what is in the folder is damaged.
    LogError
        If another process is this shard.
    """

    def __init__(self, folder: Path, config: Config, number: int, reads: bool = False) -> None:
        self._config, self.number = config, number
        self._writing = threading.Lock()  # what changes the shard
        self._saving = threading.Lock()
        self._windows = Windows()
        self._staged = Staged()
        self._counts = dict.fromkeys(("pushes", "pulls", "duplicates", "refused", "lost_pushes"), 0)
        self._of_step = 0  # the last step that has been applied, where steps are of all workers
        self._latencies: dict[str, deque[float]] = {
            name: deque(maxlen=_LATENCIES) for name in ("pull", "push", "staleness", "pause")
        }
        self._started = time.time()
        self._unsaved = 0
        self._saved_at = time.monotonic()
        self._failure: str | None = None  # why the last snapshot failed
        self._again = folder.exists()
        if not reads:
            folder.mkdir(parents=True, exist_ok=True)
            self.hold = Hold(folder)
        self._log: Log | None = None
        with ExitStack() as failed:
            if not reads:  # who mends it starts again, while the error may be kept, and this with it
                failed.callback(self.hold.let_go)
            self._snapshots = Snapshots(folder / "snapshots")
            self._recover(folder, reads)
            failed.pop_all()
        self._met: set[int] = set()  # incarnations that have pushed since the start

    # --- starting -----------------------------------------------------------------------------------------

    def _recover(self, folder: Path, reads: bool) -> None:
        begun = time.monotonic()
        config, replayed = self._config, 0
        begin = first = 0
        if self._snapshots.chain:
            self.tables, extra = self._snapshots.load()
            begin, first = int(extra["log"]), int(extra["staged_from"])
            self._windows = Windows.from_json(extra["windows"])
            self._of_step = int(extra["step"])
            self._counts["pushes"] = int(extra["pushes"])
            for name, table in self.tables.items():
                table.num_threads = config.tables[name].options.get("num_threads", config.threads)
        else:
            self.tables = {
                name: spec.make(name, config.threads, by_age=False) for name, spec in config.tables.items()
            }
        if config.durability == "log":
            if not reads:
                self._log = Log(folder / "log", begin)
            for record in records(folder / "log", first):
                try:
                    head, arrays = decode(record.content)
                except ValueError as error:
                    raise LogError(
                        f"{folder / 'log'}: record {record.number:,} is of something else: {error}"
                    ) from error
                if record.number >= begin or head["kind"] == "stage":
                    _reached("doing again")
                    with suppress(SparseAdamError):  # it was refused then as well: there was no room
                        self._do(record.number, head, arrays)
                    replayed += 1
            self._unsaved = replayed
        tell_event(
            "shard read" if reads else "shard started",
            config,
            self.number,
            replayed=replayed,
            seconds=time.monotonic() - begun,
        )

    # --- pulls --------------------------------------------------------------------------------------------

    def pull(
        self, ids: Mapping[str, NDArray[np.int64]], train: bool = True, rooms: Rooms | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Return how many pushes have been applied, and the vectors of ids, which are there once each.

        Nothing changes. What has no row gets its initial value, or, if it is not for training, what
        ``unknown`` of the table says. With ``rooms`` the vectors are in memory that the same thread's next
        pull writes to.
        """
        begun = time.perf_counter()
        version = self._counts["pushes"]
        found = {}
        for name, each in ids.items():
            table = self._table(name)
            out = None if rooms is None else rooms.room(name, len(each), table.dim, table.dtype)
            found[name] = table._peek(each, train, out)
        self._counts["pulls"] += 1
        self._latencies["pull"].append(time.perf_counter() - begun)
        return version, found

    # --- pushes -------------------------------------------------------------------------------------------

    def push(self, client: int, sequence: int, payload: Payload, version: int | None = None) -> int:
        """Apply a push, if it has not been; return how many have been applied. It is durable then.

        Parameters
        ----------
        client : int
            The incarnation.
        sequence : int
        payload : dict of str to (ids, times, grads)
        version : int, optional
            How many pushes had been applied when the client pulled.
        """
        return self._change(
            {"kind": "push", "client": client, "sequence": sequence},
            payload,
            lambda: self._windows.has(client, sequence),
            version,
        )

    def stage(self, step: int, rank: int, client: int, payload: Payload) -> int:
        """Keep a worker's part of a step until all workers' are there."""
        head = {"kind": "stage", "step": step, "rank": rank, "client": client}
        return self._change(
            head, payload, lambda: step <= self._of_step or self._staged.has(step, rank, client), None
        )

    def commit(self, step: int, parts: Mapping[int, int]) -> list[int]:
        """Apply a step, if it has not been.

        Parameters
        ----------
        step : int
        parts : dict of int to int
            The incarnation of each rank.

        Returns
        -------
        list of int
            The ranks whose parts are not here: they are to be staged again.
        """
        missing: list[int] = []

        def is_known() -> bool:
            if step > self._of_step:
                missing.extend(
                    rank for rank, client in parts.items() if not self._staged.has(step, rank, client)
                )
            return step <= self._of_step or bool(missing)

        self._change(_commit_head(step, parts), {}, is_known, None)
        return missing

    def catch_up(self, step: int, parts: Mapping[int, int], moment: float) -> None:
        """Apply a step that the coordinator has committed, if that was not done: in memory, without a log.

        Raises
        ------
        LogError
            If parts of it are missing that the log should have.
        """
        if step <= self.step:
            return
        missing = [rank for rank, client in parts.items() if not self._staged.has(step, rank, client)]
        if not missing:
            with suppress(SparseAdamError):  # there was no room for it
                self._do(-1, {**_commit_head(step, parts), "time": moment}, {})
        elif self._config.durability == "log":
            raise LogError(
                f"shard {self.number} has no parts of ranks {missing} of step {step}, which all workers have "
                "pushed, expected them in its log: bring back its folder as it was"
            )
        self._of_step = max(self._of_step, step)

    @property
    def step(self) -> int:
        """The last step of all workers that has been applied."""
        return self._of_step

    @property
    def pushes(self) -> int:
        """How many have been applied."""
        return self._counts["pushes"]

    def evict(self, name: str, conditions: Mapping[str, Any]) -> NDArray[np.int64]:
        """Let rows of a table go, as `EmbeddingTable.evict` does; return their ids."""
        table = self._table(name)
        wanted = [conditions.get(each) for each in CONDITIONS]
        found = table._conditions(*(wanted if conditions else self._by_age(name)))
        return self._evict(name, lambda now: table._ids_to_go(found, now))

    def _evict(self, name: str, going: Callable[[float], NDArray[np.int64]]) -> NDArray[np.int64]:
        with self._writing:
            ids = going(time.time())
            number = self._write({"kind": "evict", "table": name}, {"ids": ids}) if len(ids) else -1
        self._wait_for(number)
        return ids

    def _change(
        self, head: dict[str, Any], payload: Payload, is_known: Callable[[], bool], version: int | None
    ) -> int:
        """Log and apply something, unless it has been; wait until it is on the disk."""
        begun = time.perf_counter()
        try:
            check_payload(self.tables, payload)
            with self._writing:
                if is_known():
                    number = -1 if self._log is None else self._log.next - 1
                    self._counts["duplicates"] += head["kind"] != "commit"
                else:
                    if version is not None:
                        self._latencies["staleness"].append(self._counts["pushes"] - version)
                    self._note_loss(head)
                    self._check_room(payload)
                    number = self._write({**head, "tables": list(payload)}, arrays_in(payload))
                applied = self._counts["pushes"]
        except SparseAdamError:
            self._counts["refused"] += 1
            raise
        self._wait_for(number)
        _reached("before the acknowledgement")
        self._latencies["push"].append(time.perf_counter() - begun)
        return applied

    def _check_room(self, payload: Payload) -> None:
        """Refuse new ids for which there is no room, before anything is logged or changed."""
        for name, (ids, _, _) in payload.items():
            table = self.tables[name]
            if table.capacity is not None and table._admission.at_once and not table._eviction.when_full:
                rows, missing = table._store.find(ids, table.num_threads)
                if missing > table._store.room:
                    table._make_room("push", ids[rows < 0], rows[rows >= 0])

    def _write(self, head: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> int:
        """Write a record, and do what it says; return its number."""
        head = {**head, "time": time.time()}
        number = -1
        if self._log is not None:
            _reached("before the log")
            number = self._log.append(*encode(head, arrays))
            _reached("logged")
        try:
            self._do(number, head, arrays)
        except SparseAdamError:  # it has changed no row's values, and will be refused when it is done again
            raise
        except Exception as error:  # as for want of memory: what is in memory is not what the log says
            if self._log is None:
                raise
            tell_event("shard ends", self._config, self.number, error=repr(error))
            os._exit(1)  # and starts again from the disk
        _reached("applied")
        self._unsaved += 1
        return number

    def _wait_for(self, number: int) -> None:
        if self._log is not None and number >= 0:
            self._log.wait_for(number)

    def _do(self, number: int, head: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Do what a record says. What it gives depends on nothing but the record and the shard."""
        moment = float(head["time"])
        for table in self.tables.values():
            table._ages.now = lambda: moment
        kind = head["kind"]
        if kind == "push":
            self._apply(payload_of(head["tables"], arrays))
            self._windows.note(head["client"], head["sequence"])
        elif kind == "stage":
            if head["step"] > self._of_step:
                payload = payload_of(head["tables"], arrays)
                self._staged.put(head["step"], head["rank"], head["client"], payload, number)
        elif kind == "commit":
            self._of_step = head["step"]  # what is refused here is refused for good
            self._apply(self._staged.take(head["step"], head["parts"]))
        elif kind == "evict":
            self.tables[head["table"]]._let_ids_go(arrays["ids"])
        elif kind == "saved":
            for table in self.tables.values():
                table._history.note_save(f"at record {number}", table._store.clock)

    def _apply(self, payload: Payload) -> None:
        """Count ids as seen, give rows to those that get one, and take a step of all tables."""
        for name, (ids, times, _) in payload.items():
            self.tables[name]._see(ids, times)
            _reached("within the tables")
        EmbeddingTable.update_together(
            {self.tables[name]: RowGradient(ids, grads) for name, (ids, _, grads) in payload.items()}
        )
        self._counts["pushes"] += 1

    def _note_loss(self, head: Mapping[str, Any]) -> None:
        """Count what a client has pushed that is not here any more, at its first push since a start."""
        client = head.get("sequence") and head["client"]
        if client and self._again and client not in self._met:
            self._counts["lost_pushes"] += max(head["sequence"] - self._windows.highest(client) - 1, 0)
            self._met.add(client)
            if len(self._met) > 2 * MOST:  # what is forgotten of them is refused
                self._met = {each for each in self._met if self._windows.highest(each)}

    def _table(self, name: str) -> EmbeddingTable:
        table: EmbeddingTable = find_table(self.tables, name)
        return table

    # --- snapshots ----------------------------------------------------------------------------------------

    def snapshot(self) -> bool:
        """Write a snapshot, if something has changed; return whether it was."""
        with self._saving:
            if not self._unsaved and self._snapshots.chain:
                return False
            if self._log is not None:
                self._log.begin_file()
            with self._writing:
                begun = time.perf_counter()
                number = 0 if self._log is None else self._write({"kind": "saved"}, {}) + 1
                kept_from = min(number, self._staged.first) if self._log is not None else 0
                extra = {
                    **extra_of(self.number, self._config, self._windows, self._of_step, self.pushes),
                    "log": number,
                    "staged_from": kept_from,
                }
                saving = self._snapshots.begin(self.tables, extra)
                changes, self._unsaved = self._unsaved, 0
                self._latencies["pause"].append(time.perf_counter() - begun)
            try:
                self._wait_for(number - 1)  # or the log could end before the number that the snapshot says
                self._snapshots.write(saving)
            except BaseException as error:
                self._unsaved += changes
                self._failure = str(error)
                raise
            self._failure, self._saved_at = None, time.monotonic()
            if self._log is not None:
                self._log.forget(kept_from)
            tell_event("snapshot written", self._config, self.number, pushes=extra["pushes"])
            return True

    def keep(self, stop: threading.Event, tell: Callable[[dict[str, Any]], None]) -> None:
        """Do, until it is stopped, what is done from time to time: snapshots, eviction by age, metrics."""
        tried_at = time.monotonic()
        while not stop.wait(min(1.0, self._config.interval / 2)):
            try:
                for name in self.tables:
                    self._evict_by_age(name)
                if time.monotonic() - tried_at >= self._config.interval:
                    tried_at = time.monotonic()  # if it fails, not again before the next interval
                    self.snapshot()
                tell(self.stats())
            except Exception as error:  # noqa: BLE001 (what comes next is done all the same)
                tell_event("background work failed", self._config, self.number, error=repr(error))

    def _by_age(self, name: str) -> tuple[Any, ...]:
        eviction = self._config.tables[name].options.get("eviction")
        return (*eviction[:3], None) if eviction is not None and eviction.by_age else (None,) * 4

    def _evict_by_age(self, name: str) -> None:
        conditions, table = self._by_age(name), self._table(name)
        if any(each is not None for each in conditions):
            self._evict(name, lambda now: table._ids_to_go(conditions, now, _ROWS_AT_ONCE))

    def close(self) -> None:
        """Write what is not on the disk yet; the folder is held until the process has ended."""
        self.snapshot()
        if self._log is not None:
            self._log.close()

    # --- what others want to know -------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Return numbers about this shard; see `ParameterServer.stats`."""
        tables = {name: table.stats() for name, table in self.tables.items()}
        return {
            "shard": self.number,
            "pid": os.getpid(),
            "uptime": time.time() - self._started,
            "rows": sum(each["rows"] for each in tables.values()),
            "bytes": sum(each["bytes_of_rows"] + each["bytes_of_index"] for each in tables.values()),
            **self._counts,
            "step": self._of_step,
            "clients": len(self._windows),
            "unsaved_changes": self._unsaved,
            "seconds_since_snapshot": time.monotonic() - self._saved_at,
            "snapshot_error": self._failure,
            "pull_ms": _percentiles(self._latencies["pull"], 1e3),
            "push_ms": _percentiles(self._latencies["push"], 1e3),
            "snapshot_pause_ms": _percentiles(self._latencies["pause"], 1e3),
            "staleness": _percentiles(self._latencies["staleness"], 1),
            "tables": tables,
        }

    def forget_latencies(self) -> None:
        """Begin percentiles anew."""
        for latencies in self._latencies.values():
            latencies.clear()

    def export(self, name: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Return ids and values of a table's rows, in the order of ids."""
        ids, values = self._table(name).export()
        order = np.argsort(ids)
        return ids[order], values[order]


def extra_of(number: int, config: Config, windows: Windows, step: int, pushes: int) -> dict[str, Any]:
    """Say what a snapshot has beside tables, of a shard whose log begins after it."""
    return {
        "shard": [number, config.shards],
        "log": 0,
        "staged_from": 0,
        "windows": windows.to_json(),
        "step": step,
        "pushes": pushes,
    }


def _commit_head(step: int, parts: Mapping[int, int]) -> dict[str, Any]:
    return {"kind": "commit", "step": step, "parts": sorted(parts.items())}


def _percentiles(latencies: deque[float], factor: float) -> dict[str, float]:
    if not latencies:
        return {}
    values = factor * np.array(latencies)
    found = np.percentile(values, (50, 99, 100))
    return dict(zip(("p50", "p99", "max"), map(float, found), strict=True))
