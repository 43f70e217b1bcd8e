"""Attention of draft trees over a paged KV cache: the data that describes a step's trees, and what the result is.

The rows of a tree lie one after another in the step, root first; row ``m``'s K/V lies in cache slot ``context + m``,
its rotary position is ``context + depth``. A row sees the whole context and those rows of its own tree that lie on its
path from the root. `tree_attention_reference` is the definition that the compiled kernels are tested against.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from vllm_specplug.kernels.memory import kernel

Int32Array = npt.NDArray[np.int32]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TreeBatch(NamedTuple):
    """The trees of one step, as contiguous tensors on the CPU. Trees are concatenated: R = ``sum(sizes)`` rows.

    Attributes:
        starts: ``int32[n]`` first row of each tree among the step's flattened rows.
        sizes: ``int32[n]`` rows of each tree, its root included.
        contexts: ``int32[n]`` tokens in the cache before the root.
        requests: ``int32[n]`` row of each tree in the block table.
        depths: ``int32[R]`` steps from the root.
        visible: ``uint8[R, M]`` 1 where the row may attend to the m-th row of its own tree, itself included;
            M = ``max(sizes)``.
    """

    starts: torch.Tensor
    sizes: torch.Tensor
    contexts: torch.Tensor
    requests: torch.Tensor
    depths: torch.Tensor
    visible: torch.Tensor


@kernel
def _ancestors(sizes, parents, depths, visible):  # type: ignore[no-untyped-def]
    """Fill ``depths`` and ``visible``; the first row whose parent does not come before it, or -1."""
    base = 0
    for size in sizes:
        for m in range(size):
            row = base + m
            parent = parents[row]
            if (parent != -1) if m == 0 else (parent < 0 or parent >= m):
                return row
            depths[row] = 0
            if m:
                depths[row] = depths[base + parent] + 1
                # A row sees what its parent sees and itself.
                for k in range(m):
                    visible[row, k] = visible[base + parent, k]
            visible[row, m] = 1
        base += size
    return -1


def build_trees(
    starts: Int32Array, sizes: Int32Array, contexts: Int32Array, requests: Int32Array, parents: Int32Array
) -> TreeBatch:
    """Describe the trees of a step.

    Args:
        starts, sizes, contexts, requests: ``int32[n]``, see `TreeBatch`.
        parents: ``int32[R]`` parent of each row within its tree, -1 for roots, R = ``sum(sizes)``.

    Raises:
        ValueError: an array has another dtype, length or range, or a parent does not come before its child.
    """
    named = {"starts": starts, "sizes": sizes, "contexts": contexts, "requests": requests, "parents": parents}
    for name, array in named.items():
        if array.dtype != np.int32 or array.ndim != 1:
            raise ValueError(f"{name} must be int32 with one dimension, got {array.dtype} {array.shape}")
        if name != "parents" and len(array) != len(starts):
            raise ValueError(f"{name} has {len(array)} entries for {len(starts)} trees")
        if name != "parents" and len(array) and array.min() < (1 if name == "sizes" else 0):
            raise ValueError(f"{name} must be at least {1 if name == 'sizes' else 0}, got {array.min()}")
    total = int(sizes.sum())
    if len(parents) != total:
        raise ValueError(f"parents has {len(parents)} entries for {total} rows")
    depths = np.empty(total, np.int32)
    visible = np.zeros((total, int(sizes.max(initial=0))), np.uint8)
    wrong = _ancestors(sizes, parents, depths, visible)
    if wrong >= 0:
        raise ValueError(f"row {wrong}: parent {parents[wrong]} is not an earlier row of its tree (-1 for roots only)")
    arrays = (starts, sizes, contexts, requests, depths, visible)
    return TreeBatch(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))


def check_trees(trees: TreeBatch, block_table: torch.Tensor, block_size: int, rows: int | None = None) -> None:
    """Raise ``ValueError`` if ``trees`` is malformed or reaches outside the block table or the step's ``rows``."""
    for name, tensor in trees._asdict().items():
        wanted = torch.uint8 if name == "visible" else torch.int32
        if tensor.dtype != wanted or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"trees.{name} must be contiguous {wanted} on the CPU, got {tensor.dtype} {tensor.device}")
    count, total = len(trees.starts), len(trees.depths)
    for name in ("sizes", "contexts", "requests"):
        if getattr(trees, name).shape != (count,):
            raise ValueError(f"trees.{name} has shape {tuple(getattr(trees, name).shape)} for {count} trees")
    if count == 0:
        return
    starts, sizes, contexts, requests = (t.numpy() for t in trees[:4])
    if sizes.min() < 1 or sizes.sum() != total or trees.visible.shape != (total, sizes.max()):
        raise ValueError(
            f"trees.visible has shape {tuple(trees.visible.shape)}, trees.depths {total} entries for sizes {sizes}"
        )
    if starts.min() < 0 or contexts.min() < 0:
        raise ValueError("trees.starts and trees.contexts must not be negative")
    if rows is not None and (starts + sizes).max() > rows:
        raise ValueError(f"a tree ends at row {(starts + sizes).max()} of {rows}")
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.stride(1) != 1:
        raise ValueError(f"block_table must be int32[requests, blocks], got {block_table.dtype} {block_table.shape}")
    if requests.min() < 0 or requests.max() >= len(block_table):
        raise ValueError(f"trees.requests must be below {len(block_table)}, the block table's rows, got {requests}")
    if (contexts + sizes).max() > block_table.shape[1] * block_size:
        raise ValueError(f"{(contexts + sizes).max()} tokens do not fit {block_table.shape[1]} blocks of {block_size}")


def check_tensors(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, out: torch.Tensor) -> None:
    """Raise ``ValueError`` unless these are a layer's tensors; head dimensions of the caches are the last."""
    if query.dim() != 3 or out.shape != query.shape:
        raise ValueError(f"query and out must be [tokens, heads, head_size], got {query.shape} and {out.shape}")
    if key_cache.dim() != 4 or key_cache.shape != value_cache.shape or key_cache.shape[3] != query.shape[2]:
        raise ValueError(f"caches must have four dimensions, the last {query.shape[2]}, got {tuple(key_cache.shape)}")
    if not query.dtype == out.dtype == key_cache.dtype == value_cache.dtype or query.dtype not in DTYPES:
        raise ValueError(f"query, out and caches must share one of {DTYPES}, got {query.dtype}, {key_cache.dtype}")


def tree_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    trees: TreeBatch,
    out: torch.Tensor,
    scale: float,
    window: int = -1,
) -> None:
    """Attention of the rows of ``trees``, in float32, written to ``out``; other rows of ``out`` are left as they are.

    Args:
        query, out: ``[T, heads, head_size]``; query head ``h`` uses KV head ``h * kv_heads // heads``.
        key_cache, value_cache: ``[blocks, block_size, kv_heads, head_size]``, any strides.
        block_table: ``int32[requests, max_blocks]``.
        scale: factor of the scores.
        window: a row at position p sees positions above ``p - window``; -1: all.

    Raises:
        ValueError: a shape or dtype is wrong, or a tree reaches outside ``query`` or ``block_table``.
    """
    check_tensors(query, key_cache, value_cache, out)
    block_size, kv_heads = key_cache.shape[1:3]
    heads = query.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads")
    check_trees(trees, block_table, block_size, len(query))
    base = 0
    for start, size, context, request in zip(*(t.tolist() for t in trees[:4]), strict=True):
        slots = torch.arange(context + size)
        blocks = block_table[request].long()[slots // block_size]
        keys, values = (cache[blocks, slots % block_size].float() for cache in (key_cache, value_cache))
        keys, values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (keys, values))
        depths = trees.depths[base : base + size]
        positions = torch.cat([slots[:context], context + depths])
        seen = torch.ones(size, context + size, dtype=torch.bool)
        seen[:, context:] = trees.visible[base : base + size, :size].bool()
        if window >= 0:
            seen &= positions > (context + depths)[:, None] - window
        scores = torch.einsum("rhd,khd->hrk", query[start : start + size].float(), keys) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[start : start + size] = torch.einsum("hrk,khd->rhd", weights, values).to(out.dtype)
        base += size
