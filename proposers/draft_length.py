"""How many tokens to draft for every request alike, where that is settled before the drafts are known.

With asynchronous scheduling the host fixes the number of draft tokens of a step while the step before still runs. So
drafts cannot be weighed one by one (:mod:`.adaptive_length`); what can be chosen is one length for the whole step, out
of a few. The best has the most tokens per second: tokens that a request is expected to emit (:class:`Gains`) over the
seconds of the step (:class:`.length_times.LengthTimes`). Length 0 is one of them, and is the server without drafts.

A length that is not used says nothing of itself, so now and then another one is probed for a step. Which, is by
optimism in the face of uncertainty (Lai and Robbins 1985): one whose tokens per second may exceed the best's, given
what is unknown about it, and of these the one that may gain most for what trying it costs. How often, is by an account
(:class:`_Account`): probing costs a small share of the time whatever the server is like.

Nothing here reads a clock or draws random numbers: the same steps give the same choices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from .length_times import BINS_PER_OCTAVE, LengthTimes

#: At most so many lengths: for each, vLLM captures CUDA graphs of its own.
MOST_LENGTHS = 7
# Decayed steps over which acceptance is averaged, and the most requests' drafts that count in them.
WINDOW, MOST_DRAFTS = 200, 400.0
# First guess of the tokens that one draft token adds, and how many drafts it, or an extrapolation, counts for.
FIRST_GAIN, PRIOR_DRAFTS = 0.4, 3.0
# What a longer draft says of a shorter one counts for this much of a draft of that length.
IMPLIED = 0.5
# Drafts from which the two are compared, and over which their ratio is averaged.
COMPARED, RATIO_DRAFTS, LEAST_RATIO = 30.0, 200.0, 0.2
# Drafts over which the ratio of a length's gain to the next shorter one's is averaged, and how many the extrapolation
# counts for in it; and how much a draft of the shorter one counts that this is applied to.
PAIRED_DRAFTS, EXTRAPOLATED_DRAFTS, PAIRED = 2000.0, 20.0, 0.5
# Variance of the tokens a request emits over their squared mean; variance that an extrapolation adds to the logarithm
# of the gain per length; and what a step without news of a length adds.
SCATTER, EXTRAPOLATION, AGING = 0.5, 0.02, 4e-4
# A length gives way to one that is better by this much.
HYSTERESIS = 0.02
# Standard deviations that count as possible, and of the logarithm of a time that counts as known.
OPTIMISM, KNOWN = 1.5, 0.3
# Share of the time that probing may cost, the most saved up and owed, in steps; and what a new load is given at once,
# so often at most: 0.5% more.
PROBE_SHARE, MOST_SAVED, NEW_LOAD, NEW_LOAD_EVERY = 0.01, 8.0, 1.5, 300
# A probe is thought to cost this much at least.
LEAST_COST = 0.02
# At a load of so many steps, what is known hardly changes with one more: it is looked at every so often.
SETTLED, LOOK_EVERY = 32, 4
# Steps within which a probe's outcome is known; and a step longer than predicted by this factor is not its fault.
PATIENCE, HICCUP = 8, 2.0


def lengths_up_to(most: int, count: int = MOST_LENGTHS) -> list[int]:
    """The lengths to choose from: 0, powers of two less one, and ``most``; ascending, at most ``count``.

    With its last token, a request then has a power of two rows, which are sizes that vLLM captures graphs for anyway.

    Raises:
        ValueError: ``most`` or ``count`` is below 1.
    """
    if most < 1 or count < 1:
        raise ValueError(f"lengths_up_to: most >= 1 and count >= 1 expected, got {most} and {count}")
    between = []
    length = 1
    while 3 * length <= 2 * most:
        between.append(length)
        length = 2 * length + 1
    while len(between) + 2 > max(count, 2):
        # The shortest matter least to one request, the longest least to many: the middle goes last.
        between.pop(0 if len(between) % 2 else -1)
    return [0, *between, most] if count > 1 else [most]


class Gains:
    """Tokens beyond the first that a request emits, on average, by length.

    A step tells the gain of its own length, and of shorter ones: a chain cut to k tokens would have emitted k at most.
    A draft tree cut to k nodes may be less deep than that, by a ratio which is learned where both are known. The gain
    of a longer one follows that of the shorter, by the ratio that both had in the same steps: so a few steps tell it,
    easy ones or hard. Before there are any, it is extrapolated, as if each token were accepted with the same
    probability. A gain is never below that of a shorter length.

    Args:
        lengths: ascending, the first 0.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        width = len(self.lengths)
        self._own, self._own_drafts = [0.0] * width, [0.0] * width  # decayed sums
        self._implied, self._implied_drafts = [0.0] * width, [0.0] * width
        self._ratio = [1.0] * width
        # Decayed sums over the same drafts: their number, gains, and gains had they been of the next shorter length.
        self._pairs, self._longer, self._shorter = [0.0] * width, [0.0] * width, [0.0] * width
        self._last = [0] * width  # step with the last news
        self.steps = 0

    def observe(self, length: int, emitted: Sequence[int]) -> None:
        """Learn from requests whose drafts had this length (its index), and what each emitted, drafts or not."""
        self.steps += 1
        count = len(emitted)
        if length == 0 or count == 0:
            return
        stay = 1.0 - 1.0 / WINDOW
        gains = np.asarray(emitted) - 1 if count > 16 else [tokens - 1 for tokens in emitted]
        shorter = 0.0
        for j in range(1, len(self.lengths)):
            self._own[j] *= stay
            self._own_drafts[j] *= stay
            self._implied[j] *= stay
            self._implied_drafts[j] *= stay
            if j > length:
                continue
            most = self.lengths[j]
            if isinstance(gains, list):
                gained = float(sum([min(gain, most) for gain in gains]))
            else:
                gained = float(np.minimum(gains, most).sum())
            if j == length:
                self._compare(j, gained, count)
                self._pair(j, gained, shorter, count)
                self._own[j], self._own_drafts[j] = _add(self._own[j], self._own_drafts[j], gained, count)
            else:
                self._implied[j], self._implied_drafts[j] = _add(
                    self._implied[j], self._implied_drafts[j], gained, count
                )
            self._last[j] = self.steps
            shorter = gained

    def _compare(self, j: int, gained: float, count: int) -> None:
        if self._implied_drafts[j] < COMPARED or self._own_drafts[j] < COMPARED or self._implied[j] <= 0.0:
            return
        own = self._own[j] / self._own_drafts[j]
        ratio = min(max(own * self._implied_drafts[j] / self._implied[j], LEAST_RATIO), 1.0)
        self._ratio[j] += count / (count + RATIO_DRAFTS) * (ratio - self._ratio[j])

    def _pair(self, j: int, gained: float, shorter: float, count: int) -> None:
        stay = 1.0 - count / (count + PAIRED_DRAFTS)
        self._pairs[j] = stay * self._pairs[j] + count
        self._longer[j] = stay * self._longer[j] + gained
        self._shorter[j] = stay * self._shorter[j] + shorter

    def predict(self) -> tuple[list[float], list[float]]:
        """Tokens that a request emits for each length, 1 for the first, and the variance of their logarithm."""
        tokens, variances = [1.0], [0.0]
        gain, before, known = 0.0, 0, 0.0
        for j in range(1, len(self.lengths)):
            length = self.lengths[j]
            guess, trust = FIRST_GAIN, PRIOR_DRAFTS
            if gain > 0.0:
                # Trees: the shorter draft's gain in the same steps was not as high as it seems.
                shorter = gain / self._ratio[j - 1]
                guess = self._longer[j] + EXTRAPOLATED_DRAFTS * _extrapolate(gain, before, length)
                guess *= shorter / (self._shorter[j] + EXTRAPOLATED_DRAFTS * shorter)
                trust += PAIRED * known * self._pairs[j] / (self._pairs[j] + EXTRAPOLATED_DRAFTS)
            drafts = self._own_drafts[j] + IMPLIED * self._implied_drafts[j]
            total = self._own[j] + IMPLIED * self._ratio[j] * self._implied[j]
            known = drafts + trust
            mean = min(max((total + trust * guess) / known, gain), float(length))
            variance = SCATTER * mean / (1.0 + mean) / (known - PRIOR_DRAFTS + 1.0)
            variance += EXTRAPOLATION * j * PRIOR_DRAFTS / known
            tokens.append(1.0 + mean)
            variances.append(variance + AGING * (self.steps - self._last[j]))
            gain, before = mean, length
        return tokens, variances


def _add(total: float, drafts: float, gained: float, count: int) -> tuple[float, float]:
    total, drafts = total + gained, drafts + count
    if drafts > MOST_DRAFTS:
        total, drafts = total * MOST_DRAFTS / drafts, MOST_DRAFTS
    return total, drafts


def _geometric(prob: float, length: int) -> float:
    """Mean of the tokens accepted of a chain, each with this probability if the one before was."""
    return float(length) if prob >= 1.0 else prob * (1.0 - prob**length) / (1.0 - prob)


_GRID = 64
_tables: dict[int, list[float]] = {}


def _extrapolate(gain: float, length: int, longer: int) -> float:
    """Gain of a longer chain, if tokens are accepted alike."""
    for size in (length, longer):
        if size not in _tables:
            _tables[size] = [_geometric(i / _GRID, size) for i in range(_GRID + 1)]
    table, wanted = _tables[length], _tables[longer]
    low, high = 0, _GRID
    while high - low > 1:
        middle = (low + high) // 2
        if table[middle] <= gain:
            low = middle
        else:
            high = middle
    part = min(max((gain - table[low]) / (table[high] - table[low]), 0.0), 1.0)
    return wanted[low] + part * (wanted[high] - wanted[low])


class _Account:
    """What probing may still cost, in steps of the present best length."""

    def __init__(self) -> None:
        self.saved = NEW_LOAD
        self._since_load = 0
        self._load: int | None = None

    def step(self, load: int) -> None:
        """A step passed, at a load (its bin)."""
        self.saved = min(self.saved + PROBE_SHARE, MOST_SAVED)
        self._since_load += 1
        if self._load is None:
            self._load = load
        elif abs(load - self._load) >= BINS_PER_OCTAVE // 2 and self._since_load >= NEW_LOAD_EVERY:
            self._load, self._since_load = load, 0
            self.saved = max(self.saved, NEW_LOAD)


class DraftLength:
    """Chooses the draft length of each step.

    Args:
        lengths: to choose from, ascending, the first 0.

    Raises:
        ValueError: they are not that.

    Attributes:
        times: what steps take.
        gains: what requests emit.
        share: of the requests that get drafts at all; to be set where it is not 1.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        if not lengths or lengths[0] != 0 or any(a >= b for a, b in itertools.pairwise(lengths)):
            raise ValueError(f"lengths must ascend from 0, got {list(lengths)}")
        self.lengths = list(lengths)
        self.times = LengthTimes(self.lengths)
        self.gains = Gains(self.lengths)
        self.share = 1.0
        self._index = {length: j for j, length in enumerate(self.lengths)}
        self._account = _Account()
        self._best = 0
        self._requests, self._alike = 0, 0  # of the last choice, and choices with as many in a row
        # The length probed; seconds predicted for it, and for a step of the best; tokens of the latter.
        self._probe: tuple[int, float, float, float] | None = None
        self._waited = 0
        self._rates = [0.0] * len(self.lengths)
        self._totals = dict.fromkeys(("choices", "probes", "switches"), 0)
        self._measured = self._predicted = 0.0

    def choose(self, requests: int) -> int:
        """Draft tokens per request for the next step, of about so many requests."""
        self._totals["choices"] += 1
        self._account.step(self.times.bin_of(requests))
        self._alike = self._alike + 1 if requests == self._requests else 0
        self._requests = requests
        if self._alike > SETTLED and self._alike % LOOK_EVERY:
            self._waited += 1
            return self.lengths[self._best]
        logs, spreads = self.times.predict(max(requests, 1))
        tokens, variances = self.gains.predict()
        tokens = [1.0 + self.share * (t - 1.0) for t in tokens]
        rates = self._rates = [math.log(t) - s for t, s in zip(tokens, logs, strict=True)]
        # A length whose time is not known is tried for a step first.
        surest = min(spreads)
        known = [j for j, spread in enumerate(spreads) if spread <= max(KNOWN, surest)]
        best = max(known, key=rates.__getitem__)
        if best != self._best and (rates[best] > rates[self._best] + HYSTERESIS or self._best not in known):
            self._best = best
            self._totals["switches"] += 1
        best = self._best
        self._predicted = math.exp(logs[best])
        if self._probe is not None:
            self._waited += 1
            if self._waited <= PATIENCE:
                return self.lengths[best]
            self._probe = None
        chosen, most = best, 0.0
        for j in range(len(rates)):
            if j == best:
                continue
            # Of lengths whose time is not known, the next one to those known; and none, which is the safe one.
            if j and spreads[j] > KNOWN and not {j - 1, j + 1} & {best, *known}:
                continue
            # At best, more rows take no more time, and fewer take less in proportion.
            fewer = min(math.log((1 + self.lengths[j]) / (1 + self.lengths[best])), 0.0)
            least = max(logs[j] - OPTIMISM * spreads[j], min(logs[best] + fewer, logs[j]))
            excess = math.log(tokens[j]) + OPTIMISM * math.sqrt(variances[j]) - least - rates[best]
            if excess <= 0.0:
                continue
            cost = max(math.exp(logs[j] - logs[best]) - tokens[j] / tokens[best], LEAST_COST)
            saved = self._account.saved if j or spreads[0] <= KNOWN else max(self._account.saved, 1.0)
            if cost <= saved and excess > most * cost:
                chosen, most = j, excess / cost
        if chosen != best:
            self._probe = chosen, math.exp(logs[chosen]), math.exp(logs[best]), tokens[best]
            self._waited = 0
            self._totals["probes"] += 1
        return self.lengths[chosen]

    def observe(
        self, length: int, emitted: Sequence[int], seconds: float = math.nan, requests: int | None = None
    ) -> None:
        """Learn from a step.

        Args:
            length: draft tokens that each of its requests had; another one than :attr:`lengths` is ignored.
            emitted: tokens of each of them, at least 1.
            seconds: what the step took, NaN if it was not their decoding alone.
            requests: that decoded, those without drafts included; None: no more than these.
        """
        j = self._index.get(length)
        if j is None or not emitted:
            return
        self.gains.observe(j, emitted)
        self.times.observe(requests or len(emitted), j, seconds)
        self._measured = seconds
        if self._probe is not None and j == self._probe[0]:
            _, predicted, worth, tokens = self._probe
            self._probe = None
            # A hiccup of the machine is not the probe's.
            seconds = min(seconds, HICCUP * predicted) if seconds == seconds else predicted
            gain = self.share * (sum(emitted) / len(emitted) - 1.0)
            self._account.saved -= seconds / worth - (1.0 + gain) / tokens

    def stats(self) -> dict[str, float]:
        """Choices, probes and switches so far; the length in use; seconds predicted for a step of it and measured for
        the last; its expected speed over that of no drafts."""
        counts = {name: float(count) for name, count in self._totals.items()}
        return counts | {
            "length": float(self.lengths[self._best]),
            "step_time_predicted_seconds": self._predicted,
            "step_time_measured_seconds": self._measured,
            "expected_gain": math.exp(self._rates[self._best] - self._rates[0]),
        }
