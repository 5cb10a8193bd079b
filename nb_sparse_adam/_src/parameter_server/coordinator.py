# SPDX-License-Identifier: Apache-2.0
"""What all workers must agree on: who they are, and when a step is done.

Nothing here knows of Ray, and no gradient comes here. A worker that joins gets a number, its *incarnation*,
larger than any before it; of a rank the last one counts. With "sync", a step goes through these states::

    open ── all ranks have staged their parts on all shards, and say so ──► committed (on the disk) ──► next
      └──── step_timeout after the first of them ─────────────────────────► given up ────────────────► next

What is not on the disk was not committed. A worker that is told of a commit has all shards apply the step. A
coordinator that starts again knows the parts of the last step that was committed: of none before it can a
worker have missed the decision, for it has pushed since.

With ("bounded", k), a worker says after each push how many it has made, and waits until the slowest that is
alive has made at most k fewer. One that has not said anything for step_timeout is not alive.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nb_sparse_adam._src.parameter_server.log import Log, files_of, records
from nb_sparse_adam._src.parameter_server.spec import Config
from nb_sparse_adam.errors import ServerError, StaleClientError

_COMMITS_A_FILE = 4096
_PUSHES_A_NOTE = 16  # of bounded workers
_NUMBERS = 1 << 32  # incarnations of one start of the coordinator


class Note(NamedTuple):
    """What a coordinator has on the disk.

    Attributes
    ----------
    starts : int
        How often it has started.
    committed : int
        The last step that was committed, 0 if none was.
    parts : sequence of (int, int)
        Of that one: the incarnation of each rank.
    ranks : sequence of (int, int)
        The incarnation that each rank has.
    pushes : int
        Where pushes are bounded: at least one worker has made so many.
    """

    starts: int = 0
    committed: int = 0
    parts: Sequence[Any] = ()
    ranks: Sequence[Any] = ()
    pushes: int = 0

    @property
    def highest(self) -> int:
        """No worker has had a number above this one."""
        return (self.starts + 1) * _NUMBERS - 1


def last_note(folder: Path) -> Note:
    """Read what a coordinator has written last; nothing is written.

    Raises
    ------
    LogError
        If it is damaged.
    """
    noted = Note()
    files = files_of(folder)
    for record in records(folder, files[0][0]) if files else ():
        noted = Note(**json.loads(record.content))
    return noted


def write_note(log: Log, noted: Note) -> int:
    """Write it to the disk; return the number of the record."""
    number = log.append(json.dumps(noted._asdict()).encode())
    log.wait_for(number)
    return number


class Coordinator:
    """Numbers workers, and decides on steps.

    Parameters
    ----------
    folder : Path
        Its own. Made if need be.
    config : Config
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self._config = config
        self._changed = threading.Condition()  # of all that follows
        noted = last_note(folder)
        self._log = Log(folder)
        self._note(noted._replace(starts=noted.starts + 1))
        self._number = self._noted.starts * _NUMBERS
        self._ranks = dict(noted.ranks)  # rank -> incarnation
        self._step = noted.committed + 1  # that is open
        # Step -> its parts, None if it was given up.
        self._decided: dict[int, dict[int, int] | None] = {noted.committed: dict(noted.parts)}
        self._arrived: dict[int, int] = {}  # rank -> incarnation, in the open step
        self._first = 0.0  # when the first one arrived
        self._clocks: dict[int, tuple[int, float]] = {}  # incarnation -> pushes, when it said so
        self._waiting: dict[int, int] = {}  # incarnation -> how many of its calls wait

    def _note(self, noted: Note) -> None:
        number = write_note(self._log, noted)
        self._noted = noted  # it is on the disk
        if number % _COMMITS_A_FILE == _COMMITS_A_FILE - 1:
            self._log.forget(self._log.begin_file() - 1)

    def join(self, rank: int | None) -> dict[str, Any]:
        """Give a worker a number; return it, and the step that is open.

        Raises
        ------
        ServerError
            If the rank is not one of the workers.
        """
        workers = self._config.workers
        if rank is not None and (workers is None or not 0 <= rank < workers):
            raise ServerError(
                f"rank is {rank}, expected "
                + ("None: the server was made without workers" if workers is None else f"0 to {workers - 1}")
            )
        if rank is None and workers is not None:
            raise ServerError(f"rank is None, expected 0 to {workers - 1}: the server has {workers} workers")
        slowest = 0
        with self._changed:
            self._number += 1
            if rank is not None:
                ranks = {**self._ranks, rank: self._number}
                self._note(self._noted._replace(ranks=sorted(ranks.items())))
                self._clocks.pop(self._ranks.get(rank, 0), None)
                self._arrived.pop(rank, None)
                self._ranks = ranks
            if isinstance(self._config.consistency, int):
                self._clocks = {each: self._clocks[each] for each in self._alive()}
                slowest = self._slowest()
                self._clocks[self._number] = slowest, time.monotonic()
            self._changed.notify_all()
            committed = self._noted.committed
            parts = self._decided.get(committed)
            return {
                "client": self._number,
                "step": self._step,
                "decided": (committed, parts) if parts else None,
                "pushes": slowest,
            }

    # --- steps of all workers -----------------------------------------------------------------------------

    def arrive(self, rank: int, client: int, step: int) -> dict[str, Any]:
        """Say that a worker's part of a step is on all shards; wait until there is a decision.

        Returns
        -------
        dict
            ``parts``: the incarnation of each rank, if the step is committed; None if it is given up.
            ``late``: whether that was for want of this worker. ``step``: the one that is open now.
        """
        with self._changed:
            if self._ranks.setdefault(rank, client) < client:  # the coordinator has started again meanwhile
                self._ranks[rank] = client
            if self._ranks[rank] != client:
                raise StaleClientError(
                    f"client {client} is not the worker of rank {rank} any more: client {self._ranks[rank]} "
                    "is"
                )
            if step > self._step:  # it knows of a decision that this coordinator does not: of one given up
                self._decided.update(dict.fromkeys(range(max(self._step, step - 64), step)))
                self._step = step
                self._arrived.clear()
                self._changed.notify_all()
            late = step < self._step
            if late and step not in self._decided:  # long ago, or before this coordinator has started
                return {"parts": None, "late": True, "step": self._step}
            if step == self._step:
                if not self._arrived:
                    self._first = time.monotonic()
                self._arrived[rank] = client
                if len(self._arrived) == self._config.workers:
                    self._decide(dict(self._arrived))
            while step not in self._decided and step == self._step:
                left = self._first + self._config.step_timeout - time.monotonic()
                if left <= 0:
                    self._decide(None)
                else:
                    self._changed.wait(left)
            return {"parts": self._decided.get(step), "late": late, "step": self._step}

    def _decide(self, parts: dict[int, int] | None) -> None:
        if parts is not None:
            self._note(self._noted._replace(committed=self._step, parts=sorted(parts.items())))
        self._decided[self._step] = parts
        self._decided.pop(self._step - 64, None)
        self._step += 1
        self._arrived = {}
        self._changed.notify_all()

    # --- steps that are bounded ---------------------------------------------------------------------------

    def advance(self, client: int, pushes: int) -> None:
        """Say how many pushes a worker has made; wait until the slowest that is alive is near enough."""
        bound = self._config.consistency
        assert isinstance(bound, int)
        with self._changed:
            self._clocks[client] = pushes, time.monotonic()
            if pushes >= self._noted.pushes + _PUSHES_A_NOTE:
                self._note(self._noted._replace(pushes=pushes))
            self._waiting[client] = self._waiting.get(client, 0) + 1
            self._changed.notify_all()
            try:
                while pushes - self._slowest() > bound:
                    self._changed.wait(self._config.step_timeout / 8)  # or one may be alive no more
            finally:
                self._waiting[client] -= 1
                if not self._waiting[client]:
                    del self._waiting[client]
                self._clocks[client] = pushes, time.monotonic()

    def leave(self, client: int) -> None:
        """Do not wait for a worker any more."""
        with self._changed:
            self._clocks.pop(client, None)
            self._changed.notify_all()

    def _slowest(self) -> int:
        """Return the number of pushes of the slowest worker that is alive; if none is, about the highest.

        One that comes when all others are silent would otherwise have them wait for all that they have made.
        """
        return min((self._clocks[client][0] for client in self._alive()), default=self._noted.pushes)

    def _alive(self) -> list[int]:
        now, patience = time.monotonic(), self._config.step_timeout
        return [
            client
            for client, (_, said) in self._clocks.items()
            if client in self._waiting or now - said < patience
        ]
