"""``specplug ab`` with :mod:`fake_vllm` for ``vllm serve``, in a process of its own that a test may kill."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from vllm_specplug.ab import results, servers
from vllm_specplug.cli import ab, main


def fake_vllm() -> None:
    """Have fake servers started."""
    servers.vllm_command = lambda: [sys.executable, str(Path(__file__).with_name("fake_vllm.py"))]


def full_disk(from_cell: int) -> Callable[[], None]:
    """Has results fail to be written from then on, after a part of the line."""

    def prepare() -> None:
        add_cell, written = results.add_cell, 0

        def full(folder: Path, cell: Any) -> None:
            nonlocal written
            written += 1
            if written < from_cell:
                return add_cell(folder, cell)
            with (folder / results.CELLS).open("a") as file:
                file.write('{"arm": "cut sh')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        results.add_cell = full

    return prepare


def no_reports() -> None:
    """The reports take seconds."""
    ab.write_reports = lambda folder, console: 0


def start(arguments: list[str], output: Path, *prepare: Callable[[], None]) -> BaseProcess:
    """Start the command; what it prints goes to ``output``. A fork, because importing vLLM takes seconds."""

    def run() -> None:
        with output.open("wb", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # pytest's own are elsewhere.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        # In the background of a shell without job control, whoever runs the tests ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        servers.GRACE_S = 4.0  # what does not end is killed sooner than in earnest
        for step in (fake_vllm, *prepare):
            step()
        sys.exit(main.main(arguments))

    # Imported here for all of them.
    from vllm.benchmarks.lib import endpoint_request_func  # noqa: F401

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process
