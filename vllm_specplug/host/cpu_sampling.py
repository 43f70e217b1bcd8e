"""Two faults of sampling on vLLM's CPU backend, mended for servers with one of this plugin's proposers.

Uninitialised memory where a speculating server warms up: vLLM's CPU stand-in for the Triton kernel behind
``expand_batch_to_tokens`` writes to a converted copy of its output and drops it
(utils/cpu_triton_utils.py:_expand_kernel_impl in 0.28 to 0.32; vLLM issue 55005), so the verification of every sampled
draft reads uninitialised memory as temperature, top-k and top-p: wrong distributions with any proposer, vLLM's own
included, or an index out of bounds. The plugin verifies without it, but a server that compiles its model runs it once
at start all the same (gpu_model_runner.py:_dummy_sampler_run).

An engine that ends when a request with a seed is prefilled in more than one step: vLLM takes back the draws of tokens
it discards by a generator's offset (gpu_model_runner.py:_bookkeeping_sync), and CPU generators have none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
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


def discarded_draws(runner: Any) -> dict[int, torch.Tensor]:
    """Before sampling: the generators' states of the batch rows whose token this step discards. Empty but on CPUs."""
    generators = runner.input_batch.generators
    if not generators or runner.device.type != "cpu":
        return {}
    rows = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs]).tolist()
    return {row: generators[row].get_state() for row in rows if row in generators}


@contextlib.contextmanager
def taking_back(runner: Any, states: dict[int, torch.Tensor]) -> Iterator[None]:
    """Around the runner's bookkeeping: it finds no generators to set back, and they are set back to ``states``."""
    generators = runner.input_batch.generators
    held = {row: generators.pop(row) for row in states}
    try:
        yield
    finally:
        for row, generator in held.items():
            generator.set_state(states[row])
        generators.update(held)
