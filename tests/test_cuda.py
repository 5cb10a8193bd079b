# SPDX-License-Identifier: Apache-2.0
"""What is particular to tables on a GPU; the rest of the tests have a ``backend``, and run on both."""

import copy
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
from backends import CUDA, Matrix, foreign, host
from checks import STEP_COUNTS, assert_same_bits, refused, state_bits
from oracle import OracleSparseAdam
from scipy import sparse

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam, checkpoint
from nb_sparse_adam._src.engine.scratch import BLOCK
from nb_sparse_adam._src.optimizer import tables_of
from nb_sparse_adam._src.stepping import step_together
from nb_sparse_adam.errors import (
    CheckpointError,
    GradientError,
    GradientIndexError,
    GradientTypeError,
    NonFiniteGradientError,
    OptionError,
    OptionTypeError,
    StateError,
    TableError,
)

pytestmark = pytest.mark.gpu

ROWS = 40
DTYPES = (np.float32, np.float64)


def guard_of(opt):
    """What an optimizer's tables on a GPU share."""
    return next(iter(tables_of(opt).values())).backend.guard


class Both:
    """The same training on a CPU and on a GPU."""

    def __init__(self, shape=(ROWS, 4), dtype=np.float32, **options):
        rng = np.random.default_rng(1)
        shapes = shape if isinstance(shape, dict) else {"table": shape}
        self.tables = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
        self.tables_on_gpu = CUDA.table(self.tables)
        self.opt = SparseAdam(self.tables, **{"lr": 0.1, **options})
        self.opt_on_gpu = SparseAdam(self.tables_on_gpu, **{"lr": 0.1, **options})

    def step(self, gradient):
        self.opt.step(gradient)
        self.opt_on_gpu.step(CUDA.gradient(gradient))
        self.assert_same()

    def assert_same(self):
        __tracebackhide__ = True
        assert_same_bits(state_bits(self.opt_on_gpu, self.tables_on_gpu), state_bits(self.opt, self.tables))


def forms(dim, dtype=np.float32, seed=0):
    """Gradients of each form, of tables of `ROWS` rows."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    ids, offsets = rng.integers(0, ROWS, 30), np.array([0, 3, 3, 10, 20, 30])
    stored = np.append(0, np.cumsum(rng.integers(0, 4, ROWS)))
    return {
        "increasing": RowGradient(np.arange(1, ROWS, 3), normal(13, dim)),
        "falling": RowGradient(np.arange(ROWS)[::-1], normal(ROWS, dim)),
        "repeated": RowGradient(ids, normal(30, dim)),
        "bags": BagGradient(ids, offsets, normal(5, dim)),
        "bags without the last offset": BagGradient(ids, offsets[:-1], normal(5, dim)),
        "means": BagGradient(ids, offsets, normal(5, dim), mode="mean"),
        "weighted bags": BagGradient(ids, offsets, normal(5, dim), weights=normal(30)),
        "entries": CSRGradient(stored, rng.integers(0, dim, stored[-1]), normal(stored[-1])),
    }


# --- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "options"), [(8, {}), (5, {"eps_hat": True, "maximize": True})], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_every_form_has_the_bits_of_a_cpu(step_counts, dtype, dim, options):
    both = Both((ROWS, dim), dtype, step_counts=step_counts, **options)
    for gradient in forms(dim, dtype).values():
        both.step(gradient)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_values_of_another_dtype_and_rows_that_lie_apart(step_counts):
    both = Both(step_counts=step_counts)
    rng = np.random.default_rng(2)
    ids, wide = rng.integers(0, ROWS, 9), rng.normal(size=(18, 9)).astype(np.float32)
    for values in (
        wide[:9, 4:8],
        wide[::2, 1:5],
        wide[:9, ::2][:, :4],
        wide[8::-1, :4],
        np.asfortranarray(wide[:9, :4]),
        wide[:9, :4].astype(np.float64),
        np.broadcast_to(wide[0, :4], (9, 4)),
    ):
        both.step(RowGradient(ids, values))
        both.step(RowGradient(np.arange(9), values))
        both.step(BagGradient(np.repeat(ids, 2)[::2], np.arange(9), values, weights=values[:, 0]))


def long_segments(name, dtype):
    """Segments longer than a block, side by side, and some that are not."""
    rng = np.random.default_rng(3)
    lengths = {3: BLOCK, 4: BLOCK + 1, 5: 1, 6: 2 * BLOCK + 7}
    ids = rng.permutation(np.repeat(list(lengths), list(lengths.values())))
    n = len(ids)
    if name == "rows":
        return RowGradient(ids, rng.normal(size=(n, 3)).astype(dtype))
    if name == "entries":
        columns = np.where(rng.random(n) < 0.9, 1, 2)
        indptr = np.append(0, np.cumsum([lengths.get(row, 0) for row in range(ROWS)]))
        return CSRGradient(indptr, columns, rng.normal(size=n).astype(dtype))
    weights = rng.normal(size=n).astype(dtype) if name == "weighted" else None
    return BagGradient(ids, np.array([0, n // 3, n]), rng.normal(size=(2, 3)).astype(dtype), weights=weights)


@pytest.mark.jit
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("rows", np.float64), ("bags", np.float32), ("weighted", np.float64), ("entries", np.float32)],
)
def test_sums_of_many_terms_are_made_in_a_cpus_order(name, dtype):
    both = Both((ROWS, 3), dtype, step_counts="row")
    both.step(long_segments(name, dtype))


@pytest.mark.jit
def test_a_sum_of_many_terms_that_overflows():
    gradient = long_segments("rows", np.float32)
    gradient.values[:] = 1.9e16  # the square of 1031 of them is beyond the largest number, that of 513 is not
    both = Both((ROWS, 3))
    with refused(
        NonFiniteGradientError, ValueError, opt=both.opt_on_gpu, tables=both.tables_on_gpu
    ) as caught:
        both.opt_on_gpu.step(CUDA.gradient(gradient))
    with pytest.raises(NonFiniteGradientError) as on_cpu:
        both.opt.step(gradient)
    assert str(caught.value) == str(on_cpu.value)
    for opt in (both.opt, both.opt_on_gpu):
        opt.on_nonfinite = "skip"
    both.step(gradient)
    assert both.opt_on_gpu.skipped_rows["table"] == 1


@pytest.mark.parametrize("eps_hat", [False, True])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_counts_beyond_the_table_of_corrections_follow_the_oracle(step_counts, eps_hat):
    # A CPU's bits are promised where corrections are tabulated: expm1 and log are those of a GPU here.
    options = {"betas": (0.9, 1 - 5e-8), "step_counts": step_counts, "eps_hat": eps_hat, "lr": 0.1}
    parameters = np.ones((3, 4), np.float32)
    table = CUDA.table(parameters)
    opt, oracle = SparseAdam(table, **options), OracleSparseAdam(parameters, **options)
    state = opt.state_dict()
    saved = state["tables"]["table"]
    saved["steps"] = np.full_like(saved["steps"], 30_000_000)
    saved["exp_avg_sq"][...] = 1e-3
    opt.load_state_dict(state)
    oracle.tables["table"].steps[...] = 30_000_000
    oracle.tables["table"].exp_avg_sq[...] = np.float32(1e-3)
    gradient = np.array([0, 2]), np.array([[1.0, 0.0, 3.0, -1.0], [-0.5, 0.25, 1.0, 2.0]])
    for _ in range(2):
        opt.step(CUDA.gradient(RowGradient(*gradient)))
        oracle.step(oracle.sums("rows", gradient))
    expected, got = oracle.tables["table"], opt.state["table"]
    expected.assert_close(host(table), host(got.exp_avg), host(got.exp_avg_sq))
    np.testing.assert_array_equal(host(got.steps), expected.steps)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_counts_are_widened_before_one_overflows(step_counts):
    both = Both(step_counts=step_counts)
    for opt in (both.opt, both.opt_on_gpu):
        state = opt.state_dict()
        state["tables"]["table"]["steps"][...] = 2**31 - 2
        opt.load_state_dict(state)
    for gradient in (forms(4)["repeated"], forms(4)["increasing"], forms(4)["entries"]):
        both.step(gradient)
    counts = host(both.opt_on_gpu.state["table"].steps)
    assert counts.dtype == np.int64
    assert counts.max() > 2**31


def test_an_interrupt_while_counts_are_widened_finds_the_old_ones(monkeypatch):
    from nb_sparse_adam._src.cuda import copies, table

    both = Both(step_counts="row")
    state = both.opt_on_gpu.state_dict()
    state["tables"]["table"]["steps"][...] = 2**31 - 1
    both.opt_on_gpu.load_state_dict(state)
    launch = table.launch

    def interrupted(kernel, *arguments):
        if kernel is copies.convert_vector:
            raise KeyboardInterrupt
        launch(kernel, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(table, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            both.opt_on_gpu.step(CUDA.gradient(forms(4)["increasing"]))
    assert host(both.opt_on_gpu.state["table"].steps).min() == 2**31 - 1


def test_a_step_of_several_tables_is_that_of_each():
    shapes = {"a": (ROWS, 4), "b": (ROWS,), "c": (ROWS, 3)}
    both = Both(shapes, step_counts="row")
    given = forms(4)
    ids, ones = np.array([3, 3, 1]), np.ones(3, np.float32)
    both.step({"a": given["repeated"], "b": RowGradient(ids, ones), "c": forms(3)["weighted bags"]})
    both.step({"c": forms(3)["entries"], "b": BagGradient(ids, np.array([0, 2]), ones[:2])})
    both.step({})


def test_options_count_from_the_next_step_on():
    both = Both()
    for values in ({"lr": 0.0}, {"lr": 2.0, "maximize": True}, {"betas": (0.0, 0.5)}, {"eps": 0.5}):
        for name, value in values.items():
            setattr(both.opt, name, value)
            setattr(both.opt_on_gpu, name, value)
        both.step(forms(4)["repeated"])


# --- other libraries' arrays --------------------------------------------------------------------------------


def as_foreign(gradient):
    fields = {name: foreign(value) for name, value in vars(gradient).items() if isinstance(value, np.ndarray)}
    return type(gradient)(**{**vars(gradient), **fields})


@pytest.mark.parametrize("form", ["increasing", "repeated", "weighted bags", "entries"])
def test_whatever_has_the_interface_is_a_table_and_a_gradient(form):
    both = Both()
    table = foreign(both.tables["table"])
    both.tables_on_gpu = {"table": table}
    both.opt_on_gpu = SparseAdam(table, lr=0.1)
    for _ in range(2):
        both.opt.step(forms(4)[form])
        both.opt_on_gpu.step(as_foreign(forms(4)[form]))
    both.assert_same()
    assert both.opt_on_gpu.tables["table"] is table


def test_a_read_only_one_is_a_gradient_and_no_table():
    array = np.ones((ROWS, 4), np.float32)
    with refused(TableError, ValueError, "'table'", "read-only"):
        SparseAdam(foreign(array, read_only=True))
    both = Both()
    both.opt.step(RowGradient(np.arange(ROWS), array))
    both.opt_on_gpu.step(
        RowGradient(foreign(np.arange(ROWS), read_only=True), foreign(array, read_only=True))
    )
    both.assert_same()


def test_two_arrays_of_one_memory_are_found_whatever_they_are():
    table = foreign(np.ones((ROWS, 4), np.float32))
    about = table.__cuda_array_interface__
    again = type(table)(table, about | {"shape": (4, 4), "data": (about["data"][0] + 64, False)})
    with refused(TableError, ValueError, "share memory"):
        SparseAdam({"a": table, "b": again})
    opt = SparseAdam(table)
    with refused(GradientError, ValueError, "shares memory", opt=opt, tables=table):
        opt.step(RowGradient(CUDA.array(np.arange(4)), again))


def test_cupys_matrices_are_gradients():
    both = Both()
    given = forms(4)["entries"]
    matrix = sparse.csr_matrix((given.data, given.indices, given.indptr), shape=(ROWS, 4))
    assert isinstance(CUDA.gradient(matrix), Matrix)
    both.step(matrix)


@pytest.mark.parametrize("make", ["numba", "address"])
def test_a_step_runs_on_the_stream_that_it_is_given(make):
    from numba import cuda

    both = Both()
    stream = cuda.stream() if make == "numba" else 0
    for name in ("increasing", "repeated"):
        both.opt.step(forms(4)[name])
        both.opt_on_gpu.step(CUDA.gradient(forms(4)[name]), stream=stream)
    both.assert_same()
    with refused(OptionError, ValueError, "stream", "none of the tables", opt=both.opt, tables=both.tables):
        both.opt.step(forms(4)["increasing"], stream=stream)


# --- tables of both -----------------------------------------------------------------------------------------


def test_tables_of_the_host_and_of_a_gpu_step_together_or_not_at_all():
    rng = np.random.default_rng(5)
    arrays = {name: rng.normal(size=(ROWS, 4)).astype(np.float32) for name in ("host", "gpu")}
    tables = {"host": arrays["host"].copy(), "gpu": CUDA.table(arrays["gpu"])}
    opt, on_cpu = SparseAdam(tables, num_threads=1), SparseAdam(arrays, num_threads=1)
    good = forms(4)["repeated"]
    bad = RowGradient(np.array([ROWS]), np.ones((1, 4)))
    for checks in ("immediate", "deferred"):
        opt.device_checks = checks
        for host_gets, gpu_gets, error in ((bad, good, "'host'"), (good, bad, "'gpu'")):
            with refused(GradientIndexError, IndexError, error, opt=opt, tables=tables):
                opt.step({"host": host_gets, "gpu": CUDA.gradient(gpu_gets)})
        opt.step({"gpu": CUDA.gradient(good), "host": good})
        on_cpu.step({"gpu": good, "host": good})
        assert_same_bits(state_bits(opt, tables), state_bits(on_cpu, arrays))
    with refused(GradientTypeError, TypeError, "'host'", "is on a GPU", opt=opt, tables=tables):
        opt.step({"host": CUDA.gradient(good)})
    with refused(GradientTypeError, TypeError, "'gpu'", "in the memory of the host", opt=opt, tables=tables):
        opt.step({"gpu": good})


def refused_together(pair, gradients):
    opts = [both.opt_on_gpu for both in pair]
    step_together([(opt, CUDA.gradient(given)) for opt, given in zip(opts, gradients, strict=True)])
    for opt in opts:
        opt.synchronize()


@pytest.mark.parametrize("second", ["immediate", "deferred"])
@pytest.mark.parametrize("first", ["immediate", "deferred"])
def test_optimizers_that_step_together_refuse_together(first, second):
    pair = Both(), Both()
    for both, checks in zip(pair, (first, second), strict=True):
        both.opt_on_gpu.device_checks = checks
    good, bad = forms(4)["repeated"], RowGradient(np.array([1, -1]), np.ones((2, 4)))
    for gradients in ((good, bad), (bad, good)):
        with pytest.raises(GradientIndexError, match=r"RowGradient.rows\[1\] is -1"):
            refused_together(pair, gradients)
        for both in pair:
            both.opt_on_gpu.synchronize()
            both.assert_same()
        step_together([(both.opt, good) for both in pair])
        step_together([(both.opt_on_gpu, CUDA.gradient(good)) for both in pair])
        for both in pair:
            both.assert_same()


# --- device_checks ------------------------------------------------------------------------------------------

ONE = np.ones((1, 4), np.float32)
KINDS = {
    "id": RowGradient(np.array([2, 977]), np.ones((2, 4))),
    "offset": BagGradient(np.array([2, 3]), np.array([0, 2, 1, 2]), np.ones((3, 4))),
    "column": CSRGradient(np.append(np.zeros(ROWS, int), 1), np.array([-2]), np.ones(1)),
    "pointer": CSRGradient(np.append(np.zeros(ROWS, int), 9), np.array([2]), np.ones(1)),
    "value": RowGradient(np.array([2, 3]), np.array([[1, 1, 1, 1], [1, 1, 1, np.nan]])),
    "weight": BagGradient(np.array([2, 3]), np.array([0]), ONE, weights=np.array([1, np.inf])),
    "sum": RowGradient(np.array([5, 5]), np.full((2, 4), 2e38)),
    "sum of entries": CSRGradient(np.append(np.zeros(ROWS), [2]).astype(int), np.array([1, 1]), [2e38, 2e38]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_deferred_checks_refuse_a_step_and_all_that_follow_it(kind):
    from numba import cuda

    good, bad = forms(4)["repeated"], KINDS[kind]
    both = Both({"one": (ROWS, 4), "other": (ROWS, 4)}, step_counts="row")
    opt, tables = both.opt_on_gpu, both.tables_on_gpu
    with pytest.raises(GradientError) as at_once:
        opt.step(CUDA.gradient({"one": good, "other": bad}))
    opt.device_checks = "deferred"
    for asks in ("synchronize", "step", "state_dict") if kind == "id" else ("synchronize",):
        both.step({"one": good, "other": good})
        before = state_bits(opt, tables)
        opt.step(CUDA.gradient({"one": good, "other": bad}))
        cuda.synchronize()
        guard_of(opt).seen[0] = 0  # as if the host had not heard of it yet
        opt.step(CUDA.gradient({"one": good}))
        cuda.synchronize()
        guard_of(opt).seen[0] = 0
        opt.step(CUDA.gradient({"other": good, "one": bad}))
        cuda.synchronize()
        assert_same_bits(state_bits(opt, tables), before)
        ask = getattr(opt, asks)
        with pytest.raises(GradientError) as caught:
            ask(*([CUDA.gradient({"one": good})] if asks == "step" else []))
        assert type(caught.value) is type(at_once.value)
        assert str(caught.value) == str(at_once.value)
        assert_same_bits(state_bits(opt, tables), before)
        opt.synchronize()
    both.step({"one": good, "other": good})


def test_deferred_checks_say_what_was_wrong_first():
    from numba import cuda

    both = Both()
    opt, table = both.opt_on_gpu, both.tables_on_gpu
    opt.device_checks = "deferred"
    before = state_bits(opt, table)
    opt.step(CUDA.gradient(KINDS["id"]))
    cuda.synchronize()  # a GPU notes it when it gets there
    guard_of(opt).seen[0] = 0
    opt.step(CUDA.gradient(KINDS["value"]))
    with pytest.raises(GradientIndexError, match=r"rows\[1\] is 977"):
        opt.synchronize()
    assert_same_bits(state_bits(opt, table), before)


@pytest.mark.parametrize("load", ["load_state_dict", "save", "restore"])
def test_what_was_refused_is_told_before_anything_is_loaded_or_saved(load, tmp_path):
    both = Both()
    opt, table = both.opt_on_gpu, both.tables_on_gpu
    both.step(forms(4)["increasing"])
    state = opt.state_dict()
    checkpoint.save(tmp_path, opt)
    opt.device_checks = "deferred"
    both.step(forms(4)["repeated"])
    before = state_bits(opt, table)
    opt.step(CUDA.gradient(KINDS["id"]))
    work = {
        "load_state_dict": lambda: opt.load_state_dict(state),
        "save": lambda: checkpoint.save(tmp_path, opt),
        "restore": lambda: checkpoint.restore(tmp_path, opt),
    }[load]
    with pytest.raises(GradientIndexError, match="977"):
        work()
    assert_same_bits(state_bits(opt, table), before)
    work()


def test_without_checks_a_good_gradient_is_a_step():
    for options in ({"on_nonfinite": "propagate"}, {"on_nonfinite": "skip"}):
        both = Both(step_counts="row", **options)
        both.opt_on_gpu.device_checks = "off"
        for gradient in forms(4).values():
            both.step(gradient)
        both.step(KINDS["value"])
        both.opt_on_gpu.synchronize()
        assert both.opt_on_gpu.skipped_rows["table"] == (options["on_nonfinite"] == "skip")


def test_checks_can_be_changed_between_steps():
    both = Both(on_nonfinite="skip")
    opt = both.opt_on_gpu
    for checks in ("off", "deferred", "immediate", "off"):
        opt.device_checks = checks
        assert opt.device_checks == checks
        both.step(forms(4)["repeated"])


def test_a_refused_step_is_told_before_checks_are_changed():
    both = Both()
    opt, table = both.opt_on_gpu, both.tables_on_gpu
    opt.device_checks = "deferred"
    before = state_bits(opt, table)
    opt.step(CUDA.gradient(KINDS["id"]))
    with pytest.raises(GradientIndexError, match="977"):
        opt.device_checks = "immediate"
    assert opt.device_checks == "deferred"
    assert_same_bits(state_bits(opt, table), before)
    opt.device_checks = "immediate"
    both.step(forms(4)["repeated"])


# --- refused by name ----------------------------------------------------------------------------------------


def test_options_of_the_other_side_are_refused(tmp_path):
    array = np.ones((ROWS, 4), np.float32)
    both = Both()
    opt = both.opt_on_gpu
    with refused(OptionError, ValueError, "state_dir", "on a GPU", "memory of the host"):
        SparseAdam({"host": array, "gpu": CUDA.table(array)}, state_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with refused(OptionError, ValueError, "num_threads is 1, expected None"):
        SparseAdam(CUDA.table(array), num_threads=1)
    for given, error, builtin, words in (
        ("on", OptionError, ValueError, ["device_checks is 'on'", "deferred"]),
        ("Deferred", OptionError, ValueError, ["device_checks is 'Deferred'"]),
        (None, OptionTypeError, TypeError, ["device_checks is None"]),
        (False, OptionTypeError, TypeError, ["device_checks is False"]),
        ("off", OptionError, ValueError, ["device_checks='off' with on_nonfinite='raise'"]),
    ):
        with refused(error, builtin, *words):
            SparseAdam(CUDA.table(array), device_checks=given)
        with refused(error, builtin, *words, opt=opt, tables=both.tables_on_gpu):
            opt.device_checks = given
    for given in ("deferred", "off"):
        with refused(OptionError, ValueError, "device_checks", "no table is on a GPU"):
            SparseAdam(array, device_checks=given, on_nonfinite="skip")
    quiet = SparseAdam(CUDA.table(array), device_checks="off", on_nonfinite="skip")
    with refused(OptionError, ValueError, "device_checks='off' with on_nonfinite='raise'"):
        quiet.on_nonfinite = "raise"
    loud = SparseAdam(array.copy(), lr=0.5)
    with refused(StateError, ValueError, "device_checks='off' with on_nonfinite='raise'"):
        quiet.load_state_dict(loud.state_dict())
    checkpoint.save(tmp_path / "loud", loud)
    with refused(CheckpointError, ValueError, "device_checks='off' with on_nonfinite='raise'"):
        checkpoint.restore(tmp_path / "loud", quiet)
    assert (quiet.on_nonfinite, quiet.lr) == ("skip", 1e-3)


def test_what_is_not_offered_is_refused_by_name():
    both = Both(on_nonfinite="skip")
    opt, tables = both.opt_on_gpu, both.tables_on_gpu
    same = {"opt": opt, "tables": tables}
    with refused(TableError, ValueError, "kernel_table", "on a GPU", **same), opt.kernel_table():
        pass
    for work in (pickle.dumps, copy.copy, copy.deepcopy):
        with refused(TableError, ValueError, "cannot be pickled or copied", "checkpoint.save", **same):
            work(opt)
    matrix = sparse.csr_array(np.ones((ROWS, 4), np.float32))
    for layout in ("coo", "csc"):
        with refused(GradientTypeError, TypeError, layout.upper(), "tocsr()", **same):
            opt.step(CUDA.gradient(matrix.asformat(layout)))
    dense = CUDA.array(np.ones((ROWS, 4), np.float32))
    with refused(GradientTypeError, TypeError, "dense", "rows 0..len(g) - 1", **same):
        opt.step(dense)


def test_gradients_are_where_their_tables_are():
    both = Both()
    gradient = forms(4)["weighted bags"]
    for name, array in vars(gradient).items():
        if not isinstance(array, np.ndarray):
            continue
        moved = {**vars(CUDA.gradient(gradient)), name: array}
        with refused(
            GradientTypeError, TypeError, f"BagGradient.{name} is a numpy.ndarray in the memory of the host",
            opt=both.opt_on_gpu, tables=both.tables_on_gpu,
        ):  # fmt: skip
            both.opt_on_gpu.step(BagGradient(**moved))
        moved = {**vars(gradient), name: CUDA.array(array)}
        with refused(
            GradientTypeError, TypeError, f"BagGradient.{name} is on a GPU", opt=both.opt, tables=both.tables
        ):
            both.opt.step(BagGradient(**moved))
    matrix = sparse.csr_array(np.ones((ROWS, 4), np.float32))
    with refused(GradientTypeError, TypeError, "indptr", "in the memory of the host"):
        both.opt_on_gpu.step(matrix)


def test_what_is_shown_of_tables_on_a_gpu():
    opt = SparseAdam(CUDA.table({"a": np.zeros((3, 2), np.float32), "b": np.zeros(5)}))
    assert "a: (3, 2) float32, b: (5,) float64" in repr(opt)
    assert repr(opt.state["a"]) == "TableState('a', (3, 2) float32, steps int32)"
    assert opt.skipped_rows == {"a": 0, "b": 0}
    opt.flush()
    opt.synchronize()


# --- interrupts ---------------------------------------------------------------------------------------------


@pytest.mark.jit
@pytest.mark.parametrize(
    ("step_counts", "names"), [("row", ("increasing", "repeated")), ("global", ("entries", "means"))]
)
def test_an_interrupt_after_any_launch_finds_all_tables_stepped_or_none(step_counts, names, monkeypatch):
    from nb_sparse_adam._src.cuda import launches as steps

    both = Both({"one": (ROWS, 4), "other": (ROWS, 4)}, step_counts=step_counts)
    given = dict(zip(both.tables, (forms(4)[name] for name in names), strict=True))
    on_gpu = CUDA.gradient(given)
    both.step(given)
    launch, launches, interrupt_at = steps.launch, itertools.count(1), [0]

    def interrupted(*arguments):
        launch(*arguments)
        if next(launches) in interrupt_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(steps, "launch", interrupted)
    both.opt_on_gpu.step(on_gpu)
    both.opt.step(given)
    last = next(launches) - 1
    assert last > 12
    outcomes = []
    for at in [*range(1, last - 8, 3), *range(last - 8, last + 1)]:
        launches = itertools.count(1)
        interrupt_at[:] = [at, at + 1]  # the second of them while the first is put off
        before = state_bits(both.opt_on_gpu, both.tables_on_gpu)
        with pytest.raises(KeyboardInterrupt):
            both.opt_on_gpu.step(on_gpu)
        after = state_bits(both.opt_on_gpu, both.tables_on_gpu)
        stepped = {name: (after[name, "steps"] != before[name, "steps"]).any() for name in both.tables}
        assert len(set(stepped.values())) == 1
        outcomes.append(stepped["one"])
        if outcomes[-1]:
            both.opt.step(given)
        both.assert_same()
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}
    interrupt_at.clear()
    both.step(given)


# --- the package --------------------------------------------------------------------------------------------

WITHOUT = """
import sys
sys.modules["numba_cuda"] = None  # as if it were not installed
import numpy as np
from nb_sparse_adam import RowGradient, SparseAdam
table = np.ones((3, 2), np.float32)
SparseAdam(table).step(RowGradient([1], np.ones((1, 2))))
assert "nb_sparse_adam._src.cuda" not in sys.modules
class OnGpu:
    __cuda_array_interface__ = {"shape": (3, 2), "typestr": "<f4", "data": (0, False), "version": 3}
try:
    SparseAdam(OnGpu())
except ImportError as error:
    print(error)
"""


def test_a_step_within_a_step_is_refused_and_the_outer_one_is_done(monkeypatch):
    """As of a signal handler that steps: tables on a GPU have one memory to work in."""
    from nb_sparse_adam._src.cuda import device
    from nb_sparse_adam._src.cuda import launches as steps

    table = CUDA.table(np.zeros((4, 2), np.float32))
    opt = SparseAdam(table, step_counts="row")
    gradient = CUDA.gradient(RowGradient(np.array([1]), np.ones((1, 2), np.float32)))
    seen = []

    def launch(*arguments):
        if not seen:
            seen.append(True)
            with pytest.raises(ValueError, match="within a step"):
                opt.step(gradient)
        device.launch(*arguments)

    monkeypatch.setattr(steps, "launch", launch)
    opt.step(gradient)
    opt.step(gradient)
    assert host(opt.state["table"].steps).tolist() == [0, 2, 0, 0]


@pytest.mark.jit
def test_without_numba_cuda_everything_else_works_and_the_extra_is_named():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert "a table on a GPU" in done.stdout
    assert "[cuda]" in done.stdout


# --- what a user can reach cannot hurt ----------------------------------------------------------------------


@pytest.mark.parametrize("step_counts", ["element", "row"])
@pytest.mark.parametrize("count", [-1, -100, -(2**31), 2**30])
def test_counts_that_cannot_be_have_the_bits_of_a_cpu(step_counts, count):
    both = Both(step_counts=step_counts, on_nonfinite="skip")
    gradients = forms(4)
    both.step(gradients["increasing"])
    steps = both.opt.state["table"].steps
    with both.opt.kernel_table() as table:
        live = np.lib.stride_tricks.as_strided(table.counts, steps.shape, steps.strides)
    live[::2] = count
    both.opt_on_gpu.state["table"].steps.copy_to_device(np.ascontiguousarray(live))
    for name in ("increasing", "repeated", "entries"):
        both.step(gradients[name])
    assert np.isfinite(both.tables["table"]).all()


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@pytest.mark.parametrize("wild", [-1, -(2**40), ROWS, 2**40])
def test_an_id_that_nobody_has_checked_is_left_out(step_counts, wild):
    """As one that another stream has changed since it was checked."""
    both = Both({"one": (ROWS, 3), "table": (ROWS, 3), "other": (ROWS, 3)}, step_counts=step_counts)
    both.opt_on_gpu.on_nonfinite = both.opt.on_nonfinite = "skip"
    both.opt_on_gpu.device_checks = "off"
    values = np.random.default_rng(4).normal(size=(5, 3)).astype(np.float32)
    for ids in ([1, 2, 5, 7, 9], [9, 2, 9, 2, 1]):
        ids, kept = np.array(ids), np.array([True, True, True, False, True])
        both.opt.step({"table": RowGradient(ids[kept], values[kept])})
        ids[3] = wild
        both.opt_on_gpu.step({"table": CUDA.gradient(RowGradient(ids, values))})
        both.assert_same()


@pytest.mark.parametrize("name", ["rows that overlap", "windows", "a row again and again"])
def test_tables_that_overlap_themselves_are_refused(name):
    strides = {"rows that overlap": (8, 4), "windows": (4, 4), "a row again and again": (0, 4)}[name]
    table = np.lib.stride_tricks.as_strided(np.zeros(20, np.float32), (4, 4), strides)
    with pytest.raises(TableError, match="not C-contiguous"):
        SparseAdam(foreign(table))
