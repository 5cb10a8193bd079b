# SPDX-License-Identifier: Apache-2.0
"""The gradients of a step as records on a GPU, and the launches that take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.cuda import checks, grouping
from nb_sparse_adam._src.cuda.device import Stream, address_of, blocks_for, launch
from nb_sparse_adam._src.cuda.guard import Guard, Kind, number_of_kind
from nb_sparse_adam._src.cuda.kernels import Kernels, Variant, kernels_for
from nb_sparse_adam._src.cuda.records import (
    DIGIT_BITS,
    DIGITS,
    NOWHERE,
    SCAN_THREADS,
    SORT_THREADS,
    SPAN,
    STEP,
    THREADS,
    TILE,
    VARIANT,
)
from nb_sparse_adam._src.cuda.ring import Slot
from nb_sparse_adam._src.cuda.table import DeviceTable
from nb_sparse_adam._src.engine.corrections import Corrections
from nb_sparse_adam._src.engine.records import BAGS, CSR, ELEMENT, FOUND, GRADIENT, POLICIES, TABLE, joined
from nb_sparse_adam._src.engine.scratch import BLOCK
from nb_sparse_adam._src.engine.screening import SAFE_SHARE, square_root_of_largest
from nb_sparse_adam._src.faults import too_many_bits
from nb_sparse_adam._src.gradients import Given
from nb_sparse_adam._src.options import Options
from nb_sparse_adam.errors import GradientError

MOST_IDS = 2**31 - 2**24  # in a batch: 32 bits count them, and a grid of threads beyond them
ENTRY_LANES = 8  # threads to a row of entries


class DevicePart(NamedTuple):
    """One table on a GPU in a step, with its gradient."""

    table: DeviceTable
    given: Given
    guard: Guard
    options: Options
    stream: Stream
    corrections: Corrections
    gradient: object  # kept until kernels have been launched


class _Part(NamedTuple):
    """The same, with what follows from its sizes."""

    part: DevicePart
    order: int  # its place in the step, as it was given
    variant: Variant
    n: int
    pieces: int  # of a row, of which a lane takes one at a time
    row_shift: int
    id_bits: int


def _measured(part: DevicePart, order: int) -> _Part:
    table, given = part.table, part.given
    entries = given.form == CSR
    n = int(given.ids.shape[0])
    if n > MOST_IDS:
        raise GradientError(
            f"gradient of table {table.name!r}: {n} ids or entries, expected at most {MOST_IDS} on "
            "a GPU; pass the gradient in several smaller ones"
        )
    by_bag = given.form == BAGS and given.weights is None
    row_shift = max((given.values.rows if by_bag else n) - 1, 0).bit_length()
    id_bits = max(table.rows * (table.dim if entries else 1) - 1, 0).bit_length()
    if id_bits + row_shift > 63:
        raise too_many_bits(part.guard.targets[table.name], n)
    width = 1 if entries else _width(table, given)
    counts, complete = table.arrays.counts.dtype, part.corrections.complete
    variant = Variant(table.dtype, table.codec, np.dtype(counts), table.mode, width, complete, entries)
    pieces = (ENTRY_LANES if table.mode == ELEMENT else table.dim) if entries else -(-table.dim // width)
    return _Part(part, order, variant, n, pieces, row_shift, id_bits)


def _width(table: DeviceTable, given: Given) -> int:
    """How many elements of a row can be loaded at once."""
    width = 16 // table.dtype.itemsize
    strides = table.dim, table.param_stride, table.arrays.state_stride, given.values.stride
    if any(stride % width for stride in strides):
        return 1
    aligned = all(address_of(array) % 16 == 0 for array in (table.matrix, given.values.flat))
    return width if aligned else 1


class _Group(NamedTuple):
    """The gradients of one variant."""

    kernels: Kernels
    parts: list[_Part]
    ids: int
    columns: int  # of the widest
    lanes: int
    blocks: int  # that are summed by themselves, at most


class Batch:
    """Gradients of a step that are checked, grouped and applied by one sequence of launches.

    Parameters
    ----------
    parts : sequence of DevicePart
        Of `MOST_IDS` ids together, at most.
    stream : Stream
        Which all of it runs on.
    guards : sequence of Guard
        Of the whole step.
    number : int
        Of the batch in the step; each has memory of its own to work in.
    """

    def __init__(
        self, parts: Sequence[DevicePart], stream: Stream, guards: Sequence[Guard], number: int
    ) -> None:
        self.stream, self.guards = stream, guards
        self.slot: Slot | None = None
        measured = sorted((_measured(part, order) for order, part in enumerate(parts)), key=_key_of)
        self.parts = measured
        self.groups = [_group(list(of_one)) for _, of_one in groupby(measured, key=_key_of)]
        # Ids, offsets and rows of values, numbered through.
        given = [one.part.given for one in measured]
        self.ids = [0, *accumulate(one.n for one in measured)]
        self.offsets = [0, *accumulate(0 if g.offsets is None else int(g.offsets.shape[0]) for g in given)]
        self.rows = [0, *accumulate(g.values.rows if g.values.columns else 0 for g in given)]
        self.capacity, self.tiles = self.ids[-1], sum(-(-one.n // TILE) for one in measured)
        self.entries = sum(one.n for one in measured if one.variant.entries)
        self.passes = max(-(-one.id_bits // DIGIT_BITS) for one in measured)
        self.screens = any(one.part.options.on_nonfinite != "propagate" for one in measured)
        self._room = 0
        self._lay_out_scratch()
        self._scratch = parts[0].guard.scratch.take(number, self._room)
        self._ring = parts[0].guard.ring

    # --- records ----------------------------------------------------------------------------------------

    def _place(self, length: int, itemsize: int) -> int:
        """Take scratch memory; gives its offset."""
        place = self._room
        self._room += -(-length * itemsize // 256) * 256
        return place

    def _lay_out_scratch(self) -> None:
        place, n = self._place, self.capacity
        self._shared = {
            "packed": place(n, 8), "spare": place(n, 8), "starts": place(n + 1, 4),
            "row_starts": place(self.entries + 1, 4), "digits": place(self.tiles * DIGITS, 4),
            "heads": place(self.tiles + 1, 4), "row_heads": place(self.tiles + 1, 4),
            "bad": place(2 * n if self.screens else 0, 1),
        }  # fmt: skip
        self._block_sums = [
            place(group.blocks * group.columns, group.parts[0].variant.dtype.itemsize)
            for group in self.groups
        ]
        self._bag_of: list[int | None] = []
        self._reciprocals: list[int | None] = []
        for one in self.parts:
            given, size = one.part.given, one.variant.dtype.itemsize
            self._bag_of.append(None if given.weights is None else place(one.n, 4))
            self._reciprocals.append(place(given.values.rows, size) if given.mean else None)

    def upload(self) -> None:
        """Copy the records to the GPU: a step that has not begun."""
        length, base = len(self.parts), address_of(self._scratch)
        sizes = [
            (STEP, 1), (TABLE, length), (GRADIENT, length), (FOUND, length), (SPAN, length + 1),
            (VARIANT, len(self.groups)),
        ]  # fmt: skip
        starts = [0, *accumulate(dtype.itemsize // 8 * count for dtype, count in sizes)]
        words = starts[-1] + len(self.guards)
        slot = self.slot = self._ring.take(words)
        at = [slot.address + 8 * start for start in starts]
        step = _record(
            STEP, length=length, tables=at[1], gradients=at[2], found=at[3], spans=at[4], variants=at[5],
            guards=at[6], guards_length=len(self.guards), capacity=self.capacity, passes=self.passes,
            tiles_capacity=self.tiles, entries=self.entries,
            **{name: base + offset for name, offset in self._shared.items()},
        )  # fmt: skip
        tables = joined([one.part.table.described(one.part.options).record for one in self.parts])
        gradients = joined([_gradient_of(one) for one in self.parts])
        records = step, tables, gradients, self._found(base), self._spans(), self._variants(base)
        for start, each in zip(starts, records, strict=False):
            slot.put(start, each)
        slot.put(starts[-1], np.array([address_of(guard.refusal) for guard in self.guards], np.int64))
        self.address = slot.address
        self._variant_words = starts[5], starts[6]
        slot.upload(self.stream)

    def begin_again(self) -> None:
        """Forget that the update has been done; for benchmarks."""
        assert self.slot is not None
        self.slot.upload(self.stream, *self._variant_words)

    def _found(self, base: int) -> Any:
        found = np.zeros(len(self.parts), FOUND)
        found["row_shift"] = [one.row_shift for one in self.parts]
        for name, places in (("bag_of", self._bag_of), ("reciprocals", self._reciprocals)):
            found[name] = [0 if place is None else base + place for place in places]
        return found

    def _spans(self) -> Any:
        spans = np.zeros(len(self.parts) + 1, SPAN)
        spans["first_id"], spans["first_offset"], spans["first_row"] = self.ids, self.offsets, self.rows
        spans["worst"] = NOWHERE
        guards = {guard: place for place, guard in enumerate(self.guards)}
        for i, one in enumerate(self.parts):
            part, span = one.part, spans[i]
            span["order"] = one.order
            span["checked"] = part.options.device_checks != "off"
            span["guard"] = guards[part.guard]
            span["number"] = part.guard.number_of(part.table)
            span["kind"] = number_of_kind(Kind(part.given.form, part.given.names))
            span["limit"] = _limit_of(one)
        return spans

    def _variants(self, base: int) -> Any:
        variants = np.zeros(len(self.groups), VARIANT)
        ends = [0, *accumulate(len(group.parts) for group in self.groups)]
        variants["first"], variants["last"] = ends[:-1], ends[1:]
        variants["blocks"] = [group.blocks for group in self.groups]
        variants["block_sums"] = [base + place for place in self._block_sums]
        variants["block_dim"] = [group.columns for group in self.groups]
        return variants

    # --- launches ---------------------------------------------------------------------------------------

    def _over(self, kernel: Any, length: int) -> None:
        """Launch a kernel of which each thread takes one of so many at a time."""
        launch(kernel, blocks_for(length, THREADS), THREADS, self.stream, self.address)

    def _by_tile(self, kernel: Any, *arguments: Any) -> None:
        """Launch a kernel of which each block takes a tile at a time."""
        launch(kernel, blocks_for(self.tiles, 1), SORT_THREADS, self.stream, self.address, *arguments)

    def _over_rows(self, kernel: Any, rows: int, lanes: int, *arguments: Any) -> None:
        """Launch a kernel of which each group of threads takes one row at a time."""
        shape = lanes, THREADS // lanes
        launch(kernel, blocks_for(rows, shape[1]), shape, self.stream, self.address, *arguments)

    def check(self) -> None:
        """Have everything looked at that can be wrong, or that decides what is to be done."""
        if self.ids[-1]:
            self._over(checks.check_ids, self.ids[-1])
        if self.offsets[-1]:
            self._over(checks.check_offsets, self.offsets[-1])
        if self.rows[-1] and self.screens:
            lanes = _lanes(one.part.given.values.shape for one in self.parts)
            self._over_rows(checks.check_values, self.rows[-1], lanes)

    def settle(self) -> None:
        """Have the step refused if something is wrong, and what must be grouped shared out."""
        launch(checks.settle, 1, SCAN_THREADS, self.stream, self.address)

    def join(self) -> None:
        """Have it refused if another batch of the step is."""
        launch(checks.join, 1, 1, self.stream, self.address)

    def group(self) -> None:
        """Sort ids, cut them into segments, sum the blocks of long ones, and find sums that overflow."""
        if self.capacity:
            self._over(grouping.pack, self.capacity)
            for number in range(self.passes):
                self._by_tile(grouping.radix_count, number)
                launch(grouping.scan_digits, 1, SCAN_THREADS, self.stream, self.address)
                self._by_tile(grouping.radix_place, number)
            self._by_tile(grouping.count_heads)
        launch(grouping.scan_heads, 2, SCAN_THREADS, self.stream, self.address)
        if self.capacity:
            self._by_tile(grouping.write_starts)
        for v, group in enumerate(self.groups):
            if group.blocks:
                self._over_rows(group.kernels.sum_blocks, group.blocks, group.lanes, v)
            if self.screens and group.ids:
                lanes = (
                    group.lanes if group.kernels.update_in_order is not None else min(THREADS, ENTRY_LANES)
                )
                self._over_rows(group.kernels.find_bad, group.ids, lanes, v)
        if any(one.part.options.on_nonfinite == "raise" for one in self.parts):
            launch(checks.settle_sums, 1, 1, self.stream, self.address)

    def update(self) -> None:
        """Launch the kernels that write to tables, each of which does so once in this step."""
        for v, group in enumerate(self.groups):
            for kernel in _updates(group):
                self._over_rows(kernel, max(group.ids, 1), group.lanes, v)

    def rehearse(self) -> None:
        """Have these kernels compiled: a failure to compile must come before the first write."""
        for group in self.groups:
            for kernel in _updates(group):
                rehearse(kernel, self.parts[0].part.guard, self.stream)


_rehearsed: set[Any] = set()


def rehearse(kernel: Any, guard: Guard, stream: Stream) -> None:
    """Have a kernel compiled, by launching it for a step that has been refused."""
    key = kernel, guard.ordinal
    if key not in _rehearsed:
        launch(kernel, 1, (1, 1), stream, guard.refused, 0)
        _rehearsed.add(key)


def _key_of(one: _Part) -> Any:
    """Sort by variant, rows before entries."""
    dtype, codec, counts, *rest, entries = one.variant
    return entries, dtype.itemsize, codec.name, counts.itemsize, *rest


def _group(parts: list[_Part]) -> _Group:
    ids = sum(one.n for one in parts)
    blocks = 2 * (ids // BLOCK + 1) if max(one.n for one in parts) > BLOCK else 0
    lanes = _lanes((one.n, one.pieces) for one in parts)
    columns = max(one.part.given.values.columns for one in parts)
    return _Group(kernels_for(parts[0].variant), parts, ids, columns, lanes, blocks)


def _lanes(shapes: Iterable[tuple[int, int]]) -> int:
    """Threads side by side along a row, for so many rows of so many pieces each: as for most of them."""
    rows = pieces = 0
    for count, length in shapes:
        rows, pieces = rows + count, pieces + count * length
    lanes = 1
    while lanes * rows < pieces and lanes < min(THREADS, 128):
        lanes *= 2
    return lanes


def _updates(group: _Group) -> list[Any]:
    kernels = group.kernels
    found = []
    if kernels.update_in_order is not None and any(one.part.given.form != BAGS for one in group.parts):
        found.append(kernels.update_in_order)
    if kernels.update_in_order is None or group.ids or not found:
        found.append(kernels.update_grouped)
    return found


def _limit_of(one: _Part) -> float:
    """Magnitude of values, and of weights, from which on a sum, or its square, might not be finite.

    A sum in blocks (`BLOCK`) rounds some hundreds of times at most, so that the bound for its terms holds
    for it within a quarter; where two factors are below the root of a limit, their product is below it.
    """
    dtype = one.variant.dtype
    limit = square_root_of_largest(dtype) / (SAFE_SHARE * max(one.n, 1))
    if one.part.given.weights is not None:
        limit = limit**0.5
    return float(dtype.type(limit))


def _record(dtype: np.dtype[np.void], **fields: Any) -> Any:
    """Make a record; what is not named is 0."""
    return np.array([tuple(fields.get(name, 0) for name in dtype.names or ())], dtype)


def _gradient_of(one: _Part) -> Any:
    """Return a GRADIENT; the fields of a CPU's preparing are 0."""
    given, values, offsets = one.part.given, one.part.given.values, one.part.given.offsets
    of_offsets = {} if offsets is None else {
        "offsets": address_of(offsets), "offsets_bytes": offsets.dtype.itemsize,
        "offsets_length": int(offsets.shape[0]),
    }  # fmt: skip
    return _record(
        GRADIENT, form=given.form, on_nonfinite=POLICIES[one.part.options.on_nonfinite],
        ids=address_of(given.ids), ids_length=one.n, ids_bytes=given.ids.dtype.itemsize,
        values=address_of(values.flat), values_rows=values.rows, values_stride=values.stride,
        values_dim=values.columns, values_bytes=one.variant.dtype.itemsize, mean=int(given.mean), parts=1,
        weights=0 if given.weights is None else address_of(given.weights), **of_offsets,
    )  # fmt: skip
