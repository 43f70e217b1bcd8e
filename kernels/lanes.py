"""Vector building blocks for compiled kernels: rows of floats and exponentials; `products` has matrix products.

Numba has no vector values and its automatic vectoriser is not dependable for register tiles, so these intrinsics emit
LLVM vectors of `LANES` floats themselves. All arithmetic is float32. Memory is named by byte addresses (int64) without
bounds checks; ``vectors`` counts groups of `LANES` elements.

``kind`` arguments only matter by their type, which names the element type in memory: ``np.float32`` float32,
``np.int16`` bfloat16, ``np.uint16`` float16. Pass `KINDS`' values. ``np.int8`` is bfloat16 too, but products take their
other factor in bfloat16 as well and multiply pairs of elements (AVX512_BF16), see `products.KINDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)

#: torch dtype name: marker whose type selects the element type.
KINDS = {"float32": np.float32(0), "bfloat16": np.int16(0), "float16": np.uint16(0)}


def _lanes() -> int:
    features = binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx") else 4


#: Floats per vector on this machine; always divides 16.
LANES = _lanes()

#: Bytes of a cache line.
LINE = 64

Builder = Any
Value = Any


def _width(kind: types.Type) -> int:
    return 4 if kind == types.float32 else 2


def _memory(kind: types.Type) -> ir.Type:
    return {types.float32: F32, types.int16: I16, types.int8: I16, types.uint16: ir.HalfType()}[kind]


def _factor(kind: types.Type) -> types.Type:
    """Kind of the other factor of a product with elements of ``kind``."""
    return types.int8 if kind == types.int8 else types.float32


def _constant(number: float) -> ir.Constant:
    # Rounded to float32 first: LLVM rejects a float constant with more bits.
    return ir.Constant(ir.VectorType(F32, LANES), [float(np.float32(number))] * LANES)


def _words(number: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, LANES), [number] * LANES)


def _at(builder: Builder, address: Value, element: ir.Type) -> Value:
    return builder.inttoptr(address, element.as_pointer())


def _load(builder: Builder, address: Value, element: ir.Type, lanes: int, align: int) -> Value:
    return builder.load(_at(builder, address, ir.VectorType(element, lanes)), align=align)


def _floats(builder: Builder, kind: types.Type, vector: Value, lanes: int) -> Value:
    """Elements of ``kind`` as float32."""
    target = ir.VectorType(F32, lanes)
    if kind in (types.int16, types.int8):
        wide = builder.zext(vector, ir.VectorType(I32, lanes))
        return builder.bitcast(builder.shl(wide, ir.Constant(wide.type, [16] * lanes)), target)
    return vector if kind == types.float32 else builder.fpext(vector, target)


def _read(builder: Builder, kind: types.Type, address: Value) -> Value:
    """`LANES` elements as float32."""
    return _floats(builder, kind, _load(builder, address, _memory(kind), LANES, _width(kind)), LANES)


def _bf16(builder: Builder, name: str, result: ir.Type, *args: Value) -> Value:
    """An operation of AVX512_BF16; LLVM takes bfloat16 as words of 16 bits, or pairs as words of 32, from old times."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512bf16.{name}.512"), args)


def _write(builder: Builder, kind: types.Type, vector: Value, address: Value) -> None:
    """Round `LANES` float32 to ``kind`` (to nearest, ties to even) and store them."""
    if kind == types.int8:
        vector = _bf16(builder, "cvtneps2bf16", ir.VectorType(I16, LANES), vector)
    elif kind == types.int16:
        bits = builder.bitcast(vector, ir.VectorType(I32, LANES))
        odd = builder.and_(builder.lshr(bits, _words(16)), _words(1))
        rounded = builder.lshr(builder.add(builder.add(bits, odd), _words(0x7FFF)), _words(16))
        # The carry of the rounding would turn some NaNs into infinities.
        rounded = builder.select(builder.fcmp_unordered("uno", vector, vector), _words(0x7FC0), rounded)
        vector = builder.trunc(rounded, ir.VectorType(I16, LANES))
    elif kind == types.uint16:
        vector = builder.fptrunc(vector, ir.VectorType(ir.HalfType(), LANES))
    builder.store(vector, _at(builder, address, vector.type), align=_width(kind))


def _splat(builder: Builder, scalar: Value) -> Value:
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, undefined, _words(0))


def _reduce(builder: Builder, vector: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """One number from all lanes."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        halves = [ir.Constant(ir.VectorType(I32, lanes), list(range(h * lanes, h * lanes + lanes))) for h in (0, 1)]
        vector = combine(*(builder.shuffle_vector(vector, vector, half) for half in halves))
    return builder.extract_element(vector, ir.Constant(I32, 0))


def _fma(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _bigger(builder: Builder, a: Value, b: Value) -> Value:
    return builder.select(builder.fcmp_ordered("ogt", a, b), a, b)


def _smaller(builder: Builder, a: Value, b: Value) -> Value:
    return builder.select(builder.fcmp_ordered("olt", a, b), a, b)


def _exp2(builder: Builder, x: Value) -> Value:
    """2^x for x <= 0, 0 below -126; relative error 2e-7."""
    vanishes = builder.fcmp_ordered("olt", x, _constant(-126.0))
    x = _bigger(builder, x, _constant(-126.0))
    # Adding 1.5 * 2^23 leaves x, rounded to an integer, in the low bits.
    shifted = builder.fadd(x, _constant(12582912.0))
    rest = builder.fsub(x, builder.fsub(shifted, _constant(12582912.0)))
    # Taylor's ln(2)^n / n!: the rest is in [-1/2, 1/2], where the first term left out is below 6e-9.
    power = _constant(math.log(2) ** 7 / math.factorial(7))
    for n in range(6, -1, -1):
        power = _fma(builder, power, rest, _constant(math.log(2) ** n / math.factorial(n)))
    exponent = builder.shl(builder.bitcast(shifted, ir.VectorType(I32, LANES)), _words(23))
    scaled = builder.add(builder.bitcast(power, exponent.type), exponent)
    return builder.select(vanishes, _constant(0.0), builder.bitcast(scaled, x.type))


def _add(builder: Builder, address: Value, index: Value, step: int) -> Value:
    return builder.add(address, builder.mul(index, ir.Constant(I64, step)))


def _fold(start: float, combine: Callable[[Builder, Value, Value], Value]) -> Any:
    @intrinsic
    def fold(typingctx, kind, row, vectors):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _, row, vectors = args
            best = cgutils.alloca_once_value(builder, _constant(start))
            with cgutils.for_range(builder, vectors) as loop:
                values = _read(builder, kind, _add(builder, row, loop.index, LANES * _width(kind)))
                builder.store(combine(builder, values, builder.load(best)), best)
            return _reduce(builder, builder.load(best), lambda a, b: combine(builder, a, b))

        return types.float32(kind, types.int64, types.int64), codegen

    return fold


#: ``row_largest(kind, row, vectors)``, and so on: one float32 of the elements of a row.
row_largest = _fold(-math.inf, _bigger)
row_smallest = _fold(math.inf, _smaller)
row_sum = _fold(0.0, lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def row_add(typingctx, source, target, vectors, factor):  # type: ignore[no-untyped-def]
    """``target[i] += factor * source[i]``, float32 rows."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, target, vectors, factor = args
        factor = _splat(builder, factor)
        with cgutils.for_range(builder, vectors) as loop:
            place = _add(builder, target, loop.index, LANES * 4)
            values = _read(builder, types.float32, _add(builder, source, loop.index, LANES * 4))
            _write(builder, types.float32, _fma(builder, factor, values, _read(builder, types.float32, place)), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def row_signs(typingctx, source, positive, negative, vectors):  # type: ignore[no-untyped-def]
    """Split a float32 row into its positive and its negative part, zero elsewhere."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, positive, negative, vectors = args
        with cgutils.for_range(builder, vectors) as loop:
            values = _read(builder, types.float32, _add(builder, source, loop.index, LANES * 4))
            for target, pick in ((positive, _bigger), (negative, _smaller)):
                place = _add(builder, target, loop.index, LANES * 4)
                _write(builder, types.float32, pick(builder, values, _constant(0.0)), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def row_weights(typingctx, kind, row, vectors, scale, shift):  # type: ignore[no-untyped-def]
    """Replace each x of a float32 row by 2^(scale x - shift), ``shift`` being no less than any scale x; their sum.

    They are written, from the row's beginning, as what products with ``kind`` take; so rounded, they are summed.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, row, vectors, scale, shift = args
        target = _factor(signature.args[0])
        total = cgutils.alloca_once_value(builder, _constant(0.0))
        scale, shift = _splat(builder, scale), _splat(builder, shift)
        with cgutils.for_range(builder, vectors) as loop:
            x = _read(builder, types.float32, _add(builder, row, loop.index, LANES * 4))
            power = _exp2(builder, _fma(builder, x, scale, builder.fneg(shift)))
            place = _add(builder, row, loop.index, LANES * _width(target))
            _write(builder, target, power, place)
            if target != types.float32:
                power = _read(builder, target, place)
            builder.store(builder.fadd(builder.load(total), power), total)
        return _reduce(builder, builder.load(total), builder.fadd)

    return types.float32(kind, types.int64, types.int64, types.float32, types.float32), codegen


@intrinsic
def factor_width(typingctx, kind):  # type: ignore[no-untyped-def]
    """Bytes of an element of the rows that are multiplied with elements of ``kind``."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return I64(_width(_factor(signature.args[0])))

    return types.int64(kind), codegen


@intrinsic
def row_factors(typingctx, kind, source, target, vectors, times):  # type: ignore[no-untyped-def]
    """``target[i] = times * source[i]``, from elements of ``kind`` to what products with ``kind`` take."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, source, target, vectors, times = args
        times = _splat(builder, times)
        read = signature.args[0]
        write = _factor(read)
        with cgutils.for_range(builder, vectors) as loop:
            values = _read(builder, read, _add(builder, source, loop.index, LANES * _width(read)))
            place = _add(builder, target, loop.index, LANES * _width(write))
            _write(builder, write, builder.fmul(values, times), place)
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def exp2(typingctx, x):  # type: ignore[no-untyped-def]
    """2^x for a float32 x <= 0."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.extract_element(_exp2(builder, _splat(builder, args[0])), ir.Constant(I32, 0))

    return types.float32(types.float32), codegen


@intrinsic
def row_copy(typingctx, read_kind, source, write_kind, target, vectors, factor):  # type: ignore[no-untyped-def]
    """``target[i] = factor * source[i]``, from elements of one kind to elements of another."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        factor = _splat(builder, args[5])
        with cgutils.for_range(builder, args[4]) as loop:
            values = _read(builder, read_kind, _add(builder, args[1], loop.index, LANES * _width(read_kind)))
            place = _add(builder, args[3], loop.index, LANES * _width(write_kind))
            _write(builder, write_kind, builder.fmul(values, factor), place)
        return context.get_dummy_value()

    return types.void(read_kind, types.int64, write_kind, types.int64, types.int64, types.float32), codegen


@intrinsic
def row_gather(typingctx, kind, source, table, target, vectors, run):  # type: ignore[no-untyped-def]
    """``target[i] = source[table[i]]``, elements of one kind; ``table`` is int32.

    ``run`` says what is known of the table: 1 if each vector's elements lie side by side, 2 if every second one does
    (and an even number of elements ends the source), 0 if nothing.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, source, table, target, vectors, run = args
        width = _width(kind)
        word = ir.IntType(8 * width)
        several = ir.VectorType(word, LANES)
        known = builder.icmp_signed("!=", run, ir.Constant(I64, 0))
        paired = builder.icmp_signed("==", run, ir.Constant(I64, 2))

        def offset(index: Value) -> Value:
            return builder.sext(builder.load(_at(builder, _add(builder, table, index, 4), I32)), I64)

        with builder.if_else(known) as (fast, slow):
            with fast, cgutils.for_range(builder, vectors) as loop:
                first = offset(builder.mul(loop.index, ir.Constant(I64, LANES)))
                place = _at(builder, _add(builder, target, loop.index, LANES * width), several)
                with builder.if_else(paired) as (pairs, single):
                    with pairs:
                        odd = builder.and_(first, ir.Constant(I64, 1))
                        even = _add(builder, source, builder.sub(first, odd), width)
                        both = _load(builder, even, word, 2 * LANES, width)
                        lanes = [
                            builder.shuffle_vector(
                                both, both, ir.Constant(ir.VectorType(I32, LANES), list(range(half, 2 * LANES, 2)))
                            )
                            for half in (0, 1)
                        ]
                        chosen = builder.select(builder.trunc(odd, ir.IntType(1)), lanes[1], lanes[0])
                        builder.store(chosen, place, align=width)
                    with single:
                        values = _load(builder, _add(builder, source, first, width), word, LANES, width)
                        builder.store(values, place, align=width)
            with slow, cgutils.for_range(builder, builder.mul(vectors, ir.Constant(I64, LANES))) as loop:
                value = builder.load(_at(builder, _add(builder, source, offset(loop.index), width), word))
                builder.store(value, _at(builder, _add(builder, target, loop.index, width), word))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 5), codegen


@intrinsic
def row_hide(typingctx, row, bytes_, vectors):  # type: ignore[no-untyped-def]
    """Put minus infinity into a float32 row wherever ``bytes_``, as many bytes as the row has elements, are 0."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        row, bytes_, vectors = args
        with cgutils.for_range(builder, vectors) as loop:
            place = _add(builder, row, loop.index, LANES * 4)
            seen = _load(builder, _add(builder, bytes_, loop.index, LANES), ir.IntType(8), LANES, 1)
            values = _read(builder, types.float32, place)
            empty = builder.icmp_unsigned("==", seen, ir.Constant(seen.type, [0] * LANES))
            _write(builder, types.float32, builder.select(empty, _constant(-np.inf), values), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def prefetch(builder: Builder, address: Value) -> None:
    """Ask for the cache line at an address, which may be any: a hint."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # To read; data; into the second nearest cache, which may wait for more lines at once: half the time of the nearest.
    builder.call(function, [builder.inttoptr(address, byte), I32(0), I32(2), I32(1)])


@intrinsic
def rows_fetch(typingctx, address, pitch, rows, width):  # type: ignore[no-untyped-def]
    """Ask for ``rows`` rows of ``width`` bytes, ``pitch`` bytes apart, ahead of their use."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        address, pitch, rows, width = args
        lines = builder.sdiv(builder.add(width, I64(LINE - 1)), I64(LINE))
        with cgutils.for_range(builder, rows) as row:
            first = builder.add(address, builder.mul(row.index, pitch))
            with cgutils.for_range(builder, lines) as line:
                prefetch(builder, _add(builder, first, line.index, LINE))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def load_wide(typingctx, address, index):  # type: ignore[no-untyped-def]
    """The int64 at ``address + 8 * index``."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(_at(builder, _add(builder, args[0], args[1], 8), I64))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def take_number(typingctx, address, index):  # type: ignore[no-untyped-def]
    """Add 1 to the int64 at ``address + 8 * index`` and return what it was, atomically."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = _at(builder, _add(builder, args[0], args[1], 8), I64)
        return builder.atomic_rmw("add", place, ir.Constant(I64, 1), "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def load_number(typingctx, address, index):  # type: ignore[no-untyped-def]
    """The float32 at ``address + 4 * index``, as it is."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(_at(builder, _add(builder, args[0], args[1], 4), F32))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def store_number(typingctx, address, index, number):  # type: ignore[no-untyped-def]
    """Write a float32 to ``address + 4 * index``."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store(args[2], _at(builder, _add(builder, args[0], args[1], 4), F32))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def copy_element(typingctx, kind, source, index, target, place):  # type: ignore[no-untyped-def]
    """Copy element ``index`` of ``source`` to element ``place`` of ``target``, bit by bit."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, source, index, target, place = args
        word = ir.IntType(8 * _width(kind))
        value = builder.load(_at(builder, _add(builder, source, index, _width(kind)), word))
        builder.store(value, _at(builder, _add(builder, target, place, _width(kind)), word))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 4), codegen
