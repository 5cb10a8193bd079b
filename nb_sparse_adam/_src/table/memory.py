# SPDX-License-Identifier: Apache-2.0
"""Zeroed memory that grows where it is.

Addresses are reserved at once, and the system gives pages for them when they are touched.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam.errors import TableError

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def physical_memory() -> int:
    """How many bytes of memory the machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 36


def reserve(size: int, where: str) -> NDArray[np.uint8]:
    """Reserve address space for so many bytes, all of them zero.

    Pages of 2 MB are asked for where the system has them: rows are drawn at random, and a processor
    remembers where few pages lie.

    Parameters
    ----------
    size : int
    where : str
        Which table it is for.

    Raises
    ------
    TableError
        If the system does not give that much address space, as with a limit on it (``ulimit -v``), or
        where it promises no more memory than there is (``vm.overcommit_memory=2``).
    """
    try:
        if os.name == "posix":
            made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        else:
            made = mmap.mmap(-1, size)
    except (OSError, OverflowError, ValueError, MemoryError) as error:
        raise TableError(
            f"{where}: the system refuses to reserve {size:,} bytes of addresses, which take no memory until "
            f"rows are there ({error}); pass capacity, the most rows that there will be, or lift the limit "
            "(ulimit -v; sysctl vm.overcommit_memory)"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system that was built without them
            made.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(made, np.uint8)
