# SPDX-License-Identifier: Apache-2.0
"""The coordinator, without Ray: who the workers are, and when a step of all of them is done."""

import threading
import time

import pytest
from servers import config

from nb_sparse_adam._src.parameter_server.coordinator import Coordinator
from nb_sparse_adam.errors import ServerError, StaleClientError


def made(folder, workers=3, timeout=60.0, consistency="sync"):
    return Coordinator(folder, config(consistency=consistency, workers=workers, timeout=timeout))


class Later:
    """A call in a thread of its own."""

    def __init__(self, function, *arguments):
        self._found = []
        self._thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self._thread.start()

    def _run(self, function, arguments):
        try:
            self._found.append(function(*arguments))
        except Exception as error:  # noqa: BLE001 (the test looks at it)
            self._found.append(error)

    @property
    def is_over(self):
        return bool(self._found)

    def result(self):
        self._thread.join(20)
        assert self._found, "it waits"
        return self._found[0]


def test_a_step_is_committed_when_all_have_arrived(tmp_path):
    coordinator = made(tmp_path)
    clients = {rank: coordinator.join(rank)["client"] for rank in range(3)}
    for step in (1, 2):
        first = [Later(coordinator.arrive, rank, clients[rank], step) for rank in (0, 1)]
        time.sleep(0.05)
        assert not any(each.is_over for each in first)
        expected = {"parts": clients, "late": False, "step": step + 1}
        assert coordinator.arrive(2, clients[2], step) == expected
        assert [each.result() for each in first] == [expected] * 2
        assert coordinator.arrive(0, clients[0], step)["parts"] == clients  # the answer had been lost


def test_a_step_is_given_up_for_all_when_one_does_not_come(tmp_path):
    coordinator = made(tmp_path, timeout=0.2)
    clients = [coordinator.join(rank)["client"] for rank in range(3)]
    waiting = [Later(coordinator.arrive, rank, clients[rank], 1) for rank in (0, 1)]
    assert [each.result() for each in waiting] == [{"parts": None, "late": False, "step": 2}] * 2
    assert coordinator.arrive(2, clients[2], 1) == {"parts": None, "late": True, "step": 2}
    waiting = [Later(coordinator.arrive, rank, clients[rank], 2) for rank in (0, 1)]
    again = coordinator.join(2)
    assert again["step"] == 2
    assert again["client"] > max(clients)
    assert coordinator.arrive(2, again["client"], 2)["parts"] == {
        0: clients[0],
        1: clients[1],
        2: again["client"],
    }
    with pytest.raises(StaleClientError, match="is not the worker of rank 2 any more"):
        coordinator.arrive(2, clients[2], 3)


def test_a_worker_that_comes_anew_is_waited_for(tmp_path):
    """What the one before it had staged does not count: shards may not have all of it."""
    coordinator = made(tmp_path, workers=2)
    clients = [coordinator.join(rank)["client"] for rank in range(2)]
    first = Later(coordinator.arrive, 0, clients[0], 1)
    while not coordinator._arrived:
        time.sleep(0.01)
    new = coordinator.join(0)["client"]
    second = Later(coordinator.arrive, 1, clients[1], 1)
    time.sleep(0.05)
    assert not second.is_over
    assert coordinator.arrive(0, new, 1)["parts"] == {0: new, 1: clients[1]}
    assert second.result() == first.result()


def test_a_coordinator_that_starts_again_has_what_was_committed(tmp_path):
    coordinator = made(tmp_path, workers=1)
    client = coordinator.join(0)["client"]
    for step in (1, 2, 3):
        coordinator.arrive(0, client, step)
    again = made(tmp_path, workers=1)
    assert again.arrive(0, client, 3)["parts"] == {0: client}  # its answer had been lost
    assert again.arrive(0, client, 4)["parts"] == {0: client}
    again = made(tmp_path, workers=1)
    assert again.arrive(0, client, 9)["parts"] == {0: client}  # four were given up before it died
    joined = made(tmp_path, workers=1).join(0)
    assert joined["decided"] == (9, {0: client})
    assert joined["step"] == 10
    assert joined["client"] > client
    with pytest.raises(StaleClientError):  # who has the rank is on the disk
        made(tmp_path, workers=1).arrive(0, client, 10)


def test_a_step_that_a_coordinator_does_not_know_is_given_up(tmp_path):
    """It had told one worker, and was killed before it told the other."""
    coordinator = made(tmp_path, workers=2)
    waits = Later(coordinator.arrive, 0, 5, 1)
    while not coordinator._arrived:
        time.sleep(0.01)
    other = Later(coordinator.arrive, 1, 6, 2)
    assert waits.result() == {"parts": None, "late": False, "step": 2}
    assert coordinator.arrive(0, 5, 2) == other.result()


def test_who_comes_when_all_others_are_silent_is_not_far_behind(tmp_path):
    coordinator = made(tmp_path, workers=2, consistency=("bounded", 3), timeout=0.05)
    first = coordinator.join(0)["client"]
    for pushes in range(1, 100):
        coordinator.advance(first, pushes)
    time.sleep(0.1)
    for again in (coordinator, made(tmp_path, workers=2, consistency=("bounded", 3))):
        assert 80 < again.join(1)["pushes"] < 100


def test_ranks_are_those_of_workers(tmp_path):
    for rank in (3, -1):
        with pytest.raises(ServerError, match=f"rank is {rank}, expected 0 to 2"):
            made(tmp_path).join(rank)
    with pytest.raises(ServerError, match="rank is None, expected 0 to 2"):
        made(tmp_path).join(None)
    with pytest.raises(ServerError, match="rank is 0, expected None"):
        made(tmp_path, workers=None, consistency="async").join(0)


def test_nobody_is_further_ahead_than_the_bound(tmp_path):
    coordinator = made(tmp_path, workers=2, consistency=("bounded", 2))
    fast, slow = (coordinator.join(rank)["client"] for rank in range(2))
    for pushes in (1, 2):
        coordinator.advance(fast, pushes)
    third = Later(coordinator.advance, fast, 3)
    time.sleep(0.05)
    assert not third.is_over
    coordinator.advance(slow, 1)
    assert third.result() is None
    assert coordinator.join(0)["pushes"] == 1  # it comes anew, and is one of the slowest


def test_who_is_silent_is_not_waited_for(tmp_path):
    coordinator = made(tmp_path, workers=2, consistency=("bounded", 0), timeout=0.3)
    fast, slow = (coordinator.join(rank)["client"] for rank in range(2))
    begun = time.monotonic()
    coordinator.advance(fast, 1)
    assert 0.1 < time.monotonic() - begun < 10
    fifth = Later(coordinator.advance, slow, 5)  # who waits is not silent
    time.sleep(0.5)
    coordinator.advance(fast, 2)
    assert coordinator._clocks[slow][0] == 5
    coordinator.advance(fast, 5)
    assert fifth.result() is None
    sixth = Later(coordinator.advance, slow, 6)
    coordinator.leave(fast)
    assert sixth.result() is None


def test_the_log_of_decisions_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("nb_sparse_adam._src.parameter_server.coordinator._COMMITS_A_FILE", 10)
    coordinator = made(tmp_path, workers=1)
    client = coordinator.join(0)["client"]
    for step in range(1, 65):
        coordinator.arrive(0, client, step)
    assert len(list(tmp_path.iterdir())) <= 2
    assert made(tmp_path, workers=1).join(0)["step"] == 65
