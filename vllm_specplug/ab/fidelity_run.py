"""Measures fidelity over plain HTTP, in a short pass of its own: :mod:`.fidelity` says what and why.

Every arm in question and the control generate the first requests of the workload greedily, telling log-probabilities
of the likeliest tokens (``logprobs`` of the completions API). Then the control is given each prompt with its output as
a prompt and tells its own for all of it (``prompt_logprobs``, which has vLLM compute the whole prompt: it reads no
prefix cache then, sampling_params.py). One such request at a time: their logits take memory that vLLM does not plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_specplug.ab import servers
from vllm_specplug.ab.results import Probe, Top
from vllm_specplug.ab.servers import Remote, ServerFailed
from vllm_specplug.ab.workloads import Request

#: Log-probabilities asked for per token: vLLM's default limit is 20 (``--max-logprobs``).
TOP = 8
#: A server counts an output as finished a moment after it sent the last of it.
_SETTLE_S = 0.05
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens"


class NotAnswered(Exception):
    """A server did not answer, or not with what is needed; the message says why in a line."""


class Progress(Protocol):
    """As much of :class:`.compare.Progress` as is used here."""

    def state(self, arm: str, state: str, detail: str = "") -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Attributes:
        arms: their names; ``control``: the exact one's.
        requests: of the workload, in order.
        output_tokens, ignore_eos, api: as for the timed requests.
        concurrency: of generation.
        timeout_s: for one answer.
        together: the control may stay up while an arm runs.
    """

    arms: Sequence[str]
    control: str
    requests: Sequence[Request]
    output_tokens: int
    ignore_eos: bool
    api: str
    concurrency: int
    timeout_s: float
    together: bool


@dataclass(frozen=True)
class _Output:
    """What a server generated after ``prompt``, and what it gave the likeliest tokens at each place."""

    request: Request
    prompt: list[int]
    tokens: list[int]
    own: list[Top]


def measure(
    wanted: Wanted,
    up: Callable[[str], AbstractContextManager[Remote]],
    keep: Callable[[Probe], None],
    progress: Progress,
) -> dict[str, Any]:
    """Measure, handing every probe to ``keep`` as soon as it is known.

    Args:
        up: a server by its arm's name, running within the context; raises ``ServerFailed`` where it cannot.

    Returns:
        For the plan's facts: ``arms``, ``control``, ``requests``, ``top``, ``concurrency``; ``skipped``: why there is
        nothing of an arm; ``mat``: tokens per decode step by arm, where its server counts them.

    Raises:
        OSError: of ``keep``.
    """
    skipped: dict[str, str] = {}
    mat: dict[str, float] = {}
    outputs: dict[str, list[_Output]] = {}

    def generate(name: str, server: Remote) -> None:
        before = server.counters()
        outputs[name], problems = asyncio.run(_generate(server, wanted, _told(progress, name, "generating")))
        _check(name, server, len(outputs[name]), problems, progress)
        time.sleep(_SETTLE_S)
        rate = _mat(before, server.counters(), outputs[name])
        if rate is not None:
            mat[name] = rate

    def control() -> Remote:
        server = stack.enter_context(up(wanted.control))
        asyncio.run(_can_read(server, wanted))
        return server

    with contextlib.ExitStack() as stack:
        try:
            # First, where it does no harm: what it refuses is then known before the arms have worked for nothing.
            reader = control() if wanted.together else None
            for name in wanted.arms:
                try:
                    with up(name) as server:
                        generate(name, server)
                except (ServerFailed, NotAnswered) as error:
                    skipped[name] = _first_line(error)
            left = [name for name in wanted.arms if name not in skipped]
            if left:
                reader = reader or control()
                generate(wanted.control, reader)
                for name in (wanted.control, *left):
                    told = _told(progress, wanted.control, f"reading {name}")
                    done, problems = asyncio.run(_read(reader, name, outputs[name], wanted, keep, told))
                    _check(wanted.control, reader, done, problems, progress)
        except (ServerFailed, NotAnswered) as error:
            why = f"the control {wanted.control}: {_first_line(error)}"
            skipped |= {name: why for name in wanted.arms if name not in skipped}
    for name, why in skipped.items():
        progress.note(f"{name}: fidelity was not measured: {why}")
    return {
        "arms": list(wanted.arms),
        "control": wanted.control,
        "requests": len(wanted.requests),
        "top": TOP,
        "concurrency": wanted.concurrency,
        "skipped": skipped,
        "mat": mat,
    }


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _told(progress: Progress, name: str, what: str) -> Callable[[int, int], None]:
    return lambda done, of: progress.state(name, "running", f"fidelity: {what}, {done} of {of}")


def _check(name: str, server: Remote, done: int, problems: Sequence[str], progress: Progress) -> None:
    """Say which requests failed. Raises :class:`NotAnswered` if all did."""
    if problems and not done:
        reason = problems[0] if server.alive() else f"ended ({problems[0]})"
        raise NotAnswered(server.describe(reason))
    if problems:
        count = done + len(problems)
        progress.note(f"{name}: {len(problems)} of {count} requests for fidelity failed, the first: {problems[0]}")


def _mat(before: Mapping[str, float], after: Mapping[str, float], outputs: Sequence[_Output]) -> float | None:
    """Tokens per decode step: an output's first token comes from its prompt. None where the server does not count."""
    if not after:
        return None
    decoded = sum(len(o.tokens) - 1 for o in outputs)
    steps = decoded - servers.increase(before, after).get(_ACCEPTED, 0.0)
    return decoded / steps if steps > 0 else 1.0


# Requests


class _Client:
    """Posts to one server; within ``async with``."""

    def __init__(self, server: Remote, timeout_s: float) -> None:
        self._server, self._timeout_s = server, timeout_s
        self.late = False

    async def __aenter__(self) -> _Client:
        import aiohttp

        key = os.environ.get("OPENAI_API_KEY")
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer. Raises :class:`NotAnswered`."""
        import aiohttp

        try:
            body = {"model": self._server.model, "temperature": 0.0, **body}
            async with self._session.post(f"{self._server.url}{path}", json=body) as answer:
                text = await answer.text()
                status, reason = answer.status, answer.reason
        except asyncio.TimeoutError:
            self.late = True
            raise NotAnswered(f"did not answer a request within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise NotAnswered(f"did not answer: {error or type(error).__name__}") from None
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if status != 200 or not isinstance(found, dict):
            if isinstance(found, dict):
                said = found.get("error") or found
                text = str(said.get("message") or text) if isinstance(said, dict) else str(said)
            raise NotAnswered(f"{status} {reason}: {' '.join(text.split())[:300]}")
        return found


async def _generate(
    server: Remote, wanted: Wanted, told: Callable[[int, int], None]
) -> tuple[list[_Output], list[str]]:
    """Outputs in the workload's order, and what went wrong with the others."""
    found: dict[int, _Output] = {}
    problems: list[str] = []
    waiting = iter(enumerate(wanted.requests))
    async with _Client(server, wanted.timeout_s) as client:

        async def keep_busy() -> None:
            for place, request in waiting:
                try:
                    found[place] = await _output(client, server, request, wanted)
                except NotAnswered as error:
                    problems.append(str(error))
                told(len(found) + len(problems), len(wanted.requests))
                if client.late:
                    return

        await asyncio.gather(*(keep_busy() for _ in range(wanted.concurrency)))
    return [found[place] for place in sorted(found)], problems


async def _output(client: _Client, server: Remote, request: Request, wanted: Wanted) -> _Output:
    prompt = request.prompt if isinstance(request.prompt, list) else await _ids(client, request.prompt, wanted.api)
    # The control has to read the output and say one token more.
    room = server.max_model_len - len(prompt) - 1 if server.max_model_len else wanted.output_tokens
    if room < 2:
        raise NotAnswered(
            f"a prompt of {len(prompt)} tokens leaves no room in a context of {server.max_model_len}: "
            "see --max-model-len of vllm serve"
        )
    answer = await client.post(
        "/v1/completions",
        prompt=prompt,
        max_tokens=min(room, wanted.output_tokens),
        ignore_eos=wanted.ignore_eos,
        logprobs=TOP,
        return_token_ids=True,
        return_tokens_as_token_ids=True,
    )
    try:
        choice = answer["choices"][0]
        tokens = [int(token) for token in choice["token_ids"]]
        own: list[Top] = [{int(k.removeprefix("token_id:")): float(v) for k, v in t.items()} for t in _top(choice)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise NotAnswered("does not tell token ids and their log-probabilities: is this a vLLM server?") from None
    if len(own) != len(tokens) or not all(own):
        raise NotAnswered(f"told log-probabilities of {len(own)} tokens for an output of {len(tokens)}")
    return _Output(request, prompt, tokens, own)


def _top(choice: Mapping[str, Any]) -> list[dict[str, float]]:
    return list(choice["logprobs"]["top_logprobs"])


async def _ids(client: _Client, prompt: str, api: str) -> list[int]:
    """Token ids of the prompt that the server makes of text, asked as the timed requests are."""
    if api == "chat":
        message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
        body = {"messages": [message], "max_completion_tokens": 1, "return_token_ids": True}
        answer = await client.post("/v1/chat/completions", **body)
        ids = answer.get("prompt_token_ids")
    else:
        answer = await client.post("/v1/completions", prompt=prompt, max_tokens=1, return_token_ids=True)
        ids = (answer.get("choices") or [{}])[0].get("prompt_token_ids")
    if not isinstance(ids, list) or not ids:
        raise NotAnswered("does not tell a prompt's token ids: is this a vLLM server?")
    return [int(token) for token in ids]


async def _can_read(server: Remote, wanted: Wanted) -> None:
    """Raises :class:`NotAnswered` if the server does not tell log-probabilities of prompts."""
    async with _Client(server, wanted.timeout_s) as client:
        await _prompt_logprobs(client, "one two three")


async def _prompt_logprobs(client: _Client, prompt: str | list[int]) -> list[Any]:
    answer = await client.post("/v1/completions", prompt=prompt, max_tokens=1, prompt_logprobs=TOP)
    found = (answer.get("choices") or [{}])[0].get("prompt_logprobs")
    if not isinstance(found, list):
        raise NotAnswered("gives no log-probabilities of prompts (prompt_logprobs): is this a vLLM server?")
    return found


async def _read(
    server: Remote,
    arm: str,
    outputs: Sequence[_Output],
    wanted: Wanted,
    keep: Callable[[Probe], None],
    told: Callable[[int, int], None],
) -> tuple[int, list[str]]:
    """Have ``arm``'s outputs read, one after another; how many were, and what went wrong with the others."""
    done, problems = 0, list[str]()
    async with _Client(server, wanted.timeout_s) as client:
        for output in outputs:
            # As much as this server's context holds, and one more token.
            room = server.max_model_len - len(output.prompt) - 1 if server.max_model_len else len(output.tokens)
            tokens, own = output.tokens[: max(room, 0)], output.own[: max(room, 0)]
            try:
                told_of = await _prompt_logprobs(client, [*output.prompt, *tokens])
                exact = [_exact(top, token) for top, token in zip(told_of[len(output.prompt) :], tokens, strict=True)]
            except (NotAnswered, ValueError) as error:
                problems.append(str(error))
            else:
                keep(Probe(arm, output.request.index, output.request.task, tokens, own, exact))
                done += 1
            told(done + len(problems), len(outputs))
            if client.late:
                break
    return done, problems


def _exact(told: Any, token: int) -> Top:
    """One place of ``prompt_logprobs``. Raises :class:`NotAnswered`."""
    try:
        found = {int(key): float(value["logprob"]) for key, value in told.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        found = {}
    if token not in found:
        raise NotAnswered("gives log-probabilities of prompts that lack the prompt's own token")
    return found
