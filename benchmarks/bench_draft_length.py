"""Choosing one draft length per step, on simulated servers: against every fixed length, and what the choice costs.

    python benchmarks/bench_draft_length.py [--csv FILE] [--steps N] [--seeds N]

Servers (``tests/draft_servers.py``): a GPU whose rows are free up to 256, the same without CUDA graphs above 128 rows,
and a CPU where every row costs; nothing here was measured on a GPU. Texts: ``mixed`` is predictable in stretches,
``trees`` has drafts that branch, of ``hopeless`` next to nothing is accepted, of ``easy`` nearly all. ``speed`` is
tokens per second over those without drafts, and starts with nothing known. ``best_fixed`` is the one length that would
have been best, in hindsight; ``oracle`` is the best one for each load, in hindsight. All see the same texts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from replay import write_rows
from vllm_specplug.proposers.draft_length import DraftLength, lengths_up_to

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from draft_servers import Chains, Fixed, Server, Trees, cpu, gpu, gpu_without_graphs, rate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "draft_length.csv"
COSTS = (gpu, gpu_without_graphs, cpu)
TEXTS = {
    "mixed": Chains,
    "trees": Trees,
    "hopeless": lambda: Chains(0.05, 0.01),
    "easy": lambda: Chains(0.95, 0.6),
}
LENGTHS = lengths_up_to(31)


def scenarios(steps: int) -> dict[str, list[tuple[int, int]]]:
    """Requests and steps, in phases."""
    one = {f"n={n}": [(n, steps)] for n in (1, 4, 16, 64)}
    return one | {
        "swing": [(1, steps // 5), (32, steps // 5)] * 2 + [(1, steps // 5)],
        "walk": [(n, steps // 15) for n in (8, 9, 12, 7, 20, 3, 1, 2)] * 2,
    }


def row(provider: str, task: str, metric: str, unit: str, values: list[float], config: dict[str, Any]) -> Any:
    """One row: median, and quantiles over seeds or calls."""
    low, middle, high = np.percentile(values, [20, 50, 80])
    return {
        "benchmark": "draft_length",
        "provider": provider,
        "task": task,
        "metric": metric,
        "unit": unit,
        "value": f"{middle:.4g}",
        "p20": f"{low:.4g}",
        "p80": f"{high:.4g}",
        "config": json.dumps(config, sort_keys=True),
        "seed": 0,
    }


def speeds(steps: int, seeds: int) -> list[dict[str, Any]]:
    """Simulate everything."""
    rows = []
    print(f"{'server':<20}{'texts':<10}{'load':<7}{'best fixed':>11}{'oracle':>8}{'chosen':>8}{'/best':>7}{'/none':>7}")
    for cost in COSTS:
        for name, texts in TEXTS.items():
            for load, phases in scenarios(steps).items():
                found: dict[str, list[float]] = {"best_fixed": [], "oracle": [], "DraftLength": []}
                for seed in range(seeds):
                    per_phase: list[list[float]] = []
                    fixed = []
                    for length in LENGTHS:
                        server = Server(cost, texts(), seed)
                        per_phase.append([server.run(Fixed(length), *phase) for phase in phases])
                        fixed.append(_overall(per_phase[-1], phases))
                    found["best_fixed"].append(max(fixed) / fixed[0])
                    found["oracle"].append(_overall(np.max(per_phase, axis=0).tolist(), phases) / fixed[0])
                    found["DraftLength"].append(
                        rate(Server(cost, texts(), seed), DraftLength(LENGTHS), phases) / fixed[0]
                    )
                config = {"lengths": LENGTHS, "load": load, "seeds": seeds, "steps": steps, "texts": name}
                for provider, values in found.items():
                    rows.append(row(provider, cost.__name__, "speed", "ratio", values, config))
                best, oracle, chosen = (float(np.median(values)) for values in found.values())
                ratios = np.divide(found["DraftLength"], found["best_fixed"])
                print(
                    f"{cost.__name__:<20}{name:<10}{load:<7}{best:>11.3f}{oracle:>8.3f}{chosen:>8.3f}"
                    f"{ratios.mean():>7.3f}{min(found['DraftLength']):>7.3f}"
                )
    return rows


def _overall(speed: list[float], phases: list[tuple[int, int]]) -> float:
    """As :func:`draft_servers.rate`, of the speeds of the phases."""
    work = [requests * steps for requests, steps in phases]
    return sum(work) / sum(w / s for w, s in zip(work, speed, strict=True))


def costs() -> list[dict[str, Any]]:
    """What a step costs: choosing, and learning from it."""
    rows = []
    for requests in (1, 16, 64, 256):
        server, policy = Server(gpu, Chains(), 0), DraftLength(LENGTHS)
        server.run(policy, requests, 200)
        emitted = (1 + Chains().accepted(server.rng, requests, 7)).tolist()
        taken: dict[str, list[float]] = {"choose": [], "observe": []}
        for _ in range(40):
            start = time.perf_counter()
            for _ in range(50):
                policy.choose(requests)
            middle = time.perf_counter()
            for _ in range(50):
                policy.observe(7, emitted, 0.01)
            taken["choose"].append((middle - start) / 50 * 1e6)
            taken["observe"].append((time.perf_counter() - middle) / 50 * 1e6)
        for call, values in taken.items():
            rows.append(row("DraftLength", call, "call", "us", values, {"requests": requests}))
            print(f"{call} with {requests} requests: {np.median(values):.1f} us")
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS, help="add the results to this file")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    rows = costs() + speeds(args.steps, args.seeds)
    write_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
