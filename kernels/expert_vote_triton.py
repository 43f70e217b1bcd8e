"""Fewer experts for the rows of a step, on the device: a pool's vote, as an edit of the router's logits.

`expert_vote.py` defines it: `softmax_route` gives each row's weights, `vote` the experts a pool may use. The logits of
the others become minus infinity, so that the host's own routing and fused experts go on with what is left. Only routers
that take the top-k of a softmax are served. Where such a router does not renormalise its weights, what it computes from
edited logits must be multiplied by `kept` to be what `edit_routing` gives.

Sums are in float32, in an order that depends on a pool's rows alone. Where two experts' sums differ by less than their
rounding (about 1e-7 of them per row), either may be chosen; of sums that are equal in float32 the smaller index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_specplug.kernels.top_votes_triton import most_voted
from vllm_specplug.kernels.triton_tools import Work, check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_EXPERTS = 1024
MOST_TOP_K = 32
#: Elements of a tile of rows: 32 registers of each of 256 threads.
_TILE = 8192
#: Rows of a pool that one program masks before more share the work; each of them counts the votes again.
_ROWS = 64
_MOST_SHARES = 8


@triton.jit(do_not_specialize=["pools"])
def _weights_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # *T [R, EXPERTS]
    pools_ptr,  # *int32 [pools + 1]
    weights_ptr,  # *float32 [R, EXPERTS], out: 0 but for the row's top k
    pools,
    logits_stride,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (R,). Nothing is written of a row in no pool."""
    row = tl.program_id(0).to(tl.int64)
    if (row < tl.load(pools_ptr)) | (row >= tl.load(pools_ptr + pools)):
        return
    expert = tl.arange(0, BLOCK)
    inside = expert < EXPERTS
    logits = tl.load(logits_ptr + row * logits_stride + expert, mask=inside, other=float("-inf")).to(tl.float32)
    left = logits
    top = expert < 0
    for _ in tl.static_range(TOP_K):
        best = tl.argmax(left, 0)
        top = top | (expert == best)
        left = tl.where(expert == best, float("-inf"), left)
    powers = tl.exp(logits - tl.max(logits, 0))
    shared = tl.where(top, powers, 0.0) if RENORMALIZE else powers
    weights = tl.where(top, powers / tl.sum(shared, 0), 0.0)
    tl.store(weights_ptr + row * EXPERTS + expert, weights, mask=inside)


@triton.jit(do_not_specialize=["budget"])
def _expert_vote_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # *T [R, EXPERTS]
    pools_ptr,  # *int32 [p + 1]
    weights_ptr,  # *float32 [R, EXPERTS]
    out_ptr,  # *T [R, EXPERTS], out; may be logits
    allowed_ptr,  # *uint8 [p, EXPERTS], out
    kept_ptr,  # *float32 [R], out; unused without KEPT
    budget,
    logits_stride,
    out_stride,
    EXPERTS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (p, shares). Each program of a pool counts its votes and masks a share of its rows."""
    pool = tl.program_id(0).to(tl.int64)
    start, end = tl.load(pools_ptr + pool), tl.load(pools_ptr + pool + 1)
    expert = tl.arange(0, BLOCK)
    inside = expert < EXPERTS
    votes = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK_ROWS):
        row = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < end)[:, None] & inside[None, :]
        votes += tl.sum(tl.load(weights_ptr + row[:, None] * EXPERTS + expert[None, :], mask=mask, other=0.0), 0)
    allowed, _ = most_voted(votes, expert, 0, budget, EXPERTS)
    if tl.program_id(1) == 0:
        tl.store(allowed_ptr + pool * EXPERTS + expert, allowed.to(tl.uint8), mask=inside)
    for first in range(start + tl.program_id(1) * BLOCK_ROWS, end, tl.num_programs(1) * BLOCK_ROWS):
        row = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < end)[:, None] & inside[None, :]
        place = row[:, None] * logits_stride + expert[None, :]
        logits = tl.load(logits_ptr + place, mask=mask, other=float("-inf"))
        edited = tl.where(allowed[None, :], logits, float("-inf"))
        tl.store(out_ptr + row[:, None] * out_stride + expert[None, :], edited, mask=mask)
        if KEPT:
            numbers = logits.to(tl.float32)
            # Rows behind the pool are minus infinity alone, and would be NaN.
            powers = tl.exp(numbers - tl.where(row < end, tl.max(numbers, 1), 0.0)[:, None])
            total = tl.where(row < end, tl.sum(powers, 1), 1.0)
            share = tl.sum(tl.where(allowed[None, :], powers, 0.0), 1) / total
            tl.store(kept_ptr + row, share, mask=row < end)


class Workspace:
    """Working memory of `expert_vote` for one stream; layers that follow one another share it.

    Attributes:
        weights: ``float32[rows, experts]`` weights of each row's top-k, 0 elsewhere.
    """

    def __init__(self, rows: int, experts: int, device: torch.device | str) -> None:
        self.weights = torch.empty(rows, experts, dtype=torch.float32, device=device)


def expert_vote(
    logits: torch.Tensor,
    pools: torch.Tensor,
    out: torch.Tensor,
    allowed: torch.Tensor,
    workspace: Workspace,
    top_k: int,
    budget: int,
    renormalize: bool,
    kept: torch.Tensor | None = None,
) -> None:
    """Let each pool's rows vote, and mask the logits of experts it may not use; 2 launches.

    Args:
        logits: ``[R, E]`` router logits of one of `DTYPES`, rows contiguous, no NaN, and a number above
            minus infinity in each row.
        pools: ``int32[p + 1]`` first row of each pool, and the end; a pool may be empty. Rows before and behind are
            left as they are.
        out: ``[R, E]`` of the logits' dtype, written: the logits, minus infinity where an expert is not allowed. May be
            ``logits`` itself; must not overlap it otherwise.
        allowed: ``uint8[p, E]``, written: 1 for the ``budget`` experts that each pool may use.
        workspace: for at least as many rows, and the same experts.
        top_k: experts of a row before.
        budget: experts of a pool.
        renormalize: the weights that vote sum to 1 in each row; else they are shares of the softmax over all experts.
        kept: ``float32[R]``, written if given: what part of a row's softmax its allowed experts have.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong, or a bound.
    """
    check("logits", logits, DTYPES, (None, None), contiguous=False)
    (rows, experts), device = logits.shape, logits.device
    check("pools", pools, torch.int32, (None,), device)
    if not len(pools):
        raise ValueError("pools must have at least 1 entry, the end of the last pool, got 0")
    check("out", out, logits.dtype, (rows, experts), device, contiguous=False)
    count = len(pools) - 1
    check("allowed", allowed, torch.uint8, (count, experts), device)
    check("workspace.weights", workspace.weights, torch.float32, (None, experts), device)
    if len(workspace.weights) < rows:
        raise ValueError(f"workspace is for {len(workspace.weights)} rows, got {rows}")
    if kept is not None:
        check("kept", kept, torch.float32, (rows,), device)
    if not 1 <= experts <= MOST_EXPERTS:
        raise ValueError(f"there must be 1 to {MOST_EXPERTS} experts, got {experts}")
    if not 1 <= top_k <= min(experts, MOST_TOP_K):
        raise ValueError(f"top_k must be 1 to {min(experts, MOST_TOP_K)}, got {top_k}")
    if not 1 <= budget <= experts:
        raise ValueError(f"budget must be 1 to {experts}, the number of experts, got {budget}")
    if not count:
        return
    block = triton.next_power_of_2(experts)
    if rows:
        _weights_kernel[(rows,)](
            logits,
            pools,
            workspace.weights,
            count,
            logits.stride(0),
            EXPERTS=experts,
            TOP_K=top_k,
            RENORMALIZE=renormalize,
            BLOCK=block,
            # A row in one warp, so that the largest is found without shared memory.
            num_warps=1,
        )
    # Pools are about as large as each other, or there is one.
    shares = max(1, min(_MOST_SHARES, triton.cdiv(rows, _ROWS * count)))
    _expert_vote_kernel[(count, shares)](
        logits,
        pools,
        workspace.weights,
        out,
        allowed,
        workspace.weights if kept is None else kept,
        budget,
        logits.stride(0),
        out.stride(0),
        EXPERTS=experts,
        KEPT=kept is not None,
        BLOCK_ROWS=min(16, _TILE // block),
        BLOCK=block,
        num_warps=8 if block >= 256 else 4,
    )


def work(rows: int, pools: int, experts: int, top_k: int, item_bytes: int) -> Work:
    """Least work of `expert_vote` for so many rows in pools: logits are read once and written once, ``allowed`` is
    written; an exponential per logit and an addition per vote."""
    return Work(2 * rows * experts * item_bytes + pools * experts, rows * (experts + top_k))
