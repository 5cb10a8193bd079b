# SPDX-License-Identifier: Apache-2.0
"""The loops that take the time are vectorized: read from the machine code, for nothing else would tell.

A loop that stops being vectorized gives the same bits, passes every other test, and takes several times as
long.
"""

import re

import numba
import numpy as np
import pytest
import records

from nb_sparse_adam._src.engine import screening
from nb_sparse_adam._src.engine.apply import apply_for
from nb_sparse_adam._src.engine.codecs import PLAIN
from nb_sparse_adam._src.engine.records import ELEMENT, GLOBAL, ROW
from nb_sparse_adam._src.engine.rows import updates
from nb_sparse_adam._src.engine.view import open_table

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


def step(dtype, rule):
    """A step, and the gradient and the table, which keep its memory."""
    table = records.Table(np.zeros((ROWS, DIM), dtype), rule)
    gradient = records.distinct(np.array([1, 2, 3]), np.ones((3, DIM), dtype))
    return records.step_of([table], [gradient]), gradient, table


def count(code, dtype, what):
    return len(re.findall(PACKED[dtype, what], code))


def loops_over_a_row(dtype, get=machine_code):
    """Machine code of the three loops that update a row, each with what a kernel knows of its table."""
    one, k, dim = dtype(1), np.int32(1), np.int64(DIM)
    real, int32 = np.dtype(dtype), np.dtype(np.int32)
    by_element, by_row = (open_table(real, real, int32, rule) for rule in (ELEMENT, ROW))
    loops = updates(PLAIN)
    all_of_it, active, active_each = loops.all, loops.active, loops.active_each

    def update_all(tables, g, dim):
        all_of_it(by_row(tables[0]), 0, g, 0, one, one, one, 0, dim)

    def update_active(tables, g, dim):
        active(by_element(tables[0]), 0, g, 0, one, k, one, one, 0, dim)

    def update_active_each(tables, g, scratch, dim):
        active_each(by_element(tables[0]), 0, g, 0, one, scratch, dim, 0, dim)

    tables, g, scratch = (
        step(dtype, ELEMENT)[0].arrays["tables"],
        np.ones(DIM, dtype),
        np.ones(3 * DIM, dtype),
    )
    return {
        "update_all": get(numba.njit(update_all), tables, g, dim),
        "update_active": get(numba.njit(update_active), tables, g, dim),
        "update_active_each": get(numba.njit(update_active_each), tables, g, scratch, dim),
    }


@pytest.mark.parametrize("what", ["square roots", "divisions"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_each_loop_over_a_row(dtype, what):
    for name, code in loops_over_a_row(dtype).items():
        assert count(code, dtype, what) > 0, name


CHECK = "vector.memcheck"  # what LLVM calls the comparison of addresses before a loop


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_loop_over_a_row_compares_addresses_first(dtype):
    """The compiler has been told what does not overlap."""
    for name, code in loops_over_a_row(dtype, intermediate_code).items():
        assert "vector.body" in code, name
        assert CHECK not in code, name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_loop_over_a_row_gathers(dtype):
    """What a row needs lies side by side; behind a branch the compiler would load it number by number."""
    for name, code in loops_over_a_row(dtype, intermediate_code).items():
        assert "masked.gather" not in code, name


def test_a_loop_that_compares_addresses_would_be_seen():
    def add(a, b):
        for i in range(len(a)):
            a[i] += b[i]

    assert CHECK in intermediate_code(numba.njit(add), np.ones(3), np.ones(3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", [ELEMENT, ROW, GLOBAL])
def test_the_loops_once_they_are_inlined_into_a_driver(rule, dtype):
    """A loop over more arrays can stop being vectorized: the whole driver has what its parts have."""
    alone = loops_over_a_row(dtype)
    names = ["update_active", "update_active_each"] if rule == ELEMENT else ["update_all"]
    given = step(dtype, rule)
    counts = given[2].state.counts.dtype
    zero = np.int64(0)
    work = apply_for(np.dtype(dtype), PLAIN, counts, rule).rows.work
    code = machine_code(work, zero, zero, zero, given[0].record)
    for what in ("square roots", "divisions"):
        pieces = len(names)  # besides the loops: each of them over a piece, of which no loop is left
        assert count(code, dtype, what) >= sum(count(alone[name], dtype, what) for name in names) + pieces


@pytest.mark.parametrize("width", ["d", "q"])
def test_the_screen_for_values_that_are_not_finite(width):
    code = machine_code(screening.largest_bits, *np.arange(6))
    assert re.search(rf"\bv?pmaxs{width}\b|\bvpcmpgt{width}\b|\bsmax\b|\bcmgt\b", code)
