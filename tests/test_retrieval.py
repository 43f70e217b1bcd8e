"""Retrieval: what it drafts, what it must never draft, its memory, and bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.proposers.base import SOURCE_CONTEXT, SOURCE_STORE, DraftForest, Request, StepResult
from vllm_specplug.proposers.output_store import SMALLEST_SHARE, OutputStore, OutputStores
from vllm_specplug.proposers.retrieval import MAX_DRAFT, Retrieval, RetrievalOptions

from vllm_specplug import options


def make(**settings: object) -> Retrieval:
    return Retrieval(options.parse(RetrievalOptions, settings, "specplug.retrieval"))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def emit(proposer: Retrieval, tokens: dict[int, list[int]]) -> None:
    """One step in which each slot emits its tokens."""
    slots = ints(*tokens)
    sizes = [len(t) for t in tokens.values()]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    flat = ints(*(t for row in tokens.values() for t in row))
    proposer.observe(StepResult(slots, flat, offsets, slots * 0, slots * 0))


def draft(proposer: Retrieval, limits: dict[int, int]) -> list[list[int]]:
    """Drafts per slot, checked."""
    array = ints(*limits.values())
    forest = proposer.propose(ints(*limits), array)
    forest.check_integrity(array)
    for lo, hi in zip(forest.offsets[:-1], forest.offsets[1:], strict=True):
        np.testing.assert_array_equal(forest.parents[lo:hi], np.arange(hi - lo) - 1)
    return [forest.tokens[a:b].tolist() for a, b in zip(forest.offsets[:-1], forest.offsets[1:], strict=True)]


def finish(proposer: Retrieval, slot: int, prompt: list[int], output: list[int], namespace: str = "") -> None:
    """A whole request."""
    proposer.add_request(Request(slot, f"r{slot}", ints(*prompt), namespace=namespace))
    emit(proposer, {slot: output})
    proposer.remove_request(slot)


PHRASE = [11, 12, 13, 14, 15, 16, 17, 18]


def test_drafts_continue_the_requests_own_text() -> None:
    proposer = make(min_prob=0.05)
    proposer.add_request(Request(3, "a", ints(*PHRASE, 1, 2, *PHRASE[:5])))
    forest = proposer.propose(ints(3), ints(3))
    assert forest.tokens.tolist() == PHRASE[5:8]
    assert set(forest.sources.tolist()) == {SOURCE_CONTEXT}
    assert np.all(np.diff(forest.probs) <= 0)
    emit(proposer, {3: PHRASE[5:7]})
    assert draft(proposer, {3: 2}) == [[18, 1]]


def test_drafts_continue_earlier_outputs_but_not_prompts() -> None:
    proposer = make(min_prob=0.001)
    finish(proposer, 0, [91, 92, 93, 94], PHRASE)
    proposer.add_request(Request(0, "b", ints(5, 6, *PHRASE[:4])))
    forest = proposer.propose(ints(0), ints(4))
    assert forest.tokens.tolist() == PHRASE[4:8]
    assert set(forest.sources.tolist()) == {SOURCE_STORE}
    proposer.add_request(Request(1, "c", ints(5, 6, 91, 92, 93)))
    assert draft(proposer, {1: 4}) == [[]]


def test_resumed_output_is_output() -> None:
    proposer = make(min_prob=0.05)
    proposer.add_request(Request(0, "a", ints(1, 2, 3, *PHRASE), num_output=len(PHRASE)))
    proposer.remove_request(0)
    proposer.add_request(Request(0, "b", ints(7, *PHRASE[:4])))
    assert draft(proposer, {0: 2}) == [PHRASE[4:6]]


def test_namespaces_share_no_text() -> None:
    proposer = make(min_prob=0.0)
    finish(proposer, 0, [1], PHRASE, namespace="a")
    proposer.add_request(Request(0, "b", ints(5, *PHRASE[:4]), namespace="b"))
    proposer.add_request(Request(1, "c", ints(5, *PHRASE[:4]), namespace="a"))
    assert draft(proposer, {0: 4, 1: 4}) == [[], PHRASE[4:8]]


def test_namespace_habits_are_separate() -> None:
    stores = OutputStores(1 << 22)
    for name in "ab":
        stores.open(name)
    assert stores.find("a")[1] != stores.find("b")[1]


def test_options_switch_sources_off() -> None:
    for switched in ({"context": False}, {"store": False}):
        proposer = make(min_prob=0.0, **switched)
        finish(proposer, 0, [1], PHRASE)
        proposer.add_request(Request(0, "own", ints(31, 32, 33, 34, 5, 31, 32, 33)))
        proposer.add_request(Request(1, "old", ints(9, *PHRASE[:4])))
        own, old = draft(proposer, {0: 1, 1: 1})
        assert own == ([34] if "store" in switched else [])
        assert old == ([15] if "context" in switched else [])


def test_min_prob_bounds_every_node() -> None:
    text = np.random.default_rng(1).integers(0, 6, size=400).astype(np.int32)
    lengths = []
    for bound in (0.02, 0.3, 1.0):
        proposer = make(min_prob=bound)
        proposer.add_request(Request(0, "a", text))
        forest = proposer.propose(ints(0), ints(16))
        assert np.all(forest.probs >= np.float32(bound))
        lengths.append(len(forest.tokens))
    assert lengths[0] > lengths[1] >= lengths[2] == 0


def test_limits() -> None:
    proposer = make(min_prob=0.0)
    proposer.add_request(Request(0, "a", ints(*(PHRASE * 3))))
    assert draft(proposer, {0: 0}) == [[]]
    assert draft(proposer, {0: 1}) == [[11]]
    assert len(draft(proposer, {0: 2_000_000_000})[0]) == MAX_DRAFT
    assert draft(proposer, {}) == []


def test_empty_prompt_and_negative_tokens() -> None:
    proposer = make(min_prob=0.0)
    proposer.add_request(Request(0, "empty", ints()))
    proposer.add_request(Request(1, "image", ints(1, 2, -7, -7, 3, 4, 5, 1, 2)))
    assert draft(proposer, {0: 4, 1: 4}) == [[], []]  # after "1 2" came only a placeholder
    emit(proposer, {0: [4, -1, 5, 4], 1: [3]})
    empty, image = draft(proposer, {0: 4, 1: 2})
    assert empty == [] and image == [4, 5]


def test_slot_reuse_forgets_the_old_request() -> None:
    proposer = make(min_prob=0.0, store=False)
    proposer.add_request(Request(2, "a", ints(*PHRASE, *PHRASE[:3])))
    assert draft(proposer, {2: 1}) == [[14]]
    held = proposer.stats()["context_bytes"]
    proposer.remove_request(2)
    assert held > 0 == proposer.stats()["context_bytes"] == proposer.stats()["live_requests"]
    proposer.add_request(Request(2, "b", ints(7, *PHRASE[:3])))
    assert draft(proposer, {2: 1}) == [[]]


def test_probabilities_become_calibrated() -> None:
    # Words of four tokens in random order: three of four tokens are certain, one is a guess among five.
    rng = np.random.default_rng(5)
    proposer = make(min_prob=0.0)
    claimed, hits = [], []
    for number in range(30):
        text = (rng.integers(0, 5, size=40)[:, None] * 4 + np.arange(4)).reshape(-1).astype(np.int32)
        proposer.add_request(Request(0, str(number), text[:60]))
        for token in text[60:]:
            forest = proposer.propose(ints(0), ints(1))
            if number >= 10 and len(forest.tokens):
                claimed.append(float(forest.probs[0]))
                hits.append(int(forest.tokens[0]) == token)
            emit(proposer, {0: [int(token)]})
        proposer.remove_request(0)
    sure = np.array(claimed) > 0.6
    assert 0.7 < sure.mean() < 0.8
    assert np.mean(np.array(hits)[sure]) > 0.99 and np.mean(np.array(claimed)[sure]) > 0.95
    assert abs(np.mean(np.array(hits)[~sure]) - np.mean(np.array(claimed)[~sure])) < 0.1


def _random_run(seed: int) -> tuple[list[DraftForest], Retrieval]:
    """Requests of several namespaces come and go, small budget, all kinds of tokens."""
    rng = np.random.default_rng(seed)
    proposer = make(min_prob=0.01, store_bytes=1 << 20)
    live: dict[int, str] = {}
    forests = []
    for number in range(80):
        slot = int(rng.integers(0, 80))
        if slot in live:
            proposer.remove_request(slot)
            del live[slot]
        live[slot] = f"tenant {rng.integers(0, 6)}"
        prompt = rng.integers(-1, 40, size=rng.integers(0, 40)).astype(np.int32)
        proposer.add_request(Request(slot, str(number), prompt, max_tokens=4000, namespace=live[slot]))
        for _ in range(2):
            some = [s for s in live if rng.random() < 0.7] or [slot]
            emit(proposer, {s: rng.integers(-1, 40, size=rng.integers(1, 60)).tolist() for s in some})
            limits = rng.integers(0, 9, size=len(some)).astype(np.int32)
            forests.append(proposer.propose(ints(*some), limits))
            forests[-1].check_integrity(limits)
        assert proposer.stats()["store_bytes"] <= 1 << 20
    return forests, proposer


def test_random_traffic_is_safe_bounded_and_deterministic() -> None:
    first, proposer = _random_run(0)
    second, _ = _random_run(0)
    for a, b in zip(first, second, strict=True):
        for name in ("tokens", "parents", "probs", "sources", "offsets"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert sum(len(f.tokens) for f in first) > 100
    assert min(int(f.tokens.min()) for f in first if len(f.tokens)) >= 0
    stats = proposer.stats()
    assert stats["evictions"] > 0 and 0 < stats["store_namespaces"] <= (1 << 20) // SMALLEST_SHARE
    for store in proposer._outputs._stores.values():
        store.primary.check_integrity()
    for request in list(proposer._live.values())[:3]:
        request.automaton.check_integrity()


def test_store_keeps_the_newest_outputs_in_its_budget() -> None:
    rng = np.random.default_rng(2)
    store, budget = OutputStore(), 1 << 20
    outputs = [rng.integers(0, 5000, size=200).astype(np.int32) for _ in range(150)]
    for output in outputs:
        store.add(output, budget)
        assert store.nbytes <= budget
    assert store.epoch > 1
    for output in outputs[-4:]:
        state = 0
        for token in output[:20]:
            state = store.primary.edges(state)[int(token)][0]
    assert store.primary.num_tokens < 150 * 200 // 2


def test_output_larger_than_the_budget_is_cut_not_lost() -> None:
    store = OutputStore()
    store.add(np.arange(100_000, dtype=np.int32), 1 << 20)
    assert store.nbytes <= 1 << 20 and store.primary.num_tokens > 1000


def test_one_tenant_cannot_starve_another() -> None:
    stores, rng = OutputStores(1 << 21), np.random.default_rng(3)
    for _ in range(200):
        stores.add("greedy", rng.integers(0, 5000, size=300).astype(np.int32))
    for _ in range(20):
        stores.add("modest", rng.integers(0, 5000, size=300).astype(np.int32))
    assert stores.nbytes <= 1 << 21 and stores.num_namespaces == 2
    assert stores._stores["modest"].primary.num_tokens > 3000


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=6), st.integers(0, 5))
def test_live_cursors_survive_store_changes(outputs: list[list[int]], swap: int) -> None:
    """A held cursor drafts what a fresh one at the same place drafts, through clones, growth and swaps."""
    proposer = make(min_prob=0.0, context=False)
    finish(proposer, 0, [9], [0, 1, 2, 3, 2, 1])
    proposer.add_request(Request(1, "held", ints(0, 1, 2)))
    for number, output in enumerate(outputs):
        finish(proposer, 0, [9], output)
        if number == swap:
            proposer._outputs._stores[""].shed()
            proposer._find_stores(proposer._live)
        emit(proposer, {1: [output[0]]})
        held = (int(proposer._slots.store[1]), int(proposer._slots.state[1]), int(proposer._slots.matched[1]))
        text = proposer._live[1].text[: proposer._slots.size[1]]
        proposer.add_request(Request(2, "fresh", text.copy()))
        fresh = tuple(int(x[2]) for x in (proposer._slots.store, proposer._slots.state, proposer._slots.matched))
        assert held[0] == fresh[0] and held[2] <= fresh[2]
        if held[2] == fresh[2]:
            assert held[1] == fresh[1]
        proposer.remove_request(2)


def test_bad_input_is_refused_before_compiled_code_sees_it() -> None:
    proposer = make()
    proposer.add_request(Request(1, "a", ints(1, 2, 3)))
    for slot in (0, 5, -1, 1 << 20):
        with pytest.raises(ValueError, match=f"slot {slot} has no request"):
            proposer.propose(ints(1, slot), ints(1, 1))
        with pytest.raises(ValueError, match=f"slot {slot} has no request"):
            emit(proposer, {slot: [1]})
        with pytest.raises(ValueError, match=f"slot {slot} has no request"):
            proposer.remove_request(slot)
    with pytest.raises(ValueError, match="limits"):
        proposer.propose(ints(1), ints(-1))
    with pytest.raises(ValueError, match="limits"):
        proposer.propose(ints(1), ints(1, 1))
    for offsets in (ints(0, 9), ints(-1, 1), ints(1, 0), ints(0), ints(0, 1, 1)):
        with pytest.raises(ValueError, match="offsets"):
            proposer.observe(StepResult(ints(1), ints(4), offsets, ints(0), ints(0)))
    with pytest.raises(ValueError, match="taken"):
        proposer.add_request(Request(1, "b", ints(1)))
    with pytest.raises(ValueError, match="negative"):
        proposer.add_request(Request(-1, "b", ints(1)))
    with pytest.raises(ValueError, match="outputs"):
        proposer.add_request(Request(0, "b", ints(1), num_output=2))
    with pytest.raises(ValueError, match="one-dimensional"):
        proposer.add_request(Request(0, "b", np.zeros((2, 2), np.int32)))
    assert proposer.stats()["live_requests"] == 1


def test_options_are_checked() -> None:
    for name, value in (("min_prob", 1.5), ("store_bytes", 10), ("context", 1), ("minprob", 0.1)):
        with pytest.raises(options.OptionError, match=name):
            options.parse(RetrievalOptions, {name: value}, "specplug.retrieval")


def test_warm_up_and_close_leave_nothing_behind() -> None:
    proposer = make()
    proposer.warm_up()
    assert proposer.stats()["live_requests"] == proposer.stats()["store_tokens"] == 0
    finish(proposer, 0, [1], PHRASE)
    proposer.add_request(Request(0, "a", ints(1)))
    proposer.close()
    assert proposer.stats()["store_bytes"] == proposer.stats()["context_bytes"] == 0
    with pytest.raises(ValueError, match="slot 0"):
        proposer.propose(ints(0), ints(1))


def test_disk_cache_notices_changes_of_any_module_it_is_made_of():
    """Numba by itself would go on using code compiled against another module's old memory layout."""
    from vllm_specplug.kernels import memory
    from vllm_specplug.proposers import batch_steps

    stamp = memory._stamp(batch_steps.__file__)
    names = [name for name, _, _ in stamp]
    assert {"mixture.py", "suffix_automaton.py", "batch_steps.py", "memory.py"} <= set(names)
    folders = [Path(m.__file__).parent for m in (memory, batch_steps)]
    assert batch_steps.propose_batch._cache._cache_file._source_stamp == stamp
    assert set(stamp) == {entry for folder in folders for entry in memory._folder_stamp(folder)}
