# SPDX-License-Identifier: Apache-2.0
"""Compressed files, unpacked as they are read."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nb_sparse_adam._src.extras import require
from nb_sparse_adam.errors import InteractionsError

_GZIP = b"\x1f\x8b"
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
_PIECE = 1 << 10  # bytes to unpack at a time: few, for Zstandard makes up to 32,000 bytes of one


@contextmanager
def unpacked(name: str, stream: Any, magic: bytes) -> Iterator[Any]:
    """Give what is in a stream that begins with these four bytes, to be peeked into.

    Raises
    ------
    EOFError, OSError, zlib.error
        While it is read, if the stream is cut off or damaged.
    InteractionsError
        The same, of Zstandard.
    MissingExtraError
        If it is Zstandard and zstandard is not installed.
    """
    if magic.startswith(_GZIP):
        with gzip.GzipFile(fileobj=stream) as file:
            yield file
    elif magic == _ZSTANDARD:
        zstandard = require("zstandard", "train", f"reading {name}")
        try:
            yield io.BufferedReader(_Zstandard(zstandard, stream))
        except zstandard.ZstdError as error:
            raise InteractionsError(f"{name}: cannot be read: {error}") from error
    else:
        yield stream


class _Zstandard(io.RawIOBase):
    """The content of all frames; zstandard's own reader takes one that is cut off for the end."""

    def __init__(self, zstandard: Any, stream: Any) -> None:
        self._decompressor = zstandard.ZstdDecompressor()
        self._stream = stream
        self._frame = self._decompressor.decompressobj()
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            rest = b""
            if self._frame.eof:
                rest = self._frame.unused_data
                self._frame, self._begun = self._decompressor.decompressobj(), False
            piece = rest or self._stream.read(_PIECE)
            if not piece:
                if self._begun:
                    raise EOFError("it ended before the end of a Zstandard frame")
                return 0
            self._begun = True
            self._ready = memoryview(self._frame.decompress(piece))
        taken = min(len(buffer), len(self._ready))
        buffer[:taken] = self._ready[:taken]
        self._ready = self._ready[taken:]
        return taken
