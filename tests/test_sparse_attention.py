"""Sparse attention on the CPU: units, summaries, the choice and the result, against their definitions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from cache_layouts import writer
from test_tree_attention import TOLERANCE, Case, make_case
from vllm_specplug.kernels.attention_tiles import CHOSEN
from vllm_specplug.kernels.block_select import (
    Selection,
    choose_reference,
    overlap,
    scores_reference,
    summarise,
    votes_reference,
)
from vllm_specplug.kernels.kv_cache_cpu import prepare_caches
from vllm_specplug.kernels.sparse_attention import sparse_attention_reference
from vllm_specplug.kernels.sparse_attention_cpu import UnitSummaries, prepare_choice
from vllm_specplug.kernels.tree_attention import build_trees, tree_attention_reference
from vllm_specplug.kernels.tree_attention_cpu import prepare_step, tree_attention_cpu

SMALL = Selection(unit=16, first=16, last=20, dense_below=32, ratio=0.3)


def run(case: Case, selection: Selection, shares: np.ndarray | None = None, layers: int = 1, sparse=None):
    """The kernel's result, what it chose, and the summaries, for a cache that every one of ``layers`` shares."""
    kv_heads = case.key_cache.shape[1]
    caches = prepare_caches([(case.key_cache, case.value_cache)] * layers, case.layout)
    sums = UnitSummaries(caches, selection)
    step = prepare_step(case.trees, case.block_table, case.layout)
    requests, contexts = case.trees.requests.tolist(), case.trees.contexts.tolist()
    entries = [
        sums.update(str(r), case.block_table[r].numpy(), c) if sparse is None or i in sparse else None
        for i, (r, c) in enumerate(zip(requests, contexts, strict=True))
    ]
    shares = np.ones((layers, kv_heads), np.float32) if shares is None else shares
    choice = prepare_choice(step, selection, entries, [shares] * len(entries))
    out = case.out.clone()
    args = (case.query, case.key_cache, case.value_cache, case.block_table, case.trees)
    tree_attention_cpu(*args, out, case.scale, -1, case.layout, step, choice.layer(layers - 1, True))
    return out, choice, sums


def expected(case: Case, selection: Selection, shares: np.ndarray | None = None):
    """The same by the definitions, from the cache as [blocks, slots, heads, size]."""
    kv_heads, block_size = case.key_cache.shape[1], case.layout.block_size
    group = case.query.shape[1] // kv_heads
    chosen = []
    starts, sizes, contexts, requests = (t.tolist() for t in case.trees[:4])
    for start, size, context, request in zip(starts, sizes, contexts, requests, strict=True):
        tail = selection.tail_block(context, block_size) * block_size
        slots = torch.arange(tail)
        keys = case.plain_keys[case.block_table[request].long()[slots // block_size], slots % block_size]
        units = keys.reshape(-1, selection.unit, kv_heads, keys.shape[-1]).permute(2, 0, 1, 3)
        sums = summarise(units, selection.summary)
        rows = case.query[start : start + (size if selection.all_rows else 1), : kv_heads * group]
        votes = votes_reference(rows, sums, case.scale, selection.by_head)
        of = np.ones(kv_heads) if shares is None else shares
        counts = np.array([selection.units(context, block_size, float(s)) for s in of], np.int32)
        chosen.append((tail, choose_reference(votes, counts, -(-selection.first // selection.unit))))
    out = case.out.clone()
    keys, values = case.plain_keys, case.plain_values
    sparse_attention_reference(
        case.query, keys, values, case.block_table, case.trees, out, case.scale, selection.unit, chosen
    )
    return out, chosen


def test_budget_is_the_whole_context_up_to_the_threshold_and_a_share_beyond():
    selection = Selection(dense_below=1000, ratio=0.25)
    assert [selection.budget(n) for n in (10, 1000, 1400, 5000)] == [10, 1000, 1100, 2000]
    # 5,000 tokens: the tail begins at slot 4,864 and takes 136 of the 2,000.
    assert selection.units(5000, 128) == math.ceil((2000 - 136) / 32)
    assert selection.units(5000, 128, share=0.0) == 1
    assert selection.units(900, 128) == 768 // 32 == selection.units(900, 128, share=9.0)


def test_minmax_bounds_every_key_and_mean_is_the_mean_score():
    torch.manual_seed(0)
    keys, query = torch.randn(2, 5, 16, 8), torch.randn(3, 4, 8)
    true = torch.einsum("rhd,hukd->hruk", query, keys.repeat_interleave(2, 0))
    assert (scores_reference(query, summarise(keys, "minmax")) >= true.amax(-1) - 1e-5).all()
    torch.testing.assert_close(scores_reference(query, summarise(keys, "mean")), true.mean(-1))
    both = [scores_reference(query, summarise(keys, name)) for name in ("minmax", "mean")]
    torch.testing.assert_close(scores_reference(query, summarise(keys, "halfway")), sum(both) / 2)


def test_overlap_is_jaccard():
    a, b = (torch.tensor([[i in units for i in range(5)]]) for units in ((1, 2, 3), (2, 3, 4)))
    assert overlap(a, b) == 0.5
    assert overlap(a & False, b & False) == 1.0
    assert overlap(torch.cat([a, a]), torch.cat([a, b])) == 0.75


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["vec", "pairs", "shuffled"])
@pytest.mark.parametrize(
    "selection",
    [
        SMALL,
        dataclasses.replace(SMALL, summary="mean", by_head=True),
        dataclasses.replace(SMALL, unit=32, all_rows=True, first=1, summary="minmax"),
        dataclasses.replace(SMALL, by_head=True, all_rows=True, ratio=0.6),
    ],
    ids=["halfway", "mean-by-head", "minmax-unit32-all-rows", "by-head-all-rows"],
)
def test_kernel_chooses_and_attends_as_defined(dtype, layout, selection):
    case = make_case(3, dtype, layout, block_size=32, head_size=32, group=3, sizes=(6, 1, 9), contexts=(250, 133, 60))
    out, choice, sums = run(case, selection)
    wanted, chosen = expected(case, selection)
    for tree, (tail, units) in enumerate(chosen):
        assert choice.tails[tree] * 32 == tail
        for head, found in enumerate(units):
            count = choice.chosen[tree, head, 0]
            assert choice.chosen[tree, head, 1 : 1 + count].tolist() == found.tolist()
    assert 0 < choice.attended() < 1
    torch.testing.assert_close(out, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    sums.check()


def test_shares_give_heads_their_own_budgets():
    case = make_case(5, sizes=(4,), contexts=(400,), kv_heads=3)
    shares = np.array([0.0, 1.0, 9.0], np.float32)
    out, choice, _ = run(case, SMALL, shares[None])
    wanted, chosen = expected(case, SMALL, shares)
    first, middle, last = (len(u) for u in chosen[0][1])
    assert choice.counts[0, 0].tolist() == [first, middle, last]
    assert first == 1 < middle < last == choice.units[0]
    torch.testing.assert_close(out, wanted, atol=3e-6, rtol=3e-6)


def test_exact_values_attend_everything():
    case = make_case(7, sizes=(5, 3), contexts=(300, 90))
    full = case.out.clone()
    args = (case.plain_keys, case.plain_values, case.block_table, case.trees)
    tree_attention_reference(case.query, *args, full, case.scale)
    for selection in (dataclasses.replace(SMALL, ratio=1.0), dataclasses.replace(SMALL, dense_below=300)):
        out, choice, _ = run(case, selection)
        assert choice.dense.all() and choice.attended() == 1.0
        torch.testing.assert_close(out, full, atol=3e-6, rtol=3e-6)


def test_some_trees_attend_everything_beside_sparse_ones():
    case = make_case(8, sizes=(5, 3), contexts=(300, 290))
    out, choice, sums = run(case, SMALL, sparse=[1])
    wanted, _ = expected(case, SMALL)
    full = case.out.clone()
    args = (case.plain_keys, case.plain_values, case.block_table, case.trees)
    tree_attention_reference(case.query, *args, full, case.scale)
    first = slice(int(case.trees.starts[0]), int(case.trees.starts[0]) + 5)
    wanted[first] = full[first]
    assert len(sums) == 1 and choice.chosen[0, 0, 0] == -1
    torch.testing.assert_close(out, wanted, atol=3e-6, rtol=3e-6)


def test_layers_between_anchors_take_over_the_choice():
    case = make_case(9, sizes=(4,), contexts=(400,))
    out, choice, _ = run(case, SMALL, layers=3)
    kept = choice.chosen.copy()
    args = (case.query * -1, case.key_cache, case.value_cache, case.block_table, case.trees)
    tree_attention_cpu(*args, out, case.scale, -1, case.layout, choice.step, choice.layer(1, False))
    assert (choice.chosen == kept).all()
    tree_attention_cpu(*args, out, case.scale, -1, case.layout, choice.step, choice.layer(2, True))
    assert (choice.chosen != kept).any()
    choice.dense[1] = True
    choice.layer(1, False)
    assert choice.step.call[CHOSEN] == 0


def write(case: Case, request: int, at: int, count: int) -> None:
    """Write new keys and values to ``count`` slots of a request from slot ``at`` on."""
    slots = torch.arange(at, at + count)
    flat = case.block_table[request].long()[slots // 32] * 32 + slots % 32
    keys, values = torch.randn(2, count, case.key_cache.shape[1], 32)
    writer(case.layout.keys, case.layout.values)(keys, values, case.key_cache, case.value_cache, flat)


def test_summaries_follow_growth_rollback_and_other_blocks():
    torch.manual_seed(1)
    case = make_case(11, sizes=(2,), contexts=(300,))
    sums = UnitSummaries(prepare_caches([(case.key_cache, case.value_cache)], case.layout), SMALL)
    table = case.block_table[0].numpy().copy()
    sums.update("a", table, 100)
    ((_, entry),) = sums.book.items()
    assert entry.units == 64 // 16  # the tail begins at block 2 = (100 - 20) // 32
    sums.update("a", table, 250)
    assert entry.units == 224 // 16
    sums.check()
    # A verify step writes beyond the context only: nothing to do.
    write(case, 0, 250, 6)
    sums.check()
    # Blocks that are written again are known by their first slot.
    write(case, 0, 100, 30)
    with pytest.raises(AssertionError, match="request a, layer 0, unit 6"):
        sums.check()
    sums.rewind("a", 100)
    read = sums.book.units_read
    sums.update("a", table, 250)
    assert sums.book.units_read - read == 14 - 6
    sums.check()
    # A request that came back after a preemption has other blocks.
    table[[1, 4]] = table[[4, 1]]
    sums.update("a", table, 250)
    assert sums.book.resets == 1
    sums.check()
    size = sums.bytes
    sums.update("b", table, 300)
    assert len(sums) == 2 and sums.bytes > size
    sums.drop(["a", "unknown"])
    assert len(sums) == 1
    sums.check()


def test_summaries_grow_beyond_their_first_room():
    case = make_case(12, sizes=(2,), contexts=(2100,), block_size=32)
    sums = UnitSummaries(prepare_caches([(case.key_cache, case.value_cache)], case.layout), SMALL)
    table = case.block_table[0].numpy()
    for context in (300, 1000, 1500, 2100):
        sums.update("a", table, context)
    ((_, entry),) = sums.book.items()
    assert entry.units == 2080 // 16
    sums.check()


def test_units_must_fit_the_blocks():
    case = make_case(1, sizes=(2,))
    caches = prepare_caches([(case.key_cache, case.value_cache)], case.layout)
    for unit in (24, 64):
        with pytest.raises(ValueError, match=f"units of {unit} tokens do not fit blocks of 32"):
            UnitSummaries(caches, Selection(unit=unit))


def test_a_tree_of_one_row_is_allowed():
    one = np.ones(1, np.int32)
    assert build_trees(one - 1, one, one, one - 1, one - 2).visible.tolist() == [[1]]
