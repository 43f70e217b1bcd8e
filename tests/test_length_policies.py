"""Length policies: every rule against a plain reference, what policies learn, and bad input."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proposer_steps import ints
from vllm_specplug.proposers import length_policies as lp
from vllm_specplug.proposers.length_policies import POLICIES, Drafted, Outcome, make_policy
from vllm_specplug.proposers.length_policy_state import Gain

Node = tuple[int, float]  # parent, path probability


def drafted(*requests: list[Node], matched: tuple[int, ...] | None = None) -> Drafted:
    """A forest; slots count from 3 on, so that they are not indices."""
    nodes = [node for request in requests for node in request]
    return Drafted(
        np.array([p for _, p in nodes], np.float32),
        ints(*(parent for parent, _ in nodes)),
        np.cumsum([0, *map(len, requests)], dtype=np.int32),
        np.arange(3, 3 + len(requests), dtype=np.int32),
        ints(*(matched or [0] * len(requests))),
    )


def chain(*probs: float) -> list[Node]:
    return [(i - 1, p) for i, p in enumerate(probs)]


def outcome(n: int, drafts: int, accepted: int, seconds: float = math.nan, base: float = math.nan) -> Outcome:
    """Each of ``n`` requests had as many drafts and accepted as many."""
    counts = (np.full(n, x, np.int32) for x in (drafts, accepted, accepted + 1))
    return Outcome(np.arange(3, 3 + n, dtype=np.int32), *counts, seconds, base)


def is_closed(forest: Drafted, keep: np.ndarray) -> bool:
    starts = np.repeat(forest.offsets[:-1], np.diff(forest.offsets))
    above = starts + forest.parents
    return all(keep[a] for a, parent, k in zip(above, forest.parents, keep, strict=True) if k and parent >= 0)


@st.composite
def forests(draw: st.DrawFn, most_nodes: int = 8, most_requests: int = 3) -> Drafted:
    requests = []
    for _ in range(draw(st.integers(1, most_requests))):
        nodes: list[Node] = []
        for j in range(draw(st.integers(0, most_nodes))):
            parent = draw(st.integers(-1, j - 1))
            share = draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]))
            nodes.append((parent, share * (nodes[parent][1] if parent >= 0 else 1.0)))
        requests.append(nodes)
    return drafted(*requests, matched=tuple(draw(st.integers(0, 9)) for _ in requests))


@st.composite
def curves(draw: st.DrawFn, size: int) -> np.ndarray:
    """Rising seconds, plateaus and steps included."""
    steps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.01, 0.1, 1.0]), min_size=size, max_size=size))
    return 1.0 + np.cumsum([0.0, *steps])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(sorted(POLICIES)))
def test_what_is_kept_is_closed_under_parents(data: st.DataObject, name: str) -> None:
    forest = data.draw(forests())
    keep = make_policy(name).choose(forest, data.draw(curves(len(forest.probs))))
    assert keep.shape == forest.probs.shape and keep.dtype == np.bool_
    assert is_closed(forest, keep)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_kept_set_is_closed_where_a_child_is_rounded_above_its_parent(name: str) -> None:
    forest = drafted([(-1, 0.5), (0, np.nextafter(np.float32(0.5), np.float32(1))), (1, math.nan)], matched=(1,))
    assert is_closed(forest, make_policy(name).choose(forest, np.ones(4)))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_nothing_drafted(name: str) -> None:
    policy = make_policy(name)
    assert policy.choose(drafted([], []), np.ones(1)).shape == (0,)
    assert policy.choose(drafted(), np.ones(1)).shape == (0,)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), rate=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_marginal_is_the_best_closed_set(data: st.DataObject, rate: float) -> None:
    forest = data.draw(forests(most_nodes=4, most_requests=2))
    size = len(forest.probs)
    seconds = data.draw(curves(size))

    def worth(keep: np.ndarray) -> float:
        return float(forest.probs[keep].sum(dtype=np.float64)) - rate * seconds[keep.sum()]

    every = (np.array(bits, bool) for bits in itertools.product([False, True], repeat=size))
    best = max(worth(keep) for keep in every if is_closed(forest, keep))
    assert worth(lp.marginal(forest, seconds, rate)) == pytest.approx(best, abs=1e-6)


def test_marginal_crosses_a_step_for_a_plateau_that_pays_and_keeps_the_fewest_among_equals() -> None:
    forest = drafted(chain(0.9, 0.8, 0.7, 0.0))
    # The first row costs 2 tokens' worth, the next two nothing.
    seconds = np.array([1.0, 3.0, 3.0, 3.0, 3.0])
    assert lp.marginal(forest, seconds, 1.0).tolist() == [True, True, True, False]
    assert lp.marginal(forest, seconds, 1.3).tolist() == [False] * 4


def test_marginal_on_steep_and_flat_curves() -> None:
    forest = drafted(chain(0.9, 0.5, 0.2), chain(0.6, 0.1))
    policy = make_policy("marginal")
    assert not policy.choose(forest, 1.0 + np.arange(6.0)).any()
    assert policy.choose(forest, np.ones(6)).all()


def test_marginal_rate_comes_from_long_run_gain() -> None:
    """At twice the speed without drafts a row of 0.2 steps must bring 0.4 tokens per request's base time."""
    policy = make_policy("marginal")
    forest, seconds = drafted(chain(0.9, 0.5, 0.3)), 0.01 * (1.0 + 0.2 * np.arange(4))
    # Nothing learned: the step's own best ratio is 1.9 / 1.2, so a row must bring 0.32.
    assert policy.choose(forest, seconds).tolist() == [True, True, False]
    for _ in range(lp.SETTLED):
        policy.learn(outcome(1, 3, 2, seconds=0.015, base=0.01))  # 3 tokens in 1.5: gain 2
    assert policy.choose(forest, seconds).tolist() == [True, True, False]
    assert policy.floor() == pytest.approx(lp.FLOOR_MARGIN * 0.4)
    for _ in range(500):
        policy.learn(outcome(1, 3, 2, seconds=0.01, base=0.01))  # now gain 3
    assert policy.choose(forest, seconds).tolist() == [True, False, False]
    assert policy.floor() == pytest.approx(lp.FLOOR_MARGIN * 0.6, rel=0.01)


def test_marginal_gain_is_kept_per_load_and_never_under_one() -> None:
    policy = make_policy("marginal")
    for _ in range(100):
        policy.learn(outcome(1, 8, 7, seconds=0.01, base=0.01))  # gain 8 at one request
        policy.learn(outcome(4, 8, 0, seconds=0.02, base=0.01))  # gain 0.5 at four
        policy.learn(outcome(4, 8, 7))  # of unknown time: says nothing
    assert not policy.choose(drafted(chain(0.9)), np.array([1.0, 1.2])).any()
    four = drafted(chain(0.9), chain(0.5), chain(0.5), chain(0.2))
    # Four tokens a second: at 0.1 s a row must bring 0.4.
    assert policy.choose(four, 1.0 + 0.1 * np.arange(5)).tolist() == [True, True, True, False]


def test_marginal_floor_is_zero_while_more_would_be_free() -> None:
    policy = make_policy("marginal")
    wall = np.array([1.0, 1.0, 1.0, 9.0])
    policy.choose(drafted(chain(0.9, 0.8)), wall)
    assert policy.floor() == 0.0
    policy.choose(drafted(chain(0.9)), 1.0 + np.arange(4.0))
    high = policy.floor()
    assert high == pytest.approx(lp.FLOOR_MARGIN)
    policy.choose(drafted([]), np.ones(1))  # nothing to read it from
    assert policy.floor() == pytest.approx(lp.FLOOR_MARGIN * high)


def test_marginal_floor_drops_nothing_that_would_be_kept() -> None:
    policy = make_policy("marginal")
    rng = np.random.default_rng(1)
    seconds = 0.01 + 0.001 * np.arange(33) ** 1.2
    for _ in range(50):
        forest = drafted(*(chain(*np.cumprod(rng.uniform(0.3, 1.0, 8))) for _ in range(4)))
        before = policy.floor()
        keep = policy.choose(forest, seconds)
        assert keep.any() and (forest.probs[keep] >= before).all()
        policy.learn(outcome(4, 8, 1, seconds=1.5, base=1.0))
    assert policy.floor() > 0


def test_fixed_keeps_the_most_probable_of_each_request() -> None:
    tree = [(-1, 0.5), (-1, 0.4), (0, 0.45), (2, 0.1)]
    keep = make_policy("fixed", length=3).choose(drafted(tree, chain(0.1, 0.05)), np.ones(7))
    assert keep.tolist() == [True, True, True, False, True, True]
    assert not make_policy("fixed", length=0).choose(drafted(tree), np.ones(5)).any()


def test_ties_go_to_what_was_drafted_first() -> None:
    assert lp.most_probable(drafted([(-1, 0.5), (0, 0.5), (-1, 0.5)]), 2).tolist() == [True, True, False]


def test_specdecpp_is_a_threshold_on_the_probability_of_any_rejection() -> None:
    forest = drafted([(-1, 0.9), (0, 0.75), (1, 0.5), (-1, 0.1)])
    assert make_policy("specdec++").choose(forest, np.ones(5)).tolist() == [True, True, False, False]
    assert make_policy("specdec++", threshold=0.5).choose(forest, np.ones(5)).tolist() == [True, True, True, False]


def test_svip_stops_each_path_where_the_draft_is_uncertain() -> None:
    def reference(q: float, m: int) -> float:
        q = max(q, 1 / (m + 1))
        return math.sqrt(0.15 * -sum(p * math.log(p) for p in [q, *[(1 - q) / m] * m] if p > 0))

    qs = [0.99, 0.9, 0.85, 0.5, 0.1]
    forest = drafted(*([(-1, 0.5), (0, 0.5 * q)] for q in qs))
    for threshold in (0.1, 0.3, 0.4, 0.6):
        # The first node's own entropy is that of 0.5.
        roots = reference(0.5, lp.OTHERS) <= threshold
        expected = [k for q in qs for k in (roots, roots and reference(q, lp.OTHERS) <= threshold)]
        assert lp.svip(forest, threshold).tolist() == expected
    # Low path probability alone does not stop it.
    sure = drafted(chain(*0.95 ** np.arange(1, 40)))
    assert make_policy("svip").choose(sure, np.ones(40)).all()


def test_thompson_depths_have_the_law_of_beta_coin_flips() -> None:
    rng = np.random.default_rng(0)
    n = 20_000
    depths = lp.thompson_depths(np.full(n, 3.0), np.full(n, 1.0), 3, rng)
    share = np.bincount(depths, minlength=4) / n  # each go on has probability 3/4
    np.testing.assert_allclose(share, [1 / 4, 3 / 16, 9 / 64, 27 / 64], atol=0.015)


def test_thompson_learns_per_request_and_forgets() -> None:
    policy, again = (make_policy("thompson", seed=7) for _ in range(2))
    pair = drafted(chain(*[0.5] * 8), chain(*[0.5] * 8))
    for _ in range(200):
        kept = policy.choose(pair, np.ones(17)).reshape(2, 8).sum(axis=1).astype(np.int32)
        np.testing.assert_array_equal(kept, again.choose(pair, np.ones(17)).reshape(2, 8).sum(axis=1))
        accepted = np.array([kept[0], 0], np.int32)  # the first accepts all, the second nothing
        for one in (policy, again):
            one.learn(Outcome(pair.slots, kept, accepted, accepted + 1, math.nan, math.nan))
    counts = [policy.choose(pair, np.ones(17)).reshape(2, 8).sum(axis=1) for _ in range(50)]
    first, second = np.mean(counts, axis=0)
    assert first > 7 and second < 0.5
    policy.forget(4)
    assert np.mean([policy.choose(pair, np.ones(17))[8:].sum() for _ in range(50)]) > 0.5


def test_goodput_is_the_best_single_length() -> None:
    forest = drafted(chain(0.9, 0.8, 0.7, 0.6), [(-1, 0.5), (-1, 0.4), (0, 0.2)], [])
    seconds = 1.0 + 0.1 * np.arange(8)
    for a in (0.05, 0.3, 0.6, 0.9):
        # Rows of lengths 0 to 4: the tree has two nodes at depth 1 and one at 2.
        rows, depths = [0, 3, 5, 6, 7], [4, 2, 0]
        rates = [sum(sum(a**j for j in range(min(k, d) + 1)) for d in depths) / seconds[r] for k, r in enumerate(rows)]
        assert lp.goodput(forest, seconds, a) == int(np.argmax(rates))
    assert lp.goodput(forest, seconds, 0.05) == 0 and lp.goodput(forest, np.ones(8), 0.05) == 4


def test_goodput_learns_acceptance_per_level_and_tries_again() -> None:
    policy = make_policy("goodput", start=0.5, window=16)
    forest, seconds = drafted([(-1, 0.5), (-1, 0.4), (0, 0.4), (2, 0.3)]), 1.0 + 0.2 * np.arange(5)
    assert policy.choose(forest, np.ones(5)).all()
    policy.learn(outcome(1, 4, 2))  # two levels of three accepted, the next not
    assert policy.acceptance == pytest.approx((2 + 0.5) / (3 + 1))
    for _ in range(100):
        policy.choose(forest, np.ones(5))
        policy.learn(outcome(1, 4, 0))
    assert policy.acceptance < 0.05 and not policy.choose(forest, seconds).any()
    for _ in range(200):
        policy.choose(forest, seconds)
        policy.learn(outcome(1, 0, 0))
    assert policy.acceptance == pytest.approx(0.5, abs=0.01)


def test_opt_tree_keeps_the_best_nodes_and_stops_deepening() -> None:
    tree = [(-1, 0.9), (0, 0.8), (0, 0.05), (1, 0.2), (3, 0.15)]
    forest = drafted(tree, chain(0.3, 0.2))
    keep = make_policy("opt_tree", nodes=4).choose(forest, np.ones(8))
    assert keep.tolist() == [True, True, False, True, True, True, True]
    # Of four nodes, levels add 0.9, 0.85, 0.2 (the third is the last then); and 0.3, where it stops at once.
    keep = make_policy("opt_tree", nodes=4, threshold=0.5).choose(forest, np.ones(8))
    assert keep.tolist() == [True, True, True, True, False, True, False]


@settings(deadline=None, max_examples=50)
@given(forest=forests(), nodes=st.integers(0, 5))
def test_opt_tree_without_threshold_has_the_greatest_mass(forest: Drafted, nodes: int) -> None:
    keep = lp.opt_tree(forest, nodes, 0.0)
    for lo, hi in itertools.pairwise(forest.offsets):
        best = np.sort(forest.probs[lo:hi])[::-1][:nodes].sum()
        assert forest.probs[lo:hi][keep[lo:hi]].sum() == pytest.approx(best, abs=1e-6)


def test_suffix_factor_is_in_proportion_to_the_match() -> None:
    forest = drafted(chain(0.9, 0.8, 0.7), chain(0.9, 0.05), chain(0.9), matched=(1, 5, 0))
    assert make_policy("suffix_factor").choose(forest, np.ones(7)).tolist() == [True, *[False] * 2, True, *[False] * 2]
    keep = make_policy("suffix_factor", factor=1.5, offset=1.0, min_prob=0.01).choose(forest, np.ones(7))
    assert keep.tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("marginl", {}, "unknown policy 'marginl'. Did you mean 'marginal'? Allowed: fixed, goodput"),
        ("svip", {"treshold": 1}, "policy svip has no parameter 'treshold'. Did you mean 'threshold'? Allowed: thresh"),
        ("marginal", {"length": 1}, "policy marginal has no parameter 'length'. Allowed: none"),
        ("fixed", {"length": -1}, "policy fixed: length = -1 is not allowed: expected a whole number of at least 0"),
        ("fixed", {"length": 1.5}, "length = 1.5 is not allowed: expected a whole number"),
        ("specdec++", {"threshold": 1.5}, "threshold = 1.5 is not allowed: expected a number from 0.0 to 1.0"),
        ("goodput", {"start": math.nan}, "start = nan is not allowed"),
        ("thompson", {"a": 0}, "a = 0 is not allowed"),
        ("suffix_factor", {"factor": "x"}, "factor = 'x' is not allowed"),
        ("opt_tree", {"nodes": math.inf}, "nodes = inf is not allowed"),
    ],
)
def test_bad_names_and_parameters(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_policy(name, **parameters)


def test_a_parameter_that_is_none_has_its_default() -> None:
    assert make_policy("fixed", length=None).length == make_policy("fixed").length  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_bad_forests(name: str) -> None:
    good = drafted(chain(0.9, 0.8), chain(0.5))
    policy = make_policy(name)
    for fields, message in (
        ({"parents": ints(-1, 1, -1)}, "request 0 of 2: a parent does not come before its child"),
        ({"parents": ints(-1, 0, -2)}, "request 1 of 2: a parent"),
        ({"offsets": ints(0, 4, 3)}, "must rise"),
        ({"offsets": ints(0, 3)}, "no forest of 2 requests"),
        ({"offsets": ints(1, 2, 3)}, "no forest of 2 requests"),
        ({"parents": ints(-1)}, "no forest"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.choose(good._replace(**fields), np.ones(4))


@pytest.mark.parametrize("name", ["marginal", "goodput"])
def test_a_curve_that_is_too_short(name: str) -> None:
    with pytest.raises(ValueError, match="seconds has 2 entries; 2 draft nodes need 3"):
        make_policy(name).choose(drafted(chain(0.9, 0.8)), np.ones(2))


# One budget of several in an engine, what is not its own given.


def test_one_budget_of_several_drafts_as_much_as_one_for_all() -> None:
    probs = (0.9, 0.6, 0.35, 0.2, 0.1)
    own, seconds = drafted(chain(*probs)), 0.02 + 0.0015 * np.arange(100)
    together = make_policy("marginal").choose(drafted(*[chain(*probs)] * 8), seconds).reshape(8, len(probs))
    kept = together[0]
    assert (together == kept).all() and 0 < kept.sum() < len(probs)
    rows, tokens = 7 * int(kept.sum()), 7 * (1.0 + float(own.probs[kept].sum()))
    alone = make_policy("marginal").choose(own._replace(given=tokens), seconds[rows:])
    assert alone.tolist() == kept.tolist()
    # Not knowing of the others' tokens it would slow them down for few of its own.
    assert make_policy("marginal").choose(own, seconds[rows:]).sum() > kept.sum()


def test_goodput_counts_tokens_that_are_given() -> None:
    forest, seconds = drafted(chain(0.9, 0.8, 0.7, 0.6)), 0.02 + 0.004 * np.arange(5)
    assert lp.goodput(forest, seconds, 0.8) > lp.goodput(forest._replace(given=20.0), seconds, 0.8) == 0


def test_the_gain_counts_tokens_that_are_given() -> None:
    one, several = Gain(), Gain()
    one.learn(outcome(2, 3, 2, seconds=0.03, base=0.02))
    several.learn(outcome(2, 3, 2, seconds=0.03, base=0.02)._replace(given=3.0))
    assert one.at(2) == (pytest.approx(3.0 / 1.5), 1)
    assert several.at(5) == (pytest.approx((6 + 3) / 5 / 1.5), 1) and several.at(2) == (1.0, 0)
