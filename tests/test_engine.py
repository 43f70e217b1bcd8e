"""The real engine with the real model in float32: same tokens as without speculation, in every odd situation."""

from __future__ import annotations

import pytest
from engines import AUTO, MODEL, RETRIEVAL, engine, greedy, lifecycle_of, metric, runner_of

pytestmark = pytest.mark.engine

#: Prompts and tokens of `make test`; the whole of it (96 prompts x 96 tokens) is marked slow.
COUNT, LENGTH = 24, 48

#: A budget that depends on no clock.
FIXED = {"policy": "fixed", "length": 8, "min_prob": 0.03}


@pytest.fixture(scope="module")
def baseline(prompts):
    """Outputs without speculation: of the first COUNT prompts, and of one long one."""
    with engine(MODEL) as llm:
        out = greedy(llm, prompts[:COUNT], LENGTH, 8)
        long = greedy(llm, [long_prompt(prompts)], 60, 1)[0]
        return {"outputs": out, "long": long, "top_k": top_k_samples(llm, prompts)}


def top_k_samples(llm, prompts):
    """Seeded samples under a top-k without a top-p."""
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0.7, top_k=20, seed=i, max_tokens=16) for i in range(3)]
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts[:3], params, use_tqdm=False)]


def long_prompt(prompts):
    """Prompts joined to 900 tokens: many prefill chunks, and near a max_model_len of 960."""
    tokens = [t for p in prompts for t in p["prompt_token_ids"]]
    return {"prompt_token_ids": tokens[:900]}


@pytest.fixture(scope="module")
def auto(baseline):
    """The engine most tests share. vLLM keeps one set of metrics per process, the newest engine's: tests that read
    this one's come before those that start another."""
    config = {"specplug": {"auto": FIXED, "ab": {"arms": ["retrieval", "token_recycling"]}}}
    with engine(MODEL, AUTO, additional_config=config) as llm:
        yield llm


@pytest.mark.parametrize("concurrency", [8, 1])
def test_greedy_output_is_identical(auto, prompts, baseline, concurrency):
    before = lifecycle_of(auto).counters.accepted
    count = COUNT if concurrency > 1 else 6
    assert greedy(auto, prompts[:count], LENGTH, concurrency) == baseline["outputs"][:count]
    assert lifecycle_of(auto).counters.accepted > before + 20  # drafts really were verified and kept
    stats = runner_of(auto).drafter.stats()
    assert stats["tree_nodes_accepted"] > 10 and stats["rows_moved"] > 0
    assert stats["auto.table_rows_written"] > 3 * stats["verified"]  # rejected rows are learned from as well


def test_counters_agree_with_vllms_own(auto, prompts):
    greedy(auto, prompts[:2], 16, 8)
    counters = lifecycle_of(auto).counters
    assert counters.errors == 0
    assert counters.resynchronised == 0
    assert counters.verified == metric(auto, "vllm:spec_decode_num_draft_tokens")
    # vLLM cuts the tokens of a step that hits a stop or the length limit before it counts; the runner does not.
    assert 0 <= counters.accepted - metric(auto, "vllm:spec_decode_num_accepted_tokens") <= counters.requests * 8
    assert 0 < counters.accepted < counters.verified <= counters.drafted


def test_prefix_cache_hits_do_not_change_drafting(auto, prompts, baseline):
    """The same prompts again: their KV comes from the cache, and their outputs from the store of earlier outputs."""
    counters = lifecycle_of(auto).counters
    again = [long_prompt(prompts), *prompts[:4]]  # only whole blocks, of 128 tokens here, are cached
    first = greedy(auto, again, LENGTH, 8)
    before_steps, before = counters.steps, metric(auto, "vllm:prefix_cache_hits")
    assert greedy(auto, again, LENGTH, 8) == first
    assert first == [baseline["long"][:LENGTH], *baseline["outputs"][:4]]
    assert metric(auto, "vllm:prefix_cache_hits") > before
    # Every output was seen before, so it is drafted in long runs: well under one step per token.
    assert counters.steps - before_steps < LENGTH / 2


def test_state_is_freed_when_requests_end_or_are_aborted(auto, prompts):
    from vllm import SamplingParams

    llm_engine = auto.llm_engine
    ids = [str(9000 + i) for i in range(4)]
    for request_id, prompt in zip(ids, prompts, strict=False):
        params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
        llm_engine.add_request(request_id, prompt, params)
    for _ in range(6):
        llm_engine.step()
    assert lifecycle_of(auto).live >= 4
    llm_engine.abort_request(ids)
    greedy(auto, prompts[:1], 4, 1)  # the next steps report the ended ones to the worker
    live = set(lifecycle_of(auto)._slots.of)
    assert live <= set(runner_of(auto).requests)
    assert not any(i.startswith("900") for i in live)
    proposer_live = lifecycle_of(auto).proposer.stats()["live_requests"]
    assert proposer_live == len(live)


def test_samples_and_sampling_parameters_run_side_by_side(auto, prompts):
    """n > 1, seeds, penalties, logprobs and greedy in one batch: a seeded request repeats itself exactly."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0.8, top_p=0.9, seed=1, n=2, max_tokens=24),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=24),
        SamplingParams(temperature=0.0, logprobs=3, max_tokens=24),
        SamplingParams(temperature=0.7, top_k=20, presence_penalty=0.5, frequency_penalty=0.5, seed=2, max_tokens=24),
        SamplingParams(temperature=0.0, bad_words=[" the"], max_tokens=24),
    ]
    outputs = auto.generate(prompts[:5], params, use_tqdm=False)
    assert [len(o.outputs) for o in outputs] == [2, 1, 1, 1, 1]
    for token, table in zip(outputs[2].outputs[0].token_ids, outputs[2].outputs[0].logprobs, strict=True):
        assert table[token].logprob == max(entry.logprob for entry in table.values())
    assert " the" not in outputs[4].outputs[0].text
    assert lifecycle_of(auto).counters.errors == 0


def by_arm(llm, before=None):
    """``{arm: {counter: value}}``, less those ``before``."""
    found: dict[str, dict[str, float]] = {}
    for name, value in runner_of(llm).drafter.stats().items():
        if name.startswith("arm."):
            _, arm, key = name.split(".")
            found.setdefault(arm, {})[key] = value - (before[arm][key] if before else 0.0)
    return found


def test_arms_share_a_batch(auto, prompts, baseline):
    """Whoever drafts, the tokens are the same; each arm counts its own, and off drafts nothing."""
    from vllm import SamplingParams

    arms, before = ["auto", "retrieval", "token_recycling", "off"], by_arm(auto)
    params = [
        SamplingParams(temperature=0.0, max_tokens=LENGTH, extra_args={"specplug": arms[i % 4]}) for i in range(COUNT)
    ]
    outputs = [list(o.outputs[0].token_ids) for o in auto.generate(prompts[:COUNT], params, use_tqdm=False)]
    assert outputs == baseline["outputs"]
    counts = by_arm(auto, before)
    assert set(counts) == set(arms)
    for i, arm in enumerate(arms):
        count, emitted = counts[arm], sum(map(len, outputs[i::4]))
        assert count["requests"] == COUNT / 4 and count["errors"] == 0
        # The runner does not cut the tokens of the step that ends a request.
        assert emitted <= count["emitted"] <= emitted + 8 * COUNT / 4
        assert count["decode_tokens"] == count["emitted"] - count["requests"]
        assert 0.0 < count["decode_seconds"] / count["decode_tokens"] < 1.0
        if arm == "off":
            assert count["drafted"] == count["verified"] == count["accepted"] == 0
            assert count["decode_steps"] == count["decode_tokens"]
        else:
            assert count["drafted"] >= count["verified"] > count["accepted"] > 5, arm
            assert count["decode_steps"] == count["decode_tokens"] - count["accepted"]
    greedy(auto, prompts[:1], 4, 1)  # its first step reports the last ended ones to the worker
    assert runner_of(auto).drafter.arms._arm == {}


def test_a_split_assigns_arms(auto, prompts, baseline, monkeypatch):
    from vllm_specplug.host.arms_in_one import ArmChoice

    names = {name: name for name in ("auto", "retrieval", "off")}
    choice = ArmChoice(names, "auto", {"auto": 0.4, "retrieval": 0.3, "off": 0.3}, by="tenant")
    asked = {}
    monkeypatch.setattr(runner_of(auto).drafter.arms, "_choice", choice)
    monkeypatch.setattr(
        choice, "of", lambda i, extra: asked.setdefault(i, ArmChoice.of(choice, i, extra | {"specplug_tenant": i[:2]}))
    )
    before = by_arm(auto)
    assert greedy(auto, prompts[:8], LENGTH, 8) == baseline["outputs"][:8]
    counts = by_arm(auto, before)
    assert len(asked) == 8
    for arm in names:
        assert counts[arm]["requests"] == list(asked.values()).count(arm)
    assert counts["token_recycling"]["requests"] == 0


def test_penalties_and_bad_words_equal_no_speculation(auto, prompts):
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0.0, repetition_penalty=1.2, max_tokens=32),
        SamplingParams(temperature=0.0, presence_penalty=0.8, frequency_penalty=0.4, max_tokens=32),
        SamplingParams(temperature=0.0, bad_words=[" a", " of"], max_tokens=32),
        SamplingParams(temperature=0.0, min_tokens=32, max_tokens=32),
    ]
    before = lifecycle_of(auto).counters.verified
    got = [list(o.outputs[0].token_ids) for o in auto.generate(prompts[:4], params, use_tqdm=False)]
    assert lifecycle_of(auto).counters.verified > before
    with engine(MODEL) as llm:
        want = [list(o.outputs[0].token_ids) for o in llm.generate(prompts[:4], params, use_tqdm=False)]
    assert got == want


def test_tight_engine(prompts, baseline):
    """Few KV blocks (preemption), prefill in chunks of at most 64 tokens, and a prompt that ends at max_model_len."""
    blocks = 5  # of 128 tokens each on this backend
    with engine(
        MODEL, RETRIEVAL, max_num_batched_tokens=64, max_num_seqs=4, num_gpu_blocks_override=blocks, max_model_len=512
    ) as llm:
        long = [p for p in prompts if len(p["prompt_token_ids"]) > 40][:8]
        index = [prompts.index(p) for p in long if prompts.index(p) < COUNT]
        got = greedy(llm, [prompts[i] for i in index], LENGTH, 8)
        assert got == [baseline["outputs"][i] for i in index]
        greedy(llm, long[:4], 200, 8)
        assert metric(llm, "vllm:num_preemptions") > 0
        counters = lifecycle_of(llm).counters
        assert (counters.errors, counters.requests_without_drafts) == (0, 0)
        assert counters.accepted > 0


def test_end_of_the_context(prompts, baseline):
    """The longest request nears max_model_len while others go on: nobody gets dummy drafts, nobody overruns."""
    with engine(MODEL, RETRIEVAL, max_model_len=960) as llm:
        together = [long_prompt(prompts), *prompts[:3]]
        got = greedy(llm, together, 60, 8)
        assert got[0] == baseline["long"]
        assert [g[:LENGTH] for g in got[1:]] == baseline["outputs"][:3]
        counters = lifecycle_of(llm).counters
        assert counters.verified <= counters.drafted  # vLLM's own dummy drafts would count as verified only
        assert counters.errors == 0


def test_switched_off_it_drafts_nothing(prompts, baseline):
    """And steps without drafts are those of a server without the plugin: seeded samples are the same tokens."""
    with engine(MODEL, RETRIEVAL, additional_config={"specplug": {"enabled": False}}) as llm:
        assert greedy(llm, prompts[:2], 12, 8) == [o[:12] for o in baseline["outputs"][:2]]
        assert top_k_samples(llm, prompts) == baseline["top_k"]
        assert lifecycle_of(llm).counters.steps == 0
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") == 0


@pytest.mark.slow
def test_template_of_token_recycling(prompts, baseline):
    """The published tree, 80 nodes of it."""
    recycling = {"method": "custom_class", "model": "vllm_specplug.TokenRecycling", "num_speculative_tokens": 80}
    with engine(MODEL, recycling, additional_config={"specplug": {"token_recycling": {"template": True}}}) as llm:
        assert greedy(llm, prompts[:8], LENGTH, 8) == baseline["outputs"][:8]
        counters = lifecycle_of(llm).counters
        assert counters.errors == 0 and counters.accepted > 20
        assert counters.verified > 20 * (counters.emitted - counters.accepted)  # wide trees, not chains


def test_budget_by_the_clock(prompts, baseline):
    """As users run it: what is drafted depends on how long steps take, what is emitted does not."""
    with engine(MODEL, AUTO) as llm:
        times = lifecycle_of(llm).proposer.times
        assert times.ready  # from the steps timed at the start
        curve = times.curve(2, 200, 16)
        # But for two rows, which may cost extra: this engine's.
        assert (curve[2:] >= curve[1:-1]).all() and curve[16] > curve[1] > 0 and curve[0] > 0
        assert greedy(llm, prompts[:COUNT], LENGTH, 8) == baseline["outputs"]
        stats = runner_of(llm).drafter.stats()
        assert stats["errors"] == stats["resynchronised"] == 0
        # All steps awake that decode, but for the first after the engine was idle.
        assert 0.5 < stats["auto.step_time_steps"] / stats["steps"] <= 1
        assert 0 < stats["auto.step_time_predicted_seconds"] < 60 and stats["auto.overhead_ratio"] > 0
        assert stats["verified"] <= stats["drafted"] == stats["auto.kept_nodes"] <= stats["auto.offered_nodes"]
        assert lifecycle_of(llm).counts.total[1].sum() == stats["verified"]


def test_vllms_own_proposer_inside(prompts, baseline):
    adaptive = {"method": "custom_class", "model": "vllm_specplug.AdaptiveLength", "num_speculative_tokens": 8}
    options = {
        "adaptive_length": {"inner": "vllm:ngram", "policy": "fixed", "length": 4},
        "vllm_ngram": {"prompt_lookup_min": 2, "prompt_lookup_max": 4},
    }
    with engine(MODEL, adaptive, additional_config={"specplug": options}) as llm:
        assert greedy(llm, [long_prompt(prompts), *prompts[:8]], LENGTH, 8)[1:] == baseline["outputs"][:8]
        stats = runner_of(llm).drafter.stats()
        assert stats["errors"] == 0 and stats["accepted"] > 10
        assert stats["verified"] <= 4 * stats["steps"] * 8


@pytest.mark.slow
@pytest.mark.parametrize("config", [RETRIEVAL, AUTO], ids=["Retrieval", "Auto"])
@pytest.mark.parametrize("concurrency", [8, 1])
def test_greedy_output_is_identical_in_full(prompts, config, concurrency):
    """96 prompts of 8 kinds x 96 tokens."""
    with engine(MODEL) as llm:
        want = greedy(llm, prompts, 96, concurrency)
    with engine(MODEL, config) as llm:
        got = greedy(llm, prompts, 96, concurrency)
        counters = lifecycle_of(llm).counters
        assert (counters.errors, counters.resynchronised) == (0, 0)
        assert counters.accepted > 1000
    differing = [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    assert differing == []
