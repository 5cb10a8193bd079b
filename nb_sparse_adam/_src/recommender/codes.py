# SPDX-License-Identifier: Apache-2.0
"""Ids of users and items as they come, in codes 0, 1, ..., and the distinct pairs of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.recommender.interactions import sorted_distinct

Codes = npt.NDArray[np.int64]

_FRESH = 1 << 20  # pairs that may wait before those that came twice are dropped
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")


@dataclass(frozen=True)
class Pairs:
    """The distinct pairs of a file in codes of `Ids`, parallel, and how many pairs there were."""

    users: Codes
    items: Codes
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


def distinct_pairs(batches: Iterable[tuple[Codes, Codes]]) -> tuple[Codes, Codes, int]:
    """Return the distinct ones of all pairs, and the number of all; repetitions never add up in memory."""
    kept, fresh, waiting, read = np.empty(0, dtype=np.int64), [], 0, 0
    for users, items in batches:
        fresh.append(users << 32 | items)
        waiting += len(users)
        read += len(users)
        if waiting > max(len(kept), _FRESH):
            kept, fresh, waiting = sorted_distinct(np.concatenate([kept, *fresh])), [], 0
    kept = sorted_distinct(np.concatenate([kept, *fresh]))
    return kept >> 32, kept & 0xFFFFFFFF, read
