"""Attention of draft trees over chosen units of their contexts on the GPU; `sparse_attention` is the definition.

What a request attends to is made into one row of slots: the chosen units' in the order of their list, filled up to
whole tiles, then everything from the tail on. Splits divide that row, so they have the same to do wherever the chosen
units lie.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from vllm_specplug.kernels.triton_tools import Work, check


@triton.jit(do_not_specialize=["table_stride", "bits_stride", "chosen_stride", "chosen_head_stride"])
def sparse_attention_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # out *T [rows, HEADS, HEAD_SIZE]
    query_ptr,  # *T [rows, HEADS, HEAD_SIZE]
    key_ptr,  # *T [blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE]
    value_ptr,  # *T [blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE]
    table_ptr,  # *int32 [requests, max_blocks]
    starts_ptr,  # *int32 [requests + 1] first row of each request
    lengths_ptr,  # *int32 [requests] slots of each request, its rows included
    bits_ptr,  # *int32 [rows, words] rows of the request that a row sees
    chosen_ptr,  # *int32 [requests, KV_HEADS, most] units that are attended
    counts_ptr,  # *int32 [requests, KV_HEADS] how many; -1: everything is
    tails_ptr,  # *int32 [requests] slot from which on everything is attended
    partial_ptr,  # out *float32 [max_rows, HEADS, SPLITS, HEAD_SIZE]
    tops_ptr,  # out *float32 [max_rows, HEADS, SPLITS]
    totals_ptr,  # out *float32 [max_rows, HEADS, SPLITS]
    parts_ptr,  # out *int32 [requests, KV_HEADS] splits in use
    factor,
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
    chosen_stride,
    chosen_head_stride,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (TILES * KV_HEADS, SPLITS, requests). One row tile over one split of what its request attends to."""
    # 64 bits: offsets into a step's rows and into the cache can be beyond 32.
    request = tl.program_id(2).to(tl.int64)
    start = tl.load(starts_ptr + request).to(tl.int64)
    rows = (tl.load(starts_ptr + request + 1) - start).to(tl.int32)
    tile = tl.program_id(0) % TILES
    if (tile * TILE_ROWS >= rows) | (rows > ROWS):
        return
    kv_head = (tl.program_id(0) // TILES).to(tl.int64)
    length = tl.load(lengths_ptr + request)
    context = length - rows
    count = tl.load(counts_ptr + request * KV_HEADS + kv_head)
    tail = tl.where(count < 0, 0, tl.minimum(tl.load(tails_ptr + request), context))
    listed = tl.maximum(count, 0) * UNIT
    filled = tl.cdiv(listed, TILE) * TILE
    split = tl.program_id(1)
    share = share_of(filled + length - tail, SPLITS, LEAST, TILE)
    low = split * share
    if low >= filled + length - tail:
        return
    high = tl.minimum(low + share, filled + length - tail)
    member, head, live = packed_rows(tile, rows, kv_head, HEADS // KV_HEADS, TILE_ROWS, BLOCK_M)
    row = start + member
    query = load_query(query_ptr, row, head, query_row_stride, query_head_stride, HEAD_SIZE, HEAD)
    key_ptr += kv_head * key_head_stride
    value_ptr += kv_head * value_head_stride
    table_ptr += request * table_stride
    chosen_ptr += request * chosen_stride + kv_head * chosen_head_stride
    words_ptr = bits_ptr + row * bits_stride
    acc = tl.zeros([BLOCK_M, HEAD], dtype=tl.float32)
    top = tl.full([BLOCK_M], FLOOR, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    WORDS: tl.constexpr = (ROWS + 31) // 32
    acc, top, total = attend(
        acc, top, total, query, key_ptr, value_ptr, table_ptr, chosen_ptr, words_ptr, table_ptr, member,
        low, tl.minimum(high, listed), 0, context, length, factor,
        key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
        UNIT, False, False, False, BLOCK_SIZE, TILE, HEAD_SIZE, HEAD, WORDS, PRECISION,
    )  # fmt: skip
    low = tl.maximum(low, filled) - filled + tail
    high = tl.maximum(high, filled) - filled + tail
    whole = low + tl.maximum(tl.minimum(high, context) - low, 0) // TILE * TILE
    # The tail begins anywhere in a block, so its tiles may lie in two.
    acc, top, total = attend(
        acc, top, total, query, key_ptr, value_ptr, table_ptr, chosen_ptr, words_ptr, table_ptr, member,
        low, whole, tail, context, length, factor,
        key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
        0, False, False, False, BLOCK_SIZE, TILE, HEAD_SIZE, HEAD, WORDS, PRECISION,
    )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, query, key_ptr, value_ptr, table_ptr, chosen_ptr, words_ptr, table_ptr, member,
        whole, high, tail, context, length, factor,
        key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
        0, True, False, False, BLOCK_SIZE, TILE, HEAD_SIZE, HEAD, WORDS, PRECISION,
    )  # fmt: skip
    store_rows(
        acc, top, total, out_ptr, partial_ptr, tops_ptr, totals_ptr, parts_ptr + request * KV_HEADS + kv_head,
        row, head, live, out_row_stride, out_head_stride, tile, split, tl.cdiv(filled + length - tail, share),
        HEADS, SPLITS, HEAD_SIZE, HEAD,
    )  # fmt: skip


def sparse_attention(
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
    unit: int,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    tails: torch.Tensor,
) -> None:
    """`tree_attention_triton.tree_attention` without the slots of the context that were not chosen.

    Args:
        plan, query, key_cache, value_cache, block_table, query_starts, lengths, bits, out, scale: as there.
        unit: slots per unit; divides the block size.
        chosen: ``int32[n or more, kv_heads, most]`` per request and KV head the units before the tail that are
            attended, each once, first ones first; the rest is ignored.
        counts: ``int32[n or more, kv_heads]`` how many; -1: the whole context is attended, whatever the tail is.
        tails: ``int32[n or more]`` slot, at most the context, from which on everything is attended.

    Raises:
        ValueError: an argument's dtype, shape, device or range is wrong, or it does not fit the plan.
    """
    plan.check(query, key_cache, value_cache, block_table, query_starts, lengths, bits, out, scale)
    check("chosen", chosen, torch.int32, (None, plan.kv_heads, None), plan.device, contiguous=False)
    check("counts", counts, torch.int32, (None, plan.kv_heads), plan.device)
    check("tails", tails, torch.int32, (None,), plan.device)
    requests = len(lengths)
    for name, tensor in (("chosen", chosen), ("counts", counts), ("tails", tails)):
        if len(tensor) < requests:
            raise ValueError(f"{name} must have a row for each of {requests} requests, got {len(tensor)}")
    block_size = key_cache.shape[1]
    if unit < 1 or block_size % unit:
        raise ValueError(f"unit must divide the block size {block_size}, got {unit}")
    if requests == 0:
        return
    sparse_attention_kernel[plan.grid(requests)](
        out,
        query,
        key_cache,
        value_cache,
        block_table,
        query_starts,
        lengths,
        bits,
        chosen,
        counts,
        tails,
        plan.partial,
        plan.tops,
        plan.totals,
        plan.parts,
        scale * LOG2_E,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table.stride(0),
        bits.stride(0),
        chosen.stride(0),
        chosen.stride(1),
        ROWS=plan.rows_per_request,
        HEADS=plan.heads,
        KV_HEADS=plan.kv_heads,
        TILES=plan.tiles,
        TILE_ROWS=plan.tile_rows,
        SPLITS=plan.splits,
        LEAST=plan.least,
        UNIT=unit,
        BLOCK_SIZE=block_size,
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
    attended: Sequence[int], rows: Sequence[int], heads: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> Work:
    """Least work of a launch: keys and values of the ``attended`` slots (per request: the mean over its KV heads of
    ``count * unit + length - tail``) once per KV head, query and output once; ``4 * head_size`` operations per row,
    query head and slot."""
    pairs = sum(a * r for a, r in zip(attended, rows, strict=True))
    values = 2 * sum(attended) * kv_heads * head_size + 2 * sum(rows) * heads * head_size
    return Work(values * dtype.itemsize, 4 * pairs * heads * head_size)
