"""Attention of draft trees: the reference against a row at a time, and the CPU kernel against the
reference and vLLM's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cache_layouts import offsets_of, writer
from vllm_specplug.kernels import lanes
from vllm_specplug.kernels import tree_attention_cpu as tree_attention_cpu_module
from vllm_specplug.kernels.memory import kernel
from vllm_specplug.kernels.tree_attention import DTYPES, TreeBatch, build_trees, tree_attention_reference
from vllm_specplug.kernels.tree_attention_cpu import (
    _KINDS,
    CacheLayout,
    prepare_step,
    probe_layout,
    tree_attention_cpu,
)

# Largest difference to the reference: both sum in float32; the narrow types round once, at 2^-9 and 2^-12 of a value.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@dataclass
class Case:
    """A step with trees over a cache whose unwritten slots are NaN; ``plain_*`` are [blocks, slots, heads, size]."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    plain_keys: torch.Tensor
    plain_values: torch.Tensor
    block_table: torch.Tensor
    trees: TreeBatch
    parents: list[np.ndarray]
    out: torch.Tensor
    layout: CacheLayout
    scale: float


def make_case(
    seed: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "vec",
    block_size: int = 32,
    head_size: int = 32,
    kv_heads: int = 2,
    group: int = 2,
    sizes: tuple[int, ...] = (6,),
    contexts: tuple[int, ...] = (40,),
) -> Case:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    count = len(sizes)
    offsets = offsets_of(layout, block_size, head_size)
    # Rows that belong to no tree before, between and after the trees.
    starts = np.cumsum([1] + [s + 1 for s in sizes[:-1]]).astype(np.int32)
    parents = [np.array([-1] + [rng.integers(max(0, m - 5), m) for m in range(1, s)], np.int32) for s in sizes]
    requests = rng.permutation(count).astype(np.int32)
    trees = build_trees(starts, int32(*sizes), int32(*contexts), requests, np.concatenate(parents))
    most = max(-(-(c + s) // block_size) for c, s in zip(contexts, sizes, strict=True))
    blocks = count * most + 1
    table = rng.permutation(blocks)[: count * most].reshape(count, most).astype(np.int32)
    cache = torch.full((blocks, kv_heads, 2 * block_size, head_size), math.nan, dtype=dtype)
    keys, values = cache.chunk(2, dim=2)
    plain_keys, plain_values = torch.randn(2, blocks, block_size, kv_heads, head_size).to(dtype)
    for request, context, size in zip(requests, contexts, sizes, strict=True):
        at = torch.arange(context + size)
        slots = torch.from_numpy(table[request]).long()[at // block_size] * block_size + at % block_size
        flat = (plain.flatten(0, 1)[slots] for plain in (plain_keys, plain_values))
        writer(*offsets)(*flat, keys, values, slots)
    rows, heads = int(starts[-1]) + sizes[-1] + 1, kv_heads * group
    # Query heads are a slice of a wider row, as where one product makes query, key and value.
    query = torch.randn(rows, heads + 2, head_size).to(dtype)[:, :heads]
    out = torch.full((rows, heads, head_size), 7.0, dtype=dtype)
    known = CacheLayout(dtype, *offsets)
    args = (query, keys, values, plain_keys, plain_values, torch.from_numpy(table), trees, parents, out, known)
    return Case(*args, scale=head_size**-0.5)


def reference(case: Case, window: int = -1) -> torch.Tensor:
    out = case.out.clone()
    keys, values = case.plain_keys, case.plain_values
    tree_attention_reference(case.query, keys, values, case.block_table, case.trees, out, case.scale, window)
    return out


def compiled(case: Case, window: int = -1) -> torch.Tensor:
    out = case.out.clone()
    caches = (case.key_cache, case.value_cache)
    tree_attention_cpu(case.query, *caches, case.block_table, case.trees, out, case.scale, window, case.layout)
    return out


def assert_same(case: Case, window: int = -1) -> None:
    wanted, found = reference(case, window), compiled(case, window)
    outside = torch.ones(len(wanted), dtype=torch.bool)
    for start, size in zip(case.trees.starts.tolist(), case.trees.sizes.tolist(), strict=True):
        outside[start : start + size] = False
    assert torch.equal(found[outside], case.out[outside])
    assert not bool((found[~outside] == 7.0).all(-1).any())
    assert (found.float() - wanted.float()).abs().max() <= TOLERANCE[case.query.dtype] * wanted.float().abs().max()


def test_build_trees_marks_ancestors():
    trees = build_trees(int32(3, 10), int32(5, 2), int32(7, 0), int32(1, 0), int32(-1, 0, 0, 1, 3, -1, 0))
    assert trees.depths.tolist() == [0, 1, 1, 2, 3, 0, 1]
    assert trees.visible.dtype == torch.uint8
    assert trees.visible.tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
    ]


def test_build_trees_of_none():
    nothing = int32()
    trees = build_trees(nothing, nothing, nothing, nothing, nothing)
    assert len(trees.depths) == 0
    layout = CacheLayout(torch.float32, *offsets_of("vec", 32, 32))
    prepare_step(trees, torch.zeros(0, 0, dtype=torch.int32), layout)


@pytest.mark.parametrize("parents", [(-1, 0, 2, 1), (-1, 0, -1, 1), (0, 0, 1, 1), (-1, 1, 0, 0), (-1, -2, 0, 0)])
def test_build_trees_refuses_parents_that_come_later(parents):
    with pytest.raises(ValueError, match="is not an earlier row"):
        build_trees(int32(0), int32(4), int32(0), int32(0), int32(*parents))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": np.zeros(1, np.int64)}, "starts must be int32"),
        ({"starts": int32(-1)}, "starts must be at least 0"),
        ({"sizes": int32(0), "parents": int32()}, "sizes must be at least 1"),
        ({"contexts": int32(1, 2)}, "contexts has 2 entries for 1 trees"),
        ({"parents": int32(-1, 0)}, "parents has 2 entries for 3 rows"),
    ],
)
def test_build_trees_refuses(change, message):
    good = {"starts": int32(0), "sizes": int32(3), "contexts": int32(5), "requests": int32(0)}
    with pytest.raises(ValueError, match=message):
        build_trees(**{**good, "parents": int32(-1, 0, 0), **change})


@pytest.mark.parametrize("window", [-1, 1, 3, 20])
def test_reference_is_attention_over_each_rows_path(window):
    case = make_case(1, sizes=(9, 4), contexts=(40, 0), group=3)
    found = reference(case, window)
    for i, parents in enumerate(case.parents):
        context = case.trees.contexts[i].item()
        blocks = case.block_table[case.trees.requests[i]].tolist()
        for row in range(len(parents)):
            path = [row]
            while parents[path[-1]] >= 0:
                path.append(int(parents[path[-1]]))
            slots = list(range(context)) + [context + m for m in reversed(path)]
            if window > 0:
                slots = slots[-window:]
            at = case.trees.starts[i].item() + row
            for head in range(6):
                keys, values = (
                    torch.stack([plain[blocks[s // 32], s % 32, head // 3] for s in slots])
                    for plain in (case.plain_keys, case.plain_values)
                )
                weights = (keys @ case.query[at, head] * case.scale).softmax(0)
                assert torch.allclose(found[at, head], weights @ values, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["vec", "rows", "pairs", "shuffled"])
def test_layouts_and_dtypes(dtype, layout):
    assert_same(make_case(2, dtype, layout, sizes=(7, 2, 20), contexts=(70, 31, 300), group=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 112, 128, 160, 192, 224, 256])
def test_head_sizes(dtype, head_size):
    assert_same(make_case(3, dtype, head_size=head_size, block_size=16, sizes=(5, 3), contexts=(50, 3)))


@pytest.mark.parametrize("group", range(1, 9))
def test_groups(group):
    assert_same(make_case(4, torch.bfloat16, group=group, kv_heads=3, sizes=(4, 17), contexts=(100, 260)))


@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 48, 128, 512])
@pytest.mark.parametrize("layout", ["vec", "shuffled"])
def test_block_sizes(block_size, layout):
    """Also blocks that are no whole number of vectors."""
    assert_same(make_case(5, layout=layout, block_size=block_size, sizes=(12, 3, 9), contexts=(25, 0, 500)))


@pytest.mark.parametrize("context", [0, 1, 15, 16, 17, 31, 32, 33, 63, 240, 255, 256, 257, 288])
def test_contexts_around_blocks_and_panels(context):
    assert_same(make_case(6, sizes=(9, 18), contexts=(context, context + 5)))


@pytest.mark.parametrize("size", [2, 33, 64, 65, 129])
@pytest.mark.parametrize("group", [1, 8])
def test_large_trees(size, group):
    assert_same(make_case(7, torch.bfloat16, group=group, sizes=(size, 2), contexts=(19, 280)))


@pytest.mark.parametrize("window", [1, 2, 5, 16, 33, 64, 250, 1000])
@pytest.mark.parametrize("layout", ["vec", "shuffled"])
def test_windows(window, layout):
    assert_same(make_case(8, layout=layout, block_size=16, sizes=(20, 7, 5), contexts=(100, 0, 600)), window)


@pytest.mark.parametrize("seed", range(30))
def test_random_steps(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    case = make_case(
        seed,
        DTYPES[seed % 3],
        ("vec", "pairs", "shuffled")[int(rng.integers(3))],
        block_size=int(rng.choice([16, 32, 64])),
        head_size=int(rng.choice([32, 48, 64])),
        kv_heads=int(rng.integers(1, 4)),
        group=int(rng.integers(1, 6)),
        sizes=tuple(rng.integers(2, 40, count).tolist()),
        contexts=tuple(rng.integers(0, 400, count).tolist()),
    )
    assert_same(case, int(rng.choice([-1, -1, 3, 50, 200])))


@pytest.fixture
def two_threads(monkeypatch):
    """Calls of any size are shared by two threads; counts those that were."""
    parallel = tree_attention_cpu_module._gomp_parallel()
    if parallel is None:
        pytest.skip("torch's OpenMP library here has no entry for other callers")
    counts = []

    def counted(function, call, threads, flags):
        counts.append(threads)
        parallel(function, call, threads, flags)

    monkeypatch.setattr(tree_attention_cpu_module, "PARALLEL_WORK", 0)
    monkeypatch.setattr(tree_attention_cpu_module, "_gomp_parallel", lambda: counted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield counts
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["vec", "shuffled"])
def test_two_threads(two_threads, dtype, layout):
    """Each item is taken once, with working memory of its thread's own."""
    for seed, sizes, group in ((0, (2,), 1), (1, (7,), 3), (2, (61, 9, 30), 3), (3, (129,), 8), (4, (5,) * 12, 2)):
        contexts = tuple(range(10, 10 + 50 * len(sizes), 50))
        assert_same(make_case(seed, dtype, layout, sizes=sizes, contexts=contexts, group=group), -1 if seed else 8)
    assert two_threads == [2] * 5


@pytest.mark.parametrize("layout", ["vec", "pairs"])
def test_bfloat16_without_products_of_pairs(monkeypatch, layout):
    """What processors without AVX512_BF16 run."""
    monkeypatch.setitem(_KINDS, torch.bfloat16, lanes.KINDS["bfloat16"])
    assert_same(make_case(5, torch.bfloat16, layout, sizes=(7, 1), contexts=(33, 600)))


@kernel
def _exp2(row, vectors):
    return lanes.row_weights(np.float32(0), row, vectors, np.float32(1), np.float32(0))


def test_exp2_is_accurate():
    exponents = -np.geomspace(1e-6, 125.9, 4096).astype(np.float32)
    powers = exponents.copy()
    total = _exp2(powers.ctypes.data, len(powers) // lanes.LANES)
    wanted = np.exp2(exponents.astype(np.float64))
    assert np.abs(powers / wanted - 1).max() < 2e-7
    assert total == pytest.approx(wanted.sum(), rel=1e-6)
    special = np.full(lanes.LANES, -np.inf, np.float32)
    special[:3] = 0.0, -1.0, -127.0
    assert _exp2(special.ctypes.data, 1) == 1.5
    assert special.tolist() == [1.0, 0.5] + [0.0] * (lanes.LANES - 2)


def test_large_scores_and_weights_that_vanish():
    case = make_case(9, sizes=(6,), contexts=(600,))
    case.scale = 40.0
    assert_same(case)
    case.scale = -40.0
    assert_same(case)


def test_prepared_step_serves_layers_of_different_shapes():
    case = make_case(10, sizes=(6, 3), contexts=(40, 90))
    step = prepare_step(case.trees, case.block_table, case.layout)
    for heads, window in ((4, -1), (2, 9), (4, -1)):
        out = case.out.clone()[:, :heads]
        args = (case.block_table, case.trees, out, case.scale, window, case.layout, step)
        tree_attention_cpu(case.query[:, :heads], case.key_cache, case.value_cache, *args)
        case_of_layer = make_case(10, sizes=(6, 3), contexts=(40, 90))
        case_of_layer.query = case.query[:, :heads]
        case_of_layer.out = case.out[:, :heads]
        wanted = reference(case_of_layer, window)
        assert (out - wanted).abs().max() < 3e-6


def test_rounding_to_bfloat16_is_to_nearest_even():
    case = make_case(11, torch.bfloat16, sizes=(2,), contexts=(0,))
    # The root sees only itself: its result is its own value, exactly; with the second row, a mean of two.
    case.query.zero_()
    wanted = compiled(case)
    slot = case.block_table[0, 0].long()
    own = case.plain_values[slot, :2].float().repeat_interleave(2, dim=1)
    assert torch.equal(wanted[1].float(), own[0])
    assert torch.equal(wanted[2], own.mean(0).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"block_table": c.block_table.long()}, "block_table must be int32"),
        (lambda c: {"block_table": c.block_table[:1]}, "trees.requests must be below 1"),
        (lambda c: {"block_table": c.block_table[:, :1]}, "do not fit 1 blocks of 32"),
        (lambda c: {"trees": c.trees._replace(visible=c.trees.visible.bool())}, "trees.visible must be contiguous"),
        (lambda c: {"trees": c.trees._replace(visible=c.trees.visible[:-1])}, "trees.visible has shape"),
        (lambda c: {"trees": c.trees._replace(contexts=c.trees.contexts[:1])}, "trees.contexts has shape"),
        (lambda c: {"trees": c.trees._replace(contexts=c.trees.contexts - 99)}, "must not be negative"),
    ],
)
def test_bad_steps_are_refused(change, message):
    case = make_case(12, sizes=(6, 3), contexts=(40, 90))
    given = {"trees": case.trees, "block_table": case.block_table, **change(case)}
    with pytest.raises(ValueError, match=message):
        prepare_step(given["trees"], given["block_table"], case.layout)
    args = (given["block_table"], given["trees"], case.out, case.scale)
    with pytest.raises(ValueError, match=message):
        tree_attention_reference(case.query, case.plain_keys, case.plain_values, *args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"query": c.query[:, 0]}, "query and out must be"),
        (lambda c: {"query": c.query.double()}, "must share one of"),
        (lambda c: {"out": c.out[1:]}, "query and out must be"),
        (lambda c: {"out": c.out[:-1], "query": c.query[:-3]}, "query and out must be"),
        (lambda c: {"out": c.out[:5], "query": c.query[:5]}, "a tree ends at row 11 of 5"),
        (lambda c: {"plain_keys": c.plain_keys.half()}, "must share one of"),
        (lambda c: {"plain_keys": c.plain_keys[..., :16]}, "caches must have four dimensions"),
        (lambda c: {"out": c.out[:, :3], "query": c.query[:, :3]}, "3 query heads cannot share 2 KV heads"),
    ],
)
def test_bad_tensors_are_refused_by_the_reference(change, message):
    case = make_case(13, sizes=(6, 3), contexts=(40, 90))
    for name, value in change(case).items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        reference(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block_size", "head_size", "group", "window"),
    [(128, 64, 3, -1), (128, 64, 3, 50), (32, 128, 1, -1), (16, 80, 4, -1), (32, 96, 8, 7)],
)
def test_chains_as_vllms_own_kernel(dtype, block_size, head_size, group, window):
    ops = pytest.importorskip("vllm._custom_ops")
    isa_of = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")._get_attn_isa
    isa = isa_of(dtype, block_size, head_size)
    torch.manual_seed(0)
    write = lambda *args: ops.cpu_attn_reshape_and_cache(*args, isa)  # noqa: E731
    layout = probe_layout(write, dtype, block_size, head_size)
    sizes, contexts, heads = (7, 3), (300, 20), 2 * group
    blocks = 2 * -(-320 // block_size)
    table = torch.arange(blocks, dtype=torch.int32).flip(0).reshape(2, -1)
    cache = torch.zeros(blocks, 2, 2 * block_size, head_size, dtype=dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    slots = torch.arange(blocks * block_size)
    key, value = torch.randn(2, len(slots), 2, head_size).to(dtype)
    write(key, value, key_cache, value_cache, slots)
    query = torch.randn(sum(sizes), heads, head_size).to(dtype)
    wanted, found = torch.zeros_like(query), torch.zeros_like(query)
    starts = torch.tensor([0, 7, 10], dtype=torch.int32)
    lengths = torch.tensor([307, 23], dtype=torch.int32)
    scheduled = ops.cpu_attn_get_scheduler_metadata(
        2, heads, 2, head_size, lengths, dtype, starts, True, window, isa, True
    )
    ops.cpu_attention_with_kv_cache(
        *(query, key_cache, value_cache, wanted, starts, lengths, head_size**-0.5, True, None, window, table, 0),
        *(scheduled, None),
    )
    chains = np.concatenate([np.arange(-1, s - 1) for s in sizes]).astype(np.int32)
    trees = build_trees(int32(0, 7), int32(*sizes), int32(*contexts), int32(0, 1), chains)
    tree_attention_cpu(query, key_cache, value_cache, table, trees, found, head_size**-0.5, window, layout)
    difference = (found.float() - wanted.float()).abs().max()
    assert difference <= (1e-5 if dtype == torch.float32 else 2e-2) * wanted.float().abs().max()
