"""The KV cache as vLLM's CPU backend lays it out: where the elements are, found by writing to one, and moves of slots.

A block of one KV head is contiguous, `block_size` times `head_size` elements for keys and as many for values. How they
are arranged within depends on the processor and the element type; vLLM's cache writer is the only one to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm_specplug.kernels import lanes
from vllm_specplug.kernels.lanes import LANES
from vllm_specplug.kernels.memory import kernel
from vllm_specplug.kernels.tree_attention import DTYPES

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Cache = torch.Tensor


class UnknownLayout(ValueError):
    """The KV cache is not arranged in a way that the kernels can read."""


@dataclass(frozen=True, slots=True, eq=False)
class CacheLayout:
    """Where the CPU cache keeps the elements of one (block, KV head).

    Attributes:
        dtype: element type.
        keys, values: ``int32[block_size, head_size]`` element offset of (slot in block, dimension) from where the
            (block, KV head) begins in the key cache and the value cache; each a permutation.
        in_place: whether the attention kernel reads the cache as it is, without gathering.
        words: what the kernel is told of the layout: head size, block size, bytes per element; whether keys and values
            are read in place; addresses of the two gather tables (``int32``), their runs (see `lanes.row_gather`) and
            bytes from one dimension of gathered keys to the next.
    """

    dtype: torch.dtype
    keys: Int32Array
    values: Int32Array
    in_place: bool = field(init=False)
    words: tuple[int, ...] = field(init=False)
    _tables: tuple[Int32Array, Int32Array] = field(init=False)

    def __post_init__(self) -> None:
        """Derive what the kernels want to know.

        Raises:
            UnknownLayout: dtype or head size have no kernel, or the offsets are no permutation.
        """
        block_size, head_size = self.keys.shape
        if self.dtype not in DTYPES:
            raise UnknownLayout(f"no kernel for a cache of {self.dtype}")
        if head_size % 16:
            raise UnknownLayout(f"no kernel for head size {head_size}: not a multiple of 16")
        identity = np.arange(self.keys.size)
        for offsets in (self.keys, self.values):
            if offsets.shape != (block_size, head_size) or not np.array_equal(np.sort(offsets, axis=None), identity):
                raise UnknownLayout(f"offsets must be a permutation of {block_size} slots of {head_size} elements")
        # The gathered keys are transposed, [head_size, stride]; lanes beyond the block repeat its last key.
        stride = -(-block_size // LANES) * LANES
        gathered = self.keys.T[:, np.minimum(np.arange(stride), block_size - 1)]
        tables = tuple(np.ascontiguousarray(t, dtype=np.int32) for t in (gathered, self.values))
        whole = block_size % LANES == 0
        in_place = (whole and _in_order(self.keys.T), _in_order(self.values))
        size = self.dtype.itemsize
        addresses = (t.ctypes.data for t in tables)
        words = (head_size, block_size, size, *in_place, *addresses, *(_run(t) for t in tables), stride * size)
        object.__setattr__(self, "_tables", tables)
        object.__setattr__(self, "in_place", all(in_place))
        object.__setattr__(self, "words", tuple(map(int, words)))

    @property
    def block_size(self) -> int:
        return self.keys.shape[0]

    @property
    def head_size(self) -> int:
        return self.keys.shape[1]


def _in_order(offsets: Int32Array) -> bool:
    return bool(np.array_equal(offsets.ravel(), np.arange(offsets.size)))


def _run(table: Int32Array) -> int:
    """Distance of a vector's elements in the cache if it is 1 or 2 for all vectors of a gather table, else 0."""
    steps = np.diff(table.reshape(-1, LANES), axis=1)
    return int(steps[0, 0]) if steps[0, 0] in (1, 2) and np.all(steps == steps[0, 0]) else 0


def probe_layout(
    write: Callable[[Cache, Cache, Cache, Cache, torch.Tensor], None],
    dtype: torch.dtype,
    block_size: int,
    head_size: int,
) -> CacheLayout:
    """Find the layout by writing known numbers to a small cache.

    Args:
        write: ``write(key, value, key_cache, value_cache, slot_mapping)``, vLLM's own writer; key and value are
            ``[tokens, kv_heads, head_size]``, the caches ``[blocks, kv_heads, block_size, head_size]`` views of one
            tensor as the CPU backend makes them, slot_mapping ``int64[tokens]``.

    Raises:
        UnknownLayout: the numbers are not found again as a permutation, the same for all blocks and heads.
    """
    if dtype not in DTYPES:
        raise UnknownLayout(f"no kernel for a cache of {dtype}")
    blocks, heads, base = 3, 2, 128  # integers below 128 are exact in all dtypes
    size = block_size * head_size
    codes = torch.arange(2 * heads * size).reshape(2, block_size, heads, head_size)
    found = torch.zeros(2, blocks, heads, size, dtype=torch.int64)
    # Neither the order of the writes nor how many go together may matter.
    order = torch.from_numpy(np.random.default_rng(0).permutation(block_size))
    for digit in range(math.ceil(math.log(codes.numel(), base))):
        numbers = (codes // base**digit % base).to(dtype)
        cache = torch.full((blocks, heads, block_size * 2, head_size), -1.0, dtype=dtype)
        key_cache, value_cache = cache.chunk(2, dim=2)
        for block in (2, 1):
            for slots in (order[:1], order[1:]):
                key, value = (numbers[i, slots].contiguous() for i in (0, 1))
                write(key, value, key_cache, value_cache, block * block_size + slots)
        if not bool((cache[0] == -1).all()):
            raise UnknownLayout("a write to one block of the cache changed another")
        for i, part in enumerate((key_cache, value_cache)):
            read = part.reshape(blocks, heads, size).double()
            if not bool(((read[1:] >= 0) & (read[1:] < base) & (read[1:] == read[1:].round())).all()):
                raise UnknownLayout(f"the {('key', 'value')[i]} cache holds numbers that were not written")
            found[i] += read.long() * base**digit
    tables = []
    for i, name in enumerate(("key", "value")):
        for block in range(1, blocks):
            for head in range(heads):
                wanted = codes[i, :, head].flatten()
                numbers, places = found[i, block, head].sort()
                if not torch.equal(numbers, wanted.sort().values):
                    raise UnknownLayout(f"the {name} cache does not hold each number written to a block and head once")
                offsets = torch.empty(size, dtype=torch.int64)
                offsets[wanted.argsort()] = places
                tables.append(offsets)
        if not all(torch.equal(tables[-1], other) for other in tables[-(blocks - 1) * heads :]):
            raise UnknownLayout(f"the {name} cache is arranged differently in each block or head")
    shape = (block_size, head_size)
    keys, values = (tables[at].reshape(shape).numpy().astype(np.int32) for at in (0, -1))
    return CacheLayout(dtype, keys, values)


@dataclass(frozen=True, slots=True, eq=False)
class Caches:
    """Addresses of all layers' caches of one layout; keeps the tensors alive.

    Attributes:
        layers: ``int64[L, 7]`` key address, value address, bytes from block to block and from head to head of each,
            KV heads.
    """

    layout: CacheLayout
    pairs: tuple[tuple[Cache, Cache], ...]
    layers: Int64Array
    keys: Int32Array
    values: Int32Array


def prepare_caches(pairs: Sequence[tuple[Cache, Cache]], layout: CacheLayout) -> Caches:
    """Note where the layers' caches are, for `move_rows`.

    Args:
        pairs: per layer the key cache and the value cache, ``[blocks, kv_heads, block_size, head_size]`` as vLLM's CPU
            backend slices them.

    Raises:
        ValueError: a cache is not of this layout's dtype or sizes, or not contiguous within a (block, KV head).
    """
    layers = np.zeros((len(pairs), 7), np.int64)
    for i, (keys, values) in enumerate(pairs):
        for cache in (keys, values):
            if cache.dtype != layout.dtype or cache.shape[2:] != layout.keys.shape:
                raise ValueError(f"layer {i}: {cache.dtype} {tuple(cache.shape)}, wanted {layout.keys.shape} blocks")
            if cache.stride()[2:] != (layout.head_size, 1):
                raise ValueError(f"layer {i}: a block and head must be contiguous, got strides {cache.stride()}")
        size = keys.element_size()
        strides = (keys.stride(0), keys.stride(1), values.stride(0), values.stride(1))
        layers[i] = (keys.data_ptr(), values.data_ptr(), *(s * size for s in strides), keys.shape[1])
    tables = (np.ascontiguousarray(t) for t in (layout.keys, layout.values))
    return Caches(layout, tuple(pairs), layers, *tables)


def move_rows(caches: Caches, sources: Int64Array, targets: Int64Array) -> None:
    """Copy K and V of slot ``sources[i]`` to slot ``targets[i]`` in every layer and head, in the order given.

    Args:
        sources, targets: ``int64[n]`` flat slots, block times block size plus offset. Not validated.
    """
    _move(_KINDS_BY_WIDTH[caches.layout.dtype.itemsize], caches.layers, caches.keys, caches.values, sources, targets)


_KINDS_BY_WIDTH: dict[int, Any] = {2: np.int16(0), 4: np.float32(0)}


@kernel
def _move(kind, layers, keys, values, sources, targets):  # type: ignore[no-untyped-def]
    block_size, head_size = keys.shape
    for layer in layers:
        for head in range(layer[6]):
            for part in range(2):
                base = layer[part] + head * layer[3 + 2 * part]
                block_bytes = layer[2 + 2 * part]
                offsets = values if part else keys
                for i in range(len(sources)):
                    source = base + sources[i] // block_size * block_bytes
                    target = base + targets[i] // block_size * block_bytes
                    old, new = offsets[sources[i] % block_size], offsets[targets[i] % block_size]
                    for d in range(head_size):
                        lanes.copy_element(kind, source, old[d], target, new[d])
