# SPDX-License-Identifier: Apache-2.0
"""What a step costs that can be counted: numbers without noise, and the limits that tests hold them to.

    python benchmarks/counts.py [FOLDER]

prints them as JSON, and the seconds that it took. It takes the first steps of a process, and reads what they
made numba compile; kernels are kept in FOLDER, where a second run finds them, or thrown away. Code is
compiled for one processor everywhere, if the one at hand can run that: the instructions of a loop are then
the same ones. Only what is public is used, so that older commits can be counted, too.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["LIMITS", "PROCESSOR"]

# Some per cent above what was counted with numba 0.59 and 0.68, on Python 3.11. Where one is exceeded, find
# out why: it is raised for something that is worth it, in the commit that does it.
LIMITS = {
    "functions compiled for rows": 113,  # 111
    "functions compiled for CSR after rows": 13,  # 11
    "instructions a square root": 43,  # 41.5, and 39.5
    "Python calls of a step of 32 rows": 53,  # 53
    "scratch bytes an id": 16.02,  # 16.006: two buffers of 8, and Python's objects
}
INSTRUCTIONS = "instructions a square root"

PROCESSOR = "x86-64-v3"  # with AVX2: of 2013 and later
ROWS, DIM = 100_000, 16


def choose_processor() -> str | None:
    """Have numba compile for `PROCESSOR`, if this one runs its code; return it, or None."""
    import llvmlite.binding

    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:
        return None
    if not all(features.get(name) for name in ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")):
        return None
    os.environ.update(NUMBA_CPU_NAME=PROCESSOR, NUMBA_CPU_FEATURES="")
    return PROCESSOR


def plain_kernel() -> Callable[..., None]:
    """Give what one would write without a library: its compile time is the unit of ours."""
    import numba
    import numpy as np

    @numba.njit(parallel=True)
    def step(table: Any, m: Any, v: Any, counts: Any, rows: Any, values: Any) -> None:
        for i in numba.prange(len(rows)):
            r = rows[i]
            counts[r] += 1
            first, second = 1 - np.float32(0.9) ** counts[r], 1 - np.float32(0.999) ** counts[r]
            for j in range(table.shape[1]):
                g = values[i, j]
                m[r, j] = np.float32(0.9) * m[r, j] + np.float32(0.1) * g
                v[r, j] = np.float32(0.999) * v[r, j] + np.float32(0.001) * g * g
                table[r, j] -= np.float32(1e-3) * (m[r, j] / first) / (np.sqrt(v[r, j] / second) + 1e-8)

    return step


def dispatchers() -> list[Any]:
    """Find all functions of the library that numba has compiled in this process."""
    import gc

    from numba.core.dispatcher import Dispatcher

    return [
        found
        for found in gc.get_objects()
        if issubclass(type(found), Dispatcher)  # isinstance would ask what a weak reference is of
        if found.overloads and found.py_func.__module__.startswith("nb_sparse_adam.")
    ]


def compiled_functions() -> int:
    """Count them, once for each combination of types."""
    return sum(len(found.overloads) for found in dispatchers())


PACKED_ROOT = re.compile(r"v?sqrtps|fsqrt\b.*\.4s")


def innermost_loops(code: str) -> Iterator[list[str]]:
    """Yield the instructions of each loop that has no other in it, of an assembler's text.

    A loop is what lies between a label and the last jump back to it.
    """
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        text = line.split("#")[0].strip().replace("\t", " ")
        if text.endswith(":"):
            labels[text[:-1]] = len(instructions)
        elif text and not text.startswith("."):
            instructions.append(text)
            jump, _, target = text.partition(" ")
            if jump[0] in "jbct" and (start := labels.get(target.split(",")[-1].strip())) is not None:
                ends[start] = len(instructions)
    for start, end in ends.items():
        if not any(start <= other and last <= end for other, last in ends.items() if other != start):
            yield instructions[start:end]


def instructions_a_root() -> float | None:
    """Return how many instructions the vectorized loops over a row have for each of their square roots.

    There is one for each vector of a row that is updated. None if no loop is vectorized.
    """
    instructions = roots = 0
    for found in dispatchers():
        if found.targetoptions.get("no_cpython_wrapper"):  # its code is in those that call it
            continue
        for types in found.overloads:
            if types in found.stats.cache_hits:  # numba keeps no text of what it finds on the disk
                continue
            if "sqrt" not in found.inspect_llvm(types):
                continue
            for loop in innermost_loops(found.inspect_asm(types)):
                in_loop = sum(bool(PACKED_ROOT.match(text)) for text in loop)
                if in_loop:
                    instructions, roots = instructions + len(loop), roots + in_loop
    return instructions / roots if roots else None


def python_calls(step: Callable[[], None]) -> int:
    """Count the functions that a warm step calls, of Python's and of C's that Python sees."""

    def once() -> int:
        seen: list[str] = []
        sys.setprofile(lambda *told: seen.append(told[1]))
        step()
        sys.setprofile(None)
        return sum(event in ("call", "c_call") for event in seen) - 1  # the end of it is a call

    return min(once() for _ in range(5))


def scratch_bytes(first_step: Callable[[int], Callable[[], None]]) -> float:
    """Return what a step asks NumPy for, for each further id; ``first_step(n)`` makes one of n ids."""

    def peak(n: int) -> int:
        step = first_step(n)
        tracemalloc.start()
        try:
            with ThreadPoolExecutor(1) as thread:  # a Python thread keeps what its steps have worked in
                thread.submit(step).result()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(ROWS)
    return (peak(ROWS) - peak(ROWS // 2)) / (ROWS - ROWS // 2)


def main() -> None:
    """Take the steps, count, and print."""
    processor = choose_processor()
    start = time.perf_counter()
    import numba
    import numpy as np

    seconds = {"importing numba": time.perf_counter() - start}
    from nb_sparse_adam import CSRGradient, RowGradient, SparseAdam

    def timed(what: str, step: Callable[..., None], *arguments: Any) -> None:
        start = time.perf_counter()
        step(*arguments)
        seconds[what] = time.perf_counter() - start

    rng = np.random.default_rng(0)
    rows, values = np.arange(0, 64, 2), rng.standard_normal((32, DIM), dtype=np.float32)
    numba.njit(parallel=True)(lambda x: x + 1)(np.ones(2))  # what numba does once
    zeros = np.zeros((64, DIM), np.float32)
    arguments = zeros, zeros.copy(), zeros.copy(), np.zeros(64, np.int32), rows, values
    for again in range(3):  # the unit of the others: one alone took 0.6 s, or 1.2
        timed(f"a plain kernel, {again}", plain_kernel(), *arguments)
    seconds["a plain kernel"] = statistics.median(
        seconds.pop(f"a plain kernel, {again}") for again in range(3)
    )

    optimizer = SparseAdam(zeros)
    gradient = RowGradient(rows, values)
    timed("rows", optimizer.step, gradient)
    numbers: dict[str, float | None] = {"functions compiled for rows": compiled_functions()}
    counted = compiled_functions()
    indptr = np.searchsorted(rows, np.arange(65))
    timed("CSR after rows", optimizer.step, CSRGradient(indptr, np.zeros(32, np.int32), values[:, 0].copy()))
    numbers["functions compiled for CSR after rows"] = compiled_functions() - counted
    numbers[INSTRUCTIONS] = instructions_a_root()
    numbers["Python calls of a step of 32 rows"] = python_calls(lambda: optimizer.step(gradient))

    ids, wide = rng.integers(0, ROWS, ROWS), np.ones((ROWS, DIM), np.float32)

    def first_step(n: int) -> Callable[[], None]:
        fresh = SparseAdam(np.zeros((ROWS, DIM), np.float32), num_threads=1)
        given = RowGradient(ids[:n], wide[:n])
        return lambda: fresh.step(given)

    numbers["scratch bytes an id"] = scratch_bytes(first_step)
    print(json.dumps({"processor": processor, "numbers": numbers, "seconds": seconds}))


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))  # whose modules are not meant to be found by name
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = sys.argv[1] if len(sys.argv) > 1 else folder
        main()
