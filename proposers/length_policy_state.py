"""Length policies: what they are shown, their interface, and what they remember from step to step."""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from .base import Float32Array, Int32Array

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

# Steps over which the gain of a load is averaged.
WINDOW = 64


class Drafted(NamedTuple):
    """What was drafted for a batch of ``n`` requests, ``N`` nodes in all; see :class:`.base.DraftForest`."""

    probs: Float32Array  #: [N] probability that the node is reached and accepted
    parents: Int32Array  #: [N] within the request's nodes, -1: its last token
    offsets: Int32Array  #: [n + 1]
    slots: Int32Array  #: [n]
    matched: Int32Array  #: [n] the request's last tokens that the draft's source has seen before; zeros if unknown
    given: float = 0.0  #: tokens that the step emits for requests drafted for elsewhere


class Outcome(NamedTuple):
    """What a verify step did to ``n`` requests."""

    slots: Int32Array  #: [n]
    drafted: Int32Array  #: [n] nodes verified
    accepted: Int32Array  #: [n] of them accepted
    emitted: Int32Array  #: [n] tokens emitted
    seconds: float  #: the model's time of the step as it was; NaN if unknown
    base_seconds: float  #: and had it not had these drafts; NaN if unknown
    given: float = 0.0  #: tokens emitted for requests drafted for elsewhere


class Policy(abc.ABC):
    """Chooses which drafted nodes are verified, and learns from what that gave."""

    #: What users select it by.
    name: ClassVar[str]

    @abc.abstractmethod
    def choose(self, drafted: Drafted, seconds: Float64Array) -> BoolArray:
        """``bool[N]`` the nodes to verify; no node without its parent.

        ``seconds[k]`` (``float64[>= N + 1]``, finite, positive) is the predicted time of the step with k draft rows in
        the batch. Entries beyond N make :meth:`floor` surer.

        Raises:
            ValueError: if ``drafted`` is no forest, or ``seconds`` too short.
        """

    def learn(self, outcome: Outcome) -> None:  # noqa: B027 - an optional hook
        """A step was verified. Default: nothing."""

    def forget(self, slot: int) -> None:  # noqa: B027 - an optional hook
        """A request ended. Default: nothing."""

    def floor(self) -> float:
        """Nodes less probable than this will surely be dropped next time. Default: 0."""
        return 0.0


class Gain:
    """Long-run speed with drafts over that without, for every power of two of requests.

    The ratio of two averages over steps: tokens per request, and time over that of the same step without drafts.
    """

    def __init__(self) -> None:
        self._tokens = np.zeros(32)  # by bit length of the number of requests: decayed sums over steps
        self._times = np.zeros(32)
        self._steps = np.zeros(32, np.int64)

    def learn(self, outcome: Outcome) -> None:
        """Add a step; one whose times are unknown says nothing."""
        if len(outcome.slots) == 0 or not (outcome.seconds > 0 and outcome.base_seconds > 0):
            return
        n = len(outcome.slots) + outcome.given  # tokens without these drafts
        # Both sums forget alike, so their ratio is not biased while they are young.
        load, stay = int(n).bit_length(), 1.0 - 1.0 / WINDOW
        self._tokens[load] = stay * self._tokens[load] + (float(outcome.emitted.sum()) + outcome.given) / n
        self._times[load] = stay * self._times[load] + outcome.seconds / outcome.base_seconds
        self._steps[load] += 1

    def at(self, requests: int) -> tuple[float, int]:
        """Gain at this load, at least 1 for drafting nothing attains that; and steps it is known from."""
        load = requests.bit_length()
        steps = int(self._steps[load])
        return (max(1.0, float(self._tokens[load] / self._times[load])) if steps else 1.0), steps


class Depths:
    """How deep each slot's kept draft is. An outcome counts nodes, and a tree's rejected siblings are no levels."""

    def __init__(self) -> None:
        self._kept = np.zeros(0, np.int64)

    def keep(self, slots: Int32Array, depths: Int64Array) -> None:
        """Remember the depths (``int64[n]``) of drafts about to be verified."""
        missing = int(slots.max(initial=-1)) + 1 - len(self._kept)
        if missing > 0:
            self._kept = np.concatenate([self._kept, np.zeros(missing + 64, np.int64)])
        self._kept[slots] = depths

    def verified(self, outcome: Outcome) -> Int64Array:
        """``int64[n]`` levels verified: at most as many as nodes, and no fewer than accepted."""
        known = outcome.slots < len(self._kept)
        kept = np.zeros(len(outcome.slots), np.int64)
        kept[known] = self._kept[outcome.slots[known]]
        levels: Int64Array = np.maximum(np.minimum(kept, outcome.drafted), outcome.accepted)
        return levels


class Beliefs:
    """A Beta distribution per slot, of the probability that its drafts are accepted."""

    def __init__(self, a: float, b: float) -> None:
        self._prior = np.array([a, b])
        self._rows = np.zeros((0, 2))

    def _reserve(self, slots: Int32Array) -> None:
        missing = int(slots.max(initial=-1)) + 1 - len(self._rows)
        if missing > 0:
            self._rows = np.concatenate([self._rows, np.tile(self._prior, (missing + 64, 1))])

    def of(self, slots: Int32Array) -> tuple[Float64Array, Float64Array]:
        """Its parameters a and b, each ``float64[n]``."""
        self._reserve(slots)
        rows = self._rows[slots]
        return rows[:, 0], rows[:, 1]

    def add(self, slots: Int32Array, accepted: npt.NDArray[np.integer], rejected: npt.NDArray[np.integer]) -> None:
        """Count outcomes, each ``[n]``."""
        self._reserve(slots)
        self._rows[slots] += np.stack([accepted, rejected], axis=1)

    def forget(self, slot: int) -> None:
        """Back to the prior."""
        if slot < len(self._rows):
            self._rows[slot] = self._prior
