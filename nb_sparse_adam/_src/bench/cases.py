# SPDX-License-Identifier: Apache-2.0
"""One registry of cases: what is updated, by which gradients.

A case is named, seeded and the same on every machine and for ever: another one gets another name, or the
history of figures would compare what is not alike. It comes as plain arrays, so that every contender is given
the same work.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SEED = 20260101


class Rows(NamedTuple):
    """Gradients of single rows, as the backward pass of an embedding lookup gives them."""

    rows: NDArray[Any]  # (n,) int64
    values: NDArray[Any]  # (n, dim)


class Bag(NamedTuple):
    """The gradient of pooled lookups: `offsets` has one entry more than there are bags."""

    indices: NDArray[Any]  # (lookups,) int64
    offsets: NDArray[Any]  # (bags + 1,) int64
    grad_output: NDArray[Any]  # (bags, dim)
    weights: NDArray[Any] | None = None  # (lookups,)


class CSR(NamedTuple):
    """A sparse matrix of the table's shape."""

    indptr: NDArray[Any]  # (rows + 1,) int64
    indices: NDArray[Any]  # (stored,) int32
    data: NDArray[Any]  # (stored,)


Arrays = Rows | Bag | CSR


@dataclass(frozen=True)
class Case:
    """A table and the gradients that are applied to it in turn.

    Attributes
    ----------
    name : str
        Its key in `CASES`.
    rows, dim : int
        The table's shape.
    gradients : int
        How many different gradients there are. They are taken in turn, so that a step does not find the rows
        of the step before it in the cache where real work would not.
    make : functools.partial
        ``make(case, rng)`` gives the arrays of one gradient; its keywords say how large that is.
    """

    name: str
    rows: int
    dim: int
    gradients: int
    make: functools.partial[Any]

    @property
    def sizes(self) -> dict[str, str]:
        """The shape of the table and the keywords of the gradients, for titles: ``table`` is "2M x 64"."""
        numbers = {name: compact(value) for name, value in self.make.keywords.items()}
        return {"table": f"{compact(self.rows)} x {self.dim}", **numbers}

    def smaller(self) -> Case:
        """Give a case that is quick to set up: a tenth of all that is large, two gradients.

        Its times mean little.
        """
        keywords = {
            name: value // 10 if name in ("n", "bags", "samples") and value >= 1000 else value
            for name, value in self.make.keywords.items()
        }
        make = functools.partial(self.make.func, **keywords)
        return replace(self, rows=self.rows // 10, gradients=2, make=make)

    def arrays(self) -> list[Arrays]:
        """Make the gradients, the same ones at every call."""
        rng = np.random.default_rng(SEED)
        return [self.make(self, rng) for _ in range(self.gradients)]

    def table(self) -> NDArray[Any]:
        """Make the table, float32, each of its pages written to."""
        return np.full((self.rows, self.dim), 0.1, dtype=np.float32)


def compact(number: int) -> str:
    """Write a number in few characters: "2M", "400k", "2**24", "4096"."""
    if number < 10_000:
        return str(number)
    if number & (number - 1) == 0:
        return f"2**{number.bit_length() - 1}"
    unit, letter = (1_000_000, "M") if number >= 1_000_000 else (1000, "k")
    return f"{number / unit:.3g}{letter}"


def _normal(rng: np.random.Generator, *shape: int) -> NDArray[Any]:
    return rng.standard_normal(shape, dtype=np.float32)


def _unique_rows(case: Case, rng: np.random.Generator, *, n: int, ordered: bool) -> Rows:
    rows = rng.choice(case.rows, size=n, replace=False)
    return Rows(np.sort(rows) if ordered else rows, _normal(rng, n, case.dim))


def _half(case: Case, rng: np.random.Generator, *, n: int) -> Rows:
    """Unique rows, half of whose elements are zero."""
    rows, values = _unique_rows(case, rng, n=n, ordered=True)
    values[rng.random(values.shape, dtype=np.float32) < 0.5] = 0
    return Rows(rows, values)


def zipf_ids(rng: np.random.Generator, n: int, rows: int) -> NDArray[Any]:
    """Draw long-tailed ids: Zipf's ranks, scattered over the table by a multiplicative hash."""
    ranks = rng.zipf(1.2, n).astype(np.uint64)
    return ((ranks * np.uint64(2654435761)) % np.uint64(rows)).astype(np.int64)


def _bag(case: Case, rng: np.random.Generator, *, bags: int, lookups: int, zipf: bool) -> Bag:
    n = bags * lookups
    indices = zipf_ids(rng, n, case.rows) if zipf else rng.integers(case.rows, size=n)
    return Bag(indices, np.arange(bags + 1, dtype=np.int64) * lookups, _normal(rng, bags, case.dim))


def _rows_again(case: Case, rng: np.random.Generator, *, n: int, zipf: bool) -> Rows:
    """Rows of which some come more than once, or many, in no order."""
    ids = zipf_ids(rng, n, case.rows) if zipf else rng.integers(case.rows, size=n)
    return Rows(ids, _normal(rng, n, case.dim))


def _hot_bag(case: Case, rng: np.random.Generator, *, bags: int, lookups: int, hot: bool) -> Bag:
    """Bags half of whose ids are one row; with ``hot=False`` the same bags without it."""
    indices = rng.integers(case.rows, size=(bags, lookups))
    if hot:
        indices[:, ::2] = case.rows // 3
    else:
        indices = indices[:, 1::2]
    offsets = np.arange(bags + 1, dtype=np.int64) * indices.shape[1]
    return Bag(np.ascontiguousarray(indices).ravel(), offsets, _normal(rng, bags, case.dim))


def _design_matrix(case: Case, rng: np.random.Generator, *, samples: int, nonzeros: int) -> Bag:
    """A batch of a sparse linear model: weights of one number each, features with values, residuals."""
    n = samples * nonzeros
    offsets = np.arange(samples + 1, dtype=np.int64) * nonzeros
    return Bag(rng.integers(case.rows, size=n), offsets, _normal(rng, samples, 1), _normal(rng, n))


def _csr(case: Case, rng: np.random.Generator, *, n: int, per_row: int) -> CSR:
    counts = np.zeros(case.rows, dtype=np.int64)
    counts[rng.choice(case.rows, size=n, replace=False)] = per_row
    columns = rng.permuted(np.tile(np.arange(case.dim, dtype=np.int32), (n, 1)), axis=1)[:, :per_row]
    return CSR(
        np.concatenate([[0], np.cumsum(counts)]), np.sort(columns, axis=1).ravel(), _normal(rng, n * per_row)
    )


_ALL = [
    # Rows: a table several times larger than any cache, unique rows. Ordered is what torch calls coalesced.
    Case("rows-2Mx64", 2_000_000, 64, 4, functools.partial(_unique_rows, n=100_000, ordered=True)),
    Case("rows-2Mx64-shuffled", 2_000_000, 64, 4, functools.partial(_unique_rows, n=100_000, ordered=False)),
    Case("rows-2Mx64-half", 2_000_000, 64, 4, functools.partial(_half, n=100_000)),
    Case("rows-6Mx16", 6_000_000, 16, 4, functools.partial(_unique_rows, n=200_000, ordered=True)),
    Case("rows-3Mx32", 3_000_000, 32, 4, functools.partial(_unique_rows, n=150_000, ordered=True)),
    Case("rows-10Mx16", 10_000_000, 16, 4, functools.partial(_unique_rows, n=100_000, ordered=True)),
    Case("rows-80Mx16", 80_000_000, 16, 4, functools.partial(_unique_rows, n=100_000, ordered=True)),
    Case("rows-20Mx16", 20_000_000, 16, 4, functools.partial(_unique_rows, n=100_000, ordered=True)),
    Case("rows-2Mx16-shuffled", 2_000_000, 16, 4, functools.partial(_unique_rows, n=200_000, ordered=False)),
    Case("rows-1Mx128", 1_000_000, 128, 4, functools.partial(_unique_rows, n=50_000, ordered=True)),
    # Bags: a batch of a recommender or a language model; ids evenly spread, and long-tailed.
    Case("bag-uniform", 2_000_000, 64, 4, functools.partial(_bag, bags=4096, lookups=20, zipf=False)),
    Case("bag-zipf", 2_000_000, 64, 4, functools.partial(_bag, bags=4096, lookups=20, zipf=True)),
    Case("rows-zipf", 2_000_000, 64, 4, functools.partial(_rows_again, n=82_000, zipf=True)),
    Case("rows-uniform", 2_000_000, 64, 4, functools.partial(_rows_again, n=82_000, zipf=False)),
    Case("rows-zipf-16", 2_000_000, 16, 4, functools.partial(_rows_again, n=82_000, zipf=True)),
    *(
        Case(f"rows-{compact(n)}x16-again", n, 16, 4, functools.partial(_rows_again, n=100_000, zipf=False))
        for n in (10_000, 100_000, 1_000_000, 10_000_000, 50_000_000)
    ),
    # One row that takes half of all ids, and the batch without it.
    Case("bag-hot", 2_000_000, 64, 4, functools.partial(_hot_bag, bags=4096, lookups=20, hot=True)),
    Case("bag-hot-without", 2_000_000, 64, 4, functools.partial(_hot_bag, bags=4096, lookups=20, hot=False)),
    # Dim 1: a sparse linear model of 2**24 weights.
    Case("linear", 1 << 24, 1, 4, functools.partial(_design_matrix, samples=8192, nonzeros=40)),
    # CSR: a quarter of the elements of 100k rows.
    Case("csr-2Mx64", 2_000_000, 64, 2, functools.partial(_csr, n=100_000, per_row=16)),
    # CSR of wide rows: 1 % of the columns of 20k of 400k rows.
    Case("csr-400kx1024", 400_000, 1024, 2, functools.partial(_csr, n=20_000, per_row=10)),
    # Small steps: what a call costs.
    Case("small-1x16", 100_000, 16, 64, functools.partial(_unique_rows, n=1, ordered=True)),
    Case("small-32x16", 100_000, 16, 64, functools.partial(_unique_rows, n=32, ordered=True)),
]

CASES: dict[str, Case] = {case.name: case for case in _ALL}
