# SPDX-License-Identifier: Apache-2.0
"""What steps on the host work in, kept from one to the next."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.addresses import address_of
from nb_sparse_adam._src.engine.intrinsics import CACHE_LINE
from nb_sparse_adam._src.engine.pacing import Paces
from nb_sparse_adam._src.engine.records import FOUND, GRADIENT, STEP, TASK
from nb_sparse_adam._src.engine.rows import SCRATCH_ROWS
from nb_sparse_adam._src.engine.scratch import DIGIT_BITS
from nb_sparse_adam._src.engine.stages import PART


class Workspace:
    """Memory that steps of one Python thread work in, kept from one to the next.

    Memory that is fresh from the system costs a page fault for every 4 kB, which takes longer than to sort
    ids in it. It is lent: whoever takes it is alone with it until it is given back, and a step that begins
    within another one, in a signal handler, makes its own.
    """

    _TOO_LARGE = 16  # times what is needed: given up

    def __init__(self) -> None:
        self.step = np.zeros(1, STEP)  # says where everything is, but for the tables
        self.words: Any = self.step.view(np.int64).data  # its fields, which NumPy takes longer to set
        self.status = np.zeros(1, np.int64)  # of steps whose status nobody asks for
        self.wide = False  # lists, and counters, are of int64
        self.address = 0  # of the bytes that were asked for
        self._bytes = np.empty(0, np.uint8)
        self._size = self._dim = 0
        self._room: tuple[int, ...] = ()

    def take(
        self, gradients: int, parts: int, tasks: int, threads: int, wide: bool, size: int, dim: int
    ) -> None:
        """Make room for so much.

        ``wide``: lists are of int64; ``size`` is in bytes, at `address`; ``dim``: elements of the longest
        row.
        """
        room = gradients, parts, tasks, threads, wide
        if room != self._room or dim > self._dim:
            self._make(dim, *room)
            self._room = room
        if not size <= self._size <= self._TOO_LARGE * max(size, 1 << 16):
            self._size = 0  # should this fail, or be interrupted, nobody takes it for what it is not
            self._bytes = np.empty(size + CACHE_LINE, np.uint8)
            self.address = -(-address_of(self._bytes) // CACHE_LINE) * CACHE_LINE
            self._size = size

    def _make(self, dim: int, gradients: int, parts: int, tasks: int, threads: int, wide: bool) -> None:
        self._room = ()  # should this fail, or be interrupted, it is made again
        self._dim, self.wide = max(dim, 64), wide
        self.gradients, self.found = np.zeros(gradients, GRADIENT), np.zeros(gradients, FOUND)
        self.parts, self.tasks = np.zeros(parts, PART), np.zeros(tasks, TASK)
        self.counters = np.empty(threads << DIGIT_BITS, np.int64 if wide else np.int32)
        stride = SCRATCH_ROWS * self._dim
        self.scratch = np.empty(threads * stride)  # large enough for either dtype
        fields = {
            "length": gradients, "parts_length": parts, "tasks_length": tasks, "last": gradients,
            "counters_length": len(self.counters), "scratch_length": len(self.scratch),
            "scratch_stride": stride,
        }  # fmt: skip
        for name in ("gradients", "found", "parts", "tasks", "counters", "scratch", "status"):
            fields[name] = address_of(getattr(self, name))
        for name, value in fields.items():
            self.step[name] = value


class _OfThread(threading.local):
    """What a Python thread keeps: a workspace, unless it is lent; paces of steps of several tables."""

    def __init__(self) -> None:
        self.workspace: Workspace | None = None
        self.paces = Paces()


of_thread = _OfThread()
