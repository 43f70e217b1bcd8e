"""``specplug ab``: compares vLLM servers on the user's model, requests and machine, and says what came of it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vllm_specplug.ab import environment, plan, results

from . import model
from .common import CommandError, describe_error

if TYPE_CHECKING:
    from vllm_specplug.ab.compare import Progress
    from vllm_specplug.ab.workloads import Request

#: Context of the embedded model's servers: as short as is usual, or all its positions where requests need them.
EMBEDDED_LENGTHS = (4096, 8192)
SUMMARY_JSON, SUMMARY_CSV, REPORT = "summary.json", "summary.csv", "report.html"

_DESCRIPTION = """\
Compares vLLM servers: the same requests in the same order, blocks taking turns on this machine, then the verdict with
intervals. The first arm is the control. `specplug ab report DIR` writes the reports of a folder of results again."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``ab``."""
    parser = commands.add_parser("ab", help="compare vLLM servers on your model and requests", description=_DESCRIPTION)
    default = plan.Settings((), ())
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for vllm serve (default: the embedded one)")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument(
        "--arm",
        action="append",
        metavar="ARM",
        help="PRESET, NAME=FLAGS of vllm serve, NAME=PRESET FLAGS, or NAME=http://HOST:PORT; again for each "
        f"(default: {', '.join(plan.DEFAULT_ARMS)})",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with arms and any of these options")
    parser.add_argument("--workload", metavar="FILE", help="Spec-Bench, ShareGPT, JSON lines with prompt, or a trace")
    parser.add_argument("--requests", metavar="N", help=f"by task (default: all, up to {plan.MOST_REQUESTS})")
    concurrency = ",".join(map(str, plan.DEFAULT_CONCURRENCY))
    parser.add_argument("--concurrency", metavar="N,...", help=f"requests at once (default: {concurrency})")
    parser.add_argument("--rate", metavar="R,...", help="instead: arrivals per second, at random (Poisson)")
    parser.add_argument("--output-tokens", metavar="N", help=f"most per request (default: {default.output_tokens})")
    parser.add_argument("--ignore-eos", action="store_true", default=None, help="always so many output tokens")
    parser.add_argument("--temperature", metavar="T", help="0: greedy (default)")
    parser.add_argument("--repeats", metavar="N", help=f"of everything, on fresh servers (default: {default.repeats})")
    parser.add_argument("--blocks", metavar="N", help=f"most parts of a repeat (default: {default.blocks})")
    parser.add_argument("--seed", metavar="N", help=f"of sampling, order and arrivals (default: {default.seed})")
    parser.add_argument("--api", metavar="API", help="for prompts that are text: chat (default) or completions")
    parser.add_argument("--serve-args", metavar="FLAGS", help="for every server started; write --serve-args=FLAGS")
    together = parser.add_mutually_exclusive_group()
    together.add_argument("--together", action="store_true", default=None, help="all servers up at once")
    together.add_argument(
        "--in-turn", dest="together", action="store_false", help="one after another (default: as memory allows)"
    )
    parser.add_argument("--keep-servers", action="store_true", default=None, help="not fresh ones for each repeat")
    parser.add_argument("--port", metavar="N", help="the first server's; the next follow (default: any free)")
    parser.add_argument("--timeout-s", metavar="S", help=f"for one answer (default: {default.timeout_s:g})")
    parser.add_argument("--start-timeout-s", metavar="S", help=f"for a start (default: {default.start_timeout_s:g})")
    parser.add_argument(
        "--fidelity",
        metavar="ARM,...",
        help="how far these arms are from the exact model, or all (default: those that are approximate by design)",
    )
    parser.add_argument(
        "--fidelity-requests",
        metavar="N",
        help=f"on so many requests, in a pass of its own (default: {default.fidelity_requests}; 0: none)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the results (default: named after the time)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare and report; 0 if every arm ran to the end, 1 if one did not, 128 + signal if interrupted."""
    from rich.console import Console

    from vllm_specplug.ab import workloads

    console = Console(highlight=False)
    if args.model == "report":
        if args.folder is None:
            raise CommandError("ab report: name the folder of results: specplug ab report DIR")
        return write_reports(args.folder, console)
    if args.folder is not None:
        raise CommandError(f"ab: one MODEL is expected, and {args.folder} is a second; put flags into --arm NAME=FLAGS")
    if not environment.has_module("vllm"):
        raise CommandError("ab needs vLLM, also for servers elsewhere: its benchmark's client sends the requests")
    try:
        settings, notes = plan.build({**vars_of(args), "arms": args.arm}, args.config)
        requests = workloads.sample(workloads.read(settings.workload), settings.requests, settings.seed)
    except plan.UsageError as error:
        raise CommandError(str(error)) from None
    settings = _with_model(settings, requests, console)
    folder = _folder(settings.out)
    name = settings.workload.name if settings.workload else plan.BUNDLED
    for line in (*notes, *_introduction(settings, name, len(requests), folder)):
        console.print(line, markup=False, soft_wrap=True)
    return _run(settings, requests, name, folder, console)


def vars_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of :data:`.plan.OPTIONS` that were given on the command line."""
    return {name: getattr(args, name, None) for name in plan.OPTIONS}


def _folder(out: Path | None) -> Path:
    """A folder that holds no results yet. Raises :class:`CommandError`."""
    folder = out or Path(time.strftime("specplug-ab-%Y%m%d-%H%M%S"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CommandError(f"--out {folder}: the folder is not empty; name another.")
    except OSError as error:
        raise CommandError(f"--out {folder}: {error.strerror}.") from None
    return folder


def _with_model(settings: plan.Settings, requests: Sequence[Request], console: Any) -> plan.Settings:
    """The settings with the embedded model where one is needed and none is named. Raises :class:`CommandError`."""
    if not settings.starts_servers:
        return settings
    if settings.model:
        text = settings.model
        # Anything else may be the name of a model on a hub.
        is_path = text.startswith((".", "/", "~")) or text.count("/") > 1
        if is_path and not Path(text).expanduser().exists():
            raise CommandError(f"MODEL = {text}: there is no such file or folder.")
        return dataclasses.replace(settings, model=str(Path(text).expanduser()) if text.startswith("~") else text)
    directory = model.default_dir()
    if not model.is_exported(directory):
        with console.status("Exporting the embedded model (about 20 s)"):
            model.export(directory)
    args = settings.serve_args or embedded_args(requests, settings.output_tokens)
    return dataclasses.replace(settings, model=str(directory), serve_args=args)


def embedded_args(requests: Sequence[Request], output_tokens: int) -> tuple[str, ...]:
    """Flags with which the embedded model's servers start in half a minute, not in minutes, and hold ``requests``."""
    # Of text it is a guess: three characters a token, and what the chat template adds.
    sizes = [len(r.prompt) if isinstance(r.prompt, list) else len(r.prompt) // 3 + 64 for r in requests]
    fits = [length for length in EMBEDDED_LENGTHS if max(sizes) + output_tokens < length]
    return ("--enforce-eager", f"--max-model-len={fits[0] if fits else EMBEDDED_LENGTHS[-1]}")


def _introduction(settings: plan.Settings, workload: str, requests: int, folder: Path) -> list[str]:
    control, *others = [arm.name for arm in settings.arms]
    against = f"Comparing {', '.join(others)} with {control}" if others else f"Measuring {control}"
    sampling = f"temperature {settings.temperature:g}" if settings.temperature else "greedy"
    tokens = f"{'exactly' if settings.ignore_eos else 'at most'} {settings.output_tokens} tokens"
    return [
        f"{against} on {settings.model or 'servers that run'}: {' and '.join(str(one) for one in settings.loads)}.",
        f"{requests} requests of {workload}, {tokens}, {sampling}, {settings.repeats} times. Results: {folder}",
    ]


def _run(settings: plan.Settings, requests: Sequence[Request], workload: str, folder: Path, console: Any) -> int:
    from vllm_specplug.ab import compare

    failures: dict[str, str] = {}
    stopped_by = 0
    full: OSError | None = None
    with _signals() as received, _bars(console, settings, len(requests)) as progress:
        try:
            comparison = compare.Comparison(settings, requests, workload, folder, progress)
        except plan.UsageError as error:
            raise CommandError(str(error)) from None
        except OSError as error:
            raise CommandError(f"{folder}: results cannot be written: {error.strerror}.") from None
        try:
            comparison.run()
        except KeyboardInterrupt:
            stopped_by = received[-1] if received else signal.SIGINT
        except OSError as error:
            full = error
        failures = comparison.failures
    for text, names in _same_text(failures).items():
        console.print(f"{', '.join(names)}: {text}", style="red", markup=False, soft_wrap=True)
    if stopped_by:
        console.print("Interrupted: the servers are stopped, what was measured is kept.", markup=False, soft_wrap=True)
    code = 1
    with contextlib.suppress(CommandError) if stopped_by or full or failures else contextlib.nullcontext():
        code = write_reports(folder, console)
    if full is not None:
        raise CommandError(f"{folder}: results cannot be written: {full.strerror or full}. What was written is kept.")
    return 128 + stopped_by if stopped_by else int(bool(failures)) or code


def _same_text(failures: dict[str, str]) -> dict[str, list[str]]:
    """Arms by what went wrong: what is wrong with the model is wrong with all of them."""
    by_reason: dict[str, list[str]] = {}
    for name, text in failures.items():
        by_reason.setdefault(text.split("\n")[0], []).append(name)
    return {reason if len(names) > 1 else failures[names[0]]: names for reason, names in by_reason.items()}


def write_reports(folder: Path, console: Any) -> int:
    """Print the verdict on a folder of results and write all reports of it; 0 if all could be written, 1 if not.

    Raises:
        CommandError: it holds no results.
    """
    from vllm_specplug.ab import summary, verdict

    try:
        found, cells = results.read(folder)
        probes = results.read_probes(folder)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if not any(cell.replies for cell in cells):
        raise CommandError(f"{folder}: nothing was measured, so there is nothing to report.")
    judged = verdict.judge(found, cells, probes)
    summary.print_summary(judged, console)

    def page(path: Path) -> None:
        from vllm_specplug.ab import html  # on its own: it needs packages that the rest does not

        html.write(judged, found, cells, path)

    written, code = [], 0
    for path, write in (
        (folder / SUMMARY_JSON, lambda path: summary.write_json(judged, path)),
        (folder / SUMMARY_CSV, lambda path: summary.write_csv(judged, path)),
        (folder / REPORT, page),
    ):
        try:
            write(path)
            written.append(str(path))
        except (OSError, ImportError) as error:
            reason = getattr(error, "strerror", None) or describe_error(error)
            console.print(f"{path} could not be written: {reason}", style="red", markup=False, soft_wrap=True)
            code = 1
    if written:
        console.print(f"Written: {', '.join(written)}", markup=False, soft_wrap=True)
    return code


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP end what runs in here as Ctrl-C does; yields those that came."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    kept = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _bars(console: Any, settings: plan.Settings, requests: int) -> Iterator[Progress]:
    """One bar per arm on a terminal; a line per change of state elsewhere, where bars would show nothing."""
    names = [arm.name for arm in settings.arms]
    total = requests * settings.repeats * len(settings.loads)
    if not console.is_terminal:
        yield _Lines(console, total * len(names))
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(24),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[state]}"),
    )
    with rich_progress.Progress(*columns, console=console) as bars:
        yield _Bars(console, bars, names, total)


class _Lines:
    """Progress as lines of text."""

    def __init__(self, console: Any, total: int) -> None:
        self._console, self._total, self._done = console, total, 0
        self._states: dict[str, str] = {}
        self._said = time.monotonic()

    def state(self, arm: str, state: str, detail: str = "") -> None:
        """Print what is new; not each block's begin and end."""
        if state in ("starting", "failed") and self._states.get(arm) != state:
            self._console.print(f"  {arm}: {state}", markup=False, soft_wrap=True)
            self._states[arm] = state
        elif state == "stopped":
            self._states[arm] = state

    def advance(self, arm: str, requests: int, left_s: float | None) -> None:
        """Print how far it is, twice a minute."""
        self._done += requests
        if time.monotonic() - self._said >= 30 or self._done == self._total:
            self._said = time.monotonic()
            self._console.print(
                f"  {self._done} of {self._total} requests{_left(left_s)}", markup=False, soft_wrap=True
            )

    def note(self, text: str) -> None:
        """Print it."""
        self._console.print(text, markup=False, soft_wrap=True)


class _Bars(_Lines):
    """Progress as bars."""

    def __init__(self, console: Any, bars: Any, names: Sequence[str], total: int) -> None:
        super().__init__(console, total * len(names))
        self._bars = bars
        width = max(len("all"), *map(len, names))
        self._tasks = {name: bars.add_task(f"{name:<{width}}", total=total, state="waiting") for name in names}
        self._all = bars.add_task(f"{'all':<{width}}", total=total * len(names), state="")

    def state(self, arm: str, state: str, detail: str = "") -> None:
        """Show it beside the bar."""
        self._bars.update(self._tasks[arm], state=detail if state == "running" else state)

    def advance(self, arm: str, requests: int, left_s: float | None) -> None:
        """Move the bar."""
        self._bars.advance(self._tasks[arm], requests)
        self._bars.advance(self._all, requests)
        self._bars.update(self._all, state=_left(left_s).lstrip(", "))


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"
