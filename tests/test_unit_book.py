"""Which units of a request have been summarised: growth, rollback, other blocks, ends."""

from __future__ import annotations

import numpy as np
import pytest
from vllm_specplug.kernels.block_select import Selection
from vllm_specplug.kernels.unit_book import UnitBook

SELECTION = Selection(unit=16, last=20)


def table(*blocks):
    return np.array(blocks, np.int32)


def test_a_request_grows_and_is_summarised_once():
    book = UnitBook(16, 32)
    blocks = table(7, 3, 9, 4, 0)
    # The tail begins at the block that has the 20th token from the end: 100 - 20 is in block 2.
    assert book.update("a", blocks, SELECTION, 100) == (0, 4)
    assert book.update("a", blocks, SELECTION, 110) == (4, 4)
    assert book.update("a", blocks, SELECTION, 150) == (4, 8)
    assert book.update("b", blocks, SELECTION, 19) == (0, 0)
    assert (book.units_read, book.resets, len(book)) == (8, 0, 2)
    blocks[0] = 1  # the caller's array is its own
    assert dict(book.items())["a"].blocks.tolist() == [7, 3, 9, 4]


def test_a_rewind_makes_units_new_from_the_one_that_holds_the_token():
    book = UnitBook(16, 32)
    blocks = table(7, 3, 9, 4)
    book.update("a", blocks, SELECTION, 150)
    book.rewind("a", 200)
    assert book.update("a", blocks, SELECTION, 150) == (8, 8)
    book.rewind("a", 47)
    book.rewind("unknown", 0)
    assert book.update("a", blocks, SELECTION, 150) == (2, 8)


def test_a_rewind_is_kept_while_the_context_is_short():
    """An exact refresh: the context is short when it begins, and long again after it."""
    book = UnitBook(16, 32)
    blocks = table(7, 3, 9, 4)
    book.update("a", blocks, SELECTION, 150)
    assert book.update("a", blocks, SELECTION, 60) == (2, 2)
    assert book.update("a", blocks, SELECTION, 150) == (2, 8)


def test_other_blocks_are_noticed():
    book = UnitBook(16, 32)
    book.update("a", table(7, 3, 9, 4), SELECTION, 150)
    assert book.update("a", table(7, 5, 9, 4), SELECTION, 150) == (2, 8)
    assert book.resets == 1
    # What lies behind the tail has no summary, and may change.
    assert book.update("a", table(7, 5, 9, 4, 8), SELECTION, 151) == (8, 8)
    assert book.resets == 1


def test_requests_that_ended_begin_anew():
    book = UnitBook(16, 32)
    book.update("a", table(7, 3, 9, 4), SELECTION, 150)
    book.drop(["a", "unknown"])
    assert len(book) == 0
    assert book.update("a", table(7, 3, 9, 4), SELECTION, 150) == (0, 8)


@pytest.mark.parametrize("unit", [8, 24, 64])
def test_units_that_do_not_fit(unit):
    with pytest.raises(ValueError, match=f"units of {unit} tokens do not fit blocks of 32"):
        UnitBook(unit, 32)
