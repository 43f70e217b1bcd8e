"""Draft trees that stay on the device, in vLLM's real Model Runner V2: engines in Triton's interpreter."""

from __future__ import annotations

import os
from concurrent import futures

import interpreted
import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm_specplug.host import compat

if compat.missing_for_device_drafts() or compat.missing_for_device_trees():
    pytest.skip("this vLLM has no Model Runner V2 of this kind", allow_module_level=True)

from types import SimpleNamespace

from test_tree_host import config
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_specplug.host import device_trees


@pytest.fixture(scope="module")
def found():
    """What the driver's engines did, by backend, in several processes at once."""
    parts = (("greedy", "graphs"), None), (("parameters",), None), (("graphs",), 3)
    with futures.ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda part: interpreted.run("device_trees_driver", *part[0], flash=part[1]), parts))
    return {"TritonAttention": runs[0] | runs[1], "FlashAttention": runs[2]}


def assert_same(run, backend="TritonAttention"):
    """Every request has the tokens, the end and the logprobs that it has without speculation."""
    assert run["impl"] == f"Tree{backend}Impl"
    assert len(run["found"]) == len(run["wanted"]) > 0
    for (tokens, reason, logprobs), (wanted, ended, known) in zip(run["found"], run["wanted"], strict=True):
        assert tokens == wanted and reason == ended
        assert [[t for t, _ in at] for at in logprobs] == [[t for t, _ in at] for at in known]
        for at, other in zip(logprobs, known, strict=True):
            np.testing.assert_allclose([v for _, v in at], [v for _, v in other], atol=1e-4)
    assert run["reason"] == ""


def assert_drafted(run):
    """Steps emitted more than one token, and not by chains alone: rows were moved."""
    assert run["drafts"] > 10 and run["accepted"] > run["drafts"] / 8 and run["moved"] > 3


@pytest.mark.engine
def test_greedy_output_is_identical(found):
    """Requests that come and go, prompts in chunks beside trees, prefixes from the cache."""
    run = found["TritonAttention"]["greedy"]
    assert_same(run)
    assert_drafted(run)
    assert run["prefix_hits"] > 0


@pytest.mark.engine
def test_sampling_parameters(found):
    """Seeds, filters, penalties, biases, bad words, stops, logprobs and samples, beside each other in a batch."""
    run = found["TritonAttention"]["parameters"]
    assert_same(run)
    assert_drafted(run)
    assert sum(bool(logprobs) for _, _, logprobs in run["found"]) == 2
    assert {reason for _, reason, _ in run["found"]} == {"length", "stop"}


@pytest.mark.engine
@pytest.mark.parametrize("backend", ["TritonAttention", "FlashAttention"])
def test_whole_steps_in_graphs(found, backend):
    """Replayed with what the host knew when they were recorded, whatever the batch and its trees are."""
    run = found[backend]["graphs"]
    assert_same(run, backend)
    assert_drafted(run)
    assert run["support"] == ["UNIFORM_BATCH"]
    # Of one request and of four, with all nodes; three run in the latter.
    assert run["sizes"] == [[1, 8], [4, 8]] and run["replayed"] > run["drafts"] / 3


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["preempted", "budget", "windowed", "synchronous", "structured"])
def test_other_engines(scenario):
    run = interpreted.run("device_trees_driver", scenario)[scenario]
    assert_same(run)
    assert scenario != "preempted" or run["preemptions"] > 0
    # Sizes are what pays, but one request wants no drafts.
    assert scenario != "budget" or (all(run["drafted"][:3]) and run["drafted"][3] == 0)
    if scenario not in ("structured", "budget"):  # a random model's grammatical text repeats nothing
        assert_drafted(run)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "flash"), [("greedy", 3), ("parameters", 3), ("preempted", 3), ("windowed", 3), ("greedy", 2)]
)
def test_other_engines_of_flash_attention(scenario, flash):
    run = interpreted.run("device_trees_driver", scenario, flash=flash)[scenario]
    assert_same(run, "FlashAttention")
    assert_drafted(run)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="tensor parallel 2 needs two cores")
def test_tensor_parallel_ranks_verify_the_first_ones_trees():
    run = interpreted.run("device_trees_driver", "ranks")["ranks"]
    assert_same(run)
    assert_drafted(run)
    second = run["second"]
    assert (second["rank"], second["reason"], second["heads"]) == (1, "", 2)
    assert second["learned"] == 0 < run["learned"], "one rank drafts"
    assert second["shapes"] == run["shapes"] and second["moved"] == run["moved"]
    assert any(parents != list(range(len(parents))) for parents in run["shapes"]), "drafts branched"


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("parallel_config", {"data_parallel_size": 2}, "data parallelism"),
        ("parallel_config", {"enable_dbo": True}, "split in two"),
        ("parallel_config", {"enable_batch_sharded_sampling": True}, "batch-sharded"),
        ("model_config", {"return_sampling_mask": True}, "sampling masks"),
        ("model_config", {"enable_trace_replay": True}, "replayed traces"),
        ("model_config", {"uses_mrope": True}, "rotary"),
        (None, {"watermark_config": object()}, "watermarks"),
        (None, {}, ""),
    ],
)
def test_configurations_that_cannot(part, changes, reason):
    engine = config()
    engine.parallel_config.data_parallel_size = 1
    for name, value in changes.items():
        setattr(engine if part is None else getattr(engine, part), name, value)
    found = device_trees.config_reason(engine)
    assert (reason in found) if reason else found == ""


def test_which_requests_may_branch():
    sampler = SimpleNamespace(
        penalties_state=SimpleNamespace(use_penalty=[False, True]), logits_processors=[None, None, None]
    )
    plain = SimpleNamespace(bad_words_token_ids=None, structured_outputs=None, thinking_token_budget=None)
    assert device_trees.may_branch(sampler, 0, plain)
    assert not device_trees.may_branch(sampler, 1, plain), "penalties count the rows before"
    for name in ("bad_words_token_ids", "structured_outputs", "thinking_token_budget"):
        assert not device_trees.may_branch(sampler, 0, SimpleNamespace(**vars(plain) | {name: [1]}))
    sampler.logits_processors.append(object())
    assert not device_trees.may_branch(sampler, 0, plain), "another's processor may look at the rows before"


def test_rows_in_the_order_of_their_tokens():
    """Two requests of 3 and 4 rows, one without; behind a path any row of the request."""
    paths = torch.tensor([[0, 2, -1], [-1, -1, -1], [0, 1, 3]], dtype=torch.int32)
    order = device_trees._by_path(paths, torch.tensor([0, 3, 3, 7], dtype=torch.int32), 7).tolist()
    assert order[:2] == [0, 2] and order[3:6] == [3, 4, 6]
    assert 0 <= order[2] < 3 and 3 <= order[6] < 7


class Stock:
    """In vLLM's builder's place."""

    def build(self, common_prefix_len, common, fast_build=False):
        return SimpleNamespace(prefix=common_prefix_len, common=common)

    def build_for_cudagraph_capture(self, common):
        built = self.build(0, common)
        common.seq_lens.fill_(1)
        return built

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
        return vllm_config


class Builder(device_trees.DeviceTreeBuilderMixin, Stock):
    pass


def step(sizes, lengths):
    """What vLLM tells a builder of requests with so many rows, one more of which pads the batch."""
    starts = torch.tensor(np.cumsum([0, *sizes, 0]), dtype=torch.int32)
    return SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([*lengths, 0], dtype=torch.int32),
        num_actual_tokens=int(starts[-1]) + 2,
        max_query_len=max(sizes),
        block_table_tensor=torch.zeros(len(sizes) + 1, 4, dtype=torch.int32),
    )


@pytest.fixture
def builder():
    made = Builder()
    made.holder = device_trees.StepRows(4, 64, torch.device("cpu"))
    return made


def test_steps_without_drafts_are_vllms(builder):
    common = step([4, 4], [9, 8])
    built = builder.build(3, common)
    assert built.common is common and built.prefix == 3 and not hasattr(built, "specplug_step")
    builder.holder.active = True
    for sizes in ([1, 1], [5, 9]):
        built = builder.build(3, step(sizes, [20, 30]))
        assert built.prefix == 3 and not hasattr(built, "specplug_step")


def test_steps_with_drafts_read_what_lies_at_fixed_addresses(builder):
    builder.holder.active = True
    common = step([4, 3], [9, 8])
    found = builder.build(3, common).specplug_step
    assert found.only_own and found.starts is common.query_start_loc and found.lengths is common.seq_lens
    assert found.bits.data_ptr() == builder.holder.bits.data_ptr() and len(found.bits) == len(found.depths) == 9
    # Beside a prompt, vLLM's kernel is told that requests with drafts hold nothing but their rows.
    common = step([4, 9], [9, 30])
    built = builder.build(3, common)
    assert not built.specplug_step.only_own and built.prefix == 0
    assert built.common.seq_lens.tolist() == [4, 30, 0] and common.seq_lens.tolist() == [9, 30, 0]


def test_graphs_are_recorded_with_rows_in_their_slots(builder):
    common = step([4, 4], [4, 4])
    built = builder.build_for_cudagraph_capture(common)
    assert built.specplug_step.only_own and common.seq_lens.tolist() == [4, 4, 4] and not builder.holder.active
    common = step([1, 1], [1, 1])
    assert not hasattr(builder.build_for_cudagraph_capture(common), "specplug_step")
    assert common.seq_lens.tolist() == [1, 1, 1]
    for stock in AttentionCGSupport:
        found = Builder.get_cudagraph_support(stock, None)
        assert found.value == min(stock.value, AttentionCGSupport.UNIFORM_BATCH.value)


def test_before_rows_are_described_every_row_sees_something(builder):
    assert (builder.holder.bits == -1).all() and (builder.holder.depths == 0).all()
