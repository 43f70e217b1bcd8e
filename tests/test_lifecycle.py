"""Lifecycle: slots follow request ids, and a proposer that raises costs drafts and nothing else."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pytest
from host_batches import batch
from vllm_specplug.proposers.base import DraftForest, Proposer, Request

from vllm_specplug.host.lifecycle import Lifecycle

VOCAB = 100


class Recorder(Proposer):
    """Drafts the request's last token over and over; raises where told to."""

    name = "recorder"

    @dataclass(frozen=True)
    class Options:
        pass

    def __init__(self):
        self.text: dict[int, list[int]] = {}
        self.requests: dict[int, Request] = {}
        self.steps = []
        self.fail: dict[str, set[int]] = {"observe": set(), "propose": set(), "add_request": set(), "remove": set()}
        self.token = None
        self.branches = False

    def add_request(self, request):
        if request.slot in self.fail["add_request"]:
            raise RuntimeError("add")
        assert request.slot not in self.text
        self.requests[request.slot] = request
        self.text[request.slot] = request.prompt.tolist()

    def observe(self, step):
        self.steps.append(step)
        if self.fail["observe"] & set(step.slots.tolist()):
            raise RuntimeError("observe")
        for i, slot in enumerate(step.slots.tolist()):
            self.text[slot] += step.tokens[step.offsets[i] : step.offsets[i + 1]].tolist()

    def propose(self, slots, limits):
        if self.fail["propose"] & set(slots.tolist()):
            raise RuntimeError("propose")
        tokens, parents, offsets = [], [], [0]
        for slot, limit in zip(slots.tolist(), limits.tolist(), strict=True):
            tokens += [self.text[slot][-1] if self.token is None else self.token] * limit
            parents += range(-1, limit - 1)
            if self.branches and limit > 1:  # the last node becomes the root's second child
                parents[-1], tokens[-1] = -1, tokens[-1] + 1
            offsets.append(len(tokens))
        return DraftForest(
            np.array(tokens, np.int32),
            np.array(parents, np.int32),
            np.full(len(tokens), 0.5, np.float32),
            np.zeros(len(tokens), np.int8),
            np.array(offsets, np.int32),
        )

    def remove_request(self, slot):
        if slot in self.fail["remove"]:
            raise RuntimeError("remove")
        del self.text[slot]


class Engine:
    """The engine's side of a few requests: rows, ids, texts."""

    def __init__(self):
        self.proposer = Recorder()
        self.lifecycle = Lifecycle(self.proposer, VOCAB)
        self.text: dict[str, list[int]] = {}
        self.max_tokens = 1000
        self.branching = True

    def step(self, emitted: dict[str, list[int]], drafted: dict[str, int] | None = None, limit: int = 2):
        for request_id, tokens in emitted.items():
            self.text[request_id] = self.text.get(request_id, [1, 2, 3]) + tokens
        rows = batch(self.text, emitted, drafted, limit)
        return dict(zip(emitted, self.lifecycle.step(rows, self.admit), strict=True))

    def admit(self, row, request_id, slot):
        return Request(
            slot=slot,
            request_id=request_id,
            prompt=np.array(self.text[request_id], np.int32),
            num_output=len(self.text[request_id]) - 3,
            max_tokens=self.max_tokens,
            branching=self.branching,
        )

    def seen(self):
        """Text of each live request as the proposer knows it."""
        return {
            r.request_id: self.proposer.text[s] for s, r in self.proposer.requests.items() if s in self.proposer.text
        }


@pytest.fixture
def engine():
    return Engine()


def test_rows_move_and_slots_follow_ids(engine):
    assert engine.step({"a": [5], "b": [6]}) == {"a": [5, 5], "b": [6, 6]}
    assert engine.step({"b": [7, 8], "c": [9], "a": [4]}, drafted={"b": 2, "a": 2}) == {
        "b": [8, 8],
        "c": [9, 9],
        "a": [4, 4],
    }
    assert engine.seen() == engine.text
    step = engine.proposer.steps[-1]
    assert step.num_drafted.tolist() == [2, 2]
    assert step.num_accepted.tolist() == [1, 0]
    counters = engine.lifecycle.counters
    assert (counters.verified, counters.accepted, counters.emitted, counters.requests) == (4, 1, 6, 3)


def test_ended_requests_are_forgotten_and_slots_reused(engine):
    for i in range(200):
        engine.step({f"r{i}": [i % 50]})
        engine.lifecycle.end([f"r{i}", "never seen"])
    assert engine.lifecycle.live == 0
    assert engine.proposer.text == {}
    assert {s for s in engine.proposer.requests} == {0}


def test_many_live_requests_grow_the_tables(engine):
    emitted = {f"r{i}": [i % VOCAB] for i in range(300)}
    drafts = engine.step(emitted)
    assert all(drafts[i] == tokens * 2 for i, tokens in emitted.items())
    assert engine.lifecycle.live == 300
    assert engine.step(emitted)["r299"] == [299 % VOCAB] * 2


def test_same_id_after_the_end_is_a_new_request(engine):
    engine.step({"a": [5]})
    engine.lifecycle.end(["a"])
    engine.text.clear()
    assert engine.step({"a": [6]}) == {"a": [6, 6]}
    assert engine.seen() == {"a": [1, 2, 3, 6]}


def test_a_missed_step_is_caught_up(engine):
    engine.step({"a": [5], "b": [5]})
    engine.text["a"] += [7, 7, 7]  # emitted in a step the proposer was not shown
    engine.step({"a": [8], "b": [9]})
    assert engine.seen() == engine.text
    assert engine.lifecycle.counters.resynchronised == 1


def test_drafts_stop_short_of_the_requests_own_bound(engine):
    engine.max_tokens = 7
    assert engine.step({"a": [5]}, limit=9)["a"] == [5, 5]  # 4 tokens held, 2 drafted, 1 bonus
    assert engine.step({"a": [5, 5]}, limit=9)["a"] == []


def test_limit_zero_asks_nothing(engine):
    engine.proposer.fail["propose"] = {0}
    assert engine.step({"a": [5]}, limit=0) == {"a": []}
    assert engine.lifecycle.counters.errors == 0


@pytest.mark.parametrize("method", ["observe", "propose"])
def test_a_raising_proposer_loses_only_the_guilty_request(engine, caplog, method):
    engine.step({"a": [5], "b": [6], "c": [7]})
    engine.proposer.fail[method] = {1}
    with caplog.at_level(logging.ERROR, logger="vllm.specplug"):
        drafts = engine.step({"a": [5], "b": [6], "c": [7]})
    assert drafts == {"a": [5, 5], "b": [], "c": [7, 7]}
    assert engine.lifecycle.counters.requests_without_drafts == 1
    assert engine.lifecycle.counters.errors >= 1
    errors = engine.lifecycle.counters.errors
    # From now on the guilty one is left out, so nothing fails any more; others go on, and so do new ones.
    assert engine.step({"a": [1], "b": [2], "d": [3]}) == {"a": [1, 1], "b": [], "d": [3, 3]}
    assert engine.lifecycle.counters.errors == errors
    logged = [r for r in caplog.records if "Traceback" in (r.exc_text or "") or r.exc_info]
    assert len(logged) == 1
    engine.lifecycle.end(["a", "b", "c", "d"])
    assert engine.lifecycle.live == 0


def test_a_failing_add_is_a_request_without_drafts(engine):
    engine.proposer.fail["add_request"] = {0}
    assert engine.step({"a": [5], "b": [6]}) == {"a": [], "b": [6, 6]}
    assert engine.step({"a": [5], "b": [6]}) == {"a": [], "b": [6, 6]}


def test_a_failing_remove_retires_the_slot(engine):
    engine.step({"a": [5]})
    engine.proposer.fail["remove"] = {0}
    engine.lifecycle.end(["a"])
    assert engine.lifecycle.live == 0
    assert engine.step({"b": [6]}) == {"b": [6, 6]}
    assert engine.proposer.requests[1].request_id == "b"


def test_everything_failing_still_answers(engine, caplog):
    engine.proposer.fail["propose"] = set(range(100))
    with caplog.at_level(logging.ERROR, logger="vllm.specplug"):
        for _ in range(5):
            drafts = engine.step({f"r{i}": [i] for i in range(8)})
    assert drafts == {f"r{i}": [] for i in range(8)}
    assert len(caplog.records) == 1


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_outside_the_vocabulary_never_reaches_the_engine(engine, token):
    engine.proposer.token = token
    assert engine.step({"a": [5], "b": [6]}) == {"a": [], "b": []}
    assert engine.lifecycle.counters.requests_without_drafts == 2


def test_malformed_forests_never_reach_the_engine(engine, monkeypatch):
    good = Recorder.propose

    def too_long(self, slots, limits):
        return good(self, slots, limits + 1)

    def branching(self, slots, limits):
        forest = good(self, slots, limits)
        return DraftForest(
            forest.tokens, np.full_like(forest.parents, -1), forest.probs, forest.sources, forest.offsets
        )

    def short(self, slots, limits):
        return good(self, slots[:-1], limits[:-1])

    engine.branching = False
    for i, bad in enumerate((too_long, branching, short)):
        monkeypatch.setattr(Recorder, "propose", bad)
        assert engine.step({f"x{i}": [5], f"y{i}": [6]}) == {f"x{i}": [], f"y{i}": []}
    assert engine.lifecycle.counters.requests_without_drafts == 6


def test_trees_are_kept_until_the_requests_next_step(engine):
    engine.proposer.branches = True
    assert engine.step({"a": [5], "b": [6]}, limit=3) == {"a": [5, 5, 6], "b": [6, 6, 7]}
    trees = engine.lifecycle.trees
    assert {i: (t.tokens, t.parents.tolist(), t.chain) for i, t in trees.items()} == {
        "a": ([5, 5, 6], [-1, 0, -1], 2),
        "b": ([6, 6, 7], [-1, 0, -1], 2),
    }
    assert engine.lifecycle.counters.drafted_in_trees == 6
    engine.step({"b": [7]}, limit=3)  # a is not in this step: the engine still holds its draft
    assert (trees["a"].tokens, trees["b"].tokens) == ([5, 5, 6], [7, 7, 8])
    engine.proposer.branches = False
    engine.step({"b": [7]}, limit=3)
    assert set(trees) == {"a"}
    engine.lifecycle.end(["a", "b"])
    assert trees == {}


def test_a_tree_for_a_request_that_may_not_branch_is_the_proposers_fault(engine):
    engine.proposer.branches = True
    engine.step({"a": [5]}, limit=3)
    engine.branching = False
    assert engine.step({"a": [5], "b": [6]}, limit=3) == {"a": [5, 5, 6], "b": []}
    counters = engine.lifecycle.counters
    assert (counters.requests_with_chains_only, counters.requests_without_drafts) == (1, 1)
    assert engine.step({"c": [7]}, limit=1) == {"c": [7]}


def test_a_muted_request_is_learned_from_and_gets_no_drafts(engine, monkeypatch):
    admit = engine.admit

    def muting(row, request_id, slot):
        if request_id == "b":
            engine.lifecycle.mute(slot)
        return admit(row, request_id, slot)

    monkeypatch.setattr(engine, "admit", muting)
    for _ in range(2):
        assert engine.step({"a": [5], "b": [6]}) == {"a": [5, 5], "b": []}
    assert engine.seen() == engine.text
    engine.lifecycle.end(["b"])
    assert engine.step({"c": [7]}) == {"c": [7, 7]}  # in b's slot


def test_topk_rows_follow_their_requests(engine):
    """Rows of a request that is admitted in this step are dropped, the others keep theirs."""
    engine.step({"a": [5]})
    engine.text["b"] = [1, 2, 3, 6]
    engine.text["a"] += [8, 9]
    rows = np.array([5, 8, 6], np.int32)  # a: last token and one draft; b: its one row
    topk = (
        rows,
        np.array([0, 2, 3], np.int32),
        np.array([-1, 0, -1], np.int32),
        np.arange(6, dtype=np.int32).reshape(3, 2),
        np.zeros((3, 2), np.float32),
    )
    ended = batch(engine.text, {"a": [8, 9], "b": [6]}, {"a": 1}, topk=topk)
    engine.lifecycle.step(ended, engine.admit)
    step = engine.proposer.steps[-1]
    assert step.row_tokens.tolist() == [5, 8]
    assert step.row_offsets.tolist() == [0, 2]
    assert step.row_parents.tolist() == [-1, 0]
    assert step.topk_ids.tolist() == [[0, 1], [2, 3]]


def test_stats_survive_a_broken_proposer(engine, monkeypatch):
    engine.step({"a": [5]})
    monkeypatch.setattr(Recorder, "stats", lambda self: {"bytes": 7.0})
    assert engine.lifecycle.stats()["recorder.bytes"] == 7.0
    assert engine.lifecycle.stats()["live"] == 1.0
    monkeypatch.setattr(Recorder, "stats", lambda self: 1 / 0)
    assert engine.lifecycle.stats()["steps"] == 1.0


class Sleeper(Recorder):
    """Sleeps through as many steps as told."""

    def __init__(self):
        super().__init__()
        self.naps = 0
        self.asked = []

    def asleep(self, requests, new):
        self.asked.append((requests, new))
        self.naps -= 1
        return self.naps >= 0


@pytest.fixture
def sleepy():
    engine = Engine()
    engine.proposer = Sleeper()
    engine.lifecycle = Lifecycle(engine.proposer, VOCAB)

    def nap(emitted):
        """A step through which the proposer may sleep; whether it did."""
        if not engine.lifecycle.asleep(list(emitted), list(emitted.values())):
            engine.step(emitted)
            return False
        for request_id, tokens in emitted.items():
            engine.text[request_id] = engine.text.get(request_id, [1, 2, 3]) + tokens
        return True

    engine.nap = nap
    return engine


def test_a_proposer_is_shown_what_it_slept_through(sleepy):
    assert not sleepy.nap({"a": [4], "b": [5]})
    sleepy.proposer.naps = 3
    assert sleepy.nap({"a": [6], "b": [7]})
    assert sleepy.nap({"b": [8], "a": [9]})  # rows have moved
    assert sleepy.nap({"a": [10], "b": [11], "new": [12]})
    shown = len(sleepy.proposer.steps)
    assert not sleepy.nap({"a": [13], "b": [14], "new": [15]})
    assert sleepy.seen() == sleepy.text
    assert sleepy.text["new"] == [1, 2, 3, 12, 15]
    caught_up, step = sleepy.proposer.steps[shown:]
    assert caught_up.num_drafted.tolist() == [0, 0] and caught_up.load is None and np.isnan(caught_up.seconds)
    assert sorted(caught_up.tokens.tolist()) == [6, 7, 8, 9, 10, 11]
    assert sorted(step.tokens.tolist()) == [13, 14]
    assert sleepy.proposer.asked == [(2, 2), (2, 0), (2, 0), (3, 1), (3, 1)]
    counters = sleepy.lifecycle.counters
    assert counters.slept == 3 and counters.resynchronised == 0
    assert counters.emitted == 12 - 1  # the new request's first token was emitted before it was known


def test_a_request_that_ends_in_its_proposers_sleep_is_shown_whole(sleepy):
    removed = {}
    forget = sleepy.proposer.remove_request

    def remove(slot):
        removed[slot] = list(sleepy.proposer.text[slot])
        forget(slot)

    sleepy.proposer.remove_request = remove
    sleepy.nap({"a": [4], "b": [5]})
    sleepy.proposer.naps = 2
    sleepy.nap({"a": [6], "b": [7]})
    sleepy.lifecycle.end(["a", "never seen"])
    assert list(removed.values()) == [[1, 2, 3, 4, 6]]
    assert sleepy.nap({"b": [8]})
    assert not sleepy.nap({"b": [9]})
    assert sleepy.seen() == {"b": sleepy.text["b"]}


def test_a_request_switched_off_is_not_shown_its_sleep(sleepy):
    sleepy.nap({"a": [4], "b": [5]})
    sleepy.proposer.fail["observe"] = {0}
    sleepy.nap({"a": [6], "b": [7]})
    sleepy.proposer.fail["observe"] = set()
    sleepy.proposer.naps = 1
    sleepy.nap({"a": [8], "b": [9]})
    sleepy.nap({"a": [10], "b": [11]})
    assert sleepy.seen()["b"][-3:] == [7, 9, 11] and "a" not in sleepy.seen()
    assert sleepy.lifecycle.counters.resynchronised == 0


def test_a_proposer_that_fails_to_say_whether_it_sleeps_is_awake(sleepy, caplog):
    def fail(requests, new):
        raise RuntimeError("no idea")

    sleepy.proposer.asleep = fail
    with caplog.at_level(logging.ERROR):
        assert not sleepy.nap({"a": [4]})
    assert sleepy.lifecycle.counters.errors == 1 and "asleep" in caplog.text
