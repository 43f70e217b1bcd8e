"""The CPU's KV cache: the probe that finds its layout, and moves of accepted rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cache_layouts import offsets_of, writer
from vllm_specplug.kernels.kv_cache_cpu import CacheLayout, UnknownLayout, move_rows, prepare_caches, probe_layout
from vllm_specplug.kernels.tree_attention import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["vec", "rows", "pairs", "shuffled"])
@pytest.mark.parametrize(("block_size", "head_size"), [(16, 32), (128, 64)])
def test_probe_finds_permutations(dtype, name, block_size, head_size):
    keys, values = offsets_of(name, block_size, head_size)
    layout = probe_layout(writer(keys, values), dtype, block_size, head_size)
    assert np.array_equal(layout.keys, keys) and np.array_equal(layout.values, values)
    assert (layout.block_size, layout.head_size, layout.dtype) == (block_size, head_size, dtype)
    assert layout.in_place == (name == "vec")


def _scaled(key, value, key_cache, value_cache, slots):
    writer(*offsets_of("vec", 32, 32))(key * 0.25, value, key_cache, value_cache, slots)


def _half_written(key, value, key_cache, value_cache, slots):
    writer(*offsets_of("vec", 32, 32))(key[::2], value[::2], key_cache, value_cache, slots[::2])


def _elsewhere(key, value, key_cache, value_cache, slots):
    writer(*offsets_of("vec", 32, 32))(key, value, key_cache, value_cache, slots % 64)


def _swapped(key, value, key_cache, value_cache, slots):
    writer(*offsets_of("vec", 32, 32))(value, key, key_cache, value_cache, slots)


def _by_head(key, value, key_cache, value_cache, slots):
    for head, name in enumerate(("vec", "rows")):
        one = slice(head, head + 1)
        args = (key[:, one], value[:, one], key_cache[:, one], value_cache[:, one], slots)
        writer(*offsets_of(name, 32, 32))(*args)


def _crossed_heads(key, value, key_cache, value_cache, slots):
    writer(*offsets_of("vec", 32, 32))(key.flip(1), value, key_cache, value_cache, slots)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda *args: None, "key cache holds numbers that were not written"),
        (_scaled, "key cache holds numbers that were not written"),
        (_half_written, "key cache holds numbers that were not written"),
        (_elsewhere, "a write to one block of the cache changed another"),
        (_swapped, "key cache does not hold each number"),
        (_crossed_heads, "key cache does not hold each number"),
        (_by_head, "key cache is arranged differently"),
    ],
)
def test_probe_refuses_what_is_no_permutation(write, message):
    with pytest.raises(UnknownLayout, match=message):
        probe_layout(write, torch.bfloat16, 32, 32)


def test_probe_refuses_types_and_sizes_without_kernel():
    with pytest.raises(UnknownLayout, match="no kernel for a cache of"):
        probe_layout(lambda *args: None, torch.float64, 32, 32)
    with pytest.raises(UnknownLayout, match="head size 40: not a multiple of 16"):
        probe_layout(writer(*offsets_of("vec", 32, 40)), torch.float32, 32, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["vec", "rows", "shuffled"])
def test_moves(dtype, name):
    """In order, across blocks, from later and from earlier slots, in all layers; everything else stays."""
    block_size, head_size, blocks, heads = 16, 32, 4, 3
    offsets = offsets_of(name, block_size, head_size)
    layout = CacheLayout(dtype, *offsets)
    plain = torch.randn(2, 2, blocks * block_size, heads, head_size, generator=torch.Generator().manual_seed(0))
    plain = plain.to(dtype)  # [layer, key or value, slot, head, dimension]
    caches = []
    for layer in plain:
        cache = torch.zeros(blocks, heads, 2 * block_size, head_size, dtype=dtype)
        pair = cache.chunk(2, dim=2)
        writer(*offsets)(*layer, *pair, torch.arange(blocks * block_size))
        caches.append((cache, pair))
    # The path 0, 3, 4, 9 of a tree whose rows begin at slot 14, over a block boundary; then a lone copy backwards.
    sources, targets = np.array([17, 18, 23, 2, 23]), np.array([15, 16, 17, 63, 0])
    move_rows(prepare_caches([pair for _, pair in caches], layout), sources, targets)
    for source, target in zip(sources, targets, strict=True):
        plain[:, :, target] = plain[:, :, source]
    for layer, (cache, _) in zip(plain, caches, strict=True):
        wanted = torch.zeros_like(cache)
        writer(*offsets)(*layer, *wanted.chunk(2, dim=2), torch.arange(blocks * block_size))
        assert torch.equal(cache, wanted)


def test_moves_of_none():
    none = np.zeros(0, np.int64)
    layout = CacheLayout(torch.float32, *offsets_of("vec", 16, 32))
    cache = torch.randn(2, 1, 32, 32)
    before = cache.clone()
    move_rows(prepare_caches([cache.chunk(2, dim=2)], layout), none, none)
    assert torch.equal(cache, before)
    move_rows(prepare_caches([], layout), np.array([1]), np.array([0]))  # a model without such layers
    assert torch.equal(cache, before)


def test_caches_that_do_not_fit_the_layout_are_refused():
    layout = CacheLayout(torch.float32, *offsets_of("vec", 16, 32))
    good = torch.zeros(2, 1, 16, 32)
    for bad, message in (
        (good.half(), "layer 0: torch.float16"),
        (good[:, :, :8], "layer 0: torch.float32"),
        (torch.zeros(2, 1, 32, 16).transpose(2, 3), "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_caches([(good, bad)], layout)
