"""The embedded model as a mixture of experts, and steps whose verified rows are known before any host says so."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import REPOSITORY, runner_of

from vllm_specplug.cli import model
from vllm_specplug.host.sparse_step import SparseStep

MOE_MODEL = REPOSITORY / ".models" / "smollm2-135m-moe"
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def moe_model() -> Path:
    """Its checkpoint, made if it is not there (minutes, once)."""
    if not model.is_exported(MOE_MODEL):
        model.export(MOE_MODEL, moe=True, force=MOE_MODEL.exists())
    return MOE_MODEL


@contextlib.contextmanager
def verify_groups(llm: Any, step: SparseStep, seen: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Fill ``step`` before each forward pass with the rows of requests whose prompt is computed, as a host would;
    ``seen`` is called after that."""
    runner = runner_of(llm)
    prepare = runner._prepare_inputs

    def prepare_inputs(scheduler_output: Any, *args: Any, **others: Any) -> Any:
        result = prepare(scheduler_output, *args, **others)
        batch = runner.input_batch
        first, groups = 0, []
        for i, request in enumerate(batch.req_ids):
            rows = scheduler_output.num_scheduled_tokens[request]
            if batch.num_computed_tokens_cpu[i] >= batch.num_prompt_tokens[i]:
                groups.append((first, rows))
            first += rows
        step.groups = np.array(groups, np.int32) if groups else None
        step.num_rows = first
        seen()
        return result

    with unittest.mock.patch.object(runner, "_prepare_inputs", prepare_inputs):
        try:
            yield
        finally:
            step.clear()


@contextlib.contextmanager
def kernel_calls(calls: list[torch.Tensor]) -> Iterator[None]:
    """Append the expert ids ``[rows, slots]`` of each call of vLLM's fused kernel to ``calls``."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    kernel = cpu_moe.cpu_fused_moe

    def watched(*args: Any, **others: Any) -> Any:
        # The position differs between versions; nothing else is of integers.
        calls.extend(a.clone() for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int32)
        return kernel(*args, **others)

    with unittest.mock.patch.object(cpu_moe, "cpu_fused_moe", watched):
        yield


def make_tiny_moe(path: Path) -> Path:
    """Save a random-weight mixture of experts: 2 layers, 8 experts of 64 channels, 4 of them per token."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen2MoeForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, 0.1)
    model.save_pretrained(path)
    return path
