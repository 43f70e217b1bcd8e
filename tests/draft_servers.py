"""Simulated servers that schedule a step before the last one's tokens are known, for draft lengths to be chosen on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Seconds of a step of n requests with k draft tokens each, without noise.
Cost = Callable[[int, int], float]


def gpu(n: int, k: int) -> float:
    """A GPU: rows are free up to 256, then it computes as fast as it can; attention and the host per request."""
    rows = n * (1 + k)
    return 0.008 + 2e-5 * n + 1e-6 * rows + 3e-5 * max(rows - 256, 0)


def gpu_with_graphs(n: int, k: int) -> float:
    """The same, where steps of more than 512 rows run without a CUDA graph."""
    return gpu(n, k) + (0.004 if n * (1 + k) > 512 else 0.0)


def cpu(n: int, k: int) -> float:
    """A CPU: each row costs a part of a step."""
    return 0.03 + 0.0022 * n * (1 + k)


class Chains:
    """Chains whose tokens are accepted one after the other. Each request is in a predictable stretch of its text or
    not, and changes between them."""

    def __init__(self, high: float = 0.85, low: float = 0.3, stretch: float = 20.0) -> None:
        self.high, self.low, self.stretch = high, low, stretch
        self._good: dict[int, bool] = {}

    def accepted(self, rng: np.random.Generator, request: int, k: int) -> int:
        if request not in self._good or rng.random() < 1.0 / self.stretch:
            self._good[request] = bool(rng.random() < 0.5)
        prob = self.high if self._good[request] else self.low
        return min(int(rng.geometric(1.0 - prob)) - 1, k) if prob < 1.0 else k


class Trees:
    """Trees: k nodes are about sqrt(k) deep, and wider ones are accepted more often at each depth."""

    def __init__(self, prob: float = 0.55) -> None:
        self.prob = prob

    def accepted(self, rng: np.random.Generator, request: int, k: int) -> int:
        depth = round(math.sqrt(2.0 * k)) if k else 0
        prob = 1.0 - (1.0 - self.prob) ** (1.0 + 0.3 * max(k - depth, 0) / max(depth, 1))
        return min(int(rng.geometric(1.0 - prob)) - 1, depth)


@dataclass
class Server:
    """Takes the chooser's length for a step two choices later, as a scheduler does that runs ahead.

    Attributes:
        tokens, seconds: emitted and passed so far; a hiccup of the machine is observed, but not counted.
        chosen: lengths, by step.
    """

    cost: Cost
    texts: Any
    seed: int = 0
    noise: float = 0.03
    hiccups: float = 0.01
    tokens: float = 0.0
    seconds: float = 0.0
    chosen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self._drafted = 0
        self._before: tuple[int, list[int], float] | None = None
        self._requests = 0

    def run(self, chooser: Any, requests: int, steps: int) -> float:
        """Tokens per second of so many steps."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(steps):
            self.step(chooser, requests)
        return (self.tokens - tokens) / (self.seconds - seconds)

    def step(self, chooser: Any, requests: int) -> None:
        changed, self._requests = requests != self._requests, requests
        k = 0 if changed else self._drafted
        self._drafted = chooser.choose(requests)
        self.chosen.append(k)
        emitted = [1 + self.texts.accepted(self.rng, i, k) for i in range(requests)]
        seconds = self.cost(requests, k) * self.rng.lognormal(0.0, self.noise)
        self.tokens += sum(emitted)
        self.seconds += seconds
        if self.rng.random() < self.hiccups:
            seconds *= 20.0
        if self._before is not None:
            chooser.observe(*self._before)
        # New requests bring prompts, and have no drafts yet: such a step's time says nothing.
        self._before = k, emitted, math.nan if changed else seconds


class Fixed:
    """Always the same length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def choose(self, requests: int) -> int:
        return self.length

    def observe(self, length: int, emitted: Sequence[int], seconds: float) -> None:
        pass
