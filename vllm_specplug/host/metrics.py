"""What the proposer counts, in the server's ``/metrics``.

The proposer lives in an engine or worker process, ``/metrics`` in one or several API processes. A snapshot goes from
one to the other as a small file: written by the drafting rank at most once per second, read when Prometheus scrapes.

Why a file: a scrape never waits for the engine and the engine never for a scrape; every API process sees the same
totals; one writer means nothing to add up. prometheus_client's own multi-process files are in use only with several API
servers, which is settled before the plugin is loaded; vLLM's statistics for its loggers
(v1/metrics/stats.py:SpecDecodingStats) have no field for ours.

The file's directory is made by the process that starts an engine, private to the user, and removed when that process
exits. Processes started from there inherit its path in an environment variable. Engines on other machines and Ray's
workers do not, so they have no such metrics. This module is imported in every process of vLLM's and is import-light.
"""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing
import operator
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm_specplug.host import patching

logger = logging.getLogger("vllm.specplug")

#: Names the directory of snapshots to child processes. Not ``SPECPLUG_...``: those are the user's options.
ENVIRONMENT = "_VLLM_SPECPLUG_STATS"
#: Of every metric's name.
PREFIX = "vllm_specplug:"
#: At least so many nanoseconds lie between two snapshots of steps.
INTERVAL_NS = 1_000_000_000
_VERSION = 1
_NEVER = 1 << 63
_DIRECTORY_PREFIX = "specplug-stats-"
#: In memory on Linux: a write there does not wait for a disk.
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Drafts of one request.

    Attributes:
        request_id: the engine's id.
        proposer: who drafted.
        live: whether it had not ended.
        steps, emitted: steps that emitted tokens for it, and how many tokens.
        drafted, verified, accepted: draft tokens.
        by_depth: these three, each as a list over depths 1, 2, ...
    """

    request_id: str
    proposer: str
    live: bool
    steps: int
    emitted: int
    drafted: int
    verified: int
    accepted: int
    by_depth: list[list[int]]


# As a tuple, without the copies that dataclasses.astuple makes: those took ten times as long as all the rest.
_FIELDS = operator.attrgetter(*(field.name for field in fields(RequestStats)))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All statistics of one engine.

    Attributes:
        totals: counters and gauges by name, as ``HostProposer.stats()`` gives them.
        sources: the sources' names, ``S`` of them.
        by_source_depth: ``int64[3, S, D]`` draft tokens drafted, verified and accepted, by source and depth (from 1;
            the last depth takes in all deeper ones). Nested lists in a snapshot that was read.
        requests: the last ended requests and the live ones.
    """

    totals: dict[str, float]
    sources: Sequence[str]
    by_source_depth: Any
    requests: list[RequestStats]


@dataclass(frozen=True, slots=True)
class Published:
    """A snapshot as read: its publisher's ``labels``, and when that started and this was written, in ns since 1970."""

    labels: dict[str, str]
    started: int
    written: int
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class _Family:
    kind: str
    help: str


_FAMILIES = {
    "drafted_tokens": _Family("counter", "Draft tokens given to the engine, by source and depth."),
    "verified_tokens": _Family("counter", "Draft tokens verified by the target model, by source and depth."),
    "accepted_tokens": _Family("counter", "Draft tokens accepted, by source and depth."),
    "steps": _Family("counter", "Engine steps that the proposer took part in."),
    "paused_steps": _Family("counter", "Engine steps in which drafting was paused."),
    "emitted_tokens": _Family("counter", "Tokens emitted for requests that the proposer was shown."),
    "requests": _Family("counter", "Requests admitted."),
    "requests_without_drafts": _Family("counter", "Requests that got no drafts, or no more, by reason."),
    "requests_with_chains_only": _Family("counter", "Requests whose drafts could not branch, by reason."),
    "errors": _Family("counter", "Exceptions of the proposer."),
    "drafting_seconds": _Family("counter", "Time the proposer took on the engine's path, by phase."),
    "live_requests": _Family("gauge", "Requests that the proposer holds state of."),
    "budget_nodes": _Family("gauge", "Draft tokens kept for verification in the last step that drafted."),
    "draft_length": _Family("gauge", "Draft tokens of each request, where one length is chosen for all."),
    "paused": _Family("gauge", "1 while drafting is paused."),
    "gain_ratio": _Family("gauge", "Expected speed over that of steps without drafts, drafting's own time left out."),
    "overhead_ratio": _Family("gauge", "Drafting's own time as a share of a step without drafts."),
    "step_time_predicted_seconds": _Family("gauge", "The last step's time as predicted."),
    "step_time_measured_seconds": _Family("gauge", "The last step's time as measured."),
    "step_time_error_ratio": _Family("gauge", "Median relative error of the last predictions of a step's time."),
    "store_bytes": _Family("gauge", "Memory of the store of earlier outputs."),
    "table_bytes": _Family("gauge", "Memory of the recycling table."),
    "context_bytes": _Family("gauge", "Memory of live requests' text and its index."),
    "arm_requests": _Family("counter", "Requests, by arm."),
    "arm_drafted_tokens": _Family("counter", "Draft tokens given to the engine, by arm."),
    "arm_verified_tokens": _Family("counter", "Draft tokens verified by the target model, by arm."),
    "arm_accepted_tokens": _Family("counter", "Draft tokens accepted, by arm."),
    "arm_emitted_tokens": _Family("counter", "Tokens emitted, by arm."),
    "arm_errors": _Family("counter", "Exceptions of the arm's proposer."),
    "arm_decode_steps": _Family(
        "counter", "Timed steps of requests after their prompt, each request's counted, by arm."
    ),
    "arm_decode_tokens": _Family("counter", "Tokens emitted in these steps, by arm."),
    "arm_decode_seconds": _Family("counter", "Time of these steps, whole for each request in them, by arm."),
    "arm_unknown_requests": _Family("counter", "Requests that named no arm of the server and got the default."),
    "stat": _Family("gauge", "Other statistics, by name."),
    "snapshot_timestamp_seconds": _Family("gauge", "When the engine wrote these figures; it does not while idle."),
    "snapshot_info": _Family("gauge", "Where the figures come from, on the server's machine."),
    "trace_info": _Family("gauge", "Where finished requests are recorded, on the server's machine."),
}

#: Families of the host's totals, and of those under a proposer's name: label and scale.
_HOST_TOTALS: dict[str, tuple[str, dict[str, str], float]] = {
    "steps": ("steps", {}, 1.0),
    "emitted": ("emitted_tokens", {}, 1.0),
    "requests": ("requests", {}, 1.0),
    "errors": ("errors", {}, 1.0),
    "live": ("live_requests", {}, 1.0),
    "requests_without_drafts": ("requests_without_drafts", {"reason": "proposer_failed"}, 1.0),
    "observe_ns": ("drafting_seconds", {"phase": "observe"}, 1e-9),
    "propose_ns": ("drafting_seconds", {"phase": "propose"}, 1e-9),
    "admit_ns": ("drafting_seconds", {"phase": "admit"}, 1e-9),
    "arm_unknown_requests": ("arm_unknown_requests", {}, 1.0),
}
#: Families of totals named ``arm.<arm>.<key>``; those named ``arm_stat.<arm>.<key>`` are of :data:`_PROPOSER_TOTALS`.
_ARM_TOTALS = {
    "requests": "arm_requests",
    "drafted": "arm_drafted_tokens",
    "verified": "arm_verified_tokens",
    "accepted": "arm_accepted_tokens",
    "emitted": "arm_emitted_tokens",
    "errors": "arm_errors",
    "decode_steps": "arm_decode_steps",
    "decode_tokens": "arm_decode_tokens",
    "decode_seconds": "arm_decode_seconds",
}
_PROPOSER_TOTALS = {
    "paused_steps": "paused_steps",
    "budget_nodes": "budget_nodes",
    "length": "draft_length",
    "paused": "paused",
    "expected_gain": "gain_ratio",
    "overhead_ratio": "overhead_ratio",
    "step_time_predicted_seconds": "step_time_predicted_seconds",
    "step_time_measured_seconds": "step_time_measured_seconds",
    "step_time_error": "step_time_error_ratio",
    "store_bytes": "store_bytes",
    "table_bytes": "table_bytes",
    "context_bytes": "context_bytes",
}
#: Totals named ``<key>.<reason>``.
_REASONS = {"without_drafts": "requests_without_drafts", "chains_only": "requests_with_chains_only"}

#: Families of ``Snapshot.by_source_depth``.
_BY_DEPTH = ("drafted_tokens", "verified_tokens", "accepted_tokens")

_logged: set[str] = set()
#: The directory made by this process, and the process: a forked child has not made it.
_made: tuple[str, int] | None = None
_registries: weakref.WeakSet[Any] = weakref.WeakSet()


# In the process that starts an engine, and in API processes


def install() -> None:
    """To be called when the plugin is loaded. Makes the directory where waiting for :func:`install_front` is too
    late: vLLM starts its fork server, whose children inherit the environment it was started in, before it makes an
    engine's configuration (entrypoints/launchers/api_server/entry.py)."""
    if os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") == "forkserver":
        _harmless(_find_directory)


def install_front(engine_args: Any) -> None:
    """To be called with the ``EngineArgs`` of an engine that selects one of our proposers, in every process that makes
    its configuration, before it does: so before any engine process starts. Idempotent; never raises.

    Does nothing where vLLM's own statistics are off (``disable_log_stats``, the default of ``vllm.LLM``)."""
    _harmless(lambda: None if engine_args.disable_log_stats else _install_front())


def uninstall() -> None:
    """Undo the patch of :func:`install_front`. Registries that have the collector keep it."""
    from prometheus_client import multiprocess

    patching.unwrap(multiprocess.MultiProcessCollector, "collect")


def _install_front() -> None:
    _find_directory()
    # Where /metrics gets vLLM's metrics from: with one API server that is the default registry.
    import prometheus_client
    from prometheus_client import multiprocess

    if prometheus_client.REGISTRY not in _registries:
        prometheus_client.REGISTRY.register(Collector())
        _registries.add(prometheus_client.REGISTRY)
    patching.wrap(multiprocess.MultiProcessCollector, "collect", _collect_all)


def _collect_all(original: Callable[..., Any]) -> Callable[..., Any]:
    def collect(self: Any) -> Any:
        """Our metrics after those in prometheus_client's files. With several API servers these files are all there is:
        vLLM's route makes a registry of them for each scrape (prometheus_fastapi_instrumentator's ``expose``), so that
        no registry can be found to add to."""
        return [*original(self), *Collector().collect()]

    return collect


def _find_directory() -> None:
    """Have a directory in the environment: an API server's process uses that of the process that started it and the
    engine, any other process makes one."""
    global _made
    inherited = os.environ.get(ENVIRONMENT)
    if multiprocessing.parent_process() is not None and inherited is not None and _is_private(inherited):
        return
    if _made is None or _made[1] != os.getpid() or not _is_private(_made[0]):
        base = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK | os.X_OK) else None
        _made = tempfile.mkdtemp(prefix=_DIRECTORY_PREFIX, dir=base), os.getpid()
        atexit.register(_remove_directory, *_made)
    os.environ[ENVIRONMENT] = _made[0]


def _remove_directory(path: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def _is_private(path: str) -> bool:
    """Whether ``path`` is a directory that nobody but this user can have written to."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _harmless(action: Callable[[], None]) -> None:
    """A server without metrics is better than none."""
    try:
        action()
    except Exception as error:
        _log_once(f"metrics of {PREFIX[:-1]} are incomplete ({type(error).__name__}: {error})", exc_info=True)


def _log_once(message: str, exc_info: bool = False) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.warning("vllm-specplug: %s", message, exc_info=exc_info)


class Collector:
    """prometheus_client's view of all snapshots in this process's directory."""

    def describe(self) -> list[Any]:
        """The families without samples: a registry asks for names when the collector is registered."""
        return list(_families().values())

    def collect(self) -> list[Any]:
        """The families with samples of now. Never raises."""
        try:
            return self._collect()
        except Exception as error:
            _log_once(f"snapshots cannot be shown ({type(error).__name__}: {error})", exc_info=True)
            return []

    def _collect(self) -> list[Any]:
        directory = os.environ.get(ENVIRONMENT)
        families = _families()
        for published in read_directory(Path(directory)) if directory else []:
            where = {"path": str(directory)}
            samples = [("snapshot_info", where, 1.0), ("snapshot_timestamp_seconds", {}, published.written / 1e9)]
            for name, labels, value in (*samples, *_samples(published.snapshot)):
                suffix = "_total" if _FAMILIES[name].kind == "counter" else ""
                families[name].add_sample(f"{PREFIX}{name}{suffix}", {**published.labels, **labels}, value)
        return [family for family in families.values() if family.samples]


def _families() -> dict[str, Any]:
    from prometheus_client.metrics_core import Metric

    return {name: Metric(PREFIX + name, family.help, family.kind) for name, family in _FAMILIES.items()}


def _samples(snapshot: Snapshot) -> Iterator[tuple[str, dict[str, str], float]]:
    """Family, labels and value of everything in a snapshot but requests, which are not bounded in number."""
    for family, counts in zip(_BY_DEPTH, snapshot.by_source_depth, strict=True):
        for source, by_depth in zip(snapshot.sources, counts, strict=True):
            for depth, count in enumerate(by_depth, 1):
                # Not those that never occurred: they would be hundreds of lines.
                if count:
                    yield family, {"source": source, "depth": _depth(depth, len(by_depth))}, count
    for name, value in snapshot.totals.items():
        first, _, rest = name.partition(".")
        arm, _, key = rest.partition(".")
        if first == "arm" and key in _ARM_TOTALS:
            yield _ARM_TOTALS[key], {"arm": arm}, value
        elif first == "arm_stat" and key in _PROPOSER_TOTALS:
            yield _PROPOSER_TOTALS[key], {"arm": arm}, value
        elif first == "arm_stat":
            yield "stat", {"name": rest}, value
        elif not rest and first in _HOST_TOTALS:
            family, labels, scale = _HOST_TOTALS[first]
            yield family, labels, value * scale
        elif first == "trace_info":
            yield "trace_info", {"path": rest}, value
        elif rest and first in _REASONS:
            yield _REASONS[first], {"reason": rest}, value
        elif rest in _PROPOSER_TOTALS:
            yield _PROPOSER_TOTALS[rest], {}, value
        else:
            yield "stat", {"name": name}, value


def _depth(depth: int, depths: int) -> str:
    return f"{depth}+" if depth == depths else str(depth)


# In the process that drafts


class Publisher:
    """Writes an engine's snapshots. All calls from the engine's thread; none of them raises."""

    def __init__(self, labels: Mapping[str, str], source: Callable[[], Snapshot]) -> None:
        """Publish for the first time, unless this process was started without a directory.

        Args:
            labels: of every metric; engines of one server differ in them.
            source: called for each snapshot.
        """
        self._source = source
        self._labels = dict(labels)
        self._started = time.time_ns()
        directory = os.environ.get(ENVIRONMENT)
        self._path: Path | None = None
        self._due = _NEVER
        if directory is None or not _is_private(directory):
            logger.debug("vllm-specplug: no directory for metrics (%s=%s)", ENVIRONMENT, directory)
            return
        self._path = Path(directory) / f"{self._started}-{os.getpid()}.json"
        self._due = 0
        self.publish()

    def tick(self, now_ns: int) -> None:
        """To be called each step with a clock of nanoseconds: publishes if the last time was long enough ago."""
        if now_ns >= self._due:
            self._due = now_ns + INTERVAL_NS
            self.publish()

    def publish(self) -> None:
        """Publish now: for the moment after which no step may come for long."""
        if self._path is None:
            return
        try:
            _write(self._path, self._labels, self._started, self._source())
        except FileNotFoundError:
            # The process that made the directory is gone, and with it whoever could read.
            self._stop()
        except Exception as error:
            _log_once(f"no snapshot for metrics ({type(error).__name__}: {error})", exc_info=True)

    def close(self) -> None:
        """Publish for the last time."""
        self.publish()
        self._stop()

    def _stop(self) -> None:
        self._path, self._due = None, _NEVER


def _write(path: Path, labels: Mapping[str, str], started: int, snapshot: Snapshot) -> None:
    document = {
        "version": _VERSION,
        "labels": labels,
        "started": started,
        "written": time.time_ns(),
        "totals": snapshot.totals,
        "sources": list(snapshot.sources),
        "by_source_depth": snapshot.by_source_depth.tolist(),
        "requests": [_FIELDS(request) for request in snapshot.requests],
    }
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(document), encoding="utf-8")
    os.replace(unfinished, path)


def read_directory(directory: Path) -> list[Published]:
    """The snapshots in ``directory``, of publishers with equal labels only that of the one that started last: an
    engine that was started anew in the same process. No directory, no
    snapshots; a file that cannot be read is left out, and logged once."""
    newest: dict[tuple[tuple[str, str], ...], Published] = {}
    for path in sorted(directory.glob("*.json")):
        try:
            published = _read(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log_once(f"snapshot {path.name} cannot be read ({type(error).__name__}: {error})")
            continue
        key = tuple(sorted(published.labels.items()))
        if key not in newest or newest[key].started < published.started:
            newest[key] = published
    return list(newest.values())


def _read(path: Path) -> Published:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise ValueError(f"not a snapshot of version {_VERSION}")
    snapshot = Snapshot(
        document["totals"],
        document["sources"],
        document["by_source_depth"],
        [RequestStats(*request) for request in document["requests"]],
    )
    return Published(document["labels"], document["started"], document["written"], snapshot)
