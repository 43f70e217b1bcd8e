"""SparseVerify in the real engine in float32: exact at its exact values, and what it keeps of the context is right
under prefix reuse, prompts in chunks, preemption, moved rows of trees and the exact refresh."""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import numpy as np
import pytest
import torch
import tree_proposers
from engines import MODEL, encode, engine, lifecycle_of, runner_of
from prompts import chat_prompts
from tree_proposers import generate
from vllm_specplug.kernels.kv_cache_cpu import CacheLayout

pytestmark = pytest.mark.engine

LENGTH = 40
NODES = 8
# Sparse from the first block on, with the trees of `tree_proposers` as drafts.
SPARSE = {"inner": "Trees", "policy": "fixed", "length": NODES, "dense_below": 128, "ratio": 0.2, "unit": 16}
SPARSE |= {"start_probe": False, "pause": False}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    tree_proposers.register()


@pytest.fixture(scope="module")
def long_prompts():
    """Six prompts of some 300 to 700 tokens, as token ids."""
    from transformers import AutoTokenizer

    class Holder:
        def get_tokenizer(self):
            return AutoTokenizer.from_pretrained(MODEL)

    parts = chat_prompts(96)
    messages = ["\n".join(parts[i * 14 : i * 14 + 10 + 2 * i]) + "\nAnswer all of it." for i in range(6)]
    return encode(Holder(), messages)


def speculative():
    return {"method": "custom_class", "model": "vllm_specplug.SparseVerify", "num_speculative_tokens": NODES}


@pytest.fixture(scope="module")
def outputs(long_prompts):
    with engine(MODEL, max_model_len=1536) as llm:
        return generate(llm, long_prompts, LENGTH)


@pytest.fixture(scope="module")
def sparse():
    """One engine: few KV blocks, prompts in chunks, the prefix cache on, a scheduler that can refresh."""
    options = {"specplug": {"sparse_verify": {**SPARSE, "refresh": 12}}}
    with engine(
        MODEL,
        speculative(),
        additional_config=options,
        max_model_len=1536,
        max_num_batched_tokens=300,
        max_num_seqs=6,
        num_gpu_blocks_override=16,
    ) as llm:
        yield llm


def attention_of(llm):
    return runner_of(llm).drafter.sparse.attention


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


@contextlib.contextmanager
def settings(llm, every=0, ratio=SPARSE["ratio"]):
    """The engine with another refresh and ratio; sums are checked after each step, of every sixth layer by turns."""
    import dataclasses

    attention, scheduler = attention_of(llm), scheduler_of(llm)
    kept = scheduler._every
    scheduler._every = every
    for group in attention.groups:
        group.sums.selection = dataclasses.replace(attention.selection, ratio=ratio)
    drafter = runner_of(llm).drafter
    own, checks, turns = drafter.draft, [0], itertools.cycle(range(6))

    def draft(*args):
        turn = next(turns)
        for group in attention.groups:
            group.sums.check(range(turn, 30, 6))
            checks[0] += len(group.sums)
        return own(*args)

    drafter.draft = draft
    try:
        yield checks
    finally:
        del drafter.draft
        scheduler._every = kept
        for group in attention.groups:
            group.sums.selection = attention.selection


def assert_sound(llm):
    counters = lifecycle_of(llm).counters
    assert (counters.errors, counters.requests_without_drafts) == (0, 0)
    assert runner_of(llm).drafter.trees.reason == ""


def test_whole_context_is_the_exact_model(sparse, long_prompts, outputs):
    """Every unit chosen: the sparse path attends all of it, for trees and for chains, together and alone."""
    with settings(sparse, ratio=1.0):
        before = attention_of(sparse).stats()["sparse_attention_steps"]
        assert generate(sparse, long_prompts, LENGTH, outputs) == outputs
        assert generate(sparse, long_prompts[:2], LENGTH, outputs, concurrency=1) == outputs[:2]
        assert generate(sparse, long_prompts[:3], LENGTH) == outputs[:3]  # nothing right in the trees
        assert attention_of(sparse).stats()["sparse_attention_steps"] > before
    assert_sound(sparse)


def test_sums_are_right_under_preemption_chunks_prefix_reuse_and_moves(sparse, long_prompts, outputs):
    from vllm import SamplingParams

    with settings(sparse) as checks:
        trees = runner_of(sparse).drafter.trees.counters
        moved = trees.rows_moved
        found = generate(sparse, long_prompts, LENGTH, outputs)
        generate(sparse, long_prompts[::-1], LENGTH, outputs[::-1])
        assert trees.rows_moved > moved
    scheduler = scheduler_of(sparse)
    with (
        settings(sparse, every=12) as more,
        mock.patch.object(scheduler, "_preempt_request", wraps=scheduler._preempt_request) as preempt,
    ):
        generate(sparse, long_prompts[1:4], 230)
        checks[0] += more[0]
        assert preempt.call_count > 0
        again = SamplingParams(temperature=0.0, max_tokens=20, extra_args={"seed": 1, "truth": []})
        repeated = [sparse.generate(long_prompts[5], again, use_tqdm=False)[0] for _ in range(2)]
        assert repeated[1].num_cached_tokens > 0
        assert checks[0] > 100
    stats = attention_of(sparse).stats()
    assert 0.2 < stats["sparse_attention_share"] < 1.0 and stats["sparse_attention_rows"] > 0
    # Approximate, so some text differs; but it is text of the same model, so it begins alike.
    assert found != outputs
    assert np.mean([a[:8] == b[:8] for a, b in zip(found, outputs, strict=True)]) >= 0.5
    assert_sound(sparse)


def test_requests_that_ended_leave_nothing(sparse, long_prompts):
    generate(sparse, long_prompts[:2], 8)
    generate(sparse, [{"prompt_token_ids": [1, 2, 3]}], 2)  # vLLM reports ends with the next step
    runner_of(sparse).drafter.sparse.attention.drop(())
    assert attention_of(sparse).stats()["sparse_summary_bytes"] == 0


def keys_and_values(llm, blocks, tokens):
    """K/V of a request's first ``tokens`` slots: ``[layers, 2, kv_heads, tokens, head_size]``."""
    runner = runner_of(llm)
    layout: CacheLayout = runner.drafter.trees.backend._groups[0][0].layout
    found = []
    for layer in runner.compilation_config.static_forward_context.values():
        cache = layer.kv_cache
        parts = cache.view(*cache.shape[:2], 2 * cache.shape[2], -1).chunk(2, dim=2)
        both = []
        for part, offsets in zip(parts, (layout.keys, layout.values), strict=True):
            flat = part[blocks].flatten(2)[:, :, torch.from_numpy(offsets.astype(np.int64))]
            both.append(flat.transpose(1, 2).flatten(0, 1)[:tokens].transpose(0, 1).clone())
        found.append(torch.stack(both))
    return torch.stack(found)


def run_and_keep(llm, prompt, truth, length):
    """Output of one request, and K/V of its prompt and all of its output but the last token."""
    from vllm import SamplingParams

    engine_ = llm.llm_engine
    run_and_keep.count = getattr(run_and_keep, "count", 0) + 1
    extra = {"seed": 1, "truth": truth}
    params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, extra_args=extra)
    engine_.add_request(f"keep-{run_and_keep.count}", prompt, params)
    runner, tokens, blocks = runner_of(llm), [], None
    while engine_.has_unfinished_requests():
        for output in engine_.step():
            tokens = list(output.outputs[0].token_ids)
        state = next(iter(runner.requests.values()), None)
        if state is not None:
            blocks = list(state.block_ids[0])
    known = len(prompt["prompt_token_ids"]) + length - 1
    return tokens, keys_and_values(llm, blocks, known)


def test_refresh_makes_the_cache_exact_again(sparse, long_prompts, outputs):
    prompt, length = long_prompts[5], 30
    size = len(prompt["prompt_token_ids"])
    changed = {}
    for every in (0, 4):
        with settings(sparse, every=every, ratio=0.0):
            before = scheduler_of(sparse).refreshes
            tokens, kept = run_and_keep(sparse, prompt, [], length)
            assert (scheduler_of(sparse).refreshes > before) == (every > 0)
        # The exact model over the same tokens: a prompt is always exact.
        whole = {"prompt_token_ids": prompt["prompt_token_ids"] + tokens[:-1], "cache_salt": f"exact-{every}"}
        _, exact = run_and_keep(sparse, whole, [], 1)
        error = (kept - exact).abs().amax((0, 1, 2, 4))
        assert error[:size].max() < 1e-3
        changed[every] = error[size:]
    # Without a refresh, every token after the first is off; with one, all but those since the last.
    assert changed[0][2:].min() > 1e-2
    assert changed[4][:-8].max() < 2e-3
    assert_sound(sparse)


def test_a_request_can_be_exact_beside_sparse_ones(sparse, long_prompts, outputs):
    """``off`` has no drafts, and nothing of it is approximate; its prompt's blocks are its own by a salt."""
    from vllm import SamplingParams

    prompts = [dict(p, cache_salt=f"beside-{i}") for i, p in enumerate(long_prompts[:4])]
    params = [
        SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True, extra_args=extra)
        for extra in ({"specplug": "off"}, {"seed": 1, "truth": outputs[1]}) * 2
    ]
    with settings(sparse):
        found = [list(o.outputs[0].token_ids) for o in sparse.generate(prompts, params, use_tqdm=False)]
    assert [found[0], found[2]] == [outputs[0], outputs[2]]
    assert_sound(sparse)


def test_calibration_of_a_running_engine(sparse, long_prompts):
    from vllm_specplug.host import cpu_sparse, sparse_calibration
    from vllm_specplug.host.calibrate import observe
    from vllm_specplug.host.sparse_attention import SparseAttention

    drafter = runner_of(sparse).drafter
    with settings(sparse, ratio=1.0):
        found = observe(sparse, [p["prompt_token_ids"] for p in long_prompts[:2]])
    part = found["attention"]
    errors = np.array(part["errors"])
    assert errors.shape == (len(part["fractions"]), 30, 3)
    assert (errors >= 0).all() and (errors[-1] < 1e-6).all()
    assert errors.sum((1, 2))[0] > 10 * errors.sum((1, 2))[-2]
    assert part["anchors"][0] == part["layers"][0] and len(part["rows_alike"]) >= 1
    assert 0.0 < part["rows_alike"][0] <= 1.0 and part["steps"] >= 4
    assert len(found["ffn"]["quantiles"]) == 30 and "no mixture" in found["left_out"]["moe"]
    # And it is what SparseVerify reads.
    attention = SparseAttention(drafter.sparse.options, part)
    impls = {name: _Impl() for name in part["layers"]}
    caches = attention_of(sparse).groups[0].sums._caches
    group = cpu_sparse.add_group(attention, impls, caches)
    for context in (700, 4096, 8000):
        shares = group.shares(context)
        assert shares.shape == (30, 3) and 0.5 < shares.mean() <= 1.0 + 1e-6
        assert shares.min() < 1.0 < shares.max()
    assert attention.reason == ""
    assert cpu_sparse.add_group(attention, {"other": _Impl()}, caches) is None
    assert "does not know layer other" in attention.reason
    assert sparse_calibration.FORMAT == 1


class _Impl:
    sliding_window = -1
    layer = (0, True)
