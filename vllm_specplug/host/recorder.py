"""Records finished requests in files, for ``specplug trace``. Imports no vLLM.

The engine's thread only appends to lists; a thread of low priority encodes, packs and writes. Where it cannot follow,
or the disk fails, requests are left out and counted: the server never waits for a trace.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing.util
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplug.proposers.base import Int32Array, StepLoad
from vllm_specplug.trace import files
from vllm_specplug.trace.writer import RotatingFiles

logger = logging.getLogger("vllm.specplug")

#: Bytes of requests, live ones and those that wait to be written; further ones are left out.
MOST_HELD = 128 << 20
#: Seconds that a finished request may wait for others to be written with.
FLUSH_S = 1.0
#: Seconds that the end of an engine waits for the writer.
CLOSE_S = 5.0
# Of the writer's thread, on Linux.
_NICE = 10
# Seconds that the writer's thread lets go of the interpreter between two pieces of a line. Python takes it from a
# thread only after 5 ms, and the engine's thread would wait as long, again and again, for the end of a long line.
_BREATH_S = 1e-4
# What a step of a request and a token take in Python's lists, about.
_STEP_BYTES, _TOKEN_BYTES = 120, 40

TopK = tuple[Int32Array, npt.NDArray[np.float32]]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Seen:
    """One step, as far as it is recorded.

    Attributes:
        rows: batch rows of the requests that emitted tokens.
        ids: their request ids.
        emitted: their tokens, at least one each.
        drafted: ``int32[n]`` draft tokens verified for each.
        load: what the step computed.
        seconds: from the end of the step before to the end of this one; NaN: unknown.
        drafting: seconds of these that drafting took; NaN: unknown.
        proposer: seconds of these in the proposer itself.
        paused: the proposer had no part in the step.
        topk: ids and log-probabilities of the target's likeliest tokens where each emitted token was drawn,
            ``[T, k]`` for all requests together; None: not recorded.
    """

    rows: Sequence[int]
    ids: Sequence[str]
    emitted: Sequence[Sequence[int]]
    drafted: Int32Array
    load: StepLoad
    seconds: float
    drafting: float
    proposer: float
    paused: bool
    topk: TopK | None = None


@dataclass(slots=True)
class Admitted:
    """A request when its first token was emitted.

    Attributes:
        prompt: ``int32[P]`` tokens before that one.
        facts: fields of the trace format, JSON values.
        stops: tokens that end the output.
        most_output: tokens that the output may have.
    """

    prompt: Int32Array
    facts: dict[str, Any]
    stops: Collection[int] = ()
    most_output: int = 1 << 30


@dataclass(slots=True)
class _Live:
    admitted: Admitted
    size: int
    out: list[int] = field(default_factory=list)
    steps: list[tuple[_Shared, int, int]] = field(default_factory=list)  # the step, tokens emitted, drafts verified
    topk: list[TopK] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the requests of a step have in common; times in microseconds."""

    number: int
    us: float
    drafting_us: float
    proposer_us: float
    paused: bool
    load: list[int]


class Recorder:
    """Records the requests of one engine. All calls from the engine's thread; none of them raises or waits, but
    :meth:`close`."""

    def __init__(
        self,
        writer: RotatingFiles,
        topk: int = 0,
        server: Mapping[str, Any] | None = None,
        load_decoder: Callable[[], Decode] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            topk: likeliest tokens recorded of each step, if it has them.
            server: recorded with every request.
            load_decoder: makes what turns tokens into text, to be recorded as well; called in the writer's thread.
        """
        self.topk = topk
        self._files = writer
        self._server = dict(server or {})
        self._load_decoder = load_decoder
        self._decode: Decode | None = None
        self._now = now
        self._live: dict[str, _Live | None] = {}  # None: left out
        self._number = 0
        # Each changed by one thread only.
        self._dropped = 0
        self._held = 0
        self._released = 0
        self._recorded = 0
        self._failures = 0
        self._logged: set[str] = set()
        self._queue: queue.SimpleQueue[_Live | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._at_exit = multiprocessing.util.Finalize(None, self.close, exitpriority=1)

    def step(self, seen: Seen, admit: Callable[[int, str, int], Admitted]) -> None:
        """Record a step. ``admit(row, request_id, emitted)`` tells of a request seen for the first time, whose last
        ``emitted`` tokens are this step's."""
        if self._stopped:
            return
        try:
            self._step(seen, admit)
        except Exception:
            self.stop()

    def _step(self, seen: Seen, admit: Callable[[int, str, int], Admitted]) -> None:
        self._number += 1
        load = seen.load
        shared = _Shared(
            self._number,
            _microseconds(seen.seconds),
            _microseconds(seen.drafting),
            _microseconds(seen.proposer),
            seen.paused,
            [load.requests, load.rows, load.context, load.row_context, load.prefill, load.prefill_context],
        )
        width = 0 if seen.topk is None else 8 * seen.topk[0].shape[1]
        drafted, at = seen.drafted.tolist(), 0
        for i, (request_id, emitted) in enumerate(zip(seen.ids, seen.emitted, strict=True)):
            count, start = len(emitted), at
            at += count
            if request_id not in self._live:
                admitted = admit(seen.rows[i], request_id, count)
                self._live[request_id] = _Live(admitted, 0)
                self._hold(request_id, admitted.prompt.nbytes + 1000)
            live = self._live[request_id]
            if live is None:
                continue
            live.out.extend(emitted)
            live.steps.append((shared, count, drafted[i]))
            if seen.topk is not None:
                live.topk.append((seen.topk[0][start:at], seen.topk[1][start:at]))
            self._hold(request_id, _STEP_BYTES + count * (_TOKEN_BYTES + width))

    def _hold(self, request_id: str, more: int) -> None:
        """Count memory; a request for which there is none is left out."""
        live = self._live[request_id]
        if live is None:
            return
        live.size += more
        self._held += more
        if self._held - self._released > MOST_HELD:
            self._held -= live.size
            self._live[request_id] = None
            self._dropped += 1

    def end(self, request_ids: Collection[str]) -> None:
        """Have requests written that finished or were aborted; unknown ids are ignored."""
        for request_id in request_ids:
            live = self._live.pop(request_id, None)
            if live is None or self._stopped:
                continue
            live.admitted.facts["ended"] = round(self._now(), 3)
            self._queue.put(live)
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_all, name="specplug-trace-writer", daemon=True)
                self._thread.start()

    def stats(self) -> dict[str, float]:
        """Requests written, left out (for want of memory, or since writing failed), bytes written, failures."""
        return {
            "trace_requests": float(self._recorded - self._files.lost),
            "trace_requests_left_out": float(self._dropped + self._files.lost),
            "trace_bytes": float(self._files.written),
            "trace_failures": float(self._failures),
            f"trace_info.{self._files.directory}": 1.0,
        }

    def close(self) -> None:
        """Write what has finished, for :data:`CLOSE_S` seconds at most. Idempotent."""
        self._at_exit.cancel()
        self._stopped = True
        self._live.clear()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_S)
            self._thread = None

    def stop(self) -> None:
        """Record nothing more, for the exception being handled; it is logged."""
        self._stopped = True
        self._live.clear()
        self._log_once("recording a step failed: recording ends")

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            logger.warning("vllm-specplug: %s (logged once; the server goes on).", message, exc_info=True)

    # In the writer's thread

    def _write_all(self) -> None:
        if hasattr(os, "setpriority"):
            with contextlib.suppress(OSError):  # on Linux a thread has a priority of its own
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        due = math.inf
        while True:
            try:
                live = self._queue.get(timeout=None if due == math.inf else max(due - time.monotonic(), 0.0))
            except queue.Empty:
                due = math.inf
                self._guarded(self._files.flush)
                continue
            if live is None:
                self._guarded(self._files.flush)
                return
            self._recorded += 1
            self._guarded(lambda live=live: self._files.add(_paced(self._line(live))))  # type: ignore[misc]
            self._released += live.size
            due = min(due, time.monotonic() + FLUSH_S)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._failures += 1
            kind = f"{type(error).__name__} {getattr(error, 'errno', None) or ''}".strip()
            self._log_once(f"requests are left out of the trace in {self._files.directory} ({kind})")

    def _line(self, live: _Live) -> Iterator[str]:
        """The request's line. Tokens of the last step that came after the output's end are left out: the engine drops
        them after the step."""
        admitted, out = live.admitted, live.out
        last = live.steps[-1][1]
        size = min(len(out), max(admitted.most_output, 1))
        for i in range(len(out) - last, size):
            if out[i] in admitted.stops:
                size = i + 1
                break
        live.steps[-1] = (live.steps[-1][0], max(last - (len(out) - size), 1), live.steps[-1][2])
        out = out[:size]
        facts = {**admitted.facts, "server": self._server}
        text = self._text(admitted.prompt, out)
        if text is not None:
            facts["text"] = text
        topk = None
        if live.topk and sum(len(ids) for ids, _ in live.topk) == len(live.out):
            topk = (
                np.concatenate([ids for ids, _ in live.topk])[:size],
                np.concatenate([logprobs for _, logprobs in live.topk])[:size],
            )
        yield from files.encode(facts, admitted.prompt.tolist(), out, _columns(live.steps), topk)

    def _text(self, prompt: Int32Array, out: Sequence[int]) -> dict[str, str] | None:
        if self._load_decoder is None:
            return None
        try:
            if self._decode is None:
                self._decode = self._load_decoder()
            return {"prompt": self._decode(prompt[prompt >= 0].tolist()), "out": self._decode(list(out))}
        except Exception as error:
            self._load_decoder = None
            self._log_once(f"the trace is without text ({type(error).__name__}: {error})")
            return None


def _paced(pieces: Iterator[str]) -> Iterator[str]:
    for piece in pieces:
        yield piece
        time.sleep(_BREATH_S)


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _columns(steps: Sequence[tuple[_Shared, int, int]]) -> dict[str, list[Any]]:
    """The columns of :class:`vllm_specplug.trace.files.Steps`."""
    return {
        "number": [shared.number for shared, _, _ in steps],
        "emitted": [count for _, count, _ in steps],
        "drafted": [drafted for _, _, drafted in steps],
        "accepted": [min(drafted, count - 1) for _, count, drafted in steps],
        "us": [shared.us for shared, _, _ in steps],
        "drafting_us": [shared.drafting_us for shared, _, _ in steps],
        "proposer_us": [shared.proposer_us for shared, _, _ in steps],
        "paused": [shared.paused for shared, _, _ in steps],
        "loads": [shared.load for shared, _, _ in steps],
    }
