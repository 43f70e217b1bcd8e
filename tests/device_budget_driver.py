"""Engines whose scheduler chooses the draft length; see test_device_budget.py, which reads what this reports."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import device_engines
import interpreted

TOKENS = 24


def watch(llm: Any) -> dict[str, list[Any]]:
    """What an engine's budget is asked and told from now on."""
    budget = device_engines.scheduler_of(llm).budget
    seen: dict[str, list[Any]] = {"asked": [], "told": []}
    choose, observe = budget.policy.choose, budget.policy.observe

    def watched_choose(requests: int) -> int:
        length = choose(requests)
        seen["asked"].append([requests, length])
        return length

    def watched_observe(length: int, emitted: list[int], seconds: float = float("nan"), *requests: int) -> None:
        seen["told"].append([length, list(emitted), seconds if seconds == seconds else None])
        observe(length, emitted, seconds, *requests)

    budget.policy.choose, budget.policy.observe = watched_choose, watched_observe
    return seen


def facts(llm: Any) -> dict[str, Any]:
    """What an engine was made of, and vLLM's counters."""
    scheduler = device_engines.scheduler_of(llm)
    budget = getattr(scheduler, "budget", None)
    return {
        "scheduler": type(scheduler).__name__,
        "lengths": budget.policy.lengths if budget else None,
        "failed": budget.failed if budget else None,
        "table": llm.llm_engine.vllm_config.speculative_config.num_speculative_tokens_per_batch_size,
        "asynchronous": llm.llm_engine.vllm_config.scheduler_config.async_scheduling,
        "drafts": device_engines.metric(llm, "vllm:spec_decode_num_drafts"),
        "draft_tokens": device_engines.metric(llm, "vllm:spec_decode_num_draft_tokens"),
        "accepted": device_engines.metric(llm, "vllm:spec_decode_num_accepted_tokens"),
    }


def lengths_in_turn(llm: Any) -> None:
    """Every length after every other, whatever pays."""
    policy = device_engines.scheduler_of(llm).budget.policy
    turns = iter([0, 4, 1, 1, 4, 4, 0, 0, 1, 0] * 100)
    policy.choose = lambda requests: next(turns)


def chosen() -> dict[str, Any]:
    """The policy chooses; then every length follows every other; then it fails."""
    llm = device_engines.engine(None)
    plain = device_engines.greedy(llm, device_engines.PROMPTS, TOKENS)
    llm = device_engines.engine()
    seen = watch(llm)
    outputs = {"plain": plain, "chosen": device_engines.greedy(llm, device_engines.PROMPTS, TOKENS)}
    found = facts(llm) | copy.deepcopy(seen)
    lengths_in_turn(llm)
    seen = watch(llm)
    outputs["in turn"] = device_engines.greedy(llm, device_engines.PROMPTS, TOKENS)
    found["in_turn"] = copy.deepcopy(seen)

    def broken(requests: int) -> int:
        raise RuntimeError("on purpose")

    device_engines.scheduler_of(llm).budget.policy.choose = broken
    before = facts(llm)["draft_tokens"]
    outputs["failed"] = device_engines.greedy(llm, device_engines.PROMPTS, TOKENS)
    found["after_failure"] = facts(llm)
    found["drafted_after_failure"] = found["after_failure"]["draft_tokens"] - before
    scheduler = device_engines.scheduler_of(llm)
    found["totals"] = scheduler.budget.snapshot().totals
    return found | {"outputs": outputs}


def others() -> dict[str, Any]:
    """No asynchronous scheduling; two seats, so two lengths; a fixed length, with vLLM's own scheduler."""
    llm = device_engines.engine("TokenRecycling", async_scheduling=False)
    lengths_in_turn(llm)
    seen = watch(llm)
    prompts = device_engines.PROMPTS[:2]
    outputs = {"synchronous": device_engines.greedy(llm, prompts, TOKENS)}
    found = {"synchronous": facts(llm) | seen}
    llm = device_engines.engine("Retrieval", max_num_seqs=2)
    outputs["two seats"] = device_engines.greedy(llm, prompts, TOKENS)
    found["two seats"] = facts(llm)
    options = {"specplug": {"auto": {"policy": "fixed", "length": 2}}}
    llm = device_engines.engine(additional_config=options)
    outputs["fixed"] = device_engines.greedy(llm, prompts, TOKENS)
    return found | {"fixed": facts(llm), "outputs": outputs}


if __name__ == "__main__":
    cases: dict[str, Callable[[], dict[str, Any]]] = {"chosen": chosen, "others": others}
    interpreted.report(cases[sys.argv[1]]())
