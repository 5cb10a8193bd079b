# SPDX-License-Identifier: Apache-2.0
"""What to do instead: the ends of messages about tables and gradients that are something else.

Whatever a message recommends does work; the tests follow it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from typing import Any

import numpy as np

from nb_sparse_adam._src.naming import is_of, type_name
from nb_sparse_adam.errors import TableError, TableTypeError

__all__ = ["for_ids", "for_no_gradient", "for_several_arguments", "for_table", "for_values", "named_tables"]

_TORCH = "parameters of PyTorch are for nb_sparse_adam.torch.SparseAdam(params, lr=...)"
_BY_NAME = "SparseAdam({'user': array, 'item': another})"
_DENSE = "; for a dense gradient g pass RowGradient"


# --- tables -----------------------------------------------------------------------------------------------


def named_tables(tables: Any) -> Mapping[str, Any]:
    """Give tables by name, or refuse what is neither an array nor a mapping of names to arrays."""
    if isinstance(tables, Mapping):
        if not tables:
            raise TableError(
                "got an empty mapping of tables, expected at least one: SparseAdam({'user': array})"
            )
        for name in tables:
            if not isinstance(name, str):
                raise TableTypeError(
                    f"got a table named {name!r} ({type(name).__name__}), expected str names"
                )
        return tables
    if isinstance(tables, Iterator):  # not looked into: it may never end
        remedy = _TORCH if is_of("torch", tables) else f"use a dict: {_BY_NAME}; {_TORCH}"
        raise TableTypeError(
            f"got {_a(type_name(tables))}, expected an array, or arrays by their names; {remedy}"
        )
    if isinstance(tables, (Sequence, Set, ValuesView)) and not isinstance(tables, (str, bytes)):
        items = list(tables)
        if not items or not all(map(_is_of_numbers, items)):
            remedy = f"use a dict: {_BY_NAME}"
            if any(is_of("torch", part) for item in items for part in (item, *_parts(item))):
                remedy = _TORCH
            raise TableTypeError(
                f"got {_a(type_name(tables))} of {len(items)}, expected an array, or arrays by their names; "
                + remedy
            )
    return {"table": tables}


def for_table(table: Any) -> str:
    """Say what to do about a table that is not an array that can be updated in place."""
    if is_of("torch", table):
        return f"; {_TORCH}"
    if isinstance(table, np.ma.MaskedArray):
        return "; pass table.filled(0), and use that array from then on"
    if hasattr(table, "tocsr"):
        return "; pass table.toarray(), and use that array from then on"
    if hasattr(table, "__array__") or (isinstance(table, Sequence) and not isinstance(table, (str, bytes))):
        return "; pass np.array(table), which is a copy, and use that array from then on"
    return ""


def _is_of_numbers(item: object) -> bool:
    """Whether something could be a part of one table that is written as lists."""
    if isinstance(item, (list, tuple)):
        return all(map(_is_of_numbers, item))
    return isinstance(item, (int, float, np.generic))


def _parts(item: object) -> Iterable[object]:
    """What torch takes for a parameter: a tensor, its name and it, or a group of them."""
    if isinstance(item, Mapping):
        return [part for value in item.values() for part in (value, *_parts(value))]
    return item if isinstance(item, (list, tuple)) else ()


# --- gradients --------------------------------------------------------------------------------------------


def for_no_gradient(gradient: object, is_on_gpu: bool) -> tuple[str, str]:
    """Say what something is that is no form of gradient, and what to do instead.

    Parameters
    ----------
    gradient : object
        Of no form that is known.
    is_on_gpu : bool
        Whether its table is.
    """
    got, shape = type_name(gradient), _shape_of(gradient)
    layout = str(getattr(gradient, "layout", "")).removeprefix("torch.")
    if is_of("torch", gradient) and layout.startswith("sparse"):
        return f"{_a(got)} of layout {layout}", (
            "; nb_sparse_adam.torch.SparseAdam takes gradients of PyTorch; of g = gradient.coalesce() pass "
            "RowGradient(g.indices()[0], g.values()) if one dimension of it is sparse"
            if layout == "sparse_coo"
            else "; pass CSRGradient(g.crow_indices(), g.col_indices(), g.values()) of a CSR tensor g"
        )
    if isinstance(gradient, (tuple, list)):
        return got, _for_sequence(gradient)
    if shape is None or not any(
        hasattr(gradient, f"__{name}__") for name in ("array", "cuda_array_interface", "dlpack")
    ):
        return got, ""
    rows = " with the rows 0..len(g) - 1, on the GPU" if is_on_gpu else "(np.arange(len(g)), g)"
    got = "array" if type(gradient) is np.ndarray else got
    return f"a dense {got} of shape {shape}", _DENSE + rows


def _shape_of(given: Any) -> tuple[Any, ...] | None:
    try:
        return tuple(given.shape)
    except (AttributeError, TypeError, ValueError):  # TensorFlow's may be unknown
        return None


def _for_sequence(given: Sequence[object]) -> str:
    if given and all(map(_is_of_numbers, given)):
        return f"{_DENSE}(np.arange(len(g)), g)"
    if any(is_of("nb_sparse_adam", part) for part in given):
        return "; a step takes one gradient of a table: join their arrays, or call step for each"
    return for_several_arguments(len(given))


def for_several_arguments(number: int) -> str:
    """Say what is meant by arrays that are passed without the form that they are of."""
    if number == 2:
        return "; pass RowGradient(rows, values)"
    if number == 3:
        return "; pass CSRGradient(indptr, indices, data) or BagGradient(indices, offsets, grad_output)"
    return "; pass the arrays as a RowGradient, a BagGradient or a CSRGradient"


def for_ids(what: str, shape: tuple[int, ...], dim: int) -> str:
    """Say how ids of another number of dimensions are passed; ``dim`` is that of the table."""
    form, name = _form_and_name(what)
    if len(shape) == 1:
        return ""
    if not shape:
        return f"; pass np.reshape({name}, -1)"
    if form == "RowGradient":
        return f"; pass rows.reshape(-1) and values.reshape(-1, {dim})"
    if form == "BagGradient" and name == "indices" and len(shape) == 2:
        bags, length = shape
        return (
            f"; for {bags} bags of {length} ids pass indices.reshape(-1) and "
            f"offsets=np.arange(0, {bags * length + 1}, {length})"
            if length
            else f"; for {bags} empty bags pass indices.reshape(-1) and offsets=np.zeros({bags + 1}, int)"
        )
    return f"; pass {name}.reshape(-1)"


def for_values(what: str, shape: tuple[int, ...], rows: int | None, dim: int | None) -> str:
    """Say how values that only have another number of dimensions are passed; ``dim`` None: a vector."""
    _, name = _form_and_name(what)
    size = math.prod(shape)
    if dim is None:
        return f"; pass {name}.reshape(-1)" if len(shape) != 1 and rows in (None, size) else ""
    if len(shape) > 2 and shape[-1] == dim and dim and rows in (None, size // dim):
        return f"; pass {name}.reshape(-1, {dim})"
    return ""


def _form_and_name(what: str) -> tuple[str, str]:
    """Take "RowGradient.rows", or "scipy.sparse CSR indices", apart."""
    words = what.replace(".", " ").split()
    return words[0], words[-1]


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
