"""`recycling_matrix` in Triton: update the matrix of second guesses, and draft from it, without leaving the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from vllm_specplug.kernels.recycling_matrix import check_template
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


@triton.jit
def recycle_draft_kernel(  # type: ignore[no-untyped-def]
    matrix_ptr,  # *int32 [vocab, K]
    last_tokens_ptr,  # *int32 [n] -1: empty request
    ranks_ptr,  # *int32 [LEVELS, NODES] rank of each node's ancestor on each level, -1 below the node
    tokens_ptr,  # out: *int32 [n, NODES] -1: missing
    vocab,
    K: tl.constexpr,
    NODES: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least NODES
):
    """Grid: (n,). Each node of the request's tree follows its own path from the root, a level at a time."""
    request = tl.program_id(0).to(tl.int64)  # 64 bits: products with NODES may pass 2^31
    node = tl.arange(0, BLOCK)
    token = tl.load(last_tokens_ptr + request) + tl.zeros_like(node)
    rank = tl.load(ranks_ptr + node, mask=node < NODES, other=-1)
    for level in range(1, LEVELS + 1):
        # Asked for before the gather, so that both waits are one.
        below = tl.load(ranks_ptr + level * NODES + node, mask=(node < NODES) & (level < LEVELS), other=-1)
        known = (token >= 0) & (token < vocab)
        guess = tl.load(matrix_ptr + token.to(tl.int64) * K + rank, mask=known & (rank >= 0), other=-1)
        token = tl.where(rank >= 0, tl.maximum(guess, -1), token)
        rank = below
    tl.store(tokens_ptr + request * NODES + node, token, mask=node < NODES)


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
    vocab, k = matrix.shape
    check("last_tokens", last_tokens, torch.int32, (None,), device)
    count = len(last_tokens)
    levels, nodes = template.ranks.shape
    check("template.ranks", template.ranks, torch.int32, (levels, nodes), device)
    check("tokens", tokens, torch.int32, (count, nodes), device)
    if template.width > k:
        raise ValueError(f"matrix must have at least {template.width} columns for this template, got {k}")
    if not count:
        return
    block = triton.next_power_of_2(nodes)
    recycle_draft_kernel[(count,)](
        *(matrix, last_tokens, template.ranks, tokens, vocab),
        K=k,
        NODES=nodes,
        LEVELS=levels,
        BLOCK=block,
        num_warps=min(max(1, block // 32), 8),  # a node per thread: the gathers of a level wait together
    )


def draft_work(requests: int, nodes: int) -> Work:
    """One entry of the matrix is read and one token written per node (8 bytes), and each root's token is read:
    ``requests * (8 * nodes + 4)`` bytes. What it takes is the wait for one gather per level."""
    return Work(bytes=requests * (8 * nodes + 4), operations=0)
