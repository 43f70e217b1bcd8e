"""How much of a context each KV head needs: observed in a running engine, for `specplug sparse calibrate`.

For some verify steps, every layer's attention is computed again as it would be over fewer units, ranked as SparseVerify
ranks them, for a grid of shares. The error of a head is what it changes in the model's residual stream there, squared,
relative to the stream: so small errors of a layer that contributes little count little.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vllm_specplug.host.cpu_attention import TreeAttentionImpl
from vllm_specplug.kernels.block_select import Selection, overlap, summarise, votes_reference
from vllm_specplug.kernels.tree_attention_cpu import PreparedStep

#: Shares of a context that are tried.
FRACTIONS = (0.04, 0.0625, 0.09, 0.125, 0.18, 0.25, 0.33, 0.42, 0.5, 0.6, 0.7, 0.8, 1.0)
#: Choices are compared between layers and rows at this share; layers at least so alike share a choice.
COMPARED, ALIKE = 0.25, 0.7


class AttentionObserver:
    """Observes the first tree of steps, in an engine whose attention is exact and not compiled.

    Attributes:
        steps: observed so far.
        wanted: whether the coming step is to be observed.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.steps = 0
        self.wanted = False
        self.contexts: list[int] = []
        self._names: list[str] = []
        self._errors = torch.zeros(0)
        self._alike = np.zeros((0, 0))
        self._rows: dict[int, list[float]] = {}
        self._pending: dict[int, torch.Tensor] = {}
        self._chosen: dict[int, torch.Tensor] = {}
        self._undo: list[Callable[[], Any]] = []

    def attach(self, model: torch.nn.Module, layers: dict[str, Any]) -> None:
        """Observe ``model``, whose attention layers by name are ``layers``.

        Raises:
            ValueError: a layer's place in the model is not of a kind that is known.
        """
        modules = dict(model.named_modules())
        self._names = [n for n, layer in layers.items() if type(getattr(layer, "impl", None)) is TreeAttentionImpl]
        if not self._names:
            raise ValueError("no attention layer can attend part of a context here")
        kv_heads = {layers[name].impl.num_kv_heads for name in self._names}
        if len(kv_heads) != 1:
            raise ValueError("the layers have different numbers of KV heads")
        count = len(self._names)
        self._errors = torch.zeros(len(FRACTIONS), count, kv_heads.pop())
        self._alike = np.zeros((count, count))
        for index, name in enumerate(self._names):
            whole, projection = _surroundings(modules, name)
            layers[name].impl.observer = self._observer(index, projection)
            hook = whole.register_forward_hook(self._after(index))
            self._undo += [hook.remove, lambda impl=layers[name].impl: delattr(impl, "observer")]

    def detach(self) -> None:
        """Observe no longer."""
        for undo in self._undo:
            undo()
        self._undo = []

    def _observer(self, index: int, projection: torch.nn.Module) -> Callable[..., None]:
        def observe(
            layer: Any,
            query: torch.Tensor,
            keys: torch.Tensor,
            values: torch.Tensor,
            step: PreparedStep,
            out: Any,
            scale: float,
        ) -> None:
            if self.wanted:
                self._pending[index] = self._measure(index, query, keys, values, step, scale, projection)

        return observe

    def _after(self, index: int) -> Callable[..., None]:
        def after(module: Any, args: Any, output: Any) -> None:
            if index not in self._pending:
                return
            rows, energy = self._span, self._pending.pop(index)
            parts = output if isinstance(output, tuple) else (output,)
            stream = sum(part[rows].float() for part in parts if isinstance(part, torch.Tensor))
            assert isinstance(stream, torch.Tensor)
            self._errors[:, index] += (energy / stream.pow(2).sum(-1)).mean(-1)
            if index == len(self._names) - 1:
                self._compare()

        return after

    def _measure(
        self,
        index: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: PreparedStep,
        scale: float,
        projection: torch.nn.Module,
    ) -> torch.Tensor:
        """``float32[F, kv_heads, rows]`` squared change of the attention layer's output."""
        trees, layout, pick = step.trees, step.layout, self.selection
        start, size, context, request = (int(t[0]) for t in trees[:4])
        self._span = slice(start, start + size)
        kv_heads, unit = keys.shape[1], pick.unit
        group = query.shape[1] // kv_heads
        blocks = step.block_table[request, : -(-(context + size) // layout.block_size)].long()
        k, v = (
            cache[blocks].flatten(2)[:, :, torch.from_numpy(offsets.astype(np.int64))].transpose(1, 2).flatten(0, 1)
            for cache, offsets in ((keys, layout.keys), (values, layout.values))
        )
        k, v = (x[: context + size].float().transpose(0, 1) for x in (k, v))  # [kv_heads, slots, head_size]
        tail = pick.tail_block(context, layout.block_size) * layout.block_size
        units = tail // unit
        sums = summarise(k[:, :tail].unflatten(1, (units, unit)), pick.summary)
        rows = query[start : start + size]
        votes = votes_reference(rows if pick.all_rows else rows[:1], sums, scale, pick.by_head)
        first = -(-pick.first // unit)
        order = _ranked(votes, first)
        q = rows.float().unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3) * scale
        scores = torch.einsum("hgrd,hkd->hgrk", q, k)
        seen = torch.ones(size, context + size, dtype=torch.bool)
        seen[:, context:] = trees.visible[:size, :size].bool()
        scores = scores.masked_fill(~seen, -math.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        # Sums over each unit, added up in the order of rank: the result for any number of units is one of these.
        of_units = weights[..., :tail].unflatten(-1, (units, unit))
        mass = of_units.sum(-1)
        summed = torch.einsum("hgruk,hukd->hgrud", of_units, v[:, :tail].unflatten(1, (units, unit)))
        turn = order[:, None, None].expand(-1, group, size, -1)
        mass = mass.gather(-1, turn).cumsum(-1)
        summed = summed.gather(-2, turn[..., None].expand_as(summed)).cumsum(-2)
        own_mass = weights[..., tail:].sum(-1)
        own = torch.einsum("hgrk,hkd->hgrd", weights[..., tail:], v[:, tail:])
        full = (summed[..., -1, :] + own) / (mass[..., -1] + own_mass)[..., None]
        found = []
        for share in FRACTIONS:
            count = min(units, max(first, math.ceil((share * context - (context - tail)) / unit)))
            part = summed[..., count - 1, :] + own if count else own
            total = mass[..., count - 1] + own_mass if count else own_mass
            found.append(part / total[..., None] - full)
        self._keep(index, order, rows, sums, scale, int(COMPARED * units))
        return _projected(torch.stack(found), projection, query.dtype)

    def _keep(
        self, index: int, order: torch.Tensor, rows: torch.Tensor, sums: torch.Tensor, scale: float, count: int
    ) -> None:
        """Keep the layer's choice, to compare it with other layers', and compare its rows' own choices."""
        units = order.shape[1]
        chosen = torch.zeros(len(order), units, dtype=torch.bool).scatter_(1, order[:, :count], True)
        self._chosen[index] = chosen
        first = -(-self.selection.first // self.selection.unit)
        order = _ranked(votes_reference(rows[:1], sums, scale, self.selection.by_head), first)
        chosen = torch.zeros_like(chosen).scatter_(1, order[:, :count], True)
        for row in range(1, len(rows)):
            other = _ranked(votes_reference(rows[row : row + 1], sums, scale, self.selection.by_head), first)
            theirs = torch.zeros_like(chosen).scatter_(1, other[:, :count], True)
            self._rows.setdefault(row, []).append(overlap(chosen, theirs))

    def _compare(self) -> None:
        """The step's last layer is done."""
        count = len(self._names)
        for a in range(count):
            for b in range(a, count):
                self._alike[a, b] += overlap(self._chosen[a], self._chosen[b])
        self.steps += 1
        self.wanted = False

    def result(self) -> dict[str, Any]:
        """The part ``attention`` of a calibration: ``layers``, ``fractions`` (F), ``errors`` (F, layers, KV heads),
        ``context`` in tokens, ``anchors``, ``alike`` (Jaccard similarity of the layers' choices, upper triangle) and
        ``rows_alike`` (of row n's choice with the first row's, n from 1).

        Raises:
            ValueError: no step was observed.
        """
        if not self.steps:
            raise ValueError("no step was observed: are the prompts long enough?")
        alike = self._alike / self.steps
        anchors, last = [], 0
        for index, name in enumerate(self._names):
            if index == 0 or alike[last, index] < ALIKE:
                anchors.append(name)
                last = index
        return {
            "layers": self._names,
            "fractions": list(FRACTIONS),
            "errors": (self._errors / self.steps).tolist(),
            "context": int(np.mean(self.contexts)),
            "anchors": anchors,
            "alike": np.round(alike, 4).tolist(),
            "rows_alike": [round(float(np.mean(self._rows[row])), 4) for row in sorted(self._rows)],
            "steps": self.steps,
        }


def _ranked(votes: torch.Tensor, first: int) -> torch.Tensor:
    """``int64[kv_heads, units]`` units by falling votes, the ``first`` ones before all."""
    votes = votes.clone()
    votes[:, :first] = torch.inf
    return votes.argsort(dim=1, descending=True, stable=True)


def _projected(change: torch.Tensor, projection: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """``float32[F, kv_heads, rows]`` squared length, after the output projection, of each head's change
    ``[F, kv_heads, group, rows, head_size]``."""
    shares, kv_heads, group, rows, size = change.shape
    energy = torch.zeros(shares, kv_heads, rows)
    for head in range(kv_heads):
        alone = torch.zeros(shares, rows, kv_heads * group, size)
        alone[:, :, head * group : (head + 1) * group] = change[:, head].transpose(1, 2)
        result = projection(alone.flatten(2).flatten(0, 1).to(dtype))
        result = result[0] if isinstance(result, tuple) else result
        energy[:, head] = result.float().pow(2).sum(-1).view(shares, rows)
    return energy


def _surroundings(modules: dict[str, torch.nn.Module], name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The decoder layer that the attention layer ``name`` is in, and the projection of its output.

    Raises:
        ValueError: there is no such layer or projection.
    """
    parts = name.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    whole = modules.get(".".join(parts))
    parent = modules.get(name.rpartition(".")[0])
    found = [child for child in parent.children() if type(child).__name__ == "RowParallelLinear"] if parent else []
    if whole is None or len(found) != 1:
        raise ValueError(f"layer {name} is not built as it would have to be: no decoder layer, or no one output layer")
    return whole, found[0]
