"""Chains drafted from a request's own text and from earlier requests' outputs, with calibrated probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vllm_specplug.options import option

from .base import DraftForest, Int32Array, Proposer, Request, StepResult
from .mixture import Mixture, Scratch, learn, new_mixture, new_scratch, predict
from .output_store import OutputStore
from .suffix_automaton import LAST, LEN, SuffixAutomaton, advance, extend, has_room, kernel, load, record, settle

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RetrievalOptions:
    """Options of the retrieval proposer."""

    min_prob: float = option(
        0.2,
        "stop drafting when the probability that the draft is accepted up to there falls below this",
        low=0.0,
        high=1.0,
    )
    context: bool = option(True, "draft from the request's own prompt and output")
    store: bool = option(True, "draft from outputs of earlier requests of the same namespace")
    store_bytes: int = option(256 << 20, "memory for earlier outputs, all namespaces together", low=1 << 20)


@kernel
def _observe(
    mix: Mixture,
    scratch: Scratch,
    blocks: Int64Array,
    stores: Int64Array,
    state: Int32Array,
    matched: Int32Array,
    history: Int32Array,
    slots: Int32Array,
    tokens: Int32Array,
    offsets: Int32Array,
    done: Int32Array,
    context: bool,
    rate: float,
    limit: float,
) -> int:
    stuck = 0
    for i in range(len(slots)):
        slot = slots[i]
        block = blocks[slot]
        store = stores[slot]
        for at in range(offsets[i] + done[i], offsets[i + 1]):
            token = np.int64(tokens[at])
            if not has_room(block, token):
                stuck += 1
                break
            done[i] += 1
            if store != 0:
                state[slot] = settle(store, state[slot], matched[slot])
            if token >= 0:
                last = load(block, LAST)
                n, k, best = predict(
                    mix,
                    scratch,
                    block,
                    last,
                    load(record(block, last), LEN),
                    store,
                    state[slot],
                    matched[slot],
                    history[slot],
                )
                learn(mix, scratch, n, k, token, rate, limit)
                hit = 1 if k > 0 and scratch.cand[best] == token else 0
                history[slot] = (history[slot] << 1 | hit) & 0xFFFF
            extend(block, token)
            if store != 0:
                state[slot], matched[slot] = advance(store, state[slot], matched[slot], token)
    return stuck


@kernel
def _propose(
    mix: Mixture,
    scratch: Scratch,
    blocks: Int64Array,
    stores: Int64Array,
    state: Int32Array,
    matched: Int32Array,
    history: Int32Array,
    slots: Int32Array,
    limits: Int32Array,
    min_prob: float,
    tokens: Int32Array,
    parents: Int32Array,
    probs: npt.NDArray[np.float32],
    sources: npt.NDArray[np.int8],
    offsets: Int32Array,
) -> int:
    size = 0
    for i in range(len(slots)):
        slot = slots[i]
        block, store = blocks[slot], stores[slot]
        lstate = load(block, LAST)
        lmatched = load(record(block, lstate), LEN)
        sstate, smatched = np.int64(state[slot]), np.int64(matched[slot])
        if store != 0:
            sstate = settle(store, sstate, smatched)
        hist = np.int64(history[slot])
        path = 1.0
        for depth in range(limits[i]):
            n, k, best = predict(mix, scratch, block, lstate, lmatched, store, sstate, smatched, hist)
            if k == 0:
                break
            path *= scratch.p[best]
            if path < min_prob:
                break
            token = scratch.cand[best]
            tokens[size] = token
            parents[size] = depth - 1
            probs[size] = path
            sources[size] = 0
            size += 1
            lstate, lmatched = advance(block, lstate, lmatched, token)
            if store != 0:
                sstate, smatched = advance(store, sstate, smatched, token)
            hist = hist << 1 | 1
        offsets[i + 1] = size
    return size


@kernel
def _walk(store: int, tokens: Int32Array) -> tuple[int, int]:
    state, matched = 0, 0
    for token in tokens:
        state, matched = advance(store, state, matched, token)
    return state, matched


class Retrieval(Proposer):
    """See the module."""

    name: ClassVar[str] = "retrieval"
    Options: ClassVar[type] = RetrievalOptions
    rate = 0.02
    limit = 255.0

    def __init__(self, options: RetrievalOptions | None = None) -> None:
        self.options = options or RetrievalOptions()
        self._mix = new_mixture()
        self._scratch = new_scratch()
        n = 64
        self._blocks = np.zeros(n, np.int64)
        self._stores = np.zeros(n, np.int64)
        self._state = np.zeros(n, np.int32)
        self._matched = np.zeros(n, np.int32)
        self._history = np.zeros(n, np.int32)
        self._live: dict[int, tuple[SuffixAutomaton, Request, int]] = {}
        self._store: dict[str, OutputStore] = {}

    def add_request(self, request: Request) -> None:
        prompt = np.ascontiguousarray(request.prompt, np.int32)
        sam = SuffixAutomaton(len(prompt) + len(prompt) // 4 + 128, keep_text=True)
        sam.extend(prompt)
        slot = request.slot
        self._live[slot] = (sam, request, len(prompt) - request.num_output)
        self._blocks[slot] = sam.address
        self._history[slot] = 0
        self._stores[slot] = 0
        self._state[slot] = self._matched[slot] = 0
        if self.options.store:
            store = self._store.setdefault(request.namespace, OutputStore())
            self._stores[slot] = store.primary.address
            self._state[slot], self._matched[slot] = _walk(store.primary.address, prompt[-32:])

    def remove_request(self, slot: int) -> None:
        sam, request, start = self._live.pop(slot)
        if self.options.store:
            store = self._store[request.namespace]
            store.add(sam.text[start:])
            for s, (_, r, _) in self._live.items():
                if r.namespace == request.namespace:
                    self._stores[s] = store.primary.address

    def observe(self, step: StepResult) -> None:
        done = np.zeros(len(step.slots), np.int32)
        while _observe(
            self._mix,
            self._scratch,
            self._blocks,
            self._stores,
            self._state,
            self._matched,
            self._history,
            step.slots,
            step.tokens,
            step.offsets,
            done,
            self.options.context,
            self.rate,
            self.limit,
        ):
            for i in np.flatnonzero(done < np.diff(step.offsets)):
                slot = int(step.slots[i])
                self._live[slot][0].grow()
                self._blocks[slot] = self._live[slot][0].address

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        total = int(limits.sum())
        tokens, parents = np.empty(total, np.int32), np.empty(total, np.int32)
        probs, sources = np.empty(total, np.float32), np.empty(total, np.int8)
        offsets = np.zeros(len(slots) + 1, np.int32)
        size = _propose(
            self._mix,
            self._scratch,
            self._blocks,
            self._stores,
            self._state,
            self._matched,
            self._history,
            slots,
            limits,
            self.options.min_prob,
            tokens,
            parents,
            probs,
            sources,
            offsets,
        )
        return DraftForest(tokens[:size], parents[:size], probs[:size], sources[:size], offsets)
