"""Proposers for tests that draft trees of random shapes, right or wrong as a test needs them.

A request says what to draft in its ``extra_args``: ``truth``, the output the target will give (then one random path
of each tree is right as far as it goes); ``seed`` of the shapes; ``broken``, which kind of malformed tree to return.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm_specplug.proposers.base import SOURCE_CONTEXT, DraftForest, Int32Array, Proposer, Request, StepResult

from vllm_specplug import options, registry

BROKEN = ("parents", "siblings", "vocabulary", "length", "raise")


@dataclass(frozen=True, slots=True)
class TreesOptions:
    """Options of :class:`Trees`."""

    branching: float = options.option(0.5, "share of nodes that hang on any earlier node", low=0.0, high=1.0)
    vocabulary: int = options.option(2000, "draft wrong tokens below this", low=200, high=1 << 20)
    full: bool = options.option(False, "always draft as many nodes as allowed")


@dataclass(slots=True)
class _State:
    request: Request
    tokens: list[int]
    draw: np.random.Generator


def random_parents(draw: np.random.Generator, size: int, branching: float) -> list[int]:
    """Parents of a random tree of ``size`` nodes, parents first."""
    return [int(draw.integers(-1, j)) if j and draw.random() < branching else j - 1 for j in range(size)]


class Trees(Proposer):
    """Trees of random shape; one path is right where the request tells the truth."""

    name = "trees"
    Options = TreesOptions
    wants_topk = True
    topk = 2

    def __init__(self, settings: TreesOptions) -> None:
        self.settings = settings
        self.states: dict[int, _State] = {}
        self.shapes: dict[str, int] = {"chains": 0, "trees": 0}
        self.rows = 0

    def add_request(self, request: Request) -> None:
        assert request.slot not in self.states
        draw = np.random.default_rng(int(request.extra_args.get("seed", 0)))
        self.states[request.slot] = _State(request, request.prompt.tolist(), draw)

    def observe(self, step: StepResult) -> None:
        assert step.row_offsets is not None and step.row_parents is not None and step.row_tokens is not None
        assert step.topk_ids is not None
        assert len(step.row_parents) == len(step.row_tokens) == len(step.topk_ids) == step.row_offsets[-1]
        for i, slot in enumerate(step.slots.tolist()):
            emitted = step.tokens[step.offsets[i] : step.offsets[i + 1]].tolist()
            self._check_rows(step, i, self.states[slot].tokens[-1], emitted)
            self.states[slot].tokens += emitted

    def _check_rows(self, step: StepResult, i: int, last: int, emitted: list[int]) -> None:
        """The accepted tokens must be a path of the rows, and the target's best at the rows on it (greedy only)."""
        rows = slice(int(step.row_offsets[i]), int(step.row_offsets[i + 1]))
        tokens, parents, best = step.row_tokens[rows].tolist(), step.row_parents[rows].tolist(), step.topk_ids[rows, 0]
        assert (tokens[0], parents[0], len(tokens)) == (last, -1, step.num_drafted[i] + 1)
        assert len(emitted) == step.num_accepted[i] + 1
        row = 0
        for k, token in enumerate(emitted):
            if self.states[int(step.slots[i])].request.temperature == 0:
                assert best[row] == token, "a row attends to something else than its path"
            if k < len(emitted) - 1:
                (row,) = [m for m, (p, t) in enumerate(zip(parents, tokens, strict=True)) if (p, t) == (row, token)]
        self.rows += len(tokens)

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        drafts = [self._draft(self.states[s], n) for s, n in zip(slots.tolist(), limits.tolist(), strict=True)]
        sizes = [len(tokens) for tokens, _ in drafts]
        tokens = np.array([t for tokens, _ in drafts for t in tokens], np.int32)
        return DraftForest(
            tokens=tokens,
            parents=np.array([p for _, parents in drafts for p in parents], np.int32),
            probs=np.full(len(tokens), 0.5, np.float32),
            sources=np.full(len(tokens), SOURCE_CONTEXT, np.int8),
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
        )

    def _draft(self, state: _State, limit: int) -> tuple[list[int], list[int]]:
        draw, extra = state.draw, state.request.extra_args
        size = limit if self.settings.full else int(draw.integers(0, limit + 1))
        parents = random_parents(draw, size, self.settings.branching if state.request.branching else 0.0)
        self.shapes["chains" if parents == list(range(-1, size - 1)) else "trees"] += 1
        # Distinct, so siblings differ; far from the target's taste, mostly.
        *tokens, spare = draw.choice(self.settings.vocabulary, size=size + 1, replace=False).tolist()
        done = len(state.tokens) - len(state.request.prompt) + state.request.num_output
        truth = list(extra.get("truth", ()))[done:]
        if truth:
            self._set_right_path(draw, truth, tokens, parents, spare)
        broken = extra.get("broken")
        if broken and size > 3 and len(state.tokens) % 7 == 0:
            return _break(str(broken), tokens, parents, limit)
        return tokens, parents

    def _set_right_path(
        self, draw: np.random.Generator, truth: list[int], tokens: list[int], parents: list[int], spare: int
    ) -> None:
        row, depth = -1, 0
        while depth < len(truth):
            children = [j for j, p in enumerate(parents) if p == row]
            for j in children:
                if tokens[j] == truth[depth]:  # at most one is right by chance
                    tokens[j], spare = spare, tokens[j]
            if not children or draw.random() < 0.1:
                break
            row = int(draw.choice(children))
            tokens[row] = truth[depth]
            depth += 1

    def remove_request(self, slot: int) -> None:
        del self.states[slot]

    def stats(self) -> dict[str, float]:
        return {"live": len(self.states), "rows": self.rows} | {k: float(v) for k, v in self.shapes.items()}


def _break(how: str, tokens: list[int], parents: list[int], limit: int) -> tuple[list[int], list[int]]:
    if how == "parents":
        parents[1] = 3
    elif how == "siblings":
        parents[:2], tokens[:2] = [-1, -1], [7, 7]
    elif how == "vocabulary":
        tokens[2] = 1 << 30
    elif how == "length":
        tokens, parents = [5] * (limit + 1), list(range(-1, limit))
    else:
        raise RuntimeError("asked to fail")
    return tokens, parents


def register() -> None:
    """Make ``vllm_specplug.Trees`` selectable in this process."""
    registry.proposers().setdefault("Trees", registry.Entry("Trees", "tree_proposers:Trees", "the tests"))


def speculative(nodes: int) -> dict[str, Any]:
    """``speculative_config`` for at most ``nodes`` nodes per request and step."""
    return {"method": "custom_class", "model": "vllm_specplug.Trees", "num_speculative_tokens": nodes}


def generate(llm, prompts, max_tokens, truths=None, concurrency=8, **extra):
    """Greedy outputs; the proposer is told ``truths``, and shapes differ from request to request."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            extra_args={"seed": i, "truth": truths[i] if truths else [], **extra},
        )
        for i in range(len(prompts))
    ]
    if concurrency > 1:
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]
    return [
        list(llm.generate(a, b, use_tqdm=False)[0].outputs[0].token_ids) for a, b in zip(prompts, params, strict=True)
    ]
