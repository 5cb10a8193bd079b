"""asv: peak memory of the process. Scratch memory for each id is in figures.py."""

from __future__ import annotations

from nb_sparse_adam.bench.cases import CASES
from nb_sparse_adam.bench.contenders import Ours

STEP_COUNTS = ["element", "row", "global"]


class Memory:
    """The difference of the two is what one step takes: scratch, and pages of state not written to before."""

    timeout = 300
    param_names = ["case", "step_counts", "threads"]
    params = [["rows-2Mx64", "bag-uniform", "csr-2Mx64"], STEP_COUNTS, [1, 2]]

    def setup(self, case: str, step_counts: str, threads: int) -> None:
        """Compile, on a small table, so that it is in both."""
        Ours(CASES[case].smaller(), step_counts=step_counts, threads=threads).step()

    def peakmem_ready(self, case: str, step_counts: str, threads: int) -> None:
        Ours(CASES[case], step_counts=step_counts, threads=threads)

    def peakmem_one_step(self, case: str, step_counts: str, threads: int) -> None:
        Ours(CASES[case], step_counts=step_counts, threads=threads).step()
