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
    items = _items(tables)
    if items is not None and (not items or not all(map(_is_of_numbers, items))):
        remedy = _TORCH if _holds_torch(items) else f"use a dict: {_BY_NAME}"
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
    items = _items(table)
    if items is not None and _holds_torch(items):
        return f"; {_TORCH}"
    if hasattr(table, "__array__") or (items is not None and all(map(_is_of_numbers, items))):
        array = "np.array(table, float)"
        if str(getattr(table, "dtype", "")) in ("float32", "float64"):
            array = "np.array(table)"
        return f"; pass {array}, which is a copy, and use that array from then on"
    return ""


def _items(given: object) -> list[Any] | None:
    """Give what a list, or something like one, holds; None of anything else, text and memory included."""
    if not isinstance(given, (Sequence, Set, ValuesView)) or isinstance(
        given, (str, bytes, bytearray, memoryview)
    ):
        return None
    try:
        return list(given)
    except Exception:  # noqa: BLE001 - whatever a class of the user's raises: this is about words only
        return None


def _is_of_numbers(item: object, depth: int = 3) -> bool:
    """Whether something could be a part of one table that is written as lists."""
    if isinstance(item, (list, tuple)):
        return depth > 0 and all(_is_of_numbers(part, depth - 1) for part in item)
    return isinstance(item, (int, float, np.generic))


def _holds_torch(items: Iterable[object], depth: int = 3) -> bool:
    """Whether there is a parameter of torch: by itself, with its name, or in a group of them."""
    for item in items:
        if is_of("torch", item):
            return True
        parts = (
            item.values() if isinstance(item, Mapping) else item if isinstance(item, (list, tuple)) else ()
        )
        if depth and _holds_torch(parts, depth - 1):
            return True
    return False


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
        return got, _for_sequence(_items(gradient) or (), is_on_gpu)
    if shape is None or not any(
        hasattr(gradient, f"__{name}__") for name in ("array", "cuda_array_interface", "dlpack")
    ):
        return got, ""
    got = f"a dense {'array' if type(gradient) is np.ndarray else got} of shape {shape}"
    if not shape:
        return got, ""
    if is_on_gpu:
        return got, f"{_DENSE} with the rows 0..len(g) - 1, on the GPU"
    values = "g"
    if getattr(gradient, "requires_grad", False):
        values = "g.detach()"
    elif isinstance(gradient, np.ma.MaskedArray):
        values = "g.filled(0)"
    elif isinstance(gradient, np.ndarray) and gradient.dtype not in (np.float32, np.float64):
        values = "g.astype(float)"
    return got, f"{_DENSE}(np.arange(len(g)), {values})"


def _shape_of(given: Any) -> tuple[Any, ...] | None:
    try:
        return tuple(given.shape)
    except (AttributeError, TypeError, ValueError):  # TensorFlow's may be unknown
        return None


def _for_sequence(given: Sequence[object], is_on_gpu: bool) -> str:
    if given and all(map(_is_of_numbers, given)):
        return f"{_DENSE}(np.arange(len(g)), np.array(g, float))"
    if any(is_of("nb_sparse_adam", part) for part in given):
        if is_on_gpu:
            return "; a list of gradients is not offered on a GPU: join their arrays, or call step for each"
        return "; in a list of gradients there are no others: join them to one list"
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
