"""Matrix products of a few rows with rows in memory, as register tiles; written as `lanes` is, with its conventions."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic
from vllm_specplug.kernels import lanes
from vllm_specplug.kernels.lanes import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    Value,
    _add,
    _at,
    _bf16,
    _constant,
    _fma,
    _load,
    _read,
    _splat,
    _width,
    _write,
)
from vllm_specplug.kernels.memory import kernel

#: Vectors of a register tile's row: with 6 rows these fill, but do not exceed, the registers.
WIDE = 4 if LANES == 16 else 2


def _multiplies_pairs() -> bool:
    # Numba can be told to compile for another processor than this one.
    other = config.CPU_NAME or config.CPU_FEATURES is not None or not config.ENABLE_AVX
    return LANES == 16 and not other and bool(binding.get_host_cpu_features().get("avx512bf16"))


#: `lanes.KINDS` for products: bfloat16 is multiplied in pairs if this machine can.
KINDS = lanes.KINDS | ({"bfloat16": np.int8(0)} if _multiplies_pairs() else {})


def _multiply_single(builder, kind, starts, b, ldb, vectors, depth, sums):  # type: ignore[no-untyped-def]
    """Add to ``sums`` the product of float32 rows at ``starts`` and ``depth`` rows of ``vectors`` vectors at ``b``."""
    with cgutils.for_range(builder, depth) as loop:
        here = builder.add(b, builder.mul(loop.index, ldb))
        columns = [_read(builder, kind, builder.add(here, I64(v * LANES * _width(kind)))) for v in range(vectors)]
        for r, start in enumerate(starts):
            factor = _splat(builder, builder.load(_at(builder, _add(builder, start, loop.index, 4), F32)))
            for v in range(vectors):
                builder.store(_fma(builder, factor, columns[v], builder.load(sums[r, v])), sums[r, v])


def _multiply_pairs(builder, starts, b, ldb, vectors, depth, sums):  # type: ignore[no-untyped-def]
    """The same for bfloat16 rows: one operation multiplies, in each lane, two neighbours of a row with two rows of B.

    Denormals count as 0, and a lane's two products are rounded one after the other.
    """
    together = 2 if vectors % 2 == 0 else 1
    width = together * LANES

    def add(pair: Value, single: bool) -> None:
        upper = builder.add(b, builder.mul(builder.mul(pair, I64(2)), ldb))
        columns = []
        for v in range(0, vectors, together):
            place = builder.add(upper, I64(v * LANES * 2))
            row = _load(builder, place, I16, width, 2)
            none = ir.Constant(row.type, [0] * width)
            below = none if single else _load(builder, builder.add(place, ldb), I16, width, 2)
            for first in range(0, width, LANES):
                order = [at + half * width for at in range(first, first + LANES) for half in (0, 1)]
                mixed = builder.shuffle_vector(row, below, ir.Constant(ir.VectorType(I32, 2 * LANES), order))
                columns.append(builder.bitcast(mixed, ir.VectorType(I32, LANES)))
        for r, start in enumerate(starts):
            at = _add(builder, start, pair, 4)
            if single:  # what follows the row's last element may be anything, even NaN
                factor = builder.zext(builder.load(_at(builder, at, I16), align=2), I32)
            else:
                factor = builder.load(_at(builder, at, I32), align=2)
            factor = _splat(builder, factor)
            for v in range(vectors):
                args = (builder.load(sums[r, v]), factor, columns[v])
                builder.store(_bf16(builder, "dpbf16ps", args[0].type, *args), sums[r, v])

    pairs = builder.lshr(depth, I64(1))
    with cgutils.for_range(builder, pairs) as loop:
        add(loop.index, False)
    with builder.if_then(builder.trunc(depth, ir.IntType(1))):
        add(pairs, True)


def _tile(rows: int, vectors: int) -> Any:
    @intrinsic
    def tile(typingctx, kind, a, lda, b, ldb, c, ldc, depth, keep):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _, a, lda, b, ldb, c, ldc, depth, keep = args
            keep = builder.icmp_signed("!=", keep, ir.Constant(I64, 0))
            places, sums = {}, {}
            for r in range(rows):
                for v in range(vectors):
                    place = builder.add(builder.add(c, builder.mul(ldc, ir.Constant(I64, r))), I64(v * LANES * 4))
                    before = _load(builder, place, F32, LANES, 4)
                    places[r, v] = place
                    sums[r, v] = cgutils.alloca_once_value(builder, builder.select(keep, before, _constant(0.0)))
            starts = [builder.add(a, builder.mul(lda, ir.Constant(I64, r))) for r in range(rows)]
            if kind == types.int8:
                _multiply_pairs(builder, starts, b, ldb, vectors, depth, sums)
            else:
                _multiply_single(builder, kind, starts, b, ldb, vectors, depth, sums)
            for key, place in places.items():
                _write(builder, types.float32, builder.load(sums[key]), place)
            return context.get_dummy_value()

        return types.void(kind, *[types.int64] * 8), codegen

    return tile


#: ``tile_R_V(kind, a, lda, b, ldb, c, ldc, depth, keep)``: C += A B for R rows of A and float32 C and V vectors of
#: columns of B (``kind``), or C = A B where ``keep`` is 0. A is float32, for ``np.int8`` bfloat16. ``ld*`` are bytes
#: from one row to the next.
tile_6_wide, tile_3_wide, tile_1_wide = _tile(6, WIDE), _tile(3, WIDE), _tile(1, WIDE)
tile_6_2, tile_3_2, tile_1_2 = _tile(6, 2), _tile(3, 2), _tile(1, 2)
tile_6_1, tile_3_1, tile_1_1 = _tile(6, 1), _tile(3, 1), _tile(1, 1)


@kernel
def multiply(kind, a, lda, b, ldb, element, c, ldc, rows, vectors, depth, keep):  # type: ignore[no-untyped-def]
    """C (+)= A B, see `tile_6_wide`; B is read once per six rows while it is in the nearest cache."""
    v = 0
    while v < vectors:
        wide = WIDE if vectors - v >= WIDE else 2 if vectors - v >= 2 else 1
        columns = b + v * LANES * element
        r = 0
        while r < rows:
            left = rows - r
            taken = 6 if left >= 6 else 3 if left >= 3 else 1
            x = a + r * lda
            y = c + r * ldc + v * LANES * 4
            if wide == WIDE:
                if taken == 6:
                    tile_6_wide(kind, x, lda, columns, ldb, y, ldc, depth, keep)
                elif taken == 3:
                    tile_3_wide(kind, x, lda, columns, ldb, y, ldc, depth, keep)
                else:
                    tile_1_wide(kind, x, lda, columns, ldb, y, ldc, depth, keep)
            elif wide == 2:
                if taken == 6:
                    tile_6_2(kind, x, lda, columns, ldb, y, ldc, depth, keep)
                elif taken == 3:
                    tile_3_2(kind, x, lda, columns, ldb, y, ldc, depth, keep)
                else:
                    tile_1_2(kind, x, lda, columns, ldb, y, ldc, depth, keep)
            else:
                if taken == 6:
                    tile_6_1(kind, x, lda, columns, ldb, y, ldc, depth, keep)
                elif taken == 3:
                    tile_3_1(kind, x, lda, columns, ldb, y, ldc, depth, keep)
                else:
                    tile_1_1(kind, x, lda, columns, ldb, y, ldc, depth, keep)
            r += taken
        v += wide
