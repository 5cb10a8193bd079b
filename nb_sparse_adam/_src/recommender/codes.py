# SPDX-License-Identifier: Apache-2.0
"""Ids of users and items as they come, in codes 0, 1, ..., and the distinct pairs of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.recommender.interactions import grouped, sorted_distinct

Codes = npt.NDArray[np.int64]

_FRESH = 1 << 20  # pairs that may wait before those that came twice are dropped
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")


class Found(NamedTuple):
    """Interactions: users and items in codes of `Ids`, and what else is wanted of them; all parallel."""

    users: Codes
    items: Codes
    weights: npt.NDArray[np.float64] | None = None
    times: npt.NDArray[Any] | None = None  # int64, float64 or datetime64


@dataclass(frozen=True)
class Pairs:
    """The distinct pairs of a file, and how many pairs there were."""

    found: Found
    read: int
    description: str


class Ids(dict[str, int]):
    """Ids, each with its code: 0, 1, ... as they come."""

    def __missing__(self, name: str) -> int:
        code = self[name] = len(self)
        return code

    def codes(self, names: Sequence[str]) -> Codes:
        """Return the codes of ids, and give new ids theirs."""
        return np.fromiter(map(self.__getitem__, names), np.int64, len(names))

    def sorted(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Return the ids in the order of `Interactions`, and the row there of each code."""
        names = list(self)
        if all(map(_is_integer, names)):
            ids = np.array([int(name) for name in names], dtype=np.int64)
        else:
            ids = np.array(names, dtype=object)
        order = np.argsort(ids, kind="stable")
        rows = np.empty(len(order), dtype=np.int64)
        rows[order] = np.arange(len(order))
        return ids[order], rows


def _is_integer(name: str) -> bool:
    """Say whether an id comes back from int64 as it was written."""
    return _INTEGER.fullmatch(name) is not None and -(2**63) <= int(name) < 2**63


def distinct_pairs(batches: Iterable[Found]) -> tuple[Found, int]:
    """Return the distinct ones of all pairs, and the number of all; repetitions never add up in memory.

    The weights of a pair are added, and of its times the latest is taken.
    """
    parts, merged, waiting, read = list[_Keyed](), 0, 0, 0
    for users, items, weights, times in batches:
        if not len(users):
            continue
        parts.append(_Keyed(users << 32 | items, weights, times))
        waiting += len(users)
        read += len(users)
        if waiting > max(merged, _FRESH):
            parts, waiting = [_merged(parts)], 0
            merged = len(parts[0].keys)
    if not parts:
        return Found(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)), 0
    keys, weights, times = _merged(parts)
    return Found(keys >> 32, keys & 0xFFFFFFFF, weights, times), read


class _Keyed(NamedTuple):
    """The same as `Found`, with a pair in one number."""

    keys: Codes
    weights: npt.NDArray[np.float64] | None
    times: npt.NDArray[Any] | None


def _merged(parts: list[_Keyed]) -> _Keyed:
    """Put parts together, each pair once, sorted."""
    keys = np.concatenate([part.keys for part in parts])
    weights = _concatenated([part.weights for part in parts])
    times = _concatenated([part.times for part in parts])
    if weights is None and times is None:
        return _Keyed(sorted_distinct(keys), None, None)
    keys, order, begins = grouped(keys)
    return _Keyed(
        keys,
        None if weights is None else np.add.reduceat(weights[order], begins),
        None if times is None else np.maximum.reduceat(times[order], begins),
    )


def _concatenated(parts: list[npt.NDArray[Any] | None]) -> npt.NDArray[Any] | None:
    """Concatenate arrays, if there are any: all parts have one, or none."""
    arrays = [part for part in parts if part is not None]
    return np.concatenate(arrays) if arrays else None
