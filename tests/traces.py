"""Traces made by hand: requests in a small random language, and files of them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplug.trace import files

#: Milliseconds of a step: one row, and each further one.
BASE_MS, ROW_MS = 20.0, 0.5
SERVER = {"proposer": "Auto", "draft_tokens": 8, "model": "m", "dtype": "float32", "vllm": "0.32.0", "engine": 0}


def text(rng: np.random.Generator, length: int) -> list[int]:
    """At least ``length`` tokens, from few words used unequally often."""
    words = [np.random.default_rng(w).integers(0, 500, size=2 + w % 5).tolist() for w in range(30)]
    found: list[int] = []
    while len(found) < length:
        found += words[min(int(rng.zipf(1.6)), 30) - 1]
    return found


def request(rng: np.random.Generator, size: int = 40, topk: int = 0, task: str = "all") -> dict[str, Any]:
    """What :func:`vllm_specplug.trace.files.encode` takes: facts, prompt, out, steps, topk."""
    prompt, out = text(rng, 20), text(rng, size)[:size]
    steps: dict[str, list[Any]] = {name: [] for name in files.Steps.__dataclass_fields__}
    at, number = 0, int(rng.integers(1 << 40))
    while at < size:
        drafted = int(rng.integers(0, 8)) if at else 0
        emitted = min(1 + int(rng.integers(0, drafted + 1)), size - at)
        rows, held = 1 + drafted, len(prompt) + at - 1
        us = 1000 * (BASE_MS + ROW_MS * drafted) * rng.lognormal(0.0, 0.03) + 300
        load = [1, rows, held, rows * held, 0, 0] if at else [0, 0, 0, 0, len(prompt), 0]
        values = (
            number,
            emitted,
            drafted,
            min(drafted, emitted - 1),
            us if at else float("nan"),
            300.0,
            100.0,
            False,
            load,
        )
        for column, value in zip(steps.values(), values, strict=True):
            column.append(value)
        at, number = at + emitted, number + 1
    known = None
    if topk:
        ids = np.concatenate([np.array(out)[:, None], rng.integers(0, 500, (size, topk - 1))], axis=1)
        known = ids.astype(np.int32), np.tile(-np.arange(1, topk + 1, dtype=np.float32), (size, 1))
    facts = {"id": f"r{number}", "cat": task, "max_tokens": len(prompt) + size, "server": SERVER | {"started": 1.0}}
    return {"facts": facts, "prompt": prompt, "out": out, "steps": steps, "topk": known}


def write(path: Path, requests: list[dict[str, Any]]) -> Path:
    """A gzip file of requests."""
    with gzip.open(path, "wt") as file:
        for each in requests:
            file.writelines(files.encode(**each))
    return path


def make(path: Path, count: int = 12, seed: int = 0, **fields: Any) -> Path:
    """A file of random requests of two tasks."""
    rng = np.random.default_rng(seed)
    return write(path, [request(rng, task="ab"[i % 2], **fields) for i in range(count)])
