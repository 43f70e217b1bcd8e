"""Gives requests to a server and times its answers, with the request functions of ``vllm bench serve``.

Those functions time a streamed answer, but drop two things that a comparison needs: the output's token ids, which
vLLM puts into the stream when it is asked (``return_token_ids``), and what the server says of a request it refuses.
:class:`_Session` stands between them and aiohttp and keeps both; the stream is taken apart after the load is over, so
that the machine's processors are left to the server meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_specplug.ab.results import Load, Reply
from vllm_specplug.ab.workloads import Request


@dataclass(frozen=True)
class Target:
    """Where requests go.

    Attributes:
        url: of the server.
        model: its name there.
        api: ``chat`` or ``completions``, for prompts that are text.
        token_ids: ask for the ids of output tokens: servers other than vLLM may refuse a request that does.
    """

    url: str
    model: str
    api: str = "chat"
    token_ids: bool = True


@dataclass(frozen=True)
class Sampling:
    """How outputs are made.

    Attributes:
        output_tokens: most per request.
        temperature: 0: greedy. A sampled request's seed is ``seed`` plus its index.
        ignore_eos: every output has ``output_tokens``.
    """

    output_tokens: int
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False


@dataclass
class _Answer:
    """Of one request: when it was sent on the clock of ``time.perf_counter``, vLLM's own record, and the rest."""

    request: Request
    sent: float = 0.0
    record: Any = None
    stream: list[bytes] = field(default_factory=list)
    status: int = 0
    refusal: str = ""


def arrivals(count: int, rate: float, seed: Sequence[int]) -> list[float]:
    """Times of ``count`` arrivals of a Poisson process of ``rate`` per second, in seconds; the first one at 0.

    Not vLLM's ``get_request``: it draws from numpy's global generator while it sends, and importing it takes seconds.
    """
    gaps = np.random.default_rng(list(seed)).exponential(1 / rate, count)
    return [float(t) for t in np.cumsum(gaps) - gaps[0]]


def give(
    target: Target, requests: Sequence[Request], load: Load, sampling: Sampling, timeout_s: float, seed: Sequence[int]
) -> tuple[list[Reply], float, str]:
    """Send ``requests`` in their order and wait for the answers.

    Args:
        load: so many at once, each one that ends followed by the next; or arriving at random.
        timeout_s: for one answer. After the first that takes longer no further request is sent.
        seed: of the arrivals.

    Returns:
        The replies of all requests that were sent, in order; seconds from the first one sent to the last token; and
        why not all were sent, empty if they were.
    """
    times = arrivals(len(requests), load.rate, seed) if load.rate else [0.0] * len(requests)
    answers = asyncio.run(_give(target, requests, times, load.concurrency, sampling, timeout_s))
    begin = min((a.sent for a in answers), default=0.0)
    replies = [_reply(answer, begin) for answer in answers]
    seconds = max((r.sent_s + r.total_s for r in replies), default=0.0)
    late = any(_timed_out(a) for a in answers)
    return replies, seconds, f"did not answer a request within {timeout_s:g} s" if late else ""


async def _give(
    target: Target,
    requests: Sequence[Request],
    times: Sequence[float],
    concurrency: int,
    sampling: Sampling,
    timeout_s: float,
) -> list[_Answer]:
    import aiohttp

    answers: list[_Answer] = []
    waiting = iter(zip(times, requests, strict=True))
    late = asyncio.Event()
    # No limit on connections: the load is what limits them.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        begin = time.perf_counter()

        async def send(request: Request) -> None:
            answer = _Answer(request)
            answers.append(answer)
            await _send(target, answer, session, sampling)
            if _timed_out(answer):
                late.set()

        async def keep_busy() -> None:
            for _, request in waiting:
                await send(request)
                if late.is_set():
                    return

        if concurrency:
            await asyncio.gather(*(keep_busy() for _ in range(concurrency)))
        else:
            running = []
            for at, request in waiting:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(late.wait(), max(begin + at - time.perf_counter(), 0))
                if late.is_set():
                    break
                running.append(asyncio.create_task(send(request)))
            await asyncio.gather(*running)
    return answers


async def _send(target: Target, answer: _Answer, session: Any, sampling: Sampling) -> None:
    from vllm.benchmarks.lib import endpoint_request_func as vllm_bench

    request = answer.request
    body: dict[str, Any] = {"temperature": sampling.temperature}
    if sampling.temperature:
        body["seed"] = sampling.seed + request.index
    if target.token_ids:
        body["return_token_ids"] = True
    chat = target.api == "chat" and isinstance(request.prompt, str)
    send = vllm_bench.async_request_openai_chat_completions if chat else vllm_bench.async_request_openai_completions
    answer.sent = time.perf_counter()
    answer.record = await send(
        vllm_bench.RequestFuncInput(
            prompt=request.prompt,
            api_url=f"{target.url}/v1/chat/completions" if chat else f"{target.url}/v1/completions",
            prompt_len=0 if chat else len(request.prompt),
            output_len=sampling.output_tokens,
            model=target.model,
            ignore_eos=sampling.ignore_eos,
            extra_body=body,
        ),
        _Session(session, answer),  # type: ignore[arg-type]
    )


class _Session:
    """As much of an ``aiohttp.ClientSession`` as vLLM's request functions use."""

    def __init__(self, session: Any, answer: _Answer) -> None:
        self._session, self._answer = session, answer

    @contextlib.asynccontextmanager
    async def post(self, **arguments: Any) -> AsyncIterator[_Response]:
        """Send a request; what comes back is kept in the answer."""
        async with self._session.post(**arguments) as response:
            self._answer.status = response.status
            if response.status != 200:
                self._answer.refusal = await response.text()
            yield _Response(response, self._answer)


class _Response:
    """As much of an ``aiohttp.ClientResponse`` as they use."""

    def __init__(self, response: Any, answer: _Answer) -> None:
        self._response, self._answer = response, answer
        self.status, self.reason = response.status, response.reason
        self.content = self

    async def iter_any(self) -> AsyncIterator[bytes]:
        """The answer's pieces as they arrive."""
        async for piece in self._response.content.iter_any():
            self._answer.stream.append(piece)
            yield piece


def _timed_out(answer: _Answer) -> bool:
    # vLLM's functions turn every exception into its traceback.
    return not answer.record.success and "TimeoutError" in answer.record.error


def _reply(answer: _Answer, begin: float) -> Reply:
    record, request = answer.record, answer.request
    tokens, opened_empty = _token_ids(answer.stream)
    gaps = [float(gap) for gap in record.itl]
    count = int(record.output_tokens or len(tokens or ()))
    return Reply(
        index=request.index,
        task=request.task,
        sent_s=answer.sent - begin,
        first_s=float(record.ttft),
        total_s=float(record.latency),
        # vLLM's chat stream begins with a piece that has no token, sent with the first token's.
        gaps_s=gaps[1:] if opened_empty else gaps,
        prompt_tokens=int(record.prompt_len or 0),
        output_tokens=count,
        tokens=tokens if tokens is not None and len(tokens) == count else None,
        text=record.generated_text or "",
        error="" if record.success else _error(answer),
    )


def _token_ids(stream: Sequence[bytes]) -> tuple[list[int] | None, bool]:
    """The output's token ids, None if the server did not tell them; and whether the first piece was an opening without
    a token."""
    tokens: list[int] = []
    told = opened_empty = False
    pieces = 0
    for line in b"".join(stream).decode(errors="replace").split("\n"):
        if not line.startswith("data: {"):
            continue
        try:
            choices = json.loads(line.removeprefix("data: ")).get("choices")
        except ValueError:
            continue  # cut short
        if not choices:
            continue
        ids = choices[0].get("token_ids")
        if ids is not None:
            told = True
            tokens += ids
        delta = choices[0].get("delta") or {}
        if pieces == 0 and "role" in delta and not ids and not delta.get("content"):
            opened_empty = True
        pieces += 1
    return (tokens if told else None), opened_empty


def _error(answer: _Answer) -> str:
    """One line."""
    if answer.refusal or answer.status not in (0, 200):
        text = answer.refusal
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            said = json.loads(text)
            text = (said.get("error") or said).get("message") or text
        return f"{answer.status} {answer.record.error}: {' '.join(str(text).split())[:300]}"
    lines = [line.strip() for line in answer.record.error.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no answer"
