# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: an optimizer's tables, state and options in a folder that is whole at every moment.

A folder has a file of arrays for each table (`tensor_files`), and ``manifest.json``, which names them and
says what is in them. A save writes files under names that are new, then a manifest that names these, and puts
it in the place of the old one by one atomic step; only then are the old files deleted. Whenever the process
dies, ``manifest.json`` is the old one or the new one, and the files that it names are complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src import options
from nb_sparse_adam._src.checkpoint.files import TOO_MANY, TableFile, progress_bar, read_all, reading
from nb_sparse_adam._src.checkpoint.manifest import MANIFEST, check_extra, content, old_files, refuse_foreign
from nb_sparse_adam._src.checkpoint.tensor_files import PieceReader, array_size, write_tensors
from nb_sparse_adam._src.engine import locks
from nb_sparse_adam._src.files import descriptor
from nb_sparse_adam._src.naming import type_name
from nb_sparse_adam._src.optimizer import SparseAdam, tables_of
from nb_sparse_adam.errors import CheckpointError, OptionError, OptionTypeError, SparseAdamError


def _reached(point: str) -> None:
    """Do nothing: tests replace it by something that ends the process here."""


# --- saving -----------------------------------------------------------------------------------------------


def save_optimizer(folder: Path, optimizer: Any, extra: Any, progress: bool) -> None:
    """See `api.save`."""
    check_optimizer(optimizer)
    optimizer._check_whole()
    check_extra(extra)
    check_names(optimizer.state)
    with saving_in(folder), optimizer._lock:
        _save(folder, optimizer, extra, progress)


@contextmanager
def saving_in(folder: Path) -> Iterator[None]:
    """Make a folder if need be, and have nobody else save there meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_saver(folder):
            yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"saving a checkpoint in {folder}: {reason}; the one that was there, if any, is as it was",
            error.filename,
        ) from error


def _save(folder: Path, optimizer: SparseAdam, extra: Any, progress: bool) -> None:
    refuse_foreign(folder)
    optimizer._check_whole()
    optimizer.synchronize()
    parts = [
        Part(
            table.name,
            table.arrays_to_save(),
            {
                "shape": list(table.shape),
                "dtype": table.dtype.name,
                "steps": table.arrays.counts.dtype.name,
                "skipped_rows": table.skipped_rows,
            },
        )
        for table in tables_of(optimizer).values()
    ]
    write_checkpoint(folder, {"options": optimizer._saved()}, parts, extra, "saving", progress)


class Part(NamedTuple):
    """A table to be written, and what the manifest says of it beside its file."""

    name: str
    arrays: Mapping[str, PieceReader]
    described: dict[str, Any]
    written: Callable[[], None] = lambda: None  # is called when its arrays have been read


def write_checkpoint(
    folder: Path, head: Mapping[str, Any], parts: Sequence[Part], extra: Any, what: str, progress: bool
) -> None:
    """Write files and a manifest that names them, and put it in the place of the one that is there."""
    token = secrets.token_hex(8)
    total = sum(array_size(array.dtype, array.shape) for part in parts for array in part.arrays.values())
    written: list[Path] = []
    try:
        records = []
        with progress_bar(total, what, progress) as tell:
            for number, part in enumerate(parts):
                file = folder / f"table-{number}-{token}.safetensors"
                written.append(file)
                records.append(_save_part(file, part, tell))
        temporary = folder / f".manifest-{token}.json"
        written.append(temporary)
        _write_synced(temporary, content(head, records, extra))
        _reached("manifest written")
        _sync_folder(folder)  # its files are there before the manifest is
        os.replace(temporary, folder / MANIFEST)
    except BaseException:
        if not _names(folder, token):  # an interrupt may come when the manifest is in its place already
            for file in written:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
        raise
    _reached("manifest in its place")
    kept = {record["file"] for record in records}
    # The checkpoint is there. What cannot be deleted now, the next save deletes.
    with contextlib.suppress(OSError):
        _sync_folder(folder)
        _reached("folder synced")
        for file in old_files(folder, kept):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            _reached("an old file deleted")


def _names(folder: Path, token: str) -> bool:
    """Whether the manifest that is there was written by this save; True also if it cannot be read."""
    try:
        return token.encode() in (folder / MANIFEST).read_bytes()
    except OSError as error:
        return not isinstance(error, FileNotFoundError)


def _save_part(file: Path, part: Part, tell: Callable[[int], None]) -> dict[str, Any]:
    with open(file, "xb") as opened:
        _reached("a file begun")
        digest = write_tensors(opened, part.arrays, tell)
        part.written()
        opened.flush()
        _reached("a file written")
        os.fsync(opened.fileno())
        size = opened.tell()
    _reached("a file synced")
    return {"name": part.name, "file": file.name, "size": size, "sha256": digest, **part.described}


def check_names(names: Iterable[str]) -> None:
    """Refuse names that would not come back."""
    for name in names:
        if json.loads(json.dumps(name)) != name:
            raise CheckpointError(f"a table is called {name!r}, which JSON cannot hold; give it another name")


def folder_of(path: Any) -> Path:
    """Check a path that a caller gave."""
    try:
        folder = Path(path)
    except TypeError as error:
        raise OptionTypeError(f"path is {path!r} ({type(path).__name__}), expected a path") from error
    if "\0" in str(folder):
        raise OptionError(f"path is {path!r}, expected one without NUL")
    return folder


def check_optimizer(given: Any) -> None:
    """Refuse what is no optimizer that is saved here."""
    if not isinstance(given, SparseAdam):
        raise OptionTypeError(
            f"optimizer is a {type_name(given)}, expected a nb_sparse_adam.SparseAdam, an "
            "EmbeddingTable or a mapping of names to EmbeddingTables; those of torch, "
            "nb_sparse_adam.torch's too, are saved by torch.save(optimizer.state_dict(), file)"
        )


@contextmanager
def _only_saver(folder: Path) -> Iterator[None]:
    """Allow one save here at a time: it deletes the files of others. The lock ends with the process."""
    if os.name != "posix":
        yield
        return
    import fcntl

    with descriptor(folder, os.O_RDONLY) as opened:
        try:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"{folder}: another save into this folder is going on; wait for it, or save elsewhere"
                ) from error
            yield
        finally:
            fcntl.flock(opened, fcntl.LOCK_UN)  # a child that was forked meanwhile has it open too


def _write_synced(file: Path, content: bytes) -> None:
    with open(file, "xb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk; Windows has no such call."""
    if os.name == "posix":
        with descriptor(folder, os.O_RDONLY) as opened:
            os.fsync(opened)


# --- reading ----------------------------------------------------------------------------------------------


def load_optimizer(folder: Path, mmap: bool, verify: bool | None, progress: bool) -> tuple[SparseAdam, Any]:
    """See `api.load`."""
    verify = not mmap if verify is None else verify

    def make(manifest: dict[str, Any], files: list[TableFile]) -> tuple[SparseAdam, Any]:
        values = _check_options(folder, manifest, None)
        params = {file.name: _new_param(file, mmap) for file in files}
        optimizer = SparseAdam(params, step_counts=manifest["options"]["step_counts"])
        optimizer._set(**values)
        _fill(optimizer, files, _rooms(optimizer, files), "loading", progress, verify, mmap)
        return optimizer, manifest["extra"]

    return reading(folder, make)


def _new_param(file: TableFile, mmap: bool) -> NDArray[Any]:
    """Make an array for a table's parameters: mapped, or to be read."""
    dtype, shape, _ = file.entries["param"]
    return _map(file) if mmap and array_size(dtype, shape) else np.empty(shape, dtype)


def _map(file: TableFile) -> NDArray[Any]:
    """Map a table's parameters, so that changes are copies in memory; the file is kept open."""
    entry = file.entries["param"]
    if entry.start % entry.dtype.itemsize:  # as nothing writes it that we know of
        raise CheckpointError(f"{file.path} cannot be mapped: its arrays are not aligned; pass mmap=False")
    with file.reading() as opened:
        try:
            return np.memmap(opened, entry.dtype, "c", entry.start, entry.shape).view(np.ndarray)
        except ValueError as error:
            raise CheckpointError(f"{file.path} is damaged: it cannot be mapped ({error})") from error
        except OSError as error:
            if error.errno not in TOO_MANY:
                raise
            raise CheckpointError(
                f"{file.path} cannot be mapped: mmap=True keeps the file of every table open, more than this "
                "process may have. Raise the limit (ulimit -n), or read them: mmap=False"
            ) from error


def restore_optimizer(folder: Path, optimizer: Any, progress: bool) -> Any:
    """See `api.restore`."""
    check_optimizer(optimizer)
    return reading(folder, partial(_restore, folder, optimizer, progress))


def _restore(
    folder: Path, optimizer: SparseAdam, progress: bool, manifest: dict[str, Any], files: list[TableFile]
) -> Any:
    values = _check_options(folder, manifest, optimizer)
    _check_fit(folder, files, optimizer)
    read_all(files, {}, progress, "verifying")
    if optimizer._folder is not None:
        optimizer._folder.check_process()
    if locks.is_lost(optimizer._lock):
        optimizer._unfinished = locks.LOST  # before anybody can take the lock again
        locks.renew(optimizer, "_lock")
    with optimizer._lock:
        optimizer.synchronize()
        _check_fit(folder, files, optimizer)  # tables may have been rearranged meanwhile
        for table in tables_of(optimizer).values():
            table.check_writeable()
        with nullcontext() if optimizer._folder is None else optimizer._folder.removed_on_error():
            rooms = _rooms(optimizer, files)
            _reached("verified")
            for file in files:
                with file.reading():
                    pass  # it is as it was
        optimizer._unfinished = (
            f"restoring {folder} into this optimizer did not come to its end: its tables and state are of "
            "two moments. Restore it again, or another checkpoint"
        )
        try:
            _fill(optimizer, files, rooms, "restoring", progress)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {optimizer._unfinished}") from error
        optimizer._set(**values)
        optimizer._unfinished = None
    return manifest["extra"]


def _rooms(optimizer: SparseAdam, files: list[TableFile]) -> list[Callable[[], dict[str, Any]]]:
    """Make room in an optimizer for what files hold (see `TableState.room_to_load`)."""
    tables = tables_of(optimizer)
    return [tables[file.name].room_to_load(file.entries["steps"].dtype) for file in files]


def _fill(
    optimizer: SparseAdam,
    files: list[TableFile],
    rooms: list[Callable[[], dict[str, Any]]],
    what: str,
    progress: bool,
    verify: bool = True,
    mmap: bool = False,
) -> None:
    """Read files into an optimizer that has room for them, but for parameters that are mapped."""
    tables = tables_of(optimizer)
    targets = {
        file.name: {"param": None if mmap else tables[file.name].param_to_load(), **room()}
        for file, room in zip(files, rooms, strict=True)
    }
    read_all(files, targets, progress, what, verify)
    for file in files:
        tables[file.name].loaded(file.record["skipped_rows"])


def _check_options(folder: Path, manifest: dict[str, Any], optimizer: SparseAdam | None) -> dict[str, Any]:
    given = manifest["options"]
    kept = (given["step_counts"],) if optimizer is None else (optimizer.step_counts, optimizer.device_checks)
    dtypes = {np.dtype(record["dtype"]) for record in manifest["tables"]}
    try:
        return options.check_saved(given, dtypes, *kept)
    except SparseAdamError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from error


def _check_fit(folder: Path, files: list[TableFile], optimizer: SparseAdam) -> None:
    tables = optimizer.state
    if {file.name for file in files} != set(tables):
        raise CheckpointError(
            f"{folder} is of tables {sorted(file.name for file in files)}, expected {sorted(tables)}"
        )
    for file in files:
        table, entry = tables[file.name], file.entries["param"]
        if entry.shape != table.shape or entry.dtype != table.dtype:
            raise CheckpointError(
                f"{file.path}: table {file.name!r} is {entry.shape} {entry.dtype}, expected {table.shape} "
                f"{table.dtype}; nothing is converted: load() makes tables of the shapes that were saved"
            )
