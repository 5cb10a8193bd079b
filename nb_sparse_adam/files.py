"""Writing results: folders that are known to be writeable, files that are never seen half written."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

__all__ = ["prepare_folder", "write_whole"]


def prepare_folder(folder: str | os.PathLike[str]) -> Path:
    """Create a folder if need be, and check that files can be written there.

    Better to learn now than after the work that nothing can be kept.

    Raises
    ------
    OSError
        If it cannot be created or written to.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):  # has a name that is nobody's, or none at all
        return path


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in its place, whole: written beside it under a name that is nobody's, then moved there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as opened:
            opened.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
