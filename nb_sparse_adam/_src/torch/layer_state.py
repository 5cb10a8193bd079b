# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a fused layer as one tensor of bytes, which a module's state dict holds.

Code that goes over all tensors of a state dict (`safetensors`, ``.cpu()``, averages of weights) finds a
tensor here, and code that averages floating-point tensors leaves it alone: neither counts nor options have a
mean. The bytes are a file of safetensors (``safetensors.torch.load(bytes(tensor.numpy()))`` reads it):
moments and counts, and as its metadata, in JSON, options and numbers. A layer that may be trained has as many
bytes before its first step as after it, for code that goes over two state dicts at once.
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nb_sparse_adam._src.checkpoint.tensor_files import framed, header_of
from nb_sparse_adam.errors import SparseAdamWarning, StateError

LAYER_FORMAT = "nb_sparse_adam.torch, version 1"
HEADER = 1024  # bytes, or a multiple of them: it is as long whatever digits its numbers have
_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U32": torch.uint32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_OF_OPTIMIZER = ("params", "param_names")  # which a layer's optimizer has of its own
_LEFT_OUT = object()


def pack(
    group: Mapping[Any, Any],
    entry: Mapping[Any, Any] | None,
    unused: Mapping[str, Tensor],
    layer_format: str = LAYER_FORMAT,
) -> Tensor:
    """Put the state of a table into one tensor, where its moments are.

    Parameters
    ----------
    group : mapping
        The optimizer's group. What JSON does not know of it is left out.
    entry : mapping, optional
        The table's entry of the state; None before the first step.
    unused : mapping
        Tensors that stand for those of the entry before the first step, and take no memory themselves.
    layer_format : str
        What says of which kind of layer it is.
    """
    given = dict(unused if entry is None else entry)
    tensors = {
        k: v for k, v in given.items() if isinstance(k, str) and isinstance(v, Tensor) and v.dtype in _CODES
    }
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # so all are aligned
    metadata = {"format": layer_format, "group": json.dumps(_all_plain(group, _OF_OPTIMIZER))}
    if entry is not None:
        metadata.update(entry=json.dumps(_all_plain(entry, tensors)), crc32="0" * 8)
    described = [
        (key, _CODES[value.dtype], value.shape, value.numel() * value.element_size())
        for key, value in tensors.items()
    ]
    header = header_of(described, metadata)
    first = len(framed(header, HEADER))
    device = next((value.device for value in tensors.values()), torch.device("cpu"))
    size = first + sum(length for *_, length in described)
    if device.type == "cpu":
        packed = torch.from_numpy(np.zeros(size, np.uint8))  # takes memory only where it is written to
    else:
        packed = torch.zeros(size, dtype=torch.uint8, device=device)
    if entry is not None:
        for key, value in tensors.items():
            start, end = header[key]["data_offsets"]
            if end > start:
                packed[first + start : first + end].view(value.dtype).view(value.shape).copy_(value)
        metadata["crc32"] = _crc(packed[first:])
    packed[:first] = torch.frombuffer(bytearray(framed(header, HEADER)), dtype=torch.uint8)
    return packed


def _crc(data: Tensor) -> str:
    """Check sum of what follows the header: an average that was made bytes again is not taken for a state."""
    return f"{zlib.crc32(data.cpu().numpy().data):08x}"


def _all_plain(given: Mapping[Any, Any], without: Collection[str]) -> dict[str, Any]:
    known = {
        key: _plain(value) for key, value in given.items() if isinstance(key, str) and key not in without
    }
    return {key: value for key, value in known.items() if value is not _LEFT_OUT}


def _plain(value: Any) -> Any:
    """Give a number, a flag, a name or a list of them in Python's own types; `_LEFT_OUT` for all else."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _plain(value.item()) if math.prod(value.shape) == 1 else _LEFT_OUT
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return _LEFT_OUT if any(item is _LEFT_OUT for item in items) else items
    return value if value is None or isinstance(value, (bool, int, float, str)) else _LEFT_OUT


def unpack(where: str, packed: Tensor, layer_format: str = LAYER_FORMAT) -> dict[str, Any] | None:
    """Read what `pack` has made, as an optimizer's state dict; None, with a warning, if it has been averaged.

    The tensors are parts of the one that is given.
    """
    if packed.dtype != torch.uint8:
        warnings.warn(
            f"{where} has dtype {packed.dtype}, expected torch.uint8: it has been computed with, as in an "
            "average of all that a state dict holds, and is passed over; the layer's optimizer stays as it "
            "is. Average what is_floating_point() only, or leave out the keys that end in '_extra_state'",
            SparseAdamWarning,
            stacklevel=2,
        )
        return None
    packed = packed.detach().contiguous()
    if packed.dim() != 1 or len(packed) < 8:
        raise _damaged(where, f"it has shape {tuple(packed.shape)}")
    if packed.storage_offset() % 8:
        packed = packed.clone()
    length = int.from_bytes(bytes(packed[:8].tolist()), "little")
    if not 0 <= length <= len(packed) - 8:
        raise _damaged(where, f"its header of {length} bytes is longer than it is")
    try:
        header = json.loads(bytes(packed[8 : 8 + length].cpu().numpy()))
        metadata = header.pop("__metadata__")
        if metadata["format"] != layer_format:
            raise _damaged(where, f"its format is {metadata['format']!r}, expected {layer_format!r}")
        group = json.loads(metadata["group"])
        group["betas"] = tuple(group["betas"])
        entry = json.loads(metadata["entry"]) if "entry" in metadata else None
        data = packed[8 + length :]
        if entry is not None:
            if metadata.get("crc32") != _crc(data):
                raise _damaged(where, "its checksum is another (an average of several state dicts?)")
            for key, described in header.items():
                dtype, (start, end) = _DTYPES[described["dtype"]], described["data_offsets"]
                if not 0 <= start <= end <= len(data):
                    raise _damaged(where, f"it ends before its {key}")
                part, shape = data[start:end], described["shape"]
                entry[key] = (
                    part.view(dtype).view(shape) if end > start else part.new_empty(shape, dtype=dtype)
                )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, StateError):
            raise
        raise _damaged(where, f"{type(error).__name__}: {error}") from error
    return {"state": {} if entry is None else {0: entry}, "param_groups": [{**group, "params": [0]}]}


def _damaged(where: str, why: str) -> StateError:
    return StateError(
        f"{where} is not what a layer's state dict holds: {why}. Without it (leave out keys that end in "
        "'_extra_state') weights are loaded alone, and the layer's optimizer stays as it is"
    )


def check_state_dict(where: str, given: Any) -> dict[str, Any]:
    """Refuse what is no state dict of the optimizer of one table."""
    if not isinstance(given, Mapping):
        raise StateError(
            f"{where} is {given!r:.60} (a {type(given).__name__}), expected what a layer's state dict holds"
        )
    groups, state = given.get("param_groups"), given.get("state")
    if not isinstance(state, Mapping) or not isinstance(groups, (list, tuple)) or len(groups) != 1:
        raise StateError(
            f"{where} is a dict of {sorted(map(str, given))}, expected the 'state' and the 'param_groups', "
            "of one group, of the layer's optimizer"
        )
    (group,) = groups
    got = sorted(map(str, group)) if isinstance(group, Mapping) else type(group).__name__
    if not {"params", "lr", "betas", "eps"}.issubset(got) or len(group["params"]) != 1:
        raise StateError(f"{where}: its group has {got}, expected lr, betas, eps and, in params, one number")
    if not set(state).issubset(group["params"]):
        raise StateError(f"{where}: its state is of {sorted(map(str, state))}, expected {group['params']}")
    return dict(given)
