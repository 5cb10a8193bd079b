# SPDX-License-Identifier: Apache-2.0
"""What a record of the log holds: a few plain values, and arrays; in the safetensors format."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.checkpoint.tensor_files import (
    ALIGNMENT,
    CODES,
    TensorFileError,
    check_header,
    framed,
    header_of,
)

_HEAD = "record"  # the array that holds the plain values, as JSON


def encode(head: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> list[bytes | memoryview]:
    """Write values and arrays; arrays that are contiguous are not copied."""
    plain = np.frombuffer(json.dumps(head).encode(), np.uint8)
    every = {name: np.ascontiguousarray(array) for name, array in {_HEAD: plain, **arrays}.items()}
    header = header_of(
        ((name, CODES[array.dtype], array.shape, array.nbytes) for name, array in every.items()), {}
    )
    data = [array.reshape(-1).view(np.uint8).data for array in every.values()]
    return [framed(header, ALIGNMENT, (",", ":")), *data]


def decode(content: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read what `encode` wrote; the arrays are read-only.

    Raises
    ------
    ValueError
        If it is nothing of that kind.
    """
    try:
        entries = check_header(io.BytesIO(content), len(content))
    except TensorFileError as error:
        raise ValueError(f"it {error}") from error
    arrays = {
        name: np.frombuffer(content, entry.dtype, int(np.prod(entry.shape)), entry.start).reshape(entry.shape)
        for name, entry in entries.items()
    }
    return json.loads(arrays.pop(_HEAD).tobytes()), arrays
