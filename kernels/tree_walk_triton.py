"""`tree_walk` in Triton: what verified trees emit and which of their rows move, without waiting for the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_specplug.kernels.triton_tools import Work, check

#: Most draft rows per warp: 8 per thread, so that the least of them is found within one warp, without shared memory.
_ROWS_PER_WARP = 256


@triton.jit(do_not_specialize=["depth"])
def tree_walk_kernel(  # type: ignore[no-untyped-def]
    row_starts_ptr,  # *int32 [n + 1] first row of each request
    parents_ptr,  # *int32 [T] parent row within the request, -1 for the root
    drafts_ptr,  # *int32 [T] token of each row
    drawn_ptr,  # *int64 or *int32 [T] target's token drawn at each row
    contexts_ptr,  # *int32 [n] slots before the root
    tokens_ptr,  # out: *int32 [n, depth] emitted, -1 after
    paths_ptr,  # out: *int32 [n, depth] row each was drawn at, -1 after
    lengths_ptr,  # out: *int32 [n] tokens emitted, 0 for an empty request
    last_tokens_ptr,  # out: *int32 [n] last emitted, untouched for an empty request
    sources_ptr,  # out: *int32 [n, depth] slot that moves, -1: none
    targets_ptr,  # out: *int32 [n, depth] slot it moves to, -1: none
    depth,
    ROWS: tl.constexpr,  # power of two, at least a request's draft rows
    LEVELS: tl.constexpr,  # power of two, at least depth
):
    """Grid: (n,). A program holds its request's draft rows in registers and walks down them.

    Whether a row's token is the one drawn at its parent is found for all rows at once; a step of the walk then is one
    reduction. The walk ends where no child holds the token, so its steps are the tokens emitted.
    """
    request = tl.program_id(0).to(tl.int64)  # 64 bits: products with depth may pass 2^31
    first = tl.load(row_starts_ptr + request)
    size = tl.load(row_starts_ptr + request + 1) - first
    row = tl.arange(0, ROWS) + 1  # the root is no one's child
    parent = tl.load(parents_ptr + first + row, mask=row < size, other=-1)
    draft = tl.load(drafts_ptr + first + row, mask=row < size, other=0)
    fits = (parent >= 0) & (parent < row)
    wanted = tl.load(drawn_ptr + first + parent, mask=fits, other=0)
    parent = tl.where(fits & (wanted == draft), parent, -1)  # from here on, of accepted rows alone

    level = tl.arange(0, LEVELS)
    path = tl.where((level == 0) & (size > 0), 0, -1)
    at = tl.min(tl.where(parent == 0, row, ROWS + 1), axis=0)
    length = tl.where(size > 0, 1, 0)
    while (at <= ROWS) & (length < depth):
        path = tl.where(level == length, at, path)
        length += 1
        at = tl.min(tl.where(parent == at, row, ROWS + 1), axis=0)

    there = path >= 0
    token = tl.load(drawn_ptr + first + path, mask=there, other=-1).to(tl.int32)
    context = tl.load(contexts_ptr + request)
    moved = there & (path != level)
    out = request * depth + level
    tl.store(tokens_ptr + out, token, mask=level < depth)
    tl.store(paths_ptr + out, path, mask=level < depth)
    tl.store(sources_ptr + out, tl.where(moved, context + path, -1), mask=level < depth)
    tl.store(targets_ptr + out, tl.where(moved, context + level, -1), mask=level < depth)
    tl.store(lengths_ptr + request, length)
    last = tl.sum(tl.where(level == length - 1, token, 0), axis=0)
    tl.store(last_tokens_ptr + request, last, mask=size > 0)


def tree_walk(
    row_starts: torch.Tensor,
    parents: torch.Tensor,
    drafts: torch.Tensor,
    drawn: torch.Tensor,
    contexts: torch.Tensor,
    tokens: torch.Tensor,
    paths: torch.Tensor,
    lengths: torch.Tensor,
    last_tokens: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
    max_rows: int = 129,
) -> None:
    """Walk every tree where the target's token is known at every row, as `kernels.tree_walk.walk` does on the host.

    A target token drawn at a row is accepted as draft if a child of the row holds it (of several the first), and the
    walk goes on there. A path of more than ``depth`` rows is cut: what is emitted is right, only less.

    Args:
        row_starts: ``int32[n + 1]`` request i has rows ``row_starts[i]`` to ``row_starts[i + 1] - 1``, the root first;
            none if both are equal.
        parents: ``int32[T]`` parent of each row among its request's rows, before it; -1 for roots.
        drafts: ``int32[T]`` token of each row; a root's is ignored.
        drawn: ``int64[T]`` or ``int32[T]`` the target's token at each row.
        contexts: ``int32[n]`` slots of each request before its root.
        tokens, paths: ``int32[n, depth]``, filled: tokens emitted, and the row each was drawn at; -1 after the last.
        lengths: ``int32[n]``, filled: tokens emitted; 0 for an empty request.
        last_tokens: ``int32[n]``, filled: the last token emitted; left as it is for an empty request.
        sources, targets: ``int32[n, depth]``, filled: the moves for `kv_move`, see `kv_move.accepted_moves`.
        max_rows: no request has more rows. Rows beyond the next power of two plus one would not be seen.

    Raises:
        ValueError: a dtype, shape, device or stride is wrong.
    """
    device = drawn.device
    check("drawn", drawn, (torch.int64, torch.int32), (None,))
    total = len(drawn)
    check("parents", parents, torch.int32, (total,), device)
    check("drafts", drafts, torch.int32, (total,), device)
    check("contexts", contexts, torch.int32, (None,), device)
    count = len(contexts)
    check("row_starts", row_starts, torch.int32, (count + 1,), device)
    check("tokens", tokens, torch.int32, (count, None), device)
    depth = tokens.shape[1]
    for name, tensor in (("paths", paths), ("sources", sources), ("targets", targets)):
        check(name, tensor, torch.int32, (count, depth), device)
    for name, tensor in (("lengths", lengths), ("last_tokens", last_tokens)):
        check(name, tensor, torch.int32, (count,), device)
    if depth < 1:
        raise ValueError("tokens must have at least one column: a request emits at least one token, got 0")
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    if not count:
        return
    rows = triton.next_power_of_2(max(max_rows - 1, 1))
    tree_walk_kernel[(count,)](
        *(row_starts, parents, drafts, drawn, contexts, tokens, paths, lengths, last_tokens, sources, targets, depth),
        ROWS=rows,
        LEVELS=triton.next_power_of_2(depth),
        num_warps=min(max(1, rows // _ROWS_PER_WARP), 8),
    )


def work(rows: int, requests: int, depth: int, drawn_bytes: int = 8) -> Work:
    """Each row is read once (``8 + drawn_bytes`` bytes), each request's start, context and results are once read or
    written: ``16 + 16 * depth`` bytes."""
    return Work(bytes=rows * (8 + drawn_bytes) + requests * (16 + 16 * depth), operations=0)
