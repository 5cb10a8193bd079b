"""For PyTorch, on the CPU: `SparseAdam` in the place of ``torch.optim.SparseAdam``."""

from nb_sparse_adam.extras import require

require("torch", "torch", "nb_sparse_adam.torch")

from nb_sparse_adam.torch.optimizer import SparseAdam  # noqa: E402 (torch comes first)

__all__ = ["SparseAdam"]
