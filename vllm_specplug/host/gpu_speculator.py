"""Drafting on the device in vLLM's Model Runner V2, whose scheduler does not wait for tokens.

V2 has no custom proposers. It is reached by ``{"method": "ngram_gpu", "model": "vllm_specplug.Auto", ...}``, which vLLM
takes for its own GPU n-grams and keeps asynchronous scheduling for, and by a worker of this plugin's own
(:mod:`.gpu_worker`), which puts :class:`DeviceSpeculator` in their place. Drafts are chains of the full length, since
their number is fixed before they are known.

Never run on a GPU by its authors: what is here is tested on tensors of the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_specplug import registry
from vllm_specplug.host import patching
from vllm_specplug.proposers.device_drafts import DeviceDrafts

#: What each proposer that V2 can hold drafts from: (the request's own text, the target's earlier guesses).
SOURCES = {"Auto": (True, True), "Retrieval": (True, False), "TokenRecycling": (False, True)}

# By the request states that the engine's runner and its samplers share.
_speculators: weakref.WeakKeyDictionary[Any, DeviceSpeculator] = weakref.WeakKeyDictionary()


class DeviceSpeculator(BaseSpeculator):
    """:class:`DeviceDrafts` as vLLM's speculator."""

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any, name: str) -> None:
        """
        Args:
            name: one of :data:`SOURCES`.
        """
        match, recycle = SOURCES[name]
        # Each rank may see the logits of some requests only, and would learn something else.
        recycle = recycle and vllm_config.parallel_config.tensor_parallel_size == 1
        self.vllm_config, self.device = vllm_config, device
        self.speculative_config = vllm_config.speculative_config
        self.num_speculative_steps: int = self.speculative_config.num_speculative_tokens
        self._req_states = weakref.proxy(req_states)
        self.drafts = DeviceDrafts(
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.get_vocab_size(),
            self.num_speculative_steps,
            device,
            match or not recycle,
            recycle,
        )
        _speculators[req_states] = self

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
        if dummy_run:
            return torch.zeros(count, self.num_speculative_steps, dtype=torch.int64, device=self.device)
        rows = input_batch.idx_mapping[:count]
        states = self._req_states
        last = last_sampled.view(-1)[rows]
        return self.drafts.propose(states.all_token_ids.gpu, states.total_len.gpu, rows, last)

    @torch.inference_mode()
    def observe(self, logits: torch.Tensor, input_batch: Any) -> None:
        """Learn from the logits of a step, before they are changed in place."""
        self.drafts.observe(input_batch.input_ids[input_batch.logits_indices], logits)


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
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    patching.wrap(model_runner, "init_speculator", _init_speculator)
    for sampler in (Sampler, RejectionSampler):
        patching.wrap(sampler, "__call__", _sampler_call)


def uninstall() -> None:
    """Undo :func:`install`."""
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    patching.unwrap(model_runner, "init_speculator")
    for sampler in (Sampler, RejectionSampler):
        patching.unwrap(sampler, "__call__")


def _init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_speculator(vllm_config: Any, device: torch.device, req_states: Any) -> Any:
        """Build this plugin's speculator where one of its proposers is named. The runner looks this name up in its own
        module, once, when it is made; other methods are left alone."""
        name = proposer_of(vllm_config.speculative_config)
        if name is None:
            return original(vllm_config, device, req_states)
        return DeviceSpeculator(vllm_config, device, req_states, name)

    return init_speculator


def _sampler_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(self: Any, logits: torch.Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Show a step's logits to the engine's speculator. The one place where V2 holds them; the rejection sampler
        does not call the sampler's ``__call__``, so each step is seen once."""
        states = getattr(self, "req_states", None)
        if states is None:
            states = getattr(getattr(self, "sampler", None), "req_states", None)
        speculator = _speculators.get(states) if states is not None else None
        if speculator is not None:
            speculator.observe(logits, input_batch)
        return original(self, logits, input_batch, *args, **kwargs)

    return __call__
