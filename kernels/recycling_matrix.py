"""Token Recycling (arXiv 2408.08696) on the device: the matrix of second guesses, its update, and drafts from it.

Row t of the matrix ``int32[vocab, k]`` holds what the target ranked highest after token t when it last saw it, best
first; -1: nothing known. A draft tree has a fixed shape, its template: a node that is child j of a node with token t
holds ``matrix[t, j]``. The functions here are the definitions that the compiled kernels are tested against. The top-k
of the target's logits, which the update takes, is not among them: ``torch.topk`` gives it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
