"""The verdict of a comparison: intervals that hold their level, honest sentences, wrong outputs found."""

from __future__ import annotations

import dataclasses
import json

import ab_runs
import numpy as np
import pytest
from ab_runs import Behaviour, Unrest

from vllm_specplug.ab import measures, outputs
from vllm_specplug.ab.intervals import paired_ratio, student
from vllm_specplug.ab.noise import Noise, look
from vllm_specplug.ab.results import Load, Plan
from vllm_specplug.ab.verdict import START, Result, Verdict, judge, judge_speed

BOTH = (Load(1), Load(8))
QUIET = Noise(None, None, None, None)


def verdict(arm: Behaviour, base: Behaviour | None = None, **run) -> Verdict:
    return judge(*ab_runs.make({"none": base or Behaviour(), "arm": arm}, **run))


def only(found: Verdict) -> Result:
    """The arm's result under the first load."""
    return next(r for r in found.results if not r.control)


# Intervals


@pytest.mark.parametrize(
    "design",
    [
        (8, 2, 2, 0.02, 0.05, 0.0),
        (2, 2, 8, 0.02, 0.05, 0.0),
        (1, 3, 17, 0.02, 0.05, 0.0),
        (8, 1, 3, 0.0, 0.05, 0.0),
        (8, 3, 2, 0.01, 0.03, 0.2),
        (2, 3, 8, 0.02, 0.05, 0.1),
    ],
)
def test_an_interval_leaves_the_truth_out_no_more_often_than_it_says(design):
    found = [paired_ratio(*ab_runs.crossed(*design, seed)) for seed in range(120)]
    misses = sum(not e.low <= 1 <= e.high for e in found)
    # 5% of 120 are 6; more than 12 have a chance of 1% at that rate.
    assert misses <= 12


def test_an_interval_is_no_wider_than_it_need_be():
    """Independent pairs in many cells: twice the standard error, more or less."""
    ours, base, request, cell = ab_runs.crossed(40, 1, 1, 0.0, 0.05, 0.0, 3)
    estimate = paired_ratio(ours, base, request, cell)
    half = np.log(estimate.high / estimate.low) / 2
    plain = 1.96 * 0.05 * np.sqrt(2) / np.sqrt(40)
    assert 0.7 * plain < half < 1.5 * plain


def test_a_ratio_is_that_of_the_sums_and_turns_round_with_the_sides():
    ours, base, request, cell = ab_runs.crossed(4, 2, 3, 0.02, 0.05, 0.1, 0)
    there, back = paired_ratio(ours, base, request, cell), paired_ratio(base, ours, request, cell)
    sums = np.concatenate([ours, base], axis=1).sum(axis=0)
    assert there.value == pytest.approx(sums[0] / sums[1] / (sums[2] / sums[3]))
    assert (back.value, back.low, back.high) == pytest.approx((1 / there.value, 1 / there.high, 1 / there.low))


def test_the_order_of_pairs_does_not_matter():
    ours, base, request, cell = ab_runs.crossed(4, 2, 3, 0.02, 0.05, 0.1, 0)
    turn = np.random.default_rng(0).permutation(len(cell))
    a = paired_ratio(ours, base, request, cell)
    b = paired_ratio(ours[turn], base[turn], request[turn], cell[turn])
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))


def test_times_that_never_vary_leave_no_doubt():
    ones = np.ones((12, 2))
    estimate = paired_ratio(2 * ones * [1, 0.5], ones, np.arange(12), np.arange(12) // 2)
    assert (estimate.value, estimate.low, estimate.high) == (2.0, 2.0, 2.0)


def test_one_cell_gives_no_interval_and_nothing_no_ratio():
    ours, base, request, cell = ab_runs.crossed(1, 1, 8, 0.0, 0.05, 0.0, 0)
    estimate = paired_ratio(ours, base, request, cell)
    assert estimate.low is None and estimate.high is None and estimate.value > 0
    assert paired_ratio(ours[:0], base[:0], request[:0], cell[:0]) is None
    assert paired_ratio(ours * 0, base, request, cell) is None


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (5, 2.5706), (12, 2.1788), (30, 2.0423), (200, 1.9719)]
)
def test_students_quantiles(freedom, quantile):
    assert student(freedom) == pytest.approx(quantile, abs=2e-3)


# Speed


@pytest.mark.parametrize("seed", range(5))
def test_the_same_arm_twice_is_no_difference(seed):
    found = only(verdict(Behaviour(), seed=seed))
    assert found.speed == "same"
    assert found.sentence.startswith("no difference ")
    assert found.sentence.endswith(", the same output (all 48)")


@pytest.mark.parametrize("seed", range(5))
def test_an_arm_slowed_by_5_percent_is_found(seed):
    found = only(verdict(Behaviour(speed=1 / 1.06), seed=seed))
    assert found.speed == "slower"
    assert found.sentence.startswith("slower by ")


def test_a_faster_arm_is_said_to_be_faster_by_what_it_is():
    found = only(verdict(Behaviour(speed=1.6), loads=BOTH, requests=32, per_block=8))
    assert found.speed == "faster"
    assert 1.45 < found.paired.speed.low < found.paired.speed.value < found.paired.speed.high < 1.65
    assert found.paired.tpot.value == pytest.approx(1 / 1.6, rel=0.05)
    assert found.paired.ttft.low < 1 < found.paired.ttft.high
    assert found.paired.throughput.value == pytest.approx(found.paired.speed.value, rel=0.02)
    assert set(found.paired.tasks) == set(ab_runs.TASKS)
    assert found.sentence.startswith("faster by ")


def test_a_difference_of_one_percent_does_not_matter_however_sure():
    calm = Unrest(cell=0.0, reply=0.001)
    found = only(verdict(Behaviour(speed=1.015), unrest=calm, requests=48, repeats=6))
    assert found.speed == "same"
    assert found.sentence.startswith("no difference that matters (95% interval +0.")


def test_intervals_make_room_for_how_unequal_like_servers_are():
    calm = Unrest(cell=0.0, reply=0.0001)
    for repeats, kept in ((1, False), (4, False), (4, True)):
        plan, cells = ab_runs.make({"none": Behaviour(), "arm": Behaviour()}, unrest=calm, repeats=repeats)
        speed = only(judge(dataclasses.replace(plan, facts={"keep_servers": kept}), cells)).paired.speed
        starts = 1 if kept else repeats
        assert np.log(speed.high / speed.low) / 2 == pytest.approx(1.96 * START * np.sqrt(2 / starts), rel=0.02)


def test_a_restless_machine_is_named():
    found = only(verdict(Behaviour(busy=0.4), Behaviour(busy=0.4), unrest=Unrest(cell=0.1)))
    assert found.speed == "untold"
    assert found.sentence.startswith("the machine was too noisy to tell (95% interval ")
    assert "other programs used 40% of the processors" in found.sentence
    assert "the control's own speed varied by " in found.sentence


def test_a_difference_that_other_programs_explain_is_none():
    found = only(verdict(Behaviour(speed=0.9, busy=0.3), Behaviour(busy=0.02)))
    assert found.speed == "untold"
    assert found.sentence.startswith("the machine was too noisy to tell: measured at -11% (95% interval ")
    assert "other programs used 28% of the processors more while it was measured" in found.sentence
    kept = only(verdict(Behaviour(speed=1.5, busy=0.3), Behaviour(busy=0.02)))
    assert kept.speed == "faster"
    assert kept.cautions == [
        "other programs used 28% of the processors more while it was measured than while the control was"
    ]


def test_drift_of_the_control_is_seen_and_does_not_decide():
    plan, cells = ab_runs.make({"none": Behaviour(), "arm": Behaviour()}, unrest=Unrest(drift=0.3), requests=48)
    control, arm = ([c for c in cells if c.arm == name] for name in ("none", "arm"))
    assert look(control, arm).drift == pytest.approx(np.expm1(0.3), rel=0.25)
    assert only(judge(plan, cells)).speed == "same"
    once = [c for c in control if c.repeat == 0]
    assert look(once, arm).drift is None  # blocks differ in what they hold
    calm = look(*([c for c in ab_runs.make({n: Behaviour()}, requests=48)[1]] for n in ("none", "arm")))
    assert abs(calm.drift) < 0.05 and calm.spread < 0.05 and calm.signs() == []


def test_too_few_requests_are_called_so():
    one = only(verdict(Behaviour(speed=1.3), requests=3, repeats=1))
    assert one.speed == "untold" and "too few blocks or requests to tell" in one.sentence
    few = only(verdict(Behaviour(), requests=6, unrest=Unrest(reply=0.1)))
    assert few.speed == "untold" and few.sentence.startswith("too little was measured to tell (95% interval ")


def test_no_answer_no_comparison():
    assert judge_speed(None, QUIET, 0, 0) == ("untold", "not compared: no request was answered by both")


# A/A, on recorded times

RUNS = {
    "concurrency 1": {"per_block": 2, "repeats": 2},
    "concurrency 8": {"load": Load(8), "requests": 32, "per_block": 8, "repeats": 3},
}


def said(times: int, slower: float, run: dict) -> list[str]:
    """What is said of the second of two arms that are alike, or of which it is slower, in so many comparisons."""
    return [
        only(judge(*ab_runs.replay(np.random.default_rng(seed), slower, offset=0.005, **run))).speed
        for seed in range(times)
    ]


@pytest.mark.parametrize("run", RUNS)
def test_on_recorded_times_like_arms_differ_in_at_most_one_of_twenty_comparisons(run):
    found = said(60, 1.0, RUNS[run])
    assert found.count("same") >= 57


@pytest.mark.parametrize("run", RUNS)
def test_on_recorded_times_an_arm_slowed_by_5_percent_is_found(run):
    found = said(40, 1.05, RUNS[run])
    assert found.count("slower") >= 36
    assert found.count("faster") == 0


# Output


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("change", [ab_runs.one_wrong, ab_runs.all_wrong, ab_runs.cut_short, ab_runs.seldom_wrong])
def test_wrong_tokens_are_found_where_the_control_repeats_itself(change, ids):
    for result in verdict(Behaviour(change=change), loads=BOTH, ids=ids).results:
        if not result.control:
            assert result.output.kind == "different"
            assert ", not the same output (" in result.sentence
            assert result.output.agreement.unit == ("tokens" if ids else "characters")


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("change", [ab_runs.one_wrong, ab_runs.all_wrong])
def test_wrong_tokens_are_found_where_the_control_does_not(change, ids):
    for result in verdict(Behaviour(change=change), loads=BOTH, rounding=0.008, ids=ids, requests=48).results:
        if not result.control:
            assert result.output.kind == "different"
            assert result.output.p_value < outputs.LEVEL


def test_rounding_is_not_taken_for_wrong_tokens():
    kinds = []
    for seed in range(40):
        found = verdict(Behaviour(), loads=BOTH, rounding=0.008, repeats=1, seed=seed, unrest=Unrest(0, 0))
        kinds += [r.output.kind for r in found.results if not r.control]
    assert kinds.count("different") <= 3  # one in a hundred
    assert kinds.count("repeatable") >= 0.9 * len(kinds)


def test_without_a_reference_late_differences_are_not_judged_and_early_ones_are():
    late = only(verdict(Behaviour(), rounding=0.008, repeats=1))
    assert late.output.kind == "untold"
    assert "could not be told: the control was not compared with itself" in late.sentence
    again = only(verdict(Behaviour(), rounding=0.008, repeats=2))
    assert again.output.kind == "untold"
    assert "always in batches of the same size" in again.sentence
    wrong = only(verdict(Behaviour(change=ab_runs.all_wrong), rounding=0.008, repeats=1))
    assert wrong.output.kind == "different"


def test_where_outputs_part():
    a = outputs.compare([(_reply(0, [1, 2, 3]), _reply(0, [1, 2, 3])), (_reply(1, [1, 2, 3]), _reply(1, [1, 5, 3]))])
    assert (a.compared, a.identical, a.divergences, a.lengths, a.first_divergence) == (2, 1, [1], [3], 1.0)
    assert (a.events, a.exposure, a.requests) == (1.0, 5.0, 2)
    shorter = outputs.compare([(_reply(0, [1, 2]), _reply(0, [1, 2, 3]))])
    assert (shorter.identical, shorter.divergences) == (0, [2])
    repeated = outputs.compare([(_reply(0, [1]), _reply(0, [1])), (_reply(0, [1]), _reply(0, [2]))])
    assert (repeated.events, repeated.requests) == (0.5, 1)


def _reply(index: int, tokens: list[int]):
    return dataclasses.replace(ab_runs.make({"a": Behaviour()})[1][0].replies[0], index=index, tokens=tokens)


def test_the_test_of_two_rates_is_the_binomial_one():
    control = outputs.Agreement(10, 6, "tokens", [1] * 4, [9] * 6, 1.0, 4.0, 100.0, 10)
    arm = dataclasses.replace(control, events=8.0)
    # Chance of at least 8 of 12 at even odds.
    assert outputs.parts_sooner(arm, control) == pytest.approx((495 + 220 + 66 + 12 + 1) / 4096)
    assert outputs.parts_sooner(dataclasses.replace(control, events=0.0), control) == 1.0


def test_sampled_outputs_are_compared_as_distributions():
    same = [
        only(
            verdict(
                Behaviour(change=ab_runs.sampled), Behaviour(change=ab_runs.sampled), temperature=1.0, seed=s, repeats=1
            )
        )
        for s in range(20)
    ]
    assert all(r.output.kind == "distribution" for r in same)
    assert "the same distribution of outputs, as far as 24 requests tell" in same[0].sentence
    for change in (ab_runs.sampled_colder, ab_runs.all_wrong):
        found = only(verdict(Behaviour(change=change), Behaviour(change=ab_runs.sampled), temperature=1.0))
        assert found.output.kind == "different"
        assert found.output.distance > found.output.expected_distance
    equal = only(verdict(Behaviour(), temperature=1.0))
    assert equal.output.kind == "same"


# Figures


def test_figures_of_replies():
    _, cells = ab_runs.make({"none": Behaviour()}, requests=6, repeats=1)
    replies = [r for c in cells for r in c.replies]
    found = measures.figures(cells)
    assert (found.requests, found.errors, found.output_tokens) == (6, 0, 6 * 64)
    assert found.tokens_per_s == pytest.approx(6 * 64 / sum(c.seconds for c in cells))
    assert found.speed == pytest.approx(6 * 64 / sum(r.total_s for r in replies))
    assert found.e2e.p50 == pytest.approx(np.percentile([r.total_s for r in replies], 50))
    assert found.ttft.p99 == pytest.approx(np.percentile([r.first_s for r in replies], 99))
    assert found.tpot.mean == pytest.approx(np.mean([(r.total_s - r.first_s) / 63 for r in replies]))
    assert measures.figures(cells, "chat").requests == 2


def test_drafting_is_read_from_counters_with_any_labels():
    _, cells = ab_runs.make({"none": Behaviour(), "arm": Behaviour(mat=2.0)}, requests=6)
    arm = measures.drafting([c for c in cells if c.arm == "arm"])
    assert arm.mat == pytest.approx(2.0)
    assert arm.acceptance == pytest.approx(1 / 3)
    assert arm.by_position == pytest.approx([0.75, 0.25])
    assert list(arm.by_source) == ["context"]
    assert arm.by_source["context"].drafted[0] == pytest.approx(2 * arm.drafts)
    assert arm.by_source["context"].accepted[7] == pytest.approx(0.25 * arm.drafts)
    assert arm.overhead == pytest.approx(0.01 * 12 / sum(c.seconds for c in cells if c.arm == "arm"))
    control = measures.drafting([c for c in cells if c.arm == "none"])
    assert (control.mat, control.acceptance, control.by_position, control.overhead) == (1.0, None, [], None)
    assert measures.drafting([dataclasses.replace(c, counters={}) for c in cells]) is None


def test_a_run_that_is_not_whole_is_judged_as_far_as_it_went():
    plan, cells = ab_runs.make({"none": Behaviour(), "arm": Behaviour()}, loads=BOTH)
    cut = [c for c in cells if not (c.arm == "arm" and (c.load == BOTH[1] or c.repeat == 1))]
    broken = dataclasses.replace(cut[-1], arm="arm", load=BOTH[0], block=7, repeat=1, replies=[], failure="ended")
    found = judge(plan, [*cut, broken])
    assert [(r.arm, r.load) for r in found.results] == [
        ("none", "concurrency 1"), ("arm", "concurrency 1"), ("none", "concurrency 8")
    ]  # fmt: skip
    assert found.failures == {"arm": "concurrency 1: ended"}
    assert only(found).paired.pairs == 24
    assert only(found).cautions == ["it did not finish the run"]


def test_failed_requests_are_counted_and_not_timed():
    plan, cells = ab_runs.make({"none": Behaviour(), "arm": Behaviour()})
    failed = [
        dataclasses.replace(
            c, replies=[dataclasses.replace(c.replies[0], error="500", output_tokens=0), *c.replies[1:]]
        )
        if c.arm == "arm" and c.block < 2
        else c
        for c in cells
    ]
    found = only(judge(plan, failed))
    assert (found.total.requests, found.total.errors, found.paired.pairs) == (44, 4, 44)
    assert found.cautions == ["4 of 48 requests failed"]


def test_without_a_control_nothing_is_compared():
    plan, cells = ab_runs.make({"none": Behaviour(), "arm": Behaviour()})
    found = judge(plan, [c for c in cells if c.arm == "arm"])
    assert only(found).sentence == "not compared: no request was answered by both"
    assert only(found).output is None
    assert judge(plan, []).results == []
    with pytest.raises(ValueError, match="needs an arm"):
        judge(dataclasses.replace(plan, arms=[]), [])


def test_a_verdict_is_plain_data():
    arms = {"none": Behaviour(), "arm": Behaviour(1.4, mat=1.5), "bad": Behaviour(change=ab_runs.one_wrong)}
    found = judge(*ab_runs.make(arms, loads=BOTH))
    text = json.dumps(dataclasses.asdict(found), allow_nan=False)
    assert json.loads(text)["results"][1]["sentence"] == found.of("arm", "concurrency 1").sentence
    assert found.of("arm", "concurrency 2") is None


def test_every_task_has_its_figures():
    plan, cells = ab_runs.make({"none": Behaviour(), "arm": Behaviour()})
    assert isinstance(plan, Plan)
    assert {t: f.requests for t, f in only(judge(plan, cells)).tasks.items()} == dict.fromkeys(ab_runs.TASKS, 16)
