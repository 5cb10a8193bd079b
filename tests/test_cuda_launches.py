# SPDX-License-Identifier: Apache-2.0
"""A step's launches on a GPU, its copies and its records: how many there are, and who may overwrite them."""

import collections

import numpy as np
import pytest
from backends import CUDA, host
from checks import assert_same_bits, state_bits

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam._src.engine.codecs import Codec
from nb_sparse_adam._src.optimizer import tables_of
from nb_sparse_adam.errors import GradientIndexError

pytestmark = pytest.mark.gpu

ROWS, DIM = 7, 3


def gradient(form, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    ids, offsets = rng.integers(0, ROWS, 6), np.array([0, 1, 4])
    indptr = np.append(0, np.cumsum(rng.integers(0, 3, ROWS)))
    return {
        "increasing": lambda: RowGradient(np.array([1, 4, 6]), normal(3, DIM)),
        "rows": lambda: RowGradient(ids, normal(6, DIM)),
        "bags": lambda: BagGradient(ids, offsets, normal(3, DIM)),
        "means": lambda: BagGradient(ids, offsets, normal(3, DIM), mode="mean"),
        "weighted": lambda: BagGradient(ids, offsets, normal(3, DIM), weights=normal(6)),
        "entries": lambda: CSRGradient(indptr, rng.integers(0, DIM, indptr[-1]), normal(indptr[-1])),
        "none": lambda: RowGradient(np.zeros(0, int), normal(0, DIM)),
    }[form]()


@pytest.fixture
def counted(monkeypatch):
    """Calls of what launches and copies."""
    from nb_sparse_adam._src.cuda import gradients, guard, launches, ring, steps, table

    calls = collections.Counter()

    def count(name, function):
        def counting(*arguments):
            calls[name] += 1
            return function(*arguments)

        return counting

    for module in (gradients, guard, launches, ring, steps, table):
        for name in ("launch", "upload", "copy_later", "copy_to_host", "copy_to_device"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, count(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize("device_checks", ["immediate", "deferred"])
@pytest.mark.parametrize("form", ["increasing", "rows", "bags", "entries"])
def test_26_tables_take_as_many_launches_and_copies_as_one(form, device_checks, counted):
    seen = []
    for count in (1, 26):
        names = [f"table {i}" for i in range(count)]
        arrays = {name: np.ones((ROWS, DIM), np.float32) for name in names}
        tables = CUDA.table(arrays)
        opt, on_cpu = SparseAdam(tables, device_checks=device_checks), SparseAdam(arrays)
        for turn in range(2):
            given = {name: gradient(form, seed + turn) for seed, name in enumerate(names)}
            counted.clear()
            opt.step(CUDA.gradient(given))
            on_cpu.step(given)
        seen.append(dict(counted))
        assert_same_bits(state_bits(opt, tables), state_bits(on_cpu, arrays))
    assert seen[0] == seen[1]
    assert seen[0]["launch"] < 17
    waits = {"copy_to_host": 1} if device_checks == "immediate" else {"copy_later": 1}
    assert seen[0] == {"launch": seen[0]["launch"], "upload": 1, **waits}


FORMS = ("increasing", "rows", "bags", "means", "weighted", "entries", "none")


def of_all_kinds(**options):
    """Tables of two dtypes with a gradient of each form, on a CPU and on a GPU."""
    arrays = {
        (form + dtype): np.ones((ROWS, DIM), dtype) for form in FORMS for dtype in ("float32", "float64")
    }
    given = {
        form + dtype: gradient(form, seed, dtype)
        for seed, form in enumerate(FORMS)
        for dtype in ("float32", "float64")
    }
    tables = CUDA.table(arrays)
    return arrays, SparseAdam(arrays, **options), tables, SparseAdam(tables, **options), given


@pytest.mark.parametrize("step_counts", ["element", "row", "global"])
def test_tables_and_gradients_of_all_kinds_step_together(step_counts):
    arrays, opt, tables, on_gpu, given = of_all_kinds(step_counts=step_counts, on_nonfinite="skip")
    given["rowsfloat32"].values[2] = given["increasingfloat64"].values[1] = np.nan
    given["entriesfloat64"].data[3] = np.inf
    for _ in range(2):
        opt.step(given)
        on_gpu.step(CUDA.gradient(given))
        assert_same_bits(state_bits(on_gpu, tables), state_bits(opt, arrays))
    assert dict(on_gpu.skipped_rows) == dict(opt.skipped_rows)
    assert sum(opt.skipped_rows.values()) == 6


def test_what_is_told_first_is_what_was_given_first():
    arrays, opt, tables, on_gpu, given = of_all_kinds()
    for first, second in (("bagsfloat64", "rowsfloat32"), ("entriesfloat32", "meansfloat64")):
        bad = {name: broken(given[name]) for name in (first, second)}
        bad.update((name, each) for name, each in given.items() if name not in bad)
        errors = []
        for optimizer, those in ((opt, bad), (on_gpu, CUDA.gradient(bad))):
            with pytest.raises(GradientIndexError, match=first) as caught:
                optimizer.step(those)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    assert_same_bits(state_bits(on_gpu, tables), state_bits(opt, arrays))


def broken(given):
    """The same with ids that no table has."""
    name = "rows" if isinstance(given, RowGradient) else "indices"
    ids = getattr(given, name).copy()
    ids[-1] = 99
    return type(given)(**{**vars(given), name: ids})


def test_a_step_of_too_many_ids_to_be_counted_is_cut(monkeypatch):
    from nb_sparse_adam._src.cuda import launches, steps

    monkeypatch.setattr(steps, "MOST_IDS", 10)
    monkeypatch.setattr(launches, "MOST_IDS", 10)
    arrays, opt, tables, on_gpu, given = of_all_kinds()
    given["entriesfloat32"] = given["entriesfloat64"] = gradient("rows")
    for _ in range(2):
        opt.step(given)
        on_gpu.step(CUDA.gradient(given))
        assert_same_bits(state_bits(on_gpu, tables), state_bits(opt, arrays))
    for name in ("increasingfloat32", "weightedfloat64"):  # in the first part and in the last
        with pytest.raises(GradientIndexError, match=name):
            on_gpu.step(CUDA.gradient({**given, name: broken(given[name])}))
        assert_same_bits(state_bits(on_gpu, tables), state_bits(opt, arrays))
    opt.step(given)
    on_gpu.step(CUDA.gradient(given))
    assert_same_bits(state_bits(on_gpu, tables), state_bits(opt, arrays))


# --- memory of steps ----------------------------------------------------------------------------------------


class Moment:
    """A mark that passes when it is told to, or waited for."""

    def __init__(self, waits):
        self.has_passed, self._waits = False, waits

    def wait(self):
        self._waits.append(self)
        self.has_passed = True


def test_records_are_overwritten_by_nobody_while_a_launch_may_read_them(monkeypatch):
    from nb_sparse_adam._src.cuda import ring

    waits, kept = [], ring.Ring()
    slots = []
    for _ in range(ring.MOST):  # none has passed: each step has a slot of its own
        slots.append(kept.take(10))
        slots[-1].mark = Moment(waits)
    assert len(set(map(id, slots))) == ring.MOST
    assert waits == []
    first = slots[0].mark
    again = kept.take(10)
    assert (again, waits) == (slots[0], [first])  # the host is too far ahead: it waits for the first
    again.mark = Moment(waits)
    slots[1].mark.has_passed = True
    assert kept.take(10) is slots[1]
    assert waits == [first]
    # That one has no mark, as after an interrupt: it is not taken before all is done.
    for slot in slots[2:]:
        slot.mark.has_passed = True
        assert kept.take(10) is slot
        slot.mark = Moment(waits)
    again.mark.has_passed = True
    assert kept.take(10) is again
    again.mark = Moment(waits)
    synchronized = []
    monkeypatch.setattr(ring, "synchronize", lambda: synchronized.append(True))
    assert kept.take(10) is slots[1]
    assert synchronized == [True]


def test_larger_records_get_a_larger_slot():
    from nb_sparse_adam._src.cuda import ring

    kept = ring.Ring()
    small = kept.take(10)
    small.mark = ring.Mark(None)
    assert kept.take(10) is small
    small.mark = ring.Mark(None)
    assert kept.take(small.words + 1).words > small.words


# --- what records say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["increasing", "rows", "entries"])
def test_rows_of_parameters_have_a_stride_of_their_own(form):
    from numba import cuda

    array = np.ones((ROWS, DIM), np.float32)
    table = CUDA.table(array)
    opt, on_cpu = SparseAdam(table, step_counts="row"), SparseAdam(array, step_counts="row")
    wide = np.full((ROWS, DIM + 2), 5, np.float32)
    wide[:, :DIM] = 1
    state = tables_of(opt)["table"]
    state.matrix = cuda.to_device(wide.reshape(-1))
    state.arrays = state.arrays._replace()  # it is described anew
    state.param_stride = DIM + 2
    for seed in range(2):
        opt.step(CUDA.gradient(gradient(form, seed)))
        on_cpu.step(gradient(form, seed))
    found = host(state.matrix).reshape(ROWS, DIM + 2)
    np.testing.assert_array_equal(found[:, :DIM], array)
    assert (found[:, DIM:] == 5).all()


class Halved(Codec):
    """Each number as half of it."""

    name = "halved"

    @staticmethod
    def load(word):
        return word * 2

    @staticmethod
    def store(number):
        return number / 2


@pytest.mark.parametrize("step_counts", ["element", "row", "global"])
def test_a_state_is_stored_as_its_codec_says(step_counts):
    array = np.ones((ROWS, DIM), np.float32)
    table = CUDA.table(array)
    opt, on_cpu = SparseAdam(table, step_counts=step_counts), SparseAdam(array, step_counts=step_counts)
    tables_of(opt)["table"].codec = Halved()
    for seed, form in enumerate(("increasing", "rows", "entries")):
        opt.step(CUDA.gradient(gradient(form, seed)))
        on_cpu.step(gradient(form, seed))
    np.testing.assert_array_equal(host(table), array)
    for name in ("exp_avg", "exp_avg_sq"):
        ours, theirs = (getattr(each.state["table"], name) for each in (opt, on_cpu))
        np.testing.assert_array_equal(2 * host(ours), theirs)
