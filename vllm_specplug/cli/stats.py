"""``specplug stats``: what speculation does on a running server, read from its ``/metrics``.

Statistics of single requests are no metrics (their number is not bounded): ``--requests`` reads them from the server's
own snapshots, whose place ``/metrics`` names, so it runs on the server's machine, as the user that runs the server.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import math
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_specplug.host import metrics

from .common import CommandError, add_json_flag, describe_error

TIMEOUT_S = 10.0
#: Labels that tell samples of one family and engine apart; the others name the engine.
_DETAILS = frozenset({"source", "depth", "reason", "phase", "name", "path", "arm"})
_COUNTS = ("drafted", "verified", "accepted")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``stats``."""
    parser = commands.add_parser("stats", help="what speculation does on a running server")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address (default: %(default)s)")
    parser.add_argument("--requests", action="store_true", help="also the last requests; on the server's machine only")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="print again every so many seconds")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the statistics, once or until interrupted."""
    if args.watch is not None and not 0.1 <= args.watch <= 86400:
        raise CommandError(f"--watch = {args.watch:g} is not allowed: expected 0.1 to 86400 seconds.")
    if not re.match(r"https?://[^/\s]+", args.url):
        raise CommandError(f"--url = {args.url!r} is not allowed: expected http://HOST:PORT.")
    while True:
        document = examine(args.url, args.requests)
        if args.json:
            print(json.dumps(document, indent=None if args.watch else 2), flush=True)
        else:
            _print(document, clear=args.watch is not None)
        if args.watch is None:
            return 0
        time.sleep(args.watch)


def examine(url: str, requests: bool = False) -> dict[str, Any]:
    """The statistics as one document: an entry of ``engines`` for each engine of the server, and with ``requests`` the
    last requests of all of them.

    Raises:
        CommandError: no server answers there, it is no vLLM server, the plugin is not active in it, or its snapshots
            cannot be read from here.
    """
    address = url.rstrip("/").removesuffix("/metrics") + "/metrics"
    engines = _engines(_fetch(address), address)
    document: dict[str, Any] = {"url": url, "engines": engines}
    if requests:
        document["requests"] = _requests(sorted({engine["snapshots"] for engine in engines}))
    return document


def _fetch(address: str) -> str:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        raise CommandError(f"{address} answers {error.code}: is this a vLLM server's address?") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        text = describe_error(reason) if isinstance(reason, BaseException) else str(reason)
        raise CommandError(f"no server at {address} ({text}); name its address with --url") from error


def _engines(text: str, address: str) -> list[dict[str, Any]]:
    """The plugin's samples, by engine."""
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        raise CommandError("stats needs the package prometheus_client, which vLLM installs") from None
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except Exception as error:  # the parser raises whatever it stumbles over
        raise CommandError(f"{address} is not in Prometheus's format: is this a vLLM server?") from error
    ours = [sample for sample in samples if sample.name.startswith(metrics.PREFIX)]
    if not ours and not any(sample.name.startswith("vllm:") for sample in samples):
        raise CommandError(f"{address} has no metrics of vLLM's: is this a vLLM server?")
    by_engine: dict[tuple[tuple[str, str], ...], list[Any]] = {}
    for sample in ours:
        labels = tuple(sorted(item for item in sample.labels.items() if item[0] not in _DETAILS))
        by_engine.setdefault(labels, []).append(sample)
    if not by_engine:
        raise CommandError(
            f"vllm_specplug is not active in the server at {address}: start it with --spec-model vllm_specplug.Auto "
            "--spec-tokens 16"
        )
    return [_engine(dict(labels), found) for labels, found in sorted(by_engine.items())]


def _engine(labels: dict[str, str], samples: Iterable[Any]) -> dict[str, Any]:
    """One engine's samples as a document; figures without further labels under ``totals``, those of an arm under
    ``arms``, by name."""
    engine: dict[str, Any] = {"labels": labels, "snapshots": "", "totals": {}, "sources": {}}
    for sample in samples:
        name = sample.name.removeprefix(metrics.PREFIX).removesuffix("_total")
        details = {key: value for key, value in sample.labels.items() if key in _DETAILS}
        value = _number(sample.value)
        if name == "snapshot_info":
            engine["snapshots"] = details.get("path", "")
        elif "source" in details:
            depths = engine["sources"].setdefault(details["source"], {})
            counts = depths.setdefault(details.get("depth", ""), dict.fromkeys(_COUNTS, 0))
            counts[name.removesuffix("_tokens")] = value
        elif "arm" in details:
            arm = engine.setdefault("arms", {}).setdefault(details["arm"], {})
            arm[name.removeprefix("arm_")] = value
        elif details:
            engine.setdefault(name, {})[",".join(details.values())] = value
        else:
            engine["totals"][name] = value
    for depths in engine["sources"].values():
        for depth in sorted(depths, key=_depth_key):
            depths[depth] = depths.pop(depth)
    return engine


def _number(value: float) -> float | int | None:
    """As JSON has it: whole numbers without a fraction, null for what is no number."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else value


def _depth_key(depth: str) -> int:
    return int(depth.rstrip("+") or 0)


def _requests(directories: Iterable[str]) -> list[dict[str, Any]]:
    """The last requests of all snapshots, in each engine's order of ending, live ones last."""
    found: list[dict[str, Any]] = []
    for directory in directories:
        if not os.path.isdir(directory) or not os.access(directory, os.R_OK | os.X_OK):
            raise CommandError(
                f"--requests: the server's snapshots in {directory or 'its memory'} cannot be read from here; run it "
                "on the server's machine (and in its container), as the user that runs the server"
            )
        for published in metrics.read_directory(Path(directory)):
            engine = published.labels.get("engine", "")
            found += [{"engine": engine, **dataclasses.asdict(r)} for r in published.snapshot.requests]
    return found


def _print(document: dict[str, Any], clear: bool) -> None:
    from rich.console import Console

    # Into a file or a pipe nothing needs to be folded to a terminal's width.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    console = Console(width=width, highlight=False, markup=False)
    if clear:
        console.clear()
    for engine in document["engines"]:
        names = ", ".join(f"{key} {value}" for key, value in engine["labels"].items())
        written = engine["totals"].get("snapshot_timestamp_seconds")
        when = time.strftime("%H:%M:%S", time.localtime(written)) if written else "unknown"
        console.print(f"{document['url']}: {names} (as of {when})")
        console.print(_totals_table(engine))
        if engine["sources"]:
            console.print(_acceptance_table(engine["sources"]))
        if "arms" in engine:
            console.print(_arms_table(engine["arms"]))
    if "requests" in document:
        console.print(_requests_table(document["requests"]))


def _table(title: str, first: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _totals_table(engine: dict[str, Any]) -> Any:
    totals = engine["totals"]
    drafts = _sum(counts for depths in engine["sources"].values() for counts in depths.values())
    rows = [
        *(("draft tokens " + name, _count(drafts[name])) for name in _COUNTS),
        ("accepted of verified", _share(drafts["accepted"], drafts["verified"])),
        *((name.replace("_", " "), _count(totals.get(name))) for name in ("emitted_tokens", "steps", "paused_steps")),
        ("live requests", _count(totals.get("live_requests"))),
        ("budget, draft tokens kept", _count(totals.get("budget_nodes"))),
        ("drafting paused", {None: None, 0: "no"}.get(totals.get("paused"), "yes")),
        ("step predicted", _milliseconds(totals.get("step_time_predicted_seconds"))),
        ("step measured", _milliseconds(totals.get("step_time_measured_seconds"))),
        ("median error of prediction", _percent(totals.get("step_time_error_ratio"))),
        ("expected gain", None if totals.get("gain_ratio") is None else f"{totals['gain_ratio']:.2f}x"),
        ("drafting's own time", _percent(totals.get("overhead_ratio"))),
        *(
            (name.replace("_", " "), _mebibytes(totals.get(name)))
            for name in ("store_bytes", "table_bytes", "context_bytes")
        ),
        *(
            (f"requests without drafts, {reason}", _count(count))
            for reason, count in engine.get("requests_without_drafts", {}).items()
            if count
        ),
        *(
            (f"requests with chains only, {reason}", _count(count))
            for reason, count in engine.get("requests_with_chains_only", {}).items()
            if count
        ),
        ("errors", _count(totals.get("errors"))),
    ]
    table = _table("Since the start", "", "")
    table.show_header = False
    for name, text in rows:
        if text is not None:
            table.add_row(name, text)
    return table


def _acceptance_table(sources: dict[str, dict[str, dict[str, int]]]) -> Any:
    """Accepted of verified: a row per source, a column per depth."""
    depths = sorted({depth for source in sources.values() for depth in source}, key=_depth_key)
    shown, deep = depths[:5], depths[5:]  # as many as fit 80 columns
    table = _table("Accepted of verified, by depth", "source", "verified", "all", *shown, *(["deeper"] if deep else []))
    rows = dict(sources)
    if len(sources) > 1:
        rows["all"] = {depth: _sum(s[depth] for s in sources.values() if depth in s) for depth in depths}
    for name, by_depth in rows.items():
        whole = _sum(by_depth.values())
        cells = [by_depth.get(depth) for depth in shown]
        if deep:
            cells.append(_sum(by_depth[depth] for depth in deep if depth in by_depth))
        shares = ["" if cell is None else _share(cell["accepted"], cell["verified"]) or "" for cell in (whole, *cells)]
        table.add_row(name, _count(whole["verified"]), *shares)
    return table


def _arms_table(arms: dict[str, dict[str, float]]) -> Any:
    """A row per arm of the server. Arms share steps: a step is as long for all requests in it, whoever drafted."""
    columns = ("requests", "tokens", "per step", "ms/token", "verified", "accepted of it")
    table = _table("Arms", "arm", *columns)
    for name, arm in arms.items():
        steps, tokens = arm.get("decode_steps", 0), arm.get("decode_tokens", 0)
        verified = arm.get("verified_tokens", 0)
        table.add_row(
            name,
            _count(arm.get("requests", 0)),
            _count(arm.get("emitted_tokens", 0)),
            f"{tokens / steps:.2f}" if steps else "",
            f"{1000 * arm.get('decode_seconds', 0) / tokens:.2f}" if tokens else "",
            _count(verified),
            _share(arm.get("accepted_tokens", 0), verified) or "",
        )
    return table


def _requests_table(requests: list[dict[str, Any]]) -> Any:
    table = _table("Last requests", "request", "state", "tokens", "steps", *_COUNTS, "of verified")
    for request in requests:
        table.add_row(
            request["request_id"],
            "live" if request["live"] else "ended",
            *(_count(request[name]) for name in ("emitted", "steps", *_COUNTS)),
            _share(request["accepted"], request["verified"]) or "",
        )
    return table


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total = dict.fromkeys(_COUNTS, 0)
    for each in counts:
        for name in _COUNTS:
            total[name] += each[name]
    return total


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _share(part: float, whole: float) -> str | None:
    return f"{part / whole:.1%}" if whole else None


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _milliseconds(value: float | None) -> str | None:
    return f"{1000 * value:.2f} ms" if value else None  # 0: none yet


def _mebibytes(value: float | None) -> str | None:
    return None if value is None else f"{value / 2**20:.1f} MiB"
