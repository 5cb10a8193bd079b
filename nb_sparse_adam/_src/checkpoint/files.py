# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint, one for each table: opened, checked, and read in pieces."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.checkpoint.manifest import ARRAYS, MANIFEST, read_manifest
from nb_sparse_adam._src.checkpoint.tensor_files import TensorFileError, array_size, check_header, read_pieces
from nb_sparse_adam._src.engine.state import MAX_COUNT
from nb_sparse_adam._src.extras import require
from nb_sparse_adam._src.files import NoRegularFileError, open_regular
from nb_sparse_adam.errors import CheckpointError

_TRIES = 10  # more, of reading a checkpoint that is being replaced meanwhile
TOO_MANY = (errno.EMFILE, errno.ENFILE)  # files are open, in this process or in all
_KEPT_OPEN = 100  # files, while a checkpoint is read: of a usual limit of 256 or 1,024 for the whole process
_T = TypeVar("_T")
_File = TypeVar("_File", bound="TableFile")


class _CannotOpenError(Exception):
    """A checkpoint's file is missing, or one too many for this process to open: its argument, an OSError."""


def reading(folder: Path, work: Callable[[dict[str, Any], list[TableFile]], _T]) -> _T:
    """Call `work` with an optimizer's manifest and its files: see `reading_all`."""
    return reading_all([folder], _files_of_optimizer, lambda manifests, files: work(manifests[0], files))


def _files_of_optimizer(folder: Path, manifest: dict[str, Any]) -> list[TableFile]:
    if "kind" in manifest:
        raise CheckpointError(
            f"{folder} is a checkpoint of {manifest['kind']}s, expected one of a SparseAdam"
        )
    step_counts = manifest["options"]["step_counts"]
    return [TableFile(folder, record, step_counts) for record in manifest["tables"]]


def reading_all(
    folders: Sequence[Path],
    files_of: Callable[[Path, dict[str, Any]], list[_File]],
    work: Callable[[list[dict[str, Any]], list[_File]], _T],
) -> _T:
    """Call `work` with manifests and files, headers checked; again, if a save replaces them meanwhile.

    Some files are kept open, and read to their end whatever a save deletes; others, should there be many,
    are opened again by their names, which no later checkpoint has.
    """
    tries, keep = _TRIES, _KEPT_OPEN
    while True:
        manifests = [read_manifest(folder) for folder in folders]
        try:
            with ExitStack() as stack:
                files = [
                    file
                    for folder, manifest in zip(folders, manifests, strict=True)
                    for file in files_of(folder, manifest)
                ]
                for i, file in enumerate(files):
                    file.open(stack if i < keep else None)
                return work(manifests, files)
        except _CannotOpenError as caught:
            (error,) = caught.args
            if error.errno in TOO_MANY:
                if not keep:
                    raise error from caught
                keep = 0
            elif tries and [read_manifest(folder) for folder in folders] != manifests:
                tries -= 1
            else:
                raise CheckpointError(
                    f"{error.filename} is missing, which {Path(error.filename).parent / MANIFEST} names"
                ) from error


class TableFile:
    """A table's file: opened and checked once, then kept open or opened again for each reading."""

    def __init__(self, folder: Path, record: dict[str, Any], step_counts: str) -> None:
        self.path = folder / record["file"]
        self.name: str = record["name"]  # of the table
        self.record = record
        self._step_counts = step_counts
        self._kept: BufferedReader | None = None
        self._seen: list[bytes] | None = None

    def open(self, stack: ExitStack | None) -> None:
        """Check size and header; keep it open until the stack is closed, if there is one."""
        with ExitStack() as briefly:
            opened = _open(self.path, briefly if stack is None else stack)
            status = os.fstat(opened.fileno())
            try:
                if status.st_size != self.record["size"]:
                    raise TensorFileError(f"has {status.st_size} bytes, expected {self.record['size']}")
                self.entries = check_header(opened, status.st_size)
                self._check_entries()
            except TensorFileError as error:
                raise CheckpointError(f"{self.path} is damaged: it {error}") from error
            self._identity = _identity(status)
            self._kept = None if stack is None else opened

    def _check_entries(self) -> None:
        shape, dtype = tuple(self.record["shape"]), np.dtype(self.record["dtype"])
        found = {name: (entry.dtype, entry.shape) for name, entry in self.entries.items()}
        expected: dict[str, Any] = dict.fromkeys(ARRAYS[:3], (dtype, shape))
        counted = {"element": shape, "row": shape[:1], "global": ()}[self._step_counts]
        if found != {**expected, "steps": (np.dtype(self.record["steps"]), counted)}:
            raise TensorFileError(f"holds {sorted(self.entries)}, not what the manifest says of it")

    @contextmanager
    def reading(self) -> Iterator[BufferedReader]:
        """Open it again, if it is not open, and refuse one that has been changed since."""
        with ExitStack() as stack:
            opened = self._kept if self._kept is not None else _open(self.path, stack)
            if _identity(os.fstat(opened.fileno())) != self._identity:
                raise CheckpointError(f"{self.path} has been changed while it was read")
            yield opened

    def read(
        self, into: Mapping[str, NDArray[Any] | None], tell: Callable[[int], None], verify: bool
    ) -> None:
        """Read it, and copy what is wanted; when it is read again, only what was there the first time."""
        seen: list[bytes] = []  # the SHA-256 up to the end of each piece
        before = None if self._seen is None else iter(self._seen)

        def check(name: str, piece: NDArray[Any], so_far: bytes) -> None:
            if name in ("steps", "exp_avg_sq") and (piece < 0).any():  # NaN would hide one from min()
                raise TensorFileError(f"has a negative number in {name}")
            if name == "steps" and (piece > MAX_COUNT).any():
                raise TensorFileError("has a count beyond 2**62 in steps, more than there can be steps")
            if before is not None and so_far != next(before, None):
                raise TensorFileError("has been changed since it was verified")
            seen.append(so_far)

        try:
            with self.reading() as opened:
                digest = read_pieces(opened, self.entries, into, check, tell, verify)
        except TensorFileError as error:
            raise CheckpointError(f"{self.path} is damaged: it {error}") from error
        if verify:
            self.check_digest(digest)
        self._seen = seen

    def check_digest(self, digest: str) -> None:
        """Refuse a file whose SHA-256 is not that of the manifest."""
        if digest != self.record["sha256"]:
            raise CheckpointError(
                f"{self.path} is damaged: its SHA-256 is {digest}, expected {self.record['sha256']}; go back "
                "to an older checkpoint"
            )


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _open(path: Path, stack: ExitStack) -> BufferedReader:
    """Open a file until the stack is closed."""
    try:
        return stack.enter_context(open_regular(path))
    except NoRegularFileError as error:
        raise CheckpointError(f"{path} {error}") from error
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno in TOO_MANY:
            raise _CannotOpenError(error) from error
        raise


def read_all(
    files: list[TableFile],
    targets: Mapping[str, Mapping[str, NDArray[Any] | None]],
    progress: bool,
    what: str,
    verify: bool = True,
) -> None:
    """Read files into the arrays that there are for a table, if any."""
    entries = [entry for file in files for entry in file.entries.values()]
    with progress_bar(sum(array_size(entry.dtype, entry.shape) for entry in entries), what, progress) as tell:
        for file in files:
            file.read(targets.get(file.name, {}), tell, verify)


@contextmanager
def progress_bar(total: int, what: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show how many bytes have been read or written; gives what is told of them."""
    if not shown:
        yield lambda _: None
        return
    tqdm = require("tqdm", "train", "showing a bar")
    with tqdm.tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar.update
