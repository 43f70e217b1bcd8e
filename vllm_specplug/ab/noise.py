"""Was the machine quiet enough? What else it did, and how steady the control was, under one load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_specplug.ab.measures import answered
from vllm_specplug.ab.results import Cell

#: From here on each is worth a sentence: shares of the processors that other programs use, drift and spread.
BUSY, DRIFT, SPREAD = 0.10, 0.05, 0.05
#: Fewer cells of the control tell neither drift nor spread.
FEWEST_CELLS = 4


@dataclass(frozen=True)
class Noise:
    """Signs of a restless machine.

    Attributes:
        busy: share of the processors that processes outside the run used while the arm and the control were
            measured, mean over time; None if unknown.
        busy_more: how much more of them they used while the arm was measured than while the control was.
        drift: change of the control's time per token from the first cell to the last, by a straight line through all,
            as a share; None without repeats.
        spread: standard deviation between the control's cells of its time per token, as a share, after that line;
            None without repeats.
    """

    busy: float | None
    busy_more: float | None
    drift: float | None
    spread: float | None

    def taken(self) -> float:
        """Share of the processors that other programs took, where it is worth a sentence: no smaller difference
        between arms is to be believed, for it may be theirs. (On two cores with three like servers, of which each
        waited for its turn, 18% made a difference of 6% whose interval left out 0.)"""
        shares = [abs(x) for x in (self.busy, self.busy_more) if x is not None and abs(x) > BUSY]
        return max(shares, default=0.0)

    def signs(self) -> list[str]:
        """What a reader should know, in plain words; empty: nothing."""
        found = []
        if self.busy_more is not None and abs(self.busy_more) > BUSY:
            more = "more" if self.busy_more > 0 else "less"
            found.append(
                f"other programs used {abs(self.busy_more):.0%} of the processors {more} while it was measured than "
                "while the control was"
            )
        elif self.busy is not None and self.busy > BUSY:
            found.append(f"other programs used {self.busy:.0%} of the processors")
        if self.drift is not None and abs(self.drift) > DRIFT:
            how = "slower" if self.drift > 0 else "faster"
            found.append(f"the control itself got {how} by {abs(self.drift):.0%} during the run")
        if self.spread is not None and self.spread > SPREAD:
            found.append(f"the control's own speed varied by {self.spread:.0%} between blocks")
        return found


def look(control: Sequence[Cell], arm: Sequence[Cell]) -> Noise:
    """Noise under one load; cells in the order they were measured."""
    ours, theirs = _busy(arm), _busy(control)
    known = [x for x in (ours, theirs) if x is not None]
    drift, spread = _steadiness(control)
    return Noise(
        busy=float(np.mean(known)) if known else None,
        busy_more=ours - theirs if ours is not None and theirs is not None else None,
        drift=drift,
        spread=spread,
    )


def _busy(cells: Sequence[Cell]) -> float | None:
    known = [(c.cpu_busy, max(c.seconds, 1e-9)) for c in cells if c.cpu_busy is not None]
    return float(np.average([b for b, _ in known], weights=[s for _, s in known])) if known else None


def _steadiness(cells: Sequence[Cell]) -> tuple[float | None, float | None]:
    """Drift and spread of the logarithm of a cell's time per token. Blocks hold different requests, so only repeats
    of a block tell: each block's own mean is taken out."""
    points = []
    for order, cell in enumerate(cells):
        good = [r for r in cell.replies if answered(r)]
        seconds, tokens = sum(r.total_s for r in good), sum(r.output_tokens for r in good)
        if seconds > 0 and tokens > 0:
            points.append((order, cell.block, math.log(seconds / tokens)))
    names = {block for _, block, _ in points}
    left = len(points) - len(names) - 1
    if len(points) < FEWEST_CELLS or left < 1:
        return None, None
    blocks = np.array([block for _, block, _ in points])
    time = np.array([order for order, _, _ in points], float)
    value = np.array([log for _, _, log in points])
    ends = time[-1] - time[0]
    for block in names:
        value[blocks == block] -= value[blocks == block].mean()
        time[blocks == block] -= time[blocks == block].mean()
    moved = float(time @ time)
    slope = float(time @ value) / moved if moved > 0 else 0.0
    return math.expm1(slope * ends), math.sqrt(float(np.sum((value - slope * time) ** 2)) / left)
