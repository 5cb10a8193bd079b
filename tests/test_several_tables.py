# SPDX-License-Identifier: Apache-2.0
"""Many tables in one step have the bits that each has by itself, and are one native call."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from checks import STEP_COUNTS, assert_same_bits, refused, state_bits
from hypothesis import given
from hypothesis import strategies as st

from nb_sparse_adam import BagGradient, RowGradient, SparseAdam
from nb_sparse_adam._src import optimizer
from nb_sparse_adam._src.engine import host
from nb_sparse_adam._src.engine.scratch import BLOCK
from nb_sparse_adam._src.engine.threads import max_threads
from nb_sparse_adam._src.stepping import step_together
from nb_sparse_adam.errors import GradientError, GradientIndexError, NonFiniteGradientError, OptionError

FORMS = ["rows", "sorted rows", "bags", "mean", "weighted", "hot"]
THREADS = sorted({1, max_threads()})


def gradient(form, rng, rows, dim, n, dtype=np.float32, ids_dtype=np.int64):
    ids = rng.integers(0, rows, n).astype(ids_dtype)
    if form == "hot":  # one row that is summed block by block
        ids[: 9 * n // 10] = rows // 2
    if form == "sorted rows":
        ids.sort()
    if form in ("rows", "sorted rows", "hot"):
        return RowGradient(ids, rng.normal(size=(n, dim)).astype(dtype))
    bags = n // 3 + 1
    offsets = np.sort(rng.integers(0, n + 1, bags)) if bags else np.zeros(0, np.int64)
    offsets[:1] = 0
    grad_output = rng.normal(size=(bags, dim)).astype(dtype)
    weights = rng.normal(size=n).astype(dtype) if form == "weighted" else None
    return BagGradient(ids, offsets, grad_output, weights, "mean" if form == "mean" else "sum")


def tables_of(shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {f"t{i}": np.array(rng.normal(size=shape), dtype) for i, shape in enumerate(shapes)}


@pytest.fixture
def batches(monkeypatch):
    """How many tables each native call had that updated several."""
    seen = []
    call = host.HostRun.__call__

    def spy(run):
        if run.tables > 1:
            seen.append(run.tables)
        call(run)

    monkeypatch.setattr(host.HostRun, "__call__", spy)
    return seen


def step_alone(tables, gradients, **options):
    """Each table with an optimizer of its own."""
    bits = {}
    for name, table in tables.items():
        opt = SparseAdam({name: table}, **options)
        for of_step in gradients:
            if name in of_step:
                opt.step({name: of_step[name]})
        bits.update(state_bits(opt, {name: table}))
    return bits


def step_as_one(tables, gradients, **options):
    opt = SparseAdam(tables, **options)
    for of_step in gradients:
        opt.step(of_step)
    return state_bits(opt, tables)


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip", "propagate"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_the_bits_of_each_table_alone(step_counts, dtype, on_nonfinite, num_threads, batches):
    rng = np.random.default_rng(1)
    shapes = [(40 + 7 * i, 1 + 5 * (i % 4)) for i in range(12)]
    options = {
        "lr": 0.1,
        "step_counts": step_counts,
        "on_nonfinite": on_nonfinite,
        "num_threads": num_threads,
    }
    gradients = [
        {
            f"t{i}": gradient(FORMS[(i + step) % len(FORMS)], rng, rows, dim, 30 + 5 * i, dtype)
            for i, (rows, dim) in enumerate(shapes)
        }
        for step in range(3)
    ]
    expected = step_alone(tables_of(shapes, dtype), gradients, **options)
    assert batches == []
    assert_same_bits(step_as_one(tables_of(shapes, dtype), gradients, **options), expected)
    assert len(batches) == 3
    assert min(batches) >= 8


@pytest.mark.jit
@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("form", FORMS)
def test_blocks_and_threads(form, num_threads, batches):
    """Large enough for threads, and for segments that are summed block by block."""
    assert BLOCK < 1000
    rng = np.random.default_rng(2)
    shapes = [(60, 16), (3, 16), (500, 16), (1, 16), (60, 16), (800, 16), (9, 16), (60, 16), (4000, 16)]
    gradients = [
        {f"t{i}": gradient(form, rng, rows, dim, 3000 + i) for i, (rows, dim) in enumerate(shapes)}
        for _ in range(2)
    ]
    options = {"lr": 0.1, "num_threads": num_threads}
    expected = step_alone(tables_of(shapes), gradients, **options)
    assert_same_bits(step_as_one(tables_of(shapes), gradients, **options), expected)
    assert batches == [9, 9]


@pytest.mark.jit
@pytest.mark.skipif(max_threads() == 1, reason="one thread has nobody to disturb")
def test_threads_with_tables_of_different_dims_do_not_disturb_each_other():
    """Each has scratch memory of its own, however long the rows of the table at hand are."""
    dims = [64, 1, 48, 3, 33, 64, 2, 17, 64, 5, 40, 8]
    shapes = [(400, dim) for dim in dims]
    rng = np.random.default_rng(8)
    for _ in range(5):
        gradients = [
            {f"t{i}": gradient("rows", rng, 400, dim, 2000) for i, dim in enumerate(dims)} for _ in range(3)
        ]
        options = {"lr": 0.1, "num_threads": 2}
        expected = step_alone(tables_of(shapes), gradients, lr=0.1, num_threads=1)
        assert_same_bits(step_as_one(tables_of(shapes), gradients, **options), expected)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_values_may_lie_apart(form, batches):
    """As the slices are that a backward pass hands to the layers whose outputs were stacked."""
    rng = np.random.default_rng(6)
    tables, others = tables_of([(30, 4)] * 5), tables_of([(30, 4)] * 5)
    together, apart = {}, {}
    for i, name in enumerate(tables):
        each = gradient(form, rng, 30, 4, 40)
        field = "values" if isinstance(each, RowGradient) else "grad_output"
        values = getattr(each, field)
        wide = np.full((len(values), 5, 4), np.nan, np.float32)
        wide[:, i] = values
        together[name] = each
        apart[name] = dataclasses.replace(each, **{field: wide[:, i]})
    for on_nonfinite in ("propagate", "raise"):
        options = {"lr": 0.1, "num_threads": 1, "on_nonfinite": on_nonfinite}
        expected = step_as_one(tables, [together], **options)
        assert_same_bits(step_as_one(others, [apart], **options), expected)
    assert batches == [5] * 4


@pytest.mark.jit
@given(st.data())
def test_any_tables_and_gradients(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    count = data.draw(st.integers(2, 7))
    shapes = [(data.draw(st.integers(1, 50)), data.draw(st.integers(1, 20))) for _ in range(count)]
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    options = {
        "step_counts": data.draw(st.sampled_from(STEP_COUNTS)),
        "on_nonfinite": data.draw(st.sampled_from(["skip", "propagate"])),
        "num_threads": data.draw(st.sampled_from(THREADS)),
    }
    steps = []
    for _ in range(data.draw(st.integers(1, 3))):
        given_now = {}
        for i, (rows, dim) in enumerate(shapes):
            if data.draw(st.integers(0, 4)):
                form, n = data.draw(st.sampled_from(FORMS)), data.draw(st.integers(0, 60))
                ids_dtype = data.draw(st.sampled_from([np.int32, np.int64]))
                given_now[f"t{i}"] = made = gradient(form, rng, rows, dim, n, dtype, ids_dtype)
                values = made.values if isinstance(made, RowGradient) else made.grad_output
                if values.size and not data.draw(st.integers(0, 9)):
                    values[0, 0] = data.draw(st.sampled_from([np.nan, np.inf, np.finfo(dtype).max]))
        steps.append(given_now)
    expected = step_alone(tables_of(shapes, dtype), steps, **options)
    assert_same_bits(step_as_one(tables_of(shapes, dtype), steps, **options), expected)


def test_tables_of_a_kind_are_one_native_call(batches):
    tables = tables_of([(30, 4)] * 4) | {f"d{i}": np.ones((30, 4)) for i in range(4)} | {"line": np.ones(30)}
    opt = SparseAdam(tables, num_threads=1)
    given_now = {
        name: RowGradient([1, 2, 1], np.ones((3, *table.shape[1:]))) for name, table in tables.items()
    }
    given_now["t0"] = RowGradient([], np.ones((0, 4)))
    opt.step(given_now)
    assert sorted(batches) == [4, 5]  # float32 with the empty one; float64 with the 1-D table
    assert [int(table.totals[0]) for table in optimizer.tables_of(opt).values()] == [1] * 9


@pytest.mark.jit
@pytest.mark.skipif(max_threads() == 1, reason="there is one thread to choose from")
def test_large_tables_are_cut_into_parts_and_small_ones_are_not(monkeypatch):
    """The other threads would wait for the one that has a large table."""
    tables = tables_of([(50, 16)] * 5)
    opt = SparseAdam(tables, num_threads=2)
    lengths = {"t0": 9000, "t1": 200, "t2": 8000, "t3": 300, "t4": 100}
    seen = []
    prepare = host._Program.prepare

    def spy(program):
        prepare(program)
        for entry, record in zip(program.entries, program.workspace.gradients, strict=True):
            seen.append((entry.table.name, int(record["parts"])))

    monkeypatch.setattr(host._Program, "prepare", spy)
    rng = np.random.default_rng(7)
    opt.step({name: gradient("rows", rng, 50, 16, n) for name, n in lengths.items()})
    assert seen == [("t0", 2), ("t2", 2), ("t3", 1), ("t1", 1), ("t4", 1)]  # the largest first


def test_one_wrong_gradient_and_no_table_is_changed(batches):
    tables = tables_of([(30, 4)] * 8)
    opt = SparseAdam(tables, num_threads=1)
    good = {name: RowGradient([1, 2, 1], np.ones((3, 4))) for name in tables}
    opt.step(good)
    wrong = {**good, "t5": RowGradient([3, 4], np.array([[1.0] * 4, [np.nan] * 4]))}
    with refused(NonFiniteGradientError, ValueError, "'t5'", "values[1, 0] is nan", opt=opt, tables=tables):
        opt.step(wrong)
    with refused(GradientIndexError, IndexError, "'t7'", "rows[0] is 30", opt=opt, tables=tables):
        opt.step({**good, "t7": RowGradient([30], np.ones((1, 4)))})
    opt.on_nonfinite = "skip"
    opt.step(wrong)
    assert opt.skipped_rows == {**dict.fromkeys(tables, 0), "t5": 1}
    assert batches == [8, 8]


def test_options_and_wider_counts_are_heard(batches):
    """What is kept of a table from step to step is made anew when it changes."""
    tables, others = tables_of([(30, 4)] * 4), tables_of([(30, 4)] * 4)
    opt = SparseAdam(tables, step_counts="row", num_threads=1)
    alone = {
        name: SparseAdam({name: table}, step_counts="row", num_threads=1) for name, table in others.items()
    }
    rng = np.random.default_rng(3)
    for step in range(6):
        given_now = {name: gradient("rows", rng, 30, 4, 20) for name in tables}
        if step == 2:
            for each in (opt, *alone.values()):
                each.lr, each.betas = 0.5, (0.5, 0.6)
        if step == 4:
            state = opt.state_dict()
            for entry in state["tables"].values():
                entry["steps"] = np.full(30, 2**31 - 1)
            opt.load_state_dict(state)
            for name, each in alone.items():
                each.load_state_dict({**state, "tables": {name: state["tables"][name]}})
        opt.step(given_now)
        for name, each in alone.items():
            each.step(given_now[name])
    assert opt.state["t0"].steps.dtype == np.int64
    got = state_bits(opt, tables)
    for name, each in alone.items():
        expected = state_bits(each, {name: others[name]})
        assert_same_bits({key: got[key] for key in expected}, expected)
    assert batches == [4] * 6


@pytest.mark.parametrize("which", [0, 3])
def test_one_table_whose_counts_are_widened_by_the_step(which, batches):
    tables, others = tables_of([(30, 4)] * 5), tables_of([(30, 4)] * 5)
    gradients = {name: RowGradient([1, 2, 1, 5], np.ones((4, 4))) for name in tables}
    optimizers = [SparseAdam(each, step_counts="row", num_threads=1) for each in (tables, others)]
    for opt in optimizers:
        state = opt.state_dict()
        state["tables"][f"t{which}"]["steps"][:] = 2**31 - 1
        opt.load_state_dict(state)
    optimizers[0].step(gradients)
    for name, each in gradients.items():
        optimizers[1].step({name: each})
    assert_same_bits(state_bits(optimizers[0], tables), state_bits(optimizers[1], others))
    assert optimizers[0].state[f"t{which}"].steps.dtype == np.int64
    assert batches == [4]


@pytest.mark.jit
def test_batches_keep_memory_for_one_batch():
    """Whichever table is the largest."""
    tables = {f"t{i}": np.zeros((100, 1), np.float32) for i in range(20)}
    opt = SparseAdam(tables, num_threads=1)
    ids, more = np.arange(2000) % 100, np.arange(2100) % 100

    def step(largest):
        opt.step(
            {
                name: RowGradient(more if i == largest else ids, np.ones((2100 if i == largest else 2000, 1)))
                for i, name in enumerate(tables)
            }
        )

    step(0)
    tracemalloc.start()
    try:
        for largest in range(20):
            step(largest)
        assert tracemalloc.get_traced_memory()[0] < 2 * 16 * 20 * 2100
    finally:
        tracemalloc.stop()


def test_gradients_that_share_memory_are_found_among_many_tables():
    tables = {f"t{i}": np.ones((30, 4)) for i in range(40)}
    opt = SparseAdam(tables, num_threads=1)
    for name, values in {
        "t3": tables["t17"][5:8],
        "t4": tables["t39"][::-1][:3],
        "t5": opt.state["t0"].exp_avg_sq[29:26:-1],
        "t6": np.lib.stride_tricks.as_strided(tables["t8"][29, 3:], (3, 4), (0, 0)),
    }.items():
        with refused(GradientError, ValueError, f"'{name}'", "shares memory", opt=opt, tables=tables):
            opt.step({name: RowGradient([1, 2, 3], values)})
    opt.step({name: RowGradient([1, 2, 3], np.ones((3, 4))) for name in tables})


def test_an_optimizer_twice_is_refused():
    opt = SparseAdam(np.ones((3, 2)))
    with pytest.raises(OptionError, match="an optimizer twice"):
        step_together([(opt, RowGradient([1], np.ones((1, 2))))] * 2)


def test_optimizers_whose_tables_share_memory_are_not_batched(batches):
    """Each updates the table in its turn, as if they were stepped one after the other."""
    rng = np.random.default_rng(4)
    shared, other = np.ones((30, 4)), np.ones((30, 4))
    given_now = [gradient("rows", rng, 30, 4, 20, np.float64) for _ in range(4)]
    together = [SparseAdam(shared, lr=0.1, num_threads=1) for _ in range(4)]
    step_together(list(zip(together, given_now, strict=True)))
    for each in given_now:
        SparseAdam(other, lr=0.1, num_threads=1).step(each)
    np.testing.assert_array_equal(shared, other)
    assert batches == []


def test_optimizers_with_tables_of_their_own_are_batched(batches):
    rng = np.random.default_rng(5)
    tables, others = tables_of([(30, 4)] * 6), tables_of([(30, 4)] * 6)
    optimizers, alone = (
        [
            SparseAdam(table, lr=0.1, num_threads=1, step_counts=STEP_COUNTS[i % 3])
            for i, table in enumerate(given_tables.values())
        ]
        for given_tables in (tables, others)
    )
    for _ in range(3):
        given_now = [gradient("bags", rng, 30, 4, 20) for _ in tables]
        step_together(list(zip(optimizers, given_now, strict=True)))
        for opt, each in zip(alone, given_now, strict=True):
            opt.step(each)
    for a, b in zip(optimizers, alone, strict=True):
        assert_same_bits(state_bits(a, a.tables["table"]), state_bits(b, b.tables["table"]))
    assert batches == [2] * 9  # a kernel of its own for each rule of counting
