"""A real engine that records: what it emitted, what it drafted and how, replayed without it."""

from __future__ import annotations

import numpy as np
import pytest
from engines import AUTO, MODEL, RETRIEVAL, engine, lifecycle_of, runner_of

from vllm_specplug.trace import files, replay, step_times

pytestmark = pytest.mark.engine

LENGTH = 48


def record(folder, speculative_config, prompts, options, concurrency=1, **params):
    """Outputs of a new engine that records to ``folder``, with its counters."""
    from vllm import SamplingParams

    trace = {"dir": str(folder), "topk": 8}
    with engine(MODEL, speculative_config, additional_config={"specplug": {"trace": trace, **options}}) as llm:
        sampling = SamplingParams(temperature=0.0, max_tokens=LENGTH, **params)
        batches = [prompts] if concurrency > 1 else [[p] for p in prompts]
        outputs = [list(o.outputs[0].token_ids) for b in batches for o in llm.generate(b, sampling, use_tqdm=False)]
        # The next step tells the runner which requests have ended.
        llm.generate(prompts[0], SamplingParams(max_tokens=1), use_tqdm=False)
        runner_of(llm).drafter.close()
        counters = lifecycle_of(llm).counters
    return outputs, counters


def test_what_retrieval_drafted_is_what_replaying_drafts(tmp_path, prompts):
    """In float32, from a cold start, one request at a time: the same drafts in every step."""
    chosen = prompts[:10]
    outputs, counters = record(tmp_path / "t", RETRIEVAL, chosen, {}, ignore_eos=True)
    trace = files.read([tmp_path / "t"])
    recorded = trace.requests[: len(chosen)]
    assert [r.output.tolist() for r in recorded] == outputs
    assert [r.prompt.tolist() for r in recorded] == [p["prompt_token_ids"] for p in chosen]
    assert trace.cut == [] and all(r.server["proposer"] == "Retrieval" for r in recorded)

    proposer, _ = replay.build("Retrieval", {})
    tallies = replay.Replay(proposer, 8).run(recorded)
    for request, tally in zip(recorded, tallies, strict=True):
        live = request.steps
        assert int(live.emitted.sum()) == len(request.output) == LENGTH
        assert tally.steps == len(live.emitted) - 1
        assert (tally.drafts, tally.accepted) == (int(live.drafted.sum()), int(live.accepted.sum()))
    assert replay.total(tallies).metrics()["mat"][0] > 1.2  # it did draft
    # The recorder's counts are the host's.
    assert sum(int(r.steps.drafted.sum()) for r in recorded) == counters.verified

    # Every step but a request's first was timed, and what they computed is known.
    loads, seconds, _ = step_times.measured_steps(recorded)
    assert len(seconds) == sum(len(r.steps.emitted) - 1 for r in recorded)
    assert all(load.requests == 1 and load.rows <= 9 for load in loads)
    assert 0.0 < seconds.min() <= seconds.max() < 60.0
    first = recorded[0].steps.loads[0]
    assert first.tolist()[:4] == [0, 0, 0, 0] and first[4] == len(recorded[0].prompt)


def test_trees_and_topk_of_requests_side_by_side(tmp_path, prompts):
    """What the target said at each output token is recorded for it, from whichever row of the tree it came."""
    fixed = {"auto": {"policy": "fixed", "length": 8, "min_prob": 0.03}}
    outputs, counters = record(tmp_path / "t", AUTO, prompts[:8], fixed, concurrency=8)
    recorded = files.read([tmp_path / "t"]).requests[:8]
    by_output = sorted(r.output.tolist() for r in recorded)
    assert by_output == sorted(outputs)  # without what followed the end of a text in its last step
    for request in recorded:
        assert request.topk_ids.shape == (len(request.output), 8) and request.trees
        np.testing.assert_array_equal(request.topk_ids[:, 0], request.output)  # greedy
        assert (np.diff(request.topk_logprobs, axis=1) <= 0).all()
        assert int(request.steps.emitted.sum()) == len(request.output)
    assert counters.accepted > 20
    assert max(load.requests for load in step_times.measured_steps(recorded).loads) > 4
