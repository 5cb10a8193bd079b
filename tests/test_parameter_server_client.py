# SPDX-License-Identifier: Apache-2.0
"""A client whose calls are lost, in this process: shards and coordinator are real, Ray is not."""

import copy
import threading
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from servers import SPECS, batch, made, step

from nb_sparse_adam._src.parameter_server import client as module
from nb_sparse_adam._src.parameter_server.client import Client
from nb_sparse_adam._src.parameter_server.coordinator import Coordinator
from nb_sparse_adam._src.parameter_server.shard import Shard
from nb_sparse_adam._src.parameter_server.spec import check_config
from nb_sparse_adam.errors import ServerTimeout

pytestmark = pytest.mark.jit


class RayError(Exception):
    """As `ray.exceptions.RayError`."""


class TaskError(RayError):
    """As Ray's: a method has raised something."""

    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class ActorError(RayError):
    """As Ray's: a process has died."""


class GetTimeoutError(RayError):
    """As Ray's: nothing has come in time."""


def get(reference, timeout):
    """As `ray.get`, of what `Handle` gives."""
    if isinstance(reference, list):
        return [get(each, timeout) for each in reference]
    if isinstance(reference, RayError):
        raise reference
    return reference


RAY = SimpleNamespace(
    get=get,
    exceptions=SimpleNamespace(
        RayError=RayError, RayTaskError=TaskError, RayActorError=ActorError, GetTimeoutError=GetTimeoutError,
        ObjectLostError=ActorError,
    ),
)  # fmt: skip


class Handle:
    """An actor's handle: calls are made at once, with copies, and get lost if that is wanted.

    ``lost[method]`` says how its next call does: "unsent", "unanswered", or "dead". What is in
    ``before[method]`` is called before its next call.
    """

    def __init__(self, target, one_at_a_time=True):
        self.target, self.lost, self.before = target, {}, {}
        self._calling = threading.Lock() if one_at_a_time else nullcontext()  # none is of a process that ends

    def __getattr__(self, method):
        return SimpleNamespace(remote=partial(self._call, method))

    def _call(self, method, *arguments):
        lost = self.lost.pop(method, None)
        if lost == "unsent":
            return GetTimeoutError()
        if lost == "dead":
            self.lost[method] = lost  # for good
            return ActorError("The actor died because all references to it were removed.\nAnd so on")
        try:
            with self._calling:
                self.before.pop(method, lambda: None)()
                found = getattr(self.target, method)(*copy.deepcopy(arguments))
        except Exception as error:  # noqa: BLE001 (the client gets it, as from Ray)
            return TaskError(error)
        return GetTimeoutError() if lost == "unanswered" else found


class Cluster:
    """A server of two shards."""

    def __init__(self, folder, workers=1, durability="log", consistency="sync"):
        self._folder = folder
        self.config = check_config(
            "test",
            SPECS,
            2,
            durability,
            1e6,
            consistency,
            workers if consistency == "sync" else None,
            60.0,
            0,
        )
        self.coordinator = Handle(Coordinator(folder / "coordinator", self.config), one_at_a_time=False)
        self.shards = [Handle(self._open(number)) for number in range(2)]

    def _open(self, number):
        return Shard(self._folder / f"shard-{number}", self.config, number)

    def restart(self, number):
        self.shards[number].target.hold.let_go()
        self.shards[number].target = self._open(number)

    def client(self, rank=0):
        return Client(RAY, self.config, self.coordinator, self.shards, rank, 0.2)

    def rows(self):
        """Ids and values of all shards."""
        found = {}
        for name in SPECS:
            parts = [each.target.export(name) for each in self.shards]
            ids, values = (np.concatenate(each) for each in zip(*parts, strict=True))
            order = np.argsort(ids)
            found[name] = ids[order].tolist(), values[order].tobytes()
        return found


def rows_after(*batches):
    """What tables of this process have after some batches."""
    here, found = made(), {}
    for number in batches:
        step(here, batch(number))
    for name, table in here.items():
        ids, values = table.export()
        order = np.argsort(ids)
        found[name] = ids[order].tolist(), values[order].tobytes()
    return found


@pytest.mark.parametrize("lost", ["unsent", "unanswered"])
def test_a_step_that_was_not_staged_everywhere_is_never_mixed_with_the_next(tmp_path, lost):
    """One shard has parts of the push that failed: under the same number they would be taken for the next."""
    cluster = Cluster(tmp_path)
    client = cluster.client()
    client.push(batch(1))
    before = client.incarnation
    cluster.shards[1].lost["stage"] = lost
    with pytest.raises(ServerTimeout, match="process 1 has not answered"):
        client.push(batch(2))
    client.push(batch(3))
    assert client.incarnation > before
    assert cluster.rows() == rows_after(1, 3)
    client.push(batch(4))
    assert cluster.rows() == rows_after(1, 3, 4)


@pytest.mark.parametrize(("lost", "applied"), [("unsent", (1, 3)), ("unanswered", (1, 2, 3))])
def test_a_decision_that_was_not_heard_is_learnt_before_the_next_push(tmp_path, lost, applied):
    cluster = Cluster(tmp_path)
    client = cluster.client()
    client.push(batch(1))
    cluster.coordinator.lost["arrive"] = lost
    with pytest.raises(ServerTimeout, match="the coordinator of 'test'"):
        client.push(batch(2))
    client.push(batch(3))
    assert cluster.rows() == rows_after(*applied)


@pytest.mark.parametrize("lost", ["unsent", "unanswered"])
def test_a_step_that_was_decided_is_applied_before_the_next_one(tmp_path, lost):
    cluster = Cluster(tmp_path)
    client = cluster.client()
    cluster.shards[0].lost["commit"] = lost
    given = batch(1)
    with pytest.raises(ServerTimeout):
        client.push(given)
    given["user"][1][:] = 1000.0  # what was sent is not what a caller does to it later
    client.push(batch(2))
    assert cluster.rows() == rows_after(1, 2)


@pytest.mark.parametrize("durability", ["log", "snapshot"])
def test_parts_that_a_shard_loses_between_decision_and_commit_are_sent_again(tmp_path, durability):
    found = []
    for dies in (False, True):
        cluster = Cluster(tmp_path / str(dies), workers=2, durability=durability)
        clients = [cluster.client(rank) for rank in range(2)]
        if dies:
            cluster.shards[1].before["commit"] = partial(cluster.restart, 1)
        for number in (1, 3):
            other = threading.Thread(target=clients[1].push, args=(batch(number + 1),), daemon=True)
            other.start()
            clients[0].push(batch(number))
            other.join(20)
            assert not other.is_alive()
        found.append(cluster.rows())
    assert found[0] == found[1]


def test_what_a_worker_that_is_gone_had_sent_is_not_waited_for_without_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FOR_OTHERS", 0.1)
    cluster = Cluster(tmp_path, workers=2, durability="snapshot")
    first, second = (cluster.client(rank) for rank in range(2))

    def arrives_and_dies(client):
        client._stage(client._read(batch(9)), client._step, range(2))
        cluster.coordinator.arrive.remote(1, client.incarnation, client._step)

    gone = threading.Thread(target=arrives_and_dies, args=(second,), daemon=True)
    gone.start()
    cluster.shards[1].before["commit"] = partial(cluster.restart, 1)
    first.push(batch(1))
    gone.join(20)
    assert [each.target.step for each in cluster.shards] == [1, 0]
    again = cluster.client(1)
    other = threading.Thread(target=again.push, args=(batch(3),), daemon=True)
    other.start()
    first.push(batch(2))
    other.join(20)
    assert [each.target.step for each in cluster.shards] == [2, 2]


def test_a_push_that_is_unanswered_may_have_been_applied(tmp_path):
    """Without steps of all workers; the next one is another."""
    cluster = Cluster(tmp_path, consistency="async")
    with cluster.client(None) as client:
        cluster.shards[0].lost["push"] = "unanswered"
        with pytest.raises(ServerTimeout, match=r"1 of 2 processes have done it\. It may have been done by"):
            client.push(batch(1))
        client.push(batch(2))
    assert cluster.rows() == rows_after(1, 2)


def test_a_process_that_is_gone_for_good_is_told_with_a_remedy(tmp_path):
    cluster = Cluster(tmp_path, consistency="async")
    client = cluster.client(None)
    cluster.shards[1].lost["pull"] = "dead"
    with pytest.raises(
        ServerTimeout,
        match=r"process 1 cannot be reached: The actor died [^\n]*\(of a server .* another client\)",
    ):
        client.pull({"user": np.arange(100)})
