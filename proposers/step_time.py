"""How long a target step takes, learned online from the steps measured.

seconds = scale * shape(load). The *shape* is linear, with coefficients >= 0, in a constant, the requests, their
context, the context summed over rows (attention costs rows x context on CPUs), the prefill, its context and the rows,
and piecewise linear in rows and prefill together: kernels work in blocks, and GPUs have a ridge. So it never falls as
the load grows, with one exception: a step of one or two rows may cost something extra, for there matrix kernels can be
slower than for three to six (oneDNN in bfloat16 on an AVX-512 CPU: 28, 32, 26, 25, 25, 25 ms). The *scale* is the
machine being faster or slower as a whole. Only the shape says what a draft token costs relative to a step.

Both are the state of one extended Kalman filter (Kalman 1960) of the seconds' logarithm, which splits a surprise
between them by how uncertain each is: at a load never seen the shape moves, at a well-known one the scale. What is
particular:

- The slopes of neighbouring row counts are correlated a priori, so a slope never seen follows its neighbours, and far
  from them returns to a cautious guess.
- The shape forgets only in the direction of what it observes (Cao and Schwartz 2000, "A directional forgetting
  algorithm based on the decomposition of the information matrix"): the variance of a prediction never falls below a
  floor, so the gain stays, and hardly any is added elsewhere, so what is not visited stays known.
- A residual counts as two standard deviations at most (Huber 1964), until several in a row lie on one side: that is no
  outlier but a change, and the scale may jump.
- The first steps are replayed together from their median, the likeliest first, so that slow ones among them matter
  little.
- The filter itself knows no bounds. Predictions use the likeliest coefficients that are not negative, by coordinate
  ascent on the multipliers (Hildreth 1957). To bound the filter's own state would drive flat slopes up: noise could
  then only raise them.

Tried instead on simulated servers of four shapes (8% noise, 1% outliers): least squares on the same features and prior
solved by nonnegative coordinate descent. Predictions and slopes were as good, but on one server 1,000 steps without
drafts moved the cost of 16 of them by 8% with exponential forgetting, 4% with directional forgetting, here by 1%.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm_specplug.kernels.memory import kernel

from .base import StepLoad
from .saved_state import check

Float64Array = npt.NDArray[np.float64]

# Row counts where the slope may change; the last slope goes on for ever.
KNOTS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048], np.float64)
# Before them: constant, requests, context, row context, prefill, prefill context, rows, whether there is one row,
# whether there are two; tokens of context in thousands.
_ONE, _TWO, _FIRST_SLOPE = 7, 8, 9
# After them: logarithm of the scale.
_LOG_SCALE = _FIRST_SLOPE + len(KNOTS)
_SIZE = _LOG_SCALE + 1
_CONTEXT_UNIT = 1.0 / 1024
# Guess and its standard deviation, in steps of one row: a row costs a few percent of it.
_GUESS = np.array([0.96, 0.01, 0.005, 0.003, 0.002, 0.002, 0.005, 0.0, 0.0] + [0.025] * len(KNOTS) + [math.log(0.02)])
_DOUBT = np.array([0.3, 0.03, 0.06, 0.03, 0.01, 0.02, 0.02, 0.2, 0.2] + [0.05] * len(KNOTS) + [0.1])
# Of the slopes at neighbouring knots.
_LIKENESS = 0.8
# Variance that a prediction of the shape keeps, in units of the noise's: the memory is its inverse, in steps.
_FLOOR = 1 / 400
# Variance that the scale gains per step, in the same units: it follows within some ten steps.
_SCALE_GAIN = 0.015
_CLIP = 2.0  # standard deviations
_CHANGE = 4  # residuals in a row beyond them
# Standard deviation of the noise: first guess, least, most; steps it is averaged over.
_NOISE, _LEAST_NOISE, _MOST_NOISE, _NOISE_STEPS = 0.07, 0.02, 0.3, 30
# Steps that are replayed together, and steps after which predictions are trusted.
_FIRST_STEPS = 8
_ENOUGH = 16
_FIELDS = 6  # of a StepLoad
_ERRORS = 200
# The start-up probe leaves out the engine's own work: its constant is no more than a hint. Its times are the best of
# several, so they have less noise than steps.
_PROBE_DOUBT = 0.2
_PROBE_NOISE = 0.02
_LEAST_SHAPE = 1e-3
# Rounds of looking for the coefficients that are not negative, and what they may still move in the last one.
_SWEEPS, _SETTLED = 8, 1e-5
# Variance added per step so that rounding never makes the covariance indefinite.
_ROUNDING = 1e-12
_MOST_SAVED = 50.0
# Seconds that a step can take: what is outside counts as the bound.
_SHORTEST, _LONGEST = 1e-7, 1e4
# Of the noise: its standard deviation, that before the first steps; and clipped residuals in a row on one side.
_NOISE_SD, _FIRST_NOISE, _RUN = range(3)


def _prior() -> tuple[Float64Array, Float64Array]:
    correlation = np.eye(_SIZE)
    knot = np.arange(len(KNOTS))
    correlation[_FIRST_SLOPE:_LOG_SCALE, _FIRST_SLOPE:_LOG_SCALE] = _LIKENESS ** np.abs(knot[:, None] - knot)
    return _GUESS.copy(), correlation * np.outer(_DOUBT, _DOUBT)


@kernel
def _features(load: Float64Array, x: Float64Array) -> None:
    """What the shape is linear in; ``load``: the fields of a StepLoad, in order."""
    rows = load[1] + load[4]
    x[0] = 1.0
    x[1] = load[0]
    x[2] = load[2] * _CONTEXT_UNIT
    x[3] = load[3] * _CONTEXT_UNIT
    x[4] = load[4]
    x[5] = load[5] * _CONTEXT_UNIT
    x[6] = load[1]
    x[_ONE] = 1.0 if rows == 1.0 else 0.0
    x[_TWO] = 1.0 if rows == 2.0 else 0.0
    last = len(KNOTS) - 1
    for k in range(last):
        x[_FIRST_SLOPE + k] = min(max(rows - KNOTS[k], 0.0), KNOTS[k + 1] - KNOTS[k])
    x[_FIRST_SLOPE + last] = max(rows - KNOTS[last], 0.0)


@kernel
def _shape(coef: Float64Array, x: Float64Array) -> float:
    total = 0.0
    for i in range(_LOG_SCALE):
        total += coef[i] * x[i]
    return max(total, _LEAST_SHAPE)


@kernel
def _learn(
    mean: Float64Array,
    cov: Float64Array,
    coef: Float64Array,
    push: Float64Array,
    level: Float64Array,
    x: Float64Array,
    seconds: float,
    px: Float64Array,
) -> None:
    """One step of the filter: ``mean`` and ``cov`` change, ``coef`` and ``push`` follow. ``px``: scratch."""
    shape = _shape(coef, x)
    residual = np.log(seconds / shape) - coef[_LOG_SCALE]
    x[_LOG_SCALE] = shape  # its logarithm is learned, and errors are relative
    noise = level[_NOISE_SD] * level[_NOISE_SD]
    for i in range(_SIZE):
        cov[i, i] += _ROUNDING
    cov[_LOG_SCALE, _LOG_SCALE] += _SCALE_GAIN * noise
    spread = _times(cov, x, shape, _SIZE, px)
    limit = _CLIP * np.sqrt(spread + noise)
    if spread < noise:
        grown = 1.0 if abs(residual) > 0.6745 / _CLIP * limit else -1.0
        level[_NOISE_SD] = min(max(level[_NOISE_SD] * np.exp(grown / _NOISE_STEPS), _LEAST_NOISE), _MOST_NOISE)
    side = 0.0 if abs(residual) <= limit else (1.0 if residual > 0.0 else -1.0)
    level[_RUN] = level[_RUN] + side if side * level[_RUN] > 0.0 else side
    if abs(level[_RUN]) >= _CHANGE:
        more = residual * residual
        cov[_LOG_SCALE, _LOG_SCALE] += more
        px[_LOG_SCALE] += more
        spread += more
        limit = _CLIP * np.sqrt(spread + noise)
    clipped = min(max(residual, -limit), limit)
    variance = spread + noise
    shrink = (clipped / residual if residual != 0.0 else 1.0) / variance
    raised = 0.0  # is no surprise
    for i in range(_SIZE):
        raised += (coef[i] - mean[i]) * x[i] / shape
    mean[_LOG_SCALE] += px[_LOG_SCALE] * (clipped + raised) / variance
    change = (np.expm1(min(clipped, 1.5)) + raised) / variance
    for i in range(_LOG_SCALE):
        mean[i] += px[i] * change
    for i in range(_SIZE):
        for j in range(_SIZE):
            cov[i, j] -= shrink * px[i] * px[j]
    spread = _times(cov, x, shape, _LOG_SCALE, px)
    lack = _FLOOR * noise - spread
    if lack > 0.0:
        lack /= spread * spread
        for i in range(_LOG_SCALE):
            for j in range(_LOG_SCALE):
                cov[i, j] += lack * px[i] * px[j]
    _bound(mean, cov, coef, push)


@kernel
def _times(cov: Float64Array, x: Float64Array, shape: float, size: int, px: Float64Array) -> float:
    """``px`` = covariance times the relative gradient ``x / shape``, of the first ``size`` coefficients; returns the
    variance of the prediction's relative error that stems from them."""
    for i in range(size):
        px[i] = 0.0
    for j in range(size):
        if x[j] != 0.0:
            by = x[j] / shape
            for i in range(size):
                px[i] += cov[j, i] * by
    spread = 0.0
    for i in range(size):
        spread += px[i] * x[i]
    return spread / shape


@kernel
def _bound(mean: Float64Array, cov: Float64Array, coef: Float64Array, push: Float64Array) -> None:
    """``coef``: the likeliest coefficients that are not negative. ``push``: multipliers, kept between calls."""
    for i in range(_SIZE):
        coef[i] = mean[i]
    for i in range(_LOG_SCALE):
        if push[i] > 0.0:
            for j in range(_SIZE):
                coef[j] += cov[i, j] * push[i]
    for _ in range(_SWEEPS):
        moved = 0.0
        for i in range(_LOG_SCALE):
            by = max(-coef[i] / cov[i, i], -push[i])
            if by != 0.0 and (coef[i] < 0.0 or push[i] > 0.0):
                push[i] += by
                moved = max(moved, abs(by) * cov[i, i])
                for j in range(_SIZE):
                    coef[j] += cov[i, j] * by
        if moved < _SETTLED:
            break
    for i in range(_LOG_SCALE):
        coef[i] = max(coef[i], 0.0)


@kernel
def _median(values: Float64Array, scratch: Float64Array, n: int) -> float:
    """The lower median of the first ``n`` values."""
    for i in range(n):
        j = i
        while j > 0 and scratch[j - 1] > values[i]:
            scratch[j] = scratch[j - 1]
            j -= 1
        scratch[j] = values[i]
    return scratch[(n - 1) // 2]


@kernel
def _replay(
    mean: Float64Array,
    cov: Float64Array,
    coef: Float64Array,
    push: Float64Array,
    level: Float64Array,
    loads: Float64Array,
    logs: Float64Array,
    scratch: Float64Array,
    n: int,
) -> None:
    """Set the scale from ``n`` steps, then learn from them, the likeliest first. ``logs``: their log seconds."""
    x, px, ratios, order = scratch[0], scratch[1], scratch[2], scratch[3]
    for i in range(_SIZE):
        push[i] = 0.0
    _bound(mean, cov, coef, push)
    for i in range(n):
        _features(loads[i], x)
        ratios[i] = logs[i] - np.log(_shape(coef, x))
    middle = _median(ratios, order, n)
    mean[_LOG_SCALE] += middle - coef[_LOG_SCALE]
    coef[_LOG_SCALE] = middle
    level[_NOISE_SD] = level[_FIRST_NOISE]
    level[_RUN] = 0.0
    for _ in range(n):
        best = 0
        for i in range(n):
            if abs(ratios[i] - middle) < abs(ratios[best] - middle):
                best = i
        _features(loads[best], x)
        _learn(mean, cov, coef, push, level, x, np.exp(logs[best]), px)
        ratios[best] = np.inf


@kernel
def _predict(coef: Float64Array, load: Float64Array, x: Float64Array) -> float:
    _features(load, x)
    return np.exp(coef[_LOG_SCALE]) * _shape(coef, x)


@kernel
def _curve(coef: Float64Array, first: float, rows: int, each: float, out: Float64Array) -> None:
    """``out[n]``: seconds of a step of ``rows + n`` rows; ``first``: of none more, ``each``: context of a row."""
    scale = np.exp(coef[_LOG_SCALE])
    flat = coef[6] + coef[3] * _CONTEXT_UNIT * each
    seconds, k = first, 0
    out[0] = first
    for n in range(1, len(out)):
        while k + 1 < len(KNOTS) and rows + n > KNOTS[k + 1]:
            k += 1
        seconds += scale * (coef[_FIRST_SLOPE + k] + flat)
        if rows + n == 2:
            seconds += scale * (coef[_TWO] - coef[_ONE])
        elif rows + n == 3:
            seconds -= scale * coef[_TWO]
        out[n] = seconds


@kernel
def _observe(
    mean: Float64Array,
    cov: Float64Array,
    coef: Float64Array,
    push: Float64Array,
    level: Float64Array,
    first_mean: Float64Array,
    first_cov: Float64Array,
    loads: Float64Array,
    logs: Float64Array,
    errors: Float64Array,
    scratch: Float64Array,
    seen: int,
    seconds: float,
) -> float:
    """Learn from the load in ``scratch[4]``, the step number ``seen``; returns what was predicted."""
    x, load = scratch[0], scratch[4]
    predicted = _predict(coef, load, x)
    if seen > 0:
        errors[(seen - 1) % _ERRORS] = abs(predicted - seconds) / seconds
    if seen >= _FIRST_STEPS:
        _learn(mean, cov, coef, push, level, x, seconds, scratch[1])
        return predicted
    for i in range(_FIELDS):
        loads[seen, i] = load[i]
    logs[seen] = np.log(seconds)
    for i in range(_SIZE):
        mean[i] = first_mean[i]
        for j in range(_SIZE):
            cov[i, j] = first_cov[i, j]
    _replay(mean, cov, coef, push, level, loads, logs, scratch, seen + 1)
    return predicted


def base_load(requests: int, context: int, given: int = 0) -> StepLoad:
    """The load of ``requests`` that hold ``context`` tokens, summed, with ``given`` draft rows spread evenly."""
    return StepLoad(requests, requests + given, context, context + given * context // requests)


class StepTimeModel:
    """Learns how many seconds a step takes from its load."""

    def __init__(self) -> None:
        self._mean, self._cov = _prior()
        self._coef, self._push = self._mean.copy(), np.zeros(_SIZE)
        self._level = np.array([_NOISE, _NOISE, 0.0])
        self._loads = np.zeros((_FIRST_STEPS, _FIELDS))
        self._logs = np.zeros(_FIRST_STEPS)
        self._errors = np.zeros(_ERRORS)
        self._scratch = np.zeros((5, _SIZE))
        self._load = self._scratch[4]
        self._last: tuple[StepLoad, float, float] | None = None
        self._total = 0
        self._trusted = False
        self._start_here()

    def _start_here(self) -> None:
        """Let the next steps be the first ones, with the shape known now."""
        cov = self._cov
        cov[_LOG_SCALE] = cov[:, _LOG_SCALE] = 0.0
        cov[_LOG_SCALE, _LOG_SCALE] = _DOUBT[_LOG_SCALE] ** 2
        self._first_mean, self._first_cov = self._mean.copy(), cov.copy()
        self._level[_FIRST_NOISE] = self._level[_NOISE_SD]
        self._seen = 0

    @property
    def ready(self) -> bool:
        """Whether predictions can be trusted: enough steps were seen, or timed at start, or the shape was restored."""
        return self._trusted or self._seen >= _ENOUGH

    def _read(self, load: StepLoad) -> Float64Array:
        array = self._load
        array[0], array[1], array[2] = load.requests, load.rows, load.context
        array[3], array[4], array[5] = load.row_context, load.prefill, load.prefill_context
        return array

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step. One without rows, or whose time is NaN or not positive and finite, is ignored."""
        if load.rows <= 0 or not 0.0 < seconds < math.inf:
            return
        self._read(load)
        predicted = _observe(
            self._mean,
            self._cov,
            self._coef,
            self._push,
            self._level,
            self._first_mean,
            self._first_cov,
            self._loads,
            self._logs,
            self._errors,
            self._scratch,
            self._seen,
            min(max(float(seconds), _SHORTEST), _LONGEST),
        )
        self._seen += 1
        self._total += 1
        self._last = load, predicted, seconds

    def prime(self, loads: Sequence[StepLoad], seconds: Sequence[float]) -> None:
        """Learn the shape from steps timed at start, ``seconds`` each; the scale is learned anew from the first steps.

        Raises:
            ValueError: ``loads`` and ``seconds`` differ in length.
        """
        if len(loads) != len(seconds):
            raise ValueError(f"prime: {len(loads)} loads with {len(seconds)} times")
        pairs = [(load, s) for load, s in zip(loads, seconds, strict=True) if load.rows > 0 and 0.0 < s < math.inf]
        if not pairs:
            return
        arrays = np.array([self._read(load)[:_FIELDS].copy() for load, _ in pairs])
        logs = np.log(np.clip([s for _, s in pairs], _SHORTEST, _LONGEST))
        scratch = np.zeros((4, max(_SIZE, len(pairs))))
        noise = self._level[_FIRST_NOISE]
        self._level[_FIRST_NOISE] = _PROBE_NOISE
        _replay(self._mean, self._cov, self._coef, self._push, self._level, arrays, logs, scratch, len(pairs))
        self._level[_NOISE_SD] = noise
        self._cov[0, 0] += _PROBE_DOUBT * _PROBE_DOUBT
        self._trusted = True
        self._start_here()

    def predict(self, load: StepLoad) -> float:
        """Seconds that a step with this load takes; a guess until a step was seen."""
        return float(_predict(self._coef, self._read(load), self._scratch[0]))

    def curve(self, requests: int, context: int, most: int, given: int = 0) -> Float64Array:
        """Seconds of a step without prefill, by draft rows, which are spread evenly: ``float64[most + 1]``, never
        falling but where one or two rows cost extra.

        Args:
            requests: requests that decode, at least one.
            context: tokens they hold, summed.
            most: the most draft rows.
            given: draft rows that the step has in any case, not counted in the result's index.

        Raises:
            ValueError: an argument is out of range.
        """
        if requests < 1 or context < 0 or most < 0 or given < 0:
            raise ValueError(
                "curve: requests >= 1, context >= 0, most >= 0 and given >= 0 expected, got "
                f"{requests}, {context}, {most} and {given}"
            )
        out = np.empty(most + 1)
        first = self.predict(base_load(requests, context, given))
        _curve(self._coef, first, requests + given, context / requests, out)
        return out

    def stats(self) -> dict[str, float]:
        """Steps seen; the median relative error of the last 200 predictions, made before the step was learned from;
        the last step's predicted and measured seconds; seconds that one more row would have taken in it."""
        errors = self._errors[: max(min(self._seen - 1, _ERRORS), 0)]
        load, predicted, seconds = self._last if self._last is not None else (StepLoad(1, 1, 0, 0), 0.0, 0.0)
        longer = StepLoad(
            load.requests,
            load.rows + 1,
            load.context,
            load.row_context + load.context // max(load.requests, 1),
            load.prefill,
            load.prefill_context,
        )
        return {
            "step_time_steps": float(self._total),
            "step_time_error": float(np.median(errors)) if len(errors) else 0.0,
            "step_time_predicted_seconds": predicted,
            "step_time_measured_seconds": seconds,
            "step_time_row_seconds": self.predict(longer) - self.predict(load),
        }

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Copies of ``mean float64[n]`` and ``covariance float64[n, n]`` of the filter, and ``noise float64[1]``, the
        standard deviation of the log of a step's seconds."""
        return {"mean": self._mean.copy(), "covariance": self._cov.copy(), "noise": self._level[:1].copy()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over what another model learned; the scale is learned anew. Raises ``ValueError`` if it does not fit."""
        like = {"mean": (_SIZE,), "covariance": (_SIZE, _SIZE), "noise": (1,)}
        check(state, {name: (np.float64, shape) for name, shape in like.items()})
        mean, cov, noise = state["mean"], state["covariance"], float(state["noise"][0])
        if np.abs(mean).max() > _MOST_SAVED or np.abs(cov).max() > _MOST_SAVED:
            raise ValueError(f"saved step-time mean and covariance must be within {_MOST_SAVED:g} of zero")
        if not np.allclose(cov, cov.T, atol=1e-12) or np.linalg.eigvalsh(cov)[0] <= 0.0:
            raise ValueError("saved step-time covariance must be symmetric and positive definite")
        if not _LEAST_NOISE <= noise <= _MOST_NOISE:
            raise ValueError(f"saved step-time noise is {noise}, not in [{_LEAST_NOISE}, {_MOST_NOISE}]")
        self._mean, self._cov = mean.copy(), cov.copy()
        self._level[_NOISE_SD] = noise
        self._push[:] = 0.0
        _bound(self._mean, self._cov, self._coef, self._push)
        self._trusted = True
        self._start_here()
