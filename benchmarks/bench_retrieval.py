"""Drafting cost of `Retrieval` beside its peers, in one run: no model, only what happens between two target steps.

    python benchmarks/bench_retrieval.py --trace TRACE.jsonl.gz [--requests 64] [--length 4000] [--csv FILE]

Every request is an odd-numbered one of the trace: its prompt is the ``--length`` tokens of joined recorded text
(prompts and outputs) that end with its own prompt, and it goes on with its recorded output and what follows, at
1 + accepted tokens a step, by the drafter's own accepted drafts. Outputs of the even-numbered ones are learned before
(the store). Peers: `arctic_inference.suffix_decoding` (see install_suffix_peer.sh) called as vLLM's `suffix` method
calls it with its defaults, and vLLM's numba `ngram` (2 to 4 tokens, 5 drafts), each if installed. Steps of all drafters
alternate, so that a noisy machine disturbs all alike; figures are the median (p20, p80) over steps of time / requests,
and the best step.

`step` is one step's observe and propose together per request; `admit` is add_request of one prompt; `end` is what the
end of a request costs. Peers learn finished outputs while they run, so their `end` is small. `mat` and `drafts` say how
much each got for its time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from replay import read_trace, write_rows
from vllm_specplug.proposers.base import Proposer, Request, StepResult

from vllm_specplug.trace.replay import build, parse_settings

DRAFT_LIMIT = 16


class Drafter(Protocol):
    """One way of drafting for many requests."""

    def admit(self, slot: int, prompt: np.ndarray) -> None: ...
    def step(self, emitted: list[np.ndarray], drafted: list[np.ndarray]) -> list[np.ndarray]: ...
    def end(self, slot: int) -> None: ...


class Ours:
    """A proposer of this package."""

    def __init__(self, proposer: Proposer, requests: int) -> None:
        self.proposer = proposer
        self.slots = np.arange(requests, dtype=np.int32)
        self.limits = np.full(requests, DRAFT_LIMIT, np.int32)
        self.seconds = 0.0

    def admit(self, slot: int, prompt: np.ndarray) -> None:
        self.proposer.add_request(Request(slot, str(slot), prompt))

    def step(self, emitted: list[np.ndarray], drafted: list[np.ndarray]) -> list[np.ndarray]:
        # The host holds these arrays already; making them is not the drafter's cost.
        sizes = np.array([len(e) for e in emitted], np.int32)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        counts = np.array([len(d) for d in drafted], np.int32)
        result = StepResult(self.slots, np.concatenate(emitted), offsets, counts, sizes - 1)
        start = time.perf_counter()
        self.proposer.observe(result)
        forest = self.proposer.propose(self.slots, self.limits)
        self.seconds = time.perf_counter() - start
        return [forest.tokens[a:b] for a, b in zip(forest.offsets[:-1], forest.offsets[1:], strict=True)]

    def end(self, slot: int) -> None:
        self.proposer.remove_request(slot)


class Suffix:
    """Arctic's suffix decoding, as vLLM calls it (v1/spec_decode/suffix_decoding.py) with vLLM's defaults."""

    DEPTH, CACHED, FACTOR, MIN_PROB = 24, 10_000, 1.0, 0.1

    def __init__(self, requests: int, length: int) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.cache = SuffixDecodingCache(max_tree_depth=self.DEPTH, max_cached_requests=self.CACHED)
        self.text = np.zeros((requests, length), np.int32)
        self.sizes = [0] * requests
        self.names: dict[int, str] = {}
        self.seconds = 0.0
        self.count = 0

    def admit(self, slot: int, prompt: np.ndarray) -> None:
        self.count += 1
        self.names[slot] = str(self.count)
        self.text[slot, : len(prompt)] = prompt
        self.sizes[slot] = len(prompt)
        self.cache.start_request(self.names[slot], prompt)

    def step(self, emitted: list[np.ndarray], drafted: list[np.ndarray]) -> list[np.ndarray]:
        for slot, tokens in enumerate(emitted):
            size = self.sizes[slot]
            self.text[slot, size : size + len(tokens)] = tokens
            self.sizes[slot] = size + len(tokens)
        lists = [tokens.tolist() for tokens in emitted]  # vLLM hands lists over
        drafts = []
        start = time.perf_counter()
        for slot, tokens in enumerate(lists):
            name, size = self.names[slot], self.sizes[slot]
            self.cache.add_active_response(name, tokens)
            pattern = self.text[slot, max(0, size - self.DEPTH) : size]
            draft = self.cache.speculate(
                name, pattern, max_spec_tokens=DRAFT_LIMIT, max_spec_factor=self.FACTOR, min_token_prob=self.MIN_PROB
            )
            drafts.append(draft.token_ids)
        self.seconds = time.perf_counter() - start
        return [np.array(d, np.int32) for d in drafts]

    def end(self, slot: int) -> None:
        self.cache.stop_request(self.names[slot])


class Ngram:
    """vLLM's numba n-gram lookup; it keeps no state, so admission costs nothing."""

    def __init__(self, requests: int, length: int) -> None:
        from types import SimpleNamespace

        from vllm.v1.spec_decode.ngram_proposer import NgramProposer

        speculative = SimpleNamespace(prompt_lookup_min=2, prompt_lookup_max=4, num_speculative_tokens=5)
        config: Any = SimpleNamespace(
            speculative_config=speculative,
            model_config=SimpleNamespace(max_model_len=length),
            scheduler_config=SimpleNamespace(max_num_seqs=max(requests, 1024)),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
        self.proposer = NgramProposer(config)
        self.text = np.zeros((requests, length), np.int32)
        self.sizes = np.zeros(requests, np.int32)
        self.seconds = 0.0

    def admit(self, slot: int, prompt: np.ndarray) -> None:
        self.text[slot, : len(prompt)] = prompt
        self.sizes[slot] = len(prompt)

    def step(self, emitted: list[np.ndarray], drafted: list[np.ndarray]) -> list[np.ndarray]:
        for slot, tokens in enumerate(emitted):
            size = self.sizes[slot]
            self.text[slot, size : size + len(tokens)] = tokens
            self.sizes[slot] = size + len(tokens)
        lists = [tokens.tolist() for tokens in emitted]
        start = time.perf_counter()
        drafts = self.proposer.propose(5, lists, self.sizes, self.text)
        self.seconds = time.perf_counter() - start
        return [np.array(d, np.int32) for d in drafts]

    def end(self, slot: int) -> None:
        self.sizes[slot] = 0


def texts(trace: Path, requests: int, before: int, after: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(per request ``int32[before + after]``, its output starting at ``before``; the outputs to store)."""
    recorded = read_trace(trace, topk=False)
    stream = np.concatenate([part for r in recorded for part in (r.prompt, r.output)])
    sizes = np.cumsum([len(part) for r in recorded for part in (r.prompt, r.output)])
    outputs_at = sizes[2::4]  # odd requests
    chosen = outputs_at[np.linspace(0, len(outputs_at), requests, endpoint=False).astype(np.int64)]
    return [stream[np.arange(s - before, s + after) % len(stream)] for s in chosen], [r.output for r in recorded[::2]]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Drafting cost of Retrieval and its peers.")
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--length", type=int, default=4000, help="prompt tokens of each request")
    parser.add_argument("--steps", type=int, default=50, help="timed steps per drafter")
    parser.add_argument("--option", action="append", default=[], metavar="SECTION.NAME=VALUE")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()

    after = args.steps * (DRAFT_LIMIT + 1) + 1
    room = args.length + after
    streams, stored = texts(args.trace, args.requests, args.length, after)
    proposer, section = build("Retrieval", parse_settings(args.option))
    print(f"{args.requests} requests of {args.length} tokens; Retrieval {section}")
    drafters: dict[str, Drafter] = {"Retrieval": Ours(proposer, args.requests)}
    for name, make in (("suffix (arctic)", Suffix), ("ngram (vLLM)", Ngram)):
        try:
            drafters[name] = make(args.requests, room)
        except ImportError as error:
            print(f"{name}: not installed ({error})")

    one = np.zeros(1, np.int32)
    for output in stored:
        for drafter in drafters.values():
            drafter.admit(0, output[:1])
            if isinstance(drafter, Ours):
                rest = output[1:]
                drafter.proposer.observe(StepResult(one, rest, np.array([0, len(rest)], np.int32), one, one))
            elif isinstance(drafter, Suffix):
                drafter.cache.add_active_response(drafter.names[0], output)
            drafter.end(0)

    times: dict[str, dict[str, list[float]]] = {n: {"step": [], "admit": [], "end": []} for n in drafters}
    at = {name: [args.length] * args.requests for name in drafters}
    drafts = {name: [np.zeros(0, np.int32)] * args.requests for name in drafters}
    totals = {name: np.zeros(2) for name in drafters}
    for slot, stream in enumerate(streams):
        for name, drafter in drafters.items():
            start = time.perf_counter()
            drafter.admit(slot, stream[: args.length])
            times[name]["admit"].append(time.perf_counter() - start)
    for _ in range(args.steps):
        for name, drafter in drafters.items():
            emitted = []
            for slot, stream in enumerate(streams):
                here, draft = at[name][slot], drafts[name][slot]
                same = draft == stream[here : here + len(draft)]
                accepted = len(draft) if same.all() else int(np.argmin(same))
                emitted.append(stream[here : here + accepted + 1])
                at[name][slot] += accepted + 1
            totals[name] += (sum(map(len, emitted)), sum(map(len, drafts[name])))
            drafts[name] = drafter.step(emitted, drafts[name])
            times[name]["step"].append(drafter.seconds / args.requests)  # type: ignore[attr-defined]
    for slot in range(args.requests):
        for name, drafter in drafters.items():
            start = time.perf_counter()
            drafter.end(slot)
            times[name]["end"].append(time.perf_counter() - start)

    rows = []
    config = str({"requests": args.requests, "length": args.length, "steps": args.steps, "options": args.option})
    print(f"{'us per request':<18}{'step':>24}{'best':>8}{'admit':>26}{'end':>26}{'MAT':>7}{'drafts':>8}")
    for name in drafters:
        cells = []
        for metric, seconds in times[name].items():
            # The first steps page memory in.
            p20, mid, p80 = np.percentile(np.array(seconds[5:]) * 1e6, (20, 50, 80))
            cells.append(f"{mid:9.1f} ({p20:.1f}, {p80:.1f})")
            values = {"value": f"{mid:.4g}", "p20": f"{p20:.4g}", "p80": f"{p80:.4g}"}
            rows.append(
                {"benchmark": "retrieval_cost", "provider": name, "metric": metric, "unit": "us/request", **values}
            )
        best = min(times[name]["step"]) * 1e6
        rows.append({"benchmark": "retrieval_cost", "provider": name, "metric": "step_best", "unit": "us/request"})
        rows[-1]["value"] = f"{best:.4g}"
        emitted_total, drafted_total = totals[name] / (args.steps * args.requests)
        for metric, value in (("mat", emitted_total), ("drafts", drafted_total)):
            rows.append({"benchmark": "retrieval_cost", "provider": name, "metric": metric, "unit": "tokens/step"})
            rows[-1]["value"] = f"{value:.4g}"
        print(
            f"{name:<18}{cells[0]:>24}{best:>8.1f}{cells[1]:>26}{cells[2]:>26}{emitted_total:>7.2f}{drafted_total:>8.2f}"
        )
    if args.csv:
        write_rows(args.csv, [{**row, "config": config} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
