"""The report of a comparison: one HTML file that needs nothing else, no network and no script.

Everything a model, a server or a user said is escaped by the template engine, and its control and direction-changing
characters are shown as escapes; the page's content security policy forbids it to load or run anything at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_specplug.ab import plots
from vllm_specplug.ab.fidelity import Figures as Fidelities
from vllm_specplug.ab.fidelity import Forced
from vllm_specplug.ab.intervals import Estimate
from vllm_specplug.ab.measures import Figures, Percentiles, answered
from vllm_specplug.ab.outputs import common_prefix
from vllm_specplug.ab.results import Cell, Plan, Reply
from vllm_specplug.ab.summary import printable, replace_text
from vllm_specplug.ab.verdict import Result, Verdict

#: Outputs shown side by side: at most so many per arm and load, each so many characters around the first difference.
MOST_EXAMPLES = 2
BEFORE, AFTER = 160, 280

_TEMPLATE = "report.html.jinja"
#: As :data:`plots.MARKERS`.
_GLYPHS = "●■▲◆▼✚✖◄►⬟⬢★"
_SPEEDS = {"faster": "faster", "slower": "slower", "same": "no difference", "untold": "could not be told"}
_OUTPUTS = {
    "same": ("good", "same output"),
    "repeatable": ("good", "same output, as far as the control's"),
    "distribution": ("good", "same distribution"),
    "untold": ("unsure", "output: could not be told"),
    "different": ("bad", "not the same output"),
    "approximate": ("unsure", "approximate output"),
}


@dataclass(frozen=True)
class Table:
    """A table of text. The first column names the row; ``control`` are the numbers of the control's rows."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    control: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Example:
    """Two outputs of one request that differ: the equal text before, and each's first other word and what follows."""

    arm: str
    load: str
    task: str
    index: int
    equal: str
    control: tuple[str, str]
    other: tuple[str, str]


def write(verdict: Verdict, plan: Plan, cells: Sequence[Cell], path: Path) -> None:
    """Write the report; without matplotlib (extra ``ab``) it has the tables and says why it has no plots.

    Raises:
        OSError: then what was at ``path`` is still there.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    replace_text(path, environment.get_template(_TEMPLATE).render(context(verdict, plan, cells)))


def context(verdict: Verdict, plan: Plan, cells: Sequence[Cell]) -> dict[str, Any]:
    """What the template is given; all text in it may be anything, and is escaped there."""
    drawn = plots.draw(verdict, plan, cells) if plots.available() else []
    return {
        "title": printable(f"{verdict.control} and {', '.join(a.name for a in verdict.arms[1:]) or 'nothing'}"),
        "model": printable(Path(plan.model).name or plan.model),
        "settings": _settings(verdict),
        "arms": [_arm(verdict, i) for i in range(len(verdict.arms))],
        "control": printable(verdict.control),
        "failures": [(printable(arm), printable(why, "\n")) for arm, why in verdict.failures.items()],
        "notes": [printable(str(note)) for note in verdict.facts.get("notes") or []],
        "complete": verdict.facts.get("complete", True),
        "sections": {section: [p for p in drawn if p.section == section] for section in _sections(drawn)},
        "plots_missing": not plots.available(),
        "examples": examples(verdict, plan, cells),
        "tables": tables(verdict),
        "facts": [(printable(str(k)), printable(_flat(v))) for k, v in _facts(verdict.facts)],
    }


def _sections(drawn: Iterable[plots.Plot]) -> list[str]:
    return list(dict.fromkeys(p.section for p in drawn))


def _settings(verdict: Verdict) -> list[tuple[str, str]]:
    s = verdict.settings
    decoding = "greedy" if not s["temperature"] else f"temperature {s['temperature']:g}"
    found = [
        ("model", s["model"]),
        ("workload", f"{s['workload']}, {s['requests']} requests of {len(s['tasks'])} tasks"),
        ("loads", ", ".join(verdict.loads)),
        ("output", f"at most {s['output_tokens']} tokens, {decoding}"),
        ("repeats", f"{s['repeats']}, seed {s['seed']}"),
    ]
    return [(name, printable(text)) for name, text in found]


def _arm(verdict: Verdict, number: int) -> dict[str, Any]:
    arm = verdict.arms[number]
    results = [r for r in verdict.results if r.arm == arm.name]
    return {
        "name": printable(arm.name),
        "flags": [printable(arm.url)] if arm.url else [printable(flag) for flag in arm.flags],
        "color": plots.color(number)[-2:].lstrip("0") or "0",
        "glyph": _GLYPHS[number % len(_GLYPHS)],
        "control": number == 0,
        "results": [_result(r) for r in results],
        "fidelity": [printable(f.sentence[:1].upper() + f.sentence[1:]) for f in verdict.fidelity if f.arm == arm.name],
    }


def _result(result: Result) -> dict[str, Any]:
    speed = result.paired.speed if result.paired else None
    output = _OUTPUTS[result.output.kind] if result.output else None
    return {
        "load": printable(result.load),
        "speed": result.speed,
        "says": _SPEEDS[result.speed] if result.speed else "",
        "change": _signed(speed.value - 1) if speed else "",
        "output": output,
        "sentence": printable(result.sentence[:1].upper() + result.sentence[1:]) + ".",
        "cautions": [printable(c) for c in result.cautions],
        "throughput": f"{result.total.tokens_per_s:.1f}",
    }


def _signed(change: float) -> str:
    """A relative change with a typographic minus, one digit where that says something."""
    return f"{change:+.{0 if abs(change) >= 0.0995 else 1}%}".replace("-", "\N{MINUS SIGN}")


def examples(verdict: Verdict, plan: Plan, cells: Sequence[Cell]) -> list[Example]:
    """Outputs that differ from the control's, first of each task, most different first of an arm and load."""
    found = []
    for result in verdict.results:
        if result.control:
            continue
        control, other = (
            {
                (c.block, c.repeat, r.index): r
                for c in cells
                if c.arm == arm and str(c.load) == result.load
                for r in c.replies
                if answered(r)
            }
            for arm in (verdict.control, result.arm)
        )
        differing: dict[str, tuple[float, Reply, Reply]] = {}
        for key in sorted(set(control) & set(other)):
            a, b = control[key], other[key]
            if a.text != b.text:
                share = common_prefix(a.text, b.text) / max(len(a.text), len(b.text))
                if a.task not in differing or share < differing[a.task][0]:
                    differing[a.task] = (share, a, b)
        first = sorted(differing.values(), key=lambda x: x[0])[:MOST_EXAMPLES]
        found += [_example(result, a, b) for _, a, b in first]
    return found


def _example(result: Result, a: Reply, b: Reply) -> Example:
    at = common_prefix(a.text, b.text)
    start = max(0, at - BEFORE)
    return Example(
        arm=printable(result.arm),
        load=printable(result.load),
        task=printable(a.task),
        index=a.index,
        equal=("…" if start else "") + printable(a.text[start:at], "\n\t"),
        control=_rest(a.text, at),
        other=_rest(b.text, at),
    )


def _rest(text: str, at: int) -> tuple[str, str]:
    """What follows ``at``: to the end of that word, and on."""
    rest = text[at : at + AFTER]
    if not rest:
        return "(ends here)", ""
    word = re.match(r"\s*\S*", rest)
    cut = word.end() if word is not None else 0
    more = "\u2026" if len(text) > at + AFTER else ""
    return printable(rest[:cut], "\n\t"), printable(rest[cut:], "\n\t") + more


def tables(verdict: Verdict) -> list[tuple[str, list[Table]]]:
    """All figures, as sections of tables."""
    loads = [load for load in verdict.loads if any(r.load == load for r in verdict.results)]
    by_load = {load: [r for r in verdict.results if r.load == load] for load in loads}
    found = [
        ("Rates and latencies", [_latencies(load, by_load[load]) for load in loads]),
        ("Against the control", [_paired(verdict, load, by_load[load]) for load in loads]),
        ("Drafting", [_drafting(load, by_load[load]) for load in loads]),
        ("Drafts by source", [t for load in loads for t in _sources(load, by_load[load])]),
        ("Outputs", [_outputs(load, by_load[load]) for load in loads]),
        ("Fidelity", _fidelity(verdict)),
        ("By task", [_tasks(verdict, load, by_load[load]) for load in loads]),
    ]
    return [(title, kept) for title, group in found if (kept := [t for t in group if t.rows])]


def _controls(results: Sequence[Result]) -> set[int]:
    return {i for i, r in enumerate(results) if r.control}


def _ms(found: Percentiles | None, digits: int = 0, scale: float = 1000.0) -> list[str]:
    return [f"{x * scale:.{digits}f}" for x in (found.p50, found.p90, found.p99)] if found else [""] * 3


_LATENCY_COLUMNS = [f"{name} {p}" for name in ("TTFT ms", "TPOT ms", "E2E s") for p in ("p50", "p90", "p99")]


def _figures(figures: Figures) -> list[str]:
    return [*_ms(figures.ttft), *_ms(figures.tpot, 1), *_ms(figures.e2e, 2, 1.0)]


def _latencies(load: str, results: Sequence[Result]) -> Table:
    rows = [
        [
            printable(r.arm),
            str(r.total.requests),
            str(r.total.errors),
            f"{r.total.requests_per_s:.2f}",
            f"{r.total.tokens_per_s:.1f}",
            *_figures(r.total),
            f"{r.memory_bytes / 2**30:.2f}" if r.memory_bytes is not None else "",
        ]
        for r in results
    ]
    columns = ["arm", "requests", "errors", "requests/s", "tokens/s", *_LATENCY_COLUMNS, "peak GiB"]
    return Table(load, columns, rows, _controls(results))


def _ratio(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} ({estimate.low:.2f}–{estimate.high:.2f})"  # noqa: RUF001


def _paired(verdict: Verdict, load: str, results: Sequence[Result]) -> Table:
    rows = [
        [printable(r.arm), str(r.paired.pairs)]
        + [_ratio(x) for x in (r.paired.speed, r.paired.throughput, r.paired.ttft, r.paired.tpot, r.paired.e2e)]
        for r in results
        if r.paired is not None
    ]
    return Table(load, ["arm", "pairs", "speed", "tokens/s", "TTFT", "TPOT", "E2E"], rows)


def _drafting(load: str, results: Sequence[Result]) -> Table:
    known = [r for r in results if r.drafting is not None]
    depths = min(8, max((len(r.drafting.by_position) for r in known if r.drafting), default=0))
    rows = []
    for r in known:
        d = r.drafting
        assert d is not None
        shares = [f"{d.by_position[i]:.0%}" if i < len(d.by_position) else "" for i in range(depths)]
        rows.append(
            [
                printable(r.arm),
                f"{d.mat:.2f}",
                f"{d.drafted:.0f}",
                f"{d.accepted:.0f}",
                f"{d.acceptance:.0%}" if d.acceptance is not None else "",
                f"{d.overhead:.1%}" if d.overhead is not None else "",
                *shares,
            ]
        )
    columns = ["arm", "tokens per step", "drafted", "accepted", "share", "overhead"]
    return Table(load, columns + [f"depth {i + 1}" for i in range(depths)], rows, _controls(known))


def _sources(load: str, results: Sequence[Result]) -> list[Table]:
    found = []
    for r in results:
        if r.drafting is not None and r.drafting.by_source:
            rows = []
            for source, c in r.drafting.by_source.items():
                drafted, verified, accepted = sum(c.drafted), sum(c.verified), sum(c.accepted)
                share = f"{accepted / verified:.0%}" if verified else ""
                rows.append([printable(source), f"{drafted:.0f}", f"{verified:.0f}", f"{accepted:.0f}", share])
            columns = ["source", "drafted", "verified", "accepted", "accepted of verified"]
            found.append(Table(printable(f"{r.arm}, {load}"), columns, rows))
    return found


def _outputs(load: str, results: Sequence[Result]) -> Table:
    rows = []
    for r in results:
        if r.output is not None:
            found, own = r.output.agreement, r.output.control
            first = f"{found.first_divergence:.0f} {found.unit}" if found.first_divergence is not None else ""
            control = f"{own.identical} of {own.compared}, {r.output.control_what}" if own else ""
            rows.append(
                [
                    printable(r.arm),
                    _OUTPUTS[r.output.kind][1],
                    f"{found.identical} of {found.compared}",
                    first,
                    control,
                    f"{r.output.p_value:.2g}" if r.output.p_value is not None else "",
                ]
            )
    columns = ["arm", "verdict", "identical", "first difference (median)", "control with itself", "p"]
    return Table(load, columns, rows)


def _fidelity(verdict: Verdict) -> list[Table]:
    """A table per arm: all requests, then each task, then the control's own outputs, read as the arm's were."""
    found = []
    for arm in verdict.fidelity:
        if arm.total is None:
            continue
        rows = [_faithful("all", arm.total.forced, arm.total, arm.mat)]
        if len(arm.tasks) > 1:
            rows += [_faithful(printable(task), figures.forced, figures, None) for task, figures in arm.tasks.items()]
        if arm.total.noise is not None:
            control = f"noise: {printable(verdict.control)} itself"
            rows.append(_faithful(control, arm.total.noise, None, arm.control_mat))
        found.append(Table(printable(arm.arm), _FIDELITY_COLUMNS, rows, {len(rows) - 1} if arm.total.noise else set()))
    return found


_FIDELITY_COLUMNS = [
    "requests",
    "outputs",
    "tokens",
    "not the exact choice",
    "KL, at least",
    "perplexity",
    "over its own",
]
_FIDELITY_COLUMNS += [
    "over the control's",
    "equal tokens",
    "before parting",
    "identical",
    "parts after (p10, p50, p90)",
    "tokens per step",
]


def _faithful(name: str, forced: Forced, figures: Fidelities | None, mat: float | None) -> list[str]:
    free = figures.free if figures else None
    change = figures.perplexity_change if figures else None
    parts = [free.quantile(share) for share in (0.1, 0.5, 0.9)] if free else []
    return [
        name,
        str(forced.requests),
        str(forced.tokens),
        _between(forced.flips, ".1%"),
        _between(forced.kl, ".2g"),
        f"{forced.perplexity.value:.3f}",
        _between(forced.excess, "+.1%"),
        _between(change, "+.1%") if change else "",
        f"{free.equal:.1%}" if free else "",
        f"{free.before:.1%}" if free else "",
        f"{free.identical} of {free.requests}" if free else "",
        ", ".join(f"{part:.0f}" for part in parts if part is not None),
        f"{mat:.2f}" if mat is not None else "",
    ]


def _between(found: Estimate, form: str) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:{form}}"
    return f"{found.value:{form}} ({found.low:{form}}–{found.high:{form}})"  # noqa: RUF001


def _tasks(verdict: Verdict, load: str, results: Sequence[Result]) -> Table:
    rows: list[list[str]] = []
    control = set()
    for task in verdict.settings["tasks"]:
        for r in results:
            if task in r.tasks:
                if r.control:
                    control.add(len(rows))
                figures = r.tasks[task]
                ratio = r.paired.tasks.get(task) if r.paired else None
                rows.append(
                    [
                        printable(task),
                        printable(r.arm),
                        str(figures.requests),
                        f"{figures.speed:.1f}",
                        _ratio(ratio),
                        *_figures(figures),
                    ]
                )
    columns = ["task", "arm", "requests", "tokens/s of a request", "speed over control", *_LATENCY_COLUMNS]
    return Table(load, columns, rows, control)


def _facts(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    """Nested facts one level down."""
    found: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if name in ("notes", "complete", "interleaved", "fidelity"):
            continue  # said above
        if isinstance(value, dict):
            found += [(str(k), v) for k, v in value.items() if v is not None]
        elif value is not None:
            found.append((name, value))
    return found


def _flat(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
