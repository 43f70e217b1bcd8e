"""The trace format: JSON lines, gzip or plain, an object for each finished request.

==============  ====================================================================================================
``prompt``      token ids; negative where the model was given something else
``out``         token ids of the output, one at least
``cat``         task, for tables and for splitting; without it ``all``
``topk``        per output token, pairs of token id and natural log-probability, likeliest first
``v``           version of what follows, :data:`VERSION`; older traces have only what stands above
``id``          the engine's request id
``ended``       seconds since 1970
``temperature`` of sampling; 0: greedy
``max_tokens``  the most tokens, prompt included, that the request could have held
``trees``       whether its drafts could branch
``namespace``   whose learned state it could use
``server``      what recorded it: proposer, draft tokens per step, model, dtype, vLLM's version, when it started
``text``        ``prompt`` and ``out`` as text
``steps``       a list per column of :class:`Steps`, an entry for each step that emitted tokens for the request
==============  ====================================================================================================

Only ``prompt`` and ``out`` are needed. Unknown fields are ignored.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

VERSION = 1
#: Files that a server records are called so.
PATTERN = "trace-*.jsonl.gz"
TASK = "all"
_GZIP = b"\x1f\x8b"
# Tokens encoded at a time: other threads get their turn in between.
_PIECE = 64


class TraceError(ValueError):
    """A trace cannot be used. The message is one line for the user: which file, what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of one request, the one that computed its prompt first.

    Attributes:
        number: ``int64[S]`` of the server's steps: requests that share one have been in the same batch.
        emitted, drafted, accepted: ``int32[S]`` tokens emitted, and draft tokens of them verified and accepted.
        us: ``float64[S]`` microseconds from the end of the step before to the end of this one; NaN: unknown.
        drafting_us: ``float64[S]`` of these, drafting, verification not included; NaN: unknown.
        proposer_us: ``float64[S]`` of these, the proposer itself.
        paused: ``bool[S]`` the proposer had no part in the step.
        loads: ``int64[S, 6]`` the fields of :class:`~vllm_specplug.proposers.base.StepLoad`.
    """

    number: npt.NDArray[np.int64]
    emitted: Int32Array
    drafted: Int32Array
    accepted: Int32Array
    us: Float64Array
    drafting_us: Float64Array
    proposer_us: Float64Array
    paused: npt.NDArray[np.bool_]
    loads: npt.NDArray[np.int64]


_COLUMNS: dict[str, Any] = {
    "number": np.int64,
    "emitted": np.int32,
    "drafted": np.int32,
    "accepted": np.int32,
    "us": np.float64,
    "drafting_us": np.float64,
    "proposer_us": np.float64,
    "paused": np.bool_,
    "loads": np.int64,
}


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a trace.

    Attributes:
        task: its task.
        prompt: ``int32[P]``.
        output: ``int32[T]``.
        topk_ids, topk_logprobs: ``int32[T, k]`` and ``float32[T, k]``, or None.
        max_tokens: as in the file; None: no more than the output has.
        temperature, namespace, trees, server: as in the file.
        steps: how it was decoded; None: not recorded.
    """

    task: str
    prompt: Int32Array
    output: Int32Array
    topk_ids: Int32Array | None
    topk_logprobs: Float32Array | None
    max_tokens: int | None = None
    temperature: float = 0.0
    namespace: str = ""
    trees: bool = True
    server: Mapping[str, Any] = field(default_factory=dict)
    steps: Steps | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of the files and their lines; ``cut``: files whose end is missing or damaged."""

    requests: list[Recorded]
    files: list[Path]
    cut: list[Path]

    @property
    def topk(self) -> int:
        """Likeliest tokens recorded per output token, in every request."""
        return min((0 if r.topk_ids is None else r.topk_ids.shape[1] for r in self.requests), default=0)


def read(paths: Iterable[Path], topk: bool = True) -> Trace:
    """All requests of some files, or of the files that a server recorded in a directory.

    Args:
        topk: whether to read the target's likeliest tokens.

    Raises:
        TraceError: a file is missing, holds no request, or something else than requests. A file that was cut short is
            read as far as it goes.
    """
    files, requests, cut = _find(paths), list[Recorded](), list[Path]()
    for path in files:
        found = len(requests)
        if _read(path, topk, requests):
            cut.append(path)
        if len(requests) == found:
            why = "its beginning is damaged" if path in cut else "it is empty"
            raise TraceError(f"{path} holds no recorded request: {why}")
    return Trace(requests, files, cut)


def _find(paths: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob(PATTERN))
            if not inside:
                raise TraceError(f"{path} is a directory without recorded files ({PATTERN})")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise TraceError(f"there is no file {path}")
    return files


def _read(path: Path, topk: bool, requests: list[Recorded]) -> bool:
    """Add a file's requests; whether its end is missing."""
    number = 0
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP
            raw.seek(0)
            lines = gzip.GzipFile(fileobj=raw) if packed else raw
            for line in lines:
                number += 1
                try:
                    data = json.loads(line)
                except ValueError:
                    if not line.endswith(b"\n") and number > 1:
                        return True
                    raise TraceError(f"{path}, line {number}: no JSON, so this is no trace") from None
                requests.append(_recorded(data, f"{path}, line {number}", topk))
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return True
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or error}") from error
    return False


def _recorded(data: Any, where: str, topk: bool) -> Recorded:
    if not isinstance(data, dict) or not {"prompt", "out"} <= data.keys():
        raise TraceError(f"{where}: no recorded request, which has the fields prompt and out")
    version = data.get("v", VERSION)
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise TraceError(f"{where}: version {version!r} of the format; this program reads {VERSION}")
    try:
        output = _ids(data["out"])
        if not len(output):
            raise ValueError("out is empty")
        ids, logprobs = _topk(data["topk"], len(output)) if topk and data.get("topk") else (None, None)
        most = data.get("max_tokens")
        return Recorded(
            task=str(data.get("cat") or TASK),
            prompt=_ids(data["prompt"]),
            output=output,
            topk_ids=ids,
            topk_logprobs=logprobs,
            max_tokens=None if most is None else int(most),
            temperature=float(data.get("temperature", 0.0)),
            namespace=str(data.get("namespace", "")),
            trees=bool(data.get("trees", True)),
            server=dict(data.get("server") or {}),
            steps=_steps(data["steps"]) if data.get("steps") else None,
        )
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise TraceError(f"{where}: no recorded request: {error}") from None


def _ids(values: Any) -> Int32Array:
    array = np.array(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError("prompt and out must be lists of token ids")
    if len(array) and not -(1 << 31) <= int(array.min()) <= int(array.max()) < 1 << 31:
        raise ValueError("a token id does not fit 32 bits")
    return array.astype(np.int32)


def _topk(values: Any, size: int) -> tuple[Int32Array, Float32Array]:
    pairs = np.array(values)
    if pairs.ndim != 3 or pairs.shape[0] != size or pairs.shape[2] != 2 or pairs.dtype.kind not in "if":
        raise ValueError("topk must have a list of pairs for each token of out")
    return pairs[..., 0].astype(np.int32), pairs[..., 1].astype(np.float32)


def _steps(columns: Any) -> Steps:
    arrays = {}
    for name, dtype in _COLUMNS.items():
        array = np.array(columns[name], np.float64 if dtype is np.float64 else None)  # null becomes NaN
        if array.dtype.kind not in "iufb":
            raise ValueError(f"steps.{name} must be numbers")
        arrays[name] = array.astype(dtype)
    size = len(arrays["number"])
    if any(a.shape != ((size, 6) if name == "loads" else (size,)) for name, a in arrays.items()):
        raise ValueError("the columns of steps differ in length")
    return Steps(**arrays)


def encode(
    facts: Mapping[str, Any],
    prompt: Sequence[int],
    out: Sequence[int],
    steps: Mapping[str, Sequence[Any]] | None = None,
    topk: tuple[Int32Array, Float32Array] | None = None,
) -> Iterator[str]:
    """A request's line, in pieces.

    Args:
        facts: the other fields of the format; ``v`` and ``cat`` are added where they are missing.
        steps: its columns; NaN is written as null.
        topk: ``int32[len(out), k]`` and ``float32[len(out), k]``.
    """
    yield json.dumps({"v": VERSION, "cat": TASK, **facts}, separators=(",", ":"))[:-1]
    for name, ids in (("prompt", prompt), ("out", out)):
        yield f',"{name}":'
        yield from _list([int(i) for i in ids])
    if steps is not None:
        yield ',"steps":{'
        for number, (name, column) in enumerate(steps.items()):
            yield f'{"," if number else ""}"{name}":'
            yield from _list([None if value != value else value for value in column])
        yield "}"
    if topk is not None:
        yield ',"topk":'
        rows = ([[i, round(p, 4)] for i, p in zip(*row, strict=True)] for row in _rows(*topk))
        yield from _list(rows)
    yield "}\n"


def _rows(ids: Int32Array, logprobs: Float32Array) -> Iterator[tuple[list[int], list[float]]]:
    for row_ids, row_logprobs in zip(ids, logprobs, strict=True):
        yield row_ids.tolist(), row_logprobs.tolist()


def _list(values: Iterable[Any]) -> Iterator[str]:
    """The JSON of a list, a few entries at a time."""
    piece: list[Any] = []
    before = "["
    for value in values:
        piece.append(value)
        if len(piece) == _PIECE:
            yield before + json.dumps(piece, separators=(",", ":"))[1:-1]
            before, piece = ",", []
    if piece:
        yield before + json.dumps(piece, separators=(",", ":"))[1:-1]
        before = ","
    yield "[]" if before == "[" else "]"
