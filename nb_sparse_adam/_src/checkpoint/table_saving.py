# SPDX-License-Identifier: Apache-2.0
"""Saves of `EmbeddingTable`: tables are captured at one moment, and written while they go on."""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nb_sparse_adam._src.checkpoint.manifest import MANIFEST, check_extra, read_manifest, refuse_foreign
from nb_sparse_adam._src.checkpoint.saving import Part, check_names, saving_in, write_checkpoint
from nb_sparse_adam._src.checkpoint.table_manifest import ARRAYS, KIND, Moment, bytes_of, described
from nb_sparse_adam._src.checkpoint.tensor_files import PieceReader
from nb_sparse_adam._src.table import snapshot
from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam._src.table.history import LEAST_IDS, MOST_SAVES
from nb_sparse_adam._src.table.locking import write_together
from nb_sparse_adam.errors import CheckpointError

Tables = Mapping[str, EmbeddingTable]


class Saved(NamedTuple):
    """What a save was."""

    pause: float  # seconds for which nobody could change the tables
    size: int  # bytes of their arrays


def save_tables(
    folder: Path, tables: Tables, single: bool, extra: Any, base: Path | None, progress: bool
) -> Saved:
    """See `api.save`."""
    pending = Pending(tables, single, extra)
    with saving_in(folder):
        refuse_foreign(folder)
        try:
            pending.capture(base, folder)
            return pending.write_in(folder, progress)
        finally:
            pending.close()


def begin_save(tables: Tables, single: bool, extra: Any, base: Path | None) -> Pending:
    """Capture tables at one moment.

    That takes a moment; what is returned is written while the tables go on, and then closed. A table keeps
    rows aside for it until then, or until nobody refers to it.

    Parameters
    ----------
    tables : mapping of str to EmbeddingTable
    single : bool
        Whether a table was given, not a mapping.
    extra
        As of `api.save`; it is copied.
    base : path or None
        What an increment is of.
    """
    pending = Pending(tables, single, extra)
    try:
        pending.capture(base)
    except BaseException:
        pending.close()
        raise
    return pending


def write_full(
    folder: Path,
    tables: Mapping[str, tuple[EmbeddingTable, Mapping[str, PieceReader], Mapping[str, int]]],
    extra: Any,
) -> None:
    """Write a full save of tables that are not in memory as such.

    Parameters
    ----------
    folder : Path
        As `save_tables`.
    tables : mapping of str to (EmbeddingTable, arrays, numbers)
        One with the same options, and `snapshot.ARRAYS` and `snapshot.NUMBERS`.
    extra
        As of `api.save`.
    """
    parts = []
    for name, (like, given, numbers) in tables.items():
        arrays = {each: given[each] if each in given else np.empty(0, np.int64) for each in ARRAYS}
        made, values = snapshot.made_of(like), snapshot.options_of(like)
        parts.append(
            Part(
                name, arrays, described(secrets.token_hex(8), {**made, "name": name}, values, numbers, arrays)
            )
        )
    with saving_in(folder):
        refuse_foreign(folder)
        write_checkpoint(folder, _head(secrets.token_hex(8), None, False), parts, extra, "saving", False)


def _head(save: str, base: str | None, single: bool) -> dict[str, Any]:
    return {"kind": KIND, "id": save, "base": base, "single": single}


class Pending:
    """A save: of tables that are still to be captured, or were, and are to be written."""

    def __init__(self, tables: Tables, single: bool, extra: Any) -> None:
        check_extra(extra)
        check_names([*tables, *(table.name for table in tables.values())])
        self._tables, self._extra = tables, copy.deepcopy(extra)
        self._save, self._single = secrets.token_hex(8), single
        self._base: str | None = None
        self._moments: dict[str, Moment] = {}
        self.pause = 0.0

    def capture(self, base: Path | None, folder: Path | None = None) -> None:
        """Capture the tables; refuse a base that they are not after, or that is in the folder."""
        based = None if base is None else read_manifest(base)

        def work() -> None:
            begin = time.perf_counter()
            if base is not None and based is not None:
                self._check_base(base, based)
                self._base = based["id"]
                self._refuse_base_in(folder)
            for name, table in self._tables.items():
                self._moments[name] = Moment(table, self._base)
            for table in self._tables.values():  # before it is there: an interrupt may come when it is
                table._history.note_save(self._save, table._store.clock)
            self.pause = time.perf_counter() - begin

        # As steps do: who held one table as a reader, and waited for the next, would wait for a step of both.
        write_together(sorted((table._shared for table in self._tables.values()), key=id), work)

    def write(self, folder: Path, progress: bool) -> Saved:
        """Write what was captured."""
        with saving_in(folder):
            refuse_foreign(folder)
            self._refuse_base_in(folder)
            return self.write_in(folder, progress)

    def write_in(self, folder: Path, progress: bool) -> Saved:
        """Write what was captured into a folder that is `saving_in`."""
        parts = []
        for name, moment in self._moments.items():
            arrays = moment.arrays()
            parts.append(Part(name, arrays, moment.described(arrays), moment.close))
        head = _head(self._save, self._base, self._single)
        write_checkpoint(folder, head, parts, self._extra, "saving", progress)
        return Saved(self.pause, sum(bytes_of(part.described) for part in parts))

    def close(self) -> None:
        """Have tables keep nothing aside any more."""
        for moment in self._moments.values():
            moment.close()

    def _check_base(self, base: Path, manifest: Mapping[str, Any]) -> None:
        """Refuse a save that an increment cannot be based on."""
        if manifest.get("kind") != KIND:
            raise CheckpointError(
                f"base {base} is a checkpoint of a SparseAdam, expected a save of these tables"
            )
        saved = {record["name"]: record["table"] for record in manifest["tables"]}
        ours = {name: table._history.table for name, table in self._tables.items()}
        if saved != ours or manifest["single"] != self._single:
            raise CheckpointError(
                f"base {base} is of other tables: {saved}, expected {ours}; a table that was made anew begins"
                " with a full save (base=None)"
            )
        save = manifest["id"]
        for name, table in self._tables.items():
            if table._history.clock_of(save) is None:
                raise CheckpointError(
                    f"base {base} holds save {save}, which table {name!r} is not after, or does not "
                    f"remember: it knows what has changed since its last {MOST_SAVES} saves, and that which "
                    "it was loaded from, as long as no more rows have gone since than half of those that it "
                    f"has (or {LEAST_IDS:,}). Make a full save (base=None)"
                )

    def _refuse_base_in(self, folder: Path | None) -> None:
        """Refuse to replace the base by its increment."""
        if folder is None or self._base is None or not (folder / MANIFEST).exists():
            return
        if read_manifest(folder).get("id") == self._base:
            raise CheckpointError(
                f"{folder} holds the base itself, which an increment would replace; save it into a folder of "
                "its own"
            )
