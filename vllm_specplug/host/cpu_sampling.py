"""Keeps vLLM's CPU backend from sampling with uninitialised memory where a speculating server warms up.

vLLM's CPU stand-in for the Triton kernel behind ``expand_batch_to_tokens`` writes to a converted copy of its output
and drops it (utils/cpu_triton_utils.py:_expand_kernel_impl in 0.28 to 0.32; vLLM issue 55005), so the verification of
every sampled draft reads uninitialised memory as temperature, top-k and top-p: wrong distributions with any proposer,
vLLM's own included, or an index out of bounds. The plugin verifies without it, but a server that compiles its model
runs it once at start all the same (gpu_model_runner.py:_dummy_sampler_run).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_specplug.host import patching


def install() -> None:
    """Patch vLLM's rejection sampler on the CPU platform; elsewhere its Triton kernel is right. Idempotent.

    Raises:
        patching.HostSymbolMissing: naming the function this vLLM lacks.
    """
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if current_platform.is_cpu():
        patching.wrap(rejection_sampler, "expand_batch_to_tokens", _make)


def uninstall() -> None:
    """Undo :func:`install`."""
    from vllm.v1.sample import rejection_sampler

    patching.unwrap(rejection_sampler, "expand_batch_to_tokens")


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        """Per-request values ``x`` (``[batch]``) repeated for each request's draft rows (``[num_tokens]``), with
        ``replace_from`` turned into ``replace_to``. All callers are in that module and look the name up there."""
        sizes = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        expanded = torch.repeat_interleave(x, sizes, output_size=num_tokens)
        if replace_from != replace_to:
            expanded.masked_fill_(expanded == replace_from, replace_to)
        return expanded

    return expand_batch_to_tokens
