"""Fewer experts for verified rows, in vLLM's CPU engine: what it does to the model's answers, and to a step's time.

    python benchmarks/bench_expert_vote.py [--model .models/smollm2-135m-moe] [--dense .models/smollm2-135m]
        [--parts quality fidelity time kernel] [--repeats 40] [--csv benchmarks/results/expert_vote.csv]

The model is the embedded one split into experts (`specplug model export DIR --moe`); `quality` says what splitting
cost, by transformers in float32: perplexity of the dense model and of the split one with its own number of experts per
token and with all of them.

`fidelity`: READMEs of installed packages, and chats answered by the exact model. The first part of a text is computed
exactly, the rest in groups of 8 rows that vote together, teacher-forced: share of rows whose likeliest token is the
exact model's, mean KL of the distributions (nats), perplexity over the exact one's (READMEs only).

`time`: a forward pass of 1 to 16 rows after a context of 512 tokens, the rows a text's own next ones: the whole pass
and its mixture-of-experts layers (router and shared expert included), and the distinct experts per layer. Rules take
turns call by call; ratios are medians over the ratios of neighbouring calls to the exact one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from replay import write_rows
from vllm_specplug.kernels.expert_vote import Edit, RoutingEditor
from vllm_specplug.proposers.sparse_verify import SparseVerifyOptions

from vllm_specplug.host.sparse_moe import MoeTails, SparseMoe
from vllm_specplug.host.sparse_step import SparseStep

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "expert_vote.csv"
READMES = ("torch", "transformers", "numba", "pydantic", "tqdm", "fastapi", "regex", "charset-normalizer")
TEXT_TOKENS, EXACT_TOKENS, ANSWER_TOKENS = 384, 128, 128
GROUP = 8
PARTS = ("quality", "fidelity", "time", "kernel")
CONTEXT, ROWS = 512, (1, 2, 4, 8, 16)

#: Name to moe_drop, moe_experts, static top-k'.
Rule = tuple[int, float, int]


def rules(top_k: int) -> dict[str, Rule]:
    """What is compared; `exact` does nothing."""
    named: dict[str, Rule] = {"exact": (0, 1.0, 0)}
    named |= {f"drop {m}": (m, 1.0, 0) for m in (1, 2, 3)}
    named |= {f"vote {share:g}": (0, share, 0) for share in (0.25, 0.375, 0.5, 0.625, 0.75)}
    named |= {f"top {top_k - n}": (0, 1.0, top_k - n) for n in (1, 2, 3, 4, 6)}
    named["vote 0.5 drop 3"] = (3, 0.5, 0)
    return named


class Bench:
    """One engine, and how its forward passes are watched.

    Attributes:
        groups: of the coming forward passes, first row and rows of each.
        seconds: of the last forward pass, and of its mixture-of-experts layers.
    """

    def __init__(self, model: Path, dtype: str) -> None:
        from vllm import LLM

        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        self.llm = LLM(
            str(model), dtype=dtype, max_model_len=1024, max_num_batched_tokens=1024, enforce_eager=True, seed=0
        )
        self.runner: Any = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.model = self.runner.get_model()
        self.step = SparseStep()
        self.groups: list[tuple[int, int]] = []
        self.hidden = torch.zeros(0)
        self.rows = 0
        self.seconds = [0.0, 0.0]
        config = self.runner.model_config.hf_text_config
        self.top_k, self.experts = int(config.num_experts_per_tok), int(config.num_experts)
        self.calibration: dict[str, Any] = {}
        prepare = self.runner._prepare_inputs

        def prepare_inputs(*args: Any, **others: Any) -> Any:
            self.step.groups = np.array(self.groups, np.int32) if self.groups else None
            self.step.num_rows = sum(count for _, count in self.groups)
            return prepare(*args, **others)

        self.runner._prepare_inputs = prepare_inputs
        self._watch()

    def _watch(self) -> None:
        begun = [0.0, 0.0]

        def before(module: Any, args: Any, which: int) -> None:
            begun[which] = time.perf_counter()
            if which == 0:
                self.seconds = [0.0, 0.0]

        def after(module: Any, args: Any, out: Any, which: int) -> None:
            self.seconds[which] += time.perf_counter() - begun[which]
            if which == 0:
                self.hidden, self.rows = out, len(out)

        for which, module in [(0, self.model)] + [
            (1, m) for m in self.model.modules() if type(m).__name__.endswith("SparseMoeBlock")
        ]:
            module.register_forward_pre_hook(lambda m, a, which=which: before(m, a, which))
            module.register_forward_hook(lambda m, a, o, which=which: after(m, a, o, which))

    def forward(self, ids: list[int], groups: list[tuple[int, int]]) -> None:
        """One pass over what of ``ids`` is not in the prefix cache."""
        from vllm import SamplingParams

        self.groups = groups
        params = SamplingParams(temperature=0.0, max_tokens=1)
        self.llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
        self.groups = []

    def logprobs(self, ids: list[int], groups: list[tuple[int, int]], first: int) -> torch.Tensor:
        """Log-probabilities after each token from ``first`` on, float32; nothing comes from the prefix cache."""
        self.llm.reset_prefix_cache()
        self.forward(ids, groups)
        assert self.rows == len(ids)
        with torch.inference_mode():
            return self.model.compute_logits(self.hidden[first:]).float().log_softmax(dim=1)

    def calibrate(self, texts: list[list[int]]) -> None:
        """Thresholds of the tail drop."""
        tails = MoeTails()
        tails.attach(self.model)
        for text in texts:
            self.llm.reset_prefix_cache()
            self.forward(text, [])
        tails.detach()
        self.calibration = tails.result()

    @contextlib.contextmanager
    def sparse(self, rule: Rule, per_request: bool = True) -> Iterator[SparseMoe]:
        """Edited routing, for rows of groups."""
        drop, share, keep = rule
        moe = SparseMoe(SparseVerifyOptions(moe_drop=drop, moe_experts=share), self.step, self.calibration)
        moe.static_keep, moe.per_request = keep, per_request
        reason = moe.attach(self.model)
        if reason:
            raise SystemExit(f"error: {reason}")
        try:
            yield moe
        finally:
            moe.detach()

    @functools.cached_property
    def chats(self) -> list[tuple[list[int], int]]:
        """The demo's chats with the exact model's greedy answers: token ids, and where the answer begins."""
        from vllm import SamplingParams

        tokenizer = self.llm.get_tokenizer()
        texts = []
        for prompt in prompts():
            message = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            texts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": t} for t in texts], params, use_tqdm=False)
        return [(t + list(o.outputs[0].token_ids), len(t)) for t, o in zip(texts, outputs, strict=True)]


def prompts() -> list[str]:
    """Every second of the demo's."""
    import vllm_specplug.cli

    lines = (Path(vllm_specplug.cli.__file__).parent / "demo_workload.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[::2]]


def readmes(tokenizer: Any, tokens: int) -> list[list[int]]:
    """Parts of installed packages' READMEs, ``tokens`` long."""
    texts = []
    for name in READMES:
        text = metadata.metadata(name).get_payload() or metadata.metadata(name)["Description"] or ""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            texts.append(ids[:tokens])
    return texts


def quality(dense: Path, split: Path) -> list[dict[str, Any]]:
    """Perplexity of the dense model and the split one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense)
    texts = torch.tensor(readmes(tokenizer, TEXT_TOKENS))
    rows = []
    for provider, path, all_experts in (("dense", dense, False), ("moe", split, False), ("moe, all", split, True)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        if all_experts:
            for module in model.modules():
                if type(module).__name__.endswith("TopKRouter"):
                    module.top_k = model.config.num_experts
        with torch.inference_mode():
            logits = model(texts).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()).item()
        print(f"{provider:<12}perplexity {math.exp(loss):.2f} of {texts.numel()} tokens of READMEs", flush=True)
        row = {"provider": provider, "task": "quality", "metric": "perplexity", "unit": "nats^e"}
        rows.append(row | {"value": f"{math.exp(loss):.4g}", "config": "{}"})
    return rows


def fidelity(bench: Bench) -> list[dict[str, Any]]:
    """Every rule beside the exact model."""
    texts = [("readmes", ids, EXACT_TOKENS) for ids in readmes(bench.llm.get_tokenizer(), TEXT_TOKENS)]
    texts += [("chats", ids, start) for ids, start in bench.chats]
    named = rules(bench.top_k)
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    drops = dict.fromkeys(named, 0.0)
    for kind, ids, start in texts:
        groups = [(first, min(GROUP, len(ids) - first)) for first in range(start, len(ids), GROUP)]
        wanted = torch.tensor(ids[start + 1 :])
        exact = bench.logprobs(ids, [], start)[:-1]
        for name, rule in named.items():
            with bench.sparse(rule) as moe:
                ours = bench.logprobs(ids, groups, start)[:-1]
                drops[name] += moe.stats()["moe_drops"] / (len(ids) - start) / len(texts)
            agree = (ours.argmax(1) == exact.argmax(1)).double()
            kl = (exact.exp() * (exact - ours)).sum(1).double()
            loss = -(ours.gather(1, wanted[:, None]) - exact.gather(1, wanted[:, None]))[:, 0].double()
            found.setdefault((name, kind), []).append(torch.stack([agree, kl, loss]).numpy())
    rows = []
    print(f"{'rule':<18}{'top-1 readmes':>14}{'chats':>8}{'KL readmes':>12}{'chats':>8}{'perplexity':>12}")
    config = json.dumps({"group": GROUP, "experts": bench.experts, "top_k": bench.top_k})
    for name in named:
        cells = {kind: np.concatenate(found[name, kind], axis=1).mean(axis=1) for kind in ("readmes", "chats")}
        ratio = math.exp(cells["readmes"][2])
        values = [(f"top1_{k}", "share", cells[k][0]) for k in cells] + [
            (f"kl_{k}", "nats", cells[k][1]) for k in cells
        ]
        values += [("perplexity_over_exact", "ratio", ratio), ("slots_dropped", "per row", drops[name])]
        for metric, unit, value in values:
            row = {"provider": name, "task": "fidelity", "metric": metric, "unit": unit, "value": f"{value:.4g}"}
            rows.append(row | {"config": config, "seed": 0})
        (a, b, _), (c, d, _) = cells["readmes"], cells["chats"]
        print(f"{name:<18}{a:>14.3f}{c:>8.3f}{b:>12.4f}{d:>8.4f}{ratio:>12.3f}", flush=True)
    tokens = {kind: sum(part.shape[1] for part in found["exact", kind]) for kind in ("readmes", "chats")}
    print(f"rows: {tokens}")
    return rows


def timing(bench: Bench, repeats: int) -> list[dict[str, Any]]:
    """Every rule's forward passes beside the exact ones."""
    texts = [ids for ids in readmes(bench.llm.get_tokenizer(), CONTEXT + 64) if len(ids) == CONTEXT + 64]
    named = rules(bench.top_k)
    bench.llm.reset_prefix_cache()
    for ids in texts:
        bench.forward(ids[: CONTEXT + 1], [])
    rows = []
    for count in ROWS:
        taken: dict[str, list[list[float]]] = {name: [] for name in named}
        used = dict.fromkeys(named, 0.0)
        for turn in range(-2, repeats):
            ids = texts[turn % len(texts)]
            for name, rule in named.items():
                with bench.sparse(rule) as moe:
                    # The prefix cache holds whole blocks; at least one token is always computed.
                    bench.forward(ids[: CONTEXT + count], [(0, count)])
                    stats = moe.stats()
                assert bench.rows == count, f"{bench.rows} rows were computed"
                if turn >= 0:
                    taken[name].append(list(bench.seconds))
                    used[name] += stats["moe_experts_used"] / repeats
                    if name.startswith("vote"):
                        used["exact"] += stats["moe_experts_exact"] / repeats / sum(n.startswith("vote") for n in named)
        exact = np.array(taken["exact"])
        config = json.dumps({"rows": count, "context": CONTEXT, "dtype": str(bench.runner.dtype)})
        whole, part = np.median(exact, axis=0) * 1e3
        print(f"{count} rows: a pass takes {whole:.2f} ms, its mixture-of-experts layers {part:.2f} ms")
        for name in named:
            seconds = np.array(taken[name])
            ratio = np.median(seconds / exact, axis=0)
            row = {"provider": name, "task": f"{count} rows", "config": config, "seed": 0}
            for metric, column in (("pass", 0), ("moe_layers", 1)):
                low, middle, high = np.percentile(seconds[:, column] * 1e3, (20, 50, 80))
                figures = {"value": f"{middle:.4g}", "p20": f"{low:.4g}", "p80": f"{high:.4g}"}
                rows.append(row | {"metric": metric, "unit": "ms"} | figures)
                rows.append(row | {"metric": f"{metric}_over_exact", "unit": "ratio", "value": f"{ratio[column]:.4g}"})
            rows.append(row | {"metric": "experts", "unit": "per layer", "value": f"{used[name]:.4g}"})
            print(
                f"  {name:<18}pass {ratio[0]:.3f}  experts' layers {ratio[1]:.3f}  distinct {used[name]:.1f}",
                flush=True,
            )
    return rows


def kernel(repeats: int) -> list[dict[str, Any]]:
    """vLLM's fused kernel on experts of a real size."""
    import vllm  # noqa: F401  its operators
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    experts, channels, hidden, top_k = 128, 768, 2048, 8
    draw = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        one = torch.randn(shape[1:], generator=draw).mul_(0.02).bfloat16()
        return cpu_prepack_moe_weight(one.expand(shape).contiguous(), "vec")

    w13, w2 = weight(experts, 2 * channels, hidden), weight(experts, hidden, channels)
    rows = []
    for count in ROWS:
        x = torch.randn(count, hidden, generator=draw).bfloat16()
        out = torch.empty_like(x)
        logits = torch.randn(1, experts, generator=draw) + torch.randn(count, experts, generator=draw)
        every, pool = np.arange(count, dtype=np.int32), np.array([0, count], np.int32)
        routed = {}
        for name, edit in {"exact": Edit(), **{f"vote {n:g}": Edit(share=n) for n in (0.0625, 0.125, 0.25)}}.items():
            editor = RoutingEditor(experts, top_k, True, edit)
            weights, ids, _ = editor(logits.numpy(), every, pool)
            routed[name] = torch.from_numpy(weights), torch.from_numpy(ids), int(editor.used[1])
        taken: dict[str, list[float]] = {name: [] for name in routed}
        for _ in range(repeats):
            for name, (weights, ids, _) in routed.items():
                start = time.perf_counter()
                cpu_fused_moe(out, x, w13, w2, None, None, weights, ids, "silu", "vec", False)
                taken[name].append(time.perf_counter() - start)
        for name, seconds in taken.items():
            ratio = float(np.median(np.array(seconds) / np.array(taken["exact"])))
            low, middle, high = np.percentile(np.array(seconds) * 1e3, (20, 50, 80))
            config = json.dumps({"rows": count, "threads": torch.get_num_threads()})
            row = {"provider": name, "task": f"kernel, {count} rows", "config": config, "seed": 0}
            figures = {"value": f"{middle:.4g}", "p20": f"{low:.4g}", "p80": f"{high:.4g}"}
            rows.append(row | {"metric": "layer", "unit": "ms"} | figures)
            rows.append(row | {"metric": "layer_over_exact", "unit": "ratio", "value": f"{ratio:.4g}"})
            rows.append(row | {"metric": "experts", "unit": "per layer", "value": routed[name][2]})
            print(f"{count:>3} rows  {name:<12}{middle:8.2f} ms  {ratio:.3f}  experts {routed[name][2]}", flush=True)
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Fewer experts for verified rows: fidelity and time.")
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2-135m-moe")
    parser.add_argument("--dense", type=Path, default=ROOT / ".models" / "smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["fidelity", "time", "kernel"])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.parts != ["kernel"] and not (args.model / "config.json").is_file():
        print(f"error: no model in {args.model}; run: specplug model export {args.model} --moe", file=sys.stderr)
        return 2

    def keep(rows: list[dict[str, Any]]) -> None:
        write_rows(args.csv, [{"benchmark": "expert_vote"} | row for row in rows])

    if "quality" in args.parts:
        keep(quality(args.dense, args.model))
    if "kernel" in args.parts:
        keep(kernel(args.repeats))
    measures: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
        "fidelity": fidelity,
        "time": lambda bench: timing(bench, args.repeats),
    }
    wanted = [part for part in args.parts if part in measures]
    if wanted:
        bench = Bench(args.model, args.dtype)
        bench.calibrate([ids for ids, _ in bench.chats])
        for part in wanted:
            keep(measures[part](bench))
    return 0


if __name__ == "__main__":
    sys.exit(main())
