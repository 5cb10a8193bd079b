# SPDX-License-Identifier: Apache-2.0
"""The backend of tables in the memory of the host: two native calls a step, whatever is in it.

All gradients of a step are prepared by one call, and applied by one for each combination of dtypes and count
rule that occurs. Small tables are taken as a whole by one thread, large ones are cut into parts: threads
take what is next, in turn.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.backend import Request
from nb_sparse_adam._src.engine.addresses import Memory, address_of
from nb_sparse_adam._src.engine.audit import audit_for
from nb_sparse_adam._src.engine.driver import Drivers
from nb_sparse_adam._src.engine.intrinsics import CACHE_LINE
from nb_sparse_adam._src.engine.mapped import StateFolder
from nb_sparse_adam._src.engine.pacing import Pace
from nb_sparse_adam._src.engine.prepare import PREPARE, PREPARE_WIDE
from nb_sparse_adam._src.engine.reader import HostReader
from nb_sparse_adam._src.engine.records import (
    CHANGED,
    CSR,
    GRADIENT,
    POLICIES,
    RAISE,
    STEP,
    TASK,
    joined,
    packer,
)
from nb_sparse_adam._src.engine.scratch import bytes_needed, is_wide
from nb_sparse_adam._src.engine.state import Described, TableState
from nb_sparse_adam._src.engine.threads import Partition, run, usable_threads
from nb_sparse_adam._src.engine.workspace import Workspace, of_thread
from nb_sparse_adam._src.faults import fault_error, shares_memory
from nb_sparse_adam._src.gradients import Given, read
from nb_sparse_adam._src.joining import read_several
from nb_sparse_adam._src.options import Options
from nb_sparse_adam._src.stepping import finish
from nb_sparse_adam.errors import GradientError

_pack_gradient: Any = packer(GRADIENT).pack_into
_TABLES = (STEP.names or ()).index("tables")
TASKS_A_PART = 4  # a thread that another program has held up leaves the rest to the others
MARGIN = 2  # a table that is more than this fraction of a thread's share is cut into parts
SEVERAL = -1  # in the place of a form: what is paced is steps of several tables


class HostBackend:
    """Tables of one optimizer in the memory of the host.

    Parameters
    ----------
    folder : StateFolder or None
        Where state is mapped from files.
    """

    kind = "host"
    has_streams, has_refused = False, False

    def __init__(self, folder: StateFolder | None) -> None:
        self.folder = folder
        self.zeros: Callable[[int, Any], NDArray[Any]] = _zeros if folder is None else folder.zeros
        self.reader = HostReader(self)
        self.memory = Memory(())  # what no gradient may share memory with
        self._changes = 1  # of the tables' memory
        self._seen = 0  # so many of them are in `memory`

    def new_table(self, name: str, array: Any, step_counts: str) -> TableState:
        """Take in a table."""
        return TableState(name, array, step_counts, self)

    def memory_changed(self, gone: bool = False) -> None:
        """Take note that a table has other memory than before; ``gone``: let go what it had."""
        self._changes += 1
        if gone:
            self.memory = Memory(())

    def before_step(self, options: Options, tables: Mapping[str, TableState]) -> None:  # noqa: ARG002
        """Refuse to go on in a child whose state is the parent's; look again where the tables are."""
        if self.folder is not None:
            self.folder.check_process()
        changes = self._changes
        if self._seen != changes:
            here = [table for table in tables.values() if table.backend.kind == self.kind]
            self.memory = Memory(array for table in here for array in table.memory)
            self._seen = changes  # last: what interrupts has it looked at again

    def step_alone(self, work: Callable[[], None]) -> None:
        """Do the work: steps lend what they work in, and one within another has its own."""
        work()

    def synchronize(self) -> None:
        """Do nothing: a step is done when it returns."""

    def prepare(self, requests: Sequence[Request], waits: bool) -> Sequence[HostRun]:  # noqa: ARG002
        """Make a step ready up to the first write."""
        start = time.perf_counter()
        read = [(request, _read(request)) for request in requests]
        return _prepare([_entry(at, *each) for at, each in enumerate(read)], start)

    def step(self, request: Request) -> None:
        """Do a step of one table by one native call, which no interrupt can cut in two."""
        start = time.perf_counter()
        table, options = request.table, request.options
        given = _read(request)
        size = _size_of(given, table)
        partition, pace = table.paces.partition_for(given.form, size, options.num_threads)
        if not _step_one(table, options, given, partition):
            finish(_prepare([_entry(0, request, given)], start))
        elif pace is not None:
            pace.took((time.perf_counter() - start) / size)


def _zeros(length: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that begin at a cache line, so that a row touches no more lines than it must.

    NumPy begins 16 bytes after one: of a table of dim 16, whose rows are as long as a line, every row would
    lie on two.
    """
    size = length * dtype.itemsize
    memory = np.zeros(size + CACHE_LINE, np.uint8)
    start = -address_of(memory) % CACHE_LINE
    return memory[start : start + size].view(dtype)


# --- a step -----------------------------------------------------------------------------------------------


def _read(request: Request) -> Given:
    request.table.check_writeable()
    gradient, target = request.gradient, request.table.target
    # Here, for a call is felt in a small step. What derives from lists may do anything when it is read.
    return read_several(gradient, target) if type(gradient) in (list, tuple) else read(gradient, target)


class _Entry(NamedTuple):
    """A request whose gradient has been read."""

    table: TableState
    options: Options
    given: Given
    n: int  # ids
    size: int  # elements that it touches, or reads to sum duplicates
    at: int  # its place among the requests
    described: Described  # the table
    drivers: Drivers  # what applies it


def _entry(at: int, request: Request, given: Given) -> _Entry:
    table, n = request.table, given.ids.shape[0]
    table.make_room_for_a_step()
    described = table.described(request.options)
    drivers = described.appliers[given.entries]
    return _Entry(table, request.options, given, n, _size_of(given, table), at, described, drivers)


def _size_of(given: Given, table: TableState) -> int:
    """How many elements a gradient touches, or reads to sum duplicates."""
    # A stored entry costs more than an element of a row: it is alone in memory.
    return given.ids.shape[0] * (4 if given.form >= CSR else table.dim)  # type: ignore[no-any-return]


def _pack(
    workspace: Workspace, at: int, table: TableState, options: Options, given: Given, cut: tuple[int, ...]
) -> None:
    """Write the record of the at-th gradient; ``cut`` is its last fields, from ``parts`` on."""
    ids, values, offsets, weights, columns = (
        given.ids, given.values, given.offsets, given.weights, given.columns,
    )  # fmt: skip
    rows, size = values.shape[0], values.itemsize
    entries = given.form >= CSR
    # How far the next row would be from a single one NumPy does not care.
    stride = values.strides[0] // size if rows > 1 else table.dim
    _pack_gradient(
        workspace.gradients, at * GRADIENT.itemsize,
        given.form, POLICIES[options.on_nonfinite], address_of(ids), ids.shape[0], ids.itemsize,
        0 if columns is None else address_of(columns), 0 if columns is None else columns.itemsize,
        0 if offsets is None else address_of(offsets),
        0 if offsets is None else offsets.shape[0], 0 if offsets is None else offsets.itemsize,
        address_of(values), rows, stride, 1 if entries else table.dim, size,
        0 if weights is None else address_of(weights), given.mean, *cut,
    )  # fmt: skip


def _step_one(table: TableState, options: Options, given: Given, partition: Partition) -> bool:
    """Do a step of one table by one native call; return whether it was done.

    If not, nothing has been written, for a fault or because a sum might overflow.
    """
    parts = partition.parts
    table.make_room_for_a_step()
    kept = of_thread
    work, kept.workspace = kept.workspace, None
    if work is None:
        work = Workspace()
    try:
        n, values = given.ids.shape[0], given.values
        wide = is_wide(n, table.rows, values.shape[0])
        size = bytes_needed(
            given.form, n, table.rows, table.dim, values.shape[0], values.itemsize, parts, given.mean,
            given.weights is not None, wide,
        )  # fmt: skip
        tasks = 1 if parts == 1 else parts * TASKS_A_PART
        work.take(1, parts, tasks, parts, wide, size, table.dim)
        _pack(work, 0, table, options, given, (parts, 0, 0, tasks, work.address))
        described = table.described(options)
        work.words[_TABLES] = described.address
        prepare = PREPARE_WIDE if wide else PREPARE
        return bool(run(prepare, partition, work.step, described.appliers[given.entries]) == -1)
    finally:
        kept.workspace = work


class _Program:
    """A step of the host: its records, and what they lie in.

    Parameters
    ----------
    entries : sequence of _Entry
        Variants one after the other, and in each the largest table first: the last one keeps no thread
        waiting for long.
    size : int
        Of all of them.
    partition : Partition
    pace : Pace or None
        To be told how long it took.
    """

    __slots__ = (
        "entries",
        "first_tasks",
        "left",
        "pace",
        "partition",
        "seconds",
        "size",
        "tables",
        "workspace",
    )

    def __init__(self, entries: Sequence[_Entry], size: int, partition: Partition, pace: Pace | None) -> None:
        self.entries, self.size, self.partition, self.pace = entries, size, partition, pace
        self.seconds, self.left = 0.0, 0
        threads = partition.parts
        kept = of_thread
        workspace, kept.workspace = kept.workspace, None
        self.workspace = workspace = Workspace() if workspace is None else workspace
        wide, dim = False, 0
        for entry in entries:
            dim = max(dim, entry.table.dim)
            wide |= is_wide(entry.n, entry.table.rows, entry.given.values.shape[0])
        first_part = place = 0
        self.first_tasks, cuts = [0], []
        for entry in entries:
            parts = threads if threads > 1 and entry.size * threads * MARGIN > size else 1
            given, table = entry.given, entry.table
            cuts.append((parts, first_part, place))
            self.first_tasks.append(self.first_tasks[-1] + (1 if parts == 1 else parts * TASKS_A_PART))
            first_part += parts
            place += bytes_needed(
                given.form, entry.n, table.rows, table.dim, given.values.shape[0], given.values.itemsize,
                parts, given.mean, given.weights is not None, wide,
            )  # fmt: skip
        workspace.take(len(entries), first_part, self.first_tasks[-1], threads, wide, place, dim)
        for at, (parts, part, offset) in enumerate(cuts):
            entry, (first, last) = entries[at], self.first_tasks[at : at + 2]
            _pack(
                workspace, at, entry.table, entry.options, entry.given,
                (parts, part, first, last - first, workspace.address + offset),
            )  # fmt: skip
        self.tables = joined([entry.described.record for entry in entries])
        workspace.words[_TABLES] = address_of(self.tables)

    def prepare(self) -> None:
        """Look at all gradients, and refuse the step or make it ready."""
        work = self.workspace
        outcome = run(PREPARE_WIDE if work.wide else PREPARE, self.partition, work.step)
        if outcome == -3:
            self._audit()
        elif outcome == -2:
            raise self._fault()

    def _fault(self) -> GradientError:
        """Make an error of the first fault: of what names places, before numbers that are not finite."""
        found = self.workspace.found
        places = np.flatnonzero(found["fault"]).tolist()
        at = min(places, key=lambda at: (found[at]["fault"] > CHANGED, self.entries[at].at))
        entry = self.entries[at]
        return fault_error(found[at], entry.given, entry.n, entry.table.target)

    def _audit(self) -> None:
        """Look at sums that might overflow, one after the other."""
        found, gradients = self.workspace.found, self.workspace.gradients
        for at, entry in enumerate(self.entries):
            if found[at]["suspicious"] and gradients[at]["on_nonfinite"] == RAISE:
                row = np.empty(max(entry.table.dim, 1), entry.table.dtype)
                audit_for(entry.table.dtype)(self.tables, gradients, found, at, row)
        if found["fault"].any():
            raise self._fault()

    def runs(self) -> list[HostRun]:
        """Cut the step into runs, each for one combination of dtypes and count rule."""
        entries = self.entries
        last = len(entries)
        if last == 1:
            self.left = 1
            return [HostRun(self, 0, 1)]
        self.left = last
        if not _are_apart(entries):  # optimizers with tables that overlap: one table after the other
            return [HostRun(self, at, at + 1) for at in sorted(range(last), key=lambda at: entries[at].at)]
        kinds = [entry.drivers for entry in entries]
        bounds = [at for at in range(1, last) if kinds[at] is not kinds[at - 1]]
        self.left = len(bounds) + 1
        return [HostRun(self, *pair) for pair in itertools.pairwise([0, *bounds, last])]

    def close(self) -> None:
        """Give back the memory when all runs are done, and tell how long it took."""
        self.left -= 1
        if self.left <= 0:
            of_thread.workspace = self.workspace
            if self.pace is not None:
                self.pace.took(self.seconds / self.size)


def _prepare(entries: list[_Entry], start: float) -> Sequence[HostRun]:
    """Prepare a step, whose gradients were read from ``start`` on."""
    if len(entries) == 1:
        entry = entries[0]
        size, paces, kind = entry.size, entry.table.paces, entry.given.form
        num_threads = entry.options.num_threads
    else:
        size, paces, kind = sum(entry.size for entry in entries), of_thread.paces, SEVERAL
        wanted = {entry.options.num_threads for entry in entries}
        num_threads = wanted.pop() if len(wanted) == 1 else min(map(usable_threads, wanted))
        entries.sort(key=lambda entry: (id(entry.drivers), -entry.size))
        _refuse_tables_of_others(entries)
    partition, pace = paces.partition_for(kind, size, num_threads)
    program = _Program(entries, size, partition, pace)
    try:
        program.prepare()
    except BaseException:
        program.pace = None
        program.close()
        raise
    program.seconds = time.perf_counter() - start
    return program.runs()


def _refuse_tables_of_others(entries: Sequence[_Entry]) -> None:
    """Refuse gradients that share memory with tables of other optimizers in the step, as with their own."""
    backends: dict[Any, None] = dict.fromkeys(entry.table.backend for entry in entries)
    memories = [backend.memory for backend in backends]
    if len(memories) == 1:
        return  # `HostReader` has asked it
    if _are_apart(entries):
        memories = [Memory(array for memory in memories for array in memory.arrays())]
    for entry in entries:
        given = entry.given
        arrays = given.ids, given.values, given.offsets, given.weights, given.columns
        for what, array in zip(given.names, arrays, strict=False):
            if array is not None and any(memory.overlaps(array) for memory in memories):
                raise shares_memory(what, entry.table.target)


def _are_apart(entries: Sequence[_Entry]) -> bool:
    """Whether no two tables share memory: threads would meet there."""
    if all(entry.table.backend is entries[0].table.backend for entry in entries):
        return True  # of one optimizer, which has refused those
    places = sorted(entry.table.extent for entry in entries if entry.table.matrix.size)
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


class HostRun:
    """The part of a step that one native call applies: tables ``first:last`` of it, each wholly."""

    __slots__ = ("_first", "_last", "_program", "_status", "_step")

    def __init__(self, program: _Program, first: int, last: int) -> None:
        self._program, self._first, self._last = program, first, last
        self._status = np.zeros(1, np.int64)  # set by the call, as its last act
        self._step = self._record(last, self._status)  # now: nothing is allocated after the first write

    @property
    def tables(self) -> int:
        """How many tables it updates."""
        return self._last - self._first

    @property
    def done(self) -> bool:
        """Whether the call has been made: all of it, or nothing."""
        return self._status[0] != 0  # type: ignore[no-any-return]

    may_have_run = done

    def _record(self, last: int, status: NDArray[np.int64]) -> NDArray[np.void]:
        """Make the record of a step that applies its tables up to ``last``."""
        program, first = self._program, self._first
        step, (begin, end) = program.workspace.step.copy(), (program.first_tasks[at] for at in (first, last))
        step["first"], step["last"], step["status"] = first, last, address_of(status)
        step["tasks"] += begin * TASK.itemsize
        step["tasks_length"] = end - begin
        return step

    def _run(self, step: NDArray[np.void]) -> None:
        run(self._program.entries[self._first].drivers, self._program.partition, step)

    def rehearse(self) -> None:
        """Have the kernel compiled, by calling it for no table."""
        program = self._program
        key = program.entries[self._first].drivers, program.partition.parts > 1
        if key not in _rehearsed:
            status = np.zeros(1, np.int64)
            self._run(self._record(self._first, status))
            _rehearsed.add(key)

    def __call__(self) -> None:
        """Apply it."""
        program = self._program
        if program.pace is None:
            self._run(self._step)
            return
        start = time.perf_counter()
        self._run(self._step)
        program.seconds += time.perf_counter() - start

    def close(self) -> None:
        """Let go of what it worked in."""
        self._program.close()


_rehearsed: set[Any] = set()  # variants whose kernels have been compiled, serial or parallel
