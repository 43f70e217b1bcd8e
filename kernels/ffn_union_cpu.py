"""A gated feed-forward layer on the CPU that reads only the weights of channels some row's gate opens.

Once per layer ``packed = pack_ffn(gate, up, down)``, a copy of its weights; per step ``ffn_union_cpu(x, packed, tau,
out)`` (see `ffn_union` for what it computes). The copy keeps, per channel, the row of the up projection and the column
of the down projection side by side, so that each open channel is one run of memory. One call at a time, for calls
share their working memory. Where torch has several threads, a call uses the same ones, through their OpenMP library.

How it works. The gate's product is dense. Its SiLU is compared with tau a vector at a time; the open channels are
listed. Four of them at a time are multiplied with all rows (up), weighted with the rows' activations and added to all
rows of the output (down), while the next four are on their way from memory. Threads share the channels and are summed
at the end in a fixed order.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from vllm_specplug.kernels import ffn_lanes, lanes
from vllm_specplug.kernels.ffn_lanes import CHANNELS
from vllm_specplug.kernels.ffn_union import DTYPES
from vllm_specplug.kernels.lanes import LANES
from vllm_specplug.kernels.memory import c_callable, kernel, load, sources_stamp, store
from vllm_specplug.kernels.tree_attention_cpu import _gomp_parallel

__all__ = ["MOST_ROWS", "PackedFfn", "ffn_union_cpu", "pack_ffn"]

#: Rows of one call; beyond, few channels are closed for all rows.
MOST_ROWS = 128
# A call's work is shared by threads from this many multiplications and additions on, about 10 us of one thread.
PARALLEL_WORK = 2_000_000

# Rows of the gate projection that are asked for in advance.
AHEAD = 6 * CHANNELS

# Words of a call's description, all int64 but tau.
X, OUT, X_ROW, OUT_ROW, ROWS, GATE, PAIRS, WIDTH, CHANNEL_COUNT = range(9)
ELEMENT, SCRATCH, SCRATCH_BYTES, UNION, PARTS, NEXT_PART, OPEN, TAU = range(9, 17)
_CALL = struct.Struct("=16qf4x")


@dataclass(frozen=True, slots=True, eq=False)
class PackedFfn:
    """Weights of one layer. ``width`` is H rounded up to whole vectors; what is beyond H is 0.

    Attributes:
        gate: ``[I, width]`` rows of the gate projection.
        pairs: ``[I, 2, width]`` rows of the up projection and columns of the down projection.
        hidden_size: H.
    """

    gate: torch.Tensor
    pairs: torch.Tensor
    hidden_size: int

    @property
    def nbytes(self) -> int:
        """Memory of the copy."""
        return self.gate.nbytes + self.pairs.nbytes


def pack_ffn(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> PackedFfn:
    """Copy a layer's weights: ``gate`` and ``up`` ``[I, H]``, ``down`` ``[H, I]``, all float32 or all bfloat16.

    Raises:
        ValueError: other shapes or dtypes.
    """
    channels, hidden = gate.shape
    if up.shape != (channels, hidden) or down.shape != (hidden, channels) or not channels * hidden:
        shapes = ", ".join(str(tuple(w.shape)) for w in (gate, up, down))
        raise ValueError(f"gate, up and down must be [I, H], [I, H] and [H, I], found {shapes}")
    if gate.dtype not in DTYPES or up.dtype != gate.dtype or down.dtype != gate.dtype:
        raise ValueError(f"weights must be all float32 or all bfloat16, found {gate.dtype}, {up.dtype}, {down.dtype}")
    width = -(-hidden // LANES) * LANES
    rows = torch.zeros(channels, width, dtype=gate.dtype)
    pairs = torch.zeros(channels, 2, width, dtype=gate.dtype)
    rows[:, :hidden] = gate
    pairs[:, 0, :hidden] = up
    pairs[:, 1, :hidden] = down.T
    return PackedFfn(rows, pairs, hidden)


_SCRATCH: dict[tuple[int, int, int, int], npt.NDArray[np.float32]] = {}


def _scratch(rows: int, width: int, channels: int, parts: int) -> npt.NDArray[np.float32]:
    """Working memory ``float32[parts, n]``, see `_part`; the same for every call of about as many rows."""
    rows = 1 << (rows - 1).bit_length()
    key = (rows, width, channels, parts)
    if key not in _SCRATCH:
        wide = -(-channels // LANES) * LANES
        _SCRATCH[key] = np.zeros(
            (parts, rows * (2 * width + wide + CHANNELS) + 2 * wide + 2 * CHANNELS + LANES), np.float32
        )
    return _SCRATCH[key]


def ffn_union_cpu(
    x: torch.Tensor, packed: PackedFfn, tau: float, out: torch.Tensor, union: torch.Tensor | None = None
) -> int:
    """`ffn_union_reference` by packed weights; sums in float32, in another order.

    Args:
        x, out: ``[T, H]``, T up to `MOST_ROWS`, the last dimension contiguous; of the weights' dtype. May not overlap.
        union: ``uint8[I]``, contiguous: set to 1 where a channel was computed, else 0.

    Returns:
        How many channels were computed.
    Raises:
        ValueError: shapes, dtypes or layouts other than these.
    """
    rows, hidden = x.shape
    channels, width = packed.gate.shape
    if hidden != packed.hidden_size or out.shape != x.shape or not 0 < rows <= MOST_ROWS:
        raise ValueError(
            f"x {tuple(x.shape)} and out {tuple(out.shape)} must be [1..{MOST_ROWS}, {packed.hidden_size}]"
        )
    if x.dtype != packed.gate.dtype or out.dtype != x.dtype or x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(f"x and out must be {packed.gate.dtype} with contiguous rows")
    if union is not None and (union.dtype != torch.uint8 or union.shape != (channels,) or not union.is_contiguous()):
        raise ValueError(f"union must be contiguous uint8[{channels}]")
    source, target = x, out
    if hidden != width:  # whole vectors are read and written
        source = torch.zeros(rows, width, dtype=x.dtype)
        source[:, :hidden] = x
        target = torch.empty_like(source)
    threads = torch.get_num_threads()
    parts = threads if threads > 1 and rows * channels * width * 3 >= PARALLEL_WORK and _gomp_parallel() else 1
    scratch = _scratch(rows, width, channels, parts)
    size = x.element_size()
    call = bytearray(_CALL.size)
    _CALL.pack_into(
        call,
        0,
        *(source.data_ptr(), target.data_ptr(), source.stride(0) * size, target.stride(0) * size, rows),
        *(packed.gate.data_ptr(), packed.pairs.data_ptr(), width, channels, size),
        *(scratch.ctypes.data, scratch.strides[0], 0 if union is None else union.data_ptr(), parts, 0, 0),
        tau,
    )
    address = np.frombuffer(call, np.uint8).ctypes.data
    kind = _KINDS[x.dtype]
    if parts > 1:
        _gomp_parallel()(_worker(x.dtype), address, parts, 0)
    else:
        _work(kind, address)
    opened = int(_finish(kind, address))
    if target is not out:
        out.copy_(target[:, :hidden])
    return opened


_KINDS = {dtype: lanes.KINDS[str(dtype).removeprefix("torch.")] for dtype in DTYPES}


@kernel
def _dots(kind, x, x_row, rows, w0, w1, w2, w3, n0, n1, n2, n3, four, vectors, out, out_row):  # type: ignore[no-untyped-def]
    """Dot products of all rows with four rows of weights, or with ``w0`` only; see `ffn_lanes.dots_4_4`."""
    r = 0
    while r < rows:
        left = rows - r
        a = x + r * x_row
        c = out + r * out_row
        if four:
            if left >= 4:
                ffn_lanes.dots_4_4(kind, a, x_row, w0, w1, w2, w3, n0, n1, n2, n3, vectors, c, out_row)
            elif left >= 2:
                ffn_lanes.dots_2_4(kind, a, x_row, w0, w1, w2, w3, n0, n1, n2, n3, vectors, c, out_row)
            else:
                ffn_lanes.dots_1_4(kind, a, x_row, w0, w1, w2, w3, n0, n1, n2, n3, vectors, c, out_row)
        elif left >= 4:
            ffn_lanes.dots_4_1(kind, a, x_row, w0, w0, w0, w0, n0, n0, n0, n0, vectors, c, out_row)
        elif left >= 2:
            ffn_lanes.dots_2_1(kind, a, x_row, w0, w0, w0, w0, n0, n0, n0, n0, vectors, c, out_row)
        else:
            ffn_lanes.dots_1_1(kind, a, x_row, w0, w0, w0, w0, n0, n0, n0, n0, vectors, c, out_row)
        r += 4 if left >= 4 else 2 if left >= 2 else 1


@kernel
def _adds(kind, a, a_row, rows, w0, w1, w2, w3, n0, n1, n2, n3, four, vectors, out, out_row):  # type: ignore[no-untyped-def]
    """Add four rows of weights, or ``w0`` only, to all rows, weighted; see `ffn_lanes.adds_4_4`."""
    r = 0
    while r < rows:
        left = rows - r
        b = a + r * a_row
        c = out + r * out_row
        if four:
            if left >= 4:
                ffn_lanes.adds_4_4(kind, b, a_row, w0, w1, w2, w3, n0, n1, n2, n3, vectors, c, out_row)
            elif left >= 2:
                ffn_lanes.adds_2_4(kind, b, a_row, w0, w1, w2, w3, n0, n1, n2, n3, vectors, c, out_row)
            else:
                ffn_lanes.adds_1_4(kind, b, a_row, w0, w1, w2, w3, n0, n1, n2, n3, vectors, c, out_row)
        elif left >= 4:
            ffn_lanes.adds_4_1(kind, b, a_row, w0, w0, w0, w0, n0, n0, n0, n0, vectors, c, out_row)
        elif left >= 2:
            ffn_lanes.adds_2_1(kind, b, a_row, w0, w0, w0, w0, n0, n0, n0, n0, vectors, c, out_row)
        else:
            ffn_lanes.adds_1_1(kind, b, a_row, w0, w0, w0, w0, n0, n0, n0, n0, vectors, c, out_row)
        r += 4 if left >= 4 else 2 if left >= 2 else 1


@kernel
def _part(kind, call, part):  # type: ignore[no-untyped-def]
    """A share of the channels, whole vectors of them, added up in the part's own working memory."""
    floats = np.float32(0)
    tau = lanes.load_number(call, 2 * TAU)
    rows = lanes.load_wide(call, ROWS)
    width = lanes.load_wide(call, WIDTH)
    channels = lanes.load_wide(call, CHANNEL_COUNT)
    parts = lanes.load_wide(call, PARTS)
    element = lanes.load_wide(call, ELEMENT)
    x = lanes.load_wide(call, X)
    x_row = lanes.load_wide(call, X_ROW)
    gate = lanes.load_wide(call, GATE)
    pairs = lanes.load_wide(call, PAIRS)
    union = lanes.load_wide(call, UNION)
    vectors = width // LANES
    groups = (channels + LANES - 1) // LANES
    first = part * groups // parts * LANES
    last = min(channels, (part + 1) * groups // parts * LANES)

    row_bytes = width * 4
    pitch = width * element
    both = 2 * pitch
    own = pairs + first * both
    # Sums first: `_finish` finds them there.
    sums = lanes.load_wide(call, SCRATCH) + part * lanes.load_wide(call, SCRATCH_BYTES)
    mine = sums + rows * row_bytes
    acts = mine + rows * row_bytes
    act_row = groups * LANES * 4
    products = acts + rows * act_row
    product_row = CHANNELS * 4
    open_ = products + rows * product_row
    bytes_ = open_ + (groups * LANES + 2 * CHANNELS) * 4

    for r in range(rows):
        lanes.row_copy(kind, x + r * x_row, floats, mine + r * row_bytes, vectors, np.float32(1))
        lanes.row_copy(floats, mine + r * row_bytes, floats, sums + r * row_bytes, vectors, np.float32(0))

    ahead = AHEAD * pitch
    i = first
    while i < last:
        four = last - i >= CHANNELS
        w = gate + i * pitch
        _dots(
            kind, mine, row_bytes, rows, w, w + pitch, w + 2 * pitch, w + 3 * pitch,
            w + ahead, w + pitch + ahead, w + 2 * pitch + ahead, w + 3 * pitch + ahead,
            four, vectors, acts + (i - first) * 4, act_row,
        )  # fmt: skip
        i += CHANNELS if four else 1
    ffn_lanes.silu_union(acts, act_row, rows, (last - first + LANES - 1) // LANES, tau, bytes_)

    count = 0
    for j in range(last - first):
        seen = ffn_lanes.load_byte(bytes_, j)
        store(open_, count, j)
        count += seen
        if union != 0:
            ffn_lanes.store_byte(union, first + j, seen)

    if count > 0:
        # The list goes on with its last channel, so that there is always something to bring nearer.
        for m in range(count, count + 2 * CHANNELS):
            store(open_, m, load(open_, count - 1))
    n = 0
    while n < count:
        four = count - n >= CHANNELS
        taken = CHANNELS if four else 1
        j0, j1, j2, j3 = load(open_, n), load(open_, n + 1), load(open_, n + 2), load(open_, n + 3)
        w0, w1, w2, w3 = own + j0 * both, own + j1 * both, own + j2 * both, own + j3 * both
        n0 = own + load(open_, n + taken) * both
        n1 = own + load(open_, n + taken + 1) * both
        n2 = own + load(open_, n + taken + 2) * both
        n3 = own + load(open_, n + taken + 3) * both
        _dots(
            kind, mine, row_bytes, rows, w0, w1, w2, w3, n0, n1, n2, n3, four, vectors, products, product_row
        )  # fmt: skip
        for r in range(rows):
            line = acts + r * act_row
            to = products + r * product_row
            lanes.store_number(to, 0, lanes.load_number(to, 0) * lanes.load_number(line, j0))
            if four:
                lanes.store_number(to, 1, lanes.load_number(to, 1) * lanes.load_number(line, j1))
                lanes.store_number(to, 2, lanes.load_number(to, 2) * lanes.load_number(line, j2))
                lanes.store_number(to, 3, lanes.load_number(to, 3) * lanes.load_number(line, j3))
        _adds(
            kind, products, product_row, rows, w0 + pitch, w1 + pitch, w2 + pitch, w3 + pitch,
            n0 + pitch, n1 + pitch, n2 + pitch, n3 + pitch, four, vectors, sums, row_bytes,
        )  # fmt: skip
        n += taken
    ffn_lanes.add_wide(call, OPEN, count)


@kernel
def _work(kind, call):  # type: ignore[no-untyped-def]
    """Take parts of a call's work until none is left; any number of threads at once."""
    parts = lanes.load_wide(call, PARTS)
    part = lanes.take_number(call, NEXT_PART)
    while part < parts:
        _part(kind, call, part)
        part = lanes.take_number(call, NEXT_PART)


@kernel
def _finish(kind, call):  # type: ignore[no-untyped-def]
    """Sum the parts and write the output; the number of channels computed."""
    rows = lanes.load_wide(call, ROWS)
    vectors = lanes.load_wide(call, WIDTH) // LANES
    row_bytes = vectors * LANES * 4
    parts = lanes.load_wide(call, PARTS)
    sums = lanes.load_wide(call, SCRATCH)
    pitch = lanes.load_wide(call, SCRATCH_BYTES)
    out = lanes.load_wide(call, OUT)
    out_row = lanes.load_wide(call, OUT_ROW)
    for r in range(rows):
        line = sums + r * row_bytes
        for part in range(1, parts):
            ffn_lanes.row_add(line + part * pitch, line, vectors)
        lanes.row_copy(np.float32(0), line, kind, out + r * out_row, vectors, np.float32(1))
    return lanes.load_wide(call, OPEN)


@functools.cache
def _worker(dtype: torch.dtype) -> int:
    """Address of `_work` for C callers, ``void(*)(int64 call)``."""
    kind = _KINDS[dtype]
    sources = sources_stamp(__file__)

    def worker(call):  # type: ignore[no-untyped-def]
        if sources >= 0:
            _work(kind, call)

    return c_callable(worker)
