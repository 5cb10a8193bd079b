# SPDX-License-Identifier: Apache-2.0
"""What a parallel driver does around its loop, in the native call that the loop is in.

* numba's number of threads, which belongs to the calling thread, is set for the loop and put back: no Python
  exception can come in between, and no other thread sees it.
* Every thread of the loop computes in the calling thread's mode. A processor's mode belongs to a thread:
  threads that numba started long ago do not know that the caller flushes subnormal numbers to zero
  (``torch.set_flush_denormal``), and the bits would depend on the number of threads.

A driver is written ::

    before, mode = swap_threads(threads), float_mode()
    for t in prange(...):
        own = swap_float_mode(mode)
        ...
        swap_float_mode(own)
    swap_threads(before)

With NUMBA_DISABLE_JIT the loop runs in the calling thread, and there is nothing to do. The mode of a
processor that is neither x86 nor ARM is left alone.
"""

from __future__ import annotations

import platform
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_MACHINE = platform.machine().lower()
_X86, _ARM = _MACHINE in ("x86_64", "amd64"), _MACHINE in ("aarch64", "arm64")
_X86_FLAGS = 0x3F  # of MXCSR: what has happened (inexact, underflow ...), and no part of the mode

if numba.config.DISABLE_JIT:

    def get_threads() -> Any:
        """Return on how many threads this thread's loops run."""
        return numba.get_num_threads()

    def swap_threads(number: Any) -> Any:
        """Have this thread's loops run on so many threads; return how many it was."""
        return number

    def float_mode() -> Any:
        """Return the mode in which this thread computes: rounding, and what becomes of subnormal numbers."""
        return 0

    def swap_float_mode(mode: Any) -> Any:
        """Have this thread compute in a mode that `float_mode` gave; return the one it was in."""
        return mode

else:
    _I32, _I64, _VOID = ir.IntType(32), ir.IntType(64), ir.VoidType()

    def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
        """Call a function of numba's threads, or an intrinsic of LLVM's."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)

    def _read_mode(builder: Any) -> Any:
        if _X86:
            place = cgutils.alloca_once(builder, _I32)
            _call(builder, "llvm.x86.sse.stmxcsr", _VOID, builder.bitcast(place, cgutils.voidptr_t))
            return builder.zext(builder.and_(builder.load(place), _I32(~_X86_FLAGS & 0xFFFF)), _I64)
        return _call(builder, "llvm.aarch64.get.fpcr", _I64) if _ARM else _I64(0)

    def _write_mode(builder: Any, mode: Any) -> None:
        builder.fence("seq_cst", "singlethread")  # no instruction: what is loaded after is computed after
        if _X86:
            place = cgutils.alloca_once_value(builder, builder.trunc(mode, _I32))
            _call(builder, "llvm.x86.sse.ldmxcsr", _VOID, builder.bitcast(place, cgutils.voidptr_t))
        elif _ARM:
            _call(builder, "llvm.aarch64.set.fpcr", _VOID, mode)
        builder.fence("seq_cst", "singlethread")

    @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
    def get_threads(typingctx: Any) -> Any:  # noqa: ARG001 (numba fixes the signature)
        """Return on how many threads this thread's loops run."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            return builder.trunc(_call(builder, "get_num_threads", _I64), _I32)  # numba's is an int of C

        return types.int32(), codegen

    @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
    def swap_threads(typingctx: Any, number: Any) -> Any:  # noqa: ARG001
        """Have this thread's loops run on so many threads; return how many it was."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            before = _call(builder, "get_num_threads", _I64)
            _call(builder, "set_num_threads", _VOID, builder.trunc(args[0], _I32))
            return before

        return types.int64(types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
    def float_mode(typingctx: Any) -> Any:  # noqa: ARG001
        """Return the mode in which this thread computes: rounding, and what becomes of subnormal numbers."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            return _read_mode(builder)

        return types.int64(), codegen

    @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
    def swap_float_mode(typingctx: Any, mode: Any) -> Any:  # noqa: ARG001
        """Have this thread compute in a mode that `float_mode` gave; return the one it was in."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
            before = _read_mode(builder)
            _write_mode(builder, args[0])
            return before

        return types.int64(types.int64), codegen
