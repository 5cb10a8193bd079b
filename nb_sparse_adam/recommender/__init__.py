"""A recommender trained with `SparseAdam`: matrix factorization with the BPR loss."""

from nb_sparse_adam.recommender.training import (
    DOMAINS,
    Batch,
    BPRModel,
    BPROptions,
    EpochRecord,
    epoch_batches,
    train,
)

__all__ = ["DOMAINS", "BPRModel", "BPROptions", "Batch", "EpochRecord", "epoch_batches", "train"]
