# SPDX-License-Identifier: Apache-2.0
"""A shard, without Ray: what it does with pushes, and what is left of it when its process is killed."""

import os
import random

import kills
import numpy as np
import pytest
from servers import batch, config, contents, in_order_of_ids, made, opened, payload, step

from nb_sparse_adam import EmbeddingTable, Eviction
from nb_sparse_adam._src.checkpoint import saving
from nb_sparse_adam._src.parameter_server import log, shard, snapshots
from nb_sparse_adam._src.parameter_server.payloads import refuse_as_here
from nb_sparse_adam._src.parameter_server.spec import TableSpec
from nb_sparse_adam.errors import (
    CheckpointError,
    GradientError,
    LogError,
    NonFiniteGradientError,
    StaleClientError,
    TableError,
)

ADMITTED = {"user": TableSpec(8, lr=0.1, admission=2, admission_bytes=4096)}
BY_CHANCE = {"user": TableSpec(8, lr=0.1, admission=0.5)}
ELEMENT = {"user": TableSpec(8, lr=0.1, step_counts="element", dtype="float64")}


@pytest.mark.parametrize("tables", [None, ADMITTED, ELEMENT])
def test_pulls_and_pushes_have_the_bits_of_look_ups_and_updates(tmp_path, tables):
    served, here = opened(tmp_path, tables=tables), made(tables)
    for k in range(1, 6):
        given = batch(k, tables)
        if tables is not None:
            given = {name: (ids, grads.astype(here[name].dtype)) for name, (ids, grads) in given.items()}
        for name, (ids, _) in given.items():
            unique = np.unique(ids)
            expected = here[name].lookup(ids)
            found = served.pull({name: unique})[1][name]
            assert (found[np.searchsorted(unique, ids)] == expected).all()
            here[name].update(ids, given[name][1])
        assert served.push(9, k, payload(given)) == k
    for name, table in here.items():
        assert in_order_of_ids(table) == in_order_of_ids(served.tables[name])


def test_a_push_that_comes_again_is_acknowledged_and_not_applied_again(tmp_path):
    served = opened(tmp_path)
    served.push(9, 1, payload(batch(1)))
    before = contents(served.tables)
    for _ in range(3):
        assert served.push(9, 1, payload(batch(1))) == 1
    assert contents(served.tables) == before
    assert served.stats()["duplicates"] == 3
    again = opened(tmp_path)
    again.push(9, 1, payload(batch(1)))
    assert contents(again.tables) == before


def test_what_is_refused_has_changed_nothing_and_is_not_in_the_log(tmp_path):
    tables = {
        "user": TableSpec(8, capacity=5),
        "item": TableSpec(4, eviction=Eviction(when_full=True), capacity=5),
    }
    served = opened(tmp_path, tables=tables)
    fine = payload({"user": (np.arange(5), np.ones((5, 8), np.float32))})
    served.push(9, 1, fine)
    before, size = contents(served.tables), sum(file.stat().st_size for file in tmp_path.rglob("log-*"))
    ids, times, grads = fine["user"]
    nan = grads.copy()
    nan[2, 3] = np.nan
    for wrong, error in (
        ({"nobody": (ids, times, grads)}, TableError),
        ({"user": (ids, times, grads[:, :3].copy())}, GradientError),
        ({"user": (ids, times, grads.astype(np.float64))}, GradientError),
        ({"user": (ids, times[:1], grads)}, GradientError),
        ({"user": (ids, times, nan)}, NonFiniteGradientError),
    ):
        with pytest.raises(error):
            served.push(9, 2, wrong)
    assert contents(served.tables) == before
    assert sum(file.stat().st_size for file in tmp_path.rglob("log-*")) == size
    with pytest.raises(TableError, match="there is room for 5 rows"):
        served.push(9, 2, payload({"user": (np.arange(9, 12), np.ones((3, 8), np.float32))}))
    assert contents(served.tables) == before
    served.push(9, 2, payload({"item": (np.arange(9, 14), np.ones((5, 4), np.float32))}))
    served.push(9, 3, payload({"item": (np.arange(19, 22), np.ones((3, 4), np.float32))}))
    assert served.stats()["refused"] == 6
    assert contents(opened(tmp_path, tables=tables).tables) == contents(served.tables)


def test_what_is_not_finite_is_told_whatever_the_capacity():
    """That of a shard is less than what all of them have room for."""
    spec = TableSpec(2, capacity=3, eviction=Eviction(when_full=True))
    grads = np.ones((9, 2), np.float32)
    grads[7, 1] = np.inf
    with pytest.raises(NonFiniteGradientError, match=r"grads\[7, 1\] is inf"):
        refuse_as_here(spec, "user", np.arange(9), grads)


@pytest.mark.parametrize("tables", [None, ADMITTED, BY_CHANCE])
def test_what_the_log_says_is_done_again_with_the_same_bytes(tmp_path, tables):
    served = opened(tmp_path, tables=tables)
    for k in range(1, 10):
        served.push(9, k, payload(batch(k, tables)))
        if k in (3, 5):
            served.snapshot()
        if k == 7:
            assert len(served.evict("user", {"down_to": 60}))
    again = opened(tmp_path, tables=tables)
    assert contents(again.tables) == contents(served.tables)
    assert again.snapshot()
    assert contents(opened(tmp_path, tables=tables).tables) == contents(served.tables)


def test_rows_that_make_room_are_the_same_ones_again(tmp_path, monkeypatch):
    """What was touched least recently is a matter of the clock, which is in the log."""
    moment = [1000.0]
    monkeypatch.setattr(shard.time, "time", lambda: moment[0])
    tables = {"user": TableSpec(8, capacity=100, eviction=Eviction(when_full=True))}
    served = opened(tmp_path, tables=tables)
    for k in range(1, 30):
        moment[0] += 0.3
        served.push(9, k, payload(batch(k, tables, n=40)))
        if k == 10:
            served.snapshot()
    moment[0] += 1000
    assert contents(opened(tmp_path, tables=tables).tables) == contents(served.tables)


def test_eviction_by_age_goes_on_in_the_background_and_is_logged(tmp_path):
    tables = {"user": TableSpec(8, eviction=Eviction(older_than_steps=3))}
    served = opened(tmp_path, tables=tables)
    for k in range(1, 9):
        served.push(9, k, payload(batch(k, tables)))
    assert len(served.tables["user"]) > 100
    served._evict_by_age("user")
    assert len(served.tables["user"]) < 200
    assert contents(opened(tmp_path, tables=tables).tables) == contents(served.tables)
    assert len(served.evict("user", {})) == 0


def test_increments_follow_a_full_snapshot_until_they_are_as_large(tmp_path):
    served = opened(tmp_path, durability="snapshot")
    assert served.snapshot()
    assert not served.snapshot()  # nothing has changed
    lengths = []
    for k in range(1, 12):
        served.push(9, k, payload(batch(k, n=10)))
        served.snapshot()
        lengths.append(len(served._snapshots.chain))
        assert contents(opened(tmp_path, durability="snapshot").tables) == contents(served.tables)
    assert max(lengths) > 2
    assert lengths != sorted(lengths)
    assert len(os.listdir(tmp_path / "snapshots")) == lengths[-1]


def test_what_is_lost_without_a_log_is_told(tmp_path):
    served = opened(tmp_path, durability="snapshot")
    for k in range(1, 8):
        served.push(9, k, payload(batch(k)))
        if k == 4:
            served.snapshot()
            kept = contents(served.tables)
    again = opened(tmp_path, durability="snapshot")
    assert contents(again.tables) == kept
    again.push(9, 8, payload(batch(8)))
    again.push(9, 9, payload(batch(9)))
    assert again.stats()["lost_pushes"] == 3


def test_what_is_damaged_is_refused_by_name(tmp_path):
    served = opened(tmp_path)
    for k in range(1, 4):
        served.push(9, k, payload(batch(k)))
    (file,) = tmp_path.rglob("log-*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(LogError, match=r"record 1, at byte .* is damaged and has others behind it"):
        opened(tmp_path)
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    served = opened(tmp_path)
    served.snapshot()
    served.push(9, 4, payload(batch(4)))
    served.snapshot()
    (first, _) = sorted((tmp_path / "snapshots").iterdir())
    first.rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="none of which is a full one"):
        opened(tmp_path)


def test_a_snapshot_that_fails_is_tried_again(tmp_path, monkeypatch):
    served = opened(tmp_path)
    served.push(9, 1, payload(batch(1)))

    def full(_self, _saving):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(snapshots.Snapshots, "write", full)
        with pytest.raises(OSError, match="No space"):
            served.snapshot()
    assert served.stats()["snapshot_error"]
    assert contents(opened(tmp_path).tables) == contents(served.tables)
    assert served.snapshot()
    assert served.stats()["snapshot_error"] is None


# --- steps of all workers ---------------------------------------------------------------------------------


def test_a_step_is_the_sum_over_workers_in_the_order_of_ranks(tmp_path):
    served, here = opened(tmp_path, consistency="sync", workers=3), made()
    clients = {0: 12, 1: 10, 2: 11}
    for step_number in range(1, 5):
        parts = {rank: batch(10 * step_number + rank) for rank in clients}
        for rank in (2, 0, 1):
            served.stage(step_number, rank, clients[rank], payload(parts[rank]))
            if step_number == 2:
                served.snapshot()  # in the midst of a step
            if step_number == 3:
                served = opened(tmp_path, consistency="sync", workers=3)
        assert served.commit(step_number, clients) == []
        assert served.commit(step_number, clients) == []
        whole = {name: [payload(parts[rank])[name] for rank in sorted(clients)] for name in here}
        for name, sent in whole.items():
            for ids, times, _ in sent:
                here[name].lookup(np.repeat(ids, times))
            here[name].update(*(np.concatenate([each[at] for each in sent]) for at in (0, 2)))
    for name, table in here.items():
        assert in_order_of_ids(table) == in_order_of_ids(served.tables[name])
    again = opened(tmp_path, consistency="sync", workers=3)
    assert contents(again.tables) == contents(served.tables)


def test_parts_that_are_not_here_are_asked_for(tmp_path):
    served = opened(tmp_path, durability="snapshot", consistency="sync", workers=2)
    served.stage(1, 0, 5, payload(batch(1)))
    before = contents(served.tables)
    assert served.commit(1, {0: 5, 1: 6}) == [1]
    assert served.commit(1, {0: 4, 1: 6}) == [0, 1]  # of another incarnation
    assert contents(served.tables) == before
    served.stage(1, 1, 6, payload(batch(2)))
    assert served.commit(1, {0: 5, 1: 6}) == []
    assert contents(served.tables) != before
    served.stage(1, 1, 6, payload(batch(3)))  # comes again, too late
    assert served._staged.first == 2**63


def test_the_parts_of_a_step_that_was_given_up_are_forgotten(tmp_path):
    served = opened(tmp_path, consistency="sync", workers=2)
    served.stage(1, 0, 5, payload(batch(1)))
    served.stage(2, 0, 5, payload(batch(2)))
    served.stage(2, 1, 6, payload(batch(3)))
    assert served.commit(2, {0: 5, 1: 6}) == []
    assert served.stats()["pushes"] == 1


# --- kill -9 ----------------------------------------------------------------------------------------------

PLACES = [
    *((shard, point) for point in shard.POINTS),
    *((log, point) for point in log.POINTS),
    *((saving, point) for point in kills.POINTS if point != "an old file deleted"),  # each has its own folder
    *((snapshots, point) for point in snapshots.POINTS),
]


def push(served, folder, k):
    served.push(9, k, payload(batch(k)))
    with open(folder / "acknowledged", "a") as file:
        file.write(f"{k}\n")


def pushing(folder, durability):
    """Push until killed, from the first push on that was not acknowledged; a snapshot after every fourth.

    Not for ever: what is never reached is then a test that fails.
    """

    def work():
        served = opened(folder / "shard", durability=durability)
        first = acknowledged(folder) + 1
        for k in range(first, first + 1000):
            push(served, folder, k)
            if k % 4 == 0:
                served.snapshot()

    return work


def acknowledged(folder):
    file = folder / "acknowledged"
    return max(map(int, file.read_text().split()), default=0) if file.exists() else 0


@pytest.mark.jit
def test_no_acknowledged_push_is_lost_and_none_applied_twice(tmp_path, pytestconfig):
    rng = random.Random(4)
    hits = range(1, 8) if pytestconfig.option.long else (2,)
    plans = [(module, point, hit) for hit in hits for module, point in PLACES]
    plans += [(shard, None, 0)] * (20 if pytestconfig.option.long else 2)
    rng.shuffle(plans)
    opened(tmp_path / "warm").push(9, 1, payload(batch(1)))  # compiles kernels, for all that are forked
    for module, point, hit in plans:
        if point == "doing again":
            served = opened(tmp_path / "shard")
            for k in range(acknowledged(tmp_path) + 1, acknowledged(tmp_path) + 1 + hit):
                push(served, tmp_path, k)
        kills.until_killed(pushing(tmp_path, "log"), point, hit, 0.5, module, rng)
        served = opened(tmp_path / "shard")
        known = acknowledged(tmp_path)
        assert all(served._windows.has(9, k) for k in range(max(known - 900, 1), known + 1)), (point, hit)
        assert not served._windows.has(9, known + 2), (point, hit)
    served = opened(tmp_path / "shard")
    last = acknowledged(tmp_path) + 1
    served.push(9, last, payload(batch(last)))
    here = made()
    for k in range(1, last + 1):
        step(here, batch(k))
    for name, table in here.items():
        assert in_order_of_ids(table) == in_order_of_ids(served.tables[name])
    assert len(plans) >= 10


@pytest.mark.jit
def test_without_a_log_what_is_left_is_the_last_snapshot(tmp_path):
    opened(tmp_path / "warm").push(9, 1, payload(batch(1)))
    for hit in (3, 7):
        kills.until_killed(pushing(tmp_path, "snapshot"), "applied", hit, 0.5, shard)
        served = opened(tmp_path / "shard", durability="snapshot")
        reached = served._windows.highest(9)
        assert acknowledged(tmp_path) - reached < 4
        here = made()
        for k in range(1, reached + 1):
            step(here, batch(k))
        for name, table in here.items():
            assert in_order_of_ids(table) == in_order_of_ids(served.tables[name])
        (tmp_path / "acknowledged").write_text(f"{reached}\n")


def test_config_comes_back_from_json():
    made_of = config(
        tables={"a": TableSpec(3, betas=(0.5, 0.9), eviction=Eviction(older_than_steps=2), dtype=np.float64)}
    )
    again = type(made_of).from_json(made_of.to_json())
    assert again == made_of
    assert isinstance(again.tables["a"].make("a"), EmbeddingTable)


def test_a_client_that_was_forgotten_is_refused(tmp_path):
    served = opened(tmp_path)
    served._windows.forget_all(20)
    with pytest.raises(StaleClientError):
        served.push(20, 1, payload(batch(1)))
    served.push(21, 1, payload(batch(1)))
