# SPDX-License-Identifier: Apache-2.0
"""For PyTorch: `SparseAdam` in the place of ``torch.optim.SparseAdam``, and fused embeddings; on CPU and GPU.

`Embedding` and `EmbeddingBag` update their table in the backward pass and never form a gradient of it;
`DynamicEmbedding` and `DynamicEmbeddingBag` do so with an `EmbeddingTable`, whose rows are named by ids,
and `RemoteEmbeddingBag` with the tables of a parameter server.
"""

from nb_sparse_adam._src.former import keep_names
from nb_sparse_adam._src.torch.dynamic_layers import DynamicEmbedding, DynamicEmbeddingBag
from nb_sparse_adam._src.torch.layers import Embedding, EmbeddingBag, accumulate
from nb_sparse_adam._src.torch.optimizer import SparseAdam
from nb_sparse_adam._src.torch.remote import RemoteEmbeddingBag

__all__ = [
    "DynamicEmbedding",
    "DynamicEmbeddingBag",
    "Embedding",
    "EmbeddingBag",
    "RemoteEmbeddingBag",
    "SparseAdam",
    "accumulate",
]

keep_names(__name__, "fused", "layers", "optimizer")
