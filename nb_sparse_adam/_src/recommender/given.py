# SPDX-License-Identifier: Apache-2.0
"""Interactions as people have them in memory: CSR matrices, frames, arrays -> `Interactions`, and times."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.recommender.columns import named_columns
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, UserItems, hold_out
from nb_sparse_adam.errors import InteractionsError, OptionError

_TIME_NAMES = ("timestamp", "time", "date", "datetime", "unixtime", "ts", "createdat", "eventtime")


class Given(NamedTuple):
    """What was given: interactions, and when each was last seen, if that is known."""

    interactions: Interactions
    times: npt.NDArray[Any] | None  # (n,), parallel to ``interactions.pairs.indices``; larger is later


class Columns(NamedTuple):
    """Names of a frame's columns; None: to be found."""

    user: str | None = None
    item: str | None = None
    time: str | None = None


def given(data: Any, columns: Columns = Columns(), needs_times: bool = False) -> Given:  # noqa: B008
    """Take interactions as they come.

    Parameters
    ----------
    data : Interactions, sparse matrix, frame, or tuple of arrays
        A SciPy matrix or array of shape (users, items), by its attributes: ids are then its row and column
        numbers, and what is stored must be 1 (or 0: no interaction). A frame of polars, pandas, pyarrow, or
        anything with ``__arrow_c_stream__``. ``(users, items)`` or ``(users, items, times)``, (n,) each.
    columns : Columns
        Of a frame; refused with anything else.
    needs_times : bool
        Whether times are wanted: it is an error if there are none.

    Raises
    ------
    InteractionsError
        If they cannot be understood; the message says what was looked for.
    OptionError
        If columns are named of what has none.
    """
    frame = _is_frame(data)
    if not frame and any(columns):
        raise OptionError(
            f"user_column, item_column, time_column: got {[name for name in columns if name]}, but the "
            f"interactions are {type(data).__name__}, which has no columns with names; leave them out"
        )
    if isinstance(data, Split):
        raise InteractionsError("interactions: got a Split; pass its interactions, with validation=...")
    if isinstance(data, Interactions):
        made = Given(data, None)
    elif frame:
        made = _of_frame(data, columns, needs_times)
    elif hasattr(data, "tocsr") and hasattr(data, "shape"):
        made = Given(_of_matrix(data), None)
    elif isinstance(data, tuple | list) and len(data) in (2, 3):
        made = _of_arrays(*data)
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


def _of_matrix(matrix: Any) -> Interactions:
    csr = matrix.tocsr()
    if len(csr.shape) != 2:
        raise InteractionsError(f"interactions: got a matrix of shape {csr.shape}, expected (users, items)")
    values = np.asarray(csr.data)
    odd = np.flatnonzero((values != 0) & (values != 1))
    if len(odd):
        raise InteractionsError(
            f"interactions: the matrix holds {values[odd[0]]!s}; weights are not used by any loss: give 1 "
            f"for an interaction, for example by (matrix > 0).astype('float32')"
        )
    users = np.repeat(np.arange(csr.shape[0], dtype=np.int64), np.diff(csr.indptr))
    stored = values != 0
    pairs = UserItems.from_pairs(users[stored], np.asarray(csr.indices)[stored], *csr.shape)
    if not len(pairs):
        raise InteractionsError(f"interactions: the matrix of shape {csr.shape} holds none")
    n_users, n_items = csr.shape
    users_, items_ = np.arange(n_users, dtype=np.int64), np.arange(n_items, dtype=np.int64)
    repeated = int(stored.sum()) - len(pairs)
    return Interactions(pairs, users_, items_, repeated, f"matrix of {n_users:,} users x {n_items:,} items")


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
        time = next((name for name in names if _plain(name) in _TIME_NAMES), None)
    wanted = [name for name in (user, item, time) if name is not None]
    for name in wanted:
        if name not in names:
            raise InteractionsError(f"interactions: there is no column {name!r}; the frame has {names}")
    arrays = [frame[name].to_numpy() for name in wanted]
    made = _of_arrays(*arrays)
    described = f"frame (users in {user!r}, items in {item!r})"
    ours = made.interactions
    return Given(Interactions(ours.pairs, ours.user_ids, ours.item_ids, ours.repeated, described), made.times)


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def _of_arrays(users: Any, items: Any, times: Any = None) -> Given:
    interactions = Interactions.from_ids(users, items)
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
