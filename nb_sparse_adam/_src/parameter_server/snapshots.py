# SPDX-License-Identifier: Apache-2.0
"""The snapshots of a shard: a full one and increments after it, in folders that are numbered.

Each is a checkpoint, whose ``extra`` says what else there was at that moment. When increments have become as
large as what they are based on, the next snapshot is a full one, and those before it are deleted.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nb_sparse_adam._src.checkpoint.api import load
from nb_sparse_adam._src.checkpoint.manifest import MANIFEST, read_manifest
from nb_sparse_adam._src.checkpoint.table_saving import Pending, begin_save
from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam.errors import CheckpointError

_MOST_INCREMENTS = 32

POINTS = ("a snapshot written", "an old snapshot deleted")


def _reached(point: str) -> None:
    """Do nothing: tests replace it by something that ends the process here."""


class Snapshots:
    """A folder of snapshots.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.chain = _chain_in(folder)
        self._bytes = [_bytes_of(path) for path in self.chain]  # of each

    def load(self) -> tuple[dict[str, EmbeddingTable], dict[str, Any]]:
        """Make the tables of the last snapshot; return its ``extra``, too."""
        return load([str(path) for path in self.chain])

    def begin(self, tables: Mapping[str, EmbeddingTable], extra: Mapping[str, Any]) -> Pending:
        """Capture the tables as they are at this moment; `write` writes them later."""
        if self.chain and len(self.chain) <= _MOST_INCREMENTS and sum(self._bytes[1:]) < self._bytes[0]:
            try:
                return begin_save(tables, False, extra, self.chain[-1])
            except CheckpointError:  # too much has changed since for an increment to be worth it
                pass
        return begin_save(tables, False, extra, None)

    def write(self, saving: Pending) -> None:
        """Write what `begin` captured."""
        last = self.chain[-1] if self.chain else None
        path = first_of(self._folder) if last is None else _numbered(self._folder, int(last.name) + 1)
        shutil.rmtree(path, ignore_errors=True)  # what is left of one that did not come to its end
        try:
            saving.write(path, False)
        finally:
            saving.close()
        is_full = read_manifest(path)["base"] is None
        # Those of before a process was killed, too.
        old = [each for each in _complete_in(self._folder) if each < path] if is_full else []
        self.chain = [path] if is_full else [*self.chain, path]
        self._bytes = [_bytes_of(each) for each in self.chain]
        _reached("a snapshot written")
        for each in old:
            shutil.rmtree(each, ignore_errors=True)
            _reached("an old snapshot deleted")


def first_of(folder: Path) -> Path:
    """Return where the first snapshot is written."""
    return _numbered(folder, 1)


def _numbered(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}"


def _complete_in(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.glob("[0-9]*") if path.name.isdigit() and (path / MANIFEST).exists()
    )


def _chain_in(folder: Path) -> list[Path]:
    """Return the last full snapshot, and those after it."""
    complete = _complete_in(folder)
    full = [at for at, path in enumerate(complete) if read_manifest(path)["base"] is None]
    if complete and not full:
        raise CheckpointError(
            f"{folder} has snapshots {complete[0].name} to {complete[-1].name}, none of which is a full one; "
            "bring back the one that is missing"
        )
    return complete[full[-1] :] if full else []


def _bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())
