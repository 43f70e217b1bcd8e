"""The GPU kernel of tree attention against its definition, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.kernels.attention_triton import AttentionPlan, plan_splits
from vllm_specplug.kernels.tree_attention import TreeBatch, build_trees, tree_attention_reference
from vllm_specplug.kernels.tree_attention_triton import ancestor_bits, bits_of_parents, tree_attention, work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter computes products of bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
# Weights and results are rounded to the narrow types.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
UNTOUCHED = 7.0


@dataclass
class Case:
    """A step over a cache whose slots are NaN where nothing was written; ``plain_*`` are all written, on the CPU."""

    plan: AttentionPlan
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    plain_keys: torch.Tensor
    plain_values: torch.Tensor
    block_table: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    bits: torch.Tensor
    depths: torch.Tensor
    trees: TreeBatch
    sizes: tuple[int, ...]
    scale: float

    def poison(self, request: int, slots: slice, head: int | slice = slice(None)) -> None:
        """Make some of a request's slots NaN."""
        size = self.key_cache.shape[1]
        at = torch.arange(self.block_table.shape[1] * size)[slots]
        blocks = self.block_table[request].cpu().long()[at // size]
        for cache in (self.key_cache, self.value_cache):
            cache[blocks.to(DEVICE), (at % size).to(DEVICE), head] = math.nan

    def run(self, window: int = -1) -> torch.Tensor:
        out = torch.full(self.query.shape, UNTOUCHED, dtype=self.query.dtype, device=DEVICE)
        caches = (self.key_cache, self.value_cache)
        rest = (self.block_table, self.starts, self.lengths, self.bits, out, self.scale)
        depths = None if window == -1 else self.depths
        tree_attention(self.plan, self.query, *caches, *rest, window, depths)
        return out.cpu()

    def expected(self, window: int = -1) -> torch.Tensor:
        out = torch.full(self.query.shape, UNTOUCHED, dtype=self.query.dtype)
        plain = (self.plain_keys, self.plain_values, self.block_table.cpu())
        tree_attention_reference(self.query.cpu(), *plain, self.trees, out, self.scale, window)
        return out


def make_case(
    seed: int,
    sizes: tuple[int, ...],
    contexts: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
    head_size: int = 32,
    kv_heads: int = 2,
    group: int = 2,
    layout: str = "pairs",
    splits: int = 1,
    least: int = 16,
    rows_per_request: int | None = None,
    reach: int = 5,
) -> Case:
    """``sizes`` may be 0. A row's parent is one of the ``reach`` before it: 1 makes chains."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    count, heads, total = len(sizes), kv_heads * group, sum(sizes)
    starts = np.cumsum([0, *sizes]).astype(np.int32)
    parents = [[-1] + [int(rng.integers(max(0, m - reach), m)) for m in range(1, s)] for s in sizes if s]
    filled = np.array([i for i, s in enumerate(sizes) if s], np.int32)
    joined = np.array([parent for tree in parents for parent in tree], np.int32)
    some_sizes, some_contexts = np.array(sizes, np.int32)[filled], np.array(contexts, np.int32)[filled]
    trees = build_trees(starts[filled], some_sizes, some_contexts, filled, joined)
    # A row of blocks is longer than any request needs, and what it holds there is no block.
    most = max(-(-(c + s) // block_size) for c, s in zip(contexts, sizes, strict=True))
    blocks = count * most + 1
    table = torch.full((count + 1, most + 3), 2**30, dtype=torch.int32)
    table[:count, :most] = torch.from_numpy(rng.permutation(blocks)[: count * most].reshape(count, most))
    shape = (blocks, block_size, kv_heads, head_size)
    plain = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    if layout == "pairs":
        caches = torch.full((blocks, 2, *shape[1:]), math.nan, dtype=dtype, device=DEVICE).unbind(1)
    elif layout == "halves":
        caches = torch.full((2, *shape), math.nan, dtype=dtype, device=DEVICE).unbind(0)
    elif layout == "mixed":
        above = torch.full((blocks, 2, *shape[1:]), math.nan, dtype=dtype, device=DEVICE)
        below = torch.full((blocks, kv_heads, block_size, head_size), math.nan, dtype=dtype, device=DEVICE)
        caches = [above[:, 1], below.transpose(1, 2)]
    else:  # heads before slots, keys and values side by side
        whole = torch.full((blocks, kv_heads, block_size, 2 * head_size), math.nan, dtype=dtype, device=DEVICE)
        caches = [half.transpose(1, 2) for half in whole.chunk(2, dim=-1)]
    for i in range(count):
        at = torch.arange(contexts[i] + sizes[i])
        slots = (table[i].long()[at // block_size], at % block_size)
        for cache, values in zip(caches, plain, strict=True):
            cache[tuple(s.to(DEVICE) for s in slots)] = values[slots].to(DEVICE)
    # Query heads are a slice of a wider row, as where one product makes query, key and value; rows at the end pad.
    query = torch.randn((total + 3, heads + 2, head_size), generator=generator).to(dtype).to(DEVICE)[:, :heads]
    per_request = rows_per_request or max(sizes)
    width = -(-per_request // 32)
    bits = torch.full((total + 3, width + 1), -1, dtype=torch.int32)
    packed = ancestor_bits(trees.visible)[:, :width]
    bits[:total, :width] = torch.nn.functional.pad(packed, (0, width - packed.shape[1]))
    # Bits of rows that the request does not have are ignored.
    for start, size in zip(starts, sizes, strict=False):
        for m in range(size, 32 * width):
            bits[start : start + size, m // 32] |= -(2**31) if m % 32 == 31 else 1 << m % 32
    depths = torch.nn.functional.pad(trees.depths, (0, 3))
    lengths = torch.tensor(contexts, dtype=torch.int32) + torch.tensor(sizes, dtype=torch.int32)
    plan = AttentionPlan(
        total + 3, max(count, 8), per_request, heads, kv_heads, head_size, dtype, DEVICE, splits, least
    )
    if splits > 1:
        for left in (plan.partial, plan.tops, plan.totals):
            left.fill_(math.nan)
        plan.parts.fill_(-1)
    on_device = (t.to(DEVICE) for t in (table, torch.from_numpy(starts), lengths, bits, depths))
    return Case(plan, query, *caches, *plain, *on_device, trees, sizes, head_size**-0.5)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    inside = ~(wanted == UNTOUCHED).all(-1).all(-1)
    assert torch.equal(found[~inside], wanted[~inside])
    error = (found[inside].float() - wanted[inside].float()).abs()
    assert error.numel() == 0 or float(error.max()) <= TOLERANCE[found.dtype] * float(wanted[inside].abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["pairs", "halves", "heads", "mixed"])
@pytest.mark.parametrize("splits", [1, 4])
def test_kernel_is_the_definition(dtype, layout, splits):
    case = make_case(1, (7, 0, 1, 20), (300, 40, 129, 31), dtype, group=3, layout=layout, splits=splits)
    assert_same(case.run(), case.expected())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
def test_head_sizes(dtype, head_size):
    case = make_case(2, (5, 3), (150, 13), dtype, head_size=head_size, splits=2, kv_heads=1)
    assert_same(case.run(), case.expected())


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16])
def test_groups(group):
    case = make_case(3, (9, 2), (100, 0), torch.float16, group=group, splits=2)
    assert_same(case.run(), case.expected())


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128, 256, 784])
@pytest.mark.parametrize("splits", [1, 3])
def test_block_sizes(block_size, splits):
    case = make_case(4, (6, 4), (900, 255), torch.float16, block_size, head_size=64, kv_heads=1, splits=splits)
    assert_same(case.run(), case.expected())


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("most", "tile"), [(32, 128), (33, 64)])
def test_boundaries_of_tiles_blocks_and_words(most, tile, splits):
    contexts = (0, 1, 15, 16, 95, 96, 127, 128, 129, 255, 256, 257)
    sizes = (most, 1, 1, 32, most, 32, 1, 1, 31, 1, 2, most)
    case = make_case(5, sizes, contexts, kv_heads=1, group=1, splits=splits)
    assert case.plan.tile == tile
    assert_same(case.run(), case.expected())


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_trees(dtype):
    case = make_case(6, (129, 1, 128), (70, 5, 0), dtype, kv_heads=1, group=3, splits=3, reach=20)
    assert case.plan.tiles > 1
    assert_same(case.run(), case.expected())


def test_many_requests_and_chains():
    rng = np.random.default_rng(7)
    sizes, contexts = tuple(rng.integers(0, 4, 64).tolist()), tuple(rng.integers(0, 200, 64).tolist())
    case = make_case(7, sizes, contexts, torch.float16, kv_heads=1, splits=2, reach=1)
    # A plan for 8 requests would not do.
    case.plan = AttentionPlan(200, 64, 3, 2, 1, 32, torch.float16, DEVICE, 2, 16)
    assert_same(case.run(), case.expected())


# By the window of 375 the root sees from slot 126 on, and deeper rows from the next tile on.
@pytest.mark.parametrize("window", [1, 3, 128, 200, 375, 1000])
@pytest.mark.parametrize("splits", [1, 3])
def test_window(window, splits):
    case = make_case(8, (30, 6, 1), (500, 0, 260), kv_heads=1, splits=splits, reach=2)
    wanted = case.expected(window)
    # What the root does not see any more may be gone, its blocks too.
    for request, context in enumerate((500, 0, 260)):
        first = max(0, context - window + 1)
        case.poison(request, slice(0, first))
        case.block_table[request, : first // 16] = 0
    assert_same(case.run(window), wanted)


def test_requests_with_more_rows_than_planned_are_left_alone():
    case = make_case(9, (5, 40, 3), (50, 60, 70), splits=2, rows_per_request=40)
    wanted = case.expected()
    wanted[5:45] = UNTOUCHED
    case.plan = AttentionPlan(60, 8, 16, 4, 2, 32, torch.float32, DEVICE, 2, 16)
    case.plan.parts.fill_(2)
    assert_same(case.run(), wanted)


def test_nothing_to_do():
    case = make_case(10, (2, 3), (4, 5))
    case.starts.fill_(0)
    assert bool((case.run() == UNTOUCHED).all())
    case.starts, case.lengths = case.starts[:1], case.lengths[:0]
    assert bool((case.run() == UNTOUCHED).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_requests_result_is_the_same_to_the_bit_whatever_is_beside_it(dtype):
    case = make_case(11, (7, 0, 2, 12), (300, 40, 700, 130), dtype, splits=4)
    together = case.run()
    for request, (start, size) in enumerate(zip(case.starts.tolist(), case.sizes, strict=False)):
        alone = make_case(11, (7, 0, 2, 12), (300, 40, 700, 130), dtype, splits=4)
        alone.starts = torch.tensor([start, start + size], dtype=torch.int32, device=DEVICE)
        alone.lengths = case.lengths[request : request + 1]
        alone.block_table = case.block_table[request:]
        assert torch.equal(alone.run()[start : start + size], together[start : start + size])


def test_splits_are_used_only_where_they_are_long_enough():
    case = make_case(12, (3, 3, 3, 3), (60, 300, 600, 3000), torch.float16, kv_heads=1, splits=4, least=256)
    assert case.plan.tile == 128
    assert_same(case.run(), case.expected())
    assert case.plan.parts[:4].tolist() == [1, 1, 2, 4]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 400)), min_size=1, max_size=3),
    block_size=st.sampled_from([16, 32, 112, 128]),
    head_size=st.sampled_from([32, 48, 64]),
    group=st.sampled_from([1, 2, 5]),
    splits=st.integers(1, 6),
    window=st.sampled_from([-1, -1, 1, 50, 300]),
    dtype=st.sampled_from(DTYPES),
)
def test_fuzz(seed, shapes, block_size, head_size, group, splits, window, dtype):
    sizes, contexts = zip(*shapes, strict=True)
    if not any(sizes):
        return
    case = make_case(
        seed, sizes, contexts, dtype, block_size, head_size, kv_heads=1, group=group, splits=splits, reach=6
    )
    assert_same(case.run(window), case.expected(window))


def test_ancestor_bits():
    generator = torch.Generator().manual_seed(1)
    for most in (1, 31, 32, 33, 64, 129):
        visible = torch.randint(0, 2, (5, most), generator=generator).byte()
        bits = ancestor_bits(visible)
        assert bits.dtype == torch.int32 and bits.shape == (5, -(-most // 32))
        for row in range(5):
            assert [int(bits[row, m // 32]) >> m % 32 & 1 for m in range(most)] == visible[row].tolist()
    assert ancestor_bits(torch.zeros(0, 0, dtype=torch.uint8)).shape == (0, 0)
    with pytest.raises(ValueError, match="visible must be"):
        ancestor_bits(torch.zeros(3, 3, dtype=torch.int32))


def test_bits_of_parents_are_those_of_the_trees():
    rng = np.random.default_rng(2)
    sizes = np.array([1, 129, 0, 40, 64], np.int32)
    parents = np.concatenate([[-1, *(rng.integers(0, m) for m in range(1, s))] for s in sizes if s]).astype(np.int32)
    some = sizes[sizes > 0]
    trees = build_trees((np.cumsum(some) - some).astype(np.int32), some, some, some, parents)
    bits = bits_of_parents(sizes, parents)
    assert bits.dtype == np.int32 and np.array_equal(bits, ancestor_bits(trees.visible).numpy())
    assert np.array_equal(bits_of_parents(sizes, parents, 6)[:, :5], bits)
    with pytest.raises(ValueError, match="5 words needed"):
        bits_of_parents(sizes, parents, 4)
    with pytest.raises(ValueError, match="parents"):
        bits_of_parents(sizes, parents[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(8, 4, 32, dtype=torch.float64)}, "query must be"),
        ({"query": torch.zeros(8, 5, 32)}, "query must be"),
        ({"query": torch.zeros(8, 4, 64)[:, :, ::2]}, "query's last dimension"),
        ({"query": torch.zeros(90, 4, 32), "out": torch.zeros(90, 4, 32)}, "bits must be"),
        ({"out": torch.zeros(7, 4, 32)}, "out must be"),
        ({"key_cache": torch.zeros(9, 16, 1, 32)}, "key_cache must be"),
        ({"key_cache": torch.zeros(9, 24, 2, 32)}, "value_cache must be"),
        ({"value_cache": torch.zeros(9, 16, 2, 32, dtype=torch.float16)}, "value_cache must be"),
        ({"block_table": torch.zeros(1, 4, dtype=torch.int32)}, "block_table must have a row"),
        ({"block_table": torch.zeros(2, 4, dtype=torch.int64)}, "block_table must be"),
        ({"query_starts": torch.zeros(2, dtype=torch.int32)}, "query_starts must be"),
        ({"lengths": torch.zeros(9, dtype=torch.int32), "query_starts": torch.zeros(10, dtype=torch.int32),
          "block_table": torch.zeros(9, 4, dtype=torch.int32)}, "lengths must have at most 8"),
        ({"bits": torch.zeros(8, 0, dtype=torch.int32)}, "bits must be"),
        ({"bits": torch.zeros(8, 1)}, "bits must be"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"window": 0}, "window must be"),
        ({"window": 5}, "depths must be given"),
        ({"window": 5, "depths": torch.zeros(7, dtype=torch.int32)}, "depths must be"),
    ],
)  # fmt: skip
def test_bad_arguments(change, message):
    case = make_case(13, (3, 2), (4, 5))
    good = {
        "query": case.query,
        "key_cache": case.key_cache,
        "value_cache": case.value_cache,
        "block_table": case.block_table,
        "query_starts": case.starts,
        "lengths": case.lengths,
        "bits": case.bits,
        "out": torch.zeros_like(case.query),
        "scale": 1.0,
    }
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        tree_attention(case.plan, **{**good, **change})


def test_blocks_must_be_whole_sixteens():
    case = make_case(13, (3, 2), (4, 5), block_size=24)
    with pytest.raises(ValueError, match="multiple of 16 slots, got 24"):
        case.run()


def test_more_rows_than_the_workspace_has():
    case = make_case(13, (3, 2), (4, 5), splits=2)
    case.plan = AttentionPlan(7, 8, 3, 4, 2, 32, torch.float32, DEVICE, 2)
    with pytest.raises(ValueError, match="at most 7 rows, got 8"):
        case.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 7}, "heads must be a multiple of kv_heads 2, got 7"),
        ({"head_size": 8}, "head_size must be 16 to 256"),
        ({"head_size": 512}, "head_size must be 16 to 256"),
        ({"dtype": torch.float64}, "dtype must be"),
        ({"splits": 0}, "splits must be at least 1"),
        ({"splits": 129}, "splits must be at most 128"),
        ({"rows_per_request": 0}, "rows_per_request must be at least 1"),
        ({"heads": 514}, "at most 128 times kv_heads"),
    ],
)
def test_bad_plans(change, message):
    good = {"max_rows": 8, "max_requests": 2, "rows_per_request": 4, "heads": 4, "kv_heads": 2, "head_size": 32}
    with pytest.raises(ValueError, match=message):
        AttentionPlan(**{**good, "dtype": torch.float16, "device": DEVICE, **change})


def test_plan_counts_its_memory_and_packs_rows():
    plan = AttentionPlan(100, 4, 21, 24, 8, 128, torch.bfloat16, DEVICE, 8)
    assert plan.workspace_bytes == 4 * (100 * 24 * 8 * (128 + 2) + 4 * 8)
    assert (plan.block_m, plan.tile_rows, plan.tiles, plan.tile, plan.head) == (64, 21, 1, 64, 128)
    assert plan.warps == 4
    assert plan.grid(3) == (8, 8, 3)
    assert AttentionPlan(100, 4, 129, 32, 4, 80, torch.float16, DEVICE).tiles == 9


def test_plan_splits():
    # A full batch needs none to fill the device, but long requests are divided; a small one is divided for that.
    assert plan_splits(64, 8, 2000) == (1, 2048)
    assert plan_splits(64, 8, 32768) == (8, 2048)
    assert plan_splits(1, 8, 8192) == (32, 256)
    assert plan_splits(1, 8, 32768) == (33, 256)
    assert plan_splits(1, 1, 10**6) == (128, 256)
    assert plan_splits(1, 8, 100) == (1, 256)


def test_work():
    counted = work([100, 0], [4, 1], 8, 2, 64, torch.float16)
    assert counted.bytes == 2 * (2 * 105 * 2 * 64 + 2 * 5 * 8 * 64)
    assert counted.operations == 4 * 64 * 8 * (104 * 4 + 1)


def test_a_launch_can_be_captured_and_replayed_on_another_step():
    case = make_case(14, (7, 5, 1), (300, 40, 129), torch.float16, splits=4, rows_per_request=16)
    other = make_case(15, (2, 0, 11), (20, 33, 280), torch.float16, splits=4, rows_per_request=16)
    out = torch.full(case.query.shape, UNTOUCHED, dtype=torch.float16, device=DEVICE)
    given = (case.query, case.key_cache, case.value_cache, case.block_table, case.starts, case.lengths, case.bits, out)

    def launch() -> None:
        tree_attention(case.plan, *given, case.scale)

    launch()
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        launch = graph.replay
    case.query.copy_(other.query)
    case.starts.copy_(other.starts)
    case.lengths.copy_(other.lengths)
    case.bits.copy_(other.bits)
    case.block_table[:, : other.block_table.shape[1]] = other.block_table
    case.key_cache[: len(other.key_cache)] = other.key_cache
    case.value_cache[: len(other.value_cache)] = other.value_cache
    out.fill_(UNTOUCHED)
    launch()
    assert_same(out.cpu(), other.expected())
