"""Request lifetimes and failure isolation between the engine and a proposer. Imports no vLLM.

The engine speaks in request ids and rows that move between steps; a proposer in slots. :class:`Lifecycle`
keeps that mapping, turns one engine step into ``observe`` and ``propose``, and sees to it that a proposer
that raises costs drafts and nothing else.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_specplug.host.draft_counts import DraftCounts, accepted_nodes
from vllm_specplug.host.forests import KeptTree, read_forest
from vllm_specplug.host.metrics import Snapshot
from vllm_specplug.proposers.base import NO_OTHERS, Int32Array, Others, Proposer, Request, StepLoad, StepResult

logger = logging.getLogger("vllm.specplug")

#: ``(row_tokens, row_offsets, row_parents, topk_ids, topk_logprobs)`` of :class:`StepResult`.
TopK = tuple[Any, Any, Any, Any, Any]

#: Makes the :class:`Request` of a row seen for the first time: ``(row, request_id, slot) -> Request``.
Admit = Callable[[int, str, int], Request]


@dataclass(slots=True)
class Counters:
    """Totals since the proposer was built; times in nanoseconds if their names do not say otherwise.

    ``decode_steps`` counts each step whose time is known once for every request that emitted in it, but for the step
    that ended the request's prompt; ``decode_tokens``: emitted in these; ``decode_seconds``: what they took, also once
    for every request. So tokens over steps are the mean acceptance length, seconds over tokens the time per output
    token.
    """

    steps: int = 0
    drafted: int = 0
    drafted_in_trees: int = 0
    verified: int = 0
    accepted: int = 0
    emitted: int = 0
    errors: int = 0
    requests: int = 0
    requests_without_drafts: int = 0
    requests_with_chains_only: int = 0
    resynchronised: int = 0
    slept: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    observe_ns: int = 0
    propose_ns: int = 0
    admit_ns: int = 0

    def decoded(self, requests: int, tokens: int, seconds: float) -> None:
        """Count a step of ``seconds``, NaN if unknown, in which ``requests`` after their first emitted ``tokens``."""
        if seconds == seconds:
            self.decode_steps += requests
            self.decode_tokens += tokens
            self.decode_seconds += requests * seconds


@dataclass(frozen=True, slots=True)
class Rows:
    """The requests that emitted tokens in one step, in batch order.

    Attributes:
        rows: ``int32[n]`` their batch rows.
        ids: their request ids.
        emitted: the tokens each emitted, at least one.
        totals: ``int32[n]`` tokens each holds now, prompt and emitted ones included.
        drafted: ``int32[n]`` draft tokens verified for each.
        limits: ``int32[n]`` most draft tokens each may get.
        topk: ``(row_tokens, row_offsets, row_parents, ids, logprobs)`` as in :class:`StepResult`, or None.
        load, seconds, overhead: as in :class:`StepResult`.
        paths: ``int32[n, W]``: the row, among its request's, that emitted each token; None if all drafts were chains.
        others: what the step had for requests that are not among these.
    """

    rows: Int32Array
    ids: Sequence[str]
    emitted: Sequence[list[int]]
    totals: Int32Array
    drafted: Int32Array
    limits: Int32Array
    topk: TopK | None = None
    load: StepLoad | None = None
    seconds: float = math.nan
    overhead: float = math.nan
    paths: np.ndarray | None = None
    others: Others = NO_OTHERS


@dataclass(slots=True)
class _Slots:
    """Slot of each live request, and what is known of each slot."""

    of: dict[str, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    #: Tokens the proposer has seen of the slot's request.
    known: Int32Array = field(default_factory=lambda: np.zeros(64, np.int32))
    #: Most tokens the request can hold.
    bound: Int32Array = field(default_factory=lambda: np.zeros(64, np.int32))
    #: The proposer failed on this request: it gets no drafts any more.
    off: np.ndarray = field(default_factory=lambda: np.zeros(64, bool))
    #: Its request may get no drafts, but is learned from.
    muted: np.ndarray = field(default_factory=lambda: np.zeros(64, bool))
    #: Its draft may branch.
    branching: np.ndarray = field(default_factory=lambda: np.zeros(64, bool))
    used: int = 0

    def take(self, request_id: str) -> int:
        if self.free:
            slot = self.free.pop()
        else:
            slot, self.used = self.used, self.used + 1
            if slot == len(self.known):
                for name in ("known", "bound", "off", "muted", "branching"):
                    old = getattr(self, name)
                    setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self.of[request_id] = slot
        self.off[slot] = self.muted[slot] = False
        return slot


class Lifecycle:
    """Drives one proposer. All calls come from the engine's step, one thread."""

    def __init__(self, proposer: Proposer, vocab_size: int, max_model_len: int = 1 << 30) -> None:
        """``max_model_len``: most tokens a request can have rows for, draft nodes included."""
        self.proposer = proposer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.counters = Counters()
        self.counts = DraftCounts(proposer.name)
        #: Branching drafts the engine holds, by request id; chains need not be remembered.
        self.trees: dict[str, KeptTree] = {}
        self._slots = _Slots()
        #: Steps that the proposer slept through: request ids and what each emitted.
        self._held: list[tuple[Sequence[str], Sequence[list[int]]]] = []
        self._logged: set[str] = set()

    @property
    def live(self) -> int:
        """Requests with state."""
        return len(self._slots.of)

    def asleep(self, request_ids: Sequence[str], emitted: Sequence[list[int]], seconds: float = math.nan) -> bool:
        """Whether this step, in which each of these requests emitted tokens, needs no :meth:`step`: the proposer
        sleeps, and is shown these tokens when it wakes. To be asked once per step; the arguments are kept.
        ``seconds``: as in :class:`StepResult`."""
        slots = self._slots.of
        known = [len(new) for i, new in zip(request_ids, emitted, strict=True) if i in slots]
        try:
            asleep = self.proposer.asleep(len(request_ids), len(request_ids) - len(known))
        except Exception:
            self._failed("asleep")
            return False
        if asleep:
            self.counters.slept += 1
            self.counters.decoded(len(known), sum(known), seconds)
            self._held.append((request_ids, emitted))
        return asleep

    def _wake(self) -> None:
        """Show the proposer what it slept through, of the requests it knows."""
        held, self._held = self._held, []
        slots, tokens = self._slots, dict[int, list[int]]()
        for request_ids, emitted in held:
            for request_id, new in zip(request_ids, emitted, strict=True):
                if request_id in slots.of:
                    tokens.setdefault(slots.of[request_id], []).extend(new)
        slot = np.fromiter(tokens, np.int32, len(tokens))
        lengths = np.fromiter(map(len, tokens.values()), np.int32, len(tokens))
        slots.known[slot] += lengths
        self.counters.emitted += int(lengths.sum())
        self.counts.slept(slot, lengths)
        keep = ~slots.off[slot]
        if keep.any():
            nothing = np.zeros(len(slot), np.int32)
            rows = Rows(nothing, (), list(tokens.values()), nothing, nothing, nothing)
            self._observe(self._result(rows, slot, lengths, keep))

    def step(self, batch: Rows, admit: Admit) -> list[list[int]]:
        """Observe one step and draft for the next. Drafts that branch are in :attr:`trees` until the request's next
        step here.

        Returns:
            Draft tokens per request of ``batch``, in its order; empty lists where nothing is drafted.
        """
        counters, slots = self.counters, self._slots
        if self._held:
            self._wake()
        if self.trees:
            for request_id in batch.ids:
                self.trees.pop(request_id, None)
        counters.steps += 1
        self.proposer.others = batch.others
        n = len(batch.ids)
        slot_of = slots.of
        slot = np.fromiter((slot_of.get(i, -1) for i in batch.ids), np.int32, n)
        lengths = np.fromiter(map(len, batch.emitted), np.int32, n)
        counters.emitted += int(lengths.sum())
        counters.verified += int(batch.drafted.sum())
        counters.accepted += int(np.minimum(batch.drafted, lengths - 1).sum())
        seen = slot >= 0
        counters.decoded(int(seen.sum()), int(lengths[seen].sum()), batch.seconds)
        # A step the proposer was not shown (it can happen when an engine feature bypasses drafting) leaves it
        # behind the engine; such a request is admitted anew with all its tokens.
        behind = seen & (slots.known[slot] + lengths != batch.totals)
        for i in np.flatnonzero(~seen | behind):
            if behind[i]:
                counters.resynchronised += 1
                self._remove(batch.ids[i])
            slot[i] = self._admit(int(batch.rows[i]), batch.ids[i], admit)
        slots.known[slot] = batch.totals
        path_nodes = None if batch.paths is None else accepted_nodes(batch.paths, lengths)
        self.counts.verified(slot, batch.drafted, lengths, path_nodes)
        known = seen & ~behind & ~slots.off[slot]
        if known.any():
            self._observe(self._result(batch, slot, lengths, known))
        left = slots.bound[slot] - batch.totals - 1
        most = left
        if self.proposer.bounds_depth:
            most = np.where(slots.branching[slot], self.max_model_len - batch.totals - 1, left)
        room = np.minimum(batch.limits, most)
        active = ~slots.off[slot] & ~slots.muted[slot] & (left > 0) & (room > 0)
        drafts: list[list[int]] = [[] for _ in range(n)]
        if active.any():
            index = np.flatnonzero(active)
            found, trees = self._propose(slot[index], room[index])
            for i, tokens in zip(index.tolist(), found, strict=True):
                drafts[i] = tokens
            for i, tree in zip(index.tolist(), trees, strict=True):
                if tree is not None:
                    counters.drafted_in_trees += len(tree.tokens)
                    self.trees[batch.ids[i]] = tree
        return drafts

    def end(self, request_ids: Sequence[str]) -> None:
        """Forget requests that finished or were aborted; unknown ids are ignored."""
        if self._held and any(i in self._slots.of for i in request_ids):
            self._wake()
        for request_id in request_ids:
            if request_id in self._slots.of:
                self._remove(request_id)

    def mute(self, slot: int) -> None:
        """Ask for no drafts for the request of ``slot``; to be called while it is admitted."""
        self._slots.muted[slot] = True

    def stats(self) -> dict[str, float]:
        """Counters, and the proposer's own under its name."""
        own = {name: float(getattr(self.counters, name)) for name in Counters.__dataclass_fields__}
        return (
            own
            | {"live": float(self.live)}
            | {f"{self.proposer.name}.{k}": v for k, v in self.proposer_stats().items()}
        )

    def snapshot(self, more: Mapping[str, float]) -> Snapshot:
        """Everything, ``more`` included, for metrics."""
        return self.counts.snapshot({**self.stats(), **more}, self._slots.of)

    def proposer_stats(self) -> dict[str, float]:
        """The proposer's own counters and sizes; nothing if it fails to say."""
        try:
            return self.proposer.stats()
        except Exception:
            self._failed("stats")
            return {}

    def _admit(self, row: int, request_id: str, admit: Admit) -> int:
        start = time.perf_counter_ns()
        slot = self._slots.take(request_id)
        self.counters.requests += 1
        try:
            request = admit(row, request_id, slot)
            self._slots.branching[slot] = request.branching
            self.counters.requests_with_chains_only += not request.branching
            self._slots.bound[slot] = min(request.max_tokens, np.iinfo(np.int32).max)
            self.proposer.add_request(request)
        except Exception:
            self._failed("add_request")
            self._turn_off(slot)
        self.counters.admit_ns += time.perf_counter_ns() - start
        return slot

    def _remove(self, request_id: str) -> None:
        slot = self._slots.of.pop(request_id)
        self.counts.finish(slot, request_id)
        self.trees.pop(request_id, None)
        if not self._slots.off[slot]:
            try:
                self.proposer.remove_request(slot)
            except Exception:
                # Its state may linger in the proposer, so the slot is never handed out again.
                self._failed("remove_request")
                return
        self._slots.free.append(slot)

    def _result(self, batch: Rows, slot: Int32Array, lengths: Int32Array, keep: np.ndarray) -> StepResult:
        """The step as the proposer sees it, for the requests of ``keep``."""
        emitted: Sequence[list[int]] = batch.emitted
        topk = batch.topk
        if not keep.all():
            emitted = [tokens for tokens, k in zip(emitted, keep, strict=True) if k]
            if topk is not None:
                topk = select_rows(topk, keep)
        lengths, drafted = lengths[keep], batch.drafted[keep]
        row_tokens, row_offsets, row_parents, topk_ids, topk_logprobs = topk or (None,) * 5
        return StepResult(
            slots=slot[keep],
            tokens=np.fromiter(itertools.chain.from_iterable(emitted), np.int32, int(lengths.sum())),
            offsets=_offsets(lengths),
            num_drafted=drafted,
            num_accepted=np.minimum(drafted, lengths - 1),
            row_tokens=row_tokens,
            row_offsets=row_offsets,
            row_parents=row_parents,
            topk_ids=topk_ids,
            topk_logprobs=topk_logprobs,
            load=batch.load,
            seconds=batch.seconds,
            overhead=batch.overhead,
        )

    def _observe(self, step: StepResult) -> None:
        start = time.perf_counter_ns()
        try:
            self.proposer.observe(step)
        except Exception:
            self._failed("observe")
            # One request at a time, to find whose it is. A request the failed call had already learned from
            # learns twice, which costs draft quality at worst.
            for i in range(len(step.slots)):
                try:
                    self.proposer.observe(_one(step, i))
                except Exception:
                    self.counters.errors += 1
                    self._turn_off(int(step.slots[i]))
        self.counters.observe_ns += time.perf_counter_ns() - start

    def _propose(self, slots: Int32Array, limits: Int32Array) -> tuple[list[list[int]], list[KeptTree | None]]:
        start = time.perf_counter_ns()
        try:
            drafts, trees = self._ask(slots, limits)
        except Exception:
            self._failed("propose")
            drafts, trees = [], []
            for i in range(len(slots)):
                draft, tree = self._propose_one(slots[i : i + 1], limits[i : i + 1])
                drafts.append(draft)
                trees.append(tree)
        self.counters.drafted += sum(map(len, drafts))
        self.counters.propose_ns += time.perf_counter_ns() - start
        return drafts, trees

    def _propose_one(self, slots: Int32Array, limits: Int32Array) -> tuple[list[int], KeptTree | None]:
        try:
            drafts, trees = self._ask(slots, limits)
            return drafts[0], trees[0]
        except Exception:
            self.counters.errors += 1
            self._turn_off(int(slots[0]))
            return [], None

    def _ask(self, slots: Int32Array, limits: Int32Array) -> tuple[list[list[int]], list[KeptTree | None]]:
        forest = self.proposer.propose(slots, limits)
        found = read_forest(forest, limits, self._slots.branching[slots], self.vocab_size)
        self.counts.note(slots, forest)
        return found

    def _turn_off(self, slot: int) -> None:
        self.counters.requests_without_drafts += 1
        self._slots.off[slot] = True
        try:
            self.proposer.remove_request(slot)
        except Exception:
            self.counters.errors += 1

    def _failed(self, method: str) -> None:
        """Count the exception being handled; log it with its traceback the first time it comes from ``method``."""
        self.counters.errors += 1
        if method not in self._logged:
            self._logged.add(method)
            logger.exception(
                "Proposer %s failed in %s; requests it fails on get no drafts, the server goes on. Logged once.",
                self.proposer.name,
                method,
            )


def sample_group(request_id: str) -> str | None:
    """What the samples of one ``n > 1`` request share: vLLM names them ``<index>_<parent id>``
    (v1/engine/parallel_sampling.py)."""
    index, _, parent = request_id.partition("_")
    return parent if parent and index.isdecimal() else None


def _offsets(lengths: Int32Array) -> Int32Array:
    out = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=out[1:])
    return out


def select_rows(topk: TopK, keep: np.ndarray) -> TopK:
    """The verified rows of the requests in ``keep`` (``bool[n]``)."""
    row_tokens, row_offsets, row_parents, ids, logprobs = topk
    sizes = np.diff(row_offsets)
    rows = np.repeat(keep, sizes)
    return row_tokens[rows], _offsets(sizes[keep]), row_parents[rows], ids[rows], logprobs[rows]


def _one(step: StepResult, i: int) -> StepResult:
    """The part of ``step`` that is about its ``i``-th request."""
    keep = np.zeros(len(step.slots), bool)
    keep[i] = True
    a, b = int(step.offsets[i]), int(step.offsets[i + 1])
    topk: TopK = (None,) * 5
    if step.row_offsets is not None:
        rows = (step.row_tokens, step.row_offsets, step.row_parents, step.topk_ids, step.topk_logprobs)
        topk = select_rows(rows, keep)
    return StepResult(
        step.slots[keep],
        step.tokens[a:b],
        np.array([0, b - a], np.int32),
        step.num_drafted[keep],
        step.num_accepted[keep],
        *topk,
    )
