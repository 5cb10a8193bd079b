# SPDX-License-Identifier: Apache-2.0
"""Memory of steps: records, on the host and on a GPU, and what kernels work in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.cuda.device import (
    Mark,
    Stream,
    address_of,
    empty,
    pinned,
    strided,
    synchronize,
    upload,
)

MOST = 16  # steps that are on their way, before the host waits for the first of them
LEAST_WORDS = 1 << 10


class Slot:
    """A piece of memory of the host, and one of the GPU that it is copied to.

    Attributes
    ----------
    mark : Mark or None
        Behind all that reads or writes it. None: that is not known yet.
    """

    def __init__(self, words: int) -> None:
        self.words = words
        self.on_host: NDArray[np.int64] = pinned(words, np.int64)
        self.on_device = empty(words, np.int64)
        self.address = address_of(self.on_device)
        self.mark: Mark | None = None
        self._used = 0

    def take(self, used: int) -> None:
        """Begin to write to the memory of the host."""
        self.mark, self._used = None, used

    def put(self, first: int, records: NDArray[Any]) -> int:
        """Copy records to a place, counted in words, of the memory of the host; return the next one."""
        words = np.ascontiguousarray(records).view(np.int64).reshape(-1)
        self.on_host[first : first + len(words)] = words
        return first + len(words)

    def upload(self, stream: Stream, first: int = 0, last: int | None = None) -> None:
        """Copy words to the GPU, after everything on a stream; they stay as they are until `mark`."""
        last = self._used if last is None else last
        upload(self.on_host[first:last], strided(self.on_device, first, (last - first,), (1,)), stream)


class Ring:
    """Slots in turn: none is given to a step while a launch of another one may still read it.

    What a step was refused for is not told from here: it is copied to the optimizer's own memory
    (`records.REFUSAL`).
    """

    def __init__(self) -> None:
        self._slots: list[Slot] = []  # from the one that was given first to the one that was given last

    def take(self, words: int) -> Slot:
        """Return a slot of so many words at least, whose content is anything."""
        slot = None
        if self._slots and self._is_free(self._slots[0], wait=len(self._slots) >= MOST):
            slot = self._slots.pop(0)
        if slot is None or slot.words < words:  # memory that is let go here is not in use any more
            slot = Slot(max(LEAST_WORDS, words + words // 4))
        slot.take(words)
        self._slots.append(slot)
        return slot

    @staticmethod
    def _is_free(slot: Slot, wait: bool) -> bool:
        if slot.mark is not None and slot.mark.has_passed:
            return True
        if wait:
            if slot.mark is None:  # an interrupt came before it was known
                synchronize()
            else:
                slot.mark.wait()
        return wait


class Scratch:
    """Memory that steps work in, kept from one to the next."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}

    def take(self, number: int, size: int) -> Any:
        """Return so many bytes at least, of any content; those of each number are apart."""
        kept = self._kept.get(number)
        if kept is None or not size <= kept.shape[0] <= 16 * max(size, 1 << 16):
            kept = self._kept[number] = empty(max(size + size // 4, 1), np.uint8)
        return kept
