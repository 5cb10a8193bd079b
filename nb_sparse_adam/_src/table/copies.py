# SPDX-License-Identifier: Apache-2.0
"""Another `EmbeddingTable` like one that is there: for `copy` and `pickle`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nb_sparse_adam._src.table import snapshot
from nb_sparse_adam.errors import TableError

if TYPE_CHECKING:
    from nb_sparse_adam._src.table.embedding_table import EmbeddingTable


def reduced(table: EmbeddingTable) -> tuple[Any, ...]:
    """Say how to make another table like this one."""
    if snapshot.folder_of(table) is not None:
        raise TableError(
            f"a copy or a pickle of table {table.name!r}, whose rows are in a folder (state_dir), expected a "
            "table in memory: make a table without state_dir, and load(*table.export()) into it"
        )
    made, given = snapshot.made_of(table), snapshot.options_of(table)
    return rebuilt, (type(table), made, given, table.num_threads, *snapshot.copied(table))


def rebuilt(
    kind: type[EmbeddingTable], made: Any, given: Any, num_threads: int | None, arrays: Any, numbers: Any
) -> EmbeddingTable:
    """Make a table of what `reduced` gave."""
    table = snapshot.new_table(kind, made, given)
    table.num_threads = num_threads
    snapshot.check(table, numbers, arrays)
    snapshot.fill(table, numbers, arrays)
    return table
