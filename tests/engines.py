"""Real vLLM engines inside the test process, so that a test can look at the proposer's counters."""

from __future__ import annotations

import contextlib
import os
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / ".models" / "smollm2-135m"

_kept: list[Any] = []

RETRIEVAL = {"method": "custom_class", "model": "vllm_specplug.Retrieval", "num_speculative_tokens": 8}
AUTO = {"method": "custom_class", "model": "vllm_specplug.Auto", "num_speculative_tokens": 8}


def make_tiny_llama(path: Path, vocab_size: int, **sizes: int) -> Path:
    """Save a random-weight Llama: 2 layers, 8 heads, 4 KV heads, head size 32, or as ``sizes`` (of its configuration)
    say. Its weights are drawn wide, so that its distributions are peaked like a real model's and not near uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    usual = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
    }
    config = LlamaConfig(vocab_size=vocab_size, bos_token_id=None, eos_token_id=None, **(usual | sizes))
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, 0.1)
    model.save_pretrained(path)
    return path


@contextlib.contextmanager
def engine(model: Path, speculative_config: dict[str, Any] | None = None, **settings: Any) -> Iterator[Any]:
    """A ``vllm.LLM`` whose engine core runs in this process; float32 and eager unless told otherwise.

    It is neither shut down nor dropped: both destroy the process groups that every engine of this process uses.
    Its KV cache and weights, which are most of its memory, are freed.
    """
    from vllm import LLM

    defaults = {
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "disable_log_stats": False,
        "seed": 0,
    }
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # Only while it starts: other tests start servers, which must not inherit it.
    with unittest.mock.patch.dict(os.environ, environment):
        llm = LLM(model=str(model), speculative_config=speculative_config, **(defaults | settings))
    _kept.append(llm)
    try:
        yield llm
    finally:
        runner = runner_of(llm)
        runner.kv_caches.clear()
        # What the plugin prepared for the caches holds on to them.
        trees = getattr(getattr(runner, "drafter", None), "trees", None)
        if trees is not None:
            trees.backend = None
        for layer in runner.compilation_config.static_forward_context.values():
            layer.kv_cache = None
        for parameter in runner.get_model().parameters():
            parameter.data = torch.empty(0)
        for module in runner.get_model().modules():
            vars(module).pop("cpu_linear", None)  # on CPUs it holds the weights in an order of its own


def runner_of(llm: Any) -> Any:
    """The model runner behind an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def lifecycle_of(llm: Any) -> Any:
    """The plugin's lifecycle inside an in-process engine."""
    return runner_of(llm).drafter.lifecycle


def metric(llm: Any, name: str) -> float:
    """One of vLLM's own counters, summed over its labels."""
    values = [m.value for m in llm.get_metrics() if m.name == name]
    assert values, f"vLLM has no metric {name}"
    return sum(values)


def encode(llm: Any, messages: list[str]) -> list[dict[str, list[int]]]:
    """Chat prompts as token ids, for ``LLM.generate``."""
    tokenizer = llm.get_tokenizer()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": m}], tokenize=False, add_generation_prompt=True)
        for m in messages
    ]
    return [{"prompt_token_ids": tokenizer(t, add_special_tokens=False)["input_ids"]} for t in texts]


def greedy(llm: Any, prompts: list[dict[str, list[int]]], max_tokens: int, concurrency: int) -> list[list[int]]:
    """Greedy output token ids; at most ``concurrency`` requests at once (the engine's own limit is above it)."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    if concurrency > 1:
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]
    return [list(llm.generate(p, params, use_tqdm=False)[0].outputs[0].token_ids) for p in prompts]
