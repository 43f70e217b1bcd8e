"""The draft length of drafting on the device: what is asked of vLLM, and real engines in Triton's interpreter."""

from __future__ import annotations

import math
from types import SimpleNamespace

import interpreted
import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm_specplug.host import compat, device_lengths, engine_args

if compat.missing_for_device_drafts() or device_lengths._missing():
    pytest.skip("this vLLM has no Model Runner V2 with Dynamic SD", allow_module_level=True)

from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm_specplug.proposers.draft_length import MOST_LENGTHS, lengths_up_to

from vllm_specplug import options
from vllm_specplug.host import device_budget, metrics

TABLE = device_lengths.TABLE


@pytest.fixture
def cuda(monkeypatch):
    """The front process's checks run as on a GPU."""
    from vllm import platforms

    gpu = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False, device_name="a GPU")
    monkeypatch.setattr(platforms, "current_platform", gpu)
    monkeypatch.setattr(metrics, "install_front", lambda arguments: None)
    monkeypatch.setattr(device_lengths, "_warned", set())


def arguments(proposer="Auto", tokens=31, additional=None, speculative=None, **settings):
    from vllm.engine.arg_utils import EngineArgs

    config = {"method": "ngram_gpu", "model": f"vllm_specplug.{proposer}", "num_speculative_tokens": tokens}
    return EngineArgs(
        "m",
        speculative_config=config | (speculative or {}),
        additional_config={"specplug": additional or {}},
        **settings,
    )


@pytest.mark.parametrize("proposer", ["Auto", "Retrieval", "TokenRecycling"])
@pytest.mark.parametrize(("seats", "tokens"), [(None, 31), (256, 4), (4, 31), (2, 8), (7, 128)])
def test_vllm_is_told_of_every_length(cuda, proposer, seats, tokens):
    given = arguments(proposer, tokens, max_num_seqs=seats)
    for _ in range(2):  # checked again, by the next entry point
        engine_args.check(given)
        assert given.scheduler_cls == device_lengths.DEVICE_SCHEDULER
        table = build_dynamic_sd_schedule_lookup(given.speculative_config[TABLE], seats or 256, tokens)
        expected = lengths_up_to(tokens, min(seats or MOST_LENGTHS, MOST_LENGTHS))
        assert sorted(set(table[1:])) == expected and expected[0] == 0
        assert table[1] == tokens and table[-1] == 0


def test_what_the_scheduler_is_called():
    module, _, name = device_lengths.DEVICE_SCHEDULER.rpartition(".")
    assert module == device_budget.__name__ and hasattr(device_budget, name)


def test_a_fixed_length_is_vllms_table(cuda):
    for length, table in ((5, [[1, 1, 5]]), (0, [[1, 1, 0]]), (31, None), (64, None)):
        given = arguments(additional={"auto": {"policy": "fixed", "length": length}})
        for _ in range(2):
            engine_args.check(given)
            assert given.speculative_config.get(TABLE) == table and given.scheduler_cls is None


@pytest.mark.parametrize("policy", ["svip", "opt_tree", "specdec++"])
def test_rules_that_look_at_drafts_are_refused(cuda, policy):
    with pytest.raises(options.OptionError, match=r"auto\.policy = .* expected one of marginal, fixed\.$"):
        engine_args.check(arguments(additional={"auto": {"policy": policy}}))


def test_the_users_own_table_stays(cuda):
    own = [[1, 8, 3], [9, 64, 1]]
    given = arguments(speculative={TABLE: own}, scheduler_cls="my.Scheduler")
    engine_args.check(given)
    assert given.speculative_config[TABLE] == own and given.scheduler_cls == "my.Scheduler"


def test_a_scheduler_of_the_users_own_is_refused_where_it_would_be_replaced(cuda):
    with pytest.raises(options.OptionError, match=r"--scheduler-cls my\.Scheduler.*or specplug\.auto\.policy to fixed"):
        engine_args.check(arguments(scheduler_cls="my.Scheduler"))
    with pytest.raises(options.OptionError, match=rf"speculative_config\.{TABLE}\.$"):
        engine_args.check(arguments("Retrieval", scheduler_cls="my.Scheduler"))
    given = arguments(additional={"auto": {"policy": "fixed"}}, scheduler_cls="my.Scheduler")
    engine_args.check(given)
    assert given.scheduler_cls == "my.Scheduler"


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"data_parallel_size": 2}, "data parallelism"), ({"max_num_seqs": 1}, "--max-num-seqs 1")],
)
def test_where_there_is_no_budget_it_is_said_once(cuda, caplog, settings, words):
    given = arguments(tokens=8, **settings)
    with caplog.at_level("WARNING", logger="vllm.specplug"):
        engine_args.check(given)
        engine_args.check(given)
    assert given.scheduler_cls is None and TABLE not in given.speculative_config
    lines = [record.getMessage() for record in caplog.records if "no budget" in record.getMessage()]
    assert len(lines) == 1 and words in lines[0] and "always 8 draft tokens" in lines[0]


def test_a_vllm_without_dynamic_sd_is_named(cuda, caplog, monkeypatch):
    monkeypatch.setattr(device_lengths, "TABLE", "no_such_option")
    given = arguments(tokens=8)
    with caplog.at_level("WARNING", logger="vllm.specplug"):
        engine_args.check(given)
    assert "lacks vllm.config.SpeculativeConfig" in caplog.text and given.scheduler_cls is None


# What a step tells


class Step:
    """A step of requests ``{name: (rows, draft tokens, emitted)}``, as vLLM's scheduler and runner describe it."""

    def __init__(self, requests):
        self.num_scheduled_tokens = {name: rows for name, (rows, _, _) in requests.items()}
        self.total_num_scheduled_tokens = sum(self.num_scheduled_tokens.values())
        self.scheduled_spec_decode_tokens = {name: [-1] * k for name, (_, k, _) in requests.items() if k}
        tokens = [[7] * emitted for _, _, emitted in requests.values()]
        self.output = SimpleNamespace(
            sampled_token_ids=tokens, req_id_to_index={name: i for i, name in enumerate(requests)}
        )


@pytest.fixture
def told(monkeypatch):
    """A budget, and what its policy is told: (length, emitted, milliseconds or None)."""
    budget, seen, counts = device_budget.Budget([0, 1, 4]), [], []
    budget.counts = counts

    def observe(length, emitted, seconds=math.nan, requests=None):
        seen.append((length, emitted, round(seconds * 1e3) if seconds == seconds else None))
        counts.append(requests)

    monkeypatch.setattr(budget.policy, "observe", observe)
    return budget, seen


def give(budget, requests, at_ms, busy=True):
    step = Step(requests)
    budget.learn(step, step.output, at_ms * 1_000_000)
    budget.wait(at_ms * 1_000_000, busy)


def test_a_step_takes_as_long_as_from_the_output_before(told):
    budget, seen = told
    step = {"a": (5, 4, 3), "b": (5, 4, 1)}
    for at in (1000, 1010, 1025):
        give(budget, step, at)
    # The first has nothing before it, and is the first of its shape.
    assert seen == [(4, [3, 1], None), (4, [3, 1], 10), (4, [3, 1], 15)]


def test_first_steps_of_a_shape_and_of_a_busy_spell_are_not_timed(told):
    budget, seen = told
    drafted, plain = {"a": (5, 4, 3)}, {"a": (1, 0, 1)}
    give(budget, drafted, 1000)
    give(budget, plain, 1010)
    give(budget, drafted, 1020)
    give(budget, plain, 1030, busy=False)
    give(budget, plain, 9000)
    give(budget, plain, 9008)
    assert [ms for _, _, ms in seen] == [None, None, 10, 10, None, 8]


def test_steps_with_prompts_or_lengths_of_all_kinds_tell_acceptance_only(told):
    budget, seen = told
    for at in (1000, 1010):
        give(budget, {"a": (5, 4, 3), "b": (20, 0, 1), "c": (5, 4, 2)}, at)  # a prompt
    assert seen == [(4, [3, 2], None)] * 2
    seen.clear()
    give(budget, {"a": (5, 4, 3), "b": (2, 1, 2), "c": (1, 0, 1)}, 1020)  # the end of a context, a new request
    assert seen == [(4, [3], None), (1, [2], None)]
    seen.clear()
    give(budget, {"a": (5, 4, 3), "b": (5, 0, 0)}, 1030)  # a part of a prompt, as long as drafts would make it
    assert seen == [(4, [3], None)]
    seen.clear()
    for at in (1040, 1050, 1060):
        give(budget, {"a": (5, 4, 3), "b": (5, 4, 0)}, at)  # one whose output is not used any more
    assert {ms for _, _, ms in seen} == {None}


def test_requests_that_want_no_drafts_are_part_of_the_step(told):
    budget, seen = told
    budget.off = {"b", "ended"}
    for at in (1000, 1010):
        give(budget, {"a": (5, 4, 3), "b": (1, 0, 1)}, at)
    assert seen == [(4, [3], None), (4, [3], 10)] and budget.counts == [2, 2] and budget.policy.share == 0.5
    give(budget, {"a": (5, 4, 3), "c": (1, 0, 1)}, 1020)  # one that has none yet
    assert seen[-1] == (4, [3], None) and budget.counts[-1] is None
    give(budget, {"a": (1, 0, 1), "b": (1, 0, 1)}, 1030)
    give(budget, {"a": (1, 0, 1), "b": (1, 0, 1)}, 1037)
    assert seen[-1] == (0, [1, 1], 7)


def test_steps_of_nothing_are_left_out(told):
    budget, seen = told
    give(budget, {}, 1000)
    step = Step({"a": (1, 0, 1)})
    step.output.sampled_token_ids = []
    budget.learn(step, step.output, 10**9)
    assert seen == [] and not budget.failed


def test_a_fault_costs_the_drafts_and_no_more(told, monkeypatch, caplog):
    budget, _ = told
    assert budget[3] in (0, 1, 4)
    monkeypatch.setattr(budget.policy, "observe", lambda *args: 1 / 0)
    with caplog.at_level("ERROR", logger="vllm.specplug"):
        give(budget, {"a": (5, 4, 3)}, 1000)
        give(budget, {"a": (5, 4, 3)}, 1010)
    assert budget.failed and {budget[n] for n in range(1, 9)} == {0}
    assert caplog.text.count("ZeroDivisionError") == 1


def test_metrics():
    budget = device_budget.Budget([0, 1, 4])
    samples = {name: value for name, _, value in metrics._samples(budget.snapshot())}
    assert samples["draft_length"] == 0 and samples["errors"] == 0
    assert {"gain_ratio", "step_time_predicted_seconds", "step_time_measured_seconds"} <= samples.keys()


# Real engines


def same(outputs):
    names = list(outputs)
    for name in names[1:]:
        assert outputs[name] == outputs[names[0]], name


@pytest.mark.engine
def test_an_engine_whose_scheduler_runs_ahead():
    found = interpreted.run("device_budget_driver", "chosen")
    same(found["outputs"])
    assert found["scheduler"] == "BudgetedScheduler" and found["asynchronous"]
    assert found["lengths"] == [0, 1, 4] and [entry[2] for entry in found["table"]] == [4, 1, 0]
    assert found["accepted"] > 20
    asked, told = found["asked"], found["told"]
    assert {length for _, length in asked} > {0} and max(requests for requests, _ in asked) == 4
    assert {length for length, _, _ in told} >= {length for _, length in asked[:-2]}
    for length, emitted, seconds in told:
        assert all(1 <= tokens <= 1 + length for tokens in emitted) and len(emitted) <= 4
        assert seconds is None or 1e-4 < seconds < 10.0
    assert sum(seconds is not None for _, _, seconds in told) > len(told) / 3
    # Every token but the first of each request, which its prompt gave; the last step may emit more than are used.
    emitted = sum(sum(emitted) for _, emitted, _ in told)
    assert 4 * 23 <= emitted <= 4 * (23 + 9)
    # A length asked for is that of a step later.
    turns = found["in_turn"]
    lengths = [length for length, _, _ in turns["told"]]
    asked_lengths = [length for _, length in turns["asked"]]
    # (A step of the requests before may still have been under way.)
    assert asked_lengths[:8] in (lengths[:8], lengths[1:9]) and len(set(lengths[:8])) == 3
    assert found["after_failure"]["failed"] and found["drafted_after_failure"] == 0
    assert found["totals"]["errors"] == 1 and found["totals"]["draft_length.choices"] > 10


@pytest.mark.engine
@pytest.mark.slow
def test_engines_whose_scheduler_waits_with_few_seats_or_a_fixed_length():
    found = interpreted.run("device_budget_driver", "others")
    same(found["outputs"])
    waits = found["synchronous"]
    assert waits["scheduler"] == "BudgetedSyncScheduler" and not waits["asynchronous"]
    assert {length for length, _, _ in waits["told"]} == {0, 1, 4}
    assert found["two seats"]["lengths"] == [0, 4] and found["two seats"]["drafts"] > 0
    fixed = found["fixed"]
    assert fixed["scheduler"] == "AsyncScheduler" and fixed["lengths"] is None
    assert 1.9 * fixed["drafts"] < fixed["draft_tokens"] <= 2 * fixed["drafts"]
