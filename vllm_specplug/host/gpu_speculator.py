"""Drafting on the device in vLLM's Model Runner V2, whose scheduler does not wait for tokens.

V2 has no custom proposers. It is reached by ``{"method": "ngram_gpu", "model": "vllm_specplug.Auto", ...}``, which vLLM
takes for its own GPU n-grams and keeps asynchronous scheduling for, and by a worker of this plugin's own
(:mod:`.gpu_worker`), which puts :class:`DeviceSpeculator` in their place. The number of drafts is fixed before they are
known; what they are never leaves the device. Where trees can be verified (:mod:`.device_trees`) they may branch.

Never run on a GPU by its authors: it is tested in vLLM's engine on a CPU, kernels in Triton's interpreter.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_specplug import registry
from vllm_specplug.host import compat, device_trees, gpu_attention, patching
from vllm_specplug.host.device_trees import DeviceTrees
from vllm_specplug.host.trees import Ranks
from vllm_specplug.proposers.device_drafts import DeviceDrafts

logger = logging.getLogger("vllm.specplug")

#: What each proposer that V2 can hold drafts from: (the request's own text, the target's earlier guesses).
SOURCES = {"Auto": (True, True), "Retrieval": (True, False), "TokenRecycling": (False, True)}

# By the request states that the engine's runner and its samplers share.
_speculators: weakref.WeakKeyDictionary[Any, DeviceSpeculator] = weakref.WeakKeyDictionary()


class DeviceSpeculator(BaseSpeculator):
    """:class:`DeviceDrafts` as vLLM's speculator.

    Of tensor-parallel ranks the first one drafts and the others get its drafts, so that no fault on one of them lets
    them run different tokens.

    Attributes:
        trees: verifies drafts that branch; None: all drafts are chains, verified by vLLM.
        failed: drafting raised; from then on every draft is the token 0, which costs rows and no answer. Where there is
            a budget, it stops drafting.
    """

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any, name: str) -> None:
        """
        Args:
            name: one of :data:`SOURCES`.
        """
        match, recycle = SOURCES[name]
        parallel = vllm_config.parallel_config
        # The rank that drafts sees the logits of some requests only, and would draft for the others by none.
        recycle = recycle and not getattr(parallel, "enable_batch_sharded_sampling", False)
        self._ranks = Ranks() if parallel.tensor_parallel_size > 1 else None
        self.vllm_config, self.device = vllm_config, device
        self.speculative_config = vllm_config.speculative_config
        self.num_speculative_steps: int = self.speculative_config.num_speculative_tokens
        self._req_states = weakref.proxy(req_states)
        self._resting = self.failed = False
        seats = vllm_config.scheduler_config.max_num_seqs
        self._none = torch.zeros(seats, self.num_speculative_steps, dtype=torch.int64, device=device)
        self.trees: DeviceTrees | None = None
        reason = _no_trees(vllm_config) if recycle else "there is nothing to branch to"
        self.drafts = DeviceDrafts(
            seats,
            vllm_config.model_config.get_vocab_size(),
            self.num_speculative_steps,
            device,
            match or not recycle,
            recycle,
            branching=not reason,
        )
        if not reason:
            self.trees = DeviceTrees(vllm_config, device, self.drafts.trees)
            self.trees.install()
        else:
            logger.info("vllm-specplug: drafts on the device are chains: %s.", reason)
        _speculators[req_states] = self

    def on_model_loaded(self) -> None:
        """The model's layers are made: other models of this process get vLLM's own attention again."""
        if self.trees is not None:
            gpu_attention.uninstall()

    def on_kv_cache(self, runner: Any, is_profiling: bool) -> None:
        """The KV cache was made."""
        if not is_profiling:
            states = self._req_states
            self.drafts.warm_up(states.all_token_ids.gpu, states.total_len.gpu)
        if self.trees is None:
            return
        self.trees.attach_runner(runner, is_profiling, None if self._ranks is None else self._ranks.agree)
        if not is_profiling and (self._ranks is None or self._ranks.is_first):
            reason = self.trees.reason
            logger.info(
                "vllm-specplug: drafts on the device %s.", f"are chains: {reason}" if reason else "may be trees"
            )

    def on_request(self, sampler: Any, slot: int, params: Any) -> None:
        """A request with these ``SamplingParams`` begins in a slot, or goes on after it was preempted."""
        trees = self.trees is not None and not self.trees.reason
        self.drafts.add_request(slot, trees and device_trees.may_branch(sampler, slot, params))

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing: no model is run."""

    def capture(self) -> None:
        """Nothing, likewise."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """``int64[num_reqs, K]`` drafts, by row of the batch; see vLLM's."""
        count = input_batch.num_reqs
        # Where drafts do not pay, steps are vLLM's own: nothing is drafted, and nothing learned until they do again.
        self._resting = num_speculative_tokens == 0 and not dummy_run
        if self._resting:
            return self._none[:count]
        slots = input_batch.idx_mapping[:count]
        if dummy_run:
            return self._none[:count].zero_()
        if self._ranks is None:
            return self._draft(slots, last_sampled)
        return self._shared(self._draft(slots, last_sampled) if self._ranks.is_first else None, slots)

    def _draft(self, slots: torch.Tensor, last_sampled: torch.Tensor) -> torch.Tensor:
        states = self._req_states
        if not self.failed:
            try:
                last = last_sampled.view(-1)[slots]
                return self.drafts.propose(states.all_token_ids.gpu, states.total_len.gpu, slots, last)
            except Exception:
                self._fail("drafting")
        # Where nothing was to be drafted, vLLM marked these as no tokens.
        return self._none[: len(slots)].zero_()

    def _shared(self, drafts: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
        """The first rank's drafts and their trees, on all ranks; ``drafts``: on the first one."""
        assert self._ranks is not None
        steps, trees = self.num_speculative_steps, self.drafts.trees
        message = torch.empty(len(slots), 2 * steps, dtype=torch.int32, device=self.device)
        if drafts is not None:
            message[:, :steps] = drafts
            message[:, steps:] = trees[slots]
        self._ranks.share_on_device(message)
        if drafts is None:
            trees[slots] = message[:, steps:]
        return message[:, :steps].long()

    @torch.inference_mode()
    def observe(self, logits: torch.Tensor, input_batch: Any) -> None:
        """Learn from the logits of a step, before they are changed in place."""
        if self._resting or self.failed or (self._ranks is not None and not self._ranks.is_first):
            return
        try:
            self.drafts.observe(input_batch.input_ids[input_batch.logits_indices], logits)
        except Exception:
            self._fail("learning")

    def _fail(self, what: str) -> None:
        self.failed = True
        logger.exception("vllm-specplug: %s on the device failed; no more drafts.", what)


def _no_trees(vllm_config: Any) -> str:
    """Why no draft may branch; empty if they may."""
    if not registry.parse_options(vllm_config.additional_config).general.gpu_trees:
        return "the option gpu_trees is not set"
    missing = compat.missing_for_device_trees()
    if missing:
        return f"this vLLM lacks {', '.join(missing)}"
    return device_trees.config_reason(vllm_config)


def proposer_of(speculative_config: Any) -> str | None:
    """The proposer of this plugin that V2 is to hold, by name; None: there is none."""
    model = str(getattr(speculative_config, "model", "") or "")
    if speculative_config.method != "ngram_gpu" or not model.startswith(registry.PACKAGE + "."):
        return None
    return registry.find(model.removeprefix(registry.PACKAGE + ".")).name


def install() -> None:
    """Patch V2's runner and samplers, in the worker's process. Idempotent.

    Raises:
        patching.HostSymbolMissing: naming what this vLLM lacks.
    """
    for owner, name, make in _patches():
        patching.wrap(owner, name, make)


def uninstall() -> None:
    """Undo :func:`install`."""
    for owner, name, _ in _patches():
        patching.unwrap(owner, name)


def _patches() -> list[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]]:
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    runner = model_runner.GPUModelRunner
    return [
        (model_runner, "init_speculator", _init_speculator),
        (runner, "load_model", _load_model),
        (runner, "initialize_kv_cache", _initialize_kv_cache),
        (runner, "prepare_attn", _prepare_attn),
        (Sampler, "add_request", _add_request),
        (Sampler, "__call__", _sampler_call),
        (RejectionSampler, "__call__", _sampler_call),
    ]


def _init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_speculator(vllm_config: Any, device: torch.device, req_states: Any) -> Any:
        """Build this plugin's speculator where one of its proposers is named. The runner looks this name up in its own
        module, once, when it is made; other methods are left alone."""
        name = proposer_of(vllm_config.speculative_config)
        if name is None:
            return original(vllm_config, device, req_states)
        return DeviceSpeculator(vllm_config, device, req_states, name)

    return init_speculator


def _of(runner: Any) -> DeviceSpeculator | None:
    speculator = getattr(runner, "speculator", None)
    return speculator if isinstance(speculator, DeviceSpeculator) else None


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Tell the speculator that the layers are made, which is when they choose their attention."""
        result = original(self, *args, **kwargs)
        if (speculator := _of(self)) is not None:
            speculator.on_model_loaded()
        return result

    return load_model


def _initialize_kv_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_kv_cache(self: Any, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any) -> Any:
        """Tell the speculator that the caches are there, and the builders of the attention's metadata."""
        result = original(self, kv_cache_config, is_profiling, **kwargs)
        if (speculator := _of(self)) is not None:
            speculator.on_kv_cache(self, is_profiling)
        return result

    return initialize_kv_cache


def _prepare_attn(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_attn(self: Any, input_batch: Any) -> Any:
        """Describe the step's trees: their rows' positions change after the cache slots were computed from them, which
        is done here, in every real step, and nothing computes them again."""
        result = original(self, input_batch)
        speculator = _of(self)
        if speculator is not None and speculator.trees is not None:
            speculator.trees.begin_step(input_batch)
        return result

    return prepare_attn


def _speculator_of(sampler: Any) -> DeviceSpeculator | None:
    states = getattr(sampler, "req_states", None)
    if states is None:
        states = getattr(getattr(sampler, "sampler", None), "req_states", None)
    return _speculators.get(states) if states is not None else None


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, req_idx: int, sampling_params: Any) -> Any:
        """Let the speculator note what a request's parameters allow: V2 hands them to its sampler alone."""
        result = original(self, req_idx, sampling_params)
        if (speculator := _speculator_of(self)) is not None:
            speculator.on_request(self, req_idx, sampling_params)
        return result

    return add_request


def _sampler_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(self: Any, logits: torch.Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Show a step's logits to the engine's speculator, and have it verify drafts that may branch. The one place
        where V2 holds the logits; the rejection sampler does not call the sampler's ``__call__``, so each step is seen
        once."""
        speculator = _speculator_of(self)
        if speculator is None:
            return original(self, logits, input_batch, *args, **kwargs)
        speculator.observe(logits, input_batch)
        trees = speculator.trees
        if trees is None or not trees.rows.active or not hasattr(self, "sampler"):
            return original(self, logits, input_batch, *args, **kwargs)
        invalid = kwargs.get("invalid_drafts", args[1] if len(args) > 1 else None)
        return trees.verify(self, logits, input_batch, invalid)

    return __call__
