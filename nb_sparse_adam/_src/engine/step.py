# SPDX-License-Identifier: Apache-2.0
"""A step of the host as its kernels see it."""

from __future__ import annotations

from typing import Any, NamedTuple

from nb_sparse_adam._src.engine.compile import jit
from nb_sparse_adam._src.engine.intrinsics import array_at
from nb_sparse_adam._src.engine.records import FOUND, GRADIENT, TABLE, TASK
from nb_sparse_adam._src.engine.stages import PART


class Step(NamedTuple):
    """The arrays of records that a step consists of."""

    tables: Any  # (T,) `records.TABLE`
    gradients: Any  # (T,) `records.GRADIENT`
    found: Any  # (T,) `records.FOUND`
    parts: Any  # (sum of gradients["parts"],) `stages.PART`
    tasks: Any  # `records.TASK`


@jit
def open_step(step: Any) -> Any:
    """Make a `Step` of (1,) `records.STEP`."""
    s = step[0]
    length = s["length"]
    return Step(
        array_at(s["tables"], length, TABLE),
        array_at(s["gradients"], length, GRADIENT),
        array_at(s["found"], length, FOUND),
        array_at(s["parts"], s["parts_length"], PART),
        array_at(s["tasks"], s["tasks_length"], TASK),
    )
