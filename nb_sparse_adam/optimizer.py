"""`SparseAdam`: tables, hyper-parameters and state; one `step` a batch."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam import options
from nb_sparse_adam.engine import kernels, locks
from nb_sparse_adam.engine.batching import Part
from nb_sparse_adam.engine.corrections import Corrections, corrections
from nb_sparse_adam.engine.kernels import Hyperparameters
from nb_sparse_adam.engine.mapped import StateFolder
from nb_sparse_adam.engine.planning import size_of
from nb_sparse_adam.engine.runs import finish, prepare
from nb_sparse_adam.engine.state import STATE_VERSION, News, TableState
from nb_sparse_adam.engine.threads import max_threads
from nb_sparse_adam.errors import (
    GradientTypeError,
    OptionError,
    SparseAdamWarning,
    StateError,
    StateTypeError,
    TableError,
    TableTypeError,
)
from nb_sparse_adam.gradients import HOST, Places, Target, check, on_gpu

__all__ = ["SparseAdam", "step_together"]

UNNAMED = "table"


class SparseAdam:
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
    device_checks : {"immediate", "deferred", "off"}, default "immediate"
        For tables on a GPU. "immediate": the host reads one word back from the GPU in each step, before
        anything is written, and raises errors at once. "deferred": it waits for nothing; a step that is
        refused, and all steps after it, write nothing, until the error is raised by a later `step` or by
        `synchronize`. "off": ids and offsets are not checked, at the caller's risk: what is out of range is
        left out without a word, or updates a wrong row. Not with ``on_nonfinite="raise"``.
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
    .. [1] D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1.

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
    __slots__ = (
        "__weakref__",
        "_betas",
        "_device_checks",
        "_eps",
        "_eps_hat",
        "_folder",
        "_for_kernels",
        "_guard",
        "_lock",
        "_lr",
        "_maximize",
        "_news",
        "_num_threads",
        "_on_nonfinite",
        "_places",
        "_step_counts",
        "_tables",
        "_unfinished",
    )
    _betas: tuple[float, float]
    _eps: float
    _eps_hat: bool
    _lr: float
    _maximize: bool
    _num_threads: int | None
    _on_nonfinite: str

    def __init__(
        self,
        tables: NDArray[Any] | Mapping[str, NDArray[Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        step_counts: str = "element",
        eps_hat: bool = False,
        maximize: bool = False,
        on_nonfinite: str = "raise",
        num_threads: int | None = None,
        state_dir: str | os.PathLike[str] | None = None,
        reserve: bool = False,
        device_checks: str = "immediate",
    ) -> None:
        self._step_counts = options.choice("step_counts", step_counts, options.STEP_COUNTS)
        self._unfinished: str | None = None  # why tables and state are not of one moment
        named = _named_tables(tables)
        reserve = options.flag("reserve", reserve)
        if reserve and state_dir is None:
            raise OptionError(
                "reserve is True without state_dir, expected False: it is room on a disk that is reserved"
            )
        self._folder = None if state_dir is None else StateFolder(state_dir, reserve)
        with ExitStack() as undo:
            if self._folder is not None:
                undo.callback(self._folder.remove)
            zeros = None if self._folder is None else self._folder.zeros
            self._tables = {
                name: _new_table(name, table, self._step_counts, zeros) for name, table in named.items()
            }
            _refuse_overlap(self._tables)
            if self._folder is not None:
                self._folder.warn_if_too_large()
            self._guard = _new_guard(self._tables)
            self._on_nonfinite, self._device_checks = "propagate", "immediate"
            self._news = News()
            self._places: Places | None = None
            for table in self._tables.values():
                table.news = self._news
            self._lock = locks.new_lock(self, "_lock")
            self._for_kernels: dict[tuple[str, bool], tuple[Any, kernels.Table]] = {}
            self._lr = options.learning_rate(lr, self._dtypes(), zero_allowed=False)
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
        return (
            f"SparseAdam({{{tables}}}, lr={self.lr}, betas={self.betas}, eps={self.eps}, "
            f"step_counts={self.step_counts!r}, eps_hat={self.eps_hat}, maximize={self.maximize}, "
            f"on_nonfinite={self.on_nonfinite!r}, num_threads={self.num_threads})"
        )

    def _arrays_to_copy(self) -> dict[str, NDArray[Any]]:
        if self._guard is not None:
            raise TableError(
                "an optimizer of tables on a GPU cannot be pickled or copied: save it with "
                "nb_sparse_adam.checkpoint.save, or keep its state_dict(), which is on the host"
            )
        for table in self._tables.values():
            table.check_unchanged()
        return {name: table.param for name, table in self._tables.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Tables, counts and moments of one moment, whoever steps meanwhile.

        The arrays themselves are there to be the same ones as elsewhere in the pickle; they are written to it
        later, when they may have changed. So their values are there, too: it takes the tables' size twice.
        """
        with self._lock:
            tables = self._arrays_to_copy()
            values = {name: np.array(array) for name, array in tables.items()}
            return _rebuild, (tables, self._options(), self.num_threads, self.state_dict(), values)

    def __copy__(self) -> SparseAdam:
        """Another optimizer of the same tables."""
        with self._lock:
            return _rebuild(self._arrays_to_copy(), self._options(), self.num_threads, self.state_dict())

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseAdam:
        """An optimizer of copies of the tables; of those that have been copied before, if there are."""
        with self._lock:
            tables = self._arrays_to_copy()
            copies = copy.deepcopy(tables, memo)
            return _rebuild(copies, self._options(), self.num_threads, self.state_dict(), tables)

    # --- options ------------------------------------------------------------------------------------------

    @property
    def lr(self) -> float:
        """Learning rate, 0 ≤ lr < ∞; settable between steps."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._set(_lr=options.learning_rate(value, self._dtypes(), zero_allowed=True))

    @property
    def betas(self) -> tuple[float, float]:
        """Decay rates (β₁, β₂), 0 ≤ β < 1; settable between steps."""
        return self._betas

    @betas.setter
    def betas(self, value: tuple[float, float]) -> None:
        self._set(_betas=options.decay_rates(value, self._dtypes()))

    @property
    def eps(self) -> float:
        """Term added to the denominator, > 0; settable between steps."""
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._set(_eps=options.epsilon(value, self._dtypes()))

    @property
    def eps_hat(self) -> bool:
        """Whether ε is added before the correction of v; settable between steps."""
        return self._eps_hat

    @eps_hat.setter
    def eps_hat(self, value: bool) -> None:
        self._set(_eps_hat=options.flag("eps_hat", value))

    @property
    def maximize(self) -> bool:
        """Whether steps ascend; settable between steps."""
        return self._maximize

    @maximize.setter
    def maximize(self, value: bool) -> None:
        self._set(_maximize=options.flag("maximize", value))

    @property
    def on_nonfinite(self) -> str:
        """What happens to values that are not finite; settable between steps."""
        return self._on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, value: str) -> None:
        value = options.choice("on_nonfinite", value, options.ON_NONFINITE)
        _refuse_unseen(value, self._device_checks)
        self._set(_on_nonfinite=value)

    @property
    def num_threads(self) -> int | None:
        """Threads for large steps, None for numba's setting or fewer; settable between steps."""
        return self._num_threads

    @num_threads.setter
    def num_threads(self, value: int | None) -> None:
        value = options.threads(value)
        if value is not None and all(table.on_gpu for table in self._tables.values()):
            raise OptionError(
                f"num_threads is {value}, expected None: all tables are on a GPU, with threads of its own"
            )
        self._set(_num_threads=value)

    @property
    def device_checks(self) -> str:
        """When gradients of tables on a GPU are checked, and who waits; settable between steps."""
        return self._device_checks

    @device_checks.setter
    def device_checks(self, value: str) -> None:
        value = options.choice("device_checks", value, options.DEVICE_CHECKS)
        if value != "immediate" and self._guard is None:
            raise OptionError(
                f"device_checks is {value!r}, expected 'immediate': no table is on a GPU, and what is on the "
                "host is always checked"
            )
        _refuse_unseen(self._on_nonfinite, value)
        if self._device_checks != "immediate":
            self.synchronize()
        self._set(_device_checks=value)

    @property
    def step_counts(self) -> str:
        """What k counts: "element", "row" or "global"; fixed."""
        return self._step_counts

    def _set(self, **values: Any) -> None:
        with self._lock:
            self._for_kernels.clear()  # first: an interrupt must not leave kernels with the old values
            for name, value in values.items():
                setattr(self, name, value)
            self._for_kernels.clear()  # a signal handler may have stepped meanwhile

    def _dtypes(self) -> set[np.dtype[Any]]:
        return {table.dtype for table in self._tables.values()}

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in options.SAVED}

    def _constants(self) -> Hyperparameters:
        (beta1, beta2), sign = self._betas, -1 if self._maximize else 1
        return Hyperparameters(beta1, 1 - beta1, beta2, 1 - beta2, self._lr, self._eps, sign)

    def _corrections(self, table: TableState) -> Corrections:
        return corrections(*self._betas, self._eps_hat, table.dtype)

    def _arrays_for_kernels(self, table: TableState, check: bool) -> kernels.Table:
        """What kernels need to know of a table; kept until an option or the table's memory changes."""
        arrays, made = self._for_kernels.get((table.name, check), (None, None))
        if made is None or arrays is not table.arrays:
            arrays = table.arrays
            known = self._corrections(table)
            constants = self._constants()
            settings = kernels.Settings(
                moment_stride=arrays.moment_stride,
                count_stride=arrays.count_stride,
                mode=table.mode,
                eps_hat=known.eps_hat,
                complete=known.complete,
                check=check,
            )
            made = kernels.Table(
                param=arrays.param,
                moments=arrays.moments,
                counts=arrays.counts,
                corrections=known.pairs,
                log_betas=known.log_betas,
                hyperparameters=np.array(constants, table.dtype),
                settings=np.array(settings, np.int64),
                totals=table.totals,
            )
            self._for_kernels[table.name, check] = arrays, made
        return made

    # --- steps --------------------------------------------------------------------------------------------

    def step(self, gradient: Any, *, stream: Any = None) -> None:
        """Update the tables with one gradient, or with one for each of several tables.

        Parameters
        ----------
        gradient : gradient or mapping of str to gradient
            A `RowGradient`, `BagGradient`, `CSRGradient`, or scipy.sparse CSR, CSC or COO array or matrix of
            the table's shape. With a mapping, the tables named in it are updated and the others are not
            touched, their counts included.
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
        if self._guard is None:
            with self._lock:
                finish(prepare(self._parts(gradient, stream)))
        else:
            _step([self], lambda: finish(prepare(self._parts(gradient, stream))))

    def _parts(self, gradient: Any, stream: Any = None) -> list[Any]:
        """Check a step's gradients."""
        if self._unfinished is not None:
            self._check_whole()
        if self._folder is not None:
            self._folder.check_process()
        named = self._named_gradients(gradient)
        if stream is not None and not any(self._tables[name].on_gpu for name in named):
            raise OptionError("step got a stream, expected None: none of the tables in it is on a GPU")
        if self._guard is not None and self._device_checks != "immediate":
            self._guard.raise_what_is_known()
        return [self._check(self._tables[name], given, stream) for name, given in named.items()]

    def _check_whole(self) -> None:
        """Refuse to go on from tables and state that are not of one moment."""
        if self._unfinished is not None:
            raise StateError(self._unfinished)

    def _named_gradients(self, gradient: Any) -> Mapping[str, Any]:
        if not isinstance(gradient, Mapping) or hasattr(gradient, "format"):  # scipy's DOK is a dict
            if len(self._tables) == 1:
                return {next(iter(self._tables)): gradient}
            names = ", ".join(map(repr, self._tables))
            raise GradientTypeError(
                f"got {type(gradient).__name__} for an optimizer of {len(self._tables)} tables, expected a "
                f"mapping of table names ({names}) to gradients: step({{{next(iter(self._tables))!r}: ...}})"
            )
        for name in gradient:
            if name not in self._tables:
                names = ", ".join(map(repr, self._tables))
                raise TableError(f"step got a gradient for table {name!r}, expected one of {names}")
        return gradient

    def _check(self, table: TableState, gradient: Any, stream: Any) -> Any:
        if table.on_gpu:
            from nb_sparse_adam.cuda.steps import part_of
            from nb_sparse_adam.cuda.table import DeviceTable

            assert isinstance(table, DeviceTable)
            table.check_unchanged()
            return part_of(
                table, gradient, self._guard, self._on_nonfinite, self._device_checks, stream,
                self._constants(), self._corrections(table),
            )  # fmt: skip
        start = time.perf_counter()
        table.check_writeable()
        if self._places is None or self._news.memory:
            self._news.memory = False
            tables = [other for other in self._tables.values() if not other.on_gpu]
            self._places = Places([array for other in tables for array in other.memory])
        target = Target(table.name, table.rows, table.dim, len(table.shape), table.dtype, self._places, HOST)
        checked = check(gradient, target)
        size, for_kernels = size_of(checked, target), self._arrays_for_kernels
        seconds = time.perf_counter() - start
        return Part(table, target, checked, size, self._on_nonfinite, self._num_threads, for_kernels, seconds)

    @contextmanager
    def kernel_table(self, name: str | None = None) -> Iterator[kernels.LentTable]:
        """Lend a table to a user's own ``@njit`` function, which updates it with `apply_row_gradient`.

        For trainers whose loop goes from sample to sample: skip-gram, matrix factorization, Hogwild.

        Parameters
        ----------
        name : str, optional
            Which table; not needed if there is only one.

        Yields
        ------
        tuple
            To be passed to compiled functions, its first member, ``param``, being the (rows, dim)
            parameters. Use it inside the ``with`` block only: other steps of this optimizer wait until
            the block is left. With ``step_counts="global"`` the block is one step of the table.

        Raises
        ------
        TableError
            If no table has that name, or several could be meant, or the table has been changed in place.
        OptionError
            With ``on_nonfinite="raise"``: a loop that has begun to write cannot refuse a whole step.

        Notes
        -----
        After the block, the next step reads all counts of the table once, to see that there is room.

        A function with ``@njit(cache=True)`` is compiled anew after an upgrade of this package: the tuple's
        type is another one in every version of the kernels.

        Examples
        --------
        >>> from numba import njit
        >>> from nb_sparse_adam import apply_row_gradient
        >>> @njit
        ... def pull(table, row, target):
        ...     apply_row_gradient(table, row, table.param[row] - target)
        >>> optimizer = SparseAdam(np.zeros((4, 2), np.float32), lr=0.1, on_nonfinite="skip")
        >>> with optimizer.kernel_table() as table:
        ...     pull(table, 2, np.ones(2, np.float32))
        >>> optimizer.tables["table"][2]
        array([0.1, 0.1], dtype=float32)
        """
        with self._lock:
            table = self._table_named("kernel_table", name)
            if table.on_gpu:
                raise TableError(
                    f"kernel_table of table {table.name!r}, which is on a GPU: expected one in the memory of "
                    "the host, where @njit functions run. Use step"
                )
            if self._on_nonfinite == "raise":
                raise OptionError(
                    "kernel_table with on_nonfinite='raise': a loop that has begun to write cannot refuse a "
                    "whole step; set optimizer.on_nonfinite = 'skip' (apply_row_gradient then leaves such a "
                    "row out and returns False) or 'propagate'"
                )
            self._check_whole()
            if self._folder is not None:
                self._folder.check_process()
            table.check_writeable()
            table.make_room_for_a_step()
            was_lent = table.is_lent  # by a block around this one
            try:
                table.is_lent = True
                yield kernels.lent(self._arrays_for_kernels(table, self._on_nonfinite == "skip"))
            finally:
                if table.mode == kernels.GLOBAL:  # before any call, after which an interrupt may come
                    table.arrays.counts[0] += table.arrays.counts[0] < 2**63 - 1
                table.is_lent = was_lent
                table.counts_have_changed()

    def _table_named(self, caller: str, name: str | None) -> TableState:
        if name is None and len(self._tables) == 1:
            return next(iter(self._tables.values()))
        if name not in self._tables:
            names = ", ".join(map(repr, self._tables))
            raise TableError(f"{caller} got {name!r}, expected one of {names}")
        return self._tables[name]

    # --- state --------------------------------------------------------------------------------------------

    @property
    def tables(self) -> Mapping[str, NDArray[Any]]:
        """The parameter tables by name: the arrays that were given."""
        return MappingProxyType({name: table.given for name, table in self._tables.items()})

    @property
    def state(self) -> Mapping[str, TableState]:
        """State of each table: ``exp_avg``, ``exp_avg_sq`` and ``steps``, read-only live views."""
        return MappingProxyType(self._tables)

    @property
    def skipped_rows(self) -> Mapping[str, int]:
        """For each table, how often a row was left out of a step by ``on_nonfinite="skip"``."""
        return MappingProxyType({name: table.skipped_rows for name, table in self._tables.items()})

    def synchronize(self) -> None:
        """Wait until all steps on a GPU are done; with tables of the host there is nothing to wait for.

        Raises
        ------
        GradientError
            With ``device_checks="deferred"``, if a step was refused. That step, and all that were called
            after it, have changed nothing; the next one is a new beginning.
        """
        with self._lock:
            if self._guard is not None:
                self._guard.raise_what_is_wrong()

    def flush(self) -> None:
        """Write to their files what steps have changed in `state_dir`, and in tables that are ``np.memmap``.

        The system does so by itself, sooner or later, in an order of its own: between two calls the files are
        no state of any moment. What survives a crash is a checkpoint.
        """
        with self._lock:
            if self._folder is not None:
                self._folder.flush()
            for table in self._tables.values():
                if isinstance(table.param, np.memmap):
                    table.param.flush()

    def state_dict(self) -> dict[str, Any]:
        """Copy the state and the hyper-parameters, without the tables.

        Returns
        -------
        dict
            ``{"version": 1, "options": {...}, "tables": {name: {"exp_avg", "exp_avg_sq", "steps",
            "skipped_rows"}}}``: arrays of the shapes of `state`, copied.

        Raises
        ------
        StateError
            If a checkpoint was restored in part.
        """
        with self._lock:
            self._check_whole()
            self.synchronize()
            return {
                "version": STATE_VERSION,
                "options": self._options(),
                "tables": {name: table.copy() for name, table in self._tables.items()},
            }

    def _set_values(self, values: Any) -> None:
        """Give the tables the values that they had when they were copied."""
        fits = isinstance(values, Mapping) and all(
            isinstance(values.get(name), np.ndarray)
            and (values[name].shape, values[name].dtype) == (table.shape, table.dtype)
            for name, table in self._tables.items()
        )
        if not fits:
            raise StateError("the tables' values, beside them in a pickle, are missing or do not fit")
        for name, table in self._tables.items():
            table.param[...] = values[name]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave: training goes on with the same bits.

        Parameters
        ----------
        state_dict : mapping
            From an optimizer with the same table names, shapes, dtypes and ``step_counts``.

        Raises
        ------
        StateError
            If something is missing, unknown, or does not fit; nothing has been changed then.

        Notes
        -----
        Arrays may be views of this very state. An interrupt that comes after the first write is raised when
        everything has been loaded.
        """
        given_options, given_tables = _check_state_dict(state_dict, self._tables)
        values = options.check_saved(given_options, self._dtypes(), self._step_counts)
        with self._lock:
            if self._folder is not None:
                self._folder.check_process()
            self.synchronize()
            on_host = [table for table in self._tables.values() if not table.on_gpu]
            live = [array for table in on_host for array in table.memory[1:]]
            with nullcontext() if self._folder is None else self._folder.removed_on_error():
                loads = [table.check_load(given_tables[name], live) for name, table in self._tables.items()]
            _do_all([*loads, lambda: self._set(**values)])

    def rearrange(self, table: NDArray[Any], source: Any, name: str | None = None) -> None:
        """Go on with another array for a table, whose rows take moments and counts of rows of the old one.

        For rows that come, go or change places: a vocabulary that grows, users that are dropped, Gaussians
        that are split and pruned. To append, prune, reorder and reset rows are all this one thing.

        Parameters
        ----------
        table : (rows, dim) or (n,) array
            Takes the place of the old one; its values are yours, and are not touched. Of the old one's dtype
            and dim, with any number of rows. It may share memory with the old one, or be the same array.
        source : (rows,) integer array
            For each row of `table` the row of the old one whose moments and counts it takes, -1 for a fresh
            row: moments and counts are 0. A row that is named more than once is copied for each.
        name : str, optional
            Which table; not needed if there is only one.

        Raises
        ------
        TableError
            If `table` cannot be updated in place, is of another dtype or dim, or shares memory with another
            table; if no table has that name; if the table is on a GPU, or lent by `kernel_table`. Nothing has
            been changed then, nor if memory, or room in `state_dir`, does not suffice.
        StateError
            If `source` is malformed, or names a row that is not there.

        Notes
        -----
        The count of ``step_counts="global"`` and `skipped_rows` are of the whole table, and stay. State is
        allocated once more, and the old one is let go, as is the old array: arrays, and a table's state, that
        were read before still show the old ones. Not to be called from a signal handler, which may come in
        the middle of a step: it would go on with the old array.

        Examples
        --------
        >>> optimizer = SparseAdam(np.zeros((3, 2), np.float32), step_counts="row")
        >>> optimizer.step(RowGradient([0, 2, 2], np.ones((3, 2), np.float32)))
        >>> kept = np.array([2, 0])  # row 1 goes, the others change places, and one is new
        >>> table = np.concatenate([optimizer.tables["table"][kept], np.ones((1, 2), np.float32)])
        >>> optimizer.rearrange(table, np.append(kept, -1))
        >>> optimizer.state["table"].steps
        array([1, 1, 0], dtype=int32)
        """
        with self._lock:
            old = self._table_named("rearrange", name)
            if old.on_gpu or on_gpu(table):
                raise TableError(
                    f"rearrange of table {old.name!r}, "
                    + ("which is on a GPU" if old.on_gpu else "by an array on a GPU")
                    + ": expected both in the memory of the host. Rearrange state_dict()'s arrays, and load "
                    "them into an optimizer of the new table"
                )
            if old.is_lent:
                raise TableError(
                    f"rearrange of table {old.name!r} within a kernel_table block, which goes on with the "
                    "arrays that it was lent: rearrange after it"
                )
            self._check_whole()
            if self._folder is not None:
                self._folder.check_process()
            with nullcontext() if self._folder is None else self._folder.removed_on_error():
                new = old.rearranged(table, source)
                _refuse_overlap({**self._tables, old.name: new})
            self._forget_memory()  # before the one assignment: whatever interrupts leaves the old or the new
            self._tables[old.name] = new
            self._forget_memory()  # a signal handler may have stepped in between
            if self._folder is not None:
                self._folder.keep([each for table in self._tables.values() for each in table.memory[1:]])

    def _forget_memory(self) -> None:
        """Let go what is kept from step to step of where tables and their state lie."""
        self._places = None
        self._for_kernels.clear()


def step_together(steps: Sequence[tuple[SparseAdam, Any]]) -> None:
    """Step several optimizers as one: everything is checked before anything is written.

    Parameters
    ----------
    steps : sequence of (SparseAdam, gradient)
        Each optimizer once, with what its `SparseAdam.step` takes.

    Raises
    ------
    GradientError, TableError
        As `SparseAdam.step`; nothing has been changed then, in any table of any optimizer.
    """
    if len({id(optimizer) for optimizer, _ in steps}) != len(steps):
        raise OptionError("step_together got an optimizer twice, expected each of them once")
    _step(
        [optimizer for optimizer, _ in steps],
        lambda: finish(prepare([part for optimizer, given in steps for part in optimizer._parts(given)])),
    )


def _do_all(works: Sequence[Callable[[], None]]) -> None:
    """Do everything, again if it is interrupted, and raise the interrupt then."""
    interrupt: BaseException | None = None
    for _ in range(100):  # an exception that comes back every time is not an interrupt
        try:
            for work in works:
                work()
            break
        except BaseException as error:  # noqa: BLE001 (raised below)
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _new_table(name: str, table: Any, step_counts: str, zeros: Any) -> TableState:
    if not on_gpu(table):
        return TableState(name, table, step_counts, zeros)
    if zeros is not None:
        raise OptionError(
            f"state_dir with table {name!r}, which is on a GPU: expected tables in the memory of the host, "
            "whose state can be mapped from files"
        )
    from nb_sparse_adam.cuda.table import DeviceTable

    return DeviceTable(name, table, step_counts)


def _new_guard(tables: Mapping[str, TableState]) -> Any:
    """What the tables on a GPU share; None if there are none."""
    found: list[Any] = [table for table in tables.values() if table.on_gpu]
    if not found:
        return None
    if len({table.ordinal for table in found}) > 1:
        places = ", ".join(f"{table.name!r} on GPU {table.ordinal}" for table in found)
        raise TableError(f"got tables on several GPUs ({places}), expected one: use an optimizer for each")
    from nb_sparse_adam.cuda.guard import Guard

    guard = Guard(found[0].ordinal)
    guard.tables = found
    return guard


def _refuse_unseen(on_nonfinite: str, device_checks: str) -> None:
    if device_checks == "off" and on_nonfinite == "raise":
        raise OptionError(
            "device_checks='off' with on_nonfinite='raise': nobody would see that a gradient is refused; set "
            "on_nonfinite to 'skip', which leaves out rows without telling the host, or to 'propagate'"
        )


def _step(optimizers: Sequence[SparseAdam], work: Callable[[], None]) -> None:
    """Do the work of a step while no other Python thread steps these optimizers."""
    guards = {optimizer._guard for optimizer in optimizers if optimizer._guard is not None}
    locks.hold(
        [optimizer._lock for optimizer in sorted(optimizers, key=id)],  # one order: no deadlock
        lambda: _step_on_gpu(guards, work) if guards else work(),
    )


_stepping: set[Any] = set()  # guards of the optimizers whose tables on a GPU are in a step


def _step_on_gpu(guards: set[Any], work: Callable[[], None]) -> None:
    if not guards.isdisjoint(_stepping):
        raise TableError(
            "step of tables on a GPU within a step of the same tables, as a signal handler may call it: they "
            "have one memory to work in. Set a flag there, and step when the step is done"
        )
    try:
        _stepping.update(guards)  # all or none, whatever signal handler raises
        work()
    finally:
        _stepping.difference_update(guards)


def _named_tables(tables: Any) -> Mapping[str, Any]:
    if not isinstance(tables, Mapping):
        return {UNNAMED: tables}
    if not tables:
        raise TableError("got an empty mapping of tables, expected at least one: SparseAdam({'user': array})")
    for name in tables:
        if not isinstance(name, str):
            raise TableTypeError(f"got a table named {name!r} ({type(name).__name__}), expected str names")
    return tables


def _refuse_overlap(tables: Mapping[str, TableState]) -> None:
    seen: list[TableState] = []
    for table in tables.values():
        for other in seen:
            if table.overlaps(other):
                raise TableError(
                    f"tables {other.name!r} and {table.name!r} share memory, expected separate arrays: each "
                    "would undo the other's update. Give every table once"
                )
        seen.append(table)


def _check_state_dict(given: Any, tables: Mapping[str, TableState]) -> tuple[Any, Mapping[str, Any]]:
    if not isinstance(given, Mapping):
        raise StateTypeError(f"got {type(given).__name__}, expected the mapping that state_dict() returns")
    keys = {"version", "options", "tables"}
    if set(given) != keys:
        raise StateError(f"state dict has keys {sorted(map(str, given))}, expected {sorted(keys)}")
    version = given["version"]
    is_number = isinstance(version, (int, float, np.number, np.ndarray)) and not isinstance(version, bool)
    if not is_number or np.ndim(version) or version != STATE_VERSION:
        raise StateError(
            f"state dict has version {version!r}, expected {STATE_VERSION}: it was written by "
            "another version of nb_sparse_adam"
        )
    if not isinstance(given["tables"], Mapping):
        raise StateTypeError(
            f"state dict's tables are a {type(given['tables']).__name__}, expected a mapping"
        )
    if set(given["tables"]) != set(tables):
        raise StateError(
            f"state dict is for tables {sorted(map(str, given['tables']))}, expected {sorted(tables)}"
        )
    return given["options"], given["tables"]


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
        optimizer._set_values(values)
    return optimizer
