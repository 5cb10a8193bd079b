# SPDX-License-Identifier: Apache-2.0
"""Where tables are: in the memory of the host, or on a GPU, which may be numba's simulator of one."""

import ctypes
import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy import sparse

__all__ = ["CPU", "CUDA", "Foreign", "Matrix", "foreign", "host"]


def host(array):
    """An array as NumPy has it; of one on a GPU, a copy."""
    if isinstance(array, Foreign):
        from nb_sparse_adam._src.cuda.device import array_from

        array = array_from(array)
    return array.copy_to_host() if hasattr(array, "copy_to_host") else np.asarray(array)


class Foreign:
    """Another library's array on a GPU: it has the interface, and nothing else is known of it."""

    def __init__(self, owner, interface):
        self.owner = owner
        self.__cuda_array_interface__ = interface


class Matrix:
    """A sparse matrix on a GPU, as CuPy has them."""

    def __init__(self, layout, shape, **arrays):
        self.format, self.shape = layout, shape
        self.__dict__.update(arrays)


def foreign(array, *, read_only=False, **more):
    """A copy on the GPU in the very layout of the array, known by its interface only."""
    from numba import cuda

    from nb_sparse_adam._src.cuda.device import address_of

    first = last = array.__array_interface__["data"][0]
    for length, stride in zip(array.shape, array.strides, strict=True):
        first, last = first + min(0, (length - 1) * stride), last + max(0, (length - 1) * stride)
    memory = (ctypes.c_ubyte * (last - first + array.itemsize)).from_address(first)
    copy = cuda.to_device(np.frombuffer(memory, np.uint8).copy())
    start = array.__array_interface__["data"][0] - first
    interface = {
        "shape": array.shape,
        "strides": array.strides,
        "typestr": array.dtype.str,
        "data": (address_of(copy) + start, read_only),
        "version": 3,
        **more,
    }
    return Foreign(copy, interface)


class OnHost:
    """Everything is as the tests have it."""

    name = "cpu"
    step_counts = ("element", "row", "global")

    def table(self, array):
        return array

    gradient = drawn = array = table


class OnGpu:
    """Everything is copied to the GPU."""

    name = "cuda"
    step_counts = ("element",)  # for what does not depend on it: simulated threads are slow

    def table(self, given):
        """A table, or a mapping of them."""
        from numba import cuda

        if isinstance(given, Mapping):
            return {name: self.table(table) for name, table in given.items()}
        return cuda.to_device(given)

    def array(self, array):
        """An array of a gradient, in its layout; what is no array is left as it is."""
        from numba import cuda

        if type(array) is not np.ndarray:
            return array
        flags = array.flags
        if not (flags.c_contiguous and flags.writeable):
            return foreign(array)
        # A copy, for one number can have any stride, which numba-cuda takes at its word.
        return cuda.to_device(array.copy())

    def gradient(self, given):
        """A gradient with its arrays on the GPU, or a mapping of them."""
        if sparse.issparse(given):
            names = ("indptr", "indices", "data")
            return Matrix(
                given.format,
                given.shape,
                **{name: self.array(getattr(given, name)) for name in names if hasattr(given, name)},
            )
        if isinstance(given, Mapping):
            return {name: self.gradient(gradient) for name, gradient in given.items()}
        if dataclasses.is_dataclass(given):
            fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
            lists = {name: np.array(value) for name, value in fields.items() if isinstance(value, list)}
            return type(given)(**{name: self.array(value) for name, value in (fields | lists).items()})
        return self.array(given)

    def drawn(self, gradient):
        """A drawn gradient (`strategies.Gradient`); of scipy's, which a GPU has not, the CSR matrix."""
        from nb_sparse_adam import CSRGradient

        given = gradient.given
        if sparse.issparse(given) and (given.format != "csr" or len(given.shape) == 1):
            given = CSRGradient(*gradient.arguments)
        given = self.gradient(given)
        arrays = tuple(value for value in vars(given).values() if hasattr(value, "dtype"))
        return dataclasses.replace(gradient, given=given, arrays=arrays)


CPU, CUDA = OnHost(), OnGpu()
BACKENDS = {backend.name: backend for backend in (CPU, CUDA)}
