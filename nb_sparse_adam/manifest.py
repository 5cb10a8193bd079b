"""The manifest of a checkpoint: what it holds, how it is checked, and what a caller may add to it.

``manifest.json`` names a file for each table and says what is in it, holds the optimizer's options and the
caller's ``extra``, and has a checksum of all that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nb_sparse_adam import options
from nb_sparse_adam.errors import CheckpointError

__all__ = ["FORMAT", "MANIFEST", "OURS", "VERSION", "check_extra", "digest", "read_manifest"]

FORMAT, VERSION = "nb_sparse_adam checkpoint", 1
MANIFEST = "manifest.json"
OURS = re.compile(r"table-\d+-[0-9a-f]{16}\.safetensors|\.manifest-[0-9a-f]{16}\.json")
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


def check_extra(given: Any, where: str) -> None:
    """Refuse what JSON cannot hold; `where` is what the error calls it."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}, expected str: it is kept as JSON")
            check_extra(value, f"{where}[{key!r}]")
    elif isinstance(given, (list, tuple)):
        for at, value in enumerate(given):
            check_extra(value, f"{where}[{at}]")
    elif not isinstance(given, (str, int, float, bool, type(None))):
        raise CheckpointError(
            f"{where} is a {type(given).__name__}, expected what JSON can hold: None, booleans, numbers, "
            "strings, lists and dicts of them; arrays have .tolist(), large things need files of their own"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest in a folder, and check it by its checksum, types and ranges."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: expected the folder of a checkpoint, as nb_sparse_adam.checkpoint.save "
            "writes it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, or of something else: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a checkpoint of nb_sparse_adam")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {manifest.get('version')!r}, expected {VERSION}: it was written by another "
            "version of nb_sparse_adam"
        )
    if manifest.pop("sha256", None) != digest(manifest):
        raise CheckpointError(f"{path} is damaged: its checksum is not that of its content")
    try:
        if set(manifest) != {"format", "version", "options", "tables", "extra"}:
            raise ValueError(f"it has {sorted(manifest)}")
        options.choice("step_counts", manifest["options"]["step_counts"], options.STEP_COUNTS)
        for record in manifest["tables"]:
            _check_record(record)
        for what in ("name", "file"):
            if len({record[what] for record in manifest["tables"]}) != len(manifest["tables"]):
                raise ValueError(f"a {what} is there twice")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} was not written by nb_sparse_adam.checkpoint.save: {error!r}"
        ) from error
    return manifest


def _check_record(record: Any) -> None:
    """Check what a manifest says of a table, by types and ranges."""
    if set(record) != set(_RECORD):
        raise ValueError(f"a table has {sorted(record)}")
    for key, kind in _RECORD.items():
        if type(record[key]) is not kind:
            raise ValueError(f"{key} is {record[key]!r}")
    if not OURS.fullmatch(record["file"]):
        raise ValueError(f"file is {record['file']!r}")
    if record["dtype"] not in ("float32", "float64") or record["steps"] not in ("int32", "int64"):
        raise ValueError(f"dtypes are {record['dtype']!r} and {record['steps']!r}")
    if not 0 <= record["skipped_rows"] < 2**63 or not all(type(n) is int and n >= 0 for n in record["shape"]):
        raise ValueError(f"skipped_rows is {record['skipped_rows']}, shape {record['shape']}")


def digest(manifest: Mapping[str, Any]) -> str:
    """Return the checksum of a manifest, which does not depend on the order of its entries."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
