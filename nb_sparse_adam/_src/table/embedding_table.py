# SPDX-License-Identifier: Apache-2.0
"""`EmbeddingTable`: rows that are named by ids, and come to be as ids appear."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nb_sparse_adam._src import options
from nb_sparse_adam._src.annotations import BagMode, OnNonfinite, StepCounts
from nb_sparse_adam._src.engine.host import HostBackend
from nb_sparse_adam._src.engine.mapped import StateFolder
from nb_sparse_adam._src.options import Options
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.table.admission import Admission
from nb_sparse_adam._src.table.ages import Ages
from nb_sparse_adam._src.table.checks import read_offsets, read_reals, real, whole
from nb_sparse_adam._src.table.copies import reduced
from nb_sparse_adam._src.table.eviction import Eviction, Evictor, check_eviction
from nb_sparse_adam._src.table.history import History
from nb_sparse_adam._src.table.initializers import Initializer, read_initializer
from nb_sparse_adam._src.table.locking import SharedLock
from nb_sparse_adam._src.table.records import GIVEN
from nb_sparse_adam._src.table.store import MOST_ROWS, Store
from nb_sparse_adam._src.table.updates import Missing, Updates
from nb_sparse_adam.errors import GradientError, GradientTypeError, OptionError, OptionTypeError

Unknown = Literal["zeros", "initial"]


@public("nb_sparse_adam")
class EmbeddingTable(Updates):
    """A table whose rows are named by 64-bit ids, and come to be as ids appear.

    The engine's table with an index of ids in front: an update has the bits of `SparseAdam` on a table of the
    same rows.

    Parameters
    ----------
    dim : int
        Numbers of a row.
    initializer : str or callable, default "normal(0, 0.01)"
        Initial values: "zeros", "normal(mean, std)", "uniform(low, high)", or a callable that is given (n,)
        int64 ids and returns (n, dim) numbers; it is called while nobody else can use the table, and must
        not use it. Those that are drawn depend on the seed and the id alone: not on the order in which ids
        come, nor on threads or the machine.
    seed : int, default 0
        Of initial values, and of what `admission` draws. 64 bits of it are used.
    lr, betas, eps, step_counts, eps_hat, maximize, on_nonfinite, num_threads
        As in `SparseAdam`; but ``step_counts`` is "row" by default.
    dtype : dtype, default float32
        Of values, float32 or float64.
    state_dtype : dtype, optional
        Of moments: that of values.
    capacity : int, optional
        The most rows there may be. By default as many as the machine has memory for: addresses are reserved
        for them, and take memory when there are rows.
    admission : int or float, optional
        When an id that is looked up in training gets a row. None: at once. An int n: when it is seen for the
        n-th time, as a filter of `admission_bytes` counts, whose counts may be too large. A float p: each
        time with that probability. Until then a look-up gives its initial value, and what it gets as a
        gradient is dropped.
    admission_bytes : int, default 2**24
        Size of the filter. See the notes.
    eviction : Eviction, optional
        Which rows go by themselves. See also `evict`.
    missing : {"drop", "raise"}, default "drop"
        What an update does with an id that has no row: leave its gradient out and count it (`stats`), or
        refuse the step. A number that is not finite is refused even there, as `on_nonfinite` says.
    unknown : {"zeros", "initial"}, default "zeros"
        What ``lookup(train=False)`` gives for an id that has no row.
    state_dir : path, optional
        As in `SparseAdam`: a new folder in which rows are kept in a file that is mapped. With `capacity`.
    name : str, default "table"
        What messages call it.

    Raises
    ------
    OptionError
        For an option outside its domain (also a ValueError).
    TableError
        If the system does not give addresses for that many rows.

    See Also
    --------
    SparseAdam : for tables whose rows are numbered from 0.

    Notes
    -----
    *Ids* are integers of any width (unsigned ones stand for the int64 of the same bits), or strings, each of
    which stands for the blake2b hash of its UTF-8, 8 bytes, read as a little-endian int64.

    *Growth* moves no row: the table lies in addresses that have been reserved. A row takes ``32 + 3·dim``
    numbers' bytes (and four more an element with ``step_counts="element"``), its place in the index 17 to 24.

    *The filter* of ``admission=n`` is a count-min sketch of `admission_bytes` counters in four rows, with
    conservative updates: a count is never too small, and too large for at most one in 16 of the ids, as long
    as half of the counters are 0. When more are taken, all counts are halved: what was seen once is forgotten
    then. It remembers those whose rows have gone, too: they get a row again when they are seen next.

    *Threads*: look-ups with ``train=False`` run side by side; everything else waits until it is alone. Not to
    be called from signal handlers.

    Examples
    --------
    >>> table = EmbeddingTable(2, initializer="zeros", lr=0.1)
    >>> table.lookup([2**63, 7])
    array([[0., 0.],
           [0., 0.]], dtype=float32)
    >>> table.update([7, 12], np.ones((2, 2), np.float32))  # 12 has never been looked up
    >>> table.export()
    (array([-9223372036854775808,                    7]), array([[ 0. ,  0. ],
           [-0.1, -0.1]], dtype=float32))
    >>> table.stats()["dropped"]
    1
    """

    __slots__ = ("__weakref__", "_admission", "_initializer", "_unknown")

    def __init__(
        self,
        dim: int,
        *,
        initializer: Initializer = "normal(0, 0.01)",
        seed: int = 0,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        step_counts: StepCounts = "row",
        eps_hat: bool = False,
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "raise",
        num_threads: int | None = None,
        dtype: Any = np.float32,
        state_dtype: Any = None,
        capacity: int | None = None,
        admission: int | float | None = None,
        admission_bytes: int = 1 << 24,
        eviction: Eviction | None = None,
        missing: Missing = "drop",
        unknown: Unknown = "zeros",
        state_dir: str | os.PathLike[str] | None = None,
        name: str = "table",
    ) -> None:
        if not isinstance(name, str):
            raise OptionTypeError(f"name is {name!r} ({type(name).__name__}), expected a string")
        self._name = name
        dim = whole("dim", dim, 1, 1 << 20)
        self._step_counts: StepCounts = options.choice("step_counts", step_counts, options.STEP_COUNTS)
        dtype_of = real("dtype", dtype)
        if state_dtype is not None and real("state_dtype", state_dtype) != dtype_of:
            raise OptionError(
                f"state_dtype is {np.dtype(state_dtype)}, expected {dtype_of}, the dtype of values"
            )
        self._capacity = None if capacity is None else whole("capacity", capacity, 1, MOST_ROWS)
        seed = whole("seed", seed, -(2**63), 2**64 - 1)
        seed = seed - 2**64 if seed >= 2**63 else seed
        self._missing: Missing = options.choice("missing", missing, get_args(Missing))
        self._unknown: Unknown = options.choice("unknown", unknown, get_args(Unknown))
        self._admission = Admission(admission, admission_bytes, seed)
        self._eviction = check_eviction(eviction, self._capacity)
        self._initializer = initializer
        drawn = read_initializer(initializer, dtype_of)
        self._values_of: Any = initializer if drawn[0] == GIVEN else None
        if state_dir is not None and self._capacity is None:
            raise OptionError(
                "state_dir without capacity, expected the most rows that there may be: the file has room "
                "for them, and takes room on the disk when there are rows"
            )
        rate = options.learning_rate(lr, {dtype_of}, zero_allowed=False)
        # What is restored or loaded is read into new memory, in the folder that is there.
        is_folder = state_dir is None or isinstance(state_dir, StateFolder)
        folder: Any = state_dir if is_folder else StateFolder(state_dir)  # type: ignore[arg-type]
        with nullcontext() if folder is None else folder.removed_on_error():
            backend = HostBackend(folder)
            self._store = store = Store(
                name, dim, dtype_of, self._step_counts, self._capacity, drawn, seed, backend
            )
            self._tables = {name: store.table}
            if folder is not None:
                folder.warn_if_too_large()
            self._shared = SharedLock()
            # What goes with everything, until each option has been checked.
            self._options = Options(rate, (0, 0), 1, False, False, "propagate", None, "immediate")
            self.betas, self.eps, self.eps_hat, self.maximize = betas, eps, eps_hat, maximize
            self.on_nonfinite, self.num_threads = on_nonfinite, num_threads
        self._ages = Ages()
        self._evictor = Evictor(store, self._ages)
        self._history = History()

    def __repr__(self) -> str:
        return (
            f"EmbeddingTable({self.dim}, name={self._name!r}, initializer={self._initializer!r}, "
            f"lr={self.lr}, step_counts={self._step_counts!r}, dtype={self.dtype}, "
            f"capacity={self._capacity}): {len(self):,} rows"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For `copy` and `pickle`: another table like this one."""
        return reduced(self)

    # --- looking up ---------------------------------------------------------------------------------------

    def lookup(self, ids: ArrayLike, train: bool = True) -> NDArray[Any]:
        """Return the vectors of ids, in an array of its own.

        Parameters
        ----------
        ids : (n,) integers or strings
        train : bool, default True
            Whether ids are counted as seen, so that unknown ones get a row, as `admission` says. If not,
            nothing is changed, and unknown ids give what `unknown` says.

        Returns
        -------
        (n, dim) array

        Raises
        ------
        TableError
            If more ids are new than there is room for; nothing has been changed then.
        """
        numbers, train = self._ids("lookup", ids), options.flag("train", train)

        def work() -> NDArray[Any]:
            rows, others = self._rows_for("lookup", numbers, train)
            return self._store.gather(rows, others, train, self.num_threads)

        return self._shared.write(work) if train else self._shared.read(work)

    def lookup_bags(
        self,
        ids: ArrayLike,
        offsets: ArrayLike,
        weights: ArrayLike | None = None,
        mode: BagMode = "sum",
        train: bool = True,
        include_last_offset: bool | None = None,
    ) -> NDArray[Any]:
        """Return the sums, or means, of the vectors of bags of ids.

        Parameters
        ----------
        ids : (n,) integers or strings
        offsets : (bags,) or (bags + 1,) integers
            Where each bag begins; the last one, where there are bags + 1, is n.
        weights : (n,) array of float32 or float64, optional
            Of each id; with "sum" only.
        mode : {"sum", "mean"}, default "sum"
            A bag without ids gives zeros.
        train : bool, default True
            As in `lookup`.
        include_last_offset : bool, optional
            Whether there are bags + 1 offsets. By default, if there are several and the last one is n: pass
            False where a last bag may be empty.

        Returns
        -------
        (bags, dim) array
            Summed in the order of the ids.

        Raises
        ------
        GradientError
            If offsets or weights do not fit the ids.
        TableError
            As `lookup`.
        """
        numbers, train = self._ids("lookup_bags", ids), options.flag("train", train)
        mean = options.choice("mode", mode, options.BAG_MODES) == "mean"
        bounds = read_offsets(self._where("lookup_bags"), offsets, len(numbers), include_last_offset)
        factors = None
        if weights is not None:
            if mean:
                raise GradientError(
                    f"{self._where('lookup_bags')}: mode 'mean' with weights, expected mode 'sum'"
                )
            where, errors = self._where("lookup_bags"), (GradientError, GradientTypeError)
            factors = read_reals(where, "weights", weights, numbers.shape, self.dtype, errors)

        def work() -> NDArray[Any]:
            rows, others = self._rows_for("lookup_bags", numbers, train)
            return self._store.pool(rows, others, train, self.num_threads, bounds, factors, mean)

        return self._shared.write(work) if train else self._shared.read(work)

    def _peek(self, numbers: NDArray[np.int64], train: bool, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return the vectors of ids, in ``out`` if given; of unknown ones as `lookup`, but change nothing."""

        def work() -> NDArray[Any]:
            rows, others = self._rows_there(numbers, train or self._unknown == "initial")
            return self._store.gather(rows, others, False, self.num_threads, out)

        return self._shared.read(work)

    def _see(self, numbers: NDArray[np.int64], times: NDArray[np.int64]) -> None:
        """Count ids as looked up in training, each of them so many times; each is there once."""

        def work() -> None:
            if self._admission.at_once or len(numbers) == int(times.sum()):
                rows, _ = self._rows_for("push", numbers, True)
                counted = times
            else:  # each occurrence counts by itself, as in a look-up: the first ones may have no row yet
                each, _ = self._rows_for("push", np.repeat(numbers, times), True)
                counted = np.add.reduceat(each >= 0, np.cumsum(times) - times, dtype=np.int64)
                rows, _ = self._store.find(numbers, self.num_threads)
            self._store.mark(rows, counted, self.num_threads)

        self._shared.write(work)

    def _rows_there(
        self, numbers: NDArray[np.int64], initial: bool
    ) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Find the rows of ids; give the initial values of those that have none, or nothing: zeros."""
        rows, missing = self._store.find(numbers, self.num_threads)
        if not missing or not initial:
            return rows, np.empty(0, self.dtype)
        places = np.flatnonzero(rows < 0)
        rows[places] = -1 - np.arange(len(places))
        return rows, self._initial(numbers[places])

    def _rows_for(
        self, request: str, numbers: NDArray[np.int64], train: bool
    ) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Find the rows of ids, make those that are to be made; give what others have in their place."""
        if not train:
            return self._rows_there(numbers, self._unknown == "initial")
        store = self._store
        self._begin_change()
        rows, missing = store.find(numbers, self.num_threads)
        store.keep_aside(rows)
        places = np.flatnonzero(rows < 0) if missing else np.empty(0, np.int64)
        if missing:
            places = self._admit(request, numbers, rows, places)
        if not len(places):
            store.remember(numbers, rows)
            return rows, np.empty(0, self.dtype)
        rows[places] = -1 - np.arange(len(places))
        return rows, self._initial(numbers[places])

    def _admit(
        self, request: str, numbers: NDArray[np.int64], rows: NDArray[np.int64], places: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Give rows to those of the ids without one that get one; return the places of the others."""
        new = numbers[places]
        kept = self._admission.kept() if len(new) > self._store.room else None
        admitted = self._admission.see(new)
        chosen = new[admitted]
        if len(chosen):
            try:
                values = None if self._values_of is None else self._initial(chosen)
                if len(chosen) > self._store.room:
                    self._make_room(request, chosen, rows[rows >= 0])
                self._reserve(len(chosen))
                given = self._store.insert(chosen, values, self.num_threads)
            except BaseException:
                if kept is not None:
                    self._admission.restore(kept)
                raise
            rows[places[admitted]] = given
        return places[~admitted]
