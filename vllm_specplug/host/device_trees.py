"""Draft trees in vLLM's Model Runner V2: grown, verified and moved on the device, the host knows their size alone.

A step's rows are described from the trees that :class:`DeviceDrafts` left by slot, before the forward pass. TRITON_ATTN
and FLASH_ATTN are subclassed, so that requests with drafts are attended along their trees. At every row one token is
drawn by vLLM's own sampler (the rule of :mod:`.verification`, of which nothing depends on what the other rows drew),
the trees are walked down, and K/V of accepted rows moved. Sampling noise is keyed by request and position in V2, and
rows have their true positions, so a request with a seed gets the tokens it would get without speculation.

Steps with the same number of drafts for every request run in vLLM's graphs of whole steps: what the attention reads
lies at fixed addresses, filled before each step.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode import rejection_sampler

from vllm_specplug.host import eligibility, gpu_attention, trees
from vllm_specplug.host.gpu_attention import DeviceStep, GpuTrees
from vllm_specplug.kernels.kv_move_triton import kv_move
from vllm_specplug.kernels.tree_rows_triton import tree_rows
from vllm_specplug.kernels.tree_walk_triton import tree_walk

#: Logits processors that vLLM has itself; another one may look at the rows before its own, as if they were a chain.
_OWN_PROCESSORS = 3


class StepRows:
    """The rows of a step, at addresses that stay the same.

    Attributes:
        most: rows of a request with a whole draft.
        active: rows are described, in the present step or for a graph that is recorded.
        table: ``int32[n, blocks]`` the present step's block table, in the blocks that attention sees.
        parents, depths: ``int32[max_tokens]``.
        bits: ``int32[max_tokens, words]``.
    """

    def __init__(self, most: int, max_tokens: int, device: torch.device) -> None:
        self.most = most
        self.active = False
        self.table: torch.Tensor | None = None
        on: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.parents = torch.full((max_tokens,), -1, **on)
        self.depths = torch.zeros(max_tokens, **on)
        # Until they are described, rows see all rows of their request: in dummy runs too, every row sees something.
        self.bits = torch.full((max_tokens, -(-most // 32)), -1, **on)


class DeviceTreeBuilderMixin(gpu_attention.TreeBuilderMixin):
    """Builds vLLM's metadata and, where the step has drafts, adds what this plugin's attention needs."""

    holder: StepRows | None = None  # type: ignore[assignment]

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """See vLLM's; at most steps whose requests have the same number of rows, whose attention is always the same."""
        from vllm.v1.attention.backend import AttentionCGSupport

        stock = _stock(cls).get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(stock, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """As vLLM's, for the rows that this plugin does not attend."""
        common, holder = common_attn_metadata, self.holder
        sizes = np.diff(common.query_start_loc_cpu.numpy())
        if holder is None or not holder.active or not ((sizes > 1) & (sizes <= holder.most)).any():
            return _stock(self).build(common_prefix_len, common, fast_build)
        rows = common.num_actual_tokens
        holder.table = common.block_table_tensor
        step = DeviceStep(
            starts=common.query_start_loc,
            lengths=common.seq_lens,
            bits=holder.bits[:rows],
            depths=holder.depths[:rows],
            table=common.block_table_tensor,
            only_own=bool((sizes <= holder.most).all()),
        )
        if not step.only_own:
            # vLLM's kernel runs over all rows, for none can be left out: it is told that these requests hold nothing
            # but their rows, and what it writes there is overwritten.
            common = copy.copy(common)
            held = np.where(sizes <= holder.most, sizes, np.iinfo(np.int32).max).astype(np.int32)
            limits = torch.from_numpy(held).to(common.seq_lens.device, non_blocking=True)
            common.seq_lens = torch.minimum(common.seq_lens, limits)
        stock = _stock(self).build(0, common, fast_build)
        stock.specplug_step = step
        return stock

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """As vLLM's, with this plugin's attention in the graph if requests have several rows."""
        holder = self.holder
        if holder is None:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        was, holder.active = holder.active, True
        try:
            built = super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            holder.active = was
        if getattr(built, "specplug_step", None) is not None:
            # TRITON_ATTN says one slot, to be quick; but a request's rows lie in its slots.
            common_attn_metadata.seq_lens.fill_(common_attn_metadata.max_query_len)
        return built


def _stock(of: Any) -> Any:
    """vLLM's own builder, or builder class, behind one with trees."""
    return super(gpu_attention.TreeBuilderMixin, of)


def __getattr__(name: str) -> Any:
    """``<NAME>`` of `gpu_attention.STOCK`: vLLM's registry looks classes up by module and name."""
    if name not in gpu_attention.STOCK:
        raise AttributeError(name)
    found = globals()[name] = gpu_attention.subclass(name, DeviceTreeBuilderMixin, __name__)
    return found


def config_reason(vllm_config: Any) -> str:
    """What in the engine's configuration forbids trees; empty if nothing does."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for what, there in (
        ("data parallelism", parallel.data_parallel_size > 1),
        ("batches that are split in two", bool(getattr(parallel, "enable_dbo", False))),
        ("batch-sharded sampling", bool(getattr(parallel, "enable_batch_sharded_sampling", False))),
        ("watermarks", getattr(vllm_config, "watermark_config", None) is not None),
        ("sampling masks", bool(getattr(model, "return_sampling_mask", False))),
        ("replayed traces", bool(getattr(model, "enable_trace_replay", False))),
    ):
        if there:
            return what
    return trees.config_reason(vllm_config)


class DeviceTrees(GpuTrees):
    """Draft trees of one engine in Model Runner V2.

    Attributes:
        reason: why drafts are chains here, verified by vLLM; empty if they may branch.
    """

    def __init__(self, vllm_config: Any, device: torch.device, parents: torch.Tensor) -> None:
        """
        Args:
            parents: ``int32[max_requests, K]`` by slot, see `tree_rows`.
        """
        most = 1 + parents.shape[1]
        super().__init__(most)
        self._trees = parents
        self.rows = StepRows(most, vllm_config.scheduler_config.max_num_batched_tokens, device)
        self.reason = "the model is being loaded"
        on: dict[str, Any] = {"dtype": torch.int32, "device": device}
        requests = vllm_config.scheduler_config.max_num_seqs
        self._last = torch.zeros(requests, **on)
        self._lengths = torch.zeros(requests, **on)
        self._tables = torch.zeros(4, requests, most, **on)

    @staticmethod
    def install() -> None:
        """Let layers made from now on use the backends with trees; see `gpu_attention.uninstall`."""
        gpu_attention.install(__name__)

    def attach_runner(self, runner: Any, is_profiling: bool, agree: Callable[[str], str] | None = None) -> None:
        """The runner's KV cache was made, or one to profile with, which is to be freed.

        Args:
            agree: gives the reason of all ranks for this one's, empty if none has any; None: there are no others.
        """
        groups = itertools.chain.from_iterable(runner.attn_groups)
        view = SimpleNamespace(
            compilation_config=runner.compilation_config,
            kv_cache_config=runner.kv_cache_config,
            _attn_group_iterator=lambda: groups,
            max_num_reqs=runner.max_num_reqs,
            max_num_tokens=runner.max_num_tokens,
            device=runner.device,
        )
        self.reason = self.attach(view)
        if agree is not None:
            self.reason = agree(self.reason)
        for builder in self._builders(runner):
            builder.holder = None if self.reason else self.rows
        if is_profiling:
            self._movers = []
        elif not self.reason:
            self.warm_up()

    def warm_up(self) -> None:
        """Compile before the first request."""
        super().warm_up()
        most = self.rows.most
        device = self.rows.bits.device
        starts = torch.tensor([0, most], dtype=torch.int32, device=device)
        slots, positions = torch.zeros(2, most, dtype=torch.int64, device=device)
        described = (self.rows.parents[:most], self.rows.depths[:most], self.rows.bits[:most], positions)
        tree_rows(starts, starts, starts[1:], slots[:1], self._trees, *described, most)
        tokens, paths, sources, targets = (table[:1] for table in self._tables)
        walked = (tokens, paths, self._lengths[:1], self._last[:1], sources, targets)
        tree_walk(starts, described[0], torch.zeros_like(described[0]), slots, self._lengths[:1], *walked, most)

    def _builders(self, runner: Any) -> list[Any]:
        groups = itertools.chain.from_iterable(runner.attn_groups)
        return [builder for group in groups for builder in group.metadata_builders]

    def begin_step(self, input_batch: Any) -> None:
        """Describe a step's rows: after vLLM computed their cache slots, which follow one another, and before it
        describes them to the attention layers."""
        self.rows.active = not self.reason and input_batch.num_draft_tokens > 0
        if not self.rows.active:
            return
        count, total = input_batch.num_reqs, input_batch.num_tokens_after_padding
        tree_rows(
            input_batch.query_start_loc[: count + 1],
            input_batch.cu_num_logits,
            input_batch.seq_lens[:count],
            input_batch.idx_mapping,
            self._trees,
            self.rows.parents[:total],
            self.rows.depths[:total],
            self.rows.bits[:total],
            input_batch.positions,
            self.rows.most,
        )

    def verify(
        self, sampler: Any, logits: torch.Tensor, input_batch: Any, invalid_drafts: torch.Tensor | None
    ) -> SamplerOutput:
        """In place of vLLM's rejection sampler, in a step with drafts.

        Args:
            sampler: vLLM's ``RejectionSampler``.
            logits: ``[R, vocab]`` of the step's verified rows.
            invalid_drafts: ``bool[R]`` rows whose draft a grammar does not allow; None: there are none.
        """
        plain = sampler.sampler
        num_nans = get_num_nans(logits) if plain.compute_nans else None
        count = input_batch.num_reqs
        at = input_batch.logits_indices
        shown, positions = input_batch.input_ids[at], input_batch.positions[at]
        contexts = positions - self.rows.depths[at]
        # A draft before the end of the prompt is a placeholder (the first step after a remote prefill is padded).
        prefill = plain.req_states.prefill_len.gpu[input_batch.expanded_idx_mapping]
        drafts = torch.where((input_batch.expanded_local_pos > 0) & (contexts < prefill), -1, shown)
        if invalid_drafts is not None:
            drafts = drafts.masked_fill(invalid_drafts, -1)
        wanted = plain.sampling_states.max_num_logprobs(input_batch.idx_mapping_np)
        drawn, processed = self._draw(plain, logits, input_batch, positions, shown, wanted != NO_LOGPROBS)

        tokens, paths, sources, targets = (table[:count] for table in self._tables)
        lengths = self._lengths[:count]
        verified = input_batch.cu_num_logits
        tree_walk(
            verified,
            self.rows.parents[at],
            drafts.int(),
            drawn,
            (input_batch.seq_lens[:count] - (verified[1:] - verified[:-1])).int(),
            *(tokens, paths, lengths, self._last[:count], sources, targets),
            self.rows.most,
        )
        assert self.rows.table is not None
        for mover in self._movers:
            kv_move(mover, self.rows.table, sources, targets)
        # Copies: what is returned is still read when the next step's walk is on its way.
        sampled, num_sampled = tokens.long(), lengths.clone()
        logprobs = None
        if wanted != NO_LOGPROBS:
            # vLLM takes the i-th token to be of the request's i-th row: rows are put in that order.
            order = _by_path(paths, verified, len(at))
            logprobs = sampler._get_logprobs_tensors(
                sampled, num_sampled, processed[order], verified, input_batch.cu_num_logits_np, wanted
            )
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            num_sampled, input_batch.seq_lens, verified, input_batch.idx_mapping, plain.req_states.prefill_len.gpu
        )
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _draw(
        self,
        sampler: Any,
        logits: torch.Tensor,
        batch: Any,
        positions: torch.Tensor,
        shown: torch.Tensor,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each row, ``int64[R]``, and the logits that logprobs are taken of, if ``keep``.

        In parts, as in vLLM's own, for a processed copy of all logits may take too much memory.
        """
        processed_wanted = keep and sampler.logprobs_mode in rejection_sampler.PROCESSED_LOGPROBS_MODES
        most = rejection_sampler.get_max_chunk_logits(logits.shape[1])
        ends = batch.cu_num_logits_np
        parts: Any = ((0, batch.num_reqs),)
        if len(logits) > most:
            parts = rejection_sampler._iter_request_chunks(ends, most)
        drawn, processed = [], []
        for first, last in parts:
            rows, requests = slice(int(ends[first]), int(ends[last])), slice(first, last)
            tokens, changed = sampler.sample(
                logits[rows],
                batch.expanded_idx_mapping[rows],
                batch.idx_mapping[requests],
                batch.idx_mapping_np[requests],
                positions[rows],
                shown[rows],
                batch.expanded_local_pos[rows],
                batch.seq_lens_cpu_upper_bound.numpy()[requests],
                return_logprobs=keep,
            )
            drawn.append(tokens.view(-1))
            if processed_wanted:
                processed.append(changed)
        return torch.cat(drawn), torch.cat(processed) if processed_wanted else logits


def _by_path(paths: torch.Tensor, starts: torch.Tensor, rows: int) -> torch.Tensor:
    """``int64[rows]`` the step's rows, each request's accepted path first; what follows it is any of its rows."""
    count, depth = paths.shape
    sizes = (starts[1:] - starts[:-1]).long()
    request = torch.repeat_interleave(torch.arange(count, device=paths.device), sizes, output_size=rows)
    first = starts.long()[request]
    place = torch.arange(rows, device=paths.device) - first
    return first + paths[request, place.clamp(max=depth - 1)].clamp(min=0)


def may_branch(sampler: Any, slot: int, params: Any) -> bool:
    """Whether the drafts of a request may branch: nothing that is asked of its logits looks at the rows before."""
    return bool(
        eligibility.limits_for(params)[0] == "tree"
        and not sampler.penalties_state.use_penalty[slot]
        and not params.bad_words_token_ids
        and len(sampler.logits_processors) == _OWN_PROCESSORS
    )
