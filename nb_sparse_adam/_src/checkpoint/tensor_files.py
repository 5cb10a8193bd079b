# SPDX-License-Identifier: Apache-2.0
"""Files of named arrays in the safetensors format, written and read in pieces, so that arrays may be large.

The format (https://github.com/huggingface/safetensors#format): the length of the header as 8 bytes, little
endian; the header, JSON that gives each array its dtype, shape and place; the arrays, row by row, without
gaps. The package reads these files; it does not write arrays in pieces, which is why they are written here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

PIECE_BYTES = 32 << 20  # bytes read, hashed or written at a time
ALIGNMENT = 64  # of the first array in the file, so that it can be mapped; the format allows spaces in front
MOST_HEADER = 100 << 20  # as the package has it
_NAMES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
CODES = {dtype: name for name, dtype in _NAMES.items()}

Progress = Callable[[int], None]  # is told the number of bytes done since the last call


class PieceReader(Protocol):
    """What can be written: an array, or what gives the rows of one when they are asked for."""

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, part: Any, /) -> NDArray[Any]: ...


class TensorFileError(Exception):
    """Something is wrong with a file; the caller, who opened it, names the file."""


class StoredArray(NamedTuple):
    """An array in a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int  # in the file


def array_size(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Return the bytes of an array."""
    return int(dtype.itemsize) * math.prod(shape)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object, for `json.loads`; of keys that are there twice, readers differ."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is there twice")
    return made


def header_of(
    arrays: Iterable[tuple[str, str, Sequence[int], int]], metadata: dict[str, str]
) -> dict[str, Any]:
    """Describe arrays that lie one after the other, each by name, code of its dtype, shape and bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, code, shape, size in arrays:
        start, end = end, end + size
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    return header


def framed(header: dict[str, Any], multiple: int, separators: tuple[str, str] = (", ", ": ")) -> bytes:
    """Write a header, with its length in front, so that what follows it begins at a multiple of bytes."""
    text = json.dumps(header, separators=separators).encode()
    text += b" " * (-(8 + len(text)) % multiple)
    return len(text).to_bytes(8, "little") + text


def write_tensors(file: BinaryIO, arrays: Mapping[str, PieceReader], progress: Progress) -> str:
    """Write arrays of the dtypes in `_NAMES`, of any strides; return the SHA-256 of all that."""
    described = [
        (name, CODES[array.dtype.newbyteorder("<")], array.shape, array_size(array.dtype, array.shape))
        for name, array in arrays.items()
    ]
    head = framed(header_of(described, {"format": "np"}), ALIGNMENT, (",", ":"))
    digest = hashlib.sha256(head)
    file.write(head)
    for piece in _in_order(arrays.values()):
        file.write(piece)
        digest.update(piece)
        progress(len(piece))
    return digest.hexdigest()


def _in_order(arrays: Iterable[PieceReader]) -> Iterator[Any]:
    for array in arrays:
        whole: Any = array  # an array, if it has no rows; perhaps on a GPU
        flat = array if array.shape else whole.reshape(1)
        for rows in runs(flat.shape, flat.dtype):
            piece = np.ascontiguousarray(flat[rows], dtype=flat.dtype.newbyteorder("<"))
            if piece.size:
                yield piece.reshape(-1).view(np.uint8).data


def rows_of_size(dtype: np.dtype[Any], shape: tuple[int, ...], size: int) -> int:
    """Return how many rows of an array have so many bytes, at least one."""
    return max(1, size // max(1, array_size(dtype, shape[1:])))


def runs(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[slice]:
    """Cut an array into runs of rows of a piece each; without elements, there are none."""
    if not array_size(dtype, shape):
        return
    at_once = rows_of_size(dtype, shape, PIECE_BYTES)
    for first in range(0, shape[0], at_once):
        yield slice(first, min(first + at_once, shape[0]))


def check_header(file: BinaryIO, size: int) -> dict[str, StoredArray]:
    """Read the header of a file of a known size: where its arrays are. The file is at the first one then.

    Raises
    ------
    TensorFileError
        If it is not the header of such a file.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MOST_HEADER):
        raise TensorFileError(f"has {size} bytes, and a header of {length}")
    try:
        given = json.loads(file.read(length), object_pairs_hook=unique_keys)
        given.pop("__metadata__", None)
        entries, end = {}, 0
        for name, entry in given.items():
            dtype, shape = _NAMES[entry["dtype"]], tuple(entry["shape"])
            if not all(type(n) is int for n in shape):
                raise ValueError(f"{name} has shape {shape}")
            start = end
            end += array_size(dtype, shape)
            if min(shape, default=0) < 0 or end > size or entry["data_offsets"] != [start, end]:
                raise ValueError(f"{name} is at {entry['data_offsets']}, with shape {shape}")
            entries[name] = StoredArray(dtype, shape, 8 + length + start)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TensorFileError(f"has a header that cannot be read ({error!r})") from error
    if 8 + length + end != size:
        raise TensorFileError(f"has {size} bytes, and its header needs {8 + length + end}")
    return entries


def begins_as_written(file: BinaryIO, names: Iterable[Collection[str]]) -> bool:
    """Whether a file begins as `write_tensors` writes arrays of some of these names; it may end anywhere."""
    length = int.from_bytes(file.read(8), "little")
    if length > 64 * 1024:  # ours are far smaller
        return False
    try:
        found = set(json.loads(file.read(length)))
        return any(found == {"__metadata__", *each} for each in names)
    except (ValueError, TypeError, RecursionError):
        return False


def read_pieces(
    file: BinaryIO,
    entries: Mapping[str, StoredArray],
    into: Mapping[str, NDArray[Any] | None],
    check: Callable[[str, NDArray[Any], bytes], None],
    progress: Progress,
    whole: bool = True,
) -> str:
    """Read a file from its beginning; return its SHA-256.

    Parameters
    ----------
    file : binary file
    entries : mapping
        As `check_header` gave it, of one array or more.
    into : mapping of str to array
        What arrays of the file are copied to, in their shapes, with any strides; the others are looked at.
    check : callable
        Is given the name and each piece of an array before it is copied, and the SHA-256 of all that has
        been read so far.
    progress : callable
        Is told the number of bytes.
    whole : bool, default True
        Whether to read what is not wanted, too; without it the SHA-256 is not that of the file.

    Raises
    ------
    TensorFileError
        If the file ends too early.
    """
    digest = hashlib.sha256()
    file.seek(0)
    digest.update(read_exactly(file, min(entry.start for entry in entries.values())))
    for name, entry in entries.items():
        shape = entry.shape or (1,)
        target = into.get(name)
        if target is None and not whole:
            continue
        file.seek(entry.start)
        if target is not None and not entry.shape:
            target = target.reshape(1)
        for rows in runs(shape, entry.dtype):
            size = array_size(entry.dtype, (rows.stop - rows.start, *shape[1:]))
            piece = read_exactly(file, size)
            if whole:
                digest.update(piece)
            values = np.frombuffer(piece, entry.dtype).reshape(rows.stop - rows.start, *shape[1:])
            check(name, values, digest.digest())
            if target is not None:
                target[rows] = values
            progress(size)
    return digest.hexdigest()


def read_exactly(file: BinaryIO, size: int) -> bytes:
    """Read so many bytes; a file that ends before is refused."""
    piece = file.read(size)
    if len(piece) != size:
        raise TensorFileError(f"ends after {file.tell()} bytes")
    return piece
