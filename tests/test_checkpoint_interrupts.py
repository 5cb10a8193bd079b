# SPDX-License-Identifier: Apache-2.0
"""An exception in the middle of `save`, `load` or `restore`, wherever a signal handler's may come."""

import gc
import inspect
import os
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from checks import state_bits

import nb_sparse_adam
from nb_sparse_adam import RowGradient, SparseAdam, checkpoint
from nb_sparse_adam.errors import StateError

# A file that an exception leaves open is closed when it is let go.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
OURS = str(Path(nb_sparse_adam.__file__).parent) + os.sep


class Interrupt(BaseException):
    """As KeyboardInterrupt."""


def interrupted_at(point, work):
    """Whether `work` has so many places where an interrupt may come; it does in this one.

    Python looks for signals when a function begins and when a call has returned, whose result is lost then.
    """
    left = [point]

    def count(frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(OURS):
            return
        if event == "c_return" or (event in ("call", "return") and not code.co_flags & inspect.CO_GENERATOR):
            left[0] -= 1
            if left[0] == 0:
                sys.setprofile(None)
                raise Interrupt

    sys.setprofile(count)
    try:
        work()
    except Interrupt:
        return True
    finally:
        sys.setprofile(None)
    return left[0] <= 0  # where an exception had to be swallowed


def points(request):
    """Every place on request, else some of them, and the same ones every time."""
    return range(1, 100_000, 1 if request.config.getoption("--long") else 2)


def make(seed):
    rng = np.random.default_rng(seed)
    tables = {"a": rng.normal(size=(5, 3)).astype(np.float32), "b": rng.normal(size=4)}
    opt = SparseAdam(tables, step_counts="row", num_threads=1, lr=0.1 + seed)
    opt.step({"a": RowGradient([1], rng.normal(size=(1, 3))), "b": RowGradient([seed], rng.normal(size=1))})
    return opt


def bits_of(opt):
    found = {key: array.tobytes() for key, array in state_bits(opt, dict(opt.tables)).items()}
    return {**found, "lr": opt.lr}


def assert_closed(before):
    """No more files are open; the traceback, a cycle, may be what keeps one."""
    if len(os.listdir("/dev/fd")) > before:
        gc.collect()
    assert len(os.listdir("/dev/fd")) <= before


def assert_free(opt):
    """No lock is left: another thread may use it."""
    thread = threading.Thread(target=opt.synchronize, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.skipif(os.name != "posix", reason="counts open files")
def test_a_save_that_is_interrupted_leaves_the_old_checkpoint_or_the_new_one(tmp_path, request):
    old, new = make(0), make(1)
    expected, both = bits_of(new), (bits_of(old), bits_of(new))
    seen, at, before = [], 0, len(os.listdir("/dev/fd"))
    for at in points(request):
        checkpoint.save(tmp_path, old, 0)
        assert len(os.listdir(tmp_path)) == 3  # nothing is left of the save before
        if not interrupted_at(at, lambda: checkpoint.save(tmp_path, new, 1)):
            break
        loaded, extra = checkpoint.load(tmp_path)
        assert bits_of(loaded) == both[extra], at
        seen.append(extra)
        assert_closed(before)
        assert_free(new)
        assert bits_of(new) == expected
    assert at > 100
    assert set(seen) == {0, 1}


@pytest.mark.skipif(os.name != "posix", reason="counts open files")
@pytest.mark.parametrize("mmap", [False, True])
def test_a_load_that_is_interrupted_leaves_nothing(mmap, tmp_path, request):
    checkpoint.save(tmp_path, make(0))
    at, before, files = 0, len(os.listdir("/dev/fd")), sorted(os.listdir(tmp_path))
    for at in points(request):
        if not interrupted_at(at, lambda: checkpoint.load(tmp_path, mmap=mmap)):
            break
        assert_closed(before)
    assert at > 100
    assert sorted(os.listdir(tmp_path)) == files


@pytest.mark.skipif(os.name != "posix", reason="counts open files")
@pytest.mark.parametrize("wider", [False, True])
def test_a_restore_that_is_interrupted_is_whole_or_has_not_begun_or_says_so(wider, tmp_path, request):
    old, new = make(0), make(1)
    if wider:
        state = new.state_dict()
        state["tables"]["b"]["steps"] = np.full(4, 2**40)
        new.load_state_dict(state)
    checkpoint.save(tmp_path, new)
    kept, expected = pickle.dumps(old), {"old": bits_of(old), "new": bits_of(new)}
    seen, at, before = [], 0, len(os.listdir("/dev/fd"))
    gradient = {"a": RowGradient([], np.ones((0, 3)))}
    for at in points(request):
        opt = pickle.loads(kept)
        if not interrupted_at(at, lambda opt=opt: checkpoint.restore(tmp_path, opt)):
            break
        assert_closed(before)
        assert_free(opt)
        try:
            opt.step(gradient)  # changes nothing
        except StateError:
            seen.append("part")
            checkpoint.restore(tmp_path, opt)
            assert bits_of(opt) == expected["new"], at
        else:
            found = bits_of(opt)
            seen.append("old" if found == expected["old"] else "new")
            assert found == expected[seen[-1]], at
    assert at > 100
    assert {"old", "part"} <= set(seen)
    assert "new" in seen or not request.config.getoption("--long")
