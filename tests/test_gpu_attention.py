"""Draft trees in vLLM's GPU backends: what the adapter tells the kernels and vLLM, on tensors of the CPU."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm_specplug.kernels.attention_triton import AttentionPlan
from vllm_specplug.kernels.tree_attention import build_trees, tree_attention_reference

from vllm_specplug.host import compat, gpu_attention, tree_plan, trees
from vllm_specplug.host.gpu_attention import GpuTrees, StepHolder, TreeBuilderMixin

MOST, HEADS, KV_HEADS, SIZE, BLOCK = 6, 4, 2, 32, 16
NAMES = sorted(gpu_attention.STOCK)


def int32(*numbers):
    return np.array(numbers, np.int32)


@pytest.fixture
def step():
    """Requests of a step: a tree of 5 rows, a prompt of 9, a chain of 3, a tree of 4, and one that pads the batch."""
    sizes = int32(5, 9, 3, 4)
    ends = np.cumsum(sizes, dtype=np.int32)
    parents = [[-1, 0, 0, 1, 2], [-1], [-1, 0, 1], [-1, 0, 1, 1]]
    verified = int32(5, 1, 3, 4)
    computed = int32(33, 0, 20, 47)
    plan = tree_plan.make_plan(np.concatenate([int32(*p) for p in parents]), verified, ends, computed)
    assert plan.trees.requests.tolist() == [0, 3]
    starts = torch.tensor([0, *ends.tolist(), int(ends[-1])], dtype=torch.int32)
    common = SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([*(computed + sizes).tolist(), 0], dtype=torch.int32),
        num_actual_tokens=24,  # padded
        block_table_tensor=torch.arange(5 * 5, dtype=torch.int32).reshape(5, 5),
    )
    return SimpleNamespace(plan=plan, common=common, sizes=sizes, computed=computed, parents=parents)


class Stock:
    """In vLLM's builder's place."""

    def build(self, common_prefix_len, common, fast_build=False):
        return SimpleNamespace(prefix=common_prefix_len, common=common)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
        return vllm_config


class Builder(TreeBuilderMixin, Stock):
    pass


def test_without_a_plan_everything_is_vllms(step):
    builder = Builder()
    assert builder.build(3, step.common).common is step.common
    builder.holder = StepHolder(MOST)
    built = builder.build(3, step.common)
    assert built.common is step.common and built.prefix == 3 and not hasattr(built, "specplug_step")


def test_a_step_with_trees(step):
    builder = Builder()
    builder.holder = StepHolder(MOST)
    builder.holder.plan = step.plan
    built = builder.build(3, step.common)
    found = built.specplug_step
    assert built.prefix == 0 and not found.only_own
    assert step.common.seq_lens.tolist() == [38, 9, 23, 51, 0], "vLLM's own tensor is left as it is"
    assert built.common.seq_lens.tolist() == [5, 9, 3, 4, 0]
    assert found.lengths.tolist() == [38, 9, 23, 51, 0]
    assert found.bits[:, 0].tolist() == (
        [0b00001, 0b00011, 0b00101, 0b01011, 0b10101] + [0] * 9 + [0b001, 0b011, 0b111] + [1, 3, 7, 11] + [0] * 3
    )
    assert found.depths.tolist() == [0, 1, 1, 2, 2, *[0] * 9, 0, 1, 2, 0, 1, 2, 2, 0, 0, 0]


def test_a_plan_of_another_step_is_an_error(step):
    builder = Builder()
    builder.holder = StepHolder(MOST)
    builder.holder.plan = step.plan
    step.common.query_start_loc_cpu = step.common.query_start_loc_cpu[:3]
    with pytest.raises(RuntimeError, match="planned draft trees for 21 rows and vLLM runs 14"):
        builder.build(0, step.common)


@pytest.mark.parametrize("stock", list(AttentionCGSupport))
def test_graphs_of_whole_steps_are_for_single_tokens(stock):
    found = Builder.get_cudagraph_support(stock, None)
    assert found.value == min(stock.value, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value)


def packed_cache(blocks):
    return torch.randn(blocks, KV_HEADS, BLOCK, 2 * SIZE)


@pytest.mark.parametrize(
    "cache",
    [
        packed_cache(7),
        torch.randn(7, BLOCK, KV_HEADS, 2 * SIZE).transpose(1, 2),
        torch.randn(7, 2, BLOCK, KV_HEADS, SIZE),
        torch.randn(2, 7, BLOCK, KV_HEADS, SIZE),
    ],
    ids=["packed", "packed-by-slot", "blocks-first", "parts-first"],
)
def test_caches_are_split_as_they_lie(cache):
    keys, values = gpu_attention.split_cache(cache, SIZE)
    assert keys.shape == values.shape == (7, BLOCK, KV_HEADS, SIZE)
    assert keys.data_ptr() == cache.data_ptr() and values.untyped_storage().data_ptr() == cache.data_ptr()
    if cache.dim() == 4:
        assert torch.equal(keys[3, 5, 1], cache[3, 1, 5, :SIZE]) and torch.equal(values[3, 5, 1], cache[3, 1, 5, SIZE:])
    else:
        parts = cache if len(cache) == 2 else cache.transpose(0, 1)
        assert torch.equal(keys, parts[0]) and torch.equal(values, parts[1])


@pytest.mark.parametrize("shape", [(7, KV_HEADS, BLOCK, SIZE), (2, 2, BLOCK, KV_HEADS, SIZE), (7, BLOCK, SIZE)])
def test_unknown_caches_are_refused(shape):
    with pytest.raises(ValueError, match="is not known"):
        gpu_attention.split_cache(torch.zeros(shape), SIZE)


def impl_of(name, window=-1, **changes):
    """vLLM's implementation with trees, of a layer that needs nothing particular."""
    impl = object.__new__(getattr(gpu_attention, name).get_impl_cls())
    values = {
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_size": SIZE,
        "scale": SIZE**-0.5,
        "sliding_window": (window - 1, 0) if window > 0 else (-1, -1),
        "alibi_slopes": None,
        "logits_soft_cap": 0,
        "sinks": None,
        "kv_sharing_target_layer_name": None,
        "attn_type": AttentionType.DECODER,
        "chunk_lookback": -1,
    }
    for attribute, value in (values | changes).items():
        setattr(impl, attribute, value)
    return impl


def runner_of(*layers, builder=None, groups=1):
    """A runner with these layers in one group."""
    named = {f"layer{i}": layer for i, layer in enumerate(layers)}
    group = SimpleNamespace(
        layer_names=list(named),
        metadata_builders=[Builder() if builder is None else builder],
        backend=gpu_attention.TRITON_ATTN,
    )
    return SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=named),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[None] * groups),
        _attn_group_iterator=lambda: iter([group]),
        max_num_reqs=8,
        max_num_tokens=64,
        device=torch.device("cpu"),
        positions=torch.full((64,), -5),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [-1, 11])
def test_a_step_through_the_adapter(step, name, window, monkeypatch):
    """Positions, attention in vLLM's implementation, and moves, all by the classes that a server would use."""
    torch.manual_seed(0)
    layers = [SimpleNamespace(impl=impl_of(name, window), kv_cache=packed_cache(25)) for _ in range(2)]
    runner = runner_of(*layers)
    backend = GpuTrees(MOST)
    assert backend.attach(runner) == ""
    empty = [layer.kv_cache.clone() for layer in layers]
    backend.warm_up()
    assert all(torch.equal(layer.kv_cache, was) for layer, was in zip(layers, empty, strict=True))
    (builder,) = next(runner._attn_group_iterator()).metadata_builders
    backend.begin(runner, step.plan)
    assert runner.positions[:5].tolist() == [33, 34, 34, 35, 35]
    assert runner.positions[17:21].tolist() == [47, 48, 49, 49]
    assert set(runner.positions[5:17].tolist()) | set(runner.positions[21:].tolist()) == {-5}

    metadata = builder.build(0, step.common)
    query, out = torch.randn(24, HEADS, SIZE), torch.zeros(24, HEADS, SIZE)
    stock = gpu_attention.STOCK[name][1] + "Impl"
    seen = []

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales):
        seen.append(attn_metadata)
        output.fill_(7.0)
        return output

    base = next(c for c in type(layers[0].impl).__mro__ if c.__name__ == stock)
    monkeypatch.setattr(base, "forward", forward)
    layer = layers[1]
    assert layer.impl.forward(layer, query, None, None, layer.kv_cache, metadata, out) is out
    assert seen == [metadata]
    small = [0, 2, 3]
    described = build_trees(
        int32(0, 14, 17), int32(5, 3, 4), step.computed[small], int32(0, 2, 3),
        np.concatenate([int32(*step.parents[i]) for i in small]),
    )  # fmt: skip
    wanted = torch.full_like(out, 7.0)
    caches = gpu_attention.split_cache(layer.kv_cache, SIZE)
    tree_attention_reference(query, *caches, step.common.block_table_tensor, described, wanted, SIZE**-0.5, window)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)

    backend.end()
    assert not hasattr(builder.build(0, step.common), "specplug_step")
    # Request 0 accepted its rows 2 and 4; request 3 its rows 1 and 3.
    paths = np.full((4, 3), -1, np.int32)
    paths[0], paths[1, 0], paths[2, 0], paths[3] = (0, 2, 4), 0, 0, (0, 1, 3)
    sources, targets, _ = tree_plan.accepted_moves(step.plan, paths, int32(3, 1, 1, 3))
    before = [layer.kv_cache.clone() for layer in layers]
    backend.move(sources, targets)
    for layer, was in zip(layers, before, strict=True):
        expected = was.clone()
        for request, source, target in ((0, 35, 34), (0, 37, 35), (3, 50, 49)):
            blocks = step.common.block_table_tensor[request].tolist()
            expected[blocks[target // BLOCK], :, target % BLOCK] = was[blocks[source // BLOCK], :, source % BLOCK]
        assert torch.equal(layer.kv_cache, expected)


def test_kernels_are_compiled_before_the_first_request(monkeypatch):
    """One launch for each size of step and kind of layer: with a window the kernel is another one."""
    windows = (-1, 11, 11)
    layers = [SimpleNamespace(impl=impl_of("TRITON_ATTN", w), kv_cache=packed_cache(3)) for w in windows]
    backend, seen = GpuTrees(MOST), []
    assert backend.attach(runner_of(*layers)) == ""
    monkeypatch.setattr(gpu_attention, "tree_attention", lambda plan, *args: seen.append((plan.splits, args[-2])))
    backend.warm_up()
    assert sorted(seen) == [(1, -1), (1, 11), (16, -1), (16, 11)]


def test_without_prompts_vllms_kernel_does_not_run(step, monkeypatch):
    layer = SimpleNamespace(impl=impl_of("TRITON_ATTN"), kv_cache=packed_cache(25))
    runner = runner_of(layer)
    backend = GpuTrees(16)
    assert backend.attach(runner) == ""
    backend.begin(runner, step.plan)
    (builder,) = next(runner._attn_group_iterator()).metadata_builders
    metadata = builder.build(0, step.common)
    assert metadata.specplug_step.only_own
    query, out = torch.randn(24, HEADS, SIZE), torch.full((24, HEADS, SIZE), torch.nan)
    layer.impl.forward(layer, query, None, None, layer.kv_cache, metadata, out)
    assert not out[:21].isnan().any() and out[21:].isnan().all()


def test_a_steps_arguments_are_checked_once_for_layers_of_a_kind(step, monkeypatch):
    layers = [SimpleNamespace(impl=impl_of("TRITON_ATTN", w), kv_cache=packed_cache(25)) for w in (-1, -1, 11, 11, -1)]
    runner = runner_of(*layers)
    backend, checked = GpuTrees(16), []
    assert backend.attach(runner) == ""
    check = AttentionPlan.check
    monkeypatch.setattr(AttentionPlan, "check", lambda plan, *given: checked.append(len(given)) or check(plan, *given))
    backend.begin(runner, step.plan)
    (builder,) = next(runner._attn_group_iterator()).metadata_builders
    query, out = torch.randn(24, HEADS, SIZE), torch.zeros(24, HEADS, SIZE)
    for _ in range(2):
        metadata = builder.build(0, step.common)
        for layer in layers:
            layer.impl.forward(layer, query, None, None, layer.kv_cache, metadata, out)
        assert len(checked) == 3, "where the kind of layer changes, in every step anew"
        checked.clear()
    metadata = builder.build(0, step.common)
    with pytest.raises(ValueError, match="query must be"):
        layers[0].impl.forward(layers[0], query.half(), None, None, layers[0].kv_cache, metadata, out)
    assert metadata.specplug_step.checked is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alibi_slopes": torch.ones(4)}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "soft cap"),
        ({"sinks": torch.ones(4)}, "sinks"),
        ({"kv_sharing_target_layer_name": "other"}, "another layer"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "not causal"),
        ({"chunk_lookback": 3}, "chunks"),
    ],
)
def test_layers_that_cannot_attend_trees(changes, words):
    layer = SimpleNamespace(impl=impl_of("TRITON_ATTN", **changes), kv_cache=packed_cache(3))
    assert words in GpuTrees(MOST).attach(runner_of(layer))


def test_models_that_cannot():
    layer = SimpleNamespace(impl=impl_of("TRITON_ATTN"), kv_cache=packed_cache(3))
    assert GpuTrees(MOST).attach(runner_of(layer)) == ""
    assert "another kind" in GpuTrees(MOST).attach(runner_of(layer, builder=Stock()))
    assert "several kinds" in GpuTrees(MOST).attach(runner_of(layer, groups=2))
    assert "quantised" in GpuTrees(MOST).attach(
        runner_of(SimpleNamespace(impl=layer.impl, kv_cache=packed_cache(3).byte()))
    )
    wrong = SimpleNamespace(impl=layer.impl, kv_cache=torch.zeros(3, KV_HEADS, BLOCK, SIZE))
    assert "is not known" in GpuTrees(MOST).attach(runner_of(wrong))


def test_the_installed_vllm_has_what_the_adapter_uses():
    assert compat.missing_for_gpu_trees() == []
    for name, (module, prefix) in gpu_attention.STOCK.items():
        backend = getattr(gpu_attention, name)
        assert backend.get_name() == name and backend.__mro__[1].__name__ == prefix + "Backend"
        for own, stock in (
            (backend.get_impl_cls().forward, backend.get_impl_cls().__mro__[2].forward),
            (backend.get_builder_cls().build, backend.get_builder_cls().__mro__[2].build),
        ):
            ours, theirs = (list(inspect.signature(f).parameters) for f in (own, stock))
            assert ours == theirs[: len(ours)] and len(ours) == len(theirs), (name, ours, theirs)
        assert backend.get_impl_cls().__mro__[2].__module__ == module


def test_backends_are_registered_and_taken_back():
    assert not any(getattr(AttentionBackendEnum, name).is_overridden() for name in NAMES)
    gpu_attention.install()
    try:
        for name in NAMES:
            assert getattr(AttentionBackendEnum, name).get_class() is getattr(gpu_attention, name)
    finally:
        gpu_attention.uninstall()
    for name in NAMES:
        assert getattr(AttentionBackendEnum, name).get_class().__name__ == gpu_attention.STOCK[name][1] + "Backend"


def test_gpus_get_trees_only_where_they_are_asked_for(monkeypatch):
    from test_tree_host import config
    from vllm import platforms

    cuda = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_name="a GPU")
    monkeypatch.setattr(platforms, "current_platform", cuda)
    monkeypatch.setattr(gpu_attention, "install", lambda: None)
    monkeypatch.setattr(gpu_attention, "uninstall", lambda: None)
    assert "gpu_trees is not set" in trees.TreeHost(config(), drafts=True, wanted=True).reason
    host = trees.TreeHost(config(), drafts=True, wanted=True, gpu_trees=True)
    assert isinstance(host.backend, GpuTrees) and "loaded" in host.reason
    host.on_model_loaded()
    monkeypatch.setattr(compat, "missing_for_gpu_trees", lambda: ["vllm.gone"])
    assert "vllm.gone" in trees.TreeHost(config(), drafts=True, wanted=True, gpu_trees=True).reason
