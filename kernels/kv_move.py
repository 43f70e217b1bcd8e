"""Accepted rows of draft trees go to their final slots of the KV cache: which rows, how caches lie, what the result is.

The rows of a tree lie one after another in the cache, row ``m`` in slot ``context + m`` (see `tree_attention`). Of them
only the accepted path stays, and its j-th row belongs in slot ``context + j``. `kv_move_reference` is the definition
that the compiled kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def by_slot(cache: torch.Tensor, block_size: int, parts_dim: int | None = None) -> torch.Tensor:
    """A layer's KV cache as ``[blocks, block_size, parts, kv_heads, width]``, a view; a slot's data is the last three.

    Args:
        cache: one of

            - ``[blocks, 2, block_size, kv_heads, head_size]`` or ``[2, blocks, block_size, kv_heads, head_size]``: K
              and V are two parts;
            - ``[blocks, kv_heads, block_size, content]``: one part, whose content is a head's K and V (vLLM from 0.28).

            Any strides, but the last dimension is contiguous: how the dimensions lie in memory ("NHD", "HND") does not
            matter.
        block_size: slots per block.
        parts_dim: 0 or 1, where the 2 of five dimensions is; needed where both have length 2.

    Raises:
        ValueError: the shape is none of these, or the last dimension is not contiguous.
    """
    shape = list(cache.shape)
    if cache.dim() == 4 and shape[2] == block_size:
        view = cache.permute(0, 2, 1, 3).unsqueeze(2)
    elif cache.dim() == 5 and shape[2] == block_size and 2 in shape[:2]:
        if parts_dim is None:
            if shape[:2] == [2, 2]:
                raise ValueError(f"which dimension of {shape} holds K and V? Give parts_dim, 0 or 1")
            parts_dim = shape.index(2)
        if parts_dim not in (0, 1) or shape[parts_dim] != 2:
            raise ValueError(f"parts_dim must be 0 or 1 and have length 2 in {shape}, got {parts_dim}")
        view = cache.permute(1 - parts_dim, 2, parts_dim, 3, 4)
    else:
        raise ValueError(
            f"a KV cache must be [blocks, 2, {block_size}, kv_heads, head_size], [2, blocks, {block_size}, kv_heads, "
            f"head_size] or [blocks, kv_heads, {block_size}, content] for blocks of {block_size} slots, got {shape}"
        )
    if view.shape[-1] > 1 and view.stride(-1) != 1:
        raise ValueError(f"a KV cache's last dimension must be contiguous, got strides {cache.stride()} for {shape}")
    return view


def accepted_moves(paths: torch.Tensor, contexts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The moves that accepted paths ask for.

    Args:
        paths: ``int32[n, depth]`` rows of each request's accepted path from the root (0) on, -1 after the last.
        contexts: ``int32[n]`` slots of each request before the root.

    Returns:
        ``int32[n, depth]`` sources and targets, see `kv_move_reference`; -1 where a row already is where it belongs.
    """
    depths = torch.arange(paths.shape[1], dtype=torch.int32, device=paths.device)
    moved = (paths >= 0) & (paths != depths)
    sources, targets = contexts[:, None] + paths, contexts[:, None] + depths
    none = torch.full_like(paths, -1)
    return torch.where(moved, sources, none), torch.where(moved, targets, none)


def kv_move_reference(
    kv_caches: Sequence[torch.Tensor],
    block_size: int,
    block_table: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
    parts_dim: int | None = None,
) -> None:
    """Copy slots to slots in place, in each layer, one after another.

    Args:
        kv_caches: one per layer, see `by_slot`.
        block_table: ``int32[>= n, max_blocks]``; slot s of request i lies in block ``block_table[i, s // block_size]``.
        sources, targets: ``int32[n, depth]`` slots within the request; no move where either is negative. Both rise
            along a request's moves, and no target is above its source. So a slot is read before a later move
            overwrites it, and what was written is not read again: moves may overlap.

    Raises:
        ValueError: a cache has another shape, or moves do not rise or go up.
    """
    views = [by_slot(cache, block_size, parts_dim) for cache in kv_caches]
    for request, (row, goals) in enumerate(zip(sources.tolist(), targets.tolist(), strict=True)):
        last = (-1, -1)
        blocks = block_table[request].tolist()
        for source, target in zip(row, goals, strict=True):
            if source < 0 or target < 0:
                continue
            if target > source or source <= last[0] or target <= last[1]:
                raise ValueError(f"request {request}: after slot {last[0]} to {last[1]}, {source} to {target}")
            last = (source, target)
            for view in views:
                view[blocks[target // block_size], target % block_size] = view[
                    blocks[source // block_size], source % block_size
                ].clone()
