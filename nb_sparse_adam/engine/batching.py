"""Many small tables in one step: prepared and updated by two native calls, one thread a table.

A model with 26 embeddings steps 26 tables. One after the other, each would start and stop a team of threads
several times for some tens of microseconds of work. Here threads take whole tables in turn instead, the
largest first, and do for each what `planning` and a kernel of one part do, in the same order: the bits are
the same. What is unusual is left to `planning`: compressed rows, gradients of which some rows may have to be
skipped, tables that are so large that they need several threads, tables that share memory.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam.engine import kernels
from nb_sparse_adam.engine.grouping import (
    DIGIT_BITS,
    Buffers,
    IdBatch,
    bits_of,
    group_tables_parallel,
    group_tables_serial,
)
from nb_sparse_adam.engine.planning import dtypes_of, largest_of_rows, rehearsed
from nb_sparse_adam.engine.screening import squares_are_finite
from nb_sparse_adam.engine.state import TableState
from nb_sparse_adam.engine.threads import ALONE, Crew, run, usable_threads
from nb_sparse_adam.gradients import Entries, Rows, Target, changed_meanwhile, extent

__all__ = ["BatchWork", "Part", "choose", "plan_batch"]

_NO_INT32, _NO_INT64 = np.empty(0, np.int32), np.empty(0, np.int64)
_MARGIN = 2  # a table may take this fraction of a thread's share: the last one keeps nobody waiting for long


class Part(NamedTuple):
    """One table in a step, with its checked gradient."""

    table: TableState
    target: Target
    checked: Rows | kernels.Compressed | Entries
    size: int  # elements, as `planning.size_of` counts them
    on_nonfinite: str
    num_threads: int | None
    for_kernels: Callable[[TableState, bool], kernels.Table]  # (table, whether rows may have to be skipped)
    seconds: float  # that checking took

    @property
    def rows(self) -> Rows:
        """The gradient, where it is known to be of rows."""
        assert isinstance(self.checked, Rows)
        return self.checked


class BatchWork(NamedTuple):
    """A step of several tables, up to the first write; used like a `planning.Work`."""

    drivers: tuple[Any, Any]  # serial and parallel, of `kernels`
    order: NDArray[np.int64]
    arguments: tuple[Any, ...]  # of the driver, between (turns, order) and examples of dtypes
    crew: Crew
    memory: NDArray[np.int64]
    kept: list[Any]  # whose addresses are in the arguments

    def run(self, table: kernels.Table) -> None:
        """Update all tables; one of them is passed for its dtypes."""
        turns = np.zeros(1, np.int64)
        run(self.drivers, self.crew, turns, self.order, *self.arguments, _NO_INT32, table)

    def rehearse(self, table: kernels.Table) -> None:
        """Have the kernel compiled, by running it over no tables."""
        key = self.drivers[self.crew.parts > 1], *dtypes_of(table)
        if key not in rehearsed:
            self._replace(order=_NO_INT64).run(table)
            rehearsed.add(key)


def choose(parts: Sequence[Part]) -> list[list[int]]:
    """Choose what to batch.

    Parameters
    ----------
    parts : sequence of Part
        Of a step.

    Returns
    -------
    list of list of int
        Batches of two parts and more, the largest first, each by their places in the sequence.

    Raises
    ------
    NonFiniteGradientError
        With ``on_nonfinite="raise"``, for a value that is not finite.
    """
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for at, part in enumerate(parts):
        if isinstance(part.checked, Rows) and _fits(part):
            dtypes = part.target.dtype, part.table.arrays.counts.dtype, part.rows.ids.dtype
            alike[dtypes, part.num_threads].append(at)
    batches = []
    for places in alike.values():
        if len(places) > 1:
            batch = [at for at in _without_large_ones(parts, places) if _skips_nothing(parts[at])]
            if len(batch) > 1 and _are_apart([parts[at] for at in batch]):
                batches.append(batch)
    return batches


def _without_large_ones(parts: Sequence[Part], places: list[int]) -> list[int]:
    """Sort by size, the largest first, without those that the other threads would wait for."""
    threads = usable_threads(parts[places[0]].num_threads)
    places = sorted(places, key=lambda at: -parts[at].size)
    total = sum(parts[at].size for at in places)
    while places and threads > 1 and parts[places[0]].size * threads * _MARGIN > total:
        total -= parts[places.pop(0)].size
    return places


def _fits(part: Part) -> bool:
    """Whether ids can be packed, and counted in 32 bits; and whether there are any."""
    return 0 < len(part.rows.ids) < 2**31 - 1 and part.target.dim > 0 and sum(_bits(part)) <= 63


def _skips_nothing(part: Part) -> bool:
    """Whether no sum of gradients can be too large; with "raise" refuse what is not finite."""
    largest = largest_of_rows(part.rows, part.target, part.on_nonfinite, ALONE)
    return squares_are_finite(largest, len(part.rows.ids), part.target.dtype)


def _bits(part: Part) -> tuple[int, int]:
    """How many bits an id takes, and how many its payload."""
    rows = part.rows
    offsets = None if rows.per_id else rows.offsets
    return bits_of(max(part.target.rows - 1, 0), len(rows.ids), offsets)


def _are_apart(parts: Sequence[Part]) -> bool:
    """Whether no two tables share memory: threads would meet there."""
    places = sorted(extent(part.table.arrays.param) for part in parts)
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def plan_batch(
    parts: Sequence[Part], tables: Sequence[kernels.Table], crew: Crew, buffers: Buffers
) -> BatchWork:
    """Group the ids of a batch, and prepare everything up to the first write.

    Parameters
    ----------
    parts : sequence of Part
        The largest first.
    tables : sequence of kernels.Table
        Theirs, that skip no row.
    crew : Crew
        On whose threads.
    buffers : Buffers
        Whose memory to work in; it is to be given back when the work has been run.
    """
    first = parts[0]
    assert len({table.counts.dtype for table in tables}) == 1  # kernels are compiled for one
    lengths = [len(part.rows.ids) for part in parts]
    memory = buffers.take(sum(lengths) + len(parts))
    order = np.arange(len(parts))
    ids = _id_batch(parts, lengths)
    long_places = int(ids.first_long[-1]) + lengths[-1] // kernels.BLOCK
    long, long_first = np.empty(long_places, np.int64), np.empty(long_places + len(parts), np.int64)
    ends = np.empty((crew.parts, 1 << DIGIT_BITS), np.int64)
    group_tables = group_tables_serial, group_tables_parallel
    like = first.rows.ids, _NO_INT32, _NO_INT64
    turns = np.zeros(1, np.int64)
    run(group_tables, crew, turns, order, ids, memory, long, long_first, ends, kernels.BLOCK, like)
    if ids.changed.any():
        raise changed_meanwhile(parts[int(ids.changed.argmax())].target)
    dtype, dims = first.target.dtype, [part.target.dim for part in parts]
    sums_at = np.concatenate([[0], np.cumsum(ids.blocks * dims)])
    sums = np.empty(int(sums_at[-1]), dtype)
    batch = _table_batch(parts, tables, _address(sums) + sums_at[:-1] * dtype.itemsize)
    scratch = np.empty((crew.parts * kernels.SCRATCH_ROWS, max(dims)), dtype)
    drivers = kernels.tables_serial, kernels.tables_parallel
    arguments = batch, ids, memory, long, long_first, scratch, _NO_INT64
    return BatchWork(drivers, order, arguments, crew, memory, [parts, tables, sums])


def _id_batch(parts: Sequence[Part], lengths: list[int]) -> IdBatch:
    records = []
    first = first_long = 0
    for part, n in zip(parts, lengths, strict=True):
        rows = part.rows
        offsets, bags = (0, 0) if rows.offsets is None else (_address(rows.offsets), len(rows.offsets) - 1)
        records.append(
            (
                _address(rows.ids),
                part.target.rows - 1,
                n,
                int(rows.nondecreasing),
                offsets,
                bags,
                int(rows.per_id),
                *_bits(part),
                first,
                first_long,
                *(0, 0, 0, 0, 0),
            )
        )
        first += n + 1
        first_long += n // kernels.BLOCK
    return IdBatch(*_columns(records))


def _table_batch(
    parts: Sequence[Part], tables: Sequence[kernels.Table], block_sums: NDArray[np.int64]
) -> kernels.TableBatch:
    records = []
    for part, table, sums in zip(parts, tables, block_sums.tolist(), strict=True):
        rows = part.rows
        weights = (
            (0, 0) if rows.coefficients is None else (_address(rows.coefficients), len(rows.coefficients))
        )
        # Of a single row NumPy does not care how far the next one would be.
        apart = rows.values.strides[0] // rows.values.itemsize if len(rows.values) > 1 else part.target.dim
        values = _address(rows.values), len(rows.values), apart
        records.append((*_addresses(part.table, table), *values, *weights, sums))
    return kernels.TableBatch(*_columns(records))


def _addresses(state: TableState, table: kernels.Table) -> tuple[int, ...]:
    """What of a `TableBatch` no gradient changes; kept until the table's memory or options change."""
    if state.addresses is None or state.addresses[0] is not table:
        param, moments, counts, corrections, *rest = table
        found = [_address(param), *param.shape]
        for array in (moments, counts, corrections):
            found += [_address(array), len(array)]
        state.addresses = table, (*found, *map(_address, rest))
    return state.addresses[1]


def _columns(records: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    return np.ascontiguousarray(np.array(records, np.int64).T)
