"""What samples of one prompt (`n > 1`) gain by drafting from each other, in the real engine.

    python benchmarks/bench_siblings.py --model .models/smollm2-135m --prompts WORKLOAD.jsonl [--n 8] [--csv FILE]

WORKLOAD is JSON lines as in Spec-Bench: ``category`` and ``turns``; only the first turns of ``--task`` are used. The
same prompts and seeds are sampled with ``siblings`` on and off, one request of ``n`` samples at a time, everything else
equal and started afresh. MAT = tokens emitted per verify step and sample, each sample's first token left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from replay import write_rows


def counters(llm: Any) -> dict[str, float]:
    """The plugin's totals inside an in-process engine."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.drafter.lifecycle.stats()  # type: ignore[no-any-return]


def run(args: argparse.Namespace, prompts: list[str], siblings: bool) -> dict[str, float]:
    """MAT, drafts per step and tokens per second of one engine."""
    from vllm import LLM, SamplingParams

    section = args.proposer.rpartition(".")[2].lower()
    settings: dict[str, Any] = {"siblings": siblings}
    if args.min_prob is not None:
        settings["min_prob"] = args.min_prob
    llm = LLM(
        model=args.model,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=args.n,
        enforce_eager=True,
        seed=0,
        speculative_config={
            "method": "custom_class",
            "model": args.proposer,
            "num_speculative_tokens": args.spec_tokens,
        },
        additional_config={"specplug": {section: settings}},
    )
    tokenizer = llm.get_tokenizer()
    emitted = 0
    start = time.perf_counter()
    for number, prompt in enumerate(prompts):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        params = SamplingParams(n=args.n, temperature=args.temperature, max_tokens=args.max_tokens, seed=number)
        ids = {"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
        emitted += sum(len(o.token_ids) for o in llm.generate([ids], params, use_tqdm=False)[0].outputs)
    seconds = time.perf_counter() - start
    total = counters(llm)
    steps = total["emitted"] - total["accepted"] - total["requests"]
    return {
        "mat": (total["emitted"] - total["requests"]) / steps,
        "drafts": total["verified"] / steps,
        "rate": emitted / seconds,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Samples of one prompt that draft from each other.")
    parser.add_argument("--model", default=".models/smollm2-135m")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--task", default="math_reasoning")
    parser.add_argument("--count", type=int, default=16, help="prompts")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--proposer", default="vllm_specplug.Auto")
    parser.add_argument("--spec-tokens", type=int, default=8)
    parser.add_argument("--min-prob", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

    lines = (json.loads(line) for line in args.prompts.open())
    prompts = [d["turns"][0] for d in lines if d["category"] == args.task]
    if not prompts:
        print(f"error: {args.prompts} has no prompt of category {args.task!r}", file=sys.stderr)
        return 2
    prompts = random.Random(args.seed).sample(prompts, min(args.count, len(prompts)))
    results = {siblings: run(args, prompts, siblings) for siblings in (False, True)}
    config = {k: v for k, v in vars(args).items() if k not in ("csv", "model", "prompts")}
    config |= {"model": Path(args.model).name, "count": len(prompts)}
    rows = []
    print(f"{'siblings':<10}{'MAT':>7}{'drafts':>8}{'tok/s':>8}")
    for siblings, values in results.items():
        print(f"{siblings!s:<10}{values['mat']:>7.3f}{values['drafts']:>8.2f}{values['rate']:>8.1f}")
        units = {"mat": "tokens/step", "drafts": "nodes/step", "rate": "tokens/s"}
        rows += [
            {
                "benchmark": "siblings",
                "provider": f"{args.proposer.rpartition('.')[2]}, {'shared' if siblings else 'apart'}",
                "task": args.task,
                "metric": metric,
                "unit": units[metric],
                "value": f"{value:.5g}",
                "seed": args.seed,
                "config": json.dumps(config),
            }
            for metric, value in values.items()
        ]
    ratio = results[True]["mat"] / results[False]["mat"]
    print(f"MAT with siblings / without: {ratio:.3f}")
    if args.csv:
        write_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
