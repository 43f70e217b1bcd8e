"""What vLLM's model runner knows of a request, as the plugin needs it. Imports no vLLM."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_specplug.proposers.base import Int32Array

#: Request-body field (``vllm_xargs``) naming the tenant whose learned state a request may share.
TENANT_ARG = "specplug_tenant"


def tokens_of(runner: Any, row: int, request_id: str) -> tuple[Int32Array, int]:
    """Every token that the request in batch row ``row`` holds now, ``int32[n]``, and how many of them are output.
    -1 where there is no token id."""
    state = runner.requests[request_id]
    total = int(runner.input_batch.num_tokens_no_spec[row])
    tokens = runner.input_batch.token_ids_cpu[row, :total].astype(np.int32)
    num_output = len(state.output_token_ids)
    if state.prompt_token_ids is None:  # prompt embeddings: there are no ids
        tokens[: total - num_output] = -1
    for feature in state.mm_features or ():
        tokens[feature.mm_position.offset : feature.mm_position.offset + feature.mm_position.length] = -1
    return tokens, num_output


def most_tokens(params: Any, prompt: int, max_model_len: int) -> int:
    """The most tokens that a request with these ``SamplingParams`` and ``prompt`` tokens before its output can hold."""
    return max_model_len if params.max_tokens is None else min(max_model_len, prompt + params.max_tokens)


def namespace_of(state: Any) -> str:
    """Whose learned state the request with this ``CachedRequestState`` may share."""
    extra = state.sampling_params.extra_args or {}
    lora = state.lora_request.lora_name if state.lora_request is not None else ""
    # Two free-form names: repr keeps ("a", "b") apart from ("a'", ...) spellings that would collide.
    return repr((str(extra.get(TENANT_ARG, "")), lora))


def data_parallel_index(vllm_config: Any) -> int:
    """Which of a server's data-parallel engines this is; for dense models vLLM sets the rank to 0 in all of them
    (v1/engine/core.py)."""
    parallel = vllm_config.parallel_config
    return int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))
