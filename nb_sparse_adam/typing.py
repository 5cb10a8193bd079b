# SPDX-License-Identifier: Apache-2.0
"""Types for annotations in users' code.

`Table` is what `SparseAdam` updates, and `Gradient` what its `step` takes. `StepCounts`, `OnNonfinite`,
`DeviceChecks` and `BagMode` are the choices of the options of these names. `Array` is what gradients are made
of; `StateView` is what `SparseAdam.state` shows of a table, `LentTable` what `SparseAdam.kernel_table` lends,
and `RowState` what `EmbeddingTable.state` returns. `GradientForm` is a choice of `warm_up`, and `WarmUp` what
it returns. The others are protocols: arrays and matrices of other libraries, known by their attributes.
"""

from nb_sparse_adam._src.annotations import (
    Array,
    BagMode,
    BatchedCoordinates,
    CompressedMatrix,
    CoordinateMatrix,
    DeviceArray,
    DeviceChecks,
    GradientForm,
    IndexedSlices,
    OnNonfinite,
    StepCounts,
    Table,
)
from nb_sparse_adam._src.gradients import Gradient
from nb_sparse_adam._src.kernels import LentTable
from nb_sparse_adam._src.views import RowState, StateView
from nb_sparse_adam._src.warming import WarmUp

__all__ = [
    "Array",
    "BagMode",
    "BatchedCoordinates",
    "CompressedMatrix",
    "CoordinateMatrix",
    "DeviceArray",
    "DeviceChecks",
    "Gradient",
    "GradientForm",
    "IndexedSlices",
    "LentTable",
    "OnNonfinite",
    "RowState",
    "StateView",
    "StepCounts",
    "Table",
    "WarmUp",
]
