"""Gated feed-forward layers of a loaded vLLM model: where they are, whether they can be copied, their weights.

A gated layer is a module made of a ``gate_up_proj`` (MergedColumnParallelLinear), an ``act_fn`` (SiluAndMul) and a
``down_proj`` (RowParallelLinear) and of nothing else, such as LlamaMLP in vllm/model_executor/models/llama.py. Others,
for example an expert with a gate of its own, are not found.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from vllm_specplug.kernels.ffn_union import DTYPES

_PARTS = {"gate_up_proj", "act_fn", "down_proj"}
# Rows of the identity that are multiplied with a packed weight at a time.
_UNPACK_ROWS = 256


@dataclass(frozen=True, slots=True, eq=False)
class GatedFfn:
    """One layer: its name in the model, the module, and its sizes H and I."""

    name: str
    module: Any
    hidden_size: int
    channels: int

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and rows."""
        dtype: torch.dtype = self.module.gate_up_proj.params_dtype
        return dtype

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's own result, from its own parts, for rows ``[T, H]``."""
        module = self.module
        both, _ = module.gate_up_proj(x)
        out, _ = module.down_proj(module.act_fn.forward_native(both))
        return out

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate and up projection ``[I, H]`` and down projection ``[H, I]``, exactly."""
        both = _weight(self.module.gate_up_proj)
        return both[: self.channels], both[self.channels :], _weight(self.module.down_proj)


def find(model: torch.nn.Module) -> list[GatedFfn]:
    """All gated layers of a model, in the order in which it holds them; which is the order a calibration counts in."""
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    found = []
    for name, module in model.named_modules():
        if {child for child, _ in module.named_children()} != _PARTS:
            continue
        both, act, down = module.gate_up_proj, module.act_fn, module.down_proj
        if (
            isinstance(both, MergedColumnParallelLinear)
            and isinstance(down, RowParallelLinear)
            and type(act) is SiluAndMul
            and len(both.output_sizes) == 2
            and len(inspect.signature(module.forward).parameters) == 1
        ):
            found.append(GatedFfn(name, module, both.input_size, both.output_sizes[0]))
    return found


def reason_against(ffns: list[GatedFfn]) -> str:
    """Why these layers cannot be copied for the CPU kernel; empty if they can."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return f"there is no sparse feed-forward layer for {current_platform.device_name} yet"
    if not ffns:
        return "the model has no feed-forward layers of gate_up_proj, SiluAndMul and down_proj"
    for ffn in ffns:
        for part in ("gate_up_proj", "down_proj"):
            linear = getattr(ffn.module, part)
            where = f"{ffn.name}.{part}"
            if linear.tp_size != 1:
                return f"{where} is split over {linear.tp_size} processes (tensor parallelism)"
            if type(linear.quant_method) is not UnquantizedLinearMethod:
                return f"{where} is quantised ({type(linear.quant_method).__name__})"
            if getattr(linear, "bias", None) is not None:
                return f"{where} has a bias"
            if linear.params_dtype not in DTYPES:
                return f"{where} is {linear.params_dtype}; float32 and bfloat16 are supported"
    return ""


def _weight(linear: Any) -> torch.Tensor:
    """``[N, K]`` of a linear layer without bias.

    vLLM's CPU layers keep the weight only in an order of their matrix library (``dispatch_cpu_unquantized_gemm`` in
    vllm/model_executor/layers/utils.py), so it is read back as what the layer makes of the identity: every sum then has
    one term that is not 0.
    """
    outputs, inputs = linear.output_size, linear.input_size
    weight: torch.Tensor = linear.weight.detach()
    if weight.shape == (outputs, inputs):
        return weight
    weight = torch.empty(outputs, inputs, dtype=linear.params_dtype)
    for first in range(0, inputs, _UNPACK_ROWS):
        last = min(first + _UNPACK_ROWS, inputs)
        rows = torch.zeros(last - first, inputs, dtype=weight.dtype)
        rows[:, first:last].fill_diagonal_(1)
        weight[:, first:last] = linear.quant_method.apply(linear, rows, None).T
    return weight
