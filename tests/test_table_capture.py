# SPDX-License-Identifier: Apache-2.0
"""A table is saved as it was at one moment, whatever is done to it between two pieces of its files."""

import os
import shutil
import subprocess
import sys
import threading
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
from checks import STEP_COUNTS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interrupts import interrupted
from table_saves import CHANGES, DIM, chain_in, content, do, files_in, make, step, trained, without_names

from nb_sparse_adam import EmbeddingTable, Eviction, RowGradient, checkpoint
from nb_sparse_adam._src.checkpoint import saving, table_saving
from nb_sparse_adam._src.table import capture, snapshot

pytestmark = pytest.mark.usefixtures("no_fsync")


@contextmanager
def between_pieces(work, rows=2):
    """Call something between two pieces that are read of a table, each of so many rows, and within each."""
    read, copy = capture.Capture.read, capture.Capture.copy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "AT_ONCE", rows)
        patch.setattr(capture, "BLOCK_BYTES", 200)  # of a few rows

        def and_work(done):
            return lambda *given_to: (done(*given_to), work())

        patch.setattr(capture.Capture, "read", and_work(read))
        patch.setattr(capture.Capture, "copy", and_work(copy))
        yield


def operate(table, folder, operation, given_to):
    if operation == "widen":
        table._store.table._widen()
    elif operation == "restore":
        checkpoint.restore(folder, table)
    else:
        do(table, operation, given_to)


DURING = st.one_of(*CHANGES, *CHANGES, st.tuples(st.sampled_from(["widen", "restore"]), st.none()))
OPTIONS = st.fixed_dictionaries({
    "step_counts": st.sampled_from(STEP_COUNTS),
    "dtype": st.sampled_from([np.float32, np.float64]),
    "admission": st.sampled_from([None, 2, 0.5]),
    "eviction": st.sampled_from([Eviction(when_full=True), Eviction(older_than_steps=2, rows_a_step=40)]),
})  # fmt: skip


@settings(max_examples=settings().max_examples // 5)
@example(  # records that were evicted are those of others while they are saved
    options={"eviction": Eviction(when_full=True), "step_counts": "row"},
    before=[("lookup", [1, 2, 3]), ("update", [1, 2, 3])],
    during=[[("evict", 0), ("lookup", [4, 5, 6]), ("update", [4, 5, 6]), ("load", [4])], []],
)
@given(
    options=OPTIONS,
    before=st.lists(st.one_of(*CHANGES, st.tuples(st.just("widen"), st.none())), max_size=6),
    during=st.lists(st.lists(DURING, max_size=8), min_size=1, max_size=3),
)
def test_a_save_is_of_its_moment_whatever_comes_meanwhile(options, before, during, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moment")
    room = 12 if options["eviction"].when_full else 40  # for more ids than there are
    table = make(**{**options, "capacity": room, "admission_bytes": 64, "on_nonfinite": "skip"})
    checkpoint.save(folder / "first", table)
    for each in before:
        operate(table, folder / "first", *each)
    chain = [folder / "0"]
    for k, operations in enumerate([*during, []]):
        base = chain[k - 1] if k else None
        expected, left = folder / f"expected-{k}", list(operations)
        checkpoint.save(expected, table, k, base=base)
        with between_pieces(lambda left=left: left and operate(table, folder / "first", *left.pop(0))):
            checkpoint.save(chain[k], table, k, base=base)
        assert files_in(chain[k]) == files_in(expected)
        assert without_names(chain[k]) == without_names(expected)
        assert table._store.captures == []
        for each in left:  # there were too few pieces
            operate(table, folder / "first", *each)
        if "restore" in dict(operations):
            break  # it is after another save then
        chain.append(folder / str(k + 1))
    else:  # what has changed while increments were written is in the next one
        chain.pop()
        checkpoint.save(folder / "full", table, len(during))
        checkpoint.compact(chain, folder / "compact")
        assert files_in(folder / "compact") == files_in(folder / "full")
        assert without_names(folder / "compact") == without_names(folder / "full")
    shutil.rmtree(folder)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_growth_and_counts_that_are_widened_meanwhile(step_counts, wide, tmp_path):
    table = make(step_counts=step_counts, initializer="uniform(-1, 1)")
    ids, new = np.arange(40), np.arange(100, 1200)  # more than the first memory is shown for
    table.lookup(ids)
    table.update(ids[:30], np.ones((30, DIM), np.float32))
    if wide:
        table._store.table._widen()
    checkpoint.save(tmp_path / "expected", table)
    works = [
        lambda: table.update(ids[::3], np.ones((14, DIM), np.float32)),
        lambda: table.lookup(new),
        table._store.table._widen,
        lambda: table.update(np.concatenate([ids, new]), np.ones((1140, DIM), np.float32)),
        lambda: table.evict(down_to=5),
        lambda: table.lookup(new + 2000),
        lambda: table.update(new + 2000, np.ones((1100, DIM), np.float32)),
        lambda: table.load([1, 2, 2101], np.ones((3, DIM), np.float32)),
    ]
    with between_pieces(lambda: works and works.pop(0)()):
        checkpoint.save(tmp_path / "saved", table)
    assert not works
    assert files_in(tmp_path / "saved") == files_in(tmp_path / "expected")
    dtype = np.int64 if wide else np.int32
    again = checkpoint.load(tmp_path / "saved")[0]
    assert again._store.table.arrays.counts.dtype == (np.int64 if step_counts == "global" else dtype)


@pytest.mark.parametrize("state_dir", [False, True])
def test_a_table_that_is_restored_meanwhile(state_dir, tmp_path):
    table, folders = chain_in(tmp_path)
    if state_dir:
        table = make(capacity=50, state_dir=tmp_path / "state")
        checkpoint.restore(folders, table)
    step(table, 50)
    checkpoint.save(tmp_path / "expected", table)
    works = [
        lambda: checkpoint.restore(folders[:2], table),
        lambda: step(table, 51),
        lambda: table.evict(down_to=2),
        lambda: step(table, 52),
    ]
    with between_pieces(lambda: works and works.pop(0)()):
        checkpoint.save(tmp_path / "saved", table)
    assert not works
    assert files_in(tmp_path / "saved") == files_in(tmp_path / "expected")
    assert without_names(tmp_path / "saved") == without_names(tmp_path / "expected")


def test_saves_that_are_begun_at_several_moments_and_written_at_once(tmp_path):
    table, pending, extra = trained(), [], {"list": [1]}
    for k in range(3):
        checkpoint.save(tmp_path / f"expected-{k}", table, extra)
        pending.append(table_saving.begin_save({"table": table}, True, extra, None))
        extra["list"].append(k)
        step(table, 20 + k)
        table.evict(down_to=8 - k)
    copied = snapshot.copied(table)[0]
    assert len(table._store.captures) == 3
    for k, each in enumerate(pending):
        saved = each.write(tmp_path / str(k), False)
        assert (saved.pause, saved.size > 0) == (each.pause, True)
        each.close()
        each.close()
        assert files_in(tmp_path / str(k)) == files_in(tmp_path / f"expected-{k}")
        assert without_names(tmp_path / str(k)) == without_names(tmp_path / f"expected-{k}")
    assert table._store.captures == []
    assert copied["ids"].tolist() == sorted(table.ids())


def test_a_capture_that_nobody_closed_is_forgotten_with_it(tmp_path):
    table = trained()
    pending = table_saving.begin_save({"table": table}, True, None, None)
    step(table, 9)
    assert len(table._store.captures) == 1
    alive = weakref.ref(pending)
    del pending
    assert alive() is None
    step(table, 10)
    assert table._store.captures == []


def test_rows_are_kept_once_and_only_those_that_are_saved():
    table = make(initializer="zeros")
    table.lookup([1, 2, 3, 4])
    table.evict(down_to=3)
    held = capture.Capture(table)
    table.update([2, 2, 3, 2, 99], np.ones((5, DIM), np.float32))
    assert held._kept == 2
    table.update_bags([2, 3], [0, 1], np.ones((2, DIM), np.float32))
    table.lookup([2, 50, 51, 52], train=False)
    assert held._kept == 2
    table.lookup([4, 4, 60, 61])
    assert held._kept == 3
    assert not table.evict(older_than_steps=100).size
    table.evict(down_to=0)
    table.lookup([70, 71, 72, 73, 74])
    assert held._kept == 3 + 1  # the record that was nobody's, and somebody's meanwhile
    assert held.arrays()["param"][:].tolist() == [[0.0] * DIM] * 3
    clock = table._store.clock
    table.evict(down_to=4)
    held = capture.Capture(table, clock)
    assert held.arrays()["ids"].tolist() == []
    table.lookup([70, 71, 72, 73, 74, 75])
    assert held._kept == 0  # it has no row


def test_what_is_saved_while_another_thread_steps_is_of_one_moment(tmp_path):
    tables = {"a": make(initializer="zeros"), "b": make(initializer="zeros", name="b")}
    ids, ended, errors = np.arange(60), threading.Event(), []
    gradient = RowGradient(ids, np.ones((60, DIM), np.float32))

    def work():
        try:
            while not ended.is_set():
                for table in tables.values():
                    table.lookup(ids)
                EmbeddingTable.update_together(dict.fromkeys(tables.values(), gradient))
        except Exception as error:  # noqa: BLE001 (raised by the thread that joins)
            errors.append(error)

    for table in tables.values():
        table.lookup(ids)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    steps = []
    try:
        for k in range(6):
            with between_pieces(lambda: None, rows=20):
                checkpoint.save(tmp_path / str(k), tables, base=tmp_path / str(k - 1) if k else None)
    finally:
        ended.set()
        thread.join(60)
    assert not errors, errors
    for k in range(6):
        loaded, _ = checkpoint.load([tmp_path / str(each) for each in range(k + 1)])
        counts = [table.state(ids).steps for table in loaded.values()]
        assert {count for each in counts for count in each.tolist()} == {loaded["a"].stats()["steps"]}
        for table in loaded.values():
            assert len(np.unique(table.lookup(ids, train=False))) == 1
        steps.append(loaded["a"].stats()["steps"])
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]  # it has gone on


FORKING = """
import os, sys
import numpy as np
from nb_sparse_adam import EmbeddingTable, checkpoint
from nb_sparse_adam._src.checkpoint import saving
table = EmbeddingTable(2, initializer="zeros", num_threads=1)
table.lookup([1, 2, 3])
children = []
def fork(point):
    if children:
        return
    table.update([3], np.ones((1, 2), np.float32))
    children.append(os.fork())
    if children[0] == 0:
        held = table._store.captures[0]()
        table.lookup([1])
        table.update([2], np.ones((1, 2), np.float32))
        same = held._kept == 1 and not table._store.captures
        checkpoint.save(sys.argv[1] + "/child", table)
        os._exit(0 if same else 1)
    assert os.waitpid(children[0], 0)[1] == 0
    table.update([1], np.ones((1, 2), np.float32))
    assert table._store.captures[0]()._kept == 2
saving._reached = fork
checkpoint.save(sys.argv[1] + "/parent", table)
for name in ("parent", "child"):
    print(checkpoint.load(sys.argv[1] + "/" + name)[0].state([1, 2, 3]).steps.tolist())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_child_forked_during_a_save_keeps_nothing_for_it(tmp_path):
    command = [sys.executable, "-c", FORKING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (0, "[0, 0, 0]\n[0, 1, 1]\n"), done.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # generators let go
def test_an_interrupt_anywhere_leaves_no_capture_and_no_lock(tmp_path, request):
    stride = 1 if request.config.getoption("--long") else 29
    table = trained()
    for at in range(0, 100_000, stride):
        checkpoint.save(tmp_path / "base", table)  # each time: those that are interrupted are noted, too
        step(table, 30 + at)
        if interrupted(lambda: checkpoint.save(tmp_path / "s", table, base=tmp_path / "base"), at) is None:
            break
        assert table._store.captures == [], at
        thread = threading.Thread(target=step, args=(table, at), daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive(), at
    assert at > 200
    assert content(checkpoint.load([tmp_path / "base", tmp_path / "s"])[0]) == content(table)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_of_a_step_leaves_the_save_right(tmp_path):
    table = trained()
    checkpoint.save(tmp_path / "expected", table)
    tried = []

    def work():
        if len(tried) < 60 and (not tried or tried[-1] is not None):
            tried.append(interrupted(lambda: step(table, 40 + len(tried)), 7 * len(tried)))

    with between_pieces(work):
        checkpoint.save(tmp_path / "saved", table)
    assert len(tried) > 20
    assert files_in(tmp_path / "saved") == files_in(tmp_path / "expected")


def test_a_save_that_fails_is_no_base(tmp_path, monkeypatch):
    table = trained()
    checkpoint.save(tmp_path / "0", table)

    def fail(point):
        if point == "a file written":
            step(table, 60)
            raise OSError(28, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "_reached", fail)
        with pytest.raises(OSError, match="no space left"):
            checkpoint.save(tmp_path / "0", table)
    assert table._store.captures == []
    step(table, 61)
    checkpoint.save(tmp_path / "1", table, base=tmp_path / "0")
    assert content(checkpoint.load([tmp_path / "0", tmp_path / "1"])[0]) == content(table)
