# SPDX-License-Identifier: Apache-2.0
"""Memory that has been written to before: new memory takes as long again, a page fault for every 4 kB."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Rooms:
    """Arrays of each thread, by name; one is used until the same thread asks for it again."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def room(self, name: str, rows: int, dim: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return a (rows, dim) array, which holds anything."""
        kept = self._of_thread.__dict__
        if name not in kept or kept[name].size < rows * dim:
            kept[name] = np.empty(rows * dim * 5 // 4, dtype)
        array: NDArray[Any] = kept[name][: rows * dim].reshape(rows, dim)
        return array
