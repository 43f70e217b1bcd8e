"""Which units of a long context are attended, on the device: votes and the choice.

`block_select` votes and chooses as `votes_reference` and `choose_reference` of `block_select.py` say, from the
summaries that `block_summary` keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_specplug.kernels.block_summary_triton import DTYPES, block_summary, programs_for, summary_work
from vllm_specplug.kernels.top_votes_triton import most_voted
from vllm_specplug.kernels.triton_tools import Work, check

__all__ = ["DTYPES", "MOST_UNITS", "Workspace", "block_select", "block_summary", "select_work", "summary_work"]

#: Most units of a request: one program holds all of its votes in registers.
MOST_UNITS = 16_384
#: Units per tile of scores; `Workspace` has one partial softmax for each.
_BLOCK_UNITS = 64
#: Units per tile of votes, query heads per tile: 128 * 32 float32 are 32 registers of each of 128 threads.
_BLOCK_VOTES = 128
_BLOCK_HEADS = 32


class Workspace:
    """Working memory of `block_select` for one stream; layers that follow one another share it.

    Attributes:
        scores: ``float32[n, heads, tiles of units]`` scaled scores.
        maxima, sums: ``float32[n, heads, tiles]`` of each tile the largest score, and the sum of the exponentials
            relative to it.
        votes: ``float32[n, kv_heads, units]``, row 0 of a request alone where its heads vote together; of what no
            choice needed, undefined.
        means: ``float32[n, heads, head_size]`` mean queries.
    """

    def __init__(
        self, requests: int, heads: int, kv_heads: int, head_size: int, most_units: int, device: torch.device | str
    ) -> None:
        """
        Args:
            requests, most_units: the largest numbers that a launch may have.

        Raises:
            ValueError: ``most_units`` is not between 1 and `MOST_UNITS`.
        """
        if not 1 <= most_units <= MOST_UNITS:
            raise ValueError(f"most_units must be 1 to {MOST_UNITS}, got {most_units}")
        self.most_units = most_units
        tiles = triton.cdiv(most_units, _BLOCK_UNITS)
        # Rows of whole tiles are aligned.
        self.scores = torch.empty(requests, heads, tiles * _BLOCK_UNITS, dtype=torch.float32, device=device)
        self.maxima = torch.empty(requests, heads, tiles, dtype=torch.float32, device=device)
        self.sums = torch.empty_like(self.maxima)
        self.votes = torch.empty(requests, kv_heads, tiles * _BLOCK_UNITS, dtype=torch.float32, device=device)
        self.means = torch.empty(requests, heads, head_size, dtype=torch.float32, device=device)

    def check(self, requests: int, heads: int, kv_heads: int, head_size: int, device: torch.device) -> None:
        """Raise ``ValueError`` unless it serves so many requests of such heads on the device."""
        most, *shape = self.means.shape
        if requests > most or shape != [heads, head_size] or self.votes.shape[1] != kv_heads:
            raise ValueError(
                f"workspace is for {most} requests, {shape[0]} heads of {shape[1]}, {self.votes.shape[1]} KV heads, "
                f"got {requests}, {heads} of {head_size}, {kv_heads}"
            )
        if self.means.device != device:
            raise ValueError(f"the workspace must be on {device}, got {self.means.device}")


@triton.jit
def _mean_kernel(  # type: ignore[no-untyped-def]
    query_ptr,  # *T [T, heads, HEAD_SIZE]
    starts_ptr,  # *int32 [n + 1]
    means_ptr,  # *float32 [n, heads, HEAD_SIZE], out
    query_stride,
    query_head_stride,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Grid: (n, heads). Mean of a request's rows; nothing is written for one without rows."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    start, end = tl.load(starts_ptr + request), tl.load(starts_ptr + request + 1)
    if end <= start:
        return
    column = tl.arange(0, BLOCK_SIZE)
    inside = column < HEAD_SIZE
    total = tl.zeros([BLOCK_SIZE], tl.float32)
    for first in range(start, end, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        place = row[:, None].to(tl.int64) * query_stride + head * query_head_stride + column[None, :]
        tile = tl.load(query_ptr + place, mask=(row < end)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float32), 0)
    out = means_ptr + (request * HEADS + head) * HEAD_SIZE + column
    tl.store(out, total / (end - start), mask=inside)


@triton.jit
def _voting(  # type: ignore[no-untyped-def]
    starts_ptr, units_ptr, counts_ptr, request, head, first, most, width, KV_HEADS: tl.constexpr, BLOCK_KV: tl.constexpr
):
    """Units that are voted on; 0 if no choice depends on votes. ``head``: -1: any head's choice."""
    rows = tl.load(starts_ptr + request + 1) - tl.load(starts_ptr + request)
    units = tl.minimum(tl.load(units_ptr + request), most)
    at = tl.arange(0, BLOCK_KV)
    counts = tl.load(counts_ptr + request * KV_HEADS + at, mask=at < KV_HEADS, other=-1)
    counts = tl.minimum(counts, width)
    choosing = (counts > first) & (counts < units) & ((head < 0) | (at == head))
    return tl.where((tl.max(choosing.to(tl.int32), 0) > 0) & (rows > 0), units, 0)


@triton.jit(do_not_specialize=["programs", "first", "most", "width"])
def _scores_kernel(  # type: ignore[no-untyped-def]
    query_ptr,  # *T [T, heads, HEAD_SIZE] rows, or *float32 [n, heads, HEAD_SIZE] if MEAN
    starts_ptr,  # *int32 [n + 1]
    summaries_ptr,  # *S [blocks, UNITS_PER_BLOCK, KV_HEADS, PARTS, HEAD_SIZE]
    block_table_ptr,  # *int32 [n, max_blocks]
    units_ptr,  # *int32 [n]
    counts_ptr,  # *int32 [n, KV_HEADS]
    scores_ptr,  # *float32 [n, heads, scores_stride], out
    maxima_ptr,  # *float32 [n, heads, tiles], out
    sums_ptr,  # *float32 [n, heads, tiles], out
    scale,
    programs,
    first,
    most,
    width,
    query_stride,
    query_head_stride,
    summaries_block_stride,
    summaries_unit_stride,
    summaries_head_stride,
    summaries_part_stride,
    table_stride,
    scores_stride,
    tiles,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    UNITS_PER_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    MEAN: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Grid: (n, KV_HEADS, programs). Scores of a KV head's query heads; the programs take tiles of units in turn."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    units = _voting(
        starts_ptr, units_ptr, counts_ptr, request, head if BY_HEAD else -1, first, most, width, KV_HEADS, BLOCK_KV
    )
    if tl.program_id(2) * BLOCK_UNITS >= units:
        return
    column = tl.arange(0, BLOCK_SIZE)
    inside = column < HEAD_SIZE
    member = tl.arange(0, BLOCK_GROUP)
    row = request if MEAN else tl.load(starts_ptr + request).to(tl.int64)
    place = row * query_stride + (head * GROUP + member[:, None]) * query_head_stride + column[None, :]
    query = tl.load(query_ptr + place, mask=(member < GROUP)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    kind = summaries_ptr.dtype.element_ty
    # Upper bound of a product: where the query is positive times the largest key, else times the least.
    upper = query if PARTS == 1 else tl.maximum(query, 0.0)
    lower = tl.minimum(query, 0.0)
    upper_first, lower_first = upper.to(kind), lower.to(kind)
    # A mean of narrow numbers does not fit one: what is lost is a second, small factor.
    upper_rest = (upper - upper_first.to(tl.float32)).to(kind)
    lower_rest = (lower - lower_first.to(tl.float32)).to(kind)
    head_row = request * KV_HEADS * GROUP + head * GROUP + member
    for tile in range(tl.program_id(2), tl.cdiv(units, BLOCK_UNITS), programs):
        unit = tile * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
        there = unit < units
        block = tl.load(block_table_ptr + request * table_stride + unit // UNITS_PER_BLOCK, mask=there, other=0)
        start = block.to(tl.int64) * summaries_block_stride + (unit % UNITS_PER_BLOCK) * summaries_unit_stride
        pointers = summaries_ptr + start[None, :] + head * summaries_head_stride + column[:, None]
        mask = inside[:, None] & there[None, :]
        part = tl.load(pointers, mask=mask, other=0.0)
        scores = tl.dot(upper_first, part, input_precision="tf32x3")
        if SPLIT:
            scores = tl.dot(upper_rest, part, scores, input_precision="tf32x3")
        if PARTS == 2:
            part = tl.load(pointers + summaries_part_stride, mask=mask, other=0.0)
            scores = tl.dot(lower_first, part, scores, input_precision="tf32x3")
            if SPLIT:
                scores = tl.dot(lower_rest, part, scores, input_precision="tf32x3")
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        largest = tl.max(scores, 1)
        total = tl.sum(tl.exp(scores - largest[:, None]), 1)
        out = scores_ptr + head_row[:, None] * scores_stride + unit[None, :]
        tl.store(out, scores, mask=(member < GROUP)[:, None] & there[None, :])
        tl.store(maxima_ptr + head_row * tiles + tile, largest, mask=member < GROUP)
        tl.store(sums_ptr + head_row * tiles + tile, total, mask=member < GROUP)


@triton.jit(do_not_specialize=["programs", "first", "most", "width"])
def _votes_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,  # *float32 [n, KV_HEADS * GROUP, scores_stride]
    maxima_ptr,  # *float32 [n, KV_HEADS * GROUP, tiles]
    sums_ptr,  # *float32 [n, KV_HEADS * GROUP, tiles]
    starts_ptr,  # *int32 [n + 1]
    units_ptr,  # *int32 [n]
    counts_ptr,  # *int32 [n, KV_HEADS]
    votes_ptr,  # *float32 [n, KV_HEADS, scores_stride], out
    programs,
    first,
    most,
    width,
    scores_stride,
    tiles,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BY_HEAD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Grid: (n, KV_HEADS if BY_HEAD else 1, programs). Mean softmax over the units of the voting query heads."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    units = _voting(
        starts_ptr, units_ptr, counts_ptr, request, head if BY_HEAD else -1, first, most, width, KV_HEADS, BLOCK_KV
    )
    VOTERS: tl.constexpr = GROUP if BY_HEAD else GROUP * KV_HEADS
    tile = tl.arange(0, BLOCK_TILES)
    for part in range(tl.program_id(2), tl.cdiv(units, BLOCK_UNITS), programs):
        unit = part * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
        votes = tl.zeros([BLOCK_UNITS], tl.float32)
        for begin in range(0, VOTERS, BLOCK_HEADS):
            voter = begin + tl.arange(0, BLOCK_HEADS)
            row = request * KV_HEADS * GROUP + head * GROUP + voter
            mask = (voter < VOTERS)[:, None] & (tile < tl.cdiv(units, TILE))[None, :]
            maxima = tl.load(maxima_ptr + row[:, None] * tiles + tile[None, :], mask=mask, other=float("-inf"))
            sums = tl.load(sums_ptr + row[:, None] * tiles + tile[None, :], mask=mask, other=0.0)
            # Rows behind the last voter are not -inf, which would make NaN of them.
            largest = tl.where(voter < VOTERS, tl.max(maxima, 1), 0.0)
            total = tl.where(voter < VOTERS, tl.sum(sums * tl.exp(maxima - largest[:, None]), 1), 1.0)
            mask = (voter < VOTERS)[:, None] & (unit < units)[None, :]
            place = row[:, None] * scores_stride + unit[None, :]
            scores = tl.load(scores_ptr + place, mask=mask, other=float("-inf"))
            votes += tl.sum(tl.exp(scores - largest[:, None]) / total[:, None], 0)
        out = votes_ptr + (request * KV_HEADS + head) * scores_stride + unit
        tl.store(out, votes / VOTERS, mask=unit < units)


@triton.jit(do_not_specialize=["first", "most", "width"])
def _choose_kernel(  # type: ignore[no-untyped-def]
    votes_ptr,  # *float32 [n, KV_HEADS, votes_stride]
    starts_ptr,  # *int32 [n + 1]
    units_ptr,  # *int32 [n]
    counts_ptr,  # *int32 [n, KV_HEADS]
    chosen_ptr,  # *int32 [n, KV_HEADS, width], out
    first,
    most,
    width,
    votes_stride,
    KV_HEADS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid: (n, KV_HEADS). The whole of a head's votes in registers."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    rows = tl.load(starts_ptr + request + 1) - tl.load(starts_ptr + request)
    units = tl.maximum(tl.minimum(tl.load(units_ptr + request), most), 0)
    count = tl.load(counts_ptr + request * KV_HEADS + head)
    count = tl.where(rows > 0, tl.minimum(tl.minimum(count, units), width), 0)
    out = chosen_ptr + (request * KV_HEADS + head) * width
    if count > 0:
        forced = tl.minimum(first, count)
        index = tl.arange(0, BLOCK)
        row = request * KV_HEADS + (head if BY_HEAD else 0)
        # Where all are chosen or the first alone, there are no votes.
        voted = tl.where((count > forced) & (count < units), units, 0)
        votes = tl.load(votes_ptr + row * votes_stride + index, mask=index < voted, other=0.0)
        chosen, place = most_voted(votes, index, forced, count, units)
        tl.store(out + place, index, mask=chosen)
    # From a multiple of BLOCK_OUT on, so that stores are aligned.
    for begin in range(tl.maximum(count, 0) // BLOCK_OUT * BLOCK_OUT, width, BLOCK_OUT):
        place = begin + tl.arange(0, BLOCK_OUT)
        tl.store(out + place, -1, mask=(place >= count) & (place < width))


def block_select(
    query: torch.Tensor,
    query_starts: torch.Tensor,
    summaries: torch.Tensor,
    block_table: torch.Tensor,
    units: torch.Tensor,
    counts: torch.Tensor,
    chosen: torch.Tensor,
    workspace: Workspace,
    scale: float,
    first: int,
    by_head: bool = False,
    all_rows: bool = False,
) -> None:
    """Choose the units of each request and KV head that its rows attend, in 3 launches, 4 with ``all_rows``.

    Nothing is read of a request without rows or without a count between ``first`` and its units: their choice needs no
    votes.

    Args:
        query: ``[T, heads, head_size]`` of one of `DTYPES`, last dimension contiguous; query head ``h`` belongs to KV
            head ``h * kv_heads // heads``.
        query_starts: ``int32[n + 1]`` first row of each request, and the end.
        summaries: ``[blocks, units_per_block, kv_heads, parts, head_size]`` as `block_summary` writes them.
        block_table: ``int32[n, max_blocks]``, each row contiguous.
        units: ``int32[n]`` units that can be chosen, all with summaries; what exceeds the workspace is not chosen.
        counts: ``int32[n, kv_heads]`` how many units to choose; what exceeds ``units`` or ``most`` is cut off;
            negative: none, for all of the context is attended.
        chosen: ``int32[n, kv_heads, most]``, written: the chosen units, rising, then -1; all -1 for a request without
            rows or a head with a negative count.
        workspace: for at least as many requests, and the same heads.
        scale: factor of the scores.
        first: units at the beginning that are chosen in any case; where a count is lower, its first units are.
        by_head: each KV head chooses by its own query heads; else by one vote of all heads.
        all_rows: the mean query of a request's rows votes; else that of its first row.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong, or the workspace too small.
    """
    check("query", query, DTYPES, (None, None, None), contiguous=False)
    device, (_, heads, head_size) = query.device, query.shape
    check("summaries", summaries, DTYPES, (None, None, None, None, head_size), device, contiguous=False)
    _, units_per_block, kv_heads, parts, _ = summaries.shape
    if parts not in (1, 2) or not units_per_block:
        raise ValueError(f"summaries must have 1 or 2 parts and units in a block, got {list(summaries.shape)}")
    if not kv_heads or not heads or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads")
    check("block_table", block_table, torch.int32, (None, None), device, contiguous=False)
    count = len(block_table)
    check("query_starts", query_starts, torch.int32, (count + 1,), device)
    check("units", units, torch.int32, (count,), device)
    check("counts", counts, torch.int32, (count, kv_heads), device)
    check("chosen", chosen, torch.int32, (count, kv_heads, None), device)
    if first < 0:
        raise ValueError(f"first must not be negative, got {first}")
    workspace.check(count, heads, kv_heads, head_size, device)
    width = chosen.shape[2]
    if not count or not width:
        return
    most = min(workspace.most_units, block_table.shape[1] * units_per_block)
    rows = query
    if all_rows:
        rows = workspace.means
        _mean_kernel[(count, heads)](
            query,
            query_starts,
            rows,
            *query.stride()[:2],
            HEADS=heads,
            HEAD_SIZE=head_size,
            BLOCK_ROWS=16,
            BLOCK_SIZE=triton.next_power_of_2(head_size),
            num_warps=4,
        )
    group, tiles = heads // kv_heads, workspace.maxima.shape[2]
    block_kv = triton.next_power_of_2(kv_heads)
    programs = programs_for(count * kv_heads, triton.cdiv(most, _BLOCK_UNITS))
    _scores_kernel[(count, kv_heads, programs)](
        rows,
        query_starts,
        summaries,
        block_table,
        units,
        counts,
        workspace.scores,
        workspace.maxima,
        workspace.sums,
        scale,
        programs,
        first,
        most,
        width,
        *rows.stride()[:2],
        *summaries.stride()[:4],
        block_table.stride(0),
        workspace.scores.stride(1),
        tiles,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_SIZE=head_size,
        UNITS_PER_BLOCK=units_per_block,
        PARTS=parts,
        BY_HEAD=by_head,
        MEAN=all_rows,
        # Rows of the summaries' dtype are exact as they are.
        SPLIT=summaries.dtype not in (torch.float32, rows.dtype),
        BLOCK_KV=block_kv,
        # Products have at least 16 rows and 16 terms.
        BLOCK_GROUP=max(16, triton.next_power_of_2(group)),
        BLOCK_UNITS=_BLOCK_UNITS,
        BLOCK_SIZE=max(16, triton.next_power_of_2(head_size)),
        num_warps=4,
        # Two stages of float32 would not fit an A100's shared memory beside wide heads.
        num_stages=1 if summaries.dtype == torch.float32 else 2,
    )
    voters = group if by_head else heads
    ballots = kv_heads if by_head else 1
    programs = programs_for(count * ballots, triton.cdiv(most, _BLOCK_VOTES))
    _votes_kernel[(count, ballots, programs)](
        workspace.scores,
        workspace.maxima,
        workspace.sums,
        query_starts,
        units,
        counts,
        workspace.votes,
        programs,
        first,
        most,
        width,
        workspace.scores.stride(1),
        tiles,
        KV_HEADS=kv_heads,
        GROUP=group,
        BY_HEAD=by_head,
        TILE=_BLOCK_UNITS,
        BLOCK_KV=block_kv,
        BLOCK_HEADS=min(_BLOCK_HEADS, triton.next_power_of_2(voters)),
        BLOCK_TILES=triton.next_power_of_2(tiles),
        BLOCK_UNITS=_BLOCK_VOTES,
        num_warps=4,
    )
    block = triton.next_power_of_2(most)
    _choose_kernel[(count, kv_heads)](
        workspace.votes,
        query_starts,
        units,
        counts,
        chosen,
        first,
        most,
        width,
        workspace.votes.stride(1),
        KV_HEADS=kv_heads,
        BY_HEAD=by_head,
        BLOCK=block,
        BLOCK_OUT=min(1024, triton.next_power_of_2(width)),
        # 16 votes in each thread's registers.
        num_warps=max(1, min(32, block // 512)),
    )


def select_work(
    units: list[int], rows: list[int], heads: int, kv_heads: int, parts: int, head_size: int, item_bytes: int
) -> Work:
    """Least work of `block_select` for requests with so many units and voting rows: summaries and rows are read once,
    a choice of all units is written; a product of each query head with each unit's parts."""
    total = sum(units)
    moved = total * kv_heads * (parts * head_size * item_bytes + 4) + sum(rows) * heads * head_size * item_bytes
    return Work(moved, 2 * total * heads * parts * head_size)
