"""Statistics of a comparison: speed, speed-up with its uncertainty, MAT, drafts, and equality of outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_specplug.ab.arms import Block

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """What one arm did on some blocks, against the base arm on the same blocks.

    Attributes:
        tokens_per_s: tokens per second between a block's first and last token.
        speedup: ratio of ``tokens_per_s`` to the base's; resampled over blocks, both arms together.
        cpu_speedup: the same with processor time for time. Other programs on the machine do not enter it, so it is
            the steadier figure on a busy machine; it is no time that a user waits.
        mat: mean tokens per decode step and request, steps without a draft included.
        drafts_per_step: draft tokens verified per decode step and request.
        acceptance: share of the drafted tokens that were accepted; None without drafts.
        identical, outputs: outputs equal to the base's, token by token, and how many there are.
        agreement: mean share of an output before its first difference from the base's.
    """

    tokens_per_s: float
    speedup: Interval
    cpu_speedup: Interval
    mat: float
    drafts_per_step: float
    acceptance: float | None
    identical: int
    outputs: int
    agreement: float


def figures(blocks: Sequence[Block], base: Sequence[Block], seed: int = 0) -> Figures:
    """Summarise ``blocks`` of one arm against ``base``, the same blocks of the base arm."""
    if len(blocks) != len(base) or not blocks:
        raise ValueError(f"{len(blocks)} blocks cannot be compared with {len(base)}")
    steps = sum(b.steps for b in blocks)
    drafted = sum(b.drafted for b in blocks)
    pairs = [
        (ours, theirs)
        for block, base_block in zip(blocks, base, strict=True)
        for ours, theirs in zip(block.outputs, base_block.outputs, strict=True)
    ]
    return Figures(
        tokens_per_s=_rate(blocks),
        speedup=speedup([_timed(b) for b in blocks], [_timed(b) for b in base], seed),
        cpu_speedup=speedup([_cpu_timed(b) for b in blocks], [_cpu_timed(b) for b in base], seed),
        mat=sum(b.decoded for b in blocks) / max(steps, 1),
        drafts_per_step=drafted / max(steps, 1),
        acceptance=sum(b.accepted for b in blocks) / drafted if drafted else None,
        identical=sum(ours == theirs for ours, theirs in pairs),
        outputs=len(pairs),
        agreement=sum(common_prefix(a, b) / max(len(a), len(b), 1) for a, b in pairs) / len(pairs),
    )


def _timed(block: Block) -> tuple[int, float]:
    return block.timed_tokens, block.seconds


def _cpu_timed(block: Block) -> tuple[int, float]:
    return block.timed_tokens, block.cpu_seconds


def _rate(blocks: Sequence[Block]) -> float:
    return sum(b.timed_tokens for b in blocks) / max(sum(b.seconds for b in blocks), 1e-9)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of equal tokens before the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def speedup(timed: Sequence[tuple[int, float]], base: Sequence[tuple[int, float]], seed: int = 0) -> Interval:
    """Ratio of the rates of two lists of (tokens, seconds). The interval resamples them in pairs, so that a slow
    spell of the machine, which hits both arms of a block, does not widen it."""
    data = np.array([(*ours, *theirs) for ours, theirs in zip(timed, base, strict=True)], dtype=float)

    def ratio(sums: np.ndarray) -> np.ndarray:
        tokens, seconds, base_tokens, base_seconds = np.maximum(sums, 1e-9).T
        return tokens / seconds / (base_tokens / base_seconds)

    picks = np.random.default_rng(seed).integers(0, len(data), size=(RESAMPLES, len(data)))
    low, high = np.percentile(ratio(data[picks].sum(axis=1)), (2.5, 97.5))
    return Interval(float(ratio(data.sum(axis=0))), float(low), float(high))
