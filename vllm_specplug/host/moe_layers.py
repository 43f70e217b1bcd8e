"""Mixture-of-experts layers of a loaded vLLM model: where they choose experts, and taking that place.

In vLLM 0.32 every layer is a ``MoERunner`` (vllm/model_executor/layers/fused_moe/runner/moe_runner.py), which asks its
``router``'s ``select_experts`` for weights and ids, unless its kernel is monolithic: routes by itself. In 0.28 the CPU
kernels are monolithic, and route by their own ``_select_experts``. Both take hidden states and router logits first and
return weights ``float[n, k]`` and ids ``int[n, k]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

#: Takes ``(hidden_states, router_logits, ...)``.
Select = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_MARK = "specplug_sparse_moe"
# Routers of vLLM whose choice depends on nothing but a row's own logits and hidden state.
_ROUTERS = {"CPURouter", "FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter", "CustomRoutingRouter"}
# Those that may be a softmax and nothing else. (0.28's CPU kernels carry a GPU's router, which they do not ask.)
_PLAIN = {"CPURouter", "FusedTopKRouter"}


@dataclass(slots=True, eq=False)
class MoeLayer:
    """One layer, and the place where it chooses experts.

    Attributes:
        index: in the order in which the model holds its layers, which is that of a calibration.
        name: in vLLM's own words.
        owner, attribute: ``owner.attribute`` is called for weights and ids.
        top_k, num_experts: experts of a token, and of the layer.
        renormalize: whether a token's weights are divided by their sum.
        softmax: whether weights are shares of one softmax over the logits.
        plain: whether :func:`vllm_specplug.kernels.expert_vote.softmax_route` describes it fully.
    """

    index: int
    name: str
    runner: Any
    owner: Any
    attribute: str
    top_k: int
    num_experts: int
    renormalize: bool
    softmax: bool
    plain: bool
    _own: Select | None = field(default=None, init=False)
    _entry: Any = field(default=None, init=False)

    def replace(self, make: Callable[[Select], Select], opaque: bool) -> None:
        """Have ``make(own)`` choose the experts, ``own`` being what chose them.

        Set on the instance, which the layer reads anew in every call; other layers and engines are left alone.

        Args:
            opaque: the model is going to be compiled. On CPUs vLLM lets the compiler look into the layer; it is then
                entered by the operator that vLLM itself uses on GPUs, so that the choice stays Python's.
        """
        self._own = getattr(self.owner, self.attribute)
        setattr(self.owner, self.attribute, make(self._own))
        if opaque:
            self._entry = self.runner._forward_entry
            shared = "_shared" if self.runner.shared_experts is not None else ""
            self.runner._forward_entry = getattr(torch.ops.vllm, f"moe_forward{shared}")

    def restore(self) -> None:
        """Undo :meth:`replace`."""
        if self._own is not None:
            delattr(self.owner, self.attribute)
        if self._entry is not None:
            self.runner._forward_entry = self._entry
        self._own = self._entry = None


def find(model: torch.nn.Module) -> list[MoeLayer] | str:
    """All layers of a model, in its order; or why routing cannot be edited."""
    try:
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    except ImportError:
        return "this vLLM has no vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner"
    layers: list[MoeLayer] = []
    for name, module in model.named_modules():
        if not isinstance(module, MoERunner):
            continue
        layer = _describe(len(layers), name, module)
        if isinstance(layer, str):
            return f"{name}: {layer}"
        layers.append(layer)
    return layers or "the model has no mixture-of-experts layers"


def _describe(index: int, name: str, runner: Any) -> MoeLayer | str:
    router, method = runner.router, runner._quant_method
    if getattr(router, "eplb_state", None) is not None:
        return "experts are moved between processes (EPLB)"
    if type(router).__name__ not in _ROUTERS:
        return f"it is routed by {type(router).__name__}, which is not known"
    config = runner.moe_config
    owner, attribute = router, "select_experts"
    if method.is_monolithic:
        kernel = getattr(method, "moe_kernel", None)
        owner, attribute = getattr(kernel, "fused_experts", None), "_select_experts"
    if not hasattr(owner, attribute):
        return f"its kernel routes by itself ({type(owner).__name__})"
    if attribute in vars(owner):
        return f"{type(owner).__name__}.{attribute} is already replaced"
    # The owner holds how it scores; where it does not, it has only one way.
    grouped = bool(getattr(owner, "use_grouped_topk", False)) or type(router).__name__ == "GroupedTopKRouter"
    custom = getattr(owner, "custom_routing_function", None) is not None
    biased = any(getattr(o, "e_score_correction_bias", None) is not None for o in (owner, runner.routed_experts))
    softmax = getattr(owner, "scoring_func", "softmax") == "softmax" and not custom
    watched = getattr(router, "capture_fn", None) or getattr(router, "_routing_replay_out", None) is not None
    return MoeLayer(
        index=index,
        name=name,
        runner=runner,
        owner=owner,
        attribute=attribute,
        top_k=int(config.experts_per_token),
        num_experts=int(config.num_experts),
        renormalize=bool(getattr(owner, "renormalize", False)),
        softmax=softmax,
        plain=softmax and not (grouped or biased or watched) and type(router).__name__ in _PLAIN,
    )


def compiled_modules(model: torch.nn.Module) -> list[Any]:
    """Modules that vLLM compiles, or is going to; none in eager mode."""
    return [m for m in model.modules() if getattr(m, "do_not_compile", True) is False]


def reason_against_compiled(modules: list[Any]) -> str:
    """Why layers cannot be replaced in a model that is compiled; empty if they can."""
    from vllm.platforms import current_platform

    if modules and not current_platform.is_cpu():
        return f"on {current_platform.device_name} routing can be edited in eager mode only: add --enforce-eager"
    for module in modules:
        if getattr(module, "compiled", False) or getattr(module, "aot_compiled_fn", None) is not None:
            return "the model is already compiled"
        if not isinstance(module.vllm_config.additional_config, dict):
            return "the engine's additional_config is not a dictionary"
    return ""


def mark_compiled(modules: list[Any]) -> None:
    """Have vLLM keep the model compiled with opaque layers apart from the other one: it saves compiled models under a
    hash of the configuration, which says nothing of replaced layers."""
    for module in modules:
        module.vllm_config.additional_config = {**module.vllm_config.additional_config, _MARK: True}
