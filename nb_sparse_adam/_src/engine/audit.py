# SPDX-License-Identifier: Apache-2.0
"""Which sum of a gradient is not finite: asked before the first write, where one might be and is refused."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.formula import is_nonfinite
from nb_sparse_adam._src.engine.grouping import first_bag
from nb_sparse_adam._src.engine.integers import integer, integers
from nb_sparse_adam._src.engine.records import COMPRESSED, DISTINCT, OVERFLOW, SEGMENTS
from nb_sparse_adam._src.engine.sums import first_long, sum_blocks, sum_entry, sum_segment
from nb_sparse_adam._src.engine.view import open_gradient


@jit
def row_of(gradient: Any, e: Any) -> Any:
    """The row of entry e, of the pointer of rows in the user's memory: for a message alone."""
    length = gradient["offsets_length"]
    return first_bag(integers(gradient["offsets"], length, gradient["offsets_bytes"]), length, e)


@jit
def tell(record: Any, place: Any, row: Any, ids: Any) -> None:
    """Write the fault down."""
    record["fault"], record["place"], record["got"], record["before"] = OVERFLOW, place, row, ids


@functools.cache
def audit_for(real: np.dtype[Any]) -> Any:
    """Make ``audit(tables, gradients, found, i, scratch)`` for gradients of a dtype.

    It looks for the first unit of gradient i whose sum, or its square, is not finite, and writes a fault
    OVERFLOW into its record of what was found: the unit as its place, its row, and how many ids it is the sum
    of. Without one it writes nothing.

    * tables, gradients, found : (T,) records of `records.TABLE`, `records.GRADIENT`, `records.FOUND`
    * i : int
    * scratch : (dim or more,) of the dtype
    """
    opened = open_gradient(real)

    @jit(entry=True, announced=f"what looks for {real} sums that overflow")
    def audit(tables: Any, gradients: Any, found: Any, i: Any, scratch: Any) -> None:
        record, dim = found[i], tables[i]["dim"]
        rows = tables[i]["rows"] - tables[i]["spare"]  # what is for the spare one is left out
        g = opened(gradients[i], record)
        one = scratch.dtype.type(1)
        sum_blocks(g, 0, record["blocks"])
        which = first_long(g, 0)
        if g.kind == COMPRESSED:
            for e in range(gradients[i]["ids_length"]):
                if is_nonfinite(g.values, e * g.values_stride, 1, one):
                    tell(record, e, row_of(gradients[i], e), 1)
                    return
            return
        for s in range(record["units"]):
            if g.kind == DISTINCT:
                row = integer(g.ids, s)
                if is_nonfinite(g.values, s * g.values_stride, dim, one) and row < rows:
                    tell(record, s, row, 1)
                    return
                continue
            start, end = integer(g.starts, s), integer(g.starts, s + 1)
            row = g.packed[start] >> g.row_shift
            if g.kind == SEGMENTS:
                which = sum_segment(g, start, end, which, scratch, 0)
                bad = is_nonfinite(scratch, 0, dim, one)
            else:
                total = sum_entry(g, s)
                bad = not total * total < np.inf
                row, end = row // dim, start + 1  # an entry is told as one number
            if bad and row < rows:
                tell(record, s, row, end - start)
                return

    return audit
