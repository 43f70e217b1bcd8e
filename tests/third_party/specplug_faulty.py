"""A third party's proposer: drafts by prompt lookup, and raises wherever a request asks it to.

A request with ``vllm_xargs: {"fail_in": "propose"}`` makes every call of ``propose`` that it takes part in raise,
and so for ``observe``, ``add_request`` and ``remove_request``. ``"bad_forest"`` returns a forest that is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from vllm_specplug.proposers.base import SOURCE_CONTEXT, DraftForest, Int32Array, Proposer, Request, StepResult

from vllm_specplug import options


class Deliberate(RuntimeError):
    """What this proposer raises."""


@dataclass(frozen=True, slots=True)
class FaultyOptions:
    """Options of :class:`Faulty`."""

    match: int = options.option(2, "how many tokens must match", low=1, high=8)


class Faulty(Proposer):
    """Continues the last earlier occurrence of the last ``match`` tokens."""

    name = "faulty"
    Options = FaultyOptions

    def __init__(self, settings: FaultyOptions) -> None:
        self._match = settings.match
        self._tokens: dict[int, list[int]] = {}
        self._fails: dict[int, str] = {}

    def _maybe_fail(self, method: str, slots: list[int]) -> None:
        for slot in slots:
            if self._fails.get(slot) == method:
                raise Deliberate(f"asked to fail in {method} (slot {slot})")

    def add_request(self, request: Request) -> None:
        if request.slot in self._tokens:
            raise AssertionError(f"slot {request.slot} was handed out twice")
        fail_in = str(request.extra_args.get("fail_in", ""))
        if fail_in == "add_request":
            raise Deliberate("asked to fail in add_request")
        self._tokens[request.slot] = request.prompt.tolist()
        self._fails[request.slot] = fail_in

    def observe(self, step: StepResult) -> None:
        self._maybe_fail("observe", step.slots.tolist())
        for i, slot in enumerate(step.slots.tolist()):
            self._tokens[slot] += step.tokens[step.offsets[i] : step.offsets[i + 1]].tolist()

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        self._maybe_fail("propose", slots.tolist())
        drafts = [self._draft(slot, limit) for slot, limit in zip(slots.tolist(), limits.tolist(), strict=True)]
        if any(self._fails[slot] == "bad_forest" for slot in slots.tolist()):
            drafts[0] = [1 << 30]
        sizes = [len(draft) for draft in drafts]
        tokens = np.array([token for draft in drafts for token in draft], np.int32)
        return DraftForest(
            tokens=tokens,
            parents=np.array([i - 1 for size in sizes for i in range(size)], np.int32),
            probs=np.full(len(tokens), 0.5, np.float32),
            sources=np.full(len(tokens), SOURCE_CONTEXT, np.int8),
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
        )

    def _draft(self, slot: int, limit: int) -> list[int]:
        tokens, n = self._tokens[slot], self._match
        for at in range(len(tokens) - n - 1, -1, -1):
            if tokens[at : at + n] == tokens[-n:]:
                return tokens[at + n : at + n + limit]
        return []

    def remove_request(self, slot: int) -> None:
        fail_in = self._fails.pop(slot, "")
        self._tokens.pop(slot, None)
        if fail_in == "remove_request":
            raise Deliberate("asked to fail in remove_request")
