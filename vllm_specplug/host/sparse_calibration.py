"""What `specplug sparse calibrate` finds out about a model, and where it is kept.

A calibration is one JSON file per model: how much of a context each KV head needs and which layers choose alike
(``attention``), thresholds of gate activations (``ffn``), and of experts' weights (``moe``).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vllm_specplug import options

FORMAT = 1


def default_path(model: str) -> Path:
    """Where the calibration of ``model``, as vLLM is told it, is kept if the user names no file."""
    name = str(Path(model).resolve()) if Path(model).is_dir() else model
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "specplug" / "sparse" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def save(path: Path, found: dict[str, Any]) -> None:
    """Write a calibration; an interrupted write leaves the file that was there.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_suffix(".new")
    work.write_text(json.dumps({"format": FORMAT, **found}))
    work.replace(path)


def load(path: str | None, model: str) -> dict[str, Any] | None:
    """The calibration at ``path``, or the one kept for ``model``; None: there is none, or one of another format.

    Raises:
        options.OptionError: ``path`` names no file, or it holds no calibration.
    """
    file = default_path(model) if path is None else Path(path)
    where = f"{options.ROOT}.sparse_verify.calibration = {str(file)!r} is not allowed: "
    if not file.is_file():
        if path is None:
            return None
        raise options.OptionError(f"{where}there is no such file. `specplug sparse calibrate MODEL` writes one.")
    try:
        found = json.loads(file.read_text())
        known = isinstance(found, dict) and found.get("format") == FORMAT
    except (OSError, ValueError):
        known = False
    if not known and path is None:
        return None  # the next calibration replaces it
    if not known:
        raise options.OptionError(
            f"{where}expected a file written by `specplug sparse calibrate` of this version; make it anew."
        )
    return dict(found)
