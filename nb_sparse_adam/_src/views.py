# SPDX-License-Identifier: Apache-2.0
"""What users see of a table's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.public import public

if TYPE_CHECKING:
    from nb_sparse_adam._src.engine.state import TableState

T = TypeVar("T")


class Shown(property, Generic[T]):
    """A property that shows one of what its object holds: read-only, and typed.

    Parameters
    ----------
    path : str
        Where it is, with dots, seen from the object.
    doc : str
    change : callable, optional
        Called with the object and another value, if there may be one.
    """

    def __init__(self, path: str, doc: str, change: Callable[[Any, Any], None] | None = None) -> None:
        super().__init__(attrgetter(path), change)
        self.__doc__ = doc

    if TYPE_CHECKING:

        @overload
        def __get__(self, instance: None, owner: type | None = None) -> Shown[T]: ...

        @overload
        def __get__(self, instance: object, owner: type | None = None) -> T: ...

        def __get__(self, instance: Any, owner: type | None = None) -> Any: ...

        def __set__(self, instance: Any, value: NoReturn) -> None: ...


@public("nb_sparse_adam.typing")
class RowState(NamedTuple):
    """State of some rows of an `EmbeddingTable`, copied.

    Attributes
    ----------
    exp_avg, exp_avg_sq : (n, dim) array of the table's dtype
        Running means of the gradient and of its square.
    steps : integer array
        Active steps so far: (n,), (n, dim) with ``step_counts="element"``, 0-d with "global".
    seen : (n,) uint32 array
        How often look-ups in training have seen the id since it has a row.
    """

    exp_avg: NDArray[Any]
    exp_avg_sq: NDArray[Any]
    steps: NDArray[Any]
    seen: NDArray[np.uint32]


@public("nb_sparse_adam.typing")
class StateView:
    """State of one table, as `SparseAdam.state` shows it.

    Attributes
    ----------
    exp_avg, exp_avg_sq : array of the table's shape and dtype
        Running means of the gradient and of its square (m and v). Read-only live views: 0 before the first
        step. Of a table on a GPU, device arrays that are not to be written to; they have ``copy_to_host()``
        and ``__cuda_array_interface__``.
    steps : integer array
        Active steps so far (k): of the table's shape for ``step_counts="element"``, (rows,) for "row", 0-d
        for "global". A read-only live view; of a table on a GPU with "global" a copy on the host.
    shape, dtype
        Of the parameter table, as it was given; the dtype of its moments, too.
    """

    __slots__ = ("_table",)

    def __init__(self, table: TableState) -> None:
        self._table = table

    def __repr__(self) -> str:
        return repr(self._table)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the arrays, and are of no optimizer."""
        held = ("name", "given", "shape", "dtype", "exp_avg", "exp_avg_sq", "steps", "skipped_rows")
        return _kept, ({name: getattr(self._table, name) for name in held},)

    name = Shown[str]("_table.name", "Name of the table.")
    param = Shown[Any]("_table.given", "The parameter table, as it was given.")
    shape = Shown[tuple[int, ...]]("_table.shape", "Shape of the parameter table.")
    dtype = Shown[np.dtype[Any]]("_table.dtype", "Dtype of the parameter table and of its moments.")
    exp_avg = Shown[Any]("_table.exp_avg", "Running mean of the gradient (m).")
    exp_avg_sq = Shown[Any]("_table.exp_avg_sq", "Running mean of the squared gradient (v).")
    steps = Shown[Any]("_table.steps", "Active steps so far (k).")
    skipped_rows = Shown[int](
        "_table.skipped_rows", 'How often a row was left out of a step by ``on_nonfinite="skip"``.'
    )


def _kept(arrays: dict[str, Any]) -> StateView:
    """Show a table's state as it was when it was copied."""
    table: Any = SimpleNamespace(**arrays)
    return StateView(table)


class States(Mapping[str, StateView]):
    """The state of each table of an optimizer, by name, as they are now."""

    __slots__ = ("_tables",)

    def __init__(self, tables: Mapping[str, TableState]) -> None:
        self._tables = tables

    def __getitem__(self, name: str) -> StateView:
        return self._tables[name].view

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def __repr__(self) -> str:
        return repr(dict(self))
