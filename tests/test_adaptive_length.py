import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.proposers import adaptive_length
from vllm_specplug.proposers.adaptive_length import (
    CALL_NODES,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    PATIENCE,
    PROBE_COST,
    START_PROB,
    TRIAL_EVERY,
    TRIAL_NODES,
    AdaptiveLength,
    AdaptiveLengthOptions,
    BudgetOptions,
    select,
)
from vllm_specplug.proposers.auto import Auto, AutoOptions
from vllm_specplug.proposers.base import DraftForest, Others, Proposer, Request, StepLoad, StepResult
from vllm_specplug.proposers.saved_state import whole

from vllm_specplug import registry
from vllm_specplug.options import OptionError

PROMPT = np.arange(50, dtype=np.int32)


def forest_of(trees):
    """A forest of ``[(parent, prob), ...]`` per request; tokens count up."""
    nodes = [node for tree in trees for node in tree]
    sizes = np.array([0, *map(len, trees)], np.int32)
    return DraftForest(
        np.arange(len(nodes), dtype=np.int32),
        np.array([parent for parent, _ in nodes], np.int32),
        np.array([prob for _, prob in nodes], np.float32),
        np.zeros(len(nodes), np.int8),
        np.cumsum(sizes, dtype=np.int32),
    )


class Stub(Proposer):
    """Drafts chains whose tokens are accepted with the probabilities given, cut at the floor."""

    name = "stub"

    def __init__(self, chain=(0.9, 0.6, 0.3, 0.1)):
        self.chain = list(chain)
        self.floors, self.seen, self.removed = [], [], []

    def add_request(self, request):
        pass

    def observe(self, step):
        self.seen.append(step)

    def propose(self, slots, limits):
        self.floors.append(self.floor)
        trees = []
        for limit in limits:
            kept = [p for p in self.chain if p >= self.floor][:limit]
            trees.append([(j - 1, p) for j, p in enumerate(kept)])
        return forest_of(trees)

    def remove_request(self, slot):
        self.removed.append(slot)


class Server:
    """A server with a clock: a step takes ``base + per_row * rows`` seconds, accepts by the drafts' probabilities."""

    def __init__(self, proposer, requests, per_row, base=0.02, overhead=0.001, noise=0.05, seed=0, limit=8):
        self.proposer, self.base, self.per_row, self.overhead = proposer, base, per_row, overhead
        self.rng, self.noise, self.limit = np.random.default_rng(seed), noise, limit
        self.tokens = self.awake = self.steps = self.drafts = 0
        self.seconds = 0.0
        self.size = np.zeros(0, np.int64)
        self.drafted = np.zeros(0, np.int32)
        self.grow(requests)

    def grow(self, requests):
        for slot in range(len(self.size), requests):
            self.proposer.add_request(Request(slot, str(slot), PROMPT))
        self.size = np.concatenate([self.size, np.full(requests - len(self.size), len(PROMPT))])
        self.forest = forest_of([[]] * requests)

    def shrink(self, requests):
        for slot in range(requests, len(self.size)):
            self.proposer.remove_request(slot)
        self.size = self.size[:requests]
        self.forest = forest_of([[]] * requests)

    def step(self):
        n, forest = len(self.size), self.forest
        drafted = np.diff(forest.offsets)
        accepted = np.zeros(n, np.int32)
        for i in range(n):
            before = 1.0
            for prob in forest.probs[forest.offsets[i] : forest.offsets[i + 1]]:
                if self.rng.random() >= prob / before:
                    break
                accepted[i] += 1
                before = prob
        rows = n + int(drafted.sum())
        seconds = (self.base + self.per_row * rows) * self.rng.lognormal(0.0, self.noise)
        if self.rng.random() < 0.01:
            seconds *= 20
            self.seconds -= seconds * 0.95  # a hiccup: learned from, not counted
        load = StepLoad(n, rows, int(self.size.sum()), int(((drafted + 1) * self.size).sum()))
        self.size += accepted + 1
        self.tokens += n + int(accepted.sum())
        self.steps += 1
        self.drafts += int(drafted.sum())
        self.seconds += seconds
        if self.proposer.asleep(n, 0):
            self.forest = forest_of([[]] * n)
            return
        self.awake += 1
        self.seconds += self.overhead
        slots = np.arange(n, dtype=np.int32)
        offsets = np.concatenate([[0], np.cumsum(accepted + 1)]).astype(np.int32)
        self.proposer.observe(
            StepResult(
                slots,
                np.zeros(offsets[-1], np.int32),
                offsets,
                drafted.astype(np.int32),
                accepted,
                load=load,
                seconds=seconds + self.overhead,
                overhead=self.overhead,
            )
        )
        self.forest = self.proposer.propose(slots, np.full(n, self.limit, np.int32))

    def run(self, steps):
        """Tokens per second of these steps."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(steps):
            self.step()
        return (self.tokens - tokens) / (self.seconds - seconds)


def budget(inner=None, **options):
    return AdaptiveLength(BudgetOptions(**options), inner or Stub())


def fixed_rate(length, requests, per_row, chain, base=0.02, overhead=0.001):
    """Tokens per second of a server that always drafts ``length`` tokens, or none and no work for it."""
    emitted = 1 + sum(chain[:length])
    cost = base + per_row * requests * (1 + length) + (overhead if length else 0)
    return requests * emitted / cost


CHAIN = (0.8, 0.55, 0.4, 0.25, 0.15, 0.1, 0.06, 0.03)


@pytest.mark.parametrize("requests", [1, 4, 32])
@pytest.mark.parametrize("per_row", [0.00001, 0.001, 0.004, 0.02])
def test_is_as_fast_as_the_best_fixed_length(requests, per_row):
    server = Server(budget(Stub(CHAIN)), requests, per_row)
    server.run(200)
    best = max(fixed_rate(k, requests, per_row, CHAIN) for k in range(9))
    assert server.run(400) >= 0.95 * best


@pytest.mark.parametrize("requests", [1, 32])
@pytest.mark.parametrize("overhead", [0.0005, 0.002])
def test_nothing_predictable_costs_nothing(requests, overhead):
    server = Server(budget(Stub((0.02, 0.001))), requests, 0.004, overhead=overhead)
    server.run(100)
    awake, seconds = server.awake, server.seconds
    rate = server.run(660)
    assert (server.awake - awake) * overhead <= 1.5 * PROBE_COST * (server.seconds - seconds)
    assert rate >= 0.98 * fixed_rate(0, requests, 0.004, ())


def test_recovers_when_load_falls_and_when_text_becomes_predictable():
    inner = Stub((0.4, 0.2))
    proposer = budget(inner)
    server = Server(proposer, 1, 0.004)
    server.run(200)
    assert server.drafts > 0
    server.grow(32)  # a row now costs what it did, but is worth less beside 31 others
    server.run(150)
    drafts = server.drafts
    server.run(100)
    assert server.drafts - drafts <= 100  # trials only: a node for 32 requests would be 3200
    server.shrink(1)
    drafts = server.drafts
    server.run(20)
    assert server.drafts > drafts
    inner.chain = [0.001]
    server.run(200)
    inner.chain = [0.95, 0.9, 0.85]
    drafts = server.drafts
    server.run(LONGEST_PAUSE + 20)
    assert server.drafts - drafts >= 30


def test_trials_verify_the_best_nodes_when_nothing_pays_for_long():
    proposer = budget(Stub((0.3, 0.2, 0.1)))
    server = Server(proposer, 4, 0.05, base=0.001, overhead=0.03)
    server.run(PATIENCE + 8 * (LONGEST_PAUSE + 1))
    trials = proposer.stats()["trials"]
    assert 1 <= trials <= 8 / TRIAL_EVERY + 1
    assert server.drafts >= TRIAL_NODES


def test_pauses_grow_to_the_longest_and_end_early_for_another_batch():
    proposer = budget(Stub(()))
    server = Server(proposer, 4, 0.01, overhead=0.01)
    pauses = []
    for _ in range(200):
        server.step()
        if not pauses or proposer.stats()["pause_steps"] != pauses[-1]:
            pauses.append(proposer.stats()["pause_steps"])
    assert pauses == [0, FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE, LONGEST_PAUSE]
    while not proposer.stats()["paused"]:
        server.step()
    assert proposer.asleep(4, 0)
    assert not proposer.asleep(4, 2)  # half of the batch is new
    assert not proposer.asleep(4, 0)  # awake until it pauses again


def test_pauses_are_short_where_being_awake_costs_little():
    proposer = budget(Stub(()))
    server = Server(proposer, 4, 0.01, overhead=0.001)  # 1/60 of a step: 5 to 6 times PROBE_COST
    longest = 0
    for _ in range(200):
        server.step()
        longest = max(longest, proposer.stats()["pause_steps"])
    assert FIRST_PAUSE < longest <= 6


def test_may_be_told_not_to_pause():
    server = Server(budget(Stub(()), pause=False), 4, 0.01)
    server.run(100)
    assert server.awake == server.steps


def test_without_times_everything_above_min_prob_is_kept():
    proposer = budget(Stub((0.9, 0.5, 0.05, 0.01)), min_prob=0.02)
    proposer.add_request(Request(0, "0", PROMPT))
    slots, limits = np.zeros(1, np.int32), np.full(1, 8, np.int32)
    assert len(proposer.propose(slots, limits).tokens) == 3
    # The host tells times, but too few steps were seen: unlikely nodes wait.
    step = StepResult(slots, slots, np.array([0, 1], np.int32), slots, slots, load=StepLoad(1, 1, 50, 50))
    proposer.observe(step)
    assert not proposer.times.ready
    kept = proposer.propose(slots, limits)
    assert kept.probs.min() >= START_PROB and len(kept.tokens) == 2


def test_floor_follows_what_pays():
    inner = Stub(CHAIN)
    server = Server(budget(inner), 8, 0.004)
    server.run(100)
    dear = inner.floors[-1]
    inner = Stub(CHAIN)
    server = Server(budget(inner), 8, 0.0002)
    server.run(100)
    assert 0 <= inner.floors[-1] < dear < 1


def test_floor_rises_where_drafting_itself_is_slow(monkeypatch):
    """What a node costs to draft counts too, but one slow call does not."""
    now = [0.0]
    monkeypatch.setattr(adaptive_length.time, "perf_counter", lambda: now[0])

    class Slow(Stub):
        each = 1e-6

        def propose(self, slots, limits):
            forest = super().propose(slots, limits)
            now[0] += self.each * (CALL_NODES + len(forest.tokens))
            return forest

    inner = Slow((0.9, 0.5, 0.05))
    proposer = budget(inner)
    server = Server(proposer, 8, 0.0)
    server.run(300)
    cheap = inner.floors[-1]
    assert proposer.stats()["node_seconds"] == pytest.approx(1e-6, rel=0.3) and cheap < 0.01
    inner.each = 1.0
    server.run(1)
    assert proposer.stats()["node_seconds"] < 3e-6
    inner.each = 0.2e-3
    server.run(300)
    # A node's time is worth 8 requests * gain / 20 ms * 0.2 ms.
    assert inner.floors[-1] == pytest.approx(0.08 * proposer.stats()["expected_gain"], rel=0.2)


def test_drafts_without_probabilities_get_them_learned():
    class Blind(Stub):
        calibrated = False

        def propose(self, slots, limits):
            found = super().propose(slots, limits)
            self.truth = found.probs.copy()
            found.probs[:] = 1.0
            return found

    inner = Blind((0.9, 0.5, 0.02, 0.01))
    proposer = budget(inner)
    server = Server(proposer, 4, 0.002)
    original = proposer.propose

    def propose(slots, limits):
        found = original(slots, limits)
        # The server accepts by the true probabilities.
        sizes = np.diff(found.offsets)
        truth = np.concatenate([np.float32(inner.chain[:size]) for size in sizes]) if len(found.tokens) else found.probs
        server.claimed = found.probs
        return DraftForest(found.tokens, found.parents, truth.astype(np.float32), found.sources, found.offsets)

    proposer.propose = propose
    server.run(400)
    claimed = server.claimed[: int(np.diff(server.forest.offsets)[0])]
    assert 1 <= len(claimed) <= 3
    assert abs(claimed[0] - 0.9) < 0.1


@given(st.lists(st.lists(st.tuples(st.integers(0, 99), st.floats(0, 1)), max_size=8), max_size=5), st.randoms())
@settings(max_examples=60, deadline=None)
def test_select_keeps_exactly_the_chosen_nodes(raw, random):
    trees = [[(place % (j + 1) - 1, prob) for j, (place, prob) in enumerate(tree)] for tree in raw]
    forest = forest_of(trees)
    keep, paths = [], []
    for tree in trees:
        mine = []
        for parent, _ in tree:
            mine.append((parent < 0 or mine[parent]) and random.random() < 0.7)
        keep += mine

    def all_paths(forest):
        """Per request, the token path of every node, in order."""
        found = []
        for a, b in zip(forest.offsets[:-1], forest.offsets[1:], strict=True):
            mine = []
            for j in range(a, b):
                above = mine[forest.parents[j]] if forest.parents[j] >= 0 else ()
                mine.append((*above, int(forest.tokens[j])))
            found.append(mine)
        return found

    keep = np.array(keep, np.bool_)
    chosen = {int(token) for token in forest.tokens[keep]}
    paths = [[path for path in tree if path[-1] in chosen] for tree in all_paths(forest)]
    kept = select(forest, keep)
    assert all_paths(kept) == paths
    assert np.array_equal(kept.probs, forest.probs[keep])


def test_select_refuses_orphans():
    with pytest.raises(ValueError, match="parent"):
        select(forest_of([[(-1, 0.5), (0, 0.4)]]), np.array([False, True]))


def test_learned_state_survives():
    learned = AdaptiveLength(BudgetOptions(), Auto(AutoOptions()).inner)
    server = Server(learned, 2, 0.002)
    server.run(60)
    fresh = AdaptiveLength(BudgetOptions(), Auto(AutoOptions()).inner)
    fresh.restore(whole(learned.state()))
    assert fresh.times.ready
    before, after = learned.times.curve(2, 200, 8), fresh.times.curve(2, 200, 8)
    assert np.allclose(before / before[0], after / after[0], rtol=0.02)
    with pytest.raises(ValueError):
        fresh.restore({"step_time/nonsense": np.zeros(3)})


def test_counts_what_it_does():
    proposer = budget(Stub(CHAIN))
    server = Server(proposer, 4, 0.004)
    server.run(100)
    stats = proposer.stats()
    assert stats["steps"] == server.awake
    assert stats["offered_nodes"] >= stats["kept_nodes"] > 0
    assert stats["expected_gain"] > 1 and math.isfinite(stats["overhead_ratio"])


def test_slots_are_forgotten():
    inner = Stub()
    proposer = budget(inner)
    proposer.add_request(Request(200, "a", PROMPT))
    proposer.remove_request(200)
    assert inner.removed == [200]


def test_the_inner_proposer_is_named_by_an_option():
    user = registry.parse_options({"specplug": {"adaptive_length": {"inner": "TokenRecycling"}}})
    proposer = user.build(registry.find("AdaptiveLength"))
    assert proposer.inner.name == "token_recycling" and proposer.wants_topk
    default = registry.parse_options({}).build(registry.find("AdaptiveLength")).inner
    assert default.name == "retrieval" and default.options.min_prob == 0  # the budget cuts, unless the user wants both
    assert registry.parse_options({}).section(registry.find("Retrieval")).min_prob > 0
    user = registry.parse_options({"specplug": {"retrieval": {"min_prob": 0.2}}})
    assert user.build(registry.find("AdaptiveLength")).inner.options.min_prob == 0.2


@pytest.mark.parametrize("name", ["SparseVerify", "AdaptiveLength", "Retrievl", "vllm:eagle"])
def test_an_inner_proposer_that_is_not_there_is_refused_by_name(name):
    user = registry.parse_options({"specplug": {"adaptive_length": {"inner": name}}})
    with pytest.raises(OptionError, match=r"specplug\.adaptive_length\.inner = .*expected one of .*Retrieval"):
        user.build(registry.find("AdaptiveLength"))


def test_options_are_those_of_the_budget():
    assert AdaptiveLengthOptions().policy == "marginal"
    with pytest.raises(OptionError, match="policy"):
        registry.parse_options({"specplug": {"auto": {"policy": "marginl"}}})


def test_a_budget_among_others_drafts_as_one_for_all_would():
    def kept(requests, others=None):
        """Nodes kept of each request's chain on a server whose rows are not cheap."""
        proposer = budget(pause=False)
        rows = [1, 2, 4, 8, 16, 32, 64]
        proposer.times.prime([StepLoad(1, n, 0, 0) for n in rows], [0.02 + 0.0015 * n for n in rows])
        for slot in range(requests):
            proposer.add_request(Request(slot, str(slot), PROMPT))
        if others is not None:
            proposer.others = others
        sizes = np.diff(proposer.propose(np.arange(requests, dtype=np.int32), np.full(requests, 4, np.int32)).offsets)
        assert (sizes == sizes[0]).all()
        return int(sizes[0])

    together = kept(8)
    accepted = sum((0.9, 0.6, 0.3, 0.1)[:together])
    among = Others(7, 7 * together, 7 * len(PROMPT), round(7 * (1 + accepted)))
    assert kept(1, among) == together < kept(1)
    assert (
        kept(1, Others(7, 7 * together, 7 * len(PROMPT), 0)) > together
    )  # as if the others' tokens were worth nothing
