"""Options ``specplug.trace.*`` of a server that records. Import-light: read in every vLLM process."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_specplug import options

SECTION = "trace"
#: Request-body field (``vllm_xargs``) that names the task a request belongs to.
TASK_ARG = "specplug_task"
MOST_TOPK = 16


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What a server records of its requests."""

    dir: str | None = options.option(
        None, "record every finished request, as token ids, in files in this directory, which only its owner can read"
    )
    topk: int = options.option(
        0,
        "also record so many of the target's likeliest tokens at each output token; replaying Auto and TokenRecycling "
        "takes 8",
        low=0,
        high=MOST_TOPK,
    )
    text: bool = options.option(False, "also record prompts and outputs as text")
    max_bytes: int = options.option(256 << 20, "size of all files together; the oldest are deleted", low=1 << 16)
    files: int = options.option(8, "so many files share that size", low=2, high=1000)


def check(trace: TraceOptions) -> None:
    """Raise ``options.OptionError`` unless the directory can be recorded to, or made."""
    if trace.dir is None:
        return
    where = f"{options.ROOT}.{SECTION}.dir = {trace.dir!r} is not allowed: "
    path = Path(os.path.realpath(trace.dir))
    if not trace.dir or (path.exists() and not path.is_dir()):
        raise options.OptionError(f"{where}expected the path of a directory.")
    if not path.exists():
        if not path.parent.is_dir():
            raise options.OptionError(f"{where}there is no directory {path.parent}.")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise options.OptionError(f"{where}no directory can be made in {path.parent}.")
        return
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise options.OptionError(
            f"{where}expected a directory that only this user can enter, as after chmod 700 (its mode is "
            f"{stat.S_IMODE(found.st_mode):o})."
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise options.OptionError(f"{where}no file can be made in it.")


def as_config(trace: TraceOptions) -> dict[str, Any]:
    """What to set in vLLM's ``additional_config``: the options that differ from their defaults, and ``dir``."""
    default = TraceOptions()
    fields = {name: getattr(trace, name) for name in TraceOptions.__dataclass_fields__}
    changed = {name: value for name, value in fields.items() if name == "dir" or value != getattr(default, name)}
    return {options.ROOT: {SECTION: changed}}
