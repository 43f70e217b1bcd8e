"""The fused proposer: one tree of all sources, the best nodes first, siblings, calibration, safety under random use."""

from __future__ import annotations

import numpy as np
import pytest
from proposer_steps import draft, guesses, ints, paths, step, talk
from vllm_specplug.proposers.auto import AutoOptions, Fused
from vllm_specplug.proposers.base import (
    SOURCE_CONTEXT,
    SOURCE_RECYCLING,
    SOURCE_SIBLINGS,
    SOURCE_STORE,
    DraftForest,
    Request,
    StepResult,
)
from vllm_specplug.proposers.tree_growth import MAX_DRAFT

from vllm_specplug import options

PHRASE = [11, 12, 13, 14, 15, 16, 17, 18]


def make(**settings: object) -> Fused:
    return Fused(options.parse(AutoOptions, settings, "specplug.auto"))


def test_sources_share_one_tree_without_duplicates() -> None:
    proposer = make(min_prob=0.0)
    talk(proposer, 0, [90, 91], [12, 13, 14])  # the store and the table continue 12 with 13
    proposer.add_request(Request(0, "a", ints(11, 12, 40, 11, 12)))  # the request's own text continues it with 40
    forest = draft(proposer, 0, 60)
    found = paths(forest)
    assert len({tuple(p) for p in found}) == len(found)  # check_integrity says the same of siblings
    by_path = dict(zip(map(tuple, found), forest.sources.tolist(), strict=True))
    assert by_path[(40,)] == SOURCE_CONTEXT and by_path[(13,)] == SOURCE_STORE
    assert SOURCE_RECYCLING in by_path.values()
    assert by_path[(13, 14)] == SOURCE_STORE


def test_each_source_can_be_switched_off() -> None:
    for off, gone in (("context", 40), ("store", None), ("recycling", 77)):
        proposer = make(min_prob=0.0, **{off: False})
        proposer.add_request(Request(0, "teach", ints(90, 91)))
        proposer.observe(step(0, [12], [(91, -1, guesses(12, 77))]))
        proposer.observe(step(0, [13], [(12, -1, guesses(13, 77))]))
        proposer.remove_request(0)
        proposer.add_request(Request(0, "a", ints(11, 12, 40, 11, 12)))
        forest = draft(proposer, 0, 30)
        assert (gone not in forest.tokens) and {40, 13, 77} - {gone} <= set(forest.tokens.tolist())
        source = {"context": SOURCE_CONTEXT, "store": SOURCE_STORE, "recycling": SOURCE_RECYCLING}[off]
        assert source not in forest.sources


def _trained(seed: int = 3) -> tuple[Fused, np.random.Generator]:
    """A proposer that has seen a small random language, and is in the middle of slot 0."""
    rng = np.random.default_rng(seed)
    proposer = make(min_prob=0.0)
    words = [rng.integers(0, 60, size=rng.integers(1, 5)).tolist() for _ in range(25)]

    def text() -> list[int]:
        return [t for w in rng.zipf(1.6, size=30) for t in words[min(w, 25) - 1]]

    for number in range(30):
        talk(proposer, 0, [number % 7], text())
    proposer.add_request(Request(0, "now", ints(*text()[:40])))
    return proposer, rng


def test_larger_trees_contain_smaller_ones_best_nodes_first() -> None:
    proposer, _ = _trained()
    whole = draft(proposer, 0, 64)
    assert np.all(np.diff(whole.probs) <= 0) and len(whole.tokens) == 64
    small = draft(proposer, 0, 64 - 1)
    assert {tuple(p) for p in paths(small)} <= {tuple(p) for p in paths(whole)}
    # Children of one node share its probability.
    for node in range(-1, 64):
        children = whole.probs[whole.parents == node].sum()
        assert children <= (whole.probs[node] if node >= 0 else 1.0) + 1e-5


def test_min_prob_bounds_every_node_and_limits_hold() -> None:
    proposer, _ = _trained()
    proposer._min_prob = 0.02
    forest = draft(proposer, 0, 64)
    assert 0 < len(forest.tokens) < 64 and forest.probs.min() >= np.float32(0.02)
    assert len(draft(proposer, 0, 0).tokens) == 0
    proposer._min_prob = 0.0
    assert len(draft(proposer, 0, 1000).tokens) <= MAX_DRAFT


def test_chain_follows_the_best_path() -> None:
    proposer, _ = _trained()
    proposer.add_request(Request(1, "chain", proposer._live[0].text[: proposer._slots.size[0]].copy(), branching=False))
    chain = draft(proposer, 1, 6)
    np.testing.assert_array_equal(chain.parents, np.arange(len(chain.parents)) - 1)
    assert chain.tokens[0] == draft(proposer, 0, 1).tokens[0]


def test_depth_ends_with_the_request() -> None:
    proposer = make(min_prob=0.0)
    talk(proposer, 0, [1], [1] * 9)
    proposer.add_request(Request(0, "a", ints(1, 1, 1), max_tokens=6))
    assert max(map(len, paths(draft(proposer, 0, 40)))) == 2  # and one token of the target's own


def sample(proposer: Fused, slot: int, group: str | None, namespace: str = "") -> None:
    proposer.add_request(Request(slot, f"{slot}_{group}", ints(1, 2, 3), group=group, namespace=namespace))


def test_samples_of_one_prompt_draft_from_each_other_at_once() -> None:
    proposer = make(min_prob=0.001, store=False, recycling=False)
    for slot in range(3):
        sample(proposer, slot, "g")
    sample(proposer, 3, "other")
    sample(proposer, 4, None)
    sample(proposer, 5, "g", namespace="tenant")
    proposer.observe(step(0, [3, *PHRASE]))
    for slot in (1, 2, 3, 4, 5):
        proposer.observe(step(slot, PHRASE[:3]))
    drafts = [draft(proposer, slot, 4).tokens.tolist() for slot in range(1, 6)]
    assert drafts == [PHRASE[3:7], PHRASE[3:7], [], [], []]
    assert set(draft(proposer, 1, 4).sources.tolist()) == {SOURCE_SIBLINGS}
    proposer.remove_request(0)  # what it wrote stays while its siblings live
    assert draft(proposer, 1, 4).tokens.tolist() == PHRASE[3:7]
    assert proposer.stats()["groups"] == 3
    for slot in (1, 2):
        proposer.remove_request(slot)
    assert proposer.stats()["groups"] == 2
    sample(proposer, 0, "g")
    proposer.observe(step(0, PHRASE[:3]))
    assert draft(proposer, 0, 4).tokens.tolist() == []


def test_siblings_grow_together_and_can_be_kept_apart() -> None:
    rng = np.random.default_rng(0)
    together, apart = (make(min_prob=0.05, store=False, recycling=False, siblings=s) for s in (True, False))
    for proposer in (together, apart):
        for slot in range(4):
            sample(proposer, slot, "g")
    for _ in range(40):
        for slot in range(3):
            tokens = rng.integers(0, 5000, size=20).tolist()
            for proposer in (together, apart):
                proposer.observe(step(slot, tokens))
    last = together._live[0].text[together._slots.size[0] - 10 : together._slots.size[0]].tolist()
    for proposer in (together, apart):
        proposer.observe(step(3, last[:5]))
    next(iter(together._groups.values())).automaton.check_integrity()
    for proposer, known in ((together, True), (apart, False)):
        proposer._min_prob = 0.0
        assert (last[5:] in paths(draft(proposer, 3, 40))) is known


def test_shared_memory_grows_once_however_many_siblings_need_it() -> None:
    proposer = make(store=False, recycling=False)
    for slot in range(8):
        sample(proposer, slot, "g")
    rng = np.random.default_rng(0)
    for _ in range(60):
        tokens = rng.integers(0, 5000, size=8 * 4).astype(np.int32)
        proposer.observe(
            StepResult(
                ints(*range(8)), tokens, np.arange(0, 33, 4, dtype=np.int32), *ints(0, 0).repeat(8).reshape(2, 8)
            )
        )
    # 1,920 tokens, twice: automata and texts of about a MiB.
    assert proposer.stats()["context_bytes"] < 2 << 20


def test_a_sample_that_resumes_with_output_keeps_its_own_text() -> None:
    proposer = make(min_prob=0.05, store=False, recycling=False)
    sample(proposer, 0, "g")
    proposer.observe(step(0, [*PHRASE]))
    proposer.add_request(Request(1, "1_g", ints(1, 2, 3, *PHRASE[:4]), num_output=4, group="g"))
    proposer.observe(step(1, [1, 2]))
    assert draft(proposer, 1, 1).tokens.tolist() == [3]
    proposer.remove_request(0)
    proposer.remove_request(1)
    assert proposer.stats()["groups"] == 0


def _topk(rng: np.random.Generator) -> np.ndarray:
    """Eight tokens; one time in ten not distinct, as no sound host would report them."""
    return rng.integers(0, 30, 8) if rng.random() < 0.1 else rng.choice(30, 8, replace=False)


def _random_run(seed: int) -> tuple[list[DraftForest], Fused]:
    """Samples, tenants, trees with rejected rows, chains, placeholders, small budgets: everything at random."""
    rng = np.random.default_rng(seed)
    proposer = make(min_prob=0.002, store_bytes=1 << 20, table_bytes=1 << 16)
    live: dict[int, tuple[str, str | None]] = {}
    forests = []
    for number in range(60):
        slot = int(rng.integers(0, 70))
        if slot in live:
            proposer.remove_request(slot)
            del live[slot]
        group = f"g{number // 4}" if rng.random() < 0.5 else None
        prompt = np.random.default_rng(number // 4).integers(-1, 30, size=20).astype(np.int32)
        live[slot] = (f"tenant {rng.integers(0, 3)}", group)
        proposer.add_request(
            Request(slot, str(number), prompt, 0, 3000, 0.0, *live[slot], branching=bool(rng.random() < 0.8))
        )
        for _ in range(2):
            slots = ints(*[s for s in live if rng.random() < 0.7] or [slot])
            limits = rng.integers(0, 20, size=len(slots)).astype(np.int32)
            forest = proposer.propose(slots, limits)
            forest.check_integrity(limits)
            forests.append(forest)
            emitted, rows, parents = [], [], []
            for i in range(len(slots)):
                lo, hi = forest.offsets[i : i + 2]
                mine = DraftForest(*(getattr(forest, f)[lo:hi] for f in ("tokens", "parents", "probs", "sources")), [])
                ways = paths(mine) or [[]]
                emitted.append([*ways[rng.integers(0, len(ways))], int(rng.integers(0, 30))])
                rows.append([int(rng.integers(0, 30)), *mine.tokens.tolist()])
                parents.append([-1, *(mine.parents + 1).tolist()])
            sizes, counts = [len(e) for e in emitted], [len(r) for r in rows]
            flat = ints(*(t for e in emitted for t in e))
            proposer.observe(
                StepResult(
                    slots,
                    flat,
                    np.cumsum([0, *sizes]).astype(np.int32),
                    ints(*(c - 1 for c in counts)),
                    ints(*(s - 1 for s in sizes)),
                    ints(*(t for r in rows for t in r)),
                    np.cumsum([0, *counts]).astype(np.int32),
                    ints(*(p for r in parents for p in r)),
                    np.array([_topk(rng) for _ in range(sum(counts))], np.int32),
                    np.sort(-rng.random((sum(counts), 8)) * 12, axis=1)[:, ::-1].astype(np.float32),
                )
            )
        assert proposer.stats()["store_bytes"] <= 1 << 20
    return forests, proposer


@pytest.mark.parametrize("seed", [0, 1])
def test_random_use_is_safe_bounded_and_deterministic(seed: int) -> None:
    first, proposer = _random_run(seed)
    second, _ = _random_run(seed)
    for a, b in zip(first, second, strict=True):
        for name in ("tokens", "parents", "probs", "sources", "offsets"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert sum(len(f.tokens) for f in first) > 1000
    assert min(int(f.tokens.min()) for f in first if len(f.tokens)) >= 0
    for request in proposer._live.values():
        request.automaton.check_integrity()
    for slot in list(proposer._live):
        proposer.remove_request(slot)
    stats = proposer.stats()
    assert stats["groups"] == stats["live_requests"] == stats["context_bytes"] == 0


def test_tree_probabilities_become_calibrated() -> None:
    """Expected calibration error over all nodes of trees, on a language where half of the steps are a guess."""
    rng = np.random.default_rng(7)
    proposer = make(min_prob=0.0)
    claimed, hits = [], []
    for number in range(40):
        text = (rng.choice(5, p=[0.4, 0.3, 0.15, 0.1, 0.05], size=30)[:, None] * 2 + np.arange(2)).reshape(-1)
        proposer.add_request(Request(0, str(number), ints(*text[:20])))
        for at in range(20, len(text) - 4):
            forest = draft(proposer, 0, 12)
            if number >= 15:
                truth = text[at : at + 12].tolist()
                claimed += forest.probs.tolist()
                hits += [path == truth[: len(path)] for path in paths(forest)]
            row = guesses(int(text[at]), int(rng.integers(0, 10)))
            proposer.observe(step(0, [int(text[at])], [(int(text[at - 1]), -1, row)]))
        proposer.remove_request(0)
    bins = np.minimum((np.array(claimed) * 10).astype(int), 9)
    error = sum(abs(np.sum(np.array(claimed)[bins == b]) - np.sum(np.array(hits)[bins == b])) for b in range(10))
    assert len(claimed) > 5000 and error / len(claimed) < 0.05
