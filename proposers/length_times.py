"""How long a step takes for every draft length, by the clock wherever that length was tried.

:class:`.step_time.StepTimeModel` says what rows cost, and so what a length never tried would; it is one smooth curve
over all loads. A GPU's steps are not: above a certain number of rows no CUDA graph was captured, and a kernel changes
its tiling. So each pair of load and length has a time of its own here, once it was seen, and the model only bridges
what was not, and the few requests by which loads of one bin differ.

Everything is in logarithms, for errors are relative. What slows all steps alike, such as contexts that grow, is one
drift common to all pairs: so the lengths not tried at the moment keep up with the one that is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .base import StepLoad
from .step_time import StepTimeModel

#: Loads of one bin differ by a fifth at most, so many bins make an octave.
BINS_PER_OCTAVE = 4
_BINS = 24 * BINS_PER_OCTAVE
# The first steps of a pair: its time is the least of them, since what disturbs a step makes it longer. The very first
# is not believed at all if its logarithm is so far above what was expected.
_FIRST, _ODD = 3, 0.5
# Then an average over so many steps, after the drift has taken its share.
_STEPS = 32
_DRIFT = 0.06
# A step off by more is an outlier, and counts as this far off; so many in a row are no outliers.
_CLIP, _CHANGE = 0.15, 4
# Standard deviations of the logarithm: of a pair well known, first seen; and what age adds to the variance per step.
_KNOWN, _FRESH, _AGING = 0.015, 0.06, 1e-5
# Of one that is bridged: at least, per bin of loads, per octave of rows within a load, at most; and bins within reach.
_NEAR, _PER_BIN, _PER_OCTAVE, _FAR, _REACH = 0.08, 0.06, 0.4, 0.7, 6
# Part of the model's logarithm that is believed of longer drafts: it takes rows for dearer than they are on GPUs.
_BELIEVED = 0.5
# Steps after which the model is asked again; visits after which it hears of a pair's steps every so often only.
_EPOCH = 32
_HEARD, _EVERY = 64, 4


class LengthTimes:
    """Learns seconds per step from the steps of all loads and lengths.

    Args:
        lengths: draft tokens per request, ascending.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.model = StepTimeModel()
        width = len(self.lengths)
        self._log = [[0.0] * width for _ in range(_BINS)]  # of the seconds, less the drift, at the bin's middle
        self._visits = [[0] * width for _ in range(_BINS)]
        self._odd = [[False] * width for _ in range(_BINS)]  # the first visit was not believed
        self._last = [[0] * width for _ in range(_BINS)]  # step of the last visit
        self._drift = 0.0
        self._side = 0  # outliers in a row on one side
        self._steps = 0
        self._newest: tuple[int, int] | None = None
        self._curves: dict[float, list[float]] = {}
        self._epoch = 0

    @staticmethod
    def bin_of(requests: int) -> int:
        """The load's bin."""
        return min(round(BINS_PER_OCTAVE * math.log2(max(requests, 1))), _BINS - 1)

    def _curve(self, requests: int) -> list[float]:
        """Logarithms of the model's seconds for every length; only their differences are used."""
        if self._steps >= self._epoch:
            self._epoch = self._steps + _EPOCH
            self._curves.clear()
        curve = self._curves.get(requests)
        if curve is None:
            seconds = self.model.curve(requests, 0, requests * self.lengths[-1])
            curve = self._curves[requests] = [math.log(seconds[requests * length]) for length in self.lengths]
        return curve

    def observe(self, requests: int, length: int, seconds: float) -> None:
        """Learn from a step.

        Args:
            requests: requests that decoded.
            length: index of their draft length.
            seconds: what the step took; ignored unless positive and finite.
        """
        if not 0.0 < seconds < math.inf:
            return
        self._steps += 1
        spot = self.bin_of(requests)
        self._tell_model(requests, length, seconds, self._visits[spot][length])
        at, visits = self._log[spot], self._visits[spot][length]
        off = self._curve(requests)[length] - self._curve(_middle(spot))[length]
        value = math.log(seconds) - self._drift - off
        if visits == 0 and not self._odd[spot][length] and self._newest is not None:
            expected, _ = self._bridge(spot, length, self._curve(_middle(spot)))
            if value > expected + _ODD:
                self._odd[spot][length] = True
                return
        if visits < _FIRST:
            at[length] = min(at[length], value) if visits else value
        else:
            residual = value - at[length]
            if abs(residual) <= _CLIP:
                self._side = 0
            else:
                side = 1 if residual > 0.0 else -1
                self._side = self._side + side if self._side * side > 0 else side
            if abs(self._side) >= _CHANGE:
                self._drift += residual  # everything changed: more likely than one pair
            else:
                residual = min(max(residual, -_CLIP), _CLIP)
                self._drift += _DRIFT * residual
                at[length] += max(1.0 / (visits + 1), 1.0 / _STEPS) * (1.0 - _DRIFT) * residual
        self._visits[spot][length] = visits + 1
        self._last[spot][length] = self._steps
        self._newest = spot, length

    def _tell_model(self, requests: int, length: int, seconds: float, visits: int) -> None:
        if visits < _HEARD or visits % _EVERY == 0:
            self.model.observe(StepLoad(requests, requests * (1 + self.lengths[length]), 0, 0), seconds)

    def predict(self, requests: int) -> tuple[list[float], list[float]]:
        """Of a step of these requests: the logarithm of its seconds for each length, and its standard deviation."""
        spot = self.bin_of(requests)
        here = self._curve(requests)
        visits, last, logs = self._visits[spot], self._last[spot], self._log[spot]
        middle = self._curve(_middle(spot)) if any(visits) else here
        means, spreads = [], []
        known = [j for j, count in enumerate(visits) if count >= _FIRST]
        for j in range(len(self.lengths)):
            if visits[j]:
                mean = logs[j]
                least = _KNOWN if visits[j] >= _FIRST else _FRESH
                if known and visits[j] < _FIRST:
                    nearest = min(known, key=lambda k: abs(k - j))
                    most = logs[nearest] + max(self._octaves(j, nearest), 0.0) * math.log(2.0) + _ODD
                    if mean > most:  # more than in proportion to its rows
                        mean, least = most, _FAR
                mean += here[j] - middle[j]
                spread = math.sqrt(least * least + _AGING * (self._steps - last[j]))
            else:
                mean, spread = self._bridge(spot, j, here)
            means.append(mean + self._drift)
            spreads.append(spread)
        return means, spreads

    def _bridge(self, spot: int, length: int, here: list[float]) -> tuple[float, float]:
        """The same, less the drift, of a length never tried at this load: from the nearest load that had it, else from
        the nearest length that this load had, else from the last step."""
        for distance in range(1, _REACH + 1):
            for near in (spot - distance, spot + distance):
                if 0 <= near < _BINS and self._visits[near][length]:
                    return self._from(near, length, spot, length, here, 1.0), _NEAR + _PER_BIN * distance
        tried = [j for j, visits in enumerate(self._visits[spot]) if visits]
        if tried:
            nearest = min(tried, key=lambda j: abs(j - length))
            spread = min(_NEAR + _PER_OCTAVE * abs(self._octaves(length, nearest)), _FAR)
            believed = _BELIEVED if length > nearest else 1.0
            return self._from(spot, nearest, spot, length, here, believed), spread
        if self._newest is None:
            return here[length] - self._drift, _FAR
        return self._from(*self._newest, spot, length, here, 1.0), _FAR

    def _octaves(self, length: int, other: int) -> float:
        """Binary logarithm of the ratio of their rows."""
        return math.log2((1 + self.lengths[length]) / (1 + self.lengths[other]))

    def _from(self, near: int, tried: int, spot: int, length: int, here: list[float], believed: float) -> float:
        """The logarithm known of one pair, moved to another by the model: more rows take no less time, and no more
        than in proportion."""
        there = _middle(near)
        rows = _middle(spot) * (1 + self.lengths[length]) / (there * (1 + self.lengths[tried]))
        moved, most = here[length] - self._curve(there)[tried], math.log(rows)
        return self._log[near][tried] + believed * min(max(moved, min(most, 0.0)), max(most, 0.0))


def _middle(spot: int) -> int:
    return round(2.0 ** (spot / BINS_PER_OCTAVE))
