"""Plain figures of one arm under one load: rates, latencies, drafting, from replies and the server's counters.

Counters are read by the names vLLM 0.28 to 0.32 gives them (v1/spec_decode/metrics.py) and by this plugin's
(host/metrics.py); both with or without Prometheus's ``_total``. Of several engines of one server the sum is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_specplug.ab.results import Cell, Reply

_SAMPLE = re.compile(r"([^{]+)(?:\{(.*)\})?$", re.DOTALL)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_PREFIXES = ("vllm_specplug:", "specplug:")


@dataclass(frozen=True)
class Percentiles:
    """Of one latency over requests, in seconds; linear interpolation between requests."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class SourceCounts:
    """Draft tokens of one source, in lists over depths 1, 2, ...; the last depth may take in all deeper ones."""

    drafted: list[float]
    verified: list[float]
    accepted: list[float]


@dataclass(frozen=True)
class Drafting:
    """What speculation did.

    Attributes:
        mat: mean tokens per decode step and request, steps without a draft included; 1 without speculation.
        drafts: steps of a request in which draft tokens were verified.
        drafted, accepted: draft tokens verified and accepted.
        acceptance: ``accepted / drafted``; None without drafts.
        by_position: share of those steps in which the token at depth 1, 2, ... was accepted.
        by_source: this plugin's own counts, by source; empty for other speculation.
        overhead: share of the time that drafting took on the engine's path; None where the server does not tell.
    """

    mat: float
    drafts: float
    drafted: float
    accepted: float
    acceptance: float | None
    by_position: list[float] = field(default_factory=list)
    by_source: dict[str, SourceCounts] = field(default_factory=dict)
    overhead: float | None = None


@dataclass(frozen=True)
class Figures:
    """One arm under one load, in total or for one task; all repeats together.

    Attributes:
        requests: answered in full.
        errors: not answered, or not in full.
        prompt_tokens, output_tokens: of those answered.
        requests_per_s, tokens_per_s: over the time the cells took. Of a task: its share of that.
        speed: output tokens per second of the requests' own time, from sending to the last token. With a fixed number
            of requests at once it is the throughput divided by that number, but for the ends of the cells.
        ttft, tpot, e2e: time to the first token, time per token after the first, and to the last token; None where no
            request has one.
    """

    requests: int
    errors: int
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    tokens_per_s: float
    speed: float
    ttft: Percentiles | None
    tpot: Percentiles | None
    e2e: Percentiles | None


def answered(reply: Reply) -> bool:
    """Whether a reply is whole, so that its times count."""
    return not reply.error and reply.output_tokens > 0


def figures(cells: Sequence[Cell], task: str | None = None) -> Figures:
    """Summarise cells of one arm and load; ``task``: only its requests."""
    replies = [r for cell in cells for r in cell.replies if task is None or r.task == task]
    good = [r for r in replies if answered(r)]
    seconds = sum(cell.seconds for cell in cells)
    tokens = sum(r.output_tokens for r in good)
    own_time = sum(r.total_s for r in good)
    return Figures(
        requests=len(good),
        errors=len(replies) - len(good),
        prompt_tokens=sum(r.prompt_tokens for r in good),
        output_tokens=tokens,
        requests_per_s=len(good) / seconds if seconds > 0 else 0.0,
        tokens_per_s=tokens / seconds if seconds > 0 else 0.0,
        speed=tokens / own_time if own_time > 0 else 0.0,
        ttft=percentiles(first_times(good)),
        tpot=percentiles(token_times(good)),
        e2e=percentiles(total_times(good)),
    )


def first_times(replies: Iterable[Reply]) -> list[float]:
    """Times to the first token."""
    return [r.first_s for r in replies if answered(r)]


def token_times(replies: Iterable[Reply]) -> list[float]:
    """Mean times per token after the first, of replies that have such."""
    return [(r.total_s - r.first_s) / (r.output_tokens - 1) for r in replies if answered(r) and r.output_tokens > 1]


def total_times(replies: Iterable[Reply]) -> list[float]:
    """Times to the last token."""
    return [r.total_s for r in replies if answered(r)]


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Mean and percentiles; None of nothing."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return Percentiles(float(np.mean(values)), float(p50), float(p90), float(p99))


def drafting(cells: Sequence[Cell]) -> Drafting | None:
    """What speculation did in cells of one arm and load; None where the server tells no counters."""
    totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for cell in cells:
        for key, value in cell.counters.items():
            sample = _parse(key)
            totals[sample] = totals.get(sample, 0.0) + value
    if not totals:
        return None
    emitted = _sum(totals, "vllm:generation_tokens") or float(sum(r.output_tokens for c in cells for r in c.replies))
    requests = sum(r.output_tokens > 0 for c in cells for r in c.replies)
    drafts = _sum(totals, "vllm:spec_decode_num_drafts")
    drafted = _sum(totals, "vllm:spec_decode_num_draft_tokens")
    accepted = _sum(totals, "vllm:spec_decode_num_accepted_tokens")
    positions = _by(totals, "vllm:spec_decode_num_accepted_tokens_per_pos", "position")
    last = max((int(p) for p, count in positions.items() if p.isdigit() and count), default=-1)
    decoded = emitted - requests
    steps = decoded - accepted
    phases = [value for prefix in _PREFIXES for value in _by(totals, prefix + "drafting_seconds", "phase").values()]
    seconds = sum(cell.seconds for cell in cells)
    return Drafting(
        mat=decoded / steps if steps > 0 else 1.0,
        drafts=drafts,
        drafted=drafted,
        accepted=accepted,
        acceptance=accepted / drafted if drafted else None,
        by_position=[positions.get(str(p), 0.0) / drafts for p in range(last + 1)] if drafts else [],
        by_source=_sources(totals),
        overhead=sum(phases) / seconds if phases and seconds > 0 else None,
    )


_Totals = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def _parse(key: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    found = _SAMPLE.match(key)
    if found is None:
        return key, ()
    return found[1].strip().removesuffix("_total"), tuple(_LABEL.findall(found[2] or ""))


def _sum(totals: _Totals, name: str) -> float:
    return sum(value for (found, _), value in totals.items() if found == name)


def _by(totals: _Totals, name: str, label: str) -> dict[str, float]:
    """The samples of one family, added up by one label."""
    sums: dict[str, float] = {}
    for (found, labels), value in totals.items():
        if found == name:
            key = dict(labels).get(label, "")
            sums[key] = sums.get(key, 0.0) + value
    return sums


def _sources(totals: _Totals) -> dict[str, SourceCounts]:
    """This plugin's draft tokens by source and depth (labels ``source`` and ``depth``; ``8+`` is 8 and deeper)."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for what in _KINDS:
        for (name, labels), value in totals.items():
            if name not in [f"{prefix}{what}_tokens" for prefix in _PREFIXES]:
                continue
            label = dict(labels)
            depth = label.get("depth", "").rstrip("+")
            if "source" in label and depth.isdigit() and value:
                counts = found.setdefault(label["source"], {}).setdefault(what, {})
                counts[int(depth)] = counts.get(int(depth), 0.0) + value
    result = {}
    for source, kinds in sorted(found.items()):
        depths = range(1, max(depth for by_depth in kinds.values() for depth in by_depth) + 1)
        lists = {what: [kinds.get(what, {}).get(d, 0.0) for d in depths] for what in _KINDS}
        result[source] = SourceCounts(**lists)
    return result


_KINDS = ("drafted", "verified", "accepted")


def memory(cells: Sequence[Cell]) -> int | None:
    """Peak resident memory of an arm's server in bytes; None where it is not known."""
    return max((c.memory_bytes for c in cells if c.memory_bytes is not None), default=None)
