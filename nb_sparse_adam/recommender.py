# SPDX-License-Identifier: Apache-2.0
"""A recommender trained with `SparseAdam`: matrix factorization for the ranking of items."""

from nb_sparse_adam._src.former import keep_names
from nb_sparse_adam._src.recommender.batches import Batch, epoch_batches
from nb_sparse_adam._src.recommender.factorization import MatrixFactorization
from nb_sparse_adam._src.recommender.index import ItemIndex
from nb_sparse_adam._src.recommender.interactions import Interactions, Split, UserItems, generate, hold_out
from nb_sparse_adam._src.recommender.options import DOMAINS, BPROptions
from nb_sparse_adam._src.recommender.ranking import Quality
from nb_sparse_adam._src.recommender.reading import read_interactions, read_split
from nb_sparse_adam._src.recommender.training import BPRModel, EpochRecord, train

__all__ = [
    "DOMAINS",
    "BPRModel",
    "BPROptions",
    "Batch",
    "EpochRecord",
    "Interactions",
    "ItemIndex",
    "MatrixFactorization",
    "Quality",
    "Split",
    "UserItems",
    "epoch_batches",
    "generate",
    "hold_out",
    "read_interactions",
    "read_split",
    "train",
]

keep_names(__name__, "interactions", "ranking", "reading", "training")
