# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of EmbeddingTable: restored, damaged, written while others work, and ended by a kill."""

import hashlib
import json
import os
import threading
import tracemalloc

import kills
import numpy as np
import pytest
from table_saves import DIM, chain_in, content, make, manifest_of, step, trained

from nb_sparse_adam import EmbeddingTable, checkpoint
from nb_sparse_adam._src.checkpoint import manifest as manifests
from nb_sparse_adam._src.checkpoint import row_files, saving, tensor_files
from nb_sparse_adam._src.table import snapshot
from nb_sparse_adam.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture
def chain(tmp_path):
    return chain_in(tmp_path)


# --- restoring ----------------------------------------------------------------------------------------------


def test_a_restored_table_keeps_its_name_capacity_and_threads(chain):
    table, folders = chain
    other = EmbeddingTable(DIM, name="other", capacity=500, lr=3, initializer="zeros", num_threads=1)
    other.lookup([5])
    checkpoint.restore(folders, other)
    assert (other.name, other.capacity, other.num_threads, other.lr) == ("other", 500, 1, 0.1)
    for each in (table, other):
        step(each, 80)
    assert content(other)["values"] == content(table)["values"]
    with pytest.raises(CheckpointError, match="expected at most 2, for which table"):
        checkpoint.restore(folders, make(capacity=2))


def test_rows_in_a_file_are_restored_into_another_one(chain, tmp_path):
    table, folders = chain
    other = make(capacity=100, state_dir=tmp_path / "state")
    step(other, 1)
    before = content(other)
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.restore([folders[0], folders[2]], other)
    assert content(other) == before
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["0.int64"]
    checkpoint.restore(folders, other)
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["1.int64"]
    for each in (table, other):
        step(each, 81)
    assert content(other)["values"] == content(table)["values"]


@pytest.mark.parametrize("options", [{"step_counts": "global"}, {"dtype": np.float64}], ids=str)
def test_tables_that_do_not_fit_are_refused(options, chain):
    other = trained(1, **options)
    before = content(other)
    with pytest.raises(CheckpointError, match="nothing is converted"):
        checkpoint.restore(chain[1], other)
    assert content(other) == before


@pytest.mark.parametrize("fails", ["fill", "run_all"])
def test_a_restore_that_fails_has_changed_nothing(fails, chain, tmp_path, monkeypatch):
    other = trained(2, capacity=50, state_dir=tmp_path / "state")
    before = content(other)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot, fails, fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.restore(chain[1], other)
    assert content(other) == before
    assert len(list((tmp_path / "state").iterdir())) == 1


# --- what is wrong ------------------------------------------------------------------------------------------


def sign(folder, change):
    """Change a manifest, with the right checksum."""
    manifest = manifest_of(folder)
    change(manifest)
    manifest.pop("sha256", None)
    manifest["sha256"] = manifests.digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def rewrite(folder, name, change):
    """Change an array in a table's file, with the right checksums."""
    (file,) = folder.glob("*.safetensors")
    with open(file, "rb") as opened:
        entry = tensor_files.check_header(opened, file.stat().st_size)[name]
    whole = bytearray(file.read_bytes())
    values = np.frombuffer(whole, entry.dtype, offset=entry.start)[: int(np.prod(entry.shape))]
    change(values)
    file.write_bytes(whole)
    digest = hashlib.sha256(whole).hexdigest()
    sign(folder, lambda manifest: manifest["tables"][0].update(sha256=digest))


def put(at, value):
    return lambda values: values.__setitem__(at, value)


CONTENTS = {
    "an id twice": (
        "ids",
        lambda values: put(1, values[0])(values),
        "in ids, expected numbers that increase",
    ),
    "ids fall": ("ids", lambda values: put(-1, -5)(values), "in ids, expected numbers that increase"),
    "gone falls": ("gone", lambda values: put(-1, -(2**63))(values), "in gone, expected numbers that"),
    "an order twice": ("admitted", lambda values: put(1, values[0])(values), "the same place in the order"),
    "nobody's": ("admitted", put(0, 0), "has 0 in admitted, expected 1 to"),
    "admitted later": ("admitted", put(0, 2**60), "in admitted, expected 1 to"),
    "touched before": ("touched", put(0, -1), "has -1 in touched, expected 0 to"),
    "touched later": ("touched", put(0, 2**62), "in touched, expected 0 to"),
    "a negative count": ("steps", put(-1, -1), "has -1 in steps, expected 0 to"),
    "a negative square": ("exp_avg_sq", put(5, -1.0), "has a negative number in exp_avg_sq"),
    "time is NaN": ("ages_seconds", put(0, np.nan), "in ages_seconds that is not finite"),
    "time falls": ("ages_clock", put(0, 2**40), "in ages_clock, expected 0 to"),
    "steps fall": (
        "ages_steps",
        lambda values: put(0, values[-1])(values),
        "in ages_steps, expected numbers that increase",
    ),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_content_that_cannot_be_is_refused_by_name(what, chain, monkeypatch):
    monkeypatch.setattr(row_files, "GRAIN_BYTES", 24)
    table, folders = chain
    name, change, message = CONTENTS[what]
    rewrite(folders[3], name, change)
    before = content(table)
    for work in (lambda: checkpoint.load(folders), lambda: checkpoint.restore(folders, table)):
        with pytest.raises(CheckpointError, match=message) as caught:
            work()
        assert "third" in str(caught.value)
    assert content(table) == before


def test_a_row_that_is_there_and_has_gone_is_refused(chain, monkeypatch):
    _, folders = chain
    file = next(folders[3].glob("*.safetensors"))
    with open(file, "rb") as opened:
        first = tensor_files.check_header(opened, file.stat().st_size)["ids"].start
    there = int(np.frombuffer(file.read_bytes()[first:][:8], np.int64)[0])
    monkeypatch.setattr(snapshot.Checks, "check", lambda *_: None)
    rewrite(folders[3], "gone", put(slice(None), there))
    with pytest.raises(CheckpointError, match=r"third.* says of a row that it is there and has gone"):
        checkpoint.load(folders)


def record(**values):
    return lambda manifest: manifest["tables"][0].update(values)


def within(part, **values):
    return lambda manifest: manifest["tables"][0][part].update(values)


MANIFESTS = {
    "another kind": lambda manifest: manifest.update(kind="Other"),
    "no id": lambda manifest: manifest.update(id="x"),
    "base": lambda manifest: manifest.update(base=7),
    "single": lambda manifest: manifest.update(single=1),
    "two of one": lambda manifest: manifest["tables"].append(manifest["tables"][0]),
    "no tables": lambda manifest: manifest.update(tables=[]),
    "an entry more": record(more=1),
    "a file of somebody": record(file="../manifest.json"),
    "rows": record(rows=-1),
    "many rows": record(rows=2**40),
    "rows of another file": record(rows=3),
    "gone since nothing": record(gone=1),
    "steps": record(steps="int8"),
    "dim": within("made", dim=0),
    "dim is no number": within("made", dim=None),
    "dtype": within("made", dtype="float16"),
    "seed": within("made", seed=2**70),
    "initializer": within("made", initializer="normal(0, -1)"),
    "initializer is no string": within("made", initializer=3),
    "eviction": within("made", eviction=[1, 2]),
    "eviction of NaN": within("made", eviction=[None, float("nan"), None, 4096, False]),
    "eviction when full": within("made", eviction=[None, None, None, 4096, True]),
    "admission": within("made", admission="2"),
    "admission of another file": within("made", admission=5),
    "admission of 2**60 bytes": within("made", admission_bytes=2**60, admission=3),
    "capacity": within("made", capacity=-1),
    "name": within("made", name=3),
    "missing": within("made", missing=[]),
    "lr": within("options", lr=float("nan")),
    "betas": within("options", betas=[0.9]),
    "step_counts": within("options", step_counts="never"),
    "step_counts of another file": within("options", step_counts="element"),
    "a clock before rows": within("numbers", clock=0),
    "a negative number": within("numbers", dropped=-1),
    "a number beyond": within("numbers", admitted=2**63),
    "a number is none": within("numbers", steps=float("inf")),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_manifests_that_say_odd_things_are_refused(what, tmp_path):
    table = trained()
    checkpoint.save(tmp_path, table)
    sign(tmp_path, MANIFESTS[what])
    before = content(table)
    for work in (lambda: checkpoint.load(tmp_path), lambda: checkpoint.restore(tmp_path, table)):
        with pytest.raises(CheckpointError) as caught:
            work()
        assert str(tmp_path) in str(caught.value)
    assert content(table) == before
    checkpoint.save(tmp_path, table)  # it is replaced
    assert content(checkpoint.load(tmp_path)[0])["values"] == before["values"]


@pytest.mark.parametrize("place", [0.02, 0.7])
@pytest.mark.parametrize("what", ["flip", "cut", "delete"])
def test_damage_is_refused_by_name(what, place, chain):
    table, folders = chain
    file = next(folders[1].glob("*.safetensors"))
    whole = bytearray(file.read_bytes())
    at = int(place * len(whole))
    whole[at] ^= 1
    if what == "delete":
        file.unlink()
    else:
        file.write_bytes(whole if what == "flip" else whole[:at])
    before = content(table)
    with pytest.raises(CheckpointError, match=file.name):
        checkpoint.restore(folders, table)
    assert content(table) == before


def test_a_file_that_is_changed_after_it_was_verified_is_refused(chain, monkeypatch):
    table, folders = chain
    file = next(folders[2].glob("*.safetensors"))
    monkeypatch.setattr(row_files.RowsFile, "whole", lambda *_: pytest.fail("unchanged"))
    kept = os.stat(file)
    verify = row_files.RowsFile.verify

    def verify_and_change(self, tell):
        verify(self, tell)
        if self.path == file:
            whole = bytearray(file.read_bytes())
            whole[-1] ^= 1
            file.write_bytes(whole)
            os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # nobody is to see it

    monkeypatch.undo()
    monkeypatch.setattr(row_files.RowsFile, "verify", verify_and_change)
    before = content(table)
    with pytest.raises(CheckpointError, match="has been changed since it was verified"):
        checkpoint.restore(folders[:3], table)
    assert content(table) == before


# --- while others work, and memory --------------------------------------------------------------------------


def test_serving_and_training_go_on_while_a_table_is_saved(tmp_path, monkeypatch):
    table, reached = trained(), []

    def meanwhile(point):
        reached.append(point)
        done = []
        serve, train = lambda: table.lookup([1], train=False), lambda: step(table, 10 + len(reached))
        for work in (serve, train, lambda: table.evict(down_to=9)):
            thread = threading.Thread(target=lambda work=work: done.append(work()))
            thread.start()
            thread.join(60)
        assert len(done) == 3, point

    monkeypatch.setattr(saving, "_reached", meanwhile)
    expected = content(table)
    checkpoint.save(tmp_path, table)
    assert {"a file begun", "a file written", "manifest in its place"} < set(reached)
    assert content(checkpoint.load(tmp_path)[0]) == expected
    assert content(table) != expected


@pytest.mark.jit
def test_pieces_are_all_the_memory_that_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 1 << 20)
    table = EmbeddingTable(128, initializer="zeros")
    table.lookup(np.random.default_rng(0).permutation(16_000))
    assert table.stats()["bytes_of_rows"] > 24e6
    peaks = []
    for work in (
        lambda: checkpoint.save(tmp_path / "0", table),
        lambda: (table.lookup(np.arange(9)), checkpoint.save(tmp_path / "1", table, base=tmp_path / "0")),
        lambda: checkpoint.compact([tmp_path / "0", tmp_path / "1"], tmp_path / "2"),
        lambda: checkpoint.load([tmp_path / "0", tmp_path / "1"]),  # its rows are not counted
    ):
        tracemalloc.start()
        work()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 8e6, peaks


# --- kill -9 ------------------------------------------------------------------------------------------------

KILLS = """
import os, sys
import numpy as np
from pathlib import Path
import kills
from nb_sparse_adam import EmbeddingTable, checkpoint

folder, at_random = Path(sys.argv[1]), int(sys.argv[2])
os.fsync = lambda _: None  # a kill loses nothing that was written

def step(table, k):
    rng = np.random.default_rng(k)
    new = np.arange(2000 * k, 2000 * k + 2000)  # it grows all the time
    old = rng.integers(0, 2000 * k + 1, 50)
    for ids in (new, old):
        table.lookup(ids)
        table.update(ids, rng.normal(size=(len(ids), 4)).astype(np.float32))

def saved(k):  # a full save, two increments, and so on
    return [folder / f"{k - each}" for each in range(k % 3, -1, -1)]

def last():
    there = [int(each.name) for each in folder.iterdir() if (each / "manifest.json").exists()]
    return max(there)

def save(table, k):
    base = folder / str(k - 1) if k % 3 else None
    checkpoint.save(folder / str(k), table, k, base=base)
    if k % 3 == 2:
        checkpoint.compact(saved(k), folder / "compact" / "c")

def bits(table):
    ids, values = table.export()
    return ids.tobytes(), values.tobytes(), *(each.tobytes() for each in table.state(ids))

def child():
    k = last()
    table, _ = checkpoint.load(saved(k))
    table.num_threads = 1
    while True:
        k += 1
        step(table, k)
        save(table, k)

never_interrupted = EmbeddingTable(4, lr=0.1, num_threads=1)
step(never_interrupted, 0)
(folder / "compact").mkdir(parents=True)
save(never_interrupted, 0)
at, plans = 0, kills.plans((2,), at_random)
for point, hit in plans:
    kills.until_killed(child, point, hit, 0.1)
    k = last()
    table, extra = checkpoint.load(saved(k))
    assert extra == k >= at + (point is not None), (point, k, at)  # the first save of the child was whole
    while at < k:
        at += 1
        step(never_interrupted, at)
    assert bits(table) == bits(never_interrupted), (point, k)
    if (folder / "compact" / "c" / "manifest.json").exists():
        checkpoint.load(folder / "compact" / "c")  # whole at every moment
print(len(plans))
"""


@pytest.mark.jit
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_kill_9_while_it_grows_and_is_saved_loses_nothing(tmp_path, request):
    at_random = 100 if request.config.getoption("--long") else 4
    assert int(kills.run(KILLS, tmp_path / "c", at_random)) == 7 + at_random
