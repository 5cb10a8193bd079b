# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: what it holds, how it is checked, and what a caller may add to it.

``manifest.json`` names a file for each table and says what is in it, holds the optimizer's options and the
caller's ``extra``, and has a checksum of all that. One of `EmbeddingTable` says so (`table_manifest`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nb_sparse_adam._src import options
from nb_sparse_adam._src.checkpoint import table_manifest
from nb_sparse_adam._src.checkpoint.tensor_files import array_size, begins_as_written, unique_keys
from nb_sparse_adam._src.files import NoRegularFileError, open_regular
from nb_sparse_adam.errors import CheckpointError

FORMAT, VERSION = "nb_sparse_adam checkpoint", 1
MANIFEST = "manifest.json"
ARRAYS = ("param", "exp_avg", "exp_avg_sq", "steps")  # of a table's file
_OURS = re.compile(r"table-\d+-[0-9a-f]{16}\.safetensors|\.manifest-[0-9a-f]{16}\.json")
_BEGINNING = re.compile(rb'\s*\{\s*"format"\s*:\s*"' + FORMAT.encode() + b'"')
_RECORD: dict[str, type] = {
    "name": str,
    "file": str,
    "size": int,
    "sha256": str,
    "shape": list,
    "dtype": str,
    "steps": str,
    "skipped_rows": int,
}


def check_extra(given: Any) -> None:
    """Refuse what would not come back from JSON, but for tuples, which do as lists."""
    try:
        _check_extra(given, "extra")
        _write({"extra": given})
    except CheckpointError:
        raise
    except (RecursionError, ValueError) as error:  # it contains itself, or an integer is too long to write
        raise CheckpointError(f"extra cannot be kept as JSON: {error}") from error


def content(head: Mapping[str, Any], tables: list[dict[str, Any]], extra: Any) -> bytes:
    """Make the content of the file; ``head`` is what comes before the tables."""
    manifest = {"format": FORMAT, "version": VERSION, **head, "tables": tables, "extra": extra}
    return _write({**manifest, "sha256": digest(manifest)})


def _write(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, allow_nan=False).encode()


def _check_extra(given: Any, where: str) -> None:
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}, expected str: it is kept as JSON")
            _check_text(key, f"{where} has the key")
            _check_extra(value, f"{where}[{key!r}]")
    elif isinstance(given, (list, tuple)):
        for i, value in enumerate(given):
            _check_extra(value, f"{where}[{i}]")
    elif isinstance(given, float):
        if not math.isfinite(given):
            raise CheckpointError(
                f"{where} is {given!r}, expected a finite number: JSON has no other. Keep None or a string "
                "in its place"
            )
    elif isinstance(given, str):
        _check_text(given, f"{where} is")
    elif not isinstance(given, (int, bool, type(None))):
        raise CheckpointError(
            f"{where} is a {type(given).__name__}, expected what JSON can hold: None, booleans, numbers, "
            "strings, lists and dicts of them; arrays have .tolist(), large things need files of their own"
        )


def _check_text(text: str, what: str) -> None:
    """Refuse text that comes back as another: two halves of a character, which JSON joins."""
    if not text.isascii() and json.loads(json.dumps(text)) != text:
        raise CheckpointError(f"{what} {text!r}, which JSON cannot hold: its surrogates would be joined")


# --- reading ----------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest in a folder, and check it by its checksum, types and ranges.

    Raises
    ------
    CheckpointError
        If it is missing, damaged, or no manifest of ours.
    """
    path = folder / MANIFEST
    try:
        with open_regular(path) as opened:
            manifest = _parse(opened.read())
        digested = digest({key: manifest[key] for key in manifest if key != "sha256"})
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} is missing: expected the folder of a checkpoint, as nb_sparse_adam.checkpoint.save "
            "writes it"
        ) from error
    except NoRegularFileError as error:
        raise CheckpointError(f"{path} {error}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path} is damaged, or of something else: {error}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a checkpoint of nb_sparse_adam")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {manifest.get('version')!r}, expected {VERSION}: it was written by another "
            "version of nb_sparse_adam"
        )
    if manifest.pop("sha256", None) != digested:
        raise CheckpointError(f"{path} is damaged: its checksum is not that of its content")
    try:
        _check(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} was not written by nb_sparse_adam.checkpoint.save: {error!r}"
        ) from error
    return manifest


def _parse(content: bytes) -> dict[str, Any]:
    """Make a dict of a manifest's content: {} of JSON that is of something else."""
    given = json.loads(content, object_pairs_hook=unique_keys)
    return given if isinstance(given, dict) else {}


def _check(manifest: dict[str, Any]) -> None:
    """Check what a manifest says, by types and ranges."""
    if type(manifest["tables"]) is not list or not manifest["tables"]:
        raise ValueError(f"tables is {manifest['tables']!r}, expected one table or more")
    if "kind" in manifest:
        table_manifest.check_tables(manifest)
    else:
        _check_optimizer(manifest)
    for record in manifest["tables"]:
        if not _OURS.fullmatch(record["file"]):
            raise ValueError(f"file is {record['file']!r}")
    for what in ("name", "file"):
        if len({record[what] for record in manifest["tables"]}) != len(manifest["tables"]):
            raise ValueError(f"a {what} is there twice")


def _check_optimizer(manifest: dict[str, Any]) -> None:
    """Check what a manifest says of an optimizer."""
    if set(manifest) != {"format", "version", "options", "tables", "extra"}:
        raise ValueError(f"it has {sorted(manifest)}")
    options.choice("step_counts", manifest["options"]["step_counts"], options.STEP_COUNTS)
    for record in manifest["tables"]:
        _check_record(record)


def _check_record(record: Any) -> None:
    """Check what a manifest says of a table."""
    table_manifest.check_types(record, _RECORD)
    if record["dtype"] not in ("float32", "float64") or record["steps"] not in ("int32", "int64"):
        raise ValueError(f"dtypes are {record['dtype']!r} and {record['steps']!r}")
    if not 0 <= record["skipped_rows"] < 2**63:
        raise ValueError(f"skipped_rows is {record['skipped_rows']}")
    shape = record["shape"]
    if len(shape) not in (1, 2) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"shape is {shape}, expected (rows, dim) or (n,)")
    size = array_size(np.dtype(record["dtype"]), tuple(max(n, 1) for n in shape))
    if 2 * size > sys.maxsize:  # NumPy counts so even where one length is 0; a row's two moments lie together
        raise ValueError(f"shape is {shape}, which no table can have")


def digest(manifest: Mapping[str, Any]) -> str:
    """Return the checksum of a manifest, which does not depend on the order of its entries."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# --- whose it is ------------------------------------------------------------------------------------------


def refuse_foreign(folder: Path) -> None:
    """Refuse to save where somebody else's manifest is; a damaged one of ours may be replaced.

    Raises
    ------
    CheckpointError
        If what is called ``manifest.json`` there was not written by `checkpoint.save`.
    """
    path = folder / MANIFEST
    try:
        with open_regular(path) as opened:
            content = opened.read()
    except FileNotFoundError:
        if not os.path.lexists(path):
            return
        found = "is a link to something that is not there"
    except NoRegularFileError as error:
        found = str(error)
    else:
        try:
            if _parse(content).get("format") == FORMAT:
                return
        except (ValueError, RecursionError):
            if _begins_as_manifest(content):
                return
        found = "is not of a checkpoint"
    raise CheckpointError(
        f"{path} {found}, and is not replaced: save into another folder, or move it out of the way"
    )


def old_files(folder: Path, kept: Collection[str]) -> Iterator[Path]:
    """Find the files that a save wrote there, but for those to be kept; it may not have come to its end."""
    for name in os.listdir(folder):
        if _OURS.fullmatch(name) and name not in kept:
            with contextlib.suppress(OSError, NoRegularFileError):
                if _is_ours(folder / name):
                    yield folder / name


def _is_ours(file: Path) -> bool:
    """Whether a file that is called as ours are was written by a save."""
    with open_regular(file) as opened:
        if not opened.peek(1):
            return True  # begun, or somebody else's without content: no loss
        if file.suffix == ".json":
            return _begins_as_manifest(opened.read(100))
        return begins_as_written(opened, (ARRAYS, table_manifest.ARRAYS))


def _begins_as_manifest(content: bytes) -> bool:
    """Whether a file may be a manifest of ours that is damaged; one of nothing but zeros is no loss."""
    return _BEGINNING.match(content) is not None or not content.strip(b"\0")
