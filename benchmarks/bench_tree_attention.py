"""Attention of a draft tree beside vLLM's own kernel on a chain of as many rows, on the CPU and in one run.

    python benchmarks/bench_tree_attention.py [--threads 1] [--repeats 20] [--csv benchmarks/results/tree_attention.csv]

One request with a context of ``ctx`` tokens and a draft of ``rows`` rows, its last token included, in a cache of
SmolLM2-135M's shape: 30 layers, 9 heads on 3 KV heads of 64, blocks of 128. `layer` is one layer's call repeated, its
cache near; `layers` is one call on each of 30 layers, as in a step. Both include the Python around a call: the split
of the cache into keys and values, which vLLM's backend makes too. The kernels alternate call by call, so that a noisy
machine disturbs both alike; figures are medians (p20, p80) over repeats, ratios those of the repeats' tree / chain.

What a step pays once is timed apart: `plan` describes and validates the trees, `move` moves three accepted rows in 30
layers; vLLM plans its chains too (`plan`, chain).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from replay import write_rows
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm_specplug.kernels.tree_attention import build_trees
from vllm_specplug.kernels.tree_attention_cpu import (
    move_rows,
    prepare_caches,
    prepare_step,
    probe_layout,
    tree_attention_cpu,
)

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 30, 9, 3, 64, 128
CONTEXTS = (64, 320, 1024, 4096)
ROWS = (4, 7, 17, 61)
SCALE = HEAD_SIZE**-0.5

Call = Callable[[], Any]


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def workload(dtype: torch.dtype, context: int, rows: int) -> dict[str, tuple[Call, Call]]:
    """Metric: (tree, chain), each to be called without arguments."""
    isa = _get_attn_isa(dtype, BLOCK_SIZE, HEAD_SIZE)
    layout = probe_layout(lambda *args: ops.cpu_attn_reshape_and_cache(*args, isa), dtype, BLOCK_SIZE, HEAD_SIZE)
    total = context + rows
    blocks = -(-total // BLOCK_SIZE)
    torch.manual_seed(0)
    caches = [torch.randn(blocks, KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE).to(dtype) for _ in range(LAYERS)]
    # As where one product makes query, key and value.
    mixed = torch.randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_SIZE).to(dtype)
    query = mixed[:, : HEADS * HEAD_SIZE].view(rows, HEADS, HEAD_SIZE)
    out = torch.zeros(rows, HEADS, HEAD_SIZE, dtype=dtype)
    table = torch.arange(blocks, dtype=torch.int32)[None]
    starts, lengths = torch.tensor([0, rows], dtype=torch.int32), torch.tensor([total], dtype=torch.int32)
    # Every row but the root hangs below the one half as far along, so each has two children.
    described = (int32(0), int32(rows), int32(context), int32(0), int32(-1, *((m - 1) // 2 for m in range(1, rows))))

    def plan_chain() -> torch.Tensor:
        sizes = (1, HEADS, KV_HEADS, HEAD_SIZE)
        return ops.cpu_attn_get_scheduler_metadata(*sizes, lengths, dtype, starts, True, -1, isa, True)

    def plan_tree() -> Any:
        return prepare_step(build_trees(*described), table, layout)

    scheduled, step = plan_chain(), plan_tree()

    def chain(cache: torch.Tensor) -> None:
        keys, values = cache.chunk(2, dim=2)
        where = (query, keys, values, out, starts, lengths)
        ops.cpu_attention_with_kv_cache(*where, SCALE, True, None, -1, table, 0, scheduled, None)

    def tree(cache: torch.Tensor) -> None:
        keys, values = cache.chunk(2, dim=2)
        tree_attention_cpu(query, keys, values, table, step.trees, out, SCALE, -1, layout, step)

    mover = prepare_caches([tuple(cache.chunk(2, dim=2)) for cache in caches], layout)
    sources = np.array([2, 3, 3][: rows - 1]) + context
    targets = np.array([1, 2, 3][: rows - 1]) + context
    return {
        "layer": (lambda: tree(caches[0]), lambda: chain(caches[0])),
        "layers": (lambda: [tree(cache) for cache in caches], lambda: [chain(cache) for cache in caches]),
        "plan": (plan_tree, plan_chain),
        "move": (lambda: move_rows(mover, sources, targets), lambda: None),
    }


def alternate(calls: tuple[Call, ...], repeats: int, times: int) -> np.ndarray:
    """Microseconds per call, ``[len(calls), repeats]``; a repeat is the median of ``times`` calls of each."""
    seconds = np.zeros((len(calls), repeats, times))
    for call in calls:
        call()
    for repeat, time_ in np.ndindex(repeats, times):
        # Each call comes right after the other one, so that neither finds the caches warmer.
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            seconds[i, repeat, time_] = time.perf_counter() - start
    return np.median(seconds, axis=2) * 1e6


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Attention of draft trees beside vLLM's kernel on chains.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows_out: list[dict[str, Any]] = []
    config = str({"threads": args.threads, "layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "size": HEAD_SIZE})
    print(f"{'':<10}{'ctx':>5}{'rows':>5}  {'metric':<8}{'tree us':>28}{'chain us':>28}{'tree / chain':>24}")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for context in CONTEXTS:
            for rows in ROWS:
                for metric, calls in workload(dtype, context, rows).items():
                    times = alternate(calls, args.repeats, 5 if metric in ("layers", "move") else 30)
                    columns = {("tree", "us/call"): times[0], ("chain", "us/call"): times[1]}
                    if metric in ("layer", "layers"):
                        columns["tree / chain", "ratio"] = times[0] / times[1]
                    elif metric == "move":
                        columns.pop(("chain", "us/call"))
                    cells = []
                    for (provider, unit), values in columns.items():
                        p20, mid, p80 = np.percentile(values, (20, 50, 80))
                        cells.append(f"{mid:.4g} ({p20:.4g}, {p80:.4g})")
                        row = {"benchmark": "tree_attention", "provider": provider, "metric": metric, "unit": unit}
                        figures = {"value": f"{mid:.4g}", "p20": f"{p20:.4g}", "p80": f"{p80:.4g}"}
                        task = f"{name} ctx {context} rows {rows}"
                        rows_out.append({**row, **figures, "task": task, "seed": 0, "config": config})
                    cells += [""] * (3 - len(cells))
                    print(
                        f"{name:<10}{context:>5}{rows:>5}  {metric:<8}{cells[0]:>28}{cells[1]:>28}{cells[2]:>24}",
                        flush=True,
                    )
    if args.csv:
        write_rows(args.csv, rows_out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
