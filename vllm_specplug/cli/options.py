"""``specplug options``: every option of the plugin and of each registered proposer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys

from vllm_specplug.options import OptionError, OptionInfo

from .common import CommandError, add_json_flag


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``options``."""
    parser = commands.add_parser("options", help="every option, its default, what is allowed and what it does")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the options."""
    from vllm_specplug import registry

    try:
        rows = registry.option_tree()
    except OptionError as error:
        raise CommandError(f"options: {error}") from error
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        _print_table(rows)
    return 0


def _print_table(rows: list[OptionInfo]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Into a file or a pipe nothing needs to be folded to a terminal's width.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("option", "type", "default", "allowed", "meaning", "environment"):
        table.add_column(title, overflow="fold", no_wrap=title == "option")
    for row in rows:
        default = json.dumps(row.default)
        table.add_row(row.path, row.type, default, row.allowed, row.meaning, row.env or "")
    console = Console(width=width, highlight=False, markup=False)
    console.print(table)
    print("Set them under --additional-config, as in: --additional-config '" + _example(rows) + "'")


def _example(rows: list[OptionInfo]) -> str:
    """The JSON that sets the last option listed to its default."""
    value = rows[-1].default
    for part in reversed(rows[-1].path.split(".")):
        value = {part: value}
    return json.dumps(value)
