"""Fewer experts for the rows that verify drafts, in vLLM's own fused layers; and how its thresholds are found.

Only what the layers are told to compute is edited, weights and ids (:mod:`vllm_specplug.kernels.expert_vote`); the
kernels are vLLM's. A step's verified rows, of all its requests, vote together, for a step's time goes by the experts
it reads. Rows of prompts keep their own routing.

Thresholds of the tail drop are medians over the tokens that :class:`MoeTails` saw (arXiv 2512.21911).
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from vllm_specplug.host import moe_layers
from vllm_specplug.host.moe_layers import MoeLayer, Select
from vllm_specplug.host.sparse_step import SparseStep
from vllm_specplug.kernels.expert_vote import MAX_DROP, Edit, RoutingEditor, edit_routing, tail_ratios
from vllm_specplug.proposers.sparse_verify import SparseVerifyOptions

logger = logging.getLogger("vllm.specplug")

NO_CALIBRATION = "moe_drop has no calibration: run `specplug sparse calibrate MODEL`"


class SparseMoe:
    """The mixture-of-experts layers of one engine.

    Attributes:
        per_request: each request's rows vote for experts of their own, not the step's all together; for measurements.
        static_keep: each verified row keeps its so many best experts; for measurements. 0: all.
    """

    def __init__(self, options: SparseVerifyOptions, step: SparseStep, calibration: dict[str, Any] | None) -> None:
        """
        Args:
            step: what the host says of the coming forward pass.
            calibration: :meth:`MoeTails.result`, which `specplug sparse calibrate` saves; ``moe_drop`` alone needs it.
        """
        self._options = options
        self._step = step
        self._calibration = calibration
        self.per_request = False
        self.static_keep = 0
        self._layers: list[MoeLayer] = []
        self._rows = self._pools = np.zeros(0, np.int32)
        self._whole = self._now = False
        self._calls = self._exact = self._used = self._dropped = 0

    def attach(self, model: torch.nn.Module) -> str:
        """Edit the model's routing from now on. Before the model's first forward pass in compiled mode.

        Returns:
            Why it cannot act, in which case nothing is changed; empty if it acts, or if there is nothing to do.
        """
        if self._layers or (not self._options.moe_drop and self._options.moe_experts >= 1 and not self.static_keep):
            return ""
        layers = moe_layers.find(model)
        if isinstance(layers, str):
            return layers
        edits = self._edits(len(layers))
        if isinstance(edits, str):
            return edits
        compiled = moe_layers.compiled_modules(model)
        reason = moe_layers.reason_against_compiled(compiled)
        if reason:
            return reason
        for layer, edit in zip(layers, edits, strict=True):
            layer.replace(lambda own, layer=layer, edit=edit: self._edited(layer, edit, own), bool(compiled))  # type: ignore[misc]
        moe_layers.mark_compiled(compiled)
        self._layers = layers
        first, edit, parts = layers[0], edits[0], []
        if edit.share < 1:
            parts.append(f"a step's use at most {edit.budget(first.num_experts)} of {first.num_experts} experts")
        if edit.thresholds:
            parts.append(f"a token drops up to {len(edit.thresholds)} of its {first.top_k}")
        logger.info("vllm-specplug: mixture-of-experts layers of verified rows are approximate: %s.", "; ".join(parts))
        return ""

    def detach(self) -> None:
        """The layers' own routing again."""
        for layer in self._layers:
            layer.restore()
        self._layers = []

    def stats(self) -> dict[str, float]:
        """Calls of layers that were edited; distinct experts per such call, as the model chose and as they were used;
        a token's experts that were dropped, per call."""
        calls = max(self._calls, 1)
        return {
            "moe_layer_steps": float(self._calls),
            "moe_experts_exact": self._exact / calls,
            "moe_experts_used": self._used / calls,
            "moe_drops": self._dropped / calls,
        }

    def _edits(self, count: int) -> list[Edit] | str:
        """Of every layer; or why there are none."""
        drop, share = self._options.moe_drop, self._options.moe_experts
        if not drop:
            return [Edit(share=share, keep=self.static_keep)] * count
        betas = (self._calibration or {}).get("beta")
        if betas is None:
            return NO_CALIBRATION
        if len(betas) != count:
            return f"the calibration is of a model of {len(betas)} mixture-of-experts layers, this one has {count}"
        return [Edit(share=share, thresholds=tuple(map(float, beta[:drop])), keep=self.static_keep) for beta in betas]

    def _edited(self, layer: MoeLayer, edit: Edit, own: Select) -> Select:
        """What takes the place of a layer's choice ``own``."""
        editor = RoutingEditor(layer.num_experts, layer.top_k, layer.renormalize, edit)

        def select(
            hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **others: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if layer.index == 0:
                self._begin(len(router_logits))
            if not self._now:
                return own(hidden_states, router_logits, *args, **others)

            def route(hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return own(hidden, logits, *args, **others)

            if layer.plain and router_logits.device.type == "cpu":
                weights, ids, kept = map(
                    torch.from_numpy, editor(router_logits.float().numpy(), self._rows, self._pools)
                )
                self._count(*editor.used)
            else:
                weights, ids, kept = self._edit_slowly(layer, edit, hidden_states, router_logits, route)
            dtype = others.get("topk_indices_dtype") or torch.int32
            if self._whole:
                if router_logits.device.type == "cpu":
                    # Slots that no row keeps would cost a row of an expert's product each.
                    most = int(kept.max())
                    weights, ids = weights[:, :most].contiguous(), ids[:, :most].contiguous()
                return weights, ids.to(dtype)
            all_weights, all_ids = own(hidden_states, router_logits, *args, **others)
            where = torch.from_numpy(self._rows).to(router_logits.device)
            all_weights[where] = weights.to(all_weights)
            all_ids[where] = ids.to(all_ids)
            return all_weights, all_ids

        return select

    def _edit_slowly(
        self, layer: MoeLayer, edit: Edit, hidden_states: torch.Tensor, router_logits: torch.Tensor, route: Select
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For any router and device: the model's own routing, asked again with logits that leave out experts."""
        rows = torch.from_numpy(self._rows).to(router_logits.device)
        hidden, logits = hidden_states[rows], router_logits[rows]
        chosen: list[torch.Tensor] = []

        def again(edited: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights, ids = route(hidden, edited)
            chosen.append(ids)
            return weights, ids

        weights, ids, kept = edit_routing(again, logits, self._pools, edit, layer.renormalize, layer.softmax)
        if ids.device.type == "cpu":  # elsewhere counting would wait for the device
            self._count(chosen[0].unique().numel(), ids.unique().numel(), ids.numel() - int(kept.sum()))
        return weights, ids, kept

    def _begin(self, rows: int) -> None:
        """Read what the host said of this step; ``rows`` come to the layers."""
        groups = self._step.groups
        self._now = groups is not None and len(groups) > 0 and rows >= self._step.num_rows
        if groups is None or not self._now:
            return
        self._rows = np.concatenate([np.arange(first, first + count, dtype=np.int32) for first, count in groups])
        ends = np.cumsum(groups[:, 1]) if self.per_request else [len(self._rows)]
        self._pools = np.array([0, *ends], np.int32)
        self._whole = len(self._rows) == rows and bool((np.diff(self._rows) == 1).all())

    def _count(self, exact: int, used: int, dropped: int) -> None:
        self._calls += 1
        self._exact += int(exact)
        self._used += int(used)
        self._dropped += int(dropped)


class MoeTails:
    """Shares of tokens' smallest routing weights per layer, from the forward passes between :meth:`attach` and
    :meth:`detach` of an engine in eager mode; 12 bytes per token and layer, up to :data:`MOST_TOKENS`."""

    MOST_TOKENS = 65536

    def __init__(self) -> None:
        self._layers: list[MoeLayer] = []
        self._seen: list[list[torch.Tensor]] = []
        self._slots: list[int] = []

    def attach(self, model: torch.nn.Module) -> None:
        """Observe every layer from now on; goes on where a former attachment ended.

        Raises:
            ValueError: the model has no layers whose routing can be observed, others than before, or is compiled.
        """
        layers = moe_layers.find(model)
        if isinstance(layers, str):
            raise ValueError(layers)
        if moe_layers.compiled_modules(model):
            raise ValueError("routing is observed in eager mode only: start the engine with enforce_eager=True")
        if self._seen and len(self._seen) != len(layers):
            raise ValueError("this is another model than the one observed before")
        self._seen = self._seen or [[] for _ in layers]
        self._slots = [min(MAX_DROP, layer.top_k - 1) for layer in layers]
        for layer in layers:
            layer.replace(lambda own, kept=self._seen[layer.index]: self._observed(kept, own), opaque=False)  # type: ignore[misc]
        self._layers = layers

    def detach(self) -> None:
        """Stop observing."""
        for layer in self._layers:
            layer.restore()
        self._layers = []

    def result(self) -> dict[str, list[list[float]]]:
        """``beta``: per layer the median share of a token's smallest, two smallest and three smallest weights in all of
        them; fewer where a token has fewer than four experts.

        Raises:
            ValueError: no token was seen.
        """
        if not self._seen or not all(self._seen):
            raise ValueError("no tokens were observed")
        medians = [
            torch.cat(parts)[:, :slots].median(dim=0) for parts, slots in zip(self._seen, self._slots, strict=True)
        ]
        return {"beta": [[round(float(value), 6) for value in found.values] for found in medians]}

    def _observed(self, kept: list[torch.Tensor], own: Select) -> Select:
        def select(*args: Any, **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
            weights, ids = own(*args, **others)
            if sum(map(len, kept)) < self.MOST_TOKENS:
                kept.append(tail_ratios(weights.detach().cpu()))
            return weights, ids

        return select
