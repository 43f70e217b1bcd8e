"""Rows of device-resident trees: Triton against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.kernels.tree_attention import build_trees
from vllm_specplug.kernels.tree_attention_triton import ancestor_bits
from vllm_specplug.kernels.tree_rows import tree_rows_reference
from vllm_specplug.kernels.tree_rows_triton import tree_rows, work

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POISON = -777


def int32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def outputs(rows: int, words: int) -> list[torch.Tensor]:
    """Parents, depths, bits and positions, poisoned."""
    empty = [torch.full((rows,), POISON, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    bits = torch.full((rows, words), POISON, dtype=torch.int32, device=DEVICE)
    return [*empty, bits, torch.full((rows,), POISON, dtype=torch.int64, device=DEVICE)]


def assert_described(sizes, verified, most, parents, slots, contexts, words=None, dtype=torch.int64):
    """The kernel and the definition agree, and leave everything else as it was; the outputs."""
    words = words or -(-most // 32)
    starts, firsts = (int32([0, *np.cumsum(n)]) for n in (sizes, verified))
    lengths = int32(np.asarray(sizes) + contexts)
    slots = torch.tensor(slots, dtype=dtype, device=DEVICE)
    found, wanted = (outputs(int(starts[-1]) + 3, words) for _ in range(2))
    tree_rows(starts, firsts, lengths, slots, parents, *found, most)
    tree_rows_reference(*(t.cpu() for t in (starts, firsts, lengths, slots, parents)), *wanted, most)
    # Words that no row has a bit in are not written.
    needed = -(-most // 32)
    assert (found[2][:, needed:] == POISON).all()
    found[2], wanted[2] = found[2][:, :needed], wanted[2][:, :needed]
    for own, other in zip(found, wanted, strict=True):
        assert torch.equal(own, other)
    assert all((t[-3:] == POISON).all() for t in found)
    return found


def test_by_hand():
    """A tree, a prompt that is too long, a short prompt's end, a tree that was cut, a request without rows, a chain."""
    parents = int32([[0, 0, 1, 2], [9, 9, 9, 9], [0, 1, 2, 3]])
    found = assert_described(
        [5, 7, 3, 3, 0, 4], [5, 1, 1, 3, 0, 4], 5, parents, [0, 1, 1, 0, 2, 2], [10, 0, 2, 5, 4, 7]
    )
    rows = [t.tolist() for t in found]
    assert rows[0][:5] == [-1, 0, 0, 1, 2] and rows[0][12:15] == [-1, 0, 1] and rows[0][15:18] == [-1, 0, 0]
    assert rows[1][:5] == [0, 1, 1, 2, 2] and rows[3][:5] == [10, 11, 11, 12, 12]
    assert rows[2][:5] == [[1], [3], [5], [11], [21]] and rows[3][15:22] == [5, 6, 6, 7, 8, 9, 10]
    assert rows[0][5:12] == [POISON] * 7


@pytest.mark.parametrize("most", [1, 2, 16, 31, 32, 33, 64, 65, 128, 129])
def test_sizes(most):
    """Whole trees as `build_trees` describes them, beside a chain as deep as can be."""
    rng = np.random.default_rng(most)
    tree = [int(rng.integers(0, m + 1)) for m in range(most - 1)]
    parents = int32([tree, list(range(most - 1))]).reshape(2, most - 1)
    found = assert_described([most, most], [most, most], most, parents, [0, 1], [3, 0], dtype=torch.int32)
    sizes = np.full(2, most, np.int32)
    both = np.array([-1, *tree, *range(-1, most - 1)], np.int32)
    described = build_trees(sizes - most, sizes, sizes, sizes, both)
    assert torch.equal(found[1][:-3].cpu(), described.depths)
    assert torch.equal(found[2][:-3].cpu(), ancestor_bits(described.visible))


def test_whatever_a_slot_held_is_a_tree():
    parents = int32([[-5, 7, 1000, -1, 2**31 - 1]])
    found = assert_described([6], [6], 6, parents, [0], [4])
    assert found[0][:6].tolist() == [-1, 0, 1, 2, 0, 4]


def test_many_requests_and_wide_rows():
    rng = np.random.default_rng(0)
    parents = int32(rng.integers(0, 16, (70, 20)))[:, :18]  # rows of another stride
    sizes = rng.integers(0, 18, 64)
    verified = np.where(rng.random(64) < 0.7, sizes, np.minimum(sizes, 1))
    assert_described(sizes, verified, 16, parents, rng.permutation(70)[:64], rng.integers(0, 100, 64), words=3)


def test_nothing():
    assert_described([], [], 4, int32([[0, 0, 0]]), [], [])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), most=st.integers(1, 70))
def test_fuzz(seed, count, most):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, most + 3, count)
    verified = np.where(rng.random(count) < 0.7, sizes, np.minimum(sizes, 1))
    parents = int32(rng.integers(-2, most + 2, (8, most + int(rng.integers(0, 3)))))
    assert_described(sizes, verified, most, parents, rng.permutation(8)[:count], rng.integers(0, 40, count))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": torch.zeros(2, dtype=torch.int32)}, r"starts must be \[3\]"),
        ({"verified": torch.zeros(3, dtype=torch.int64)}, "verified must be torch.int32"),
        ({"slots": torch.zeros(1, dtype=torch.int64)}, r"slots must be \[2\]"),
        ({"depths": torch.zeros(5, dtype=torch.int32)}, r"depths must be \[9\]"),
        ({"positions": torch.zeros(9, dtype=torch.int32)}, "positions must be torch.int64"),
        ({"bits": torch.zeros(9, 1, dtype=torch.int32, device="meta")}, "bits must be on"),
        ({"most": 0}, "most must be 1 to 4"),
        ({"most": 5}, "most must be 1 to 4, for 3 nodes and 1 words, got 5"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    args = {
        "starts": torch.zeros(3, dtype=torch.int32),
        "verified": torch.zeros(3, dtype=torch.int32),
        "lengths": torch.zeros(2, dtype=torch.int32),
        "slots": torch.zeros(2, dtype=torch.int64),
        "parents": torch.zeros(4, 3, dtype=torch.int32),
        "row_parents": torch.zeros(9, dtype=torch.int32),
        "depths": torch.zeros(9, dtype=torch.int32),
        "bits": torch.zeros(9, 1, dtype=torch.int32),
        "positions": torch.zeros(9, dtype=torch.int64),
        "most": 4,
        **change,
    }
    args = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in args.items()}
    with pytest.raises(ValueError, match=message):
        tree_rows(**args)


def test_work():
    assert work(100, 10, 2).bytes == 100 * 28 + 240
