# SPDX-License-Identifier: Apache-2.0
"""Products of small dense matrices, in tiles whose sums stay in registers.

K. Goto, R. A. van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", ACM Transactions on
Mathematical Software 34: a tile of the product is held in registers while columns of the one factor and rows
of the other stream past. 6 × 16 numbers are 12 of AVX2's 16 registers, 6 of AVX-512's 32 and 24 of NEON's 32.
The compiler does not make this of loops, so a tile is written in its language, as vectors of 16, which it
cuts to what the processor has: 100 GFlops on one Zen 4 core, as OpenBLAS. That cannot be called from a kernel
without SciPy, and has threads of its own.

An element of a product is a sum in the order of k, whatever tile it is in.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, register_jitable

from nb_sparse_adam._src.engine.compile import jit

COLUMNS = 16  # of a tile
_ROWS = 6


def padded(n: int) -> int:
    """Return how many columns a matrix of n columns must have to be cut into tiles."""
    return -(-n // COLUMNS) * COLUMNS


def _tile_of_numpy(rows: int) -> Any:
    """Make the tile that is stepped through: of NumPy's products, for loops of Python would take minutes."""

    def tile(
        a: Any, at: Any, row: Any, step: Any, b: Any, b_at: Any, b_step: Any, n: Any,
        out: Any, to: Any, to_row: Any,
    ) -> None:  # fmt: skip
        k = np.arange(n)
        right = b.reshape(-1)[b_at + k[:, None] * b_step + np.arange(COLUMNS)]
        for r in range(rows):
            left = a.reshape(-1)[at + r * row + k * step]
            out.reshape(-1)[to + r * to_row : to + r * to_row + COLUMNS] = left @ right

    return tile


def _tile_of_loops(rows: int) -> Any:
    """Make the tile whose every load and store is checked."""

    def tile(
        a: Any, at: Any, row: Any, step: Any, b: Any, b_at: Any, b_step: Any, n: Any,
        out: Any, to: Any, to_row: Any,
    ) -> None:  # fmt: skip
        for r in range(rows):
            for c in range(COLUMNS):
                total = a.dtype.type(0)
                for k in range(n):
                    total += a.reshape(-1)[at + r * row + k * step] * b.reshape(-1)[b_at + k * b_step + c]
                out.reshape(-1)[to + r * to_row + c] = total

    return register_jitable(tile)


def _tile(rows: int) -> Any:
    """Make ``tile(a, at, row, step, b, b_at, b_step, n, out, to, to_row)`` for some rows, and 16 columns."""
    if numba.config.DISABLE_JIT:
        return _tile_of_numpy(rows)
    if numba.config.BOUNDSCHECK:
        return _tile_of_loops(rows)

    @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
    def tile(
        typingctx: Any, a: Any, at: Any, row: Any, step: Any, b: Any, b_at: Any, b_step: Any, n: Any,  # noqa: ARG001
        out: Any, to: Any, to_row: Any,  # noqa: ARG001
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def start(array: Any, place: Any) -> Any:
                kind = signature.args[array]
                memory = context.make_array(kind)(context, builder, args[array]).data
                return builder.gep(memory, [place], inbounds=True)

            def vector_at(pointer: Any) -> Any:
                return builder.bitcast(pointer, vector.as_pointer())

            word, size = context.get_data_type(a.dtype), a.dtype.bitwidth // 8
            vector, index = ir.VectorType(word, COLUMNS), ir.IntType(32)
            # Two roundings where there is no instruction for one: `fma` would be a call there.
            fused = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(vector, [vector] * 3),
                f"llvm.fmuladd.v{COLUMNS}f{a.dtype.bitwidth}",
            )
            nothing = ir.Constant(vector, None)
            everywhere = ir.Constant(ir.VectorType(index, COLUMNS), None)
            sums = [cgutils.alloca_once_value(builder, nothing) for _ in range(rows)]
            lines = [
                start(0, builder.add(args[1], builder.mul(args[2], ir.Constant(args[2].type, r))))
                for r in range(rows)
            ]
            first = start(4, args[5])
            with cgutils.for_range(builder, args[7]) as loop:
                right = builder.load(
                    vector_at(builder.gep(first, [builder.mul(loop.index, args[6])], inbounds=True)),
                    align=size,
                )
                offset = builder.mul(loop.index, args[3])
                for line, total in zip(lines, sums, strict=True):
                    one = builder.load(builder.gep(line, [offset], inbounds=True))
                    one = builder.insert_element(ir.Constant(vector, ir.Undefined), one, index(0))
                    left = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), everywhere)
                    builder.store(builder.call(fused, [left, right, builder.load(total)]), total)
            for r, total in enumerate(sums):
                place = builder.add(args[9], builder.mul(args[10], ir.Constant(args[10].type, r)))
                builder.store(builder.load(total), vector_at(start(8, place)), align=size)
            return context.get_dummy_value()

        place = types.intp
        return types.void(a, place, place, place, b, place, place, place, out, place, place), codegen

    return tile


_tall, _flat = _tile(_ROWS), _tile(1)


@jit
def multiply(
    rows: Any, columns: Any, n: Any, a: Any, at: Any, row: Any, step: Any, b: Any, b_at: Any, b_step: Any,
    out: Any, to: Any, to_row: Any,
) -> None:  # fmt: skip
    """Write the product of a (rows, n) and an (n, columns) matrix; columns are a multiple of `COLUMNS`.

    All are pieces of contiguous float arrays, which do not overlap, at places that count elements. Element
    (r, k) of the first is at ``at + r * row + k * step`` of `a`; row k of the second begins at ``b_at + k *
    b_step`` of `b`, and row r of the product at ``to + r * to_row`` of `out`.
    """
    r = 0
    while r + _ROWS <= rows:
        for c in range(0, columns, COLUMNS):
            _tall(a, at + r * row, row, step, b, b_at + c, b_step, n, out, to + r * to_row + c, to_row)
        r += _ROWS
    while r < rows:
        for c in range(0, columns, COLUMNS):
            _flat(a, at + r * row, row, step, b, b_at + c, b_step, n, out, to + r * to_row + c, to_row)
        r += 1
