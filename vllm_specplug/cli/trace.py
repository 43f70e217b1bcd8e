"""``specplug trace``: record what a server emits, replay it through any proposer, tune options on it."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specplug.trace import options as trace_options

from .common import CommandError, add_json_flag

if TYPE_CHECKING:
    from vllm_specplug.trace.files import Recorded, Trace
    from vllm_specplug.trace.replay import Tally
    from vllm_specplug.trace.step_times import StepTimes
    from vllm_specplug.trace.tune import Tuned

#: Draft tokens per step where the trace does not say how many its server had.
LIMIT = 8


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``trace``."""
    parser = commands.add_parser("trace", help="record what a server emits, replay it offline, tune options on it")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_record(actions)
    _add_info(actions)
    _add_replay(actions)
    _add_tune(actions)


def _add_record(actions: Any) -> None:
    default = trace_options.TraceOptions()
    parser = actions.add_parser("record", help="the setting that makes a server record; or whether one does")
    parser.add_argument("--dir", help="directory to record to, on the server's machine")
    parser.add_argument("--topk", type=int, default=default.topk, help="likeliest tokens per output token, 0 to 16")
    parser.add_argument("--text", action="store_true", help="also prompts and outputs as text")
    parser.add_argument("--max-bytes", type=int, default=default.max_bytes, help="of all files (default: %(default)s)")
    parser.add_argument("--files", type=int, default=default.files, help="how many (default: %(default)s)")
    parser.add_argument("--url", help="ask this running server whether it records, and where")
    add_json_flag(parser)
    parser.set_defaults(run=run_record)


def _add_info(actions: Any) -> None:
    parser = actions.add_parser("info", help="what a trace holds")
    _add_files(parser)
    add_json_flag(parser)
    parser.set_defaults(run=run_info)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="recorded files, or their directory")


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_files(parser)
    parser.add_argument(
        "--step-times",
        metavar="TIMES",
        help="ROWS:MS,... such as 1:31,2:31.5,8:40, or a server's state file (default: as recorded)",
    )
    parser.add_argument("--chains", action="store_true", help="no trees, as where the server cannot verify them")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N requests")
    add_json_flag(parser)


def _add_replay(actions: Any) -> None:
    parser = actions.add_parser("replay", help="what proposers would have drafted, and how much faster it would be")
    _add_common(parser)
    parser.add_argument(
        "--proposer", action="append", default=[], metavar="NAME[:K]", help="may be given again (default: all)"
    )
    parser.add_argument(
        "--limit", type=int, action="append", default=[], metavar="K", help="most draft tokens per step; again: others"
    )
    parser.add_argument("--option", action="append", default=[], metavar="SECTION.NAME=VALUE", help="of a proposer")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at once (default: 1)")
    parser.add_argument("--tasks", action="store_true", help="also a row per task")
    parser.set_defaults(run=run_replay)


def _add_tune(actions: Any) -> None:
    parser = actions.add_parser("tune", help="search options, and test the best on requests held out")
    _add_common(parser)
    parser.add_argument("--proposer", default="Auto", help="(default: Auto)")
    parser.add_argument("--limit", type=int, metavar="K", help="most draft tokens per step; not searched then")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="for the search (default: 60)")
    parser.add_argument("--held-out", type=float, default=0.3, metavar="SHARE", help="of the requests (default: 0.3)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the search (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON for --additional-config there")
    parser.set_defaults(run=run_tune)


# record


def run_record(args: argparse.Namespace) -> int:
    """Print the setting, or what a server says."""
    if args.url:
        return _report_server(args)
    if args.dir is None:
        raise CommandError("--dir is required: where the server is to record (or --url: ask a server)")
    from vllm_specplug import options

    values = {"dir": args.dir, "topk": args.topk, "text": args.text, "max_bytes": args.max_bytes, "files": args.files}
    path = f"{options.ROOT}.{trace_options.SECTION}"
    try:
        trace = options.parse(trace_options.TraceOptions, values, path)
        trace_options.check(trace)
    except options.OptionError as error:
        raise CommandError(str(error)) from error
    config = trace_options.as_config(trace)
    if args.json:
        print(json.dumps(config))
        return 0
    print("Start the server with this setting (merged into the one it has):")
    print(f"  --additional-config {shlex.quote(json.dumps(config))}")
    print(f"Then: specplug trace info {shlex.quote(args.dir)}")
    return 0


def _report_server(args: argparse.Namespace) -> int:
    from . import stats

    found = []
    for engine in stats.examine(args.url)["engines"]:
        counts = {name: value for name, value in engine.get("stat", {}).items() if name.startswith("trace_")}
        found.append({"labels": engine["labels"], "dirs": sorted(engine.get("trace_info", {})), **counts})
    if args.json:
        print(json.dumps({"url": args.url, "engines": found}, indent=2))
    for engine in found if not args.json else ():
        name = f"engine {engine['labels'].get('engine', '0')}"
        if not engine["dirs"]:
            print(f"{name} does not record: start the server with what `specplug trace record --dir DIR` prints")
            continue
        print(
            f"{name} records to {', '.join(engine['dirs'])}: {engine.get('trace_requests', 0):,.0f} requests, "
            f"{engine.get('trace_bytes', 0):,.0f} bytes; {engine.get('trace_requests_left_out', 0):,.0f} left out, "
            f"{engine.get('trace_failures', 0):,.0f} failures to write"
        )
    return 0 if all(engine["dirs"] for engine in found) else 1


# info


def run_info(args: argparse.Namespace) -> int:
    """Print what a trace holds."""
    from vllm_specplug.trace import summary

    trace = _read(args.files, topk=True)
    document = summary.summarise(trace)
    if args.json:
        print(json.dumps(document, indent=2))
        return 0
    console = _console()
    for line in summary.lines(document):
        console.print(line)
    table = _table("", *document["tasks"][0])
    for row in document["tasks"]:
        table.add_row(*("-" if v is None else f"{v:,.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    return 0


# replay


def run_replay(args: argparse.Namespace) -> int:
    """Replay through each proposer with each budget, and print a table."""
    from vllm_specplug import registry
    from vllm_specplug.options import OptionError
    from vllm_specplug.trace import replay
    from vllm_specplug.trace.files import TraceError

    _at_least("--concurrency", args.concurrency, 1)
    trace = _read(args.files, topk=True)
    requests = _first(trace, args.first)
    times = _step_times(args, requests)
    notes = [f"{path}: its end is missing or damaged; read as far as it goes" for path in trace.cut]
    if isinstance(times, str):
        notes.append(f"no speed-ups: {times}; --step-times gives them")
        times = None
    elif args.concurrency > times.most_requests:
        notes.append(f"steps of more than {times.most_requests} requests were not recorded: their times are a guess")
    arms = _arms(args, trace)
    settings: dict[str, Any] = {"times": times, "width": args.concurrency}
    try:
        options = replay.parse_settings(args.option)
        plain = replay.Replay(None, 0, **settings).run(requests)
        rows = _rows("none", None, requests, plain, plain, times is not None)
        for name, limit in arms:
            try:
                proposer, _ = replay.build(name, options)
                started = time.perf_counter()
                tallies = replay.Replay(proposer, limit, trees=not args.chains, **settings).run(requests)
            except (OptionError, TraceError) as error:
                if args.proposer or registry.find(name).origin == registry.OWN:
                    raise
                # Another package's, which nobody asked for.
                notes.append(f"{name} is left out: {error}")
                continue
            seconds = time.perf_counter() - started
            rows += _rows(name, limit, requests, tallies, plain, times is not None, seconds)
            note = _topk_note(name, proposer, trace)
            notes += [note] if note and note not in notes else []
            proposer.close()
    except (OptionError, TraceError) as error:
        raise CommandError(str(error)) from error
    source = None if times is None else times.source
    document = {"requests": len(requests), "step_times": source, "concurrency": args.concurrency, "rows": rows}
    if args.json:
        print(json.dumps({**document, "notes": notes}, indent=2))
    else:
        _print_replay(document, notes, args.tasks)
    return 0


def _arms(args: argparse.Namespace, trace: Trace) -> list[tuple[str, int]]:
    """Proposers and draft tokens per step to replay."""
    from vllm_specplug import registry
    from vllm_specplug.options import OptionError

    limits = [_allowed_limit(k) for k in args.limit] or [_recorded_limit(trace)]
    arms = []
    for text in args.proposer:
        name, colon, own = text.partition(":")
        try:
            entry = registry.find(name)
        except OptionError as error:
            raise CommandError(str(error)) from error
        if colon and not own.isdecimal():
            raise CommandError(f"--proposer = {text!r} is not allowed: expected NAME or NAME:K, such as Auto:16.")
        arms += [(entry.name, k) for k in ([_allowed_limit(int(own))] if colon else limits)]
    if not arms:
        # Alone, what learns from the target's top-k alone says nothing where there is none.
        # SparseVerify drafts as AdaptiveLength does, and what it would write instead is not in a trace.
        unknown = {"SparseVerify"} if trace.topk else {"SparseVerify", "TokenRecycling"}
        names = [n for n in registry.proposers() if n not in unknown]
        arms = [(name, k) for name in names for k in limits]
    return arms


def _topk_note(name: str, proposer: Any, trace: Trace) -> str | None:
    if not proposer.wants_topk or trace.topk >= proposer.topk:
        return None
    there = f"only {trace.topk} of them" if trace.topk else "none"
    return (
        f"{name} learns from the target's {proposer.topk} likeliest tokens, and the trace has {there}: on a server it "
        f"drafts more than here. Record with specplug.trace.topk = {proposer.topk}."
    )


def _rows(
    name: str,
    limit: int | None,
    requests: Sequence[Recorded],
    tallies: Sequence[Tally],
    plain: Sequence[Tally],
    timed: bool,
    seconds: float | None = None,
) -> list[dict[str, Any]]:
    """A row for each task and one for all."""
    from vllm_specplug.trace import replay

    tasks = [*dict.fromkeys(r.task for r in requests), "total"]
    rows = []
    for task in tasks:
        index = [i for i, r in enumerate(requests) if task in (r.task, "total")]
        whole = replay.total(tallies[i] for i in index)
        row: dict[str, Any] = {"proposer": name, "limit": limit, "task": task, "requests": whole.requests}
        row |= {key: value for key, (value, _) in whole.metrics().items()}
        row |= {"paused": whole.paused / max(whole.steps, 1), "tokens_per_s": None, "speedup": None}
        if timed and whole.seconds > 0.0:
            value, low, high = replay.speedup([tallies[i] for i in index], [plain[i] for i in index])
            row |= {"tokens_per_s": whole.decoded / whole.seconds, "speedup": value, "low": low, "high": high}
        if task == "total" and seconds:
            row["replayed_tokens_per_s"] = whole.tokens / seconds
        rows.append(row)
    return rows


def _print_replay(document: dict[str, Any], notes: Sequence[str], tasks: bool) -> None:
    console = _console()
    times = document["step_times"]
    console.print(
        f"{document['requests']} requests, {document['concurrency']} at once; step times "
        + ("not known" if times is None else times)
    )
    table = _table(
        "proposer",
        "K",
        "MAT",
        "drafts/step",
        "accepted",
        "us/step",
        "tokens/s",
        "speed-up",
        "95% interval",
    )
    for row in document["rows"]:
        if row["task"] != "total" and not tasks:
            continue
        name = row["proposer"] if row["task"] == "total" else f"  {row['task']}"
        speed = ["-", "-", "-"]
        if row["speedup"] is not None:
            speed = [f"{row['tokens_per_s']:.1f}", f"{row['speedup']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"]
        table.add_row(
            name,
            "-" if row["limit"] is None else str(row["limit"]),
            f"{row['mat']:.2f}",
            f"{row['drafts']:.2f}",
            f"{row['accepted']:.1%}" if row["drafts"] else "-",
            f"{row['propose'] + row['observe']:.0f}",
            *speed,
        )
    console.print(table)
    for note in notes:
        console.print(f"note: {note}")


# tune


def run_tune(args: argparse.Namespace) -> int:
    """Search, test and print the setting."""
    from vllm_specplug import registry
    from vllm_specplug.options import OptionError
    from vllm_specplug.trace import tune
    from vllm_specplug.trace.files import TraceError

    if not 0.0 < args.held_out < 1.0:
        raise CommandError(f"--held-out = {args.held_out:g} is not allowed: expected a number between 0 and 1.")
    if not 0.0 < args.budget <= 86400.0:
        raise CommandError(f"--budget = {args.budget:g} is not allowed: expected up to 86400 seconds.")
    try:
        registry.find(args.proposer)
    except OptionError as error:
        raise CommandError(str(error)) from error
    if args.output is not None and not args.output.parent.is_dir():
        raise CommandError(f"--output: there is no directory {args.output.parent}")
    limit = None if args.limit is None else _allowed_limit(args.limit)
    trace = _read(args.files, topk=True)
    requests = _first(trace, args.first)
    times = _step_times(args, requests)
    if isinstance(times, str):
        raise CommandError(f"tune needs step times, and {times}; give them with --step-times")
    try:
        found = tune.tune(
            args.proposer,
            requests,
            times,
            limit or _recorded_limit(trace),
            limits=tune.LIMITS if limit is None else (limit,),
            held_out=args.held_out,
            budget_s=args.budget,
            trees=not args.chains,
            seed=args.seed,
            progress=_show_progress if sys.stderr.isatty() else lambda evaluations, gain: None,
        )
    except (OptionError, TraceError) as error:
        raise CommandError(str(error)) from error
    if args.output is not None:
        try:
            args.output.write_text(json.dumps(found.additional_config()) + "\n", encoding="utf-8")
        except OSError as error:
            raise CommandError(f"--output: {args.output} cannot be written ({error.strerror})") from error
    if args.json:
        print(json.dumps(_tuned(found), indent=2))
    else:
        _print_tuned(found)
    return 0


def _show_progress(evaluations: int, gain: float) -> None:
    print(f"\r{evaluations} settings tried, best {gain - 1.0:+.1%}", end="", file=sys.stderr, flush=True)


def _tuned(found: Tuned) -> dict[str, Any]:
    gain, low, high = found.gain
    return {
        "proposer": found.proposer,
        "evaluations": found.evaluations,
        "requests": {"training": found.trained, "held_out": found.held_out},
        "best": {"spec_tokens": found.best.limit, **found.best.options},
        "default": {"spec_tokens": found.default.limit, **found.default.options},
        "training_gain": found.train_gain,
        "held_out_gain": {"value": gain, "low": low, "high": high},
        "held_out_speedup": {"default": found.default_speedup, "best": found.best_speedup},
        "adopted": found.adopted,
        "spec_tokens": found.recommended.limit,
        "additional_config": found.additional_config(),
    }


def _print_tuned(found: Tuned) -> None:
    from vllm_specplug.trace import tune

    gain, low, high = (100.0 * (x - 1.0) for x in found.gain)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(f"{found.evaluations} settings tried on {found.trained} requests, tested on {found.held_out} held out.")
    best = ", ".join(f"{k} = {json.dumps(v)}" for k, v in found.best.options.items()) or "default options"
    print(f"Best: --spec-tokens {found.best.limit}, {best}")
    print(
        f"Held out: speed-up {found.best_speedup:.2f}, with the defaults {found.default_speedup:.2f}: "
        f"{gain:+.1f}% (95% interval {low:+.1f} to {high:+.1f}%)"
    )
    if found.held_out < tune.FEWEST_TESTED:
        print(f"Fewer than {tune.FEWEST_TESTED} requests held out tell nothing: keep the defaults.")
    elif not found.adopted:
        print("That is no difference beyond chance: keep the defaults.")
    config = found.additional_config()
    flags = f"--spec-model vllm_specplug.{found.proposer} --spec-tokens {found.recommended.limit}"
    if any(config.values()):
        flags += f" --additional-config {shlex.quote(json.dumps(config))}"
    print(f"  {flags}")


# Shared


def _read(paths: Sequence[Path], topk: bool) -> Trace:
    from vllm_specplug.trace import files

    try:
        return files.read(paths, topk)
    except files.TraceError as error:
        raise CommandError(str(error)) from error


def _first(trace: Trace, count: int | None) -> list[Recorded]:
    if count is None:
        return trace.requests
    _at_least("--first", count, 1)
    return trace.requests[:count]


def _step_times(args: argparse.Namespace, requests: Sequence[Recorded]) -> StepTimes | str:
    """What steps take, or why that is not known."""
    from vllm_specplug.trace import step_times
    from vllm_specplug.trace.files import TraceError

    try:
        if args.step_times is not None:
            return step_times.parse(args.step_times)
    except TraceError as error:
        raise CommandError(f"--step-times: {error}") from error
    try:
        return step_times.learn(requests)
    except TraceError as error:
        return str(error)


def _recorded_limit(trace: Trace) -> int:
    limit = trace.requests[0].server.get("draft_tokens")
    return limit if isinstance(limit, int) and 1 <= limit <= 128 else LIMIT


def _allowed_limit(value: int) -> int:
    if not 1 <= value <= 128:
        raise CommandError(f"--limit = {value} is not allowed: expected a whole number from 1 to 128.")
    return value


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise CommandError(f"{flag} = {value} is not allowed: expected a whole number of at least {least}.")


def _console() -> Any:
    from rich.console import Console

    # Into a file or a pipe nothing needs to be folded to a terminal's width.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    return Console(width=width, highlight=False, markup=False)


def _table(first: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
