"""Calibrated next-token probabilities from everything known of the text's end, by online logistic mixing.

The method of context-mixing data compressors (PAQ: Mahoney 2005, "Adaptive Weighing of Context Models for Lossless
Data Compression"), with tokens in place of bits. Every context of the text's end that occurred before is one weak
predictor of "the next token is c": the contexts of all lengths in the request's own text and in the store of earlier
outputs, and the target's own earlier top-k after the last three, two, one and no tokens (:mod:`.recycling_table`).

1. *Cell.* What a context says of c is only the shape of its evidence: source and length of the context, how often it
   occurred, c's share of what followed, whether c came last; or c's rank and probability in the target's top-k. Each
   such cell has an adaptive probability.
2. *Mixing.* The cells' log-odds are summed with learned weights (logistic regression, stochastic gradient). The weights
   are the sum of two sets, each chosen by a small context: the longest match in either source; whether the last
   predictions were right.
3. *Bias.* Learned per candidate: by how the longest context of each source sees it, by its rank in each top-k, and by
   the token itself (hashed: a habit, for some tokens follow a matching context less often than others).

All of it learns online from the tokens the target emits, so the probabilities stay calibrated for whatever is served.
Cells, weights and the first two biases hold no text, only how far evidence of a given shape can be trusted: requests
of all namespaces share them. Habits do depend on tokens, so each namespace has its own.

A prediction costs one visit per (context, known continuation): a context's weight is the same for every candidate, so
what it says of all the candidates it does not know is added once. What paid and what did not (trace replay, tokens per
step; trees of 8, 16 and 60 nodes): weights chosen by the candidate's own evidence as well would add 0.00, 0.02 and 0.08
for twice the time. No gain, so left out: a second cell per context with other attributes, a final calibration stage
(SSE), runs of the latest continuation, prompts in the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel, load, load_float, store_float

from .base import SOURCE_CONTEXT, SOURCE_RECYCLING, SOURCE_SIBLINGS, SOURCE_STORE, Float32Array
from .recycling_table import IDS, ORDERS, SIZE, WIDTH, prob_byte
from .saved_state import Array, check
from .suffix_automaton import (
    COUNT,
    DEGREE,
    EDGE,
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
# short ones; beyond 16 matching tokens nearly every continuation holds. Then one slot per order of the top-k table.
BUCKETS = 8
FIRST_ROW = 3 * BUCKETS
SLOTS = FIRST_ROW + ORDERS
_LENGTHS = (1, 2, 3, 4, 5.5, 8, 12, 24)
# Buckets of how often a context occurred: 1, 2, 3, 4, 5-6, 7-10, 11-20, 21 and more.
TOTALS = 8
_TOTALS = (1, 2, 3, 4, 5.5, 8, 15, 40)
# Classes of a candidate in a context: never followed; not among the context's best three; share of what followed in
# sevenths (the last: always), the same again if it also followed last.
ABSENT, MINOR, SHARES = 0, 1, 2
SEVENTHS = 7
CLASSES = SHARES + 2 * (SEVENTHS + 1)
# Classes of a candidate in a top-k row: absent, or its rank; times a bucket of its (absent: the last's) probability.
_LIKELIHOOD_EDGES = np.array([1, 2, 4, 7, 12, 18, 27, 41, 57, 73, 97, 121, 151, 181, 221])
_LIKELIHOODS = len(_LIKELIHOOD_EDGES) + 1
_LIKELIHOOD = np.searchsorted(_LIKELIHOOD_EDGES, np.arange(256), side="right").astype(np.int64)
_ROW_CLASSES = _LIKELIHOODS * (WIDTH + 1)
_FIRST_ROW_CELL = FIRST_ROW * TOTALS * CLASSES

MAX_CANDIDATES = 24
# Enough to know the best one, which is among the first.
DRAFT_CANDIDATES = 4
# Chains of links are 4 to 8 long in natural text; repetitive text has long ones, all in the longest bucket.
MAX_LINKS = 16
# Places where contexts can know a continuation.
_PLACES = FIRST_ROW * INLINE + ORDERS * WIDTH

# Weight sets: longest match in either source; the last four outcomes.
_MATCHES = (BUCKETS + 1) ** 2
_HISTORIES = 16
_SETS = _MATCHES + _HISTORIES
HISTORY_MASK = _HISTORIES - 1
# Biases: class group of the candidate in either source; group of its rank in each row: no row, absent, 1, 2, 3-4, rest.
_GROUPS = 6
_RANKS = 6
_RANK_STEP = np.array([1, 2, 3, 3, 4, 4, 4, 4])
_RANK_UNIT = _RANKS ** np.arange(ORDERS)

# Learning rate of the weights, falling from RATE + RATE_EXTRA to RATE over the first RATE_SPAN candidates (about 2,000
# tokens). In the first 24 prompts an extra of 0.005 or 0.02 costs up to 0.5% of modelled speed, 0.05 unlearns: 6%.
RATE, RATE_EXTRA, RATE_SPAN = 0.002, 0.01, 20_000.0
# A bias has one input, and that is one.
BIAS_RATE = 8.0
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
    groups: Float32Array  # [_GROUPS ** 2] bias
    ranks: Float32Array  # [_RANKS ** ORDERS] bias
    learned: Float64Array  # [1] candidates learned from


class Scratch(NamedTuple):
    """One prediction: contexts, candidates, and the places where contexts know candidates. Reused from call to call."""

    row: Int64Array  # [ORDERS] input: address of the top-k row of each order, 0: none
    counts: Int64Array  # [3] contexts, candidates, places
    rec: Int64Array  # [contexts] address of its state or row
    slot: Int64Array  # [contexts]
    first: Int64Array  # [contexts] its cell of class 0
    absent: Int64Array  # [contexts] its cell for candidates it does not know
    sevenths: Float64Array  # [contexts] SEVENTHS / total
    weight: Float64Array  # [contexts]
    grad: Float64Array  # [contexts]
    unknown: Int64Array  # [contexts] candidates it does not know
    token: Int64Array  # [candidates]
    odds: Float64Array  # [candidates] log-odds
    group: Int64Array  # [candidates] index of its bias
    rank: Int64Array  # [candidates] index of its bias
    local: Int64Array  # [candidates] length bucket of the longest own context that knows it, -1: none
    stored: Int64Array  # [candidates] the same in the store
    shared: Int64Array  # [candidates] the same in the siblings' output
    error: Float64Array  # [candidates]
    at: Int64Array  # [places] context
    of: Int64Array  # [places] candidate
    cell: Int64Array  # [places]
    sets: Int64Array  # [2] rows of weights


def new_scratch() -> Scratch:
    """Room for one prediction."""
    sizes = {"row": ORDERS, "counts": 3, "sets": 2}
    sizes |= dict.fromkeys(("rec", "slot", "first", "absent", "sevenths", "weight", "grad", "unknown"), SLOTS)
    sizes |= dict.fromkeys(("token", "odds", "group", "rank", "local", "stored", "shared", "error"), MAX_CANDIDATES)
    sizes |= dict.fromkeys(("at", "of", "cell"), _PLACES)
    floats = {"sevenths", "weight", "grad", "odds", "error"}
    fields: dict[str, Any] = {
        name: np.zeros(size, np.float64 if name in floats else np.int64) for name, size in sizes.items()
    }
    return Scratch(**fields)


def new_mixture() -> Mixture:
    """Initial state: a prior that is sensible from the first request, and that learning moves soon.

    A continuation seen all n times after a context of length L starts at odds of L * n**2 / 2 in the request's own
    text and of L * n**1.5 / 8 in the store: text repeats itself more surely than other texts. The four constants are
    rounded from where learning took one half of 480 recorded prompts (Spec-Bench first turns, SmolLM2-135M); on samples
    of 48 and 12 from the other half they were worth 0.2% and 0.5% of modelled speed over odds of n * L / 4 in both.
    A token of a top-k row starts nearer to even odds than the target was then. That and the biases, rounded from the
    same half, were worth 1% of modelled speed on ten samples of 24 prompts from the other.
    """
    prob = np.zeros((3, BUCKETS, TOTALS, CLASSES), np.float32)
    for source, (power, scale) in enumerate(((2.0, 0.5), (1.5, 0.125), (1.5, 0.25))):
        for b, length in enumerate(_LENGTHS):
            for t, n in enumerate(_TOTALS):
                odds = scale * length * n**power
                for c in range(CLASSES):
                    share, last = (c - SHARES) % (SEVENTHS + 1), SEVENTHS
                    seen = 1.0 if share == last else (share + 0.5) / SEVENTHS
                    p = 0.5 / (n + 3) if c < SHARES else seen * odds / (1 + odds)
                    prob[source, b, t, c] = min(max(p, 0.002), 0.995)
    rows = np.zeros((ORDERS, WIDTH + 1, _LIKELIHOODS), np.float32)
    bytes_ = np.concatenate([[0], _LIKELIHOOD_EDGES, [255]])
    stored = np.exp2(-(bytes_[:-1] + bytes_[1:]) / 32)
    for order, trust in enumerate(_ROW_SHARE):
        rows[order, 0] = 0.01
        rows[order, 1] = np.clip(trust * stored**0.35, 0.002, 0.97)
        rows[order, 2:] = np.clip(0.4 * trust * stored**0.45, 0.002, 0.97)
    flat = np.concatenate([prob.reshape(-1), rows.reshape(-1)])
    weights = np.zeros((_SETS, SLOTS + 1), np.float32)
    weights[:_MATCHES, :SLOTS] = FIRST_WEIGHT
    return Mixture(
        prob=flat,
        stretch=np.log(flat / (1 - flat)),
        seen=np.full(flat.shape, CELL_PRIOR, np.float32),
        weights=weights,
        groups=(_OWN_BIAS[:, None] + _STORE_BIAS[None]).astype(np.float32).reshape(-1),
        ranks=np.zeros(_RANKS**ORDERS, np.float32),
        learned=np.zeros(1),
    )


def restored_mixture(state: Mapping[str, Array]) -> Mixture:
    """A mixture whose fields are copies of the arrays of these names. Raises ``ValueError`` if they do not fit."""
    like = new_mixture()._asdict()
    check(state, {name: (array.dtype, array.shape) for name, array in like.items()})
    # Compiled code looks up log-odds by probability, and divides by what was seen.
    if not (
        0 <= state["prob"].min() <= state["prob"].max() <= 1 and min(state[n].min() for n in ("seen", "learned")) >= 0
    ):
        raise ValueError("saved probabilities must be in [0, 1], and counts not negative")
    return Mixture(**{name: state[name].copy() for name in like})


# Of rows found by no, one, two and three tokens.
_ROW_SHARE = (0.3, 0.5, 0.7, 0.85)
# By class group in the own text and in the store.
_OWN_BIAS = np.array([-1.0, -0.6, -0.3, 0.1, 0.3, 0.9])
_STORE_BIAS = np.array([-0.3, -0.1, 0.0, 0.1, 0.2, 0.3])


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
def _contexts(scratch: Scratch, n: int, block: int, state: int, length: int, first_slot: int) -> int:
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
                first = ((first_slot + bucket) * TOTALS + _total_bucket(total)) * CLASSES
                scratch.rec[n] = rec
                scratch.slot[n] = first_slot + bucket
                scratch.first[n] = first
                scratch.absent[n] = first + (ABSENT if load(rec, DEGREE) <= INLINE else MINOR)
                scratch.sevenths[n] = SEVENTHS / total
                n += 1
        state = load(rec, LINK)
        length = load(record(block, max(state, 0)), LEN)
    return n


@kernel
def _habit(token: int) -> int:
    return (token * 0x9E3779B1 >> 12) & (HABITS - 1)


@kernel
def _candidate(scratch: Scratch, k: int, most: int, token: int) -> int:
    """Index of a candidate, ``k`` if it is new, -1 if it is new and there is no room."""
    for j in range(k):
        if scratch.token[j] == token:
            return j
    return k if k < most else -1


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
    sibling: int,
    sibling_state: int,
    sibling_length: int,
    history: int,
    most: int,
) -> tuple[int, int]:
    """Fill ``scratch`` with candidates for the next token; returns (candidates, best candidate).

    ``local``, ``store`` and ``sibling`` are automata (0: none), each with the cursor (state, length) of the text in it,
    and ``scratch.row`` the top-k rows; ``habits`` the address of the namespace's ``float32[HABITS]`` (0: none). At most
    ``most`` candidates: every context's best continuation, then the second ones, and so on.
    """
    m = _contexts(scratch, 0, local, local_state, local_length, 0) if local != 0 else 0
    s = _contexts(scratch, m, store, store_state, store_length, BUCKETS) if store != 0 else m
    n = _contexts(scratch, s, sibling, sibling_state, sibling_length, 2 * BUCKETS) if sibling != 0 else s
    contexts, rank_code = n, np.int64(0)
    for back in range(ORDERS):
        o = ORDERS - 1 - back
        row = scratch.row[o]
        if row != 0:
            size = load(row, SIZE)
            first = _FIRST_ROW_CELL + o * _ROW_CLASSES
            scratch.rec[contexts] = row
            scratch.slot[contexts] = FIRST_ROW + o
            scratch.first[contexts] = first + _LIKELIHOODS
            scratch.absent[contexts] = first + _LIKELIHOOD[prob_byte(row, size - 1)]
            rank_code += _RANK_UNIT[o]
            contexts += 1
    match = 0
    if m > 0:
        match = int(scratch.slot[0] + 1) * (BUCKETS + 1)
    if n > m:  # the store's longest context, or the siblings' if it has none
        match += int(scratch.slot[m]) % BUCKETS + 1
    scratch.sets[0] = match
    scratch.sets[1] = _MATCHES + (history & HISTORY_MASK)
    by_match, by_history = mix.weights[scratch.sets[0]], mix.weights[scratch.sets[1]]
    base = np.float64(by_match[SLOTS] + by_history[SLOTS])
    for i in range(contexts):
        slot = scratch.slot[i]
        weight = np.float64(by_match[slot] + by_history[slot])
        scratch.weight[i] = weight
        base += weight * mix.stretch[scratch.absent[i]]
    group: Any = 0
    if m > 0:
        group = (scratch.absent[0] - scratch.first[0] + 1) * _GROUPS
    if n > m:
        group += scratch.absent[m] - scratch.first[m] + 1
    k, places = 0, 0
    for rank in range(WIDTH if contexts > n else INLINE):
        for i in range(0 if rank < INLINE else n, contexts):
            rec = scratch.rec[i]
            if i < n:
                degree = load(rec, DEGREE)
                if rank >= degree:
                    continue
                token = load(rec + (EDGE + 3 * rank) * 4, TOKEN)
            else:
                if rank >= load(rec, SIZE):
                    continue
                token = load(rec, IDS + rank)
            j = _candidate(scratch, k, most, token)
            if j < 0:
                continue
            if j == k:
                k += 1
                scratch.token[j] = token
                scratch.odds[j] = base
                scratch.group[j] = group
                scratch.rank[j] = rank_code
                scratch.local[j] = scratch.stored[j] = scratch.shared[j] = -1
            slot = scratch.slot[i]
            if i < n:
                total = load(rec, TOTAL)
                count = load(rec + (EDGE + 3 * rank) * 4, COUNT)
                # Not an integer division, which is slow; the summand keeps whole sevenths whole.
                share = SEVENTHS if count == total else int(count * scratch.sevenths[i] + 1e-6)
                cls = SHARES + share + (SEVENTHS + 1 if load(rec, RECENT) == token else 0)
                cell = scratch.first[i] + cls
                if i < m:
                    scratch.local[j] = max(scratch.local[j], slot)
                elif i < s:
                    scratch.stored[j] = max(scratch.stored[j], slot - BUCKETS)
                else:
                    scratch.shared[j] = max(scratch.shared[j], slot - 2 * BUCKETS)
                if i == 0 and m > 0:
                    scratch.group[j] += (_group(cls) - (scratch.absent[0] - scratch.first[0] + 1)) * _GROUPS
                elif i == m:
                    scratch.group[j] += _group(cls) - (scratch.absent[m] - scratch.first[m] + 1)
            else:
                cell = scratch.first[i] + rank * _LIKELIHOODS + _LIKELIHOOD[prob_byte(rec, rank)]
                scratch.rank[j] += _RANK_STEP[rank] * _RANK_UNIT[slot - FIRST_ROW]
            scratch.odds[j] += scratch.weight[i] * (mix.stretch[cell] - mix.stretch[scratch.absent[i]])
            scratch.at[places] = i
            scratch.of[places] = j
            scratch.cell[places] = cell
            places += 1
    best = 0
    for j in range(k):
        odds = scratch.odds[j] + mix.groups[scratch.group[j]] + mix.ranks[scratch.rank[j]]
        if habits != 0:
            odds += load_float(habits, _habit(scratch.token[j]))
        scratch.odds[j] = odds
        if odds > scratch.odds[best]:
            best = j
    scratch.counts[0], scratch.counts[1], scratch.counts[2] = contexts, k, places
    return k, best


@kernel
def probability(scratch: Scratch, candidate: int) -> float:
    """Probability that a candidate of the prediction in ``scratch`` is the next token."""
    return 1.0 / (1.0 + np.exp(-min(max(scratch.odds[candidate], -12.0), 12.0)))


@kernel
def _teach(mix: Mixture, cell: int, hits: float, outcomes: float) -> None:
    """Move a cell towards what happened."""
    seen = mix.seen[cell]
    p = mix.prob[cell] + (hits - mix.prob[cell] * outcomes) / (seen + 0.5 + outcomes)
    mix.prob[cell] = p
    mix.stretch[cell] = _STRETCH[int(p * _STRETCH_STEPS)]
    mix.seen[cell] = min(seen + outcomes, CELL_LIMIT)


@kernel
def learn(mix: Mixture, scratch: Scratch, habits: int, token: int) -> None:
    """Update everything that took part in the prediction in ``scratch``: the next token was ``token``."""
    contexts, k, places = scratch.counts[0], scratch.counts[1], scratch.counts[2]
    by_match, by_history = mix.weights[scratch.sets[0]], mix.weights[scratch.sets[1]]
    rate = RATE + RATE_EXTRA / (1.0 + mix.learned[0] / RATE_SPAN)
    mix.learned[0] += k
    right, errors = -1, 0.0
    for j in range(k):
        error = -probability(scratch, j)
        if scratch.token[j] == token:
            right = j
            error += 1.0
        scratch.error[j] = error
        errors += error
        mix.groups[scratch.group[j]] += error * rate * BIAS_RATE
        mix.ranks[scratch.rank[j]] += error * rate * BIAS_RATE
        if habits != 0:
            at = _habit(scratch.token[j])
            store_float(habits, at, load_float(habits, at) + error * HABIT_RATE)
    for i in range(contexts):
        scratch.grad[i] = errors * mix.stretch[scratch.absent[i]]
        scratch.unknown[i] = k
    for p in range(places):
        i, j = scratch.at[p], scratch.of[p]
        scratch.grad[i] += scratch.error[j] * (mix.stretch[scratch.cell[p]] - mix.stretch[scratch.absent[i]])
    change = np.float32(errors * rate)
    by_match[SLOTS] += change
    by_history[SLOTS] += change
    for i in range(contexts):
        change = np.float32(scratch.grad[i] * rate)
        slot = scratch.slot[i]
        by_match[slot] += change
        by_history[slot] += change
        scratch.grad[i] = 1.0 if right >= 0 else 0.0  # from here on: hits among the candidates it does not know
    for p in range(places):
        i, j = scratch.at[p], scratch.of[p]
        scratch.unknown[i] -= 1
        if j == right:
            scratch.grad[i] = 0.0
        _teach(mix, scratch.cell[p], 1.0 if j == right else 0.0, 1.0)
    for i in range(contexts):
        if scratch.unknown[i] > 0:
            _teach(mix, scratch.absent[i], scratch.grad[i], np.float64(scratch.unknown[i]))


@kernel
def source_of(scratch: Scratch, candidate: int) -> int:
    """Which source knows a candidate in the longer context; the request's own text on a tie."""
    local, stored, shared = scratch.local[candidate], scratch.stored[candidate], scratch.shared[candidate]
    if local < 0 and stored < 0 and shared < 0:
        return SOURCE_RECYCLING
    if local >= stored and local >= shared:
        return SOURCE_CONTEXT
    return SOURCE_SIBLINGS if shared >= stored else SOURCE_STORE
