# SPDX-License-Identifier: Apache-2.0
"""Records as kernels use them: each number a local variable of its own, each address an array.

Arrays have their true lengths, so that a lane with bounds checks sees every access. What is a number of the
table's dtype in a record of float64 is rounded already.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.formula import after, most_of
from nb_sparse_adam._src.engine.integers import integers
from nb_sparse_adam._src.engine.intrinsics import array_at
from nb_sparse_adam._src.engine.layout import state_spans
from nb_sparse_adam._src.engine.prefetching import PIECE
from nb_sparse_adam._src.engine.records import COMPRESSED, DISTINCT, ELEMENT, ENTRIES, ROW

MOST_PREFETCHED = 256  # elements of a wide row; the hardware follows the rest by itself


class View(NamedTuple):
    """A table in one step."""

    # 1-D arrays: parameters, words of the state, counts, and pairs of corrections.
    param: Any
    state: Any
    counts: Any
    corrections: Any
    last: Any  # the K of ``corrections``
    most: Any  # the highest count of its type
    log_beta1: Any
    log_beta2: Any
    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    lr: Any
    eps: Any
    sign: Any  # −1 to maximize
    rows: Any
    dim: Any
    # Where rows lie: for `layout` alone.
    param_stride: Any
    state_stride: Any
    exp_avg_sq_offset: Any
    count_stride: Any
    eps_hat: Any
    complete: Any
    global_step: Any  # GLOBAL: the count of this step
    # How many elements of a row are prefetched in each of its arrays; 0 counts: they are among the words.
    # Where a row is one record: bytes of it for each piece of elements, all of its bytes, those before param.
    param_span: Any
    state_span: Any
    count_span: Any
    # Where a row is one record: in which byte of it the time is noted, and what time it is.
    noted_at: Any
    time: Any


@jit
def viewed(
    record: Any, param: Any, state: Any, counts: Any, corrections: Any, global_step: Any, param_span: Any,
    state_span: Any, count_span: Any, time: Any,
) -> Any:  # fmt: skip
    """Return the `View` of a record of `records.TABLE` and of the arrays that it has the addresses of."""
    real = param.dtype.type
    # In the order of its fields: numba cannot read a call with so many names.
    return View(
        param,
        state,
        counts,
        corrections,
        record["corrections_length"] // 2 - 1,
        most_of(counts),
        record["log_beta1"],
        record["log_beta2"],
        real(record["beta1"]),
        real(record["one_minus_beta1"]),
        real(record["beta2"]),
        real(record["one_minus_beta2"]),
        real(record["lr"]),
        real(record["eps"]),
        real(record["sign"]),
        record["rows"] - record["spare"],
        record["dim"],
        record["param_stride"],
        record["state_stride"],
        record["exp_avg_sq_offset"],
        record["count_stride"],
        record["eps_hat"] != 0,
        record["complete"] != 0,
        global_step,
        param_span,
        state_span,
        count_span,
        record["noted_at"],
        time,
    )


@functools.cache
def open_table(
    real: np.dtype[Any], word: np.dtype[Any], count: np.dtype[Any], count_rule: int, one_record: bool = False
) -> Any:
    """Make ``view(record)`` for tables of one kind.

    Parameters
    ----------
    real, word, count : dtype
        Of parameters, of the words of the state, of counts.
    count_rule : int
        ELEMENT, ROW or GLOBAL.
    one_record : bool
        Whether all of a row is one piece of memory.
    """
    real_type, word_type, count_type = real.type, word.type, count.type
    word_size, count_size = word.itemsize, count.itemsize

    @jit
    def view(record: Any) -> Any:
        """Take a record of `records.TABLE` apart."""
        dim = record["dim"]
        counts = array_at(record["counts"], record["counts_length"], count_type)
        columns = np.int64(0)
        global_step = np.int64(0)
        if count_rule == ELEMENT:
            columns = dim
        elif count_rule == ROW:
            columns = np.int64(1)
        else:
            global_step = after(counts[0], most_of(counts))
        span, time = min(dim, MOST_PREFETCHED), np.int64(0)
        words, count_span = state_spans(record, word_size, count_size, columns, MOST_PREFETCHED)
        if one_record:
            span, words, count_span = record["row_size"] * PIECE // dim, record["row_size"], record["lead"]
            time = array_at(record["clock"], 1, np.int64)[0]
        return viewed(
            record,
            array_at(record["param"], record["param_length"], real_type),
            array_at(record["state"], record["state_length"], word_type),
            counts,
            array_at(record["corrections"], record["corrections_length"], real_type),
            global_step,
            span,
            words,
            count_span,
            time,
        )

    return view


# --- a gradient -------------------------------------------------------------------------------------------


class Gradient(NamedTuple):
    """A gradient as preparing has left it.

    A *unit* is a row of DISTINCT ids, a segment, a row of COMPRESSED ones, or, of ENTRIES, a row present.
    Sorted ids are packed: ``packed[i] >> row_shift`` is the row of the i-th smallest id, or row * dim +
    column of the i-th entry, and ``packed[i] & payload_mask`` its payload. That is the row of ``values``, or,
    if ``weighted``, the position p of the id: its row of ``values`` is bag_of[p], its weight coefficients[p].
    """

    kind: Any  # DISTINCT, SEGMENTS, COMPRESSED or ENTRIES
    ids: Any  # Integers: the user's, of DISTINCT; columns of COMPRESSED
    packed: Any  # (ids,) int64
    row_shift: Any
    payload_mask: Any
    starts: Any  # Integers: where segments, rows or entries begin, and the end of the last
    rows: Any  # Integers: the row of each unit of COMPRESSED
    row_starts: Any  # Integers: the first entry of each unit of ENTRIES, and the end of the last
    bag_of: Any  # Integers
    weighted: Any
    coefficients: Any  # (ids,) if weighted; (rows of values,) with means; (0,): all are 1
    values: Any  # 1-D
    values_stride: Any
    dim: Any  # elements of a row of values
    long: Any  # (long segments,) int64, ascending
    long_first: Any  # (long segments + 1,) int64: the first block of each in ``block_sums``
    block_sums: Any  # 1-D: dim elements a block


@functools.cache
def open_gradient(real: np.dtype[Any]) -> Any:
    """Make ``open(gradient, found)`` for gradients of a dtype."""
    real_type = real.type

    @jit
    def opened(gradient: Any, found: Any) -> Any:
        """Return the `Gradient` of a record of `records.GRADIENT` and one of `records.FOUND`."""
        kind, n, units = found["kind"], gradient["ids_length"], found["units"]
        width = 8 if found["wide"] else 4
        none = np.int64(0)
        starts_length, rows_length = units + 1, none
        if kind == DISTINCT:
            starts_length = none
        elif kind == COMPRESSED:
            starts_length = rows_length = found["present_length"]
        is_sorted = kind != DISTINCT and kind != COMPRESSED
        weighted = gradient["weights"] != 0
        means = found["reciprocals"] != 0
        values_rows = gradient["values_rows"]
        length = (values_rows - 1) * gradient["values_stride"] + gradient["values_dim"]
        coefficients, coefficients_length = none, none
        if weighted:
            coefficients, coefficients_length = gradient["weights"], n
        elif means:
            coefficients, coefficients_length = found["reciprocals"], values_rows
        return Gradient(
            kind,
            integers(gradient["ids"], n, gradient["ids_bytes"]),
            array_at(found["packed"], n if is_sorted else none, np.int64),
            found["row_shift"],
            (np.int64(1) << found["row_shift"]) - 1,
            integers(found["starts"], starts_length, width),
            integers(found["present_rows"], rows_length, width),
            integers(found["row_starts"], found["present"] + 1 if kind == ENTRIES else none, width),
            integers(found["bag_of"], n if weighted else none, width),
            weighted,
            array_at(coefficients, coefficients_length, real_type),
            array_at(gradient["values"], length if values_rows > 0 else none, real_type),
            gradient["values_stride"],
            gradient["values_dim"],
            array_at(found["long"], found["long_length"], np.int64),
            array_at(
                found["long_first"], found["long_length"] + 1 if found["blocks"] > 0 else none, np.int64
            ),
            array_at(found["block_sums"], found["blocks"] * gradient["values_dim"], real_type),
        )

    return opened
