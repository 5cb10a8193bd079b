# SPDX-License-Identifier: Apache-2.0
"""One writer or many readers.

Each Python thread that reads has a lock of its own, and a writer takes all of them: a reader takes one lock
that nobody wants, as a rule, and none of the two leaves anything behind that an interrupt could keep from
being undone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from nb_sparse_adam._src.engine import locks

T = TypeVar("T")


class _Reader:
    """What a thread has to take in order to read."""

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.lock = locks.new_lock(self, "lock")


class SharedLock:
    """A lock that readers share; re-entrant for its writer, who may read as well."""

    def __init__(self) -> None:
        self.writing: Any = locks.new_lock(self, "writing", outer=True)
        self._readers: list[weakref.ref[_Reader]] = []
        self._of_thread = threading.local()
        self._is_wanted = False

    def read(self, work: Callable[[], T]) -> T:
        """Do the work while nobody writes."""
        reader = getattr(self._of_thread, "reader", None)
        if reader is None:
            reader = _Reader()
            with self.writing:
                alive = [each for each in self._readers if each() is not None]
                self._readers = [*alive, weakref.ref(reader)]
            self._of_thread.reader = reader
        if self._is_wanted:  # or many readers would let no writer in
            with self.writing:
                pass
        with reader.lock:
            return work()

    def write(self, work: Callable[[], T]) -> T:
        """Do the work while nobody else reads or writes."""
        return write_together([self], work)


def write_together(shared: Sequence[SharedLock], work: Callable[[], T]) -> T:
    """Do the work while nobody else reads or writes any of several."""
    results: list[T] = []

    def keep_readers_out() -> None:
        for each in shared:
            each._is_wanted = True
        try:
            readers = [reader() for each in shared for reader in each._readers]
            locks.hold([reader.lock for reader in readers if reader is not None], do)
        finally:
            for each in shared:
                each._is_wanted = False

    def do() -> None:
        results.append(work())

    locks.hold([each.writing for each in shared], keep_readers_out)
    return results[0]
