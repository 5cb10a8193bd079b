"""The loops that take the time are vectorized: read from the machine code, for nothing else would tell.

A loop that stops being vectorized gives the same bits, passes every other test, and takes several times as
long.
"""

import re

import numba
import numpy as np
import pytest

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam.engine import kernels, runs
from nb_sparse_adam.engine import screening as finite

pytestmark = [
    pytest.mark.jit,
    pytest.mark.skipif(bool(numba.config.BOUNDSCHECK), reason="checks keep every loop from being vectorized"),
]

ROWS, DIM = 50, 24
PACKED = {  # x86-64 and AArch64
    (np.float32, "square roots"): r"\bv?sqrtps\b|\bfsqrt\b[^\n]*\.4s",
    (np.float32, "divisions"): r"\bv?divps\b|\bfdiv\b[^\n]*\.4s",
    (np.float64, "square roots"): r"\bv?sqrtpd\b|\bfsqrt\b[^\n]*\.2d",
    (np.float64, "divisions"): r"\bv?divpd\b|\bfdiv\b[^\n]*\.2d",
}


def compiled_for(function, *arguments):
    """A kernel, compiled for these arguments and not taken from the cache."""
    compiled = numba.njit(error_model="numpy", nogil=True, _nrt=False)(function.py_func)
    compiled.compile(tuple(numba.typeof(argument) for argument in arguments))
    return compiled


def machine_code(function, *arguments):
    (code,) = compiled_for(function, *arguments).inspect_asm().values()
    return code


def intermediate_code(function, *arguments):
    """LLVM's own language, as it is when everything has been optimized."""
    (code,) = compiled_for(function, *arguments).inspect_llvm().values()
    return code


def step_arguments(monkeypatch, gradient, dtype):
    """What a step hands to its driver: the table, and the driver's other arguments."""
    prepared = []
    monkeypatch.setattr(runs, "run_all", prepared.extend)
    SparseAdam(np.zeros((ROWS, DIM), dtype), num_threads=1).step(gradient)
    return prepared[0].table, prepared[0].work.arguments


def gradients(dtype):
    values = np.ones((3, DIM), dtype)
    return {
        "rows": (kernels.rows_worker, RowGradient(np.array([1, 2, 3]), values)),
        "bags": (kernels.segments_worker, BagGradient(np.array([1, 2, 1]), np.arange(4), values)),
        "csr": (
            kernels.csr_worker,
            CSRGradient(np.arange(ROWS + 1), np.zeros(ROWS, np.int64), np.ones(ROWS, dtype)),
        ),
    }


def count(code, dtype, what):
    return len(re.findall(PACKED[dtype, what], code))


def loops_over_a_row(monkeypatch, dtype, get=machine_code):
    """Machine code of the three loops that update a row, each with what a worker knows of its table."""
    table, (_, values, scratch) = step_arguments(monkeypatch, gradients(dtype)["rows"][1], dtype)
    one, k, dim = dtype(1), np.int32(1), np.int64(DIM)
    view = kernels.view

    def update_all(table, g, dim):
        kernels.update_all(view(table), 0, g, 0, one, one, one, 0, dim)

    def update_active(table, g, dim):
        kernels.update_active(view(table), 0, g, 0, one, k, one, one, 0, dim)

    def update_active_each(table, g, scratch, dim):
        kernels.update_active_each(view(table), 0, g, 0, one, scratch, dim, 0, dim)

    return {
        "update_all": get(numba.njit(update_all), table, values, dim),
        "update_active": get(numba.njit(update_active), table, values, dim),
        "update_active_each": get(numba.njit(update_active_each), table, values, scratch, dim),
    }


@pytest.mark.parametrize("what", ["square roots", "divisions"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_each_loop_over_a_row(monkeypatch, dtype, what):
    for name, code in loops_over_a_row(monkeypatch, dtype).items():
        assert count(code, dtype, what) > 0, name


CHECK = "vector.memcheck"  # what LLVM calls the comparison of addresses before a loop


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_loop_over_a_row_compares_addresses_first(monkeypatch, dtype):
    """The compiler has been told what does not overlap."""
    for name, code in loops_over_a_row(monkeypatch, dtype, intermediate_code).items():
        assert "vector.body" in code, name
        assert CHECK not in code, name


def test_a_loop_that_compares_addresses_would_be_seen():
    def add(a, b):
        for i in range(len(a)):
            a[i] += b[i]

    assert CHECK in intermediate_code(numba.njit(add), np.ones(3), np.ones(3))


@pytest.mark.parametrize("what", ["square roots", "divisions"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", ["rows", "bags", "csr"])
def test_the_loops_once_they_are_inlined_into_a_worker(monkeypatch, form, dtype, what):
    """A loop over more arrays can stop being vectorized: the whole worker has what its parts have."""
    worker, gradient = gradients(dtype)[form]
    table, arguments = step_arguments(monkeypatch, gradient, dtype)
    loops = {name: count(code, dtype, what) for name, code in loops_over_a_row(monkeypatch, dtype).items()}
    code = machine_code(worker, table, *arguments, 0, 0, 1)
    if form == "csr":  # by elements it goes from entry to entry
        assert count(code, dtype, what) >= loops["update_all"]
        return
    copies = {"rows": 1, "bags": 2}[form]  # bags: for rows of one id, and for sums
    pieces = 3  # besides the loops: each of them over a piece, of which no loop is left
    assert count(code, dtype, what) >= copies * (sum(loops.values()) + pieces)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_the_screen_for_values_that_are_not_finite(dtype):
    code = machine_code(finite.largest_bits_worker, np.zeros(9, dtype), dtype(1), 0, 9)
    width = {np.int32: "d", np.int64: "q"}[dtype]
    assert re.search(rf"\bv?pmaxs{width}\b|\bvpcmpgt{width}\b|\bsmax\b|\bcmgt\b", code)
