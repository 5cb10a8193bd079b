# SPDX-License-Identifier: Apache-2.0
"""What a manifest says of a save of `EmbeddingTable`: made, and checked by types and ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from nb_sparse_adam._src import options
from nb_sparse_adam._src.checkpoint.tensor_files import PieceReader, array_size
from nb_sparse_adam._src.table import snapshot
from nb_sparse_adam._src.table.capture import Capture
from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam._src.table.store import MOST_ROWS

KIND = "EmbeddingTable"
ARRAYS = (*snapshot.OF_ROWS, "steps", "gone", *snapshot.OF_TABLE)  # gone: ids that had a row in the base

_NAME = re.compile(r"[0-9a-f]{16}")
_FIELDS = {"format", "version", "kind", "id", "base", "single", "tables", "extra"}
_RECORD: dict[str, type] = {
    "name": str,
    "file": str,
    "size": int,
    "sha256": str,
    "table": str,
    "rows": int,
    "gone": int,
    "ages": int,
    "steps": str,
    "made": dict,
    "options": dict,
    "numbers": dict,
}


class Moment:
    """A table at one moment, at which nobody writes to it: what its file holds, and a manifest says.

    Parameters
    ----------
    table : EmbeddingTable
    base : str, optional
        Only the rows that were touched since this save, which the table knows, and the ids that have gone.
    """

    def __init__(self, table: EmbeddingTable, base: str | None) -> None:
        since = None if base is None else table._history.clock_of(base)
        self._gone = [] if since is None else table._history.gone_since(since)
        self._name, self._made = table._history.table, snapshot.made_of(table)
        self._options, self._numbers = snapshot.options_of(table), snapshot.numbers_of(table)
        self._capture = Capture(table, since)  # last: without it nothing is kept aside

    def arrays(self) -> dict[str, PieceReader]:
        """Give what is saved, to be read piece by piece while the table goes on."""
        arrays = self._capture.arrays()
        gone = np.unique(np.concatenate([np.empty(0, np.int64), *self._gone]))
        # Others have come back, and are touched.
        arrays["gone"] = np.setdiff1d(gone, arrays["ids"][:], assume_unique=True)
        return {name: arrays[name] for name in ARRAYS}

    def described(self, arrays: Mapping[str, PieceReader]) -> dict[str, Any]:
        """Say what a table's file holds, and what a table is made of that goes on from it."""
        return described(self._name, self._made, self._options, self._numbers, arrays)

    def close(self) -> None:
        """Let go of it: the table keeps nothing aside for it any more."""
        self._capture.close()


def described(
    name: str,
    made: Mapping[str, Any],
    options_of: Mapping[str, Any],
    numbers: Mapping[str, int],
    arrays: Mapping[str, PieceReader],
) -> dict[str, Any]:
    """Say of a table of that name what it is made of, and what its file holds."""
    if callable(made["initializer"]):
        made = {**made, "initializer": None}
    return {
        "table": name,
        "rows": arrays["ids"].shape[0],
        "gone": arrays["gone"].shape[0],
        "ages": arrays["ages_clock"].shape[0],
        "steps": arrays["steps"].dtype.name,
        "made": {name: _plain(value) for name, value in made.items()},
        "options": {name: _plain(value) for name, value in options_of.items()},
        "numbers": dict(numbers),
    }


def _plain(value: Any) -> Any:
    """Give an option as JSON holds it."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


def shapes(record: dict[str, Any]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return dtypes and shapes of the arrays in a table's file."""
    made = record["made"]
    counted = type(made["admission"]) is int and made["admission"] > 1
    found = snapshot.shapes(
        made["dim"], made["dtype"], record["options"]["step_counts"], record["rows"], record["steps"],
        made["admission_bytes"] // 4 * 4 if counted else 0, record["ages"],
    )  # fmt: skip
    return {**found, "gone": (np.dtype(np.int64), (record["gone"],))}


def bytes_of(record: dict[str, Any]) -> int:
    """Return how many bytes a table's arrays have."""
    return sum(array_size(*each) for each in shapes(record).values())


def check_tables(manifest: dict[str, Any]) -> None:
    """Check what a manifest says, by types and ranges.

    Raises
    ------
    KeyError, TypeError, ValueError
        For what no save has written.
    """
    if set(manifest) != _FIELDS or manifest["kind"] != KIND:
        raise ValueError(f"it has {sorted(manifest)}, of kind {manifest['kind']!r}")
    _check_name("id", manifest["id"])
    if manifest["base"] is not None:
        _check_name("base", manifest["base"])
    if type(manifest["single"]) is not bool:
        raise ValueError(f"single is {manifest['single']!r}")
    for record in manifest["tables"]:
        _check_record(record)
        if record["gone"] and manifest["base"] is None:
            raise ValueError("ids have gone since no base")
    if manifest["single"] and len(manifest["tables"]) != 1:
        raise ValueError(f"single is True, with {len(manifest['tables'])} tables")
    if len({record["table"] for record in manifest["tables"]}) != len(manifest["tables"]):
        raise ValueError("a table is there twice")


def check_types(record: Any, kinds: Mapping[str, type]) -> None:
    """Check what a manifest says of a table, by the types of its entries."""
    if set(record) != set(kinds):
        raise ValueError(f"a table has {sorted(record)}")
    for key, kind in kinds.items():
        if type(record[key]) is not kind:
            raise ValueError(f"{key} is {record[key]!r}")


def _check_name(what: str, given: Any) -> None:
    if not isinstance(given, str) or not _NAME.fullmatch(given):
        raise ValueError(f"{what} is {given!r}, expected 16 hexadecimal digits")


def _check_record(record: Any) -> None:
    """Check what is there for `shapes`; options are checked when a table is made of them."""
    check_types(record, _RECORD)
    _check_name("table", record["table"])
    made = record["made"]
    if set(made) != set(snapshot.MADE):
        raise ValueError(f"a table has made {sorted(made)}")
    snapshot.check_numbers(record["numbers"])
    options.choice("step_counts", record["options"]["step_counts"], options.STEP_COUNTS)
    if made["dtype"] not in ("float32", "float64") or record["steps"] not in ("int32", "int64"):
        raise ValueError(f"dtypes are {made['dtype']!r} and {record['steps']!r}")
    bounds = {
        "dim": (made["dim"], 1, 1 << 20),
        "admission_bytes": (made["admission_bytes"], 64, 1 << 40),
        "rows": (record["rows"], 0, MOST_ROWS),
        "gone": (record["gone"], 0, 1 << 40),
        "ages": (record["ages"], 0, 1 << 20),
        "capacity": (1 if made["capacity"] is None else made["capacity"], 1, MOST_ROWS),
    }
    for name, (number, least, most) in bounds.items():
        if type(number) is not int or not least <= number <= most:
            raise ValueError(f"{name} is {number!r}, expected {least} <= {name} <= {most}")
    if type(made["eviction"]) is not list or len(made["eviction"]) != 5:
        raise ValueError(f"eviction is {made['eviction']!r}, expected five numbers")
    if type(made["name"]) is not str:
        raise ValueError(f"name is {made['name']!r}")
    if made["initializer"] is not None and type(made["initializer"]) is not str:
        raise ValueError(f"initializer is {made['initializer']!r}, expected a string or null")
