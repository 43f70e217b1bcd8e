"""What part of their contexts a step's requests attend in vLLM's GPU attention; see :mod:`.sparse_attention`.

Summaries lie beside the blocks of the KV cache, in its dtype, so requests that share a block share them. Before a
forward pass the host says per request which units are new, how many each layer's heads attend and where the tail
begins: one copy to the device. New units are summarised then, in all layers; each layer that ranks chooses from its own
query, on the device, and others take over what the last one chose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from vllm_specplug.host.sparse_attention import GroupSparse, SparseAttention
from vllm_specplug.host.tree_plan import StepPlan
from vllm_specplug.kernels.attention_triton import AttentionPlan
from vllm_specplug.kernels.block_select import Selection, attended_share, attended_units
from vllm_specplug.kernels.block_select_triton import MOST_UNITS, Workspace, block_select, block_summary
from vllm_specplug.kernels.sparse_attention_triton import sparse_attention
from vllm_specplug.kernels.unit_book import UnitBook

# Numbers of a step are aligned to so many, which is 16 bytes: kernels are compiled anew for other alignments.
_ALIGN = 4


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that is not taken; None on other devices."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


class GpuSums:
    """Summaries of the units of a group's layers.

    Attributes:
        selection: how units are chosen.
        book: which units of which request there are.
        keys: per layer ``[blocks, block_size, kv_heads, head_size]``, its key cache; all alike, as for `KVMover`.
        layers: per layer ``[blocks, units_per_block, kv_heads, parts, head_size]`` in the cache's dtype.
        chosen: ``int32[requests, kv_heads, most]`` what the last layer that ranked chose.
        workspace: of the choice.
    """

    def __init__(self, keys: list[torch.Tensor], selection: Selection, requests: int, heads: int, longest: int) -> None:
        """
        Args:
            requests: most of a step.
            heads: query heads of each layer.
            longest: most tokens of a request.

        Raises:
            ValueError: units do not fit the blocks, a context has too many, or there is not enough memory.
        """
        blocks, block_size, kv_heads, head_size = keys[0].shape
        self.book = UnitBook(selection.unit, block_size)
        self.selection = selection
        self.keys = keys
        device, dtype = keys[0].device, keys[0].dtype
        most = -(-longest // selection.unit)
        if most > MOST_UNITS:
            raise ValueError(
                f"a context of {longest} tokens has more than {MOST_UNITS} units of {selection.unit} tokens: set a "
                "larger unit"
            )
        parts = 1 if selection.summary == "mean" else 2
        shape = (blocks, block_size // selection.unit, kv_heads, parts, head_size)
        wanted = len(keys) * int(np.prod(shape)) * dtype.itemsize
        free = free_bytes(device)
        # CUDA graphs are recorded later and take from the same memory.
        if free is not None and 2 * wanted > free:
            raise ValueError(
                f"summaries of the KV cache take {wanted >> 20} MiB and {free >> 20} MiB of the GPU are free, of which "
                "half is left alone: lower --gpu-memory-utilization"
            )
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in keys]
        self.workspace = Workspace(requests, heads, kv_heads, head_size, most, device)
        self.chosen = torch.empty(requests, kv_heads, most, dtype=torch.int32, device=device)

    @property
    def bytes(self) -> int:
        """Memory of all summaries, and of the choice."""
        work = self.workspace
        tensors = [*self.layers, self.chosen, work.scores, work.maxima, work.sums, work.votes, work.means]
        return sum(t.numel() * t.element_size() for t in tensors)

    def drop(self, requests: Iterable[str]) -> None:
        """Forget requests that ended or were preempted; unknown ones are ignored."""
        self.book.drop(requests)

    def rewind(self, request: str, tokens: int) -> None:
        """The cache holds something else from token ``tokens`` of a request on: a rollback, or an exact refresh."""
        self.book.rewind(request, tokens)

    def summarise(self, table: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, most: int) -> None:
        """Summarise units ``begins`` to ``ends`` (``int32[n]``) of each request in all layers; ``table``: ``int32[n,
        blocks]``; ``most``: of one request."""
        for keys, summaries in zip(self.keys, self.layers, strict=True):
            block_summary(keys, summaries, table, begins, ends, self.selection.summary, most)


class DeviceChoice:
    """What the requests of one step attend, layer by layer.

    Attributes:
        units, tails: ``int32[n]`` units before the tail, and the tail's first slot; 0 for who attends everything.
        counts: ``int32[L, n, kv_heads]`` units to choose; -1: everything is attended.
        dense: ``bool[L]`` layers that attend everything for all requests.
    """

    def __init__(
        self,
        sums: GpuSums,
        starts: torch.Tensor,
        table: torch.Tensor,
        units: torch.Tensor,
        tails: torch.Tensor,
        counts: torch.Tensor,
        dense: np.ndarray,
    ) -> None:
        """
        Args:
            starts: ``int32[n + 1]`` first row of each request, and the end.
            table: ``int32[n, blocks]``.
        """
        self.units, self.tails, self.counts, self.dense = units, tails, counts, dense
        self._sums, self._starts, self._table = sums, starts, table
        self._last: int | None = None

    def layer(
        self, index: int, anchor: bool, query: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """What layer ``index`` attends, for `sparse_attention`: ``chosen``, ``counts`` and ``tails``; None: everything.

        Args:
            anchor: whether the layer ranks the units; others take over what the last one that did chose.
            query: ``[rows, heads, head_size]`` of the step.
            scale: of the scores.
        """
        if self.dense[index]:
            return None
        chosen = self._sums.chosen[: len(self.units)]
        if anchor:
            selection = self._sums.selection
            block_select(
                query,
                self._starts,
                self._sums.layers[index],
                self._table,
                self.units,
                self.counts[index, : len(self.units)],
                chosen,
                self._sums.workspace,
                scale,
                -(-selection.first // selection.unit),
                selection.by_head,
                selection.all_rows,
            )
            self._last = index
        if self._last is None:
            return None
        return chosen, self.counts[self._last, : len(self.units)], self.tails

    def attend(
        self,
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
        query: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        lengths: torch.Tensor,
        bits: torch.Tensor,
        out: torch.Tensor,
        scale: float,
    ) -> None:
        """Attend what :meth:`layer` found; see `sparse_attention`."""
        unit = self._sums.selection.unit
        sparse_attention(plan, query, *caches, self._table, self._starts, lengths, bits, out, scale, unit, *found)


class GpuGroup(GroupSparse[GpuSums]):
    """The layers of one KV cache group."""

    def prepare(
        self, plan: StepPlan, blocks: np.ndarray, starts: torch.Tensor, table: torch.Tensor
    ) -> DeviceChoice | None:
        """What the requests of a step attend in these layers; None: everything.

        Args:
            blocks: ``int32[n or more, blocks]`` the block table on the host.
            starts: ``int32[n + 1]`` first row of each request.
            table: ``int32[n, blocks]`` the block table.
        """
        if plan.sparse is None or not plan.sparse.any():
            return None
        n, selection = len(table), self.sums.selection
        block_size = self.sums.keys[0].shape[1]
        wide = -(-n // _ALIGN) * _ALIGN
        layers, kv_heads = self._even.shape
        numbers = np.zeros(wide * (4 + layers * kv_heads), np.int32)
        units, tails, begins, ends = numbers[: 4 * wide].reshape(4, wide)
        counts = numbers[4 * wide :].reshape(layers, wide, kv_heads)
        counts[:] = -1
        for i in np.flatnonzero(plan.sparse).tolist():
            row, context = int(plan.trees.requests[i]), int(plan.trees.contexts[i])
            tails[row] = selection.tail_block(context, block_size) * block_size
            units[row] = tails[row] // selection.unit
            begins[row], ends[row] = self.sums.book.update(self.owner.ids[row], blocks[row], selection, context)
            counts[:, row] = selection.counts(context, block_size, self.shares(context))
        dense = (attended_units(counts, units) == units[:, None]).all((1, 2))
        self.owner.count(plan, attended_share(counts, units))
        device = torch.from_numpy(numbers).to(table.device, non_blocking=True)
        on = device[: 4 * wide].reshape(4, wide)[:, :n]
        most = int((ends - begins).max())
        if most:
            self.sums.summarise(table, on[2], on[3], most)
        every = device[4 * wide :].reshape(layers, wide, kv_heads)
        return DeviceChoice(self.sums, starts, table, on[0], on[1], every, dense)

    def warm_up(self, plans: Iterable[AttentionPlan], bits: torch.Tensor, scale: float) -> None:
        """Compile before the first request: one row of an empty cache, which no kernel looks at.

        Args:
            plans: of the layers' attention.
            bits: ``int32[1, words]`` of the row.
            scale: of the layers.
        """
        sums = self.sums
        keys = sums.keys[0]
        on: dict[str, Any] = {"device": keys.device, "dtype": torch.int32}
        heads, head_size = sums.workspace.means.shape[1:]
        query = torch.zeros(1, heads, head_size, device=keys.device, dtype=keys.dtype)
        table, starts, none = torch.zeros(1, 1, **on), torch.arange(2, **on), torch.zeros(1, **on)
        counts = torch.full((1, 1, keys.shape[2]), -1, **on)
        sums.summarise(table, none, none, 1)
        choice = DeviceChoice(sums, starts, table, none, none, counts, np.zeros(1, np.bool_))
        found = choice.layer(0, True, query, scale)
        assert found is not None
        for plan in plans:
            # Its value is nobody's: both caches are the keys.
            choice.attend(found, plan, query, (keys, keys), none + 1, bits, torch.empty_like(query), scale)


def add_group(
    sparse: SparseAttention, impls: Mapping[str, Any], keys: list[torch.Tensor], requests: int, longest: int
) -> GpuGroup | None:
    """See :meth:`SparseAttention.add_group`.

    Args:
        keys: per layer ``[blocks, block_size, kv_heads, head_size]``.
        requests, longest: most requests of a step, most tokens of one.
    """
    heads = {impl.num_heads for impl in impls.values()}

    def make(selection: Selection) -> GpuSums:
        if len(heads) != 1:
            raise ValueError("the layers have different numbers of heads")
        return GpuSums(keys, selection, requests, heads.pop(), longest)

    return sparse.add_group(impls, keys[0].shape[2], GpuGroup, make)
