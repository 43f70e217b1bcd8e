"""Choosing one draft length per step: on simulated servers, against every fixed length."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from draft_servers import Chains, Fixed, Server, Trees, cpu, gpu, gpu_without_graphs, rate
from vllm_specplug.proposers import draft_length
from vllm_specplug.proposers.draft_length import DraftLength, Gains, lengths_up_to
from vllm_specplug.proposers.length_times import LengthTimes

LENGTHS = lengths_up_to(31)


def hopeless():
    return Chains(0.05, 0.01)


def easy():
    return Chains(0.95, 0.6)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, [0, 1]),
        (2, [0, 1, 2]),
        (4, [0, 1, 4]),
        (5, [0, 1, 3, 5]),
        (8, [0, 1, 3, 8]),
        (31, [0, 1, 3, 7, 15, 31]),
        (32, [0, 1, 3, 7, 15, 32]),
        (128, [0, 1, 3, 7, 15, 31, 128]),
    ],
)
def test_lengths(most, expected):
    assert lengths_up_to(most) == expected
    for count in range(1, 8):
        fewer = lengths_up_to(most, count)
        assert len(fewer) <= count and fewer[-1] == most and set(fewer) <= set(expected) | {1}
        assert fewer[0] == 0 or count == 1
    assert lengths_up_to(31, 3) == [0, 3, 31], "the middle stays"


def test_what_is_no_list_of_lengths():
    for wrong in ([], [1, 3], [0, 3, 3], [0, 7, 3]):
        with pytest.raises(ValueError, match="ascend from 0"):
            DraftLength(wrong)
    for most, count in ((0, 3), (4, 0)):
        with pytest.raises(ValueError, match="expected"):
            lengths_up_to(most, count)


@pytest.mark.parametrize("cost", [gpu, gpu_without_graphs, cpu])
@pytest.mark.parametrize("texts", [Chains, Trees, hopeless, easy])
@pytest.mark.parametrize(
    "phases",
    [[(1, 600)], [(16, 600)], [(1, 200), (32, 200), (1, 200), (32, 200), (1, 200)], [(8, 99), (12, 99), (3, 99)] * 3],
    ids=["one", "16", "swing", "walk"],
)
def test_as_fast_as_the_best_fixed_length_and_never_slower_than_none(cost, texts, phases):
    best, none = [], []
    for seed in range(2):
        fixed = {k: rate(Server(cost, texts(), seed), Fixed(k), phases) for k in LENGTHS}
        chosen = DraftLength(LENGTHS)
        server = Server(cost, texts(), seed)
        server.run(chosen, phases[0][0], 100)  # it has to find out first
        speed = rate(server, chosen, phases)
        best.append(speed / max(fixed.values()))
        none.append(speed / fixed[0])
    assert np.mean(best) > 0.95, best
    assert min(none) > 0.98, none


@pytest.mark.parametrize("cost", [gpu, cpu])
def test_the_first_steps_cost_little_too(cost):
    for requests in (1, 64):
        server = Server(cost, hopeless(), 3)
        assert server.run(DraftLength(LENGTHS), requests, 150) > 0.96 * requests / cost(requests, 0)


def test_it_notices_when_drafts_pay_and_when_they_do_not_any_more():
    texts, chosen = hopeless(), DraftLength(LENGTHS)
    server = Server(cpu, texts, 1)
    server.run(chosen, 4, 600)
    assert np.mean(server.lengths[-200:]) < 0.3
    texts.high, texts.low = 0.9, 0.85
    server.run(chosen, 4, 1200)
    assert np.median(server.lengths[-200:]) in (3, 7)
    texts.high, texts.low = 0.05, 0.01
    server.run(chosen, 4, 300)
    assert np.mean(server.lengths[-50:]) < 0.5


def test_a_busy_server_is_as_fast_as_without_drafts_at_once():
    chosen = DraftLength(LENGTHS)
    server = Server(cpu, Chains(), 2)
    # A load never seen before is looked into, by single steps; one that was is known.
    for least in (0.8, 0.95):
        server.run(chosen, 1, 300)
        assert np.mean(server.lengths[-100:]) > 3
        assert server.run(chosen, 64, 30) > least * 64 / cpu(64, 0)
        server.run(chosen, 64, 200)


class Watched(DraftLength):
    """Adds up what probes took beyond what the best length would have, by the server's true figures."""

    def __init__(self, cost, requests):
        super().__init__(LENGTHS)
        self.cost, self.requests = cost, requests
        self.lost = 0.0

    def observe(self, length, emitted, seconds=math.nan, requests=None):
        super().observe(length, emitted, seconds, requests)
        if length:  # nothing is ever accepted: steps without drafts are best
            self.lost += self.cost(self.requests, length) - self.cost(self.requests, 0)


class Nothing:
    def accepted(self, rng, requests, k):
        return np.zeros(requests, int)


@pytest.mark.parametrize("cost", [gpu, cpu])
@pytest.mark.parametrize("requests", [1, 8, 64])
def test_probing_costs_less_than_two_percent(cost, requests):
    watched = Watched(cost, requests)
    server = Server(cost, Nothing(), 5)
    server.run(watched, requests, 200)
    watched.lost, before = 0.0, server.seconds
    server.run(watched, requests, 1500)
    assert 0.0 < watched.lost < 0.02 * (server.seconds - before)
    assert watched.stats()["probes"] > 3, "it goes on looking"


def test_hiccups_of_the_machine_neither_stop_it_nor_mislead_it():
    calm, wild = [], []
    for seed in range(3):
        calm.append(Server(gpu, Chains(), seed, hiccups=0.0).run(DraftLength(LENGTHS), 4, 800))
        wild.append(Server(gpu, Chains(), seed, hiccups=0.1).run(DraftLength(LENGTHS), 4, 800))
    assert np.mean(wild) > 0.95 * np.mean(calm)


def test_it_does_not_flap():
    server = Server(gpu, Chains(0.6, 0.6), 1)
    chosen = DraftLength(LENGTHS)
    server.run(chosen, 16, 300)
    before = chosen.stats()["switches"]
    server.run(chosen, 16, 1000)
    assert chosen.stats()["switches"] - before <= 5


def test_same_steps_same_choices():
    lengths = []
    for _ in range(2):
        server = Server(cpu, Chains(), 4)
        chosen = DraftLength(LENGTHS)
        for requests in (1, 16, 3):
            server.run(chosen, requests, 150)
        lengths.append(server.lengths)
    assert lengths[0] == lengths[1] and len(set(lengths[0])) > 2


def test_what_it_ignores():
    chosen = DraftLength([0, 1, 4])
    for _ in range(20):
        chosen.observe(2, [3], 0.01)  # not one of its lengths: cut near the end of a context
        chosen.observe(4, [], 0.01)
        for seconds in (math.nan, 0.0, -1.0, math.inf):
            chosen.times.observe(1, 1, seconds)
    fresh = DraftLength([0, 1, 4])
    assert chosen.gains.predict() == fresh.gains.predict() and chosen.times.predict(1) == fresh.times.predict(1)
    assert chosen.choose(0) in (0, 1, 4), "a step without requests is none of its business, but no fault either"


def test_steps_beside_prompts_tell_what_is_accepted():
    chosen = DraftLength([0, 1, 4])
    for _ in range(200):
        chosen.observe(4, [3, 3])
    tokens, _ = chosen.gains.predict()
    assert tokens == pytest.approx([1, 2, 3], abs=0.1)


def test_where_few_requests_get_drafts_the_others_count():
    texts, lengths = Chains(), []
    for share in (1.0, 0.1):
        rng = np.random.default_rng(0)
        chosen, length = DraftLength(LENGTHS), 0
        chosen.share = share
        for _ in range(400):
            drafted = max(int(20 * share), 1)
            emitted = (1 + texts.accepted(rng, drafted, length)).tolist()
            # Each row costs, whoever drafts: what does not pay for the others is left.
            chosen.observe(length, emitted, 0.01 * (1 + 0.3 * length), 20)
            length = chosen.choose(20)
        lengths.append(chosen.stats()["length"])
    assert lengths[0] >= 1 and lengths[1] == 0


def test_stats():
    chosen = DraftLength(LENGTHS)
    server = Server(gpu, Chains(), 0, hiccups=0.0)
    server.run(chosen, 4, 400)
    stats = chosen.stats()
    assert stats["choices"] == 400 and stats["length"] == 31
    assert stats["step_time_predicted_seconds"] == pytest.approx(gpu(4, 31), rel=0.1)
    assert stats["step_time_measured_seconds"] == pytest.approx(gpu(4, server.lengths[-2]), rel=0.2)
    assert 3.0 < stats["expected_gain"] < 5.0


# Gains


def fed(texts, lengths, steps=800, requests=8, seed=0):
    rng, gains = np.random.default_rng(seed), Gains(LENGTHS)
    for step in range(steps):
        j = lengths[step % len(lengths)]
        gains.observe(j, (1 + texts.accepted(rng, requests, LENGTHS[j])).tolist())
        gains.predict()
    return gains


def means(texts, seed=1):
    rng = np.random.default_rng(seed)
    return [1 + np.mean([texts.accepted(rng, 50, k) for _ in range(400)]) for k in LENGTHS]


def test_a_chain_tells_shorter_ones():
    tokens, variances = fed(Chains(), [5]).predict()
    assert tokens == pytest.approx(means(Chains()), rel=0.12)
    assert variances[5] < 0.01


def test_a_long_draft_is_guessed_from_short_ones_and_known_from_few_of_its_own():
    texts = Chains(0.8, 0.8)
    guessed, doubt = fed(texts, [2]).predict()
    assert guessed == pytest.approx(means(texts), rel=0.15), "tokens of this text are alike"
    assert doubt[5] > 4 * doubt[2]
    mixed = Chains()
    true = means(mixed)
    assert fed(mixed, [2]).predict()[0][5] < 0.8 * true[5], "those of this one are not"
    assert fed(mixed, [2] * 19 + [5]).predict()[0][5] == pytest.approx(true[5], rel=0.12)


def test_a_tree_cut_short_is_less_deep_than_it_seems():
    texts = Trees()
    true = means(texts)
    naive = fed(texts, [5]).predict()[0]
    assert naive[3] > 1.5 * true[3]
    # What was learned of the lengths in use lasts when only the longest is.
    gains = fed(texts, [5] * 4 + [4, 3, 2, 1])
    rng = np.random.default_rng(7)
    for _ in range(400):
        gains.observe(5, (1 + texts.accepted(rng, 8, 31)).tolist())
    assert gains.predict()[0] == pytest.approx(true, rel=0.2)


def test_gains_never_fall_with_the_length_and_are_no_more_than_it():
    rng = np.random.default_rng(0)
    gains = Gains(LENGTHS)
    for _ in range(500):
        j = int(rng.integers(0, len(LENGTHS)))
        gains.observe(j, [1 + int(rng.integers(0, LENGTHS[j] + 1)) for _ in range(int(rng.integers(1, 30)))])
        tokens, variances = gains.predict()
        assert all(a <= b for a, b in pairwise(tokens)) and min(variances) >= 0.0
        assert all(t <= 1 + k for t, k in zip(tokens, LENGTHS, strict=True))


def test_a_few_requests_are_counted_as_many_are():
    rng = np.random.default_rng(0)
    many, few = Gains(LENGTHS), Gains(LENGTHS)
    emitted = (1 + Chains().accepted(rng, 17, 15)).tolist()
    many.observe(4, emitted)
    few.observe(4, emitted[:16])
    for gains, count in ((many, 17), (few, 16)):
        assert gains._own[4] == pytest.approx(sum(emitted[:count]) - count)
        assert gains._implied[2] == pytest.approx(sum(min(e - 1, 3) for e in emitted[:count]))


def test_what_is_not_tried_is_doubted_more_and_more():
    gains = fed(Chains(), [5])
    before = gains.predict()[1]
    for _ in range(300):
        gains.observe(0, [1] * 8)
    after = gains.predict()[1]
    assert all(b > a + 300 * draft_length.AGING * 0.9 for a, b in pairwise([before[3], after[3]]))
    assert gains.predict()[0] == pytest.approx(fed(Chains(), [5]).predict()[0]), "and remembered"


# Times


def timed(cost, visits, steps=300, noise=0.03, seed=0, drift=1.0):
    rng, times = np.random.default_rng(seed), LengthTimes(LENGTHS)
    for step in range(steps):
        requests, j = visits[step % len(visits)]
        seconds = cost(requests, LENGTHS[j]) * rng.lognormal(0.0, noise) * drift ** (step / steps)
        times.observe(requests, j, seconds * (20.0 if rng.random() < 0.02 else 1.0))
    return times


def test_times_seen_are_known_jumps_and_outliers_notwithstanding():
    visits = [(n, j) for n in (1, 4, 16) for j in range(len(LENGTHS))]
    times = timed(gpu_without_graphs, visits, steps=2000)
    for n in (1, 4, 16):
        logs, spreads = times.predict(n)
        true = [gpu_without_graphs(n, k) for k in LENGTHS]
        assert np.exp(logs) == pytest.approx(true, rel=0.05) and max(spreads) < 0.25


def test_times_not_seen_are_bridged_from_near_loads_and_doubted():
    visits = [(n, j) for n in (1, 2, 8) for j in range(len(LENGTHS))]
    times = timed(cpu, visits, steps=1500)
    logs, spreads = times.predict(6)
    assert np.exp(logs) == pytest.approx([cpu(6, k) for k in LENGTHS], rel=0.15)
    known = times.predict(8)[1]
    assert all(far > 2 * near for far, near in zip(spreads, known, strict=True))
    assert min(times.predict(64)[1]) > 0.5


def test_lengths_not_tried_keep_up_when_all_steps_become_slower():
    times = timed(gpu, [(4, 0), (4, 3)])
    before = np.exp(times.predict(4)[0])
    rng = np.random.default_rng(1)
    for step in range(400):  # contexts grow
        times.observe(4, 3, gpu(4, 7) * (1.0 + step / 400) * rng.lognormal(0.0, 0.03))
    after = np.exp(times.predict(4)[0])
    assert after[3] / before[3] == pytest.approx(2.0, rel=0.1)
    assert after[0] / before[0] == pytest.approx(2.0, rel=0.25)


def test_a_sudden_change_is_believed_when_it_lasts():
    times = timed(gpu, [(4, 0), (4, 3)])
    before = np.exp(times.predict(4)[0])
    for _ in range(3):
        times.observe(4, 3, 3.0 * gpu(4, 7))
    assert np.exp(times.predict(4)[0])[3] < 1.3 * before[3]
    for _ in range(20):
        times.observe(4, 3, 3.0 * gpu(4, 7))
    assert np.exp(times.predict(4)[0])[[0, 3]] == pytest.approx(3.0 * before[[0, 3]], rel=0.1)


def test_a_first_step_far_off_is_believed_when_it_lasts():
    times = timed(gpu, [(4, 0), (4, 3)])
    expected = np.exp(times.predict(4)[0])[4]
    times.observe(4, 4, 20.0 * expected)
    assert np.exp(times.predict(4)[0])[4] < 1.5 * expected
    for _ in range(3):  # a jump of more than the rows account for
        times.observe(4, 4, 5.0 * expected)
    assert np.exp(times.predict(4)[0])[4] == pytest.approx(5.0 * expected, rel=0.2)
