"""Counts drafted, verified and accepted tokens by source and depth, in total and per request. Imports no vLLM.

What a forest's nodes are is noted when it is handed out, for the engine brings back only how many of them it verified
and which were accepted.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from vllm_specplug.host.metrics import RequestStats, Snapshot
from vllm_specplug.kernels.memory import kernel
from vllm_specplug.proposers.base import SOURCE_NAMES, DraftForest, Int8Array, Int32Array

Int64Array = npt.NDArray[np.int64]

#: Names of the sources counted apart; a number that :data:`SOURCE_NAMES` does not have counts as the last.
SOURCES = (*SOURCE_NAMES, "other")
#: Depths counted apart, 1 being a child of the request's last token; the last takes in all deeper ones.
DEPTHS = 16
#: Rows of the counts.
DRAFTED, VERIFIED, ACCEPTED = range(3)
#: Most nodes of a request, vLLM's own limit of draft tokens.
MAX_NODES = 128
#: Ended requests that are remembered.
KEPT_REQUESTS = 64


@kernel
def _note(
    slots: Int32Array,
    offsets: Int32Array,
    parents: Int32Array,
    sources: Int8Array,
    nodes: Int32Array,
    node_source: Int8Array,
    node_depth: Int8Array,
    total: Int64Array,
    request: Int64Array,
) -> None:
    for i in range(len(slots)):
        slot, start = slots[i], offsets[i]
        size = min(offsets[i + 1] - start, MAX_NODES)
        nodes[slot] = size
        for j in range(size):
            parent, source = parents[start + j], sources[start + j]
            depth = min(node_depth[slot, parent] + 1, DEPTHS - 1) if parent >= 0 else 0
            if source < 0 or source >= len(SOURCES):
                source = len(SOURCES) - 1
            node_source[slot, j], node_depth[slot, j] = source, depth
            total[DRAFTED, source, depth] += 1
            request[slot, DRAFTED, depth] += 1


@kernel
def _verified(
    slots: Int32Array,
    drafted: Int32Array,
    emitted: Int32Array,
    path: Int32Array,
    offsets: Int32Array,
    nodes: Int32Array,
    node_source: Int8Array,
    node_depth: Int8Array,
    total: Int64Array,
    request: Int64Array,
    done: Int64Array,
) -> None:
    chains = len(offsets) == 0
    for i in range(len(slots)):
        slot = slots[i]
        size = min(drafted[i], nodes[slot])
        nodes[slot] = 0
        for j in range(size):
            source, depth = node_source[slot, j], node_depth[slot, j]
            total[VERIFIED, source, depth] += 1
            request[slot, VERIFIED, depth] += 1
        first = 0 if chains else offsets[i]
        count = emitted[i] - 1 if chains else offsets[i + 1] - first
        for k in range(count):
            node = k if chains else path[first + k]
            if 0 <= node < size:
                source, depth = node_source[slot, node], node_depth[slot, node]
                total[ACCEPTED, source, depth] += 1
                request[slot, ACCEPTED, depth] += 1
        done[slot, 0] += 1
        done[slot, 1] += emitted[i]


_NO_PATH = np.zeros(0, np.int32)


def accepted_nodes(paths: Int32Array, lengths: Int32Array) -> tuple[Int32Array, Int32Array]:
    """Accepted nodes as :meth:`DraftCounts.verified` takes them.

    Args:
        paths: ``int32[n, W]`` the row that emitted the k-th token, see :class:`.verification.Verified`: row 0 is the
            request's last token, row ``j + 1`` its node ``j``.
        lengths: ``int32[n]`` tokens emitted, at least 1.

    Returns:
        ``int32[A]`` nodes of all requests, and ``int32[n + 1]`` where each request's begin.
    """
    width = paths.shape[1]
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths - 1, out=offsets[1:])
    taken = np.arange(1, width) < lengths[:, None]
    return np.ascontiguousarray(paths[:, 1:][taken] - 1, np.int32), offsets


class DraftCounts:
    """Counts of one proposer.

    Attributes:
        total: ``int64[3, len(SOURCES), DEPTHS]`` nodes drafted, verified and accepted, by source and depth.
    """

    def __init__(self, proposer: str) -> None:
        """``proposer``: its name, for the requests' statistics."""
        self.proposer = proposer
        self.total = np.zeros((3, len(SOURCES), DEPTHS), np.int64)
        self._nodes = np.zeros(0, np.int32)  # the slot's noted draft, not yet verified
        self._source = np.zeros((0, MAX_NODES), np.int8)
        self._depth = np.zeros((0, MAX_NODES), np.int8)
        self._request = np.zeros((0, 3, DEPTHS), np.int64)
        self._done = np.zeros((0, 2), np.int64)  # steps, tokens emitted
        self._ended: collections.deque[RequestStats] = collections.deque(maxlen=KEPT_REQUESTS)

    def note(self, slots: Int32Array, forest: DraftForest) -> None:
        """Count drafts that the engine is given; an earlier one of the same slot that never was verified is forgotten.

        Args:
            slots: ``int32[n]``, distinct.
            forest: its drafts for them, in this order, of at most :data:`MAX_NODES` nodes each.

        Raises:
            ValueError: the forest's arrays do not fit ``slots`` or each other.
        """
        parents = np.ascontiguousarray(forest.parents, np.int32)
        sources = np.ascontiguousarray(forest.sources, np.int8)
        offsets = np.ascontiguousarray(forest.offsets, np.int32)
        if len(offsets) != len(slots) + 1 or not offsets[-1] == len(parents) == len(sources):
            raise ValueError(
                f"a forest of {len(offsets) - 1} requests, {len(parents)} parents, {len(sources)} sources and offsets "
                f"to {offsets[-1] if len(offsets) else None} does not fit {len(slots)} slots"
            )
        self._reach(slots)
        _note(slots, offsets, parents, sources, self._nodes, self._source, self._depth, self.total, self._request)

    def verified(
        self,
        slots: Int32Array,
        drafted: Int32Array,
        emitted: Int32Array,
        path_nodes: tuple[Int32Array, Int32Array] | None = None,
    ) -> None:
        """Count what became of the drafts noted, in the requests of one step.

        Args:
            slots: ``int32[n]``, distinct.
            drafted: ``int32[n]`` leading nodes of each draft that were verified; the engine may have cut it.
            emitted: ``int32[n]`` tokens emitted, at least 1.
            path_nodes: accepted nodes, ``int32[A]`` and offsets ``int32[n + 1]``, see :func:`accepted_nodes`. None if
                all drafts are chains: then nodes ``0`` to ``emitted - 2`` were.
        """
        self._reach(slots)
        path, offsets = path_nodes if path_nodes is not None else (_NO_PATH, _NO_PATH)
        _verified(
            slots,
            drafted,
            emitted,
            path,
            offsets,
            self._nodes,
            self._source,
            self._depth,
            self.total,
            self._request,
            self._done,
        )

    def slept(self, slots: Int32Array, emitted: Int32Array) -> None:
        """Count steps without drafts that emitted one token each: ``emitted`` (``int32[n]``) of each request."""
        self._reach(slots)
        self._done[slots] += emitted[:, None]

    def finish(self, slot: int, request_id: str) -> None:
        """The request of ``slot`` ended; the slot may be another's from now on."""
        if slot >= len(self._nodes):
            return
        self._ended.append(self._stats(slot, request_id, live=False))
        self._nodes[slot] = 0
        self._request[slot] = self._done[slot] = 0

    def snapshot(self, totals: Mapping[str, float], live: Mapping[str, int]) -> Snapshot:
        """A copy of everything: ``totals`` as given, the last ended requests and those ``live``, request id to slot."""
        running = [self._stats(slot, request_id, True) for request_id, slot in live.items() if slot < len(self._nodes)]
        return Snapshot(dict(totals), SOURCES, self.total.copy(), [*self._ended, *running])

    def warm_up(self) -> None:
        """Compile, without counting anything."""
        trial, slots = DraftCounts(""), np.zeros(1, np.int32)
        one = np.ones(1, np.int32)
        trial.note(slots, DraftForest(one, one - 2, np.ones(1, np.float32), np.zeros(1, np.int8), np.arange(2)))  # type: ignore[arg-type]
        trial.verified(slots, one, one + 1)

    def _stats(self, slot: int, request_id: str, live: bool) -> RequestStats:
        counts = self._request[slot]
        drafted, verified, accepted = counts.sum(axis=1).tolist()
        steps, emitted = self._done[slot].tolist()
        deepest = int(np.count_nonzero(counts[DRAFTED]))  # no depth without the one before it
        by_depth = counts[:, :deepest].tolist()
        return RequestStats(request_id, self.proposer, live, steps, emitted, drafted, verified, accepted, by_depth)

    def _reach(self, slots: Int32Array) -> None:
        """Make room for these slots."""
        have = len(self._nodes)
        need = int(slots.max()) + 1 if len(slots) else 0
        if need <= have:
            return
        more = max(need, 2 * have, 64) - have
        for name in ("_nodes", "_source", "_depth", "_request", "_done"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros((more, *old.shape[1:]), old.dtype)]))
