# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel that steps launch, for real GPUs, where there is none; run by test_cuda_compile.py.

Steps of all forms are called on arrays of the host that pretend to be on a GPU. A launch compiles the kernel
for the types of its arguments instead of running it, and assembles what it becomes. Prints a JSON list.

    python tests/compile_for_gpus.py MAJOR MINOR --save FILE   # the compute capability
    python tests/compile_for_gpus.py MAJOR MINOR --load FILE

Each kernel is compiled for every kind of count and dtype, with wide rows or with those of 5 numbers. What
numba makes of them is the same for all of these GPUs, and takes most of the time: it is written to a file,
from which NVVM, another version of it perhaps, makes code for other ones.
"""

import contextlib
import json
import pickle
import re
import sys
import types
from pathlib import Path

import numba.cuda.dispatcher
import numpy as np
from cuda.core import Linker, LinkerOptions, ObjectCode
from numba import cuda
from numba.cuda.cudadrv import nvvm
from numba.cuda.np.numpy_support import from_dtype
from numba.cuda.types import Array
from numba.cuda.typing.typeof import typeof

from nb_sparse_adam import BagGradient, CSRGradient, RowGradient, SparseAdam
from nb_sparse_adam._src.engine.codecs import Codec
from nb_sparse_adam._src.optimizer import tables_of


class OnHost:
    """An array that looks like one of numba's on a GPU."""

    __cuda_ndarray__ = True

    def __init__(self, array):
        self.array = np.asarray(array)
        self.flags = {"C_CONTIGUOUS": self.array.flags.c_contiguous}
        layout = "C" if self.array.flags.c_contiguous else "A"
        self._numba_type_ = Array(from_dtype(self.array.dtype), self.array.ndim, layout)

    def __getattr__(self, name):
        return getattr(self.array, name)

    def __len__(self):
        return len(self.array)

    def reshape(self, *shape):
        return OnHost(self.array.reshape(*shape))

    def copy_to_device(self, *arguments, **keywords):
        pass


class Fixed(Codec):
    """A state of numbers of 16 bits."""

    name = "fixed"

    @staticmethod
    def storage(real):  # noqa: ARG004
        return np.dtype(np.int16)

    @staticmethod
    def load(word):
        return word / 1024

    @staticmethod
    def store(number):
        return number * 1024


class Compiled:
    def __init__(self, capability):
        self.seen = {}
        self.capability = capability
        self.modules = []  # what NVVM was given last, and its options
        self.compile_ir = nvvm.compile_ir
        nvvm.compile_ir = self.record

    def record(self, modules, **options):
        self.modules = modules, options
        return self.compile_ir(modules, **options)

    def launch(self, function, blocks, threads, stream, *arguments):
        assert blocks > 0
        assert np.prod(threads) <= 1024
        signature = tuple(map(typeof, arguments))
        key = function, signature
        if key in self.seen:
            return
        try:
            ptx, _ = cuda.compile_ptx(function.py_func, signature, cc=self.capability)
        except Exception as error:
            raise RuntimeError(f"{function.py_func.__name__}{signature} for {self.capability}") from error
        self.seen[key] = {"ptx": ptx, "modules": self.modules, **self.assemble(ptx)}

    def load(self, kernel, signature, modules, options):
        """Compile what another process has saved."""
        options["arch"] = "compute_{}{}".format(*self.capability)
        ptx = self.compile_ir(modules, **options).decode().strip("\x00")
        return kernel, signature, {"ptx": ptx, **self.assemble(ptx)}

    def assemble(self, ptx):
        arch = "sm_{}{}".format(*self.capability)
        options = LinkerOptions(arch=arch, ptxas_options=["-v"])
        linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
        code = linker.link("cubin")
        log = linker.get_info_log()
        used = {
            what: int(number)
            for number, what in re.findall(r"(\d+) (registers|bytes spill stores|bytes smem)", log)
        }
        return {"size": len(code.code), "used": used}


def pretend(capability):
    """Put what needs no GPU in the place of what does."""
    compiled = Compiled(capability)
    # Device functions are compiled for the GPU that there is.
    numba.cuda.dispatcher.get_current_device = lambda: types.SimpleNamespace(
        compute_capability=compiled.capability
    )

    class Stream:
        handle, numba, others = 0, 0, ()

        def __init__(self, handle=0):
            pass

        def __getattr__(self, name):
            return lambda *arguments: None

    from nb_sparse_adam._src.cuda import device

    device.launch = compiled.launch
    device.Stream = Stream
    device.stream_of = lambda given, arrays: Stream()
    device.empty = lambda length, dtype: OnHost(np.zeros(length, dtype))
    device.array_from = lambda given: given
    device.as_one_row = lambda array, length: OnHost(
        np.lib.stride_tricks.as_strided(array.array, (length,), (array.dtype.itemsize,))
    )
    device.address_of = lambda array: array.array.ctypes.data // 16 * 16
    device.blocks_for = lambda units, at_once: 128
    device.copy_to_host = lambda array, stream: np.array(array.array)
    device.copy_to_device = lambda values, stream: OnHost(np.ravel(values))
    device.pinned = lambda length, dtype: np.zeros(length, dtype)
    device.copy_later = lambda array, into, stream: None
    device.upload = lambda given, array, stream: None
    device.strided = lambda array, first, shape, strides: array
    device.synchronize = lambda: None
    device.ordinal_of = lambda array: 0
    device.using = lambda ordinal: contextlib.nullcontext()
    return compiled


KINDS = [
    ("element", np.float32, 64), ("element", np.float64, 5), ("row", np.float32, 64), ("row", np.float64, 5),
    ("global", np.float32, 5), ("global", np.float64, 64),
]  # fmt: skip


def steps():
    """Call steps of all forms, of several kinds of table."""
    n, bags = 5000, 250
    offsets, weights = np.arange(bags + 1) * (n // bags), np.ones(n)

    def put(*arrays):
        return [OnHost(array) for array in arrays]

    ids = np.arange(n)
    for step_counts, dtype, dim in KINDS:
        table = OnHost(np.zeros((1000, dim), dtype))
        optimizer = SparseAdam(table, step_counts=step_counts, device_checks="deferred")
        values = np.zeros((n, dim), dtype)
        optimizer.step(RowGradient(*put(ids, values)))
        optimizer.step(BagGradient(*put(ids, offsets, values[:bags])))
        optimizer.step(BagGradient(*put(ids, offsets[:-1], values[:bags]), mode="mean"))
        optimizer.step(BagGradient(*put(ids, offsets, values[:bags], weights.astype(dtype))))
        other = np.float64 if dtype is np.float32 else np.float32
        optimizer.step(RowGradient(*put(ids.astype(np.uint8), values.astype(other))))
        indptr = np.minimum(np.arange(1001), n)
        optimizer.step(CSRGradient(*put(indptr, ids[:1000], weights[:1000].astype(dtype))))
        if dim == 64:
            optimizer.betas = 0.9, 0.9999999  # corrections beyond the table of them
            optimizer.step(RowGradient(*put(ids, values)))
        optimizer.state_dict()
        optimizer.load_state_dict(optimizer.state_dict())
        tables_of(optimizer)["table"]._widen()
    optimizer.step(RowGradient(*put(ids, values)))
    optimizer = SparseAdam(OnHost(np.zeros((1000, 64), np.float32)))
    optimizer.step(RowGradient(*put(ids.astype(np.int32), np.zeros((n, 64), np.float32))))
    tables_of(optimizer)["table"].codec = Fixed()
    optimizer.step(RowGradient(*put(ids, np.zeros((n, 64), np.float32))))


def main():
    capability, what, file = (int(sys.argv[1]), int(sys.argv[2])), sys.argv[3], Path(sys.argv[4])
    if what == "--save":
        compiled = pretend(capability)
        steps()
        from nb_sparse_adam._src.cuda import checks

        compiled.launch(checks.join, 1, 1, None, 0)  # of steps of very many ids
        found = [
            (function.py_func.__name__, str(signature), one)
            for (function, signature), one in compiled.seen.items()
        ]
        file.write_bytes(pickle.dumps([(*key, *one["modules"]) for *key, one in found]))
    else:
        compiled = Compiled(capability)
        found = [compiled.load(*saved) for saved in pickle.loads(file.read_bytes())]
    report = [
        {
            "kernel": kernel,
            "types": signature,
            "capability": capability,
            "fused": len(re.findall(r"\bfma\.rn\.f32", one["ptx"])),
            "vector_loads": len(re.findall(r"ld\.global\S*\.v[24]\.[fu]", one["ptx"])),
            "vector_stores": len(re.findall(r"st\.global\S*\.v[24]\.[fu]", one["ptx"])),
            "bytes_loaded": len(re.findall(r"ld\.global\.u8", one["ptx"])),
            "size": one["size"],
            **one["used"],
        }
        for kernel, signature, one in found
    ]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
