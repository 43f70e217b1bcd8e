"""The proposer to use unless there is a reason for another: every source, one tree, as much of it as pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_specplug.options import option

from .adaptive_length import AdaptiveLength, BudgetOptions
from .drafting import Drafter, Sources, TextOptions


@dataclass(frozen=True)
class AutoOptions(BudgetOptions, TextOptions):
    """Options of the fused proposer under its budget."""

    min_prob: float = option(
        0.0,
        "draft no token that is accepted with less than this probability, whatever it costs",
        low=0.0,
        high=1.0,
        env="SPECPLUG_AUTO_MIN_PROB",
    )
    tree: bool = option(True, "draft trees where the server can verify them; false: chains only")
    recycling: bool = option(True, "draft from the target model's own second guesses")
    table_bytes: int = option(64 << 20, "memory for second guesses, all namespaces together", low=1 << 16)


class Fused(Drafter):
    """Retrieval and token recycling in one draft tree.

    Every node's candidates come from all sources at once, so drafts that share a prefix share its nodes (as RASD,
    arXiv 2503.03434, fuses them), and a node's probability is the online mixture of what every source says of it.
    """

    name: ClassVar[str] = "fused"
    Options: ClassVar[type] = AutoOptions

    def __init__(self, options: AutoOptions) -> None:
        self.options = options
        self.wants_topk = options.recycling
        table_bytes = options.table_bytes if options.recycling else 0
        sources = Sources(**options.sources(), table_bytes=table_bytes)
        super().__init__(sources, options.min_prob, options.tree)


class Auto(AdaptiveLength):
    """Fused draft trees, cut to what pays."""

    name: ClassVar[str] = "auto"
    Options: ClassVar[type] = AutoOptions
    wraps: ClassVar[bool] = False

    def __init__(self, options: AutoOptions | None = None) -> None:
        options = options or AutoOptions()
        super().__init__(options, Fused(options))
