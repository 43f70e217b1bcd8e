"""The table of second guesses: what it keeps, for whom, in how much memory."""

from __future__ import annotations

import numpy as np
import pytest
from vllm_specplug.proposers.recycling_table import ORDERS, ROW_BYTES, WAYS, WIDTH, RecyclingTable, find_rows, recycle

GUESSES = np.arange(100, 100 + WIDTH, dtype=np.int32)[None]
LOGPROBS = np.log(np.array([[0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.001, 1e-9]], np.float32))


def learn(table: RecyclingTable, tokens: list[int], ids=GUESSES, space: int = 0, orders: int = 3, **settings) -> None:
    """One verified row after ``tokens``, oldest first."""
    last, second, third = ([*reversed(tokens), -1, -1, -1])[:3]
    width, emitted = settings.get("width", WIDTH), settings.get("emitted", True)
    recycle(table.view, space, orders, width, last, second, third, ids, LOGPROBS, 0, emitted)


def test_rows_of_every_key_length_hold_tokens_and_probabilities() -> None:
    table = RecyclingTable(1 << 16)
    learn(table, [1, 2, 3])
    for key in ([], [3], [2, 3], [1, 2, 3]):
        row = table.row(0, key)
        assert list(row) == GUESSES[0].tolist()
        # Stored in steps of a 16th of a power of two, and not below 2**-16.
        expected = np.maximum(np.exp(LOGPROBS[0]), 2.0**-16)
        np.testing.assert_allclose(list(row.values()), expected, rtol=0.05)
    assert table.row(0, [1]) == table.row(0, [3, 2]) == {}


def test_last_occurrence_wins_and_anywhere_is_a_mean() -> None:
    table = RecyclingTable(1 << 16)
    learn(table, [1, 2, 3])
    learn(table, [9, 2, 3], GUESSES + 50)
    assert list(table.row(0, [3])) == list(table.row(0, [2, 3])) == (GUESSES[0] + 50).tolist()
    assert list(table.row(0, [1, 2, 3])) == GUESSES[0].tolist()
    both = table.row(0, [])
    assert both[100] == pytest.approx(0.25, rel=0.1) and both[150] == pytest.approx(0.25, rel=0.1)
    learn(table, [5], emitted=False)  # a rejected row says nothing about what is likely anywhere
    assert table.row(0, []) == both and list(table.row(0, [5])) == GUESSES[0].tolist()


def test_mean_forgets_and_stays_ranked() -> None:
    table = RecyclingTable(1 << 16)
    learn(table, [1])
    for _ in range(2000):
        learn(table, [1], GUESSES + 4)
    row = table.row(0, [])
    assert list(row)[:5] == (GUESSES[0] + 4).tolist()[:5]
    assert row[104] == pytest.approx(0.5, rel=0.15)
    assert list(row.values()) == sorted(row.values(), reverse=True)


def test_width_and_orders_bound_what_is_kept() -> None:
    table = RecyclingTable(1 << 16)
    learn(table, [1, 2, 3], orders=1, width=3)
    assert list(table.row(0, [3])) == [100, 101, 102]
    assert table.row(0, [2, 3]) == table.row(0, [1, 2, 3]) == {}


def test_short_contexts_and_placeholders_end_a_key() -> None:
    table = RecyclingTable(1 << 16)
    learn(table, [7])
    assert table.row(0, [7]) and not table.row(0, [-1, 7])
    learn(table, [4, -5, 8])
    assert table.row(0, [8]) and not table.row(0, [-5, 8]) and not table.row(0, [4, -5, 8])
    rows = np.zeros(ORDERS, np.int64)
    find_rows(table.view, 0, 3, -1, 4, 4, rows)
    assert rows[0] != 0 and not rows[1:].any()


def test_namespaces_see_only_their_own() -> None:
    table = RecyclingTable(1 << 20)
    one, two = table.space("one"), table.space("two")
    assert one != two and table.space("one") == one
    learn(table, [1, 2, 3], space=one)
    for key in ([], [3], [2, 3], [1, 2, 3]):
        assert table.row(one, key) and not table.row(two, key)


def test_budget_holds_and_the_newest_stay() -> None:
    budget = 1 << 14
    table = RecyclingTable(budget)
    assert table.nbytes <= budget + ROW_BYTES
    rows = budget // ROW_BYTES
    for token in range(20 * rows):
        learn(table, [token], emitted=False)
    newest = sum(bool(table.row(0, [t])) for t in range(20 * rows - rows // 4, 20 * rows))
    oldest = sum(bool(table.row(0, [t])) for t in range(10 * rows))
    assert newest > 0.9 * (rows // 4) and oldest == 0


def test_stamps_survive_wrapping() -> None:
    table = RecyclingTable(WAYS * ROW_BYTES)
    table.view.clock[0] = (1 << 31) - 3
    for token in range(8):
        learn(table, [token], emitted=False)
    assert [bool(table.row(0, [t])) for t in range(8)] == [False] * 4 + [True] * 4


def test_no_budget_is_no_table() -> None:
    table = RecyclingTable(0)
    rows = np.ones(ORDERS, np.int64)
    find_rows(table.view, 0, 3, 1, 2, 3, rows)
    assert not rows.any() and table.nbytes == ROW_BYTES


def test_clear_forgets() -> None:
    table = RecyclingTable(1 << 16)
    learn(table, [1])
    table.clear()
    assert table.row(0, [1]) == table.row(0, []) == {}


def test_a_row_that_repeats_a_token_is_left_out() -> None:
    table = RecyclingTable(1 << 16)
    twice = GUESSES.copy()
    twice[0, 5] = twice[0, 1]
    learn(table, [1], twice)
    assert table.row(0, [1]) == table.row(0, []) == {}
    learn(table, [1], twice, width=5)
    assert list(table.row(0, [1])) == GUESSES[0, :5].tolist()
