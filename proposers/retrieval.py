"""Chains drafted from a request's own text and from earlier requests' outputs, with calibrated probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel, load

from vllm_specplug.options import option

from .base import DraftForest, Float32Array, Int8Array, Int32Array, Proposer, Request, StepResult
from .mixture import (
    DRAFT_CANDIDATES,
    HISTORY_MASK,
    MAX_CANDIDATES,
    Mixture,
    Scratch,
    learn,
    new_mixture,
    new_scratch,
    predict,
    probability,
    source_of,
)
from .output_store import OutputStores
from .suffix_automaton import LAST, LEN, TEXT, SuffixAutomaton, advance, extend, has_room, record, settle, text_address

Int64Array = npt.NDArray[np.int64]

# Tokens a cursor is walked over to find its place in a store: longer contexts all fall in one length bucket.
REWALK = 32
# vLLM's own limit on draft tokens per request.
MAX_DRAFT = 128


@dataclass(frozen=True)
class RetrievalOptions:
    """Options of the retrieval proposer."""

    min_prob: float = option(
        # Best or within 2% of it, on recorded traces under cost curves of a verify step measured on CPUs (eager and
        # compiled) and one assumed for nearly free rows; anything from 0.05 to 0.1 is within 2% too on the CPU curves.
        0.07,
        "stop drafting when the probability that the draft is accepted up to there falls below this",
        low=0.0,
        high=1.0,
        env="SPECPLUG_RETRIEVAL_MIN_PROB",
    )
    context: bool = option(True, "draft from the request's own prompt and output")
    store: bool = option(True, "draft from outputs of earlier requests of the same namespace")
    store_bytes: int = option(256 << 20, "memory for earlier outputs, all namespaces together", low=1 << 20)


class _Slots(NamedTuple):
    """State per slot, indexed by slot; no request: block 0."""

    block: Int64Array  # address of the request's automaton
    store: Int64Array  # address of its namespace's automaton, 0 if there is none
    habits: Int64Array  # address of its namespace's habits, 0 if there are none
    state: Int32Array  # cursor into the store: state and
    matched: Int32Array  # matched tokens
    history: Int32Array  # whether the best candidate was right, newest in bit 0


@kernel
def _observe(
    mix: Mixture,
    scratch: Scratch,
    per: _Slots,
    slots: Int32Array,
    tokens: Int32Array,
    offsets: Int32Array,
    done: Int32Array,
    context: bool,
) -> int:
    """Learn from emitted tokens and append them; counts in ``done``. Returns how many requests' blocks are full."""
    full = 0
    for i in range(len(slots)):
        slot = slots[i]
        block, store, habits = per.block[slot], per.store[slot], per.habits[slot]
        state, matched = np.int64(per.state[slot]), np.int64(per.matched[slot])
        history = np.int64(per.history[slot])
        if store != 0:
            state = settle(store, state, matched)
        local = block if context else 0
        for at in range(offsets[i] + done[i], offsets[i + 1]):
            token = np.int64(tokens[at])
            if not has_room(block, token):
                full += 1
                break
            done[i] += 1
            if token >= 0:
                last = load(block, LAST)
                length = load(record(block, last), LEN)
                n, k, best = predict(
                    mix, scratch, habits, local, last, length, store, state, matched, history, MAX_CANDIDATES
                )
                learn(mix, scratch, habits, n, k, token)
                hit = 1 if k > 0 and scratch.token[best] == token else 0
                history = (history << 1 | hit) & HISTORY_MASK
            extend(block, token)
            if store != 0:
                state, matched = advance(store, state, matched, token)
        per.state[slot] = state
        per.matched[slot] = matched
        per.history[slot] = history
    return full


@kernel
def _propose(
    mix: Mixture,
    scratch: Scratch,
    per: _Slots,
    slots: Int32Array,
    limits: Int32Array,
    min_prob: float,
    context: bool,
    tokens: Int32Array,
    parents: Int32Array,
    probs: Float32Array,
    sources: Int8Array,
    offsets: Int32Array,
) -> int:
    """Draft chains into the output arrays; returns the number of nodes."""
    size = 0
    for i in range(len(slots)):
        slot = slots[i]
        block, store, habits = per.block[slot], per.store[slot], per.habits[slot]
        local = block if context else 0
        end = load(block, LAST)
        length = load(record(block, end), LEN)
        state, matched = np.int64(per.state[slot]), np.int64(per.matched[slot])
        history = np.int64(per.history[slot])
        if store != 0:
            state = settle(store, state, matched)
        path = 1.0
        for depth in range(limits[i]):
            n, k, best = predict(
                mix, scratch, habits, local, end, length, store, state, matched, history, DRAFT_CANDIDATES
            )
            if k == 0:
                break
            path *= probability(scratch, best)
            if path < min_prob:
                break
            token = scratch.token[best]
            tokens[size] = token
            parents[size] = depth - 1
            probs[size] = path
            sources[size] = source_of(scratch, n, best)
            size += 1
            end, length = advance(block, end, length, token)
            if store != 0:
                state, matched = advance(store, state, matched, token)
            history = (history << 1 | 1) & HISTORY_MASK
        offsets[i + 1] = size
    return size


@kernel
def _rewalk(store: int, per: _Slots, slot: int) -> None:
    """Put a request's cursor into ``store`` where the end of its text is."""
    block = per.block[slot]
    text, size = text_address(block), load(block, TEXT)
    s, m = np.int64(0), np.int64(0)
    if store != 0:
        for at in range(max(0, size - REWALK), size):
            s, m = advance(store, s, m, load(text, at))
    per.state[slot] = s
    per.matched[slot] = m


class _Live:
    """What is kept in Python of a live request."""

    __slots__ = ("automaton", "first_output", "namespace")

    def __init__(self, automaton: SuffixAutomaton, first_output: int, namespace: str) -> None:
        self.automaton = automaton
        self.first_output = first_output
        self.namespace = namespace


def _int32(name: str, value: npt.ArrayLike) -> Int32Array:
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a one-dimensional array of whole numbers, got {array.dtype}{array.shape}")
    return np.ascontiguousarray(array, dtype=np.int32)


class Retrieval(Proposer):
    """Drafts what followed the same words before, in this request or in earlier outputs of its namespace.

    Context lookup as in SAM-Decoding (arXiv 2411.10666) and SuffixDecoding (arXiv 2411.04975), but all context lengths
    of both sources vote, and the vote is a calibrated probability (see :mod:`.mixture`).
    """

    name: ClassVar[str] = "retrieval"
    Options: ClassVar[type] = RetrievalOptions

    def __init__(self, options: RetrievalOptions | None = None) -> None:
        self.options = options or RetrievalOptions()
        self._mix = new_mixture()
        self._scratch = new_scratch()
        self._live: dict[int, _Live] = {}
        self._outputs = OutputStores(self.options.store_bytes)
        wide, narrow = np.zeros(0, np.int64), np.zeros(0, np.int32)
        self._slots = _Slots(wide, wide, wide, narrow, narrow, narrow)
        self._epochs = wide

    def _reserve(self, slot: int) -> None:
        size = len(self._epochs)
        if slot >= size:
            more = max(64, size, slot + 1 - size)
            self._slots = _Slots(*(np.concatenate([old, np.zeros(more, old.dtype)]) for old in self._slots))
            self._epochs = np.concatenate([self._epochs, np.zeros(more, np.int64)])

    def _check(self, slots: Int32Array) -> None:
        """Compiled code does not check bounds."""
        if len(slots) == 0:
            return
        if slots.min() >= 0 and slots.max() < len(self._epochs) and self._slots.block[slots].all():
            return
        bad = next(int(s) for s in slots if int(s) not in self._live)
        raise ValueError(f"slot {bad} has no request")

    def add_request(self, request: Request) -> None:
        """Admit a request. Raises ``ValueError`` if its slot is taken or negative, or ``num_output`` impossible."""
        slot, prompt = request.slot, _int32("prompt", request.prompt)
        if slot < 0 or slot in self._live:
            raise ValueError(f"slot {slot} is {'negative' if slot < 0 else 'taken'} (request {request.request_id})")
        if not 0 <= request.num_output <= len(prompt):
            raise ValueError(f"request {request.request_id}: {request.num_output} outputs in {len(prompt)} tokens")
        # Room for a modest answer; max_tokens is often the model's whole context.
        room = min(len(prompt) // 4 + 128, max(request.max_tokens - len(prompt), 1))
        automaton = SuffixAutomaton(len(prompt) + room, keep_text=True)
        automaton.extend(prompt)
        self._reserve(slot)
        self._live[slot] = _Live(automaton, len(prompt) - request.num_output, request.namespace)
        self._slots.block[slot] = automaton.address
        self._slots.history[slot] = 0
        self._epochs[slot] = -2  # no cursor yet
        moved = self.options.store and self._outputs.open(request.namespace)
        self._find_stores(list(self._live) if moved else [slot])

    def _find_stores(self, slots: Iterable[int]) -> None:
        """Look up where the stores of these requests are now; cursors that are void start anew."""
        for slot in slots:
            address, habits, epoch = self._outputs.find(self._live[slot].namespace)
            self._slots.store[slot], self._slots.habits[slot] = address, habits
            if epoch != self._epochs[slot]:
                self._epochs[slot] = epoch
                _rewalk(address, self._slots, slot)

    def remove_request(self, slot: int) -> None:
        """Free a request's memory at once and store its output. Raises ``ValueError`` for an unknown slot."""
        if slot not in self._live:
            raise ValueError(f"slot {slot} has no request")
        live = self._live.pop(slot)
        for field in (self._slots.block, self._slots.store, self._slots.habits):
            field[slot] = 0
        output = live.automaton.text[live.first_output :]
        if not self.options.store or not len(output):
            return
        self._outputs.add(live.namespace, output)
        self._find_stores(self._live)

    def observe(self, step: StepResult) -> None:
        """Learn from the emitted tokens. Raises ``ValueError`` for an unknown slot or inconsistent arrays."""
        slots, tokens = _int32("slots", step.slots), _int32("tokens", step.tokens)
        offsets = _int32("offsets", step.offsets)
        self._check(slots)
        if (
            len(offsets) != len(slots) + 1
            or offsets[0] < 0
            or offsets[-1] > len(tokens)
            or (np.diff(offsets) < 0).any()
        ):
            raise ValueError(f"offsets {offsets!r} do not cut {len(tokens)} tokens into {len(slots)} requests")
        done = np.zeros(len(slots), np.int32)
        while _observe(
            self._mix,
            self._scratch,
            self._slots,
            slots,
            tokens,
            offsets,
            done,
            self.options.context,
        ):
            for i in np.flatnonzero(done < np.diff(offsets)):
                slot = int(slots[i])
                automaton = self._live[slot].automaton
                automaton.grow()
                self._slots.block[slot] = automaton.address

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        """Draft one chain per request. Raises ``ValueError`` for an unknown slot or a bad limit."""
        slots, limits = _int32("slots", slots), _int32("limits", limits)
        self._check(slots)
        if len(limits) != len(slots) or (limits < 0).any():
            raise ValueError(f"limits {limits!r} for {len(slots)} requests")
        # Path probabilities only fall, so min_prob bounds no chain's length; a chain of certainties is cut here.
        limits = np.minimum(limits, MAX_DRAFT)
        total = int(limits.sum())
        tokens, parents = np.empty(total, np.int32), np.empty(total, np.int32)
        probs, sources = np.empty(total, np.float32), np.empty(total, np.int8)
        offsets = np.zeros(len(slots) + 1, np.int32)
        size = _propose(
            self._mix,
            self._scratch,
            self._slots,
            slots,
            limits,
            self.options.min_prob,
            self.options.context,
            tokens,
            parents,
            probs,
            sources,
            offsets,
        )
        return DraftForest(tokens[:size], parents[:size], probs[:size], sources[:size], offsets)

    def warm_up(self) -> None:
        """Compile every kernel, or load it from the disk cache, by a small real run on a throwaway proposer."""
        trial = Retrieval(RetrievalOptions(min_prob=0.0))
        slots, none = np.zeros(1, np.int32), np.zeros(1, np.int32)
        text = np.tile(np.arange(7, dtype=np.int32), 40)
        for _ in range(2):
            trial.add_request(Request(0, "warm-up", text))
            trial.observe(StepResult(slots, text, np.array([0, len(text)], np.int32), none, none))
            trial.propose(slots, np.array([4], np.int32))
            trial.remove_request(0)

    def stats(self) -> dict[str, float]:
        """Sizes: requests, bytes, tokens; and how often old outputs were evicted."""
        return {
            "live_requests": len(self._live),
            "context_bytes": sum(r.automaton.nbytes for r in self._live.values()),
            "store_bytes": self._outputs.nbytes,
            "store_tokens": self._outputs.num_tokens,
            "store_namespaces": self._outputs.num_namespaces,
            "evictions": self._outputs.evictions,
        }

    def close(self) -> None:
        """Forget all requests and outputs."""
        self._live.clear()
        self._slots.block[:] = self._slots.store[:] = 0
        self._outputs.clear()
