"""Drafts exactly as much as pays: any proposer's drafts, cut to what is worth verifying at the present load.

Every step the inner proposer drafts for the batch, the step-time model (:mod:`.step_time`) says how long the next step
takes with 0, 1, 2, ... of these nodes in it, and a policy (:mod:`.length_policies`) says which of them to verify. Where
drafting itself costs more than its drafts gain, it pauses: for a while the host leaves the proposer alone, and a step
is the engine's own.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel

from vllm_specplug.options import option

from .acceptance import Acceptance
from .base import DraftForest, Float32Array, Int8Array, Int32Array, Proposer, Request, StepLoad, StepResult
from .length_policies import POLICIES, Drafted, Outcome, Policy, make_policy
from .saved_state import State, join, part
from .step_time import StepTimeModel, base_load

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]

# Steps that drafting is given to prove itself before it pauses, the first pause and the longest.
PATIENCE = 8
FIRST_PAUSE = 4
LONGEST_PAUSE = 32
# A step awake between two pauses may cost this share of the speed; where it costs little, pauses are shorter, since a
# text that becomes predictable meanwhile costs much more.
PROBE_COST = 0.003
# Every so many pauses in a row the best nodes are verified whatever the model says: it may have been wrong.
TRIAL_EVERY = 4
TRIAL_NODES = 2
# And every so often a step has no drafts, for the same reason: where all steps have alike many, nothing tells what one
# row costs. It may cost this share of the speed.
CONTRAST_COST = 0.005
CONTRAST_EVERY = 8
# The batch is another one when it has grown or shrunk by this factor; a pause ends then.
OTHER_LOAD = 1.5
# Until step times are known.
START_PROB = 0.07
# A call of the inner proposer costs about as much as so many nodes beside those it drafts; a first guess of what each
# takes; and calls remembered.
CALL_NODES = 16
NODE_SECONDS = 1e-5
COST_CALLS = 64


@dataclass(frozen=True)
class BudgetOptions:
    """Options of proposers that draft under a budget."""

    policy: str = option(
        "marginal",
        "which drafted tokens are verified: those worth their time by measurement (marginal), or a published rule",
        choices=sorted(POLICIES),
    )
    length: int = option(8, "draft tokens per request, for the policies fixed and opt_tree", low=0, high=128)
    min_prob: float = option(
        0.0,
        "draft no token that is accepted with less than this probability, whatever it costs",
        low=0.0,
        high=1.0,
    )
    pause: bool = option(True, "stop drafting for a while where it gains less than it costs")
    start_probe: bool = option(True, "time a few steps when the server starts, so that the first requests profit")

    def make_policy(self) -> Policy:
        """The chosen policy, with its parameters."""
        sized = {"fixed": {"length": self.length}, "opt_tree": {"nodes": self.length}}
        return make_policy(self.policy, **sized.get(self.policy, {}))


@dataclass(frozen=True)
class AdaptiveLengthOptions(BudgetOptions):
    """Options of the budget around a proposer of the user's choice."""

    inner: str = option(
        "Retrieval",
        "what drafts: a registered proposer, or vLLM's own: vllm:ngram, vllm:suffix",
    )


class _Economy:
    """What drafting is expected to gain and what it costs, as exponential averages over the last steps awake."""

    def __init__(self) -> None:
        self.overhead = 0.0  # of drafting, as a share of a step without drafts
        self._tokens = self._time = 0.0  # more per request and step, and more per step, for the drafts kept
        self._awake = 0

    @property
    def gain(self) -> float:
        """Expected speed over that of a step without drafts."""
        return (1.0 + self._tokens) / (1.0 + self._time)

    @property
    def worse_off(self) -> bool:
        """Whether steps without drafts, and without the work of drafting, would be faster."""
        return self.gain * (1.0 - self.overhead) <= 1.0

    def add(self, tokens: float, time: float, overhead: float) -> None:
        self._awake += 1
        share = 1.0 / min(self._awake, 2 * PATIENCE)
        self._tokens += share * (tokens - self._tokens)
        self._time += share * (time - self._time)
        if overhead == overhead:
            self.overhead += max(share, 1.0 / PATIENCE) * (overhead - self.overhead)

    def proved(self) -> bool:
        """Whether drafting has had its time to prove itself."""
        return self._awake >= PATIENCE

    def forget(self) -> None:
        """Begin anew, but for the overhead."""
        self._tokens = self._time = 0.0
        self._awake = 0


class _DraftingCost:
    """What one more drafted node costs before it is verified."""

    def __init__(self) -> None:
        self._nodes = float(CALL_NODES)  # decayed sums
        self._time = self._nodes * NODE_SECONDS

    @property
    def seconds(self) -> float:
        """Per node."""
        return self._time / self._nodes

    def add(self, nodes: int, seconds: float) -> None:
        """Count a call that drafted ``nodes``. A slow one counts as much as four like those before: others may have
        kept the processor."""
        size = nodes + CALL_NODES
        seconds = min(seconds, 4 * size * self.seconds)
        self._nodes += size - self._nodes / COST_CALLS
        self._time += seconds - self._time / COST_CALLS


class AdaptiveLength(Proposer):
    """Drafts of an inner proposer, cut to what pays.

    Attributes:
        inner: the proposer that drafts.
        times: the step-time model.
        policy: what chooses.
    """

    name: ClassVar[str] = "adaptive_length"
    Options: ClassVar[type] = AdaptiveLengthOptions
    #: Built as ``cls(options, inner)``; ``options.inner`` names the inner proposer.
    wraps: ClassVar[bool] = True

    def __init__(self, options: BudgetOptions, inner: Proposer) -> None:
        self.options = options
        self.inner = inner
        self.topk = inner.topk
        self.bounds_depth = inner.bounds_depth  # type: ignore[misc]  # the inner one's, not the class's
        self.lossless = inner.lossless  # type: ignore[misc]
        self.times = StepTimeModel()
        self.policy = options.make_policy()
        self._acceptance = None if inner.calibrated else Acceptance()
        self._economy = _Economy()
        self._cost = _DraftingCost()
        self._sizes = np.zeros(64, np.int64)  # tokens each request holds, by slot
        self._timed = False  # the host says how long steps take
        self._overhead = math.nan
        self._asleep = 0  # steps left of the pause
        self._pause = 0  # its length; 0 while awake
        self._failed_probes = 0  # in a row
        self._tried = False  # the best nodes were verified in this probe, though they do not pay
        self._requests = 0  # in the last step that drafted
        self._since_contrast = 0
        self._budget = 0  # nodes kept in the last step
        self._totals = dict.fromkeys(("steps", "paused_steps", "offered_nodes", "kept_nodes", "trials", "contrasts"), 0)

    @property
    def wants_topk(self) -> bool:  # type: ignore[override]
        """Whether the inner proposer learns from the target's top-k."""
        return self.inner.wants_topk

    def asleep(self, requests: int, new: int) -> bool:
        """See :meth:`.base.Proposer.asleep`."""
        if self._asleep == 0:
            return False
        other = max(requests, self._requests) > OTHER_LOAD * min(requests, self._requests)
        if other or 2 * new >= requests:
            self._asleep = 0
            return False
        self._asleep -= 1
        self._totals["paused_steps"] += 1
        return True

    def add_request(self, request: Request) -> None:
        """Admit a request."""
        if request.slot >= len(self._sizes):
            more = np.zeros(max(len(self._sizes), request.slot + 1 - len(self._sizes)), np.int64)
            self._sizes = np.concatenate([self._sizes, more])
        self._sizes[request.slot] = len(request.prompt)
        self.inner.add_request(request)

    def remove_request(self, slot: int) -> None:
        """Forget a request."""
        self.policy.forget(slot)
        if self._acceptance is not None:
            self._acceptance.forget(slot)
        self.inner.remove_request(slot)

    def observe(self, step: StepResult) -> None:
        """Learn from a step: what it took, what was accepted, what was emitted."""
        emitted = np.diff(step.offsets)
        self._sizes[step.slots] += emitted
        if step.load is not None:
            self._timed = True
            self._overhead = step.overhead
            self._learn(step, step.load, emitted)
        if self._acceptance is not None:
            self._acceptance.learn(step.slots, step.num_drafted, step.num_accepted)
        self.inner.observe(step)

    def _learn(self, step: StepResult, load: StepLoad, emitted: Int32Array) -> None:
        seconds = bare = math.nan
        if load.prefill == 0 and load.requests and self.times.ready:
            seconds = self.times.predict(load)
            bare = self.times.predict(base_load(load.requests, load.context, self.others.rows))
        if step.seconds == step.seconds:
            self.times.observe(load, step.seconds)
        self.policy.learn(
            Outcome(step.slots, step.num_drafted, step.num_accepted, emitted, seconds, bare, self.others.tokens)
        )

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        """Draft, and keep what pays."""
        curve, others = None, self.others
        if self.times.ready:
            curve = self.times.curve(
                len(slots) + others.requests,
                int(self._sizes[slots].sum()) + others.context,
                int(np.sum(limits)),
                others.rows,
            )
        self.inner.floor = self._floor(len(slots) + others.tokens, curve)
        start = time.perf_counter()
        forest = self.inner.propose(slots, limits)
        self._cost.add(len(forest.tokens), time.perf_counter() - start)
        if self._acceptance is not None:
            forest = dataclasses.replace(forest, probs=self._acceptance.assign(forest, slots))
        contrast = curve is not None and self.options.policy == "marginal" and self._is_contrast()
        keep = np.zeros(len(forest.tokens), np.bool_) if contrast else self._choose(forest, slots, curve)
        trial = not contrast and len(keep) > 0 and self._trial_due() and not keep.any()
        if trial:
            self._tried = True
            keep[np.argsort(-forest.probs, kind="stable")[:TRIAL_NODES]] = True
        totals = self._totals
        totals["steps"] += 1
        totals["trials"] += trial
        totals["contrasts"] += contrast
        totals["offered_nodes"] += len(forest.tokens)
        if not keep.all():
            forest = select(forest, keep)
        self._requests = len(slots)
        if curve is not None and not (trial or contrast) and self._pauses_after(forest, curve):
            # Who sleeps would not see what became of it.
            forest = select(forest, np.zeros(len(forest.tokens), np.bool_))
        self._budget = len(forest.tokens)
        totals["kept_nodes"] += self._budget
        return forest

    def _floor(self, tokens: int, curve: Float64Array | None) -> float:
        """Least probability worth drafting, where a step without drafts emits ``tokens``."""
        least = max(self.options.min_prob, self.floor)
        if curve is None:
            return max(least, START_PROB) if self._timed else least
        if self._trial_due():
            return least
        rate = tokens / curve[0] * max(self._economy.gain, 1.0)
        return max(least, self.policy.floor(), rate * self._cost.seconds)

    def _choose(self, forest: DraftForest, slots: Int32Array, curve: Float64Array | None) -> BoolArray:
        """``bool[N]``: the nodes to verify."""
        keep = forest.probs >= self.inner.floor
        size = len(forest.tokens)
        if curve is None or not size:
            return keep
        matched = forest.matched if forest.matched is not None else np.zeros(len(slots), np.int32)
        drafted = Drafted(forest.probs, forest.parents, forest.offsets, slots, matched, self.others.tokens)
        chosen = self.policy.choose(drafted, curve)
        return np.logical_and(keep, chosen)

    def _is_contrast(self) -> bool:
        self._since_contrast += 1
        if self._since_contrast < max(CONTRAST_EVERY, (self._economy.gain - 1.0) / CONTRAST_COST):
            return False
        self._since_contrast = 0
        return True

    def _trial_due(self) -> bool:
        return self._failed_probes > 0 and self._failed_probes % TRIAL_EVERY == 0 and not self._tried

    def _pauses_after(self, forest: DraftForest, curve: Float64Array) -> bool:
        """Whether drafting pauses now."""
        economy, size = self._economy, len(forest.tokens)
        bare = float(curve[0])
        economy.add(
            float(forest.probs.sum()) / max(self._requests + self.others.tokens, 1),
            float(curve[size]) / bare - 1.0,
            self._overhead / bare,
        )
        if not self.options.pause or self.options.policy != "marginal":
            return False
        probing = self._pause > 0 and not economy.proved()
        if not economy.worse_off and not probing:
            self._pause = self._failed_probes = 0
        if not economy.worse_off or not (probing or economy.proved()):
            return False
        self._failed_probes += 1
        self._tried = False
        longest = min(max(math.ceil(economy.overhead / PROBE_COST), FIRST_PAUSE), LONGEST_PAUSE)
        self._pause = min(max(2 * self._pause, FIRST_PAUSE), longest)
        self._asleep = self._pause
        economy.forget()
        return True

    def warm_up(self) -> None:
        """Compile everything."""
        self.inner.warm_up()
        trial = StepTimeModel()
        load = StepLoad(1, 2, 8, 16)
        for _ in range(2):
            trial.observe(load, 0.01)
        trial.predict(load)
        curve = trial.curve(1, 8, 2)
        one = np.ones(1, np.int32)
        forest = DraftForest(
            np.arange(2, dtype=np.int32),
            np.array([-1, 0], np.int32),
            np.array([0.5, 0.25], np.float32),
            np.zeros(2, np.int8),
            np.array([0, 2], np.int32),
        )
        policy = self.options.make_policy()
        policy.choose(Drafted(forest.probs, forest.parents, forest.offsets, one * 0, one), curve)
        policy.learn(Outcome(one * 0, one, one, one + 1, 0.01, 0.01))
        if self._acceptance is not None:
            learner = Acceptance()
            learner.assign(forest, one * 0)
            learner.learn(one * 0, one, one)
        select(forest, np.array([True, False]))

    def stats(self) -> dict[str, float]:
        """Counters, the budget's state, the step-time model's and the inner proposer's."""
        own = {name: float(count) for name, count in self._totals.items()}
        own |= {
            "budget_nodes": float(self._budget),
            "expected_gain": self._economy.gain,
            "overhead_ratio": self._economy.overhead,
            "node_seconds": self._cost.seconds,
            "paused": float(self._asleep > 0),
            "pause_steps": float(self._pause),
        }
        return own | self.times.stats() | self.inner.stats()

    def state(self) -> State:
        """What was learned, the inner proposer's included."""
        parts = {"inner": self.inner.state(), "step_time": self.times.state()}
        if self._acceptance is not None:
            parts["acceptance"] = self._acceptance.state()
        return join(parts)

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over what another one learned. Raises ``ValueError`` if it does not fit."""
        times, acceptance = part(state, "step_time"), part(state, "acceptance")
        if times:  # another machine's are left out
            self.times.restore(times)
        if self._acceptance is not None and acceptance:
            self._acceptance.restore(acceptance)
        self.inner.restore(part(state, "inner"))

    def close(self) -> None:
        """Close the inner proposer."""
        self.inner.close()


@kernel
def _select(
    keep: BoolArray,
    parents: Int32Array,
    offsets: Int32Array,
    tokens: Int32Array,
    probs: Float32Array,
    sources: Int8Array,
    new_parents: Int32Array,
    new_offsets: Int32Array,
    new_tokens: Int32Array,
    new_probs: Float32Array,
    new_sources: Int8Array,
    place: Int32Array,
) -> bool:
    """Copy the kept nodes; ``place``: scratch. Returns whether every kept node's parent is kept."""
    at = 0
    for i in range(len(offsets) - 1):
        start, first = offsets[i], at
        for j in range(start, offsets[i + 1]):
            place[j] = -1
            if not keep[j]:
                continue
            parent = parents[j]
            if parent >= 0:
                if place[start + parent] < 0:
                    return False
                parent = place[start + parent]
            place[j] = at - first
            new_tokens[at], new_parents[at] = tokens[j], parent
            new_probs[at], new_sources[at] = probs[j], sources[j]
            at += 1
        new_offsets[i + 1] = at
    return True


def select(forest: DraftForest, keep: BoolArray) -> DraftForest:
    """The forest of the nodes ``keep`` (``bool[N]``). Raises ``ValueError`` if one is kept whose parent is not."""
    size = int(keep.sum())
    ints = np.empty((2, size), np.int32)
    offsets = np.zeros(len(forest.offsets), np.int32)
    probs, sources = np.empty(size, np.float32), np.empty(size, np.int8)
    place = np.empty(len(keep), np.int32)
    whole = _select(
        keep,
        forest.parents,
        forest.offsets,
        forest.tokens,
        forest.probs,
        forest.sources,
        ints[0],
        offsets,
        ints[1],
        probs,
        sources,
        place,
    )
    if not whole:
        raise ValueError("a node was kept whose parent was not")
    return DraftForest(ints[1], ints[0], probs, sources, offsets, forest.matched)
