"""Drafts from the longest suffix that occurs earlier: the definition on examples, the kernel against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.kernels import suffix_match_triton
from vllm_specplug.kernels.suffix_match import suffix_match_reference
from vllm_specplug.kernels.suffix_match_triton import MOST_LONGEST, Workspace, suffix_match, work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batch(histories, max_len=None, behind=5):
    """Histories side by side; what is behind an end would match if it were read."""
    max_len = max_len or max(1, *(len(h) for h in histories))
    tokens = np.full((len(histories), max_len), behind, np.int32)
    for row, history in zip(tokens, histories, strict=True):
        row[: len(history)] = history
    return tokens, np.array([len(h) for h in histories], np.int32)


def run(tokens, lengths, shortest, longest, drafts, space=None, wide=0):
    """What the kernels find; tokens are a slice of rows that are ``wide`` tokens wider."""
    rows = torch.full((len(tokens), tokens.shape[1] + wide), 5, dtype=torch.int32)
    rows[:, : tokens.shape[1]] = torch.from_numpy(tokens)
    found = torch.full((len(tokens) + 1, drafts), -77, dtype=torch.int32, device=DEVICE)
    matched = torch.full((len(tokens) + 1,), -77, dtype=torch.int32, device=DEVICE)
    space = space or Workspace(len(tokens), DEVICE)
    count = torch.from_numpy(lengths).to(DEVICE)
    history = rows.to(DEVICE)[:, : tokens.shape[1]]
    suffix_match(history, count, found[: len(tokens)], matched[: len(tokens)], space, shortest, longest)
    assert (space.best == 0).all()
    assert (found[len(tokens)] == -77).all() and matched[len(tokens)] == -77
    return found[:-1].cpu().numpy(), matched[:-1].cpu().numpy()


def assert_same(tokens, lengths, shortest, longest, drafts, **more):
    found, matched = run(tokens, lengths, shortest, longest, drafts, **more)
    wanted, wanted_lengths = suffix_match_reference(tokens, lengths, shortest, longest, drafts)
    np.testing.assert_array_equal(matched, wanted_lengths)
    np.testing.assert_array_equal(found, wanted)
    return matched


@pytest.mark.parametrize(
    ("history", "shortest", "longest", "wanted", "length"),
    [
        # The latest of two occurrences, and the longest suffix rather than the latest.
        ([1, 2, 7, 1, 2, 8, 1, 2], 1, 4, [8, 1, 2, 8], 2),
        ([3, 1, 2, 7, 9, 1, 2, 8, 3, 1, 2], 1, 4, [7, 9, 1, 2], 3),
        # At most `longest`: then the latest again.
        ([3, 1, 2, 7, 9, 1, 2, 8, 3, 1, 2], 1, 2, [8, 3, 1, 2], 2),
        # Nothing as long as `shortest`.
        ([1, 2, 7, 1, 2, 8, 1, 2], 3, 4, [-1] * 4, 0),
        # The occurrence overlaps the suffix; where the history ends, what follows goes round.
        ([4, 4, 4, 4], 1, 16, [4, 4, 4, 4], 3),
        ([1, 2, 1, 2, 1, 2], 2, 3, [1, 2, 1, 2], 3),
        ([9, 5, 6, 7, 5, 6], 2, 3, [7, 5, 6, 7], 2),
        # The first token alone can be the match.
        ([6, 1, 2, 3, 6], 1, 3, [1, 2, 3, 6], 1),
        ([6, 6], 1, 3, [6] * 4, 1),
        ([6, 6], 2, 3, [-1] * 4, 0),
        ([6], 1, 3, [-1] * 4, 0),
        ([], 1, 3, [-1] * 4, 0),
        # Token 0 and placeholders of -1 are tokens as others.
        ([0, -1, 9, 0, -1], 1, 3, [9, 0, -1, 9], 2),
    ],
)
def test_examples(history, shortest, longest, wanted, length):
    tokens, lengths = batch([history], max_len=12)
    for find in (suffix_match_reference, run):
        found, matched = find(tokens, lengths, shortest, longest, 4)
        assert found.tolist() == [wanted] and matched.tolist() == [length]


@pytest.mark.parametrize("alphabet", [1, 2, 3, 50])
@pytest.mark.parametrize(("shortest", "longest", "drafts"), [(1, 1, 1), (1, 5, 3), (2, 16, 8), (4, 7, 0), (3, 32, 130)])
def test_as_the_definition(alphabet, shortest, longest, drafts):
    rng = np.random.default_rng(alphabet)
    histories = [rng.integers(0, alphabet, n) for n in (0, 1, 2, 3, 17, 40, 64, 100)]
    assert_same(*batch(histories, 101), shortest, longest, drafts, wide=3)


@pytest.mark.parametrize("place", [0, 1, 1022, 1023, 1024, 1025, 2047, 2048, 2990])
def test_matches_over_block_boundaries(place):
    """The suffix occurs once, its last token at a block's boundary, its first maybe in the block before."""
    rng = np.random.default_rng(place)
    history = np.arange(100, 3105)
    for size in (1, 3, 6):
        if size > place + 1:
            continue
        suffix = rng.permutation(size)
        history[place + 1 - size : place + 1] = suffix
        history[-size:] = suffix
        tokens, lengths = batch([history], 3105)
        assert assert_same(tokens, lengths, 1, 8, 4).tolist() == [size]


@pytest.mark.parametrize("programs", [1, 8, 10**6])
def test_any_number_of_programs(programs, monkeypatch):
    monkeypatch.setattr(suffix_match_triton, "_PROGRAMS", programs)
    monkeypatch.setattr(suffix_match_triton, "_BLOCK", 16)
    rng = np.random.default_rng(3)
    histories = [rng.integers(0, 6, n) for n in (0, 15, 16, 17, 18, 33, 250, 400)]
    assert_same(*batch(histories, 400), 2, 6, 5)
    # The only occurrence at the first and last positions of blocks and of turns of 8 programs.
    tokens = np.arange(9 * 400, dtype=np.int32).reshape(9, 400)
    tokens[np.arange(9), [0, 15, 16, 127, 128, 129, 255, 256, 398]] = tokens[:, -1]
    assert (assert_same(tokens, np.full(9, 400, np.int32), 1, 6, 5) == 1).all()


def test_a_long_history():
    rng = np.random.default_rng(4)
    history = rng.integers(0, 2000, 32_768)
    history[9000:9012] = history[-12:]
    assert assert_same(*batch([history]), 2, 16, 7).tolist() == [12]


def test_many_requests_and_lengths_beyond_the_rows():
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 3, (64, 30)).astype(np.int32)
    lengths = rng.integers(-2, 31, 64).astype(np.int32)
    assert_same(tokens, lengths, 1, 6, 4)
    beyond = np.full(64, 99, np.int32)
    found, matched = run(tokens, beyond, 1, 6, 4, wide=2)
    wanted, wanted_lengths = suffix_match_reference(tokens, np.full(64, 30, np.int32), 1, 6, 4)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(matched, wanted_lengths)


def test_a_launch_leaves_nothing_to_the_next():
    space = Workspace(9, DEVICE)
    tokens, lengths = batch([[1, 2, 3, 1, 2], [7, 7, 7]])
    assert_same(tokens, lengths, 1, 3, 2, space=space)
    tokens, lengths = batch([[1, 2, 3, 4, 9], [8, 7, 7]])
    assert assert_same(tokens, lengths, 1, 3, 2, space=space).tolist() == [0, 1]
    nothing = np.zeros((0, 4), np.int32)
    assert_same(nothing, np.zeros(0, np.int32), 1, 3, 2, space=space)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_requests_in_any_slots(dtype):
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, 3, (7, 30)).astype(np.int32)
    lengths = np.array([30, 0, 12, 29, 7, 30, 1], np.int32)
    wanted, wanted_lengths = suffix_match_reference(tokens, lengths, 1, 6, 4)
    for slots in ([5, 0, 3], [6, -1, 1, 2, 4], [2] * 9, []):
        found = torch.full((len(slots), 4), -77, dtype=torch.int32, device=DEVICE)
        matched = torch.full((len(slots),), -77, dtype=torch.int32, device=DEVICE)
        space = Workspace(9, DEVICE)
        rows = torch.tensor(slots, dtype=dtype, device=DEVICE)
        history, count = (torch.from_numpy(array).to(DEVICE) for array in (tokens, lengths))
        suffix_match(history, count, found, matched, space, 1, 6, rows)
        assert (space.best == 0).all()
        for slot, own, length in zip(slots, found.tolist(), matched.tolist(), strict=True):
            assert own == (wanted[slot].tolist() if slot >= 0 else [-1] * 4)
            assert length == (wanted_lengths[slot] if slot >= 0 else 0)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_any_history(data):
    alphabet = data.draw(st.integers(1, 4))
    histories = data.draw(st.lists(st.lists(st.integers(-1, alphabet), max_size=30), min_size=1, max_size=3))
    shortest = data.draw(st.integers(1, 5))
    longest = data.draw(st.integers(shortest, 9))
    assert_same(*batch(histories, 30), shortest, longest, data.draw(st.integers(0, 6)))


def test_wrong_arguments():
    def ints(*shape, dtype=torch.int32):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    good = dict(
        tokens=ints(2, 9),
        lengths=ints(2),
        drafts=ints(2, 3),
        matched=ints(2),
        workspace=Workspace(2, DEVICE),
        shortest=1,
        longest=4,
    )
    suffix_match(**good)
    for name, value, message in [
        ("tokens", ints(2, 9, dtype=torch.int64), "tokens must be"),
        ("tokens", ints(9, 2).T, "tokens's last dimension must be contiguous"),
        ("lengths", ints(3), "lengths must be"),
        ("drafts", ints(1, 3), "drafts must be"),
        ("drafts", ints(3, 2).T, "drafts must be contiguous"),
        ("matched", ints(2, 1), "matched must be"),
        ("workspace", Workspace(1, DEVICE), "workspace is for 1 requests, got 2"),
        ("rows", ints(2, dtype=torch.int16), "rows must be"),
        ("rows", ints(3), "drafts must be"),
        ("shortest", 0, "got 0 and 4"),
        ("shortest", 5, "got 5 and 4"),
        ("longest", MOST_LONGEST + 1, "at most 32, got 1 and 33"),
    ]:
        with pytest.raises(ValueError, match=message):
            suffix_match(**{**good, name: value})


def test_work_counts_what_is_read_and_written():
    assert work([10, 20], 3) == (4 * 30 + 2 * (24 + 8), 30)
