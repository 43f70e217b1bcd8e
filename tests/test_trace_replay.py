"""Replaying a trace, its step times, and the search of options on it."""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
import pytest
import traces
from proposer_steps import paths
from vllm_specplug.proposers.base import DraftForest, Proposer, StepLoad
from vllm_specplug.proposers.retrieval import Retrieval

from vllm_specplug.options import OptionError
from vllm_specplug.trace import files, replay, step_times, tune
from vllm_specplug.trace.files import Recorded, TraceError
from vllm_specplug.trace.replay import Replay


def recorded(prompt, output, task="all", **fields):
    return Recorded(task, np.array(prompt, np.int32), np.array(output, np.int32), None, None, **fields)


class Knows(Proposer):
    """Drafts the right tokens, ``right`` of them, then wrong ones; as a tree with a wrong first branch if told so."""

    name = "knows"
    bounds_depth = True

    def __init__(self, outputs, right=2, wrong=1, tree=False):
        self.outputs, self.right, self.wrong, self.tree = outputs, right, wrong, tree
        self.seen, self.removed, self.requests, self.asleep_steps = {}, [], {}, iter(())

    def add_request(self, request):
        self.requests[request.slot] = request
        self.seen[request.slot] = request.prompt.tolist()
        self.output = next(o for p, o in self.outputs if [*p, o[0]] == request.prompt.tolist())

    def observe(self, step):
        for i, slot in enumerate(step.slots.tolist()):
            self.seen[slot] += step.tokens[step.offsets[i] : step.offsets[i + 1]].tolist()
        self.step = step

    def propose(self, slots, limits):
        assert len(slots) == 1
        at = len(self.seen[0]) - len(self.requests[0].prompt) + 1
        tokens = [*self.output[at : at + self.right], *([999] * self.wrong)]
        parents = list(range(-1, len(tokens) - 1))
        if self.tree:
            tokens, parents = [998, *tokens], [-1, *(p + 1 if p >= 0 else -1 for p in parents)]
        tokens, parents = tokens[: limits[0]], parents[: limits[0]]
        n = len(tokens)
        return DraftForest(
            np.array(tokens, np.int32),
            np.array(parents, np.int32),
            np.full(n, 0.5, np.float32),
            np.zeros(n, np.int8),
            np.array([0, n], np.int32),
        )

    def remove_request(self, slot):
        self.removed.append((self.seen.pop(slot), self.requests.pop(slot)))

    def asleep(self, requests, new):
        return next(self.asleep_steps, False)


OUTPUT = list(range(10, 29))  # 19 tokens: 18 after the first


@pytest.mark.parametrize("tree", [False, True])
def test_counts_of_a_proposer_that_knows(tree):
    proposer = Knows([([1, 2], OUTPUT)], right=2, wrong=1, tree=tree)
    (tally,) = Replay(proposer, 8).run([recorded([1, 2], OUTPUT)])
    assert (tally.steps, tally.accepted, tally.decoded, tally.tokens) == (6, 12, 18, 19)
    assert tally.metrics()["mat"] == (3.0, "tokens/step") and tally.drafts == 6 * (3 + tree)
    # All claimed one half, and two of them were right.
    assert tally.metrics()["ece"][0] == pytest.approx(abs(0.5 - 2 / (3 + tree)))
    ((seen, request),) = proposer.removed
    assert seen == [1, 2, *OUTPUT]
    assert (request.num_output, request.max_tokens) == (1, 21)


def test_nothing_is_drafted_where_nothing_may_be():
    proposer = Knows([([1, 2], [5, 6]), ([1, 3], [5])])
    tallies = Replay(proposer, 8).run([recorded([1, 2], [5, 6]), recorded([1, 3], [5])])
    assert [(t.steps, t.drafts, t.decoded) for t in tallies] == [(1, 0, 1), (0, 0, 0)]


def test_a_recorded_bound_is_what_the_proposer_is_told():
    proposer = Knows([([1, 2], [5, 6])])
    (tally,) = Replay(proposer, 8).run([recorded([1, 2], [5, 6], max_tokens=100)])
    assert proposer.removed[0][1].max_tokens == 100
    assert (tally.steps, tally.drafts, tally.accepted) == (1, 2, 0)  # the last token is the target's own


def test_requests_that_may_not_branch():
    proposer = Knows([([1, 2], OUTPUT)])
    Replay(proposer, 8, trees=False).run([recorded([1, 2], OUTPUT)])
    Replay(proposer, 8).run([recorded([1, 2], OUTPUT, trees=False, temperature=0.5, namespace="n")])
    assert [request.branching for _, request in proposer.removed] == [False, False]
    assert (proposer.removed[1][1].temperature, proposer.removed[1][1].namespace) == (0.5, "n")


def test_what_was_slept_through_is_shown_later():
    proposer = Knows([([1, 2], OUTPUT)], right=1, wrong=0)
    proposer.asleep_steps = iter([False, True, True, True])
    times = step_times.GivenTimes([1, 2], [1.0, 2.0])
    (tally,) = Replay(proposer, 8, times).run([recorded([1, 2], OUTPUT)])
    assert proposer.removed[0][0] == [1, 2, *OUTPUT]
    # One step with a draft, three without while it sleeps and one before it drafts again.
    assert tally.paused == 3 and tally.decoded == 18


def test_time_passes_as_steps_and_drafting_take_it(monkeypatch):
    """A clock that goes on by 1 ms whenever it is read: each call of the proposer takes 1 ms."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(ticks) * 1_000_000)
    times = step_times.GivenTimes([1, 4], [0.020, 0.050])
    times.host_s = 0.010
    proposer = Knows([([1, 2], OUTPUT)], right=2, wrong=1)
    (tally,) = Replay(proposer, 8, times).run([recorded([1, 2], OUTPUT)])
    # A step of 4 rows, and for its drafts the host and two calls: the first time admit and propose, then observe and
    # propose.
    assert tally.seconds == pytest.approx(6 * (0.050 + 0.010 + 2 * 0.001))
    assert proposer.step.seconds == pytest.approx(0.062) and proposer.step.overhead == pytest.approx(0.012)
    load = proposer.step.load
    assert (load.requests, load.rows, load.context, load.row_context) == (1, 4, 17, 68)


def test_without_drafts_time_is_that_of_one_row_steps():
    times = step_times.GivenTimes([1], [0.5])
    (tally,) = Replay(None, 0, times).run([recorded([1, 2], OUTPUT)])
    assert (tally.steps, tally.accepted, tally.seconds) == (18, 0, 9.0)


def test_several_at_once_end_up_with_the_same_text(tmp_path):
    requests = files.read([traces.make(tmp_path / "t.gz", 12)]).requests
    times = step_times.GivenTimes([1, 8], [0.02, 0.03])
    one, five = Retrieval(), Retrieval()
    alone = Replay(one, 8, times).run(requests)
    together = Replay(five, 8, times, width=5).run(requests)
    assert [t.tokens for t in together] == [t.tokens for t in alone] == [len(r.output) for r in requests]
    assert [t.decoded for t in together] == [t.decoded for t in alone]
    assert one.stats()["store_tokens"] == five.stats()["store_tokens"] == sum(len(r.output) for r in requests)
    # Steps are shared, so they take less time in all than one after another.
    assert sum(t.seconds for t in together) < 0.5 * sum(t.seconds for t in alone)


def test_what_is_learned_stays():
    requests = [recorded([1, 2], OUTPUT)] * 2
    run = Replay(Retrieval(), 8)
    first, second = run.run(requests)
    (third,) = run.run(requests[:1])
    assert first.accepted == 0 and 5 < second.accepted <= third.accepted


def test_a_proposer_that_fails_is_no_result():
    proposer = Knows([([1, 2], OUTPUT)])
    proposer.observe = lambda step: 1 / 0
    with pytest.raises(TraceError, match="proposer knows failed"):
        Replay(proposer, 8).run([recorded([1, 2], OUTPUT)])


def test_rows_of_the_recorded_topk(tmp_path):
    """The last token and the accepted nodes, each with what the target said after it."""
    request = files.read([traces.make(tmp_path / "t.gz", 1, topk=4)]).requests[0]
    step = replay.step_of(request, 5, 2, 6, topk=True)
    assert step.row_tokens.tolist() == request.output[4:7].tolist()
    assert step.row_parents.tolist() == [-1, 0, 1] and step.row_offsets.tolist() == [0, 3]
    np.testing.assert_array_equal(step.topk_ids, request.topk_ids[5:8])
    first = replay.step_of(request, 0, 0, 0, topk=True)
    assert first.row_tokens.tolist() == request.prompt[-1:].tolist()
    assert replay.step_of(request, 0, 0, 0, topk=False).row_tokens is None


def test_accepted_path_of_a_tree():
    forest = DraftForest(
        np.array([7, 5, 6, 8, 9], np.int32),
        np.array([-1, -1, 1, 1, 3], np.int32),
        np.full(5, 0.5, np.float32),
        np.zeros(5, np.int8),
        np.array([0, 5], np.int32),
    )
    assert paths(forest)[4] == [5, 8, 9]
    assert replay.accepted_path(forest, np.array([5, 8, 9, 1], np.int32)) == [1, 3, 4]
    assert replay.accepted_path(forest, np.array([5, 8], np.int32)) == [1, 3]
    assert replay.accepted_path(forest, np.array([4, 8], np.int32)) == []


def test_the_interval_of_a_speed_up():
    rng = np.random.default_rng(0)
    plain = [replay.Tally(1, 100, 100, seconds=10.0) for _ in range(40)]
    faster = [dataclasses.replace(t, seconds=5.0 * s) for t, s in zip(plain, rng.lognormal(0, 0.1, 40), strict=True)]
    value, low, high = replay.speedup(faster, plain)
    assert value == pytest.approx(2.0, rel=0.05) and low < value < high and high / low < 1.1
    assert replay.speedup(plain, plain) == (1.0, 1.0, 1.0)


# Step times


def test_given_step_times():
    times = step_times.parse("1:31, 2:31.5,8:40")
    at = [times.predict(StepLoad(1, rows, 0, 0)) for rows in (1, 2, 5, 8, 10)]
    assert at == pytest.approx([0.031, 0.0315, 0.03575, 0.040, 0.040 + 2 * 0.0085 / 6])
    assert step_times.parse("1:20").predict(StepLoad(1, 9, 0, 0)) == 0.02


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1:31,2", "got '2'"),
        ("1:x", "got '1:x'"),
        ("0:3", "got '0:3'"),
        ("2:3,1:4", "rising numbers of rows"),
        ("nothing.npz", "there is no file nothing.npz"),
    ],
)
def test_wrong_step_times_are_named(text, words):
    with pytest.raises(TraceError) as caught:
        step_times.parse(text)
    assert words in str(caught.value) and repr(text) in str(caught.value)


def test_step_times_of_a_state_file(tmp_path):
    from vllm_specplug.proposers import saved_state
    from vllm_specplug.proposers.step_time import StepTimeModel

    model = StepTimeModel()
    for rows in [1, 2, 4, 8] * 30:
        model.observe(StepLoad(1, rows, 50, 50 * rows), 0.02 + 0.001 * rows)
    pieces = {f"step_time/{name}": [array] for name, array in model.state().items()}
    saved_state.write(tmp_path / "s.npz", pieces, {})
    times = step_times.parse(str(tmp_path / "s.npz"))
    assert times.predict(StepLoad(1, 8, 50, 400)) == pytest.approx(0.028, rel=0.03)
    saved_state.write(tmp_path / "none.npz", {"x": [np.zeros(1)]}, {})
    with pytest.raises(TraceError, match="the file holds none"):
        step_times.parse(str(tmp_path / "none.npz"))
    (tmp_path / "foreign.npz").write_text("hello")
    with pytest.raises(TraceError, match="no state file"):
        step_times.parse(str(tmp_path / "foreign.npz"))


def test_step_times_learned_from_a_trace(tmp_path):
    requests = files.read([traces.make(tmp_path / "t.gz", 20)]).requests
    times = step_times.learn(requests)
    assert times.host_s == pytest.approx(200e-6)
    for drafted in (0, 3, 7):
        want = 1e-3 * (traces.BASE_MS + traces.ROW_MS * drafted)
        assert times.predict(StepLoad(1, 1 + drafted, 40, 40 * (1 + drafted))) == pytest.approx(want, rel=0.04)


def test_requests_of_one_batch_share_their_steps(tmp_path):
    rng = np.random.default_rng(0)
    one = traces.request(rng)
    requests = files.read([traces.write(tmp_path / "t.gz", [one, one])]).requests
    assert len(step_times.measured_steps(requests).loads) == len(one["steps"]["number"]) - 1


def test_a_trace_that_does_not_tell_step_times(tmp_path):
    requests = files.read([traces.make(tmp_path / "t.gz", 4)]).requests
    with pytest.raises(TraceError, match="the times of 0 steps, where 32 are needed"):
        step_times.learn([dataclasses.replace(r, steps=None) for r in requests])

    def bare(steps):
        loads = steps.loads.copy()
        loads[1:, 1] = 1
        return dataclasses.replace(steps, loads=loads)

    with pytest.raises(TraceError, match="all have as many draft tokens"):
        step_times.learn([dataclasses.replace(r, steps=bare(r.steps)) for r in requests])


# Tuning


def test_the_split_has_every_task_in_both_parts(tmp_path):
    requests = files.read([traces.make(tmp_path / "t.gz", 20)]).requests
    train, test = tune.split(requests, 0.3, seed=1)
    assert [r.task for r in test].count("a") == [r.task for r in test].count("b") == 3
    assert len(train) == 14 and not {id(r) for r in train} & {id(r) for r in test}
    again = tune.split(requests, 0.3, seed=1)
    assert [id(r) for r in again[1]] == [id(r) for r in test]
    with pytest.raises(TraceError, match="too few"):
        tune.split(requests[:1], 0.3, 0)


def test_spaces_have_options_that_exist():
    from vllm_specplug import registry

    for name, space in tune.SPACE.items():
        for option, values in space.items():
            for value in values:
                assert registry.parse_options({"specplug": {registry.find(name).section: {option: value}}})


def test_tuning_finds_what_pays_and_says_so(tmp_path):
    """Where a row costs as much as a step, only likely tokens pay: a higher threshold than the default's."""
    requests = files.read([traces.make(tmp_path / "t.gz", 40, size=60)]).requests
    times = step_times.GivenTimes([1, 2], [0.010, 0.018])
    found = tune.tune("Retrieval", requests, times, 8, budget_s=60.0)
    assert found.best.options["min_prob"] > 0.07
    assert found.adopted and found.gain[0] > 1.02 and found.gain[1] > 1.0
    assert found.recommended == found.best
    assert found.additional_config() == {"specplug": {"retrieval": dict(found.best.options)}}
    assert found.best_speedup > found.default_speedup
    assert (found.trained, found.held_out) == (28, 12)


def test_no_gain_keeps_the_defaults(tmp_path):
    requests = files.read([traces.make(tmp_path / "t.gz", 20)]).requests
    times = step_times.GivenTimes([1, 2], [0.010, 0.011])
    found = tune.tune("Retrieval", requests, times, 8, budget_s=1e-6)
    assert found.best == found.default and found.gain == pytest.approx((1.0, 1.0, 1.0)) and not found.adopted
    assert found.additional_config() == {"specplug": {}}


def test_settings_as_the_command_line_gives_them():
    assert replay.parse_settings(["auto.tree=false", "adaptive_length.inner=vllm:ngram"]) == {
        "auto": {"tree": False},
        "adaptive_length": {"inner": "vllm:ngram"},
    }
    with pytest.raises(OptionError, match="SECTION"):
        replay.parse_settings(["tree=false"])
