# SPDX-License-Identifier: Apache-2.0
"""Compiling ahead: `warm_up`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple, get_args

import numba
import numpy as np
from numpy.typing import DTypeLike, NDArray

from nb_sparse_adam._src.annotations import GradientForm, StepCounts
from nb_sparse_adam._src.engine.compilations import LOGGER, counts
from nb_sparse_adam._src.engine.kernel_cache import folder_of
from nb_sparse_adam._src.engine.prepare import PREPARE
from nb_sparse_adam._src.engine.records import STEP
from nb_sparse_adam._src.engine.threads import numba_threads, threading_layer
from nb_sparse_adam._src.gradients import BagGradient, CSRGradient, Gradient, RowGradient
from nb_sparse_adam._src.optimizer import SparseAdam
from nb_sparse_adam._src.options import STEP_COUNTS, Choice, choice, flag
from nb_sparse_adam._src.public import public
from nb_sparse_adam.errors import NonFiniteGradientError, OptionError, OptionTypeError

DTYPES = ("float32", "float64")

GRADIENTS: tuple[GradientForm, ...] = get_args(GradientForm)


@public("nb_sparse_adam.typing")
class WarmUp(NamedTuple):
    """What `warm_up` has done."""

    compiled: int  # kernels; what was found on the disk is not among them
    kept: int  # of these, how many were written to the disk
    seconds: float
    folder: str | None  # where they are looked for, and kept if it can be written to; None: nowhere


@public("nb_sparse_adam")
def warm_up(
    dtypes: DTypeLike | Iterable[DTypeLike] = "float32",
    step_counts: StepCounts | Iterable[StepCounts] = ("element", "row", "global"),
    gradients: GradientForm | Iterable[GradientForm] = ("rows", "bags", "csr"),
    *,
    parallel: bool = True,
) -> WarmUp:
    """Compile what steps of some kinds need, so that they do not compile it later.

    Kernels are made for each combination of a dtype and of what is counted. They are compiled once, and kept
    on disk: after this, steps of these kinds compile nothing, neither here nor in any process that finds that
    folder. To be called, or run as ``nb-sparse-adam warm-up``, when an image is built or a server starts.

    Parameters
    ----------
    dtypes : dtype or iterable of dtype, default "float32"
        Of tables: float32, float64.
    step_counts : {"element", "row", "global"} or iterable of them, default all
        As `SparseAdam` takes it. ``"global"`` is what `nb_sparse_adam.torch.SparseAdam` uses.
    gradients : {"rows", "bags", "csr"} or iterable of them, default all
        Forms of gradients: `RowGradient`, `BagGradient`, and `CSRGradient` with all scipy.sparse ones. Rows
        and bags have the same kernels.
    parallel : bool, default True
        Whether large steps, which run on several threads, are meant as well. This starts numba's threads. In
        a process that will fork workers pass False: in a child that was forked after them, steps run on one
        thread.

    Returns
    -------
    WarmUp
        A named tuple: ``compiled``, how many kernels had to be compiled, 0 if all were found; ``kept``, how
        many of these were written to the disk, fewer if that cannot be: only this process is warm then;
        ``seconds``, how long it took; ``folder``, where kernels are looked for and kept, None if nowhere.

    Raises
    ------
    OptionError
        If there is no such dtype, count or form (also a ValueError).
    ValueError
        With ``parallel``, if NUMBA_THREADING_LAYER asks for a layer that cannot be loaded; numba's.

    Notes
    -----
    A combination takes some 5 seconds, the first one some 10 more. Small steps are taken, on tables that are
    made for it. Code on disk is for the type of processor that compiled it (LLVM's name of it, and its
    features) and for the flags of numba's that were set: a machine with another type finds nothing, and
    compiles again.

    Not compiled are: kernels of a GPU; `apply_row_gradient`, which is compiled with the function that calls
    it; moving rows (`SparseAdam.rearrange`); and what only tables or gradients of 2³¹ − 1 rows or ids, or
    2³¹ − 1 steps, need.

    With NUMBA_DISABLE_JIT there is nothing to compile: it says so in the log (at INFO), and returns zeros.

    Examples
    --------
    >>> done = warm_up("float64", "row", "csr")
    >>> warm_up("float64", "row", "csr").compiled
    0
    """
    kinds = _several("dtypes", dtypes, DTYPES)
    counted = _several("step_counts", step_counts, STEP_COUNTS)
    forms = _several("gradients", gradients, GRADIENTS)
    parallel = flag("parallel", parallel)
    if numba.config.DISABLE_JIT:
        LOGGER.info("NUMBA_DISABLE_JIT is set: there is nothing to compile")
        return WarmUp(0, 0, 0.0, None)
    start, before = time.perf_counter(), counts()
    for kind in kinds:
        for count in counted:
            _take_steps(np.dtype(kind), count, forms)
    if parallel:
        threading_layer()  # starts numba's threads, without which the next one is not linked
        numba_threads()
        # A driver holds no code of what it runs: this is the one of every large step. Here it has no tables,
        # so that it needs no second thread, and works where there may be none.
        PREPARE.parallel(1, np.zeros(1, STEP))
    compiled, kept = (now - then for now, then in zip(counts(), before, strict=True))
    return WarmUp(compiled, kept, time.perf_counter() - start, folder_of(PREPARE.work))


def _several(name: str, given: Any, allowed: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """Check one of a few names, or several of them."""
    values = tuple(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else (given,)
    if not values:
        raise OptionError(f"{name} is empty, expected some of {allowed}")
    if allowed is DTYPES:
        values = tuple(_name_of(value) for value in values)
    return tuple(choice(name, value, allowed) for value in values)


def _name_of(dtype: Any) -> str:
    try:
        if dtype is not None:  # which NumPy takes for float64
            found = np.dtype(dtype)
            return found.name if found.isnative else str(found)
    except TypeError:
        pass
    raise OptionTypeError(f"dtypes is or holds {dtype!r}, expected one of {DTYPES}")


def _take_steps(dtype: np.dtype[Any], step_counts: StepCounts, forms: tuple[GradientForm, ...]) -> None:
    """Take a step of each way that there is: of one table, of several, and of numbers that overflow."""
    ids, ends = np.zeros(1, np.int64), np.array([0, 1])
    tables = {name: np.zeros((1, 1), dtype) for name in ("a", "b")}
    optimizer = SparseAdam(tables, step_counts=step_counts)

    def gradient(form: GradientForm, values: NDArray[Any]) -> Gradient:
        made: dict[GradientForm, Gradient] = {
            "rows": RowGradient(ids, values),
            "bags": BagGradient(ids, ends, values),
            "csr": CSRGradient(ends, ids, values[0]),
        }
        return made[form]

    for form in forms:
        ordinary = gradient(form, np.ones((1, 1), dtype))
        too_large = gradient(form, np.full((1, 1), np.finfo(dtype).max))
        optimizer.step({"a": ordinary})
        optimizer.step({"a": ordinary, "b": ordinary})
        with suppress(NonFiniteGradientError):
            optimizer.step({"a": too_large})
