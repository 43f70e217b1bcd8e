"""End to end, a real engine per arm: no speculation, vLLM's ngram and suffix, and our proposers, on the same prompts.

    python benchmarks/bench_end_to_end.py [--prompts spec_bench.jsonl] [--per-task 20] [--mode eager|compiled]

All engines stay up and each block of ``--concurrency`` prompts goes to every arm in turn, so what disturbs the machine
disturbs all arms. Time is decode time, from a block's first token to its last. Rows are added to
``benchmarks/results/end_to_end.csv``.

``--prompts`` takes Spec-Bench's questions (``question_id``, ``category``, ``turns``; only first turns are sent, and
the eight MT-Bench categories are grouped as ``multi_turn``) or lines of ``id``, ``task``, ``prompt``; without it, the
demo's bundled prompts are used. Arms: none, ngram (K=5, 2-4), suffix8 (K=8, factor 2), suffix16 (K=16, vLLM's
defaults), and ours: PROPOSER[:K[:MIN_PROB]], as in Auto, Auto:16 or Retrieval:8:0.1. The suffix arms need
arctic-inference: see ``benchmarks/install_suffix_peer.sh``.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_specplug import registry
from vllm_specplug.ab import arms, environment, report
from vllm_specplug.cli.demo import load_workload

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "end_to_end.csv"
MULTI_TURN = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
ARMS = ("none", "ngram", "suffix8", "suffix16")
DEFAULT_ARMS = ",".join((*ARMS, "Retrieval", "Auto"))
TOTAL = "total"


def read_prompts(path: Path | None) -> list[dict[str, str]]:
    """``task`` and ``prompt`` of each line of ``path``, in its order."""
    if path is None:
        return load_workload()
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "turns" in row:
            task = "multi_turn" if row["category"] in MULTI_TURN else row["category"]
            row = {"task": task, "prompt": row["turns"][0]}
        rows.append(row)
    return rows


def sample(rows: Sequence[dict[str, str]], per_task: int | None, seed: int) -> list[dict[str, str]]:
    """``per_task`` prompts of each task, drawn with ``seed``, in the file's order; all of them for None."""
    if per_task is None:
        return list(rows)
    by_task = defaultdict(list)
    for i, row in enumerate(rows):
        by_task[row["task"]].append(i)
    rng = random.Random(seed)
    chosen = [i for places in by_task.values() for i in rng.sample(places, min(per_task, len(places)))]
    return [rows[i] for i in sorted(chosen)]


def into_blocks(rows: Sequence[dict[str, str]], size: int) -> list[tuple[str, list[str]]]:
    """(task, prompts) blocks of ``size`` prompts of one task, tasks taking turns so that none has a quiet hour."""
    by_task = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row["prompt"])
    queues = {t: [p[i : i + size] for i in range(0, len(p), size)] for t, p in by_task.items()}
    longest = max(map(len, queues.values()))
    return [(task, queue[i]) for i in range(longest) for task, queue in queues.items() if i < len(queue)]


def our_arm(name: str, args: argparse.Namespace) -> arms.Arm:
    """The arm of ``PROPOSER[:K[:MIN_PROB]]``."""
    proposer, *settings = name.split(":")
    known = registry.proposers()
    try:
        section = known[proposer].section
        tokens = int(settings[0]) if settings else args.spec_tokens
        options = {k: dict(v) for k, v in args.options.items()}
        if len(settings) > 1:
            options.setdefault(section, {})["min_prob"] = float(settings[1])
    except (ValueError, KeyError):
        ours = ", ".join(f"{p}[:K[:MIN_PROB]]" for p in known)
        raise SystemExit(f"--arms: unknown arm {name!r}; allowed: {', '.join(ARMS)}, {ours}") from None
    arm = arms.specplug(proposer, tokens, options)
    title = f"specplug {proposer} (K={tokens}{', p=' + settings[1] if len(settings) > 1 else ''})"
    return dataclasses.replace(arm, name=name.lower(), title=title)


def build_arms(names: Iterable[str], args: argparse.Namespace) -> list[arms.Arm]:
    """The arms called ``names``, without those that cannot run here; says which and why."""
    made = {
        "none": arms.no_speculation(),
        "ngram": arms.ngram(),
        "suffix8": arms.suffix(8, 2.0),
        "suffix16": arms.suffix(16),
    }
    chosen = []
    for name in names:
        if name not in made:
            made[name] = our_arm(name, args)
        if name.startswith("suffix") and not environment.has_module("arctic_inference"):
            print(f"skipping {name}: arctic-inference is not installed (benchmarks/install_suffix_peer.sh)")
            continue
        chosen.append(made[name])
    if not chosen or chosen[0].name != "none":
        chosen = [made["none"], *(arm for arm in chosen if arm.name != "none")]
    return chosen


def rows_of(
    results: Sequence[arms.ArmResult], blocks: Sequence[tuple[str, list[str]]], common: dict[str, Any], seed: int
) -> list[dict[str, Any]]:
    """Tidy rows: one per arm, task and metric."""
    tasks = [*dict.fromkeys(task for task, _ in blocks), TOTAL]
    base = results[0]
    rows = []
    for result in results:
        if result.failure or base.failure:
            continue
        for task in tasks:
            picked = [i for i, (t, _) in enumerate(blocks) if task in (t, TOTAL)]
            f = report.figures([result.blocks[i] for i in picked], [base.blocks[i] for i in picked], seed)
            metrics = {
                "tokens_per_s": (f.tokens_per_s, None, None),
                "speedup": (f.speedup.value, f.speedup.low, f.speedup.high),
                "cpu_speedup": (f.cpu_speedup.value, f.cpu_speedup.low, f.cpu_speedup.high),
                "mat": (f.mat, None, None),
                "drafts_per_step": (f.drafts_per_step, None, None),
                "acceptance": (f.acceptance, None, None),
                "identical_share": (f.identical / f.outputs, None, None),
                "token_agreement": (f.agreement, None, None),
            }
            for metric, (value, low, high) in metrics.items():
                figures = [None if x is None else round(x, 4) for x in (value, low, high)]
                place = {"task": task, "prompts": f.outputs, "arm": result.arm.name, "arm_title": result.arm.title}
                rows.append(
                    {**common, **place, "metric": metric, **dict(zip(("value", "low", "high"), figures, strict=True))}
                )
    return rows


def run_facts(results: Sequence[arms.ArmResult], args: argparse.Namespace) -> dict[str, Any]:
    """What every row of a run says of it."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_sha": environment.git_sha(ROOT),
        **{k: v for k, v in environment.versions().items() if k in ("vllm", "torch", "arctic-inference")},
        "cpu": environment.cpu_model(),
        "cpus": environment.cpu_count(),
        "threads": results[0].facts.get("threads"),
        "seed": args.seed,
        "prompt_file": args.prompts.name if args.prompts else "demo",
        "mode": args.mode,
        "dtype": args.dtype,
    }


def append(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Add ``rows`` to the CSV file ``path``, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """Speed-up per task, then the other figures of the total."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    value = {(r["arm"], r["task"], r["metric"]): r for r in rows}
    titles = {r["arm"]: r["arm_title"] for r in rows}
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    for metric in ("speedup", "cpu_speedup"):
        table = Table(title=f"{metric} against no speculation [95% interval]", title_style="bold")
        table.add_column("arm", no_wrap=True)
        for task in tasks:
            table.add_column(task, justify="right")
        for arm, title in titles.items():
            cells = [value[arm, task, metric] for task in tasks]
            table.add_row(title, *(f"{c['value']:.2f}\n{c['low']:.2f}-{c['high']:.2f}" for c in cells))
        console.print(table)
    shown = ("tokens_per_s", "mat", "drafts_per_step", "acceptance", "identical_share", "token_agreement")
    table = Table("arm", *shown, title="total", title_style="bold")
    for arm, title in titles.items():
        cells = [value[arm, TOTAL, metric]["value"] for metric in shown]
        table.add_row(title, *("-" if c is None else f"{c:.2f}" for c in cells))
    console.print(table)


def main() -> int:
    """Run the benchmark; 0 if every arm ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="JSON lines; default: the demo's prompts")
    parser.add_argument("--per-task", type=int, metavar="N", help="sample N prompts of each task (default: all)")
    parser.add_argument("--arms", default=DEFAULT_ARMS, help="default: %(default)s")
    parser.add_argument("--spec-tokens", type=int, default=8, metavar="K", help="where an arm of ours names none")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="the plugin's options")
    parser.add_argument("--mode", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--concurrency", type=int, default=1, metavar="N", help="prompts sent together")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--model", default=str(ROOT / ".models" / "smollm2-135m"))
    parser.add_argument("--kv-gib", type=int, default=1, help="KV cache of each engine (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each engine (default: processors but one)")
    parser.add_argument("--cpus", type=int, nargs="+", default=[], metavar="CPU", help="processors to stay on")
    parser.add_argument("--one-by-one", action="store_true", help="one engine after another: less memory, no pairing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()

    chosen = build_arms(args.arms.split(","), args)
    blocks = into_blocks(sample(read_prompts(args.prompts), args.per_task, args.seed), args.concurrency)
    settings = arms.EngineSettings(
        model=args.model,
        dtype=args.dtype,
        eager=args.mode == "eager",
        kv_gib=args.kv_gib,
        seed=args.seed,
        threads=args.threads,
        cpus=tuple(args.cpus),
    )
    started = time.monotonic()

    def say(name: str, state: str, done: int) -> None:
        print(f"{time.monotonic() - started:7.0f} s  {name:<10} {state:<8} {done}/{len(blocks)}", flush=True)

    logs = Path(tempfile.mkdtemp(prefix="specplug-bench-"))
    results = arms.run(
        chosen,
        settings,
        [arms.Work(prompts, [args.max_tokens] * len(prompts)) for _, prompts in blocks],
        logs,
        together=not args.one_by_one,
        progress=say,
    )
    for result in results:
        if result.failure:
            print(f"{result.arm.title} failed: {result.failure} (what it printed: {logs})")
    common = {
        **run_facts(results, args),
        "concurrency": args.concurrency,
        "max_tokens": args.max_tokens,
        "options": json.dumps(args.options),
    }
    rows = rows_of(results, blocks, common, args.seed)
    if rows:
        append(rows, args.results)
        print_tables(rows)
    return int(any(result.failure for result in results))


if __name__ == "__main__":
    sys.exit(main())
