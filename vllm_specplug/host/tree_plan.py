"""What one step does with draft trees: whose rows branch, at which depths, and what moves once a path is accepted.

The engine knows lists of draft tokens only. A step's rows are, for each request of the batch, its last token and its
scheduled draft tokens; this module says which of them hang on which. Imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_specplug.host.forests import KeptTree
from vllm_specplug.kernels.memory import kernel
from vllm_specplug.kernels.tree_attention import TreeBatch, build_trees
from vllm_specplug.proposers.base import Int32Array


@dataclass(slots=True)
class StepPlan:
    """The trees of one step, and the chains that this plugin attends.

    Attributes:
        trees: for the attention kernels.
        row_parents: ``int32[R]`` parent of each verified row among its request's, in the order of the logits.
        num_rows: rows of the whole step.
        only_trees: every row of the step belongs to a tree.
        branching: some draft branches; otherwise all trees are chains.
        sparse: ``bool[n]`` trees that attend part of their context; None: none does.
    """

    trees: TreeBatch
    row_parents: Int32Array
    num_rows: int
    only_trees: bool
    branching: bool = True
    sparse: npt.NDArray[np.bool_] | None = None


def chain_parents(sizes: Int32Array) -> Int32Array:
    """``int32[sum(sizes)]``: parents of rows that are all chains, ``sizes`` (``int32[n]``) rows per request."""
    ends = np.cumsum(sizes, dtype=np.int32)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(-1, total - 1, dtype=np.int32) - np.repeat(ends - sizes, sizes)


@kernel
def _gather(
    verified: Int32Array,
    index: Int32Array,
    drafted: npt.NDArray[np.int64],
    roots: Int32Array,
    parents: Int32Array,
    tokens: Int32Array,
    own_parents: Int32Array,
    offsets: Int32Array,
    rows: npt.NDArray[np.int64],
) -> int:
    size, row, draft, at = 0, 0, 0, 0
    for i in range(len(verified)):
        count = verified[i] + 1
        if at < len(index) and index[at] == i:
            for j in range(count):
                tokens[size] = roots[at] if j == 0 else drafted[draft + j - 1]
                own_parents[size] = parents[row + j] if len(parents) else j - 1
                rows[size] = row + j
                size += 1
            at += 1
            offsets[at] = size
        row += count
        draft += count - 1
    return size


def gather_rows(
    verified: Int32Array,
    index: Int32Array,
    drafted: npt.NDArray[np.int64],
    roots: Int32Array,
    parents: Int32Array | None,
) -> tuple[Int32Array, Int32Array, Int32Array, npt.NDArray[np.int64]]:
    """The verified rows of some of a step's requests.

    Args:
        verified: ``int32[B]`` draft tokens verified of each request of the batch.
        index: ``int32[n]`` rising; the requests that are asked for.
        drafted: ``int64[sum(verified)]`` draft tokens.
        roots: ``int32[n]`` last token, before the step, of the requests asked for.
        parents: ``int32[R]`` parents of all rows; None: chains.

    Returns:
        Input tokens, offsets (``int32[n + 1]``) and parents of their rows, and where they are among all rows.
    """
    most = int(verified.sum()) + len(verified)
    tokens, own = np.empty(most, np.int32), np.empty(most, np.int32)
    offsets, rows = np.zeros(len(index) + 1, np.int32), np.empty(most, np.int64)
    known = parents if parents is not None else _NO_PARENTS
    size = _gather(verified, index, drafted, roots, known, tokens, own, offsets, rows)
    return tokens[:size], offsets, own[:size], rows[:size]


_NO_PARENTS: Int32Array = np.zeros(0, np.int32)
_NO_ROWS: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
NO_DRAFTS: npt.NDArray[np.int64] = np.zeros(0, np.int64)


def row_parents_of(
    kept: Mapping[str, KeptTree],
    scheduled: Mapping[str, Sequence[int]],
    row_of: Mapping[str, int],
    num_scheduled: Int32Array,
    sizes: Int32Array,
) -> Int32Array | None:
    """How the step's verified rows hang together.

    The engine may have cut a draft, dropped it, or hold another one by now; rows that are not the start of the tree
    kept for their request are a chain, which is right for any list of tokens.

    Args:
        kept: the trees that were drafted, by request id.
        scheduled: the draft tokens the engine verifies in this step, by request id.
        row_of: batch row of each request id.
        num_scheduled: ``int32[B]`` tokens each request runs in this step.
        sizes: ``int32[B]`` verified rows of each request, its draft tokens and one.

    Returns:
        As :attr:`StepPlan.row_parents`; None if nothing branches.
    """
    found: list[tuple[int, Int32Array]] = []
    for request_id, tree in kept.items():
        tokens = scheduled.get(request_id)
        if tokens is None or len(tokens) <= tree.chain:
            continue
        row, size = row_of[request_id], len(tokens)
        if num_scheduled[row] == size + 1 and tree.tokens[:size] == list(tokens):
            found.append((row, tree.parents[:size]))
    if not found:
        return None
    parents = chain_parents(sizes)
    starts = np.cumsum(sizes) - sizes
    for row, nodes in found:
        first = int(starts[row]) + 1
        np.add(nodes, 1, out=parents[first : first + len(nodes)])
    return parents


@kernel
def _find(row_parents, sizes, ends, computed, wanted, starts, tree_sizes, contexts, requests, parents):  # type: ignore[no-untyped-def]
    """Fill the last five arrays with the requests whose rows branch, or that are ``wanted``; ``(trees, rows of trees,
    how many branch)``."""
    count, rows, base, branching = 0, 0, 0, 0
    for i in range(len(sizes)):
        size = sizes[i]
        branches = False
        for m in range(1, size):
            if row_parents[base + m] != m - 1:
                branches = True
                break
        branching += branches
        if branches or (len(wanted) > 0 and wanted[i]):
            starts[count] = ends[i] - size
            tree_sizes[count] = size
            contexts[count] = computed[i]
            requests[count] = i
            for m in range(size):
                parents[rows + m] = row_parents[base + m]
            count += 1
            rows += size
        base += size
    return count, rows, branching


@kernel
def _place(starts, sizes, contexts, depths, positions):  # type: ignore[no-untyped-def]
    base = 0
    for i in range(len(starts)):
        for m in range(sizes[i]):
            positions[starts[i] + m] = contexts[i] + depths[base + m]
        base += sizes[i]


def make_plan(
    row_parents: Int32Array,
    sizes: Int32Array,
    ends: Int32Array,
    computed: Int32Array,
    sparse: npt.NDArray[np.bool_] | None = None,
    own: npt.NDArray[np.bool_] | None = None,
) -> StepPlan | None:
    """The step's plan.

    Args:
        row_parents: see :class:`StepPlan`.
        sizes: ``int32[B]`` verified rows of each request.
        ends: ``int32[B]`` row after the last of each request; the verified rows are its last ones.
        computed: ``int32[B]`` tokens of each request in the cache.
        sparse: ``bool[B]`` requests whose rows attend part of their context, chains or not.
        own: ``bool[B]`` further requests that are this plugin's to attend, chains or not.

    Returns:
        None if nothing branches, is sparse or is this plugin's.
    """
    n, total = len(sizes), len(row_parents)
    heads = np.empty((4, n), np.int32)
    parents = np.empty(total, np.int32)
    starts, tree_sizes, contexts, requests = heads
    wanted = next((mask for mask in (sparse, own) if mask is not None), _NO_ROWS)
    if sparse is not None and own is not None:
        wanted = sparse | own
    count, rows, branching = _find(
        row_parents, sizes, ends, computed, wanted, starts, tree_sizes, contexts, requests, parents
    )
    if not count:
        return None
    trees = build_trees(starts[:count], tree_sizes[:count], contexts[:count], requests[:count], parents[:rows])
    num_rows = int(ends[-1])
    of_trees = None if sparse is None else sparse[requests[:count]]
    return StepPlan(trees, row_parents, num_rows, rows == num_rows, branching > 0, of_trees)


def place(plan: StepPlan, positions: np.ndarray) -> None:
    """Write the rotary positions of trees' rows to ``positions`` (``int64[rows]``); others are left as they are."""
    starts, sizes, contexts, _, depths = (t.numpy() for t in plan.trees[:5])
    _place(starts, sizes, contexts, depths, positions)


@kernel
def _moves(starts, requests, paths, lengths, sources, targets):  # type: ignore[no-untyped-def]
    """Rows whose K/V must move, and where to; how many, and the rows accepted in trees."""
    count, accepted = 0, 0
    for i in range(len(starts)):
        request = requests[i]
        accepted += lengths[request] - 1
        for k in range(lengths[request]):
            row = paths[request, k]
            if row != k:
                sources[count] = starts[i] + row
                targets[count] = starts[i] + k
                count += 1
    return count, accepted


def accepted_moves(plan: StepPlan, paths: Int32Array, lengths: Int32Array) -> tuple[np.ndarray, np.ndarray, int]:
    """The moves that put accepted rows of trees behind one another.

    A path's rows rise, so row ``paths[i, k]`` is never before ``k``: done in order, no move overwrites a later source.

    Args:
        plan: of the step.
        paths: ``int32[B, L]`` the row, within its request, that emitted the k-th token.
        lengths: ``int32[B]`` tokens emitted.

    Returns:
        Rows of the step to move (``int64[m]``), rows whose places they take (``int64[m]``), how many draft tokens of
        trees were accepted.
    """
    trees = plan.trees
    sources, targets = np.empty((2, len(trees.depths)), np.int64)
    starts, requests = trees.starts.numpy(), trees.requests.numpy()
    count, accepted = _moves(starts, requests, np.ascontiguousarray(paths), lengths, sources, targets)
    return sources[:count], targets[:count], int(accepted)


def warm_up() -> None:
    """Compile before the first request."""
    one = np.ones(1, np.int32)
    sizes = one * 3
    plan = make_plan(np.array([-1, 0, 0], np.int32), sizes, sizes, one, one > 0)
    assert plan is not None
    place(plan, np.zeros(3, np.int64))
    accepted_moves(plan, np.array([[0, 2]], np.int32), one * 2)
