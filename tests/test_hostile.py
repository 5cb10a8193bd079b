# SPDX-License-Identifier: Apache-2.0
"""Malformed calls by the ten thousand: refused as what they are, with no bit changed anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam._src.optimizer import tables_of
from nb_sparse_adam.errors import SparseAdamError

ROWS, DIM, PAD = 20, 4, 64
CALLS = 1000  # for each example of hypothesis
NUMBERS = [-1, -(2**31), -(2**63), ROWS, ROWS + 1, 2**31 - 1, 2**31, 2**32 + 3, 2**62, 2**63 - 1]
MODES = ["sum", "mean", "max", "", None, 3]


class Padded:
    """An optimizer whose table has other people's memory on both sides."""

    def __init__(self, dtype, step_counts):
        size = ROWS * DIM
        self.memory = np.full(size + 2 * PAD, 7, dtype)
        self.table = self.memory[PAD : PAD + size].reshape(ROWS, DIM)
        self.opt = SparseAdam(self.table, step_counts=step_counts, num_threads=1)
        self.opt.step(RowGradient(np.arange(5), np.ones((5, DIM))))

    def bits(self):
        arrays = tables_of(self.opt)["table"].arrays
        return self.memory.tobytes() + arrays.words.tobytes() + arrays.counts.tobytes()

    def padding_is_whole(self):
        return bool((self.memory[:PAD] == 7).all() and (self.memory[-PAD:] == 7).all())


def hostile_integers(rng, good):
    """Something that is no good array of ids, offsets or columns."""
    good = np.array(good, np.int64)
    kind = rng.integers(11)
    if kind == 0 and len(good):
        good[rng.integers(len(good))] = NUMBERS[rng.integers(len(NUMBERS))]
        return good
    if kind == 1:
        return good.astype([np.float64, np.float32, bool, complex, "U5", "M8[s]"][rng.integers(6)])
    if kind == 2:
        return good[None] if rng.integers(2) else good.reshape(-1, 1)
    if kind == 3:
        return np.append(good, good[-1:] if len(good) else 0)
    if kind == 4:
        return good[:-1] if len(good) else np.array([5])
    if kind == 5:
        return [None, "abc", 3, object(), [[1], [2, 3]], {1: 2}, b"12", np.int64(3)][rng.integers(8)]
    if kind == 6:
        return np.array([2**64 - 1] * len(good), np.uint64)
    if kind == 7:
        return good.astype(object)
    if kind == 8:
        return np.ma.masked_array(good, mask=good % 2 == 0)
    if kind == 9:
        return -good - 1
    return rng.integers(-(2**63), 2**63 - 1, len(good))


def hostile_values(rng, good, table):
    """Something that is no good array of values."""
    good = np.array(good)
    kind = rng.integers(9)
    if kind == 0 and good.size:
        bad = [np.nan, np.inf, -np.inf, 1e30 if good.dtype == np.float32 else 1e200]
        good.reshape(-1)[rng.integers(good.size)] = bad[rng.integers(4)]
        return good
    if kind == 1:
        return good.astype([np.int64, np.complex64, np.float16, bool, "U8"][rng.integers(5)])
    if kind == 2:
        return good[..., None] if rng.integers(2) else good.reshape(-1)[:-1]
    if kind == 3:
        return good[:, :-1] if good.ndim == 2 else good[None]
    if kind == 4:
        return np.append(good, good[:1], axis=0) if len(good) else np.ones((3, DIM))
    if kind == 5:
        return [None, "abc", 3.0, object(), [[1.0], [2.0, 3.0]], {}, b"12"][rng.integers(7)]
    if kind == 6:
        return good.astype(object)
    if kind == 7:
        return np.ma.masked_array(good, mask=np.ones_like(good, bool))
    return table[: len(good)] if good.ndim == 2 else table.reshape(-1)[: len(good)]


def hostile_gradient(rng, table):
    """A gradient of one of the forms of which at least one part is wrong, most of the time."""
    n, bags = int(rng.integers(1, 8)), int(rng.integers(1, 4))
    ids = rng.integers(0, ROWS, n)
    form = rng.integers(6)

    def spoil(integers, values):
        """Spoil one part or two."""
        parts = [*integers, *values]
        for at in rng.choice(len(parts), size=min(len(parts), int(rng.integers(1, 3))), replace=False):
            if at < len(integers):
                parts[at] = hostile_integers(rng, parts[at])
            else:
                parts[at] = hostile_values(rng, parts[at], table)
        return parts

    if form == 0:
        return RowGradient(*spoil([ids], [rng.normal(size=(n, DIM))]))
    if form == 1:
        offsets = np.sort(rng.integers(0, n + 1, bags))
        offsets[0] = 0
        weights = rng.normal(size=n)
        ids, offsets, pooled, weights = spoil([ids, offsets], [rng.normal(size=(bags, DIM)), weights])
        mode = MODES[rng.integers(len(MODES))] if rng.integers(3) == 0 else "sum"
        return BagGradient(ids, offsets, pooled, weights, mode)
    if form == 2:
        indptr = np.append(0, np.sort(rng.integers(0, n + 1, ROWS)))
        indptr[-1] = n
        return CSRGradient(*spoil([indptr, rng.integers(0, DIM, n)], [rng.normal(size=n)]))
    if form == 3:
        matrix = sparse.random(ROWS, DIM, 0.3, "csr", rng=rng) if hasattr(sparse, "csr_array") else None
        matrix = sparse.csr_array(matrix)
        which = rng.integers(4)
        if which == 0 and matrix.nnz:
            matrix.indices[rng.integers(matrix.nnz)] = [-1, DIM, 2**31 - 1][rng.integers(3)]
        elif which == 1:
            matrix.indptr[rng.integers(1, ROWS)] = [-1, matrix.nnz + 5, 2**30][rng.integers(3)]
        elif which == 2:
            matrix.data = matrix.data[:-1]
        else:
            return sparse.csr_array((ROWS + 1, DIM))
        return matrix
    if form == 4:
        good = RowGradient(ids, rng.normal(size=(n, DIM)))
        several = [hostile_gradient(rng, table) for _ in range(rng.integers(1, 4))]
        several.insert(rng.integers(len(several) + 1), good)
        return several if rng.integers(4) else tuple(several)
    return [None, 3, "rows", [1, 2], np.ones((ROWS, DIM)), {"tables": None}, {3: 4}, object()][
        rng.integers(8)
    ]


@pytest.mark.jit
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of casts that hostile values ask for
@settings(max_examples=60)
@given(
    st.integers(0, 2**32),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from(["element", "row", "global"]),
)
def test_sixty_thousand_malformed_calls(seed, dtype, step_counts):
    rng = np.random.default_rng(seed)
    padded = Padded(dtype, step_counts)
    refused, before = 0, padded.bits()
    while refused < CALLS:
        try:  # of a bag's gradient, mode is refused when it is made
            padded.opt.step(hostile_gradient(rng, padded.table))
        except SparseAdamError:
            refused += 1
            assert padded.bits() == before
        else:  # what was spoilt came out well by chance
            before = padded.bits()
            assert padded.padding_is_whole()
    assert padded.padding_is_whole()
