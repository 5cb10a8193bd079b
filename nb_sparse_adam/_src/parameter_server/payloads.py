# SPDX-License-Identifier: Apache-2.0
"""What a shard is sent with a push: of each table ids, each once, how often they were used, and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nb_sparse_adam._src.parameter_server.routing import is_finite
from nb_sparse_adam._src.parameter_server.spec import TableSpec
from nb_sparse_adam._src.table.embedding_table import EmbeddingTable
from nb_sparse_adam.errors import GradientError, NonFiniteGradientError, TableError

Payload: TypeAlias = dict[str, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]]


def check_payload(tables: Mapping[str, EmbeddingTable], payload: Payload) -> None:
    """Refuse what a client of this library would not send: it has looked at it before."""
    for name, (ids, times, grads) in payload.items():
        table = find_table(tables, name)
        found = [(array.dtype.name, array.shape) for array in (ids, times, grads)]
        n = ids.size
        expected = [("int64", (n,)), ("int64", (n,)), (table.dtype.name, (n, table.dim))]
        if found != expected or not (grads.flags.c_contiguous and ids.flags.c_contiguous):
            raise GradientError(f"push to table {name!r}: got {found}, expected {expected}")
        if table.on_nonfinite == "raise" and not is_finite(grads):
            raise NonFiniteGradientError(
                f"push to table {name!r}: a gradient is not finite, or its square is not; nothing was changed"
            )


def refuse_as_here(spec: TableSpec, name: str, ids: NDArray[np.int64], grads: NDArray[Any]) -> None:
    """Raise what a table in this process would have raised, for gradients that are not finite."""
    options = {key: value for key, value in spec.options.items() if key not in ("capacity", "eviction")}
    table = TableSpec(spec.dim, **options).make(name)  # with room for all of them
    unique = np.unique(ids)
    table.load(unique, np.zeros((len(unique), table.dim), table.dtype))
    table.update(ids, grads)


def find_table(tables: Mapping[str, Any], name: Any) -> Any:
    """Return what there is of a table."""
    if name not in tables:
        raise TableError(f"there is no table {name!r}, expected one of {sorted(tables)}")
    return tables[name]


def arrays_in(payload: Payload) -> dict[str, NDArray[Any]]:
    """Give the arrays names: the number of the table, and which it is."""
    return {
        f"{at}.{what}": array
        for at, arrays in enumerate(payload.values())
        for what, array in zip(("ids", "times", "grads"), arrays, strict=True)
    }


def payload_of(names: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> Payload:
    """Put together what `arrays_in` took apart."""
    return {
        name: (arrays[f"{at}.ids"], arrays[f"{at}.times"], arrays[f"{at}.grads"])
        for at, name in enumerate(names)
    }


def joined(payloads: Iterable[Payload]) -> Payload:
    """Make one payload of several: the gradients of an id follow each other in their order."""
    parts: dict[str, list[Any]] = {}
    for payload in payloads:
        for name, arrays in payload.items():
            parts.setdefault(name, []).append(arrays)
    return {
        name: tuple(np.concatenate(each) for each in zip(*found, strict=True))  # type: ignore[misc]
        for name, found in parts.items()
    }
