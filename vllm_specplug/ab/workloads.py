"""Requests for a comparison: read from a file of one of the usual formats, sampled by task, and put in order."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplug.ab.plan import BUNDLED, MOST_REQUESTS, UsageError

#: Spec-Bench's categories that are one task of its: multi-turn conversation, taken from MT-bench.
_CONVERSATION = frozenset(["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"])


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        index: its place in the workload, as :attr:`.results.Reply.index`.
        task: what kind it is; figures are given per task.
        prompt: a user's message, or token ids that are sent as they are.
    """

    index: int
    task: str
    prompt: str | list[int]


def read(path: Path | None) -> list[Request]:
    """All requests of a file, in its order; None: the bundled ones.

    One of (gzip if the name ends in ``.gz``): Spec-Bench's ``question.jsonl`` (``turns``, ``category``; the first
    turn is sent), ShareGPT-style JSON (a list of ``conversations``; what the human said first is sent), JSON lines with
    ``prompt`` and optionally ``task``, or a recorded trace (JSON lines with ``prompt`` as token ids, and ``cat``).

    Raises:
        UsageError: naming the file, the line, and what is wrong.
    """
    if path is None:
        text = resources.files("vllm_specplug.cli").joinpath("demo_workload.jsonl").read_text(encoding="utf-8")
        rows: Iterable[tuple[str, Any]] = _lines(text, BUNDLED)
    else:
        rows = _rows(path)
    requests: list[Request] = []
    for where, row in rows:
        found = _request(row, where)
        if found is not None:
            requests.append(Request(len(requests), *found))
    if not requests:
        raise UsageError(f"--workload {path}: there is no request in it.")
    return requests


def _rows(path: Path) -> Iterable[tuple[str, Any]]:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as file:
                text = file.read()
        else:
            text = path.read_text(encoding="utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--workload {path} cannot be read: {reason}") from None
    if not text.lstrip().startswith("["):
        return _lines(text, str(path))
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--workload {path}: not JSON: {error}") from None
    return ((f"{path}, entry {number}", row) for number, row in enumerate(document, 1))


def _lines(text: str, name: str) -> Iterable[tuple[str, Any]]:
    # Not splitlines(): it also breaks at characters that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{name}, line {number}", json.loads(line)
            except ValueError as error:
                raise UsageError(f"--workload {name}, line {number}: not JSON: {error}") from None


def _request(row: Any, where: str) -> tuple[str, str | list[int]] | None:
    """Task and prompt; None for a conversation that holds nothing to send."""
    if isinstance(row, dict):
        task = next((str(row[key]) for key in ("task", "cat", "category") if row.get(key) is not None), "all")
        if isinstance(row.get("turns"), list) and row["turns"] and isinstance(row["turns"][0], str):
            return "conversation" if task in _CONVERSATION else task, row["turns"][0]
        if isinstance(row.get("conversations"), list):
            return _first_of_conversation(row["conversations"], task)
        prompt = row.get("prompt")
        if isinstance(prompt, str) and prompt:
            return task, prompt
        # type(), not isinstance: true and false are no tokens.
        if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
            return task, prompt
    raise UsageError(
        f"--workload {where}: no request: expected an object with prompt (text or token ids), turns (Spec-Bench) or "
        "conversations (ShareGPT)."
    )


def _first_of_conversation(turns: Sequence[Any], task: str) -> tuple[str, str] | None:
    for turn in turns:
        if isinstance(turn, dict) and turn.get("from", turn.get("role")) in ("human", "user"):
            said = turn.get("value", turn.get("content"))
            if isinstance(said, str) and said.strip():
                return task, said
            return None
    return None


def sample(requests: Sequence[Request], count: int, seed: int) -> list[Request]:
    """``count`` requests, each task with its share, every task spread evenly over the result.

    Args:
        count: 0: all, but at most :data:`.plan.MOST_REQUESTS`.
        seed: which ones of a task, and their order.

    Raises:
        UsageError: there are fewer.
    """
    if count > len(requests):
        raise UsageError(f"--requests = {count} is not allowed: the workload has {len(requests)}.")
    count = count or min(len(requests), MOST_REQUESTS)
    by_task: dict[str, list[Request]] = {}
    for request in requests:
        by_task.setdefault(request.task, []).append(request)
    rng = np.random.default_rng(seed)
    placed: list[tuple[float, float, Request]] = []
    for group, share in zip(by_task.values(), _shares([len(g) for g in by_task.values()], count), strict=True):
        for place, pick in enumerate(rng.permutation(len(group))[:share]):
            # At the middle of its part of the whole; equal places in random order.
            placed.append(((place + 0.5) / share, rng.random(), group[int(pick)]))
    return [request for *_, request in sorted(placed, key=lambda item: item[:2])]


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """How many of each: in proportion, rounded by largest remainder, with one of each at least if ``count`` allows."""
    least = 1 if count >= len(sizes) else 0
    rest = [size - least for size in sizes]
    count, total = count - least * len(sizes), max(sum(rest), 1)
    shares = [count * size // total for size in rest]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(count * rest[i] % total))
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return [share + least for share in shares]


def too_long(requests: Sequence[Request], output_tokens: int, limit: int) -> str:
    """A line for the user where prompts given as token ids and their outputs do not fit in a server's context of
    ``limit`` tokens (0: unknown), which then cuts outputs short or refuses; else empty. Of text nothing is known."""
    sizes = [len(request.prompt) for request in requests if isinstance(request.prompt, list)]
    # One more than that: fidelity has the control read a prompt with its output and say one token.
    over = sum(size + output_tokens + 1 > limit for size in sizes)
    if not limit or not over:
        return ""
    return (
        f"{over} of {len(requests)} requests do not fit in a context of {limit} tokens: prompts of up to {max(sizes)} "
        f"and {output_tokens} of output need --max-model-len={max(sizes) + output_tokens + 1} (see --serve-args), if "
        "the model has as many positions. Their outputs are cut short or missing."
    )


def cut(requests: Sequence[Request], blocks: int, at_least: int) -> list[list[Request]]:
    """``requests`` in at most ``blocks`` parts of nearly equal size, each of ``at_least`` if there are as many."""
    parts = max(1, min(blocks, len(requests) // max(at_least, 1)))
    ends = [len(requests) * part // parts for part in range(parts + 1)]
    return [list(requests[begin:end]) for begin, end in itertools.pairwise(ends)]
