# SPDX-License-Identifier: Apache-2.0
"""What the tests ask of an optimizer, in one place each."""

from contextlib import contextmanager

import numpy as np
import pytest
from backends import CPU, host

STEP_COUNTS = ("element", "row", "global")
OPTIONS = ("lr", "betas", "eps", "step_counts", "eps_hat", "maximize", "on_nonfinite")
OPTIONS += ("num_threads", "device_checks")


def named(tables):
    return tables if isinstance(tables, dict) else {"table": tables}


def bits(array):
    """The array's bits as unsigned integers: NaN equals itself, and -0.0 is not 0.0."""
    array = np.array(host(array), order="C")  # a copy
    return array.view(np.dtype(f"u{array.itemsize}"))


def state_bits(opt, tables):
    """Everything that a step may write, copied as bits: ``{(table, what): array}``."""
    arrays = {}
    for name, table in named(tables).items():
        state = opt.state[name]
        arrays[name, "param"] = bits(table)
        arrays[name, "exp_avg"] = bits(state.exp_avg)
        arrays[name, "exp_avg_sq"] = bits(state.exp_avg_sq)
        arrays[name, "steps"] = bits(state.steps)
        arrays[name, "skipped_rows"] = np.array(opt.skipped_rows[name])
    return arrays


def assert_same_bits(got, expected):
    """Two results of ``state_bits`` are equal."""
    __tracebackhide__ = True
    assert got.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(got[key], expected[key], err_msg=str(key), strict=True)


def options_of(opt):
    return {name: getattr(opt, name) for name in OPTIONS}


@contextmanager
def refused(error, builtin, *words, opt=None, tables=None):
    """The block raises ``error``, also a ``builtin``, that says every one of ``words``; no bit changes."""
    __tracebackhide__ = True
    before = (state_bits(opt, tables), options_of(opt)) if opt is not None else None
    with pytest.raises(error) as caught:
        yield caught
    assert type(caught.value) is error
    assert isinstance(caught.value, builtin)
    message = str(caught.value)
    for word in words:
        assert str(word) in message, f"{word!r} is not in the message: {message}"
    if before is not None:
        assert_same_bits(state_bits(opt, tables), before[0])
        assert options_of(opt) == before[1]


def step_beside_oracle(opt, tables, oracle, gradients, backend=CPU):
    """One step of both. ``gradients`` is ``{table name: drawn gradient}``, as ``strategies`` draws them.

    Asserts that both have the same numbers, that what the oracle did not write kept its bits, and that the
    gradients are what they were.
    """
    __tracebackhide__ = True
    tables = named(tables)
    gradients = {name: backend.drawn(gradient) for name, gradient in gradients.items()}
    before = state_bits(opt, tables)
    given_before = {name: [bits(array) for array in gradient.arrays] for name, gradient in gradients.items()}
    written = oracle.step({name: oracle.sums(g.form, g.arguments, name) for name, g in gradients.items()})
    assert opt.step({name: gradient.given for name, gradient in gradients.items()}) is None
    after = state_bits(opt, tables)
    for name, table in tables.items():
        expected, state = oracle.tables[name], opt.state[name]
        expected.assert_close(host(table), host(state.exp_avg), host(state.exp_avg_sq))
        np.testing.assert_array_equal(host(state.steps), expected.steps)
        assert state.steps.shape == expected.steps.shape
        assert opt.skipped_rows[name] == expected.skipped_rows
        untouched = ~written.get(name, np.zeros(table.shape, bool))
        for what in ("param", "exp_avg", "exp_avg_sq"):
            np.testing.assert_array_equal(after[name, what][untouched], before[name, what][untouched])
    for name, gradient in gradients.items():
        for array, array_before in zip(gradient.arrays, given_before[name], strict=True):
            np.testing.assert_array_equal(bits(array), array_before, "the gradient was modified")
