"""A verdict on the terminal, as JSON and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specplug.ab.fidelity import Figures as Fidelities
from vllm_specplug.ab.intervals import Estimate
from vllm_specplug.ab.measures import Figures, Percentiles
from vllm_specplug.ab.verdict import Result, Verdict

if TYPE_CHECKING:
    from rich.console import Console

#: Columns of the CSV; ``task`` is empty for all tasks together, ``load`` for fidelity, which has a pass of its own,
#: ``low`` and ``high`` for what has no interval.
COLUMNS = ("arm", "load", "task", "metric", "unit", "value", "low", "high")
#: Control, format and surrogate characters; of the formats those that many scripts and emoji need may stay.
_UNSEEN, _JOINERS = ("Cc", "Cf", "Cs"), "\u00ad\u200c\u200d"
_MARKS = {"faster": "green", "slower": "red", "same": "default", "untold": "yellow"}


def printable(text: str, keep: str = "") -> str:
    """``text`` with control characters, lone surrogates and those that turn its direction round written as escapes:
    what a model or a log says must not steer a terminal nor reorder a page. ``keep``: characters that stay."""
    return "".join(
        c if c in keep or c in _JOINERS or unicodedata.category(c) not in _UNSEEN else _escaped(c) for c in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def print_summary(verdict: Verdict, console: Console) -> None:
    """Print the sentences, then a table per load."""
    from rich.text import Text

    def line(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), soft_wrap=False)

    for result in verdict.results:
        if not result.control:
            name = printable(f"{result.arm}, {result.load}: ")
            line((name, "bold"), (printable(result.sentence), _MARKS[result.speed or "same"]))
        for caution in result.cautions:
            line(printable(f"  note: {result.arm}, {result.load}: {caution}"))
    for found_out in verdict.fidelity:
        line((printable(f"{found_out.arm}, fidelity: "), "bold"), printable(found_out.sentence))
    for arm, why in verdict.failures.items():
        line((printable(f"{arm} failed: "), "bold red"), printable(why, "\n"))
    for load in verdict.loads:
        found = [r for r in verdict.results if r.load == load]
        if found:
            console.print()
            console.print(_table(load, found))
    if verdict.results:
        console.print(
            "Speed-up: output tokens per second of the requests' own time, over the control's, with its 95% interval. "
            "TTFT, TPOT, E2E: time to the first token, per token after it, to the last; median over requests. MAT: "
            "tokens per decode step. Equal: outputs identical to the control's.",
            highlight=False,
        )


def _table(load: str, results: list[Result]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=load, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("arm", overflow="fold", vertical="bottom")
    for title in ("tokens\nper s", "speed-\nup", "95%\ninterval", "TTFT\nms", "TPOT\nms", "E2E\ns", "MAT", "equal"):
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        total, speed = result.total, result.paired.speed if result.paired else None
        equal = result.output.agreement if result.output else None
        table.add_row(
            Text(printable(result.arm)),
            f"{total.tokens_per_s:.1f}",
            f"{speed.value:.2f}x" if speed else "",
            f"{speed.low:.2f}-{speed.high:.2f}" if speed and speed.low is not None and speed.high is not None else "",
            _median(total.ttft, 1000, 0),
            _median(total.tpot, 1000, 1),
            _median(total.e2e, 1, 2),
            f"{result.drafting.mat:.2f}" if result.drafting else "",
            f"{equal.identical}/{equal.compared}" if equal else "",
        )
    return table


def _median(found: Percentiles | None, scale: float, digits: int) -> str:
    return f"{found.p50 * scale:.{digits}f}" if found else ""


def write_json(verdict: Verdict, path: Path) -> None:
    """Write all of it. Raises ``OSError``; then what was at ``path`` is still there."""
    replace_text(path, json.dumps(dataclasses.asdict(verdict), indent=2) + "\n")


def write_csv(verdict: Verdict, path: Path) -> None:
    """Write every figure as a row of :data:`COLUMNS`; times in seconds. Raises ``OSError`` as :func:`write_json`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)

    def row(arm: str, load: str, task: str, metric: str, unit: str, value: float | Estimate) -> None:
        estimate = value if isinstance(value, Estimate) else Estimate(value)
        figures = [_cell(x) for x in (estimate.value, estimate.low, estimate.high)]
        writer.writerow([_safe(x) for x in (arm, load, task, metric, unit)] + figures)

    for result in verdict.results:
        for task, metric, unit, value in _rows(result):
            row(result.arm, result.load, task, metric, unit, value)
    for fidelity in verdict.fidelity:
        for task, figures in (("", fidelity.total), *fidelity.tasks.items()):
            for metric, unit, value in _fidelity(figures) if figures else ():
                row(fidelity.arm, "", task, metric, unit, value)
        if fidelity.mat is not None:
            row(fidelity.arm, "", "", "fidelity_mat", "tokens/step", fidelity.mat)
    replace_text(path, text.getvalue())


def _fidelity(figures: Fidelities) -> Iterator[tuple[str, str, float | Estimate]]:
    for name, forced in (("", figures.forced), ("control_", figures.noise)):
        if forced is not None:
            yield f"{name}forced_tokens", "tokens", forced.tokens
            yield f"{name}top1_flips", "share of tokens", forced.flips
            yield f"{name}kl_from_below", "nats/token", forced.kl
            yield f"{name}perplexity", "of exact model", forced.perplexity
            yield f"{name}perplexity_excess", "of its own", forced.excess
    if figures.perplexity_change is not None:
        yield "perplexity_change", "of control", figures.perplexity_change
    free = figures.free
    if free is not None:
        yield "free_tokens_equal", "share of tokens", free.equal
        yield "free_tokens_before_divergence", "share of tokens", free.before
        yield "free_outputs_identical", "outputs", free.identical
        yield "free_outputs_compared", "outputs", free.requests
        for share in (0.1, 0.5, 0.9) if free.divergences else ():
            yield f"free_first_divergence_p{share * 100:.0f}", "tokens", free.quantile(share) or 0.0


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _safe(text: str) -> str:
    """A spreadsheet takes text that starts so for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises ``OSError``."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _rows(result: Result) -> Iterator[tuple[str, str, str, float | Estimate]]:
    """Task, metric, unit and value of everything known."""
    for task, figures in (("", result.total), *result.tasks.items()):
        for metric, unit, value in _figures(figures):
            yield task, metric, unit, value
    if result.paired is not None:
        for metric in ("speed", "throughput", "ttft", "tpot", "e2e"):
            estimate = getattr(result.paired, metric)
            if estimate is not None:
                yield "", f"{metric}_ratio", "of control", estimate
        for task, estimate in result.paired.tasks.items():
            if estimate is not None:
                yield task, "speed_ratio", "of control", estimate
    if result.output is not None:
        found = result.output.agreement
        yield "", "outputs_compared", "outputs", found.compared
        yield "", "outputs_identical", "outputs", found.identical
        if found.first_divergence is not None:
            yield "", "first_divergence_p50", found.unit, found.first_divergence
        if result.output.distance is not None:
            yield "", "token_distance", "total variation", result.output.distance
    if result.drafting is not None:
        drafting = result.drafting
        yield "", "mat", "tokens/step", drafting.mat
        yield "", "drafted", "tokens", drafting.drafted
        yield "", "accepted", "tokens", drafting.accepted
        if drafting.overhead is not None:
            yield "", "draft_overhead", "share of time", drafting.overhead
        for depth, share in enumerate(drafting.by_position, 1):
            yield "", f"accepted_at_{depth}", "share of drafts", share
        for source, counts in drafting.by_source.items():
            for what in ("drafted", "verified", "accepted"):
                yield "", f"{what}_from_{source}", "tokens", sum(getattr(counts, what))
    if result.memory_bytes is not None:
        yield "", "peak_memory", "bytes", result.memory_bytes


def _figures(figures: Figures) -> Iterator[tuple[str, str, float]]:
    yield "requests", "requests", figures.requests
    yield "errors", "requests", figures.errors
    yield "output_tokens", "tokens", figures.output_tokens
    yield "requests_per_s", "1/s", figures.requests_per_s
    yield "tokens_per_s", "tokens/s", figures.tokens_per_s
    yield "speed", "tokens/s", figures.speed
    for name in ("ttft", "tpot", "e2e"):
        found = getattr(figures, name)
        if found is not None:
            for part in ("mean", "p50", "p90", "p99"):
                yield f"{name}_{part}", "s", getattr(found, part)
