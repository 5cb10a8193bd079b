# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are functions of a key and a counter: the same on any number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit

_STRIDE = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@jit
def splitmix64(key: Any, counter: Any) -> Any:
    """Return number `counter` of splitmix64 (Steele, Lea & Flood 2014): 64 random bits."""
    x = key + np.uint64(counter) * _STRIDE
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@jit
def random_bits(key: Any, counter: Any) -> Any:
    """Return 32 random bits: the upper half of number `counter` of splitmix64."""
    return splitmix64(key, counter) >> np.uint64(32)
