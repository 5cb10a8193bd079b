"""For PyTorch: `SparseAdam` in the place of ``torch.optim.SparseAdam``, and fused embeddings; on CPU and GPU.

`Embedding` and `EmbeddingBag` update their table in the backward pass and never form a gradient of it.
"""

from nb_sparse_adam.extras import require

require("torch", "torch", "nb_sparse_adam.torch")

from nb_sparse_adam.torch.layers import Embedding, EmbeddingBag, accumulate  # noqa: E402 (torch comes first)
from nb_sparse_adam.torch.optimizer import SparseAdam  # noqa: E402

__all__ = ["Embedding", "EmbeddingBag", "SparseAdam", "accumulate"]
