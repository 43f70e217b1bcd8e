"""Draft trees inside one engine: whether they can be verified here, and each step's part of it.

Around the forward pass of a step: :meth:`TreeHost.begin` plans it and moves the rotary positions of the trees' rows,
the attention backend attends them along their paths, the verification reads :meth:`TreeHost.row_parents`, and
:meth:`TreeHost.after_verify` moves K/V of the accepted rows to where the next step expects them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vllm_specplug.host import compat, tree_plan
from vllm_specplug.host.forests import KeptTree
from vllm_specplug.host.sparse_attention import SparseAttention
from vllm_specplug.host.tree_plan import StepPlan
from vllm_specplug.proposers.base import Int32Array

logger = logging.getLogger("vllm.specplug")


class TreeBackend(Protocol):
    """What a platform implements to verify trees. Rows are those of the step, all requests one after another.

    Attributes:
        long_from: tokens in the cache from which on it attends a request's rows faster than vLLM, trees or not; None:
            it never does, or was told not to.
    """

    long_from: int | None

    def attach(self, runner: Any) -> str:
        """Prepare for the runner's KV cache; why trees cannot be verified with it, or the empty string."""

    def warm_up(self) -> None:
        """Compile before the first request."""

    def begin(self, runner: Any, plan: StepPlan) -> None:
        """Make the coming forward pass one of trees: rotary positions, and attention along the trees' paths."""

    def end(self) -> None:
        """Forward passes are without trees from now on."""

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Move K/V of rows ``sources`` (``int64[m]``) to the cache slots of rows ``targets``, one after another."""


def rows_of(metadata: Any, requests: int) -> Int32Array:
    """``int32[requests]`` rows of each request that verify, its last token included, by vLLM's metadata of the step's
    draft tokens (None: there are none)."""
    if metadata is None:
        return np.ones(requests, np.int32)
    sizes = np.array(metadata.num_draft_tokens, np.int32)
    sizes += 1
    return sizes


def kind_here(gpu_trees: bool) -> str:
    """Whose attention backends take the trees here, ``cpu`` or ``gpu``; or why none does.

    Args:
        gpu_trees: the option of this name.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "cpu"
    if not current_platform.is_cuda():
        return f"there is no tree attention for {current_platform.device_name} yet"
    return "gpu" if gpu_trees else "the option gpu_trees is not set"


@dataclass(slots=True)
class TreeCounters:
    """Totals since the engine started."""

    tree_steps: int = 0
    trees_verified: int = 0
    tree_nodes_verified: int = 0
    tree_nodes_accepted: int = 0
    rows_moved: int = 0
    long_contexts_attended: int = 0


class TreeHost:
    """Draft trees of one engine.

    Attributes:
        reason: why drafts are chains here; empty if they may branch.
        plan: of the step, from before its forward pass until the next step; None in a step without trees.
    """

    def __init__(
        self,
        vllm_config: Any,
        drafts: bool,
        wanted: bool,
        sparse: SparseAttention | None = None,
        attention: str = "auto",
        gpu_trees: bool = False,
    ) -> None:
        """
        Args:
            drafts: this process drafts; under tensor parallelism one process does, for all.
            wanted: any process of this engine drafts.
            sparse: which requests attend part of their context, and which part; None: none ever does.
            attention, gpu_trees: the options of these names, see :class:`vllm_specplug.registry.GeneralOptions`.
        """
        self._sparse = sparse
        self._attention = attention
        self._gpu_trees = gpu_trees
        self._module: Any = None
        self.counters = TreeCounters()
        self.plan: StepPlan | None = None
        self.backend: TreeBackend | None = None
        self._drafts = drafts
        self._parallel = Ranks() if wanted and _shares_drafts(vllm_config.parallel_config) else None
        self.reason = config_reason(vllm_config) if wanted else "drafting is switched off"
        if not self.reason:
            self._install(vllm_config)

    @property
    def available(self) -> bool:
        """Whether drafts may branch."""
        return not self.reason

    def _install(self, vllm_config: Any) -> None:
        kind = kind_here(self._gpu_trees)
        if kind not in ("cpu", "gpu"):
            self.reason = kind
            return
        missing = compat.missing_for_trees() if kind == "cpu" else compat.missing_for_gpu_trees()
        if missing:
            self.reason = f"this vLLM lacks {', '.join(missing)}"
            return
        if kind == "cpu":
            from vllm_specplug.host import cpu_attention

            self._module, self.backend = cpu_attention, cpu_attention.CpuTrees(self._sparse, self._attention)
        else:
            from vllm_specplug.host import gpu_attention

            most = 1 + vllm_config.speculative_config.num_speculative_tokens
            self._module, self.backend = gpu_attention, gpu_attention.GpuTrees(most, self._sparse)
        self._module.install()
        self.reason = "the model is being loaded"

    def on_model_loaded(self) -> None:
        """The model's layers are made: other models of this process get vLLM's own backend again."""
        if self.backend is not None:
            self._module.uninstall()

    def on_kv_cache(self, runner: Any) -> None:
        """The KV cache was made, or made again: find out whether trees can be verified with it."""
        if self.backend is not None:
            self.reason = _runner_reason(runner) or self.backend.attach(runner)
            if self._parallel is not None:
                self.reason = self._parallel.agree(self.reason)
        if self.available:
            assert self.backend is not None
            tree_plan.warm_up()
            self.backend.warm_up()
        if self._drafts:
            logger.info("vllm-specplug: drafts %s.", f"are chains: {self.reason}" if self.reason else "may be trees")
            if self.available and self.backend is not None and self.backend.long_from is not None:
                logger.info(
                    "vllm-specplug: this plugin's kernel attends contexts of %d tokens and more: it is faster here.",
                    self.backend.long_from,
                )

    def begin(
        self, runner: Any, scheduler_output: Any, num_scheduled: Int32Array, metadata: Any, kept: Mapping[str, KeptTree]
    ) -> None:
        """Plan the coming forward pass: after the runner has prepared its inputs, before it describes them to the
        attention layers."""
        self.plan = None
        if self.reason:
            return
        assert self.backend is not None
        self.backend.end()
        batch = runner.input_batch
        drafts = metadata is not None and (bool(kept) or self._parallel is not None)
        if not drafts and self._sparse is None and self.backend.long_from is None:
            return
        sizes = rows_of(metadata, batch.num_reqs)
        sparse = None if self._sparse is None else self._sparse.rows(batch, num_scheduled, sizes)
        own = self._long(batch, num_scheduled, sizes)
        if not drafts and sparse is None and own is None:
            return
        parents = None
        if drafts and kept:
            scheduled = scheduler_output.scheduled_spec_decode_tokens
            parents = tree_plan.row_parents_of(kept, scheduled, batch.req_id_to_index, num_scheduled, sizes)
        # One draft token cannot branch. All ranks see the same sizes, so all of them skip or none.
        if drafts and self._parallel is not None and sizes.max() > 2:
            parents = self._parallel.share(parents, int(sizes.sum()))
        if parents is None and sparse is None and own is None:
            return
        if parents is None:
            parents = tree_plan.chain_parents(sizes)
        n = len(sizes)
        ends = runner.query_start_loc.np[1 : n + 1]
        computed = batch.num_computed_tokens_cpu[:n]
        self.plan = tree_plan.make_plan(parents, sizes, ends, computed, sparse, own)
        if self.plan is not None:
            self.backend.begin(runner, self.plan)
        if self.plan is not None and self.plan.branching:
            self.counters.tree_steps += 1
            self.counters.trees_verified += len(self.plan.trees.starts)
            self.counters.tree_nodes_verified += len(self.plan.trees.depths) - len(self.plan.trees.starts)

    def _long(self, batch: Any, num_scheduled: Int32Array, sizes: Int32Array) -> np.ndarray | None:
        """``bool[B]``: requests whose rows, verified or the next one, see a long context; None: there are none."""
        assert self.backend is not None
        if self.backend.long_from is None:
            return None
        n = len(sizes)
        own: np.ndarray = batch.num_computed_tokens_cpu[:n] >= self.backend.long_from
        # A chunk of a prompt has more rows; that is vLLM's.
        own = own & (num_scheduled[:n] == sizes)
        found = int(own.sum())
        self.counters.long_contexts_attended += found
        return own if found else None

    def end(self) -> None:
        """The forward pass is over, and nothing of it was verified."""
        if self.plan is not None:
            assert self.backend is not None
            self.plan = None
            self.backend.end()

    def row_parents(self) -> Int32Array | None:
        """Parents of the step's verified rows, see :class:`StepPlan`; None if all are chains."""
        return self.plan.row_parents if self.plan is not None and self.plan.branching else None

    def after_verify(self, paths: Int32Array, lengths: Int32Array) -> None:
        """Put K/V of accepted rows where the next step expects them; see :func:`tree_plan.accepted_moves`.

        The scheduler shares blocks of accepted tokens when it plans the next step, which is after this.
        """
        if self.plan is None:
            return
        assert self.backend is not None
        self.backend.end()
        if not self.plan.branching:
            return
        sources, targets, accepted = tree_plan.accepted_moves(self.plan, paths, lengths)
        self.counters.tree_nodes_accepted += accepted
        self.counters.rows_moved += len(sources)
        if len(sources):
            self.backend.move(sources, targets)

    def stats(self) -> dict[str, float]:
        """Counters by name."""
        return {name: float(getattr(self.counters, name)) for name in TreeCounters.__dataclass_fields__}


class Ranks:
    """Tensor-parallel ranks: one drafts, all verify the same trees.

    Attributes:
        is_first: this is the one that drafts.
    """

    def __init__(self) -> None:
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        self._group, self._first, self._devices = group.cpu_group, group.ranks[0], group
        self.is_first = group.rank_in_group == 0

    def agree(self, reason: str) -> str:
        """``reason`` if it is empty on all ranks, else one of theirs."""
        reasons: list[Any] = [None] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(reasons, reason, group=self._group)
        return next((r for r in reasons if r), "")

    def share(self, parents: Int32Array | None, rows: int) -> Int32Array | None:
        """The first rank's ``parents`` (``int32[rows]`` or None), on all ranks."""
        message = np.zeros(rows + 1, np.int32)
        if self.is_first and parents is not None:
            message[0] = 1
            message[1:] = parents
        torch.distributed.broadcast(torch.from_numpy(message), src=self._first, group=self._group)
        return message[1:] if message[0] else None

    def share_on_device(self, values: torch.Tensor) -> None:
        """Overwrite ``values`` with the first rank's: of the same shape on all ranks, whose hosts do not wait."""
        self._devices.broadcast(values, src=0)


def _shares_drafts(parallel_config: Any) -> bool:
    """Whether one rank drafts for others (see ``_reports_to_scheduler`` in :mod:`vllm_specplug.host.proposer`)."""
    return (
        parallel_config.tensor_parallel_size > 1 and parallel_config.distributed_executor_backend != "external_launcher"
    )


def config_reason(vllm_config: Any) -> str:
    """What in the engine's configuration forbids trees; empty if nothing does."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for what, there in (
        ("one draft token per step cannot branch", vllm_config.speculative_config.num_speculative_tokens < 2),
        ("pipeline parallelism", parallel.pipeline_parallel_size > 1),
        ("context parallelism", _parallel_size(parallel, "decode") > 1 or _parallel_size(parallel, "prefill") > 1),
        ("a KV connector", vllm_config.kv_transfer_config is not None),
        ("multi-dimensional rotary positions", bool(model.uses_mrope or getattr(model, "uses_xdrope_dim", 0))),
        ("an encoder-decoder model", bool(model.is_encoder_decoder)),
        ("a model with state-space or linear attention layers", bool(getattr(model, "is_hybrid", False))),
        ("a model whose prompts attend both ways", bool(getattr(model, "is_mm_prefix_lm", False))),
        ("a model whose window leaves out the prompt", getattr(model, "rswa_window", None) is not None),
    ):
        if there:
            return what
    return ""


def _parallel_size(parallel_config: Any, kind: str) -> int:
    return int(getattr(parallel_config, f"{kind}_context_parallel_size", 1))


def _runner_reason(runner: Any) -> str:
    """What in the runner forbids trees; empty if nothing does."""
    if runner.use_async_scheduling:
        return "asynchronous scheduling"
    if runner.shared_kv_cache_layers:
        return "layers share KV caches"
    return ""
