"""Checks of requests' parameters, for servers with this plugin's proposers.

``min_p`` and ``logit_bias`` pass: vLLM turns such requests down (sampling_params.py:_validate_spec_decode) and loads
neither processor (v1/sample/logits_processor:build_logitsprocs), because its rejection sampler skips logits processors.
:mod:`vllm_specplug.host.verification` samples through vLLM's plain sampler, which applies them. Here are both patches,
and vLLM's own processors turned towards the later tokens of a step. An arm that the server does not hold (see
:mod:`.arms_in_one`) is refused in the same place.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from vllm_specplug import registry
from vllm_specplug.host import eligibility, patching
from vllm_specplug.options import nearest

#: Attribute of a ``SpeculativeConfig``: what requests to its engine may call an arm. It is where the configuration of
#: an engine and the validation of its requests meet.
_ARMS = "_specplug_arms"
_SHOWN = 80  # characters of a name that no arm has


def install_front() -> None:
    """Patch request validation, if its module is imported in this process. Idempotent."""
    params = getattr(sys.modules.get("vllm.sampling_params"), "SamplingParams", None)
    if params is not None:
        patching.wrap(params, "_validate_spec_decode", _validate_spec_decode)


def install_worker() -> None:
    """Patch the runner's choice of logits processors; before the runner builds its input batch. Idempotent.

    Raises:
        patching.HostSymbolMissing: naming the function this vLLM lacks.
    """
    from vllm.v1.worker import gpu_model_runner

    patching.wrap(gpu_model_runner, "build_logitsprocs", _build_logitsprocs)


def uninstall() -> None:
    """Undo both."""
    params = getattr(sys.modules.get("vllm.sampling_params"), "SamplingParams", None)
    if params is not None:
        patching.unwrap(params, "_validate_spec_decode")
    runner = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    if runner is not None:
        patching.unwrap(runner, "build_logitsprocs")


def _is_ours(speculative_config: Any) -> bool:
    model = getattr(speculative_config, "model", None)
    return isinstance(model, str) and model.startswith(registry.PACKAGE + ".")


def _validate_spec_decode(original: Callable[..., Any]) -> Callable[..., Any]:
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        """Let min_p and logit_bias pass where our verification samples, and no unknown arm; whatever else vLLM checks
        there, it still does. The one caller is ``SamplingParams.verify``, which every front end calls per request."""
        if _is_ours(speculative_config):
            _check_arm(self.extra_args, getattr(speculative_config, _ARMS, None))
            if self.min_p or self.logit_bias:
                self = copy.copy(self)
                self.min_p, self.logit_bias = 0.0, None
        original(self, speculative_config)

    return _validate_spec_decode


def allow_arms(speculative_config: Any, names: Iterable[str]) -> None:
    """Have requests refused that name another arm than ``names``."""
    setattr(speculative_config, _ARMS, tuple(sorted(names)))


def _check_arm(extra_args: Mapping[str, Any] | None, names: Sequence[str] | None) -> None:
    named = (extra_args or {}).get(eligibility.ARM_ARG)
    if named is None or names is None or named in names:
        return
    # Both are answered by 400; the former is what vLLM's own checks raise.
    error: type[Exception] = getattr(sys.modules.get("vllm.exceptions"), "VLLMValidationError", ValueError)
    hint = nearest(named, names) if isinstance(named, str) else ""
    raise error(
        f"vllm_xargs.{eligibility.ARM_ARG} = {repr(named)[:_SHOWN]} is not allowed: expected one of "
        f"{', '.join(names)}, the arms this server holds.{hint}"
    )


def _build_logitsprocs(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_logitsprocs(
        vllm_config: Any,
        device: torch.device,
        is_pin_memory: bool,
        is_pooling_model: bool,
        custom_logitsprocs: Any = (),
    ) -> Any:
        """All of vLLM's own processors where one of our proposers is selected. Custom ones stay refused: nothing is
        known of how they depend on earlier tokens. The runner's module looks the name up when it builds a runner."""
        if not _is_ours(vllm_config.speculative_config) or is_pooling_model or custom_logitsprocs:
            return original(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
        from vllm.v1.sample import logits_processor

        return logits_processor.LogitsProcessors(
            make(vllm_config, device, is_pin_memory) for make in logits_processor.BUILTIN_LOGITS_PROCESSORS
        )

    return build_logitsprocs


def is_active(processor: Any) -> bool:
    """Whether a logits processor changes any row of this batch; True for one that is not vLLM's own."""
    field = _STATE.get(type(processor).__name__) if type(processor).__module__.startswith("vllm.") else None
    return field is None or bool(getattr(processor, field))


#: What each of vLLM's own processors holds of the batch; empty or 0 when it changes nothing.
_STATE = {
    "MinPLogitsProcessor": "min_p_count",
    "LogitBiasLogitsProcessor": "biases",
    "MinTokensLogitsProcessor": "min_toks",
}


def later_processors(processors: Any, index: torch.Tensor, emitted: int) -> Any:
    """The batch's ``LogitsProcessors`` for the requests of ``index``, each ``emitted`` tokens further on.

    Args:
        index: ``int64[a]`` batch rows, rising.

    Returns:
        None if one of them is active and not vLLM's own: what it would do with a later token is not known.
    """
    found = []
    for processor in processors.all:
        if not is_active(processor):
            continue
        make = _LATER.get(type(processor).__name__)
        if make is None:
            return None
        later = make(copy.copy(processor), index, emitted)
        if later is not None:
            found.append(later)
    return type(processors)(found)


def _min_p(processor: Any, index: torch.Tensor, emitted: int) -> Any:
    processor.min_p = processor.min_p[index]
    return processor if bool(processor.min_p.any()) else None


def _logit_bias(processor: Any, index: torch.Tensor, emitted: int) -> Any:
    (rows, tokens), kept = _renumbered(processor.logits_slice, index)
    processor.logits_slice = (rows, tokens)
    processor.bias_tensor = processor.bias_tensor[kept]
    return processor if len(rows) else None


def _min_tokens(processor: Any, index: torch.Tensor, emitted: int) -> Any:
    due = [i for i in index.tolist() if i in processor.min_toks]
    # min_toks: (least tokens, output so far as of the step's start, stop tokens, ...) by batch row.
    due = [i for i in due if len(processor.min_toks[i][1]) + emitted < processor.min_toks[i][0]]
    if not due:
        return None
    for name in ("logits_slice", "restore_logits_slice"):  # vLLM 0.28 has no second one
        if hasattr(processor, name):
            setattr(processor, name, _renumbered(getattr(processor, name), index, due)[0])
    return processor


def _renumbered(
    entries: tuple[torch.Tensor, torch.Tensor], index: torch.Tensor, only: list[int] | None = None
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """``(batch rows, tokens)`` of the requests of ``index``, or of those ``only``, with rows turned into places in
    ``index``; and a mask of what was kept."""
    rows, tokens = entries
    match = rows.unsqueeze(1) == index
    if only is not None:
        match &= torch.isin(index, index.new_tensor(only))
    kept = match.any(1)
    return (match[kept].int().argmax(1).to(rows.dtype), tokens[kept]), kept


_LATER: dict[str, Callable[[Any, torch.Tensor, int], Any]] = {
    "MinPLogitsProcessor": _min_p,
    "LogitBiasLogitsProcessor": _logit_bias,
    "MinTokensLogitsProcessor": _min_tokens,
}
