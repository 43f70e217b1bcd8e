"""Feed-forward layers that verify drafts from the channels their rows' gates open; and how thresholds are found.

For a step all of whose rows verify drafts, few of them, each gated layer (:mod:`.gated_ffn`) skips the channels whose
activation is below the layer's threshold for every row (:mod:`vllm_specplug.kernels.ffn_union`; CATS, arXiv
2404.08763). Thresholds are quantiles of ``|SiLU(gate)|``, observed by :class:`FfnQuantiles` while the model reads text.

All other steps, and those where skipping would not pay, run the layer's own parts. Whether it pays is measured at
start: the share of channels below which the kernel beats the layer, by number of rows. What share a layer's rows open
is learned as it goes.

In eager mode the modules' ``forward`` is replaced, which vLLM's decoder layers call per step. In the compiled mode
they are traced once, so there the replacement is an operator that the compiler does not look into.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vllm_specplug.host.gated_ffn import GatedFfn, find, reason_against
from vllm_specplug.host.sparse_step import SparseStep
from vllm_specplug.kernels.ffn_union_cpu import PackedFfn, ffn_union_cpu, pack_ffn
from vllm_specplug.proposers.sparse_verify import SparseVerifyOptions

logger = logging.getLogger("vllm.specplug")

#: Sparsities that a calibration holds thresholds for.
LEVELS = tuple(round(0.05 * n, 2) for n in range(1, 20))
NO_CALIBRATION = "no calibration: run `specplug sparse calibrate MODEL`"

# Row counts that are timed at start; others count as the next larger one.
_TIMED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Weights that a timing walks through: more than any near cache holds, so that they come from memory as in a step.
_TIMED_BYTES = 256 * 2**20
_REPEATS = 5
# A layer's share is averaged over about so many steps, and looked at again this often where it does not pay.
_MEMORY = 32
_LOOK_AGAIN = 64
# Largest difference between a layer and its copy, relative to the largest output.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class SparseFfn:
    """The gated layers of one engine.

    Attributes:
        break_even: ``float[rows + 1]`` share of channels up to which the kernel is used, by rows of the step; measured
            by :meth:`attach`. Above 1: always.
        bytes: memory of the copies of weights.
    """

    def __init__(self, options: SparseVerifyOptions, step: SparseStep, calibration: dict[str, Any] | None) -> None:
        """
        Args:
            step: what the host says of the coming forward pass.
            calibration: part "ffn" of what `specplug sparse calibrate` found: :meth:`FfnQuantiles.result`.
        """
        self._options = options
        self._step = step
        self._calibration = calibration
        self._layers: list[_Layer] = []
        self._compiled: list[Any] = []
        self.break_even = np.zeros(options.ffn_rows + 1)
        self.bytes = 0
        self._now = False
        self._steps_sparse = self._steps_dense = 0
        self._calls = 0
        self._shares = 0.0

    def attach(self, model: torch.nn.Module) -> str:
        """Copy the gated layers' weights and take their place. Before the model's first forward pass in compiled mode.

        Returns:
            Why it cannot act, in which case nothing is changed; empty if it acts, or if there is nothing to do.
        """
        if self._options.ffn_sparsity == 0 or self._layers:
            return ""
        taus = self._thresholds()
        if isinstance(taus, str):
            return taus
        ffns = find(model)
        reason = reason_against(ffns)
        if reason:
            return reason
        if len(ffns) != len(taus):
            return f"the calibration is of a model of {len(taus)} feed-forward layers, this one has {len(ffns)}"
        compiled = [m for m in model.modules() if getattr(m, "do_not_compile", True) is False]
        reason = _compiled_reason(compiled, ffns)
        if reason:
            return reason
        with torch.inference_mode():
            layers = []
            for index, (ffn, tau) in enumerate(zip(ffns, taus, strict=True)):
                layers.append(_Layer(self, index, ffn, pack_ffn(*ffn.weights()), float(tau)))
                if not _same(layers[-1]):
                    return f"{ffn.name} is not down_proj(SiLU(gate) * up) of its weights"
            self._layers = layers
            self.bytes = sum(layer.packed.nbytes for layer in layers)
            self.break_even = _measure(layers, self._options.ffn_rows)
        for layer in layers:
            layer.replace(bool(compiled))
        _mark(compiled, [ffn.name for ffn in ffns])
        self._compiled = compiled
        logger.info(
            "vllm-specplug: feed-forward layers are approximate in steps of up to %d verified rows: a copy of their "
            "weights takes %.0f MiB; it pays while a step's rows need less than these shares of the channels: %s.",
            self._options.ffn_rows,
            self.bytes / 2**20,
            ", ".join(f"{rows}: {share:.2f}" for rows, share in enumerate(self.break_even) if rows),
        )
        return ""

    def detach(self) -> None:
        """The model's own layers again; the copies are freed. Where the model was compiled meanwhile, its operator
        stays and runs the layers' own parts."""
        for layer in self._layers:
            layer.restore()
        _unmark(self._compiled)
        self._layers, self._compiled, self.bytes = [], [], 0

    def stats(self) -> dict[str, float]:
        """Verified steps with sparse layers and without, mean share of channels they computed, bytes of copies."""
        return {
            "ffn_steps_sparse": float(self._steps_sparse),
            "ffn_steps_dense": float(self._steps_dense),
            "ffn_union_share": self._shares / self._calls if self._calls else 0.0,
            "ffn_bytes": float(self.bytes),
        }

    def _thresholds(self) -> np.ndarray | str:
        """Of every layer, for the sparsity asked for; or why there are none."""
        if not self._calibration:
            return NO_CALIBRATION
        quantiles = np.array(self._calibration["quantiles"], np.float64)
        if quantiles.ndim != 2 or quantiles.shape[1] != len(LEVELS):
            return f"the calibration's ffn.quantiles must have {len(LEVELS)} thresholds per layer"
        wanted = self._options.ffn_sparsity
        return np.array([np.interp(wanted, (0.0, *LEVELS), (0.0, *row)) for row in quantiles])

    def acts(self, layer: _Layer, rows: int) -> bool:
        """Whether a layer's coming call may skip channels; the first layer's decides for the step."""
        if layer.index == 0:
            self._now = self._covers(rows)
        return self._now and layer.pays(rows, self.break_even[rows])

    def _covers(self, rows: int) -> bool:
        groups = self._step.groups
        if groups is None:
            return False
        # Rows of prompts are always exact, and a layer computes all of its rows in one way.
        sparse = (
            rows == self._step.num_rows <= self._options.ffn_rows
            and int(groups[:, 1].sum()) == rows
            and self.break_even[rows] > 0
        )
        if sparse:
            self._steps_sparse += 1
        else:
            self._steps_dense += 1
        return sparse

    def count(self, share: float) -> None:
        """A sparse call computed this share of its channels."""
        self._calls += 1
        self._shares += share


class _Layer:
    """One gated layer and its copy, in the place of the layer's module."""

    def __init__(self, owner: SparseFfn, index: int, ffn: GatedFfn, packed: PackedFfn, tau: float) -> None:
        self.index = index
        self.ffn = ffn
        self._packed: PackedFfn | None = packed
        self.tau = tau
        self._owner: SparseFfn | None = owner
        self._before: Callable[..., Any] | None = None
        self._own: Callable[..., Any] = ffn.dense
        self._share: dict[int, list[float]] = {}

    @property
    def packed(self) -> PackedFfn:
        """The copy of the weights, until `restore`."""
        assert self._packed is not None
        return self._packed

    def replace(self, compiled: bool) -> None:
        """Take the module's place: its ``forward``, found first on the instance, which `Module.__call__` reads anew in
        every call. The module, its parts and their hooks stay."""
        module, name = self.ffn.module, self.ffn.name
        self._before = vars(module).get("forward")
        if compiled:
            _register_operator()
            _operated[name] = self

            def forward(x: torch.Tensor) -> torch.Tensor:
                result: torch.Tensor = torch.ops.specplug.sparse_ffn(x, name)
                return result
        else:
            self._own = module.forward
            forward = self.run
        module.forward = forward

    @property
    def active(self) -> bool:
        """Whether it may still skip channels."""
        return self._owner is not None

    def restore(self) -> None:
        """Give the module its place back and free the copy."""
        self._owner, self._packed = None, None
        if self._before is not None:
            self.ffn.module.forward = self._before
        else:
            vars(self.ffn.module).pop("forward", None)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The module's forward pass, rows ``[T, H]``."""
        owner = self._owner
        if owner is None or x.dim() != 2 or x.stride(1) != 1 or not owner.acts(self, len(x)):
            return self._own(x)
        out = torch.empty_like(x)
        share = self.compute(x, out) / self.ffn.channels
        owner.count(share)
        self._note(len(x), share)
        return out

    def compute(self, x: torch.Tensor, out: torch.Tensor, tau: float | None = None) -> int:
        """The sparse layer; the number of channels computed."""
        return ffn_union_cpu(x, self.packed, self.tau if tau is None else tau, out)

    def pays(self, rows: int, break_even: float) -> bool:
        """Whether rows as many as these open few enough channels, by what they opened before."""
        seen = self._share.get(rows)
        if seen is None or seen[0] <= break_even or break_even >= 1:
            return break_even > 0
        seen[1] += 1
        return break_even > 0 and seen[1] % _LOOK_AGAIN == 0

    def _note(self, rows: int, share: float) -> None:
        seen = self._share.get(rows)
        if seen is None:
            self._share[rows] = [share, 0.0]
        else:
            seen[0] += (share - seen[0]) / _MEMORY


def _random_rows(ffn: GatedFfn, rows: int) -> torch.Tensor:
    return torch.randn(rows, ffn.hidden_size, generator=torch.Generator().manual_seed(rows)).to(ffn.dtype)


def _same(layer: _Layer) -> bool:
    """Whether the module computes, of random rows, what its copy does."""
    ffn, act = layer.ffn, layer.ffn.module.act_fn
    x = _random_rows(ffn, 3)
    copy = torch.empty_like(x)
    layer.compute(x, copy, 0.0)
    method = act._forward_method
    act._forward_method = act.forward_native  # in compiled mode its own would be compiled here, for nothing
    try:
        own = ffn.module.forward(x)
    finally:
        act._forward_method = method
    return bool((own.float() - copy.float()).abs().max() <= _TOLERANCE[ffn.dtype] * own.float().abs().max())


def _measure(layers: list[_Layer], most: int) -> np.ndarray:
    """Share of channels at which kernel and module take as long, by rows up to ``most``; 2 where it always pays."""
    size = layers[0].packed.nbytes
    chosen = layers[: max(1, -(-_TIMED_BYTES // size))]
    break_even = np.zeros(most + 1)
    done = 0
    for rows in sorted({min(r, most) for r in _TIMED_ROWS}):
        x = _random_rows(chosen[0].ffn, rows)
        out = torch.empty_like(x)
        # Half of the channels, of whatever these rows open.
        acts = [torch.nn.functional.silu(x.float() @ layer.packed.gate[:, : x.shape[1]].float().T) for layer in chosen]
        halves = [float(act.abs().amax(0).median()) for act in acts]

        def dense(x: torch.Tensor = x) -> float:
            for layer in chosen:
                layer.ffn.dense(x)
            return 0.0

        def half(x: torch.Tensor = x, out: torch.Tensor = out, halves: list[float] = halves) -> float:
            opened = [layer.compute(x, out, t) / layer.ffn.channels for layer, t in zip(chosen, halves, strict=True)]
            return sum(opened) / len(opened)

        def full(x: torch.Tensor = x, out: torch.Tensor = out) -> float:
            for layer in chosen:
                layer.compute(x, out, 0.0)
            return 1.0

        seconds = np.full(3, np.inf)
        share = 0.5
        for repeat in range(_REPEATS + 1):
            for way, call in enumerate((dense, half, full)):
                start = time.perf_counter()
                result = call()
                if repeat:  # the first time compiles and allocates
                    seconds[way] = min(seconds[way], time.perf_counter() - start)
                if way == 1:
                    share = result
        break_even[done + 1 : rows + 1] = crossing(seconds[0], seconds[1], seconds[2], share)
        done = rows
    return break_even


def crossing(dense: float, half: float, full: float, share: float) -> float:
    """Share of channels at which a kernel that takes ``half`` for ``share`` of them and ``full`` for all takes as long
    as ``dense``, its time being a line; 0 if it never pays, 2 if it pays for all channels."""
    if full <= dense:
        return 2.0
    slope = (full - half) / max(1.0 - share, 1e-6)
    if slope <= 0:  # disturbed: no faster for fewer
        return 0.0
    return float(np.clip(share + (dense - half) / slope, 0.0, 1.0))


_operated: dict[str, _Layer] = {}
_library: list[torch.library.Library] = []
_MARK = "specplug_sparse_ffn"


def _register_operator() -> None:
    """``torch.ops.specplug.sparse_ffn(x, name)``: the layer ``name`` of this process's model, for compiled models."""
    if _library:
        return
    library = torch.library.Library("specplug", "FRAGMENT")
    library.define("sparse_ffn(Tensor x, str name) -> Tensor")
    library.impl("sparse_ffn", lambda x, name: _operated[name].run(x), "CPU")
    torch.library.register_fake("specplug::sparse_ffn", lambda x, name: torch.empty_like(x), lib=library)
    _library.append(library)


def _is_compiled(module: Any) -> bool:
    return bool(getattr(module, "compiled", False)) or getattr(module, "aot_compiled_fn", None) is not None


def _compiled_reason(compiled: list[Any], ffns: list[GatedFfn]) -> str:
    """Why an operator cannot take the layers' place in a model that vLLM compiles; empty if it can, or need not."""
    for module in compiled:
        if _is_compiled(module):
            return "the model is already compiled"
        if not isinstance(module.vllm_config.additional_config, dict):
            return "the engine's additional_config is not a dictionary"
    if compiled and any(ffn.name in _operated and _operated[ffn.name].active for ffn in ffns):
        return "another compiled model of this process has sparse feed-forward layers"
    return ""


def _mark(compiled: list[Any], names: list[str]) -> None:
    """Have vLLM keep the compiled model apart from the one without the operator: it saves compiled models on disk under
    a hash of the configuration (``VllmConfig.compute_hash``), which knows nothing of replaced modules."""
    for module in compiled:
        module.vllm_config.additional_config = {**module.vllm_config.additional_config, _MARK: names}


def _unmark(compiled: list[Any]) -> None:
    for module in compiled:
        if not _is_compiled(module):
            config = module.vllm_config.additional_config
            module.vllm_config.additional_config = {k: v for k, v in config.items() if k != _MARK}


class FfnQuantiles:
    """Quantiles of ``|SiLU(gate)|`` per gated layer, from the forward passes between :meth:`attach` and :meth:`detach`
    of an engine in eager mode. Memory: a histogram per layer, on a grid of magnitudes in equal ratios."""

    #: The grid: ``log10`` of its ends, and steps per factor of 10 (a step is 1.8%; quantiles lie within one).
    LOW, HIGH, STEPS = -8, 4, 128

    def __init__(self) -> None:
        self._counts = torch.zeros(0, 0, dtype=torch.int64)
        self._names: list[str] = []
        self._hooks: list[Any] = []

    def attach(self, model: torch.nn.Module) -> None:
        """Observe every gated layer from now on; counts go on where a former attachment left them.

        Raises:
            ValueError: the model has no gated layers, others than before, or is one that vLLM compiles.
        """
        ffns = find(model)
        if not ffns:
            raise ValueError("the model has no feed-forward layers of gate_up_proj, SiluAndMul and down_proj")
        if any(getattr(m, "do_not_compile", True) is False for m in model.modules()):
            raise ValueError("thresholds are observed in eager mode only: start the engine with enforce_eager=True")
        names = [ffn.name for ffn in ffns]
        if self._names not in ([], names):
            raise ValueError("this is another model than the one observed before")
        if not self._names:
            self._names = names
            self._counts = torch.zeros(len(ffns), (self.HIGH - self.LOW) * self.STEPS, dtype=torch.int64)
        for index, ffn in enumerate(ffns):
            hook = self._observer(index, ffn.channels)
            self._hooks.append(ffn.module.gate_up_proj.register_forward_hook(hook))

    def detach(self) -> None:
        """Observe no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _observer(self, index: int, channels: int) -> Callable[..., None]:
        def observe(module: Any, args: Any, output: Any) -> None:
            gate = output[0][..., :channels].float()
            size = torch.nn.functional.silu(gate).abs().flatten().nan_to_num_()
            place = ((size.log10() - self.LOW) * self.STEPS).clamp_(0, self._counts.shape[1] - 1)
            self._counts[index] += torch.bincount(place.long(), minlength=self._counts.shape[1])

        return observe

    def result(self) -> dict[str, Any]:
        """``quantiles``: per layer, the threshold below which each share of `LEVELS` of the values lies; ``values``:
        how many were observed per layer.

        Raises:
            ValueError: nothing was observed.
        """
        totals = self._counts.sum(1)
        if not len(totals) or not bool((totals > 0).all()):
            raise ValueError("no forward pass was observed")
        return {"quantiles": [self._quantiles(row) for row in self._counts.numpy()], "values": totals.tolist()}

    def _quantiles(self, counts: np.ndarray) -> list[float]:
        below = np.concatenate(([0], np.cumsum(counts)))
        # Within a step of the grid, values are taken as evenly spread in the logarithm.
        grid = self.LOW + np.arange(len(below)) / self.STEPS
        filled = np.concatenate(([True], counts > 0))
        filled[:-1] |= counts > 0
        places = np.interp(np.array(LEVELS) * below[-1], below[filled], grid[filled])
        return [float(f"{10.0**place:.6g}") for place in places]
