# SPDX-License-Identifier: Apache-2.0
"""Sparse Adam, slow and obvious: what every fast path is held to.

Plain Python and NumPy in float64, one element at a time, written from the equations of
Kingma & Ba (2015, Algorithm 1, and "epsilon hat" of its section 2) and from nothing else. It imports
nothing of the package, on purpose, so that no mistake can be on both sides.

Every form of gradient first becomes the same thing: contributions ``(row, {element: number})``, and
from them ``Sums``, the present rows with their summed dense gradients. Then each present row is
updated, element by element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """How far the optimizer may be from the oracle, relative to the magnitudes that the oracle tracks.

    A magnitude is what the number would be if all its terms had the same sign, so that one figure
    holds for sums that cancel as well.
    """

    rtol: float  # up to some tens of steps: tens of units in the last place (1.2e-7 and 2.2e-16)
    atol: float  # below the smallest normal number there is no relative precision to ask for

    def assert_close(self, got, expected, magnitude):
        __tracebackhide__ = True
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected), "NaN in other places")
        infinite = np.isinf(got) | np.isinf(expected)
        np.testing.assert_array_equal(got[infinite], expected[infinite])
        finite = np.isfinite(expected)
        error = np.abs(np.subtract(got, expected, where=finite, out=np.zeros(expected.shape)))
        allowed = self.rtol * magnitude + self.atol
        worst = np.argmax(error[finite] / allowed[finite]) if finite.any() else None
        assert worst is None or error[finite][worst] <= allowed[finite][worst], (
            f"got {got[finite][worst]!r}, expected {expected[finite][worst]!r}: "
            f"error {error[finite][worst]:.3g}, allowed {allowed[finite][worst]:.3g}"
        )


# The one table of tolerances.
TOLERANCES = {
    np.dtype(np.float32): Tolerance(rtol=2e-6, atol=1.2e-38),
    np.dtype(np.float64): Tolerance(rtol=4e-15, atol=2.3e-308),
}


@dataclass
class Sums:
    """A gradient as present rows: ``values[row]`` is the summed gradient, a list of ``dim`` floats.

    ``magnitudes[row]`` has the same sums of absolute values. ``bad`` holds the rows that received a
    number that is not finite, or whose sum, or its square, is beyond the largest number of the dtype.
    """

    values: dict[int, list[float]] = field(default_factory=dict)
    magnitudes: dict[int, list[float]] = field(default_factory=dict)
    bad: set[int] = field(default_factory=set)


def rounded(values, dtype):
    """``values`` rounded to the table's dtype, as float64: conversion is the first thing that happens."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(dtype).astype(np.float64)


def exact_sum(numbers):
    """Correctly rounded sum; with NaN or infinity among the numbers, the IEEE 754 one."""
    if all(math.isfinite(number) for number in numbers):
        return math.fsum(numbers)
    return sum(numbers)


def sum_rows(contributions, dim, dtype):
    """``Sums`` of ``(row, {element: number})``; a row is present even if it receives no number."""
    received: dict[int, list[list[float]]] = {}
    for row, numbers in contributions:
        elements = received.setdefault(int(row), [[] for _ in range(dim)])
        for element, number in numbers.items():
            elements[int(element)].append(float(number))
    sums = Sums()
    largest = math.sqrt(np.finfo(dtype).max)
    for row, elements in received.items():
        sums.values[row] = [exact_sum(numbers) for numbers in elements]
        sums.magnitudes[row] = [exact_sum([abs(number) for number in numbers]) for numbers in elements]
        # Comparisons with NaN are false, so this catches NaN, infinity and too large.
        if not all(abs(total) <= largest for total in sums.values[row]):
            sums.bad.add(row)
    return sums


def csr_contributions(indptr, indices, data, *, dim, dtype):
    """A CSR matrix: entry j belongs to row i if ``indptr[i] <= j < indptr[i + 1]``."""
    data = rounded(data, dtype)
    contributions = []
    for row in range(len(indptr) - 1):
        for j in range(int(indptr[row]), int(indptr[row + 1])):
            contributions.append((row, {indices[j]: data[j]}))
    return contributions


def row_contributions(rows, values, *, dim, dtype):
    """Row ids with a dense gradient each: the backward of an embedding lookup."""
    values = rounded(values, dtype).reshape(len(rows), dim)
    return [(row, dict(enumerate(value))) for row, value in zip(rows, values, strict=True)]


def bag_contributions(indices, offsets, grad_output, weights=None, mode="sum", *, dim, dtype):
    """Gradient of pooled rows: each id of bag b receives ``weight * grad_output[b]``.

    ``offsets``, (bags + 1,) or (bags,), says where bags begin; the last one ends at ``len(indices)``.
    """
    bags = len(grad_output)
    grad_output = rounded(grad_output, dtype).reshape(bags, dim)
    weights = np.ones(len(indices)) if weights is None else rounded(weights, dtype)
    bounds = [*(int(offset) for offset in offsets[:bags]), len(indices)]
    contributions = []
    for bag in range(bags):
        length = bounds[bag + 1] - bounds[bag]
        for j in range(bounds[bag], bounds[bag + 1]):
            weight = 1.0 / length if mode == "mean" else weights[j]
            with np.errstate(invalid="ignore"):  # 0 * inf
                contributions.append((indices[j], dict(enumerate(weight * grad_output[bag]))))
    return contributions


def contributions_of(form, arguments, *, dim, dtype):
    """What a gradient, given as the name of its form and the arguments of that form, contributes."""
    if form == "list":  # the contributions of all its gradients, each (form, arguments)
        return [each for part in arguments for each in contributions_of(*part, dim=dim, dtype=dtype)]
    function = {"csr": csr_contributions, "rows": row_contributions, "bags": bag_contributions}[form]
    return function(*arguments, dim=dim, dtype=dtype)


def bias_correction(beta, k):
    """``1 - beta**k``, as ``-expm1(k log beta)``.

    The direct form loses digits for beta near 1: ``beta**k`` is rounded to 1.1e-16 while the difference
    is about ``k (1 - beta)``, a relative error of 1e-13 at beta = 0.999 and of 1e-7 at 1 - 1e-9.
    """
    return 1.0 if beta == 0.0 else -math.expm1(k * math.log(beta))


class OracleTable:
    """One table and its state, all float64 and of shape (rows, dim), and the counts."""

    def __init__(self, table, step_counts):
        self.shape, self.dtype = table.shape, table.dtype
        rows = table.shape[0]
        self.dim = 1 if table.ndim == 1 else table.shape[1]
        self.param = table.astype(np.float64).reshape(rows, self.dim)
        self.exp_avg = np.zeros((rows, self.dim))
        self.exp_avg_sq = np.zeros((rows, self.dim))
        self.steps = np.zeros({"element": self.shape, "row": (rows,), "global": ()}[step_counts], np.int64)
        per_row = {"element": (rows, self.dim), "row": (rows, 1), "global": (1, 1)}[step_counts]
        self.counts = np.broadcast_to(self.steps.reshape(per_row), (rows, self.dim))  # a view of steps
        self.skipped_rows = 0
        self.param_magnitude = np.abs(self.param)
        self.exp_avg_magnitude = np.zeros((rows, self.dim))

    def assert_close(self, param, exp_avg, exp_avg_sq):
        """The optimizer's arrays are this table's, up to the tolerance of the dtype."""
        __tracebackhide__ = True
        tolerance = TOLERANCES[self.dtype]
        for got, expected, magnitude in (
            (exp_avg_sq, self.exp_avg_sq, self.exp_avg_sq),
            (exp_avg, self.exp_avg, self.exp_avg_magnitude),
            (param, self.param, self.param_magnitude),
        ):
            tolerance.assert_close(np.reshape(got, expected.shape), expected, magnitude)


class OracleSparseAdam:
    """The definition. Takes the optimizer's tables (which it copies) and options.

    Options are plain attributes, and can be changed between steps.
    """

    def __init__(
        self,
        tables,
        *,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        step_counts="element",
        eps_hat=False,
        maximize=False,
        on_nonfinite="raise",
    ):
        tables = tables if isinstance(tables, dict) else {"table": tables}
        self.tables = {name: OracleTable(table, step_counts) for name, table in tables.items()}
        self.lr, self.betas, self.eps = lr, betas, eps
        self.step_counts, self.eps_hat, self.maximize = step_counts, eps_hat, maximize
        self.on_nonfinite = on_nonfinite

    def sums(self, form, arguments, name="table"):
        """``Sums`` of a gradient, given as the name of its form and the arguments of that form."""
        table = self.tables[name]
        contributions = contributions_of(form, arguments, dim=table.dim, dtype=table.dtype)
        return sum_rows(contributions, table.dim, table.dtype)

    def step(self, gradients):
        """Apply ``{name: Sums}``; returns ``{name: mask of the elements that were written}``.

        Raises FloatingPointError, with nothing changed, where the optimizer refuses the gradient.
        """
        gradients = {"table": gradients} if isinstance(gradients, Sums) else gradients
        if self.on_nonfinite == "raise" and any(sums.bad for sums in gradients.values()):
            raise FloatingPointError
        with np.errstate(all="ignore"):  # "propagate" computes with NaN and infinity
            return {name: self._step_table(self.tables[name], sums) for name, sums in gradients.items()}

    def _step_table(self, table, sums):
        written = np.zeros(table.param.shape, bool)
        if self.step_counts == "global":
            table.steps[...] += 1
        for row in sums.values:
            if row in sums.bad and self.on_nonfinite == "skip":
                table.skipped_rows += 1
                continue
            if self.step_counts == "row":
                table.steps[row] += 1
            for element in range(table.dim):
                g = sums.values[row][element]
                if self.step_counts == "element":
                    if g == 0.0:  # not active; NaN is not 0, so it is
                        continue
                    table.steps.reshape(table.param.shape)[row, element] += 1
                self._update(table, row, element, g, sums.magnitudes[row][element])
                written[row, element] = True
        return written.reshape(table.shape)

    def _update(self, table, row, element, g, magnitude):
        beta1, beta2 = self.betas
        k = int(table.counts[row, element])
        if self.maximize:
            g = -g
        m = beta1 * table.exp_avg[row, element] + (1.0 - beta1) * g
        v = beta2 * table.exp_avg_sq[row, element] + (1.0 - beta2) * g * g
        correction1 = bias_correction(beta1, k)
        correction2 = bias_correction(beta2, k)
        if self.eps_hat:
            factor = self.lr * math.sqrt(correction2) / correction1 / (math.sqrt(v) + self.eps)
        else:
            factor = self.lr / correction1 / (math.sqrt(v / correction2) + self.eps)
        table.exp_avg[row, element] = m
        table.exp_avg_sq[row, element] = v
        table.param[row, element] -= factor * m
        # The same sums of absolute values: what rounding errors are relative to.
        m_magnitude = beta1 * table.exp_avg_magnitude[row, element] + (1.0 - beta1) * magnitude
        table.exp_avg_magnitude[row, element] = m_magnitude
        table.param_magnitude[row, element] += factor * m_magnitude
