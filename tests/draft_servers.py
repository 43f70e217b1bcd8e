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
    """A GPU: rows are nearly free up to 256, then it computes as fast as it can; a little for each request."""
    rows = n * (1 + k)
    return 0.008 + 2e-5 * n + 1e-6 * rows + 3e-5 * max(rows - 256, 0)


def gpu_without_graphs(n: int, k: int) -> float:
    """The same, where steps of more than 128 rows have no CUDA graph and are launched kernel by kernel."""
    return gpu(n, k) + (0.005 if n * (1 + k) > 128 else 0.0)


def cpu(n: int, k: int) -> float:
    """A CPU: each row costs a part of a step."""
    return 0.03 + 0.0022 * n * (1 + k)


class Chains:
    """Chains whose tokens are accepted one after the other, each with the same probability within a stretch of its
    request's text, ``high`` or ``low``; stretches last so many steps on average. A server that sees the same texts with
    other lengths sees the same luck."""

    def __init__(self, high: float = 0.85, low: float = 0.3, stretch: float = 20.0) -> None:
        self.high, self.low, self.stretch = high, low, stretch
        self._good = np.zeros(0, np.bool_)

    def accepted(self, rng: np.random.Generator, requests: int, k: int) -> np.ndarray:
        """``int[requests]`` accepted draft tokens out of k each."""
        changes, luck = rng.random((2, requests))
        if requests > len(self._good):
            self._good = np.resize([True, False], requests)
        flip = changes[:requests] < 1.0 / self.stretch
        self._good[:requests] ^= flip
        prob = np.where(self._good[:requests], self.high, self.low)
        with np.errstate(divide="ignore"):
            return np.minimum(np.log(luck) / np.log(prob), k).astype(int)


class Trees:
    """Trees: k nodes are about sqrt(2k) deep, and the more of them are left for siblings, the likelier each depth."""

    def __init__(self, prob: float = 0.55) -> None:
        self.prob = prob

    def accepted(self, rng: np.random.Generator, requests: int, k: int) -> np.ndarray:
        """See :meth:`Chains.accepted`."""
        luck = rng.random(requests)
        depth = round(math.sqrt(2.0 * k))
        prob = 1.0 - (1.0 - self.prob) ** (1.0 + 0.3 * (k - depth) / max(depth, 1))
        return np.minimum(np.log(luck) / np.log(prob), depth).astype(int)


@dataclass
class Server:
    """Verifies the length chosen one step before, and tells a step's outcome one step later.

    Attributes:
        tokens, seconds: emitted and passed so far; a hiccup of the machine is told, but not counted.
        lengths: of each step.
    """

    cost: Cost
    texts: Any
    seed: int = 0
    noise: float = 0.03
    hiccups: float = 0.01
    tokens: int = 0
    seconds: float = 0.0
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self._drafted = self._requests = 0
        self._before: tuple[int, list[int], float] | None = None

    def run(self, chooser: Any, requests: int, steps: int) -> float:
        """Tokens per second of so many steps."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(steps):
            self.step(chooser, requests)
        return (self.tokens - tokens) / (self.seconds - seconds)

    def step(self, chooser: Any, requests: int) -> None:
        """One step."""
        # New requests bring prompts, and have no drafts yet: such a step's time says nothing.
        changed, self._requests = requests != self._requests, requests
        k = 0 if changed else self._drafted
        self._drafted = chooser.choose(requests)
        emitted = (1 + self.texts.accepted(self.rng, requests, k)).tolist()
        seconds = self.cost(requests, k) * math.exp(self.noise * self.rng.standard_normal())
        self.lengths.append(k)
        self.tokens += sum(emitted)
        self.seconds += seconds
        if self.rng.random() < self.hiccups:
            seconds *= 20.0
        if self._before is not None:
            chooser.observe(*self._before)
        self._before = k, emitted, math.nan if changed else seconds


class Fixed:
    """Always the same length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def choose(self, requests: int) -> int:
        return self.length

    def observe(self, length: int, emitted: Sequence[int], seconds: float) -> None:
        pass


def rate(server: Server, chooser: Any, phases: Sequence[tuple[int, int]]) -> float:
    """Tokens per second over ``phases``, (requests, steps) each, where every phase has the same work to do whoever
    chooses: as much as its steps without drafts do. A phase that is served faster is over sooner."""
    work = [requests * steps for requests, steps in phases]
    return sum(work) / sum(w / server.run(chooser, *phase) for w, phase in zip(work, phases, strict=True))
