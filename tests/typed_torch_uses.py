# SPDX-License-Identifier: Apache-2.0
"""Right and wrong uses of `nb_sparse_adam.torch`; see `typed_uses`."""

import torch
from torch import Tensor

import nb_sparse_adam
from nb_sparse_adam.torch import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    Embedding,
    EmbeddingBag,
    SparseAdam,
    accumulate,
)


def optimizers(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    optimizer = SparseAdam(module.parameters(), 0.1, (0.9, 0.999), 1e-8)
    SparseAdam([parameter], lr=torch.tensor(0.1), step_counts="row", on_nonfinite="raise")
    SparseAdam([{"params": [parameter], "lr": 0.1}], device_checks="deferred")
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.device_checks = "deferred"
    optimizer.step()
    SparseAdam(module.parameters(), step_counts="rows")  # wrong
    SparseAdam(module.parameters(), on_nonfinite="ignore")  # wrong
    SparseAdam(module.parameters(), device_checks="later")  # wrong
    optimizer.device_checks = "later"  # wrong


def tables(on_gpu: Tensor, ids: Tensor, grads: Tensor) -> None:
    optimizer = nb_sparse_adam.SparseAdam(on_gpu, device_checks="deferred")
    nb_sparse_adam.SparseAdam({"user": on_gpu})
    optimizer.step(nb_sparse_adam.RowGradient(ids, grads))
    optimizer.rearrange(on_gpu, ids)
    nb_sparse_adam.SparseAdam([on_gpu])  # wrong
    optimizer.step(grads)  # wrong


def layers(ids: Tensor, offsets: Tensor, module: torch.nn.Module) -> Tensor:
    rows = Embedding(10, 4, optimizer={"lr": 0.1})
    bags = EmbeddingBag(10, 4, mode="sum", optimizer={"step_counts": "row"})
    bags.lr = 0.1
    rows.lr = torch.tensor(0.1)
    print(rows.lr * 2, bags.optimizer.param_groups)
    looked_up: Tensor = rows(ids) + rows.forward(ids)
    pooled: Tensor = bags(ids, offsets) + bags.forward(ids, per_sample_weights=looked_up)
    with accumulate(module):
        pooled.sum()
    other = EmbeddingBag.from_pretrained(pooled, freeze=False)
    nb_sparse_adam.torch.EmbeddingBag(10, 4)
    bags.lr = "0.1"  # wrong
    EmbeddingBag(10, 4, mode="max")  # wrong
    bags(ids, ofsets=offsets)  # wrong
    bags.forward(ids, 3)  # wrong
    rows(ids, offsets)  # wrong
    return other(ids)


def dynamic_layers(ids: Tensor, offsets: Tensor, table: nb_sparse_adam.EmbeddingTable) -> Tensor:
    rows = DynamicEmbedding(4, lr=0.1, admission=2)
    bags = DynamicEmbeddingBag.from_table(table, mode="sum")
    rows.lr = 0.1
    print(len(rows.table), bags.table.stats(), bags.lr * 2)
    DynamicEmbeddingBag(4, mode="max")  # wrong
    rows.table = table  # wrong
    rows(ids, offsets)  # wrong
    return rows(ids) + bags(ids, offsets)
