"""Time of sparse attention: a verify step of vLLM's CPU engine, and what each kind of reuse saves in its attention.

    python benchmarks/bench_sparse_attention.py [--model PATH] [--dtype bfloat16] [--context 4096 8000] [--drafts 7 15]
        [--steps 120] [--options JSON] [--csv benchmarks/results/sparse_attention.csv]

*step*: one engine, one request; its drafts are always wrong, so that steps differ in nothing but how they attend, by
turns: ``vllm`` (vLLM's kernel), ``dense`` (this plugin's, over everything), ``sparse`` (SparseVerify's options, every
layer choosing), ``anchors`` (only the calibration's anchors choose). A step is the engine's whole step. Figures:
medians, and the median of the ratios to the ``vllm`` step of the same turn.

*layers*: attention of 30 layers like the model's alone, caches cold, by which rows and layers choose for themselves:
the table of what inter-token and inter-layer reuse save.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from replay import write_rows
from vllm_specplug.kernels.block_select import Selection
from vllm_specplug.kernels.kv_cache_cpu import CacheLayout
from vllm_specplug.kernels.sparse_attention_cpu import UnitSummaries, prepare_choice
from vllm_specplug.kernels.tree_attention import build_trees
from vllm_specplug.kernels.tree_attention_cpu import prepare_caches, prepare_step, tree_attention_cpu
from vllm_specplug.proposers.base import DraftForest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "sparse_attention.csv"
MODES = ("vllm", "dense", "sparse", "anchors")
HEADS, KV_HEADS, HEAD_SIZE, LAYERS, BLOCK = 9, 3, 64, 30, 128


def start(args: argparse.Namespace) -> Any:
    """An engine with SparseVerify in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    options = {"policy": "fixed", "length": 0, "start_probe": False, **json.loads(args.options)}
    return LLM(
        str(args.model),
        dtype=args.dtype,
        max_model_len=8192,
        max_num_seqs=1,
        enforce_eager=not args.compiled,
        seed=0,
        speculative_config={
            "method": "custom_class",
            "model": "vllm_specplug.SparseVerify",
            "num_speculative_tokens": max(args.drafts),
        },
        additional_config={"specplug": {"attention": "vllm", "sparse_verify": options}},
    )


class Switch:
    """Makes the coming step attend in one of `MODES`, and draft ``drafts`` tokens nobody expects."""

    def __init__(self, llm: Any) -> None:
        self.runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        drafter = self.runner.drafter
        if drafter.trees.reason:
            raise SystemExit(f"attention cannot be sparse here: {drafter.trees.reason}")
        self.attention = drafter.sparse.attention
        self.mode, self.drafts = MODES[0], 0
        self.counters = drafter.lifecycle.counters
        (group,) = self.attention.groups
        own_rows, own_prepare = self.attention.rows, group.prepare
        self.attention.rows = lambda *args: None if self.mode == "vllm" else own_rows(*args)
        group.prepare = lambda *args: None if self.mode == "dense" else own_prepare(*args)
        layers = self.runner.compilation_config.static_forward_context.values()
        self.impls = [layer.impl for layer in layers if hasattr(layer, "impl")]
        self.anchors = [impl.layer[1] for impl in self.impls]
        drafter.lifecycle.proposer.propose = self.propose

    def set(self, mode: str) -> None:
        self.mode = mode
        for impl, anchor in zip(self.impls, self.anchors, strict=True):
            impl.layer = (impl.layer[0], anchor or mode != "anchors")

    def propose(self, slots: Any, limits: Any) -> DraftForest:
        size = int(min(self.drafts, limits[0]))
        tokens = np.arange(40000, 40000 + size, dtype=np.int32)
        probs, sources = np.full(size, 0.5, np.float32), np.zeros(size, np.int8)
        parents = np.arange(-1, size - 1, dtype=np.int32)
        return DraftForest(tokens, parents, probs, sources, np.array([0, size], np.int32))


def steps_of(llm: Any, switch: Switch, drafts: int, context: int, steps: int) -> dict[str, np.ndarray]:
    """Seconds of steps by mode, arrays of one length, a turn each."""
    from vllm import SamplingParams

    switch.drafts = drafts
    accepted = switch.counters.accepted
    draw = np.random.default_rng(context)
    length = steps * len(MODES)
    prompt = {"prompt_token_ids": draw.integers(1000, 20000, size=context - length // 2).tolist()}
    params = SamplingParams(temperature=0.0, max_tokens=length + drafts + 12, ignore_eos=True)
    llm.llm_engine.add_request(f"{drafts}-{context}", prompt, params)
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    number = 0
    while llm.llm_engine.has_unfinished_requests():
        # The first steps are the prompt's, the last ones have room for a part of the draft only.
        mode = MODES[number % len(MODES)]
        switch.set(mode)
        before = switch.runner.input_batch.num_computed_tokens_cpu[0] if switch.runner.input_batch.num_reqs else 0
        begun = time.perf_counter()
        llm.llm_engine.step()
        seconds = time.perf_counter() - begun
        if before >= len(prompt["prompt_token_ids"]):
            found[mode].append(seconds)
        number += 1
    if switch.counters.accepted != accepted:
        raise SystemExit("a draft was accepted: steps differ in more than how they attend")
    return {mode: np.array(times[2 : steps + 2]) for mode, times in found.items()}


@dataclass(frozen=True)
class Layers:
    """Caches of `LAYERS` layers with one request of ``context`` tokens, and a step of ``rows`` rows over them."""

    context: int
    rows: int

    def measure(self, selection: Selection, dtype: torch.dtype, every: int, rounds: int) -> dict[str, np.ndarray]:
        """Seconds of all layers by what chooses for itself."""
        torch.manual_seed(0)
        slots = np.arange(BLOCK * HEAD_SIZE, dtype=np.int32)
        layout = CacheLayout(dtype, slots.reshape(HEAD_SIZE, BLOCK).T.copy(), slots.reshape(BLOCK, HEAD_SIZE))
        blocks = -(-(self.context + self.rows) // BLOCK)
        pairs = []
        for _ in range(LAYERS):
            cache = torch.randn(blocks, KV_HEADS, BLOCK * 2, HEAD_SIZE).to(dtype)
            pairs.append(tuple(cache.chunk(2, dim=2)))
        table = torch.randperm(blocks, dtype=torch.int32)[None]
        sums = UnitSummaries(prepare_caches(pairs, layout), selection)
        entry = sums.update("a", table[0].numpy(), self.context)
        one, n = np.ones(1, np.int32), self.rows
        together = build_trees(one - 1, one * n, one * self.context, one - 1, np.arange(-1, n - 1, dtype=np.int32))
        # Rows that choose for themselves: a tree of one row each, which also attends the rows before it.
        of = np.zeros(n, np.int32)
        own = np.arange(n, dtype=np.int32)
        apart = build_trees(own, of + 1, of + self.context + own, of, of - 1)
        query = torch.randn(n, HEADS, HEAD_SIZE).to(dtype)
        out = torch.empty_like(query)
        shares = np.ones((LAYERS, KV_HEADS), np.float32)
        evict = torch.zeros(16 << 20)

        def run(trees: Any, sparse: bool, anchors: int) -> float:
            evict.add_(1)
            begun = time.perf_counter()
            step = prepare_step(trees, table, layout)
            entries = [entry] * len(trees.starts)
            choice = prepare_choice(step, selection, entries, [shares] * len(entries)) if sparse else None
            for i, (keys, values) in enumerate(pairs):
                chosen = None if choice is None else choice.layer(i, i % anchors == 0)
                args = (query, keys, values, table, trees, out, HEAD_SIZE**-0.5, -1, layout, step, chosen)
                tree_attention_cpu(*args)
            return time.perf_counter() - begun

        cases = {
            "everything attended": (together, False, 1),
            "each row and each layer choose": (apart, True, 1),
            "rows reuse, each layer chooses": (together, True, 1),
            f"each row chooses, every {every}th layer": (apart, True, every),
            f"rows reuse, every {every}th layer chooses": (together, True, every),
        }
        found: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds + 2):
            for name, case in cases.items():
                found[name].append(run(*case))
        return {name: np.array(times[2:]) for name, times in found.items()}


def rows_for(times: dict[str, np.ndarray], task: str, metric: str, config: str) -> list[dict[str, Any]]:
    """Rows for the CSV file; the first of ``times`` is what the others are compared with."""
    base = next(iter(times.values()))
    rows = []
    for name, seconds in times.items():
        for what, unit, values in ((metric, "ms", seconds * 1e3), (f"{metric}_over_dense", "ratio", seconds / base)):
            low, middle, high = np.percentile(values, [20, 50, 80])
            row = {"benchmark": "sparse_attention", "provider": name, "task": task, "metric": what, "unit": unit}
            rows.append(row | {"value": f"{middle:.4g}", "p20": f"{low:.4g}", "p80": f"{high:.4g}"})
            rows[-1] |= {"config": config, "seed": 0}
        print(f"{task:28s} {name:44s} {np.median(seconds) * 1e3:8.2f} ms {np.median(seconds / base):7.3f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 8000])
    parser.add_argument("--drafts", type=int, nargs="+", default=[7, 15])
    parser.add_argument("--steps", type=int, default=40, help="of each mode")
    parser.add_argument("--every", type=int, default=3, help="layers of which one chooses, in the table of reuse")
    parser.add_argument("--options", default="{}", help="SparseVerify's, as JSON")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--no-step", action="store_true", help="attention alone")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    from vllm_specplug.proposers.sparse_verify import SparseVerifyOptions

    selection = SparseVerifyOptions(**json.loads(args.options)).selection()
    mode = "compiled" if args.compiled else "eager"
    config = {"dtype": args.dtype, "mode": mode, "options": json.loads(args.options), "threads": 1}
    rows = []
    torch.set_num_threads(1)
    for context in args.context:
        for drafts in args.drafts:
            times = Layers(context, drafts + 1).measure(selection, getattr(torch, args.dtype), args.every, 15)
            task = f"context {context} rows {drafts + 1}"
            rows += rows_for(times, task, "layers", json.dumps(config))
    if not args.no_step:
        llm = start(args)
        switch = Switch(llm)
        for context in args.context:
            for drafts in args.drafts:
                times = steps_of(llm, switch, drafts, context, args.steps)
                task = f"context {context} drafts {drafts}"
                rows += rows_for(times, task, "step", json.dumps(config))
    write_rows(args.csv, rows)


if __name__ == "__main__":
    main()
