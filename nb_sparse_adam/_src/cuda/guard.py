# SPDX-License-Identifier: Apache-2.0
"""Whether an optimizer has refused a step on a GPU, and what for: known there first, and told to the host."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.cuda.device import (
    Mark,
    Stream,
    address_of,
    copy_later,
    copy_to_device,
    copy_to_host,
    pinned,
    using,
)
from nb_sparse_adam._src.cuda.records import REFUSAL, STEP
from nb_sparse_adam._src.cuda.ring import Ring, Scratch
from nb_sparse_adam._src.cuda.table import DeviceTable, extent
from nb_sparse_adam._src.engine.corrections import Corrections
from nb_sparse_adam._src.engine.records import CSR
from nb_sparse_adam._src.faults import fault_error
from nb_sparse_adam._src.gradients import Names, Target

WORDS = REFUSAL.itemsize // 8


class Guard:
    """Whether an optimizer has refused a step, as its GPU knows it; and what is shared by its tables there.

    Parameters
    ----------
    ordinal : int
        The GPU.
    """

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        with using(ordinal):
            # A REFUSAL, and what the host knows of it.
            self.refusal = copy_to_device(np.zeros(WORDS, np.int64), Stream(0))
            self.seen = pinned(WORDS, np.int64)
            refused = np.zeros(1, STEP)
            refused["refused"] = 1
            self._refused = copy_to_device(refused.view(np.int64), Stream(0))
        self._tables: list[weakref.ref[DeviceTable]] = []  # they know this one
        self.targets: dict[str, Target] = {}
        self.scratch, self.ring = Scratch(), Ring()  # of the steps that begin with a table of this optimizer
        self._corrections: dict[Any, Any] = {}
        self._numbers: dict[int, int] = {}
        self._taken: tuple[list[int], list[int]] | None = None

    @property
    def refused(self) -> int:
        """Address of a STEP that has been refused: kernels do nothing."""
        return address_of(self._refused)

    @property
    def tables(self) -> list[DeviceTable]:
        """Its tables, in the order in which they were given."""
        return [table for reference in self._tables if (table := reference()) is not None]

    def add(self, table: DeviceTable) -> None:
        """Take in a table."""
        self._tables.append(weakref.ref(table))
        self.memory_changed()

    def memory_changed(self) -> None:
        """Take note that a table has other memory than before."""
        self._taken = None

    def number_of(self, table: DeviceTable) -> int:
        """Return the number of a table, from 1 on."""
        if len(self._numbers) != len(self._tables):
            self._numbers = {id(each): place + 1 for place, each in enumerate(self.tables)}
        return self._numbers[id(table)]

    def taken(self) -> tuple[list[int], list[int]]:
        """Where the memory of its tables begins, and where it ends, in order."""
        if self._taken is None:
            places = sorted(extent(array) for table in self.tables for array in table.memory if array.size)
            self._taken = [start for start, _ in places], [end for _, end in places]
        return self._taken

    def corrections(self, known: Corrections) -> Any:
        """Return a table of corrections, copied to the GPU once."""
        key = known.pairs.dtype
        if key not in self._corrections or self._corrections[key][0] is not known:
            self._corrections[key] = known, copy_to_device(known.pairs, Stream(0))
        return self._corrections[key][1]

    def marks(self) -> list[Mark]:
        """Behind what its tables were used for last."""
        return list(dict.fromkeys(table.last for table in self.tables if table.last is not None))

    def tell(self, stream: Stream) -> None:
        """Have the host told, some time later."""
        copy_later(self.refusal, self.seen, stream)

    def raise_what_is_known(self) -> None:
        """Raise what a step of some time ago was refused for, if the host knows by now."""
        if self.seen[0] != 0:
            self.raise_what_is_wrong()

    def raise_what_is_wrong(self) -> None:
        """Wait for all steps, and raise what one of them was refused for, if one was."""
        with using(self.ordinal):
            stream = Stream(0)
            for mark in self.marks():
                stream.wait_for(mark)
            refusal = copy_to_host(self.refusal, stream).view(REFUSAL)[0]
            if refusal["number"] != 0:
                self.refusal.copy_to_device(np.zeros(WORDS, np.int64), stream=stream.numba)
                stream.synchronize()
            self.seen[0] = 0
        if refusal["number"] > 0:  # else it was another optimizer's table, which reports it
            target = self.targets.get(self.tables[refusal["number"] - 1].name)
            if target is not None:
                raise fault_error(refusal, KINDS[refusal["kind"]], int(refusal["ids"]), target)


class Kind(NamedTuple):
    """A gradient as far as errors speak of it."""

    form: int
    names: Names
    kept: Any = None  # nothing is left out on a GPU, and there are no lists
    parts: Any = ()

    @property
    def entries(self) -> bool:
        """Whether it is one of entries, else of rows."""
        return self.form == CSR


KINDS: list[Kind] = []  # by their numbers, for the records that kernels keep


def number_of_kind(kind: Kind) -> int:
    """Return the number of a kind."""
    if kind not in KINDS:
        KINDS.append(kind)
    return KINDS.index(kind)
