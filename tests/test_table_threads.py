# SPDX-License-Identifier: Apache-2.0
"""An `EmbeddingTable` in use by threads and forked children, interrupted, and what memory it takes."""

import copy
import faulthandler
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from checks import refused
from interrupts import interrupted

from nb_sparse_adam import EmbeddingTable, Eviction, RowGradient
from nb_sparse_adam._src.table import snapshot
from nb_sparse_adam.errors import TableError

pytestmark = pytest.mark.jit
DIM = 24


@pytest.fixture
def _watchdog():
    faulthandler.dump_traceback_later(240, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def constant(ids):
    """Each row has one number, so that a torn one can be seen."""
    return np.repeat((ids % 1000).astype(np.float32)[:, None], DIM, 1)


def stepping(table, steps=25):
    """Updates, growth and eviction, the same every time."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        ids = rng.integers(0, 400 + 300 * step, 1500)
        table.lookup(ids)
        grads = np.repeat(rng.normal(size=(len(ids), 1)).astype(np.float32), DIM, 1)
        table.update(ids, grads)
        if step % 7 == 6:
            table.evict(older_than_steps=5, seen_fewer_than=2)


def table_to_share():
    return EmbeddingTable(
        DIM, initializer=constant, lr=0.1, capacity=9000, unknown="initial",
        eviction=Eviction(older_than_steps=12, rows_a_step=500, when_full=True),
    )  # fmt: skip


@pytest.mark.usefixtures("_watchdog")
def test_no_row_is_torn_and_no_update_is_lost():
    alone, shared = table_to_share(), table_to_share()
    stepping(alone)
    ended, errors, reads = threading.Event(), [], [0, 0]

    def read(which):
        rng = np.random.default_rng(which)
        try:
            while not ended.is_set():
                ids = rng.integers(0, 20_000, 2000)
                vectors = shared.lookup(ids, train=False)
                assert (vectors == vectors[:, :1]).all()
                pooled = shared.lookup_bags(ids, range(0, 2000, 5), train=False)
                assert (pooled == pooled[:, :1]).all()
                exported, values = shared.export()
                assert len(exported) == len(np.unique(exported)) == len(values) <= 9000
                assert (values == values[:, :1]).all()
                assert shared.contains(exported).dtype == bool
                stats = shared.stats()
                assert stats["admitted"] - stats["evicted"] == stats["rows"]
                reads[which] += 1
        except Exception as error:  # noqa: BLE001 (raised by the thread that joins)
            errors.append(error)

    threads = [threading.Thread(target=read, args=(which,), daemon=True) for which in range(2)]
    for thread in threads:
        thread.start()
    try:
        stepping(shared)
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads)
    assert min(reads) > 0
    for one, other in zip(alone.export(), shared.export(), strict=True):
        assert one.tobytes() == other.tobytes()
    ids = alone.ids()
    for one, other in zip(alone.state(ids), shared.state(ids), strict=True):
        assert one.tobytes() == other.tobytes()
    assert alone.stats() == shared.stats()


@pytest.mark.usefixtures("_watchdog")
def test_steps_of_several_threads_all_happen():
    tables = [EmbeddingTable(1, initializer="zeros", lr=0.1, name=f"t{at}") for at in range(3)]
    for table in tables:
        table.lookup([1, 2])
    ones = RowGradient([1, 2], np.ones((2, 1), np.float32))

    def work(which):
        order = tables[which:] + tables[:which]
        for _ in range(50):
            EmbeddingTable.update_together(dict.fromkeys(order[:2], ones))
            order[2].lookup([1], train=False)
            order[1].lookup([2])

    threads = [threading.Thread(target=work, args=(which,), daemon=True) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for table in tables:
        assert table.stats()["steps"] == 100
        assert table.state([1, 2]).steps.tolist() == [100, 100]
        assert table.state([1, 2]).seen.tolist() == [1, 51]


@pytest.mark.usefixtures("_watchdog")
def test_tables_that_are_exchanged_while_others_step_wait_for_nobody_for_ever():
    """As when a checkpoint is loaded into tables that are in use: in whatever order each names them."""
    tables = [EmbeddingTable(1, initializer="zeros", lr=0.1, name=f"t{at}") for at in range(2)]
    ones = RowGradient([1], np.ones((1, 1), np.float32))

    def exchanges(order):
        for _ in range(100):
            snapshot.exchange(
                order,
                lambda: {each: EmbeddingTable(1, initializer="zeros", name=each.name) for each in order},
            )

    def steps(order):
        for _ in range(300):
            EmbeddingTable.update_together(dict.fromkeys(order, ones))

    backwards = tables[::-1]
    threads = [
        threading.Thread(target=work, args=(order,), daemon=True)
        for work in (exchanges, steps)
        for order in (tables, backwards)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


# --- forks ------------------------------------------------------------------------------------------------

FORKS = """
import os, signal, sys, threading, time, traceback, warnings
import numpy as np
from nb_sparse_adam import EmbeddingTable
from nb_sparse_adam.errors import StateError
warnings.simplefilter("ignore")

def in_child(work):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, str(work()).encode())
        except StateError as error:
            assert "forked" in str(error), error
            os.write(write, b"StateError")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    end = time.monotonic() + 60
    while not os.waitpid(child, os.WNOHANG)[0]:
        assert time.monotonic() < end, os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    with open(read) as pipe:
        return pipe.read()

ids = np.arange(3000)
ones = np.ones((3000, 8), np.float32)

def use(table):
    table.lr = 0.5
    table.lookup([-1], train=False)
    table.lookup([-2, 5])
    table.update([5, -2], ones[:2])
    table.evict(down_to=100)
    return len(table.export()[0])

table = EmbeddingTable(8, name="shared")
table.lookup(ids)
print(in_child(lambda: use(table)), len(table), table.lr)

ended = threading.Event()
def steps():
    while not ended.is_set():
        table.lookup(ids)
        table.update(ids, ones)
def reads():
    while not ended.is_set():
        table.lookup(ids, train=False)
threads = [threading.Thread(target=each) for each in (steps, reads)]
for thread in threads:
    thread.start()
print({in_child(lambda: use(table)) for _ in range(4)} - {"StateError"})
ended.set()
for thread in threads:
    thread.join()
print(len(table), table.lr)

held = threading.Event(), threading.Event()
def hold():
    def work():
        held[0].set()
        held[1].wait()
    table._shared.write(work)
thread = threading.Thread(target=hold)
thread.start()
held[0].wait()
def ask(work):
    try:
        work()
    except StateError:
        return "refused"
    return "went on"
asks = [lambda: table.lookup([1]), lambda: table.update([1], ones[:1]), lambda: setattr(table, "lr", 1)]
print([in_child(lambda: ask(work)) for work in asks])
held[1].set()
thread.join()

mapped = EmbeddingTable(8, capacity=5000, state_dir=sys.argv[1])
mapped.lookup(ids)
before = mapped.export()[1].tobytes()
asks = [
    lambda: mapped.lookup([-5]), lambda: mapped.lookup_bags([5], [0]), lambda: mapped.update([1], ones[:1]),
    lambda: mapped.load([-9], ones[:1]), lambda: mapped.evict(down_to=0),
]
print([in_child(work) for work in asks])
print(in_child(lambda: mapped.lookup(ids, train=False).tobytes() == before))
print(mapped.export()[1].tobytes() == before, len(mapped), mapped.contains([-5, -9]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_forked_children_work_or_are_refused(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", FORKS, str(tmp_path / "state")], capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr
    assert ran.stdout.splitlines() == [
        "100 3000 0.001",
        "{'100'}",
        "3000 0.001",
        "['refused', 'refused', 'refused']",
        "['StateError', 'StateError', 'StateError', 'StateError', 'StateError']",
        "True",
        "True 3000 [False False]",
    ]


def test_rows_in_a_file_are_those_in_memory(tmp_path):
    tables = [EmbeddingTable(3, capacity=500, lr=0.1, state_dir=each) for each in (None, tmp_path / "state")]
    for table in tables:
        for step in range(3):
            ids = np.arange(100 * step, 100 * step + 200)
            table.lookup(ids)
            table.update(ids, np.ones((200, 3), np.float32))
            table.evict(older_than_steps=1)
    assert tables[0].export()[1].tobytes() == tables[1].export()[1].tobytes()
    assert sum(path.stat().st_size for path in (tmp_path / "state").iterdir()) > 0


# --- interrupts -------------------------------------------------------------------------------------------


def whole(table):
    """Everything that is there, and that it fits together."""
    ids, values = table.export()
    state = table.state(ids)
    assert len(ids) == len(np.unique(ids)) == len(table) <= table.capacity
    assert table.contains(ids).all()
    bits = [each.tobytes() for each in (ids, values, state.exp_avg, state.exp_avg_sq, state.steps)]
    return [*bits, table.stats()["evicted"]]


ACTS = {
    "lookup": lambda table: table.lookup([5, 6, 7, 7]),
    "lookup of more than there is room for": lambda table: table.lookup(range(50, 58)),
    "update": lambda table: table.update([1, 2, 99, 1], np.ones((4, 2), np.float32)),
    "bags": lambda table: table.update_bags([1, 2, 99, 1], [0, 2], np.ones((2, 2), np.float32)),
    "load": lambda table: table.load([1, 20], np.full((2, 2), 7, np.float32)),
    "evict": lambda table: table.evict(down_to=2),
}


@pytest.mark.parametrize("act", ACTS)
def test_an_interrupt_leaves_things_done_or_not_begun(act, request):
    def fresh():
        table = EmbeddingTable(
            2, initializer="normal(0, 1)", lr=0.1, capacity=8, eviction=Eviction(when_full=True)
        )
        table.lookup([1, 2, 3, 4])
        table.update([1, 2], np.ones((2, 2), np.float32))
        return table

    table = fresh()
    before = whole(table)
    ACTS[act](table)
    states = [before, whole(table)]
    if act == "lookup of more than there is room for":  # the old rows go first
        emptied = fresh()
        emptied.evict(down_to=0)
        states.append(whole(emptied))
    for at in range(0, 3000, 1 if request.config.getoption("--long") else 5):
        table = fresh()
        where = interrupted(lambda table=table: ACTS[act](table), at)
        assert whole(table) in states, where
        table.lookup([1, 2])
        table.update([1, 2], np.ones((2, 2), np.float32))
        assert table.state([1, 2]).steps.min() >= 1, where
        assert len(table) <= 8
        ran = threading.Thread(target=table.lookup, args=([1],), daemon=True)  # no lock is left behind
        ran.start()
        ran.join(20)
        assert not ran.is_alive(), where
        if where is None:
            break
    assert where is None


# --- memory, copies ---------------------------------------------------------------------------------------

RESIDENT = """
import re
import numpy as np
from nb_sparse_adam import EmbeddingTable
def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1e3
def use(table, n):
    for first in range(0, n, 4096):
        table.lookup(np.arange(first, min(first + 4096, n)))
    table.update(np.arange(100), np.ones((100, 16), np.float32))
use(EmbeddingTable(16), 6000)
before = resident()
tables = [EmbeddingTable(16), EmbeddingTable(16, capacity=20_000_000), EmbeddingTable(64, capacity=10**7)]
print(resident() - before)
n = 200_000
use(tables[0], n)
stats = tables[0].stats()
print(resident() - before, (stats["bytes_of_rows"] + stats["bytes_of_index"]) / 1e6)
print(stats["bytes_of_rows"] / n, stats["bytes_of_index"] / n)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_capacity_takes_memory_when_it_is_used():
    ran = subprocess.run(
        [sys.executable, "-c", RESIDENT], capture_output=True, text=True, timeout=240, check=True
    )
    unused, used, said, row, index = map(float, ran.stdout.split())
    assert unused < 5  # MB
    assert row == 32 + 3 * 4 * 16
    assert index <= 24
    assert used < 1.15 * said + 10  # pages of 2 MB, the gradient's scratch


def test_copies_and_pickles_are_tables_of_their_own():
    """A layer's copy, in `test_torch_dynamic_state.py`, goes on with the same bits."""
    table = table_to_share()
    stepping(table, 9)
    before = whole(table)
    for work in (copy.copy, copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))):
        other = work(table)
        assert whole(other) == before
        assert repr(other) == repr(table)
        assert other.stats() == {**table.stats(), "bytes_of_rows": len(table) * table._store.record}
        stepping(other, 2)
        assert whole(table) == before != whole(other)


def test_a_table_in_a_folder_is_not_copied(tmp_path):
    table = EmbeddingTable(2, name="big", capacity=5, state_dir=tmp_path / "state")
    for work in (copy.copy, copy.deepcopy, pickle.dumps):
        with refused(TableError, Exception, "'big'", "export()"):
            work(table)
