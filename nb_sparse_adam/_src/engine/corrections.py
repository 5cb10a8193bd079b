# SPDX-License-Identifier: Apache-2.0
"""Adam's bias corrections, tabulated: a power per row (or per element) would cost more than the row."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# 2 × 64k float32 are 512 kB: they stay in a core's second-level cache. β₂ = 0.999 needs 17k entries in
# float32 and 38k in float64.
MAX_ENTRIES = 1 << 16


class Corrections(NamedTuple):
    """What bias correction multiplies with after k active steps, for k = 0..K.

    With c₁ = 1 − β₁ᵏ and c₂ = 1 − β₂ᵏ the update
    θ ← θ − lr · ``step_size[k]`` · m / (√v · ``scale[k]`` + ε) is

    * ``eps_hat=False``: ``step_size = 1/c₁``, ``scale = 1/√c₂`` (Kingma & Ba 2015, Algorithm 1);
    * ``eps_hat=True``: ``step_size = √c₂/c₁``, ``scale = 1`` (the same, end of section 2).

    ``k > K`` takes entry K where the table is ``complete``: both corrections have rounded to 1 there. Where
    it is not (β very near 1) they are computed from ``log_betas``.

    The two of one k lie side by side: rows whose elements have different counts look up each of them, and
    find both in one cache line.
    """

    pairs: NDArray[Any]  # (2 * (K + 1),), the table's dtype: step_size and scale by turns, from k = 0 on
    log_betas: NDArray[np.float64]  # (2,)
    eps_hat: bool
    complete: bool


@lru_cache(maxsize=16)
def corrections(beta1: float, beta2: float, eps_hat: bool, dtype: np.dtype[Any]) -> Corrections:
    """Tabulate the corrections for one pair of betas, up to the k at which they no longer change.

    Parameters
    ----------
    beta1, beta2 : float
        Adam's decay rates, 0 ≤ β < 1.
    eps_hat : bool
        Where ε is added; see `Corrections`.
    dtype : numpy.dtype
        float32 or float64: the dtype of the parameter table.

    Returns
    -------
    Corrections
        Shared by every table with these options: not to be written to.
    """
    logs = np.array([math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)])
    k = np.arange(1, MAX_ENTRIES, dtype=np.float64)
    # 1 − βᵏ loses most of its digits for β near 1 and small k; −expm1(k·log β) does not.
    c1, c2 = -np.expm1(k * logs[0]), -np.expm1(k * logs[1])
    pairs = np.ones((MAX_ENTRIES, 2), dtype)
    if eps_hat:
        pairs[1:, 0] = np.sqrt(c2) / c1
    else:
        pairs[1:, 0] = 1 / c1
        pairs[1:, 1] = 1 / np.sqrt(c2)
    # Once 1 − βᵏ itself rounds to 1 for both, every later entry is 1.
    unsettled = np.flatnonzero((c1.astype(dtype) != 1) | (c2.astype(dtype) != 1))
    last_unsettled = int(unsettled[-1]) + 1 if len(unsettled) else 0
    size = min(last_unsettled + 2, MAX_ENTRIES)
    complete = last_unsettled + 1 < MAX_ENTRIES
    return Corrections(pairs[:size].reshape(-1), logs, eps_hat, complete)
