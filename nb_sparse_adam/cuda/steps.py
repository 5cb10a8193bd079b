"""A step on a GPU: checks, grouping and update as kernels on the caller's stream, and who waits for what.

All tables of a step are checked and grouped before any is updated. Whether something is wrong is known on
the GPU first: a word of the optimizer's (`Guard`) says so, and every kernel that writes to a table looks at
it. So the host need not wait, and a step that is refused, like all that follow it until that has been
reported, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam.cuda import checks, grouping, kernels
from nb_sparse_adam.cuda.device import (
    Stream,
    address_of,
    blocks_for,
    copy_to_host,
    launch,
    stream_of,
    using,
)
from nb_sparse_adam.cuda.gradients import DeviceArrays, Given, arrays_of, check
from nb_sparse_adam.cuda.guard import FORMS, Guard
from nb_sparse_adam.cuda.layout import (
    AT_VALUE,
    AT_WEIGHT,
    NOWHERE,
    ONE_EACH,
    PER_ID,
    PER_ROW,
    PRESENT,
    SCAN_THREADS,
    SEGMENTS,
    SORT_THREADS,
    THREADS,
    TILE,
    Gradient,
    Table,
)
from nb_sparse_adam.cuda.table import DeviceTable
from nb_sparse_adam.engine.corrections import Corrections
from nb_sparse_adam.engine.kernels import BLOCK, ELEMENT, Hyperparameters
from nb_sparse_adam.engine.planning import too_many_bits
from nb_sparse_adam.engine.screening import SAFE_SHARE, square_root_of_largest
from nb_sparse_adam.errors import GradientError, TableError
from nb_sparse_adam.gradients import Places, Target

__all__ = ["DevicePart", "Guard", "part_of", "prepare"]

ENTRY_LANES = 8  # threads to a row of entries


class DevicePart(NamedTuple):
    """One table on a GPU in a step, with its gradient."""

    table: DeviceTable
    given: Given
    guard: Guard
    on_nonfinite: str
    checks: str  # device_checks
    stream: Stream
    constants: Hyperparameters
    corrections: Corrections
    gradient: object  # kept until kernels have been launched


def part_of(
    table: DeviceTable, gradient: object, guard: Guard, on_nonfinite: str, checks: str, stream: Any,
    constants: Hyperparameters, corrections: Corrections,
) -> DevicePart:  # fmt: skip
    """Check what of a gradient can be checked without looking at what it holds."""
    with using(table.ordinal):
        run_on = stream_of(stream, [*arrays_of(gradient), table.given])
        for other in guard.tables:  # what is refused here is refused for them, too
            run_on.wait_for(other.last)
        memory = [array for other in guard.tables for array in other.memory]
        arrays = DeviceArrays(memory, table.ordinal, run_on)
        target = Target(table.name, table.rows, table.dim, len(table.shape), table.dtype, Places([]), arrays)
        given = check(gradient, target)
    guard.targets[table.name] = target
    return DevicePart(table, given, guard, on_nonfinite, checks, run_on, constants, corrections, gradient)


class _Prepared:
    """A part of a step, as it is made ready."""

    def __init__(self, part: DevicePart) -> None:
        table, given = part.table, part.given
        self.part, self.table, self.given = part, table, given
        self.stream, self.guard = part.stream, part.guard.flags
        self.n = int(given.ids.shape[0])
        self.dim = 1 if given.entries else table.dim
        self.raising = part.on_nonfinite == "raise"
        self.skipping = part.on_nonfinite == "skip"
        self.goal = table.launched + 1
        self.number = part.guard.tables.index(table) + 1
        self.whole = given.offsets is not None and not given.entries  # see `layout.Gradient`
        self.ids = given.ids
        self.nothing = table.scratch.take("no numbers", 0, table.dtype)
        self.no_ids = table.scratch.take("no ids", 0, given.ids.dtype)
        if self.n >= 2**31 - 1:
            raise GradientError(
                f"gradient of table {table.name!r}: {self.n} ids or entries, expected less than 2**31 - 1 on "
                "a GPU; pass the gradient in several smaller ones"
            )
        self._cut_bits()

    def _cut_bits(self) -> None:
        """How many bits an id takes, and how many its payload."""
        given, table = self.given, self.table
        highest = max(table.rows * (table.dim if given.entries else 1) - 1, 0)
        by_bag = given.offsets is not None and not given.entries and given.weights is None
        self.row_shift = max((given.values.rows if by_bag else self.n) - 1, 0).bit_length()
        self.id_bits = highest.bit_length()
        if self.id_bits + self.row_shift > 63:
            raise too_many_bits(self.part.guard.targets[table.name], self.n)

    # --- launches ---------------------------------------------------------------------------------------

    def _over(self, kernel: Any, length: int, *arguments: Any) -> None:
        """Launch a kernel of which each thread takes one element at a time."""
        launch(kernel, blocks_for(length, THREADS), THREADS, self.stream, *arguments)

    def _lanes(self, length: int) -> tuple[int, int]:
        """Threads of a block, side by side along a row of so many pieces, and in rows."""
        lanes = 1
        while lanes < length and lanes < min(THREADS, 128):
            lanes *= 2
        return lanes, THREADS // lanes

    def _over_rows(self, kernel: Any, rows: int, pieces: int, *arguments: Any) -> None:
        """Launch a kernel of which each group of threads takes one row at a time."""
        shape = self._lanes(pieces)
        launch(kernel, blocks_for(rows, shape[1]), shape, self.stream, *arguments)

    # --- checks -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Have everything looked at that can be wrong, or that decides what is to be done."""
        given, table, info, guard = self.given, self.table, self.table.info, self.guard
        launch(checks.begin, 1, 1, self.stream, guard, info)
        checking = self.part.checks != "off"
        if self.n and not given.entries:
            self._over(checks.check_ids, self.n, guard, info, self.ids, table.rows, 1)
        if given.entries:
            if checking:
                self._over(checks.check_ids, self.n, guard, info, self.ids, table.dim, 0)
            self.keys = table.scratch.take("keys", self.n, np.int64)
        if given.offsets is not None and checking:
            length = int(given.offsets.shape[0])
            self._over(checks.check_offsets, length, guard, info, given.offsets, self.n, int(given.closed))
        if self.raising or self.skipping:
            self._check_values()

    def _check_values(self) -> None:
        """Look for values that are not finite, or so large that a sum of them might not be.

        A sum in blocks (`BLOCK`) rounds some hundreds of times at most, so that the bound for its terms holds
        for it within a quarter; where two factors are below the root of a limit, their product is below it.
        """
        given, table, dtype = self.given, self.table, self.table.dtype
        limit = square_root_of_largest(dtype) / (SAFE_SHARE * max(self.n, 1))
        if given.weights is not None:
            limit = limit**0.5
            self._over_rows(
                checks.check_values, self.n, 1, self.guard, table.info, AT_WEIGHT, given.weights,
                self.n, 1, 1, dtype.type(limit),
            )  # fmt: skip
        values = given.values
        if values.rows and values.columns:
            self._over_rows(
                checks.check_values, values.rows, values.columns, self.guard, table.info, AT_VALUE,
                values.flat, values.rows, values.columns, values.apart, dtype.type(limit),
            )  # fmt: skip

    def settle(self) -> None:
        """Have the step refused if something is wrong."""
        if self.part.checks == "off":
            return
        given, table = self.given, self.table
        launch(
            checks.settle, 1, 1, self.stream, self.guard, table.info, table.got, self.ids,
            self.no_ids if given.offsets is None else given.offsets,
            given.values.flat, max(given.values.columns, 1), given.values.apart,
            self.nothing if given.weights is None else given.weights,
            int(self.raising), FORMS.number(given.form), self.number,
        )  # fmt: skip

    # --- grouping ---------------------------------------------------------------------------------------

    def group(self) -> None:
        """Sort ids, cut them into segments, sum the blocks of long ones, and find sums that overflow."""
        given, table, n, take = self.given, self.table, self.n, self.table.scratch.take
        kind, coefficients, bag_of = ONE_EACH, self.nothing, take("no bags", 0, np.int32)
        if given.weights is not None:
            kind, coefficients, bag_of = PER_ID, given.weights, take("bags", n, np.int32)
        elif given.mean:
            kind, coefficients = PER_ROW, take("coefficients", given.values.rows, table.dtype)
        slots = 2 * (n // BLOCK + 1) if self.dim else 0
        passes = -(-self.id_bits // grouping.DIGIT_BITS)
        packed, other = take("packed", n, np.int64), take("other", n, np.int64)
        self.g = g = Gradient(
            info=table.info,
            ids=self.keys if given.entries else self.ids,
            packed=packed,
            starts=take("starts", n + 1, np.int32),
            values=given.values.flat,
            bag_of=bag_of,
            coefficients=coefficients,
            block_sums=take("block sums", slots * self.dim, table.dtype),
            bad=take("bad", max(n, 1), np.uint8),
            row_starts=take("row starts", n + 1 if given.entries else 0, np.int32),
            row_shift=np.int64(self.row_shift),
            payload_mask=np.int64((1 << self.row_shift) - 1),
            apart=np.int64(given.values.apart),
            kind=np.int64(kind),
            whole=np.int64(self.whole),
        )
        width = self._width(g)
        self.pieces = -(-self.dim // width)  # of a row
        self.kernels = kernels.kernels_for(table.mode, table.dtype, width, self.part.corrections.complete)
        if n == 0:
            return
        guard = self.guard
        if given.entries:
            self._over(
                grouping.expand_rows, n, guard, given.offsets, self.ids, np.int64(table.dim), self.keys
            )
            self._over(checks.check_ids, n, guard, table.info, self.keys, np.int64(NOWHERE), 1)
        if given.mean and given.values.rows:
            self._over(
                grouping.mean_coefficients, given.values.rows, guard, given.offsets, np.int64(n), coefficients
            )
        into, spare = (packed, other) if passes % 2 == 0 else (other, packed)
        if self.whole:
            bags = np.int64(given.values.rows)
            self._over(
                grouping.pack_bags, n, guard, g.ids, given.offsets, bags, g.row_shift, g.kind, into, bag_of
            )
        else:
            self._over(grouping.pack_positions, n, guard, table.info, g.ids, g.row_shift, into)
        self._sort(into, spare, passes)
        self._segments(SEGMENTS, 0, g.starts)
        if given.entries:
            self._segments(PRESENT, table.dim, g.row_starts)
        if slots and n > BLOCK:
            self._over_rows(self.kernels.sum_blocks, slots, self.pieces, guard, g, np.int64(self.dim))
        if self.raising or self.skipping:
            if given.entries:
                self._over_rows(self.kernels.poison_entries, n, ENTRY_LANES, guard, g, int(self.raising))
            else:
                arguments = guard, g, np.int64(self.dim), int(self.raising)
                self._over_rows(self.kernels.poison_rows, n, self.pieces, *arguments)
        if self.raising and self.part.checks != "off":
            launch(kernels.settle_sums, 1, 1, self.stream, guard, g, self.number)

    def _width(self, g: Gradient) -> int:
        """How many elements of a row can be loaded at once."""
        table = self.table
        width = 16 // table.dtype.itemsize
        if self.given.entries or table.dim % width or self.given.values.apart % width:
            return 1
        aligned = all(address_of(array) % 16 == 0 for array in (table.arrays.param, g.values))
        return width if aligned else 1

    def _sort(self, packed: Any, other: Any, passes: int) -> None:
        tiles = -(-self.n // TILE)
        blocks = blocks_for(tiles, 1)
        counts = self.table.scratch.take("digits", grouping.DIGITS * tiles, np.int32)
        known = self.guard, self.table.info, self.g.whole
        for number in range(passes):
            arguments = *known, packed, np.int64(self.row_shift + number * grouping.DIGIT_BITS), counts
            launch(grouping.radix_count, blocks, SORT_THREADS, self.stream, *arguments)
            self._scan(grouping.DIGITS, counts, self.g.starts)
            launch(grouping.radix_place, blocks, SORT_THREADS, self.stream, *arguments, other)
            packed, other = other, packed

    def _segments(self, purpose: int, dim: int, starts: Any) -> None:
        tiles = -(-self.n // TILE)
        counts = self.table.scratch.take("heads", tiles, np.int32)
        blocks, g = blocks_for(tiles, 1), self.g
        arguments = (
            self.guard, g.info, g.whole, g.ids, g.packed, g.starts, g.row_shift, np.int64(dim), counts,
        )  # fmt: skip
        launch(grouping.count_heads, blocks, SORT_THREADS, self.stream, *arguments)
        self._scan(purpose, counts, starts)
        launch(grouping.write_starts, blocks, SORT_THREADS, self.stream, *arguments, starts)

    def _scan(self, purpose: int, counts: Any, starts: Any) -> None:
        arguments = self.guard, self.g.info, self.g.whole, np.int64(self.n), purpose, counts, starts
        launch(grouping.scan, 1, SCAN_THREADS, self.stream, *arguments)

    # --- update -----------------------------------------------------------------------------------------

    def update(self, guard: Any = None) -> None:
        """Launch the one kernel that writes to the table."""
        table, known, given = self.table, self.part.corrections, self.given
        arrays = table.arrays
        number = table.dtype.type
        operand = Table(
            param=arrays.param,
            moments=arrays.moments,
            counts=arrays.counts,
            corrections=self.part.guard.corrections(known),
            rows=np.int64(table.rows),
            dim=np.int64(table.dim),
            most=np.int64(2 ** (8 * arrays.counts.dtype.itemsize - 1) - 1),
            last=np.int64(len(known.pairs) // 2 - 1),
            eps_hat=np.int64(known.eps_hat),
            log_beta1=np.float64(known.log_betas[0]),
            log_beta2=np.float64(known.log_betas[1]),
            **{key: number(value) for key, value in self.part.constants._asdict().items()},
        )
        arguments = (
            self.guard if guard is None else guard, np.int64(self.goal), operand, self.g, int(self.skipping),
        )  # fmt: skip
        rows = max(self.n, 1)
        if given.entries:
            lanes = ENTRY_LANES if table.mode == ELEMENT else table.dim
            self._over_rows(self.kernels.update_entries, rows, lanes, *arguments)
            return
        if not self.whole:
            self._over_rows(self.kernels.update_in_order, rows, self.pieces, *arguments)
        if self.n or self.whole:
            self._over_rows(self.kernels.update_segments, rows, self.pieces, *arguments)


class DeviceRun:
    """The update of one table in a step: launched exactly once, whatever interrupts.

    A launch is not one native call, and what Python's signal handlers raise may come between it and our note
    of it. So it is launched again if need be; the kernel does nothing where its step has been done.
    """

    def __init__(self, prepared: _Prepared) -> None:
        self.prepared = prepared
        self.done = self.may_have_run = False
        self.work = self

    def rehearse(self, table: Any) -> None:  # noqa: ARG002 (as `planning.Work`)
        """Have the kernel compiled, by launching it under a guard that has refused."""
        with using(self.prepared.table.ordinal):
            self.prepared.update(self.prepared.part.guard.refused)

    @property
    def table(self) -> DeviceTable:
        """The table."""
        return self.prepared.table

    def __call__(self) -> None:
        """Launch it."""
        self.may_have_run = True
        self.table.launched = self.prepared.goal
        with using(self.table.ordinal):
            self.prepared.update()
        self.done = True

    def close(self) -> None:
        """Note on which stream the table was used last."""
        table, part = self.table, self.prepared.part
        table.totals[0] += 1
        with using(table.ordinal):
            if part.checks != "immediate":
                part.guard.tell(part.stream)
            table.last = part.stream.mark()
            part.stream.make_others_wait(table.last)


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
    with using(parts[0].table.ordinal):
        prepared = [_Prepared(part) for part in parts]
        try:
            _check_and_group(prepared, waits)
        except BaseException:
            for one in prepared:  # what has been launched works in the tables' scratch
                one.table.last = one.stream.mark()
            raise
    return [DeviceRun(one) for one in prepared]


def _check_and_group(prepared: Sequence[_Prepared], waits: bool) -> None:
    guards = list({id(one.part.guard): one.part.guard for one in prepared}.values())
    modes = {one.part.checks for one in prepared}
    immediate = "immediate" in modes or (waits and modes != {"off"})
    _wait_for_each_other(prepared)
    for one in prepared:
        one.table.make_room_for_a_step()
        one.stream.wait_for(one.table.last)
    stream = prepared[0].stream
    try:
        for _ in range(2):  # a second time, if what is found is left of an earlier step of other optimizers
            for stage in (_Prepared.check, _Prepared.settle, _Prepared.group):
                for one in prepared:
                    stage(one)
                if stage is not _Prepared.check:
                    _join(guards, stream)
            if not immediate or not copy_to_host(guards[0].flags, stream)[0]:
                return
            for one in prepared:
                one.table.last = stream.mark()
            _raise_what_is_wrong(guards)
    except BaseException:
        if immediate:  # an interrupt, say: what is refused on the GPU must not be found by the next step
            with suppress(GradientError):
                _raise_what_is_wrong(guards)
        raise


def _wait_for_each_other(prepared: Sequence[_Prepared]) -> None:
    """Where parts run on several streams, let all run on the first."""
    first = prepared[0].stream
    for one in prepared[1:]:
        if one.stream.handle != first.handle:
            first.wait_for(one.stream.mark())
            one.stream = first
            one.part = one.part._replace(stream=first)


def _join(guards: Sequence[Guard], stream: Stream) -> None:
    """Let what one optimizer has refused be refused by all."""
    for guard in guards[1:]:
        launch(checks.join, 1, 1, stream, guards[0].flags, guard.flags)
    for guard in guards[1:]:
        launch(checks.join, 1, 1, stream, guard.flags, guards[0].flags)


def _raise_what_is_wrong(guards: Sequence[Guard]) -> None:
    errors = []
    for guard in guards:
        try:
            guard.raise_what_is_wrong()
        except GradientError as error:
            errors.append(error)
    if errors:
        raise errors[0]
