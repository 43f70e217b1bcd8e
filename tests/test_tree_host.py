"""Where drafts are chains, and why: read off the engine's configuration, its runner and its attention layers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_specplug.host import compat, trees


def config(**changes):
    """What :class:`TreeHost` reads of a configuration under which trees can be verified."""
    values = {
        "num_speculative_tokens": 8,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "tensor_parallel_size": 1,
        "distributed_executor_backend": None,
        "kv_transfer_config": None,
        "uses_mrope": False,
        "uses_xdrope_dim": 0,
        "is_encoder_decoder": False,
        "is_hybrid": False,
        "is_mm_prefix_lm": False,
        "rswa_window": None,
    }
    flat = SimpleNamespace(**(values | changes))
    return SimpleNamespace(
        speculative_config=flat, parallel_config=flat, model_config=flat, kv_transfer_config=flat.kv_transfer_config
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_speculative_tokens": 1}, "one draft token"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"uses_mrope": True}, "rotary"),
        ({"uses_xdrope_dim": 4}, "rotary"),
        ({"is_encoder_decoder": True}, "encoder"),
        ({"is_hybrid": True}, "state-space"),
        ({"is_mm_prefix_lm": True}, "both ways"),
        ({"rswa_window": 64}, "window"),
    ],
)
def test_configurations_without_trees(changes, words):
    assert trees.config_reason(config()) == ""
    assert words in trees.config_reason(config(**changes))
    host = trees.TreeHost(config(**changes), drafts=True, wanted=True)
    assert words in host.reason and not host.available
    host.on_model_loaded()
    host.on_kv_cache(None)  # nothing to prepare
    assert host.row_parents() is None


def test_switched_off_means_no_trees_and_no_other_attention(monkeypatch):
    host = trees.TreeHost(config(), drafts=False, wanted=False)
    assert not host.available and host.backend is None


def test_other_platforms_and_lacking_symbols(monkeypatch):
    from vllm import platforms

    monkeypatch.setattr(compat, "missing_for_trees", lambda: ["vllm.gone"])
    assert "vllm.gone" in trees.TreeHost(config(), drafts=True, wanted=True).reason
    no = lambda: False  # noqa: E731
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cpu=no, is_cuda=no, device_name="a GPU"))
    assert "a GPU" in trees.TreeHost(config(), drafts=True, wanted=True).reason


def test_runners_without_trees():
    runner = SimpleNamespace(use_async_scheduling=False, shared_kv_cache_layers={})
    assert trees._runner_reason(runner) == ""
    runner.shared_kv_cache_layers = {"a": "b"}
    assert "share" in trees._runner_reason(runner)
    runner.use_async_scheduling = True
    assert "asynchronous" in trees._runner_reason(runner)


def group(**changes):
    """A group of one layer that can attend trees, but for ``changes``."""
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_specplug.host import cpu_attention

    impl = object.__new__(changes.pop("impl", cpu_attention.TreeAttentionImpl))
    builder = object.__new__(changes.pop("builder", cpu_attention.TreeMetadataBuilder))
    spec = object.__new__(changes.pop("spec", FullAttentionSpec))
    split = changes.pop("kernel_block_size", None)
    values = {
        "attn_type": AttentionType.DECODER,
        "alibi_slopes": None,
        "logits_soft_cap": 0,
        "sinks": None,
        "is_fp8_kv_cache": False,
        "kv_sharing_target_layer_name": None,
    }
    for name, value in (values | changes).items():
        setattr(impl, name, value)
    made = SimpleNamespace(
        layer_names=["layer"],
        metadata_builders=[builder],
        kv_cache_spec=spec,
        kernel_block_size=split,
        backend=cpu_attention.TreeAttentionBackend,
    )
    return made, {"layer": SimpleNamespace(impl=impl)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "soft cap"),
        ({"sinks": [1.0]}, "sinks"),
        ({"is_fp8_kv_cache": True}, "fp8"),
        ({"attn_type": "encoder_only"}, "no decoder"),
        ({"kv_sharing_target_layer_name": "other"}, "another layer's"),
        ({"kernel_block_size": 32}, "split"),
    ],
)
def test_layers_without_trees(changes, words):
    from vllm_specplug.host import cpu_attention

    assert cpu_attention._group_reason(*group()) == ""
    assert words in cpu_attention._group_reason(*group(**changes))


def test_attention_of_other_kinds():
    """Subclasses of vLLM's classes, and of ours, may do anything."""
    from vllm.v1.attention.backends import cpu_attn
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec

    from vllm_specplug.host import cpu_attention

    assert cpu_attention._group_reason(*group(spec=SlidingWindowSpec)) == ""
    for changes in (
        {"impl": cpu_attn.CPUAttentionBackendImpl},
        {"impl": type("Other", (cpu_attention.TreeAttentionImpl,), {})},
        {"builder": cpu_attn.CPUAttentionMetadataBuilder},
        {"builder": type("Other", (cpu_attention.TreeMetadataBuilder,), {})},
        {"spec": ChunkedLocalAttentionSpec},
    ):
        assert "of another kind" in cpu_attention._group_reason(*group(**changes))
