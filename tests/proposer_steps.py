"""Drives a proposer by hand: requests, steps with rows and top-k, drafts."""

from __future__ import annotations

import itertools

import numpy as np
from vllm_specplug.proposers.base import DraftForest, Proposer, Request, StepResult

WIDTH = 8


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


_unused = itertools.count(1_000_000)


def guesses(*best: int) -> list[int]:
    """A top-k row that starts with ``best``; the rest are tokens that occur nowhere else."""
    return [*best, *itertools.islice(_unused, WIDTH - len(best))]


def step(slot: int, emitted: list[int], rows: list[tuple[int, int, list[int]]] | None = None) -> StepResult:
    """One request's step. ``rows``: (token, parent row, top-k) of the root and of every verified node."""
    arrays = {}
    if rows is not None:
        tokens, parents, ids = zip(*rows, strict=True)
        logprobs = np.log(0.5 ** np.arange(1, WIDTH + 1, dtype=np.float32))
        arrays = {
            "row_tokens": ints(*tokens),
            "row_offsets": ints(0, len(rows)),
            "row_parents": ints(*parents),
            "topk_ids": np.array(ids, np.int32),
            "topk_logprobs": np.tile(logprobs, (len(rows), 1)),
        }
    drafted = len(rows) - 1 if rows else 0
    counts = ints(drafted), ints(min(drafted, len(emitted) - 1))
    return StepResult(ints(slot), ints(*emitted), ints(0, len(emitted)), *counts, **arrays)


def draft(proposer: Proposer, slot: int, limit: int) -> DraftForest:
    """One request's draft, its invariants checked."""
    forest = proposer.propose(ints(slot), ints(limit))
    forest.check_integrity(ints(limit))
    return forest


def paths(forest: DraftForest) -> list[list[int]]:
    """Token path of every node of a one-request forest."""
    found: list[list[int]] = []
    for token, parent in zip(forest.tokens.tolist(), forest.parents.tolist(), strict=True):
        found.append([*(found[parent] if parent >= 0 else []), token])
    return found


def talk(proposer: Proposer, slot: int, prompt: list[int], output: list[int], **fields) -> None:
    """A whole request, one token a step, each with the top-k that has the emitted token first."""
    proposer.add_request(Request(slot, f"r{slot}", ints(*prompt), **fields))
    before = prompt[-1]
    for token in output:
        proposer.observe(step(slot, [token], [(before, -1, guesses(token))]))
        before = token
    proposer.remove_request(slot)
