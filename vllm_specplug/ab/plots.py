"""Plots of a comparison, as SVG to be put inside the HTML report.

Drawn by matplotlib (extra ``ab``), each small enough to be legible at the width of a phone. Text stays text, in the
page's own font, and colours are the page's CSS variables, so that the plots follow light and dark.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_specplug.ab import measures
from vllm_specplug.ab.intervals import Estimate
from vllm_specplug.ab.outputs import Agreement
from vllm_specplug.ab.results import Cell, Plan
from vllm_specplug.ab.summary import printable
from vllm_specplug.ab.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours that stand for CSS variables; matplotlib writes them as they are and :func:`_themed` replaces them.
INK, MUTED, RULE = "#010101", "#010102", "#010103"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)"}
#: Arms beyond that many share colours, not markers.
PALETTE = 8
MARKERS = "os^DvPX<>ph*"
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
#: Points; 340 CSS pixels, so that text of 8.5 points is 11 pixels high on a phone.
WIDTH, FONT = 255.0, 8.5
_MOST_TASKS = 14
_MOST_POINTS = 400
_MOST_DEPTHS = 16


@dataclass(frozen=True)
class Plot:
    """One plot: its section of the report, a caption, what it shows in words for who cannot see it, and the SVG."""

    section: str
    caption: str
    label: str
    svg: str


def available() -> bool:
    """Whether matplotlib is installed."""
    from vllm_specplug.ab.environment import has_module

    return has_module("matplotlib")


def draw(verdict: Verdict, plan: Plan, cells: Sequence[Cell]) -> list[Plot]:
    """All plots there are data for, in order of the report."""
    plots: list[Plot] = []
    order = {arm.name: i for i, arm in enumerate(verdict.arms)}
    for section in (_speed, _throughput, _latency, _acceptance, _agreement):
        plots += section(verdict, plan, cells, order)
    return [_numbered(plot, number) for number, plot in enumerate(plots)]


def _numbered(plot: Plot, number: int) -> Plot:
    """With ids that occur once in the page: matplotlib's begin anew in every figure."""
    svg = re.sub(r'\bid="', f'id="p{number}-', plot.svg)
    svg = re.sub(r"url\(#", f"url(#p{number}-", svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#p{number}-', svg)
    return Plot(plot.section, plot.caption, plot.label, svg)


def color(arm: int) -> str:
    """The stand-in for ``var(--arm-N)``; 0 is the control."""
    return f"#0102{arm if arm < PALETTE else 1 + (arm - 1) % (PALETTE - 1):02x}"


def marker(arm: int) -> str:
    """Matplotlib's marker of an arm."""
    return MARKERS[arm % len(MARKERS)]


def _line(arm: int) -> Any:
    return _LINES[arm % len(_LINES)]


def _figure(height: float, label: str, paint: Callable[[Axes], None]) -> str:
    """Draw on one pair of axes, ``height`` points high, and return the SVG element."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "specplug",
        "font.family": ["DejaVu Sans"],
        "font.size": FONT,
        "axes.titlesize": FONT,
        "axes.labelsize": FONT,
        "xtick.labelsize": FONT,
        "ytick.labelsize": FONT,
        "text.parse_math": False,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "axes.edgecolor": RULE,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.5,
        "lines.markersize": 4.5,
    }
    text = io.StringIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser has the fonts that matter
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _themed(text.getvalue(), label)


def _themed(svg: str, label: str) -> str:
    """The ``svg`` element of a document of matplotlib's, with the page's colours and fonts and a name."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    svg = f'<svg role="img" {box[0] if box else ""} aria-label="{html.escape(printable(label))}">{body}'
    svg = re.sub(r"(font: [^;\"]*?\d(?:px|pt)?) [^;\"]*", r"\1 var(--sans)", svg)
    svg = re.sub(r"#0102([0-9a-f]{2})", lambda found: f"var(--arm-{int(found[1], 16)})", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg.strip()


def _short(name: str, most: int = 20) -> str:
    name = printable(name)
    return name if len(name) <= most else name[: most - 1] + "…"


def _speed(verdict: Verdict, plan: Plan, cells: Sequence[Cell], order: dict[str, int]) -> list[Plot]:
    """Speed-up by task, a plot per load."""
    plots = []
    for load in verdict.loads:
        rows: dict[str, list[tuple[int, Estimate]]] = {}
        for result in verdict.results:
            if result.load == load and result.paired is not None:
                for task, estimate in (("all tasks", result.paired.speed), *result.paired.tasks.items()):
                    if estimate is not None:
                        rows.setdefault(task, []).append((order[result.arm], estimate))
        if not rows:
            continue
        if len(rows) == 2:  # the only task is all tasks
            rows = {"all tasks": rows["all tasks"]}
        shown = list(rows.items())[: _MOST_TASKS + 1]
        arms = sorted({arm for _, found in shown for arm, _ in found})

        def paint(axes: Axes, shown: Any = shown, arms: list[int] = arms) -> None:
            _paint_speed(axes, shown, arms, verdict.control)

        height = 38 + len(shown) * (10 + 8 * len(arms))
        label = f"Speed-up over {verdict.control} by task, {load}. " + "; ".join(
            f"{verdict.arms[arm].name}: {estimate.value:.2f}" for arm, estimate in rows.get("all tasks", [])
        )
        plots.append(Plot("speed", str(load), printable(label), _figure(height, label, paint)))
    return plots


def _paint_speed(
    axes: Axes, rows: Sequence[tuple[str, list[tuple[int, Estimate]]]], arms: list[int], base: str
) -> None:
    values = [estimate.value for _, found in rows for _, estimate in found]
    step = 0.7 / len(arms)
    for y, (_, found) in enumerate(rows):
        for arm, estimate in found:
            at = y + (arms.index(arm) - (len(arms) - 1) / 2) * step
            if estimate.low is not None and estimate.high is not None:
                axes.plot([estimate.low, estimate.high], [at, at], color=color(arm), linewidth=1.3)
            axes.plot([estimate.value], [at], marker(arm), color=color(arm))
    low, high = min([1.0, *values]), max([1.0, *values])
    known = [e for _, found in rows[:1] for _, e in found]  # the totals' intervals are always whole
    low = min([low, *(e.low for e in known if e.low is not None)])
    high = max([high, *(e.high for e in known if e.high is not None)])
    margin = max(0.12 * (high - low), 0.03)
    axes.set_xlim(max(0.0, low - margin), high + margin)
    axes.axvline(1.0, color=color(0), linewidth=1.2)
    axes.set_yticks(range(len(rows)), [_short(task) for task, _ in rows])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.get_yticklabels()[0].set_color(INK)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(f"speed over {_short(base)}")


def _throughput(verdict: Verdict, plan: Plan, cells: Sequence[Cell], order: dict[str, int]) -> list[Plot]:
    """Tokens per second against concurrency and against the rate of arrivals."""
    plots = []
    for what, unit in (("concurrency", "requests at once"), ("rate", "requests per second")):
        loads = [load for load in plan.loads if bool(load.concurrency) == (what == "concurrency")]
        series: dict[int, list[tuple[float, float]]] = {}
        for result in verdict.results:
            for load in loads:
                if result.load == str(load):
                    x = float(getattr(load, what))
                    series.setdefault(order[result.arm], []).append((x, result.total.tokens_per_s))
        if not series:
            continue

        def paint(axes: Axes, series: Any = series, unit: str = unit) -> None:
            _paint_throughput(axes, series, unit, verdict)

        one = len({x for found in series.values() for x, _ in found}) == 1
        label = "Throughput. " + "; ".join(
            f"{verdict.arms[arm].name}: " + ", ".join(f"{y:.1f} tokens/s at {x:g}" for x, y in found)
            for arm, found in series.items()
        )
        caption = (
            str(loads[0]) if one else f"against {what}" if what == "concurrency" else "against the rate of arrivals"
        )
        plots.append(
            Plot("throughput", caption, printable(label), _figure(38 + 16 * len(series) if one else 190, label, paint))
        )
    return plots


def _paint_throughput(axes: Axes, series: dict[int, list[tuple[float, float]]], unit: str, verdict: Verdict) -> None:
    xs = sorted({x for found in series.values() for x, _ in found})
    if len(xs) == 1:
        for y, (arm, found) in enumerate(sorted(series.items())):
            axes.barh([y], [found[0][1]], color=color(arm), height=0.55)
            axes.annotate(
                f"{found[0][1]:.1f}", (found[0][1], y), (3, 0), textcoords="offset points", va="center", color=INK
            )
        axes.set_yticks(range(len(series)), [_short(verdict.arms[arm].name) for arm in sorted(series)])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("output tokens per second")
        return
    for arm, found in sorted(series.items()):
        points = np.array(sorted(found))
        axes.plot(points[:, 0], points[:, 1], marker=marker(arm), linestyle=_line(arm), color=color(arm))
    if xs[0] > 0 and xs[-1] / xs[0] >= 4:
        axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.xaxis.set_minor_locator(_no_ticks())
    axes.margins(x=0.08)
    axes.set_ylim(0, None)
    axes.set_xlabel(unit)
    axes.set_ylabel("output tokens per second")


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


_LATENCIES: tuple[tuple[str, Callable[..., list[float]], str, float], ...] = (
    ("time to first token", measures.first_times, "milliseconds", 1000.0),
    ("time per token", measures.token_times, "milliseconds", 1000.0),
    ("time to last token", measures.total_times, "seconds", 1.0),
)


def _latency(verdict: Verdict, plan: Plan, cells: Sequence[Cell], order: dict[str, int]) -> list[Plot]:
    """Distributions of latencies over requests, three plots per load."""
    plots = []
    for load in plan.loads:
        for title, values, unit, scale in _LATENCIES:
            series = {}
            for arm, i in order.items():
                mine = [r for c in cells if c.load == load and c.arm == arm for r in c.replies]
                found = np.array(values(mine)) * scale
                if len(found):
                    series[i] = np.sort(found)
            if not series:
                continue

            def paint(axes: Axes, series: Any = series, unit: str = unit) -> None:
                _paint_distribution(axes, series, unit)

            label = f"Share of requests by {title}, {load}. Medians: " + "; ".join(
                f"{verdict.arms[i].name}: {np.median(found):.4g} {unit}" for i, found in series.items()
            )
            plots.append(Plot("latency", f"{title}, {load}", printable(label), _figure(165, label, paint)))
    return plots


def _paint_distribution(axes: Axes, series: dict[int, Any], unit: str) -> None:
    for arm, found in sorted(series.items()):
        share = np.arange(1, len(found) + 1) / len(found)
        if len(found) > _MOST_POINTS:
            picked = np.unique(np.linspace(0, len(found) - 1, _MOST_POINTS).round().astype(int))
            found, share = found[picked], share[picked]
        axes.step(
            np.concatenate([found[:1], found]),
            np.concatenate([[0.0], share]),
            where="post",
            color=color(arm),
            linestyle=_line(arm),
        )
    values = np.concatenate(list(series.values()))
    if values.min() > 0 and values.max() > 20 * values.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_locator(_no_ticks())
    elif values.max() > 0:
        axes.set_xlim(0, values.max() * 1.04)
    axes.set_yticks([0, 0.5, 0.9, 1.0], ["0", "50%", "90%", "100%"])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(unit)


def _acceptance(verdict: Verdict, plan: Plan, cells: Sequence[Cell], order: dict[str, int]) -> list[Plot]:
    """Acceptance by depth, a plot per load."""
    plots = []
    for load in verdict.loads:
        series = {
            order[r.arm]: r.drafting.by_position[:_MOST_DEPTHS]
            for r in verdict.results
            if r.load == load and r.drafting is not None and r.drafting.by_position
        }
        if not series:
            continue

        def paint(axes: Axes, series: Any = series) -> None:
            for arm, shares in sorted(series.items()):
                depths = np.arange(1, len(shares) + 1)
                axes.plot(depths, shares, marker=marker(arm), linestyle=_line(arm), color=color(arm))
            longest = max(len(shares) for shares in series.values())
            axes.set_xlim(0.6, longest + 0.4)
            axes.set_xticks(range(1, longest + 1, 1 + longest // 9))
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
            axes.set_xlabel("depth of the draft token")
            axes.set_ylabel("accepted, of all drafts")

        label = f"Share of drafts accepted up to a depth, {load}. " + "; ".join(
            f"{verdict.arms[arm].name}: " + ", ".join(f"{s:.0%}" for s in shares[:4]) for arm, shares in series.items()
        )
        plots.append(Plot("acceptance", load, printable(label), _figure(165, label, paint)))
    return plots


def _agreement(verdict: Verdict, plan: Plan, cells: Sequence[Cell], order: dict[str, int]) -> list[Plot]:
    """How many outputs are still equal to the control's after so many tokens, a plot per load where some part."""
    plots = []
    for load in verdict.loads:
        found = [r for r in verdict.results if r.load == load and r.output is not None]
        series: dict[int, Agreement] = {order[r.arm]: r.output.agreement for r in found if r.output is not None}
        own = next((r.output.control for r in found if r.output is not None and r.output.control is not None), None)
        if not any(agreement.divergences for agreement in series.values()):
            continue
        if own is not None:
            series[0] = own
        unit = next(iter(series.values())).unit

        def paint(axes: Axes, series: Any = series, unit: str = unit) -> None:
            longest = max(max([*a.lengths, *a.divergences], default=1) for a in series.values())
            for arm, agreement in sorted(series.items()):
                ends = np.sort(agreement.divergences)
                shares = 1 - np.arange(0, len(ends) + 1) / agreement.compared
                axes.step(
                    [0, *ends, longest], [*shares, shares[-1]], where="post", color=color(arm), linestyle=_line(arm)
                )
            axes.set_xlim(0, longest)
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
            axes.set_xlabel(f"{unit} of output")
            axes.set_ylabel("outputs still equal")

        label = f"Share of outputs still equal to the control's, {load}. At the end: " + "; ".join(
            f"{verdict.arms[arm].name}{' with itself' if arm == 0 else ''}: {agreement.share:.0%}"
            for arm, agreement in series.items()
        )
        plots.append(Plot("agreement", load, printable(label), _figure(165, label, paint)))
    return plots
