# SPDX-License-Identifier: Apache-2.0
"""The table of a dynamic layer as one tensor of bytes, which a module's state dict holds.

As of a fused layer (`layer_state`): a file of safetensors, with all that is known of rows, sorted by id; so
two tables with the same rows give the same bytes. The options are its metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nb_sparse_adam._src import options
from nb_sparse_adam._src.table import snapshot
from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam._src.torch import layer_state
from nb_sparse_adam._src.torch.table_options import TableOptimizer
from nb_sparse_adam.errors import OptionError, StateError

FORMAT = "nb_sparse_adam.torch dynamic, version 1"


# What a table must have been made with in order to go on where another one was.
_FIXED = ("dim", "dtype", "step_counts", "initializer", "seed", "admission", "admission_bytes")


def pack(table: EmbeddingTable, optimizer: TableOptimizer) -> Tensor:
    """Put a table, with all that its training goes on from, into one tensor."""
    arrays, numbers = snapshot.copied(table)
    group = {
        **optimizer.further(),
        **snapshot.options_of(table),
        "made_with": [repr(each) for each in _made_with(table).values()],
        "numbers": list(numbers.values()),
    }
    return layer_state.pack(group, {key: torch.from_numpy(each) for key, each in arrays.items()}, {}, FORMAT)


def _made_with(table: EmbeddingTable) -> dict[str, Any]:
    given = {**snapshot.made_of(table), "step_counts": table.step_counts}
    given["admission_bytes"] = len(table._admission.counters)  # 0 where nothing is counted
    if callable(given["initializer"]):
        given["initializer"] = "a callable"
    return {name: given[name] for name in _FIXED}


def check(where: str, table: EmbeddingTable, optimizer: TableOptimizer, given: Any) -> Callable[[], None]:
    """Check what `pack` gave; return what puts it in the place of all that the table holds.

    Raises
    ------
    StateError
        If it does not fit; nothing has been changed then.
    """
    if not isinstance(given, Tensor) or given.dtype != torch.uint8:
        got = f"a tensor of {given.dtype}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise StateError(
            f"{where} is {got}, expected one of torch.uint8, as a dynamic layer's state dict holds it; "
            "tables have no average"
        )
    found = layer_state.unpack(where, given, FORMAT)
    assert found is not None
    (group,), entry = found["param_groups"], found["state"].get(0, {})
    expected = _made_with(table)
    was = group.pop("made_with", None)
    if not isinstance(was, list) or len(was) != len(expected):
        raise StateError(f"{where}: it does not say what its table was made with")
    for (name, value), saved in zip(expected.items(), was, strict=True):
        if repr(value) != saved:
            raise StateError(
                f"{where}: its table was made with {name} {saved}, expected {value!r}, as this layer was: "
                f"make the layer with {name}={saved}"
            )
    settings = {name: group.pop(name, None) for name in options.SAVED}
    try:
        checked = options.checked(settings, {table.dtype})
    except OptionError as error:
        raise StateError(f"{where}: {error}") from error
    arrays = {
        key: value.cpu().numpy() if isinstance(value, Tensor) else value for key, value in entry.items()
    }
    counted = group.pop("numbers", None)
    group.pop("params")
    try:
        numbers = dict(zip(snapshot.NUMBERS, counted if isinstance(counted, list) else (), strict=False))
        snapshot.check(table, numbers, arrays)
    except snapshot.SnapshotError as error:
        raise StateError(f"{where} {error}") from error

    def make() -> dict[EmbeddingTable, EmbeddingTable]:
        values = {**checked, "step_counts": table.step_counts, "num_threads": table.num_threads}
        other = snapshot.new_table(type(table), snapshot.made_of(table), values, snapshot.folder_of(table))
        snapshot.fill(other, numbers, arrays)
        return {table: other}

    def load() -> None:
        snapshot.exchange([table], make)
        optimizer.param_groups[0].update(group)

    return load
