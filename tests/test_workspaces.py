"""The memory that steps work in, kept from one to the next."""

from nb_sparse_adam.engine.workspace import Workspace


def taken(workspace, size):
    workspace.take(1, 1, 1, 1, size, False, 1)
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
