# SPDX-License-Identifier: Apache-2.0
"""A list of gradients of one table, made one gradient, on the host: what is summed is then one thing.

So the rules are those of one gradient: duplicates are summed over the whole list, in its order, an element
whose total is zero is not active, and the step counts once. Rows join to rows, matrices to entries; where
there are bags, each row is a bag of one id; where there are bags or rows and matrices, each stored entry is a
bag of one id whose values are zero but for one. All arrays of what is joined are new ones, each read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.records import BAGS, COO, CSC, CSR, ROWS
from nb_sparse_adam._src.faults import id_error, offset_error
from nb_sparse_adam._src.gradients import Given, Names, Target, is_gradient, read

_NAMES = Names("ids", "values")  # never told: faults are those of a part


def read_several(gradients: Any, target: Target) -> Given:
    """Read a list or tuple of gradients, which become one; or raise a `GradientError`."""
    several: tuple[object, ...] = tuple(gradients)
    return _read_several(several, target) if any(map(is_gradient, several)) else read(gradients, target)


def _read_several(several: Sequence[object], target: Target) -> Given:
    targets = [target._replace(at=at) for at in range(len(several))]
    parts = tuple(map(read, several, targets))
    forms = {part.form for part in parts}
    if forms == {ROWS}:
        ids = np.concatenate([part.ids for part in parts])
        return Given(ROWS, _NAMES, ids, np.concatenate([part.values for part in parts]), parts=parts)
    if forms <= {CSR, CSC, COO}:
        rows, columns, values = map(np.concatenate, zip(*map(_entries, parts, targets), strict=True))
        return Given(COO, _NAMES, rows, values, columns=columns, parts=parts)
    return _join_bags(parts, targets)


def _join_bags(parts: Sequence[Given], targets: Sequence[Target]) -> Given:
    """Make everything bags of one gradient; with weights if any of them has some."""
    weighted = any(part.weights is not None or part.mean for part in parts)
    all_ids, all_offsets, all_values, all_weights = [], [], [], []
    so_far = 0
    for part, target in zip(parts, targets, strict=True):
        n, bags = part.ids.shape[0], part.values.shape[0]
        ids, values, weights, offsets = part.ids, part.values, part.weights, np.arange(bags)
        if part.form == BAGS:
            offsets = _pointer(part, target)[:bags]
        elif part.entries:
            ids, columns, data = _entries(part, target)
            columns = columns.copy()  # the user's may be changed meanwhile
            wrong = np.flatnonzero((columns < 0) | (columns >= target.dim))
            if len(wrong):
                what, at = part.names.ids if part.form == CSR else part.names.columns, int(wrong[0])
                raise id_error(part, what, at, int(columns[at]), target.dim, "column", target)
            values = np.zeros((n, target.dim), target.dtype)
            values[np.arange(n), columns] = data
        if part.mean:
            lengths = np.diff(offsets, append=n)
            with np.errstate(divide="ignore"):  # of empty bags, which are of no id
                weights = np.repeat(target.dtype.type(1) / lengths.astype(target.dtype), lengths)
        elif weights is None and weighted:
            weights = np.ones(n, target.dtype)
        all_ids.append(ids)
        all_offsets.append(offsets + so_far)
        all_values.append(values)
        all_weights.append(weights)
        so_far += n
    return Given(
        BAGS,
        _NAMES,
        np.concatenate(all_ids),
        np.concatenate(all_values),
        np.concatenate(all_offsets, dtype=np.int64),
        np.concatenate(all_weights) if weighted else None,
        parts=tuple(parts),
    )


def _entries(part: Given, target: Target) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Rows, columns and values of a matrix's entries, in their order."""
    if part.form == COO:
        return part.ids, part.columns, part.values
    pointer = _pointer(part, target)
    others = np.repeat(np.arange(len(pointer) - 1), np.diff(pointer))
    return (others, part.ids, part.values) if part.form == CSR else (part.ids, others, part.values)


def _pointer(part: Given, target: Target) -> NDArray[np.int64]:
    """Copy offsets, or raise if they do not start at 0, decrease, or do not end where they must.

    In the joined gradient they begin elsewhere, where it could not be seen that they are wrong.
    """
    n, offsets = part.ids.shape[0], np.array(part.offsets, np.int64)
    before = np.concatenate([np.zeros(min(1, len(offsets)), np.int64), offsets[:-1]])
    wrong = (offsets < before) | (offsets > n)
    if len(offsets):
        wrong[0] |= offsets[0] != 0
        if part.form != BAGS or len(offsets) > part.values.shape[0]:
            wrong[-1] |= offsets[-1] != n
    places = np.flatnonzero(wrong)
    if len(places):
        at = int(places[0])
        raise offset_error(part, at, int(offsets[at]), int(before[at]), n, target)
    return offsets
