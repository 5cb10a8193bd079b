# SPDX-License-Identifier: Apache-2.0
"""What a server's ``checkpoint_dir`` holds: what it is made of, its coordinator's folder, and its shards'."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nb_sparse_adam._src.files import write_whole
from nb_sparse_adam._src.parameter_server.spec import Config
from nb_sparse_adam.errors import OptionTypeError, ServerError

FILE = "server.json"  # a folder is that of a server when this is there
COORDINATOR = "coordinator"

Place = str | os.PathLike[str]


def shard_folder(folder: Path, number: int) -> Path:
    """Return where a shard has what it has."""
    return folder / f"shard-{number:04d}"


def path_of(name: str, given: Any) -> Path:
    """Check a path that a caller gave."""
    try:
        return Path(given).absolute()
    except TypeError as error:
        raise OptionTypeError(f"{name} is {given!r}, expected a path") from error


def read_config(folder: Path) -> Config:
    """Read what a server is made of from its folder."""
    try:
        return Config.from_json(json.loads((folder / FILE).read_bytes()))
    except FileNotFoundError:
        raise ServerError(f"{folder} is not the folder of a server: it has no {FILE}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ServerError(f"{folder / FILE} cannot be read: {error}") from error


def write_config(folder: Path, config: Config) -> None:
    """Make a folder that of a server."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, json.dumps(config.to_json(), indent=1).encode())


def is_folder(folder: Path) -> bool:
    """Say whether a folder is that of a server."""
    return (folder / FILE).exists()


def check_new(folder: Path) -> None:
    """Refuse a folder that has been used."""
    if is_folder(folder):
        name = read_config(folder).name
        raise ServerError(
            f"{folder} is the folder of a server already; go on with it by "
            f"ParameterServer.attach({name!r}, checkpoint_dir=...), or use another folder"
        )
    if any(folder.glob("shard-*")) or (folder / COORDINATOR).exists():
        raise ServerError(
            f"{folder} has shards, but no {FILE}: what is left of a restore that did not come to its end; "
            "delete the folder, or use another one"
        )
