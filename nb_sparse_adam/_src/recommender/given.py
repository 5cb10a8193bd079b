# SPDX-License-Identifier: Apache-2.0
"""Interactions as people have them in memory: CSR matrices, frames, arrays -> `Interactions`, and times."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.recommender.columns import named_columns, named_times
from nb_sparse_adam._src.recommender.interactions import (
    Interactions,
    Split,
    UserItems,
    checked_weights,
    hold_out,
    is_weight,
)
from nb_sparse_adam.errors import InteractionsError, OptionError


class Given(NamedTuple):
    """What was given: interactions, and when each was last seen, if that is known."""

    interactions: Interactions
    times: npt.NDArray[Any] | None  # (n,), parallel to ``interactions.pairs.indices``; larger is later


class Columns(NamedTuple):
    """Names of a frame's columns; None: to be found."""

    user: str | None = None
    item: str | None = None
    time: str | None = None
    weight: str | None = None


def given(
    data: Any,
    columns: Columns = Columns(),  # noqa: B008
    needs_times: bool = False,
    sample_weight: Any = None,
) -> Given:
    """Take interactions as they come.

    Parameters
    ----------
    data : Interactions, sparse matrix, frame, or tuple of arrays
        A SciPy matrix or array of shape (users, items), by its attributes: ids are then its row and column
        numbers, and what is stored is a weight (or 0: no interaction). A frame of polars, pandas, pyarrow, or
        anything with ``__arrow_c_stream__``. ``(users, items)`` or ``(users, items, times)``, (n,) each.
    columns : Columns
        Of a frame; refused with anything else. Without a weight's, interactions have no weights.
    needs_times : bool
        Whether times are wanted: it is an error if there are none.
    sample_weight : array_like, shape (n,), optional
        Weights of interactions given as arrays; refused with anything else.

    Raises
    ------
    InteractionsError
        If they cannot be understood; the message says what was looked for.
    OptionError
        If columns are named of what has none.
    """
    frame = _is_frame(data)
    if not frame and any(columns):
        named = [name for name in columns if name]
        raise OptionError(
            f"user_column, item_column, time_column, weight_column: got {named}, but the interactions are "
            f"{type(data).__name__}, which has no columns with names; leave them out"
        )
    arrays = isinstance(data, tuple | list) and len(data) in (2, 3)
    if sample_weight is not None and not arrays:
        raise OptionError(
            f"sample_weight: is for (users, items), but the interactions are {type(data).__name__}; "
            f"{_instead(data, frame)}"
        )
    if isinstance(data, Split):
        raise InteractionsError("interactions: got a Split; pass its interactions, with validation=...")
    if isinstance(data, Interactions):
        made = Given(data, None)
    elif frame:
        made = _of_frame(data, columns, needs_times)
    elif _is_matrix(data):
        made = Given(_of_matrix(data), None)
    elif arrays:
        users, items, times = (*data, None)[:3]
        made = _of_arrays(users, items, times, sample_weight, "sample_weight")
    else:
        raise InteractionsError(
            f"interactions: got {type(data).__name__}, expected a SciPy matrix of users x items, a frame, "
            f"(users, items), or what read_interactions returns"
        )
    if needs_times and made.times is None:
        raise InteractionsError(
            "interactions: have no times, which validation='latest' needs; pass (users, items, times), or a "
            "frame with a time column"
        )
    return made


def _is_frame(data: Any) -> bool:
    return hasattr(data, "__arrow_c_stream__") or (hasattr(data, "columns") and hasattr(data, "__getitem__"))


def _is_matrix(data: Any) -> bool:
    return hasattr(data, "tocsr") and hasattr(data, "shape")


def _instead(data: Any, frame: bool) -> str:
    """Say where weights stand in interactions of other kinds."""
    if frame:
        return "name the column that has them with weight_column="
    if _is_matrix(data):
        return "what a matrix holds are the weights"
    if isinstance(data, Interactions):
        return "give them to Interactions.from_ids"
    return "leave it out"


def _of_matrix(matrix: Any) -> Interactions:
    csr = matrix.tocsr()
    if len(csr.shape) != 2:
        raise InteractionsError(f"interactions: got a matrix of shape {csr.shape}, expected (users, items)")
    values = np.asarray(csr.data)
    users = np.repeat(np.arange(csr.shape[0], dtype=np.int64), np.diff(csr.indptr))
    stored = values != 0
    users, items, values = users[stored], np.asarray(csr.indices)[stored], values[stored]
    n_users, n_items = csr.shape
    pairs = UserItems.from_pairs(users, items, n_users, n_items)
    if not len(pairs):
        raise InteractionsError(f"interactions: the matrix of shape {csr.shape} holds none")
    repeated = len(users) - len(pairs)
    if values.dtype != np.bool_ and (repeated or (values != 1).any()):
        weights = _of_stored(values, users, items)
        pairs = UserItems.from_pairs(users, items, n_users, n_items, weights)
    users_, items_ = np.arange(n_users, dtype=np.int64), np.arange(n_items, dtype=np.int64)
    weighted = "" if pairs.weights is None else ", weighted by what it holds"
    described = f"matrix of {n_users:,} users x {n_items:,} items{weighted}"
    return Interactions(pairs, users_, items_, repeated, described)


def _of_stored(
    values: npt.NDArray[Any], users: npt.NDArray[Any], items: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """Return what a matrix holds as weights."""
    with np.errstate(over="ignore", under="ignore"):
        weights = values.astype(np.float32) if values.dtype.kind in "iuf" else np.full(len(values), np.nan)
    bad = np.flatnonzero(~is_weight(weights))
    if len(bad):
        at = bad[0]
        raise InteractionsError(
            f"interactions: the matrix holds {values[at]!s} for user {users[at]} and item {items[at]}; what "
            f"it holds are weights, expected finite numbers greater than 0 (0: no interaction); give "
            f"(matrix > 0) to leave others out and count the rest the same"
        )
    return weights.astype(np.float32)


def _of_frame(frame: Any, columns: Columns, needs_times: bool) -> Given:
    if not (hasattr(frame, "columns") and hasattr(frame, "__getitem__")) or not hasattr(
        frame[next(iter(frame.columns))], "to_numpy"
    ):
        frame = require("polars", "train", "reading an Arrow table").DataFrame(frame)
    names = [str(name) for name in frame.columns]
    user, item = columns.user, columns.item
    if user is None or item is None:
        found = named_columns(names)
        if found is None:
            raise InteractionsError(
                f"interactions: the frame has the columns {names}, of which none say what is user and item; "
                f"name them with user_column= and item_column="
            )
        user, item = user or names[found[0]], item or names[found[1]]
    time = columns.time
    if time is None and needs_times:
        time = next((names[column] for column in named_times(names)), None)
    for name in (user, item, time, columns.weight):
        if name is not None and name not in names:
            raise InteractionsError(f"interactions: there is no column {name!r}; the frame has {names}")

    def column(name: str | None) -> Any:
        return None if name is None else frame[name].to_numpy()

    weight = columns.weight
    made = _of_arrays(column(user), column(item), column(time), column(weight), f"weight_column={weight!r}")
    weighted = "" if weight is None else f", weights in {weight!r}"
    described = f"frame (users in {user!r}, items in {item!r}{weighted})"
    ours = made.interactions
    return Given(Interactions(ours.pairs, ours.user_ids, ours.item_ids, ours.repeated, described), made.times)


def _of_arrays(users: Any, items: Any, times: Any = None, weights: Any = None, name: str = "") -> Given:
    if weights is not None:
        weights = checked_weights(name, weights, np.size(users), "leave such interactions out")
    interactions = Interactions.from_ids(users, items, weights)
    if times is None:
        return Given(interactions, None)
    when = np.asarray(times)
    if when.shape != np.shape(users):
        raise InteractionsError(
            f"times: got shape {when.shape}, expected {np.shape(users)}, one an interaction"
        )
    if when.dtype.kind == "M":
        when = when.astype("datetime64[us]").astype(np.int64)
    if when.dtype.kind not in "iuf" or (when.dtype.kind == "f" and not np.isfinite(when).all()):
        raise InteractionsError(f"times: got {when.dtype}, expected finite numbers or datetime64")
    rows = [
        np.searchsorted(ids, np.asarray(one)).astype(np.int64)
        for ids, one in ((interactions.user_ids, users), (interactions.item_ids, items))
    ]
    keys = rows[0] * interactions.pairs.n_items + rows[1]
    order = np.lexsort((when, keys))  # the latest of a pair comes last
    keys = keys[order]
    last = np.append(keys[1:] != keys[:-1], True)
    return Given(interactions, when[order][last])


def validation_split(data: Given, validation: float | str, seed: int) -> Split:
    """Hold out a part of every user's items: a random one, or the latest tenth.

    A user with n items gives ``floor(fraction * n + 1/2)`` of them, and keeps at least one; of the latest,
    one at least from a user with two or more.

    Parameters
    ----------
    data : Given
    validation : float or "latest"
        A fraction of each user's items, 0 < fraction < 1, or the latest tenth.
    seed : int
        Of the random part.

    Raises
    ------
    OptionError
        If `validation` is something else.
    """
    if isinstance(validation, str):
        if validation != "latest" or data.times is None:
            raise OptionError(f"validation: got {validation!r}, expected a fraction, 'latest' or None")
        pairs, fraction = data.interactions.pairs, 0.1
        users, counts = pairs.users(), pairs.counts()
        held = np.minimum(
            np.maximum((fraction * counts + 0.5).astype(np.int64), 1), np.maximum(counts - 1, 0)
        )
        order = np.lexsort((data.times, users))  # stable: of equal times the lower item counts as earlier
        is_test = np.empty(len(pairs), dtype=np.bool_)
        is_test[order] = pairs.indptr[1:][users] - np.arange(len(pairs)) <= held[users]
        ids = data.interactions.user_ids, data.interactions.item_ids
        return Split(
            pairs.select(~is_test), pairs.select(is_test), *ids, "the latest tenth of every user's items"
        )
    if isinstance(validation, bool) or not isinstance(validation, int | float):
        raise OptionError(f"validation: got {validation!r}, expected a fraction, 'latest' or None")
    return hold_out(data.interactions, validation, seed)
