"""Cheaper verification for long contexts: drafts of an inner proposer, under the budget, checked approximately.

The one approximate proposer: what it emits is the sparse target model's. It drafts as :class:`.adaptive_length.
AdaptiveLength` does; what is sparse happens in the host (`host/sparse_*.py`), which reads these options. After "Accelerate
Speculative Decoding with Sparse Computation in Verification" (arXiv 2512.21911).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_specplug.options import option

from .adaptive_length import AdaptiveLength, BudgetOptions


@dataclass(frozen=True)
class SparseVerifyOptions(BudgetOptions):
    """Options of the budget, and of every sparse part; each has a value at which it is exact."""

    inner: str = option(
        "Auto",
        "what drafts: a registered proposer, or vLLM's own: vllm:ngram, vllm:suffix",
    )
    calibration: str | None = option(
        None, "file written by `specplug sparse calibrate`; none: the one it keeps for this model, if there is one"
    )
    ffn_sparsity: float = option(
        0.0,
        "share of each token's feed-forward channels that is skipped, those of the smallest gates; 0: exact",
        low=0.0,
        high=0.95,
    )
    ffn_rows: int = option(4, "skip channels only in steps of at most so many rows", low=1, high=128)
    moe_drop: int = option(
        0, "drop up to so many of a token's experts, those of the smallest weights; 0: exact", low=0, high=3
    )
    moe_experts: float = option(
        1.0,
        "share of a layer's experts that a step's verified rows may use, chosen by vote; 1: exact",
        low=0.05,
        high=1.0,
    )


class SparseVerify(AdaptiveLength):
    """Drafts of an inner proposer, cut to what pays, verified by an approximation of the target model."""

    name: ClassVar[str] = "sparse_verify"
    Options: ClassVar[type] = SparseVerifyOptions
