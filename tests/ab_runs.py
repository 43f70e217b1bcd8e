"""Comparisons to judge without a server: made up, or on recorded times (``data/ab_step_times.json``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplug.ab.intervals import Floats, Ints
from vllm_specplug.ab.results import Arm, Cell, Load, Plan, Reply

RECORDED = Path(__file__).resolve().parent / "data" / "ab_step_times.json"
TASKS = ("chat", "code", "maths")
ONE = Load(1)
_WORDS = ("the", "kettle", "is", "on", "hob", "an", "old", "chain", "squeaks", "in", "rain", "nobody", "oiled", "it")

Change = Callable[[list[int], np.random.Generator], list[int]]


@dataclass(frozen=True)
class Behaviour:
    """An arm of a made-up run.

    Attributes:
        speed: of decoding, over the control's.
        change: what it does to the output that it should give; None: nothing.
        busy: what ``cpu_busy`` says during its cells.
        mat: tokens per step that its counters say.
    """

    speed: float = 1.0
    change: Change | None = None
    busy: float | None = 0.01
    mat: float = 1.0


@dataclass(frozen=True)
class Unrest:
    """Standard deviations of the logarithm of a time: between cells, and between replies; ``drift`` from the first
    cell to the last."""

    cell: float = 0.012
    reply: float = 0.03
    drift: float = 0.0


def say(tokens: Sequence[int]) -> str:
    """Text of made-up tokens."""
    return " ".join(_WORDS[t % len(_WORDS)] for t in tokens)


def make(
    arms: dict[str, Behaviour],
    *,
    loads: Sequence[Load] = (ONE,),
    requests: int = 24,
    per_block: int = 3,
    repeats: int = 2,
    unrest: Unrest = Unrest(),
    rounding: float = 0.0,
    seed: int = 0,
    ids: bool = True,
    temperature: float = 0.0,
    tokens: int = 64,
) -> tuple[Plan, list[Cell]]:
    """A run of ``arms``, the first the control; blocks turn by turn as in a real one.

    Args:
        rounding: chance per token that an output goes another way, drawn anew for every load and arm, but not for
            every repeat: the same batches round alike.
        ids: whether servers tell token ids.
    """
    rng = np.random.default_rng(seed)
    truth = [rng.integers(0, 500, tokens).tolist() for _ in range(requests)]
    blocks = [range(start, min(start + per_block, requests)) for start in range(0, requests, per_block)]
    cells = []
    for load in loads:
        turns = [(r, b) for r in range(repeats) for b in range(len(blocks))]
        for turn, (repeat, block) in enumerate(turns):
            for number, (name, arm) in enumerate(arms.items()):
                slow = np.exp(rng.normal(0, unrest.cell) + unrest.drift * turn / len(turns))
                replies = []
                for index in blocks[block]:
                    same = np.random.default_rng([seed, load.concurrency, number, index])
                    output = _rounded(truth[index], rounding, same)
                    if arm.change is not None:
                        output = arm.change(output, np.random.default_rng([seed, 7, number, index]))
                    replies.append(_reply(index, output, float(slow), arm, unrest, rng, load, ids))
                cells.append(_cell(name, load, block, repeat, arm, replies))
    plan = Plan(
        arms=[Arm(name, ["--spec-model", "vllm_specplug.Auto"] if i else []) for i, name in enumerate(arms)],
        loads=list(loads),
        model="models/small",
        workload="made up",
        requests=requests,
        tasks=list(TASKS[: min(3, requests)]),
        output_tokens=tokens,
        temperature=temperature,
        repeats=repeats,
        seed=seed,
        facts={"date": "2026-01-01T00:00:00+00:00", "versions": {"vllm": "0.32.0"}},
    )
    return plan, cells


def _rounded(output: list[int], rounding: float, rng: np.random.Generator) -> list[int]:
    turns = np.flatnonzero(rng.random(len(output)) < rounding)
    if not len(turns):
        return output
    return output[: turns[0]] + [t + 1 for t in output[turns[0] :]]


def _reply(
    index: int, output: list[int], slow: float, arm: Behaviour, unrest: Unrest, rng: np.random.Generator, load: Load,
    ids: bool,
) -> Reply:  # fmt: skip
    noise = slow * np.exp(rng.normal(0, unrest.reply))
    first = 0.06 * float(noise)
    step = 0.02 * (1 + 0.1 * max(0, load.concurrency - 1)) * float(noise) / arm.speed
    total = first + step * max(0, len(output) - 1)
    return Reply(
        index, TASKS[index % 3], 0.0, first, total, [step] * 3, 50, len(output), output if ids else None, say(output)
    )


def _cell(name: str, load: Load, block: int, repeat: int, arm: Behaviour, replies: list[Reply]) -> Cell:
    emitted = sum(r.output_tokens for r in replies)
    decoded = emitted - len(replies)
    accepted = decoded - decoded / arm.mat
    counters = {'vllm:generation_tokens_total{engine="0",model_name="m"}': float(emitted)}
    if arm.mat > 1:
        drafts = decoded / arm.mat
        counters |= {
            'vllm:spec_decode_num_drafts_total{engine="0",model_name="m"}': drafts,
            'vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"}': 3 * drafts,
            'vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"}': accepted,
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"}': 0.75 * accepted,
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"}': 0.25 * accepted,
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="2"}': 0.0,
            'vllm_specplug:drafted_tokens_total{engine="0",source="context",depth="1"}': 2 * drafts,
            'vllm_specplug:verified_tokens_total{engine="0",source="context",depth="1"}': drafts,
            'vllm_specplug:accepted_tokens_total{engine="0",source="context",depth="1"}': 0.5 * drafts,
            'vllm_specplug:accepted_tokens_total{engine="0",source="context",depth="8+"}': 0.25 * drafts,
            'vllm_specplug:drafting_seconds_total{engine="0",phase="propose"}': 0.01 * len(replies),
        }
    seconds = sum(r.total_s for r in replies) / max(1, load.concurrency)
    return Cell(name, load, block, repeat, seconds, arm.busy, counters, 2_000_000_000, replies)


def crossed(
    blocks: int, repeats: int, size: int, cell: float, reply: float, gain: float, seed: int
) -> tuple[Floats, Floats, Ints, Ints]:
    """Pairs of two arms that are equal on average, as ``paired_ratio`` takes them.

    Args:
        blocks, repeats, size: how many, and requests of a block.
        cell, reply, gain: standard deviations of the logarithm of times: of a cell of either arm, of a reply, and of
            the first arm's gain on a request, the same in all repeats.
    """
    rng = np.random.default_rng(seed)
    gains = rng.normal(-(gain**2) / 2, gain, (blocks, size))  # so that the mean time is the same
    spells = rng.normal(0, cell, (2, blocks, repeats))
    ours, base, request, cells = [], [], [], []
    for block in range(blocks):
        for repeat in range(repeats):
            for i in range(size):
                tokens = int(rng.integers(40, 97))
                logs = spells[:, block, repeat] + rng.normal(0, reply, 2)
                ours.append((tokens, tokens * np.exp(logs[0] + gains[block, i])))
                base.append((tokens, tokens * np.exp(logs[1])))
                request.append(block * size + i)
                cells.append(block * repeats + repeat)
    return np.array(ours), np.array(base), np.array(request), np.array(cells)


# Changes of outputs


def one_wrong(output: list[int], rng: np.random.Generator) -> list[int]:
    """One wrong token somewhere, and what follows from it."""
    at = int(rng.integers(0, len(output)))
    return output[:at] + [t + 3 for t in output[at:]]


def all_wrong(output: list[int], rng: np.random.Generator) -> list[int]:
    """No token of the output is right."""
    return [t + 3 for t in output]


def cut_short(output: list[int], rng: np.random.Generator) -> list[int]:
    """The end is missing."""
    return output[:-4]


def seldom_wrong(output: list[int], rng: np.random.Generator) -> list[int]:
    """One output in ten has a wrong token."""
    return one_wrong(output, rng) if rng.random() < 0.1 else output


def sampled(output: list[int], rng: np.random.Generator) -> list[int]:
    """Drawn anew, mostly of the low numbers."""
    return np.minimum(rng.geometric(0.02, len(output)), 499).tolist()


def sampled_colder(output: list[int], rng: np.random.Generator) -> list[int]:
    """Drawn anew from a narrower distribution."""
    return np.minimum(rng.geometric(0.03, len(output)), 499).tolist()


# Recorded timings


def recorded_steps() -> list[Floats]:
    """Times of a real engine's decode steps in order, over what such a step takes; a list per run."""
    return [np.array(x) for x in json.loads(RECORDED.read_text(encoding="utf-8"))["series"]]


def replay(
    rng: np.random.Generator,
    slower: float = 1.0,
    *,
    load: Load = ONE,
    requests: int = 17,
    per_block: int = 2,
    repeats: int = 2,
    offset: float = 0.0,
) -> tuple[Plan, list[Cell]]:
    """A comparison of two arms that are alike, on recorded times of steps.

    Every cell is served by a loop of ``load.concurrency`` requests at once whose steps take the times of a stretch
    of recorded ones, drawn anew for each; so spells and outliers are real, and what runs at once is slow at once.

    Args:
        slower: every time of the second arm is so many times as long.
        offset: standard deviation of a server's speed, anew in every repeat.
    """
    steps = recorded_steps()
    sizes = np.random.default_rng(5).integers(24, 97, requests)
    cells = []
    for repeat in range(repeats):
        servers = np.exp(rng.normal(0, offset, 2)) * (1.0, slower)
        for block, start in enumerate(range(0, requests - per_block + 1, per_block)):
            last = requests if start + 2 * per_block > requests else start + per_block
            for name, server in zip(("control", "arm"), servers, strict=True):
                replies = _serve(rng, steps, range(start, last), sizes, load.concurrency, 0.03 * float(server))
                seconds = max(r.sent_s + r.total_s for r in replies)
                cells.append(Cell(name, load, block, repeat, seconds, 0.0, {}, None, replies))
    arms = [Arm("control"), Arm("arm")]
    return Plan(arms, [load], "small", "replayed", requests, [TASKS[0]], 96, 0.0, repeats, 0), cells


def _serve(
    rng: np.random.Generator, steps: list[Floats], indices: Sequence[int], sizes: Ints, slots: int, step_s: float
) -> list[Reply]:
    """Serve requests of ``sizes`` tokens, ``slots`` at once; a request's first token takes three steps more."""
    waiting, replies = list(indices), []
    running: dict[int, list[Any]] = {}  # when sent, when the first token came, tokens to come
    series = steps[rng.integers(len(steps))]
    at, now = int(rng.integers(len(series))), 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            index = waiting.pop(0)
            running[index] = [now, 0.0, int(sizes[index]) + 3]
        if at == len(series):
            series, at = steps[rng.integers(len(steps))], 0
        now += step_s * series[at]
        at += 1
        for index, state in list(running.items()):
            state[2] -= 1
            if state[2] == sizes[index] - 1:
                state[1] = now
            if state[2] == 0:
                sent, first, _ = running.pop(index)
                size = int(sizes[index])
                replies.append(
                    Reply(index, TASKS[0], sent, first - sent, now - sent, [], 50, size, list(range(size)), "")
                )
    return replies
