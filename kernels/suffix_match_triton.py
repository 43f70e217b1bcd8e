"""The longest suffix that occurs earlier, for all requests of a step on the device: `suffix_match.py` defines it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_specplug.kernels.triton_tools import Work, check

#: Longest match that is looked for: its tokens are compared one after another, unrolled.
MOST_LONGEST = 32
#: Positions of a history that are compared at a time: 8 for each of 128 threads.
_BLOCK = 1024
#: Programs that are enough to fill a GPU; a request's programs loop over its history where it takes more.
_PROGRAMS = 2048


@triton.jit
def _history(lengths_ptr, rows_ptr, request, max_len, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Slot of a request, and how many tokens it has; none where the slot is negative."""
    slot = request
    if ROWS:
        slot = tl.load(rows_ptr + request).to(tl.int64)
    return slot, tl.minimum(tl.load(lengths_ptr + slot, mask=slot >= 0, other=0), max_len)


@triton.jit(do_not_specialize=["max_len", "programs"])
def _scan_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr,  # *int32 [slots, max_len]
    lengths_ptr,  # *int32 [slots]
    rows_ptr,  # *int32 or *int64 [n] slot of each request; unused without ROWS
    best_ptr,  # *int64 [n] match length * 2^32 + last position of the match, 0 before; in and out
    tokens_stride,
    max_len,
    programs,
    ROWS: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (n, programs). The programs of a request take blocks of its positions in turn."""
    request = tl.program_id(0).to(tl.int64)
    slot, length = _history(lengths_ptr, rows_ptr, request, max_len, ROWS)
    history = tokens_ptr + slot * tokens_stride
    best = tl.zeros([BLOCK], tl.int64)
    # A match ends where a token follows.
    for begin in range(tl.program_id(1) * BLOCK, length - 1, programs * BLOCK):
        end = begin + tl.arange(0, BLOCK)
        alive = end < length - 1
        matched = tl.zeros([BLOCK], tl.int32)
        for back in tl.static_range(LONGEST):
            # A lane that no longer matches loads nothing, so most of the history is read once.
            alive = alive & (end >= back)
            suffix = tl.load(history + length - 1 - back, mask=length > back, other=-1)
            token = tl.load(history + end - back, mask=alive, other=-1)
            alive = alive & (token == suffix)
            matched += alive.to(tl.int32)
        key = (matched.to(tl.int64) << 32) + end
        best = tl.maximum(best, tl.where(matched >= SHORTEST, key, 0))
    key = tl.max(best, 0)
    if key > 0:
        # The largest is the same in any order.
        tl.atomic_max(best_ptr + request, key, sem="relaxed")


@triton.jit(do_not_specialize=["max_len", "width"])
def _copy_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr,  # *int32 [slots, max_len]
    lengths_ptr,  # *int32 [slots]
    rows_ptr,  # *int32 or *int64 [n] slot of each request; unused without ROWS
    best_ptr,  # *int64 [n] as above; becomes 0
    drafts_ptr,  # *int32 [n, width], out
    matched_ptr,  # *int32 [n], out
    tokens_stride,
    max_len,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (n,)."""
    request = tl.program_id(0).to(tl.int64)
    slot, length = _history(lengths_ptr, rows_ptr, request, max_len, ROWS)
    key = tl.load(best_ptr + request)
    matched = (key >> 32).to(tl.int32)
    first = (key & 0xFFFFFFFF).to(tl.int32) + 1
    place = tl.arange(0, BLOCK)
    # Behind the history's end the copy is what was copied before: the text repeats itself with this period.
    source = first + place % tl.maximum(length - first, 1)
    copied = place < tl.where(matched > 0, width, 0)
    tokens = tl.load(tokens_ptr + slot * tokens_stride + source, mask=copied, other=-1)
    tl.store(drafts_ptr + request * width + place, tokens, mask=place < width)
    tl.store(matched_ptr + request, matched)
    tl.store(best_ptr + request, tl.zeros([], tl.int64))


class Workspace:
    """Working memory of `suffix_match` for one stream.

    Attributes:
        best: ``int64[n]``, all 0 between launches.
    """

    def __init__(self, requests: int, device: torch.device | str) -> None:
        self.best = torch.zeros(requests, dtype=torch.int64, device=device)


def suffix_match(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    drafts: torch.Tensor,
    matched: torch.Tensor,
    workspace: Workspace,
    shortest: int,
    longest: int,
    rows: torch.Tensor | None = None,
) -> None:
    """Find each request's longest suffix that occurs earlier and copy what followed its latest occurrence; 2 launches.

    Args:
        tokens: ``int32[slots, max_len]`` histories, each row contiguous; what is behind a length is never read.
        lengths: ``int32[slots]`` tokens of each history; more than ``max_len`` is cut off; 0 or less: no request.
        drafts: ``int32[n, d]``, written: the tokens copied; -1 where nothing matched.
        matched: ``int32[n]``, written: the match's length, 0 where nothing matched.
        workspace: for at least as many requests.
        shortest, longest: tokens of a match, ``1 <= shortest <= longest <= MOST_LONGEST``.
        rows: ``int32[n]`` or ``int64[n]`` each request's slot, below ``slots``; negative: no request. None: each slot
            is a request.

    Raises:
        ValueError: a shape, dtype, stride or device is wrong, or a bound.
    """
    check("tokens", tokens, torch.int32, (None, None), contiguous=False)
    slots, max_len = tokens.shape
    check("lengths", lengths, torch.int32, (slots,), tokens.device)
    if rows is not None:
        check("rows", rows, (torch.int32, torch.int64), (None,), tokens.device)
    count = slots if rows is None else len(rows)
    check("drafts", drafts, torch.int32, (count, None), tokens.device)
    check("matched", matched, torch.int32, (count,), tokens.device)
    check("workspace.best", workspace.best, torch.int64, (None,), tokens.device)
    if len(workspace.best) < count:
        raise ValueError(f"workspace is for {len(workspace.best)} requests, got {count}")
    if not 1 <= shortest <= longest <= MOST_LONGEST:
        raise ValueError(
            f"shortest and longest must rise from 1 to at most {MOST_LONGEST}, got {shortest} and {longest}"
        )
    if not count:
        return
    blocks = triton.cdiv(max_len, _BLOCK)
    programs = max(1, min(blocks, max(8, triton.cdiv(_PROGRAMS, count))))
    _scan_kernel[(count, programs)](
        tokens,
        lengths,
        lengths if rows is None else rows,
        workspace.best,
        tokens.stride(0),
        max_len,
        programs,
        ROWS=rows is not None,
        SHORTEST=shortest,
        LONGEST=longest,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    width = drafts.shape[1]
    _copy_kernel[(count,)](
        tokens,
        lengths,
        lengths if rows is None else rows,
        workspace.best,
        drafts,
        matched,
        tokens.stride(0),
        max_len,
        width,
        ROWS=rows is not None,
        BLOCK=triton.next_power_of_2(max(1, width)),
        num_warps=1,
    )


def work(lengths: list[int], drafts: int) -> Work:
    """Least work of `suffix_match`: each history is read once, drafts are read and written; a comparison per token."""
    return Work(4 * sum(lengths) + len(lengths) * (8 * drafts + 8), sum(lengths))
