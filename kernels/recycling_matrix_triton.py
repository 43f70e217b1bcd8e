"""`recycling_matrix` in Triton: update the matrix of second guesses, and draft from it, without leaving the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from vllm_specplug.kernels.recycling_matrix import Node, check_template, shape_parents
from vllm_specplug.kernels.triton_tools import Work, check

#: Rows per program of the update. Rows of 8 guesses are 32 bytes, so each of 128 threads moves 16 bytes at once; and
#: 8,256 rows (64 trees of 129) still give every multiprocessor of a large GPU a program.
_UPDATE_ROWS = 64
_CLAIM_ROWS = 128


class RecycleClaims:
    """Which row of a batch writes which row of the matrix.

    A claim is the update's number (high 32 bits) and the row (low 32 bits). Later updates have higher numbers, so
    claims are never taken back: a thread that did so could not know that all others have read them.

    One serves all updates of a matrix that follow each other on one stream.

    Attributes:
        latest: ``int64[vocab]`` the latest claim to each row of the matrix.
        step: ``int64[1]`` number of the next update, from 1 on.
    """

    def __init__(self, vocab: int, device: torch.device | str) -> None:
        self.latest = torch.zeros(vocab, dtype=torch.int64, device=device)
        self.step = torch.ones(1, dtype=torch.int64, device=device)


@triton.jit(do_not_specialize=["count"])
def recycle_claim_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr,  # *int32 [count]
    latest_ptr,  # out: *int64 [vocab] latest claim to each row of the matrix
    step_ptr,  # *int64 [1]
    count,
    vocab,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of rows,). The largest row wins, whatever the order in which they come."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + row, mask=row < count, other=-1)
    claim = (tl.load(step_ptr) << 32) + row
    tl.atomic_max(latest_ptr + token, claim, mask=(token >= 0) & (token < vocab), sem="relaxed")


@triton.jit(do_not_specialize=["count"])
def recycle_update_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr,  # *int32 [count]
    ids_ptr,  # *int32 or *int64 [count, K]
    latest_ptr,  # *int64 [vocab] latest claim to each row of the matrix
    step_ptr,  # out: *int64 [1] counted up
    matrix_ptr,  # out: *int32 [vocab, K]
    count,
    vocab,
    K: tl.constexpr,
    WIDTH: tl.constexpr,  # power of two, at least K
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of rows,). Only the row that claimed its token writes.

    A token of this batch was claimed in this step, so the claim's row alone says who won.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + row, mask=row < count, other=-1)
    known = (token >= 0) & (token < vocab)
    wins = known & (tl.load(latest_ptr + token, mask=known, other=0).to(tl.int32) == row)
    rank = tl.arange(0, WIDTH)
    mask = wins[:, None] & (rank < K)[None, :]
    # 64 bits: products with K may pass 2^31.
    ids = tl.load(ids_ptr + row.to(tl.int64)[:, None] * K + rank[None, :], mask=mask)
    tl.store(matrix_ptr + token.to(tl.int64)[:, None] * K + rank[None, :], ids.to(tl.int32), mask=mask)
    # Nobody reads the step in this launch.
    tl.atomic_add(step_ptr, 1, mask=tl.program_id(0) == 0, sem="relaxed")


def recycle_update(matrix: torch.Tensor, tokens: torch.Tensor, ids: torch.Tensor, claims: RecycleClaims) -> None:
    """Overwrite the matrix's rows of the tokens that the target was shown; see `recycle_update_reference`.

    Two launches: rows claim their tokens, then those that won write. So the last row of a token wins in every run.

    Args:
        matrix: ``int32[vocab, k]``, changed.
        tokens: ``int32[R]`` token at each verified row; those outside the vocabulary, such as -1, are padding.
        ids: ``int32[R, k]`` or ``int64[R, k]`` (as ``torch.topk`` gives them) what the target ranked highest after it.
        claims: of this vocabulary.

    Raises:
        ValueError: a dtype, shape, device or stride is wrong.
    """
    device = matrix.device
    check("matrix", matrix, torch.int32, (None, None))
    vocab, k = matrix.shape
    check("tokens", tokens, torch.int32, (None,), device)
    count = len(tokens)
    check("ids", ids, (torch.int32, torch.int64), (count, k), device)
    check("claims.latest", claims.latest, torch.int64, (vocab,), device)
    check("claims.step", claims.step, torch.int64, (1,), device)
    if not count or not matrix.numel():
        return
    recycle_claim_kernel[(triton.cdiv(count, _CLAIM_ROWS),)](
        *(tokens, claims.latest, claims.step, count, vocab), BLOCK=_CLAIM_ROWS, num_warps=4
    )
    recycle_update_kernel[(triton.cdiv(count, _UPDATE_ROWS),)](
        *(tokens, ids, claims.latest, claims.step, matrix, count, vocab),
        K=k,
        WIDTH=triton.next_power_of_2(k),
        BLOCK=_UPDATE_ROWS,
        num_warps=4,
    )


def update_work(rows: int, distinct: int, k: int, id_bytes: int = 4) -> Work:
    """Each token is read (4 bytes), and of the last row of each distinct token the guesses are read (``id_bytes``) and
    written (4 bytes): ``4 * rows + distinct * k * (id_bytes + 4)`` bytes. What claims take is not counted."""
    return Work(bytes=4 * rows + distinct * k * (id_bytes + 4), operations=0)


class RecycleTemplate:
    """The shape of the draft trees, on the device.

    A node's token depends on the root's and on the ranks along its path alone. So each node walks its own path, at the
    same time as all others: nodes need no order by level, and nothing passes between threads.

    Attributes:
        ranks: ``int32[levels, N]`` rank of the node's ancestor on each level, the node itself included; -1 below it.
        width: ranks that the matrix must have.
    """

    def __init__(self, parents: Sequence[int], ranks: Sequence[int], device: torch.device | str) -> None:
        """
        Args:
            parents, ranks: see `recycle_draft_reference`; on the host.

        Raises:
            ValueError: they are no tree.
        """
        parents, ranks = [int(parent) for parent in parents], [int(rank) for rank in ranks]
        check_template(parents, ranks)
        paths: list[list[int]] = []
        for parent, rank in zip(parents, ranks, strict=True):
            paths.append([*(paths[parent] if parent >= 0 else ()), rank])
        levels = max(len(path) for path in paths)
        padded = [path + [-1] * (levels - len(path)) for path in paths]
        self.ranks = torch.tensor(padded, dtype=torch.int32).T.contiguous().to(device)
        self.width = max(ranks) + 1


class RecycleShapes:
    """Shapes of draft trees of copied tokens and guesses, on the device; all have the same number of nodes N.

    Attributes:
        ranks: ``int32[shapes, levels, N]`` ranks of the guesses on each node's path, -1 below the last.
        copies: ``int32[shapes, N]`` copied tokens that each node's path begins with.
        parents: ``int32[shapes, N]`` row of each node's parent, see `shape_parents`.
    """

    def __init__(self, shapes: Sequence[Sequence[Node]], device: torch.device | str) -> None:
        """
        Raises:
            ValueError: there is no shape, one is no tree, or they differ in their number of nodes.
        """
        if not shapes or len({len(shape) for shape in shapes}) != 1:
            raise ValueError(f"shapes must have the same number of nodes, got {[len(shape) for shape in shapes]}")
        on: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.parents = torch.tensor([shape_parents(shape) for shape in shapes], **on)
        self.copies = torch.tensor([[node.copies for node in shape] for shape in shapes], **on)
        levels = max(1, max(len(node.ranks) for shape in shapes for node in shape))
        padded = [[[*node.ranks, *[-1] * (levels - len(node.ranks))] for node in shape] for shape in shapes]
        self.ranks = torch.tensor(padded, dtype=torch.int32).transpose(1, 2).contiguous().to(device)


@triton.jit
def recycle_draft_kernel(  # type: ignore[no-untyped-def]
    matrix_ptr,  # *int32 [vocab, K]
    last_tokens_ptr,  # *int32 [n] -1: empty request
    ranks_ptr,  # *int32 [shapes, LEVELS, NODES] rank of each node's ancestor on each level, -1 below the node
    tokens_ptr,  # out: *int32 [n, NODES] -1: missing
    copies_ptr,  # *int32 [shapes, NODES] copied tokens that a path begins with, if WIDTH
    parents_ptr,  # *int32 [shapes, NODES] row of each node's parent, if WIDTH
    which_ptr,  # *int32 [n] shape of each request, if WIDTH
    copied_ptr,  # *int32 [n, WIDTH] tokens to copy, -1: none
    slots_ptr,  # *int32 or *int64 [n] slot of each request, if WIDTH
    trees_ptr,  # out: *int32 [slots, NODES] parents of the slot's tree, if WIDTH
    vocab,
    trees_stride,
    K: tl.constexpr,
    WIDTH: tl.constexpr,  # tokens that can be copied; 0: there is one shape, and nothing is copied
    NODES: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least NODES
):
    """Grid: (n,). Each node of the request's tree follows its own path from the root, a level at a time."""
    request = tl.program_id(0).to(tl.int64)  # 64 bits: products with NODES may pass 2^31
    node = tl.arange(0, BLOCK)
    inside = node < NODES
    token = tl.load(last_tokens_ptr + request) + tl.zeros_like(node)
    if WIDTH:
        shape = tl.load(which_ptr + request)
        ranks_ptr += shape * LEVELS * NODES
        copies = tl.load(copies_ptr + shape * NODES + node, mask=inside, other=0)
        copied = tl.load(copied_ptr + request * WIDTH + copies - 1, mask=(copies > 0) & (copies <= WIDTH), other=-1)
        token = tl.where(copies > 0, copied, token)
        parent = tl.load(parents_ptr + shape * NODES + node, mask=inside, other=0)
        tree = tl.load(slots_ptr + request).to(tl.int64) * trees_stride
        tl.store(trees_ptr + tree + node, parent, mask=inside)
    rank = tl.load(ranks_ptr + node, mask=inside, other=-1)
    if WIDTH:
        # The next copied token is a node of its own: ranks from its place on are one higher.
        skipped = tl.load(copied_ptr + request * WIDTH + copies, mask=copies < WIDTH, other=-1)
        known = (token >= 0) & (token < vocab) & (skipped >= 0)
        found = tl.zeros_like(rank)
        for other in tl.static_range(K):
            guess = tl.load(matrix_ptr + token.to(tl.int64) * K + other, mask=known & (rank >= other), other=-1)
            found = tl.where((guess == skipped) & (guess >= 0), 1, found)
        rank = tl.where(rank >= 0, rank + found, rank)
    for level in range(1, LEVELS + 1):
        # Asked for before the gather, so that both waits are one.
        below = tl.load(ranks_ptr + level * NODES + node, mask=inside & (level < LEVELS), other=-1)
        known = (token >= 0) & (token < vocab) & (rank < K)
        guess = tl.load(matrix_ptr + token.to(tl.int64) * K + rank, mask=known & (rank >= 0), other=-1)
        token = tl.where(rank >= 0, tl.maximum(guess, -1), token)
        rank = below
    tl.store(tokens_ptr + request * NODES + node, token, mask=inside)


def recycle_draft(
    matrix: torch.Tensor, last_tokens: torch.Tensor, template: RecycleTemplate, tokens: torch.Tensor
) -> None:
    """Draft a tree for each request; see `recycle_draft_reference`.

    Args:
        matrix: ``int32[vocab, k]``.
        last_tokens: ``int32[n]`` token of each root; -1: no tree.
        template: of N nodes.
        tokens: ``int32[n, N]``, filled; -1 where a node is missing.

    Raises:
        ValueError: a dtype, shape, device or stride is wrong, or the template has a rank that the matrix has not.
    """
    device = matrix.device
    check("matrix", matrix, torch.int32, (None, None))
    k = matrix.shape[1]
    check("last_tokens", last_tokens, torch.int32, (None,), device)
    count = len(last_tokens)
    levels, nodes = template.ranks.shape
    check("template.ranks", template.ranks, torch.int32, (levels, nodes), device)
    check("tokens", tokens, torch.int32, (count, nodes), device)
    if template.width > k:
        raise ValueError(f"matrix must have at least {template.width} columns for this template, got {k}")
    if not count:
        return
    ranks = template.ranks
    _draft(matrix, last_tokens, ranks, tokens, ranks, ranks, ranks, ranks, ranks, ranks, width=0)


def shaped_draft(
    matrix: torch.Tensor,
    last_tokens: torch.Tensor,
    copied: torch.Tensor,
    shapes: RecycleShapes,
    which: torch.Tensor,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    trees: torch.Tensor,
) -> None:
    """Draft a tree of copied tokens and guesses for each request; see `shaped_draft_reference`.

    Args:
        matrix: ``int32[vocab, k]``; without rows nothing is guessed.
        last_tokens: ``int32[n]`` token of each root; -1: no tree.
        copied: ``int32[n, d]`` as `suffix_match` gives them, d at least 1.
        shapes: of N nodes.
        which: ``int32[n]`` shape of each request; must be one that there is, which is not checked.
        tokens: ``int32[n, N]``, filled; -1 where a node is missing.
        slots: ``int32[n]`` or ``int64[n]`` rows of ``trees``, which is not checked.
        trees: ``int32[slots, N]``, row ``slots[i]`` filled: parents of request i's nodes, as `tree_rows` takes them.

    Raises:
        ValueError: a dtype, shape, device or stride is wrong.
    """
    device = matrix.device
    check("matrix", matrix, torch.int32, (None, None))
    check("last_tokens", last_tokens, torch.int32, (None,), device)
    count = len(last_tokens)
    number, levels, nodes = shapes.ranks.shape
    check("shapes.ranks", shapes.ranks, torch.int32, (number, levels, nodes), device)
    check("copied", copied, torch.int32, (count, None), device)
    if not copied.shape[1]:
        raise ValueError("copied must have at least one column, got 0")
    check("which", which, torch.int32, (count,), device)
    check("tokens", tokens, torch.int32, (count, nodes), device)
    check("slots", slots, (torch.int32, torch.int64), (count,), device)
    check("trees", trees, torch.int32, (None, nodes), device)
    if not count:
        return
    _draft(
        matrix,
        last_tokens,
        shapes.ranks,
        tokens,
        *(shapes.copies, shapes.parents, which, copied, slots, trees),
        width=copied.shape[1],
    )


def _draft(
    matrix: torch.Tensor,
    last_tokens: torch.Tensor,
    ranks: torch.Tensor,
    tokens: torch.Tensor,
    *shaped: torch.Tensor,
    width: int,
) -> None:
    nodes = tokens.shape[1]
    block = triton.next_power_of_2(nodes)
    recycle_draft_kernel[(len(last_tokens),)](
        *(matrix, last_tokens, ranks, tokens, *shaped, len(matrix), nodes),
        K=matrix.shape[1],
        WIDTH=width,
        NODES=nodes,
        LEVELS=ranks.shape[-2],
        BLOCK=block,
        num_warps=min(max(1, block // 32), 8),  # a node per thread: the gathers of a level wait together
    )


def draft_work(requests: int, nodes: int) -> Work:
    """One entry of the matrix is read and one token written per node (8 bytes), and each root's token is read:
    ``requests * (8 * nodes + 4)`` bytes. What it takes is the wait for one gather per level."""
    return Work(bytes=requests * (8 * nodes + 4), operations=0)
