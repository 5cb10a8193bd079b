# SPDX-License-Identifier: Apache-2.0
"""A vector for someone who was not there in training: the best one, items' vectors being as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_PAIRS = 50_000  # of an item that was had and one that was not, about
_MOST, _LEAST = 1000, 20  # of the latter
_STEPS, _CLOSE = 50, 1e-10
_LEAST_REG = 1e-4  # without any the best vector may be infinitely long


def fold_in_bpr(
    items: npt.NDArray[Any], had: npt.NDArray[np.int64], reg: float, random: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Minimize the BPR loss of one user over the user's vector.

    With D the differences ``V_i - V_j`` of items i that were had and sampled items j that were not, this is

        mean softplus(-D x)  +  reg/2 · ‖x‖²

    the loss of Rendle et al. (2009) with V fixed. It is strictly convex; Newton's method with halved steps
    (Boyd & Vandenberghe 2004, "Convex Optimization", algorithm 9.5) finds the only minimum.

    Parameters
    ----------
    items : float32 array, shape (n_items, dim)
    had : int64 array, shape (n,)
        Rows of the items that were had, ascending, each once; 0 < n < n_items.
    reg : float
        As in training, but at least 1e-4.
    random : numpy.random.Generator
        Draws the others; all of them are taken where they are few.

    Returns
    -------
    float32 array, shape (dim,)
    """
    others = np.setdiff1d(np.arange(len(items)), had, assume_unique=True)
    wanted = int(np.clip(_PAIRS // len(had), _LEAST, _MOST))
    if wanted < len(others):
        others = np.sort(random.choice(others, wanted, replace=False))
    vectors = items.astype(np.float64)
    differences = (vectors[had][:, None, :] - vectors[others][None, :, :]).reshape(-1, items.shape[1])
    reg = max(reg, _LEAST_REG)

    def loss(x: npt.NDArray[np.float64]) -> float:
        return float(np.logaddexp(0, -(differences @ x)).mean() + 0.5 * reg * (x @ x))

    x = np.zeros(items.shape[1])
    value = loss(x)
    for _ in range(_STEPS):
        margins = differences @ x
        slope = np.exp(-np.logaddexp(0, margins))  # of softplus(-z): -1 / (1 + exp(z)), without overflow
        gradient = reg * x - slope @ differences / len(differences)
        curvature = (slope * (1 - slope) / len(differences))[:, None] * differences
        step = np.linalg.solve(differences.T @ curvature + reg * np.eye(len(x)), gradient)
        decrement = float(gradient @ step)
        if decrement < _CLOSE:
            break
        size = 1.0
        while size > _CLOSE and loss(x - size * step) > value - 0.25 * size * decrement:
            size /= 2
        x = x - size * step
        value = loss(x)
    return x.astype(np.float32)
