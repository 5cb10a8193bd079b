"""asv: what starting costs, each time in a new interpreter."""

from __future__ import annotations

from .timing import first_step_seconds


class Import:
    """``import nb_sparse_adam`` after numba and NumPy have been imported."""

    number = 1
    repeat = (5, 15, 20.0)
    rounds = 1

    def timeraw_import_beyond_numba(self) -> tuple[str, str]:
        return "import nb_sparse_adam", "import numpy, numba"


class FirstStep:
    """The first step of a process, its kernels compiled or read from the disk cache."""

    unit = "s"
    timeout = 300
    param_names = ["form", "step_counts"]
    params = [["rows", "bag", "csr"], ["element", "row", "global"]]

    def track_uncached(self, form: str, step_counts: str) -> float:
        return first_step_seconds(form, step_counts, repeats=1)[0]

    def track_cached(self, form: str, step_counts: str) -> float:
        return first_step_seconds(form, step_counts, repeats=3)[1]
