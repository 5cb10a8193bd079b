# SPDX-License-Identifier: Apache-2.0
"""The forms of a gradient, and the one place that looks at what a user passed as one.

`read` takes any of them and returns arrays of known shapes, dtypes and layouts, wherever they are. What these
hold is looked at by the backend that prepares the step, which finds faults; `faults` makes errors of them.
The user's own objects are never modified, and copied only where their dtype or layout asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.annotations import (
    Array,
    BagMode,
    BatchedCoordinates,
    CompressedMatrix,
    CoordinateMatrix,
    IndexedSlices,
)
from nb_sparse_adam._src.engine.records import BAGS, COO, CSC, CSR, ROWS
from nb_sparse_adam._src.frameworks import is_of_framework, located
from nb_sparse_adam._src.naming import type_name
from nb_sparse_adam._src.options import BAG_MODES
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.remedies import for_ids, for_no_gradient, for_values
from nb_sparse_adam.errors import GradientError, GradientIndexError, GradientTypeError


def _size(array: Any) -> int:
    """Count elements; of a tensor, ``size`` is a method."""
    shape = getattr(array, "shape", None)
    return int(np.size(array) if shape is None else math.prod(shape))


@public("nb_sparse_adam")
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

    rows: Array
    values: Array

    def __repr__(self) -> str:
        return f"RowGradient({_size(self.rows)} rows)"


@public("nb_sparse_adam")
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

    Raises
    ------
    GradientError
        For another ``mode``, or "mean" together with ``weights``.

    Notes
    -----
    No array is checked or copied before `SparseAdam.step`, which raises a `GradientError` for a gradient that
    does not fit its table.
    """

    indices: Array
    offsets: Array
    grad_output: Array
    weights: Array | None = None
    mode: BagMode = "sum"

    def __post_init__(self) -> None:
        mode: object = self.mode
        if not isinstance(mode, str) or mode not in BAG_MODES:
            raise GradientError(f"BagGradient: mode is {mode!r}, expected one of {BAG_MODES}")
        if mode == "mean" and self.weights is not None:
            raise GradientError(
                "BagGradient: got weights together with mode='mean', which torch does not define either; "
                "divide the weights by the sizes of their bags and pass mode='sum'"
            )

    def __repr__(self) -> str:
        return f"BagGradient({_size(self.indices)} ids, mode={self.mode!r})"


@public("nb_sparse_adam")
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

    indptr: Array
    indices: Array
    data: Array

    def __repr__(self) -> str:
        return f"CSRGradient({_size(self.data)} entries)"


Gradient: TypeAlias = (
    RowGradient
    | BagGradient
    | CSRGradient
    | CompressedMatrix
    | CoordinateMatrix
    | IndexedSlices
    | BatchedCoordinates
)
"""What `SparseAdam.step` takes as the gradient of a table."""


class Names(NamedTuple):
    """What errors call the arrays of a gradient."""

    ids: str
    values: str
    offsets: str = ""
    weights: str = ""
    columns: str = ""
    of: str = "row"  # what an id names


class Given(NamedTuple):
    """A gradient whose shapes, dtypes and layouts have been checked; what it holds has not.

    Arrays are the reader's: NumPy's on the host, device arrays on a GPU.
    """

    form: int  # `records.ROWS`, BAGS, CSR, CSC or COO
    names: Names
    ids: Any  # (n,) int32 or int64: rows; of CSR, columns
    values: Any  # (n, dim) or (bags, dim), whose rows may lie apart; of entries (n,)
    offsets: Any = None  # (bags,) or (bags + 1,); of CSR and CSC the pointer
    weights: Any = None  # (n,)
    mean: bool = False
    columns: Any = None  # of COO, (n,)
    kept: Any = None  # (n,): where ids were in the user's array, if that is elsewhere
    parts: tuple[Given, ...] = ()  # of a list of gradients: these, whose ids and values follow each other

    @property
    def entries(self) -> bool:
        """Whether values belong to single entries of the table, not to rows."""
        return self.form >= CSR


class Reader(Protocol):
    """Reads a gradient's arrays where a table is: in the memory of the host, or on a GPU."""

    forms: str  # those that it takes, for messages
    layouts: tuple[str, ...]  # of scipy's arrays and their like

    def read(self, what: str, given: Any, target: Target) -> Any:
        """See what was given as an array; nothing is copied if it is one."""

    def as_column(self, array: Any) -> Any:
        """See (n,) as (n, 1)."""

    def ready(self, what: str, array: Any, dtype: np.dtype[Any], target: Target, matrix: bool) -> Any:
        """Give the array, or a copy, of a dtype and contiguous; rows of a matrix may lie apart."""

    def stored(self, pointer: Any) -> int | None:
        """How many entries a row pointer says are stored; None if that cannot be read here."""


class Target(NamedTuple):
    """The table that a gradient is for, as far as a gradient has to fit it."""

    name: str
    rows: int
    dim: int
    ndim: int  # of the user's table: 1-D tables have rows of dim 1
    dtype: np.dtype[Any]
    reader: Reader
    at: int | None = None  # the gradient's place in a list of them
    name_of_row: Callable[[int], str] = "row {}".format  # in messages

    def refuse(self, kind: type[GradientError], message: str) -> GradientError:
        """Make an error of a gradient for this table."""
        place = "" if self.at is None else f"[{self.at}]"
        return kind(f"gradient{place} of table {self.name!r}: {message}")

    def check_shape(self, what: str, shape: Sequence[int]) -> None:
        """Raise if a gradient that says its shape is of another table: of (n,), that may be (n, 1)."""
        one_d = self.ndim == 1 and len(shape) == 1
        expected = (self.rows,) if one_d else (self.rows, self.dim)
        if tuple(shape) != expected:
            raise self.refuse(GradientError, f"{what} has shape {tuple(shape)}, expected {expected}")


_ROWS = Names("RowGradient.rows", "RowGradient.values")
_BAGS = Names("BagGradient.indices", "BagGradient.grad_output", "BagGradient.offsets", "BagGradient.weights")


def read(gradient: object, target: Target) -> Given:
    """Turn what a user passed into arrays of known shapes and dtypes, or raise a `GradientError`."""
    if isinstance(gradient, RowGradient):
        return _read_rows(_ROWS, gradient.rows, gradient.values, target)
    if isinstance(gradient, BagGradient):
        return _read_bags(gradient, target)
    if isinstance(gradient, CSRGradient):
        return _read_compressed(
            CSR, "CSRGradient.", gradient.indptr, gradient.indices, gradient.data, target, exact=True
        )
    if isinstance(gradient, Given):  # our own
        return gradient
    if _looks_like_scipys(gradient):
        return _read_scipy(gradient, target)
    found = located(gradient, target)
    if found is not None:
        names = Names(found.ids_name, found.values_name, columns=found.columns_name)
        given = (
            _read_rows(names, found.ids, found.values, target)
            if found.columns is None
            else _read_coo(names, found.ids, found.columns, found.values, target)
        )
        return given if found.kept is None else _without_padding(given, found.kept)
    got, remedy = for_no_gradient(gradient, target.reader.layouts == ("csr",))
    raise target.refuse(GradientTypeError, f"got {got}, expected {target.reader.forms}{remedy}")


def read_named(
    gradient: RowGradient | BagGradient, rows: NDArray[np.int64], names: Sequence[str], target: Target
) -> Given:
    """Read a gradient whose ids are of something else, which has been looked up.

    Parameters
    ----------
    gradient : RowGradient or BagGradient
    rows : (n,) int64
        What its ids stand for.
    names : sequence of str
        What messages call its arrays: ids, values, and of bags offsets and weights.
    target : Target
    """
    if isinstance(gradient, RowGradient):
        return _read_rows(Names(*names[:2]), rows, gradient.values, target)
    return _read_bags(replace(gradient, indices=rows), target, Names(*names))


def _looks_like_scipys(given: object) -> bool:
    has_layout = isinstance(getattr(given, "format", None), str) and hasattr(given, "shape")
    return has_layout and not isinstance(given, memoryview)


def is_gradient(given: object) -> bool:
    """Whether something is of one of the forms of a gradient, right or wrong."""
    return isinstance(given, (RowGradient, BagGradient, CSRGradient)) or (
        _looks_like_scipys(given) or is_of_framework(given)
    )


def _without_padding(given: Given, kept: slice | NDArray[np.intp]) -> Given:
    """Leave out all ids but some. Only now: padding lies in memory, and is checked there, as the rest."""
    columns = None if given.columns is None else given.columns[kept]
    places = None if isinstance(kept, slice) else kept
    return given._replace(ids=given.ids[kept], values=given.values[kept], columns=columns, kept=places)


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


def arrays_of(gradient: object) -> list[Any]:
    """Give what a gradient is made of, as the caller gave it; nothing is checked."""
    names: Sequence[str] = ("rows", "values")
    if not isinstance(gradient, RowGradient):
        names = ("indices", "offsets", "grad_output", "weights", "indptr", "data")
    found = [getattr(gradient, name, None) for name in names]
    return [array for array in found if array is not None]


# --- arrays -----------------------------------------------------------------------------------------------


def _values(what: str, given: Any, target: Target, rows: int | None, of: str, matrix: bool = True) -> Any:
    """Check float values: (rows, dim) as a matrix, else (rows,)."""
    reader = target.reader
    array = reader.read(what, given, target)
    dtype, shape = array.dtype, array.shape
    fits = len(shape) == 2 and shape[1] == target.dim and rows in (None, shape[0])
    if fits and matrix and dtype is target.dtype:  # as almost always
        return reader.ready(what, array, dtype, target, matrix)
    if dtype.kind != "f" or dtype.itemsize not in (4, 8):
        raise target.refuse(
            GradientTypeError,
            f"{what} has dtype {dtype}, expected float32 or float64; convert it first",
        )
    if matrix:
        if len(shape) == 1 and target.ndim == 1:
            array = reader.as_column(array)
        fits = array.ndim == 2 and array.shape[1] == target.dim
    else:
        fits = len(shape) == 1
    if not fits or rows not in (None, shape[0]):
        count = "n" if rows is None else str(rows)
        shapes = f"({count},)"
        if matrix:
            shapes = f"({count}, {target.dim})" + (f" or ({count},)" if target.ndim == 1 else "")
        raise target.refuse(
            GradientError,
            f"{what} has shape {tuple(shape)}, expected {shapes}: one row or value for each of {of}"
            + for_values(what, tuple(shape), rows, target.dim if matrix else None),
        )
    return reader.ready(what, array, target.dtype, target, matrix)


_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)


def _integers(what: str, given: Any, target: Target, length: int | None = None) -> Any:
    """Check a 1-D array of integers and bring it to int32 or int64."""
    reader = target.reader
    array = reader.read(what, given, target)
    dtype = array.dtype
    if (dtype is _INT64 or dtype is _INT32) and length is None and array.ndim == 1:
        return reader.ready(what, array, dtype, target, False)
    if isinstance(array, np.ndarray) and array.size == 0 and not isinstance(given, np.ndarray):
        array = array.astype(np.int64)  # an empty list has no dtype of its own
    dtype = array.dtype
    if dtype.kind not in "iu":
        raise target.refuse(
            GradientTypeError,
            f"{what} has dtype {dtype}, expected integers (int32 or int64); "
            + ("use np.flatnonzero(mask)" if dtype.kind == "b" else "convert with .astype(np.int64)"),
        )
    if array.ndim != 1 or length not in (None, array.shape[0]):
        count = "n" if length is None else str(length)
        remedy = for_ids(what, tuple(array.shape), target.dim)
        raise target.refuse(
            GradientError, f"{what} has shape {tuple(array.shape)}, expected ({count},){remedy}"
        )
    if dtype.kind == "u" and isinstance(array, np.ndarray):
        _refuse_huge(what, array, target)
    wanted = _INT32 if dtype.kind == "i" and dtype.itemsize <= 4 else _INT64
    return reader.ready(what, array, wanted, target, False)


def _refuse_huge(what: str, array: NDArray[Any], target: Target) -> None:
    """Raise for a number that int64 cannot hold."""
    if array.dtype.itemsize == 8 and array.size:
        large = np.flatnonzero(array > np.uint64(np.iinfo(np.int64).max))
        if len(large):
            at = int(large[0])
            raise target.refuse(
                GradientIndexError, f"{what}[{at}] is {array[at]}, which no index can be (at most 2**63 - 1)"
            )


# --- the forms --------------------------------------------------------------------------------------------


def _read_rows(names: Names, rows: Any, values: Any, target: Target) -> Given:
    ids = _integers(names.ids, rows, target)
    values = _values(names.values, values, target, ids.shape[0], names.ids)
    return Given(ROWS, names, ids, values)


def _read_coo(names: Names, rows: Any, columns: Any, data: Any, target: Target) -> Given:
    ids = _integers(names.ids, rows, target)
    n = ids.shape[0]
    columns = _integers(names.columns, columns, target, n)
    data = _values(names.values, data, target, n, "the entries", matrix=False)
    return Given(COO, names, ids, data, columns=columns)


def _read_bags(gradient: BagGradient, target: Target, names: Names = _BAGS) -> Given:
    ids = _integers(names.ids, gradient.indices, target)
    values = _values(names.values, gradient.grad_output, target, None, "the bags")
    n, bags = ids.shape[0], values.shape[0]
    offsets = _integers(names.offsets, gradient.offsets, target)
    length = offsets.shape[0]
    if length not in (bags, bags + 1):
        raise target.refuse(
            GradientError,
            f"{names.offsets} has {length} entries, expected {bags + 1} (or {bags}, without the last) for "
            f"the {bags} rows of grad_output",
        )
    if length == 0 and n:
        raise target.refuse(
            GradientIndexError, f"{names.offsets} is empty, expected a bag for the {n} indices"
        )
    weights = None
    if gradient.weights is not None:
        weights = _values(names.weights, gradient.weights, target, n, "indices", matrix=False)
    return Given(BAGS, names, ids, values, offsets, weights, gradient.mode == "mean")


def _read_compressed(
    form: int, what: str, indptr: Any, indices: Any, data: Any, target: Target, exact: bool
) -> Given:
    """``exact``: the arrays hold what indptr names and no more. SciPy allows capacity beyond it."""
    names = Names(f"{what}indices", f"{what}data", f"{what}indptr", of="column")
    indptr = _integers(names.offsets, indptr, target, (target.dim if form == CSC else target.rows) + 1)
    indices = _integers(names.ids, indices, target)
    data = _values(names.values, data, target, None, "the entries", matrix=False)
    capacity = indices.shape[0]
    n = None if exact else target.reader.stored(indptr)
    if n is None or not 0 <= n <= capacity:  # that is found with what else the pointer holds
        n = capacity
    if data.shape[0] < n or (exact and data.shape[0] != n):
        raise target.refuse(
            GradientError,
            f"{names.values} has {data.shape[0]} entries, expected {n}, one for each of indices",
        )
    if n < capacity:
        indices = indices[:n]
    return Given(form, names, indices, data if data.shape[0] == n else data[:n], indptr)


def _read_scipy(gradient: Any, target: Target) -> Given:
    layout, reader = gradient.format, target.reader
    what = "sparse" if reader.layouts == ("csr",) else "scipy.sparse"
    what = f"{what} {layout.upper()}"
    if layout not in reader.layouts:
        why = "array, expected CSR, CSC or COO"
        if reader.layouts == ("csr",):
            why = "matrix, which is not offered on a GPU, expected CSR"
        raise target.refuse(GradientTypeError, f"got a {what} {why}; convert it with .tocsr()")
    one_d = len(gradient.shape) == 1
    needed = {"coo": ("coords",) if one_d else ("row", "col")}.get(layout, ("indptr", "indices"))
    for attribute in (*needed, "data"):
        if getattr(gradient, attribute, None) is None:
            raise target.refuse(
                GradientTypeError,
                f"got a {type_name(gradient)} that calls itself {layout!r} but has no {attribute}, "
                f"expected {reader.forms}",
            )
    target.check_shape(what, gradient.shape)
    what += " "
    if one_d:  # a 1-D array names rows, each with one value
        indices = gradient.indices if layout == "csr" else gradient.coords[0]
        return _read_rows(Names(what + "indices", what + "data"), indices, gradient.data, target)
    if layout != "coo":
        form = CSR if layout == "csr" else CSC
        return _read_compressed(
            form, what, gradient.indptr, gradient.indices, gradient.data, target, exact=False
        )
    names = Names(what + "row", what + "data", columns=what + "col")
    return _read_coo(names, gradient.row, gradient.col, gradient.data, target)
