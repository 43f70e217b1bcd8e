"""Which of the drafted nodes are verified: the rule of this package, and the published ones.

A policy sees what was drafted for the whole batch and keeps a part of it that is closed under parents. Each rule is a
pure function on arrays; the :class:`Policy` of the same name holds what it learns. All of them read path probabilities
as :class:`.base.DraftForest` gives them. The published rules were made for chains whose drafts cost time one by one;
here drafts are there already, and only verifying them costs. What that changes is said at each.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
from vllm_specplug.kernels.memory import kernel

from vllm_specplug.options import nearest

from .base import Int32Array
from .drafted_nodes import by_prob, most_probable, node_depths, path_probs, requests_of, take_most, up_to_depth
from .length_policy_state import (
    Beliefs,
    BoolArray,
    Depths,
    Drafted,
    Float64Array,
    Gain,
    Int64Array,
    Outcome,
    Policy,
)

# Steps after which the long-run gain of a load needs no other estimate beside it.
SETTLED = 8
# The next step's threshold is not this one's; nodes this far under it would hardly be kept.
FLOOR_MARGIN = 0.7
# SVIP: tokens that share what probability the drafted one leaves.
OTHERS = 4


def _check_curve(seconds: Float64Array, size: int) -> None:
    if len(seconds) <= size:
        raise ValueError(f"seconds has {len(seconds)} entries; {size} draft nodes need {size + 1}, one per row count")


def expected_tokens(probs: Float64Array, order: Int64Array, base: float) -> Float64Array:
    """``float64[N + 1]``: tokens that a step with the first 0, 1, 2, ... nodes of ``order`` is expected to emit;
    ``base``: without any, one per request."""
    expected = np.empty(len(order) + 1)
    expected[0] = 0.0
    np.cumsum(probs[order], out=expected[1:])
    expected += base
    return expected


def most_worth(expected: Float64Array, seconds: Float64Array, rate: float) -> int:
    """The marginal rule: how many nodes to verify, the best first, when time is worth ``rate`` tokens per second.

    The fewest nodes that maximise expected tokens minus ``rate`` times seconds. Where seconds are convex in nodes that
    keeps a node if its probability exceeds ``rate`` times the seconds it adds; but it is right for steps and plateaus
    too. With the best long-run tokens per second as ``rate``, it is what attains that (Dinkelbach's argument for
    ratios): a step is worth what it emits beyond what its time would emit on average.

    Args:
        expected: ``float64[N + 1]``, see :func:`expected_tokens`.
        seconds: ``float64[>= N + 1]`` seconds of a step with 0, 1, 2, ... draft rows.
        rate: tokens per second.
    """
    return int(np.argmax(expected - rate * seconds[: len(expected)]))


def least_useful(seconds: Float64Array, kept: int, rate: float) -> float:
    """Probability that a node must exceed to be worth verifying when about ``kept`` others are; NaN if the curve ends
    at 0.

    The least of what any node had to exceed in the upper half of those kept, for the next step may keep fewer, and of
    what any number more would have to, on average.
    """
    half = kept // 2
    before = np.diff(seconds[half : kept + 1]).min() if kept else math.inf
    more = seconds[kept + 1 :]
    after = ((more - seconds[kept]) / np.arange(1, len(more) + 1)).min() if len(more) else math.inf
    slope = min(before, after)
    # Where more rows take less time, any node will do.
    return float(rate * max(slope, 0.0)) if slope < math.inf else math.nan


def marginal(drafted: Drafted, seconds: Float64Array, rate: float) -> BoolArray:
    """``bool[N]``: the nodes that are worth their time, over the whole batch; see :func:`most_worth`.

    Raises:
        ValueError: as :func:`path_probs`, or if ``seconds`` is too short.
    """
    probs = path_probs(drafted)
    _check_curve(seconds, len(probs))
    order = by_prob(probs)
    count = most_worth(expected_tokens(probs, order, len(drafted.slots) + drafted.given), seconds, rate)
    keep = np.zeros(len(probs), np.bool_)
    keep[order[:count]] = True
    return keep


def specdecpp(drafted: Drafted, threshold: float) -> BoolArray:
    """``bool[N]``: nodes with a probability of any rejection on their path <= ``threshold`` (SpecDec++, 2405.19715).

    That probability is 1 - path probability: a threshold on the latter. The paper's comes from a trained head, and the
    token that crosses the threshold is verified there, having been drafted; here it is left out.
    """
    keep: BoolArray = 1.0 - path_probs(drafted) <= threshold
    return keep


def svip(drafted: Drafted, threshold: float) -> BoolArray:
    """``bool[N]``: paths up to where sqrt(0.15 H) > ``threshold`` (SVIP, 2411.18462); H: the draft's entropy in nats.

    The paper has the whole distribution of a draft model. We have only the probability q of the node given its parent,
    and take the entropy of q and of :data:`OTHERS` tokens that share 1 - q: it falls as q rises above an even share;
    below that it is taken to be that of an even share. So in a tree, an unlikely sibling counts as an uncertain draft.
    """
    probs = path_probs(drafted)
    starts = drafted.offsets[requests_of(drafted)]
    above = np.where(drafted.parents < 0, 1.0, probs[starts + drafted.parents])
    q = np.clip(np.divide(probs, above, out=np.zeros(len(probs)), where=above > 0), 1 / (OTHERS + 1), 1.0)
    rest = np.maximum(1.0 - q, np.finfo(np.float64).tiny)
    entropy = -q * np.log(q) - rest * np.log(rest / OTHERS)
    keep: BoolArray = np.sqrt(0.15 * entropy) <= threshold
    _close(drafted.parents, drafted.offsets, keep)
    return keep


@kernel
def _close(parents: Int32Array, offsets: Int32Array, keep: BoolArray) -> None:
    """Drop nodes whose parent is dropped."""
    for i in range(len(offsets) - 1):
        for j in range(offsets[i], offsets[i + 1]):
            if parents[j] >= 0 and not keep[offsets[i] + parents[j]]:
                keep[j] = False


def thompson_depths(a: Float64Array, b: Float64Array, most: int, rng: np.random.Generator) -> Int64Array:
    """``int64[n]`` how deep to draft each request, at most ``most`` (EESD, 2406.03853).

    Before every token, theta is drawn from Beta(a, b) and drafting goes on with probability theta. The paper's length
    of a chain is the depth of a tree here.
    """
    theta = rng.beta(a[:, None], b[:, None], (len(a), most))
    going = rng.random(theta.shape) < theta
    return np.logical_and.accumulate(going, axis=1).sum(axis=1)


def goodput(drafted: Drafted, seconds: Float64Array, acceptance: float) -> int:
    """The one length for all requests that maximises expected tokens per second; 0 allowed (SmartSpec, 2406.14066).

    A token is accepted with probability ``acceptance`` if the one before is, whatever was drafted. The paper's length
    of a chain is the depth of a tree here, and a request drafted less deep takes part with what it has.

    Raises:
        ValueError: as :func:`path_probs`, or if ``seconds`` is too short.
    """
    _check_curve(seconds, len(drafted.probs))
    depths, deepest = node_depths(drafted)
    levels = int(deepest.max(initial=0)) + 1
    rows = np.cumsum(np.bincount(depths, minlength=levels))
    # Requests drafted at least as deep as each level; the token that is emitted anyway is level 0.
    deep = len(deepest) - np.cumsum(np.bincount(deepest + 1, minlength=levels + 1)[:levels])
    expected = np.cumsum(deep * acceptance ** np.arange(levels)) + drafted.given
    return int(np.argmax(expected / seconds[rows]))


@kernel
def _masses(
    order: Int64Array,
    request: Int64Array,
    depths: Int64Array,
    probs: Float64Array,
    most: int,
    counts: Int64Array,
    masses: Float64Array,
) -> None:
    """``masses[i, d]``: sum of the ``most`` greatest probabilities of request i's nodes down to depth d."""
    for j in order:
        i = request[j]
        for d in range(depths[j], masses.shape[1]):
            if counts[i, d] < most:
                counts[i, d] += 1
                masses[i, d] += probs[j]


def opt_tree(drafted: Drafted, nodes: int, threshold: float) -> BoolArray:
    """``bool[N]``: of each request the ``nodes`` most probable nodes (OPT-Tree, 2406.17276; EAGLE-2, 2406.16858).

    For a fixed number of nodes that maximises expected accepted tokens. OPT-Tree stops deepening where one level more
    adds no more than ``threshold`` (0.5) to the kept nodes' probabilities; that level stays, having been drafted.
    With 0 nothing stops, for no deeper level can add what that one does not.
    """
    probs = path_probs(drafted)
    order, request = by_prob(probs), requests_of(drafted)
    depths, deepest = node_depths(drafted)
    shape = (len(deepest), int(deepest.max(initial=0)) + 1)
    counts, masses = np.zeros(shape, np.int64), np.zeros(shape)
    _masses(order, request, depths, probs, nodes, counts, masses)
    stops = np.diff(masses, axis=1, append=masses[:, -1:]) <= threshold  # the last level always does
    allowed = depths <= np.argmax(stops, axis=1)[request] + 1
    keep = np.zeros(len(probs), np.bool_)
    take_most(order[allowed[order]], request, np.full(len(deepest), nodes), keep)
    return keep


def suffix_factor(drafted: Drafted, factor: float, offset: float, min_prob: float) -> BoolArray:
    """``bool[N]``: floor(factor x match + offset) nodes per request, each >= ``min_prob`` (SuffixDecoding, 2411.04975).

    The match is how many of the request's last tokens the draft's source has seen in a row before. As there, in a tree
    the number limits nodes, not depth.
    """
    counts = np.maximum(np.floor(factor * drafted.matched + offset), 0)
    return most_probable(drafted, counts) & (path_probs(drafted) >= min_prob)


def _checked(policy: str, parameter: str, value: float, low: float, high: float = math.inf) -> float:
    """``value`` if it is a finite number of [low, high]; a whole one if ``low`` is."""
    whole = isinstance(low, int)
    good = isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
    if not good or (whole and value % 1):
        kind = "a whole number" if whole else "a number"
        allowed = f"{kind} from {low} to {high}" if high < math.inf else f"{kind} of at least {low}"
        raise ValueError(f"policy {policy}: {parameter} = {value!r} is not allowed: expected {allowed}")
    return value


class Marginal(Policy):
    """:func:`marginal` at the present rate: tokens per second that the engine attains at this load with drafts.

    The rate is that of a step without drafts times the long-run gain: the ratio of tokens per request and step to the
    time of a step over that of one without drafts, kept for every power of two of requests. While a load is new, the
    best ratio that the step at hand could attain stands in for it.
    """

    name = "marginal"

    def __init__(self) -> None:
        self._gain = Gain()
        self._floor = 0.0

    def choose(self, drafted: Drafted, seconds: Float64Array) -> BoolArray:
        """See :meth:`Policy.choose` and :func:`marginal`."""
        probs = path_probs(drafted)
        _check_curve(seconds, len(probs))
        keep = np.zeros(len(probs), np.bool_)
        if len(drafted.slots) == 0:
            return keep
        order = by_prob(probs)
        expected = expected_tokens(probs, order, len(drafted.slots) + drafted.given)
        rate = self._rate(expected, seconds)
        count = most_worth(expected, seconds, rate)
        keep[order[:count]] = True
        least = least_useful(seconds, count, rate)
        # Without a curve to read it from, the floor sinks until there are drafts again.
        self._floor = FLOOR_MARGIN * (self._floor if math.isnan(least) else least)
        return keep

    def _rate(self, expected: Float64Array, seconds: Float64Array) -> float:
        """Tokens per second."""
        gain, steps = self._gain.at(int(expected[0]))
        rate = gain * float(expected[0] / seconds[0])
        if steps < SETTLED:
            best = float((expected / seconds[: len(expected)]).max())
            rate = (steps * rate + (SETTLED - steps) * best) / SETTLED
        return rate

    def learn(self, outcome: Outcome) -> None:
        """Add a step to the long-run gain of its load."""
        self._gain.learn(outcome)

    def floor(self) -> float:
        """A bit less than what a node had to exceed last time."""
        return self._floor


class Fixed(Policy):
    """The ``length`` most probable nodes of each request: of a chain, the first ones (2211.17192, 2302.01318)."""

    name = "fixed"

    def __init__(self, length: int = 8) -> None:
        self.length = _checked(self.name, "length", length, 0)

    def choose(self, drafted: Drafted, seconds: Float64Array) -> BoolArray:
        """See :func:`most_probable`."""
        return most_probable(drafted, self.length)


class SpecDecPP(Policy):
    """:func:`specdecpp`; the default threshold is the paper's."""

    name = "specdec++"

    def __init__(self, threshold: float = 0.3) -> None:
        self.threshold = _checked(self.name, "threshold", threshold, 0.0, 1.0)

    def choose(self, drafted: Drafted, seconds: Float64Array) -> BoolArray:
        """See :func:`specdecpp`."""
        return specdecpp(drafted, self.threshold)


class Svip(Policy):
    """:func:`svip`; the default threshold is the paper's."""

    name = "svip"

    def __init__(self, threshold: float = 0.3) -> None:
        self.threshold = _checked(self.name, "threshold", threshold, 0.0)

    def choose(self, drafted: Drafted, seconds: Float64Array) -> BoolArray:
        """See :func:`svip`."""
        return svip(drafted, self.threshold)


class Thompson(Policy):
    """:func:`thompson_depths` with a Beta(a, b) per request: accepted levels add to a, levels beyond them to b."""

    name = "thompson"

    def __init__(self, a: float = 1.0, b: float = 1.0, seed: int = 0) -> None:
        tiny = 1e-3
        self._beliefs = Beliefs(_checked(self.name, "a", a, tiny), _checked(self.name, "b", b, tiny))
        self._rng = np.random.default_rng(int(_checked(self.name, "seed", seed, 0)))
        self._depths = Depths()

    def choose(self, drafted: Drafted, seconds: Float64Array) -> BoolArray:
        """See :func:`thompson_depths`."""
        deepest = node_depths(drafted)[1]
        most = int(deepest.max(initial=0))
        depths = np.minimum(thompson_depths(*self._beliefs.of(drafted.slots), most, self._rng), deepest)
        self._depths.keep(drafted.slots, depths)
        return up_to_depth(drafted, depths)

    def learn(self, outcome: Outcome) -> None:
        """Count accepted and other levels of each request."""
        levels = self._depths.verified(outcome)
        self._beliefs.add(outcome.slots, outcome.accepted, levels - outcome.accepted)

    def forget(self, slot: int) -> None:
        """Back to the prior."""
        self._beliefs.forget(slot)


class Goodput(Policy):
    """:func:`goodput` with a moving average of acceptance over ``window`` steps, ``start`` before any.

    Where 0 is best nothing is learned any more, and the paper leaves it there. Here the average goes back to ``start``
    meanwhile, so that drafts are tried again.
    """

    name = "goodput"

    def __init__(self, start: float = 0.5, window: int = 64) -> None:
        self.start = _checked(self.name, "start", start, 0.0, 1.0)
        self.window = _checked(self.name, "window", window, 1)
        self._accepted = self._tried = 0.0  # decayed sums
        self._depths = Depths()

    @property
    def acceptance(self) -> float:
        """Probability that a drafted token is accepted if the one before is."""
        return (self._accepted + self.start) / (self._tried + 1.0)

    def choose(self, drafted: Drafted, seconds: Float64Array) -> BoolArray:
        """See :func:`goodput`."""
        length = goodput(drafted, seconds, self.acceptance)
        depths = np.minimum(node_depths(drafted)[1], length)
        self._depths.keep(drafted.slots, depths)
        return up_to_depth(drafted, depths)

    def learn(self, outcome: Outcome) -> None:
        """Levels after the first one rejected say nothing of acceptance."""
        rejected = self._depths.verified(outcome) > outcome.accepted
        accepted = float(outcome.accepted.sum())
        stay = 1.0 - 1.0 / self.window
        self._accepted = stay * self._accepted + accepted
        self._tried = stay * self._tried + accepted + float(rejected.sum())


class OptTree(Policy):
    """:func:`opt_tree`; the papers' trees have 60 nodes, and OPT-Tree's threshold is 0.5."""

    name = "opt_tree"

    def __init__(self, nodes: int = 60, threshold: float = 0.0) -> None:
        self.nodes = int(_checked(self.name, "nodes", nodes, 0))
        self.threshold = _checked(self.name, "threshold", threshold, 0.0)

    def choose(self, drafted: Drafted, seconds: Float64Array) -> BoolArray:
        """See :func:`opt_tree`."""
        return opt_tree(drafted, self.nodes, self.threshold)


class SuffixFactor(Policy):
    """:func:`suffix_factor`; the defaults are vLLM's (config/speculative.py)."""

    name = "suffix_factor"

    def __init__(self, factor: float = 1.0, offset: float = 0.0, min_prob: float = 0.1) -> None:
        self.factor = _checked(self.name, "factor", factor, 0.0)
        self.offset = _checked(self.name, "offset", offset, -math.inf)
        self.min_prob = _checked(self.name, "min_prob", min_prob, 0.0, 1.0)

    def choose(self, drafted: Drafted, seconds: Float64Array) -> BoolArray:
        """See :func:`suffix_factor`."""
        return suffix_factor(drafted, self.factor, self.offset, self.min_prob)


#: All policies by name; each takes its parameters by keyword.
POLICIES: dict[str, Callable[..., Policy]] = {
    policy.name: policy for policy in (Marginal, Fixed, SpecDecPP, Svip, Thompson, Goodput, OptTree, SuffixFactor)
}


def make_policy(name: str, **parameters: float | None) -> Policy:
    """A new policy; a parameter that is None has its default.

    Raises:
        ValueError: naming what is unknown or out of range, and what is allowed.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}.{nearest(name, POLICIES)} Allowed: {', '.join(sorted(POLICIES))}.")
    known = inspect.signature(POLICIES[name]).parameters
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(
                f"policy {name} has no parameter {parameter!r}.{nearest(parameter, known)} "
                f"Allowed: {', '.join(known) or 'none'}."
            )
    return POLICIES[name](**{key: value for key, value in parameters.items() if value is not None})
