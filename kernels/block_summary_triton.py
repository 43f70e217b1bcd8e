"""Summaries of units of a long context on the device, in the paged cache's blocks: `block_select.summarise`.

They lie in the cache's blocks, so that requests that share a block share them, and what a block's new owner does not
overwrite is never read. In the cache's own dtype, which is advised, bounds are exact, means are rounded once as the
keys were, and a step reads half as much as of float32, through the tensor cores. float32 is served as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_specplug.kernels.block_select import SUMMARIES
from vllm_specplug.kernels.triton_tools import Work, check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Programs of a launch that are enough to fill a GPU (some for each of 132 multiprocessors); more would only be started
#: to find nothing to do, where contexts are shorter than they may become.
_PROGRAMS = 2048


def programs_for(others: int, most: int) -> int:
    """How many programs share ``most`` tiles where the grid's other dimensions make ``others``; they loop. At least 8,
    for a request may be far longer than the others."""
    return max(1, min(most, max(8, triton.cdiv(_PROGRAMS, max(1, others)))))


@triton.jit(do_not_specialize=["max_blocks", "programs"])
def _block_summary_kernel(  # type: ignore[no-untyped-def]
    keys_ptr,  # *T [blocks, block_size, kv_heads, HEAD_SIZE]
    summaries_ptr,  # *S [blocks, UNITS_PER_BLOCK, kv_heads, PARTS, HEAD_SIZE], out
    block_table_ptr,  # *int32 [n, max_blocks]
    begins_ptr,  # *int32 [n] first unit
    ends_ptr,  # *int32 [n] unit after the last
    max_blocks,
    programs,
    keys_block_stride,
    keys_slot_stride,
    keys_head_stride,
    summaries_block_stride,
    summaries_unit_stride,
    summaries_head_stride,
    summaries_part_stride,
    table_stride,
    UNIT: tl.constexpr,
    UNITS_PER_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    SUMMARY: tl.constexpr,  # index in SUMMARIES
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # of head dimensions
):
    """Grid: (n, kv_heads, programs). The programs of a request and head take its units in turn."""
    # 64 bits, for offsets into a cache exceed 2^31.
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    begin = tl.load(begins_ptr + request)
    end = tl.minimum(tl.load(ends_ptr + request), max_blocks * UNITS_PER_BLOCK)
    column = tl.arange(0, BLOCK_SIZE)
    inside = column < HEAD_SIZE
    for unit in range(begin + tl.program_id(2), end, programs):
        block = tl.load(block_table_ptr + request * table_stride + unit // UNITS_PER_BLOCK).to(tl.int64)
        within = tl.cast(unit % UNITS_PER_BLOCK, tl.int64)
        keys = keys_ptr + block * keys_block_stride + within * UNIT * keys_slot_stride + head * keys_head_stride
        total = tl.zeros([BLOCK_SIZE], tl.float32)
        largest = tl.full([BLOCK_SIZE], float("-inf"), tl.float32)
        least = tl.full([BLOCK_SIZE], float("inf"), tl.float32)
        for first in range(0, UNIT, BLOCK_SLOTS):
            slot = (first + tl.arange(0, BLOCK_SLOTS)).to(tl.int64)
            there = (slot < UNIT)[:, None] & inside[None, :]
            tile = tl.load(keys + slot[:, None] * keys_slot_stride + column[None, :], mask=there, other=0.0)
            tile = tile.to(tl.float32)
            total += tl.sum(tile, 0)
            if SUMMARY != 2:
                largest = tl.maximum(largest, tl.max(tl.where(there, tile, float("-inf")), 0))
                least = tl.minimum(least, tl.min(tl.where(there, tile, float("inf")), 0))
        mean = total / UNIT
        out = summaries_ptr + block * summaries_block_stride + within * summaries_unit_stride
        out += head * summaries_head_stride + column
        if SUMMARY == 2:
            tl.store(out, mean.to(summaries_ptr.dtype.element_ty), mask=inside)
        else:
            if SUMMARY == 0:
                largest = (largest + mean) / 2
                least = (least + mean) / 2
            tl.store(out, largest.to(summaries_ptr.dtype.element_ty), mask=inside)
            tl.store(out + summaries_part_stride, least.to(summaries_ptr.dtype.element_ty), mask=inside)


def block_summary(
    key_cache: torch.Tensor,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    summary: str,
    most_units: int,
) -> None:
    """Write the summaries of units ``begins[i]`` to ``ends[i] - 1`` of each request, from the keys in the cache.

    Units to write must be filled with finite keys; a range may be empty. Where requests share a block, both write the
    same.

    Args:
        key_cache: ``[blocks, block_size, kv_heads, head_size]`` of one of `DTYPES`, any strides with the last 1.
        summaries: ``[blocks, units_per_block, kv_heads, parts, head_size]`` of the cache's dtype or float32, strides
            likewise, written; a unit is ``block_size / units_per_block`` slots; ``parts`` is 1 for the mean, else 2.
        block_table: ``int32[n, max_blocks]``, each row contiguous.
        begins, ends: ``int32[n]``; what would lie behind ``max_blocks`` is left out.
        summary: one of `SUMMARIES`.
        most_units: about how many units a request has to be written at most; it bounds the grid, more are looped over.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong, or ``summary`` unknown.
    """
    if summary not in SUMMARIES:
        raise ValueError(f"summary must be one of {SUMMARIES}, got {summary!r}")
    if most_units < 1:
        raise ValueError(f"most_units must be at least 1, got {most_units}")
    check("key_cache", key_cache, DTYPES, (None, None, None, None), contiguous=False)
    blocks, block_size, kv_heads, head_size = key_cache.shape
    parts = 1 if summary == "mean" else 2
    dtypes, shape = (key_cache.dtype, torch.float32), (blocks, None, kv_heads, parts, head_size)
    check("summaries", summaries, dtypes, shape, key_cache.device, contiguous=False)
    units_per_block = summaries.shape[1]
    if not units_per_block or block_size % units_per_block:
        raise ValueError(f"summaries has {units_per_block} units per block, which do not divide {block_size} slots")
    check("block_table", block_table, torch.int32, (None, None), key_cache.device, contiguous=False)
    count, max_blocks = block_table.shape
    check("begins", begins, torch.int32, (count,), key_cache.device)
    check("ends", ends, torch.int32, (count,), key_cache.device)
    if not count or not kv_heads or not blocks:
        return
    unit = block_size // units_per_block
    programs = programs_for(count * kv_heads, most_units)
    _block_summary_kernel[(count, kv_heads, programs)](
        key_cache,
        summaries,
        block_table,
        begins,
        ends,
        max_blocks,
        programs,
        *key_cache.stride()[:3],
        *summaries.stride()[:4],
        block_table.stride(0),
        UNIT=unit,
        UNITS_PER_BLOCK=units_per_block,
        HEAD_SIZE=head_size,
        SUMMARY=SUMMARIES.index(summary),
        # 32 * 128 keys are 32 registers of each of 128 threads; wider heads take fewer slots at a time.
        BLOCK_SLOTS=max(1, min(triton.next_power_of_2(unit), 4096 // triton.next_power_of_2(head_size))),
        BLOCK_SIZE=triton.next_power_of_2(head_size),
        num_warps=4,
    )


def summary_work(
    units: int, unit: int, kv_heads: int, head_size: int, summary: str, key_bytes: int, summary_bytes: int
) -> Work:
    """Least work of `block_summary` for ``units`` units of all requests: each key is read once, each summary written
    once; an addition per element of a key, and two comparisons for bounds."""
    elements = units * unit * kv_heads * head_size
    parts = 1 if summary == "mean" else 2
    moved = elements * key_bytes + units * kv_heads * parts * head_size * summary_bytes
    return Work(moved, elements * (1 if summary == "mean" else 3))
