"""Fewer experts for the rows of a step: expert voting, dropping of a token's tail, static top-k'. Edits of routing.

Which rows share experts is the caller's to say: rows of one *pool* vote together.

Voting (DES-Vote, arXiv 2602.00879): the weights of each token's top-k are summed over the pool, the ``budget`` experts
of the largest sums stay, and each token takes its top-k among them. Equal sums: the smaller index.

Tail drop (arXiv 2512.21911): of a token's k weights the i smallest are dropped, for the largest i whose share of all k
is below ``thresholds[i - 1]``; one always stays. Static top-k' (``keep``) is what both are compared with.

What a token keeps comes first, by falling weight. A dropped slot has the weight 0 and the id of the token's first
expert, so that it loads no expert that is not loaded anyway; a caller may cut off slots that no row keeps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from vllm_specplug.kernels.memory import kernel

#: Most experts that the tail drop may take from a token (the paper's m).
MAX_DROP = 3

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
#: Router logits ``float[n, E]`` to weights ``float32[n, k]`` and expert ids ``int[n, k]``, in any order of slots.
Route = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Edit:
    """What is done to the routing of verified rows; the defaults do nothing.

    Attributes:
        share: of a layer's experts, how many a pool may use, rounded up.
        thresholds: of the tail drop, at most :data:`MAX_DROP`, the first for one dropped expert; empty: none.
        keep: most experts of a token; 0: its k.
    """

    share: float = 1.0
    thresholds: tuple[float, ...] = ()
    keep: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share} is not in (0, 1]")
        if len(self.thresholds) > MAX_DROP:
            raise ValueError(f"{len(self.thresholds)} thresholds; at most {MAX_DROP} experts may be dropped")
        if self.keep < 0:
            raise ValueError(f"keep {self.keep} is negative")

    @property
    def exact(self) -> bool:
        """Whether it leaves every routing as it is."""
        return self.share >= 1 and not self.thresholds and not self.keep

    def budget(self, num_experts: int) -> int:
        """Experts that a pool may use."""
        return min(num_experts, math.ceil(self.share * num_experts - 1e-9))


def tail_ratios(weights: torch.Tensor) -> torch.Tensor:
    """Share of a token's ``i`` smallest routing weights in all of its weights, i = 1 to :data:`MAX_DROP`.

    Args:
        weights: ``float[n, k]``, in any order.
    Returns:
        ``float32[n, MAX_DROP]``; NaN where i is not below k.
    """
    rising = weights.float().sort(dim=1).values
    ratios = torch.full((len(weights), MAX_DROP), torch.nan)
    some = min(MAX_DROP, weights.shape[1] - 1)
    ratios[:, :some] = rising.cumsum(dim=1)[:, :some] / rising.sum(dim=1, keepdim=True)
    return ratios


def softmax_route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing by softmax: the ``top_k`` largest of each row; their weights sum to 1 if ``renormalize``, else they are
    shares of the softmax over all experts. Equal logits: the smaller index."""
    numbers, ids = logits.float().sort(dim=1, descending=True, stable=True)
    chosen = numbers[:, :top_k]
    over = chosen if renormalize else numbers
    return (chosen - over.logsumexp(dim=1, keepdim=True)).exp(), ids[:, :top_k].int()


def vote(weights: torch.Tensor, ids: torch.Tensor, pools: npt.ArrayLike, num_experts: int, budget: int) -> torch.Tensor:
    """Experts that each pool may use.

    Args:
        weights, ids: ``[n, k]`` routing of all pools' rows.
        pools: ``int[p + 1]`` where each pool's rows begin, and ``n``.
    Returns:
        ``bool[p, num_experts]``, ``budget`` true in each row.
    """
    starts = np.asarray(pools)
    allowed = torch.zeros(len(starts) - 1, num_experts, dtype=torch.bool, device=weights.device)
    for pool, (start, end) in enumerate(itertools.pairwise(starts)):
        votes = torch.zeros(num_experts, dtype=torch.float64, device=weights.device)
        votes.index_add_(0, ids[start:end].flatten().long(), weights[start:end].flatten().double())
        allowed[pool, votes.sort(descending=True, stable=True).indices[:budget]] = True
    return allowed


def edit_routing(
    route: Route, logits: torch.Tensor, pools: npt.ArrayLike, edit: Edit, renormalize: bool, softmax: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Routing of some rows under ``edit``, for any router: the reference.

    Voting is an edit of logits: minus infinity for experts that may not be used, then ``route`` again.

    Args:
        logits: ``float[n, E]`` of the edited rows only.
        pools: as for :func:`vote`.
        renormalize: a token's weights keep their sum when some are dropped.
        softmax: weights are shares of one softmax over the logits; if they are not renormalised, taking away logits
            must not change the others' weights.
    Returns:
        weights ``float32[n, k]``, ids ``int32[n, k]``, and how many slots each row keeps, ``int64[n]``.
    """
    weights, ids = route(logits)
    weights, ids = weights.float(), ids.int()
    num_experts = logits.shape[1]
    fine = torch.ones_like(ids, dtype=torch.bool)
    if edit.budget(num_experts) < num_experts:
        of_row = np.repeat(np.arange(len(np.asarray(pools)) - 1), np.diff(np.asarray(pools)))
        allowed = vote(weights, ids, pools, num_experts, edit.budget(num_experts))[torch.from_numpy(of_row)]
        masked = logits.masked_fill(~allowed, -torch.inf)
        weights, ids = route(masked)
        weights, ids = weights.float(), ids.int()
        if softmax and not renormalize:
            weights = weights * (masked.float().logsumexp(1) - logits.float().logsumexp(1)).exp()[:, None]
        # Where fewer experts are allowed than a token uses, or a router adds to the logits, others get in.
        fine = allowed.gather(1, ids.long())
    order = torch.where(fine, weights, -1.0).sort(dim=1, descending=True, stable=True).indices
    weights, ids, fine = weights.gather(1, order), ids.gather(1, order), fine.gather(1, order)
    weights = weights * fine
    kept, total = fine.sum(dim=1), weights.sum(dim=1)
    slots = torch.arange(weights.shape[1], device=weights.device)[None]
    if edit.keep:
        kept = kept.clamp(max=edit.keep)
        weights = weights * (slots < kept[:, None])
    tails = weights.flip(1).cumsum(1).flip(1)  # of slot i: the sum of it and those after it
    before = kept
    for i, threshold in enumerate(edit.thresholds, 1):
        cut = (before - i).clamp(min=0)
        kept = torch.where((cut >= 1) & (tails.gather(1, cut[:, None])[:, 0] < threshold * total), cut, kept)
    left = slots < kept[:, None]
    weights = weights * left
    if renormalize:
        weights = weights * (total / weights.sum(dim=1))[:, None]
    return weights, torch.where(left, ids, ids[:, :1]), kept


@kernel
def _top(logits: Float32Array, allowed: npt.NDArray[np.uint8], values: Float32Array, ids: Int32Array) -> int:
    """The largest allowed logits, falling; returns how many there are. Equal ones: the smaller index first."""
    found = 0
    for expert in range(len(logits)):
        if not allowed[expert]:
            continue
        value = logits[expert]
        if found == len(ids) and not value > values[found - 1]:
            continue
        if found < len(ids):
            found += 1
        place = found - 1
        while place > 0 and values[place - 1] < value:
            values[place] = values[place - 1]
            ids[place] = ids[place - 1]
            place -= 1
        values[place] = value
        ids[place] = expert
    return found


@kernel
def _weigh(logits: Float32Array, values: Float32Array, count: int, renormalize: bool) -> None:
    """Turn the largest logits into weights, in place."""
    largest = np.float64(values[0])
    total = 0.0
    if renormalize:
        for slot in range(count):
            total += np.exp(np.float64(values[slot]) - largest)
    else:
        # The largest of all, for the row's first may not be allowed.
        for expert in range(len(logits)):
            largest = max(largest, np.float64(logits[expert]))
        for expert in range(len(logits)):
            total += np.exp(np.float64(logits[expert]) - largest)
    for slot in range(count):
        values[slot] = np.float32(np.exp(np.float64(values[slot]) - largest) / total)


@kernel
def _mark(ids: Int32Array, marks: npt.NDArray[np.uint8]) -> int:
    """Mark experts; returns how many were not marked yet."""
    new = 0
    for slot in range(len(ids)):
        if not marks[ids[slot]]:
            marks[ids[slot]] = 1
            new += 1
    return new


@kernel
def _edit(
    logits: Float32Array,
    rows: Int32Array,
    pools: Int32Array,
    renormalize: bool,
    budget: int,
    thresholds: Float32Array,
    keep: int,
    votes: npt.NDArray[np.float64],
    marks: npt.NDArray[np.uint8],
    weights: Float32Array,
    ids: Int32Array,
    kept: Int32Array,
    used: npt.NDArray[np.int64],
) -> None:
    """:func:`edit_routing` for :func:`softmax_route`.

    ``logits`` of all rows of the step, of which ``rows`` are edited. ``votes`` ``[E]`` and ``marks`` ``[3, E]`` are
    working memory. ``used``: distinct experts of all rows before and after, and slots dropped.
    """
    experts, slots = logits.shape[1], ids.shape[1]
    every, before, after = marks[0], marks[1], marks[2]
    for expert in range(experts):
        before[expert] = 0
        after[expert] = 0
    used[0] = used[1] = used[2] = 0
    for pool in range(len(pools) - 1):
        for expert in range(experts):
            every[expert] = 1
            votes[expert] = 0.0
        voted = 0
        for at in range(pools[pool], pools[pool + 1]):
            row = logits[rows[at]]
            kept[at] = _top(row, every, weights[at], ids[at])
            _weigh(row, weights[at], slots, renormalize)
            used[0] += _mark(ids[at], before)
            for slot in range(slots):
                if votes[ids[at, slot]] == 0:
                    voted += 1
                votes[ids[at, slot]] += weights[at, slot]
        if voted > budget:
            for expert in range(experts):
                every[expert] = 0
            for _ in range(budget):
                best = -1
                for expert in range(experts):
                    if not every[expert] and (best < 0 or votes[expert] > votes[best]):
                        best = expert
                every[best] = 1
            for at in range(pools[pool], pools[pool + 1]):
                row = logits[rows[at]]
                kept[at] = _top(row, every, weights[at], ids[at])
                _weigh(row, weights[at], kept[at], renormalize)
        for at in range(pools[pool], pools[pool + 1]):
            total = 0.0
            for slot in range(kept[at]):
                total += weights[at, slot]
            if keep:
                kept[at] = min(kept[at], keep)
            tail, cut = 0.0, kept[at]
            for i in range(min(len(thresholds), kept[at] - 1)):
                tail += weights[at, kept[at] - 1 - i]
                if tail < thresholds[i] * total:
                    cut = kept[at] - 1 - i
            kept[at] = cut
            left = 0.0
            for slot in range(cut):
                left += weights[at, slot]
            for slot in range(slots):
                if slot >= cut:
                    weights[at, slot] = 0.0
                    ids[at, slot] = ids[at, 0]
                elif renormalize:
                    weights[at, slot] *= total / left
            used[1] += _mark(ids[at], after)
            used[2] += slots - cut


class RoutingEditor:
    """:func:`edit_routing` for :func:`softmax_route`, compiled; keeps its working memory from call to call.

    Attributes:
        used: distinct experts of the last call's rows before and after, and slots dropped.
    """

    def __init__(self, num_experts: int, top_k: int, renormalize: bool, edit: Edit) -> None:
        """
        Raises:
            ValueError: ``top_k`` is not between 1 and ``num_experts``.
        """
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k {top_k} is not between 1 and {num_experts}, the number of experts")
        self.top_k = top_k
        self._renormalize = renormalize
        self._budget = edit.budget(num_experts)
        self._keep = edit.keep
        self._thresholds = np.array(edit.thresholds, np.float32)
        self._votes = np.empty(num_experts)
        self._marks = np.empty((3, num_experts), np.uint8)
        self.used = np.zeros(3, np.int64)

    def __call__(
        self, logits: Float32Array, rows: Int32Array, pools: Int32Array
    ) -> tuple[Float32Array, Int32Array, Int32Array]:
        """
        Args:
            logits: ``float32[n, E]`` of all rows of the step.
            rows: ``int32[r]`` which of them are edited.
            pools: ``int32[p + 1]`` where each pool begins in ``rows``, and r.
        Returns:
            weights ``float32[r, k]``, ids ``int32[r, k]``, and how many slots each row keeps, ``int32[r]``.
        """
        weights = np.empty((len(rows), self.top_k), np.float32)
        ids = np.empty((len(rows), self.top_k), np.int32)
        kept = np.empty(len(rows), np.int32)
        how = (self._renormalize, self._budget, self._thresholds, self._keep, self._votes, self._marks)
        _edit(logits, rows, pools, *how, weights, ids, kept, self.used)
        return weights, ids, kept
