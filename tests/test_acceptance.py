"""Learned probabilities of acceptance: calibrated, never rising along a path, learned from verified nodes only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proposer_steps import ints
from vllm_specplug.proposers.acceptance import Acceptance
from vllm_specplug.proposers.base import DraftForest

SLOT = ints(0)


def forest(parents: list[list[int]], probs: list[float] | None = None, matched: list[int] | None = None) -> DraftForest:
    """Distinct tokens; every probability 1 if none are given."""
    flat = ints(*(p for one in parents for p in one))
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in parents])]).astype(np.int32)
    return DraftForest(
        np.arange(len(flat), dtype=np.int32),
        flat,
        np.ones(len(flat), np.float32) if probs is None else np.array(probs, np.float32),
        np.zeros(len(flat), np.int8),
        offsets,
        None if matched is None else ints(*matched),
    )


def chain(length: int, probs: list[float] | None = None, matched: int = 0) -> DraftForest:
    return forest([list(range(-1, length - 1))], probs, [matched])


def calibration_error(claimed: np.ndarray, hit: np.ndarray) -> float:
    """Expected calibration error, 20 equal bins."""
    bins = np.minimum((claimed * 20).astype(int), 19)
    return float(np.abs(np.bincount(bins, claimed - hit, 20)).sum() / len(claimed))


def simulate(rate, estimate=None, steps: int = 6000, length: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Chains whose nodes are accepted with probability ``rate(slot, matched, depth)`` each, all verified.

    Returns claimed probabilities and outcomes of all nodes of the later half, ``[samples, length]``.
    """
    rng, learner = np.random.default_rng(0), Acceptance()
    claimed, hits = [], []
    for number in range(steps):
        slot, matched = number % 4, int(rng.choice([1, 2, 3, 5, 8, 20]))
        odds = np.array([rate(slot, matched, depth) for depth in range(length)])
        probs = None if estimate is None else np.cumprod(estimate(odds, rng)).tolist()
        given = learner.assign(chain(length, probs, matched), ints(slot))
        accepted = int(np.cumprod(rng.random(length) < odds).sum())
        learner.learn(ints(slot), ints(length), ints(accepted))
        if number >= steps // 2:
            claimed.append(given)
            hits.append(np.arange(length) < accepted)
    return np.array(claimed, float), np.array(hits, float)


RATES = {
    "constant": lambda slot, matched, depth: 0.6,
    "rare": lambda slot, matched, depth: 0.1,
    "by match length": lambda slot, matched, depth: 0.3 if matched < 3 else 0.6 if matched < 6 else 0.9,
    "fading": lambda slot, matched, depth: 0.9 - 0.1 * depth,
    "by request": lambda slot, matched, depth: 0.25 if slot < 2 else 0.85,
}


@pytest.mark.parametrize("name", RATES)
def test_calibrated_on_chains(name: str) -> None:
    claimed, hit = simulate(RATES[name])
    assert calibration_error(claimed.ravel(), hit.ravel()) <= 0.03


@pytest.mark.parametrize("name", ["by match length", "by request"])
def test_tells_good_drafts_from_bad_ones(name: str) -> None:
    claimed, hit = (array[:, 0] for array in simulate(RATES[name]))
    error, error_of_average = ((claimed - hit) ** 2).mean(), hit.mean() * (1 - hit.mean())
    assert error < 0.9 * error_of_average


def test_learns_how_drafts_fade_with_depth() -> None:
    claimed, _ = simulate(RATES["fading"])
    given_parent = (claimed[:, 1:] / claimed[:, :-1]).mean(axis=0)
    assert given_parent[[0, 2, 4]] == pytest.approx([0.8, 0.6, 0.4], abs=0.08)


def test_learns_how_far_to_trust_the_proposer_s_own_estimates() -> None:
    rng = np.random.default_rng(1)
    rates = rng.choice([0.15, 0.9], 100_000)
    counter = iter(rates)
    claimed, hit = simulate(
        lambda slot, matched, depth: next(counter),
        estimate=lambda odds, rng: np.where(odds > 0.5, 0.7, 0.3),  # ranks right, values wrong
    )
    assert calibration_error(claimed.ravel(), hit.ravel()) <= 0.03
    first = claimed[:, 0]
    assert np.quantile(first, 0.9) > 0.75
    assert np.quantile(first, 0.1) < 0.35


def test_starts_optimistic_and_forgets_a_request_s_record() -> None:
    learner = Acceptance()
    start = learner.assign(chain(3), SLOT)
    assert start[0] > 0.6
    for _ in range(400):
        for slot, accepted in ((0, 0), (1, 3)):
            learner.assign(chain(3), ints(slot))
            learner.learn(ints(slot), ints(3), ints(accepted))
    bad, good = learner.assign(forest([[-1], [-1]]), ints(0, 1))
    assert bad < 0.3 < 0.7 < good
    learner.forget(0)
    learner.forget(9)  # never seen
    assert learner.assign(chain(1), SLOT)[0] == learner.assign(chain(1), ints(77))[0]


def test_only_verified_nodes_teach() -> None:
    def learned(drafted: int, accepted: int) -> np.ndarray:
        learner = Acceptance()
        learner.assign(chain(4), SLOT)
        learner.learn(SLOT, ints(drafted), ints(accepted))
        return learner.state()["seen"]

    assert learned(4, 0) == 1  # the parents of the others were rejected
    assert learned(4, 2) == 3
    assert learned(4, 4) == 4
    assert learned(2, 2) == 2  # the others were cut
    assert learned(0, 0) == 0


def test_an_outcome_teaches_once_and_without_a_draft_nothing() -> None:
    learner = Acceptance()
    learner.learn(ints(5), ints(4), ints(4))
    learner.assign(chain(2), SLOT)
    learner.forget(0)
    learner.learn(SLOT, ints(2), ints(2))
    learner.assign(forest([[]]), SLOT)
    learner.learn(SLOT, ints(2), ints(2))
    assert not any(array.any() for array in learner.state().values())
    learner.assign(chain(2), SLOT)
    for _ in range(3):
        learner.learn(SLOT, ints(2), ints(2))
    assert learner.state()["seen"] == 2


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5])
def test_useless_drafts_are_rarely_tried_and_useful_ones_soon_found(threshold: float) -> None:
    """A budget that verifies what exceeds a threshold, on text that changes."""
    learner = Acceptance()

    def step(accept: bool) -> int:
        verified = int((learner.assign(chain(8), SLOT) > threshold).sum())
        learner.learn(SLOT, ints(verified), ints(verified if accept else 0))
        return verified

    tried = sum(step(False) > 0 for _ in range(4000))
    assert 0 < sum(step(False) > 0 for _ in range(4000)) < 0.04 * 4000
    assert tried < 0.08 * 4000
    assert any(step(True) == 8 for _ in range(1500))


def test_levels_of_a_tree() -> None:
    learner = Acceptance()
    tree = forest([[-1, -1, 0, 0, 1, 4]])  # two, three and one node deep down
    rng, level_hits, reached = np.random.default_rng(0), np.zeros(3), np.zeros(3)
    for _ in range(3000):
        given = learner.assign(tree, SLOT)
        depth = int(np.cumprod(rng.random(3) < (0.8, 0.5, 0.3)).sum())
        level_hits += np.arange(3) < depth
        reached += given[[0, 2, 5]]
        learner.learn(SLOT, ints(6), ints(depth))
    assert given[0] == given[1]
    assert given[2] == given[3] == given[4]
    assert (given >= given[5]).all()
    # The nodes of a level share its probability; the one on the last is held down by its parent's.
    assert given[0] == pytest.approx(0.4, abs=0.08)
    assert given[2] == pytest.approx(0.4 / 3, abs=0.05)
    assert given[5] == pytest.approx(0.12, abs=0.05)
    # Of a tree cut inside a level, that level teaches nothing.
    before = learner.state()["seen"]
    learner.assign(tree, SLOT)
    learner.learn(SLOT, ints(4), ints(2))
    assert learner.state()["seen"] == before + 1


def random_forest(data: st.DataObject) -> DraftForest:
    trees = []
    for _ in range(data.draw(st.integers(0, 4))):
        size = data.draw(st.integers(0, 40))
        if data.draw(st.booleans()):
            trees.append(list(range(-1, size - 1)))
        else:
            trees.append([data.draw(st.integers(-1, j - 1)) for j in range(size)])
    probs: list[float] = []
    for tree in trees:
        start = len(probs)
        for parent in tree:
            above = probs[start + parent] if parent >= 0 else 1.0
            probs.append(above * data.draw(st.sampled_from([0.0, 0.3, 0.999, 1.0])))
    matched = data.draw(st.none() | st.just([data.draw(st.integers(-1, 200)) for _ in trees]))
    return forest(trees, probs, matched)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_is_drafted_and_accepted_probabilities_are_sound(data: st.DataObject) -> None:
    learner = Acceptance()
    for _ in range(data.draw(st.integers(1, 6))):
        drafts = random_forest(data)
        n = len(drafts.offsets) - 1
        slots = np.array(data.draw(st.permutations(range(130)))[:n], np.int32)
        probs = learner.assign(drafts, slots)
        assert probs.dtype == np.float32
        assert probs.shape == drafts.tokens.shape
        checked = DraftForest(drafts.tokens, drafts.parents, probs, drafts.sources, drafts.offsets)
        checked.check_integrity()
        sizes = np.diff(drafts.offsets)
        drafted = np.array([data.draw(st.integers(0, int(s))) for s in sizes], np.int32)
        accepted = np.array([data.draw(st.integers(0, int(d))) for d in drafted], np.int32)
        learner.learn(slots, drafted, accepted)
    assert all(np.isfinite(array).all() for array in learner.state().values())


def test_state_goes_on_where_it_was_saved() -> None:
    old, new = Acceptance(), Acceptance()
    for accepted in (0, 1, 2, 3, 0, 0):
        old.assign(chain(3, matched=4), SLOT)
        old.learn(SLOT, ints(3), ints(accepted))
    saved = old.state()
    new.restore(saved)
    for slot in (8, 9):
        both = [learner.assign(chain(3, matched=4), ints(slot)).tolist() for learner in (old, new)]
        assert both[0] == both[1]
    new.assign(chain(3), SLOT)
    new.learn(SLOT, ints(3), ints(3))
    assert all((saved[name] == array).all() for name, array in old.state().items())  # nothing is shared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.zeros(3)}, r"saved weights is float64\(3,\)"),
        ({"seen": np.zeros(1, np.float32)}, "saved seen is float32"),
        ({"seen": np.array([-1.0])}, "saved seen must not be negative"),
        ({"seen": np.array([np.nan])}, "saved seen has values that are not finite"),
        ({"more": np.zeros(1)}, "saved arrays"),
    ],
)
def test_state_that_does_not_fit_changes_nothing(change: dict[str, np.ndarray], message: str) -> None:
    learner = Acceptance()
    before = learner.state()
    with pytest.raises(ValueError, match=message):
        learner.restore(before | {"weights": before["weights"] + 1} | change)
    assert all((before[name] == array).all() for name, array in learner.state().items())


def test_bad_input_is_named() -> None:
    learner = Acceptance()
    with pytest.raises(ValueError, match=r"1 requests, .* for 2 slots"):
        learner.assign(chain(2), ints(0, 1))
    with pytest.raises(ValueError, match="slot -3 is negative"):
        learner.assign(chain(2), ints(-3))
    with pytest.raises(ValueError, match="slot -3 is negative"):
        learner.learn(ints(-3), ints(1), ints(1))
    for parents in ([-1, 1], [-2], [-1, 5]):
        with pytest.raises(ValueError, match=r"request 1: .* parent does not come before it"):
            learner.assign(forest([[-1], parents]), ints(0, 1))
    for offsets in (ints(1, 2), ints(0, 3), ints(0, -1)):
        broken = chain(2)
        broken = DraftForest(broken.tokens, broken.parents, broken.probs, broken.sources, offsets)
        with pytest.raises(ValueError, match="request 0: offsets"):
            learner.assign(broken, SLOT)
    with pytest.raises(ValueError, match="2 slots, 1 drafted and 1 accepted"):
        learner.learn(ints(0, 1), ints(1), ints(1))
    for accepted in (-1, 3):
        with pytest.raises(ValueError, match="accepted"):
            learner.learn(SLOT, ints(2), ints(accepted))
