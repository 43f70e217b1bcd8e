"""Grows one request's draft: the most probable nodes first, as a tree or as a chain.

The nodes with the highest path probabilities are the tree that maximises expected accepted tokens for its size
(OPT-Tree, arXiv 2406.17276; EAGLE-2, arXiv 2406.16858). A node's probability never exceeds its parent's, so taking the
best of the frontier again and again finds them, in an order that has parents before children.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel, load

from .base import DraftForest, Float32Array, Int8Array, Int32Array
from .mixture import (
    DRAFT_CANDIDATES,
    HISTORY_MASK,
    Mixture,
    Scratch,
    predict,
    probability,
    source_of,
)
from .recycling_table import Table, find_rows
from .suffix_automaton import LEN, advance, record, settle

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

# vLLM's own limit on draft tokens per request.
MAX_DRAFT = 128
# A node is not opened where a child of this share of its probability would not make it into the tree. And small trees
# have no use for unlikely children. Both save a third of the time and cost less than 0.01 accepted tokens per step.
LIKELY_CHILD = 0.7
FEW_CANDIDATES = 6


class Slots(NamedTuple):
    """State per slot, indexed by slot."""

    text: Int64Array  # address of the end of the request's text, int32; 0: no request
    size: Int64Array  # tokens in it
    room: Int64Array  # tokens it has room for
    left: Int64Array  # tokens the request may still hold
    branching: Int64Array  # 1: trees may be drafted
    space: Int64Array  # number of its namespace in the recycling table
    block: Int64Array  # address of the automaton of its own text, 0 if there is none
    last: Int64Array  # state of the whole text in it
    store: Int64Array  # address of its namespace's automaton, 0 if there is none
    sibling: Int64Array  # address of the automaton of its siblings' output and its own, 0 if there is none
    sibling_last: Int64Array  # state of its own output in it
    habits: Int64Array  # address of its namespace's habits, 0 if there are none
    state: Int64Array  # cursor into the store: state and
    matched: Int64Array  # matched tokens
    history: Int64Array  # whether the best candidate was right, newest in bit 0


class Nodes(NamedTuple):
    """One request's draft while it grows. Node 0 is the root; node j + 1 is draft token j.

    ``prob``, ``depth``, ``parent``, ``token`` and ``best`` hold for every node, the rest once it was opened.
    """

    local: Int64Array  # [nodes] cursor into the request's own text: state and
    length: Int64Array  # matched tokens
    store: Int64Array  # the same in the store
    matched: Int64Array
    sibling: Int64Array  # and in the siblings' output
    common: Int64Array
    history: Int64Array
    depth: Int64Array
    tokens: Int64Array  # [nodes, 3] last tokens of the path, newest first; -1: none
    prob: Float64Array
    parent: Int64Array
    token: Int64Array
    best: Int64Array  # 1: the most probable child of its parent
    # The frontier, best first: candidates that no node was made of yet.
    next_prob: Float64Array
    next_parent: Int64Array
    next_token: Int64Array
    next_source: Int64Array
    next_best: Int64Array


class Forest(NamedTuple):
    """Output arrays, as in :class:`.base.DraftForest`, of the whole batch."""

    tokens: Int32Array
    parents: Int32Array
    probs: Float32Array
    sources: Int8Array


def new_nodes() -> Nodes:
    """Room for one draft."""
    size = MAX_DRAFT + 2
    floats = {"prob", "next_prob"}
    fields: dict[str, Any] = {n: np.zeros(size, np.float64 if n in floats else np.int64) for n in Nodes._fields}
    return Nodes(**fields | {"tokens": np.zeros((size, 3), np.int64)})


def new_forest(size: int) -> Forest:
    """Output arrays for ``size`` nodes."""
    ints = np.empty((2, size), np.int32)
    return Forest(ints[0], ints[1], np.empty(size, np.float32), np.empty(size, np.int8))


def cut(out: Forest, size: int, offsets: Int32Array, matched: Int32Array | None = None) -> DraftForest:
    """The first ``size`` nodes."""
    return DraftForest(out.tokens[:size], out.parents[:size], out.probs[:size], out.sources[:size], offsets, matched)


@kernel
def token_back(per: Slots, slot: int, back: int) -> int:
    """The token ``back`` places before the end of a slot's text (1: the last); -1 if there is none."""
    size = per.size[slot]
    return int(load(per.text[slot], size - back)) if back <= size else -1


@kernel
def plant(nodes: Nodes, per: Slots, slot: int) -> None:
    """Make node 0 of where a slot's text ends."""
    block, store = per.block[slot], per.store[slot]
    nodes.local[0] = per.last[slot]
    nodes.length[0] = load(record(block, per.last[slot]), LEN) if block != 0 else np.int64(0)
    nodes.matched[0] = per.matched[slot]
    nodes.store[0] = settle(store, per.state[slot], per.matched[slot]) if store != 0 else np.int64(0)
    sibling = per.sibling[slot]
    nodes.sibling[0] = per.sibling_last[slot]
    nodes.common[0] = load(record(sibling, per.sibling_last[slot]), LEN) if sibling != 0 else np.int64(0)
    nodes.history[0] = per.history[slot]
    nodes.depth[0] = 0
    nodes.prob[0] = 1.0
    for back in range(3):
        nodes.tokens[0, back] = token_back(per, slot, back + 1)


@kernel
def sprout(nodes: Nodes, node: int, parent: int, token: int, best: int, prob: float) -> None:
    """Make ``node`` the child of ``parent`` by ``token``; ``best``: 1 if it is the most probable one."""
    nodes.depth[node] = nodes.depth[parent] + 1
    nodes.prob[node] = prob
    nodes.parent[node] = parent
    nodes.token[node] = token
    nodes.best[node] = best


@kernel
def _open(nodes: Nodes, per: Slots, slot: int, node: int) -> None:
    """Find a node's place in the sources; its parent is open. Most leaves never need it."""
    block, store = per.block[slot], per.store[slot]
    parent, token = nodes.parent[node], nodes.token[node]
    if block != 0:
        nodes.local[node], nodes.length[node] = advance(block, nodes.local[parent], nodes.length[parent], token)
    if store != 0:
        nodes.store[node], nodes.matched[node] = advance(store, nodes.store[parent], nodes.matched[parent], token)
    sibling = per.sibling[slot]
    if sibling != 0:
        nodes.sibling[node], nodes.common[node] = advance(sibling, nodes.sibling[parent], nodes.common[parent], token)
    nodes.history[node] = (nodes.history[parent] << 1 | nodes.best[node]) & HISTORY_MASK
    nodes.tokens[node, 0] = token
    nodes.tokens[node, 1] = nodes.tokens[parent, 0]
    nodes.tokens[node, 2] = nodes.tokens[parent, 1]


@kernel
def foresee(
    mix: Mixture,
    scratch: Scratch,
    nodes: Nodes,
    table: Table,
    orders: int,
    per: Slots,
    slot: int,
    node: int,
    most: int,
) -> tuple[int, int, float]:
    """Predict the children of a node; returns (candidates, best one, factor that makes probabilities sum to <= 1).

    Their probabilities are in ``scratch.error``.
    """
    if node > 0:
        _open(nodes, per, slot, node)
    tokens = nodes.tokens[node]
    find_rows(table, per.space[slot], orders, tokens[0], tokens[1], tokens[2], scratch.row)
    k, best = predict(
        mix,
        scratch,
        per.habits[slot],
        per.block[slot],
        nodes.local[node],
        nodes.length[node],
        per.store[slot],
        nodes.store[node],
        nodes.matched[node],
        per.sibling[slot],
        nodes.sibling[node],
        nodes.common[node],
        nodes.history[node],
        most,
    )
    total = 0.0
    for j in range(k):
        prob = probability(scratch, j)
        scratch.error[j] = prob
        total += prob
    return k, best, 1.0 / max(total, 1.0)


@kernel
def _push(nodes: Nodes, waiting: int, room: int, prob: float, parent: int, token: int, source: int, best: int) -> int:
    """Insert a candidate into the frontier, which keeps the ``room`` best; returns its new length."""
    at = min(waiting, room - 1)
    while at > 0 and nodes.next_prob[at - 1] < prob:
        nodes.next_prob[at] = nodes.next_prob[at - 1]
        nodes.next_parent[at] = nodes.next_parent[at - 1]
        nodes.next_token[at] = nodes.next_token[at - 1]
        nodes.next_source[at] = nodes.next_source[at - 1]
        nodes.next_best[at] = nodes.next_best[at - 1]
        at -= 1
    nodes.next_prob[at] = prob
    nodes.next_parent[at] = parent
    nodes.next_token[at] = token
    nodes.next_source[at] = source
    nodes.next_best[at] = best
    return min(waiting + 1, room)


@kernel
def grow(
    mix: Mixture,
    scratch: Scratch,
    nodes: Nodes,
    table: Table,
    orders: int,
    per: Slots,
    slot: int,
    limit: int,
    min_prob: float,
    most: int,
    out: Forest,
    base: int,
) -> int:
    """Draft at most ``limit`` nodes, none less probable than ``min_prob``, into ``out`` from ``base`` on.

    At most ``most`` children of a node are considered. Returns the number of nodes.
    """
    tree = per.branching[slot] != 0
    deepest = per.left[slot] - 1  # the target adds one token of its own
    plant(nodes, per, slot)
    size, waiting, first, node = 0, 0, 0, 0  # the frontier is next_*[first:first + waiting]
    while size < limit:
        room = limit - size
        if nodes.depth[node] < deepest and (
            waiting < room or nodes.prob[node] * LIKELY_CHILD > nodes.next_prob[first + room - 1]
        ):
            if first > 0:  # pushing wants the frontier at the start
                for i in range(waiting):
                    nodes.next_prob[i] = nodes.next_prob[first + i]
                    nodes.next_parent[i] = nodes.next_parent[first + i]
                    nodes.next_token[i] = nodes.next_token[first + i]
                    nodes.next_source[i] = nodes.next_source[first + i]
                    nodes.next_best[i] = nodes.next_best[first + i]
                first = 0
            waiting = min(waiting, room)
            k, best, scale = foresee(
                mix,
                scratch,
                nodes,
                table,
                orders,
                per,
                slot,
                node,
                min(most, FEW_CANDIDATES + limit // 3) if tree else DRAFT_CANDIDATES,
            )
            scale *= nodes.prob[node]
            for j in range(k):
                if not tree and j != best:
                    continue
                prob = scratch.error[j] * scale
                if prob >= min_prob and (waiting < room or prob > nodes.next_prob[room - 1]):
                    source = source_of(scratch, j)
                    waiting = _push(nodes, waiting, room, prob, node, scratch.token[j], source, 1 if j == best else 0)
        if waiting == 0:
            break
        parent, token, prob = nodes.next_parent[first], nodes.next_token[first], nodes.next_prob[first]
        at = base + size
        out.tokens[at] = token
        out.parents[at] = parent - 1
        out.probs[at] = prob
        out.sources[at] = nodes.next_source[first]
        size += 1
        node = size
        sprout(nodes, node, parent, token, nodes.next_best[first], prob)
        first += 1
        waiting -= 1
    return size
