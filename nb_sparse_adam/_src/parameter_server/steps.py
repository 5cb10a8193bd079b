# SPDX-License-Identifier: Apache-2.0
"""Steps that are sums over workers: their parts, until all of them are there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.parameter_server.payloads import Payload, joined
from nb_sparse_adam._src.parameter_server.routing import route


class Staged:
    """The parts that workers have sent of steps that nobody has decided yet."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, int, int], tuple[Payload, int]] = {}  # step, rank, incarnation

    @property
    def first(self) -> int:
        """The number of the first record of the log that is still needed; more than any if none is."""
        return min((number for _, number in self._parts.values()), default=2**63)

    def has(self, step: int, rank: int, client: int) -> bool:
        """Whether a part is here."""
        return (step, rank, client) in self._parts

    def put(self, step: int, rank: int, client: int, payload: Payload, number: int) -> None:
        """Keep a part. Those of steps before it will not be asked for any more."""
        self._parts = {key: part for key, part in self._parts.items() if key[0] >= step}
        self._parts[step, rank, client] = payload, number

    def take(self, step: int, parts: Iterable[tuple[int, int]]) -> Payload:
        """Take the parts of a step, as one payload in which each id is there once.

        The gradients of an id are summed in the order of ranks.
        """
        whole = joined(self._parts[step, rank, client][0] for rank, client in parts)
        self._parts = {key: part for key, part in self._parts.items() if key[0] > step}
        return {name: summed(*arrays) for name, arrays in whole.items()}


def summed(
    ids: NDArray[np.int64], times: NDArray[np.int64], grads: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
    """Make each id be there once; sum its gradients, and how often it was used."""
    routed = route(ids, 1)
    counted = np.zeros(len(routed.ids), np.int64)
    np.add.at(counted, routed.place, times)
    return routed.ids, counted, routed.sum(grads)[0]
