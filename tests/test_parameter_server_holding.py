# SPDX-License-Identifier: Apache-2.0
"""A shard's folder is held by one process: another one that comes to write there is refused."""

import os
import signal
import time

import pytest
from servers import config, gone, opened

from nb_sparse_adam._src.parameter_server import holding
from nb_sparse_adam._src.parameter_server.holding import Hold
from nb_sparse_adam._src.parameter_server.shard import Shard
from nb_sparse_adam.errors import LogError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="nothing is held on Windows")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(holding, "PATIENCE", 0.1)


def test_a_folder_is_held_by_one_shard(tmp_path, impatient):
    served = opened(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):
        with pytest.raises(LogError, match=rf"is held by another process \(process {os.getpid()} of .*shut"):
            Shard(tmp_path, config(), 0)
    with pytest.raises(LogError, match="is held"):
        Hold(tmp_path, reads=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    served.hold.let_go()
    served.hold.let_go()
    readers = [Hold(tmp_path, reads=True) for _ in range(2)]
    with pytest.raises(LogError, match="is held"):
        Shard(tmp_path, config(), 0)
    for reader in readers:
        reader.let_go()
    opened(tmp_path)
    gone(tmp_path)


def test_a_process_that_has_died_holds_nothing_and_is_waited_for(tmp_path):
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        held = Hold(tmp_path)
        os.write(theirs, b"held")
        time.sleep(60)
        held.let_go()
        os._exit(1)
    os.read(ours, 4)
    killer = os.fork()
    if killer == 0:
        time.sleep(0.3)
        os.kill(child, signal.SIGKILL)
        os._exit(0)
    begun = time.monotonic()
    held = Hold(tmp_path)
    assert time.monotonic() - begun > 0.1
    for each in (child, killer):
        os.waitpid(each, 0)
    os.close(ours)
    os.close(theirs)
    end = os.fork()
    if end == 0:
        del held
        os._exit(0)
    os.waitpid(end, 0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(holding, "PATIENCE", 0.1)
        with pytest.raises(LogError):
            Hold(tmp_path)
    held.let_go()
