# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the content of a gradient, as preparing has found it -> the error that says so.

Preparing leaves a fault and its place in a record (`records.FOUND`), on a CPU as on a GPU; what it means to
the user is said here, once for both.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nb_sparse_adam._src.engine import records
from nb_sparse_adam._src.gradients import Given, Target
from nb_sparse_adam.errors import GradientError, GradientIndexError, NonFiniteGradientError


def fault_error(found: Any, given: Given, n: int, target: Target) -> GradientError:
    """Make an error of a fault.

    Parameters
    ----------
    found : record of `records.FOUND`
        Of the gradient; its ``fault`` is not `records.NO_FAULT`.
    given : Given
        The gradient; of its arrays only the names, the form and where ids were are asked, and of those that
        it was joined from how long they are.
    n : int
        How many ids it has.
    target : Target
        Its table.
    """
    fault, place, got = int(found["fault"]), int(found["place"]), int(found["got"])
    if given.parts and fault not in (records.CHANGED, records.TOO_MANY_BITS, records.OVERFLOW):
        given, fault, place, target = _in_part(given, fault, place, target)
    names = given.names
    if fault in (records.ID, records.COLUMN):
        column = fault == records.COLUMN and given.form == records.COO
        of_columns = column or given.form == records.CSR
        what, of = (names.columns, "column") if column else (names.ids, names.of)
        return id_error(given, what, place, got, target.dim if of_columns else target.rows, of, target)
    if fault == records.OFFSET:
        return offset_error(given, place, got, int(found["before"]), n, target)
    if fault == records.CHANGED:
        return changed_meanwhile(target)
    if fault == records.TOO_MANY_BITS:
        return too_many_bits(target, n)
    if fault == records.NOT_FINITE:
        row, *column_of = (place,) if given.entries else divmod(place, target.dim)
        at = (_place_of(given, row), *column_of)
        return _nonfinite_error(names.values, at, float(found["value"]), target)
    if fault == records.WEIGHT_NOT_FINITE:
        return _nonfinite_error(names.weights, (place,), float(found["value"]), target)
    return _overflow_error(target, got, 1 if given.entries else int(found["before"]))


def _place_of(given: Given, place: int) -> int:
    """Where the user's array has what is at a place of ours."""
    return place if given.kept is None else int(given.kept[place])


def _in_part(given: Given, fault: int, place: int, target: Target) -> tuple[Given, int, int, Target]:
    """Say in which gradient of a list a fault is, and where there."""
    of_values = fault == records.NOT_FINITE
    dim = target.dim if of_values and not given.entries else 1
    unit, column = divmod(place, dim)  # a row of values, an id or an entry
    at = 0
    for part in given.parts:
        length = part.values.shape[0] if of_values else part.ids.shape[0]
        if unit < length:
            break
        unit, at = unit - length, at + 1
    if fault == records.COLUMN and part.form == records.CSR:  # whose ids are columns
        fault = records.ID
    return part, fault, unit if part.entries else unit * dim + column, target._replace(at=at)


def id_error(
    given: Given, what: str, place: int, got: int, upper: int, of: str, target: Target
) -> GradientError:
    """Say which id is out of range; ``what`` is its array's name, and ``of`` what it names."""
    return target.refuse(
        GradientIndexError,
        f"{what}[{_place_of(given, place)}] is {got}, expected 0 <= {of} < {upper}"
        + ("; negative ids do not count from the end" if got < 0 else ""),
    )


def offset_error(given: Given, place: int, got: int, before: int, n: int, target: Target) -> GradientError:
    """Say why an offset cannot be: they start at 0, never decrease, and end at n, the last one exactly."""
    what = given.names.offsets
    kind: type[GradientError] = GradientIndexError
    if place == 0 and got != 0:
        why = "expected 0"
    elif got < before:
        why = f"less than {what}[{place - 1}] = {before}; expected a sequence that never decreases"
    elif 0 <= got <= n:
        why = f"expected len(indices) = {n}"
        if given.form == records.CSR:  # no index is out of range: some entries belong to no row
            kind = GradientError
    else:
        why = f"expected at most {n}"
    return target.refuse(kind, f"{what}[{place}] is {got}, {why}")


def _nonfinite_error(what: str, place: tuple[int, ...], got: float, target: Target) -> GradientError:
    where = ", ".join(map(str, place[:1] if target.ndim == 1 else place))
    return target.refuse(
        NonFiniteGradientError,
        f"{what}[{where}] is {got} as {target.dtype}, expected a finite number; nothing was updated. "
        "on_nonfinite='skip' leaves out the rows that receive one, 'propagate' lets it through",
    )


def _overflow_error(target: Target, row: int, ids: int) -> GradientError:
    return target.refuse(
        NonFiniteGradientError,
        f"the gradient of {target.name_of_row(row)}, "
        + (f"a sum over {ids} ids, " if ids > 1 else "")
        + f"or its square, overflows {target.dtype} (at most {np.finfo(target.dtype).max:.3g}); nothing "
        "was updated. Clip the gradient, or set on_nonfinite='skip' to leave such rows out",
    )


def changed_meanwhile(target: Target) -> GradientError:
    """Refuse a gradient that is not what it was when it was checked."""
    return target.refuse(
        GradientError,
        "it was changed while step was reading it, expected arrays that nobody writes to until step returns; "
        "nothing was updated. Pass copies, or let whoever fills the arrays wait",
    )


def shares_memory(what: str, target: Target) -> GradientError:
    """Refuse a gradient that would change while it is read."""
    return target.refuse(
        GradientError,
        f"{what} shares memory with a table or its state, which would change while it is read; pass a copy",
    )


def too_many_bits(target: Target, n: int) -> GradientError:
    """Refuse ids that cannot be packed."""
    return target.refuse(
        GradientError,
        f"{n} ids or entries into a table of {target.rows} rows of {target.dim} cannot be grouped: a "
        "position and an id take more than 63 bits together; pass the gradient in several smaller ones",
    )
