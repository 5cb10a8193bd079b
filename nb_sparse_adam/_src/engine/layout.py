# SPDX-License-Identifier: Apache-2.0
"""Where the numbers of a row lie: the sole owner of every offset inside a table's memory.

Kernels ask the first functions, which take what has a table's strides as attributes (`view.View`; kernels of
a GPU compile the same functions), and count elements. Python lays a table out with `allocate`, and sees its
state with the methods of `Layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.codecs import Codec
from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import CACHE_LINE
from nb_sparse_adam._src.engine.records import ELEMENT, GLOBAL, ROW

Zeros = Callable[[int, "np.dtype[Any]"], NDArray[Any]]  # (length, dtype) -> (length,) zeros


# --- in kernels -------------------------------------------------------------------------------------------


@jit
def param_offset(table: Any, r: Any) -> Any:
    """Where row r begins in ``table.param``."""
    return r * table.param_stride


@jit
def exp_avg_offset(table: Any, r: Any) -> Any:
    """Where exp_avg of row r begins in ``table.state``."""
    return r * table.state_stride


@jit
def exp_avg_sq_offset(table: Any, r: Any) -> Any:
    """Where exp_avg_sq of row r begins in ``table.state``."""
    return r * table.state_stride + table.exp_avg_sq_offset


@jit
def count_offset(table: Any, r: Any) -> Any:
    """Where the counts of row r begin in ``table.counts``; by elements one each, else one for the row."""
    return r * table.count_stride


@jit
def state_spans(record: Any, word_size: Any, count_size: Any, columns: Any, most: Any) -> Any:
    """How many words and how many counts are to be prefetched for a row, each as one piece.

    Parameters
    ----------
    record : record of `records.TABLE`
    word_size, count_size : int
        Bytes of a word of the state, and of a count.
    columns : int
        Counts of a row: dim, 1, or 0 where the table has only one.
    most : int
        How many elements of a wide row are prefetched.

    Returns
    -------
    int, int
        Words from exp_avg on: those of both moments, and of the counts if they lie after them in the record
        of the row; of a wide row the first ones of exp_avg. And counts, 0 where they are among those words.
    """
    dim, row_size = record["dim"], record["state_stride"] * word_size
    if dim > most:
        return most, min(columns, most)
    words = record["exp_avg_sq_offset"] + dim
    distance = record["counts"] - record["state"]
    if columns > 0 and words * word_size <= distance < row_size == record["count_stride"] * count_size:
        return (distance + columns * count_size + word_size - 1) // word_size, np.int64(0)
    return words, columns


# --- in Python --------------------------------------------------------------------------------------------


class State(NamedTuple):
    """The memory of a table's moments and counts, and where in it they lie; strides count elements."""

    words: NDArray[Any]  # 1-D, of the storage dtype
    counts: NDArray[Any]  # 1-D, int32 or int64; perhaps in the same memory
    rows: int
    dim: int
    count_rule: int  # ELEMENT, ROW or GLOBAL
    state_stride: int
    exp_avg_sq_offset: int
    count_stride: int  # 0: one count for the table

    @property
    def exp_avg(self) -> NDArray[Any]:
        """(rows, dim) words of exp_avg, a view."""
        return _strided(self.words, 0, self.rows, self.dim, self.state_stride)

    @property
    def exp_avg_sq(self) -> NDArray[Any]:
        """(rows, dim) words of exp_avg_sq, a view."""
        return _strided(self.words, self.exp_avg_sq_offset, self.rows, self.dim, self.state_stride)

    @property
    def steps(self) -> NDArray[Any]:
        """Counts, a view: (rows, dim) by elements, (rows, 1) by rows, (1, 1) of the table."""
        rows, columns = self.shape_of_counts
        return _strided(self.counts, 0, rows, columns, self.count_stride)

    @property
    def shape_of_counts(self) -> tuple[int, int]:
        """The shape of `steps`."""
        return {ELEMENT: (self.rows, self.dim), ROW: (self.rows, 1), GLOBAL: (1, 1)}[self.count_rule]

    @property
    def shares_memory(self) -> bool:
        """Whether counts lie in the records of the moments."""
        return bool(np.may_share_memory(self.words, self.counts))

    def wide_counts(self, zeros: Zeros) -> NDArray[np.int64]:
        """Make room for all counts in 64 bits, zeroed, in the shape of `steps`."""
        shape = self.shape_of_counts
        return zeros(math.prod(shape), np.dtype(np.int64)).reshape(shape)

    def with_counts(self, counts: NDArray[Any]) -> State:
        """Go on with other counts, C-contiguous in the shape of `steps`, in memory of their own."""
        stride = 0 if self.count_rule == GLOBAL else counts.shape[1]
        return self._replace(counts=counts.reshape(-1), count_stride=stride)


def allocate(rows: int, dim: int, real: np.dtype[Any], codec: Codec, count_rule: int, zeros: Zeros) -> State:
    """Lay out a table's state: a record a row, of two moments and, where it pays, its counts.

    A row's one count goes into the record of short rows only. Where two moments fill whole cache lines, a
    record with a count would lie on a line more, as often as counts of their own cost one.

    Parameters
    ----------
    rows, dim : int
        Shape of the table.
    real : dtype
        Of its parameters, float32 or float64.
    codec : Codec
        How moments are stored.
    count_rule : int
        ELEMENT, ROW or GLOBAL.
    zeros : callable
        Gives zeroed memory of a length and dtype.
    """
    word = codec.storage(real)
    columns = {ELEMENT: dim, ROW: 1, GLOBAL: 1}[count_rule]
    moments = 2 * dim * word.itemsize
    record = moments + columns * 4
    pays = count_rule == ELEMENT or (count_rule == ROW and record <= CACHE_LINE)
    if pays and moments % 4 == 0 and record % word.itemsize == 0:
        words = zeros(rows * record // word.itemsize, word)
        counts = words.view(np.int32)[moments // 4 :]
        return State(words, counts, rows, dim, count_rule, record // word.itemsize, dim, record // 4)
    if count_rule == GLOBAL:
        counts, stride = zeros(1, np.dtype(np.int64)), 0
    else:
        counts, stride = zeros(rows * columns, np.dtype(np.int32)), columns
    return State(zeros(2 * rows * dim, word), counts, rows, dim, count_rule, 2 * dim, dim, stride)


def _strided(flat: NDArray[Any], first: int, rows: int, columns: int, stride: int) -> NDArray[Any]:
    strides = (stride * flat.itemsize, flat.itemsize)
    return np.lib.stride_tricks.as_strided(flat[first:], (rows, columns), strides)
