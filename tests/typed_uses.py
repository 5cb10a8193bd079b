# SPDX-License-Identifier: Apache-2.0
"""Right and wrong uses, as type checkers see them: `test_types` runs them over this file.

The lines that end in ``# wrong`` are those that each of them has to find fault with, and no others.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nb_sparse_adam
from nb_sparse_adam import (
    BagGradient,
    CSRGradient,
    EmbeddingTable,
    Eviction,
    RowGradient,
    SparseAdam,
    apply_row_gradient,
    errors,
)
from nb_sparse_adam.typing import Gradient, RowState, StateView, StepCounts, Table


class OnGpu:
    """An array of CuPy, of numba, ..."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise NotImplementedError


class Csr:
    """A CSR array, as SciPy has them."""

    format = "csr"
    shape = (4, 2)
    indptr: NDArray[np.int32]
    indices: NDArray[np.int32]
    data: NDArray[np.float64]


class Coo:
    """A COO array, as SciPy has them."""

    format = "coo"
    shape = (4, 2)
    row: NDArray[np.int32]
    col: NDArray[np.int32]
    data: NDArray[np.float64]


class Slices:
    """An ``IndexedSlices``, as TensorFlow has them."""

    values: NDArray[np.float32]
    indices: NDArray[np.int64]
    dense_shape: tuple[int, int] | None


class Bcoo:
    """A ``BCOO``, as JAX has them."""

    data: NDArray[np.float32]
    indices: NDArray[np.int32]
    shape: tuple[int, ...]
    n_batch: int
    n_sparse: int
    n_dense: int


def tables(
    narrow: NDArray[np.float32],
    integers: NDArray[np.int64],
    memory_map: np.memmap[Any, np.dtype[np.float32]],
) -> None:
    SparseAdam(np.zeros((4, 2)))
    SparseAdam(narrow, 0.1)
    SparseAdam(memory_map)
    SparseAdam(OnGpu(), lr=0.1)
    SparseAdam({"user": narrow, "item": np.zeros(3), "gpu": OnGpu()})
    by_name: Mapping[str, Table] = {"user": narrow}
    SparseAdam(by_name)
    SparseAdam([narrow, narrow])  # wrong
    SparseAdam([[1.0, 2.0]])  # wrong
    SparseAdam(integers)  # wrong
    SparseAdam({1: narrow})  # wrong
    SparseAdam("table")  # wrong
    SparseAdam(narrow, 0.1, (0.9, 0.999))  # wrong


def options(table: NDArray[np.float32], which: StepCounts, path: Path) -> None:
    optimizer = SparseAdam(
        table,
        lr=1e-3,
        betas=(0.9, 0.99),
        eps=1e-8,
        step_counts="row",
        eps_hat=True,
        maximize=False,
        on_nonfinite="skip",
        num_threads=2,
        state_dir=path,
        reserve=True,
        device_checks="immediate",
    )
    SparseAdam(table, step_counts=which)
    optimizer.lr = 0.1
    optimizer.betas = 0.9, 0.999
    optimizer.on_nonfinite = "propagate"
    optimizer.num_threads = None
    counts: StepCounts = optimizer.step_counts
    SparseAdam(table, step_counts=counts)
    SparseAdam(table, step_counts="rows")  # wrong
    SparseAdam(table, step_count="row")  # wrong
    SparseAdam(table, on_nonfinite="ignore")  # wrong
    SparseAdam(table, device_checks="later")  # wrong
    SparseAdam(table, lr="0.1")  # wrong
    optimizer.on_nonfinite = "ignore"  # wrong
    optimizer.device_checks = "later"  # wrong
    optimizer.step_counts = "row"  # wrong
    optimizer.lr = "0.1"  # wrong
    optimizer.learning_rate = 0.1  # wrong


def gradients(optimizer: SparseAdam, ids: NDArray[np.int64], values: NDArray[np.float32]) -> None:
    optimizer.step(RowGradient(ids, values))
    optimizer.step(RowGradient([0, 1], [[1.0, 2.0], [3.0, 4.0]]))
    optimizer.step(RowGradient(OnGpu(), OnGpu()), stream=7)
    optimizer.step(BagGradient(ids, [0, 2], values, mode="mean"))
    optimizer.step(BagGradient(ids, [0, 2], values, np.ones(2)))
    optimizer.step(CSRGradient(ids, ids, values))
    optimizer.step(Csr())
    optimizer.step(Coo())
    optimizer.step(Slices())
    optimizer.step(Bcoo())
    optimizer.step({"user": RowGradient(ids, values), "item": Csr()})
    named: dict[str, Gradient] = {"user": Coo()}
    optimizer.step(named)
    optimizer.step(ids, values)  # wrong
    optimizer.step((ids, values))  # wrong
    optimizer.step(values)  # wrong
    optimizer.step([RowGradient(ids, values), Coo()])
    optimizer.step({"user": [BagGradient(ids, [0, 2], values), Csr()], "item": Coo()})
    optimizer.step([values])  # wrong
    optimizer.step({"user": values})  # wrong
    optimizer.step()  # wrong
    RowGradient(ids)  # wrong
    RowGradient(ids, None)  # wrong
    BagGradient(ids, [0, 2], values, mode="max")  # wrong
    BagGradient(ids, [0, 2], values, weight=np.ones(2))  # wrong


def state(optimizer: SparseAdam, table: NDArray[np.float32], ids: NDArray[np.int64]) -> dict[str, Any]:
    view: StateView = optimizer.state["table"]
    shape: tuple[int, ...] = view.shape
    skipped: int = optimizer.skipped_rows["table"]
    optimizer.rearrange(table, ids)
    optimizer.load_state_dict(optimizer.state_dict())
    with optimizer.kernel_table() as lent:
        apply_row_gradient(lent, skipped, table[0])
    view.shape = shape  # wrong
    optimizer.state["table"] = view  # wrong
    optimizer.rearrange([table], ids)  # wrong
    return optimizer.state_dict()


def values_of(ids: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.ones((len(ids), 4))


def embedding_tables(ids: NDArray[np.uint64], grads: NDArray[np.float32]) -> NDArray[np.int64]:
    table = EmbeddingTable(4, capacity=10, eviction=Eviction(older_than_steps=5, when_full=True))
    other = EmbeddingTable(4, initializer=values_of, admission=0.5, state_dir=Path("x"), dtype="f8")
    vectors: NDArray[np.float64] = other.lookup(["user:1", "user:2"], train=False)
    table.lookup([2**63, 7])
    table.lookup_bags(ids, [0, 2], weights=grads[0], include_last_offset=True)
    table.update(ids, grads)
    table.update_bags(ids, [0, 2], grads, mode="mean")
    EmbeddingTable.update_together({table: RowGradient(ids, grads), other: BagGradient(ids, [0], grads)})
    seen: NDArray[np.uint32] = table.state(ids).seen
    state: RowState = table.state(ids)
    table.lr = state.steps.mean().item()
    there, values = table.export()
    other.load(there, values)
    print(len(table), table.contains(ids).all(), seen, vectors, table.stats()["dropped"])
    EmbeddingTable(4, step_counts="rows")  # wrong
    EmbeddingTable(4, missing="ignore")  # wrong
    EmbeddingTable(4, initializer=5)  # wrong
    EmbeddingTable(4, eviction={"when_full": True})  # wrong
    EmbeddingTable.update_together([table])  # wrong
    EmbeddingTable.update_together({table: grads})  # wrong
    table.update(ids)  # wrong
    table.capacity = 5  # wrong
    table.evict(10)  # wrong
    return table.evict(down_to=5)


def modules(optimizer: SparseAdam, path: Path) -> None:
    try:
        nb_sparse_adam.checkpoint.save(path, optimizer)
        again: SparseAdam
        again, extra = nb_sparse_adam.checkpoint.load(path)
        print(extra, again.lr, nb_sparse_adam.__version__)
    except errors.CheckpointError as error:
        print(str(error))
    nb_sparse_adam.checkpoint.save(optimizer, path)  # wrong
    nb_sparse_adam.checkpoints  # wrong # noqa: B018
