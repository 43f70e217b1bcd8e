"""A comparison's reports: terminal, JSON, CSV, and the HTML page, the last also in a real browser."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import json
import os
import re
from html.parser import HTMLParser

import ab_runs
import browser
import pytest
from ab_runs import Behaviour

from vllm_specplug.ab import html, plots, summary
from vllm_specplug.ab.results import Load
from vllm_specplug.ab.verdict import judge

HOSTILE = "</p><script>alert(1)</script><img src=https://example.com/x> \u202eback\u202c \x1b[31mred"
ARMS = {
    "none": Behaviour(),
    "ngram": Behaviour(1.3, mat=1.4),
    "auto": Behaviour(1.7, mat=1.8),
    "wrong": Behaviour(change=ab_runs.one_wrong),
}


@pytest.fixture(scope="module")
def run():
    """A run with every kind of finding, and hostile text wherever text comes from outside."""
    plan, cells = ab_runs.make(ARMS, loads=(Load(1), Load(8)), rounding=0.004)
    plan = dataclasses.replace(
        plan,
        tasks=[f"{HOSTILE}$x_1$" if t == "maths" else t for t in plan.tasks],
        failures={"suffix": f"Error: {HOSTILE}\nsecond line"},
        facts={**plan.facts, "notes": [HOSTILE], "machine": {"cpu": HOSTILE}},
    )
    cells = [
        dataclasses.replace(
            c,
            replies=[
                dataclasses.replace(
                    r,
                    task=plan.tasks[ab_runs.TASKS.index(r.task)],
                    text=f"{r.text} {HOSTILE} of {c.arm}" if r.index == 1 else r.text,
                )
                for r in c.replies
            ],
        )
        for c in cells
    ]
    return plan, cells


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra ab)")
    path = tmp_path_factory.mktemp("report") / "report.html"
    html.write(judge(*run), *run, path)
    return path


@pytest.fixture(scope="module")
def drawn(run):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra ab)")
    return plots.draw(judge(*run), *run)


def printed(run, width: int) -> str:
    from rich.console import Console

    text = io.StringIO()
    summary.print_summary(judge(*run), Console(file=text, width=width, force_terminal=False))
    return text.getvalue()


# Terminal, JSON, CSV


def test_the_terminal_gets_every_sentence_and_a_table_per_load(run):
    text = " ".join(printed(run, 80).split())
    for result in judge(*run).results:
        if not result.control:
            assert f"{result.arm}, {result.load}: {result.sentence}" in text
    assert text.count("TTFT TPOT E2E") == 2
    assert "suffix failed: Error: " in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminals_tables_are_not_cut(run, width):
    lines = printed(run, width).splitlines()
    assert max(map(len, lines)) <= width
    assert all("…" not in line for line in lines)


def test_nothing_printed_steers_the_terminal(run):
    text = printed(run, 80)
    assert "\x1b" not in text and "\u202e" not in text
    assert "\\x1b[31mred" in text.replace("\n", "")


def test_json_holds_the_whole_verdict(run, tmp_path):
    found = judge(*run)
    summary.write_json(found, tmp_path / "verdict.json")
    assert json.loads((tmp_path / "verdict.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(found)))


def test_csv_is_tidy(run, tmp_path):
    found = judge(*run)
    summary.write_csv(found, tmp_path / "verdict.csv")
    rows = list(csv.DictReader((tmp_path / "verdict.csv").open(newline="")))
    assert tuple(rows[0]) == summary.COLUMNS
    keys = [(r["arm"], r["load"], r["task"], r["metric"]) for r in rows]
    assert len(set(keys)) == len(keys)
    value = {key: row for key, row in zip(keys, rows, strict=True)}
    speed = found.of("auto", "concurrency 1").paired.speed
    row = value["auto", "concurrency 1", "", "speed_ratio"]
    assert [float(row[k]) for k in ("value", "low", "high")] == pytest.approx(
        [speed.value, speed.low, speed.high], rel=1e-5
    )
    assert value["auto", "concurrency 1", "", "ttft_p50"]["unit"] == "s"
    assert float(value["none", "concurrency 8", "chat", "requests"]["value"]) == 16


def test_csv_holds_no_formula(run, tmp_path):
    plan, cells = run
    plan = dataclasses.replace(plan, arms=[dataclasses.replace(plan.arms[0], name="=1+1")])
    cells = [dataclasses.replace(c, arm="=1+1") for c in cells if c.arm == "none"]
    summary.write_csv(judge(plan, cells), tmp_path / "verdict.csv")
    assert {row["arm"] for row in csv.DictReader((tmp_path / "verdict.csv").open(newline=""))} == {"'=1+1"}


@pytest.mark.parametrize("kind", ["json", "csv", "html"])
def test_a_full_disk_leaves_what_was_there(run, tmp_path, monkeypatch, kind):
    path = tmp_path / f"report.{kind}"
    path.write_text("before")

    def full(self, *args, **kwargs):
        with open(self, "w") as file:
            file.write("half of ")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_text", full)
    monkeypatch.setattr(plots, "available", lambda: False)
    found = judge(*run)
    with pytest.raises(OSError, match="No space left"):
        {
            "json": lambda: summary.write_json(found, path),
            "csv": lambda: summary.write_csv(found, path),
            "html": lambda: html.write(found, *run, path),
        }[kind]()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# HTML


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_everything_without_matplotlib(run, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    html.write(judge(*run), *run, tmp_path / "report.html")
    found = Page((tmp_path / "report.html").read_text())
    assert "No plots: matplotlib is not installed" in found.text
    assert not [tag for tag, _ in found.tags if tag in ("svg", "script", "img", "link", "iframe")]
    for result in judge(*run).results:
        if not result.control:
            assert result.sentence[1:] in found.text
    for title in ("Rates and latencies", "Against the control", "Drafting", "Drafts by source", "Outputs", "By task"):
        assert title in found.text


def test_what_models_say_is_shown_and_not_obeyed(run, page):
    text = page.read_text()
    found = Page(text)
    assert not [tag for tag, _ in found.tags if tag in ("script", "img", "iframe", "object", "link", "foreignobject")]
    assert "<script>alert(1)</script>" in found.text  # as text
    assert "\u202e" not in text and "\x1b" not in text
    assert "\\u202eback" in found.text
    assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]


def test_the_page_may_load_nothing(page):
    found = Page(page.read_text())
    policies = [a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    links = [v for _, a in found.tags for k, v in a.items() if k in ("src", "href", "xlink:href", "action", "data")]
    assert links and all(link.startswith("#") for link in links)
    assert all("url(" not in (a.get("style") or "") or "url(#" in a["style"] for _, a in found.tags)
    assert "@import" not in page.read_text() and "@font-face" not in page.read_text()


def test_every_id_is_one_and_every_reference_has_its_id(page):
    text = page.read_text()
    ids = [a["id"] for _, a in Page(text).tags if "id" in a]
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_the_plots_take_the_pages_colours_and_have_names(drawn, page):
    text = page.read_text()
    style = text[: text.index("</style>")]
    assert {p.section for p in drawn} == {"speed", "throughput", "latency", "acceptance", "agreement"}
    assert len(drawn) == 2 + 1 + 6 + 2 + 2
    for plot in drawn:
        used = set(re.findall(r"var\((--[\w-]+)\)", plot.svg))
        assert used and all(f"{name}:" in style for name in used)
        # Nothing of matplotlib's own colours is left: in the dark it would be black on black.
        assert not re.findall(
            r"#[0-9a-fA-F]{6}\b", re.sub(r"url\(#[^)]*\)|href=\"#[^\"]*\"|id=\"[^\"]*\"", "", plot.svg)
        )
        assert plot.label and 'role="img"' in plot.svg and "aria-label=" in plot.svg
        assert "\x1b" not in plot.svg and "<script" not in plot.svg


def test_a_report_of_nothing_is_still_a_report(run, tmp_path):
    plan, _ = run
    html.write(judge(plan, []), plan, [], tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert "No results." in text and "suffix failed" in text


@pytest.mark.parametrize("loads", [(Load(rate=0.5), Load(rate=2.0)), (Load(4),), (Load(1), Load(rate=1.0))])
def test_other_loads_have_their_plots(loads):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra ab)")
    plan, cells = ab_runs.make({"none": Behaviour(), "auto": Behaviour(1.5)}, loads=loads, requests=9)
    drawn = [p for p in plots.draw(judge(plan, cells), plan, cells) if p.section == "throughput"]
    assert len(drawn) == len({bool(load.concurrency) for load in loads})


# In a browser


@pytest.fixture(scope="module")
def chromium(page, tmp_path_factory):
    if browser.find() is None:
        pytest.skip("no Chromium found (Debian: apt install chromium)")
    with browser.Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def pixels(png: bytes):
    """``int[height, width, 3]``."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_in_a_browser(chromium, page, drawn, width, dark):
    import numpy as np

    chromium.open(page, width, dark=dark)
    assert chromium.requests == [page.resolve().as_uri()]
    assert chromium.problems == []
    # No wider than the window; tables scroll in their own boxes.
    assert chromium.evaluate("document.documentElement.scrollWidth") == width
    whole = pixels(chromium.screenshot())
    height = chromium.evaluate("document.documentElement.scrollHeight")
    assert whole.shape == (height, width, 3) and height > 1500
    background = whole[2, 2]
    assert (background.mean() < 60) == dark
    # Text can be read: against the background, by the contrast that WCAG asks of small text.
    ink, page_color = (
        chromium.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )
    assert contrast(ink, page_color) > 7
    boxes = chromium.evaluate(
        """[...document.querySelectorAll('figure svg')].map(e => {
             const b = e.getBoundingClientRect();
             return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height}; })"""
    )
    assert len(boxes) == len(drawn)
    for box in boxes:
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > 250 and box["height"] > 60
        left, top = round(box["x"]), round(box["y"])
        part = whole[top : top + round(box["height"]), left : left + round(box["width"])]
        other = np.abs(part - background).sum(axis=2) > 60
        colourful = part.max(axis=2) - part.min(axis=2) > 40
        # Neither blank nor filled, and with the colours of arms.
        assert 0.01 < other.mean() < 0.6
        assert colourful.sum() > 60


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two CSS ``rgb(...)`` colours (WCAG 2.2)."""

    def luminance(color: str) -> float:
        parts = [int(x) / 255 for x in re.findall(r"\d+", color)[:3]]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_can_be_read(chromium, page, dark):
    """Every colour of text has the contrast to what is behind it that WCAG asks (4.5)."""
    chromium.open(page, 1280, dark=dark)
    found = chromium.evaluate(
        """[...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some(
               n => n.nodeType == 3 && n.data.trim()) && e.tagName != 'STYLE').map(e => {
             let back = e; const clear = 'rgba(0, 0, 0, 0)';
             while (back && getComputedStyle(back).backgroundColor == clear) back = back.parentElement;
             const style = getComputedStyle(e);
             return [e.closest('svg') ? style.fill : style.color,
                     getComputedStyle(back || document.body).backgroundColor, e.textContent.trim().slice(0, 40)]; })"""
    )
    assert len(found) > 200
    poor = {(a, b): text for a, b, text in found if contrast(a, b) < 4.5}
    assert poor == {}


def test_the_page_prints_in_light_colours(chromium, page):
    chromium.open(page, 794, dark=True, media="print")  # A4
    assert chromium.evaluate("document.documentElement.scrollWidth") == 794
    assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    pdf = chromium.pdf()
    assert pdf.startswith(b"%PDF") and 20_000 < len(pdf) < 5_000_000
