"""What the attention kernels for GPUs share: how the work is divided, and the device code of one program.

A program attends a *row tile* (rows of one request times the query heads of one KV head, packed into ``BLOCK_M``) over
one *split* of the slots, ``TILE`` slots at a time, with a running maximum and total (online softmax, arXiv 2205.14135).
Splits are merged by a second kernel (as in flash decoding). How many splits a request gets follows from its own length
and from what the host knows, so its result does not depend, to the bit, on what else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_specplug.kernels.tree_attention import DTYPES
from vllm_specplug.kernels.triton_tools import check

#: The running maximum begins here rather than at -inf: where nothing is seen yet, no difference of infinities is taken.
FLOOR = tl.constexpr(-1e30)
LOG2_E = 1.4426950408889634
#: Bytes of one tile of keys. With the values and three stages in flight a program of 4 warps takes up to 113 KiB of
#: shared memory: two fit a processor of an H100 or H200, one or two that of an A100 (`bench_kernel_resources.py`).
TILE_BYTES = 16384
STAGES = 3


class AttentionPlan:
    """How attention is divided among programs, and the memory for what splits leave to merge.

    One serves every layer of a model whose heads are alike: launches of one stream use the memory one after the other.
    All of it is allocated here, so launches can be captured in CUDA graphs.

    Attributes:
        tile: slots per step of a program.
        block_m: packed rows of a program, a power of two; ``tile_rows`` rows of a request take part.
        tiles: row tiles per request.
        workspace_bytes: memory held.
    """

    def __init__(
        self,
        max_rows: int,
        max_requests: int,
        rows_per_request: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        splits: int = 1,
        least: int = 1024,
    ) -> None:
        """
        Args:
            max_rows: most rows of a step, all requests together (only the memory depends on it).
            max_requests: most requests of a step.
            rows_per_request: most rows of a request, the root included; requests with more are left to another kernel.
            splits: most programs that share the slots of one request, KV head and row tile.
            least: slots that a split has at least, unless it is the only one. A split reads
                ``2 * least * head_size`` values and leaves ``2 * block_m * head_size`` floats to write and read.

        Raises:
            ValueError: a number or the dtype is outside what the kernels can do.
        """
        named = {"max_rows": max_rows, "max_requests": max_requests, "rows_per_request": rows_per_request}
        for name, value in (named | {"kv_heads": kv_heads, "splits": splits, "least": least}).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if heads < 1 or heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads {kv_heads}, got {heads}")
        if not 16 <= head_size <= 256:
            raise ValueError(f"head_size must be 16 to 256, got {head_size}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
        if splits > 128:
            raise ValueError(f"splits must be at most 128, the merge holds all at once, got {splits}")
        self.max_rows, self.max_requests, self.rows_per_request = max_rows, max_requests, rows_per_request
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        self.dtype, self.device, self.splits = dtype, torch.device(device), splits
        self.group = heads // kv_heads
        self.head = triton.next_power_of_2(head_size)
        # Trees of more than 32 rows have masks of several words: with wide tiles as well, registers would not do.
        most_slots = 128 if rows_per_request <= 32 else 64
        self.tile = max(16, min(most_slots, TILE_BYTES // (self.head * dtype.itemsize)))
        self.least = triton.cdiv(least, self.tile)
        # What a thread's registers hold of the sums: 128 x 128 or 64 x 256 for 8 warps, 64 x 128 for 4. Products of
        # float32 are exact and not made by tensor cores, and need more registers.
        most = 16 if dtype == torch.float32 else 64 if self.head > 128 else 128
        packed = triton.next_power_of_2(rows_per_request * self.group)
        self.block_m = max(16, min(most, packed), triton.next_power_of_2(self.group))
        if self.block_m > most:
            raise ValueError(f"heads may be at most {most} times kv_heads for {dtype}, got {heads} and {kv_heads}")
        self.tile_rows = self.block_m // self.group
        self.tiles = triton.cdiv(rows_per_request, self.tile_rows)
        # 128 x 128 scores of 4 warps would not leave registers for the sums, whatever the head's size.
        self.warps = 8 if self.block_m > 64 or self.block_m * self.head > 64 * 128 else 4
        self.precision = "ieee" if dtype == torch.float32 else "tf32"
        places = max_rows * heads * splits if splits > 1 else 0
        self.partial = torch.empty(places * head_size, dtype=torch.float32, device=self.device)
        self.tops, self.totals = torch.empty(2, places, dtype=torch.float32, device=self.device)
        self.parts = torch.empty(max_requests * kv_heads, dtype=torch.int32, device=self.device)
        # With its index: "cuda" alone is no tensor's device.
        self.device = self.parts.device

    @property
    def workspace_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.partial, self.tops, self.totals, self.parts))

    def grid(self, requests: int) -> tuple[int, int, int]:
        """Programs of an attention kernel. Those that share keys come one after the other."""
        return self.tiles * self.kv_heads, self.splits, requests

    def check(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_table: torch.Tensor,
        query_starts: torch.Tensor,
        lengths: torch.Tensor,
        bits: torch.Tensor,
        out: torch.Tensor,
        scale: float,
    ) -> None:
        """Raise ``ValueError`` unless the arguments that both kernels have fit this plan. Reads no values."""
        rows, requests = len(query) if query.dim() else 0, len(lengths) if lengths.dim() else 0
        device = self.device
        shape = (rows, self.heads, self.head_size)
        check("query", query, self.dtype, shape, device, contiguous=False)
        check("out", out, self.dtype, shape, device, contiguous=False)
        check("key_cache", key_cache, self.dtype, (None, None, self.kv_heads, self.head_size), device, False)
        check("value_cache", value_cache, self.dtype, tuple(key_cache.shape), device, contiguous=False)
        check("lengths", lengths, torch.int32, (requests,), device)
        check("query_starts", query_starts, torch.int32, (requests + 1,), device)
        check("block_table", block_table, torch.int32, (None, None), device, contiguous=False)
        check("bits", bits, torch.int32, (None, None), device, contiguous=False)
        if len(block_table) < requests:
            raise ValueError(f"block_table must have a row for each of {requests} requests, got {len(block_table)}")
        if len(bits) < rows or bits.shape[1] * 32 < self.rows_per_request:
            raise ValueError(
                f"bits must be [{rows}, {-(-self.rows_per_request // 32)}] or more, got {list(bits.shape)}"
            )
        if key_cache.shape[1] % 16:
            raise ValueError(f"key_cache's blocks must have a multiple of 16 slots, got {key_cache.shape[1]}")
        if requests > self.max_requests:
            raise ValueError(f"lengths must have at most {self.max_requests} entries, got {requests}")
        if self.splits > 1 and rows > self.max_rows:
            raise ValueError(f"query must have at most {self.max_rows} rows, got {rows}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")

    def merge(self, out: torch.Tensor, query_starts: torch.Tensor) -> None:
        """Write to ``out`` what the splits found; rows with one split are there already."""
        if self.splits == 1:
            return
        requests = len(query_starts) - 1
        # A program takes all heads of a group where that leaves enough programs, else one: few rows would else be
        # merged by few programs. The result is the same.
        step = self.group if requests * self.rows_per_request * self.kv_heads >= 1024 else 1
        wide = triton.next_power_of_2(self.splits)
        merge_splits_kernel[(self.heads // step, self.rows_per_request, requests)](
            out,
            self.partial,
            self.tops,
            self.totals,
            self.parts,
            query_starts,
            out.stride(0),
            out.stride(1),
            ROWS=self.rows_per_request,
            HEADS=self.heads,
            KV_HEADS=self.kv_heads,
            STEP=step,
            SPLITS=self.splits,
            WIDE=wide,
            HEAD_SIZE=self.head_size,
            HEAD=self.head,
            num_warps=4 if wide * self.head >= 4096 else 1,
        )


def plan_splits(
    requests: int, kv_heads: int, longest: int, row_tiles: int = 1, processors: int = 132
) -> tuple[int, int]:
    """Reasonable ``splits`` and ``least`` for `AttentionPlan`; the numbers behind it were thought out, not measured.

    Enough programs that every processor has two where the batch is small, and no program with more than 4,096 slots up
    to the longest context, so that one long request does not keep a few processors busy while the rest are done.
    Where the batch is large, what splits write and merge stays below a tenth of what they read of the cache; where it
    is small, memory is not what the time goes to.

    Args:
        requests: usual ones of a step.
        longest: longest usual context.
        row_tiles: `AttentionPlan.tiles`.
        processors: of the device (132: H100, H200).
    """
    without = max(1, requests * kv_heads * row_tiles)
    to_fill = -(-2 * processors // without)
    small = without < 2 * processors
    least = 256 if small else 2048
    return max(1, min(128, max(to_fill, -(-longest // 4096)), -(-longest // least))), least


@triton.jit
def share_of(  # type: ignore[no-untyped-def]
    length, SPLITS: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr
):
    """Slots of each split (the last may have fewer), whole tiles; at least ``LEAST`` tiles if there are two splits."""
    tiles = tl.cdiv(length, TILE)
    wanted = tl.minimum(tl.maximum(tiles // LEAST, 1), SPLITS)
    return tl.cdiv(tiles, wanted) * TILE


@triton.jit
def packed_rows(  # type: ignore[no-untyped-def]
    tile, rows, kv_head, GROUP: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Row of the request, query head and whether it counts, of each packed row.

    Those that do not count repeat the last row: what is computed for them is finite and is not stored.
    """
    index = tl.arange(0, BLOCK_M)
    row = tile * TILE_ROWS + index // GROUP
    live = (index < TILE_ROWS * GROUP) & (row < rows)
    return tl.minimum(row, rows - 1), kv_head * GROUP + index % GROUP, live


@triton.jit
def load_query(  # type: ignore[no-untyped-def]
    query_ptr, row, head, row_stride, head_stride, HEAD_SIZE: tl.constexpr, HEAD: tl.constexpr
):
    """Query ``[BLOCK_M, HEAD]``; ``row`` is one of the step."""
    dim = tl.arange(0, HEAD)
    at = row[:, None] * row_stride + head[:, None] * head_stride + dim[None, :]
    if HEAD == HEAD_SIZE:
        query = tl.load(query_ptr + at)
    else:
        query = tl.load(query_ptr + at, mask=dim[None, :] < HEAD_SIZE, other=0.0)
    return query


@triton.jit
def load_slots(  # type: ignore[no-untyped-def]
    ptr, offset, inside, MASKED: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD: tl.constexpr
):
    """Keys or values ``[TILE, HEAD]`` at ``offset``; 0 where the slot is not ``inside`` or past the head."""
    dim = tl.arange(0, HEAD)
    at = ptr + offset[:, None] + dim[None, :]
    if MASKED:
        loaded = tl.load(at, mask=inside[:, None] & (dim[None, :] < HEAD_SIZE), other=0.0)
    elif HEAD == HEAD_SIZE:
        loaded = tl.load(at)
    else:
        loaded = tl.load(at, mask=dim[None, :] < HEAD_SIZE, other=0.0)
    return loaded


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    acc,  # float32 [BLOCK_M, HEAD] sums of weighted values
    top,  # float32 [BLOCK_M] largest score
    total,  # float32 [BLOCK_M] sums of weights
    query,  # [BLOCK_M, HEAD]
    key_ptr,  # of the KV head
    value_ptr,  # of the KV head
    table_ptr,  # *int32 the request's blocks
    units_ptr,  # *int32 the chosen units, if UNIT
    bits_ptr,  # *int32 [BLOCK_M] words of each row
    depths_ptr,  # *int32 of the request's rows, if WINDOW
    nearest,  # int32 [BLOCK_M] first position that each row sees, if WINDOW
    low,  # first slot (or place in the list of units' slots)
    high,  # after the last of them
    begin,  # slots below are not read, if MASKED
    context,  # slots from here on are the request's own rows
    end,  # slots from here on are not read, if MASKED
    factor,  # of the scores, log2(e) times the scale
    key_block_stride,
    key_slot_stride,
    value_block_stride,
    value_slot_stride,
    UNIT: tl.constexpr,  # slots of the units that are listed; 0: slots follow one another
    MASKED: tl.constexpr,  # whether a row may not see all slots
    WINDOW: tl.constexpr,  # whether there is a window
    ALIGNED: tl.constexpr,  # whether a tile lies in one block
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    WORDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc``, ``top``, ``total`` after slots ``low`` to ``high``, tile by tile.

    Unlisted slots without ``MASKED`` must be whole tiles of the context.
    """
    place = tl.arange(0, TILE)
    PARTIAL: tl.constexpr = MASKED or UNIT > 0
    # Where the next tile lies is read one tile ahead: keys and values are then loaded several tiles ahead, which the
    # compiler does not do where an address comes from a load of the same step.
    if UNIT:
        units = tl.load(units_ptr + (low + place) // UNIT, mask=low + place < high, other=0)
        blocks = tl.load(table_ptr + units * UNIT // BLOCK_SIZE)
    elif ALIGNED:
        blocks = tl.load(table_ptr + low // BLOCK_SIZE, mask=low < high, other=0)
    else:
        blocks = tl.load(table_ptr + (low + place) // BLOCK_SIZE, mask=low + place < high, other=0)
    for start in range(low, high, TILE):
        slot = start + place
        inside = slot < high
        if UNIT:
            slot = units * UNIT + slot % UNIT
        elif MASKED:
            inside = (slot >= begin) & (slot < end)
        within = slot % BLOCK_SIZE
        key_offset = blocks.to(tl.int64) * key_block_stride + within * key_slot_stride
        value_offset = blocks.to(tl.int64) * value_block_stride + within * value_slot_stride
        keys = load_slots(key_ptr, key_offset, inside, PARTIAL, HEAD_SIZE, HEAD)
        values = load_slots(value_ptr, value_offset, inside, PARTIAL, HEAD_SIZE, HEAD)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if MASKED:
            own = slot - context
            seen = (slot < context)[None, :]
            # The compiler takes these loads out of the loop.
            for n in tl.static_range(WORDS):
                bit = (tl.load(bits_ptr + n)[:, None] >> (own & 31)[None, :]) & 1
                seen = seen | ((bit != 0) & (own >> 5 == n)[None, :])
            seen = seen & inside[None, :]
            if WINDOW:
                depth = tl.load(depths_ptr + own, mask=inside & (own >= 0), other=0)
                position = tl.where(own < 0, slot, context + depth)
                seen = seen & (position[None, :] >= nearest[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        elif PARTIAL:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        top = highest
        if UNIT:
            following = start + TILE + place
            units = tl.load(units_ptr + following // UNIT, mask=following < high, other=0)
            blocks = tl.load(table_ptr + units * UNIT // BLOCK_SIZE)
        elif ALIGNED:
            blocks = tl.load(table_ptr + (start + TILE) // BLOCK_SIZE, mask=start + TILE < high, other=0)
        else:
            following = start + TILE + place
            blocks = tl.load(table_ptr + following // BLOCK_SIZE, mask=following < high, other=0)
    return acc, top, total


@triton.jit
def store_rows(  # type: ignore[no-untyped-def]
    acc,
    top,
    total,
    out_ptr,
    partial_ptr,  # out *float32 [max_rows, HEADS, SPLITS, HEAD_SIZE]
    tops_ptr,  # out *float32 [max_rows, HEADS, SPLITS]
    totals_ptr,  # out *float32 [max_rows, HEADS, SPLITS]
    parts_ptr,  # out *int32, of the request and KV head
    row,  # int64 [BLOCK_M] of the step
    head,
    live,
    row_stride,
    head_stride,
    tile,
    split,
    parts,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
):
    """The result if the request has one split, else this split's part of it."""
    dim = tl.arange(0, HEAD)
    kept = live[:, None] & (dim[None, :] < HEAD_SIZE)
    if SPLITS > 1:
        tl.store(parts_ptr, parts, mask=(split == 0) & (tile == 0))
    if parts == 1:
        at = out_ptr + row[:, None] * row_stride + head[:, None] * head_stride + dim[None, :]
        tl.store(at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=kept)
    elif SPLITS > 1:
        place = (row * HEADS + head) * SPLITS + split
        tl.store(partial_ptr + place[:, None] * HEAD_SIZE + dim[None, :], acc, mask=kept)
        tl.store(tops_ptr + place, top, mask=live)
        tl.store(totals_ptr + place, total, mask=live)


@triton.jit
def merge_splits_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # out *T [rows, HEADS, HEAD_SIZE]
    partial_ptr,  # *float32 [max_rows, HEADS, SPLITS, HEAD_SIZE] sums of weighted values
    tops_ptr,  # *float32 [max_rows, HEADS, SPLITS] largest scores
    totals_ptr,  # *float32 [max_rows, HEADS, SPLITS] sums of weights
    parts_ptr,  # *int32 [requests, KV_HEADS] splits in use
    starts_ptr,  # *int32 [requests + 1] first row of each request
    row_stride,
    head_stride,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Grid: (HEADS / STEP, ROWS, requests). Join the splits of a row's ``STEP`` heads, which share a KV head."""
    request = tl.program_id(2).to(tl.int64)
    member = tl.program_id(1)
    start = tl.load(starts_ptr + request).to(tl.int64)
    rows = tl.load(starts_ptr + request + 1) - start
    if (member >= rows) | (rows > ROWS):
        return
    first = tl.program_id(0) * STEP
    parts = tl.load(parts_ptr + request * KV_HEADS + first // (HEADS // KV_HEADS))
    if parts == 1:
        return
    row = start + member
    split = tl.arange(0, WIDE)
    dim = tl.arange(0, HEAD)
    used = split < parts
    for head in range(first, first + STEP):
        place = (row * HEADS + head) * SPLITS + split
        tops = tl.load(tops_ptr + place, mask=used, other=FLOOR)
        totals = tl.load(totals_ptr + place, mask=used, other=0.0)
        kept = used[:, None] & (dim[None, :] < HEAD_SIZE)
        sums = tl.load(partial_ptr + place[:, None] * HEAD_SIZE + dim[None, :], mask=kept, other=0.0)
        shares = tl.exp2(tops - tl.max(tops, 0))
        result = tl.sum(sums * shares[:, None], 0) / tl.sum(totals * shares, 0)
        at = out_ptr + row * row_stride + head * head_stride + dim
        tl.store(at, result.to(out_ptr.dtype.element_ty), mask=dim < HEAD_SIZE)
