# SPDX-License-Identifier: Apache-2.0
"""asv: how far the numbers are from the definition, computed in float64 by the oracle of the tests."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam

STEPS, ROWS, DIM, IDS = 100, 60, 8, 40


@functools.cache
def _oracle() -> ModuleType:
    """Load tests/oracle.py, which is not installed: asv runs these files in a checkout."""
    path = Path(__file__).resolve().parents[1] / "tests" / "oracle.py"
    spec = importlib.util.spec_from_file_location("oracle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def _arguments(form: str, rng: np.random.Generator) -> tuple[Any, ...]:
    """Give the arrays of a gradient; rows come several times, as often as not."""
    if form == "rows":
        return rng.integers(ROWS, size=IDS), rng.standard_normal((IDS, DIM), dtype=np.float32)
    if form == "bags":
        offsets = np.arange(IDS // 4 + 1) * 4
        return rng.integers(ROWS, size=IDS), offsets, rng.standard_normal((IDS // 4, DIM), dtype=np.float32)
    places = np.sort(rng.choice(ROWS * DIM, size=IDS, replace=False))
    indptr = np.searchsorted(places, np.arange(ROWS + 1) * DIM)
    return indptr, places % DIM, rng.standard_normal(IDS, dtype=np.float32)


def _error(got: NDArray[Any], exact: NDArray[Any], magnitude: NDArray[Any]) -> float:
    error = np.abs(got - exact) / np.where(magnitude == 0, 1, magnitude)
    return float(error.max() / np.finfo(np.float32).eps)


class Accuracy:
    """The largest relative error after 100 steps on a small table.

    Relative to the magnitudes that the oracle keeps (what a number would be if all its terms had one sign).
    Threads are no parameter: they change no bit.
    """

    unit = "float32 epsilons"
    timeout = 120
    param_names = ["form", "step_counts"]
    params = [["rows", "bags", "csr"], ["element", "row", "global"]]

    def setup(self, form: str, step_counts: str) -> None:
        options: dict[str, Any] = {"lr": 1e-2, "step_counts": step_counts}
        rng = np.random.default_rng(20260101)
        table = rng.standard_normal((ROWS, DIM), dtype=np.float32)
        oracle, optimizer = _oracle().OracleSparseAdam(table, **options), SparseAdam(table, **options)
        given = {"rows": RowGradient, "bags": BagGradient, "csr": CSRGradient}[form]
        for _ in range(STEPS):
            arguments = _arguments(form, rng)
            optimizer.step(given(*arguments))
            oracle.step(oracle.sums(form, arguments))
        self.table, self.state, self.expected = table, optimizer.state["table"], oracle.tables["table"]

    def track_param(self, form: str, step_counts: str) -> float:
        return _error(self.table, self.expected.param, self.expected.param_magnitude)

    def track_exp_avg(self, form: str, step_counts: str) -> float:
        return _error(self.state.exp_avg, self.expected.exp_avg, self.expected.exp_avg_magnitude)

    def track_exp_avg_sq(self, form: str, step_counts: str) -> float:
        return _error(self.state.exp_avg_sq, self.expected.exp_avg_sq, self.expected.exp_avg_sq)
