"""What a trace holds, as one document and as text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .files import Recorded, Trace
from .step_times import measured_steps


def summarise(trace: Trace) -> dict[str, Any]:
    """Files, servers, what is recorded, step times by rows, and a row per task."""
    requests = trace.requests
    servers = {str(r.server.get("started")): dict(r.server) for r in requests if r.server}
    loads, seconds, _ = measured_steps(requests)
    rows = np.array([load.rows for load in loads], np.int64)
    by_rows = {int(n): float(np.median(seconds[rows == n])) for n in np.unique(rows)}
    tasks = list(dict.fromkeys(r.task for r in requests))
    return {
        "files": [str(path) for path in trace.files],
        "cut_short": [str(path) for path in trace.cut],
        "requests": len(requests),
        "topk": trace.topk,
        "servers": list(servers.values()),
        "timed_steps": len(loads),
        "step_seconds_by_rows": by_rows,
        "tasks": [
            *(_task(task, [r for r in requests if r.task == task]) for task in (tasks if len(tasks) > 1 else ())),
            _task("total", requests),
        ],
    }


def _task(name: str, requests: Sequence[Recorded]) -> dict[str, Any]:
    steps = [r.steps for r in requests if r.steps is not None]
    verify = sum(len(s.emitted) - 1 for s in steps)
    drafted = sum(int(s.drafted.sum()) for s in steps)
    accepted = sum(int(s.accepted.sum()) for s in steps)
    decoded = sum(int(s.emitted[1:].sum()) for s in steps)
    return {
        "task": name,
        "requests": len(requests),
        "prompt tokens": sum(len(r.prompt) for r in requests),
        "output tokens": sum(len(r.output) for r in requests),
        "MAT": decoded / verify if verify else None,
        "drafts/step": drafted / verify if verify else None,
        "accepted": accepted / drafted if drafted else None,
    }


def lines(document: dict[str, Any]) -> Iterator[str]:
    """Everything but the tasks, for people."""
    files = document["files"]
    yield f"{len(files)} file{'s' if len(files) > 1 else ''}, {document['requests']} requests"
    for path in document["cut_short"]:
        yield f"{path}: its end is missing or damaged; read as far as it goes"
    for server in document["servers"]:
        started = server.get("started")
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else "unknown"
        yield (
            f"recorded by {server.get('proposer')} (K={server.get('draft_tokens')}) with {server.get('model')}, "
            f"vLLM {server.get('vllm')}, started {when}"
        )
    topk = document["topk"]
    yield (
        f"the target's {topk} likeliest tokens are recorded"
        if topk
        else "the target's likeliest tokens are not recorded"
    )
    if document["timed_steps"]:
        known = list(document["step_seconds_by_rows"].items())
        shown = ", ".join(f"{n}: {1000 * s:.1f}" for n, s in known[:12])
        more = ", ..." if len(known) > 12 else ""
        yield f"{document['timed_steps']} steps timed; median milliseconds by rows: {shown}{more}"
    else:
        yield "no step is timed"
