"""The suffix automaton against brute force on short texts over small alphabets, where everything collides."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.proposers import suffix_automaton as sa
from vllm_specplug.proposers.suffix_automaton import SuffixAutomaton

# One sequence per inner list; token -1 cuts.
SEQUENCES = st.lists(st.lists(st.integers(-1, 3), max_size=24), min_size=1, max_size=4)


class Reference:
    """Every context of every length with its continuation counts, in the obvious way.

    ``counts`` follow the same rule as the automaton: contexts that did not know the token count it, then the longest
    that did and the next shorter ones, ``COUNTED_LEVELS`` in all, a level being contexts with the same occurrences.
    """

    def __init__(self) -> None:
        self.sequences: list[list[int]] = [[]]
        self.follow: dict[tuple[int, ...], set[int]] = {}
        self.counts: dict[tuple[int, ...], Counter[int]] = {}

    def cut(self) -> None:
        self.sequences.append([])

    def _ends(self, context: tuple[int, ...]) -> frozenset[tuple[int, int]]:
        n = len(context)
        return frozenset(
            (i, e) for i, s in enumerate(self.sequences) for e in range(n, len(s) + 1) if tuple(s[e - n : e]) == context
        )

    def append(self, token: int) -> None:
        if token < 0:
            self.cut()
            return
        text = self.sequences[-1]
        contexts = [tuple(text[-n:]) for n in range(len(text), 0, -1)]
        level, known, levels = None, False, 0
        for context in contexts:
            ends = self._ends(context)
            if ends != level:
                level = ends
                known = known or token in self.follow.get(context, ())
                levels += known
            if levels <= sa.COUNTED_LEVELS:
                self.counts.setdefault(context, Counter())[token] += 1
        for context in contexts:
            self.follow.setdefault(context, set()).add(token)
        text.append(token)

    def contains(self, context: tuple[int, ...]) -> bool:
        return bool(self._ends(context))


def build(sequences: list[list[int]], tokens: int = 4) -> tuple[SuffixAutomaton, Reference]:
    automaton, reference = SuffixAutomaton(tokens), Reference()
    for sequence in sequences:
        automaton.cut()
        reference.cut()
        automaton.extend(sequence)
        for token in sequence:
            reference.append(token)
    return automaton, reference


def last_of(automaton: SuffixAutomaton) -> int:
    return int(automaton._words()[sa.LAST])


def walk(automaton: SuffixAutomaton, tokens: list[int]) -> int:
    """State of a string that is known to occur."""
    state = 0
    for token in tokens:
        state = automaton.edges(state)[token][0]
    return state


@settings(max_examples=150, deadline=None)
@given(SEQUENCES)
def test_suffix_chain_holds_every_context_with_its_counts(sequences: list[list[int]]) -> None:
    automaton, reference = build(sequences)
    automaton.check_integrity()
    text = reference.sequences[-1]
    state = last_of(automaton)
    assert automaton.state(state)[sa.LEN] == len(text)
    length = len(text)
    while state > 0:
        shorter = int(automaton.state(state)[sa.LINK])
        edges = automaton.edges(state)
        # All lengths of one state are contexts with equal occurrences.
        for n in range(length, int(automaton.state(shorter)[sa.LEN]), -1):
            context = tuple(text[-n:])
            assert edges.keys() == reference.follow.get(context, set())
            assert {t: c for t, (_, c) in edges.items()} == reference.counts.get(context, {})
        length = int(automaton.state(shorter)[sa.LEN])
        state = shorter


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_link_of_the_end_is_the_longest_suffix_seen_before(text: list[int]) -> None:
    automaton, _ = build([text])
    link = int(automaton.state(last_of(automaton))[sa.LINK])
    seen = [n for n in range(len(text)) if any(text[e - n : e] == text[len(text) - n :] for e in range(n, len(text)))]
    assert automaton.state(link)[sa.LEN] == max(seen)


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, st.lists(st.integers(-1, 3), max_size=30))
def test_cursor_is_the_longest_known_suffix(sequences: list[list[int]], query: list[int]) -> None:
    automaton, reference = build(sequences)
    state = matched = 0
    for i, token in enumerate(query):
        state, matched = sa.advance(automaton.address, state, matched, token)
        past = query[: i + 1]
        past = past[len(past) - past[::-1].index(-1) :] if -1 in past else past
        known = [n for n in range(len(past) + 1) if n == 0 or reference.contains(tuple(past[-n:]))]
        assert matched == max(known)
        assert state == walk(automaton, past[len(past) - matched :])


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, st.lists(st.integers(0, 3), max_size=12), SEQUENCES)
def test_held_cursor_settles_after_clones(first: list[list[int]], query: list[int], later: list[list[int]]) -> None:
    automaton, _ = build(first)
    state = matched = 0
    for token in query:
        state, matched = sa.advance(automaton.address, state, matched, token)
    for sequence in later:
        automaton.cut()
        automaton.extend(sequence)
        state = sa.settle(automaton.address, state, matched)
        assert state == walk(automaton, query[len(query) - matched :])


@settings(max_examples=60, deadline=None)
@given(SEQUENCES)
def test_growth_changes_nothing(sequences: list[list[int]]) -> None:
    small, _ = build(sequences, tokens=1)
    large, _ = build(sequences, tokens=1000)
    states = small._header(sa.STATES)
    assert states == large._header(sa.STATES) and last_of(small) == last_of(large)
    for state in range(states):
        assert small.edges(state) == large.edges(state)
    small.grow()
    small.check_integrity()
    assert [small.edges(s) for s in range(states)] == [large.edges(s) for s in range(states)]


def test_random_text_with_cuts_grows_soundly() -> None:
    automaton = SuffixAutomaton(1)
    text = np.random.default_rng(0).integers(-2, 50, size=3000).astype(np.int32)
    automaton.extend(text)
    assert automaton.num_tokens == (text >= 0).sum()
    assert automaton.address % 64 == 0
    automaton.check_integrity()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 2), max_size=8),
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=4)), max_size=12),
)
def test_sequences_may_take_turns(prompt: list[int], turns: list[tuple[int, list[int]]]) -> None:
    """Samples of one prompt in one automaton: each goes on from its own last state, which stays its own."""
    automaton = SuffixAutomaton(1)
    automaton.extend(prompt)
    texts, last = [list(prompt) for _ in range(3)], [automaton.last] * 3
    for who, tokens in turns:
        automaton.resume(last[who])
        automaton.extend(tokens)
        texts[who] += tokens
        last[who] = automaton.last
        automaton.check_integrity()
    for text, state in zip(texts, last, strict=True):
        assert int(automaton.state(state)[sa.LEN]) == len(text)
        assert state == walk(automaton, text)
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                following = automaton.edges(walk(automaton, text[start:end]))
                part, size = text[start:end], end - start
                spots = [(t, i + size) for t in texts for i in range(len(t)) if t[i : i + size] == part]
                assert set(following) == {t[at] for t, at in spots if at < len(t)}


def test_many_branches_fill_the_table_without_overflow() -> None:
    # a^n followed by ever new tokens: each new one adds an edge to every state of the run at once.
    automaton = SuffixAutomaton(1)
    run = [0] * 60
    for token in range(1, 30):
        automaton.extend([*run, token])
    automaton.check_integrity()
    state = walk(automaton, run)
    assert {t: c for t, (_, c) in automaton.edges(state).items()} == {t: 1 for t in range(1, 30)}


def test_inline_edges_are_the_best_and_the_newest() -> None:
    automaton = SuffixAutomaton(64)
    for token in [1, 2, 3, 4, 5, 5, 5, 2, 2, 3, 4]:
        automaton.cut()
        automaton.extend([9, token])
    rec = automaton.state(walk(automaton, [9]))
    inline = [tuple(int(x) for x in rec[sa.EDGE + 3 * i : sa.EDGE + 3 * i + 3][[sa.TOKEN, sa.COUNT]]) for i in range(3)]
    assert inline == [(2, 3), (5, 3), (4, 2)]  # equal counts: the newer first
    assert rec[sa.RECENT] == 4 and rec[sa.TOTAL] == 11
    automaton.check_integrity()


@pytest.mark.parametrize("field", [sa.LINK, sa.TOTAL, sa.RECENT, sa.DEGREE])
def test_check_integrity_finds_damage(field: int) -> None:
    automaton, _ = build([[0, 1, 0, 2, 0, 1, 1]])
    automaton.check_integrity()
    automaton.state(walk(automaton, [0]))[field] += 5
    with pytest.raises(ValueError):
        automaton.check_integrity()
