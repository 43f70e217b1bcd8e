"""Vector building blocks of the feed-forward kernel: products of a few rows with a few rows of weights.

Written as `lanes` is, and with its conventions: addresses in bytes, ``vectors`` of `lanes.LANES` elements, ``kind``
names the weights' element type, arithmetic in float32.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from vllm_specplug.kernels.lanes import (
    F32,
    I64,
    LANES,
    _add,
    _at,
    _constant,
    _exp2,
    _fma,
    _read,
    _reduce,
    _splat,
    _width,
    _write,
    prefetch,
)

#: Rows of weights that a tile takes at a time.
CHANNELS = 4


def _row(builder: Any, base: Any, pitch: Any, index: int) -> Any:
    return builder.add(base, builder.mul(pitch, ir.Constant(I64, index)))


def _dots(rows: int, channels: int) -> Any:
    @intrinsic
    def dots(typingctx, kind, x, x_row, w0, w1, w2, w3, n0, n1, n2, n3, vectors, out, out_row):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _, x, x_row, *rest, vectors, out, out_row = args
            weights, coming = rest[:4], rest[4:]
            places = [_row(builder, x, x_row, r) for r in range(rows)]
            sums = [[cgutils.alloca_once_value(builder, _constant(0.0)) for _ in range(channels)] for _ in range(rows)]
            with cgutils.for_range(builder, vectors) as loop:
                step = LANES * _width(kind)
                for c in range(channels):
                    prefetch(builder, _add(builder, coming[c], loop.index, step))
                read = [_read(builder, kind, _add(builder, weights[c], loop.index, step)) for c in range(channels)]
                for r in range(rows):
                    mine = _read(builder, types.float32, _add(builder, places[r], loop.index, LANES * 4))
                    for c in range(channels):
                        builder.store(_fma(builder, mine, read[c], builder.load(sums[r][c])), sums[r][c])
            for r in range(rows):
                for c in range(channels):
                    total = _reduce(builder, builder.load(sums[r][c]), builder.fadd)
                    builder.store(total, _at(builder, _row(builder, builder.add(out, I64(4 * c)), out_row, r), F32))
            return context.get_dummy_value()

        return types.void(kind, *[types.int64] * 13), codegen

    return dots


#: ``dots_R_C(kind, x, x_row, w0, .. w3, n0, .. n3, vectors, out, out_row)``: ``out[r, c]`` = float32 row ``r`` of x
#: times weights ``w<c>``, for R rows and C rows of weights, while the rows ``n<c>`` are brought nearer; addresses of
#: rows beyond C are not used.
dots_4_4, dots_2_4, dots_1_4 = _dots(4, 4), _dots(2, 4), _dots(1, 4)
dots_4_1, dots_2_1, dots_1_1 = _dots(4, 1), _dots(2, 1), _dots(1, 1)


def _factor(builder: Any, address: Any) -> Any:
    return _splat(builder, builder.load(_at(builder, address, F32)))


def _adds(rows: int, channels: int) -> Any:
    @intrinsic
    def adds(typingctx, kind, a, a_row, w0, w1, w2, w3, n0, n1, n2, n3, vectors, out, out_row):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _, a, a_row, *rest, vectors, out, out_row = args
            weights, coming = rest[:4], rest[4:]
            factors = [
                [_factor(builder, _row(builder, builder.add(a, I64(4 * c)), a_row, r)) for c in range(channels)]
                for r in range(rows)
            ]
            places = [_row(builder, out, out_row, r) for r in range(rows)]
            with cgutils.for_range(builder, vectors) as loop:
                step = LANES * _width(kind)
                for c in range(channels):
                    prefetch(builder, _add(builder, coming[c], loop.index, step))
                read = [_read(builder, kind, _add(builder, weights[c], loop.index, step)) for c in range(channels)]
                for r in range(rows):
                    place = _add(builder, places[r], loop.index, LANES * 4)
                    total = _read(builder, types.float32, place)
                    for c in range(channels):
                        total = _fma(builder, factors[r][c], read[c], total)
                    _write(builder, types.float32, total, place)
            return context.get_dummy_value()

        return types.void(kind, *[types.int64] * 13), codegen

    return adds


#: ``adds_R_C(kind, a, a_row, w0, .. w3, n0, .. n3, vectors, out, out_row)``: ``out[r]`` += the sum over c of
#: ``a[r, c] * w<c>``, otherwise as `dots_4_4`.
adds_4_4, adds_2_4, adds_1_4 = _adds(4, 4), _adds(2, 4), _adds(1, 4)
adds_4_1, adds_2_1, adds_1_1 = _adds(4, 1), _adds(2, 1), _adds(1, 1)


@intrinsic
def silu_union(typingctx, gate, gate_row, rows, vectors, tau, union):  # type: ignore[no-untyped-def]
    """Replace each float32 g of ``gate[rows, vectors]`` by SiLU(g); byte i of ``union`` becomes 1 where some row's
    column i is not below ``tau`` in magnitude, else 0."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        gate, gate_row, rows, vectors, tau, union = args
        tau = _splat(builder, tau)
        bits = ir.VectorType(ir.IntType(1), LANES)
        seen = cgutils.alloca_once(builder, bits)
        with cgutils.for_range(builder, vectors) as column:
            builder.store(ir.Constant(bits, [0] * LANES), seen)
            with cgutils.for_range(builder, rows) as row:
                line = builder.add(gate, builder.mul(row.index, gate_row))
                place = _add(builder, line, column.index, LANES * 4)
                g = _read(builder, types.float32, place)
                negative = builder.fcmp_ordered("olt", g, _constant(0.0))
                size = builder.select(negative, g, builder.fneg(g))
                # A power of a number that is not positive cannot overflow.
                power = _exp2(builder, builder.fmul(size, _constant(math.log2(math.e))))
                share = builder.fdiv(
                    builder.select(negative, power, _constant(1.0)), builder.fadd(power, _constant(1.0))
                )
                act = builder.fmul(g, share)
                _write(builder, types.float32, act, place)
                small = builder.fcmp_ordered("olt", builder.select(negative, builder.fneg(act), act), tau)
                builder.store(builder.or_(builder.load(seen), builder.not_(small)), seen)
            bytes_ = builder.zext(builder.load(seen), ir.VectorType(ir.IntType(8), LANES))
            builder.store(bytes_, _at(builder, _add(builder, union, column.index, LANES), bytes_.type), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32, types.int64), codegen


@intrinsic
def load_byte(typingctx, address, index):  # type: ignore[no-untyped-def]
    """The byte at ``address + index``, as int64."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.zext(builder.load(_at(builder, builder.add(args[0], args[1]), ir.IntType(8))), I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def store_byte(typingctx, address, index, value):  # type: ignore[no-untyped-def]
    """Write ``value`` to the byte at ``address + index``."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        byte = ir.IntType(8)
        builder.store(builder.trunc(args[2], byte), _at(builder, builder.add(args[0], args[1]), byte))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def add_wide(typingctx, address, index, value):  # type: ignore[no-untyped-def]
    """Add ``value`` to the int64 at ``address + 8 * index``, atomically."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.atomic_rmw("add", _at(builder, _add(builder, args[0], args[1], 8), I64), args[2], "monotonic")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def row_add(typingctx, source, target, vectors):  # type: ignore[no-untyped-def]
    """``target[i] += source[i]``, float32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        with cgutils.for_range(builder, args[2]) as loop:
            place = _add(builder, args[1], loop.index, LANES * 4)
            more = _read(builder, types.float32, _add(builder, args[0], loop.index, LANES * 4))
            total = builder.fadd(_read(builder, types.float32, place), more)
            _write(builder, types.float32, total, place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
