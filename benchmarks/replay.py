"""Replay recorded greedy outputs through a proposer: what it would have drafted, without any model.

    python benchmarks/replay.py --trace TRACE.jsonl.gz [--proposer Retrieval] [--option retrieval.min_prob=0.1 ...]
                                [--limit 16] [--csv benchmarks/results/replay.csv]

A trace is JSON lines (gzip or plain): ``cat`` (task), ``prompt`` and ``out`` (token ids), optionally ``topk`` (per
output token, pairs of token id and log-probability). Requests run one after another in file order; what the proposer
learned stays. Greedy decoding is deterministic, so the recorded output is what a server would emit with any drafts.

Counting. The first output token comes from the prompt's own step, which has no draft: neither counts. A verify step
is one target step after that; it emits the accepted drafts and one token more. ``MAT`` = tokens emitted by verify
steps / verify steps (no drafts: 1.00); ``MAT all`` = all output tokens / verify steps, the looser figure some
reports give. A step may draft at most ``--limit`` nodes, and never past the end of the recorded output, as an engine
that knows ``max_tokens``. ``us`` are microseconds per verify step at batch 1; ``ECE`` is the expected calibration error
of the nodes' probabilities (20 equal bins). Trees are walked from the root, a chain being the tree it is.

Proposers that want the target's top-k get the recorded one, but only for the rows the recording knows: the root and
the accepted nodes. Rejected rows are left out of the step.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vllm_specplug.proposers.base import DraftForest, Proposer, Request, StepResult

from vllm_specplug import registry
from vllm_specplug.ab import environment
from vllm_specplug.options import OptionError

BINS = 20
FIELDS = ("benchmark", "provider", "task", "metric", "unit", "value", "p20", "p80", "config")
FIELDS += ("machine", "versions", "git_sha", "seed", "timestamp")


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a trace; ``topk_*`` are ``[len(output), k]`` or None."""

    task: str
    prompt: np.ndarray
    output: np.ndarray
    topk_ids: np.ndarray | None
    topk_logprobs: np.ndarray | None


@dataclass(slots=True)
class Tally:
    """Sums over the requests of one task."""

    requests: int = 0
    tokens: int = 0
    steps: int = 0
    drafts: int = 0
    accepted: int = 0
    propose_s: float = 0.0
    observe_s: float = 0.0
    bins: np.ndarray = field(default_factory=lambda: np.zeros((BINS, 3)))

    def __iadd__(self, other: Tally) -> Tally:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def metrics(self) -> dict[str, tuple[float, str]]:
        """Name: (value, unit)."""
        steps = max(self.steps, 1)
        count, claimed, hit = self.bins.T
        return {
            "mat": ((self.steps + self.accepted) / steps, "tokens/step"),
            "mat_all": (self.tokens / steps, "tokens/step"),
            "drafts": (self.drafts / steps, "nodes/step"),
            "accepted": (self.accepted / max(self.drafts, 1), "share"),
            "propose": (self.propose_s / steps * 1e6, "us/step"),
            "observe": (self.observe_s / steps * 1e6, "us/step"),
            "ece": (float(np.abs(claimed - hit).sum() / max(count.sum(), 1)), "probability"),
        }


def read_trace(path: Path, topk: bool) -> list[Recorded]:
    """All requests of a trace."""
    requests = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            data = json.loads(line)
            pairs = np.array(data["topk"]) if topk and "topk" in data else None
            requests.append(
                Recorded(
                    data["cat"],
                    np.array(data["prompt"], np.int32),
                    np.array(data["out"], np.int32),
                    None if pairs is None else pairs[..., 0].astype(np.int32),
                    None if pairs is None else pairs[..., 1].astype(np.float32),
                )
            )
    return requests


def accepted_path(forest: DraftForest, truth: np.ndarray) -> list[int]:
    """Nodes of a one-request forest along the longest path equal to the start of ``truth``."""
    path: list[int] = []
    children = {(int(p), int(t)): j for j, (p, t) in enumerate(zip(forest.parents, forest.tokens, strict=True))}
    node = -1
    for token in truth:
        node = children.get((node, int(token)), -2)
        if node < 0:
            break
        path.append(node)
    return path


def _step(recorded: Recorded, at: int, accepted: int, drafted: int, topk: bool) -> StepResult:
    """The step that emits ``accepted + 1`` tokens from position ``at`` of the output."""
    end = at + accepted + 1
    counts = [np.array([x], np.int32) for x in (0, drafted, accepted)]
    rows: dict[str, Any] = {}
    if topk and recorded.topk_ids is not None and recorded.topk_logprobs is not None:
        before = recorded.output[at - 1 : at] if at else recorded.prompt[-1:]
        rows = {
            "row_tokens": np.concatenate([before, recorded.output[at : end - 1]]),
            "row_offsets": np.array([0, accepted + 1], np.int32),
            "row_parents": np.arange(-1, accepted, dtype=np.int32),
            "topk_ids": recorded.topk_ids[at:end, :8],
            "topk_logprobs": recorded.topk_logprobs[at:end, :8],
        }
    offsets = np.array([0, accepted + 1], np.int32)
    return StepResult(counts[0], recorded.output[at:end], offsets, counts[1], counts[2], **rows)


def replay_request(proposer: Proposer, recorded: Recorded, name: str, limit: int) -> Tally:
    """Replay one request in slot 0."""
    tally = Tally(requests=1, tokens=len(recorded.output))
    size = len(recorded.output)
    proposer.add_request(Request(0, name, recorded.prompt, max_tokens=len(recorded.prompt) + size))
    slots = np.zeros(1, np.int32)
    clock = time.perf_counter
    proposer.observe(_step(recorded, 0, 0, 0, proposer.wants_topk))
    at = 1
    while at < size:
        limits = np.array([limit if at < size - 1 else 0], np.int32)
        start = clock()
        forest = proposer.propose(slots, limits)
        tally.propose_s += clock() - start
        path = accepted_path(forest, recorded.output[at : size - 1])
        drafted = len(forest.tokens)
        step = _step(recorded, at, len(path), drafted, proposer.wants_topk)
        start = clock()
        proposer.observe(step)
        tally.observe_s += clock() - start
        tally.steps += 1
        tally.drafts += drafted
        tally.accepted += len(path)
        hits = np.zeros(drafted)
        hits[path] = 1
        where = np.minimum((forest.probs * BINS).astype(np.int64), BINS - 1)
        np.add.at(tally.bins, where, np.stack([np.ones(drafted), forest.probs, hits], axis=1))
        at += len(path) + 1
    proposer.remove_request(0)
    return tally


def replay(proposer: Proposer, trace: list[Recorded], limit: int) -> dict[str, Tally]:
    """Tallies per task, in order of appearance, and ``total``."""
    tallies: dict[str, Tally] = {}
    total = Tally()
    for number, recorded in enumerate(trace):
        tally = replay_request(proposer, recorded, str(number), limit)
        tallies.setdefault(recorded.task, Tally())
        tallies[recorded.task] += tally
        total += tally
    return {**tallies, "total": total}


def parse_settings(settings: list[str]) -> dict[str, dict[str, Any]]:
    """``["retrieval.min_prob=0.1"]`` as the nested options vLLM's ``additional_config`` would hold."""
    tree: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, dot, name = path.partition(".")
        if not (equals and dot):
            raise OptionError(f"--option {setting!r} is not SECTION.NAME=VALUE")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        tree.setdefault(section, {})[name] = value
    return tree


def build(name: str, settings: dict[str, dict[str, Any]]) -> tuple[Proposer, Any]:
    """A warm proposer by its registered name, and its options."""
    entry = registry.find(name)
    user = registry.parse_options({"specplug": settings})
    proposer = user.build(entry)
    proposer.warm_up()
    return proposer, user.section(entry)


def git_sha() -> str:
    """Commit of this checkout, ``-dirty`` if tracked files differ."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a tidy CSV; a row of the same benchmark, provider, task, metric and config replaces the older one."""
    shared = {
        "machine": environment.cpu_model(),
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
