"""Draft-token probabilities by online logistic mixing of context statistics.

The method of context-mixing data compressors (PAQ; Mahoney 2005, "Adaptive Weighing of Context Models for Lossless
Data Compression"), with tokens in place of bits: every context of the text's end that occurred before, long or short,
in the request or in the store of earlier outputs, is one weak predictor of "the next token is c". Each looks up an
adaptive probability by what it knows about c (its length, how often it occurred, c's share, whether c came last);
a linear layer in the logistic domain, whose weights are chosen by a small context, joins them; all of it learns
online from the tokens the target emits.

The learned state holds no text: how trustworthy a context of a given shape is. So requests of all namespaces share it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .base import SOURCE_CONTEXT, SOURCE_STORE
from .suffix_automaton import (
    COUNT,
    DEGREE,
    EDGE,
    EDGE_BYTES,
    INLINE,
    LEN,
    LINK,
    RECENT,
    TOKEN,
    TOTAL,
    kernel,
    load,
    record,
)

Float32Array = npt.NDArray[np.float32]

BUCKETS = 8  # context lengths 1, 2, 3, 4, 5-6, 7-9, 10-15, 16 and more
SLOTS = 2 * BUCKETS
TOTALS = 8
CLASSES = 18
MAX_LEVELS = 12
MAX_CANDIDATES = 6
HISTORY = 16
HISTORY_MASK = 0xFFFF
RATE = 0.02
LIMIT = 255.0


class Mixture(NamedTuple):
    """Learned state."""

    prob: Float32Array
    stretch: Float32Array
    seen: Float32Array
    weights: Float32Array
    history: Float32Array


class Scratch(NamedTuple):
    rec: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]
    total: npt.NDArray[np.int64]
    cand: npt.NDArray[np.int64]
    cell: npt.NDArray[np.int64]
    p: npt.NDArray[np.float64]
    ctx: npt.NDArray[np.int64]


def new_scratch() -> Scratch:
    n = 2 * MAX_LEVELS
    z = np.zeros
    return Scratch(
        z(n, np.int64),
        z(n, np.int64),
        z(n, np.int64),
        z(MAX_CANDIDATES, np.int64),
        z((MAX_CANDIDATES, n), np.int64),
        z(MAX_CANDIDATES),
        z(8, np.int64),
    )


_LENGTHS = (1, 2, 3, 4, 5.5, 8, 12, 24)
_TOTALS = (1, 2, 3, 4, 5.5, 8, 15, 40)


def new_mixture() -> Mixture:
    prob = np.zeros((2, BUCKETS, TOTALS, CLASSES), np.float32)
    for b, length in enumerate(_LENGTHS):
        k = 4.0 / length
        for t, n in enumerate(_TOTALS):
            for c in range(CLASSES):
                if c < 2:
                    p = 0.3 / (n + 1 + k)
                else:
                    share = 1.0 if (c - 2) % 8 == 7 else ((c - 2) % 8 + 0.5) / 7
                    p = share * n / (n + k)
                prob[:, b, t, c] = min(max(p, 0.002), 0.995)
    flat = prob.reshape(-1)
    stretch = np.log(flat / (1 - flat)).astype(np.float32)
    weights = np.zeros((81, SLOTS + 1), np.float32)
    weights[:] = 0.3
    weights[:, -1] = 0
    history = np.zeros((HISTORY, SLOTS + 1), np.float32)
    return Mixture(flat, stretch, np.full(flat.shape, 4, np.float32), weights, history)


@kernel
def _bucket(length: int) -> int:
    if length <= 4:
        return length - 1
    if length <= 6:
        return 4
    if length <= 9:
        return 5
    if length <= 15:
        return 6
    return 7


@kernel
def _total_bucket(n: int) -> int:
    if n <= 4:
        return n - 1
    if n <= 6:
        return 4
    if n <= 10:
        return 5
    if n <= 20:
        return 6
    return 7


@kernel
def _levels(scratch: Scratch, n: int, block: int, state: int, matched: int, source: int) -> int:
    used = 0
    length = matched
    first = n
    for _ in range(2 * MAX_LEVELS):
        if state <= 0:
            break
        rec = record(block, state)
        total = load(rec, TOTAL)
        if total > 0:
            b = _bucket(length)
            if used & (1 << b) == 0:
                used |= 1 << b
                scratch.rec[n] = rec
                scratch.slot[n] = source * BUCKETS + b
                scratch.total[n] = total
                n += 1
                if n - first == MAX_LEVELS:
                    break
        state = load(rec, LINK)
        if state > 0:
            length = load(record(block, state), LEN)
    return n


@kernel
def predict(
    mix: Mixture,
    scratch: Scratch,
    local: int,
    lstate: int,
    lmatched: int,
    store: int,
    sstate: int,
    smatched: int,
    hist: int,
) -> tuple[int, int, int]:
    """Fill ``scratch`` with candidates and their probabilities; returns (levels, candidates, best)."""
    n = 0
    ctx = 0
    if local != 0:
        n = _levels(scratch, 0, local, lstate, lmatched, 0)
        if n > 0:
            ctx = (scratch.slot[0] + 1) * 9
    m = n
    if store != 0:
        n = _levels(scratch, n, store, sstate, smatched, 1)
        if n > m:
            ctx += scratch.slot[m] - BUCKETS + 1
    scratch.ctx[0] = ctx
    scratch.ctx[1] = hist & (HISTORY - 1)
    k = 0
    for rank in range(INLINE):
        for i in range(n):
            rec = scratch.rec[i]
            if rank < load(rec, DEGREE):
                token = load(rec + (EDGE + 3 * rank) * 4, TOKEN)
                new = True
                for j in range(k):
                    if scratch.cand[j] == token:
                        new = False
                        break
                if new and k < MAX_CANDIDATES:
                    scratch.cand[k] = token
                    k += 1
    best = 0
    wa = mix.weights[ctx]
    wb = mix.history[hist & (HISTORY - 1)]
    for j in range(k):
        token = scratch.cand[j]
        dot = wa[SLOTS] + wb[SLOTS]
        for i in range(n):
            rec = scratch.rec[i]
            total = scratch.total[i]
            degree = load(rec, DEGREE)
            cls = 0 if degree <= INLINE else 1
            edge = rec + EDGE * 4
            for _ in range(min(degree, INLINE)):
                if load(edge, TOKEN) == token:
                    count = load(edge, COUNT)
                    share = 7 if count == total else min(6, 7 * count // total)
                    cls = 2 + share + (8 if load(rec, RECENT) == token else 0)
                    break
                edge += EDGE_BYTES
            slot = scratch.slot[i]
            cell = (slot * TOTALS + _total_bucket(total)) * CLASSES + cls
            scratch.cell[j, i] = cell
            dot += (wa[slot] + wb[slot]) * mix.stretch[cell]
        dot = min(max(dot, -12.0), 12.0)
        scratch.p[j] = 1.0 / (1.0 + np.exp(-dot))
        if scratch.p[j] > scratch.p[best]:
            best = j
    return n, k, best


@kernel
def learn(mix: Mixture, scratch: Scratch, n: int, k: int, token: int) -> None:
    """Update from the outcome of the prediction in ``scratch``."""
    wa = mix.weights[scratch.ctx[0]]
    wb = mix.history[scratch.ctx[1]]
    for j in range(k):
        hit = 1.0 if scratch.cand[j] == token else 0.0
        step = (hit - scratch.p[j]) * RATE
        wa[SLOTS] += step
        wb[SLOTS] += step
        for i in range(n):
            cell = scratch.cell[j, i]
            slot = scratch.slot[i]
            delta = step * mix.stretch[cell]
            wa[slot] += delta
            wb[slot] += delta
            seen = mix.seen[cell]
            p = mix.prob[cell] + (hit - mix.prob[cell]) / (seen + 1.5)
            mix.prob[cell] = p
            mix.stretch[cell] = np.log((p + 1e-4) / (1.0001 - p))
            if seen < LIMIT:
                mix.seen[cell] = seen + 1


@kernel
def source_of(scratch: Scratch, n: int, best: int) -> int:
    """Which source knows candidate ``best`` in the longer context; the request's own text on a tie."""
    local, store = -1, -1
    for i in range(n):
        if scratch.cell[best, i] % CLASSES >= 2:
            if scratch.slot[i] < BUCKETS:
                local = max(local, scratch.slot[i])
            else:
                store = max(store, scratch.slot[i] - BUCKETS)
    return SOURCE_CONTEXT if local >= store else SOURCE_STORE
