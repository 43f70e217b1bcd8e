"""`tree_rows` in Triton: a step's rows are described where its trees are, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_specplug.kernels.triton_tools import Work, check


@triton.jit
def _parent_of(  # type: ignore[no-untyped-def]
    row, size, parents_ptr
):
    """Parent of rows, -1 of the first; rows from ``size`` on are a chain's."""
    drafted = (row > 0) & (row < size)
    found = tl.load(parents_ptr + row - 1, mask=drafted, other=0)
    # What a slot held before may be anything; rows before the row itself end every walk.
    found = tl.minimum(tl.maximum(found, 0), row - 1)
    return tl.where(drafted, found, row - 1)


@triton.jit(do_not_specialize=["parents_stride", "bits_stride"])
def tree_rows_kernel(  # type: ignore[no-untyped-def]
    starts_ptr,  # *int32 [n + 1] first row of each request
    verified_ptr,  # *int32 [n + 1] first verified row of each request
    lengths_ptr,  # *int32 [n] slots of each request, its rows included
    slots_ptr,  # *int32 or *int64 [n]
    parents_ptr,  # *int32 [slots, K] parent row of each draft node
    row_parents_ptr,  # out: *int32 [T]
    depths_ptr,  # out: *int32 [T]
    bits_ptr,  # out: *int32 [T, words]
    positions_ptr,  # out: *int64 [T]
    parents_stride,
    bits_stride,
    MOST: tl.constexpr,  # rows of a request that is described
    ROWS: tl.constexpr,  # power of two, at least MOST
    WORDS: tl.constexpr,  # power of two, at least the words that MOST rows need
    STORED: tl.constexpr,  # words of a row of bits
):
    """Grid: (n,). Every row of the request walks up to the root, all at the same time."""
    request = tl.program_id(0).to(tl.int64)  # 64 bits: products with strides may pass 2^31
    start = tl.load(starts_ptr + request).to(tl.int64)
    rows = (tl.load(starts_ptr + request + 1) - start).to(tl.int32)
    if rows > MOST:
        return
    verified = tl.load(verified_ptr + request + 1) - tl.load(verified_ptr + request)
    size = tl.where(rows == verified, rows, 0)
    context = tl.load(lengths_ptr + request) - rows
    parents_ptr += tl.load(slots_ptr + request).to(tl.int64) * parents_stride
    row = tl.arange(0, ROWS)
    word = tl.arange(0, WORDS)
    there = row < rows
    parent = _parent_of(row, size, parents_ptr)
    seen = tl.where((row // 32)[:, None] == word[None, :], (1 << (row % 32))[:, None], 0)
    depth = tl.zeros_like(row)
    at = tl.where(there, parent, -1)
    while tl.max(at, axis=0) >= 0:
        above = at >= 0
        bit = tl.where(above, 1 << (tl.maximum(at, 0) % 32), 0)
        seen = seen | tl.where((at // 32)[:, None] == word[None, :], bit[:, None], 0)
        depth += above.to(tl.int32)
        at = tl.where(above, _parent_of(at, size, parents_ptr), -1)
    tl.store(row_parents_ptr + start + row, parent, mask=there)
    tl.store(depths_ptr + start + row, depth, mask=there)
    tl.store(positions_ptr + start + row, (context + depth).to(tl.int64), mask=there)
    out = bits_ptr + (start + row)[:, None] * bits_stride + word[None, :]
    tl.store(out, seen, mask=there[:, None] & (word < STORED)[None, :])


def tree_rows(
    starts: torch.Tensor,
    verified: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    parents: torch.Tensor,
    row_parents: torch.Tensor,
    depths: torch.Tensor,
    bits: torch.Tensor,
    positions: torch.Tensor,
    most: int,
) -> None:
    """Describe the rows of every request that has no more than ``most``; see `tree_rows_reference`.

    Args:
        starts, verified: ``int32[n + 1]``.
        lengths: ``int32[n]``.
        slots: ``int32[n]`` or ``int64[n]``; each must be a row of ``parents``, which is not checked.
        parents: ``int32[slots, K]``, K at least ``most - 1``, each row contiguous.
        row_parents, depths: ``int32[T]``, written.
        bits: ``int32[T, words]``, written, 32 * words at least ``most``, each row contiguous.
        positions: ``int64[T]``, written.
        most: rows of a request, at least 1.

    Raises:
        ValueError: a dtype, shape, device or stride is wrong, or ``most``.
    """
    device = starts.device
    check("lengths", lengths, torch.int32, (None,), device)
    count = len(lengths)
    check("starts", starts, torch.int32, (count + 1,), device)
    check("verified", verified, torch.int32, (count + 1,), device)
    check("slots", slots, (torch.int32, torch.int64), (count,), device)
    check("parents", parents, torch.int32, (None, None), device, contiguous=False)
    check("row_parents", row_parents, torch.int32, (None,), device)
    total = len(row_parents)
    check("depths", depths, torch.int32, (total,), device)
    check("positions", positions, torch.int64, (total,), device)
    check("bits", bits, torch.int32, (total, None), device, contiguous=False)
    if not 1 <= most <= min(parents.shape[1] + 1, 32 * bits.shape[1]):
        raise ValueError(
            f"most must be 1 to {min(parents.shape[1] + 1, 32 * bits.shape[1])}, for {parents.shape[1]} nodes and "
            f"{bits.shape[1]} words, got {most}"
        )
    if not count:
        return
    rows = triton.next_power_of_2(most)
    tree_rows_kernel[(count,)](
        *(starts, verified, lengths, slots, parents, row_parents, depths, bits, positions),
        parents.stride(0),
        bits.stride(0),
        MOST=most,
        ROWS=rows,
        WORDS=triton.next_power_of_2(-(-most // 32)),
        STORED=-(-most // 32),
        num_warps=max(1, min(4, rows // 32)),
    )


def work(rows: int, requests: int, words: int) -> Work:
    """Of each row a parent is read (4 bytes), and its parent, depth, bits and position are written:
    ``rows * (20 + 4 * words) + requests * 24`` bytes. What it takes is the wait for one gather per level."""
    return Work(bytes=rows * (20 + 4 * words) + requests * 24, operations=0)
