"""Drafting cost of `Auto` and `TokenRecycling`: what happens between two target steps, without any model.

    python benchmarks/bench_auto.py --trace TRACE.jsonl.gz [--requests 64] [--nodes 16] [--length 1000] [--csv FILE]

All requests run at once, each a recorded one: its prompt, with joined recorded text before it up to ``--length``
tokens, and its recorded output, at 1 + accepted tokens a step; a finished one is replaced by another. The rest of the
trace is replayed before, one by one, to fill store and table. Every step reports the top-k of all verified rows, as a
server does: the recorded one for the root and accepted nodes, another recorded row's for the rejected ones (the
recording does not know theirs; it costs the same). So ``mat`` here is only a sign of life; `replay.py` measures it.

`step` is one step's observe and propose together, divided by the requests: median (p20, p80) over steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from replay import read_trace, write_rows
from vllm_specplug.proposers.base import DraftForest, Proposer, Request, StepResult

from vllm_specplug.trace.files import Recorded
from vllm_specplug.trace.replay import Replay, accepted_path, build, parse_settings

Rows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def request_rows(request: Recorded, at: int, draft: DraftForest, path: list[int], filler: np.ndarray) -> Rows:
    """Tokens, parents, top-k ids and log-probabilities of the rows verified at output position ``at``."""
    assert request.topk_ids is not None and request.topk_logprobs is not None
    tokens = np.concatenate([request.output[at - 1 : at], draft.tokens])
    parents = np.concatenate([np.array([-1], np.int32), draft.parents + 1])
    which = filler[: len(tokens)].copy()
    which[[0, *(j + 1 for j in path)]] = np.arange(at, at + len(path) + 1)
    return tokens, parents, request.topk_ids[which, :8], request.topk_logprobs[which, :8]


def one(forest: DraftForest, i: int) -> DraftForest:
    """The draft of the i-th request."""
    lo, hi = forest.offsets[i : i + 2]
    parts = (getattr(forest, name)[lo:hi] for name in ("tokens", "parents", "probs", "sources"))
    return DraftForest(*parts, np.array([0, hi - lo], np.int32))


def admit(proposer: Proposer, slot: int, request: Recorded) -> None:
    """Admit a request with the first token of its output."""
    room = len(request.prompt) + len(request.output)
    proposer.add_request(Request(slot, str(slot), np.append(request.prompt, request.output[:1]), max_tokens=room))


def run(
    proposer: Proposer, requests: list[Recorded], reserve: list[Recorded], steps: int, nodes: int
) -> tuple[list[float], float, float]:
    """Seconds of each step per request; tokens emitted and nodes drafted per request and step.

    Requests near their end are replaced from ``reserve``.
    """
    n = len(requests)
    requests = list(requests)
    slots, limits = np.arange(n, dtype=np.int32), np.full(n, nodes, np.int32)
    rng = np.random.default_rng(0)
    for slot, request in enumerate(requests):
        admit(proposer, slot, request)
    at = [1] * n
    seconds, emitted, drafted = [], 0, 0
    for _ in range(steps):
        forest = proposer.propose(slots, limits)
        parts, tokens, counts = [], [], []
        for slot, request in enumerate(requests):
            draft, here = one(forest, slot), at[slot]
            path = accepted_path(draft, request.output[here:-1])
            filler = rng.integers(0, len(request.output), nodes + 1)
            parts.append(request_rows(request, here, draft, path, filler))
            tokens.append(request.output[here : here + len(path) + 1])
            counts.append((len(draft.tokens), len(path)))
            at[slot] += len(path) + 1
        emitted += sum(map(len, tokens))
        drafted += sum(c[0] for c in counts)
        sizes, rows = [len(t) for t in tokens], [len(p[0]) for p in parts]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        step = StepResult(
            slots,
            np.concatenate(tokens),
            np.cumsum([0, *sizes], dtype=np.int32),
            *np.array(counts, np.int32).T,
            row_tokens=columns[0],
            row_offsets=np.cumsum([0, *rows], dtype=np.int32),
            row_parents=columns[1],
            topk_ids=np.ascontiguousarray(columns[2]),
            topk_logprobs=np.ascontiguousarray(columns[3]),
        )
        start = time.perf_counter()
        proposer.observe(step)
        proposer.propose(slots, limits)
        seconds.append((time.perf_counter() - start) / n)
        for slot in range(n):
            if len(requests[slot].output) - at[slot] < 4:
                proposer.remove_request(slot)
                requests[slot], at[slot] = reserve.pop(), 1
                admit(proposer, slot, requests[slot])
    return seconds, emitted / len(seconds) / n, drafted / len(seconds) / n


def choose(trace: list[Recorded], count: int, length: int) -> tuple[list[Recorded], list[Recorded]]:
    """``count`` long requests spread over the trace, their prompts filled up to ``length`` tokens; the other ones."""
    longest = max(len(r.output) for r in trace)
    whole = [i for i, r in enumerate(trace) if len(r.output) == longest]
    chosen = {whole[i] for i in np.linspace(0, len(whole), count, endpoint=False).astype(int)}
    stream = np.concatenate([part for r in trace for part in (r.output, r.prompt)])
    filled = []
    for i in sorted(chosen):
        r = trace[i]
        start = int(np.searchsorted(np.arange(len(stream)), i * len(stream) // len(trace)))
        before = stream[np.arange(start, start + max(0, length - len(r.prompt))) % len(stream)]
        prompt = np.concatenate([before, r.prompt]).astype(np.int32)
        filled.append(Recorded(r.task, prompt, r.output, r.topk_ids, r.topk_logprobs))
    return filled, [r for i, r in enumerate(trace) if i not in chosen]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Drafting cost of trees.")
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=16, help="nodes per tree")
    parser.add_argument("--length", type=int, default=1000, help="prompt tokens of each request")
    parser.add_argument("--steps", type=int, default=40, help="most timed steps")
    parser.add_argument("--option", action="append", default=[], metavar="SECTION.NAME=VALUE")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()

    requests, others = choose(read_trace(args.trace, topk=True), args.requests, args.length)
    config = str({"requests": len(requests), "nodes": args.nodes, "length": args.length, "options": args.option})
    print(f"{len(requests)} requests of {args.length} tokens, {args.nodes} nodes")
    print(f"{'us per request':<18}{'step':>24}{'best':>8}{'emitted':>9}{'nodes':>8}")
    rows = []
    for name, section in (("Auto", "auto"), ("TokenRecycling", "token_recycling")):
        settings = parse_settings([f"{section}.min_prob=0.0", *(o for o in args.option if o.startswith(section))])
        proposer, _ = build(name, settings)
        reserve = [r for r in others if len(r.output) > 64][: 2 * len(requests)]
        Replay(proposer, args.nodes).run(r for r in others if not any(r is s for s in reserve))
        seconds, emitted, drafted = run(proposer, requests, reserve, args.steps, args.nodes)
        # The first steps page memory in.
        p20, mid, p80 = np.percentile(np.array(seconds[3:]) * 1e6, (20, 50, 80))
        best = min(seconds) * 1e6
        print(f"{name:<18}{f'{mid:.1f} ({p20:.1f}, {p80:.1f})':>24}{best:>8.1f}{emitted:>9.2f}{drafted:>8.2f}")
        shared = {"benchmark": "auto_cost", "provider": name, "config": config}
        step = {"metric": "step", "unit": "us/request", "value": f"{mid:.4g}", "p20": f"{p20:.4g}", "p80": f"{p80:.4g}"}
        rows += [{**shared, **step}, {**shared, "metric": "step_best", "unit": "us/request", "value": f"{best:.4g}"}]
        for metric, value in (("mat", emitted), ("drafts", drafted)):
            rows.append({**shared, "metric": metric, "unit": "tokens/step", "value": f"{value:.4g}"})
    if args.csv:
        write_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
