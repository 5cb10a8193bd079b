"""One parameter table and Adam's state for it."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam.engine.grouping import Buffers
from nb_sparse_adam.engine.intrinsics import CACHE_LINE
from nb_sparse_adam.engine.kernels import ELEMENT, GLOBAL, ROW, TableArrays
from nb_sparse_adam.engine.pacing import Paces
from nb_sparse_adam.engine.rearranging import checked_source, take_rows
from nb_sparse_adam.errors import StateError, StateTypeError, TableError, TableTypeError

__all__ = ["STATE_VERSION", "TableState"]

STATE_VERSION = 1

MODES = {"element": ELEMENT, "row": ROW, "global": GLOBAL}
Zeros = Callable[[int, "np.dtype[Any]"], NDArray[Any]]  # (length, dtype) -> (length,) zeros
READ_ONLY = "is read-only, expected a writeable array: it is updated in place"
MAX_INT32 = np.iinfo(np.int32).max
MAX_COUNT = 2**62  # of what is loaded: as many steps again, and more than can be, fit into 64 bits


class News:
    """What an optimizer is told by its tables.

    Attributes
    ----------
    memory : bool
        Whether one of them has other memory than before.
    """

    memory = False


class TableState:
    """State of one table, as `SparseAdam.state` shows it.

    Attributes
    ----------
    exp_avg, exp_avg_sq : array of the table's shape and dtype
        Running means of the gradient and of its square (m and v). Read-only live views: 0 before the first
        step.
    steps : integer array
        Active steps so far (k): of the table's shape for ``step_counts="element"``, (rows,) for "row", 0-d
        for "global". A read-only live view.

    Notes
    -----
    The two moments of a row lie side by side, and so do the counts where a row has as many as elements, or is
    short: a row's update then touches two places in memory, its parameters and its record, and not four. The
    memory comes zeroed from the system, and costs nothing
    until a row is touched; NumPy asks for pages of 2 MB where the system has them, which doubles the
    speed of updates at random rows and makes 2 MB the grain of what a touched row occupies.
    """

    on_gpu = False

    def __init__(self, name: str, param: Any, step_counts: str, zeros: Zeros | None = None) -> None:
        self.name = name
        self.given = param
        self.param = self._check_table(name, param)
        self.step_counts = step_counts
        self.mode = MODES[step_counts]
        self._shape = tuple(self.param.shape)
        self._dtype: np.dtype[Any] = self.param.dtype
        self.rows: int = self._shape[0]
        self.dim: int = self._shape[1] if len(self._shape) == 2 else 1
        self.note_place()
        self._zeros = _zeros if zeros is None else zeros
        self.arrays = self._allocate()
        self.totals = np.zeros(2, np.int64)  # see kernels.Table
        self.buffers = Buffers()
        self.paces = Paces()
        self.addresses: tuple[Any, tuple[int, ...]] | None = None  # of `batching`
        self.news = News()
        self.is_lent = False  # to a user's own kernel
        self._highest_count = 0  # no count is above this

    def __repr__(self) -> str:
        return f"TableState({self.name!r}, {self.shape} {self.dtype}, steps {self.arrays.counts.dtype})"

    def _check_table(self, name: str, param: Any) -> Any:
        return _check_table(name, param)

    def _allocate(self) -> TableArrays:
        param = np.asarray(self.param).reshape(self.rows, self.dim)
        return _allocate(param, self.mode, self._zeros)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter table, as it was given."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the parameter table, as it was given, and of its moments."""
        return self._dtype

    @property
    def shape_of_steps(self) -> tuple[int, ...]:
        """Shape of `steps`."""
        return {ELEMENT: self.shape, ROW: self.shape[:1], GLOBAL: ()}[self.mode]

    @property
    def memory(self) -> tuple[NDArray[Any], ...]:
        """What no gradient may share memory with."""
        param, moments, counts = self.arrays[:3]
        return (param, moments) if np.may_share_memory(moments, counts) else (param, moments, counts)

    @property
    def skipped_rows(self) -> int:
        """How often a row was skipped."""
        return int(self.totals[1])

    @property
    def exp_avg(self) -> NDArray[Any]:
        """Running mean of the gradient (m)."""
        return self._moment(0)

    @property
    def exp_avg_sq(self) -> NDArray[Any]:
        """Running mean of the squared gradient (v)."""
        return self._moment(1)

    @property
    def steps(self) -> NDArray[Any]:
        """Active steps so far (k)."""
        return _read_only(self._steps())

    def _steps(self) -> NDArray[Any]:
        """All counts, writeable, in the shape of `steps`."""
        counts = self._counts()
        if self.mode == GLOBAL:
            return counts.reshape(())
        return counts[:, 0] if self.mode == ROW or len(self._shape) == 1 else counts

    def _counts(self) -> NDArray[Any]:
        """All counts, writeable: (rows, dim), (rows, 1) or (1, 1)."""
        arrays = self.arrays  # looked up once: another thread that reads meets one layout or the next
        rows, columns = _shape_of_counts(self.rows, self.dim, self.mode)
        return _strided(arrays.counts, rows, columns, arrays.count_stride)

    def _moments(self, which: int) -> NDArray[Any]:
        """exp_avg (0) or exp_avg_sq (1), (rows, dim), writeable."""
        flat = self.arrays.moments[which * self.dim :]
        return _strided(flat, self.rows, self.dim, self.arrays.moment_stride)

    def _moment(self, which: int) -> NDArray[Any]:
        moment = self._moments(which)
        return _read_only(moment[:, 0] if len(self._shape) == 1 else moment)

    def overlaps(self, other: TableState) -> bool:
        """Whether two tables share memory."""
        return not other.on_gpu and bool(np.may_share_memory(self.param, other.param))

    def note_place(self) -> None:
        """Note where the table lies and how, to see before each use that it still does."""
        self._strides, self._flags = self.param.strides, self.param.flags.num
        self._pointer = _pointer_of(self.param)
        self._address = self._pointer.value

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_pointer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.note_place()

    def check_unchanged(self) -> None:
        """Refuse a table that its owner has moved, or given another shape or dtype, since it was given.

        We have views of it that do not know: a step would write to freed memory, or a save write what no
        optimizer loads.
        """
        param = self.param
        if (
            self._pointer.value != self._address
            or param.shape != self._shape
            or param.strides != self._strides
            or param.dtype != self._dtype
        ):
            raise TableError(
                f"table {self.name!r} is {param.shape} {param.dtype} of strides {param.strides} at address "
                f"{self._pointer.value}, expected {self._shape} {self._dtype} of strides {self._strides} at "
                f"{self._address}: it was changed in place after the optimizer had been given it. Change it "
                "back, or pass the array that goes on to optimizer.rearrange"
            )

    def check_writeable(self) -> None:
        """Refuse a table that its owner has changed, or made read-only: our view of it would not know.

        Every step asks, so it is asked for one number first: contiguous arrays of one shape have one layout.
        """
        param = self.param
        if (
            param.flags.num != self._flags
            or self._pointer.value != self._address
            or param.shape != self._shape
            or param.dtype != self._dtype
        ):
            self.check_unchanged()
            if not param.flags.writeable:
                raise TableError(f"table {self.name!r} {READ_ONLY}; set table.flags.writeable = True")

    def make_room_for_a_step(self) -> None:
        """Widen the counts before one of them could overflow. Changes no value."""
        if self.arrays.counts.dtype == np.int32:
            if self._highest_count >= MAX_INT32:
                self._highest_count = self._find_highest()
            if self._highest_count >= MAX_INT32:
                self._widen()
        self._highest_count += 1

    def _find_highest(self) -> int:
        """Look at all counts for the highest."""
        return int(self._counts().max(initial=0))

    def _widen(self) -> None:
        """Go on with counts of 64 bits."""
        wide = self._wide_zeros()
        wide[...] = self._counts()
        self._set_counts(wide)  # filled: an interrupt finds the old ones or the new

    def _wide_zeros(self) -> NDArray[np.int64]:
        """Make room for all counts in 64 bits."""
        shape = _shape_of_counts(self.rows, self.dim, self.mode)
        return self._zeros(math.prod(shape), np.dtype(np.int64)).reshape(shape)

    def _set_counts(self, counts: NDArray[np.int64]) -> None:
        """Go on with wider counts, in memory of their own."""
        stride = 0 if self.mode == GLOBAL else counts.shape[1]
        self.news.memory = True
        self.arrays = self.arrays._replace(counts=counts.reshape(-1), count_stride=stride)

    def counts_have_changed(self) -> None:
        """Take note that a user's own kernel has stepped, nobody knows how often."""
        if self.arrays.counts.dtype == np.int32:
            self._highest_count = MAX_INT32  # look at all of them before the next step

    def copy(self) -> dict[str, Any]:
        """Its part of a state dict."""
        return {
            "exp_avg": self.exp_avg.copy(),
            "exp_avg_sq": self.exp_avg_sq.copy(),
            "steps": self.steps.copy(),
            "skipped_rows": self.skipped_rows,
        }

    def arrays_to_save(self) -> dict[str, Any]:
        """Give all arrays, the parameters first; to be read piece by piece.

        Raises
        ------
        TableError
            If the table has been changed since it was given.
        """
        self.check_unchanged()
        state = {name: getattr(self, name) for name in ("exp_avg", "exp_avg_sq", "steps")}
        return {"param": self.param_to_load(), **state}

    def param_to_load(self) -> Any:
        """Give the parameters, to be filled piece by piece."""
        return self.arrays.param.reshape(self._shape)

    def room_to_load(self, steps: np.dtype[Any]) -> Callable[[], dict[str, Any]]:
        """Allocate what is needed to take over counts of a dtype; int64 may need more room.

        Returns
        -------
        callable
            Gives exp_avg, exp_avg_sq and steps, writeable, to be filled piece by piece, and cannot fail; when
            they are filled, call `loaded`. Until it is called, nothing has changed.
        """
        wider = self._wide_zeros() if self.arrays.counts.dtype.itemsize < steps.itemsize else None

        def arrays() -> dict[str, Any]:
            if wider is not None:
                self._set_counts(wider)
            self._highest_count = MAX_INT32  # should it be filled in part: look at all before the next step
            first, second = (self._moments(which) for which in (0, 1))
            if len(self._shape) == 1:
                first, second = first[:, 0], second[:, 0]
            return {"exp_avg": first, "exp_avg_sq": second, "steps": self._steps()}

        return arrays

    def loaded(self, skipped_rows: int) -> None:
        """Take note that all arrays have been filled."""
        self._set_skipped_rows(skipped_rows)
        self._highest_count = self._find_highest()

    def _set_skipped_rows(self, number: int) -> None:
        self.totals[1] = number

    def rearranged(self, param: Any, source: Any) -> TableState:
        """Make the state of another table, whose rows take moments and counts of this one's. Changes nothing.

        Parameters
        ----------
        param : array
            Of the dtype and dim of this one.
        source : integer array
            For each of its rows the row of this one, -1 for none.
        """
        where = f"rearrange of table {self.name!r}"
        checked = self._check_table(self.name, param)
        if checked.dtype != self.dtype or tuple(checked.shape[1:]) != self.shape[1:]:
            expected = str(("rows", *self.shape[1:])).replace("'", "")
            raise TableError(
                f"{where}: got a table of {tuple(checked.shape)} {checked.dtype}, expected {expected} "
                f"{self.dtype}: rows come and go, and stay what they are"
            )
        source = checked_source(where, source, checked.shape[0], self.rows)
        new = TableState(self.name, param, self.step_counts, self._zeros)
        if new.arrays.counts.dtype != self.arrays.counts.dtype:
            new._set_counts(new._wide_zeros())
        strides = self.arrays.moment_stride, self.arrays.count_stride
        # Where counts lie in the records of the moments, they come along.
        for flat, into, columns in zip(self.memory[1:], new.memory[1:], strides, strict=False):
            if columns:
                take_rows(source, _as_bits(flat), columns, _as_bits(into))
            else:  # one count for the table
                into[...] = flat
        new._highest_count = self._highest_count
        new.totals[:] = self.totals
        new.buffers, new.paces, new.news = self.buffers, self.paces, self.news
        return new

    def check_load(self, given: Any, live: Sequence[NDArray[Any]] = ()) -> Callable[[], None]:
        """Check its part of a state dict; return what loads it, may be repeated, and cannot fail.

        Parameters
        ----------
        given : mapping
        live : sequence of array
            What is written to when this is loaded, or what else is: given arrays that share memory with it
            are copied.
        """
        where = f"state dict, table {self.name!r}"
        if not isinstance(given, Mapping):
            raise StateTypeError(f"{where}: got {type(given).__name__}, expected a mapping")
        keys = {"exp_avg", "exp_avg_sq", "steps", "skipped_rows"}
        if set(given) != keys:
            raise StateError(f"{where}: has entries {sorted(map(str, given))}, expected {sorted(keys)}")
        arrays = {
            key: _to_load(f"{where}: {key}", given[key], live) for key in ("exp_avg", "exp_avg_sq", "steps")
        }
        for key in ("exp_avg", "exp_avg_sq"):
            if arrays[key].shape != self.shape or arrays[key].dtype != self.dtype:
                raise StateError(
                    f"{where}: {key} is {arrays[key].shape} {arrays[key].dtype}, expected {self.shape} "
                    f"{self.dtype}"
                )
        steps = arrays["steps"]
        if steps.shape != self.shape_of_steps or steps.dtype not in (np.int32, np.int64):
            raise StateError(
                f"{where}: steps is {steps.shape} {steps.dtype}, expected {self.shape_of_steps} int32 or "
                "int64"
            )
        _refuse_outside(f"{where}: steps", steps, MAX_COUNT)
        _refuse_outside(f"{where}: exp_avg_sq", arrays["exp_avg_sq"])
        skipped = given["skipped_rows"]
        if isinstance(skipped, bool) or not isinstance(skipped, (int, np.integer)):
            raise StateError(f"{where}: skipped_rows is {skipped!r}, expected an integer >= 0")
        if not 0 <= skipped <= MAX_COUNT:
            raise StateError(f"{where}: skipped_rows is {skipped}, expected 0 <= skipped_rows <= 2**62")
        skipped = int(skipped)
        fill = self._filling(steps, arrays["exp_avg"], arrays["exp_avg_sq"])
        highest = int(steps.max(initial=0))

        def load() -> None:
            fill()
            self._set_skipped_rows(skipped)
            self._highest_count = highest

        return load

    def _filling(self, steps: NDArray[Any], *moments: NDArray[Any]) -> Callable[[], None]:
        """Allocate what is needed to take over counts and moments; return what does it, and cannot fail."""
        wider = None
        if int(steps.max(initial=0)) > np.iinfo(self.arrays.counts.dtype).max:
            wider = self._wide_zeros()

        def fill() -> None:
            if wider is not None:
                self._set_counts(wider)
            counts = self._counts()
            counts[...] = steps.reshape(counts.shape)
            for which, moment in enumerate(moments):
                self._moments(which)[...] = moment.reshape(self.rows, self.dim)

        return fill


class _Slow:
    """The address of an array's first element, as NumPy says it."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    @property
    def value(self) -> int:
        return int(self._array.__array_interface__["data"][0])


def _pointer_of(array: NDArray[Any]) -> Any:
    """Something whose ``value`` is where an array's memory begins, now and later.

    To ask NumPy takes a microsecond, in which a small step does a tenth of its work. The pointer is the first
    thing after the header of Python's object, for every compiled extension reads it there.
    """
    slow = _Slow(array)
    quick = ctypes.c_void_p.from_address(id(array) + object.__basicsize__)
    return quick if sys.implementation.name == "cpython" and quick.value == slow.value else slow


def _shape_of_counts(rows: int, dim: int, mode: int) -> tuple[int, int]:
    return {ELEMENT: (rows, dim), ROW: (rows, 1), GLOBAL: (1, 1)}[mode]


def _allocate(param: NDArray[Any], mode: int, zeros: Zeros) -> TableArrays:
    """Lay out a table's state: a record a row, of two moments and, where it pays, its counts.

    A row's one count goes into the record of short rows only. Where two moments fill whole cache lines, a
    record with a count would lie on a line more, as often as counts of their own cost one.
    """
    rows, dim = param.shape
    size = param.itemsize
    count_rows, columns = _shape_of_counts(rows, dim, mode)
    record = 2 * dim * size + columns * 4
    short = record <= CACHE_LINE
    if (mode == ELEMENT or (mode == ROW and short)) and record % size == 0:
        moments = zeros(rows * record // size, param.dtype)
        counts = moments.view(np.int32)[2 * dim * size // 4 :]
        return TableArrays(param, moments, counts, record // size, record // 4)
    dtype = np.dtype(np.int64 if mode == GLOBAL else np.int32)
    stride = 0 if mode == GLOBAL else columns
    counts = zeros(count_rows * columns, dtype)
    return TableArrays(param, zeros(2 * rows * dim, param.dtype), counts, 2 * dim, stride)


def _strided(flat: NDArray[Any], rows: int, columns: int, stride: int) -> NDArray[Any]:
    strides = (stride * flat.itemsize, flat.itemsize)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), strides)


def _as_bits(flat: NDArray[Any]) -> NDArray[Any]:
    """See numbers as unsigned integers: copied as such, they keep their bits whatever they are."""
    return flat.view(f"u{flat.itemsize}")


def _zeros(length: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that begin at a cache line, so that a row touches no more lines than it must.

    NumPy begins 16 bytes after one: of a table of dim 16, whose rows are as long as a line, every row would
    lie on two.
    """
    size = length * dtype.itemsize
    memory = np.zeros(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + size].view(dtype)


def _check_table(name: str, table: Any) -> NDArray[Any]:
    where = f"table {name!r}"
    if not isinstance(table, np.ndarray) or isinstance(table, np.ma.MaskedArray):
        raise TableTypeError(
            f"{where} is a {type(table).__name__}, expected a numpy.ndarray: it is updated in place"
        )
    if table.dtype.kind != "f" or table.dtype.itemsize not in (4, 8) or not table.dtype.isnative:
        raise TableTypeError(
            f"{where} has dtype {table.dtype}, expected float32 or float64 in native byte order"
        )
    if table.ndim not in (1, 2):
        raise TableError(f"{where} has shape {table.shape}, expected (rows, dim) or (n,)")
    if not table.flags.writeable:
        raise TableError(f"{where} {READ_ONLY}; pass a copy")
    if not table.flags.c_contiguous or not table.flags.aligned:
        raise TableError(
            f"{where} is not C-contiguous (strides {table.strides}) or not aligned; expected rows one after "
            "the other. Pass np.ascontiguousarray(table) and use that array from then on"
        )
    return table


def _read_only(view: NDArray[Any]) -> NDArray[Any]:
    view = view.view()
    view.flags.writeable = False
    return view


def _to_load(what: str, given: Any, live: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """See what was given as an array; a copy, if it would change while others are loaded."""
    try:
        array = np.asarray(given)
    except Exception as error:
        raise StateTypeError(f"{what} cannot be read as an array: {error}") from error
    return array.copy() if any(np.may_share_memory(array, other) for other in live) else array


def _refuse_outside(what: str, values: NDArray[Any], most: int | None = None) -> None:
    """Refuse numbers that are negative or too large; NaN is neither, and would hide one from min()."""
    wrong = values < 0 if most is None else (values < 0) | (values > most)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        expected = "no negative values" if values[at] < 0 else "at most 2**62, for counts go on from there"
        raise StateError(f"{what}{list(at)} is {values[at]}, expected {expected}")
