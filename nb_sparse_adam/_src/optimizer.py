# SPDX-License-Identifier: Apache-2.0
"""`SparseAdam`: tables, hyper-parameters and state; one `step` a batch."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src import options
from nb_sparse_adam._src.annotations import DeviceChecks, OnNonfinite, StepCounts, Table
from nb_sparse_adam._src.backend import Backend, Request, backends_for
from nb_sparse_adam._src.engine import locks
from nb_sparse_adam._src.engine.mapped import StateFolder
from nb_sparse_adam._src.engine.state import TableState
from nb_sparse_adam._src.engine.threads import max_threads
from nb_sparse_adam._src.gradients import BagGradient, CSRGradient, Gradient, RowGradient
from nb_sparse_adam._src.naming import type_name
from nb_sparse_adam._src.options import Options
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.remedies import for_several_arguments, named_tables
from nb_sparse_adam._src.stepping import finish, prepare, step_alone
from nb_sparse_adam._src.tables import Tables, refuse_overlap
from nb_sparse_adam.errors import (
    GradientTypeError,
    OptionError,
    SparseAdamWarning,
    StateError,
    TableError,
)

_FORMS = (RowGradient, BagGradient, CSRGradient)


@public("nb_sparse_adam")
class SparseAdam(Tables):
    r"""Adam that reads and writes only the entries of parameter tables that a gradient touches.

    For an element θ with gradient g on its k-th active step::

        m ← β₁·m + (1−β₁)·g          v ← β₂·v + (1−β₂)·g²
        θ ← θ − lr · (m / (1−β₁ᵏ)) / (√(v / (1−β₂ᵏ)) + ε)

    and on every other step θ, m, v and k keep the very same bits. On a gradient without zeros this is
    Adam [1]_.

    Parameters
    ----------
    tables : array or mapping of str to array
        Parameters, (rows, dim) or (n,), float32 or float64, C-contiguous and writeable: updated in place.
        One array alone is called ``"table"``. NumPy arrays, or arrays on a GPU: numba's, CuPy's, torch's
        tensors, anything with ``__cuda_array_interface__`` (package numba-cuda, extra ``cuda``). A table's
        gradients are where the table is.
    lr : float, default 1e-3
        Learning rate, > 0 (0 is allowed later, for schedulers).
    betas : (float, float), default (0.9, 0.999)
        Decay rates of the running means of g and g², 0 ≤ β < 1.
    eps : float, default 1e-8
        Added to the denominator, > 0 in the dtype of every table.
    step_counts : {"element", "row", "global"}, default "element"
        What k counts, and what a step updates. "element": the steps in which this element's gradient was not
        zero; only these are updated. "row": the steps in which its row was present in the gradient; the
        whole row is updated. "global": all steps of the table, and rows that are present are updated, as
        torch.optim.SparseAdam does. Fixed for the life of the optimizer.
    eps_hat : bool, default False
        Add ε before the correction of v: θ ← θ − lr·√(1−β₂ᵏ)/(1−β₁ᵏ) · m/(√v + ε), "epsilon hat" in [1]_,
        section 2, and what torch.optim.SparseAdam does. The two differ by a factor of 31.6 in the effective
        ε at k = 1.
    maximize : bool, default False
        Ascend instead of descend.
    on_nonfinite : {"raise", "skip", "propagate"}, default "raise"
        What to do with NaN, infinity, and sums (or squares of sums) that overflow. "raise": refuse the step
        before anything is written. "skip": rows that receive one keep their bits and are counted in
        `skipped_rows`. "propagate": let it through, at the caller's risk; nothing is checked.
    num_threads : int, optional
        Threads for large steps. By default at most `numba.get_num_threads`, OMP_NUM_THREADS and the quota of
        cores of the process's control group (neither of which counts where NUMBA_NUM_THREADS is set), and
        fewer while the clock says that this is faster, beside other programs on the same cores. Results do
        not depend on it. On numba's ``workqueue`` layer, which aborts the process if two threads enter
        parallel kernels at once, it is one while other Python threads are alive.
    state_dir : path, optional
        A new or empty folder: moments and counts are kept in files there, which are mapped, instead of in
        memory. With a table that is an ``np.memmap`` (mode "r+"), both may be larger than memory: only rows
        that are touched take memory, and room on the disk. If the disk is full the system ends the process:
        see `reserve`. These are working files and no checkpoint (see `flush`), and nobody deletes them.
    reserve : bool, default False
        With `state_dir`: take all of the room on the disk when the files are made (``posix_fallocate``), so
        that a full disk is an OSError then, and later no end of the process. Counts that are widened get
        theirs before the step writes anything. Without it, there is a `SparseAdamWarning` if the file system
        has less room than the state may take. Not on macOS. File systems that write changes elsewhere
        (btrfs, ZFS) may run out of room all the same; so does a table that is an ``np.memmap`` with holes.
    device_checks : {"immediate", "deferred", "off"}, default "immediate"
        For tables on a GPU. "immediate": the host reads one word back from the GPU in each step, before
        anything is written, and raises errors at once. "deferred": it waits for nothing; a step that is
        refused, and all steps after it, write nothing, until the error is raised by a later `step` or by
        `synchronize`. "off": ids and offsets are not checked, at the caller's risk: what is out of range is
        left out without a word, or updates a wrong row. Not with ``on_nonfinite="raise"``.

    Raises
    ------
    OptionError
        For an option outside its domain (also a ValueError).
    TableError
        For a table that cannot be updated in place, or is given twice (also a ValueError).
    OSError
        If `state_dir` cannot be written to, or, with ``reserve=True``, has not enough room.

    See Also
    --------
    RowGradient, BagGradient, CSRGradient : what `step` takes, beside scipy.sparse arrays.

    References
    ----------
    .. [1] Kingma, D. P., and Ba, J., "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1.

    Examples
    --------
    >>> table = np.zeros((4, 2), np.float32)
    >>> optimizer = SparseAdam(table, lr=0.1)
    >>> optimizer.step(RowGradient([2], np.array([[1.0, 0.0]], np.float32)))
    >>> table
    array([[ 0. ,  0. ],
           [ 0. ,  0. ],
           [-0.1,  0. ],
           [ 0. ,  0. ]], dtype=float32)
    """

    # No __dict__: a misspelt option is an AttributeError, not a new attribute.
    __slots__ = ("__weakref__", "_has_streams")

    def __init__(
        self,
        tables: Table | Mapping[str, Table],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        step_counts: StepCounts = "element",
        eps_hat: bool = False,
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "raise",
        num_threads: int | None = None,
        state_dir: str | os.PathLike[str] | None = None,
        reserve: bool = False,
        device_checks: DeviceChecks = "immediate",
    ) -> None:
        self._step_counts = options.choice("step_counts", step_counts, options.STEP_COUNTS)
        self._unfinished = None
        named = named_tables(tables)
        reserve = options.flag("reserve", reserve)
        if reserve and state_dir is None:
            raise OptionError(
                "reserve is True without state_dir, expected False: it is room on a disk that is reserved"
            )
        self._folder = None if state_dir is None else StateFolder(state_dir, reserve)
        with ExitStack() as undo:
            if self._folder is not None:
                undo.callback(self._folder.remove)
            backends = backends_for(named, self._folder)
            self._tables = {
                name: backends[name].new_table(name, table, self._step_counts)
                for name, table in named.items()
            }
            refuse_overlap(self._tables)
            if self._folder is not None:
                self._folder.warn_if_too_large()
            self._has_streams = any(backend.has_streams for backend in self._backends())
            self._lock = locks.new_lock(self, "_lock")
            rate = options.learning_rate(lr, self._dtypes(), zero_allowed=False)
            # What goes with everything, until each option has been checked.
            self._options = Options(rate, (0, 0), 1, False, False, "propagate", None, "immediate")
            self.betas = betas
            self.eps = eps
            self.eps_hat = eps_hat
            self.maximize = maximize
            self.on_nonfinite = on_nonfinite
            self.num_threads = num_threads
            self.device_checks = device_checks
            undo.pop_all()

    def __repr__(self) -> str:
        tables = ", ".join(f"{name}: {table.shape} {table.dtype}" for name, table in self._tables.items())
        names = (*options.SAVED, "num_threads")
        return f"SparseAdam({{{tables}}}, {', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Tables, counts and moments of one moment, whoever steps meanwhile.

        The arrays themselves are there to be the same ones as elsewhere in the pickle; they are written to it
        later, when they may have changed. So their values are there, too: it takes the tables' size twice.
        """
        with self._lock:
            tables = self._arrays_to_copy()
            values = {name: np.array(array) for name, array in tables.items()}
            return _rebuild, (tables, self._saved(), self.num_threads, self.state_dict(), values)

    def __copy__(self) -> SparseAdam:
        """Another optimizer of the same tables."""
        with self._lock:
            return _rebuild(self._arrays_to_copy(), self._saved(), self.num_threads, self.state_dict())

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseAdam:
        """An optimizer of copies of the tables; of those that have been copied before, if there are."""
        with self._lock:
            tables = self._arrays_to_copy()
            copies = copy.deepcopy(tables, memo)
            return _rebuild(copies, self._saved(), self.num_threads, self.state_dict(), tables)

    def _arrays_to_copy(self) -> dict[str, NDArray[Any]]:
        return {name: table.array_to_copy() for name, table in self._tables.items()}

    # --- steps --------------------------------------------------------------------------------------------

    def step(
        self,
        gradient: Gradient | Sequence[Gradient] | Mapping[str, Gradient | Sequence[Gradient]],
        *others: NoReturn,
        stream: Any = None,
    ) -> None:
        """Update the tables with one gradient, or with one for each of several tables.

        Parameters
        ----------
        gradient : gradient, list of them, or mapping of str to either
            A `RowGradient`, `BagGradient`, `CSRGradient`, or scipy.sparse CSR, CSC or COO array or matrix of
            the table's shape; TensorFlow's ``IndexedSlices``, or JAX's ``BCOO`` with ``n_batch`` 0, whose
            padding is left out (both on the host only). Of a list (on the host only) the sum is taken, as if
            it were one gradient. With a mapping, the tables named in it are updated and the others are not
            touched, their counts included.
        *others
            Refused: arrays are passed as the gradient that they make up.
        stream : optional
            For tables on a GPU: the stream to run on, of numba's, CuPy's or torch's, or its address. By
            default the one that the gradient's arrays are ready on: torch's current one for torch's tensors,
            what their interface says for others, else the default stream.

        Raises
        ------
        GradientError
            If a gradient does not fit its table, is malformed, or, with ``on_nonfinite="raise"``, is not
            finite. It says what was got, what was expected and where. Nothing has been changed then, in any
            table.
        TableError
            If no table has the name that was given, or a table has been changed in place since it was given:
            its address, shape, strides, dtype, or that it can be written to.
        StateError
            If a checkpoint was restored in part.

        Notes
        -----
        Ids that occur more than once are summed first, in an order that the gradient alone fixes: the same
        gradient gives the same bits on any number of threads. Python threads that step one optimizer take
        turns. An interrupt that comes after the first write is raised when all tables have been updated.

        The gradient's arrays are read, some of them twice, until the step returns (on a GPU: until its
        kernels are done). Another thread that writes to them meanwhile, as a loader that uses a buffer again
        may, cannot make a step write outside its tables: it raises a `GradientError`, nothing being changed,
        or updates rows with a mixture of old and new numbers. A row or column that is out of range by then is
        left out. A value that has become infinite or NaN after it was looked at gets into the table, whatever
        ``on_nonfinite`` says.
        """
        if others:
            raise GradientTypeError(
                f"step got {1 + len(others)} arguments, expected one gradient, and stream by its name"
                + for_several_arguments(1 + len(others))
            )
        if self._has_streams or stream is not None:
            step_alone([(self, gradient, stream)])
        else:
            with self._lock:
                requests = self._requests(gradient)
                if len(requests) == 1:
                    requests[0].table.backend.step(requests[0])
                else:
                    finish(prepare(requests))

    def _requests(self, gradient: Any, stream: Any = None) -> list[Request]:
        """Say which tables step, and on what."""
        if self._unfinished is not None:
            self._check_whole()
        tables, current = self._tables, self._options
        if len(tables) == 1 and isinstance(gradient, _FORMS):
            (table,) = tables.values()
            requests = [Request(table, gradient, current, stream)]
            backends: tuple[Backend, ...] = (table.backend,)
        else:
            named = self._named_gradients(gradient)
            requests = [Request(tables[name], given, current, stream) for name, given in named.items()]
            backends = tuple(dict.fromkeys([request.table.backend for request in requests]))
        if stream is not None and not any(backend.has_streams for backend in backends):
            raise OptionError("step got a stream, expected None: none of the tables in it is on a GPU")
        for backend in backends:
            backend.before_step(current, tables)
        return requests

    def _named_gradients(self, gradient: Any) -> Mapping[str, Any]:
        # What is quick is asked first; and scipy's DOK is a dict.
        if isinstance(gradient, _FORMS) or not isinstance(gradient, Mapping) or hasattr(gradient, "format"):
            if len(self._tables) == 1:
                return {next(iter(self._tables)): gradient}
            names = ", ".join(map(repr, self._tables))
            raise GradientTypeError(
                f"got {type_name(gradient)} for an optimizer of {len(self._tables)} tables, expected a "
                f"mapping of table names ({names}) to gradients: step({{{next(iter(self._tables))!r}: ...}})"
            )
        named: dict[str, Any] = {}
        for name, given in gradient.items():
            if name not in self._tables:
                self._table_named("step got a gradient for table", name)
            if name in named:  # as of a mapping that holds several values of a key
                raise TableError(f"step got two gradients for table {name!r}, expected one for each table")
            named[name] = given
        return named


def tables_of(optimizer: SparseAdam) -> Mapping[str, TableState]:
    """Return an optimizer's tables, for checkpoints and PyTorch's doors; users have `SparseAdam.state`."""
    return optimizer._tables


def _rebuild(
    tables: dict[str, Any],
    given_options: Any,
    num_threads: int | None,
    state: Mapping[str, Any],
    values: Any = None,
) -> SparseAdam:
    """Unpickle: ``lr`` may be 0 by now, which the constructor refuses but `load_state_dict` does not."""
    if not isinstance(given_options, Mapping) or "step_counts" not in given_options:
        raise StateError(f"got the options {given_options!r}, expected those of a state dict")
    if isinstance(num_threads, int) and num_threads > max_threads():
        warnings.warn(
            f"an optimizer with num_threads={num_threads} was unpickled where numba can start "
            f"{max_threads()}: it uses these, and gives the same bits",
            SparseAdamWarning,
            stacklevel=2,
        )
        num_threads = max_threads()
    optimizer = SparseAdam(tables, step_counts=given_options["step_counts"], num_threads=num_threads)
    optimizer.load_state_dict(state)
    if values is not None:
        _set_values(tables_of(optimizer), values)
    return optimizer


def _set_values(tables: Mapping[str, TableState], values: Any) -> None:
    """Give the tables the values that they had when they were copied."""
    fits = isinstance(values, Mapping) and all(
        isinstance(values.get(name), np.ndarray)
        and (values[name].shape, values[name].dtype) == (table.shape, table.dtype)
        for name, table in tables.items()
    )
    if not fits:
        raise StateError("the tables' values, beside them in a pickle, are missing or do not fit")
    for name, table in tables.items():
        table.param[...] = values[name]
