"""Drafts from a request's own text and from earlier requests' outputs, with calibrated probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_specplug.options import option

from .drafting import Drafter, Sources, TextOptions
from .tree_growth import MAX_DRAFT

__all__ = ["MAX_DRAFT", "Retrieval", "RetrievalOptions"]


@dataclass(frozen=True)
class RetrievalOptions(TextOptions):
    """Options of the retrieval proposer."""

    min_prob: float = option(
        # Best or within 2% of it, on recorded traces under cost curves of a verify step measured on CPUs (eager and
        # compiled) and one assumed for nearly free rows; anything from 0.05 to 0.1 is within 2% too on the CPU curves.
        0.07,
        "stop drafting when the probability that the draft is accepted up to there falls below this",
        low=0.0,
        high=1.0,
        env="SPECPLUG_RETRIEVAL_MIN_PROB",
    )
    tree: bool = option(False, "draft a tree of continuations, not one, where the server can verify it")


class Retrieval(Drafter):
    """Drafts what followed the same words before, in this request or in earlier outputs of its namespace.

    Context lookup as in SAM-Decoding (arXiv 2411.10666) and SuffixDecoding (arXiv 2411.04975), but all context lengths
    of both sources vote, and the vote is a calibrated probability (see :mod:`.mixture`). Samples of one prompt share
    one automaton (arXiv 2503.05330; Seer, arXiv 2511.14617).
    """

    name: ClassVar[str] = "retrieval"
    Options: ClassVar[type] = RetrievalOptions

    def __init__(self, options: RetrievalOptions | None = None) -> None:
        self.options = options = options or RetrievalOptions()
        super().__init__(Sources(**options.sources()), options.min_prob, options.tree)
