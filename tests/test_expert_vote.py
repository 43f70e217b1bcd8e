"""Edits of routing: the compiled kernel against the reference, their properties, and that exact ones do nothing."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from vllm_specplug.kernels.expert_vote import Edit, RoutingEditor, edit_routing, softmax_route, tail_ratios, vote

SIZES = [(1, 8, 2), (5, 24, 12), (9, 60, 4), (33, 128, 8), (129, 256, 8), (3, 4, 4), (2, 8, 1)]
EDITS = [
    Edit(),
    Edit(share=0.5),
    Edit(share=0.05),
    Edit(share=0.9),
    Edit(thresholds=(0.1, 0.2, 0.3)),
    Edit(thresholds=(0.5,)),
    Edit(thresholds=(2.0, 2.0, 2.0)),
    Edit(keep=2),
    Edit(share=0.4, thresholds=(0.05, 0.15)),
    Edit(share=0.4, thresholds=(0.1,), keep=3),
]


def logits_of(rows: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed)) * 1.5


def compiled(
    logits: torch.Tensor, top_k: int, renormalize: bool, edit: Edit, pools: list[int]
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, RoutingEditor]:
    editor = RoutingEditor(logits.shape[1], top_k, renormalize, edit)
    rows = np.arange(len(logits), dtype=np.int32)
    weights, ids, kept = editor(logits.numpy(), rows, np.array(pools, np.int32))
    return torch.from_numpy(weights), torch.from_numpy(ids), kept, editor


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("edit", EDITS, ids=str)
@pytest.mark.parametrize(("rows", "experts", "top_k"), SIZES)
def test_matches_reference(rows: int, experts: int, top_k: int, edit: Edit, renormalize: bool) -> None:
    logits = logits_of(rows, experts)
    pools = sorted({0, rows // 3, rows})
    route = functools.partial(softmax_route, top_k=top_k, renormalize=renormalize)
    expected = edit_routing(route, logits, pools, edit, renormalize, softmax=True)
    weights, ids, kept, editor = compiled(logits, top_k, renormalize, edit, pools)
    torch.testing.assert_close(weights, expected[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(ids, expected[1])
    np.testing.assert_array_equal(kept, expected[2])
    before = route(logits)[1].unique().numel()
    assert editor.used.tolist() == [before, ids.unique().numel(), rows * top_k - int(kept.sum())]


@pytest.mark.parametrize("renormalize", [False, True])
def test_exact_edit_is_the_routing_itself(renormalize: bool) -> None:
    logits = logits_of(17, 24)
    weights, ids, kept, _ = compiled(logits, 12, renormalize, Edit(), [0, 17])
    expected = softmax_route(logits, 12, renormalize)
    torch.testing.assert_close(weights, expected[0])
    assert torch.equal(ids, expected[1])
    assert (kept == 12).all()
    assert Edit().exact
    assert not Edit(share=0.99).exact
    # Thresholds that no ratio is below, and a vote among as many experts as are used.
    weights, ids, kept, _ = compiled(logits, 12, renormalize, Edit(share=1.0, thresholds=(0.0, 0.0)), [0, 17])
    torch.testing.assert_close(weights, expected[0])
    assert (kept == 12).all()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
def test_a_pool_uses_no_more_experts_than_voted(share: float) -> None:
    logits = logits_of(40, 64, seed=3)
    pools = [0, 8, 9, 40]
    edit = Edit(share=share)
    for renormalize in (False, True):
        weights, ids, kept, _ = compiled(logits, 8, renormalize, edit, pools)
        own_weights, own_ids = softmax_route(logits, 8, renormalize)
        allowed = vote(own_weights, own_ids, pools, 64, edit.budget(64))
        for pool, (start, end) in enumerate(itertools.pairwise(pools)):
            used = ids[start:end].unique().long()
            assert allowed[pool, used].all()
            assert len(used) <= edit.budget(64)
            votes = torch.zeros(64).index_add_(0, own_ids[start:end].flatten().long(), own_weights[start:end].flatten())
            assert votes[allowed[pool]].min() >= votes[~allowed[pool]].max() - 1e-6
        assert (kept == min(8, edit.budget(64))).all()
        if renormalize:
            torch.testing.assert_close(weights.sum(1), torch.ones(40))
        else:
            # Each weight is what it is without the vote: a share of the softmax over all experts.
            torch.testing.assert_close(weights, logits.softmax(1).gather(1, ids.long()) * (weights > 0))


def test_a_lone_row_keeps_its_experts_where_the_budget_allows() -> None:
    logits = logits_of(1, 24)
    weights, ids, _, editor = compiled(logits, 12, False, Edit(share=0.5), [0, 1])
    torch.testing.assert_close(weights, softmax_route(logits, 12, False)[0])
    assert editor.used.tolist() == [12, 12, 0]
    assert torch.equal(ids, softmax_route(logits, 12, False)[1])


def test_tail_drop_takes_the_largest_tail_below_its_threshold() -> None:
    # Weights of 8, 4, 2, 1 fifteenths: tails of 1, 3 and 7 fifteenths.
    logits = torch.tensor([[8.0, 1.0, 4.0, 2.0]]).log()
    for thresholds, kept_slots in [
        ((), 4),
        ((0.06,), 4),
        ((0.07,), 3),
        ((0.07, 0.1), 3),
        ((0.0, 0.21), 2),
        ((0.0, 0.0, 0.5), 1),
        ((1.0, 1.0, 1.0), 1),
    ]:
        weights, ids, kept, _ = compiled(logits, 4, True, Edit(thresholds=thresholds), [0, 1])
        assert kept.tolist() == [kept_slots], thresholds
        assert ids[0].tolist() == [0, 2, 3, 1][:kept_slots] + [0] * (4 - kept_slots)
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
        weights, *_ = compiled(logits, 4, False, Edit(thresholds=thresholds), [0, 1])
        torch.testing.assert_close(weights[0, :kept_slots], torch.tensor([8, 4, 2, 1])[:kept_slots] / 15)
    torch.testing.assert_close(tail_ratios(torch.tensor([[2.0, 8, 1, 4]]))[0], torch.tensor([1, 3, 7]) / 15)
    assert tail_ratios(torch.tensor([[2.0, 1]])).isnan().tolist() == [[False, True, True]]


def test_median_thresholds_drop_about_half() -> None:
    logits = logits_of(4001, 64, seed=5)
    beta = tuple(tail_ratios(softmax_route(logits, 8, True)[0]).nanmedian(dim=0).values.tolist())
    assert list(beta) == sorted(beta)
    _, _, kept, _ = compiled(logits, 8, True, Edit(thresholds=beta), [0, len(logits)])
    assert 0.45 < (kept == 5).mean() < 0.55
    assert set(kept.tolist()) <= {5, 6, 7, 8}


def test_only_named_rows_are_edited_and_logits_stay() -> None:
    logits = logits_of(10, 24)
    before = logits.clone()
    rows = np.array([2, 3, 7, 8, 9], np.int32)
    editor = RoutingEditor(24, 12, False, Edit(share=0.5))
    weights, ids, _ = editor(logits.numpy(), rows, np.array([0, 2, 5], np.int32))
    alone, own, _, _ = compiled(logits[rows].contiguous(), 12, False, Edit(share=0.5), [0, 2, 5])
    assert torch.equal(torch.from_numpy(weights), alone)
    assert torch.equal(torch.from_numpy(ids), own)
    assert torch.equal(logits, before)


def test_reference_serves_other_routers() -> None:
    """A router that adds a bias to its choice, as DeepSeek's: a bias must not bring back what was voted out."""
    logits = logits_of(6, 16)
    bias = torch.linspace(-1, 3, 16)

    def route(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = rows.sigmoid()
        ids = (scores + bias).topk(4).indices
        weights = scores.gather(1, ids)
        return weights / weights.sum(1, keepdim=True), ids

    edit = Edit(share=0.25)
    own_weights, own_ids = route(logits)
    allowed = vote(own_weights, own_ids, [0, 6], 16, 4)[0]
    weights, ids, kept = edit_routing(route, logits, [0, 6], edit, renormalize=True, softmax=False)
    assert allowed[ids.long()][weights > 0].all()
    assert allowed[ids[:, 0].long()].all()
    assert (kept >= 1).all()


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="share 0"):
        Edit(share=0)
    with pytest.raises(ValueError, match="4 thresholds"):
        Edit(thresholds=(0.1,) * 4)
    with pytest.raises(ValueError, match="keep -1"):
        Edit(keep=-1)
    with pytest.raises(ValueError, match="top_k 9 is not between 1 and 8"):
        RoutingEditor(8, 9, True, Edit())
