# SPDX-License-Identifier: Apache-2.0
"""A step on a GPU: checks, grouping and update as kernels on the caller's stream, and who waits for what.

All tables of a step are checked and grouped before any is updated, by one sequence of launches, however many
they are; the update has one or two for each kind of table (`kernels.Variant`). Whether something is wrong is
known on the GPU first: the step's record says so, and every kernel that writes to a table looks at it. So the
host need not wait, and a step that is refused, like all that follow it until that has been reported
(`guard.Guard`), changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from nb_sparse_adam._src.backend import Request
from nb_sparse_adam._src.cuda.device import Mark, Stream, copy_to_host, stream_of, using
from nb_sparse_adam._src.cuda.gradients import DeviceReader, check
from nb_sparse_adam._src.cuda.guard import Guard
from nb_sparse_adam._src.cuda.launches import MOST_IDS, Batch, DevicePart
from nb_sparse_adam._src.cuda.table import DeviceTable
from nb_sparse_adam._src.gradients import arrays_of, on_gpu
from nb_sparse_adam.errors import GradientError, TableError


def part_of(request: Request, guard: Guard) -> DevicePart:
    """Check what of a gradient can be checked without looking at what it holds."""
    table, gradient, options, stream = request
    assert isinstance(table, DeviceTable)
    table.check_unchanged()
    with using(table.ordinal):
        run_on = stream_of(stream, [*filter(on_gpu, arrays_of(gradient)), table.given])
        target = table.target._replace(reader=DeviceReader(guard.taken(), table.ordinal, run_on))
        given = check(gradient, target)
    guard.targets[table.name] = target
    return DevicePart(table, given, guard, options, run_on, table.corrections(options), gradient)


class DeviceRun:
    """The update of all tables on a GPU in a step: launched exactly once, whatever interrupts.

    A launch is not one native call, and what Python's signal handlers raise may come between it and our note
    of it. So all are launched again if need be; a kernel does nothing where its part of the step is done.
    """

    def __init__(self, batches: Sequence[Batch], parts: Sequence[DevicePart]) -> None:
        self.batches, self.parts, self.ordinal = batches, parts, parts[0].table.ordinal
        self.done = self.may_have_run = False
        self._goals = [(part.table, part.table.launched + 1) for part in parts]

    def rehearse(self) -> None:
        """Have the kernels compiled, if they are not."""
        with using(self.ordinal):
            for batch in self.batches:
                batch.rehearse()

    def __call__(self) -> None:
        """Launch it."""
        self.may_have_run = True
        for table, goal in self._goals:
            table.launched = goal
        with using(self.ordinal):
            for batch in self.batches:
                batch.update()
        self.done = True

    def close(self) -> None:
        """Note on which stream the tables were used last."""
        stream = self.batches[0].stream
        for part in self.parts:
            part.table.totals[0] += 1
        with using(self.ordinal):
            told = (part.guard for part in self.parts if part.options.device_checks != "immediate")
            for guard in dict.fromkeys(told):
                guard.tell(stream)
            stream.make_others_wait(_mark(self.batches, self.parts))


def prepare(parts: Sequence[DevicePart], waits: bool) -> list[DeviceRun]:
    """Prepare a step up to the first write to a table.

    Parameters
    ----------
    parts : sequence of DevicePart
    waits : bool
        Whether the host waits for the checks, whatever ``device_checks`` says: tables of the host are in the
        step, too.

    Raises
    ------
    GradientError
        If something is wrong, and the host waits for it.
    """
    ordinals = {part.table.name: part.table.ordinal for part in parts}
    if len(set(ordinals.values())) > 1:
        places = ", ".join(f"{name!r} on GPU {ordinal}" for name, ordinal in ordinals.items())
        raise TableError(f"a step of tables on several GPUs ({places}), expected one: make a step for each")
    guards = list(dict.fromkeys(part.guard for part in parts))
    with using(parts[0].table.ordinal):
        for part in parts:
            part.table.make_room_for_a_step()
        stream = _one_stream(parts)
        for mark in dict.fromkeys(mark for guard in guards for mark in guard.marks()):
            stream.wait_for(mark)
        batches = [Batch(some, stream, guards, number) for number, some in enumerate(_cut(parts))]
        run = DeviceRun(batches, parts)
        try:
            run.rehearse()
            _check_and_group(batches, parts, guards, waits)
        except BaseException:
            _mark(batches, parts)
            raise
        mark = stream.mark()  # what has been launched works in the optimizers' memory, run or not
        for part in parts:
            part.table.last = mark
    return [run]


def _cut(parts: Sequence[DevicePart]) -> list[list[DevicePart]]:
    """Cut a step where its ids would be too many to be counted together."""
    cut: list[list[DevicePart]] = [[]]
    total = 0
    for part in parts:
        n = int(part.given.ids.shape[0])
        if cut[-1] and total + n > MOST_IDS:
            cut.append([])
            total = 0
        cut[-1].append(part)
        total += n
    return cut


def _one_stream(parts: Sequence[DevicePart]) -> Stream:
    """Let all run on the first part's stream, and the others, too, wait for the step in the end."""
    first = parts[0].stream
    handles = [handle for part in parts for handle in (part.stream.handle, *part.stream.others)]
    for handle in dict.fromkeys(handles):
        if handle not in (first.handle, *first.others):
            first.wait_for_stream(handle)
    first.others = tuple(handle for handle in dict.fromkeys(handles) if handle != first.handle)
    return first


def _mark(batches: Sequence[Batch], parts: Sequence[DevicePart]) -> Mark:
    """Note that what has been launched so far uses the tables, and the memory that steps work in."""
    mark = batches[0].stream.mark()
    for part in parts:
        part.table.last = mark
    for batch in batches:
        if batch.slot is not None:
            batch.slot.mark = mark
    return mark


def _check_and_group(
    batches: Sequence[Batch], parts: Sequence[DevicePart], guards: Sequence[Guard], waits: bool
) -> None:
    modes = {part.options.device_checks for part in parts}
    immediate = "immediate" in modes or (waits and modes != {"off"})
    try:
        for _ in range(2):  # a second time, if what is found is left of an earlier step of other optimizers
            for stage in (Batch.upload, Batch.check, Batch.settle, Batch.group):
                for batch in batches:
                    stage(batch)
                if stage in (Batch.settle, Batch.group):
                    for batch in batches[:-1]:
                        batch.join()
            if not immediate or not copy_to_host(guards[0].refusal, batches[0].stream)[0]:
                return
            _mark(batches, parts)
            _raise_what_is_wrong(guards)
    except BaseException:
        if immediate:  # an interrupt, say: what is refused on the GPU must not be found by the next step
            _mark(batches, parts)
            with suppress(GradientError):
                _raise_what_is_wrong(guards)
        raise


def _raise_what_is_wrong(guards: Sequence[Guard]) -> None:
    errors = []
    for guard in guards:
        try:
            guard.raise_what_is_wrong()
        except GradientError as error:
            errors.append(error)
    if errors:
        raise errors[0]
