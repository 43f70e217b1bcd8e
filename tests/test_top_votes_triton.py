"""The entries with most votes: the choice inside a Triton program against a stable sort."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.kernels.top_votes_triton import most_voted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _most_voted_kernel(votes_ptr, chosen_ptr, place_ptr, forced, count, total, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    # What is behind the end must not count, so it is the largest vote.
    votes = tl.load(votes_ptr + index, mask=index < total, other=float("inf"))
    chosen, place = most_voted(votes, index, forced, count, total)
    tl.store(chosen_ptr + index, chosen.to(tl.int8))
    tl.store(place_ptr + index, place)


def choose(votes, forced, count, block=None):
    block = block or triton.next_power_of_2(max(1, len(votes)))
    padded = torch.zeros(block, device=DEVICE)
    padded[: len(votes)] = torch.tensor(votes, dtype=torch.float32)
    chosen = torch.full((block,), 7, dtype=torch.int8, device=DEVICE)
    place = torch.full((block,), -7, dtype=torch.int32, device=DEVICE)
    _most_voted_kernel[(1,)](padded, chosen, place, forced, count, len(votes), BLOCK=block)
    assert set(chosen.tolist()) <= {0, 1}
    found = chosen.cpu().bool()
    assert place.cpu()[found].tolist() == list(range(int(found.sum())))
    return found.nonzero()[:, 0].tolist()


def sort(votes, forced, count):
    """NaN first, then by falling votes, the earlier of equal ones first."""
    order = sorted(range(forced, len(votes)), key=lambda i: (not math.isnan(votes[i]), -float(votes[i]), i))
    return sorted([*range(forced), *order[: count - forced]])


@pytest.mark.parametrize("size", [1, 2, 3, 31, 64, 100])
def test_every_count_is_exact(size):
    votes = (np.random.default_rng(size).random(size).astype(np.float32)).tolist()
    for count in sorted({*range(min(size, 6) + 1), size // 2, size - 1, size}):
        for forced in sorted({0, min(1, count), count // 2, count}):
            assert choose(votes, forced, count) == sort(votes, forced, count)


@pytest.mark.parametrize("votes", [[0.0], [1.0], [math.nan], [math.inf], [1e-45], [-0.0], [3e38]])
def test_equal_votes_choose_the_first(votes):
    for count in range(8):
        assert choose(votes * 7, 0, min(count, 7), block=16) == list(range(min(count, 7)))
        assert choose(votes * 7, min(2, count), min(count, 7), block=16) == list(range(min(count, 7)))


def test_nan_is_more_than_infinity_and_the_least_numbers_count():
    assert choose([1.0, math.inf, math.nan, 5.0], 0, 1) == [2]
    assert choose([1.0, math.inf, -math.nan, 5.0], 0, 2) == [1, 2]
    assert choose([0.0, 1e-45, 0.0, 2e-45], 0, 2) == [1, 3]
    assert choose([0.0, 1e-45, 0.0, 2e-45], 0, 3) == [0, 1, 3]
    # A forced entry counts whatever its vote, and only once.
    assert choose([0.0, 9.0, 8.0, 7.0], 1, 2) == [0, 1]
    assert choose([9.0, 9.0, 9.0, 9.0], 1, 2) == [0, 1]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_as_a_stable_sort(data):
    number = st.sampled_from([0.0, 1e-45, 0.25, 0.25, 0.5, 1.0, 3e38, math.inf, math.nan]) | st.floats(0, 1, width=32)
    votes = data.draw(st.lists(number, min_size=1, max_size=40))
    count = data.draw(st.integers(0, len(votes)))
    forced = data.draw(st.integers(0, count))
    assert choose(votes, forced, count, block=64) == sort([np.float32(v) for v in votes], forced, count)


def test_many_entries_with_many_ties():
    votes = np.random.default_rng(0).integers(0, 9, 16_000).astype(np.float32)
    wanted = torch.argsort(torch.from_numpy(votes), descending=True, stable=True)[:5000].sort().values.tolist()
    assert choose(votes.tolist(), 0, 5000, block=16_384) == wanted
