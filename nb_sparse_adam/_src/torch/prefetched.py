# SPDX-License-Identifier: Apache-2.0
"""Pulls that were begun ahead, for the lookups that are to come."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nb_sparse_adam.errors import ServerTimeout

MOST = 8  # that wait for their lookup; one more, and the oldest is given up


class _Begun(NamedTuple):
    ids: Tensor
    train: bool
    pulling: Any


class Prefetched:
    """The pulls of a table.

    Lookups are expected in the order of the pulls, those in training and the others apart.
    """

    def __init__(self, client: Any, table: str) -> None:
        self._client, self._table = client, table
        self._begun: deque[_Begun] = deque()
        self.counts = dict.fromkeys(("pulls", "prefetched", "unused", "failed"), 0)

    def begin(self, ids: Tensor, train: bool) -> None:
        """Begin a pull."""
        ids = ids.clone()  # buffers of ids are used again
        begun = _Begun(ids, train, self._client.begin_pull({self._table: ids.numpy()}, train=train))
        if len(self._begun) == MOST:
            self._begun.popleft()
            self.counts["unused"] += 1
        self._begun.append(begun)

    def pull(self, ids: Tensor, train: bool) -> Any:
        """Return the vectors of (n,) ids, of a pull that was begun with them, or else of a fresh one."""
        pulling = self._take(ids, train)
        if pulling is not None:
            try:
                found = pulling.result()[self._table]
            except ServerTimeout:  # its time counts from its beginning; it may have been in vain since
                self.counts["failed"] += 1
            else:
                self.counts["prefetched"] += 1
                return found
        self.counts["pulls"] += 1
        return self._client.pull({self._table: ids.numpy()}, train=train)[self._table]

    def _take(self, ids: Tensor, train: bool) -> Any:
        """Find the first pull of these ids; give up those before it, or all if there is none."""
        others = [each for each in self._begun if each.train != train]
        begun = deque(each for each in self._begun if each.train == train)
        found = None
        while begun and found is None:
            first = begun.popleft()
            if torch.equal(first.ids, ids):
                found = first.pulling
            else:
                self.counts["unused"] += 1
        self._begun = deque([*others, *begun])
        return found
