"""A pool's vote as an edit of the router's logits, on the device, against its definition."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.kernels import expert_vote_triton
from vllm_specplug.kernels.expert_vote import Edit, edit_routing, softmax_route, vote
from vllm_specplug.kernels.expert_vote_triton import MOST_EXPERTS, Workspace, expert_vote, work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Largest relative difference of float32 sums of softmax weights to float64 ones.
SUMS = 1e-5


def logits_of(seed, rows, experts, dtype=torch.float32):
    return (torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed)) * 1.5).to(dtype)


def run(logits, pools, top_k, budget, renormalize, in_place=False, kept=True):
    """Edited logits, who is allowed, and what is kept; rows of no pool stay as they were."""
    rows, experts = logits.shape
    wide = torch.full((rows, experts + 5), 7.0, dtype=logits.dtype, device=DEVICE)
    given = wide[:, :experts]
    given.copy_(logits)
    out = given if in_place else torch.full((rows, experts + 1), 7.0, dtype=logits.dtype, device=DEVICE)[:, :experts]
    count = len(pools) - 1
    allowed = torch.full((count + 1, experts), 77, dtype=torch.uint8, device=DEVICE)
    shares = torch.full((rows + 1,), 7.0, device=DEVICE)
    space = Workspace(rows + 1, experts, DEVICE)
    space.weights.fill_(math.nan)
    starts = torch.tensor(pools, dtype=torch.int32, device=DEVICE)
    expert_vote(given, starts, out, allowed[:count], space, top_k, budget, renormalize, shares[:rows] if kept else None)
    assert (wide[:, experts:] == 7).all() and (allowed[count] == 77).all() and shares[rows] == 7
    assert in_place or torch.equal(given.cpu(), logits)
    outside = torch.ones(rows, dtype=torch.bool)
    outside[pools[0] : pools[-1]] = False
    assert space.weights[:rows].cpu()[outside].isnan().all()
    left = logits if in_place else torch.full_like(logits, 7.0)
    assert torch.equal(out.cpu()[outside], left[outside])
    assert (shares[:rows].cpu()[outside | (not kept)] == 7).all()
    assert ((allowed[:count] == 0) | (allowed[:count] == 1)).all()
    return out.cpu(), allowed[:count].cpu().bool(), shares[:rows].cpu()


def assert_edited(logits, pools, top_k, budget, renormalize, **more):
    out, allowed, kept = run(logits, pools, top_k, budget, renormalize, **more)
    assert (allowed.sum(1) == budget).all()
    weights, ids = softmax_route(logits, top_k, renormalize)
    inside = slice(pools[0], pools[-1])
    best = vote(weights, ids, pools, logits.shape[1], budget)
    of_row = torch.zeros(len(logits), logits.shape[1], dtype=torch.bool)
    for pool, (start, end) in enumerate(itertools.pairwise(pools)):
        votes = torch.zeros(logits.shape[1], dtype=torch.float64)
        votes.index_add_(0, ids[start:end].flatten().long(), weights[start:end].flatten().double())
        # As many votes as the best choice has, and where the choice is clear it is the same.
        assert votes[allowed[pool]].sum() >= votes[best[pool]].sum() * (1 - SUMS)
        if budget < logits.shape[1]:
            least, most = votes[allowed[pool]].min(), votes[~allowed[pool]].max()
            assert least >= most * (1 - SUMS)
            if votes[best[pool]].min() > votes[~best[pool]].max() * (1 + SUMS):
                assert torch.equal(allowed[pool], best[pool])
        of_row[start:end] = allowed[pool]
    edited = logits.masked_fill(~of_row, -math.inf)
    assert torch.equal(out[inside], edited[inside])
    if more.get("kept", True):
        shares = (edited[inside].float().logsumexp(1) - logits[inside].float().logsumexp(1)).exp()
        torch.testing.assert_close(kept[inside], shares, rtol=1e-5, atol=1e-6)
    return out, allowed, best


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "experts", "top_k", "budget"),
    [(1, 8, 2, 4), (5, 24, 12, 13), (9, 60, 4, 1), (20, 128, 8, 40), (4, 4, 4, 4), (3, 8, 1, 2), (7, 512, 16, 100)],
)
def test_choice_is_the_votes(rows, experts, top_k, budget, dtype, renormalize):
    logits = logits_of(rows, rows + 3, experts, dtype)
    # A row before and two behind belong to no pool; the pool in the middle is empty.
    pools = [1, 1 + rows // 3, 1 + rows // 3, 1 + rows]
    assert_edited(logits, pools, top_k, budget, renormalize, in_place=renormalize, kept=dtype == torch.float32)


def test_pools_larger_than_a_tile_are_shared_among_programs(monkeypatch):
    logits = logits_of(1, 129, 16)
    for rows, shares in ((4, 8), (64, 8), (64, 1)):
        monkeypatch.setattr(expert_vote_triton, "_ROWS", rows)
        monkeypatch.setattr(expert_vote_triton, "_MOST_SHARES", shares)
        assert_edited(logits, [0, 129], 4, 5, False)
        assert_edited(logits, [3, 35, 36, 128], 4, 5, True, in_place=True)


def test_many_pools():
    logits = logits_of(2, 128, 12)
    assert_edited(logits, list(range(0, 129, 2)), 3, 5, False, in_place=True)


@pytest.mark.parametrize("experts", [8, 20])
def test_equal_sums_the_smaller_index(experts):
    """Weights of a quarter each, whose sums are exact."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.full((40, experts), -1000.0)
    for row in logits:
        row[torch.randperm(experts, generator=generator)[:4]] = 3.0
    pools = [0, 1, 3, 3, 10, 40]
    for budget in (1, 2, 5, experts - 1, experts):
        for renormalize in (False, True):
            _, allowed, best = assert_edited(logits, pools, 4, budget, renormalize)
            assert torch.equal(allowed, best)
    # No votes at all, and equal logits of which the first top k vote.
    _, allowed, best = assert_edited(torch.zeros(6, experts), [0, 0, 6], 4, 6, True)
    assert allowed.tolist() == best.tolist() == [[True] * 6 + [False] * (experts - 6)] * 2


def test_fewer_experts_than_top_k_may_be_left_by_the_logits():
    logits = torch.full((2, 8), -math.inf)
    logits[:, 5:7] = torch.tensor([[1.0, 2.0], [4.0, -3.0]])
    out, allowed, _ = run(logits, [0, 2], 4, 1, True)
    assert allowed[0].tolist() == [False] * 5 + [True] + [False] * 2
    assert out[:, 5].tolist() == [1.0, 4.0] and out.isinf().sum() == 14


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_hosts_routing_of_edited_logits_is_the_edited_routing(renormalize):
    logits = logits_of(4, 24, 32)
    pools = [0, 8, 9, 24]
    edit = Edit(share=0.4)
    out, allowed, kept = run(logits, pools, 4, edit.budget(32), renormalize, in_place=True)
    own = softmax_route(logits, 4, renormalize)
    assert torch.equal(allowed, vote(*own, pools, 32, edit.budget(32)))
    weights, ids = softmax_route(out, 4, renormalize)
    route = functools.partial(softmax_route, top_k=4, renormalize=renormalize)
    wanted, wanted_ids, _ = edit_routing(route, logits, pools, edit, renormalize, softmax=True)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights if renormalize else weights * kept[:, None], wanted, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    rows, experts = draw(st.integers(1, 24)), draw(st.integers(1, 40))
    pools = sorted(draw(st.lists(st.integers(0, rows), min_size=1, max_size=5)))
    logits = logits_of(draw(st.integers(0, 99)), rows, experts, draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        logits = logits.round()  # many equal ones
    top_k, budget = draw(st.integers(1, min(experts, 9))), draw(st.integers(1, experts))
    assert_edited(logits, pools, top_k, budget, draw(st.booleans()), in_place=draw(st.booleans()))


def test_wrong_arguments():
    logits = torch.zeros(4, 8, device=DEVICE)
    good = dict(
        logits=logits,
        pools=torch.tensor([0, 4], dtype=torch.int32, device=DEVICE),
        out=logits.clone(),
        allowed=torch.zeros(1, 8, dtype=torch.uint8, device=DEVICE),
        workspace=Workspace(4, 8, DEVICE),
        top_k=2,
        budget=3,
        renormalize=True,
        kept=torch.zeros(4, device=DEVICE),
    )
    expert_vote(**good)
    wide = torch.zeros(1, MOST_EXPERTS + 1, device=DEVICE)
    for changed, message in [
        (dict(logits=logits.double()), "logits must be"),
        (dict(logits=torch.zeros(8, 4, device=DEVICE).T), "logits's last dimension must be contiguous"),
        (dict(pools=good["pools"].long()), "pools must be"),
        (dict(pools=good["pools"][:0]), "pools must have at least 1 entry"),
        (dict(out=logits.half()), "out must be"),
        (dict(out=logits[:, :7]), "out must be"),
        (dict(allowed=good["allowed"].bool()), "allowed must be"),
        (dict(workspace=Workspace(3, 8, DEVICE)), "workspace is for 3 rows, got 4"),
        (dict(workspace=Workspace(4, 9, DEVICE)), "workspace.weights must be"),
        (dict(kept=torch.zeros(3, device=DEVICE)), "kept must be"),
        (dict(top_k=0), "top_k must be 1 to 8, got 0"),
        (dict(top_k=9), "top_k must be 1 to 8, got 9"),
        (dict(budget=0), "budget must be 1 to 8"),
        (dict(budget=9), "budget must be 1 to 8"),
        (
            dict(
                logits=wide,
                out=wide.clone(),
                kept=None,
                workspace=Workspace(1, MOST_EXPERTS + 1, DEVICE),
                allowed=torch.zeros(1, MOST_EXPERTS + 1, dtype=torch.uint8, device=DEVICE),
            ),
            "there must be 1 to 1024 experts",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            expert_vote(**{**good, **changed})


def test_work_counts_what_is_read_and_written():
    assert work(10, 2, 64, 8, 2) == (2 * 10 * 64 * 2 + 128, 10 * 72)
