"""Feed-forward layers that skip channels: their time beside vLLM's own, and what skipping does to the model.

    python benchmarks/bench_ffn_union.py --prompts spec_bench.jsonl [--part time|step|fidelity ...] [--dtype bfloat16]
                                         [--threads N] [--model PATH] [--csv benchmarks/results/ffn_union.csv]

Text: the summarisation and retrieval prompts of a Spec-Bench question file (news and encyclopaedia); thresholds are
found on every second one, everything else is measured on the others.

time: in a vLLM engine, each layer's own module beside the kernel, on inputs that the layer really gets: neighbouring
rows of a text. All layers one after another, so that weights come from memory as in a step (`layers`; `layer` is the
median call). The ways take turns; figures are medians (p20, p80). `tau 0` is the kernel skipping nothing. `share` is
the share of channels computed, which skipping leaves of the rows' union.
step: the engine's whole decode step with that many requests, by turns with and without skipping.
fidelity: teacher-forced in float32 with transformers: the first 128 tokens dense, the rest in groups of rows as they
are verified, beside the dense model: agreement of the most likely token, KL divergence, perplexity.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from replay import write_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "ffn_union.csv"
ROWS = (1, 2, 3, 4, 8, 16)
SPARSITIES = (0.3, 0.5, 0.64, 0.8)
#: The fixed thresholds of arXiv 2512.21911.
FIXED = (0.01, 0.05, 0.1)
GROUPS = (1, 4, 8)
DENSE, LENGTH = 128, 384  # tokens of a text: computed densely, and in all

Row = dict[str, Any]


def texts(path: Path, tokenizer: Any, held_out: bool, count: int) -> list[list[int]]:
    """Token ids of texts of at least `LENGTH` tokens, cut there; the two halves of the file share none."""
    found = []
    with path.open() as file:
        questions = [json.loads(line) for line in file]
    chosen = [q for q in questions if q["category"] in ("summarization", "rag")]
    for question in chosen[int(held_out) :: 2]:
        ids = tokenizer(question["turns"][0])["input_ids"]
        if len(ids) >= LENGTH:
            found.append(ids[:LENGTH])
    # From both kinds.
    return found[:: max(1, len(found) // count)][:count]


def row(task: str, provider: str, metric: str, unit: str, values: Any, config: dict[str, Any]) -> Row:
    """A row for the CSV file, of one value or of the percentiles of many."""
    base = {"benchmark": "ffn_union", "provider": provider, "task": task, "metric": metric, "unit": unit, "seed": 0}
    values = np.atleast_1d(np.asarray(values, float))
    low, middle, high = np.percentile(values, [20, 50, 80])
    spread = {"p20": f"{low:.4g}", "p80": f"{high:.4g}"} if len(values) > 1 else {}
    return base | {"value": f"{middle:.4g}", "config": json.dumps(config)} | spread


# --- in the engine ---


def start_engine(args: argparse.Namespace) -> Any:
    """An eager engine inside this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    return LLM(
        model=str(args.model),
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=max(ROWS),
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )


def runner_of(llm: Any) -> Any:
    """The model runner behind an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def read(llm: Any, ids: list[list[int]]) -> None:
    """Have the model read texts."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": text} for text in ids]
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)


def calibrate(llm: Any, ids: list[list[int]]) -> dict[str, Any]:
    """Thresholds, from what the model reads."""
    from vllm_specplug.host.sparse_ffn import FfnQuantiles

    quantiles = FfnQuantiles()
    quantiles.attach(runner_of(llm).get_model())
    read(llm, ids)
    quantiles.detach()
    return quantiles.result()


def inputs_of(llm: Any, ffns: list[Any], text: list[int]) -> list[torch.Tensor]:
    """What each layer gets while the model reads a text: ``[len(text), H]``."""
    seen: list[list[torch.Tensor]] = [[] for _ in ffns]
    hooks = [
        ffn.module.register_forward_pre_hook(lambda module, given, kept=kept: kept.append(given[0].clone()))
        for ffn, kept in zip(ffns, seen, strict=True)
    ]
    read(llm, [text])
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept)[: len(text)] for kept in seen]


def walk(layers: list[Callable[[], Any]], evict: torch.Tensor) -> np.ndarray:
    """Seconds of each layer's call, one after another, after other memory was touched."""
    evict.add_(1.0)
    taken = np.zeros(len(layers))
    for i, call in enumerate(layers):
        start = time.perf_counter()
        call()
        taken[i] = time.perf_counter() - start
    return taken


def measure_time(llm: Any, calibration: dict[str, Any], text: list[int], args: argparse.Namespace) -> list[Row]:
    """Part `time`."""
    from vllm_specplug.kernels.ffn_union_cpu import ffn_union_cpu, pack_ffn

    from vllm_specplug.host import gated_ffn
    from vllm_specplug.host.sparse_ffn import LEVELS

    ffns = gated_ffn.find(runner_of(llm).get_model())
    inputs = inputs_of(llm, ffns, text)
    if args.threads:
        torch.set_num_threads(args.threads)  # after the engine's last step, which sets it
    packed = [pack_ffn(*ffn.weights()) for ffn in ffns]
    quantiles = calibration["quantiles"]
    taus = {s: [float(np.interp(s, LEVELS, q)) for q in quantiles] for s in SPARSITIES} | {0.0: [0.0] * len(ffns)}
    evict = torch.zeros(12_000_000)
    config = {"dtype": args.dtype, "threads": torch.get_num_threads(), "layers": len(ffns), "model": args.model.name}
    found: list[Row] = []
    print(f"\n{args.dtype}, {config['threads']} thread(s): ms of {len(ffns)} layers, and share of channels computed")
    print(f"{'rows':>5}{'vLLM':>22}" + "".join(f"{f'sparsity {s}' if s else 'tau 0':>30}" for s in taus))
    for rows in ROWS:
        out = torch.empty(rows, ffns[0].hidden_size, dtype=inputs[0].dtype)
        seconds: dict[Any, list[np.ndarray]] = {way: [] for way in ("vllm", *taus)}
        opened: dict[float, list[float]] = {s: [] for s in taus}
        for repeat in range(args.repeats + 1):
            first = DENSE + (repeat * rows) % (LENGTH - DENSE - rows)
            xs = [x[first : first + rows].clone() for x in inputs]
            counts: list[int] = []

            def sparse(i: int, s: float, xs: list = xs, out: torch.Tensor = out, counts: list = counts) -> None:
                counts.append(ffn_union_cpu(xs[i], packed[i], taus[s][i], out))

            # All ways by turns, so that a noisy machine disturbs them alike.
            for way in seconds:
                if way == "vllm":
                    calls = [lambda ffn=ffn, x=x: ffn.module.forward(x) for ffn, x in zip(ffns, xs, strict=True)]
                else:
                    calls = [lambda i=i, way=way: sparse(i, way) for i in range(len(ffns))]
                taken = walk(calls, evict)
                if repeat:
                    seconds[way].append(taken)
                if way != "vllm":
                    opened[way].append(float(np.mean(counts)) / ffns[0].channels)
                    counts.clear()
        cells = []
        own = np.array(seconds["vllm"]).sum(1)
        for way, taken in seconds.items():
            provider = "vllm" if way == "vllm" else f"sparsity {way}" if way else "tau 0"
            total = np.array(taken).sum(1)
            task = f"rows {rows}"
            found.append(row(task, provider, "layers", "ms", total * 1e3, config))
            found.append(row(task, provider, "layer", "us", np.array(taken).ravel() * 1e6, config))
            if way == "vllm":
                low, middle, high = np.percentile(total * 1e3, [20, 50, 80])
                cells.append(f"{middle:8.2f} ({low:.2f}, {high:.2f})".rjust(22))
            else:
                found.append(row(task, provider, "over_vllm", "ratio", total / own, config))
                found.append(row(task, provider, "share", "share of channels", np.mean(opened[way]), config))
                ratio, share = np.median(total / own), np.mean(opened[way])
                cells.append(f"{np.median(total) * 1e3:8.2f} {ratio:6.2f}x at {share:.2f}".rjust(30))
        print(f"{rows:>5}" + "".join(cells), flush=True)
    return found


def measure_step(llm: Any, calibration: dict[str, Any], ids: list[list[int]], args: argparse.Namespace) -> list[Row]:
    """Part `step`."""
    from vllm import SamplingParams
    from vllm_specplug.proposers.sparse_verify import SparseVerifyOptions

    from vllm_specplug.host.sparse_ffn import SparseFfn
    from vllm_specplug.host.sparse_step import SparseStep

    runner = runner_of(llm)
    config = {"dtype": args.dtype, "threads": torch.get_num_threads(), "mode": "eager", "model": args.model.name}
    found: list[Row] = []
    prepare = runner._prepare_inputs
    step = SparseStep()
    for sparsity in (0.5, 0.8):
        sparse = SparseFfn(SparseVerifyOptions(ffn_sparsity=sparsity, ffn_rows=max(ROWS)), step, calibration)
        reason = sparse.attach(runner.get_model())
        if reason:
            raise SystemExit(f"error: {reason}")
        shares = sparse.break_even[list(ROWS)]
        for rows, share in zip(ROWS, shares, strict=True):
            found.append(row(f"rows {rows}", "sparse", "break_even", "share of channels", share, config))
        print("share of channels below which it pays, by rows:", dict(zip(ROWS, shares.round(2).tolist(), strict=True)))
        for rows in (1, 2, 4, 8):
            turn = [0]

            def described(scheduler_output: Any, scheduled: Any, rows: int = rows, turn: list[int] = turn) -> Any:
                result = prepare(scheduler_output, scheduled)
                step.clear()
                if turn[0] and np.all(scheduled == 1) and len(scheduled) == rows:
                    step.groups = np.stack((np.arange(rows), np.ones(rows)), 1).astype(np.int32)
                    step.num_rows = rows
                return result

            runner._prepare_inputs = described
            sparse.break_even[:] = 2.0  # what it costs where it does not pay is a result too
            before = sparse._calls, sparse._shares
            times: list[list[float]] = [[], []]
            params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
            for n in range(rows):
                prompt = {"prompt_token_ids": ids[n % len(ids)][:256]}
                llm.llm_engine.add_request(f"{sparsity}-{rows}-{n}", prompt, params)
            number = 0
            while llm.llm_engine.has_unfinished_requests():
                turn[0] = number % 2
                start = time.perf_counter()
                llm.llm_engine.step()
                times[turn[0]].append(time.perf_counter() - start)
                number += 1
            runner._prepare_inputs = prepare
            pairs = np.array(list(zip(*times, strict=False)))[3:-1]  # the first are the prompts'
            share = (sparse._shares - before[1]) / (sparse._calls - before[0])
            task, provider = f"requests {rows}", f"sparsity {sparsity}"
            found.append(row(task, f"vllm beside {sparsity}", "step", "ms", pairs[:, 0] * 1e3, config))
            found.append(row(task, provider, "step", "ms", pairs[:, 1] * 1e3, config))
            found.append(row(task, provider, "step_over_vllm", "ratio", pairs[:, 1] / pairs[:, 0], config))
            found.append(row(task, provider, "step_share", "share of channels", share, config))
            own, ours = np.median(pairs, axis=0) * 1e3
            ratio = np.median(pairs[:, 1] / pairs[:, 0])
            print(f"{task} {provider}: step {own:.2f} -> {ours:.2f} ms ({ratio:.2f}x), share {share:.2f}", flush=True)
        sparse.detach()
    return found


# --- fidelity ---


class Skipping:
    """Feed-forward layers of a transformers Llama that compute groups of rows as the kernel does."""

    def __init__(self, model: Any) -> None:
        self.mlps = [layer.mlp for layer in model.model.layers]
        self.taus: list[float] | None = None
        self.group = 1
        self.shares: list[float] = []
        self.below: list[float] = []
        for index, mlp in enumerate(self.mlps):
            mlp.forward = self._forward(index, mlp)

    def _forward(self, index: int, mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            act = torch.nn.functional.silu(mlp.gate_proj(x))
            if self.taus is not None:
                keep = ~(act.abs() < self.taus[index])
                groups = keep.view(len(keep), -1, self.group, keep.shape[-1]).any(2, keepdim=True)
                self.below.append(1.0 - float(keep.float().mean()))
                self.shares.append(float(groups.float().mean()))
                act *= groups.expand(-1, -1, self.group, -1).reshape(keep.shape)
            return mlp.down_proj(act * mlp.up_proj(x))

        return forward

    @contextmanager
    def on(self, taus: list[float], group: int) -> Iterator[None]:
        """Skip below these thresholds, by groups of so many rows."""
        self.taus, self.group, self.shares, self.below = taus, group, [], []
        try:
            yield
        finally:
            self.taus = None


def find_taus(model: Any, skipping: Skipping, ids: list[list[int]]) -> dict[float, list[float]]:
    """Thresholds per sparsity and layer, exact quantiles over texts."""
    seen: list[list[torch.Tensor]] = [[] for _ in skipping.mlps]
    hooks = [
        mlp.gate_proj.register_forward_hook(
            lambda module, given, out, kept=kept: kept.append(torch.nn.functional.silu(out).abs().flatten()[::3])
        )
        for mlp, kept in zip(skipping.mlps, seen, strict=True)
    ]
    with torch.inference_mode():
        for text in ids:
            model(torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    per_layer = [np.quantile(torch.cat(kept).numpy(), SPARSITIES) for kept in seen]
    return {s: [float(q[i]) for q in per_layer] for i, s in enumerate(SPARSITIES)}


def measure_fidelity(args: argparse.Namespace) -> list[Row]:
    """Part `fidelity`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    skipping = Skipping(model)
    taus: dict[str, list[float]] = {
        f"sparsity {s}": t
        for s, t in find_taus(model, skipping, texts(args.prompts, tokenizer, False, args.texts)).items()
    } | {f"tau {t}": [t] * len(skipping.mlps) for t in FIXED}
    ids = texts(args.prompts, tokenizer, True, args.texts)
    # Per way: agreements, KL, nats of the text.
    sums: dict[tuple[str, int], np.ndarray] = {(name, g): np.zeros(5) for name in taus for g in GROUPS}
    dense_nats, done, start = 0.0, 0, time.monotonic()
    with torch.inference_mode():
        for text in ids:
            if args.seconds and done and (time.monotonic() - start) * (done + 1) / done > args.seconds:
                break
            done += 1
            x = torch.tensor([text])
            wanted = x[0, DENSE + 1 :]
            before = model(x[:, :DENSE], use_cache=True).past_key_values

            def logs(x: torch.Tensor = x, before: Any = before) -> torch.Tensor:
                logits = model(x[:, DENSE:], past_key_values=copy.deepcopy(before), use_cache=True).logits
                return logits[0, :-1].log_softmax(-1)

            dense = logs()
            dense_nats -= float(dense.gather(1, wanted[:, None]).sum())
            for name, levels in taus.items():
                for group in GROUPS:
                    with skipping.on(levels, group):
                        ours = logs()
                        share, below = np.mean(skipping.shares), np.mean(skipping.below)
                    agree = float((ours.argmax(-1) == dense.argmax(-1)).sum())
                    divergence = float((dense.exp() * (dense - ours)).sum())
                    nats = -float(ours.gather(1, wanted[:, None]).sum())
                    sums[name, group] += np.array([agree, divergence, nats, below, share])
    scored = done * (LENGTH - DENSE - 1)
    config = {"dtype": "float32", "texts": done, "tokens": scored, "dense": DENSE, "model": args.model.name}
    perplexity = float(np.exp(dense_nats / scored))
    found = [row("dense", "dense", "perplexity", "perplexity", perplexity, config)]
    print(f"\nfidelity over {done} texts, {scored} tokens; dense perplexity {perplexity:.3f}")
    print(f"{'':<16}{'rows':>5}{'top-1':>9}{'KL':>10}{'ppl':>10}{'below':>8}{'share':>8}")
    for (name, group), (agree, divergence, nats, below, share) in sums.items():
        change = float(np.exp((nats - dense_nats) / scored)) - 1.0
        figures = {
            "top1_agreement": ("share", agree / scored),
            "kl": ("nats/token", divergence / scored),
            "perplexity_change": ("share", change),
            "below_tau": ("share of values", below / done),
            "group_share": ("share of channels", share / done),
        }
        found += [row(f"groups of {group}", name, m, unit, value, config) for m, (unit, value) in figures.items()]
        a, k, p, b, s = (value for _, value in figures.values())
        print(f"{name:<16}{group:>5}{a:>9.4f}{k:>10.5f}{p:>+10.2%}{b:>8.3f}{s:>8.3f}", flush=True)
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Feed-forward layers that skip channels: time and fidelity.")
    parser.add_argument("--prompts", type=Path, required=True, help="Spec-Bench questions, JSON lines")
    parser.add_argument("--part", nargs="+", choices=("time", "step", "fidelity"), default=["time", "step", "fidelity"])
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, help="of part time (default: as the engine has them)")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--seconds", type=float, help="of part fidelity: leave out the texts that would take longer")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=120, help="tokens per request of part step")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: list[Row] = []
    if {"time", "step"} & set(args.part):
        llm = start_engine(args)
        calibration = calibrate(llm, texts(args.prompts, llm.get_tokenizer(), False, args.texts))
        ids = texts(args.prompts, llm.get_tokenizer(), True, args.texts)
        with torch.inference_mode():
            if "time" in args.part:
                rows += measure_time(llm, calibration, ids[0], args)
            if "step" in args.part:
                rows += measure_step(llm, calibration, ids, args)
    if "fidelity" in args.part:
        rows += measure_fidelity(args)
    write_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
