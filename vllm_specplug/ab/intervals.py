"""How much faster, and how sure: ratios of sums over pairs, with 95% intervals that hold with few and dependent pairs.

A pair is one request answered by an arm and by the control in the same block and repeat. Pairs are not independent:

- a request answered in several repeats gains about as much each time;
- requests of one cell (block and repeat) ran on the same machine at the same time, often in the same batch.

So the variance is that of two crossed clusterings: of requests, plus of cells, minus what both count (Cameron, Gelbach
and Miller, "Robust inference with multiway clustering", JBES 2011). With few clusters a normal quantile makes such an
interval too short, and often there are few cells and many requests. So either part has a quantile of its own: that of a
wild cluster bootstrap of the studentised ratio (Cameron, Gelbach and Miller, "Bootstrap-based improvements for
inference with clustered errors", REStat 2008) with Webb's six weights, which still make many different samples of few
clusters, and never less than Student's. benchmarks/bench_ab_verdict.py measures how often such an interval holds the
truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[Any]

#: Bootstrap samples of an interval.
DRAWS = 999
#: With fewer clusters than that there are too few different samples, and the quantile is Student's alone.
_FEWEST_DRAWN = 4
#: Weights of a wild bootstrap with few clusters (Webb, "Reworking wild bootstrap based inference for clustered
#: errors", Queen's Economics Department working paper 1315).
_WEBB = np.sqrt([0.5, 1.0, 1.5])
_WEIGHTS = np.concatenate([-_WEBB, _WEBB])
#: Most numbers of a matrix of weighted samples: 64 MB.
_CHUNK = 8_000_000
#: 97.5% quantile of the normal distribution.
_NORMAL = 1.959964
#: 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom; beyond the table an expansion serves.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """A ratio and the ends of its 95% interval; both ends None where there is but one request or cell."""

    value: float
    low: float | None = None
    high: float | None = None


def paired_ratio(
    ours: Floats, base: Floats, request: Ints, cell: Ints, seed: int = 0, allowed: float = 0.0
) -> Estimate | None:
    """Ratio of two rates over pairs, with its interval.

    Args:
        ours: ``float[n, 2]`` per pair: what is counted, and in how much (tokens and seconds, say). The rate is the
            sum of the first over the sum of the second.
        base: the same of the control.
        request: ``int[n]`` which request a pair is of.
        cell: ``int[n]`` which block and repeat it is of.
        seed: of the bootstrap.
        allowed: variance of the logarithm of the ratio that the pairs cannot show, for the interval to hold as well.

    Returns:
        The rate of ``ours`` over that of ``base``; None if a sum is not positive.
    """
    data = np.concatenate([np.asarray(ours, float), np.asarray(base, float)], axis=1)
    sums = data.sum(axis=0)
    if not len(data) or not np.all(sums > 0):
        return None
    value = float(sums[0] / sums[1] / (sums[2] / sums[3]))
    shares = data / sums
    # Each pair's part in the deviation of log(value): the derivative by its weight.
    scores = shares @ np.array([1.0, -1.0, -1.0, 1.0])
    requests, cells = _Clusters(request), _Clusters(cell)
    if min(requests.count, cells.count) < 2:
        return Estimate(value)
    part = (shares[:, 1] + shares[:, 3]) / 2
    of_requests, of_cells, of_both = (
        float(c.variance(scores[None])[0]) for c in (requests, cells, _Clusters(request, cell))
    )
    quantiles = [_quantile(scores, part, clusters, seed) for clusters in (requests, cells)]
    square = quantiles[0] ** 2 * max(of_requests - of_both, 0.0) + quantiles[1] ** 2 * of_cells
    # The difference can come out too small.
    square = max(square, quantiles[0] ** 2 * of_requests)
    # An interval beyond a factor of a million says nothing more.
    reach = math.exp(min(math.sqrt(square + _NORMAL**2 * allowed), math.log(1e6)))
    return Estimate(value, value / reach, value * reach)


class _Clusters:
    """Which pairs belong together."""

    def __init__(self, *keys: Ints) -> None:
        """Pairs with equal ``keys`` are one cluster."""
        _, self.member = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)
        self.member = self.member.reshape(-1)
        self.count = int(self.member.max()) + 1
        self._order = np.argsort(self.member, kind="stable")
        self._starts = np.searchsorted(self.member[self._order], np.arange(self.count))

    def variance(self, scores: Floats) -> Floats:
        """``float[m]`` cluster-robust variance of the sums of ``scores: float[m, n]``."""
        if self.count < 2:
            return np.zeros(len(scores))
        sums = np.add.reduceat(scores[:, self._order], self._starts, axis=1)
        return (sums**2).sum(axis=1) * (self.count / (self.count - 1))


def _quantile(scores: Floats, shares: Floats, clusters: _Clusters, seed: int) -> float:
    """95% quantile of the bootstrapped |deviation| in standard errors of one clustering.

    Args:
        scores: ``float[n]``; they add up to 0.
        shares: ``float[n]`` each pair's part in what the new estimate takes away from the scores; adds up to 1.
    """
    least = student(clusters.count - 1)
    if clusters.count < _FEWEST_DRAWN or np.abs(scores).max() < 1e-12:
        return least
    rng = np.random.default_rng(seed)
    found = []
    step = max(1, _CHUNK // len(scores))
    for start in range(0, DRAWS, step):
        weights = rng.choice(_WEIGHTS, size=(min(step, DRAWS - start), clusters.count))
        drawn = scores * weights[:, clusters.member]
        deviation = drawn.sum(axis=1)
        errors = np.sqrt(clusters.variance(drawn - shares * deviation[:, None]))
        found.append(np.abs(deviation) / np.maximum(errors, 1e-300))
    return max(least, float(np.quantile(np.concatenate(found), 0.95)))


def student(freedom: int) -> float:
    """97.5% quantile of Student's t; beyond ten degrees of freedom within 0.001 (Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
