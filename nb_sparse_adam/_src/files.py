# SPDX-License-Identifier: Apache-2.0
"""Files in folders of the user's: written whole, under names of our own; read only if they are files."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# What opening says of a loop of links, of a socket or a device that nobody serves, and of a name too long.
_NO_FILE = (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG)


class NoRegularFileError(Exception):
    """What is at a path instead of a file that holds bytes."""


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
    with tempfile.TemporaryFile(dir=path):  # has a name that no other file has, or none at all
        return path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file as a whole: beside its place, under a name that is not in use, then move it there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())  # or the name could be on the disk before what it holds
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def descriptor(path: str | os.PathLike[str], flags: int) -> Iterator[int]:
    """Open a file or a folder as `os.open` does, and close it in any case."""
    opened: list[int] = []
    try:
        opened.extend(map(os.open, [path], [flags]))  # one native call: no interrupt can lose the number
        yield opened[0]
    finally:
        for number in opened:
            os.close(number)


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a file to read, without waiting, as opening a pipe would, for a writer.

    Raises
    ------
    NoRegularFileError
        If something else is there.
    OSError
        If it cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with ExitStack() as stack:
        try:
            number = stack.enter_context(descriptor(path, flags))
        except OSError as error:
            if error.errno in _NO_FILE:
                raise NoRegularFileError(f"cannot be read: {error.strerror}") from error
            raise
        kind = stat.S_IFMT(os.fstat(number).st_mode)
        if kind != stat.S_IFREG:
            raise NoRegularFileError(f"is {_KINDS.get(kind, 'something else')}, expected a regular file")
        yield stack.enter_context(open(number, "rb", closefd=False))
