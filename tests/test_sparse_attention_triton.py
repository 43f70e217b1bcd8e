"""The GPU kernel of attention over chosen units against its definition, interpreted where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree_attention_triton import DEVICE, DTYPES, UNTOUCHED, Case, assert_same, make_case
from vllm_specplug.kernels.sparse_attention import sparse_attention_reference
from vllm_specplug.kernels.sparse_attention_triton import sparse_attention, work

# Per request: the first slot of the tail, and per KV head the units, or None for everything.
Choice = list[tuple[int, list[list[int] | None]]]


def tensors(choices: Choice, kv_heads: int, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``chosen``, ``counts`` and ``tails``; what does not count is far beyond any cache."""
    chosen = torch.full((len(choices) + 1, kv_heads, most), 2**25, dtype=torch.int32)
    counts = torch.full((len(choices) + 1, kv_heads), 2**25, dtype=torch.int32)
    tails = torch.zeros(len(choices) + 1, dtype=torch.int32)
    for i, (tail, heads) in enumerate(choices):
        tails[i] = tail
        for head, units in enumerate(heads):
            counts[i, head] = -1 if units is None else len(units)
            if units:
                chosen[i, head, : len(units)] = torch.tensor(units, dtype=torch.int32)
    return chosen.to(DEVICE), counts.to(DEVICE), tails.to(DEVICE)


def choose(seed: int, case: Case, contexts: tuple[int, ...], unit: int, share: float, align: int) -> Choice:
    """Random units before tails at multiples of ``align``; now and then a head attends to everything, or to none."""
    rng = np.random.default_rng(seed)
    choices: Choice = []
    for context in contexts:
        tail = int(rng.integers(context // 2, context + 1)) // align * align
        heads: list[list[int] | None] = []
        for head in range(case.plan.kv_heads):
            kind = rng.integers(0, 8)
            picked = np.flatnonzero(rng.random(tail // unit) < share).tolist()
            heads.append(None if kind == 0 else [] if kind == 1 and head else picked)
        choices.append((tail, heads))
    return choices


def run(case: Case, choices: Choice, unit: int) -> torch.Tensor:
    """The kernel's result; what a head must not attend to is NaN."""
    size = case.key_cache.shape[1]
    most = 1
    for request, (tail, heads) in enumerate(choices):
        for head, units in enumerate(heads):
            if units is None:
                continue
            most = max(most, len(units))
            left = np.setdiff1d(np.arange(tail), (np.array(units, int)[:, None] * unit + np.arange(unit)).ravel())
            at = torch.from_numpy(left)
            blocks = case.block_table[request].cpu().long()[at // size]
            for cache in (case.key_cache, case.value_cache):
                cache[blocks.to(DEVICE), (at % size).to(DEVICE), head] = torch.nan
    out = torch.full(case.query.shape, UNTOUCHED, dtype=case.query.dtype, device=DEVICE)
    caches = (case.key_cache, case.value_cache)
    rest = (case.block_table, case.starts, case.lengths, case.bits, out, case.scale)
    sparse_attention(case.plan, case.query, *caches, *rest, unit, *tensors(choices, case.plan.kv_heads, most))
    return out.cpu()


def expected(case: Case, choices: Choice, unit: int) -> torch.Tensor:
    chosen = []
    for size, (tail, heads) in zip(case.sizes, choices, strict=True):
        everything = np.arange(-(-tail // unit), dtype=np.int32)
        if size:
            chosen.append((tail, [everything if u is None else np.array(u, np.int32) for u in heads]))
    out = torch.full(case.query.shape, UNTOUCHED, dtype=case.query.dtype)
    plain = (case.plain_keys, case.plain_values, case.block_table.cpu())
    sparse_attention_reference(case.query.cpu(), *plain, case.trees, out, case.scale, unit, chosen)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["heads", "mixed"])
@pytest.mark.parametrize("splits", [1, 4])
def test_kernel_is_the_definition(dtype, layout, splits):
    contexts = (500, 40, 129, 310)
    case = make_case(1, (7, 0, 1, 20), contexts, dtype, group=3, layout=layout, splits=splits)
    choices = choose(1, case, contexts, 16, 0.4, 16)
    assert_same(run(case, choices, 16), expected(case, choices, 16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("unit", "block_size"), [(1, 16), (12, 48), (16, 784), (32, 32), (64, 64), (128, 256)])
def test_units_and_blocks(dtype, unit, block_size):
    contexts = (1100, 600)
    case = make_case(2, (6, 3), contexts, dtype, block_size, head_size=64, group=1, splits=2)
    choices = choose(2, case, contexts, unit, 0.3, unit)
    assert_same(run(case, choices, unit), expected(case, choices, unit))


@pytest.mark.parametrize("splits", [1, 3])
def test_counts_around_whole_tiles(splits):
    contexts = (1000,) * 6
    case = make_case(3, (3, 1, 2, 3, 1, 2), contexts, group=1, splits=splits)
    assert case.plan.tile == 128
    lists = [list(range(count)) for count in (0, 1, 7, 8, 9, 16, 17, 24, 15)]
    lists += [list(range(1, 59, 2)), list(range(59)), None]
    choices = [(944, lists[2 * i : 2 * i + 2]) for i in range(6)]
    assert_same(run(case, choices, 16), expected(case, choices, 16))


@pytest.mark.parametrize("tail", [0, 1, 63, 64, 127, 128, 129, 199, 200])
def test_tails_anywhere(tail):
    case = make_case(4, (4, 33), (200, 201), torch.float16, block_size=128, splits=2)
    units = list(range(0, tail // 16, 2))
    choices: Choice = [(tail, [units, None]), (tail, [[], units])]
    assert_same(run(case, choices, 16), expected(case, choices, 16))


def test_everything_is_the_tree_kernel():
    contexts = (300, 90)
    case = make_case(5, (5, 3), contexts, splits=3)
    whole = case.run()
    assert torch.equal(run(case, [(250, [None, None]), (16, [None, None])], 16), whole)
    assert torch.equal(run(case, [(0, [[], []]), (0, [[], []])], 16), whole)


def test_large_trees_and_head_sizes():
    contexts = (300, 40)
    for head_size in (80, 256):
        sizes = (129 if head_size == 80 else 17, 2)
        case = make_case(6, sizes, contexts, torch.float16, head_size=head_size, kv_heads=1, splits=2)
        choices = choose(6, case, contexts, 16, 0.5, 16)
        assert_same(run(case, choices, 16), expected(case, choices, 16))


def test_a_requests_result_is_the_same_to_the_bit_whatever_is_beside_it():
    contexts = (700, 40, 500)
    case, alone = (make_case(7, (7, 2, 12), contexts, torch.float16, splits=4) for _ in range(2))
    choices = choose(7, case, contexts, 16, 0.5, 16)
    together = run(case, choices, 16)
    alone.starts, alone.lengths, alone.block_table = alone.starts[2:], alone.lengths[2:], alone.block_table[2:]
    assert torch.equal(run(alone, choices[2:], 16)[9:21], together[9:21])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    shapes=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 500)), min_size=1, max_size=3),
    unit=st.sampled_from([4, 16, 32]),
    blocks=st.sampled_from([32, 96, 128]),
    splits=st.integers(1, 5),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    align=st.sampled_from([1, 32]),
    dtype=st.sampled_from(DTYPES),
)
def test_fuzz(seed, shapes, unit, blocks, splits, share, align, dtype):
    sizes, contexts = zip(*shapes, strict=True)
    if not any(sizes):
        return
    case = make_case(seed, sizes, contexts, dtype, blocks, group=2, splits=splits)
    choices = choose(seed, case, contexts, unit, share, align)
    assert_same(run(case, choices, unit), expected(case, choices, unit))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": 0}, "unit must divide the block size"),
        ({"unit": 12}, "unit must divide the block size"),
        ({"unit": 32}, "unit must divide the block size 16, got 32"),
        ({"chosen": torch.zeros(2, 2, 3)}, "chosen must be"),
        ({"chosen": torch.zeros(2, 3, 3, dtype=torch.int32)}, "chosen must be"),
        ({"chosen": torch.zeros(1, 2, 3, dtype=torch.int32)}, "chosen must have a row for each of 2"),
        ({"counts": torch.zeros(2, 1, dtype=torch.int32)}, "counts must be"),
        ({"counts": torch.zeros(1, 2, dtype=torch.int32)}, "counts must have a row"),
        ({"counts": torch.zeros(2, 4, dtype=torch.int32)[:, ::2]}, "counts must be contiguous"),
        ({"tails": torch.zeros(2, dtype=torch.int64)}, "tails must be"),
        ({"tails": torch.zeros(1, dtype=torch.int32)}, "tails must have a row"),
        ({"scale": -1.0}, "scale must be positive"),
    ],
)
def test_bad_arguments(change, message):
    case = make_case(8, (3, 2), (40, 50))
    chosen, counts, tails = tensors([(0, [[], []]), (0, [[], []])], 2, 3)
    given = (case.query, case.key_cache, case.value_cache, case.block_table, case.starts, case.lengths, case.bits)
    good = {"scale": 1.0, "unit": 16, "chosen": chosen, "counts": counts, "tails": tails}
    change = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        sparse_attention(case.plan, *given, torch.zeros_like(case.query), **{**good, **change})


def test_work():
    counted = work([104, 1], [4, 1], 8, 2, 64, torch.float16)
    assert counted.bytes == 2 * (2 * 105 * 2 * 64 + 2 * 5 * 8 * 64)
    assert counted.operations == 4 * 64 * 8 * (104 * 4 + 1)
