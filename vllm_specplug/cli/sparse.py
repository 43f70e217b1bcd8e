"""``specplug sparse calibrate``: find out how much of a context each part of a model needs.

Runs the model on text, in this process and exactly, and observes. SparseVerify reads what it finds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from .common import CommandError, describe_error
from .model import default_dir, is_exported

#: Tokens computed after each prompt, and verify steps observed of them.
_OUTPUT, _STEPS = 48, 6
_DRAFTS = 7


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
    texts = _texts(args.text) if args.workload is None else []
    requests = _requests(args.workload) if args.workload is not None else []
    from vllm_specplug.host import sparse_calibration

    out = args.out or sparse_calibration.default_path(model)
    if out.is_dir() or not _writable(out):
        raise CommandError(f"sparse calibrate: cannot write {out}; name another file with --out.")
    started = time.monotonic()
    found = _calibrate(model, args, texts, requests)
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


def _texts(files: list[Path] | None) -> list[str]:
    """Texts to read, each of any length."""
    if files is None:
        return _installed_texts()
    try:
        return [file.read_text(errors="replace") for file in files]
    except OSError as error:
        raise CommandError(f"sparse calibrate: cannot read {error.filename}: {error.strerror}.") from None


def _installed_texts() -> list[str]:
    """Prose and code that every installation has: PyTorch's reference, and vLLM's own sources."""
    import torch
    import vllm

    reference = [Path(torch.__file__).parent / name for name in ("_torch_docs.py", "_tensor_docs.py")]
    sources = sorted((Path(vllm.__file__).parent / "v1").rglob("*.py"), key=lambda p: -p.stat().st_size)[:24]
    texts = ["\n".join(p.read_text(errors="replace") for p in paths if p.is_file()) for paths in (reference, sources)]
    return [text for text in texts if text]


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


def _prompts(tokenizer: Any, texts: list[str], count: int, tokens: int) -> list[list[int]]:
    """``count`` prompts of ``tokens`` tokens, the texts by turns, each from where the last one ended."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids = [found for found in ids if len(found) >= tokens]
    if not ids:
        raise CommandError(f"sparse calibrate: no text has {tokens} tokens; give longer ones or a smaller --context.")
    at, prompts = [0] * len(ids), []
    for n in range(count):
        which = n % len(ids)
        if at[which] + tokens > len(ids[which]):
            at[which] = 0
        prompts.append(ids[which][at[which] : at[which] + tokens])
        at[which] += tokens
    return prompts


def _calibrate(
    model: str, args: argparse.Namespace, texts: list[str], requests: list[str | list[int]]
) -> dict[str, Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    settings = {"attention": True, "ratio": 0.999999, "dense_below": 0, "unit": args.unit, "start_probe": False}
    try:
        llm = LLM(
            model,
            dtype=args.dtype,
            max_model_len=args.context + _OUTPUT + _DRAFTS + 1,
            max_num_seqs=1,
            enforce_eager=True,
            trust_remote_code=args.trust_remote_code,
            speculative_config={
                "method": "custom_class",
                "model": "vllm_specplug.SparseVerify",
                "num_speculative_tokens": _DRAFTS,
            },
            additional_config={"specplug": {"sparse_verify": {**settings, "policy": "fixed", "length": _DRAFTS}}},
        )
    except Exception as error:
        raise CommandError(f"sparse calibrate: vLLM cannot start {model}: {describe_error(error)}") from None
    tokenizer = llm.get_tokenizer()
    if requests:
        ids = [tokenizer(r)["input_ids"] if isinstance(r, str) else r for r in requests[: args.prompts]]
        return observe(llm, [found[: args.context] for found in ids])
    return observe(llm, _prompts(tokenizer, texts, args.prompts, args.context))


def observe(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Everything that can be calibrated of an engine whose core runs in this process.

    Args:
        llm: a ``vllm.LLM`` with SparseVerify, in eager mode.
        prompts: token ids.

    Raises:
        CommandError: its attention cannot be observed.
    """
    from vllm import SamplingParams

    from vllm_specplug.host.sparse_ffn import FfnQuantiles
    from vllm_specplug.host.sparse_moe import MoeTails
    from vllm_specplug.host.sparse_observer import AttentionObserver

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    drafter, model = runner.drafter, runner.get_model()
    if drafter.trees.reason:
        raise CommandError(f"sparse calibrate: attention cannot be observed here: {drafter.trees.reason}.")
    attention = AttentionObserver(drafter.sparse.options.selection())
    left_out: dict[str, str] = {}
    parts: dict[str, Any] = {}
    try:
        attention.attach(model, runner.compilation_config.static_forward_context)
        for name, part in (("ffn", FfnQuantiles()), ("moe", MoeTails())):
            try:
                part.attach(model)
                parts[name] = part
            except ValueError as error:
                left_out[name] = str(error)
        for number, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0.0, max_tokens=_OUTPUT, ignore_eos=True)
            llm.llm_engine.add_request(f"calibrate-{number}", {"prompt_token_ids": prompt}, params)
            steps, seen = 0, attention.steps
            while llm.llm_engine.has_unfinished_requests():
                attention.wanted = attention.steps < seen + _STEPS and steps % 4 == 3
                before = attention.steps
                llm.llm_engine.step()
                if attention.steps > before:
                    attention.contexts.append(len(prompt))
                steps += 1
            print(f"\rprompt {number + 1} of {len(prompts)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        found: dict[str, Any] = {"attention": attention.result(), "left_out": left_out}
        for name, part in parts.items():
            try:
                found[name] = part.result()
            except ValueError as error:
                left_out[name] = str(error)
        return found
    except ValueError as error:
        raise CommandError(f"sparse calibrate: {error}") from None
    finally:
        attention.detach()
        for part in parts.values():
            part.detach()
