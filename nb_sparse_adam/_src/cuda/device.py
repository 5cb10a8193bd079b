# SPDX-License-Identifier: Apache-2.0
"""Memory, streams and launches of a GPU, as numba-cuda has them; and as its simulator has them.

Everything that differs between a GPU and the simulator (``NUMBA_ENABLE_CUDASIM=1``) is in this module.
"""

from __future__ import annotations

import ctypes
import operator
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import cuda
from numpy.typing import NDArray

from nb_sparse_adam._src.engine.compilations import Announcement
from nb_sparse_adam._src.engine.kernel_cache import keep_on_disk

SIMULATED = bool(numba.config.ENABLE_CUDASIM)

# numba warns of grids of fewer blocks than this. Those that are too many find nothing to do.
_LEAST_BLOCKS = 1 if SIMULATED else 128
_BLOCKS_PER_PROCESSOR = 32  # enough to hide what the start of a block costs, and to even out the end

Function = Callable[..., Any]


# --- compiling ------------------------------------------------------------------------------------------


def kernel(function: Function) -> Any:
    """Compile a kernel at its first launch, and keep the code on disk as `engine.compile.jit` does."""
    compiled = cuda.jit(function)
    if not SIMULATED:
        version = getattr(sys.modules.get("numba_cuda"), "__version__", "")
        announcement = Announcement("kernels of a GPU")
        keep_on_disk(compiled, "numba.cuda.dispatcher.CUDACache", version, announcement=announcement)
    return compiled


def device_function(function: Function) -> Any:
    """Compile a function that kernels call; what is compiled for a CPU already is compiled once more."""
    function = getattr(function, "py_func", function)
    return function if SIMULATED else cuda.jit(function, device=True)


gpu: Any = cuda  # in kernels, and in functions that those of other modules call
if SIMULATED:
    from numba.cuda.simulator import kernel as running

    class _Running:
        """What the simulator puts in the place of ``cuda`` in the module of a kernel, and there alone."""

        def __getattr__(self, name: str) -> Any:
            return getattr(running._get_kernel_context(), name)

    gpu = _Running()
    product = operator.mul

    @cache
    def arrays_at(dtype: Any) -> Function:
        """Make ``array_at(address, length)``: the 1-D array of that dtype and length which begins there."""
        kind = np.dtype(dtype)

        @lru_cache(maxsize=1 << 14)
        def array_at(address: int, length: int) -> NDArray[Any]:
            if length <= 0:
                return np.empty(0, kind)
            memory = (ctypes.c_ubyte * (int(length) * kind.itemsize)).from_address(int(address))
            return np.frombuffer(memory, kind)

        return array_at

    def load_piece(width: int) -> Function:
        """Make ``load(array, at, into)``: ``into[:width]`` ← ``array[at:at + width]``."""

        def load(array: Any, at: Any, into: Any) -> None:
            for i in range(width):
                into[i] = array[at + i]

        return load

    def store_piece(width: int) -> Function:
        """Make ``store(array, at, given)``: ``array[at:at + width]`` ← ``given[:width]``."""

        def store(array: Any, at: Any, given: Any) -> None:
            for i in range(width):
                array[at + i] = given[i]

        return store

else:
    from llvmlite import ir
    from numba.cuda import cgutils, types
    from numba.cuda.extending import intrinsic
    from numba.cuda.np.arrayobj import make_array, populate_array
    from numba.cuda.np.numpy_support import from_dtype

    @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
    def product(typingctx: Any, a: Any, b: Any) -> Any:  # noqa: ARG001 (numba fixes the signature)
        """Multiply, and round: never fused with an addition.

        The compiler makes one instruction of a product and a sum, with one rounding instead of two, where it
        finds them side by side. That is more exact, but what is side by side depends on the kernel, and a
        CPU rounds twice.
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            number = context.get_value_type(signature.return_type)
            kind = "f" if signature.return_type.bitwidth == 32 else "d"
            function = ir.FunctionType(number, [number, number])
            name = f"llvm.nvvm.mul.rn.{kind}"
            known = builder.module.globals.get(name)
            return builder.call(known or ir.Function(builder.module, function, name), args)

        if a != b or a not in (types.float32, types.float64):
            raise TypeError(f"product of {a} and {b}: expected two numbers of one floating-point type")
        return a(a, b), codegen

    @cache
    def arrays_at(dtype: Any) -> Function:
        """Make ``array_at(address, length)``: the 1-D array of that dtype and length which begins there."""
        size, element = np.dtype(dtype).itemsize, from_dtype(np.dtype(dtype))
        kind = types.Array(element, 1, "C")

        @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
        def array_at(typingctx: Any, address: Any, length: Any) -> Any:  # noqa: ARG001
            def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
                words = context.get_data_type(element)
                # Said to be global memory, for which there are instructions of its own.
                place = builder.inttoptr(args[0], words.as_pointer(1))
                array = make_array(kind)(context, builder)
                itemsize = context.get_constant(types.intp, size)
                populate_array(
                    array,
                    data=builder.addrspacecast(place, words.as_pointer()),
                    shape=cgutils.pack_array(builder, [args[1]]),
                    strides=cgutils.pack_array(builder, [itemsize]),
                    itemsize=itemsize,
                    meminfo=None,
                )
                return array._getvalue()

            return kind(types.int64, types.int64), codegen

        return array_at  # type: ignore[no-any-return]

    def _place(context: Any, builder: Any, array: Any, value: Any, at: Any, width: int) -> Any:
        """Pointer to ``width`` elements of an array as one vector, and its alignment in bytes."""
        element = context.get_data_type(array.dtype)
        pointer = builder.gep(context.make_array(array)(context, builder, value).data, [at], inbounds=True)
        vector = ir.VectorType(element, width).as_pointer(pointer.type.addrspace)
        return builder.bitcast(pointer, vector), width * array.dtype.bitwidth // 8

    def load_piece(width: int) -> Function:
        """Make ``load(array, at, into)``: ``into[:width]`` ← ``array[at:at + width]``, in one access.

        The array is 1-D and contiguous, and ``at`` a multiple of ``width`` from an aligned address on.
        """

        @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
        def load(typingctx: Any, array: Any, at: Any, into: Any) -> Any:  # noqa: ARG001
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                array, _, into = signature.args
                pointer, size = _place(context, builder, array, args[0], args[1], width)
                vector = builder.load(pointer, align=size)
                data = context.make_array(into)(context, builder, args[2]).data
                for i in range(width):
                    index = ir.IntType(32)(i)
                    builder.store(builder.extract_element(vector, index), builder.gep(data, [index]))
                return context.get_dummy_value()

            return types.void(array, types.intp, into), codegen

        return load  # type: ignore[no-any-return]

    def store_piece(width: int) -> Function:
        """Make ``store(array, at, given)``: ``array[at:at + width]`` ← ``given[:width]``, in one access."""

        @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
        def store(typingctx: Any, array: Any, at: Any, given: Any) -> Any:  # noqa: ARG001
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                array, _, given = signature.args
                pointer, size = _place(context, builder, array, args[0], args[1], width)
                data = context.make_array(given)(context, builder, args[2]).data
                vector = ir.Constant(pointer.type.pointee, ir.Undefined)
                for i in range(width):
                    index = ir.IntType(32)(i)
                    value = builder.load(builder.gep(data, [index]))
                    vector = builder.insert_element(vector, value, index)
                builder.store(vector, pointer, align=size)
                return context.get_dummy_value()

            return types.void(array, types.intp, given), codegen

        return store  # type: ignore[no-any-return]


# --- launching ------------------------------------------------------------------------------------------


class Mark(NamedTuple):
    """A moment of a stream."""

    event: Any  # None in the simulator, where everything is done at once

    @property
    def has_passed(self) -> bool:
        """Whether everything before it is done."""
        return self.event is None or bool(self.event.query())

    def wait(self) -> None:
        """Let the host wait for it."""
        if self.event is not None:
            self.event.synchronize()


class Stream:
    """The stream that a step runs on.

    Attributes
    ----------
    handle : int
        The driver's; 0 is the default stream.
    others : tuple of int
        Handles of streams that arrays of the step are used on, too.
    """

    others: tuple[int, ...] = ()

    def __init__(self, handle: int) -> None:
        self.handle = handle
        # By its name the default stream takes copies that the host does not wait for; as 0 it does not.
        self.numba: Any = 0
        if not SIMULATED:
            self.numba = cuda.external_stream(handle) if handle else cuda.legacy_default_stream()

    def synchronize(self) -> None:
        """Wait until everything on it is done."""
        if not SIMULATED:
            self.numba.synchronize()

    def mark(self) -> Mark:
        """Note what is on the stream so far."""
        if SIMULATED:
            return Mark(None)
        event = cuda.event(timing=False)
        event.record(self.numba)
        return Mark(event)

    def wait_for(self, mark: Mark | None) -> None:
        """Let what comes next wait for what was on another stream, or on this one."""
        if mark is not None and mark.event is not None:
            mark.event.wait(self.numba)

    def make_others_wait(self, mark: Mark) -> None:
        """Let those that share arrays with a step go on when it is done."""
        for handle in self.others:
            Stream(handle).wait_for(mark)

    def wait_for_stream(self, handle: int) -> None:
        """Let what comes next wait for what is on another stream so far."""
        self.wait_for(Stream(handle).mark())


DEFAULT = 0


def stream_of(given: Any, arrays: Sequence[Any]) -> Stream:
    """Return the stream to run on, made to wait for those that the arrays are ready on.

    Parameters
    ----------
    given : None, int, or a stream of numba's, CuPy's or torch's
        The caller's wish. None: the first array's.
    arrays : sequence of arrays
        As the caller gave them.
    """
    handles = [handle for handle in map(_stream_of_array, arrays) if handle is not None]
    if given is not None:
        handles.insert(0, _handle_of(given))
    stream = Stream(handles[0] if handles else 0)
    stream.others = tuple(handle for handle in dict.fromkeys(handles) if handle != stream.handle)
    for handle in stream.others:
        stream.wait_for_stream(handle)
    return stream


def _handle_of(stream: Any) -> int:
    for attribute in ("cuda_stream", "ptr"):  # torch's, CuPy's
        handle = getattr(stream, attribute, None)
        if isinstance(handle, int):
            return handle
    if isinstance(stream, int):
        return stream
    return 0 if SIMULATED else int(stream.__cuda_stream__()[1])


def _stream_of_array(array: Any) -> int | None:
    """The stream on which an array is ready: torch's current one, or what its interface says."""
    if type(array).__module__.partition(".")[0] == "torch" or hasattr(array, "data_ptr"):
        torch = sys.modules.get("torch")
        if torch is not None and getattr(getattr(array, "device", None), "type", None) == "cuda":
            return int(torch.cuda.current_stream(array.device).cuda_stream)
        return None
    interface = getattr(array, "__cuda_array_interface__", None)
    handle = None if interface is None else interface.get("stream")
    return None if handle is None else int(handle)


def blocks_for(units: int, at_once: int) -> int:
    """Blocks for a loop over units of which each block does some at once."""
    needed = -(-units // at_once)
    if SIMULATED:
        return min(max(needed, 1), 3)  # more than one, that there is something to go wrong
    most = _BLOCKS_PER_PROCESSOR * int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
    return max(_LEAST_BLOCKS, min(needed, most))


def launch(
    function: Any, blocks: int, threads: int | tuple[int, int], stream: Stream, *arguments: Any
) -> None:
    """Run a kernel on a stream."""
    function[max(blocks, _LEAST_BLOCKS), threads, stream.numba](*arguments)


# --- memory ---------------------------------------------------------------------------------------------


def array_from(given: Any) -> Any:
    """See anything that is on a GPU as one of numba's arrays; nothing is copied, no stream waited for.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        If it cannot be seen so: a torch tensor that requires a gradient, for example.
    """
    if getattr(given, "__cuda_ndarray__", False):
        return given
    if not SIMULATED:
        return cuda.as_cuda_array(given, sync=False)
    return _simulated(given)


def _simulated(given: Any) -> Any:
    """What has an interface in the simulator lies in the memory of the host."""
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    class Memory:
        def __init__(self) -> None:
            self.owner = given
            self.__array_interface__ = {**given.__cuda_array_interface__, "version": 3}

    return FakeCUDAArray(np.asarray(Memory()))


def empty(length: int, dtype: Any) -> Any:
    """Allocate a 1-D array; its content is anything."""
    return cuda.device_array(length, dtype)


def as_one_row(array: Any, length: int) -> Any:
    """See the memory of an array as a contiguous 1-D array of a length, from its first element on."""
    if array.ndim == 1 and array.shape[0] == length and array.strides[0] == array.dtype.itemsize:
        return array
    return strided(array, 0, (length,), (1,))


def strided(array: Any, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """See the memory of a contiguous array otherwise, from an element on; strides count elements.

    Slices of numba's arrays do the same, but list the extent of every row.
    """
    size = array.dtype.itemsize
    in_bytes = tuple(size * stride for stride in strides)
    if SIMULATED:
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        start = array._ary.reshape(-1)[first:] if first else array._ary
        return FakeCUDAArray(np.lib.stride_tricks.as_strided(start, shape, in_bytes))
    from numba.cuda.cudadrv.devicearray import DeviceNDArray

    memory = array.gpu_data.view(first * size) if first else array.gpu_data
    return DeviceNDArray(shape, in_bytes, array.dtype, gpu_data=memory)


def address_of(array: Any) -> int:
    """Address of an array's first element."""
    if SIMULATED:
        return int(array._ary.__array_interface__["data"][0])
    return int(array.__cuda_array_interface__["data"][0])


def is_aligned(array: Any) -> bool:
    """Whether each element lies at a multiple of its size: a GPU reads no other."""
    return all(place % array.dtype.alignment == 0 for place in (address_of(array), *array.strides))


def copy_to_host(array: Any, stream: Stream) -> NDArray[Any]:
    """Copy a contiguous 1-D array to the host, after everything on a stream, and wait for it."""
    out = np.empty(array.shape, array.dtype)
    array.copy_to_host(out, stream=stream.numba)
    stream.synchronize()
    return out


def pinned(length: int, dtype: Any) -> Any:
    """Allocate memory of the host to which a GPU copies without making anybody wait; zeroed."""
    array = np.zeros(length, dtype) if SIMULATED else cuda.pinned_array(length, dtype)
    array[:] = 0
    return array


def copy_later(array: Any, into: Any, stream: Stream) -> None:
    """Copy to `pinned` memory after everything on a stream, and do not wait for it."""
    array.copy_to_host(into, stream=stream.numba)


def upload(given: Any, array: Any, stream: Stream) -> None:
    """Copy from `pinned` memory, which is not to be written to before the stream has done so."""
    array.copy_to_device(given, stream=stream.numba)


def copy_to_device(values: NDArray[Any], stream: Stream) -> Any:
    """Copy an array of the host to the device."""
    array = empty(values.size, values.dtype)
    array.copy_to_device(np.ascontiguousarray(values).reshape(-1), stream=stream.numba)
    stream.synchronize()  # memory of the host may be changed once this returns
    return array


def synchronize() -> None:
    """Wait until the GPU is done with everything."""
    if not SIMULATED:
        cuda.synchronize()


def ordinal_of(array: Any) -> int:
    """Number of the GPU that an array is on."""
    if SIMULATED:
        return 0
    from cuda.bindings import driver

    ordinal = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    error, number = driver.cuPointerGetAttribute(ordinal, address_of(array))
    # An array without elements may have no memory.
    return int(cuda.current_context().device.id) if int(error) else int(number)


def using(ordinal: int) -> AbstractContextManager[Any]:
    """Make a GPU the current one."""
    return nullcontext() if SIMULATED else cuda.gpus[ordinal]
