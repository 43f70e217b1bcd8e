"""Drafting on the device: copied text first, then the target's earlier guesses, then the last token."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from vllm_specplug.proposers.device_drafts import DeviceDrafts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 50


def histories(*texts, slots=6, longest=40):
    """Texts in slots 4, 3, 2, ...; the other slots hold text that nobody asked for."""
    tokens = torch.randint(0, VOCAB, (slots, longest), dtype=torch.int32, device=DEVICE)
    lengths = torch.full((slots,), longest, dtype=torch.int32, device=DEVICE)
    rows = torch.arange(4, 4 - len(texts), -1, device=DEVICE)
    for row, text in zip(rows.tolist(), texts, strict=True):
        tokens[row, : len(text)] = torch.tensor(text, dtype=torch.int32)
        lengths[row] = len(text)
    last = torch.tensor([text[-1] for text in texts], device=DEVICE)
    return tokens, lengths, rows, last


def logits(*best):
    found = torch.zeros(len(best), VOCAB, device=DEVICE)
    found[torch.arange(len(best)), torch.tensor(best)] = 1.0
    return found


def test_text_of_the_request_itself_comes_first():
    drafts = DeviceDrafts(8, VOCAB, 4, DEVICE, match=True, recycle=True)
    drafts.observe(torch.tensor([7, 8], device=DEVICE), logits(30, 31))
    given = histories([1, 2, 3, 4, 5, 9, 1, 2, 3], [9, 9, 6, 7], [5, 6, 5, 6, 7, 8])
    # The others repeat no two tokens: 7 was followed by 30, and nothing is known after that.
    assert drafts.propose(*given).tolist() == [[4, 5, 9, 1], [30, 7, 7, 7], [31, 8, 8, 8]]


def test_guesses_are_followed_and_the_last_ones_count():
    drafts = DeviceDrafts(8, VOCAB, 4, DEVICE, match=False, recycle=True)
    drafts.observe(torch.tensor([1, 2, 3, 1], device=DEVICE), logits(9, 3, 1, 2))
    given = histories([1, 2, 1, 2], [3])
    assert drafts.propose(*given).tolist() == [[3, 1, 2, 3], [1, 2, 3, 1]]
    drafts.observe(torch.tensor([2], device=DEVICE), logits(40))
    assert drafts.propose(*given).tolist() == [[40, 2, 2, 2], [1, 2, 40, 3]]


def test_nothing_known_is_the_last_token_again():
    drafts = DeviceDrafts(8, VOCAB, 3, DEVICE, match=True, recycle=False)
    drafts.observe(torch.tensor([1], device=DEVICE), logits(2))  # it keeps no guesses
    assert drafts.propose(*histories([5, 6, 1], [7])).tolist() == [[1, 1, 1], [7, 7, 7]]
    assert drafts.propose(*histories([8, 9, 4, 8, 9])).tolist() == [[4, 8, 9]]
    assert drafts.propose(*histories([4, 8, 9, 8, 9])).tolist() == [[8, 9, 9]], "the text ends: the last token fills"


def test_memory_and_bad_arguments():
    assert DeviceDrafts(8, VOCAB, 4, DEVICE, match=False, recycle=True).nbytes >= VOCAB * 12
    with pytest.raises(ValueError, match="match or recycle"):
        DeviceDrafts(8, VOCAB, 4, DEVICE, match=False, recycle=False)
