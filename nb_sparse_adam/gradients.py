"""The forms of a gradient, and the one place that looks at what a user passed as one.

`check` takes any of them and returns arrays that kernels can trust: contiguous, of the table's dtype, every
id in range. What is wrong is refused here, with the first offending position. The user's own objects are
never modified, and copied only where their dtype or layout asks for it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nb_sparse_adam.engine.compile import jit
from nb_sparse_adam.engine.grouping import scan_ids
from nb_sparse_adam.engine.kernels import Compressed
from nb_sparse_adam.errors import GradientError, GradientIndexError, GradientTypeError

__all__ = ["BagGradient", "CSRGradient", "RowGradient"]

FORMS = "a RowGradient, a BagGradient, a CSRGradient or a scipy.sparse CSR, CSC or COO array"


@dataclass(frozen=True, eq=False)
class RowGradient:
    """Gradient of some rows of a table: what the backward pass of an embedding lookup gives.

    Parameters
    ----------
    rows : (n,) integer array
        The row of the table that each row of ``values`` belongs to, in any order. A row that is named more
        than once gets the sum.
    values : (n, dim) float32 or float64 array
        The gradients; (n,) or (n, 1) for a 1-D table.

    Notes
    -----
    Nothing is checked or copied before `SparseAdam.step`, which raises a `GradientError` for a gradient that
    does not fit its table.

    Examples
    --------
    >>> RowGradient([3, 0, 3], np.ones((3, 16)))  # row 3 gets twice the gradient of row 0
    RowGradient(3 rows)
    """

    rows: ArrayLike
    values: ArrayLike

    def __repr__(self) -> str:
        return f"RowGradient({np.size(self.rows)} rows)"


@dataclass(frozen=True, eq=False)
class BagGradient:
    """Gradient of pooled embeddings: Aᵀ·grad_output, summed inside the kernel and never stored.

    With A the (bags × rows) CSR matrix ``(offsets, indices, weights)``, the pooled output is A·table. A CSR
    design matrix with a residual is the same thing at dim 1.

    Parameters
    ----------
    indices : (n,) integer array
        The ids that were looked up, bag after bag.
    offsets : (bags + 1,) or (bags,) integer array
        Where each bag starts in ``indices``. The optional last entry (CSR has it, torch has not) equals
        ``len(indices)``; which of the two it is follows from ``grad_output``.
    grad_output : (bags, dim) float32 or float64 array
        Gradient of the pooled output; (bags,) or (bags, 1) for a 1-D table.
    weights : (n,) float32 or float64 array, optional
        One weight an id; all 1 if omitted. A row is present even with weight 0.
    mode : {"sum", "mean"}, default "sum"
        "mean" divides by the number of ids of the bag. With ``weights`` it is refused, as in torch.

    Notes
    -----
    Nothing is checked or copied before `SparseAdam.step`, which raises a `GradientError` for a gradient that
    does not fit its table.
    """

    indices: ArrayLike
    offsets: ArrayLike
    grad_output: ArrayLike
    weights: ArrayLike | None = None
    mode: str = "sum"

    def __repr__(self) -> str:
        return f"BagGradient({np.size(self.indices)} ids, mode={self.mode!r})"


@dataclass(frozen=True, eq=False)
class CSRGradient:
    """Gradient in compressed sparse rows, without scipy.

    Parameters
    ----------
    indptr : (rows + 1,) integer array
        Row r stores the entries ``indptr[r]:indptr[r + 1]``.
    indices : (nnz,) integer array
        Column of each entry; unsorted and repeated columns are legal, and repeated ones are summed.
    data : (nnz,) float32 or float64 array
        Value of each entry.

    Notes
    -----
    Nothing is checked or copied before `SparseAdam.step`, which raises a `GradientError` for a gradient that
    does not fit its table.
    """

    indptr: ArrayLike
    indices: ArrayLike
    data: ArrayLike

    def __repr__(self) -> str:
        return f"CSRGradient({np.size(self.data)} entries)"


_FEW = 8


class Places:
    """Arrays that do not overlap; finds those that another array may overlap without asking each.

    Parameters
    ----------
    arrays : sequence of array
    """

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        known = sorted((*extent(array), at) for at, array in enumerate(arrays) if array.size)
        self._starts = [start for start, _, _ in known]
        self._ends = [end for _, end, _ in known]
        self._arrays = [arrays[at] for _, _, at in known]

    def near(self, given: NDArray[Any]) -> Sequence[NDArray[Any]]:
        """Return those that may overlap another, and no more than some few others."""
        if len(self._arrays) <= _FEW:  # to ask each takes less than to find out where the other lies
            return self._arrays
        if not given.size:
            return ()
        start, end = extent(given)
        return self._arrays[bisect_right(self._ends, start) : bisect_left(self._starts, end)]


def extent(array: Any, address: int | None = None) -> tuple[int, int]:
    """Return the addresses of the first byte of an array, and of the one behind its last.

    Of an array that is not of NumPy's, ``address`` is that of its first element.
    """
    first = last = array.__array_interface__["data"][0] if address is None else address
    for length, stride in zip(array.shape, array.strides, strict=True):
        if stride > 0:
            last += (length - 1) * stride
        else:
            first += (length - 1) * stride
    return first, last + array.dtype.itemsize


class Target(NamedTuple):
    """The table that a gradient is for, as far as a gradient has to fit it."""

    name: str
    rows: int
    dim: int
    ndim: int  # of the user's table: 1-D tables have rows of dim 1
    dtype: np.dtype[Any]
    memory: Places  # what no gradient may share memory with
    arrays: Any  # `HostArrays`, or what reads arrays that are on the table's GPU

    def refuse(self, kind: type[GradientError], message: str) -> GradientError:
        return kind(f"gradient of table {self.name!r}: {message}")


class Rows(NamedTuple):
    """A checked RowGradient, or BagGradient if it has offsets."""

    ids: NDArray[Any]  # (n,) int32 or int64, each in 0..rows - 1
    values: NDArray[Any]  # (n, dim), or (bags, dim); rows may lie apart
    nondecreasing: bool
    increasing: bool
    offsets: NDArray[Any] | None = None  # (bags + 1,) int64
    coefficients: NDArray[Any] | None = None  # (n,) weights, or (bags,) reciprocal sizes
    per_id: bool = False  # which of the two


class Entries(NamedTuple):
    """Checked single entries in any order, repeated ones included."""

    keys: NDArray[np.int64]  # row * dim + column
    data: NDArray[Any]


def check(gradient: object, target: Target) -> Rows | Compressed | Entries:
    """Turn what a user passed into arrays that kernels can trust, or raise a `GradientError`."""
    if isinstance(gradient, RowGradient):
        return _check_rows(gradient, target)
    if isinstance(gradient, BagGradient):
        return _check_bags(gradient, target)
    if isinstance(gradient, CSRGradient):
        return _check_csr(
            target, "CSRGradient.", gradient.indptr, gradient.indices, gradient.data, exact=True
        )
    if isinstance(getattr(gradient, "format", None), str) and hasattr(gradient, "shape"):  # as scipy's
        return _check_scipy(gradient, target)
    got = type(gradient).__name__
    if isinstance(gradient, np.ndarray):
        raise target.refuse(
            GradientTypeError,
            f"got a dense array of shape {gradient.shape}, expected {FORMS}; for a dense gradient g pass "
            "RowGradient(np.arange(len(g)), g)",
        )
    raise target.refuse(GradientTypeError, f"got {got}, expected {FORMS}")


# --- arrays -----------------------------------------------------------------------------------------------


class HostArrays:
    """Reads a gradient's arrays, which are in the memory of the host."""

    def read(self, what: str, given: Any, target: Target) -> NDArray[Any]:
        """See what was given as an array; nothing is copied if it is one."""
        if type(given) is not np.ndarray:
            if isinstance(given, np.ma.MaskedArray):
                raise target.refuse(
                    GradientTypeError,
                    f"{what} is a masked array, expected one without a mask; pass .filled(0), or leave out "
                    "the masked entries",
                )
            if on_gpu(given):
                raise target.refuse(
                    GradientTypeError,
                    f"{what} is on a GPU, expected it where the table is, in the memory of the host: copy it "
                    "there, or keep the table on the GPU",
                )
            try:
                given = np.asarray(given)
            except Exception as error:
                raise target.refuse(
                    GradientTypeError, f"{what} cannot be read as an array: {error}; pass a NumPy array"
                ) from error
        for memory in target.memory.near(given):
            if np.may_share_memory(given, memory) and _share_memory(given, memory):
                raise shares_memory(what, target)
        return given  # type: ignore[no-any-return]

    def as_column(self, array: NDArray[Any]) -> NDArray[Any]:
        """See (n,) as (n, 1)."""
        return array[:, None]

    def ready(self, array: NDArray[Any], dtype: np.dtype[Any], rows_apart: bool = False) -> NDArray[Any]:
        """Give the array, or a copy: native, aligned, of a dtype, and C-contiguous, if only within rows."""
        if array.dtype != dtype:
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found as infinity, by name
                return array.astype(dtype, order="C")
        flags = array.flags
        if not flags.aligned or not (flags.c_contiguous or (rows_apart and _has_rows_apart(array))):
            return array.copy(order="C")
        return array if flags.writeable or not array.size else np.asarray(_Alias(array))


HOST = HostArrays()


def on_gpu(given: object) -> bool:
    """Whether something is an array on a GPU (or in numba's simulator of one)."""
    if isinstance(given, np.ndarray):
        return False
    if getattr(given, "__cuda_ndarray__", False):
        return True
    try:
        return hasattr(given, "__cuda_array_interface__")
    except RuntimeError:  # torch's, of a tensor that requires a gradient
        return True


def shares_memory(what: str, target: Target) -> GradientError:
    """Refuse a gradient that would change while it is read."""
    return target.refuse(
        GradientError,
        f"{what} shares memory with a table or its state, which would change while it is read; pass a copy",
    )


def _share_memory(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays whose extents overlap share an element, or might: an exact answer can take long."""
    try:
        return bool(np.shares_memory(a, b, max_work=1000))  # type: ignore[arg-type]
    except Exception as error:  # TooHardError moved between NumPy 1.24 and 2
        if type(error).__name__ != "TooHardError":
            raise
        return True


class _Alias:
    """The memory of a read-only array, under another flag.

    A read-only array is another type to numba, and would have every kernel compiled again. Kernels do not
    write to gradients.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self.owner = array


def _has_rows_apart(array: NDArray[Any]) -> bool:
    """Whether rows are contiguous and follow each other at a distance, as slices of a larger array do."""
    apart, within = array.strides
    return within == array.itemsize and apart > 0 and apart % array.itemsize == 0


def values_of(
    what: str, given: Any, target: Target, rows: int | None, of: str, matrix: bool = True
) -> NDArray[Any]:
    """Check float values: (rows, dim) as a matrix, else (rows,)."""
    array = target.arrays.read(what, given, target)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise target.refuse(
            GradientTypeError,
            f"{what} has dtype {array.dtype}, expected float32 or float64; convert it first",
        )
    shape = tuple(array.shape)
    count = "n" if rows is None else str(rows)
    if matrix:
        shapes = f"({count}, {target.dim})" + (f" or ({count},)" if target.ndim == 1 else "")
        if array.ndim == 1 and target.ndim == 1:
            array = target.arrays.as_column(array)
        fits = array.ndim == 2 and array.shape[1] == target.dim
    else:
        shapes, fits = f"({count},)", array.ndim == 1
    if not fits or rows not in (None, len(array)):
        raise target.refuse(
            GradientError, f"{what} has shape {shape}, expected {shapes}: one row or value {of}"
        )
    return target.arrays.ready(array, target.dtype, rows_apart=matrix)  # type: ignore[no-any-return]


def integers_of(what: str, given: Any, target: Target, length: int | None = None) -> NDArray[Any]:
    """Check a 1-D array of integers and bring it to int32 or int64."""
    array = target.arrays.read(what, given, target)
    if isinstance(array, np.ndarray) and array.size == 0 and not isinstance(given, np.ndarray):
        array = array.astype(np.int64)  # an empty list has no dtype of its own
    if array.dtype.kind not in "iu":
        raise target.refuse(
            GradientTypeError,
            f"{what} has dtype {array.dtype}, expected integers (int32 or int64); "
            + ("use np.flatnonzero(mask)" if array.dtype.kind == "b" else "convert with .astype(np.int64)"),
        )
    if array.ndim != 1 or length not in (None, len(array)):
        count = "n" if length is None else str(length)
        raise target.refuse(GradientError, f"{what} has shape {tuple(array.shape)}, expected ({count},)")
    if isinstance(array, np.ndarray):
        _refuse_huge(what, array, target)
    narrow = array.dtype.kind == "i" and array.dtype.itemsize <= 4
    dtype = np.dtype(np.int32) if narrow else np.dtype(np.int64)
    return target.arrays.ready(array, dtype)  # type: ignore[no-any-return]


def _refuse_huge(what: str, array: NDArray[Any], target: Target) -> None:
    """Raise for a number that int64 cannot hold."""
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size:
        large = np.flatnonzero(array > np.uint64(np.iinfo(np.int64).max))
        if len(large):
            at = int(large[0])
            raise target.refuse(
                GradientIndexError, f"{what}[{at}] is {array[at]}, which no index can be (at most 2**63 - 1)"
            )


def id_error(what: str, at: int, got: int, upper: int, of: str, target: Target) -> GradientError:
    """Say which id is not in 0..upper - 1."""
    return target.refuse(
        GradientIndexError,
        f"{what}[{at}] is {got}, expected 0 <= {of} < {upper}"
        + ("; negative ids do not count from the end" if got < 0 else ""),
    )


def _refuse_ids(what: str, ids: NDArray[Any], upper: int, of: str, target: Target) -> NoReturn:
    """Raise for the first id that is not in 0..upper - 1."""
    wrong = np.flatnonzero((ids < 0) | (ids >= upper))
    if not len(wrong):
        raise changed_meanwhile(target)
    at = int(wrong[0])
    raise id_error(what, at, int(ids[at]), upper, of, target)


def changed_meanwhile(target: Target) -> GradientError:
    """Refuse a gradient that is not what it was when it was checked."""
    return target.refuse(
        GradientError,
        "it was changed while step was reading it, expected arrays that nobody writes to until step returns; "
        "nothing was updated. Pass copies, or let whoever fills the arrays wait",
    )


def _ids(
    what: str, given: Any, target: Target, length: int | None = None, of: str = "row"
) -> tuple[NDArray[Any], bool, bool]:
    """Check row ids; also whether they never decrease, and always increase."""
    ids = integers_of(what, given, target, length)
    if not len(ids):
        return ids, True, True
    smallest, largest, nondecreasing, increasing = scan_ids(ids)
    if smallest < 0 or largest >= target.rows:
        _refuse_ids(what, ids, target.rows, of, target)
    return ids, nondecreasing, increasing


# --- the forms --------------------------------------------------------------------------------------------


def _check_rows(gradient: RowGradient, target: Target) -> Rows:
    ids, nondecreasing, increasing = _ids("RowGradient.rows", gradient.rows, target)
    values = values_of(
        "RowGradient.values", gradient.values, target, len(ids), "for each of RowGradient.rows"
    )
    return Rows(ids, values, nondecreasing, increasing)


def check_mode(gradient: BagGradient, target: Target) -> None:
    """Refuse modes that there are not, and weighted means."""
    if gradient.mode not in ("sum", "mean"):
        raise target.refuse(GradientError, f"BagGradient.mode is {gradient.mode!r}, expected 'sum' or 'mean'")
    if gradient.mode == "mean" and gradient.weights is not None:
        raise target.refuse(
            GradientError,
            "BagGradient got weights together with mode='mean', which torch does not define either; divide "
            "the weights by the sizes of their bags and pass mode='sum'",
        )


def _check_bags(gradient: BagGradient, target: Target) -> Rows:
    check_mode(gradient, target)
    ids, nondecreasing, increasing = _ids("BagGradient.indices", gradient.indices, target)
    values = values_of("BagGradient.grad_output", gradient.grad_output, target, None, "for each bag")
    n = len(ids)
    offsets = offsets_of(gradient, target, len(values), n).astype(np.int64, copy=False)
    if len(offsets) == len(values):
        offsets = np.append(offsets, n)
    if offsets[0] != 0 or count_rises_and_falls(offsets)[1] or offsets[-1] > n:
        _refuse_offsets("BagGradient.offsets", offsets, n, target)
    if offsets[-1] != n:
        raise offset_error("BagGradient.offsets", len(values), int(offsets[-1]), 0, n, True, target)
    if gradient.weights is not None:
        weights = values_of(
            "BagGradient.weights", gradient.weights, target, len(ids), "for each of indices", matrix=False
        )
        return Rows(ids, values, nondecreasing, increasing, offsets, weights, True)
    if gradient.mode == "mean":
        sizes = np.maximum(np.diff(offsets), 1).astype(target.dtype)
        return Rows(ids, values, nondecreasing, increasing, offsets, 1 / sizes)
    return Rows(ids, values, nondecreasing, increasing, offsets)


def offsets_of(gradient: BagGradient, target: Target, bags: int, n: int) -> NDArray[Any]:
    """Check how many offsets there are; not what they are."""
    what = "BagGradient.offsets"
    offsets = integers_of(what, gradient.offsets, target)
    if len(offsets) not in (bags, bags + 1):
        raise target.refuse(
            GradientError,
            f"{what} has {len(offsets)} entries, expected {bags + 1} (or {bags}, without the last) for the "
            f"{bags} rows of grad_output",
        )
    if len(offsets) == 0 and n:
        raise target.refuse(GradientIndexError, f"{what} is empty, expected a bag for the {n} indices")
    return offsets


def offset_error(
    what: str, at: int, got: int, before: int, last: int, closed: bool, target: Target
) -> GradientError:
    """Say why an offset cannot be: they start at 0, never decrease, and do not pass ``last``.

    ``closed``: it is the one that must be ``last``.
    """
    if at == 0 and got != 0:
        why = "expected 0"
    elif got < before:
        why = f"less than {what}[{at - 1}] = {before}; expected a sequence that never decreases"
    elif closed:
        why = f"expected len(indices) = {last}"
    else:
        why = f"expected at most {last}"
    return target.refuse(GradientIndexError, f"{what}[{at}] is {got}, {why}")


def _refuse_offsets(what: str, offsets: NDArray[Any], last: int, target: Target) -> NoReturn:
    """Say where offsets do not start at 0, decrease, or pass ``last``."""
    wrong = offsets > last
    wrong[0] |= offsets[0] != 0
    wrong[1:] |= offsets[1:] < offsets[:-1]
    if not wrong.any():
        raise changed_meanwhile(target)
    at = int(np.flatnonzero(wrong)[0])
    before = int(offsets[at - 1]) if at else 0
    raise offset_error(what, at, int(offsets[at]), before, last, False, target)


def _check_csr(
    target: Target, what: str, indptr: Any, indices: Any, data: Any, exact: bool
) -> Compressed | Entries:
    """``exact``: the arrays hold what indptr names and no more. SciPy allows capacity beyond it."""
    indptr = integers_of(what + "indptr", indptr, target, target.rows + 1)
    indices = integers_of(what + "indices", indices, target)
    data = values_of(what + "data", data, target, None, "for each entry", matrix=False)
    present, fall = count_rises_and_falls(indptr)
    nnz = int(indptr[-1])
    if fall or indptr[0] != 0 or not 0 <= nnz <= len(indices):
        _refuse_offsets(what + "indptr", indptr, len(indices), target)
    if exact and nnz != len(indices):
        raise target.refuse(
            GradientError,
            f"{what}indptr[{target.rows}] is {nnz}, expected len(indices) = {len(indices)}",
        )
    if len(data) < nnz or (exact and len(data) != nnz):
        raise target.refuse(
            GradientError, f"{what}data has {len(data)} entries, expected {nnz}, one for each of indices"
        )
    indices, data = indices[:nnz], data[:nnz]
    rows, starts = np.empty((2, present + _SPARE), indptr.dtype)
    if not list_present(indptr, rows, starts) or starts[present] != nnz:
        raise changed_meanwhile(target)
    rows, starts = rows[:present], starts[: present + 1]
    if starts.dtype != indices.dtype:
        rows, starts, indices = (array.astype(np.int64, copy=False) for array in (rows, starts, indices))
    lowest, highest, distinct = scan_columns(starts, indices)
    if nnz and (lowest < 0 or highest >= target.dim):
        _refuse_ids(what + "indices", indices, target.dim, "column", target)
    if distinct:
        return Compressed(rows, starts, indices, data)
    keys = np.empty(nnz, np.int64)
    keys_of_rows(rows, starts, indices, target.dim, keys)
    return Entries(keys, data)


def _check_scipy(gradient: Any, target: Target) -> Rows | Compressed | Entries:
    what = f"scipy.sparse {gradient.format.upper()}"
    if gradient.format not in ("csr", "csc", "coo"):
        raise target.refuse(
            GradientTypeError, f"got a {what} array, expected CSR, CSC or COO; convert it with .tocsr()"
        )
    one_d = len(gradient.shape) == 1
    needed = {"coo": ("coords",) if one_d else ("row", "col")}.get(gradient.format, ("indptr", "indices"))
    for attribute in (*needed, "data"):
        if getattr(gradient, attribute, None) is None:
            raise target.refuse(
                GradientTypeError,
                f"got a {type(gradient).__name__} that calls itself {gradient.format!r} but has no "
                f"{attribute}, expected {FORMS}",
            )
    expected = (target.rows,) if one_d and target.ndim == 1 else (target.rows, target.dim)
    if tuple(gradient.shape) != expected:
        raise target.refuse(GradientError, f"{what} has shape {tuple(gradient.shape)}, expected {expected}")
    what += " "
    if gradient.format == "csr" and not one_d:
        return _check_csr(target, what, gradient.indptr, gradient.indices, gradient.data, exact=False)
    if gradient.format == "csc":
        # A CSC array is the CSR array of its transpose.
        transposed = target._replace(rows=target.dim, dim=target.rows)
        checked = _check_csr(transposed, what, gradient.indptr, gradient.indices, gradient.data, exact=False)
        if isinstance(checked, Entries):
            columns, rows = np.divmod(checked.keys, max(target.rows, 1))
        else:
            columns = np.repeat(checked.rows.astype(np.int64, copy=False), np.diff(checked.indptr))
            rows = checked.indices.astype(np.int64, copy=False)
        return Entries(rows * target.dim + columns, checked.data)
    if one_d:  # a 1-D array names rows, each with one value
        if gradient.format == "csr":
            indices, data = gradient.indices, gradient.data
        else:
            indices, data = gradient.coords[0], gradient.data
        return _check_rows(RowGradient(indices, data), target)
    rows, _, _ = _ids(what + "row", gradient.row, target)
    transposed = target._replace(rows=target.dim)
    columns, _, _ = _ids(what + "col", gradient.col, transposed, len(rows), "column")
    data = values_of(what + "data", gradient.data, target, len(rows), "for each entry", matrix=False)
    return Entries(rows.astype(np.int64, copy=False) * target.dim + columns, data)


_SPARE = 64  # places in `list_present`: what may be written before it is seen that there are too many


@jit
def count_rises_and_falls(offsets: Any) -> Any:
    """How often offsets increase, and decrease. No early exit: a loop with one is not vectorized."""
    rises = falls = 0
    for i in range(len(offsets) - 1):
        rises += offsets[i + 1] > offsets[i]
        falls += offsets[i + 1] < offsets[i]
    return rises, falls


@jit
def list_present(indptr: Any, rows: Any, starts: Any) -> bool:
    """List the rows that store entries, and where each one's start, then their end.

    ``indptr`` is the user's memory, and another thread may have changed it since the rows were counted: each
    number is read once. Returns False if there are not as many rows as places, `_SPARE` apart, or starts do
    not rise from 0.
    """
    n, expected = len(indptr) - 1, np.uint64(len(rows) - _SPARE)
    present, one = np.uint64(0), np.uint64(1)  # unsigned: indices that cannot count from the end
    start = indptr[0]
    for first in range(0, n, _SPARE):
        if present > expected:
            return False
        for r in range(np.uint64(first), np.uint64(min(first + _SPARE, n))):
            # Written always and kept where there are entries: no branch to mispredict.
            rows[present] = r
            starts[present] = start
            end = indptr[np.uint64(r) + one]
            present += np.uint64(end > start)
            start = end
    if present != expected:
        return False
    starts[present] = start
    falls = 0
    for s in range(np.int64(present)):
        falls += starts[s + 1] <= starts[s]
    return bool(starts[0] == 0 and falls == 0)


@jit
def scan_columns(indptr: Any, indices: Any) -> Any:
    """Smallest and largest column, and whether the columns of every row increase."""
    lowest = highest = indices.dtype.type(0)
    repeats = 0
    for e in range(len(indices) - 1):  # from entry to entry, rows or not: that is vectorized
        lowest = min(lowest, indices[e])
        highest = max(highest, indices[e])
        repeats += indices[e + 1] <= indices[e]
    if len(indices) > 0:
        lowest = min(lowest, indices[len(indices) - 1])
        highest = max(highest, indices[len(indices) - 1])
    for r in range(1, len(indptr) - 1):  # where a row begins, a column may be smaller than the one before
        repeats -= indices[indptr[r]] <= indices[indptr[r] - 1]
    return lowest, highest, repeats == 0


@jit
def keys_of_rows(rows: Any, starts: Any, indices: Any, dim: int, keys: Any) -> None:
    """``keys[e]`` ← row * dim + column of entry e."""
    for s in range(len(rows)):
        for e in range(starts[s], starts[s + 1]):
            keys[e] = np.int64(rows[s]) * dim + indices[e]
