"""Searches a proposer's options on one part of a trace, and says on the other part whether the best ones are better.

The score is the predicted tokens per second of :mod:`.replay`. One option after another, in a seeded random order, is
set to each of a few values and kept where the training part gains; that goes on until a whole round changes nothing,
or the time is up. The split is by request, every task in both parts. On the held-out part both the defaults and the
best start from what they learned on the training part; the best are recommended only if the interval of their gain is
above zero.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_specplug import registry
from vllm_specplug.options import ROOT

from .files import Recorded, TraceError
from .replay import Replay, Tally, build, speedup
from .step_times import StepTimes

#: Most draft tokens per request and step: ``--spec-tokens``.
LIMITS = (4, 8, 16, 32)
#: Values tried of the options of built-in proposers. Of others': both values of switches, and all choices.
SPACE: dict[str, dict[str, tuple[Any, ...]]] = {
    "Auto": {
        "min_prob": (0.0, 0.02, 0.05, 0.1, 0.2),
        "tree": (True, False),
        "recycling": (True, False),
        "policy": ("marginal", "fixed"),
        "length": (2, 4, 6, 8),
    },
    "AdaptiveLength": {
        "inner": ("Retrieval", "TokenRecycling"),
        "min_prob": (0.0, 0.02, 0.05, 0.1, 0.2),
        "policy": ("marginal", "fixed"),
        "length": (2, 4, 6, 8),
    },
    "Retrieval": {"min_prob": (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3), "tree": (False, True)},
    "TokenRecycling": {"min_prob": (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3), "keys": (1, 2, 3), "k": (4, 8)},
}
#: A change must gain so much on the training part.
LEAST_GAIN = 0.002
#: Fewer held-out requests tell nothing; and so much the same settings differ from one replay to the next, by the clock.
FEWEST_TESTED = 10
REPEATABLE = 0.005
# An evaluation may take this share of the time: else it sees only a part of the training requests, but so many.
_SHARE, _FEWEST = 1 / 25, 8


@dataclass(frozen=True)
class Candidate:
    """Options other than the defaults, and the most draft tokens per request and step."""

    limit: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, section: str) -> dict[str, dict[str, Any]]:
        """As under ``specplug`` in vLLM's ``additional_config``."""
        return {section: dict(self.options)} if self.options else {}

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.limit, *sorted(self.options.items()))


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        default, best: options; equal if nothing was better on the training part.
        evaluations: how many settings were tried on the training part.
        trained, held_out: requests.
        train_gain: ratio of speeds, best to default, on the training part.
        gain: the same on the held-out part, and its 95% interval.
        default_speedup, best_speedup: predicted speed-ups on the held-out part.
    """

    proposer: str
    default: Candidate
    best: Candidate
    evaluations: int
    trained: int
    held_out: int
    train_gain: float
    gain: tuple[float, float, float]
    default_speedup: float
    best_speedup: float

    @property
    def adopted(self) -> bool:
        """Whether the best are better than the defaults, beyond chance."""
        return self.held_out >= FEWEST_TESTED and self.gain[1] > 1.0 + REPEATABLE

    @property
    def recommended(self) -> Candidate:
        """The best if adopted, else the defaults."""
        return self.best if self.adopted else self.default

    def additional_config(self) -> dict[str, Any]:
        """What to set in vLLM's ``additional_config``."""
        return {ROOT: self.recommended.settings(registry.find(self.proposer).section)}


def split(requests: Sequence[Recorded], held_out: float, seed: int) -> tuple[list[Recorded], list[Recorded]]:
    """Training and held-out requests, each in their order, of every task the same share.

    Raises:
        TraceError: one of the parts would be empty.
    """
    rng = np.random.default_rng(seed)
    chosen: set[int] = set()
    for task in dict.fromkeys(r.task for r in requests):
        places = [i for i, r in enumerate(requests) if r.task == task]
        size = min(max(round(held_out * len(places)), 1), len(places) - 1)
        chosen.update(rng.permutation(places)[:size].tolist())
    parts = [r for i, r in enumerate(requests) if i not in chosen], [requests[i] for i in sorted(chosen)]
    if not parts[0] or not parts[1]:
        raise TraceError(f"{len(requests)} requests are too few to keep some for the test of what is found")
    return parts


def space_of(name: str, limits: Sequence[int] = LIMITS) -> dict[str, tuple[Any, ...]]:
    """Values to try, by option; ``limit`` is the most draft tokens."""
    space = SPACE.get(name)
    if space is None:
        fields = dataclasses.fields(registry.find(name).load().Options)
        space = {f.name: f.metadata["choices"] or (False, True) for f in fields if _is_small(f)}
    return {"limit": tuple(limits), **space}


def _is_small(option: dataclasses.Field[Any]) -> bool:
    return bool(option.metadata.get("choices")) or isinstance(option.default, bool)


@dataclass
class _Search:
    name: str
    requests: list[Recorded]
    times: StepTimes
    trees: bool
    defaults: dict[str, Any]
    tried: dict[tuple[Any, ...], float] = field(default_factory=dict)

    def speed(self, candidate: Candidate) -> float:
        """Predicted tokens per second on the training requests."""
        if candidate.key not in self.tried:
            tallies = self.run(candidate).run(self.requests)
            self.tried[candidate.key] = sum(t.decoded for t in tallies) / sum(t.seconds for t in tallies)
        return self.tried[candidate.key]

    def run(self, candidate: Candidate) -> Replay:
        proposer, _ = build(self.name, candidate.settings(registry.find(self.name).section))
        return Replay(proposer, candidate.limit, self.times, trees=self.trees)

    def changed(self, candidate: Candidate, option: str, value: Any) -> Candidate:
        if option == "limit":
            return dataclasses.replace(candidate, limit=value)
        options = {**candidate.options, option: value}
        return Candidate(candidate.limit, {k: v for k, v in options.items() if v != self.defaults[k]})


def tune(
    name: str,
    requests: Sequence[Recorded],
    times: StepTimes,
    limit: int,
    *,
    limits: Sequence[int] = LIMITS,
    held_out: float = 0.3,
    budget_s: float = 60.0,
    trees: bool = True,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda evaluations, gain: None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Search a proposer's options.

    Args:
        limit: most draft tokens where the search begins.
        limits: those tried.
        held_out: share of the requests.
        budget_s: seconds after which no further setting is tried.
        progress: called after each evaluation with how many there were, and the gain so far.

    Raises:
        TraceError: there are too few requests.
        OptionError: the proposer cannot be built.
    """
    train, test = split([r for r in requests if len(r.output) > 1], held_out, seed)
    entry = registry.find(name)
    defaults = dataclasses.asdict(build(name, {})[1])
    search = _Search(name, train, times, trees, defaults)
    started = clock()
    best = default = Candidate(limit)
    search.speed(default)
    share = _SHARE * budget_s / max(clock() - started, 1e-9)
    if share < 1.0 and len(train) > _FEWEST:
        search.requests = _some(train, share, seed)
        search.tried.clear()
    first = top = search.speed(default)
    rng, space = np.random.default_rng(seed), space_of(name, limits)
    moved = True
    while moved and clock() - started < budget_s:
        moved = False
        for option in rng.permutation(list(space)).tolist():
            for value in space[option]:
                candidate = search.changed(best, option, value)
                if candidate.key in search.tried or _is_idle(option, best) or clock() - started >= budget_s:
                    continue
                speed = search.speed(candidate)
                if speed > top * (1.0 + LEAST_GAIN):
                    best, top, moved = candidate, speed, True
                progress(len(search.tried), top / first)
    return _tested(search, entry.name, default, best, test, top / first)


def _is_idle(option: str, candidate: Candidate) -> bool:
    """Whether an option has no effect beside the others."""
    return option == "length" and candidate.options.get("policy", "marginal") != "fixed"


def _some(requests: Sequence[Recorded], share: float, seed: int) -> list[Recorded]:
    """About that share of the requests, of every task."""
    rng = np.random.default_rng(seed)
    least = min(max(share, _FEWEST / len(requests)), 1.0)
    chosen: list[int] = []
    for task in dict.fromkeys(r.task for r in requests):
        places = [i for i, r in enumerate(requests) if r.task == task]
        chosen += rng.permutation(places)[: max(round(least * len(places)), 1)].tolist()
    return [requests[i] for i in sorted(chosen)]


def _tested(
    search: _Search, name: str, default: Candidate, best: Candidate, test: list[Recorded], train_gain: float
) -> Tuned:
    """The verdict of the held-out requests."""

    def measure(candidate: Candidate) -> list[Tally]:
        replay = search.run(candidate)
        replay.run(search.requests)
        return replay.run(test)

    plain = Replay(None, 0, search.times).run(test)
    before = measure(default)
    after = before if best == default else measure(best)
    sizes = len(search.requests), len(test)
    figures = speedup(after, before), speedup(before, plain)[0], speedup(after, plain)[0]
    return Tuned(name, default, best, len(search.tried), *sizes, train_gain, *figures)
