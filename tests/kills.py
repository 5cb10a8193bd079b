# SPDX-License-Identifier: Apache-2.0
"""Processes that write the same files over and over, and are killed: at a named place, or at any time."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from nb_sparse_adam._src.checkpoint import saving

POINTS = (
    "a file begun", "a file written", "a file synced", "manifest written", "manifest in its place",
    "folder synced", "an old file deleted",
)  # fmt: skip


def run(program, *arguments):
    """Run a program, which may import this module; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def plans(hits, at_random, points=POINTS):
    """Return (place, at which time it is reached there), and after them ``at_random`` times (None, 0)."""
    return [(point, hit) for point in points for hit in hits] + [(None, 0)] * at_random


def until_killed(work, point, hit, seconds, module=saving, rng=random.Random(1)):  # noqa: B008 (one for all calls)
    """Fork a process that works until it is killed: at a place, or at any time within so many seconds."""
    process = os.fork()
    if process == 0:
        try:
            kill_at(point, hit, module)
            work()
        finally:
            os._exit(1)  # nothing but a kill ends it
    if point is None:
        time.sleep(rng.uniform(0.001, seconds))
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), (point, status)
    assert os.WTERMSIG(status) == signal.SIGKILL, (point, status)


def kill_at(point, hit, module):
    """Have this process kill itself when a module of ours reaches a place for the ``hit``-th time."""
    left = [hit]

    def reached(where):
        if where == point:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    module._reached = reached
