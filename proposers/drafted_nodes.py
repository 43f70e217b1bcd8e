"""What length policies ask of the drafted nodes: path probabilities, depths, the most probable ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel

from .base import Float32Array, Int32Array
from .length_policy_state import BoolArray, Drafted, Float64Array, Int64Array


@kernel
def _fall(probs: Float32Array, parents: Int32Array, offsets: Int32Array, out: Float64Array) -> int:
    """Returns -1, or ``2 * request + fault``: 0 where its offsets do not rise, 1 where a parent is out of place."""
    for i in range(len(offsets) - 1):
        start, end = offsets[i], offsets[i + 1]
        if start < 0 or end < start or end > len(probs):
            return 2 * i
        for j in range(start, end):
            if parents[j] < -1 or parents[j] >= j - start:
                return 2 * i + 1
            bound = 1.0 if parents[j] < 0 else out[start + parents[j]]
            prob = np.float64(probs[j])
            out[j] = min(prob, bound) if prob > 0.0 else 0.0  # a NaN is not
    return -1


def path_probs(drafted: Drafted) -> Float64Array:
    """``float64[N]`` path probabilities, made to lie in [0, 1] and never to rise along a path.

    Every rule starts with it: sorted by falling value (ties as drafted), parents come before children.

    Raises:
        ValueError: naming the request whose offsets or parents are impossible.
    """
    size, n = len(drafted.probs), len(drafted.slots)
    if (
        len(drafted.parents) != size
        or len(drafted.offsets) != n + 1
        or drafted.offsets[0]
        or drafted.offsets[n] != size
    ):
        raise ValueError(
            f"{size} probs, {len(drafted.parents)} parents, offsets {drafted.offsets!r} are no forest of {n} requests"
        )
    out = np.empty(size)
    fault = int(_fall(drafted.probs, drafted.parents, drafted.offsets, out))
    if fault >= 0:
        what = "a parent does not come before its child" if fault % 2 else f"offsets {drafted.offsets!r} must rise"
        raise ValueError(f"request {fault // 2} of {n}: {what}")
    return out


def by_prob(probs: Float64Array) -> Int64Array:
    """``int64[N]`` nodes by falling probability, ties as drafted."""
    return np.argsort(-probs, kind="stable")


def requests_of(drafted: Drafted) -> Int64Array:
    """``int64[N]`` index of each node's request."""
    return np.repeat(np.arange(len(drafted.slots)), np.diff(drafted.offsets))


@kernel
def take_most(order: Int64Array, request: Int64Array, left: Int64Array, keep: BoolArray) -> None:
    """Set ``keep`` for the nodes of ``order``, in turn, whose request has any ``left``, which count down."""
    for j in order:
        if left[request[j]] > 0:
            left[request[j]] -= 1
            keep[j] = True


def most_probable(drafted: Drafted, counts: npt.ArrayLike) -> BoolArray:
    """``bool[N]``: the ``counts`` (a number, or ``[n]``) most probable nodes of each request."""
    left = np.empty(len(drafted.slots), np.int64)
    left[:] = counts
    keep = np.zeros(len(drafted.probs), np.bool_)
    take_most(by_prob(path_probs(drafted)), requests_of(drafted), left, keep)
    return keep


@kernel
def _measure(parents: Int32Array, offsets: Int32Array, depths: Int64Array, deepest: Int64Array) -> None:
    for i in range(len(offsets) - 1):
        deepest[i] = 0
        for j in range(offsets[i], offsets[i + 1]):
            depths[j] = 1 if parents[j] < 0 else depths[offsets[i] + parents[j]] + 1
            deepest[i] = max(deepest[i], depths[j])


def node_depths(drafted: Drafted) -> tuple[Int64Array, Int64Array]:
    """``int64[N]`` depth of each node, 1 for children of the last token, and ``int64[n]`` of each request's deepest."""
    path_probs(drafted)  # compiled code does not check parents
    depths, deepest = np.empty(len(drafted.probs), np.int64), np.empty(len(drafted.slots), np.int64)
    _measure(drafted.parents, drafted.offsets, depths, deepest)
    return depths, deepest


def up_to_depth(drafted: Drafted, most: npt.NDArray[np.integer]) -> BoolArray:
    """``bool[N]``: the nodes of each request no deeper than its ``most`` (``[n]``)."""
    keep: BoolArray = node_depths(drafted)[0] <= most[requests_of(drafted)]
    return keep
