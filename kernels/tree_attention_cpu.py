"""Attention of draft trees on the CPU, over vLLM's KV cache as its CPU backend lays it out, and moves within it.

Once per engine: ``layout = probe_layout(write, dtype, block_size, head_size)`` with vLLM's own cache writer, and
``caches = prepare_caches(pairs, layout)`` with every layer's (key cache, value cache) of that layout. Once per step:
``step = prepare_step(trees, block_table, layout)``, which validates; it serves every layer whose KV cache has this
block table and layout, whatever its heads, scale and window. Then per layer ``tree_attention_cpu(..., step)``, which
checks nothing, and after sampling ``move_rows(caches, sources, targets)`` once for all layers. One call at a time, for
calls share their working memory. Where torch has several threads, a call uses the same ones, through their OpenMP
library.

How it works. Per tree and KV head, the rows' query heads are packed and multiplied with the keys of a panel of blocks;
the panel's scores become weights with a running maximum; the weights are multiplied with the values. Both products are
the same register tile (see `products`), which converts the cache's elements on the fly, or multiplies bfloat16 as it is
where the processor can: then the weights too are rounded to it, as in most attention kernels of GPUs. Sums are float32.
Only the rows' own slots need a mask, for all rows see the whole context (but for a sliding window). A cache that keeps
keys transposed, ``[head_size, block_size]``, and values by rows is read in place; any other arrangement is first
gathered into such an order through the offsets that the probe found.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm_specplug.kernels import lanes, products
from vllm_specplug.kernels.attention_tiles import (
    BLOCK_SIZE,
    CHOSEN,
    CHOSEN_HEAD,
    CHOSEN_TREE,
    CONTEXTS,
    DEPTHS,
    ELEMENT,
    HEAD_SIZE,
    HEADS,
    KEY,
    KEY_BLOCK,
    KEY_HEAD,
    KEY_RUN,
    KEY_STRIDE,
    KEY_TABLE,
    KEYS_IN_PLACE,
    KV_HEADS,
    NEXT_ITEM,
    NEXT_WORKER,
    OUT,
    OUT_HEAD,
    OUT_ROW,
    PANEL_KEYS,
    QUERY,
    QUERY_HEAD,
    QUERY_ROW,
    REQUESTS,
    ROWS_AT_ONCE,
    SCALE,
    SCRATCH,
    SCRATCH_BYTES,
    SIZES,
    STARTS,
    TABLE,
    TABLE_ROW,
    TAILS,
    TREES,
    VALUE,
    VALUE_BLOCK,
    VALUE_HEAD,
    VALUE_RUN,
    VALUE_TABLE,
    VALUES_IN_PLACE,
    VISIBLE,
    VISIBLE_ROW,
    WINDOW,
    WORDS,
    attend_chosen,
    weigh,
)
from vllm_specplug.kernels.kv_cache_cpu import (
    Cache,
    CacheLayout,
    Caches,
    UnknownLayout,
    move_rows,
    prepare_caches,
    probe_layout,
)
from vllm_specplug.kernels.lanes import LANES
from vllm_specplug.kernels.memory import c_callable, kernel, load, sources_stamp
from vllm_specplug.kernels.products import multiply
from vllm_specplug.kernels.tree_attention import DTYPES, TreeBatch, check_trees

__all__ = [
    "CacheLayout",
    "Caches",
    "PreparedStep",
    "UnknownLayout",
    "move_rows",
    "prepare_caches",
    "prepare_step",
    "probe_layout",
    "tree_attention_cpu",
]

# Query heads of tree rows handled together: bounds the working memory. 24 to 192 were equally fast.
MOST_QUERIES = 96
# A call's work is shared by threads from this many multiplications and additions on, about 10 us of one thread.
PARALLEL_WORK = 2_000_000
LOG2_E = math.log2(math.e)

_LAYER = struct.Struct("=20qf")


_SCRATCH: dict[tuple[int, int, int, int], npt.NDArray[np.float32]] = {}


def _scratch(head_size: int, block_size: int, queries: int, threads: int) -> npt.NDArray[np.float32]:
    """Working memory ``float32[threads, n]``, see `_attend`; the same for every call of these sizes."""
    key = (head_size, block_size, queries, threads)
    if key not in _SCRATCH:
        scores = max(PANEL_KEYS, block_size) + LANES
        gathered = head_size * (block_size + LANES)
        _SCRATCH[key] = np.zeros((threads, queries * (2 * head_size + scores + 2) + gathered + LANES), np.float32)
    return _SCRATCH[key]


@dataclass(slots=True, eq=False)
class PreparedStep:
    """What a step's calls have in common. Keeps the tensors it names alive.

    ``work`` is the number of (row, key) pairs, ``largest`` the rows of the largest tree.
    """

    trees: TreeBatch
    block_table: torch.Tensor
    layout: CacheLayout
    call: memoryview
    visible: npt.NDArray[np.uint8]
    address: int
    threads: int
    work: int
    largest: int


def prepare_step(trees: TreeBatch, block_table: torch.Tensor, layout: CacheLayout) -> PreparedStep:
    """Validate a step's trees against the block table (``int32[requests, max_blocks]``) and note their addresses.

    Raises:
        ValueError: see `check_trees`.
    """
    check_trees(trees, block_table, layout.block_size)
    call = np.zeros(WORDS, np.int64)
    call[HEAD_SIZE:TREES] = layout.words
    # A mask is read a vector at a time, from any place on, up to the end of the vector that the last slot is in.
    rows, width = trees.visible.shape
    visible = np.zeros((rows, width + 2 * LANES), np.uint8)
    visible[:, :width] = trees.visible.numpy()
    call[TREES : TABLE_ROW + 1] = (
        *(len(trees.starts), *(t.data_ptr() for t in trees[:5]), visible.ctypes.data),
        *(visible.strides[0], block_table.data_ptr(), block_table.stride(0) * 4),
    )
    sizes, contexts = trees.sizes.numpy(), trees.contexts.numpy()
    work = int((sizes.astype(np.int64) * (sizes + contexts)).sum())
    threads = torch.get_num_threads() if _gomp_parallel() else 1
    if threads > 1:
        _worker(layout.dtype)  # compiled here rather than in the first large step
    return PreparedStep(trees, block_table, layout, call.data, visible, call.ctypes.data, threads, work, width)


def tree_attention_cpu(
    query: torch.Tensor,
    key_cache: Cache,
    value_cache: Cache,
    block_table: torch.Tensor,
    trees: TreeBatch,
    out: torch.Tensor,
    scale: float,
    window: int,
    layout: CacheLayout,
    step: PreparedStep | None = None,
    choose: Callable[[int], None] | None = None,
) -> None:
    """`tree_attention_reference` over caches in ``layout``; sums in float32, in another order.

    Args:
        query, out: ``[T, heads, head_size]``, the last dimension contiguous; of the layout's dtype.
        key_cache, value_cache: ``[blocks, kv_heads, block_size, head_size]`` as vLLM's CPU backend slices them.
        block_table, trees, layout: as given to `prepare_step`.
        step: what `prepare_step` returned for them; prepared here where it is missing. Nothing else is validated.
        choose: called with the address of the call's description before any row is attended: it may choose the units
            of the context that are (see `sparse_attention_cpu`).
    """
    if step is None:
        step = prepare_step(trees, block_table, layout)
    size = query.element_size()
    query_row, query_head, _ = query.stride()
    out_row, out_head, _ = out.stride()
    key_block, key_head, _, _ = key_cache.stride()
    value_block, value_head, _, _ = value_cache.stride()
    heads, kv_heads = query.shape[1], key_cache.shape[1]
    group = heads // kv_heads
    rows_at_once = max(1, MOST_QUERIES // group)
    threads = step.threads
    if threads > 1:
        if step.work * heads * layout.head_size * 4 < PARALLEL_WORK:
            threads = 1
        else:
            # Two items or more per thread, but none with fewer queries than a register tile has rows.
            parts = -(-2 * threads // (kv_heads * len(step.trees.starts)))
            rows_at_once = min(rows_at_once, max(-(-step.largest // parts), -(-6 // group)))
    scratch = _scratch(layout.head_size, layout.block_size, max(MOST_QUERIES, group), step.threads)
    _LAYER.pack_into(
        step.call,
        0,
        *(query.data_ptr(), out.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr()),
        *(query_row * size, query_head * size, out_row * size, out_head * size),
        *(key_block * size, key_head * size, value_block * size, value_head * size),
        *(heads, kv_heads, window, rows_at_once, scratch.ctypes.data, scratch.strides[0], 0, 0),
        scale * LOG2_E,
    )
    if choose is not None:
        choose(step.address)
    if threads > 1:
        _gomp_parallel()(_worker(layout.dtype), step.address, threads, 0)
    else:
        _work(_KINDS[layout.dtype], step.address)


_KINDS = {dtype: products.KINDS[str(dtype).removeprefix("torch.")] for dtype in DTYPES}


@kernel
def _mask(call, scores, row_bytes, panel, columns, context, base, first, rows, group, window):  # type: ignore[no-untyped-def]
    """Hide from each query of rows ``first`` to ``first + rows`` what it may not see of the panel's columns.

    ``base`` is the tree's first row among all trees'; column ``j`` is cache slot ``panel + j``, and so tree row
    ``panel + j - context`` from the context's end on.
    """
    hidden = np.float32(-np.inf)
    depths = lanes.load_wide(call, DEPTHS) + base * 4
    pitch = lanes.load_wide(call, VISIBLE_ROW)
    visible = lanes.load_wide(call, VISIBLE) + base * pitch
    begin = max(0, context - panel)
    vectors = (columns - begin + LANES - 1) // LANES
    for r in range(first, first + rows):
        line = scores + (r - first) * group * row_bytes
        seen = visible + r * pitch + panel + begin - context
        for g in range(group):
            lanes.row_hide(line + g * row_bytes + begin * 4, seen, vectors)
        if window >= 0:
            lowest = context + load(depths, r) - window + 1
            # A row's slot may lie above ``lowest`` while its position, which a tree's other branches share, does not.
            for j in range(min(columns, lowest - panel) if lowest <= context else columns):
                m = panel + j - context
                if m < 0 or (m <= r and context + load(depths, m) < lowest):
                    for g in range(group):
                        lanes.store_number(line + g * row_bytes, j, hidden)


@kernel
def _attend(kind, call, scratch, tree, base, head, first, rows):  # type: ignore[no-untyped-def]
    """Rows ``first`` to ``first + rows`` of a tree, whose rows begin at ``base`` of all trees', for one KV head."""
    scale = lanes.load_number(call, 2 * SCALE)
    # Scores are scaled when they become weights, where only a positive scale keeps the largest the largest.
    sign = np.float32(1) if scale >= 0 else np.float32(-1)
    scale = abs(scale)
    floats = np.float32(0)
    head_size = lanes.load_wide(call, HEAD_SIZE)
    block_size = lanes.load_wide(call, BLOCK_SIZE)
    element = lanes.load_wide(call, ELEMENT)
    keys_in_place = lanes.load_wide(call, KEYS_IN_PLACE)
    values_in_place = lanes.load_wide(call, VALUES_IN_PLACE)
    window = lanes.load_wide(call, WINDOW)
    group = lanes.load_wide(call, HEADS) // lanes.load_wide(call, KV_HEADS)
    start = load(lanes.load_wide(call, STARTS), tree)
    size = load(lanes.load_wide(call, SIZES), tree)
    context = load(lanes.load_wide(call, CONTEXTS), tree)
    request = load(lanes.load_wide(call, REQUESTS), tree)
    table = lanes.load_wide(call, TABLE) + request * lanes.load_wide(call, TABLE_ROW)
    keys_at = lanes.load_wide(call, KEY) + head * lanes.load_wide(call, KEY_HEAD)
    values_at = lanes.load_wide(call, VALUE) + head * lanes.load_wide(call, VALUE_HEAD)
    key_block = lanes.load_wide(call, KEY_BLOCK)
    value_block = lanes.load_wide(call, VALUE_BLOCK)
    vectors = head_size // LANES
    queries = rows * group
    panel_blocks = max(1, PANEL_KEYS // block_size)

    width = head_size * 4
    factor = lanes.factor_width(kind)
    packed = scratch
    sums = packed + queries * width
    scores = sums + queries * width
    row_bytes = (panel_blocks * block_size + LANES) * 4
    maxima = scores + queries * row_bytes
    totals = maxima + queries * 4
    gathered = totals + queries * 4

    from_query = lanes.load_wide(call, QUERY) + start * lanes.load_wide(call, QUERY_ROW)
    query_row = lanes.load_wide(call, QUERY_ROW)
    query_head = lanes.load_wide(call, QUERY_HEAD)
    for r in range(rows):
        for g in range(group):
            source = from_query + (first + r) * query_row + (head * group + g) * query_head
            lanes.row_factors(kind, source, packed + (r * group + g) * head_size * factor, vectors, sign)
    for q in range(queries):
        lanes.store_number(maxima, q, np.float32(-np.inf))
        lanes.store_number(totals, q, np.float32(0))

    total = context + size
    # No row sees below what the root sees.
    block = max(0, context + 1 - window) // block_size if window >= 0 else 0
    fresh = True
    chosen = lanes.load_wide(call, CHOSEN)
    if chosen != 0 and window < 0:
        chosen += tree * lanes.load_wide(call, CHOSEN_TREE) + head * lanes.load_wide(call, CHOSEN_HEAD)
        if load(chosen, 0) >= 0:
            fresh = attend_chosen(
                kind, call, chosen, table, keys_at, values_at,
                packed, sums, scores, row_bytes, maxima, totals, gathered, queries,
            )  # fmt: skip
            block = load(lanes.load_wide(call, TAILS), tree)
    while block * block_size < total:
        panel = block * block_size
        count = min(panel_blocks, (total - panel + block_size - 1) // block_size)
        columns = min(count * block_size, total - panel)
        for i in range(count):
            keys = min(block_size, total - panel - i * block_size)
            from_keys = keys_at + load(table, block + i) * key_block
            target = scores + i * block_size * 4
            groups = (keys + LANES - 1) // LANES
            pitch = block_size * element
            if keys_in_place == 0:
                pitch = lanes.load_wide(call, KEY_STRIDE)
                every = head_size * (pitch // element) // LANES
                key_table = lanes.load_wide(call, KEY_TABLE)
                lanes.row_gather(kind, from_keys, key_table, gathered, every, lanes.load_wide(call, KEY_RUN))
                from_keys = gathered
            multiply(
                kind, packed, head_size * factor, from_keys, pitch, element,
                target, row_bytes, queries, groups, head_size, 0,
            )  # fmt: skip
        padded = (columns + LANES - 1) // LANES
        if panel + padded * LANES > context or window >= 0:
            _mask(call, scores, row_bytes, panel, padded * LANES, context, base, first, rows, group, window)
        weigh(kind, scale, scores, row_bytes, padded, queries, maxima, totals, sums, width, vectors, fresh)
        for i in range(count):
            # Not one key more: what lies in slots never written may be NaN.
            keys = min(block_size, total - panel - i * block_size)
            from_values = values_at + load(table, block + i) * value_block
            weights = scores + i * block_size * factor
            keep = 0 if fresh else 1
            if values_in_place == 0:
                value_table = lanes.load_wide(call, VALUE_TABLE)
                every = keys * vectors
                lanes.row_gather(kind, from_values, value_table, gathered, every, lanes.load_wide(call, VALUE_RUN))
                from_values = gathered
            multiply(
                kind, weights, row_bytes, from_values, head_size * element, element,
                sums, width, queries, vectors, keys, keep,
            )  # fmt: skip
            fresh = False
        block += count

    to_out = lanes.load_wide(call, OUT) + start * lanes.load_wide(call, OUT_ROW)
    out_row = lanes.load_wide(call, OUT_ROW)
    out_head = lanes.load_wide(call, OUT_HEAD)
    for r in range(rows):
        for g in range(group):
            q = r * group + g
            target = to_out + (first + r) * out_row + (head * group + g) * out_head
            share = np.float32(1) / lanes.load_number(totals, q)
            lanes.row_copy(floats, sums + q * width, kind, target, vectors, share)


@kernel
def _work(kind, call):  # type: ignore[no-untyped-def]
    """Take items of a call's work (tree, KV head, some rows) until none is left; any number of threads at once."""
    scratch = lanes.load_wide(call, SCRATCH)
    scratch += lanes.take_number(call, NEXT_WORKER) * lanes.load_wide(call, SCRATCH_BYTES)
    at_once = lanes.load_wide(call, ROWS_AT_ONCE)
    kv_heads = lanes.load_wide(call, KV_HEADS)
    sizes = lanes.load_wide(call, SIZES)
    base = 0
    passed = 0
    item = lanes.take_number(call, NEXT_ITEM)
    for tree in range(lanes.load_wide(call, TREES)):
        size = load(sizes, tree)
        parts = (size + at_once - 1) // at_once
        while item < passed + parts * kv_heads:
            head, part = (item - passed) // parts, (item - passed) % parts
            first = part * at_once
            _attend(kind, call, scratch, tree, base, head, first, min(at_once, size - first))
            item = lanes.take_number(call, NEXT_ITEM)
        passed += parts * kv_heads
        base += size


@functools.cache
def _worker(dtype: torch.dtype) -> int:
    """Address of `_work` for C callers, ``void(*)(int64 call)``."""
    kind = _KINDS[dtype]
    sources = sources_stamp(__file__)

    def worker(call):  # type: ignore[no-untyped-def]
        if sources >= 0:
            _work(kind, call)

    return c_callable(worker)


@functools.cache
def _gomp_parallel() -> Any:
    """libgomp's entry for a parallel region, from the OpenMP library that torch and vLLM's kernels use; None: no such.

    Other threads would compete with theirs, which wait busily, and would inherit the one core that vLLM binds its main
    thread to.
    """
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function
