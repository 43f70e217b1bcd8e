"""Which channels of a gated feed-forward layer some row opens, on the device: `ffn_union.py` says what opens one.

The union and the list of its channels are what is offered, not the layer over them, which `ffn_union_cpu` computes on
CPUs: how many channels there are is known on the device alone, while a graph's grids are fixed, and columns of ``down``
lie too far apart to be read one by one unless it is kept transposed as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_specplug.kernels.triton_tools import Work, check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Most channels: the counts of all blocks before one are added in one program.
MOST_CHANNELS = 1 << 19
#: Channels and rows of a tile: 32 numbers for each of 128 threads, and enough programs where there is one pool.
_BLOCK = 128
_BLOCK_ROWS = 32


@triton.jit
def _open_kernel(  # type: ignore[no-untyped-def]
    act_ptr,  # *T [T, channels]
    pools_ptr,  # *int32 [p + 1]
    mask_ptr,  # *uint8 [p, channels], out
    sums_ptr,  # *int32 [p, blocks], out: open channels of each block
    tau,
    channels,
    blocks,
    act_stride,
    GATE: tl.constexpr,  # act is before SiLU
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (p, blocks)."""
    pool = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    start, end = tl.load(pools_ptr + pool), tl.load(pools_ptr + pool + 1)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    some = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK_ROWS):
        row = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        there = (row < end)[:, None] & (channel < channels)[None, :]
        act = tl.load(act_ptr + row[:, None] * act_stride + channel[None, :], mask=there, other=0.0).to(tl.float32)
        if GATE:
            act = act / (1.0 + tl.exp(-act))
        # NaN is not below anything, so it opens its channel.
        closed = tl.abs(act) < tau
        some = tl.maximum(some, tl.max(tl.where(there & (closed == 0), 1, 0), 0))
    tl.store(mask_ptr + pool * channels + channel, some.to(tl.uint8), mask=channel < channels)
    tl.store(sums_ptr + pool * blocks + block, tl.sum(some, 0))


@triton.jit
def _list_kernel(  # type: ignore[no-untyped-def]
    mask_ptr,  # *uint8 [p, channels]
    sums_ptr,  # *int32 [p, blocks]
    list_ptr,  # *int32 [p, channels], out
    counts_ptr,  # *int32 [p], out
    channels,
    blocks,
    BLOCK_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (p, blocks). A program lists its block's channels behind those of the blocks before."""
    pool = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    other = tl.arange(0, BLOCK_SUMS)
    sums = tl.load(sums_ptr + pool * blocks + other, mask=other < blocks, other=0)
    before = tl.sum(tl.where(other < block, sums, 0), 0)
    total = tl.sum(sums, 0)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    some = tl.load(mask_ptr + pool * channels + channel, mask=inside, other=0).to(tl.int32)
    place = before + tl.cumsum(some, 0) - 1
    tl.store(list_ptr + pool * channels + place, channel, mask=inside & (some > 0))
    # No channel is listed at or behind the total, so no program writes where another does.
    tl.store(list_ptr + pool * channels + channel, -1, mask=inside & (channel >= total))
    tl.store(counts_ptr + pool, total, mask=block == 0)


class Workspace:
    """Working memory of `ffn_union` for one stream; layers that follow one another share it.

    Attributes:
        sums: ``int32[pools * blocks]``, at least.
    """

    def __init__(self, pools: int, channels: int, device: torch.device | str) -> None:
        self.sums = torch.empty(pools * triton.cdiv(channels, _BLOCK), dtype=torch.int32, device=device)


def ffn_union(
    act: torch.Tensor,
    pools: torch.Tensor,
    mask: torch.Tensor,
    channels: torch.Tensor,
    counts: torch.Tensor,
    workspace: Workspace,
    tau: float,
    gate: bool = False,
) -> None:
    """Unite the channels that the rows of each pool open; 2 launches.

    Args:
        act: ``[T, I]`` activations ``SiLU(gate)`` of one of `DTYPES`, rows contiguous; with ``gate`` what comes before
            SiLU, which is then computed in float32.
        pools: ``int32[p + 1]`` first row of each pool, and the end; a pool may be empty, and opens nothing then.
        mask: ``bool[p, I]`` or ``uint8[p, I]``, written: 1 where not ``|act| < tau`` for some row of the pool.
        channels: ``int32[p, I]``, written: each pool's open channels, rising, then -1.
        counts: ``int32[p]``, written: how many they are.
        workspace: for at least as many pools and channels.
        tau: the layer's threshold; 0: all channels of a pool with rows.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong, or the workspace too small.
    """
    check("act", act, DTYPES, (None, None), contiguous=False)
    (_, width), device = act.shape, act.device
    check("pools", pools, torch.int32, (None,), device)
    if not len(pools):
        raise ValueError("pools must have at least 1 entry, the end of the last pool, got 0")
    count = len(pools) - 1
    check("mask", mask, (torch.bool, torch.uint8), (count, width), device)
    check("channels", channels, torch.int32, (count, width), device)
    check("counts", counts, torch.int32, (count,), device)
    if width > MOST_CHANNELS:
        raise ValueError(f"act must have at most {MOST_CHANNELS} channels, got {width}")
    blocks = triton.cdiv(width, _BLOCK)
    check("workspace.sums", workspace.sums, torch.int32, (None,), device)
    if len(workspace.sums) < count * blocks:
        raise ValueError(f"workspace is for {len(workspace.sums)} blocks of channels, got {count * blocks}")
    if not count:
        return
    if not blocks:
        counts.zero_()
        return
    mask = mask.view(torch.uint8)
    _open_kernel[(count, blocks)](
        act,
        pools,
        mask,
        workspace.sums,
        tau,
        width,
        blocks,
        act.stride(0),
        GATE=gate,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    _list_kernel[(count, blocks)](
        mask,
        workspace.sums,
        channels,
        counts,
        width,
        blocks,
        BLOCK_SUMS=triton.next_power_of_2(blocks),
        BLOCK=_BLOCK,
        num_warps=1,
    )


def work(rows: int, pools: int, channels: int, item_bytes: int) -> Work:
    """Least work of `ffn_union` for so many rows in pools: activations are read once, masks, lists and counts are
    written; a comparison per activation."""
    return Work(rows * channels * item_bytes + pools * (channels * 5 + 4), rows * channels)
