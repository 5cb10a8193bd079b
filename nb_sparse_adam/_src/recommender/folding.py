# SPDX-License-Identifier: Apache-2.0
"""A vector for someone who was not there in training: the best one, items' vectors being as they are.

It minimizes the loss of one user, as `losses` has it, over the user's vector x alone:

    bpr        mean over i, j of softplus(−⟨V_i − V_j, x⟩)  +  reg/2 · ‖x‖²
    softmax    mean over i of −z(i) + ln( exp z(i) + Σ_j exp z(j) )  +  reg/2 · ‖x‖²,  z(j) = ⟨V_j, x⟩ / τ

with items i that were had and j that were not. Of the latter a sample is taken where they are many: for the
softmax each then stands for as many as it was drawn from. Both are strictly convex; Newton's method with
halved steps (Boyd & Vandenberghe 2004, "Convex Optimization", algorithm 9.5) finds the only minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.recommender.options import BPROptions

Vector = npt.NDArray[np.float64]
Derivatives = tuple[float, Vector, npt.NDArray[np.float64]]  # of the loss: value, gradient, second derivative

_PAIRS = 50_000  # of an item that was had and one that was not, about
_MOST, _LEAST = 1000, 20  # of the latter
_OTHERS = 20_000  # items of a softmax
_STEPS, _CLOSE = 100, 1e-10
_LEAST_REG = 1e-4  # without any the best vector may be infinitely long


def fold_in(
    items: npt.NDArray[Any], had: npt.NDArray[np.int64], options: BPROptions, random: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Minimize the loss of one user over the user's vector.

    Parameters
    ----------
    items : float32 array, shape (n_items, dim)
    had : int64 array, shape (n,)
        Rows of the items that were had, ascending, each once; 0 < n < n_items.
    options : BPROptions
        ``loss``, ``temperature`` and ``reg``, of which at least 1e-4 is used.
    random : numpy.random.Generator
        Draws the others; all of them are taken where they are few.

    Returns
    -------
    float32 array, shape (dim,)
    """
    others = np.setdiff1d(np.arange(len(items)), had, assume_unique=True)
    number = len(others)
    bpr = options.loss == "bpr"
    most = int(np.clip(_PAIRS // len(had), _LEAST, _MOST)) if bpr else _OTHERS
    if most < number:
        others = np.sort(random.choice(others, most, replace=False))
    positives, negatives = (items[rows].astype(np.float64) for rows in (had, others))
    if bpr:
        differences = (positives[:, None, :] - negatives[None, :, :]).reshape(-1, items.shape[1])
        found = _minimize(_bpr(differences), items.shape[1], options.reg)
    else:
        tau, each = options.temperature, np.log(number / len(others))
        found = _minimize(_softmax(positives / tau, negatives / tau, each), items.shape[1], options.reg)
    return found.astype(np.float32)


def _bpr(differences: npt.NDArray[np.float64]) -> Callable[[Vector], Derivatives]:
    def loss(x: Vector) -> Derivatives:
        margins = differences @ x
        slope = np.exp(-np.logaddexp(0, margins))  # of softplus(−z): −1 / (1 + exp(z)), without overflow
        curved = (slope * (1 - slope) / len(differences))[:, None] * differences
        value = float(np.logaddexp(0, -margins).mean())
        return value, -(slope @ differences) / len(differences), differences.T @ curved

    return loss


def _softmax(
    positives: npt.NDArray[np.float64], negatives: npt.NDArray[np.float64], each: float
) -> Callable[[Vector], Derivatives]:
    def loss(x: Vector) -> Derivatives:
        z, others = positives @ x, negatives @ x + each
        rest = others.max() + np.log(np.exp(others - others.max()).sum())  # ln Σ_j exp z(j)
        share = np.exp(-np.logaddexp(0, z - rest))  # of all but i, in the softmax of i
        weights = np.exp(others - rest)
        mean, second = weights @ negatives, negatives.T @ (weights[:, None] * negatives)
        away = positives - mean  # the expectation is mean + (1 − share) · away
        curved = (share * (1 - share) / len(z))[:, None] * away
        spread = share.mean() * (second - np.outer(mean, mean))
        value = float((np.logaddexp(z, rest) - z).mean())
        return value, -(share @ away) / len(z), spread + away.T @ curved

    return loss


def _minimize(loss: Callable[[Vector], Derivatives], dim: int, reg: float) -> Vector:
    """Find the x at which the loss and reg/2 · ‖x‖² are least."""
    reg = max(reg, _LEAST_REG)
    x = np.zeros(dim)
    value, slope, curvature = loss(x)
    for _ in range(_STEPS):
        gradient = slope + reg * x
        step = np.linalg.solve(curvature + reg * np.eye(dim), gradient)
        decrement = float(gradient @ step)
        if decrement < _CLOSE:
            break
        before = value + 0.5 * reg * (x @ x)
        size = 1.0
        while size > _CLOSE:
            at = x - size * step
            value, slope, curvature = loss(at)
            if value + 0.5 * reg * (at @ at) <= before - 0.25 * size * decrement:
                break
            size /= 2
        x = at
    return x
