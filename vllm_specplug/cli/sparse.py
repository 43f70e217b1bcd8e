"""``specplug sparse calibrate``: find out how much of a context each part of a model needs.

Runs the model on text, in this process and exactly, and observes. SparseVerify reads what it finds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from .common import CommandError
from .model import default_dir, is_exported


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``sparse`` and its one action, ``calibrate``."""
    parser = commands.add_parser("sparse", help="calibrate SparseVerify, the approximate proposer")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    calibrate = actions.add_parser("calibrate", help="find out what each layer and head of a model needs")
    calibrate.add_argument("model", nargs="?", help="as for `vllm serve`; default: the embedded one")
    calibrate.add_argument("--text", type=Path, action="append", metavar="FILE", help="text of your users' kind; again")
    calibrate.add_argument(
        "--workload", type=Path, metavar="FILE", help="requests instead: JSON lines with prompt or prompt_token_ids"
    )
    calibrate.add_argument("--out", type=Path, metavar="FILE", help="default: where SparseVerify looks for this model")
    calibrate.add_argument("--context", type=int, default=4096, help="tokens per prompt (default: %(default)s)")
    calibrate.add_argument("--prompts", type=int, default=12, help="default: %(default)s")
    calibrate.add_argument("--dtype", default="auto", help="as for `vllm serve` (default: %(default)s)")
    calibrate.add_argument("--unit", type=int, default=32, help="SparseVerify's option (default: %(default)s)")
    calibrate.add_argument("--trust-remote-code", action="store_true", help="as for `vllm serve`")
    calibrate.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Calibrate, and say what was found and where it is."""
    model = args.model or str(default_dir())
    if args.model is None and not is_exported(default_dir()):
        raise CommandError("sparse calibrate: name a model, or make the embedded one: specplug model export DIR.")
    if args.prompts < 1 or args.context < 512:
        raise CommandError("sparse calibrate: wanted at least 1 prompt of at least 512 tokens of context.")
    texts = None if args.text is None else _texts(args.text)
    requests = None if args.workload is None else _requests(args.workload)
    from vllm_specplug.host import calibrate, sparse_calibration

    out = args.out or sparse_calibration.default_path(model)
    if out.is_dir() or not _writable(out):
        raise CommandError(f"sparse calibrate: cannot write {out}; name another file with --out.")
    started = time.monotonic()
    settings = calibrate.Settings(model, args.context, args.prompts, args.dtype, args.unit, args.trust_remote_code)
    try:
        found = calibrate.calibrate(settings, texts, requests)
    except calibrate.CannotCalibrate as error:
        raise CommandError(f"sparse calibrate: {error}") from None
    sparse_calibration.save(out, {"model": model, **found})
    layers = found["attention"]
    print(f"Observed {layers['steps']} steps at {layers['context']} tokens in {time.monotonic() - started:.0f} s.")
    rows = layers["rows_alike"]
    if rows:
        print(
            f"Rows choose alike: {rows[0]:.2f} (next row) to {rows[-1]:.2f} (row {len(rows)}), Jaccard similarity. "
            f"Layers that choose for themselves: {len(layers['anchors'])} of {len(layers['layers'])}."
        )
    for part, what in (("ffn", "feed-forward layers"), ("moe", "experts")):
        print(f"{what}: {'calibrated' if part in found else found['left_out'][part]}")
    print(f"Written to {out}")
    return 0


def _writable(out: Path) -> bool:
    parent = next(p for p in out.absolute().parents if p.exists())
    return os.access(out if out.exists() else parent, os.W_OK)


def _texts(files: list[Path]) -> list[str]:
    """Texts to read, each of any length."""
    try:
        return [file.read_text(errors="replace") for file in files]
    except OSError as error:
        raise CommandError(f"sparse calibrate: cannot read {error.filename}: {error.strerror}.") from None


def _requests(file: Path) -> list[str | list[int]]:
    """The prompts of a workload."""
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise CommandError(f"sparse calibrate: cannot read {file}: {error.strerror}.") from None
    found: list[str | list[int]] = []
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
            prompt = data.get("prompt_token_ids", data.get("prompt"))
        except (ValueError, AttributeError):
            prompt = None
        if not isinstance(prompt, str | list) or not prompt:
            raise CommandError(
                f"sparse calibrate: {file}, line {number}: expected a JSON object with prompt or prompt_token_ids."
            )
        found.append(prompt)
    if not found:
        raise CommandError(f"sparse calibrate: {file} holds no requests.")
    return found
