# SPDX-License-Identifier: Apache-2.0
"""Rows that come, go and change places: held to state dicts whose arrays are padded by hand, bit for bit."""

import itertools
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from checks import STEP_COUNTS, assert_same_bits, bits, options_of, refused, state_bits
from hypothesis import given
from hypothesis import strategies as st
from interrupts import interrupted
from strategies import ID_DTYPES, hyper_parameters

import nb_sparse_adam
from nb_sparse_adam import RowGradient, SparseAdam
from nb_sparse_adam._src.optimizer import tables_of
from nb_sparse_adam.errors import StateError, StateTypeError, TableError, TableTypeError

DTYPES = [np.float32, np.float64]
# 1-D; rows whose counts lie in their records, and rows whose counts lie elsewhere; rows of no columns.
DIMS = [None, 1, 2, 3, 8, 17, 0]
ARRAYS = ("exp_avg", "exp_avg_sq", "steps")


def shape_of(rows, dim):
    return (rows,) if dim is None else (rows, dim)


def new_table(rng, rows, dim, dtype):
    return rng.normal(size=shape_of(rows, dim)).astype(dtype)


def step(opts, rng, names=("table",)):
    """One gradient for all of these optimizers, some rows of it repeated; one row of it is skipped."""
    gradients = {}
    for name in names:
        table = opts[0].tables[name]
        n = int(rng.integers(0, 2 * len(table) + 1)) if len(table) else 0
        values = rng.normal(size=(n, *table.shape[1:]))
        if values.size and opts[0].on_nonfinite == "skip":
            values[0] = np.nan
        gradients[name] = RowGradient(rng.integers(0, max(len(table), 1), n), values)
    for opt in opts:
        opt.step(gradients)


def taken(array, source):
    """Rows of an array, zeros where the source is -1."""
    source = np.asarray(source)
    out = np.zeros((len(source), *array.shape[1:]), array.dtype)
    out[source >= 0] = array[source[source >= 0]]
    return out


def by_hand(opt, table, source, name="table"):
    """An optimizer of a copy of the new table (and of the others), with state that is padded by hand."""
    state = opt.state_dict()
    of_table = state["tables"][name]
    for key in ARRAYS:
        if of_table[key].ndim:  # not the one count of a table
            of_table[key] = taken(of_table[key], source)
    tables = {other: (table if other == name else array).copy() for other, array in opt.tables.items()}
    made = SparseAdam(tables, step_counts=opt.step_counts)
    made.load_state_dict(state)
    return made


def assert_same(opt, expected):
    """The same tables, options and state; counts may be wider in one."""
    __tracebackhide__ = True
    assert options_of(opt) == options_of(expected)
    got, right = state_bits(opt, dict(opt.tables)), state_bits(expected, dict(expected.tables))
    for key in [key for key in got if key[1] == "steps"]:
        np.testing.assert_array_equal(got.pop(key), right.pop(key), err_msg=str(key))
    assert_same_bits(got, right)


@st.composite
def sources(draw, rows):
    """From where the rows of a new table come: what people do, and anything."""
    kind = draw(st.sampled_from(["append", "prune", "reorder", "reset", "anything"]))
    if kind == "append":
        source = [*range(rows), *[-1] * draw(st.integers(0, 4))]
    elif kind == "prune":
        source = [row for row in range(rows) if draw(st.booleans())]
    elif kind == "reorder":
        source = draw(st.permutations(range(rows)))
    elif kind == "reset":
        source = [row if draw(st.booleans()) else -1 for row in range(rows)]
    else:
        source = draw(st.lists(st.integers(-1, rows - 1), max_size=2 * rows + 2))
    return np.array(source, np.int64)


@pytest.mark.jit
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
@given(data=st.data())
def test_any_rearrangement_is_that_of_padding_by_hand(step_counts, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dim, dtype = data.draw(st.sampled_from(DIMS)), data.draw(st.sampled_from(DTYPES))
    table = new_table(rng, data.draw(st.integers(0, 6)), dim, dtype)
    other = np.ones((3, 2), np.float32)
    options = data.draw(hyper_parameters())
    opt = SparseAdam({"other": other, "table": table}, step_counts=step_counts, **options)
    opt.on_nonfinite = data.draw(st.sampled_from(["raise", "skip"]))
    if data.draw(st.booleans()):  # counts that are about to be, or have been, widened
        state = opt.state_dict()
        state["tables"]["table"]["steps"][...] = 2**31 - data.draw(st.integers(1, 2))
        opt.load_state_dict(state)
    for _ in range(data.draw(st.integers(1, 3))):
        step([opt], rng, ("other", "table"))
        before = opt.state["table"].steps.dtype
        source = data.draw(sources(len(opt.tables["table"])))
        table = new_table(rng, len(source), dim, dtype)
        values = bits(table)
        expected = by_hand(opt, table, source)
        opt.rearrange(table, source, "table")
        assert opt.tables["table"] is table
        assert opt.tables["other"] is other
        assert opt.state["table"].steps.dtype == before
        np.testing.assert_array_equal(bits(table), values)
        assert_same(opt, expected)
        step([opt, expected], rng, ("table", "other"))
        assert_same(opt, expected)


def trained(step_counts="row", rows=5, dim=3, dtype=np.float32, **options):
    rng = np.random.default_rng(7)
    table = new_table(rng, rows, dim, dtype)
    opt = SparseAdam(table, step_counts=step_counts, **options)
    opt.step(RowGradient(np.arange(rows), rng.normal(size=table.shape)))
    step([opt], rng)
    return opt, table


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_rows_that_come_go_and_change_places(step_counts, dtype, dim):
    """One of each, also where kernels are interpreted."""
    opt, _ = trained(step_counts, dim=dim, dtype=dtype, on_nonfinite="skip")
    rng = np.random.default_rng(1)
    source = np.array([4, -1, 0, 4, 2, -1])
    table = new_table(rng, 6, dim, dtype)
    expected = by_hand(opt, table, source)
    opt.rearrange(table, source)
    assert_same(opt, expected)
    step([opt, expected], rng)
    assert_same(opt, expected)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_any_bits_of_state_are_copied(step_counts):
    """Infinities, NaN with its payload, -0.0 and subnormal numbers."""
    opt, table = trained(step_counts, dim=4, dtype=np.float64)
    state = opt.state_dict()
    odd = np.array([0x8000000000000000, 0x7FF8000000000123, 0x7FF0000000000000, 1], np.uint64)
    state["tables"]["table"]["exp_avg"][1] = odd.view(np.float64)
    state["tables"]["table"]["exp_avg"][3] = -0.0
    state["tables"]["table"]["exp_avg_sq"][3] = 0
    state["tables"]["table"]["steps"][...] = 0
    opt.load_state_dict(state)
    opt.rearrange(table[:2].copy(), [3, 1])
    np.testing.assert_array_equal(bits(opt.state["table"].exp_avg), [odd[[0] * 4], odd])


@pytest.mark.parametrize("dtype", ID_DTYPES)
def test_any_integers_are_a_source(dtype):
    for source in (np.array([3, 0, 3], dtype), np.array([3, 9, 0, 9, 3], dtype)[::2]):
        opt, table = trained()
        expected = by_hand(opt, table[:3], source.astype(np.int64))
        before = source.copy()
        opt.rearrange(table[:3].copy(), source)
        assert_same(opt, expected)
        np.testing.assert_array_equal(source, before)
    opt.rearrange(table[:2].copy(), [2, 0])
    opt.rearrange(table[:0].copy(), [])
    assert opt.state["table"].exp_avg.shape == (0, 3)


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_the_same_array_and_parts_of_it_may_go_on(step_counts):
    opt, table = trained(step_counts)
    order = np.array([3, 1, 4, 0, 2])
    table[:] = table[order]
    expected = by_hand(opt, table, order)
    opt.rearrange(table, order)
    assert opt.tables["table"] is table
    assert_same(opt, expected)
    rest = table[1:4]
    expected = by_hand(opt, rest, np.array([1, 2, 3]))
    opt.rearrange(rest, [1, 2, 3])
    ends = table[[0, 4]]
    for each in (opt, expected):
        step([each], np.random.default_rng(3))
    assert_same(opt, expected)
    np.testing.assert_array_equal(table[[0, 4]], ends)


def test_a_source_may_be_a_view_of_the_state():
    """Rows in the order of their counts, say: the source is read before anything changes."""
    opt, table = trained("row")
    source = opt.state["table"].steps
    expected = by_hand(opt, table, source.astype(np.int64))
    opt.rearrange(table.copy(), source)
    assert_same(opt, expected)


BAD = {
    "no array": (lambda t, s: (t.tolist(), s), TableTypeError, ["'b'", "list"]),
    "integers": (lambda t, s: (t.astype(np.int64), s), TableTypeError, ["'b'", "int64"]),
    "another dtype": (lambda t, s: (t.astype(np.float64), s), TableError, ["'b'", "float64", "float32"]),
    "another dim": (lambda t, s: (np.ones((4, 2), t.dtype), s), TableError, ["'b'", "(4, 2)", "(rows, 3)"]),
    "1-D": (lambda t, s: (np.ones(4, t.dtype), s), TableError, ["'b'", "(4,)", "(rows, 3)"]),
    "strides": (lambda t, s: (np.ones((8, 3), t.dtype)[::2], s), TableError, ["'b'", "C-contiguous"]),
    "read-only": (lambda t, s: (np.broadcast_to(t[0], t.shape), s), TableError, ["'b'", "read-only"]),
    "float source": (lambda t, s: (t, s.astype(np.float64)), StateTypeError, ["'b'", "source", "float64"]),
    "mask": (lambda t, s: (t, s >= 0), StateTypeError, ["'b'", "source", "bool", "flatnonzero"]),
    "masked source": (lambda t, s: (t, np.ma.masked_less(s, 0)), StateTypeError, ["'b'", "masked"]),
    "ragged source": (lambda t, s: (t, [[1], [1, 2], 3, 4]), StateTypeError, ["'b'", "source"]),
    "no source": (lambda t, s: (t, None), StateTypeError, ["'b'", "source", "object"]),
    "2-D source": (lambda t, s: (t, s[:, None]), StateError, ["'b'", "source", "(4, 1)", "(4,)"]),
    "short source": (lambda t, s: (t, s[:3]), StateError, ["'b'", "source", "(3,)", "(4,)"]),
    "one number": (lambda t, s: (t, 1), StateError, ["'b'", "source", "()", "(4,)"]),
    "below -1": (lambda t, s: (t, s - 5), StateError, ["'b'", "source[0]", "-5", "< 5", "-1"]),
    "beyond": (lambda t, s: (t, s + np.array([0, 0, 5, 0])), StateError, ["'b'", "source[2]", "is 5", "< 5"]),
    "beyond int64": (
        lambda t, s: (t, np.array([0, 2**64 - 1, 0, 0], np.uint64)),
        StateError,
        ["source[1]", "18446744073709551615"],
    ),
}


@pytest.mark.parametrize(("arguments", "error", "words"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_what_is_refused_changes_nothing(step_counts, arguments, error, words):
    tables = {"a": np.ones((2, 2)), "b": np.ones((5, 3), np.float32)}
    opt = SparseAdam(tables, step_counts=step_counts)
    step([opt], np.random.default_rng(0), ("a", "b"))
    given = arguments(np.ones((4, 3), np.float32), np.array([0, -1, 0, 4]))
    builtin = TypeError if error in (StateTypeError, TableTypeError) else ValueError
    with refused(error, builtin, *words, opt=opt, tables=tables):
        opt.rearrange(*given, name="b")
    assert opt.tables["b"] is tables["b"]
    step([opt], np.random.default_rng(0), ("a", "b"))


def test_which_table_must_be_known():
    tables = {"a": np.ones((2, 2)), "b": np.ones((5, 3), np.float32)}
    opt = SparseAdam(tables)
    for name in (None, "c", 3):
        with refused(TableError, ValueError, "rearrange", "'a'", "'b'", repr(name), opt=opt, tables=tables):
            opt.rearrange(np.ones((2, 2)), [0, 1], name)


def test_memory_of_another_table_is_refused():
    tables = {"a": np.ones((4, 3)), "b": np.ones((4, 3))}
    opt = SparseAdam(tables)
    with refused(TableError, ValueError, "'a'", "'b'", "share memory", opt=opt, tables=tables):
        opt.rearrange(tables["a"][:2], [0, 1], "b")


def test_a_lent_table_is_refused():
    opt, table = trained(on_nonfinite="skip")
    other = SparseAdam({"a": np.ones((2, 2)), "b": table}, on_nonfinite="skip")
    with opt.kernel_table():
        with opt.kernel_table():
            pass
        with refused(TableError, ValueError, "'table'", "kernel_table", opt=opt, tables=table):
            opt.rearrange(table.copy(), np.arange(5))
    opt.rearrange(table.copy(), np.arange(5))
    with other.kernel_table("a"):
        other.rearrange(table[:1].copy(), [0], "b")
    assert other.state["b"].exp_avg.shape == (1, 3)


@pytest.mark.gpu
def test_tables_on_a_gpu_are_refused_by_name():
    from numba import cuda

    on_gpu = cuda.to_device(np.ones((2, 2), np.float32))
    for tables, new in ((on_gpu, np.ones((2, 2), np.float32)), (np.ones((2, 2), np.float32), on_gpu)):
        opt = SparseAdam(tables)
        with refused(TableError, ValueError, "'table'", "GPU", opt=opt, tables=tables):
            opt.rearrange(new, [0, 1])


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_the_old_array_and_its_state_are_let_go(step_counts):
    opt, table = trained(step_counts, on_nonfinite="skip")
    opt.on_nonfinite = "propagate"
    step([opt], np.random.default_rng(0))
    with opt.kernel_table():
        pass
    kept = weakref.ref(table), weakref.ref(tables_of(opt)["table"])
    opt.rearrange(table.copy(), np.arange(5))
    del table
    assert [ref() for ref in kept] == [None, None]


def test_views_taken_from_the_mapping_afterwards_are_of_the_new_table():
    opt, _ = trained("row")
    state, old = opt.state, opt.state["table"].exp_avg
    values = old.copy()
    opt.rearrange(np.zeros((1, 3), np.float32), [4])
    np.testing.assert_array_equal(state["table"].exp_avg, values[4:])
    np.testing.assert_array_equal(old, values)  # still the old ones
    opt.step(RowGradient([0], np.ones((1, 3))))
    np.testing.assert_array_equal(state["table"].exp_avg, opt.state_dict()["tables"]["table"]["exp_avg"])
    assert (state["table"].exp_avg != values[4]).all()
    np.testing.assert_array_equal(old, values)
    assert "1, 3" in repr(opt)


def test_a_gradient_that_shares_memory_with_the_new_table_is_refused():
    opt, table = trained("row")
    new = table.copy()
    opt.rearrange(new, np.arange(5))
    with refused(nb_sparse_adam.errors.GradientError, ValueError, "shares memory", opt=opt, tables=new):
        opt.step(RowGradient(np.arange(5), new))
    opt.step(RowGradient(np.arange(5), table))  # the old one's is anybody's


@pytest.mark.jit
def test_state_is_allocated_once_and_rows_that_were_never_updated_cost_nothing(tmp_path):
    rows, dim = 50_000, 32
    opt = SparseAdam(np.zeros((rows, dim), np.float32), step_counts="row")
    opt.rearrange(np.zeros((1, dim), np.float32), [0])  # compiled
    opt = SparseAdam(np.zeros((rows, dim), np.float32), step_counts="row")
    table = np.zeros((rows, dim), np.float32)
    tracemalloc.start()
    try:
        opt.rearrange(table, np.random.default_rng(0).permutation(rows))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    state = rows * (2 * dim * 4 + 4)
    assert peak < state + 4 * 8 * rows
    opt = SparseAdam(table, step_counts="row", state_dir=tmp_path)
    opt.step(RowGradient([5, 40_000], np.ones((2, dim))))
    opt.rearrange(table.copy(), np.arange(rows)[::-1])
    assert opt.state["table"].exp_avg[rows - 6].all()
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir()) < state / 10


@pytest.mark.parametrize("step_counts", STEP_COUNTS)
def test_state_in_files_is_in_new_ones(step_counts, tmp_path):
    opt, table = trained(step_counts, state_dir=tmp_path / "state")
    other, _ = trained(step_counts)
    before = set((tmp_path / "state").iterdir())
    with refused(StateError, ValueError, "source[1]", opt=opt, tables=table):
        opt.rearrange(table.copy(), [0, 9, 0, 0, 0])
    assert set((tmp_path / "state").iterdir()) == before
    for _ in range(2):
        new = table[:4].copy()
        opt.rearrange(new, [0, -1, 2, 2])
        other.rearrange(new.copy(), [0, -1, 2, 2])
        after = set((tmp_path / "state").iterdir())
        assert len(after) == len(before)
        assert not after & before
        before = after
        step([opt, other], np.random.default_rng(2))
        assert_same(opt, other)
    opt.flush()


def test_a_disk_that_is_full_changes_nothing_and_leaves_no_file(tmp_path, monkeypatch):
    opt, table = trained("row", dim=17, state_dir=tmp_path)  # a file of moments, a file of counts
    before = set(tmp_path.iterdir())
    assert len(before) == 2
    real, calls = np.memmap, itertools.count()

    def full(*args, **kwargs):
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(np, "memmap", full)
        state = state_bits(opt, table)
        with pytest.raises(OSError, match="No space"):
            opt.rearrange(table.copy(), np.arange(5))
    assert set(tmp_path.iterdir()) == before
    assert_same_bits(state_bits(opt, table), state)
    opt.rearrange(table.copy(), np.arange(5))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # generators let go
def test_an_exception_between_any_two_bytecodes_leaves_the_old_state_or_the_new():
    """As a signal handler may raise it."""
    source = np.array([2, -1, 0])
    made = trained("row", dim=2, on_nonfinite="skip")[0]
    made.rearrange(made.tables["table"][:3].copy(), source)  # compiled
    for number in itertools.count():
        opt, table = trained("row", dim=2, on_nonfinite="skip")
        new = table[:3].copy()
        expected = {
            id(array): by_hand(opt, array, rows) for array, rows in ((table, range(5)), (new, source))
        }
        stopped = interrupted(lambda opt=opt, new=new: opt.rearrange(new, source), number, every=True)
        right = expected[id(opt.tables["table"])]
        assert_same(opt, right)
        step([opt, right], np.random.default_rng(0))
        assert_same(opt, right)
        if not stopped:
            break
    assert opt.tables["table"] is new
    assert number > 100


@pytest.mark.jit
def test_steps_of_other_threads_meet_the_old_table_or_the_new():
    opt, _ = trained("row", rows=8)
    stop = threading.Event()

    def train():
        rng = np.random.default_rng(0)
        while not stop.is_set():
            opt.step(RowGradient(rng.integers(0, 4, 6), rng.normal(size=(6, 3))))
            view = opt.state["table"]
            assert view.exp_avg.shape == view.shape

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        for rows in [4, 9, 5, 8] * 20:
            source = np.minimum(np.arange(rows), len(opt.tables["table"]) - 1)
            opt.rearrange(np.zeros((rows, 3), np.float32), source)
        stop.set()
        training.result()


def test_files_do_not_pile_up(tmp_path):
    """Counts of 64 bits move out of the files of 32."""
    table = np.zeros((20, 3), np.float32)
    opt = SparseAdam(table, step_counts="row", state_dir=tmp_path)
    state = opt.state_dict()
    state["tables"]["table"]["steps"] = np.full(20, 2**31 + 1)
    opt.load_state_dict(state)
    numbers = []
    for _ in range(3):
        opt.rearrange(np.zeros((20, 3), np.float32), np.arange(20))
        numbers.append(len(list(tmp_path.iterdir())))
        assert (opt.state["table"].steps == 2**31 + 1).all()
    assert len(set(numbers)) == 1
