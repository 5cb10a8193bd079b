# SPDX-License-Identifier: Apache-2.0
"""``serve`` and ``stats`` with real processes: a server that ends, and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from needs import need

pytestmark = pytest.mark.jit

SPEC = "[user]\ndim = 4\nlr = 0.1\nseed = 3\n\n[item]\ndim = 2\nstep_counts = 'global'\n"
IDS = np.arange(-20, 30)
# A process that attaches, pushes if it is told to, and prints what is there.
CLIENT = """
import json, sys
import numpy as np
from nb_sparse_adam.parameter_server import ParameterServer
address, push = sys.argv[1:]
server = ParameterServer.attach("ads", address=address)
client = server.client()
ids = np.arange(-20, 30)
if push == "push":
    client.push({"user": (ids, np.ones((50, 4), np.float32)), "item": (ids[:7], np.ones((7, 2), np.float32))})
print(json.dumps({name: each.tolist() for name, each in client.pull({"user": ids, "item": ids}).items()}))
import ray
ray.shutdown()
"""
ENVIRONMENT = {**os.environ, "RAY_ADDRESS": "", "RAY_AUTH_MODE": "token"}


def run(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=False, text=True, capture_output=True, timeout=240, env=ENVIRONMENT)


def command(*arguments):
    return run("-m", "nb_sparse_adam", *arguments)


@contextmanager
def serving(folder, *arguments):
    """A server in the foreground of a group of processes, and the line that it says when it is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nb_sparse_adam", "serve", "ads", "--checkpoint-dir", str(folder), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, line
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.communicate(timeout=30)
        except (subprocess.TimeoutExpired, ValueError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_server_is_served_looked_at_ended_and_goes_on(tmp_path):
    need("ray")
    need("tomli")
    spec, folder = tmp_path / "spec.toml", tmp_path / "ads"
    spec.write_text(SPEC)
    with serving(folder, "--tables", str(spec), "--shards", "2") as (process, line):
        assert line.startswith("serving 'ads': tables user, item; shards 2; snapshot, async; ")
        address = line.rpartition("address='")[2].partition("'")[0]
        client = run("-c", CLIENT, address, "push")
        assert client.returncode == 0, client.stderr
        before = json.loads(client.stdout)

        looked = command("stats", "ads", "--address", address, "--json")
        assert looked.returncode == 0, looked.stderr
        stats = json.loads(looked.stdout)
        assert stats["rows"] == len(IDS) + 7
        assert [(shard["pushes"], shard["pulls"]) for shard in stats["shards"]] == [(1, 1), (1, 1)]
        other = command("stats", "other", "--address", address)
        assert (other.returncode, other.stdout) == (1, "")
        assert "error: there is no server 'other' on this cluster" in other.stderr

        pids = [shard["pid"] for shard in stats["shards"]]
        logs = [logs_of(pid) for pid in pids]
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert said == f"'ads' is shut down; what it had is in {folder}\n"
    for number, log in enumerate(logs):
        events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"')]
        assert [event["event"] for event in events] == ["shard started", "snapshot written"]
        assert {(event["server"], event["shard"], event["pid"]) for event in events} == {
            ("ads", number, pids[number])
        }

    with serving(folder) as (process, line):
        assert line.startswith("going on with 'ads': tables user, item; shards 2; ")
        client = run("-c", CLIENT, line.rpartition("address='")[2].partition("'")[0], "only pull")
        assert client.returncode == 0, client.stderr
        assert json.loads(client.stdout) == before
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert "'ads' is shut down" in said


def logs_of(pid):
    """Return the file that Ray keeps what a process of its own says in."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        found = Path(f"/proc/{pid}/fd/2").resolve()
        if found.suffix == ".err":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{pid} writes to {found}")
