"""How far an arm's text is from what the exact model would say: arithmetic on log-probabilities, no server.

An arm generates greedily and tells its own log-probabilities of the likeliest tokens at each of its prefixes. The
control then reads that text as a prompt (teacher forcing) and tells the exact model's at the same prefixes. Every
server computes prompts in full, so this is exact even where decoding is not. The control's own text, read by the
control, gives the noise: in bfloat16 a prompt is computed by other kernels than one token after another. An output's
first token comes from the prompt in every arm and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_specplug.ab.intervals import Estimate, Floats
from vllm_specplug.ab.results import Probe, Top

#: A lump of probability below that is taken for that: what float32 leaves of 1 less the rest is not known better.
_LEAST = 1e-7
_DRAWS = 1000
#: With fewer requests there is no interval.
_FEWEST = 5


@dataclass(frozen=True)
class Forced:
    """An arm's outputs against the exact model at the same prefixes.

    Attributes:
        requests, tokens: how much it is of; no first tokens.
        flips: share of tokens where neither's likeliest token is the other's.
        kl: mean of KL(exact || arm) in nats per token, from below: see :func:`kl_from_below`.
        perplexity: of the outputs under the exact model.
        excess: of that over the outputs' perplexity under the arm itself, less 1. The same tokens on both sides, so it
            says more from few outputs than :attr:`Figures.perplexity_change`.
    """

    requests: int
    tokens: int
    flips: Estimate
    kl: Estimate
    perplexity: Estimate
    excess: Estimate


@dataclass(frozen=True)
class Free:
    """An arm's outputs against the control's outputs of the same requests.

    Attributes:
        requests, identical: compared, and equal to the end.
        tokens: places compared: of each request the longer output's length.
        equal: share of places with the same token in both.
        before: share of places before the first difference.
        divergences: of each request that differs, how many tokens are equal before the first difference, sorted.
    """

    requests: int
    identical: int
    tokens: int
    equal: float
    before: float
    divergences: list[int]

    def quantile(self, share: float) -> float | None:
        """Of the first differences; None without any."""
        return float(np.quantile(self.divergences, share)) if self.divergences else None


@dataclass(frozen=True)
class Figures:
    """Of all requests, or of one task.

    Attributes:
        forced: the arm's outputs.
        noise: the same of the control's own outputs, on the same requests; None if there are none.
        perplexity_change: perplexity of the arm's outputs over that of the control's, both under the exact model, less
            1; None without the control's. Where outputs part it is of other texts: even servers that differ in rounding
            alone were 10% apart on 8 outputs.
        free: None without the control's.
    """

    forced: Forced
    noise: Forced | None
    perplexity_change: Estimate | None
    free: Free | None


@dataclass(frozen=True)
class Fidelity:
    """What is known of one arm.

    Attributes:
        arm: its name.
        approximate: whether it is known to be.
        sentence: all of it in words.
        total: None where nothing could be measured; ``sentence`` says why.
        tasks: by task.
        mat: tokens per decode step while it generated these outputs; None if unknown. ``control_mat``: the control's.
    """

    arm: str
    approximate: bool
    sentence: str
    total: Figures | None = None
    tasks: dict[str, Figures] = field(default_factory=dict)
    mat: float | None = None
    control_mat: float | None = None


def kl_from_below(exact: Top, own: Top) -> float:
    """A lower bound of KL(exact || own) in nats, from the likeliest tokens of either.

    Both distributions are taken as those of the tokens that both tell, and all others as one. Merging outcomes never
    adds to a divergence, so the true one is no smaller; it is equal where the ratio of both is the same for all others.
    """
    total = 0.0
    left = [1.0, 1.0]
    for token, log_p in exact.items():
        if token in own:
            p, q = math.exp(log_p), math.exp(own[token])
            left = [left[0] - p, left[1] - q]
            total += p * (log_p - own[token])
    p, q = (max(x, _LEAST) for x in left)
    return max(0.0, total + p * math.log(p / q))


def flipped(exact: Top, own: Top) -> bool:
    """Whether the likeliest token of one is not that of the other; of several that are equal any will do."""
    return not (_likeliest(exact) & _likeliest(own))


def _likeliest(top: Top) -> set[int]:
    most = max(top.values(), default=0.0)
    return {token for token, value in top.items() if value == most}


def rows(probe: Probe) -> Floats:
    """``float64[n, 4]``: per token but the first flips (0 or 1), KL in nats, and minus the log-probability that the
    exact model gave it and that the arm gave it.

    Raises:
        ValueError: a token of the output has no log-probability.
    """
    found = np.zeros((max(len(probe.tokens) - 1, 0), 4))
    for place, (token, own, exact) in enumerate(
        list(zip(probe.tokens, probe.own, probe.exact, strict=True))[1:],
    ):
        if token not in exact or token not in own:
            raise ValueError(f"{probe.arm}, request {probe.index}: token {place + 1} has no log-probability")
        found[place] = flipped(exact, own), kl_from_below(exact, own), -exact[token], -own[token]
    return found


# Over requests


def judge_arm(
    arm: str,
    approximate: bool,
    probes: Sequence[Probe],
    control: Sequence[Probe],
    tasks: Sequence[str],
    mat: tuple[float | None, float | None] = (None, None),
    seed: int = 0,
) -> Fidelity:
    """What an arm's outputs and the control's of the same requests say of the arm.

    Args:
        approximate: whether the arm is known to be.
        tasks: in the order they are wanted.
        mat: the arm's and the control's tokens per step.
        seed: of the intervals.
    """
    read = [p for p in probes if len(p.tokens) > 1]
    if not read:
        return Fidelity(arm, approximate, "fidelity was not measured: no output of two tokens or more was read")
    total = _figures(read, control, seed)
    by_task = {task: [p for p in read if p.task == task] for task in tasks}
    return Fidelity(
        arm,
        approximate,
        say(total, approximate) + (f"; {mat[0]:.2f} tokens per step" if mat[0] is not None else ""),
        total,
        {task: _figures(found, control, seed) for task, found in by_task.items() if found},
        *mat,
    )


def _figures(probes: Sequence[Probe], control: Sequence[Probe], seed: int) -> Figures:
    theirs = {p.index: p for p in control}
    pairs = [(p, theirs[p.index]) for p in probes if p.index in theirs]
    sums, base = _sums(probes), _sums([b for _, b in pairs])
    noise = _forced(base, seed) if base[:, 0].sum() else None
    change = None
    if noise is not None:
        both = np.concatenate([_sums([a for a, _ in pairs]), base], axis=1)
        change = _estimate(both, lambda s: _perplexity(s[:, :5]) / _perplexity(s[:, 5:]) - 1, seed)
    return Figures(_forced(sums, seed), noise, change, compare(pairs) if pairs else None)


def _sums(probes: Sequence[Probe]) -> Floats:
    """``float64[requests, 5]``: tokens, and the sums of :func:`rows`."""
    found = [rows(p) for p in probes]
    return np.array([[len(r), *r.sum(axis=0)] for r in found]).reshape(-1, 5)


def _forced(sums: Floats, seed: int) -> Forced:
    return Forced(
        requests=int((sums[:, 0] > 0).sum()),
        tokens=int(sums[:, 0].sum()),
        flips=_flips(sums, seed),
        kl=_estimate(sums, lambda s: s[:, 2] / s[:, 0], seed),
        perplexity=_estimate(sums, _perplexity, seed),
        excess=_estimate(sums, lambda s: np.exp((s[:, 3] - s[:, 4]) / s[:, 0]) - 1, seed),
    )


def _flips(sums: Floats, seed: int) -> Estimate:
    tokens, flips = sums[:, 0].sum(), sums[:, 1].sum()
    if flips == 0 and len(sums) >= _FEWEST:
        # None among so many: drawing them anew gives none again, which is no proof (Clopper and Pearson).
        return Estimate(0.0, 0.0, float(1 - 0.025 ** (1 / max(tokens, 1))))
    return _estimate(sums, lambda s: s[:, 1] / s[:, 0], seed)


def _perplexity(sums: Floats) -> Floats:
    return np.exp(sums[:, 3] / sums[:, 0])


def _estimate(sums: Floats, figure: Callable[[Floats], Floats], seed: int) -> Estimate:
    """A figure of sums over requests, with the 95% interval of drawing requests anew (percentile bootstrap)."""
    value = float(figure(sums.sum(axis=0, keepdims=True))[0])
    count = len(sums)
    if count < _FEWEST:
        return Estimate(value)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), _DRAWS)
    with np.errstate(divide="ignore", invalid="ignore"):  # of a draw of requests without a second token
        drawn = figure(weights @ sums)
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def compare(pairs: Sequence[tuple[Probe, Probe]]) -> Free:
    """An arm's outputs and the control's, token by token."""
    identical = places = equal = before = 0
    divergences = []
    for ours, theirs in pairs:
        same = [a == b for a, b in zip(ours.tokens, theirs.tokens, strict=False)]
        length = max(len(ours.tokens), len(theirs.tokens))
        first = next((place for place, one in enumerate(same) if not one), len(same))
        identical += first == length
        if first < length:
            divergences.append(first)
        places, equal, before = places + length, equal + sum(same), before + first
    share = max(places, 1)
    return Free(len(pairs), identical, places, equal / share, before / share, sorted(divergences))


# In words


def say(found: Figures, approximate: bool) -> str:
    """One sentence."""
    forced, noise, free = found.forced, found.noise, found.free
    own = f"noise of the control: {_share(noise.flips.value)}" if noise else "the control's own noise is not known"
    parts = [
        f"{_share(forced.flips.value)}{_interval(forced.flips)} of tokens are not the exact model's choice ({own})"
    ]
    floor = f" (control: {_signed(noise.excess.value)})" if noise else ""
    text = f"perplexity of its text {_signed(forced.excess.value)} over what the arm gave it{floor}"
    change = found.perplexity_change
    if change is not None:
        text += f" and {_signed(change.value)}{_interval(change, '+')} over that of the control's text"
    floor = f" (control: {_nats(noise.kl.value)})" if noise else ""
    parts += [text, f"KL from the exact model at least {_nats(forced.kl.value)} nats per token{floor}"]
    if free is not None:
        middle = free.quantile(0.5)
        part = f", the others part after {middle:.0f} tokens (median)" if middle is not None else ""
        parts.append(
            f"run freely, {_share(free.equal)} of tokens equal the control's: {free.identical} of {free.requests} "
            f"outputs are identical{part}"
        )
    return ("approximate: " if approximate else "") + "; ".join(parts)


def _share(value: float) -> str:
    return f"{value:.{1 if value < 0.0995 else 0}%}"


def _signed(value: float) -> str:
    text = f"{value:+.1%}"
    return text[1:] if text in ("+0.0%", "-0.0%") else text


def _nats(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-6 else "0"


def _interval(found: Estimate, sign: str = "") -> str:
    if found.low is None or found.high is None:
        return ""
    return f" (95% interval {found.low:{sign}.1%} to {found.high:{sign}.1%})"
