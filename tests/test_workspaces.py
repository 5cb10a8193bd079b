# SPDX-License-Identifier: Apache-2.0
"""The memory that steps work in, kept from one to the next."""

import numpy as np
import pytest

from nb_sparse_adam._src.engine import workspace as module
from nb_sparse_adam._src.engine.workspace import Workspace


def taken(workspace, size):
    workspace.take(1, 1, 1, 1, False, size, 1)
    return workspace.address


def test_memory_that_suffices_is_used_again():
    workspace = Workspace()
    first = taken(workspace, 1_000_000)
    assert taken(workspace, 900_000) == first
    assert first % 64 == 0


def test_memory_that_is_far_too_large_is_given_up():
    workspace = Workspace()
    taken(workspace, 50_000_000)
    size = len(workspace._bytes)
    taken(workspace, 5_000_000)
    assert len(workspace._bytes) == size
    taken(workspace, 100)
    assert len(workspace._bytes) < size


@pytest.mark.parametrize("fails_at", range(7))
def test_a_failure_to_allocate_leaves_no_address_of_memory_that_is_not_there(fails_at, monkeypatch):
    """The next step looks at everything again, and finds the same as a workspace that never failed."""
    workspace, left = Workspace(), fails_at

    def failing(make):
        def make_or_fail(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise MemoryError
            return make(*arguments)

        return make_or_fail

    taken(workspace, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(module.np, "empty", failing(np.empty))
        patch.setattr(module.np, "zeros", failing(np.zeros))
        with pytest.raises(MemoryError):
            workspace.take(2, 2, 2, 2, False, 1 << 20, 100)
    workspace.take(2, 2, 2, 2, False, 1 << 20, 100)
    assert len(workspace._bytes) >= 1 << 20
    assert workspace._bytes.ctypes.data <= workspace.address < workspace._bytes.ctypes.data + 64
    for name in ("gradients", "found", "parts", "tasks", "counters", "scratch", "status"):
        assert workspace.step[name][0] == getattr(workspace, name).ctypes.data
    assert len(workspace.gradients) == len(workspace.tasks) == 2
    assert workspace.step["scratch_length"][0] == len(workspace.scratch) >= 2 * 3 * 100
