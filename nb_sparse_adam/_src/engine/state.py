# SPDX-License-Identifier: Apache-2.0
"""One parameter table and Adam's state for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.addresses import address_of, pointer_to
from nb_sparse_adam._src.engine.apply import apply_for
from nb_sparse_adam._src.engine.codecs import PLAIN
from nb_sparse_adam._src.engine.corrections import Corrections, corrections
from nb_sparse_adam._src.engine.layout import State, allocate
from nb_sparse_adam._src.engine.pacing import Paces
from nb_sparse_adam._src.engine.rearranging import checked_source, take_rows
from nb_sparse_adam._src.engine.records import ELEMENT, GLOBAL, ROW, TABLE, packer
from nb_sparse_adam._src.engine.table_checks import READ_ONLY, check_table, refuse_outside, to_load
from nb_sparse_adam._src.gradients import Target, on_gpu
from nb_sparse_adam._src.kernels import LentTable, lent
from nb_sparse_adam._src.options import Options
from nb_sparse_adam._src.views import StateView
from nb_sparse_adam.errors import StateError, StateTypeError, TableError

if TYPE_CHECKING:
    from nb_sparse_adam._src.backend import Backend

STATE_VERSION = 1

MODES = {"element": ELEMENT, "row": ROW, "global": GLOBAL}
MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1
MAX_COUNT = 2**62  # of what is loaded: as many steps again, and more than can be, fit into 64 bits

_pack_table = packer(TABLE).pack


class Described(NamedTuple):
    """A table as a step is given it."""

    arrays: State
    options: Options
    record: NDArray[np.void]  # (1,) `records.TABLE`
    address: int  # of the record
    corrections: Corrections
    appliers: Any  # `Appliers`, on the host


class TableState:
    """One table in the memory of the host, and Adam's state for it.

    The two moments of a row lie side by side, and so do the counts where a row has as many as elements, or is
    short: a row's update then touches two places in memory, its parameters and its record, and not four. The
    memory comes zeroed from the system, and costs nothing until a row is touched; NumPy asks for pages of
    2 MB where the system has them, which doubles the speed of updates at random rows and makes 2 MB the grain
    of what a touched row occupies.
    """

    one_record = False  # whether all of a row, its parameters too, is one piece of memory

    def __init__(self, name: str, param: Any, step_counts: str, backend: Backend) -> None:
        self.name = name
        self.backend = backend
        self.given = param
        self.param = self._check_table(name, param)
        self.step_counts = step_counts
        self.mode = MODES[step_counts]
        self._shape = tuple(self.param.shape)
        self._dtype: np.dtype[Any] = self.param.dtype
        self.rows: int = self._shape[0]
        self.dim: int = self._shape[1] if len(self._shape) == 2 else 1
        self.param_stride = self.dim
        self.note_place()
        self.target = Target(name, self.rows, self.dim, len(self._shape), self._dtype, backend.reader)
        self.arrays = self._allocate()
        self.totals = np.zeros(2, np.int64)  # steps that were applied, rows that were skipped
        self.paces = Paces()
        self._described: Described | None = None
        self.is_lent = False  # to a user's own kernel
        self._highest_count = 0  # no count is above this

    def __repr__(self) -> str:
        return f"TableState({self.name!r}, {self.shape} {self.dtype}, steps {self.arrays.counts.dtype})"

    def _check_table(self, name: str, param: Any) -> Any:
        return check_table(name, param)

    def _allocate(self) -> State:
        self.matrix = np.asarray(self.param).reshape(self.rows, self.dim)
        return allocate(self.rows, self.dim, self._dtype, PLAIN, self.mode, self._new)

    def _new(self, length: int, dtype: Any) -> Any:
        """Allocate zeros, 1-D, for state."""
        host: Any = self.backend
        return host.zeros(length, dtype)

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
        words, counts = self.arrays[:2]
        return (self.matrix, words) if self.arrays.shares_memory else (self.matrix, words, counts)

    @property
    def skipped_rows(self) -> int:
        """How often a row was skipped."""
        return int(self.totals[1])

    @property
    def exp_avg(self) -> Any:
        """Running mean of the gradient (m)."""
        return _read_only(self._shaped(self.arrays.exp_avg))

    @property
    def exp_avg_sq(self) -> Any:
        """Running mean of the squared gradient (v)."""
        return _read_only(self._shaped(self.arrays.exp_avg_sq))

    @property
    def steps(self) -> Any:
        """Active steps so far (k)."""
        return _read_only(self._steps())

    def _steps(self) -> NDArray[Any]:
        """All counts, writeable, in the shape of `steps`."""
        counts = self.arrays.steps
        if self.mode == GLOBAL:
            return counts.reshape(())
        return counts[:, 0] if self.mode == ROW else self._shaped(counts)

    def _shaped(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """See (rows, dim) in the table's shape."""
        return matrix[:, 0] if len(self._shape) == 1 else matrix

    @property
    def extent(self) -> tuple[int, int]:
        """Addresses of the first byte of the parameters, and of the one after the last."""
        start = address_of(self.matrix)
        return start, start + self.matrix.nbytes

    def note_place(self) -> None:
        """Note where the table lies and how, to see before each use that it still does."""
        self._strides, self._flags = self.param.strides, self.param.flags.num
        self._pointer = pointer_to(self.param)
        self._address = self._pointer.value

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

    @property
    def view(self) -> StateView:
        """What users see of it."""
        return StateView(self)

    def array_to_copy(self) -> NDArray[Any]:
        """Give the parameters, for a copy or a pickle."""
        self.check_unchanged()
        return self.param  # type: ignore[no-any-return]

    def live_arrays(self) -> Sequence[NDArray[Any]]:
        """Give what a state dict is loaded into."""
        return self.memory[1:]

    def check_lendable(self) -> None:
        """Refuse to lend a table that users' compiled functions cannot reach."""

    def lent(self, options: Options) -> LentTable:
        """Give what a user's own compiled function is passed."""
        described = self.described(options)
        arrays, record, known = described.arrays, described.record, described.corrections
        skips = options.on_nonfinite == "skip"
        return lent(self.matrix, record, arrays.words, arrays.counts, known.pairs, skips)

    def check_replacement(self, table: Any) -> None:
        """Refuse to go on with another array for a table now, or with one that is elsewhere."""
        if on_gpu(table):
            raise TableError(
                f"rearrange of table {self.name!r}, by an array on a GPU: expected both in the memory of the "
                "host. Rearrange state_dict()'s arrays, and load them into an optimizer of the new table"
            )
        if self.is_lent:
            raise TableError(
                f"rearrange of table {self.name!r} within a kernel_table block, which goes on with the "
                "arrays that it was lent: rearrange after it"
            )

    def corrections(self, options: Options) -> Corrections:
        """Bias corrections for its dtype."""
        return corrections(*options.betas, options.eps_hat, self._dtype)

    def described(self, options: Options) -> Described:
        """Say what kernels need to know of it: made once, and again if an option or the memory has changed.

        It is of one moment, and keeps what the record has addresses of: a step within this one, in a signal
        handler, may exchange the memory, and the cache of corrections lets go of those that are rarely used.
        """
        found = self._described
        if found is None or found.arrays is not self.arrays or found.options is not options:
            arrays, known = self.arrays, self.corrections(options)
            (beta1, beta2), number = options.betas, self._dtype.type
            sign = -1 if options.maximize else 1
            reals = (beta1, 1 - beta1, beta2, 1 - beta2, options.lr, options.eps, sign)
            packed = bytearray(_pack_table(
                *self._places(arrays, known), *(float(number(real)) for real in reals), *known.log_betas,
            ))  # fmt: skip
            record, appliers = np.frombuffer(packed, TABLE), self._appliers(arrays)
            found = self._described = Described(
                arrays, options, record, address_of(record), known, appliers
            )  # fmt: skip
        return found

    def _places(self, arrays: State, known: Corrections) -> tuple[int, ...]:
        """Return the fields of its record that say where things are, and which they are."""
        words, counts, *_ = arrays
        pairs, place = self._pairs_of(known), self._place_in_memory
        return (
            place(self.matrix), self.matrix.size, self.param_stride, self.rows, self.dim,
            0, 0, 0, 0, 0,
            place(words), words.size, arrays.state_stride, arrays.exp_avg_sq_offset,
            place(counts), counts.size, arrays.count_stride, self.mode,
            place(pairs), pairs.size, known.complete, known.eps_hat,
            place(self._counted()),
        )  # fmt: skip

    _place_in_memory: Callable[[Any], int] = staticmethod(address_of)

    def _pairs_of(self, known: Corrections) -> Any:
        """Return corrections where kernels can read them."""
        return known.pairs

    def _counted(self) -> Any:
        """Return what kernels count in; see `records.TABLE`."""
        return self.totals

    def _appliers(self, arrays: State) -> Any:
        """Return what applies gradients to tables of its kind."""
        return apply_for(self._dtype, PLAIN, arrays.counts.dtype, self.mode, self.one_record)

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
        return int(self.arrays.steps.max(initial=0))

    def _widen(self) -> None:
        """Go on with counts of 64 bits."""
        while self.arrays.counts.dtype == np.int32:
            arrays, wide = self.arrays, self._wide_counts()
            wide[...] = arrays.steps
            self._exchange(arrays, arrays.with_counts(wide))  # filled: an interrupt finds these or the old

    def _wide_counts(self) -> NDArray[np.int64]:
        """Make room for all counts in 64 bits."""
        if self.is_lent:
            raise TableError(
                f"table {self.name!r} needs counts of 64 bits within a kernel_table block, which goes on "
                "with those that it was lent: step or load after it"
            )
        return self.arrays.wide_counts(self._new)

    def _set_counts(self, counts: NDArray[np.int64]) -> None:
        """Go on with wider counts, in memory of their own."""
        arrays = self.arrays
        self._exchange(arrays, arrays.with_counts(counts))

    def _exchange(self, old: State, new: State) -> None:
        """Go on with other arrays, unless a signal handler's step has put others in the place of the old."""
        self.backend.memory_changed()  # before as well: whatever interrupts, the next step looks again
        if self.arrays is old:
            self.arrays = new
        self.backend.memory_changed()

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
        return self.matrix.reshape(self._shape)

    def room_to_load(self, steps: np.dtype[Any]) -> Callable[[], dict[str, Any]]:
        """Allocate what is needed to take over counts of a dtype; int64 may need more room.

        Returns
        -------
        callable
            Gives exp_avg, exp_avg_sq and steps, writeable, to be filled piece by piece, and cannot fail; when
            they are filled, call `loaded`. Until it is called, nothing has changed.
        """
        wider = self._wide_counts() if self.arrays.counts.dtype.itemsize < steps.itemsize else None

        def arrays() -> dict[str, Any]:
            if wider is not None:
                self._set_counts(wider)
            self._highest_count = MAX_INT32  # should it be filled in part: look at all before the next step
            return self._arrays_to_fill()

        return arrays

    def _arrays_to_fill(self) -> dict[str, Any]:
        """Give exp_avg, exp_avg_sq and steps, writeable."""
        kept = self.arrays
        moments = {"exp_avg": self._shaped(kept.exp_avg), "exp_avg_sq": self._shaped(kept.exp_avg_sq)}
        return {**moments, "steps": self._steps()}

    def loaded(self, skipped_rows: int) -> None:
        """Take note that all arrays have been filled."""
        self.set_skipped_rows(skipped_rows)
        self._highest_count = self._find_highest()

    def use_memory_of(self, other: TableState) -> None:
        """Go on with the parameters and the state of another table of the same kind."""
        self.param, self.matrix, self.arrays = other.param, other.matrix, other.arrays
        self.note_place()
        self.backend.memory_changed()

    def set_skipped_rows(self, number: int) -> None:
        """Go on counting from another number."""
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
        new = TableState(self.name, param, self.step_counts, self.backend)
        if new.arrays.counts.dtype != self.arrays.counts.dtype:
            new._set_counts(new._wide_counts())
        strides = self.arrays.state_stride, self.arrays.count_stride
        # Where counts lie in the records of the moments, they come along.
        for flat, into, columns in zip(self.memory[1:], new.memory[1:], strides, strict=False):
            if columns:
                take_rows(source, _as_bits(flat), columns, _as_bits(into))
            else:  # one count for the table
                into[...] = flat
        new._highest_count = self._highest_count
        new.totals[:] = self.totals
        new.paces = self.paces
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
            key: to_load(f"{where}: {key}", given[key], live) for key in ("exp_avg", "exp_avg_sq", "steps")
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
        refuse_outside(f"{where}: steps", steps, MAX_COUNT)
        refuse_outside(f"{where}: exp_avg_sq", arrays["exp_avg_sq"])
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
            self.set_skipped_rows(skipped)
            self._highest_count = highest

        return load

    def _fill(self, into: Any, values: NDArray[Any]) -> None:
        """Set all of one of the arrays that `room_to_load` gives."""
        into[...] = values

    def _filling(self, steps: NDArray[Any], *moments: NDArray[Any]) -> Callable[[], None]:
        """Allocate what is needed to take over counts and moments; return what does it, and cannot fail."""
        fits = int(steps.max(initial=0)) <= np.iinfo(self.arrays.counts.dtype).max
        arrays = self.room_to_load(self.arrays.counts.dtype if fits else np.dtype(np.int64))

        def fill() -> None:
            into = arrays()
            for key, values in zip(("exp_avg", "exp_avg_sq", "steps"), (*moments, steps), strict=True):
                self._fill(into[key], values)

        return fill


def _as_bits(flat: NDArray[Any]) -> NDArray[Any]:
    """See numbers as unsigned integers: copied as such, they keep their bits whatever they are."""
    return flat.view(f"u{flat.itemsize}")


def _read_only(view: NDArray[Any]) -> NDArray[Any]:
    view = view.view()
    view.flags.writeable = False
    return view
