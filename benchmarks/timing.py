"""How things are timed: contenders in turn in one process, and starts in processes of their own."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from .contenders import Contender

PAUSE = 0.02
"""Seconds of rest before each timed step. The threads of OpenMP go on spinning for some milliseconds after a
parallel loop, on the cores that the next contender needs."""

ROOT = Path(__file__).resolve().parents[1]


def alternate(contenders: Mapping[str, Contender], repeats: int) -> dict[str, list[float]]:
    """Time the contenders one after the other, `repeats` times over, all of them warm.

    Whatever else the machine does meets all of them, so that the ratio of their medians can be trusted where
    the times themselves cannot.

    Returns
    -------
    dict of str to list of float
        The seconds of each step.
    """
    for contender in contenders.values():
        contender.warm()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            contender.ready()
            time.sleep(PAUSE)
            start = time.perf_counter()
            contender.step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


_IMPORT = """
import time, numpy, numba
start = time.perf_counter()
import nb_sparse_adam
print(time.perf_counter() - start)
"""

_FIRST_STEP = """
import time, numpy as np, numba
from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
table = np.zeros((10, 4), dtype=np.float32)
gradient = {
    "rows": lambda: RowGradient(np.array([3, 5]), np.ones((2, 4), dtype=np.float32)),
    "bag": lambda: BagGradient(np.array([3, 5]), np.array([0, 2]), np.ones((1, 4), dtype=np.float32)),
    "csr": lambda: CSRGradient(np.array([0] * 4 + [1] * 7), np.array([2]), np.ones(1, dtype=np.float32)),
}[%(form)r]()
start = time.perf_counter()
SparseAdam(table, step_counts=%(step_counts)r).step(gradient)
print(time.perf_counter() - start)
"""


def _child(program: str, **env: str) -> float:
    """Run the program in a new interpreter that finds the package where this one does; return its number."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), **env}
    out = subprocess.run(
        [sys.executable, "-c", program], env=env, check=True, text=True, stdout=subprocess.PIPE, timeout=300
    )
    return float(out.stdout)


def import_seconds(repeats: int = 9) -> float:
    """Median time of ``import nb_sparse_adam`` in an interpreter that has imported numba and NumPy."""
    _child(_IMPORT)  # the first writes the bytecode
    return statistics.median(_child(_IMPORT) for _ in range(repeats))


def first_step_seconds(
    form: str = "rows", step_counts: str = "element", repeats: int = 5
) -> tuple[float, float]:
    """Time of the first step in a new interpreter: without and with kernels in the disk cache.

    The first of the pair is a single run; the second the median of `repeats`.
    """
    program = _FIRST_STEP % {"form": form, "step_counts": step_counts}
    with tempfile.TemporaryDirectory() as folder:
        uncached = _child(program, NUMBA_CACHE_DIR=folder)
        cached = statistics.median(_child(program, NUMBA_CACHE_DIR=folder) for _ in range(repeats))
    return uncached, cached
