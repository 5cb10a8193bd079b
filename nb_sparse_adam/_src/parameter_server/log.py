# SPDX-License-Identifier: Apache-2.0
"""A write-ahead log: what was acknowledged is on the disk, in order, each record whole or not there.

A folder has files ``log-N``, where N is the number of the first record in the file. A record is a head of 32
bytes and what it holds, bytes that this module knows nothing of:

======  =======  ========================================================================
offset  type     what
======  =======  ========================================================================
0       4 bytes  ``NSAL``
4       uint32   CRC-32 of what the record holds
8       uint64   its number: one more than that of the record before, over all files
16      uint64   how many bytes it holds
24      uint32   CRC-32 of the 24 bytes before
28      uint32   0
======  =======  ========================================================================

All numbers are little-endian. Where a process dies, the last file may end within a record: that one was never
acknowledged, and is cut off when the log is opened again. A record that is damaged and has others behind it,
or is missing, is refused: what comes after it would be applied to something else.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nb_sparse_adam._src.files import descriptor
from nb_sparse_adam.errors import LogError

MAGIC = b"NSAL"
_HEAD = struct.Struct("<4sIQQ")
_REST = struct.Struct("<II")
HEAD_BYTES = _HEAD.size + _REST.size


_TRIES = 3

POINTS = ("before a record is written", "within a record", "a record is written")


def _reached(point: str) -> None:
    """Do nothing: tests replace it by something that ends the process here."""


class Record(NamedTuple):
    """What a log holds.

    Attributes
    ----------
    number : int
    content : bytes
    end : int
        Where it ends in its file.
    """

    number: int
    content: bytes
    end: int


class Log:
    """A log that is written to, by any number of threads of one process.

    Parameters
    ----------
    folder : Path
        Made if need be. No other process writes there meanwhile: that is for the caller to see to.
    first : int, default 0
        The number of the first record, of a log that is new.

    Raises
    ------
    LogError
        As `records`.
    OSError
        If the folder cannot be read or written.
    """

    def __init__(self, folder: Path, first: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._writing = threading.Lock()  # held while a record is written
        self._disk = threading.Condition()  # of what is said in the next three lines
        self._syncing = False
        self._failure: str | None = None  # why nothing can be written any more
        self._on_disk = self._next = first  # records before this one are
        self._file, self._size = -1, 0
        files = files_of(folder)
        if files:
            begin, path = files[-1]
            for record in _of_file(path, begin, following=None):
                self._next, self._size = record.number + 1, record.end
            self._next = max(self._next, begin)
            os.truncate(path, self._size)  # what is behind it was never acknowledged
            self._file = _open(path)
            os.fsync(self._file)
            if self._next < first:  # a snapshot has what is missing: the next record begins a file
                os.close(self._file)
                self._file, self._next = -1, first
            self._on_disk = self._next

    @property
    def next(self) -> int:
        """The number that the next record will have."""
        return self._next

    def append(self, *parts: bytes | memoryview) -> int:
        """Write a record, and return its number; `wait_for` says when it is on the disk.

        Parameters
        ----------
        *parts : bytes-like
            What it holds, one after the other. None of them is copied.

        Raises
        ------
        OSError
            If it cannot be written, as on a full disk. Nothing of it is there then.
        LogError
            If the log could not be written to, or the disk has failed, since it was opened.
        """
        with self._writing:
            self._check()
            number = self._next
            if self._file < 0:
                self._file, self._size = self._begin(number), 0
            head = head_of(number, parts)
            _reached("before a record is written")
            try:
                _write(self._file, head)
                _reached("within a record")
                for part in parts:
                    _write(self._file, part)
            except OSError:
                self._take_back()
                raise
            self._size += len(head) + _length(parts)
            self._next = number + 1
            _reached("a record is written")
            return number

    def wait_for(self, number: int) -> None:
        """Wait until a record is on the disk. One thread has the disk write what all of them wait for.

        Raises
        ------
        LogError
            If the disk has failed. What it has of the records since the last success, nobody knows.
        """
        while True:
            with self._disk:
                while self._syncing and self._on_disk <= number:
                    self._disk.wait()
                if self._on_disk > number:
                    return
                self._check()
                self._syncing = True
            with self._writing:
                file, written = self._file, self._next
            failure = None
            try:
                os.fsync(file)
            except OSError as error:
                # Not to be tried again: a system drops what it could not write, and says that all is well.
                failure = f"{self._folder} could not be written to the disk ({error.strerror})"
            with self._disk:
                self._syncing = False
                self._failure = failure or self._failure
                if failure is None:
                    self._on_disk = max(self._on_disk, written)
                self._disk.notify_all()

    def begin_file(self) -> int:
        """Have the next record begin a new file; return its number. Those before it are on the disk then."""
        for _ in range(_TRIES):
            number = self._next
            self._flush(number)
            with self._writing:
                if self._next == number:  # nobody has written meanwhile
                    self._close()
                    return number
        with self._writing:  # somebody always has: others wait for the disk this time
            self._check()
            try:
                os.fsync(self._file)
            except OSError as error:
                self._failure = f"{self._folder} could not be written to the disk ({error.strerror})"
                self._check()
            with self._disk:
                self._on_disk = self._next
                self._disk.notify_all()
            self._close()
            return self._next

    def forget(self, number: int) -> None:
        """Delete files all of whose records come before a number: a snapshot has what they hold."""
        files = files_of(self._folder)
        for at, (_, path) in enumerate(files[:-1]):
            if files[at + 1][0] <= number:
                path.unlink()

    def close(self) -> None:
        """Close the file. What was written is on the disk then."""
        self._flush(self._next)
        with self._writing:
            self._close()

    def _flush(self, number: int) -> None:
        if number > self._on_disk:
            self.wait_for(number - 1)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _begin(self, number: int) -> int:
        file = _open(self._folder / f"log-{number:020d}")
        with descriptor(self._folder, os.O_RDONLY) as folder:
            os.fsync(folder)  # so that the file has its name after a crash
        return file

    def _check(self) -> None:
        if self._failure is not None:
            raise LogError(
                f"{self._failure}: nothing more is logged; mend the disk and open the log again, which has "
                "what was acknowledged"
            )

    def _take_back(self) -> None:
        """Cut off what was written of a record."""
        try:
            os.ftruncate(self._file, self._size)
        except OSError as error:
            self._failure = f"{self._folder}: half a record could not be taken back ({error.strerror})"


def head_of(number: int, parts: Sequence[bytes | memoryview]) -> bytes:
    """Return the head of a record that consists of parts."""
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    head = _HEAD.pack(MAGIC, checksum, number, _length(parts))
    return head + _REST.pack(zlib.crc32(head), 0)


def _length(parts: Sequence[bytes | memoryview]) -> int:
    return sum(memoryview(part).nbytes for part in parts)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)


def _write(file: int, data: bytes | memoryview) -> None:
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(file, left) :]


# --- reading ----------------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[tuple[int, Path]]:
    """Return, in their order, the number of each file's first record, and its path."""
    return sorted((int(path.name[4:]), path) for path in folder.glob("log-*") if path.name[4:].isdigit())


def records(folder: Path, since: int) -> Iterator[Record]:
    """Read the records of a log from a number on, but for one at the very end that is not whole.

    Raises
    ------
    LogError
        If one is damaged that has others behind it, or is missing.
    """
    files = files_of(folder)
    if files and files[0][0] > since:
        raise LogError(
            f"{folder}: the log begins with record {files[0][0]:,}, expected {since:,} or one before it: "
            "files are missing; bring them back"
        )
    for at, (begin, path) in enumerate(files):
        following = files[at + 1][0] if at + 1 < len(files) else None
        if following is None or following > since:
            for record in _of_file(path, begin, following):
                if record.number >= since:
                    yield record


def _of_file(path: Path, begin: int, following: int | None) -> Iterator[Record]:
    """Read the records of a file; the next file, if there is one, begins with the number `following`."""
    number = begin
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > 0:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                at = 0
                while (content := _content(data, at, number)) is not None:
                    at += HEAD_BYTES + len(content)
                    yield Record(number, content, at)
                    number += 1
                if at < size and (following is not None or _is_followed(data, at + 1, number)):
                    raise LogError(
                        f"{path}: record {number:,}, at byte {at:,}, is damaged and has others behind it, "
                        "which cannot be applied without it; bring the file back from a copy"
                    )
    if following is not None and number != following:
        raise LogError(
            f"{path}: ends before record {number:,}, expected {following:,}, with which the next file "
            "begins: records are missing; bring the file back from a copy"
        )


def _head_at(data: mmap.mmap, at: int) -> tuple[int, int, int] | None:
    """Return checksum, number and length of the record that begins at a place, if one does."""
    if at + HEAD_BYTES > len(data):
        return None
    head = data[at : at + _HEAD.size]
    magic, checksum, number, length = _HEAD.unpack(head)
    rest = _REST.unpack(data[at + _HEAD.size : at + HEAD_BYTES])
    return (checksum, number, length) if magic == MAGIC and rest == (zlib.crc32(head), 0) else None


def _content(data: mmap.mmap, at: int, number: int) -> bytes | None:
    """Return what a record holds that begins at a place, if it is whole and has a number."""
    head = _head_at(data, at)
    if head is None or head[1] != number:
        return None
    content = data[at + HEAD_BYTES : at + HEAD_BYTES + head[2]]
    return content if len(content) == head[2] and zlib.crc32(content) == head[0] else None


def _is_followed(data: mmap.mmap, at: int, number: int) -> bool:
    """Say whether a whole record with a later number begins at a place or after it."""
    while (at := data.find(MAGIC, at)) >= 0:
        head = _head_at(data, at)
        if head is not None and head[1] > number and _content(data, at, head[1]) is not None:
            return True
        at += 1
    return False
