# SPDX-License-Identifier: Apache-2.0
"""``SparseAdam`` is the definition: every form, option and kind of count beside the oracle."""

import numpy as np
import pytest
from backends import CUDA, host
from checks import STEP_COUNTS, assert_same_bits, bits, state_bits, step_beside_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import TOLERANCES, OracleSparseAdam
from strategies import Gradient, gradients, hyper_parameters, shapes, tables

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam._src import stepping

DTYPES = (np.float32, np.float64)


def rows_gradient(rows, values):
    """A ``RowGradient`` for both sides."""
    rows, values = np.array(rows), np.array(values, np.float64)
    return Gradient(RowGradient(rows, values), "rows", (rows, values), (rows, values))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@given(data=st.data())
def test_steps_of_mixed_forms_follow_the_oracle(step_counts, dtype, data):
    shape = data.draw(shapes(), "shape")
    table = data.draw(tables(dtype, shape), "table")
    options = data.draw(hyper_parameters(), "options")
    options["num_threads"] = data.draw(st.sampled_from([None, 1]), "num_threads")
    opt = SparseAdam(table, step_counts=step_counts, **options)
    options.pop("num_threads")
    oracle = OracleSparseAdam(table, step_counts=step_counts, **options)
    for gradient in data.draw(st.lists(gradients(shape), min_size=1, max_size=5), "gradients"):
        step_beside_oracle(opt, table, oracle, {"table": gradient})


@pytest.mark.gpu
@pytest.mark.jit
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@settings(max_examples=6)
@given(data=st.data())
def test_so_they_do_on_a_gpu_with_the_bits_of_a_cpu(step_counts, dtype, data):
    shapes_of = {"table": data.draw(shapes(), "shape"), "other": (3, 2)}
    several = {name: data.draw(tables(dtype, shape), name) for name, shape in shapes_of.items()}
    on_gpu = CUDA.table(several)
    oracle = OracleSparseAdam(several, step_counts=step_counts)
    opt, opt_on_gpu = (SparseAdam(each, step_counts=step_counts) for each in (several, on_gpu))
    for _ in range(data.draw(st.integers(1, 2), "steps")):
        for name, value in data.draw(hyper_parameters(), "options").items():
            for each in (opt, opt_on_gpu, oracle):
                setattr(each, name, value)
        chosen = data.draw(st.sampled_from([["table"], ["other", "table"]]))
        drawn = {name: data.draw(gradients(shapes_of[name]), "gradient") for name in chosen}
        step_beside_oracle(opt_on_gpu, on_gpu, oracle, drawn, CUDA)
        opt.step({name: gradient.given for name, gradient in drawn.items()})
        assert_same_bits(state_bits(opt_on_gpu, on_gpu), state_bits(opt, several))


@given(data=st.data())
def test_options_changed_between_steps_follow_the_oracle(data):
    shape = data.draw(shapes())
    table = data.draw(tables(np.float32, shape))
    step_counts = data.draw(st.sampled_from(STEP_COUNTS))
    opt, oracle = SparseAdam(table, step_counts=step_counts), OracleSparseAdam(table, step_counts=step_counts)
    for _ in range(3):
        for name, value in data.draw(hyper_parameters()).items():
            setattr(opt, name, value)
            setattr(oracle, name, value)
        step_beside_oracle(opt, table, oracle, {"table": data.draw(gradients(shape))})


@given(data=st.data())
def test_only_the_named_tables_step(data):
    names = {"user": np.float32, "item": np.float32, "bias": np.float64}
    of_shape = {name: data.draw(shapes()) for name in names}
    several = {name: data.draw(tables(dtype, of_shape[name])) for name, dtype in names.items()}
    step_counts = data.draw(st.sampled_from(STEP_COUNTS))
    opt, oracle = (
        SparseAdam(several, step_counts=step_counts),
        OracleSparseAdam(several, step_counts=step_counts),
    )
    for _ in range(3):
        chosen = data.draw(st.lists(st.sampled_from(list(names)), unique=True))
        step_beside_oracle(
            opt, several, oracle, {name: data.draw(gradients(of_shape[name])) for name in chosen}
        )


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_hundred_steps_follow_the_oracle(step_counts, backend):
    rng = np.random.default_rng(3)
    parameters = rng.normal(size=(6, 5)).astype(np.float32)
    table = backend.table(parameters)
    opt = SparseAdam(table, lr=0.01, step_counts=step_counts)
    oracle = OracleSparseAdam(parameters, lr=0.01, step_counts=step_counts)
    for _ in range({"cpu": 100, "cuda": 20}[backend.name]):
        rows = rng.permutation(6)[: rng.integers(0, 4)]
        values = np.round(rng.normal(size=(len(rows), 5))) / 4
        step_beside_oracle(opt, table, oracle, {"table": rows_gradient(rows, values.reshape(-1, 5))}, backend)


@pytest.mark.parametrize("eps_hat", [False, True])
@pytest.mark.parametrize("beta2", [0.999, 1 - 1e-7])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_counts_and_corrections_stay_exact_past_16_and_32_bits(step_counts, beta2, eps_hat, backend):
    # Where 16 and 32 bits end, with and without sign; for beta2 = 1 - 1e-7 corrections matter there.
    options = {"lr": 0.1, "betas": (0.9, beta2), "step_counts": step_counts, "eps_hat": eps_hat}
    for already in (32_765, 65_533, 1_000_000, 2**31 - 3):
        parameters = np.ones((3, 2), np.float32)
        table = backend.table(parameters)
        opt, oracle = SparseAdam(table, **options), OracleSparseAdam(parameters, **options)
        state = opt.state_dict()
        saved = state["tables"]["table"]
        saved["steps"] = np.full_like(saved["steps"], already)
        saved["exp_avg_sq"][...] = 1e-3
        opt.load_state_dict(state)
        oracle.tables["table"].steps[...] = already
        oracle.tables["table"].exp_avg_sq[...] = np.float32(1e-3)
        for _ in range(4):
            gradient = rows_gradient([0, 2], [[1.0, 0.0], [-0.5, 0.25]])
            step_beside_oracle(opt, table, oracle, {"table": gradient}, backend)
        assert (
            host(opt.state["table"].steps).max()
            == opt.state_dict()["tables"]["table"]["steps"].max()
            == already + 4
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_what_is_not_active_keeps_any_bits_whatever(step_counts, dtype, backend):
    # NaN with payloads, infinities, -0.0 and subnormals: a copy through arithmetic would change some.
    rng = np.random.default_rng(4)
    table = np.frombuffer(rng.bytes(np.dtype(dtype).itemsize * 40 * 19), dtype).reshape(40, 19).copy()
    quiet, payload = {4: (0x7FC00001, 0xFFABCDEF), 8: (0x7FF8000000000001, 0xFFF8123400000000)}[
        table.itemsize
    ]
    table[3::4, ::2].view(f"u{table.itemsize}")[...] = quiet
    table[3::4, 1::2].view(f"u{table.itemsize}")[...] = payload
    table[2::4] = -0.0
    table = backend.table(table)
    opt = SparseAdam(table, step_counts=step_counts)
    before = bits(table)
    values = np.zeros((10, 19))
    values[:, 5] = 1.0
    opt.step(backend.gradient(RowGradient(np.arange(0, 40, 4), values)))
    changed = bits(table) != before
    expected = np.zeros(table.shape, bool)
    expected[::4, 5] = True
    if step_counts == "element":
        assert not changed[~expected].any()
    else:
        assert not changed[np.arange(40) % 4 != 0].any()
    finite = np.isfinite(before.view(dtype)) & (np.abs(before.view(dtype)) < 1)
    assert changed[expected & finite].all()
    assert (expected & finite).any()


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_sum_of_exactly_zero_is_active_by_row_and_not_by_element(step_counts, backend):
    table = backend.table(np.ones((3, 2), np.float32))
    opt = SparseAdam(table, step_counts=step_counts)
    opt.step(backend.gradient(RowGradient(np.array([1]), np.array([[1.0, 1.0]]))))
    before = state_bits(opt, table)
    opt.step(backend.gradient(RowGradient(np.array([1, 1]), np.array([[2.5, 1.0], [-2.5, 0.0]]))))
    after = state_bits(opt, table)
    for what in ("param", "exp_avg", "exp_avg_sq"):
        changed = before["table", what] != after["table", what]
        assert changed.tolist() == [[False, False], [step_counts != "element", True], [False, False]]
    expected = {"element": [[0, 0], [1, 2], [0, 0]], "row": [0, 2, 0], "global": 2}[step_counts]
    assert host(opt.state["table"].steps).tolist() == expected


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_csr_row_is_present_if_it_stores_anything_even_zero(step_counts, backend):
    table = backend.table(np.ones((4, 3)))
    opt = SparseAdam(table, step_counts=step_counts)
    for data in (np.ones(2), np.zeros(2)):
        opt.step(backend.gradient(CSRGradient(np.array([0, 1, 1, 2, 2]), np.array([0, 2]), data)))
    expected = {"element": [[1, 0, 0], [0] * 3, [0, 0, 1], [0] * 3], "row": [2, 0, 2, 0], "global": 2}
    assert host(opt.state["table"].steps).tolist() == expected[step_counts]
    # 0.1 after one active step; the second, of zeros, decays it where the row is active.
    m = 0.1 if step_counts == "element" else 0.09
    exp_avg = host(opt.state["table"].exp_avg)
    assert exp_avg[0, 0] == pytest.approx(m, rel=1e-14)
    assert exp_avg[0, 1] == 0.0


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_an_empty_gradient_advances_global_counts_and_nothing_else(step_counts, backend):
    table = backend.table(np.ones((4, 3), np.float32))
    opt = SparseAdam(table, step_counts=step_counts)
    opt.step(backend.gradient(RowGradient(np.array([2]), np.ones((1, 3)))))
    before = state_bits(opt, table)
    opt.step(backend.gradient(RowGradient(np.zeros(0, np.int64), np.zeros((0, 3)))))
    opt.step(backend.gradient(CSRGradient(np.zeros(5, np.int32), np.zeros(0, np.int32), np.zeros(0))))
    after = state_bits(opt, table)
    if step_counts == "global":
        assert opt.state["table"].steps == 3
        before["table", "steps"] = after["table", "steps"]
    assert_same_bits(after, before)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_tables_without_rows_or_columns_step(step_counts, backend):
    no_ids = np.zeros(0, np.int64)
    for shape, gradient, steps in (
        ((0, 3), RowGradient(no_ids, np.zeros((0, 3))), {"element": [], "row": []}),
        ((0, 3), BagGradient(no_ids, np.zeros(2, np.int64), np.ones((1, 3))), {"element": [], "row": []}),
        ((0,), CSRGradient(np.zeros(1, np.int64), no_ids, np.zeros(0)), {"element": [], "row": []}),
        ((2, 0), RowGradient(np.array([1, 1]), np.zeros((2, 0))), {"element": [[], []], "row": [0, 1]}),
    ):
        table = backend.table(np.zeros(shape, np.float32))
        opt = SparseAdam(table, step_counts=step_counts)
        opt.step(backend.gradient(gradient))
        assert host(opt.state["table"].steps).tolist() == (steps | {"global": 1})[step_counts]


def test_a_gradient_that_is_widened_counts_is_refused(backend):
    opt = SparseAdam(backend.table(np.zeros((4, 16))), step_counts="row")
    state = opt.state_dict()
    state["tables"]["table"]["steps"] = np.array([0, 2, 3, 2**31 + 1])
    opt.load_state_dict(state)
    with pytest.raises(ValueError, match="shares memory"):
        opt.step(RowGradient(opt.state["table"].steps[1:3], backend.array(np.ones((2, 16)))))


def test_a_step_within_a_step_loses_none():
    """As of a signal handler that steps."""
    opt = SparseAdam(np.zeros((4, 2)), step_counts="row", num_threads=1)
    gradient = RowGradient([1], np.ones((1, 2)))
    prepared = stepping.prepare(opt._requests(gradient))
    opt.step(gradient)
    stepping.finish(prepared)
    assert opt.state["table"].steps[1] == 2


def test_a_negative_number_beside_nan_is_refused(backend):
    opt = SparseAdam(backend.table(np.zeros((4, 2))))
    state = opt.state_dict()
    state["tables"]["table"]["exp_avg_sq"][0] = np.nan, -1
    with pytest.raises(ValueError, match=r"exp_avg_sq\[0, 1\] is -1"):
        opt.load_state_dict(state)


def test_step_of_an_empty_mapping_does_nothing(backend):
    table = backend.table(np.ones((4, 3), np.float32))
    opt = SparseAdam(table, step_counts="global")
    before = state_bits(opt, table)
    assert opt.step({}) is None
    assert_same_bits(state_bits(opt, table), before)


def test_an_unnamed_table_is_called_table(backend):
    results = []
    for wrap in (lambda g: g, lambda g: {"table": g}):
        table = backend.table(np.ones((2, 2), np.float32))
        opt = SparseAdam(table)
        opt.step(wrap(backend.gradient(RowGradient(np.array([1]), np.ones((1, 2))))))
        results.append(state_bits(opt, table))
    assert list(opt.state) == list(opt.skipped_rows) == ["table"]
    assert_same_bits(*results)


@pytest.mark.parametrize("shape", [(4, 3), (4,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_is_there_before_the_first_step(dtype, shape, backend):
    table = backend.table(np.ones(shape, dtype))
    for step_counts, steps_shape in (("element", shape), ("row", (4,)), ("global", ())):
        state = SparseAdam(table, step_counts=step_counts).state["table"]
        for moment in (state.exp_avg, state.exp_avg_sq):
            assert (moment.shape, moment.dtype) == (shape, dtype)
            assert not host(moment).any()
        assert state.steps.shape == steps_shape
        assert np.issubdtype(state.steps.dtype, np.integer)
        assert not host(state.steps).any()


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_state_is_a_live_view_and_read_only_on_the_host(step_counts, backend):
    table = backend.table(np.ones((4, 3), np.float32))
    opt = SparseAdam(table, step_counts=step_counts)
    state = opt.state["table"]
    views = (state.exp_avg, state.exp_avg_sq, state.steps)
    opt.step(backend.gradient(RowGradient(np.array([1]), np.ones((1, 3)))))
    for view, again in zip(views, (state.exp_avg, state.exp_avg_sq, state.steps), strict=True):
        if backend is CUDA and step_counts == "global" and again.ndim == 0:
            assert (view, again) == (0, 1)  # a copy
            continue
        assert host(view).any()
        np.testing.assert_array_equal(host(view), host(again))
        if backend is not CUDA:
            with pytest.raises(ValueError, match="read-only"):
                view[...] = 1


def test_tables_are_updated_in_place_and_may_be_views(backend):
    whole = backend.table(np.ones((6, 4), np.float32))
    opt = SparseAdam(whole[2:4])
    opt.step(backend.gradient(RowGradient(np.array([1]), np.ones((1, 4)))))
    whole = host(whole)
    assert (whole[3] < 1).all()
    assert (np.delete(whole, 3, axis=0) == 1).all()


def test_two_optimizers_share_nothing(backend):
    first, second = (backend.table(np.ones((2, 2), np.float32)) for _ in range(2))
    opts = SparseAdam(first), SparseAdam(second, lr=0.5)
    before = state_bits(opts[1], second)
    opts[0].step(backend.gradient(RowGradient(np.array([1]), np.ones((1, 2)))))
    assert_same_bits(state_bits(opts[1], second), before)
    assert (opts[0].lr, opts[1].lr) == (1e-3, 0.5)


def test_lr_zero_moves_moments_and_not_parameters(backend):
    table = backend.table(np.ones((3, 2), np.float32))
    opt = SparseAdam(table)
    opt.lr = 0
    opt.step(backend.gradient(RowGradient(np.array([1]), np.ones((1, 2)))))
    assert (host(table) == 1).all()
    assert host(opt.state["table"].exp_avg)[1].tolist() == pytest.approx([0.1, 0.1])
    assert host(opt.state["table"].steps)[1].tolist() == [1, 1]


def test_maximize_is_the_mirror_image_bit_for_bit(backend):
    rng = np.random.default_rng(5)
    down = backend.table(np.zeros((20, 7), np.float32))
    up = backend.table(np.zeros((20, 7), np.float32))
    opts = SparseAdam(down), SparseAdam(up, maximize=True)
    for _ in range(5):
        gradient = backend.gradient(RowGradient(rng.integers(0, 20, 15), rng.normal(size=(15, 7))))
        for opt in opts:
            opt.step(gradient)
    np.testing.assert_array_equal(host(up), -host(down))
    assert host(down).any()


def test_defaults_are_those_of_torch_and_the_definition(backend):
    opt = SparseAdam(backend.table(np.ones((2, 2))))
    assert opt.device_checks == "immediate"
    assert (opt.lr, opt.betas, opt.eps, opt.step_counts) == (1e-3, (0.9, 0.999), 1e-8, "element")
    assert (opt.eps_hat, opt.maximize, opt.on_nonfinite, opt.num_threads) == (False, False, "raise", None)


def test_hyper_parameters_may_be_any_real_numbers(backend):
    results = []
    for lr, betas, eps in (
        (0.5, (0.75, 0.5), 0.25),
        (np.float64(0.5), [np.float32(0.75), 0.5], np.float32(0.25)),
    ):
        table = backend.table(np.ones((2, 2), np.float32))
        opt = SparseAdam(table, lr=lr, betas=betas, eps=eps)
        opt.step(backend.gradient(RowGradient(np.array([1]), np.ones((1, 2)))))
        results.append(state_bits(opt, table))
    assert_same_bits(*results)
    assert opt.betas == (0.75, 0.5)


def test_float64_gradients_are_rounded_to_the_table_before_they_are_summed(backend):
    # 1 + 2**-30 is 1 in float32: the sum is exactly zero, the element not active.
    table = backend.table(np.ones((2, 1), np.float32))
    opt = SparseAdam(table)
    values = np.array([[1 + 2.0**-30], [-1.0], [1e-60]])
    opt.step(backend.gradient(RowGradient(np.array([0, 0, 1]), values)))
    assert not host(opt.state["table"].steps).any()
    assert (host(table) == 1).all()


def test_precision_of_the_first_moments_is_that_of_the_dtype(backend):
    # 1 - 0.999 taken in float32 would be wrong in the fifth digit.
    for dtype in DTYPES:
        table = backend.table(np.ones((1, 1), dtype))
        opt = SparseAdam(table)
        opt.step(backend.gradient(RowGradient(np.array([0]), np.ones((1, 1)))))
        rtol = TOLERANCES[np.dtype(dtype)].rtol
        np.testing.assert_allclose(host(opt.state["table"].exp_avg_sq), 1 - 0.999, rtol=rtol)
        np.testing.assert_allclose(host(opt.state["table"].exp_avg), 1 - 0.9, rtol=rtol)
