"""What the commands share. Import-light: ``specplug --help`` must not load torch."""

from __future__ import annotations

import importlib.metadata
from typing import Any


class CommandError(Exception):
    """A command cannot do what was asked. The message is one line for the user: what, where, what is allowed."""


def installed_version(distribution: str) -> str | None:
    """The installed version of ``distribution``, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_error(error: BaseException) -> str:
    """One line for an exception: its type and the first non-empty line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def add_json_flag(parser: Any) -> None:
    """Give a command the ``--json`` switch every reporting command has."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
