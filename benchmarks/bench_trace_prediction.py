"""How well replaying a trace predicts the speed-up that is measured: real engines against `specplug trace replay`.

    python benchmarks/bench_trace_prediction.py --prompts spec_bench.jsonl [--per-task 4] [--mode eager|compiled]

Engines without speculation, with `Retrieval` and with `Auto` (``--arms``) answer the same prompts, one at a time, all
engines taking turns. The one named by ``--recorder`` records its requests, with the target's top-k; they are replayed
through each proposer, with the step times that the trace has. Measured is decode time, from a request's first token to
its last, against no speculation in the same run; predicted is what the replay says. The warm-up prompts of the engines
are replayed as well and not counted, as in the measurement.

`error` is predicted over measured speed-up, minus 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_end_to_end import into_blocks, read_prompts, sample
from replay import write_rows

from vllm_specplug.ab import arms, report
from vllm_specplug.trace import files, step_times
from vllm_specplug.trace.replay import Replay, build, speedup, total

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


def predict(args: argparse.Namespace, traces: Path) -> dict[str, dict[str, float]]:
    """Figures by proposer, as replaying has them."""
    requests = files.read([traces]).requests
    times = step_times.learn(requests)
    warm_up, counted = requests[: len(arms.WARM_UP_PROMPTS)], requests[len(arms.WARM_UP_PROMPTS) :]
    plain = Replay(None, 0, times).run(counted)
    print(f"{len(counted)} requests; {times.source}, host {1e6 * times.host_s:.0f} us")
    found = {}
    for name in args.arms.split(","):
        proposer = None if name == "none" else build(name, {})[0]
        run = Replay(proposer, args.spec_tokens, times)
        run.run(warm_up)
        tallies = run.run(counted)
        whole = total(tallies)
        figures = {metric: value for metric, (value, _) in whole.metrics().items()}
        figures["tokens_per_s"] = whole.decoded / whole.seconds
        figures["speedup"], figures["low"], figures["high"] = speedup(tallies, plain)
        found[name.lower()] = figures
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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        traces = folder / "traces"
        results = measure(args, folder, traces)
        for result in results:
            if result.failure:
                print(f"error: {result.arm.name}: {result.failure}", file=sys.stderr)
                return 1
        predicted = predict(args, traces)
    config = {k: getattr(args, k) for k in ("recorder", "per_task", "max_tokens", "spec_tokens", "dtype", "mode")}
    rows: list[dict[str, Any]] = []
    print(
        f"{'':<12}{'MAT':>7}{'replayed':>10}{'tokens/s':>10}{'replayed':>10}{'speed-up':>10}{'predicted':>11}{'error':>8}"
    )
    for result in results:
        live = report.figures(result.blocks, results[0].blocks, args.seed)
        ours = predicted[result.arm.name]
        error = ours["speedup"] / live.speedup.value - 1.0
        print(
            f"{result.arm.name:<12}{live.mat:>7.2f}{ours['mat']:>10.2f}{live.tokens_per_s:>10.1f}"
            f"{ours['tokens_per_s']:>10.1f}{live.speedup.value:>10.3f}{ours['speedup']:>11.3f}{error:>+8.1%}"
        )
        figures = {
            "mat measured": (live.mat, "tokens/step"),
            "mat predicted": (ours["mat"], "tokens/step"),
            "tokens_per_s measured": (live.tokens_per_s, "tokens/s"),
            "tokens_per_s predicted": (ours["tokens_per_s"], "tokens/s"),
            "speedup measured": (live.speedup.value, "ratio"),
            "speedup measured, low": (live.speedup.low, "ratio"),
            "speedup measured, high": (live.speedup.high, "ratio"),
            "speedup predicted": (ours["speedup"], "ratio"),
            "error": (error, "share"),
        }
        shared = {"benchmark": "trace_prediction", "provider": result.arm.name, "seed": args.seed}
        shared["config"] = json.dumps(config | {"prompts": args.prompts.name if args.prompts else "demo"})
        rows += [{**shared, "metric": m, "unit": unit, "value": f"{v:.4g}"} for m, (v, unit) in figures.items()]
    if args.csv:
        write_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
