# SPDX-License-Identifier: Apache-2.0
"""The memory of an `EmbeddingTable`: its index, and its rows as a table of the engine's."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.backend import Backend
from nb_sparse_adam._src.engine.addresses import address_of
from nb_sparse_adam._src.engine.corrections import Corrections
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.layout import State
from nb_sparse_adam._src.engine.records import ELEMENT, GLOBAL, packer
from nb_sparse_adam._src.engine.state import MODES, TableState
from nb_sparse_adam._src.engine.threads import ALONE, Partition, run, usable_threads
from nb_sparse_adam._src.table import cells, memory
from nb_sparse_adam._src.table.inserting import REMOVE, SCRATCH, insert_for
from nb_sparse_adam._src.table.lookups import FIND, MARK_OFTEN, UNIT, gather_for, initial_for, pool_for
from nb_sparse_adam._src.table.records import (
    ADMITTED,
    CALL,
    COUNT,
    HEADER,
    ID,
    SEEN,
    STORE,
    TOUCHED,
    bytes_of_record,
)

MOST_ROWS = 2**31 - 2  # a cell has 32 bits, one of which says that its row is not known yet
_FIRST_ROWS = 1024  # of the engine's table; twice as many whenever these are used
_ALONE = 4096  # ids that one thread looks up before another one has started
_pack_call = packer(CALL).pack_into
_ZERO = dict.fromkeys(CALL.names or (), 0)


class RowTable(TableState):
    """The engine's table of a `Store`: its rows are records, and there come to be more of them.

    Its last row is nobody's: what a gradient has for ids that are not there goes to it, and is left out.
    """

    one_record = True

    def __init__(
        self, name: str, words: NDArray[np.int64], stride: int, dim: int, dtype: np.dtype[Any],
        step_counts: str, backend: Backend, name_of_row: Callable[[int], str], store: NDArray[np.void],
    ) -> None:  # fmt: skip
        self._store = store  # whose clock steps advance
        self._words, self._record = words, 8 * stride
        self._count_rule = MODES[step_counts]
        self._one_count = np.zeros(1, np.int64)  # of GLOBAL
        self._of_all = words.view(dtype)
        self._name_of_row = name_of_row
        super().__init__(name, self._matrix(dim, _FIRST_ROWS), step_counts, backend)
        self._go_on(_FIRST_ROWS)

    def _check_table(self, name: str, param: Any) -> Any:  # noqa: ARG002 (it is our own)
        return param

    def _matrix(self, dim: int, rows: int) -> NDArray[Any]:
        """See the parameters of so many records."""
        size = self._of_all.itemsize
        begin = self._of_all[HEADER // size :]
        return np.lib.stride_tricks.as_strided(begin, (rows, dim), (self._record, size))

    def _allocate(self) -> State:
        self.matrix = self.param
        return self._state(self.rows)

    def _state(self, rows: int) -> State:
        size, dim = self._of_all.itemsize, self.dim
        words = self._of_all[HEADER // size + dim :]
        stride, of_counts = self._record // size, self._record // 4
        if self._count_rule == GLOBAL:
            counts, of_counts = self._one_count, 0
        else:
            first = (HEADER + 3 * dim * size) // 4 if self._count_rule == ELEMENT else COUNT
            counts = self._words.view(np.int32)[first:]  # type: ignore[assignment]
        return State(words, counts, rows, dim, self._count_rule, stride, dim, of_counts)

    def room_for(self, used: int) -> None:
        """Have so many rows, and the one that is nobody's."""
        if used >= self.rows:
            most = len(self._words) * 8 // self._record
            self._go_on(min(1 << int(used).bit_length(), most))

    def _go_on(self, rows: int) -> None:
        """Show so many of the rows that are there. Nothing is copied."""
        old = self.arrays
        self.param = self.matrix = self._matrix(self.dim, rows)
        self._shape = (rows, self.dim)
        self.target = self.target._replace(rows=rows, name_of_row=self._name_of_row)
        self.note_place()
        new = self._state(rows)
        if old.counts.dtype != new.counts.dtype:  # they had been widened
            counts = np.zeros(new.shape_of_counts, old.counts.dtype)
            counts[: old.rows] = old.steps
            new = new.with_counts(counts)
        self.arrays, self.rows = new, rows

    def wide_counts(self) -> NDArray[Any]:
        """See the counts that have moved out of the records, (rows, columns); (0, 0) if they are there."""
        kept = self.arrays
        is_wide = self._count_rule != GLOBAL and kept.counts.dtype == np.int64
        return kept.steps if is_wide else np.empty((0, 0), np.int64)

    def moments_and_counts(self) -> list[NDArray[Any]]:
        """See what a step changes beside parameters, row by row, writeable."""
        kept = self.arrays
        counts = [] if self._count_rule == GLOBAL else [kept.steps]
        return [kept.exp_avg, kept.exp_avg_sq, *counts]

    @property
    def memory(self) -> tuple[NDArray[Any], ...]:
        """What no gradient may share memory with."""
        return (self._words,)

    @property
    def extent(self) -> tuple[int, int]:
        """Addresses of the first byte of the records, and of the one after the last."""
        start = address_of(self._words)
        return start, start + self._words.nbytes

    def check_writeable(self) -> None:
        """Nothing to do: nobody else has it."""

    def _in_record(self) -> tuple[int, int, int, int]:
        clock = address_of(self._store) + self._store.dtype.fields["clock"][1]  # type: ignore[index]
        return self._record, HEADER, 8 * TOUCHED, clock

    def _places(self, arrays: State, known: Corrections) -> tuple[int, ...]:
        size = self._of_all.itemsize
        param = self._of_all[HEADER // size :]
        _, _, _, _, dim, _, _, _, _, _, *others = super()._places(arrays, known)
        stride = self._record // size
        return address_of(param), param.size, stride, self.rows, dim, *self._in_record(), 1, *others


class Store:
    """An index of ids, and the rows that they have.

    Nothing here is locked or checked: `EmbeddingTable` does both.

    Parameters
    ----------
    name : str
    dim : int
    dtype : dtype
    step_counts : str
    capacity : int or None
        The most rows; None: as many as the machine has memory for.
    initializer : (int, float, float)
        `records.ZEROS` or another, with its numbers.
    seed : int
    backend : Backend
    """

    def __init__(
        self, name: str, dim: int, dtype: np.dtype[Any], step_counts: str, capacity: int | None,
        initializer: tuple[int, float, float], seed: int, backend: Any,
    ) -> None:  # fmt: skip
        self.dim, self.dtype = dim, dtype
        record = bytes_of_record(dim, dtype.itemsize, MODES[step_counts])
        self.record = record
        most = memory.physical_memory() // record if capacity is None else capacity
        self.most_rows = min(most, MOST_ROWS)
        where = f"table {name!r} of dim {dim}"
        size, folder = (max(self.most_rows, _FIRST_ROWS) + 2) * record, backend.folder
        self._folder = folder
        if folder is None:
            self._words = memory.reserve(size, where).view(np.int64)
        else:
            self._words = folder.zeros(size // 8, np.dtype(np.int64))
        segments = self.most_rows * 1000 // (cells.BEGINS * cells.LAYER_CELLS) + 2
        self._cells = memory.reserve(8 * cells.LAYER_WORDS * (segments * 7 // 5 + 1), where).view(np.int64)
        self._free = memory.reserve(8 * (self.most_rows + 1), where).view(np.int64)
        self.index = np.zeros(1, cells.INDEX)
        salts = np.frombuffer(os.urandom(24), np.int64)
        for field, value in zip(("salt", "first_factor", "second_factor"), salts, strict=True):
            self.index[field] = value | 1
        self.index["cells"], self.index["cells_length"] = address_of(self._cells), self._cells.size
        self.index["segments"] = self.index["following"] = 1
        self.index["most"] = self.most_rows
        self.store = np.zeros(1, STORE)
        kind, first, second = initializer
        fields = {
            "rows": address_of(self._words), "rows_length": self._words.size, "stride": record // 8,
            "dim": dim, "free": address_of(self._free), "initializer": kind, "seed": seed, "first": first,
            "second": second,
        }  # fmt: skip
        for field, number in fields.items():
            self.store[field] = number
        self._scratch = np.empty(0, np.int64)
        self._remembered: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self.captures: list[weakref.ref[Any]] = []  # weak: none outlives its save, whatever interrupts
        refuse_row = weakref.WeakMethod(self.name_of_row)

        def name_of_row(row: int) -> str:
            found = refuse_row()
            return f"row {row}" if found is None else found(row)

        self.table = RowTable(
            name, self._words, record // 8, dim, dtype, step_counts, backend, name_of_row, self.store
        )

    def name_of_row(self, row: int) -> str:
        """Say which id a row is of, in a message."""
        return f"id {self.header(ID)[row]}" if row < self.used else "ids without a row"

    def check_process(self) -> None:
        """Refuse to change rows in a file that the process that this one was forked from has mapped."""
        if self._folder is not None:
            self._folder.check_process()

    # --- what is there ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self.index["ids"][0])

    @property
    def used(self) -> int:
        """Records from here on have never been anybody's."""
        return int(self.store["used"][0])

    @property
    def room(self) -> int:
        """How many more rows there may be."""
        return self.most_rows - len(self)

    @property
    def clock(self) -> int:
        """The time that rows are touched at now; see `ages.Ages`."""
        return int(self.store["clock"][0])

    @clock.setter
    def clock(self, time: int) -> None:
        self.store["clock"] = time

    @property
    def steps(self) -> int:
        """Steps so far."""
        return int(self.table.totals[0])

    def header(self, word: int) -> NDArray[np.int64]:
        """See a word of the headers of all rows that are used: `records.ID`, TOUCHED or ADMITTED."""
        return self._words[word : word + self.used * self.record // 8 : self.record // 8]

    @property
    def records(self) -> NDArray[np.int64]:
        """See the records that are used, (rows, words)."""
        words = self.record // 8
        return self._words[: self.used * words].reshape(self.used, words)

    @property
    def free(self) -> NDArray[np.int64]:
        """See which of the records that are used are nobody's."""
        return self._free[: int(self.store["free_length"][0])]

    @property
    def seen(self) -> NDArray[np.uint32]:
        """See how often the ids of rows were seen."""
        halves = self._words.view(np.uint32)
        return halves[SEEN : SEEN + self.used * self.record // 4 : self.record // 4]

    @property
    def live(self) -> NDArray[np.int64]:
        """Rows that are somebody's, in the order in which their ids came."""
        admitted = self.header(ADMITTED)
        rows = np.flatnonzero(admitted)
        return rows if not self.has_gaps else rows[np.argsort(admitted[rows], kind="stable")]

    @property
    def has_gaps(self) -> bool:
        """Whether rows may have come in another order than that of their records."""
        return len(self) != int(self.store["admitted"][0]) or self.used != len(self)

    @property
    def bytes_of_index(self) -> int:
        """How much of the index has been written to."""
        segments, following, left = (int(self.index[name][0]) for name in ("segments", "following", "left"))
        not_yet = max(following * left // segments - segments, 0)  # between what was there and what is filled
        return (following - not_yet) * cells.LAYER_WORDS * 8

    # --- calls --------------------------------------------------------------------------------------------

    def _run(self, drivers: Drivers, n: int, threads: int | None, **fields: Any) -> Any:
        """Do a job of so many ids; arrays are passed by their addresses. Return the record of the call."""
        partition = ALONE
        if n > _ALONE:
            usable = usable_threads(threads)
            partition = Partition(usable, usable)
        call: Any = np.zeros(1, CALL)
        values = {**_ZERO, "length": n, "threads": partition.threads}
        for field, value in fields.items():
            if isinstance(value, np.ndarray):
                values[field] = address_of(value)
                if field + "_length" in values:
                    values[field + "_length"] = value.size
            else:
                values[field] = value
        _pack_call(call, 0, *values.values())
        with np.errstate(over="ignore"):  # without the JIT, hashes overflow on NumPy's scalars
            run(drivers, partition, (self.index, self.store, call))
        return call[0]

    def find(self, ids: NDArray[np.int64], threads: int | None) -> tuple[NDArray[np.int64], int]:
        """Return the rows of ids, negative where they have none, and how many have none."""
        n = len(ids)
        rows, later = np.empty(n, np.int64), np.empty(n, np.int64)
        counts = np.empty(-(-n // UNIT), np.int64)
        call = self._run(FIND, n, threads, ids=ids, rows=rows, later=later, counts=counts)
        return rows, int(call["missing"])

    def find_again(self, ids: NDArray[np.int64], threads: int | None) -> tuple[NDArray[np.int64], int]:
        """Do what `find` does; at once, if these are the ids that `remember` was given."""
        known = self._remembered
        if known is not None and len(known[0]) == len(ids) and np.array_equal(known[0], ids):
            return known[1], 0
        return self.find(ids, threads)

    def remember(self, ids: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Keep the rows of ids until one is taken out: those that are looked up are updated next."""
        self._remembered = ids.copy(), rows

    def keep_aside(self, rows: NDArray[np.int64]) -> None:
        """Have captures keep what rows hold, before it is changed; negative numbers are those of no row."""
        for reference in self.captures.copy():
            capture = reference()
            if capture is None or not capture.is_of_this_process:
                self.forget(reference)
            else:
                capture.keep(rows)

    def forget(self, capture: weakref.ref[Any]) -> None:
        """Keep nothing aside for a capture any more."""
        with suppress(ValueError):  # it has been forgotten
            self.captures.remove(capture)

    def mark(self, rows: NDArray[np.int64], times: NDArray[np.int64], threads: int | None) -> None:
        """Count that rows were seen, each so many times; what is negative is no row."""
        self._run(MARK_OFTEN, len(rows), threads, rows=rows, counts=times)

    def insert(
        self, ids: NDArray[np.int64], values: NDArray[Any] | None, threads: int | None
    ) -> NDArray[np.int64]:
        """Give rows to ids that have none, and return them; ids may repeat, and there is room for all.

        ``values`` are the initial values of GIVEN, a row for each id.
        """
        n = len(ids)
        rows = np.empty(n, np.int64)
        self._scratch = scratch = self._scratch if len(self._scratch) else np.empty(SCRATCH, np.int64)
        others = np.empty(0, self.dtype) if values is None else values
        self._run(insert_for(self.dtype), n, threads, ids=ids, rows=rows, others=others, scratch=scratch)
        return rows

    def set_rows(self, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Give rows values; their moments and counts are those of rows that took no step."""
        table = self.table
        for array in table.moments_and_counts():
            array[rows] = 0
        table.param[rows] = values
        self.header(TOUCHED)[rows] = self.clock

    def remove(self, ids: NDArray[np.int64]) -> None:
        """Take ids out, each of which has a row."""
        self._remembered = None
        counts = self.table.wide_counts()
        self._run(REMOVE, len(ids), 1, ids=ids, wide=counts, columns=counts.shape[1])

    def initial(self, ids: NDArray[np.int64], threads: int | None) -> NDArray[Any]:
        """Return the initial values of ids."""
        others = np.empty((len(ids), self.dim), self.dtype)
        self._run(initial_for(self.dtype), len(ids), threads, ids=ids, others=others)
        return others

    def gather(
        self, rows: NDArray[np.int64], others: NDArray[Any], trains: bool, threads: int | None,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:  # fmt: skip
        """Copy the vectors of rows; of -1 - k, that of the k-th of ``others``, or zeros if it is empty."""
        if out is None:
            out = np.empty((len(rows), self.dim), self.dtype)
        self._run(
            gather_for(self.dtype), len(rows), threads, rows=rows, others=others, out=out, trains=trains
        )
        return out

    def pool(
        self, rows: NDArray[np.int64], others: NDArray[Any], trains: bool, threads: int | None,
        offsets: NDArray[np.int64], weights: NDArray[Any] | None, mean: bool,
    ) -> NDArray[Any]:  # fmt: skip
        """Sum the vectors of bags of rows; ``offsets`` has one more than there are bags."""
        out = np.empty((len(offsets) - 1, self.dim), self.dtype)
        self._run(
            pool_for(self.dtype), len(rows), threads, rows=rows, others=others, out=out, trains=trains,
            offsets=offsets, weights=0 if weights is None else weights, mean=mean,
        )  # fmt: skip
        return out
