# SPDX-License-Identifier: Apache-2.0
"""No gradient is part of a table that the step writes to, whoever has that table and whatever interrupts."""

import sys

import numpy as np
import pytest

from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam._src.engine import addresses, host
from nb_sparse_adam._src.optimizer import tables_of
from nb_sparse_adam._src.stepping import step_together
from nb_sparse_adam.errors import GradientError, TableError


def table(rows=8, dim=2):
    return np.ones((rows, dim), np.float32)


def assert_refused(optimizer, shared):
    with pytest.raises(GradientError, match="shares memory"):
        optimizer.step(RowGradient([0, 1], shared[4:6]))


def interrupted_everywhere(work, count=400):
    """Call ``work(trace)`` with what raises at the first, second, third ... line of the package."""
    for at in range(count):
        left = at

        def trace(frame, event, _):
            nonlocal left
            if "nb_sparse_adam" not in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if left == -1:
                    raise KeyboardInterrupt
            return trace

        if not work(trace):
            return at
    raise AssertionError("never came to an end")


def traced(call, trace):
    """Call, interrupted by ``trace``; return whether it was."""
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.jit  # each line of a kernel would be a place of its own
def test_an_interrupted_first_step_does_not_let_the_next_one_read_the_table():
    def work(trace):
        mine = table()
        optimizer = SparseAdam(mine)
        interrupted = traced(lambda: optimizer.step(RowGradient([0], np.ones((1, 2), np.float32))), trace)
        assert_refused(optimizer, mine)
        return interrupted

    SparseAdam(table()).step(RowGradient([0], np.ones((1, 2), np.float32)))  # compiled
    assert interrupted_everywhere(work) > 50


@pytest.mark.jit  # each line of a kernel would be a place of its own
def test_an_interrupted_rearrange_does_not_let_the_next_step_read_the_new_table():
    def work(trace):
        mine, other = table(), table(9)
        optimizer = SparseAdam(mine)
        optimizer.step(RowGradient([0], np.ones((1, 2), np.float32)))
        interrupted = traced(lambda: optimizer.rearrange(other, [*range(8), -1]), trace)
        assert_refused(optimizer, optimizer.tables["table"])
        return interrupted

    SparseAdam(table()).rearrange(table(9), [*range(8), -1])  # compiled
    assert interrupted_everywhere(work, 2000) > 50


def test_no_memory_to_note_where_the_tables_are(monkeypatch):
    mine = table()
    optimizer = SparseAdam(mine)

    def fails(_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(host, "Memory", fails)
        with pytest.raises(MemoryError):
            optimizer.step(RowGradient([0], np.ones((1, 2), np.float32)))
    assert_refused(optimizer, mine)
    assert host.Memory is addresses.Memory


@pytest.mark.parametrize("overlap", [False, True])
def test_a_table_of_another_optimizer_in_the_step(overlap):
    both = table(16)
    mine, theirs = (both[:10], both[6:]) if overlap else (both[:8], both[8:])
    one, other = SparseAdam(mine), SparseAdam(theirs)
    before = both.copy()
    steps = [(one, RowGradient([0, 1], theirs[6:8])), (other, RowGradient([0], np.ones((1, 2), np.float32)))]
    with pytest.raises(GradientError, match="shares memory"):
        step_together(steps)
    assert (both == before).all()
    step_together([(optimizer, RowGradient([0], np.ones((1, 2), np.float32))) for optimizer in (one, other)])


def test_a_mapping_that_names_a_table_twice():
    class Twice(dict):
        def items(self):
            return [*super().items(), *super().items()]

    optimizer = SparseAdam({"a": table(), "b": table()})
    gradient = RowGradient([0], np.ones((1, 2), np.float32))
    with pytest.raises(TableError, match="two gradients for table 'a'"):
        optimizer.step(Twice(a=gradient))
    assert optimizer.state["a"].steps.sum() == 0


def test_nothing_is_allocated_between_two_writes(monkeypatch):
    """Two dtypes are two calls: what the second works with is there before the first has written."""
    tables = {"a": table(), "b": table().astype(np.float64)}
    optimizer = SparseAdam(tables)
    gradients = {name: RowGradient([0], np.ones((1, 2))) for name in tables}
    optimizer.step(gradients)
    run, calls = host.run, []

    def counted(drivers, *arguments):
        calls.append(drivers)
        if len(calls) == 2:  # the first that writes: from now on there is no memory
            monkeypatch.setattr(host.HostRun, "_record", None)
        return run(drivers, *arguments)

    monkeypatch.setattr(host, "run", counted)
    optimizer.step(gradients)
    assert len(calls) == 3
    assert [optimizer.state[name].steps[0, 0] for name in tables] == [2, 2]


def at_the_end_of_int32():
    """An optimizer whose next step counts in 64 bits, and a gradient."""
    optimizer = SparseAdam(table(), step_counts="row")
    state = optimizer.state_dict()
    state["tables"]["table"]["steps"][...] = 2**31 - 1
    optimizer.load_state_dict(state)
    return optimizer, RowGradient([0], np.ones((1, 2), np.float32))


def test_a_signal_handler_that_steps_while_counts_are_widened(monkeypatch):
    optimizer, gradient = at_the_end_of_int32()
    backend = tables_of(optimizer)["table"].backend
    changed, within = backend.memory_changed, []

    def handler(gone=False):
        if not within:
            within.append(1)
            optimizer.step(gradient)
        changed(gone)

    monkeypatch.setattr(backend, "memory_changed", handler)
    optimizer.step(gradient)
    assert within
    assert optimizer.state["table"].steps[0] == 2**31 + 1
    assert optimizer.state["table"].steps.dtype == np.int64


def test_counts_are_not_widened_while_they_are_lent():
    wide, gradient = at_the_end_of_int32()
    wide.step(gradient)
    optimizer = SparseAdam(table(), step_counts="row", on_nonfinite="skip")
    with optimizer.kernel_table():
        with pytest.raises(TableError, match="within a kernel_table block"):
            optimizer.load_state_dict(wide.state_dict())
        assert not optimizer.state["table"].exp_avg.any()
    optimizer.load_state_dict(wide.state_dict())
    assert optimizer.state["table"].steps[0] == 2**31
