"""From a checked gradient to work that is ready to run: grouped, screened, allocated, cut into chunks.

Everything here happens before the first write to a table. What it returns, `Work`, needs one native call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam.engine import kernels
from nb_sparse_adam.engine.grouping import (
    Buffers,
    ChangedError,
    count_long,
    cut_evenly,
    fill_bags,
    fill_long,
    group_ids,
)
from nb_sparse_adam.engine.screening import largest_magnitude, squares_are_finite
from nb_sparse_adam.engine.threads import Crew, run
from nb_sparse_adam.errors import GradientError, NonFiniteGradientError
from nb_sparse_adam.gradients import Entries, Rows, Target, changed_meanwhile

__all__ = [
    "Work",
    "dtypes_of",
    "largest_of_rows",
    "nonfinite_error",
    "overflow_error",
    "plan",
    "rehearsed",
    "size_of",
    "too_many_bits",
]


class Work(NamedTuple):
    """A step of one table, up to the first write."""

    drivers: tuple[Any, Any]  # serial and parallel, of `kernels`
    bounds: NDArray[np.int64]  # (crew.parts + 1,)
    arguments: tuple[Any, ...]  # of the driver, after (bounds, skipped, table)
    check: bool  # whether rows may have to be skipped
    crew: Crew
    memory: NDArray[np.int64] | None = None  # what was taken from `Buffers`, in use until it has run

    def run(self, table: kernels.Table) -> None:
        """Apply it."""
        skipped = np.empty(len(self.bounds) - 1, np.int64)
        run(self.drivers, self.crew, self.bounds, skipped, table, *self.arguments)

    def rehearse(self, table: kernels.Table) -> None:
        """Have the kernel compiled, by running it over no rows with counters of its own."""
        key = (self.drivers[self.crew.parts > 1], *dtypes_of(table), *dtypes_of(self.arguments))
        if key in rehearsed:
            return
        settings = table.settings.copy()
        settings[kernels.Settings._fields.index("mode")] = kernels.ELEMENT  # no count of steps to settle
        nothing = table._replace(settings=settings, totals=np.zeros(2, np.int64))
        self._replace(bounds=np.zeros(1, np.int64)).run(nothing)
        rehearsed.add(key)


rehearsed: set[tuple[Any, ...]] = set()  # kernels with their arguments' dtypes


def dtypes_of(arguments: Iterable[Any]) -> Iterator[Any]:
    """Yield what tells two calls of a kernel apart for the compiler."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from dtypes_of(argument)
        else:
            yield getattr(argument, "dtype", None)


def plan(
    checked: Rows | kernels.Compressed | Entries,
    target: Target,
    on_nonfinite: str,
    crew: Crew,
    buffers: Buffers,
) -> Work:
    """Prepare a checked gradient for the table that it was checked for.

    Parameters
    ----------
    checked : Rows, Compressed or Entries
        What `gradients.check` returned.
    target : Target
        The table.
    on_nonfinite : {"raise", "skip", "propagate"}
        "raise" looks for values and sums that are not finite here, before anything is written.
    crew : Crew
        For how many threads it is cut up, and how many prepare it.
    buffers : Buffers
        The table's; its memory is to be given back when the work has been run.

    Raises
    ------
    NonFiniteGradientError
        With "raise", for the first offending position.
    """
    if isinstance(checked, Rows):
        if not checked.values.flags.c_contiguous:
            checked = checked._replace(values=checked.values.copy(order="C"))
        if checked.increasing and checked.offsets is None:
            return _plan_distinct_rows(checked, target, on_nonfinite, crew)
        return _plan_segments(checked, target, on_nonfinite, crew, buffers)
    return _plan_csr(checked, target, on_nonfinite, crew)


def size_of(checked: Rows | kernels.Compressed | Entries, target: Target) -> int:
    """How large a step is: the elements of the table that it touches, or reads to sum duplicates."""
    if isinstance(checked, Rows):
        return len(checked.ids) * target.dim
    return 4 * len(checked.data)  # a stored entry costs more than an element of a row: it is alone in memory


def _evenly(n: int, chunks: int) -> NDArray[np.int64]:
    return np.array([0, n] if chunks == 1 else [n * t // chunks for t in range(chunks + 1)], np.int64)


def _scratch(parts: int, dim: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.empty((parts * kernels.SCRATCH_ROWS, dim), dtype)


# --- rows -------------------------------------------------------------------------------------------------


def largest_of_rows(rows: Rows, target: Target, on_nonfinite: str, crew: Crew) -> float:
    """Return what no value, or product of value and weight, is larger than; 0 if nobody wants to know.

    Raises
    ------
    NonFiniteGradientError
        With ``on_nonfinite="raise"``, for the first value that is not finite.
    """
    what = "RowGradient.values" if rows.offsets is None else "BagGradient.grad_output"
    largest = _largest(what, rows.values, target, on_nonfinite, crew)
    if rows.per_id and rows.coefficients is not None:
        largest *= _largest("BagGradient.weights", rows.coefficients, target, on_nonfinite, crew)
    return largest


def _plan_distinct_rows(rows: Rows, target: Target, on_nonfinite: str, crew: Crew) -> Work:
    largest = largest_of_rows(rows, target, on_nonfinite, crew)
    check = not squares_are_finite(largest, 1, target.dtype)
    if check and on_nonfinite == "raise":
        at = int(kernels.first_poisoned_row(rows.values))
        if at >= 0:
            raise overflow_error(target, int(rows.ids[at]), 1)
        check = False
    drivers = kernels.rows_serial, kernels.rows_parallel
    scratch = _scratch(crew.parts, target.dim, target.dtype)
    return Work(drivers, _evenly(len(rows.ids), crew.parts), (rows.ids, rows.values, scratch), check, crew)


def _plan_segments(rows: Rows, target: Target, on_nonfinite: str, crew: Crew, buffers: Buffers) -> Work:
    n = len(rows.ids)
    memory = buffers.take(n + 1)
    segments, longest = _group(rows, target, crew, memory)
    scratch = _scratch(crew.parts, target.dim, target.dtype)
    largest = largest_of_rows(rows, target, on_nonfinite, crew)
    check = not squares_are_finite(largest, max(longest, 1), target.dtype)
    if check and on_nonfinite == "raise":
        at = int(kernels.first_poisoned_segment(segments, scratch))
        if at >= 0:
            start, end = (int(x) for x in segments.starts[at : at + 2])
            raise overflow_error(target, int(segments.packed[start] >> segments.row_shift), end - start)
        check = False
    bounds = np.empty(crew.parts + 1, np.int64)
    cut_evenly(segments.starts, 4, kernels.BLOCK, len(segments.long) > 0, bounds)
    drivers = kernels.segments_serial, kernels.segments_parallel
    return Work(drivers, bounds, (segments, scratch), check, crew, memory)


def _group(
    rows: Rows, target: Target, crew: Crew, memory: NDArray[np.int64] | None = None
) -> tuple[kernels.Segments, int]:
    """Group ids, sum the blocks of long segments; also the length of the longest segment."""
    n = len(rows.ids)
    empty = np.empty(0, target.dtype)
    payload = None if rows.per_id else rows.offsets
    try:
        grouping = group_ids(rows.ids, max(target.rows - 1, 0), rows.nondecreasing, payload, crew, memory)
    except ChangedError:
        raise changed_meanwhile(target) from None
    if grouping is None:
        raise too_many_bits(target, n)
    source = grouping.spare
    if rows.per_id and not fill_bags(rows.offsets, n, source):
        raise changed_meanwhile(target)
    longest, long_segments, blocks = count_long(grouping.starts, kernels.BLOCK)
    long, long_first = np.empty(long_segments, np.int64), np.zeros(long_segments + 1, np.int64)
    if long_segments:
        fill_long(grouping.starts, kernels.BLOCK, long, long_first)
    segments = kernels.Segments(
        packed=grouping.packed,
        starts=grouping.starts,
        row_shift=grouping.row_shift,
        payload_mask=grouping.payload_mask,
        values=rows.values,
        source=source,
        coefficients=empty if rows.coefficients is None else rows.coefficients,
        per_id=rows.per_id,
        long=long,
        long_first=long_first,
        block_sums=_room_for_sums(grouping.rest, (blocks, target.dim), target.dtype),
    )
    if blocks:
        block_sums = kernels.block_sums_serial, kernels.block_sums_parallel
        run(block_sums, crew, _evenly(blocks, crew.parts), segments)
    return segments, int(longest)


def _room_for_sums(spare: NDArray[Any], shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of that shape in memory that nobody needs, or, if it does not fit there, of its own."""
    size = shape[0] * shape[1] * dtype.itemsize
    unused = spare.view(np.uint8)
    start = -unused.ctypes.data % dtype.itemsize
    if size == 0 or start + size > len(unused):
        return np.empty(shape, dtype)
    return unused[start : start + size].view(dtype).reshape(shape)


def too_many_bits(target: Target, n: int) -> GradientError:
    """Say that ids cannot be packed."""
    return target.refuse(
        GradientError,
        f"{n} ids or entries into a table of {target.rows} rows of {target.dim} cannot be grouped: a "
        "position and an id take more than 63 bits together; pass the gradient in several smaller ones",
    )


# --- compressed rows --------------------------------------------------------------------------------------


def _plan_csr(checked: kernels.Compressed | Entries, target: Target, on_nonfinite: str, crew: Crew) -> Work:
    largest = _largest("data", checked.data, target, on_nonfinite, crew)
    compressed = checked
    if isinstance(compressed, Entries):
        compressed = _compress(compressed, target, crew)
        if on_nonfinite != "propagate":
            largest = largest_magnitude(compressed.data, crew)
    rows, indptr, _, data = compressed
    check = not squares_are_finite(largest, 1, target.dtype)
    if check and on_nonfinite == "raise":
        at = int(kernels.first_poisoned_row(data.reshape(-1, 1)))
        if at >= 0:
            row = int(np.searchsorted(indptr, at, side="right")) - 1
            raise overflow_error(target, int(rows[row]), 1)
        check = False
    bounds = _cut_csr(indptr, crew.parts)
    drivers = kernels.csr_serial, kernels.csr_parallel
    return Work(drivers, bounds, (compressed, _scratch(crew.parts, target.dim, target.dtype)), check, crew)


def _cut_csr(indptr: NDArray[Any], chunks: int) -> NDArray[np.int64]:
    """Cut rows into runs with about as many entries each."""
    bounds = np.searchsorted(indptr, _evenly(int(indptr[-1]), chunks)).astype(np.int64)
    bounds[0], bounds[-1] = 0, len(indptr) - 1
    return bounds


def _compress(entries: Entries, target: Target, crew: Crew) -> kernels.Compressed:
    """Sort entries by row and column, sum the repeated ones in their order, and list the rows present."""
    n = len(entries.keys)
    if n == 0:
        nothing = np.empty(0, np.int64)
        return kernels.Compressed(nothing, np.zeros(1, np.int64), nothing, entries.data)
    rows = Rows(entries.keys, entries.data[:, None], nondecreasing=False, increasing=False)
    as_column = target._replace(rows=target.rows * target.dim, dim=1)
    segments, _ = _group(rows, as_column, crew)
    sums = np.empty((len(segments.starts) - 1, 1), target.dtype)
    kernels.sum_segments(segments, sums)
    keys = segments.packed[segments.starts[:-1]] >> segments.row_shift
    row_of_entry, columns = np.divmod(keys, target.dim)
    first = np.flatnonzero(np.diff(row_of_entry, prepend=-1))
    return kernels.Compressed(row_of_entry[first], np.append(first, len(keys)), columns, sums[:, 0])


# --- values that are not finite ---------------------------------------------------------------------------


def _largest(what: str, values: NDArray[Any], target: Target, on_nonfinite: str, crew: Crew) -> float:
    """Return the largest magnitude, 0 if nobody wants to know; with "raise" refuse what is not finite."""
    if on_nonfinite == "propagate":
        return 0.0
    largest = largest_magnitude(values, crew)
    if on_nonfinite == "raise" and not largest < np.inf:
        _refuse_nonfinite(what, values, target)
    return largest


def _refuse_nonfinite(what: str, values: NDArray[Any], target: Target) -> None:
    found = np.argwhere(~np.isfinite(values))
    if not len(found):
        raise changed_meanwhile(target)
    at = tuple(int(i) for i in found[0])
    raise nonfinite_error(what, at, float(values[at]), target)


def nonfinite_error(what: str, at: tuple[int, ...], got: float, target: Target) -> GradientError:
    """Say which value is not finite; ``at`` has its row, and its place in it."""
    where = ", ".join(map(str, at[:1] if target.ndim == 1 else at))
    return target.refuse(
        NonFiniteGradientError,
        f"{what}[{where}] is {got} as {target.dtype}, expected a finite number; nothing was updated. "
        "on_nonfinite='skip' leaves out the rows that receive one, 'propagate' lets it through",
    )


def overflow_error(target: Target, row: int, ids: int) -> NonFiniteGradientError:
    """Say of which row the sum over some ids is too large."""
    return NonFiniteGradientError(
        f"gradient of table {target.name!r}: the gradient of row {row}, "
        + (f"a sum over {ids} ids, " if ids > 1 else "")
        + f"or its square, overflows {target.dtype} (at most {np.finfo(target.dtype).max:.3g}); nothing "
        "was updated. Clip the gradient, or set on_nonfinite='skip' to leave such rows out"
    )
