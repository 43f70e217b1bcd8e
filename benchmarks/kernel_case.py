"""A case of the kernels' benchmark: what is launched, how it is checked, and the least work it must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Bench:
    """What the cases are made for.

    Attributes:
        dry: tiny shapes on the CPU.
        quick: one shape of the large ones.
        peers: names of those to run.
    """

    dry: bool = False
    quick: bool = False
    peers: tuple[str, ...] = ("sdpa", "flex", "xformers")
    seed: int = 0

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    def shapes(self, tiny: Any, *large: Any) -> tuple[Any, ...]:
        """The shapes to run."""
        return (tiny,) if self.dry else large[:1] if self.quick else large


@dataclass
class Case:
    """One thing to time.

    Attributes:
        kernel, task, provider: for the result's row; ``provider`` "own" is this plugin's.
        run: launches it.
        work: least bytes and operations; None: no roofline is given.
        error: how far the result is from its definition, after a run; None: a peer that was checked elsewhere.
        allowed: largest such error.
    """

    kernel: str
    task: str
    provider: str
    run: Callable[[], Any]
    work: Any = None
    error: Callable[[], float] | None = None
    allowed: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.kernel} {self.task} [{self.provider}]"


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """``|found - wanted| / |wanted|``; infinite where something is not a number."""
    difference = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    return float(difference.nan_to_num(torch.inf))


def unequal(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of entries that differ."""
    return float((found.cpu() != wanted.cpu()).float().mean())
