"""The ``specplug`` command: parses, dispatches, and turns errors into one clear line and an exit code.

Exit codes: 0 good, 1 the command ran and its answer is no, 2 the command could not run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import ab, demo, doctor, model, options, sparse, stats, trace
from .common import CommandError, installed_version

COMMANDS = (ab, demo, doctor, options, stats, trace, sparse, model)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``specplug`` with every command."""
    parser = argparse.ArgumentParser(
        prog="specplug", description="Training-free speculative decoding for existing vLLM servers."
    )
    parser.add_argument("--version", action="version", version=f"specplug {installed_version('vllm-specplug')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        print(f"specplug: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("specplug: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Closing here keeps the interpreter from complaining at exit.
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
