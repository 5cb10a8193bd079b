# SPDX-License-Identifier: Apache-2.0
"""Two hosts, one of which is cut off and comes back: network namespaces of this machine stand for them.

They need root, `ip` of iproute2, and a kernel that has namespaces: run by `pytest -m hosts`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need

pytestmark = [pytest.mark.jit, pytest.mark.hosts]

HEAD = "10.77.0.11:6399"
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    # A host that does not answer is given up after some five seconds instead of half a minute.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
}

PROGRAM = """
import subprocess, sys, threading, time
import numpy as np
import ray
from servers import SPECS, batch, made, step
from test_parameter_server_ray import assert_same
from nb_sparse_adam.parameter_server import ParameterServer

ray.init(address=sys.argv[1], log_to_driver=False)
assert len([node for node in ray.nodes() if node["Alive"]]) == 2
for name in "abcde":  # Ray spreads shards over hosts, as a rule
    folder = f"{sys.argv[2]}-{name}"
    server = ParameterServer.create(name, SPECS, checkpoint_dir=folder, shards=2, durability="log")
    if {each["address"] for each in server.stats()["shards"]} == {"10.77.0.11", "10.77.0.12"}:
        break
client, here = server.client(timeout=200), made()


def push(k):
    client.push(batch(k))
    step(here, batch(k))


def is_up(up):
    subprocess.run(["ip", "-n", "nbhost2", "link", "set", "eth0", "up" if up else "down"], check=True)


push(1)
assert_same(server, here)
for k, seconds in ((2, 3), (4, 25)):  # the second time, the host is given up, and the shard starts elsewhere
    is_up(False)
    pushing = threading.Thread(target=push, args=(k,))
    pushing.start()
    time.sleep(seconds)
    assert pushing.is_alive(), "a push was acknowledged that the host that is cut off cannot have"
    is_up(True)
    pushing.join(200)
    assert not pushing.is_alive()
    push(k + 1)
    assert_same(server, here)
print("pushes of each shard:", [each["pushes"] for each in server.stats()["shards"]])
"""


def run(*command, **more):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **more)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture
def hosts(tmp_path):
    """Two namespaces with a network between them, and a node of a Ray cluster in each."""
    need("ray")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root, and ip of iproute2")
    environment = {**os.environ, **SETTINGS}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
    shared = ["--num-cpus=4", "--object-store-memory=100000000", "--disable-usage-stats"]
    folder = Path("/tmp") / f"nbh{os.getpid()}"  # sockets have short paths
    try:
        run("ip", "link", "add", "nbbridge", "type", "bridge")
        run("ip", "link", "set", "nbbridge", "up")
        for k in (1, 2):
            run("ip", "netns", "add", f"nbhost{k}")
            run(
                "ip",
                "link",
                "add",
                f"nbveth{k}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                f"nbhost{k}",
            )
            run("ip", "link", "set", f"nbveth{k}", "master", "nbbridge")
            run("ip", "link", "set", f"nbveth{k}", "up")
            run("ip", "-n", f"nbhost{k}", "addr", "add", f"10.77.0.1{k}/24", "dev", "eth0")
            for link in ("eth0", "lo"):
                run("ip", "-n", f"nbhost{k}", "link", "set", link, "up")
        run(
            "ip", "netns", "exec", "nbhost1", *ray, "--head", "--node-ip-address=10.77.0.11", "--port=6399",
            "--include-dashboard=false", f"--temp-dir={folder}", *shared, env=environment,
        )  # fmt: skip
        run(
            "ip", "netns", "exec", "nbhost2", *ray, f"--address={HEAD}", "--node-ip-address=10.77.0.12",
            *shared, env=environment,
        )  # fmt: skip
        yield environment
    finally:
        for k in (1, 2):
            pids = ["ip", "netns", "pids", f"nbhost{k}"]
            found = subprocess.run(pids, capture_output=True, text=True, check=False)
            for pid in found.stdout.split():
                subprocess.run(["kill", "-9", pid], check=False)
            # By itself: the namespace is there until all of its processes are gone.
            for gone in (["link", "del", f"nbveth{k}"], ["netns", "del", f"nbhost{k}"]):
                subprocess.run(["ip", *gone], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", "nbbridge"], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_host_that_is_cut_off_and_comes_back(hosts, tmp_path):
    """No push is acknowledged that it does not have, and none is applied twice."""
    program = ["ip", "netns", "exec", "nbhost1", sys.executable, "-c", PROGRAM, HEAD, str(tmp_path / "ads")]
    assert "pushes of each shard: [5, 5]\n" in run(*program, env=hosts)  # Ray has something to say, too
