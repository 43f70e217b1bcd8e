"""Token recycling: what it learns from which rows, the published template, chains, tenants, memory, bad input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from proposer_steps import draft, guesses, ints, paths, step, talk
from vllm_specplug.proposers.base import SOURCE_RECYCLING, Request
from vllm_specplug.proposers.token_recycling import TokenRecycling, TokenRecyclingOptions, template

from vllm_specplug import options


def make(**settings: object) -> TokenRecycling:
    return TokenRecycling(options.parse(TokenRecyclingOptions, settings, "specplug.token_recycling"))


def test_drafts_the_targets_own_guesses_of_accepted_and_rejected_rows() -> None:
    proposer = make(min_prob=0.0, keys=1)
    proposer.add_request(Request(0, "a", ints(1, 2)))
    # Drafted 5 with the children 6 and 7; the target emitted 5, then 8: both children were rejected.
    rows = [(2, -1, guesses(5, 9)), (5, 0, guesses(8, 6)), (6, 1, guesses(60, 61)), (7, 1, guesses(70, 71))]
    proposer.observe(step(0, [5, 8], rows))
    for token, *_, best in rows:
        assert list(proposer._table.row(0, [token])) == best
    proposer.observe(step(0, [7], [(8, -1, guesses(7, 5))]))
    found = paths(draft(proposer, 0, 40))
    assert [70] in found and [71] in found
    assert set(draft(proposer, 0, 8).sources.tolist()) == {SOURCE_RECYCLING}


def test_last_occurrence_wins() -> None:
    proposer = make(min_prob=0.05, keys=1)
    talk(proposer, 0, [1], [2, 3, 2, 4])
    proposer.add_request(Request(0, "b", ints(9, 2)))
    assert draft(proposer, 0, 1).tokens.tolist() == [4]


def test_longer_keys_tell_contexts_apart() -> None:
    for keys, expected in ((3, [30]), (1, [31])):
        proposer = make(min_prob=0.01, keys=keys)
        talk(proposer, 0, [5, 1], [2, 30])
        talk(proposer, 0, [5, 8], [2, 31])
        proposer.add_request(Request(0, "c", ints(5, 1, 2)))
        assert draft(proposer, 0, 1).tokens.tolist() == expected


def test_hot_start_only_within_a_namespace() -> None:
    proposer = make(min_prob=0.05)
    talk(proposer, 0, [1], [2, 3, 4], namespace="a")
    for slot, name in enumerate("ab"):
        proposer.add_request(Request(slot, name, ints(1), namespace=name))
    assert paths(draft(proposer, 0, 3))[0] == [2]
    assert len(draft(proposer, 1, 3).tokens) == 0


def test_chain_where_trees_are_unavailable() -> None:
    proposer = make(min_prob=0.0)
    talk(proposer, 0, [1], [2, 3, 4, 5])
    proposer.add_request(Request(0, "tree", ints(1)))
    proposer.add_request(Request(1, "chain", ints(1), branching=False))
    assert len(set(draft(proposer, 0, 12).parents.tolist())) < 12
    chain = draft(proposer, 1, 12)
    np.testing.assert_array_equal(chain.parents, np.arange(len(chain.parents)) - 1)
    assert chain.tokens.tolist()[:4] == [2, 3, 4, 5]


def test_template_is_the_published_one() -> None:
    parents, children = template()
    depth = np.zeros(80, int)
    for node, parent in enumerate(parents):
        assert parent < node
        depth[node] = depth[parent] + 1 if parent >= 0 else 1
        assert children[node] == sum(parents[:node] == parent)
    assert np.bincount(depth)[1:].tolist() == [8, 21, 25, 15, 8, 3]


@pytest.mark.parametrize("limit", [80, 33, 1])
def test_template_is_filled_from_one_token_keys(limit: int) -> None:
    proposer = make(template=True)
    rng = np.random.default_rng(0)
    table = {t: rng.choice(40, size=8, replace=False).tolist() for t in range(40) if t % 5}
    proposer.add_request(Request(0, "teach", ints(39)))
    for token, row in table.items():
        proposer.observe(step(0, [token], [(token, -1, row)]))
    proposer.add_request(Request(1, "draft", ints(7, 3)))
    expected: list[list[int] | None] = []
    parents, children = template()
    for parent, child in zip(parents, children, strict=True):
        path = [] if parent < 0 else expected[parent]
        row = table.get(path[-1] if path else 3) if path is not None else None
        room = sum(p is not None for p in expected) < limit
        expected.append([*path, row[child]] if row and room else None)
    forest = draft(proposer, 1, limit)
    assert paths(forest) == [p for p in expected if p is not None]
    proposer.add_request(Request(2, "chain", ints(7, 3), branching=False))
    straight = draft(proposer, 2, limit)
    assert paths(straight) == [paths(forest)[0], *(p for p in paths(straight)[1:])]
    assert all(token == table[before][0] for before, token in zip([3, *straight.tokens], straight.tokens, strict=False))


def test_unknown_tokens_draft_nothing() -> None:
    for settings in ({"template": True}, {"min_prob": 0.0}):
        proposer = make(**settings)
        proposer.add_request(Request(0, "a", ints(1, 2, 3)))
        assert len(draft(proposer, 0, 80).tokens) == 0


def test_depth_ends_with_the_request() -> None:
    for settings in ({"template": True}, {"min_prob": 0.0}):
        proposer = make(**settings)
        talk(proposer, 0, [1], [1] * 5)
        proposer.add_request(Request(0, "a", ints(4, 1), max_tokens=5))
        assert max(map(len, paths(draft(proposer, 0, 80)))) == 2
        proposer.observe(step(0, [1, 1]))
        assert len(draft(proposer, 0, 80).tokens) == 0


def test_memory_is_bounded_and_close_frees() -> None:
    proposer = make(table_bytes=1 << 16)
    rng = np.random.default_rng(0)
    for number in range(40):
        talk(proposer, number % 3, [1], rng.integers(0, 40_000, size=50).tolist(), namespace=str(number % 7))
    stats = proposer.stats()
    assert stats["table_bytes"] <= (1 << 16) + 64 and stats["context_bytes"] == 0
    assert stats["table_rows_written"] > 40 * 50 * 3
    proposer.close()
    proposer.add_request(Request(0, "a", ints(1)))
    assert len(draft(proposer, 0, 8).tokens) == 0


def test_steps_without_rows_are_learned_from_as_text_only() -> None:
    proposer = make(min_prob=0.0)
    proposer.add_request(Request(0, "a", ints(1)))
    proposer.observe(step(0, [2, 3]))
    assert len(draft(proposer, 0, 8).tokens) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_parents": ints(-1, 1)}, "row_parents"),
        ({"row_parents": ints(-1, -2)}, "row_parents"),
        ({"row_parents": ints(-1)}, "do not describe 2 rows"),
        ({"row_offsets": ints(0, 3)}, "row_offsets"),
        ({"topk_ids": np.zeros((1, 8), np.int32)}, "do not describe 2 rows"),
        ({"topk_logprobs": np.zeros((2, 4), np.float32)}, "do not describe 2 rows"),
        ({"row_tokens": np.zeros(2, np.float32)}, "row_tokens must be"),
    ],
)
def test_bad_rows_are_refused_before_compiled_code_sees_them(change: dict, message: str) -> None:
    proposer = make()
    proposer.add_request(Request(0, "a", ints(1, 2)))
    good = step(0, [5, 6], [(2, -1, guesses(5)), (5, 0, guesses(6))])
    with pytest.raises(ValueError, match=message):
        proposer.observe(dataclasses.replace(good, **change))
    proposer.observe(good)


def test_options_are_checked() -> None:
    for wrong in ({"k": 9}, {"keys": 0}, {"min_prob": 1.5}, {"table_bytes": 100}, {"template": 1}):
        with pytest.raises(options.OptionError):
            make(**wrong)
    assert make(k=3).topk == 3
