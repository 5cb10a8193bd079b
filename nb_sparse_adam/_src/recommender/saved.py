# SPDX-License-Identifier: Apache-2.0
"""A trained recommender in a folder: a checkpoint, and beside it one file with ids and interactions.

The file is written under a name of its own before the checkpoint, which names it, takes the place of the one
before: what is there is whole at every moment.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nb_sparse_adam._src.checkpoint.api import load, save
from nb_sparse_adam._src.files import write_whole
from nb_sparse_adam._src.optimizer import SparseAdam
from nb_sparse_adam._src.recommender.interactions import UserItems
from nb_sparse_adam._src.recommender.ranking import Quality
from nb_sparse_adam._src.recommender.training import EpochRecord
from nb_sparse_adam.errors import CheckpointError, OptionError

FORMAT, VERSION = "nb_sparse_adam.MatrixFactorization", 1
_PREFIX = "interactions-"
_PAIRS = ("trained", "held_out", "test")


class Saved(NamedTuple):
    """What is kept of a model."""

    optimizer: SparseAdam
    params: dict[str, Any]
    history: list[EpochRecord]
    epochs: int
    user_ids: npt.NDArray[Any]
    item_ids: npt.NDArray[Any]
    trained: UserItems | None
    held_out: UserItems | None  # for validation
    test: UserItems | None = None
    more: dict[str, Any] = {}  # noqa: RUF012 (read only) what the command line goes on with


def write_model(folder: str | os.PathLike[str], model: Saved) -> None:
    """Write a model; see `MatrixFactorization.save`."""
    path = Path(folder)
    arrays: dict[str, Any] = {
        "n_items": np.int64(len(model.item_ids)),
        **_packed("user", model.user_ids),
        **_packed("item", model.item_ids),
    }
    for name, pairs in zip(_PAIRS, (model.trained, model.held_out, model.test), strict=True):
        if pairs is not None:
            arrays |= {f"{name}_indptr": pairs.indptr, f"{name}_indices": pairs.indices}
            if pairs.weights is not None:
                arrays[f"{name}_weights"] = pairs.weights
    content = io.BytesIO()
    np.savez(content, **arrays)
    name = f"{_PREFIX}{secrets.token_hex(8)}.npz"
    extra = {
        "format": FORMAT,
        "version": VERSION,
        "params": {key: list(x) if isinstance(x, tuple) else x for key, x in model.params.items()},
        "history": [_finite(asdict(record)) for record in model.history],
        "epochs": model.epochs,
        "more": model.more,
        "file": name,
        "sha256": hashlib.sha256(content.getvalue()).hexdigest(),
    }
    path.mkdir(parents=True, exist_ok=True)
    write_whole(path / name, content.getvalue())
    try:
        save(path, model.optimizer, extra)
    except BaseException:
        (path / name).unlink(missing_ok=True)
        raise
    for other in path.glob(f"{_PREFIX}*.npz"):
        if other.name != name:
            other.unlink(missing_ok=True)


def read_model(folder: str | os.PathLike[str]) -> Saved:
    """Read a model; see `MatrixFactorization.load`."""
    path = Path(folder)
    optimizer, extra = load(path)
    if not isinstance(extra, dict) or extra.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: is a checkpoint, but not of a MatrixFactorization: checkpoint.load reads it"
        )
    if extra["version"] != VERSION:
        raise CheckpointError(
            f"{path}: is of version {extra['version']}, expected {VERSION}; a newer release reads it"
        )
    file = path / extra["file"]
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: is missing; the model was saved with it") from error
    if hashlib.sha256(content).hexdigest() != extra["sha256"]:
        raise CheckpointError(f"{file}: is damaged: its SHA-256 is not the one that was saved")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        n_items = int(arrays["n_items"])
        ids = [_unpacked(arrays, name) for name in ("user", "item")]
        pairs = [
            UserItems(
                arrays[f"{name}_indptr"], arrays[f"{name}_indices"], n_items, arrays.get(f"{name}_weights")
            )
            if f"{name}_indptr" in arrays
            else None
            for name in _PAIRS
        ]
    for name, one in zip(("user", "item"), ids, strict=True):
        table = optimizer.tables.get(name)
        shape = len(one), extra["params"]["dim"]
        if table is None or table.shape != shape or table.dtype != np.float32:
            raise CheckpointError(f"{path}: table {name!r} does not fit the {len(one):,} ids in {file.name}")
    if any(one is not None and (one.n_users, one.n_items) != (len(ids[0]), n_items) for one in pairs):
        raise CheckpointError(f"{file}: its interactions do not fit its ids")
    params = {key: tuple(x) if isinstance(x, list) else x for key, x in extra["params"].items()}
    history = [
        EpochRecord(**{**one, "quality": None if one["quality"] is None else Quality(**_nan(one["quality"]))})
        for one in extra["history"]
    ]
    return Saved(
        optimizer,
        params,
        history,
        extra["epochs"],
        ids[0],
        ids[1],
        pairs[0],
        pairs[1],
        pairs[2],
        extra["more"],
    )


def _packed(name: str, ids: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Ids as arrays: int64, or the bytes of strings in UTF-8 and where each begins."""
    if ids.dtype.kind == "i":
        return {f"{name}_ids": ids}
    try:
        encoded = [one.encode() for one in ids]
    except UnicodeEncodeError as error:
        raise OptionError(f"{name} ids: {error.object!r} cannot be saved: it is not valid Unicode") from error
    begins = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(one) for one in encoded], out=begins[1:])
    return {f"{name}_text": np.frombuffer(b"".join(encoded), dtype=np.uint8), f"{name}_begins": begins}


def _unpacked(arrays: Any, name: str) -> npt.NDArray[Any]:
    if f"{name}_ids" in arrays:
        ids: npt.NDArray[Any] = arrays[f"{name}_ids"]
        return ids
    text, begins = arrays[f"{name}_text"].tobytes(), arrays[f"{name}_begins"].tolist()
    names = np.empty(len(begins) - 1, dtype=object)
    names[:] = [text[a:b].decode() for a, b in itertools.pairwise(begins)]
    return names


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is not known is None."""
    return {
        key: _finite(x) if isinstance(x, dict) else None if isinstance(x, float) and x != x else x
        for key, x in record.items()
    }


def _nan(record: dict[str, Any]) -> dict[str, Any]:
    return {key: float("nan") if x is None else x for key, x in record.items()}
