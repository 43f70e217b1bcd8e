"""Draft-token probabilities by online logistic mixing of context statistics.

The method of context-mixing data compressors (PAQ: Mahoney 2005, "Adaptive Weighing of Context Models for Lossless
Data Compression"), with tokens in place of bits. Every context of the text's end that occurred before, long or short,
in the request's own text or in the store of earlier outputs, is one weak predictor of "the next token is c":

1. *Cell.* What a context says of c is only the shape of its evidence: source and length of the context, how often it
   occurred, c's share of what followed, whether c came last. Each such cell has an adaptive probability.
2. *Mixing.* The cells' log-odds are summed with learned weights (logistic regression, stochastic gradient). The weights
   are the sum of three sets, each chosen by a small context: the longest match in either source; whether the last
   predictions were right; how the longest context of each source sees c.
3. *Habit.* A learned bias per candidate token (hashed): some tokens follow a matching context less often than others.

All of it learns online from the tokens the target emits, so the probabilities stay calibrated for whatever is served.
Cells and weights hold no text, only how far evidence of a given shape can be trusted: requests of all namespaces share
them. Habits do depend on tokens, so each namespace has its own.

What paid and what did not (trace replay, tokens per step at 5.5 drafts): the third weight set +0.010, a falling
learning rate +0.005, habits +0.023; habits of token pairs would add 0.008 for 16 times the memory. No gain, so left
out: a second cell per context with other attributes, a final calibration stage (SSE), runs of the latest continuation,
more candidates, prompts in the store.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel, load, load_float, store_float

from .base import SOURCE_CONTEXT, SOURCE_STORE, Float32Array
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
    record,
)

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

# A slot is (source, length bucket): context lengths 1, 2, 3, 4, 5-6, 7-9, 10-15, 16 and more. Trust rises fast over the
# short ones; beyond 16 matching tokens nearly every continuation holds.
BUCKETS = 8
SLOTS = 2 * BUCKETS
_LENGTHS = (1, 2, 3, 4, 5.5, 8, 12, 24)
# Buckets of how often a context occurred: 1, 2, 3, 4, 5-6, 7-10, 11-20, 21 and more.
TOTALS = 8
_TOTALS = (1, 2, 3, 4, 5.5, 8, 15, 40)
# Classes of a candidate in a context: never followed; not among the context's best three; share of what followed in
# sevenths (the last: always), the same again if it also followed last.
ABSENT, MINOR, SHARES = 0, 1, 2
SEVENTHS = 7
CLASSES = SHARES + 2 * (SEVENTHS + 1)

MAX_CANDIDATES = 6
# Drafting needs only the best one, which is among the first.
DRAFT_CANDIDATES = 4
# Chains of links are 4 to 8 long in natural text; repetitive text has long ones, all in the longest bucket.
MAX_LINKS = 16

# Weight sets: longest match in either source; the last four outcomes; class group of the candidate in either source.
_MATCHES = (BUCKETS + 1) ** 2
_HISTORIES = 16
_GROUPS = 6
_FIRST_HISTORY = _MATCHES
_FIRST_GROUP = _MATCHES + _HISTORIES
_SETS = _FIRST_GROUP + _GROUPS**2
HISTORY_MASK = _HISTORIES - 1

# Learning rate of the weights, falling from RATE + RATE_EXTRA to RATE over the first RATE_SPAN candidates (about 4,000
# tokens). Rates of 0.002 to 0.005 and spans of 5,000 to 20,000 differ by less than 0.003 in mean accepted tokens.
RATE, RATE_EXTRA, RATE_SPAN = 0.002, 0.02, 20_000.0
# Habits see few outcomes per token, hence the larger step; 0.05 and 0.1 are within 0.003.
HABIT_RATE = 0.1
HABITS = 4096
# A cell's rate is 1 / outcomes seen, down to this: old behaviour is forgotten over some hundreds of outcomes.
CELL_LIMIT = 255.0
# Outcomes that a cell's initial value is worth.
CELL_PRIOR = 4.0
# About one over the number of inputs that a typical context has.
FIRST_WEIGHT = 0.3


# Log-odds of probabilities 0 to 1 in equal steps: looked up, for the logarithm was a sixth of the time of a step.
_STRETCH_STEPS = 4095
_STRETCH = np.log((np.linspace(0, 1, _STRETCH_STEPS + 1) + 1e-4) / (1.0001 - np.linspace(0, 1, _STRETCH_STEPS + 1)))


class Mixture(NamedTuple):
    """Learned state of all namespaces."""

    prob: Float32Array  # [cells] probability that a candidate with this evidence is right
    stretch: Float32Array  # [cells] its log-odds
    seen: Float32Array  # [cells] outcomes it is made of, at most CELL_LIMIT
    weights: Float32Array  # [sets, SLOTS + 1], the last column being the bias
    learned: Float64Array  # [1] candidates learned from


class Scratch(NamedTuple):
    """One prediction: levels (contexts), candidates, and the cells that spoke. Reused from call to call."""

    rec: Int64Array  # [levels] address of the context's state
    slot: Int64Array  # [levels]
    total: Int64Array  # [levels]
    first: Int64Array  # [levels] the context's cell of class 0
    sevenths: Float64Array  # [levels] SEVENTHS / total
    token: Int64Array  # [candidates]
    odds: Float64Array  # [candidates] log-odds
    group: Int64Array  # [candidates] row of weights
    cell: Int64Array  # [candidates, levels]
    rows: Int64Array  # [2] rows of weights shared by the candidates
    weight: Float64Array  # [levels] sum of those two rows


def new_scratch() -> Scratch:
    """Room for one prediction."""
    ints, floats = np.int64, np.float64
    return Scratch(
        rec=np.zeros(SLOTS, ints),
        slot=np.zeros(SLOTS, ints),
        total=np.zeros(SLOTS, ints),
        first=np.zeros(SLOTS, ints),
        sevenths=np.zeros(SLOTS, floats),
        token=np.zeros(MAX_CANDIDATES, ints),
        odds=np.zeros(MAX_CANDIDATES, floats),
        group=np.zeros(MAX_CANDIDATES, ints),
        cell=np.zeros((MAX_CANDIDATES, SLOTS), ints),
        rows=np.zeros(2, ints),
        weight=np.zeros(SLOTS, floats),
    )


def new_mixture() -> Mixture:
    """Initial state: a prior that is sensible from the first request, and that learning moves soon.

    A continuation seen all n times after a context of length L starts at odds of L * n**2 / 2 in the request's own
    text and of L * n**1.5 / 8 in the store: text repeats itself more surely than other texts. The four constants are
    rounded from where learning took one half of 480 recorded prompts (Spec-Bench first turns, SmolLM2-135M); on samples
    of 48 and 12 from the other half they were worth 0.2% and 0.5% of modelled speed over odds of n * L / 4 in both.
    """
    prob = np.zeros((2, BUCKETS, TOTALS, CLASSES), np.float32)
    for source, power, scale in ((SOURCE_CONTEXT, 2.0, 0.5), (SOURCE_STORE, 1.5, 0.125)):
        for b, length in enumerate(_LENGTHS):
            for t, n in enumerate(_TOTALS):
                odds = scale * length * n**power
                for c in range(CLASSES):
                    share, last = (c - SHARES) % (SEVENTHS + 1), SEVENTHS
                    seen = 1.0 if share == last else (share + 0.5) / SEVENTHS
                    p = 0.5 / (n + 3) if c < SHARES else seen * odds / (1 + odds)
                    prob[source, b, t, c] = min(max(p, 0.002), 0.995)
    flat = prob.reshape(-1)
    weights = np.zeros((_SETS, SLOTS + 1), np.float32)
    weights[:_MATCHES, :SLOTS] = FIRST_WEIGHT
    return Mixture(
        prob=flat,
        stretch=np.log(flat / (1 - flat)),
        seen=np.full(flat.shape, CELL_PRIOR, np.float32),
        weights=weights,
        learned=np.zeros(1),
    )


@kernel
def _length_bucket(length: int) -> int:
    if length <= 4:
        return length - 1
    if length <= 6:
        return 4
    if length <= 9:
        return 5
    return 6 if length <= 15 else 7


@kernel
def _total_bucket(total: int) -> int:
    if total <= 4:
        return total - 1
    if total <= 6:
        return 4
    if total <= 10:
        return 5
    return 6 if total <= 20 else 7


@kernel
def _group(cls: int) -> int:
    """Class group of a candidate in a source's longest context; 0 is left for no context."""
    if cls < SHARES:
        return cls + 1
    share = (cls - SHARES) % (SEVENTHS + 1)
    if share == SEVENTHS:
        return 5
    return 3 if share < 3 else 4


@kernel
def _levels(scratch: Scratch, n: int, block: int, state: int, length: int, first_slot: int) -> int:
    """Append the contexts from (state, length) on to shorter ones, the longest of each bucket; returns how many."""
    used = 0
    for _ in range(MAX_LINKS):
        if state <= 0:
            break
        rec = record(block, state)
        total = load(rec, TOTAL)
        if total > 0:
            bucket = _length_bucket(length)
            if used & (1 << bucket) == 0:
                used |= 1 << bucket
                scratch.rec[n] = rec
                scratch.slot[n] = first_slot + bucket
                scratch.total[n] = total
                scratch.first[n] = ((first_slot + bucket) * TOTALS + _total_bucket(total)) * CLASSES
                scratch.sevenths[n] = SEVENTHS / total
                n += 1
        state = load(rec, LINK)
        length = load(record(block, max(state, 0)), LEN)
    return n


@kernel
def _candidates(scratch: Scratch, n: int, most: int) -> int:
    """Every context's best continuation, then the second ones, then the third; returns their number."""
    k = 0
    for rank in range(INLINE):
        for i in range(n):
            rec = scratch.rec[i]
            if rank < load(rec, DEGREE):
                token = load(rec + (EDGE + 3 * rank) * 4, TOKEN)
                new = True
                for j in range(k):
                    if scratch.token[j] == token:
                        new = False
                        break
                if new:
                    scratch.token[k] = token
                    k += 1
                    if k == most:
                        return k
    return k


@kernel
def _class(rec: int, total: int, sevenths: float, token: int) -> int:
    degree = load(rec, DEGREE)
    edge = rec + EDGE * 4
    for _ in range(min(degree, INLINE)):
        if load(edge, TOKEN) == token:
            count = load(edge, COUNT)
            # Not an integer division, which is slow; the summand keeps whole sevenths whole.
            share = SEVENTHS if count == total else int(count * sevenths + 1e-6)
            return SHARES + share + (SEVENTHS + 1 if load(rec, RECENT) == token else 0)
        edge += EDGE_BYTES
    return ABSENT if degree <= INLINE else MINOR


@kernel
def _habit(token: int) -> int:
    return (token * 0x9E3779B1 >> 12) & (HABITS - 1)


@kernel
def predict(
    mix: Mixture,
    scratch: Scratch,
    habits: int,
    local: int,
    local_state: int,
    local_length: int,
    store: int,
    store_state: int,
    store_length: int,
    history: int,
    most: int,
) -> tuple[int, int, int]:
    """Fill ``scratch`` with candidates for the next token; returns (levels, candidates, best candidate).

    ``local`` and ``store`` are automata (0: none) with the cursor (state, length) of the text's end in each; ``habits``
    the address of the namespace's ``float32[HABITS]`` (0: none). At most ``most`` candidates.
    """
    m = _levels(scratch, 0, local, local_state, local_length, 0) if local != 0 else 0
    n = _levels(scratch, m, store, store_state, store_length, BUCKETS) if store != 0 else m
    k = _candidates(scratch, n, most)
    row = 0
    if m > 0:
        row = int(scratch.slot[0] + 1) * (BUCKETS + 1)
    if n > m:
        row += int(scratch.slot[m]) - BUCKETS + 1
    scratch.rows[0] = row
    scratch.rows[1] = _FIRST_HISTORY + (history & HISTORY_MASK)
    by_match, by_history = mix.weights[scratch.rows[0]], mix.weights[scratch.rows[1]]
    for i in range(n):
        scratch.weight[i] = by_match[scratch.slot[i]] + by_history[scratch.slot[i]]
    best = 0
    for j in range(k):
        token = scratch.token[j]
        in_local, in_store = 0, 0
        dot = np.float64(by_match[SLOTS] + by_history[SLOTS])
        for i in range(n):
            cls = _class(scratch.rec[i], scratch.total[i], scratch.sevenths[i], token)
            if i == 0 and m > 0:
                in_local = _group(cls)
            if i == m:
                in_store = _group(cls)
            cell = scratch.first[i] + cls
            scratch.cell[j, i] = cell
            dot += scratch.weight[i] * mix.stretch[cell]
        scratch.group[j] = _FIRST_GROUP + in_local * _GROUPS + in_store
        by_group = mix.weights[scratch.group[j]]
        dot += by_group[SLOTS]
        for i in range(n):
            dot += by_group[scratch.slot[i]] * mix.stretch[scratch.cell[j, i]]
        if habits != 0:
            dot += load_float(habits, _habit(token))
        scratch.odds[j] = dot
        if dot > scratch.odds[best]:
            best = j
    return n, k, best


@kernel
def probability(scratch: Scratch, candidate: int) -> float:
    """Probability that a candidate of the prediction in ``scratch`` is the next token."""
    return 1.0 / (1.0 + np.exp(-min(max(scratch.odds[candidate], -12.0), 12.0)))


@kernel
def learn(mix: Mixture, scratch: Scratch, habits: int, n: int, k: int, token: int) -> None:
    """Update everything that took part in the prediction in ``scratch``: the next token was ``token``."""
    by_match, by_history = mix.weights[scratch.rows[0]], mix.weights[scratch.rows[1]]
    rate = RATE + RATE_EXTRA / (1.0 + mix.learned[0] / RATE_SPAN)
    mix.learned[0] += k
    for j in range(k):
        hit = 1.0 if scratch.token[j] == token else 0.0
        error = hit - probability(scratch, j)
        by_group = mix.weights[scratch.group[j]]
        step = error * rate
        by_match[SLOTS] += step
        by_history[SLOTS] += step
        by_group[SLOTS] += step
        if habits != 0:
            at = _habit(scratch.token[j])
            store_float(habits, at, load_float(habits, at) + error * HABIT_RATE)
        for i in range(n):
            cell, slot = scratch.cell[j, i], scratch.slot[i]
            change = step * mix.stretch[cell]
            by_match[slot] += change
            by_history[slot] += change
            by_group[slot] += change
            seen = mix.seen[cell]
            p = mix.prob[cell] + (hit - mix.prob[cell]) / (seen + 1.5)
            mix.prob[cell] = p
            mix.stretch[cell] = _STRETCH[int(p * _STRETCH_STEPS)]
            if seen < CELL_LIMIT:
                mix.seen[cell] = seen + 1.0


@kernel
def source_of(scratch: Scratch, n: int, best: int) -> int:
    """Which source knows candidate ``best`` in the longer context; the request's own text on a tie."""
    local, store = -1, -1
    for i in range(n):
        if scratch.cell[best, i] % CLASSES >= SHARES:
            if scratch.slot[i] < BUCKETS:
                local = max(local, scratch.slot[i])
            else:
                store = max(store, scratch.slot[i] - BUCKETS)
    return SOURCE_CONTEXT if local >= store else SOURCE_STORE
