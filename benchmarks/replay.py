"""Replay recorded outputs through a proposer: what it would have drafted, without any model.

    python benchmarks/replay.py --trace TRACE.jsonl.gz [--proposer Retrieval] [--option retrieval.min_prob=0.1 ...]
                                [--limit 16] [--csv benchmarks/results/replay.csv]

:mod:`vllm_specplug.trace.replay` says how it is done and counted, :mod:`vllm_specplug.trace.files` what a trace is.
Here steps take no time, so that budgets draft whatever they may. ``us`` are microseconds per verify step at batch 1;
``ECE`` is the expected calibration error of the nodes' probabilities (20 equal bins).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_specplug.proposers.base import Proposer

from vllm_specplug.ab import environment
from vllm_specplug.options import OptionError
from vllm_specplug.trace import files
from vllm_specplug.trace.files import Recorded
from vllm_specplug.trace.replay import Replay, Tally, build, by_task, parse_settings

FIELDS = ("benchmark", "provider", "task", "metric", "unit", "value", "p20", "p80", "config")
FIELDS += ("machine", "versions", "git_sha", "seed", "timestamp")


def read_trace(path: Path, topk: bool) -> list[Recorded]:
    """All requests of a trace."""
    return files.read([path], topk).requests


def replay(proposer: Proposer, trace: list[Recorded], limit: int) -> dict[str, Tally]:
    """Tallies per task, in order of appearance, and ``total``."""
    return by_task(trace, Replay(proposer, limit).run(trace))


def git_sha() -> str:
    """Commit of this checkout, ``-dirty`` if tracked files differ."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def write_rows(path: Path, rows: list[dict[str, Any]], machine: str | None = None) -> None:
    """Add rows to a tidy CSV; a row of the same benchmark, provider, task, metric and config replaces the older one.

    ``machine``: what was measured; None: this processor.
    """
    shared = {
        "machine": machine or environment.cpu_model(),
        "versions": json.dumps({k: v for k, v in environment.versions().items() if v}),
        "git_sha": git_sha(),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    key = ("benchmark", "provider", "task", "metric", "config")
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {tuple(row[k] for k in key): row for row in csv.DictReader(file)}
    for row in rows:
        full = {"p20": "", "p80": "", "task": "", "seed": "", **row, **shared}
        kept[tuple(str(full[k]) for k in key)] = full
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Replay a trace of greedy outputs through a proposer.")
    parser.add_argument("--trace", type=Path, required=True, help="JSON lines, gzip if it ends in .gz")
    parser.add_argument("--proposer", default="Retrieval", help="registered name")
    parser.add_argument("--option", action="append", default=[], metavar="SECTION.NAME=VALUE")
    parser.add_argument("--limit", type=int, default=16, help="most draft nodes per step")
    parser.add_argument("--first", type=int, help="only the first N requests")
    parser.add_argument("--csv", type=Path, help="add the results to this file")
    args = parser.parse_args()
    try:
        proposer, section = build(args.proposer, parse_settings(args.option))
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    trace = read_trace(args.trace, proposer.wants_topk)[: args.first]
    tallies = replay(proposer, trace, args.limit)
    print(f"{args.proposer} {section}, limit {args.limit}, {len(trace)} requests; {proposer.stats()}")
    print(f"{'task':<16}{'MAT':>7}{'MAT all':>9}{'drafts':>8}{'accepted':>10}{'propose':>10}{'observe':>10}{'ECE':>7}")
    rows = []
    config = json.dumps({"limit": args.limit, "trace": args.trace.name, "first": args.first, "options": args.option})
    for task, tally in tallies.items():
        m = {name: value for name, (value, _) in tally.metrics().items()}
        print(
            f"{task:<16}{m['mat']:>7.3f}{m['mat_all']:>9.3f}{m['drafts']:>8.2f}{m['accepted']:>10.3f}"
            f"{m['propose']:>10.1f}{m['observe']:>10.1f}{m['ece']:>7.3f}"
        )
        rows += [
            {
                "benchmark": "replay",
                "provider": args.proposer,
                "task": task,
                "metric": name,
                "unit": unit,
                "value": f"{value:.5g}",
                "config": config,
            }
            for name, (value, unit) in tally.metrics().items()
        ]
    if args.csv:
        write_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
