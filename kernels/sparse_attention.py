"""Attention of draft trees over chosen units of their contexts: what the result is.

`sparse_attention_reference` is the definition that the compiled kernels are tested against; `block_select` says how the
units are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm_specplug.kernels.block_select import Int32Array
from vllm_specplug.kernels.tree_attention import TreeBatch, check_tensors, check_trees

#: Per tree: the first slot of the tail, and per KV head the units before it that are attended; None: everything is.
Chosen = tuple[int, Sequence[Int32Array]] | None


def sparse_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    trees: TreeBatch,
    out: torch.Tensor,
    scale: float,
    unit: int,
    chosen: Sequence[Chosen],
) -> None:
    """`tree_attention_reference` without the slots of the context that were not chosen, in float32.

    Args:
        query, out, key_cache, value_cache, block_table, trees, scale: see `tree_attention_reference`.
        unit: slots per unit.
        chosen: one per tree.

    Raises:
        ValueError: a shape or dtype is wrong, or a tree reaches outside ``query`` or ``block_table``.
    """
    check_tensors(query, key_cache, value_cache, out)
    block_size, kv_heads = key_cache.shape[1:3]
    group = query.shape[1] // kv_heads
    check_trees(trees, block_table, block_size, len(query))
    base = 0
    places = zip(*(t.tolist() for t in trees[:4]), chosen, strict=True)
    for start, size, context, request, choice in places:
        slots = torch.arange(context + size)
        blocks = block_table[request].long()[slots // block_size]
        keys, values = (cache[blocks, slots % block_size].float() for cache in (key_cache, value_cache))
        seen = torch.ones(kv_heads, size, context + size, dtype=torch.bool)
        seen[:, :, context:] = trees.visible[base : base + size, :size].bool()
        if choice is not None:
            tail, units = choice
            for head in range(kv_heads):
                kept = torch.isin(slots[:tail] // unit, torch.from_numpy(units[head]))
                seen[head, :, :tail] &= kept
        for head in range(kv_heads):
            rows = query[start : start + size, head * group : (head + 1) * group].float()
            scores = torch.einsum("rgd,kd->rgk", rows, keys[:, head]) * scale
            weights = scores.masked_fill(~seen[head][:, None], float("-inf")).softmax(-1)
            # What was never written may be NaN, also where its weight is 0.
            there = values[:, head].nan_to_num()
            result = torch.einsum("rgk,kd->rgd", weights, there)
            out[start : start + size, head * group : (head + 1) * group] = result.to(out.dtype)
        base += size
