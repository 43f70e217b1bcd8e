"""All length policies on the same recorded outputs and the same drafts, under several curves of step time; no model.

    python benchmarks/bench_length_policies.py --trace TRACE.jsonl.gz [--first N] [--limit 16] [--csv FILE]
                                               [--option auto.tree=false ...]

What is drafted. What `Auto` has under its budget goes through every request token by token and drafts at each place in
the output (it learns from the recorded top-k of every emitted token, as it would whatever was drafted). Policies are
then replayed on these drafts, so all see the same; only what they keep differs. Requests are in a random order (seed
0): the trace is sorted by task, and both halves should have all.

Curves. Seconds of a step by rows (requests + draft rows kept): `cpu` 16.5 ms and 0.65 ms for every row after the first;
`steep`: a row costs 12% of a one-row step; `flat`: free until 64 rows, then 0.4% each. At batch 16, that many requests
run in lockstep, each place taken by the next request when one ends. A policy is told the true curve, and learns from
true times.

`speed-up` is tokens emitted by verify steps per second of the curve, over the same without drafts; drafting itself
costs nothing here. `mat` and `drafts` are per request and step. `tuned`: the parameters of a small grid that are best
on the first half of the requests, measured on the second half. `choose` is the time of one call for 64 requests of 16
nodes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from replay import read_trace, write_rows
from vllm_specplug.proposers.adaptive_length import AdaptiveLength
from vllm_specplug.proposers.base import DraftForest, Proposer, Request
from vllm_specplug.proposers.length_policies import POLICIES, Drafted, Outcome, Policy, make_policy

from vllm_specplug.trace.files import Recorded
from vllm_specplug.trace.replay import accepted_path, build, parse_settings, step_of

CURVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cpu": lambda rows: 16.5e-3 + 0.65e-3 * (rows - 1),
    "steep": lambda rows: 10e-3 * (1 + 0.12 * (rows - 1)),
    "flat": lambda rows: 10e-3 * (1 + 0.004 * np.maximum(0, rows - 64)),
}
BATCHES = (1, 16)
GRIDS: dict[str, dict[str, list[float]]] = {
    "marginal": {},
    "fixed": {"length": [0, 1, 2, 3, 4, 6, 8, 12, 16]},
    "specdec++": {"threshold": [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]},
    "svip": {"threshold": [0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45]},
    "thompson": {"a": [1, 4], "b": [1, 4]},
    "goodput": {"start": [0.3, 0.5, 0.7], "window": [16, 64, 256]},
    "opt_tree": {"nodes": [2, 4, 8, 16], "threshold": [0.0, 0.2, 0.5]},
    "suffix_factor": {"factor": [0.5, 1, 2, 4], "offset": [0, 1], "min_prob": [0.05, 0.1, 0.2, 0.4]},
}


class Place(NamedTuple):
    """What was drafted after some token of an output, and which of it is right."""

    forest: DraftForest
    path: np.ndarray  # nodes of the accepted path


@dataclass
class Run:
    """Sums over the steps of a replay."""

    tokens: int = 0
    visits: int = 0  # steps, each request's counted
    drafts: int = 0
    seconds: float = 0.0

    def metrics(self, plain: Run) -> dict[str, tuple[float, str]]:
        """Name: (value, unit); ``plain``: the same requests without drafts."""
        return {
            "mat": (self.tokens / self.visits, "tokens/step"),
            "drafts": (self.drafts / self.visits, "nodes/step"),
            "speedup": (self.tokens / self.seconds * plain.seconds / plain.tokens, "ratio"),
        }


def draft_everywhere(proposer: Proposer, recorded: Recorded, limit: int) -> list[Place]:
    """The drafts after every output token but the last, whose step can have none."""
    size = len(recorded.output)
    proposer.add_request(Request(0, "0", recorded.prompt, max_tokens=len(recorded.prompt) + size))
    places = []
    for at in range(1, size):
        proposer.observe(step_of(recorded, at - 1, 0, 0, proposer.wants_topk))
        limits = np.array([limit if at < size - 1 else 0], np.int32)
        forest = proposer.propose(np.zeros(1, np.int32), limits)
        path = np.array(accepted_path(forest, recorded.output[at : size - 1]), np.int64)
        places.append(Place(forest, path))
    proposer.observe(step_of(recorded, size - 1, 0, 0, proposer.wants_topk))
    proposer.remove_request(0)
    return places


def batch(places: list[Place], slots: np.ndarray) -> Drafted:
    """The drafts of all requests of a step."""
    forests = [place.forest for place in places]
    matched = [0 if f.matched is None else int(f.matched[0]) for f in forests]
    return Drafted(
        np.concatenate([f.probs for f in forests]),
        np.concatenate([f.parents for f in forests]),
        np.cumsum([0, *(len(f.tokens) for f in forests)], dtype=np.int32),
        slots,
        np.array(matched, np.int32),
    )


def simulate(policy: Policy, requests: list[list[Place]], width: int, curve: np.ndarray) -> Run:
    """Replay requests, ``width`` at a time, under a policy. ``curve[r]``: seconds of a step of r rows."""
    run = Run()
    waiting = iter(requests)
    lanes = dict(enumerate(itertools.islice(waiting, width)))
    at = dict.fromkeys(lanes, 0)
    while lanes:
        slots = np.array(list(lanes), np.int32)
        places = [lanes[lane][at[lane]] for lane in lanes]
        drafted, n = batch(places, slots), len(places)
        keep = policy.choose(drafted, curve[n:])
        accepted = np.zeros(n, np.int32)
        for i, place in enumerate(places):
            kept = keep[drafted.offsets[i] + place.path]
            accepted[i] = len(kept) if kept.all() else int(np.argmin(kept))
        sizes = np.diff(np.concatenate([[0], np.cumsum(keep)])[drafted.offsets]).astype(np.int32)
        seconds = float(curve[n + int(keep.sum())])
        policy.learn(Outcome(slots, sizes, accepted, accepted + 1, seconds, float(curve[n])))
        run.tokens += int(accepted.sum()) + n
        run.visits += n
        run.drafts += int(keep.sum())
        run.seconds += seconds
        for i, lane in enumerate(list(lanes)):
            at[lane] += int(accepted[i]) + 1
            if at[lane] >= len(lanes[lane]):
                policy.forget(lane)
                following = next(waiting, None)
                if following is None:
                    del lanes[lane]
                else:
                    lanes[lane], at[lane] = following, 0
    return run


def choose_us(name: str, requests: int = 64, nodes: int = 16, repeats: int = 300) -> tuple[float, float, float]:
    """Microseconds of one ``choose``: p20, median, p80. Random chains, a linear curve with 0.4% per row."""
    rng = np.random.default_rng(0)
    probs = np.cumprod(rng.uniform(0.4, 1.0, (requests, nodes)), axis=1).astype(np.float32)
    drafted = Drafted(
        probs.reshape(-1),
        np.tile(np.arange(-1, nodes - 1, dtype=np.int32), requests),
        np.arange(0, requests * nodes + 1, nodes, dtype=np.int32),
        np.arange(requests, dtype=np.int32),
        rng.integers(0, 20, requests).astype(np.int32),
    )
    seconds = 0.01 * (1 + 0.004 * np.arange(requests * nodes + 1))
    policy, times = make_policy(name), []
    for _ in range(repeats):
        start = time.perf_counter()
        policy.choose(drafted, seconds)
        times.append((time.perf_counter() - start) * 1e6)
    p20, median, p80 = np.percentile(times[10:], (20, 50, 80))
    return float(p20), float(median), float(p80)


def grid(name: str) -> list[dict[str, float]]:
    """All combinations of a policy's parameters."""
    axes = GRIDS[name]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def compare(requests: list[list[Place]], width: int, curve: np.ndarray) -> dict[str, dict[str, Any]]:
    """For each policy the metrics with defaults on all requests, and on the second half as it is and tuned."""
    half = len(requests) // 2
    parts = {"all": requests, "first": requests[:half], "second": requests[half:]}
    plain = {part: simulate(make_policy("fixed", length=0), some, width, curve) for part, some in parts.items()}

    def measure(name: str, part: str, parameters: dict[str, float]) -> dict[str, tuple[float, str]]:
        return simulate(make_policy(name, **parameters), parts[part], width, curve).metrics(plain[part])

    results = {}
    for name in POLICIES:
        best = max(grid(name), key=lambda p: measure(name, "first", p)["speedup"][0])
        results[name] = {
            "default": measure(name, "all", {}),
            "second half": measure(name, "second", {}),
            "tuned, second half": measure(name, "second", best),
            "best": best,
        }
    return results


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Length policies compared on a recorded trace.")
    parser.add_argument("--trace", type=Path, required=True, help="JSON lines, gzip if it ends in .gz")
    parser.add_argument("--first", type=int, help="only that many requests, of all tasks")
    parser.add_argument("--limit", type=int, default=16, help="most nodes drafted per request and step")
    parser.add_argument("--option", action="append", default=[], metavar="SECTION.NAME=VALUE", help="of the proposer")
    parser.add_argument("--csv", type=Path, help="add the results to this file")
    args = parser.parse_args()

    auto, _ = build("Auto", parse_settings(["auto.min_prob=0.0", *args.option]))
    assert isinstance(auto, AdaptiveLength)
    proposer = auto.inner
    trace = read_trace(args.trace, proposer.wants_topk)
    order = np.random.default_rng(0).permutation(len(trace))[: args.first]
    requests = [draft_everywhere(proposer, trace[i], args.limit) for i in order]
    requests = [places for places in requests if places]
    print(f"{len(requests)} requests, {sum(map(len, requests))} places, limit {args.limit}")

    shared = {"benchmark": "length_policies", "seed": 0}
    config = {"limit": args.limit, "trace": args.trace.name, "first": args.first, "options": args.option}
    rows: list[dict[str, Any]] = []
    for curve, width in itertools.product(CURVES, BATCHES):
        seconds = CURVES[curve](np.arange(width * (args.limit + 1) + 1))
        print(f"\n{curve}, batch {width:<18}{'MAT':>6}{'drafts':>8}{'speed-up':>10}{'2nd half':>10}{'tuned':>8}")
        for name, result in compare(requests, width, seconds).items():
            mat, drafts, speedup = (result["default"][m][0] for m in ("mat", "drafts", "speedup"))
            halves = [result[part]["speedup"][0] for part in ("second half", "tuned, second half")]
            best = ", ".join(f"{k} {v:g}" for k, v in result["best"].items())
            print(f"{name:<26}{mat:>10.3f}{drafts:>8.2f}{speedup:>10.3f}{halves[0]:>10.3f}{halves[1]:>8.3f}  {best}")
            for part in ("default", "second half", "tuned, second half"):
                parameters = result["best"] if part.startswith("tuned") else {}
                full = json.dumps({**config, "curve": curve, "batch": width, "part": part, "parameters": parameters})
                rows += [
                    {**shared, "provider": name, "task": f"{curve} batch {width}, {part}", "metric": metric}
                    | {"unit": unit, "value": f"{value:.5g}", "config": full}
                    for metric, (value, unit) in result[part].items()
                ]
    print(f"\n{'choose, 64 x 16 nodes':<26}us (p20, p80)")
    for name in POLICIES:
        p20, median, p80 = choose_us(name)
        print(f"{name:<26}{median:.0f} ({p20:.0f}, {p80:.0f})")
        rows.append(
            {**shared, "provider": name, "metric": "choose", "unit": "us/call", "value": f"{median:.4g}"}
            | {"p20": f"{p20:.4g}", "p80": f"{p80:.4g}", "config": json.dumps({"requests": 64, "nodes": 16})}
        )
    if args.csv:
        write_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
