"""Are an arm's outputs the control's? What differs, where, and whether the control differs from itself as much.

Greedy outputs are compared token by token (character by character where a server tells no ids). That alone would call
honest arms wrong: in bfloat16 and float16 vLLM gives other last bits when a step has more rows, so that near ties fall
the other way, with speculation and with other batch sizes. So the control is compared with itself, between repeats and
between loads, where the run has them, and an arm's outputs are called not the same only where they part clearly sooner
than the control's own do. Where every other output of the control's own is equal, any difference counts.

Sampled outputs are compared as distributions: the total-variation distance of token counts, and mean lengths, against
their distribution when arm and control are swapped at random, request by request.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vllm_specplug.ab.results import Reply

#: Chance of calling an arm's outputs not the same when they are.
LEVEL = 0.01
#: Where the control cannot be compared with itself under other batch sizes: more differences per token than that are
#: taken for wrong tokens. Rounding made 10 of 16 outputs of a 135M model differ within 128 tokens, 0.8% per token.
MOST_ROUNDING = 0.03
#: So many characters are taken for a token where only text can be compared.
CHARACTERS = 4
#: Control outputs compared with themselves, all equal, that show that it repeats itself.
ENOUGH = 8
_PERMUTATIONS = 999
#: Rarer tokens are counted as one.
_MOST_TOKENS = 2000

Pair = tuple[Reply, Reply]


@dataclass(frozen=True)
class Agreement:
    """Outputs compared in pairs.

    Attributes:
        compared, identical: pairs, and those that are equal to the end.
        unit: of positions: tokens or characters.
        divergences: of each pair that differs, how many units are equal before the first difference.
        lengths: of each pair that does not, its length.
        first_divergence: median of ``divergences``; None without any.
        events, exposure: per request, averaged over its pairs, and added up: differences, and units compared until
            then. Their ratio is the chance of parting per unit.
        requests: how many requests the pairs are of.
    """

    compared: int
    identical: int
    unit: Literal["tokens", "characters"]
    divergences: list[int]
    lengths: list[int]
    first_divergence: float | None
    events: float
    exposure: float
    requests: int

    @property
    def share(self) -> float:
        """Identical share."""
        return self.identical / self.compared if self.compared else 0.0


Kind = Literal["same", "repeatable", "distribution", "untold", "different", "approximate"]


@dataclass(frozen=True)
class Output:
    """Whether an arm's outputs are the control's.

    Attributes:
        kind: ``same``: all equal; ``repeatable``: as equal as the control's are among themselves; ``distribution``:
            sampled outputs not told apart; ``untold``: some differ, and why could not be told; ``different``: not the
            same; ``approximate``: no claim, as one side is approximate by intent.
        sentence: the end of the verdict's sentence.
        agreement: arm and control.
        control: control and control, as far apart as found; None where there was nothing to compare.
        control_what: what ``control`` compares, "between repeats" for example.
        p_value: of the test that decided; None where none was needed or possible.
        distance, expected_distance: of sampled outputs: total-variation distance of token counts, and its mean where
            arm and control are swapped at random.
    """

    kind: Kind
    sentence: str
    agreement: Agreement
    control: Agreement | None = None
    control_what: str = ""
    p_value: float | None = None
    distance: float | None = None
    expected_distance: float | None = None


@dataclass(frozen=True)
class Reference:
    """The control compared with itself.

    Attributes:
        what: "between repeats" or "between LOAD and LOAD".
        pairs: its replies to the same request.
        other_rows: whether the batches of the two can have had other sizes, so that rounding shows.
    """

    what: str
    pairs: list[Pair] = field(default_factory=list)
    other_rows: bool = False


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Number of equal elements before the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def compare(pairs: Sequence[Pair]) -> Agreement:
    """Compare outputs by token ids if all replies have them, else by text."""
    ids = all(r.tokens is not None for pair in pairs for r in pair)
    divergences: list[int] = []
    lengths: list[int] = []
    requests: dict[int, list[tuple[int, int]]] = {}
    for a, b in pairs:
        ours, theirs = (a.tokens or [], b.tokens or []) if ids else (a.text, b.text)
        equal = common_prefix(ours, theirs)
        differs = equal < max(len(ours), len(theirs))
        (divergences if differs else lengths).append(equal)
        requests.setdefault(a.index, []).append((differs, equal + differs))
    return Agreement(
        compared=len(pairs),
        identical=len(lengths),
        unit="tokens" if ids else "characters",
        divergences=divergences,
        lengths=lengths,
        first_divergence=float(np.median(divergences)) if divergences else None,
        events=sum(sum(e for e, _ in found) / len(found) for found in requests.values()),
        exposure=sum(sum(x for _, x in found) / len(found) for found in requests.values()),
        requests=len(requests),
    )


def judge_greedy(pairs: Sequence[Pair], references: Iterable[Reference]) -> Output | None:
    """Judge greedy outputs of an arm against the control's; None where no pair was answered."""
    if not pairs:
        return None
    found = compare(pairs)
    own = [(r, compare(r.pairs)) for r in references if r.pairs]
    if found.identical == found.compared:
        return Output("same", f"the same output (all {found.compared})", found, *_least_equal(own))
    what = f"{found.identical} of {found.compared} identical"
    if not own:
        return _without_reference(found, what, "the control was not compared with itself", None, "")
    control, name = _least_equal(own)
    assert control is not None
    theirs = f"the control's own {control.identical} of {control.compared}"
    same = ("not the same output", "the same output as far as the control repeats its own")
    if control.identical == control.compared:
        if control.compared < ENOUGH or not any(r.other_rows for r, _ in own):
            why = f"the control repeated {control.compared} of its own exactly, always in batches of the same size"
            return _without_reference(found, what, why, control, name)
        return Output("different", f"{same[0]} ({what}, {theirs})", found, control, name)
    p = parts_sooner(found, control)
    kind: Kind = "different" if p < LEVEL else "repeatable"
    return Output(kind, f"{same[p >= LEVEL]} ({what}, {theirs})", found, control, name, p)


def _least_equal(own: Sequence[tuple[Reference, Agreement]]) -> tuple[Agreement | None, str]:
    """The comparison of the control with itself in which outputs part soonest."""
    if not own:
        return None, ""
    reference, found = max(own, key=lambda x: x[1].events / max(x[1].exposure, 1e-9))
    return found, reference.what


def _without_reference(found: Agreement, what: str, why: str, control: Agreement | None, name: str) -> Output:
    """Some outputs differ, and nothing says how much rounding does; only many early differences are sure."""
    rounding = MOST_ROUNDING if found.unit == "tokens" else MOST_ROUNDING / CHARACTERS
    p = _more_events(found.events, found.exposure * rounding)
    if p < LEVEL:
        sentence = f"not the same output ({what}, and they part sooner than rounding would make them)"
        return Output("different", sentence, found, control, name, p)
    sentence = f"output that differs ({what}); whether by vLLM's rounding or by the arm could not be told: {why}"
    return Output("untold", sentence, found, control, name, p)


def approximate(found: Output, by_control: bool = False) -> Output:
    """The same comparison where the arm, or the control, is approximate: equal outputs then are no promise, and others
    no fault, so neither is claimed."""
    equal = found.agreement
    what = "output of an approximate control" if by_control else "approximate output, as the arm is"
    sentence = f"{what} ({equal.identical} of {equal.compared} identical to the control's)"
    return dataclasses.replace(found, kind="approximate", sentence=sentence)


def _more_events(events: float, expected: float) -> float:
    """Chance of at least so many events where ``expected`` are expected (Poisson)."""
    count = math.floor(events + 1e-9)
    term, total = math.exp(-expected), 0.0
    for k in range(count):
        total += term
        term *= expected / (k + 1)
    return max(0.0, 1.0 - total)


def parts_sooner(found: Agreement, control: Agreement) -> float:
    """One-sided p-value of: ``found`` parts no sooner, per unit compared, than ``control``.

    Of all differences together, those of ``found`` are binomial by its share of the units compared (the exact test of
    two Poisson rates). Averages over a request's pairs are rounded to whole differences.
    """
    ours, theirs = round(found.events), round(control.events)
    share = found.exposure / max(found.exposure + control.exposure, 1e-9)
    if found.unit != control.unit:
        return 1.0
    return _binomial_tail(ours, ours + theirs, share)


def _binomial_tail(least: int, trials: int, chance: float) -> float:
    """Chance of at least ``least`` successes."""
    if least <= 0:
        return 1.0
    if not 0 < chance < 1:
        return float(chance >= 1)
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(chance) + (trials - k) * math.log1p(-chance)
        for k in range(least, trials + 1)
    ]  # fmt: skip
    return min(1.0, math.fsum(math.exp(x) for x in logs))


def judge_sampled(pairs: Sequence[Pair], seed: int = 0) -> Output | None:
    """Judge sampled outputs of an arm against the control's; None where no pair was answered."""
    if not pairs:
        return None
    found = compare(pairs)
    if found.identical == found.compared:
        return Output("same", f"the same output (all {found.compared}, with the same seeds)", found)
    distance, expected, p_tokens, p_lengths = distribution_test(pairs, seed)
    # Two tests, each at half the level.
    p = min(1.0, 2 * min(p_tokens, p_lengths))
    figures = f"total variation of tokens {distance:.2f}, {expected:.2f} by chance; p = {p:.2g}"
    if p < LEVEL:
        kind: Kind = "different"
        sentence = f"not the same output: other tokens or lengths ({figures})"
    elif found.requests < ENOUGH:
        kind = "untold"
        sentence = f"output of which too little is known: {found.requests} requests ({figures})"
    else:
        kind = "distribution"
        sentence = f"the same distribution of outputs, as far as {found.requests} requests tell ({figures})"
    return Output(kind, sentence, found, p_value=p, distance=distance, expected_distance=expected)


def distribution_test(pairs: Sequence[Pair], seed: int = 0) -> tuple[float, float, float, float]:
    """Compare sampled outputs as distributions.

    Returns:
        The total-variation distance between the two sides' token counts (words, where there are no ids); its mean
        where a fair coin decides, for each request with all its repeats, which side is which; the p-values of that
        distance and of the difference in mean length.
    """
    ids = all(r.tokens is not None for pair in pairs for r in pair)
    sides = [[(r.tokens or []) if ids else r.text.split() for r in pair] for pair in pairs]
    _, request = np.unique([a.index for a, _ in pairs], return_inverse=True)
    counts: dict[object, int] = {}
    for pair in sides:
        for output in pair:
            for token in output:
                counts[token] = counts.get(token, 0) + 1
    common = sorted(counts, key=lambda t: (-counts[t], str(t)))[:_MOST_TOKENS]
    column = {token: i for i, token in enumerate(common)}
    tables = np.zeros((2, request.max() + 1, len(common) + 1))
    for row, pair in zip(request, sides, strict=True):
        for side, output in enumerate(pair):
            for token in output:
                tables[side, row, column.get(token, len(common))] += 1
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(_PERMUTATIONS + 1, tables.shape[1]))
    signs[0] = 1.0
    total, swapped = tables.sum(axis=(0, 1)), signs @ (tables[0] - tables[1])
    ours, theirs = (total + swapped) / 2, (total - swapped) / 2
    rates = [side / np.maximum(side.sum(axis=1, keepdims=True), 1.0) for side in (ours, theirs)]
    distances = np.abs(rates[0] - rates[1]).sum(axis=1) / 2
    lengths = np.abs(swapped.sum(axis=1))
    p_values = [float(np.mean(x >= x[0] - 1e-12)) for x in (distances, lengths)]
    return float(distances[0]), float(distances[1:].mean()), p_values[0], p_values[1]
