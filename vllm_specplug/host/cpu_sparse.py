"""What part of their contexts a step's trees attend in vLLM's CPU attention; see :mod:`.sparse_attention`.

The work is in :mod:`vllm_specplug.kernels.sparse_attention_cpu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_specplug.host.sparse_attention import GroupSparse, SparseAttention
from vllm_specplug.host.tree_plan import StepPlan
from vllm_specplug.kernels.kv_cache_cpu import Caches
from vllm_specplug.kernels.sparse_attention_cpu import Choice, UnitSummaries, prepare_choice
from vllm_specplug.kernels.tree_attention_cpu import PreparedStep


class CpuGroup(GroupSparse[UnitSummaries]):
    """The layers of one KV cache group."""

    def prepare(self, plan: StepPlan, step: PreparedStep, table: torch.Tensor) -> Choice | None:
        """What the trees of the plan attend in these layers; None: everything. ``table``: ``int32[B, blocks]``."""
        if plan.sparse is None or not plan.sparse.any():
            return None
        blocks = table.numpy()
        entries, shares = [], []
        for i, (row, sparse) in enumerate(zip(plan.trees.requests.tolist(), plan.sparse.tolist(), strict=True)):
            context = int(plan.trees.contexts[i])
            shares.append(self.shares(context))
            entries.append(self.sums.update(self.owner.ids[row], blocks[row], context) if sparse else None)
        choice = prepare_choice(step, self.sums.selection, entries, shares)
        self.owner.count(plan, choice.attended())
        return choice


def add_group(sparse: SparseAttention, impls: Mapping[str, Any], caches: Caches) -> CpuGroup | None:
    """See :meth:`SparseAttention.add_group`; ``caches`` are those of the same layers."""
    kv_heads = int(caches.layers[0, 6])
    return sparse.add_group(impls, kv_heads, CpuGroup, lambda selection: UnitSummaries(caches, selection))
