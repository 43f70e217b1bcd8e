"""How often the verdict of a comparison is right: on recorded times of an engine's steps, and on made-up ones.

    python benchmarks/bench_ab_verdict.py [--times 400] [--csv FILE]
    python benchmarks/bench_ab_verdict.py --like RESULTS

The first serves like arms from ``tests/data/ab_step_times.json`` (``tests/ab_runs.py:replay``), one of them slowed by
a known factor, and counts what is said of it; and it counts how often a 95% interval holds the truth where cells,
requests and replies vary by known amounts. The second judges every pair of arms in the results folder of a real run of
arms that are alike, such as ``specplug ab MODEL --arm a=none --arm b=none --arm c=none``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from replay import write_rows

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

import ab_runs  # noqa: E402

from vllm_specplug.ab import results  # noqa: E402
from vllm_specplug.ab.intervals import paired_ratio  # noqa: E402
from vllm_specplug.ab.results import Load  # noqa: E402
from vllm_specplug.ab.verdict import judge  # noqa: E402

SLOWER = (1.0, 1.02, 1.03, 1.05, 1.08)
#: Loads and sizes of runs; ``offset``: how unequal like servers are, as a standard deviation.
RUNS: tuple[dict[str, Any], ...] = (
    {"load": Load(1), "requests": 17, "per_block": 2, "repeats": 2, "offset": 0.003},
    {"load": Load(1), "requests": 17, "per_block": 2, "repeats": 2, "offset": 0.01},
    {"load": Load(1), "requests": 48, "per_block": 6, "repeats": 2, "offset": 0.003},
    {"load": Load(8), "requests": 17, "per_block": 17, "repeats": 2, "offset": 0.003},
    {"load": Load(8), "requests": 17, "per_block": 8, "repeats": 2, "offset": 0.003},
    {"load": Load(8), "requests": 17, "per_block": 8, "repeats": 3, "offset": 0.003},
    {"load": Load(8), "requests": 48, "per_block": 8, "repeats": 2, "offset": 0.003},
    {"load": Load(8), "requests": 48, "per_block": 8, "repeats": 3, "offset": 0.003},
    {"load": Load(8), "requests": 48, "per_block": 16, "repeats": 2, "offset": 0.003},
)
#: Blocks, repeats, requests of a block; standard deviations of cells, replies, and requests' gains.
DESIGNS = (
    (8, 2, 2, 0.01, 0.03, 0.0),
    (8, 2, 2, 0.03, 0.03, 0.0),
    (8, 2, 2, 0.01, 0.03, 0.2),
    (2, 2, 8, 0.01, 0.03, 0.0),
    (2, 3, 8, 0.03, 0.03, 0.1),
    (1, 3, 17, 0.01, 0.03, 0.0),
    (8, 1, 8, 0.01, 0.03, 0.2),
    (16, 3, 4, 0.01, 0.03, 0.2),
)


def replayed(times: int) -> list[dict[str, Any]]:
    """What is said of the second of two arms that are alike, or of which it is slower by a known factor."""
    rows = []
    for run in RUNS:
        for slower in SLOWER:
            said: Counter[str] = Counter()
            halves = []
            for seed in range(times):
                found = judge(*ab_runs.replay(np.random.default_rng(seed), slower, **run))
                result = found.results[1]
                said[str(result.speed)] += 1
                speed = result.paired.speed if result.paired is not None else None
                if speed is not None and speed.low is not None and speed.high is not None:
                    halves.append(np.log(speed.high / speed.low) / 2)
            settings = {name: value for name, value in run.items() if name != "load"}
            config = {**settings, "slower": slower, "times": times}
            shares = {word: said[word] / times for word in ("same", "slower", "faster", "untold")}
            print(f"{run['load']}, {config}: {shares}", flush=True)
            rows += [row(str(run["load"]), f"said_{word}", "share", share, config) for word, share in shares.items()]
            p20, half, p80 = np.percentile(halves, (20, 50, 80))
            rows.append(row(str(run["load"]), "half_interval", "log ratio", half, config, p20, p80))
    return rows


def judged(folder: Path) -> None:
    """Print what is said of every pair of a real run's arms, which should be alike, either of them the control."""
    plan, cells = results.read(folder)
    for control, arm in itertools.permutations(plan.arms, 2):
        pair = [c for c in cells if c.arm in (control.name, arm.name)]
        for result in judge(dataclasses.replace(plan, arms=[control, arm]), pair).results:
            if not result.control:
                print(f"{arm.name} against {control.name}, {result.load}: {result.sentence}")


def covered(times: int) -> list[dict[str, Any]]:
    """How often the interval of two equal arms holds 1."""
    rows = []
    for design in DESIGNS:
        inside, halves = 0, []
        for seed in range(times):
            estimate = paired_ratio(*ab_runs.crossed(*design, seed))
            if estimate is not None and estimate.low is not None and estimate.high is not None:
                inside += estimate.low <= 1 <= estimate.high
                halves.append(np.log(estimate.high / estimate.low) / 2)
        names = ("blocks", "repeats", "requests", "cell", "reply", "gain")
        config = {**dict(zip(names, design, strict=True)), "times": times}
        print(f"{config}: {inside / times:.3f} hold the truth, half width {np.median(halves):.3f}", flush=True)
        rows.append(row("made up", "coverage", "share", inside / times, config))
        p20, half, p80 = np.percentile(halves, (20, 50, 80))
        rows.append(row("made up", "half_interval", "log ratio", half, config, p20, p80))
    return rows


def row(
    task: str, metric: str, unit: str, value: float, config: dict[str, Any], p20: float | None = None,
    p80: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A row for :func:`replay.write_rows`."""
    spread = {name: f"{x:.4g}" for name, x in (("p20", p20), ("p80", p80)) if x is not None}
    return {
        "benchmark": "ab_verdict",
        "provider": "verdict",
        "task": task,
        "metric": metric,
        "unit": unit,
        "value": f"{value:.4g}",
        "config": json.dumps(config),
        "seed": 0,
        **spread,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="How often the verdict of a comparison is right.")
    parser.add_argument("--times", type=int, default=400, help="comparisons drawn (default: %(default)s)")
    parser.add_argument("--like", type=Path, metavar="RESULTS", help="judge a real run of like arms instead")
    parser.add_argument("--csv", type=Path, default=REPOSITORY / "benchmarks" / "results" / "ab_verdict.csv")
    args = parser.parse_args()
    if args.like is not None:
        judged(args.like)
        return 0
    write_rows(args.csv, replayed(args.times) + covered(2 * args.times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
