# SPDX-License-Identifier: Apache-2.0
"""The file of an `EmbeddingTable`: verified once, then read row by row, in grains that are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.checkpoint.files import TableFile
from nb_sparse_adam._src.checkpoint.table_manifest import shapes
from nb_sparse_adam._src.checkpoint.tensor_files import (
    StoredArray,
    TensorFileError,
    array_size,
    read_exactly,
    rows_of_size,
)
from nb_sparse_adam._src.table.snapshot import Checks, SnapshotError
from nb_sparse_adam.errors import CheckpointError

GRAIN_BYTES = 1 << 20  # that are hashed and read at a time: a chain keeps one of each of its files


class RowsFile(TableFile):
    """A table's file, or an increment's."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        super().__init__(folder, record, record["options"]["step_counts"])
        self._digests: dict[str, list[bytes]] = {}  # of the grains of each array
        self._grain: tuple[str, int, NDArray[Any]] = ("", 0, np.empty(0))

    def _check_entries(self) -> None:
        found = {name: (entry.dtype, entry.shape) for name, entry in self.entries.items()}
        if found != shapes(self.record):
            raise TensorFileError(f"holds {sorted(self.entries)}, not what the manifest says of it")

    def verify(self, tell: Callable[[int], None]) -> None:
        """Read all of it: check its SHA-256 and what is in it, and note what each grain is."""
        checks = Checks(self.record["numbers"])
        digests: dict[str, list[bytes]] = {name: [] for name in self.entries}
        try:
            with self.reading() as opened:
                opened.seek(0)
                digest = sha256(read_exactly(opened, min(entry.start for entry in self.entries.values())))
                for name, entry in self.entries.items():
                    for size in _sizes(entry):
                        content = read_exactly(opened, size)
                        digest.update(content)
                        digests[name].append(_digest_of(content))
                        checks.check(name, np.frombuffer(content, entry.dtype))
                        tell(size)
        except (TensorFileError, SnapshotError) as error:
            raise CheckpointError(f"{self.path} is damaged: it {error}") from error
        self.check_digest(digest.hexdigest())
        self._digests = digests

    def _read_grain(self, name: str, number: int) -> NDArray[Any]:
        """Read a grain of an array again, as it was when it was verified."""
        kept, at, values = self._grain
        if (kept, at) == (name, number):
            return values
        entry = self.entries[name]
        size = array_size(entry.dtype, entry.shape[1:]) * rows_of_size(entry.dtype, entry.shape, GRAIN_BYTES)
        start = number * size
        size = min(size, array_size(entry.dtype, entry.shape) - start)
        try:
            with self.reading() as opened:
                opened.seek(entry.start + start)
                content = read_exactly(opened, size)
            if _digest_of(content) != self._digests[name][number]:
                raise TensorFileError("has been changed since it was verified")
        except TensorFileError as error:
            raise CheckpointError(f"{self.path} is damaged: it {error}") from error
        values = np.frombuffer(content, entry.dtype).reshape(-1, *entry.shape[1:])
        self._grain = name, number, values
        return values

    def whole(self, name: str) -> NDArray[Any]:
        """Read an array."""
        entry = self.entries[name]
        grains = [self._read_grain(name, number) for number in range(len(self._digests[name]))]
        return np.concatenate(grains).reshape(entry.shape) if grains else np.empty(entry.shape, entry.dtype)

    def take(self, name: str, places: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Read some rows of an array, whose places increase."""
        entry = self.entries[name]
        at_once = rows_of_size(entry.dtype, entry.shape, GRAIN_BYTES)
        out = np.empty((len(places), *entry.shape[1:]), entry.dtype)
        grains = places // at_once
        done = 0
        while done < len(places):
            number = int(grains[done])
            end = int(np.searchsorted(grains, number, "right"))
            out[done:end] = self._read_grain(name, number)[places[done:end] - number * at_once]
            done = end
        return out


def _digest_of(grain: bytes) -> bytes:
    return blake2b(grain, digest_size=16).digest()  # faster than SHA-256 where no instruction computes that


def _sizes(entry: StoredArray) -> Iterator[int]:
    """Bytes of the grains of an array."""
    left = array_size(entry.dtype, entry.shape)
    grain = array_size(entry.dtype, entry.shape[1:]) * rows_of_size(entry.dtype, entry.shape, GRAIN_BYTES)
    while left:
        yield min(grain, left)
        left -= min(grain, left)
