"""Fidelity of sparse verification in vLLM's engine, on long prompts, against exact verification of the same engine.

    python benchmarks/bench_sparse_verify.py [--model PATH] [--tokens 4096] [--prompts 64] [--output 64] [--rows 8]
        [--dtype bfloat16] [--settings NAME=JSON ...] [--csv benchmarks/results/sparse_verify.csv]

Per prompt (`long_prompts.py`: summarise, question answering, code): the exact engine writes ``--output`` greedy tokens.
*Forced*: the same tokens are drafted and accepted whatever the verified logits say, ``--rows`` rows per step, all of
whose K/V stays; counted is how often the likeliest token of a row is not the text's, and the divergence from the exact
distribution of that row. That is harder than serving, where rows far from the last accepted token are mostly rejected.
*Free*: the engine drafts and verifies as it would, exactly and sparsely; counted are equal tokens, the first difference
and tokens per step. One engine, its prefix cache on, so that each prompt is computed once; prompts are always exact.
``--settings`` are SparseVerify's options, named; all run on every prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "sparse_verify.csv"


class Bench:
    """One engine whose verification is switched between prompts.

    Attributes:
        forced: the text to be accepted, or None.
    """

    def __init__(self, args: argparse.Namespace, settings: dict[str, dict[str, Any]]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        first = next(iter(settings.values()))
        self.llm = LLM(
            str(args.model),
            dtype=args.dtype,
            max_model_len=args.tokens + args.output + args.drafts + 1,
            max_num_seqs=1,
            enforce_eager=True,
            seed=0,
            speculative_config={
                "method": "custom_class",
                "model": "vllm_specplug.SparseVerify",
                "num_speculative_tokens": args.drafts,
            },
            additional_config={"specplug": {"attention": "vllm", "sparse_verify": {"ratio": 0.999, **first}}},
        )
        self.runner = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.drafter = self.runner.drafter
        if self.drafter.trees.reason:
            raise SystemExit(f"attention cannot be sparse here: {self.drafter.trees.reason}")
        self.rows = args.rows
        self.forced: list[int] | None = None
        self.exact: list[torch.Tensor] = []
        self.seen: list[torch.Tensor] = []
        self._at = 0
        self.forget()
        self._verify = self.drafter.verify
        self.drafter.verify = self.verify

    def use(self, options: dict[str, Any] | None) -> None:
        """Verify by these options of SparseVerify from now on; None: exactly."""
        from vllm_specplug.proposers.sparse_verify import SparseVerifyOptions

        from vllm_specplug.host.sparse_attention import SparseAttention
        from vllm_specplug.options import parse

        sparse, backend = self.drafter.sparse, self.drafter.trees.backend
        chosen = parse(SparseVerifyOptions, {} if options is None else options, "--settings")
        from vllm_specplug.host import sparse_calibration

        found = sparse_calibration.load(chosen.calibration, self.llm.llm_engine.model_config.model) or {}
        attention = SparseAttention(chosen, found.get("attention"), (lambda _: True) if options else (lambda _: False))
        sparse.attention = self.drafter.trees._sparse = backend._sparse = attention
        reason = backend.attach(self.runner)
        assert not reason, reason

    def propose(self, slots: Any, limits: Any) -> Any:
        from vllm_specplug.proposers.base import DraftForest

        if self.forced is None:
            return self._propose(slots, limits)
        tokens = np.array(self.forced[self._at : self._at + self.rows - 1], np.int32)[: int(limits[0])]
        size = len(tokens)
        parents = np.arange(-1, size - 1, dtype=np.int32)
        probs, sources = np.full(size, 0.99, np.float32), np.zeros(size, np.int8)
        return DraftForest(tokens, parents, probs, sources, np.array([0, size], np.int32))

    def verify(self, runner: Any, logits: Any, metadata: Any, original: Any) -> Any:
        if self.forced is not None:
            self.seen.append(logits.float().clone())
            wanted = self.forced[self._at : self._at + len(logits)]
            logits.fill_(-1e4)
            logits[torch.arange(len(wanted)), torch.tensor(wanted)] = 1e4
            self._at += len(wanted)
        return self._verify(runner, logits, metadata, original)

    def forget(self) -> None:
        """Let a new proposer draft, which has learned nothing: not even from the same text."""
        from vllm_specplug import registry

        # vLLM reports the last request's end with the next step only.
        self.drafter.lifecycle.end(list(self.drafter.lifecycle._slots.of))
        user = registry.parse_options(self.runner.vllm_config.additional_config)
        proposer = user.build(registry.find("SparseVerify"))
        self._propose = proposer.propose
        proposer.propose = self.propose
        self.drafter.lifecycle.proposer = proposer

    def generate(self, prompt: list[int], count: int, text: list[int] | None = None) -> tuple[list[int], int]:
        """Greedy output and steps. With ``text``: it is accepted, and the logits of its rows are in `seen`."""
        from vllm import SamplingParams

        self.forced, self._at, self.seen = text, 0, []
        counters = self.drafter.lifecycle.counters
        before = counters.steps
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        found = self.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
        self.forced = None
        return list(found.outputs[0].token_ids), counters.steps - before


def compare(exact: torch.Tensor, other: torch.Tensor) -> tuple[list[float], list[float]]:
    """Per row: whether the likeliest token is the same, and KL(exact || other) in nats."""
    same = (exact.argmax(-1) == other.argmax(-1)).float()
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    return same.tolist(), (p.exp() * (p - q)).sum(-1).tolist()


def measure(bench: Bench, prompts: list[dict[str, Any]], settings: dict[str, Any], output: int) -> dict[str, Any]:
    """Everything, by setting and quantity: lists over prompts or rows, with the prompts' tasks."""
    found: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    for number, prompt in enumerate(prompts):
        ids, task = prompt["prompt_token_ids"], prompt["task"]
        bench.use(None)
        bench.forget()
        text, steps = bench.generate(ids, output)
        found["exact"]["steps"].append(steps)
        bench.generate(ids, output, text)
        # The first token is the prompt's, which is exact in all of them.
        exact = torch.cat(bench.seen)[1:output]
        same, _ = compare(exact, torch.nn.functional.one_hot(torch.tensor(text[1:]), exact.shape[-1]).float() * 1e4)
        found["exact"]["same"].append(np.mean(same))
        for name, options in settings.items():
            bench.use(options)
            forced, _ = bench.generate(ids, output, text)
            assert forced == text
            same, kl = compare(exact, torch.cat(bench.seen)[1:output])
            of = found[name]
            of["same"].append(float(np.mean(same)))
            of["kl"].append(float(np.mean(kl)))
            of["share"].append(bench.drafter.sparse.attention.stats()["sparse_attention_share"])
            bench.use(options)
            bench.forget()
            free, steps = bench.generate(ids, output)
            differ = [i for i, (a, b) in enumerate(zip(text, free, strict=True)) if a != b]
            of["equal"].append(1 - len(differ) / output)
            of["first"].append(differ[0] if differ else output)
            of["steps"].append(steps)
            of["task"].append(task)
        line = " ".join(f"{n}: {np.mean(found[n]['same']):.4f}/{np.mean(found[n]['kl']):.4f}" for n in settings)
        print(f"\r{number + 1} {line}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def rows_of(found: dict[str, Any], args: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for the CSV file."""
    made = []

    def add(name: str, task: str, metric: str, unit: str, value: float, spread: np.ndarray | None = None) -> None:
        low, high = ("", "") if spread is None else (f"{x:.4g}" for x in np.percentile(spread, [20, 80]))
        config = {"tokens": args.tokens, "output": args.output, "rows": args.rows, "dtype": args.dtype}
        made.append(
            {"benchmark": "sparse_verify", "provider": name, "task": task, "metric": metric, "unit": unit}
            | {"value": f"{value:.5g}", "p20": low, "p80": high, "seed": args.seed}
            | {"config": json.dumps(config | {"options": settings.get(name)})}
        )

    exact_steps = np.array(found["exact"]["steps"])
    length = args.output - 1
    all_tasks = np.array(found[next(iter(settings))]["task"])
    add("exact", "all", "top1_same_as_own_decode", "share", float(np.mean(found["exact"]["same"])))
    for name in settings:
        of = {key: np.array(value) for key, value in found[name].items()}
        for task in ("all", *sorted(set(all_tasks))):
            pick = np.ones(len(all_tasks), bool) if task == "all" else all_tasks == task
            add(name, task, "forced_top1_same", "share", of["same"][pick].mean(), of["same"][pick])
            add(name, task, "forced_kl", "nats", of["kl"][pick].mean(), of["kl"][pick])
            add(name, task, "free_equal_tokens", "share", of["equal"][pick].mean(), of["equal"][pick])
            add(name, task, "free_first_difference", "tokens", float(np.median(of["first"][pick])), of["first"][pick])
            add(name, task, "mat", "tokens/step", length * pick.sum() / of["steps"][pick].sum())
            ratio = exact_steps[pick].sum() / of["steps"][pick].sum()
            add(name, task, "mat_over_exact", "ratio", ratio)
        add(name, "all", "attended", "share", of["share"].mean())
    add("exact", "all", "mat", "tokens/step", length * len(exact_steps) / exact_steps.sum())
    return made


def main() -> None:
    from long_prompts import long_prompts
    from replay import write_rows
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--drafts", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", action="append", metavar="NAME=JSON", help="default: sparse={}")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = {}
    for text in args.settings or ["sparse={}"]:
        name, _, options = text.partition("=")
        settings[name] = json.loads(options)
    prompts = long_prompts(AutoTokenizer.from_pretrained(args.model), args.prompts, args.tokens, args.seed)
    bench = Bench(args, settings)
    rows = rows_of(measure(bench, prompts, settings, args.output), args, settings)
    for row in rows:
        if row["task"] == "all":
            print(f"{row['provider']:24s} {row['metric']:26s} {row['value']:>8s} {row['unit']}")
    write_rows(args.csv, rows)


if __name__ == "__main__":
    main()
