"""What a step of vLLM's CPU engine costs when its draft is a tree, next to a chain of as many tokens.

    python benchmarks/bench_tree_step.py [--model PATH] [--dtype bfloat16] [--compiled] [--nodes 6 16 60]
                                         [--context 64 1024] [--steps 200] [--csv benchmarks/results/tree_step.csv]

One engine, one request at a time. Its proposer drafts a chain and a tree on alternate steps, of tokens that are always
wrong, so that every step emits one token and differs from its neighbours in nothing but the draft's shape. A step is
the engine's whole step, scheduling, drafting and detokenising included. Figures: medians over all steps, and the median
of the ratios of neighbouring steps (with their 20th and 80th percentiles).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vllm_specplug.proposers.base import SOURCE_CONTEXT, DraftForest, Int32Array, Proposer, Request, StepResult

from vllm_specplug import registry

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tree_step.csv"


@dataclass(frozen=True, slots=True)
class AlternatingOptions:
    """Options of :class:`Alternating`."""


class Alternating(Proposer):
    """Drafts a chain and a tree by turns; tokens nobody expects."""

    name = "alternating"
    Options = AlternatingOptions

    def __init__(self, settings: AlternatingOptions) -> None:
        self.nodes = 6
        self.turn = 0

    def add_request(self, request: Request) -> None:
        self.turn = 0

    def observe(self, step: StepResult) -> None:
        pass

    def remove_request(self, slot: int) -> None:
        pass

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        size = int(min(self.nodes, limits[0]))
        self.turn += 1
        parents = np.arange(-1, size - 1, dtype=np.int32)
        if self.turn % 2:
            # Three branches at the root, two nodes below each node's first: wide and deep.
            parents = np.array([(j - 3) // 2 if j >= 3 else -1 for j in range(size)], np.int32)
        return DraftForest(
            tokens=np.arange(40000, 40000 + size, dtype=np.int32),
            parents=parents,
            probs=np.full(size, 0.5, np.float32),
            sources=np.full(size, SOURCE_CONTEXT, np.int8),
            offsets=np.array([0, size], np.int32),
        )


def measure(llm: Any, nodes: int, context: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of neighbouring (chain, tree) steps: two arrays of one length."""
    from vllm import SamplingParams

    drafter = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter
    if drafter.trees.reason:
        raise SystemExit(f"drafts are chains here: {drafter.trees.reason}")
    drafter.lifecycle.proposer.nodes = nodes
    before = drafter.lifecycle.counters.accepted
    draw = np.random.default_rng(context)
    pairs: list[tuple[float, float]] = []
    number = 0
    while len(pairs) * 2 < steps:
        number += 1
        length = 64  # tokens per request, so that the context stays near what was asked
        prompt = {"prompt_token_ids": draw.integers(1000, 20000, size=context - length // 2).tolist()}
        params = SamplingParams(temperature=0.0, max_tokens=length + nodes + 2, ignore_eos=True)
        llm.llm_engine.add_request(f"{nodes}-{context}-{number}", prompt, params)
        taken: list[tuple[bool, float]] = []
        while llm.llm_engine.has_unfinished_requests():
            start = time.perf_counter()
            llm.llm_engine.step()
            seconds = time.perf_counter() - start
            taken.append((drafter.trees.plan is not None, seconds))
        # The first steps are the prompt's, the last ones have room for a part of the draft only.
        taken = taken[4 : length - 2]
        for (is_tree, a), (other, b) in zip(taken[::2], taken[1::2], strict=False):
            assert is_tree != other
            pairs.append((b, a) if is_tree else (a, b))
    if drafter.lifecycle.counters.accepted != before:
        raise SystemExit("a draft was accepted: steps differ in more than their draft's shape")
    chain, tree = np.array(pairs).T
    return chain, tree


def rows_of(chain: np.ndarray, tree: np.ndarray, context: int, config: str) -> list[dict[str, Any]]:
    """Rows for the CSV file."""
    rows = []
    shared = {"benchmark": "tree_step", "task": f"context {context}", "config": config, "seed": context}
    for name, seconds in (("chain", chain), ("tree", tree)):
        low, middle, high = np.percentile(seconds * 1e3, [20, 50, 80])
        row = {"provider": name, "metric": "step", "unit": "ms", "value": f"{middle:.4g}"}
        rows.append(shared | row | {"p20": f"{low:.4g}", "p80": f"{high:.4g}"})
    low, middle, high = np.percentile(tree / chain, [20, 50, 80])
    row = {"provider": "tree", "metric": "step_over_chain", "unit": "ratio", "value": f"{middle:.4g}"}
    rows.append(shared | row | {"p20": f"{low:.4g}", "p80": f"{high:.4g}"})
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Steps with a tree next to steps with a chain.")
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true", help="compile the model (default: eager)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[6, 16, 60])
    parser.add_argument("--context", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--steps", type=int, default=400, help="steps per figure, chains and trees together")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()

    # Everything in this process, so that the clock is around the engine's own step.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    registry.proposers()["Alternating"] = registry.Entry("Alternating", f"{__name__}:Alternating", "this benchmark")

    from replay import write_rows
    from vllm import LLM

    model = {"method": "custom_class", "model": "vllm_specplug.Alternating", "num_speculative_tokens": max(args.nodes)}
    llm = LLM(
        model=str(args.model),
        dtype=args.dtype,
        speculative_config=model,
        enforce_eager=not args.compiled,
        max_model_len=max(args.context) + 256,
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    print(f"{'nodes':>6}{'context':>9}{'chain ms':>10}{'tree ms':>10}{'ratio':>8}{'p20':>8}{'p80':>8}")
    rows = []
    for nodes in args.nodes:
        for context in args.context:
            chain, tree = measure(llm, nodes, context, args.steps)
            mode = "compiled" if args.compiled else "eager"
            config = {"nodes": nodes, "dtype": args.dtype, "mode": mode, "model": args.model.name}
            found = rows_of(chain, tree, context, json.dumps(config))
            rows += found
            numbers = [found[0]["value"], found[1]["value"]]
            ratio = found[2]
            print(
                f"{nodes:>6}{context:>9}{numbers[0]:>10}{numbers[1]:>10}"
                f"{ratio['value']:>8}{ratio['p20']:>8}{ratio['p80']:>8}",
                flush=True,
            )
    write_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
