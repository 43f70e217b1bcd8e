"""Patches to vLLM's V1 model runner: the few places where the plugin must see more than ``propose`` is told.

vLLM's ``custom_class`` hands a proposer sampled tokens by batch row, but no request ids, lifetimes, sampling
parameters or logits. Each patch below acts only on a runner whose ``drafter`` is a :class:`RunnerHooks`, so
servers that load the plugin without selecting one of its proposers run vLLM's own code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from vllm_specplug.host import patching


@runtime_checkable
class RunnerHooks(Protocol):
    """What a drafter implements to be called from the runner."""

    is_specplug: bool

    def on_kv_cache(self, runner: Any) -> None:
        """The KV cache and the attention layers' metadata builders were made, at start or anew."""

    def on_states_updated(self, scheduler_output: Any) -> None:
        """After the runner has applied the scheduler's decision, before the forward pass."""

    def on_inputs(
        self, runner: Any, scheduler_output: Any, num_scheduled_tokens: Any, spec_decode_metadata: Any
    ) -> None:
        """After the runner has filled its input buffers, before it describes them to the attention layers."""

    def verify(self, runner: Any, logits: Any, spec_decode_metadata: Any, original: Callable[..., Any]) -> Any:
        """In place of the runner's ``_sample``, whose ``original`` takes ``(runner, logits, spec_decode_metadata)``:
        vLLM's ``SamplerOutput`` of the step."""

    def bookkeeping(self, runner: Any) -> AbstractContextManager[None]:
        """Around the runner's own bookkeeping of the tokens sampled."""

    def close(self) -> None:
        """The engine ends."""

    def draft(
        self, runner: Any, scheduler_output: Any, sampled_token_ids: list[list[int]], spec_decode_metadata: Any
    ) -> list[list[int]]:
        """After sampling: the next step's draft tokens, one list per batch row."""


def install() -> None:
    """Patch the runner class. Idempotent; called when vLLM builds one of this plugin's proposers.

    Raises:
        patching.HostSymbolMissing: naming the method this vLLM lacks.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for name, make in _PATCHES.items():
        patching.wrap(GPUModelRunner, name, make)
    with contextlib.suppress(patching.HostSymbolMissing):  # the interpreter's end does it too, where it is reached
        patching.wrap(GPUModelRunner, "shutdown", _shutdown)


def uninstall() -> None:
    """Undo :func:`install`."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for name in (*_PATCHES, "shutdown"):
        patching.unwrap(GPUModelRunner, name)


def _hooks(runner: Any) -> RunnerHooks | None:
    # Only the last pipeline rank has a drafter.
    drafter = getattr(runner, "drafter", None)
    return drafter if getattr(drafter, "is_specplug", False) else None


def _update_states(original: Callable[..., Any]) -> Callable[..., Any]:
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        """Tell the drafter which requests ended. Called once per step by every runner, also for the empty step
        that only reports finished requests, so state is freed when a server falls idle."""
        result = original(self, scheduler_output)
        if (hooks := _hooks(self)) is not None:
            hooks.on_states_updated(scheduler_output)
        return result

    return _update_states


def _sample(original: Callable[..., Any]) -> Callable[..., Any]:
    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        """Hand the step's logits to the drafter, in place of vLLM's rejection sampler. The one place where the runner
        holds the logits of all verified rows, before anything changes them in place but the grammars' masks."""
        if (hooks := _hooks(self)) is not None:
            return hooks.verify(self, logits, spec_decode_metadata, original)
        return original(self, logits, spec_decode_metadata)

    return _sample


def _initialize_kv_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Tell the drafter that the caches are there. Every V1 runner's own method ends up in this one."""
        result = original(self, *args, **kwargs)
        if (hooks := _hooks(self)) is not None:
            hooks.on_kv_cache(self)
        return result

    return initialize_kv_cache


def _prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        """Let the drafter change the rotary positions of the rows to verify. Cache slots are computed from positions
        before that, in the original; nothing computes them again."""
        result = original(self, scheduler_output, num_scheduled_tokens)
        if (hooks := _hooks(self)) is not None:
            hooks.on_inputs(self, scheduler_output, num_scheduled_tokens, result[1])
        return result

    return _prepare_inputs


def _bookkeeping_sync(original: Callable[..., Any]) -> Callable[..., Any]:
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Let the drafter mend what vLLM does to the generators of discarded tokens, see host/cpu_sampling.py. Called
        once per step that samples, by every V1 runner."""
        if (hooks := _hooks(self)) is None:
            return original(self, *args, **kwargs)
        with hooks.bookkeeping(self):
            return original(self, *args, **kwargs)

    return _bookkeeping_sync


def _input_fits_in_drafter(original: Callable[..., Any]) -> Callable[..., Any]:
    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        """Always draft: this plugin clamps each request to its own room. vLLM's check looks at the longest
        request only, and when that one nears ``max_model_len`` gives every request K dummy tokens to verify."""
        if _hooks(self) is not None:
            return common_attn_metadata is not None
        return original(self, common_attn_metadata)

    return _input_fits_in_drafter


def _propose_draft_token_ids(original: Callable[..., Any]) -> Callable[..., Any]:
    def propose_draft_token_ids(
        self: Any, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Call the drafter with the runner and the scheduler's output. Every V1 runner (GPU, CPU, XPU) drafts
        through this method; other drafters are left alone."""
        if (hooks := _hooks(self)) is not None:
            metadata = kwargs["spec_decode_metadata"] if "spec_decode_metadata" in kwargs else args[_METADATA_ARG]
            return hooks.draft(self, scheduler_output, sampled_token_ids, metadata)
        return original(self, scheduler_output, sampled_token_ids, *args, **kwargs)

    return propose_draft_token_ids


def _shutdown(original: Callable[..., Any]) -> Callable[..., Any]:
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Let the drafter save what it learned, while everything is still there. Called once, when an engine ends."""
        if (hooks := _hooks(self)) is not None:
            hooks.close()
        return original(self, *args, **kwargs)

    return shutdown


# Position of spec_decode_metadata among the arguments after sampled_token_ids: sampling_metadata,
# hidden_states, sample_hidden_states, aux_hidden_states come before it.
_METADATA_ARG = 4

_PATCHES: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "initialize_kv_cache": _initialize_kv_cache,
    "_prepare_inputs": _prepare_inputs,
    "_update_states": _update_states,
    "_sample": _sample,
    "_bookkeeping_sync": _bookkeeping_sync,
    "_input_fits_in_drafter": _input_fits_in_drafter,
    "propose_draft_token_ids": _propose_draft_token_ids,
}
