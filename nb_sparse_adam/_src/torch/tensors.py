# SPDX-License-Identifier: Apache-2.0
"""Torch's tensors as the engine sees them: which ones it accepts, and their memory as arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from nb_sparse_adam.errors import DenseGradientError, GradientError, StateError, TableError, TableTypeError


class Gpu:
    """What torch and the engine hand each other of a GPU's memory. Tests replace it to run without one."""

    @staticmethod
    def has(tensor: Tensor) -> bool:
        """Whether a tensor is there."""
        return tensor.device.type == "cuda"

    @staticmethod
    def for_engine(tensor: Tensor) -> Any:
        """See a tensor that requires no gradient as the engine sees arrays: by its interface."""
        return tensor

    @staticmethod
    def for_torch(array: Any, device: torch.device) -> Tensor:
        """See an array of the engine's as a tensor, which keeps it alive."""
        return torch.as_tensor(array, device=device)


def check_parameter(name: str, param: Tensor) -> None:
    """Refuse a parameter that the engine cannot update in place."""
    if param.dtype not in (torch.float32, torch.float64):
        raise TableTypeError(
            f"parameter {name} has dtype {param.dtype}, expected torch.float32 or torch.float64; convert it "
            "with .float(), or leave it to torch.optim.SparseAdam"
        )
    if param.device.type not in ("cpu", "cuda"):
        raise TableError(
            f"parameter {name} is on device {param.device}, expected the CPU or cuda: keep the embedding "
            "there (module.cpu()) and move its output to the device, or use torch.optim.SparseAdam for it"
        )
    if _overlaps_itself(param):
        raise TableError(
            f"parameter {name} has strides {param.stride()}: several elements are one place in memory, "
            "expected one for each; pass parameter.contiguous() as a Parameter of its own"
        )
    if param.is_inference() and not torch.is_inference_mode_enabled():
        raise TableError(
            f"parameter {name} was made under torch.inference_mode, and cannot be changed outside of it; "
            "make it outside, or clone it"
        )


def array_of(tensor: Tensor, on_gpu: bool) -> Any:
    """See a tensor that requires no gradient as an array where it is; what is an array is not copied."""
    if not on_gpu:
        return tensor.numpy()
    lengths = zip(tensor.shape, tensor.stride(), strict=True)
    is_expanded = any(length > 1 and step == 0 for length, step in lengths)  # so elements are one place
    return Gpu.for_engine(tensor.contiguous() if is_expanded else tensor)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements are one place in memory; exact, and immediate for what is contiguous."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    # NumPy compares the places of two arrays exactly, by arithmetic on strides. No memory is touched.
    places = as_strided(np.empty(1, np.uint8), tuple(tensor.shape), tensor.stride())
    for _ in tensor.shape:
        # Two elements that are one place differ in a first dimension: there one is at 0, say, the other not.
        first = places[0, ...]  # an array, even where it is a single element
        if np.shares_memory(first, places[1:]):
            return True
        places = first
    return False


def check_memory(name: str, param: Tensor) -> None:
    """Refuse a parameter whose memory has been taken from under it."""
    if param.numel() == 0:
        return
    last = sum((length - 1) * step for length, step in zip(param.shape, param.stride(), strict=True))
    needed = (param.storage_offset() + last + 1) * param.element_size()
    if param.untyped_storage().nbytes() < needed:
        raise TableError(
            f"parameter {name} of shape {tuple(param.shape)} has {param.untyped_storage().nbytes()} bytes of "
            f"memory, expected {needed}: its storage has been resized; give it back before the step"
        )


def check_shape(what: str, given: Any, expected: tuple[Any, ...], advice: str) -> None:
    """Refuse what is not a tensor of a shape."""
    if not isinstance(given, Tensor) or tuple(given.shape) != expected:
        got = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise StateError(f"{what} is {got}, expected a tensor of shape {expected}{advice}")


def coo(name: str, grad: Tensor, device: torch.device) -> Tensor:
    """Refuse a gradient that is not sparse, or not where the parameter is; give it without its history."""
    if grad.layout is not torch.sparse_coo:
        raise DenseGradientError(
            f"SparseAdam does not support dense gradients, please consider Adam instead: parameter {name} "
            f"has a gradient of layout {grad.layout}, expected torch.sparse_coo, as nn.Embedding and "
            "nn.EmbeddingBag with sparse=True give"
        )
    if grad.device != device:
        raise GradientError(
            f"gradient of parameter {name} is on device {grad.device}, expected {device}, where the "
            "parameter is"
        )
    return grad.detach()


def identity_of(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor is given other memory, or sees its memory in another way."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device


def contiguous_strides(shape: tuple[int, ...]) -> list[int]:
    """Give the strides of a contiguous array of this shape, in elements."""
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def host_array(tensor: Tensor) -> Any:
    """Copy a tensor to the host, if it is not there, as a contiguous array."""
    return tensor.detach().cpu().contiguous().numpy()


def is_in_shared_memory(tensor: Tensor) -> bool:
    """Whether other processes may have it: what is unpickled is the very memory then, not a copy."""
    return tensor.device.type == "cpu" and bool(tensor.untyped_storage().is_shared())
