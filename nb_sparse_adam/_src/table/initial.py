# SPDX-License-Identifier: Apache-2.0
"""Initial values of rows: functions of a seed, an id and the place in the row, and of nothing else.

Only what IEEE 754 says to the last bit is used (sums, products, quotients, square roots), and neither a
mathematical library nor fused operations, so that an id has the same bits on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import bits_of_real8, real_of_bits8, select
from nb_sparse_adam._src.engine.random import splitmix64
from nb_sparse_adam._src.table.records import NORMAL, UNIFORM

_PER_53 = 2.0**-53
_PER_32 = 2.0**-32
_LN_2 = 0.6931471805599453


@jit
def logarithm(x: Any) -> Any:
    """Return ln x of a normal float64 > 0, to 1e-12: of x = 2ᵉ·m it is e·ln 2 + 2 artanh((m-1)/(m+1))."""
    bits = bits_of_real8(x)
    exponent = (bits >> np.int64(52)) - np.int64(1023)
    m = real_of_bits8((bits & np.int64(0x000FFFFFFFFFFFFF)) | np.int64(0x3FF0000000000000))
    large = m > 1.4142135623730951
    m = select(large, 0.5 * m, m)
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    series = 1.0 + t * (
        1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15))))))
    )
    return (np.float64(exponent) + select(large, 1.0, 0.0)) * _LN_2 + 2.0 * s * series


@jit
def normal_quantile(p: Any) -> Any:
    """Return the quantile of the normal distribution, 2⁻³⁶ <= p <= 1 - 2⁻³⁶, with a relative error of 1.2e-7.

    Algorithm AS 241 (Wichura 1988), PPND7, without what it has for smaller p. Both of its branches are
    computed, so that it can be vectorized.
    """
    q = p - 0.5
    r = 0.180625 - q * q
    middle = (
        q
        * (((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179)
        / (((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0)
    )
    t = np.sqrt(-logarithm(select(q < 0, p, 1.0 - p))) - 1.6
    tail = (((0.17023821103 * t + 1.3067284816) * t + 2.7568153900) * t + 1.4234372777) / (
        (0.12021132975 * t + 0.73700164250) * t + 1.0
    )
    return select(abs(q) <= 0.425, middle, select(q < 0, -tail, tail))


@jit
def fill_initial(store: Any, number: Any, out: Any, at: Any, dim: Any) -> None:
    """Write the initial values of an id to ``out[at:at + dim]``; of GIVEN ones nothing but zeros.

    The numbers of an id are those of a generator whose key is a mixture of the seed and the id: element j has
    number j, its upper 32 bits for a normal distribution, 53 for a uniform one.
    """
    kind, first, second = store["initializer"], store["first"], store["second"]
    real = out.dtype.type
    key = splitmix64(splitmix64(np.uint64(store["seed"]), 0) ^ np.uint64(number), 1)
    if kind == NORMAL:
        for j in range(dim):
            bits = np.int64(splitmix64(key, j) >> np.uint64(32))
            out[np.uint64(at + j)] = real(first + second * normal_quantile((bits + 0.5) * _PER_32))
    elif kind == UNIFORM:
        for j in range(dim):
            bits = np.int64(splitmix64(key, j) >> np.uint64(11))
            out[np.uint64(at + j)] = real(first + (second - first) * (bits * _PER_53))
    else:
        for j in range(dim):
            out[np.uint64(at + j)] = real(0)
