# SPDX-License-Identifier: Apache-2.0
"""asv: the whole step of the model in examples/dlrm_cpu.py, over that with torch.optim.SparseAdam.

The three ways to train it take turns, as the example has them.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np

WAYS = ["torch.optim.SparseAdam", "drop-in", "fused"]


class WholeStep:
    """Our time over torch's: with one id a bag, as Criteo's data have it, and with ten."""

    unit = "of torch's time"
    timeout = 300
    param_names = ["way", "lookups"]
    params = [WAYS[1:], [1, 10]]

    def setup_cache(self) -> dict[int, list[float]]:
        """Measure once: median seconds of a whole step, by the number of ids in a bag."""
        try:
            example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "dlrm_cpu.py"))
        except ImportError:
            return {}
        seconds = {}
        for lookups in self.params[1]:
            _, times = example["main"](["--lookups", str(lookups), "--steps", "40"])
            seconds[lookups] = np.median(times.sum(2), 1).tolist()
        return seconds

    def setup(self, seconds: dict[int, list[float]], way: str, lookups: int) -> None:
        if not seconds:
            raise NotImplementedError("torch is not installed")

    def track_time(self, seconds: dict[int, list[float]], way: str, lookups: int) -> float:
        return seconds[lookups][WAYS.index(way)] / seconds[lookups][0]
