# SPDX-License-Identifier: Apache-2.0
"""What a state dict or a pickle of `SparseAdam` holds, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from nb_sparse_adam._src.engine.state import STATE_VERSION
from nb_sparse_adam._src.options import check_part
from nb_sparse_adam.errors import StateError, StateTypeError


def check_state_dict(given: Any, tables: Collection[str]) -> tuple[Any, Mapping[str, Any]]:
    """Check a state dict for tables of these names; return its options and its tables."""
    if not isinstance(given, Mapping):
        raise StateTypeError(f"got {type(given).__name__}, expected the mapping that state_dict() returns")
    keys = {"version", "options", "tables"}
    if set(given) != keys:
        raise StateError(f"state dict has keys {sorted(map(str, given))}, expected {sorted(keys)}")
    version = given["version"]
    is_number = isinstance(version, (int, float, np.number, np.ndarray)) and not isinstance(version, bool)
    if not is_number or np.ndim(version) or version != STATE_VERSION:
        raise StateError(
            f"state dict has version {version!r}, expected {STATE_VERSION}: it was written by "
            "another version of nb_sparse_adam"
        )
    check_part("tables", "is for tables", given["tables"], tables)
    return given["options"], given["tables"]
