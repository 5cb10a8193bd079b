# SPDX-License-Identifier: Apache-2.0
"""Everything that can be refused is refused, with the right class and words, and no bit has changed."""

from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from backends import CPU, CUDA, Foreign, foreign, host
from checks import STEP_COUNTS, assert_same_bits, refused, state_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam._src.engine.reader import HostReader
from nb_sparse_adam.errors import (
    GradientError,
    GradientIndexError,
    GradientTypeError,
    OptionError,
    OptionTypeError,
    TableError,
    TableTypeError,
)

ROWS, DIM = 10, 4
BUILTINS = {
    GradientError: ValueError,
    GradientIndexError: IndexError,
    GradientTypeError: TypeError,
    OptionError: ValueError,
    OptionTypeError: TypeError,
    TableError: ValueError,
    TableTypeError: TypeError,
}


def trained(step_counts="element", backend=CPU, **options):
    table = backend.table(np.linspace(-1, 1, ROWS * DIM, dtype=np.float32).reshape(ROWS, DIM))
    opt = SparseAdam(table, step_counts=step_counts, **options)
    opt.step(backend.gradient(RowGradient(np.arange(ROWS), np.ones((ROWS, DIM)))))
    return opt, table


def at(position, *bad, size=30, dtype=np.int64):
    """``size`` good ids with bad ones from ``position`` on, each one different."""
    ids = np.arange(size, dtype=dtype) % DIM
    ids[position : position + len(bad)] = bad
    return ids


def values(n=30, dim=DIM, dtype=np.float32):
    return np.ones((n, dim), dtype)


def csr(indptr=None, indices=None, data=None, stored=30):
    """A good CSR gradient with three entries a row, but for what is given."""
    indptr = np.arange(0, stored + 1, stored // ROWS) if indptr is None else np.array(indptr)
    indices = np.arange(stored) % DIM if indices is None else indices
    return CSRGradient(indptr, indices, np.ones(stored) if data is None else data)


def bags(indices=None, offsets=(0, 13, 21, 30), grad_output=None, **options):
    """A good gradient of three bags, but for what is given."""
    indices = np.arange(30) % DIM if indices is None else indices
    grad_output = values(3) if grad_output is None else grad_output
    return BagGradient(indices, np.array(offsets), grad_output, **options)


def scipy_with(container, **arrays):
    """A good 10 x 4 matrix of scipy, then spoilt where scipy does not look."""
    matrix = getattr(sparse, container)(np.ones((ROWS, DIM)))
    for name, spoil in arrays.items():
        array = getattr(matrix, name).copy()
        spoil(array)
        setattr(matrix, name, array)
    return matrix


def spoil(position, value):
    def write(array):
        array[position] = value

    return write


# name: (make the gradient, error, words of the message: what was got, and the first position)
BAD_GRADIENTS = {
    # RowGradient
    "row id too large": (lambda: RowGradient(at(13, 977, 988), values()), GradientIndexError, ["977", "13"]),
    "row id one too large": (lambda: RowGradient(at(17, ROWS), values()), GradientIndexError, ["10", "17"]),
    "row id negative": (lambda: RowGradient(at(13, -3, -77), values()), GradientIndexError, ["-3", "13"]),
    "row id that 32 bits would wrap": (
        lambda: RowGradient(at(13, 2**32 + 1), values()),
        GradientIndexError,
        ["4294967297", "13"],
    ),
    "row id that 64 bits would wrap": (
        lambda: RowGradient(at(13, 2**64 - 1, dtype=np.uint64), values()),
        GradientIndexError,
        ["18446744073709551615", "13"],
    ),
    "row id of 32 bits": (
        lambda: RowGradient(at(29, 977, dtype=np.int32), values()),
        GradientIndexError,
        ["977", "29"],
    ),
    "row id of 8 bits": (
        lambda: RowGradient(at(13, 200, dtype=np.uint8), values()),
        GradientIndexError,
        ["200", "13"],
    ),
    "float rows": (
        lambda: RowGradient(at(0).astype(np.float64), values()),
        GradientTypeError,
        ["rows", "float64"],
    ),
    "bool rows": (lambda: RowGradient(np.ones(30, bool), values()), GradientTypeError, ["rows", "bool"]),
    "object rows": (
        lambda: RowGradient(at(0).astype(object), values()),
        GradientTypeError,
        ["rows", "object"],
    ),
    "rows of two dimensions": (
        lambda: RowGradient(at(0).reshape(5, 6), values()),
        GradientError,
        ["rows", "(5, 6)"],
    ),
    "rows that are no array": (lambda: RowGradient("abc", values()), GradientTypeError, ["rows", "<U3"]),
    "fewer rows than values": (lambda: RowGradient(at(0)[:29], values()), GradientError, ["29", "30"]),
    "values too wide": (lambda: RowGradient(at(0), values(dim=5)), GradientError, ["(30, 5)", "(30, 4)"]),
    "values of one dimension": (lambda: RowGradient(at(0), np.ones(30)), GradientError, ["(30,)", "(30, 4)"]),
    "values of three dimensions": (
        lambda: RowGradient(at(0), np.ones((30, 4, 1))),
        GradientError,
        ["(30, 4, 1)"],
    ),
    "integer values": (
        lambda: RowGradient(at(0), values(dtype=np.int64)),
        GradientTypeError,
        ["values", "int64"],
    ),
    "half values": (
        lambda: RowGradient(at(0), values(dtype=np.float16)),
        GradientTypeError,
        ["values", "float16"],
    ),
    "complex values": (
        lambda: RowGradient(at(0), values(dtype=np.complex64)),
        GradientTypeError,
        ["complex64"],
    ),
    "object values": (
        lambda: RowGradient(at(0), values(dtype=object)),
        GradientTypeError,
        ["values", "object"],
    ),
    "values that are no array": (lambda: RowGradient(at(0), None), GradientTypeError, ["values", "object"]),
    # CSRGradient
    "column too large": (lambda: csr(indices=at(13, 977, 988)), GradientIndexError, ["977", "13"]),
    "column one too large": (lambda: csr(indices=at(17, DIM)), GradientIndexError, ["4", "17"]),
    "column negative": (lambda: csr(indices=at(13, -3)), GradientIndexError, ["-3", "13"]),
    "column that 32 bits would wrap": (
        lambda: csr(indices=at(13, 2**32)),
        GradientIndexError,
        ["4294967296", "13"],
    ),
    "float columns": (
        lambda: csr(indices=at(0).astype(np.float32)),
        GradientTypeError,
        ["indices", "float32"],
    ),
    "bool columns": (lambda: csr(indices=np.ones(30, bool)), GradientTypeError, ["indices", "bool"]),
    "columns of two dimensions": (
        lambda: csr(indices=at(0).reshape(5, 6)),
        GradientError,
        ["indices", "(5, 6)"],
    ),
    "indptr that starts elsewhere": (
        lambda: csr([1, *range(3, 31, 3)]),
        GradientIndexError,
        ["indptr", "1", "0"],
    ),
    "indptr that starts below": (lambda: csr([-7, *range(3, 31, 3)]), GradientIndexError, ["indptr", "-7"]),
    "indptr that decreases": (
        lambda: csr([0, 3, 6, 9, 12, 15, 26, 23, 25, 24, 30]),
        GradientIndexError,
        ["indptr", "26", "23", "7"],
    ),
    "indptr past the end": (
        lambda: csr([*range(0, 30, 3), 977]),
        GradientIndexError,
        ["indptr", "977", "30"],
    ),
    "indptr before the end": (lambda: csr([*range(0, 30, 3), 28]), GradientError, ["indptr", "28", "30"]),
    "indptr past the end and back": (
        lambda: csr([0, *[977] * 9, 30]),
        GradientIndexError,
        ["indptr", "977", "30"],
    ),
    "indptr too short": (lambda: csr(range(0, 30, 3)), GradientError, ["indptr", "10", "11"]),
    "indptr too long": (lambda: csr([*range(0, 31, 3), 30]), GradientError, ["indptr", "12", "11"]),
    "indptr empty": (lambda: csr(np.zeros(0, np.int64)), GradientError, ["indptr", "0", "11"]),
    "indptr of floats": (lambda: csr(np.arange(0.0, 31.0, 3.0)), GradientTypeError, ["indptr", "float64"]),
    "more columns than data": (lambda: csr(data=np.ones(29)), GradientError, ["29", "30"]),
    "integer data": (lambda: csr(data=np.ones(30, np.int32)), GradientTypeError, ["data", "int32"]),
    "data of two dimensions": (lambda: csr(data=np.ones((30, 1))), GradientError, ["data", "(30, 1)"]),
    # scipy
    "matrix of another width": (lambda: sparse.csr_array((ROWS, 5)), GradientError, ["(10, 5)", "(10, 4)"]),
    "matrix of another height": (lambda: sparse.csc_matrix((9, DIM)), GradientError, ["(9, 4)", "(10, 4)"]),
    "transposed matrix": (lambda: sparse.coo_matrix((DIM, ROWS)), GradientError, ["(4, 10)", "(10, 4)"]),
    "integer matrix": (
        lambda: sparse.csr_array(np.ones((ROWS, DIM), np.int64)),
        GradientTypeError,
        ["int64"],
    ),
    "complex matrix": (
        lambda: sparse.coo_array(np.ones((ROWS, DIM), np.complex128)),
        GradientTypeError,
        ["complex128"],
    ),
    "bool matrix": (lambda: sparse.csc_array(np.ones((ROWS, DIM), bool)), GradientTypeError, ["bool"]),
    "spoilt CSR column": (
        lambda: scipy_with("csr_array", indices=spoil(13, 977)),
        GradientIndexError,
        ["977", "13"],
    ),
    "spoilt CSR pointer": (
        lambda: scipy_with("csr_array", indptr=spoil(7, 977)),
        GradientIndexError,
        ["indptr", "977"],
    ),
    "spoilt CSC row": (
        lambda: scipy_with("csc_matrix", indices=spoil(13, 977)),
        GradientIndexError,
        ["977", "13"],
    ),
    "spoilt CSC pointer": (
        lambda: scipy_with("csc_array", indptr=spoil(2, 977)),
        GradientIndexError,
        ["indptr", "977"],
    ),
    "spoilt COO row": (
        lambda: scipy_with("coo_matrix", row=spoil(13, 977)),
        GradientIndexError,
        ["977", "13"],
    ),
    "spoilt COO column": (
        lambda: scipy_with("coo_matrix", col=spoil(13, -3)),
        GradientIndexError,
        ["-3", "13"],
    ),
    "DOK": (lambda: sparse.dok_array((ROWS, DIM)), GradientTypeError, ["DOK", "tocsr()"]),
    "LIL": (lambda: sparse.lil_matrix((ROWS, DIM)), GradientTypeError, ["LIL", "tocsr()"]),
    "BSR": (lambda: sparse.bsr_array((ROWS, DIM)), GradientTypeError, ["BSR", "tocsr()"]),
    "DIA": (lambda: sparse.dia_matrix((ROWS, DIM)), GradientTypeError, ["DIA", "tocsr()"]),
    # BagGradient
    "bag id too large": (lambda: bags(at(13, 977, 988)), GradientIndexError, ["977", "13"]),
    "bag id one too large": (lambda: bags(at(17, ROWS)), GradientIndexError, ["10", "17"]),
    "bag id negative": (lambda: bags(at(13, -3)), GradientIndexError, ["-3", "13"]),
    "bag id that 32 bits would wrap": (lambda: bags(at(13, 2**32)), GradientIndexError, ["4294967296", "13"]),
    "bool bag ids": (lambda: bags(np.ones(30, bool)), GradientTypeError, ["indices", "bool"]),
    "float bag ids": (lambda: bags(np.ones(30)), GradientTypeError, ["indices", "float64"]),
    "offsets of floats": (lambda: bags(offsets=[0.0, 13.0, 21.0]), GradientTypeError, ["offsets", "float64"]),
    "offsets of two dimensions": (lambda: bags(offsets=[[0, 13, 21]]), GradientError, ["offsets", "(1, 3)"]),
    "offsets that start elsewhere": (
        lambda: bags(offsets=[5, 13, 21]),
        GradientIndexError,
        ["offsets", "5", "0"],
    ),
    "offsets that start below": (
        lambda: bags(offsets=[-5, 13, 21, 30]),
        GradientIndexError,
        ["offsets", "-5", "0"],
    ),
    "offsets that decrease": (
        lambda: bags(offsets=[0, 21, 13]),
        GradientIndexError,
        ["offsets", "21", "13", "2"],
    ),
    "offsets past the end": (
        lambda: bags(offsets=[0, 13, 977]),
        GradientIndexError,
        ["offsets", "977", "30"],
    ),
    "offsets past the end and back": (
        lambda: bags(offsets=[0, 13, 977, 30]),
        GradientIndexError,
        ["offsets", "977"],
    ),
    "last offset before the end": (
        lambda: bags(offsets=[0, 13, 21, 29]),
        GradientIndexError,
        ["offsets", "29", "30"],
    ),
    "last offset past the end": (
        lambda: bags(offsets=[0, 13, 21, 31]),
        GradientIndexError,
        ["offsets", "31", "30"],
    ),
    "too few offsets": (lambda: bags(offsets=[0, 13]), GradientError, ["offsets", "2", "3", "4"]),
    "too many offsets": (
        lambda: bags(offsets=[0, 13, 21, 30, 30]),
        GradientError,
        ["offsets", "5", "3", "4"],
    ),
    "ids in no bag": (
        lambda: bags(offsets=np.zeros(0, int), grad_output=values(0)),
        GradientIndexError,
        ["30"],
    ),
    "grad_output too wide": (
        lambda: bags(grad_output=values(3, 5)),
        GradientError,
        ["grad_output", "(3, 5)", "4"],
    ),
    "grad_output of one dimension": (
        lambda: bags(grad_output=np.ones(3)),
        GradientError,
        ["grad_output", "(3,)"],
    ),
    "integer grad_output": (
        lambda: bags(grad_output=values(3, dtype=np.int8)),
        GradientTypeError,
        ["grad_output", "int8"],
    ),
    "too few weights": (lambda: bags(weights=np.ones(29)), GradientError, ["weights", "29", "30"]),
    "weights of two dimensions": (
        lambda: bags(weights=np.ones((30, 1))),
        GradientError,
        ["weights", "(30, 1)"],
    ),
    "integer weights": (lambda: bags(weights=np.ones(30, np.int64)), GradientTypeError, ["weights", "int64"]),
    # Something else altogether
    "dense array": (
        lambda: np.ones((ROWS, DIM)),
        GradientTypeError,
        ["dense array", "(10, 4)", "RowGradient(np.arange("],
    ),
    "None": (lambda: None, GradientTypeError, ["NoneType"]),
    "list": (lambda: [1.0, 2.0], GradientTypeError, ["list", "RowGradient(np.arange("]),
    "tuple": (lambda: (at(0), values()), GradientTypeError, ["tuple", "pass RowGradient(rows, values)"]),
    "something with a format": (
        lambda: SimpleNamespace(format="csr"),
        GradientTypeError,
        ["SimpleNamespace"],
    ),
    "something with a format and a shape": (
        lambda: SimpleNamespace(format="csr", shape=(ROWS, DIM)),
        GradientTypeError,
        ["SimpleNamespace", "csr", "indptr"],
    ),
    "COO without rows": (
        lambda: SimpleNamespace(format="coo", shape=(ROWS, DIM), data=np.ones(3)),
        GradientTypeError,
        ["SimpleNamespace", "coo", "row"],
    ),
    "a format of None": (
        lambda: SimpleNamespace(format=None, shape=(ROWS, DIM)),
        GradientTypeError,
        ["SimpleNamespace"],
    ),
    "masked values": (
        lambda: RowGradient(at(0), np.ma.array(values(), mask=values() > 0)),
        GradientTypeError,
        ["RowGradient.values", "masked", "filled"],
    ),
}


@pytest.mark.parametrize(("make", "error", "words"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_a_bad_gradient_is_refused_with_its_first_bad_position(make, error, words):
    for step_counts in STEP_COUNTS:
        opt, table = trained(step_counts)
        with refused(error, BUILTINS[error], *words, opt=opt, tables=table) as caught:
            opt.step(make())
        assert "988" not in str(caught.value), "not the first offending position"


@pytest.mark.parametrize(("make", "error", "words"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_propagate_does_not_turn_checks_of_ids_off(make, error, words):
    opt, table = trained(on_nonfinite="propagate")
    with refused(error, BUILTINS[error], *words, opt=opt, tables=table):
        opt.step(make())


# What a GPU is not given, or says in other words: there is more of a form on a host, and more to convert.
OTHERWISE_ON_A_GPU = {
    "row id that 64 bits would wrap": (GradientIndexError, ["RowGradient.rows[13] is -1"]),
    "object rows": None,
    "rows that are no array": (GradientTypeError, ["rows is a str in the memory of the host"]),
    "object values": None,
    "values that are no array": (GradientTypeError, ["values is a NoneType in the memory of the host"]),
    "matrix of another height": (GradientTypeError, ["CSC", "not offered on a GPU", "tocsr()"]),
    "transposed matrix": (GradientTypeError, ["COO", "not offered on a GPU", "tocsr()"]),
    "complex matrix": None,
    "bool matrix": None,
    "spoilt CSC row": None,
    "spoilt CSC pointer": None,
    "spoilt COO row": None,
    "spoilt COO column": None,
    **{name: (GradientTypeError, [name, "not offered", "tocsr()"]) for name in ("DOK", "LIL", "BSR", "DIA")},
    "dense array": (GradientTypeError, ["dense", "RowGradient with the rows 0..len(g) - 1"]),
    "COO without rows": (GradientTypeError, ["COO", "not offered on a GPU"]),
    "masked values": (GradientTypeError, ["values is a numpy.ma.MaskedArray in the memory of the host"]),
}
ON_A_GPU = [name for name in BAD_GRADIENTS if OTHERWISE_ON_A_GPU.get(name, ()) is not None]


def in_words_of_a_gpu(message):
    """What a CPU says, where a GPU takes matrices that are not scipy's, and no other forms of them."""
    from nb_sparse_adam._src.cuda.gradients import DeviceReader

    return message.replace(HostReader.forms, DeviceReader.forms).replace("scipy.sparse", "sparse")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"on_nonfinite": "propagate", "device_checks": "deferred"}], ids=["immediate", "deferred"]
)
@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_gpu_refuses_bad_gradients_in_the_same_words(name, options):
    make, error, words = BAD_GRADIENTS[name]
    opt, table = trained(backend=CUDA, **options)
    if name in OTHERWISE_ON_A_GPU:
        error, words = OTHERWISE_ON_A_GPU[name]
    with refused(error, BUILTINS[error], *words, opt=opt, tables=table) as caught:
        opt.step(CUDA.gradient(make()))
        opt.synchronize()
    if name not in OTHERWISE_ON_A_GPU:
        with pytest.raises(error) as on_cpu:
            trained()[0].step(make())
        assert str(caught.value) == in_words_of_a_gpu(str(on_cpu.value))
    opt.step(CUDA.gradient(RowGradient(at(0), values())))
    opt.synchronize()
    assert host(opt.state["table"].steps)[0, 0] == 2


def test_the_last_offset_is_refused_by_what_is_wrong_with_it(backend):
    for offsets, words in (
        ([0, 13, 21, 29], "BagGradient.offsets[3] is 29, expected len(indices) = 30"),
        ([0, 13, 21, 31], "BagGradient.offsets[3] is 31, expected at most 30"),
        ([0, 13, 21, -1], "BagGradient.offsets[3] is -1, less than BagGradient.offsets[2] = 21"),
        ([0, 21, 13, 29], "BagGradient.offsets[2] is 13, less than BagGradient.offsets[1] = 21"),
    ):
        opt, table = trained(backend=backend)
        with refused(GradientIndexError, IndexError, words, opt=opt, tables=table):
            opt.step(backend.gradient(bags(offsets=offsets)))


def test_the_helpers_above_make_good_gradients_where_nothing_is_spoilt():
    for good in (
        RowGradient(at(0), values()),
        csr(),
        bags(),
        bags(offsets=[0, 13, 21]),
        scipy_with("coo_matrix"),
    ):
        opt, table = trained()
        before = table.copy()
        opt.step(good)
        assert (table != before).any()


def test_one_bad_gradient_of_several_tables_changes_none_of_them():
    tables = {"user": np.ones((ROWS, DIM), np.float32), "item": np.ones((ROWS, DIM), np.float32)}
    opt = SparseAdam(tables, step_counts="global")
    good = RowGradient(at(0), values())
    for make, error, words in BAD_GRADIENTS.values():
        with refused(error, BUILTINS[error], *words, "item", opt=opt, tables=tables):
            opt.step({"user": good, "item": make()})


# Index arrays at random, most of them malformed: whatever is accepted is valid, and nothing crashes.

wild = st.integers(-2, 12) | st.sampled_from([2**31, 2**32, 2**63 - 1, -(2**63)])


def wild_ids(max_size=8):
    return hnp.arrays(np.int64, st.integers(0, max_size), elements=wild)


def pointers(length):
    """Pointers that are often nearly right."""
    right = hnp.arrays(np.int64, length, elements=st.integers(0, 4)).map(np.sort)
    return right | hnp.arrays(np.int64, st.integers(0, 6), elements=wild)


def accepts(make, backend=CPU):
    """Whether a step takes the gradient; if not, no bit has changed."""
    table = backend.table(np.ones((4, 3), np.float32))
    opt = SparseAdam(table)
    before = state_bits(opt, table)
    try:
        opt.step(backend.gradient(make()))
    except GradientError:
        assert_same_bits(state_bits(opt, table), before)
        return False
    return True


def points_into(pointer, entries, *, length):
    return (
        len(pointer) == length
        and pointer[0] == 0
        and pointer[-1] <= entries
        and all(a <= b for a, b in zip(pointer[:-1].tolist(), pointer[1:].tolist(), strict=True))
    )


@given(rows=wild_ids())
def test_row_ids_are_accepted_exactly_if_they_are_in_range(rows):
    valid = all(0 <= row < 4 for row in rows.tolist())
    assert accepts(lambda: RowGradient(rows, np.ones((len(rows), 3)))) == valid


@given(
    indptr=pointers(5),
    indices=wild_ids(4) | hnp.arrays(np.int64, st.integers(0, 4), elements=st.integers(0, 2)),
)
def test_csr_arrays_are_accepted_exactly_if_they_are_a_matrix(indptr, indices):
    valid = points_into(indptr, len(indices), length=5) and indptr[-1] == len(indices)
    valid = valid and all(0 <= column < 3 for column in indices.tolist())
    assert accepts(lambda: CSRGradient(indptr, indices, np.ones(len(indices)))) == valid


@given(
    offsets=pointers(3),
    indices=wild_ids(4) | hnp.arrays(np.int64, st.integers(0, 4), elements=st.integers(0, 3)),
)
def test_bags_are_accepted_exactly_if_offsets_and_ids_are_valid(offsets, indices):
    valid = points_into(offsets, len(indices), length=3) and offsets[-1] == len(indices)
    valid = valid or points_into(offsets, len(indices), length=2)
    valid = valid and all(0 <= row < 4 for row in indices.tolist())
    assert accepts(lambda: BagGradient(indices, offsets, np.ones((2, 3)))) == valid


@pytest.mark.gpu
@settings(max_examples=40)
@given(
    pointer=pointers(5),
    short=pointers(3),
    indices=wild_ids(4) | hnp.arrays(np.int64, st.integers(0, 4), elements=st.integers(0, 2)),
)
def test_a_gpu_accepts_what_a_cpu_accepts(pointer, short, indices):
    for make in (
        lambda: RowGradient(indices, np.ones((len(indices), 3))),
        lambda: CSRGradient(pointer, indices, np.ones(len(indices))),
        lambda: BagGradient(indices, short, np.ones((2, 3))),
    ):
        assert accepts(make, CUDA) == accepts(make)


# Memory that is shared.


def test_a_gradient_that_shares_memory_with_a_table_is_refused(backend):
    opt, table = trained(backend=backend)
    ids, first, columns, pointer = map(
        backend.array, (np.arange(ROWS), np.arange(3), np.arange(40) % DIM, np.arange(0, 41, 4))
    )
    whole = table.ravel()
    integers = whole.view(np.int32)
    makes = [
        lambda: RowGradient(ids, table),
        lambda: RowGradient(first, table[4:7]),
        lambda: RowGradient(integers[:2], backend.array(values(2))),
        lambda: CSRGradient(pointer, columns, whole),
        lambda: BagGradient(ids, ids, table),
        lambda: BagGradient(ids, ids, backend.array(values(ROWS)), weights=whole[:ROWS]),
    ]
    if backend is CPU:
        makes += [
            lambda: RowGradient(first, table[::-1][:3]),
            lambda: sparse.csr_array((whole, columns, pointer), shape=(ROWS, DIM)),
        ]
    for make in makes:
        with refused(GradientError, ValueError, "memory", "copy", opt=opt, tables=table):
            opt.step(make())


def test_a_gradient_that_shares_memory_with_another_table_of_the_step_is_refused(backend):
    tables = {"user": np.ones((ROWS, DIM), np.float32), "item": np.ones((ROWS, DIM), np.float32)}
    tables = backend.table(tables)
    opt = SparseAdam(tables)
    good = backend.gradient(RowGradient(at(0), values()))
    shared = RowGradient(backend.array(np.arange(ROWS)), tables["user"])
    with refused(GradientError, ValueError, "item", "memory", opt=opt, tables=tables):
        opt.step({"user": good, "item": shared})


def test_a_gradient_that_shares_memory_with_the_state_is_refused(backend):
    opt, table = trained(backend=backend)
    for moment in (opt.state["table"].exp_avg, opt.state["table"].exp_avg_sq):
        with refused(GradientError, ValueError, "memory", opt=opt, tables=table):
            opt.step(RowGradient(backend.array(np.arange(ROWS)), moment))


# Tables.


def read_only():
    table = np.ones((3, 4), np.float32)
    table.flags.writeable = False
    return table


BAD_TABLES = {
    "list": (lambda: [[1.0, 2.0]], TableTypeError, ["list"]),
    "masked": (lambda: np.ma.ones((3, 4)), TableTypeError, ["MaskedArray"]),
    "None": (lambda: None, TableTypeError, ["None"]),
    "number": (lambda: 3.0, TableTypeError, ["float"]),
    "sparse matrix": (lambda: sparse.csr_array((3, 4)), TableTypeError, ["csr_array"]),
    "integers": (lambda: np.ones((3, 4), np.int64), TableTypeError, ["int64", "float32"]),
    "half precision": (lambda: np.ones((3, 4), np.float16), TableTypeError, ["float16", "float32"]),
    "complex": (lambda: np.ones((3, 4), np.complex64), TableTypeError, ["complex64"]),
    "objects": (lambda: np.ones((3, 4), object), TableTypeError, ["object"]),
    "the other byte order": (
        lambda: np.ones((3, 4), np.dtype(np.float32).newbyteorder()),
        TableTypeError,
        ["f4"],
    ),
    "three dimensions": (lambda: np.ones((3, 4, 5)), TableError, ["(3, 4, 5)"]),
    "no dimension": (lambda: np.array(1.0), TableError, ["()"]),
    "Fortran order": (lambda: np.ones((3, 4), order="F"), TableError, ["contiguous"]),
    "every second column": (lambda: np.ones((3, 8))[:, ::2], TableError, ["contiguous"]),
    "reversed": (lambda: np.ones(8)[::-1], TableError, ["contiguous"]),
    "read-only": (read_only, TableError, ["read-only"]),
    "a mapping of nothing": (dict, TableError, ["empty"]),
    "a name that is no string": (lambda: {3: np.ones((3, 4))}, TableTypeError, ["3", "int"]),
    "a bad table of several": (
        lambda: {"user": np.ones((3, 4)), "item": np.ones((3, 4), np.int8)},
        TableTypeError,
        ["item", "int8"],
    ),
}


OF_THE_HOST = {"list", "masked", "None", "number", "sparse matrix", "objects", "the other byte order"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in BAD_TABLES if name not in OF_THE_HOST])
def test_a_table_that_cannot_be_updated_on_a_gpu_is_refused(name):
    make, error, words = BAD_TABLES[name]
    given = make()
    if isinstance(given, dict):
        given = {key: CUDA.array(array) for key, array in given.items()}
    else:
        given = foreign(given, read_only=not given.flags.writeable)
    with refused(error, BUILTINS[error], *words):
        SparseAdam(given)


@pytest.mark.parametrize(("make", "error", "words"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_table_that_cannot_be_updated_is_refused(make, error, words):
    with refused(error, BUILTINS[error], *words):
        SparseAdam(make())


def test_an_array_that_is_not_aligned_is_refused(backend):
    array = np.frombuffer(bytearray(65), np.uint8)[1:].view(np.float32).reshape(4, 4)
    assert not array.flags.aligned
    table = array
    if backend is CUDA:
        memory = foreign(np.frombuffer(bytearray(65), np.uint8)[::1])
        start, _ = memory.__cuda_array_interface__["data"]
        about = {"shape": (4, 4), "strides": None, "typestr": "<f4", "data": (start + 1, False)}
        table = Foreign(memory, memory.__cuda_array_interface__ | about)
        opt, other = trained(backend=CUDA)
        with refused(GradientError, ValueError, "values is not aligned", opt=opt, tables=other):
            opt.step(RowGradient(CUDA.array(np.arange(4)), table))
    with refused(TableError, ValueError, "aligned"):
        SparseAdam(table)


def test_one_table_under_two_names_is_refused(backend):
    table = backend.table(np.ones((6, 4)))
    for second in (table, table[2:], table.view(np.float64), table.ravel()[20:]):
        with refused(TableError, ValueError, "user", "item", "memory"):
            SparseAdam({"user": table, "item": second})
    halves = {"user": table[:3], "item": table[3:]}  # side by side is fine
    SparseAdam(halves).step(backend.gradient({"item": RowGradient(np.array([0]), np.ones((1, 4)))}))
    assert ((host(table) != 1).any(axis=1)).tolist() == [False, False, False, True, False, False]


def test_a_table_that_became_read_only_is_refused():
    opt, table = trained()
    table.flags.writeable = False
    with refused(TableError, ValueError, "read-only", opt=opt, tables=table):
        opt.step(RowGradient(at(0), values()))


# Options.

BAD_OPTIONS = {
    "lr below zero": ({"lr": -1.5}, OptionError, ["lr", "-1.5"]),
    "lr infinite": ({"lr": np.inf}, OptionError, ["lr", "inf"]),
    "lr beyond every float": ({"lr": 10**400}, OptionError, ["lr", "inf"]),
    "lr nan": ({"lr": np.nan}, OptionError, ["lr", "nan"]),
    "lr of a string": ({"lr": "0.1"}, OptionTypeError, ["lr", "str"]),
    "lr None": ({"lr": None}, OptionTypeError, ["lr", "None"]),
    "lr complex": ({"lr": 1j}, OptionTypeError, ["lr", "complex"]),
    "beta1 one": ({"betas": (1.0, 0.9)}, OptionError, ["betas", "1.0"]),
    "beta2 one": ({"betas": (0.9, 1.0)}, OptionError, ["betas", "1.0"]),
    "beta1 below zero": ({"betas": (-0.1, 0.9)}, OptionError, ["betas", "-0.1"]),
    "beta2 one in float32": ({"betas": (0.9, 1 - 1e-9)}, OptionError, ["betas", "0.999999999", "float32"]),
    "lr zero in float32": ({"lr": 1e-50}, OptionError, ["lr", "1e-50", "float32"]),
    "beta2 nan": ({"betas": (0.9, np.nan)}, OptionError, ["betas", "nan"]),
    "one beta": ({"betas": 0.9}, OptionTypeError, ["betas", "0.9", "two"]),
    "three betas": ({"betas": (0.9, 0.99, 0.999)}, OptionTypeError, ["betas", "(0.9, 0.99, 0.999)", "two"]),
    "betas of strings": ({"betas": ("0.9", "0.99")}, OptionTypeError, ["betas", "str"]),
    "eps zero": ({"eps": 0}, OptionError, ["eps", "0"]),
    "eps below zero": ({"eps": -1e-8}, OptionError, ["eps", "-1e-08"]),
    "eps nan": ({"eps": np.nan}, OptionError, ["eps", "nan"]),
    "eps infinite": ({"eps": np.inf}, OptionError, ["eps", "inf"]),
    "eps zero in float32": ({"eps": 1e-50}, OptionError, ["eps", "1e-50", "float32"]),
    "eps of a string": ({"eps": "1e-8"}, OptionTypeError, ["eps", "str"]),
    "eps_hat of a string": ({"eps_hat": "no"}, OptionTypeError, ["eps_hat", "no"]),
    "maximize of a number": ({"maximize": 0.5}, OptionTypeError, ["maximize", "0.5"]),
    "unknown on_nonfinite": ({"on_nonfinite": "ignore"}, OptionError, ["on_nonfinite", "ignore", "skip"]),
    "on_nonfinite None": ({"on_nonfinite": None}, OptionTypeError, ["on_nonfinite", "None", "skip"]),
    "no threads": ({"num_threads": 0}, OptionError, ["num_threads", "0"]),
    "threads below zero": ({"num_threads": -1}, OptionError, ["num_threads", "-1"]),
    "half a thread": ({"num_threads": 1.5}, OptionTypeError, ["num_threads", "1.5"]),
    "too many threads": ({"num_threads": 10**6}, OptionError, ["num_threads", "1000000"]),
}
AT_CONSTRUCTION = {
    "lr zero": ({"lr": 0}, OptionError, ["lr", "0"]),
    "unknown step_counts": (
        {"step_counts": "elements"},
        OptionError,
        ["step_counts", "elements", "element", "row", "global"],
    ),
    "step_counts None": ({"step_counts": None}, OptionTypeError, ["step_counts", "None"]),
}


@pytest.mark.parametrize(
    ("options", "error", "words"), (BAD_OPTIONS | AT_CONSTRUCTION).values(), ids=BAD_OPTIONS | AT_CONSTRUCTION
)
def test_an_option_out_of_its_domain_is_refused_at_construction(options, error, words):
    with refused(error, BUILTINS[error], *words):
        SparseAdam(np.ones((3, 4), np.float32), **options)


@pytest.mark.parametrize(("options", "error", "words"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_an_option_out_of_its_domain_is_refused_when_it_is_set(options, error, words, backend):
    opt, table = trained(backend=backend)
    ((name, value),) = options.items()
    with refused(error, BUILTINS[error], *words, opt=opt, tables=table):
        setattr(opt, name, value)


def test_eps_need_only_be_positive_in_the_dtype_of_every_table():
    assert SparseAdam(np.ones((3, 4)), eps=1e-50).eps == 1e-50
    with refused(OptionError, ValueError, "eps", "1e-50", "float32"):
        SparseAdam({"user": np.ones((3, 4)), "item": np.ones((3, 4), np.float32)}, eps=1e-50)


def test_step_counts_is_fixed():
    opt, _ = trained()
    with pytest.raises(AttributeError):
        opt.step_counts = "row"
    assert opt.step_counts == "element"


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="step_count"):
        SparseAdam(np.ones((3, 4)), step_count="row")
    with pytest.raises(TypeError, match="learning_rate"):
        SparseAdam(np.ones((3, 4)), learning_rate=0.1)
    with pytest.raises(TypeError):
        SparseAdam(np.ones((3, 4)), 0.1, (0.9, 0.999))  # but for lr, options are keywords
    with pytest.raises(TypeError, match="weight"):
        BagGradient(at(0), np.array([0]), values(1), weight=np.ones(30))
    opt, _ = trained()
    with pytest.raises(AttributeError, match="learning_rate"):
        opt.learning_rate = 0.1


# Names.


def test_a_step_of_an_unknown_table_is_refused(backend):
    tables = backend.table({"user": np.ones((ROWS, DIM)), "item": np.ones((ROWS, DIM))})
    opt = SparseAdam(tables)
    good = backend.gradient(RowGradient(at(0), values()))
    with refused(TableError, ValueError, "users", "user", "item", opt=opt, tables=tables):
        opt.step({"user": good, "users": good})
    with refused(TableError, ValueError, "3", "user", opt=opt, tables=tables):
        opt.step({"user": good, 3: good})
    opt, table = trained(backend=backend)
    with refused(TableError, ValueError, "user", "table", opt=opt, tables=table):
        opt.step({"user": good})


def test_a_bare_gradient_for_several_tables_is_refused(backend):
    tables = backend.table({"user": np.ones((ROWS, DIM)), "item": np.ones((ROWS, DIM))})
    opt = SparseAdam(tables)
    with refused(GradientTypeError, TypeError, "user", "item", "RowGradient", opt=opt, tables=tables):
        opt.step(backend.gradient(RowGradient(at(0), values())))


def test_state_of_an_unknown_table_is_a_key_error():
    opt, _ = trained()
    with pytest.raises(KeyError):
        opt.state["user"]
