# SPDX-License-Identifier: Apache-2.0
"""Where arrays lie: kernels are given addresses, and a gradient must not overlap a table."""

from __future__ import annotations

import ctypes
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEADER = object.__basicsize__
_pointer_at = ctypes.c_void_p.from_address
_words = ctypes.cast(8, ctypes.POINTER(ctypes.c_size_t))  # all memory, but for the first 8 bytes


def _said(array: NDArray[Any]) -> int:
    """What NumPy says, which takes it a microsecond."""
    return int(array.__array_interface__["data"][0])


class _Slow:
    """The address of an array's first element, as NumPy says it."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    @property
    def value(self) -> int:
        return _said(self._array)


def pointer_to(array: NDArray[Any]) -> Any:
    """Something whose ``value`` is where an array's memory begins, now and later.

    The pointer is the first thing after the header of Python's object, for every compiled extension reads it
    there.
    """
    slow = _Slow(array)
    quick = _pointer_at(id(array) + _HEADER)
    return quick if sys.implementation.name == "cpython" and quick.value == slow.value else slow


def _quick_address_of(array: NDArray[Any]) -> int:
    """Return where an array's memory begins."""
    return _words[(id(array) + _HEADER - 8) >> 3]  # type: ignore[no-any-return]


_probe = np.zeros(3)
address_of = _said if isinstance(pointer_to(_probe), _Slow) else _quick_address_of


def extent(array: Any, address: int) -> tuple[int, int]:
    """Return the addresses of the first byte of an array, and of the one after its last.

    Parameters
    ----------
    array : array
        NumPy's or another's, with ``shape``, ``strides`` and ``dtype``; not empty.
    address : int
        Of its first element.
    """
    first = last = address
    for length, stride in zip(array.shape, array.strides, strict=True):
        if stride > 0:
            last += (length - 1) * stride
        else:
            first += (length - 1) * stride
    return first, last + array.dtype.itemsize


class Memory:
    """Arrays that do not overlap; finds those that another array overlaps without asking each.

    Parameters
    ----------
    arrays : iterable of array
        C-contiguous.

    Attributes
    ----------
    first, last : int
        All of them lie between these addresses.
    """

    _FEW = 8  # to ask each takes less than to find out which to ask

    def __init__(self, arrays: Iterable[NDArray[Any]]) -> None:
        known = sorted(
            (
                (address_of(array), address_of(array) + array.nbytes, array)
                for array in arrays
                if array.nbytes
            ),
            key=lambda each: each[0],
        )
        self._known = known
        self.first, self.last = (known[0][0], max(end for _, end, _ in known)) if known else (0, 0)
        self._starts = [start for start, _, _ in known]
        self._ends = [end for _, end, _ in known]

    def arrays(self) -> Iterator[NDArray[Any]]:
        """Give them again."""
        return (array for _, _, array in self._known)

    def overlaps(self, array: NDArray[Any]) -> bool:
        """Whether an array shares an element with one of them, or might: an exact answer can take long."""
        size = array.nbytes
        if not size:
            return False
        start = address_of(array)
        end = start + size
        if not array.flags.c_contiguous:
            start, end = extent(array, start)
        if end <= self.first or start >= self.last:
            return False
        near: Sequence[Any] = self._known
        if len(near) > self._FEW:
            near = near[bisect_right(self._ends, start) : bisect_left(self._starts, end)]
        for first, last, memory in near:
            if start < last and first < end and _share_memory(array, memory):
                return True
        return False


def _share_memory(a: NDArray[Any], b: NDArray[Any]) -> bool:
    try:
        return bool(np.shares_memory(a, b, max_work=1000))  # type: ignore[arg-type]
    except Exception as error:  # TooHardError moved between NumPy 1.24 and 2
        if type(error).__name__ != "TooHardError":
            raise
        return True
