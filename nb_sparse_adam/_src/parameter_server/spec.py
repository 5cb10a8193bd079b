# SPDX-License-Identifier: Apache-2.0
"""What tables a parameter server has, and how it keeps them; all of it can be written as JSON."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from nb_sparse_adam._src import options
from nb_sparse_adam._src.naming import type_name
from nb_sparse_adam._src.parameter_server.routing import BUCKETS
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.table.checks import whole
from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam._src.table.eviction import Eviction
from nb_sparse_adam.errors import OptionError, OptionTypeError

_OPTIONS = tuple(name for name in inspect.signature(EmbeddingTable).parameters if name not in ("dim", "name"))

MOST_WORKERS = 512  # each may wait in a thread of the coordinator's, which has twice as many

Durability = Literal["snapshot", "log"]


@public("nb_sparse_adam.parameter_server")
class TableSpec:
    """What a table of a parameter server is made of.

    Parameters
    ----------
    dim : int
        Numbers of a row.
    **options
        Those of `EmbeddingTable`, but for ``name``, which the server gives, and these:

        * ``capacity`` is that of each shard. A shard that is full refuses pushes with new ids, unless
          ``eviction`` has ``when_full``.
        * ``admission_bytes`` are those of each shard, too.
        * ``eviction`` by age goes on in the background, some rows a second, whatever ``rows_a_step`` is; a
          step, in the words of `Eviction`, is a push.
        * ``missing`` is "drop", for a push gives rows to ids that have none (as ``admission`` says).
        * ``initializer`` is a string, and there is no ``state_dir``: a shard makes its tables anew, from
          what is in its folder.
        * ``num_threads`` is, by default, the number of CPUs of a shard, at least 1.

    Raises
    ------
    OptionError
        For an option outside its domain, or one that cannot be.

    Examples
    --------
    >>> TableSpec(dim=64, lr=1e-3)
    TableSpec(dim=64, lr=0.001)
    """

    __slots__ = ("dim", "options")

    def __init__(self, dim: int, **options: Any) -> None:
        for name in options:
            if name not in _OPTIONS:
                raise OptionError(
                    f"TableSpec got {name!r}, expected options of EmbeddingTable, some of "
                    f"{', '.join(_OPTIONS)}"
                )
        if options.get("state_dir") is not None:
            raise OptionError(
                "TableSpec got state_dir, expected none: shards may be on any machine, and make their tables "
                "from the server's checkpoint_dir"
            )
        if options.get("missing", "drop") != "drop":
            raise OptionError(
                f"TableSpec got missing={options['missing']!r}, expected 'drop': a push gives rows to ids "
                "that have none, and what an id gets that is not admitted yet is left out"
            )
        if callable(options.get("initializer")):
            raise OptionError(
                "TableSpec got a function as initializer, expected a string: a shard that starts again "
                "reads it from a file, which holds no functions"
            )
        self.dim = dim
        self.options = {name: options[name] for name in _OPTIONS if name in options}
        self.make("table")

    def __repr__(self) -> str:
        given = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"TableSpec(dim={self.dim}{given})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TableSpec) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def make(self, name: str, num_threads: int | None = None, by_age: bool = True) -> EmbeddingTable:
        """Make a table, which uses so many threads if the options say nothing else."""
        given: dict[str, Any] = {"num_threads": num_threads, **self.options, "name": name}
        if not by_age and given.get("eviction") is not None:
            given["eviction"] = Eviction(when_full=given["eviction"].when_full)
        return EmbeddingTable(self.dim, **given)

    def to_json(self) -> dict[str, Any]:
        """Give what it is made of, as JSON holds it."""
        plain = {name: _plain(value) for name, value in self.options.items()}
        return {"dim": int(self.dim), **plain}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> TableSpec:
        """Make what `to_json` gave, or what a file of TOML says: of ``eviction`` a table by itself."""
        if not isinstance(given, Mapping):
            raise OptionTypeError(f"the spec of a table is {type_name(given)}, expected a mapping with dim")
        values = dict(given)
        if "dim" not in values:
            raise OptionError(f"the spec of a table has {sorted(values)}, expected dim among them")
        if isinstance(values.get("betas"), list):
            values["betas"] = tuple(values["betas"])
        if isinstance(values.get("eviction"), Mapping):
            unknown = set(values["eviction"]) - set(Eviction._fields)
            if unknown:
                raise OptionError(
                    f"eviction has {sorted(unknown)}, expected some of {', '.join(Eviction._fields)}"
                )
            values["eviction"] = Eviction(**values["eviction"])
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Eviction):
        return {name: each for name, each in value._asdict().items() if each is not None}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (type, np.dtype)):
        return np.dtype(value).name
    return value


class Config(NamedTuple):
    """All that a server is made of.

    Attributes
    ----------
    name : str
    tables : dict of str to TableSpec
    shards : int
    durability : {"snapshot", "log"}
    interval : float
        Seconds between snapshots.
    consistency : "async", "sync" or int
        The last one: so many steps a worker may be ahead.
    workers : int or None
    step_timeout : float
        Seconds.
    cpus_per_shard : float
    """

    name: str
    tables: dict[str, TableSpec]
    shards: int
    durability: str
    interval: float
    consistency: str | int
    workers: int | None
    step_timeout: float
    cpus_per_shard: float

    @property
    def threads(self) -> int:
        """Threads of a shard's tables."""
        return max(1, int(self.cpus_per_shard))

    def to_json(self) -> dict[str, Any]:
        """Give all of it, as JSON holds it."""
        return {**self._asdict(), "tables": {name: spec.to_json() for name, spec in self.tables.items()}}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Config:
        """Make what `to_json` gave."""
        tables = {name: TableSpec.from_json(spec) for name, spec in given["tables"].items()}
        return cls(**{**given, "tables": tables})


def check_config(
    name: Any, tables: Any, shards: Any, durability: Any, interval: Any, consistency: Any, workers: Any,
    step_timeout: Any, cpus_per_shard: Any,
) -> Config:  # fmt: skip
    """Check what a user wants."""
    if not isinstance(name, str):
        raise OptionTypeError(f"name is {name!r} ({type(name).__name__}), expected a string")
    if not name or not all(each.isalnum() or each in "._-" for each in name):
        raise OptionError(f"name is {name!r}, expected letters, digits, '.', '_' and '-'")
    if not isinstance(tables, Mapping) or not tables:
        raise OptionTypeError(f"tables is {tables!r}, expected a mapping of names to TableSpecs")
    for key, spec in tables.items():
        if not isinstance(key, str) or not isinstance(spec, TableSpec):
            raise OptionTypeError(f"tables has {key!r}: {type_name(spec)}, expected names and TableSpecs")
    if isinstance(consistency, (tuple, list)) and len(consistency) == 2 and consistency[0] == "bounded":
        consistency = whole("consistency: bounded by", consistency[1], 0, 2**31)
    elif consistency not in ("async", "sync") or not isinstance(consistency, str):
        raise OptionError(
            f"consistency is {consistency!r}, expected 'async', 'sync' or ('bounded', k), where k is by how "
            "many steps a worker may be ahead of the slowest one"
        )
    if workers is not None:
        workers = whole("workers", workers, 1, MOST_WORKERS)
    if consistency == "sync" and workers is None:
        raise OptionError(
            "consistency is 'sync' without workers, expected their number: a step is the sum over all of them"
        )
    if consistency == "async" and workers is not None:
        raise OptionError(
            f"workers is {workers}, expected None: with consistency 'async' any number may come"
        )
    return Config(
        name,
        dict(tables),
        whole("shards", shards, 1, BUCKETS),
        options.choice("durability", durability, ("snapshot", "log")),
        _seconds("snapshot_interval", interval),
        consistency,
        workers,
        _seconds("step_timeout", step_timeout),
        _cpus(cpus_per_shard),
    )


def _seconds(name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise OptionTypeError(f"{name} is {given!r} ({type(given).__name__}), expected seconds")
    if not 0 < given < math.inf:
        raise OptionError(f"{name} is {given}, expected 0 < seconds < inf")
    return float(given)


def _cpus(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise OptionTypeError(f"cpus_per_shard is {given!r} ({type(given).__name__}), expected a number")
    if not 0 <= given < math.inf:
        raise OptionError(f"cpus_per_shard is {given}, expected 0 <= cpus < inf")
    return float(given)
