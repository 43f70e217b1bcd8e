"""Servers under comparison: started with their flags or reached by URL, watched, and always stopped.

A started server leads a session of its own, so that Ctrl-C in a terminal does not reach it, and so that every process
it starts can be found, also after it died itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from vllm_specplug.ab.arms import available_gib
from vllm_specplug.ab.plan import Settings, UsageError
from vllm_specplug.ab.results import Arm

HOST = "127.0.0.1"
#: For a server to end after SIGTERM; then it is killed.
GRACE_S = 20.0
#: Lines of a log that are shown when its server fails.
TAIL_LINES = 8
#: Counters that a cell keeps.
_KEPT = ("vllm:spec_decode_", "vllm:generation_tokens", "vllm:prompt_tokens", "vllm_specplug:")
_STEPS = "vllm:iteration_tokens_total_count"
#: Labels that name the server, not what it counted.
_SERVER_LABELS = frozenset({"engine", "model_name"})
#: What precedes a message in vLLM's log: the process, then level, time and place.
_PREFIX = re.compile(
    r"^(\([\w .-]+ pid=\d+\)\s*)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]*\]\s?)?"
)
_EXCEPTION = re.compile(r"^([\w.]+\.)?\w*(Error|Exception|Exit|Interrupt|Missing)(: .+)?$")
_USAGE = re.compile(r"^([\w .-]+: )?error: .+")
#: Says only that another process failed.
_EMPTY_WORDS = ("Engine core initialization failed", "WorkerProc initialization failed", "ChildFailedError")


#: Past any proxy that the environment names, as the client that sends the requests goes.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class ServerFailed(Exception):
    """A server could not start, ended, or does not answer; the message says why, its first line in short."""


class Remote:
    """A server that already runs."""

    def __init__(self, arm: Arm) -> None:
        """Nothing is asked of it yet."""
        self.arm = arm
        self.url = arm.url
        self.model = ""
        #: Most tokens of a prompt and its output together; 0: it does not tell.
        self.max_model_len = 0

    def start(self) -> None:
        """Nothing: it runs."""

    def wait_ready(self) -> None:
        """Find out which model it serves, and of which length.

        Raises:
            ServerFailed: it cannot be reached, or is no server of the OpenAI API.
        """
        address = f"{self.url}/v1/models"
        key = os.environ.get("OPENAI_API_KEY")
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
        try:
            with _open(request, timeout=10) as answer:
                card = json.load(answer)["data"][0]
                self.model, self.max_model_len = str(card["id"]), int(card.get("max_model_len") or 0)
        except urllib.error.HTTPError as error:
            raise ServerFailed(f"{address} answers {error.code} {error.reason}") from None
        except (OSError, urllib.error.URLError) as error:
            raise ServerFailed(f"no server at {self.url}: {getattr(error, 'reason', error)}") from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise ServerFailed(f"{address} does not name a model: is this an OpenAI-compatible server?") from None

    def counters(self) -> dict[str, float]:
        """The server's counters, as :attr:`.results.Cell.counters` has them; empty if it has no ``/metrics``."""
        try:
            with _open(f"{self.url}/metrics", timeout=5) as answer:
                return read_counters(answer.read().decode())
        except (OSError, urllib.error.URLError, ValueError):
            return {}

    def alive(self) -> bool:
        """Whether it may still answer."""
        return True

    def describe(self, reason: str) -> str:
        """``reason``, and what else is known about a failure."""
        return reason

    def memory_bytes(self) -> int | None:
        """Peak resident memory of its processes so far; None: it is not ours to look at."""
        return None

    def cpu_seconds(self) -> float:
        """Processor time that its processes have used and that is counted as the run's own."""
        return 0.0

    def terminate(self) -> None:
        """Ask it to end."""

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End it."""


class Server(Remote):
    """A server that the run starts.

    Args:
        arm: whose flags it gets.
        command: its command line.
        env: its environment.
        port: where it will listen.
        log: gets what it prints.
        deadline_s: for it to answer.
    """

    def __init__(
        self, arm: Arm, command: Sequence[str], env: Mapping[str, str], port: int, log: Path, deadline_s: float
    ) -> None:
        super().__init__(arm)
        self.url = f"http://{HOST}:{port}"
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._command, self._env, self._deadline_s = list(command), dict(env), deadline_s
        self._started = 0.0
        self._log_start = 0
        self._known: dict[int, psutil.Process] = {}

    def start(self) -> None:
        """Start it; :meth:`wait_ready` waits for it. To be called from the main thread, which must outlive it.

        Raises:
            ServerFailed: there is no such program.
        """
        self._started = time.monotonic()
        try:
            with self.log.open("ab") as log:
                log.write(f"$ {' '.join(self._command)}\n".encode())
                log.flush()
                self._log_start = log.tell()
                self.process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._env,
                    start_new_session=True,
                    preexec_fn=_die_with_parent(),
                )
        except OSError as error:
            raise ServerFailed(f"cannot be started: {error}") from None

    def wait_ready(self) -> None:
        """Wait until it is healthy.

        Raises:
            ServerFailed: it ended before that, or took too long.
        """
        while not self._healthy():
            if not self.alive():
                raise ServerFailed(self.describe("ended at its start"))
            if time.monotonic() - self._started > self._deadline_s:
                raise ServerFailed(self.describe(f"was not ready after {self._deadline_s:.0f} s"))
            time.sleep(0.25)
        self._family()
        super().wait_ready()

    def _healthy(self) -> bool:
        try:
            with _open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def alive(self) -> bool:
        """Whether its first process lives."""
        return self.process is not None and self.process.poll() is None

    def describe(self, reason: str) -> str:
        """``reason`` with the exit code, the line of the log that says most, and the log's last lines."""
        if self.process is not None and self.process.poll() is not None:
            reason += f" ({_exit_text(self.process.returncode)})"
        lines = self._tail()
        decisive = decisive_line(lines)
        first = f"{reason}: {decisive}" if decisive else reason
        shown = lines[-TAIL_LINES:]
        return "\n".join([first, f"last lines of {self.log}:", *(f"  {line[:300]}" for line in shown)])

    def _tail(self) -> list[str]:
        """The end of what it printed since it was started."""
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, size - 65536))
                return [line.rstrip() for line in file.read().decode(errors="replace").split("\n") if line.strip()]
        except OSError:
            return []

    def memory_bytes(self) -> int | None:
        """Sum over its live processes of each one's peak."""
        peaks = [peak for p in self._family() if (peak := _peak(p)) is not None]
        return sum(peaks) if peaks else None

    def cpu_seconds(self) -> float:
        """Of its live processes."""
        total = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _family(self) -> list[psutil.Process]:
        """Its live processes: those of its session, and descendants that left it."""
        if self.process is None:
            return []
        leader = self.process.pid
        found = []
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(leader).children(recursive=True)
        for pid in psutil.pids():
            # While a member of the session lives, its number is not given to another process.
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(pid) == leader:
                    found.append(psutil.Process(pid))
        self._known.update((p.pid, p) for p in found if p.pid not in self._known)
        self._known = {pid: p for pid, p in self._known.items() if _lives(p)}
        return list(self._known.values())

    def terminate(self) -> None:
        """SIGTERM to its first process, which then ends the others. Safe to call again."""
        if self.alive() and self.process is not None:
            self._family()
            self.process.terminate()
            self.process.send_signal(signal.SIGCONT)  # one that is stopped would not see it

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End all its processes: the first one ``grace_s`` after SIGTERM at the latest, the others with it."""
        if self.process is None:
            return
        family = self._family()
        if grace_s > 0 and self.alive():
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
            psutil.wait_procs(family, timeout=2)
        for _ in range(3):  # again, for what they may have started meanwhile
            left = self._family()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not psutil.wait_procs(left, timeout=5)[1]:
                break
        self.process.wait()


def stop_all(servers: Iterable[Remote], grace_s: float = GRACE_S) -> None:
    """End them side by side. Further interrupts are ignored meanwhile: half of it would leave processes behind."""
    servers = list(servers)
    with no_interrupts():
        if grace_s > 0:
            for server in servers:
                server.terminate()
        end = time.monotonic() + grace_s
        for server in servers:
            server.stop(max(end - time.monotonic(), 0.1) if grace_s > 0 else 0)


@contextlib.contextmanager
def no_interrupts() -> Any:
    """Ctrl-C, SIGTERM and SIGHUP are ignored in here."""
    kept = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(ValueError):  # not in the main thread: then none arrives here
            kept[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def make(settings: Settings, folder: Path, ports: Mapping[str, int], env: Mapping[str, str]) -> dict[str, Remote]:
    """All servers of a run by arm, none started; ``folder`` gets their logs."""
    found: dict[str, Remote] = {}
    for arm in settings.arms:
        if arm.url:
            found[arm.name] = Remote(arm)
            continue
        port = ports[arm.name]
        # The arm's flags last: the last one counts.
        command = [
            *vllm_command(),
            settings.model,
            f"--host={HOST}",
            f"--port={port}",
            *settings.serve_args,
            *arm.flags,
        ]
        found[arm.name] = Server(arm, command, env, port, folder / f"{arm.name}.log", settings.start_timeout_s)
    return found


def vllm_command() -> list[str]:
    """``vllm serve`` of the environment this runs in, up to the model.

    The ``vllm`` command asks for a distribution called vllm, which CPU installs may lack (see ``specplug doctor``).
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def server_environment(settings: Settings) -> dict[str, str]:
    """This process's environment, with what a user's own setting of it replaces."""
    count = sum(not arm.url for arm in settings.arms)
    # On CPUs vLLM would take nearly all memory for the first server's KV cache. A quarter of it, shared out, leaves
    # room for all servers at once: with half of it, four small ones could be too much for 23 GiB.
    kv_gib = int(min(max(available_gib() / (4 * max(count, 1)), 1), 16))
    ours = {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_HOST_IP": HOST,
        "VLLM_NO_USAGE_STATS": "1",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if Path(settings.model).is_dir():
        ours["HF_HUB_OFFLINE"] = "1"  # everything is on disk: never wait for a network
    return ours | os.environ


def choose_ports(settings: Settings) -> dict[str, int]:
    """A port for every server to start.

    Raises:
        UsageError: a port that was asked for is in use.
    """
    names = [arm.name for arm in settings.arms if not arm.url]
    with contextlib.ExitStack() as held:
        ports = {}
        for place, name in enumerate(names):
            port = settings.port + place if settings.port else 0
            # All are held until all are chosen, so that none is chosen twice.
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, port))
                listener.listen()
            except OSError as error:
                raise UsageError(
                    f"--port: port {port}, for arm {name}, cannot be used ({error.strerror}); name another first port, "
                    "or none."
                ) from None
            ports[name] = int(listener.getsockname()[1])
    return ports


def has_accelerator() -> bool:
    """Whether servers may hold an accelerator's memory, of which vLLM takes nearly all for one server."""
    return any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd"))


def read_counters(text: str) -> dict[str, float]:
    """The counters that a cell keeps, from the text of ``/metrics``: see :attr:`.results.Cell.counters`.

    Raises:
        ValueError: it is not in Prometheus's format.
    """
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            counts = family.type == "counter" and sample.name.startswith(_KEPT)
            if sample.name.endswith("_created") or not (counts or sample.name == _STEPS):
                continue
            labels = sorted(item for item in sample.labels.items() if item[0] not in _SERVER_LABELS)
            name = sample.name.removesuffix("_total")
            if labels:
                name += "{" + ",".join(f"{key}={json.dumps(value)}" for key, value in labels) + "}"
            found[name] = found.get(name, 0.0) + sample.value
    return found


def increase(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """By how much each counter grew, where it did."""
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value > before.get(name, 0.0)}


def decisive_line(lines: Sequence[str]) -> str:
    """The line of a failed server's log that says most about why: the last exception or usage error that is not about
    another process's failure; empty if there is none."""
    plain = [_PREFIX.sub("", line).strip() for line in lines]
    found = ""
    for number, line in enumerate(plain):
        if not (_EXCEPTION.match(line) or _USAGE.match(line)) or any(words in line for words in _EMPTY_WORDS):
            continue
        if "validation error" in line:  # pydantic says what is wrong further on
            line = next((rest for rest in plain[number + 1 : number + 4] if "error, " in rest), line)
        found = line
    return found[:500]


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _peak(process: psutil.Process) -> int | None:
    """Peak resident memory, or the present one where the system does not keep it."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return None


def _die_with_parent() -> Callable[[], None] | None:
    """What a new process does so that it gets SIGTERM when this one is killed; None where the system cannot."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        prctl = ctypes.CDLL(None).prctl  # found here: between fork and exec only the call itself is safe
    except (OSError, AttributeError):
        return None
    return lambda: prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG (linux/prctl.h)
