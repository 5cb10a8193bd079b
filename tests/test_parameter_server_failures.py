# SPDX-License-Identifier: Apache-2.0
"""What fails in a shard or the coordinator: disks, memory, starts; none of it leaves what is half done."""

import errno
import os

import numpy as np
import pytest
from servers import batch, config, contents, opened, payload

from nb_sparse_adam import Eviction
from nb_sparse_adam._src.parameter_server import actor, holding, log, shard, snapshots
from nb_sparse_adam._src.parameter_server.calls import CannotStartError
from nb_sparse_adam._src.parameter_server.coordinator import Coordinator, last_note
from nb_sparse_adam._src.parameter_server.log import Log, records
from nb_sparse_adam._src.parameter_server.spec import TableSpec
from nb_sparse_adam.errors import LogError, TableError

pytestmark = pytest.mark.jit
FULL = {"item": TableSpec(4), "user": TableSpec(8, capacity=5)}


def fails(*_arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def ones(table, ids):
    return {table: (np.array(ids), np.ones((len(ids), FULL[table].dim), np.float32))}


def size_of_logs(folder):
    return sum(file.stat().st_size for file in folder.rglob("log-*"))


# --- pushes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("item", "user"), ("user", "item")])
def test_a_push_for_which_one_table_has_no_room_changes_none(tmp_path, order):
    served = opened(tmp_path, tables=FULL)
    served.push(9, 1, payload(ones("user", [1, 2, 3])))
    before, size = contents(served.tables), size_of_logs(tmp_path)
    parts = {**ones("item", [7, 8]), **ones("user", [3, 4, 5, 6])}
    with pytest.raises(TableError, match="room for 5 rows"):
        served.push(9, 2, payload({name: parts[name] for name in order}))
    assert contents(served.tables) == before
    assert size_of_logs(tmp_path) == size
    served.push(9, 2, payload(ones("item", [7, 8])))  # the number was not used up


def test_a_step_for_which_there_is_no_room_is_over_on_all_shards(tmp_path):
    """Each part has room, the sum has not; a shard that waited for it would wait for ever."""
    served = opened(tmp_path, tables=FULL, consistency="sync", workers=2)
    clients = {0: 5, 1: 6}

    def staged(step, *ids):
        for rank, each in enumerate(ids):
            served.stage(step, rank, clients[rank], payload(ones("user", each)))

    staged(1, [1, 2, 3], [4, 5, 6])
    with pytest.raises(TableError, match="room for 5 rows"):
        served.commit(1, clients)
    assert served.step == 1
    assert served.commit(1, clients) == []  # the other worker's
    assert len(served.tables["user"]) == 0
    staged(2, [1, 2], [2, 3])
    served = opened(tmp_path, tables=FULL, consistency="sync", workers=2)
    assert served.step == 1
    assert served.commit(2, clients) == []
    assert served.tables["user"].ids().tolist() == [1, 2, 3]


def test_a_process_whose_memory_is_not_what_its_log_says_ends(tmp_path, monkeypatch):
    class Ended(BaseException):
        pass

    def ends(status):
        raise Ended(status)

    def no_memory(*_arguments):
        raise MemoryError

    served = opened(tmp_path)
    served.push(9, 1, payload(batch(1)))
    with monkeypatch.context() as patched:
        patched.setattr(shard.Shard, "_apply", no_memory)
        patched.setattr(os, "_exit", ends)
        with pytest.raises(Ended):
            served.push(9, 2, payload(batch(2)))
    again = opened(tmp_path)
    assert again._windows.has(9, 2)  # it was logged, and is done again
    expected = opened(tmp_path / "other")
    for number in (1, 2):
        expected.push(9, number, payload(batch(number)))
    assert contents(again.tables) == contents(expected.tables)


def test_without_a_log_a_push_that_fails_is_not_known(tmp_path, monkeypatch):
    served = opened(tmp_path, durability="snapshot")
    with monkeypatch.context() as patched:
        patched.setattr(shard.Shard, "_apply", fails)
        with pytest.raises(OSError, match="No space"):
            served.push(9, 1, payload(batch(1)))
    assert not served._windows.has(9, 1)


def test_clients_that_have_been_met_are_remembered_as_long_as_their_pushes(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "MOST", 3)
    opened(tmp_path)
    served = opened(tmp_path)  # again: only then something may have been lost
    served._windows._most = 3
    for client in range(1, 40):
        served.push(client, 1, payload(ones("item", [client])))
    assert len(served._met) <= 6


# --- the log and snapshots --------------------------------------------------------------------------------


def test_a_log_whose_snapshot_is_further_begins_after_it(tmp_path):
    """The disk has what the snapshot holds, and lost the end of the log."""
    opened_log = Log(tmp_path)
    for number in range(3):
        opened_log.append(b"%d" % number)
    opened_log.close()
    again = Log(tmp_path, first=7)
    assert again.next == 7
    again.append(b"7")
    again.close()
    assert [(each.number, each.content) for each in records(tmp_path, 7)] == [(7, b"7")]
    with pytest.raises(LogError, match="ends before record 3"):
        list(records(tmp_path, 0))
    assert Log(tmp_path, first=7).next == 8


def test_no_snapshot_is_written_before_the_log_that_it_names(tmp_path, monkeypatch):
    write, seen = snapshots.Snapshots.write, []

    def looked_at(self, saving):
        seen.append(served._log._on_disk == served._log.next)
        write(self, saving)

    monkeypatch.setattr(snapshots.Snapshots, "write", looked_at)
    served = opened(tmp_path)
    for number in range(1, 4):
        served.push(9, number, payload(batch(number)))
        assert served.snapshot()
    assert seen == [True] * 3


def test_a_file_is_begun_though_others_write_all_the_time(tmp_path, monkeypatch):
    opened_log, flush = Log(tmp_path), Log._flush
    opened_log.append(b"first")

    def others_write(self, number):
        flush(self, number)
        self.append(b"more")

    monkeypatch.setattr(Log, "_flush", others_write)
    number = opened_log.begin_file()
    monkeypatch.setattr(Log, "_flush", flush)
    assert number == opened_log.next == opened_log._on_disk == 1 + log._TRIES
    opened_log.append(b"last")
    opened_log.close()
    assert [begin for begin, _ in log.files_of(tmp_path)] == [0, number]
    assert [each.content for each in records(tmp_path, 0)] == [b"first", *[b"more"] * log._TRIES, b"last"]


def test_snapshots_that_a_kill_has_left_are_deleted_by_the_next_full_one(tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def killed(point):
        if point == "a snapshot written":
            raise KilledError

    monkeypatch.setattr(snapshots, "_MOST_INCREMENTS", 0)  # each is a full one
    served = opened(tmp_path)
    for number in range(1, 4):
        served.push(9, number, payload(batch(number)))
        with monkeypatch.context() as patched:
            patched.setattr(snapshots, "_reached", killed)
            with pytest.raises(KilledError):
                served.snapshot()
        served = opened(tmp_path)
    assert len(list((tmp_path / "snapshots").iterdir())) == 3
    served.push(9, 4, payload(batch(4)))
    assert served.snapshot()
    assert len(list((tmp_path / "snapshots").iterdir())) == 1
    assert contents(opened(tmp_path).tables) == contents(served.tables)


# --- what is done from time to time -----------------------------------------------------------------------


class Clock:
    """Time that passes when somebody waits for it, and an event that is set after some of it."""

    def __init__(self, end):
        self.now, self._end = 0.0, end

    def wait(self, seconds):
        self.now += seconds
        return self.now > self._end


def test_a_snapshot_that_fails_is_tried_again_after_the_interval_and_all_else_is_done(tmp_path, monkeypatch):
    served, clock, told, tried = opened(tmp_path, interval=4.0), Clock(20.5), [], []
    monkeypatch.setattr(shard.time, "monotonic", lambda: clock.now)

    def tries(*_arguments):
        tried.append(clock.now)
        fails()

    monkeypatch.setattr(shard.Shard, "snapshot", tries)
    served.keep(clock, told.append)
    assert tried == [4.0, 8.0, 12.0, 16.0, 20.0]
    assert len(told) == 20 - len(tried)


def test_rows_grow_old_by_the_clock_though_nobody_pushes(tmp_path, monkeypatch):
    moment = [1000.0]
    monkeypatch.setattr(shard.time, "time", lambda: moment[0])
    tables = {"user": TableSpec(8, eviction=Eviction(older_than_seconds=10))}
    served = opened(tmp_path, tables=tables)
    served.push(9, 1, payload(batch(1, tables)))
    rows = len(served.tables["user"])
    moment[0] += 9
    served._evict_by_age("user")
    assert len(served.tables["user"]) == rows
    moment[0] += 2
    served._evict_by_age("user")
    assert len(served.tables["user"]) == 0
    assert contents(opened(tmp_path, tables=tables).tables) == contents(served.tables)


# --- starts and ends of processes -------------------------------------------------------------------------


@pytest.fixture
def made_here(tmp_path, monkeypatch):
    """The classes of actors, without Ray: what they are given comes from a folder."""
    monkeypatch.setattr(holding, "PATIENCE", 0.1)
    monkeypatch.setattr(actor, "_warm_up", lambda _config: None)
    monkeypatch.setattr(actor, "_show_events", lambda: None)

    class NoMetrics:
        def __init__(self, *_arguments):
            pass

        def set(self, _stats):
            pass

    monkeypatch.setattr(actor, "_Metrics", NoMetrics)
    started = []

    def made(**options):
        started.append(actor.ShardActor(str(tmp_path / "shard"), config(**options).to_json(), 0))
        return started[-1]

    yield made
    for each in started:
        each._stop.set()
        if each._started is not None:
            each._started.hold.let_go()


def test_a_shard_that_cannot_start_tells_who_calls_and_starts_when_it_can(tmp_path, made_here):
    (tmp_path / "shard").mkdir()
    held = holding.Hold(tmp_path / "shard")
    served = made_here()
    with pytest.raises(CannotStartError, match=r"shard 0 of server 'test' .*HeldError.*tries again") as told:
        served.push(9, 1, payload(batch(1)), None)
    assert told.value.passes
    held.let_go()
    assert served.push(9, 1, payload(batch(1)), None) == 1


def test_what_does_not_pass_by_itself_is_not_waited_for(tmp_path, made_here):
    before = opened(tmp_path / "shard")
    for number in range(1, 4):
        before.push(9, number, payload(batch(number)))
    before.hold.let_go()
    (file,) = tmp_path.rglob("log-*")
    whole = file.read_bytes()
    file.write_bytes(whole[:40] + b"?" + whole[41:])
    served = made_here()
    with pytest.raises(CannotStartError, match=r"LogError.*is damaged and has others behind it") as told:
        served.pull({}, True)
    assert not told.value.passes
    file.write_bytes(whole)
    assert served.pull({}, True)[0] == 3


def test_a_shard_that_cannot_be_closed_goes_on(made_here, monkeypatch):
    served = made_here()
    served.push(9, 1, payload(batch(1)), None)
    with monkeypatch.context() as patched:
        patched.setattr(snapshots.Snapshots, "write", fails)
        with pytest.raises(OSError, match="No space"):
            served.close()
    assert not served._stop.is_set()
    served.close()
    assert served._stop.is_set()


def test_a_coordinator_that_cannot_start_tells_who_calls_and_starts_when_it_can(tmp_path, made_here):
    (tmp_path / "coordinator").mkdir()
    held = holding.Hold(tmp_path / "coordinator")
    coordinator = actor.CoordinatorActor(str(tmp_path), config(consistency="sync", workers=1).to_json())
    with pytest.raises(CannotStartError, match=r"the coordinator of server 'test' .*HeldError") as told:
        coordinator.join(0)
    assert told.value.passes
    assert coordinator.made_of()[0] == str(tmp_path)  # who it is, it can tell all the same
    held.let_go()
    assert coordinator.join(0)["step"] == 1
    coordinator._hold.let_go()


def test_a_coordinator_whose_log_was_mended_starts(tmp_path, made_here):
    options = config(consistency="sync", workers=1)
    before = Coordinator(tmp_path / "coordinator", options)
    for _ in range(3):
        last = before.join(0)["client"]
    (file,) = tmp_path.rglob("log-*")
    whole = file.read_bytes()
    file.write_bytes(whole[:40] + b"?" + whole[41:])
    coordinator = actor.CoordinatorActor(str(tmp_path), options.to_json())
    with pytest.raises(CannotStartError, match=r"LogError.*is damaged and has others behind it") as told:
        coordinator.join(0)
    assert not told.value.passes
    file.write_bytes(whole)
    assert coordinator.join(0)["client"] > last
    coordinator._hold.let_go()


def test_no_step_is_committed_that_is_not_on_the_disk(tmp_path, monkeypatch):
    options = config(consistency="sync", workers=1)
    coordinator = Coordinator(tmp_path, options)
    client = coordinator.join(0)["client"]
    coordinator.arrive(0, client, 1)
    with monkeypatch.context() as patched:
        patched.setattr(log.os, "fsync", fails)
        with pytest.raises(LogError, match="could not be written to the disk"):
            coordinator.arrive(0, client, 2)
    assert coordinator._noted.committed == 1
    for call in (lambda: coordinator.join(0), lambda: coordinator.arrive(0, client, 2)):
        with pytest.raises(LogError):  # it decides nothing any more: who knows what the disk has?
            call()
    assert last_note(tmp_path).committed in (1, 2)
