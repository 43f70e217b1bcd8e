# ruff: noqa: E402 - vLLM is imported once the interpreter is prepared
"""Draft trees in vLLM's V1 engine on its Triton attention, in the interpreter; `test_gpu_trees_engine.py` runs it.

Reports, by scenario, what was generated with and without speculation, and counters. Engines without speculation attend
with vLLM's kernel for CPUs, so equal tokens say that both agree.
"""

from __future__ import annotations

import interpreted

interpreted.prepare()

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tree_proposers
from engines import engine, lifecycle_of, make_tiny_llama, metric, runner_of
from tree_proposers import generate
from vllm import SamplingParams

from vllm_specplug.host import gpu_attention

VOCAB, BLOCK, NODES = 300, 16, 12
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
#: Around the block size, so that trees cross block boundaries; the last ones are prompts of several chunks.
LENGTHS = (5, 13, 15, 16, 47, 60)
LENGTH = 24
SETTINGS = {"skip_tokenizer_init": True, "max_model_len": 256, "num_gpu_blocks_override": 64}


def words(seed: int, count: int) -> dict[str, list[int]]:
    draw = random.Random(seed)
    return {"prompt_token_ids": [draw.randrange(VOCAB) for _ in range(count)]}


PROMPTS = [words(i, n) for i, n in enumerate(LENGTHS)]


def speculating(model: Path, name: str = "Trees", section: dict[str, Any] | None = None, **settings: Any) -> Any:
    """An engine whose trees this plugin attends in vLLM's Triton backend."""
    sections = {"trees": {"vocabulary": VOCAB}} if section is None else section
    chosen = {"method": "custom_class", "model": f"vllm_specplug.{name}", "num_speculative_tokens": NODES}
    options = {"specplug": {"gpu_trees": True, **sections}}
    return engine(model, chosen, additional_config=options, **({"block_size": BLOCK} | SETTINGS | settings))


#: Steps with trees: whose rows all were this plugin's to attend, and beside rows of prompts.
steps: Counter[str] = Counter()


def count_steps() -> None:
    rows = gpu_attention.StepHolder.rows

    def counting(self: Any, plan: Any, starts: Any, count: int) -> Any:
        found = rows(self, plan, starts, count)
        steps["alone" if found[2] else "beside prompts"] += bool(plan.branching)
        return found

    gpu_attention.StepHolder.rows = counting


def facts(llm: Any, found: list[list[int]], want: list[list[int]]) -> dict[str, Any]:
    """What a test asserts on, and the counters from here on are new ones."""
    runner, counters = runner_of(llm), lifecycle_of(llm).counters
    result = {
        "found": found,
        "want": want,
        "reason": runner.drafter.trees.reason,
        "impl": type(next(iter(runner.compilation_config.static_forward_context.values())).impl).__name__,
        "errors": counters.errors + counters.requests_without_drafts + counters.resynchronised,
        "accepted": counters.accepted,
        "steps": dict(steps),
        "trees": runner.drafter.trees.stats(),
    }
    steps.clear()
    runner.drafter.trees.counters = type(runner.drafter.trees.counters)()
    return result


def sampled(llm: Any, truths: list[list[int]] | None = None) -> list[list[int]]:
    """Of half of the prompts, with seeds. Without top_p: vLLM's kernel for it does not run in the interpreter."""
    params = [
        SamplingParams(
            temperature=0.7,
            seed=i,
            max_tokens=LENGTH // 2,
            ignore_eos=True,
            extra_args={"seed": i, "truth": truths[i] if truths else []},
        )
        for i in range(3)
    ]
    return [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS[3:], params, use_tqdm=False)]


def plain(model: Path) -> dict[str, list[list[int]]]:
    with engine(model, **SETTINGS) as llm:
        return {"greedy": generate(llm, PROMPTS, LENGTH), "sampled": sampled(llm)}


def usual(model: Path, want: dict[str, list[list[int]]]) -> dict[str, Any]:
    """Prompts that arrive, in chunks, while others verify; then prompts whose blocks held trees; then samples."""
    found = {}
    # Three requests at once, so that one's prompt comes when others have drafts.
    with speculating(model, max_num_seqs=3, max_num_batched_tokens=80) as llm:
        greedy = want["greedy"]
        found["mixed batches"] = facts(llm, generate(llm, PROMPTS, LENGTH, greedy), greedy)
        hits, cut = metric(llm, "vllm:prefix_cache_hits"), LENGTH - 6
        longer = [{"prompt_token_ids": p["prompt_token_ids"] + o[:cut]} for p, o in zip(PROMPTS, greedy, strict=True)]
        rest = [o[cut:] for o in greedy]
        found["prefix hits"] = facts(llm, generate(llm, longer, LENGTH - cut, rest), rest)
        found["prefix hits"]["hits"] = metric(llm, "vllm:prefix_cache_hits") - hits
        found["sampled"] = facts(llm, sampled(llm, want["sampled"]), want["sampled"])
    return found


def tight(model: Path, want: dict[str, list[list[int]]]) -> dict[str, Any]:
    """So few KV blocks that requests are preempted between draft and verification."""
    greedy = want["greedy"][2:5]
    with speculating(model, max_num_seqs=3, num_gpu_blocks_override=9, max_model_len=112) as llm:
        found = facts(llm, generate(llm, PROMPTS[2:5], LENGTH, greedy), greedy)
        return {"preemption": found | {"preemptions": metric(llm, "vllm:num_preemptions")}}


def window(path: Path) -> dict[str, Any]:
    """A sliding window shorter than the contexts."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    other = {"sliding_window": 20, "bos_token_id": None, "eos_token_id": None, "vocab_size": VOCAB}
    model = MistralForCausalLM(MistralConfig(**SIZES, **other, max_position_embeddings=256))
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, 0.3)
    model.save_pretrained(path)
    prompts = PROMPTS[1:5:3]
    with engine(path, **SETTINGS) as llm:
        want = generate(llm, prompts, LENGTH)
    with speculating(path) as llm:
        found = facts(llm, generate(llm, prompts, LENGTH, want), want)
        impls = [layer.impl for layer in runner_of(llm).compilation_config.static_forward_context.values()]
        return {"window": found | {"windows": [gpu_attention.window_of(impl) for impl in impls]}}


def proposers(model: Path, want: dict[str, list[list[int]]]) -> dict[str, Any]:
    """Token Recycling and Auto, which draft from what the engine reports of every row."""
    found = {}
    for name, section in (
        ("TokenRecycling", {"token_recycling": {}}),
        ("Auto", {"auto": {"policy": "fixed", "length": NODES, "pause": False, "start_probe": False}}),
    ):
        with speculating(model, name, section) as llm:
            found[name] = facts(llm, generate(llm, PROMPTS[:2], LENGTH), want["greedy"][:2])
    return found


def main() -> None:
    interpreted.gpu_trees()
    tree_proposers.register()
    count_steps()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_llama(Path(folder) / "llama", VOCAB, **SIZES)
        want = plain(model)
        found: dict[str, Any] = {}
        scenarios: dict[str, Callable[[], dict[str, Any]]] = {
            "usual": lambda: usual(model, want),
            "tight": lambda: tight(model, want),
            "window": lambda: window(Path(folder) / "mistral"),
            "proposers": lambda: proposers(model, want),
        }
        for name in sys.argv[1:]:
            found |= scenarios[name]()
    interpreted.report(found)


if __name__ == "__main__":
    main()
