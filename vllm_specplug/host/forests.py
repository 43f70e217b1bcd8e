"""Checks of what a proposer drafted, before the engine sees it, and what is kept of it for the next step.

A forest comes from code the host does not trust: a token outside the vocabulary would crash the engine, a parent that
comes after its child would send the verification in circles.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from vllm_specplug.kernels.memory import kernel
from vllm_specplug.proposers.base import DraftForest, Int32Array

#: Results of :func:`_check`, by number.
_FAULTS = (
    "",
    "draft token outside the vocabulary",
    "a parent that does not come before its child",
    "two siblings with the same token",
    "a tree where only a chain was asked for",
)


class KeptTree(NamedTuple):
    """A branching draft that the engine was given as a flat list.

    Attributes:
        tokens: the list the engine got.
        parents: ``int32[n]`` as in :class:`DraftForest`.
        chain: leading nodes that form a chain; a draft cut to no more of them is one.
    """

    tokens: list[int]
    parents: Int32Array
    chain: int


@kernel
def _check(tokens, parents, offsets, branching, vocab_size, chains):  # type: ignore[no-untyped-def]
    """``chains[i]`` becomes the number of leading nodes of request ``i`` that form a chain.

    Returns ``request * 8 + fault``, 0 without a fault."""
    for i in range(len(offsets) - 1):
        start, stop = offsets[i], offsets[i + 1]
        chain = stop - start
        for j in range(start, stop):
            if tokens[j] < 0 or tokens[j] >= vocab_size:
                return i * 8 + 1
            parent = parents[j]
            if parent < -1 or parent >= j - start:
                return i * 8 + 2
            if parent == j - start - 1:
                continue
            if not branching[i]:
                return i * 8 + 4
            chain = min(chain, j - start)
            # A node whose parent is the one before it is that parent's first child: only others can repeat a sibling.
            for k in range(start + parent + 1, j):
                if parents[k] == parent and tokens[k] == tokens[j]:
                    return i * 8 + 3
        chains[i] = chain
    return 0


def read_forest(
    forest: DraftForest, limits: Int32Array, branching: np.ndarray, vocab_size: int
) -> tuple[list[list[int]], list[KeptTree | None]]:
    """The forest as the engine takes it.

    Args:
        forest: what the proposer returned.
        limits: ``int32[n]`` most nodes of each request.
        branching: ``bool[n]`` whether the request's draft may branch.
        vocab_size: tokens are below it.

    Returns:
        Draft tokens of each request, and the tree of each that branches.

    Raises:
        ValueError: saying what is wrong with the forest.
    """
    offsets = np.ascontiguousarray(forest.offsets, np.int32)
    tokens = np.ascontiguousarray(forest.tokens, np.int32)
    parents = np.ascontiguousarray(forest.parents, np.int32)
    n = len(limits)
    if len(offsets) != n + 1 or offsets[0] != 0 or offsets[-1] != len(tokens) or len(parents) != len(tokens):
        raise ValueError(
            f"forest of {len(offsets) - 1} requests, {len(tokens)} tokens and {len(parents)} parents with offsets to "
            f"{offsets[-1] if len(offsets) else None} does not fit {n} requests asked"
        )
    sizes = np.diff(offsets)
    if (sizes < 0).any() or (sizes > limits).any():
        raise ValueError(f"draft lengths {sizes.tolist()} exceed limits {limits.tolist()}")
    trees: list[KeptTree | None] = [None] * n
    if not len(tokens):
        return [[] for _ in range(n)], trees
    chains = np.empty(n, np.int32)
    fault = int(_check(tokens, parents, offsets, branching, vocab_size, chains))
    if fault:
        raise ValueError(f"{_FAULTS[fault % 8]}, in the draft for request {fault // 8} of {n}")
    flat, bounds = tokens.tolist(), offsets.tolist()
    drafts = [flat[a:b] for a, b in itertools.pairwise(bounds)]
    for i in np.flatnonzero(chains < sizes).tolist():
        a, b = bounds[i], bounds[i + 1]
        trees[i] = KeptTree(drafts[i], parents[a:b].copy(), int(chains[i]))
    return drafts, trees


def warm_up() -> None:
    """Compile before the first request."""
    one = np.zeros(1, np.int32)
    read_forest(DraftForest(one, one - 1, one, one, np.array([0, 1], np.int32)), one + 1, one == 0, 1)  # type: ignore[arg-type]
