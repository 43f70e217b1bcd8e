"""SparseVerify in vLLM's GPU backends: what the kernels are told and what comes of it, on tensors of the CPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")

from test_gpu_attention import BLOCK, HEADS, KV_HEADS, MOST, SIZE, Builder, impl_of, int32, packed_cache, runner_of
from vllm_specplug.kernels.block_select import choose_reference, summarise, votes_reference
from vllm_specplug.kernels.block_select_triton import MOST_UNITS
from vllm_specplug.kernels.sparse_attention import sparse_attention_reference
from vllm_specplug.kernels.tree_attention import build_trees
from vllm_specplug.proposers.sparse_verify import SparseVerifyOptions

from vllm_specplug.host import gpu_attention, gpu_sparse, tree_plan
from vllm_specplug.host.gpu_attention import GpuTrees
from vllm_specplug.host.sparse_attention import SparseAttention

LAYERS = 3
#: Contexts of a step's requests, and their rows: a tree, a prompt, a chain, a tree of a short context, one that pads.
CONTEXTS, SIZES = int32(150, 0, 97, 30), int32(5, 9, 3, 4)
PARENTS = [[-1, 0, 0, 1, 2], [-1], [-1, 0, 1], [-1, 0, 1, 1]]
SPARSE = np.array([True, False, True, False])


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter runs one after another, and a short context has no use for many."""
    monkeypatch.setattr(gpu_attention, "_SPLITS", 2)


class Step:
    """An engine's GPU backend before a step, with its layers."""

    def __init__(self, options=None, calibration=None, windows=(-1,) * LAYERS, max_model_len=256):
        options = {"unit": 16, "first": 16, "last": 16, "dense_below": 32, "ratio": 0.3} | (options or {})
        self.sparse = SparseAttention(SparseVerifyOptions(**options), calibration)
        self.sparse.ids = ("a", "b", "c", "d")
        torch.manual_seed(0)
        self.layers = [
            SimpleNamespace(impl=impl_of("TRITON_ATTN", window), kv_cache=packed_cache(60), layer_name=f"layer{i}")
            for i, window in enumerate(windows)
        ]
        self.runner = runner_of(*self.layers)
        self.runner.max_model_len = max_model_len
        self.blocks = np.random.default_rng(0).permutation(60)[:55].reshape(5, 11).astype(np.int32)
        self.runner.input_batch = SimpleNamespace(
            num_reqs=4, block_table=[SimpleNamespace(get_numpy_array=lambda: self.blocks)]
        )
        self.backend = GpuTrees(MOST, self.sparse)
        self.reason = self.backend.attach(self.runner)

    def metadata(self, contexts=CONTEXTS, sparse=SPARSE):
        ends = np.cumsum(SIZES, dtype=np.int32)
        parents = np.concatenate([int32(*p) for p in PARENTS])
        self.plan = tree_plan.make_plan(parents, int32(*map(len, PARENTS)), ends, contexts, sparse)
        starts = torch.tensor([0, *ends.tolist(), int(ends[-1])], dtype=torch.int32)
        common = SimpleNamespace(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([*(contexts + SIZES).tolist(), 0], dtype=torch.int32),
            num_actual_tokens=24,  # padded
            block_table_tensor=torch.from_numpy(self.blocks.copy()),
        )
        self.backend.begin(self.runner, self.plan)
        (builder,) = next(self.runner._attn_group_iterator()).metadata_builders
        return builder.build(0, common)


def described(step, metadata, index, query, chosen, contexts=CONTEXTS):
    """What a layer's rows are by the definitions; ``chosen``: units of each sparse request, else they are chosen."""
    layer, group = step.layers[index], step.sparse.groups[0]
    keys, values = gpu_attention.split_cache(layer.kv_cache, SIZE)
    selection, starts = group.sums.selection, metadata.specplug_step.starts.tolist()
    found, choices = {} if chosen is None else chosen, []
    small = [0, 2, 3]
    for i in small:
        if not SPARSE[i]:
            choices.append(None)
            continue
        context = int(contexts[i])
        tail = selection.tail_block(context, BLOCK) * BLOCK
        if chosen is None:
            slots = torch.arange(tail)
            own = keys[torch.from_numpy(step.blocks[i]).long()[slots // BLOCK], slots % BLOCK]
            sums = summarise(own.unflatten(0, (-1, 16)).permute(2, 0, 1, 3), selection.summary)
            rows = query[starts[i] : starts[i + 1]] if selection.all_rows else query[starts[i] : starts[i] + 1]
            votes = votes_reference(rows, sums, layer.impl.scale, selection.by_head)
            counts = selection.counts(context, BLOCK, group.shares(context)[index])
            found[i] = choose_reference(votes, counts, -(-selection.first // 16))
        choices.append((tail, found[i]))
    trees = build_trees(
        int32(0, 14, 17), SIZES[small], contexts[small], int32(*small),
        np.concatenate([int32(*PARENTS[i]) for i in small]),
    )  # fmt: skip
    out = torch.zeros(24, HEADS, SIZE)
    table = torch.from_numpy(step.blocks)
    sparse_attention_reference(query, keys, values, table, trees, out, layer.impl.scale, 16, choices)
    return out, found


def attend(step, metadata, index, query, monkeypatch):
    layer = step.layers[index]
    stock = next(c for c in type(layer.impl).__mro__ if c.__name__ == "TritonAttentionImpl")
    monkeypatch.setattr(stock, "forward", lambda self, *args: None)
    out = torch.zeros(24, HEADS, SIZE)
    layer.impl.forward(layer, query, None, None, layer.kv_cache, metadata, out)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"by_head": True, "all_rows": False, "scorer": "mean"},
        {"scorer": "streaming"},
        {"scorer": "minmax", "ratio": 0.6, "first": 40},
    ],
    ids=["usual", "by-head", "streaming", "minmax"],
)
def test_layers_attend_as_defined(options, monkeypatch):
    step = Step(options)
    assert step.reason == "" and step.sparse.reason == ""
    step.backend.warm_up()
    metadata = step.metadata()
    for index in range(LAYERS):
        query = torch.randn(24, HEADS, SIZE)
        wanted, found = described(step, metadata, index, query, None)
        assert all(0 < len(units) < 8 for units in found[0])
        torch.testing.assert_close(attend(step, metadata, index, query, monkeypatch), wanted, atol=1e-5, rtol=1e-5)
    assert step.sparse.stats()["sparse_units_read"] == 8 + 5


def test_heads_get_what_calibration_gives_them(monkeypatch):
    """One head's error falls, the other's does not, so the first gets what there is: in layer 1 it is the other one."""
    errors = np.zeros((3, LAYERS, KV_HEADS))
    errors[:, 0, 0] = errors[:, 1, 1] = errors[:, 2, 0] = [4.0, 1.0, 0.0]
    names = [f"layer{i}" for i in range(LAYERS)]
    calibration = {"fractions": [0.05, 0.5, 1.0], "errors": errors.tolist(), "layers": names, "anchors": names[:2]}
    step = Step({"ratio": 0.4, "anchors": "calibrated"}, calibration)
    assert [layer.impl.layer for layer in step.layers] == [(0, True), (1, True), (2, False)]
    metadata = step.metadata()
    found = {}
    for index in range(LAYERS):
        query = torch.randn(24, HEADS, SIZE)
        # The last one attends what the one before it chose, whatever its own query would rank first.
        wanted, found = described(step, metadata, index, query, None if index < 2 else found)
        assert len(found[0][min(index, 1)]) > len(found[0][1 - min(index, 1)]) == 1
        torch.testing.assert_close(attend(step, metadata, index, query, monkeypatch), wanted, atol=1e-5, rtol=1e-5)


def test_layers_before_the_first_that_ranks_and_layers_whose_budget_is_everything(monkeypatch):
    step = Step()
    group = step.sparse.groups[0]
    group._even = np.array([[1.0, 1.0], [9.0, 9.0], [1.0, 1.0]], np.float32)
    step.layers[0].impl.layer = (0, False)
    metadata = step.metadata()
    assert metadata.specplug_step.choice.dense.tolist() == [False, True, False]
    for index in (0, 1):
        query = torch.randn(24, HEADS, SIZE)
        every = {i: [np.arange(11, dtype=np.int32)] * KV_HEADS for i in (0, 2)}
        wanted, _ = described(step, metadata, index, query, every)
        torch.testing.assert_close(attend(step, metadata, index, query, monkeypatch), wanted, atol=1e-5, rtol=1e-5)


def test_a_layer_whose_budget_is_everything_leaves_the_choice_before_it(monkeypatch):
    step = Step()
    step.sparse.groups[0]._even = np.array([[1.0, 1.0], [9.0, 9.0], [1.0, 1.0]], np.float32)
    step.layers[2].impl.layer = (2, False)
    metadata, found = step.metadata(), None
    for index in range(LAYERS):
        query = torch.randn(24, HEADS, SIZE)
        every = {i: [np.arange(11, dtype=np.int32)] * KV_HEADS for i in (0, 2)}
        wanted, chosen = described(step, metadata, index, query, (None, every, found)[index])
        found = chosen if index == 0 else found
        torch.testing.assert_close(attend(step, metadata, index, query, monkeypatch), wanted, atol=1e-5, rtol=1e-5)


def test_each_step_summarises_what_is_new(monkeypatch):
    step, seen = Step(), []
    own = gpu_sparse.block_summary

    def summary(keys, summaries, table, begins, ends, kind, most):
        seen.append((begins.tolist(), ends.tolist(), most))
        own(keys, summaries, table, begins, ends, kind, most)

    monkeypatch.setattr(gpu_sparse, "block_summary", summary)
    step.metadata()
    assert seen == [([0, 0, 0, 0, 0], [8, 0, 5, 0, 0], 8)] * LAYERS
    seen.clear()
    step.metadata()
    assert seen == []
    step.sparse.rewind("c", 40)
    step.metadata(CONTEXTS + int32(16, 9, 0, 4))
    assert seen == [([8, 0, 2, 0, 0], [9, 0, 5, 0, 0], 3)] * LAYERS
    seen.clear()
    step.sparse.drop(["a"])
    step.metadata(CONTEXTS + int32(16, 9, 0, 4))
    assert seen == [([0, 0, 5, 0, 0], [9, 0, 5, 0, 0], 9)] * LAYERS
    stats = step.sparse.stats()
    assert (stats["sparse_attention_steps"], stats["sparse_attention_rows"]) == (4, 4 * 8)
    assert 0 < stats["sparse_attention_share"] < 1


def test_numbers_of_a_step_are_aligned():
    """Else a kernel is compiled anew for another number of requests."""
    step = Step()
    choice = step.metadata().specplug_step.choice
    base = choice.units.data_ptr()
    assert [(t.data_ptr() - base) % 16 for t in (choice.tails, choice.counts[0], choice.counts[1])] == [0, 0, 0]
    assert len(choice.units) == len(choice.tails) == 5 and choice.counts.shape == (LAYERS, 8, KV_HEADS)
    assert choice.counts[:, [1, 3, 4]].eq(-1).all() and choice.tails.tolist() == [128, 0, 80, 0, 0]


def test_exact_steps_have_no_choice():
    step = Step()
    assert step.metadata(sparse=None).specplug_step.choice is None
    assert step.sparse.stats()["sparse_attention_steps"] == 0


class Mode:
    def __init__(self, full):
        self.has_full_cudagraphs = lambda: full


@pytest.mark.parametrize("full", [True, False])
def test_steps_of_one_token_are_vllms_where_whole_steps_are_recorded(full):
    step, one = Step(), np.ones(4, np.int32)
    plan = tree_plan.make_plan(one - 2, one, np.cumsum(one, dtype=np.int32), CONTEXTS, SPARSE)
    step.runner.compilation_config.cudagraph_mode = Mode(full)
    step.backend.begin(step.runner, plan)
    assert (step.backend.holder.plan is None) == full
    step.backend.end()
    step.metadata()
    assert step.backend.holder.plan is step.plan, "trees are this plugin's in any case"


def test_memory_is_counted():
    step = Step({"scorer": "mean"})
    sums = step.sparse.groups[0].sums
    summaries = LAYERS * 60 * KV_HEADS * SIZE * 4
    rest = [sums.chosen, *(getattr(sums.workspace, n) for n in ("scores", "maxima", "sums", "votes", "means"))]
    assert sums.bytes == summaries + sum(t.numel() for t in rest) * 4
    assert step.sparse.stats()["sparse_summary_bytes"] == sums.bytes


def test_what_does_not_fit_is_refused_in_one_line(monkeypatch):
    """Trees are verified all the same, exactly."""
    for changes, words in (
        ({"options": {"unit": 32}}, "units of 32 tokens do not fit blocks of 16"),
        ({"max_model_len": 16 * MOST_UNITS + 1}, "more than 16384 units of 16 tokens: set a larger unit"),
        ({"windows": (-1, 11, -1)}, "no layer attends its whole context"),
    ):
        step = Step(**changes)
        assert step.reason == "" and words in step.sparse.reason and "\n" not in step.sparse.reason
        assert step.sparse.groups == [] and step.metadata().specplug_step.choice is None
    wanted = 60 * KV_HEADS * 2 * SIZE * 4 * LAYERS
    monkeypatch.setattr(gpu_sparse, "free_bytes", lambda device: 2 * wanted - 1)
    assert "lower --gpu-memory-utilization" in Step().sparse.reason
    monkeypatch.setattr(gpu_sparse, "free_bytes", lambda device: 2 * wanted)
    assert Step().sparse.reason == ""


def test_layers_of_different_heads_are_exact():
    impls = {f"layer{i}": impl_of("TRITON_ATTN", num_heads=HEADS * (1 + i)) for i in range(2)}
    step = Step()
    keys = [gpu_attention.split_cache(layer.kv_cache, SIZE)[0] for layer in step.layers[:2]]
    step.sparse.begin_attach()
    assert gpu_sparse.add_group(step.sparse, impls, keys, 4, 256) is None
    assert "different numbers of heads" in step.sparse.reason


def test_a_cache_that_is_made_again_is_attached_again():
    step = Step()
    first = step.sparse.groups[0]
    assert step.backend.attach(step.runner) == ""
    assert len(step.sparse.groups) == 1 and step.sparse.groups[0] is not first
    (builder,) = next(step.runner._attn_group_iterator()).metadata_builders
    assert isinstance(builder, Builder) and builder.sparse is step.sparse.groups[0]
    assert dataclasses.replace(first.sums.selection) == step.sparse.selection
