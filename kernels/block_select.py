"""Which units of a long context a layer attends to: summaries of keys, scores, budgets; the definitions.

A *unit* is ``unit`` consecutive cache slots of one request. Of a request with ``context`` tokens in the cache, the
units before the *tail* can be left out; the tail, from a block boundary on, and the first units never are. What is here
defines the compiled kernels of `sparse_attention_cpu`, which are tested against it.

Scores follow Quest (arXiv 2406.10774) or the mean key (arXiv 2512.21911, as far as its text is known); heads are joined
by the soft vote of TokenSelect (arXiv 2411.02886): each query head's scores become a distribution over the units, and
the distributions are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

#: What a unit's summary holds: ``minmax``: the largest and the least of each dimension of its keys, with which a query
#: makes an upper bound of every key's product; ``mean``: its mean key; ``halfway``: what lies halfway between the
#: bounds and the mean, so that a query's score is the mean of both scores.
SUMMARIES = ("halfway", "minmax", "mean")


@dataclass(frozen=True, slots=True)
class Selection:
    """How units are chosen.

    Attributes:
        unit: slots per unit; divides the KV cache's block size.
        summary: one of `SUMMARIES`.
        first: tokens at the beginning that are always attended, rounded up to units.
        last: tokens before the rows to verify that are always attended, at least; rounded up to whole blocks.
        dense_below: contexts of up to so many tokens are attended whole.
        ratio: share of what lies beyond that is attended.
        by_head: each KV head chooses by its own query heads; else all heads of the layer by one vote.
        all_rows: the mean query of all rows to verify votes (as in TokenSelect); else that of the first, the last
            accepted token.
    """

    unit: int = 32
    summary: str = "halfway"
    first: int = 32
    last: int = 64
    dense_below: int = 1024
    ratio: float = 0.2
    by_head: bool = False
    all_rows: bool = False

    def tail_block(self, context: int, block_size: int) -> int:
        """First block of the tail."""
        return max(0, context - self.last) // block_size

    def budget(self, context: int) -> int:
        """Tokens of a context to attend, those always attended included; the whole context if it is short."""
        if context <= self.dense_below:
            return context
        return min(context, int(self.dense_below + self.ratio * (context - self.dense_below)))

    def units(self, context: int, block_size: int, share: float = 1.0) -> int:
        """Units to attend before the tail: of the budget times ``share`` (a head's, relative to the mean) what the tail
        leaves, at least the first ones."""
        return int(self.counts(context, block_size, np.float64(share)))

    def counts(self, context: int, block_size: int, shares: npt.NDArray[np.floating] | np.floating) -> Int32Array:
        """The same for many ``shares``, of any shape: ``int32`` of that shape."""
        tail = self.tail_block(context, block_size) * block_size
        wanted = (self.budget(context) * shares).astype(np.int64) - (context - tail)
        first = -(-self.first // self.unit)
        return np.minimum(np.maximum(-(-wanted // self.unit), first), tail // self.unit).astype(np.int32)


def attended_units(counts: Int32Array, units: Int32Array) -> Int32Array:
    """``int32[L, n, kv_heads]``: of the ``units`` (``int32[n]``) before the tail those that are attended, by ``counts``
    of that shape, where -1 stands for all."""
    return np.where(counts < 0, units[None, :, None], counts)


def attended_share(counts: Int32Array, units: Int32Array) -> float:
    """Share of the units before the tails that are attended, over all layers, requests and KV heads."""
    taken = attended_units(counts, units)
    return float(taken.sum()) / max(float(units.sum()) * counts.shape[0] * counts.shape[2], 1.0)


def summarise(keys: torch.Tensor, summary: str) -> torch.Tensor:
    """Summaries of units.

    Args:
        keys: ``[..., unit, head_size]``.
        summary: one of `SUMMARIES`.

    Returns:
        ``float32[..., parts, head_size]``: what takes the place of the largest and of the least, or the mean alone.
    """
    keys = keys.float()
    mean = keys.mean(-2, keepdim=True)
    if summary == "mean":
        return mean
    bounds = torch.stack([keys.amax(-2), keys.amin(-2)], -2)
    return bounds if summary == "minmax" else (bounds + mean) / 2


def scores_reference(query: torch.Tensor, summaries: torch.Tensor) -> torch.Tensor:
    """Unscaled scores ``float32[heads, rows, units]``.

    Args:
        query: ``[rows, heads, head_size]``.
        summaries: ``float32[kv_heads, units, parts, head_size]``; query head ``h`` uses KV head
            ``h * kv_heads // heads``.
    """
    heads, kv_heads = query.shape[1], len(summaries)
    of_heads = summaries.repeat_interleave(heads // kv_heads, dim=0)
    rows = query.float().transpose(0, 1)
    if summaries.shape[2] == 1:
        return torch.einsum("hrd,hud->hru", rows, of_heads[:, :, 0])
    positive = torch.einsum("hrd,hud->hru", rows.clamp(min=0), of_heads[:, :, 0])
    return positive + torch.einsum("hrd,hud->hru", rows.clamp(max=0), of_heads[:, :, 1])


def votes_reference(query: torch.Tensor, summaries: torch.Tensor, scale: float, by_head: bool) -> torch.Tensor:
    """``float32[kv_heads, units]``: mean over the voting query heads of the softmax over the units of the scores of the
    rows' mean query; without ``by_head`` the same for all KV heads."""
    mean = query.float().mean(0, keepdim=True)
    shares = (scores_reference(mean, summaries) * scale).softmax(-1)
    kv_heads, units = summaries.shape[:2]
    votes = shares.reshape(kv_heads, -1, units).mean(1)
    return votes if by_head else votes.mean(0, keepdim=True).expand(kv_heads, units)


def choose_reference(votes: torch.Tensor, counts: Int32Array, first: int) -> list[Int32Array]:
    """Per KV head the ``counts[head]`` units of most votes, rising; among equal ones the earlier.

    Args:
        votes: ``float32[kv_heads, units]``.
        counts: ``int32[kv_heads]``, none above the number of units.
        first: units at the beginning that are chosen in any case; no count is below.
    """
    chosen = []
    for head, count in enumerate(counts):
        value = votes[head].clone()
        value[:first] = torch.inf
        order = torch.argsort(value, descending=True, stable=True)[: int(count)]
        chosen.append(order.sort().values.numpy().astype(np.int32))
    return chosen


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over heads of the Jaccard similarity of two choices ``bool[heads, units]``; 1 where both are empty."""
    both, either = (a & b).sum(1), (a | b).sum(1)
    return float(torch.where(either > 0, both / either.clamp(min=1), 1.0).mean())


def allocate(fractions: Float32Array, errors: Float32Array, mean: float) -> Float32Array:
    """Give each head the share of a context that makes the sum of all errors least, at a mean share.

    Greedy over the lower convex hulls: the next step is the one that takes away most error per share that it costs.

    Args:
        fractions: ``float[F]`` shares of the context, rising.
        errors: ``float[F, N]`` error of each head when it attends such a share.
        mean: mean share over the heads.

    Returns:
        ``float32[N]`` share of each head; their mean is at most ``mean`` (but no head gets less than the least share).

    Raises:
        ValueError: shapes differ, or the fractions do not rise.
    """
    if errors.ndim != 2 or len(errors) != len(fractions) or np.any(np.diff(fractions) <= 0):
        raise ValueError(f"fractions must rise and errors be [{len(fractions)}, heads], got {errors.shape}")
    count = errors.shape[1]
    steps = []  # (error taken away per share, head, fraction reached)
    for head in range(count):
        at = 0
        while at < len(fractions) - 1:
            gains = (errors[at, head] - errors[at + 1 :, head]) / (fractions[at + 1 :] - fractions[at])
            best = int(np.argmax(gains))
            if gains[best] <= 0:
                break
            at += 1 + best
            steps.append((float(gains[best]), head, at))
    place = np.zeros(count, np.int64)
    left = (mean - float(fractions[0])) * count
    # A head's steps have falling gains, so they are taken in their order.
    for _, head, at in sorted(steps, key=lambda step: -step[0]):
        cost = float(fractions[at] - fractions[place[head]])
        if cost <= left:
            left -= cost
            place[head] = at
    return fractions[place].astype(np.float32)
