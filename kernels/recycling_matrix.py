"""Token Recycling (arXiv 2408.08696) on the device: the matrix of second guesses, its update, and drafts from it.

Row t of the matrix ``int32[vocab, k]`` holds what the target ranked highest after token t when it last saw it, best
first; -1: nothing known. A draft tree has a fixed shape, its template: a node that is child j of a node with token t
holds ``matrix[t, j]``. Where text can be copied as well (see `suffix_match`), its tokens are nodes one below the other,
and guesses hang on them: a `Node`. The functions here are the definitions that the compiled kernels are tested against.
The top-k of the target's logits, which the update takes, is not among them: ``torch.topk`` gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Node(NamedTuple):
    """Where a node of a tree of copied tokens and guesses is: the path from the root to it.

    Attributes:
        copies: tokens copied, one after the other.
        ranks: of the guesses that follow them, each after the token before; the first counts the guesses other than
            the next token copied, which is a node of its own.
    """

    copies: int
    ranks: tuple[int, ...]


def recycle_update_reference(matrix: torch.Tensor, tokens: torch.Tensor, ids: torch.Tensor) -> None:
    """Overwrite the rows of the tokens that the target was shown; where a token comes several times, the last wins.

    Args:
        matrix: ``int32[vocab, k]``, changed.
        tokens: ``int32[R]`` token at each verified row; those outside the vocabulary, such as -1, are padding.
        ids: ``int32[R, k]`` or ``int64[R, k]`` what the target ranked highest after it.
    """
    for token, best in zip(tokens.tolist(), ids, strict=True):
        if 0 <= token < len(matrix):
            matrix[token] = best.to(matrix.dtype)


def check_template(parents: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise ``ValueError`` unless these are a tree's nodes, parents (-1: the root) before children."""
    if len(parents) != len(ranks) or not len(parents):
        raise ValueError(
            f"a template needs as many ranks as parents, at least one, got {len(ranks)} and {len(parents)}"
        )
    for node, (parent, rank) in enumerate(zip(parents, ranks, strict=True)):
        if not -1 <= parent < node:
            raise ValueError(f"node {node}: parent {parent} is neither an earlier node nor the root (-1)")
        if rank < 0:
            raise ValueError(f"node {node}: rank {rank} is negative")


def recycle_draft_reference(
    matrix: torch.Tensor, last_tokens: torch.Tensor, parents: Sequence[int], ranks: Sequence[int]
) -> torch.Tensor:
    """The tokens of each request's draft tree.

    Args:
        matrix: ``int32[vocab, k]``.
        last_tokens: ``int32[n]`` token of each root; -1: no tree.
        parents, ranks: per node of the template besides the root, its parent (-1: the root) and its rank among what
            the matrix has for the parent's token; parents come before children.

    Returns:
        ``int32[n, N]``; -1 where a node is missing: where its parent is, or the parent's token has no row, or no entry
        of this rank.

    Raises:
        ValueError: the template is no tree, or has a rank that the matrix has not.
    """
    check_template(parents, ranks)
    if max(ranks) >= matrix.shape[1]:
        raise ValueError(f"the template has rank {max(ranks)}, the matrix only {matrix.shape[1]} ranks")
    tokens = torch.full((len(last_tokens), len(parents)), -1, dtype=torch.int32)
    for request, root in enumerate(last_tokens.tolist()):
        for node, (parent, rank) in enumerate(zip(parents, ranks, strict=True)):
            token = root if parent < 0 else int(tokens[request, parent])
            if 0 <= token < len(matrix):
                tokens[request, node] = max(int(matrix[token, rank]), -1)
    return tokens.to(matrix.device)


def shape_parents(shape: Sequence[Node]) -> list[int]:
    """Parent of each node as row of a request: 0 is the root, node j is row ``j + 1``.

    Raises:
        ValueError: there is no node, one comes twice or before its parent, or is the root.
    """
    if not shape:
        raise ValueError("a shape needs at least one node, got none")
    rows = {Node(0, ()): 0}
    parents = []
    for number, node in enumerate(shape):
        copies, ranks = node
        if node in rows or copies < 0 or min(ranks, default=0) < 0:
            raise ValueError(f"node {number}: {node} is the root, there already, or has a negative number")
        above = Node(copies, tuple(ranks[:-1])) if ranks else Node(copies - 1, ())
        if above not in rows:
            raise ValueError(f"node {number}: {node} comes before its parent {above}")
        parents.append(rows[above])
        rows[node] = number + 1
    return parents


def shaped_draft_reference(
    matrix: torch.Tensor, last_tokens: torch.Tensor, copied: torch.Tensor, shapes: Sequence[Sequence[Node]]
) -> torch.Tensor:
    """The tokens of each request's draft tree of copied tokens and guesses.

    Args:
        matrix: ``int32[vocab, k]``.
        last_tokens: ``int32[n]`` token of each root; -1: no tree.
        copied: ``int32[n, d]`` tokens that can be copied, -1 where there is none.
        shapes: of each request, all of N nodes.

    Returns:
        ``int32[n, N]``; -1 where a node is missing: where its parent is, where nothing is copied or guessed.
    """
    count = len(last_tokens)
    tokens = torch.full((count, len(shapes[0]) if count else 0), -1, dtype=torch.int32)
    vocab, k = matrix.shape
    for request, (root, shape) in enumerate(zip(last_tokens.tolist(), shapes, strict=True)):
        texts = [*copied[request].tolist(), *[-1] * len(shape)]
        for number, (copies, ranks) in enumerate(shape):
            token = texts[copies - 1] if copies else root
            skipped = texts[copies]
            for level, rank in enumerate(ranks):
                guesses = matrix[token].tolist() if 0 <= token < vocab else [-1] * k
                if level == 0 and skipped >= 0 and skipped in guesses[: rank + 1]:
                    rank += 1
                token = max(guesses[rank], -1) if rank < k else -1
            tokens[request, number] = token
    return tokens.to(matrix.device)
