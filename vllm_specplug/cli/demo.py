"""``specplug demo``: the real engine with a small model, without speculation, with vLLM's ngram, and with Auto.

Speed is measured in bfloat16, as models are served. Equality of outputs is measured in float32: in bfloat16 a step
that verifies six rows takes other matrix kernels than a step of one row, and vLLM's own ngram changes outputs too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_specplug.ab import arms, environment

from . import model
from .common import CommandError

#: An arm's engine with the embedded model, bfloat16 weights, 1 GiB of KV cache and everything it imports.
ARM_GIB = 2.5
SPEED, EQUALITY = "bfloat16", "float32"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``demo``."""
    parser = commands.add_parser("demo", help="measure speculation on this machine with a small model")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures here")
    parser.add_argument("--model", type=Path, metavar="DIR", help="exported model; made there if it is missing")
    parser.add_argument("--max-tokens", type=int, default=96, metavar="N", help="per prompt (default: %(default)s)")
    parser.add_argument("--spec-tokens", type=int, default=8, metavar="K", help="Auto's (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one prompt of each task only: a first look, no figures")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 if every arm ran, 1 otherwise."""
    if not environment.has_module("vllm"):
        raise CommandError("demo needs vLLM; on a machine without a GPU run: pip install 'vllm-specplug[cpu]'")
    if not 2 <= args.max_tokens <= 1024:
        raise CommandError(f"--max-tokens = {args.max_tokens} is not allowed: expected a whole number from 2 to 1024.")
    if not 1 <= args.spec_tokens <= 128:
        raise CommandError(f"--spec-tokens = {args.spec_tokens} is not allowed: expected a whole number from 1 to 128.")
    if args.json is not None and not args.json.parent.is_dir():
        raise CommandError(f"--json {args.json}: the directory {args.json.parent} does not exist.")
    from rich.console import Console

    console = Console(highlight=False)
    directory = args.model or model.default_dir()
    if not model.is_exported(directory):
        with console.status("Exporting the embedded model (about 20 s)"):
            model.export(directory)

    prompts = load_workload(args.quick)
    log_dir = Path(tempfile.mkdtemp(prefix="specplug-demo-"))
    try:
        runs = {dtype: _measure(args, str(directory), dtype, prompts, log_dir, console) for dtype in (SPEED, EQUALITY)}
    except KeyboardInterrupt:
        shutil.rmtree(log_dir, ignore_errors=True)
        raise
    document = _document(args, prompts, runs)
    console.print(_table(document))
    for line in _notes(document):
        console.print(line, markup=False)
    if args.json is not None:
        args.json.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"Written as JSON to {args.json}.", markup=False)
    failed = any(arm["failure"] for arm in document["arms"])
    if failed:
        console.print(f"What the engines printed is kept in {log_dir}.", markup=False)
    else:
        shutil.rmtree(log_dir, ignore_errors=True)
    return int(failed)


def load_workload(quick: bool = False) -> list[dict[str, str]]:
    """The bundled prompts: ``id``, ``task``, ``prompt``. ``quick``: the first of each task."""
    text = resources.files("vllm_specplug.cli").joinpath("demo_workload.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    if quick:
        rows = list({row["task"]: row for row in reversed(rows)}.values())[::-1]
    return rows


def _measure(
    args: argparse.Namespace,
    directory: str,
    dtype: str,
    prompts: Sequence[dict[str, str]],
    log_dir: Path,
    console: Any,
) -> list[arms.ArmResult]:
    """Every prompt through every arm, under progress bars."""
    compared = [arms.no_speculation(), arms.ngram(), arms.specplug("Auto", args.spec_tokens)]
    settings = arms.EngineSettings(model=directory, dtype=dtype)
    together = arms.available_gib() >= ARM_GIB * len(compared)
    purpose = "speed" if dtype == SPEED else "equal outputs"
    logs = log_dir / dtype
    logs.mkdir()
    with _bars(console, f"{dtype}, {purpose}", compared, len(prompts)) as progress:
        return arms.run(
            compared,
            settings,
            [arms.Work([row["prompt"]], [args.max_tokens]) for row in prompts],
            logs,
            together=together,
            progress=progress,
        )


@contextlib.contextmanager
def _bars(console: Any, title: str, compared: Sequence[arms.Arm], total: int) -> Iterator[arms.Progress]:
    """One bar per arm."""
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description:<24}"),
        rich_progress.BarColumn(30),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[state]:<9}"),
        rich_progress.TimeElapsedColumn(),
    )
    console.print(f"Measuring: {title}", markup=False)
    if not console.is_terminal:
        # Bars would show nothing until they end: a line per change of state instead.
        states: dict[str, str] = {}

        def say(name: str, state: str, done: int) -> None:
            if states.get(name) != state:
                states[name] = state
                console.print(f"  {name}: {state}", markup=False)

        yield say
        return
    with rich_progress.Progress(*columns, console=console) as bars:
        tasks = {arm.name: bars.add_task(arm.title, total=total, state="waiting") for arm in compared}

        def show(name: str, state: str, done: int) -> None:
            bars.update(tasks[name], completed=done, state=state)
            if state in ("done", "failed"):
                bars.stop_task(tasks[name])

        yield show


def _document(
    args: argparse.Namespace, prompts: Sequence[dict[str, str]], runs: dict[str, list[arms.ArmResult]]
) -> dict[str, Any]:
    """All figures, as written to JSON."""
    from vllm_specplug.ab import report

    tasks = list(dict.fromkeys(row["task"] for row in prompts))
    shown = []
    for speed, equality in zip(runs[SPEED], runs[EQUALITY], strict=True):
        row: dict[str, Any] = {"name": speed.arm.name, "title": speed.arm.title}
        row["failure"] = speed.failure or equality.failure
        base = {dtype: runs[dtype][0] for dtype in runs}
        if row["failure"] is None and all(b.failure is None for b in base.values()):
            whole = report.figures(speed.blocks, base[SPEED].blocks)
            row.update(dataclasses.asdict(whole))
            del row["identical"], row["outputs"], row["agreement"]
            row["identical"] = {}
            for dtype, result in ((SPEED, speed), (EQUALITY, equality)):
                same = report.figures(result.blocks, base[dtype].blocks)
                row["identical"][dtype] = {"same": same.identical, "of": same.outputs}
            row["tasks"] = {
                task: dataclasses.asdict(
                    report.figures(_of_task(speed.blocks, prompts, task), _of_task(base[SPEED].blocks, prompts, task))
                )
                for task in tasks
            }
        elif row["failure"] is None:
            row["failure"] = f"not compared: {base[SPEED].arm.title} failed"
        shown.append(row)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": environment.versions(),
        "machine": {"cpu": environment.cpu_model(), "cpus": environment.cpu_count()},
        "settings": {
            "prompts": len(prompts),
            "max_tokens": args.max_tokens,
            "batch": 1,
            "decoding": "greedy",
            "speed_dtype": SPEED,
            "equality_dtype": EQUALITY,
        },
        "arms": shown,
    }


def _of_task(blocks: Sequence[arms.Block], prompts: Sequence[dict[str, str]], task: str) -> list[arms.Block]:
    return [block for block, row in zip(blocks, prompts, strict=True) if row["task"] == task]


def _table(document: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title="Decoding, batch 1", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))  # fits 80 columns
    table.add_column("arm", no_wrap=True)
    for title in ("tokens/s", "speed-up", "MAT", "drafts/step", "equal"):
        table.add_column(title, justify="right", no_wrap=True)
    for arm in document["arms"]:
        if arm["failure"]:
            continue
        same = arm["identical"][EQUALITY]
        table.add_row(
            arm["title"],
            f"{arm['tokens_per_s']:.1f}",
            f"{arm['speedup']['value']:.2f}x",
            f"{arm['mat']:.2f}",
            f"{arm['drafts_per_step']:.2f}",
            f"{same['same']}/{same['of']}",
        )
    for arm in document["arms"]:
        if arm["failure"]:
            table.add_row(arm["title"], *["-"] * 4, "failed")
    return table


def _notes(document: dict[str, Any]) -> list[str]:
    settings = document["settings"]
    lines = [f"{arm['title']} failed: {arm['failure']}" for arm in document["arms"] if arm["failure"]]
    lines.append(
        f"{settings['prompts']} prompts, at most {settings['max_tokens']} tokens each, greedy. "
        f"Speed: {SPEED}, first to last token. MAT: tokens per target step. "
        f"Equal: outputs identical to those without speculation, token by token, in {EQUALITY}."
    )
    others = [
        f"{arm['name']} {arm['identical'][SPEED]['same']}/{arm['identical'][SPEED]['of']}"
        for arm in document["arms"][1:]
        if not arm["failure"]
    ]
    if others:
        lines.append(
            f"In {SPEED}: {', '.join(others)}. There vLLM's own steps give other last bits when they hold more rows, "
            "with any speculation."
        )
    return lines
