# SPDX-License-Identifier: Apache-2.0
"""Moments that lie in memory as something else than what is computed with: through the engine's own kernels.

And layouts: where the numbers of a row lie changes no bit.
"""

import math

import numpy as np
import pytest
from records import Table, compressed, distinct, entries, run, segments

from nb_sparse_adam._src.engine.apply import apply_for
from nb_sparse_adam._src.engine.codecs import PLAIN, Codec
from nb_sparse_adam._src.engine.layout import State, allocate
from nb_sparse_adam._src.engine.records import ELEMENT, GLOBAL, ROW

RULES = {"element": ELEMENT, "row": ROW, "global": GLOBAL}
ROWS, DIM = 11, 5


class Fixed(Codec):
    """Multiples of 2⁻²⁴ as even int64; odd words mean the same as the even ones below them."""

    name = "fixed"

    @staticmethod
    def storage(real):  # noqa: ARG004
        return np.dtype(np.int64)

    @staticmethod
    def load(word):
        return (word >> 1) * 2.0**-24

    @staticmethod
    def store(number):
        return 2 * math.floor(number * 2.0**24 + 0.5)


class Half(Codec):
    """The upper 16 bits of a fixed-point number: rows of state are shorter than rows of parameters."""

    name = "half"

    @staticmethod
    def storage(real):  # noqa: ARG004
        return np.dtype(np.int16)

    @staticmethod
    def load(word):
        return word * 2.0**-12

    @staticmethod
    def store(number):
        return math.floor(number * 2.0**12 + 0.5)


FIXED, HALF = Fixed(), Half()


def gradients(real, seed):
    """One of each kind, each with the dense gradient and the rows present."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(6, DIM)).astype(real)
    values[rng.random(values.shape) < 0.3] = 0
    ids = np.sort(rng.choice(ROWS, 6, replace=False))
    dense = np.zeros((ROWS, DIM), real)
    dense[ids] = values
    yield distinct(ids, values), dense, ids
    ids = rng.integers(0, ROWS, 6)
    dense = np.zeros((ROWS, DIM), real)
    for row, value in zip(ids, values, strict=True):
        dense[row] = dense[row] + value
    yield segments(ids, values), dense, np.unique(ids)
    mask = rng.random((ROWS, DIM)) < 0.3
    rows, columns = map(np.ascontiguousarray, np.nonzero(mask))
    data = rng.normal(size=len(rows)).astype(real)
    dense = np.zeros((ROWS, DIM), real)
    dense[mask] = data
    yield compressed(np.append(0, np.cumsum(mask.sum(1))), columns, data), dense, np.unique(rows)
    order = rng.permutation(len(rows))
    yield entries(rows[order], columns[order], data[order], DIM), dense, np.unique(rows)


def step_of_reference(param, words, steps, dense, present, rule, table, codec):
    """One step, number by number, in the arithmetic of the table's dtype."""
    real = param.dtype.type
    b1, c1, b2, c2 = (
        real(x) for x in (table.betas[0], 1 - table.betas[0], table.betas[1], 1 - table.betas[1])
    )
    lr, eps = real(table.options["lr"]), real(table.options["eps"])
    pairs = table.corrections.pairs
    if rule == GLOBAL:
        steps += 1
    for r in present:
        if rule == ROW:
            steps[r] += 1
        for j in range(DIM):
            g = dense[r, j]
            if rule == ELEMENT:
                if g == 0:
                    continue
                steps[r, j] += 1
            k = int(np.broadcast_to(steps, (ROWS, DIM))[r, j])
            m, v = (real(codec.load(int(words[which][r, j]))) for which in (0, 1))
            m = b1 * m + c1 * g
            v = b2 * v + c2 * (g * g)
            step_size = pairs[2 * k] * lr
            param[r, j] = param[r, j] - step_size * (m / (np.sqrt(v) * pairs[2 * k + 1] + eps))
            words[0][r, j], words[1][r, j] = codec.store(float(m)), codec.store(float(v))


@pytest.mark.parametrize(
    ("rule", "real", "threads"),
    [*((rule, real, None) for rule in RULES for real in (np.float32, np.float64)), ("row", np.float32, 2)],
)
def test_a_codec_of_its_own(rule, real, threads):
    number = RULES[rule]
    start = np.random.default_rng(7).normal(size=(ROWS, DIM)).astype(real)
    table = Table(start.copy(), number, codec=FIXED, lr=0.1)
    state = table.state
    state.exp_avg[...] |= 1  # 0, in a word that `store` does not write
    expected, steps = start.copy(), state.steps.copy()
    words = [state.exp_avg.copy(), state.exp_avg_sq.copy()]
    appliers = apply_for(np.dtype(real), FIXED, state.counts.dtype, number)
    for seed in range(3):
        for gradient, dense, present in gradients(real, seed):
            run(appliers, [table], [gradient], threads=threads, tasks=3)
            step_of_reference(expected, words, steps, dense, present, number, table, FIXED)
            np.testing.assert_array_equal(table.param, expected)
            np.testing.assert_array_equal(state.exp_avg, words[0])
            np.testing.assert_array_equal(state.exp_avg_sq, words[1])
            np.testing.assert_array_equal(state.steps, steps)
    if rule == "element":
        never = steps == 0
        assert (state.exp_avg[never] == 1).all()


@pytest.mark.parametrize("rule", RULES)
def test_words_shorter_than_parameters(rule):
    number = RULES[rule]
    start = np.random.default_rng(7).normal(size=(ROWS, DIM)).astype(np.float32)
    table = Table(start.copy(), number, codec=HALF, lr=0.1)
    state = table.state
    assert state.words.dtype == np.int16
    assert state.words.nbytes <= ROWS * (2 * DIM * 2 + DIM * 4)
    expected, steps, words = start.copy(), state.steps.copy(), [state.exp_avg.copy(), state.exp_avg_sq.copy()]
    appliers = apply_for(np.dtype(np.float32), HALF, state.counts.dtype, number)
    for gradient, dense, present in gradients(np.float32, 0):
        run(appliers, [table], [gradient])
        step_of_reference(expected, words, steps, dense, present, number, table, HALF)
        np.testing.assert_array_equal(table.param, expected)
        np.testing.assert_array_equal(state.exp_avg, words[0])
        np.testing.assert_array_equal(state.exp_avg_sq, words[1])


# --- layouts ----------------------------------------------------------------------------------------------


def in_one_record(param, rule, spare=3):
    """A table whose parameters, moments and counts lie in one record a row, with something after them."""
    rows, dim = param.shape
    real = param.dtype
    words = 3 * dim + (dim if rule == ELEMENT else 1 if rule == ROW else 0) + spare
    words += words % 2
    memory = np.full(rows * words, -7, real)
    counts_begin = 3 * dim * real.itemsize // 4
    counts = memory.view(np.int32)[counts_begin:]
    if rule == GLOBAL:
        counts = np.zeros(1, np.int64)
    state = State(
        memory[dim:], counts, rows, dim, rule, words, dim, 0 if rule == GLOBAL else words * real.itemsize // 4
    )
    inside = np.lib.stride_tricks.as_strided(memory, param.shape, (words * real.itemsize, real.itemsize))
    inside[...] = param
    for view in (state.exp_avg, state.exp_avg_sq, state.steps):
        view[...] = 0
    used = np.zeros((rows, words * real.itemsize), bool)
    used[:, : 3 * dim * real.itemsize + 4 * {ELEMENT: dim, ROW: 1, GLOBAL: 0}[rule]] = True
    rest = memory.view(np.uint8).reshape(rows, -1)[~used]
    return inside, state, memory, used, rest.copy()


@pytest.mark.parametrize("dim", [1, 3, DIM, 16, 37])
@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES)
def test_a_table_in_one_record_with_its_state(rule, real, dim):
    number = RULES[rule]
    rng = np.random.default_rng(3)
    start = rng.normal(size=(ROWS, dim)).astype(real)
    apart = Table(start.copy(), number)
    param, state, memory, used, rest = in_one_record(start, number)
    together = Table(param, number, state=state)
    appliers = apply_for(np.dtype(real), PLAIN, state.counts.dtype, number)
    for _ in range(3):
        ids, values = rng.integers(0, ROWS, 8), rng.normal(size=(8, dim)).astype(real)
        values[rng.random(values.shape) < 0.3] = 0
        for gradient in (distinct(np.unique(ids), values), segments(ids, values)):
            for table in (apart, together):
                run(appliers, [table], [gradient])
    np.testing.assert_array_equal(param, apart.param)
    for name in ("exp_avg", "exp_avg_sq", "steps"):
        np.testing.assert_array_equal(getattr(state, name), getattr(apart.state, name))
    np.testing.assert_array_equal(memory.view(np.uint8).reshape(ROWS, -1)[~used], rest)


@pytest.mark.parametrize("codec", [PLAIN, FIXED, HALF])
@pytest.mark.parametrize("dim", [0, 1, 3, 4, 16, 33])
@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES)
def test_no_two_numbers_of_a_layout_share_memory(rule, real, dim, codec):
    state = allocate(4, dim, np.dtype(real), codec, RULES[rule], lambda n, dtype: np.zeros(n, dtype))
    views = [state.exp_avg, state.exp_avg_sq, state.steps]
    assert [view.shape for view in views[:2]] == [(4, dim)] * 2
    for number, view in enumerate(views):
        view[...] = np.arange(1, view.size + 1).reshape(view.shape) * 4 + number
    for number, view in enumerate(views):
        np.testing.assert_array_equal(view, np.arange(1, view.size + 1).reshape(view.shape) * 4 + number)
    assert state.words.nbytes + (0 if state.shares_memory else state.counts.nbytes) >= sum(
        view.nbytes for view in views
    )
    wide = state.with_counts(state.wide_counts(lambda n, dtype: np.zeros(n, dtype)))
    assert wide.steps.dtype == np.int64
    assert wide.steps.shape == state.steps.shape
