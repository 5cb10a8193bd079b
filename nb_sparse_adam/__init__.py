"""Sparse Adam in Numba: an optimizer that reads and writes only what a sparse gradient touches."""

from nb_sparse_adam import errors
from nb_sparse_adam.gradients import BagGradient, CSRGradient, RowGradient
from nb_sparse_adam.kernels import apply_row_gradient
from nb_sparse_adam.optimizer import SparseAdam
from nb_sparse_adam.warming import warm_up

__all__ = [
    "BagGradient",
    "CSRGradient",
    "RowGradient",
    "SparseAdam",
    "__version__",
    "apply_row_gradient",
    "errors",
    "warm_up",
]

__version__ = "0.1.0"
