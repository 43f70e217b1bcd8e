"""Draft trees in vLLM's CPU attention backend.

The backend's three classes are subclassed and registered in their place. A step without trees takes vLLM's own code;
in a step with trees, :class:`TreeMetadata` instead of vLLM's metadata tells the attention layers so.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_specplug.host import chain_attention, cpu_sparse, tree_plan
from vllm_specplug.host.cpu_sparse import CpuGroup
from vllm_specplug.host.sparse_attention import SparseAttention
from vllm_specplug.host.tree_plan import StepPlan
from vllm_specplug.kernels import tree_attention_cpu as kernels
from vllm_specplug.kernels.sparse_attention_cpu import Choice
from vllm_specplug.kernels.tree_attention import build_trees

logger = logging.getLogger("vllm.specplug")


class PlanHolder:
    """Where the metadata builders of one engine find the plan of the step; None in a step without trees."""

    def __init__(self) -> None:
        self.plan: StepPlan | None = None


@dataclass
class TreeMetadata(cpu_attn.CPUAttentionMetadata):
    """Metadata of a step with trees.

    Attributes:
        step: what the trees' kernel needs of the step, the same for all layers.
        only_trees: no row is left for vLLM's kernel.
        choice: what the step's trees attend of their contexts; None: everything.
    """

    step: Any = None
    only_trees: bool = False
    choice: Choice | None = None


class TreeMetadataBuilder(cpu_attn.CPUAttentionMetadataBuilder):
    """Builds :class:`TreeMetadata` where the engine's plan has trees."""

    holder: PlanHolder | None = None
    layout: Any = None
    sparse: CpuGroup | None = None

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """As vLLM's, for the rows that belong to no tree."""
        plan = self.holder.plan if self.holder is not None else None
        if plan is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        if common.num_actual_tokens != plan.num_rows:
            raise RuntimeError(
                f"vllm-specplug planned draft trees for {plan.num_rows} rows and vLLM runs {common.num_actual_tokens}"
            )
        step = kernels.prepare_step(plan.trees, common.block_table_tensor, self.layout)
        self.slot_mapping = common.slot_mapping
        choice = None if self.sparse is None else self.sparse.prepare(plan, step, common.block_table_tensor)
        if plan.only_trees:
            return _only_trees(common, step, choice)
        # vLLM's kernel has to run over the trees' rows too, since a step's rows cannot be left out: it is told that
        # those requests hold nothing but these rows. What it writes there is overwritten.
        common = copy.copy(common)
        common.seq_lens = common.seq_lens.clone()
        common.seq_lens[plan.trees.requests.long()] = plan.trees.sizes
        stock = super().build(common_prefix_len, common, fast_build)
        return TreeMetadata(**vars(stock), step=step, choice=choice)


def _only_trees(common: Any, step: kernels.PreparedStep, choice: Choice | None) -> TreeMetadata:
    return TreeMetadata(
        num_actual_tokens=common.num_actual_tokens,
        max_query_len=common.max_query_len,
        query_start_loc=common.query_start_loc,
        max_seq_len=common.max_seq_len,
        seq_lens=common.seq_lens,
        block_table=common.block_table_tensor,
        slot_mapping=common.slot_mapping,
        scheduler_metadata=None,
        step=step,
        only_trees=True,
        choice=choice,
    )


class TreeAttentionImpl(cpu_attn.CPUAttentionBackendImpl):
    """Attends trees with this plugin's kernel and everything else with vLLM's.

    Attributes:
        layer: place among the layers of its group, and whether it chooses what to attend; see :class:`CpuGroup`.
        observer: called after each layer of a step with trees, to calibrate; None: nobody.
    """

    layer: tuple[int, bool] = (0, True)
    observer: Callable[..., None] | None = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See vLLM's; ``query`` and ``output`` are ``[rows, heads, head_size]``."""
        if type(attn_metadata) is not TreeMetadata:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if not attn_metadata.only_trees:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        step = attn_metadata.step
        if query.dtype != step.layout.dtype:
            raise TypeError(f"a layer attends in {query.dtype} over a KV cache of {step.layout.dtype}")
        kernels.tree_attention_cpu(
            query,
            *_split(kv_cache),
            step.block_table,
            step.trees,
            output,
            self.scale,
            self.sliding_window,
            step.layout,
            step,
            None if attn_metadata.choice is None else attn_metadata.choice.layer(*self.layer),
        )
        if self.observer is not None:
            self.observer(layer, query, *_split(kv_cache), step, output, self.scale)
        return output


class TreeAttentionBackend(cpu_attn.CPUAttentionBackend):
    """vLLM's CPU backend with trees."""

    @staticmethod
    def get_impl_cls() -> type[TreeAttentionImpl]:
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeMetadataBuilder]:
        return TreeMetadataBuilder


def _split(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value cache ``[blocks, kv_heads, block_size, head_size]`` as vLLM's CPU backend slices them."""
    blocks, kv_heads, block_size, _ = kv_cache.size()
    key, value = kv_cache.view((blocks, kv_heads, block_size * 2, -1)).chunk(2, dim=2)
    return key, value


def install() -> None:
    """Let layers made from now on use :class:`TreeAttentionBackend`; :func:`uninstall` it once the model is made.

    Backends are looked up once per configuration and cached, by any engine of the process.
    """
    register_backend(
        AttentionBackendEnum.CPU_ATTN, f"{TreeAttentionBackend.__module__}.{TreeAttentionBackend.__qualname__}"
    )
    _cached_get_attn_backend.cache_clear()


def uninstall() -> None:
    """Let layers made from now on use vLLM's own backend again."""
    AttentionBackendEnum.CPU_ATTN.clear_override()
    _cached_get_attn_backend.cache_clear()


class CpuTrees:
    """Draft trees on the CPU platform: see :class:`vllm_specplug.host.trees.TreeBackend`."""

    def __init__(self, sparse: SparseAttention | None = None, attention: str = "auto") -> None:
        """
        Args:
            sparse: chooses what trees attend of their contexts; None: they attend everything.
            attention: the option of this name, see :class:`vllm_specplug.registry.GeneralOptions`.
        """
        self.holder = PlanHolder()
        self.long_from: int | None = None
        self._sparse = sparse
        self._attention = attention
        self._groups: list[tuple[TreeMetadataBuilder, Any]] = []
        self._first_layers: list[Any] = []

    def attach(self, runner: Any) -> str:
        """Prepare for the runner's KV cache, which has just been made."""
        self._groups, self._first_layers, self.long_from = [], [], None
        if self._sparse is not None:
            self._sparse.begin_attach()
        layers = runner.compilation_config.static_forward_context
        for group in runner._attn_group_iterator():
            reason = _group_reason(group, layers)
            if reason:
                return reason
            for builder in group.metadata_builders:
                found = self._attach_builder(builder, [layers[name] for name in group.layer_names])
                if found:
                    return found
        if not self._groups:
            return "the model has no attention layers"
        return ""

    def _attach_builder(self, builder: TreeMetadataBuilder, layers: list[Any]) -> str:
        cache, head_size = layers[0].kv_cache, layers[0].impl.head_size
        block_size = cache.shape[2]
        if cache.dtype != builder.dtype:
            return f"the KV cache is in {cache.dtype}, the model in {builder.dtype}"
        if cache.shape[3] != 2 * head_size:
            return "keys and values differ in size"
        try:
            builder.layout = kernels.probe_layout(_writer(builder.isa), cache.dtype, block_size, head_size)
            caches = kernels.prepare_caches([_split(layer.kv_cache) for layer in layers], builder.layout)
        except ValueError as error:
            return f"the KV cache's layout is not known ({error})"
        builder.holder = self.holder
        if self._sparse is not None:
            impls = {layer.layer_name: layer.impl for layer in layers}
            builder.sparse = cpu_sparse.add_group(self._sparse, impls, caches)
        self._groups.append((builder, caches))
        self._first_layers.append(layers[0])
        return ""

    def warm_up(self) -> None:
        """Compile before the first request, and find out whose attention of long contexts is faster."""
        for builder, mover in self._groups:
            _warm_up_kernel(builder)
            nothing = np.zeros(0, np.int64)
            kernels.move_rows(mover, nothing, nothing)
        if self._attention == "own" or (self._attention == "auto" and self._is_faster()):
            self.long_from = chain_attention.LONG

    def _is_faster(self) -> bool:
        """Whether this plugin attends long contexts in less time than vLLM, in the first layer of every group."""
        groups = zip(self._groups, self._first_layers, strict=True)
        try:
            return all(_is_faster(builder, layer) for (builder, _), layer in groups)
        except Exception as error:  # a server starts without it, whatever another vLLM's kernel takes
            logger.warning("vllm-specplug: vLLM attends long contexts, for its kernel could not be timed: %s", error)
            return False

    def begin(self, runner: Any, plan: StepPlan) -> None:
        """Make the coming forward pass one of trees."""
        tree_plan.place(plan, runner.positions.numpy())
        self.holder.plan = plan

    def end(self) -> None:
        """Forward passes are without trees from now on."""
        self.holder.plan = None

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Move K/V of the step's rows ``sources`` to the places of its rows ``targets``, in all layers."""
        for builder, mover in self._groups:
            slots = builder.slot_mapping.numpy()
            kernels.move_rows(mover, slots[sources], slots[targets])


def _warm_up_kernel(builder: TreeMetadataBuilder) -> None:
    """Attend one small tree in an empty cache."""
    layout = builder.layout
    heads, kv_heads = builder.num_heads, builder.num_kv_heads
    query = torch.zeros(3, heads, layout.head_size, dtype=layout.dtype)
    cache = torch.zeros(2, kv_heads, layout.block_size, 2 * layout.head_size, dtype=layout.dtype)
    table = torch.ones(1, 1, dtype=torch.int32)
    one = np.ones(1, np.int32)
    trees = build_trees(one - 1, one * 3, one, one - 1, np.array([-1, 0, 0], np.int32))
    for window in (-1, 2):
        kernels.tree_attention_cpu(query, *_split(cache), table, trees, torch.empty_like(query), 1.0, window, layout)


def _is_faster(builder: TreeMetadataBuilder, layer: Any) -> bool:
    """Whether this plugin attends a long context in less time than vLLM in a layer, whose KV cache is still empty."""
    cache, impl, layout = layer.kv_cache, layer.impl, builder.layout

    def run(forward: Callable[..., Any], rows: int, metadata: Any) -> Callable[[], Any]:
        query = torch.zeros(rows, builder.num_heads, layout.head_size, dtype=layout.dtype)
        out = torch.empty_like(query)
        return lambda: forward(layer, query, None, None, cache, metadata, out)

    def own(rows: int, common: Any, trees: Any) -> Callable[[], Any]:
        step = kernels.prepare_step(trees, common.block_table_tensor, layout)
        return run(impl.forward, rows, _only_trees(common, step, None))

    def host(rows: int, common: Any, trees: Any) -> Callable[[], Any]:
        return run(impl.forward, rows, cpu_attn.CPUAttentionMetadataBuilder.build(builder, 0, common))

    blocks, longest = cache.shape[0], builder.vllm_config.model_config.max_model_len
    return chain_attention.long_contexts(blocks, layout.block_size, own, host, longest)


def _writer(isa: str) -> Callable[..., None]:
    def write(
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa)

    return write


def _group_reason(group: Any, layers: dict[str, Any]) -> str:
    """Why this group of layers cannot attend trees; empty if it can."""
    names = group.layer_names
    if any(type(builder) is not TreeMetadataBuilder for builder in group.metadata_builders):
        return f"layer {names[0]} uses attention of another kind ({group.backend.get_name()})"
    if type(group.kv_cache_spec) not in (FullAttentionSpec, SlidingWindowSpec):
        return f"layer {names[0]} has a KV cache of another kind ({type(group.kv_cache_spec).__name__})"
    if getattr(group, "kernel_block_size", None) is not None:
        return f"layer {names[0]} has blocks that are split for its kernel"
    for name in names:
        impl = layers[name].impl
        if type(impl) is not TreeAttentionImpl:
            return f"layer {name} uses attention of another kind ({type(impl).__name__})"
        if impl.attn_type != AttentionType.DECODER:
            return f"layer {name} is no decoder attention"
        for what, there in (
            ("ALiBi", impl.alibi_slopes is not None),
            ("a soft cap", bool(impl.logits_soft_cap)),
            ("attention sinks", impl.sinks is not None),
            ("an fp8 KV cache", impl.is_fp8_kv_cache),
            ("another layer's KV cache", impl.kv_sharing_target_layer_name is not None),
        ):
            if there:
                return f"layer {name} uses {what}"
    return ""
