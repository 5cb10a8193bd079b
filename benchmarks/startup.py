"""asv: what starting costs, each time in a new interpreter."""

from __future__ import annotations

from typing import Any

FORMS = {
    "rows": "RowGradient(np.array([3, 5]), np.ones((2, 4), dtype=np.float32))",
    "bag": "BagGradient(np.array([3, 5]), np.array([0, 2]), np.ones((1, 4), dtype=np.float32))",
    "csr": "CSRGradient(np.array([0] * 4 + [1] * 7), np.array([2]), np.ones(1, dtype=np.float32))",
}

READY = """
import numpy as np
from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
table = np.zeros((10, 4), dtype=np.float32)
gradient = {gradient}
"""

NO_CACHE = """
import os, tempfile
folder = tempfile.TemporaryDirectory()
os.environ['NUMBA_CACHE_DIR'] = folder.name
"""


def _first_step(form: str, step_counts: str) -> tuple[str, str]:
    """Give what is timed, and what comes before it."""
    return (
        f"SparseAdam(table, step_counts='{step_counts}').step(gradient)",
        READY.format(gradient=FORMS[form]),
    )


class Import:
    """``import nb_sparse_adam`` after numba and NumPy have been imported."""

    number = 1
    repeat = (5, 15, 20.0)
    rounds = 1

    def timeraw_beyond_numba(self) -> tuple[str, str]:
        return "import nb_sparse_adam", "import numpy, numba"


class _FirstStep:
    number = 1
    rounds = 1
    warmup_time = 0.0
    timeout = 300
    param_names = ["form", "step_counts"]
    params: list[Any] = [list(FORMS), ["element", "row", "global"]]


class FirstStepCold(_FirstStep):
    """The first step of a process on a machine that has no compiled kernels."""

    repeat = 1
    min_run_count = 1

    def timeraw_first_step(self, form: str, step_counts: str) -> tuple[str, str]:
        timed, before = _first_step(form, step_counts)
        return timed, NO_CACHE + before


class FirstStepCached(_FirstStep):
    """The first step of a process that finds its kernels where they are kept by default."""

    repeat = 5

    def setup(self, form: str, step_counts: str) -> None:
        """Take the step here, which puts them there."""
        names: dict[str, Any] = {}
        for program in reversed(_first_step(form, step_counts)):
            exec(program, names)

    def timeraw_first_step(self, form: str, step_counts: str) -> tuple[str, str]:
        return _first_step(form, step_counts)
