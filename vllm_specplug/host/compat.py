"""Version gate: which vLLM this plugin was proven on, and every host symbol it relies on.

The adapter is proven end to end on the oldest and newest of :data:`SUPPORTED`. Any other version is probed:
with every symbol present it runs under a one-line warning, with one missing it is refused by name.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
from dataclasses import dataclass
from typing import Any

from vllm_specplug.host.patching import HostSymbolMissing

#: Inclusive (major, minor) range proven by the end-to-end tests on both ends.
SUPPORTED = ((0, 28), (0, 32))


@dataclass(frozen=True, slots=True)
class Symbol:
    """Something of vLLM's the plugin uses.

    Attributes:
        module, name: where it is; ``name`` may be dotted.
        needs: parameter names (of a function) or field names (of a dataclass) it must have.
        used_for: what stops working without it.
        required: False if the plugin works without it, less what it is used for.
    """

    module: str
    name: str
    needs: tuple[str, ...]
    used_for: str
    required: bool = True

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


_RUNNER = "vllm.v1.worker.gpu_model_runner"
_CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"
_METADATA_FIELDS = (
    "num_actual_tokens",
    "max_query_len",
    "query_start_loc",
    "max_seq_len",
    "seq_lens",
    "slot_mapping",
    "block_table",
    "scheduler_metadata",
)

SYMBOLS = (
    Symbol("vllm.engine.arg_utils", "EngineArgs.add_cli_args", ("parser",), "the older flag names"),
    Symbol("vllm.engine.arg_utils", "EngineArgs.from_cli_args", ("args",), "checking options at start"),
    Symbol("vllm.engine.arg_utils", "EngineArgs.create_engine_config", (), "checking options at start"),
    Symbol(
        "vllm.engine.arg_utils",
        "EngineArgs",
        ("speculative_config", "spec_model", "spec_tokens", "additional_config", "distributed_executor_backend"),
        "checking options at start",
    ),
    Symbol("vllm.v1.spec_decode.custom_class_proposer", "create_custom_proposer", ("vllm_config",), "proposers"),
    Symbol(
        _RUNNER,
        "GPUModelRunner.propose_draft_token_ids",
        ("scheduler_output", "sampled_token_ids", "spec_decode_metadata"),
        "proposers",
    ),
    Symbol(_RUNNER, "GPUModelRunner._input_fits_in_drafter", ("common_attn_metadata",), "drafting near max_model_len"),
    Symbol(_RUNNER, "GPUModelRunner._update_states", ("scheduler_output",), "freeing ended requests"),
    Symbol(_RUNNER, "GPUModelRunner.initialize_kv_cache", ("kv_cache_config",), "draft trees"),
    Symbol(
        _RUNNER,
        "GPUModelRunner._prepare_inputs",
        ("scheduler_output", "num_scheduled_tokens"),
        "draft trees' positions",
    ),
    Symbol(_RUNNER, "GPUModelRunner._sample", ("logits", "spec_decode_metadata"), "verification"),
    Symbol(_RUNNER, "GPUModelRunner._bookkeeping_sync", (), "seeds on CPUs"),
    Symbol("vllm.v1.sample.sampler", "Sampler.forward", ("logits", "sampling_metadata"), "verification"),
    Symbol("vllm.v1.sample.sampler", "Sampler.greedy_sample", ("logits",), "verification"),
    Symbol(
        "vllm.v1.sample.metadata",
        "SamplingMetadata",
        (
            *("temperature", "all_greedy", "top_p", "top_k", "generators", "max_num_logprobs", "no_penalties"),
            *("prompt_token_ids", "frequency_penalties", "presence_penalties", "repetition_penalties"),
            *("output_token_ids", "allowed_token_ids_mask", "bad_words_token_ids", "logitsprocs"),
            *("logprob_token_ids", "spec_token_ids", "thinking_budget_state_holder"),
        ),
        "verification",
    ),
    Symbol("vllm.v1.outputs", "SamplerOutput", ("sampled_token_ids", "logprobs_tensors"), "verification"),
    Symbol("vllm.v1.outputs", "LogprobsTensors", (), "verification"),
    Symbol(
        _RUNNER,
        "build_logitsprocs",
        ("vllm_config", "device", "is_pin_memory", "is_pooling_model", "custom_logitsprocs"),
        "min_p and logit_bias",
    ),
    Symbol("vllm.v1.sample.logits_processor", "BUILTIN_LOGITS_PROCESSORS", (), "min_p and logit_bias"),
    Symbol(
        "vllm.sampling_params",
        "SamplingParams._validate_spec_decode",
        ("speculative_config",),
        "min_p, logit_bias, arms",
    ),
    Symbol(
        "vllm.v1.worker.gpu_input_batch",
        "CachedRequestState",
        ("req_id", "prompt_token_ids", "mm_features", "sampling_params", "output_token_ids", "lora_request"),
        "request lifetimes",
    ),
    Symbol("vllm.v1.worker.gpu_input_batch", "InputBatch.req_ids", (), "request lifetimes"),
    Symbol(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        ("finished_req_ids", "scheduled_new_reqs", "scheduled_spec_decode_tokens"),
        "request lifetimes, draft trees",
    ),
    Symbol("vllm.v1.core.sched.output", "NewRequestData", ("req_id", "sampling_params"), "arms"),
    Symbol("vllm.v1.spec_decode.metadata", "SpecDecodeMetadata", ("num_draft_tokens", "draft_token_ids"), "acceptance"),
    *(
        Symbol(module, name, needs, "draft trees on CPUs", required=False)
        for module, name, needs in (
            (_RUNNER, "GPUModelRunner._attn_group_iterator", ()),
            ("vllm.v1.attention.backends.registry", "register_backend", ("backend", "class_path")),
            ("vllm.v1.attention.backends.registry", "AttentionBackendEnum.CPU_ATTN.clear_override", ()),
            ("vllm.v1.attention.selector", "_cached_get_attn_backend.cache_clear", ()),
            (_CPU_ATTENTION, "CPUAttentionBackend.get_impl_cls", ()),
            (_CPU_ATTENTION, "CPUAttentionBackend.get_builder_cls", ()),
            (_CPU_ATTENTION, "CPUAttentionMetadata", _METADATA_FIELDS),
            (
                _CPU_ATTENTION,
                "CPUAttentionMetadataBuilder.build",
                ("common_prefix_len", "common_attn_metadata", "fast_build"),
            ),
            (
                _CPU_ATTENTION,
                "CPUAttentionBackendImpl.forward",
                ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
            ),
            (
                "vllm.v1.attention.backend",
                "CommonAttentionMetadata",
                (*_METADATA_FIELDS[:-2], "block_table_tensor"),
            ),
            (
                "vllm._custom_ops",
                "cpu_attn_reshape_and_cache",
                ("key", "value", "key_cache", "value_cache", "slot_mapping", "isa"),
            ),
            ("vllm.v1.kv_cache_interface", "FullAttentionSpec", ()),
            ("vllm.v1.kv_cache_interface", "SlidingWindowSpec", ()),
            ("vllm.distributed.parallel_state", "get_tp_group", ()),
        )
    ),
)

#: For draft trees on GPUs; looked up where they are asked for.
GPU_SYMBOLS = tuple(
    Symbol(module, name, needs, "draft trees on GPUs", required=False)
    for module, name, needs in (
        (_RUNNER, "GPUModelRunner._attn_group_iterator", ()),
        ("vllm.v1.attention.backends.registry", "register_backend", ("backend", "class_path")),
        ("vllm.v1.attention.backends.registry", "AttentionBackendEnum.TRITON_ATTN.clear_override", ()),
        ("vllm.v1.attention.backends.registry", "AttentionBackendEnum.FLASH_ATTN.clear_override", ()),
        ("vllm.v1.attention.selector", "_cached_get_attn_backend.cache_clear", ()),
        ("vllm.v1.attention.backend", "AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE", ()),
        ("vllm.v1.worker.block_table", "BlockTable.get_numpy_array", ()),
        (
            "vllm.v1.attention.backend",
            "CommonAttentionMetadata",
            ("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_actual_tokens", "block_table_tensor"),
        ),
        *(
            (module, prefix + name, needs)
            for module, prefix in (
                ("vllm.v1.attention.backends.triton_attn", "TritonAttention"),
                ("vllm.v1.attention.backends.flash_attn", "FlashAttention"),
            )
            for name, needs in (
                ("Backend.get_impl_cls", ()),
                ("Backend.get_builder_cls", ()),
                ("MetadataBuilder.build", ("common_prefix_len", "common_attn_metadata", "fast_build")),
                ("MetadataBuilder.get_cudagraph_support", ("vllm_config", "kv_cache_spec")),
                ("Impl.forward", ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")),
            )
        ),
    )
)

_V2 = "vllm.v1.worker.gpu"
#: For drafting on the device in Model Runner V2; looked up where it is asked for.
DEVICE_SYMBOLS = tuple(
    Symbol(module, name, needs, "drafting on the device", required=False)
    for module, name, needs in (
        ("vllm.v1.worker.gpu_worker", "Worker.init_device", ()),
        ("vllm.config", "VllmConfig.use_v2_model_runner", ()),
        (f"{_V2}.model_runner", "init_speculator", ("vllm_config", "device", "req_states")),
        (
            f"{_V2}.spec_decode.speculator",
            "BaseSpeculator.propose",
            ("input_batch", "last_sampled", "num_sampled", "dummy_run", "num_speculative_tokens"),
        ),
        (f"{_V2}.spec_decode.speculator", "BaseSpeculator.capture", ()),
        (f"{_V2}.spec_decode.speculator", "BaseSpeculator.init_cudagraph_manager", ("cudagraph_mode",)),
        (f"{_V2}.spec_decode.rejection_sampler", "RejectionSampler.__call__", ("logits", "input_batch")),
        (f"{_V2}.sample.sampler", "Sampler.__call__", ("logits", "input_batch")),
        (f"{_V2}.input_batch", "InputBatch", ("num_reqs", "idx_mapping", "input_ids", "logits_indices")),
        (f"{_V2}.states", "RequestState", ()),
    )
)

#: For draft trees there; without them drafts are chains.
DEVICE_TREE_SYMBOLS = tuple(
    Symbol(module, name, needs, "draft trees on the device", required=False)
    for module, name, needs in (
        (f"{_V2}.model_runner", "GPUModelRunner.load_model", ()),
        (f"{_V2}.model_runner", "GPUModelRunner.initialize_kv_cache", ("kv_cache_config", "is_profiling")),
        (f"{_V2}.model_runner", "GPUModelRunner.prepare_attn", ("input_batch",)),
        (f"{_V2}.sample.sampler", "Sampler.add_request", ("req_idx", "sampling_params")),
        (
            f"{_V2}.sample.sampler",
            "Sampler.sample",
            (
                *("logits", "expanded_idx_mapping", "idx_mapping", "idx_mapping_np", "pos", "input_ids"),
                *("expanded_local_pos", "seq_lens_upper_bound_np", "return_logprobs"),
            ),
        ),
        (f"{_V2}.sample.output", "SamplerOutput", ("sampled_token_ids", "num_sampled", "num_rejected", "num_nans")),
        (f"{_V2}.sample.states", "NO_LOGPROBS", ()),
        (f"{_V2}.metrics.logits", "get_num_nans", ()),
        (
            f"{_V2}.input_batch",
            "get_num_sampled_and_rejected",
            ("num_sampled", "seq_lens", "cu_num_logits", "idx_mapping", "prefill_len"),
        ),
        (
            f"{_V2}.input_batch",
            "InputBatch",
            (
                *("num_draft_tokens", "num_tokens_after_padding", "query_start_loc", "seq_lens", "positions"),
                *("cu_num_logits", "cu_num_logits_np", "expanded_idx_mapping", "expanded_local_pos"),
            ),
        ),
        (f"{_V2}.spec_decode.rejection_sampler", "get_max_chunk_logits", ("vocab_size",)),
        (f"{_V2}.spec_decode.rejection_sampler", "_iter_request_chunks", ("cu_num_logits", "max_chunk_logits")),
        (
            f"{_V2}.spec_decode.rejection_sampler",
            "RejectionSampler._get_logprobs_tensors",
            ("sampled", "num_sampled", "logits", "cu_num_logits", "cu_num_logits_np", "max_num_logprobs"),
        ),
    )
)


@dataclass(frozen=True, slots=True)
class Probe:
    """Outcome for one :class:`Symbol`: ``name`` is its path, ``detail`` what is missing or what it is for."""

    name: str
    found: bool
    detail: str
    required: bool = True


def _names_of(symbol: Any) -> set[str]:
    """Parameter names of a function, field names of a dataclass."""
    if dataclasses.is_dataclass(symbol):
        return {f.name for f in dataclasses.fields(symbol)}
    if callable(symbol):
        return set(inspect.signature(symbol).parameters)
    return set()


def probe_symbol(symbol: Symbol) -> Probe:
    """Look one symbol up in the installed vLLM."""
    try:
        found: Any = importlib.import_module(symbol.module)
        for part in symbol.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return Probe(symbol.path, False, f"not found ({error}); needed for {symbol.used_for}", symbol.required)
    missing = sorted(set(symbol.needs) - _names_of(found)) if symbol.needs else []
    if missing:
        detail = f"lacks {', '.join(missing)}; needed for {symbol.used_for}"
        return Probe(symbol.path, False, detail, symbol.required)
    return Probe(symbol.path, True, symbol.used_for, symbol.required)


def probe() -> list[Probe]:
    """Look every symbol up. Imports vLLM; initialises no accelerator."""
    return [probe_symbol(symbol) for symbol in SYMBOLS]


def missing_for_trees() -> list[str]:
    """What the installed vLLM lacks for draft trees; without it drafts are chains."""
    probes = (probe_symbol(symbol) for symbol in SYMBOLS if not symbol.required)
    return [p.name for p in probes if not p.found]


def missing_for_gpu_trees() -> list[str]:
    """The same for draft trees on GPUs."""
    return [p.name for p in map(probe_symbol, GPU_SYMBOLS) if not p.found]


def missing_for_device_drafts() -> list[str]:
    """The same for drafting on the device."""
    return [p.name for p in map(probe_symbol, DEVICE_SYMBOLS) if not p.found]


def missing_for_device_trees() -> list[str]:
    """The same for draft trees there."""
    return [p.name for p in map(probe_symbol, GPU_SYMBOLS + DEVICE_TREE_SYMBOLS) if not p.found]


def vllm_version() -> str | None:
    """Version of the importable ``vllm`` module, whatever its distribution is called; None without one."""
    if importlib.util.find_spec("vllm") is None:
        return None
    return str(importlib.import_module("vllm.version").__version__)


def _is_supported(version: str) -> bool:
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and SUPPORTED[0] <= (int(match[1]), int(match[2])) <= SUPPORTED[1]


def supported_range() -> str:
    """``0.28 to 0.32``."""
    low, high = (".".join(map(str, end)) for end in SUPPORTED)
    return f"{low} to {high}"


def support_status() -> tuple[str, str]:
    """``("supported" | "untested" | "unsupported", one line for the user)``.

    A supported version is not probed: that would import vLLM's model runner into processes that do not need it.
    """
    version = vllm_version()
    if version is None:
        return "unsupported", "vLLM is not installed: no module named vllm"
    if _is_supported(version):
        return "supported", f"vLLM {version} is supported ({supported_range()})"
    missing = [p for p in probe() if p.required and not p.found]
    if missing:
        return "unsupported", (
            f"vLLM {version} is not supported (supported: {supported_range()}): "
            + "; ".join(f"{p.name} {p.detail}" for p in missing)
        )
    return "untested", (
        f"vLLM {version} is untested with this plugin (tested: {supported_range()}); "
        "everything the plugin relies on is present, so it runs"
    )


def require() -> str | None:
    """Gate for a starting server: None if supported, a one-line warning if untested.

    Raises:
        HostSymbolMissing: unsupported; the message names what is missing.
    """
    level, message = support_status()
    if level == "unsupported":
        raise HostSymbolMissing(message)
    return None if level == "supported" else message
