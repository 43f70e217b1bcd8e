"""Units of a long context on the device: summaries, votes and the choice against their definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.kernels import block_select_triton, block_summary_triton
from vllm_specplug.kernels.block_select import SUMMARIES, choose_reference, summarise, votes_reference
from vllm_specplug.kernels.block_select_triton import (
    MOST_UNITS,
    Workspace,
    block_select,
    block_summary,
    select_work,
    summary_work,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: bfloat16 on a GPU only, for the interpreter multiplies it wrongly.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
#: Largest relative difference of a summary: both sum in float32 and round once.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
#: Largest relative difference of a vote: scores up to about 20 are sums of products in float32, their exponentials as
#: much off, relatively, as they are absolutely. A mean query as two bfloat16 numbers is off by 2^-17 at most.
VOTES = {torch.float32: 3e-5, torch.float16: 3e-5, torch.bfloat16: 2e-4}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def paged(rng, requests, max_blocks):
    """A block table in no order, and how many blocks there are; one belongs to nobody."""
    blocks = requests * max_blocks + 1
    table = rng.permutation(blocks)[: requests * max_blocks].reshape(requests, max_blocks)
    return torch.from_numpy(table.astype(np.int32)).to(DEVICE), blocks


# --- summaries ---


def summarised(case_keys, table, begins, ends, summary, unit, dtype, most_units):
    """What `block_summary` leaves in summaries full of 9, contiguous in their last dimension only."""
    blocks, block_size, kv_heads, head_size = case_keys.shape
    parts = 1 if summary == "mean" else 2
    wide = torch.full((blocks, kv_heads, block_size // unit, parts + 1, head_size + 3), 9.0, dtype=dtype, device=DEVICE)
    found = wide[..., :parts, :head_size].permute(0, 2, 1, 3, 4)
    block_summary(case_keys, found, table, int32(*begins), int32(*ends), summary, most_units)
    assert (wide[..., parts:, :] == 9).all() and (wide[..., head_size:] == 9).all()
    return found


def wanted_summaries(keys, table, begins, ends, summary, unit, dtype):
    blocks, block_size, kv_heads, head_size = keys.shape
    parts = 1 if summary == "mean" else 2
    wanted = torch.full((blocks, block_size // unit, kv_heads, parts, head_size), 9.0, dtype=dtype)
    for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        for number in range(begin, min(end, table.shape[1] * block_size // unit)):
            block, within = int(table[i, number * unit // block_size]), number % (block_size // unit)
            slots = keys[block, within * unit : (within + 1) * unit].cpu().transpose(0, 1)
            wanted[block, within] = summarise(slots, summary).to(dtype)
    return wanted


def keys_of(rng, dtype, blocks, block_size, kv_heads, head_size, layout):
    keys = torch.from_numpy(rng.standard_normal((blocks, block_size, kv_heads, head_size))).to(dtype)
    if layout == "heads first":
        return keys.transpose(1, 2).contiguous().to(DEVICE).transpose(1, 2)
    # Keys and values in one tensor, as vLLM's caches.
    return torch.stack([keys, torch.full_like(keys, math.nan)], 1).to(DEVICE)[:, 0]


def assert_summaries(found, wanted):
    assert torch.equal((found == 9).cpu(), wanted == 9), "units other than those asked for were written, or not all"
    torch.testing.assert_close(found.cpu().float(), wanted.float(), rtol=ROUNDING[wanted.dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize(
    ("block_size", "unit", "kv_heads", "head_size"),
    [(32, 16, 2, 32), (64, 64, 1, 80), (15, 5, 3, 20), (4, 1, 2, 7), (256, 128, 1, 128)],
)
def test_summaries_of_units(summary, dtype, block_size, unit, kv_heads, head_size):
    layout = "heads first" if block_size in (15, 32) else "slots first"
    rng = np.random.default_rng(block_size)
    table, blocks = paged(rng, 3, 2)
    keys = keys_of(rng, dtype, blocks, block_size, kv_heads, head_size, layout)
    most = 2 * block_size // unit
    # All units, a range over a block boundary, none.
    begins, ends = (0, most // 2 - 1, 1), (most, most // 2 + 1, 1)
    for out in {dtype, torch.float32}:
        found = summarised(keys, table, begins, ends, summary, unit, out, most)
        assert_summaries(found, wanted_summaries(keys, table, begins, ends, summary, unit, out))


@pytest.mark.parametrize("most_units", [1, 3, 100])
def test_more_units_than_programs_are_looped_over(most_units, monkeypatch):
    monkeypatch.setattr(block_summary_triton, "_PROGRAMS", 1)
    rng = np.random.default_rng(5)
    table, blocks = paged(rng, 4, 2)
    keys = keys_of(rng, torch.float16, blocks, 22, 1, 4, "slots first")
    # The last reaches behind the block table.
    args = keys, table, (1, 5, 0, 0), (22, 5, 1, 1000), "halfway", 2, torch.float16
    assert_summaries(summarised(*args, most_units), wanted_summaries(*args))


def test_ranges_may_be_empty_in_any_way():
    rng = np.random.default_rng(6)
    table, blocks = paged(rng, 3, 2)
    keys = keys_of(rng, torch.float32, blocks, 8, 1, 4, "slots first")
    found = summarised(keys, table, (3, 0, 4), (1, -1, 4), "mean", 4, torch.float32, 4)
    assert (found == 9).all()
    nobody = torch.empty(0, 2, dtype=torch.int32, device=DEVICE)
    block_summary(keys, found, nobody, int32(), int32(), "mean", 4)


def test_bounds_in_the_caches_dtype_are_exact():
    rng = np.random.default_rng(7)
    table, blocks = paged(rng, 1, 1)
    keys = keys_of(rng, torch.float16, blocks, 32, 2, 16, "slots first")
    found = summarised(keys, table, (0,), (1,), "minmax", 32, torch.float16, 1)[int(table[0, 0]), 0]
    own = keys[int(table[0, 0])]
    assert torch.equal(found, torch.stack([own.amax(0), own.amin(0)], 1))


# --- the choice ---


@dataclass
class Case:
    query: torch.Tensor
    starts: torch.Tensor
    summaries: torch.Tensor
    table: torch.Tensor
    units: torch.Tensor
    counts: torch.Tensor
    scale: float
    first: int

    def of_request(self, i):
        """Its summaries, ``[kv_heads, units, parts, head_size]``."""
        upb = self.summaries.shape[1]
        number = torch.arange(int(self.units[i]))
        blocks = self.table[i].cpu().long()[number // upb]
        return self.summaries.cpu()[blocks, number % upb].float().transpose(0, 1)


def make_case(
    seed,
    dtype=torch.float32,
    kind=None,
    units=(9,),
    rows=(1,),
    kv_heads=2,
    group=2,
    head_size=16,
    parts=2,
    per_block=2,
    first=1,
    counts=None,
    copies=1,
):
    """``copies``: so many units after one another are equal."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    most = max([1, *(-(-u // per_block) for u in units)])
    table, blocks = paged(rng, len(units), most)
    wide = torch.full((blocks, per_block, kv_heads, parts + 1, head_size), math.nan)
    for i, number in enumerate(units):
        for unit in range(number):
            means = torch.randn(kv_heads, 1, head_size)
            if unit % copies == 0:
                new = means + (torch.tensor([[0.6], [-0.6]]) if parts == 2 else torch.zeros(1, 1))
            wide[int(table[i, unit // per_block]), unit % per_block, :, :parts] = new
    summaries = wide.to(kind or dtype).to(DEVICE)[:, :, :, :parts]
    starts = np.cumsum([2, *rows])
    # Query heads are a slice of a wider row; rows of no request are NaN.
    query = torch.full((int(starts[-1]) + 3, kv_heads * group + 2, head_size), math.nan)
    query[2 : int(starts[-1])] = torch.randn(int(starts[-1]) - 2, kv_heads * group + 2, head_size) * 2
    if counts is None:
        counts = [[int(rng.integers(0, u + 1)) for _ in range(kv_heads)] for u in units]
    return Case(
        query.to(dtype).to(DEVICE)[:, : kv_heads * group],
        int32(*starts.tolist()),
        summaries,
        table,
        int32(*units),
        torch.tensor(counts, dtype=torch.int32, device=DEVICE).reshape(len(units), kv_heads),
        head_size**-0.5,
        first,
    )


def run(case, by_head=False, all_rows=False, width=None, most=None):
    """The choice, and the votes it was made by; everything that is not written stays poison."""
    count, kv_heads = case.counts.shape
    heads, head_size = case.query.shape[1:]
    width = int(case.units.max()) + 2 if width is None else width
    chosen = torch.full((count, kv_heads, width), -77, dtype=torch.int32, device=DEVICE)
    space = Workspace(count + 1, heads, kv_heads, head_size, most or max(1, int(case.units.max())), DEVICE)
    for name in ("scores", "maxima", "sums", "votes", "means"):
        getattr(space, name).fill_(math.nan)
    block_select(
        *(case.query, case.starts, case.summaries, case.table, case.units, case.counts, chosen, space),
        *(case.scale, case.first, by_head, all_rows),
    )
    return chosen.cpu(), space


def assert_chosen(case, by_head=False, all_rows=False, width=None):
    found, space = run(case, by_head, all_rows, width)
    width = found.shape[2]
    for i, units in enumerate(case.units.tolist()):
        start, end = case.starts[i : i + 2].tolist()
        counts = case.counts[i].clamp(max=min(units, width)).tolist()
        voted = [case.first < c < units for c in counts]
        votes = torch.zeros(len(counts), units)
        if any(voted) and end > start:
            rows = case.query[start : end if all_rows else start + 1].cpu()
            votes = votes_reference(rows, case.of_request(i), case.scale, by_head)
        for head, count in enumerate(counts):
            own = found[i, head].tolist()
            if count < 0 or start == end:
                assert own == [-1] * width
                continue
            kernels = space.votes[i, head if by_head else 0, :units].cpu()
            if voted[head]:
                torch.testing.assert_close(kernels, votes[head], rtol=VOTES[case.summaries.dtype], atol=1e-9)
            # By the kernel's own votes, for rounding may change the order of the reference's.
            used = kernels if voted[head] else votes[head]
            (wanted,) = choose_reference(used[None], np.array([count], np.int32), min(case.first, count))
            assert own == [*wanted.tolist(), *[-1] * (width - count)]
            # The same number of units with as many votes by the reference.
            (best,) = choose_reference(votes[head][None], np.array([count], np.int32), min(case.first, count))
            ours, theirs = votes[head][torch.from_numpy(wanted)].sum(), votes[head][torch.from_numpy(best)].sum()
            assert ours >= theirs * (1 - VOTES[case.summaries.dtype])


@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        dict(units=(9, 64, 65), rows=(1, 3, 2)),
        dict(units=(130, 0, 7), rows=(17, 2, 1), kv_heads=1, group=7, head_size=20, parts=1, per_block=1),
        dict(units=(40,), rows=(4,), kv_heads=3, group=1, head_size=80, per_block=8, first=0),
        dict(units=(63, 5), rows=(0, 33), kv_heads=2, group=17, per_block=3, first=4),
    ],
    ids=["plain", "mean of 7 heads", "one head each", "17 heads"],
)
def test_choice_is_the_references(shape, dtype, by_head, all_rows):
    assert_chosen(make_case(1, dtype, **shape), by_head, all_rows)


@pytest.mark.parametrize("by_head", [False, True])
def test_narrow_rows_with_float32_summaries_and_wide_rows_with_narrow_ones(by_head):
    shape = dict(units=(70, 20), rows=(3, 1))
    assert_chosen(make_case(2, torch.float16, torch.float32, **shape), by_head, True)
    assert_chosen(make_case(2, torch.float32, torch.float16, **shape), by_head, False)
    assert_chosen(make_case(2, torch.float32, torch.float16, **shape), by_head, True)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("count", [-1, 0, 1, 2, 3, 9, 10, 11, 99])
def test_every_count(count, by_head):
    case = make_case(3, units=(10, 10), rows=(1, 1), counts=[[count, 4], [count, count]], first=2)
    assert_chosen(case, by_head)


def test_heads_differ_by_their_own_vote_alone():
    case = make_case(4, units=(60,), counts=[[20, 20]])
    one, _ = run(case)
    own, _ = run(case, by_head=True)
    assert torch.equal(one[0, 0], one[0, 1])
    assert not torch.equal(own[0, 0], own[0, 1])


def test_nothing_is_read_where_no_vote_is_needed():
    """Summaries of such requests are NaN, and their block table points nowhere."""
    case = make_case(5, units=(10, 12, 8, 30), rows=(1, 0, 1, 2), counts=[[10, 1], [5, 5], [-1, -1], [4, -1]])
    case.table[:3] = 2**30
    found, space = run(case)
    assert found[0, 0].tolist() == [*range(10), *[-1] * 22]
    assert found[0, 1].tolist() == [0, *[-1] * 31]
    assert (found[1:3] == -1).all() and (found[3, 1] == -1).all()
    assert (found[3, 0, :4] >= 0).all() and (found[3, 0, 4:] == -1).all()
    assert space.votes[:3].isnan().all()
    assert_chosen(case)


@pytest.mark.parametrize("by_head", [False, True])
def test_equal_units_the_earlier_first(by_head):
    case = make_case(6, units=(60,), counts=[[31, 17]], copies=60, first=3)
    found, _ = run(case, by_head)
    assert found[0, 0, :31].tolist() == list(range(31))
    assert found[0, 1, :17].tolist() == list(range(17))
    assert_chosen(make_case(7, torch.float16, units=(60, 66), rows=(1, 1), copies=8), by_head)


def test_a_choice_narrower_than_its_counts_and_a_workspace_smaller_than_the_units():
    case = make_case(8, units=(20, 12), rows=(1, 1), counts=[[20, 15], [12, 3]])
    assert_chosen(case, width=7)
    assert_chosen(case, by_head=True, width=7)
    found, _ = run(case, most=11)
    short = make_case(8, units=(20, 12), rows=(1, 1), counts=[[11, 11], [11, 3]])
    short.units = int32(11, 11)
    wanted, _ = run(short, most=11, width=22)
    assert torch.equal(found, wanted)


def test_many_requests():
    units = [int(u) for u in np.random.default_rng(9).integers(0, 20, 64)]
    rows = [i % 4 for i in range(64)]
    assert_chosen(make_case(9, torch.float16, units=units, rows=rows, kv_heads=1, group=2))


def test_most_units_of_one_request(monkeypatch):
    """Tiles of scores and votes are looped over."""
    monkeypatch.setattr(block_select_triton, "programs_for", lambda others, most: min(most, 5))
    case = make_case(
        10, torch.float16, units=(8192, 70), rows=(2, 1), kv_heads=1, group=2, per_block=64, parts=1, copies=16
    )
    case.counts[0] = 1700
    assert_chosen(case, all_rows=True)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    count = draw(st.integers(1, 4))
    units = draw(st.lists(st.integers(0, 70), min_size=count, max_size=count))
    kv_heads = draw(st.integers(1, 3))
    case = make_case(
        draw(st.integers(0, 99)),
        draw(st.sampled_from(DTYPES)),
        units=units,
        rows=draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)),
        kv_heads=kv_heads,
        group=draw(st.integers(1, 5)),
        head_size=draw(st.sampled_from([8, 16, 33])),
        parts=draw(st.integers(1, 2)),
        per_block=draw(st.sampled_from([1, 2, 5])),
        first=draw(st.integers(0, 4)),
        counts=[draw(st.lists(st.integers(-1, u + 2), min_size=kv_heads, max_size=kv_heads)) for u in units],
        copies=draw(st.sampled_from([1, 1, 4])),
    )
    assert_chosen(case, draw(st.booleans()), draw(st.booleans()))


# --- what is wrong is named ---


def test_wrong_arguments_of_summaries():
    table, blocks = paged(np.random.default_rng(0), 2, 2)
    good = dict(
        key_cache=torch.zeros(blocks, 8, 2, 4, device=DEVICE),
        summaries=torch.zeros(blocks, 2, 2, 1, 4, device=DEVICE),
        block_table=table,
        begins=int32(0, 0),
        ends=int32(1, 1),
        summary="mean",
        most_units=4,
    )
    block_summary(**good)
    for name, value, message in [
        ("summary", "median", "summary must be one of"),
        ("most_units", 0, "most_units must be at least 1"),
        ("key_cache", good["key_cache"].double(), "key_cache must be"),
        ("key_cache", good["key_cache"].transpose(2, 3), "last dimension must be contiguous"),
        ("summaries", good["summaries"].half(), "summaries must be"),
        ("summaries", torch.zeros(blocks, 2, 2, 2, 4, device=DEVICE), "summaries must be"),
        ("summaries", torch.zeros(blocks, 3, 2, 1, 4, device=DEVICE), "do not divide 8 slots"),
        ("block_table", table.long(), "block_table must be"),
        ("begins", int32(0), "begins must be"),
        ("ends", int32(0, 0, 0), "ends must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            block_summary(**{**good, name: value})


def test_wrong_arguments_of_the_choice():
    case = make_case(11, units=(9, 4), rows=(1, 1))
    good = dict(
        query=case.query,
        query_starts=case.starts,
        summaries=case.summaries,
        block_table=case.table,
        units=case.units,
        counts=case.counts,
        chosen=torch.zeros(2, 2, 5, dtype=torch.int32, device=DEVICE),
        workspace=Workspace(2, 4, 2, 16, 9, DEVICE),
        scale=1.0,
        first=1,
    )
    block_select(**good)
    for name, value, message in [
        ("query", case.query.double(), "query must be"),
        ("query", case.query[:, :3], "3 query heads cannot share 2 KV heads"),
        ("query_starts", case.starts[:2], "query_starts must be"),
        ("summaries", case.summaries[..., :8], "summaries must be"),
        ("summaries", case.summaries.repeat(1, 1, 1, 2, 1), "1 or 2 parts"),
        ("block_table", case.table[0], "block_table must be"),
        ("units", case.units.long(), "units must be"),
        ("counts", case.counts[:, :1], "counts must be"),
        ("chosen", torch.zeros(2, 1, 5, dtype=torch.int32, device=DEVICE), "chosen must be"),
        ("first", -1, "first must not be negative"),
        ("workspace", Workspace(1, 4, 2, 16, 9, DEVICE), "workspace is for 1 requests"),
        ("workspace", Workspace(2, 4, 1, 16, 9, DEVICE), "workspace is for 2 requests, 4 heads of 16, 1 KV heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            block_select(**{**good, name: value})
    with pytest.raises(ValueError, match=f"most_units must be 1 to {MOST_UNITS}, got 0"):
        Workspace(1, 2, 1, 16, 0, DEVICE)


def test_work_counts_what_is_read_and_written():
    assert summary_work(10, 32, 8, 128, "mean", 2, 2) == (10 * 8 * 128 * 2 * 33, 10 * 32 * 8 * 128)
    assert summary_work(1, 4, 1, 8, "minmax", 2, 4) == (4 * 8 * 2 + 2 * 8 * 4, 3 * 32)
    moved, operations = select_work([100, 50], [1, 2], 8, 2, 2, 64, 2)
    assert moved == 150 * 2 * (2 * 64 * 2 + 4) + 3 * 8 * 64 * 2
    assert operations == 2 * 150 * 8 * 2 * 64
