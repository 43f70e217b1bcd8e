"""Proposers for tests of sampling, where the target's best token is not always the one emitted."""

from __future__ import annotations

from typing import Any

import numpy as np
import tree_proposers
from vllm_specplug.proposers.base import SOURCE_RECYCLING, DraftForest, Int32Array, Proposer, Request, StepResult

from vllm_specplug import registry


class Guided(tree_proposers.Trees):
    """Trees of random shape around the right path, for requests whose tokens are not the raw logits' best."""

    name = "guided"

    def _check_rows(self, step: StepResult, i: int, last: int, emitted: list[int]) -> None:
        pass


class Recycled(Proposer):
    """Under the last token, what the target last thought likely after it, and under each of these the same: 2 + 4."""

    name = "recycled"
    Options = tree_proposers.TreesOptions
    wants_topk = True
    topk = 2

    def __init__(self, settings: tree_proposers.TreesOptions) -> None:
        self.likely: dict[int, list[int]] = {}
        self.last: dict[int, int] = {}

    def add_request(self, request: Request) -> None:
        self.last[request.slot] = int(request.prompt[-1])

    def observe(self, step: StepResult) -> None:
        assert step.row_tokens is not None and step.topk_ids is not None
        self.likely |= zip(step.row_tokens.tolist(), step.topk_ids.tolist(), strict=True)
        for i, slot in enumerate(step.slots.tolist()):
            self.last[slot] = int(step.tokens[step.offsets[i + 1] - 1])

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        tokens: list[int] = []
        parents: list[int] = []
        offsets = [0]
        for slot, limit in zip(slots.tolist(), limits.tolist(), strict=True):
            first = self.likely.get(self.last[slot], [])
            nodes = [(-1, t) for t in first] + [(j, t) for j, f in enumerate(first) for t in self.likely.get(f, [])]
            parents += [p for p, _ in nodes[:limit]]
            tokens += [t for _, t in nodes[:limit]]
            offsets.append(len(tokens))
        return DraftForest(
            tokens=np.array(tokens, np.int32),
            parents=np.array(parents, np.int32),
            probs=np.full(len(tokens), 0.5, np.float32),
            sources=np.full(len(tokens), SOURCE_RECYCLING, np.int8),
            offsets=np.array(offsets, np.int32),
        )

    def remove_request(self, slot: int) -> None:
        del self.last[slot]


def speculative(name: str, nodes: int) -> dict[str, Any]:
    """``speculative_config`` for a proposer of this module, at most ``nodes`` nodes per request and step."""
    registry.proposers().setdefault(name, registry.Entry(name, f"sampling_proposers:{name}", "the tests"))
    return {"method": "custom_class", "model": f"vllm_specplug.{name}", "num_speculative_tokens": nodes}
