"""Token Recycling (arXiv 2408.08696): drafts from the target model's own second guesses at earlier rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel

from vllm_specplug.options import option

from .base import SOURCE_RECYCLING, DraftForest, Int32Array
from .drafting import Drafter, Sources
from .mixture import Mixture, Scratch
from .recycling_table import WIDTH, Table
from .tree_growth import Forest, Nodes, Slots, cut, foresee, new_forest, plant, sprout

Int64Array = npt.NDArray[np.int64]

# The published tree of 80 nodes, one list per level: how many children each node of the level above has. Child j of a
# node that holds token t is the j-th best token after t.
_TEMPLATE = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    (2, 0, 0, 1, 0, 0, 0, 0),
)


def template() -> tuple[Int64Array, Int64Array]:
    """``int64[80]`` each, breadth first: a node's parent (-1: the root), and which child of it the node is."""
    parents: list[int] = []
    children: list[int] = []
    level = [-1]
    for counts in _TEMPLATE:
        below = []
        for parent, count in zip(level, counts, strict=False):  # the nodes of a level without children may be left out
            for child in range(count):
                below.append(len(parents))
                parents.append(parent)
                children.append(child)
        level = below
    return np.array(parents, np.int64), np.array(children, np.int64)


@kernel
def _fill(
    mix: Mixture,
    scratch: Scratch,
    nodes: Nodes,
    table: Table,
    per: Slots,
    slots: Int32Array,
    limits: Int32Array,
    parents: Int64Array,
    children: Int64Array,
    made: Int64Array,
    out: Forest,
    offsets: Int32Array,
) -> int:
    """Fill the template from one-token keys, breadth first; returns the number of nodes.

    A request that may not branch gets the template's path of best tokens.
    """
    base = 0
    for i in range(len(slots)):
        slot, size, expanded, k, scale = slots[i], 0, -1, 0, 1.0
        deepest = per.left[slot] - 1
        plant(nodes, per, slot)
        for node in range(len(parents)):
            parent = made[parents[node]] if parents[node] >= 0 else 0
            made[node] = -1
            child = children[node]
            if size == limits[i] or parent < 0 or nodes.depth[parent] >= deepest:
                continue
            if child > 0 and per.branching[slot] == 0:
                continue
            if parent != expanded:
                k, _, scale = foresee(mix, scratch, nodes, table, 1, per, slot, parent, WIDTH)
                expanded = parent
            if child >= k:
                continue
            token, prob = scratch.token[child], scratch.error[child] * scale * nodes.prob[parent]
            size += 1
            made[node] = size
            at = base + size - 1
            out.tokens[at], out.parents[at], out.probs[at] = token, parent - 1, prob
            out.sources[at] = SOURCE_RECYCLING
            sprout(nodes, size, parent, token, 1 if child == 0 else 0, prob)
        base += size
        offsets[i + 1] = base
    return base


@dataclass(frozen=True)
class TokenRecyclingOptions:
    """Options of token recycling."""

    template: bool = option(
        False,
        "draft over the published tree of 80 nodes from one-token keys, not by probability (with fewer draft tokens "
        "than nodes: its first ones, breadth first)",
    )
    min_prob: float = option(
        0.07,
        "draft no token that is accepted with less than this probability (not with the template)",
        low=0.0,
        high=1.0,
        env="SPECPLUG_TOKEN_RECYCLING_MIN_PROB",
    )
    k: int = option(WIDTH, "guesses kept per key", low=1, high=WIDTH)
    keys: int = option(3, "longest key, in tokens", low=1, high=3)
    table_bytes: int = option(64 << 20, "memory for guesses, all namespaces together", low=1 << 16)


class TokenRecycling(Drafter):
    """Drafts what the target itself ranked highest after the same last tokens, rejected rows included.

    The table outlives requests ("hot start"); the last occurrence of a key wins. Beside the published one-token keys
    there are keys of two and three tokens (STAND, arXiv 2506.04708; ADED, arXiv 2407.12021), and a node's probability
    is learned from what the target said of it and how such guesses fared (see :mod:`.mixture`).
    """

    name: ClassVar[str] = "token_recycling"
    Options: ClassVar[type] = TokenRecyclingOptions
    wants_topk = True

    def __init__(self, options: TokenRecyclingOptions | None = None) -> None:
        self.options = options = options or TokenRecyclingOptions()
        self.topk = options.k
        sources = Sources(
            context=False,
            siblings=False,
            table_bytes=options.table_bytes,
            orders=1 if options.template else options.keys,
            width=options.k,
            anywhere=not options.template,
        )
        super().__init__(sources, options.min_prob, tree=True)
        self._parents, self._children = template()
        self._made = np.zeros(len(self._parents), np.int64)

    def propose(self, slots: Int32Array, limits: Int32Array) -> DraftForest:
        """Draft for each request. Raises ``ValueError`` for an unknown slot or a bad limit."""
        if not self.options.template:
            return super().propose(slots, limits)
        slots, limits = self._limits(slots, limits)
        out, offsets = new_forest(int(limits.sum())), np.zeros(len(slots) + 1, np.int32)
        size = _fill(
            self._mix,
            self._scratch,
            self._nodes,
            self._table.view,
            self._slots,
            slots,
            limits,
            self._parents,
            self._children,
            self._made,
            out,
            offsets,
        )
        return cut(out, size, offsets)
