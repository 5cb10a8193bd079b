# SPDX-License-Identifier: Apache-2.0
"""Sparse Adam in Numba: an optimizer that reads and writes only what a sparse gradient touches."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from nb_sparse_adam import errors
from nb_sparse_adam import typing as typing  # numba takes `LentTable` by its name only if it is imported
from nb_sparse_adam._src.former import keep_names
from nb_sparse_adam._src.gradients import BagGradient, CSRGradient, RowGradient
from nb_sparse_adam._src.kernels import apply_row_gradient
from nb_sparse_adam._src.optimizer import SparseAdam
from nb_sparse_adam._src.warming import warm_up

__all__ = [
    "BagGradient",
    "CSRGradient",
    "EmbeddingTable",
    "Eviction",
    "RowGradient",
    "SparseAdam",
    "__version__",
    "apply_row_gradient",
    "errors",
    "warm_up",
]

keep_names(__name__, "gradients", "kernels", "optimizer", "views")

_WHEN_ASKED_FOR = ("checkpoint", "parameter_server", "recommender", "torch")
_TABLES = {"EmbeddingTable": "embedding_table", "Eviction": "eviction"}  # loaded when asked for, too

if TYPE_CHECKING:
    from nb_sparse_adam import checkpoint as checkpoint
    from nb_sparse_adam import parameter_server as parameter_server
    from nb_sparse_adam import recommender as recommender
    from nb_sparse_adam import torch as torch
    from nb_sparse_adam._src.table.embedding_table import EmbeddingTable as EmbeddingTable
    from nb_sparse_adam._src.table.eviction import Eviction as Eviction
else:

    def __getattr__(name):
        import importlib

        if name in _TABLES:
            return getattr(importlib.import_module(f"{__name__}._src.table.{_TABLES[name]}"), name)
        if name not in _WHEN_ASKED_FOR:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except errors.MissingExtraError as error:  # so that hasattr is False, and inspect goes on
            raise AttributeError(str(error)) from error


def __dir__() -> list[str]:
    # Not in __all__: an import of * is not to take the names of other packages.
    return sorted([*__all__, *_WHEN_ASKED_FOR, "typing"])
