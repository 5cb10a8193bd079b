# SPDX-License-Identifier: Apache-2.0
"""What is in an `EmbeddingTable`: given as arrays and numbers, checked, and put into a table that is new.

For checkpoints, copies, pickles and state dicts. Rows are in the order of their ids, as int64: neither the
order of arrival nor where rows lie in memory is in the arrays, but for the number that says in which order
ids have come. So two tables with the same rows give the same arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src import options
from nb_sparse_adam._src.checkpoint.tensor_files import array_size, runs
from nb_sparse_adam._src.engine import locks
from nb_sparse_adam._src.engine.mapped import StateFolder
from nb_sparse_adam._src.engine.state import MAX_COUNT
from nb_sparse_adam._src.stepping import run_all
from nb_sparse_adam._src.table.capture import Capture
from nb_sparse_adam._src.table.locking import SharedLock, write_together
from nb_sparse_adam._src.table.records import ADMITTED, TOUCHED, ZEROS

if TYPE_CHECKING:
    from nb_sparse_adam._src.table.embedding_table import EmbeddingTable

# Of a row, in the order of ids; "steps", a number where counts are of the table; and of the table.
OF_ROWS = ("ids", "admitted", "touched", "seen", "param", "exp_avg", "exp_avg_sq")
OF_TABLE = ("counters", "ages_clock", "ages_seconds", "ages_steps")
ARRAYS = (*OF_ROWS, "steps", *OF_TABLE)
# What a table has counted, and when it is.
NUMBERS = ("clock", "steps", "admitted", "draws", "dropped", "evicted", "skipped")
# What a table was made with, beside what is set between steps and, with that, "step_counts".
MADE = (
    "name", "dim", "dtype", "initializer", "seed", "capacity", "admission", "admission_bytes", "eviction",
    "missing", "unknown",
)  # fmt: skip

_AT_ONCE = 1 << 20  # ids that get rows in one call
# All that differs between two tables of one dim, dtype and step_counts, but for name, lock and capacity.
_EXCHANGED = (
    "_admission", "_ages", "_eviction", "_evictor", "_history", "_initializer", "_missing",
    "_options", "_store", "_tables", "_unknown", "_values_of",
)  # fmt: skip


class SnapshotError(ValueError):
    """Something that no table holds; the caller, who knows where it is from, says so in front."""


# --- out of a table ---------------------------------------------------------------------------------------


def numbers_of(table: EmbeddingTable) -> dict[str, int]:
    """Return `NUMBERS`."""
    store = table._store
    found = (
        store.clock, store.steps, int(store.store["admitted"][0]), table._admission.draws,
        int(store.store["dropped"][0]), int(store.store["evicted"][0]), store.table.skipped_rows,
    )  # fmt: skip
    return dict(zip(NUMBERS, found, strict=True))


def copied(table: EmbeddingTable) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
    """Copy `ARRAYS` and `NUMBERS` of one moment, after which the table goes on."""
    capture, numbers = table._shared.read(lambda: (Capture(table), numbers_of(table)))
    try:
        return {name: array[...] for name, array in capture.arrays().items()}, numbers
    finally:
        capture.close()


def made_of(table: EmbeddingTable) -> dict[str, Any]:
    """Return `MADE`."""
    admission = table._admission
    found = (
        table.name, table.dim, table.dtype.name, table._initializer, int(table._store.store["seed"][0]),
        table.capacity, admission.given, admission.size, table._eviction, table._missing, table._unknown,
    )  # fmt: skip
    return dict(zip(MADE, found, strict=True))


def options_of(table: EmbeddingTable) -> dict[str, Any]:
    """Return those options that are set between steps, and ``step_counts``."""
    return {name: getattr(table, name) for name in options.SAVED}


def folder_of(table: EmbeddingTable) -> StateFolder | None:
    """Return where a table's rows lie in a file that is mapped, None if they do not."""
    backend: Any = table._store.table.backend
    return backend.folder  # type: ignore[no-any-return]


# --- checks -----------------------------------------------------------------------------------------------


def shapes(
    dim: int, dtype: Any, step_counts: Any, rows: int, steps: Any, counters: int, ages: int
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return dtypes and shapes of `ARRAYS`.

    Parameters
    ----------
    dim, dtype, step_counts
        Of the table.
    rows, ages : int
        How many there are.
    steps : dtype
        Of counts, int32 or int64.
    counters : int
        Of the filter, 0 if there is none.
    """
    counts = {"element": (rows, dim), "row": (rows,), "global": ()}[step_counts]
    real, word = np.dtype(dtype), np.dtype(np.int64)
    return {
        **dict.fromkeys(("ids", "admitted", "touched"), (word, (rows,))),
        "seen": (np.dtype(np.uint32), (rows,)),
        **dict.fromkeys(("param", "exp_avg", "exp_avg_sq"), (real, (rows, dim))),
        "steps": (np.dtype(steps), counts),
        "counters": (np.dtype(np.uint8), (counters,)),
        "ages_clock": (word, (ages,)),
        "ages_seconds": (np.dtype(np.float64), (ages,)),
        "ages_steps": (word, (ages,)),
    }


def check_numbers(numbers: Mapping[str, Any]) -> None:
    """Refuse what `numbers_of` does not give."""
    if set(numbers) != set(NUMBERS):
        raise SnapshotError(f"has numbers {sorted(map(str, numbers))}, expected {sorted(NUMBERS)}")
    for name, number in numbers.items():
        if type(number) is not int or not 0 <= number <= MAX_COUNT:
            raise SnapshotError(f"has {name} = {number!r}, expected an integer from 0 to 2**62")


class Checks:
    """Refuses arrays that no table has: it is given each from its beginning, piece by piece.

    Parameters
    ----------
    numbers : mapping
        `NUMBERS`, checked.
    """

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self._bounds = {
            "admitted": (1, numbers["admitted"]),
            "touched": (0, numbers["clock"]),
            "steps": (0, MAX_COUNT),
            "ages_clock": (0, numbers["clock"]),
            "ages_steps": (0, numbers["steps"]),
        }
        self._before: dict[str, NDArray[Any]] = {}  # the last number of the piece before

    def check(self, name: str, values: NDArray[Any]) -> None:
        """Check a piece of one of `ARRAYS`, or of "gone", ids that a table had."""
        if not values.size:
            return
        if name == "exp_avg_sq" and (values < 0).any():  # NaN would hide one from min()
            raise SnapshotError("has a negative number in exp_avg_sq")
        if name == "ages_seconds" and not np.isfinite(values).all():
            raise SnapshotError("has a time in ages_seconds that is not finite")
        if name in self._bounds:
            least, most = self._bounds[name]
            lowest, highest = int(values.min()), int(values.max())
            if lowest < least or highest > most:
                wrong = lowest if lowest < least else highest
                raise SnapshotError(f"has {wrong} in {name}, expected {least} to {most}")
        if name in ("ids", "gone", "ages_clock", "ages_steps"):
            followed = np.concatenate([self._before.get(name, values[:0]), values])
            before, after = followed[:-1], followed[1:]
            falls = np.flatnonzero(after < before if name == "ages_steps" else after <= before)
            if len(falls):
                at = falls[0]
                raise SnapshotError(
                    f"has {after[at]} after {before[at]} in {name}, expected numbers that increase"
                )
            self._before[name] = values[-1:].copy()


def check_order(admitted: NDArray[np.int64]) -> None:
    """Refuse an order in which ids have come that is none."""
    if len(np.unique(admitted)) != len(admitted):
        raise SnapshotError("has two ids that have come at the same place in the order")


def check_room(table: EmbeddingTable, rows: int, remedy: str) -> None:
    """Refuse more rows than a table has room for."""
    most = table._store.most_rows
    if rows > most:
        raise SnapshotError(
            f"has {rows:,} rows, expected at most {most:,}, for which table {table.name!r} has room; {remedy}"
        )


def check(table: EmbeddingTable, numbers: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Check what `copied` gave, for a table of the same options."""
    check_numbers(numbers)
    if set(arrays) != set(ARRAYS):
        raise SnapshotError(f"has arrays {sorted(map(str, arrays))}, expected {sorted(ARRAYS)}")
    expected = shapes(
        table.dim, table.dtype, table.step_counts, np.size(arrays["ids"]),
        "int64" if getattr(arrays["steps"], "dtype", None) == np.int64 else "int32",
        len(table._admission.counters), np.size(arrays["ages_clock"]),
    )  # fmt: skip
    checks = Checks(numbers)
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (dtype, shape):
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else repr(type(array))
            raise SnapshotError(f"has {name} = {got}, expected {dtype} {shape}")
        checks.check(name, array)
    check_order(arrays["admitted"])
    check_room(table, len(arrays["ids"]), "make it with a larger capacity")


# --- into a table -----------------------------------------------------------------------------------------


def new_table(
    kind: type[EmbeddingTable], made: Mapping[str, Any], given: Mapping[str, Any], folder: Any = None
) -> EmbeddingTable:
    """Make a table of what `made_of` and `options_of` gave, of which the latter has been checked."""
    values = dict(given)
    table = kind(**made, step_counts=values.pop("step_counts"), state_dir=folder)
    table._set(**values)
    return table


def fill(
    table: EmbeddingTable,
    numbers: Mapping[str, int],
    arrays: Mapping[str, Any],
    tell: Callable[[int], None] = lambda _: None,
) -> None:
    """Put `ARRAYS` and `NUMBERS`, which have been checked, into a table that is new.

    Records lie in the order in which ids have come, without gaps.

    Parameters
    ----------
    table : EmbeddingTable
    numbers, arrays : mapping
        Of arrays, "ids" and "admitted" are in memory; the others are read piece by piece.
    tell : callable
        Is told the number of bytes that have been read.
    """
    store, state = table._store, table._store.table
    ids, admitted = arrays["ids"], arrays["admitted"]
    order = np.argsort(admitted, kind="stable")
    kind = int(store.store["initializer"][0])
    store.store["initializer"] = ZEROS  # values come below
    for first in range(0, len(ids), _AT_ONCE):
        store.insert(ids[order[first : first + _AT_ONCE]], None, table.num_threads)
    store.store["initializer"] = kind
    state.room_for(store.used)
    rows = np.empty(len(ids), np.int32)
    rows[order] = np.arange(len(ids), dtype=np.int32)
    del order
    store.header(ADMITTED)[rows] = admitted
    steps = arrays["steps"]
    room = state.room_to_load(steps.dtype)()
    into = {"touched": store.header(TOUCHED), "seen": store.seen, "param": state.param, **room}
    if steps.ndim == 0:
        into.pop("steps")[...] = steps
    for name, target in into.items():
        array = arrays[name]
        for part in runs(array.shape, array.dtype):
            piece = array[part]
            target[rows[part]] = piece
            tell(array_size(piece.dtype, piece.shape))
    state.loaded(numbers["skipped"])
    store.clock = numbers["clock"]
    state.totals[0], store.store["admitted"] = numbers["steps"], numbers["admitted"]
    ages = (arrays["ages_clock"], arrays["ages_seconds"], arrays["ages_steps"])
    table._ages.entries[:] = list(zip(*(array.tolist() for array in ages), strict=True))
    admission = table._admission
    admission.counters[...] = arrays["counters"]
    admission.taken[0] = np.count_nonzero(admission.counters)
    admission.draws = numbers["draws"]
    store.store["dropped"], store.store["evicted"] = numbers["dropped"], numbers["evicted"]


def exchange(
    tables: Collection[EmbeddingTable], make: Callable[[], Mapping[EmbeddingTable, EmbeddingTable]]
) -> None:
    """Have tables go on with the content of others, of the same kind: all of them or, if it fails, none.

    Parameters
    ----------
    tables : collection of EmbeddingTable
    make : callable
        Makes the others, in the folders of those that are there.
    """
    for table in tables:
        if locks.is_lost(table._shared.writing):
            table._shared = SharedLock()  # all is written anew
    with ExitStack() as undo:
        for table in tables:
            folder = folder_of(table)
            if folder is not None:
                folder.check_process()
                undo.enter_context(folder.removed_on_error())
        pairs = make()

    def work() -> None:
        for table, other in pairs.items():
            for name in _EXCHANGED:
                setattr(table, name, getattr(other, name))

    ordered = sorted((table._shared for table in tables), key=id)  # as steps have it: no deadlock
    try:
        write_together(ordered, lambda: run_all([work]))
    finally:  # the old files go, or, if it failed, the new ones
        for table in tables:
            folder = folder_of(table)
            if folder is not None:
                folder.keep([table._store._words])
