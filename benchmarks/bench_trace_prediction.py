"""How well replaying a trace predicts the speed-up that is measured: real engines against `specplug trace replay`.

    python benchmarks/bench_trace_prediction.py --prompts spec_bench.jsonl [--per-task 4] [--mode eager|compiled]
    python benchmarks/bench_trace_prediction.py --ab RESULTS --traces DIR

Engines without speculation, with `Retrieval` and with `Auto` (``--arms``) answer the same prompts, one at a time, all
engines taking turns. The one named by ``--recorder`` records its requests, with the target's top-k; they are replayed
through each proposer, with the step times that the trace has. Measured is decode time, from a request's first token to
its last, against no speculation in the same run; predicted is what the replay says. The warm-up prompts of the engines
are replayed as well and not counted, as in the measurement.

With ``--ab`` measured is what `specplug ab` found over HTTP at its first load, which must be one request at once: time
per token after the first. One of its arms recorded to DIR (`auto --additional-config ...`, see `specplug trace
record`). Its server was a new one for every repeat, and so is the replay.

`error` is predicted over measured speed-up, minus 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_end_to_end import into_blocks, read_prompts, sample
from replay import write_rows

from vllm_specplug.ab import arms, report, verdict
from vllm_specplug.ab import results as ab_results
from vllm_specplug.trace import files, step_times
from vllm_specplug.trace.replay import Replay, Tally, build, speedup, total

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "trace_prediction.csv"


def measure(args: argparse.Namespace, folder: Path, traces: Path) -> list[arms.ArmResult]:
    """Every arm's answers."""
    blocks = into_blocks(sample(read_prompts(args.prompts), args.per_task, args.seed), 1)
    work = [arms.Work(prompts, [args.max_tokens] * len(prompts)) for _, prompts in blocks]
    # An engine tells that a request has ended when the next one comes: a last one, for nothing else.
    work.append(arms.Work([arms.WARM_UP_PROMPTS[0]], [1]))
    chosen = []
    for name in args.arms.split(","):
        options = {"trace": {"dir": str(traces), "topk": 8}} if name == args.recorder else {}
        chosen.append(arms.no_speculation() if name == "none" else arms.specplug(name, args.spec_tokens, options))
    settings = arms.EngineSettings(str(args.model), dtype=args.dtype, eager=args.mode == "eager", seed=args.seed)
    results = arms.run(chosen, settings, work, folder, together=True)
    for result in results:
        del result.blocks[len(blocks) :]
    return results


@dataclass(frozen=True)
class Measured:
    """What an arm did; ``proposer`` is None where nothing was drafted, ``limit`` the most draft tokens per step."""

    name: str
    proposer: str | None
    limit: int
    mat: float
    tokens_per_s: float
    speedup: float
    low: float
    high: float


def of_engines(args: argparse.Namespace, results: list[arms.ArmResult]) -> list[Measured]:
    """Figures of :func:`measure`."""
    found = []
    for name, result in zip(args.arms.split(","), results, strict=True):
        live = report.figures(result.blocks, results[0].blocks, args.seed)
        figures = live.mat, live.tokens_per_s, live.speedup.value, live.speedup.low, live.speedup.high
        found.append(Measured(result.arm.name, None if name == "none" else name, args.spec_tokens, *figures))
    return found


def of_comparison(folder: Path) -> list[Measured]:
    """Figures of the arms of a finished comparison that have this plugin's proposers or none, the control first."""
    plan, cells = ab_results.read(folder)
    judged = verdict.judge(plan, cells)
    if plan.loads[0].concurrency != 1:
        raise SystemExit(f"{folder}: the first load is {plan.loads[0]}, not one request at once")
    found = []
    for arm in plan.arms:
        result = judged.of(arm.name, str(plan.loads[0]))
        flags = dict(flag.split("=", 1) for flag in arm.flags if "=" in flag)
        model = flags.get("--spec-model", "").rpartition(".")[2] or None
        if result is None or result.total.tpot is None or (model is None and arm.flags):
            continue
        mat = 1.0 if result.drafting is None else result.drafting.mat
        ratio = (1.0, 1.0, 1.0)
        if result.paired is not None:
            times = result.paired.tpot
            if times is None or times.low is None or times.high is None:
                raise SystemExit(f"{folder}: {arm.name} has no interval: more requests or repeats are needed")
            ratio = 1.0 / times.value, 1.0 / times.high, 1.0 / times.low
        limit = int(flags.get("--spec-tokens", 0))
        found.append(Measured(arm.name, model, limit, mat, 1.0 / result.total.tpot.mean, *ratio))
    return found


def predict(measured: Sequence[Measured], servers: Sequence[Sequence[files.Recorded]]) -> dict[str, dict[str, float]]:
    """Figures by arm, as replaying what each server recorded has them. A server's first requests are not counted."""
    ours: dict[str, list[Tally]] = {each.name: [] for each in measured}
    plain: list[Tally] = []
    for requests in servers:
        times = step_times.learn(requests)
        warm_up, counted = requests[: len(arms.WARM_UP_PROMPTS)], requests[len(arms.WARM_UP_PROMPTS) :]
        plain += Replay(None, 0, times).run(counted)
        print(f"{len(counted)} requests; {times.source}, host {1e6 * times.host_s:.0f} us")
        for each in measured:
            proposer = None if each.proposer is None else build(each.proposer, {})[0]
            run = Replay(proposer, each.limit, times)
            run.run(warm_up)
            ours[each.name] += run.run(counted)
    found = {}
    for name, tallies in ours.items():
        whole = total(tallies)
        figures = {metric: value for metric, (value, _) in whole.metrics().items()}
        figures["tokens_per_s"] = whole.decoded / whole.seconds
        figures["speedup"], figures["low"], figures["high"] = speedup(tallies, plain)
        found[name] = figures
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Predicted against measured speed-up.")
    parser.add_argument("--prompts", type=Path, help="as bench_end_to_end.py takes them (default: the demo's)")
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2-135m")
    parser.add_argument("--arms", default="none,Retrieval,Auto")
    parser.add_argument("--recorder", default="Auto", help="the arm that records")
    parser.add_argument("--per-task", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--spec-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mode", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, help="keep logs and trace in this directory")
    parser.add_argument("--ab", type=Path, metavar="RESULTS", help="of `specplug ab`, instead of engines")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="that an arm of that comparison recorded")
    args = parser.parse_args()
    if (args.ab is None) != (args.traces is None):
        parser.error("--ab and --traces go together")
    if args.ab is not None:
        measured = of_comparison(args.ab)
        # Of one server each.
        servers = [files.read([path]).requests for path in sorted(args.traces.glob(files.PATTERN))]
        predicted = predict(measured, servers)
        config = {"measured": "specplug ab", "servers": len(servers), "spec_tokens": [m.limit for m in measured]}
        config["serve_args"] = ab_results.read(args.ab)[0].facts.get("serve_args")
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.keep or Path(temporary)
            folder.mkdir(exist_ok=True)
            results = measure(args, folder, folder / "traces")
            for result in results:
                if result.failure:
                    print(f"error: {result.arm.name}: {result.failure}", file=sys.stderr)
                    return 1
            measured = of_engines(args, results)
            predicted = predict(measured, [files.read([folder / "traces"]).requests])
        config = {k: getattr(args, k) for k in ("recorder", "per_task", "max_tokens", "spec_tokens", "dtype", "mode")}
        config["prompts"] = args.prompts.name if args.prompts else "demo"
    rows: list[dict[str, Any]] = []
    print(
        f"{'':<12}{'MAT':>7}{'replayed':>10}{'tokens/s':>10}{'replayed':>10}{'speed-up':>10}{'predicted':>11}{'error':>8}"
    )
    for live in measured:
        ours = predicted[live.name]
        error = ours["speedup"] / live.speedup - 1.0
        print(
            f"{live.name:<12}{live.mat:>7.2f}{ours['mat']:>10.2f}{live.tokens_per_s:>10.1f}"
            f"{ours['tokens_per_s']:>10.1f}{live.speedup:>10.3f}{ours['speedup']:>11.3f}{error:>+8.1%}"
        )
        figures = {
            "mat measured": (live.mat, "tokens/step"),
            "mat predicted": (ours["mat"], "tokens/step"),
            "tokens_per_s measured": (live.tokens_per_s, "tokens/s"),
            "tokens_per_s predicted": (ours["tokens_per_s"], "tokens/s"),
            "speedup measured": (live.speedup, "ratio"),
            "speedup measured, low": (live.low, "ratio"),
            "speedup measured, high": (live.high, "ratio"),
            "speedup predicted": (ours["speedup"], "ratio"),
            "error": (error, "share"),
        }
        shared = {"benchmark": "trace_prediction", "provider": live.name, "seed": args.seed}
        shared["config"] = json.dumps(config)
        rows += [{**shared, "metric": m, "unit": unit, "value": f"{v:.4g}"} for m, (v, unit) in figures.items()]
    if args.csv:
        write_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
