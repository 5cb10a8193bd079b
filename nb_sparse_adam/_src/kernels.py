# SPDX-License-Identifier: Apache-2.0
"""Adam inside a user's own compiled loop: a table that is lent to it, and the update of one row.

numba's caches of users' functions know `LentTable` by its name, and by the module that it is public in: both
stay.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam import __version__
from nb_sparse_adam._src.engine.codecs import PLAIN
from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.formula import (
    after,
    correction,
    counts_agree,
    is_nonfinite,
    most_of,
    one_more,
)
from nb_sparse_adam._src.engine.intrinsics import array_at, load_count, store_count
from nb_sparse_adam._src.engine.kernel_cache import STAMP
from nb_sparse_adam._src.engine.layout import count_offset
from nb_sparse_adam._src.engine.records import ELEMENT, GLOBAL, ROW
from nb_sparse_adam._src.engine.rows import updates
from nb_sparse_adam._src.engine.view import viewed
from nb_sparse_adam._src.public import public


@public("nb_sparse_adam.typing")
class LentTable(NamedTuple):
    """A table as a user's own function is given it.

    Arrays only, and few of them: numba unpacks each member of a tuple at every call. Kernels find them by the
    record; the arrays keep the memory, and say of which dtypes it is. The tuple's type is another one
    in every version of the kernels: what numba has compiled of a user's function holds this version's layout,
    and numba's own cache knows the function by its file and by the types of its arguments.
    """

    param: Any  # (rows, dim) float32 or float64
    state: Any  # 1-D: words of the moments
    counts: Any  # 1-D: int32 or int64
    corrections: Any  # pairs, see `corrections.Corrections`
    settings: Any  # (1,) record of `records.TABLE`, read-only: it says where rows lie
    skips: Any  # (1,) bool, read-only: whether rows that are not finite are left out
    version: Any = np.empty(0, [(f"kernels {STAMP or __version__}", np.int8)])


def lent(
    param: NDArray[Any],
    record: NDArray[np.void],
    state: NDArray[Any],
    counts: NDArray[Any],
    corrections: NDArray[Any],
    skips: bool,
) -> LentTable:
    """Return a table for a user's own function, which cannot change the numbers that say where things are.

    Parameters
    ----------
    param : (rows, dim) array
        The table.
    record : (1,) record of `records.TABLE`
        Its own; it is copied, and so are its hyper-parameters.
    state, counts, corrections : 1-D arrays
        What the addresses in the record are about.
    skips : bool
        Whether rows that are not finite are left out.
    """
    settings = np.frombuffer(record.tobytes(), record.dtype)
    return LentTable(param, state, counts, corrections, settings, np.frombuffer(bytes([skips]), np.bool_))


@jit
def view(table: Any) -> Any:
    """Return the `View` of a `LentTable`; spans, which are for prefetching, are 0."""
    record = table.settings[0]
    counts = array_at(record["counts"], record["counts_length"], table.counts)
    nothing = np.int64(0)
    return viewed(
        record,
        array_at(record["param"], record["param_length"], table.param),
        array_at(record["state"], record["state_length"], table.state),
        counts,
        array_at(record["corrections"], record["corrections_length"], table.corrections),
        after(counts[0], most_of(counts)) if record["count_rule"] == GLOBAL else nothing,
        nothing,
        nothing,
        nothing,
        nothing,
    )


_updates = updates(PLAIN)
_update_all, _update_active, _update_element = _updates.all, _updates.active, _updates.element


@jit(entry=True)
def apply_row_gradient(table: Any, row: Any, gradient: Any) -> bool:
    """Apply the gradient of one row, from inside a user's own ``@njit`` function.

    Parameters
    ----------
    table : tuple
        What `SparseAdam.kernel_table` gives.
    row : int
        In 0..rows - 1.
    gradient : (dim,) array
        Contiguous, of the table's dtype; (1,) for a 1-D table. Not a part of ``table.param`` itself, which
        is written to while this is read: compute it into an array of your own. Duplicates are the caller's:
        each call is a step of the row.

    Returns
    -------
    bool
        False if the row was left out, because ``on_nonfinite="skip"`` and the gradient, or its square, is
        not finite. `SparseAdam.skipped_rows` does not count it.

    Raises
    ------
    IndexError
        If there is no such row.
    ValueError
        If the gradient has another length than a row, or its elements lie apart.

    Notes
    -----
    The formula, the order of operations and so the bits are those of `SparseAdam.step`: Kingma & Ba 2015,
    Algorithm 1. Nothing is locked: threads that update one row at the same time lose updates, as Hogwild
    accepts (Niu et al. 2011); with rows of their own they are exact. A count stays at the end of its type
    (2³¹ − 1 for int32) instead of overflowing: the corrections have long been 1 there.
    """
    if not 0 <= row < min(table.param.shape[0], table.settings[0]["rows"]):  # a NaN is no row either
        raise IndexError("apply_row_gradient: no such row, expected 0 <= row < len(table)")
    if len(gradient) != table.param.shape[1]:
        raise ValueError("apply_row_gradient: expected a gradient as long as a row")
    if len(gradient) > 1 and gradient.strides[0] != gradient.itemsize:
        raise ValueError("apply_row_gradient: expected a contiguous gradient, pass .copy() of it")
    r = np.int64(row)
    own, rule = view(table), table.settings[0]["count_rule"]
    if table.skips[0] and is_nonfinite(gradient, 0, own.dim, own.sign):
        return False
    k = own.global_step
    if rule == ELEMENT:
        if own.dim == 0:
            return True
        if not counts_agree(own, r):
            # Without scratch memory for the corrections of each element: one after the other.
            for j in range(own.dim):
                if gradient[j] != 0:
                    _update_element(own, r, j, own.sign * gradient[j])
            return True
        count = load_count(own.counts, count_offset(own, r))
        step_size, scale = correction(own, np.int64(one_more(own, count, True)))
        _update_active(own, r, gradient, 0, own.sign, count, own.lr * step_size, scale, 0, own.dim)
        return True
    if rule == ROW:
        count = one_more(own, load_count(own.counts, count_offset(own, r)), True)
        store_count(own.counts, count_offset(own, r), count)
        k = np.int64(count)
    step_size, scale = correction(own, k)
    _update_all(own, r, gradient, 0, own.sign, own.lr * step_size, scale, 0, own.dim)
    return True
