# SPDX-License-Identifier: Apache-2.0
"""Dynamic layers that tests train, and what is in them."""

import numpy as np
from needs import need

torch = need("torch")

from nb_sparse_adam.torch import DynamicEmbedding, DynamicEmbeddingBag, Embedding, EmbeddingBag  # noqa: E402

ROWS, DIM = 30, 4
OPTIONS = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "eps_hat": True}
KINDS = [DynamicEmbedding, DynamicEmbeddingBag]
IDS = torch.tensor([[1, 2], [2, 2**62]])


def pair(kind, dtype=torch.float32, step_counts="row", **kwargs):
    """A fused layer, and a dynamic one with the same rows: ids are their numbers."""
    torch.manual_seed(0)
    fused = {"Embedding": Embedding, "EmbeddingBag": EmbeddingBag}[kind](
        ROWS, DIM, dtype=dtype, optimizer={**OPTIONS, "step_counts": step_counts}, **kwargs
    )
    made = {"Embedding": DynamicEmbedding, "EmbeddingBag": DynamicEmbeddingBag}[kind]
    dynamic = made(DIM, dtype=dtype, step_counts=step_counts, **OPTIONS, **kwargs)
    dynamic.table.load(np.arange(ROWS), fused.weight.detach().numpy())
    return fused, dynamic


def rows_of(layer):
    """Values and moments of a dynamic layer's rows, by id."""
    ids = np.sort(layer.table.ids())
    state = layer.table.state(ids)
    return layer.table.lookup(ids, train=False), state.exp_avg, state.exp_avg_sq, state.steps


def assert_same_bits(fused, dynamic):
    entry = fused.optimizer.state[fused.weight]
    theirs = [fused.weight.detach(), entry["exp_avg"], entry["exp_avg_sq"], entry["step"]]
    for a, b in zip(theirs, rows_of(dynamic), strict=True):
        assert np.asarray(a).tobytes() == np.ascontiguousarray(b).tobytes() or np.array_equal(a, b)


def bits(layer):
    return layer.state_dict()["_extra_state"].numpy().tobytes()
