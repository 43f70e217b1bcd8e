"""Runs a comparison of servers: passes over the workload, cut in blocks, every block given to every arm in turn.

One pass is one load and one repeat. All servers are started anew for it, so that no arm meets a request that it has
answered before: proposers that draft from earlier outputs would know the answer, and the prefix cache the prompt. Only
one server is ever loaded; the others idle. Where memory does not hold all of them, a pass has one arm after another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vllm_specplug.ab import environment, fidelity_run, load, results, servers, workloads
from vllm_specplug.ab.arms import WARM_UP_PROMPTS, available_gib
from vllm_specplug.ab.plan import Settings
from vllm_specplug.ab.processors import Processors
from vllm_specplug.ab.results import Cell, Load, Plan
from vllm_specplug.ab.servers import Remote, ServerFailed
from vllm_specplug.ab.workloads import Request

WARM_UP_TOKENS = 32
LOGS = "logs"
#: A server counts an output as finished a moment after it sent the last of it.
_SETTLE_S = 0.05
#: Servers that answered before count as idle below this share of one processor; they are not waited for longer.
_IDLE_SHARE, _IDLE_WAIT_S = 0.15, 4.0
#: A block under Poisson arrivals holds at least so many requests: fewer are hardly a rate.
_LEAST_AT_A_RATE = 8


class Progress(Protocol):
    """Told what a run does."""

    def state(self, arm: str, state: str, detail: str = "") -> None:
        """``arm`` is now waiting, starting, warming up, running, stopped or failed; ``detail`` is for people."""

    def advance(self, arm: str, requests: int, left_s: float | None) -> None:
        """``arm`` has answered so many more requests; the run will take so much longer, None if that is not known."""

    def note(self, text: str) -> None:
        """Something the user should know."""


@dataclass
class _Times:
    """How long things took, to tell how long the rest will."""

    starts: list[float] = field(default_factory=list)
    per_request: dict[Load, list[float]] = field(default_factory=dict)

    def request_s(self, wanted: Load) -> float | None:
        """Seconds per request under ``wanted``, from other loads where it was not measured."""
        if wanted.rate:
            return 1 / wanted.rate
        if wanted in self.per_request:
            return sum(self.per_request[wanted]) / len(self.per_request[wanted])
        for known, seconds in self.per_request.items():
            if known.concurrency:
                # Between no gain from more requests at once, and all of it.
                return sum(seconds) / len(seconds) * (known.concurrency / wanted.concurrency) ** 0.5
        return None


class Comparison:
    """One run of :func:`run`."""

    def __init__(
        self, settings: Settings, requests: Sequence[Request], workload: str, folder: Path, progress: Progress
    ) -> None:
        """Write the plan and make the folder of logs.

        Raises:
            OSError: of the folder.
            UsageError: a port cannot be used.
        """
        self._settings, self._requests, self._folder, self._progress = settings, list(requests), folder, progress
        self._sampling = load.Sampling(settings.output_tokens, settings.temperature, settings.seed, settings.ignore_eos)
        ports = servers.choose_ports(settings)
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        self._env = servers.server_environment(settings)
        self._servers = servers.make(settings, folder / LOGS, ports, self._env)
        self._live: dict[str, Remote] = {}
        self._token_ids = dict.fromkeys(self._servers, True)
        self._together = True if settings.keep_servers else settings.together
        if self._together is None and servers.has_accelerator() and settings.starts_servers:
            self._together = False
        self._passes = [(repeat, one) for repeat in range(settings.repeats) for one in settings.loads]
        self._too_little = ""
        self._times = _Times()
        self._passes_left = len(self._passes)
        #: Requests still to be answered, by arm and load.
        self._left = {
            (name, one): len(self._requests) * settings.repeats for name in self._servers for one in settings.loads
        }
        self._plan = self._make_plan(workload)
        results.write_plan(folder, self._plan)

    @property
    def failures(self) -> dict[str, str]:
        """Arms that failed, and why."""
        return dict(self._plan.failures)

    def run(self) -> None:
        """All passes. Whatever ends it, no server that it started is left.

        Raises:
            OSError: results cannot be written.
        """
        grace_s = 0.0
        try:
            for number, (repeat, one) in enumerate(self._passes):
                self._pass(number, repeat, one)
            self._fidelity()
            self._note_end()
            grace_s = servers.GRACE_S
        except KeyboardInterrupt:
            grace_s = servers.GRACE_S / 4  # somebody waits
            raise
        finally:
            servers.stop_all(self._servers.values(), grace_s or 1.0)

    # A pass

    def _pass(self, number: int, repeat: int, one: Load) -> None:
        # Another arm first in every pass, as in every block.
        names = _rotated(list(self._servers), number)
        blocks = self._blocks(one)
        self._passes_left -= 1
        waiting = [name for name in names if name not in self._plan.failures]
        while self._together is None:
            own = [name for name in waiting if not self._servers[name].arm.url]
            self._start(own[:1])
            if not own or own[0] in self._live:
                self._together = not own or self._others_fit(own[0])
            else:
                waiting.remove(own[0])
        if len(waiting) > 1 and not self._together and number == 0:
            self._say_in_turn()
        while waiting:
            group = waiting if self._together else waiting[:1]
            waiting = waiting[len(group) :]
            self._start([name for name in group if name not in self._live])
            self._warm_up([name for name in group if name in self._live], one)
            for place, block in enumerate(blocks):
                for name in _rotated(group, number + place):
                    if name in self._live:
                        self._cell(name, one, place, repeat, block)
            if not (self._settings.keep_servers and self._together):
                self._stop(list(self._live))

    def _blocks(self, one: Load) -> list[list[Request]]:
        # Fewer requests than run at once would be another load. Not more than that: intervals come from blocks.
        at_least = one.concurrency or _LEAST_AT_A_RATE
        return workloads.cut(self._requests, self._settings.blocks, at_least)

    def _start(self, names: Sequence[str]) -> None:
        begin = time.monotonic()
        for name in names:
            self._progress.state(name, "starting")
            try:
                self._servers[name].start()
                self._live[name] = self._servers[name]
            except ServerFailed as error:
                self._fail(name, str(error))
        for name in [name for name in names if name in self._live]:
            try:
                self._servers[name].wait_ready()
                self._progress.state(name, "waiting")
                self._check_length(name)
            except ServerFailed as error:
                self._fail(name, str(error))
        if names:
            self._times.starts.append((time.monotonic() - begin) / len(names))

    def _others_fit(self, first: str) -> bool:
        """Whether as many servers like the first one as are still to start have room beside it."""
        others = sum(not s.arm.url for s in self._servers.values()) - 1
        used_gib = (self._servers[first].memory_bytes() or 0) / 2**30
        kv_gib = float(self._env["VLLM_CPU_KVCACHE_SPACE"] or 0)
        # Of the first one's KV cache nothing is used yet.
        missing_gib = others * (used_gib + kv_gib) + kv_gib - available_gib()
        if missing_gib > 0:
            self._too_little = (
                f"{missing_gib:.1f} GiB of memory are missing to run all at once, at {used_gib:.1f} GiB each and "
                f"{kv_gib:g} GiB more for its KV cache, see VLLM_CPU_KVCACHE_SPACE"
            )
        return missing_gib <= 0

    def _say_in_turn(self) -> None:
        if self._settings.together is False:
            why = "as asked"
        elif servers.has_accelerator():
            why = "vLLM takes nearly all of an accelerator's memory for one"
        else:
            why = self._too_little
        text = (
            f"Servers run one after another in each pass ({why}): a machine that changes meanwhile can look like a "
            "difference between arms; more repeats help."
        )
        self._note(text)
        self._replan(facts={**self._plan.facts, "interleaved": False})

    def _warm_up(self, names: Sequence[str], one: Load) -> None:
        """A few short requests under the pass's load, of which nothing is kept."""
        count = max(len(WARM_UP_PROMPTS), min(one.concurrency, 16))
        shape = Load(concurrency=min(max(one.concurrency, 1), 16))
        first = self._requests[0].prompt
        for name in names:
            self._progress.state(name, "warming up")
            requests = [
                # Token ids are the model's own business: the workload's, in another order, are surely some of them.
                Request(-1 - i, "", f"({i + 1}) {WARM_UP_PROMPTS[i % len(WARM_UP_PROMPTS)]}")
                if isinstance(first, str)
                else Request(-1 - i, "", first[::-1][i : i + 64] or first)
                for i in range(count)
            ]
            sampling = load.Sampling(min(WARM_UP_TOKENS, self._sampling.output_tokens))
            replies, _, failure = self._give(name, requests, shape, sampling, ())
            refused = replies and all(r.error.startswith(("400", "422")) for r in replies)
            if refused and self._servers[name].arm.url and self._token_ids[name]:
                # Not every server takes return_token_ids.
                self._token_ids[name] = False
                replies, _, failure = self._give(name, requests, shape, sampling, ())
            if failure or all(r.error for r in replies):
                self._fail_after(name, failure or replies[0].error)
            else:
                self._progress.state(name, "waiting")

    def _give(
        self, name: str, requests: Sequence[Request], one: Load, sampling: load.Sampling, seed: Sequence[int]
    ) -> tuple[list[results.Reply], float, str]:
        server = self._servers[name]
        target = load.Target(server.url, server.model, self._settings.api, self._token_ids[name])
        return load.give(target, requests, one, sampling, self._settings.timeout_s, seed)

    def _wait_until_idle(self) -> None:
        """Wait for the servers that answered before: vLLM's workers look out for more work for a second after their
        last step (its ``SpinCondition``), on processors that the next server needs."""
        own, every_s = list(self._live.values()), 0.2
        deadline = time.monotonic() + _IDLE_WAIT_S
        used = sum(server.cpu_seconds() for server in own)
        while time.monotonic() < deadline:
            time.sleep(every_s)
            before, used = used, sum(server.cpu_seconds() for server in own)
            if used - before < _IDLE_SHARE * every_s:
                return

    def _cell(self, name: str, one: Load, block: int, repeat: int, requests: Sequence[Request]) -> None:
        server = self._servers[name]
        self._wait_until_idle()
        self._progress.state(name, "running", f"{one}, repeat {repeat + 1}, block {block + 1}")
        before, clock = server.counters(), Processors(list(self._live.values()))
        seed = (self._settings.seed, block, repeat, self._settings.loads.index(one))
        replies, seconds, failure = self._give(name, requests, one, self._sampling, seed)
        busy = clock.used_by_others()
        if not failure and all(r.error for r in replies):
            failure = replies[0].error
        if not failure and not server.alive():
            failure = "ended"
        time.sleep(_SETTLE_S)
        cell = Cell(
            arm=name,
            load=one,
            block=block,
            repeat=repeat,
            seconds=seconds,
            cpu_busy=busy,
            counters=servers.increase(before, server.counters()) if server.alive() and not failure else {},
            memory_bytes=server.memory_bytes(),
            replies=replies,
            failure=failure,
        )
        results.add_cell(self._folder, cell)
        self._left[name, one] -= len(requests)
        if failure:
            self._fail_after(name, failure)
        else:
            self._times.per_request.setdefault(one, []).append(seconds / len(requests))
            self._progress.state(name, "waiting")
        self._progress.advance(name, len(requests), self._left_s())

    def _check_length(self, name: str) -> None:
        """Say it once where requests are too long for a server."""
        limit = self._servers[name].max_model_len
        text = workloads.too_long(self._requests, self._settings.output_tokens, limit)
        if text and not any(text in note for note in self._plan.facts["notes"]):
            self._note(f"{name}: {text}")

    def _note(self, text: str) -> None:
        self._progress.note(text)
        self._replan(facts={**self._plan.facts, "notes": [*self._plan.facts["notes"], text]})

    # Fidelity

    def _fidelity(self) -> None:
        """A pass of its own, after the timed ones, so that what it asks for does not slow them."""
        settings, control = self._settings, self._settings.arms[0].name
        count = min(settings.fidelity_requests, len(self._requests))
        names = [name for name in settings.fidelity if name not in self._plan.failures]
        if not names or not count or control in self._plan.failures:
            return
        if control in settings.approximate:
            self._note(f"Fidelity was not measured: {control} is approximate itself; name an exact arm first.")
            return
        self._progress.note(f"Fidelity of {', '.join(names)}: {count} requests, read by {control}.")
        wanted = fidelity_run.Wanted(
            arms=names,
            control=control,
            requests=self._requests[:count],
            output_tokens=settings.output_tokens,
            ignore_eos=settings.ignore_eos,
            api=settings.api,
            concurrency=settings.loads[0].concurrency or 1,
            timeout_s=settings.timeout_s,
            together=bool(self._together),
        )
        found = fidelity_run.measure(
            wanted, self._up, lambda probe: results.add_probe(self._folder, probe), self._progress
        )
        self._replan(facts={**self._plan.facts, "fidelity": found})

    @contextlib.contextmanager
    def _up(self, name: str) -> Iterator[Remote]:
        """A server that runs in here, and on if it did before. Raises ``ServerFailed``."""
        server = self._servers[name]
        if name in self._live:
            yield server
            return
        self._progress.state(name, "starting")
        try:
            server.start()
            server.wait_ready()
            yield server
        finally:
            servers.stop_all([server])
            self._progress.state(name, "stopped")

    # Failures and ends

    def _fail_after(self, name: str, reason: str) -> None:
        """Give an arm up that stopped answering well."""
        server = self._servers[name]
        time.sleep(0.5)  # the end of a process may come a moment after that of its connections
        if not server.alive():
            reason = f"ended while it was measured ({reason})" if reason != "ended" else "ended while it was measured"
        elif "chat template" in reason.lower():
            reason += " (without a chat template use --api completions)"
        self._fail(name, server.describe(reason))

    def _fail(self, name: str, reason: str) -> None:
        self._live.pop(name, None)
        self._progress.state(name, "failed", reason)
        servers.stop_all([self._servers[name]], servers.GRACE_S / 4)
        self._left = {key: count for key, count in self._left.items() if key[0] != name}
        self._replan(failures={**self._plan.failures, name: reason})

    def _stop(self, names: Sequence[str]) -> None:
        servers.stop_all([self._live.pop(name) for name in names])
        for name in names:
            self._progress.state(name, "stopped")

    # The plan, and how long it takes

    def _make_plan(self, workload: str) -> Plan:
        settings = self._settings
        notes = []
        if any(arm.url for arm in settings.arms):
            notes.append(
                "Servers given by URL are not started anew for each pass: what they learned, and cached prompts, stay."
            )
        elif settings.keep_servers:
            notes.append("Servers were not started anew for each pass: proposers may know outputs of earlier passes.")
        for note in notes:
            self._progress.note(note)
        return Plan(
            arms=list(settings.arms),
            loads=list(settings.loads),
            model=settings.model,
            workload=workload,
            requests=len(self._requests),
            tasks=list(dict.fromkeys(r.task for r in self._requests)),
            output_tokens=settings.output_tokens,
            temperature=settings.temperature,
            repeats=settings.repeats,
            seed=settings.seed,
            facts={
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "versions": environment.versions(),
                "machine": {"cpu": environment.cpu_model(), "cpus": environment.cpu_count()},
                "serve_args": list(settings.serve_args),
                "environment": _of_speed(self._env),
                "api": settings.api,
                "ignore_eos": settings.ignore_eos,
                "keep_servers": settings.keep_servers,
                "interleaved": True,
                "complete": False,
                "notes": notes,
                **({"approximate": settings.approximate} if settings.approximate else {}),
            },
        )

    def _replan(self, **changes: object) -> None:
        self._plan = dataclasses.replace(self._plan, **changes)  # type: ignore[arg-type]
        results.write_plan(self._folder, self._plan)

    def _note_end(self) -> None:
        self._replan(facts={**self._plan.facts, "complete": True})

    def _left_s(self) -> float | None:
        """How long the rest takes, as far as what was measured can tell."""
        total = 0.0
        for (_, one), count in self._left.items():
            each = self._times.request_s(one)
            if each is None:
                return None
            total += each * count
        if self._times.starts and not self._settings.keep_servers:
            arms = len(self._servers) - len(self._plan.failures)
            total += sum(self._times.starts) / len(self._times.starts) * arms * self._passes_left
        return total


def run(
    settings: Settings, requests: Sequence[Request], workload: str, folder: Path, progress: Progress
) -> dict[str, str]:
    """Compare, writing every result into ``folder`` as soon as it is known; the arms that failed, and why.

    Raises:
        OSError: results cannot be written.
        UsageError: a port cannot be used.
        KeyboardInterrupt: it was interrupted; servers are stopped, and what was measured is in ``folder``.
    """
    comparison = Comparison(settings, requests, workload, folder, progress)
    comparison.run()
    return comparison.failures


def _rotated(names: Sequence[str], by: int) -> list[str]:
    turn = by % len(names) if names else 0
    return [*names[turn:], *names[:turn]]


def _of_speed(env: Mapping[str, str]) -> dict[str, str]:
    """What of the servers' environment decides their speed, and no secrets."""
    wanted = ("VLLM_CPU_", "OMP_", "CUDA_VISIBLE_DEVICES", "VLLM_USE_", "VLLM_ATTENTION")
    return {name: value for name, value in sorted(env.items()) if name.startswith(wanted)}
