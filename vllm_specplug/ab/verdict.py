"""What a comparison found, in plain sentences and figures: :func:`judge` makes a :class:`Verdict` of a run's cells.

An arm is called faster or slower under a load if the 95% interval of its speed ratio to the control leaves out 1 and
the ratio itself is at least :data:`SMALLEST` away from 1. Servers started alike may differ for as long as they run
(where their memory lies, for one), which requests cannot show, so intervals make room for :data:`START`. Otherwise
there is no difference, provided that one of :data:`RESOLUTION` would have shown; if not, the machine was too noisy, or
the requests too few. Nor is a difference believed that is smaller than what other programs took of the processors
meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vllm_specplug.ab import measures
from vllm_specplug.ab.fidelity import Fidelity, judge_arm
from vllm_specplug.ab.intervals import Estimate, paired_ratio
from vllm_specplug.ab.measures import Drafting, Figures, answered
from vllm_specplug.ab.noise import Noise, look
from vllm_specplug.ab.outputs import Output, Pair, Reference, approximate, judge_greedy, judge_sampled
from vllm_specplug.ab.results import Arm, Cell, Load, Plan, Probe, Reply

#: Differences in speed below that are none.
SMALLEST = 0.02
#: "No difference" is said only if the interval reaches less far than that to each side.
RESOLUTION = 0.05
#: Standard deviation of a server's speed between starts that intervals make room for. An allowance (three pairs of like
#: servers on two quiet cores differed by -1.2%, -2.0% and +1.7%, which is 0.014 and hardly a measurement): like servers
#: that differ by so much are then told apart in 3 of 100 runs of two repeats, without it in 13, and a
#: slowdown by 5% is still found in 95 (benchmarks/bench_ab_verdict.py, ``offset`` 0.01).
START = 0.01

Speed = Literal["faster", "slower", "same", "untold"]


@dataclass(frozen=True)
class Paired:
    """An arm's figures over the control's, same requests and blocks; None where there is nothing to compare.

    Attributes:
        pairs: requests answered by both, every repeat counted.
        speed: output tokens per second of the requests' own time: the verdict's figure.
        throughput: output tokens per second of the run.
        ttft, tpot, e2e: mean times; less is better.
        tasks: ``speed`` by task.
    """

    pairs: int
    speed: Estimate | None
    throughput: Estimate | None
    ttft: Estimate | None
    tpot: Estimate | None
    e2e: Estimate | None
    tasks: dict[str, Estimate | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One arm under one load.

    Attributes:
        arm, load: which.
        control: whether it is the control; then ``speed``, ``paired`` and ``output`` are None.
        speed: what is said of its speed; ``untold``: nothing can be.
        output: what is said of its outputs; None where none can be compared.
        sentence: both in words.
        cautions: what to know before relying on it.
        total, tasks: its own figures.
        drafting: None where the server tells no counters.
        memory_bytes: its server's peak resident memory until then; None if unknown.
    """

    arm: str
    load: str
    control: bool
    speed: Speed | None
    output: Output | None
    sentence: str
    cautions: list[str]
    paired: Paired | None
    noise: Noise
    total: Figures
    tasks: dict[str, Figures]
    drafting: Drafting | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Verdict:
    """A whole comparison; ``dataclasses.asdict`` makes it ready for JSON.

    Attributes:
        control: the control's name.
        arms, loads: as planned, in order, whether or not they have results.
        results: by load, then by arm, control first.
        failures: arm: why it has no results, or not all.
        settings: what was compared: the plan's model, workload, counts, temperature, seed.
        facts: the plan's.
        fidelity: of the arms for which it was to be measured, in order.
    """

    control: str
    arms: list[Arm]
    loads: list[str]
    results: list[Result]
    failures: dict[str, str]
    settings: dict[str, Any]
    facts: dict[str, Any]
    fidelity: list[Fidelity] = field(default_factory=list)

    def of(self, arm: str, load: str) -> Result | None:
        """The result of an arm under a load."""
        return next((r for r in self.results if (r.arm, r.load) == (arm, load)), None)


def judge(plan: Plan, cells: Sequence[Cell], probes: Sequence[Probe] = ()) -> Verdict:
    """Judge every arm under every load that has cells. Whatever is missing is left out, not guessed.

    Args:
        probes: what the pass for fidelity found, if there was one.

    Raises:
        ValueError: the plan has no arms.
    """
    if not plan.arms:
        raise ValueError("a comparison needs an arm")
    control = plan.arms[0].name
    failures = dict(plan.failures)
    for cell in cells:
        if cell.failure:
            failures.setdefault(cell.arm, f"{cell.load}: {cell.failure}")
    results = []
    for load in plan.loads:
        here = [c for c in cells if c.load == load]
        for arm in plan.arms:
            mine = [c for c in here if c.arm == arm.name]
            if mine:
                base = [c for c in here if c.arm == control]
                results.append(_result(plan, cells, load, arm.name, mine, base, failures))
    return Verdict(
        control=control,
        arms=list(plan.arms),
        loads=[str(load) for load in plan.loads],
        results=results,
        failures=failures,
        settings={
            "model": plan.model,
            "workload": plan.workload,
            "requests": plan.requests,
            "tasks": plan.tasks,
            "output_tokens": plan.output_tokens,
            "temperature": plan.temperature,
            "repeats": plan.repeats,
            "seed": plan.seed,
        },
        facts=dict(plan.facts),
        fidelity=_fidelity(plan, probes),
    )


def _fidelity(plan: Plan, probes: Sequence[Probe]) -> list[Fidelity]:
    told = plan.facts.get("fidelity") or {}
    skipped, mat = told.get("skipped") or {}, told.get("mat") or {}
    control = plan.arms[0].name
    own = [probe for probe in probes if probe.arm == control]
    found = []
    for arm in plan.arms[1:]:
        mine = [probe for probe in probes if probe.arm == arm.name]
        known = arm.name in plan.facts.get("approximate", ())
        if mine:
            rates = (mat.get(arm.name), mat.get(control))
            found.append(judge_arm(arm.name, known, mine, own, plan.tasks, rates, plan.seed))
        elif arm.name in skipped:
            found.append(Fidelity(arm.name, known, f"fidelity was not measured: {skipped[arm.name]}"))
    return found


def _result(
    plan: Plan,
    cells: Sequence[Cell],
    load: Load,
    arm: str,
    mine: Sequence[Cell],
    base: Sequence[Cell],
    failures: dict[str, str],
) -> Result:
    control = arm == plan.arms[0].name
    total = measures.figures(mine)
    noise = look(base, mine)
    paired = output = speed = None
    cautions = []
    if control:
        sentence = f"the control: {total.tokens_per_s:.1f} tokens/s"
    else:
        paired = _compare(plan, mine, base)
        output = _judge_output(plan, cells, load, mine, base)
        loose = plan.facts.get("approximate", ())
        if output is not None and (arm in loose or plan.arms[0].name in loose):
            output = approximate(output, arm not in loose)
        speed, told = judge_speed(paired.speed, noise, total.requests, len(mine))
        sentence = f"{told}, {output.sentence}" if output is not None else told
        if speed in ("faster", "slower"):
            cautions += noise.signs()
    if total.errors:
        cautions.append(f"{total.errors} of {total.errors + total.requests} requests failed")
    if arm in failures:
        cautions.append("it did not finish the run")
    tasks = {task: measures.figures(mine, task) for task in plan.tasks}
    return Result(
        arm=arm,
        load=str(load),
        control=control,
        speed=speed,
        output=output,
        sentence=sentence,
        cautions=cautions,
        paired=paired,
        noise=noise,
        total=total,
        tasks={task: found for task, found in tasks.items() if found.requests or found.errors},
        drafting=measures.drafting(mine),
        memory_bytes=measures.memory(mine),
    )


def judge_speed(ratio: Estimate | None, noise: Noise, requests: int, cells: int) -> tuple[Speed, str]:
    """What is said of a speed ratio, as a word and in words.

    Args:
        ratio: an arm's speed over the control's; None if nothing was answered by both.
        noise: under that load.
        requests, cells: how much it rests on, for the words.
    """
    if ratio is None:
        return "untold", "not compared: no request was answered by both"
    if ratio.low is None or ratio.high is None:
        few = f"measured at {_change(ratio.value)}, too few blocks or requests to tell"
        return "untold", few
    interval = f"(95% interval {_change(ratio.low)} to {_change(ratio.high)})"
    change = abs(ratio.value - 1)
    if not ratio.low <= 1 <= ratio.high and change >= SMALLEST:
        faster = ratio.value > 1
        if noise.taken() > change:
            what = " and ".join(noise.signs())
            return (
                "untold",
                f"the machine was too noisy to tell: measured at {_change(ratio.value)} {interval}, but {what}",
            )
        if faster:
            return "faster", f"faster by {change:.{_digits(change)}%} {_interval(ratio.low - 1, ratio.high - 1)}"
        return "slower", f"slower by {change:.{_digits(change)}%} {_interval(1 - ratio.high, 1 - ratio.low)}"
    if max(ratio.high - 1, 1 - ratio.low) < RESOLUTION:
        return "same", f"no difference {'' if ratio.low <= 1 <= ratio.high else 'that matters '}{interval}"
    reasons = noise.signs()
    if reasons:
        return "untold", f"the machine was too noisy to tell {interval}: {' and '.join(reasons)}"
    why = f"{requests} requests in {cells} blocks are too few, or gain too unequally"
    return "untold", f"too little was measured to tell {interval}: {why}"


def _digits(change: float) -> int:
    return 0 if change >= 0.0995 else 1


def _interval(low: float, high: float) -> str:
    digits = min(_digits(abs(low)), _digits(abs(high)))
    return f"(95% interval {low:.{digits}%} to {high:.{digits}%})"


def _change(ratio: float) -> str:
    change = ratio - 1
    text = f"{change:+.{_digits(abs(change))}%}"
    return text[1:] if text in ("+0.0%", "-0.0%") else text


def _replies(cells: Sequence[Cell]) -> dict[tuple[int, int, int], Reply]:
    """Whole replies by block, repeat and request."""
    return {(c.block, c.repeat, r.index): r for c in cells for r in c.replies if answered(r)}


def _compare(plan: Plan, mine: Sequence[Cell], base: Sequence[Cell]) -> Paired:
    ours, theirs = _replies(mine), _replies(base)
    keys = [key for key in ours if key in theirs]
    allowed = _allowed(plan, mine, [key[1] for key in keys])

    def ratio(a: Any, b: Any, only: str | None = None, more_than: int = 0) -> Estimate | None:
        """Of sums of what ``a`` says over sums of what ``b`` says, of pairs of which both have enough tokens."""
        rows = [
            (key, ours[key], theirs[key])
            for key in keys
            if only in (None, ours[key].task) and min(ours[key].output_tokens, theirs[key].output_tokens) > more_than
        ]
        if not rows:
            return None
        request = np.array([key[2] for key, _, _ in rows])
        cell = np.unique([key[:2] for key, _, _ in rows], axis=0, return_inverse=True)[1].reshape(-1)
        sides = [np.array([(a(pair[side]), b(pair[side])) for pair in rows], float) for side in (1, 2)]
        return paired_ratio(sides[0], sides[1], request, cell, plan.seed, allowed)

    def tokens(reply: Reply) -> int:
        return reply.output_tokens

    def seconds(reply: Reply) -> float:
        return reply.total_s

    def one(reply: Reply) -> int:
        return 1

    return Paired(
        pairs=len(keys),
        speed=ratio(tokens, seconds),
        throughput=_throughput(plan, mine, base, allowed),
        ttft=ratio(lambda r: r.first_s, one),
        tpot=ratio(lambda r: r.total_s - r.first_s, lambda r: r.output_tokens - 1, more_than=1),
        e2e=ratio(seconds, one),
        tasks={task: ratio(tokens, seconds, task) for task in plan.tasks},
    )


def _throughput(plan: Plan, mine: Sequence[Cell], base: Sequence[Cell], allowed: float) -> Estimate | None:
    """Ratio of tokens per second, over whole cells that both finished."""
    ours, theirs = ({(c.block, c.repeat): c for c in cells if not c.failure} for cells in (mine, base))
    keys = [key for key in ours if key in theirs]
    if not keys:
        return None
    sides = [
        np.array([(sum(r.output_tokens for r in s[k].replies if answered(r)), s[k].seconds) for k in keys], float)
        for s in (ours, theirs)
    ]
    blocks = np.array([key[0] for key in keys])
    return paired_ratio(sides[0], sides[1], blocks, np.arange(len(keys)), plan.seed, allowed)


def _allowed(plan: Plan, mine: Sequence[Cell], repeats: Sequence[int]) -> float:
    """Variance between starts of both servers, which are started anew for every repeat unless they are the user's."""
    kept = plan.facts.get("keep_servers") or any(arm.url for arm in plan.arms if arm.name == mine[0].arm)
    return 2 * START**2 / (1 if kept else max(1, len(set(repeats))))


def _judge_output(
    plan: Plan, cells: Sequence[Cell], load: Load, mine: Sequence[Cell], base: Sequence[Cell]
) -> Output | None:
    ours, theirs = _replies(mine), _replies(base)
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
    if plan.temperature > 0:
        return judge_sampled(pairs, plan.seed)
    return judge_greedy(pairs, _references(plan, cells, load, base))


def _references(plan: Plan, cells: Sequence[Cell], load: Load, base: Sequence[Cell]) -> list[Reference]:
    """The control compared with itself: each repeat with the next, and each load with this one."""
    own = _replies(base)
    again: list[Pair] = [
        (reply, own[block, repeat + 1, index])
        for (block, repeat, index), reply in own.items()
        if (block, repeat + 1, index) in own
    ]
    found = [Reference("between repeats", again, load.concurrency != 1)]
    first = _by_request(own)
    for other in plan.loads:
        if other != load:
            there = _by_request(_replies([c for c in cells if c.arm == plan.arms[0].name and c.load == other]))
            pairs = [(first[index], there[index]) for index in first if index in there]
            found.append(Reference(f"between {load} and {other}", pairs, True))
    return found


def _by_request(replies: dict[tuple[int, int, int], Reply]) -> dict[int, Reply]:
    """The first reply to each request."""
    found: dict[int, Reply] = {}
    for (_, _, index), reply in sorted(replies.items(), key=lambda item: item[0][1]):
        found.setdefault(index, reply)
    return found
