"""Arms within one server: who drafts for which request, what each proposer is told, and what is counted."""

from __future__ import annotations

import collections
import logging
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from host_batches import batch
from vllm_specplug.proposers.base import NO_OTHERS, DraftForest, Others, Proposer, Request, StepLoad

from vllm_specplug.host import metrics, sampling_params
from vllm_specplug.host.arms_in_one import ArmChoice, Arms
from vllm_specplug.host.lifecycle import Lifecycle

VOCAB = 1000
NAMES = {"off": "off", "default": "first", "first": "first", "second": "second"}


class Constant(Proposer):
    """Drafts the same token over and over; notes what it is shown; sleeps, and fails, where told to."""

    @dataclass(frozen=True)
    class Options:
        pass

    def __init__(self, name, token):
        self.name, self.token = name, token  # type: ignore[misc]
        self.text: dict[str, list[int]] = {}
        self.ids: dict[int, str] = {}
        self.steps, self.told, self.naps, self.fails = [], [], 0, False
        self.learned = np.arange(token, dtype=np.int64)

    def add_request(self, request):
        self.ids[request.slot] = request.request_id
        self.text[request.request_id] = request.prompt.tolist()

    def observe(self, step):
        self.steps.append(step)
        if self.fails:
            raise RuntimeError("observe")
        for i, slot in enumerate(step.slots.tolist()):
            self.text[self.ids[slot]] += step.tokens[step.offsets[i] : step.offsets[i + 1]].tolist()

    def propose(self, slots, limits):
        self.told.append(self.others)
        if self.fails:
            raise RuntimeError("propose")
        offsets = np.concatenate([[0], np.cumsum(limits)]).astype(np.int32)
        size = int(offsets[-1])
        parents = np.concatenate([np.arange(-1, limit - 1) for limit in limits]).astype(np.int32)
        tokens = np.full(size, self.token, np.int32)
        return DraftForest(tokens, parents, np.full(size, 0.5, np.float32), np.zeros(size, np.int8), offsets)

    def remove_request(self, slot):
        del self.text[self.ids.pop(slot)]

    def asleep(self, requests, new):
        self.naps -= 1
        return self.naps >= 0

    def state(self):
        return {"learned": self.learned.copy()}

    def restore(self, state):
        if set(state) != {"learned"}:
            raise ValueError(f"saved arrays {sorted(state)}")
        self.learned = state["learned"]

    def stats(self):
        return {"store_bytes": 8.0 * self.token, "oddity": 1.0}


class Engine:
    """The engine's side of a few requests, and a server with two proposers; requests begin with their arm's name."""

    def __init__(self, *extra, shares=None):
        self.first, self.second = Constant("first", 11), Constant("second", 22)
        lifecycles = {"first": Lifecycle(self.first, VOCAB), "second": Lifecycle(self.second, VOCAB)}
        self.choice = ArmChoice(NAMES, "first", shares or {})
        self.arms = Arms(lifecycles, self.choice)
        self.text: dict[str, list[int]] = {}

    def step(self, emitted, drafted=None, seconds=math.nan, limit=2, **more):
        """Drafts by request, or None if all slept through the step."""
        for request_id, tokens in emitted.items():
            if request_id not in self.text:
                self.arms.begin(request_id, {"specplug": request_id.partition("-")[0]})
            self.text[request_id] = self.text.get(request_id, [1, 2, 3]) + tokens
        ids = list(emitted)
        if self.arms.asleep(ids, list(emitted.values()), seconds):
            return None
        rows = batch(self.text, emitted, drafted, limit, seconds=seconds, **more)
        return dict(zip(ids, self.arms.step(rows, self.admit), strict=True))

    def admit(self, lifecycle, row, request_id, slot):
        return Request(slot, request_id, np.array(self.text[request_id], np.int32), max_tokens=1000)

    def end(self, *request_ids):
        self.arms.end(request_ids)
        for request_id in request_ids:
            self.text.pop(request_id, None)


@pytest.fixture
def engine():
    return Engine()


# The choice of an arm


def test_a_request_names_its_arm():
    choice = ArmChoice(NAMES, "first", {"off": 1.0})
    for named, arm in NAMES.items():
        assert choice.of("r", {"specplug": named}) == arm  # though the split gives everything to "off"
    assert choice.of("r", {}) == "off"
    assert ArmChoice(NAMES, "first", {}).of("r", {"specplug_tenant": "acme"}) == "first"
    assert choice.unknown == 0


@pytest.mark.parametrize("named", ["third", "Second", "", 3, ["second"], "x" * 5000])
def test_an_unknown_arm_is_the_default_and_said_once(named, caplog):
    choice = ArmChoice(NAMES, "first", {"second": 1.0})
    with caplog.at_level(logging.WARNING, logger="vllm.specplug"):
        assert [choice.of(f"r{i}", {"specplug": named}) for i in range(3)] == ["first"] * 3
    assert choice.unknown == 3
    [record] = caplog.records
    message = record.getMessage()
    assert "Allowed: default, first, off, second" in message and len(message) < 300


def assigned(choice, count=20_000):
    return [choice.of(f"cmpl-{i}", {}) for i in range(count)]


def test_shares_are_kept():
    shares = {"first": 0.6, "second": 0.3, "off": 0.1}
    counts = collections.Counter(assigned(ArmChoice(NAMES, "first", shares)))
    for arm, share in shares.items():
        # Five standard deviations; the hash is fixed, so this holds for ever or never.
        assert abs(counts[arm] / 20_000 - share) < 5 * math.sqrt(share * (1 - share) / 20_000)


def test_assignments_are_stable():
    """The same in every process and version, in whatever order the arms are given; another seed, other ones."""
    shares = {"first": 0.5, "second": 0.3, "off": 0.2}
    found = assigned(ArmChoice(NAMES, "first", shares), 12)
    first, second, off = shares
    assert found == [off, first, first, second, off, second, second, first, second, second, first, second]
    assert assigned(ArmChoice(NAMES, "first", dict(reversed(shares.items()))), 12) == found
    other = assigned(ArmChoice(NAMES, "first", shares, seed=1), 200)
    agree = np.mean([a == b for a, b in zip(assigned(ArmChoice(NAMES, "first", shares), 200), other, strict=True)])
    assert agree == pytest.approx(0.5**2 + 0.3**2 + 0.2**2, abs=0.15)  # as often as by chance


def test_an_arm_whose_share_is_raised_keeps_its_requests():
    before = assigned(ArmChoice(NAMES, "first", {"first": 0.9, "off": 0.1}), 2000)
    after = assigned(ArmChoice(NAMES, "first", {"first": 0.7, "off": 0.3}), 2000)
    moved = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert set(moved) == {("first", "off")} and 300 < len(moved) < 500


def test_samples_of_one_prompt_stay_together():
    choice = ArmChoice(NAMES, "first", {"first": 0.5, "second": 0.5})
    arms = [{choice.of(f"{sample}_cmpl-{i}", {}) for sample in range(6)} for i in range(50)]
    assert all(len(each) == 1 for each in arms) and len(set.union(*arms)) == 2


def test_tenants_stay_together():
    choice = ArmChoice(NAMES, "first", {"first": 0.5, "second": 0.5}, by="tenant")
    arms = [{choice.of(f"r{i}{j}", {"specplug_tenant": f"t{i}"}) for j in range(6)} for i in range(50)]
    assert all(len(each) == 1 for each in arms) and len(set.union(*arms)) == 2
    assert {choice.of(f"r{j}", {}) for j in range(50)} == {"first", "second"}  # no tenant: by request
    by_request = ArmChoice(NAMES, "first", {"first": 0.5, "second": 0.5})
    assert {by_request.of(f"r{j}", {"specplug_tenant": "t"}) for j in range(50)} == {"first", "second"}


def test_ids_that_are_no_text():
    choice = ArmChoice(NAMES, "first", {"first": 0.5, "second": 0.5})
    assert choice.of("cmpl-\ud800", {}) in ("first", "second")


def test_a_request_that_names_an_unknown_arm_is_refused():
    ours, before, passed = SimpleNamespace(model="vllm_specplug.Auto"), SimpleNamespace(model="vllm_specplug.Auto"), []
    sampling_params.allow_arms(ours, ["off", "default", "auto"])
    check = sampling_params._validate_spec_decode(lambda self, config: passed.append(self.extra_args))

    def ask(config, extra_args):
        check(SimpleNamespace(extra_args=extra_args, min_p=0.0, logit_bias=None), config)

    good = [None, {}, {"specplug": "off"}, {"specplug": "auto", "specplug_tenant": "acme"}]
    for extra_args in good:
        ask(ours, extra_args)
    for bad in ("retrieval", "", 3, ["off"], {"a": 1}):
        with pytest.raises(Exception, match="expected one of auto, default, off, the arms this server holds"):
            ask(ours, {"specplug": bad})
    with pytest.raises(Exception, match="Did you mean 'auto'"):
        ask(ours, {"specplug": "Auto"})
    # An engine whose configuration was made without our check, and other speculation: not ours to refuse.
    ask(before, {"specplug": "x"})
    ask(SimpleNamespace(model="ngram"), {"specplug": "x"})
    ask(None, {"specplug": "x"})
    assert passed == [*good, *[{"specplug": "x"}] * 3]


# The way of requests


def test_each_request_is_drafted_for_by_its_arm(engine):
    drafts = engine.step({"second-a": [5], "first-b": [6], "off-c": [7], "first-d": [8]})
    assert drafts == {"second-a": [22, 22], "first-b": [11, 11], "off-c": [], "first-d": [11, 11]}
    # Rows have moved, one is not in the step.
    drafts = engine.step({"first-d": [8], "second-a": [22, 9], "off-c": [3]}, drafted={"second-a": 2, "first-d": 2})
    assert drafts == {"first-d": [11, 11], "second-a": [22, 22], "off-c": []}
    for proposer in (engine.first, engine.second):
        assert proposer.text == {i: t for i, t in engine.text.items() if i.startswith(proposer.name)}
    assert [step.num_accepted.tolist() for step in engine.second.steps] == [[1]]


def test_an_ended_request_is_forgotten_by_all(engine):
    for _ in range(3):
        engine.step({"second-a": [5], "first-b": [6], "off-c": [7]})
        assert engine.arms.live == 3
        engine.end("off-c", "second-a", "first-b", "never-seen")
        assert engine.arms.live == 0 and engine.arms._arm == {}
    assert engine.first.text == engine.second.text == {}


def test_an_id_may_come_back_with_another_arm(engine):
    engine.arms.begin("r", {"specplug": "second"})
    engine.text["r"] = [1, 2, 3]
    assert engine.step({"r": [5]}) == {"r": [22, 22]}
    engine.end("r")
    engine.arms.begin("r", {})
    engine.text["r"] = [1, 2, 3]
    assert engine.step({"r": [5]}) == {"r": [11, 11]}


def test_without_other_arms_the_step_is_handed_on_as_it_is(engine, monkeypatch):
    handed = []
    monkeypatch.setattr(engine.arms.default, "step", lambda batch, admit: handed.append(batch) or [[]])
    rows = batch({"first-a": [5]}, {"first-a": [5]})
    assert not engine.arms.asleep(["first-a"], [[5]], math.nan)
    engine.arms.step(rows, engine.admit)
    assert handed[0] is rows and rows.others is NO_OTHERS


def test_trees_of_all_arms_are_in_one_place(engine, monkeypatch):
    def branching(slots, limits):
        forest = Constant.propose(engine.second, slots, limits)
        return replace(forest, parents=np.full_like(forest.parents, -1), tokens=np.arange(2, dtype=np.int32))

    monkeypatch.setattr(engine.second, "propose", branching)
    engine.step({"first-a": [5], "second-b": [6]})
    assert list(engine.arms.trees) == ["second-b"] and engine.arms.trees is engine.arms.default.trees
    engine.end("second-b")
    assert engine.arms.trees == {}


def test_each_proposer_is_told_what_else_the_step_had(engine):
    engine.step({"first-a": [5], "second-b": [6, 7], "off-c": [8], "first-d": [9]}, drafted={"second-b": 2})
    assert engine.first.told == [Others(requests=2, rows=2, context=5 + 4, tokens=3)]
    assert engine.second.told == [Others(requests=3, rows=0, context=12, tokens=3)]
    engine.end("second-b", "off-c")
    engine.step({"first-a": [5], "first-d": [9]})
    assert engine.first.told[-1] is NO_OTHERS


def test_load_and_time_are_the_whole_steps(engine):
    load = StepLoad(3, 5, 40, 60)
    for _ in range(2):
        engine.step({"first-a": [5], "second-b": [6], "off-c": [8]}, seconds=0.02, load=load)
    for proposer in (engine.first, engine.second):
        assert [(step.load, step.seconds) for step in proposer.steps] == [(load, 0.02)]


def test_the_time_to_draft_is_shared_by_who_drafted(engine, monkeypatch):
    spent = {"first": 3_000_000, "second": 1_000_000}
    clock = [0]
    for name, lifecycle in zip(("first", "second"), engine.arms._lifecycles, strict=True):

        def step(batch, admit, original=lifecycle.step, name=name):
            clock[0] += spent[name]
            return original(batch, admit)

        monkeypatch.setattr(lifecycle, "step", step)
    monkeypatch.setattr("time.perf_counter_ns", lambda: clock[0])
    both = {"first-a": [5], "second-b": [6]}
    for _ in range(3):
        engine.step(both, overhead=0.008)
    engine.second.naps = 1
    engine.step(both, overhead=0.008)
    engine.step(both, overhead=0.008)
    seen = {p.name: [s.overhead for s in p.steps] for p in (engine.first, engine.second)}
    assert seen["first"] == pytest.approx([0.006, 0.006, 0.006, 0.008])
    # Two steps with both; then what it slept through, and a step after a step in which it took no time.
    assert seen["second"] == pytest.approx([0.002, 0.002, math.nan, math.nan], nan_ok=True)


def test_only_who_asks_for_the_top_k_gets_it(engine):
    engine.second.wants_topk, engine.second.topk = True, 2
    emitted = {"first-a": [5], "second-b": [6], "second-c": [7]}
    engine.step(emitted)
    assert engine.arms.wants_topk
    rows = (
        np.array([5, 6, 22, 7], np.int32),  # a's last token, b's and one draft, c's
        np.array([0, 1, 3, 4], np.int32),
        np.array([-1, -1, 0, -1], np.int32),
        np.arange(12, dtype=np.int32).reshape(4, 3),
        np.zeros((4, 3), np.float32),
    )
    engine.step(emitted, drafted={"second-b": 1}, topk=rows)
    assert engine.first.steps[-1].row_tokens is None
    step = engine.second.steps[-1]
    assert step.row_tokens.tolist() == [6, 22, 7] and step.row_offsets.tolist() == [0, 2, 3]
    assert step.row_parents.tolist() == [-1, 0, -1]
    assert step.topk_ids.tolist() == [[3, 4], [6, 7], [9, 10]] and step.topk_ids.flags.c_contiguous
    assert step.topk_logprobs.shape == (3, 2)


# Sleep and failure


def test_arms_sleep_each_for_itself(engine):
    both = {"first-a": [5], "second-b": [6], "off-c": [7]}
    engine.step(both)
    engine.second.naps = 2
    assert engine.step(both) == {"first-a": [11, 11], "second-b": [], "off-c": []}
    engine.first.naps = 1
    assert engine.step(both) is None
    assert engine.step(both) == {"first-a": [11, 11], "second-b": [22, 22], "off-c": []}
    for proposer in (engine.first, engine.second):
        assert proposer.text == {i: t for i, t in engine.text.items() if i.startswith(proposer.name)}
    counters = [lifecycle.counters for lifecycle in engine.arms._lifecycles]
    assert [each.slept for each in counters] == [1, 2] and [each.resynchronised for each in counters] == [0, 0]
    engine.end("first-a", "second-b")
    assert engine.step({"off-c": [4]}) is None  # nobody is asked


def test_a_proposer_that_raises_costs_its_own_arms_drafts(engine, caplog):
    engine.step({"first-a": [5], "second-b": [6]})
    engine.second.fails = True
    with caplog.at_level(logging.ERROR, logger="vllm.specplug"):
        for _ in range(2):
            drafts = engine.step({"first-a": [5], "second-b": [6], "second-c": [7]})
            assert drafts == {"first-a": [11, 11], "second-b": [], "second-c": []}
    first, second = (lifecycle.counters for lifecycle in engine.arms._lifecycles)
    assert (first.errors, first.requests_without_drafts) == (0, 0)
    assert second.errors > 0 and second.requests_without_drafts == 2
    assert "Proposer second failed" in caplog.text and "Proposer first" not in caplog.text
    assert len(engine.first.steps) == 2 and engine.arms.stats()["errors"] == second.errors


# Counts


def test_counts_by_arm(engine):
    engine.step({"first-a": [5], "second-b": [6], "off-c": [7]}, seconds=0.5)  # prompts: not timed
    engine.step(
        {"first-a": [11, 8], "second-b": [22, 22, 1], "off-c": [7]}, {"first-a": 2, "second-b": 2}, seconds=0.02
    )
    engine.step({"first-a": [8], "off-c": [7]}, {"first-a": 2}, seconds=0.03)
    engine.step({"second-b": [4]}, {"second-b": 2})  # of unknown time
    totals = engine.arms.stats()
    found = {
        arm: {key.removeprefix(f"arm.{arm}."): value for key, value in totals.items() if key.startswith(f"arm.{arm}.")}
        for arm in ("first", "second", "off")
    }
    nothing = {"drafted": 0, "verified": 0, "accepted": 0, "errors": 0}
    assert found == {
        "first": {
            **nothing,
            **{"requests": 1, "drafted": 6, "verified": 4, "accepted": 1, "emitted": 4},
            **{"decode_steps": 2, "decode_tokens": 3, "decode_seconds": pytest.approx(0.05)},
        },
        "second": {
            **nothing,
            **{"requests": 1, "drafted": 6, "verified": 4, "accepted": 2, "emitted": 5},
            **{"decode_steps": 1, "decode_tokens": 3, "decode_seconds": pytest.approx(0.02)},
        },
        "off": {
            **nothing,
            **{"requests": 1, "emitted": 3, "decode_steps": 2, "decode_tokens": 2},
            "decode_seconds": pytest.approx(0.05),
        },
    }
    # The server's own: of all proposers, each step once.
    assert (totals["requests"], totals["emitted"], totals["live"], totals["steps"]) == (2, 9, 2, 4)
    assert (totals["verified"], totals["accepted"], totals["without_drafts.off"]) == (8, 3, 1)


def test_time_asleep_counts(engine):
    engine.step({"first-a": [5], "off-c": [1]}, seconds=0.5)
    engine.first.naps = 2
    for _ in range(2):
        assert engine.step({"first-a": [5], "off-c": [1]}, seconds=0.01) is None
    counters = engine.arms.default.counters
    assert (counters.decode_steps, counters.decode_tokens) == (2, 2)
    assert counters.decode_seconds == pytest.approx(0.02)


def test_metrics_by_arm(engine):
    engine.step({"first-a": [4], "second-b": [6], "off-c": [7]})
    engine.step({"first-a": [11, 5], "second-b": [6], "off-c": [7]}, {"first-a": 2, "second-b": 2}, seconds=0.01)
    engine.choice.of("r", {"specplug": "nobody"})
    snapshot = engine.arms.snapshot({"more": 1.0})
    samples = [(name, tuple(sorted(labels.items())), value) for name, labels, value in metrics._samples(snapshot)]
    found = {(name, *labels): value for name, labels, value in samples}
    assert len(found) == len(samples), "two samples with the same labels: Prometheus refuses that"
    assert {name for name, *_ in found} <= set(metrics._FAMILIES)
    assert found["arm_accepted_tokens", ("arm", "first")] == 1
    assert found["arm_requests", ("arm", "off")] == 1 and found["arm_drafted_tokens", ("arm", "off")] == 0
    assert found["arm_decode_seconds", ("arm", "second")] == pytest.approx(0.01)
    assert found["arm_unknown_requests",] == 1
    assert found["requests_without_drafts", ("reason", "off")] == 1
    # The default's own have no label, as without arms.
    assert found["store_bytes",] == 88 and found["store_bytes", ("arm", "second")] == 176
    assert found["stat", ("name", "first.oddity")] == found["stat", ("name", "second.oddity")] == 1
    verified = sum(value for (name, *_), value in found.items() if name == "verified_tokens")
    assert verified == engine.arms.stats()["verified"] == 4
    assert {(r.request_id, r.proposer) for r in snapshot.requests} == {("first-a", "first"), ("second-b", "second")}


def test_a_server_with_one_arm_shows_none():
    engine = Engine()
    engine.arms = Arms({"first": engine.arms.default}, ArmChoice({"off": "off", "first": "first"}, "first", {}))
    engine.step({"first-a": [5]})
    assert not any("arm" in name for name in engine.arms.stats())
    assert engine.arms.snapshot({}).totals == engine.arms.default.stats()
    assert engine.step({"first-a": [5], "off-b": [6]}) == {"first-a": [11, 11], "off-b": []}
    assert engine.arms.stats()["arm.first.requests"] == engine.arms.stats()["arm.off.requests"] == 1


# Saved state


def test_state_is_kept_by_arm(engine):
    engine.first.learned, engine.second.learned = np.arange(3), np.arange(5)
    state = engine.arms.state()
    assert set(state) == {"learned", "arms/second/learned"}
    other = Engine()
    other.arms.restore(state)
    assert other.first.learned.tolist() == [0, 1, 2] and other.second.learned.tolist() == [0, 1, 2, 3, 4]


def test_state_with_and_without_arms(engine, caplog):
    alone = Constant("first", 11)
    one = Arms({"first": Lifecycle(alone, VOCAB)}, ArmChoice(NAMES, "first", {}))
    with caplog.at_level(logging.WARNING, logger="vllm.specplug"):
        one.restore({"learned": np.arange(3), "arms/second/learned": np.arange(5)})
    assert alone.learned.tolist() == [0, 1, 2] and "arms second have learned" in caplog.text
    caplog.clear()
    engine.arms.restore(one.state())
    assert engine.first.learned.tolist() == [0, 1, 2] and len(engine.second.learned) == 22
    assert caplog.text == ""


def test_state_that_does_not_fit_names_the_arm(engine):
    with pytest.raises(ValueError, match="arm second: saved arrays"):
        engine.arms.restore({"learned": np.arange(3), "arms/second/lerned": np.arange(5)})
