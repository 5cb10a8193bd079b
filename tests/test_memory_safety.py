# SPDX-License-Identifier: Apache-2.0
"""Whatever a user's memory holds, and whenever it changes, no kernel reads or writes outside its memory.

Counts, ids and offsets are numbers that say where a kernel reads and writes. They are changed here by the
doors that are open to a user: an array of a gradient, which is read when another one's ``__array__`` is
called or while another thread writes to it; and the array of counts that `kernel_table` lends.
"""

import subprocess
import sys
import textwrap

import numba
import numpy as np
import pytest
from checks import STEP_COUNTS, assert_same_bits, refused, state_bits
from numba import njit

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam, apply_row_gradient
from nb_sparse_adam._src import stepping
from nb_sparse_adam.errors import GradientIndexError

ROWS, DIM = 12, 4
WILD = [-1, -(2**40), ROWS, 2**40, 2**63 - 1]


# --- counts -----------------------------------------------------------------------------------------------


@njit
def apply_each(table, rows, values):
    for s in range(len(rows)):
        apply_row_gradient(table, rows[s], values[s])


def live_counts(opt):
    """The counts of an optimizer, writeable: an array that `kernel_table` lends, in the shape of `steps`."""
    steps = opt.state["table"].steps
    with opt.kernel_table() as table:
        return np.lib.stride_tricks.as_strided(table.counts, steps.shape, steps.strides)


def steps_of_each_form(opt, values):
    """Rows as they are, rows to be summed, entries, and a loop of the user's."""
    opt.step(RowGradient(np.arange(ROWS), values))
    opt.step(RowGradient(np.append(np.arange(ROWS), 0)[::-1].copy(), np.append(values, values[:1], axis=0)))
    columns = np.tile(np.arange(DIM), ROWS)
    opt.step(CSRGradient(np.arange(0, ROWS * DIM + 1, DIM), columns, values.reshape(-1)))
    with opt.kernel_table() as table:
        apply_each(table, np.arange(ROWS), values)


def trained(step_counts, count, everywhere, wide=False, **options):
    """An optimizer that has stepped on after a count was written into its counts, or into some of them."""
    values = np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)
    values[2, 1] = 0
    table = np.zeros((ROWS, DIM), np.float32)
    opt = SparseAdam(table, step_counts=step_counts, on_nonfinite="skip", num_threads=1, **options)
    opt.step(RowGradient(np.arange(ROWS), values))
    if wide:
        state = opt.state_dict()
        state["tables"]["table"]["steps"] = np.full_like(opt.state["table"].steps, 2**40, np.int64)
        opt.load_state_dict(state)
    counts = live_counts(opt)
    if everywhere or step_counts == "global":
        counts[...] = count
    else:
        counts[::2] = count
        counts[1, ..., None][:2] = count
    steps_of_each_form(opt, values)
    return opt


NARROW, WIDE = [-1, -100, 2**31 - 2, -(2**31)], [-1, -(2**40), 2**63 - 1, -(2**63)]


def check_counts(step_counts, wide):
    """A count that cannot be is as good as a very high one."""
    for betas in [(0.9, 0.999), (0.9, 1 - 2**-20)]:  # all corrections are tabulated, or the first ones
        for everywhere in (True, False):
            usual = trained(step_counts, 2**29, everywhere, wide, betas=betas)
            for count in WIDE if wide else NARROW:
                opt = trained(step_counts, count, everywhere, wide, betas=betas)
                assert np.isfinite(opt.tables["table"]).all()
                if count == -1:
                    continue  # steps after it begin to count from 0
                for what in ("exp_avg", "exp_avg_sq"):
                    np.testing.assert_array_equal(
                        getattr(opt.state["table"], what), getattr(usual.state["table"], what)
                    )
                np.testing.assert_allclose(opt.tables["table"], usual.tables["table"], rtol=1e-5)
                steps = opt.state["table"].steps
                assert count < 0 or steps.max() >= count
                assert count >= 0 or steps.min() <= count + 5


@pytest.mark.jit
def test_counts_that_cannot_be(tmp_path):
    """In a process of its own: what is wrong here ends it."""
    program = "from test_memory_safety import *\n"
    program += "for step_counts in STEP_COUNTS:\n"
    program += "    for wide in (False, True):\n"
    program += "        check_counts(step_counts, wide)\n"
    run(program, tmp_path)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_count_at_the_end_of_its_type_stays_there(step_counts):
    opt = SparseAdam(np.zeros((ROWS, DIM)), step_counts=step_counts, on_nonfinite="skip")
    state = opt.state_dict()
    state["tables"]["table"]["steps"] = np.full_like(opt.state["table"].steps, 2**31, np.int64)
    opt.load_state_dict(state)
    live_counts(opt)[...] = 2**63 - 1
    for _ in range(2):
        opt.step(RowGradient([3, 5], np.ones((2, DIM))))
        opt.step(BagGradient([3, 3, 5], [0, 1, 3], np.ones((2, DIM))))
    assert (opt.state["table"].steps == 2**63 - 1).all()
    assert np.isfinite(opt.tables["table"]).all()
    assert (opt.tables["table"][[3, 5]] < 0).all()


def test_where_things_lie_cannot_be_changed():
    opt = SparseAdam(np.zeros((ROWS, DIM)), on_nonfinite="skip")
    with opt.kernel_table() as table:
        before = table.settings.copy()
        with pytest.raises(ValueError, match="read-only"):
            table.settings[0] = 2**40
        with pytest.raises(ValueError, match="WRITEABLE"):
            table.settings.flags.writeable = True
        np.testing.assert_array_equal(table.settings, before)


@pytest.mark.jit
@pytest.mark.skipif(numba.config.BOUNDSCHECK, reason="checked loads are compiled for contiguous arrays")
def test_no_row_is_nan_and_no_gradient_lies_apart():
    opt = SparseAdam(np.zeros((ROWS, DIM)), on_nonfinite="skip")
    values = np.arange(1.0, 2 * DIM + 1)
    with opt.kernel_table() as table:
        with pytest.raises(IndexError, match="no such row"):
            apply_each(table, np.array([np.nan]), np.ones((1, DIM)))
        for apart in (values[::2], values[::-1][:DIM]):
            with pytest.raises(ValueError, match="contiguous"):
                apply_each(table, np.array([1]), apart[None])
        apply_each(table, np.array([1]), values.reshape(2, DIM)[:, :DIM][1:])
    assert opt.state["table"].steps.sum() == DIM


# --- ids that change after they were checked --------------------------------------------------------------


class Hook:
    """Values that do something when they are read."""

    def __init__(self, values, do):
        self.values, self.do = values, do

    def __array__(self, dtype=None, copy=None):
        self.do()
        return self.values


class Duck:
    """As scipy's arrays, which check themselves."""

    def __init__(self, layout, **arrays):
        self.format, self.shape = layout, (ROWS, DIM)
        self.__dict__.update(arrays)


def of_form(form):
    """A gradient of `ROWS` rows, and its arrays that say where something is."""
    ones = np.ones((6, DIM))
    ids = np.array([1, 5, 3, 5, 9, 2])
    offsets = np.array([0, 2, 4, 4, 5, 6, 6])
    if form == "increasing":
        ids.sort()
        ids[3] = 4
        return RowGradient(ids, ones), {"ids": ids}
    if form == "rows":
        return RowGradient(ids, ones), {"ids": ids}
    if form == "bags":
        return BagGradient(ids, offsets, ones), {"ids": ids, "offsets": offsets}
    if form == "weighted":
        return BagGradient(ids, offsets, ones, np.arange(1.0, 7)), {"ids": ids, "offsets": offsets}
    if form == "means":
        return BagGradient(ids, offsets, ones, mode="mean"), {"ids": ids, "offsets": offsets}
    columns = np.array([1, 3, 0, 2, 0, 3])
    indptr = np.append(np.repeat([0, 2, 4, 4], 3), 6)
    return CSRGradient(indptr, columns, np.arange(1.0, 7)), {"columns": columns}


def change_while_reading(form, what, wild, batched):
    """A step of two tables: the gradient of the first is changed when that of the second one is read."""
    gradient, arrays = of_form(form)

    def change():
        arrays[what][3] = wild

    values = Hook(np.ones((2, DIM)), change)
    other = RowGradient([3, 3], values)
    if not batched:
        other = CSRGradient([0] * ROWS + [2], [0, 1], Hook(np.ones(2), change))
    tables = {"first": np.zeros((ROWS, DIM)), "second": np.zeros((ROWS, DIM))}
    opt = SparseAdam(tables, step_counts="row", num_threads=1)
    opt.step({"first": of_form(form)[0], "second": RowGradient([3, 3], np.ones((2, DIM)))})
    return opt, {"first": gradient, "second": other}


def step_with_a_change(opt, gradient, array, wild):
    """Step, while another thread changes an array after it was looked at and before it is used."""
    prepared = stepping.prepare(opt._requests(gradient))
    array[3] = wild
    stepping.finish(prepared)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("wild", WILD)
@pytest.mark.parametrize(
    ("form", "what"),
    [
        ("rows", "ids"),
        ("bags", "ids"),
        ("bags", "offsets"),
        ("weighted", "ids"),
        ("weighted", "offsets"),
        ("means", "ids"),
        ("means", "offsets"),
    ],
)
def test_what_is_changed_while_other_arrays_are_read_is_refused(form, what, wild, batched):
    opt, gradient = change_while_reading(form, what, wild, batched)
    tables = dict(opt.tables)
    with refused(GradientIndexError, ValueError, "'first'", "[3] is", opt=opt, tables=tables):
        opt.step(gradient)


@pytest.mark.parametrize("wild", WILD)
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_row_that_is_none_by_the_time_it_is_written_is_left_out(step_counts, wild):
    tables = [np.zeros((ROWS, DIM)) for _ in range(2)]
    opt, expected = (SparseAdam(table, step_counts=step_counts, num_threads=1) for table in tables)
    gradient, arrays = of_form("increasing")
    step_with_a_change(opt, gradient, arrays["ids"], wild)
    rows, _ = of_form("increasing")
    expected.step(RowGradient(np.delete(rows.rows, 3), np.ones((5, DIM))))
    assert_same_bits(state_bits(opt, tables[0]), state_bits(expected, tables[1]))


@pytest.mark.parametrize("wild", [DIM, *WILD])
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_a_column_that_is_none_by_the_time_it_is_written_is_left_out(step_counts, wild):
    tables = [np.zeros((ROWS, DIM)) for _ in range(2)]
    opt, expected = (SparseAdam(table, step_counts=step_counts, num_threads=1) for table in tables)
    gradient, arrays = of_form("entries")
    step_with_a_change(opt, gradient, arrays["columns"], wild)
    entries, _ = of_form("entries")
    indptr = entries.indptr - (entries.indptr > 3)
    without = CSRGradient(indptr, np.delete(entries.indices, 3), np.delete(entries.data, 3))
    expected.step(without)
    assert_same_bits(state_bits(opt, tables[0]), state_bits(expected, tables[1]))


@pytest.mark.parametrize("wild", [-1, -(2**40), 2**40])
@pytest.mark.parametrize("layout", ["coo", "csc"])
def test_entries_that_are_changed_while_they_are_read_are_refused(layout, wild):
    ids = np.array([1, 5, 3, 5, 9, 2])

    def change():
        ids[3] = wild

    data = Hook(np.ones(6), change)
    if layout == "coo":
        gradient = Duck("coo", row=ids, col=np.array([0, 1, 0, 2, 3, 1]), data=data)
    else:
        gradient = Duck("csc", indptr=np.array([0, 2, 3, 5, 6]), indices=ids, data=data)
    table = np.zeros((ROWS, DIM))
    opt = SparseAdam(table)
    with refused(GradientIndexError, ValueError, opt=opt, tables=table):
        opt.step(gradient)


# --- threads ----------------------------------------------------------------------------------------------


def run(program, tmp_path):
    """Run a program in a process of its own, which must end by itself."""
    file = tmp_path / "program.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(sys.path[0])!r})\n" + program, encoding="utf-8")
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


FLIP = textwrap.dedent(
    """
    import threading, time
    import numpy as np
    from numba import njit
    from scipy import sparse
    from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
    from nb_sparse_adam.errors import GradientError

    ROWS, DIM, N, PAD = 4000, 8, 20_000, 1 << 16

    @njit(nogil=True)
    def flip(array, wild, running, pause):
        # One number is what it was for a while, and then something else.
        at = len(array) // 3
        good = array[at]
        number = 0
        while running[0]:
            array[at] = wild[number % len(wild)]
            for _ in range(pause):
                running[1] += 1
            array[at] = good
            for _ in range(pause):
                running[1] += 1
            number += 1

    def beside(array, wild, step, seconds):
        running = np.ones(2, np.int64)
        wild = np.array(wild, array.dtype)
        flip(array, wild, np.zeros(2, np.int64), 1)
        thread = threading.Thread(target=flip, args=(array, wild, running, 20_000))
        thread.start()
        try:
            stepped = refused = 0
            end = time.monotonic() + seconds
            while time.monotonic() < end or stepped + refused < 20:
                try:
                    step()
                    stepped += 1
                except GradientError:
                    refused += 1
        finally:
            running[0] = 0
            thread.join()

    def padded():
        memory = np.full(2 * PAD + ROWS * DIM, 7, np.float32)
        return memory, memory[PAD : PAD + ROWS * DIM].reshape(ROWS, DIM)

    memory, table = padded()
    rng = np.random.default_rng(0)
    """
)

FLIP_IDS = FLIP + textwrap.dedent(
    """
    def try_form(gradient, array, wild, step_counts="row"):
        opt = SparseAdam({"a": table, "b": np.zeros((50, DIM), np.float32)}, step_counts=step_counts)
        few = RowGradient(np.array([3, 3]), np.ones((2, DIM), np.float32))
        opt.step({"a": gradient, "b": few})
        beside(array, wild, lambda: opt.step({"a": gradient}), 0.3)
        beside(array, wild, lambda: opt.step({"a": gradient, "b": few}), 0.2)
        assert (memory[:PAD] == 7).all() and (memory[-PAD:] == 7).all()

    values = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    wild = [2**40, -1, -(2**40), ROWS]
    for step_counts in ("row", "element"):
        ids = np.arange(ROWS)
        try_form(RowGradient(ids, values), ids, wild, step_counts)
    ids = rng.integers(0, ROWS, N)
    offsets = np.arange(0, N + 1, 10)
    try_form(RowGradient(ids, np.ones((N, DIM), np.float32)), ids, wild)
    bags = values[: len(offsets) - 1]
    try_form(BagGradient(ids, offsets, bags), ids, wild)
    try_form(BagGradient(ids, offsets, bags), offsets, wild)
    try_form(BagGradient(ids, offsets, bags, np.ones(N, np.float32)), offsets, wild)
    columns = np.tile(np.arange(5), ROWS)
    indptr = np.arange(0, 5 * ROWS + 1, 5)
    data = np.ones(5 * ROWS, np.float32)
    for step_counts in ("row", "element"):
        try_form(CSRGradient(indptr, columns, data), columns, wild, step_counts)
    indptr[ROWS // 3 : ROWS // 3 + 2] = indptr[ROWS // 3]  # an empty row: one more if that is another number
    try_form(CSRGradient(indptr, columns, data), indptr, [indptr[ROWS // 3] - 1, *wild])
    coo = sparse.coo_array((data, (np.repeat(np.arange(ROWS), 5), columns)), (ROWS, DIM))
    try_form(coo, coo.row, [-1, -(2**30), ROWS, 2**30])
    """
)

FLIP_COUNTS = FLIP + textwrap.dedent(
    """
    for step_counts in ("element", "row", "global"):
        opt = SparseAdam(table, step_counts=step_counts, on_nonfinite="skip")
        values = rng.normal(size=(ROWS, DIM)).astype(np.float32)
        values[rng.random(values.shape) < 0.4] = 0
        gradient = RowGradient(np.arange(ROWS), values)
        opt.step(gradient)
        with opt.kernel_table() as lent:
            counts = lent.counts
        where = counts[: 1 if step_counts == "global" else 8]  # of row 0 on
        wild = [-5, -(2**31), 2**31 - 1, 2**30, 7]
        beside(where, wild, lambda: opt.step(gradient), 0.5)
        assert (memory[:PAD] == 7).all() and (memory[-PAD:] == 7).all()
        assert np.isfinite(table).all()
    """
)


@pytest.mark.jit
@pytest.mark.parametrize("program", [FLIP_IDS, FLIP_COUNTS], ids=["ids", "counts"])
def test_a_thread_that_changes_numbers_while_another_steps(program, tmp_path):
    run(program, tmp_path)


# --- memory that overlaps itself --------------------------------------------------------------------------


def odd_views():
    """Tables whose strides say something odd: (array, whether they can be updated in place)."""
    memory = np.arange(24.0)
    strided = np.lib.stride_tricks.as_strided
    return {
        "windows": (np.lib.stride_tricks.sliding_window_view(memory, 3, writeable=True), False),
        "a row again and again": (strided(memory, (4, 3), (0, 8)), False),
        "an element again and again": (strided(memory, (4, 3), (0, 0)), False),
        "rows that overlap": (strided(memory, (4, 3), (16, 8)), False),
        "rows backwards": (memory.reshape(6, 4)[::-1], False),
        "columns backwards": (memory.reshape(6, 4)[:, ::-1], False),
        "columns": (memory.reshape(6, 4).T, False),
        "a vector backwards": (memory[::-1], False),
        "one element as a vector": (strided(memory, (4,), (0,)), False),
        "one row, a stride of 0": (strided(memory, (1, 3), (0, 8)), True),
        "one row, a stride that is no multiple": (strided(memory, (1, 3), (5, 8)), True),
        "one column, a stride of 0 within rows": (strided(memory, (4, 1), (8, 0)), True),
        "one column, rows at one place": (strided(memory, (4, 1), (0, 8)), False),
        "one element": (strided(memory, (1, 1), (0, -8)), True),
        "one element of a vector": (strided(memory, (1,), (3,)), True),
        "no rows": (strided(memory, (0, 3), (0, 0)), True),
        "no columns": (strided(memory, (3, 0), (0, 0)), True),
    }


@pytest.mark.parametrize("name", odd_views())
def test_tables_with_odd_strides_are_right_or_refused(name):
    table, fits = odd_views()[name]
    if not fits:
        with pytest.raises(ValueError, match="not C-contiguous"):
            SparseAdam(table)
        return
    usual = np.array(table, order="C")
    gradient = RowGradient(np.arange(len(table)), np.full(table.shape, 2.0))
    for each in (table, usual):
        opt = SparseAdam(each, step_counts="row")
        opt.step(gradient)
        opt.step(BagGradient(np.arange(len(table)), np.arange(len(table) + 1), np.full(table.shape, 2.0)))
    np.testing.assert_array_equal(table, usual)


@pytest.mark.parametrize("name", odd_views())
def test_values_with_odd_strides_are_read_as_they_are(name):
    values, _ = odd_views()[name]
    tables = [np.zeros((30, *values.shape[1:])) for _ in range(2)]
    for table, each in zip(tables, (values, np.array(values, order="C")), strict=True):
        opt = SparseAdam(table)
        opt.step(RowGradient(np.arange(len(values)), each))
        opt.step(RowGradient(np.zeros(len(values), int), each))
    np.testing.assert_array_equal(*tables)
