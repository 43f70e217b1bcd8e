"""Attention of draft trees and chains over a paged KV cache on the GPU; `tree_attention` is the definition.

Requests come as vLLM's GPU backends describe them: the first row of each and its length in slots. What a row sees of
its own request's rows is a bitmask. A step may hold trees, chains and plain rows; the kernel tells no difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from vllm_specplug.kernels.attention_triton import (
    FLOOR,
    LOG2_E,
    STAGES,
    AttentionPlan,
    attend,
    load_query,
    packed_rows,
    share_of,
    store_rows,
)
from vllm_specplug.kernels.tree_attention import Int32Array
from vllm_specplug.kernels.triton_tools import Work, check


def ancestor_bits(visible: torch.Tensor) -> torch.Tensor:
    """Pack ``TreeBatch.visible``, ``uint8[R, M]``, into ``int32[R, ceil(M / 32)]``: bit m of a row says that it sees
    the m-th row of its request. Works on any device, without waiting for it.

    Raises:
        ValueError: the tensor has another dtype or number of dimensions.
    """
    check("visible", visible, torch.uint8, (None, None), contiguous=False)
    rows, most = visible.shape
    words = -(-most // 32)
    padded = torch.nn.functional.pad(visible, (0, words * 32 - most)).reshape(rows, words, 32).long()
    packed = (padded << torch.arange(32, device=visible.device)).sum(-1)
    # Bit 31 is an int32's sign.
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def bits_of_parents(sizes: Int32Array, parents: Int32Array, words: int | None = None) -> Int32Array:
    """The same from the trees themselves: ``int32[R, words]``.

    Args:
        sizes: ``int32[n]`` rows of each tree, may be 0.
        parents: ``int32[R]`` parent of each row within its tree, -1 for roots; parents come before their children.
        words: per row, at least; None: as the largest tree needs.

    Raises:
        ValueError: the lengths do not match, or ``words`` is too small.
    """
    most = int(sizes.max(initial=0))
    needed = max(1, -(-most // 32))
    words = needed if words is None else words
    if int(sizes.sum()) != len(parents) or words < needed:
        raise ValueError(f"{len(parents)} parents and {words} words for trees of {sizes} rows, {needed} words needed")
    bits = np.zeros((len(parents), words), np.uint32)
    bases = np.cumsum(sizes) - sizes
    # A row sees what its parent sees, and itself: member by member, in all trees at once.
    for member in range(most):
        base = bases[sizes > member]
        if member:
            bits[base + member] = bits[base + parents[base + member]]
        bits[base + member, member // 32] |= np.uint32(1 << member % 32)
    return bits.view(np.int32)


@triton.jit(do_not_specialize=["window", "table_stride", "bits_stride"])
def tree_attention_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # out *T [rows, HEADS, HEAD_SIZE]
    query_ptr,  # *T [rows, HEADS, HEAD_SIZE]
    key_ptr,  # *T [blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE]
    value_ptr,  # *T [blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE]
    table_ptr,  # *int32 [requests, max_blocks]
    starts_ptr,  # *int32 [requests + 1] first row of each request
    lengths_ptr,  # *int32 [requests] slots of each request, its rows included
    bits_ptr,  # *int32 [rows, words] rows of the request that a row sees
    depths_ptr,  # *int32 [rows] steps from the root, if WINDOW
    partial_ptr,  # out *float32 [max_rows, HEADS, SPLITS, HEAD_SIZE]
    tops_ptr,  # out *float32 [max_rows, HEADS, SPLITS]
    totals_ptr,  # out *float32 [max_rows, HEADS, SPLITS]
    parts_ptr,  # out *int32 [requests, KV_HEADS] splits in use
    factor,
    window,
    query_row_stride,
    query_head_stride,
    out_row_stride,
    out_head_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    table_stride,
    bits_stride,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (TILES * KV_HEADS, SPLITS, requests). One row tile over one split of its request's slots."""
    # 64 bits: offsets into a step's rows and into the cache can be beyond 32.
    request = tl.program_id(2).to(tl.int64)
    start = tl.load(starts_ptr + request).to(tl.int64)
    rows = (tl.load(starts_ptr + request + 1) - start).to(tl.int32)
    tile = tl.program_id(0) % TILES
    if (tile * TILE_ROWS >= rows) | (rows > ROWS):
        return
    length = tl.load(lengths_ptr + request)
    context = length - rows
    begin = 0
    if WINDOW:
        # The root sees furthest back; what lies before may not be this request's any more.
        begin = tl.maximum(context - window + 1, 0)
    origin = begin // TILE * TILE
    split = tl.program_id(1)
    share = share_of(length - origin, SPLITS, LEAST, TILE)
    low = origin + split * share
    if low >= length:
        return
    high = tl.minimum(low + share, length)
    kv_head = (tl.program_id(0) // TILES).to(tl.int64)
    member, head, live = packed_rows(tile, rows, kv_head, HEADS // KV_HEADS, TILE_ROWS, BLOCK_M)
    row = start + member
    query = load_query(query_ptr, row, head, query_row_stride, query_head_stride, HEAD_SIZE, HEAD)
    key_ptr += kv_head * key_head_stride
    value_ptr += kv_head * value_head_stride
    table_ptr += request * table_stride
    depths_ptr += start
    words_ptr = bits_ptr + row * bits_stride
    nearest = tl.zeros([BLOCK_M], dtype=tl.int32)
    acc = tl.zeros([BLOCK_M, HEAD], dtype=tl.float32)
    top = tl.full([BLOCK_M], FLOOR, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    WORDS: tl.constexpr = (ROWS + 31) // 32
    ALIGNED: tl.constexpr = BLOCK_SIZE % TILE == 0
    if WINDOW:
        nearest = context + tl.load(depths_ptr + member) - window + 1
        # Up to where every row sees everything.
        edge = low + tl.cdiv(tl.maximum(tl.max(nearest, 0) - low, 0), TILE) * TILE
        edge = tl.minimum(edge, high)
        acc, top, total = attend(
            acc, top, total, query, key_ptr, value_ptr, table_ptr, table_ptr, words_ptr, depths_ptr, nearest,
            low, edge, begin, context, length, factor,
            key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
            0, True, True, ALIGNED, BLOCK_SIZE, TILE, HEAD_SIZE, HEAD, WORDS, PRECISION,
        )  # fmt: skip
        low = edge
    whole = low + tl.maximum(tl.minimum(high, context) - low, 0) // TILE * TILE
    acc, top, total = attend(
        acc, top, total, query, key_ptr, value_ptr, table_ptr, table_ptr, words_ptr, depths_ptr, nearest,
        low, whole, begin, context, length, factor,
        key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
        0, False, WINDOW, ALIGNED, BLOCK_SIZE, TILE, HEAD_SIZE, HEAD, WORDS, PRECISION,
    )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, query, key_ptr, value_ptr, table_ptr, table_ptr, words_ptr, depths_ptr, nearest,
        whole, high, begin, context, length, factor,
        key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
        0, True, WINDOW, ALIGNED, BLOCK_SIZE, TILE, HEAD_SIZE, HEAD, WORDS, PRECISION,
    )  # fmt: skip
    store_rows(
        acc, top, total, out_ptr, partial_ptr, tops_ptr, totals_ptr, parts_ptr + request * KV_HEADS + kv_head,
        row, head, live, out_row_stride, out_head_stride, tile, split, tl.cdiv(length - origin, share),
        HEADS, SPLITS, HEAD_SIZE, HEAD,
    )  # fmt: skip


def tree_attention(
    plan: AttentionPlan,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    bits: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    window: int = -1,
    depths: torch.Tensor | None = None,
    checked: bool = False,
) -> None:
    """Attention of the rows of all requests, written to ``out``; rows of no request are left as they are.

    Requests without rows are skipped, and so are those with more rows than the plan is for (a prompt's, that another
    kernel attends); their rows of ``out`` are left as they are.

    Args:
        query, out: ``[T, heads, head_size]``; query head ``h`` uses KV head ``h * kv_heads // heads``.
        key_cache, value_cache: ``[blocks, block_size, kv_heads, head_size]``, any strides but the last.
        block_table: ``int32[n or more, max_blocks]``.
        query_starts: ``int32[n + 1]`` first row of each request, and after the last; requests that pad a batch repeat
            the last.
        lengths: ``int32[n]`` tokens in the cache, the request's rows included; row m's K/V lies in slot
            ``length - rows + m``. Slots from the length on may hold anything.
        bits: ``int32[T, words]``, see `ancestor_bits`; 32 * words is at least the plan's rows per request. Bits at
            or above a request's rows are ignored. Every row sees itself.
        scale: factor of the scores.
        window: a row at position p sees positions above ``p - window``; -1: all.
        depths: ``int32[T]`` steps from the root, if there is a window; the row's position is its context and these.
        checked: the same step's launch for another layer of the plan's kind passed the checks, which take a quarter of
            the host's time of a launch; they are left out.

    Raises:
        ValueError: an argument's dtype, shape, device or range is wrong, or it does not fit the plan.
    """
    if not checked:
        plan.check(query, key_cache, value_cache, block_table, query_starts, lengths, bits, out, scale)
        if window != -1 and window < 1:
            raise ValueError(f"window must be -1 or at least 1, got {window}")
        if window != -1:
            if depths is None:
                raise ValueError("depths must be given where there is a window")
            check("depths", depths, torch.int32, (len(query),), plan.device)
    if len(lengths) == 0:
        return
    tree_attention_kernel[plan.grid(len(lengths))](
        out,
        query,
        key_cache,
        value_cache,
        block_table,
        query_starts,
        lengths,
        bits,
        lengths if depths is None else depths,
        plan.partial,
        plan.tops,
        plan.totals,
        plan.parts,
        scale * LOG2_E,
        window,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table.stride(0),
        bits.stride(0),
        ROWS=plan.rows_per_request,
        HEADS=plan.heads,
        KV_HEADS=plan.kv_heads,
        TILES=plan.tiles,
        TILE_ROWS=plan.tile_rows,
        SPLITS=plan.splits,
        LEAST=plan.least,
        WINDOW=window != -1,
        BLOCK_SIZE=key_cache.shape[1],
        HEAD_SIZE=plan.head_size,
        HEAD=plan.head,
        BLOCK_M=plan.block_m,
        TILE=plan.tile,
        PRECISION=plan.precision,
        num_warps=plan.warps,
        num_stages=STAGES,
    )
    plan.merge(out, query_starts)


def work(
    contexts: Sequence[int], rows: Sequence[int], heads: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> Work:
    """Least work of a launch, without a window: keys and values of ``context + rows`` slots once per KV head, query and
    output once; ``4 * head_size`` operations per row, query head and slot (rows that are not seen included)."""
    slots = sum(c + r for c, r in zip(contexts, rows, strict=True))
    pairs = sum((c + r) * r for c, r in zip(contexts, rows, strict=True))
    values = 2 * slots * kv_heads * head_size + 2 * sum(rows) * heads * head_size
    return Work(values * dtype.itemsize, 4 * pairs * heads * head_size)
