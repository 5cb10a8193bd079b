# SPDX-License-Identifier: Apache-2.0
"""Which ids get a row: those that were seen so often, or by chance.

How often ids were seen that have no row is counted in a filter of bounded size, a count-min sketch
(Cormode & Muthukrishnan 2005) with conservative updates (Estan & Varghese 2002): each id has one counter in
each of four rows of counters, of which the smallest is its count, and only the smallest are raised. A count
is never too small, so that an id is never admitted too late. It is too large only if other ids share all four
of its counters: with ids that take n of the m counters of a row, for about (n/m)⁴ of them. Before that
becomes more than 1 in 16, when half of the counters are taken, all counts are halved, so that the filter
forgets what was seen once, long ago.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.random import splitmix64
from nb_sparse_adam._src.table.checks import whole
from nb_sparse_adam.errors import OptionError, OptionTypeError

_ROWS = 4
_MOST = 255


@jit
def _place(key: Any, number: Any, row: Any, width: Any) -> Any:
    """Where an id has its counter in a row of counters."""
    h = splitmix64(key ^ np.uint64(number), row + 1)
    return np.uint64(row) * np.uint64(width) + (((h >> np.uint64(32)) * np.uint64(width)) >> np.uint64(32))


@jit(entry=True)
def _see(counters: Any, key: Any, ids: Any, wanted: Any, admitted: Any, taken: Any) -> None:
    """Count ids, in their order; say which have been seen so often by then."""
    width = len(counters) // _ROWS
    for i in range(len(ids)):
        least = np.int64(_MOST)
        for row in range(_ROWS):
            least = min(least, np.int64(counters[_place(key, ids[i], row, width)]))
        admitted[i] = least + 1 >= wanted
        for row in range(_ROWS):
            at = _place(key, ids[i], row, width)
            if counters[at] == least and least < _MOST:
                taken[0] += np.int64(least == 0)
                counters[at] += np.uint8(1)


@jit(entry=True)
def _draw(key: Any, ids: Any, counter: Any, below: Any, admitted: Any) -> None:
    """Admit each sighting of an id with some probability."""
    for i in range(len(ids)):
        h = splitmix64(splitmix64(key ^ np.uint64(ids[i]), 0), counter + i)
        admitted[i] = (h >> np.uint64(11)) < below


class Admission:
    """Says which of the ids that have no row get one.

    Parameters
    ----------
    given : None, int or float
        At once; when an id is seen for so many times; each time with a probability.
    size : int
        Bytes of the filter.
    seed : int
    """

    def __init__(self, given: Any, size: Any, seed: int) -> None:
        self.given = given
        expected = "None, a number of sightings 1 <= n <= 255, or a probability 0 < p < 1"
        if given is not None and (
            isinstance(given, (bool, np.bool_))
            or not isinstance(given, (int, float, np.integer, np.floating))
        ):
            raise OptionTypeError(f"admission is {given!r} ({type(given).__name__}), expected {expected}")
        by_count = isinstance(given, (int, np.integer))
        if given is not None and not (1 <= given <= _MOST if by_count else 0 < given < 1):
            raise OptionError(f"admission is {given!r}, expected {expected}")
        self.at_once = given is None or (by_count and given == 1)
        self.by_count = by_count and not self.at_once
        self.size = whole("admission_bytes", size, 64, 1 << 40)
        self._key = np.uint64(seed % 2**64) ^ np.uint64(0xA5A5A5A55A5A5A5A)
        self.counters = np.zeros(self.size // _ROWS * _ROWS if self.by_count else 0, np.uint8)
        self.taken = np.zeros(1, np.int64)  # counters that are not 0
        self.draws = 0  # sightings so far, with a probability

    def see(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Count sightings of ids that have no row; say which of them get one."""
        admitted = np.ones(len(ids), np.bool_)
        if self.at_once:
            return admitted
        with np.errstate(over="ignore"):  # without the JIT, hashes overflow on NumPy's scalars
            if not self.by_count:
                below = np.uint64(int(float(self.given) * 2**53))
                _draw(self._key, ids, self.draws, below, admitted)
                self.draws += len(ids)
                return admitted
            _see(self.counters, self._key, ids, int(self.given), admitted, self.taken)
        if 2 * int(self.taken[0]) > len(self.counters):
            self.counters >>= 1
            self.taken[0] = np.count_nonzero(self.counters)
        return admitted

    def kept(self) -> Any:
        """Copy what `see` changes, for `restore`."""
        return self.counters.copy(), self.taken.copy(), self.draws

    def restore(self, kept: Any) -> None:
        """Go back to what `kept` gave."""
        self.counters[...], self.taken[...], self.draws = kept
