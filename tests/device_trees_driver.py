"""Runs engines whose draft trees stay on the device, beside engines without speculation, for `test_device_trees.py`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import device_engines
import interpreted
import torch
from device_engines import PROMPTS, VOCAB, runner_of
from engines import MODEL, make_tiny_llama
from transformers import MistralConfig, MistralForCausalLM
from vllm import LLM, SamplingParams, platforms
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_specplug.host import device_trees, gpu_attention

# Programs run one after another here, those that join splits too, one for each row and head.
gpu_attention._SPLITS = 1

# The interpreter does not take vLLM's kernel of top-k and top-p.
topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch

#: Prompts, and what is asked of each.
Requests = list[tuple[list[int], SamplingParams]]

_folder = tempfile.TemporaryDirectory(prefix="specplug-trees-")
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
NODES = 7


def model(window: int | None = None) -> Path:
    """A model that is quick to attend with, of two layers and KV heads; ``window``: tokens that a row sees.

    Its queries and keys are wide, so that what a row attends to, and from where, decides its tokens.
    """
    path = Path(_folder.name) / f"model-{window}"
    if path.exists():
        return path
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB, num_hidden_layers=2, sliding_window=window, bos_token_id=None, eos_token_id=None, **SIZES
    )
    made = MistralForCausalLM(config)
    with torch.no_grad():
        made.lm_head.weight.normal_(0.0, 0.1)
        for layer in made.model.layers:
            layer.self_attn.q_proj.weight.mul_(8.0)
            layer.self_attn.k_proj.weight.mul_(8.0)
    made.save_pretrained(path)
    return path


def trees(
    nodes: int = NODES, window: int | None = None, budget: bool = False, proposer: str = "Auto", **settings: Any
) -> LLM:
    """An engine that drafts trees on the device and attends them in one of vLLM's backends for GPUs.

    Args:
        budget: their size is what pays, by the clock; else always the same.
    """
    interpreted.attend_with(f"{device_trees.__name__}.{interpreted.BACKEND}")
    always = {"auto": {"policy": "fixed", "length": nodes}}
    usual = {
        "block_size": 16,
        "additional_config": {"specplug": {"gpu_trees": True} | ({} if budget else always)},
        "model": model(window),
    }
    try:
        return device_engines.engine(proposer, nodes, **(usual | settings))
    finally:
        interpreted.attend_as_usual()


def plain(window: int | None = None, **settings: Any) -> LLM:
    """One engine for each model without speculation, in vLLM's own attention for CPUs."""
    settings = {"model": model(window), "skip_tokenizer_init": True} | settings
    key = str(settings["model"])
    if key not in _plain:
        _plain[key] = device_engines.engine(
            None, model=settings["model"], skip_tokenizer_init=settings["skip_tokenizer_init"]
        )
    return _plain[key]


_plain: dict[str, LLM] = {}


def generate(llm: LLM, requests: Requests) -> list[Any]:
    """Tokens of every request, why it ended, and its logprobs."""
    inputs = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    outputs = llm.generate(inputs, [params for _, params in requests], use_tqdm=False)
    return [
        [list(o.token_ids), o.finish_reason, [sorted((t, p.logprob) for t, p in at.items()) for at in o.logprobs or []]]
        for out in outputs
        for o in out.outputs
    ]


def params(tokens: int = 24, **changes: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False} | changes
    )


def counts(llm: LLM) -> dict[str, float]:
    """What was verified so far, and whether the engine's trees did it."""
    numbers = {
        name: device_engines.metric(llm, f"vllm:{counter}")
        for name, counter in (
            ("drafts", "spec_decode_num_drafts"),
            ("accepted", "spec_decode_num_accepted_tokens"),
            ("preemptions", "num_preemptions"),
            ("prefix_hits", "prefix_cache_hits"),
        )
    }
    runner = runner_of(llm)
    impl = type(next(iter(runner.compilation_config.static_forward_context.values())).impl).__name__
    return numbers | {"reason": runner.speculator.trees.reason, "impl": impl, "moved": MOVED[0]}


#: Rows that were moved, in all engines.
MOVED = [0]
_move = device_trees.kv_move


def _counting_move(mover: Any, table: Any, sources: Any, targets: Any) -> None:
    MOVED[0] += int((sources >= 0).sum())
    _move(mover, table, sources, targets)


device_trees.kv_move = _counting_move


def both(
    requests: list[tuple[list[int], SamplingParams]], window: int | None = None, **settings: Any
) -> dict[str, Any]:
    """The same requests with trees and without speculation."""
    llm = trees(window=window, **settings)
    MOVED[0] = 0
    found = {"found": generate(llm, requests), **counts(llm)}
    settings = {k: v for k, v in settings.items() if k in ("model", "skip_tokenizer_init")}
    return {"wanted": generate(plain(window, **settings), requests), **found}


def greedy() -> dict[str, Any]:
    """More requests than run at once, prompts in chunks, beginnings that the cache knows."""
    shared = [(7 * k) % VOCAB for k in range(40)]
    prompts = [*PROMPTS, shared, [*shared, 1, 2], shared[:33], [50, 51] * 9]
    return both([(p, params(8 + 2 * k)) for k, p in enumerate(prompts)], max_num_batched_tokens=32, max_num_seqs=4)


def parameters() -> dict[str, Any]:
    """Requests of every kind beside each other."""
    kinds = [
        {"temperature": 0.7, "seed": 1},
        {"temperature": 1.0, "top_p": 0.8, "top_k": 20, "seed": 2},
        {"temperature": 0.9, "min_p": 0.05, "seed": 3},
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.5, "presence_penalty": 0.4, "temperature": 0.8, "seed": 4},
        {"logit_bias": {5: 3.0, 9: -20.0}},
        {"min_tokens": 4, "stop_token_ids": list(range(0, VOCAB, 2))},
        {"logprobs": 3},
        {"temperature": 0.6, "logprobs": 2, "seed": 5},
        {"n": 2, "temperature": 0.8, "seed": 6},
    ]
    requests = [(PROMPTS[k % 4], params(11, **kind)) for k, kind in enumerate(kinds)]
    bad = params(11)
    bad._bad_words_token_ids = [[54], [14, 14], [94, 67]]
    return both([*requests, (PROMPTS[0], bad), (PROMPTS[2], bad)], max_num_seqs=4)


def preempted() -> dict[str, Any]:
    """Few blocks: requests are preempted, and go on."""
    requests = [([(k * 11 + i) % VOCAB for i in range(20)], params(36)) for k in range(4)]
    # The first block is vLLM's own.
    return both(requests, num_gpu_blocks_override=14, max_model_len=128, max_num_seqs=4, enable_prefix_caching=False)


def windowed() -> dict[str, Any]:
    return both([(p, params(40)) for p in PROMPTS[:2]], window=20)


def budget() -> dict[str, Any]:
    """Trees of changing sizes, which the clock decides; the tokens it does not. The last request wants no drafts."""
    requests = [(p, params(20)) for p in PROMPTS[:3]] + [(PROMPTS[3], params(20, extra_args={"specplug": "off"}))]
    llm = trees(budget=True, proposer="TokenRecycling")
    scheduler = device_engines.scheduler_of(llm)
    update, drafted = scheduler._update_after_schedule, [0] * len(requests)

    def watched(output: Any) -> None:
        for request, tokens in output.scheduled_spec_decode_tokens.items():
            drafted[int(request.partition("-")[0])] += len(tokens)
        update(output)

    scheduler._update_after_schedule = watched
    found = {"found": generate(llm, requests), "drafted": drafted, **counts(llm)}
    return {"wanted": generate(plain(), requests), **found}


def structured() -> dict[str, Any]:
    """A grammar's request gets chains, which the scheduler checks, beside trees."""
    path = Path(_folder.name) / "words"
    make_tiny_llama(path, 49152, **SIZES)
    for file in MODEL.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, path)
    digits = StructuredOutputsParams(regex="(ab|cd|ef){4,6}")
    number = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    kinds = [
        params(12, ignore_eos=False, structured_outputs=digits),
        params(12),
        params(16, ignore_eos=False, structured_outputs=StructuredOutputsParams(json=number), temperature=0.8, seed=4),
    ]
    prompts = [[504, 2644, 3044, 335], [532, 827, 532, 827, 532], [504, 2644, 3044]]
    return both(list(zip(prompts, kinds, strict=True)), model=path, skip_tokenizer_init=False, max_num_seqs=3)


def synchronous() -> dict[str, Any]:
    return both([(p, params(24)) for p in PROMPTS[:3]], async_scheduling=False)


def _of_rank(worker: Any) -> dict[str, Any]:
    speculator = worker.model_runner.speculator
    impl = next(iter(worker.model_runner.compilation_config.static_forward_context.values())).impl
    return {
        "rank": worker.rank,
        "reason": speculator.trees.reason,
        "impl": type(impl).__name__,
        "heads": impl.num_heads,
        "learned": int((speculator.drafts._matrix >= 0).sum()),
        "shapes": speculator.drafts.trees.tolist(),
        # The worker's own: this function comes to it with the values that the asking process has.
        "moved": device_trees.kv_move.__globals__["MOVED"][0],
    }


def ranks() -> dict[str, Any]:
    """Two tensor-parallel ranks, in processes of their own."""
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, sorted(os.sched_getaffinity(0))[:2])),
        # Workers are asked by a function, which goes to them by value.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        # vLLM compiles the embedding's mask there, for a driver that the interpreter has not.
        "TORCH_COMPILE_DISABLE": "1",
    }
    requests = [(p, params(12 + 6 * k)) for k, p in enumerate(PROMPTS)]
    requests.append((PROMPTS[1], params(20, temperature=0.8, seed=7)))
    llm = trees(tensor_parallel_size=2, max_num_batched_tokens=32)
    found = {"found": generate(llm, requests), "drafts": device_engines.metric(llm, "vllm:spec_decode_num_drafts")}
    found["accepted"] = device_engines.metric(llm, "vllm:spec_decode_num_accepted_tokens")
    first, second = sorted(llm.collective_rpc(_of_rank), key=lambda rank: rank["rank"])
    return {"wanted": generate(plain(), requests), **found, **first, "second": second}


class _Graphs:
    """In place of CUDA's: a recording is the forward pass with what the host knew when it was made, and is replayed by
    running it again; so everything that differs between steps must lie where the recording reads it."""

    replayed = 0

    @staticmethod
    def capture(manager: Any, create_forward_fn: Callable[..., Any], progress_bar_desc: str = "") -> None:
        for desc in manager._capture_descs[CUDAGraphMode.FULL]:
            forward = create_forward_fn(desc, warmup=False)
            forward(CUDAGraphMode.NONE)

            def replay(forward: Any = forward) -> None:
                _Graphs.replayed += 1
                forward(CUDAGraphMode.NONE)

            manager.graphs[desc] = SimpleNamespace(replay=replay)
        manager._graphs_captured = True


def graphs() -> dict[str, Any]:
    """Steps whose requests all have the same number of rows run in graphs, padded to the next size."""
    with unittest.mock.patch.object(gpu_attention, "_SPLITS", 2):
        llm = trees(max_num_seqs=4)
    runner = runner_of(llm)
    support = {
        builder.get_cudagraph_support(runner.vllm_config, None).name
        for groups in runner.attn_groups
        for group in groups
        for builder in group.metadata_builders
    }
    runner.compilation_config.cudagraph_capture_sizes = [8, 32]
    runner.compilation_config.max_cudagraph_capture_size = 32
    with (
        unittest.mock.patch.object(platforms.current_platform, "get_global_graph_pool", lambda: None),
        unittest.mock.patch.object(cudagraph_utils.CudaGraphManager, "capture", _Graphs.capture),
        unittest.mock.patch("vllm.v1.worker.gpu.model_runner.lock_workspace"),
    ):
        runner.cudagraph_manager = cudagraph_utils.ModelCudaGraphManager(
            runner.vllm_config, runner.device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=runner.decode_query_len
        )
        runner.capture_model()
    sizes = sorted((d.num_reqs, d.uniform_token_count) for d in runner.cudagraph_manager.graphs)
    requests = [(p, params(12 + 6 * k)) for k, p in enumerate(PROMPTS[:3])]
    found = {"found": generate(llm, requests), **counts(llm)}
    seen = {"support": sorted(support), "sizes": sizes, "replayed": _Graphs.replayed}
    return {"wanted": generate(plain(), requests), **seen, **found}


def timed(scenario: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    start = time.perf_counter()
    return scenario() | {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    interpreted.report({name: timed(globals()[name]) for name in sys.argv[1:]})
