# SPDX-License-Identifier: Apache-2.0
"""One table on a GPU, and Adam's state for it there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.cuda import copies
from nb_sparse_adam._src.cuda.device import (
    DEFAULT,
    Mark,
    Stream,
    address_of,
    array_from,
    as_one_row,
    blocks_for,
    copy_to_device,
    copy_to_host,
    empty,
    is_aligned,
    launch,
    ordinal_of,
    strided,
    using,
)
from nb_sparse_adam._src.cuda.records import THREADS
from nb_sparse_adam._src.engine import addresses
from nb_sparse_adam._src.engine.codecs import PLAIN
from nb_sparse_adam._src.engine.corrections import Corrections
from nb_sparse_adam._src.engine.layout import State
from nb_sparse_adam._src.engine.records import ELEMENT, GLOBAL
from nb_sparse_adam._src.engine.state import TableState
from nb_sparse_adam._src.engine.table_checks import READ_ONLY
from nb_sparse_adam._src.naming import type_name
from nb_sparse_adam._src.remedies import for_table
from nb_sparse_adam.errors import TableError, TableTypeError

if TYPE_CHECKING:
    from nb_sparse_adam._src.cuda.backend import DeviceBackend as Backend

_PIECE = 4 << 20  # elements that are copied at a time


class DeviceTable(TableState):
    """State of one table on a GPU, as `SparseAdam.state` shows it.

    Attributes
    ----------
    exp_avg, exp_avg_sq : device array of the table's shape and dtype
        Running means of the gradient and of its square (m and v): live views, not to be written to. They
        have ``copy_to_host()`` and ``__cuda_array_interface__``.
    steps : device array of integers
        Active steps so far (k), a live view; with ``step_counts="global"`` a copy, 0-d, on the host.

    Notes
    -----
    The two moments of a row lie side by side; counts lie by themselves, so that rows begin where several
    elements can be loaded at once.
    """

    def __init__(self, name: str, param: Any, step_counts: str, backend: Backend) -> None:
        self.last: Mark | None = None  # of the stream on which the memory was used last
        self.launched = 0  # steps, as `SparseAdam` of torch shows them; counted once, whatever interrupts
        self.codec = PLAIN
        super().__init__(name, param, step_counts, backend)
        self.device_totals = self._new(2, np.int64)  # see `records.TABLE`; only rows that were skipped

    def _check_table(self, name: str, param: Any) -> Any:
        where = f"table {name!r}"
        try:
            array = array_from(param)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise TableTypeError(
                f"{where} is a {type_name(param)} that cannot be seen as a device array: {error}"
                + for_table(param)
            ) from error
        if array.dtype not in (np.float32, np.float64):
            raise TableTypeError(f"{where} has dtype {array.dtype}, expected float32 or float64")
        if array.ndim not in (1, 2):
            raise TableError(f"{where} has shape {tuple(array.shape)}, expected (rows, dim) or (n,)")
        interface = getattr(param, "__cuda_array_interface__", None)
        if interface is not None and interface["data"][1]:
            raise TableError(f"{where} {READ_ONLY}; pass a copy")
        if not array.flags["C_CONTIGUOUS"] or not is_aligned(array):
            raise TableError(
                f"{where} is not C-contiguous (strides {tuple(array.strides)}) or not aligned; expected rows "
                "one after the other. Pass a contiguous copy and use that from then on"
            )
        self.ordinal = ordinal_of(array)
        return array

    def _allocate(self) -> State:
        size = self.rows * self.dim
        counts = {ELEMENT: self.dim, GLOBAL: 0}.get(self.mode, 1)
        with using(self.ordinal):
            self.matrix = as_one_row(self.param, size)
        words = self._new(2 * size, self.codec.storage(self.dtype))
        of_steps = self._new(math.prod(self.shape_of_steps), np.int64 if counts == 0 else np.int32)
        return State(words, of_steps, self.rows, self.dim, self.mode, 2 * self.dim, self.dim, counts)

    def _new(self, length: int, dtype: Any) -> Any:
        """Allocate zeros."""
        with using(self.ordinal):
            array = empty(length, dtype)
            self._launch(copies.fill, length, array, array.dtype.type(0))
        return array

    def _launch(self, kernel: Any, length: int, *arguments: Any) -> Stream:
        """Launch a kernel of which each thread takes one of so many at a time, on the stream that it returns.

        That is the default stream, behind what has used the memory last.
        """
        stream = Stream(DEFAULT)
        stream.wait_for(self.last)
        if length:
            launch(kernel, blocks_for(length, THREADS), THREADS, stream, *arguments)
            self.last = stream.mark()
        return stream

    @property
    def memory(self) -> tuple[Any, ...]:
        """What no gradient may share memory with."""
        return self.matrix, self.arrays.words, self.arrays.counts

    def _appliers(self, arrays: State) -> None:
        """Return nothing: kernels of a GPU are launched."""

    _place_in_memory = staticmethod(address_of)

    def _pairs_of(self, known: Corrections) -> Any:
        backend: Any = self.backend
        self._pairs = pairs = backend.guard.corrections(known)  # kept: the record has its address
        return pairs

    def _counted(self) -> Any:
        return self.device_totals

    @property
    def extent(self) -> tuple[int, int]:
        """Addresses of the first byte of the parameters, and of the one after the last."""
        return extent(self.param)

    def array_to_copy(self) -> NDArray[Any]:
        """Refuse to be copied or pickled."""
        raise TableError(
            "an optimizer of tables on a GPU cannot be pickled or copied: save it with "
            "nb_sparse_adam.checkpoint.save, or keep its state_dict(), which is on the host"
        )

    def live_arrays(self) -> Sequence[NDArray[Any]]:
        """Give what of the host's memory a state dict is loaded into."""
        return ()

    def check_lendable(self) -> None:
        """Refuse to lend a table that users' compiled functions cannot reach."""
        raise TableError(
            f"kernel_table of table {self.name!r}, which is on a GPU: expected one in the memory of the "
            "host, where @njit functions run. Use step"
        )

    def check_replacement(self, table: Any) -> None:  # noqa: ARG002
        """Refuse to go on with another array for a table."""
        raise TableError(
            f"rearrange of table {self.name!r}, which is on a GPU: expected both in the memory of the host. "
            "Rearrange state_dict()'s arrays, and load them into an optimizer of the new table"
        )

    # --- the user's views -------------------------------------------------------------------------------

    @property
    def skipped_rows(self) -> int:
        """How often a row was skipped; waits for the GPU."""
        return int(self._flat(self.device_totals).whole()[1])

    def set_skipped_rows(self, number: int) -> None:
        """Go on counting from another number."""
        self._flat(self.device_totals).fill(np.array([0, number]))

    @property
    def exp_avg(self) -> Any:
        """Running mean of the gradient (m)."""
        return self._moment(0)

    @property
    def exp_avg_sq(self) -> Any:
        """Running mean of the squared gradient (v)."""
        return self._moment(self.arrays.exp_avg_sq_offset)

    def _moment(self, offset: int) -> Any:
        if self.rows * self.dim == 0:
            return self.arrays.words.reshape(self.shape)
        strides = (self.arrays.state_stride, 1)[: len(self.shape)]
        return strided(self.arrays.words, offset, self.shape, strides)

    @property
    def steps(self) -> Any:
        """Active steps so far (k)."""
        if self.mode == GLOBAL:
            return self._windows()["steps"].whole()
        return self.arrays.counts.reshape(self.shape_of_steps)

    def note_place(self) -> None:
        """Note where the table lies and how, as far as its owner says."""
        self._place = _place_of(self.given)

    def check_unchanged(self) -> None:
        """Refuse a table that its owner has moved, or given another shape or dtype, since it was given."""
        place = _place_of(self.given)
        if place is not None and place != self._place:  # None: it does not say
            raise TableError(
                f"table {self.name!r} is (address, shape, strides, dtype) {place}, expected {self._place}: "
                "it was changed in place after the optimizer had been given it. Change it back, or make an "
                "optimizer of it, which loads state_dict()"
            )

    def check_writeable(self) -> None:
        """Refuse a table that its owner has changed; memory of a GPU is never read-only."""
        self.check_unchanged()

    # --- counts -----------------------------------------------------------------------------------------

    def _find_highest(self) -> int:
        counts = self._flat(self.arrays.counts)
        return max((int(piece.max(initial=0)) for piece in counts.pieces()), default=0)

    def _widen(self) -> None:
        narrow, wide = self.arrays.counts, self._wide_counts()
        with using(self.ordinal):
            self._launch(copies.convert_vector, narrow.shape[0], narrow, wide.reshape(narrow.shape[0]))
        self._set_counts(wide)  # filled: an interrupt finds the old ones or the new

    # --- to the host and back ---------------------------------------------------------------------------

    def _flat(self, array: Any) -> Window:
        """See all of a contiguous 1-D array."""
        return Window(self, array, 1, 1, 0, tuple(array.shape))

    def _windows(self) -> dict[str, Window]:
        arrays, dim, shape = self.arrays, self.dim, self.shape
        of_steps = self.shape_of_steps
        columns = dim if self.mode == ELEMENT else 1
        return {
            "param": Window(self, self.matrix, dim, dim, 0, shape),
            "exp_avg": Window(self, arrays.words, dim, arrays.state_stride, 0, shape),
            "exp_avg_sq": Window(
                self, arrays.words, dim, arrays.state_stride, arrays.exp_avg_sq_offset, shape
            ),
            "steps": Window(self, arrays.counts, columns, columns, 0, of_steps),
        }

    def arrays_to_save(self) -> dict[str, Any]:
        """Give all arrays, to be read piece by piece."""
        self.check_unchanged()
        return dict(self._windows())

    def param_to_load(self) -> Any:
        """Give the parameters, to be filled piece by piece."""
        return self._windows()["param"]

    def _arrays_to_fill(self) -> dict[str, Any]:
        return {key: window for key, window in self._windows().items() if key != "param"}

    def copy(self) -> dict[str, Any]:
        """Its part of a state dict, on the host."""
        windows = self._windows()
        return {
            **{key: windows[key].whole() for key in ("exp_avg", "exp_avg_sq", "steps")},
            "skipped_rows": self.skipped_rows,
        }

    def _fill(self, into: Any, values: NDArray[Any]) -> None:
        into.fill(values)


class Window:
    """Part of every row of a table's memory on a GPU, copied to the host and back in pieces of rows."""

    def __init__(
        self, table: DeviceTable, flat: Any, columns: int, row_stride: int, first: int, shape: tuple[int, ...]
    ) -> None:
        self.table, self.flat, self.columns = table, flat, columns
        self.row_stride, self.first = row_stride, first
        self.shape, self.dtype = shape, np.dtype(flat.dtype)
        self.ndim = len(shape)
        self.nbytes = math.prod(shape) * self.dtype.itemsize

    def reshape(self, length: int) -> Window:
        """See a single number as an array of one."""
        return Window(self.table, self.flat, self.columns, self.row_stride, self.first, (length,))

    def _span(self, rows: slice) -> tuple[int, int, int]:
        start, stop, _ = rows.indices(self.shape[0])
        return self.first + start * self.row_stride, stop - start, (stop - start) * self.columns

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        first, count, length = self._span(rows)
        shape = (count, *self.shape[1:])
        if length == 0:
            return np.empty(shape, self.dtype)
        with using(self.table.ordinal):
            out = empty(length, self.dtype)
            given = self.flat, first, self.row_stride, self.columns, out
            stream = self.table._launch(copies.gather_rows, length, *given)
            return copy_to_host(out, stream).reshape(shape)

    def __setitem__(self, rows: slice, values: NDArray[Any]) -> None:
        first, _, length = self._span(rows)
        if length == 0:
            return
        with using(self.table.ordinal):
            given = copy_to_device(np.asarray(values, self.dtype), Stream(DEFAULT))
            into = self.flat, first, self.row_stride, self.columns
            stream = self.table._launch(copies.scatter_rows, length, *into, given)
            stream.synchronize()  # what was given is freed now

    def _rows(self) -> list[slice]:
        at_once = max(1, _PIECE // max(1, self.columns))
        rows = self.shape[0]
        return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]

    def pieces(self) -> Any:
        """Yield the whole, piece by piece."""
        for rows in self._rows():
            yield self[rows]

    def whole(self) -> NDArray[Any]:
        """Copy all of it."""
        if not self.shape:
            return self.reshape(1)[0:1].reshape(())
        out = np.empty(self.shape, self.dtype)
        for rows in self._rows():
            out[rows] = self[rows]
        return out

    def fill(self, values: NDArray[Any]) -> None:
        """Take over values of its shape."""
        if not self.shape:
            self.reshape(1)[0:1] = values.reshape(1)
            return
        for rows in self._rows():
            self[rows] = values[rows]


def _place_of(given: Any) -> Any:
    """Address, shape, strides and dtype of an array; None if it does not say."""
    try:
        interface = given.__cuda_array_interface__
    except (AttributeError, RuntimeError):  # the simulator's arrays; a tensor that requires a gradient by now
        return None
    shape, strides = interface["shape"], interface.get("strides")
    return (
        interface["data"][0],
        tuple(shape),
        None if strides is None else tuple(strides),
        interface["typestr"],
    )


def extent(array: Any) -> tuple[int, int]:
    """Addresses of the first byte of an array and of the one behind its last; it may have gaps."""
    address = address_of(array)
    return addresses.extent(array, address) if array.size else (address, address)
