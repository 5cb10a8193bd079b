# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of `EmbeddingTable`: full ones, and increments of what has changed since another save.

A save has a name of its own, says on which save it is based, and of which tables it is; a table knows its
last saves and what has gone since (`table.history`). What is read, by `load`, `restore` and `compact`, is a
chain: a full save and the increments after it, folded into what a full save would have held at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nb_sparse_adam._src import options
from nb_sparse_adam._src.checkpoint.chains import Folded, Keep, check_chain, files_of
from nb_sparse_adam._src.checkpoint.files import progress_bar, reading_all
from nb_sparse_adam._src.checkpoint.manifest import MANIFEST, refuse_foreign
from nb_sparse_adam._src.checkpoint.row_files import RowsFile
from nb_sparse_adam._src.checkpoint.saving import Part, saving_in, write_checkpoint
from nb_sparse_adam._src.checkpoint.table_manifest import KIND, bytes_of
from nb_sparse_adam._src.naming import type_name
from nb_sparse_adam._src.table import snapshot
from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam._src.table.eviction import Eviction
from nb_sparse_adam._src.table.snapshot import SnapshotError
from nb_sparse_adam.errors import CheckpointError, OptionError, OptionTypeError, SparseAdamError

T = TypeVar("T")
Tables = Mapping[str, EmbeddingTable]


def tables_in(given: Any) -> Tables | None:
    """Return the tables that a caller passes, by name; None if it is something else."""
    if isinstance(given, EmbeddingTable):
        return {given.name: given}
    if not isinstance(given, Mapping) or not given:
        return None
    for name, table in given.items():
        if not isinstance(name, str) or not isinstance(table, EmbeddingTable):
            raise OptionTypeError(
                f"the mapping has {name!r}: {type_name(table)}, expected names and EmbeddingTables; a "
                "SparseAdam is saved as a whole, by itself"
            )
    if len(set(map(id, given.values()))) != len(given):
        raise OptionError(f"the mapping has one table by several of its names {sorted(given)}, expected one")
    return dict(given)


# --- reading ----------------------------------------------------------------------------------------------


def _read_chain(
    folders: Sequence[Path], work: Callable[[dict[str, Any], dict[str, list[RowsFile]]], T], progress: bool
) -> T:
    """Check a chain and its files, and do something with its last manifest and the files of each table."""

    def verified(manifests: list[dict[str, Any]], files: list[RowsFile]) -> T:
        check_chain(folders, manifests)
        with progress_bar(sum(bytes_of(file.record) for file in files), "verifying", progress) as tell:
            for file in files:
                file.verify(tell)
        names = [record["name"] for record in manifests[-1]["tables"]]
        return work(manifests[-1], {name: [file for file in files if file.name == name] for name in names})

    if not folders:
        raise OptionError(
            "path is an empty list, expected the folder of a full save, then those of increments"
        )
    return reading_all(folders, files_of, verified)


def compact_tables(folders: Sequence[Path], into: Path, progress: bool) -> None:
    """See `api.compact`."""

    def work(manifest: dict[str, Any], files: dict[str, list[RowsFile]]) -> None:
        parts = []
        for name, chain in files.items():
            folded = Folded(chain)
            kept = {
                key: chain[-1].record[key]
                for key in chain[-1].record
                if key not in ("file", "size", "sha256")
            }
            kept.pop("name")
            parts.append(Part(name, folded.arrays(), {**kept, "rows": len(folded.ids), "gone": 0}))
        head = {"kind": KIND, "id": manifest["id"], "base": None, "single": manifest["single"]}
        with saving_in(into):
            refuse_foreign(into)
            write_checkpoint(into, head, parts, manifest["extra"], "compacting", progress)

    _read_chain(folders, work, progress)


def load_tables(
    folders: Sequence[Path], keep: Keep | None, initializer: Any, progress: bool
) -> tuple[Any, Any]:
    """See `api.load`."""

    def work(manifest: dict[str, Any], files: dict[str, list[RowsFile]]) -> tuple[Any, Any]:
        strings = [record["made"]["initializer"] for record in manifest["tables"]]
        if initializer is not None and None not in strings:
            raise OptionError(
                f"initializer is {initializer!r}, expected None: those of the tables, {strings}, come back"
            )
        made = {name: _make(chain, keep, initializer, None, progress) for name, chain in files.items()}
        if keep is None:
            _note(manifest, made)
        return made.popitem()[1] if manifest["single"] else made, manifest["extra"]

    return _read_chain(folders, work, progress)


def restore_tables(folders: Sequence[Path], tables: Tables, single: bool, progress: bool) -> Any:
    """See `api.restore`."""

    def work(manifest: dict[str, Any], files: dict[str, list[RowsFile]]) -> Any:
        if single and manifest["single"]:
            files = dict(zip(tables, files.values(), strict=True))  # whatever the table was called
        elif set(files) != set(tables) or single != manifest["single"]:
            raise CheckpointError(f"{folders[-1]} is of tables {sorted(files)}, expected {sorted(tables)}")
        for name, table in tables.items():
            _check_fit(files[name][-1], table)

        def make() -> dict[EmbeddingTable, EmbeddingTable]:
            made = {
                name: _make(files[name], None, table._values_of, table, progress)
                for name, table in tables.items()
            }
            _note(manifest, made)
            return {tables[name]: other for name, other in made.items()}

        snapshot.exchange(tables.values(), make)
        return manifest["extra"]

    return _read_chain(folders, work, progress)


def _note(manifest: Mapping[str, Any], made: Tables) -> None:
    """Have tables know which save they are after, so that increments may be based on it."""
    for record, table in zip(manifest["tables"], made.values(), strict=True):
        table._history.table = record["table"]
        table._history.note_save(manifest["id"], table._store.clock)


def _check_fit(file: RowsFile, table: EmbeddingTable) -> None:
    made, step_counts = file.record["made"], file.record["options"]["step_counts"]
    found, ours = (
        (made["dim"], made["dtype"], step_counts),
        (table.dim, table.dtype.name, table.step_counts),
    )
    if found != ours:
        raise CheckpointError(
            f"{file.path}: table {file.name!r} has dim, dtype and step_counts {found}, expected {ours}; "
            "nothing is converted: load() makes the table that was saved"
        )


def _make(
    chain: list[RowsFile], keep: Keep | None, initializer: Any, like: EmbeddingTable | None, progress: bool
) -> EmbeddingTable:
    """Make a table of what a chain holds."""
    last = chain[-1]
    made = last.record["made"]
    if made["initializer"] is None and not callable(initializer):
        raise CheckpointError(
            f"{last.path}: table {last.name!r} has an initializer that is a function, which no file holds; "
            "pass load(..., initializer=...), or restore into a table that was made with it"
        )
    folded = Folded(chain)
    if keep is not None:
        folded.keep(keep)
    arrays = folded.arrays()
    arrays["admitted"] = arrays["admitted"][:]
    try:
        snapshot.check_order(arrays["admitted"])
    except SnapshotError as error:
        raise CheckpointError(f"{last.path} is damaged: it {error}") from error
    try:
        table = _new_table(last.record, initializer, like)
    except SparseAdamError as error:
        raise CheckpointError(f"{last.path.parent / MANIFEST}: table {last.name!r}: {error}") from error
    try:
        snapshot.check_room(table, len(folded.ids), "pass keep, or restore into a table of a larger capacity")
    except SnapshotError as error:
        raise CheckpointError(f"{last.path.parent} {error}") from error
    numbers = dict(last.record["numbers"])
    if keep is not None:  # a table of its own: what was counted was counted by another
        numbers.update(dropped=0, evicted=0, skipped=0)
    with progress_bar(bytes_of(last.record), "loading", progress) as tell:
        snapshot.fill(table, numbers, arrays, tell)
    return table


def _new_table(record: Mapping[str, Any], initializer: Any, like: EmbeddingTable | None) -> EmbeddingTable:
    """Make a table of the options that were saved, with the name, capacity and place of one that is there."""
    made, given = dict(record["made"]), record["options"]
    values = options.check_saved(given, {np.dtype(made["dtype"])}, given["step_counts"])
    values["step_counts"] = given["step_counts"]
    if made["initializer"] is None:
        made["initializer"] = initializer
    made["eviction"] = Eviction(*made["eviction"])
    if like is None:
        return snapshot.new_table(EmbeddingTable, made, values)
    made.update(name=like.name, capacity=like.capacity)
    values["num_threads"] = like.num_threads
    return snapshot.new_table(EmbeddingTable, made, values, snapshot.folder_of(like))
