"""Cheaper verification for long contexts: drafts of an inner proposer, under the budget, checked approximately.

The one approximate proposer: what it emits is the sparse target model's. It drafts as
:class:`.adaptive_length.AdaptiveLength` does; what is sparse happens in the host (`host/sparse*.py`), which reads these
options. After "Accelerate Speculative Decoding with Sparse Computation in Verification" (arXiv 2512.21911).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_specplug.kernels.block_select import Selection

from vllm_specplug.options import option

from .adaptive_length import AdaptiveLength, BudgetOptions
from .base import Proposer


@dataclass(frozen=True)
class SparseVerifyOptions(BudgetOptions):
    """Options of the budget, and of every sparse part; each has a value at which it is exact."""

    inner: str = option(
        "Auto",
        "what drafts: a registered proposer, or vLLM's own: vllm:ngram, vllm:suffix",
    )
    attention: bool = option(True, "attend only part of long contexts when verifying; false: exact")
    dense_below: int = option(1024, "contexts of up to so many tokens are attended whole", low=0)
    ratio: float = option(
        0.2, "share of what lies beyond that which is attended, on average; 1: exact", low=0.0, high=1.0
    )
    unit: int = option(32, "tokens that are attended or left out together; must divide the KV block size", low=16)
    scorer: str = option(
        "halfway",
        "how parts of the context are ranked: by bounds of their keys (minmax), by their mean key (mean), by the mean "
        "of both scores (halfway), or not at all: only the beginning and the end are attended (streaming)",
        choices=("halfway", "minmax", "mean", "streaming"),
    )
    first: int = option(32, "tokens at the beginning that are always attended", low=0)
    last: int = option(64, "tokens before the drafts that are always attended, at least", low=0)
    by_head: bool = option(False, "each KV head ranks by its own queries; false: all heads of a layer by one vote")
    all_rows: bool = option(
        True, "the mean query of all rows to verify ranks, for all of them; false: that of the last accepted token"
    )
    budgets: str = option(
        "calibrated",
        "each KV head attends as much as calibration found it needs (calibrated), or all alike (uniform)",
        choices=("calibrated", "uniform"),
    )
    anchors: str = option(
        "all",
        "layers that rank; the others attend what the last one before them chose. all, or those of the calibration",
        choices=("all", "calibrated"),
    )
    refresh: int = option(
        0, "compute the last accepted tokens again, exactly, whenever there are so many of them; 0: never", low=0
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

    @property
    def exact(self) -> bool:
        """Whether every part is set to its exact value."""
        dense = not self.attention or self.ratio >= 1.0
        return dense and self.ffn_sparsity == 0.0 and self.moe_drop == 0 and self.moe_experts >= 1.0

    def selection(self) -> Selection:
        """How the attention part chooses."""
        return Selection(
            unit=self.unit,
            summary="halfway" if self.scorer == "streaming" else self.scorer,
            first=self.first,
            last=self.last,
            dense_below=self.dense_below,
            ratio=self.ratio,
            by_head=self.by_head,
            all_rows=self.all_rows,
        )


class SparseVerify(AdaptiveLength):
    """Drafts of an inner proposer, cut to what pays, verified by an approximation of the target model."""

    name: ClassVar[str] = "sparse_verify"
    Options: ClassVar[type] = SparseVerifyOptions

    def __init__(self, options: SparseVerifyOptions, inner: Proposer) -> None:
        super().__init__(options, inner)
        self.lossless = options.exact  # type: ignore[misc]  # of this one, not of the class
