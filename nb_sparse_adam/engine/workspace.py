"""What steps on the host work in, kept from one to the next."""

from __future__ import annotations

import threading

import numpy as np

from nb_sparse_adam.engine.addresses import address_of
from nb_sparse_adam.engine.intrinsics import CACHE_LINE
from nb_sparse_adam.engine.pacing import Paces
from nb_sparse_adam.engine.records import FOUND, GRADIENT, TASK
from nb_sparse_adam.engine.rows import SCRATCH_ROWS
from nb_sparse_adam.engine.scratch import DIGIT_BITS
from nb_sparse_adam.engine.stages import PART

__all__ = ["Workspace", "of_thread"]


class Workspace:
    """Memory that steps of one Python thread work in, kept from one to the next.

    Memory that is fresh from the system costs a page fault for every 4 kB, which takes longer than to sort
    ids in it. It is lent: whoever takes it is alone with it until it is given back, and a step that begins
    within another one, in a signal handler, makes its own.
    """

    _TOO_LARGE = 16  # times what is needed: given up

    def __init__(self) -> None:
        self.gradients, self.found = np.zeros(0, GRADIENT), np.zeros(0, FOUND)
        self.parts, self.tasks = np.zeros(0, PART), np.zeros(0, TASK)
        self.counters = np.zeros((0, 1 << DIGIT_BITS), np.int32)
        self.wide = False  # lists, and counters, are of int64
        self.status = np.zeros(1, np.int64)  # of steps whose status nobody asks for
        self.rows = np.empty((0, 0))  # scratch rows of all threads, large enough for either dtype
        self._bytes = np.empty(0, np.uint8)
        self._size = self.address = 0

    def take(
        self, gradients: int, parts: int, tasks: int, threads: int, size: int, wide: bool, dim: int
    ) -> None:
        """Make room for so much.

        ``size`` is in bytes, at `address`; ``wide``: lists are of int64; ``dim``: elements of the longest
        row.
        """
        if len(self.found) != gradients:
            self.gradients, self.found = np.zeros(gradients, GRADIENT), np.zeros(gradients, FOUND)
        if len(self.parts) != parts:
            self.parts = np.zeros(parts, PART)
        if len(self.tasks) != tasks:
            self.tasks = np.zeros(tasks, TASK)
        if len(self.counters) < threads or wide != self.wide:
            self.wide = wide
            self.counters = np.empty((threads, 1 << DIGIT_BITS), np.int64 if wide else np.int32)
        if not size <= self._size <= self._TOO_LARGE * max(size, 1 << 16):
            self._size = size + size // 8
            self._bytes = np.empty(self._size + CACHE_LINE, np.uint8)
            self.address = -(-address_of(self._bytes) // CACHE_LINE) * CACHE_LINE
        rows = self.rows
        if rows.shape[0] != threads * SCRATCH_ROWS or rows.shape[1] < dim:
            self.rows = np.empty((threads * SCRATCH_ROWS, max(dim, 64)))


class _OfThread(threading.local):
    """What a Python thread keeps: a workspace, unless it is lent; paces of steps of several tables."""

    def __init__(self) -> None:
        self.workspace: Workspace | None = None
        self.paces = Paces()


of_thread = _OfThread()
