"""Probabilities of acceptance for drafts whose proposer gives none, learned online from what the target accepts.

A node's probability of being accepted once its parent is: logistic regression on its depth, on how much of the text's
end the draft's source matched (short and long matches fade differently with depth), on the share of the request's last
drafts that were accepted, and on the proposer's own estimate where it has one. Learned by stochastic gradient from
verified nodes only: of a node whose parent was rejected nothing is known. A node's probability is the product along its
path. The weights hold no text, only how far drafts of a given shape can be trusted: all requests share them.

*Trees* are treated level by level: what is learned is how often the accepted path reaches a level, and the nodes of a
level share that probability equally.

*Recovery.* What is learned starts optimistic, and drafting that does not pay ends by itself, the evidence with it. So
the first node that was drafted but not verified, its ancestors all accepted, moves its weights and its request's share
a little toward their initial values, until it is tried.

Replay of 480 recorded prompts (Spec-Bench first turns, SmolLM2-135M, chains of up to 16 nodes, all verified): expected
calibration error, and log loss here and with another method at the best of nine settings, tables of Beta counts of the
same attributes shrunk toward coarser ones:

    vLLM's ngram, n-grams of 2-4    0.008   0.356   0.364
    n-grams of 5                    0.012   0.512   0.526
    n-grams of 1-2                  0.004   0.227   0.231
    vLLM's suffix                   0.015   0.562   0.564

No gain, so left out: longer matches told apart, a second, slower share of accepted drafts, estimates crossed with
matches. Letting all weights decay all the time, so as to recover, costs 0.3 to 4% of log loss at a rate of 0.0003.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel

from .base import DraftForest, Float32Array, Int32Array
from .saved_state import check

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

_DEPTHS = 16  # deeper nodes count as the last
_REACHES = 3  # depth 1; 2 and 3; more
_MATCHES = 8  # unknown or none; 1; 2; 3; 4; 5-6; 7-9; 10 and more
_SHARES = 6
# The proposer's estimate, given the parent: none (1 for all of the request's nodes), then up to these bounds and above.
_BOUNDS = (0.2, 0.4, 0.6, 0.85, 0.999)
_ESTIMATES = len(_BOUNDS) + 2

# Where each attribute's weights begin.
_MATCH = _DEPTHS
_ESTIMATE = _MATCH + _MATCHES * _REACHES
_SHARE = _ESTIMATE + _ESTIMATES
_WEIGHTS = _SHARE + _SHARES

# Log-odds before anything is learned: a probability of 0.73.
_START = 1.0
# Learning rate, falling from RATE + RATE_EXTRA to RATE over the first RATE_SPAN nodes or so.
_RATE, _RATE_EXTRA, _RATE_SPAN = 0.02, 0.04, 100.0
# How fast a request's share of accepted drafts follows, per verified node, and where it starts.
_SHARE_RATE, _FIRST_SHARE = 0.1, 0.5
# Per step that leaves a node unverified. Drafts of which nothing is ever accepted are verified in 2.8, 0.4 and 0.1% of
# steps where it takes a probability of 0.1, 0.3 and 0.5 to be verified; when all of them begin to be accepted, it takes
# some 50, 200 and 600 steps until 8 nodes are verified.
_RECOVERY, _SHARE_RECOVERY = 1e-4, 1 / 256
# Levels of a draft that are learned from.
_LEVELS = 32


class _Slots(NamedTuple):
    """Per request: its share of accepted drafts, and what there is to know of its last draft."""

    share: Float64Array  # [slots]
    match: Int64Array  # [slots] bucket
    levels: Int64Array  # [slots] at most _LEVELS; 0: nothing to learn from
    ends: Int64Array  # [slots, _LEVELS] nodes down to this level
    estimate: Int64Array  # [slots, _LEVELS] bucket


@kernel
def _match_bucket(length: int) -> int:
    if length <= 4:
        return max(length, 0)
    if length <= 6:
        return 5
    return 6 if length <= 9 else 7


@kernel
def _estimate_bucket(share: float) -> int:
    for b in range(len(_BOUNDS)):
        if share < _BOUNDS[b]:
            return b + 1
    return len(_BOUNDS) + 1


@kernel
def _places(slots: _Slots, slot: int, level: int) -> tuple[int, int, int, int]:
    """The weights that make a level's probability."""
    reach = 0 if level == 0 else 1 if level <= 2 else 2
    share = min(int(slots.share[slot] * _SHARES), _SHARES - 1)
    return (
        min(level, _DEPTHS - 1),
        _MATCH + slots.match[slot] * _REACHES + reach,
        _ESTIMATE + slots.estimate[slot, min(level, _LEVELS - 1)],
        _SHARE + share,
    )


@kernel
def _predict(weights: Float64Array, places: tuple[int, int, int, int]) -> float:
    a, b, c, d = places
    return 1.0 / (1.0 + np.exp(-(_START + weights[a] + weights[b] + weights[c] + weights[d])))


@kernel
def _describe(
    slots: _Slots, slot: int, parents: Int32Array, own: Float32Array, depth: Int64Array, count: Int64Array
) -> int:
    """Note a draft's levels in ``slots``, nodes' levels in ``depth`` and levels' sizes in ``count``.

    Returns the number of levels, -1 if a parent does not come before its child.
    """
    n, levels, known = len(parents), 0, False
    for j in range(n):
        parent = parents[j]
        if parent < -1 or parent >= j:
            return -1
        depth[j] = depth[parent] + 1 if parent >= 0 else 0
        if depth[j] == levels:
            count[levels] = 0
            levels += 1
        count[depth[j]] += 1
        known |= own[j] < 1.0
    slots.levels[slot] = min(levels, _LEVELS)
    end, above = 0, 1.0
    for level in range(slots.levels[slot]):
        end += count[level]
        slots.ends[slot, level] = end
        slots.estimate[slot, level] = 0
        if known:
            here = 0.0
            for j in range(level, n):
                if depth[j] == level:
                    here += own[j]
                    if count[level] == 1:
                        break
            here = min(here, 1.0)
            slots.estimate[slot, level] = _estimate_bucket(here / above if above > 0 else 0.0)
            above = here
    return levels


@kernel
def _assign(
    weights: Float64Array,
    per: _Slots,
    slots: Int32Array,
    parents: Int32Array,
    own: Float32Array,
    offsets: Int32Array,
    matched: Int32Array,
    depth: Int64Array,
    count: Int64Array,
    value: Float64Array,
    probs: Float32Array,
) -> int:
    """Fill ``probs``; returns the number of the request whose offsets or parents are wrong, -1 if none."""
    end = 0
    for i in range(len(slots)):
        slot, start, stop = slots[i], offsets[i], offsets[i + 1]
        if start != end or stop < start or stop > len(parents):
            return i
        end = stop
        per.match[slot] = _match_bucket(matched[i])
        levels = _describe(per, slot, parents[start:stop], own[start:stop], depth, count)
        if levels < 0:
            per.levels[slot] = 0
            return i
        reached, bound = 1.0, 1.0
        for level in range(levels):
            reached *= _predict(weights, _places(per, slot, level))
            bound = value[level] = min(bound, reached / count[level])
        for j in range(start, stop):
            probs[j] = value[depth[j - start]]
    return -1


@kernel
def _move(weights: Float64Array, places: tuple[int, int, int, int], by: float) -> None:
    for place in places:
        weights[place] += by


@kernel
def _learn(
    weights: Float64Array,
    seen: Float64Array,
    per: _Slots,
    slots: Int32Array,
    drafted: Int32Array,
    accepted: Int32Array,
) -> None:
    for i in range(len(slots)):
        slot = slots[i]
        levels = verified = per.levels[slot]
        per.levels[slot] = 0
        while verified > 0 and per.ends[slot, verified - 1] > drafted[i]:
            verified -= 1
        share = per.share[slot]
        for level in range(min(accepted[i] + 1, verified)):
            places = _places(per, slot, level)
            hit = 1.0 if level < accepted[i] else 0.0
            seen[0] += 1.0
            rate = _RATE + _RATE_EXTRA / (1.0 + seen[0] / _RATE_SPAN)
            _move(weights, places, rate * (hit - _predict(weights, places)))
            share += _SHARE_RATE * (hit - share)
        if verified < levels and accepted[i] >= verified:
            for place in _places(per, slot, verified):
                weights[place] -= _RECOVERY * weights[place]
            share += _SHARE_RECOVERY * (_FIRST_SHARE - share)
        per.share[slot] = share


class Acceptance:
    """Gives the nodes of drafts calibrated probabilities. Not for use from several threads."""

    def __init__(self) -> None:
        self._weights = np.zeros(_WEIGHTS)
        self._seen = np.zeros(1)
        self._slots = _Slots(
            np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64), *np.zeros((2, 0, _LEVELS), np.int64)
        )

    def _reserve(self, slots: Int32Array) -> None:
        if len(slots) == 0:
            return
        if slots.min() < 0:
            raise ValueError(f"slot {slots.min()} is negative")
        size, need = len(self._slots.share), int(slots.max()) + 1
        if need > size:
            more = max(64, size, need - size)
            self._slots = _Slots(
                *(np.concatenate([old, np.zeros((more, *old.shape[1:]), old.dtype)]) for old in self._slots)
            )
            self._slots.share[size:] = _FIRST_SHARE

    def assign(self, forest: DraftForest, slots: Int32Array) -> Float32Array:
        """Probabilities that the nodes are reached and accepted; remembered for :meth:`learn`.

        Args:
            forest: drafts; ``probs`` are read as the proposer's own estimates where a request has one below 1.
            slots: ``int32[n]`` slot of each of its requests.

        Returns:
            ``float32[N]``, never rising along a path.

        Raises:
            ValueError: ``forest`` is of another number of requests or inconsistent, a slot is negative, or a node's
                parent does not come before it.
        """
        offsets, size = forest.offsets, len(forest.tokens)
        matched = np.zeros(len(slots), np.int32) if forest.matched is None else forest.matched
        if not len(offsets) - 1 == len(matched) == len(slots) or not len(forest.parents) == len(forest.probs) == size:
            raise ValueError(
                f"a forest of {len(offsets) - 1} requests, {len(matched)} match lengths, {size} tokens, "
                f"{len(forest.parents)} parents and {len(forest.probs)} probs for {len(slots)} slots"
            )
        self._reserve(slots)
        probs = np.empty(size, np.float32)
        depth, count = np.empty((2, size), np.int64)
        bad = _assign(
            self._weights,
            self._slots,
            slots,
            forest.parents,
            forest.probs,
            offsets,
            matched,
            depth,
            count,
            np.empty(size),
            probs,
        )
        if bad >= 0:
            raise ValueError(
                f"request {bad}: offsets {offsets!r} are wrong, or a node's parent does not come before it"
            )
        return probs

    def learn(self, slots: Int32Array, drafted: Int32Array, accepted: Int32Array) -> None:
        """Learn from what became of the requests' last drafts.

        Where not the whole draft was verified, the first nodes of a chain were, or a tree's most probable ones. A
        request without a draft since its last outcome teaches nothing.

        Args:
            slots: ``int32[n]``, distinct.
            drafted: ``int32[n]`` nodes that were verified.
            accepted: ``int32[n]`` of them accepted.

        Raises:
            ValueError: the arrays are of several lengths, a slot is negative, or more was accepted than verified.
        """
        if not len(slots) == len(drafted) == len(accepted):
            raise ValueError(f"{len(slots)} slots, {len(drafted)} drafted and {len(accepted)} accepted counts")
        if (accepted < 0).any() or (accepted > drafted).any():
            raise ValueError(f"accepted {accepted!r} of {drafted!r} drafted nodes")
        self._reserve(slots)
        _learn(self._weights, self._seen, self._slots, slots, drafted, accepted)

    def forget(self, slot: int) -> None:
        """Forget a request; what was learned from it stays. Slots never seen are ignored."""
        if 0 <= slot < len(self._slots.share):
            self._slots.share[slot] = _FIRST_SHARE
            self._slots.levels[slot] = 0

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What was learned: ``weights`` (``float64[W]``) and ``seen`` (``float64[1]``, nodes learned from)."""
        return {"weights": self._weights.copy(), "seen": self._seen.copy()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over what :meth:`state` returned. Raises ``ValueError`` if it does not fit, and has changed nothing
        then."""
        check(state, {"weights": (np.float64, (_WEIGHTS,)), "seen": (np.float64, (1,))})
        if state["seen"][0] < 0:
            raise ValueError(f"saved seen must not be negative, got {state['seen'][0]}")
        self._weights[:] = state["weights"]
        self._seen[:] = state["seen"]
