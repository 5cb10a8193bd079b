# SPDX-License-Identifier: Apache-2.0
"""A full save of `EmbeddingTable` and increments after it, read as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.checkpoint.row_files import RowsFile
from nb_sparse_adam._src.checkpoint.table_manifest import ARRAYS, KIND
from nb_sparse_adam._src.table.snapshot import OF_TABLE
from nb_sparse_adam.errors import CheckpointError, OptionError, OptionTypeError

MOST_FILES = 1 << 16

Keep = Callable[[NDArray[np.int64]], Any]


def files_of(folder: Path, manifest: dict[str, Any]) -> list[RowsFile]:
    """Return the files that a manifest of tables names."""
    if manifest.get("kind") != KIND:
        raise CheckpointError(f"{folder} is a checkpoint of a SparseAdam, expected one of EmbeddingTables")
    return [RowsFile(folder, record) for record in manifest["tables"]]


def check_chain(folders: Sequence[Path], manifests: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what is no full save, followed by its increments in the order in which they were made."""
    known: dict[str, Path] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest["id"] in known:
            raise CheckpointError(
                f"{folder} holds save {manifest['id']}, which {known[manifest['id']]} in the list holds too: "
                "expected each save once"
            )
        known[manifest["id"]] = folder
    previous: Mapping[str, Any] | None = None
    for folder, manifest in zip(folders, manifests, strict=True):
        base = manifest["base"]
        if previous is None:
            if base is not None:
                raise CheckpointError(
                    f"{folder} is an increment, based on save {base}, {_where(base, known)}; expected a full "
                    "save first, then increments in the order in which they were made"
                )
        elif base is None:
            raise CheckpointError(
                f"{folder} is a full save, expected an increment of save {previous['id']} in "
                f"{known[previous['id']]}; a list begins with its only full save"
            )
        elif _kinds(manifest) != _kinds(previous):
            raise CheckpointError(
                f"{folder} is of other tables than {folders[0]}: {_differing(manifest, previous)}"
            )
        elif base != previous["id"]:
            raise CheckpointError(
                f"{folder} is an increment of save {base}, {_where(base, known)}; expected one of save "
                f"{previous['id']} in {known[previous['id']]}, which is before it"
            )
        previous = manifest


def _where(save: str, known: Mapping[str, Path]) -> str:
    return f"which is in {known[save]}: the order is wrong" if save in known else "which is missing"


def _kinds(manifest: Mapping[str, Any]) -> list[Any]:
    """What tables have in common for ever."""
    return [
        manifest["single"],
        *(
            (
                each["name"],
                each["table"],
                each["made"]["dim"],
                each["made"]["dtype"],
                each["options"]["step_counts"],
            )
            for each in manifest["tables"]
        ),
    ]


def _differing(manifest: Mapping[str, Any], previous: Mapping[str, Any]) -> str:
    def shown(of: Mapping[str, Any]) -> str:
        return ", ".join(f"{each['name']!r} ({each['table']})" for each in of["tables"])

    return f"{shown(manifest)}, expected {shown(previous)}"


class Picked:
    """The rows of a chain's array, which are read a piece at a time."""

    def __init__(self, chain: Folded, name: str) -> None:
        self._chain, self._name = chain, name
        self.dtype, shape, _ = chain.last.entries[name]
        self.shape = (len(chain.ids), *shape[1:])
        self.ndim = len(shape)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        source, place = self._chain.source[part], self._chain.place[part]
        out = np.empty((len(source), *self.shape[1:]), self.dtype)
        for number in np.unique(source):
            chosen = np.flatnonzero(source == number)
            out[chosen] = self._chain.files[number].take(self._name, place[chosen])
        return out


class Folded:
    """A chain's rows: those of its last moment, in the order of their ids.

    Parameters
    ----------
    files : sequence of RowsFile
        Verified, of one table.
    """

    def __init__(self, files: Sequence[RowsFile]) -> None:
        if len(files) > MOST_FILES:
            raise CheckpointError(f"got {len(files)} increments, expected at most {MOST_FILES}; compact some")
        self.files, self.last = files, files[-1]
        self.ids: NDArray[np.int64] = files[0].whole("ids")
        self.source = np.zeros(len(self.ids), np.uint16)  # which file a row is from, and where in it
        self.place = np.arange(len(self.ids), dtype=np.int32)
        for number, file in enumerate(files[1:], 1):
            ids, gone = file.whole("ids"), file.whole("gone")
            if len(np.intersect1d(ids, gone, assume_unique=True)):
                raise CheckpointError(
                    f"{file.path} is damaged: it says of a row that it is there and has gone"
                )
            here = ~(self._are_in(ids) | self._are_in(gone))
            self._keep(here)
            at = np.searchsorted(self.ids, ids)
            self.ids = np.insert(self.ids, at, ids)
            self.source = np.insert(self.source, at, number)
            self.place = np.insert(self.place, at, np.arange(len(ids), dtype=np.int32))

    def _are_in(self, sought: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say of the rows whether their ids are among others, which increase."""
        found = np.zeros(len(self.ids), np.bool_)
        at = np.searchsorted(self.ids, sought)
        at = at[at < len(self.ids)]
        found[at[self.ids[at] == sought[: len(at)]]] = True
        return found

    def _keep(self, mask: NDArray[np.bool_]) -> None:
        if not mask.all():
            self.ids, self.source, self.place = self.ids[mask], self.source[mask], self.place[mask]

    def keep(self, wanted: Keep) -> None:
        """Leave out the rows whose ids a caller does not want."""
        try:
            mask = np.asarray(wanted(self.ids.copy()))
        except (TypeError, ValueError) as error:
            raise OptionError(f"keep returned no mask of ids: {error}") from error
        if mask.dtype != np.bool_:
            raise OptionTypeError(f"keep returned {mask.dtype}, expected bool: a mask of the ids that it got")
        if mask.shape != self.ids.shape:
            raise OptionError(f"keep returned a mask of shape {mask.shape}, expected {self.ids.shape}")
        self._keep(mask)

    def arrays(self) -> dict[str, Any]:
        """Give what a full save would hold, to be read piece by piece."""
        is_counted_once = not self.last.entries["steps"].shape
        of_table = (*OF_TABLE, "steps") if is_counted_once else OF_TABLE
        arrays: dict[str, Any] = {"ids": self.ids, "gone": np.empty(0, np.int64)}
        arrays |= {name: self.last.whole(name) for name in of_table}
        return {name: arrays[name] if name in arrays else Picked(self, name) for name in ARRAYS}
