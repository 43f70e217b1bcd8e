"""Replays recorded outputs through a proposer: what it would have drafted, and how much faster the server would be.

Greedy decoding is deterministic and drafts change no distribution, so a recorded output is what a server would have
emitted with any drafts. The proposer is driven by :class:`vllm_specplug.host.lifecycle.Lifecycle` as in a server: it
sees a request when that has its first token, may pause, and is shown afterwards what it slept through. Requests run
one after another, in the order recorded, or some at once; what is learned stays.

Counting. The first output token comes from the prompt's own step, which has no draft: neither counts. A verify step is
one target step after that; it emits the accepted drafts and one token more. ``MAT`` is the tokens emitted by verify
steps per request and verify step (no drafts: 1.00). A step drafts at most ``limit`` nodes, and none past what the
request may hold: its recorded bound, or the output's end. Trees are walked from the root, a chain being the tree it is.

Time. With step times known (:mod:`.step_times`), a step takes what they say of its rows, and in addition what drafting
for it took: the proposer as measured here, and the host as recorded. The proposer is told so, as by a server's clock,
and budgets draft accordingly. Without them budgets have no clock and draft whatever they may.

Proposers that want the target's top-k get the recorded one, but only for the rows the recording knows: the last token
and the accepted nodes. Rejected rows are left out.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_specplug import registry
from vllm_specplug.host import forests
from vllm_specplug.host.lifecycle import Lifecycle, Rows, TopK
from vllm_specplug.host.step_clock import PROBE_ROWS
from vllm_specplug.options import OptionError
from vllm_specplug.proposers.adaptive_length import AdaptiveLength
from vllm_specplug.proposers.base import DraftForest, Int32Array, Proposer, Request, StepLoad, StepResult

from .files import Recorded, TraceError
from .step_times import StepTimes

BINS = 20


@dataclass(slots=True)
class Tally:
    """Sums over requests. ``bins``: nodes by claimed probability: how many, what they claimed, and accepted ones."""

    requests: int = 0
    tokens: int = 0
    steps: int = 0
    drafts: int = 0
    accepted: int = 0
    paused: int = 0  # steps
    propose_s: float = 0.0
    observe_s: float = 0.0
    seconds: float = 0.0  # of verify steps, drafting included; shared by the requests of a step
    bins: np.ndarray = field(default_factory=lambda: np.zeros((BINS, 3)))

    def __iadd__(self, other: Tally) -> Tally:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    @property
    def decoded(self) -> int:
        """Tokens emitted by verify steps."""
        return self.steps + self.accepted

    def metrics(self) -> dict[str, tuple[float, str]]:
        """Name: (value, unit)."""
        steps = max(self.steps, 1)
        count, claimed, hit = self.bins.T
        return {
            "mat": (self.decoded / steps, "tokens/step"),
            "mat_all": (self.tokens / steps, "tokens/step"),
            "drafts": (self.drafts / steps, "nodes/step"),
            "accepted": (self.accepted / max(self.drafts, 1), "share"),
            "propose": (self.propose_s / steps * 1e6, "us/step"),
            "observe": (self.observe_s / steps * 1e6, "us/step"),
            "ece": (float(np.abs(claimed - hit).sum() / max(count.sum(), 1)), "probability"),
        }


def accepted_path(forest: DraftForest, truth: Int32Array) -> list[int]:
    """Nodes of a one-request forest along the longest path equal to the start of ``truth``."""
    return _walk(forest.tokens.tolist(), forest.parents.tolist(), truth)


def _walk(tokens: Sequence[int], parents: Sequence[int], truth: Int32Array) -> list[int]:
    path: list[int] = []
    children = {(p, t): j for j, (p, t) in enumerate(zip(parents, tokens, strict=True))}
    node = -1
    for token in truth[: len(tokens)].tolist():
        node = children.get((node, token), -2)
        if node < 0:
            break
        path.append(node)
    return path


def step_of(recorded: Recorded, at: int, accepted: int, drafted: int, topk: bool) -> StepResult:
    """The step of the request in slot 0 that emits ``accepted + 1`` tokens from position ``at`` of the output."""
    end = at + accepted + 1
    counts = [np.array([x], np.int32) for x in (0, drafted, accepted)]
    rows: dict[str, Any] = {}
    if topk and recorded.topk_ids is not None:
        names = ("row_tokens", "row_offsets", "row_parents", "topk_ids", "topk_logprobs")
        rows = dict(zip(names, _rows([(recorded, at, accepted)], 8), strict=True))
    offsets = np.array([0, accepted + 1], np.int32)
    return StepResult(counts[0], recorded.output[at:end], offsets, counts[1], counts[2], **rows)


def _rows(parts: Iterable[tuple[Recorded, int, int]], width: int) -> TopK:
    """The known rows of requests that emit ``accepted + 1`` tokens from position ``at`` of their outputs."""
    tokens, sizes, parents, ids, logprobs = [], [0], [], [], []
    for recorded, at, accepted in parts:
        assert recorded.topk_ids is not None and recorded.topk_logprobs is not None
        end = at + accepted + 1
        tokens += [recorded.output[at - 1 : at] if at else recorded.prompt[-1:], recorded.output[at : end - 1]]
        sizes.append(accepted + 1)
        parents.append(np.arange(-1, accepted, dtype=np.int32))
        ids.append(recorded.topk_ids[at:end, :width])
        logprobs.append(recorded.topk_logprobs[at:end, :width])
    offsets = np.cumsum(sizes, dtype=np.int32)
    return np.concatenate(tokens), offsets, np.concatenate(parents), np.concatenate(ids), np.concatenate(logprobs)


class _Watched:
    """A proposer whose time is taken and whose last drafts are kept."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self.forest: DraftForest | None = None
        self.propose_s = self.observe_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proposer, name)

    def observe(self, step: StepResult) -> None:
        start = time.perf_counter()
        self._proposer.observe(step)
        self.observe_s += time.perf_counter() - start

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        start = time.perf_counter()
        forest = self._proposer.propose(slots, limits)
        self.propose_s += time.perf_counter() - start
        self.forest = forest
        return forest

    def take(self) -> tuple[float, float]:
        """Seconds in ``propose`` and ``observe`` since the last call."""
        seconds = self.propose_s, self.observe_s
        self.propose_s = self.observe_s = 0.0
        return seconds


@dataclass(slots=True)
class _Lane:
    """A request that runs. ``at``: tokens emitted; ``parents``: of its drafts, None for a chain."""

    name: str
    recorded: Recorded
    tally: Tally
    at: int = 0
    tokens: list[int] = field(default_factory=list)
    parents: list[int] | None = None
    probs: np.ndarray | None = None

    def path(self) -> list[int]:
        """The accepted nodes of its drafts; the last token of an output always is the target's own."""
        truth = self.recorded.output[self.at : -1]
        if self.parents is not None:
            return _walk(self.tokens, self.parents, truth)
        count = 0
        for drafted, emitted in zip(self.tokens, truth[: len(self.tokens)].tolist(), strict=False):
            if drafted != emitted:
                break
            count += 1
        return list(range(count))

    @property
    def held(self) -> int:
        return len(self.recorded.prompt) + self.at

    def request(self, slot: int, trees: bool) -> Request:
        """As the host admits it: with its first token."""
        recorded = self.recorded
        bound = recorded.max_tokens or len(recorded.prompt) + len(recorded.output)
        return Request(
            slot=slot,
            request_id=self.name,
            prompt=np.concatenate([recorded.prompt, recorded.output[: self.at]]),
            num_output=self.at,
            max_tokens=max(bound, len(recorded.prompt) + len(recorded.output)),
            temperature=recorded.temperature,
            namespace=recorded.namespace,
            branching=trees and recorded.trees,
        )


class Replay:
    """A proposer's run over recorded requests; several calls of :meth:`run` go on with what was learned."""

    def __init__(
        self,
        proposer: Proposer | None,
        limit: int,
        times: StepTimes | None = None,
        width: int = 1,
        trees: bool = True,
    ) -> None:
        """
        Args:
            proposer: warm; None: nothing is drafted.
            limit: most draft nodes per request and step.
            times: of steps; None: not known, no time passes.
            width: requests at once.
            trees: whether drafts may branch.
        """
        self._watched = None if proposer is None else _Watched(proposer)
        self._lifecycle = None if self._watched is None else Lifecycle(self._watched, 1 << 31)  # type: ignore[arg-type]
        if self._lifecycle is not None:
            forests.warm_up()
            self._lifecycle.counts.warm_up()
        self._topk = 0 if proposer is None or not proposer.wants_topk else proposer.topk
        if times is not None and isinstance(proposer, AdaptiveLength) and not proposer.times.ready:
            _prime(proposer, times)
        self._limit, self._times, self._width, self._trees = limit, times, width, trees
        self._resting = False
        self._drafting = 0.0  # of the step to come, in seconds
        self._number = itertools.count()

    def run(self, requests: Iterable[Recorded]) -> list[Tally]:
        """Replay requests; a tally of each, in their order.

        Raises:
            TraceError: the proposer failed on its drafts.
        """
        waiting = (_Lane(str(next(self._number)), r, Tally(1, len(r.output))) for r in requests)
        lanes = list(itertools.islice(waiting, self._width))
        tallies = [lane.tally for lane in lanes]
        while lanes:
            self._step(lanes)
            ended = [lane for lane in lanes if lane.at >= len(lane.recorded.output)]
            if ended:
                if self._lifecycle is not None:
                    self._lifecycle.end([lane.name for lane in ended])
                lanes = [lane for lane in lanes if lane.at < len(lane.recorded.output)]
                started = list(itertools.islice(waiting, self._width - len(lanes)))
                tallies += [lane.tally for lane in started]
                lanes += started
        if self._lifecycle is not None and self._lifecycle.counters.errors:
            raise TraceError(f"proposer {self._lifecycle.proposer.name} failed; see the log above")
        return tallies

    def _step(self, lanes: list[_Lane]) -> None:
        """Verify the drafts of all lanes, emit, and draft for the next step."""
        paths = [lane.path() if lane.at else [] for lane in lanes]
        decoding = [lane for lane in lanes if lane.at]
        seconds, load = self._pass_time(decoding, [lane for lane in lanes if not lane.at])
        for lane in decoding:
            lane.tally.steps += 1
            lane.tally.seconds += seconds / len(decoding)
            lane.tally.drafts += len(lane.tokens)
            lane.tally.paused += self._resting
        emitted, before, drafted = [], [], []
        for lane, path in zip(lanes, paths, strict=True):
            lane.tally.accepted += len(path)
            if lane.probs is not None:
                _calibration(lane.tally.bins, lane.probs, path)
            before.append(lane.at)
            drafted.append(len(lane.tokens))
            emitted.append(lane.recorded.output[lane.at : lane.at + len(path) + 1].tolist())
            lane.at += len(path) + 1
        if self._lifecycle is None:
            return
        trees = any(lane.parents is not None for lane in lanes)
        for lane in lanes:
            lane.tokens, lane.parents, lane.probs = [], None, None
        overhead, self._drafting = self._drafting, 0.0
        ids = [lane.name for lane in lanes]
        was_resting, self._resting = self._resting, self._lifecycle.asleep(ids, emitted)
        if self._resting:
            return
        known = self._topk and all(lane.recorded.topk_ids is not None for lane in lanes)
        parts = [(lane.recorded, at, len(path)) for lane, at, path in zip(lanes, before, paths, strict=True)]
        batch = Rows(
            rows=np.arange(len(lanes), dtype=np.int32),
            ids=ids,
            emitted=emitted,
            totals=np.array([lane.held for lane in lanes], np.int32),
            drafted=np.array(drafted, np.int32),
            limits=np.full(len(lanes), self._limit, np.int32),
            topk=_rows(parts, self._topk) if known else None,
            load=load,
            seconds=seconds if self._times is not None and len(decoding) == len(lanes) else math.nan,
            overhead=math.nan if was_resting else overhead,
            paths=_paths(paths) if trees else None,
        )
        self._draft(lanes, batch)

    def _pass_time(self, decoding: list[_Lane], new: list[_Lane]) -> tuple[float, StepLoad | None]:
        """Seconds of the step, drafting for it included, and what it computes."""
        if self._times is None:
            return 0.0, None
        rows = [1 + len(lane.tokens) for lane in decoding]
        contexts = [lane.held - 1 for lane in decoding]
        load = StepLoad(
            len(decoding), sum(rows), sum(contexts), sum(r * c for r, c in zip(rows, contexts, strict=True))
        )
        if not decoding:
            return 0.0, StepLoad(0, 0, 0, 0, sum(len(lane.recorded.prompt) for lane in new))
        return self._times.predict(load) + self._drafting, load

    def _draft(self, lanes: list[_Lane], batch: Rows) -> None:
        lifecycle, watched = self._lifecycle, self._watched
        assert lifecycle is not None and watched is not None
        watched.forest = None
        before = _spent_ns(lifecycle)
        drafts = lifecycle.step(batch, lambda row, name, slot: lanes[row].request(slot, self._trees))
        if self._times is not None:
            self._drafting = self._times.host_s + (_spent_ns(lifecycle) - before) * 1e-9
        propose_s, observe_s = watched.take()
        probs = iter(() if watched.forest is None else _probs(watched.forest))
        for lane, tokens in zip(lanes, drafts, strict=True):
            lane.tally.propose_s += propose_s / len(lanes)
            lane.tally.observe_s += observe_s / len(lanes)
            lane.tokens = tokens
            tree = lifecycle.trees.get(lane.name)
            lane.parents = None if tree is None else tree.parents.tolist()
            lane.probs = next(probs) if tokens else None


def _prime(proposer: AdaptiveLength, times: StepTimes) -> None:
    """Time a few steps, as a server does when it starts."""
    if proposer.options.start_probe:
        loads = [StepLoad(1, rows, 0, 0) for rows in PROBE_ROWS]
        proposer.times.prime(loads, [times.predict(load) for load in loads])


def _spent_ns(lifecycle: Lifecycle) -> int:
    counters = lifecycle.counters
    return counters.observe_ns + counters.propose_ns + counters.admit_ns


def _probs(forest: DraftForest) -> Iterator[np.ndarray]:
    """Of the nodes of each request that has any."""
    return (forest.probs[a:b] for a, b in itertools.pairwise(forest.offsets.tolist()) if a < b)


def _paths(paths: Sequence[list[int]]) -> np.ndarray:
    """``int32[n, W]``: the row, among its request's, that emitted each token."""
    found = np.full((len(paths), 1 + max(map(len, paths))), -1, np.int32)
    for i, path in enumerate(paths):
        found[i, 0] = 0
        found[i, 1 : len(path) + 1] = np.array(path, np.int32) + 1
    return found


def _calibration(bins: np.ndarray, probs: np.ndarray, path: list[int]) -> None:
    hits = np.zeros(len(probs))
    hits[path] = 1
    where = np.minimum((probs * BINS).astype(np.int64), BINS - 1)
    np.add.at(bins, where, np.stack([np.ones(len(probs)), probs, hits], axis=1))


def total(tallies: Iterable[Tally]) -> Tally:
    """Their sum."""
    whole = Tally()
    for tally in tallies:
        whole += tally
    return whole


def by_task(requests: Sequence[Recorded], tallies: Sequence[Tally]) -> dict[str, Tally]:
    """Sums per task, in order of appearance, and ``total``."""
    tasks = {request.task: Tally() for request in requests}
    for request, tally in zip(requests, tallies, strict=True):
        tasks[request.task] += tally
    return {**tasks, "total": total(tallies)}


def speedup(
    tallies: Sequence[Tally], plain: Sequence[Tally], seed: int = 0, repeats: int = 1000
) -> tuple[float, float, float]:
    """Tokens per second over that of ``plain``, the same requests without drafts; and its 95% interval, by resampling
    requests."""
    taken = np.array([[t.decoded, t.seconds, p.decoded, p.seconds] for t, p in zip(tallies, plain, strict=True)])
    chosen = np.random.default_rng(seed).integers(0, len(taken), (repeats, len(taken)))
    sums = np.concatenate([taken.sum(0)[None], taken[chosen].sum(1)])
    with np.errstate(divide="ignore", invalid="ignore"):  # none of the resampled requests may have had a verify step
        ratios = sums[:, 0] / sums[:, 1] * sums[:, 3] / sums[:, 2]
    low, high = np.nanpercentile(ratios[1:], (2.5, 97.5))
    return float(ratios[0]), float(low), float(high)


def parse_settings(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["retrieval.min_prob=0.1"]`` as the nested options vLLM's ``additional_config`` would hold.

    Raises:
        OptionError: one is not of that form.
    """
    tree: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, dot, name = path.partition(".")
        if not (equals and dot):
            raise OptionError(f"--option {setting!r} is not SECTION.NAME=VALUE")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        tree.setdefault(section, {})[name] = value
    return tree


def build(name: str, settings: dict[str, dict[str, Any]]) -> tuple[Proposer, Any]:
    """A warm proposer by its registered name, and its options. Raises ``OptionError``."""
    entry = registry.find(name)
    user = registry.parse_options({"specplug": settings})
    user.check(entry)
    proposer = user.build(entry)
    proposer.warm_up()
    return proposer, user.section(entry)
