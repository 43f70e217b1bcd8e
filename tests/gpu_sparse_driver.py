# ruff: noqa: E402 - vLLM is imported once the interpreter is prepared
"""SparseVerify in vLLM's V1 engine on its Triton attention, in the interpreter; `test_gpu_sparse_engine.py` runs it.

One engine: few KV blocks, prompts in chunks, the prefix cache on, an exact refresh every few tokens. Every layer of
every step with sparse requests is computed again in PyTorch from the KV cache, by the definitions.
"""

from __future__ import annotations

import interpreted

interpreted.prepare()

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tree_proposers
from engines import engine, lifecycle_of, make_tiny_llama, metric, runner_of
from gpu_trees_driver import NODES, SETTINGS, SIZES, VOCAB, speculating, words
from tree_proposers import generate
from vllm import SamplingParams
from vllm_specplug.kernels.block_select import choose_reference, summarise, votes_reference
from vllm_specplug.kernels.sparse_attention import sparse_attention_reference
from vllm_specplug.kernels.tree_attention import build_trees

from vllm_specplug.host import gpu_attention, gpu_sparse

BLOCK, UNIT, LENGTH = 32, 16, 18
#: Blocks end some tokens after the prompts do, so what drafts wrote and moved is summarised soon.
PROMPTS = [words(i, n) for i, n in enumerate((86, 118, 120, 148))]
SPARSE = {
    "inner": "Trees",
    "policy": "fixed",
    "length": NODES,
    "dense_below": 32,
    "ratio": 0.7,
    "unit": UNIT,
    "first": UNIT,
    "last": 0,
    "refresh": 11,
    "start_probe": False,
    "pause": False,
}

#: What was compared with the definitions, and how far off it was.
seen: Counter[str] = Counter()
worst = {"output": 0.0, "summary": 0.0}


class Watch:
    """Computes again what a layer attends."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.chosen: dict[int, list[np.ndarray]] = {}

    def __call__(self, impl: Any, query: torch.Tensor, cache: torch.Tensor, step: Any, out: torch.Tensor) -> None:
        plan = runner_plan()
        group = self.attention.groups[0]
        selection, (index, anchor) = group.sums.selection, impl.layer
        keys, values = gpu_attention.split_cache(cache, impl.head_size)
        starts, lengths = step.starts.tolist(), step.lengths.tolist()
        sparse = dict(zip(plan.trees.requests.tolist(), plan.sparse.tolist(), strict=True))
        sizes, places, contexts, chosen, parents = [], [], [], [], []
        for i, length in enumerate(lengths):
            size = starts[i + 1] - starts[i]
            if not 0 < size <= NODES + 1:
                continue
            context = length - size
            sizes.append(size)
            places.append(i)
            contexts.append(context)
            bits = step.bits[starts[i] : starts[i] + size, 0].tolist()
            parents += [max((j for j in range(m) if word >> j & 1), default=-1) for m, word in enumerate(bits)]
            if not sparse.get(i):
                chosen.append(None)
                continue
            tail = selection.tail_block(context, BLOCK) * BLOCK
            if anchor:
                self.choose(group, index, i, context, tail, keys, step, query[starts[i] : starts[i] + size], impl.scale)
            chosen.append((tail, self.chosen[i]))
            attended = [len(units) for units in self.chosen[i]]
            seen["choices"] += 1
            seen["left out"] += max(attended) < tail // UNIT
            seen["uneven"] += len(set(attended)) > 1
            seen["taken over"] += not anchor
        trees = build_trees(
            *(np.array(x, np.int32) for x in ([starts[i] for i in places], sizes, contexts, places, parents))
        )
        wanted = torch.zeros_like(out)
        sparse_attention_reference(query, keys, values, step.table, trees, wanted, impl.scale, UNIT, chosen)
        for i, size in zip(places, sizes, strict=True):
            rows = slice(starts[i], starts[i] + size)
            worst["output"] = max(worst["output"], float((wanted[rows] - out[rows]).abs().max()))
        seen["layers"] += 1

    def choose(self, group, index, i, context, tail, keys, step, query, scale):  # type: ignore[no-untyped-def]
        """What the definitions say a request attends in a layer; compares the summaries on the way."""
        selection, slots = group.sums.selection, torch.arange(tail)
        blocks = step.table[i].long()[slots // BLOCK]
        units = keys[blocks, slots % BLOCK].unflatten(0, (-1, UNIT)).permute(2, 0, 1, 3)
        sums = summarise(units, selection.summary)
        at = torch.arange(tail // UNIT)
        kept = group.sums.layers[index][step.table[i].long()[at * UNIT // BLOCK], at % (BLOCK // UNIT)]
        worst["summary"] = max(worst["summary"], float((kept.transpose(0, 1) - sums).abs().max()))
        votes = votes_reference(query if selection.all_rows else query[:1], sums, scale, selection.by_head)
        counts = selection.counts(context, BLOCK, group.shares(context)[index])
        self.chosen[i] = choose_reference(votes, counts, -(-selection.first // UNIT))
        found = step.choice._sums.chosen[i].tolist()
        same = [row[: len(w)] == w.tolist() for row, w in zip(found, self.chosen[i], strict=True)]
        seen["other choices"] += not all(same)


def runner_plan() -> Any:
    return runner_of(running[0]).drafter.trees.plan


running: list[Any] = []


def watch(attention: Any) -> None:
    check, forward = Watch(attention), gpu_attention.TreeImplMixin.forward

    def watched(
        self: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, **others: Any
    ) -> Any:
        result = forward(self, layer, query, key, value, cache, metadata, **others)
        step = getattr(metadata, "specplug_step", None)
        if step is not None and step.choice is not None:
            check(self, query, cache, step, others["output"])
        return result

    gpu_attention.TreeImplMixin.forward = watched


def facts(llm: Any, found: list[list[int]]) -> dict[str, Any]:
    """What a test asserts on; the counts from here on are new ones."""
    runner, counters = runner_of(llm), lifecycle_of(llm).counters
    attention = runner.drafter.sparse.attention
    result = {
        "found": found,
        "reason": runner.drafter.trees.reason or attention.reason,
        "errors": counters.errors + counters.requests_without_drafts,
        "seen": dict(seen),
        "worst": dict(worst),
        "sparse": attention.stats(),
        "rows_moved": runner.drafter.trees.counters.rows_moved,
        "preemptions": metric(llm, "vllm:num_preemptions"),
        "hits": metric(llm, "vllm:prefix_cache_hits"),
        "refreshes": llm.llm_engine.engine_core.engine_core.scheduler.refreshes,
        "live": len(attention.groups[0].sums.book),
    }
    seen.clear()
    worst.update(output=0.0, summary=0.0)
    runner.drafter.trees.counters.rows_moved = 0
    return result


def main() -> None:
    interpreted.gpu_trees()
    tree_proposers.register()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_llama(Path(folder) / "llama", VOCAB, **SIZES)
        with engine(model, **SETTINGS) as llm:
            want = generate(llm, PROMPTS, LENGTH)
        section = {"trees": {"vocabulary": VOCAB}, "sparse_verify": SPARSE}
        tight = {"block_size": BLOCK, "max_num_seqs": 3, "max_num_batched_tokens": 100, "num_gpu_blocks_override": 12}
        with speculating(model, "SparseVerify", section, **tight) as llm:
            running.append(llm)
            scenarios(llm, want, found)
    interpreted.report(found | {"want": want})


def scenarios(llm: Any, want: list[list[int]], found: dict[str, Any]) -> None:
    attention = runner_of(llm).drafter.sparse.attention
    (group,) = attention.groups
    kept, scheduler = attention.selection, llm.llm_engine.engine_core.engine_core.scheduler
    watch(attention)

    # Contexts below the threshold.
    attention.selection = dataclasses.replace(kept, dense_below=10_000)
    found["short"] = facts(llm, generate(llm, PROMPTS[:2], 8, want))
    attention.selection = kept

    # Every unit chosen, by count.
    every, scheduler._every = scheduler._every, 0
    group.sums.selection = dataclasses.replace(kept, ratio=1.0)
    choices = gpu_sparse.DeviceChoice.__init__

    def never_dense(self: Any, *args: Any) -> None:
        choices(self, *args[:-1], np.zeros_like(args[-1]))

    gpu_sparse.DeviceChoice.__init__ = never_dense
    found["everything"] = facts(llm, generate(llm, PROMPTS[:3], 12, want))
    gpu_sparse.DeviceChoice.__init__ = choices
    group.sums.selection, scheduler._every = kept, every

    # A part of the context; one request asks for the exact model.
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=LENGTH,
            ignore_eos=True,
            extra_args={"specplug": "off"} if i == 1 else {"seed": i, "truth": want[i]},
        )
        for i in range(len(PROMPTS))
    ]
    outputs = [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, params, use_tqdm=False)]
    found["sparse"] = facts(llm, outputs)

    # Heads of their own, with budgets of their own, and a layer that takes over what the one before it chose.
    group.sums.selection = dataclasses.replace(kept, by_head=True, all_rows=False, ratio=0.3)
    group._even = np.array([[0.6, 1.6], [1.0, 1.0]], np.float32)
    layers = runner_of(llm).compilation_config.static_forward_context.values()
    for layer in layers:
        if layer.impl.layer[0] == 1:
            layer.impl.layer = (1, False)
    found["heads"] = facts(llm, generate(llm, PROMPTS[1:3], 8, want[1:3]))

    generate(llm, [{"prompt_token_ids": [1, 2, 3]}], 2)  # vLLM reports ends with the next step
    found["end"] = facts(llm, [])


if __name__ == "__main__":
    main()
