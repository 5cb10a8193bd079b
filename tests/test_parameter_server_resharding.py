# SPDX-License-Identifier: Apache-2.0
"""What N shards have, M shards go on with: without Ray, on folders."""

import itertools
import random

import kills
import numpy as np
import pytest
from servers import SPECS, batch, contents, payload

from nb_sparse_adam import Eviction
from nb_sparse_adam._src.parameter_server import holding, resharding, shard
from nb_sparse_adam._src.parameter_server.coordinator import Coordinator, last_note
from nb_sparse_adam._src.parameter_server.folders import check_new, read_config, shard_folder, write_config
from nb_sparse_adam._src.parameter_server.payloads import arrays_in
from nb_sparse_adam._src.parameter_server.resharding import reshard
from nb_sparse_adam._src.parameter_server.routing import shards_of
from nb_sparse_adam._src.parameter_server.shard import Shard
from nb_sparse_adam._src.parameter_server.spec import TableSpec, check_config
from nb_sparse_adam.errors import CheckpointError, LogError, ServerError, StaleClientError

MANY = {
    "user": TableSpec(3, lr=0.1, admission=2, admission_bytes=4096, seed=-5),
    "item": TableSpec(4, lr=0.1, step_counts="global"),
    "tag": TableSpec(2, lr=0.1, step_counts="element", admission=0.5),
}
AGES = {"user": TableSpec(3, lr=0.1, eviction=Eviction(older_than_steps=3))}


IDS = 20  # of a batch


def compiled(*given):
    """A case that is slow without the JIT."""
    return pytest.param(*given, marks=pytest.mark.jit)


def config_of(shards, tables=SPECS, durability="log", consistency="async", workers=None, name="test"):
    return check_config(name, tables, shards, durability, 1e6, consistency, workers, 60.0, 0)


class Server:
    """The shards of a server and its coordinator, in this process."""

    def __init__(self, folder, config=None):
        if config is None:
            config = read_config(folder)
        else:
            write_config(folder, config)
        self.folder, self.config = folder, config
        self.coordinator = Coordinator(folder / "coordinator", config)
        self.shards = [Shard(shard_folder(folder, k), config, k) for k in range(config.shards)]
        self.client = self.coordinator.join(0 if config.workers else None)["client"]

    def push(self, k, sequence=None):
        for at, each in enumerate(self.shards):
            given = payload(batch(k, self.config.tables, n=IDS, of=60), len(self.shards), at)
            each.push(self.client, k if sequence is None else sequence, given)

    def gone(self):
        """As if its processes had been killed."""
        for each in self.shards:
            each.hold.let_go()
        return self

    def rows(self):
        """What rows have, of all shards together; each id is where it is looked for."""
        found = {}
        for name in self.config.tables:
            every = {}
            for at, each in enumerate(self.shards):
                table = each.tables[name]
                ids, values = table.export()
                assert (shards_of(ids, len(self.shards)) == at).all()
                state = table.state(ids)
                assert not set(every) & set(ids.tolist())
                for k, number in enumerate(ids.tolist()):
                    of = [values, *state]
                    every[number] = [(array[k] if array.ndim else array).tobytes() for array in of]
            found[name] = every
        return found

    def counts(self, name):
        """What was counted, over all shards."""
        every = [each.tables[name].stats() for each in self.shards]
        return {what: sum(each[what] for each in every) for what in ("dropped", "evicted")}


def bytes_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained(folder, shards, tables=SPECS, durability="log"):
    """Snapshots, increments and, where there is a log, what came after them."""
    server = Server(folder, config_of(shards, tables, durability))
    for k in range(1, 8):
        server.push(k)
        if k in (2, 4):
            for each in server.shards[: 1 + k % 4]:
                each.snapshot()
        if k == 3:
            for each in server.shards:
                each.evict(next(iter(tables)), {"down_to": 12})
    if durability == "snapshot":
        for each in server.shards:
            each.snapshot()
    return server.gone()


@pytest.mark.parametrize(
    ("old", "new", "tables", "durability"),
    [
        (3, 2, SPECS, "log"),
        *(compiled(old, new, SPECS, "log") for old, new in ((1, 2), (2, 5), (5, 1), (4, 3))),
        *(compiled(old, new, MANY, "log") for old, new in ((2, 3), (3, 1))),
        compiled(2, 3, MANY, "snapshot"),
    ],
)
def test_rows_are_byte_equal_and_training_goes_on_with_the_same_bytes(tmp_path, old, new, tables, durability):
    before = trained(tmp_path / "old", old, tables, durability)
    on_disk = bytes_in(before.folder)
    reshard(before.folder, before.config, tmp_path / "new", config_of(new, tables, durability))
    assert bytes_in(before.folder) == on_disk
    after = Server(tmp_path / "new")
    assert after.rows() == before.rows()
    assert len(after.shards) == new
    for name in tables:
        assert after.counts(name) == before.counts(name)
    with pytest.raises(StaleClientError):
        after.shards[0].push(before.client, 99, {})
    before = Server(before.folder)
    for k in range(8, 12):
        before.push(k, k)
        after.push(k, k)
    if tables is SPECS:  # by chance, and where counters are shared, others are admitted
        assert after.rows() == before.rows()
    else:
        assert after.rows()["item"] == before.rows()["item"]
    before.gone()
    after.gone()


@pytest.mark.jit
def test_the_same_number_of_shards_has_the_same_of_everything(tmp_path):
    before = trained(tmp_path / "old", 2, MANY)
    reshard(before.folder, before.config, tmp_path / "new", config_of(2, MANY))
    after = Server(tmp_path / "new")
    for one, other in zip(before.shards, after.shards, strict=True):
        assert contents(other.tables) == contents(one.tables)
        for name, table in one.tables.items():
            assert (table.ids() == other.tables[name].ids()).all()
            assert table._store.clock == other.tables[name]._store.clock
            assert table._ages.entries == other.tables[name]._ages.entries
    after.gone()


@pytest.mark.jit
def test_ids_have_come_in_the_order_that_each_shard_knew(tmp_path):
    before = trained(tmp_path / "old", 3)
    reshard(before.folder, before.config, tmp_path / "new", config_of(1))
    after = Server(tmp_path / "new")
    for name in SPECS:
        ids = after.shards[0].tables[name].ids()
        whose = shards_of(ids, 3)
        for at, each in enumerate(before.shards):
            assert ids[whose == at].tolist() == each.tables[name].ids().tolist()
    after.gone()


@pytest.mark.parametrize("new", [2, compiled(1), compiled(5)])
def test_ages_go_on(tmp_path, monkeypatch, new):
    """What is old in steps, in seconds, and which rows are the least recent, is what it was."""
    moment = [1000.0]
    monkeypatch.setattr(shard.time, "time", lambda: moment[0])
    before = Server(tmp_path / "old", config_of(3, AGES))
    for k in range(1, 12):
        for at, each in enumerate(before.shards):
            moment[0] += (0.3, 2.0)[at == 1] * (k % 3)
            each.push(before.client, k, payload(batch(k, AGES, n=30), 3, at))
    before.gone()
    reshard(before.folder, before.config, tmp_path / "new", config_of(new, AGES))
    after = Server(tmp_path / "new")

    def going(server, conditions):
        found = [each.tables["user"]._ids_to_go(conditions) for each in server.shards]
        return set(np.concatenate(found).tolist())

    for steps in range(13):
        expected = going(before, (steps, None, None, None))
        assert going(after, (steps, None, None, None)) == expected, steps
        assert (len(expected) > 0) == (steps <= 10)
    for k in range(12, 15):
        for server in (before, after):
            for at, each in enumerate(server.shards):
                given = payload(batch(k, AGES, n=30), len(server.shards), at)
                head = {"kind": "push", "client": 1, "sequence": k, "tables": ["user"]}
                each._do(-1, {**head, "time": moment[0]}, arrays_in(given))
    for steps in range(13):
        assert going(after, (steps, None, None, None)) == going(before, (steps, None, None, None)), steps
    after.gone()


def test_no_id_is_admitted_later_than_it_would_have_been(tmp_path):
    tables = {"user": TableSpec(2, lr=0.1, admission=3, admission_bytes=1 << 14)}
    before = Server(tmp_path / "old", config_of(4, tables))
    ids = np.arange(50)
    for k in (1, 2):
        for at, each in enumerate(before.shards):
            each.push(before.client, k, payload({"user": (ids, np.ones((50, 2), np.float32))}, 4, at))
    assert sum(len(each.tables["user"]) for each in before.gone().shards) < 5
    for new in (1, 3):
        folder = tmp_path / str(new)
        reshard(before.folder, before.config, folder, config_of(new, tables))
        after = Server(folder)
        for at, each in enumerate(after.shards):
            each.push(after.client, 1, payload({"user": (ids, np.ones((50, 2), np.float32))}, new, at))
        assert set(after.rows()["user"]) == set(ids.tolist())
        after.gone()


# --- steps of all workers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(2, 3), compiled(3, 2)])
def test_a_step_that_was_committed_is_applied_and_one_that_was_not_is_not(tmp_path, old, new):
    options = {"consistency": "sync", "workers": 1}
    before = Server(tmp_path / "old", config_of(old, **options))

    def stage(server, step):
        for at, each in enumerate(server.shards):
            each.stage(step, 0, server.client, payload(batch(step, n=IDS), len(server.shards), at))

    stage(before, 1)
    parts = before.coordinator.arrive(0, before.client, 1)["parts"]
    for each in before.shards:
        each.commit(1, parts)
    stage(before, 2)
    parts = before.coordinator.arrive(0, before.client, 2)["parts"]
    before.shards[1].commit(2, parts)  # and then all are killed
    before.shards[1].stage(3, 0, before.client, payload(batch(3, n=IDS), old, 1))
    before.gone()
    reshard(before.folder, before.config, tmp_path / "new", config_of(new, **options))
    after = Server(tmp_path / "new")
    for each in before.shards:
        each.commit(2, parts)
    assert after.rows() == before.rows()
    assert {each.step for each in after.shards} == {2}
    assert after.coordinator.join(0)["step"] == 3
    assert last_note(tmp_path / "new" / "coordinator").committed == 2
    assert after.client > before.coordinator.join(0)["client"] > before.client
    stage(after, 3)
    after.client = after.coordinator.join(0)["client"]
    stage(after, 3)
    parts = after.coordinator.arrive(0, after.client, 3)["parts"]
    assert [each.commit(3, parts) for each in after.shards] == [[]] * new
    after.gone()


def test_parts_that_a_log_should_have_are_missed_by_name(tmp_path):
    before = Server(tmp_path / "old", config_of(2, consistency="sync", workers=1))
    before.coordinator.arrive(0, before.client, 1)
    before.gone()
    with pytest.raises(LogError, match=r"shard 0 has no parts of ranks \[0\] of step 1"):
        reshard(before.folder, before.config, tmp_path / "new", config_of(1, consistency="sync", workers=1))
    without = config_of(2, durability="snapshot", consistency="sync", workers=1)
    reshard(before.folder, without, tmp_path / "other", without)
    assert Server(tmp_path / "other").gone().shards[0].step == 1


# --- what is refused --------------------------------------------------------------------------------------


def test_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(holding, "PATIENCE", 0.1)
    before = Server(tmp_path / "old", config_of(2, {"user": TableSpec(3, capacity=100)}))
    before.push(1)
    wanted = config_of(1, {"user": TableSpec(3, capacity=10)})
    with pytest.raises(LogError, match="shard-0000 is held by another process"):
        reshard(before.folder, before.config, tmp_path / "new", wanted)
    before.gone()
    with pytest.raises(CheckpointError, match=r"expected at most 10, .* restore to more shards"):
        reshard(before.folder, before.config, tmp_path / "new", wanted)
    with pytest.raises(ServerError, match="is the folder of a server already"):
        reshard(before.folder, before.config, before.folder, wanted)
    (before.folder / "shard-0001").rename(tmp_path / "away")
    with pytest.raises(ServerError, match="has no shard-0001, expected a coordinator and 2 shards"):
        reshard(before.folder, before.config, tmp_path / "new", wanted)
    (tmp_path / "away").rename(before.folder / "shard-0001")
    for file in (before.folder / "coordinator").iterdir():
        file.unlink()
    with pytest.raises(ServerError, match="has no log"):
        reshard(before.folder, before.config, tmp_path / "new", wanted)
    check_new(tmp_path / "new")  # nothing was written


@pytest.mark.jit
def test_what_is_killed_in_between_is_no_server(tmp_path):
    before = trained(tmp_path / "old", 2)
    for at, (point, hit) in enumerate(
        (("a shard written", 1), ("a shard written", 3), ("all shards written", 1))
    ):
        folder = tmp_path / str(at)

        def work(folder=folder):
            reshard(before.folder, before.config, folder, config_of(3))

        kills.until_killed(work, point, hit, 1, resharding, random.Random(1))
        with pytest.raises(ServerError, match=r"it has no server\.json"):
            read_config(folder)
        with pytest.raises(ServerError, match="a restore that did not come to its end"):
            check_new(folder)
    reshard(before.folder, before.config, tmp_path / "new", config_of(3))
    assert Server(tmp_path / "new").gone().rows() == before.rows()


@pytest.mark.jit
def test_each_old_shard_is_read_once(tmp_path, monkeypatch):
    before = trained(tmp_path / "old", 5)
    for new in (1, 3, 7):
        read = []

        class Reading(Shard):
            def __init__(self, folder, config, number, reads, read=read):
                read.append(number)
                super().__init__(folder, config, number, reads)

        with monkeypatch.context() as patched:
            patched.setattr(resharding, "Shard", Reading)
            reshard(before.folder, before.config, tmp_path / str(new), config_of(new))
        assert read == [0, 1, 2, 3, 4]


def test_shards_that_have_buckets_of_another():
    buckets = np.arange(1024)
    for old, new in itertools.product((1, 2, 3, 5, 7, 1000, 1024), repeat=2):
        for number in {0, new // 2, new - 1}:
            own = buckets[buckets * new // 1024 == number]
            assert list(resharding._overlapping(number, new, old)) == sorted(
                set((own * old // 1024).tolist())
            )
