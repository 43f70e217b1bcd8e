"""Layouts of a CPU KV cache, as vLLM's cache writers for different processors might have them."""

from __future__ import annotations

import numpy as np
import torch


def offsets_of(name: str, block_size: int, head_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(keys, values) offsets ``[block_size, head_size]`` of a layout by its name."""
    size = block_size * head_size
    rows = np.arange(size, dtype=np.int32).reshape(block_size, head_size)
    turned = np.arange(size, dtype=np.int32).reshape(head_size, block_size).T
    if name == "vec":
        return turned, rows
    if name == "rows":
        return rows, rows
    if name == "pairs":  # as matrix units want them: two dimensions of a key, two keys of a value side by side
        slot, dim = np.indices((block_size, head_size), dtype=np.int32)
        keys = slot // 16 * 16 * head_size + dim // 2 * 32 + slot % 16 * 2 + dim % 2
        return keys, slot // 2 * 2 * head_size + dim * 2 + slot % 2
    rng = np.random.default_rng(0)
    keys, values = (rng.permutation(size).astype(np.int32).reshape(block_size, head_size) for _ in range(2))
    return keys, values


def writer(keys: np.ndarray, values: np.ndarray):
    """What vLLM's cache writer would be for a layout."""

    def write(key, value, key_cache, value_cache, slot_mapping):
        block_size, head_size = keys.shape
        for cache, new, offsets in ((key_cache, key, keys), (value_cache, value, values)):
            blocks, heads = cache.shape[:2]
            flat = cache.as_strided((blocks, heads, block_size * head_size), (*cache.stride()[:2], 1))
            block, slot = slot_mapping // block_size, slot_mapping.numpy() % block_size
            at = torch.from_numpy(offsets[slot].astype(np.int64))[:, None, :]
            flat[block[:, None, None], torch.arange(heads)[None, :, None], at] = new

    return write
