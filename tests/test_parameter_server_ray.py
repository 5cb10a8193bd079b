# SPDX-License-Identifier: Apache-2.0
"""Servers, workers and drivers that are processes of Ray; they are stopped and killed at any moment."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from needs import need
from servers import SPECS, batch, made, step

from nb_sparse_adam._src.parameter_server.routing import shards_of
from nb_sparse_adam.errors import (
    GradientError,
    OptionError,
    ServerError,
    ServerTimeout,
    StaleClientError,
    StepTimeout,
    TableError,
)
from nb_sparse_adam.parameter_server import ParameterServer, TableSpec

ray = need("ray")

pytestmark = pytest.mark.jit

# With counts of rows, clients that push other rows do not meet.
ROWS = {"user": TableSpec(8, lr=0.1, seed=3), "item": TableSpec(4, lr=0.1)}
PATHS = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this machine, and its address."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = PATHS  # of workers, who import what is here
    try:
        context = ray.init(
            num_cpus=16, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20
        )
        yield context.address_info["address"]
    finally:
        ray.shutdown()
        os.environ.pop("PYTHONPATH")
        os.environ.update({} if before is None else {"PYTHONPATH": before})


@pytest.fixture
def serve(cluster, tmp_path):
    """Make servers, which end with the test."""
    servers = []

    def create(tables=SPECS, name=None, **options):
        name = f"{tmp_path.name}-{len(servers)}" if name is None else name
        options = {"shards": 2, "durability": "log", "checkpoint_dir": tmp_path / name, **options}
        servers.append(ParameterServer.create(name, tables, **options))
        return servers[-1]

    yield create
    for server in servers:
        for handle in (*server._shards, server._coordinator):
            ray.kill(handle, no_restart=True)


def assert_same(server, tables):
    for name, table in tables.items():
        ids, values = table.export()
        order = np.argsort(ids)
        found = server.export(name)
        assert found[0].tolist() == ids[order].tolist()
        assert found[1].tobytes() == values[order].tobytes()


def pid_of(server, shard):
    return server.stats()["shards"][shard]["pid"]


def program(text, *arguments):
    """Start a program of its own, which may import what tests do."""
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": PATHS},
        stdout=subprocess.PIPE,
        text=True,
    )


# --- one client -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_any_number_of_shards_gives_the_bits_of_tables_in_this_process(serve, shards):
    server, here = serve(shards=shards), made()
    client = server.client()
    nothing = {name: ([], np.empty((0, spec.dim), np.float32)) for name, spec in SPECS.items()}
    vectors = client.push_pull(nothing, {name: ids for name, (ids, _) in batch(1).items()})
    step(here, nothing)
    for k in range(1, 6):
        given = batch(k)
        for name, (ids, _) in given.items():
            assert vectors[name].tobytes() == here[name].lookup(ids).tobytes()
        if k % 2:
            vectors = client.push_pull(given, {name: ids for name, (ids, _) in batch(k + 1).items()})
        else:
            client.push(given)
            vectors = client.pull({name: ids for name, (ids, _) in batch(k + 1).items()})
        for name, (ids, grads) in given.items():
            here[name].update(ids, grads)
    words = ["you", "and", "I", "you"]
    grads = np.ones((4, 8))
    assert client.pull({"user": words})["user"].tobytes() == here["user"].lookup(words).tobytes()
    client.push({"user": (words, grads)})
    here["user"].update(words, grads)
    assert_same(server, here)
    stats = server.stats()
    assert len(stats["shards"]) == shards
    assert stats["rows"] == sum(each["rows"] for each in stats["shards"])
    assert {each["pushes"] for each in stats["shards"]} == {7}
    assert stats["imbalance"] >= 1


def test_what_is_wrong_is_refused_with_the_errors_of_tables_here_and_changes_nothing(serve):
    tables = {"user": TableSpec(8, capacity=20), "item": TableSpec(4)}
    server, here = serve(tables), made(tables)
    client = server.client()
    client.push({"user": ([1, 2], np.ones((2, 8)))})
    before = [server.export(name)[1].tobytes() for name in tables]
    nan = np.ones((3, 8), np.float32)
    nan[1, 2] = np.nan
    large = np.full((3, 8), 2e19, np.float32)
    for ids, grads in (
        ([1, 2], np.ones((2, 7))),
        ([1, 2], np.ones((2, 8), np.int64)),
        ([1.5, 2], np.ones((2, 8))),
        ([1, 2, 3], nan),
        ([1, 2, 3], large),
        ([[1]], np.ones((1, 8))),
    ):
        here["user"].load([1, 2, 3], np.zeros((3, 8), np.float32))
        with pytest.raises(GradientError) as ours:
            here["user"].update(ids, grads)
        with pytest.raises(type(ours.value)) as theirs:
            client.push({"item": ([7], np.ones((1, 4))), "user": (ids, grads)})
        assert str(theirs.value).replace("push of", "update of") == str(ours.value)
    for wrong in (None, {"user": [1]}, {"user": ([1], [2], [3])}):
        with pytest.raises(GradientError, match="expected"):
            client.push(wrong)
    for call in (client.pull, client.push):
        with pytest.raises(TableError, match="there is no table 'nobody', expected one of"):
            call({"nobody": ([1], np.ones((1, 8)))})
    assert [server.export(name)[1].tobytes() for name in tables] == before
    with pytest.raises(TableError, match="there is room for 20 rows"):
        client.push({"user": (np.arange(100), np.ones((100, 8)))})
    client.push({"user": ([1, 2], np.ones((2, 8)))})  # full, and not dead
    # What a client would not send is refused by shards.
    shard = server._shards[0]
    for payload in ({"user": (np.arange(3), np.ones(3, np.int64), nan)}, {"user": (np.arange(3),) * 3}):
        with pytest.raises(GradientError):
            ray.get(shard.push.remote(client.incarnation, 99, payload, None))


def test_a_server_is_created_once_and_found_by_its_name(serve, tmp_path):
    server = serve(name="ads", shards=1)
    with pytest.raises(ServerError, match="there is a server 'ads' already"):
        serve(name="ads")
    with pytest.raises(ServerError, match="is the folder of a server already"):
        ParameterServer.create("other", SPECS, checkpoint_dir=tmp_path / "ads")
    with pytest.raises(ServerError, match="there is no server 'nobody'"):
        ParameterServer.attach("nobody")
    with pytest.raises(ServerError, match="is of server 'ads', expected 'nobody'"):
        ParameterServer.attach("nobody", checkpoint_dir=tmp_path / "ads")
    with pytest.raises(ServerError, match=r"has no server\.json"):
        ParameterServer.attach("nobody", checkpoint_dir=tmp_path)
    with pytest.raises(OptionError, match="cpus_per_shard is 20"):
        ParameterServer.create("large", SPECS, checkpoint_dir=tmp_path / "large", cpus_per_shard=20)
    found = ParameterServer.attach("ads")
    assert repr(found) == repr(server)
    assert found.tables == SPECS
    client = found.client()
    client.push(batch(1))
    other = pickle.loads(pickle.dumps(client))
    assert other.incarnation > client.incarnation
    other.push(batch(2))
    here = made()
    for k in (1, 2):
        step(here, batch(k))
    assert_same(server, here)
    assert len(server.evict("user", down_to=5)) == len(here["user"]) - 5
    with pytest.raises(OptionError, match=r"evict got \['older'\]"):
        server.evict("user", older=5)
    child = os.fork()
    if child == 0:
        try:
            client.pull({"user": [1]})
        except ServerError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# --- processes that die -----------------------------------------------------------------------------------


def mine(rank, k):
    """Ids that only one worker pushes: what comes out does not depend on who is first."""
    return {
        name: (np.abs(ids // 4) * 4 + rank, grads) for name, (ids, grads) in batch(100 * k + rank).items()
    }


@ray.remote(max_retries=0)
def pushes(name, rank, steps):
    client = ParameterServer.attach(name).client(timeout=120)
    for k in range(steps):
        given = mine(rank, k)
        client.pull({name: ids for name, (ids, _) in given.items()})
        client.push(given)
    return rank


def test_shards_that_are_killed_lose_no_push_and_apply_none_twice(serve, pytestconfig):
    """Ten of them while three workers push; the coordinator is killed, too."""
    kills = 100 if pytestconfig.option.long else 10
    server, workers, here = serve(ROWS, snapshot_interval=3), 3, made(ROWS)
    steps, done = 0, 0
    rng = np.random.default_rng(0)
    begun = time.monotonic()
    while done < kills:
        assert time.monotonic() - begun < 240 * max(kills / 10, 1)
        running = [pushes.remote(server.name, rank, 60) for rank in range(workers)]
        for _ in range(min(5, kills - done)):
            time.sleep(rng.uniform(0.05, 1.5))
            os.kill(pid_of(server, int(rng.integers(2))), signal.SIGKILL)
            done += 1
        ray.kill(server._coordinator, no_restart=False)
        assert ray.get(running) == list(range(workers))
        steps += 60
        for rank in range(workers):
            for k in range(60):
                step(here, mine(rank, k))
    assert_same(server, here)
    assert server.stats()["pushes"] == 2 * workers * steps


def test_a_push_reaches_each_shard_wholly_or_not_at_all_when_its_worker_is_killed(serve):
    """All rows get the same gradients: those of one shard stay equal."""
    server = serve({"user": TableSpec(8, initializer="zeros", lr=0.1)})

    @ray.remote(max_retries=0)
    def push_for_ever(name):
        client = ParameterServer.attach(name).client()
        k = 0
        while True:
            k += 1
            client.push({"user": (np.arange(20_000), np.full((20_000, 8), float(k % 7 + 1)))})

    running = [push_for_ever.remote(server.name) for _ in range(2)]
    deadline = time.monotonic() + 60
    while server.stats()["pushes"] < 12:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for each in running:
        ray.cancel(each, force=True)
    last = -1
    while (now := server.stats()["pushes"]) != last:
        last = now
        time.sleep(0.3)
    for shard in server._shards:
        _, values = ray.get(shard.export.remote("user"))
        assert len(values) > 9000
        assert (values == values[0]).all()


def test_a_driver_that_is_killed_leaves_its_server(serve, cluster, tmp_path):
    driver = program(
        "import sys, time\n"
        "from servers import SPECS, batch\n"
        "from nb_sparse_adam.parameter_server import ParameterServer\n"
        "folder, address = sys.argv[1:]\n"
        "server = ParameterServer.create('left', SPECS, checkpoint_dir=folder, address=address, shards=2)\n"
        "server.client().push(batch(1))\n"
        "print('pushed', flush=True)\n"
        "time.sleep(600)\n",
        tmp_path / "left",
        cluster,
    )
    assert driver.stdout.readline() == "pushed\n"
    driver.kill()
    driver.wait()
    driver.stdout.close()
    server = ParameterServer.attach("left")
    here = made()
    step(here, batch(1))
    assert_same(server, here)
    server.client().push(batch(2))
    server.shutdown()
    again = ParameterServer.attach("left", checkpoint_dir=tmp_path / "left")
    step(here, batch(2))
    assert_same(again, here)
    again.shutdown()


def test_a_cluster_that_is_killed_comes_back_from_the_disk(tmp_path):
    text = (
        "import sys, os\n"
        "from servers import SPECS, batch, made, step\n"
        "from nb_sparse_adam.parameter_server import ParameterServer\n"
        "import ray, test_parameter_server_ray as tests\n"
        "ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)\n"
        "folder, there, durability = sys.argv[1:4]\n"
        "here = made()\n"
        "for k in range(1, int(there) + 1): step(here, batch(k))\n"
        "if there == '0':\n"
        "    server = ParameterServer.create('ads', SPECS, checkpoint_dir=folder, durability=durability)\n"
        "else:\n"
        "    server = ParameterServer.attach('ads', checkpoint_dir=folder)\n"
        "    tests.assert_same(server, here)\n"
        "client = server.client()\n"
        "for k in range(int(there) + 1, int(there) + 6): client.push(batch(k))\n"
        "if durability == 'snapshot': server.snapshot()\n"
        "pids = [each['pid'] for each in server.stats()['shards']]\n"
        "for pid in pids: os.kill(pid, 9)\n"
        "print('done', flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    for there in (0, 5):
        running = program(text, tmp_path / "server", there, "log")
        assert running.communicate(timeout=120)[0] == "done\n"


def test_a_shard_that_is_stopped_holds_up_nobody_else_and_applies_nothing_twice(serve, pytestconfig):
    server, here = serve(), made()
    client, other = server.client(), server.client()
    client.push(batch(1))
    step(here, batch(1))
    pids = [each["pid"] for each in server.stats()["shards"]]
    ids = np.arange(40)
    own = ids[shards_of(ids, 2) == 1]
    short = server.client(timeout=0.5)
    os.kill(pids[0], signal.SIGSTOP)
    try:
        waiting = threading.Thread(target=client.push, args=(batch(2),))
        waiting.start()
        deadline = time.monotonic() + 20
        while ray.get(server._shards[1].stats.remote())["pushes"] < 2:
            assert time.monotonic() < deadline
        begun = time.monotonic()
        assert len(other.pull({"user": own})["user"]) == len(own)
        assert time.monotonic() - begun < 5
        with pytest.raises(ServerTimeout, match="process 0 has not answered in time"):
            short.pull({"user": ids})
        time.sleep(20 if pytestconfig.option.long else 4)
        assert waiting.is_alive()
    finally:
        os.kill(pids[0], signal.SIGCONT)
    waiting.join(60)
    assert not waiting.is_alive()
    step(here, batch(2))
    assert_same(server, here)


def test_without_a_log_no_more_is_lost_than_since_the_last_snapshot(serve):
    server, here = serve(durability="snapshot", shards=1), made()
    client = server.client()
    for k in range(1, 4):
        client.push(batch(k))
        step(here, batch(k))
    server.snapshot()
    for k in range(4, 8):
        client.push(batch(k))
    os.kill(pid_of(server, 0), signal.SIGKILL)
    assert_same(server, here)
    client.push(batch(8))
    step(here, batch(8))
    assert_same(server, here)
    assert server.stats()["shards"][0]["lost_pushes"] == 4


# --- several workers --------------------------------------------------------------------------------------


@ray.remote(max_retries=0)
def steps_of(name, rank, first, last, wait=0.0):
    """Push a worker's part of some steps; return what it has seen before each, and what went wrong."""
    client = ParameterServer.attach(name).client(rank)
    seen = []
    for k in range(first, last):
        seen.append(client.pull({"user": np.arange(6)})["user"])
        time.sleep(wait)
        try:
            client.push(batch(10 * k + rank))
        except StepTimeout as error:
            seen.append(str(error))
    return seen


def sum_of(steps, workers=4):
    """Do here what steps of all workers do."""
    here = made()
    for k in steps:
        for name, table in here.items():
            parts = [batch(10 * k + rank)[name] for rank in range(workers)]
            for ids, _ in parts:
                table.lookup(ids)
            sums = []
            for ids, grads in parts:
                alone = dict.fromkeys(ids.tolist())
                sums.append((list(alone), np.array([_in_order(grads[ids == each]) for each in alone])))
            table.update(np.concatenate([ids for ids, _ in sums]), np.concatenate([each for _, each in sums]))
    return here


def _in_order(grads):
    total = grads[0].copy()
    for each in grads[1:]:
        total += each
    return total


@pytest.mark.parametrize("shards", [1, 3])
def test_a_synchronous_step_is_the_sum_over_workers_whatever_dies(serve, shards):
    server = serve(shards=shards, consistency="sync", workers=4)
    running = [steps_of.remote(server.name, rank, 1, 8, 0.05 * rank) for rank in range(4)]
    time.sleep(2)
    if shards == 3:
        os.kill(pid_of(server, 1), signal.SIGKILL)
        ray.kill(server._coordinator, no_restart=False)
    seen = ray.get(running)
    assert not any(isinstance(each, str) for rank in seen for each in rank), seen
    for rank in range(1, 4):  # between two steps all workers see the same
        assert np.array_equal(seen[rank], seen[0])
    assert_same(server, sum_of(range(1, 8)))


def test_a_worker_that_does_not_push_ends_the_step_for_all(serve):
    server = serve(consistency="sync", workers=4, step_timeout=2)
    assert not ray.get(steps_of.remote(server.name, 3, 0, 0))
    seen = ray.get([steps_of.remote(server.name, rank, 1, 2) for rank in range(3)])
    for _, error in seen:
        assert "step 1 was given up: not all workers have pushed within 2.0 s" in error
    assert len(server.export("user")[0]) == 0
    late = server.client(3)
    old = late.incarnation
    late._step = 1  # it has slept all the while
    with pytest.raises(StepTimeout, match="this worker, of rank 3, has not pushed"):
        late.push(batch(1))
    assert late.incarnation > old
    running = [steps_of.remote(server.name, rank, 2, 4) for rank in range(3)]
    for k in (2, 3):
        late.push(batch(10 * k + 3))
    ray.get(running)
    assert_same(server, sum_of([2, 3]))
    server.client(3)  # takes its place
    with pytest.raises(StaleClientError, match="is not the worker of rank 3 any more"):
        late.push(batch(1))


@ray.remote(max_retries=0)
def times_of(name, rank, pushes):
    client = ParameterServer.attach(name).client(rank)
    found = []
    for _ in range(pushes):
        time.sleep(0.05 * (rank == 3))
        client.push(batch(rank))
        found.append(time.time())
    client.close()
    with pytest.raises(ServerError, match="was closed"):
        client.push(batch(rank))
    return client._base, found


def test_no_worker_is_further_ahead_than_the_bound(serve):
    server = serve(shards=1, consistency=("bounded", 2), workers=4, step_timeout=5)
    for rank in range(4):
        server.client(rank)  # all are there before one begins
    found = ray.get([times_of.remote(server.name, rank, 15) for rank in range(4)])
    events = sorted((moment, rank) for rank, (_, moments) in enumerate(found) for moment in moments)
    begun_at = [base for base, _ in found]  # one that comes last begins beside the slowest of the others
    made_by, furthest = list(begun_at), 0
    for _, rank in events:
        made_by[rank] += 1
        furthest = max(furthest, max(made_by) - min(made_by))
    # A push returns when the slowest is two behind; which of the two is told first, nobody knows.
    assert 1 <= furthest <= 3
    assert made_by == [15 + base for base in begun_at]
