"""How fast a server is under every load, with a budget, with fixed budgets, and with vLLM's own: real engines.

    python benchmarks/bench_adaptive_length.py --prompts spec_bench.jsonl [--scenarios sweep,random,...] [--fixed 2,4,8]

Scenarios, each given to every arm in turn, all engines staying up:

``sweep``      Spec-Bench's first turns, 1, 2, 4, ... prompts at once, all tasks mixed, greedy
``random``     prompts of random tokens, sampled at temperature 1: nothing to predict
``repetitive`` a sentence over and over
``long``       prompts of 4,000 tokens (one beginning for all, which the prefix cache keeps)
``swing``      one request, then 32, then one again; three times, with other prompts

Rates are decode tokens per second, from a block's first token to its last; for ``swing`` per phase, without its first
20 steps. ``wait_p99`` is the 99th percentile of the times from sending a prompt to its first token. Rows are added to
``benchmarks/results/adaptive_length.csv``: value, and ratio to no speculation with its 95% interval.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_end_to_end import ROOT, append, read_prompts, run_facts, sample

from vllm_specplug.ab import arms, environment, report
from vllm_specplug.ab.arms import Block, Work

RESULTS = ROOT / "benchmarks" / "results" / "adaptive_length.csv"
#: Concurrency: blocks of it.
SWEEP = {1: 12, 2: 6, 4: 4, 8: 3, 16: 2, 32: 2}
LONG = 4000
SETTLED = 20
PHASES = ("one", "many", "one again")
MANY = 32
SWINGS = 3


@dataclass(frozen=True)
class Item:
    """A block of work and what it stands for."""

    scenario: str
    concurrency: int
    work: Work


def sweep(rows: Sequence[str], tokens: int, blocks: dict[int, int]) -> list[Item]:
    """Other prompts for every block: who remembers outputs must not profit from blocks before."""
    needed = sum(concurrency * count for concurrency, count in blocks.items())
    if needed > len(rows):
        raise SystemExit(
            f"the sweep takes {needed} prompts and there are {len(rows)}: raise --per-task or lower --scale"
        )
    items, queue = [], list(rows)
    for concurrency, count in blocks.items():
        for _ in range(count):
            prompts, queue = queue[:concurrency], queue[concurrency:]
            items.append(Item("sweep", concurrency, Work(prompts, [tokens] * concurrency)))
    return items


def random_tokens(rng: np.random.Generator, tokens: int) -> list[Item]:
    items = []
    for concurrency, count in ((1, 3), (8, 1)):
        for _ in range(count):
            prompts = [rng.integers(100, 40_000, 100).tolist() for _ in range(concurrency)]
            work = Work(prompts, [2 * tokens] * concurrency, temperature=1.0, ignore_eos=True)
            items.append(Item("random", concurrency, work))
    return items


def repetitive(tokens: int) -> list[Item]:
    line = "The tram to the harbour leaves every ten minutes from platform four.\n"
    return [
        Item("repetitive", 1, Work([f"Repeat this line forever:\n{line}" + line * n], [2 * tokens], ignore_eos=True))
        for n in (20, 30)
    ]


def long_prompts(rows: Sequence[str], tokens: int, encode: Callable[[str], list[int]]) -> list[Item]:
    text = encode("\n\n".join(rows))
    while len(text) < LONG:
        text += text
    items = []
    for concurrency in (1, 8):
        prompts = [text[: LONG - 64] + encode(rows[i])[:64] for i in range(concurrency)]
        # Once without counting: the prompts are computed then.
        items.append(Item("", concurrency, Work(prompts, [2] * concurrency)))
        items += [Item("long", concurrency, Work(prompts, [tokens] * concurrency, ignore_eos=True))] * 2
    return items


def swing(rows: Sequence[str], tokens: int) -> list[Item]:
    lengths = [6 * tokens, *[tokens] * (MANY - 1)]
    after = [0, *[2 * tokens] * (MANY - 1)]
    items = []
    for number in range(SWINGS):
        # From the end: not those of the sweep, where there are enough. One text alone says little.
        prompts = [rows[-1 - (number * MANY + i) % len(rows)] for i in range(MANY)]
        items.append(Item("swing", MANY, Work(prompts, lengths, after, ignore_eos=True)))
    return items


def phases(block: Block, alone: int) -> dict[str, tuple[int, float]]:
    """Tokens and seconds of each phase of a swing, without its first steps.

    Args:
        alone: tokens that the first request has when the others are sent: steps that compute their prompts belong to
            no phase.
    """
    steps = block.timeline
    crowd = [i for i, (_, _, running) in enumerate(steps) if running >= 0.75 * MANY]
    if not crowd:
        return {}
    emitted = np.cumsum([tokens for _, tokens, _ in steps])
    before = [i for i, (_, _, running) in enumerate(steps) if running == 1 and emitted[i] < alone]
    after = [i for i, (_, _, running) in enumerate(steps) if running == 1 and i > crowd[-1]]
    found = {}
    for name, places in zip(PHASES, (before, crowd, after), strict=True):
        settled = places[SETTLED:]
        if len(settled) > 2:
            seconds = sum(steps[i][0] - steps[i - 1][0] for i in settled)
            found[name] = (sum(steps[i][1] for i in settled), seconds)
    return found


def make_items(args: argparse.Namespace) -> list[Item]:
    rows = [row["prompt"] for row in sample(read_prompts(args.prompts), args.per_task, args.seed)]
    rng = np.random.default_rng(args.seed)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    blocks = {c: max(1, round(n * args.scale)) for c, n in SWEEP.items() if c in args.concurrency}
    made = {
        "sweep": lambda: sweep(rows, args.max_tokens, blocks),
        "random": lambda: random_tokens(rng, args.max_tokens),
        "repetitive": lambda: repetitive(args.max_tokens),
        "long": lambda: long_prompts(rows, args.max_tokens, lambda t: tokenizer.encode(t, add_special_tokens=False)),
        "swing": lambda: swing(rows, args.max_tokens),
    }
    unknown = [s for s in args.scenarios if s not in made]
    if unknown:
        raise SystemExit(f"--scenarios: unknown {unknown[0]!r}; allowed: {', '.join(made)}")
    return [item for name in args.scenarios for item in made[name]()]


def make_arms(args: argparse.Namespace) -> list[arms.Arm]:
    def ours(name: str, proposer: str, options: dict[str, Any]) -> arms.Arm:
        arm = arms.specplug(proposer, args.spec_tokens, options)
        return dataclasses.replace(arm, name=name, title=f"{proposer} {json.dumps(options) if options else ''}".strip())

    made = {
        "none": arms.no_speculation(),
        "ngram": arms.ngram(),
        "suffix8": arms.suffix(8, 2.0),
        "auto": ours("auto", "Auto", {}),
        "retrieval": ours("retrieval", "AdaptiveLength", {}),
        "adaptive-ngram": ours("adaptive-ngram", "AdaptiveLength", {"adaptive_length": {"inner": "vllm:ngram"}}),
        "adaptive-suffix": ours("adaptive-suffix", "AdaptiveLength", {"adaptive_length": {"inner": "vllm:suffix"}}),
    }
    for length in args.fixed:
        made[f"fixed{length}"] = ours(f"fixed{length}", "Auto", {"auto": {"policy": "fixed", "length": length}})
    chosen = []
    for name in [*args.arms, *(f"fixed{length}" for length in args.fixed)]:
        if name not in made:
            raise SystemExit(f"--arms: unknown {name!r}; allowed: {', '.join(made)}")
        if "suffix" in name and not environment.has_module("arctic_inference"):
            print(f"skipping {name}: arctic-inference is not installed (benchmarks/install_suffix_peer.sh)")
            continue
        chosen.append(made[name])
    return chosen


def rows_of(results: Sequence[arms.ArmResult], items: Sequence[Item], common: dict[str, Any]) -> list[dict[str, Any]]:
    base = results[0]
    rows = []
    for result in results:
        if result.failure or base.failure:
            continue
        for key in dict.fromkeys((item.scenario, item.concurrency) for item in items if item.scenario):
            picked = [i for i, item in enumerate(items) if (item.scenario, item.concurrency) == key]
            alone = max(items[picked[0]].work.after, default=0)
            ours, theirs = [result.blocks[i] for i in picked], [base.blocks[i] for i in picked]
            place = {**common, "scenario": key[0], "concurrency": key[1], "arm": result.arm.name}
            for metric, value, ratio in metrics(key[0], ours, theirs, common["seed"], alone):
                figures = [None if x is None else round(x, 4) for x in (value, *ratio)]
                names = ("value", "ratio", "low", "high")
                rows.append({**place, "metric": metric, **dict(zip(names, figures, strict=True))})
    return rows


NONE = (None, None, None)


def metrics(
    scenario: str, ours: Sequence[Block], theirs: Sequence[Block], seed: int, alone: int
) -> list[tuple[str, float, tuple[float | None, float | None, float | None]]]:
    """(name, value, (ratio to the base, low, high)) of some blocks."""
    if scenario == "swing":
        out = []
        for phase in PHASES:
            pairs = [[phases(block, alone).get(phase) for block in pair] for pair in zip(ours, theirs, strict=True)]
            timed = [(a, b) for a, b in pairs if a and b]
            if timed:
                rate = sum(a[0] for a, _ in timed) / sum(a[1] for a, _ in timed)
                r = report.speedup([a for a, _ in timed], [b for _, b in timed], seed)
                out.append((f"tokens_per_s, {phase}", rate, (r.value, r.low, r.high)))
        return out
    f = report.figures(ours, theirs, seed)
    waits, base_waits = ([w for b in blocks for w in b.waits] for blocks in (ours, theirs))
    p99, base_p99 = np.percentile(waits, 99), np.percentile(base_waits, 99)
    return [
        ("tokens_per_s", f.tokens_per_s, dataclasses.astuple(f.speedup)),
        ("cpu_speedup", f.cpu_speedup.value, (f.cpu_speedup.value, f.cpu_speedup.low, f.cpu_speedup.high)),
        ("mat", f.mat, NONE),
        ("drafts_per_step", f.drafts_per_step, NONE),
        ("identical_share", f.identical / f.outputs, NONE),
        ("wait_p99_s", float(p99), (float(p99 / base_p99), None, None)),
    ]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(r["arm"] for r in rows))
    speed = [r for r in rows if r["metric"].startswith("tokens_per_s")]
    columns = list(dict.fromkeys((r["scenario"], r["concurrency"], r["metric"].partition(", ")[2]) for r in speed))
    table = Table("arm", *(f"{s} {p or c}" for s, c, p in columns), title="against no speculation")
    for name in names:
        cells = []
        for column in columns:
            found = [r for r in speed if r["arm"] == name]
            found = [r for r in found if (r["scenario"], r["concurrency"], r["metric"].partition(", ")[2]) == column]
            cells.append(f"{found[0]['ratio']:.2f}" if found else "-")
        table.add_row(name, *cells)
    Console(width=200, highlight=False).print(table)


def main() -> int:
    """Run the benchmark; 0 if every arm ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="JSON lines; default: the demo's prompts")
    parser.add_argument("--per-task", type=int, default=40, metavar="N", help="prompts of each task")
    parser.add_argument("--scenarios", type=lambda t: t.split(","), default=["sweep", "random", "repetitive", "swing"])
    parser.add_argument("--concurrency", type=lambda t: [int(n) for n in t.split(",")], default=list(SWEEP))
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of blocks of the sweep")
    parser.add_argument("--arms", type=lambda t: t.split(","), default=["none", "ngram", "suffix8", "auto"])
    parser.add_argument("--fixed", type=lambda t: [int(n) for n in t.split(",") if n], default=[2, 4, 6, 8, 12, 16])
    parser.add_argument("--spec-tokens", type=int, default=16, metavar="K")
    parser.add_argument("--mode", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--model", default=str(ROOT / ".models" / "smollm2-135m"))
    parser.add_argument("--kv-gib", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()

    items, chosen = make_items(args), make_arms(args)
    settings = arms.EngineSettings(
        model=args.model,
        dtype=args.dtype,
        eager=args.mode == "eager",
        kv_gib=args.kv_gib,
        seed=args.seed,
        max_model_len=LONG + 256,
    )
    started = time.monotonic()

    def say(name: str, state: str, done: int) -> None:
        what = items[done - 1] if done else None
        where = f"{what.scenario} {what.concurrency}" if what else ""
        print(f"{time.monotonic() - started:7.0f} s  {name:<16} {state:<8} {done}/{len(items)} {where}", flush=True)

    logs = Path(tempfile.mkdtemp(prefix="specplug-bench-"))
    results = arms.run(chosen, settings, [item.work for item in items], logs, together=True, progress=say)
    for result in results:
        if result.failure:
            print(f"{result.arm.name} failed: {result.failure} (what it printed: {logs})")
        elif result.blocks[-1].stats:
            print(result.arm.name, {k: round(v, 4) for k, v in result.blocks[-1].stats.items() if v})
    common = {
        **run_facts(results, args),
        "max_tokens": args.max_tokens,
        "spec_tokens": args.spec_tokens,
    }
    rows = rows_of(results, items, common)
    if rows:
        append(rows, args.results)
        print_table(rows)
    return int(any(result.failure for result in results))


if __name__ == "__main__":
    sys.exit(main())
