"""Drafting on the device: copied text first, then the target's earlier guesses, then the last token."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from vllm_specplug.kernels.recycling_matrix import Node, shape_parents
from vllm_specplug.proposers.device_drafts import GUESSES, LONGEST, DeviceDrafts
from vllm_specplug.proposers.device_shapes import name_of, node_of, shape

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
    given = histories([1, 2, 3, 4, 5, 9, 1, 2, 3], [9, 8, 6, 7], [5, 6, 4, 3, 7, 8])
    # The others repeat no token: 7 was followed by 30 and then 0, the next best of equal ones, and so forth.
    found = drafts.propose(*given).tolist()
    assert found[0] == [4, 5, 9, 1] and found[1][0] == 30 and found[2][0] == 31
    assert drafts.trees[:5].tolist() == [[0, 1, 2, 3]] * 5, "chains, before a request says that it may branch"


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
    assert drafts.propose(*histories([4, 8, 9, 8, 9])).tolist() == [[8, 9, 8]], "the text goes round"


def test_drafts_branch_where_the_request_may():
    drafts = DeviceDrafts(8, VOCAB, 7, DEVICE, match=True, recycle=True)
    best = torch.zeros(2, VOCAB, device=DEVICE)
    best[0, [11, 12, 13, 14, 15, 16, 17, 18]] = torch.arange(8.0, 0.0, -1.0, device=DEVICE)
    best[1, [21, 22, 23, 24, 25, 26, 27, 28]] = torch.arange(8.0, 0.0, -1.0, device=DEVICE)
    drafts.observe(torch.tensor([7, 11], device=DEVICE), best)
    drafts.add_request(4, True)
    drafts.add_request(3, False)
    given = histories([1, 2, 7], [1, 2, 7], [9, 7, 5, 9, 7])
    drafts.add_request(2, True)
    found = drafts.propose(*given).tolist()
    # Nothing matched: "0:0 0:00 0:1 0:2 0:000 0:01 0:3"; the third node of the first path is not known.
    assert found[0] == [11, 21, 12, 13, 7, 22, 14]
    assert drafts.trees[4].tolist() == shape_parents(shape(0, 7)) == [0, 1, 0, 0, 2, 1, 0]
    assert found[1] == [11, 21, 7, 7, 7, 7, 7] and drafts.trees[3].tolist() == list(range(7))
    # Two tokens matched: "1 2 3 4 5 6 7", then its shape's others.
    assert found[2][:3] == [5, 9, 7] and drafts.trees[2].tolist() == shape_parents(shape(2, 7))
    drafts.add_request(4, False)
    drafts.propose(*given)
    assert drafts.trees[4].tolist() == list(range(7)), "another request has the slot"


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)])
def test_warming_up_teaches_nothing(kinds):
    drafts = DeviceDrafts(8, VOCAB, 4, DEVICE, *kinds)
    given = histories([5, 6, 7], [1, 2, 1, 2])
    before = drafts.propose(*given)
    drafts.warm_up(*given[:2])
    assert torch.equal(drafts.propose(*given), before)


def test_any_vocabulary():
    """One smaller than the guesses that are kept."""
    drafts = DeviceDrafts(2, 5, 3, DEVICE, match=False, recycle=True)
    drafts.add_request(0, True)
    drafts.observe(torch.tensor([2], device=DEVICE), torch.tensor([[0.0, 3.0, 1.0, 2.0, 4.0]], device=DEVICE))
    tokens, lengths = torch.full((2, 4), 2, dtype=torch.int32, device=DEVICE), torch.ones(2, dtype=torch.int32)
    slots, last = torch.tensor([0], device=DEVICE), torch.tensor([2], device=DEVICE)
    assert drafts.propose(tokens, lengths.to(DEVICE), slots, last).tolist() == [[4, 2, 1]]


@pytest.mark.parametrize("branching", [True, False])
@pytest.mark.parametrize("length", [1, 2, 15, 64, 65, 128])
@pytest.mark.parametrize("matched", range(LONGEST + 2))
def test_shapes_are_trees_and_so_are_their_beginnings(matched, length, branching):
    nodes = list(shape(matched, length, branching))
    parents = shape_parents(nodes)
    assert len(nodes) == len(set(nodes)) == length
    assert branching or parents == list(range(length))
    assert shape(matched, length // 2, branching) == nodes[: length // 2]
    assert matched or not any(node.copies for node in nodes)
    assert all(max(node.ranks, default=0) < GUESSES for node in nodes)


def test_names_of_nodes():
    for node in (Node(3, ()), Node(12, (0, 7)), Node(0, (1,))):
        assert node_of(name_of(node)) == node


def test_memory_and_bad_arguments():
    trees, chains = (DeviceDrafts(8, VOCAB, 4, DEVICE, False, True, branching=kind).nbytes for kind in (True, False))
    assert trees - chains == VOCAB * 4 * (GUESSES - 1) and chains >= VOCAB * 12
    with pytest.raises(ValueError, match="match or recycle"):
        DeviceDrafts(8, VOCAB, 4, DEVICE, match=False, recycle=False)
