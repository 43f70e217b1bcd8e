"""What a step computed and how long it took, read off the runner."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from vllm_specplug.proposers.base import StepLoad

from vllm_specplug.host.step_clock import PROBE_ROUNDS, PROBE_ROWS, StepClock, load_of, probe


class Time:
    def __init__(self):
        self.now = 1_000

    def __call__(self):
        return self.now


def test_a_step_lasts_from_draft_to_draft():
    time = Time()
    clock = StepClock(time)
    clock.forward()
    assert math.isnan(clock.lap())  # nothing before it
    clock.forward()
    time.now += 25_000_000
    assert clock.lap() == pytest.approx(0.025)
    time.now += 9_000_000_000  # idle, or a step of which this was not told
    assert math.isnan(clock.lap())
    clock.forward()
    clock.forward()
    time.now += 50_000_000
    assert math.isnan(clock.lap())  # two steps in one
    clock.forward()
    time.now += 30_000_000
    assert clock.lap() == pytest.approx(0.03)


def test_overhead_is_what_was_spent_since_it_was_asked_for():
    time = Time()
    clock = StepClock(time)
    for spent in (1_000_000, 2_000_000):
        start = clock.read()
        time.now += spent
        clock.spent(start)
        time.now += 5_000_000
    assert clock.overhead() == pytest.approx(0.003)
    assert clock.overhead() == 0


def runner(rows, computed):
    starts = np.concatenate([[0], np.cumsum(rows), [99, 99]]).astype(np.int32)
    return SimpleNamespace(
        query_start_loc=SimpleNamespace(np=starts),
        input_batch=SimpleNamespace(num_computed_tokens_cpu=np.array([*computed, 7, 7], np.int32)),
    )


def test_a_step_of_drafts_only():
    load = load_of(runner([1, 4, 3], [100, 50, 10]), np.array([0, 3, 2], np.int32))
    assert load == StepLoad(requests=3, rows=8, context=160, row_context=100 + 200 + 30)


def test_a_step_with_prompts():
    load = load_of(runner([5, 2, 9], [1000, 50, 0]), np.array([0, 1, 0], np.int32))
    assert load.requests == 1 and load.rows == 2 and load.context == 50 and load.row_context == 100
    assert load.prefill == 14
    assert load.prefill_context == sum(range(1000, 1005)) + sum(range(9))


def test_large_contexts_do_not_overflow():
    load = load_of(runner([128, 128], [2**31 - 1, 2**31 - 1]), np.array([127, 127], np.int32))
    assert load.row_context == 256 * (2**31 - 1)


def test_the_probe_runs_every_size_that_the_runner_takes():
    ran = []

    def dummy_run(rows):
        ran.append(rows)
        return np.zeros((rows + 3, 2)), None

    logits = []
    fake = SimpleNamespace(
        max_num_tokens=10, _dummy_run=dummy_run, model=SimpleNamespace(compute_logits=lambda h: logits.append(len(h)))
    )
    loads, seconds = probe(fake)
    sizes = [n for n in PROBE_ROWS if n <= 10]
    assert [load.rows for load in loads] == sizes and len(seconds) == len(sizes)
    assert ran == sizes * PROBE_ROUNDS == logits
    assert all(0 <= s < math.inf for s in seconds)
