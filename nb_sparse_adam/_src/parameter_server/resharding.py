# SPDX-License-Identifier: Apache-2.0
"""What N shards have on the disk -> the folders of M shards that go on with the same rows.

Nothing here knows of Ray. The source is a server that is not running, however it has ended: each of its
shards is its last snapshots, and what its log says came after them. Buckets are dealt out in order, so that
the new shards, one after the other, need the old ones one after the other, too: each of these is read once.
In memory are, at one time, an old shard, the rows of a new one, and one array of these once more.

A row keeps all it has, byte for byte: values, moments, counts, and how often it was seen. What belongs to a
shard as a whole is that of the old shard, where a new one has rows of a single old one; of several,

* ids have come in the order of their places in the old shards' orders, and at the same place in that of the
  shards;
* times are on one clock (`timelines`), so that the least recent row is the same, and ages go on;
* the filter of ``admission`` has, for each counter, the largest one. All sightings of an id were counted by
  one shard, whose counters are no larger than these: no id is admitted too late. The numbers that chances
  are drawn with go on from the largest one.
* what was dropped, evicted or skipped by an old shard is counted by the first of the new ones that has
  something of it: sums over all shards stay;
* counts of steps, of pushes, and a count that a whole table has, are the same in all shards, for each push
  goes to all. Where shards have lost pushes (``durability="snapshot"``) they are not: the largest one counts.

A step of all workers that was committed, but not applied by all shards, is applied; parts of one that was not
are left behind. (Without a log, a shard may have lost its parts, as it may have lost pushes.) All clients of
the old server are refused by the new one, so that nothing is applied twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.checkpoint.table_saving import write_full
from nb_sparse_adam._src.parameter_server import coordinator
from nb_sparse_adam._src.parameter_server.folders import COORDINATOR, check_new, shard_folder, write_config
from nb_sparse_adam._src.parameter_server.holding import Hold
from nb_sparse_adam._src.parameter_server.log import Log
from nb_sparse_adam._src.parameter_server.routing import BUCKETS, shards_of
from nb_sparse_adam._src.parameter_server.shard import Shard, extra_of
from nb_sparse_adam._src.parameter_server.snapshots import first_of
from nb_sparse_adam._src.parameter_server.spec import Config
from nb_sparse_adam._src.parameter_server.windows import Windows
from nb_sparse_adam._src.table.capture import Capture
from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam._src.table.snapshot import ARRAYS, OF_ROWS, SnapshotError, check_room, numbers_of
from nb_sparse_adam._src.table.timelines import Timeline
from nb_sparse_adam.errors import CheckpointError, ServerError

_COUNTED = ("dropped", "evicted", "skipped")  # of `snapshot.NUMBERS`: summed over shards

POINTS = ("a shard written", "all shards written")


def _reached(point: str) -> None:
    """Do nothing: tests replace it by something that ends the process here."""


def reshard(source: Path, old: Config, folder: Path, new: Config) -> None:
    """Write the folders of a new server, of another number of shards, that goes on with what one had.

    Parameters
    ----------
    source : Path
        Of a server that is not running. It is only read.
    old : Config
        What it is made of.
    folder : Path
        Of the new one. It becomes that of a server, which can be attached to, as the last thing.
    new : Config
        With the same tables.

    Raises
    ------
    CheckpointError
        If what is in the source is damaged, or a new shard would have more rows than it has room for.
    LogError
        If the source is running.
    ServerError
        If a shard of the source is missing, or the folder has been used.
    """
    check_new(folder)
    with ExitStack() as stack:
        own = [source / COORDINATOR, *(shard_folder(source, number) for number in range(old.shards))]
        for there in own:
            if not there.is_dir():
                raise ServerError(
                    f"{source} has no {there.name}, expected a coordinator and {old.shards} shards: bring it "
                    "back"
                )
            stack.callback(Hold(there, reads=True).let_go)  # to the end: nobody is to start it meanwhile
        noted = coordinator.last_note(source / COORDINATOR)
        if not noted.starts:
            raise ServerError(f"{source / COORDINATOR} has no log, expected one of a server that has started")
        windows = Windows()
        windows.forget_all(noted.highest)
        before: _Old | None = None
        moment = time.time()
        for number in range(new.shards):
            gathered = {name: _Gathered(spec.make(name, by_age=False)) for name, spec in new.tables.items()}
            step, pushes = noted.committed, 0
            for at in _overlapping(number, new.shards, old.shards):
                if before is None or before.shard.number != at:
                    before = None  # first: there is to be one in memory
                    shard = Shard(shard_folder(source, at), old, at, reads=True)
                    shard.catch_up(noted.committed, dict(noted.parts), moment)
                    before = _Old(shard)
                    del shard
                step, pushes = max(step, before.shard.step), max(pushes, before.shard.pushes)
                for name, each in gathered.items():
                    before.give(name, each, number, new.shards)
            extra = extra_of(number, new, windows, step, pushes)
            _write(shard_folder(folder, number), gathered, extra)
            _reached("a shard written")
        log = Log(folder / COORDINATOR)
        coordinator.write_note(log, noted)
        log.close()
        _reached("all shards written")
        write_config(folder, new)


def _overlapping(number: int, shards: int, others: int) -> Iterator[int]:
    """Give those of other shards, in order, that have buckets of a shard."""
    first, following = (-(-each * BUCKETS // shards) for each in (number, number + 1))
    yield from range(first * others // BUCKETS, (following - 1) * others // BUCKETS + 1)


class _Old:
    """An old shard in memory, as it is when this is made."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._captures = {name: Capture(table) for name, table in shard.tables.items()}
        self._arrays = {name: capture.arrays() for name, capture in self._captures.items()}
        self._numbers = {name: numbers_of(table) for name, table in shard.tables.items()}

    def give(self, name: str, to: _Gathered, number: int, shards: int) -> None:
        """Give a new shard its rows of a table."""
        arrays, numbers = self._arrays[name], self._numbers[name]
        own = np.flatnonzero(shards_of(arrays["ids"][:], shards) == number)
        of_rows = {each: arrays[each][own] for each in OF_ROWS}
        steps = arrays["steps"]
        of_rows["steps"] = steps[own] if steps.shape else steps[...]
        others = {each: arrays[each][...] for each in ARRAYS if each not in of_rows}
        to.parts.append({**of_rows, **others})
        to.numbers.append(numbers)
        self._numbers[name] = {**numbers, **dict.fromkeys(_COUNTED, 0)}


class _Gathered:
    """A new shard's rows of a table, from old shards; and one of the same options, without rows."""

    def __init__(self, table: EmbeddingTable) -> None:
        self.table = table
        self.parts: list[dict[str, NDArray[Any]]] = []
        self.numbers: list[dict[str, int]] = []

    def merged(self, where: Path) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
        """Give `snapshot.ARRAYS` and `snapshot.NUMBERS`; the parts are taken apart."""
        parts, numbers = self.parts, self.numbers
        rows = sum(len(part["ids"]) for part in parts)
        try:
            check_room(self.table, rows, "restore to more shards")
        except SnapshotError as error:
            raise CheckpointError(f"{where}, which is not written, {error}") from error
        if len(parts) == 1:
            return parts[0], numbers[0]
        timeline = Timeline([_ages_of(part) for part in parts])
        clocks = [np.array([each["clock"]]) for each in numbers]
        clock = max(int(timeline.at(k, each)[0]) for k, each in enumerate(clocks))
        for k, part in enumerate(parts):
            part["touched"] = timeline.at(k, part["touched"])
        order = np.argsort(np.concatenate([part["ids"] for part in parts]), kind="stable")
        whose = np.repeat(np.arange(len(parts)), [len(part["ids"]) for part in parts])
        admitted = np.concatenate([part.pop("admitted") for part in parts])
        places = np.empty(rows, np.int64)
        places[np.lexsort((whose, admitted))] = np.arange(1, rows + 1)
        arrays: dict[str, NDArray[Any]] = {"admitted": places[order]}
        del whose, admitted, places
        for name in (*OF_ROWS, "steps"):
            if name != "admitted":
                every = [part.pop(name) for part in parts]
                arrays[name] = np.concatenate(every)[order] if every[0].ndim else np.asarray(np.max(every))
        arrays["counters"] = np.max([part["counters"] for part in parts], 0)
        arrays["ages_clock"], arrays["ages_seconds"], arrays["ages_steps"] = timeline.entries
        made = {name: max(each[name] for each in numbers) for name in ("steps", "draws")}
        made |= {name: sum(each[name] for each in numbers) for name in _COUNTED}
        return arrays, {**made, "clock": clock, "admitted": rows}


def _ages_of(part: dict[str, NDArray[Any]]) -> Any:
    return tuple(part[f"ages_{name}"] for name in ("clock", "seconds", "steps"))


def _write(folder: Path, gathered: dict[str, _Gathered], extra: dict[str, Any]) -> None:
    """Write a shard's first snapshot."""
    tables = {name: (each.table, *each.merged(folder)) for name, each in gathered.items()}
    write_full(first_of(folder / "snapshots"), tables, extra)
