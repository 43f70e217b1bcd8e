"""Shapes of the draft trees that are grown on the device, by how many of the request's last tokens occurred before.

A shape's nodes are in the order of how often each held the token that really followed, so a tree of K nodes is the
first K. They were counted at 47,000 places of 480 greedy outputs (Spec-Bench's first turns, SmolLM2-135M-Instruct) by
``benchmarks/bench_device_drafts.py --shapes``, as the published trees of Token Recycling (arXiv 2408.08696) and STAND
(arXiv 2506.04708) were found; that trees found on some texts serve others as well is from the latter.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_specplug.kernels.recycling_matrix import Node


def name_of(node: Node) -> str:
    """``3`` is the third copied token, ``2:01`` the guess of rank 1 after that of rank 0 after the second."""
    return f"{node.copies}:{''.join(map(str, node.ranks))}" if node.ranks else str(node.copies)


def node_of(name: str) -> Node:
    """The node of a name, see `name_of`."""
    copies, _, ranks = name.partition(":")
    return Node(int(copies), tuple(map(int, ranks)))


def _longer(nodes: list[Node], copied: bool) -> Node:
    """A node below the deepest of the likeliest path."""
    if copied:
        return Node(1 + max(node.copies for node in nodes if not node.ranks), ())
    deepest = max(len(node.ranks) for node in nodes if not any(node.ranks))
    return Node(0, (0,) * (deepest + 1))


def shape(matched: int, length: int, branching: bool = True) -> Sequence[Node]:
    """The nodes of a draft.

    Args:
        matched: tokens matched; more than the table has count as its last.
        length: how many nodes.
        branching: whether the draft may branch; else it is a chain, of copied tokens if any token matched.
    """
    if not branching:
        return [Node(k, ()) if matched else Node(0, (0,) * k) for k in range(1, length + 1)]
    nodes = [node_of(name) for name in SHAPES[min(matched, len(SHAPES) - 1)].split()][:length]
    while len(nodes) < length:
        nodes.append(_longer(nodes, matched > 0))
    return nodes


#: By tokens matched; the last line of more as well.
SHAPES: tuple[str, ...] = (
    # 0 tokens matched
    "0:0 0:00 0:1 0:2 0:000 0:01 0:3 0:4 0:10 0:0000 0:5 0:6 0:02 0:03 0:7 0:20 0:010 0:001 0:100 0:04 0:00000 "
    "0:05 0:30 0:11 0:06 0:000000 0:40 0:002 0:1000 0:030 0:0100 0:200 0:07 0:50 0:60 0:003 0:0001 0:0010 0:004 "
    "0:020 0:040 0:2000 0:0000000 0:12 0:13 0:22 0:70 0:300 0:0020 0:0300 0:31 0:110 0:400 0:00100 0:21 0:20000 "
    "0:14 0:32 0:005 0:011 0:021 0:0002 0:00001 0:16",
    # 1 tokens matched
    "1 2 0:0 3 4 0:1 5 6 0:2 7 8 0:3 9 0:00 1:0 10 11 0:4 12 0:5 13 14 15 0:6 0:10 16 2:0 1:1 17 18 0:000 19 20 "
    "0:20 0:01 21 22 1:2 1:00 0:30 23 0:100 3:0 0:0000 24 0:11 1:3 25 2:1 0:40 4:0 26 0:02 27 0:50 0:03 1:4 0:200 "
    "3:1 28 0:00000 1:10 29 0:21",
    # 2 tokens matched
    "1 2 3 4 5 6 7 8 0:0 9 10 11 12 0:1 13 14 1:0 15 16 17 18 0:2 0:00 19 20 2:0 0:3 21 22 1:1 23 3:0 24 0:4 25 "
    "0:000 1:00 26 0:10 27 0:5 1:2 2:1 0:6 28 29 30 31 4:0 32 2:00 33 34 35 36 37 38 0:0000 0:01 1:4 39 1:3 3:1 "
    "40",
    # 3 tokens matched
    "1 2 3 4 5 6 7 8 9 10 11 12 0:0 13 14 15 16 17 18 1:0 19 0:1 20 21 22 2:0 23 0:00 0:2 24 25 26 1:1 27 3:0 28 "
    "29 1:00 30 31 32 0:3 33 34 0:4 35 36 37 38 39 2:1 0:10 40 1:2 41 42 0:000 43 0:5 1:000 5:0 44 45 2:00",
    # 4 tokens matched
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 0:0 17 18 19 20 1:0 21 22 0:1 23 24 25 2:0 26 0:00 27 28 29 30 31 32 "
    "33 34 35 36 0:2 1:1 37 38 0:000 39 40 41 4:0 2:00 3:0 42 1:00 43 44 0:0000 45 0:10 2:1 46 47 7:0 48",
    # 5 tokens matched
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 0:0 20 21 22 23 24 1:0 25 26 27 28 29 30 0:1 31 32 33 34 35 "
    "36 37 38 39 40 2:0 1:00 41 0:00 3:0 42 43 44 1:1 45 46 6:0 47 48 4:0 5:0 0:2 1:000 1:2 0:3 7:0",
    # 6 tokens matched
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 0:0 24 25 26 27 28 29 30 31 32 33 34 35 36 37 "
    "1:0 38 39 40 0:00 2:0 41 42 0:1 43 44 45 46 47 48 3:0 5:0 4:0 0:000 0:2 1:00 1:1 6:0 8:0 2:00 3:00",
    # 7 tokens matched
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 0:0 36 37 38 "
    "39 1:0 40 41 42 43 44 45 46 47 48 2:0 4:0 3:0 0:00 0:1 5:0 7:0 1:00 6:0 0:2 2:00 0:3 1:2 8:0",
    # 8 tokens matched
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 "
    "40 41 42 43 44 45 46 47 48 0:0 1:0 2:0 3:0 4:0 5:0 6:0 0:1 7:0 0:00 1:1 8:0 0:2 1:00 9:0 2:1",
)
