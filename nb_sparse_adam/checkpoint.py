"""Checkpoints: an optimizer's tables, state and options in a folder that is whole at every moment.

A folder has a file of arrays for each table (`tensor_files`), and ``manifest.json``, which names them and
says what is in them. A save writes files under names that are new, then a manifest that names these, and puts
it in the place of the old one by one atomic step; only then are the old files deleted. Whenever the process
dies, ``manifest.json`` is the old one or the new one, and the files that it names are complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam import options
from nb_sparse_adam.errors import CheckpointError, OptionTypeError, SparseAdamError
from nb_sparse_adam.extras import require
from nb_sparse_adam.manifest import FORMAT, MANIFEST, OURS, VERSION, check_extra, read_manifest
from nb_sparse_adam.manifest import digest as _digest
from nb_sparse_adam.optimizer import SparseAdam
from nb_sparse_adam.table_state import TableState
from nb_sparse_adam.tensor_files import (
    Header,
    TensorFileError,
    array_size,
    check_header,
    read_pieces,
    write_tensors,
)

__all__ = ["load", "restore", "save"]

ARRAYS = ("param", "exp_avg", "exp_avg_sq", "steps")
_TRIES = 10  # of reading a checkpoint that is being replaced meanwhile


def _reached(point: str) -> None:
    """Do nothing: tests put something in its place that dies here."""


# --- saving -----------------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str], optimizer: SparseAdam, extra: Any = None, *, progress: bool = False
) -> None:
    """Save an optimizer, its tables included, so that `load` and `restore` go on with the same bits.

    Parameters
    ----------
    path : path
        A folder, created if need be. A checkpoint that is there already is replaced, by one atomic step.
    optimizer : SparseAdam
        Steps of other Python threads wait meanwhile. Not to be called from a signal handler, which may come
        in the middle of a step: set a flag there, and save after the step.
    extra : optional
        Something small of your own, as JSON can hold it: None, booleans, numbers, strings, lists, and dicts
        with strings for keys. Tuples come back as lists.
    progress : bool, default False
        Whether to show a bar.

    Raises
    ------
    CheckpointError
        If `extra` cannot be held, or another process is saving there.
    OptionTypeError
        If `optimizer` is of another kind.
    OSError
        If something cannot be written; the checkpoint that was there is as it was.
    """
    _check_optimizer(optimizer)
    try:
        check_extra(extra, "extra")
        json.loads(json.dumps(extra))
    except (RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"extra cannot be kept as JSON: {error}") from error
    for name in optimizer.state:
        if json.loads(json.dumps(name)) != name:
            raise CheckpointError(f"a table is called {name!r}, which JSON cannot hold; give it another name")
    folder = Path(path)
    token = secrets.token_hex(8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_saver(folder), optimizer._lock:
            _save(folder, token, optimizer, extra, progress)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"saving a checkpoint in {folder}: {reason}; the one that was there, if any, is as it was",
            error.filename,
        ) from error


def _save(folder: Path, token: str, optimizer: SparseAdam, extra: Any, progress: bool) -> None:
    optimizer.synchronize()
    tables = optimizer.state
    total = sum(array.nbytes for table in tables.values() for array in table.arrays_to_save().values())
    written: list[Path] = []
    try:
        records = []
        with _bar(total, "saving", progress) as tell:
            for number, table in enumerate(tables.values()):
                file = folder / f"table-{number}-{token}.safetensors"
                written.append(file)
                records.append(_save_table(file, table, tell))
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "options": optimizer._options(),
            "tables": records,
            "extra": extra,
        }
        manifest["sha256"] = _digest(manifest)
        temporary = folder / f".manifest-{token}.json"
        written.append(temporary)
        _write_synced(temporary, json.dumps(manifest, indent=1).encode())
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
        for name in os.listdir(folder):
            if OURS.fullmatch(name) and name not in kept:
                with contextlib.suppress(OSError):
                    (folder / name).unlink(missing_ok=True)
                _reached("an old file deleted")


def _names(folder: Path, token: str) -> bool:
    """Whether the manifest that is there is of this save; if that cannot be known, it may be."""
    try:
        return token.encode() in (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _save_table(file: Path, table: TableState, tell: Callable[[int], None]) -> dict[str, Any]:
    arrays = table.arrays_to_save()
    with open(file, "xb") as opened:
        _reached("a file begun")
        digest = write_tensors(opened, arrays, tell)
        opened.flush()
        _reached("a file written")
        os.fsync(opened.fileno())
        size = opened.tell()
    _reached("a file synced")
    return {
        "name": table.name,
        "file": file.name,
        "size": size,
        "sha256": digest,
        "shape": list(table.shape),
        "dtype": table.dtype.name,
        "steps": table.arrays.counts.dtype.name,
        "skipped_rows": table.skipped_rows,
    }


def _check_optimizer(given: Any) -> None:
    if not isinstance(given, SparseAdam):
        raise OptionTypeError(
            f"optimizer is a {type(given).__name__}, expected a nb_sparse_adam.SparseAdam; those of torch, "
            "nb_sparse_adam.torch's too, are saved by torch.save(optimizer.state_dict(), file)"
        )


@contextmanager
def _only_saver(folder: Path) -> Iterator[None]:
    """Keep two savers apart: each deletes files that are not its own. The system ends it with the process."""
    if os.name != "posix":
        yield
        return
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
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
        os.close(opened)


def _write_synced(file: Path, content: bytes) -> None:
    with open(file, "xb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    """Have the system keep the names in a folder; there is no such thing on Windows."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


# --- reading ----------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str],
    mmap: bool = False,
    verify: bool | None = None,
    *,
    progress: bool = False,
) -> tuple[SparseAdam, Any]:
    """Make an optimizer of a checkpoint, with tables of its own: ``optimizer.tables``.

    Parameters
    ----------
    path : path
        A folder that `save` wrote.
    mmap : bool, default False
        Map the parameters instead of reading them: parts that are looked at are read when they are, and parts
        that are changed are copied; the file stays as it is. Moments and counts are read.
    verify : bool, optional
        Whether to compute the SHA-256 of every file; by default, unless mapped. Sizes and headers are checked
        in any case.
    progress : bool, default False
        Whether to show a bar.

    Returns
    -------
    optimizer : SparseAdam
        With ``num_threads=None``.
    extra
        What was given to `save`.

    Raises
    ------
    CheckpointError
        If something is missing, incomplete, damaged or not a checkpoint; it names the file.
    """
    folder = Path(path)
    with _opened(folder) as (manifest, files):
        values = _check_options(folder, manifest, None)
        tables: dict[str, NDArray[Any]] = {}
        for file in files:
            entry = file.header.entries["param"]
            tables[file.name] = (
                np.memmap(file.opened, entry.dtype, "c", entry.start, entry.shape).view(np.ndarray)
                if mmap and array_size(entry.dtype, entry.shape)
                else np.empty(entry.shape, entry.dtype)
            )
        optimizer = SparseAdam(tables, step_counts=manifest["options"]["step_counts"])
        optimizer._set(**values)

        def target(file: _File) -> dict[str, NDArray[Any]]:
            table = optimizer._tables[file.name]
            into = table.arrays_to_load(file.header.entries["steps"].dtype)
            return into if mmap else {"param": table.param, **into}

        _read_all(files, target, progress, "loading", verify=not mmap if verify is None else verify)
        for file in files:
            optimizer._tables[file.name].loaded(file.record["skipped_rows"])
        return optimizer, manifest["extra"]


def restore(path: str | os.PathLike[str], optimizer: SparseAdam, *, progress: bool = False) -> Any:
    """Put a checkpoint's parameters, state and options into an optimizer, which goes on with the same bits.

    Parameters
    ----------
    path : path
        A folder that `save` wrote, of an optimizer with the same names, shapes and dtypes of tables, and the
        same ``step_counts``: nothing is converted.
    optimizer : SparseAdam
        Its tables are written to where they are. An interrupt meanwhile leaves it restored in part: restore
        it again.
    progress : bool, default False
        Whether to show a bar.

    Returns
    -------
    extra
        What was given to `save`.

    Raises
    ------
    CheckpointError
        If it does not fit, or is missing, incomplete, damaged or not a checkpoint. Nothing has been changed
        then: every file is verified before the first write.
    OptionTypeError
        If `optimizer` is of another kind.
    """
    _check_optimizer(optimizer)
    folder = Path(path)
    with _opened(folder) as (manifest, files):
        values = _check_options(folder, manifest, optimizer)
        _check_fit(folder, files, optimizer)
        _read_all(files, lambda _: None, progress, "verifying")
        with optimizer._lock:
            optimizer.synchronize()
            for table in optimizer._tables.values():
                table.check_writeable()
            targets = {}
            for file in files:
                table = optimizer._tables[file.name]
                into = table.arrays_to_load(file.header.entries["steps"].dtype)
                targets[file.name] = {"param": table.param_to_load(), **into}
            _read_all(files, lambda file: targets[file.name], progress, "restoring")
            for file in files:
                optimizer._tables[file.name].loaded(file.record["skipped_rows"])
            optimizer._set(**values)
        return manifest["extra"]


class _File(NamedTuple):
    """A table's file, opened."""

    path: Path
    name: str  # of the table
    record: dict[str, Any]
    opened: Any
    header: Header


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[dict[str, Any], list[_File]]]:
    """Open a checkpoint: its manifest and files, headers checked. Later saves do not matter to it."""
    with ExitStack() as stack:
        for left in range(_TRIES, -1, -1):
            manifest = read_manifest(folder)
            try:
                files = [
                    stack.enter_context(_open_file(folder, record, manifest["options"]["step_counts"]))
                    for record in manifest["tables"]
                ]
                break
            except OSError as error:
                if error.errno == errno.EMFILE:
                    raise CheckpointError(
                        f"{folder} has {len(manifest['tables'])} files, more than this process may have "
                        "open: raise the limit (ulimit -n)"
                    ) from error
                if not isinstance(error, FileNotFoundError):
                    raise
                if not left or read_manifest(folder) == manifest:
                    raise CheckpointError(
                        f"{error.filename} is missing, which {folder / MANIFEST} names"
                    ) from error
        yield manifest, files


@contextmanager
def _open_file(folder: Path, record: dict[str, Any], step_counts: str) -> Iterator[_File]:
    path = folder / record["file"]
    with open(path, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        try:
            if size != record["size"]:
                raise TensorFileError(f"has {size} bytes, expected {record['size']}")
            header = check_header(opened, size)
            _check_entries(header, record, step_counts)
        except TensorFileError as error:
            raise CheckpointError(f"{path} is damaged: it {error}") from error
        yield _File(path, record["name"], record, opened, header)


def _check_entries(header: Header, record: Mapping[str, Any], step_counts: str) -> None:
    shape, dtype = tuple(record["shape"]), np.dtype(record["dtype"])
    found = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
    expected: dict[str, Any] = dict.fromkeys(ARRAYS[:3], (dtype, shape))
    counted = {"element": shape, "row": shape[:1], "global": ()}[step_counts]
    if found != {**expected, "steps": (np.dtype(record["steps"]), counted)}:
        raise TensorFileError(f"holds {sorted(header.entries)}, not what the manifest says of it")


def _check_options(folder: Path, manifest: dict[str, Any], optimizer: SparseAdam | None) -> dict[str, Any]:
    given = manifest["options"]
    step_counts = given["step_counts"] if optimizer is None else optimizer.step_counts
    dtypes = {np.dtype(record["dtype"]) for record in manifest["tables"]}
    try:
        return options.check_saved(given, dtypes, step_counts)
    except SparseAdamError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from error


def _check_fit(folder: Path, files: list[_File], optimizer: SparseAdam) -> None:
    tables = optimizer.state
    if {file.name for file in files} != set(tables):
        raise CheckpointError(
            f"{folder} is of tables {sorted(file.name for file in files)}, expected {sorted(tables)}"
        )
    for file in files:
        table, entry = tables[file.name], file.header.entries["param"]
        if entry.shape != table.shape or entry.dtype != table.dtype:
            raise CheckpointError(
                f"{file.path}: table {file.name!r} is {entry.shape} {entry.dtype}, expected {table.shape} "
                f"{table.dtype}; nothing is converted: load() makes tables of the shapes that were saved"
            )


def _read_all(
    files: list[_File],
    target: Callable[[_File], Mapping[str, NDArray[Any]] | None],
    progress: bool,
    what: str,
    verify: bool = True,
) -> None:
    """Read files into what `target` gives for each, None to look only."""
    entries = [entry for file in files for entry in file.header.entries.values()]
    with _bar(sum(array_size(entry.dtype, entry.shape) for entry in entries), what, progress) as tell:
        for file in files:
            try:
                digest = read_pieces(file.opened, file.header, target(file), _check_piece, tell, verify)
            except TensorFileError as error:
                raise CheckpointError(f"{file.path} is damaged: it {error}") from error
            if verify and digest != file.record["sha256"]:
                raise CheckpointError(
                    f"{file.path} is damaged: its SHA-256 is {digest}, expected {file.record['sha256']}; go "
                    "back to an older checkpoint"
                )


def _check_piece(name: str, piece: NDArray[Any]) -> None:
    if name in ("steps", "exp_avg_sq") and (piece < 0).any():  # NaN would hide one from min()
        raise TensorFileError(f"has a negative number in {name}")


@contextmanager
def _bar(total: int, what: str, shown: bool) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda _: None
        return
    tqdm = require("tqdm", "train", "showing a bar")
    with tqdm.tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar.update
