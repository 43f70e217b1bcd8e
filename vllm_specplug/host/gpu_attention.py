"""Draft trees in vLLM's attention backends for GPUs, TRITON_ATTN and FLASH_ATTN: subclassed, registered in their place.

A step without trees takes vLLM's own code, CUDA graphs and all. In a step with trees, the rows of every request that
runs no more than a tree's rows go through this plugin's kernel, chains too; what is left (prompts) is vLLM's. Graphs of
whole steps then are for steps of one token per request only, since a recorded step cannot change its attention; steps
that verify run in graphs of the parts between attention layers.

Never run on a GPU by its authors, so it is off unless ``specplug.gpu_trees`` is set: it is tested in vLLM's engine on a
CPU, in Triton's interpreter.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_specplug.host import gpu_sparse
from vllm_specplug.host.gpu_sparse import DeviceChoice, GpuGroup
from vllm_specplug.host.sparse_attention import SparseAttention
from vllm_specplug.host.tree_plan import StepPlan
from vllm_specplug.kernels.kv_move_triton import KVMover, kv_move
from vllm_specplug.kernels.tree_attention_triton import AttentionPlan, ancestor_bits, tree_attention

#: vLLM's backends that are subclassed: name in its registry, module, prefix of its classes.
STOCK = {
    "TRITON_ATTN": ("vllm.v1.attention.backends.triton_attn", "TritonAttention"),
    "FLASH_ATTN": ("vllm.v1.attention.backends.flash_attn", "FlashAttention"),
}
# Programs that share a request's context, at most, in steps of so many rows: larger ones fill a GPU without, and what
# the programs leave to be merged would take too much memory (67 MB for 32 heads of 128).
_SPLITS, _SPLIT_ROWS = 16, 256
# Slots that each of them has at least: small batches have few other programs.
_LEAST = 256


@dataclass(slots=True)
class DeviceStep:
    """A step's rows for the kernel, on the device.

    Attributes:
        starts: ``int32[n + 1]`` first row of each request.
        lengths: ``int32[n]`` slots of each request, its rows included.
        bits, depths: see `tree_attention`.
        table: ``int32[n, blocks]``.
        only_own: no row is left for vLLM's kernel.
        choice: what requests attend of their contexts; None: everything.
        checked: plan and window of the layers of which one's launch passed the checks.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    bits: torch.Tensor
    depths: torch.Tensor
    table: torch.Tensor
    only_own: bool
    choice: DeviceChoice | None = None
    checked: tuple[AttentionPlan, int] | None = None


class StepHolder:
    """Where the metadata builders of one engine find the step's plan; None in a step without trees.

    Attributes:
        most: rows of a request that the kernel takes.
        blocks: ``int32[requests, blocks]`` the runner's block table on the host.
        bits_of_chain: ``int32[most, words]`` what the rows of a chain see.
    """

    def __init__(self, most: int) -> None:
        self.plan: StepPlan | None = None
        self.most = most
        self.table: torch.Tensor | None = None
        self.blocks: np.ndarray | None = None
        # Row m of a chain sees rows 0 to m; its depth is m.
        self.bits_of_chain = ancestor_bits(torch.ones(most, most, dtype=torch.uint8).tril())

    def rows(self, plan: StepPlan, starts: np.ndarray, rows: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Bits ``int32[rows, words]`` and depths ``int32[rows]`` of a step, and whether all of its rows have some.

        Args:
            plan: of the step.
            starts: ``int32[n + 1]`` first row of each request; requests that pad the batch have none.
            rows: of the step, with what pads it.
        """
        sizes = np.diff(starts)
        within = np.arange(int(starts[-1])) - np.repeat(starts[:-1], sizes)
        own = np.repeat(sizes <= self.most, sizes)
        bits = torch.zeros(rows, self.bits_of_chain.shape[1], dtype=torch.int32)
        depths = torch.zeros(rows, dtype=torch.int32)
        at = torch.from_numpy(np.flatnonzero(own))
        bits[at] = self.bits_of_chain[torch.from_numpy(within[own])]
        depths[at] = torch.from_numpy(within[own].astype(np.int32))
        trees = plan.trees
        if len(trees.depths):
            of_trees = ancestor_bits(trees.visible)
            firsts, counts = trees.starts.numpy(), trees.sizes.numpy()
            begins = np.cumsum(counts) - counts
            places = np.arange(len(trees.depths)) - np.repeat(begins - firsts, counts)
            bits[torch.from_numpy(places), : of_trees.shape[1]] = of_trees
            bits[torch.from_numpy(places), of_trees.shape[1] :] = 0
            depths[torch.from_numpy(places)] = trees.depths
        return bits, depths, bool(own.all())


def split_cache(cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value cache ``[blocks, block_size, kv_heads, head_size]``, views of a layer's KV cache.

    Raises:
        ValueError: its shape is none of those that vLLM's backends have used.
    """
    shape = list(cache.shape)
    if cache.dim() == 4 and shape[3] == 2 * head_size:
        slots = cache.transpose(1, 2)
        return slots[..., :head_size], slots[..., head_size:]
    if cache.dim() == 5 and shape[4] == head_size and shape[:2].count(2) == 1:
        keys, values = cache.unbind(shape.index(2))
        return keys, values
    raise ValueError(f"a KV cache of shape {shape} is not known")


class TreeBuilderMixin:
    """Builds vLLM's metadata and adds the step's :class:`DeviceStep` where the engine's plan has trees."""

    holder: StepHolder | None = None
    sparse: GpuGroup | None = None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """See vLLM's; at most steps of one token per request, whose attention is never a tree's."""
        from vllm.v1.attention.backend import AttentionCGSupport

        stock = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        return min(stock, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda support: support.value)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """As vLLM's, for the rows that this plugin does not attend."""
        plan = self.holder.plan if self.holder is not None else None
        if plan is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        assert self.holder is not None
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.numpy()
        if starts[-1] != plan.num_rows:
            raise RuntimeError(f"vllm-specplug planned draft trees for {plan.num_rows} rows and vLLM runs {starts[-1]}")
        device = common.seq_lens.device
        bits, depths, only_own = self.holder.rows(plan, starts, common.num_actual_tokens)
        self.holder.table = common.block_table_tensor
        step = DeviceStep(
            starts=common.query_start_loc.contiguous(),
            lengths=common.seq_lens.contiguous(),
            bits=bits.to(device, non_blocking=True),
            depths=depths.to(device, non_blocking=True),
            table=common.block_table_tensor,
            only_own=only_own,
        )
        if self.sparse is not None and self.holder.blocks is not None:
            step.choice = self.sparse.prepare(plan, self.holder.blocks, step.starts, step.table[: len(step.lengths)])
        # vLLM's kernel has to run over all rows, for rows cannot be left out: it is told that these requests hold
        # nothing but the rows, and what it writes there is overwritten.
        common = copy.copy(common)
        sizes = np.diff(starts)
        held = torch.from_numpy(np.where(sizes <= self.holder.most, sizes, np.iinfo(np.int32).max).astype(np.int32))
        common.seq_lens = torch.minimum(common.seq_lens, held.to(device, non_blocking=True))
        stock = super().build(0, common, fast_build)  # type: ignore[misc]
        stock.specplug_step = step
        return stock


class TreeImplMixin:
    """Attends trees, and the chains beside them, with this plugin's kernel and everything else with vLLM's.

    Attributes:
        layer: place among the layers of its group, and whether it chooses what to attend; see :class:`GpuGroup`.
    """

    layer: tuple[int, bool] = (0, True)
    #: For steps of few rows, and of any number.
    attention_plans: tuple[AttentionPlan, AttentionPlan] | None = None

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
        step: DeviceStep | None = getattr(attn_metadata, "specplug_step", None)
        if step is None or not step.only_own:
            super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if step is None:
            return output
        own: Any = self
        assert self.attention_plans is not None
        caches = split_cache(kv_cache, own.head_size)
        rows = len(step.bits)
        plan, query, out = self.attention_plans[rows > _SPLIT_ROWS], query[:rows], output[:rows]
        if step.choice is not None and (found := step.choice.layer(*self.layer, query, own.scale)) is not None:
            step.choice.attend(found, plan, query, caches, step.lengths, step.bits, out, own.scale)
            return output
        keys, values = caches
        kind = plan, window_of(own)
        tree_attention(
            plan,
            query,
            keys,
            values,
            step.table,
            step.starts,
            step.lengths,
            step.bits,
            out,
            own.scale,
            kind[1],
            step.depths,
            kind == step.checked,
        )
        step.checked = kind
        return output


def window_of(impl: Any) -> int:
    """Tokens that a row of a layer sees, itself included; -1: all. vLLM keeps (left, right), or -1 for none."""
    left = impl.sliding_window[0] if isinstance(impl.sliding_window, tuple) else impl.sliding_window
    return -1 if left is None or left < 0 else int(left) + 1


def subclass(name: str, builder_mixin: type[Any] = TreeBuilderMixin, of: str = __name__) -> type[Any]:
    """vLLM's backend ``name`` (of :data:`STOCK`) with trees.

    Args:
        builder_mixin: what its builder of metadata does first.
        of: module that has the class.
    """
    module_name, prefix = STOCK[name]
    module = importlib.import_module(module_name)
    stock = [getattr(module, prefix + part) for part in ("Backend", "Impl", "MetadataBuilder")]
    here = {"__module__": of}
    impl = type(f"Tree{prefix}Impl", (TreeImplMixin, stock[1]), dict(here))
    builder = type(f"Tree{prefix}MetadataBuilder", (builder_mixin, stock[2]), dict(here))
    parts = {"get_impl_cls": staticmethod(lambda: impl), "get_builder_cls": staticmethod(lambda: builder)}
    return type(f"Tree{prefix}Backend", (stock[0],), here | parts)


def __getattr__(name: str) -> Any:
    """``<NAME>`` of :data:`STOCK`: vLLM's registry looks classes up by module and name."""
    if name in STOCK:
        found = globals()[name] = subclass(name)
        return found
    raise AttributeError(name)


def install(module: str = __name__) -> None:
    """Let layers made from now on use the backends with trees that ``module`` has by their names; :func:`uninstall`
    them once the model is made."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.attention.selector import _cached_get_attn_backend

    for name in STOCK:
        register_backend(getattr(AttentionBackendEnum, name), f"{module}.{name}")
    _cached_get_attn_backend.cache_clear()


def uninstall() -> None:
    """Let layers made from now on use vLLM's own backends again."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import _cached_get_attn_backend

    for name in STOCK:
        getattr(AttentionBackendEnum, name).clear_override()
    _cached_get_attn_backend.cache_clear()


class GpuTrees:
    """Draft trees on CUDA: see :class:`vllm_specplug.host.trees.TreeBackend`."""

    long_from: int | None = None

    def __init__(self, most: int, sparse: SparseAttention | None = None) -> None:
        """
        Args:
            most: rows of a request to verify, its last token included.
            sparse: chooses what requests attend of their contexts; None: they attend everything.
        """
        self.holder = StepHolder(most)
        self._sparse = sparse
        self._groups: list[tuple[GpuGroup, Any]] = []  # that attend sparsely, and a layer of each
        self._movers: list[KVMover] = []
        self._first_layers: dict[tuple[Any, ...], Any] = {}  # of each kind
        self._plan: StepPlan | None = None

    def attach(self, runner: Any) -> str:
        """Prepare for the runner's KV cache, which has just been made."""
        self._movers, self._first_layers, self._groups = [], {}, []
        if self._sparse is not None:
            self._sparse.begin_attach()
        layers = runner.compilation_config.static_forward_context
        plans: dict[tuple[Any, ...], tuple[AttentionPlan, AttentionPlan]] = {}
        groups = list(runner._attn_group_iterator())
        if not groups:
            return "the model has no attention layers"
        if len(runner.kv_cache_config.kv_cache_groups) > 1:
            return "layers have KV caches of several kinds"
        for group in groups:
            reason = _group_reason(group, layers)
            if reason:
                return reason
            found = [layers[name] for name in group.layer_names]
            try:
                self._attach(runner, found, plans)
            except ValueError as error:
                return str(error)
            sparse = self._attach_sparse(runner, found)
            for builder in group.metadata_builders:
                builder.holder, builder.sparse = self.holder, sparse
        return ""

    def _attach_sparse(self, runner: Any, layers: list[Any]) -> GpuGroup | None:
        if self._sparse is None:
            return None
        impls = {layer.layer_name: layer.impl for layer in layers}
        keys = [split_cache(layer.kv_cache, layer.impl.head_size)[0] for layer in layers]
        group = gpu_sparse.add_group(self._sparse, impls, keys, runner.max_num_reqs, runner.max_model_len)
        if group is not None:
            self._groups.append((group, layers[0]))
        return group

    def _attach(self, runner: Any, layers: list[Any], plans: dict[tuple[Any, ...], Any]) -> None:
        first = layers[0].kv_cache
        block_size = split_cache(first, layers[0].impl.head_size)[0].shape[1]
        self._movers.append(KVMover([layer.kv_cache for layer in layers], block_size))
        for layer in layers:
            impl = layer.impl
            key = (impl.num_heads, impl.num_kv_heads, impl.head_size, layer.kv_cache.dtype)
            # With a window the kernel is another one.
            self._first_layers.setdefault((*key, window_of(impl) > 0), layer)
            if key not in plans:
                plans[key] = tuple(
                    AttentionPlan(
                        rows, runner.max_num_reqs, self.holder.most, *key, device=runner.device, splits=splits
                    )
                    for rows, splits in ((_SPLIT_ROWS, _SPLITS), (runner.max_num_tokens, 1))
                )
            impl.attention_plans = plans[key]

    def warm_up(self) -> None:
        """Compile before the first request: one row of an empty cache, and no move."""
        words = self.holder.bits_of_chain.shape[1]
        for layer in self._first_layers.values():
            impl, cache = layer.impl, layer.kv_cache
            on = {"device": cache.device, "dtype": torch.int32}
            query = torch.zeros(1, impl.num_heads, impl.head_size, device=cache.device, dtype=cache.dtype)
            table, starts = torch.zeros(1, 1, **on), torch.arange(2, **on)
            step = (table, starts, torch.ones(1, **on), torch.ones(1, words, **on), torch.empty_like(query))
            for plan in impl.attention_plans:
                caches = split_cache(cache, impl.head_size)
                tree_attention(plan, query, *caches, *step, impl.scale, window_of(impl), torch.zeros(1, **on))
        for group, layer in self._groups:
            bits = torch.ones(1, words, device=layer.kv_cache.device, dtype=torch.int32)
            group.warm_up(layer.impl.attention_plans, bits, layer.impl.scale)
        for mover in self._movers:
            none = torch.full((1, self.holder.most), -1, dtype=torch.int32, device=mover.device)
            kv_move(mover, torch.zeros(1, 1, dtype=torch.int32, device=mover.device), none, none)

    def begin(self, runner: Any, plan: StepPlan) -> None:
        """Make the coming forward pass one of trees, or of requests that attend part of their contexts."""
        if not plan.branching and plan.num_rows == runner.input_batch.num_reqs and _records_steps(runner):
            return  # a recorded step runs vLLM's attention, whatever is planned here
        rows, positions = tree_positions(plan)
        device = runner.positions.device
        runner.positions.index_copy_(0, rows.to(device), positions.to(device))
        self.holder.plan = self._plan = plan
        if self._groups:
            self.holder.blocks = runner.input_batch.block_table[0].get_numpy_array()

    def end(self) -> None:
        """Forward passes are without trees from now on."""
        self.holder.plan = None

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Move K/V of the step's rows ``sources`` to the places of its rows ``targets``, in all layers."""
        assert self._plan is not None and self.holder.table is not None
        moves = torch.from_numpy(moves_by_request(self._plan, sources, targets, self.holder.most)).to(
            self.holder.table.device
        )
        for mover in self._movers:
            kv_move(mover, self.holder.table, moves[0], moves[1])


def _records_steps(runner: Any) -> bool:
    """Whether steps of one token per request may run in recorded graphs of whole steps."""
    mode = getattr(runner.compilation_config, "cudagraph_mode", None)
    return bool(mode is not None and mode.has_full_cudagraphs())


def tree_positions(plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the step that are trees' (``int64[R]``), and their rotary positions (``int64[R]``)."""
    starts, sizes, contexts = (t.numpy() for t in plan.trees[:3])
    begins = np.cumsum(sizes) - sizes
    rows = np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(begins - starts, sizes)
    positions = np.repeat(contexts, sizes) + plan.trees.depths.numpy()
    return torch.from_numpy(rows), torch.from_numpy(positions.astype(np.int64))


def moves_by_request(plan: StepPlan, sources: np.ndarray, targets: np.ndarray, depth: int) -> np.ndarray:
    """``int32[2, requests, depth]`` slots within each request to move from and to, -1: none, for `kv_move`.

    Args:
        depth: always the same, for the kernel is compiled for each.
        sources, targets: ``int64[m]`` rows of the step, by tree, rising within one (see `tree_plan.accepted_moves`).
    """
    starts, _, contexts, requests = (t.numpy() for t in plan.trees[:4])
    tree = np.searchsorted(starts, sources, side="right") - 1
    counts = np.bincount(tree, minlength=len(starts))
    moves = np.full((2, int(requests.max()) + 1, depth), -1, np.int32)
    nth = np.arange(len(tree)) - np.repeat(np.cumsum(counts) - counts, counts)
    for k, rows in enumerate((sources, targets)):
        moves[k, requests[tree], nth] = contexts[tree] + rows - starts[tree]
    return moves


def _group_reason(group: Any, layers: dict[str, Any]) -> str:
    """Why this group of layers cannot attend trees; empty if it can."""
    from vllm.v1.attention.backend import AttentionType

    for builder in group.metadata_builders:
        if not isinstance(builder, TreeBuilderMixin):
            return f"layer {group.layer_names[0]} uses attention of another kind ({group.backend.get_name()})"
    for name in group.layer_names:
        impl = layers[name].impl
        for what, there in (
            ("attention of another kind", not isinstance(impl, TreeImplMixin)),
            ("ALiBi", getattr(impl, "alibi_slopes", None) is not None),
            ("a soft cap", bool(getattr(impl, "logits_soft_cap", 0))),
            ("attention sinks", getattr(impl, "sinks", None) is not None),
            ("a quantised KV cache", layers[name].kv_cache.dtype not in (torch.float16, torch.bfloat16, torch.float32)),
            ("another layer's KV cache", getattr(impl, "kv_sharing_target_layer_name", None) is not None),
            ("attention that is not causal", impl.attn_type != AttentionType.DECODER),
            ("chunks of attention", getattr(impl, "chunk_lookback", -1) not in (-1, None)),
        ):
            if there:
                return f"layer {name} uses {what}"
    return ""
