"""The step-time model: what it costs, and how well it predicts the steps of a real engine.

    python benchmarks/bench_step_time.py [--csv FILE]                      # microseconds
    python benchmarks/bench_step_time.py --engine [--record FILE.npz] [--csv FILE]
    python benchmarks/bench_step_time.py --replay FILE.npz [--csv FILE]    # a record again, without an engine

The engine runs in this process, float32 and eager, with chains of random lengths as drafts (hardly any accepted), and
with 1 to 16 requests at once, in phases; new requests' prompts are computed between the others' steps. The model sees
the steps in the order they happened, as it would in a server, and predicts each before it is told its time. ``error``
is the median of |predicted / measured - 1|; ``last step`` predicts that every step takes as long as the one before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from replay import write_rows
from vllm_specplug.proposers.base import (
    SOURCE_CONTEXT,
    DraftForest,
    Int32Array,
    Proposer,
    Request,
    StepLoad,
    StepResult,
)
from vllm_specplug.proposers.step_time import StepTimeModel

from vllm_specplug import registry
from vllm_specplug.options import option

PHASES = (1, 4, 16, 2, 8, 1, 12, 3, 16, 1)
LONGEST = 12
LEARNED = 200


@dataclass(frozen=True)
class RandomChainsOptions:
    """Options of :class:`RandomChains`."""

    seed: int = option(0, "of the lengths and tokens", low=0)


class RandomChains(Proposer):
    """Drafts random tokens in chains of random lengths, and writes down what each step computed and took."""

    name = "random_chains"
    Options = RandomChainsOptions

    def __init__(self, options: RandomChainsOptions) -> None:
        self.rng = np.random.default_rng(options.seed)
        self.steps: list[tuple[StepLoad, float, int]] = []
        self.phase = 0

    def add_request(self, request: Request) -> None:
        pass

    def remove_request(self, slot: int) -> None:
        pass

    def observe(self, step: StepResult) -> None:
        if step.load is not None:
            self.steps.append((step.load, step.seconds, self.phase))

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        most = self.rng.choice([0, 0, 2, 4, 8, LONGEST])
        sizes = np.minimum(self.rng.integers(0, most + 1, len(slots)), limits)
        size = int(sizes.sum())
        return DraftForest(
            self.rng.integers(0, 1000, size).astype(np.int32),
            np.concatenate([np.arange(-1, n - 1) for n in sizes]).astype(np.int32),
            np.full(size, 0.1, np.float32),
            np.full(size, SOURCE_CONTEXT, np.int8),
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
        )


@dataclass(frozen=True)
class Record:
    """Steps in order: ``loads int64[n, 6]`` (fields of StepLoad), ``seconds float64[n]``, ``phase int64[n]``."""

    loads: np.ndarray
    seconds: np.ndarray
    phase: np.ndarray


def run_engine(args: argparse.Namespace) -> Record:
    """Record the steps of a real engine."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    registry.proposers()["RandomChains"] = registry.Entry("RandomChains", f"{Path(__file__).stem}:RandomChains", "")
    llm = LLM(
        model=str(args.model),
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=max(PHASES),
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
        speculative_config={
            "method": "custom_class",
            "model": "vllm_specplug.RandomChains",
            "num_speculative_tokens": LONGEST,
        },
        additional_config={"specplug": {"random_chains": {"seed": args.seed}}},
    )
    engine = llm.llm_engine
    worker = engine.engine_core.engine_core.model_executor.driver_worker.worker
    proposer = worker.model_runner.drafter.lifecycle.proposer
    rng = np.random.default_rng(args.seed)
    sent = running = 0
    for phase, most in enumerate(PHASES):
        proposer.phase = phase
        for _ in range(args.steps):
            while running < most:
                prompt = rng.integers(0, 1000, rng.integers(20, 600)).tolist()
                params = SamplingParams(temperature=0.0, max_tokens=int(rng.integers(20, 60)), ignore_eos=True)
                engine.add_request(str(sent), {"prompt_token_ids": prompt}, params)
                sent, running = sent + 1, running + 1
            running -= sum(output.finished for output in engine.step())
    steps = proposer.steps
    return Record(
        np.array([dataclasses.astuple(load) for load, _, _ in steps]),
        np.array([seconds for _, seconds, _ in steps]),
        np.array([phase for _, _, phase in steps]),
    )


def predict(record: Record) -> tuple[Record, np.ndarray, StepTimeModel]:
    """The steps that can be learned from, their predictions by the model (``float64[n]``), and the model."""
    usable = np.isfinite(record.seconds) & (record.loads[:, 1] > 0)
    record = Record(record.loads[usable], record.seconds[usable], record.phase[usable])
    model, predicted = StepTimeModel(), []
    for row, seconds in zip(record.loads.tolist(), record.seconds, strict=True):
        load = StepLoad(*row)
        predicted.append(model.predict(load))
        model.observe(load, float(seconds))
    return record, np.array(predicted), model


def report_record(record: Record, config: str, seed: int) -> list[dict[str, Any]]:
    """Print and return the errors, over all and by phase."""
    record, predicted, model = predict(record)
    last = np.concatenate([record.seconds[:1], record.seconds[:-1]])
    rows = []
    print(f"{len(record.seconds)} steps, {record.seconds.min() * 1e3:.1f} to {record.seconds.max() * 1e3:.1f} ms")
    for provider, guess in (("StepTimeModel", predicted), ("last step", last)):
        errors = np.abs(guess / record.seconds - 1)
        parts = {
            f"after {LEARNED} steps": np.arange(len(errors)) >= LEARNED,
            "first 200 steps": np.arange(len(errors)) < 200,
        }
        parts |= {f"phase {i}, {n} requests": record.phase == i for i, n in enumerate(PHASES)}
        for task, chosen in parts.items():
            if not chosen.any():
                continue
            median, p80 = np.quantile(errors[chosen], (0.5, 0.8))
            print(f"{provider:<14}{task:<24}{chosen.sum():>6} steps  median {median:6.3f}  p80 {p80:6.3f}")
            rows.append(_row(provider, task, "error", "relative", median, config, seed) | {"p80": f"{p80:.4g}"})
    print(model.stats())
    for n in (1, 4, 16):
        curve = model.curve(n, 400 * n, 8 * n)
        print(
            f"{n} requests of 400 tokens, ms by draft rows:",
            *(f"{k}:{curve[k] * 1e3:.1f}" for k in range(0, 8 * n + 1, n)),
        )
    return rows


def _row(
    provider: str, task: str, metric: str, unit: str, value: float, config: str, seed: int | str = ""
) -> dict[str, Any]:
    return {
        "benchmark": "step_time",
        "provider": provider,
        "task": task,
        "metric": metric,
        "unit": unit,
        "value": f"{value:.4g}",
        "config": config,
        "seed": seed,
    }


def report_cost() -> list[dict[str, Any]]:
    """Print and return what calls take."""
    rng = np.random.default_rng(0)
    model, loads = StepTimeModel(), []
    for _ in range(3000):
        n = int(rng.choice([1, 4, 16]))
        more, context = int(rng.integers(0, 8 * n + 1)), int(400 * n)
        loads.append(StepLoad(n, n + more, context, context + 400 * more))
    seconds = [(0.02 + 0.001 * load.rows) * rng.lognormal(0, 0.08) for load in loads]
    for load, s in zip(loads[:1000], seconds, strict=False):
        model.observe(load, s)
    calls: dict[str, Any] = {
        "observe": lambda i: model.observe(loads[i], seconds[i]),
        "predict": lambda i: model.predict(loads[i]),
        "curve 16": lambda i: model.curve(1, 400, 16),
        "curve 1024": lambda i: model.curve(64, 25600, 1024),
    }
    rows = []
    for task, call in calls.items():
        took = []
        call(0)
        for i in range(1000, 3000):
            start = time.perf_counter_ns()
            call(i)
            took.append((time.perf_counter_ns() - start) / 1e3)
        p20, median, p80 = np.quantile(took, (0.2, 0.5, 0.8))
        print(f"{task:<12}{median:7.2f} us  ({p20:.2f} to {p80:.2f})")
        row = _row("StepTimeModel", task, "call", "us", median, "{}")
        rows.append(row | {"p20": f"{p20:.4g}", "p80": f"{p80:.4g}"})
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="store_true", help="record a real engine's steps and predict them")
    parser.add_argument("--replay", type=Path, help="predict the steps of this record")
    parser.add_argument("--record", type=Path, help="where --engine keeps its record (.npz)")
    parser.add_argument("--steps", type=int, default=80, help="of each phase")
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / ".models" / "smollm2-135m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="add the results to this file")
    args = parser.parse_args()
    if args.engine and args.replay:
        parser.error("--engine and --replay exclude each other")
    if args.engine or args.replay:
        if args.replay:
            with np.load(args.replay) as file:
                record = Record(file["loads"], file["seconds"], file["phase"])
        else:
            record = run_engine(args)
            if args.record:
                np.savez(args.record, loads=record.loads, seconds=record.seconds, phase=record.phase)
        config = {
            "model": args.model.name,
            "dtype": "float32",
            "mode": "eager",
            "steps": args.steps,
            "longest": LONGEST,
        }
        rows = report_record(record, json.dumps(config), args.seed)
    else:
        rows = report_cost()
    if args.csv:
        write_rows(args.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
